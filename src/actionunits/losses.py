"""Training losses of the methods: pure functions of logits and labels.

Labels are occurrences in [0, 1] (binary or soft) or `UNKNOWN`, which are ignored.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from actionunits.action_units import UNKNOWN


def weighted_au_loss(
    logits: Tensor, labels: Tensor, weight: Tensor | None = None, pos_weight: Tensor | None = None
) -> Tensor:
    """Weighted multi-label cross-entropy (ESCDA Eq. 7, AC2D Eq. 14).

    The mean of the terms of all known labels, weighted by w. If all labels are known this is Eq. 7 (whose w
    sum to one), averaged over the batch; without any known label loss and gradient are zero. Computed from
    logits, in at least float32, so neither large logits nor half precision overflow.

    Args:
        logits: (B, m), any floating type.
        labels: (B, m), integers or floats: occurrence in [0, 1], or `UNKNOWN`.
        weight: (m,) w of each action unit, in any scale; ones by default.
        pos_weight: (m,) v of each action unit, the weight of its occurrences; ones by default.

    Returns:
        Scalar, float32 (float64 for float64 logits).

    Raises:
        ValueError: Shapes differ, or a label is neither in [0, 1] nor `UNKNOWN` (not checked while tracing).
    """
    x, p, w = _known_terms(logits, labels, weight)
    v = 1.0 if pos_weight is None else pos_weight.to(x)
    # -log sigmoid(x) = softplus(-x), -log(1 - sigmoid(x)) = softplus(x)
    return _weighted_mean(v * p * F.softplus(-x) + (1 - p) * F.softplus(x), w)


def occurrence_weights(rates: Sequence[float] | Tensor) -> tuple[Tensor, Tensor]:
    """Return the weights w and v that balance rare and frequent action units (ESCDA Eq. 8, AC2D Eq. 14).

    Args:
        rates: (m,) occurrence rates in the training set, n_occ / n, in (0, 1).

    Returns:
        w (m,), proportional to 1 / rate with sum one, and v (m,), (1 - rate) / rate; float32.

    Raises:
        ValueError: A rate is not in (0, 1), where the weights are undefined (not checked while compiling).
    """
    rate = torch.as_tensor(rates, dtype=torch.float32)
    is_compiling = torch.compiler.is_compiling()
    if not is_compiling and bool(((rate <= 0) | (rate >= 1) | rate.isnan()).any()):
        raise ValueError(f"Occurrence rates must lie between 0 and 1, exclusively; got {rate.tolist()}.")
    inverse = 1 / rate
    return inverse / inverse.sum(), (1 - rate) / rate


def mdwa_loss(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None = None,
    gamma: Tensor | float = 1.0,
    margin: float = 0.0,
) -> Tensor:
    """Margin-truncated difficulty-aware weighted asymmetric loss (AUFormer Eq. 6).

    The loss of a non-occurrence with predicted probability p is -p_m^gamma log(1 - p_m), p_m = max(p - m, 0).
    So easy ones (p < m) are ignored, and the gradient vanishes at p = 1, as they may be mislabelled (Eq. 7).
    Means, unknown labels and precision as in `weighted_au_loss`.

    Args:
        logits: (B, m), any floating type.
        labels: (B, m), integers or floats: occurrence in [0, 1], or `UNKNOWN`.
        weight: (m,) omega of each action unit, in any scale; ones by default.
        gamma: (m,) or one number above 0, see `difficulty_exponents`.
        margin: m in [0, 1).

    Returns:
        Scalar, float32 (float64 for float64 logits).

    Raises:
        ValueError: Shapes differ, or a label is neither in [0, 1] nor `UNKNOWN` (not checked while tracing).
    """
    x, y, w = _known_terms(logits, labels, weight)
    p = torch.sigmoid(x)
    is_hard = p > margin
    # An arbitrary value for easy ones: 0^gamma has no finite gradient for gamma < 1.
    p_m = torch.where(is_hard, p - margin, 0.5)
    log_q = F.logsigmoid(-x) if margin == 0 else torch.log(torch.sigmoid(-x) + margin)  # log(1 - p_m)
    exponent = gamma.to(x) if isinstance(gamma, Tensor) else gamma
    negative = torch.where(is_hard, -(p_m**exponent) * log_q, 0.0)
    return _weighted_mean(y * F.softplus(-x) + (1 - y) * negative, w)


def weighted_asymmetric_loss(logits: Tensor, labels: Tensor, weight: Tensor | None = None) -> Tensor:
    """Weighted asymmetric loss (WA; Luo et al., IJCAI 2022): `mdwa_loss` with gamma 1 and margin 0."""
    return mdwa_loss(logits, labels, weight)


def weighted_dice_loss(
    logits: Tensor, labels: Tensor, weight: Tensor | None = None, smoothing: float = 1.0
) -> Tensor:
    """Weighted multi-label dice loss (AUFormer Eq. 8), the mean of 1 - (2 y p + eps) / (y^2 + p^2 + eps).

    Args:
        logits: (B, m), any floating type.
        labels: (B, m), integers or floats: occurrence in [0, 1], or `UNKNOWN`.
        weight: (m,) omega of each action unit, in any scale; ones by default.
        smoothing: epsilon; with 0 the loss of a non-occurrence is always 1.

    Returns:
        Scalar, float32 (float64 for float64 logits).

    Raises:
        ValueError: Shapes differ, or a label is neither in [0, 1] nor `UNKNOWN` (not checked while tracing).
    """
    x, y, w = _known_terms(logits, labels, weight)
    p = torch.sigmoid(x)
    overlap = 2 * y * p + smoothing
    total = (y**2 + p**2 + smoothing).clamp(min=torch.finfo(x.dtype).tiny)
    return _weighted_mean(1 - overlap / total, w)


def difficulty_exponents(rates: Sequence[float] | Tensor, bounds: Sequence[float] = (1.0, 2.0)) -> Tensor:
    """Return gamma (m,) = B_L + (B_R - B_L) * rate, float32 (AUFormer Sec. 3.4).

    Rare action units are difficult; a smaller exponent gives them a larger gradient.

    Args:
        rates: (m,) occurrence rates in the training set, in [0, 1].
        bounds: B_L and B_R, the exponents at rates of 0 and 1.
    """
    lower, upper = bounds
    return lower + (upper - lower) * torch.as_tensor(rates, dtype=torch.float32)


def attention_kl_loss(log_attention: Tensor, target: Tensor, labels: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the predefined attention from the predicted one (AC2D Eq. 7).

    Averaged over the pictures and action units with known labels.

    Args:
        log_attention: (B, m, n) logarithm of the predicted attention over n positions.
        target: (B, m, n) predefined attention, which sums to one over the positions.
        labels: (B, m) occurrences, or `UNKNOWN`.

    Returns:
        Scalar: the mean divergence, divided by n as in Eq. 7.
    """
    labels, target = labels.to(log_attention.device), target.to(log_attention.device)
    known = labels != UNKNOWN
    target = torch.where(known[..., None], target, 0.0)
    divergence = (torch.xlogy(target, target) - target * log_attention).mean(-1)  # (B, m)
    return divergence.sum() / known.sum().clamp(min=1)


def _known_terms(logits: Tensor, labels: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits, labels and weights (B, m) in at least float32, 0 where the label is unknown."""
    if logits.shape != labels.shape:
        raise ValueError(f"labels have shape {tuple(labels.shape)}, the logits {tuple(logits.shape)}.")
    _check_labels(labels)
    labels = labels.to(logits.device)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    known = labels != UNKNOWN
    x = torch.where(known, logits.to(dtype), 0.0)
    y = torch.where(known, labels.to(dtype), 0.0)
    return x, y, known.to(dtype) if weight is None else known * weight.to(x)


def _weighted_mean(terms: Tensor, weight: Tensor) -> Tensor:
    return (weight * terms).sum() / weight.sum().clamp(min=torch.finfo(terms.dtype).tiny)


def _check_labels(labels: Tensor) -> None:
    if torch.compiler.is_compiling() or labels.device.type == "meta":
        return
    valid = ((labels >= 0) & (labels <= 1)) | (labels == UNKNOWN)
    if not bool(valid.all()):
        raise ValueError(
            f"Label {labels[~valid][0].item()} is neither an occurrence in [0, 1] nor {UNKNOWN} (unknown); "
            f"map the corpus's code for missing labels (9, 999) to {UNKNOWN}."
        )


__all__ = [
    "attention_kl_loss",
    "difficulty_exponents",
    "mdwa_loss",
    "occurrence_weights",
    "weighted_asymmetric_loss",
    "weighted_au_loss",
    "weighted_dice_loss",
]
