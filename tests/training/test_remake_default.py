"""The one command that remakes the weights of the package: every step is called as its script understands."""

import sys

import pytest
from tiny_run import ROOT, load_script


@pytest.fixture(scope="module")
def remake():
    return load_script("remake_default")


def test_every_step_is_a_script_that_knows_its_options(remake, tmp_path, monkeypatch):
    steps = remake.steps(tmp_path / "head", tmp_path / "photos", tmp_path / "out", ["epochs=1"])
    assert list(steps) == ["synthesize", "train_landmarks", "train", "check_real_photos"]
    for name, options in steps.items():
        source = (ROOT / "training" / f"{name}.py").read_text()
        assert all(f'"{word}"' in source for word in options if str(word).startswith("--"))
    assert remake.RECIPE.is_file()


def test_finished_steps_are_skipped_and_a_failure_stops(remake, tmp_path, monkeypatch, capsys):
    ran = []

    def fake_run(command, check):
        ran.append(command[1].rsplit("/", 1)[-1])
        if ran[-1] == "train.py":
            raise RuntimeError("stopped")

    monkeypatch.setattr(remake.subprocess, "run", fake_run)
    monkeypatch.setattr(sys, "argv", ["remake", "--head", "H", "--photos", "P", "--output", str(tmp_path)])
    (tmp_path / "synthesize.done").touch()
    with pytest.raises(RuntimeError, match="stopped"):
        remake.main()
    assert ran == ["train_landmarks.py", "train.py"]
    assert (tmp_path / "train_landmarks.done").is_file() and not (tmp_path / "train.done").exists()
    assert capsys.readouterr().out.startswith("# done:")
