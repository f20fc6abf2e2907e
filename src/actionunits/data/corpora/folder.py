"""A folder of pictures with a table of picture, subject, and a column per action unit."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from actionunits.action_units import UNKNOWN, check_aus
from actionunits.data.corpora import tiny
from actionunits.data.corpora.base import AUCorpus, Recording
from actionunits.data.corpora.reading import naming, whole
from actionunits.data.protocols import OFFICIAL

TABLE = "labels.csv"
_AU_COLUMN = re.compile(r"AU_?0*([1-9][0-9]*)(?:_c)?", re.IGNORECASE)  # "AU12", "au01", "AU01_c"
_POINT_COLUMN = re.compile(r"[xy][0-9]+")
_LIKE_AU = re.compile(r"AU[_ ]?[0-9]", re.IGNORECASE)


class Folder(AUCorpus):
    """Your own pictures. Labels are 1, 0, or empty, -1, 9 or 999 for unknown."""

    name = "folder"
    title = "a folder with labels.csv"
    homepage = licence = citation = ""
    official_split = True
    layout = """\
DIR/
  labels.csv             image,subject,AU1,AU12,...     (required: picture, relative to DIR; person; labels)
                         split                          (optional: train, validation or test, people apart)
                         sequence,frame                 (optional: where the picture comes from)
                         x0,y0,x1,y1,...                (optional: landmarks in pixels, any known scheme)
  anywhere/face.jpg ...  the pictures"""
    traps = (
        "An empty cell is unknown, not absent; a row without a split is in none.",
        "Every person needs a unique name: splits are made by it.",
    )

    def recognize(self, root: Path) -> None:
        """Raise `WrongCorpusError` unless there is a labels.csv with the columns image, subject and an AU."""
        self.require(root, self.label_files(root), TABLE)
        if missing := {"image", "subject"} - set(self._header(root)):
            raise ValueError(
                f"{root / TABLE} lacks the columns {sorted(missing)}; it has {self._header(root)[:8]}. "
                "Cells are separated by commas."
            )
        self._label_columns(root)

    def label_files(self, root: Path) -> list[Path]:
        """The table."""
        return [root / TABLE] if (root / TABLE).is_file() else []

    def evaluated_aus(self, root: Path) -> tuple[int, ...]:
        """FACS numbers of the table's label columns, in order."""
        return tuple(self._label_columns(root))

    def recordings(self, root: Path, aus: Sequence[int]) -> Iterator[Recording]:
        """One recording per row.

        Raises:
            ValueError: The table has no rows, or an invalid one, which the message names.
        """
        columns = self._label_columns(root)
        if missing := [au for au in aus if au not in columns]:
            raise ValueError(
                f"{root / TABLE} has no column of the action units {missing}; it has {list(columns)}."
            )
        number, seen = 1, dict[tuple[str, str], int]()  # row of each picture and person
        for number, row in enumerate(self._rows(root), start=2):
            source = f"{root / TABLE}, row {number}"
            try:
                recording = _recording(root, row, [columns[au] for au in aus], number - 1, source)
                key = (row["image"].strip(), recording.subject)
                if key[0] and (first := seen.setdefault(key, number)) != number:
                    raise ValueError(f"it labels {key[0]} of {key[1]} again, as row {first} does; keep one.")
                yield recording
            except ValueError as error:
                raise ValueError(f"{source}: {error}") from error
        if number == 1:
            raise ValueError(f"{root / TABLE} has a header and no rows.")

    def write_tiny(self, root: Path) -> None:
        """Write four pictures of each of six subjects."""
        header = [
            "image",
            "subject",
            "split",
            "AU1",
            "AU12",
            *(f"{axis}{i}" for i in range(68) for axis in "xy"),
        ]
        rows = []
        for person, split in enumerate(("train", "train", "train", "train", "validation", "test")):
            codes = tiny.codes(4, person)
            for i in range(4):
                name = f"pictures/{person}-{i}.jpg"
                points = tiny.draw_face(root / name, person, i)
                labels = [codes[i, 1], "" if i == 3 else codes[i, 12]]
                rows.append([name, f"person-{person}", split, *labels, *np.round(points, 2).ravel()])
        tiny.write_table(root / TABLE, header, rows)

    def _header(self, root: Path) -> list[str]:
        with naming(root / TABLE), (root / TABLE).open(newline="", encoding="utf-8-sig") as file:
            return [name.strip() for name in next(csv.reader(file), [])]

    def _label_columns(self, root: Path) -> dict[int, str]:
        """Names of the label columns by FACS number."""
        columns: dict[int, str] = {}
        for name in filter(_LIKE_AU.match, self._header(root)):
            match = _AU_COLUMN.fullmatch(name)
            if match is None or int(match[1]) in columns:
                raise ValueError(
                    f"{root / TABLE} has a column {name!r} that is no label of an action unit of its own; "
                    "name label columns AU1, AU12, ..., each once, and others differently."
                )
            columns[int(match[1])] = name
        if not columns:
            raise ValueError(f"{root / TABLE} has no column of an action unit, such as AU12.")
        try:
            check_aus(columns)
        except ValueError as error:
            raise ValueError(f"{root / TABLE}: {error}") from error
        return columns

    def _rows(self, root: Path) -> Iterator[dict[str, str]]:
        """Rows as dictionaries of cells by column, with None among them if cells are missing or left over."""
        with naming(root / TABLE), (root / TABLE).open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file, fieldnames=self._header(root))
            next(rows, None)
            yield from rows


def _recording(
    root: Path, row: dict[str, str], columns: Sequence[str], number: int, source: str
) -> Recording:
    """The recording of a row; `number` counts from 1 below the header."""
    if None in row or None in row.values():
        raise ValueError("it has fewer or more cells than the header; empty cells need commas, too.")
    split = row.get("split", "").strip()
    if split and split not in OFFICIAL["folder"]:
        raise ValueError(f"the split {split!r} is none of {', '.join(OFFICIAL['folder'])}.")
    subject = row["subject"].strip()
    if row["image"].strip() and not subject:
        raise ValueError("it names no subject, by which splits are made; give every person a name.")
    frame = _frame(row.get("frame", "").strip() or str(number))
    picture = root / row["image"].strip()
    points = _points(row)
    cells = [row[column].strip() for column in columns]
    return Recording(
        subject=subject,
        sequence=row.get("sequence", "").strip() or row["image"].strip(),
        frames=np.array([frame]),
        codes=np.array([[float(cell) if cell else UNKNOWN for cell in cells]]),
        pictures={frame: picture} if picture.is_file() else {},
        landmarks=lambda problems: {} if points is None else {frame: points},
        split=split,
        source=source,
    )


def _frame(cell: str) -> int:
    try:
        frame = whole(cell)
    except ValueError as error:
        raise ValueError(f"the frame {cell!r} is not a whole number.") from error
    if abs(frame) >= 2**31:
        raise ValueError(f"the frame {frame} has more than 32 bits; number the frames from 0 or 1.")
    return frame


def _points(row: dict[str, str]) -> np.ndarray | None:
    """Landmarks (L, 2) of a row, or None."""
    count = 0
    while row.get(f"x{count}", "").strip() and row.get(f"y{count}", "").strip():
        count += 1
    given = sum(bool(cell.strip()) for name, cell in row.items() if _POINT_COLUMN.fullmatch(name))
    if given != 2 * count:
        raise ValueError(
            f"it lacks x{count} or y{count} and has later points; fill the gap, or leave all points empty."
        )
    return np.array([[float(row[f"x{i}"]), float(row[f"y{i}"])] for i in range(count)]) if count else None
