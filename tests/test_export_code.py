"""Self-contained folders: every method, loaded by a fresh interpreter in which this package is hidden."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from transformers import AutoModel, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from actionunits import AUImageProcessor, export_checkpoints
from actionunits.cli import main
from actionunits.export_code import ENTRY, export_code, flatten
from actionunits.pictures import sample_photo
from every_method import registered_types, tiny_models

STRANGER = """
import json, sys


class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "actionunits":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Hidden())
from transformers import AutoModel, AutoModelForImageClassification, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor

photo, *folders = sys.argv[1:]
answers = {}
for folder in folders:
    model, info = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()), info
    AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    found = processor(photo, boxes=[170, 75, 285, 195], return_tensors="pt")
    detect = pipeline("au-detection", model=folder, trust_remote_code=True)
    (face,) = detect(photo)
    assert "actionunits" not in sys.modules
    model.save_pretrained(folder + "-again"), detect.image_processor.save_pretrained(folder + "-again")
    answers[folder] = {"face": face, "pixels": float(found["pixel_values"].mean())}
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A self-contained folder of a tiny model of every method, by model type."""
    made = {}
    for model_type, make_model in tiny_models().items():
        folder = tmp_path_factory.mktemp(model_type)
        model = make_model()
        model.save_pretrained(folder)
        AUImageProcessor(**model.config.processor_options).save_pretrained(folder)
        export_code(folder)
        made[model_type] = str(folder)
    return made


def run_stranger(cache, *folders):
    command = [sys.executable, "-c", STRANGER, str(sample_photo()), *folders]
    environment = {**os.environ, "HF_MODULES_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_every_registered_method_has_a_tiny_model():
    assert sorted(tiny_models()) == registered_types()


@pytest.mark.slow
def test_every_method_works_without_the_package(folders, tmp_path):
    answers = run_stranger(tmp_path, *folders.values())
    for folder in folders.values():
        (expected,) = pipeline("au-detection", model=folder)(sample_photo())
        got = answers[folder]["face"]
        assert [unit["label"] for unit in got["action_units"]] == [
            unit["label"] for unit in expected["action_units"]
        ]
        scores = [[unit["score"] for unit in face["action_units"]] for face in (got, expected)]
        np.testing.assert_allclose(*scores, atol=1e-5)
        np.testing.assert_allclose(got["landmarks"], expected["landmarks"], atol=1e-3)


@pytest.mark.slow
def test_what_a_stranger_saves_is_a_folder_with_code_again(folders, tmp_path):
    run_stranger(tmp_path, folders["au-gda"])
    again = folders["au-gda"] + "-again"
    config = json.loads(Path(again, "config.json").read_text())
    assert config["custom_pipelines"]["au-detection"]["impl"] == f"{ENTRY}.AUDetectionPipeline"
    for reference in config["auto_map"].values():
        assert os.path.isfile(f"{again}/{reference.partition('.')[0]}.py"), reference


def test_with_the_package_its_own_code_serves_and_nobody_is_asked(folders):
    detect = pipeline("au-detection", model=folders["au-gda"])
    assert type(detect.model).__module__ == "actionunits.models.escda.modeling_escda"
    assert type(detect.image_processor) is AUImageProcessor


def test_what_the_package_saves_names_no_code_that_is_not_there(folders, tmp_path):
    AutoModel.from_pretrained(folders["au-gda"]).save_pretrained(tmp_path)
    AutoImageProcessor.from_pretrained(folders["au-gda"]).save_pretrained(tmp_path)
    for name in ("config.json", "preprocessor_config.json"):
        saved = json.loads((tmp_path / name).read_text())
        assert not {"auto_map", "custom_pipelines"} & set(saved), name


def test_files_are_flat_and_self_sufficient(folders):
    names = {name for name in os.listdir(folders["au-escda"]) if name.endswith(".py")}
    assert {f"{ENTRY}.py", "modeling_escda.py", "configuration_escda.py", "au_detection.py"} <= names
    for name in names:
        for line in Path(folders["au-escda"], name).read_text(encoding="utf-8").splitlines():
            statement = line.lstrip()
            assert not statement.startswith(("from actionunits", "import actionunits")), (name, line)
            if statement.startswith("from .") and not statement.startswith("from . "):
                assert f"{statement.split()[1].removeprefix('.')}.py" in names, (name, line)


def test_exporting_twice_changes_nothing(folders):
    before = {
        name: os.stat(os.path.join(folders["au-lsc"], name)).st_size for name in os.listdir(folders["au-lsc"])
    }
    export_code(folders["au-lsc"])
    after = {
        name: os.stat(os.path.join(folders["au-lsc"], name)).st_size for name in os.listdir(folders["au-lsc"])
    }
    assert after == before


def test_two_modules_of_one_name_keep_apart():
    assert set(flatten(["actionunits.pipelines.video"])) >= {"video.py", "pipelines_video.py"}


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        export_code(tmp_path)
    for name, content in {"config.json": {"model_type": "vit"}, "preprocessor_config.json": {}}.items():
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="'vit' is none of this package's.*'au-escda'"):
        export_code(tmp_path)
    for content, reason in (('{"model_type":', "is no JSON"), ("[]", "holds no JSON object")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=rf"config\.json {reason}"):
            export_code(tmp_path)


def test_landmarks_are_looked_for_beside_the_model(folders, tmp_path):
    export_checkpoints.look_in(folders["au-gda"])
    assert (export_checkpoints.path("face_landmarks") / "model.safetensors").is_file()
    export_checkpoints.look_in(tmp_path)
    with pytest.raises(FileNotFoundError, match="has no folder face_landmarks; copy it"):
        export_checkpoints.path("face_landmarks")
    assert ModelCard.load(os.path.join(folders["au-gda"], "face_landmarks", "README.md")).data.license


def test_command(model_folder, tmp_path, capsys):
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((model_folder / name).read_bytes())
    assert main(["export", str(tmp_path), "--code"]) == 0
    assert (tmp_path / f"{ENTRY}.py").is_file() and "files into" in capsys.readouterr().out
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    assert main(["export", str(tmp_path), "--code"]) == 1
    assert "none of this package's" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["export", str(tmp_path)])
