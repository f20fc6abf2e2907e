import base64
import io
import struct
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

from actionunits import pictures
from actionunits.pictures import PictureError, load_picture


def _file(image, suffix="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=suffix, **options)
    return buffer.getvalue()


def test_every_source_gives_the_same_picture(photo, photo_path):
    array = np.asarray(photo)
    tensor = torch.tensor(array).permute(2, 0, 1)
    files = [photo_path, str(photo_path), photo_path.read_bytes(), photo]
    integers = [array, array.transpose(2, 0, 1), tensor, array.astype(np.uint16) * 257]
    floats = [array / 255.0, tensor / 255, (tensor / 255).double()]
    for source in files + integers + floats:
        picture = load_picture(source)
        assert picture.mode == "RGB"
        np.testing.assert_array_equal(picture, array)


def test_floats_that_arithmetic_left_beyond_their_range(photo):
    array = np.asarray(photo).astype(np.float32) / 255
    array[:20], array[20:40] = -1e-7, 1 + 1e-6
    expected = np.asarray(photo).copy()
    expected[:20], expected[20:40] = 0, 255
    np.testing.assert_array_equal(load_picture(array), expected)
    for beyond, message in ((-0.01, r"lie in -0.01\.\."), (1.01, r"\.\.1.01; divide by 255")):
        array[0] = beyond
        with pytest.raises(PictureError, match=message):
            load_picture(array)
        array[0] = 0


def test_data_urls(photo):
    small = photo.resize((40, 40))
    url = "data:image/png;base64," + base64.b64encode(_file(small)).decode()
    np.testing.assert_array_equal(load_picture(url), small)
    np.testing.assert_array_equal(load_picture("DATA" + url[4:]), small)
    with pytest.raises(PictureError, match="not a picture that Pillow can read"):
        load_picture("data:image/png;base64,AAAA")
    with pytest.raises(PictureError, match="could not be fetched"):
        load_picture("data:image/png;base64,A")
    with pytest.raises(FileNotFoundError, match="is empty"):
        load_picture("")


def test_urls_of_the_web(photo):
    """A picture of 16 bits by HTTP is the same as by its path; what the server refuses is said."""
    grey = np.asarray(photo.convert("L"))
    file = _file(Image.fromarray(grey.astype(np.uint16) * 257))

    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            known = (
                self.path in ("/photo.png?size=1", "/f%C3%BCr%20%7Ea.png")
                and "Python" not in self.headers["User-Agent"]
            )
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(file if known else b"")

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        for name in ("photo.png?size=1", "für %7Ea.png"):
            np.testing.assert_array_equal(np.asarray(load_picture(url + name))[..., 0], grey)
        with pytest.raises(PictureError, match=f"{url}other.png could not be fetched: .*404"):
            load_picture(f"{url}other.png")
        server.shutdown()


def test_exif_orientation_is_applied(photo):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    lying = photo.rotate(90, expand=True).crop((0, 0, 200, 150))
    np.testing.assert_array_equal(load_picture(_file(lying, exif=exif)), lying.rotate(-90, expand=True))


@pytest.mark.parametrize(
    "entry",
    [(0x0100, 2, b"abc\0"), (0x011A, 2, b"abc\0"), (0x0100, 9, struct.pack("<i", -5))],
    ids=["text for a width", "text for a resolution", "negative width"],
)
def test_exif_with_an_entry_of_the_wrong_type_still_turns_the_picture(photo, entry):
    """Cameras and editors write such entries; Pillow reads them, but cannot write them again."""
    tag, kind, value = entry
    count = 1 if kind == 9 else len(value)
    entries = sorted([(tag, kind, count, value), (0x0112, 3, 1, struct.pack("<H", 6))])
    packed = b"".join(struct.pack("<HHI", *e[:3]) + e[3].ljust(4, b"\0") for e in entries)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + packed + bytes(4)
    lying = photo.rotate(90, expand=True).crop((0, 0, 200, 150))
    once = load_picture(_file(lying, exif=exif))
    np.testing.assert_array_equal(once, lying.rotate(-90, expand=True))
    np.testing.assert_array_equal(load_picture(once), once)  # as the detector and the pipeline do


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr", "LA", "RGBA", "RGBX"])
def test_colour_modes(photo, mode):
    picture = load_picture(photo.convert(mode))
    assert picture.mode == "RGB" and picture.size == photo.size
    difference = np.abs(np.asarray(picture.convert("L"), dtype=float) - np.asarray(photo.convert("L"))).mean()
    assert difference < {"1": 90, "P": 12}.get(mode, 4)


def test_transparency_shows_grey():
    clear = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    assert load_picture(clear).getpixel((5, 5)) == (128, 128, 128)
    palette = Image.new("P", (32, 32))
    palette.info["transparency"] = 0
    assert load_picture(palette).getpixel((5, 5)) == (128, 128, 128)


def test_sixteen_bits_keep_their_range(photo):
    grey = np.asarray(photo.convert("L"))
    sixteen = grey.astype(np.uint16) * 257
    file = _file(Image.fromarray(sixteen))
    for source in (file, Image.open(io.BytesIO(file)), sixteen, Image.fromarray(sixteen.astype(np.int32))):
        np.testing.assert_array_equal(np.asarray(load_picture(source))[..., 0], grey)
    np.testing.assert_array_equal(
        np.asarray(load_picture(Image.fromarray((grey / 255).astype(np.float32))))[..., 1], grey
    )


def test_eight_bits_in_more_are_no_black_picture(photo):
    np.testing.assert_array_equal(load_picture(photo.convert("I")), load_picture(photo.convert("L")))
    array = np.asarray(photo).astype(np.uint16)
    for source in (array, torch.from_numpy(array).permute(2, 0, 1)):
        np.testing.assert_array_equal(load_picture(source), photo)
    np.testing.assert_array_equal(
        load_picture(Image.fromarray(array[..., 0])),
        load_picture(Image.fromarray(array[..., 0].astype(np.uint8))),
    )


@pytest.mark.parametrize(("bits", "factor"), [(10, 64), (12, 16)])
def test_fewer_than_16_bits_are_told_of(photo, caplog, bits, factor):
    pictures.logger.warning_once.cache_clear()
    pictures.logger.addHandler(caplog.handler)
    array = np.asarray(photo).astype(np.uint16) << (bits - 8)
    assert np.asarray(load_picture(array)).max() <= 16
    pictures.logger.removeHandler(caplog.handler)
    highest = array.max()
    assert f"no value above {highest}, " in caplog.text
    assert f"if it has {bits} bits, multiply it by {factor}." in caplog.text
    np.testing.assert_allclose(load_picture(array * factor), photo, atol=1)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (None, TypeError, "NoneType; give a path"),
        (7, TypeError, "int"),
        ("nowhere.jpg", FileNotFoundError, "'nowhere.jpg'"),
        (".", FileNotFoundError, "a folder, not a picture; name the files in it"),
        (b"no picture at all", PictureError, r"not a picture that Pillow can read \(17 bytes\)\.$"),
        (b"\0\0\0\x18ftypheic" + bytes(99), PictureError, "HEIC file: save it as JPEG, or call pillow_heif"),
        (b"\0\0\0\nftypisom" + bytes(99), PictureError, "It is a video: give it to `actionunits video`"),
        (b"\0\0\0\x18ftypavif" + bytes(99), PictureError, r"that Pillow can read \(111 bytes\)\.$"),
        (np.zeros((40, 40, 2), np.uint8), PictureError, r"\(40, 40, 2\)"),
        (np.zeros((2, 40, 40, 3), np.uint8), PictureError, "as a list"),
        (np.zeros((0, 40, 3), np.uint8), PictureError, "no pixels"),
        (np.full((40, 40), 128.0), PictureError, "128..128; divide by 255"),
        (np.full((40, 40), np.nan), PictureError, "1600 of 1600 float pixels are not finite .* 0..1"),
        (np.full((40, 40), np.inf), PictureError, "float pixels are not finite numbers; replace them"),
        (
            "ftp://example.org/a.jpg",
            FileNotFoundError,
            "ftp://example.org/a.jpg is not an address .* https://",
        ),
        (
            "file:///tmp/a.jpg",
            FileNotFoundError,
            "file:///tmp/a.jpg is not an address that pictures are fetched",
        ),
        ("iVBORw0KGgo" * 30, FileNotFoundError, r"^iVBOR\w{40,80}\.\.\. is too long .*data:image/jpeg"),
        ("iVBORw0KGg/" * 999, FileNotFoundError, r"^iVBOR\S{40,80}\.\.\. is too long .*data:image/jpeg"),
        (np.full((40, 40), 128), PictureError, "int64"),
        (np.zeros((23, 300, 3), np.uint8), PictureError, "300x23 pixels; at least 24"),
    ],
)
def test_unusable_pictures(source, error, message):
    with pytest.raises(error, match=message):
        load_picture(source)


@pytest.mark.parametrize("suffix", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_truncated_files_are_named(tmp_path, photo, suffix):
    path = tmp_path / "cut.img"
    path.write_bytes(_file(photo, suffix)[:-2000])
    with pytest.raises(PictureError, match="cut.img is (broken or truncated|not a picture)"):
        load_picture(path)


@pytest.mark.parametrize("factor", [1.5, 3])  # Pillow warns of the first and refuses the second
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs(monkeypatch, photo, factor):
    data = _file(photo)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(200 * 200 / factor))
    with pytest.raises(PictureError, match="more than|too large"):
        load_picture(data)


def test_broken_exif_costs_nothing(photo, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = bytearray(_file(photo, "JPEG", exif=exif))
    start = data.find(b"Exif") + 6
    data[start : start + 8] = b"\xff" * 8
    (tmp_path / "broken.jpg").write_bytes(data)
    stored = np.asarray(Image.open(tmp_path / "broken.jpg").convert("RGB"))
    once = load_picture(tmp_path / "broken.jpg")
    np.testing.assert_array_equal(once, stored)
    np.testing.assert_array_equal(load_picture(once), stored)  # as the detector and the pipeline do
