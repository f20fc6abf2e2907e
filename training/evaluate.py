"""Evaluate a model, or the predictions of another tool, per action unit and per group of people.

    python training/evaluate.py --model MODEL --data CORPUS --split test --output OUT
    torchrun --nproc_per_node 2 training/evaluate.py ...                # the same in half the time
    python training/evaluate.py --predictions *.csv --format openface --labels LABELS.csv --output OUT
    python training/evaluate.py --model RUN/fold-*/model --data OTHER --output OUT      # mean over models
    python training/evaluate.py --reports fold-*/metrics-test.json --output OUT         # mean over folds
    python training/evaluate.py --matrix bp4d:gft=a/metrics-test.json ... --output OUT  # across corpora

Pictures are preprocessed by the model's image processor, as in use. It writes `metrics-test.json`,
`metrics-test.md` (tables) and `metrics-test.png` (F1 bars, with the paper's figures if the model's recipe has
them). Decisions are evaluated at 0.5, as in papers, at thresholds calibrated on other people (those in the
model's config, or `--calibrate-on train`), and at oracle thresholds. Action units that only the model or only
the corpus has are left out and listed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor

import actionunits  # noqa: F401  (registers the models)
from actionunits.action_units import au_label
from actionunits.adapters import FORMATS, read_labels, read_predictions, score_predictions
from actionunits.cli_common import find_model
from actionunits.data import prepare_synthetic
from actionunits.data.preparing import is_prepared, open_prepared
from actionunits.evaluation import (
    cross_corpus,
    evaluate_model,
    mean_over_folds,
    predict_scores,
)
from actionunits.metrics import calibrate_thresholds
from actionunits.reports import cross_corpus_table, f1_table, write_report
from recipe import load_recipe


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    args = parse_arguments(arguments)
    state = PartialState(cpu=not torch.accelerator.is_available())
    if args.matrix:
        write_matrix(args)
        return
    if args.reports:
        report = mean_over_folds([read_report(path) for path in args.reports])
    elif args.predictions:
        report = measure_predictions(args)
    else:
        models = [find_model(model) for model in args.model]
        pairs = [{"model": model, "fold": fold} for model in models for fold in args.fold]
        reports = [measure_model(argparse.Namespace(**vars(args) | pair), state) for pair in pairs]
        apart = reports[: len(args.fold)]  # every model is evaluated on the same folds
        report = mean_over_folds(reports, apart) if len(reports) > 1 else reports[0]
    if state.is_main_process:
        write_report(args.output, report)
        print(f1_table(report))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--model", nargs="+", help="folder, name on the Hub or in the package; of several the mean"
    )
    what.add_argument("--predictions", nargs="+", type=Path, metavar="CSV", help="what another tool wrote")
    what.add_argument("--reports", nargs="+", type=Path, metavar="JSON", help="folds to average")
    what.add_argument("--matrix", nargs="+", metavar="TRAINED:TESTED=JSON", help="reports across corpora")
    parser.add_argument("--output", required=True, type=Path, help="where the figures go")
    parser.add_argument("--split", default="test", choices=("train", "validation", "test", "full"))
    model = parser.add_argument_group("of a model")
    model.add_argument("--data", help="prepared corpus, or the synthetic one (or its URL)")
    model.add_argument("--fold", nargs="+", default=[""], help="of a prepared corpus, such as 1 or part3")
    model.add_argument("--calibrate-on", choices=("train", "validation"), help="instead of stored thresholds")
    model.add_argument("--recipe", type=Path, help="for the paper's figures (default: the model's recipe)")
    model.add_argument("--cache", type=Path, help="decoded pictures (default: OUTPUT/prepared)")
    model.add_argument("--batch-size", type=int, default=64)
    tool = parser.add_argument_group("of another tool's predictions")
    tool.add_argument("--format", choices=FORMATS, help="the tool")
    tool.add_argument("--values", default="occurrence", choices=("occurrence", "intensity"))
    tool.add_argument("--labels", type=Path, help="CSV: picture or video and frame, subject, split, AU1, ...")
    tool.add_argument("--first-frame", type=int, default=0, help="number of a video's first frame in LABELS")
    tool.add_argument("--from-intensity", type=float, help="labels are 0 to 5; from this on it occurs")
    tool.add_argument("--missing", default="nothing", choices=("nothing", "unknown"), help="faces not found")
    args = parser.parse_args(arguments)
    refuse_without_effect(parser, args, {"model": model, "predictions": tool})
    if args.model and not args.data:
        parser.error("--model needs --data, the corpus to evaluate it on")
    if args.calibrate_on and args.split in (args.calibrate_on, "full"):
        parser.error(
            f"--calibrate-on {args.calibrate_on} with --split {args.split} would choose thresholds on the "
            "evaluated pictures; evaluate another split, or see the oracle thresholds in every report"
        )
    if args.batch_size < 1:
        parser.error(f"--batch-size {args.batch_size} must be at least 1")
    if args.predictions and not (args.format and args.labels):
        parser.error("--predictions needs --format, the tool that wrote them, and --labels")
    return args


def refuse_without_effect(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    groups: dict[str, argparse._ArgumentGroup],
) -> None:
    """Refuse options of a group, by the option that makes use of them, where that is not given."""
    for needed, group in groups.items():
        changed = (a for a in group._group_actions if getattr(args, a.dest) != a.default)
        if (given := [a.option_strings[0] for a in changed]) and not getattr(args, needed):
            parser.error(f"{' and '.join(given)} would have no effect without --{needed}")


def measure_model(args: argparse.Namespace, state: PartialState) -> dict[str, Any]:
    """Evaluate a model on a split of a corpus."""
    model = AutoModel.from_pretrained(args.model, dtype=torch.float32).to(state.device).eval()
    processor = AutoImageProcessor.from_pretrained(args.model)

    def faces_of(split: str):
        with state.main_process_first():
            if is_prepared(args.data):
                return open_prepared(args.data).part(split, args.fold)
            if args.fold:
                raise ValueError(
                    f"--fold {args.fold} is of a prepared corpus; the synthetic one in {args.data} has "
                    "splits and no folds; leave it out."
                )
            return prepare_synthetic(
                args.data, split, args.cache or args.output / "prepared", processor.aligned_size
            )

    faces, about = faces_of(args.split), describe(args)
    known = list(model.config.aus)
    shared = [au for au in known if au in faces.aus]
    if not shared:
        raise ValueError(f"the model has {known}, the corpus {list(faces.aus)}: no action unit is shared.")
    if shared != known:
        model = model.adapt_to_aus(shared)
        processor = AutoImageProcessor.from_pretrained(args.model, aus=model.config.places)
    if alone := sorted(set(known) ^ set(faces.aus)):
        about["notes"] = {"not_compared": ", ".join(map(au_label, alone))}
    if args.calibrate_on:
        others = faces_of(args.calibrate_on).with_aus(shared)
        scores = predict_scores(model, processor, others, args.batch_size)
        model.config.au_thresholds = calibrate_thresholds(scores, others.occurrence)
        about["thresholds_from"] = f"the {args.calibrate_on} people"
    return evaluate_model(model, processor, faces.with_aus(shared), args.split, args.batch_size, about)


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """Context of the report from the model's folder, and from the recipe if one is given."""
    folder, about = Path(args.model), {}
    if (folder / "metrics.json").is_file():
        reports = json.loads((folder / "metrics.json").read_text(encoding="utf-8")).values()
        about = {"thresholds_from": next((r.get("thresholds_from") for r in reports), "the training people")}
    if (folder / "run.json").is_file():
        recipe = json.loads((folder / "run.json").read_text(encoding="utf-8"))["recipe"]
        about |= {key: recipe[key] for key in ("epoch_selection", "paper") if key in recipe}
    if args.recipe:
        about["paper"] = asdict(load_recipe(args.recipe).paper)
    return about


def measure_predictions(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate the predictions of another tool."""
    predictions = read_predictions(args.predictions, args.format, args.values)
    labels = read_labels(args.labels, args.first_frame, args.from_intensity)
    return score_predictions(predictions, labels, args.split, args.missing)


def read_report(path: Path) -> dict[str, Any]:
    """Read a `metrics-SPLIT.json`."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}; write it again.") from error
    if not isinstance(report, dict) or "at_half" not in report:
        raise ValueError(f"{path} is not a report; pass a metrics-SPLIT.json of evaluate.py or a run.")
    return report


def write_matrix(args: argparse.Namespace) -> None:
    """Write F1 by training and test corpus into `cross-corpus.json` and `.md`."""
    reports: dict[str, dict[str, Any]] = {}
    for argument in args.matrix:
        names, equals, path = argument.partition("=")
        trained, colon, tested = names.partition(":")
        if not equals or not colon:
            raise ValueError(f"--matrix takes TRAINED:TESTED=metrics-test.json, got {argument!r}.")
        if tested in reports.setdefault(trained, {}):
            raise ValueError(f"--matrix names {names} twice; average folds by --reports first.")
        reports[trained][tested] = read_report(Path(path))
    matrix = cross_corpus(reports)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "cross-corpus.json").write_text(json.dumps(matrix, indent=1) + "\n", encoding="utf-8")
    (args.output / "cross-corpus.md").write_text(cross_corpus_table(matrix) + "\n", encoding="utf-8")
    print(cross_corpus_table(matrix))


if __name__ == "__main__":
    main()
