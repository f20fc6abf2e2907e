"""The converter on files written as the authors' training writes them, against the plain implementation."""

import pytest
import torch
from transformers import AutoModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from actionunits.action_units import CORPUS_AUS
from actionunits.models.ac2d import Ac2dConfig
from actionunits.models.ac2d.convert_ac2d_to_hf import convert, main, read_snapshot
from references.ac2d import Ac2dReference

SMALL = {"image_size": 48, "stem_channels": 8, "hidden_sizes": [8, 8, 8], "depths": [1, 1, 3], "mlp_ratio": 2}
SMALL_REFERENCE = {"stem": 8, "dims": (8, 8, 8), "depths": (1, 1, 3), "mlp_ratio": 2, "query_size": 64}


def make_reference(num_aus, **sizes):
    """A reference network with random weights, statistics included."""
    torch.manual_seed(0)
    reference = Ac2dReference(num_aus, **sizes).eval()
    with torch.no_grad():
        for name, tensor in reference.state_dict().items():
            if tensor.is_floating_point():
                tensor += (
                    0.1 * torch.rand(tensor.shape)
                    if "running_var" in name
                    else 0.1 * torch.randn(tensor.shape)
                )
    return reference


def make_snapshot(reference, count=1000, divide=True):
    """Random prototypes next to the weights."""
    keys = torch.randn(len(reference.aus_head), reference.aus_norm[0].normalized_shape[0])
    share = 1 / count
    values = keys * share if divide else keys
    return {"model": reference.state_dict(), "K_data": keys, "V_data": values, "P_data": share}


@pytest.fixture
def small():
    reference = make_reference(8, intervention_size=8, **SMALL_REFERENCE)
    return reference, Ac2dConfig(aus=list(CORPUS_AUS["disfa"]), **SMALL)


def assert_equal(model, reference, snapshot, size):
    """Logits within 1e-5 and mean attention within 1e-6 of the reference."""
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        features, attentions, logits = reference(x, snapshot.get("K_data"), snapshot.get("V_data"))
        output = model(x, output_au_attentions=True)
    assert logits.std() > 1e-3
    torch.testing.assert_close(output.logits, logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(output.au_attentions.flatten(2), attentions.mean((2, 3)), rtol=0, atol=1e-6)


def test_a_file_of_the_papers_size_becomes_a_model_folder(tmp_path):
    reference = make_reference(12)
    snapshot = make_snapshot(reference)
    assert len(snapshot["model"]) == 1042
    torch.save(snapshot, tmp_path / "snapshot.pth")
    arguments = ["--snapshot", tmp_path / "snapshot.pth", "--corpus", "bp4d", "--output", tmp_path / "folder"]
    main([str(argument) for argument in arguments])
    model, info = AutoModel.from_pretrained(tmp_path / "folder", output_loading_info=True)
    assert not any(info.values())
    assert model.config.prototype_value == "mean_over_n"
    assert_equal(model, reference, snapshot, 176)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "folder")
    assert (processor.aligned_size, processor.crop_size["height"], processor.size["height"]) == (
        200,
        176,
        176,
    )
    assert processor.aus == model.config.aus


@pytest.mark.parametrize("divide", [True, False])
def test_prototypes_come_along(small, divide):
    reference, config = small
    snapshot = make_snapshot(reference, divide=divide)
    model = convert(snapshot, config)
    assert model.config.prototype_value == ("mean_over_n" if divide else "mean")
    torch.testing.assert_close(model.prototypes, snapshot["K_data"])
    assert all(branch.intervention.prototype_count == 1000 for branch in model.branches.values())
    assert_equal(model, reference, snapshot, 48)


def test_a_bare_state_dict_is_of_the_first_epoch_which_has_no_intervention(small, tmp_path):
    reference, config = small
    torch.save(reference.state_dict(), tmp_path / "snapshot.pth")
    snapshot = read_snapshot(tmp_path / "snapshot.pth")
    model = convert(snapshot, config)
    assert model.config.deconfounding_start == "second_epoch"
    assert_equal(model, reference, {}, 48)


@pytest.mark.parametrize("bare", [True, False])
def test_missing_and_unexpected_keys_are_named(small, bare):
    reference, config = small
    snapshot = make_snapshot(reference)
    del snapshot["model"]["aus_norm.3.weight"]
    snapshot["model"]["aus_norm.8.weight"] = torch.ones(8)
    pattern = r"missing keys: aus_norm\.3\.weight; unexpected keys: aus_norm\.8\.weight"
    with pytest.raises(ValueError, match=pattern):
        convert(snapshot["model"] if bare else snapshot, config)


def test_a_missing_prototype_is_named(small):
    reference, config = small
    snapshot = make_snapshot(reference)
    del snapshot["V_data"]
    with pytest.raises(ValueError, match="missing entries: V_data"):
        convert(snapshot, config)


def test_another_number_of_action_units_is_refused(small):
    reference, config = small
    config.aus = list(CORPUS_AUS["gft"])
    with pytest.raises(ValueError, match=r"missing keys: aus_data_attention\.8.* more\. Check the corpus"):
        convert(make_snapshot(reference), config)


@pytest.mark.parametrize("rows", [7, 12])
def test_another_number_of_prototypes_is_refused(small, rows):
    reference, config = small
    keys = torch.randn(rows, 8)
    with pytest.raises(ValueError, match=f"K_data of the snapshot has {rows} rows for 8 action units"):
        convert(make_snapshot(reference) | {"K_data": keys, "V_data": keys}, config)


def test_another_shape_is_refused(small):
    reference, config = small
    snapshot = make_snapshot(reference)
    snapshot["model"]["aus_head.0.weight"] = torch.zeros(1, 9)
    with pytest.raises(ValueError, match=r"aus_head\.0\.weight of the snapshot is \(1, 9\), but .* \(1, 8\)"):
        convert(snapshot, config)


def test_a_file_with_code_is_not_run(tmp_path):
    torch.save({"model": make_reference}, tmp_path / "snapshot.pth")
    with pytest.raises(Exception, match="(?i)weights.only"):
        read_snapshot(tmp_path / "snapshot.pth")


def test_a_file_of_something_else_is_named(tmp_path):
    (tmp_path / "text.pth").write_text("no snapshot")
    with pytest.raises(ValueError, match=r"text\.pth holds no state dict"):
        read_snapshot(tmp_path / "text.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"list\.pth holds a list and no state dict"):
        read_snapshot(tmp_path / "list.pth")
