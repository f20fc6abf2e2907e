"""Facial action units as tables: what FACS calls them, which muscles make them, which corpus codes them.

Names and muscles follow the Facial Action Coding System of Ekman, Friesen and Hager (1978, revised 2002).
The corpora's lists are the action units that the literature evaluates on them, in the order of its tables.
"""

import operator
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

UNKNOWN = -1
"""Label of an action unit that nobody coded (1 occurs, 0 does not); losses and metrics leave it out."""


@dataclass(frozen=True)
class ActionUnit:
    """One action unit of FACS.

    Attributes:
        number: FACS number.
        name: FACS name in lower case, such as "lip corner puller".
        muscles: Latin names of the muscles that move the face; empty where FACS names none.
    """

    number: int
    name: str
    muscles: tuple[str, ...]

    @property
    def label(self) -> str:
        """The name used in label maps and file columns, such as "AU12"."""
        return au_label(self.number)


_FACS: tuple[tuple[int, str, tuple[str, ...]], ...] = (
    # upper face
    (1, "inner brow raiser", ("frontalis pars medialis",)),
    (2, "outer brow raiser", ("frontalis pars lateralis",)),
    (4, "brow lowerer", ("corrugator supercilii", "depressor supercilii", "depressor glabellae")),
    (5, "upper lid raiser", ("levator palpebrae superioris",)),
    (6, "cheek raiser", ("orbicularis oculi pars orbitalis",)),
    (7, "lid tightener", ("orbicularis oculi pars palpebralis",)),
    (43, "eyes closed", ("levator palpebrae superioris", "orbicularis oculi pars palpebralis")),
    (45, "blink", ("levator palpebrae superioris", "orbicularis oculi pars palpebralis")),
    (46, "wink", ("levator palpebrae superioris", "orbicularis oculi pars palpebralis")),
    # nose
    (9, "nose wrinkler", ("levator labii superioris alaeque nasi",)),
    (38, "nostril dilator", ("nasalis pars alaris",)),
    (39, "nostril compressor", ("nasalis pars transversa", "depressor septi nasi")),
    # lower face: up and down
    (10, "upper lip raiser", ("levator labii superioris",)),
    (15, "lip corner depressor", ("depressor anguli oris",)),
    (16, "lower lip depressor", ("depressor labii inferioris",)),
    (17, "chin raiser", ("mentalis",)),
    (25, "lips part", ("depressor labii inferioris", "mentalis", "orbicularis oris")),
    (26, "jaw drop", ("masseter", "temporalis", "pterygoideus medialis")),
    (27, "mouth stretch", ("pterygoideus lateralis", "digastricus")),
    # lower face: sideways and oblique
    (11, "nasolabial deepener", ("zygomaticus minor",)),
    (12, "lip corner puller", ("zygomaticus major",)),
    (13, "sharp lip puller", ("levator anguli oris",)),
    (14, "dimpler", ("buccinator",)),
    (20, "lip stretcher", ("risorius", "platysma")),
    (21, "neck tightener", ("platysma",)),
    # lower face: around the mouth
    (8, "lips toward each other", ("orbicularis oris",)),
    (18, "lip pucker", ("incisivus labii superioris", "incisivus labii inferioris")),
    (22, "lip funneler", ("orbicularis oris",)),
    (23, "lip tightener", ("orbicularis oris",)),
    (24, "lip pressor", ("orbicularis oris",)),
    (28, "lip suck", ("orbicularis oris",)),
    # FACS describes these by what they look like
    (19, "tongue show", ()),
    (29, "jaw thrust", ()),
    (30, "jaw sideways", ()),
    (31, "jaw clencher", ("masseter",)),
    (32, "lip bite", ()),
    (33, "cheek blow", ()),
    (34, "cheek puff", ()),
    (35, "cheek suck", ()),
    (36, "tongue bulge", ()),
    (37, "lip wipe", ()),
)

ACTION_UNITS: dict[int, ActionUnit] = {
    number: ActionUnit(number, name, muscles) for number, name, muscles in sorted(_FACS)
}
"""Every action unit the package knows, by FACS number."""

CORPUS_AUS: dict[str, tuple[int, ...]] = {
    "bp4d": (1, 2, 4, 6, 7, 10, 12, 14, 15, 17, 23, 24),
    "bp4d+": (1, 2, 4, 6, 7, 10, 12, 14, 15, 17, 23, 24),
    "disfa": (1, 2, 4, 6, 9, 12, 25, 26),
    "gft": (1, 2, 4, 6, 10, 12, 14, 15, 23, 24),
    "aff-wild2": (1, 2, 4, 6, 7, 10, 12, 15, 23, 24, 25, 26),
    "casme2": (1, 2, 4, 7, 12, 14, 15, 17),
    "synthetic": (1, 2, 4, 5, 6, 7, 9, 10, 12, 14, 15, 17, 20, 23, 24, 25, 26),
}
"""The action units evaluated on each corpus, in output order."""


def check_aus(aus: Iterable[Any]) -> list[int]:
    """Return a list of AU numbers as plain ints, or say what is wrong with it.

    Args:
        aus: FACS numbers in output order.

    Raises:
        ValueError: The list is empty, or an entry is not an integer, not a known action unit, or named twice.
    """
    if isinstance(aus, str | bytes) or not isinstance(aus, Iterable):
        raise ValueError(f"aus must be a list of FACS numbers such as [1, 2, 4], got {aus!r}.")
    numbers = [_au_number(au) for au in aus]
    if not numbers:
        raise ValueError("aus is empty; name at least one action unit, such as aus=[12].")
    if twice := sorted({au for au in numbers if numbers.count(au) > 1}):
        raise ValueError(f"aus names {twice} more than once: {numbers}; name each action unit once.")
    return numbers


def au_label(number: int) -> str:
    """Return the label of an action unit: 12 -> "AU12"."""
    return f"AU{number}"


def parse_au_label(label: object) -> int | None:
    """Return the number of an AU label, "AU12" -> 12, or None if it is none ("AU012", "LABEL_0", 12)."""
    match = re.fullmatch(r"AU([1-9][0-9]*)", label, re.ASCII) if isinstance(label, str) else None
    return int(match[1]) if match else None


def au_name(label: object) -> str:
    """Return the FACS name of a label, "AU12" -> "lip corner puller", or "" for one that has none."""
    number = parse_au_label(label)
    return ACTION_UNITS[number].name if number in ACTION_UNITS else ""


def id2label(aus: Iterable[int]) -> dict[int, str]:
    """Return the label map of a model with these outputs: [1, 12] -> {0: "AU1", 1: "AU12"}."""
    return {i: au_label(au) for i, au in enumerate(check_aus(aus))}


def _au_number(au: Any) -> int:
    try:
        number = None if isinstance(au, bool) else operator.index(au)
    except TypeError:
        number = None
    if number not in ACTION_UNITS:
        raise ValueError(f"Unknown action unit {au!r} in aus; known FACS numbers: {sorted(ACTION_UNITS)}.")
    return number
