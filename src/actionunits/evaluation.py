"""What a model reaches on a corpus: per action unit, on neutral faces, and per group of people.

Decisions are measured twice: at 0.5, as papers do, and at the thresholds of the model's config.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from actionunits.action_units import ACTION_UNITS, parse_au_label
from actionunits.data.aligned_faces import AlignedFaces
from actionunits.metrics import au_report

AGE_BANDS = ((18, 29), (30, 44), (45, 120))
GROUP_FIGURES = ("f1", "auc", "correlation", "false_alarm_rate")


def evaluate_model(
    model: Any, processor: Any, faces: AlignedFaces, split: str, batch_size: int = 64
) -> dict[str, Any]:
    """Run a model on faces, through its image processor as in use, and measure it.

    Args:
        model: Any AU model, in evaluation mode.
        processor: Its `AUImageProcessor`.
        faces: Pictures and landmarks, with the model's action units.
        split: Name of the split, for the report.
        batch_size: Pictures of one forward pass.

    Returns:
        The report of `evaluation_report`.
    """
    scores = predict_scores(model, processor, faces, batch_size)
    return evaluation_report(scores, faces, model.config.au_thresholds or 0.5, split)


@torch.inference_mode()
def predict_scores(model: Any, processor: Any, faces: AlignedFaces, batch_size: int = 64) -> np.ndarray:
    """Probabilities (N, m) of all faces, from their pictures and landmarks."""
    scores = []
    starts = range(0, len(faces), batch_size)
    for start in tqdm(starts, desc="evaluating", unit="batch", disable=None):
        rows = range(start, min(start + batch_size, len(faces)))
        pictures, landmarks = [faces.picture(row) for row in rows], [faces.landmarks[row] for row in rows]
        inputs = processor(pictures, landmarks=landmarks, return_tensors="pt").to(model.device)
        scores.append(torch.sigmoid(model(**inputs).logits.float()).cpu().numpy())
    return np.concatenate(scores)


def evaluation_report(scores: np.ndarray, faces: AlignedFaces, thresholds: Any, split: str) -> dict[str, Any]:
    """All figures as a JSON-ready dictionary.

    Args:
        scores: Probabilities, (N, m).
        faces: The N faces with the truth.
        thresholds: One decision threshold, or one per AU.
        split: Name of the split.

    Returns:
        `at_half` and `calibrated` are reports of `actionunits.metrics.au_report`, `neutral` tells of false
        alarms, `groups` has mean figures at the calibrated thresholds by group and value.
    """
    groups = {name: _age_bands(values) if name == "age" else values for name, values in faces.groups.items()}
    return {
        "split": split,
        "pictures": len(faces),
        "people": len(set(faces.people)),
        "at_half": au_report(faces.aus, scores, faces.occurrence, faces.intensities, 0.5),
        "calibrated": au_report(
            faces.aus, scores, faces.occurrence, faces.intensities, thresholds, faces.people
        ),
        "neutral": neutral_report(scores, faces.occurrence, thresholds),
        "groups": {
            name: {
                str(value): _group_report(scores, faces, thresholds, values == value)
                for value in sorted(set(values))
            }
            for name, values in groups.items()
        },
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


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write a report as JSON, as a Markdown table and as bars: `metrics-SPLIT.json`, `.md` and `.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"metrics-{report['split']}"
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(metrics_table(report) + "\n", encoding="utf-8")
    draw_bars(report).save(stem.with_suffix(".png"))


def metrics_table(report: dict[str, Any]) -> str:
    """The figures of every action unit and their mean, as a Markdown table."""
    header = "| AU | name | base rate | F1 at 0.5 | threshold | F1 | false alarms | AUC | correlation |"
    lines = [header, "|---|---|" + "---:|" * 7]
    calibrated, at_half = report["calibrated"], report["at_half"]
    rows = [*calibrated["per_au"], "mean"]
    for label in rows:
        chosen = calibrated["mean"] if label == "mean" else calibrated["per_au"][label]
        half = at_half["mean"] if label == "mean" else at_half["per_au"][label]
        number = parse_au_label(label)
        name = "" if number is None else ACTION_UNITS[number].name
        figures = [
            _percent(chosen["base_rate"]),
            _decimal(half["f1"]),
            _decimal(chosen["threshold"]),
            _decimal(chosen["f1"]),
            _percent(chosen["false_alarm_rate"]),
            _decimal(chosen["auc"]),
            _decimal(chosen.get("correlation")),
        ]
        lines.append(f"| {label} | {name} | " + " | ".join(figures) + " |")
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


def draw_bars(report: dict[str, Any], width: int = 640, row: int = 24) -> Image.Image:
    """F1 of every action unit from 0 to 1: a bar at the stored threshold, a line at 0.5."""
    calibrated, at_half = report["calibrated"]["per_au"], report["at_half"]["per_au"]
    left, right = 64, width - 64
    canvas = Image.new("RGB", (width, row * (len(calibrated) + 1) + row // 2), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((left, 6), f"F1 on {report['split']}: bar at the stored threshold, line at 0.5", fill="black")
    for i, (label, figures) in enumerate(calibrated.items(), start=1):
        top, middle = i * row + 4, i * row + row // 2
        bottom = top + row - 8
        draw.text((8, middle), label, fill="black", anchor="lm")
        draw.rectangle((left, top, right, bottom), fill="#eef2f7")
        draw.rectangle((left, top, left + (right - left) * figures["f1"], bottom), fill="#3b76c4")
        mark = left + (right - left) * at_half[label]["f1"]
        draw.line((mark, top - 2, mark, bottom + 2), fill="#444444", width=2)
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


def _decimal(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"
