"""Ensemble of different networks by the mean of their logits.

It is not from a paper, but generalises ESCDA's ensemble (Sec. 3.3): networks of different architecture make
different errors, most of all on pictures unlike those of the training. ESCDA averages probabilities; here
logits are averaged, which gives confident networks more influence.

    picture (B, 3, S, S) -> for each network, downsampled to its input size -> logits (B, m) -> their mean

Shapes: B pictures, m action units, p action units with centres as input, k networks.
"""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from actionunits.modeling_au import AUPreTrainedModel, on_one_device
from actionunits.modeling_outputs import AUDetectionOutput
from actionunits.models.ac2d.modeling_ac2d import Ac2dForAUDetection
from actionunits.models.auformer.modeling_auformer import AUFormerForAUDetection
from actionunits.models.escda.modeling_escda import GdaForAUDetection, LscForAUDetection
from actionunits.models.geometry.modeling_geometry import GeometryForAUDetection
from actionunits.models.gtlenet.modeling_gtlenet import GtleNetForAUDetection
from actionunits.models.lac.modeling_lac import LacForAUDetection

from .configuration_ensemble import EnsembleConfig, input_size

logger = logging.get_logger(__name__)

NETWORKS: dict[str, type[AUPreTrainedModel]] = {
    "lsc": LscForAUDetection,
    "gda": GdaForAUDetection,
    "gtlenet": GtleNetForAUDetection,
    "ac2d": Ac2dForAUDetection,
    "auformer": AUFormerForAUDetection,
    "lac": LacForAUDetection,
    "geometry": GeometryForAUDetection,
}
SHOWN = (
    *("au_attentions", "au_attentions_unconstrained", "au_masks", "au_evidence"),
    *("hidden_states", "attentions"),
)
"""Optional outputs, of which the ensemble returns that of the first network that has it."""


class EnsembleForAUDetection(AUPreTrainedModel):
    """Weighted mean of the logits of networks, which are trained independently."""

    config: EnsembleConfig
    _supports_sdpa = True

    def __init__(self, config: EnsembleConfig):
        super().__init__(config)
        if left_out := "|".join(name for name in NETWORKS if name not in config.networks):
            # No warning about their weights.
            ignored = self._keys_to_ignore_on_load_unexpected or []
            self._keys_to_ignore_on_load_unexpected = [*ignored, rf"^(?:{left_out})\."]
        for name, network in config.networks.items():
            if not NETWORKS[name]._supports_sdpa:
                network._attn_implementation = "eager"  # it has no attention kernels
            setattr(self, name, NETWORKS[name](network))
        self.post_init()

    @property
    def networks(self) -> dict[str, AUPreTrainedModel]:
        """The networks by name, in the order of `branch_logits`."""
        return {name: getattr(self, name) for name in self.config.networks}

    @property
    def needs_au_centers(self) -> bool:
        """Whether a network needs them."""
        return any(network.needs_au_centers for network in self.networks.values())

    @classmethod
    def from_networks(cls, *networks: AUPreTrainedModel, **config_kwargs: Any) -> "EnsembleForAUDetection":
        """Combine copies of trained networks.

        Args:
            networks: Networks of different kinds for the same action units in the same order, whose image
                processors differ at most in the size of the picture and in the centres.
            config_kwargs: Fields of `EnsembleConfig`, such as `au_thresholds`.

        Returns:
            The ensemble in evaluation mode, on the device of the first network; types stay as they are.

        Raises:
            ValueError: There are no networks, two of one kind, one of an unknown kind, or they have different
                action units.
        """
        names = [_name_of(network) for network in networks]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"An ensemble has one network of each kind, got {names}.")
        configs = {f"{name}_config": copy.deepcopy(n.config) for name, n in zip(names, networks, strict=True)}
        for config in configs.values():
            config.name_or_path = ""  # without the path of its folder
        model = cls(EnsembleConfig(**configs, **config_kwargs))  # type: ignore[arg-type]
        for name, network in zip(names, networks, strict=True):
            values = {key: value.clone() for key, value in network.state_dict().items()}
            model.networks[name].load_state_dict(values, assign=True)
        return model.to(networks[0].device).eval()  # type: ignore[arg-type]

    def freeze(self) -> None:
        """Freeze the parameters that the networks' configurations name."""
        for network in self.networks.values():
            network.freeze()

    def load_named_parts(self) -> None:
        """Load the backbones and encoders that the networks' configurations name."""
        for network in self.networks.values():
            network.load_named_parts()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        au_centers: Tensor | None = None,
        labels: Tensor | None = None,
        output_au_attentions: bool = False,
        **kwargs: Any,
    ) -> AUDetectionOutput:
        """Detect action units.

        Args:
            pixel_values: (B, 3, image_size, image_size) normalised aligned faces.
            au_centers: (B, p, 2, 2) the two centres (x, y) of the action units of `config.places`, which are
                the m and at most a few more, in pixels of `pixel_values` (origin: centre of the top-left
                pixel); for networks that need them.
            labels: (B, m) occurrences in [0, 1], or -1 for unknown; adds the loss, the sum of the networks'.
            output_au_attentions: Return the networks' maps, each (and hidden states, if requested) of the
                first network that has it; `au_evidence` is in units of that network's logit.
            kwargs: Passed to all networks, such as `output_hidden_states`.

        Returns:
            The ensemble's logits, and `branch_logits` (B, k, m) of the networks. If only the centres of the m
            action units are given, networks that need others are left out with a warning.

        Raises:
            ValueError: Pictures have another size, or the input is invalid for a network.
        """
        self._check_size(pixel_values)
        networks = self._answering(au_centers)
        inputs = {"pixel_values": pixel_values, "au_centers": au_centers, "labels": labels}
        asked = self.asked_of_networks(kwargs)
        wanted = asked | {"output_au_attentions": output_au_attentions, "return_dict": True}
        outputs: list[AUDetectionOutput] = [
            network(**self._inputs_of(network, inputs), **wanted) for network in networks.values()
        ]
        logits = torch.stack(on_one_device(output["logits"] for output in outputs), dim=1)  # (B, k, m)
        loss = None
        if labels is not None:
            loss = torch.stack(on_one_device(output["loss"] for output in outputs)).sum()
        return AUDetectionOutput(
            loss=loss,
            logits=torch.einsum("bkm,k->bm", logits, self._shares(networks).to(logits)),
            branch_logits=logits,
            **{name: _first(getattr(output, name) for output in outputs) for name in SHOWN},
        )

    def end_of_epoch(self, batches: Iterable[Mapping[str, Tensor]] | None = None) -> None:
        """Call `end_of_epoch` of the networks that have it; see `EndOfEpochCallback`.

        Args:
            batches: Inputs of the ensemble with the training set once, for networks that need them.
        """
        self._call_networks("end_of_epoch", batches)

    def break_off_epoch(self, batches: Iterable[Mapping[str, Tensor]] | None = None) -> None:
        """Call `break_off_epoch` of the networks that have it; arguments as in `end_of_epoch`."""
        self._call_networks("break_off_epoch", batches)

    def _call_networks(self, method: str, batches: Iterable[Mapping[str, Tensor]] | None) -> None:
        for network in self.networks.values():
            if hasattr(network, method):
                inputs = None if batches is None else (self._inputs_of(network, batch) for batch in batches)
                getattr(network, method)(inputs)

    def _inputs_of(self, network: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The ensemble's inputs for one of its networks."""
        side, size = self.config.image_size, input_size(network.config)
        return {
            **inputs,
            "pixel_values": reduced(inputs["pixel_values"], size),
            "au_centers": reduced_centers(self._centers_of(network, inputs.get("au_centers")), side, size),
        }

    def _centers_of(self, network: Any, au_centers: Tensor | None) -> Tensor | None:
        """The centres (B, p, 2, 2) for a network."""
        every, own = self.config.places, network.config.places
        if au_centers is None or every is None or every == own:
            return au_centers
        if own is not None and set(own) <= set(every):
            return au_centers[:, [every.index(au) for au in own]]
        if au_centers.shape[1] != len(every):  # given by hand
            return au_centers
        if network.needs_au_centers:
            raise ValueError(
                f"{type(network).__name__} needs the centres of {self.config.au_labels}, which have none; "
                "leave it out of the ensemble."
            )
        return None

    def _answering(self, au_centers: Tensor | None) -> dict[str, AUPreTrainedModel]:
        """The networks without those that need more centres than are given."""
        places, aus, networks = self.config.places, self.config.aus, self.networks
        silent = [name for name, network in networks.items() if network.config.places != aus]
        if au_centers is None or places is None or not silent or au_centers.shape[1] == len(places):
            return networks
        remedy = (
            f"au_centers has shape {tuple(au_centers.shape)}, but {', '.join(silent)} read among the centres "
            f"of the action units {places}. The image processor of `config.processor_options`, or "
            "AUCollator with `places=model.config.places`, gives them."
        )
        if au_centers.shape[1] != self.config.num_labels or len(silent) == len(networks):
            raise ValueError(remedy)
        logger.warning_once(f"{', '.join(silent)} left out of the mean: {remedy}")
        return {name: network for name, network in networks.items() if name not in silent}

    def _shares(self, networks: Iterable[str]) -> Tensor:
        """Normalised weights of the networks, (k,)."""
        given = self.config.network_weights or {}
        weights = torch.tensor([float(given.get(name, 1)) for name in networks])
        return weights / weights.sum()

    def _check_size(self, pixel_values: Tensor) -> None:
        side = self.config.image_size
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[2:]) != (side, side):
            raise ValueError(
                f"Pictures of shape {tuple(pixel_values.shape)}, but the ensemble expects "
                f"(B, 3, {side}, {side}); let the image processor crop them."
            )


def reduced(pixel_values: Tensor, size: int) -> Tensor:
    """Downsample pictures (B, 3, S, S) to (B, 3, size, size), with antialiasing."""
    if pixel_values.shape[-1] == size:
        return pixel_values
    pictures = pixel_values.float()  # not implemented in half precision on CPUs
    pictures = F.interpolate(pictures, (size, size), mode="bilinear", antialias=True)
    return pictures.to(pixel_values.dtype)


def reduced_centers(au_centers: Tensor | None, side: int, size: int) -> Tensor | None:
    """Scale centres from pictures of `side` pixels to those of `size` (origin: see `forward`)."""
    if au_centers is None or side == size:
        return au_centers
    return (au_centers + 0.5) * (size / side) - 0.5


def _first(values: Iterable[Any]) -> Any:
    return next((value for value in values if value is not None), None)


def _name_of(network: AUPreTrainedModel) -> str:
    for name, model_class in NETWORKS.items():
        if type(network) is model_class:
            return name
    known = ", ".join(model_class.__name__ for model_class in NETWORKS.values())
    raise ValueError(f"{type(network).__name__} is none of the networks of an ensemble: {known}.")


__all__ = ["EnsembleForAUDetection"]
