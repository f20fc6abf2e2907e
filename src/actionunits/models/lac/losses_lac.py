"""The losses of LAC on regions of interest (Eqs. 4-6), of values pooled there.

Each takes the mean where the paper sums, and is repaired where the printed form has no least value: Eq. 4
takes |F| as part of its peak, Eqs. 4 and 5 are shifted so that 0 is perfect, and the minus of Eq. 6, which
would reward inconsistency, is a plus. m action units, two regions each; labels are occurrences in [0, 1] or
`UNKNOWN`, and regions of unknown labels take no part.
"""

import torch
from torch import Tensor

from actionunits.action_units import UNKNOWN

SMALLEST_SHARE = 1e-6
"""Of labels of one kind in a batch, that a balanced loss divides by."""


def localization_loss(magnitudes: Tensor, labels: Tensor) -> Tensor:
    """L_loc (Eq. 4): features are to be large where action units may show.

    Args:
        magnitudes: (B, m, 2) mean of |F| in each region, over the largest |F| of its picture.
        labels: (B, m).

    Returns:
        Scalar in [0, 1].
    """
    return _mean_of_known(1 - magnitudes.mean(-1), labels)


def activation_loss(similarities: Tensor, labels: Tensor, balance: bool = False) -> Tensor:
    """L_act (Eq. 5): class weights are to point to the features of active regions, and away from others.

    Linear in M, it is least at M = -1 everywhere for whoever knows an occurrence rate below 0.5 and nothing
    else. There the gradient of the cosine ends, and features that knew nothing stay so.

    Args:
        similarities: (B, m, 2) mean of M = cos(w_c, F) in each region.
        labels: (B, m).
        balance: Weigh an action unit's active and its inactive regions of the batch alike, so that an M that
            is everywhere the same gains nothing. One that has but one kind in the batch counts half.

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
    """L_l2g (Eq. 6): the similarity in the regions is to be that of the whole map.

    Args:
        similarities: (B, m, 2) mean of M in each region.
        overall: (B, m) mean of the whole M.
        labels: (B, m); only whether they are known counts.

    Returns:
        Scalar in [0, 4].
    """
    return _mean_of_known((similarities - overall[..., None]).square().mean(-1), labels)


def _mean_of_known(terms: Tensor, labels: Tensor) -> Tensor:
    known = labels != UNKNOWN
    return terms.where(known, 0.0).sum() / known.sum().clamp(min=1)


__all__ = ["activation_loss", "consistency_loss", "localization_loss"]
