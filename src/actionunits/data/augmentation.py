"""Batched augmentation on tensors: one affine map per face for picture and landmarks, and one warp.

The papers (ESCDA Sec. 4.1.2, AC2D) crop a random 176 x 176 region of the aligned 200 x 200 face, resize it to
the network's input, mirror half of the faces and jitter brightness and contrast. Here crop, resize and mirror
are matrices, composed with the alignment's, so that pixels are interpolated once. Noise of the alignment and
of the landmarks is added to make networks robust to errors of a landmark detector.

Coordinates are (x, y) in pixels, integers are pixel centres. All random numbers come from the generator, if
one is given.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

COARSER = (0.25, 0.35, 0.5, 0.7)  # resolutions like those of press photographs and video
GRAY = (0.299, 0.587, 0.114)  # weights of red, green and blue (ITU-R BT.601)
SHARES = (  # in [0, 1]
    "mirror",
    "brightness",
    "contrast",
    "saturation",
    "blur",
    "erase",
    "tint",
    "gray",
    "coarse",
)
FILL = 128.0  # grey level outside the picture, as in the papers' alignment


@dataclass(frozen=True)
class Augmentation:
    """Strengths of the augmentations; the defaults are ESCDA's (jitter as AC2D describes it).

    Attributes:
        random_crop: Crop anywhere in the aligned face instead of its centre.
        mirror: Probability of mirroring.
        brightness: Pixels are scaled by a factor from [1 - b, 1 + b].
        contrast: The same about the mean grey level.
        saturation: The same about the grey level of each pixel.
        rotation: Alignment noise: standard deviation of the angle in degrees.
        scale: Alignment noise: standard deviation of the logarithm of the size.
        translation: Alignment noise: standard deviation in pixels of the aligned face, in x and in y.
        landmark_noise: Standard deviation of each landmark in pixels of the aligned face.
        blur: Probability of a Gaussian blur with a sigma of 0.3 to 1.5 input pixels.
        erase: Probability of a grey rectangle over 5 to 20 % of the input.
        gamma: Pixels in [0, 1] are raised to a power from [exp(-g), exp(g)].
        tint: Each channel is scaled by a factor from [1 - t, 1 + t].
        gray: Probability of a greyscale picture.
        coarse: Probability of downsampling by a factor of `COARSER` and upsampling again.
        noise: Largest standard deviation of pixel noise in grey levels; each picture draws its own below.
    """

    random_crop: bool = True
    mirror: float = 0.5
    brightness: float = 0.5
    contrast: float = 0.5
    saturation: float = 0.0
    rotation: float = 0.0
    scale: float = 0.0
    translation: float = 0.0
    landmark_noise: float = 0.0
    blur: float = 0.0
    erase: float = 0.0
    gamma: float = 0.0
    tint: float = 0.0
    gray: float = 0.0
    coarse: float = 0.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, value in asdict(self).items():
            limit = 1.0 if name in SHARES else float("inf")
            if not 0 <= value <= limit:
                raise ValueError(f"augmentation {name}={value} must lie in [0, {limit}].")


NO_AUGMENTATION = Augmentation(random_crop=False, mirror=0, brightness=0, contrast=0)


@dataclass(frozen=True)
class InputGeometry:
    """Sides of the square aligned face, crop and network input in pixels."""

    aligned_size: int = 200
    crop_size: int = 176
    input_size: int = 112

    def __post_init__(self) -> None:
        """Check that the crop fits."""
        if not 0 < self.crop_size <= self.aligned_size or self.input_size < 1:
            raise ValueError(f"a crop of {self.crop_size} does not fit into {self.aligned_size} pixels.")


@dataclass(frozen=True)
class Placement:
    """Affine maps (B, 2, 3) of a batch from the aligned face to the network's input.

    Attributes:
        of_points: Crop, resize and mirror, for landmarks.
        of_picture: The same after the alignment noise. If all detected landmarks are off by a similarity,
            aligning by them moves the picture, but not the landmarks in the aligned face.
        mirrored: (B,) bool.
    """

    of_points: Tensor
    of_picture: Tensor
    mirrored: Tensor


def sample_placement(
    count: int, geometry: InputGeometry, augmentation: Augmentation, generator: Generator | None = None
) -> Placement:
    """Draw crop, mirroring and alignment noise of `count` faces."""
    slack = geometry.aligned_size - geometry.crop_size
    if augmentation.random_crop:
        offset = torch.randint(0, slack + 1, (count, 2), generator=generator).double()
    else:
        offset = torch.full((count, 2), slack / 2, dtype=torch.float64)
    mirrored = torch.rand(count, generator=generator) < augmentation.mirror
    to_input = _mirror_matrix(mirrored, geometry.input_size) @ _crop_matrix(offset, geometry)
    noise = _alignment_noise(count, geometry.aligned_size, augmentation, generator)
    return Placement(to_input[:, :2], (to_input @ noise)[:, :2], mirrored)


def compose(second: Tensor, first: Tensor) -> Tensor:
    """Compose affine maps (B, 2, 3): `first`, then `second`."""
    last_row = first.new_tensor([0, 0, 1]).expand(*first.shape[:-2], 1, 3)
    return second @ torch.cat([first, last_row], dim=-2)


def transform_points(matrices: Tensor, points: Tensor) -> Tensor:
    """Apply affine maps (B, 2, 3) to points (B, N, 2)."""
    return points @ matrices[..., :2].mT + matrices[..., 2].unsqueeze(-2)


def warp(pictures: Tensor, matrices: Tensor, size: int) -> Tensor:
    """Warp each picture by its own affine map, with bilinear interpolation.

    There is no antialiasing: reduce pictures much larger than `size` beforehand.

    Args:
        pictures: (B, H, W, 3) uint8.
        matrices: (B, 2, 3), from pixels of the picture to pixels of the output.
        size: Width and height of the output.

    Returns:
        (B, 3, size, size) float32 in [0, 255], grey outside the picture.
    """
    height, width = pictures.shape[1:3]
    inverse = torch.linalg.inv(matrices[:, :, :2].float())[..., None, None]  # (B, 2, 2, 1, 1)
    across, down = torch.meshgrid(*2 * [torch.arange(size, device=pictures.device)], indexing="xy")
    x, y = across - matrices[:, 0, 2, None, None], down - matrices[:, 1, 2, None, None]
    source = inverse[:, :, 0] * x[:, None] + inverse[:, :, 1] * y[:, None]  # (B, 2, size, size), input pixels
    # grid_sample's -1 and 1 are the picture's outer edges.
    grid = (2 * source.movedim(1, -1) + 1) / source.new_tensor([width, height]) - 1
    centred = pictures.permute(0, 3, 1, 2).float() - FILL  # so that zero padding is the fill
    return F.grid_sample(centred, grid.float(), align_corners=False, padding_mode="zeros") + FILL


def jitter(pixels: Tensor, augmentation: Augmentation, generator: Generator | None = None) -> Tensor:
    """Augment light, colour, sharpness and visibility of each of (B, 3, S, S) pictures in [0, 255]."""
    if augmentation.gamma:
        power = torch.exp(
            augmentation.gamma * (2 * torch.rand(len(pixels), 1, 1, 1, generator=generator) - 1)
        )
        pixels = 255 * (pixels / 255).clamp(0, 1) ** power.to(pixels.device)
    if augmentation.tint:
        pixels = (pixels * _factors(pixels, augmentation.tint, generator, channels=3)).clamp(0, 255)
    if augmentation.brightness:
        pixels = (pixels * _factors(pixels, augmentation.brightness, generator)).clamp(0, 255)
    if augmentation.contrast:
        mean = _gray(pixels).mean((2, 3), keepdim=True)
        factors = _factors(pixels, augmentation.contrast, generator)
        pixels = (factors * pixels + (1 - factors) * mean).clamp(0, 255)
    if augmentation.saturation:
        factors = _factors(pixels, augmentation.saturation, generator)
        pixels = (factors * pixels + (1 - factors) * _gray(pixels)).clamp(0, 255)
    if augmentation.gray:
        chosen = torch.rand(len(pixels), 1, 1, 1, generator=generator) < augmentation.gray
        pixels = torch.where(chosen.to(pixels.device), _gray(pixels), pixels)
    if augmentation.blur:
        pixels = _blur_some(pixels, augmentation.blur, generator)
    if augmentation.coarse:
        pixels = _coarsen_some(pixels, augmentation.coarse, generator)
    if augmentation.noise:
        pixels = _add_noise(pixels, augmentation.noise, generator)
    if augmentation.erase:
        pixels = _erase_some(pixels, augmentation.erase, generator)
    return pixels


# Parts


def _crop_matrix(offset: Tensor, geometry: InputGeometry) -> Tensor:
    """(B, 3, 3): crop at `offset` (B, 2) and resize, x -> (x - offset + 0.5) * s - 0.5."""
    s = geometry.input_size / geometry.crop_size
    matrix = torch.diag(torch.tensor([s, s, 1.0], dtype=torch.float64)).repeat(len(offset), 1, 1)
    matrix[:, :2, 2] = (0.5 - offset) * s - 0.5
    return matrix


def _mirror_matrix(mirrored: Tensor, size: int) -> Tensor:
    """(B, 3, 3): x -> size - 1 - x where mirrored."""
    matrix = torch.eye(3, dtype=torch.float64).repeat(len(mirrored), 1, 1)
    matrix[mirrored, 0, 0] = -1
    matrix[mirrored, 0, 2] = size - 1
    return matrix


def _alignment_noise(
    count: int, size: int, augmentation: Augmentation, generator: Generator | None
) -> Tensor:
    """(B, 3, 3): a random similarity about the centre of the aligned face."""
    draw = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    angle = torch.deg2rad(draw[:, 0] * augmentation.rotation)
    scale = torch.exp(draw[:, 1] * augmentation.scale)
    a, b = scale * torch.cos(angle), scale * torch.sin(angle)
    linear = torch.stack([torch.stack([a, -b], -1), torch.stack([b, a], -1)], -2)
    centre = torch.full((2,), (size - 1) / 2, dtype=torch.float64)
    matrix = torch.eye(3, dtype=torch.float64).repeat(count, 1, 1)
    matrix[:, :2, :2] = linear
    matrix[:, :2, 2] = centre - linear @ centre + draw[:, 2:] * augmentation.translation
    return matrix


def _factors(pixels: Tensor, strength: float, generator: Generator | None, channels: int = 1) -> Tensor:
    drawn = 1 + strength * (2 * torch.rand(len(pixels), channels, 1, 1, generator=generator) - 1)
    return drawn.to(pixels.device)


def _gray(pixels: Tensor) -> Tensor:
    """Grey level (B, 1, S, S)."""
    return (pixels * pixels.new_tensor(GRAY).view(1, 3, 1, 1)).sum(1, keepdim=True)


def _coarsen_some(pixels: Tensor, probability: float, generator: Generator | None) -> Tensor:
    size, draw = pixels.shape[-1], torch.rand(len(pixels), 2, generator=generator)
    kind = (draw[:, 1] * len(COARSER)).long().masked_fill(draw[:, 0] >= probability, -1)
    for number, factor in enumerate(COARSER):
        chosen = (kind == number).nonzero().flatten().to(pixels.device)
        if len(chosen):
            small = F.interpolate(pixels[chosen], size=max(1, round(size * factor)), mode="area")
            large = F.interpolate(small, size=(size, size), mode="bilinear", align_corners=False)
            pixels = pixels.index_copy(0, chosen, large)
    return pixels


def _add_noise(pixels: Tensor, greatest: float, generator: Generator | None) -> Tensor:
    strength = greatest * torch.rand(len(pixels), 1, 1, 1, generator=generator)
    seed = int(torch.randint(2**62, (), generator=generator))
    on_device = torch.Generator(pixels.device).manual_seed(seed)
    noise = torch.randn(pixels.shape, generator=on_device, device=pixels.device)
    return (pixels + strength.to(pixels.device) * noise).clamp(0, 255)


def _blur_some(pixels: Tensor, probability: float, generator: Generator | None) -> Tensor:
    count, size = len(pixels), pixels.shape[-1]
    chosen = (torch.rand(count, generator=generator) < probability).nonzero().flatten()
    sigma = 0.3 + 1.2 * torch.rand(count, generator=generator)[chosen]
    if not len(chosen):
        return pixels
    reach = 4
    kernel = torch.exp(-(torch.arange(-reach, reach + 1).float() ** 2) / (2 * sigma[:, None] ** 2))
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, dim=0).to(pixels.device)
    chosen = chosen.to(pixels.device)
    planes = pixels[chosen].reshape(1, -1, size, size)  # a group per channel, with its picture's kernel
    planes = F.pad(planes, (reach, reach, reach, reach), mode="replicate")
    planes = F.conv2d(planes, kernel[:, None, None, :], groups=len(kernel))
    planes = F.conv2d(planes, kernel[:, None, :, None], groups=len(kernel))
    return pixels.index_copy(0, chosen, planes.view(-1, 3, size, size))


def _erase_some(pixels: Tensor, probability: float, generator: Generator | None) -> Tensor:
    count, size = len(pixels), pixels.shape[-1]
    draw = torch.rand(count, 5, generator=generator)
    area, ratio = 0.05 + 0.15 * draw[:, 1], torch.exp(draw[:, 2] * 1.4 - 0.7)  # ratio from 1:2 to 2:1
    width, height = (area * ratio).sqrt() * size, (area / ratio).sqrt() * size
    left, top = draw[:, 3] * (size - width), draw[:, 4] * (size - height)
    axis = torch.arange(size).float()
    across = (axis >= left[:, None]) & (axis < (left + width)[:, None])
    down = (axis >= top[:, None]) & (axis < (top + height)[:, None])
    hidden = (draw[:, 0] < probability)[:, None, None] & down[:, :, None] & across[:, None, :]
    return pixels.masked_fill(hidden[:, None].to(pixels.device), FILL)
