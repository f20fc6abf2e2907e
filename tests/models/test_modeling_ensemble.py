"""The mean of several networks: what goes to each network, and what comes of their answers."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel

from actionunits import (
    Ac2dForAUDetection,
    AUImageProcessor,
    EnsembleConfig,
    EnsembleForAUDetection,
)
from actionunits.models.ensemble.modeling_ensemble import reduced, reduced_centers

from .test_modeling_ac2d import TINY as AC2D
from .test_modeling_ac2d import TestAc2d as Ac2dTester
from .test_modeling_auformer import TestFrozen as AUFormerTester
from .test_modeling_common import AUS, AUModelTester
from .test_modeling_escda import BACKBONE, BRANCH
from .test_modeling_escda import TestEscda as EscdaTester
from .test_modeling_escda import TestGda as GdaTester
from .test_modeling_escda import TestLsc as LscTester
from .test_modeling_geometry import TestGeometry as GeometryTester
from .test_modeling_gtlenet import TestGtleNet as GtleNetTester
from .test_modeling_lac import TestLac as LacTester

TESTERS = (LscTester, GdaTester, GtleNetTester, Ac2dTester, AUFormerTester, LacTester)


class TestEnsemble(AUModelTester):
    model_class = EnsembleForAUDetection
    config = {"lsc_config": BACKBONE | BRANCH, "ac2d_config": AC2D}  # of 48 and 32 pixels
    has_attention = True
    without_gradient = LscTester.without_gradient + Ac2dTester.without_gradient

    def make_model(self, **kwargs):
        model = super().make_model(**kwargs)
        model.end_of_epoch()
        return model.eval()


class TestWithPlaces(AUModelTester):
    """An ensemble whose networks read other centres than those of its action units."""

    model_class = EnsembleForAUDetection
    config = {
        "gda_config": BACKBONE,
        "geometry_config": GeometryTester.config,
        "network_weights": {"geometry": 2.0},
    }
    always_float32 = GeometryTester.always_float32

    def make_inputs(self, config, batch_size=3):
        return super().make_inputs(self.make_config(aus=config.places), batch_size)


@pytest.fixture(scope="module")
def networks():
    """A network of each kind; the first two read 48 pixels, others fewer."""
    return [tester().make_model() for tester in TESTERS]


def naive_reduction(picture, size):
    """Bilinear reduction of a (3, S, S) picture by Pillow, channel by channel in floats."""
    channels = [
        Image.fromarray(channel.numpy(), mode="F").resize((size, size), Image.Resampling.BILINEAR)
        for channel in picture
    ]
    return torch.stack([torch.from_numpy(np.array(channel)) for channel in channels])


def test_answer_is_the_mean_of_the_networks_logits(networks):
    model = EnsembleForAUDetection.from_networks(*networks)
    inputs = TestEnsemble().make_inputs(model.config)
    sizes = [network.config.processor_options["size"]["height"] for network in networks]
    assert model.config.image_size == max(sizes) > min(sizes)
    expected = []
    for network, size in zip(networks, sizes, strict=True):
        pictures = torch.stack([naive_reduction(picture, size) for picture in inputs["pixel_values"]])
        centers = (inputs["au_centers"] + 0.5) * size / max(sizes) - 0.5
        expected.append(network(pictures, centers).logits)
    output = model(**inputs)
    torch.testing.assert_close(output.branch_logits, torch.stack(expected, 1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.logits, sum(expected) / len(networks), rtol=1e-4, atol=1e-5)


def test_loss_is_the_sum_of_the_networks_losses(networks):
    same_size = [network for network in networks if network.config.processor_options["size"]["height"] == 32]
    model = EnsembleForAUDetection.from_networks(*same_size)
    tester = TestEnsemble()
    inputs, labels = tester.make_inputs(model.config), tester.make_labels(model.config)
    expected = sum(network(**inputs, labels=labels).loss for network in same_size)
    torch.testing.assert_close(model(**inputs, labels=labels).loss, expected)


def test_networks_come_back_as_they_went(networks, tmp_path):
    EnsembleForAUDetection.from_networks(*networks).save_pretrained(tmp_path)
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    for network, inside in zip(networks, loaded.networks.values(), strict=True):
        assert type(inside) is type(network)
        for name, value in network.state_dict().items():
            torch.testing.assert_close(inside.state_dict()[name], value, rtol=0, atol=0)


def test_one_network_loads_from_the_ensemble(networks, tmp_path):
    EnsembleForAUDetection.from_networks(*networks).save_pretrained(tmp_path)
    expected = networks[3]
    network, info = Ac2dForAUDetection.from_pretrained(
        tmp_path, key_mapping={r"^ac2d\.": ""}, output_loading_info=True
    )
    assert not info["missing_keys"]
    inputs = Ac2dTester().make_inputs(network.config)
    torch.testing.assert_close(network(**inputs).logits, expected(**inputs).logits)


def test_centres_stay_on_their_pixels():
    """A face reduced by the image processor and one reduced by the ensemble have the same centres."""
    landmarks = np.random.default_rng(0).uniform(40, 160, (68, 2))
    photo = Image.new("RGB", (200, 200))
    large, small = (
        AUImageProcessor(aus=AUS, size={"height": size, "width": size})(
            photo, landmarks=landmarks, return_tensors="pt"
        )["au_centers"]
        for size in (112, 80)
    )
    torch.testing.assert_close(reduced_centers(large, 112, 80), small, rtol=0, atol=1e-3)
    assert reduced_centers(large, 112, 112) is large
    assert reduced_centers(None, 112, 80) is None


def test_an_even_picture_stays_even():
    pictures = torch.full((1, 3, 48, 48), 0.25)
    torch.testing.assert_close(reduced(pictures, 32), torch.full((1, 3, 32, 32), 0.25))
    assert reduced(pictures, 48) is pictures


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_what_the_networks_keep(networks, tmp_path, dtype):
    """AC2D's prototypes and LAC's counts of an epoch are float32 in every type."""
    EnsembleForAUDetection.from_networks(*networks).save_pretrained(tmp_path / "all")
    loaded = AutoModel.from_pretrained(tmp_path / "all", dtype=dtype)
    assert {"Ac2dBlock", "LscBranch"} <= set(loaded._no_split_modules)
    for (name, inside), network in zip(loaded.networks.items(), networks, strict=True):
        network.save_pretrained(tmp_path / name)
        alone = AutoModel.from_pretrained(tmp_path / name, dtype=dtype)
        assert types(inside) == types(alone)
        assert types(EnsembleForAUDetection.from_networks(alone).networks[name]) == types(alone)


def types(model):
    return {name: value.dtype for name, value in model.state_dict().items()}


def test_what_is_frozen_stays_frozen(networks, tmp_path):
    gtlenet, auformer = GtleNetTester().make_model(freeze_encoder=True), networks[4]
    model = EnsembleForAUDetection.from_networks(gtlenet, auformer)
    model.save_pretrained(tmp_path)
    for each in (model, AutoModel.from_pretrained(tmp_path)):
        assert not any(p.requires_grad for p in each.auformer.vit.parameters())
        assert not any(p.requires_grad for p in each.gtlenet.trunk.parameters())
        assert all(p.requires_grad for p in each.auformer.classifier.parameters())


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_all_networks_compute_attention_as_asked(networks, tmp_path, implementation):
    model = EnsembleForAUDetection.from_networks(*networks)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, attn_implementation=implementation)
    assert loaded.lsc.config._attn_implementation == implementation
    assert loaded.lac.config._attn_implementation == "eager"
    inputs = TestEnsemble().make_inputs(model.config)
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_a_backbone_that_is_named_is_loaded(networks, tmp_path):
    lac = networks[5]
    lac.resnet.save_pretrained(tmp_path)
    config = copy.deepcopy(lac.config)
    config.backbone_name_or_path = str(tmp_path)
    model = AutoModel.from_config(EnsembleConfig(lac_config=config))
    for name, value in lac.resnet.state_dict().items():
        torch.testing.assert_close(model.lac.resnet.state_dict()[name], value, rtol=0, atol=0)


def test_a_network_can_be_added_or_left_out(networks, tmp_path):
    EnsembleForAUDetection.from_networks(networks[0], networks[3]).save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, gda_config=BACKBONE)
    assert list(model.networks) == ["lsc", "gda", "ac2d"] and model.gda.config.aus == AUS
    alone, info = AutoModel.from_pretrained(tmp_path, ac2d_config=None, output_loading_info=True)
    assert list(alone.networks) == ["lsc"] and not any(info.values())
    changed = AutoModel.from_pretrained(tmp_path, lsc_config={"mask_sigma": 2.0})
    assert changed.lsc.config.mask_sigma == 2.0


def test_maps_are_those_of_the_first_network_that_has_them(networks):
    lsc, gda, _, ac2d, *_ = networks
    model = EnsembleForAUDetection.from_networks(gda, ac2d, lsc)
    assert list(model.networks) == ["lsc", "gda", "ac2d"]
    inputs = LscTester().make_inputs(lsc.config)
    options = {"output_au_attentions": True, "output_hidden_states": True, "output_attentions": True}
    output, local, whole = (each(**inputs, **options) for each in (model, lsc, gda))
    for name in ("au_attentions", "au_attentions_unconstrained", "au_masks"):
        torch.testing.assert_close(output[name], local[name])
    torch.testing.assert_close(output["au_evidence"], whole["au_evidence"])
    for name in ("hidden_states", "attentions"):
        assert len(output[name]) == len(local[name])


def test_epochs_end_for_the_networks_that_keep_state(networks):
    model = EnsembleForAUDetection.from_networks(networks[0], networks[3]).train()
    inputs = TestEnsemble().make_inputs(model.config, 4)
    before = model.networks["ac2d"].prototypes.clone()
    model(**inputs)
    model.break_off_epoch()
    model.end_of_epoch()
    torch.testing.assert_close(model.networks["ac2d"].prototypes, before, rtol=0, atol=0)
    model(**inputs)
    model.end_of_epoch()
    assert not torch.equal(model.networks["ac2d"].prototypes, before)


def test_an_epoch_that_is_looked_at_again_is_reduced(networks):
    static = Ac2dTester().make_model(deconfounding="static")
    model = EnsembleForAUDetection.from_networks(networks[0], static).train()
    inputs = TestEnsemble().make_inputs(model.config, 4)
    model(**inputs)
    model.end_of_epoch([inputs])
    alone = copy.deepcopy(static).train()
    small = {"pixel_values": reduced(inputs["pixel_values"], 32)}
    small["au_centers"] = reduced_centers(inputs["au_centers"], 48, 32)
    alone(**small)
    alone.end_of_epoch([small])
    torch.testing.assert_close(model.networks["ac2d"].prototypes, alone.prototypes)


def test_weights_of_the_mean(networks):
    lsc, gda, *_ = networks
    model = EnsembleForAUDetection.from_networks(lsc, gda, network_weights={"gda": 3, "lac": 5})
    inputs = LscTester().make_inputs(lsc.config)
    expected = (lsc(**inputs).logits + 3 * gda(**inputs).logits) / 4
    torch.testing.assert_close(model(**inputs).logits, expected)
    for wrong in ({"gda": 0}, {"gda": -1.0}, {"gdb": 1}):
        with pytest.raises(Exception, match=f"network_weights has {next(iter(wrong))!r}"):
            EnsembleConfig(network_weights=wrong)
        with pytest.raises(Exception, match=f"network_weights has {next(iter(wrong))!r}"):
            EnsembleConfig.from_dict(model.config.to_dict(), network_weights=wrong)


def answer(model):
    """Logits for a photo, by the image processor that the model's configuration asks for."""
    processor = AUImageProcessor(**model.config.processor_options)
    landmarks = np.random.default_rng(0).uniform(40, 160, (68, 2))
    return model(
        **processor(Image.new("RGB", (200, 200), "gray"), landmarks=landmarks, return_tensors="pt")
    ).logits


def test_a_network_of_places_reads_those_and_others_their_own(networks, tmp_path):
    lsc, geometry = networks[0], GeometryTester().make_model()
    EnsembleForAUDetection.from_networks(lsc, geometry).save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path)
    assert model.config.places == [*AUS, 6] and geometry.config.places == [1, 6, 12]
    torch.testing.assert_close(answer(model), (answer(lsc) + answer(geometry)) / 2, rtol=1e-3, atol=1e-4)
    few = AutoModel.from_pretrained(tmp_path, aus=[25, 1])
    assert few.config.places == [25, 1, 6, 12]
    torch.testing.assert_close(answer(few), answer(model)[:, [3, 0]], rtol=1e-3, atol=1e-4)
    pictures = torch.zeros(1, 3, 48, 48)
    with pytest.raises(ValueError, match=r"centres of the action units \[25, 1, 6, 12\]"):
        few(pictures, torch.zeros(1, 3, 2, 2))
    without = few(pictures, torch.ones(1, 2, 2, 2))  # the centres of 25 and 1 alone
    torch.testing.assert_close(without.logits, few.lsc(pictures, torch.ones(1, 2, 2, 2)).logits)
    assert without.branch_logits.shape == (1, 1, 2)


@pytest.mark.parametrize("labels", [{"aus": [46, 12]}, {"id2label": {0: "smile", 1: "frown", 2: "wink"}}])
def test_places_are_read_even_if_the_labels_have_none(networks, tmp_path, labels):
    gda, geometry = networks[1], GeometryTester().make_model()
    EnsembleForAUDetection.from_networks(gda, geometry).save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, **labels)
    assert model.config.places == [1, 6, 12] == model.config.processor_options["aus"]
    pictures, centers = torch.zeros(1, 3, 48, 48), 48 * torch.rand(1, 3, 2, 2)
    expected = model.geometry(au_centers=(centers + 0.5) * 32 / 48 - 0.5).logits
    torch.testing.assert_close(model(pictures, centers).branch_logits[:, 1], expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(answer(model), (answer(model.gda) + answer(model.geometry)) / 2)
    with_lsc = AutoModel.from_pretrained(tmp_path, **labels, lsc_config=BACKBONE | BRANCH)
    with pytest.raises(ValueError, match="LscForAUDetection needs the centres of .*leave it out"):
        with_lsc(pictures, centers)


def test_the_processor_gives_centres_even_if_the_first_network_reads_none(networks):
    gtlenet, geometry = networks[2], GeometryTester().make_model()
    model = EnsembleForAUDetection.from_networks(gtlenet, geometry)
    expected = (answer(gtlenet) + answer(geometry)) / 2
    torch.testing.assert_close(answer(model), expected, rtol=1e-3, atol=1e-4)


def test_places_in_another_order_are_told_apart():
    lsc, geometry = (
        LscTester().make_model(aus=[1, 12]),
        GeometryTester().make_model(aus=[1, 12], places=[12, 1]),
    )
    model = EnsembleForAUDetection.from_networks(lsc, geometry)
    inputs = LscTester().make_inputs(lsc.config)
    turned = (inputs["au_centers"] + 0.5).flip(1) * geometry.config.image_size / 48 - 0.5
    expected = geometry(au_centers=turned).logits
    torch.testing.assert_close(model(**inputs).branch_logits[:, 1], expected, rtol=1e-3, atol=1e-4)


def test_members_that_do_not_go_together(networks):
    lsc, _, _, ac2d, *_ = networks
    with pytest.raises(ValueError, match=r"one network of each kind, got \['ac2d', 'ac2d'\]"):
        EnsembleForAUDetection.from_networks(ac2d, ac2d)
    with pytest.raises(ValueError, match=r"got \[\]"):
        EnsembleForAUDetection.from_networks()
    with pytest.raises(ValueError, match="EscdaForAUDetection is none of the networks of an ensemble: Lsc"):
        EnsembleForAUDetection.from_networks(EscdaTester().make_model())
    with pytest.raises(ValueError, match="all networks must have the same action units"):
        EnsembleForAUDetection.from_networks(lsc, Ac2dTester().make_model(aus=[1, 2]))


def test_pictures_of_another_size_are_refused(networks):
    model = EnsembleForAUDetection.from_networks(networks[0], networks[3])
    for shape in ((1, 3, 32, 32), (1, 3, 48, 32), (1, 2, 3, 48, 48)):
        with pytest.raises(ValueError, match=r"the ensemble expects \(B, 3, 48, 48\)"):
            model(torch.zeros(shape))


def test_configuration_names_its_networks():
    assert list(EnsembleConfig().networks) == ["lsc", "gda", "ac2d"]
    assert EnsembleConfig().image_size == 176
    config = EnsembleConfig.compact(gtlenet_config={"aus": [4, 12]}, aus=[4, 12])
    assert list(config.networks) == ["lsc", "gda", "gtlenet", "ac2d"]
    assert config.lsc_config.aus == config.ac2d_config.aus == [4, 12]
    config.aus = [12]
    assert config.gda_config.aus == config.gtlenet_config.aus == [12]
    only = EnsembleConfig(lac_config={"clip_length": 1})
    assert list(only.networks) == ["lac"] and only.processor_options["size"] == {"height": 224, "width": 224}
