"""Track faces across the frames of a video: face 0 stays face 0.

Every `detect_every` frames, and whenever no face is in sight or one is lost, the face detector searches the
whole frame; in between the landmarks are found in the boxes of the previous frame. A detected face is
assigned to the track that predicts it best: by its place (constant velocity), its size, and a small grey
picture of the aligned face, which tells people apart when they cross.

Nobody is recognised: a person who returns after more than `patience` frames gets a new number, and one who
takes another's place at a cut inherits the number.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
from PIL import Image

from actionunits.alignment import level_eyes
from actionunits.face_detection import Face, box_around, can_be_aligned, largest_first, overlap

MIN_CONFIDENCE = 0.8
"""Smallest face score of a face that is tracked without the detector."""

MAX_STEP = 1.5
"""Largest distance of a face from its predicted place [widths of its box]."""

MAX_GROWTH = 2.0
"""Largest ratio of its widths in successive sightings."""

_PORTRAIT_SIDE = 24  # [pixels]


class FaceTracker:
    """Frame by frame: picture in, numbered faces out, largest first.

    Args:
        detector: `FaceDetector`, or what acts like it: picture -> faces, and `locate(picture, boxes)`.
        detect_every: Run the detector every this many frames. With 1 each detected face has the landmarks
            that it would have in a picture; the landmarks of frames in between start from the previous frame
            and differ a little.
        patience: Number of frames for which a lost face can be resumed.

    Example:
        >>> tracker = FaceTracker(FaceDetector(), detect_every=5)
        >>> for picture in frames:
        ...     print([face.track.number for face in tracker(picture)])
    """

    def __init__(self, detector: Any, detect_every: int = 1, patience: int = 25):
        for name, value, least in (("detect_every", detect_every, 1), ("patience", patience, 0)):
            if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
                raise ValueError(f"{name} must be a whole number from {least} on, got {value!r}.")
        self.detector = detector
        self.detect_every = detect_every
        self.patience = patience
        self._tracks: list[Track] = []
        self._next_number = 0
        self._since_detection = detect_every

    def __call__(self, picture: Image.Image | None) -> list["TrackedFace"]:
        """Find the faces of the next frame, None for one that could not be read."""
        in_sight = [track for track in self._tracks if track.unseen == 0]
        found = {} if picture is None else self._find(picture, in_sight)
        faces = []
        for track, face in found.items():
            track.see(face)
            facts = (face.box, face.confidence, face.landmarks, face.scheme)
            faces.append(TrackedFace(*facts, track=track, continues=track in in_sight))
        for track in self._tracks:
            track.unseen = 0 if track in found else track.unseen + 1
        self._tracks = [track for track in self._tracks if track.unseen <= self.patience]
        return largest_first(faces)  # type: ignore[return-value]

    def _find(self, picture: Image.Image, in_sight: list["Track"]) -> dict["Track", "SeenFace"]:
        """The tracks in the frame and their faces; new faces have new tracks."""
        self._since_detection += 1
        if in_sight and self._since_detection < self.detect_every:
            followed = self._follow(picture, in_sight, [])
            if len(followed) == len(in_sight):
                return followed
        return self._detect(picture, in_sight)

    def _detect(self, picture: Image.Image, in_sight: list["Track"]) -> dict["Track", "SeenFace"]:
        """Detect faces, assign them to tracks, and follow the tracks in sight that were missed."""
        self._since_detection = 0
        faces = [SeenFace(picture, face) for face in self.detector(picture)]
        found = {track: faces[i] for track, i in _assign(self._tracks, faces)}
        for face in faces:
            if not any(face is taken for taken in found.values()):
                found[self._new_track(face)] = face
        missed = [track for track in in_sight if track not in found]
        return found | self._follow(picture, missed, list(found.values()))

    def _follow(
        self, picture: Image.Image, tracks: list["Track"], others: list["SeenFace"]
    ) -> dict["Track", "SeenFace"]:
        """Find faces where their tracks predict them; one that overlaps another face is dropped."""
        found: dict[Track, SeenFace] = {}
        for track in sorted(tracks, key=lambda track: track.number):
            try:
                (face,) = self.detector.locate(picture, [track.expected_box])
            except ValueError:  # the box has left the picture, or the backend sees no face in it
                continue
            if face.confidence < MIN_CONFIDENCE or not can_be_aligned(face, picture.size):
                continue
            face.box = box_around(face.landmarks, face.scheme, picture.size)
            if all(overlap(face.box, other.box) <= 0.5 for other in (*others, *found.values())):
                found[track] = SeenFace(picture, face)
        return found

    def _new_track(self, face: "SeenFace") -> "Track":
        track = Track(self._next_number, face)
        self._next_number += 1
        self._tracks.append(track)
        return track


class SeenFace(Face):
    """A detected face with its portrait, for comparison."""

    def __init__(self, picture: Image.Image, face: Face):
        super().__init__(face.box, face.confidence, face.landmarks, face.scheme)
        aligned = level_eyes(face.landmarks, face.scheme, _PORTRAIT_SIDE).warp(picture)
        grey = np.asarray(aligned.convert("L"), dtype=np.float64)
        self.portrait = (grey - grey.mean()) / max(grey.std(), 1.0)  # normalised for light and contrast

    @property
    def center(self) -> np.ndarray:
        """(2,) x, y of the middle of the box."""
        return (self.box[:2] + self.box[2:]) / 2

    @property
    def width(self) -> float:
        """Longer side of the box [pixels]: the picture's rim may cut off the other."""
        return float(np.max(self.box[2:] - self.box[:2]))


class Track:
    """One face over time: its last sighting and its velocity.

    Attributes:
        number: Its number, from 0 on in order of appearance.
        unseen: Frames since its last sighting.
    """

    def __init__(self, number: int, face: SeenFace):
        self.number = number
        self.unseen = 0
        self._face = face
        self._velocity = np.zeros(2)  # [pixels per frame]

    @property
    def expected_box(self) -> np.ndarray:
        """(4,) predicted box in the next frame."""
        return self._face.box + np.tile(self._velocity * (self.unseen + 1), 2)

    def see(self, face: SeenFace) -> None:
        """Update with a new sighting."""
        step = (face.center - self._face.center) / (self.unseen + 1)
        self._velocity = (self._velocity + step) / 2
        self._face = face

    def distance(self, face: SeenFace) -> float:
        """Cost of assigning this face to the track: 0 for the same face, infinite out of reach."""
        expected = (self.expected_box[:2] + self.expected_box[2:]) / 2
        step = float(np.hypot(*(face.center - expected))) / self._face.width
        growth = abs(np.log(face.width / self._face.width))
        if step > MAX_STEP or growth > np.log(MAX_GROWTH):
            return np.inf
        likeness = float((self._face.portrait * face.portrait).mean())  # correlation, -1 to 1
        return step + growth + (1 - likeness)


@dataclass(eq=False)
class TrackedFace(Face):
    """A face of a frame, and its track.

    Attributes:
        track: Its track; `track.number` is the `face_id`.
        continues: Whether the track was seen in the previous frame, too.
    """

    track: Track
    continues: bool


def _assign(tracks: Sequence[Track], faces: Sequence[SeenFace]) -> list[tuple[Track, int]]:
    """Greedily pair tracks with indices of faces, the smallest distance first; either may be left over."""
    distances = [
        (track.distance(face), track.number, i, track) for track in tracks for i, face in enumerate(faces)
    ]
    pairs: dict[Track, int] = {}
    for distance, _, i, track in sorted(distances, key=lambda entry: entry[:3]):
        if np.isfinite(distance) and track not in pairs and i not in pairs.values():
            pairs[track] = i
    return list(pairs.items())
