"""Videos in the pipeline "au-detection": frame by frame, with memory for one batch of faces.

A frame is a picture whose faces a `FaceTracker` found; from there on the pipeline does with it what it does
with any picture. A model that sees time (it has a method `stream`, as LAC has) goes on with each face where
it was in the frame before, clip by clip, and starts anew where the face was not to be seen.
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm
from transformers.utils import logging

from actionunits.tracking import FaceTracker, TrackedFace
from actionunits.video import Frame, VideoReader, frames_of

logger = logging.get_logger(__name__)

FACES_ON_GPU = 8
"""Faces per forward pass on a GPU. On a CPU a frame is a forward pass, as a picture is."""


@dataclass(frozen=True, eq=False)
class Shot:
    """What the pipeline is given for a frame: the picture, None if it is broken, and its faces."""

    picture: Image.Image | None
    faces: list[TrackedFace]


def answer_video(
    detect: Any,
    video: str | os.PathLike | Iterable[Any],
    fps: float | None = None,
    detect_every: int = 1,
    return_frames: bool = False,
    batch_size: int | None = None,
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """Detect the action units of every frame. This is what `detect(video=...)` calls.

    Args:
        detect: The pipeline.
        video: Path of a file, or an iterable of frames, each anything that `load_picture` takes.
        fps: Frames per second of an iterable, for the timestamps. A file has its own times.
        detect_every: The face detector looks at every so many frames, and whenever no face is in sight; in
            between faces are followed. With 1, each face found has the very numbers of its picture. With
            more it is faster; a new face beside others may be seen so many frames late, and landmarks of
            followed faces start from the frame before, so that they and the scores differ a little.
        return_frames: Add the picture to each answer.
        batch_size: Faces per forward pass. By default one frame at a time, on a GPU several; then the numbers
            are those of the pictures up to the rounding of floats.
        **options: `threshold`, `top_k`, `return_maps`, as for pictures.

    Returns:
        Iterator over the frames, each when it is done: `{"frame": 0, "timestamp": 0.0, "faces": [...]}`,
        frames counted from 0, time in seconds from the start of the file (None without `fps`). Faces are
        those of a picture with `"face_id"`, the number of the person, from 0 on in order of appearance. A
        frame without a face has no faces. A frame that cannot be read has none either, and `"error"` says
        why. With `return_frames` `"image"` is the upright picture (None if broken).

    Raises:
        FileNotFoundError: There is no such file.
        VideoError: The file cannot be opened, or holds no pictures.
        TypeError: `video` is neither a path nor iterable, an option does not exist or is no number.
        ValueError: An option that cannot be used.
        ImportError: A file, but PyAV is not installed.
    """
    tracker = FaceTracker(detect.face_detector, detect_every)
    detect._sanitize_parameters(**options)  # refuses wrong ones now, not at the first frame
    if getattr(detect.model.config, "clip_length", 1) > 1 and not hasattr(detect.model, "stream"):
        logger.warning(
            "This model sees time, but in this form (ONNX) each frame alone; use PyTorch for clips."
        )
    check_count("batch_size", batch_size)
    if batch_size is None:
        batch_size = detect._batch_size or (None if detect.device.type == "cpu" else FACES_ON_GPU)
    frames = _frames(video, fps)
    if batch_size is None:
        pairs = _one_by_one(detect, frames, tracker, options)
    else:
        pairs = _together(detect, frames, tracker, {**options, "batch_size": batch_size})
    return (_answer(frame, faces, return_frames) for frame, faces in pairs)


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raise `ValueError` for an option that is neither left out (None) nor a whole number from `least` on."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
        raise ValueError(f"{name} must be a whole number from {least} on, got {value!r}.")


def _frames(video: Any, fps: float | None) -> Iterable[Frame]:
    """Open the video, and show how far it has been read."""
    if fps is not None:
        fps = _checked_rate(fps)
    if isinstance(video, str | os.PathLike):
        if fps is not None:
            raise ValueError("fps is for frames without a file; a file knows its own times.")
        reader = VideoReader(video)
        return _with_bar(reader, os.path.basename(video), reader.count)
    if not isinstance(video, Iterable):
        raise TypeError(
            f"video must be the path of a file or an iterable of frames, got {type(video).__name__}."
        )
    return _with_bar(frames_of(video, fps), "video", len(video) if isinstance(video, Sized) else None)


def _checked_rate(fps: Any) -> float:
    """Return frames per second as a number."""
    if isinstance(fps, str | bytes | bool) or np.ndim(fps) or not hasattr(fps, "__float__"):
        raise TypeError(f"fps must be a number of frames per second, such as 25, got {fps!r}.")
    if not 0 < float(fps) < np.inf:  # nor NaN
        raise ValueError(f"fps must be more than 0 and finite, got {fps}; leave it out if it is not known.")
    return float(fps)


def _with_bar(frames: Iterable[Frame], name: str, count: int | None) -> Iterator[Frame]:
    yield from tqdm(frames, total=count, desc=name, unit="frame", disable=None)


def _one_by_one(
    detect: Any, frames: Iterable[Frame], tracker: FaceTracker, options: dict[str, Any]
) -> Iterator[tuple[Frame, list[dict[str, Any]]]]:
    """Answer each frame as the picture that it is."""
    for frame in frames:
        faces = tracker(frame.picture)
        yield frame, detect(Shot(frame.picture, faces), **options) if faces else []


def _together(
    detect: Any, frames: Iterable[Frame], tracker: FaceTracker, options: dict[str, Any]
) -> Iterator[tuple[Frame, list[dict[str, Any]]]]:
    """Let frames share forward passes; those of a batch wait for each other."""
    waiting: deque[Frame] = deque()
    failure: Exception | None = None

    def shots() -> Iterator[Shot]:
        nonlocal failure
        try:
            for frame in frames:
                waiting.append(frame)
                yield Shot(frame.picture, tracker(frame.picture))
        except Exception as error:  # raised when the frames before it, which wait for more, are answered
            failure = error

    # A worker process would have a queue and a tracker of its own, whatever the pipeline was made with.
    for faces in detect(shots(), num_workers=0, **options):
        yield waiting.popleft(), faces
    if failure is not None:
        raise failure


def _answer(frame: Frame, faces: list[dict[str, Any]], with_picture: bool) -> dict[str, Any]:
    answer: dict[str, Any] = {"frame": frame.index, "timestamp": frame.timestamp, "faces": faces}
    if frame.error is not None:
        answer["error"] = frame.error
    if with_picture:
        answer["image"] = frame.picture
    return answer
