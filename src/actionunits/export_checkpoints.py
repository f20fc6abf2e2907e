"""The module `checkpoints` of a self-contained folder, which finds weights beside those of the model.

Transformers' loader copies Python files away from their folder, so whoever loads something from it calls
`look_in` to tell where it is.
"""

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

_source: dict[str, Any] = {"name": "", "revision": None}


def look_in(name_or_path: Any, revision: str | None = None) -> None:
    """Remember the folder, or the repository on the Hub, with the weights."""
    _source.update(name=str(name_or_path or ""), revision=revision)


def path(name: str) -> Path:
    """Return a folder of weights, such as `path("face_landmarks")`, downloaded if necessary.

    Raises:
        FileNotFoundError: There is no such folder beside the model.
    """
    source = Path(_source["name"])
    if _source["name"] and not source.is_dir():
        source = Path(
            snapshot_download(_source["name"], revision=_source["revision"], allow_patterns=[f"{name}/*"])
        )
    if not (source / name / "config.json").is_file():
        raise FileNotFoundError(
            f"{_source['name'] or 'The model'} has no folder {name}; copy it from where the model came from, "
            "or find the faces yourself and pass their landmarks."
        )
    return source / name
