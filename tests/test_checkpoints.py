"""The weights in the package: what is there is named, loads in float32, is small, and could be published."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from actionunits import checkpoints, cli_common

ROOT = Path(__file__).parents[1]
LARGEST, ALTOGETHER = 16e6, 48e6  # bytes
NAMES = checkpoints.names()


def size(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_the_pipelines_model_comes_first_and_landmarks_are_none_of_them():
    assert NAMES[0] == "default" and NAMES[1:] == sorted(NAMES[1:])
    assert checkpoints.LANDMARKS not in NAMES
    assert checkpoints.path(checkpoints.LANDMARKS).is_dir()


def test_an_unknown_name_is_answered_with_those_that_there_are():
    with pytest.raises(FileNotFoundError, match=r"No weights 'nobody' .*'default'.*'face_landmarks'"):
        checkpoints.path("nobody")


def test_the_package_stays_small():
    assert all(size(folder) <= LARGEST for folder in checkpoints.FOLDER.iterdir() if folder.is_dir())
    assert size(checkpoints.FOLDER) <= ALTOGETHER


@pytest.mark.parametrize("name", NAMES)
def test_every_one_loads_and_computes_in_float32(name):
    model, info = AutoModel.from_pretrained(checkpoints.path(name), output_loading_info=True)
    assert not any(info.values())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert AutoImageProcessor.from_pretrained(checkpoints.path(name)).aus == model.config.places
    run = json.loads((checkpoints.path(name) / "run.json").read_text())
    assert run["model_type"] == model.config.model_type
    assert run["parameters"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_every_one_could_be_published(name, hub_upload, capsys, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", None)
    code = hub_upload.main([str(checkpoints.path(name)), "--repo", "lab/name", "--dry-run"])
    said = "".join(capsys.readouterr())
    assert code == 0, said
    assert "model: ok" in said and "nothing was sent" in said


@pytest.mark.parametrize("name", NAMES)
def test_the_command_knows_it_by_name(name):
    assert cli_common.find_model(name) == str(checkpoints.path(name))


def test_the_command_prefers_a_folder_and_leaves_other_names_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli_common.find_model("lab/default") == "lab/default"
    with pytest.raises(
        ValueError, match="--model defualt is not a folder, .* those of the package are .*gda"
    ):
        cli_common.find_model("defualt")
    (tmp_path / "default").mkdir()
    (tmp_path / "default" / "config.json").write_text("{}")
    assert cli_common.find_model("default") == "default"


def test_without_a_name_no_folder_of_that_name_is_taken(tmp_path, monkeypatch):
    (tmp_path / "default").mkdir()
    monkeypatch.chdir(tmp_path)
    args = argparse.Namespace(model=None, device="cpu", backend="torch", output=None, usage_error=pytest.fail)
    assert cli_common.load_pipeline(args).model.name_or_path == str(checkpoints.path("default"))
