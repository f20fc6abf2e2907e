"""The open synthetic corpus of `training/synthesize.py`, read by `actionunits.data.synthetic`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from actionunits.action_units import CORPUS_AUS
from actionunits.data.corpora.base import CheckReport, Corpus, Selection
from actionunits.data.synthetic import (
    SPLITS,
    as_patterns,
    available_splits,
    load_synthetic,
    read_manifest,
    split_files,
)


class Synthetic(Corpus):
    """Rendered faces with exact intensities, with the pictures inside the Parquet files."""

    name = "synthetic"
    title = "the synthetic corpus"
    aus = CORPUS_AUS["synthetic"]
    homepage = "training/README.md"
    licence = "that of the head model and the photographs, see the manifest"
    citation = ""
    layout = """\
DIR/
  train-00000-of-00004.parquet ...   image, landmarks, au_intensities, au_occurrence, identity, sex, ...
  validation-*.parquet, test-*.parquet
  manifest.json                      how it was made (`training/synthesize.py` writes all of it)"""
    traps = ("Labels are blendshape gains from 0 to 1, not scores of FACS coders.",)

    def recognize(self, root: Path) -> None:
        """Raise `WrongCorpusError` unless there are Parquet files of a split."""
        self.require(root, root.is_dir() and available_splits(root), "train-*-of-*.parquet")

    def label_files(self, root: Path) -> list[Path]:
        """The Parquet files."""
        return [path for split in available_splits(root) for path in split_files(root, split)]

    def features(self, selection: Selection) -> Any:
        """None: the Parquet files have their own."""
        return None

    def rows(self, root: Path, selection: Selection) -> Iterator[dict[str, Any]]:
        """Rows of all splits, with decoded pictures."""
        for split in available_splits(root):
            yield from load_synthetic(root, split)

    def load(self, root: Path, split: str | None, cache_dir: str | Path | None = None) -> Any:
        """Load one split, or all, with `datasets`."""
        import datasets

        files = {name: as_patterns(split_files(root, name)) for name in available_splits(root)}
        if split is not None and split not in files:
            raise ValueError(f"{root} has no split {split!r}; it has {sorted(files)}.")
        cache = None if cache_dir is None else str(cache_dir)
        return datasets.load_dataset("parquet", data_files=files, split=split, cache_dir=cache)

    def check(self, root: Path, folds_file: str | Path | None = None) -> CheckReport:
        """Count the pictures and subjects of each split."""
        import pyarrow.parquet

        root = Path(root)
        self.recognize(root)
        report = CheckReport(self.name, str(root))
        for split in available_splits(root):
            people: set[str] = set()
            count = 0
            for path in split_files(root, split):
                names = pyarrow.parquet.read_table(path, columns=["identity"])["identity"].to_pylist()
                people.update(names)
                count += len(names)
            report.found |= {f"pictures, {split}": count, f"people, {split}": len(people)}
        report.found["usable"] = sum(v for name, v in report.found.items() if name.startswith("pictures"))
        report.problems = [f"no split {s}" for s in SPLITS if s not in available_splits(root)]
        if not read_manifest(root):
            report.problems.append("no manifest.json, so its origin is unknown")
        report.has = ["pictures", "landmarks", "split"]
        return report

    def write_tiny(self, root: Path) -> None:
        """Not supported: the corpus itself is free.

        Raises:
            ValueError: Always.
        """
        raise ValueError("render the synthetic corpus with training/synthesize.py; it needs no licence.")
