"""The weighted loss against a naive loop, torch's own cross-entropy, published weights and hard numbers."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from actionunits.action_units import UNKNOWN
from actionunits.losses import attention_kl_loss, occurrence_weights, weighted_au_loss


def naive_loss(logits, labels, w, v):
    """ESCDA Eq. 7 for one picture as printed, over its known labels."""
    total = 0.0
    for x, p, w_i, v_i in zip(logits, labels, w, v, strict=True):
        if p != UNKNOWN:
            p_hat = 1 / (1 + math.exp(-x))
            total -= w_i * (v_i * p * math.log(p_hat) + (1 - p) * math.log(1 - p_hat))
    return total


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(6, 4, generator=generator, dtype=torch.double)
    labels = torch.randint(0, 2, (6, 4), generator=generator)
    w, v = occurrence_weights([0.1, 0.2, 0.4, 0.7])
    return logits, labels, w.double(), v.double()


def test_is_eq_7_averaged_over_the_batch(case):
    logits, labels, w, v = case
    expected = np.mean(
        [naive_loss(*pair, w, v) for pair in zip(logits.tolist(), labels.tolist(), strict=True)]
    )
    assert weighted_au_loss(logits, labels, w, v).item() == pytest.approx(expected)


def test_without_weights_is_binary_cross_entropy(case):
    logits, labels, _, v = case
    expected = F.binary_cross_entropy_with_logits(logits, labels.double())
    torch.testing.assert_close(weighted_au_loss(logits, labels), expected)
    expected = F.binary_cross_entropy_with_logits(logits, labels.double(), pos_weight=v)
    torch.testing.assert_close(weighted_au_loss(logits, labels, pos_weight=v), expected)


def test_scale_of_the_weights_does_not_matter(case):
    logits, labels, w, v = case
    torch.testing.assert_close(
        weighted_au_loss(logits, labels, 12 * w, v), weighted_au_loss(logits, labels, w, v)
    )


def test_soft_labels_lie_between_hard_ones(case):
    logits, labels, w, v = case
    half = weighted_au_loss(logits, torch.full_like(logits, 0.5), w, v)
    none, all_ = (weighted_au_loss(logits, torch.full_like(labels, p), w, v) for p in (0, 1))
    torch.testing.assert_close(half, (none + all_) / 2)


def test_unknown_labels_weigh_nothing(case):
    logits, labels, w, v = case
    labels[2, 1] = labels[3, 0] = UNKNOWN
    terms = [naive_loss(*pair, w, v) for pair in zip(logits.tolist(), labels.tolist(), strict=True)]
    expected = sum(terms) / (w * (labels != UNKNOWN)).sum().item()
    assert weighted_au_loss(logits, labels, w, v).item() == pytest.approx(expected)


def test_unknown_action_unit_equals_leaving_it_out(case):
    logits, labels, w, v = case
    rest = [0, 2, 3]
    expected = weighted_au_loss(logits[:, rest], labels[:, rest], w[rest], v[rest])
    labels[:, 1] = UNKNOWN
    torch.testing.assert_close(weighted_au_loss(logits, labels, w, v), expected)


def test_unknown_labels_hide_even_broken_logits(case):
    logits, labels, w, v = case
    labels[0] = UNKNOWN
    logits[0] = torch.tensor([math.nan, math.inf, -math.inf, 1.0])
    logits.requires_grad_()
    loss = weighted_au_loss(logits, labels, w, v)
    loss.backward()
    torch.testing.assert_close(loss, weighted_au_loss(logits[1:], labels[1:], w, v))
    assert not logits.grad[0].any()


def test_nothing_known_is_no_loss_and_no_gradient():
    logits = torch.randn(2, 3, requires_grad=True)
    loss = weighted_au_loss(logits, torch.full((2, 3), UNKNOWN))
    loss.backward()
    assert loss == 0
    assert torch.equal(logits.grad, torch.zeros(2, 3))


def test_gradient(case):
    logits, labels, w, v = case
    labels[1, 1] = UNKNOWN
    assert torch.autograd.gradcheck(lambda x: weighted_au_loss(x, labels, w, v), logits.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_huge_logits_stay_finite(dtype):
    logits = torch.tensor([[1e4, -1e4, 1e4, -1e4]], dtype=dtype, requires_grad=True)
    wrong = weighted_au_loss(logits, torch.tensor([[0, 1, 0, 1]]))
    wrong.backward()
    assert wrong.dtype == torch.float32
    assert wrong.item() == pytest.approx(1e4, rel=1e-2)
    torch.testing.assert_close(logits.grad.float(), torch.tensor([[0.25, -0.25, 0.25, -0.25]]))
    assert weighted_au_loss(logits, torch.tensor([[1, 0, 1, 0]])).item() == 0


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float16, torch.float64])
def test_types_of_labels(dtype):
    logits = torch.tensor([[0.3, -0.2]])
    labels = torch.tensor([[1, 0]])
    torch.testing.assert_close(weighted_au_loss(logits, labels.to(dtype)), weighted_au_loss(logits, labels))


@pytest.mark.parametrize("label", [9, 999, 2, -2, 1.5, -0.5, math.nan])
def test_other_labels_are_refused(label):
    labels = torch.tensor([[0.0, label]])
    with pytest.raises(ValueError, match=rf"Label {labels[0, 1].item()} is neither .* map the corpus's code"):
        weighted_au_loss(torch.zeros(1, 2), labels)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"labels have shape \(2, 3\), the logits \(2, 4\)"):
        weighted_au_loss(torch.zeros(2, 4), torch.zeros(2, 3))


def test_check_does_not_break_a_graph():
    compiled = torch.compile(weighted_au_loss, backend="eager", fullgraph=True)
    logits, labels = torch.randn(2, 3), torch.tensor([[1, 0, UNKNOWN], [0, 0, 1]])
    torch.testing.assert_close(compiled(logits, labels), weighted_au_loss(logits, labels))


# v, and w times the number of action units, of BP4D's first fold as numbered and published by ME-GraphAU.
BP4D_V = [4.4361, 5.8394, 4.0520, 1.2723, 0.7529, 0.7644, 0.8510, 1.1899, 4.6995, 1.9256, 5.0439, 5.7465]
BP4D_W = [
    1.342985,
    1.689665,
    1.248091,
    0.561356,
    0.433044,
    0.435894,
    0.457287,
    0.541004,
    1.408054,
    0.722762,
    1.493145,
    1.666711,
]


def test_weights_of_bp4d():
    w, v = occurrence_weights([1 / (1 + v) for v in BP4D_V])
    torch.testing.assert_close(v, torch.tensor(BP4D_V))
    torch.testing.assert_close(12 * w, torch.tensor(BP4D_W), rtol=1e-4, atol=1e-4)
    assert w.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, 1.2, math.nan])
def test_rates_that_give_no_weight_are_refused(rate):
    with pytest.raises(ValueError, match="between 0 and 1, exclusively"):
        occurrence_weights([0.5, rate])


# The attention loss of AC2D.


@pytest.mark.parametrize(
    "labels", [[[1, 0], [0, 1]], [[1, UNKNOWN], [0, 1]], [[UNKNOWN, UNKNOWN], [UNKNOWN, 0]]], ids=str
)
def test_attention_loss_is_eq_7_over_known_labels(labels):
    generator = torch.Generator().manual_seed(0)
    predicted, target = torch.rand(2, 2, 2, 5, generator=generator, dtype=torch.double)
    predicted, target = (x / x.sum(-1, keepdim=True) for x in (predicted, target))
    target[..., 0, :] = torch.tensor([0.0, 0.5, 0.5, 0.0, 0.0])  # 0 log 0 is 0
    terms = [
        sum(
            t * math.log(t / a)
            for t, a in zip(target[i, j].tolist(), predicted[i, j].tolist(), strict=True)
            if t
        )
        for i in range(2)
        for j in range(2)
        if labels[i][j] != UNKNOWN
    ]
    loss = attention_kl_loss(predicted.log(), target, torch.tensor(labels))
    assert loss.item() == pytest.approx(sum(terms) / len(terms) / 5)


def test_attention_loss_is_least_where_the_attention_is_the_predefined_one():
    target = torch.tensor([0.1, 0.2, 0.7], dtype=torch.double).expand(2, 1, 3)
    scores = target.log().clone().requires_grad_()
    loss = attention_kl_loss(scores.log_softmax(-1), target, torch.ones(2, 1))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(scores.grad, torch.zeros_like(scores))
    assert attention_kl_loss(target.flip(-1).log(), target, torch.ones(2, 1)) > 0.1
    assert attention_kl_loss(target.flip(-1).log(), target, torch.full((2, 1), UNKNOWN)) == 0
