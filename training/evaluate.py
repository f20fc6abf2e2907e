"""Measure a model on a split of a corpus, per action unit and per group of people.

    python training/evaluate.py --model MODEL --data CORPUS --split test --output OUT

Pictures go through the model's own image processor, as they do in use. Written are `metrics-test.json`,
`metrics-test.md` (a table) and `metrics-test.png` (F1 bars). Decisions are measured at 0.5, as papers do, and
at the thresholds stored in the model's config.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor

import actionunits  # noqa: F401  (registers the models)
from actionunits.data import prepare_synthetic
from actionunits.evaluation import evaluate_model, metrics_table, write_report


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate as the command line says."""
    args = parse_arguments(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModel.from_pretrained(args.model, dtype=torch.float32).to(device).eval()
    processor = AutoImageProcessor.from_pretrained(args.model)
    cache = args.cache or args.output / "prepared"
    faces = prepare_synthetic(args.data, args.split, cache, processor.aligned_size)
    report = evaluate_model(model, processor, faces.with_aus(model.config.aus), args.split, args.batch_size)
    write_report(args.output, report)
    print(metrics_table(report))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="model folder or Hub name")
    parser.add_argument("--data", required=True, type=Path, help="folder of the synthetic corpus")
    parser.add_argument("--split", default="test", choices=("train", "validation", "test"))
    parser.add_argument("--output", required=True, type=Path, help="where the figures go")
    parser.add_argument("--cache", type=Path, help="decoded pictures (default: OUTPUT/prepared)")
    parser.add_argument("--batch-size", type=int, default=64)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
