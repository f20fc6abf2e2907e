"""What a model reaches on a corpus: per action unit, on neutral faces, and per group of people.

Decisions are measured three times, side by side and named: at 0.5, as papers do; at thresholds that were
calibrated on other people; and at the oracle's thresholds, the best for the very pictures that are measured,
which is what some papers report and nobody has in use.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from actionunits.action_units import ACTION_UNITS, au_label, parse_au_label
from actionunits.data.aligned_faces import AlignedFaces
from actionunits.data.sampling import fixed_stride_clips
from actionunits.metrics import au_report, calibrate_thresholds

AGE_BANDS = ((18, 29), (30, 44), (45, 120))
GROUP_FIGURES = ("f1", "auc", "correlation", "false_alarm_rate")
RULES = {"at_half": "at 0.5", "calibrated": "calibrated", "oracle": "oracle"}
"""The three ways to choose thresholds, as reports and as tables name them."""
SELECTIONS = {
    "last": "the last; nothing was selected",
    "best-validation": "the best on the validation people",
    "best-test": "the best on the very pictures that are measured here, as the papers choose; it flatters",
}
"""Rules of epoch selection, as recipes name them and as reports explain them."""
OTHER_FIGURES = {
    "threshold": "threshold",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "mcc": "MCC",
    "false_alarm_rate": "false alarm rate",
    "auc": "AUC",
    "average_precision": "average precision",
    "ece": "ECE",
    "correlation": "correlation",
    "icc": "ICC(3,1)",
}


def evaluate_model(
    model: Any,
    processor: Any,
    faces: AlignedFaces,
    split: str,
    batch_size: int = 64,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Run a model on faces, through its image processor as in use, and measure it.

    Args:
        model: Any AU model, in evaluation mode.
        processor: Its `AUImageProcessor`.
        faces: Pictures and landmarks, with the model's action units.
        split: Name of the split, for the report.
        batch_size: Pictures of one forward pass.
        about: See `evaluation_report`.

    Returns:
        The report of `evaluation_report`.
    """
    scores = predict_scores(model, processor, faces, batch_size)
    return evaluation_report(scores, faces, model.config.au_thresholds or 0.5, split, about)


@torch.inference_mode()
def predict_scores(model: Any, processor: Any, faces: AlignedFaces, batch_size: int = 64) -> np.ndarray:
    """Probabilities (N, m) of all faces, from their pictures and landmarks.

    A network of videos sees the frames of recordings clip by clip, as in training. Under torchrun each
    process does its share, and all get the whole; no face is done twice.
    """
    rank, processes = _process()
    clip_length = getattr(model.config, "clip_length", 1) if faces.sequences is not None else 1
    batches = _batches(faces, batch_size, clip_length)
    scores = np.zeros((len(faces), len(faces.aus)), np.float32)  # 0 where another process scores
    bar = tqdm(batches[rank::processes], desc="evaluating", unit="batch", disable=None if rank == 0 else True)
    for rows in bar:
        pictures, landmarks = [faces.picture(row) for row in rows], [faces.landmarks[row] for row in rows]
        inputs = processor(pictures, landmarks=landmarks, return_tensors="pt").to(model.device)
        if clip_length > 1:
            inputs = {name: values[None] for name, values in inputs.items()}
        scores[rows] = torch.sigmoid(model(**inputs).logits.float()).flatten(0, -2).cpu().numpy()
    return _from_all(scores, processes)


def evaluation_report(
    scores: np.ndarray,
    faces: AlignedFaces,
    thresholds: Any,
    split: str,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """All figures as a JSON-ready dictionary.

    Args:
        scores: Probabilities, (N, m).
        faces: The N faces with the truth.
        thresholds: One decision threshold, or one per AU, calibrated on other people.
        split: Name of the split.
        about: What readers must know, all optional: `thresholds_from`, the pictures that `thresholds` were
            calibrated on; `epoch_selection`, a key of `SELECTIONS`; `paper`, the figures to be reached, as
            `{"table": str, "f1": {AU: percent}, "mean": percent}`.

    Returns:
        `at_half`, `calibrated` and `oracle` are reports of `actionunits.metrics.au_report`, `neutral` tells
        of false alarms, `groups` has mean figures at the calibrated thresholds by group and value.
    """
    groups = {name: _age_bands(values) if name == "age" else values for name, values in faces.groups.items()}
    return {
        "split": split,
        "pictures": len(faces),
        "people": len(set(faces.people)),
        **_json_about(about or {}),
        **threshold_reports(faces.aus, scores, faces.occurrence, faces.intensities, faces.people, thresholds),
        "neutral": neutral_report(scores, faces.occurrence, thresholds),
        "groups": {
            name: {
                str(value): _group_report(scores, faces, thresholds, values == value)
                for value in sorted(set(values))
            }
            for name, values in groups.items()
        },
    }


def threshold_reports(
    aus: Sequence[int],
    scores: np.ndarray,
    labels: np.ndarray,
    intensities: np.ndarray | None = None,
    people: np.ndarray | None = None,
    calibrated: Any = None,
) -> dict[str, Any]:
    """Reports of the same scores (N, m) by every rule of `RULES`; without calibrated thresholds by two."""
    thresholds = {"at_half": 0.5, "calibrated": calibrated, "oracle": calibrate_thresholds(scores, labels)}
    return {
        rule: au_report(aus, scores, labels, intensities, chosen, people)
        for rule, chosen in thresholds.items()
        if chosen is not None
    }


def mean_over_folds(
    reports: Sequence[Mapping[str, Any]], apart: Sequence[Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """Average the reports of a cross-validation's folds, figure by figure, as the papers' tables do.

    Intervals are left out: they belong to the people of one fold. Undefined figures have no part in a mean.

    Args:
        reports: One a fold, or one for each of several models.
        apart: Those of them that have pictures and people of their own, to be counted; by default all.

    Raises:
        ValueError: The folds have different action units.
    """
    first = reports[0]
    if any(list(report["at_half"]["per_au"]) != list(first["at_half"]["per_au"]) for report in reports):
        found = [list(report["at_half"]["per_au"]) for report in reports]
        raise ValueError(f"the folds have different action units, {found}; average folds of one corpus.")
    kept = {
        key: first[key] for key in ("split", "epoch_selection", "thresholds_from", "paper") if key in first
    }
    rules = [rule for rule in RULES if all(rule in report for report in reports)]
    return {
        **kept,
        "folds": len(reports),
        "pictures": sum(report["pictures"] for report in apart or reports),
        "people": sum(report["people"] or 0 for report in apart or reports) or None,
        **{rule: _mean([report[rule] for report in reports]) for rule in rules},
    }


def neutral_report(scores: np.ndarray, occurrence: np.ndarray, thresholds: Any) -> dict[str, Any]:
    """False alarms on the faces that show none of the action units; scores and occurrence are (N, m)."""
    neutral = (occurrence == 0).all(axis=1)
    if not neutral.any():
        return {"pictures": 0, "false_alarms_per_picture": None, "share_with_any": None}
    found = scores[neutral] >= np.asarray(thresholds)
    return {
        "pictures": int(neutral.sum()),
        "false_alarms_per_picture": float(found.sum(axis=1).mean()),
        "share_with_any": float(found.any(axis=1).mean()),
    }


def cross_corpus(reports: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Mean F1 at 0.5 of networks trained on some corpora on others, over shared action units.

    Args:
        reports: `evaluation_report`s by the corpus of training, then by the corpus of the test.

    Returns:
        `aus`, the labels that all reports have; `f1`, the mean over these, {trained: {tested: mean}}, whose
        entries can be compared; `pairs`, for each pair all its labels (`aus`) and their mean (`f1`).

    Raises:
        ValueError: No action unit is in all reports.
    """
    tables = {(a, b): report["at_half"]["per_au"] for a, row in reports.items() for b, report in row.items()}
    shared = [label for label in next(iter(tables.values())) if all(label in t for t in tables.values())]
    if not shared:
        raise ValueError(f"no action unit is in all {len(tables)} reports; leave out the odd one.")
    matrix: dict[str, Any] = {"aus": shared, "f1": {}, "pairs": {}}
    for (trained, tested), table in tables.items():
        matrix["f1"].setdefault(trained, {})[tested] = _mean([table[label]["f1"] for label in shared])
        pair = {"aus": list(table), "f1": _mean([figures["f1"] for figures in table.values()])}
        matrix["pairs"].setdefault(trained, {})[tested] = pair
    return matrix


def cross_corpus_table(matrix: Mapping[str, Any]) -> str:
    """The matrix as a Markdown table: percent over the action units that all share; of a pair in brackets."""
    tested = list(dict.fromkeys(name for row in matrix["f1"].values() for name in row))
    lines = [
        f"F1 at 0.5 in percent over {', '.join(matrix['aus'])}; in brackets over all that the pair shares.",
        "",
        f"| trained on | {' | '.join(f'tested on {name}' for name in tested)} |",
        "|---|" + "---:|" * len(tested),
    ]
    for trained, row in matrix["f1"].items():
        cells = []
        for name in tested:
            pair = matrix["pairs"][trained].get(name)
            values = [row.get(name), pair["f1"]] if pair else [None]
            shown = ["-" if value is None else f"{100 * value:.1f}" for value in values]
            cells.append(f"{shown[0]} ({shown[1]}, {len(pair['aus'])} AUs)" if pair else "-")
        lines.append(f"| {trained} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write a report as JSON, as Markdown and as bars: `metrics-SPLIT.json`, `.md` and `.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"metrics-{report['split']}"
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(report_text(report) + "\n", encoding="utf-8")
    draw_bars(report).save(stem.with_suffix(".png"))


def report_text(report: Mapping[str, Any]) -> str:
    """The whole report as Markdown: where the figures come from, then tables."""
    selection = report.get("epoch_selection")
    lines = [
        f"# {report['split']}: {report['pictures']:,} pictures of {report.get('people') or 'unnamed'} people",
        "",
        f"- Epoch: {SELECTIONS.get(selection, selection) if selection else 'unknown'}.",
        f"- Calibrated thresholds: {report.get('thresholds_from') or 'from unknown pictures'}.",
        "- Oracle thresholds: the best for these very pictures, a bound that nobody reaches in use.",
        *(f"- {name.replace('_', ' ')}: {value}" for name, value in report.get("notes", {}).items()),
    ]
    if "folds" in report:
        lines.append(f"- Figures are means over {report['folds']} folds.")
    lines += ["", "F1-frame in percent; in brackets 95 % intervals, resampling people.", "", f1_table(report)]
    for rule in (rule for rule in ("at_half", "calibrated") if rule in report):
        lines += ["", f"Further figures, {RULES[rule]}:", "", figures_table(report[rule])]
    if report.get("groups"):
        lines += ["", "Groups of people, calibrated:", "", groups_table(dict(report))]
    return "\n".join(lines)


def f1_table(report: Mapping[str, Any]) -> str:
    """F1-frame of every action unit at all thresholds side by side, with the paper's, as a Markdown table."""
    rules = [rule for rule in RULES if rule in report]
    paper = report.get("paper") or {}
    titles = ["base rate", *(RULES[rule] for rule in rules), *([paper["table"]] if paper else [])]
    lines = [f"| AU | name | {' | '.join(titles)} |", "|---|---|" + "---:|" * len(titles)]
    for label in [*report["at_half"]["per_au"], "mean"]:
        rows = [_figures(report[rule], label) for rule in rules]
        cells = [_percent(rows[0]["base_rate"]), *(_f1_cell(row) for row in rows)]
        if paper:
            target = paper["mean"] if label == "mean" else paper["f1"].get(label)
            cells.append("-" if target is None else f"{target:.1f}")
        lines.append(f"| {label} | {_au_name(label)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def figures_table(report: Mapping[str, Any]) -> str:
    """What else `au_report` found at one choice of thresholds, as a Markdown table."""
    figures = {name: title for name, title in OTHER_FIGURES.items() if name in report["mean"]}
    lines = [f"| AU | {' | '.join(figures.values())} |", "|---|" + "---:|" * len(figures)]
    for label in [*report["per_au"], "mean"]:
        found = _figures(report, label)
        lines.append(f"| {label} | {' | '.join(_decimal(found[name]) for name in figures)} |")
    return "\n".join(lines)


def metrics_table(report: dict[str, Any]) -> str:
    """The figures of every action unit and their mean, as a Markdown table."""
    header = "| AU | name | base rate | F1 at 0.5 | threshold | F1 | false alarms | AUC | correlation |"
    lines = [header, "|---|---|" + "---:|" * 7]
    calibrated, at_half = report["calibrated"], report["at_half"]
    for label in [*calibrated["per_au"], "mean"]:
        chosen, half = _figures(calibrated, label), _figures(at_half, label)
        figures = [
            _percent(chosen["base_rate"]),
            _decimal(half["f1"]),
            _decimal(chosen["threshold"]),
            _decimal(chosen["f1"]),
            _percent(chosen["false_alarm_rate"]),
            _decimal(chosen["auc"]),
            _decimal(chosen.get("correlation")),
        ]
        lines.append(f"| {label} | {_au_name(label)} | " + " | ".join(figures) + " |")
    return "\n".join(lines)


def groups_table(report: dict[str, Any]) -> str:
    """The mean figures of every group of people, as a Markdown table."""
    lines = ["| group | people | pictures | F1 | false alarms | AUC | correlation |", "|---|" + "---:|" * 6]
    for name, values in report["groups"].items():
        for value, figures in values.items():
            cells = [
                f"{name}: {value}",
                str(figures["people"]),
                str(figures["pictures"]),
                _decimal(figures["f1"]),
                _percent(figures["false_alarm_rate"]),
                _decimal(figures["auc"]),
                _decimal(figures.get("correlation")),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_bars(report: Mapping[str, Any], width: int = 640, row: int = 24) -> Image.Image:
    """F1 of every action unit from 0 to 1: a bar at calibrated thresholds, lines at 0.5 and of the paper."""
    at_half = report["at_half"]["per_au"]
    bars = report.get("calibrated", report["at_half"])["per_au"]
    paper = report.get("paper") or {"f1": {}}
    left, right = 64, width - 64
    canvas = Image.new("RGB", (width, row * (len(bars) + 1) + row // 2), "white")
    draw = ImageDraw.Draw(canvas)
    rule = RULES["calibrated" if "calibrated" in report else "at_half"]
    title = f"F1 on {report['split']}: bar {rule}, dark line at 0.5"
    draw.text((left, 6), title + (f", red line {paper['table']}" if paper["f1"] else ""), fill="black")
    for i, (label, figures) in enumerate(bars.items(), start=1):
        top, middle = i * row + 4, i * row + row // 2
        bottom = top + row - 8
        draw.text((8, middle), label, fill="black", anchor="lm")
        draw.rectangle((left, top, right, bottom), fill="#eef2f7")
        draw.rectangle((left, top, left + (right - left) * (figures["f1"] or 0), bottom), fill="#3b76c4")
        marks = [("#444444", at_half[label]["f1"]), ("#d03a2b", paper["f1"].get(label, math.nan) / 100)]
        for colour, value in marks:
            if value is not None and not math.isnan(value):
                mark = left + (right - left) * value
                draw.line((mark, top - 2, mark, bottom + 2), fill=colour, width=2)
        draw.text((right + 8, middle), _decimal(figures["f1"]), fill="black", anchor="lm")
    return canvas


def _group_report(
    scores: np.ndarray, faces: AlignedFaces, thresholds: Any, chosen: np.ndarray
) -> dict[str, Any]:
    intensities = None if faces.intensities is None else faces.intensities[chosen]
    report = au_report(faces.aus, scores[chosen], faces.occurrence[chosen], intensities, thresholds)
    means = {name: report["mean"][name] for name in GROUP_FIGURES if name in report["mean"]}
    return {"pictures": int(chosen.sum()), "people": len(set(faces.people[chosen])), **means}


def _age_bands(ages: np.ndarray) -> np.ndarray:
    """Names of `AGE_BANDS` for ages as text; "unknown" for what is no number in them."""
    names = {f"{low}-{high}": (low, high) for low, high in AGE_BANDS}

    def band(age: str) -> str:
        years = float(age) if age.replace(".", "", 1).isdigit() else -1
        return next((name for name, (low, high) in names.items() if low <= int(years) <= high), "unknown")

    return np.array([band(age) for age in ages])


def _process() -> tuple[int, int]:
    """Number of this process and count of all."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _batches(faces: AlignedFaces, batch_size: int, clip_length: int) -> list[np.ndarray]:
    """Rows of each forward pass: some faces, or the frames of a clip."""
    if clip_length > 1 and faces.sequences is not None:
        return [clip.rows for clip in fixed_stride_clips(faces.sequences, clip_length)]
    rows = np.arange(len(faces))
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


def _from_all(share: np.ndarray, processes: int) -> np.ndarray:
    """Put the shares of all processes (N, m), 0 where they have none, together."""
    if processes == 1:
        return share
    shares: list[Any] = [None] * processes
    torch.distributed.all_gather_object(shares, share)
    return np.sum(shares, axis=0, dtype=share.dtype)


def _json_about(about: Mapping[str, Any]) -> dict[str, Any]:
    """With the paper's figures under the labels of reports; without them where there are none."""
    paper = about.get("paper") or {}
    if not paper.get("mean"):
        return {key: value for key, value in about.items() if key != "paper"}
    return {**about, "paper": {**paper, "f1": {au_label(int(au)): f1 for au, f1 in paper["f1"].items()}}}


def _mean(reports: Sequence[Any]) -> Any:
    """Mean of equal trees of numbers, None being undefined."""
    if isinstance(reports[0], Mapping):
        names = [name for name in reports[0] if name not in ("f1_interval", "pictures", "people")]
        return {name: _mean([report[name] for report in reports]) for name in names}
    defined = [value for value in reports if value is not None]
    return float(np.mean(defined)) if defined else None


def _figures(report: Mapping[str, Any], label: str) -> dict[str, Any]:
    return report["mean"] if label == "mean" else report["per_au"][label]


def _f1_cell(figures: Mapping[str, Any]) -> str:
    if figures["f1"] is None:
        return "-"
    interval = figures.get("f1_interval") or [None]
    bounds = "" if None in interval else " ({:.0f}-{:.0f})".format(*(100 * bound for bound in interval))
    return f"{100 * figures['f1']:.1f}{bounds}"


def _au_name(label: str) -> str:
    number = parse_au_label(label)
    return "" if number is None else ACTION_UNITS[number].name


def _decimal(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"
