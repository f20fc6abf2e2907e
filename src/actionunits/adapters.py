"""Evaluate predictions in the CSV files of OpenFace, py-feat, LibreFace and this package like a model's.

The files are read into one form and joined with a table of labels by picture (or video) and frame. A face
that the tool did not find counts as a face without action units, as for the tool's users; reports say how
many there were. `FORMATS` describes the files, as the tools' versions of 2026 write them.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np

from actionunits.action_units import ACTION_UNITS, UNKNOWN, au_label
from actionunits.data.corpora.reading import naming
from actionunits.evaluation import threshold_reports
from actionunits.metrics import calibrate_thresholds

Values = Literal["occurrence", "intensity"]
Key = tuple[tuple[str, ...], int]
"""The parts of a path without its suffix, and the frame's index."""
UNKNOWN_CODES = ("", "-1", "9", "999", "nan")
"""The corpora's codes for a label that was not coded."""


def score_predictions(
    predictions: ToolPredictions, labels: LabelTable, split: str = "test", missing: str = "nothing"
) -> dict[str, Any]:
    """Evaluate a tool's predictions on the labels of a split, for the action units that both have.

    Args:
        predictions: The tool's predictions.
        labels: The ground truth. If it has rows of the split "train", thresholds are calibrated on them.
        split: The rows to evaluate; where the table names no splits, all are of "test".
        missing: A face that the tool did not find counts as "nothing", a face without action units, or as
            "unknown", which leaves it out.

    Returns:
        A report like that of `actionunits.evaluation.evaluation_report`, without groups; `notes` say which
        action units were not compared and in how many pictures the tool found a face.

    Raises:
        ValueError: There is no such split, or no action unit or picture in common.
    """
    aus = [au for au in labels.aus if au in predictions.aus]
    chosen = labels.rows_of(split)
    if not aus or not len(chosen):
        raise ValueError(
            f"{predictions.tool} has the action units {predictions.aus}, the labels {labels.aus} and "
            f"{len(chosen)} rows of the split {split!r}: nothing can be compared."
        )
    scores, found = predictions.scores_of(labels)
    if not found.any():
        raise ValueError(_stranger(predictions, labels))
    columns = [labels.aus.index(au) for au in aus]
    scores = scores[:, [predictions.aus.index(au) for au in aus]]
    counts = (found | (missing != "unknown"))[:, None]
    truth = np.where(counts, labels.occurrence[:, columns], UNKNOWN)
    intensities = None
    if labels.intensities is not None:
        intensities = np.where(counts, labels.intensities[:, columns], np.nan)[chosen]
    training = labels.rows_of("train") if split != "train" else chosen[:0]
    calibrated = calibrate_thresholds(scores[training], truth[training]) if len(training) else None
    alone = sorted(set(labels.aus) ^ set(predictions.aus))
    people = labels.subjects[chosen] if labels.subjects is not None else None
    return {
        "split": split,
        "pictures": len(chosen),
        "people": None if people is None else len(set(people)),
        "thresholds_from": "the training subjects" if len(training) else "none: no training rows",
        "notes": {
            "tool": f"{predictions.tool} ({predictions.values})",
            "faces_found": f"{found[chosen].mean():.1%}; others count as {missing}",
            "not_compared": ", ".join(map(au_label, alone)) or "none",
        },
        **threshold_reports(aus, scores[chosen], truth[chosen], intensities, people, calibrated),
    }


@dataclass(frozen=True)
class ToolFormat:
    """The format of a tool's CSV files.

    Attributes:
        occurrence: Pattern of the columns with occurrences or probabilities; the group is the FACS number.
        intensity: The same for columns with intensities from 0 to `full_intensity`; "" if there are none.
        full_intensity: The highest intensity.
        picture: Possible columns of the picture's or video's name; without one it is the file's own name.
        frame: Possible columns of the frame's number; without one rows are pictures.
        first_frame: Number of a video's first frame.
        confidence: Possible columns of the face's confidence; of several faces the most confident counts.
        success: Column that is 0 where no face was found; "" if there is none.
    """

    occurrence: str
    intensity: str = ""
    full_intensity: float = 5.0
    picture: tuple[str, ...] = ()
    frame: tuple[str, ...] = ("frame",)
    first_frame: int = 0
    confidence: tuple[str, ...] = ("confidence",)
    success: str = ""


FORMATS: dict[str, ToolFormat] = {
    # FeatureExtraction and FaceLandmarkImg of OpenFace 2.2: one file a video or picture, blanks after commas.
    "openface": ToolFormat(r"AU(\d+)_c", r"AU(\d+)_r", first_frame=1, success="success"),
    # Fex.to_csv of py-feat: probabilities; a row a face, empty cells where there was none.
    "py-feat": ToolFormat(r"AU(\d+)", picture=("input",), confidence=("FaceScore",)),
    # get_facial_attributes of LibreFace: twelve action units as 0 and 1, twelve (others) as intensities.
    "libreface": ToolFormat(
        r"au_(\d+)", r"au_(\d+)_intensity", picture=("input_image_path",), frame=("frame_idx",)
    ),
    # actionunits detect --csv
    "actionunits": ToolFormat(r"AU(\d+)", picture=("photo",)),
}
"""The known formats, by the tool's name."""


@dataclass(frozen=True)
class ToolPredictions:
    """Predictions of a tool.

    Attributes:
        tool: Name of its format.
        values: Whether the scores are of occurrence, or intensities divided by the highest possible one.
        aus: FACS numbers of the m columns.
        rows: Scores (m,) in [0, 1] by picture and frame, where a face was found.
    """

    tool: str
    values: Values
    aus: list[int]
    rows: dict[Key, np.ndarray]

    def scores_of(self, labels: LabelTable) -> tuple[np.ndarray, np.ndarray]:
        """Scores (N, m) of the rows of a table, 0 where no face was found, and where one was (N,).

        Raises:
            ValueError: A row of the table matches several predictions.
        """
        scores, found = np.zeros((len(labels.keys), len(self.aus))), np.zeros(len(labels.keys), bool)
        by_end: dict[int, dict[Key, list[Key]]] = {}
        for row, (parts, frame) in enumerate(labels.keys):
            if len(parts) not in by_end:
                by_end[len(parts)] = self._by_end(len(parts), labels.has_frames)
            fitting = by_end[len(parts)].get((parts, frame), [])
            if len(fitting) > 1:
                first, second = (f"{'/'.join(path)} (frame {number})" for path, number in fitting[:2])
                raise ValueError(
                    f"{'/'.join(parts)} in the labels fits both {first} and {second} of {self.tool}; name "
                    "more of the path, or the frame, in the labels."
                )
            if fitting:
                scores[row], found[row] = self.rows[fitting[0]], True
        return scores, found

    def _by_end(self, length: int, has_frames: bool) -> dict[Key, list[Key]]:
        """Keys by the last parts of their path and the frame (0 where the table has no frames)."""
        index: dict[Key, list[Key]] = {}
        for parts, frame in self.rows:
            index.setdefault((parts[-length:], frame if has_frames else 0), []).append((parts, frame))
        return index


def read_predictions(
    files: Iterable[str | Path], tool: str, values: Values = "occurrence"
) -> ToolPredictions:
    """Read the predictions of a tool.

    Args:
        files: Its CSV files. If a file does not name pictures, its own name is that of the video or picture.
        tool: A key of `FORMATS`.
        values: Whether to read occurrences or intensities.

    Raises:
        ValueError: The tool is unknown, has no such values, or its files have different columns.
    """
    if tool not in FORMATS:
        raise ValueError(f"unknown tool {tool!r}; known are {sorted(FORMATS)}.")
    pattern = FORMATS[tool].occurrence if values == "occurrence" else FORMATS[tool].intensity
    if not pattern:
        raise ValueError(f"{tool} gives no {values}; choose the other values.")
    aus: list[int] = []
    rows: dict[Key, np.ndarray] = {}
    for file in map(Path, files):
        columns = _au_columns(_header(file), pattern)
        if not columns or aus not in ([], list(columns)):
            raise ValueError(f"{file} has the action units {list(columns)}, expected {aus or pattern!r}.")
        aus = list(columns)
        rows |= _read_file(file, FORMATS[tool], columns, 1.0 if values == "occurrence" else None)
    return ToolPredictions(tool, values, aus, rows)


@dataclass(frozen=True)
class LabelTable:
    """Ground truth of N pictures.

    Attributes:
        aus: FACS numbers of the m columns.
        keys: Picture (or video) and frame of each row.
        has_frames: Whether rows are frames of videos.
        occurrence: (N, m) int8, 1, 0 or `UNKNOWN`.
        intensities: (N, m) in [0, 1], nan where unknown; None if the table has none.
        subjects: (N,) names of the people, if known.
        splits: (N,) names of the splits, if named.
    """

    aus: list[int]
    keys: list[Key]
    has_frames: bool
    occurrence: np.ndarray
    intensities: np.ndarray | None = None
    subjects: np.ndarray | None = None
    splits: np.ndarray | None = None

    def rows_of(self, split: str) -> np.ndarray:
        """Indices of the rows of a split; where the table names no splits, all are of "test"."""
        if self.splits is None:
            return np.arange(len(self.keys) if split == "test" else 0)
        return np.flatnonzero(self.splits == split)


def read_labels(path: str | Path, first_frame: int = 0, from_intensity: float | None = None) -> LabelTable:
    """Read a CSV of labels: a row per picture (`picture` or `image`) or per frame (`video` and `frame`).

    The other columns are AU1, AU2, ..., and optionally `subject` and `split`.

    Args:
        path: The file. Labels are 1 and 0; empty, -1, 9 and 999 are unknown.
        first_frame: Number of a video's first frame in this file.
        from_intensity: Labels are intensities from 0 to 5, and an action unit occurs from this one on (2 in
            papers on DISFA).

    Raises:
        ValueError: A column is missing or named strangely, a row has other cells than the header, a label is
            none of these values, or a picture is labelled twice.
    """
    header, table = _header(Path(path)), _label_rows(Path(path))
    name = next((column for column in ("picture", "image", "video") if column in header), "")
    columns = _au_columns(header, r"AU0*(\d+)")
    _check_label_columns(header, path)
    if not table or not name or not columns or (name == "video" and "frame" not in header):
        raise ValueError(f"{path} needs picture, or video and frame, and AU1, AU2, ...; it has {header}.")
    graded = np.array([[_label(row[c], path) for c in columns.values()] for row in table])
    known = ~np.isnan(graded)
    occurs = graded >= (1 if from_intensity is None else from_intensity)
    if from_intensity is None and not np.isin(graded[known], (0, 1)).all():
        raise ValueError(f"{path} has labels beyond 0 and 1; are they intensities? Then say from which on.")
    frames = [_frame(row["frame"], path) - first_frame if name == "video" else 0 for row in table]
    keys = [(_parts(row[name]), frame) for row, frame in zip(table, frames, strict=True)]
    if len(set(keys)) < len(keys):
        twice, frame = next(key for key, count in Counter(keys).items() if count > 1)
        raise ValueError(
            f"{path} labels {'/'.join(twice)} (frame {frame} from 0) more than once, suffixes apart; keep "
            "one of its rows."
        )
    return LabelTable(
        aus=list(columns),
        keys=keys,
        has_frames=name == "video",
        occurrence=np.where(known, occurs, UNKNOWN).astype(np.int8),
        intensities=None if from_intensity is None else graded / 5,
        subjects=np.array([row["subject"] for row in table]) if "subject" in header else None,
        splits=np.array([row["split"] for row in table]) if "split" in header else None,
    )


def _read_file(
    file: Path, form: ToolFormat, columns: Mapping[int, str], full: float | None
) -> dict[Key, np.ndarray]:
    """Scores of the most confident face of each picture of a file."""
    rows: dict[Key, np.ndarray] = {}
    surest: dict[Key, float] = {}
    for row in _rows(file):
        values = np.array([_number(row[column]) for column in columns.values()])
        if np.isnan(values).any() or (form.success and _number(row.get(form.success, "1")) == 0):
            continue
        picture = _first(row, form.picture) or str(file)
        frame = _first(row, form.frame)
        key = _parts(picture), _frame(frame, file) - form.first_frame if frame else 0
        sure = _number(_first(row, form.confidence))
        if key not in rows or sure > surest[key]:
            rows[key], surest[key] = np.clip(values / (full or form.full_intensity), 0, 1), sure
    return rows


def _rows(file: Path) -> Iterator[dict[str, str]]:
    with naming(file), file.open(newline="", encoding="utf-8-sig") as stream:
        for row in csv.DictReader(stream):
            yield _stripped(row)


def _label_rows(file: Path) -> list[dict[str, str]]:
    """All rows of a table of labels; a cell too few or too many would move labels to other action units."""
    header, rows = _header(file), []
    with naming(file), file.open(newline="", encoding="utf-8-sig") as stream:
        for row in filter(any, list(csv.reader(stream))[1:]):
            if len(row) < len(header) or any(cell.strip() for cell in row[len(header) :]):
                raise ValueError(
                    f"{file} has {len(row)} cells in the row of {row[0]!r}, but {len(header)} in the header; "
                    "mend it, empty cells need commas, too."
                )
            rows.append({name: cell.strip() for name, cell in zip(header, row, strict=False)})
    return rows


def _check_label_columns(header: Sequence[str], path: str | Path) -> None:
    """Refuse what looks like the label of an action unit that has no other, and action units with two."""
    exact = [int(match[1]) for name in header if (match := re.fullmatch(r"AU0*(\d+)", name))]
    for name in header:
        match = re.match(r"AU[_ ]?0*(\d+)", name, re.IGNORECASE)
        if match and exact.count(int(match[1])) != 1:
            raise ValueError(
                f"{path} has a column {name!r} that is no label of an action unit of its own; name label "
                "columns AU1, AU12, ..., each once, and others differently."
            )


def _header(file: Path) -> list[str]:
    with naming(file), file.open(newline="", encoding="utf-8-sig") as stream:
        return [name.strip() for name in next(csv.reader(stream), [])]


def _au_columns(header: Sequence[str], pattern: str) -> dict[int, str]:
    """Columns by FACS number, without numbers that are not action units."""
    matches = {name: re.fullmatch(pattern, name) for name in header}
    numbered = {int(match[1]): name for name, match in matches.items() if match}
    return {number: name for number, name in numbered.items() if number in ACTION_UNITS}


def _stranger(predictions: ToolPredictions, labels: LabelTable) -> str:
    """The error where no label has a prediction."""
    path, frame = labels.keys[0]
    other, number = next(iter(predictions.rows), (("nothing",), 0))
    return (
        f"no label row has a prediction: the labels name {'/'.join(path)!r} (frame {frame} from 0), the tool "
        f"{'/'.join(other)!r} (frame {number}); name pictures or videos alike, and see to the first frame."
    )


def _stripped(row: Mapping[str | None, Any]) -> dict[str, str]:
    return {name.strip(): (value or "").strip() for name, value in row.items() if name is not None}


def _first(row: Mapping[str, str], names: Iterable[str]) -> str:
    return next((row[name] for name in names if row.get(name)), "")


def _parts(path: str) -> tuple[str, ...]:
    """Parts of a path, of any system, without its suffix: "F001/T1/2440.jpg" is ("F001", "T1", "2440")."""
    pure = PurePosixPath(path.replace("\\", "/"))
    return tuple(part for part in pure.with_suffix("").parts if part not in ("/", "."))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _frame(text: str, path: str | Path) -> int:
    if not (value := _number(text)).is_integer():  # nan and inf are none
        raise ValueError(f"{path} has the frame {text!r}; number the frames of a video, each row's.")
    return int(value)


def _label(text: str, path: str | Path) -> float:
    if text.lower() in UNKNOWN_CODES or text in ("-1.0", "9.0", "999.0"):
        return float("nan")
    value = _number(text)
    if not 0 <= value <= 5:
        raise ValueError(
            f"{path} has the label {text!r}; labels are 0 to 5, and empty, -1, 9 or 999 unknown."
        )
    return value
