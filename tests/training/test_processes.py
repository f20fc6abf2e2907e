"""Several processes: the same figures and the same training as one, on one machine and on two "machines"."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tiny_run import RECIPE, ROOT, SAME_FOR_ALL, TINY_AC2D
from transformers import AutoModel

import network_training
from actionunits.data import synthetic

pytestmark = pytest.mark.slow

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
CONFIGS = ROOT / "training" / "accelerate"
LAUNCHER = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]


@pytest.fixture(scope="module")
def odd_corpus(tmp_path_factory):
    """Splits that two processes cannot share evenly."""
    from toy_corpus import write_corpus

    return write_corpus(tmp_path_factory.mktemp("odd"), pictures=(24, 7, 5))


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def torchrun(*arguments, check: bool = True) -> int:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command = [*launcher, "--master_port", free_port(), *map(str, arguments)]
    return subprocess.run(command, check=check, cwd=ROOT, env=ENVIRONMENT).returncode


def write_recipe(path: Path, values: dict) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path


def events(run: Path, kind: str) -> list[dict]:
    return [e for e in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if e["event"] == kind]


def figures(report: dict) -> dict[str, float]:
    """Mean figures at 0.5, but for their interval."""
    return {name: value for name, value in report["at_half"]["mean"].items() if name != "f1_interval"}


def assert_trained_alike(one: Path, two: Path) -> None:
    """One process and two have the same losses and weights."""
    assert json.loads((two / "model" / "run.json").read_text())["processes"] == 2
    weights = [AutoModel.from_pretrained(run / "model").state_dict() for run in (one, two)]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-5)
    losses = [[e["loss"] for e in events(run, "step")] for run in (one, two)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)


@pytest.fixture(scope="module")
def arguments(odd_corpus, tmp_path_factory):
    recipe = write_recipe(tmp_path_factory.mktemp("recipe") / "recipe.yaml", {**RECIPE, **SAME_FOR_ALL})
    return ["--recipe", recipe, "--data", odd_corpus, "--output"]


@pytest.fixture(scope="module")
def one(train, arguments, tmp_path_factory):
    """A run of one process."""
    output = tmp_path_factory.mktemp("one") / "run"
    train.main([*map(str, arguments), str(output)])
    return output


def test_two_machines_train_as_one_process_does(one, arguments, tmp_path):
    """The recipe for two nodes, as its file says: two commands, which meet at an address."""
    two = tmp_path / "two"
    meeting = ["--main_process_ip", "127.0.0.1", "--main_process_port", free_port()]
    machines = []
    for rank in range(2):
        command = [*LAUNCHER, CONFIGS / "two_nodes.yaml", *meeting, "--machine_rank", rank]
        command += ["training/train.py", *arguments, two]
        machines.append(subprocess.Popen([*map(str, command)], cwd=ROOT, env=ENVIRONMENT))
    try:
        assert [machine.wait(timeout=600) for machine in machines] == [0, 0]
    finally:
        for machine in machines:
            machine.kill()

    assert_trained_alike(one, two)
    for split, pictures in (("validation", 7), ("test", 5)):
        reports = [json.loads((run / f"metrics-{split}.json").read_text()) for run in (one, two)]
        assert [report["pictures"] for report in reports] == [pictures] * 2
        assert figures(reports[1]) == pytest.approx(figures(reports[0]), abs=1e-4)
    validated = [events(run, "epoch")[-1]["validation"]["mean"] for run in (one, two)]
    assert validated[1] == pytest.approx(validated[0], abs=1e-4)


def test_sharded_networks_train_as_whole_ones_do_and_resume(one, arguments, tmp_path):
    two = tmp_path / "two"
    command = [*LAUNCHER, CONFIGS / "fsdp.yaml", "--main_process_port", free_port()]
    command = [*map(str, command), "tests/training/sharded_run.py", *map(str, arguments), str(two)]
    subprocess.run(command, check=True, cwd=ROOT, env=ENVIRONMENT)
    checkpoints = sorted((two / "auformer" / "checkpoints").iterdir())
    assert all((folder / "pytorch_model_fsdp.bin").is_file() for folder in checkpoints)
    assert_trained_alike(one, two)

    for folder in (two / "model", two / "auformer" / "model", checkpoints[-1]):
        shutil.rmtree(folder)
    subprocess.run(command, check=True, cwd=ROOT, env=ENVIRONMENT)
    assert events(two, "resumed")[0]["step"] == 4
    losses = [[event["loss"] for event in events(run, "step")] for run in (one, two)]
    assert losses[1][6:] == pytest.approx(losses[0][4:])


def test_state_by_the_epoch_is_that_of_all_processes(train, odd_corpus, tmp_path):
    """AC2D's prototypes are means over the whole epoch, and its figures those of the saved weights."""
    networks = {"ac2d": {"model_type": "au-ac2d", "config": TINY_AC2D}}
    recipe = write_recipe(tmp_path / "recipe.yaml", {**RECIPE, "networks": networks, "epochs": 1})
    output = tmp_path / "run"
    torchrun("training/train.py", "--recipe", recipe, "--data", odd_corpus, "--output", output)
    model = AutoModel.from_pretrained(output / "ac2d" / "model").eval()
    counts = [value for name, value in model.state_dict().items() if name.endswith("prototype_count")]
    assert counts and all(int(count) == 24 for count in counts)

    recipe = train.load_recipe(recipe)
    faces = synthetic.prepare_synthetic(odd_corpus, "validation", tmp_path / "cache").with_aus(recipe.aus)
    collate, alone = network_training.collator(recipe), train.new_accelerator(recipe)
    scores = network_training.gathered_scores(model, faces, collate, 4, alone)
    expected = network_training.au_report(faces.aus, scores, faces.occurrence, faces.intensities)
    report = events(output, "epoch")[-1]["validation"]
    assert report["pictures"] == len(faces) == 7
    assert report["mean"] == pytest.approx(expected["mean"], abs=1e-5)


def test_a_killed_run_of_two_processes_ends_in_the_same_bits(odd_corpus, tmp_path):
    """Amid the second epoch, with what differs between processes: dropped paths and batch statistics."""
    config = {**TINY_AC2D, "drop_path_rate": 0.5}
    values = {**RECIPE, "networks": {"ac2d": {"model_type": "au-ac2d", "config": config}}}
    recipe = write_recipe(tmp_path / "recipe.yaml", {**values, "gradient_accumulation": 2})
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    script, places = Path(__file__).with_name("runs_apart.py"), ["--recipe", recipe, "--data", odd_corpus]
    torchrun(script, "", *places, "--output", whole)
    assert torchrun(script, "_log_step+ 5", *places, "--output", killed, check=False) != 0
    assert not (killed / "model").exists()
    torchrun(script, "", *places, "--output", killed)
    assert [event["step"] for event in events(killed, "resumed")] == [4]
    files = [run / "model" / "model.safetensors" for run in (whole, killed)]
    assert files[0].read_bytes() == files[1].read_bytes()
    losses = [{e["step"]: e["loss"] for e in events(run, "step")} for run in (whole, killed)]
    assert losses[0] == losses[1]


def test_two_processes_measure_what_one_measures(evaluate, odd_corpus, escda_folder, tmp_path):
    """Five pictures: one process has three, the other two, and the figures are equal to the last bit."""
    arguments = ["--model", escda_folder, "--data", odd_corpus, "--split", "test", "--output"]
    evaluate.main([*map(str, arguments), str(tmp_path / "one")])
    torchrun("training/evaluate.py", *arguments, tmp_path / "two")
    one, two = (json.loads((tmp_path / name / "metrics-test.json").read_text()) for name in ("one", "two"))
    assert two["pictures"] == 5
    assert two["people"] == one["people"] == 3
    assert figures(two) == pytest.approx(figures(one), abs=1e-4)  # the batches differ, so sums do, too


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_knows_every_value_of_the_files(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.distributed_type in ("MULTI_GPU", "FSDP")
    text = path.read_text()
    (command,) = re.findall(r"#     (accelerate launch .*)", text)
    assert f"--config_file training/accelerate/{path.name}" in command
