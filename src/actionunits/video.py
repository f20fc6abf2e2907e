"""Video files: read frames with their times, write annotated videos (PyAV, which includes FFmpeg).

Times are those of the file, in seconds from its start as a player shows them, so frame rates may vary. The
file's rotation, mirroring and pixel aspect ratio are applied. A frame that cannot be decoded is an entry
without a picture that says why; decoders still build the following frames up to the next key frame on it, and
report them as sound. One frame is held at a time.
"""

import heapq
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from actionunits.files import whole_file
from actionunits.pictures import load_picture

SUFFIXES = frozenset(
    ".3gp .asf .avi .flv .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .mxf .ogv .ts .webm .wmv".split()  # noqa: SIM905
)
"""Suffixes of paths that are taken for videos, without opening them."""

ORIENTATIONS = {
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}
"""What to do with a stored picture, by the signs of a, b, c, d of the display matrix: (x, y) goes to
(a x + c y, b x + d y), y down (FFmpeg's libavutil/display.h)."""

ROTATIONS = {
    90: Image.Transpose.ROTATE_90,
    -90: Image.Transpose.ROTATE_270,
    180: Image.Transpose.ROTATE_180,
    -180: Image.Transpose.ROTATE_180,
}
"""The same by degrees counter-clockwise, where the matrix itself cannot be read."""

NAMED_PROFILES = ("png", "apng")
"""Decoders that name the colour profile of a frame. PyAV 18 frees such a name twice, which crashes Python,
once the frame's side data (with the display matrix) has been read."""

ENCODERS = {"libx264": {"crf": "20"}, "mpeg4": {"b": "8000000"}}
"""Encoders of annotated videos and their options; the first that PyAV was built with is used."""

DAMAGED, UNDECODABLE = "the frame is damaged", "the frame cannot be decoded"
"""Beginnings of `Frame.error` where the file is whole, but one frame is lost."""

_TOLD_GAP = 1  # [s] between the last frame and the promised end from which a file counts as cut off
_TICKS = 1000  # of the clock of written videos, per second


class VideoError(ValueError):
    """A video that cannot be read; the message names it and says why."""


@dataclass(frozen=True, eq=False)
class Frame:
    """One frame of a video.

    Attributes:
        index: Its index in the video.
        timestamp: Its time in the video [s]; None if it has none.
        picture: The upright picture, RGB; None if it could not be read.
        error: Why it could not be read, else None.
    """

    index: int
    timestamp: float | None
    picture: Image.Image | None
    error: str | None = None


class VideoReader:
    """A video file, frame by frame.

    Args:
        path: The file; its first video stream is read.
        upright: Apply the file's rotation and pixel aspect ratio; else pictures are as stored.

    Attributes:
        name: Its name in messages.
        count: Approximate number of frames, None if the file does not tell.

    Raises:
        ImportError: PyAV is not installed.
        FileNotFoundError: There is no such file.
        VideoError: The file is not a video, has no video stream, or is too broken to be opened.

    Example:
        >>> for frame in VideoReader("clip.mp4"):
        ...     print(frame.index, frame.timestamp, frame.picture.size)
    """

    def __init__(self, path: str | os.PathLike, upright: bool = True):
        self._av = _import_av()
        self._upright = upright
        self.name = str(path)
        if Path(path).is_dir():
            raise FileNotFoundError(f"{self.name} is a folder, not a video; name the files in it.")
        if not Path(path).is_file():
            raise FileNotFoundError(f"There is no video file {self.name!r}.")
        with self._open() as (container, stream):
            self.count = _count(container, stream)

    def __iter__(self) -> Iterator[Frame]:
        """Decode from the start.

        Raises:
            VideoError: There is not a single frame.
        """
        with self._open() as (container, stream):
            entries = _ordered(self._decode(container, stream), stream.average_rate or Fraction(25))
            index = -1
            for index, (time, picture, error) in enumerate(entries):
                yield Frame(index, round(float(time), 6), picture, error)
        if index < 0:
            raise VideoError(f"{self.name} holds not a single frame; it is cut off or broken.")

    def _decode(self, container: Any, stream: Any) -> Iterator["Entry"]:
        """Yield decoded and undecodable frames in the decoder's order."""
        packets, ticks = 0, 0  # stored, and the tick of the stream's clock at which the last of them ends
        start = Fraction(container.start_time or 0, self._av.time_base)
        end: Fraction = Fraction(0)  # of pictures and sound [s]
        cut = set[int]()  # times of frames that are stored in part; not every decoder notices
        try:
            for packet in container.demux(stream, *container.streams.audio):
                end = max(end, _end(packet, start))
                if packet.stream.index != stream.index:
                    continue
                packets += packet.size > 0  # the last one is empty, it flushes the decoder
                ticks = max(ticks, (packet.dts or 0) + (packet.duration or 0))
                if packet.is_corrupt and packet.pts is not None:
                    cut.add(packet.pts)
                try:
                    frames = packet.decode()
                except self._av.FFmpegError as error:
                    yield _time(packet, start), None, f"{UNDECODABLE}: {error.strerror}"
                    continue
                for frame in frames:
                    if frame.is_corrupt or frame.pts in cut:
                        yield _time(frame, start), None, DAMAGED
                    else:
                        yield _time(frame, start), self._picture(frame, stream), None
        except self._av.FFmpegError as error:
            yield None, None, f"the file cannot be read further: {error.strerror}"
        else:
            missing = _promised(container, stream) - packets
            if "avi" in container.format.name and _is_short(self.name):
                missing = (stream.frames - ticks) * packets // max(ticks, 1)  # a tick of an AVI may be empty
            if lost := _lost(missing, _promised_end(container, start) - end):
                yield None, None, f"the file is cut off here, {lost} before its end"

    def _picture(self, frame: Any, stream: Any) -> Image.Image:
        if not self._upright:
            return frame.to_image()
        return _upright(frame, stream.codec_context.name, stream.sample_aspect_ratio)

    @contextmanager
    def _open(self) -> Iterator[tuple[Any, Any]]:
        """Yield the container and its first video stream."""
        try:
            container = self._av.open(os.path.abspath(self.name))  # FFmpeg takes "10:30.mp4" for a protocol
        except self._av.FFmpegError as error:
            raise VideoError(
                f"{self.name} is not a video that FFmpeg can read, or it is cut off or broken: "
                f"{error.strerror}."
            ) from error
        with container:
            if not container.streams.video:
                kinds = sorted({stream.type for stream in container.streams}) or "nothing"
                raise VideoError(f"{self.name} has no video stream, it holds {kinds}.")
            yield container, container.streams.video[0]


@contextmanager
def write_video(path: str | os.PathLike, encoder: str | None = None) -> Iterator["VideoWriter"]:
    """Write pictures with their times into an MP4 file, which appears when it is complete.

    Args:
        path: Where to.
        encoder: An encoder of FFmpeg; by default the first of `ENCODERS` that is available.

    Raises:
        OSError: The file cannot be written.
        VideoError: FFmpeg refuses: pictures too large for the encoder, or a gap of a day between times.

    Example:
        >>> with write_video("out.mp4") as video:
        ...     video.add(picture, timestamp=0.04)
    """
    av = _import_av()
    encoder = encoder or next(name for name in ENCODERS if name in av.codecs_available)
    with (
        whole_file(path) as part,
        av.open(os.path.abspath(part), "w", format="mp4", options={"movflags": "+faststart"}) as container,
    ):
        writer = VideoWriter(container, encoder)
        yield writer
        writer.finish()


@contextmanager
def _refusal_told() -> Iterator[None]:
    """Turn FFmpeg's errors into `VideoError`, but for those of the disk, which are `OSError`."""
    try:
        yield
    except _import_av().FFmpegError as error:
        if isinstance(error, OSError):
            raise
        raise VideoError(f"FFmpeg cannot write such a video: {error.strerror}.") from error


class VideoWriter:
    """The writer that `write_video` opens; it takes pictures one by one."""

    def __init__(self, container: Any, encoder: str):
        self._container = container
        self._encoder = encoder
        self._stream: Any = None
        self._last = -1  # time of the last picture [1 / _TICKS s]

    @_refusal_told()
    def add(self, picture: Image.Image, timestamp: float) -> None:
        """Append a picture; the size of the first, made even, is that of the video.

        Args:
            picture: RGB.
            timestamp: Its time [s]; moved to just after the last picture's if it is not later.
        """
        if self._stream is None:
            self._stream = self._new_stream(picture.size)
        size = (self._stream.width, self._stream.height)
        picture = picture if picture.size == size else picture.resize(size)
        frame = _import_av().VideoFrame.from_image(picture)
        self._last = max(round(timestamp * _TICKS), self._last + 1)
        frame.pts, frame.time_base = self._last, Fraction(1, _TICKS)
        self._container.mux(self._stream.encode(frame))

    @_refusal_told()
    def finish(self) -> None:
        """Flush the encoder.

        Raises:
            VideoError: No picture was added.
        """
        if self._stream is None:
            raise VideoError("There is no frame to write.")
        self._container.mux(self._stream.encode())

    def _new_stream(self, size: tuple[int, int]) -> Any:
        stream = self._container.add_stream(
            self._encoder, rate=30, options=ENCODERS.get(self._encoder, {})
        )  # the rate is a hint, the times of the frames say the rest
        # chroma is stored for 2 x 2 pixels
        stream.width, stream.height = (max(side - side % 2, 2) for side in size)
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, _TICKS)
        return stream


def frames_of(pictures: Iterable[Any], fps: float | None = None) -> Iterator[Frame]:
    """Yield pictures as frames.

    Args:
        pictures: Each anything that `load_picture` takes, or None, as from OpenCV, for a lost frame.
        fps: Pictures per second; without it the frames have no timestamp.
    """
    for index, source in enumerate(pictures):
        timestamp = None if fps is None else index / fps
        if source is None:
            yield Frame(index, timestamp, None, "the frame is lost")
            continue
        try:
            yield Frame(index, timestamp, load_picture(source))
        except (OSError, ValueError) as error:
            yield Frame(index, timestamp, None, str(error))


def is_video(source: Any) -> bool:
    """Whether this is a path with the suffix of a video."""
    return (
        isinstance(source, str | os.PathLike)
        and not str(source).startswith(("http://", "https://", "data:"))
        and Path(source).suffix.lower() in SUFFIXES
    )


def _import_av() -> Any:
    try:
        import av
    except ImportError as error:
        raise ImportError('Reading and writing videos needs `pip install "actionunits[video]"`.') from error
    return av


TICK = Fraction(1, 1000)
"""Seconds between frames that have the same time in the file."""

Entry = tuple[Fraction | None, Image.Image | None, str | None]
"""Time [s], picture, and the error where there is none."""


def _ordered(
    entries: Iterable[Entry], rate: Fraction
) -> Iterator[tuple[Fraction, Image.Image | None, str | None]]:
    """Sort failed frames in by time: decoders report them before they return earlier frames.

    Frames without a time (as in AVI) follow the last one at the average rate. Frames whose time is not after
    the last one's follow it by a tick, so that one wrong time does not shift the right ones after it.
    """
    last: Fraction | None = None
    failed: list[tuple[Fraction, str]] = []  # a heap, earliest first

    def following(time: Fraction | None) -> Fraction:
        nonlocal last
        if last is not None:
            earliest = last + (1 / rate if time is None else min(1 / rate, TICK))
            time = earliest if time is None or time <= last else time
        last = time or Fraction(0)
        return last

    for time, picture, error in entries:
        if error is not None and time is not None:
            heapq.heappush(failed, (time, error))
            continue
        while failed and (time is None or failed[0][0] < time):
            earlier, reason = heapq.heappop(failed)
            yield following(earlier), None, reason
        yield following(time), picture, error
    for earlier, reason in sorted(failed):
        yield following(earlier), None, reason


def _time(timed: Any, start: Fraction) -> Fraction | None:
    """Time of a packet or frame since the start of the file [s]."""
    return None if timed.pts is None else timed.pts * timed.time_base - start


def _end(packet: Any, start: Fraction) -> Fraction:
    """Time at which what a packet holds ends, since the start of the file [s]; 0 if it has no time."""
    time = _time(packet, start)
    return Fraction(0) if time is None else time + (packet.duration or 0) * packet.time_base


def _upright(frame: Any, decoder: str, aspect: Fraction | None) -> Image.Image:
    """Return a decoded frame as it is meant to be seen; `aspect` is that of its pixels, if known."""
    picture = frame.to_image()
    if aspect and aspect != 1:  # the pixels of DV, HDV and DVD are not square
        width = max(round(picture.width * aspect), 1)
        picture = picture.resize((width, picture.height), Image.Resampling.BICUBIC)
    how = ROTATIONS.get(frame.rotation)
    if decoder not in NAMED_PROFILES:
        try:
            matrix = frame.side_data.get("DISPLAYMATRIX")
        except ValueError:  # there is other side data that PyAV does not know, such as EXIF
            pass
        else:
            how = None if matrix is None else _orientation(bytes(matrix))
    return picture if how is None else picture.transpose(how)


def _orientation(matrix: bytes) -> Image.Transpose | None:
    """The transposition that a display matrix asks for."""
    signs = np.sign(np.frombuffer(matrix[:36], dtype=np.int32)[[0, 1, 3, 4]])
    return ORIENTATIONS.get(tuple(signs.tolist()))


def _lost(frames: int, seconds: Fraction) -> str:
    """What is missing at the end of a file; "" if it is whole."""
    if frames > 0:
        return f"{frames} frame{'' if frames == 1 else 's'}"
    return f"{float(seconds):.1f} s" if seconds > _TOLD_GAP else ""


def _promised(container: Any, stream: Any) -> int:
    """Number of frames in the index of an MP4 file; 0 for other formats.

    Without those that its edit list trims, which FFmpeg removes from the index but not from the count.
    """
    if "mp4" not in container.format.name:
        return 0
    index = getattr(stream, "index_entries", None)  # older PyAV has none
    return stream.frames if index is None else min(stream.frames, len(index))


def _promised_end(container: Any, start: Fraction) -> Fraction:
    """End time [s] since the start, by the header of a Matroska, WebM, Flash or MXF file; 0 for others.

    Matroska and WebM give it by their clock, on which they may start late.
    """
    is_told = any(name in container.format.name for name in ("matroska", "flv", "mxf"))
    end = Fraction(container.duration or 0, 1_000_000) if is_told else Fraction(0)
    return end - start if "matroska" in container.format.name else end


def _is_short(path: str) -> bool:
    """Whether an AVI file is shorter than the sizes in the headers of its chunks."""
    with open(path, "rb") as file:
        end, position = file.seek(0, os.SEEK_END), 0
        while position < end:
            file.seek(position)
            head = file.read(8)
            if head[:4] != b"RIFF":
                return False
            size = int.from_bytes(head[4:], "little")
            position += len(head) + size + size % 2
    return position > end + 1  # the last chunk may lack its padding byte


def _count(container: Any, stream: Any) -> int | None:
    """Approximate number of frames."""
    if promised := _promised(container, stream):
        return promised
    if container.duration is None or not stream.average_rate:
        return None
    return round(container.duration / 1_000_000 * stream.average_rate)
