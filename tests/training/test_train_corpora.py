"""The papers' recipes on tiny discs of the real layout: disc, preparation, training, evaluation."""

import json

import pytest
import yaml
from accelerate import Accelerator
from tiny_run import ROOT, TINY, TINY_AC2D
from transformers import AutoModel

from actionunits.data.corpora import CORPORA
from actionunits.data.preparing import prepare_corpus
from actionunits.publishing_terms import training_corpora
from recipe import load_recipe

SMALL = [
    "epochs=1",
    "warmup_epochs=0.5",
    "batch_size=8",
    "log_every=1",
    "precision=fp32",
    "max_false_alarms=0.2",
]


@pytest.fixture
def train_on(train, tmp_path):
    """Train by a recipe of training/recipes, with small networks; returns the run's folder."""

    def train_on(recipe: str, data, settings, name: str = "run"):
        arguments = [f"--set={setting}" for setting in [*SMALL, *settings]]
        path = ROOT / "training" / "recipes" / f"{recipe}.yaml"
        train.main(["--recipe", str(path), "--data", str(data), "--output", str(tmp_path / name), *arguments])
        return tmp_path / name

    return train_on


@pytest.fixture
def prepared(tmp_path):
    def prepared(name: str):
        CORPORA[name].write_tiny(tmp_path / name)
        prepare_corpus(name, tmp_path / name, tmp_path / f"{name}-200", workers=1)
        return tmp_path / f"{name}-200"

    return prepared


GDA = [
    f"networks.gda.config={json.dumps(TINY)}",
    "networks.gda.backbone_from=",
    "geometry={aligned_size: 200, crop_size: 176, input_size: 48}",
]


def test_gda_trains_on_a_fold_of_bp4d_and_is_evaluated_on_it(train_on, prepared, evaluate, tmp_path):
    data = prepared("bp4d")
    run = train_on("gda-bp4d", data, [*GDA, "split.fold=1"])
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    splits = {line["split"]: line["people"] for line in lines if line["event"] == "split"}
    assert splits == {"train": 4, "test": 2}
    assert sum(line["event"] == "step" for line in lines) == 4  # 32 pictures in batches of 8
    metrics = json.loads((run / "model" / "metrics.json").read_text())
    assert metrics["test"]["pictures"] == 16 and metrics["test"]["people"] == 2
    assert yaml.safe_load((run / "recipe.yaml").read_text())["split"]["fold"] == 1
    with pytest.raises(ValueError, match=r"other values of \['split'\]"):
        train_on("gda-bp4d", data, [*GDA, "split.fold=2"])
    by_intensity = ["split.fold=1", "epoch_selection=best-test", "selection_metric=correlation"]
    with pytest.raises(ValueError, match="needs intensities, which this corpus lacks"):
        train_on("gda-bp4d", data, [*GDA, *by_intensity], name="by-intensity")
    with pytest.raises(ValueError, match=r"a corpus with other values of \['corpus', 'disc'"):
        train_on("gda-bp4d", prepared("bp4d_plus"), [*GDA, "split.fold=1"])
    assert json.loads((run / "model" / "run.json").read_text())["corpus"]["manifest"]["corpus"] == "bp4d"
    out = tmp_path / "evaluated"
    evaluate.main(["--model", str(run / "model"), "--data", str(data), "--fold", "1", "--output", str(out)])
    again = json.loads((out / "metrics-test.json").read_text())
    assert again["at_half"]["mean"] == metrics["test"]["at_half"]["mean"]


def test_a_run_names_its_lists_but_not_where_they_lay(train, train_on, prepared, tmp_path):
    run = train_on("gda-bp4d", prepared("bp4d"), [*GDA, "split.fold=1"])
    places = {"split.folds_file": "lists/folds.csv", "networks.gda.config.backbone_name_or_path": "nets/vit"}
    recipe = load_recipe(
        run / "recipe.yaml", [f"{key}=/home/somebody/{place}" for key, place in places.items()]
    )
    manifest = {"corpus": "bp4d", "frames": "/home/somebody/lists/frames.txt"}
    model = AutoModel.from_pretrained(run / "model")
    described = train.describe_run(
        recipe, {}, manifest, model, Accelerator(cpu=True), train.RunLog(run / "log.jsonl")
    )
    assert described["recipe"]["split"]["folds_file"] == "lists/folds.csv"
    assert described["corpus"]["manifest"]["frames"] == "lists/frames.txt"
    assert training_corpora(described) == ["bp4d", "what nets/vit was trained on"]
    assert "/home" not in json.dumps(described)


def test_ac2d_trains_on_gft_and_its_official_partition(train_on, prepared):
    data = prepared("gft")
    tiny = [f"networks.ac2d.config={json.dumps(TINY_AC2D)}"]
    run = train_on("ac2d-gft", data, [*tiny, "geometry={aligned_size: 200, crop_size: 176, input_size: 48}"])
    assert json.loads((run / "model" / "metrics.json").read_text())["test"]["people"] == 2


def test_a_fold_that_is_not_there_is_refused_before_any_is_trained(train, prepared, tmp_path):
    recipe, settings = ROOT / "training" / "recipes" / "gda-bp4d.yaml", [f"--set={s}" for s in SMALL + GDA]
    words = ["--recipe", recipe, "--data", prepared("bp4d"), "--output", tmp_path / "run", *settings]
    with pytest.raises(ValueError, match="no fold 9"):
        train.main([*map(str, words), "--folds", "1", "9"])
    assert not (tmp_path / "run").exists()


def test_people_can_be_held_out_to_choose_an_epoch(train_on, prepared):
    data = prepared("disfa")
    settings = [*GDA, "split={fold: part2, validation: 0.3}", "epoch_selection=best-validation"]
    run = train_on("gda-disfa", data, settings)
    metrics = json.loads((run / "model" / "metrics.json").read_text())
    assert metrics["validation"]["people"] == 2 and metrics["test"]["people"] == 2


def test_a_corpus_prepared_at_another_size_is_refused(train_on, tmp_path):
    CORPORA["bp4d"].write_tiny(tmp_path / "disc")
    prepare_corpus("bp4d", tmp_path / "disc", tmp_path / "out", aligned_size=64, workers=1)
    with pytest.raises(ValueError, match="holds faces of 64 pixels, the recipe needs 200"):
        train_on("gda-bp4d", tmp_path / "out", [*GDA, "split.fold=1"])


def test_a_crossing_trains_on_everybody_and_is_measured_on_the_other_corpus(
    train_on, prepared, evaluate, tmp_path
):
    settings = [f"networks.ac2d.config={json.dumps(TINY_AC2D)}"]
    settings += ["geometry={aligned_size: 200, crop_size: 176, input_size: 48}"]
    run = train_on("ac2d-bp4d+", prepared("bp4d"), settings)
    assert not list(run.glob("metrics-*")) and json.loads((run / "model" / "metrics.json").read_text()) == {}
    model, out = str(run / "model"), tmp_path / "measured"
    data = str(prepared("bp4d_plus"))
    evaluate.main(["--model", model, model, "--data", data, "--split", "full", "--output", str(out)])
    report = json.loads((out / "metrics-full.json").read_text())
    assert report["paper"]["table"] == "AC2D, Table 4" and report["paper"]["mean"] == 57.5
    assert report["folds"] == 2 and report["pictures"] == 48  # two networks on the same pictures
    assert report["thresholds_from"] == "the training people"
