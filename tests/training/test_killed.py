"""kill -9 at any moment of training/train.py, then the same command again: the same weights, bit for bit.

The runs are processes of their own and die by the signal itself. A chain is one run that dies repeatedly,
each time resumed by the same command. Points count from the start of each process.
"""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import yaml
from tiny_run import RECIPE

pytestmark = pytest.mark.slow

EPOCHS, STEPS = 3, 9  # 24 pictures in batches of 8, a checkpoint at every second step and every epoch's end
CHAINS = {
    # Some optimiser steps of each process, whatever the last checkpoint was; drawn, but the same every day.
    "at random steps": [f"_log_step+ {n}" for n in np.random.default_rng(9).integers(1, 5, 4)],
    "around the end of an epoch": [
        "_end_epoch+ 1",
        "_validate 1",
        "_save_network+ 1",  # the best epoch is in its place, the checkpoint that says so is not
        "replace_folder 2",  # the checkpoint is complete, but not in its place
        "replace_folder+ 2",  # in its place, but older ones are still there
    ],
    "around the end": ["_keep_selected 1", "replace_folder 1", "write_model 1", "write_card 1"],
}


@pytest.fixture(scope="module")
def start(corpus, tmp_path_factory, request):
    """Run the tiny recipe into a folder, in a process that starts with everything imported; its exit code."""
    here = str(Path(__file__).parent)
    patch = pytest.MonkeyPatch()
    request.addfinalizer(patch.undo)
    patch.syspath_prepend(here)
    patch.setenv("PYTHONPATH", here, prepend=os.pathsep)  # all that Python 3.11's fork server goes by
    import runs_apart

    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["runs_apart"])
    folder = tmp_path_factory.mktemp("killed")
    networks = {"gda": RECIPE["networks"]["gda"]}
    recipe = {**RECIPE, "networks": networks, "epochs": EPOCHS, "epoch_selection": "best-validation"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    def start(output: Path, kill: str = "") -> int:
        places = ["--recipe", folder / "recipe.yaml", "--data", corpus, "--cache", folder / "cache"]
        arguments = [str(argument) for argument in (*places, "--output", output)]
        process = processes.Process(target=runs_apart.run, args=(arguments, kill))
        process.start()
        process.join()
        return process.exitcode

    return start


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """A run that nobody disturbed."""
    output = tmp_path_factory.mktemp("whole") / "run"
    assert start(output) == 0
    return output


@pytest.mark.parametrize("points", CHAINS.values(), ids=CHAINS)
def test_a_killed_run_ends_in_the_same_bits(start, whole, tmp_path, points):
    output = tmp_path / "run"
    for point in points:
        assert start(output, point) == -signal.SIGKILL, point
        assert not (output / "model").exists()
    assert start(output) == 0
    for name in ("model/model.safetensors", "gda/model/model.safetensors", "model/config.json"):
        assert (output / name).read_bytes() == (whole / name).read_bytes()
    assert read(output / "model" / "metrics.json") == read(whole / "model" / "metrics.json")
    runs = [read(run / "model" / "run.json")["selected_epochs"] for run in (output, whole)]
    assert runs[0] == runs[1] != {}
    assert losses(output) == losses(whole) and len(losses(whole)) == STEPS
    assert not list(output.glob("model.partial"))


def test_half_a_line_of_the_log_is_cut_off(tmp_path):
    from network_training import RunLog

    path = tmp_path / "log.jsonl"
    path.write_text('{"event": "step", "step": 1}\n{"event": "epo')
    RunLog(path).write("step", step=2)
    assert [event["step"] for event in RunLog(path).events("step")] == [1, 2]


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def losses(run: Path) -> dict[int, float]:
    """Loss by step; a step that was taken twice must have the same twice."""
    found: dict[int, float] = {}
    for line in map(json.loads, (run / "log.jsonl").read_text().splitlines()):
        if line["event"] == "step":
            assert found.setdefault(line["step"], line["loss"]) == line["loss"]
    return found
