"""Base classes of the corpora: facts, folder layout, reader, check and a tiny imitation for tests.

Each corpus is a class with its citation, licence, published counts, layout and traps, and a reader that
yields `Recording`s: frame numbers, label codes, pictures and landmarks as distributed. The base class does
what all corpora share: it converts codes to labels, selects frames and counts them.

Landmarks are (x, y) in pixels of the picture; the origin is the centre of the upper left pixel.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from actionunits.action_units import UNKNOWN, check_aus
from actionunits.data.corpora.reading import find_files, read_frame_list
from actionunits.files import file_version

logger = logging.getLogger(__name__)

UNKNOWN_CODES = (9, 999, UNKNOWN)
"""Codes of an action unit that was not coded: 9 in FACS, 999 in some lists, -1 in Aff-Wild2."""


class WrongCorpusError(FileNotFoundError):
    """The folder does not hold the corpus; the message says what was expected."""


@dataclass(frozen=True)
class Recording:
    """Labelled frames of one subject, as distributed.

    Attributes:
        subject: Name of the subject.
        sequence: Task, clip or video; subject, sequence and frame number identify a frame.
        frames: (n,) numbers of the labelled frames, as the corpus counts them.
        codes: (n, m) label codes, as in the label files.
        pictures: Picture files by frame number; some may be missing.
        landmarks: Reads landmarks (L, 2) by frame number. It appends problems with a file to the list that is
            passed, and returns no landmarks of its frames.
        split: Split of the official partition, "" where the corpus has none.
        source: The label file, for messages.
    """

    subject: str
    sequence: str
    frames: np.ndarray
    codes: np.ndarray
    pictures: dict[int, Path]
    landmarks: Callable[[list[str]], dict[int, np.ndarray]] = lambda problems: {}
    split: str = ""
    source: str = ""


@dataclass(frozen=True)
class Selection:
    """Frames and labels to be read from a corpus.

    Attributes:
        aus: FACS numbers of the m label columns.
        frames: "all" coded frames, the name of a published frame list, or the file of such a list.
        min_intensity: Intensity (1 to 5) from which on an action unit counts as occurring.
    """

    aus: tuple[int, ...]
    frames: str = "all"
    min_intensity: int = 2

    def __post_init__(self) -> None:
        """Check the range of the intensity."""
        if not 1 <= self.min_intensity <= 5:
            raise ValueError(f"min_intensity={self.min_intensity} must lie between 1 and 5.")


@dataclass(frozen=True)
class Published:
    """Published counts of a frame list, rounded if `about`."""

    subjects: int | None = None
    frames: int | None = None
    source: str = ""
    about: bool = False


@dataclass
class CheckReport:
    """Result of checking a folder of a corpus.

    Attributes:
        corpus: Name of the corpus.
        folder: The folder.
        found: Counts by what was counted.
        published: Published counts beside those found, by frame list.
        problems: Descriptions of what is missing or wrong.
        has: Available of the needs of tables' rows: "pictures", "landmarks", "split", "folds", frame lists.
        rows: Rows of the papers' tables, with `runnable` and what each `lacks`.
    """

    corpus: str
    folder: str
    found: dict[str, int] = field(default_factory=dict)
    published: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    has: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def usable(self) -> bool:
        """Whether there is any data to train or test on."""
        return self.found.get("usable", 0) > 0

    @property
    def complete(self) -> bool:
        """Whether nothing is missing and a published count, if any, is matched (rounded ones to 2 %)."""
        met = [_meets(counts) for counts in self.published.values()]
        return self.usable and not self.problems and (any(met) or not met)

    def to_dict(self) -> dict[str, Any]:
        """The report as a JSON-ready dictionary."""
        return asdict(self)


def _folders_and_points(root: Path) -> Iterator[str]:
    """A folder, all folders below it, following links, each once, and the MATLAB files in them."""
    seen: set[str] = set()
    for folder, inner, files in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            inner.clear()
            continue
        seen.add(real)
        yield folder
        yield from (os.path.join(folder, name) for name in files if name.endswith(".mat"))


def _meets(counts: dict[str, Any]) -> bool:
    if counts["found_frames"] is None or counts["found_subjects"] != counts["subjects"]:
        return False
    tolerance = 0.02 * counts["frames"] if counts["about"] else 0
    return abs(counts["found_frames"] - counts["frames"]) <= tolerance


class Corpus(ABC):
    """A corpus: facts as class attributes, its reader as methods."""

    name: ClassVar[str]
    title: ClassVar[str]
    homepage: ClassVar[str]
    licence: ClassVar[str]
    citation: ClassVar[str]
    layout: ClassVar[str]
    traps: ClassVar[tuple[str, ...]] = ()
    published: ClassVar[dict[str, Published]] = {}
    subjects: ClassVar[bool] = True  # whether rows name their subjects

    @abstractmethod
    def recognize(self, root: Path) -> None:
        """Raise `WrongCorpusError` unless the folder looks like this corpus."""

    @abstractmethod
    def rows(self, root: Path, selection: Selection) -> Iterator[dict[str, Any]]:
        """Samples as dictionaries of `features`."""

    @abstractmethod
    def features(self, selection: Selection) -> Any:
        """The `datasets.Features` of `rows`."""

    @abstractmethod
    def check(self, root: Path, folds_file: str | Path | None = None) -> CheckReport:
        """Count what the folder holds and compare with the published counts.

        Args:
            root: The corpus' folder.
            folds_file: Folds that are not built in.

        Raises:
            WrongCorpusError: The folder holds something else.
        """

    @abstractmethod
    def write_tiny(self, root: Path) -> None:
        """Write a few drawn faces in the corpus' layout."""

    @abstractmethod
    def label_files(self, root: Path) -> list[Path]:
        """Label files; if one changes, the cached rows are out of date."""

    def picture_folders(self, root: Path) -> list[Path]:
        """Folders of pictures; if one changes, the cached rows are out of date."""
        return []

    def select(self, root: Path, aus: Sequence[int] | None = None, **options: Any) -> Selection:
        """A selection; by default without action units."""
        return Selection(tuple(check_aus(aus)) if aus is not None else (), **options)

    def fingerprint(self, root: Path, frames: str = "all") -> str:
        """Hash of the names, sizes and times of label files, folders of pictures and a frame list's file."""
        own_list = [Path(frames)] if frames != "all" and Path(frames).is_file() else []
        files = [*self.label_files(root), *self.picture_folders(root), *own_list]
        stats = [(os.path.relpath(p, root), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
        return hashlib.sha256(json.dumps(sorted(stats)).encode()).hexdigest()[:16]

    def require(self, root: Path, found: Any, wanted: str) -> None:
        """Raise `WrongCorpusError` where `found` is empty."""
        if not root.is_dir():
            raise WrongCorpusError(f"{root} is not a folder; it should hold {self.title}.")
        if not found:
            inside = sorted(p.name for p in root.iterdir())[:8] or "nothing"
            raise WrongCorpusError(
                f"{root} does not hold {self.title}: there is no {wanted}. It holds {inside}. "
                f"`actionunits corpus layout {self.name}` shows what is expected."
            )


class AUCorpus(Corpus):
    """A corpus of frames with action unit labels."""

    aus: ClassVar[tuple[int, ...]]
    scheme: ClassVar[str] = "ibug68"  # of the distributed landmarks
    coding: ClassVar[str] = "occurrence"  # or "intensity", 0 to 5
    official_split: ClassVar[bool] = False
    frame_lists: ClassVar[dict[str, str]] = {}  # name -> glob below the folder
    first_in_list: ClassVar[int] = 1  # a frame list's number of the corpus' frame 1

    @abstractmethod
    def recordings(self, root: Path, aus: Sequence[int]) -> Iterator[Recording]:
        """All labelled recordings, in a fixed order."""

    def group_of(self, subject: str) -> dict[str, str]:
        """Attributes of a subject, such as "sex"."""
        return {}

    def evaluated_aus(self, root: Path) -> tuple[int, ...]:
        """The action units that the literature evaluates, in output order."""
        return self.aus

    def select(self, root: Path, aus: Sequence[int] | None = None, **options: Any) -> Selection:
        """A selection; by default with the action units that the literature evaluates."""
        return Selection(tuple(check_aus(self.evaluated_aus(root) if aus is None else aus)), **options)

    def features(self, selection: Selection) -> Any:
        """Path of the picture, landmarks, labels, and origin of the frame."""
        from datasets import Features, Image, List, Value

        m = len(selection.aus)
        features = {
            "image": Image(),
            "landmarks": List(List(Value("float32"), length=2)),  # empty where there are none
            "occurrence": List(Value("int8"), length=m),
            "intensities": List(Value("float32")),  # 0 to 1, empty where only occurrence is coded
            "subject": Value("string"),
            "sequence": Value("string"),
            "frame": Value("int32"),
            "split": Value("string"),
        }
        return Features(features | {name: Value("string") for name in self.group_of("F001")})

    def fingerprint(self, root: Path, frames: str = "all") -> str:
        """Hash of labels, frame lists, landmarks, and folders, which change with their pictures."""
        files = find_files(root / "landmarks", "*.csv")
        files += [file for glob in self.frame_lists.values() for file in root.glob(glob)]
        stats = sorted(map(file_version, [*map(str, files), *_folders_and_points(root)]))
        seen = super().fingerprint(root, frames) + repr(stats)
        return hashlib.sha256(seen.encode()).hexdigest()[:16]

    def rows(self, root: Path, selection: Selection) -> Iterator[dict[str, Any]]:
        """Frames with a picture and a label of at least one selected AU, as dictionaries."""
        listed = self.listed_frames(root, selection.frames)
        found, without_picture, broken = 0, 0, list[str]()
        for recording in self.recordings(root, selection.aus):
            occurrence, intensities = self.labels(recording, selection.min_intensity)
            points = recording.landmarks(broken)
            for i in self.chosen(recording, occurrence, listed):
                frame = int(recording.frames[i])
                if frame not in recording.pictures:
                    without_picture += 1
                    continue
                found += 1
                yield {
                    "image": str(recording.pictures[frame]),
                    "landmarks": points.get(frame, np.empty((0, 2))).tolist(),
                    "occurrence": occurrence[i].tolist(),
                    "intensities": [] if intensities is None else intensities[i].tolist(),
                    "subject": recording.subject,
                    "sequence": recording.sequence,
                    "frame": frame,
                    "split": recording.split,
                    **self.group_of(recording.subject),
                }
        if without_picture:
            logger.warning("%s: left out %d labelled frames without a picture", self.name, without_picture)
        if not found:
            raise ValueError(
                f"{root}: no frame can be used; of the frames {selection.frames!r}, {without_picture} are "
                f"labelled and lack a picture. See `actionunits corpus check {self.name}`."
            )
        if broken:
            logger.warning("%s: %d broken landmark files; the first: %s", self.name, len(broken), broken[0])

    def labels(self, recording: Recording, min_intensity: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Occurrence (n, m) int8 and intensities (n, m) in [0, 1] or None, both with `UNKNOWN`.

        Raises:
            ValueError: A code is invalid.
        """
        codes = recording.codes
        unknown = np.isin(codes, UNKNOWN_CODES)
        highest = 5 if self.coding == "intensity" else 1
        if (strange := ~unknown & ~np.isin(codes, range(highest + 1))).any():
            raise ValueError(
                f"{recording.source} holds the label {codes[strange][0]}; {self.title} has 0 to {highest}, "
                f"and {list(UNKNOWN_CODES)} for unknown."
            )
        if self.coding == "occurrence":
            return np.where(unknown, UNKNOWN, codes).astype(np.int8), None
        occurrence = np.where(unknown, UNKNOWN, codes >= min_intensity).astype(np.int8)
        return occurrence, np.where(unknown, UNKNOWN, codes / 5).astype(np.float32)

    def listed_frames(self, root: Path, frames: str) -> set[tuple[str, str, int]] | None:
        """The (subject, sequence, frame) of a frame list; None for "all".

        Raises:
            FileNotFoundError: There is no such list, or its files are missing.
        """
        if frames == "all":
            return None
        if frames in self.frame_lists:
            files = sorted(root.glob(self.frame_lists[frames]))
            advice = f"copy its files to {root / self.frame_lists[frames]}"
        else:
            files = [Path(frames)] if Path(frames).is_file() else []
            advice = f"pass a file, or one of {['all', *self.frame_lists]}"
        if not files:
            raise FileNotFoundError(f"{self.title} has no frame list {frames!r} here; {advice}.")
        offset = 1 - self.first_in_list
        return {(*key, frame + offset) for file in files for *key, frame in read_frame_list(file)}  # type: ignore[misc]

    @staticmethod
    def chosen(recording: Recording, occurrence: np.ndarray, listed: set | None) -> np.ndarray:
        """Indices of the listed frames; without a list, of those with any known label."""
        if listed is None:
            return np.flatnonzero((occurrence != UNKNOWN).any(axis=1))
        keys = ((recording.subject, recording.sequence, int(f)) for f in recording.frames)
        return np.flatnonzero([key in listed for key in keys])

    def check(self, root: Path, folds_file: str | Path | None = None) -> CheckReport:
        """Count subjects, recordings, frames, pictures and landmarks; open three pictures per recording."""
        from actionunits.data.corpora.checking import check_frames

        self.recognize(Path(root))
        return check_frames(self, Path(root), folds_file)
