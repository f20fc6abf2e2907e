"""LAC against its paper: sizes, a plain implementation, clips, streams, ablations, weights of epochs."""

import copy
import os

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModel,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
    Trainer,
    TrainingArguments,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from actionunits import AUImageProcessor
from actionunits.action_units import CORPUS_AUS, UNKNOWN
from actionunits.callbacks import EndOfEpochCallback
from actionunits.data.sampling import fixed_stride_clips
from actionunits.models.lac import LacConfig, LacForAUDetection
from actionunits.models.lac.configuration_lac import ABLATIONS, NO_ROI_LOSS
from actionunits.models.lac.modeling_lac import neighbors
from references.lac import PlainLac, naive_roi_align, weighted_asymmetric

from .test_modeling_common import AUS, AUModelTester

BACKBONE = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "basic"}
TINY = {"backbone_config": BACKBONE, "image_size": 32, "hidden_size": 8}
RATES = [0.1, 0.2, 0.3, 0.4]


class LacTester(AUModelTester):
    model_class = LacForAUDetection

    def make_model(self, **kwargs):
        """With edges on both sides of the leaky rectifier, for an action unit's own half of `a` to count."""
        model = super().make_model(**kwargs)
        if model.relations is not None:
            for layer in model.relations.layers:
                for part in (layer.target, layer.source):
                    part.weight.data += torch.randn_like(part.weight)
        return model

    def test_occurrence_rates_weigh_the_loss(self, inputs, labels, folder):
        plain = self.model_class.from_pretrained(folder)
        weighted = self.model_class.from_pretrained(folder, au_occurrence_rates=RATES)
        values = dict.fromkeys(NO_ROI_LOSS, 0.0)
        alone = []
        for column in range(4):
            known = torch.full_like(labels, UNKNOWN)
            known[..., column] = labels[..., column]
            plain.config.update(values)
            alone.append(plain(**inputs, labels=known).loss)
        weighted.config.update(values)
        inverse = 1 / torch.tensor(RATES)
        expected = (inverse / inverse.sum() * torch.stack(alone)).sum()
        torch.testing.assert_close(weighted(**inputs, labels=labels).loss, expected)


class TestLac(LacTester):
    config = TINY
    without_gradient = ("lstm.weight_hh_l0",)  # a picture has no frame before it

    def test_unknown_action_unit_gets_no_gradient(self, model, inputs, labels):
        # Its answer gets none; its class weight tells the others, through the graph.
        labels[..., 1] = UNKNOWN
        model(**inputs, labels=labels).loss.backward()
        assert not any(p.grad.any() for p in model.classifier["AU4"].parameters())
        assert model.localizer["AU4"].weight.grad.any()

    @pytest.mark.parametrize("how", ["from_pretrained", "adapt_to_aus"])
    def test_shared_action_units_keep_their_heads(self, model, inputs, folder, how):
        # The weights stay; the answers may change, for others inform them.
        aus = [25, 43, 1]
        if how == "adapt_to_aus":
            other = model.adapt_to_aus(aus)
        else:
            other, info = AutoModel.from_pretrained(folder, aus=aus, output_loading_info=True)
            assert all(".AU43." in name for name in info["missing_keys"])
        assert other.config.au_labels == ["AU25", "AU43", "AU1"]
        state = other.state_dict()
        for name, value in model.state_dict().items():
            if name in state:
                torch.testing.assert_close(state[name], value, rtol=0, atol=0, msg=name)
        logits = other(**self.make_inputs(other.config)).branch_logits[:, 1]  # y' asks nobody
        expected = model(**inputs).branch_logits[:, 1, [AUS.index(25), AUS.index(1)]]
        torch.testing.assert_close(logits[:, [0, 2]], expected, rtol=1e-4, atol=1e-5)


def test_gradient_can_be_asked_of_hidden_states():
    model = TestLac().make_model()
    output = model(**TestLac().make_inputs(model.config), output_hidden_states=True)
    for gradient in torch.autograd.grad(output.logits.sum(), output.hidden_states):
        assert gradient.any()


class TestEachForItself(LacTester):
    config = TINY | {"spatial": "none", "temporal": "none"}


class TestBackbone(LacTester):
    config = TINY | ABLATIONS["backbone"] | {"au_loss_type": "weighted"}


class TestClips(TestLac):
    """The same with two frames a clip; what the common tests expect of (B, m) is looked at frame by frame."""

    without_gradient = ()

    def make_inputs(self, config, batch_size=3):
        inputs = super().make_inputs(config, 2 * batch_size)
        return {name: value.unflatten(0, (batch_size, 2)) for name, value in inputs.items()}

    def make_labels(self, config, batch_size=3):
        return super().make_labels(config, 2 * batch_size).unflatten(0, (batch_size, 2))

    def test_au_attentions(self, model, inputs):
        output = model(**inputs, output_au_attentions=True)
        assert output.au_attentions.shape == output.au_evidence.shape == (3, 2, 4, 4, 4)
        assert output.branch_logits.shape == (3, 2, 2, 4)

    def test_number_of_labels(self, folder):
        model = self.model_class.from_pretrained(folder, num_labels=3)
        assert model(**self.make_inputs(model.config)).logits.shape == (3, 2, 3)

    @pytest.mark.parametrize("how", ["adapt_to_aus"])
    def test_shared_action_units_keep_their_heads(self, model, inputs, how):
        other = model.adapt_to_aus([25, 43, 1])
        logits = other(**self.make_inputs(other.config)).branch_logits[:, :, 1]
        expected = model(**inputs).branch_logits[:, :, 1, [AUS.index(25), AUS.index(1)]]
        torch.testing.assert_close(logits[..., [0, 2]], expected, rtol=1e-4, atol=1e-5)

    # Of pictures, above.
    test_channels_last_changes_nothing = test_processor_options_make_the_input = test_learns_by_heart = None
    test_gradients_of_hidden_states = None


def make(**kwargs):
    tester = TestLac()
    model = tester.make_model(**kwargs)
    return model, tester.make_inputs(model.config), tester.make_labels(model.config)


def make_fresh(**values):
    torch.manual_seed(0)
    return LacForAUDetection(LacConfig(**TINY | {"aus": AUS} | values))


def make_clips(model, batch=2, frames=5):
    clips = TestLac().make_inputs(model.config, batch * frames)
    return {name: value.unflatten(0, (batch, frames)) for name, value in clips.items()}


# Sizes of the paper's network.


@pytest.mark.parametrize(
    ("corpus", "values", "expected"),
    [
        ("bp4d", {}, 27_215_448),
        ("bp4d", ABLATIONS["backbone"], 23_508_032 + 2049 * 12),
        ("bp4d", {"num_graph_layers": 1}, 27_215_448 - 512**2 - 1024),
        ("bp4d", {"temporal": "none"}, 27_215_448 - 2_101_248),
        ("disfa", {}, 27_215_448 - 4 * (2049 + 513)),
    ],
)
def test_parameters(corpus, values, expected):
    with torch.device("meta"):
        model = LacForAUDetection(LacConfig(aus=list(CORPUS_AUS[corpus]), **values))
    assert model.num_parameters() == expected


def test_multiply_adds():
    """16 frames: 0.7 G more than the backbone, which the paper counts as 66.1 G and PyTorch as 65.4 G."""
    with torch.device("meta"), torch.no_grad():
        model = LacForAUDetection(LacConfig()).eval()
        with FlopCounterMode(display=False) as whole:
            model(torch.empty(1, 16, 3, 224, 224))
        with FlopCounterMode(display=False) as backbone:
            model.resnet(torch.empty(16, 3, 224, 224))
    added = (whole.get_total_flops() - backbone.get_total_flops()) / 2
    assert added == pytest.approx(0.73e9, abs=0.02e9)
    assert 66.1e9 + added == pytest.approx(66.8e9, abs=0.05e9)
    assert backbone.get_total_flops() / 2 == pytest.approx(65.39e9, abs=0.01e9)


# The plain implementation with the same weights.


@pytest.mark.parametrize("form", ["picture", "clip"])
@pytest.mark.parametrize(
    "values",
    [{}, {"spatial": "graph"}, {"graph_edges": "all"}, {"spatial": "none"}, {"temporal": "none"}],
    ids=str,
)
def test_outputs_and_gradients_equal_the_plain_implementation(values, form):
    model = make(**values)[0].double()
    batch = {"picture": (3,), "clip": (2, 3)}[form]
    count = 3 if form == "picture" else 6
    inputs = TestLac().make_inputs(model.config, count)
    inputs = {name: value.double().unflatten(0, batch) for name, value in inputs.items()}
    labels = TestLac().make_labels(model.config, count).unflatten(0, batch)
    plain = PlainLac(copy.deepcopy(model))
    answer, first = plain(inputs["pixel_values"])
    output = model(**inputs, labels=labels)
    torch.testing.assert_close(output.logits, answer, rtol=1e-9, atol=1e-9)
    both = output.branch_logits.unbind(-2)
    torch.testing.assert_close(both[1], first, rtol=1e-9, atol=1e-9)
    loss = plain(**inputs, labels=labels)
    torch.testing.assert_close(output.loss, loss, rtol=1e-9, atol=1e-9)
    output.loss.backward(), loss.backward()
    for (name, p), other in zip(model.named_parameters(), plain.model.parameters(), strict=True):
        assert (p.grad is None) == (other.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(
                p.grad, other.grad, rtol=1e-8, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_class_weights_and_maps_are_those_of_equations_1_to_3():
    model, inputs, _ = make()
    output = model(**inputs, output_au_attentions=True, output_hidden_states=True)
    features = output.hidden_states[-1]
    first = output.branch_logits[:, 1]
    torch.testing.assert_close(output.au_evidence.sum((2, 3)) + model.localizer.bias, first)
    lengths = features.norm(dim=1)[:, None] * model.localizer.weight.norm(dim=1)[:, None, None]
    similarity = 2 * output.au_attentions - 1
    torch.testing.assert_close((similarity * lengths).mean((2, 3)) + model.localizer.bias, first)
    assert similarity.min() < -0.01 < 0.01 < similarity.max()


def test_regions_of_a_picture_that_is_wider_than_high():
    model, _, _ = make()
    pictures, centers = torch.randn(2, 3, 32, 48), torch.rand(2, 4, 2, 2) * torch.tensor([48.0, 32.0])
    locked = model._lock(pictures)
    assert locked.magnitude.shape == (2, 4, 6)
    boxes = model._boxes(centers, (2,), (32, 48))
    actual = torch.stack(locked.pool(boxes, model.config.roi_cells))
    half = model.config.roi_ratio * 48 / 2
    expected = torch.empty(2, 2, 4, 2)
    for index in torch.cartesian_prod(*map(torch.arange, (2, 4, 2))).tolist():
        s, i, _ = index
        x, y = centers[tuple(index)].tolist()
        box = [(edge + 0.5) / 8 - 0.5 for edge in (x - half, y - half, x + half, y + half)]  # in cells
        maps = (locked.magnitude[s] / locked.magnitude[s].max(), locked.similarity[s, i])
        for k, values in enumerate(maps):
            expected[(k, *index)] = naive_roi_align(values, box, model.config.roi_cells).mean()
    torch.testing.assert_close(actual, expected)


def test_features_of_nothing_have_no_direction():
    model, inputs, labels = make()
    with torch.no_grad():
        model.resnet.encoder.stages[-1].layers[-1].layer[-1].normalization.bias.fill_(-100)
        model.resnet.encoder.stages[-1].layers[-1].layer[-1].normalization.weight.zero_()
    output = model(**inputs, labels=labels, output_au_attentions=True)
    torch.testing.assert_close(output.au_attentions, torch.full((3, 4, 4, 4), 0.5))
    output.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


# Clips and streams.


def test_a_clip_of_one_frame_is_the_picture():
    model, inputs, labels = make()
    picture = model(**inputs, labels=labels, output_au_attentions=True)
    clip = model(
        **{k: v[:, None] for k, v in inputs.items()}, labels=labels[:, None], output_au_attentions=True
    )
    assert picture.loss == clip.loss
    for name in ("logits", "branch_logits", "au_attentions"):
        torch.testing.assert_close(clip[name][:, 0], picture[name], rtol=0, atol=0)


def test_an_answer_knows_the_frames_before_and_none_after():
    model = make()[0]
    pixels = make_clips(model)["pixel_values"]
    logits = model(pixels).logits
    changed = pixels.clone()
    changed[:, 2] += 1
    difference = (model(changed).logits - logits).abs().amax((0, 2))
    assert (difference[:2] < 1e-6).all()
    assert (difference[2:] > 1e-5).all()
    still = make(temporal="none")[0]
    torch.testing.assert_close(still(pixels).logits[:, 3], still(pixels[:, 3]).logits)


@pytest.mark.parametrize(
    ("clip_length", "overlap"), [(4, 0), (4, 1), (4, 3), (1, 0), (5, 3), (None, 0), (100, 2)]
)
@pytest.mark.parametrize("portion", [1, 3, 11])
def test_stream_equals_offline_clips(clip_length, overlap, portion):
    model = make()[0]
    video = torch.randn(11, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    expected = torch.full((11, 4), torch.nan)
    stride = None if clip_length is None else clip_length - overlap
    for clip in fixed_stride_clips(["video"] * 11, clip_length or 11, stride or 11):
        logits = model(video[None, clip.rows]).logits[0]
        expected[clip.rows[clip.warm_up :]] = logits[clip.warm_up :]
    stream = model.stream(clip_length, overlap)
    actual = torch.cat([stream(part).logits for part in video.split(portion)])
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    assert not actual.requires_grad
    stream.reset()
    torch.testing.assert_close(stream(video[:3]).logits, expected[:3])


def test_stream_of_the_default_length_gives_maps_and_takes_vectors():
    model = make(clip_length=3)[0]
    video = torch.randn(7, 3, 32, 32)
    output = model.stream()(video, output_au_attentions=True)
    assert output.au_attentions.shape == output.au_evidence.shape == (7, 4, 4, 4)
    expected = [model(part[None]).logits[0] for part in video.split(3)]
    torch.testing.assert_close(output.logits, torch.cat(expected))
    assert set(model.stream()(video)) == {"logits"}  # maps only on demand
    vectors = model.spatial_vectors(torch.cat([video, -video]))  # two faces in one batch
    streams = [model.stream(), model.stream()]
    torch.testing.assert_close(streams[0].advance(vectors[:7]), output.logits)
    torch.testing.assert_close(streams[1].advance(vectors[7:]), model.stream()(-video).logits)
    assert model.stream()(video[:0]).logits.shape == (0, 4)  # a portion may be empty


def test_stream_keeps_no_more_than_it_needs():
    model = make()[0]
    stream = model.stream(8, overlap=3)
    for _ in range(20):
        stream(torch.randn(5, 3, 32, 32))
    assert len(stream._recent) == 3
    assert all(state.shape == (1, 4, 8) for state in stream._state)


def test_impossible_streams_and_shapes_are_refused():
    model, inputs, labels = make()
    with pytest.raises(ValueError, match="clip_length=0 must be at least 1"):
        model.stream(0)
    for clip_length, overlap in ((4, 4), (4, -1), (None, 1)):
        with pytest.raises(ValueError, match=f"overlap={overlap} must lie in"):
            model.stream(clip_length, overlap)
    with pytest.raises(ValueError, match=r"\(3, 32, 32\) are neither pictures"):
        model(inputs["pixel_values"][0])
    with pytest.raises(ValueError, match=r"labels have shape \(2, 4\)"):
        model(**inputs, labels=labels[:2])
    with pytest.raises(ValueError, match="two centres each"):
        model(inputs["pixel_values"], inputs["au_centers"][:, :3], labels)
    with pytest.raises(ValueError, match="au_centers is missing"):
        model(inputs["pixel_values"], labels=labels)
    still = make(**ABLATIONS["backbone"])[0]
    with pytest.raises(ValueError, match="state_detection=False"):
        still.spatial_vectors(inputs["pixel_values"])
    torch.testing.assert_close(still.stream()(inputs["pixel_values"]).logits, still(**inputs).logits)


# Confidence.


def test_certain_action_units_listen_to_nobody():
    model, inputs, _ = make()
    for value, listens in ((100.0, False), (0.0, True)):
        with torch.no_grad():
            for head in model.localizer.values():
                head.bias.fill_(value)
        vectors = model.spatial_vectors(inputs["pixel_values"])
        with torch.no_grad():
            model.relations.layers[0].value.weight.mul_(2)
        changed = model.spatial_vectors(inputs["pixel_values"])
        assert bool((vectors - changed).abs().max() > 1e-5) is listens


def test_action_units_listen_to_other_regions_only():
    """AU 1 and 4 are of the upper face, 12 and 25 of the lower one."""
    for edges, hears in (("cross_region", [True, False, True, True]), ("all", [True] * 4)):
        graph = make(graph_edges=edges, num_graph_layers=1)[0].relations
        vectors = torch.randn(1, 4, 8, requires_grad=True)
        graph(vectors)[0, 0].sum().backward()
        assert vectors.grad[0].any(-1).tolist() == hears


def test_action_units_of_the_eyelids_and_of_the_nose_share_a_region():
    """Besides those of Table I: 5, 43, 45 and 46 move the lids as 7 does, 38 and 39 the nose as 9."""
    regions = torch.block_diag(*(torch.ones(n, n) for n in (5, 3, 3))).bool()
    aus = [7, 5, 43, 45, 46, 9, 38, 39, 12, 18, 28]
    assert neighbors(LacConfig(aus=aus)) == (~regions | torch.eye(11).bool()).tolist()


# Ablations and other config values.


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_row_of_tables_4_and_7_trains(name):
    model, inputs, labels = make(**ABLATIONS[name])
    model.train()
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    assert loss.isfinite()
    other = inputs | {"au_centers": inputs["au_centers"] / 2}
    moved = model(**other, labels=labels).loss
    assert bool(moved != loss) is ("backbone" not in name and name != "ST")
    assert (model.loss_weights is None) == (ABLATIONS[name].get("au_loss_type") == "cross_entropy")


def test_each_loss_has_its_weight():
    model, inputs, labels = make()
    total = model(**inputs, labels=labels).loss
    weights = {
        "localization_weight": 0.5,
        "activation_weight": 0.5,
        "consistency_weight": 0.01,
        "first_answer_weight": 0.5,
        "answer_weight": 1.0,
    }
    parts = []
    for name in weights:
        model.config.update(dict.fromkeys(weights, 0.0) | {name: weights[name]})
        parts.append(model(**inputs, labels=labels).loss)
        assert parts[-1] > 1e-6
    torch.testing.assert_close(sum(parts), total)


@pytest.mark.parametrize(
    "values",
    [
        {"spatial": "graph"},
        {"spatial": "none"},
        {"temporal": "none"},
        {"graph_edges": "all"},
        {"num_graph_layers": 1},
        {"hidden_size": 4},
        {"roi_ratio": 0.5},
        {"roi_cells": 1},
        {"balance_activation": True},
        {"au_loss_type": "cross_entropy"},
        {"difficulty_momentum": 0.1},
        {"distribution_momentum": 0.1},
        {"difficulty_share": 0.9},
        {"share_floor": 0.9},
        {"au_occurrence_rates": RATES},
    ],
    ids=str,
)
def test_every_config_value_makes_another_model(values):
    losses = []
    for model in (make_fresh(**values), make_fresh()):
        inputs = TestLac().make_inputs(model.config, 8)
        labels = TestLac().make_labels(model.config, 8)
        for bias, head in zip((0.2, -0.2, 0.1, -0.1), model.classifier.values(), strict=True):
            head.bias.data.fill_(bias)  # so that some are detected
        model.train()
        model(**inputs, labels=labels).loss.backward()
        model.end_of_epoch()
        losses.append(model(**inputs, labels=labels).loss.item())
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"clip_length": 0}, "clip_length=0 must be at least 1"),
        ({"image_size": 0}, "image_size=0 must be at least 1"),
        ({"num_graph_layers": 0}, "num_graph_layers=0"),
        ({"roi_ratio": 0.0}, r"roi_ratio=0.0 must lie in \(0, 1\]"),
        ({"share_floor": 0.0}, "share_floor=0.0"),
        ({"activation_weight": -1}, "activation_weight=-1 must not be negative"),
        ({"difficulty_share": 1.5}, "difficulty_share=1.5"),
        ({"spatial": "both"}, "spatial"),
        ({"backbone_config": {"hidden_sizes": [8, 16], "depths": [1]}}, r"depths=\[1\] need as many stages"),
    ],
)
def test_impossible_configurations_are_refused(values, message):
    with pytest.raises(Exception, match=message):
        LacConfig(**values)


def test_compact_is_small_and_has_the_papers_map():
    config = LacConfig.compact(aus=AUS, temporal="none")
    assert config.temporal == "none"
    model = LacForAUDetection(config).eval()
    assert model.num_parameters() < 1_000_000
    output = model(torch.zeros(1, 3, config.image_size, config.image_size), output_au_attentions=True)
    assert output.au_attentions.shape == (1, 4, 7, 7)


def test_processor_options_are_imagenets_at_224():
    processor = AUImageProcessor(**LacConfig(aus=[1, 12]).processor_options)
    assert processor.crop_size["height"] == processor.size["height"] == 224
    assert (processor.aligned_size, processor.aus) == (256, [1, 12])
    assert list(processor.image_mean) == IMAGENET_DEFAULT_MEAN
    assert list(processor.image_std) == IMAGENET_DEFAULT_STD


# The backbone.


def test_any_resnet_folder_is_a_backbone(tmp_path):
    torch.manual_seed(1)
    source = ResNetForImageClassification(ResNetConfig(**BACKBONE, num_labels=5))
    source.save_pretrained(tmp_path / "resnet")
    model = LacForAUDetection.from_backbone(tmp_path / "resnet", aus=AUS, hidden_size=8)
    for name, value in source.resnet.state_dict().items():
        torch.testing.assert_close(model.resnet.state_dict()[name], value, rtol=0, atol=0)
    config = LacConfig.from_backbone(str(tmp_path / "resnet"), aus=AUS, hidden_size=8)
    again = AutoModel.from_config(config)
    torch.testing.assert_close(again.resnet.state_dict(), model.resnet.state_dict(), rtol=0, atol=0)
    config.backbone_config.depths = [2, 2]
    with pytest.raises(ValueError, match="is not the backbone that the configuration describes: it lacks"):
        AutoModel.from_config(config)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="'au-lac' checkpoint"):
        LacForAUDetection.from_backbone(tmp_path / "model")
    with torch.no_grad():
        next(model.resnet.parameters()).add_(1)
    model.save_pretrained(tmp_path / "model")  # trained on: the folder's own weights count
    loaded = LacForAUDetection.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(loaded.resnet.state_dict(), model.resnet.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_act": "gelu"},
        {"downsample_in_first_stage": True},
        {"layer_type": "bottleneck", "downsample_in_bottleneck": True},
        {"num_channels": 1},
    ],
    ids=str,
)
def test_a_backbone_computes_what_its_folder_does(fields, tmp_path):
    torch.manual_seed(1)
    source = ResNetModel(ResNetConfig(**BACKBONE | fields)).eval()
    source.save_pretrained(tmp_path)
    model = LacForAUDetection.from_backbone(tmp_path, aus=AUS, hidden_size=8).eval()
    pictures = torch.randn(2, source.config.num_channels, 32, 32)
    features = model(pictures, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(features, source(pictures).last_hidden_state)


def test_backbone_starts_as_a_resnet_and_the_rest_as_pytorch_has_it():
    model = LacForAUDetection(LacConfig.compact(hidden_size=256))
    weight = model.resnet.encoder.stages[1].layers[1].layer[0].convolution.weight
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)  # He et al.
    for part, fan_in in ((model.reduction.weight, 128), (model.lstm.weight_hh_l0, 256)):
        assert part.std().item() == pytest.approx((3 * fan_in) ** -0.5, rel=0.05)
        assert part.abs().max() <= fan_in**-0.5


# Weights by the epoch.


def naive_weights(config, epochs):
    """Eqs. 13-15 by loops; `epochs` holds for each epoch (labels, logits) of its batches."""
    rates = config.au_occurrence_rates or [0.5] * 4
    inverse = [1 / rate for rate in rates]
    difficulty = [x / (sum(inverse) / 4) for x in inverse]
    distribution = list(difficulty)
    for batches in epochs:
        recalls, shares = [], []
        for i in range(4):
            column = [(y[i], x[i]) for labels, logits in batches for y, x in zip(labels, logits, strict=True)]
            known = [(y, x) for y, x in column if y != UNKNOWN]
            occurring, found = sum(y for y, _ in known), sum(y for y, x in known if x > 0)
            recalls.append(max(found / occurring, config.share_floor) if occurring else None)
            shares.append(max(occurring / len(known), config.share_floor) if known else None)
        difficulty = [naive_update(difficulty, recalls, i, config.difficulty_momentum) for i in range(4)]
        distribution = [naive_update(distribution, shares, i, config.distribution_momentum) for i in range(4)]
    delta = config.difficulty_share
    return [delta * a + (1 - delta) * b for a, b in zip(difficulty, distribution, strict=True)]


def naive_update(old, shares, i, beta):
    if shares[i] is None:
        return old[i]
    inverse = [1 / share for share in shares if share is not None]
    return beta * old[i] + (1 - beta) / shares[i] / (sum(inverse) / len(inverse))


UNEQUAL = {"difficulty_momentum": 0.8, "distribution_momentum": 0.6, "difficulty_share": 0.3}


@pytest.mark.parametrize(
    "values", [{}, {"au_occurrence_rates": RATES}, UNEQUAL], ids=["plain", "rates", "unequal"]
)
def test_loss_weights_are_those_of_equations_13_to_15(values):
    model = make_fresh(**values).train()
    epochs = []
    for epoch in range(3):
        torch.testing.assert_close(model.loss_weights.tolist(), naive_weights(model.config, epochs))
        batches = []
        for seed, size in ((0, 4), (1, 6)):
            torch.manual_seed(10 * epoch + seed)
            inputs = TestLac().make_inputs(model.config, size)
            labels = torch.tensor([UNKNOWN, 0.0, 0.25, 1.0])[torch.randint(4, (size, 4))]
            labels[:, 3] = UNKNOWN if epoch == 1 else 0  # nothing known, or nothing occurs
            with torch.no_grad():
                for head in model.classifier.values():
                    head.bias.normal_(std=0.3)
            output = model(**inputs, labels=labels)
            batches.append((labels.tolist(), output.logits.tolist()))
        before = model.loss_weights
        epochs.append(batches)
        torch.testing.assert_close(model.loss_weights, before, rtol=0, atol=0)  # all through the epoch
        again = copy.deepcopy(model)
        again.break_off_epoch()
        again.end_of_epoch()
        torch.testing.assert_close(again.loss_weights, before, rtol=0, atol=0)
        model.end_of_epoch()
        assert (model.loss_weights - before).abs().max() > 1e-3
        after = model.loss_weights
        model.end_of_epoch()
        torch.testing.assert_close(model.loss_weights, after, rtol=0, atol=0)
    assert len(set(after.tolist())) == 4


def test_the_loss_weighs_by_them():
    model, inputs, labels = make(**NO_ROI_LOSS, first_answer_weight=0.0)
    for i, name in enumerate(model.statistics):
        model.statistics[name].epoch_weights.copy_(torch.tensor([1.0 + i, 3.0]))
        model.statistics[name].epochs.fill_(1)
    torch.testing.assert_close(model.loss_weights, torch.tensor([2.0, 2.5, 3.0, 3.5]))
    output = model(**inputs, labels=labels)
    torch.testing.assert_close(output.loss, weighted_asymmetric(output.logits, labels, model.loss_weights))
    fixed, _, _ = make(
        **NO_ROI_LOSS, first_answer_weight=0.0, au_loss_type="weighted", au_occurrence_rates=RATES
    )
    output = fixed(**inputs, labels=labels)
    expected = weighted_asymmetric(output.logits, labels, [1 / rate for rate in RATES])
    torch.testing.assert_close(output.loss, expected)


def test_evaluation_is_not_counted():
    model, inputs, labels = make()
    for module in (model, make(au_loss_type="weighted")[0].train()):
        for statistics in module.statistics.values():
            statistics.epoch_sums.zero_()
        module(**inputs, labels=labels)
        assert not any(statistics.epoch_sums.any() for statistics in module.statistics.values())


def test_state_of_the_running_epoch_survives_saving(tmp_path):
    model = make_fresh().train()
    inputs, labels = TestLac().make_inputs(model.config), TestLac().make_labels(model.config)
    model(**inputs, labels=labels), model.end_of_epoch(), model(**inputs, labels=labels)
    model.save_pretrained(tmp_path)
    loaded = LacForAUDetection.from_pretrained(tmp_path).train()
    for each in (model, loaded):
        each(**inputs, labels=labels), each.end_of_epoch()
    torch.testing.assert_close(loaded.loss_weights, model.loss_weights, rtol=0, atol=0)
    assert model.loss_weights.std() > 0
    half = LacForAUDetection.from_pretrained(tmp_path, dtype=torch.bfloat16)
    statistics = half.statistics["AU1"]
    assert statistics.epoch_weights.dtype == statistics.epoch_sums.dtype == torch.float32
    assert statistics.epochs.dtype == torch.int64
    new = model.adapt_to_aus([1, 26])
    assert new.loss_weights[0] == model.loss_weights[0]
    assert new.loss_weights[1] == 1  # as at its start


class Clips(torch.utils.data.Dataset):
    """Eight clips of two frames of noise."""

    def __init__(self, config):
        inputs = TestLac().make_inputs(config, 16) | {"labels": TestLac().make_labels(config, 16)}
        self.items = {name: value.unflatten(0, (8, 2)) for name, value in inputs.items()}

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {name: value[index] for name, value in self.items.items()}


def train_with_trainer(folder, resume=None, **values):
    model = make_fresh(**values)
    arguments = TrainingArguments(
        str(folder),
        num_train_epochs=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        learning_rate=1e-2,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=Clips(model.config),
        eval_dataset=Clips(model.config),
        callbacks=[EndOfEpochCallback()],
    )
    trainer.train(resume_from_checkpoint=resume)
    return model, trainer


def test_trainer_updates_weights_and_resumes_exactly(tmp_path):
    """Two optimiser steps an epoch; a checkpoint amid an epoch, at its end, and in the next one."""
    model, trainer = train_with_trainer(tmp_path / "run")
    assert model.statistics["AU1"].epochs == 2
    assert model.loss_weights.std() > 0
    prediction = trainer.predict(Clips(model.config))
    assert prediction.predictions.shape == (8, 2, 4)
    for step in (1, 2, 3):
        checkpoint = str(tmp_path / "run" / f"checkpoint-{step}")
        again, _ = train_with_trainer(tmp_path / "again", resume=checkpoint)
        for (name, value), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
            torch.testing.assert_close(other, value, rtol=0, atol=0, msg=f"{name} after step {step}")


def _worker(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    model = make_fresh().train()
    parallel = nn.parallel.DistributedDataParallel(model)
    inputs, labels = TestLac().make_inputs(model.config, 8), TestLac().make_labels(model.config, 8)
    for i in range(2):  # no step of the optimiser, so that one process can tell what comes out
        mine = slice(4 * i + 2 * rank, 4 * i + 2 * rank + 2)
        parallel(**{name: value[mine] for name, value in inputs.items()}, labels=labels[mine]).loss.backward()
    model.end_of_epoch()
    torch.save(model.loss_weights, f"{folder}/{rank}.pt")
    os._exit(0)  # freeing a gloo group right after a collective can deadlock on the interpreter lock


@pytest.mark.slow
def test_processes_agree_on_the_weights(tmp_path):
    torch.multiprocessing.spawn(_worker, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    model = make_fresh().train()
    inputs, labels = TestLac().make_inputs(model.config, 8), TestLac().make_labels(model.config, 8)
    for i in range(0, 8, 2):
        model(**{name: value[i : i + 2] for name, value in inputs.items()}, labels=labels[i : i + 2])
    model.end_of_epoch()
    torch.testing.assert_close(first, model.loss_weights)


# Compiling, autocast, learning.


def test_compiles_in_one_graph():
    model, inputs, labels = make()
    model.train()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(allow_rnn=True):
        expected, actual = (m(**inputs, labels=labels, output_au_attentions=True) for m in (model, compiled))
    torch.testing.assert_close(actual.loss, expected.loss)
    torch.testing.assert_close(actual.au_attentions, expected.au_attentions)
    for a, b in zip(model.buffers(), compiled.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_trains_under_autocast():
    model = make()[0].train()
    clips = make_clips(model)
    labels = TestLac().make_labels(model.config, 10).unflatten(0, (2, 5))
    exact = model(**clips, labels=labels).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**clips, labels=labels).loss
    torch.testing.assert_close(loss, exact, rtol=0.05, atol=0.05)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_learns_where_to_look():
    """The losses on regions alone draw similarity and features to the centres of active action units."""
    model = make_fresh(answer_weight=0.0, first_answer_weight=0.0, roi_ratio=0.25).train()
    inputs = TestLac().make_inputs(model.config, 4)
    inputs["au_centers"] = torch.full((4, 4, 2, 2), 3.5)
    inputs["au_centers"][:, 2:] = 27.5  # AU 1 and 4 show top left, 12 and 25 bottom right
    labels = torch.ones(4, 4, dtype=torch.int64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        loss = model(**inputs, labels=labels).loss
        loss.backward(), optimizer.step(), optimizer.zero_grad()
    output = model(**inputs, output_au_attentions=True, output_hidden_states=True)
    maps = output.au_attentions.detach()
    assert (maps[:, :2, 0, 0] > 0.75).all()
    assert (maps[:, 2:, 3, 3] > 0.75).all()
    magnitude = output.hidden_states[-1].norm(dim=1)
    relative = magnitude / magnitude.amax((1, 2), keepdim=True)
    assert relative[:, 0, 0].mean() > 0.7
    assert relative[:, 3, 3].mean() > 0.7
