"""Tables of a video's results: CSV and Parquet, written row by row, in two forms.

`openface`, a row for each face of each frame, for readers of OpenFace 2's files: `frame` (from 1 on),
`timestamp` [s], `face_id` (from 0 on), `confidence` (0..1), `success` (1 or 0), and for every action unit
`AU01_c`, whether it occurs (1 or 0). `AU01_p` is ours: its probability, 0..1. OpenFace's intensities
`AU01_r`, 0 to 5, are another quantity and left out.

`tidy`, a row for each action unit of each face of each frame: `frame` (from 0 on, as in Python), `timestamp`,
`face_id`, `confidence`, the box `xmin`, `ymin`, `xmax`, `ymax` [pixels], `au`, `score`, `active` (1 or 0),
`threshold`, and `error`, why a frame could not be read.

A frame without a face has a row, too: `success` and `confidence` are 0 (openface), unknown values are empty
cells in CSV and null in Parquet. OpenFace writes zeros there, which look like neutral faces.
"""

import csv
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from actionunits.action_units import parse_au_label
from actionunits.files import whole_file

Row = dict[str, Any]
Answer = Mapping[str, Any]
EDGES = ("xmin", "ymin", "xmax", "ymax")

_DECIMALS = 6  # of floats in CSV
_ROW_GROUP = 8192  # rows per row group of Parquet


@dataclass(frozen=True)
class Form:
    """A form of tables.

    Attributes:
        columns: Thresholds by label -> type of each column by name.
        rows: Result of a frame, thresholds by label -> its rows; columns may be missing in a row.
    """

    columns: Callable[[Mapping[str, float]], dict[str, type]]
    rows: Callable[[Answer, Mapping[str, float]], Iterator[Row]]


def openface_columns(thresholds: Mapping[str, float]) -> dict[str, type]:
    """Names and types of the columns of the form `openface`."""
    columns = {"frame": int, "timestamp": float, "face_id": int, "confidence": float, "success": int}
    for label in thresholds:
        columns |= {f"{openface_name(label)}_c": int, f"{openface_name(label)}_p": float}
    return columns


def openface_rows(answer: Answer, thresholds: Mapping[str, float] | None = None) -> Iterator[Row]:
    """Yield a row for each face, lowest number first, or one with `success` 0 if there is none.

    Args:
        answer: The pipeline's result for a frame of a video.
        thresholds: Unused; the decisions are in the result.
    """
    frame = {"frame": answer["frame"] + 1, "timestamp": answer["timestamp"]}
    if not answer["faces"]:
        yield {**frame, "confidence": 0.0, "success": 0}
    for face in _by_number(answer):
        row = {**frame, "face_id": face["face_id"], "confidence": face["confidence"], "success": 1}
        for au in face["action_units"]:
            name = openface_name(au["label"])
            row |= {f"{name}_c": int(au["active"]), f"{name}_p": au["score"]}
        yield row


def openface_name(label: str) -> str:
    """Return the label with two digits: AU1 becomes AU01. Labels of no action unit are kept."""
    number = parse_au_label(label)
    return label if number is None else f"AU{number:02d}"


def tidy_columns(thresholds: Mapping[str, float]) -> dict[str, type]:
    """Names and types of the columns of the form `tidy`."""
    columns: dict[str, type] = {"frame": int, "timestamp": float, "face_id": int, "confidence": float}
    columns |= dict.fromkeys(EDGES, float)
    return columns | {"au": str, "score": float, "active": int, "threshold": float, "error": str}


def tidy_rows(answer: Answer, thresholds: Mapping[str, float]) -> Iterator[Row]:
    """Yield a row for each action unit of each face, or once for each action unit if there is no face.

    Args:
        answer: The pipeline's result for a frame of a video.
        thresholds: Score from which each action unit is active, by label, see `decision_thresholds`.
    """
    frame = {"frame": answer["frame"], "timestamp": answer["timestamp"]}
    if not answer["faces"]:
        for label, threshold in thresholds.items():
            yield {**frame, "au": label, "threshold": threshold, "error": answer.get("error")}
    for face in _by_number(answer):
        about = {"face_id": face["face_id"], "confidence": face["confidence"], **face["box"]}
        for au in face["action_units"]:
            decision = {
                "score": au["score"],
                "active": int(au["active"]),
                "threshold": thresholds[au["label"]],
            }
            yield {**frame, **about, "au": au["label"], **decision}


FORMS = {"openface": Form(openface_columns, openface_rows), "tidy": Form(tidy_columns, tidy_rows)}


@contextmanager
def write_csv(
    path: str | os.PathLike, form: str, thresholds: Mapping[str, float]
) -> Iterator[Callable[[Answer], None]]:
    """Write a CSV file, which appears when it is complete; yields a function that takes each frame's result.

    Args:
        path: The file.
        form: One of `FORMS`.
        thresholds: Score from which each action unit is active, by label, in the order of the columns.
    """
    with whole_file(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(FORMS[form].columns(thresholds)), lineterminator="\n")
        table.writeheader()

        def add(answer: Answer) -> None:
            for row in FORMS[form].rows(answer, thresholds):
                table.writerow({name: _short(value) for name, value in row.items()})

        yield add


@contextmanager
def write_parquet(
    path: str | os.PathLike,
    form: str,
    thresholds: Mapping[str, float],
    about: Mapping[str, Any] | None = None,
) -> Iterator[Callable[[Answer], None]]:
    """Write a Parquet file like `write_csv`.

    Args:
        path: The file.
        form: One of `FORMS`.
        thresholds: Score from which each action unit is active, by label, in the order of the columns.
        about: Provenance, such as the model; stored as JSON in the file's metadata, key `actionunits`.

    Raises:
        ImportError: pyarrow is not installed.
    """
    try:
        import pyarrow
        from pyarrow.parquet import ParquetWriter
    except ImportError as error:
        raise ImportError('Writing Parquet needs `pip install "actionunits[video]"`.') from error
    types = {int: pyarrow.int32(), float: pyarrow.float64(), str: pyarrow.string()}
    fields = [(name, types[kind]) for name, kind in FORMS[form].columns(thresholds).items()]
    schema = pyarrow.schema(fields, metadata={"actionunits": json.dumps(dict(about or {}))})
    rows: list[Row] = []
    with whole_file(path) as part, ParquetWriter(part, schema) as writer:

        def add(answer: Answer) -> None:
            rows.extend(FORMS[form].rows(answer, thresholds))
            if len(rows) >= _ROW_GROUP:
                flush()

        def flush() -> None:
            writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))
            rows.clear()

        yield add
        flush()


def _by_number(answer: Answer) -> list[dict[str, Any]]:
    return sorted(answer["faces"], key=lambda face: face["face_id"])


def _short(value: Any) -> Any:
    return round(value, _DECIMALS) if isinstance(value, float) else value
