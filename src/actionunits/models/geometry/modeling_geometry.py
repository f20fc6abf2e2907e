"""A multilayer perceptron on AU centres, without pixels.

It is not from a paper. Action unit detection from facial geometry is older than the five papers (Tian, Kanade
and Cohn: Recognizing action units for facial expression analysis. PAMI, 2001). It complements the networks on
pixels in ensembles, as its errors differ: it is independent of skin, light and beards.

    centres (B, p, 2, 2) -> less their mean, standardised (B, 4 p) -> layers (B, C) -> logits (B, m)

Shapes: B faces, p action units with two centres as input, m action units, C units of a layer.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.generic import can_return_tuple

from actionunits.modeling_au import AUClassifier, AUPreTrainedModel, or_default, sum_over_processes
from actionunits.modeling_outputs import AUDetectionOutput

from .configuration_geometry import GeometryConfig

SMALLEST_VARIANCE = 1e-6  # standard deviation of a thousandth of the picture's width


class GeometryForAUDetection(AUPreTrainedModel):
    """Action unit detection from AU centres, without pixels."""

    config: GeometryConfig
    base_model_prefix = "geometry"
    _no_split_modules = ["Standardization", "GeometryLayer", "AUClassifier"]
    _keep_in_fp32_modules_strict = ["standardization.mean$", "standardization.variance$"]

    def __init__(self, config: GeometryConfig):
        super().__init__(config)
        widths = [4 * len(config.places), *config.hidden_sizes]
        self.standardization = Standardization(widths[0])
        self.layers = nn.ModuleList(
            GeometryLayer(inputs, outputs, config.dropout)
            for inputs, outputs in zip(widths[:-1], widths[1:], strict=True)
        )
        self.classifier = AUClassifier(config, widths[-1])
        self.post_init()

    @property
    def needs_au_centers(self) -> bool:
        """Always."""
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=self.config.initializer_range / math.sqrt(module.in_features))
            init.zeros_(module.bias)
        elif isinstance(module, Standardization):
            init.zeros_(module.mean)
            init.ones_(module.variance)
            init.zeros_(module.count)
        else:
            super()._init_weights(module)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        au_centers: Tensor | None = None,
        labels: Tensor | None = None,
        output_au_attentions: bool = False,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> AUDetectionOutput:
        """Detect action units.

        Args:
            pixel_values: Ignored; an argument of all models.
            au_centers: (B, p, 2, 2) the two centres (x, y) of every action unit of `config.places`, in pixels
                of an input of `config.image_size`.
            labels: (B, m) occurrences in [0, 1], or -1 for unknown; adds the loss.
            output_au_attentions: Ignored; there are no maps.
            output_hidden_states: Return the standardised centres (B, 4 p) and the layers' outputs (B, C).
            kwargs: Ignored.

        Raises:
            ValueError: Centres are missing, or of other action units.
        """
        positions = self._positions(au_centers)
        states = [self.standardization(positions).to(self.classifier.weight.dtype)]
        for layer in self.layers:
            states.append(layer(states[-1]))
        logits = self.classifier(states[-1])
        want_states = or_default(output_hidden_states, self.config.output_hidden_states)
        return AUDetectionOutput(
            loss=None if labels is None else self.au_loss(logits, labels),
            logits=logits,
            hidden_states=tuple(states) if want_states else None,
        )

    def _positions(self, au_centers: Tensor | None) -> Tensor:
        """Centres relative to their mean, in widths of the picture, at least float32: (B, 4 p)."""
        places = self.config.places
        if au_centers is None:
            raise ValueError(
                "This network needs au_centers, which are missing. Pass all that the image processor returns "
                "for landmarks, model(**inputs)."
            )
        if tuple(au_centers.shape[1:]) != (len(places), 2, 2):
            raise ValueError(
                f"au_centers has shape {tuple(au_centers.shape)}, expected (B, {len(places)}, 2, 2): two "
                f"centres of each of the action units {places}. The image processor of "
                "`config.processor_options`, or AUCollator with `places=model.config.places`, gives them."
            )
        positions = au_centers.to(torch.promote_types(au_centers.dtype, torch.float32))
        positions = positions.flatten(1, 2) / self.config.image_size  # (B, 2 p, 2)
        return (positions - positions.mean(1, keepdim=True)).flatten(1)


class Standardization(nn.Module):
    """Standardises features (B, n) by mean and standard deviation of all training samples so far.

    Unlike batch normalisation it does the same in training and evaluation, and works for a single face.
    """

    mean: Tensor
    variance: Tensor
    count: Tensor

    def __init__(self, features: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(features, dtype=torch.float32))
        self.register_buffer("variance", torch.ones(features, dtype=torch.float32))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        """Standardise x; in training, update the statistics first."""
        if self.training:
            self._see(x.detach())
        return (x - self.mean) / (self.variance + SMALLEST_VARIANCE).sqrt()

    def _see(self, x: Tensor) -> None:
        """Update mean and variance by x, of which every process has a share."""
        x = x.to(self.mean)
        new = sum_over_processes(torch.full_like(self.count, len(x)))
        mean = sum_over_processes(x.sum(0)) / new.clamp(min=1)
        variance = sum_over_processes(((x - mean) ** 2).sum(0)) / new.clamp(min=1)
        share = new / (self.count + new).clamp(min=1)  # of the new ones among all
        step = mean - self.mean
        self.variance.copy_(torch.lerp(self.variance, variance, share.to(variance)))
        self.variance.add_(share * (1 - share) * step**2)
        self.mean.add_(share * step)
        self.count.add_(new)


class GeometryLayer(GradientCheckpointingLayer):
    """A fully connected layer: (B, inputs) -> (B, outputs)."""

    def __init__(self, inputs: int, outputs: int, dropout: float):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.activation = nn.GELU()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output."""
        return self.dropout(self.activation(self.linear(x)))


__all__ = ["GeometryForAUDetection"]
