"""Base class of all models, and their shared output layer."""

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.utils import logging

from actionunits.configuration_au import AUConfig
from actionunits.losses import occurrence_weights, weighted_au_loss

logger = logging.get_logger(__name__)


class CheckpointedPreTrainedModel(PreTrainedModel):
    """A model whose batch statistics include each batch once, even with gradient checkpointing."""

    supports_gradient_checkpointing = True

    def get_input_embeddings(self) -> None:  # type: ignore[override]
        """None: no model embeds tokens. Accelerate asks when it shards a model."""
        return None

    def in_own_type(self, pixel_values: Tensor) -> Tensor:
        """Return pictures in the dtype of the weights, which half-precision evaluation changes.

        Integers are not normalised pictures; they are left for the first layer to reject.
        """
        return pixel_values.to(self.dtype) if pixel_values.is_floating_point() else pixel_values

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        arguments = getattr(gradient_checkpointing_func, "keywords", {})
        if arguments.get("use_reentrant"):
            logger.warning_once(
                "use_reentrant=True would lose gradients and count batches twice; using False instead."
            )
            gradient_checkpointing_func = functools.partial(gradient_checkpointing_func, use_reentrant=False)
            arguments = gradient_checkpointing_func.keywords
        if arguments.get("use_reentrant") is False and "context_fn" not in arguments:
            gradient_checkpointing_func = functools.partial(
                gradient_checkpointing_func,
                context_fn=lambda: (nullcontext(), _batch_statistics_kept(self)),
            )
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, *args, **kwargs)


class AUPreTrainedModel(CheckpointedPreTrainedModel):
    """Base class of all action unit models.

    Parameters of a single action unit are stored under its label (`classifier.AU12.weight`). So
    `from_pretrained(folder, aus=[25, 12])` loads the heads of the action units in the folder, in any order,
    and initialises the others.
    """

    config: AUConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)  # type: ignore[assignment]
    accepts_loss_kwargs = False  # the Trainer, not the loss, divides by the accumulation steps

    def __init__(self, config: AUConfig, *inputs: Any, **kwargs: Any):
        super().__init__(config, *inputs, **kwargs)
        if config.aus is not None:  # no warning about the many heads of other action units
            known = "|".join(map(str, config.aus))
            self._keys_to_ignore_on_load_unexpected = [rf"\.AU(?!(?:{known})(?:\.|$))[0-9]+(?:\.|$)"]

    @property
    def needs_au_centers(self) -> bool:
        """Whether the model needs `au_centers`, also at inference."""
        return False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a saved model, and freeze the parameters that its configuration names."""
        result = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = result[0] if isinstance(result, tuple) else result
        model.freeze()
        return result

    @classmethod
    def _from_config(cls, config: AUConfig, **kwargs: Any) -> Any:
        model = super()._from_config(config, **kwargs)
        model.load_named_parts()
        return model

    def freeze(self) -> None:
        """Freeze the parameters that the configuration names; loading weights unfreezes them."""

    def load_named_parts(self) -> None:
        """Load parts that the configuration names by folder or Hub name, such as a backbone."""

    def adapt_to_aus(self, aus: Iterable[int]):
        """Return a copy of this model for other action units; known ones keep their heads.

        Args:
            aus: FACS numbers in the new output order.

        Raises:
            ValueError: Unknown or repeated action units.
        """
        config = copy.deepcopy(self.config)
        config.aus = list(aus)
        make: Any = super(AUPreTrainedModel, type(self))._from_config  # without loading a backbone
        model = make(config, dtype=self.dtype)
        model.load_state_dict(self.state_dict(), strict=False)
        return model.to(self.device).train(self.training)

    def asked_of_networks(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return keywords for the networks of a model, with the outputs requested by its configuration."""
        asked = ("output_hidden_states", "output_attentions")
        return kwargs | {
            name: True for name in asked if kwargs.get(name) is None and getattr(self.config, name)
        }

    def check_centers(self, au_centers: Tensor, batch: Sequence[int]) -> None:
        """Check the centres of action units.

        Args:
            au_centers: Two centres (x, y) of each action unit, (*batch, m, 2, 2).
            batch: (B,), or (B, T) of clips.

        Raises:
            ValueError: They have another shape.
        """
        labels = self.config.au_labels
        expected = (*batch, len(labels), 2, 2)
        if tuple(au_centers.shape) != expected:
            raise ValueError(
                f"au_centers has shape {tuple(au_centers.shape)}, expected {expected}: this model has "
                f"{len(labels)} action units, {', '.join(labels)}, with two centres each."
            )

    def au_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return `weighted_au_loss` with the occurrence rates of the config."""
        rates = self.config.au_occurrence_rates
        w, v = (None, None) if rates is None else occurrence_weights(rates)
        return weighted_au_loss(logits, labels, w, v)


class AUHeads(nn.Module):
    """Modules by the labels of their action units.

    Not an `nn.ModuleDict`, which PEFT does not accept in `modules_to_save`.
    """

    def __init__(self, heads: Mapping[str, nn.Module]):
        super().__init__()
        for name, head in heads.items():
            self.add_module(name, head)

    def __getitem__(self, name: str) -> Any:
        return self._modules[name]

    def __len__(self) -> int:
        return len(self._modules)

    def values(self) -> Iterable[Any]:
        """Return the modules in output order."""
        return self._modules.values()


class AUClassifier(AUHeads):
    """A linear output per action unit, named by its label: features (B, C) -> logits (B, m)."""

    def __init__(self, config: AUConfig, in_features: int):
        super().__init__({name: nn.Linear(in_features, 1) for name in module_names(config)})

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits."""
        weight, bias = self.weight, self.bias
        return F.linear(on_device(features, weight.device), weight, bias)

    @property
    def weight(self) -> Tensor:
        """Weights of all outputs, (m, C)."""
        return torch.cat(on_one_device(linear_map(head)[0] for head in self.values()))

    @property
    def bias(self) -> Tensor:
        """Biases of all outputs, (m,)."""
        return torch.cat(on_one_device(linear_map(head)[1] for head in self.values()))


def check_size(pixel_values: Tensor, size: int) -> None:
    """Check that pictures (..., H, W) are `size` pixels high and wide.

    Raises:
        ValueError: They are not.
    """
    if tuple(pixel_values.shape[-2:]) != (size, size):
        raise ValueError(
            f"Pictures of {tuple(pixel_values.shape[-2:])} pixels, but the model expects "
            f"{size} x {size}; let the image processor resize them."
        )


def or_default(asked: bool | None, default: bool | None) -> bool:
    """Return the caller's choice, or the configuration's default if it is None."""
    return bool(default if asked is None else asked)


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a tensor to a device; if it is there already, without a step in exported graphs."""
    return tensor if tensor.device == device else tensor.to(device)


def on_one_device(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Move tensors to the device of the first one, as `device_map` may have distributed their layers."""
    first, *others = tensors
    return [first, *(on_device(tensor, first.device) for tensor in others)]


def is_plain(layer: nn.Module) -> bool:
    """Whether a linear layer, convolution or batch normalisation can be computed from its parameters.

    If it is adapted by PEFT, quantised or offloaded by Accelerate, it must be called.
    """
    return type(layer) in (nn.Linear, nn.Conv2d, nn.BatchNorm2d) and not hasattr(layer, "_hf_hook")


def linear_map(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Return weight (n, C) and bias (n,) of a linear layer; if it is not plain, by calling it."""
    if is_plain(layer):
        return parameter_of(layer, "weight"), parameter_of(layer, "bias")
    known = next((p for p in layer.parameters() if p.is_floating_point() and not p.is_meta), torch.empty(0))
    width: Any = layer.in_features
    units = torch.eye(width, dtype=known.dtype, device=known.device)
    bias, weight = layer(torch.cat([torch.zeros_like(units[:1]), units])).split([1, len(units)])
    return (weight - bias).mT, bias[0]


def parameter_of(layer: nn.Module, name: str) -> Tensor:
    """Return a parameter or buffer of a layer that is not called, even if Accelerate offloads it.

    Parametrizations and `torch.func.functional_call` make it a plain tensor.
    """
    if not hasattr(layer, "_hf_hook"):
        return getattr(layer, name)
    hook: Any = layer._hf_hook
    hook.pre_forward(layer)
    parameter = getattr(layer, name)
    hook.post_forward(layer, None)
    return parameter


def module_names(config: AUConfig) -> list[str]:
    """Return the labels of the outputs as names of submodules, without dots.

    Raises:
        ValueError: A label is an attribute of modules, or two labels have the same name.
    """
    names = [label.replace(".", "_") for label in config.au_labels]
    taken = (nn.ModuleDict(), AUClassifier)
    for label, name in zip(config.au_labels, names, strict=True):
        if not name or names.count(name) > 1 or any(hasattr(one, name) for one in taken):
            raise ValueError(
                f"The label {label!r} cannot name a layer; choose another, such as {f'label_{name}'!r}."
            )
    return names


def sum_over_processes(x: Tensor) -> Tensor:
    """Return the sum over all processes; with a single process, x itself."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(x)
    return x


@contextmanager
def _batch_statistics_kept(model: nn.Module) -> Iterator[None]:
    """Do not update running statistics again when layers are recomputed."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, num_batches_tracked) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, num_batches_tracked


__all__ = [
    "AUClassifier",
    "AUHeads",
    "AUPreTrainedModel",
    "CheckpointedPreTrainedModel",
    "check_size",
    "is_plain",
    "linear_map",
    "module_names",
    "on_device",
    "on_one_device",
    "or_default",
    "parameter_of",
    "sum_over_processes",
]
