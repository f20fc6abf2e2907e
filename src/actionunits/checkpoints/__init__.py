"""The small weights included in the package; each folder is a transformers checkpoint.

path("default")  # the folder of one, for from_pretrained
names()          # of all action unit models, ["default", ...]
"""

from pathlib import Path

FOLDER = Path(__file__).parent
LANDMARKS = "face_landmarks"
"""The network of the default face detector, which is not an action unit model."""


def names() -> list[str]:
    """Return the names of the included action unit models, the pipeline's default first."""
    found = {config.parent.name for config in FOLDER.glob("*/config.json")} - {LANDMARKS}
    return sorted(found, key=lambda name: (name != "default", name))


def path(name: str) -> Path:
    """Return a folder of weights, such as `path("default")` for the pipeline's model.

    Raises:
        FileNotFoundError: There are no weights of that name; the message lists those that there are.
    """
    folder = FOLDER / name
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"No weights {name!r} in {FOLDER}; there are {[*names(), LANDMARKS]}.")
    return folder
