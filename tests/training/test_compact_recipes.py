"""The recipes of the weights in the package: alike but for what a method needs, and small enough."""

import pytest
import torch
from tiny_run import ROOT
from transformers import AutoConfig, AutoModel

from recipe import load_recipe

RECIPES = sorted((ROOT / "training" / "recipes").glob("*-synthetic-compact.yaml"))
OWN = (
    *("name", "networks", "epochs", "plain_epochs", "base_learning_rate", "clip_norm", "balance_aus"),
    "sharpen",  # only those that read photographs better so
)
"""What methods may need otherwise than others; the rest must be the same for their scores to be compared."""


def test_scores_can_be_compared():
    shared = [
        {key: value for key, value in load_recipe(path).to_dict().items() if key not in OWN}
        for path in RECIPES
    ]
    for values in shared:
        values["geometry"].pop("input_size")  # more pixels cost more; all see the same part of the face
    assert len(shared) == 7 and all(values == shared[0] for values in shared)
    assert shared[0]["max_false_alarms"] == 0.05 and shared[0]["save_dtype"] == "float16"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_results_fit_into_the_package(path):
    recipe = load_recipe(path)
    size = 0
    for network in recipe.networks.values():
        make = getattr(type(AutoConfig.for_model(network.model_type)), network.preset or "__call__")
        with torch.device("meta"):
            model = AutoModel.from_config(make(image_size=recipe.geometry.input_size, aus=recipe.aus))
        size += 2 * sum(p.numel() for p in model.parameters())
        size += sum(b.numel() * b.element_size() for b in model.buffers())
    assert size < 15e6
    assert 5e-4 <= recipe.learning_rate <= 5e-3  # AdamW's for a batch of this size
