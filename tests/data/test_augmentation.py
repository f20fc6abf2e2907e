"""The batch-wise warp against Pillow and hand-made cases; that pictures and points move together."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from actionunits.alignment import Alignment
from actionunits.data.augmentation import (
    COARSER,
    FILL,
    NO_AUGMENTATION,
    Augmentation,
    InputGeometry,
    compose,
    jitter,
    sample_placement,
    transform_points,
    warp,
)

GEOMETRY = InputGeometry(aligned_size=50, crop_size=44, input_size=28)
IDENTITY = torch.tensor([[[1.0, 0, 0], [0, 1, 0]]])
STILL = Augmentation(random_crop=False, mirror=0, brightness=0, contrast=0)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def smooth_pictures(count: int, height: int, width: int) -> torch.Tensor:
    """(B, H, W, 3) uint8 of gentle waves, on which interpolation errs little."""
    y, x = np.mgrid[:height, :width]
    waves = [128 + 100 * np.sin((x * (c + 1) + y * (i + 1)) / 12) for i in range(count) for c in range(3)]
    return torch.from_numpy(
        np.stack(waves, -1).reshape(height, width, count, 3).transpose(2, 0, 1, 3).astype(np.uint8)
    )


def test_identity_warp_gives_the_picture_itself():
    pictures = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8, generator=seeded())
    drawn = warp(pictures, IDENTITY.expand(2, 2, 3), 16)
    torch.testing.assert_close(drawn, pictures.permute(0, 3, 1, 2).float(), rtol=0, atol=1e-3)


def test_a_shift_moves_pixels_and_fills_with_grey():
    pictures = torch.randint(0, 256, (1, 8, 12, 3), dtype=torch.uint8, generator=seeded())
    drawn = warp(pictures, torch.tensor([[[1.0, 0, 3], [0, 1, -2]]]), 8)  # 3 to the right, 2 up
    torch.testing.assert_close(
        drawn[0, :, :6, 3:], pictures[0, 2:, :5].permute(2, 0, 1).float(), rtol=0, atol=1e-3
    )
    assert (drawn[0, :, :, :3] == FILL).all() and (drawn[0, :, 6:] == FILL).all()


def test_warp_agrees_with_pillow():
    pictures = smooth_pictures(3, 60, 80)
    angle = torch.tensor([0.3, -0.2, 0.0])
    scale = torch.tensor([0.9, 1.2, 0.7])
    a, b = scale * angle.cos(), scale * angle.sin()
    shift = torch.tensor([[-8.0, 3], [-20, 5], [-6.5, -4.25]])
    matrices = torch.stack([torch.stack([a, -b, shift[:, 0]], -1), torch.stack([b, a, shift[:, 1]], -1)], 1)
    drawn = warp(pictures, matrices, 40)
    for i in range(3):
        expected = Alignment(matrices[i].numpy(), (40, 40)).warp(Image.fromarray(pictures[i].numpy()))
        # Pillow drops the fraction; at the picture's edge it does not blend with the fill.
        difference = np.abs(np.floor(drawn[i].permute(1, 2, 0).numpy()) - np.asarray(expected, np.float32))
        assert np.quantile(difference, 0.95) <= 1
        assert np.median(difference) == 0


def test_without_augmentation_the_middle_is_cropped_and_resized():
    placement = sample_placement(2, GEOMETRY, NO_AUGMENTATION)
    expected = Alignment(np.eye(2, 3), (50, 50)).crop(3, 3, 44, 44).resize(28, 28).matrix
    for matrices in (placement.of_points, placement.of_picture):
        np.testing.assert_allclose(matrices, np.stack([expected, expected]), atol=1e-12)
    assert not placement.mirrored.any()


def test_random_crops_reach_every_place_and_stay_inside():
    placement = sample_placement(500, GEOMETRY, Augmentation(mirror=0), seeded())
    corners = torch.tensor([[-0.5, -0.5], [27.5, 27.5]], dtype=torch.float64).expand(500, 2, 2)
    inverse = torch.linalg.inv(placement.of_points[:, :, :2])
    in_aligned = (corners - placement.of_points[:, :, 2].unsqueeze(1)) @ inverse.mT
    low, high = in_aligned[:, 0], in_aligned[:, 1]
    torch.testing.assert_close(high - low, torch.full_like(low, 44.0))
    assert {round(v) for v in (low + 0.5).flatten().tolist()} == set(range(7))  # offsets 0 to 6


def test_mirroring_is_the_flip_of_the_same_crop():
    pictures = smooth_pictures(1, 50, 50)
    plain = sample_placement(1, GEOMETRY, STILL)
    mirrored = sample_placement(
        1, GEOMETRY, Augmentation(random_crop=False, mirror=1, brightness=0, contrast=0)
    )
    assert mirrored.mirrored.all()
    torch.testing.assert_close(
        warp(pictures, mirrored.of_picture, 28),
        warp(pictures, plain.of_picture, 28).flip(-1),
        rtol=0,
        atol=1e-2,
    )


def test_picture_and_points_move_together():
    """Spots drawn at points are found where `transform_points` puts them, whatever crop and mirror do."""
    points = torch.tensor([[20.3, 17.8], [30.0, 31.5]], dtype=torch.float64)
    y, x = np.mgrid[:50, :50]
    placement = sample_placement(16, GEOMETRY, Augmentation(), seeded(3))
    assert 0 < placement.mirrored.sum() < 16
    for point in points:
        spot = 120 * np.exp(-((x - point[0].item()) ** 2 + (y - point[1].item()) ** 2) / 8) + 128
        pictures = torch.from_numpy(np.repeat(spot[None, :, :, None], 3, -1).astype(np.uint8)).expand(
            16, -1, -1, -1
        )
        drawn = warp(pictures, placement.of_picture, 28)[:, 0] - FILL
        axis = torch.arange(28.0)
        total = drawn.sum((1, 2))
        found = torch.stack([(drawn.sum(1) * axis).sum(1), (drawn.sum(2) * axis).sum(1)], -1) / total[:, None]
        expected = transform_points(placement.of_points, point.expand(16, 1, 2))[:, 0]
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=0.05)


def test_alignment_noise_moves_the_picture_but_not_the_points():
    noisy = Augmentation(random_crop=False, mirror=0, rotation=5, scale=0.1, translation=3)
    placement = sample_placement(4000, GEOMETRY, noisy, seeded())
    still = sample_placement(1, GEOMETRY, STILL).of_points
    torch.testing.assert_close(placement.of_points, still.expand(4000, 2, 3))
    ratio = placement.of_picture[:, :, :2] / still[:, :1, :1]  # a similarity: scale and angle
    angle = torch.rad2deg(torch.atan2(ratio[:, 1, 0], ratio[:, 0, 0]))
    scale = torch.log(torch.linalg.det(ratio)) / 2
    centre = torch.full((4000, 1, 2), 24.5, dtype=torch.float64)
    moved = (transform_points(placement.of_picture, centre)[:, 0] - 13.5) / (28 / 44)
    for values, deviation in ((angle, 5), (scale, 0.1), (moved[:, 0], 3), (moved[:, 1], 3)):
        assert values.std().item() == pytest.approx(deviation, rel=0.05)
        assert abs(values.mean().item()) < deviation / 20


def test_composition_is_one_after_the_other():
    first, second = torch.randn(2, 5, 2, 3, dtype=torch.float64, generator=seeded())
    points = torch.randn(5, 7, 2, dtype=torch.float64, generator=seeded(1))
    both = transform_points(second, transform_points(first, points))
    torch.testing.assert_close(transform_points(compose(second, first), points), both)


def test_brightness_multiplies_and_contrast_keeps_the_mean():
    flat = torch.full((64, 3, 8, 8), 100.0)
    factors = jitter(flat, Augmentation(brightness=0.5, contrast=0.5), seeded())[:, 0, 0, 0] / 100
    assert (
        0.5 <= factors.min() < 0.6 and 1.4 < factors.max() <= 1.5
    )  # contrast does nothing to a flat picture
    grey = torch.linspace(100, 156, 64).view(1, 1, 8, 8).expand(64, 3, 8, 8)
    contrasted = jitter(grey, Augmentation(brightness=0, contrast=0.5), seeded())
    torch.testing.assert_close(contrasted.mean((1, 2, 3)), grey.mean((1, 2, 3)))
    spread = contrasted.std((1, 2, 3)) / grey.std((1, 2, 3))
    assert 0.5 <= spread.min() < 0.6 and 1.4 < spread.max() <= 1.5001
    extreme = jitter(torch.rand(8, 3, 8, 8) * 255, Augmentation(brightness=1, contrast=1), seeded())
    assert extreme.min() >= 0 and extreme.max() <= 255


def test_blur_is_a_gaussian_of_the_drawn_sigma():
    dot = torch.zeros(40, 3, 21, 21)
    dot[:, :, 10, 10] = 255
    still = {"random_crop": False, "mirror": 0, "brightness": 0, "contrast": 0}
    blurred = jitter(dot, Augmentation(**still, blur=1), seeded())
    torch.testing.assert_close(blurred.sum((2, 3)), dot.sum((2, 3)))
    axis = torch.arange(21.0) - 10
    for face in blurred[:, 0]:
        profile = face.sum(0) / 255
        sigma = float((profile * axis**2).sum() ** 0.5)
        assert sigma < 1.5
        expected = torch.exp(-(axis[6:15] ** 2) / (2 * sigma**2)) if sigma > 0.8 else None
        if expected is not None:
            torch.testing.assert_close(profile[6:15], expected / expected.sum(), rtol=0, atol=0.01)
    some = (jitter(dot, Augmentation(**still, blur=0.5), seeded()) != dot).any(1).any(1).any(1).sum()
    assert 10 < some < 30


def test_erasing_hides_a_rectangle():
    white = torch.full((200, 3, 50, 50), 255.0)
    still = {"random_crop": False, "mirror": 0, "brightness": 0, "contrast": 0}
    hidden = (jitter(white, Augmentation(**still, erase=1), seeded()) == FILL).all(1)
    share = hidden.float().mean((1, 2))
    assert share.min() > 0.04 and share.max() < 0.21
    for mask in hidden:
        rows, columns = mask.any(1), mask.any(0)
        assert mask.sum() == rows.sum() * columns.sum()
    assert not (jitter(white, Augmentation(**still), seeded()) == FILL).any()


def test_the_generator_decides_everything():
    light = {"gamma": 0.3, "tint": 0.2, "gray": 0.3, "coarse": 0.5, "noise": 8}
    strong = Augmentation(rotation=3, scale=0.1, translation=2, blur=0.5, erase=0.5, **light)
    pictures = smooth_pictures(4, 50, 50)

    def draw(seed):
        generator = seeded(seed)
        placement = sample_placement(4, GEOMETRY, strong, generator)
        return jitter(warp(pictures, placement.of_picture, 28), strong, generator)

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


def test_gamma_is_a_power_and_tint_a_factor_of_each_channel():
    flat = torch.full((300, 3, 4, 4), 64.0)
    power = torch.log(jitter(flat, replace(STILL, gamma=0.5), seeded()) / 255) / np.log(64 / 255)
    torch.testing.assert_close(power, power[:, :1, :1, :1].expand_as(power))
    assert np.exp(-0.5) <= power.min() < 0.65 and 1.55 < power.max() <= np.exp(0.5) + 1e-4
    factors = jitter(flat, replace(STILL, tint=0.25), seeded())[:, :, 0, 0] / 64
    assert 0.75 <= factors.min() < 0.77 and 1.23 < factors.max() <= 1.25
    assert np.abs(np.corrcoef(factors.T.numpy()) - np.eye(3)).max() < 0.2  # channels draw for themselves


def test_saturation_is_that_of_pillow():
    colors = torch.randint(70, 180, (200, 3, 6, 6), generator=seeded(1)).float()
    drawn = jitter(colors, replace(STILL, saturation=0.4), seeded())
    factors = 1 + 0.4 * (2 * torch.rand(200, generator=seeded()) - 1)
    assert factors.min() < 0.62 and factors.max() > 1.38
    for before, after, factor in zip(colors, drawn, factors.tolist(), strict=True):
        picture = Image.fromarray(before.permute(1, 2, 0).numpy().astype(np.uint8))
        expected = np.asarray(ImageEnhance.Color(picture).enhance(factor), float)
        # Pillow cuts off fractions, and rounds the grey level.
        np.testing.assert_allclose(after.permute(1, 2, 0), expected, atol=1.3)


def test_gray_keeps_the_gray_level_of_some_pictures_and_leaves_the_others():
    colors = 255 * torch.rand(200, 3, 4, 4, generator=seeded(1))
    drawn = jitter(colors, replace(STILL, gray=0.4), seeded())
    turned = (drawn == drawn[:, :1]).flatten(1).all(1)
    assert 50 < turned.sum() < 110
    assert torch.equal(drawn[~turned], colors[~turned])
    expected = 0.299 * colors[:, 0] + 0.587 * colors[:, 1] + 0.114 * colors[:, 2]
    torch.testing.assert_close(drawn[turned][:, 2], expected[turned])


def test_coarse_pictures_are_means_of_their_pixels():
    size = 40
    pictures = 255 * torch.rand(100, 3, size, size, generator=seeded(1))
    drawn = jitter(pictures, replace(STILL, coarse=1), seeded())
    assert (drawn.std((1, 2, 3)) < 0.8 * pictures.std((1, 2, 3))).all()
    exact = {}  # where no pixel straddles two means, Pillow agrees with PyTorch
    for factor in {0.25, 0.5} & set(COARSER):
        small = (round(size * factor),) * 2
        for before, after in zip(pictures[:, 0].numpy(), drawn[:, 0].numpy(), strict=True):
            coarse = Image.fromarray(before).resize(small, Image.Resampling.BOX)
            expected = np.asarray(coarse.resize((size, size), Image.Resampling.BILINEAR))
            exact[factor] = exact.get(factor, 0) + (np.abs(after - expected).max() < 0.1)
    assert len(exact) == 2 and all(12 < count < 40 for count in exact.values())
    some = (jitter(pictures, replace(STILL, coarse=0.5), seeded()) != pictures).flatten(1).any(1).sum()
    assert 35 < some < 65


def test_noise_has_the_strength_that_each_picture_draws():
    flat = torch.full((400, 3, 16, 16), 128.0)
    noisy = jitter(flat, replace(STILL, noise=10), seeded()) - flat
    strengths = noisy.std((1, 2, 3))
    assert strengths.max() < 10.8 and strengths.min() < 0.2
    assert abs(strengths.mean() - 5) < 0.5 and noisy.mean().abs() < 0.1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Augmentation(mirror=1.5), r"mirror=1.5 must lie in \[0, 1.0\]"),
        (lambda: Augmentation(rotation=-1), "rotation=-1"),
        (lambda: Augmentation(gray=1.1), r"gray=1.1 must lie in \[0, 1.0\]"),
        (lambda: Augmentation(saturation=1.1), r"saturation=1.1 must lie in \[0, 1.0\]"),
        (lambda: InputGeometry(aligned_size=100, crop_size=176), "crop of 176 does not fit into 100"),
    ],
)
def test_numbers_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
