"""AC2D against its paper: sizes, a plain implementation with the same weights, ablations, prototypes."""

import copy
import io
import itertools
import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer, TrainingArguments

from actionunits.action_units import CORPUS_AUS
from actionunits.callbacks import EndOfEpochCallback
from actionunits.models.ac2d import Ac2dConfig, Ac2dForAUDetection
from actionunits.models.ac2d import modeling_ac2d as ac2d
from actionunits.models.ac2d.configuration_ac2d import ABLATIONS
from actionunits.models.ac2d.convert_ac2d_to_hf import authors_name, convert
from references.ac2d import Ac2dReference, attention_loss, au_loss, predefined_attention

from .test_modeling_common import AUS, AUModelTester

TINY = {
    "image_size": 32,
    "stem_channels": 4,
    "hidden_sizes": [8, 8, 8],
    "depths": [1, 1, 2],
    "num_heads": [1, 2, 2],
    "mlp_ratio": 2,
    "query_ratio": 2,
    "drop_path_rate": 0.0,
    "constraint_weight": 1.0,
    "attention_sigma": 1.0,
}
TINY_REFERENCE = {
    "stem": 4,
    "dims": (8, 8, 8),
    "depths": (1, 1, 2),
    "heads": (1, 2, 2),
    "mlp_ratio": 2,
    "query_size": 16,
    "intervention_size": 8,
}
RATES = [0.1, 0.2, 0.3, 0.4]
SINGLE_KEY = (
    "intervention.query.weight",
    "intervention.query.bias",
    "intervention.key.weight",
    "intervention.key.bias",
)


class TestAc2d(AUModelTester):
    model_class = Ac2dForAUDetection
    config = TINY
    has_attention = True
    without_gradient = SINGLE_KEY  # the weight of a single prototype is 1, whatever they say

    def make_model(self, **kwargs):
        model = super().make_model(**kwargs)
        model.end_of_epoch([self.make_inputs(model.config, 8)])
        return model.eval()


class TestSharedDeconfounding(TestAc2d):
    config = TINY | {"deconfounding": "shared", "constraint": "each"}
    without_gradient = ("intervention.key.bias",)  # adds the same to all scores of a query


class TestBackboneNet(AUModelTester):
    model_class = Ac2dForAUDetection
    config = TINY | ABLATIONS["B-Net"]
    has_attention = True


def make(**kwargs):
    model = TestAc2d().make_model(**kwargs)
    tester = TestAc2d()
    return model, tester.make_inputs(model.config), tester.make_labels(model.config)


# Sizes of the paper's network.


@pytest.mark.parametrize(
    ("aus", "values", "expected"),
    [
        (12, {}, 3_625_196),
        (10, {}, 3_095_146),
        (8, {}, 2_565_096),
        (12, {"intervention_ratio": 8}, 4_329_452),
        (12, ABLATIONS["A^v-Net"], 3_625_196 - 12 * 74_880),
    ],
)
def test_parameters(aus, values, expected):
    names = {12: "bp4d", 10: "gft", 8: "disfa"}
    with torch.device("meta"):
        model = Ac2dForAUDetection(Ac2dConfig(aus=list(CORPUS_AUS[names[aus]]), **values))
    assert model.num_parameters() == expected


@pytest.mark.parametrize(("size", "expected"), [(176, 4.52e9), (224, 9.61e9)])
def test_multiply_adds(size, expected):
    """Convolutions and matrices as PyTorch counts them, and normalisations as fvcore does."""
    normalised = []
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = Ac2dForAUDetection(Ac2dConfig(image_size=size)).eval()
        for module in model.modules():
            if isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
                module.register_forward_hook(
                    lambda m, i, o: normalised.append((5 if m.__class__ is nn.LayerNorm else 2) * o.numel())
                )
        model(torch.empty(1, 3, size, size))
    total = counter.get_total_flops() / 2 + sum(normalised)
    assert total == pytest.approx(expected, abs=0.005e9)


def test_no_config_makes_another_trunk():
    config = Ac2dConfig()
    assert config.map_sizes == [88, 44, 22]
    flat = [rate for stage in config.drop_path_rates for rate in stage]
    assert flat == pytest.approx(torch.linspace(0, 0.1, 10).tolist())
    with torch.device("meta"):
        model = Ac2dForAUDetection(config)
    for branch in model.branches.values():
        blocks = [*model.trunk.stage1, *model.trunk.stage2, *branch.blocks]
        assert [block.drop_path.rate for block in blocks] == flat


# The plain implementation with the same weights.


def make_pair(dtype, **values):
    """A reference with random weights and prototypes, and the model converted from it."""
    torch.manual_seed(3)
    reference = Ac2dReference(4, **TINY_REFERENCE)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    prototypes = torch.randn(4, 8)
    snapshot = {"model": reference.state_dict(), "K_data": prototypes, "V_data": prototypes, "P_data": 0.01}
    config = Ac2dConfig(
        **TINY | {"aus": AUS, "au_occurrence_rates": RATES, "constraint_weight": 30.0} | values
    )
    return reference.to(dtype), convert(snapshot, config).to(dtype), prototypes.to(dtype)


def data(dtype, batch=3):
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randn(batch, 3, 32, 32, generator=generator, dtype=dtype)
    centers = torch.rand(batch, 4, 2, 2, generator=generator, dtype=dtype) * 32
    return pixels, centers, torch.randint(0, 2, (batch, 4), generator=generator)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("constraint", ["average", "each", "none"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_outputs_and_gradients_equal_the_plain_implementation(dtype, tolerance, constraint, train):
    reference, model, prototypes = make_pair(dtype, constraint=constraint)
    pixels, centers, labels = data(dtype)
    reference.train(train), model.train(train)
    features, attentions, logits = reference(pixels, prototypes, prototypes)
    expected = au_loss(logits, labels, RATES)
    if constraint != "none":
        loss = attention_loss(attentions, centers, 32, sigma=1.0, each=constraint == "each")
        assert loss > 0.001
        expected = expected + 30 * loss
    output = model(pixels, centers, labels, output_au_attentions=True, output_attentions=True)
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(output.logits, logits, **close)
    torch.testing.assert_close(output.loss, expected, **close)
    torch.testing.assert_close(torch.stack(output.attentions, 1), attentions, **close)
    torch.testing.assert_close(output.au_attentions.flatten(2), attentions.mean((2, 3)), **close)

    expected.backward(), output.loss.backward()
    theirs = {name: p.grad for name, p in reference.named_parameters()}
    gradients = convert_gradients(theirs, model)
    assert len(gradients) == len(theirs)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, gradients[name], **close, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("output_au_attentions", [False, True])
def test_gradient_can_be_asked_of_attentions(output_au_attentions):
    _, model, _ = make_pair(torch.float64)
    wanted = {"output_au_attentions": output_au_attentions, "output_attentions": True}
    output = model.eval()(*data(torch.float64)[:2], **wanted)
    gradients = torch.autograd.grad(output.logits.sum(), output.attentions, retain_graph=True)
    for branch, attention, gradient in zip(
        model.branches.values(), output.attentions, gradients, strict=True
    ):
        query = branch.blocks[-2].attention.query.weight  # acts on the answer through the attention alone
        (expected,) = torch.autograd.grad(output.logits.sum(), query, retain_graph=True)
        (actual,) = torch.autograd.grad(attention, query, gradient, retain_graph=True)
        assert expected.any()
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_traced_network_can_be_saved():
    model, inputs, _ = make()
    model.requires_grad_(False)
    traced = torch.jit.trace(model, tuple(inputs.values()), strict=False, check_trace=False)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)(*inputs.values())
    torch.testing.assert_close(loaded["logits"], model(**inputs).logits)


def convert_gradients(gradients, model):
    """Gradients of the reference under the model's names."""
    names = {name: authors_name(name, model.config) for name, _ in model.named_parameters()}
    return {name: gradients[theirs] for name, theirs in names.items()}


def test_predefined_attention_is_that_of_the_paper():
    model, inputs, _ = make()
    masks = model(**inputs, output_au_attentions=True).au_masks
    for i, j in itertools.product(range(3), range(4)):
        expected = predefined_attention(inputs["au_centers"][i, j], 4, 32, 1.0).float()
        torch.testing.assert_close(masks[i, j], expected)
    exact, _, _ = make(round_centers=False)
    assert (exact(**inputs, output_au_attentions=True).au_masks - masks).abs().max() > 0.01


def test_evidence_sums_to_the_logit_up_to_a_constant():
    for values in ({}, {"deconfounding_start": "second_epoch"}, {"deconfounding": "none"}):
        model, inputs, _ = make(**values)
        output = model(**inputs, output_au_attentions=True)
        constant = output.logits - output.au_evidence.sum((2, 3))
        torch.testing.assert_close(constant, constant[:1].expand(3, -1), rtol=1e-4, atol=1e-5)
        assert output.logits.std(0).min() > 1e-4


@pytest.mark.parametrize("values", [{}, {"key_reductions": [4, 2, 2]}, {"deconfounding": "shared"}], ids=str)
@pytest.mark.parametrize("start", ["immediately", "second_epoch"])
def test_evidence_is_what_a_place_adds_to_the_logit(values, start):
    """By its derivative with respect to a factor of each token after the last normalisation."""
    # in its first epoch, with weights that count
    model = make_fresh(deconfounding_start=start, initializer_range=0.5, **values).eval()
    inputs, factors = TestAc2d().make_inputs(model.config), {}

    def weigh(norm, args, tokens):
        factors[norm] = torch.ones(tokens.shape[:2], requires_grad=True)
        return tokens * factors[norm][..., None]

    for branch in model.branches.values():
        branch.norm.register_forward_hook(weigh)
    output = model(**inputs, output_au_attentions=True)
    shares = torch.autograd.grad(output.logits.sum(), list(factors.values()))
    torch.testing.assert_close(output.au_evidence, torch.stack(shares, 1).view(3, 4, 4, 4))


# Attention that is summed up and never whole.


@pytest.mark.parametrize("budget", [1, 200, 10**6])
def test_summarized_attention_equals_materialised(monkeypatch, budget):
    monkeypatch.setitem(ac2d._CHUNK_ELEMENTS, "cpu", budget)
    query, key, value = (torch.randn(5, 2, n, 3, dtype=torch.float64, requires_grad=True) for n in (7, 6, 6))
    assert torch.autograd.gradcheck(
        lambda *qkv: ac2d.SummarizedAttention.apply(*qkv, 0.6, True), (query, key, value)
    )
    attended, mean, mean_log = ac2d.SummarizedAttention.apply(query, key, value, 0.6, True)
    weights = torch.softmax(0.6 * query @ key.transpose(2, 3), -1)
    torch.testing.assert_close(attended, weights @ value)
    torch.testing.assert_close(mean, weights.mean((1, 2)))
    torch.testing.assert_close(mean_log, weights.log().mean((1, 2)))
    assert ac2d.SummarizedAttention.apply(query, key, value, 0.6, False)[2] is None


def test_no_step_of_training_holds_all_attention_weights(monkeypatch):
    """The largest tensor that training makes stays far below the weights (B, k, n, n) of one block."""
    monkeypatch.setitem(ac2d._CHUNK_ELEMENTS, "cpu", 1)
    model, _, labels = make(image_size=80, num_heads=[1, 2, 4])
    inputs = TestAc2d().make_inputs(model.config, batch_size=3)
    sizes = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor):
                    sizes.append((tensor.shape, tensor.numel()))
            return result

    with Record():
        model(**inputs, labels=labels).loss.backward()
    squares = [shape for shape, _ in sizes if len(shape) >= 3 and shape[-1] == shape[-2] == 100]
    assert squares, "the constrained block's weights have been computed"
    assert all(shape[0] in (1, 4) for shape in squares), set(squares)  # one sample, four heads
    assert max(size for _, size in sizes) < 3 * 4 * 100 * 100


def test_gelu_linear_equals_its_parts():
    hidden, weight, bias = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 5), (4, 5), 4)
    )
    torch.testing.assert_close(
        ac2d.GeluLinear.apply(hidden, weight, bias), F.linear(F.gelu(hidden), weight, bias)
    )
    assert torch.autograd.gradcheck(ac2d.GeluLinear.apply, (hidden, weight, bias))


def test_weights_and_pictures_may_be_mapped_over():
    """What `torch.func.vmap` makes of the attentions and perceptrons that compute their own gradients."""
    model, inputs = TestAc2d().make_model(), TestAc2d().make_inputs(TestAc2d().make_config())

    def logits(weights, *args):
        return torch.func.functional_call(model, weights, args, {"output_au_attentions": True}).logits

    several = {name: torch.stack([p, 1.1 * p]).detach() for name, p in model.named_parameters()}
    answers = torch.func.vmap(logits, in_dims=(0, None, None))(several, *inputs.values())
    for i, answer in enumerate(answers):
        expected = logits({name: values[i] for name, values in several.items()}, *inputs.values())
        torch.testing.assert_close(answer, expected)


@pytest.mark.parametrize("constraint", ["average", "each"])
def test_trains_under_autocast(constraint):
    model, inputs, labels = make(constraint=constraint)
    exact = model(**inputs, labels=labels).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs, labels=labels).loss
    torch.testing.assert_close(loss, exact, rtol=0.05, atol=0.05)
    exact.backward()
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    loss.backward()
    pairs = zip(model.parameters(), expected, strict=True)
    error = sum((parameter.grad - grad).square().sum() for parameter, grad in pairs)
    assert error < 0.01 * sum(grad.square().sum() for grad in expected)


def test_attention_without_any_hold_gives_a_finite_loss():
    log_attention = ac2d.AttentionSummary(mean=torch.tensor([[0.0, 1.0]])).log("average")
    assert log_attention.isfinite().all()


# Ablations and other config values.


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_row_of_table_8_trains(name):
    model, inputs, labels = make(**ABLATIONS[name])
    model.train()
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    assert loss.isfinite()
    centers_matter = not torch.equal(
        loss, model(**inputs | {"au_centers": inputs["au_centers"] / 2}, labels=labels).loss
    )
    assert centers_matter == (ABLATIONS[name]["constraint"] != "none")
    assert (model.prototypes is None) == (ABLATIONS[name]["deconfounding"] == "none")


def test_average_and_each_are_different_constraints():
    losses = []
    for constraint in ("average", "each"):
        model, inputs, labels = make(constraint=constraint, constraint_weight=1000.0)
        losses.append(model(**inputs, labels=labels).loss)
    assert losses[1] > losses[0] + 1e-4  # Jensen: to hold each channel costs more than to hold their average


def test_training_without_centres_is_refused_unless_unconstrained():
    model, inputs, labels = make()
    pixels = inputs["pixel_values"]
    with pytest.raises(ValueError, match='au_centers is missing.*constraint="none"'):
        model(pixels, labels=labels)
    with pytest.raises(ValueError, match="two centres each"):
        model(pixels, inputs["au_centers"][:, :3], labels)
    with pytest.raises(ValueError, match="32 x 32"):
        model(torch.zeros(1, 3, 48, 48))
    assert model(pixels).logits.isfinite().all()
    assert make(constraint="none")[0](pixels, labels=labels).loss.isfinite()
    with pytest.raises(ValueError, match="au_centers is missing.*trunk_loss_weight=0"):
        make(constraint="none", trunk_loss_weight=1.0)[0](pixels, labels=labels)


def test_loss_of_the_trunk():
    """A logit and two centres for each action unit, read from the trunk's map in its places."""
    plain, model = make_fresh().eval(), make_fresh(trunk_loss_weight=0.5).eval()
    model.load_state_dict(plain.state_dict(), strict=False)
    pixels, centers, labels = data(torch.float32)
    labels[0, 1] = -1
    rich = model(pixels, output_hidden_states=True).hidden_states[-1]  # (B, 8, 8, 8)
    rich = (rich - rich.mean(1, keepdim=True)) / (rich.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    quarters = [rich[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]
    places = (sum(quarters) / 4).flatten(1)
    untrained = model(pixels, centers, labels).loss - plain(pixels, centers, labels).loss
    with torch.no_grad():
        for head in model.trunk_reader.values():
            assert not head.weight.any()
            head.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    read = torch.stack([model.trunk_reader[f"AU{au}"](places) for au in AUS], dim=1)
    # the top-left pixel's corner is at -0.5
    target = (centers.flatten(2) + 0.5 - 16) / 32 * 5
    known = labels >= 0
    loss = F.binary_cross_entropy_with_logits(read[..., 0][known], labels[known].float())
    loss += F.smooth_l1_loss(read[..., 1:], target)
    at_zero = torch.log(torch.tensor(2.0)) + F.smooth_l1_loss(0 * target, target)
    expected = plain(pixels, centers, labels).loss + 0.5 * loss
    torch.testing.assert_close(model(pixels, centers, labels).loss, expected)
    torch.testing.assert_close(untrained, 0.5 * at_zero)
    model(pixels, centers, labels).loss.backward()
    assert model.trunk_reader[f"AU{AUS[0]}"].weight.grad.abs().max() > 0


def test_unknown_labels_leave_the_centres_to_the_loss_of_the_trunk():
    """What is read of an occurrence gets no gradient from an unknown label, alone or in a batch of such."""
    model = make_fresh(trunk_loss_weight=0.5).eval()
    pixels, centers, labels = data(torch.float32)
    readers = [model.trunk_reader[f"AU{au}"] for au in AUS]
    for reader in readers:
        torch.nn.init.normal_(reader.weight, std=0.1, generator=torch.Generator().manual_seed(1))

    def gradients(labels):
        """Of the occurrence (m, C) and the centres (m, 4, C), and of all that answers for an action unit."""
        model.zero_grad()
        loss = model(pixels, centers, labels).loss
        loss.backward()
        weights = torch.stack([reader.weight.grad for reader in readers])
        answers = [p.grad for p in model.branches.parameters() if p.grad is not None]
        return loss.detach(), weights[:, 0], weights[:, 1:], sum(grad.abs().sum() for grad in answers)

    _, _, places, _ = gradients(labels)
    labels[:, 1] = -1
    _, occurrence, others, _ = gradients(labels)
    assert not occurrence[1].any() and occurrence[0].any()
    torch.testing.assert_close(others, places)
    loss, occurrence, others, answers = gradients(torch.full_like(labels, -1))
    assert not occurrence.any() and not answers
    torch.testing.assert_close(others, places)
    target = (centers.flatten(2) + 0.5 - 16) / 32 * 5
    _, read = model.trunk_reader(model(pixels, output_hidden_states=True).hidden_states[-1])
    torch.testing.assert_close(loss, 0.5 * F.smooth_l1_loss(read, target))
    with pytest.raises(ValueError, match="Label nan is neither"):
        model(pixels, centers, torch.full_like(labels, torch.nan, dtype=torch.float32))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"depths": [1, 6]}, "each of the 3 stages"),
        ({"num_heads": [1, 2, 3]}, "3 heads do not divide 64"),
        ({"image_size": 180}, "multiple of 8"),
        ({"depths": [1, 6, 1]}, "needs two blocks"),
        ({"attention_sigma": 0.0}, "attention_sigma=0.0 must be above 0"),
        ({"constraint_weight": -1.0}, "constraint_weight=-1.0 not below 0"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate=1.0 in \[0, 1\)"),
        ({"key_reductions": [4, 2, 3]}, r"key_reductions=\[4, 2, 3\] do not divide"),
        ({"trunk_loss_weight": -1.0}, "trunk_loss_weight=-1.0 must not be negative"),
        ({"intervention_ratio": 8, "deconfounding_start": "second_epoch"}, "intervention_ratio=8"),
        ({"constraint": "all"}, "constraint"),
    ],
)
def test_impossible_configurations_are_refused(values, message):
    with pytest.raises(Exception, match=message):
        Ac2dConfig(**values)


VALUES = [
    {"intervention_ratio": 8},
    {"intervention_ratio": 2, "deconfounding": "shared"},
    {"deconfounding": "none"},
    {"query_ratio": 4, "deconfounding": "shared"},
    {"prototype_value": "mean_over_n"},
    {"deconfounding_start": "second_epoch"},
    {"key_reductions": [1, 1, 1]},
    {"key_reductions": [4, 2, 2]},
    {"depths": [1, 1, 1], "constraint": "none"},
    {"constraint": "each"},
    {"constraint_weight": 2.0},
    {"attention_sigma": 2.0},
    {"round_centers": False},
    {"trunk_loss_weight": 1.0},
    {"num_channels": 1},
    {"hidden_sizes": [4, 8, 16]},
    {"num_heads": [1, 1, 1]},
    {"mlp_ratio": 3},
    {"drop_path_rate": 0.5},
    {"layer_norm_eps": 1e-2},
    {"initializer_range": 0.5},
    {"stem_channels": 6},
]


def test_every_config_value_is_exercised():
    assert set().union(*VALUES) | {"image_size"} == set(Ac2dConfig.__annotations__)


@pytest.mark.parametrize("values", VALUES, ids=str)
def test_every_config_value_makes_another_model(values):
    """It trains, and answers otherwise than the default."""
    models = [make_fresh(**v) for v in (values, {})]
    losses = []
    for model in models:
        pixels, centers, labels = data(torch.float32)
        torch.manual_seed(1)
        model.train()
        loss = model(pixels[:, : model.config.num_channels], centers, labels).loss
        loss.backward()
        losses.append(loss.item())
        model.end_of_epoch()
        losses.append(model(pixels[:, : model.config.num_channels], centers, labels).loss.item())
    assert losses[:2] != losses[2:]


def make_fresh(**values):
    torch.manual_seed(0)
    return Ac2dForAUDetection(Ac2dConfig(**TINY | {"aus": AUS} | values))


def test_compact_is_small_and_takes_keywords():
    config = Ac2dConfig.compact(aus=AUS, drop_path_rate=0.0)
    assert config.drop_path_rate == 0
    assert config.image_size == 80
    assert Ac2dForAUDetection(config).num_parameters() < 200_000


def test_processor_options_crop_without_resizing():
    options = Ac2dConfig(aus=[1, 12]).processor_options
    assert options["crop_size"] == options["size"] == {"height": 176, "width": 176}
    assert (options["aligned_size"], options["aus"]) == (200, [1, 12])


# Causal intervention.


def test_intervention_is_equations_10_to_13():
    config = Ac2dConfig(**TINY, intervention_ratio=8, prototype_value="mean_over_n")
    intervention = ac2d.CausalIntervention(config, channels=8, places=5)
    intervention.prototype.normal_(), intervention.prototype_count.fill_(3)
    f = torch.randn(2, 4, 8)
    expected = torch.empty(2, 4, 64)
    for i, t in itertools.product(range(2), range(4)):
        q, k = intervention.query(f[i, t]), intervention.key(intervention.prototype)
        alpha = torch.softmax(k @ q / 16**0.5, 0)
        expectation = sum(a * z / 3 for a, z in zip(alpha, intervention.prototype, strict=True))
        expected[i, t] = intervention.feature_map(f[i, t]) + intervention.confounder_map(expectation)
    torch.testing.assert_close(intervention(f), expected)


def features_of(model, inputs):
    """(B, m, c) as they enter the interventions."""
    seen = []
    hooks = [
        branch.intervention.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()[:, 0]))
        for branch in model.branches.values()
    ]
    model(**inputs)
    for hook in hooks:
        hook.remove()
    return torch.stack(seen, 1)


def test_prototype_is_the_mean_of_the_epochs_features_and_serves_the_next_epoch():
    model = make_fresh().train()
    batches = [
        TestAc2d().make_inputs(model.config, size) for size in (2, 5)
    ]  # the last batch may be another size
    features, optimizer = [], torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in batches:
        assert not model.prototypes.any(), "in use before the epoch has ended"
        probe = copy.deepcopy(model)
        features.append(features_of(probe, batch))
        model(
            **batch, labels=TestAc2d().make_labels(model.config, len(batch["pixel_values"]))
        ).loss.backward()
        optimizer.step()
    model.end_of_epoch()
    torch.testing.assert_close(model.prototypes, torch.cat(features).mean(0))
    prototypes = model.prototypes.clone()
    model.end_of_epoch()
    torch.testing.assert_close(model.prototypes, prototypes, rtol=0, atol=0)
    model.eval()(**batches[0])
    model.end_of_epoch()
    torch.testing.assert_close(model.prototypes, prototypes, rtol=0, atol=0)
    intervention = model.branches["AU4"].intervention
    assert intervention.prototype_count == 7
    assert intervention.feature_count == 0
    model.train()
    expected = features_of(copy.deepcopy(model), batches[0]).mean(0)  # of the second epoch alone
    model(**batches[0])
    model.end_of_epoch()
    torch.testing.assert_close(model.prototypes, expected)
    assert intervention.prototype_count == 2


def test_static_prototypes_are_of_the_weights_at_the_epochs_end():
    model = make_fresh(deconfounding="static", drop_path_rate=0.5).train()
    batches = [TestAc2d().make_inputs(model.config, size) for size in (2, 5)]
    model(**batches[0])
    with pytest.raises(ValueError, match=r"end_of_epoch\(batches\)"):
        model.end_of_epoch()
    model.end_of_epoch(batches)
    assert model.training
    expected = torch.cat([features_of(model.eval(), batch) for batch in batches])
    torch.testing.assert_close(model.prototypes, expected.mean(0))
    model.end_of_epoch()  # nothing trained since, so nothing to do


def test_looking_again_leaves_the_modes_of_the_modules():
    model = make_fresh(deconfounding="static").train()
    model.trunk.eval()  # as whoever freezes it does
    modes = [module.training for module in model.modules()]
    batch = TestAc2d().make_inputs(model.config, 2)
    model(**batch)
    with pytest.raises(KeyError):  # a batch that is none
        model.end_of_epoch([batch, {}])
    assert [module.training for module in model.modules()] == modes
    model.end_of_epoch([batch])
    assert [module.training for module in model.modules()] == modes


def test_shared_prototype_is_the_mean_rich_feature():
    model = make_fresh(deconfounding="shared").train()
    inputs = TestAc2d().make_inputs(model.config)
    rich = model(**inputs, output_hidden_states=True).hidden_states[-1]
    model.end_of_epoch()
    torch.testing.assert_close(model.prototypes, rich.flatten(2).mean(0).T)


def test_until_the_first_prototype_features_may_pass_untouched():
    model = make_fresh(deconfounding_start="second_epoch").train()
    inputs = TestAc2d().make_inputs(model.config)
    feature = features_of(model, inputs)
    heads = [branch.classifier for branch in model.branches.values()]
    expected = torch.cat([head(feature[:, j]) for j, head in enumerate(heads)], 1)
    torch.testing.assert_close(model(**inputs).logits, expected)
    model.end_of_epoch()
    assert (model(**inputs).logits - expected).abs().max() > 1e-4


def test_state_of_the_running_epoch_survives_saving(tmp_path):
    model = make_fresh().train()
    inputs = TestAc2d().make_inputs(model.config)
    model(**inputs), model.end_of_epoch(), model(**inputs)
    model.save_pretrained(tmp_path)
    loaded = Ac2dForAUDetection.from_pretrained(tmp_path).train()
    for each in (model, loaded):
        each(**inputs), each.end_of_epoch()
    torch.testing.assert_close(loaded.prototypes, model.prototypes, rtol=0, atol=0)
    assert model.prototypes.any()
    half = Ac2dForAUDetection.from_pretrained(tmp_path, dtype=torch.bfloat16)
    intervention = half.branches["AU1"].intervention
    assert intervention.prototype.dtype == intervention.feature_sum.dtype == torch.float32
    assert intervention.feature_count.dtype == torch.int64


class Faces(torch.utils.data.Dataset):
    """Eight pictures of noise."""

    def __init__(self, config):
        inputs = TestAc2d().make_inputs(config, 8)
        self.items = inputs | {"labels": TestAc2d().make_labels(config, 8)}

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {name: value[index] for name, value in self.items.items()}


ARGUMENTS = {"learning_rate": 1e-2, "max_steps": -1, "auto_find_batch_size": False}


def train_with_trainer(folder, resume=None, epochs=2, **values):
    arguments = {name: values.pop(name, default) for name, default in ARGUMENTS.items()}
    model = make_fresh(**{"drop_path_rate": 0.3} | values)
    arguments = TrainingArguments(
        str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **arguments,
    )
    trainer = Trainer(model, arguments, train_dataset=Faces(model.config), callbacks=[EndOfEpochCallback()])
    trainer.train(resume_from_checkpoint=resume)
    return model


@pytest.mark.parametrize(("deconfounding", "steps"), [("dynamic", [1, 2, 3, 4]), ("static", [1])])
def test_trainer_updates_prototypes_and_resumes_exactly(tmp_path, deconfounding, steps):
    """Two optimiser steps an epoch; checkpoints amid an epoch, at its end, in the next one and at the end."""
    model = train_with_trainer(tmp_path / "run", deconfounding=deconfounding)
    assert model.branches["AU1"].intervention.prototype_count == 8
    assert model.prototypes.any()
    for step in steps:
        checkpoint = str(tmp_path / "run" / f"checkpoint-{step}")
        again = train_with_trainer(tmp_path / "again", resume=checkpoint, deconfounding=deconfounding)
        for (name, value), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
            torch.testing.assert_close(other, value, rtol=0, atol=0, msg=f"{name} after step {step}")


def test_training_that_stops_amid_an_epoch_keeps_the_prototypes_of_the_last_whole_one(tmp_path):
    """Steps at which nothing is learnt: what an epoch gathers depends on its pictures alone."""
    values = {"learning_rate": 0.0, "drop_path_rate": 0.0}
    whole = train_with_trainer(tmp_path / "whole", max_steps=2, **values).prototypes
    for steps, expected in ((1, None), (2, 8), (3, 8)):  # two steps of four pictures are an epoch
        model = train_with_trainer(tmp_path / str(steps), max_steps=steps, **values)
        intervention = model.branches["AU1"].intervention
        assert intervention.prototype_count == (expected or 4)
        assert not intervention.feature_count and not intervention.feature_sum.any()
        if expected:
            torch.testing.assert_close(model.prototypes, whole)


def test_static_prototypes_are_of_the_last_weights_wherever_training_stops(tmp_path):
    model = train_with_trainer(tmp_path, max_steps=3, deconfounding="static")
    found = model.prototypes.clone()
    inputs = {name: value for name, value in Faces(model.config).items.items() if name != "labels"}
    for branch in model.branches.values():
        branch.intervention.feature_count.fill_(1)  # as if it had trained, which would change statistics
    model.end_of_epoch([inputs])
    torch.testing.assert_close(found, model.prototypes)
    assert model.branches["AU1"].intervention.prototype_count == 8


def test_a_new_try_with_smaller_batches_forgets_the_first(tmp_path, monkeypatch):
    """As `auto_find_batch_size` makes one where the memory is not enough."""
    seen = []

    def scarce_memory(self, features):
        observe(self, features)
        seen.append(features.shape[1])
        if len(seen) == 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate a lot.")

    observe = Ac2dForAUDetection._observe
    monkeypatch.setattr(Ac2dForAUDetection, "_observe", scarce_memory)
    model = train_with_trainer(tmp_path, epochs=1, auto_find_batch_size=True)
    assert seen == [2, 2] + [1] * 8
    assert model.branches["AU1"].intervention.prototype_count == 8


def _worker(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    model = make_fresh().train()
    parallel = nn.parallel.DistributedDataParallel(model)
    inputs = TestAc2d().make_inputs(model.config, 8)
    labels = TestAc2d().make_labels(model.config, 8)
    for i in range(2):  # no step of the optimiser, so that one process can tell what comes out
        mine = slice(4 * i + 2 * rank, 4 * i + 2 * rank + 2)
        parallel(**{name: value[mine] for name, value in inputs.items()}, labels=labels[mine]).loss.backward()
    model.end_of_epoch()
    torch.save(model.prototypes, f"{folder}/{rank}.pt")
    os._exit(0)  # freeing a gloo group right after a collective can deadlock on the interpreter lock


@pytest.mark.slow
def test_processes_agree_on_the_prototypes(tmp_path):
    torch.multiprocessing.spawn(_worker, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    model = make_fresh().train()
    inputs = TestAc2d().make_inputs(model.config, 8)
    for i in range(0, 8, 2):
        model(**{name: value[i : i + 2] for name, value in inputs.items()})
    model.end_of_epoch()
    torch.testing.assert_close(first, model.prototypes)


# Other action units.


def test_new_action_units_can_start_like_known_ones():
    model, inputs, _ = make()
    other = model.adapt_to_aus([26, 12, 9], like={26: 4})
    inputs = {"pixel_values": inputs["pixel_values"]}
    logits, expected = other(**inputs).logits, model(**inputs).logits
    torch.testing.assert_close(
        logits[:, :2], expected[:, [AUS.index(4), AUS.index(12)]], rtol=1e-4, atol=1e-5
    )
    assert not other.branches["AU9"].intervention.prototype.any()
    with pytest.raises(ValueError, match="copies AU17"):
        model.adapt_to_aus([26, 12], like={26: 17})


# Compiling and dropping paths.


@pytest.mark.parametrize(
    "values", [{}, {"constraint": "each", "deconfounding_start": "second_epoch"}], ids=str
)
def test_compiles_in_one_graph(values):
    model, inputs, labels = make(au_occurrence_rates=RATES, **values)
    model.train()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
    expected, actual = (m(**inputs, labels=labels, output_au_attentions=True) for m in (model, compiled))
    torch.testing.assert_close(actual.loss, expected.loss)
    torch.testing.assert_close(actual.au_attentions, expected.au_attentions)
    expected.loss.backward(), actual.loss.backward()
    for a, b in zip(model.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    for a, b in zip(model.buffers(), compiled.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_drop_path_keeps_the_mean_and_drops_whole_samples():
    torch.manual_seed(0)
    drop = ac2d.DropPath(0.25).train()
    dropped = drop(torch.ones(4000, 3, 2))
    torch.testing.assert_close(dropped.unique(), torch.tensor([0, 4 / 3]))
    assert (dropped.flatten(1).std(1) == 0).all()
    assert dropped.mean() == pytest.approx(1, abs=0.05)
    torch.testing.assert_close(drop.eval()(dropped), dropped)
    block = ac2d.Ac2dBlock(Ac2dConfig(**TINY), 2, drop_path_rate=1 - 1e-9).train()
    tokens = torch.randn(2, 16, 8)
    torch.testing.assert_close(block(tokens, (4, 4))[0], tokens, rtol=0, atol=0)  # both residuals are dropped


def test_learns_where_to_look():
    """The attention loss alone moves the average attention to the centres."""
    model = make_fresh(constraint_weight=100.0).train()
    pixels, centers, labels = data(torch.float32)
    centers = torch.full_like(centers, 4.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(30):
        output = model(pixels, centers, labels, output_au_attentions=True)
        output.loss.backward(), optimizer.step(), optimizer.zero_grad()
        losses.append(output.loss.item())
    assert losses[-1] < 0.5 * losses[0]
    kl = F.kl_div(output.au_attentions.log(), output.au_masks, reduction="sum") / 12
    assert kl < 0.2
