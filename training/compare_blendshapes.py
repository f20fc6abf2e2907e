"""Compare MediaPipe's blendshapes with a model's scores on the coded faces of check_real_photos.py.

    pip install "actionunits[mediapipe,synthesize]"
    python training/compare_blendshapes.py --archives ARCHIVES --task face_landmarker.task [--model MODEL]

MediaPipe's network was trained on real faces, so its figures show how hard these faces are. For every action
unit with a blendshape, the table has the AUC of both against the codes, where two faces or more show it, and
their rank correlation over all faces, which needs no codes. `cheekSquint` and `noseSneer` are 0 on almost any
face, so AU 6 and 9 have no row. `face_landmarker.task` is on MediaPipe's model page.
"""

from __future__ import annotations

import argparse
import csv
import weakref
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.stats import spearmanr
from tqdm import tqdm
from transformers import pipeline

import actionunits  # noqa: F401  (registers the pipeline)
from actionunits.action_units import au_label
from check_real_photos import CODES, au_figures, face_at, pictures

MARGIN = 0.5  # of the box's width and height, on each side
BLENDSHAPES = {  # the score of an action unit is the mean of these
    1: ("browInnerUp",),
    2: ("browOuterUpLeft", "browOuterUpRight"),
    4: ("browDownLeft", "browDownRight"),
    5: ("eyeWideLeft", "eyeWideRight"),
    7: ("eyeSquintLeft", "eyeSquintRight"),
    10: ("mouthUpperUpLeft", "mouthUpperUpRight"),
    12: ("mouthSmileLeft", "mouthSmileRight"),
    14: ("mouthDimpleLeft", "mouthDimpleRight"),
    15: ("mouthFrownLeft", "mouthFrownRight"),
    17: ("mouthShrugLower",),
    20: ("mouthStretchLeft", "mouthStretchRight"),
    24: ("mouthPressLeft", "mouthPressRight"),
    25: ("mouthLowerDownLeft", "mouthLowerDownRight", "mouthUpperUpLeft", "mouthUpperUpRight", "jawOpen"),
    26: ("jawOpen",),
}


def main() -> None:
    """Compare and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--archives", type=Path, required=True, help="folder of the downloaded packages")
    parser.add_argument("--task", type=Path, required=True, help="MediaPipe's face_landmarker.task")
    parser.add_argument("--model", help="model folder or Hub name (default: the pipeline's own)")
    args = parser.parse_args()
    detect = pipeline("au-detection", model=args.model)  # type: ignore[call-overload]
    mediapipe = Blendshapes(args.task)
    rows, answers = [], []
    coded = list(csv.DictReader(CODES.open(newline="")))
    for row, picture in tqdm(pictures(coded, args.archives), "coded", len(coded)):
        face = face_at(detect, picture, row)
        shapes = face and mediapipe(picture, face["box"])
        if face and shapes:
            rows.append(row)
            answers.append(([au["score"] for au in face["action_units"]], shapes))
    print(f"\n{len(rows)} of {len(coded)} coded faces are found by both\n")
    print_table(compare(rows, answers, detect.model.config.aus))


def compare(rows: list[dict], answers: list[tuple[list[float], dict[str, float]]], aus: list[int]) -> dict:
    """Figures of each action unit of `BLENDSHAPES` that the model answers for.

    Args:
        rows: N codes.
        answers: N scores of the model, in the order of `aus`, and blendshapes by name.
        aus: FACS numbers.

    Returns:
        By label: how many faces show it, both AUCs (None for fewer than two of either kind), and the rank
        correlation over all faces, coded or not.
    """
    table = {}
    for au in BLENDSHAPES.keys() & set(aus):
        ours = np.array([scores[aus.index(au)] for scores, _ in answers])
        theirs = np.array([np.mean([shapes[name] for name in BLENDSHAPES[au]]) for _, shapes in answers])
        sure = np.array([str(au) not in row["unsure"].split() for row in rows])
        present = np.array([str(au) in row["present"].split() for row in rows])[sure]
        auc = [au_figures(present, scores[sure], scores[sure] > 0.5)["auc"] for scores in (theirs, ours)]
        table[au] = {
            "present": int(present.sum()),
            "of": len(present),
            "blendshapes": auc[0],
            "model": auc[1],
            "correlation": float(spearmanr(ours, theirs).statistic),
        }
    return {au_label(au): table[au] for au in sorted(table)}


def print_table(figures: dict) -> None:
    """Print the figures as Markdown."""
    print("| AU | present | AUC, blendshapes | AUC, model | rank correlation |\n|---|---|---|---|---|")
    for label, row in figures.items():
        auc = " | ".join("-" if row[k] is None else f"{row[k]:.2f}" for k in ("blendshapes", "model"))
        print(f"| {label} | {row['present']} of {row['of']} | {auc} | {row['correlation']:.2f} |")
    print(f"\nmean rank correlation {np.mean([row['correlation'] for row in figures.values()]):.2f}")


class Blendshapes:
    """MediaPipe's Face Landmarker on one face of a picture at a time."""

    def __init__(self, task: Path):
        import mediapipe

        tasks = mediapipe.tasks
        options = tasks.vision.FaceLandmarkerOptions(
            base_options=tasks.BaseOptions(model_asset_buffer=task.read_bytes()),
            min_face_detection_confidence=0.3,
            min_face_presence_confidence=0.3,
            output_face_blendshapes=True,
        )
        self._landmarker = tasks.vision.FaceLandmarker.create_from_options(options)
        weakref.finalize(self, self._landmarker.close)  # left to itself it fails noisily when Python ends
        self._to_image = lambda pixels: mediapipe.Image(image_format=mediapipe.ImageFormat.SRGB, data=pixels)

    def __call__(self, picture: Image.Image, box: dict[str, float]) -> dict[str, float] | None:
        """Blendshapes in [0, 1] by name, of the face in a box [pixels]; None where none is found."""
        left, top, right, bottom = (box[side] for side in ("xmin", "ymin", "xmax", "ymax"))
        across, down = MARGIN * (right - left), MARGIN * (bottom - top)
        around = (left - across, top - down, right + across, bottom + down)
        cut = picture.crop(tuple(round(v) for v in around))
        found = self._landmarker.detect(self._to_image(np.ascontiguousarray(cut))).face_blendshapes
        return {shape.category_name: shape.score for shape in found[0]} if found else None


if __name__ == "__main__":
    main()
