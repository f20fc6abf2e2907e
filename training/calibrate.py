"""Recalibrate the thresholds of trained models on renderings and neutral photographs, and evaluate again.

    python training/calibrate.py MODEL [MODEL ...] --data CORPUS --photos FACES

Three steps lead from renderings to photographs. First, on the renderings of the validation people, each
action unit gets the threshold with the best F1 that keeps false alarms within the recipe's
`max_false_alarms`. Second, if neutral photographs score lower than neutral renderings, the threshold is
lowered by the difference of the median logits, but at most by `LARGEST_SHIFT`: a network that is surer of
neutral faces is not less sure of others. Third, it is raised until at most `max_false_alarms` of the neutral
photographs fire, and `SMILE_SHARE` times that share of the rendered smiles, since smiles are more frequent in
photo collections than in the corpus. All photographs go through the whole pipeline: detector, alignment,
network.

The photographs are those of the training and validation people from which the renderings are made; those of
the test people are left to check_real_photos.py. No label of a real face is used but that these are neutral.
Weights are not changed; `config.json`, `metrics.json`, `run.json` and the card are rewritten.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from scipy.special import expit
from scipy.special import logit as unbounded_logit
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoModel, pipeline

import actionunits  # noqa: F401  (registers the models and the task)
from actionunits.action_units import au_label
from actionunits.data import AlignedFaces, prepare_synthetic
from actionunits.data.synthetic import read_manifest
from actionunits.evaluation import evaluation_report, predict_scores
from actionunits.files import whole_file
from actionunits.metrics import calibrate_thresholds
from actionunits.model_card import write_card
from actionunits.synthesis.corpus import people_by_split
from actionunits.synthesis.person import read_people

SMILE = 12  # lip corner puller
NEUTRAL = 0.1  # largest intensity of any action unit in a neutral rendering
ENOUGH = 20  # smallest sample of faces
LARGEST_SHIFT = 0.7  # logits; see training/SYNTHETIC.md, section 12
SMILE_SHARE = 3  # times max_false_alarms; see section 13
TEMPLATE = Path(__file__).parents[1] / "model_cards" / "template.md"


def main() -> None:
    """Calibrate every model of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", type=Path, help="folders that train.py wrote")
    parser.add_argument("--data", required=True, help="the synthetic corpus they were trained on")
    parser.add_argument("--photos", type=Path, required=True, help="folder of the photographs and people.csv")
    parser.add_argument("--cache", type=Path, help="decoded pictures (default: MODEL/../prepared)")
    args = parser.parse_args()
    for folder in args.models:
        cache = args.cache or folder.parent / "prepared"
        faces = {split: prepare_synthetic(args.data, split, cache) for split in ("validation", "test")}
        calibrate(folder, faces, neutral_photographs(args.photos, read_manifest(args.data)))


def calibrate(folder: Path, faces: dict[str, AlignedFaces], photographs: list[Path]) -> None:
    """Choose thresholds, evaluate, and rewrite the files of a model folder except the weights."""
    config, run = (json.loads((folder / name).read_text()) for name in ("config.json", "run.json"))
    model = AutoModel.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    faces = {split: rows.with_aus(model.config.aus) for split, rows in faces.items()}
    scores = {split: predict_scores(model, processor, rows) for split, rows in faces.items()}

    neutral = photograph_scores(folder, photographs)
    thresholds, how = choose_thresholds(
        scores["validation"], faces["validation"], neutral, run["recipe"]["max_false_alarms"]
    )
    about = {"thresholds_from": "the validation people", "epoch_selection": run["recipe"]["epoch_selection"]}
    config["au_thresholds"] = thresholds
    run["neutral_photographs"] = {"photographs": len(photographs), "found": len(neutral), **how}
    reports = {
        split: evaluation_report(scores[split], rows, thresholds, split, about)
        for split, rows in faces.items()
    }
    for name, content in (("config", config), ("metrics", reports), ("run", run)):  # which tells the end
        with whole_file(folder / f"{name}.json") as part:
            text = json.dumps(content, indent=2 if name == "config" else 1)
            part.write_text(text + "\n", encoding="utf-8")
    write_card(folder, TEMPLATE)
    raised = ", ".join(run["neutral_photographs"]["raised"]) or "no action unit"
    print(f"{folder}: {len(neutral)} photographs raised the thresholds of {raised}")


def choose_thresholds(
    scores: np.ndarray, faces: AlignedFaces, neutral: np.ndarray, limit: float
) -> tuple[list[float], dict[str, Any]]:
    """Choose thresholds in three steps, see above.

    Args:
        scores: Scores of the renderings of validation people, (N, m).
        faces: These renderings.
        neutral: Scores of neutral photographs, (F, m).
        limit: Largest share of false alarms.

    Returns:
        m thresholds, and for `run.json` the shift of each in logits and which were raised at last.
    """
    shift = neutral_shift(neutral, scores, faces)
    moved = expit(logit(calibrate_thresholds(scores, faces.occurrence, limit)) + shift)
    moved = np.maximum(moved, smile_thresholds(scores, faces, SMILE_SHARE * limit))
    thresholds = np.maximum(moved, lowest_thresholds(neutral, limit))
    labels = [au_label(au) for au in faces.aus]
    return thresholds.tolist(), {
        "shift": dict(zip(labels, shift.round(3).tolist(), strict=True)),
        "raised": [au for au, new, old in zip(labels, thresholds, moved, strict=True) if new > old],
    }


def neutral_photographs(folder: Path, manifest: Mapping[str, Any] = MappingProxyType({})) -> list[Path]:
    """The photographs of the training and validation people of a corpus with this manifest."""
    people = read_people(folder)
    splits = people_by_split(manifest, [row["name"] for row in people])
    return [row["picture"] for row in people if row["name"] not in splits["test"]]


def photograph_scores(folder: Path, photographs: list[Path]) -> np.ndarray:
    """Scores (F, m) of the largest face of each photograph in which one is found."""
    detect = pipeline("au-detection", model=str(folder))  # type: ignore[call-overload]
    found = [detect(str(photograph)) for photograph in tqdm(photographs, "photographs", disable=None)]
    if not any(found):
        raise ValueError(f"No face was found on {len(photographs)} photographs; look at --photos.")
    return np.array([[au["score"] for au in faces[0]["action_units"]] for faces in found if faces])


def smile_thresholds(scores: np.ndarray, faces: AlignedFaces, max_false_alarms: float) -> np.ndarray:
    """The lowest thresholds (m,) at which at most that share of the smiles without the action unit fires.

    They are 0 for AU 12 itself, and for action units that almost all smiles have.
    """
    thresholds = np.zeros(len(faces.aus))
    if SMILE not in faces.aus:
        return thresholds
    smiling = faces.occurrence[:, list(faces.aus).index(SMILE)] == 1
    for i in range(len(faces.aus)):
        others = scores[smiling & (faces.occurrence[:, i] == 0), i]
        if len(others) >= ENOUGH:
            thresholds[i] = lowest_thresholds(others[:, None], max_false_alarms)[0]
    return thresholds


def neutral_shift(photographs: np.ndarray, renderings: np.ndarray, faces: AlignedFaces) -> np.ndarray:
    """Shift (m,) of the thresholds from renderings to photographs in logits, 0 or negative.

    It is the difference of the medians of neutral photographs (F, m) and of the neutral of the renderings
    (N, m), limited to `LARGEST_SHIFT`. Where photographs score higher, a later step raises the thresholds.
    There is no shift where either are too few.
    """
    if faces.intensities is None:
        return np.zeros(len(faces.aus))
    neutral = renderings[faces.intensities.max(axis=1) <= NEUTRAL]
    if min(len(neutral), len(photographs)) < ENOUGH:
        return np.zeros(len(faces.aus))
    difference = np.median(logit(photographs), axis=0) - np.median(logit(neutral), axis=0)
    return np.clip(difference, -LARGEST_SHIFT, 0)


def lowest_thresholds(scores: np.ndarray, max_false_alarms: float) -> np.ndarray:
    """The lowest thresholds (m,) at which at most that share of the scores (F, m) of neutral faces fires.

    Scores equal to a threshold fire, so each lies half way to the next score above, or to 1; it is 0 where
    all may fire.
    """
    allowed = int(max_false_alarms * len(scores))
    if allowed >= len(scores):
        return np.zeros(scores.shape[1])
    highest = np.sort(scores, axis=0)[-1 - allowed]  # of those that must not fire
    return (highest + np.where(scores > highest, scores, 1).min(axis=0)) / 2


def logit(scores: np.ndarray) -> np.ndarray:
    """Logits of scores, finite also at 0 and 1."""
    return unbounded_logit(np.clip(scores, 1e-7, 1 - 1e-7))


if __name__ == "__main__":
    main()
