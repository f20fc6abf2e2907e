"""Labels that trained networks help to give: distillation (Hinton, Vinyals and Dean, arXiv:1503.02531)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from transformers import AutoModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor

import actionunits  # noqa: F401  (registers the models)
from actionunits.action_units import UNKNOWN, au_label
from actionunits.data import AlignedFaces
from actionunits.evaluation import predict_scores
from recipe import Recipe


def taught(faces: AlignedFaces, recipe: Recipe, device: torch.device) -> AlignedFaces:
    """The same faces, their intensities such that the soft label is part the corpus' and part the teachers'.

    With y = min(intensity / full_intensity, 1), logits z_k of the K teachers and the teachers' weight w:

        y' = (1 - w) y + w sigmoid(sum_k z_k / K)

    The teachers see each picture once, as the image processor shows it to them, whatever varies in training.

    Args:
        faces: The training split, with the recipe's action units.
        recipe: Names the teachers.
        device: Where the teachers compute.

    Raises:
        ValueError: A teacher does not know one of the action units, or the corpus has no intensities.
    """
    if not recipe.teachers:
        return faces
    if faces.intensities is None:
        raise ValueError(
            "teachers soften graded labels, but this corpus has no intensities; set teachers=[]."
        )
    logits = np.mean([_logits(teacher, faces, recipe, device) for teacher in recipe.teachers], axis=0)
    own = np.clip(faces.intensities / recipe.full_intensity, None, 1)
    soft = (1 - recipe.teacher_weight) * own + recipe.teacher_weight / (1 + np.exp(-logits))
    unknown = (faces.occurrence == UNKNOWN) | (faces.intensities == UNKNOWN)
    soft = np.where(unknown, UNKNOWN, recipe.full_intensity * soft)
    return replace(faces, intensities=soft.astype(np.float32))


def _logits(teacher: str, faces: AlignedFaces, recipe: Recipe, device: torch.device) -> np.ndarray:
    """What one teacher says of all faces, (N, m)."""
    model = AutoModel.from_pretrained(teacher).to(device).eval()
    columns = _columns(teacher, model.config.aus, recipe.aus)
    processor = AutoImageProcessor.from_pretrained(teacher)
    known = replace(faces, aus=tuple(model.config.aus))  # as many scores as the teacher gives
    scores = predict_scores(model, processor, known, recipe.eval_batch_size)[:, columns]
    scores = scores.astype(np.float64).clip(1e-7, 1 - 1e-7)
    return np.log(scores / (1 - scores))


def _columns(teacher: str, known: Sequence[int], wanted: Sequence[int]) -> list[int]:
    if missing := [au_label(au) for au in wanted if au not in known]:
        raise ValueError(f"the teacher {teacher} does not know {missing}; leave it or them out.")
    return [list(known).index(au) for au in wanted]
