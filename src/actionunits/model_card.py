"""The model card, written from the files of the run that made the weights: nothing in it is typed by hand.

    python -m actionunits.model_card MODEL --template model_cards/template.md [--output model_cards/NAME.md]

reads `config.json`, `run.json` and `metrics.json` of the folder MODEL, as `training/train.py` writes them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from actionunits.action_units import ACTION_UNITS, parse_au_label
from actionunits.evaluation import groups_table, metrics_table

METHODS = {
    "au-escda": "ESCDA, which averages the probabilities of a local and a global network (LSC and GDA)",
    "au-lsc": "LSC, the local network of ESCDA: attention branches, each masked around an AU's place",
    "au-gda": "GDA, the global network of ESCDA: attention along the rows and the columns of the face",
    "au-ac2d": "AC2D: a transformer branch for each AU, its attention held to the AU's place, deconfounded",
    "au-auformer": "AUFormer: a frozen vision transformer with a small expert for each AU in every block",
}
_ESCDA = (
    "Shao, Chen, Zhou, Shi, Li, Ma, Yeung: Constrained and directional ensemble attention for facial action "
    "unit detection. Pattern Recognition, 2025"
)
PAPERS = {
    "au-escda": _ESCDA,
    "au-lsc": _ESCDA,
    "au-gda": _ESCDA,
    "au-ac2d": "Shao, Zhu, Zhou, Xiang, Liu, Yao, Ma: Facial action unit detection by adaptively "
    "constraining self-attention and causally deconfounding sample. IJCV, 2025",
    "au-auformer": "Yuan, Yu, Liu, Xie, Yue, Yang: AUFormer: Vision transformers are parameter-efficient "
    "facial action unit detectors. ECCV, 2024",
}
SOURCES = {
    "head model": "ICT-FaceKit, copyright (c) 2020 USC Institute for Creative Technologies, MIT licence",
    "photographs": "Face Research Lab London Set and Young Adult White Faces, Lisa DeBruine and Benedict "
    "Jones, 2017, figshare 5047666 and 4220517, CC BY 4.0",
}
WEAK_AUC = 0.8
MODEL_INDEX_FIGURES = {"f1": "F1", "auc": "AUC", "correlation": "correlation with intensity"}


def write_card(model: Path, template: Path, output: Path | None = None) -> None:
    """Write the card of a model folder to `output` (its `README.md`)."""
    (output or model / "README.md").write_text(
        str(make_card(model, template)).rstrip() + "\n", encoding="utf-8"
    )


def make_card(model: Path, template: Path) -> ModelCard:
    """Make the card of a model folder.

    Args:
        model: Folder with `config.json`, `run.json` and `metrics.json`.
        template: Jinja template of the text.

    Raises:
        FileNotFoundError: One of the files is missing.
    """
    config, run, metrics = (_read(model, name) for name in ("config.json", "run.json", "metrics.json"))
    recipe, manifest = run["recipe"], run["corpus"]["manifest"]
    labels = [config["id2label"][str(i)] for i in range(len(config["id2label"]))]
    main_split = "test" if "test" in metrics else "validation"
    return ModelCard.from_template(
        _card_data(recipe["name"], run, metrics[main_split]),
        template_str=template.read_text(encoding="utf-8"),
        name=recipe["name"],
        method=METHODS[config["model_type"]],
        paper=PAPERS[config["model_type"]],
        action_units=[{"label": label, "name": _au_name(label)} for label in labels],
        run=run,
        recipe=recipe,
        sources=manifest.get("sources") or SOURCES,
        size=recipe["geometry"]["input_size"],
        report=metrics[main_split],
        split=main_split,
        table=metrics_table(metrics[main_split]),
        groups=groups_table(metrics[main_split]),
        weak=weak_aus(metrics[main_split]),
    )


def weak_aus(report: dict[str, Any]) -> list[str]:
    """Labels whose AUC is below `WEAK_AUC`, worst first."""
    auc = {
        label: figures["auc"] for label, figures in report["calibrated"]["per_au"].items() if figures["auc"]
    }
    return [label for label in sorted(auc, key=lambda label: auc[label]) if auc[label] < WEAK_AUC]


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a card as the command line says."""
    parser = argparse.ArgumentParser(description="Write the card of a model folder from its run.")
    parser.add_argument("model", type=Path, help="folder with config.json, run.json and metrics.json")
    parser.add_argument("--template", type=Path, required=True, help="model_cards/template.md of the project")
    parser.add_argument("--output", type=Path, help="file to write (default: README.md in the folder)")
    args = parser.parse_args(arguments)
    write_card(args.model, args.template, args.output)


def _card_data(name: str, run: dict[str, Any], report: dict[str, Any]) -> ModelCardData:
    mean = report["calibrated"]["mean"]
    results = [
        EvalResult(
            task_type="image-classification",
            task_name="facial action unit detection",
            dataset_type="synthetic",
            dataset_name=f"open synthetic corpus, {report['split']} people",
            dataset_split=report["split"],
            metric_type=key,
            metric_name=f"{title}, mean over action units",
            metric_value=round(mean[key], 4),
        )
        for key, title in MODEL_INDEX_FIGURES.items()
        if mean.get(key) is not None
    ]
    return ModelCardData(
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["facial-action-units", "facs", "actionunits", run["model_type"]],
        model_name=name,
        eval_results=results,
    )


def _read(model: Path, name: str) -> dict[str, Any]:
    path = model / name
    if not path.is_file():
        raise FileNotFoundError(
            f"{model} has no {name}; the card is written from a folder that train.py made."
        )
    return json.loads(path.read_text(encoding="utf-8"))


def _au_name(label: str) -> str:
    number = parse_au_label(label)
    return "" if number is None else ACTION_UNITS[number].name


if __name__ == "__main__":
    main()
