"""Evaluate a model on a corpus: per action unit, on neutral faces, and per group of people.

Decisions are evaluated at three thresholds, side by side: at 0.5, as in most papers; at thresholds calibrated
on other people; and at oracle thresholds, the best for the evaluated pictures themselves, which some papers
report and nobody has in use. `actionunits.reports` writes the reports.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from actionunits.action_units import au_label
from actionunits.data.aligned_faces import AlignedFaces
from actionunits.data.sampling import fixed_stride_clips
from actionunits.metrics import au_report, calibrate_thresholds
from actionunits.reports import RULES

AGE_BANDS = ((18, 29), (30, 44), (45, 120))
GROUP_FIGURES = ("f1", "auc", "correlation", "false_alarm_rate")


def evaluate_model(
    model: Any,
    processor: Any,
    faces: AlignedFaces,
    split: str,
    batch_size: int = 64,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Evaluate a model on faces, through its image processor, as in use.

    Args:
        model: Any AU model, in evaluation mode.
        processor: Its `AUImageProcessor`.
        faces: Pictures and landmarks, with the model's action units.
        split: Name of the split, for the report.
        batch_size: Pictures per forward pass.
        about: See `evaluation_report`.

    Returns:
        The report of `evaluation_report`.
    """
    scores = predict_scores(model, processor, faces, batch_size)
    return evaluation_report(scores, faces, model.config.au_thresholds or 0.5, split, about)


@torch.inference_mode()
def predict_scores(model: Any, processor: Any, faces: AlignedFaces, batch_size: int = 64) -> np.ndarray:
    """Probabilities (N, m) of all faces, from their pictures and landmarks.

    A temporal network sees recordings clip by clip, as in training. Under torchrun each process predicts its
    share of the faces, and all get the whole.
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
    """All metrics as a JSON-ready dictionary.

    Args:
        scores: Probabilities, (N, m).
        faces: The N faces with the ground truth.
        thresholds: One decision threshold, or one per AU, calibrated on other people.
        split: Name of the split.
        about: Optional context: `thresholds_from`, the pictures that `thresholds` were calibrated on;
            `epoch_selection`, a key of `reports.SELECTIONS`; `paper`, the published figures, as
            `{"table": str, "f1": {AU: percent}, "mean": percent}`.

    Returns:
        `at_half`, `calibrated` and `oracle` are reports of `actionunits.metrics.au_report`, `neutral` is
        `neutral_report`, `groups` has mean figures at the calibrated thresholds by kind and group.
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
    """Reports of scores (N, m) by every rule of `RULES`, but for `calibrated` without such thresholds."""
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

    Intervals are left out: they belong to the people of one fold. Means are over the defined figures.

    Args:
        reports: One per fold, or one for each of several models.
        apart: Those of them with different pictures and people, which are counted; by default all.

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
    """False alarms on faces without any of the action units; scores and occurrence are (N, m)."""
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
    """Mean F1 at 0.5 between corpora of training and of test, over shared action units.

    Args:
        reports: `evaluation_report`s by the corpus of training, then by the corpus of the test.

    Returns:
        `aus`, the labels that all reports share; `f1`, the comparable means over these, {trained: {tested:
        mean}}; `pairs`, for each pair its own labels (`aus`) and their mean (`f1`).

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


def _group_report(
    scores: np.ndarray, faces: AlignedFaces, thresholds: Any, chosen: np.ndarray
) -> dict[str, Any]:
    intensities = None if faces.intensities is None else faces.intensities[chosen]
    report = au_report(faces.aus, scores[chosen], faces.occurrence[chosen], intensities, thresholds)
    means = {name: report["mean"][name] for name in GROUP_FIGURES if name in report["mean"]}
    return {"pictures": int(chosen.sum()), "people": len(set(faces.people[chosen])), **means}


def _age_bands(ages: np.ndarray) -> np.ndarray:
    """Names of `AGE_BANDS` for ages as text; "unknown" for others."""
    names = {f"{low}-{high}": (low, high) for low, high in AGE_BANDS}

    def band(age: str) -> str:
        years = float(age) if age.replace(".", "", 1).isdigit() else -1
        return next((name for name, (low, high) in names.items() if low <= int(years) <= high), "unknown")

    return np.array([band(age) for age in ages])


def _process() -> tuple[int, int]:
    """Rank of this process, and number of processes."""
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
    """Sum the shares (N, m) of all processes, which are 0 elsewhere."""
    if processes == 1:
        return share
    shares: list[Any] = [None] * processes
    torch.distributed.all_gather_object(shares, share)
    return np.sum(shares, axis=0, dtype=share.dtype)


def _json_about(about: Mapping[str, Any]) -> dict[str, Any]:
    """The context with the paper's figures by label, if there are any."""
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


__all__ = [
    "AGE_BANDS",
    "GROUP_FIGURES",
    "cross_corpus",
    "evaluate_model",
    "evaluation_report",
    "mean_over_folds",
    "neutral_report",
    "predict_scores",
    "threshold_reports",
]
