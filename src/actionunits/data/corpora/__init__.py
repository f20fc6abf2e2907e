"""Load the corpora of the field from the files that their holders distribute.

    from actionunits.data.corpora import load_corpus

    fold = load_corpus("bp4d", "/discs/BP4D", fold=1)          # {"train": ..., "test": ...} by subject
    fold["train"][0]["image"], fold["train"][0]["occurrence"]  # pictures are read from their original files

`actionunits corpus layout NAME` shows the expected files, `actionunits corpus check NAME DIR` what is there.
Facts about a corpus (citation, licence, counts, traps) are attributes of its class in `CORPORA`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actionunits.data.corpora.aff_wild2 import AffWild2
from actionunits.data.corpora.base import (
    AUCorpus,
    CheckReport,
    Corpus,
    Recording,
    Selection,
    WrongCorpusError,
)
from actionunits.data.corpora.bp4d import Bp4d, Bp4dPlus
from actionunits.data.corpora.casme2 import Casme2
from actionunits.data.corpora.disfa import Disfa
from actionunits.data.corpora.fec import Fec
from actionunits.data.corpora.folder import Folder
from actionunits.data.corpora.gft import Gft
from actionunits.data.corpora.ms_celeb import MsCeleb
from actionunits.data.corpora.synthetic import Synthetic
from actionunits.data.protocols import CROSSINGS, OFFICIAL, equidistant, refine, split_rows

if TYPE_CHECKING:
    import datasets

__all__ = [
    "CORPORA",
    "AUCorpus",
    "CheckReport",
    "Corpus",
    "WrongCorpusError",
    "Recording",
    "Selection",
    "get_corpus",
    "load_corpus",
    "load_crossing",
]

CORPORA: dict[str, Corpus] = {
    corpus.name: corpus
    for corpus in (
        Bp4d(),
        Bp4dPlus(),
        Disfa(),
        Gft(),
        AffWild2(),
        Casme2(),
        Fec(),
        MsCeleb(),
        Synthetic(),
        Folder(),
    )
}
"""The corpora, by name."""


def get_corpus(name: str) -> Corpus:
    """The corpus of a name.

    Raises:
        ValueError: There is none.
    """
    if name not in CORPORA:
        raise ValueError(f"Unknown corpus {name!r}; known: {list(CORPORA)}.")
    return CORPORA[name]


def load_corpus(
    name: str,
    data_dir: str | Path,
    fold: int | str | None = None,
    split: str | None = None,
    *,
    aus: Sequence[int] | None = None,
    frames: str = "all",
    min_intensity: int = 2,
    sample: float = 1.0,
    validation: float = 0.0,
    folds_file: str | Path | None = None,
    cache_dir: str | Path | None = None,
) -> datasets.Dataset | datasets.DatasetDict:
    """Load a corpus with the `datasets` library, whose cache holds the paths of the pictures.

    Args:
        name: One of `CORPORA`.
        data_dir: Folder of the corpus (`actionunits corpus layout NAME`).
        fold: Fold to test: a number of the default numbering, "NUMBERING:NAME" or a group
            (`actionunits.data.protocols`). Corpora with an official partition have none.
        split: "train" or "test" (or another official split), "validation" if `validation` is above 0, "full"
            for all rows; None for a dictionary of all splits.
        aus: FACS numbers of the label columns; by default those evaluated in the literature.
        frames: "all" coded frames, a published list ("jaanet" for bp4d and disfa), or a list's file.
        min_intensity: Intensity (1 to 5) from which on an action unit occurs; DISFA alone has intensities.
        sample: Equidistant share of the training rows, such as 0.01 (AUFormer Sec. 4.2).
        validation: Share of the training subjects to hold out as the split "validation".
        folds_file: Subject lists where none are built in: CSV with the columns subject and fold.
        cache_dir: Folder of the Arrow cache; by default that of `datasets`.

    Returns:
        The split, or all of them. Without `fold`, a corpus without an official partition is not split.

    Raises:
        WrongCorpusError: The folder holds something else.
        ValueError: There is no such corpus, fold or split, a subject is in two splits, or a label is invalid.
        FileNotFoundError: The frame list is missing.
        ImportError: `datasets` is not installed.
    """
    corpus, root = get_corpus(name), Path(data_dir)
    if importlib.util.find_spec("datasets") is None:
        raise ImportError('corpora are read through datasets: pip install "actionunits[train]".')
    corpus.recognize(root)
    if isinstance(corpus, Synthetic):
        if fold is not None:
            raise ValueError(f"the synthetic corpus has splits and no folds; leave fold={fold!r} out.")
        if aus is not None or frames != "all" or sample != 1 or validation:
            raise ValueError("leave aus, frames, sample and validation out for the synthetic corpus.")
        return corpus.load(root, split, cache_dir)
    from actionunits.data.corpora.builder import FULL, read_rows

    selection = corpus.select(root, aus, frames=frames, min_intensity=min_intensity)
    everything = read_rows(corpus, root, selection, cache_dir)
    if split == FULL or (split is None and fold is None and name not in OFFICIAL):
        if sample != 1 or validation:
            raise ValueError(
                f"sample={sample} and validation={validation} are shares of the training rows; "
                "give a fold, or leave them out."
            )
        return everything
    rows = _splits(corpus, everything, fold, folds_file, validation, sample)
    if split is None:
        import datasets

        return datasets.DatasetDict({key: everything.select(indices) for key, indices in rows.items()})
    if split not in rows:
        raise ValueError(f"{name} has no split {split!r} here; it has {[*rows, FULL]}.")
    return everything.select(rows[split])


def load_crossing(
    name: str, source_dir: str | Path, target_dir: str | Path, fold: int | str | None = None, **options: Any
) -> datasets.DatasetDict:
    """Load two corpora to train on one and test on the other, with their shared action units.

    Args:
        name: One of `actionunits.data.protocols.CROSSINGS`, such as "bp4d->disfa".
        source_dir: Folder of the training corpus.
        target_dir: Folder of the test corpus.
        fold: Fold of the corpus `crossing.folds`.
        options: Other arguments of `load_corpus`, for both; `sample` for the training rows only.

    Raises:
        ValueError: There is no such crossing, or a fold is needed (or none exists).
    """
    import datasets

    if name not in CROSSINGS:
        raise ValueError(f"Unknown crossing {name!r}; known: {list(CROSSINGS)}.")
    crossing = CROSSINGS[name]
    if (fold is None) == bool(crossing.folds):
        raise ValueError(
            f"{name} {f'needs fold=..., of {crossing.folds}' if crossing.folds else 'has no folds'}."
        )
    sides = {
        "train": (crossing.source, source_dir, crossing.train),
        "test": (crossing.target, target_dir, crossing.test),
    }
    found, sample = {}, options.pop("sample", 1.0)
    for side, (corpus, folder, part) in sides.items():
        own_fold = fold if corpus == crossing.folds and part != "all" else None
        split = "full" if part == "all" else part
        found[side] = load_corpus(corpus, folder, own_fold, split, aus=crossing.aus, **options)
    found["train"] = found["train"].select(equidistant(len(found["train"]), sample))
    return datasets.DatasetDict(found)


def _splits(
    corpus: Corpus,
    rows: datasets.Dataset,
    fold: int | str | None,
    folds_file: str | Path | None,
    validation: float,
    sample: float,
) -> dict[str, np.ndarray]:
    """Row indices by split."""
    official = rows["split"][:]
    if corpus.subjects:
        people = rows["subject"][:]
        splits = split_rows(corpus.name, people, official, fold, folds_file)
        return refine(splits, people, validation, sample)
    if validation:
        raise ValueError(f"{corpus.name} names no subjects, so none can be held out; leave validation out.")
    names = np.asarray(official)
    return refine({name: np.flatnonzero(names == name) for name in sorted(set(official))}, [], sample=sample)
