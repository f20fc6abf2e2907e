"""The command `actionunits export`: a model for ONNX Runtime, or without this package.

    actionunits export FOLDER --onnx          # writes FOLDER/model.onnx, checked against PyTorch
    actionunits export FOLDER --code          # makes FOLDER work where this package is not installed

Exit codes: 0 done, 1 the folder cannot be exported, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from actionunits.export_code import export_code
from actionunits.onnx_model import OnnxAUModel, export_onnx

BACKENDS = ("torch", "onnx")
"""Runtimes of a model; see `with_backend`."""


def add_export_command(commands: Any) -> None:
    """Add the command to the subparsers of `actionunits`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "export",
        help="write a model for ONNX Runtime, or for use without this package",
        description="Write a model for ONNX Runtime, or for use without this package.",
        epilog="Exit codes: 0 done, 1 the folder cannot be exported, 2 wrong usage.",
    )
    parser.set_defaults(run=run, usage_error=parser.error)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="saved model with its image processor")
    parser.add_argument("--onnx", action="store_true", help="write model.onnx")
    parser.add_argument("--code", action="store_true", help="add the code and the face landmark network")


def run(args: argparse.Namespace) -> int:
    """Export as the command line says, and return the exit code."""
    if not (args.onnx or args.code):
        args.usage_error("say what to write: --onnx, --code or both.")
    if not args.folder.is_dir():
        args.usage_error(f"there is no folder {args.folder}.")
    try:
        if args.onnx:
            print(f"wrote {export_onnx(args.folder)}")
        if args.code:
            print(f"wrote {len(export_code(args.folder))} files into {args.folder}")
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def with_backend(model: str, backend: str) -> Any:
    """Return the pipeline's `model`: the name itself, or its ONNX model."""
    return OnnxAUModel.from_pretrained(model) if backend == "onnx" else model
