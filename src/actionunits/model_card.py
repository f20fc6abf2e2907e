"""Write a model card from the files of the training run: nothing in it is typed by hand.

    python -m actionunits.model_card MODEL --template model_cards/template.md [--output model_cards/NAME.md]

reads `config.json`, `run.json` and `metrics.json` of the folder MODEL, as written by `training/train.py`, and
hashes its weights. The card of the face landmark network is made from its `config.json`, its `metrics.json`
and `model_cards/template_landmarks.md`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open

from actionunits.action_units import au_name
from actionunits.publishing_terms import DataTerms, training_corpora, training_terms
from actionunits.reports import SELECTIONS, groups_table, metrics_table

METHODS = {
    "au-escda": "ESCDA, which averages the probabilities of a local and a global network (LSC and GDA)",
    "au-lsc": "LSC, the local network of ESCDA: an attention branch per AU, masked around its place",
    "au-gda": "GDA, the global network of ESCDA: attention along the rows and the columns of the face",
    "au-ac2d": "AC2D: a transformer branch per AU, with constrained attention and causal deconfounding",
    "au-auformer": "AUFormer: a vision transformer with a small expert per AU in every block",
    "au-lac": "LAC, lock and check: class weights locate each AU, a graph and an LSTM check it",
    "au-gtlenet": "GTLE-Net: an encoder pretrained on expressions, a feature map and a mask per AU",
    "au-geometry": "geometry: a perceptron on the positions of AU centres, without pixels",
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
    "au-lac": "Huang, Gao, Cai, Chen, Hu, Gao, Gao: Lock and check: A novel approach for facial action unit "
    "recognition. Submitted to IEEE Transactions on Affective Computing, 2025",
    "au-gtlenet": "An, Zhang, Zeng, Chen, Deng, Ding: Global-to-local expression-aware embeddings for facial "
    "action unit detection. Preprint, 2022",
    "au-geometry": "Tian, Kanade, Cohn: Recognizing action units for facial expression analysis. IEEE "
    "Transactions on Pattern Analysis and Machine Intelligence, 2001 (the idea; the network is our own)",
}
PAPERS_SIZES = {
    "au-escda": 41.0,
    "au-lsc": 36.9,
    "au-gda": 4.1,
    "au-ac2d": 5.0,
    "au-auformer": 88.9,
    "au-lac": 27.2,
    "au-gtlenet": 77.4,
}
"""Parameters of the papers' networks for 17 action units [millions]."""
COMPACT = 1 / 8
"""Share of the paper's size below which a network is compact; an LSC for a single action unit has more."""
SOURCES = {
    "head model": "ICT-FaceKit, copyright (c) 2020 USC Institute for Creative Technologies, MIT licence",
    "photographs": "Face Research Lab London Set and Young Adult White Faces, Lisa DeBruine and Benedict "
    "Jones, 2017, figshare 5047666 and 4220517, CC BY 4.0",
}
PLACEHOLDER = "FOLDER_OF_THIS_MODEL"
"""Placeholder in a card for the model's name on the Hub, until it is published."""
SECTIONS = (
    "Intended use",
    "What it must not be used for",
    "Training data and licences",
    "Training",
    "Evaluation",
    "Groups of people",
    "Limits",
    "How to cite",
)
"""Headings that every card has."""
LANDMARK_TYPE = "au-face-landmarker"
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
    config = _read(model, "config.json")
    if config.get("model_type") == LANDMARK_TYPE:
        return _landmark_card(model, template)
    run, metrics = (_read(model, name) for name in ("run.json", "metrics.json"))
    recipe, manifest = run["recipe"], run["corpus"]["manifest"]
    labels = [config["id2label"][str(i)] for i in range(len(config["id2label"]))]
    report = metrics["test" if "test" in metrics else "validation"]
    terms = training_terms(run)
    return ModelCard.from_template(
        _card_data(run, report, terms),
        template_str=template.read_text(encoding="utf-8"),
        name=card_name(run),
        method=method_of(run),
        papers=papers_of(run),
        members=[card_name(member) for member in members_of(run)],
        placeholder=PLACEHOLDER,
        action_units=[{"label": label, "name": au_name(label)} for label in labels],
        run=run,
        config=config,
        recipe=recipe,
        is_compact=any(map(is_compact, members_of(run) or [run])),
        terms=terms,
        is_free=all(corpus.is_free for corpus in terms),
        sources=manifest.get("sources") or SOURCES,
        size=recipe["geometry"]["input_size"],
        report=report,
        split=report["split"],
        selection=SELECTIONS.get(report.get("epoch_selection") or recipe["epoch_selection"]),
        table=metrics_table(report),
        groups=groups_table(report),
        gaps=group_gaps(report),
        weak=weak_aus(report),
        weights=weights_hashes(model),
    )


def card_name(run: Mapping[str, Any]) -> str:
    """The title of a run's card: the name of its recipe, or the run's own."""
    return run.get("name") or run["recipe"]["name"]


def members_of(run: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The runs of an ensemble's networks; none for a single network."""
    return list((run.get("members") or {}).values())


def method_of(run: Mapping[str, Any]) -> str:
    """The description of the method in a card."""
    members = [METHODS[member["model_type"]] for member in members_of(run)]
    if not members:
        return METHODS[run["model_type"]]
    return f"the mean of the logits of {len(members)} networks ({'; '.join(members)})"


def is_compact(run: Mapping[str, Any]) -> bool:
    """Whether a network is far smaller than its paper's."""
    return run["parameters"] < COMPACT * 1e6 * PAPERS_SIZES.get(run["model_type"], 0)


def papers_of(run: Mapping[str, Any]) -> list[str]:
    """The papers of a model, each once."""
    return list(dict.fromkeys(PAPERS[each["model_type"]] for each in members_of(run) or [run]))


@dataclass(frozen=True)
class GroupGap:
    """The gap in mean F1 between groups of one kind, such as sexes.

    Attributes:
        kind: "sex", "ethnicity", "age", ...
        worst, best: Names of the groups with the lowest and the highest F1.
        low, high: Their F1.
        people: Number of people in the smaller of the two.
    """

    kind: str
    worst: str
    best: str
    low: float
    high: float
    people: int

    @property
    def size(self) -> float:
        """The gap in F1."""
        return self.high - self.low


def group_gaps(report: Mapping[str, Any]) -> list[GroupGap]:
    """Return the gap of every kind of group, largest first, without people of unknown group."""
    gaps = []
    for kind, groups in report["groups"].items():
        known = {name: g for name, g in groups.items() if name != "unknown" and g.get("f1") is not None}
        if len(known) > 1:
            (worst, low), *_, (best, high) = sorted(known.items(), key=lambda group: group[1]["f1"])
            people = min(low["people"], high["people"])
            gaps.append(GroupGap(kind, worst, best, low["f1"], high["f1"], people))
    return sorted(gaps, key=lambda gap: -gap.size)


def weights_hashes(model: Path) -> dict[str, str]:
    """Return the SHA-256 of every safetensors file of a folder, by name."""
    files = sorted(path for path in model.glob("*.safetensors") if path.is_file())
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def weak_aus(report: dict[str, Any]) -> list[str]:
    """Labels with an AUC below `WEAK_AUC`, worst first."""
    auc = {
        label: figures["auc"]
        for label, figures in report["calibrated"]["per_au"].items()
        if figures["auc"] is not None
    }
    return [label for label in sorted(auc, key=lambda label: auc[label]) if auc[label] < WEAK_AUC]


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a card as the command line says."""
    parser = argparse.ArgumentParser(description="Write the card of a model folder from its run.")
    parser.add_argument("model", type=Path, help="folder with config.json, run.json and metrics.json")
    parser.add_argument("--template", type=Path, required=True, help="model_cards/template.md of the project")
    parser.add_argument("--output", type=Path, help="file to write (default: README.md in the folder)")
    args = parser.parse_args(arguments)
    try:
        write_card(args.model, args.template, args.output)
    except (OSError, ValueError) as error:
        parser.error(str(error))


def _card_data(run: dict[str, Any], report: dict[str, Any], terms: Sequence[DataTerms]) -> ModelCardData:
    mean = report["calibrated"]["mean"]
    results = [
        EvalResult(
            task_type="image-classification",
            task_name="facial action unit detection",
            dataset_type=training_corpora(run)[0],
            dataset_name=f"{terms[0].name.removeprefix('the ')}, {report['split']} people",
            dataset_split=report["split"],
            metric_type=key,
            metric_name=f"{title}, mean over action units",
            metric_value=round(mean[key], 4),
        )
        for key, title in MODEL_INDEX_FIGURES.items()
        if mean.get(key) is not None
    ]
    licence: dict[str, Any] = {"license": "apache-2.0"}
    if not all(corpus.is_free for corpus in terms):
        licence = {
            "license": "other",
            "license_name": "terms-of-the-training-data",
            "license_link": "README.md#training-data-and-licences",
            "extra_gated_prompt": "These weights were trained on licensed data. "
            + " ".join(f"{corpus.name}: {corpus.terms}" for corpus in terms)
            + " Take them only if you keep to that.",
        }
    return ModelCardData(
        **licence,
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["facial-action-units", "facs", "actionunits", run["model_type"]],
        model_name=card_name(run),
        eval_results=results,
    )


def _landmark_card(model: Path, template: Path) -> ModelCard:
    """Make the card of the face landmark network."""
    return ModelCard.from_template(
        ModelCardData(
            license="apache-2.0", library_name="transformers", tags=["facial-landmarks", "face-detection"]
        ),
        template_str=template.read_text(encoding="utf-8"),
        config=_read(model, "config.json"),
        metrics=_read(model, "metrics.json"),
        parameters=_count_parameters(model / "model.safetensors"),
        weights=weights_hashes(model),
    )


def _count_parameters(file: Path) -> int:
    """Count the parameters in a safetensors file, without batch statistics."""
    with safe_open(file, "pt") as tensors:
        names = [name for name in tensors.keys() if "running_" not in name and "num_batches" not in name]  # noqa: SIM118
        return sum(math.prod(tensors.get_slice(name).get_shape()) for name in names)


def _read(model: Path, name: str) -> dict[str, Any]:
    path = model / name
    if not path.is_file():
        raise FileNotFoundError(
            f"{model} has no {name}; the card is written from a folder that train.py made."
        )
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
