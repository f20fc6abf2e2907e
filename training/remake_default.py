"""Remake everything that comes with the package: corpus, landmark network, default weights, their figures.

    python training/remake_default.py --head ICT-FaceKit/FaceXModel --photos FACES --output runs/default

Runs the scripts of this folder one after the other and stops at the first that fails. The same command goes
on there: finished steps are skipped, rendering and the networks' training resume. `--dry-run` only prints.
To use the result, copy OUTPUT/escda/model and OUTPUT/landmarks over `src/actionunits/checkpoints/`.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
RECIPE = HERE / "recipes" / "escda-synthetic-compact.yaml"


def main() -> None:
    """Run, or print, every step whose result is missing."""
    args = parse_arguments()
    for name, options in steps(args.head, args.photos, args.output, args.set).items():
        done = args.output / f"{name}.done"
        command = [sys.executable, str(HERE / f"{name}.py"), *map(str, options)]
        print("# done:" if done.is_file() else "", shlex.join(command), flush=True)
        if not (done.is_file() or args.dry_run):
            subprocess.run(command, check=True)
            done.touch()


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--head", type=Path, required=True, help="folder of the ICT-FaceKit head model")
    parser.add_argument("--photos", type=Path, required=True, help="folder of the photographs and people.csv")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the recipe")
    parser.add_argument("--dry-run", action="store_true", help="print the commands only")
    return parser.parse_args()


def steps(head: Path, photos: Path, output: Path, changes: list[str]) -> dict[str, list[str | Path]]:
    """Script -> its options, in order."""
    corpus, run = output / "corpus", output / "escda"
    overrides = [word for change in changes for word in ("--set", change)]
    return {
        "synthesize": ["--head", head, "--photos", photos, "--output", corpus],
        "train_landmarks": ["--data", corpus, "--photos", photos, "--output", output / "landmarks"],
        "train": ["--recipe", RECIPE, "--data", corpus, "--output", run, *overrides],
        "check_real_photos": [
            *("--photos", photos, "--model", run / "model"),
            *("--output", output / "real_photos.json"),
        ],
    }


if __name__ == "__main__":
    main()
