import contextlib
import errno
import gc
import re
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from actionunits.video import (
    ORIENTATIONS,
    VideoError,
    VideoReader,
    _ordered,
    frames_of,
    is_video,
    whole_file,
    write_video,
)

toy_videos = pytest.importorskip("toy_videos", reason="PyAV is not installed")


def difference(picture, other):
    return np.abs(np.asarray(picture, dtype=float) - np.asarray(other, dtype=float)).mean()


@pytest.fixture
def pictures(photo):
    return toy_videos.moving(photo.resize((60, 60)), 12, size=(96, 80))


@pytest.fixture
def ramp():
    """A picture that looks different in all eight orientations."""
    y, x = np.mgrid[:64, :96]
    return Image.fromarray(np.stack([2 * x, 3 * y, 0 * x], axis=-1).astype(np.uint8))


# --- reading ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", toy_videos.CODECS)
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_frames_come_in_order_with_their_times(tmp_path, pictures, codec, suffix):
    reader = VideoReader(toy_videos.write(tmp_path / f"clip{suffix}", pictures, codec))
    frames = list(reader)
    assert reader.count == len(pictures)
    assert [frame.index for frame in frames] == list(range(12))
    np.testing.assert_allclose([frame.timestamp for frame in frames], np.arange(12) * 0.04, atol=1e-6)
    for i, (frame, picture) in enumerate(zip(frames, pictures, strict=True)):
        assert frame.error is None and frame.picture.mode == "RGB"
        assert difference(frame.picture, picture) < 6
        assert min(range(12), key=lambda k: difference(frame.picture, pictures[k])) == i
    assert [frame.timestamp for frame in reader] == [frame.timestamp for frame in frames]  # once more


@pytest.mark.parametrize("codec", toy_videos.CODECS)
def test_frames_at_any_rate_have_their_own_times(tmp_path, pictures, codec):
    times = [0, 40, 80, 500, 501, 502, 2000, 2033, 2066, 2100, 9000, 9001]
    frames = VideoReader(toy_videos.write(tmp_path / "clip.mp4", pictures, codec, times_ms=times))
    np.testing.assert_allclose([frame.timestamp for frame in frames], np.divide(times, 1000), atol=5e-4)


def test_a_repeated_time_does_not_shift_those_after_it():
    """Of a file that says two frames a second and has a burst of more."""
    burst = [Fraction(10) + Fraction(i, 25) for i in range(5)]
    times = [Fraction(0), burst[0], *burst, None, Fraction(14)]
    entries = [(time, None, None) for time in times]
    seen = [float(time) for time, _, _ in _ordered(entries, rate=Fraction(2))]
    np.testing.assert_allclose(seen, [0, 10, 10.001, 10.04, 10.08, 10.12, 10.16, 10.66, 14], atol=1e-9)


def test_failed_frames_are_sorted_in_by_their_time():
    """Decoders report them before the earlier frames that they still hold; one frame has no time."""
    entries = [
        (0, "a"),
        (3, None),
        (1, "b"),
        (2, None),
        (4, "c"),
        (6, None),
        (None, "d"),
        (9, None),
        (8, None),
    ]
    told = [
        (None if time is None else Fraction(time), picture, None if picture else f"lost at {time}")
        for time, picture in entries
    ]
    expected = [
        (0, "a"),
        (1, "b"),
        (2, None),
        (3, None),
        (4, "c"),
        (6, None),
        (6.5, "d"),
        (8, None),
        (9, None),
    ]
    seen = list(_ordered(told, rate=Fraction(2)))
    assert [(time, picture) for time, picture, _ in seen] == expected
    assert all(error == (None if picture else f"lost at {time}") for time, picture, error in seen)


def test_time_counts_from_the_start_of_the_file(tmp_path, pictures):
    times = [5000 + 40 * i for i in range(12)]
    frames = VideoReader(toy_videos.write(tmp_path / "clip.ts", pictures, times_ms=times))
    np.testing.assert_allclose([frame.timestamp for frame in frames], np.arange(12) * 0.04, atol=1e-4)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_sound_is_no_picture_but_may_outlast_them(tmp_path, pictures, suffix):
    path = toy_videos.write_at_rate(tmp_path / f"clip{suffix}", pictures, "mpeg4", sound=3)
    frames = list(VideoReader(path))
    np.testing.assert_allclose([frame.timestamp for frame in frames], np.arange(12) * 0.04, atol=1e-3)
    for frame, picture in zip(frames, pictures, strict=True):
        assert frame.error is None and difference(frame.picture, picture) < 6


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("hflip", [False, True])
def test_pictures_are_upright(tmp_path, ramp, degrees, hflip):
    """Stored pictures that were turned and mirrored the other way come out as they were before."""
    if not hasattr(toy_videos.av.video.stream.VideoStream, "set_display_rotation"):
        pytest.skip("this PyAV cannot write rotations")
    turned = ramp.rotate(-degrees, expand=True)  # the file asks for `degrees` counter-clockwise ...
    stored = turned.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if hflip else turned
    orient = {"degrees": degrees - 360 * (degrees > 180), "hflip": hflip}
    path = toy_videos.write(tmp_path / "clip.mp4", [stored] * 2, orient=orient)
    with toy_videos.av.open(str(path)) as container:
        matrix = np.frombuffer(
            bytes(next(container.decode(video=0)).side_data.get("DISPLAYMATRIX") or b""), "i4"
        )
    (frame, _) = VideoReader(path)
    expected = as_displayed(stored, matrix) if len(matrix) else stored
    assert frame.picture.size == expected.size
    assert difference(frame.picture, expected) < 6
    if not hflip:
        assert difference(frame.picture, ramp) < 6


def test_pixels_come_out_square(tmp_path, ramp):
    """Those of HDV are 4:3."""
    stored = ramp.resize((96, 96))
    path = toy_videos.write(tmp_path / "clip.mp4", [stored] * 2, aspect=Fraction(4, 3))
    (frame, _) = VideoReader(path)
    assert frame.picture.size == (128, 96)
    assert difference(frame.picture, stored.resize((128, 96), Image.Resampling.BICUBIC)) < 6
    assert VideoReader(toy_videos.write(tmp_path / "b.mp4", [stored], aspect=Fraction(1))).count == 1
    assert next(iter(VideoReader(tmp_path / "b.mp4"))).picture.size == (96, 96)


def as_displayed(stored, matrix):
    """The definition of the display matrix, pixel by pixel: (x, y) goes to (a x + c y, b x + d y)."""
    a, b, c, d = np.sign(matrix[[0, 1, 3, 4]])
    pixels = np.asarray(stored)
    y, x = np.indices(pixels.shape[:2])
    to_x, to_y = a * x + c * y, b * x + d * y
    to_x, to_y = to_x - to_x.min(), to_y - to_y.min()
    shown = np.zeros((to_y.max() + 1, to_x.max() + 1, 3), np.uint8)
    shown[to_y, to_x] = pixels
    return Image.fromarray(shown)


@pytest.mark.parametrize("signs", ORIENTATIONS)
def test_orientations_are_those_of_the_display_matrix(ramp, signs):
    matrix = np.zeros(9, dtype=int)
    matrix[[0, 1, 3, 4]] = signs
    assert ramp.transpose(ORIENTATIONS[signs]).tobytes() == as_displayed(ramp, matrix).tobytes()


# --- broken files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_pictures_are_upright_beside_data_that_pyav_does_not_know(tmp_path, ramp, orientation):
    """FFmpeg makes a display matrix and, from version 8 on, another piece of side data of EXIF."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "picture.jpg"
    ramp.save(path, exif=exif, quality=95, subsampling=0)
    (frame,) = VideoReader(path)
    expected = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    assert frame.picture.size == expected.size
    assert difference(frame.picture, expected) < 4


def test_named_colour_profiles_do_not_end_python(tmp_path, ramp):
    """PyAV frees their names twice when what lies beside the frame is collected."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    path = tmp_path / "picture.png"
    ramp.save(path, icc_profile=profile)
    for _ in range(10):
        (frame,) = VideoReader(path)
        gc.collect()
    assert difference(frame.picture, ramp) == 0


def test_a_file_that_is_cut_off_gives_what_it_has(tmp_path, pictures):
    path = toy_videos.cut(toy_videos.write(tmp_path / "clip.mp4", pictures), 7)
    frames = list(VideoReader(path))
    assert [frame.picture is None for frame in frames] == [False] * 7 + [True] * 2
    assert frames[7].error.startswith(("the frame cannot be decoded", "the frame is damaged"))
    assert frames[8].error == "the file is cut off here, 4 frames before its end"
    np.testing.assert_allclose([frame.timestamp for frame in frames], np.arange(9) * 0.04, atol=1e-6)


@pytest.mark.parametrize("codec", toy_videos.CODECS)
def test_a_file_that_is_trimmed_is_whole(tmp_path, pictures, codec):
    """A player shows it from a later key frame on, as its edit list says; those before are not missing."""
    times_ms = range(-440, 40 * 61, 40)
    path = toy_videos.write(tmp_path / "clip.mp4", pictures * 6, codec, times_ms, options={"g": "10"})
    frames = list(VideoReader(path))
    assert [frame.error for frame in frames] == [None] * 61
    toy_videos.cut(path, 20)
    assert re.fullmatch(
        r"the file is cut off here, \d+ frames before its end", list(VideoReader(path))[-1].error
    )


@pytest.mark.parametrize("suffix", ["mkv", "flv"])
def test_files_that_start_late_are_cut_off_where_they_are(tmp_path, pictures, suffix):
    codec = "mpeg4" if suffix == "mkv" else "flv"
    times_ms = [5000 + 40 * i for i in range(len(pictures))]
    frames = list(VideoReader(toy_videos.write(tmp_path / f"clip.{suffix}", pictures, codec, times_ms)))
    assert [frame.error for frame in frames] == [None] * len(pictures)
    path = toy_videos.write(tmp_path / f"long.{suffix}", pictures * 6, codec, range(5000, 20000, 40))
    *_, last = VideoReader(toy_videos.cut(path, 20))
    assert re.fullmatch(r"the file is cut off here, 2\.\d s before its end", last.error)


def test_a_matroska_file_that_is_cut_off(tmp_path, pictures):
    path = tmp_path / "clip.mkv"
    toy_videos.write(path, pictures * 6)
    assert all(frame.error is None for frame in VideoReader(path))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    *frames, last = VideoReader(path)
    assert 20 < len(frames) < 50
    assert all(frame.error is None for frame in frames)
    assert last.picture is None and re.match(r"the file is cut off here, 1\.\d s before its end", last.error)


def test_slides_are_shown_to_the_end(tmp_path, pictures):
    """The last one is seen for as long as the others, so that the file ends long after its last picture."""
    path = toy_videos.write_at_rate(tmp_path / "slides.mkv", pictures, "mpeg4", Fraction(1, 5))
    frames = list(VideoReader(path))
    assert [frame.error for frame in frames] == [None] * 12
    np.testing.assert_allclose([frame.timestamp for frame in frames], np.arange(12) * 5.0)
    *_, last = VideoReader(toy_videos.cut(path, 7))
    assert re.fullmatch(r"the file is cut off here, 2[05]\.0 s before its end", last.error)


@pytest.mark.parametrize("codec", [*toy_videos.CODECS, "mjpeg", "rawvideo"])
def test_an_avi_file_that_is_cut_off(tmp_path, pictures, codec):
    """Its head says how many frames there are, not where they lie."""
    path = toy_videos.write_at_rate(tmp_path / "clip.avi", pictures, codec)
    assert [frame.error for frame in VideoReader(path)] == [None] * 12
    toy_videos.cut(path, 7)
    *frames, broken, last = VideoReader(path)
    assert [frame.error for frame in frames] == [None] * 7
    assert broken.picture is None and broken.index == 7
    assert broken.error.startswith(("the frame cannot be decoded", "the frame is damaged"))
    assert last.error == "the file is cut off here, 4 frames before its end"


def test_an_avi_file_that_is_whole_but_for_its_index(tmp_path, pictures):
    """No frame is lost; nor is one where the head promises more than the whole file has."""
    path = toy_videos.write_at_rate(tmp_path / "clip.avi", pictures, "mjpeg")
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"idx1")])
    assert [frame.error for frame in VideoReader(path)] == [None] * 12
    length = data.index(b"strh") + 8 + 32  # of the stream, in frames
    path.write_bytes(data[:length] + (20).to_bytes(4, "little") + data[length + 4 :])
    assert [frame.error for frame in VideoReader(path)] == [None] * 12


@pytest.mark.parametrize("suffix", [".flv", ".mxf"])
def test_flash_and_mxf_files_that_are_cut_off(tmp_path, pictures, suffix):
    codec = {".flv": "flv", ".mxf": "mpeg2video"}[suffix]
    path = toy_videos.write_at_rate(tmp_path / f"clip{suffix}", pictures * 6, codec)
    assert [frame.error for frame in VideoReader(path)] == [None] * 72
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    *frames, last = VideoReader(path)
    assert len([frame for frame in frames if frame.error is None]) > 10
    assert re.fullmatch(r"the file is cut off here, [12]\.\d s before its end", last.error)


def test_stored_pictures_are_to_be_had(tmp_path, ramp):
    path = toy_videos.write(tmp_path / "clip.mp4", [ramp.resize((96, 96))], aspect=Fraction(4, 3))
    assert next(iter(VideoReader(path, upright=False))).picture.size == (96, 96)


@pytest.mark.parametrize("codec", toy_videos.CODECS)
def test_a_damaged_frame_keeps_its_place_and_its_time(tmp_path, pictures, codec):
    path = toy_videos.write(tmp_path / "clip.mp4", pictures, codec, options={"g": "4", "bf": "0"})
    frames = list(VideoReader(toy_videos.damage(path, 5)))
    assert [frame.index for frame in frames] == list(range(12))
    np.testing.assert_allclose([frame.timestamp for frame in frames], np.arange(12) * 0.04, atol=1e-6)
    assert frames[5].picture is None and frames[5].error
    for i in (*range(5), *range(8, 12)):  # up to it, and from the next key frame on
        assert difference(frames[i].picture, pictures[i]) < 6


@pytest.mark.skipif("libx264" not in toy_videos.CODECS, reason="PyAV without libx264")
def test_a_damaged_frame_among_reordered_ones(tmp_path, pictures):
    path = toy_videos.write(
        tmp_path / "clip.mp4", pictures, "libx264", options={"bf": "3", "b_strategy": "0"}
    )
    frames = list(VideoReader(toy_videos.damage(path, 5)))
    assert [frame.timestamp for frame in frames] == sorted(frame.timestamp for frame in frames)
    assert len(frames) == 12 and sum(frame.picture is None for frame in frames) >= 1


def test_files_that_cannot_be_read_at_all(tmp_path, pictures):
    with pytest.raises(FileNotFoundError, match="no video file.*nowhere.mp4"):
        VideoReader(tmp_path / "nowhere.mp4")
    (tmp_path / "text.mp4").write_text("this is not a video")
    (tmp_path / "empty.mp4").touch()
    at_the_end = toy_videos.write(tmp_path / "index_at_the_end.mp4", pictures, faststart=False)
    at_the_end.write_bytes(at_the_end.read_bytes()[: at_the_end.stat().st_size // 2])
    for name in ("text.mp4", "empty.mp4", "index_at_the_end.mp4"):
        with pytest.raises(VideoError, match=f"{name} is not a video that FFmpeg can read, or it is cut off"):
            VideoReader(tmp_path / name)
    head_only = toy_videos.write(tmp_path / "head_only.mkv", pictures)
    head_only.write_bytes(head_only.read_bytes()[: toy_videos.packets(head_only)[0][0]])
    with pytest.raises(VideoError, match="head_only.mkv holds not a single frame"):
        list(VideoReader(head_only))
    with pytest.raises(VideoError, match=r"has no video stream, it holds \['audio'\]"):
        VideoReader(toy_videos.sound(tmp_path / "sound.m4a"))


def test_without_pyav_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"actionunits\[video\]"):
        VideoReader(tmp_path / "clip.mp4")
    with pytest.raises(ImportError, match=r"actionunits\[video\]"), write_video(tmp_path / "clip.mp4"):
        pass


def test_reading_holds_one_frame(tmp_path, pictures):
    import weakref

    alive = weakref.WeakSet()
    for frame in VideoReader(toy_videos.write(tmp_path / "clip.mp4", pictures * 3)):
        alive.add(frame)
        assert len(alive) <= 2  # this one and, while it is made, the one before


# --- pictures as frames -----------------------------------------------------------------------------


def test_pictures_as_frames(pictures, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    frames = list(frames_of([pictures[0], tmp_path / "bad.png", np.asarray(pictures[2])], fps=10))
    assert [frame.timestamp for frame in frames] == [0, 0.1, 0.2]
    assert frames[1].picture is None and "not a picture that Pillow can read" in frames[1].error
    lost, found = frames_of([None, pictures[0]])
    assert lost.picture is None and lost.error == "the frame is lost" and found.picture is not None
    assert frames[2].picture.tobytes() == pictures[2].tobytes()
    assert next(frames_of(pictures)).timestamp is None
    with pytest.raises(TypeError, match="give a path"):
        list(frames_of([3]))


def test_what_is_a_video_by_its_name(tmp_path):
    assert is_video("a/b.mp4") and is_video(tmp_path / "C.MOV")
    for other in ("a.jpg", "https://example.org/a.mp4", "a.gif", b"x.mp4", None, "mp4"):
        assert not is_video(other)


# --- writing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", toy_videos.CODECS)
def test_written_videos_keep_pictures_and_times(tmp_path, pictures, encoder):
    times = [0.0, 0.04, 0.1, 0.1, 1.5]  # two at once: the second is moved to just after
    with write_video(tmp_path / "out.mp4", encoder) as video:
        for picture, time in zip(pictures, times, strict=False):
            video.add(picture.crop((0, 0, 95, 79)), time)  # odd sides become even
    frames = list(VideoReader(tmp_path / "out.mp4"))
    np.testing.assert_allclose([frame.timestamp for frame in frames], [0, 0.04, 0.1, 0.101, 1.5], atol=1e-6)
    data = (tmp_path / "out.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # a browser plays it while it loads
    assert frames[0].picture.size == (94, 78)
    assert difference(frames[4].picture, pictures[4].resize((94, 78))) < 12


def test_a_file_is_written_whole_or_not_at_all(tmp_path, pictures):
    path = tmp_path / "out.mp4"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="disk"), write_video(path) as video:
        video.add(pictures[0], 0.0)
        raise RuntimeError("disk full")
    with pytest.raises(VideoError, match="no frame to write"), write_video(path):
        pass
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with whole_file(path) as part:
        part.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no disk that is always full")
def test_a_full_disk_is_told_as_such(monkeypatch, pictures):
    """It is no fault of the pictures."""
    monkeypatch.setattr("actionunits.video.whole_file", lambda path: contextlib.nullcontext("/dev/full"))
    with pytest.raises(OSError) as caught, write_video("out.mp4") as video:
        video.add(pictures[0], 0.0)
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (7, 1)])
def test_pictures_too_small_for_the_encoder_are_written_larger(tmp_path, size):
    with write_video(tmp_path / "out.mp4") as video:
        video.add(Image.new("RGB", size, "white"), 0.0)
    (frame,) = VideoReader(tmp_path / "out.mp4")
    assert frame.picture.size == tuple(2 * max(side // 2, 1) for side in size)
    assert np.asarray(frame.picture).min() > 240


@pytest.mark.parametrize(("width", "times"), [(20_000, [0]), (32, [0, 0.04, 95_443.7])])
def test_what_ffmpeg_cannot_write_is_told_as_such(tmp_path, width, times):
    with pytest.raises(VideoError, match="cannot write"), write_video(tmp_path / "out.mp4") as video:
        for time in times:  # the last one: where the clock of a transport stream begins anew
            video.add(Image.new("RGB", (width, 32)), time)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["10:30.mp4", "pipe:0.mp4", "http:x.mp4"])
def test_names_that_look_like_protocols_are_files(name, tmp_path, pictures, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with write_video(name) as video:
        for i, picture in enumerate(pictures):
            video.add(picture, i / 25)
    assert [frame.index for frame in VideoReader(name)] == list(range(len(pictures)))
