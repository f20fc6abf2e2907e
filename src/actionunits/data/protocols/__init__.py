"""Who trains and who tests: subject lists, folds by the numberings of several code bases, crossings, samples.

The lists are data (`*.yaml` beside this file); what is not published is not invented: such folds come from a
file of yours. No person is ever on both sides of a split; whoever finds a way gets a ValueError.
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
"""Corpora that come with a partition of their own, and its names."""

SAMPLING_RATES = (0.1, 0.01, 0.005, 0.001)
"""Shares of BP4D's training frames in AUFormer's study of data efficiency (its Fig. 4)."""


@dataclass(frozen=True)
class SubjectSplit:
    """People to train and people to test on.

    Attributes:
        name: What is tested, such as "part3".
        train: People to train on.
        test: People to test on; nobody of `train`.
    """

    name: str
    train: frozenset[str]
    test: frozenset[str]

    def __post_init__(self) -> None:
        """Refuse a person on both sides."""
        check_subjects_apart(train=self.train, test=self.test)


@dataclass(frozen=True)
class Protocol:
    """Subject-exclusive folds of a corpus: every group is tested once, the others train.

    Attributes:
        corpus: Name of the corpus.
        title: What the protocol is called in the literature.
        groups: The people of each group.
        numberings: For each code base, its names of the folds and the group that each tests.
        default: The numbering of a bare number such as `fold=1`.
        source: Where the lists come from.
    """

    corpus: str
    title: str
    groups: Mapping[str, tuple[str, ...]]
    numberings: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    default: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        """Refuse a person in two groups and a fold that tests no group."""
        check_subjects_apart(**{name: set(people) for name, people in self.groups.items()})
        for numbering, folds in self.numberings.items():
            if strange := set(folds.values()) - set(self.groups):
                raise ValueError(f"numbering {numbering!r} tests {sorted(strange)}, which are no groups.")

    def split(self, fold: int | str) -> SubjectSplit:
        """The people of a fold.

        Args:
            fold: Number or name in the default numbering (1), "NUMBERING:NAME" ("fg-net:0"), a name that only
                one numbering has ("combine_1_2"), or the group to test ("part3").

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
    """Training on one corpus and testing on another.

    Attributes:
        name: Such as "bp4d->disfa".
        source: Corpus to train on.
        target: Corpus to test on.
        aus: Action units that both have, in output order.
        train: Part of the source: "all", or "train" of a fold or of the official partition.
        test: Part of the target: "all", or "test" of a fold or of the official partition.
        folds: The corpus whose fold is chosen; "" for none.
        paper: The table it makes.
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
    """The folds of a corpus: built in, or from a file of yours.

    Args:
        corpus: Its name.
        folds_file: CSV with the columns subject and fold (the fold in which the person is tested), or YAML
            with a list of people for each fold.

    Raises:
        ValueError: No lists are known and no file is given, or the file has another form.
    """
    if folds_file is not None:
        return read_folds(corpus, Path(folds_file))
    if corpus in PROTOCOLS:
        return PROTOCOLS[corpus]
    why = UNPUBLISHED.get(corpus, f"{corpus} has no folds")
    raise ValueError(f"{why}. Pass folds_file=..., a CSV with the columns subject and fold.")


def read_folds(corpus: str, path: Path) -> Protocol:
    """Folds from a CSV (subject, fold) or YAML ({fold: [subjects]}) file."""
    groups: dict[str, list[str]] = {}
    if path.suffix.lower() in (".yaml", ".yml"):
        groups = {str(fold): list(map(str, people)) for fold, people in (_read_yaml(path) or {}).items()}
    else:
        with path.open(newline="", encoding="utf-8-sig") as file:
            for row in csv.DictReader(file):
                if not row.get("subject") or not row.get("fold"):
                    raise ValueError(f"{path} must have the columns subject and fold, got {row}.")
                groups.setdefault(row["fold"].strip(), []).append(row["subject"].strip())
    if len(groups) < 2:
        raise ValueError(f"{path} names {len(groups)} folds; two are the least.")
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
        subjects: The person of each row.
        official: The official partition of each row, "" where there is none.
        fold: Fold of the protocol; None takes the official partition.
        folds_file: Folds that are not built in.

    Returns:
        "train" and "test" (or what the official partition calls them), in the rows' order.

    Raises:
        ValueError: No such fold or partition, a person that the lists do not know, a side without rows, or a
            person on two sides.
    """
    people = np.asarray(subjects, dtype=object)
    if corpus in OFFICIAL and folds_file is None:
        if fold is not None:
            raise ValueError(f"{corpus} has an official partition and no folds; leave fold={fold!r} out.")
        names = np.asarray(official, dtype=object)
        if not (found := [split for split in OFFICIAL[corpus] if (names == split).any()]):
            raise ValueError(f"{corpus}: no row names a split of {list(OFFICIAL[corpus])}.")
        if outside := int((~np.isin(names.astype(str), OFFICIAL[corpus])).sum()):
            logger.warning("%s: %d of %d rows name no split and are in none", corpus, outside, len(names))
        splits = {split: np.flatnonzero(names == split) for split in found}
    elif fold is None:
        raise ValueError(
            f"{corpus} is split by folds: pass fold=... ({get_protocol(corpus, folds_file).title})."
        )
    else:
        protocol = get_protocol(corpus, folds_file)
        sides = protocol.split(fold)
        if strange := sorted(set(people) - sides.train - sides.test):
            raise ValueError(
                f"{protocol.title} does not list {len(strange)} people of the disc: {strange[:8]}."
            )
        splits = {
            "train": np.flatnonzero([person in sides.train for person in people]),
            "test": np.flatnonzero([person in sides.test for person in people]),
        }
    if empty := [split for split, rows in splits.items() if not len(rows)]:
        raise ValueError(
            f"{corpus}: nobody of {empty} is on the disc; `actionunits corpus check` says who is."
        )
    check_subjects_apart(**{split: set(people[rows]) for split, rows in splits.items()})
    return splits


def check_subjects_apart(**splits: Iterable[str]) -> None:
    """Refuse splits that share a person, for a network that knows the face knows the answer.

    Raises:
        ValueError: A person is in two splits.
    """
    seen: dict[str, str] = {}
    for split, people in splits.items():
        for person in sorted(set(people)):
            if person in seen:
                raise ValueError(f"{person!r} is both in {seen[person]} and {split}; split by person.")
            seen[person] = split


def hold_out(people: Iterable[str], share: float) -> frozenset[str]:
    """Some of these people for validation, the same ones on every machine.

    Args:
        people: Names; the order does not matter.
        share: Part to hold out, in (0, 1); at least one person, at most all but one.

    Raises:
        ValueError: The share is out of range or there are fewer than two people.
    """
    names = sorted(set(people), key=lambda name: hashlib.sha256(name.encode()).digest())
    if not 0 < share < 1 or len(names) < 2:
        raise ValueError(f"cannot hold out {share} of {len(names)} people.")
    return frozenset(names[: min(max(1, math.ceil(share * len(names))), len(names) - 1)])


def equidistant(count: int, rate: float) -> np.ndarray:
    """Indices of an equidistant sample: 0.1 takes every tenth, from the first on (AUFormer Sec. 4.2).

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
    """Hold people out of the training rows for validation, then thin these rows.

    Args:
        splits: Row indices by split, with "train".
        people: The person of every row.
        validation: Share of the training people to hold out as "validation"; 0 for none.
        sample: Equidistant share of the training rows.

    Raises:
        ValueError: The partition has a validation part already, or a share is out of range.
    """
    splits = dict(splits)
    if validation:
        if "validation" in splits:
            raise ValueError("the official partition has a validation part; hold nobody else out.")
        training = np.asarray(people, dtype=object)[splits["train"]]
        held = np.isin(training, list(hold_out(training, validation)))
        splits["train"], splits["validation"] = splits["train"][~held], splits["train"][held]
    if sample != 1:
        splits["train"] = splits["train"][equidistant(len(splits["train"]), sample)]
    return splits


def rows_of_tables(corpus: str) -> list[dict[str, Any]]:
    """The rows of the papers' result tables that use a corpus: paper, table, corpora, needs, figure."""
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
"""Folds that papers use and nobody lists."""
