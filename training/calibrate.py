"""Choose the thresholds of trained models anew, on renderings and on neutral photographs, and measure again.

    python training/calibrate.py MODEL [MODEL ...] --data CORPUS --photos FACES

Renderings are not photographs, so a threshold that is right for them may report action units on real faces
that do nothing. The photographs of which the renderings are made (see synthesize.py) are neutral: of those of
the training and validation people, too, no more than `max_false_alarms` of the recipe may be reported,
through the whole path of a picture: detector, alignment, network. Thresholds are raised where it takes that,
never lowered. Those of the test people are left to check_real_photos.py. Weights stay as they are;
`config.json`, `metrics.json`, `run.json` and the card are written anew.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoModel, pipeline

import actionunits  # noqa: F401  (registers the models and the task)
from actionunits.action_units import au_label
from actionunits.data import AlignedFaces, prepare_synthetic
from actionunits.evaluation import evaluation_report, predict_scores
from actionunits.metrics import calibrate_thresholds
from actionunits.model_card import write_card
from actionunits.synthesis.corpus import split_people
from actionunits.synthesis.person import read_people

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
        calibrate(folder, faces, neutral_photographs(args.photos))


def calibrate(folder: Path, faces: dict[str, AlignedFaces], photographs: list[Path]) -> None:
    """Choose thresholds, measure, and write the files of a model folder but the weights."""
    config, run = (json.loads((folder / name).read_text()) for name in ("config.json", "run.json"))
    model = AutoModel.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    faces = {split: rows.with_aus(model.config.aus) for split, rows in faces.items()}
    scores = {split: predict_scores(model, processor, rows) for split, rows in faces.items()}

    limit = run["recipe"]["max_false_alarms"]
    on_renderings = calibrate_thresholds(scores["validation"], faces["validation"].occurrence, limit)
    neutral = photograph_scores(folder, photographs)
    thresholds = np.maximum(on_renderings, lowest_thresholds(neutral, limit)).tolist()

    about = {"thresholds_from": "the validation people", "epoch_selection": run["recipe"]["epoch_selection"]}
    config["au_thresholds"] = thresholds
    run["neutral_photographs"] = {
        "photographs": len(photographs),
        "found": len(neutral),
        "raised": [
            au_label(au)
            for au, new, old in zip(model.config.aus, thresholds, on_renderings, strict=True)
            if new > old
        ],
    }
    reports = {
        split: evaluation_report(scores[split], rows, thresholds, split, about)
        for split, rows in faces.items()
    }
    for name, content in (("config", config), ("run", run), ("metrics", reports)):
        write_json(folder / f"{name}.json", content, indent=2 if name == "config" else 1)
    write_card(folder, TEMPLATE)
    raised = ", ".join(run["neutral_photographs"]["raised"]) or "no action unit"
    print(f"{folder}: {len(neutral)} photographs raised the thresholds of {raised}")


def neutral_photographs(folder: Path) -> list[Path]:
    """The photographs of the people whom training or calibration may see."""
    people = read_people(folder)
    splits = split_people(sorted(row["name"] for row in people))
    return [row["picture"] for row in people if row["name"] not in splits["test"]]


def photograph_scores(folder: Path, photographs: list[Path]) -> np.ndarray:
    """Scores (F, m) of the largest face of each photograph on which one is found."""
    detect = pipeline("au-detection", model=str(folder))  # type: ignore[call-overload]
    found = [detect(str(photograph)) for photograph in tqdm(photographs, "photographs", disable=None)]
    return np.array([[au["score"] for au in faces[0]["action_units"]] for faces in found if faces])


def lowest_thresholds(scores: np.ndarray, max_false_alarms: float) -> np.ndarray:
    """The lowest thresholds (m,) at which at most that share of the scores (F, m) of neutral faces fires.

    A score fires that is not below the threshold, so each lies half way to the next score above, or to 1.
    """
    allowed = int(max_false_alarms * len(scores))
    ordered = np.sort(scores, axis=0)[::-1]  # highest first
    firing = ordered[allowed - 1] if allowed else np.ones(scores.shape[1])
    return (ordered[allowed] + firing) / 2


def write_json(path: Path, content: Any, indent: int) -> None:
    """Write a file under a temporary name, then move it to its place."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=indent) + "\n", encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    main()
