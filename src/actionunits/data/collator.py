"""Collate aligned faces into a model's inputs: `pixel_values`, `au_centers` and `labels`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from actionunits.action_units import UNKNOWN
from actionunits.au_regions import au_centers
from actionunits.data.augmentation import (
    NO_AUGMENTATION,
    Augmentation,
    InputGeometry,
    compose,
    jitter,
    sample_placement,
    transform_points,
    warp,
)
from actionunits.landmarks import get_scheme


@dataclass(frozen=True)
class AUCollator:
    """Collates items of `AlignedFaces` into a batch for any AU model.

    With `transformers.Trainer` it needs `remove_unused_columns=False`, which keeps the items' columns.

    Attributes:
        aus: FACS numbers of the m label columns.
        scheme: Name of the landmark scheme.
        geometry: Sizes of aligned face, crop and input.
        mean: Mean of pixels in [0, 1], per channel.
        std: Their standard deviation, per channel.
        augmentation: Augmentation in training; `NO_AUGMENTATION` for evaluation.
        target: "occurrence" for binary labels, "intensity" for soft ones.
        full_intensity: A soft label is min(intensity / full_intensity, 1).
        au_centers: Definition of the AU centres in `actionunits.au_regions`.
        places: FACS numbers of the AU centres, `model.config.places`; by default those of `aus`.
    """

    aus: Sequence[int]
    scheme: str = "ibug68"
    geometry: InputGeometry = InputGeometry()
    mean: Sequence[float] = (0.5, 0.5, 0.5)
    std: Sequence[float] = (0.5, 0.5, 0.5)
    augmentation: Augmentation = NO_AUGMENTATION
    target: Literal["occurrence", "intensity"] = "occurrence"
    full_intensity: float = 1.0
    au_centers: str = "shao"
    places: Sequence[int] | None = None

    def __call__(self, samples: Any) -> dict[str, Tensor]:
        """Stack the samples and return the model's inputs, augmented with PyTorch's global generator."""
        return self.inputs(stack_samples(samples))

    def inputs(self, batch: dict[str, Tensor], generator: Generator | None = None) -> dict[str, Tensor]:
        """The model's inputs for a stacked batch, computed on the batch's device.

        Args:
            batch: As returned by `AlignedFaces.__getitems__`.
            generator: CPU generator for the augmentation.

        Returns:
            `pixel_values` (B, 3, S, S) float32, `au_centers` (B, m, 2, 2) x, y in pixels of the input (of
            `places`, if given), and `labels` (B, m) float32 in [0, 1] or `UNKNOWN`.
        """
        pictures = batch["pictures"]
        placement = sample_placement(len(pictures), self.geometry, self.augmentation, generator)
        to_input = compose(placement.of_picture.float().to(pictures.device), batch["alignments"])
        pixels = jitter(warp(pictures, to_input, self.geometry.input_size), self.augmentation, generator)
        return {
            "pixel_values": self._normalize(pixels),
            "au_centers": self._centers(batch, placement, generator),
            "labels": self._labels(batch),
        }

    def _normalize(self, pixels: Tensor) -> Tensor:
        mean, std = (pixels.new_tensor(values).view(1, 3, 1, 1) for values in (self.mean, self.std))
        normalized = (pixels / 255 - mean) / std
        return normalized.contiguous(memory_format=torch.channels_last)

    def _centers(self, batch: dict[str, Tensor], placement: Any, generator: Generator | None) -> Tensor:
        points = transform_points(batch["alignments"], batch["landmarks"])
        if self.augmentation.landmark_noise:
            noise = torch.randn(points.shape, generator=generator)
            points = points + self.augmentation.landmark_noise * noise.to(points.device)
        points = transform_points(placement.of_points.float().to(points.device), points)
        mirror = torch.tensor(get_scheme(self.scheme).mirror, device=points.device)
        mirrored = placement.mirrored.to(points.device).view(-1, 1, 1)
        points = torch.where(mirrored, points[:, mirror], points)  # left points stay left
        places = self.aus if self.places is None else self.places
        return au_centers(points, self.scheme, places, self.au_centers)

    def _labels(self, batch: dict[str, Tensor]) -> Tensor:
        if self.target == "occurrence":
            return batch["occurrence"].float()
        if "intensities" not in batch:
            raise ValueError("target='intensity' needs a corpus with intensities; use target='occurrence'.")
        intensities = batch["intensities"].float()
        soft = (intensities / self.full_intensity).clamp(max=1)
        return soft.masked_fill((batch["occurrence"] == UNKNOWN) | (intensities == UNKNOWN), UNKNOWN)


def stack_samples(samples: Any) -> dict[str, Tensor]:
    """Stack a list of samples; a batch already stacked by `__getitems__` is returned as it is."""
    if isinstance(samples, dict):
        return samples
    if not all(isinstance(sample, dict) and sample for sample in samples):
        raise ValueError(
            "the samples have lost their columns; pass remove_unused_columns=False to TrainingArguments."
        )
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
