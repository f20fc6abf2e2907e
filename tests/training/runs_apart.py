"""Runs of training/train.py in processes of their own, which tests may kill.

It is imported by a fork server, or is the script that torchrun starts, with the arguments of `run`.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

sys.path += [str(Path(__file__).parents[2] / "training")]

import datasets  # noqa: F401  (what runs import when they need it, the fork server imports once)
import pyarrow.parquet  # noqa: F401
import scipy.io  # noqa: F401
import transformers.models.auto.modeling_auto  # noqa: F401

import network_training
import train

OWNERS = (network_training.NetworkTraining, network_training, train)


def run(arguments: list[str], kill: str = "") -> None:
    """Train, and die on the way if `kill` names a point: "NAME 3" dies before the third call of NAME.

    "NAME+ 3" dies after it. Names are functions of network_training.py and train.py and methods of the class.
    """
    with open(os.devnull, "w") as nowhere:
        sys.stdout = sys.stderr = nowhere
        if kill:
            name, number = kill.split()
            die_in(name.rstrip("+"), int(number), after=name.endswith("+"))
        train.main(arguments)


def die_in(name: str, number: int, after: bool) -> None:
    """Make a function the place of this process' death."""
    original: Callable = next(getattr(owner, name) for owner in OWNERS if hasattr(owner, name))
    calls = iter(range(1, 10**6))

    def deadly(*args, **kwargs):
        is_last = next(calls) == number
        if is_last and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if is_last:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    for owner in OWNERS:
        if getattr(owner, name, None) is original:
            setattr(owner, name, deadly)


if __name__ == "__main__":
    run(sys.argv[2:], kill=sys.argv[1])
