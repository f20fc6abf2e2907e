"""Parameters are stored as float16 and computed with as float32, by whatever way a folder is loaded."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, pipeline

from actionunits import AUImageProcessor
from actionunits.half_precision import round_parameters, save_in_half
from actionunits.onnx_model import OnnxAUModel, export_onnx, largest_difference
from tiny_models import TINY_MODELS

TOLERANCE = 2e-3  # of probabilities


@pytest.fixture(scope="module", params=list(TINY_MODELS))
def saved(request, tmp_path_factory):
    """A model with statistics of its own, what it was before it was rounded, and its folder."""
    torch.manual_seed(0)
    model = TINY_MODELS[request.param]().eval()
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2.0)
        elif buffer.is_floating_point():
            buffer.uniform_(-1, 1)
    before = copy.deepcopy(model)
    folder = tmp_path_factory.mktemp(f"half-{request.param}")
    save_in_half(model, folder)
    AUImageProcessor(**model.config.processor_options).save_pretrained(folder)
    return model, before, folder


def probabilities(model):
    size = model.config.processor_options["size"]["height"]
    random = torch.Generator().manual_seed(1)
    inputs = {
        "pixel_values": torch.randn(2, 3, size, size, generator=random),
        "au_centers": torch.rand(2, model.config.num_labels, 2, 2, generator=random) * size,
    }
    with torch.no_grad():
        return torch.sigmoid(model(**inputs).logits)


def test_parameters_take_half_the_space_and_statistics_stay(saved):
    model, before, folder = saved
    stored = load_file(folder / "model.safetensors")
    parameters = dict(before.named_parameters())
    assert {stored[name].dtype for name in parameters} == {torch.float16}
    buffers = {name: value for name, value in before.state_dict().items() if name not in parameters}
    assert all(torch.equal(stored[name], value) for name, value in buffers.items())


def test_loading_gives_float32_and_the_same_bits(saved):
    model, _, folder = saved
    loaded, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert torch.equal(probabilities(loaded.eval()), probabilities(model))


def test_rounding_changes_the_answers_by_less_than_anyone_sees(saved):
    model, before, _ = saved
    change = (probabilities(model) - probabilities(before)).abs().max()
    assert 0 < change < TOLERANCE


def test_the_pipeline_computes_in_float32(saved, photo, landmarks):
    _, _, folder = saved
    detect = pipeline("au-detection", model=str(folder))
    assert detect.dtype == torch.float32
    assert len(detect({"image": photo, "landmarks": landmarks})[0]["action_units"]) == 12


def test_heads_are_chosen_by_name(saved):
    model, _, folder = saved
    fewer = AutoModel.from_pretrained(folder, aus=[25, 12]) if 25 in model.config.aus else None
    fewer = fewer or AutoModel.from_pretrained(folder, aus=[24, 12])
    assert {p.dtype for p in fewer.parameters()} == {torch.float32}
    kept = {name: p for name, p in fewer.state_dict().items() if "AU12" in name}
    assert kept and all(torch.equal(p, model.state_dict()[name]) for name, p in kept.items())


def test_the_onnx_file_answers_as_the_stored_weights_do(tmp_path):
    model = TINY_MODELS["gda"]().eval()
    save_in_half(model, tmp_path)
    exported = OnnxAUModel(export_onnx(tmp_path), model.config)
    assert largest_difference(exported, model) < 1e-4


def test_saving_again_is_an_ordinary_save(saved, tmp_path):
    _, _, folder = saved
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert torch.float16 not in {value.dtype for value in stored.values()}


def test_numbers_beyond_float16_are_refused():
    model = torch.nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.fill_(0.1)
        model.bias.fill_(-7e4)
    with pytest.raises(ValueError, match=r"bias reaches 7e\+04, but float16 ends at 65504"):
        round_parameters(model)
    assert (model.weight == torch.tensor(0.1)).all(), "rounded, though it is to be saved as float32"
