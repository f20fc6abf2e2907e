"""The renderer against pictures that were looked at when they were made: what changes them is seen here.

UPDATE_GOLDEN=1 pytest tests/synthesis/test_golden.py    # draws them anew; look at them before you commit
"""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from actionunits.synthesis.person import Person, read_people
from actionunits.synthesis.renderer import render
from actionunits.synthesis.sampling import Light, neutral_scene

GOLDEN = Path(__file__).parent / "golden"
SIDE_LIGHT = Light((0.9, 0.2, 0.5), (0.9, 0.8, 0.7), (0.2, 0.2, 0.25))
SCENES = {
    "neutral": {},
    "smiling_turned_away": {"action_units": {6: 0.8, 12: 1.0, 25: 0.7}, "yaw": 0.5, "pitch": -0.15},
    "frowning_in_side_light": {
        "action_units": {4: 1.0, 17: 0.6},
        "light": SIDE_LIGHT,
        "shine": 0.3,
        "skin": (1.4, 1.05, 1.0, 0.9),
        "gaze": (0.4, -0.2),
    },
}


@pytest.fixture(scope="module")
def people(head, photo_folder) -> list[Person]:
    return [Person.of_photograph(head, **row) for row in read_people(photo_folder)[:2]]


@pytest.mark.parametrize("name", SCENES)
def test_the_renderer_draws_what_it_drew(name, head, people):
    changes = dict(SCENES[name])
    scene = neutral_scene(head, changes.pop("action_units", {}), size=96)
    wall = np.linspace(0.05, 0.6, 16, dtype=np.float32).reshape(4, 4, 1).repeat(3, -1)
    linear = render(head, dataclasses.replace(scene, **changes), *people, wall).image
    drawn = np.sqrt(np.clip(linear, 0, 1)) * 255
    path = GOLDEN / f"{name}.png"
    if os.environ.get("UPDATE_GOLDEN"):
        Image.fromarray(drawn.round().astype(np.uint8)).save(path)
    difference = np.abs(drawn - np.asarray(Image.open(path), np.float32))
    assert difference.mean() < 0.7, f"{difference.mean():.2f} grey levels on average from {path}"
    assert np.quantile(difference, 0.99) < 6


def test_the_pictures_differ_by_more_than_the_tolerance():
    pictures = [np.asarray(Image.open(GOLDEN / f"{name}.png"), np.float32) for name in SCENES]
    for i, first in enumerate(pictures):
        assert first.std() > 20
        assert all(np.abs(first - second).mean() > 5 for second in pictures[:i])
