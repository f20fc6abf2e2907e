"""What a training run leaves beside its weights, with invented figures, and a folder fit to publish."""

import json

import numpy as np
import torch

from actionunits import AUImageProcessor, GdaConfig, GdaForAUDetection
from actionunits.data import AlignedFaces
from actionunits.evaluation import evaluation_report
from actionunits.model_card import write_card
from tiny_models import BACKBONE

AUS = (1, 12, 25)
THRESHOLDS = [0.5, 0.6, 0.7]
RECIPE = {
    "name": "toy-model",
    "networks": {
        "gda": {"backbone_from": "", "pretrained": "", "epochs": 0},
        "lsc": {"backbone_from": "gda", "pretrained": "", "epochs": 3},
    },
    "target": "intensity",
    "full_intensity": 0.5,
    "balance_aus": False,
    "geometry": {"input_size": 112},
    "epochs": 6,
    "warmup_epochs": 0.5,
    "batch_size": 64,
    "base_learning_rate": 0.012,
    "weight_decay": 0.05,
    "clip_norm": 3.0,
    "precision": "fp32",
    "epoch_selection": "last",
    "max_false_alarms": 0.1,
    "seed": 0,
}
SPLITS = {
    "train": {"pictures": 40000, "people": 75, "skipped": 0},
    "validation": {"pictures": 3000, "people": 16, "skipped": 0},
    "test": {"pictures": 60, "people": 3, "skipped": 0},
}


def publishable_folder(folder, template, corpus=None):
    """Save a tiny model with its processor, a toy run and the card of both; `corpus` names licensed data."""
    torch.manual_seed(0)
    model = GdaForAUDetection(GdaConfig.compact(**BACKBONE, aus=list(AUS), au_thresholds=THRESHOLDS))
    model.save_pretrained(folder)
    AUImageProcessor(**model.config.processor_options).save_pretrained(folder)
    write_toy_run(folder, "au-gda", corpus)
    write_card(folder, template)
    return folder


def write_toy_run(folder, model_type, corpus=None):
    """Write `run.json` and `metrics.json` of a run on three action units, of which AU25 is not learnt."""
    scores, faces = toy_predictions()
    metrics = {split: evaluation_report(scores, faces, THRESHOLDS, split) for split in ("validation", "test")}
    manifest = {} if corpus else {"generator": "actionunits 0.1.0"}
    run = {
        "recipe": RECIPE,
        "corpus": {"name": corpus, "manifest": manifest, "splits": SPLITS},
        "model_type": model_type,
        "parameters": 2021579,
        "selected_epochs": {"gda": 6, "lsc": 3},
        "device": "cpu",
        "processes": 1,
        "versions": {"python": "3.12.1", "torch": "2.13.0"},
        "finished": "2026-11-20",
    }
    for name, content in (("run", run), ("metrics", metrics)):
        (folder / f"{name}.json").write_text(json.dumps(content))


def toy_predictions():
    """Scores (60, 3) and their faces."""
    rng = np.random.default_rng(0)
    occurrence = (rng.random((60, 3)) < 0.4).astype(np.int8)
    occurrence[:5] = 0
    scores = np.clip(0.5 * occurrence + 0.5 * rng.random((60, 3)), 0, 1)
    scores[:, 2] = rng.random(60)
    return scores, AlignedFaces(
        pictures=np.zeros((0, 1, 1, 3), np.uint8),
        rows=np.arange(60),
        landmarks=np.zeros((60, 68, 2)),
        alignments=np.zeros((60, 2, 3)),
        aligned_size=200,
        scheme="ibug68",
        aus=AUS,
        occurrence=occurrence,
        intensities=occurrence * rng.random((60, 3)),
        people=np.repeat(["a", "b", "c"], 20),
        groups={"sex": np.repeat(["f", "m", "f"], 20)},
    )
