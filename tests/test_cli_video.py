import csv
import io
import sys

import numpy as np
import pytest
from PIL import Image

from actionunits import FaceDetector
from actionunits.pipelines import AUDetectionPipeline
from actionunits.video import VideoReader

toy_videos = pytest.importorskip("toy_videos", reason="PyAV is not installed")
BP4D = [1, 2, 4, 6, 7, 10, 12, 14, 15, 17, 23, 24]


@pytest.fixture
def video(monkeypatch, escda_folder, known_landmarker, landmarks, command, tmp_path):
    """Run `actionunits video` with a tiny model in a new folder; returns exit code, stdout and stderr."""
    detector = FaceDetector(landmarker=known_landmarker(landmarks))
    monkeypatch.setattr(AUDetectionPipeline, "face_detector", detector)
    monkeypatch.chdir(tmp_path)
    return lambda *args: command("video", "--model", escda_folder, "--device", "cpu", *args)


@pytest.fixture
def clip(photo, no_face, tmp_path):
    """Five frames, the third without a face, at odd times."""
    nobody = no_face.resize(photo.size)
    pictures = [photo, photo, nobody, photo, photo]
    return toy_videos.write(tmp_path / "clip.mp4", pictures, times_ms=[0, 40, 100, 140, 900])


def rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_csv_with_the_columns_of_openface(video, clip, tmp_path):
    code, out, err = video(clip, "--csv")
    assert code == 0 and err == ""
    table = rows(tmp_path / "clip_au.csv")
    names = [f"AU{number:02d}_{kind}" for number in BP4D for kind in "cp"]
    assert list(table[0]) == ["frame", "timestamp", "face_id", "confidence", "success", *names]
    assert [row["frame"] for row in table] == ["1", "2", "3", "4", "5"]
    np.testing.assert_allclose(
        [float(row["timestamp"]) for row in table], [0, 0.04, 0.1, 0.14, 0.9], atol=1e-6
    )
    assert [row["success"] for row in table] == ["1", "1", "0", "1", "1"]
    assert [row["face_id"] for row in table] == ["0", "0", "", "0", "0"]
    assert table[2]["AU12_p"] == table[2]["AU12_c"] == ""
    for number in BP4D:
        assert table[0][f"AU{number:02d}_c"] == str(int(float(table[0][f"AU{number:02d}_p"]) >= 0.5))
    assert "5 frames, 0.9 s, 1 face\n" in out and "face 0   in 80 % of the frames" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.mp4", "clip_au.csv"]


def test_a_video_is_not_overwritten_by_the_overlay_of_another(video, clip, tmp_path):
    (tmp_path / "clip_au.mp4").write_bytes(clip.read_bytes())
    code, _, err = video(clip, tmp_path / "clip_au.mp4", "--overlay")
    assert code == 2 and "clip_au.mp4 would be overwritten" in err
    assert (tmp_path / "clip_au.mp4").read_bytes() == clip.read_bytes()


def test_numbers_are_those_of_pictures(video, clip, tmp_path, escda_folder):
    from transformers import pipeline

    video(clip, "--csv", "--threshold", "0.3")
    detect = pipeline("au-detection", model=str(escda_folder), device="cpu")
    for row, frame in zip(rows(tmp_path / "clip_au.csv"), VideoReader(clip), strict=True):
        for face in detect(frame.picture):
            for au in face["action_units"]:
                name = f"AU{int(au['label'][2:]):02d}"
                assert float(row[f"{name}_p"]) == round(au["score"], 6)
                assert row[f"{name}_c"] == str(int(au["score"] >= 0.3))


def test_tidy_form(video, clip, tmp_path):
    assert video(clip, "--csv", "--form", "tidy", "--output", tmp_path / "new" / "out")[0] == 0
    table = rows(tmp_path / "new" / "out" / "clip_au.csv")
    assert list(table[0]) == [
        "frame", "timestamp", "face_id", "confidence", "xmin", "ymin", "xmax", "ymax",
        "au", "score", "active", "threshold", "error",
    ]  # fmt: skip
    assert len(table) == 5 * 12
    assert [row["frame"] for row in table[::12]] == ["0", "1", "2", "3", "4"]
    assert {row["score"] for row in table if row["frame"] == "2"} == {""}


def test_everything_at_once(video, clip, tmp_path):
    pytest.importorskip("pyarrow")
    code, _, err = video(clip, "--csv", "--parquet", "--overlay", "--timeline", "--output", "out")
    assert code == 0 and err == ""
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["clip_au.csv", "clip_au.mp4", "clip_au.parquet", "clip_timeline.png"]
    frames = list(VideoReader(tmp_path / "out" / "clip_au.mp4"))
    np.testing.assert_allclose([frame.timestamp for frame in frames], [0, 0.04, 0.1, 0.14, 0.9], atol=1e-3)
    assert {frame.picture.size for frame in frames} == {frames[0].picture.size}
    with_face, without = (np.asarray(frames[i].picture, dtype=int) for i in (0, 2))
    panel = np.s_[:, 480:]  # beside the frame, which is 480 pixels high and as wide
    assert (with_face[panel] < 128).mean() > 4 * (without[panel] < 128).mean() > 0  # bars; "No face found"
    assert Image.open(tmp_path / "out" / "clip_timeline.png").width == 1400


def test_broken_videos_are_reported_and_cost_only_themselves(video, clip, photo, tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    cut = toy_videos.cut(toy_videos.write(tmp_path / "cut.mp4", [photo] * 9), 6)
    code, out, err = video("nowhere.mp4", "text.mp4", cut, clip, "--csv")
    assert code == 1
    assert "nowhere.mp4: skipped. There is no video file" in err
    assert "text.mp4: skipped. text.mp4 is not a video" in err
    assert f"{cut}: frame 6 at 0.24 s: the frame" in err
    assert f"{cut}: frame 7 at 0.28 s: the file is cut off here, 2 frames before its end" in err
    assert [row["success"] for row in rows(tmp_path / "cut_au.csv")] == ["1"] * 6 + ["0"] * 2
    assert len(rows(tmp_path / "clip_au.csv")) == 5
    assert not list(tmp_path.glob("*.part")) and not list(tmp_path.glob("text_au*"))


def test_a_file_that_cannot_be_written_costs_only_itself(video, clip, tmp_path):
    """Files may have a few kilobytes, as on a disk that fills up: enough for the tables alone."""
    resource = pytest.importorskip("resource", reason="there is no such limit")
    pytest.importorskip("pyarrow")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, limits[1]))
    try:
        code, out, err = video(clip, "--csv", "--parquet", "--overlay", "--timeline", "--output", "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 1 and "5 frames" in out
    for name in ("clip_au.mp4", "clip_timeline.png"):
        assert f"out/{name} could not be written: File too large; make room, or name another" in err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["clip_au.csv", "clip_au.parquet"]
    assert len(rows(tmp_path / "out/clip_au.csv")) == 5


def test_a_name_that_is_taken_costs_only_its_file(video, clip, tmp_path):
    (tmp_path / "clip_au.csv").mkdir()
    (tmp_path / ".clip_au.mp4.part").mkdir()
    code, _, err = video(clip, "--csv", "--overlay", "--timeline")
    assert code == 1
    assert "clip_au.csv could not be written: Is a directory" in err and "clip_au.mp4 could not be" in err
    assert (tmp_path / "clip_timeline.png").is_file()


def test_a_video_that_ffmpeg_cannot_write_costs_only_that_file(video, photo, tmp_path, monkeypatch):
    day = 95_443.7  # and two hours: where the clock of a transport stream begins anew

    def answers(detect, video, **kwargs):
        for i, time in enumerate([0.0, 0.04, day if video == "gap.ts" else 0.08]):
            yield {"frame": i, "timestamp": time, "faces": [], "image": photo}

    monkeypatch.setattr("actionunits.pipelines.au_detection.answer_video", answers)
    code, out, err = video("gap.ts", "clip.ts", "--csv", "--overlay")
    assert code == 1 and "gap_au.mp4 could not be written: " in err
    assert "gap.ts: 3 frames" in out and "clip.ts: 3 frames" in out
    assert {path.name for path in tmp_path.iterdir()} == {"gap_au.csv", "clip_au.csv", "clip_au.mp4"}
    assert len(rows(tmp_path / "gap_au.csv")) == 3


def test_an_output_that_is_no_folder_is_named(video, clip, tmp_path):
    (tmp_path / "file").touch()
    code, _, err = video(clip, "--output", "file")
    assert code == 2 and "--output file cannot be made: File exists; name a folder" in err


def test_no_face_is_said_and_the_table_written(video, no_face, tmp_path):
    plain = toy_videos.write(tmp_path / "plain.mp4", [no_face] * 3)
    code, out, err = video(plain, "--csv", "--timeline")
    assert code == 1 and "plain.mp4: no face found" in err
    assert [row["success"] for row in rows(tmp_path / "plain_au.csv")] == ["0"] * 3
    assert (tmp_path / "plain_timeline.png").is_file()


def test_a_video_of_which_no_frame_can_be_read_has_a_table_but_no_overlay(video, monkeypatch, tmp_path):
    def answers(*args, **kwargs):
        yield {"frame": 0, "timestamp": 0.0, "faces": [], "image": None, "error": "the frame is damaged"}

    monkeypatch.setattr("actionunits.pipelines.au_detection.answer_video", answers)
    code, _, err = video("dark.mp4", "--csv", "--overlay")
    assert code == 1 and "frame 0 at 0.00 s: the frame is damaged" in err
    assert [path.name for path in tmp_path.iterdir()] == ["dark_au.csv"]
    assert [row["success"] for row in rows(tmp_path / "dark_au.csv")] == ["0"]


def test_an_interruption_leaves_nothing_behind(video, clip, tmp_path, monkeypatch):
    from actionunits.timeline import Timeline

    def stop(self, answer):
        if answer["frame"] == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Timeline, "add", stop)
    with pytest.raises(KeyboardInterrupt):
        video(clip, "--csv", "--parquet", "--overlay")
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]


def test_a_reader_that_goes_is_no_fault_of_the_video(video, clip, monkeypatch):
    class Pipe(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Pipe())
    with pytest.raises(BrokenPipeError):
        video(clip)


def test_a_folder_and_a_single_frame_are_named_as_such(video, photo, tmp_path):
    toy_videos.write(tmp_path / "one.mp4", [photo])
    (tmp_path / "clips").mkdir()
    code, out, err = video("clips", "one.mp4")
    assert code == 1 and "one.mp4: 1 frame, " in out
    assert err == "clips: skipped. clips is a folder, not a video; name the files in it.\n"


def test_without_pyav_the_extra_is_named(video, clip, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    code, _, err = video(clip, "--csv")
    assert code == 2 and "actionunits[video]" in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "VIDEO"),
        (["x.mp4", "--detect-every", "0"], "from 1 on"),
        (["x.mp4", "--batch-size", "many"], "--batch-size: many is not a whole number from 1 on"),
        (["x.mp4", "--form", "wide"], "wide"),
        (["x.mp4", "--threshold", "7"], "0..1"),
    ],
)
def test_wrong_usage(video, args, message):
    code, out, err = video(*args)
    assert code == 2 and out == ""
    assert "usage: actionunits video" in err and message in err
