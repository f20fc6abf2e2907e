"""The scripts of training/ as modules, and a run small enough for a test."""

import sys
from pathlib import Path

import pytest
import yaml
from tiny_run import RECIPE, ROOT, load_script

# At the end: training/evaluate.py must not hide the package of that name.
sys.path += [str(ROOT / "training"), str(ROOT / "tests" / "data"), str(ROOT / "tests" / "training")]


@pytest.fixture(scope="session")
def train():
    return load_script("train")


@pytest.fixture(scope="session")
def evaluate():
    return load_script("evaluate")


@pytest.fixture(scope="session")
def pretrain_face_recognition():
    return load_script("pretrain_face_recognition")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    from toy_corpus import write_corpus

    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def run(train, corpus, tmp_path):
    """Train by the tiny recipe with other values; returns the run's folder."""

    def run(name: str = "run", data: Path = corpus, **values) -> Path:
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text(yaml.safe_dump({**RECIPE, **values}))
        train.main(["--recipe", str(recipe), "--data", str(data), "--output", str(tmp_path / name)])
        return tmp_path / name

    return run


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps its precision for the whole process otherwise, that of other tests' Trainers, too."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
