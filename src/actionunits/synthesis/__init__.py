"""An open synthetic corpus: face pictures whose action units are exact by construction.

The path of a picture: a photograph and its hand template become a `Person` (`person.py`, `fitting.py`) on a
blendshape head (`head_model.py`); `sampling.py` draws action units, pose, light and camera as a `Scene`;
`renderer.py` draws it; `photography.py` degrades it as a real camera would; `corpus.py` writes the shards.
"""

from .head_model import AU_SHAPES, HeadModel
from .person import Person, read_people
from .renderer import render
from .sampling import Scene, sample_scene

__all__ = ["AU_SHAPES", "HeadModel", "Person", "Scene", "read_people", "render", "sample_scene"]
