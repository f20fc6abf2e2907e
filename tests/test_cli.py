import csv
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from actionunits import (
    AUImageProcessor,
    FaceDetector,
    GeometryConfig,
    GeometryForAUDetection,
    checkpoints,
    cli,
)
from actionunits.cli_common import stems
from actionunits.pictures import load_picture
from actionunits.pipelines import AUDetectionPipeline

HAS_WEIGHTS = all(
    (checkpoints.FOLDER / name / "config.json").is_file() for name in ("default", "face_landmarks")
)


@pytest.fixture
def detect(monkeypatch, escda_folder, known_landmarker, landmarks, command):
    """Run `actionunits detect` with a tiny model; returns exit code, stdout and stderr."""
    in_the_sample = landmarks + [120, 30]
    detector = FaceDetector(landmarker=known_landmarker(landmarks, in_the_sample))
    monkeypatch.setattr(AUDetectionPipeline, "face_detector", detector)
    return lambda *args: command("detect", "--model", escda_folder, "--device", "cpu", *args)


def test_table(detect, photo_path):
    code, out, err = detect(photo_path)
    assert code == 0 and err == ""
    lines = out.splitlines()
    assert lines[0] == f"{photo_path}: 1 face"
    assert "confidence 0.97" in lines[2]
    assert len(lines) == 3 + 12 + 1
    (row,) = [line for line in lines if "AU12" in line]
    assert "lip corner puller" in row
    score = float(row.split()[-1])
    assert row.count("█") == round(score * 20) and row.count("█") + row.count("·") == 20
    (record,) = json.loads(detect(photo_path, "--json")[1])
    active = [au["active"] for au in record["faces"][0]["action_units"]]
    assert [line.startswith("  ● AU") for line in lines[3:15]] == active


def test_sample_and_output(detect, tmp_path):
    code, out, _ = detect("--sample", "--output", tmp_path / "new" / "out", "--maps", "--json", "--csv")
    assert code == 0
    assert "astronaut.png: 1 face" in out
    assert sorted(p.name for p in (tmp_path / "new" / "out").iterdir()) == [
        "astronaut_au.png", "astronaut_maps_1.png", "results.csv", "results.json"
    ]  # fmt: skip
    assert Image.open(tmp_path / "new" / "out" / "astronaut_au.png").height == 720


def test_json(detect, photo_path):
    code, out, err = detect(photo_path, "--json")
    assert code == 0 and err == ""
    (record,) = json.loads(out)
    assert record["photo"] == str(photo_path)
    (face,) = record["faces"]
    assert set(face) == {"box", "confidence", "landmarks", "landmark_scheme", "action_units"}
    assert len(face["landmarks"]) == 68
    assert face["action_units"][6]["label"] == "AU12"


def test_csv(detect, photo_path, no_face, tmp_path):
    no_face.save(tmp_path / "plain.png")
    code, out, err = detect(photo_path, tmp_path / "plain.png", tmp_path / "gone.png", "--csv")
    assert code == 1
    found, faceless, missing = csv.DictReader(io.StringIO(out))
    assert found["face"] == "1" and found["error"] == ""
    assert 0 < float(found["AU12"]) < 1
    assert found["AU12_active"] == str(int(float(found["AU12"]) >= 0.5))
    assert faceless["error"] == "no face found" and faceless["AU12"] == ""
    assert "gone.png" in missing["error"]


def test_bad_files_are_reported_and_skipped(detect, photo, photo_path, tmp_path):
    (tmp_path / "text.jpg").write_text("not a picture")
    photo.save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:5000])
    code, out, err = detect(
        tmp_path / "text.jpg", tmp_path / "cut.png", photo_path, "--output", tmp_path / "out"
    )
    assert code == 1
    assert "text.jpg: skipped. " in err and "cut.png: skipped. " in err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["astronaut_au.png"]
    assert f"{photo_path}: 1 face" in out


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names of files are Unicode")
def test_names_that_are_not_utf8(detect, photo_path, tmp_path, monkeypatch):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/n\xff.png")
    shutil.copy(photo_path, name)
    strict = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # as the terminal of most
    monkeypatch.setattr(sys, "stdout", strict)
    code, _, _ = detect(name, "--json", "--csv", "--output", tmp_path)
    strict.seek(0)
    assert code == 0 and "n\\udcff.png: 1 face" in strict.read()
    (record,) = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert record["photo"] == name
    assert "n\\udcff.png" in (tmp_path / "results.csv").read_text(encoding="utf-8")


def test_what_cannot_be_written_is_said_and_loses_no_result(detect, photo_path, tmp_path):
    for name in ("astronaut_au.png", "results.json"):
        (tmp_path / "out" / name).mkdir(parents=True)  # where a folder lies no file can be put
    shutil.copy(photo_path, tmp_path / "other.png")
    code, out, err = detect(
        photo_path, tmp_path / "other.png", "--json", "--csv", "--output", tmp_path / "out"
    )
    assert code == 1 and "other.png: 1 face" in out
    assert "astronaut.png: could not be drawn." in err and "results.json could not be written." in err
    first, second = csv.DictReader((tmp_path / "out" / "results.csv").open(encoding="utf-8"))
    assert "astronaut_au.png" in first["error"] and not second["error"]
    scores = [
        {key: value for key, value in row.items() if key not in ("photo", "error")} for row in (first, second)
    ]
    assert scores[0] == scores[1] and first["face"] == "1"  # the same photo under two names
    assert (tmp_path / "out" / "other_au.png").is_file()


def test_what_was_done_before_an_interruption_is_given(detect, photo_path, tmp_path, monkeypatch):
    later = tmp_path / "later.jpg"

    def load(source):
        if source == str(later):
            raise KeyboardInterrupt
        return load_picture(source)

    monkeypatch.setattr(cli, "load_picture", load)
    with pytest.raises(KeyboardInterrupt):
        detect(photo_path, later, photo_path, "--output", tmp_path, "--json", "--csv")
    (record,) = json.loads((tmp_path / "results.json").read_text())
    assert record["photo"] == str(photo_path) and len(record["faces"]) == 1
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 2


def test_ctrl_c_ends_the_command_in_one_line(monkeypatch, capsys):
    def stopped():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "main", stopped)
    assert cli.console() == 130
    assert capsys.readouterr() == ("", "actionunits: stopped\n")


@pytest.mark.parametrize("buffering", [-1, 1])
@pytest.mark.parametrize("command", [["corpus", "list"], ["--help"]])
def test_a_reader_that_goes_ends_the_command_in_silence(monkeypatch, capsys, buffering, command):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", buffering) as pipe:  # closing it would raise what Python says at exit
        monkeypatch.setattr(sys, "stdout", pipe)
        monkeypatch.setattr(sys, "argv", ["actionunits", *command])
        assert cli.console() == 141
    assert capsys.readouterr().err == ""


def test_the_shell_runs_what_ends_quietly():
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert '\nactionunits = "actionunits.cli:console"\n' in project
    assert importlib.import_module("actionunits.__main__").console is cli.console


def test_no_face_is_said(detect, no_face, tmp_path):
    no_face.save(tmp_path / "plain.png")
    code, out, err = detect(tmp_path / "plain.png")
    assert code == 1
    assert out == ""
    assert "plain.png: no face found" in err


def test_photos_of_one_name_do_not_overwrite_each_other(detect, photo_path, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "ännä 1.png").write_bytes(photo_path.read_bytes())
    code, _, err = detect(
        tmp_path / "a" / "ännä 1.png", tmp_path / "b" / "ännä 1.png", "--output", tmp_path / "out"
    )
    assert code == 0 and err == ""  # nor a progress bar, for this is no terminal
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["ännä_1-2_au.png", "ännä_1_au.png"]


def test_a_number_behind_a_name_is_a_name_like_others():
    names = ["a/smile-2.png", "b/smile.png", "c/Smile.jpg", "smile.png", "https://x.org/smile.png?v=2"]
    assert list(stems(names)) == ["smile-2", "smile", "Smile-3", "smile-4", "smile-5"]


def test_names_as_long_as_may_be_leave_room_for_the_endings(detect, tmp_path, photo_path):
    for stem in ("x" * 251, "ä" * 125, "ä" * 124):  # 255 bytes with the suffix are the most
        (tmp_path / f"{stem}.png").write_bytes(photo_path.read_bytes())
    code, _, err = detect(*sorted(tmp_path.glob("*.png")), "--output", tmp_path / "out")
    assert code == 0, err
    names = {"x" * 200 + "_au.png", "ä" * 100 + "_au.png", "ä" * 100 + "-2_au.png"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names


def test_a_photo_is_not_overwritten_by_the_drawing_of_another(detect, tmp_path, photo_path):
    for name in ("a.png", "a_au.png"):
        (tmp_path / name).write_bytes(photo_path.read_bytes())
    code, _, err = detect(tmp_path / "a.png", tmp_path / "a_au.png", "--output", tmp_path)
    assert code == 2 and f"{tmp_path / 'a_au.png'} would be overwritten" in err
    assert (tmp_path / "a_au.png").read_bytes() == photo_path.read_bytes()
    assert detect(tmp_path / "a_au.png", "--output", tmp_path)[0] == 0
    assert sorted(path.name for path in tmp_path.glob("a*")) == ["a.png", "a_au.png", "a_au_au.png"]
    (tmp_path / "a_maps_12.png").write_bytes(photo_path.read_bytes())
    both = (tmp_path / "a.png", tmp_path / "a_maps_12.png", "--output", tmp_path)
    code, _, err = detect(*both, "--maps")  # of a twelfth face, perhaps
    assert code == 2 and "a_maps_12.png would be overwritten" in err
    assert detect(*both)[0] == 0


def test_threshold(detect, photo_path):
    for threshold, active in (("0", True), ("1", False)):
        (record,) = json.loads(detect(photo_path, "--json", "--threshold", threshold)[1])
        assert {au["active"] for au in record["faces"][0]["action_units"]} == {active}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "give photos"),
        (["x.png", "--sample"], "give photos"),
        (["x.png", "--maps"], "--output"),
        (["x.png", "--json", "--csv"], "--output"),
        (["x.png", "--threshold", "7"], "0..1"),
        (["x.png", "--threshold", "high"], "high is not a number in 0..1"),
        (["--sample", "--model", "no/such/folder/here"], "no/such/folder/here is not a folder"),
        (["--sample", "--model", "/nowhere"], "/nowhere is not a folder, and no name on the Hub"),
        (["--sample", "--model", __file__], "is not a folder"),
        (["--sample", "--model", str(Path(__file__).parent)], "no config.json"),
        (["--sample", "--model", ""], "--model  holds no model"),
        (["--sample", "--device", "meta"], "--device meta cannot be used"),
        (["--sample", "--device", "tpu"], "--device tpu cannot be used, here is cpu"),
        (["--sample", "--device", "cuda:99"], "--device cuda:99 cannot be used"),
    ],
)
def test_wrong_usage(detect, args, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, out, err = detect(*args)
    assert code == 2 and out == ""
    assert "usage: actionunits detect" in err and message in err


def test_maps_of_a_model_without_any_are_refused_before_a_photo_is_read(
    command, photo_path, tmp_path, monkeypatch
):
    monkeypatch.setattr(cli, "load_picture", lambda source: pytest.fail(f"{source} was read"))
    model = GeometryForAUDetection(GeometryConfig())
    model.save_pretrained(tmp_path / "model")
    AUImageProcessor(**model.config.processor_options).save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    options = ["--model", tmp_path / "model", "--device", "cpu", "--output", out, "--maps"]
    code, stdout, err = command("detect", photo_path, *options)
    assert code == 2 and stdout == "" and list(out.iterdir()) == []
    assert "GeometryForAUDetection has no attention maps; leave out --maps" in err


def test_cut_weights_are_told_without_a_traceback(command, escda_folder, photo_path, tmp_path):
    folder = Path(shutil.copytree(escda_folder, tmp_path / "cut"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    code, _, err = command("detect", photo_path, "--model", folder)
    assert code == 2 and f"the weights in {folder} are broken" in err
    code, _, err = command("export", folder, "--onnx")
    assert code == 1 and err.startswith(f"The weights in {folder} are broken")


def test_consoles_without_block_characters(detect, photo_path, monkeypatch):
    class Console(io.StringIO):
        encoding = "cp1250"

    monkeypatch.setattr(sys, "stdout", Console())
    detect(photo_path)
    assert sys.stdout.getvalue().isascii()


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    assert cli._give("old", tmp_path, "a.txt")
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    assert not cli._give("new", tmp_path, "a.txt")
    assert capsys.readouterr().err == "a.txt could not be written. disk full\n"
    assert (tmp_path / "a.txt").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.slow
@pytest.mark.skipif(not HAS_WEIGHTS, reason="the default weights are not in this checkout")
def test_the_sample_runs_offline_and_in_silence(tmp_path):
    command = [sys.executable, "-m", "actionunits.cli", "detect", "--sample", "--output", str(tmp_path)]
    environment = {"HF_HUB_OFFLINE": "1", "PATH": "", "HTTPS_PROXY": "http://127.0.0.1:9"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, encoding="utf-8")
    assert (done.returncode, done.stderr) == (0, "")
    assert "lip corner puller" in done.stdout
    assert (tmp_path / "astronaut_au.png").is_file()
