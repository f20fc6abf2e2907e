"""The converter on files written as facenet-pytorch writes them, against a plain InceptionResnetV1."""

import pytest
import torch
from torch import nn
from transformers import AutoModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from actionunits.models.gtlenet import GlobalExpressionEncoderConfig
from actionunits.models.gtlenet.convert_facenet_to_hf import convert, facenet_name, main, read_weights
from references.gtlenet import PlainInception

SMALL = {"width_multiplier": 0.125, "depths": [1, 2, 1]}


def make_reference(**sizes):
    """A reference network with random weights, statistics included, and facenet's last layers."""
    torch.manual_seed(0)
    reference = PlainInception(**sizes).eval()
    width = reference.block8.conv2d.out_channels
    with torch.no_grad():
        for name, tensor in reference.state_dict().items():
            if name.endswith(("bn.weight", "bn.bias", "running_mean")):
                tensor += 0.1 * torch.randn(tensor.shape)
            elif name.endswith("running_var"):
                tensor += 0.1 * torch.rand(tensor.shape)
    last = nn.ModuleDict(
        {
            "last_linear": nn.Linear(width, 512, bias=False),
            "last_bn": nn.BatchNorm1d(512),
            "logits": nn.Linear(512, 10),
        }
    )
    return reference, {**reference.state_dict(), **last.state_dict()}


@pytest.fixture
def small():
    return make_reference(width=0.125, depths=(1, 2, 1))


def assert_equal(model, reference, size):
    pictures = torch.randn(2, 3, size, size)
    with torch.no_grad():
        last = model(pictures, output_hidden_states=True).hidden_states[-1]
        expected = reference(pictures)
    assert expected.std() > 1e-3
    torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-5)


def test_a_file_of_the_published_size_becomes_a_model_folder(tmp_path):
    reference, weights = make_reference(p=1)
    torch.save(weights, tmp_path / "weights.pt")
    arguments = [
        "--weights",
        tmp_path / "weights.pt",
        "--pretraining",
        "imagenet",
        "--output",
        tmp_path / "f",
    ]
    main([str(argument) for argument in arguments])
    model, info = AutoModel.from_pretrained(tmp_path / "f", output_loading_info=True)
    assert not any(info.values())
    assert model.config.pretraining == "imagenet"
    assert_equal(model, reference, 64)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "f")
    assert (processor.size["height"], processor.au_definition) == (256, "none")


@pytest.mark.parametrize("padding", ["valid", "same"])
def test_maps_are_those_of_the_published_network(small, padding):
    reference, weights = small
    if padding == "same":
        reference, _ = make_reference(width=0.125, depths=(1, 2, 1), p=1)
    model = convert(weights, GlobalExpressionEncoderConfig(**SMALL, padding=padding))
    assert_equal(model, reference, 96)


def test_names_are_those_of_facenet_pytorch():
    config = GlobalExpressionEncoderConfig()
    for ours, theirs in (
        ("trunk.stem.0.conv.weight", "conv2d_1a.conv.weight"),
        ("trunk.stem.6.norm.running_var", "conv2d_4b.bn.running_var"),
        ("trunk.stage1.4.branches.0.0.conv.weight", "repeat_1.4.branch0.conv.weight"),
        ("trunk.stage1.4.branches.2.1.norm.bias", "repeat_1.4.branch2.1.bn.bias"),
        ("trunk.reduction.branches.0.0.conv.weight", "mixed_6a.branch0.conv.weight"),
        ("trunk.reduction.branches.1.2.conv.weight", "mixed_6a.branch1.2.conv.weight"),
        ("trunk.stage2.9.project.bias", "repeat_2.9.conv2d.bias"),
        ("reduction.branches.0.0.conv.weight", "mixed_7a.branch0.0.conv.weight"),
        ("stage3.4.branches.0.0.conv.weight", "repeat_3.4.branch0.conv.weight"),
        ("stage3.5.branches.0.0.conv.weight", "block8.branch0.conv.weight"),
        ("stage3.5.branches.1.2.conv.weight", "block8.branch1.2.conv.weight"),
    ):
        assert facenet_name(ours, config) == theirs


def test_missing_and_unexpected_keys_are_named(small):
    _, weights = small
    del weights["mixed_6a.branch0.conv.weight"]
    weights["repeat_4.0.conv2d.weight"] = torch.ones(8)
    pattern = r"missing keys: mixed_6a\.branch0\.conv\.weight; unexpected keys: repeat_4\.0\.conv2d\.weight"
    with pytest.raises(ValueError, match=pattern):
        convert(weights, GlobalExpressionEncoderConfig(**SMALL))


def test_a_wrapped_state_dict_is_refused(small):
    _, weights = small
    with pytest.raises(ValueError, match=r"and \d+ more; unexpected keys: state_dict\. Pass the state dict"):
        convert({"state_dict": weights}, GlobalExpressionEncoderConfig(**SMALL))


def test_files_that_count_no_batches_are_taken(small):
    reference, weights = small
    weights = {name: value for name, value in weights.items() if not name.endswith("num_batches_tracked")}
    assert_equal(convert(weights, GlobalExpressionEncoderConfig(**SMALL, padding="valid")), reference, 96)


def test_another_shape_is_refused(small):
    _, weights = small
    with pytest.raises(ValueError, match=r"conv2d_1a\.conv\.weight is \(4, 3, 3, 3\), but .* \(8, 3, 3, 3\)"):
        convert(weights, GlobalExpressionEncoderConfig(**SMALL | {"width_multiplier": 0.25}))


def test_a_file_with_code_is_not_run(tmp_path):
    torch.save({"conv2d_1a.conv.weight": make_reference}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"weights\.pt holds no state dict; save .*state_dict"):
        read_weights(tmp_path / "weights.pt")


def test_what_is_no_state_dict_is_named(tmp_path):
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"list\.pt holds a list and no state dict"):
        read_weights(tmp_path / "list.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.pt holds no state dict"):
        read_weights(tmp_path / "text.pt")
