"""The pipeline "au-detection": picture or video in, faces with their action units out.

Detect the faces (`FaceDetector`), align each (`AUImageProcessor`), run the model, name its outputs. Every
face is one chunk of a `ChunkPipeline`, so `batch_size` counts faces, of one picture or of many. The frames of
a video are pictures whose faces were found by a tracker (`actionunits.pipelines.video`).
"""

# mypy: disable-error-code="override,assignment"
# (transformers annotates its pipelines more narrowly than it uses them)

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import IOBase
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.pipelines.base import ChunkPipeline
from transformers.utils import logging

from actionunits.alignment import Alignment
from actionunits.face_detection import (
    Face,
    FaceDetector,
    box_around,
    can_be_aligned,
    check_boxes,
    largest_first,
)
from actionunits.image_processing_au import AUImageProcessor, decision_thresholds
from actionunits.landmarks import check_inside, check_landmarks
from actionunits.modeling_outputs import AUDetectionOutput
from actionunits.pictures import load_picture, naming
from actionunits.pipelines.video import Shot, answer_video, check_count
from actionunits.tracking import Track, TrackedFace
from actionunits.video import is_video

logger = logging.get_logger(__name__)

FACES_PER_BATCH = 8
"""Default batch size for a picture or a list. Streams default to one face, so that no answer has to wait."""


class AUDetectionPipeline(ChunkPipeline):
    """Action units of every face in a picture or a video.

    Args:
        face_detector: Detector in place of `FaceDetector()`: a callable picture -> faces, largest first, with
            a method `locate(picture, boxes)`. `FaceDetector(small_faces=True)` is for groups of people.
        threshold, top_k, return_maps, batch_size: See `__call__`; here they are defaults of every call.

    Example:
        >>> import actionunits
        >>> from transformers import pipeline
        >>> detect = pipeline("au-detection")
        >>> detect("photo.jpg")[0]["action_units"][6]
        {'label': 'AU12', 'name': 'lip corner puller', 'score': 0.93, 'active': True}
        >>> for frame in detect(video="clip.mp4"):
        ...     print(frame["timestamp"], [face["face_id"] for face in frame["faces"]])
    """

    model: Any
    image_processor: Any

    _load_image_processor = None  # optional; without one __init__ loads that of the model's folder
    _load_processor = False
    _load_tokenizer = False
    _load_feature_extractor = False
    _load_video_processor = False

    def __init__(self, model: Any, image_processor: Any = None, face_detector: Any = None, **kwargs):
        if image_processor is None:
            image_processor = _processor_of(model)
        super().__init__(model=model, image_processor=image_processor, **kwargs)
        check_count("batch_size", self._batch_size)
        check_count("num_workers", self._num_workers, least=0)
        if not isinstance(image_processor, AUImageProcessor) or not image_processor.do_align:
            raise ValueError(
                "The pipeline detects and aligns faces, so it needs an AUImageProcessor with do_align=True; "
                f"got {image_processor}. For aligned pictures call processor and model yourself."
            )
        if not hasattr(model.config, "center_options"):
            raise ValueError(
                f"The pipeline needs a model that detects action units, got a {type(model).__name__}."
            )
        self._face_detector = face_detector
        self._streams: WeakKeyDictionary[Track, Any] = WeakKeyDictionary()  # of models that see time
        self.model.eval()

    @property
    def face_detector(self) -> Any:
        """The face detector; the default one is loaded when it is first needed."""
        if self._face_detector is None:
            self._face_detector = FaceDetector()
        return self._face_detector

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the streams of videos, which cannot be pickled, as `num_workers` needs."""
        return {**self.__dict__, "_streams": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._streams = WeakKeyDictionary()

    def __call__(self, inputs: Any = None, *, video: Any = None, **kwargs: Any) -> Any:
        """Detect action units.

        Args:
            inputs: A picture (path, URL, bytes, PIL image, array, tensor), or, where faces are known,
                `{"image": picture, "landmarks": (N, 2) or (F, N, 2), "boxes": (4,) or (F, 4)}` with either or
                both (empty landmarks count as none; a box without an alignable face is left out, with a
                warning); or a list of these. For a generator, a torch dataset, a `datasets.Dataset` (its
                columns image and, if there, landmarks and boxes) or one of its columns the result is an
                iterator.
            video: A video instead: path of a file, or an iterable of frames, each a picture as above.
                `inputs` also takes the path of a video file.
            **kwargs: `threshold`: score from which an action unit is active, for all or as {"AU12": 0.3} for
                some; by default the model's calibrated thresholds.
                `top_k`: only this many action units per face, highest score first.
                `return_maps`: add `"maps"` to each face, the attention map (h, w) of each action unit by
                label, and `"alignment"`, the `Alignment` from the photo to the grid of the maps:
                `face["alignment"].warp_back(face["maps"]["AU12"], photo.size)` lays a map over the photo.
                `batch_size`: faces per forward pass.
                `detect_every`, `fps`, `return_frames`: for videos, see `pipelines.video.answer_video`.

        Returns:
            For one picture the list of its faces, largest first, empty if there is none; for several pictures
            a list of these. A face is `{"box": {"xmin", "ymin", "xmax", "ymax"}, "confidence",
            "landmarks": [[x, y], ...], "landmark_scheme", "action_units": [{"label", "name", "score",
            "active"}, ...]}`, in pixels of the upright picture from the centre of the upper left one. A face
            with given landmarks has the confidence 1.
            For a video an iterator over its frames, see `pipelines.video.answer_video`.

        Raises:
            TypeError: `inputs` is None or of another type that holds no picture.
            ValueError: A picture, landmarks, boxes or an option cannot be used. The message says which of
                several inputs: "inputs[3]: ..." is the fourth.
            ImportError: A video file needs PyAV, which is not installed.
        """
        check_count("batch_size", kwargs.get("batch_size"))
        check_count("num_workers", kwargs.get("num_workers"), least=0)
        if video is None and is_video(inputs):
            inputs, video = None, inputs
        if video is not None:
            if inputs is not None:
                raise TypeError("Give either inputs or video, not both.")
            return answer_video(self, video, **kwargs)
        if isinstance(inputs, list | tuple) and not inputs:
            return []
        inputs = _as_numbered(inputs)
        has_batch_size = kwargs.get("batch_size") is not None or self._batch_size is not None
        if not (has_batch_size or isinstance(inputs, Generator)):
            kwargs["batch_size"] = FACES_PER_BATCH
        return super().__call__(inputs, **kwargs)

    def check_maps(self) -> None:
        """Check that the model returns attention maps, by a run on an empty face.

        Raises:
            ValueError: It has none.
        """
        self.forward({"is_last": True, "face": None, **self._no_features()}, return_maps=True)

    def preprocess(self, input_: Any) -> Iterator[dict[str, Any]]:
        """Turn one picture into a chunk for each face; without faces there is one chunk without a face."""
        if isinstance(input_, Numbered):
            with naming(f"inputs[{input_.number}]"):
                yield from self.preprocess(input_.content)
            return
        picture, faces = self._find_faces(input_)
        if not faces:
            yield {"is_last": True, "face": None, **self._no_features()}
        for i, face in enumerate(faces, start=1):
            yield {"is_last": i == len(faces), "face": face, **self._features(picture, face)}

    def _forward(self, chunk: dict[str, Any], return_maps: bool = False) -> dict[str, Any]:
        """Run the model on a batch of faces. All outputs are batch first, for transformers to split."""
        centers = chunk["au_centers"]
        faces = chunk["face"] if isinstance(chunk["face"], list) else [chunk["face"]]
        pixel_values = chunk["pixel_values"].to(self.dtype)
        if hasattr(self.model, "stream") and any(isinstance(face, TrackedFace) for face in faces):
            outputs = self._forward_in_time(pixel_values, faces, return_maps)
        else:
            outputs = self.model(
                pixel_values=pixel_values,
                au_centers=None if centers.isnan().any() else centers,
                output_au_attentions=return_maps,
            )
        answer = {name: chunk[name] for name in ("face", "is_last", "alignment")}
        answer = {"logits": outputs.logits, **answer}
        if return_maps:
            if outputs.au_attentions is None:
                raise ValueError(f"{type(self.model).__name__} has no attention maps; leave return_maps out.")
            answer["maps"] = outputs.au_attentions
        return answer

    def _forward_in_time(
        self, pixel_values: torch.Tensor, faces: list[TrackedFace | None], return_maps: bool
    ) -> AUDetectionOutput:
        """Continue the stream of each face of a video, with a temporal model."""
        merged: dict[str, torch.Tensor] = {}
        for rows in _runs(faces):
            first = faces[rows[0]]
            assert first is not None, "runs are of faces"
            if not first.continues:
                self._streams[first.track] = self.model.stream()
            outputs = self._streams[first.track](pixel_values[rows], output_au_attentions=return_maps)
            for name in ("logits", "au_attentions"):
                if (part := outputs.get(name)) is not None:
                    whole = merged.setdefault(name, part.new_zeros(len(faces), *part.shape[1:]))
                    whole[rows] = part
        return AUDetectionOutput(logits=merged["logits"], au_attentions=merged.get("au_attentions"))

    def postprocess(self, chunks: list[dict[str, Any]], **options) -> list[dict[str, Any]]:
        """Turn the chunks of one picture into its faces."""
        answers = []
        for chunk in chunks:
            if (face := chunk["face"]) is None:
                continue
            units = self.image_processor.post_process_au_detection(chunk, self.model.config, **options)[0]
            answer = {
                "box": dict(zip(("xmin", "ymin", "xmax", "ymax"), face.box.tolist(), strict=True)),
                "confidence": face.confidence,
                "landmarks": face.landmarks.tolist(),
                "landmark_scheme": face.scheme,
                "action_units": units,
            }
            if isinstance(face, TrackedFace):
                answer = {"face_id": face.track.number, **answer}
            answers.append(answer | self._maps(chunk) if "maps" in chunk else answer)
        return answers

    def _sanitize_parameters(self, threshold=None, top_k=None, return_maps=None, **unknown):
        """Sort the options by stage, and refuse wrong ones before any work is done."""
        if unknown:
            raise TypeError(
                f"au-detection has no option {', '.join(sorted(unknown))}; for pictures it takes threshold, "
                "top_k, return_maps and batch_size, for videos also detect_every, fps and return_frames."
            )
        forward = {} if return_maps is None else {"return_maps": return_maps}
        postprocess: dict[str, Any] = {}
        if threshold is not None:
            decision_thresholds(self.model.config, threshold)
            postprocess["threshold"] = threshold
        if top_k is not None:
            check_count("top_k", top_k)
            postprocess["top_k"] = top_k
        return {}, forward, postprocess

    def _find_faces(self, input_: Any) -> tuple[Any, Sequence[Face]]:
        """Load a picture and detect its faces, unless they are given."""
        if isinstance(input_, Shot):
            return input_.picture, input_.faces
        known: dict[str, Any] = {}
        if isinstance(input_, Mapping):
            known = dict(input_)
            if "image" not in known or set(known) - {"image", "landmarks", "boxes"}:
                raise ValueError(
                    f"A dict must have the key image and may have landmarks and boxes; got {sorted(known)}."
                )
            input_ = known["image"]
        picture = load_picture(input_)
        if _any_given(known.get("landmarks")):
            faces = _given_faces(picture.size, known["landmarks"], known.get("boxes"))
            return picture, largest_first(faces)
        if known.get("boxes") is not None:
            boxes = check_boxes(known["boxes"], picture.size)
            located = self.face_detector.locate(picture, boxes)
            return picture, largest_first([f for f in located if _is_usable(f, picture.size)])
        return picture, self.face_detector(picture)

    def _features(self, picture: Image.Image, face: Face) -> dict[str, torch.Tensor]:
        """Model input of one face, a batch of one. Centres that the landmarks do not give are NaN."""
        centers = self.model.config.center_options
        features = self.image_processor(
            picture,
            landmarks=face.landmarks,
            landmark_scheme=face.scheme,
            return_tensors="pt",
            **centers,
        )
        if getattr(self.model, "needs_au_centers", False) and "au_centers" not in features:
            raise ValueError(
                f"{type(self.model).__name__} needs the centres of its action units, au_centers, which "
                + (
                    f"landmarks of the scheme {face.scheme!r} do not tell; pass 49, 66, 68, 98 or 478 "
                    "points, or no landmarks."
                    if "aus" in centers
                    else f"the labels {self.model.config.au_labels} do not have; use a model that needs none."
                )
            )
        unknown = torch.full_like(self._no_features()["au_centers"], torch.nan)
        return {"au_centers": unknown, **features}

    def _no_features(self) -> dict[str, torch.Tensor]:
        """Dummy input for a picture without a face: all chunks of a batch need the same keys."""
        size, config = self.image_processor.size, self.model.config
        return {
            "pixel_values": torch.zeros(1, 3, size["height"], size["width"]),
            "alignment": torch.eye(2, 3)[None],
            "au_centers": torch.zeros(1, len(config.places or config.id2label), 2, 2),
        }

    def _maps(self, chunk: dict[str, Any]) -> dict[str, Any]:
        """Attention maps by label, and the alignment from the photo to their grid."""
        maps = chunk["maps"][0].float().numpy()  # (m, h, w)
        size = self.image_processor.size
        alignment = Alignment(chunk["alignment"][0].numpy(), (size["width"], size["height"]))
        return {
            "maps": {self.model.config.id2label[i]: map_ for i, map_ in enumerate(maps)},
            "alignment": alignment.resize(maps.shape[2], maps.shape[1]),
        }


def _processor_of(model: Any) -> AUImageProcessor:
    """Load the image processor saved beside the model's weights."""
    if not model.name_or_path:
        raise ValueError(
            "The model was not loaded from a folder; pass image_processor=AUImageProcessor(...)."
        )
    return AutoImageProcessor.from_pretrained(model.name_or_path)


def _any_given(landmarks: Any) -> bool:
    """Whether there are landmarks; rows of a corpus without any have an empty list."""
    return landmarks is not None and (not hasattr(landmarks, "__len__") or len(landmarks) > 0)


def _is_usable(face: Face, picture_size: tuple[int, int]) -> bool:
    """Whether the face found in a box can be aligned; if not, warn that the box is left out."""
    if usable := can_be_aligned(face, picture_size):
        return usable
    logger.warning(
        "Left out the box %s: most of what looks like a face there lies outside of the %d x %d picture.",
        np.round(face.box, 1).tolist(),
        *picture_size,
    )
    return False


def _given_faces(picture_size: tuple[int, int], landmarks: Any, boxes: Any) -> list[Face]:
    """Faces with given landmarks, (N, 2), (F, N, 2) or a list of (N, 2)."""
    if not hasattr(landmarks, "__len__"):
        raise ValueError(f"landmarks must be (N, 2), (F, N, 2) or a list of (N, 2); got {landmarks!r}.")
    if len(landmarks) and np.ndim(landmarks[0]) == 1:
        landmarks = [landmarks]
    if boxes is not None:
        boxes = check_boxes(boxes, picture_size)
        if len(boxes) != len(landmarks):
            raise ValueError(f"{len(landmarks)} faces by landmarks but {len(boxes)} by boxes; give as many.")
    faces = []
    for i, points in enumerate(landmarks):
        points, scheme = check_landmarks(points)
        check_inside(points, *picture_size)
        box = box_around(points, scheme.name, picture_size) if boxes is None else boxes[i]
        faces.append(Face(box, 1.0, points, scheme.name))
    return faces


def _runs(faces: list[TrackedFace | None]) -> list[list[int]]:
    """Rows of a batch that show the same face in consecutive frames."""
    runs: list[list[int]] = []
    last: dict[Track, list[int]] = {}
    for row, face in enumerate(faces):
        if face is None:
            continue
        if face.track not in last or not face.continues:
            last[face.track] = []
            runs.append(last[face.track])
        last[face.track].append(row)
    return runs


@dataclass(frozen=True, eq=False)
class Numbered:
    """One of several inputs, and its index."""

    number: int
    content: Any


def _as_numbered(inputs: Any) -> Any:
    """Number several inputs: those of a list as a list, those of a stream as a generator."""
    if hasattr(inputs, "select_columns"):  # of `datasets`
        return _stream(_picture_columns(inputs))
    if isinstance(inputs, Dataset) or _is_column(inputs):
        return _stream(inputs)
    if isinstance(inputs, Iterator) and not isinstance(inputs, IOBase):  # an open file yields its lines
        return _numbered(inputs)
    return list(_numbered(inputs)) if isinstance(inputs, list | tuple) else inputs


def _numbered(inputs: Iterable[Any]) -> Iterator[Numbered]:
    yield from (Numbered(i, content) for i, content in enumerate(inputs))


def _stream(dataset: Any) -> Iterator[Numbered]:
    """Iterate over a dataset, by index where it has a length: not every such dataset has an iterator."""
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        return _numbered(dataset)
    return _numbered(dataset[i] for i in range(len(dataset)))


def _is_column(inputs: Any) -> bool:
    """Whether it is a lazy sequence, such as a column of a `datasets.Dataset`."""
    return isinstance(inputs, Sequence) and not isinstance(
        inputs, list | tuple | str | bytes | bytearray | memoryview
    )


def _picture_columns(dataset: Any) -> Any:
    """Keep the columns of a `datasets.Dataset` that the pipeline understands."""
    columns = dataset.column_names or list(next(iter(dataset)))
    if isinstance(columns, Mapping):
        raise ValueError(f"That is a dictionary of datasets, {list(columns)}; give one of them.")
    if "image" not in columns:
        raise ValueError(
            f"The dataset has no column 'image' but {columns}; rename one, or use KeyDataset(dataset, name)."
        )
    return dataset.select_columns([name for name in ("image", "landmarks", "boxes") if name in columns])
