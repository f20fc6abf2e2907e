"""An open synthetic corpus: face pictures whose action units are known by construction.

The path of a picture: a photograph with annotated points becomes a `Person` (`person.py`, `fitting.py`) on a
blendshape head (`head_model.py`); `sampling.py` samples action units, pose, light and camera as a `Scene`;
`renderer.py` renders it; `make_up.py` and `photography.py` add make-up, occlusions and a camera's defects;
`corpus.py` writes the shards.
"""

from .head_model import AU_SHAPES, HeadModel
from .person import Person, read_people
from .renderer import render
from .sampling import Scene, sample_scene

__all__ = ["AU_SHAPES", "HeadModel", "Person", "Scene", "read_people", "render", "sample_scene"]
