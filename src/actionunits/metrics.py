"""Metrics of action unit detection: per AU, in NumPy, ignoring unknown labels.

Papers report F1-frame: the F1 score of each AU over all frames of a test fold at a threshold of 0.5, averaged
over AUs. It does not show base rates, false alarms, ranking or calibration, for which there are further
metrics.

Shapes: `scores` (N, m) in [0, 1]; `labels` (N, m) with 1, 0 or `UNKNOWN`; thresholds one number or (m,).
Metrics are (m,) float64, nan where undefined (such as AUC without both classes, or any metric of an AU
without known labels). A score is a detection if it reaches its threshold (`>=`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from actionunits.action_units import UNKNOWN, au_label

if TYPE_CHECKING:
    import evaluate

    AUF1: type[evaluate.Metric]

FILLING = -100
"""The Trainer's padding of logits and labels of shorter clips."""


def au_report(
    aus: Sequence[int],
    scores: ArrayLike,
    labels: ArrayLike,
    intensities: ArrayLike | None = None,
    thresholds: ArrayLike = 0.5,
    subjects: ArrayLike | None = None,
) -> dict[str, Any]:
    """All metrics of a set of predictions as a JSON-ready dictionary, None where undefined.

    Args:
        aus: FACS numbers of the m columns.
        scores: Probabilities, (N, m).
        labels: Occurrence, (N, m), of 1, 0 and `UNKNOWN`.
        intensities: Ground truth of the intensity, (N, m); adds `correlation` and `icc`.
        thresholds: One decision threshold, or one per AU.
        subjects: The subject of each picture, (N,); adds `f1_interval`, 95 % over subjects.

    Returns:
        `{"pictures": N, "mean": {figure: value}, "per_au": {"AU1": {figure: value}, ...}}`.
    """
    scores, labels = _checked(scores, labels)
    if len(aus) != labels.shape[1]:
        raise ValueError(f"{len(aus)} AUs are named but labels have {labels.shape[1]} columns.")
    columns = {"threshold": _checked_thresholds(thresholds, len(aus))}
    columns |= {name: figure(scores, labels, thresholds) for name, figure in DECISION_FIGURES.items()}
    columns |= {name: figure(scores, labels) for name, figure in RANKING_FIGURES.items()}
    columns["base_rate"] = base_rate(labels)
    if intensities is not None:
        columns["correlation"] = correlation(scores, intensities)
        columns["icc"] = icc(scores, intensities)
    report: dict[str, Any] = {
        "pictures": len(labels),
        "mean": {name: _defined_mean(values) for name, values in columns.items()},
        "per_au": {
            au_label(au): {name: _json(values[i]) for name, values in columns.items()}
            for i, au in enumerate(aus)
        },
    }
    if subjects is not None:
        report["people"] = len(np.unique(np.asarray(subjects)))
        _add_intervals(report, f1_interval(scores, labels, subjects, thresholds))
    return report


class Confusion(NamedTuple):
    """Counts per AU, each (..., m): true and false positives, false and true negatives."""

    tp: np.ndarray
    fp: np.ndarray
    fn: np.ndarray
    tn: np.ndarray


def confusion(scores: ArrayLike, labels: ArrayLike, thresholds: ArrayLike = 0.5) -> Confusion:
    """Counts per AU over the pictures with known labels."""
    return Confusion(*(cell.sum(axis=0) for cell in _cells(*_checked(scores, labels), thresholds)))


# Metrics of decisions: (scores, labels, thresholds) -> (m,)


def f1_frame(scores: ArrayLike, labels: ArrayLike, thresholds: ArrayLike = 0.5) -> np.ndarray:
    """F1-frame, 2PR / (P + R) = 2 TP / (2 TP + FP + FN); 0 without occurrences and detections.

    Equals scikit-learn's `f1_score(zero_division=0)` of each AU; nan for an AU without known labels.
    """
    return _f1(confusion(scores, labels, thresholds))


def accuracy(scores: ArrayLike, labels: ArrayLike, thresholds: ArrayLike = 0.5) -> np.ndarray:
    """Share of correct decisions."""
    count = confusion(scores, labels, thresholds)
    return _ratio(count.tp + count.tn, sum(count))


def balanced_accuracy(scores: ArrayLike, labels: ArrayLike, thresholds: ArrayLike = 0.5) -> np.ndarray:
    """Mean of true positive and true negative rate: 0.5 for a guess at any base rate."""
    count = confusion(scores, labels, thresholds)
    return (_ratio(count.tp, count.tp + count.fn) + _ratio(count.tn, count.tn + count.fp)) / 2


def mcc(scores: ArrayLike, labels: ArrayLike, thresholds: ArrayLike = 0.5) -> np.ndarray:
    """Matthews' correlation coefficient of decisions and labels, -1 to 1.

    It is 0 where either is constant, and nan where no label is known.
    """
    tp, fp, fn, tn = (cell.astype(float) for cell in confusion(scores, labels, thresholds))
    spread = np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return _ratio(tp * tn - fp * fn, spread, otherwise=np.where(tp + fp + fn + tn > 0, 0.0, math.nan))


def false_alarm_rate(scores: ArrayLike, labels: ArrayLike, thresholds: ArrayLike = 0.5) -> np.ndarray:
    """Share of the pictures without the AU on which it is detected, FP / (FP + TN)."""
    count = confusion(scores, labels, thresholds)
    return _ratio(count.fp, count.fp + count.tn)


# Metrics of ranking and of graded scores


def roc_auc(scores: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """Area under the ROC curve: probability that a picture with the AU scores above one without it."""
    return _per_column(_roc_auc, *_checked(scores, labels))


def average_precision(scores: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """Area under the precision-recall steps, the sum of (R_n - R_{n-1}) P_n over distinct thresholds."""
    return _per_column(_average_precision, *_checked(scores, labels))


def calibration_error(scores: ArrayLike, labels: ArrayLike, bins: int = 15) -> np.ndarray:
    """Expected calibration error (ECE, Guo et al., 2017), over `bins` equal intervals of scores in [0, 1].

    The error is the mean over pictures of the distance between mean score and occurrence rate in their
    interval; nan if a score is not in [0, 1].
    """
    return _per_column(lambda s, there: _calibration_error(s, there, bins), *_checked(scores, labels))


def correlation(scores: ArrayLike, intensities: ArrayLike) -> np.ndarray:
    """Pearson's correlation of scores and intensities, ignoring `UNKNOWN` and nan intensities."""
    return _per_column(_pearson, *_checked_intensities(scores, intensities))


def icc(scores: ArrayLike, intensities: ArrayLike) -> np.ndarray:
    """Intraclass correlation ICC(3,1) of scores and intensities, (BMS - EMS) / (BMS + EMS) for two judges.

    The consistency of single ratings (Shrout & Fleiss, 1979), as in papers on intensity. It ignores a
    constant offset, but not a different scale. `UNKNOWN` and nan intensities are ignored.
    """
    return _per_column(_icc, *_checked_intensities(scores, intensities))


def base_rate(labels: ArrayLike) -> np.ndarray:
    """Occurrence rate of each AU among its known labels."""
    labels = _check_labels(labels)
    return _ratio((labels == 1).sum(axis=0), (labels != UNKNOWN).sum(axis=0))


DECISION_FIGURES: dict[str, Callable[..., np.ndarray]] = {
    "f1": f1_frame,
    "accuracy": accuracy,
    "balanced_accuracy": balanced_accuracy,
    "mcc": mcc,
    "false_alarm_rate": false_alarm_rate,
}
RANKING_FIGURES: dict[str, Callable[..., np.ndarray]] = {
    "auc": roc_auc,
    "average_precision": average_precision,
    "ece": calibration_error,
}


# Thresholds and uncertainty


def calibrate_thresholds(scores: ArrayLike, labels: ArrayLike, max_false_alarms: float = 1.0) -> list[float]:
    """The threshold of each AU with the best F1 on these pictures, among those with few false alarms.

    F1 alone favours low thresholds for frequent and difficult AUs ("always yes" has F1 2r / (1 + r) at base
    rate r), which cause many false alarms on mostly neutral faces; hence the bound.

    Args:
        scores: Probabilities of subjects held out of training, (N, m).
        labels: Occurrence, (N, m).
        max_false_alarms: Upper bound of `false_alarm_rate`.

    Returns:
        m thresholds halfway between two scores; 0.5 for an AU without known occurrences; one above all scores
        if the bound is exceeded before the first true positive. On the evaluated pictures themselves these
        are oracle thresholds.
    """
    if not 0 <= max_false_alarms <= 1:
        raise ValueError(f"max_false_alarms={max_false_alarms} must lie in [0, 1].")
    scores, labels = _checked(scores, labels)
    known = labels != UNKNOWN
    return [
        _best_threshold(scores[known[:, i], i], labels[known[:, i], i] == 1, max_false_alarms)
        for i in range(labels.shape[1])
    ]


def f1_interval(
    scores: ArrayLike,
    labels: ArrayLike,
    subjects: ArrayLike,
    thresholds: ArrayLike = 0.5,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> np.ndarray:
    """Bootstrap interval of F1-frame, resampling subjects, as pictures of a subject are not independent.

    Returns:
        (2, m + 1): lower and upper bounds of each AU, then of the mean over AUs; nan without pictures.
    """
    scores, labels = _checked(scores, labels)
    people, person = np.unique(np.asarray(subjects), return_inverse=True)
    if len(person) != len(labels):
        raise ValueError(f"{len(person)} subjects are named for {len(labels)} pictures.")
    if not len(people):
        return np.full((2, labels.shape[1] + 1), math.nan)
    even = np.full(len(people), 1 / len(people))
    draws = np.random.default_rng(seed).multinomial(len(people), even, resamples)  # (resamples, people)
    # Counts per subject (people, m), which a resample weights by how often the subject was drawn.
    per_person = [np.zeros((len(people), labels.shape[1])) for _ in Confusion._fields]
    for total, cell in zip(per_person, _cells(scores, labels, thresholds), strict=True):
        np.add.at(total, person, cell)
    f1 = _f1(Confusion(*(draws @ total for total in per_person)))
    defined = ~np.isnan(f1)
    mean = _ratio(np.where(defined, f1, 0).sum(axis=1), defined.sum(axis=1))
    bounds = [(1 - level) / 2, (1 + level) / 2]
    columns = [c[~np.isnan(c)] for c in (*f1.T, mean)]  # a resample may lack known labels of an AU
    return np.array([np.quantile(c, bounds) if c.size else [math.nan] * 2 for c in columns]).T


def trainer_metrics(aus: Sequence[int], thresholds: ArrayLike = 0.5) -> Callable[..., dict[str, float]]:
    """A `compute_metrics` for `transformers.Trainer`: mean F1, mean AUC, and F1 per AU.

    Means are over AUs with known labels, nan if there are none. Frames of clips count as pictures, the
    Trainer's padding does not. With `batch_eval_metrics=True` batches are gathered until the last one; after
    an interrupted evaluation, whose batches it still holds, make a new function.
    """
    gathered: list[tuple[np.ndarray, np.ndarray]] = []

    def compute_metrics(prediction: Any, compute_result: bool = True) -> dict[str, float]:
        gathered.append((_rows(prediction.predictions), _rows(prediction.label_ids)))
        if not compute_result:
            return {}
        logits, labels = (np.concatenate(batches) for batches in zip(*gathered, strict=True))
        gathered.clear()
        return _trainer_figures(aus, logits, labels, thresholds)

    return compute_metrics


# Parts


def _trainer_figures(
    aus: Sequence[int], logits: np.ndarray, labels: np.ndarray, thresholds: ArrayLike
) -> dict[str, float]:
    is_filling = (labels == FILLING).all(axis=1)
    logits, labels = logits[~is_filling], labels[~is_filling]
    scores = 1 / (1 + np.exp(-logits))
    f1 = f1_frame(scores, labels, thresholds)
    if len(f1) != len(aus):
        raise ValueError(
            f"trainer_metrics names {len(aus)} AUs, but the model has {len(f1)} outputs; "
            "pass model.config.aus."
        )
    return {
        "f1": _mean_or_nan(f1),
        "auc": _mean_or_nan(roc_auc(scores, labels)),
        **{f"f1_{au_label(au)}": float(x) for au, x in zip(aus, f1, strict=True) if not np.isnan(x)},
    }


def _rows(batches: Any) -> np.ndarray:
    """The Trainer's logits or labels (..., m) as (N, m).

    They are a list of batches with `eval_do_concat_batches=False`, tuples that begin with logits, or tensors
    on any device and of any type with `batch_eval_metrics=True`.
    """
    batches = batches if isinstance(batches, list) else [batches]
    firsts = [batch[0] if isinstance(batch, tuple) else batch for batch in batches]
    arrays = [np.asarray(first.cpu().double() if hasattr(first, "cpu") else first, float) for first in firsts]
    return np.concatenate([array.reshape(-1, array.shape[-1]) for array in arrays])


def _check_labels(labels: ArrayLike) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.ndim != 2:
        raise ValueError(f"labels must be (pictures, AUs), got shape {labels.shape}.")
    strange = labels[~np.isin(labels, (0, 1, UNKNOWN))]
    if strange.size:
        raise ValueError(f"labels are 0, 1 or {UNKNOWN} (unknown), not {strange[0]}; map other codes first.")
    return labels


def _checked(scores: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    labels, scores = _check_labels(labels), np.asarray(scores, dtype=float)
    if scores.shape != labels.shape:
        raise ValueError(f"scores {scores.shape} and labels {labels.shape} must have the same shape (N, m).")
    if np.isnan(scores).any():
        raise ValueError(f"{int(np.isnan(scores).any(axis=1).sum())} pictures have a nan score.")
    return scores, labels


def _checked_thresholds(thresholds: ArrayLike, m: int) -> np.ndarray:
    """Thresholds (m,)."""
    thresholds = np.asarray(thresholds, float)
    if thresholds.shape not in ((), (m,)):
        raise ValueError(f"thresholds must be one number or one for each of {m} AUs, not {thresholds.shape}.")
    return np.broadcast_to(thresholds, m)


def _checked_intensities(
    scores: ArrayLike, intensities: ArrayLike
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both as arrays, and a mask of known intensities."""
    scores, intensities = np.asarray(scores, float), np.asarray(intensities, float)
    if scores.shape != intensities.shape or scores.ndim != 2:
        raise ValueError(f"scores {scores.shape} and intensities {intensities.shape} must both be (N, m).")
    return scores, intensities, ~np.isnan(intensities) & (intensities != UNKNOWN)


def _cells(scores: np.ndarray, labels: np.ndarray, thresholds: ArrayLike) -> Confusion:
    found = scores >= _checked_thresholds(thresholds, labels.shape[1])
    there, absent = labels == 1, labels == 0
    return Confusion(found & there, found & absent, ~found & there, ~found & absent)


def _f1(count: Confusion) -> np.ndarray:
    f1 = _ratio(2 * count.tp, 2 * count.tp + count.fp + count.fn, otherwise=0.0)
    return np.where(sum(count) > 0, f1, math.nan)


def _ratio(part: ArrayLike, whole: ArrayLike, otherwise: ArrayLike = math.nan) -> np.ndarray:
    part, whole = np.asarray(part, float), np.asarray(whole, float)
    return np.divide(part, whole, out=np.full(whole.shape, otherwise, float), where=whole > 0)


def _per_column(
    figure: Callable, scores: np.ndarray, truth: np.ndarray, known: np.ndarray | None = None
) -> np.ndarray:
    known = truth != UNKNOWN if known is None else known
    return np.array([figure(scores[k, i], truth[k, i]) for i, k in enumerate(known.T)], dtype=float)


def _roc_auc(scores: np.ndarray, there: np.ndarray) -> float:
    positives, negatives = (there == 1).sum(), (there == 0).sum()
    if not positives or not negatives:
        return math.nan
    _, level, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2  # ties have their mean rank
    rank_sum = ranks[level][there == 1].sum()
    return float((rank_sum - positives * (positives + 1) / 2) / (positives * negatives))


def _average_precision(scores: np.ndarray, there: np.ndarray) -> float:
    if not (there == 1).any():
        return math.nan
    _, tp, fp = _operating_points(scores, there == 1)
    return float((np.diff(tp, prepend=0) / tp[-1] * tp / (tp + fp)).sum())


def _pearson(scores: np.ndarray, truth: np.ndarray) -> float:
    # Compared as they are: around a rounded mean constants would seem to vary.
    if len(scores) < 2 or not np.ptp(scores) or not np.ptp(truth):
        return math.nan
    x, y = scores - scores.mean(), truth - truth.mean()
    spread = math.sqrt(float((x * x).sum() * (y * y).sum()))
    return float((x * y).sum() / spread) if spread > 0 else math.nan


def _icc(scores: np.ndarray, truth: np.ndarray) -> float:
    """ICC(3,1) of the judges `scores` and `truth`; rows are targets (Shrout & Fleiss, 1979, Table 4)."""
    ratings = np.stack([scores, truth], axis=1)
    n, k = ratings.shape
    if n < 2 or not np.ptp(ratings, axis=0).any():
        return math.nan
    rows, judges, mean = ratings.mean(1), ratings.mean(0), ratings.mean()
    between = k * ((rows - mean) ** 2).sum() / (n - 1)  # BMS
    residual = ((ratings - rows[:, None] - judges + mean) ** 2).sum() / ((n - 1) * (k - 1))  # EMS
    spread = between + (k - 1) * residual
    return float((between - residual) / spread) if spread > 0 else math.nan


def _calibration_error(scores: np.ndarray, there: np.ndarray, bins: int) -> float:
    if not len(scores) or scores.min() < 0 or scores.max() > 1:
        return math.nan
    which = np.minimum((scores * bins).astype(int), bins - 1)
    gaps = np.bincount(which, scores - there, bins)  # (mean score - rate) * pictures, by interval
    return float(np.abs(gaps).sum() / len(scores))


def _operating_points(scores: np.ndarray, there: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct scores in descending order, with the true and false positives at each as the threshold."""
    order = np.argsort(-scores, kind="stable")
    last_of_tie = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    tp = np.cumsum(there[order])[last_of_tie]
    return scores[order][last_of_tie], tp, last_of_tie + 1 - tp


def _best_threshold(scores: np.ndarray, there: np.ndarray, max_false_alarms: float) -> float:
    if not there.any():
        return 0.5
    level, tp, fp = _operating_points(scores, there)
    f1 = 2 * tp / (tp + fp + there.sum())
    allowed = (fp <= max_false_alarms * (~there).sum()) & (tp > 0)
    if not allowed.any():  # better no detections than only false ones
        return float((level[0] + max(1.0, level[0])) / 2)
    best = int(np.argmax(np.where(allowed, f1, -1)))
    below = level[best + 1] if best + 1 < len(level) else min(0.0, level[best])
    return float((level[best] + below) / 2)


def _add_intervals(report: dict[str, Any], bounds: np.ndarray) -> None:
    for figures, low, high in zip([*report["per_au"].values(), report["mean"]], *bounds, strict=True):
        figures["f1_interval"] = [_json(low), _json(high)]


def _defined_mean(values: np.ndarray) -> float | None:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else None


def _mean_or_nan(values: np.ndarray) -> float:
    mean = _defined_mean(values)
    return math.nan if mean is None else mean


def _json(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def __getattr__(name: str) -> Any:
    """Define `AUF1` on first use, as `evaluate` is optional."""
    if name != "AUF1":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = _make_auf1()
    return globals()[name]


def _make_auf1() -> type[evaluate.Metric]:
    import datasets

    import evaluate

    class AUF1(evaluate.Metric):
        """F1-frame and further metrics as an `evaluate.Metric` of probabilities and labels, both (N, m).

        `compute(thresholds=0.5)` returns the metrics of `au_report`: "f1" is the mean over action units (None
        if undefined), "f1_per_au" the list in column order, and so on.

        Example:
            >>> metric = AUF1()
            >>> metric.add_batch(predictions=[[0.9, 0.2], [0.6, 0.4]], references=[[1, 0], [0, -1]])
            >>> metric.add(prediction=[0.1, 0.8], reference=[0, 1])
            >>> figures = metric.compute()
            >>> [round(f1, 2) for f1 in figures["f1_per_au"]]
            [0.67, 1.0]
        """

        __qualname__ = "AUF1"  # where pickle looks for it

        def _info(self) -> evaluate.MetricInfo:
            # In float32 a score of 0.7 would not reach a threshold of 0.7; int8 would silently make 0.7 a 0.
            features = {
                "predictions": datasets.List(datasets.Value("float64")),
                "references": datasets.List(datasets.Value("float32")),
            }
            return evaluate.MetricInfo(
                description="F1 of each action unit over all frames, its mean, and further figures.",
                citation="",
                inputs_description="predictions: probabilities; references: 1, 0 or -1 (unknown).",
                features=datasets.Features(features),
            )

        def _compute(self, predictions: Any, references: Any, thresholds: ArrayLike = 0.5) -> dict[str, Any]:
            columns = {"base_rate": base_rate(references)}
            columns |= {n: f(predictions, references, thresholds) for n, f in DECISION_FIGURES.items()}
            columns |= {n: f(predictions, references) for n, f in RANKING_FIGURES.items()}
            means = {name: _defined_mean(values) for name, values in columns.items()}
            return means | {f"{name}_per_au": [_json(x) for x in v] for name, v in columns.items()}

    return AUF1
