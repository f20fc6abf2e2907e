"""The open synthetic corpus: rendered faces with exact AU intensities, written by `training/synthesize.py`.

    FOLDER/train-00000-of-00004.parquet ...  image, landmarks, au_intensities, au_occurrence, identity, groups
           validation-*.parquet, test-*.parquet
           manifest.json                     how it was made

People are apart between splits. Labels are blendshape gains from 0 to 1, not scores of FACS coders.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actionunits.action_units import CORPUS_AUS
from actionunits.data.aligned_faces import AlignedFaces, prepare_faces

if TYPE_CHECKING:
    import datasets

SPLITS = ("train", "validation", "test")
GROUPS = ("sex", "ethnicity", "age")
COLUMNS = ("image", "landmarks", "au_intensities", "au_occurrence", "identity", *GROUPS)
SCHEME = "ibug68"


def prepare_synthetic(
    corpus: str | Path,
    split: str,
    folder: str | Path,
    aligned_size: int = 200,
) -> AlignedFaces:
    """One split, decoded and aligned into `folder` (kept there for the next run).

    Args:
        corpus: The corpus' folder.
        split: "train", "validation" or "test".
        folder: Where the arrays go; one subfolder a split.
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
        key={"files": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]},
        aligned_size=aligned_size,
    )


def load_synthetic(corpus: str | Path, split: str) -> datasets.IterableDataset:
    """One split as a streaming data set with the corpus' features; "image" decodes to PIL.

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
        "parquet", data_files={split: [str(file) for file in files]}, split=split, streaming=True
    )


def split_files(corpus: str | Path, split: str) -> list[Path]:
    """The Parquet files of a split, in order.

    Raises:
        FileNotFoundError: There is no such folder, no file of this split, or not all of its files.
    """
    corpus = Path(corpus)
    if not corpus.is_dir():
        raise FileNotFoundError(
            f"{corpus} is no folder; render the corpus with training/synthesize.py first."
        )
    files = sorted(corpus.glob(f"{split}-*-of-*.parquet"))
    if not files:
        found = sorted(path.name for path in corpus.iterdir())[:8] or "nothing"
        raise FileNotFoundError(
            f"{corpus} has no {split}-*-of-*.parquet of the split {split!r}; it holds {found}."
        )
    expected = int(files[-1].stem.rpartition("-")[2])
    if len(files) != expected:
        raise FileNotFoundError(f"{corpus} has {len(files)} of {expected} files of the split {split!r}.")
    return files


def available_splits(corpus: str | Path) -> list[str]:
    """Which of `SPLITS` the folder has files of."""
    return [split for split in SPLITS if any(Path(corpus).glob(f"{split}-*-of-*.parquet"))]


def read_manifest(corpus: str | Path) -> dict[str, Any]:
    """What the corpus says of itself; empty where it has no manifest."""
    path = Path(corpus) / "manifest.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _records(rows: datasets.IterableDataset) -> Iterator[dict[str, Any]]:
    """The corpus' rows in the form of `prepare_faces`, pictures still encoded."""
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


def _column_names(file: Path) -> set[str]:
    import pyarrow.parquet

    return set(pyarrow.parquet.read_schema(file).names)


def _number_of_rows(file: Path) -> int:
    import pyarrow.parquet

    return pyarrow.parquet.read_metadata(file).num_rows
