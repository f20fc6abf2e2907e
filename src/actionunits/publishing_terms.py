"""The terms on which a model may be published: those of the corpora that it was trained on.

The corpora of coded video are distributed on a signed agreement. This table says what is commonly known about
each; the signed one is binding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DataTerms:
    """The terms of a corpus for those who publish weights trained on it.

    Attributes:
        name: Name of the corpus.
        holder: Who distributes it.
        terms: The terms in a sentence.
        is_free: Whether weights may be published without permission.
    """

    name: str
    holder: str
    terms: str
    is_free: bool = False


_AGREEMENT = "distributed under a signed agreement, for non-commercial research only"
TERMS = {
    "synthetic": DataTerms(
        "the open synthetic corpus",
        "this project",
        "rendered from sources under the MIT licence and CC BY 4.0, which are named below.",
        is_free=True,
    ),
    "bp4d": DataTerms("BP4D", "Binghamton University and University of Pittsburgh", f"{_AGREEMENT}."),
    "bp4d+": DataTerms("BP4D+", "Binghamton University and University of Pittsburgh", f"{_AGREEMENT}."),
    "disfa": DataTerms("DISFA", "University of Denver", f"{_AGREEMENT}."),
    "gft": DataTerms("GFT", "University of Pittsburgh", f"{_AGREEMENT}."),
    "aff-wild2": DataTerms("Aff-Wild2", "Imperial College London", f"{_AGREEMENT}."),
    "casme2": DataTerms("CASME II", "Chinese Academy of Sciences", f"{_AGREEMENT}."),
}
"""By the names of `actionunits.action_units.CORPUS_AUS`."""
ALIASES = {"bp4d_plus": "bp4d+", "aff_wild2": "aff-wild2"}
"""Names of `actionunits.data.corpora.CORPORA`, as in manifests, that differ from these."""
OPEN_TRIPLETS = "synthetic corpus"
"""Name of the synthetic corpus' triplets in the metrics of an expression encoder."""


def training_terms(run: Mapping[str, Any] | None) -> list[DataTerms]:
    """Return the terms of all corpora of a run, each once; an unknown one counts as licensed.

    Args:
        run: The content of `run.json`, or None if the training data are unknown.
    """
    if run is None:
        return [DataTerms("unrecorded pictures", "unknown", "Nobody recorded what the model was trained on.")]
    found = [
        TERMS.get(ALIASES.get(name.lower(), name.lower()))
        or DataTerms(name, "unknown", "terms unknown to this project.")
        for name in training_corpora(run)
    ]
    return list(dict.fromkeys(found))  # a corpus has an alias


def training_corpora(run: Mapping[str, Any]) -> list[str]:
    """Return the names of the corpora that a run was trained on, as keys of `TERMS` or `ALIASES`."""
    corpus = run.get("corpus") or {}
    manifest = corpus.get("manifest") or {}
    named = corpus.get("name") or run.get("recipe", {}).get("corpus") or manifest.get("corpus")
    if not named:
        named = "synthetic" if "generator" in manifest else "unnamed corpus"
    corpora = [named] if isinstance(named, str) else list(named)
    encoder = run.get("encoder") or {}
    if encoder and encoder.get("triplets") != OPEN_TRIPLETS:
        corpora.append(encoder.get("triplets") or f"what {encoder['name']} was trained on")
    if encoder.get("init"):
        corpora.append(f"what {encoder['init']} was trained on")
    for name in started_from(run):
        corpora += (run.get("inherited") or {}).get(name) or [f"what {name} was trained on"]
    for member in (run.get("members") or {}).values():
        corpora += training_corpora(member)
    return list(dict.fromkeys(corpora))


def started_from(run: Mapping[str, Any]) -> list[str]:
    """Return the models that went into a run: pretrained weights, backbones and teachers."""
    recipe = run.get("recipe") or {}
    networks = (recipe.get("networks") or {}).values()
    names = [network.get("pretrained") for network in networks]
    names += [(network.get("config") or {}).get("backbone_name_or_path") for network in networks]
    names += [name for network in networks if "/" in (name := network.get("backbone_from") or "")]
    return list(dict.fromkeys(name for name in [*names, *(recipe.get("teachers") or [])] if name))
