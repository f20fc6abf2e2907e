import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from actionunits import FaceDetector, checkpoints, face_detection
from actionunits.face_detection import (
    PROPOSALS,
    Face,
    _agreed,
    _propose,
    _windows,
    _without_doubles,
    box_around,
    check_boxes,
)
from actionunits.pictures import load_picture, sample_photo

needs_weights = pytest.mark.skipif(
    not (checkpoints.FOLDER / "face_landmarks" / "config.json").is_file(),
    reason="the landmark network's weights are not in this checkout",
)


def face(box, confidence=0.9):
    return Face(np.array(box, dtype=float), confidence, np.zeros((68, 2)), "ibug68")


def overlap_over_union(a, b):
    shared = np.prod(np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0))
    return shared / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - shared)


def test_finds_the_face_of_a_real_photo(photo, landmarks, detector):
    (found,) = detector(photo)
    assert found.confidence == 0.97
    assert found.scheme == "ibug68"
    np.testing.assert_array_equal(found.landmarks, landmarks)
    assert overlap_over_union(found.box, np.array([60, 56, 150, 147])) > 0.6


def test_no_face_is_an_empty_list(no_face, detector):
    assert detector(no_face) == []
    assert detector(Image.effect_noise((300, 300), 80)) == []


def test_what_the_network_does_not_believe_is_no_face(photo, known_landmarker):
    assert FaceDetector(landmarker=known_landmarker())(photo) == []


def test_an_opencv_without_cascades_is_named(photo, landmarks, known_landmarker, monkeypatch):
    monkeypatch.delattr(face_detection.cv2, "CascadeClassifier")
    detector = FaceDetector(landmarker=known_landmarker(landmarks))
    with pytest.raises(ImportError, match="has no cascades.*opencv-python-headless<5"):
        detector(photo)
    assert len(detector.locate(photo, [[60, 56, 150, 147]])) == 1  # boxes need none


def test_min_confidence(photo, landmarks, known_landmarker):
    landmarker = known_landmarker(landmarks)
    assert len(FaceDetector(min_confidence=0.97, landmarker=landmarker)(photo)) == 1
    assert FaceDetector(min_confidence=0.98, landmarker=landmarker)(photo) == []
    with pytest.raises(ValueError, match="0..1, got 1.5"):
        FaceDetector(min_confidence=1.5, landmarker=landmarker)


def test_several_faces_come_largest_first(photo, landmarks, known_landmarker):
    both = Image.new("RGB", (320, 200))
    both.paste(photo.resize((100, 100), Image.Resampling.BOX), (0, 50))
    both.paste(photo, (120, 0))
    small, large = (landmarks + 0.5) / 2 - 0.5 + [0, 50], landmarks + [120, 0]
    faces = FaceDetector(landmarker=known_landmarker(small, large))(both)
    assert len(faces) == 2
    np.testing.assert_array_equal(faces[0].landmarks, large)
    np.testing.assert_array_equal(faces[1].landmarks, small)


def test_proposals_are_tried_until_one_yields_a_face(photo, landmarks, no_face, known_landmarker):
    landmarker = known_landmarker(landmarks)
    FaceDetector(landmarker=landmarker)(photo)
    assert landmarker.calls == 1
    FaceDetector(landmarker=landmarker)(no_face)
    assert landmarker.calls == 1 + len(PROPOSALS)


def test_a_tight_crop_is_found_as_a_whole(photo, landmarks, known_landmarker):
    tight = photo.crop((66, 54, 146, 134))  # from brows to lower lip: no cascade sees a face
    found = FaceDetector(landmarker=known_landmarker(landmarks - [66, 54]))(tight)
    assert len(found) == 1


def test_an_unsure_face_waits_for_a_surer_one(photo, landmarks, known_landmarker):
    class Doubtful(known_landmarker):
        def locate(self, image, boxes):
            located = super().locate(image, boxes)
            later = 0.97 if self.calls > self.sure_after else 0.77
            return [(points, later if score > 0.5 else score) for points, score in located]

    landmarker = Doubtful(landmarks)
    landmarker.sure_after = 100
    (found,) = FaceDetector(landmarker=landmarker)(photo)
    assert found.confidence == 0.77 and landmarker.calls == len(PROPOSALS)
    landmarker.calls, landmarker.sure_after = 0, 2
    (found,) = FaceDetector(landmarker=landmarker)(photo)
    assert found.confidence == 0.97 and 2 < landmarker.calls <= len(PROPOSALS) + 1


def test_windows_find_what_no_cascade_sees(landmarks, known_landmarker):
    """In a copy of 480 pixels of a picture of 960, and the answer is in pixels of the picture."""
    colours = np.random.default_rng(0).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    clouds = Image.fromarray(colours).resize((960, 960), Image.Resampling.BICUBIC)
    assert not any(len(_propose(clouds, proposal)) for proposal in PROPOSALS if proposal.cascade)
    large = landmarks * 3 + [300, 250]

    class Landmarker(known_landmarker):
        def locate(self, image, boxes):
            self.size = image.size
            self.faces = [(large + 0.5) * (image.width / 960) - 0.5]
            return [(points, 1.02 * score) for points, score in super().locate(image, boxes)]

    landmarker = Landmarker()
    (found,) = FaceDetector(landmarker=landmarker)(clouds)
    assert landmarker.calls > sum(p.cascade is not None for p in PROPOSALS) + 1
    assert landmarker.size == (960, 960)
    np.testing.assert_allclose(found.landmarks, large)


def test_windows_reach_every_place():
    boxes = _windows((300, 200), (0.5, 1.5))
    np.testing.assert_array_equal(boxes[-1], [-0.5, -50.5, 299.5, 249.5])  # the large one, in the middle
    small = boxes[:-1]
    np.testing.assert_allclose(small[:, 2:] - small[:, :2], 100)
    np.testing.assert_allclose([*small[:, :2].min(0), *small[:, 2:].max(0)], [-0.5, -0.5, 299.5, 199.5])
    for x, y in np.random.default_rng(0).uniform((50, 50), (250, 150), (100, 2)):
        off = np.abs((small[:, :2] + small[:, 2:]) / 2 + 0.5 - [x, y]).max(1)
        assert off.min() <= 16  # half of a stride of 32


def test_a_strip_of_a_picture_is_not_laid_with_thousands_of_windows(known_landmarker):
    """At 20000 x 30 pixels the windows would be of one pixel each: 27,000 of them, and 10 GB of memory."""
    assert len(_windows((480, 1), (0.5, 0.8, 1.0, 1.25, 1.55))) == 0
    assert len(_windows((480, 15), (0.8, 1.0, 1.25, 1.55))) < 1000
    assert len(_windows((24, 24), (0.5, 0.8))) > 2  # pictures as small as they may be keep theirs
    assert FaceDetector(landmarker=known_landmarker())(Image.new("RGB", (20000, 30))) == []


def test_two_windows_must_agree(landmarks):
    eyes = np.linalg.norm(landmarks[36] - landmarks[45])
    near, far = landmarks + 0.09 * eyes, landmarks + 0.2 * eyes
    assert _agreed([], 0.9) == []
    assert _agreed([(landmarks, 0.99), (far, 0.98)], 0.9) == []
    assert _agreed([(landmarks, 0.99), (near, 0.89)], 0.9) == []
    ((points, score),) = _agreed([(landmarks, 0.95), (far, 0.97), (near, 0.99)], 0.9)
    assert score == 0.99 and points is near
    two = _agreed([(landmarks, 0.95), (near, 0.96), (landmarks + 100, 0.97), (near + 100, 0.98)], 0.9)
    assert [score for _, score in two] == [0.98, 0.96]


@pytest.mark.parametrize(
    "proposal", [p for p in PROPOSALS if p.cascade], ids=lambda p: f"{p.cascade}-{p.side}"
)
def test_proposed_boxes_are_in_pixels_of_the_photo(photo, proposal):
    """What the mirror image proposes comes second, at mirrored places."""
    large = photo.resize((960, 960))
    turned = large.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    alone, both = (_propose(large, replace(proposal, mirrored=mirrored)) for mirrored in (False, True))
    mirrored = _propose(turned, replace(proposal, mirrored=False))
    np.testing.assert_array_equal(both[: len(alone)], alone)
    back = 959 - mirrored[:, [2, 1, 0, 3]] * [1, -1, 1, -1] - [0, 959, 0, 959]
    np.testing.assert_allclose(both[len(alone) :], back)
    if proposal.cascade == "frontalface_alt2":
        for boxes in (alone, back):
            assert any(overlap_over_union(box, np.array([60, 56, 150, 147]) * 4.8) > 0.6 for box in boxes)


def test_locate_keeps_the_boxes_and_their_order(photo, landmarks, detector):
    boxes = [[0, 150, 40, 190], [55, 35, 152, 132]]
    far, near = detector.locate(photo, boxes)
    np.testing.assert_array_equal([far.box, near.box], boxes)
    assert far.confidence == 0.02  # kept all the same: the user says that it is a face
    np.testing.assert_array_equal(near.landmarks, landmarks)
    assert detector.locate(photo, []) == []


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([[1, 2, 3]], r"shape \(F, 4\)"),
        ([[10, 10, 5, 20]], "is empty"),
        ([[10, 20, 20, 10]], "is empty"),
        ([[10, 10, 10, 20]], "is empty"),
        ([[10, 10, 20, 10]], "is empty"),
        ([[10, 10, np.nan, 20]], "is empty"),
        ([[600, 10, 700, 20]], "outside the picture of 512x400"),
        ([[-60, 10, -1, 20]], "outside"),
        ([[10, -60, 20, -1]], "outside"),
        ([[10, 400, 20, 450]], "outside"),
        ([[10, 10, 20, 20], [512, 10, 600, 20]], r"Box \[512.0, .* outside"),
        ("face", "array of numbers .*'face'"),
    ],
)
def test_wrong_boxes(boxes, message):
    with pytest.raises(ValueError, match=message):
        check_boxes(boxes, (512, 400))


def test_boxes_may_reach_beyond_the_picture():
    boxes = [[-60, -60, 2, 2], [509, 397, 600, 500], [-9, -9, 999, 999]]
    np.testing.assert_array_equal(check_boxes(boxes, (512, 400)), boxes)
    np.testing.assert_array_equal(check_boxes(boxes[0], (512, 400)), boxes[:1])


def test_box_around_spans_the_face_and_is_cut_at_the_picture(landmarks):
    box = box_around(landmarks, "ibug68", (200, 200))
    np.testing.assert_allclose(box[2] - box[0], box[3] - box[1])
    # the face from ear to ear, brows and chin within a tenth of its size
    assert box[0] < landmarks[:, 0].min() + 5 and box[2] > landmarks[:, 0].max() - 5
    assert box[1] < landmarks[17:27, 1].min() and abs(box[3] - landmarks[8, 1]) < 0.1 * (box[3] - box[1])
    np.testing.assert_array_equal(box_around(landmarks, "ibug68", (140, 100))[2:], [139, 99])


def test_a_face_that_cannot_be_aligned_is_none(photo, landmarks, known_landmarker):
    middle = landmarks.mean(0)
    for unusable in (middle + (landmarks - middle) * 0.01, landmarks - [120, 0], landmarks * np.nan):
        landmarker = known_landmarker(landmarks)
        landmarker.locate = lambda image, boxes, points=unusable: [(points, 0.99)] * len(boxes)
        assert FaceDetector(landmarker=landmarker)(photo) == []


def test_doubles_go_and_the_most_confident_stays():
    a, b, c = face([0, 0, 10, 10], 0.7), face([1, 1, 9, 9], 0.9), face([8, 8, 20, 20], 0.6)
    assert _without_doubles([a, b, c]) == [b, c]


def test_threads_share_a_detector(photo, detector):
    expected = detector(photo)[0].box
    boxes = [None] * 4

    def run(i):
        boxes[i] = detector(photo)[0].box

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    np.testing.assert_array_equal(boxes, [expected] * 4)


@needs_weights
def test_smaller_faces_beside_a_large_one_are_found_when_asked_for():
    face = load_picture(sample_photo()).crop((100, 20, 360, 280))
    group = Image.new("RGB", (2000, 1200), (90, 110, 120))
    group.paste(face.resize((1000, 1000)), (10, 10))
    for i in range(4):
        group.paste(face.resize((200, 200)), (1030 + i * 220, 10))
    (largest,) = FaceDetector()(group)
    faces = FaceDetector(small_faces=True)(group)
    assert len(faces) == 5
    np.testing.assert_array_equal(faces[0].landmarks, largest.landmarks)
    assert sorted(round(found.box[[0, 2]].mean()) // 220 for found in faces[1:]) == [5, 6, 7, 8]


@needs_weights
def test_in_a_picture_of_a_group_smaller_faces_are_found_unasked():
    """The first look, at 480 pixels, shows the cascade hardly one of these; faces are 85 pixels wide."""
    photo = load_picture(sample_photo())
    group = Image.new("RGB", (4 * photo.width, 3 * photo.height))
    places = [(x * photo.width, y * photo.height) for x in range(4) for y in range(3)]
    for place in places:
        group.paste(photo, place)
    found = sorted(
        tuple((face.box[:2] // photo.width * photo.width).astype(int)) for face in FaceDetector()(group)
    )
    assert found == sorted(places)


def test_small_faces_are_for_the_default_backend():
    with pytest.raises(ValueError, match="small_faces=True is for the default backend"):
        FaceDetector("mediapipe", small_faces=True)


def test_fine_looks_move_the_points_of_the_same_faces(photo):
    (face,), (finer,) = (FaceDetector(fine_looks=wanted)(photo) for wanted in (False, True))
    assert finer.confidence == face.confidence
    moved = np.linalg.norm(finer.landmarks - face.landmarks, axis=1)[17:]
    eyes = np.linalg.norm(face.landmarks[45] - face.landmarks[36])
    assert 0.002 * eyes < moved.mean() < 0.06 * eyes


def test_fine_looks_are_for_the_packages_own_network(known_landmarker):
    with pytest.raises(ValueError, match="fine_looks=True is for the default backend, not for 'mediapipe'"):
        FaceDetector("mediapipe", fine_looks=True)
    with pytest.raises(ValueError, match="give no other"):
        FaceDetector(landmarker=known_landmarker(np.zeros((68, 2))), fine_looks=True)


def test_unknown_backend():
    with pytest.raises(ValueError, match="'default' or 'mediapipe'"):
        FaceDetector(backend="dlib")


def test_mediapipe_without_its_package_or_file(monkeypatch):
    monkeypatch.setitem(sys.modules, "mediapipe", None)
    with pytest.raises(ImportError, match=r"actionunits\[mediapipe\]"):
        FaceDetector(backend="mediapipe")
    monkeypatch.setitem(sys.modules, "mediapipe", object())
    with pytest.raises(FileNotFoundError, match="model_file='nowhere.task'"):
        FaceDetector(backend="mediapipe", model_file="nowhere.task")


@needs_weights
def test_default_weights_on_a_real_photo(landmarks, no_face):
    detector = FaceDetector()
    (found,) = detector(sample_photo())
    assert found.confidence > 0.9
    eyes = np.linalg.norm(landmarks[36] - landmarks[45])
    inner = np.linalg.norm(found.landmarks[17:] - landmarks[17:] - [120, 30], axis=1).mean() / eyes
    assert inner < 0.06
    assert detector(no_face) == []


@needs_weights
@pytest.mark.parametrize("degrees", [-30, 30])
def test_default_weights_on_a_turned_close_up(degrees):
    close = load_picture(sample_photo()).crop((150, 60, 300, 210)).rotate(degrees, Image.Resampling.BILINEAR)
    (found,) = FaceDetector()(close)
    across = found.landmarks[45] - found.landmarks[36]
    assert abs(np.degrees(np.arctan2(-across[1], across[0])) - degrees) < 10


@needs_weights
@pytest.mark.parametrize("side", [64, 160])
def test_default_weights_on_a_face_cut_at_brows_and_chin(landmarks, side):
    box = (*(landmarks[17:].min(0) + [114, 26]), *(landmarks[17:].max(0) + [126, 46]))
    cut = load_picture(sample_photo()).crop([round(v) for v in box]).resize((side, side))
    (found,) = FaceDetector()(cut.convert("L"))
    scale = side / np.subtract(np.round(box[2:]), np.round(box[:2]))
    expected = (landmarks + [120, 30] - np.round(box[:2]) + 0.5) * scale - 0.5
    off = np.linalg.norm(found.landmarks - expected, axis=1)[17:].mean()
    assert off < 0.1 * np.linalg.norm(expected[36] - expected[45])


@needs_weights
@pytest.mark.slow
def test_default_weights_on_small_news_photographs():
    """100 faces and 100 other things of Labeled Faces in the Wild (Huang et al. 2007), 25 x 25 pixels."""
    pictures = np.load(sample_photo().with_name("lfw_subset.npy")).astype(np.float32)
    detector = FaceDetector()
    found = [len(detector(load_picture(picture).resize((100, 100)))) for picture in pictures]
    assert sum(n == 1 for n in found[:100]) >= 97
    assert sum(found[100:]) <= 1


@needs_weights
@pytest.mark.parametrize("name", ["coffee.png", "chelsea.png", "coins.png", "rocket.jpg", "page.png"])
def test_default_weights_see_no_face_where_none_is(name):
    """A cup, a cat, coins with heads on them, a rocket, a page of a book."""
    assert FaceDetector()(sample_photo().with_name(name)) == []
