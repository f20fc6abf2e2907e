"""From faces to what a model takes: `pixel_values`, `au_centers` and `labels` of a batch."""

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

    It serves `transformers.Trainer` with `remove_unused_columns=False`, for items have columns of their own.

    Attributes:
        aus: FACS numbers of the m label columns.
        scheme: Name of the landmark scheme.
        geometry: Sizes of the aligned face, the crop and the input.
        mean: Subtracted from pixels in [0, 1], per channel.
        std: Divides them, per channel.
        augmentation: What varies in training; `NO_AUGMENTATION` for evaluation.
        target: "occurrence" for labels 1 and 0, "intensity" for soft labels: the score follows the intensity.
        full_intensity: Intensity from which on a soft label is 1; below it is intensity / full_intensity.
        au_centers: Definition of the AU centres in `actionunits.au_regions`.
        places: FACS numbers whose centres are emitted, `model.config.places`; the m of `aus` by default.
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
        """Stack the samples and make the model's inputs of them, with PyTorch's global randomness."""
        return self.inputs(stack_samples(samples))

    def inputs(self, batch: dict[str, Tensor], generator: Generator | None = None) -> dict[str, Tensor]:
        """The model's inputs of a stacked batch, made on the device where the batch lies.

        Args:
            batch: As `AlignedFaces.__getitems__` gives it.
            generator: Randomness of the augmentation, on the CPU.

        Returns:
            `pixel_values` (B, 3, S, S) float32, `au_centers` (B, m, 2, 2) x, y in pixels of the input (of
            `places` instead of the m), and
            `labels` (B, m) float32 in [0, 1] or `UNKNOWN`.
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
        points = torch.where(mirrored, points[:, mirror], points)  # left stays left
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
    """Stack a list of samples; a batch that comes stacked already (`__getitems__`) passes."""
    if isinstance(samples, dict):
        return samples
    if not all(isinstance(sample, dict) and sample for sample in samples):
        raise ValueError(
            "the columns of the samples are gone; pass remove_unused_columns=False to TrainingArguments."
        )
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
