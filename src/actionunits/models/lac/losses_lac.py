"""LAC's losses on pooled regions of interest (Eqs. 4-6).

They are means instead of the paper's sums, and corrected where the printed form has no minimum: Eq. 4 has |F|
relative to its maximum, Eqs. 4 and 5 are shifted to a minimum of 0, and the minus of Eq. 6, which would
reward inconsistency, is a plus. Each of the m action units has two regions; labels are occurrences in [0, 1]
or `UNKNOWN`, whose regions are ignored.
"""

import torch
from torch import Tensor

from actionunits.action_units import UNKNOWN

SMALLEST_SHARE = 1e-6
"""Lower bound of the sum of labels of one kind in a batch, by which a balanced loss divides."""


def localization_loss(magnitudes: Tensor, labels: Tensor) -> Tensor:
    """L_loc (Eq. 4): features should be large in the regions of action units.

    Args:
        magnitudes: (B, m, 2) mean of |F| in each region, relative to the largest |F| of the picture.
        labels: (B, m).

    Returns:
        Scalar in [0, 1].
    """
    return _mean_of_known(1 - magnitudes.mean(-1), labels)


def activation_loss(similarities: Tensor, labels: Tensor, balance: bool = False) -> Tensor:
    """L_act (Eq. 5): class weights should be similar to the features of active regions, opposite to others.

    As the loss is linear in M, M = -1 everywhere is optimal for uninformative features and occurrence rates
    below 0.5. There the gradient of the cosine vanishes, so that the features remain uninformative.

    Args:
        similarities: (B, m, 2) mean of M = cos(w_c, F) in each region.
        labels: (B, m).
        balance: Weight an action unit's active and inactive regions in the batch equally, so that a constant
            M gains nothing. An action unit with only one kind in the batch counts half.

    Returns:
        Scalar in [0, 2].
    """
    similarity = similarities.mean(-1)
    active, inactive = labels * (1 - similarity), (1 - labels) * (1 + similarity)
    if not balance:
        return _mean_of_known(active + inactive, labels)
    known = labels != UNKNOWN
    halves = [
        terms.where(known, 0.0).sum(0) / share.where(known, 0.0).sum(0).clamp(min=SMALLEST_SHARE)
        for terms, share in ((active, labels), (inactive, 1 - labels))
    ]
    return torch.stack(halves).mean(0).sum() / known.any(0).sum().clamp(min=1)


def consistency_loss(similarities: Tensor, overall: Tensor, labels: Tensor) -> Tensor:
    """L_l2g (Eq. 6): the similarity in the regions should equal that of the whole map.

    Args:
        similarities: (B, m, 2) mean of M in each region.
        overall: (B, m) mean of the whole M.
        labels: (B, m); only used to ignore unknown ones.

    Returns:
        Scalar in [0, 4].
    """
    return _mean_of_known((similarities - overall[..., None]).square().mean(-1), labels)


def _mean_of_known(terms: Tensor, labels: Tensor) -> Tensor:
    known = labels != UNKNOWN
    return terms.where(known, 0.0).sum() / known.sum().clamp(min=1)


__all__ = ["activation_loss", "consistency_loss", "localization_loss"]
