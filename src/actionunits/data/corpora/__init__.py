"""The corpora of the field, read as they lie on their holders' discs.

    from actionunits.data.corpora import load_corpus

    fold = load_corpus("bp4d", "/discs/BP4D", fold=1)          # {"train": ..., "test": ...} by person
    fold["train"][0]["image"], fold["train"][0]["occurrence"]  # the picture stays where it is

`actionunits corpus layout NAME` shows what a disc must look like, `actionunits corpus check NAME DIR` what
yours has. Facts about a corpus (citation, licence, counts, traps) are attributes of its class in `CORPORA`.
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
"""The corpora by name."""


def get_corpus(name: str) -> Corpus:
    """A corpus by its name.

    Raises:
        ValueError: There is none of this name.
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
    """A corpus through the `datasets` library. Pictures stay where they are; the cache holds their paths.

    Args:
        name: One of `CORPORA`.
        data_dir: The corpus' folder (`actionunits corpus layout NAME`).
        fold: Fold to test: a number of the default numbering, "NUMBERING:NAME" or a group
            (`actionunits.data.protocols`). Corpora with an official partition have none.
        split: "train" or "test" (or what the official partition calls it), "validation" where `validation` is
            above 0, "full" for all rows; None for a dictionary of all splits.
        aus: Action units of the label columns; those of the literature by default.
        frames: "all" coded frames, a published list ("jaanet" of bp4d and disfa), or a file of such a list.
        min_intensity: Intensity (1 to 5) from which on an action unit occurs; DISFA alone has intensities.
        sample: Equidistant share of the training rows, such as 0.01 (AUFormer Sec. 4.2).
        validation: Share of the training people to hold out as the split "validation".
        folds_file: Subject lists where none are built in: CSV with the columns subject and fold.
        cache_dir: Where the Arrow cache goes; that of `datasets` by default.

    Returns:
        The split, or all of them. Without `fold`, a corpus with folds and no official partition comes whole.

    Raises:
        WrongCorpusError: The folder holds something else.
        ValueError: No such corpus, fold or split; a person on two sides; a label that no corpus uses.
        FileNotFoundError: The frame list's files are not there.
        ImportError: The library `datasets` is missing.
    """
    corpus, root = get_corpus(name), Path(data_dir)
    if importlib.util.find_spec("datasets") is None:
        raise ImportError('corpora are read through datasets: pip install "actionunits[train]".')
    corpus.recognize(root)
    if isinstance(corpus, Synthetic):
        if fold is not None:
            raise ValueError(f"the synthetic corpus has splits and no folds; leave fold={fold!r} out.")
        if aus is not None or frames != "all" or sample != 1 or validation:
            raise ValueError(
                "the synthetic corpus comes whole: leave aus, frames, sample and validation out."
            )
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
    if validation and not corpus.subjects:
        raise ValueError(f"{name} names no people, so nobody can be held out; leave validation out.")
    splits = _splits(corpus, everything, fold, folds_file)
    people = everything["subject"][:] if corpus.subjects else []
    rows = refine(splits, people, validation, sample)
    if split is None:
        import datasets

        return datasets.DatasetDict({key: everything.select(indices) for key, indices in rows.items()})
    if split not in rows:
        raise ValueError(f"{name} has no split {split!r} here; it has {[*rows, FULL]}.")
    return everything.select(rows[split])


def load_crossing(
    name: str, source_dir: str | Path, target_dir: str | Path, fold: int | str | None = None, **options: Any
) -> datasets.DatasetDict:
    """Two corpora to train on one and test on the other, with the action units that both have.

    Args:
        name: One of `actionunits.data.protocols.CROSSINGS`, such as "bp4d->disfa".
        source_dir: Folder of the corpus to train on.
        target_dir: Folder of the corpus to test on.
        fold: Fold of the corpus that the crossing takes folds of.
        options: More arguments of `load_corpus`, for both; `sample` for the training rows alone.

    Raises:
        ValueError: No such crossing, or a fold is needed (or none exists).
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
    corpus: Corpus, rows: datasets.Dataset, fold: int | str | None, folds_file: str | Path | None
) -> dict[str, np.ndarray]:
    if not corpus.subjects:  # triplets of strangers: the files say which part they are
        official = np.asarray(rows["split"][:])
        return {name: np.flatnonzero(official == name) for name in sorted(set(official))}
    return split_rows(corpus.name, rows["subject"][:], rows["split"][:], fold, folds_file)
