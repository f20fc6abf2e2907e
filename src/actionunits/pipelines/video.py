"""Videos in the pipeline "au-detection": frame by frame, with memory for one batch of faces.

A frame is a picture whose faces were found by a `FaceTracker`; the pipeline treats it like any other picture.
A temporal model (one with a method `stream`, such as LAC) continues each face's sequence clip by clip, and
starts a new one where the face was missing in the frame before.
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm
from transformers.utils import logging

from actionunits.tracking import FaceTracker, TrackedFace
from actionunits.video import Frame, VideoReader, frames_of

logger = logging.get_logger(__name__)

FACES_ON_GPU = 8
"""Default faces per forward pass on a GPU. On a CPU every frame has its own, as a picture has."""


@dataclass(frozen=True, eq=False)
class Shot:
    """A frame as input of the pipeline: the picture, None if it is broken, and its faces."""

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
        detect_every: Run the face detector every this many frames, and whenever no face is in sight; in
            between faces are tracked. With 1, each face has exactly the numbers of its picture. Larger values
            are faster, but may find a new face beside others this many frames late, and the landmarks of
            tracked faces start from the previous frame, so that they and the scores differ a little.
        return_frames: Add the picture to each frame's result.
        batch_size: Faces per forward pass. By default one frame at a time, on a GPU several; then the numbers
            equal those of the pictures up to floating-point rounding.
        **options: `threshold`, `top_k`, `return_maps`, as for pictures.

    Returns:
        Iterator over the frames, each once it is done: `{"frame": 0, "timestamp": 0.0, "faces": [...]}`,
        frames counted from 0, time in seconds from the start of the file (None without `fps`). Faces are as
        for a picture, with `"face_id"`, the number of the track, from 0 on in order of appearance. A frame
        that cannot be read has no faces, and `"error"` says why. With `return_frames` `"image"` is the
        upright picture (None if broken).

    Raises:
        FileNotFoundError: There is no such file.
        VideoError: The file cannot be opened, or holds no pictures.
        TypeError: `video` is neither a path nor iterable, or an option does not exist or is not a number.
        ValueError: An option cannot be used.
        ImportError: A file needs PyAV, which is not installed.
    """
    tracker = FaceTracker(detect.face_detector, detect_every)
    detect._sanitize_parameters(**options)  # refuses wrong options now, not at the first frame
    if getattr(detect.model.config, "clip_length", 1) > 1 and not hasattr(detect.model, "stream"):
        logger.warning(
            "This temporal model sees each frame alone in this form (ONNX); use PyTorch for clips."
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
    """Raise `ValueError` unless an option is left out (None) or a whole number from `least` on."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or value < least):
        raise ValueError(f"{name} must be a whole number from {least} on, got {value!r}.")


def _frames(video: Any, fps: float | None) -> Iterable[Frame]:
    """Open the video, with a progress bar."""
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
    """Return frames per second as a float."""
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
    """Run each frame as a picture of its own."""
    for frame in frames:
        faces = tracker(frame.picture)
        yield frame, detect(Shot(frame.picture, faces), **options) if faces else []


def _together(
    detect: Any, frames: Iterable[Frame], tracker: FaceTracker, options: dict[str, Any]
) -> Iterator[tuple[Frame, list[dict[str, Any]]]]:
    """Let frames share forward passes; the frames of a batch wait for each other."""
    waiting: deque[Frame] = deque()
    failure: Exception | None = None

    def shots() -> Iterator[Shot]:
        nonlocal failure
        try:
            for frame in frames:
                waiting.append(frame)
                yield Shot(frame.picture, tracker(frame.picture))
        except Exception as error:  # raised below, after the results of the frames that are still waiting
            failure = error

    # num_workers=0: a worker process would have its own copy of queue and tracker.
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
