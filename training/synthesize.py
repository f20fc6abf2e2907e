"""Render the open synthetic corpus.

python training/synthesize.py --head ICT-FaceKit/FaceXModel --photos FACES --output corpora/synthetic

`FACES` holds `people.csv` and the photographs with templates as `london_neutral/` and `canada_neutral/`;
see training/README.md for where to get them. An interrupted run resumes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from actionunits.synthesis.corpus import CorpusPlan, write_corpus


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and render."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--head", type=Path, required=True, help="folder of the ICT-FaceKit head model")
    parser.add_argument("--photos", type=Path, required=True, help="folder of the photographs and people.csv")
    parser.add_argument("--output", type=Path, required=True, help="folder of the corpus")
    parser.add_argument(
        "--pictures", type=int, nargs=3, default=CorpusPlan.pictures, metavar=("TRAIN", "VAL", "TEST")
    )
    parser.add_argument("--seed", type=int, default=CorpusPlan.seed)
    parser.add_argument(
        "--size", type=int, default=CorpusPlan.size, help="side of the pictures in pixels (default 160)"
    )
    parser.add_argument(
        "--shard-size", type=int, default=CorpusPlan.shard_size, help="pictures per file (default 2000)"
    )
    parser.add_argument("--processes", type=int, default=0, help="worker processes (default: one per core)")
    args = parser.parse_args(arguments)
    try:
        plan = CorpusPlan(tuple(args.pictures), args.seed, args.size, args.shard_size)
        write_corpus(args.head, args.photos, args.output, plan, args.processes)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
