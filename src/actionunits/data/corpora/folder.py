"""Any folder of pictures with a table: picture, subject, and a column an action unit."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from actionunits.action_units import UNKNOWN, parse_au_label
from actionunits.data.corpora import tiny
from actionunits.data.corpora.base import AUCorpus, Recording

TABLE = "labels.csv"


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
        "An empty cell is unknown, not an absence.",
        "Give every person a name of their own: splits are made by it.",
    )

    def recognize(self, root: Path) -> None:
        """Raise `WrongCorpusError` unless there is a labels.csv with the columns image, subject and an AU."""
        self.require(root, self.label_files(root), TABLE)
        if missing := {"image", "subject"} - set(self._header(root)):
            raise ValueError(f"{root / TABLE} lacks the columns {sorted(missing)}.")

    def label_files(self, root: Path) -> list[Path]:
        """The table."""
        return [root / TABLE] if (root / TABLE).is_file() else []

    def evaluated_aus(self, root: Path) -> tuple[int, ...]:
        """FACS numbers of the table's label columns, in its order."""
        return tuple(au for name in self._header(root) if (au := parse_au_label(name)) is not None)

    def recordings(self, root: Path, aus: Sequence[int]) -> Iterator[Recording]:
        """One recording a row."""
        labelled = self.evaluated_aus(root)
        if missing := [au for au in aus if au not in labelled]:
            raise ValueError(
                f"{root / TABLE} has no column of the action units {missing}; it has {list(labelled)}."
            )
        with (root / TABLE).open(newline="", encoding="utf-8-sig") as file:
            for number, row in enumerate(csv.DictReader(file), start=2):
                frame = int(row.get("frame") or number - 1)
                picture = root / row["image"]
                points = _points(row)
                cells = [row[f"AU{au}"].strip() for au in aus]
                yield Recording(
                    subject=row["subject"],
                    sequence=row.get("sequence") or row["image"],
                    frames=np.array([frame]),
                    codes=np.array([[float(cell) if cell else UNKNOWN for cell in cells]]),
                    pictures={frame: picture} if picture.is_file() else {},
                    landmarks=lambda problems, frame=frame, points=points: (
                        {} if points is None else {frame: points}
                    ),  # type: ignore[misc]
                    split=row.get("split") or "",
                    source=f"{root / TABLE}, row {number}",
                )

    def write_tiny(self, root: Path) -> None:
        """Six people, four pictures each."""
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
        with (root / TABLE).open(newline="", encoding="utf-8-sig") as file:
            return next(csv.reader(file), [])


def _points(row: dict[str, str]) -> np.ndarray | None:
    """The row's landmarks (L, 2), if it has any."""
    count = 0
    while row.get(f"x{count}") and row.get(f"y{count}"):
        count += 1
    return np.array([[float(row[f"x{i}"]), float(row[f"y{i}"])] for i in range(count)]) if count else None
