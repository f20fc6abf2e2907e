"""Shared by the commands: the options of the model, and names of output files."""

import argparse
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import pipeline
from transformers.utils import logging

from actionunits import checkpoints
from actionunits.cli_export import BACKENDS, with_backend

_LONGEST_STEM = 200  # [bytes] of the 255 of a file name; the rest is for endings


def add_model_options(command: argparse.ArgumentParser) -> None:
    """Add `--model`, `--threshold`, `--device` and `--backend`."""
    command.add_argument(
        "--model",
        metavar="NAME",
        help=f"a folder, a name on the Hub, or one of the package's: {', '.join(checkpoints.names())}",
    )
    command.add_argument("--threshold", type=_probability, metavar="P", help="score from which one is active")
    command.add_argument("--device", help="cpu, cuda:0, mps, ...; by default a GPU if there is one")
    command.add_argument(
        "--backend", choices=BACKENDS, default="torch", help="what runs the model; onnx needs its export"
    )


def load_pipeline(args: argparse.Namespace) -> Any:
    """Load the pipeline and make the folder `args.output`; failures are usage errors."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        check_device(args.device)
        model = str(checkpoints.path("default")) if args.model is None else find_model(args.model)
        model = with_backend(model, args.backend)
        detect = pipeline("au-detection", model=model, device=args.device)  # type: ignore[call-overload]
        if args.output is not None:
            _make_folder(args.output)
    except SafetensorError as error:  # a cut download, or a pointer of Git LFS
        args.usage_error(f"the weights in {model} are broken: {error}; fetch them again.")
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        args.usage_error(str(error))
    return detect


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"--output {folder} cannot be made: {error.strerror}; name a folder where you may write."
        ) from error


def find_model(name: str) -> str:
    """Return the pipeline's `model` for `--model`: the folder for a name of the package's weights.

    Raises:
        ValueError: The name is not a folder with a model, no weights of the package and no name on the Hub.
    """
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"--model {name} holds no model: there is no config.json in it.")
        return name
    if name in checkpoints.names():
        return str(checkpoints.path(name))
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith((".", os.sep)):
        raise ValueError(
            f"--model {name} is not a folder, and no name on the Hub (org/name) either; "
            f"those of the package are {', '.join(checkpoints.names())}."
        )
    return name


def check_device(device: str | None) -> None:
    """Check that a device is available.

    Raises:
        ValueError: It is not; the message lists the available ones.
    """
    try:
        torch.empty(0, device=device or "cpu").cpu()  # "meta" holds no data
    except (
        RuntimeError,
        AssertionError,
        NotImplementedError,
    ) as error:  # builds without it assert
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        found = "cpu" if accelerator is None else f"cpu and {accelerator.type}"
        raise ValueError(f"--device {device} cannot be used, here is {found}.") from error


def stems(files: Iterable[str]) -> Iterator[str]:
    """Yield a unique file name without suffix for each: for a/smile.jpg and b/smile.jpg smile and smile-2.

    They are unique also on file systems that ignore case.
    """
    taken: set[str] = set()
    for file in files:
        stem = re.sub(r"[^\w.-]+", "_", Path(file.split("?")[0]).stem) or "photo"
        stem = stem.encode()[:_LONGEST_STEM].decode(errors="ignore")
        numbered = (stem if n == 1 else f"{stem}-{n}" for n in itertools.count(1))
        free = next(name for name in numbered if name.casefold() not in taken)
        taken.add(free.casefold())
        yield free


def check_inputs_stay(args: argparse.Namespace, inputs: Iterable[str], endings: str) -> None:
    """Refuse inputs that an output, a stem with an ending of the pattern `endings`, would overwrite."""
    inputs = list(inputs)
    written = re.compile(f"(?:{'|'.join(map(re.escape, stems(inputs)))})(?:{endings})")
    for file in inputs:
        folder, name = os.path.split(os.path.realpath(file))
        if folder == os.path.realpath(args.output) and written.fullmatch(name):
            args.usage_error(
                f"{file} would be overwritten by the output; leave it out, or name another --output."
            )


def _probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text} is not a number in 0..1")
    return value
