"""The small default weights that lie in the package; each folder is a transformers checkpoint."""

from pathlib import Path

FOLDER = Path(__file__).parent


def path(name: str) -> Path:
    """Return the folder of default weights, such as `path("default")` for the AU model.

    Raises:
        FileNotFoundError: No weights of that name lie in this installation.
    """
    folder = FOLDER / name
    if not (folder / "config.json").is_file():
        have = sorted(config.parent.name for config in FOLDER.glob("*/config.json"))
        raise FileNotFoundError(f"No default weights {name!r} in {FOLDER}; there are {have or 'none'}.")
    return folder
