"""Weights in half the space: parameters are stored as float16 and computed with as float32.

    round_parameters(model)        # to float16 values, so that what is evaluated is what is saved
    save_in_half(model, "folder")  # config.json still says float32, so that loading gives float32 again

Buffers keep their type: batch statistics and prototypes are few, and a variance may be smaller than float16
resolves.
"""

from __future__ import annotations

import os
from typing import Any

import torch


@torch.no_grad()
def round_parameters(model: Any) -> None:
    """Round the parameters of a model, in place, to float16 values.

    Raises:
        ValueError: A parameter is too large for float16; the message names it, and none is rounded.
    """
    for name, parameter in model.named_parameters():
        if not parameter.to(torch.float16).isfinite().all():
            largest = parameter.abs().max().item()
            raise ValueError(f"{name} reaches {largest:.3g}, but float16 ends at 65504; save it as float32.")
    for parameter in model.parameters():
        parameter.copy_(parameter.to(torch.float16))


def save_in_half(model: Any, folder: str | os.PathLike) -> None:
    """Save a model with its parameters rounded to float16.

    `from_pretrained(folder)` loads them as float32, which the configuration names, unless `dtype=` is given.
    """
    round_parameters(model)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    weights = {
        name: value.to(torch.float16) if name in parameters else value
        for name, value in model.state_dict().items()
    }
    model.save_pretrained(folder, state_dict=weights)


__all__ = ["round_parameters", "save_in_half"]
