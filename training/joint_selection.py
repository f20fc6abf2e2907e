"""Select the epoch after which the combined predictions of an ensemble's networks are best.

ESCDA's paper trains LSC and GDA side by side and takes "the best average predictions" (Sec. 4.1.2). Here they
are trained one after the other, so all epochs are kept until both are trained: weights in NETWORK/epoch-0001
and so on, and predictions on the monitored split beside them.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
from accelerate import Accelerator

from actionunits.data import AlignedFaces
from actionunits.metrics import au_report
from network_training import RunLog, epoch_folder, epoch_scores, replace_folder, watched_split
from recipe import Recipe


def keep_best_together(
    recipe: Recipe, splits: dict[str, AlignedFaces], output: Path, accelerator: Accelerator, log: RunLog
) -> None:
    """Copy the weights of the selected epoch into each network's `model`, and remove all epochs."""
    if accelerator.is_main_process:
        folders = [output / name for name in recipe.networks]
        if not all((folder / "model" / "config.json").is_file() for folder in folders):
            figures = figures_together(recipe, splits[watched_split(recipe)], folders)
            best = 1 + int(np.argmax(figures))
            log.write("together", figures=figures, selected_epoch=best)
            for folder in folders:
                log.write("trained", network=folder.name, selected_epoch=best)
                shutil.copytree(folder / epoch_folder(best), folder / "model.partial", dirs_exist_ok=True)
                replace_folder(folder / "model.partial", folder / "model")
        for folder in folders:
            for scores in folder.glob("epoch-*.npy"):
                os.remove(scores)
            for weights in folder.glob("epoch-*"):
                shutil.rmtree(weights)
    accelerator.wait_for_everyone()


def figures_together(recipe: Recipe, faces: AlignedFaces, folders: list[Path]) -> list[float]:
    """The selection metric of the networks' combined predictions after each epoch."""
    combine = {"average": np.mean, "voting": np.max}[recipe.ensemble]
    figures = []
    for epoch in range(1, recipe.epochs + 1):
        scores = combine([np.load(folder / epoch_scores(epoch)) for folder in folders], axis=0)
        report = au_report(faces.aus, scores, faces.occurrence, faces.intensities)
        figures.append(report["mean"].get(recipe.selection_metric) or 0.0)  # undefined ones are None
    return figures
