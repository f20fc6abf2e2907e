"""Readers shared by the corpora: label tables, numbered pictures, landmarks, frame lists."""

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

from actionunits.landmarks import SCHEMES

PICTURES = (".jpg", ".jpeg", ".png", ".bmp")

_AU_COLUMN = re.compile(r"\s*(?:AU)?_?0*([0-9]+)(?:_[a-z]+)?\s*", re.IGNORECASE)  # "12", "AU12", "AU02_c"
_LAST_NUMBER = re.compile(r"([0-9]+)(?=\D*$)")


def read_au_table(path: Path, aus: Sequence[int], frame_column: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Read a CSV with a row per frame and a column per action unit.

    Args:
        path: The file; its header names columns "12", "AU12" or "AU12_c".
        aus: FACS numbers of the m columns.
        frame_column: Whether the first column is the frame number; else rows are numbered from 1.

    Returns:
        Frame numbers (n,) and label codes (n, m), int64.

    Raises:
        ValueError: A column is missing or not the only one of its action unit, or a cell is not a whole
            number; the message names the file.
    """
    with naming(path), path.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.reader(file))
    while rows and not any(cell.strip() for cell in rows[-1]):
        rows.pop()
    if frame_column:  # else removing an empty line would renumber the frames after it
        rows = [row for row in rows if any(cell.strip() for cell in row)]
    if not rows:
        return np.empty(0, np.int64), np.empty((0, len(aus)), np.int64)
    first = 1 if frame_column else 0
    named = [
        (int(match[1]), i)
        for i, name in enumerate(rows[0])
        if i >= first and (match := _AU_COLUMN.fullmatch(name))
    ]
    columns = dict(named)
    if twice := [au for au, count in Counter(au for au, _ in named).items() if count > 1 and au in aus]:
        raise ValueError(f"{path} has several columns of the action units {twice}; keep the occurrence's.")
    if missing := [au for au in aus if au not in columns]:
        raise ValueError(f"{path} has no column of the action units {missing}; it has {sorted(columns)}.")
    try:
        codes = [[whole(row[columns[au]]) for au in aus] for row in rows[1:]]
        frames = [whole(row[0]) for row in rows[1:]] if frame_column else range(1, len(rows))
        numbers, table = np.asarray(list(frames), np.int64), np.asarray(codes, np.int64)
    except (ValueError, OverflowError, IndexError) as error:
        raise ValueError(f"{path} has a row with a missing or non-integer cell: {error}.") from error
    check_once(path, numbers)
    return numbers, table.reshape(-1, len(aus))


def check_once(path: Path, frames: np.ndarray) -> None:
    """Check that a file labels each frame once."""
    if len(np.unique(frames)) < len(frames):
        twice = next(frame for frame, count in Counter(frames.tolist()).items() if count > 1)
        raise ValueError(f"{path} labels frame {twice} more than once; keep one of its rows.")


def whole(cell: str) -> int:
    """Read a whole number, such as "1" or "1.0"."""
    if not (value := float(cell)).is_integer():  # false for nan and inf
        raise ValueError(f"{cell.strip()!r} is not a whole number")
    return int(value)


def index_pictures(folder: Path, shift: int | str = 0) -> dict[int, Path]:
    """Picture files of a folder by the last number in their names: "643.jpg", "0643.jpg", "frame_643.png".

    Args:
        folder: The folder; one that does not exist has no pictures.
        shift: Added to the numbers; "auto" adds 1 if there is a 0.

    Raises:
        ValueError: Two files have the same number.
    """
    found: dict[int, Path] = {}
    if not folder.is_dir():
        return found
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        stem, suffix = os.path.splitext(entry.name)
        if entry.name.startswith("."):  # macOS adds "._643.jpg" to "643.jpg" on other file systems
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
        ValueError: Two files differ only in the case of their suffix.
    """
    if not folder.is_dir():
        return []
    stem, suffix = os.path.splitext(pattern)
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):  # macOS adds "._001A.csv" to "001A.csv" on other file systems
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
    """Landmarks from `landmarks/SEQUENCE.csv`: a header, then frame, x0, y0, x1, y1, ... of every frame.

    This is the package's format for corpora without landmarks: pixels of the picture, from the centre of the
    upper left pixel, in a scheme of `actionunits.landmarks.SCHEMES`. A frame with an empty or NaN cell, as
    trackers write where they find no face, has no landmarks. Of an invalid file there are no landmarks at
    all; the reason is appended to `problems`.
    """
    name = f"{glob.escape(sequence)}.csv"
    if not (files := find_files(root / "landmarks", name)):
        return {}
    path = files[0]
    try:
        with path.open(encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file) if any(cell.strip() for cell in row)]
        table = np.array([[float(cell.strip() or "nan") for cell in row] for row in rows[1:]], ndmin=2)
        frames = [whole(row[0]) for row in rows[1:]]
    except (ValueError, OverflowError, csv.Error) as error:
        problems.append(f"{path} is not a table of points: {error}")
        return {}
    sizes = sorted({scheme.size for scheme in SCHEMES.values()})
    if table.shape[1] not in [1 + 2 * size for size in sizes]:
        problems.append(f"{path} has {table.shape[1]} columns; frame and x, y of {sizes} points are known")
        return {}
    return {
        frame: row[1:].reshape(-1, 2)
        for frame, row in zip(frames, table, strict=True)
        if np.isfinite(row).all()
    }


def load_mat(path: Path, variable: str, problems: list[str]) -> Any:
    """A variable of a MATLAB file; None if it cannot be read, with the reason appended to `problems`."""
    from scipy.io import loadmat  # a dependency of scikit-image

    try:
        variables = loadmat(str(path), squeeze_me=True, struct_as_record=False)
    except NotImplementedError:  # version 7.3 is HDF5
        problems.append(f"{path} is a MATLAB file of version 7.3; save it with -v7")
    except Exception as error:  # SciPy's reader raises exceptions of many kinds
        problems.append(f"{path} is no MATLAB file that SciPy can read: {error}")
    else:
        if variable in variables:
            return variables[variable]
        problems.append(f"{path} has no variable `{variable}`, but {[v for v in variables if v[0] != '_']}")
    return None


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name a file that is no text, which Python's own errors do not."""
    try:
        yield
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"{path} is not a text file: {error}; copy it again, or save it as UTF-8."
        ) from error


def read_frame_list(path: Path) -> Iterator[tuple[str, str, int]]:
    """(subject, sequence, frame) in a list of pictures such as "F007/T1/0643.jpg" or "SN001/0.png".

    Lines of published lists end with CR LF, and some have a label after the path.
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
