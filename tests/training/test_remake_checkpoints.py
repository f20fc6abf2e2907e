"""The one command that remakes the weights of the package: every step is called as its script understands."""

import json
import shutil
from itertools import takewhile
from pathlib import Path

import pytest
from tiny_run import ROOT, load_script

from actionunits import checkpoints
from toy_run import publishable_folder

TEMPLATE = ROOT / "model_cards" / "template.md"


@pytest.fixture(scope="module")
def remake():
    return load_script("remake_checkpoints")


@pytest.fixture
def command(remake, tmp_path, monkeypatch):
    """Run the command with scripts that do nothing; returns the names of those it ran."""

    def run(*options, failing=""):
        ran = []

        def fake_run(words, check):
            assert check
            if "--output" in words:
                place = Path(words[words.index("--output") + 1])
            else:  # names the models themselves, their trainings' last
                place = Path([*takewhile(lambda word: not word.startswith("--"), words)][-1]).parent
            ran.append(f"{Path(words[1]).stem} {place.name}")
            if ran[-1].endswith(failing or "never"):
                raise RuntimeError("stopped")

        monkeypatch.setattr(remake.subprocess, "run", fake_run)
        try:
            remake.main(["--head", "H", "--photos", "P", "--output", str(tmp_path), *options])
        except RuntimeError:
            ran.append("stopped")
        return ran

    return run


def test_every_step_is_a_script_that_knows_its_options(remake, tmp_path):
    steps = remake.make_steps(tmp_path / "head", tmp_path / "photos", tmp_path / "out", ["epochs=1"])
    for step in steps.values():
        source = (ROOT / "training" / f"{step.script}.py").read_text()
        if "add_run_options(" in source:  # the options that both pretraining scripts have
            source += (ROOT / "training" / "pretraining_run.py").read_text()
        options = [word for word in step.options if str(word).startswith("--")]
        assert all(f'"{word}"' in source for word in options)
        assert set(step.needs) <= set(steps)
        if "--recipe" in options:
            assert Path(step.options[step.options.index("--recipe") + 1]).is_file()
            assert step.options[-2:] == ["--set", "epochs=1"]


def test_every_folder_of_the_package_is_a_result(remake):
    assert {*checkpoints.names(), checkpoints.LANDMARKS} <= set(remake.RESULTS)
    assert "default" in remake.RESULTS and remake.BEST not in remake.RESULTS


def test_all_steps_run_in_order_and_finished_ones_do_not_again(command):
    everything = command()
    assert everything[:4] == [
        "synthesize corpus",
        "train_landmarks first_landmarks",
        "train_landmarks landmarks",
        "pretrain_expression expression",
    ]
    assert [step for step in everything if step.startswith("train ")] == [
        f"train {name}"
        for name in ("escda", "ac2d", "auformer-backbone", "auformer", "lac", "gtlenet", "geometry")
    ]
    assert [step for step in everything if step.startswith("calibrate ")] == [
        f"calibrate {name}"
        for name in ("escda", "ac2d", "auformer", "lac", "gtlenet", "geometry", "ensemble")
    ]
    for name in ("escda", "lac"):
        adapted = everything.index(f"adapt_statistics {name}")
        assert everything.index(f"train {name}") < adapted < everything.index(f"calibrate {name}")
    assert sum(step.startswith("adapt_statistics ") for step in everything) == 2
    assert everything.index("calibrate ac2d") < everything.index("average ensemble")
    assert everything[-1] == "check_real_photos real_photos.json"
    assert command() == []


def test_a_failure_stops_and_the_same_command_goes_on_there(command, tmp_path):
    assert command(failing="train ac2d")[-2:] == ["train ac2d", "stopped"]
    assert (tmp_path / "escda.done").is_file() and not (tmp_path / "ac2d.done").exists()
    assert command()[0] == "train ac2d"


def test_only_what_is_asked_for_and_what_it_needs(command):
    assert command("--only", "gtlenet") == [
        "synthesize corpus",
        "pretrain_expression expression",
        "train gtlenet",
        "calibrate gtlenet",
    ]
    assert command("--only", "auformer") == [
        "train auformer-backbone",
        "train auformer",
        "calibrate auformer",
    ]
    assert command("--only", "lsc") == ["train escda", "adapt_statistics escda", "calibrate escda"]
    assert command("--only", "default") == [
        "train ac2d",
        "train geometry",
        "calibrate ac2d",
        "calibrate geometry",
        "average ensemble",
        "calibrate ensemble",
        "check_real_photos real_photos.json",
    ]


def test_results_of_another_machine_need_no_corpus(command, tmp_path):
    result = tmp_path / "lac" / "model" / "metrics.json"
    result.parent.mkdir(parents=True)
    result.write_text("{}")
    run = result.with_name("run.json")
    run.write_text("{}")
    assert command("--only", "lac") == ["synthesize corpus", "adapt_statistics lac", "calibrate lac"]
    (tmp_path / "lac_thresholds.done").unlink()
    run.write_text('{"neutral_photographs": {}, "statistics": {}}')
    assert command("--only", "lac") == []


def test_dry_run_only_prints(command, tmp_path, capsys):
    assert command("--dry-run", "--install") == []
    assert "lac-synthetic-compact.yaml" in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.fixture
def places(remake, tmp_path, monkeypatch):
    """A package and its cards elsewhere, and a trained result."""
    package, cards = tmp_path / "package", tmp_path / "cards"
    cards.mkdir()
    publishable_folder(tmp_path / "lac" / "model", TEMPLATE)
    (tmp_path / "lac" / "model" / "optimizer.pt").write_bytes(b"state")
    return package, cards


def test_results_are_installed_with_their_cards(remake, places, tmp_path):
    package, cards = places
    (tmp_path / "lac" / "model" / "README.md").write_text("an old card")
    for _ in range(2):  # what is there gives way
        remake.install(tmp_path, ["lac"], package, cards)
    assert {path.name for path in (package / "lac").iterdir()} == {*remake.FILES, "README.md"}
    name = json.loads((package / "lac" / "run.json").read_text())["recipe"]["name"]
    card = (cards / f"{name}.md").read_text()
    assert card == (package / "lac" / "README.md").read_text() and "## Groups of people" in card


def test_what_is_missing_or_too_large_is_not_installed(remake, places, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="gtlenet/model is not there yet"):
        remake.install(tmp_path, ["lac", "gtlenet"], *places)
    monkeypatch.setattr(remake, "LARGEST", 1000)
    with pytest.raises(ValueError, match=r"Too large for the package: {'lac': '0\.\d MB'}; leave them out"):
        remake.install(tmp_path, ["lac"], *places)
    assert not places[0].exists() and not list(places[1].iterdir())


def test_a_member_of_the_ensemble_has_a_card_of_its_own(remake, places, tmp_path):
    package, cards = places
    shutil.copytree(tmp_path / "lac" / "model", tmp_path / "escda" / "members" / "lsc")
    run = tmp_path / "escda" / "members" / "lsc" / "run.json"
    values = json.loads(run.read_text()) | {"name": "lsc-toy", "member": "lsc"}
    run.write_text(json.dumps(values))
    remake.install(tmp_path, ["lsc"], package, cards)
    assert "These weights are the LSC of the ensemble alone" in (cards / "lsc-toy.md").read_text()
