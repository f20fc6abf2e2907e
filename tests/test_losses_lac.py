"""LAC's losses on regions against numbers made by hand, and RoIAlign against a naive version."""

from functools import partial

import pytest
import torch

from actionunits.action_units import UNKNOWN
from actionunits.models.lac.losses_lac import activation_loss, consistency_loss, localization_loss
from actionunits.roi_align import roi_align
from references.lac import naive_roi_align


def test_localization_is_what_the_regions_lack_of_the_peak():
    magnitudes = torch.tensor([[[1.0, 0.5], [0.2, 0.4]]])
    assert localization_loss(magnitudes, torch.tensor([[1.0, 0.0]])).item() == pytest.approx((0.25 + 0.7) / 2)
    assert localization_loss(magnitudes, torch.tensor([[1.0, UNKNOWN]])).item() == pytest.approx(0.25)


def test_activation_draws_active_regions_near_and_others_away():
    similarities = torch.tensor([[[0.8, 0.4], [0.5, -0.1]]])
    assert activation_loss(similarities, torch.tensor([[1.0, 0.0]])).item() == pytest.approx((0.4 + 1.2) / 2)
    perfect = torch.tensor([[[1.0, 1.0], [-1.0, -1.0]]])
    assert activation_loss(perfect, torch.tensor([[1.0, 0.0]])) == 0
    assert activation_loss(-perfect, torch.tensor([[1.0, 0.0]])) == 2
    # A soft label lies between, linearly.
    soft = activation_loss(similarities, torch.tensor([[0.3, UNKNOWN]])).item()
    assert soft == pytest.approx(0.3 * 0.4 + 0.7 * 1.6)


def test_balanced_activation_weighs_either_kind_alike():
    similarities = torch.tensor([[0.8, 0.2], [0.4, -0.6], [0.1, 0.3]])[..., None].expand(-1, -1, 2)
    labels = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, UNKNOWN]])
    expected = (0.5 * 0.2 + 0.5 * (1.4 + 1.1) / 2, 0.5 * (1.2 + 0.4) / 2)  # the second shows nowhere
    assert activation_loss(similarities, labels, balance=True).item() == pytest.approx(sum(expected) / 2)
    # A soft label belongs to both kinds, each by its part.
    soft = activation_loss(similarities[:2, :1], torch.tensor([[0.3], [0.1]]), balance=True).item()
    active, inactive = (0.3 * 0.2 + 0.1 * 0.6) / 0.4, (0.7 * 1.8 + 0.9 * 1.4) / 1.6
    assert soft == pytest.approx((active + inactive) / 2)


@pytest.mark.parametrize("balance", [True, False])
def test_only_unbalanced_activation_rewards_who_denies_everything(balance):
    """Of rare action units: the answer that collapsed features give, M = -1 on all pictures."""
    labels = (torch.arange(50) < 6).float()[:, None]
    everywhere = torch.zeros(1, requires_grad=True)
    loss = activation_loss(everywhere.expand(50, 1, 2), labels, balance=balance)
    (slope,) = torch.autograd.grad(loss, everywhere)
    assert slope.item() == pytest.approx(0.0 if balance else 1 - 2 * 6 / 50, abs=1e-6)


def test_consistency_is_rewarded():
    """The paper prints a minus, with which the least loss would have regions unlike their map."""
    similarities, overall = torch.tensor([[[0.5, 0.1], [0.2, 0.2]]]), torch.tensor([[0.3, 0.2]])
    labels = torch.tensor([[0.0, 1.0]])
    assert consistency_loss(similarities, overall, labels).item() == pytest.approx(0.02)
    assert consistency_loss(overall[..., None].expand(-1, -1, 2), overall, labels) == 0
    labels[0, 1] = UNKNOWN
    assert consistency_loss(similarities, overall, labels).item() == pytest.approx(0.04)


@pytest.mark.parametrize("loss", [localization_loss, activation_loss, partial(activation_loss, balance=True)])
def test_unknown_labels_take_no_part(loss):
    values = torch.rand(3, 4, 2, requires_grad=True)
    labels = torch.ones(3, 4)
    labels[0] = UNKNOWN
    torch.testing.assert_close(loss(values, labels), loss(values[1:], labels[1:]))
    loss(values, labels).backward()
    assert not values.grad[0].any()
    assert values.grad[1:].all()
    assert loss(values, torch.full((3, 4), float(UNKNOWN))) == 0


# RoIAlign.

BOXES = [
    (0.5, 0.5, 2.5, 3.5),  # inside
    (1.0, 1.0, 2.0, 2.0),  # a single cell
    (-0.5, -0.5, 4.5, 3.5),  # the whole map
    (-3.0, -2.0, 1.0, 1.5),  # partly outside
    (3.2, 2.9, 9.0, 8.0),
    (20.0, 20.0, 22.0, 22.0),  # outside
    (2.0, 2.0, 2.0, 2.0),  # a point
]


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("samples", [1, 2])
def test_roi_align_equals_a_naive_one(size, samples):
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    boxes = torch.tensor([BOXES, BOXES[::-1]], dtype=torch.float64)
    pooled = roi_align(maps, boxes, size, samples)
    assert pooled.shape == (2, 7, 3, size, size)
    for b in range(2):
        for r, box in enumerate(boxes[b].tolist()):
            for c in range(3):
                expected = naive_roi_align(maps[b, c], box, size, samples)
                torch.testing.assert_close(pooled[b, r, c], expected)


def test_roi_align_of_one_cell_and_of_a_slope():
    slope = torch.arange(6.0).expand(1, 1, 4, 6)
    box = torch.tensor([[[1.0, 0.5, 3.0, 2.5]]])
    torch.testing.assert_close(roi_align(slope, box, 2)[0, 0, 0], torch.tensor([[1.5, 2.5], [1.5, 2.5]]))
    one = torch.zeros(1, 1, 3, 3)
    one[0, 0, 1, 1] = 1
    assert roi_align(one, torch.tensor([[[0.99, 0.99, 1.01, 1.01]]]), 1).item() == pytest.approx(1, abs=0.02)


def test_roi_align_has_gradients_of_maps():
    maps = torch.randn(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    box = torch.tensor([[[0.3, 0.2, 2.1, 3.3]]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda m: roi_align(m, box, 2), maps)
    assert roi_align(maps.half(), box.half(), 2).dtype == torch.float32


def test_roi_align_equals_torchvision():
    ops = pytest.importorskip("torchvision.ops", exc_type=(ImportError, RuntimeError))
    maps, boxes = torch.randn(1, 3, 4, 5), torch.tensor([BOXES])
    expected = ops.roi_align(maps, [boxes[0] + 0.5], 2, sampling_ratio=2, aligned=True)
    torch.testing.assert_close(roi_align(maps, boxes, 2)[0], expected)
