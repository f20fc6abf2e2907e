"""The open synthetic corpus: rendered faces with exact AU intensities, from `training/synthesize.py`.

    FOLDER/train-00000-of-00004.parquet ...  image, landmarks, au_intensities, au_occurrence, identity, groups
           validation-*.parquet, test-*.parquet
           manifest.json                     source and options

FOLDER may be a URL that fsspec can read with its credentials (s3://bucket/corpus, hf://datasets/name); rows
are streamed. Splits are subject-exclusive. Labels are blendshape gains in [0, 1], not scores of FACS coders.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from actionunits.action_units import CORPUS_AUS
from actionunits.data.aligned_faces import AlignedFaces, prepare_faces

if TYPE_CHECKING:
    import datasets

SPLITS = ("train", "validation", "test")
GROUPS = ("sex", "skin_tone", "ethnicity", "age")
COLUMNS = ("image", "landmarks", "au_intensities", "au_occurrence", "identity", *GROUPS)
SCHEME = "ibug68"


def prepare_synthetic(
    corpus: str | Path,
    split: str,
    folder: str | Path,
    aligned_size: int = 200,
) -> AlignedFaces:
    """One split, decoded and aligned into `folder`, where the next run finds it.

    Args:
        corpus: The corpus' folder or URL.
        split: "train", "validation" or "test".
        folder: Folder of the arrays, with a subfolder per split.
        aligned_size: Width and height of the aligned face in pixels.

    Raises:
        FileNotFoundError: There is no such folder, or no file of this split.
        ValueError: A file lacks a column.
    """
    files = split_files(corpus, split)
    return prepare_faces(
        Path(folder) / split,
        _records(load_synthetic(corpus, split)),
        count=sum(_number_of_rows(file) for file in files),
        aus=CORPUS_AUS["synthetic"],
        scheme=SCHEME,
        key={"files": [_version(file) for file in files]},
        aligned_size=aligned_size,
    )


def load_synthetic(corpus: str | Path, split: str) -> datasets.IterableDataset:
    """One split as a streaming data set; "image" is decoded to PIL.

    Raises:
        FileNotFoundError: There is no such folder, or no file of this split.
        ValueError: A file lacks a column.
    """
    import datasets

    files = split_files(corpus, split)
    for file in files:
        if missing := sorted(set(COLUMNS) - _column_names(file)):
            raise ValueError(f"{file} lacks the columns {missing}; was it written by training/synthesize.py?")
    return datasets.load_dataset(
        "parquet", data_files={split: as_patterns(files)}, split=split, streaming=True
    )


def split_files(corpus: str | Path, split: str) -> list[Any]:
    """The Parquet files of a split, in order: paths, or URLs if the corpus has one.

    Raises:
        FileNotFoundError: There is no such folder, or files of this split are missing.
    """
    system, folder = file_system(corpus)
    if not system.isdir(folder):
        raise FileNotFoundError(
            f"{corpus} is not a folder; render the corpus with training/synthesize.py first."
        )
    files = files_like(system, folder, f"{split}-*-of-*.parquet")
    if not files:
        found = sorted(path.rpartition("/")[2] for path in system.ls(folder, detail=False))[:8] or "nothing"
        raise FileNotFoundError(
            f"{corpus} has no {split}-*-of-*.parquet of the split {split!r}; it holds {found}."
        )
    names = [path.rpartition("/")[2] for path in files]
    expected = int(names[-1].removesuffix(".parquet").rpartition("-")[2])
    of_this_number = [name for name in names if name.endswith(f"-of-{expected:05d}.parquet")]
    if len(of_this_number) != expected:
        raise FileNotFoundError(
            f"{corpus} has {len(of_this_number)} of {expected} files of the split {split!r}."
        )
    if len(names) != expected:
        raise FileNotFoundError(
            f"{corpus} has files of two renderings of the split {split!r}, {names[0]} and {names[-1]}; "
            "remove the older ones."
        )
    return [Path(file) if _is_local(system) else system.unstrip_protocol(file) for file in files]


def file_system(place: str | Path) -> tuple[Any, str]:
    """The file system of a path or URL, and the path in it.

    Raises:
        ValueError: The path holds "::", which fsspec and `datasets` take for a chain of URLs.
    """
    if "://" not in str(place) and "::" in str(Path(place).absolute()):
        raise ValueError(
            f"{place} is in a folder with '::' in its name, which would be read as a chain of URLs; "
            "rename the folder."
        )
    return url_to_fs(str(place))


def available_splits(corpus: str | Path) -> list[str]:
    """Those of `SPLITS` with files in the folder."""
    system, folder = file_system(corpus)
    return [split for split in SPLITS if files_like(system, folder, f"{split}-*-of-*.parquet")]


def files_like(system: Any, folder: str, pattern: str) -> list[str]:
    """Files of a folder whose names match a pattern, in order; the folder's name is taken literally."""
    if not system.isdir(folder):
        return []
    files = system.ls(folder, detail=False)
    return sorted(file for file in files if fnmatchcase(file.rpartition("/")[2], pattern))


def as_patterns(files: Sequence[str | Path]) -> list[str]:
    """Escape paths for `datasets`, which takes them as patterns ("[1]" even in a folder's name)."""
    return [glob.escape(str(file)) for file in files]


def read_manifest(corpus: str | Path) -> dict[str, Any]:
    """The corpus' manifest; empty if there is none.

    Raises:
        ValueError: The manifest is broken.
    """
    system, folder = file_system(corpus)
    path = f"{folder}/manifest.json"
    if not system.isfile(path):
        return {}
    content = system.cat_file(path)
    try:
        found: Any = json.loads(content)
    except ValueError as error:
        found = error
    if not isinstance(found, dict):
        raise ValueError(
            f"{path} ({len(content)} bytes) does not describe a corpus: {found!r:.100}. Copy it again, or "
            "remove it and make the corpus again."
        )
    return found


def _records(rows: datasets.IterableDataset) -> Iterator[dict[str, Any]]:
    """The corpus' rows as records of `prepare_faces`, with encoded pictures."""
    import datasets

    rows = rows.select_columns(list(COLUMNS)).cast_column("image", datasets.Image(decode=False))
    for row in rows:
        yield {
            "image": row["image"]["bytes"],
            "landmarks": row["landmarks"],
            "occurrence": row["au_occurrence"],
            "intensities": row["au_intensities"],
            "person": row["identity"],
            "groups": {name: row[name] for name in GROUPS},
        }


def _column_names(file: str | Path) -> set[str]:
    import pyarrow.parquet

    with fsspec.open(str(file)) as stream:
        return set(pyarrow.parquet.read_schema(stream).names)


def _number_of_rows(file: str | Path) -> int:
    import pyarrow.parquet

    with fsspec.open(str(file)) as stream:
        return pyarrow.parquet.read_metadata(stream).num_rows


def _version(file: str | Path) -> list[Any]:
    """Name and size of a file, and its modification time or the storage's key of its content."""
    system, path = file_system(file)
    mark = Path(path).stat().st_mtime_ns if _is_local(system) else system.ukey(path)
    return [path.rpartition("/")[2], system.size(path), mark]


def _is_local(system: Any) -> bool:
    return isinstance(system, LocalFileSystem)
