"""Evaluation protocols: subject-exclusive folds with several numberings, and crossings of corpora.

The subject lists are in the `*.yaml` files beside this one. Folds that are not published must be given as a
file. Splits that share a subject raise a ValueError.
"""

from __future__ import annotations

import csv
import hashlib
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

logger = logging.getLogger(__name__)

OFFICIAL = {
    "gft": ("train", "test"),
    "aff_wild2": ("train", "validation"),
    "fec": ("train", "test"),
    "folder": ("train", "validation", "test"),
    "synthetic": ("train", "validation", "test"),
}
"""Corpora with an official partition, and the names of its splits."""

SAMPLING_RATES = (0.1, 0.01, 0.005, 0.001)
"""Shares of BP4D's training frames in AUFormer's study of data efficiency (its Fig. 4)."""


@dataclass(frozen=True)
class SubjectSplit:
    """Training and test subjects, which are disjoint.

    Attributes:
        name: Name of the tested group, such as "part3".
        train: Training subjects.
        test: Test subjects.
    """

    name: str
    train: frozenset[str]
    test: frozenset[str]

    def __post_init__(self) -> None:
        """Check that the subjects are disjoint."""
        check_subjects_apart(train=self.train, test=self.test)


@dataclass(frozen=True)
class Protocol:
    """Subject-exclusive folds of a corpus: each tests one group of subjects and trains on the others.

    Attributes:
        corpus: Name of the corpus.
        title: Name of the protocol in the literature.
        groups: The subjects of each group.
        numberings: For each code base, its names of the folds with the group that each tests.
        default: The numbering of a bare number such as `fold=1`.
        source: Source of the lists.
    """

    corpus: str
    title: str
    groups: Mapping[str, tuple[str, ...]]
    numberings: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    default: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        """Check that groups are disjoint and every fold tests one of them."""
        check_subjects_apart(**{name: set(people) for name, people in self.groups.items()})
        for numbering, folds in self.numberings.items():
            if strange := set(folds.values()) - set(self.groups):
                raise ValueError(f"numbering {numbering!r} tests {sorted(strange)}, which are not groups.")

    def split(self, fold: int | str) -> SubjectSplit:
        """The subjects of a fold.

        Args:
            fold: Number or name in the default numbering (1), "NUMBERING:NAME" ("fg-net:0"), a name in
                any numbering that is not a number ("combine_1_2"), or the group to test ("part3").

        Raises:
            ValueError: There is no such fold.
        """
        group = self.tested_group(fold)
        test = frozenset(self.groups[group])
        everybody = frozenset(person for people in self.groups.values() for person in people)
        return SubjectSplit(group, everybody - test, test)

    def tested_group(self, fold: int | str) -> str:
        """The group that a fold tests; see `split`."""
        name = str(fold)
        if name in self.groups:
            return name
        numbering, colon, number = name.rpartition(":")
        if colon and numbering in self.numberings and number in self.numberings[numbering]:
            return self.numberings[numbering][number]
        if not colon:
            candidates = [self.default, *self.numberings] if self.default else list(self.numberings)
            for candidate in candidates:
                folds = self.numberings[candidate]
                if name in folds and (candidate == self.default or not name.isdigit()):
                    return folds[name]
        known = {numbering: list(folds) for numbering, folds in self.numberings.items()}
        raise ValueError(
            f"{self.title} has no fold {fold!r}; groups {list(self.groups)}, numberings {known} "
            f"(a bare number is {self.default or 'a group'}'s)."
        )


@dataclass(frozen=True)
class Crossing:
    """A cross-corpus protocol: training on one corpus and test on another.

    Attributes:
        name: Such as "bp4d->disfa".
        source: Corpus to train on.
        target: Corpus to test on.
        aus: Action units that both have, in output order.
        train: Part of the source: "all", or "train" of a fold or of the official partition.
        test: Part of the target: "all", or "test" of a fold or of the official partition.
        folds: The corpus whose fold is chosen; "" for none.
        paper: The paper's table.
    """

    name: str
    source: str
    target: str
    aus: tuple[int, ...]
    train: str
    test: str
    folds: str
    paper: str


def get_protocol(corpus: str, folds_file: str | Path | None = None) -> Protocol:
    """The folds of a corpus, built in or from a file.

    Args:
        corpus: Its name.
        folds_file: CSV with the columns subject and fold (that tests the subject), or YAML with a list of
            test subjects for each fold.

    Raises:
        ValueError: No lists are built in and no file is given, or the file has another format.
    """
    if folds_file is not None:
        return read_folds(corpus, Path(folds_file))
    if corpus in PROTOCOLS:
        return PROTOCOLS[corpus]
    why = UNPUBLISHED.get(corpus, f"{corpus} has no folds")
    raise ValueError(f"{why}. Pass folds_file=..., a CSV with the columns subject and fold.")


def read_folds(corpus: str, path: Path) -> Protocol:
    """Folds from a CSV (subject, fold) or YAML ({fold: [subjects]}) file.

    Raises:
        ValueError: The file has another form or fewer than two folds, or a subject is in two folds.
    """
    groups: dict[str, list[str]] = {}
    if path.suffix.lower() in (".yaml", ".yml"):
        # Texts only: as numbers, people such as 001 would become 1.
        groups = yaml.load(path.read_text(encoding="utf-8-sig"), yaml.BaseLoader) or {}
        if not isinstance(groups, dict) or not all(isinstance(people, list) for people in groups.values()):
            raise ValueError(
                f"{path} must map each fold to a list of subjects, such as 'part1: [F001, M002]'."
            )
    else:
        with path.open(newline="", encoding="utf-8-sig") as file:
            for row in csv.DictReader(file):
                if not row.get("subject") or not row.get("fold"):
                    raise ValueError(f"{path} must have the columns subject and fold, got {row}.")
                groups.setdefault(row["fold"].strip(), []).append(row["subject"].strip())
    if len(groups) < 2:
        raise ValueError(f"{path} has {len(groups)} folds; at least two are needed.")
    return Protocol(
        corpus, f"{corpus} by {path.name}", {n: tuple(p) for n, p in groups.items()}, source=str(path)
    )


def split_rows(
    corpus: str,
    subjects: Sequence[str] | np.ndarray,
    official: Sequence[str] | np.ndarray,
    fold: int | str | None = None,
    folds_file: str | Path | None = None,
) -> dict[str, np.ndarray]:
    """Indices of the rows of each split.

    Args:
        corpus: Name of the corpus.
        subjects: The subject of each row.
        official: The official split of each row, "" where there is none.
        fold: Fold of the protocol; None for the official partition.
        folds_file: Folds that are not built in.

    Returns:
        Row indices of "train" and "test" (or of the official splits), in ascending order.

    Raises:
        ValueError: There is no such fold or partition, a subject is not listed, a split is empty, or a
            subject is in two splits.
    """
    people = np.asarray(subjects, dtype=object)
    if corpus in OFFICIAL and folds_file is None:
        if fold is not None:
            raise ValueError(f"{corpus} has an official partition and no folds; leave fold={fold!r} out.")
        splits = _official_rows(corpus, np.asarray(official, dtype=object))
    else:
        splits = _fold_rows(corpus, get_protocol(corpus, folds_file), people, fold)
    if empty := [split for split, rows in splits.items() if not len(rows)]:
        raise ValueError(
            f"{corpus}: nobody of {empty} is in the folder; `actionunits corpus check` says who is."
        )
    check_subjects_apart(**{split: set(people[rows]) for split, rows in splits.items()})
    return splits


def _official_rows(corpus: str, names: np.ndarray) -> dict[str, np.ndarray]:
    if not (found := [split for split in OFFICIAL[corpus] if (names == split).any()]):
        raise ValueError(f"{corpus}: no row is in one of the splits {list(OFFICIAL[corpus])}.")
    if outside := int((~np.isin(names.astype(str), OFFICIAL[corpus])).sum()):
        logger.warning("%s: %d of %d rows name no split and are left out", corpus, outside, len(names))
    return {split: np.flatnonzero(names == split) for split in found}


def _fold_rows(
    corpus: str, protocol: Protocol, people: np.ndarray, fold: int | str | None
) -> dict[str, np.ndarray]:
    if fold is None:
        raise ValueError(f"{corpus} is split by folds: pass fold=... ({protocol.title}).")
    split = protocol.split(fold)
    if strange := sorted(set(people) - split.train - split.test):
        raise ValueError(f"{protocol.title} does not list {len(strange)} subjects: {strange[:8]}.")
    sides = {"train": split.train, "test": split.test}
    return {side: np.flatnonzero([person in names for person in people]) for side, names in sides.items()}


def check_subjects_apart(**splits: Iterable[str]) -> None:
    """Check that splits are subject-exclusive.

    Raises:
        ValueError: A subject is in two splits.
    """
    seen: dict[str, str] = {}
    for split, people in splits.items():
        for person in sorted(set(people)):
            if person in seen:
                raise ValueError(f"{person!r} is both in {seen[person]} and {split}; split by subject.")
            seen[person] = split


def hold_out(people: Iterable[str], share: float) -> frozenset[str]:
    """Choose subjects for validation by a hash of their names.

    Args:
        people: Names of the subjects, in any order.
        share: Share to hold out, in (0, 1); at least one subject, at most all but one.

    Raises:
        ValueError: The share is out of range, or there are fewer than two subjects.
    """
    names = sorted(set(people), key=lambda name: hashlib.sha256(name.encode()).digest())
    if not 0 < share < 1 or len(names) < 2:
        raise ValueError(f"cannot hold out {share} of {len(names)} subjects.")
    wanted = max(1, math.ceil(round(share * len(names), 6)))
    return frozenset(names[: min(wanted, len(names) - 1)])


def equidistant(count: int, rate: float) -> np.ndarray:
    """Indices of an equidistant sample: 0.1 takes every tenth, starting with the first (AUFormer Sec. 4.2).

    Raises:
        ValueError: The rate is not in (0, 1].
    """
    if not 0 < rate <= 1:
        raise ValueError(f"the sampling rate {rate} must lie in (0, 1].")
    wanted = math.ceil(round(count * rate, 6))
    return np.floor(np.arange(wanted) / rate + 1e-6).astype(int)


def refine(
    splits: Mapping[str, np.ndarray],
    people: Sequence[str] | np.ndarray,
    validation: float = 0.0,
    sample: float = 1.0,
) -> dict[str, np.ndarray]:
    """Hold out training subjects for validation, then subsample the training rows.

    Args:
        splits: Row indices by split, with "train".
        people: The subject of every row.
        validation: Share of the training subjects to hold out as "validation".
        sample: Equidistant share of the training rows.

    Raises:
        ValueError: There is a validation split already, or a share is out of range.
    """
    splits = dict(splits)
    if validation:
        if "validation" in splits:
            raise ValueError("the official partition has a validation split; leave validation out.")
        training = np.asarray(people, dtype=object)[splits["train"]]
        held = np.isin(training, list(hold_out(training, validation)))
        splits["train"], splits["validation"] = splits["train"][~held], splits["train"][held]
    if sample != 1:
        splits["train"] = splits["train"][equidistant(len(splits["train"]), sample)]
    return splits


def rows_of_tables(corpus: str) -> list[dict[str, Any]]:
    """Rows of the papers' result tables on a corpus: paper, table, method, corpora, needs, f1 [%]."""
    return [row for row in _TABLES if corpus in row["corpora"]]


def _read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _read_protocol(path: Path) -> Protocol:
    values = _read_yaml(path)
    groups = {name: tuple(text.split()) for name, text in values.pop("groups").items()}
    numberings = {
        name: {str(fold): group for fold, group in folds.items()}
        for name, folds in values.pop("numberings").items()
    }
    return Protocol(groups=groups, numberings=numberings, **values)


_HERE = Path(__file__).parent
_TABLES: list[dict[str, Any]] = _read_yaml(_HERE / "tables.yaml")

PROTOCOLS: dict[str, Protocol] = {
    path.stem: _read_protocol(path)
    for path in map(_HERE.joinpath, ("bp4d.yaml", "bp4d_plus.yaml", "disfa.yaml"))
}
"""Built-in folds by corpus."""

CROSSINGS: dict[str, Crossing] = {
    values["name"]: Crossing(**{**values, "aus": tuple(values["aus"])})
    for values in _read_yaml(_HERE / "crossings.yaml")
}
"""Built-in cross-corpus protocols by name."""

UNPUBLISHED = {
    "casme2": "the subject lists of CASME II's four folds (AUFormer, ASP, DVASP) are not published",
}
"""Corpora whose folds in papers are not published."""
