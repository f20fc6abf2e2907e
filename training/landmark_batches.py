"""Batches for the landmark network, cropped and degraded on the device of the pictures.

Three in four crops show a face: half of these cropped like a detector's or user's boxes, half like the
network's own second look. The others are negatives: clutter, faces much too close, too far away or half
outside the crop, upside down, or in shuffled tiles. Degradations are those of press photographs: tight crops
with black, grey or replicated borders, low resolution, blur, grey, contrast, noise, and occlusion.

The network of the fine looks is trained on faces only, cropped by the points of the first one and degraded
less.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from actionunits.face_landmarks import CROP_MARGIN
from actionunits.landmarks import SCHEMES

MIRROR = list(SCHEMES["ibug68"].mirror)
NO_FACE_SHARE = 0.25
PHOTO_SHARE = 0.12

Pictures = tuple[Tensor, Tensor]
"""(N, S, S, 3) uint8 pictures and (N, 68, 2) points in their pixels."""


@dataclass(frozen=True)
class Disturbance:
    """Strengths of the degradations.

    Attributes:
        stretch: Standard deviation of a random linear map's entries from those of the identity.
        tight: Share of pictures that end close to the face.
        covered: Shares of crops with a first and a second occluding object.
        poor: Degradation of each of as many equal groups of crops.
    """

    stretch: float
    tight: float
    covered: tuple[float, ...]
    poor: tuple[str, ...]


ROUGH = Disturbance(
    stretch=0.05,
    tight=0.3,
    covered=(0.25, 0.12),
    poor=3 * ("coarse",) + 2 * ("blurred",) + ("shaken",) + 2 * ("sharp",),
)
MILD = Disturbance(
    stretch=0.03,
    tight=0.2,
    covered=(0.1, 0.05),
    poor=3 * ("coarse",) + ("blurred", "shaken") + 5 * ("sharp",),
)


class LandmarkBatches:
    """Pictures on a device, and batches of them.

    Args:
        faces: See `Pictures`.
        photos: Photographs, which are `PHOTO_SHARE` of every batch.
        clutter: (M, S, S, 3) pictures without a face.
        device: Device of pictures and batches.
        fine: Whether batches are for the network of the fine looks.
    """

    def __init__(
        self,
        faces: Pictures,
        photos: Pictures | None,
        clutter: Tensor,
        device: torch.device,
        fine: bool = False,
    ):
        self.pictures, self.points = (part.to(device) for part in faces)
        self.photos = photos and tuple(part.to(device) for part in photos)
        self.clutter = clutter.to(device)
        self.device, self.fine = device, fine

    def __len__(self) -> int:
        return len(self.pictures)

    def order(self, batch: int) -> list[Tensor]:
        """Indices of the shuffled batches of an epoch, without an incomplete one."""
        order = torch.randperm(len(self), device=self.device)
        return list(order[: len(order) // batch * batch].split(batch))

    def draw(self, chosen: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Crops (B, 3, size, size) in [-1, 1], points (B, 68, 2) relative to their side, is_face (B,) 0 or 1.

        The last quarter is negatives, in equal parts of each kind; for fine looks there are none.
        """
        count = len(chosen)
        part = math.ceil(NO_FACE_SHARE * count / 5)
        pictures, points = self.pictures[chosen], self.points[chosen]
        if self.photos is not None:
            swap = self._random(math.ceil(PHOTO_SHARE * count)).mul(len(self.photos[0])).long()
            pictures[: len(swap)], points[: len(swap)] = self.photos[0][swap], self.photos[1][swap]
        flip = self._random(count) < 0.5
        if self.fine:
            crops, labels = cut(pictures, points, *self._close_places(points), flip, size, MILD)
            return disturb(crops, MILD), labels, torch.ones(count, device=self.device)
        pictures[-part:] = self.clutter[self._random(part).mul(len(self.clutter)).long()]
        center, side, angle = self._places(points, count - 2 * part, count - 3 * part)
        crops, labels = cut(pictures, points, center, side, angle, flip, size, ROUGH)
        crops = disturb(crops, ROUGH)
        upside_down, pieces = (slice(count - (k + 1) * part, count - k * part) for k in (3, 4))
        crops[upside_down] = crops[upside_down].flip(2)
        crops[pieces] = shuffled(crops[pieces])
        is_face = (torch.arange(count, device=self.device) < count - 5 * part).float()
        return crops, labels, is_face

    def _places(self, points: Tensor, misfit: int, half_out: int):
        """Centre (B, 2), side [pixels] and angle (B,) of crops; negatives from the indices on."""
        count, device = len(points), points.device
        low, high = points[:, 17:].amin(1), points[:, 17:].amax(1)
        inner = (high - low).amax(1)
        second = torch.rand(count, device=device) < 0.5  # crops like the second look's
        loose = torch.where(second, 0.03, 0.16)
        side = inner * torch.where(
            second, CROP_MARGIN * self._between(count, 0.93, 1.07), self._between(count, 1.1, 2.3)
        )
        shift = self._between((count, 2), -1, 1)
        angle = torch.randn(count, device=device) * torch.where(second, 0.05, 0.28)
        center = (low + high) / 2 + shift * (loose * side)[:, None]
        far = torch.rand(count - misfit, device=device) < 0.5
        scale = torch.where(
            far, self._between(count - misfit, 2.2, 4.0), self._between(count - misfit, 0.15, 0.4)
        )
        side[misfit:] = (inner * 1.7)[misfit:] * scale
        center[misfit:] = self._between((count - misfit, 2), 0, self.pictures.shape[1])
        aside = slice(half_out, misfit)  # more than half of the face is outside the crop
        side[aside] = inner[aside] * self._between(misfit - half_out, 1.1, 1.8)
        away = F.normalize(torch.randn(misfit - half_out, 2, device=device))
        away = away * (side[aside] * self._between(misfit - half_out, 0.55, 0.8))[:, None]
        center[aside] = ((low + high) / 2)[aside] + away
        return center, side, angle

    def _close_places(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Centre (B, 2), side [pixels] and angle (B,) of crops by slightly wrong points."""
        low, high = points[:, 17:].amin(1), points[:, 17:].amax(1)
        by_chance = torch.randn(4, len(points), device=points.device)
        side = CROP_MARGIN * (high - low).amax(1) * torch.exp(0.05 * by_chance[0])
        return (low + high) / 2 + 0.025 * side[:, None] * by_chance[2:].T, side, 0.05 * by_chance[1]

    def _random(self, *shape: int) -> Tensor:
        return torch.rand(*shape, device=self.device)

    def _between(self, shape, low: float, high: float) -> Tensor:
        return torch.empty(shape, device=self.device).uniform_(low, high)


def cut(
    pictures: Tensor,
    points: Tensor,
    center: Tensor,
    side: Tensor,
    angle: Tensor,
    flip: Tensor,
    size: int,
    disturbance: Disturbance = ROUGH,
):
    """Rotated, stretched and partly mirrored square crops of pictures (B, S, S, 3), and their points.

    Some pictures end close to the face, like those cropped to a face.

    Returns:
        (B, 3, size, size) in [-1, 1] and (B, 68, 2) relative to the side.
    """
    turn = _turns(angle, flip, disturbance.stretch) * (side / 2)[:, None, None]  # -1..1 of a crop -> pixels
    steps = (torch.arange(size, device=turn.device) * 2 + 1) / size - 1
    square = torch.stack([steps.expand(size, size), steps[:, None].expand(size, size)], -1)
    places = (square.view(1, -1, 2) @ turn.mT + center[:, None]).view(-1, size, size, 2)
    crops = _look_up(pictures, places, *_rims(points, pictures.shape[1], disturbance.tight))
    labels = torch.linalg.solve(turn, (points - center[:, None]).mT).mT / 2 + 0.5
    return crops, torch.where(flip[:, None, None], labels[:, MIRROR], labels)


def _turns(angle: Tensor, flip: Tensor, stretch: float) -> Tensor:
    """Crop to picture, (B, 2, 2): turned by `angle` [radians], mirrored if `flip`, stretched at random."""
    count, device = len(angle), angle.device
    cos, sin = angle.cos(), angle.sin()
    turn = torch.stack([cos, -sin, sin, cos], 1).view(-1, 2, 2)
    turn = turn * torch.where(flip[:, None], torch.tensor([-1.0, 1.0], device=device), 1.0)[:, None]
    return (torch.eye(2, device=device) + torch.randn(count, 2, 2, device=device) * stretch) @ turn


def _look_up(pictures: Tensor, places: Tensor, low: Tensor, high: Tensor, fill: Tensor) -> Tensor:
    """Pictures (B, S, S, 3) at places (B, H, W, 2) [pixels], as (B, 3, H, W) in [-1, 1]; see `_rims`."""
    whole = pictures.shape[1]
    inside = ((places >= low) & (places <= high)).all(-1)
    grid = (places.clamp(low, high) + 0.5) * (2 / whole) - 1
    crops = F.grid_sample(
        pictures.permute(0, 3, 1, 2).float() / 127.5 - 1, grid, padding_mode="border", align_corners=False
    )
    drawn_out = fill > 1
    return torch.where(
        (inside | drawn_out[:, None, None])[:, None], crops, fill.clamp(max=1.0)[:, None, None, None]
    )


def _rims(points: Tensor, whole: int, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """Borders of pictures: top left and bottom right (B, 1, 1, 2), and the grey level (B,) beyond.

    A share of them is close to the face or slightly inside it. The level 2 means replicated borders.
    """
    count, device = len(points), points.device
    face_low, face_high = points.amin(1), points.amax(1)
    extent = face_high - face_low
    margin = torch.empty(2, count, 2, device=device).uniform_(-0.12, 0.3)
    margin[0, :, 1] += 0.12 * (margin[0, :, 1] > 0)  # the forehead is above the points
    tight = (torch.rand(count, device=device) < share)[:, None]
    low = torch.where(tight, face_low - margin[0] * extent, torch.zeros_like(extent))
    high = torch.where(tight, face_high + margin[1] * extent, torch.full_like(extent, whole - 1))
    kinds = torch.tensor([0.0, 0.0, 0.0, -1.0, 2.0, 1.0], device=device)
    fill = kinds[torch.randint(len(kinds), (count,), device=device)]
    low, high = low.clamp(0, whole - 1), high.clamp(0, whole - 1)
    return low[:, None, None], torch.maximum(high, low + 1)[:, None, None], fill


def disturb(crops: Tensor, disturbance: Disturbance = ROUGH) -> Tensor:
    """Degrade crops (B, 3, S, S) in [-1, 1] by occlusion, blur, low resolution, light, colour and noise."""
    crops = _occlude(crops, disturbance.covered)
    order = torch.randperm(len(crops), device=crops.device)
    for kind, group in zip(disturbance.poor, order.chunk(len(disturbance.poor)), strict=False):
        crops[group] = POOR[kind](crops[group])
    count, device = len(crops), crops.device

    def some(share: float, low: float, high: float, otherwise: float) -> Tensor:
        value = torch.empty(count, 1, 1, 1, device=device).uniform_(low, high)
        return torch.where(torch.rand(count, 1, 1, 1, device=device) < share, value, otherwise)

    grey = crops.mean(1, keepdim=True)
    crops = grey + (crops - grey) * some(0.6, 0.0, 1.4, 1.0) * some(0.25, 0.0, 0.0, 1.0)
    light = ((crops + 1) / 2).clamp(1e-3, 1) ** some(0.5, 0.5, 2.0, 1.0)
    tint = 1 + torch.randn(count, 3, 1, 1, device=device) * some(0.4, 0.0, 0.12, 0.0)
    crops = (light * 2 - 1) * tint * some(0.7, 0.6, 1.4, 1.0) + some(0.7, -0.2, 0.25, 0.0)
    crops = crops + torch.randn_like(crops) * some(0.4, 0.0, 0.15, 0.0)
    return crops.clamp(-1, 1)


def _occlude(crops: Tensor, shares: tuple[float, ...]) -> Tensor:
    """Cover these shares of the crops by a block or disc, of one colour or from another crop."""
    count, device, size = len(crops), crops.device, crops.shape[-1]
    at = (torch.arange(size, device=device) + 0.5) / size
    for share in shares:
        middle = torch.rand(2, count, 1, 1, device=device)
        half = torch.empty(2, count, 1, 1, device=device).uniform_(0.04, 0.2)
        x, y = (at[None, None, :] - middle[0]) / half[0], (at[None, :, None] - middle[1]) / half[1]
        disc = torch.rand(count, 1, 1, device=device) < 0.5
        covered = torch.where(disc, x**2 + y**2, torch.maximum(x.abs(), y.abs())) < 1
        covered &= torch.rand(count, 1, 1, device=device) < share
        colour = torch.empty(count, 3, 1, 1, device=device).uniform_(-1, 1).expand_as(crops)
        plain = torch.rand(count, 1, 1, 1, device=device) < 0.5
        before = torch.where(plain, colour, crops.roll(1, 0).flip(2))
        crops = torch.where(covered[:, None], before, crops)
    return crops


def _lower(crops: Tensor) -> Tensor:
    """Reduce the resolution, by the same factor for all crops."""
    size = crops.shape[-1]
    small = int(torch.randint(max(size // 6, 4), round(size * 0.7), ()))
    return F.interpolate(F.interpolate(crops, (small, small), mode="area"), (size, size), mode="bilinear")


def _blur(crops: Tensor, length: int) -> Tensor:
    """Gaussian blur, or motion blur of up to `length` pixels, the same for all crops."""
    if length:
        taps = torch.ones(int(torch.randint(2, length + 1, ())))
    else:
        sigma = float(torch.empty(()).uniform_(0.5, 3.0))
        taps = torch.exp(-0.5 * (torch.arange(-8, 9) / sigma) ** 2)
    taps = (taps / taps.sum()).to(crops.device)
    kernels = [taps.view(1, 1, 1, -1), taps.view(1, 1, -1, 1)]
    if length:
        kernels = [kernels[int(torch.randint(2, ()))]]
    flat = crops.flatten(0, 1)[:, None]
    for kernel in kernels:
        before = (len(taps) - 1) // 2
        rims = (before, len(taps) - 1 - before)
        rims = (*rims, 0, 0) if kernel.shape[-1] > 1 else (0, 0, *rims)
        flat = F.conv2d(F.pad(flat, rims, mode="replicate"), kernel)
    return flat.view_as(crops)


POOR = {
    "coarse": _lower,
    "blurred": lambda crops: _blur(crops, 0),
    "shaken": lambda crops: _blur(crops, 7),
    "sharp": lambda crops: crops,
}


def shuffled(crops: Tensor) -> Tensor:
    """The crops with their 4 x 4 tiles in another order."""
    side = crops.shape[-1] // 4
    pieces = crops.unfold(2, side, side).unfold(3, side, side).flatten(2, 3)
    pieces = pieces[:, :, torch.randperm(16, device=crops.device)]
    return pieces.unflatten(2, (4, 4)).permute(0, 1, 2, 4, 3, 5).reshape(crops.shape)
