"""A tiny model of every method, from the testers of tests/models, for tests of what all must do."""

import importlib
from pathlib import Path

from transformers import CONFIG_MAPPING

from actionunits.export_code import model_classes
from models.test_modeling_common import AUModelTester


def registered_types():
    """Model types of all action unit detectors that are registered with transformers."""
    ours = [name for name in CONFIG_MAPPING if name.startswith("au-")]
    return sorted(name for name in ours if model_classes(name)[1].__name__.endswith("ForAUDetection"))


def _testers():
    for file in sorted((Path(__file__).parent / "models").glob("test_modeling_*.py")):
        module = importlib.import_module(f"models.{file.stem}")
        for value in vars(module).values():
            is_test = isinstance(value, type) and value.__name__.startswith("Test")
            if is_test and issubclass(value, AUModelTester):
                yield value


def tiny_models():
    """By model type a function that makes a model in evaluation mode, of four action units."""
    found = {}
    for tester in _testers():
        found.setdefault(tester.model_class.config_class.model_type, tester().make_model)
    return found
