"""Small readers that several corpora share: tables of labels, numbered pictures, landmarks, frame lists."""

from __future__ import annotations

import csv
import glob
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

PICTURES = (".jpg", ".jpeg", ".png", ".bmp")

_AU_COLUMN = re.compile(r"\s*(?:AU)?_?0*([0-9]+)(?:_[a-z]+)?\s*", re.IGNORECASE)  # "12", "AU12", "AU02_c"
_LAST_NUMBER = re.compile(r"([0-9]+)(?=\D*$)")
_SIZES = {5, 49, 66, 68, 98, 478}


def read_au_table(path: Path, aus: Sequence[int], frame_column: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Read a CSV with one row a frame and one column an action unit.

    Args:
        path: The file; its header names columns "12", "AU12" or "AU12_c".
        aus: FACS numbers of the columns wanted.
        frame_column: Whether the first column is the frame number; else rows count from 1.

    Returns:
        (n,) frame numbers and (n, m) label codes, int.

    Raises:
        ValueError: A column is missing or a cell is no whole number; the message names the file.
    """
    with naming(path), path.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.reader(file))
    while rows and not any(cell.strip() for cell in rows[-1]):
        rows.pop()
    if frame_column:  # else an empty line in between would move all that follow
        rows = [row for row in rows if any(cell.strip() for cell in row)]
    if not rows:
        return np.empty(0, np.int64), np.empty((0, len(aus)), np.int64)
    first = 1 if frame_column else 0
    columns = {
        int(match[1]): i
        for i, name in enumerate(rows[0])
        if i >= first and (match := _AU_COLUMN.fullmatch(name))
    }
    if missing := [au for au in aus if au not in columns]:
        raise ValueError(f"{path} has no column of the action units {missing}; it has {sorted(columns)}.")
    try:
        codes = [[whole(row[columns[au]]) for au in aus] for row in rows[1:]]
        frames = [whole(row[0]) for row in rows[1:]] if frame_column else range(1, len(rows))
        numbers, table = np.asarray(list(frames), np.int64), np.asarray(codes, np.int64)
    except (ValueError, OverflowError, IndexError) as error:
        raise ValueError(f"{path} has a row that is not whole numbers all along: {error}.") from error
    check_once(path, numbers)
    return numbers, table.reshape(-1, len(aus))


def check_once(path: Path, frames: np.ndarray) -> None:
    """Refuse a file that labels a frame more than once."""
    if len(np.unique(frames)) < len(frames):
        twice = next(frame for frame, count in Counter(frames.tolist()).items() if count > 1)
        raise ValueError(f"{path} labels frame {twice} more than once; keep one of its rows.")


def whole(cell: str) -> int:
    """The whole number in a cell, such as "1" or "1.0"."""
    if not (value := float(cell)).is_integer():  # nor are nan and inf
        raise ValueError(f"{cell.strip()!r} is no whole number")
    return int(value)


def index_pictures(folder: Path, shift: int | str = 0) -> dict[int, Path]:
    """Picture files of a folder by the last number in their names: "643.jpg", "0643.jpg", "frame_643.png".

    Args:
        folder: The folder; an absent one has no pictures.
        shift: Added to the number; "auto" makes numbers that begin at 0 begin at 1.

    Raises:
        ValueError: Two files have the same number.
    """
    found: dict[int, Path] = {}
    if not folder.is_dir():
        return found
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        stem, suffix = os.path.splitext(entry.name)
        if entry.name.startswith("."):  # macOS leaves "._643.jpg" beside "643.jpg" on foreign discs
            continue
        if suffix.lower() not in PICTURES or not (number := _LAST_NUMBER.search(stem)):
            continue
        if (frame := int(number[1])) in found:
            raise ValueError(
                f"{entry.path} and {found[frame].name} are both frame {frame}; remove one of them."
            )
        found[frame] = Path(entry.path)
    if shift == "auto":
        shift = 1 if 0 in found else 0
    return {frame + int(shift): path for frame, path in found.items()}


def find_files(folder: Path, pattern: str) -> list[Path]:
    """Files of a folder by a pattern such as "F*.csv", in order; the suffix may be in upper case.

    Raises:
        ValueError: Two files differ in their suffix alone.
    """
    if not folder.is_dir():
        return []
    stem, suffix = os.path.splitext(pattern)
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):  # macOS leaves "._001A.csv" beside "001A.csv" on foreign discs
            continue
        if path.suffix.lower() != suffix or not fnmatchcase(path.stem, stem):
            continue
        if path.stem in found:
            raise ValueError(f"{path} and {found[path.stem].name} are the same file; remove one of them.")
        found[path.stem] = path
    return list(found.values())


def first_folder(root: Path, candidates: Sequence[str]) -> Path | None:
    """The first of these subfolders that exists; "." is the folder itself."""
    return next((root / name for name in candidates if (root / name).is_dir()), None)


def read_landmarks(root: Path, sequence: str, problems: list[str]) -> dict[int, np.ndarray]:
    """Points from `landmarks/SEQUENCE.csv`: a header, then frame, x0, y0, x1, y1, ... of every frame.

    This is the package's own form, for corpora that come without points: pixels of the picture, counted from
    the centre of the upper left pixel, in any order that `actionunits.landmarks.SCHEMES` knows. A file that
    is something else has no points; what is wrong with it goes into `problems`.
    """
    name = f"{glob.escape(sequence)}.csv"
    if not (files := find_files(root / "landmarks", name)):
        return {}
    path = files[0]
    try:
        with path.open(encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file) if any(cell.strip() for cell in row)]
        table = np.array([[float(cell) for cell in row] for row in rows[1:]], ndmin=2)
        frames = [whole(row[0]) for row in rows[1:]]
    except (ValueError, OverflowError, csv.Error) as error:
        problems.append(f"{path} is no table of points: {error}")
        return {}
    if table.shape[1] // 2 not in _SIZES or table.shape[1] % 2 == 0:
        problems.append(
            f"{path} has {table.shape[1]} columns; frame and x, y of {sorted(_SIZES)} points are known"
        )
        return {}
    return {frame: row[1:].reshape(-1, 2) for frame, row in zip(frames, table, strict=True)}


def load_mat(path: Path, variable: str, problems: list[str]) -> Any:
    """A variable of a MATLAB file; None where the file is broken, which goes into `problems`."""
    from scipy.io import loadmat  # a dependency of scikit-image

    try:
        variables = loadmat(str(path), squeeze_me=True, struct_as_record=False)
    except NotImplementedError:  # version 7.3 is HDF5
        problems.append(f"{path} is a MATLAB file of version 7.3; save it with -v7")
    except Exception as error:  # SciPy's reader fails on a broken file in whatever way
        problems.append(f"{path} is no MATLAB file that SciPy can read: {error}")
    else:
        if variable in variables:
            return variables[variable]
        problems.append(f"{path} has no variable `{variable}`, but {[v for v in variables if v[0] != '_']}")
    return None


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the file where its bytes are no text, which Python's own message does not."""
    try:
        yield
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no text file: {error}; copy it again, or save it as UTF-8.") from error


def read_frame_list(path: Path) -> Iterator[tuple[str, str, int]]:
    """(subject, sequence, frame) of a list of pictures such as "F007/T1/0643.jpg" or "SN001/0.png".

    The published lists end their lines in CR LF, and some write a label behind the path.
    """
    with naming(path):
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    for line in lines:
        name = line.split()[0] if line.split() else ""
        parts = PurePosixPath(name.replace("\\", "/")).parts
        number = _LAST_NUMBER.search(Path(name).stem)
        if not name:
            continue
        if len(parts) < 2 or not number:
            raise ValueError(f"{path}: {line.strip()!r} is no SUBJECT/.../FRAME.jpg.")
        yield parts[-3] if len(parts) > 2 else parts[0], parts[-2] if len(parts) > 2 else "", int(number[1])
