"""The small weights that lie in the package; each folder is a transformers checkpoint.

path("default")  # the folder of one, for AutoModel.from_pretrained and its like
names()          # of all action unit models, ["default", ...]
"""

from pathlib import Path

FOLDER = Path(__file__).parent
LANDMARKS = "face_landmarks"
"""The network of the default face detector, which is no action unit model."""


def names() -> list[str]:
    """Return the names of the action unit models in this installation, the pipeline's first."""
    found = {config.parent.name for config in FOLDER.glob("*/config.json")} - {LANDMARKS}
    return sorted(found, key=lambda name: (name != "default", name))


def path(name: str) -> Path:
    """Return a folder of weights, such as `path("default")` for the pipeline's model.

    Raises:
        FileNotFoundError: No weights of that name lie in this installation; the message lists those that do.
    """
    folder = FOLDER / name
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"No weights {name!r} in {FOLDER}; there are {[*names(), LANDMARKS]}.")
    return folder
