import numpy as np
import pytest
from PIL import Image

from actionunits import FaceDetector
from actionunits.face_detection import Face, box_around
from actionunits.tracking import FaceTracker, SeenFace


class Stage:
    """A detector that knows where the faces of each frame are; `locate` finds the one nearest to a box."""

    def __init__(self, landmarks):
        self.landmarks = landmarks - landmarks.mean(0)
        self.faces = []
        self.hidden = False  # from the detector, not from `locate`
        self.detections = 0

    def picture(self, *faces, size=(400, 200)):
        """A frame with faces (x, y, brightness of the chin, if negative of the brow), the first in front."""
        self.faces = [self.landmarks * 0.5 + np.array(face[:2]) for face in faces]
        picture = Image.new("RGB", size, (10, 40, 90))
        for x, y, brightness in reversed(faces):
            shade = np.linspace(max(0, -brightness), max(0, brightness), 50).astype(np.uint8)
            picture.paste(Image.fromarray(shade[:, None].repeat(50, 1)), (round(x) - 25, round(y) - 25))
        return picture

    def face(self, points, confidence=0.9):
        return Face(box_around(points, "ibug68", (400, 200)), confidence, points, "ibug68")

    def __call__(self, picture):
        self.detections += 1
        return [] if self.hidden else [self.face(points) for points in self.visible]

    @property
    def visible(self):
        """Faces that no other one covers."""
        seen = self.faces
        return [p for i, p in enumerate(seen) if all(abs(p - q).mean() > 25 for q in seen[:i])]

    def locate(self, picture, boxes):
        ((box),) = np.asarray(boxes)
        center = (box[:2] + box[2:]) / 2
        if center.min() < 0:
            raise ValueError("outside")
        near = [p for p in self.visible if np.abs(self.face(p).box - box).max() < 20]
        return [self.face(near[0], 0.95) if near else self.face(self.landmarks * 0.5 + center, 0.1)]


@pytest.fixture
def stage(landmarks):
    return Stage(landmarks)


def numbers(faces):
    """Number of each face from left to right."""
    return [face.track.number for face in sorted(faces, key=lambda face: face.box[0])]


def test_a_moving_face_keeps_its_number_and_a_new_one_gets_the_next(stage):
    tracker = FaceTracker(stage)
    for i in range(30):
        faces = [(50 + 5 * i, 100, 200)] + ([(350, 100, 120)] if i >= 10 else [])
        found = tracker(stage.picture(*faces))
        assert numbers(found) == ([0] if i < 10 else [0, 1])
        assert [face.continues for face in found if face.track.number == 0] == [i > 0]
        assert [face.continues for face in found if face.track.number == 1] == [i > 10] * (i >= 10)


@pytest.mark.parametrize("detect_every", [1, 4])
@pytest.mark.parametrize("brightness", [(200, 200), (200, -200)], ids=["twins", "different"])
def test_two_faces_cross(stage, detect_every, brightness):
    """One passes before the other, who is not seen meanwhile; by their motion nobody is mixed up."""
    tracker = FaceTracker(stage, detect_every=detect_every)
    seen = []
    for i in range(40):
        faces = [(60 + 7 * i, 100, brightness[0]), (340 - 7 * i, 104, brightness[1])]
        found = tracker(stage.picture(*faces))
        seen.append(len(found))
        for face in found:
            x = (face.box[0] + face.box[2]) / 2
            expected = faces[face.track.number][0] + tracker_offset(stage)
            assert abs(x - expected) < 10
    assert min(seen) == 1 and seen[-1] == 2  # one was hidden, and came back


@pytest.mark.parametrize("detect_every", [1, 10])
def test_one_face_is_not_given_to_two_tracks(stage, detect_every):
    """The second disappears behind the first, and its motion leads to where the first one is seen."""
    tracker = FaceTracker(stage, detect_every=detect_every)
    for x in (300, 250, 200, 151):
        assert len(tracker(stage.picture((100, 100, 200), (x, 100, 200)))) == 2
    assert numbers(tracker(stage.picture((100, 100, 200), (104, 100, 200)))) == [0]


def tracker_offset(stage):
    """From the point that a face of the stage is placed at to the middle of its box."""
    box = stage.face(stage.landmarks * 0.5 + 100).box
    return (box[0] + box[2]) / 2 - 100


def test_the_detector_looks_every_k_frames_and_whenever_somebody_is_lost(stage):
    tracker = FaceTracker(stage, detect_every=5)
    here, away = stage.picture, lambda: stage.picture()
    counts = []
    for frame in range(20):
        tracker(here((100, 100, 200)) if frame < 12 else away())
        counts.append(stage.detections)
    assert np.diff([0, *counts]).tolist() == [1, 0, 0, 0, 0] * 2 + [1, 0] + [1] * 8  # nobody: every frame


def test_a_face_that_the_detector_misses_is_looked_for_where_it_was(stage):
    tracker = FaceTracker(stage)
    tracker(stage.picture((100, 100, 200)))
    stage.hidden = True
    (face,) = tracker(stage.picture((104, 100, 200)))
    assert face.track.number == 0 and face.continues
    np.testing.assert_array_equal(face.landmarks, stage.faces[0])
    assert tracker(stage.picture()) == []


def test_lost_faces_are_resumed_for_a_while(stage):
    for gap, number in ((3, 0), (4, 1)):
        tracker = FaceTracker(stage, patience=3)
        tracker(stage.picture((100, 100, 200)))
        for i in range(gap):
            assert tracker(stage.picture() if i % 2 else None) == []  # None: a broken frame
        (face,) = tracker(stage.picture((100, 100, 200)))
        assert face.track.number == number and not face.continues


def test_a_steady_face_is_expected_where_it_will_be_even_after_a_gap(stage):
    tracker = FaceTracker(stage)

    def goes_to(x):
        (face,) = tracker(stage.picture((x, 100, 200)))
        return face.track, face.box

    for x in range(60, 200, 10):
        track, box = goes_to(x)
    for frames_ahead in (1, 2, 3):
        np.testing.assert_allclose(track.expected_box - box, [10 * frames_ahead, 0] * 2, atol=0.01)
        tracker(stage.picture())
    _, box = goes_to(190 + 4 * 10)
    np.testing.assert_allclose(track.expected_box - box, [10, 0] * 2, atol=0.01)


def test_looks_decide_where_places_do_not(stage):
    """Of two people, one above the other, each is seen next a little closer to the other's place."""
    tracker = FaceTracker(stage)
    assert numbers(tracker(stage.picture((100, 60, 200), (100, 140, -200)))) == [0, 1]
    assert numbers(tracker(stage.picture((70, 104, 200), (130, 96, -200)))) == [0, 1]


def test_a_face_elsewhere_or_of_another_size_is_another_face(stage):
    tracker = FaceTracker(stage)
    tracker(stage.picture((60, 100, 200)))
    assert numbers(tracker(stage.picture((340, 100, 200)))) == [1]
    stage.landmarks = stage.landmarks * 2.5
    assert numbers(tracker(stage.picture((340, 100, 200)))) == [2]


def test_detected_faces_are_exactly_the_detectors(photo):
    detector = FaceDetector()
    tracker = FaceTracker(detector)
    for shift in (0, 3, 6):
        picture = Image.new("RGB", (260, 220), (40, 90, 160))
        picture.paste(photo, (shift, 10))
        (tracked,), (alone,) = tracker(picture), detector(picture)
        np.testing.assert_array_equal(tracked.landmarks, alone.landmarks)
        np.testing.assert_array_equal(tracked.box, alone.box)
        assert tracked.confidence == alone.confidence and tracked.track.number == 0


def test_followed_landmarks_are_close_to_detected_ones(photo):
    detector = FaceDetector()
    tracker = FaceTracker(detector, detect_every=100)
    for shift in range(0, 30, 3):
        picture = Image.new("RGB", (260, 220), (40, 90, 160))
        picture.paste(photo, (shift, 10))
        (tracked,) = tracker(picture)
    (alone,) = detector(picture)
    difference = np.abs(tracked.landmarks - alone.landmarks).mean()
    assert 0 < difference < 0.02 * (alone.box[2] - alone.box[0])


def test_crowds_are_held_apart(stage):
    tracker = FaceTracker(stage, detect_every=3)
    for i in range(12):
        assert numbers(tracker(stage.picture(*((60 + 90 * k + i, 100, 200) for k in range(4))))) == [
            0,
            1,
            2,
            3,
        ]


@pytest.mark.parametrize("wrong", [{"detect_every": 0}, {"detect_every": 1.5}, {"patience": -1}])
def test_wrong_options(stage, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        FaceTracker(stage, **wrong)


def test_portraits_do_not_see_the_light(photo, landmarks):
    """They are normalised, so that their mean product is a correlation."""
    face = Face(box_around(landmarks, "ibug68", photo.size), 1.0, landmarks, "ibug68")
    portraits = [
        SeenFace(photo.point(lambda v, a=a, b=b: a * v + b), face).portrait for a, b in ((1, 0), (0.5, 60))
    ]
    for portrait in portraits:
        assert portrait.mean() == pytest.approx(0, abs=1e-9)
        assert (portrait * portrait).mean() == pytest.approx(1)
    assert (portraits[0] * portraits[1]).mean() > 0.99
    blank = SeenFace(Image.new("RGB", photo.size, (90, 90, 90)), face).portrait
    assert not blank.any(), "a face without contrast resembles nobody"
