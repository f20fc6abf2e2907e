"""ESCDA against its paper: sizes, equations written out naively, limits, and what the ensemble does."""

import math

import accelerate
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, Trainer, TrainingArguments

from actionunits import (
    EscdaConfig,
    EscdaForAUDetection,
    GdaConfig,
    GdaForAUDetection,
    LscConfig,
    LscForAUDetection,
)
from actionunits.models.escda import modeling_escda as escda
from references.escda import plain_gda, plain_lsc

from .test_modeling_common import AUS, AUModelTester

BACKBONE = {
    "image_size": 48,
    "stem_channels": 8,
    "stage_channels": [8, 8, 16],
    "stage_depths": [0, 1, 0],
    "downsample_expansion": [16, 16, 16],
    "residual_expansion": [16, 16, 16],
    "hidden_size": 16,
}
BRANCH = {"attention_channels": 16, "attention_head_dim": 8, "convolution_channels": 8, "mlp_channels": 16}


class TestGda(AUModelTester):
    model_class = GdaForAUDetection
    config = BACKBONE


class TestLsc(AUModelTester):
    model_class = LscForAUDetection
    config = BACKBONE | BRANCH
    has_attention = True
    without_gradient = ("key.bias",)  # adds the same to all scores of a query, which softmax takes away


class TestEscda(AUModelTester):
    model_class = EscdaForAUDetection
    config = {"lsc_config": BACKBONE | BRANCH, "gda_config": BACKBONE}
    has_attention = True
    without_gradient = ("key.bias",)

    def image_size(self, config):
        return config.lsc_config.image_size


def make(tester, **kwargs):
    model = tester().make_model(**kwargs)
    return model, tester().make_inputs(model.config)


# The variants of Tables 5 to 7, whose structure is Table 6.


@pytest.mark.parametrize(
    ("tester", "fields"),
    [
        pytest.param(TestLsc, {"constraint": "none"}, id="LS"),
        pytest.param(TestLsc, {"constraint": "fixed"}, id="LSC(fix)"),
        pytest.param(TestLsc, {"constraint": "adaptive"}, id="LSC"),
        pytest.param(TestGda, {"attention_directions": "vertical"}, id="UA"),
        pytest.param(TestGda, {"attention_directions": "horizontal"}, id="UA-horizontal"),
        pytest.param(TestGda, {"attention_directions": "dual"}, id="GDA"),
        pytest.param(TestEscda, {"ensemble": "voting"}, id="ESCDA-V"),
        pytest.param(TestEscda, {"ensemble": "average"}, id="ESCDA"),
    ],
)
def test_ablations_are_config_values(tester, fields, tmp_path):
    model, inputs = make(tester, **fields)
    model(**inputs, labels=tester().make_labels(model.config)).loss.backward()
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    for name, value in fields.items():
        assert getattr(loaded.config, name) == value
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)


# Size of the paper's networks (Table 4).


def on_meta(model_class, config):
    with torch.device("meta"):
        return model_class(config)


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


# The lineage's code makes layers that it never calls, and counts them; we leave them out.
DEAD_MIXCONV = 3 * (
    128 + 9 * 128 + 256 + 16 * 256 + 1024 + 6 * 512
)  # batch norm and PReLU after each MixConv
DEAD_GDA = (
    512 * 7 * 7 + 2 * 512 + 2 * 12
)  # a second global depthwise convolution; batch norm of the 12 logits


@pytest.mark.parametrize(
    ("model_class", "config", "dead", "counted"),
    [
        (GdaForAUDetection, GdaConfig(), DEAD_MIXCONV + DEAD_GDA, 4_129_020),
        (LscForAUDetection, LscConfig(), DEAD_MIXCONV, 27_249_344),
        (LscForAUDetection, LscConfig(mhca_head_dim=32), DEAD_MIXCONV, 27_677_888),
    ],
)
def test_parameters_of_the_paper(model_class, config, dead, counted):
    assert parameters(on_meta(model_class, config)) + dead == counted


def test_parameters_of_the_backbone_layer_by_layer():
    backbone = on_meta(GdaForAUDetection, GdaConfig()).backbone
    counted = [
        (backbone.stem[0], 1_920, 0),
        (backbone.stem[1], 768, 0),
        (backbone.stages[0][0], 23_576, 128),
        (backbone.stages[0][1:], 200_664, 9 * 128),
        (backbone.stages[1][0], 63_512, 256),
        (backbone.stages[1][1:], 1_237_376, 16 * 256),
        (backbone.stages[2][0], 542_304, 1024),
        (backbone.stages[2][1:], 1_833_024, 6 * 512),
        (backbone.last, 132_608, 0),
    ]
    for layer, with_dead, mixed_channels in counted:
        assert parameters(layer) == with_dead - 3 * mixed_channels


@pytest.mark.parametrize(
    ("model_class", "config", "billions"),
    [(GdaForAUDetection, GdaConfig(), 4.512), (LscForAUDetection, LscConfig(), 13.671)],
)
def test_multiply_adds_of_the_paper(model_class, config, billions):
    """Eight pictures of 112 x 112, counted as fvcore does: multiply-adds of convolutions and matrix products,
    five a number that enters a batch normalisation in training mode, one a number that enters a mean.
    """
    model = on_meta(model_class, config).train()
    extra = 0

    def count(module, args):
        nonlocal extra
        if isinstance(module, nn.BatchNorm2d):
            extra += 5 * args[0].numel()
        elif isinstance(module, escda.CoordinateAttention):
            extra += 2 * args[0].numel()

    for module in model.modules():
        module.register_forward_pre_hook(count)
    with FlopCounterMode(display=False) as flops:
        model(torch.empty(8, 3, 112, 112, device="meta"), torch.empty(8, 12, 2, 2, device="meta"))
    assert (flops.get_total_flops() / 2 + extra) / 1e9 == pytest.approx(billions, abs=0.001)


def test_kernel_splits_of_the_lineage():
    split = escda.split_channels
    assert split(128, [2, 1, 1]) == [64, 32, 32]
    assert split(128, [3, 1]) == [96, 32]
    assert split(256, [3, 1]) == [192, 64]
    assert split(1024, [1, 1, 1, 1]) == [256, 256, 256, 256]
    assert split(512, [1, 1, 1]) == [172, 170, 170]
    convs = on_meta(GdaForAUDetection, GdaConfig()).backbone.stages[2][0].mix.convs
    assert [conv.kernel_size for conv in convs] == [(3, 3), (5, 5), (7, 7), (9, 9)]


def test_map_of_the_paper():
    assert GdaConfig().map_size == 7
    model = on_meta(GdaForAUDetection, GdaConfig()).eval()
    maps = model(torch.empty(1, 3, 112, 112, device="meta"), output_hidden_states=True).hidden_states
    assert [tuple(x.shape[1:]) for x in maps] == [
        (64, 56, 56),
        (64, 28, 28),
        (128, 14, 14),
        (256, 7, 7),
        (512, 7, 7),
    ]


@pytest.mark.parametrize("image_size", [33, 40, 48, 50])
def test_map_size_of_any_picture(image_size):
    model = GdaForAUDetection(GdaConfig(**BACKBONE | {"image_size": image_size})).eval()
    hidden_states = model(torch.randn(1, 3, image_size, image_size), output_hidden_states=True).hidden_states
    assert hidden_states[-1].shape[-2:] == (model.config.map_size, model.config.map_size)


def test_compact_networks_are_small():
    aus = [1, 2, 4, 5, 6, 7, 9, 10, 12, 14, 15, 17, 20, 23, 24, 25, 26]
    model = on_meta(EscdaForAUDetection, EscdaConfig.compact(aus=aus)).eval()
    assert 300_000 < parameters(model.gda) < 600_000
    assert parameters(model.lsc) < 2_500_000
    assert 2 * parameters(model) < 8e6, "bytes in half precision"
    with FlopCounterMode(display=False) as flops:
        model.gda(torch.empty(1, 3, 112, 112, device="meta"))
    assert flops.get_total_flops() / 2 < 40e6
    assert model.lsc.config == LscConfig.compact(aus=aus)
    assert model.gda.config == GdaConfig.compact(aus=aus)
    assert GdaConfig.compact(hidden_size=64).hidden_size == 64


# The networks against plain ones.


@pytest.mark.parametrize("training", [False, True], ids=["evaluating", "training"])
@pytest.mark.parametrize(
    ("config", "plain"),
    [
        pytest.param(GdaConfig(aus=AUS, **BACKBONE), plain_gda, id="GDA"),
        pytest.param(LscConfig(aus=AUS, **BACKBONE, **BRANCH, mask_sigma=1.3), plain_lsc, id="LSC"),
        pytest.param(
            LscConfig(aus=AUS, **BACKBONE, **BRANCH, constraint="fixed", mhca_head_dim=4),
            plain_lsc,
            id="LSC(fix), MHCA by heads",
        ),
    ],
)
def test_outputs_and_gradients_equal_the_plain_network(config, plain, training):
    torch.manual_seed(5)
    model = AutoModel.from_config(config).double().train(training)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor += 0.2 * torch.rand_like(tensor)  # variances stay positive
    named = {name: value.detach().clone() for name, value in model.state_dict().items()}
    learned = {name: named[name].requires_grad_() for name, _ in model.named_parameters()}
    pixel_values = torch.randn(3, 3, 48, 48, dtype=torch.float64)
    centers = 48 * torch.rand(3, len(AUS), 2, 2, dtype=torch.float64)
    expected = plain(config, named, pixel_values, centers, training)
    actual = model(pixel_values, centers).logits
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    target = torch.randn_like(actual)
    ((actual - target) ** 2).sum().backward()
    gradients = torch.autograd.grad(((expected - target) ** 2).sum(), list(learned.values()))
    scale = max(gradient.abs().max() for gradient in gradients)
    for name, gradient in zip(learned, gradients, strict=True):
        got = model.get_parameter(name).grad
        torch.testing.assert_close(got / scale, gradient / scale, rtol=1e-9, atol=1e-9, msg=name)


# Local self-attention constraining (Eqs. 1-6).


def naive_constrained_attention(attention, x, gaussian):
    """Eqs. 3-6 for one picture, query by query: tokens (n, C), M~ (n,) -> (n, C)."""
    d, heads = attention.head_dim, x.shape[1] // attention.head_dim
    q, k, v = (
        x @ linear.weight.T + linear.bias for linear in (attention.query, attention.key, attention.value)
    )
    epsilon = math.log1p(math.exp(attention.raw_epsilon.item()))
    rows = []
    for i in range(len(x)):
        row = []
        for head in range(heads):
            part = slice(head * d, (head + 1) * d)
            exponentials = [math.exp(q[i, part] @ k[j, part] / math.sqrt(d)) for j in range(len(x))]
            result = torch.zeros(d, dtype=x.dtype)
            for j in range(len(x)):
                mask = (gaussian[j].item() + epsilon) / (1 + epsilon)  # Eq. 3
                result += exponentials[j] / sum(exponentials) * mask * v[j, part]  # Eqs. 4-6
            row.append(result)
        rows.append(torch.cat(row))
    return torch.stack(rows) @ attention.output.weight.T + attention.output.bias


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_is_eqs_3_to_6(implementation):
    torch.manual_seed(0)
    config = LscConfig(**BACKBONE, **BRANCH, attn_implementation=implementation)
    attention = escda.ConstrainedSelfAttention(config).double()
    nn.init.constant_(attention.raw_epsilon, -0.7)
    x, gaussian = torch.randn(2, 9, 16, dtype=torch.double), torch.rand(2, 9, dtype=torch.double)
    with torch.no_grad():
        actual, _, mask = attention(x, gaussian)
        expected = torch.stack(
            [naive_constrained_attention(attention, *pair) for pair in zip(x, gaussian, strict=True)]
        )
    torch.testing.assert_close(actual, expected)
    assert mask.max() <= 1
    assert torch.autograd.gradcheck(lambda *args: attention(*args)[0], (x.requires_grad_(), gaussian))


def test_mask_is_eqs_1_to_3():
    model, inputs = make(TestLsc, mask_sigma=0.8)
    output = model(**inputs, output_au_attentions=True)
    size, input_size = model.config.map_size, model.config.image_size
    epsilon = model.branches["AU12"].block.attention.epsilon.item()
    centers = (inputs["au_centers"][1, 2] + 0.5) * size / input_size - 0.5  # of AU12, in cells
    for b in range(size):
        for a in range(size):
            gaussian = max(
                math.exp(-((a - x) ** 2 + (b - y) ** 2) / (2 * 0.8**2)) for x, y in centers.tolist()
            )
            assert output.au_masks[1, 2, b, a].item() == pytest.approx(
                (gaussian + epsilon) / (1 + epsilon), 1e-4
            )


def test_maps_are_the_rows_of_figure_4():
    model, inputs = make(TestLsc)
    output = model(**inputs, output_au_attentions=True, output_attentions=True)
    size = model.config.map_size
    assert output.au_attentions.shape == (3, len(AUS), size, size)
    assert len(output.attentions) == len(AUS)
    assert output.attentions[0].shape == (3, 2, size**2, size**2)
    torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(3, 2, size**2))
    before = output.attentions[2].mean((1, 2)).unflatten(1, (size, size))  # each row over keys sums to one
    torch.testing.assert_close(output.au_attentions_unconstrained[:, 2], before)
    torch.testing.assert_close(output.au_attentions_unconstrained.sum((2, 3)), torch.ones(3, len(AUS)))
    # The mask acts after the softmax, without renormalisation (Eq. 5).
    torch.testing.assert_close(output.au_attentions, output.au_attentions_unconstrained * output.au_masks)
    assert (output.au_attentions.sum((2, 3)) < 1).all()


@pytest.mark.parametrize(("constraint", "raw_epsilon"), [("none", 1e7), ("fixed", -1e3)])
def test_limits_of_epsilon_are_the_ablations(constraint, raw_epsilon):
    """LSC with an infinite epsilon is LS, with epsilon 0 it is LSC^fix (Table 6)."""
    model, inputs = make(TestLsc)
    for branch in model.branches.values():
        nn.init.constant_(branch.block.attention.raw_epsilon, raw_epsilon)
    ablation = LscForAUDetection(TestLsc().make_config(constraint=constraint)).eval()
    missing, unexpected = ablation.load_state_dict(model.state_dict(), strict=False)
    assert not missing
    assert all(name.endswith("raw_epsilon") for name in unexpected)
    assert not torch.allclose(ablation(**inputs).logits, make(TestLsc)[0](**inputs).logits, atol=1e-4)
    torch.testing.assert_close(ablation(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_epsilon_starts_as_configured_and_stays_positive():
    model = LscForAUDetection(TestLsc().make_config(epsilon_init=0.25))
    attention = model.branches["AU4"].block.attention
    assert attention.epsilon.item() == pytest.approx(0.25)
    nn.init.constant_(attention.raw_epsilon, -50.0)
    assert attention.epsilon.item() >= 0


def test_each_action_unit_sees_its_own_centres():
    model, inputs = make(TestLsc, mask_sigma=0.5)
    before = model(**inputs).logits
    inputs["au_centers"][:, 1] = 0.0
    changed = (model(**inputs).logits - before).abs().amax(0)
    assert changed[1] > 1e-4
    assert changed[[0, 2, 3]].max() == 0


def test_lsc_without_constraint_needs_no_centres():
    model, inputs = make(TestLsc, constraint="none")
    output = model(inputs["pixel_values"], output_au_attentions=True)
    assert output.au_masks is None
    torch.testing.assert_close(output.au_attentions.sum((2, 3)), torch.ones(3, len(AUS)))


def test_lsc_says_what_is_wrong_with_the_centres():
    model, inputs = make(TestLsc)
    with pytest.raises(ValueError, match="au_centers is missing.*GDA, which needs none"):
        model(inputs["pixel_values"])
    with pytest.raises(ValueError, match=r"\(3, 3, 2, 2\), expected \(3, 4, 2, 2\).*AU1, AU4, AU12, AU25"):
        model(inputs["pixel_values"], inputs["au_centers"][:, :3])
    with pytest.raises(ValueError, match=r"\(1, 4, 2, 2\), expected \(3, 4, 2, 2\)"):
        model(inputs["pixel_values"], inputs["au_centers"][:1])


@pytest.mark.parametrize("model_class", [GdaForAUDetection, LscForAUDetection])
def test_a_batch_of_one_cannot_be_trained_on(model_class):
    fields = BACKBONE if model_class is GdaForAUDetection else BACKBONE | BRANCH
    model = model_class(model_class.config_class.compact(**fields))
    inputs = torch.zeros(1, 3, 48, 48), torch.zeros(1, len(model.config.aus), 2, 2)
    assert model.eval()(*inputs).logits.isfinite().all()
    with pytest.raises(ValueError, match="dataloader_drop_last=True.*per_device_eval_batch_size=1"):
        model.train()(*inputs)


def test_the_remedy_for_a_last_batch_of_one_loses_no_evaluated_picture(tmp_path):
    model = GdaForAUDetection(GdaConfig.compact(**BACKBONE, aus=[1, 12]))
    faces = [{"pixel_values": torch.zeros(3, 48, 48), "labels": torch.ones(2)}] * 3
    arguments = TrainingArguments(
        str(tmp_path),
        num_train_epochs=1,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=1,
        dataloader_drop_last=True,
        use_cpu=True,
    )
    trainer = Trainer(model, arguments, train_dataset=faces)
    assert trainer.train().global_step == 1
    assert len(trainer.predict(faces).predictions) == 3


def test_wrong_picture_size():
    model, _ = make(TestGda)
    with pytest.raises(ValueError, match=r"\(64, 48\) pixels, but the model expects 48 x 48"):
        model(torch.zeros(1, 3, 64, 48))


# Global dual-directional attention, and the blocks of the backbone.


def naive_directional_weights(weights, rows, columns):
    """Coordinate attention's weights written with matrices: (C, h), (C, w) -> the same."""
    y = torch.cat([rows, columns], 1)
    y = weights.narrow.weight[:, :, 0, 0] @ y + weights.narrow.bias[:, None]
    y = weights.norm(y[None, :, :, None])[0, :, :, 0]
    y = y * (y + 3).clamp(0, 6) / 6  # h_swish
    parts = y[:, : rows.shape[1]], y[:, rows.shape[1] :]
    return [
        torch.sigmoid(widen.weight[:, :, 0, 0] @ part + widen.bias[:, None])
        for widen, part in zip(weights.widen, parts, strict=True)
    ]


def test_global_attention_is_section_3_2():
    model, _ = make(TestGda)
    attention = model.attention
    x = torch.randn(1, 16, 3, 3)
    vertical, horizontal = attention.summaries["vertical"], attention.summaries["horizontal"]
    rows = torch.einsum("chw,cw->ch", x[0], vertical.conv.weight[:, 0, 0])
    columns = torch.einsum("chw,ch->cw", x[0], horizontal.conv.weight[:, 0, :, 0])
    rows = vertical.norm(rows[None, :, :, None])[0, :, :, 0]
    columns = horizontal.norm(columns[None, :, :, None])[0, :, :, 0]
    a_h, a_w = naive_directional_weights(attention.weights, rows, columns)
    torch.testing.assert_close(attention(x)[0], a_h[:, :, None] * a_w[:, None, :])


def test_coordinate_attention():
    torch.manual_seed(0)
    attention = escda.CoordinateAttention(16, reduction=4).eval()
    x = torch.randn(1, 16, 5, 7)
    a_h, a_w = naive_directional_weights(attention.weights, x[0].mean(2), x[0].mean(1))
    torch.testing.assert_close(attention(x)[0], x[0] * a_h[:, :, None] * a_w[:, None, :])


def test_mixed_convolution_is_a_convolution_with_padded_kernels():
    torch.manual_seed(0)
    mix = escda.MixedDepthwiseConv(8, [2, 1, 1], stride=2)
    kernels = torch.zeros(8, 1, 7, 7)
    kernels[:4, :, 2:5, 2:5] = mix.convs[0].weight
    kernels[4:6, :, 1:6, 1:6] = mix.convs[1].weight
    kernels[6:] = mix.convs[2].weight
    x = torch.randn(2, 8, 9, 9)
    torch.testing.assert_close(mix(x), F.conv2d(x, kernels, stride=2, padding=3, groups=8))


@pytest.mark.parametrize(("directions", "constant_axis"), [("vertical", 3), ("horizontal", 2)])
def test_unidirectional_attention_is_constant_along_the_other_axis(directions, constant_axis):
    model, inputs = make(TestGda, attention_directions=directions)
    attention = model.attention(torch.randn(2, 16, 3, 3))
    assert attention.var(constant_axis).max() == 0
    assert attention.var(5 - constant_axis).min() > 0
    assert parameters(model) < parameters(make(TestGda)[0])


def test_evidence_adds_up_to_the_logits():
    model, inputs = make(TestGda)
    output = model(**inputs, output_au_attentions=True)
    constant = model.classifier(model.pool(torch.zeros(1, 16, 3, 3)).flatten(1))
    torch.testing.assert_close(output.au_evidence.sum((2, 3)) + constant, output.logits)
    assert output.au_evidence.std(dim=1).min() > 0, "differs from action unit to action unit"
    assert (output.au_attentions[:, :1] == output.au_attentions).all(), "shared by all action units"


def test_evidence_heeds_an_adapter_of_the_pooling():
    """One that mixes channels, as LoRA's matrices do."""
    model, inputs = make(TestGda)
    model.pool.conv = AdaptedConv(model.pool.conv)
    output = model(**inputs, output_au_attentions=True)
    constant = model.classifier(model.pool(torch.zeros(1, 16, 3, 3)).flatten(1))
    torch.testing.assert_close(output.au_evidence.sum((2, 3)) + constant, output.logits)


class AdaptedConv(nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.conv, self.beside = conv, nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size)

    def forward(self, x):
        return self.conv(x) + self.beside(x)


def test_prelu_is_that_of_torch():
    torch.manual_seed(0)
    ours, theirs = escda.PReLU(5), nn.PReLU(5)
    nn.init.normal_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 5, 3, 3)
    x[0, 0, 0, 0] = 0
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for prelu, value in zip((ours, theirs), inputs, strict=True):
        (prelu(value) ** 2).sum().backward()
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)


# Ensemble.


def test_ensemble_averages_probabilities():
    model, inputs = make(TestEscda)
    output = model(**inputs)
    assert output.branch_logits.shape == (3, 2, len(AUS))
    torch.testing.assert_close(output.logits.sigmoid(), output.branch_logits.sigmoid().mean(1))


def test_average_of_probabilities_in_log_space():
    a, b = (10 * torch.randn(200, dtype=torch.double) for _ in range(2))
    mean = (a.sigmoid() + b.sigmoid()) / 2
    actual = escda.mean_probability_logits(a.float(), b.float())
    torch.testing.assert_close(actual.double(), torch.log(mean / (1 - mean)), rtol=1e-4, atol=1e-4)
    precise = escda.mean_probability_logits(a / 10, b / 10)  # where the naive form loses nothing either
    mean = ((a / 10).sigmoid() + (b / 10).sigmoid()) / 2
    torch.testing.assert_close(precise, torch.log(mean / (1 - mean)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (1e4, 1e4, 1e4),
        (-1e4, -1e4, -1e4),
        (1e4, -1e4, 0.0),
        (300.0, 0.0, math.log(3)),
        (0.0, -300.0, -math.log(3)),
    ],
)
def test_average_of_extreme_probabilities(a, b, expected):
    a, b = torch.tensor(a, requires_grad=True), torch.tensor(b, requires_grad=True)
    logits = escda.mean_probability_logits(a, b)
    logits.backward()
    assert logits.item() == pytest.approx(expected, abs=1e-4)
    assert a.grad.isfinite()
    assert b.grad.isfinite()


def test_voting_takes_the_larger_probability():
    model, inputs = make(TestEscda, ensemble="voting")
    output = model(**inputs)
    torch.testing.assert_close(output.logits.sigmoid(), output.branch_logits.sigmoid().amax(1))


def test_ensemble_of_trained_networks():
    lsc, inputs = make(TestLsc, au_occurrence_rates=[0.1, 0.2, 0.3, 0.4])
    gda, _ = make(TestGda, au_occurrence_rates=[0.1, 0.2, 0.3, 0.4])
    labels = TestLsc().make_labels(lsc.config)
    lsc.config.name_or_path = gda.config.name_or_path = "runs"
    model = EscdaForAUDetection.from_networks(lsc.train(), gda.train(), au_thresholds=[0.4, 0.5, 0.6, 0.7])
    assert not model.training
    assert model.config.lsc_config.name_or_path == model.config.gda_config.name_or_path == ""
    asked = {"output_au_attentions": True, "output_hidden_states": True, "output_attentions": True}
    output, local, whole = (m(**inputs, labels=labels, **asked) for m in (model, lsc.eval(), gda.eval()))
    torch.testing.assert_close(
        output.branch_logits, torch.stack([local.logits, whole.logits], 1), rtol=0, atol=0
    )
    torch.testing.assert_close(output.loss, local.loss + whole.loss)
    torch.testing.assert_close(output.au_attentions, local.au_attentions)
    torch.testing.assert_close(output.au_evidence, whole.au_evidence)
    torch.testing.assert_close(output.hidden_states, local.hidden_states)
    torch.testing.assert_close(output.attentions, local.attentions)
    assert model.config.au_thresholds == [0.4, 0.5, 0.6, 0.7]
    assert model.config.au_occurrence_rates == [0.1, 0.2, 0.3, 0.4]
    assert lsc.config.au_thresholds is None


def test_networks_for_different_action_units_do_not_go_together():
    lsc, gda = (
        LscForAUDetection(TestLsc().make_config()),
        GdaForAUDetection(TestGda().make_config(aus=[1, 12])),
    )
    with pytest.raises(ValueError, match=r"gda_config names \['AU1', 'AU12'\].*same action units"):
        EscdaForAUDetection.from_networks(lsc, gda)


@pytest.mark.parametrize(("model_class", "prefix"), [(LscForAUDetection, "lsc"), (GdaForAUDetection, "gda")])
def test_one_network_loads_from_the_ensemble(model_class, prefix, tmp_path):
    model, inputs = make(TestEscda)
    model.save_pretrained(tmp_path)
    network, info = model_class.from_pretrained(
        tmp_path, key_mapping={rf"^{prefix}\.": ""}, output_loading_info=True
    )
    assert not info["missing_keys"]
    expected = getattr(model, prefix)(**inputs).logits
    torch.testing.assert_close(network(**inputs).logits, expected)


# Configurations.


def test_ensemble_config_keeps_its_networks_in_step():
    config = EscdaConfig(lsc_config=BACKBONE | BRANCH, gda_config=BACKBONE, au_occurrence_rates=[0.1] * 12)
    assert config.lsc_config.au_occurrence_rates == [0.1] * 12
    config.aus = [12, 1]
    assert config.gda_config.aus == config.lsc_config.aus == [12, 1]
    assert config.gda_config.au_occurrence_rates == [0.1, 0.1]
    config.au_occurrence_rates = [0.2, 0.3]
    assert config.lsc_config.au_occurrence_rates == [0.2, 0.3]
    config.num_labels = 3
    assert config.lsc_config.num_labels == 3


def test_ensemble_config_takes_the_networks_action_units():
    assert EscdaConfig(gda_config={"aus": [4]}).lsc_config.aus == [4]
    assert EscdaConfig(lsc_config=LscConfig(aus=[9, 10])).aus == [9, 10]
    with pytest.raises(ValueError, match=r"lsc_config names \['AU4'\], the ensemble \['AU1'\]"):
        EscdaConfig(aus=[1], lsc_config={"aus": [4]})


def test_ensemble_config_overrides_fields_of_a_network(tmp_path):
    EscdaConfig(lsc_config=BACKBONE | BRANCH, gda_config=BACKBONE, aus=AUS).save_pretrained(tmp_path)
    config = EscdaConfig.from_pretrained(tmp_path, lsc_config={"mask_sigma": 1.0}, aus=[12])
    assert config.lsc_config.mask_sigma == 1.0
    assert config.lsc_config.hidden_size == 16
    assert config.lsc_config.aus == config.gda_config.aus == [12]


@pytest.mark.parametrize(
    ("config_class", "fields", "message"),
    [
        (GdaConfig, {"stage_depths": [1, 2]}, "'stage_depths': 2"),
        (GdaConfig, {"attention_directions": "diagonal"}, "attention_directions"),
        (LscConfig, {"constraint": "hard"}, "constraint"),
        (LscConfig, {"attention_channels": 100}, "attention_channels=100, attention_head_dim=32"),
        (LscConfig, {"mhca_head_dim": 48}, "convolution_channels=128, mhca_head_dim=48"),
        (LscConfig, {"mask_sigma": 0}, "mask_sigma=0"),
        (LscConfig, {"epsilon_init": -1.0}, "epsilon_init=-1.0"),
        (LscConfig, {"hidden_size": "512"}, "hidden_size"),
        (EscdaConfig, {"ensemble": "stacking"}, "ensemble"),
    ],
)
def test_configurations_that_make_no_sense(config_class, fields, message):
    with pytest.raises(Exception, match=message):
        config_class(**fields)


def test_evidence_of_offloaded_statistics():
    tester = TestGda()
    model = tester.make_model()
    inputs = tester.make_inputs(model.config)
    expected = model(**inputs, output_au_attentions=True).au_evidence
    accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=True)
    actual = model(**inputs, output_au_attentions=True).au_evidence
    torch.testing.assert_close(actual, expected)
