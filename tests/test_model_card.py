"""Cards are written from a run's files: every figure comes from there, and what must be said is said."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard

from actionunits import checkpoints
from actionunits.data import AlignedFaces
from actionunits.evaluation import evaluation_report
from actionunits.model_card import main, make_card, weak_aus, write_card

CARDS = Path(__file__).parents[1] / "model_cards"
TEMPLATE = CARDS / "template.md"
AUS = (1, 12, 25)


@pytest.fixture
def model(tmp_path):
    """A model folder without weights: two networks, LSC from GDA's backbone, graded labels."""
    rng = np.random.default_rng(0)
    occurrence = (rng.random((60, 3)) < 0.4).astype(np.int8)
    occurrence[:5] = 0
    scores = np.clip(0.5 * occurrence + 0.5 * rng.random((60, 3)), 0, 1)
    scores[:, 2] = rng.random(60)  # AU25 is not learnt
    faces = AlignedFaces(
        pictures=np.zeros((0, 1, 1, 3), np.uint8),
        rows=np.arange(60),
        landmarks=np.zeros((60, 68, 2)),
        alignments=np.zeros((60, 2, 3)),
        aligned_size=200,
        scheme="ibug68",
        aus=AUS,
        occurrence=occurrence,
        intensities=occurrence * rng.random((60, 3)),
        people=np.repeat(["a", "b", "c"], 20),
        groups={"sex": np.repeat(["f", "m", "f"], 20)},
    )
    metrics = {
        split: evaluation_report(scores, faces, [0.5, 0.6, 0.7], split) for split in ("validation", "test")
    }
    recipe = {
        "name": "toy-model",
        "networks": {
            "gda": {"backbone_from": "", "pretrained": "", "epochs": 0},
            "lsc": {"backbone_from": "gda", "pretrained": "", "epochs": 3},
        },
        "target": "intensity",
        "full_intensity": 0.5,
        "balance_aus": False,
        "geometry": {"input_size": 112},
        "epochs": 6,
        "warmup_epochs": 0.5,
        "batch_size": 64,
        "base_learning_rate": 0.012,
        "weight_decay": 0.05,
        "clip_norm": 3.0,
        "precision": "fp32",
        "epoch_selection": "last",
        "max_false_alarms": 0.1,
        "seed": 0,
    }
    splits = {
        "train": {"pictures": 40000, "people": 75, "skipped": 0},
        "validation": {"pictures": 3000, "people": 16, "skipped": 0},
        "test": {"pictures": 60, "people": 3, "skipped": 0},
    }
    run = {
        "recipe": recipe,
        "corpus": {"manifest": {"generator": "actionunits 0.1.0"}, "splits": splits},
        "model_type": "au-escda",
        "parameters": 2021579,
        "selected_epochs": {"gda": 6, "lsc": 3},
        "device": "cpu",
        "processes": 1,
        "versions": {"python": "3.12.1", "torch": "2.13.0"},
        "finished": "2026-11-20",
    }
    config = {"model_type": "au-escda", "id2label": {str(i): f"AU{au}" for i, au in enumerate(AUS)}}
    for name, content in (("config", config), ("run", run), ("metrics", metrics)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def test_card_says_what_it_was_trained_and_measured_on(model):
    text = str(make_card(model, TEMPLATE))
    for statement in (
        "were not trained on BP4D, DISFA, GFT or any other corpus of coded video, and were not measured on",
        "Labels are gains of blendshapes, not scores of FACS coders",
        "40,000 rendered pictures of 75 people for training",
        "3,000 rendered pictures of 16 people for choosing thresholds",
        "ICT-FaceKit, copyright (c) 2020 USC Institute for Creative Technologies, MIT licence",
        "Face Research Lab London Set",
        "Young Adult White Faces",
        "CC BY 4.0",
        "GDA for 6 epochs, LSC for 3 epochs from the backbone of GDA, each trained alone",
        "highest learning rate of 0.003",
        "0 where nothing moves and 1 from an intensity of 0.5 on",
        "AU12 lip corner puller",
        "2,021,579",
        "Weak action units, by AUC below 0.8 on renderings: AU25.",
    ):
        assert statement in text, statement
    for use in ("emotions", "deception", "hiring", "medical", "identifying people"):
        assert use in text[text.index("**Not for**") :], use
    assert "{{" not in text and "{%" not in text and "None" not in text


def test_model_index_has_the_measured_figures(model, tmp_path):
    write_card(model, TEMPLATE)
    data = ModelCard.load(model / "README.md").data
    mean = json.loads((model / "metrics.json").read_text())["test"]["calibrated"]["mean"]
    measured = {result.metric_type: result.metric_value for result in data.eval_results}
    assert measured == {name: round(mean[name], 4) for name in ("f1", "auc", "correlation")}
    assert {result.dataset_split for result in data.eval_results} == {"test"}
    assert (data.license, data.library_name) == ("apache-2.0", "transformers")


def test_figures_in_the_text_are_those_of_the_split_measured(model):
    metrics = json.loads((model / "metrics.json").read_text())
    text = str(make_card(model, TEMPLATE))
    row = metrics["test"]["calibrated"]["per_au"]["AU12"]
    assert re.search(rf"\| AU12 \| lip corner puller \|.*\| {row['f1']:.2f} \|", text)
    neutral = metrics["test"]["neutral"]
    assert f"{neutral['false_alarms_per_picture']:.2f} are reported a picture" in text
    del metrics["test"]
    (model / "metrics.json").write_text(json.dumps(metrics))
    assert "The validation people of the same corpus" in str(make_card(model, TEMPLATE))


def test_sources_of_the_manifest_come_first(model):
    run = json.loads((model / "run.json").read_text())
    run["corpus"]["manifest"]["sources"] = {"photographs": "Drawn Faces, by nobody, CC0"}
    (model / "run.json").write_text(json.dumps(run))
    text = str(make_card(model, TEMPLATE))
    assert "- photographs: Drawn Faces, by nobody, CC0" in text and "London" not in text


def test_command_writes_the_same_card_every_time(model, tmp_path):
    output = tmp_path / "card.md"
    main([str(model), "--template", str(TEMPLATE), "--output", str(output)])
    write_card(model, TEMPLATE)
    assert output.read_text() == (model / "README.md").read_text()


def test_a_folder_without_a_run_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        FileNotFoundError, match=r"has no run.json; the card is written from a folder that train.py"
    ):
        make_card(tmp_path, TEMPLATE)


def test_weak_action_units_are_named_worst_first():
    per_au = {"AU1": {"auc": 0.7}, "AU2": {"auc": 0.9}, "AU4": {"auc": None}, "AU6": {"auc": 0.6}}
    assert weak_aus({"calibrated": {"per_au": per_au}}) == ["AU6", "AU1"]


def test_committed_cards_are_those_of_the_committed_weights():
    """The card beside the packaged weights, and its copy in model_cards/, follow from the run's files."""
    folder = checkpoints.FOLDER / "default"
    if not (folder / "run.json").is_file():
        pytest.skip("the package holds no trained weights")
    card = str(make_card(folder, TEMPLATE)).rstrip() + "\n"
    name = json.loads((folder / "run.json").read_text())["recipe"]["name"]
    assert (folder / "README.md").read_text() == card
    assert (CARDS / f"{name}.md").read_text() == card
