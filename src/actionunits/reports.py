"""Write evaluation reports as text, Markdown tables and bar charts; `actionunits.evaluation` makes them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from actionunits.action_units import au_name

RULES = {"at_half": "at 0.5", "calibrated": "calibrated", "oracle": "oracle"}
"""The three ways to choose thresholds: keys of reports and titles of tables."""
SELECTIONS = {
    "last": "the last, without selection",
    "best-validation": "the best on the validation people",
    "best-test": "the best on the evaluated pictures themselves, as in the papers, which is optimistic",
}
"""Rules of epoch selection: values in recipes and explanations in reports."""
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


def cross_corpus_table(matrix: Mapping[str, Any]) -> str:
    """The result of `evaluation.cross_corpus` as a Markdown table, in percent."""
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
    """Write a report as JSON, Markdown and bar chart: `metrics-SPLIT.json`, `.md` and `.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"metrics-{report['split']}"
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(report_text(report) + "\n", encoding="utf-8")
    draw_bars(report).save(stem.with_suffix(".png"))


def report_text(report: Mapping[str, Any]) -> str:
    """The whole report as Markdown: provenance, then tables."""
    selection = report.get("epoch_selection")
    lines = [
        f"# {report['split']}: {report['pictures']:,} pictures of {report.get('people') or 'unnamed'} people",
        "",
        f"- Epoch: {SELECTIONS.get(selection, selection) if selection else 'unknown'}.",
        f"- Calibrated thresholds: {report.get('thresholds_from') or 'from unknown pictures'}.",
        "- Oracle thresholds: the best for these very pictures, an upper bound that is not reached in use.",
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
    """F1-frame of every action unit by all rules of thresholds, and the paper's, as a Markdown table."""
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
        lines.append(f"| {label} | {au_name(label)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def figures_table(report: Mapping[str, Any]) -> str:
    """The other figures of an `au_report`, as a Markdown table."""
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
        lines.append(f"| {label} | {au_name(label)} | " + " | ".join(figures) + " |")
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


def _figures(report: Mapping[str, Any], label: str) -> dict[str, Any]:
    return report["mean"] if label == "mean" else report["per_au"][label]


def _f1_cell(figures: Mapping[str, Any]) -> str:
    if figures["f1"] is None:
        return "-"
    interval = figures.get("f1_interval") or [None]
    bounds = "" if None in interval else " ({:.0f}-{:.0f})".format(*(100 * bound for bound in interval))
    return f"{100 * figures['f1']:.1f}{bounds}"


def _decimal(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"
