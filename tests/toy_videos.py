"""Tiny video files, written with PyAV itself, so that `actionunits.video` is not tested against itself."""

from fractions import Fraction

import av
import numpy as np
from PIL import Image

CODECS = [name for name in ("mpeg4", "libx264") if name in av.codecs_available]


def moving(photo, frames, size=(260, 220), step=2):
    """Pictures on which the photo moves to the right over a plain ground."""
    pictures = []
    for i in range(frames):
        picture = Image.new("RGB", size, (40, 90, 160))
        picture.paste(photo, (step * i, 10))
        pictures.append(picture)
    return pictures


def write(
    path, pictures, codec="mpeg4", times_ms=None, faststart=True, orient=None, options=None, aspect=None
):
    """Write pictures as a video; 25 frames a second where no times [ms] are given."""
    options = {"b": "20000000", **(options or {})} if codec == "mpeg4" else {"crf": "5", **(options or {})}
    movflags = {"movflags": "+faststart"} if faststart and path.suffix in (".mp4", ".mov") else {}
    with av.open(str(path), "w", options=movflags) as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height = pictures[0].size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if orient is not None:
            stream.set_display_rotation(**orient)
        for i, picture in enumerate(pictures):
            frame = av.VideoFrame.from_image(picture)
            frame.pts = 40 * i if times_ms is None else times_ms[i]
            frame.time_base = Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_at_rate(path, pictures, codec, rate=25, sound=0):
    """Write so many pictures a second by the clock of the frames, as cameras write AVI, Flash and MXF.

    `sound` is the length of a sound track beside them [s].
    """
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options={"bf": "0"})
        stream.width, stream.height = pictures[0].size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        if sound:
            add_silence(container, sound)
        for i, picture in enumerate(pictures):
            frame = av.VideoFrame.from_image(picture)
            frame.pts = i
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def packets(path):
    """(position, size) of each frame in the file."""
    with av.open(str(path)) as container:
        return [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]


def cut(path, frames):
    """Cut a file off in the middle of the frame after so many."""
    position, size = packets(path)[frames]
    path.write_bytes(path.read_bytes()[: position + size // 2])
    return path


def damage(path, frame, keep=8):
    """Overwrite one frame with noise, past the bytes that say what it is."""
    position, size = packets(path)[frame]
    data = bytearray(path.read_bytes())
    noise = np.random.default_rng(0).integers(0, 256, size - keep).astype(np.uint8)
    data[position + keep : position + size] = noise.tobytes()
    path.write_bytes(data)
    return path


def sound(path):
    """Write a file that has sound only."""
    with av.open(str(path), "w") as container:
        add_silence(container, 0.128)
    return path


def add_silence(container, seconds):
    stream = container.add_stream("aac", rate=8000, layout="mono")
    samples = np.zeros((1, round(8000 * seconds)), np.float32)
    frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
    frame.rate = 8000
    container.mux(stream.encode(frame))
    container.mux(stream.encode())
