"""Every method on a toy corpus: its recipes, an interruption, transformers' Trainer, the benchmark."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import yaml
from tiny_run import RECIPE, ROOT, TINY_AC2D
from transformers import AutoConfig, AutoModel, Trainer, TrainingArguments, ViTConfig, ViTModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor

import benchmark
from actionunits.action_units import CORPUS_AUS
from actionunits.callbacks import EndOfEpochCallback
from actionunits.data import AUCollator, Augmentation, InputGeometry, prepare_synthetic
from actionunits.half_precision import round_parameters
from actionunits.models.ac2d import configuration_ac2d as ac2d
from actionunits.models.auformer import configuration_auformer as auformer
from network_training import network_config
from recipe import NetworkRecipe, load_recipe, load_variants

TINY_VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 48,
    "patch_size": 16,
}
# For each method what makes it tiny.
METHODS = {"au-ac2d": TINY_AC2D | {"image_size": 48}, "au-auformer": {"backbone_config": TINY_VIT}}
# All recipes of these methods; but for one of each kind they are slow tests.
QUICK = ("ac2d-disfa", "auformer-bp4d", "auformer-synthetic-compact")
RECIPES = [
    pytest.param(path, id=path.stem, marks=[] if path.stem in QUICK else pytest.mark.slow)
    for path in sorted((ROOT / "training" / "recipes").glob("*.yaml"))
    if path.stem.startswith(("ac2d-", "auformer-"))
]


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Aligned pictures, shared by all runs."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def beginnings(tmp_path_factory):
    """Tiny stand-ins for what recipes start from."""
    folder = tmp_path_factory.mktemp("beginnings")
    torch.manual_seed(0)
    ViTModel(ViTConfig(**TINY_VIT), add_pooling_layer=False).save_pretrained(folder / "vit")
    whole = AutoConfig.for_model("au-auformer", **METHODS["au-auformer"], adaptation="none")
    AutoModel.from_config(whole).save_pretrained(folder / "whole")
    bp4d = AutoModel.from_config(AutoConfig.for_model("au-ac2d", **METHODS["au-ac2d"]))
    bp4d.adapt_to_aus(CORPUS_AUS["disfa"], like={25: 23, 26: 17}).save_pretrained(folder / "pretrained")
    return folder


def tiny_network(network, beginnings):
    """A recipe's network with a tiny architecture and its own other values."""
    tiny = {"model_type": network["model_type"], "config": network.get("config", {})}
    if network.get("preset") == "from_backbone":
        backbone = {"backbone_name_or_path": str(beginnings / "vit")}
        return tiny | {"preset": "from_backbone", "config": tiny["config"] | backbone}
    if "backbone_from" in network:
        tiny |= {"backbone_from": str(beginnings / "whole")}
    if "pretrained" in network:
        return tiny | {"pretrained": str(beginnings / "pretrained")}
    sizes = {key: value for key, value in METHODS[network["model_type"]].items() if key != "image_size"}
    return tiny | {"config": tiny["config"] | sizes}


@pytest.mark.parametrize("path", RECIPES)
def test_recipes_train(path, train, corpus, cache, beginnings, tmp_path):
    """For three steps, with a tiny network in small batches and otherwise as they are."""
    recipe = yaml.safe_load(path.read_text())
    ((name, network),) = recipe["networks"].items()
    recipe["networks"] = {name: tiny_network(network, beginnings)}
    recipe["geometry"]["input_size"] = 48
    recipe.pop("split", None)  # the synthetic corpus has its own
    recipe |= {"batch_size": 8, "epochs": 1, "warmup_epochs": 0.5, "workers": 0}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    folders = {"data": corpus, "cache": cache, "output": tmp_path / "run", "recipe": tmp_path / "recipe.yaml"}
    train.main([f"--{option}={value}" for option, value in folders.items()])

    folder = tmp_path / "run" / "model"
    model, processor = (auto.from_pretrained(folder) for auto in (AutoModel, AutoImageProcessor))
    assert model.config.aus == processor.aus == recipe["aus"]
    if not path.stem.endswith("compact"):  # a paper's action units, and its sizes of the face
        assert recipe["aus"] == list(CORPUS_AUS[path.stem.partition("-")[2]])
        expected = model.config.processor_options
        assert {option: getattr(processor, option) for option in expected} == expected
    if model.config.model_type == "au-ac2d":
        assert model.prototypes.abs().amin(1).gt(0).all()
    elif model.config.freeze_backbone:
        if "backbone_from" in network:
            run = json.loads((folder / "run.json").read_text())
            assert run["recipe"]["networks"][name]["backbone_from"] == f"{beginnings.name}/whole"
            assert run["backbones"] == {name: {"name": f"{beginnings.name}/whole", "recipe": {}}}
            vit = AutoModel.from_pretrained(beginnings / "whole").vit
        else:
            vit = ViTModel.from_pretrained(beginnings / "vit", add_pooling_layer=False)
        if recipe.get("save_dtype") == "float16":
            round_parameters(vit)
        vit = vit.state_dict()
        assert all(torch.equal(value, vit[key]) for key, value in model.vit.state_dict().items())
        assert model.config.margin == network.get("config", {}).get("margin", 0.1)


@pytest.mark.parametrize(
    ("stem", "entries"),
    [("ac2d-bp4d", ac2d.ABLATIONS), ("auformer-bp4d", auformer.ABLATIONS | auformer.CHOICES)],
)
def test_variants_of_a_recipe_are_the_entries_of_the_papers_tables(stem, entries):
    path = ROOT / "training" / "recipes" / f"{stem}.yaml"
    recipes = [load_recipe(path, variant=variant) for variant in ("", *load_variants(path))]
    recipes = [recipe for recipe in recipes if not recipe.crossing]
    networks = [network for recipe in recipes for network in recipe.networks.values()]
    not_the_papers = ("backbone_name_or_path", "expert_dropout")
    values = [{k: v for k, v in network.config.items() if k not in not_the_papers} for network in networks]
    config_class = type(AutoConfig.for_model(networks[0].model_type))
    made, expected = (
        {config_class(**each).to_json_string() for each in group} for group in (values, entries.values())
    )
    assert made == expected
    assert len(made) == len(recipes)
    assert all(recipe.paper.table and recipe.paper.mean for recipe in recipes)


@pytest.mark.parametrize("model_type", METHODS)
def test_interrupted_runs_go_on_to_the_same_bits(model_type, run, train, monkeypatch):
    """Stopped amid the first epoch and amid the second, so without and with prototypes."""
    config = {key: value for key, value in METHODS[model_type].items() if key != "image_size"}
    values = {
        "networks": {"net": {"model_type": model_type, "config": config}},
        "checkpoint_every": 1,
        "gradient_accumulation": 2,
    }
    whole = run("whole", **values)
    save = train.NetworkTraining._save_checkpoint
    for stop_at in (1, 4):

        def save_and_stop(self, stop_at=stop_at):
            save(self)
            if self.position.step == stop_at:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(train.NetworkTraining, "_save_checkpoint", save_and_stop)
            run(f"stopped-{stop_at}", **values)
        resumed = run(f"stopped-{stop_at}", **values)
        events = [json.loads(line) for line in (resumed / "log.jsonl").read_text().splitlines()]
        assert [event["step"] for event in events if event["event"] == "resumed"] == [stop_at]
        files = [folder / "model" / "model.safetensors" for folder in (whole, resumed)]
        assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("model_type", METHODS)
def test_the_trainer_trains(model_type, corpus, cache, tmp_path):
    torch.manual_seed(0)
    aus = RECIPE["aus"]
    model = AutoModel.from_config(AutoConfig.for_model(model_type, aus=aus, **METHODS[model_type]))
    options = model.config.processor_options
    geometry = InputGeometry(options["aligned_size"], options["crop_size"]["height"], 48)
    faces = prepare_synthetic(corpus, "train", cache, geometry.aligned_size).with_aus(aus)
    arguments = TrainingArguments(
        str(tmp_path),
        num_train_epochs=2,  # in the first, prototypes are 0
        learning_rate=1e-2,
        remove_unused_columns=False,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
    )
    trainer = Trainer(
        model,
        arguments,
        data_collator=AUCollator(aus, geometry=geometry, augmentation=Augmentation()),
        train_dataset=faces,
        callbacks=[EndOfEpochCallback()],
    )
    before = copy.deepcopy(model.state_dict())
    assert 0 < trainer.train().training_loss < float("inf")
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    learnable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    without_effect = {name for name in learnable if ".intervention.query." in name or ".key." in name}
    assert learnable - without_effect <= changed
    assert not frozen & changed
    assert trainer.predict(faces).predictions.shape == (len(faces), len(aus))


@pytest.mark.slow
@pytest.mark.parametrize("method", benchmark.METHODS)
def test_fast_and_plain_are_the_same_network(method):
    variants = (False, True) if benchmark.METHODS[method].has_plain else (False,)
    assert len({benchmark.count(method, plain)[0] for plain in variants}) == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "au-foo"}, r"'au-foo' is unknown; known: \['au-ac2d'"),
        ({"model_type": "au-lac", "preset": "tiny"}, "LacConfig has no preset 'tiny'"),
        (
            {"model_type": "au-lac", "config": {"localisation_weight": 0}},
            r"unknown keys \['localisation_weight'\]; those of LacConfig: .*'localization_weight'",
        ),
    ],
)
def test_networks_that_do_not_exist_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        network_config(NetworkRecipe(**values))


@pytest.mark.parametrize("path", sorted((ROOT / "training" / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_recipes_name_values_that_there_are(path):
    for variant in ["", *load_variants(path)]:
        for network in load_recipe(path, variant=variant).networks.values():
            config = {key: value for key, value in network.config.items() if "name_or_path" not in key}
            preset = "" if network.preset.startswith("from_") else network.preset
            network_config(replace(network, config=config, preset=preset), **config)


@pytest.mark.parametrize(("method", "trained_on"), [("gda", [8]), ("gtlenet", [1, 8])])
def test_rows_of_the_benchmark_by_default(method, trained_on, monkeypatch):
    measured = dict.fromkeys(("seconds", "cpu_seconds", "megabytes"), 1.0)
    monkeypatch.setattr(benchmark, "measure_apart", lambda *args: measured)
    monkeypatch.setattr(benchmark, "count", lambda *args: (10**6, 1e9))
    names = [row[0] for row in benchmark.figures(benchmark.parse_arguments([]), method)]
    assert [f"training step, batch {batch}" in names for batch in (1, 8)] == [b in trained_on for b in (1, 8)]
    assert {"forward, batch 1", "forward, batch 8"} < set(names)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gda", "lsc"])
def test_least_training_batch(method):
    training = benchmark.METHODS[method]
    model = training.build(False)
    assert model(**training.inputs(training.least_training_batch)).loss.isfinite()
    with pytest.raises(ValueError, match="batch of one face"):
        model(**training.inputs(1))


def test_settled_models_have_the_statistics_of_their_inputs():
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(1))
    model.forward = lambda pixel_values: model[0](pixel_values)
    values = torch.tensor([[100.0], [300.0]])
    benchmark.settled(model, {"pixel_values": values, "labels": values})
    torch.testing.assert_close(model(values), torch.tensor([[-1.0], [1.0]]) * 0.5**0.5)
    assert not model.training


def test_memory_of_a_run_is_its_peak():
    """In a new process, for in one that has done much the second tensor may find room beside the first."""
    code = """
import torch, benchmark
def run():
    torch.ones(25_000_000).sum()  # 100 MB for a while
    torch.ones(5_000_000)
print(benchmark.needed_megabytes(run, "cpu"))
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment["PYTHONPATH"] = str(ROOT / "training")
    printed = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
    assert float(printed) == pytest.approx(100, rel=0.1)
