"""The losses of LAC on regions of interest (Eqs. 4-6), of values pooled there.

Each takes the mean where the paper sums, and is repaired where the printed form has no least value: Eq. 4
takes |F| as part of its peak, Eqs. 4 and 5 are shifted so that 0 is perfect, and the minus of Eq. 6, which
would reward inconsistency, is a plus. m action units, two regions each; labels are occurrences in [0, 1] or
`UNKNOWN`, and regions of unknown labels take no part.
"""

from torch import Tensor

from actionunits.action_units import UNKNOWN


def localization_loss(magnitudes: Tensor, labels: Tensor) -> Tensor:
    """L_loc (Eq. 4): features are to be large where action units may show.

    Args:
        magnitudes: (B, m, 2) mean of |F| in each region, over the largest |F| of its picture.
        labels: (B, m).

    Returns:
        Scalar in [0, 1].
    """
    return _mean_of_known(1 - magnitudes.mean(-1), labels)


def activation_loss(similarities: Tensor, labels: Tensor) -> Tensor:
    """L_act (Eq. 5): class weights are to point to the features of active regions, and away from others.

    Args:
        similarities: (B, m, 2) mean of M = cos(w_c, F) in each region.
        labels: (B, m).

    Returns:
        Scalar in [0, 2].
    """
    similarity = similarities.mean(-1)
    return _mean_of_known(labels * (1 - similarity) + (1 - labels) * (1 + similarity), labels)


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
