"""Types of numbers for the scripts' options, which check their range."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any


def from_one(text: str) -> int:
    """A whole number from 1 on."""
    return _checked(text, int, lambda value: value >= 1, "no whole number from 1 on")


def from_zero(text: str) -> int:
    """A whole number from 0 on."""
    return _checked(text, int, lambda value: value >= 0, "no whole number from 0 on")


def positive(text: str) -> float:
    """A number above 0."""
    return _checked(text, float, lambda value: 0 < value < float("inf"), "no number above 0")


def not_negative(text: str) -> float:
    """A number from 0 on."""
    return _checked(text, float, lambda value: 0 <= value < float("inf"), "no number from 0 on")


def share(text: str) -> float:
    """A number between 0 and 1, neither of both."""
    return _checked(text, float, lambda value: 0 < value < 1, "no share between 0 and 1")


def _checked(text: str, kind: type, is_fine: Callable[[Any], bool], complaint: str) -> Any:
    try:
        value = kind(text)
        if is_fine(value):
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text} is {complaint}")
