"""GTLE-Net in training/train.py, its schedule, and the picture of its embeddings."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import ROOT, load_script
from transformers import AutoModel

import network_training
from actionunits import (
    AUFormerConfig,
    AUFormerForAUDetection,
    AUImageProcessor,
    GlobalExpressionEncoder,
    GlobalExpressionEncoderConfig,
    GtleNetForAUDetection,
)
from actionunits.publishing_terms import training_corpora

TINY = {
    "encoder_config": {"width_multiplier": 0.125, "depths": [1, 1, 1]},
    "feature_channels": [8, 6],
    "mask_channels": [6, 4],
    "classifier_channels": [4, 8],
}


@pytest.fixture
def encoder_folder(tmp_path):
    torch.manual_seed(0)
    config = GlobalExpressionEncoderConfig(**TINY["encoder_config"], image_size=48, pretraining="expression")
    GlobalExpressionEncoder(config).save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def test_a_run_starts_from_its_encoder_and_ends_in_a_model(run, encoder_folder):
    start = {"encoder_name_or_path": str(encoder_folder), "pretraining": "expression"}
    networks = {"gtlenet": {"model_type": "au-gtlenet", "config": {**TINY, **start}}}
    output = run(networks=networks, epochs=1, schedule="inverse-square-root", base_learning_rate=1e-4)
    model = AutoModel.from_pretrained(output / "model")
    assert type(model) is GtleNetForAUDetection
    assert (model.config.aus, model.config.image_size) == ([1, 12, 26], 48)
    assert json.loads((output / "model" / "run.json").read_text())["model_type"] == "au-gtlenet"
    encoder = AutoModel.from_pretrained(encoder_folder)
    for name, weight in encoder.trunk.named_parameters():
        torch.testing.assert_close(model.trunk.get_parameter(name), weight, rtol=0, atol=1e-4)
    events = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert all(math.isfinite(event["loss"]) for event in events if event["event"] == "step")


def test_a_result_knows_its_encoder_but_not_where_it_lay(run, encoder_folder):
    figures = {
        "steps": 6,
        "triplet_accuracy": 0.75,
        "validation_triplets": 40,
        "triplets": "synthetic corpus",
    }
    (encoder_folder / "metrics.json").write_text(json.dumps(figures))
    (encoder_folder.parent / "settings.json").write_text(json.dumps({"triplets": 4096, "au_weight": 3.0}))
    start = {"encoder_name_or_path": str(encoder_folder), "pretraining": "expression"}
    networks = {"gtlenet": {"model_type": "au-gtlenet", "config": {**TINY, **start}}}
    folder = run(networks=networks, epochs=1) / "model"
    name = "/".join(encoder_folder.parts[-2:])
    described = json.loads((folder / "run.json").read_text())
    assert described["encoder"] == {"name": name, **figures, "au_weight": 3.0}
    assert described["recipe"]["networks"]["gtlenet"]["config"]["encoder_name_or_path"] == name
    for file in ("run.json", "config.json", "README.md"):
        assert str(encoder_folder) not in (folder / file).read_text()
    assert AutoModel.from_pretrained(folder).config.pretraining == "expression"
    assert "finds the most similar pair in 75 %" in (folder / "README.md").read_text()
    further = {"gtlenet": {"model_type": "au-gtlenet", "pretrained": str(folder)}}
    gone_on = run(networks=further, epochs=1, name="further") / "model" / "run.json"
    assert json.loads(gone_on.read_text())["encoder"] == described["encoder"]
    assert str(folder) not in gone_on.read_text()


def test_what_a_result_began_with_on_the_hub_is_known_by_its_terms(train):
    config = GtleNetForAUDetection.config_class.paper(encoder_name_or_path="lab/encoder")
    recipe = {"networks": {"gtlenet": {"config": {"encoder_name_or_path": "lab/encoder"}}}}
    encoder = train.take_out_encoder(SimpleNamespace(config=config), recipe)
    run = {"recipe": recipe, "encoder": encoder, "corpus": {"name": "synthetic"}}
    assert training_corpora(run) == ["synthetic", "what lab/encoder was trained on"]


def test_the_learning_rate_falls_with_the_root_of_the_steps():
    factor = network_training.SCHEDULES["inverse-square-root"](warmup_steps=4, total_steps=100)
    np.testing.assert_allclose([factor(step) for step in range(4)], [0.2, 0.4, 0.6, 0.8])
    np.testing.assert_allclose([factor(step) for step in (4, 16, 64, 100)], [1, 0.5, 0.25, 0.2])
    at_once = network_training.SCHEDULES["inverse-square-root"](warmup_steps=0, total_steps=9)
    np.testing.assert_allclose([at_once(0), at_once(4)], [1, 0.5])


def test_recipes_build_the_papers_networks():
    from recipe import load_recipe, load_variants

    path = ROOT / "training" / "recipes" / "gtlenet-bp4d.yaml"
    for variant in ("", *load_variants(path)):
        recipe = load_recipe(path, variant=variant)
        assert recipe.learning_rate == pytest.approx(1e-5)
        fields = dict(recipe.networks["gtlenet"].config)
        name = fields.pop("encoder_name_or_path")
        assert (name is None) == (fields["pretraining"] == "none")
        with torch.device("meta"):
            model = GtleNetForAUDetection(GtleNetForAUDetection.config_class.paper(**fields))
        assert model.config.map_size == recipe.geometry.input_size == 256


@pytest.mark.parametrize(
    ("name", "variant", "frames"),  # of the training people; of three folds all but a third
    [
        ("bp4d", "", 146_847 * 2 // 3),
        ("bp4d", "for-bp4d+", 146_847),
        ("disfa", "", 130_815 * 2 // 3),
        ("bp4d+", "", 198_000 * 2 // 3),
    ],
)
def test_recipes_warm_up_for_a_thousand_steps(name, variant, frames):
    from recipe import load_recipe

    recipe = load_recipe(ROOT / "training" / "recipes" / f"gtlenet-{name}.yaml", variant=variant)
    steps = recipe.warmup_epochs * network_training.steps_per_epoch(frames, recipe, processes=1)
    assert steps == pytest.approx(1000, rel=0.01)
    assert recipe.epochs == 20 and recipe.batch_size == 10


def test_no_recipe_of_a_table_enlarges_the_face():
    from recipe import load_recipe

    for path in (ROOT / "training" / "recipes").glob("*.yaml"):
        recipe = load_recipe(path)
        geometry = recipe.geometry
        assert not recipe.paper.mean or geometry.crop_size >= geometry.input_size, path.name
    for name in ("bp4d", "disfa", "bp4d+"):
        recipe = load_recipe(ROOT / "training" / "recipes" / f"gtlenet-{name}.yaml")
        in_use = GtleNetForAUDetection.config_class.paper().processor_options
        share = in_use["crop_size"]["width"] / in_use["aligned_size"]
        assert recipe.geometry.crop_size / recipe.geometry.aligned_size == share
        assert recipe.geometry.input_size == in_use["size"]["width"]


def test_embeddings_become_a_picture(corpus, encoder_folder, tmp_path):
    pytest.importorskip("sklearn")
    script = load_script("plot_au_embeddings")
    fields = {name: value for name, value in TINY.items() if name != "encoder_config"}
    model = GtleNetForAUDetection.from_encoder(encoder_folder, aus=[12, 45, 1], **fields)
    model.save_pretrained(tmp_path / "model")
    AUImageProcessor(**model.config.processor_options).save_pretrained(tmp_path / "model")
    output = tmp_path / "figures" / "fig6.png"  # a folder that is not there yet
    arguments = ["--models", tmp_path / "model", "--data", corpus, "--split", "train", "--output", output]
    script.main([*map(str, arguments), "--pictures", "20"])
    columns, rows = 2, 1  # AU45 is not in the corpus
    assert Image.open(output).size == (columns * 210 + 10, rows * 234 + 10)
    colours = set(map(tuple, np.asarray(Image.open(output).convert("RGB")).reshape(-1, 3).tolist()))
    assert {(0xD5, 0x5E, 0x00), (0x00, 0x72, 0xB2)} <= colours
    faces = script.prepare_synthetic(corpus, "train", tmp_path / "prepared").select(range(5))
    embeddings, aus = script.embed(str(tmp_path / "model"), faces)
    assert aus == [12, 1]
    assert embeddings.shape == (5, 2, 8)
    model = GtleNetForAUDetection.from_pretrained(tmp_path / "model", aus=aus).eval()
    processor = AUImageProcessor(**model.config.processor_options, sharpen=1.5)
    processor.save_pretrained(tmp_path / "model")
    seen = processor([faces.picture(i) for i in range(5)], landmarks=list(faces.landmarks))["pixel_values"]
    with torch.no_grad():
        expected = model.au_embeddings(torch.tensor(np.array(seen)))
    embeddings, _ = script.embed(str(tmp_path / "model"), faces)  # of the pictures that the model sees in use
    np.testing.assert_allclose(embeddings, expected, atol=1e-5)


def test_embeddings_of_all_action_units_share_a_panel(corpus, tmp_path):
    pytest.importorskip("sklearn")
    script = load_script("plot_au_embeddings")
    vit = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    config = AUFormerConfig(backbone_config=vit | {"image_size": 32, "patch_size": 16}, aus=[45, 12, 1])
    model = AUFormerForAUDetection(config).eval()
    with torch.no_grad():
        for line in model.experts.values():  # which say nothing before they are trained
            line.up_weight.normal_()
    model.save_pretrained(tmp_path / "model")
    processor = AUImageProcessor(**config.processor_options)
    processor.save_pretrained(tmp_path / "model")
    output = tmp_path / "fig5.png"
    arguments = ["--models", tmp_path / "model", "--data", corpus, "--split", "train", "--output", output]
    script.main([*map(str, arguments), "--pictures", "6", "--together"])
    assert Image.open(output).size == (210 + 10, 234 + 10)
    faces = script.prepare_synthetic(corpus, "train", tmp_path / "prepared").select(range(6))
    (panel,) = script.together(str(tmp_path / "model"), faces, seed=0)
    assert panel["dots"].shape == (12, 2)  # AU45 is not in the corpus
    assert list(panel["colours"]) == [panel["colours"][0], panel["colours"][1]] * 6
    assert panel["colours"][0] != panel["colours"][1]
    assert [text for text, _ in panel["marks"]] == ["12", "1"]
    np.testing.assert_allclose(panel["marks"][1][1], np.median(panel["dots"][1::2], axis=0))
    embeddings, aus = script.embed(str(tmp_path / "model"), faces)
    seen = processor([faces.picture(i) for i in range(6)], landmarks=list(faces.landmarks))["pixel_values"]
    with torch.no_grad():  # of the whole group: the experts of AU45 collaborate, too
        expected = model.au_embeddings(torch.tensor(np.array(seen)))[:, 1:]
    assert aus == [12, 1]
    np.testing.assert_allclose(embeddings, expected, atol=1e-5)


def test_neighbours_of_the_same_label_by_hand():
    script = load_script("plot_au_embeddings")
    vectors = np.array([[0.0], [1.0], [10.0]])
    assert script.same_label_share(vectors, np.array([True, True, False])) == pytest.approx(1 / 3)
    assert script.same_label_share(vectors, np.array([True, True, True])) == 1
