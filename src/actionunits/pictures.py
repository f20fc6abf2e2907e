"""Load pictures of any kind as upright 8-bit RGB images, or raise an error that says why not."""

import importlib.util
import os
import re
import string
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import quote
from urllib.request import Request, urlopen

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from transformers.utils import logging

logger = logging.get_logger(__name__)

MIN_SIDE = 24
"""Smallest width and height [pixels]; smaller pictures show no legible face."""

BACKGROUND = (128, 128, 128)
"""Colour behind transparent pixels: the grey that also surrounds an aligned face."""

ROUNDING = 0.001
"""Tolerated rounding error of float pixels beyond 0..1: less than half a step of 8 bits."""

_LONGEST_PATH, _LONGEST_NAME = 4096, 255  # [characters] of a file, and of each part of its path
_OF_HEIF = " It is a HEIC file: save it as JPEG, or call pillow_heif.register_heif_opener() of pillow-heif."
_OF_VIDEO = " It is a video: give it to `actionunits video`, or to the pipeline as video=."
_REMEDIES = (  # where the first bytes match
    (rb"....ftyp(?:hei[cxms]|mif1)", _OF_HEIF),  # the format of phones
    (rb"....ftyp(?!avi)|RIFF....AVI |\x1aE\xdf\xa3", _OF_VIDEO),  # MP4 (not AVIF), AVI, Matroska
)
_URL_TIMEOUT = 30.0  # [s]
_USER_AGENT = "actionunits"  # some servers refuse Python's default


class PictureError(ValueError):
    """A picture that cannot be used; the message names it and says why."""


def load_picture(source: Any) -> Image.Image:
    """Load a picture as it is meant to be seen.

    The EXIF orientation is applied, so boxes and landmarks always refer to the upright picture. Grey,
    palette, CMYK, transparent and 16-bit pictures become 8-bit RGB; an animation gives its first frame.

    Args:
        source: Path, URL (http, https or data), encoded bytes, PIL image, or an array or tensor of shape
            (H, W), (H, W, C) or (C, H, W) with C in 1, 3, 4: uint8, uint16 or floats in [0, 1]. The range of
            uint16 is 0..65535, as in files, or 0..255 where no value is higher.

    Returns:
        PIL image of mode RGB.

    Raises:
        TypeError: The source is none of the above.
        FileNotFoundError: There is no such file.
        PictureError: The picture is broken, truncated, too small or too large, or its values out of range.
    """
    name, image = _open(source)
    size = f"{image.width}x{image.height} pixels"
    if min(image.size) < MIN_SIDE:
        raise PictureError(f"{name} has {size}; at least {MIN_SIDE} a side are needed.")
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise PictureError(
            f"{name} has {size}, more than the {limit} that Pillow holds for safe; "
            "make it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it."
        )
    try:
        return _to_rgb(_upright(image))
    except PictureError:
        raise
    except Exception as error:  # Pillow's decoders raise errors of many types
        raise PictureError(f"{name} is broken or truncated: {error}") from error


@contextmanager
def naming(place: str) -> Iterator[None]:
    """Prefix error messages with the input that they are about, such as "images[3]"."""
    try:
        yield
    except (OSError, TypeError, ValueError) as error:
        if len(error.args) == 1:  # else the first is not a message
            error.args = (f"{place}: {error}",)
        raise


def sample_photo() -> Path:
    """Return the path of a freely usable photo: NASA's portrait of Eileen Collins, in scikit-image."""
    package = importlib.util.find_spec("skimage")  # found, not imported: nothing is fetched
    assert package is not None and package.origin is not None, "scikit-image is a dependency"
    return Path(package.origin).parent / "data" / "astronaut.png"


def _open(source: Any) -> tuple[str, Image.Image]:
    """Return the name of the picture for messages, and the picture, not yet decoded."""
    if isinstance(source, Image.Image):
        return getattr(source, "filename", "") or "The picture", source
    if isinstance(source, np.ndarray | torch.Tensor):
        return "The picture", _from_array(source)
    if isinstance(source, bytes):
        return "The picture", _from_bytes("The picture", source)
    if isinstance(source, str) and source.lower().startswith(("http://", "https://", "data:")):
        name = _shortened(source)
        return name, _from_bytes(name, _fetch(name, source))
    if source == "":
        raise FileNotFoundError("The name of a picture file is empty.")
    if isinstance(source, str | os.PathLike):
        if not os.path.exists(source):
            _check_name(os.fspath(source))
        path = Path(source)
        if path.is_dir():
            raise FileNotFoundError(f"{path} is a folder, not a picture; name the files in it.")
        if not path.is_file():
            raise FileNotFoundError(f"There is no picture file {str(path)!r}.")
        return str(path), _from_bytes(str(path), path.read_bytes())
    raise TypeError(
        f"Cannot read a picture from {type(source).__name__}; "
        "give a path, a URL, bytes, a PIL image, an array or a tensor."
    )


def _check_name(name: str) -> None:
    """Refuse a string that is no file and does not look like a path either."""
    if "://" in name:
        raise FileNotFoundError(
            f"{_shortened(name)} is not an address that pictures are fetched from; use one that begins with "
            "http://, https:// or data:."
        )
    if len(name) > _LONGEST_PATH or max(map(len, name.split("/"))) > _LONGEST_NAME:
        raise FileNotFoundError(
            f"{_shortened(name)} is too long for the name of a file; if it is an encoded picture let it "
            'begin with "data:image/jpeg;base64,".'
        )


def _shortened(text: str) -> str:
    return text if len(text) < 100 else f"{text[:60]}..."


def _fetch(name: str, url: str) -> bytes:
    if not url.lower().startswith("data:"):
        url = quote(url, safe=string.punctuation)  # letters beyond ASCII, and spaces
    try:
        with urlopen(Request(url, headers={"User-Agent": _USER_AGENT}), timeout=_URL_TIMEOUT) as answer:
            return answer.read()
    except Exception as error:  # from the network, the server, the address or its encoding
        raise PictureError(f"{name} could not be fetched: {error}") from error


def _from_bytes(name: str, data: bytes) -> Image.Image:
    try:
        return Image.open(BytesIO(data))
    except Image.DecompressionBombError as error:
        raise PictureError(f"{name} is too large: {error}") from error
    except Exception as error:
        remedy = next((text for start, text in _REMEDIES if re.match(start, data, re.DOTALL)), "")
        raise PictureError(
            f"{name} is not a picture that Pillow can read ({len(data)} bytes).{remedy}"
        ) from error


def _from_array(pixels: np.ndarray | torch.Tensor) -> Image.Image:
    """Return an 8-bit image of mode L, RGB or RGBA."""
    if isinstance(pixels, torch.Tensor):
        pixels = (pixels.float() if pixels.is_floating_point() else pixels).detach().cpu().numpy()
    shape = pixels.shape
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    elif pixels.ndim == 3 and shape[-1] not in (1, 3, 4) and shape[0] in (1, 3, 4):
        pixels = np.moveaxis(pixels, 0, -1)  # (C, H, W) -> (H, W, C)
    if pixels.ndim != 3 or pixels.shape[-1] not in (1, 3, 4):
        raise PictureError(
            f"An array of shape {shape} is not a picture; give (H, W), (H, W, C) or (C, H, W) "
            "with C in 1, 3, 4, and several pictures as a list."
        )
    if 0 in pixels.shape:
        raise PictureError(f"An array of shape {shape} holds no pixels.")
    return Image.fromarray(_to_uint8(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels))


def _to_uint8(values: np.ndarray) -> np.ndarray:
    if values.dtype == np.uint8:
        return np.ascontiguousarray(values)
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:
        return _from_16_bits(values)
    if values.dtype.kind != "f":
        raise PictureError(
            f"Pixels of type {values.dtype} have no known range; "
            "convert to uint8 (0..255), uint16 or floats in 0..1."
        )
    if wrong := int((~np.isfinite(values)).sum()):
        raise PictureError(
            f"{wrong} of {values.size} float pixels are not finite numbers; replace them with "
            "values in 0..1, for instance by numpy.nan_to_num."
        )
    low, high = values.min(), values.max()
    if not (low >= -ROUNDING and high <= 1.0 + ROUNDING):
        raise PictureError(
            f"Float pixels must lie in 0..1, these lie in {low:.4g}..{high:.4g}; "
            "divide by 255 or convert to uint8."
        )
    return (values.clip(0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


def _from_16_bits(values: np.ndarray) -> np.ndarray:
    """Return 8 bits, 65535 becoming 255; values up to 255 are 8 bits already."""
    highest = int(values.max())
    if highest <= 255:
        return values.astype(np.uint8)
    if highest < 4096:
        logger.warning_once(
            f"A picture of 16 bits has no value above {highest}, of 65535, and so is almost black; if it has "
            f"{highest.bit_length()} bits, multiply it by {2 ** (16 - highest.bit_length())}."
        )
    return (values / 257.0 + 0.5).astype(np.uint8)


def _upright(image: Image.Image) -> Image.Image:
    image.load()  # turns a TIFF
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # broken EXIF says nothing about the orientation
        return image
    if orientation not in range(2, 9):
        return image
    # Without the other entries: Pillow would rewrite them, and fail on those of a wrong type.
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image = image.copy()
    image.info["exif"] = exif.tobytes()
    return ImageOps.exif_transpose(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I":  # 32-bit holds 16-bit files in older Pillow
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise PictureError(
                f"32-bit pixels in {values.min()}..{values.max()} have no known range; save 8 or 16 bits."
            )
        image = _from_array(values.astype(np.uint16))
    elif image.mode == "F" or image.mode.startswith("I;16"):
        image = _from_array(np.asarray(image))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (*BACKGROUND, 255)), image).convert("RGB")
    return image.convert("RGB")
