"""Distillation: soft labels from trained networks (Hinton, Vinyals and Dean, arXiv:1503.02531)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.auto.image_processing_auto import AutoImageProcessor

import actionunits  # noqa: F401  (registers the models)
from actionunits.action_units import UNKNOWN, au_label
from actionunits.data import AlignedFaces
from actionunits.evaluation import predict_scores
from actionunits.modeling_au import sum_over_processes
from recipe import Recipe

SAMPLED = 256  # pictures in the fingerprint of a corpus


def taught(faces: AlignedFaces, recipe: Recipe, device: torch.device, cache: Path) -> AlignedFaces:
    """The same faces, with intensities whose soft labels are averages of the corpus' and the teachers'.

    With y = min(intensity / full_intensity, 1), logits z_k of the K teachers and the teachers' weight w:

        y' = (1 - w) y + w sigmoid(sum_k z_k / K)

    The teachers predict each picture once, without augmentation.

    Args:
        faces: The training split, with the recipe's action units.
        recipe: Recipe with the teachers.
        device: Device of the teachers.
        cache: Folder of the teachers' predictions, which are computed once.

    Raises:
        ValueError: A teacher lacks one of the action units, or the corpus has no intensities.
    """
    if not recipe.teachers:
        return faces
    if faces.intensities is None:
        raise ValueError("teachers need labels of intensity, which this corpus lacks; set teachers=[].")
    logits = np.mean([_logits(teacher, faces, recipe, device, cache) for teacher in recipe.teachers], axis=0)
    own = np.clip(faces.intensities / recipe.full_intensity, None, 1)
    soft = (1 - recipe.teacher_weight) * own + recipe.teacher_weight / (1 + np.exp(-logits))
    unknown = (faces.occurrence == UNKNOWN) | (faces.intensities == UNKNOWN)
    soft = np.where(unknown, UNKNOWN, recipe.full_intensity * soft)
    return replace(faces, intensities=soft.astype(np.float32))


def _logits(
    teacher: str, faces: AlignedFaces, recipe: Recipe, device: torch.device, cache: Path
) -> np.ndarray:
    """Logits (N, m) of a teacher for all faces."""
    model = AutoModel.from_pretrained(teacher).to(device).eval()
    columns = _columns(teacher, model.config.aus, recipe.aus)
    processor = AutoImageProcessor.from_pretrained(teacher)
    answers = cache / f"teacher-{_fingerprint(model, processor, faces)}.npy"
    lacking = sum_over_processes(torch.tensor(float(not answers.is_file()), device=device))
    if lacking == 0:  # else all processes predict, each its share
        return np.load(answers)[:, columns]
    known = replace(faces, aus=tuple(model.config.aus))  # with the teacher's number of scores
    scores = predict_scores(model, processor, known, recipe.eval_batch_size)
    scores = scores.astype(np.float64).clip(1e-7, 1 - 1e-7)
    logits = np.log(scores / (1 - scores))
    _save(answers, logits)
    return logits[:, columns]


def _fingerprint(model: nn.Module, processor: BaseImageProcessor, faces: AlignedFaces) -> str:
    """Hash of weights, processor and faces (with some of their pictures)."""
    digest = hashlib.sha256(f"{model.config.to_json_string()}{processor.to_json_string()}".encode())
    some = faces.rows[:: max(len(faces) // SAMPLED, 1)]
    arrays = (faces.rows, faces.alignments, faces.landmarks, faces.pictures[some])
    for values in (*model.state_dict().values(), *map(torch.from_numpy, arrays)):
        digest.update(values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _save(path: Path, array: np.ndarray) -> None:
    """Save under a temporary name first, as several processes may write the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        np.save(file, array)
    partial.replace(path)


def _columns(teacher: str, known: Sequence[int], wanted: Sequence[int]) -> list[int]:
    if missing := [au_label(au) for au in wanted if au not in known]:
        raise ValueError(f"the teacher {teacher} does not predict {missing}; leave it or them out.")
    return [list(known).index(au) for au in wanted]
