"""The losses of AUFormer against the paper's formulas, its gradient (Eq. 7), and their limits."""

import math

import pytest
import torch
from PIL import Image, ImageColor

from actionunits.losses import (
    difficulty_exponents,
    mdwa_loss,
    occurrence_weights,
    weighted_asymmetric_loss,
    weighted_au_loss,
    weighted_dice_loss,
)
from scripts import ROOT, load_script

RATES = [0.21, 0.17, 0.2, 0.46, 0.55]
LOSSES = [
    mdwa_loss,
    weighted_asymmetric_loss,
    weighted_dice_loss,
    lambda *a, **k: mdwa_loss(*a, margin=0.1, **k),
    lambda *a, **k: mdwa_loss(*a, gamma=0.5, **k),
]


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(6, 5, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), torch.randint(0, 2, (6, 5), generator=generator)


def equation_6(logits, labels, omega, gamma, margin):
    """The paper's sum over action units, picture by picture."""
    total = 0.0
    for row, targets in zip(logits.tolist(), labels.tolist(), strict=True):
        for z, y, w, g in zip(row, targets, omega.tolist(), gamma.tolist(), strict=True):
            p = 1 / (1 + math.exp(-z))
            p_m = max(p - margin, 0)
            total -= w * (y * math.log(p) + (1 - y) * p_m**g * math.log(1 - p_m)) / len(row)
    return total / len(logits)


@pytest.mark.parametrize("margin", [0.0, 0.1, 0.3])
def test_mdwa_is_equation_6(batch, margin):
    inverse = 1 / torch.tensor(RATES, dtype=torch.float64)
    omega, gamma = len(RATES) * inverse / inverse.sum(), difficulty_exponents(RATES)
    torch.testing.assert_close(gamma, 1 + torch.tensor(RATES))
    actual = mdwa_loss(*batch, occurrence_weights(RATES)[0], gamma, margin)
    assert actual.item() == pytest.approx(equation_6(*batch, omega, gamma, margin), rel=1e-6)


@pytest.mark.parametrize("gamma", [0.7, 1.0, 1.17, 2.0])
@pytest.mark.parametrize("margin", [0.0, 0.1, 0.3])
def test_gradient_is_equation_7(gamma, margin):
    p = torch.arange(0.005, 1, 0.01, dtype=torch.float64)
    z = torch.logit(p).unsqueeze(1).requires_grad_()
    (len(p) * mdwa_loss(z, torch.zeros_like(z), gamma=gamma, margin=margin)).backward()
    p_m = p - margin
    slope = p_m.clamp(min=0) ** gamma * (1 / (1 - p_m) - gamma * torch.log(1 - p_m) / p_m) * p * (1 - p)
    torch.testing.assert_close(z.grad[:, 0], torch.where(p < margin, 0.0, slope))


def test_gradient_checks(batch):
    logits, labels = batch
    gamma = difficulty_exponents(RATES).double()
    assert torch.autograd.gradcheck(lambda x: mdwa_loss(x, labels, None, gamma, 0.1), logits)
    assert torch.autograd.gradcheck(lambda x: weighted_dice_loss(x, labels), logits)


def test_certain_and_easy_non_occurrences_are_let_go():
    logits = torch.tensor([[-3.0], [1.0], [30.0]], requires_grad=True)
    mdwa_loss(logits, torch.zeros(3, 1), gamma=1.5, margin=0.1).backward()
    easy, hard, mislabelled = logits.grad.abs().flatten().tolist()
    assert easy == 0
    assert mislabelled < 1e-6 < hard
    logits.grad = None
    weighted_asymmetric_loss(logits, torch.zeros(3, 1)).backward()
    assert logits.grad[2] > logits.grad[1] > logits.grad[0] > 0


def test_without_gamma_and_margin_it_is_wa(batch):
    logits, labels = batch
    weight = occurrence_weights(RATES)[0]
    p, w = torch.sigmoid(logits), weight.double()
    terms = -(labels * p.log() + (1 - labels) * p * (1 - p).log())
    expected = (w * terms).sum(1).mean()
    torch.testing.assert_close(weighted_asymmetric_loss(logits, labels, weight), expected)
    off = difficulty_exponents(RATES, bounds=(1, 1))
    torch.testing.assert_close(mdwa_loss(logits, labels, weight, off, 0.0), expected)
    # As gamma tends to 0, so does the difference to the weighted cross-entropy.
    torch.testing.assert_close(
        mdwa_loss(logits, labels, weight, 1e-9), weighted_au_loss(logits, labels, weight)
    )


def test_rare_action_units_get_larger_gradients():
    logits = torch.zeros(1, 2, requires_grad=True)
    mdwa_loss(logits, torch.zeros(1, 2), gamma=difficulty_exponents([0.05, 0.6]), margin=0.1).backward()
    assert logits.grad[0, 0] > logits.grad[0, 1] > 0


def test_dice_is_equation_8(batch):
    logits, labels = batch
    p, y = torch.sigmoid(logits), labels
    expected = (1 - (2 * y * p + 1) / (y**2 + p**2 + 1)).mean()
    torch.testing.assert_close(weighted_dice_loss(logits, labels), expected)
    soft = 1 - (2 * 0.3 * p + 0.5) / (0.3**2 + p**2 + 0.5)
    omega = torch.tensor([2.0, 1.0, 1.0, 0.5, 0.5], dtype=torch.float64)
    actual = weighted_dice_loss(logits, torch.full((6, 5), 0.3), omega, smoothing=0.5)
    torch.testing.assert_close(actual, (omega / 5 * soft).sum(1).mean(), rtol=1e-6, atol=0)
    perfect = torch.where(labels == 1, 50.0, -50.0)
    assert weighted_dice_loss(perfect, labels) < 1e-6
    assert weighted_dice_loss(-perfect, labels) == pytest.approx(0.5)  # 1 - 1 / 2
    assert weighted_dice_loss(-perfect, labels, smoothing=0.0) == pytest.approx(1.0)


@pytest.mark.parametrize("loss", LOSSES)
def test_unknown_labels_take_no_part(loss, batch):
    logits, labels = batch
    expected = loss(logits[1:], labels[1:])
    labels[0] = -1
    actual = loss(logits, labels)
    torch.testing.assert_close(actual, expected)
    actual.backward()
    assert not logits.grad[0].any()
    assert loss(logits, torch.full_like(labels, -1)) == 0


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_huge_logits_stay_finite(loss, dtype):
    logits = torch.tensor([[1e4, -1e4, 0.0]] * 2, dtype=dtype, requires_grad=True)
    value = loss(logits, torch.tensor([[1, 1, 0], [0, 0, 1]]))
    value.backward()
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES)
def test_wrong_labels_are_refused(loss):
    with pytest.raises(ValueError, match="Label 9"):
        loss(torch.zeros(1, 2), torch.tensor([[0, 9]]))
    with pytest.raises(ValueError, match=r"\(1, 3\).*\(1, 2\)"):
        loss(torch.zeros(1, 2), torch.zeros(1, 3))


def test_soft_labels_lie_between(batch):
    logits = batch[0].detach()
    low, high = (mdwa_loss(logits, torch.full((6, 5), y), margin=0.1) for y in (0.0, 1.0))
    torch.testing.assert_close(
        mdwa_loss(logits, torch.full((6, 5), 0.25), margin=0.1), 0.75 * low + 0.25 * high
    )


def test_figure_3_is_drawn_from_the_losses(tmp_path):
    """The curves are those of Eq. 7, which above is checked against the losses, and all of them are seen."""
    plot = load_script(ROOT / "training" / "plot_mdwa.py")
    p = torch.tensor([0.05, 0.3, 0.9], dtype=torch.float64)
    gamma, p_m = 1 + plot.BP4D_RATES["AU7"], p - 0.1
    slope = p_m.clamp(min=0) ** gamma * (1 / (1 - p_m) - gamma * torch.log(1 - p_m) / p_m) * p * (1 - p)
    torch.testing.assert_close(
        plot.difficulties_panel(p)["AU7, gamma = 1.55"], torch.where(p < 0.1, 0, slope)
    )
    assert list(plot.losses_panel(p)) == ["WCE", "WA", "MWA, m = 0.1", "MWA, m = 0.2", "MWA, m = 0.3"]
    torch.testing.assert_close(plot.losses_panel(p)["WCE"], p)
    output = tmp_path / "figures" / "fig3.png"  # a folder that is not there yet
    plot.main([str(output)])
    colours = {colour for _, colour in Image.open(output).getcolors(10**6)}
    assert colours.issuperset(ImageColor.getrgb(colour) for colour in plot.COLOURS)
