"""GFT, the Sayette Group Formation Task: 96 subjects in groups of three; has an official partition."""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from actionunits.action_units import CORPUS_AUS
from actionunits.data.corpora import tiny
from actionunits.data.corpora.base import AUCorpus, Published, Recording
from actionunits.data.corpora.reading import (
    find_files,
    first_folder,
    index_pictures,
    naming,
    read_au_table,
    read_landmarks,
)
from actionunits.landmarks import reduce_landmarks

logger = logging.getLogger(__name__)

LABELS = ("AUs", "AU", "AUCoding", "aucoding", "Annotations", "annotations", ".")
PICTURES = ("Frames", "frames", "Images", "images", ".")
SPLITS = ("train", "test")


class Gft(AUCorpus):
    """GFT (Girard et al., 2017)."""

    name = "gft"
    title = "GFT"
    aus = CORPUS_AUS["gft"]
    scheme = "ibug49"
    official_split = True
    homepage = "https://osf.io/7wcyz/"
    licence = (
        "annotations CC BY 4.0; the videos on application to the University of Pittsburgh (see the homepage)"
    )
    citation = """\
@inproceedings{girard2017gft,
  title = {{Sayette Group Formation Task (GFT)} spontaneous facial expression database},
  author = {Girard, Jeffrey M. and Chu, Wen-Sheng and Jeni, L{\\'a}szl{\\'o} A. and Cohn, Jeffrey F. and
            De la Torre, Fernando and Sayette, Michael A.},
  booktitle = {IEEE International Conference on Automatic Face and Gesture Recognition},
  pages = {581--588}, year = {2017}
}"""
    layout = """\
GFT/
  AUs/Train/001A.csv ...      one file a person; the first column is the frame number, the others are named
  AUs/Test/003B.csv ...       by action unit; the folders' names say the official partition
  split.csv                   instead of the folders Train and Test: subject, split
  Videos/001A.mp4 ...         the videos; `actionunits corpus extract gft DIR` makes
  Frames/001A/00001.jpg ...   pictures by frame number, from 1
  landmarks/001A.csv ...      frame, x0, y0, ... of 49 points (or any scheme; optional)"""
    traps = (
        "The partition (78 and 18 people) is read from your files: no public code lists it.",
        "We have not seen an original copy. The reader expects a CSV file per subject in folders whose names "
        "begin with train and test; rearrange or link yours if they differ.",
        "Videos are long: only coded frames (not 9, 999 or -1) become rows.",
    )
    published = {
        "all": Published(
            96, 132_600, "AC2D Sec. 4.1.1: 108,000 frames of 78 people, 24,600 of 18", about=True
        ),
    }
    videos = "Videos/*.mp4"
    tiny_subjects = {"001A": "Train", "001B": "Train", "002C": "Train", "003A": "Test", "004B": "Test"}

    def recognize(self, root: Path) -> None:
        """Raise `WrongCorpusError` unless there are label files in Train and Test, or a split.csv."""
        files = self._files(root)
        self.require(root, files, "AUs/Train/*.csv and AUs/Test/*.csv, nor a split.csv with AUs/*.csv")

    def label_files(self, root: Path) -> list[Path]:
        """The CSV files, in order, and that of the partition if there is one."""
        split = root / "split.csv"
        return [path for path, _ in self._files(root)] + ([split] if split.is_file() else [])

    def recordings(self, root: Path, aus: Sequence[int]) -> Iterator[Recording]:
        """One recording per subject."""
        for path, split in self._files(root):
            subject = path.stem
            frames, codes = read_au_table(path, aus)
            candidates = (index_pictures(root / name / subject) for name in PICTURES)
            yield Recording(
                subject=subject,
                sequence="",
                frames=frames,
                codes=codes,
                pictures=next((pictures for pictures in candidates if pictures), {}),
                landmarks=lambda problems, subject=subject: read_landmarks(root, subject, problems),  # type: ignore[misc]
                split=split,
                source=str(path),
            )

    def video_folder(self, video: Path) -> str:
        """The folder below Frames for a video's pictures."""
        return video.stem

    def write_tiny(self, root: Path) -> None:
        """Write six frames of each of five subjects, one of them not coded."""
        for subject, split in self.tiny_subjects.items():
            codes = tiny.codes(6, subject)
            codes[0] = -1
            rows = [[frame, *(codes[frame - 1, au] for au in self.aus)] for frame in range(1, 7)]
            tiny.write_table(
                root / "AUs" / split / f"{subject}.csv", ["frame", *(f"AU{au}" for au in self.aus)], rows
            )
            points = {
                frame: tiny.draw_face(root / "Frames" / subject / f"{frame:05d}.jpg", subject, frame)
                for frame in range(1, 7)
            }
            reduced = {frame: reduce_landmarks(p, "ibug68", "ibug49") for frame, p in points.items()}
            tiny.write_landmarks(root, subject, reduced)

    def _files(self, root: Path) -> list[tuple[Path, str]]:
        """Label files with their official split."""
        labels = first_folder(root, LABELS)
        if labels is None:
            return []
        if (root / "split.csv").is_file():
            files, splits = find_files(labels, "*.csv"), read_split(root / "split.csv")
            if unlisted := [path.stem for path in files if path.stem not in splits]:
                logger.warning("%s does not list %s; they are left out", root / "split.csv", unlisted)
            return [(path, splits[path.stem]) for path in files if path.stem in splits]
        folders = [
            (f, split)
            for split in SPLITS
            for f in sorted(labels.iterdir())
            if f.name.lower().startswith(split)
        ]
        return [(path, split) for folder, split in folders for path in find_files(folder, "*.csv")]


def read_split(path: Path) -> dict[str, str]:
    """Splits in lower case by subject, from a table with the columns subject and split.

    Raises:
        ValueError: A column is missing, or a subject is in two splits.
    """
    with naming(path), path.open(newline="", encoding="utf-8-sig") as file:
        rows = [[cell.strip() for cell in row] for row in csv.reader(file)]
    header = [name.lower() for name in rows[0]] if rows else []
    if not {"subject", "split"} <= set(header):
        raise ValueError(f"{path} has the columns {header}; subject and split are needed.")
    subject, split = header.index("subject"), header.index("split")
    splits: dict[str, str] = {}
    for row in rows[1:]:
        if len(row) > max(subject, split):
            name, part = row[subject], row[split].lower()
            if splits.setdefault(name, part) != part:
                raise ValueError(f"{path} lists {name!r} both in {splits[name]} and in {part}; keep one.")
    return splits
