"""ONNX: every method answers as PyTorch does, for any batch; the pipeline and the command run the file."""

import copy
import pickle
import sys

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, ViTConfig, ViTModel, pipeline

from actionunits import AUImageProcessor
from actionunits.cli import main
from actionunits.onnx_model import OnnxAUModel, example_inputs, export_onnx, largest_difference
from every_method import tiny_models

MODELS = tiny_models()
QUICK = "au-gda"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved tiny GDA with its export."""
    return exported(QUICK, tmp_path_factory.mktemp(QUICK))


def exported(model_type, folder, **values):
    model = MODELS[model_type](**values)
    model.save_pretrained(folder)
    AUImageProcessor(**model.config.processor_options).save_pretrained(folder)
    assert export_onnx(folder) == folder / "model.onnx"
    return folder


@pytest.mark.parametrize(
    "model_type", [pytest.param(t, marks=() if t == QUICK else pytest.mark.slow) for t in MODELS]
)
def test_answers_as_pytorch_does_for_any_batch(model_type, folder, tmp_path):
    if model_type != QUICK:
        folder = exported(model_type, tmp_path, aus=[4, 25])  # a branch for each takes long to translate
    model = AutoModel.from_pretrained(folder).eval()
    onnx_model = OnnxAUModel.from_pretrained(folder, threads=1)
    for batch_size in (1, 2, 5):
        inputs = example_inputs(model, batch_size)
        assert set(onnx_model.input_names) == set(inputs)
        with torch.no_grad():
            expected = model(**inputs).logits
        logits = onnx_model(**inputs).logits
        assert expected.std() > 1e-4, "the model answers the same to everything"
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    nobody = {name: value[:0] for name, value in inputs.items()}
    assert onnx_model(**nobody).logits.shape == (0, expected.shape[1])


def test_copies_and_other_processes_open_the_file_anew(folder, tmp_path, monkeypatch):
    model = OnnxAUModel.from_pretrained(folder, threads=1)
    inputs = example_inputs(AutoModel.from_pretrained(folder), 2)
    detect = pipeline("au-detection", model=model)
    monkeypatch.chdir(tmp_path)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(detect)).model):
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)
        assert again.name_or_path == model.name_or_path


def test_file_is_whole_and_names_its_sizes(folder):
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    onnx.checker.check_model(graph)
    (pictures,) = graph.graph.input
    sides = [dim.dim_param or dim.dim_value for dim in pictures.type.tensor_type.shape.dim]
    assert sides[0] == "batch" and sides[1] == 3 and sides[2] == sides[3]
    assert [path.name for path in folder.glob("*.onnx*")] == ["model.onnx"], "weights lie outside"


def test_pipeline_takes_it_for_a_model(folder, photo, landmarks):
    known = {"image": photo, "landmarks": landmarks}
    (expected,) = pipeline("au-detection", model=str(folder))(known)
    (face,) = pipeline("au-detection", model=OnnxAUModel.from_pretrained(folder))(known)
    assert [unit["label"] for unit in face["action_units"]] == ["AU1", "AU4", "AU12", "AU25"]
    for unit, other in zip(face["action_units"], expected["action_units"], strict=True):
        assert unit["score"] == pytest.approx(other["score"], abs=1e-5)
    with pytest.raises(ValueError, match="OnnxAUModel has no attention maps"):
        pipeline("au-detection", model=OnnxAUModel.from_pretrained(folder))(known, return_maps=True)


def test_command_exports_and_runs_it(folder, photo_path, tmp_path, capsys):
    assert main(["detect", str(photo_path), "--model", str(folder), "--backend", "onnx", "--csv"]) == 0
    with_onnx = capsys.readouterr().out
    assert main(["detect", str(photo_path), "--model", str(folder), "--csv"]) == 0
    row, other = (text.splitlines()[1].split(",")[7:11] for text in (with_onnx, capsys.readouterr().out))
    np.testing.assert_allclose([float(x) for x in row], [float(x) for x in other], atol=2e-6)
    (folder / "model.onnx").rename(tmp_path / "kept.onnx")
    with pytest.raises(SystemExit):
        main(["detect", str(photo_path), "--model", str(folder), "--backend", "onnx"])
    assert "has no model.onnx; write it with `actionunits export" in capsys.readouterr().err
    assert main(["export", str(folder), "--onnx"]) == 0
    assert "model.onnx" in capsys.readouterr().out


def test_a_file_of_other_weights_is_found_out(folder):
    model = AutoModel.from_pretrained(folder).eval()
    onnx_model = OnnxAUModel.from_pretrained(folder)
    assert largest_difference(onnx_model, model) < 1e-4
    with torch.no_grad():
        model.classifier["AU12"].bias += 0.01
    assert largest_difference(onnx_model, model) == pytest.approx(0.01, abs=1e-4)


def test_an_export_that_is_wrong_leaves_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("actionunits.onnx_model.TOLERANCE", -1.0)
    with pytest.raises(RuntimeError, match="differ from PyTorch's by .*nothing was written"):
        export_onnx(folder, tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_whole_are_not_exported(tmp_path, capsys):
    """Exported they would agree with PyTorch, which fills up what is missing at random."""
    MODELS[QUICK]().save_pretrained(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    tensors = load_file(weights)
    del tensors["classifier.AU12.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    assert main(["export", str(tmp_path / "model"), "--onnx"]) == 1
    assert "model lack ['classifier.AU12.weight']." in capsys.readouterr().err
    weights.write_bytes(weights.read_bytes()[:3000])
    assert main(["export", str(tmp_path / "model"), "--onnx"]) == 1
    assert "model are broken: " in capsys.readouterr().err
    assert not (tmp_path / "model" / "model.onnx").exists()


def test_a_model_of_something_else_is_not_exported(tmp_path, capsys):
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "image_size": 16}
    ViTModel(ViTConfig(hidden_size=8, **sizes)).save_pretrained(tmp_path)
    assert main(["export", str(tmp_path), "--onnx"]) == 1
    assert "holds a ViTModel, which detects no action units." in capsys.readouterr().err


def test_a_model_that_needs_centres_says_so(folder):
    onnx_model = OnnxAUModel.from_pretrained(folder)
    onnx_model.input_names = ["pixel_values", "au_centers"]
    with pytest.raises(ValueError, match="pass the processor's au_centers"):
        onnx_model(torch.zeros(1, 3, 8, 8))


def test_without_onnx_the_extra_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for use in (export_onnx, OnnxAUModel.from_pretrained):
        with pytest.raises(ImportError, match=r'pip install "actionunits\[onnx\]"'):
            use(folder)
