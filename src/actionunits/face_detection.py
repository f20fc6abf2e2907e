"""Find the faces of a picture: a box, landmarks and a confidence for each, largest first.

By default OpenCV's Haar cascades (Viola and Jones 2001; Lienhart and Maydt 2002) propose boxes; the landmark
network of this package places 68 points in each and scores whether it shows a face. `PROPOSALS` are tried in
order, the most reliable first, until one yields a confident face. So faces narrower than a twentieth of the
picture may be missed beside a larger one (see `small_faces`); where no face is wider than a fourteenth, as in
pictures of groups, smaller ones are searched for, too. Where the cascades fail, on close-ups cut into the
face and on strongly tilted heads, a grid of boxes covers the picture, and two of them must lead to the same
face. MediaPipe's Face Landmarker is an optional backend; its `.task` file must be downloaded.

Of scikit-image's subset of Labeled Faces in the Wild, 25 x 25 pixels each, the default finds at least 97 of
100 faces and at most one of 100 non-faces (`tests/test_face_detection.py`).

Boxes are (xmin, ymin, xmax, ymax) and landmarks (x, y), in pixels from the centre of the upper left pixel.
"""

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import torch
from PIL import Image

from actionunits import checkpoints
from actionunits.face_landmarks import FaceLandmarker
from actionunits.landmarks import as_numbers, reduce_landmarks
from actionunits.pictures import load_picture


@dataclass(eq=False)
class Face:
    """One face of a picture.

    Attributes:
        box: (4,) xmin, ymin, xmax, ymax.
        confidence: Score of being a face, 0 to 1.
        landmarks: (N, 2) x, y of each point.
        scheme: Name of the landmark scheme, such as "ibug68".
    """

    box: np.ndarray
    confidence: float
    landmarks: np.ndarray
    scheme: str

    @property
    def area(self) -> float:
        """Area of the box [pixels^2]."""
        return _area(self.box)


class FaceDetector:
    """Finds the faces of a picture.

    Args:
        backend: "default", or "mediapipe" for MediaPipe's 478 points (needs
            `pip install "actionunits[mediapipe]"` and `model_file`).
        model_file: MediaPipe's `face_landmarker.task`, which its model page offers.
        min_confidence: Faces below are dropped. Less reliable proposals have higher limits of their own.
        landmarker: Another landmark network for the default backend, with
            `locate(image, boxes) -> [(landmarks (68, 2), score), ...]`.
        small_faces: Also search for smaller faces beside a large one, down to a fortieth of the picture's
            longer side; takes two to four times as long. Default backend only.
        fine_looks: Let a second network refine the points of each face twice (see the card of the landmark
            network). The thresholds of the package's weights were calibrated without. Default backend only.

    Example:
        >>> faces = FaceDetector()("group.jpg")
        >>> faces[0].box, faces[0].landmarks.shape
    """

    def __init__(
        self,
        backend: str = "default",
        model_file: str | Path | None = None,
        min_confidence: float = 0.5,
        landmarker: Any = None,
        small_faces: bool = False,
        fine_looks: bool = False,
    ):
        if not 0.0 <= min_confidence <= 1.0:
            raise ValueError(f"min_confidence must lie in 0..1, got {min_confidence}.")
        self._backend: _Backend
        if backend == "default":
            if fine_looks and landmarker is not None:
                raise ValueError("fine_looks=True is for the package's own landmarker; give no other.")
            self._backend = _Cascades(landmarker, min_confidence, small_faces, fine_looks)
        elif small_faces or fine_looks:
            option = "small_faces" if small_faces else "fine_looks"
            raise ValueError(f"{option}=True is for the default backend, not for {backend!r}.")
        elif backend == "mediapipe":
            self._backend = _MediaPipe(model_file, min_confidence)
        else:
            raise ValueError(f"Unknown backend {backend!r}; choose 'default' or 'mediapipe'.")

    def __call__(self, image: Any) -> list[Face]:
        """Find the faces of a picture.

        Args:
            image: Anything that `load_picture` takes.

        Returns:
            The faces, largest first; an empty list if there is none.
        """
        picture = load_picture(image)
        faces = [face for face in self._backend.find(picture) if can_be_aligned(face, picture.size)]
        return largest_first(_without_doubles(faces))

    def locate(self, image: Any, boxes: Any) -> list[Face]:
        """Find the landmarks of faces whose boxes are known.

        Args:
            image: Anything that `load_picture` takes.
            boxes: (F, 4) xmin, ymin, xmax, ymax around each face, about from the brows to the chin.

        Returns:
            One face per box, in their order, however low its confidence.

        Raises:
            ValueError: A box has the wrong shape, is empty or lies outside the picture.
        """
        picture = load_picture(image)
        return self._backend.locate(picture, check_boxes(boxes, picture.size))


def largest_first(faces: Sequence[Face]) -> list[Face]:
    """Return the faces sorted by the area of their boxes."""
    return sorted(faces, key=lambda face: -face.area)


def box_around(landmarks: np.ndarray, scheme: str, picture_size: tuple[int, int]) -> np.ndarray:
    """Return the box of a face from its landmarks: a square from ear to ear and down to the chin.

    Args:
        landmarks: (N, 2) points of any scheme.
        scheme: Its name.
        picture_size: (width, height); the box is cut there.

    Returns:
        (4,) xmin, ymin, xmax, ymax.
    """
    five = reduce_landmarks(landmarks, scheme, "five")  # eyes, nose tip, mouth corners
    low, high = five.min(axis=0), five.max(axis=0)
    half = 1.2 * np.max(high - low)
    box = np.concatenate([(low + high) / 2 - half, (low + high) / 2 + half])
    return np.clip(box, 0, np.tile(np.subtract(picture_size, 1), 2))


def check_boxes(boxes: Any, picture_size: tuple[int, int]) -> np.ndarray:
    """Return boxes as an array (F, 4); a single box (4,) becomes (1, 4).

    Raises:
        ValueError: No numbers, wrong shape, not finite, empty, or wholly outside the picture.
    """
    try:
        array = np.atleast_2d(as_numbers(boxes))
    except (TypeError, ValueError) as error:
        raise ValueError(f"boxes must be an array of numbers (F, 4), got {boxes!r}.") from error
    if array.size == 0:
        return array.reshape(0, 4)
    if array.ndim != 2 or array.shape[1] != 4:
        raise ValueError(f"boxes must have the shape (F, 4), xmin ymin xmax ymax; got {np.shape(boxes)}.")
    width, height = picture_size
    for box in array:
        if not np.isfinite(box).all() or box[2] <= box[0] or box[3] <= box[1]:
            raise ValueError(
                f"Box {box.tolist()} is empty; give xmin, ymin, xmax, ymax in pixels, not x, y, w, h."
            )
        if box[2] <= 0 or box[3] <= 0 or box[0] >= width - 1 or box[1] >= height - 1:
            raise ValueError(f"Box {box.tolist()} lies outside the picture of {width}x{height} pixels.")
    return array


class _Backend(Protocol):
    def find(self, picture: Image.Image) -> list[Face]: ...

    def locate(self, picture: Image.Image, boxes: np.ndarray) -> list[Face]: ...


Located = tuple[np.ndarray, float]
"""Landmarks (68, 2) and face score, 0 to 1."""


@dataclass(frozen=True)
class Proposal:
    """A way to propose boxes, and how far the landmark network is trusted there.

    Attributes:
        min_score: Smallest accepted face score of the landmark network, 0 to 1.
        side: Longest side of the copy that is searched [pixels].
        cascade: Haar cascade of OpenCV, or None for `windows`.
        neighbors: Overlapping hits that make a box.
        mirrored: Search the mirror image, too: the profile cascade knows one side only, and the frontal one
            finds some faces only there.
        windows: Sides of the square boxes of a grid over the picture [shorter sides of the picture]. They are
            blind guesses, so two of them must lead to the same face.
    """

    min_score: float
    side: int
    cascade: str | None = None
    neighbors: int = 0
    mirrored: bool = False
    windows: tuple[float, ...] = ()


PROPOSALS = (
    Proposal(0.75, side=480, cascade="frontalface_alt2", neighbors=3),
    Proposal(0.8, side=960, cascade="frontalface_alt2", neighbors=2, mirrored=True),
    Proposal(0.8, side=480, cascade="profileface", neighbors=3, mirrored=True),
    Proposal(0.95, side=480, windows=(0.8, 1.0, 1.25, 1.55)),  # pictures cut to a face, or into it
    Proposal(0.98, side=480, windows=(0.5,)),  # turned faces, which no cascade knows
)
SURE_BESIDE = 0.95  # score required of a smaller face beside a sure one: false alarms are frequent there
FEW_BESIDE = 1 / 14  # width of a face [longer sides of the picture] that rarely has small ones beside it
SURE = 0.8  # score of a face that ends the search
MIN_WINDOW = 12  # pixels of the copy; smaller ones would cover a narrow strip by the thousand
STRIDE = 0.32  # from window to window [sides]; the landmark network tolerates boxes this far off a face


class _Cascades:
    """Boxes from Haar cascades, landmarks and confidence from the landmark network."""

    def __init__(
        self, landmarker: Any, min_confidence: float, small_faces: bool = False, fine_looks: bool = False
    ):
        if landmarker is None:
            folder = checkpoints.path("face_landmarks")
            landmarker = FaceLandmarker.from_pretrained(folder, dtype=torch.float32, fine_look=fine_looks)
        self.landmarker = landmarker
        self.min_confidence = min_confidence
        self.small_faces = small_faces

    def find(self, picture: Image.Image) -> list[Face]:
        unsure: list[Face] = []
        for proposal in PROPOSALS:
            faces = self._faces(picture, proposal, max(proposal.min_score, self.min_confidence))
            if any(face.confidence >= SURE for face in faces):
                return faces + self._smaller(picture, proposal, faces)
            unsure = unsure or faces
        return unsure

    def _smaller(self, picture: Image.Image, searched: Proposal, known: list[Face]) -> list[Face]:
        """Faces too small for the copy in which the known ones were found."""
        if searched is not PROPOSALS[0] or max(picture.size) <= searched.side:
            return []
        widest = max(face.box[2] - face.box[0] for face in known)
        if not self.small_faces and widest >= FEW_BESIDE * max(picture.size):
            return []
        once = replace(PROPOSALS[1], mirrored=False)
        found = self._faces(picture, once, max(SURE_BESIDE, self.min_confidence))
        return [face for face in found if all(overlap(face.box, other.box) <= 0.5 for other in known)]

    def _faces(self, picture: Image.Image, proposal: Proposal, required: float) -> list[Face]:
        return [
            Face(box_around(landmarks, "ibug68", picture.size), float(score), landmarks, "ibug68")
            for landmarks, score in self._try(picture, proposal, required)
            if score >= required
        ]

    def _try(self, picture: Image.Image, proposal: Proposal, required: float) -> list[Located]:
        if proposal.cascade is not None:
            return self.landmarker.locate(picture, _propose(picture, proposal))
        scale = min(1.0, proposal.side / max(picture.size))
        width, height = (max(round(side * scale), 1) for side in picture.size)
        small = picture.resize((width, height), Image.Resampling.BOX)
        found = _agreed(self.landmarker.locate(small, _windows(small.size, proposal.windows)), required)
        shrunk = np.array([width, height]) / picture.size
        boxes = [box_around((marks + 0.5) / shrunk - 0.5, "ibug68", picture.size) for marks, _ in found]
        return self.landmarker.locate(picture, np.array(boxes)) if boxes else []

    def locate(self, picture: Image.Image, boxes: np.ndarray) -> list[Face]:
        located = self.landmarker.locate(picture, boxes)
        return [
            Face(box, float(score), marks, "ibug68")
            for box, (marks, score) in zip(boxes, located, strict=True)
        ]


def _propose(picture: Image.Image, proposal: Proposal) -> np.ndarray:
    """Return the boxes (F, 4) of a cascade in pixels of the picture."""
    width, height = picture.size
    scale = min(1.0, proposal.side / max(width, height))
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    grey = np.asarray(picture.convert("L").resize(size, Image.Resampling.BOX))
    margin = max(grey.shape) // 4  # the cascades need surroundings, also of close-ups and faces at the rim
    grey = cv2.copyMakeBorder(grey, margin, margin, margin, margin, cv2.BORDER_REPLICATE)
    edges = _hits(grey, proposal)
    if proposal.mirrored:
        right, top, left, bottom = _hits(cv2.flip(grey, 1), proposal).T
        flipped = np.stack([grey.shape[1] - left, top, grey.shape[1] - right, bottom], axis=1)
        edges = np.concatenate([edges, flipped])
    return (edges - margin) / scale - 0.5  # from edges to centres of pixels


def _hits(grey: np.ndarray, proposal: Proposal) -> np.ndarray:
    """Edges (F, 4) of the squares where a cascade fires, in pixels of the grey picture."""
    assert proposal.cascade is not None
    found = _cascade(proposal.cascade).detectMultiScale(grey, 1.1, proposal.neighbors, minSize=(24, 24))
    left, top, width, height = np.asarray(found, dtype=np.float64).reshape(-1, 4).T
    return np.stack([left, top, left + width, top + height], axis=1)


def _windows(size: tuple[int, int], sides: Sequence[float]) -> np.ndarray:
    """Return a grid of square boxes (F, 4) over a picture of `size`; one larger than it is centred."""
    boxes = []
    for side in (part * min(size) for part in sides):
        if side < MIN_WINDOW:
            continue
        spare = np.subtract(size, side)
        steps = np.ceil(np.maximum(spare, 0) / (STRIDE * side)).astype(int) + 1
        across, down = (
            np.linspace(0, s, n) if n > 1 else np.array([s / 2]) for s, n in zip(spare, steps, strict=True)
        )
        boxes += [(x, y, x + side, y + side) for y in down for x in across]
    return np.reshape(boxes, (-1, 4)) - 0.5  # from edges to centres of pixels


def _agreed(located: Sequence[Located], required: float) -> list[Located]:
    """The best of each face that two boxes agree on, to a tenth of the distance of the outer eye corners."""
    sure = sorted((answer for answer in located if answer[1] >= required), key=lambda answer: -answer[1])
    agreed: list[Located] = []
    for i, (landmarks, score) in enumerate(sure):
        near = 0.1 * np.hypot(*(landmarks[45] - landmarks[36]))
        same = [np.abs(landmarks - other).mean() < near for other, _ in sure[i + 1 :]]
        known = any(np.abs(landmarks - other).mean() < near for other, _ in agreed)
        if any(same) and not known:
            agreed.append((landmarks, score))
    return agreed


_cascades = threading.local()  # an OpenCV cascade must not be shared by threads


def _cascade(name: str) -> Any:
    """A cascade of this thread.

    Raises:
        ImportError: This OpenCV has none.
    """
    if not hasattr(cv2, "CascadeClassifier"):
        raise ImportError(
            f"OpenCV {cv2.__version__} has no cascades, which find the faces: "
            'pip install "opencv-python-headless<5", or give landmarks or boxes.'
        )
    cache: dict[str, Any] = _cascades.__dict__
    if name not in cache:
        # from memory, for OpenCV cannot open paths with letters beyond the code page on Windows
        folder = cv2.data.haarcascades  # type: ignore[attr-defined]
        xml = Path(folder, f"haarcascade_{name}.xml").read_text(encoding="utf-8")
        storage = cv2.FileStorage(xml, cv2.FILE_STORAGE_READ | cv2.FILE_STORAGE_MEMORY)
        cache[name] = cv2.CascadeClassifier()
        cache[name].read(storage.getFirstTopLevelNode())
    return cache[name]


class _MediaPipe:
    """MediaPipe's Face Landmarker. It reports no score, so the confidence of its faces is 1."""

    max_faces = 16

    def __init__(self, model_file: str | Path | None, min_confidence: float):
        try:
            import mediapipe
        except ImportError as error:
            raise ImportError(
                'The mediapipe backend needs `pip install "actionunits[mediapipe]"`.'
            ) from error
        if model_file is None or not Path(model_file).is_file():
            raise FileNotFoundError(
                f"The mediapipe backend needs a face_landmarker.task, got model_file={model_file!r}."
            )
        tasks = mediapipe.tasks
        options = tasks.vision.FaceLandmarkerOptions(
            base_options=tasks.BaseOptions(model_asset_buffer=Path(model_file).read_bytes()),
            num_faces=self.max_faces,
            min_face_detection_confidence=min_confidence,
        )
        self._landmarker = tasks.vision.FaceLandmarker.create_from_options(options)
        weakref.finalize(self, self._landmarker.close)  # left to itself it fails noisily when Python ends
        self._to_image = lambda pixels: mediapipe.Image(image_format=mediapipe.ImageFormat.SRGB, data=pixels)

    def find(self, picture: Image.Image) -> list[Face]:
        result = self._landmarker.detect(self._to_image(np.ascontiguousarray(picture)))
        faces = []
        for points in result.face_landmarks:
            landmarks = np.array([(point.x, point.y) for point in points]) * picture.size - 0.5
            box = box_around(landmarks, "mediapipe478", picture.size)
            faces.append(Face(box, 1.0, landmarks, "mediapipe478"))
        return faces

    def locate(self, picture: Image.Image, boxes: np.ndarray) -> list[Face]:
        faces = []
        for box in boxes:
            size = box[2:] - box[:2]
            left, top, right, bottom = (
                int(v) for v in np.concatenate([box[:2] - size / 2, box[2:] + size / 2])
            )
            found = largest_first(self.find(picture.crop((left, top, right, bottom))))
            if not found:
                raise ValueError(
                    f"MediaPipe sees no face in box {box.tolist()}; give landmarks, or leave the box out."
                )
            faces.append(Face(box, 1.0, found[0].landmarks + (left, top), found[0].scheme))
        return faces


def can_be_aligned(face: Face, picture_size: tuple[int, int]) -> bool:
    """Whether the eyes are apart and at least half of the landmarks in the picture."""
    eyes = reduce_landmarks(face.landmarks, face.scheme, "five")[:2]
    inside = (face.landmarks >= -0.5) & (face.landmarks <= np.subtract(picture_size, 0.5))
    return bool(np.hypot(*(eyes[1] - eyes[0])) >= 2.0 and inside.all(axis=1).mean() >= 0.5)


def _without_doubles(faces: list[Face]) -> list[Face]:
    """Non-maximum suppression: faces overlap by half of the smaller one at most."""
    kept: list[Face] = []
    for face in sorted(faces, key=lambda face: -face.confidence):
        if all(overlap(face.box, other.box) <= 0.5 for other in kept):
            kept.append(face)
    return kept


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Return the intersection of two boxes over the area of the smaller one."""
    shared = np.concatenate([np.maximum(a[:2], b[:2]), np.minimum(a[2:], b[2:])])
    smaller = min(_area(a), _area(b))
    return _area(shared) / smaller if smaller > 0 else 1.0


def _area(box: np.ndarray) -> float:
    return float(np.prod(np.maximum(box[2:] - box[:2], 0.0)))
