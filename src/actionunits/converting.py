"""Shared by the converters of weights: reading a file, and naming keys that do not match."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch


def read_weights(path: str | Path) -> Mapping[str, Any]:
    """Read a state dict, or a dict of them, without running code of the file (`weights_only=True`).

    Raises:
        OSError: There is no such file.
        ValueError: The file cannot be read, or holds something else.
    """
    remedy = "save the network's weights with torch.save(model.state_dict(), FILE), for weights_only=True"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # of any type, by the bytes of the file
        raise ValueError(f"{path} holds no state dict; {remedy}.") from error
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} holds a {type(state).__name__} and no state dict; {remedy}.")
    return state


def misfits(expected: set[str], found: set[str], what: str = "keys") -> str:
    """Return which names are missing and which unexpected, such as "missing keys: a, b"; "" if none."""
    both = {"missing": expected - found, "unexpected": found - expected}
    return "; ".join(f"{problem} {what}: {_listed(names)}" for problem, names in both.items() if names)


def _listed(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")


__all__ = ["misfits", "read_weights"]
