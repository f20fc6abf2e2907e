"""Cards are written from a run's files: every figure comes from there, and what must be said is said."""

import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import CONFIG_MAPPING, AutoModel

from actionunits import checkpoints
from actionunits.action_units import CORPUS_AUS
from actionunits.model_card import (
    PAPERS_SIZES,
    SECTIONS,
    card_name,
    group_gaps,
    is_compact,
    main,
    make_card,
    weak_aus,
    weights_hashes,
    write_card,
)
from actionunits.publishing_terms import training_corpora, training_terms
from toy_run import AUS, write_toy_run

CARDS = Path(__file__).parents[1] / "model_cards"
TEMPLATE = CARDS / "template.md"


@pytest.fixture
def model(tmp_path):
    """A model folder without weights: two networks, LSC from GDA's backbone, graded labels."""
    write_toy_run(tmp_path, "au-escda")
    config = {"model_type": "au-escda", "id2label": {str(i): f"AU{au}" for i, au in enumerate(AUS)}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_card_says_what_it_was_trained_and_measured_on(model):
    text = str(make_card(model, TEMPLATE))
    for statement in (
        "were neither trained nor evaluated on BP4D, DISFA, GFT or any other corpus of coded video.",
        "Labels are blendshape weights, not the codes of FACS coders",
        "40,000 rendered pictures of 75 people for training",
        "3,000 rendered pictures of 16 people for choosing thresholds",
        "ICT-FaceKit, copyright (c) 2020 USC Institute for Creative Technologies, MIT licence",
        "Face Research Lab London Set",
        "Young Adult White Faces",
        "CC BY 4.0",
        "GDA for 6 epochs, LSC for 3 epochs from the backbone of GDA, each trained alone",
        "peak learning rate of 0.003",
        "graded, from 0 at rest to 1 at an intensity of 0.5 and above",
        "AU12 lip corner puller",
        "2,021,579",
        "Weak action units (AUC below 0.8 on renderings): AU25.",
    ):
        assert statement in text, statement
    for use in ("emotions", "deception", "hiring", "medical", "identifying people"):
        assert use in text[text.index("**Not for**") :], use
    assert "{{" not in text and "{%" not in text and "None" not in text


@pytest.mark.parametrize("model_type", PAPERS_SIZES)
def test_compact_networks_are_called_so_and_those_of_papers_are_not(model_type):
    make = CONFIG_MAPPING[model_type]
    make = getattr(make, "paper", make)

    def parameters(count):
        with torch.device("meta"):
            model = AutoModel.from_config(make(aus=list(CORPUS_AUS["synthetic"][:count])))
        return sum(p.numel() for p in model.parameters())

    assert parameters(17) / 1e6 == pytest.approx(PAPERS_SIZES[model_type], abs=0.05)
    assert not is_compact({"model_type": model_type, "parameters": parameters(1)})
    (name,) = (n for n in checkpoints.names() if run_of(n)["model_type"] == model_type)
    assert is_compact(run_of(name))
    assert "a compact network, smaller" in (checkpoints.path(name) / "README.md").read_text(encoding="utf-8")


def run_of(name):
    """What a checkpoint's folder says of its training."""
    return json.loads((checkpoints.path(name) / "run.json").read_text())


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
    assert f"{neutral['false_alarms_per_picture']:.2f} are predicted per picture, and" in text
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


def test_command_names_what_is_missing(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path), "--template", str(TEMPLATE)])
    assert stop.value.code == 2 and "has no config.json" in capsys.readouterr().err


def test_weak_action_units_are_named_worst_first():
    per_au = {"AU1": {"auc": 0.7}, "AU2": {"auc": 0.9}, "AU4": {"auc": None}, "AU6": {"auc": 0.6}}
    assert weak_aus({"calibrated": {"per_au": per_au}}) == ["AU6", "AU1"]


def test_every_section_is_there_and_says_something(model):
    text = str(make_card(model, TEMPLATE))
    found = re.findall(r"^## (.+)\n+(.)", text, re.MULTILINE)
    assert [title for title, _ in found] == list(SECTIONS)
    assert all(first != "#" for _, first in found)


def test_groups_and_the_largest_gap_are_given(model):
    metrics = json.loads((model / "metrics.json").read_text())
    figures = {"people": 2, "pictures": 30, "false_alarm_rate": 0.1, "auc": 0.8}
    metrics["test"]["groups"] = {
        "sex": {"f": {**figures, "f1": 0.61}, "m": {**figures, "f1": 0.66}},
        "skin tone": {
            "I": {**figures, "f1": 0.4},
            "VI": {**figures, "f1": 0.7},
            "III": {**figures, "f1": 0.65},
        },
        "age": {"18-29": {**figures, "f1": 0.6}, "unknown": {**figures, "f1": 0.1}},
    }
    (model / "metrics.json").write_text(json.dumps(metrics))
    gaps = group_gaps(metrics["test"])
    assert [(gap.kind, gap.worst, gap.best) for gap in gaps] == [("skin tone", "I", "VI"), ("sex", "f", "m")]
    assert gaps[0].size == pytest.approx(0.3)
    text = str(make_card(model, TEMPLATE))
    assert "Largest gap in mean F1: **0.30**, skin tone: I 0.40, VI 0.70; sex 0.05 (f 0.61, m 0.66)." in text
    assert "The smaller group of the largest gap has 2 people" in text
    assert "| skin tone: III | 2 | 30 | 0.65 |" in text


def test_a_gap_of_nothing_still_names_two_groups():
    groups = {name: {"f1": 0.5, "people": people} for name, people in (("f", 3), ("m", 2))}
    (gap,) = group_gaps({"groups": {"sex": groups}})
    assert {gap.worst, gap.best} == {"f", "m"} and (gap.size, gap.people) == (0, 2)


def test_a_corpus_without_groups_is_said_to_have_none(model):
    metrics = json.loads((model / "metrics.json").read_text())
    metrics["test"]["groups"] = {}
    (model / "metrics.json").write_text(json.dumps(metrics))
    text = str(make_card(model, TEMPLATE))
    assert "differences between groups are unknown" in text and "Largest gap" not in text


@pytest.mark.parametrize("corpus", ["bp4d", "Somebody's Videos"])
def test_licensed_data_leaves_its_terms_in_the_card(model, corpus):
    run = json.loads((model / "run.json").read_text())
    run["corpus"] |= {"name": corpus, "manifest": {}}
    (model / "run.json").write_text(json.dumps(run))
    card = make_card(model, TEMPLATE)
    (terms,) = training_terms(run)
    text = str(card)
    assert f"- {terms.name} (by {terms.holder}): {terms.terms}" in text
    assert "Use of these weights is restricted" in text
    assert card.data.license == "other"
    for of_renderings in ("rendered", "renderings", "ICT-FaceKit", "neither trained nor evaluated", "None"):
        assert of_renderings not in text, of_renderings


def test_what_nobody_recorded_counts_as_licensed():
    (terms,) = training_terms(None)
    assert not terms.is_free
    assert [corpus.is_free for corpus in training_terms({"corpus": {"manifest": {"generator": "x"}}})] == [
        True
    ]
    assert [corpus.is_free for corpus in training_terms({"corpus": {"manifest": {}}})] == [False]


def test_a_mean_is_bound_by_the_data_of_each_of_its_networks():
    prepared = {"corpus": {"manifest": {"corpus": "bp4d", "plan": {}}}}
    rendered = {"corpus": {"manifest": {"generator": "x"}}}
    run = rendered | {"members": {"lsc": rendered, "ac2d": prepared, "gda": rendered}}
    assert training_corpora(run) == ["synthetic", "bp4d"]
    assert [corpus.name for corpus in training_terms(run)] == ["the open synthetic corpus", "BP4D"]
    encoder = {"name": "somebody/encoder", "triplets": "FEC"}
    assert training_corpora(rendered | {"members": {"gtlenet": rendered | {"encoder": encoder}}})[1:] == [
        "FEC"
    ]


def test_terms_are_given_once():
    started = {"recipe": {"teachers": ["a/b"]}, "inherited": {"a/b": ["bp4d_plus", "DISFA", "disfa"]}}
    encoder = {"name": "c/d", "triplets": "bp4d+"}
    run = started | {"corpus": {"name": ["bp4d+", "bp4d"]}, "encoder": encoder}
    assert [terms.name for terms in training_terms(run)] == ["BP4D+", "BP4D", "DISFA"]


@pytest.mark.parametrize(
    "recipe",
    [
        {"networks": {"gda": {"pretrained": "gda-bp4d/model"}}},
        {"networks": {"lsc": {"backbone_from": "gda-bp4d/model"}}},
        {"networks": {"lac": {"config": {"backbone_name_or_path": "gda-bp4d/model"}}}},
        {"networks": {"gda": {}}, "teachers": ["gda-bp4d/model"]},
    ],
)
def test_weights_are_bound_by_the_data_of_those_that_they_began_with_or_learned_from(model, recipe):
    rendered = {"corpus": {"manifest": {"generator": "x"}}, "recipe": recipe}
    assert training_corpora(rendered)[1:] == ["what gda-bp4d/model was trained on"]
    known = rendered | {"inherited": {"gda-bp4d/model": ["synthetic", "bp4d_plus"]}}
    assert training_corpora(known) == ["synthetic", "bp4d_plus"]
    assert [terms.name for terms in training_terms(known)][1:] == ["BP4D+"]
    assert all(
        terms.is_free for terms in training_terms(known | {"inherited": {"gda-bp4d/model": ["synthetic"]}})
    )
    encoder = {"name": "own/encoder", "triplets": "synthetic corpus", "init": "encoders/vggface2"}
    assert training_corpora({"corpus": rendered["corpus"], "encoder": encoder})[1:] == [
        "what encoders/vggface2 was trained on"
    ]
    run = json.loads((model / "run.json").read_text())
    run["recipe"] |= {"teachers": ["gda-bp4d/model"], "teacher_weight": 0.5}
    run["inherited"] = known["inherited"]
    (model / "run.json").write_text(json.dumps(run))
    card = make_card(model, TEMPLATE)
    assert card.data.license == "other" and "neither trained nor evaluated on BP4D" not in str(card)


def test_weights_are_hashed(model):
    (model / "model.safetensors").write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert weights_hashes(model) == {"model.safetensors": digest}
    assert f"| model.safetensors | SHA-256 `{digest}` |" in str(make_card(model, TEMPLATE))


def test_half_precision_is_said(model):
    assert "float16" not in str(make_card(model, TEMPLATE))
    change(model, "run.json", lambda run: run["recipe"].update(save_dtype="float16"))
    text = str(make_card(model, TEMPLATE))
    assert "| precision | parameters are stored as float16, statistics as float32;" in text


def test_a_member_of_an_ensemble_has_its_own_name(model):
    change(model, "run.json", lambda run: run.update(name="lsc-toy", member="lsc"))
    card = make_card(model, TEMPLATE)
    text = str(card)
    assert "\n# lsc-toy\n" in text and "Recipe `toy-model`:" in text
    assert "These weights are the LSC of the ensemble alone, with its own thresholds." in text
    assert card.data.model_name == "lsc-toy"


def test_mixed_precision_and_single_epochs_are_worded(model):
    values = {"precision": "bf16", "warmup_epochs": 1, "schedule": "inverse-square-root"}
    change(model, "run.json", lambda run: run["recipe"].update(values))
    change(model, "run.json", lambda run: run["recipe"]["networks"]["lsc"].update(epochs=1))
    text = str(make_card(model, TEMPLATE))
    assert "LSC for 1 epoch from" in text and "mixed precision (bf16)" in text
    assert "1 epoch of warm-up, then inverse square root decay" in text


@pytest.mark.parametrize("frozen", [False, True])
def test_a_stand_in_for_the_pretrained_transformer_is_said(model, frozen):
    backbone = {"num_hidden_layers": 6, "hidden_size": 128}
    values = {"model_type": "au-auformer", "freeze_backbone": frozen, "backbone_config": backbone}
    change(model, "config.json", lambda config: config.update(values))
    text = str(make_card(model, TEMPLATE))
    said = "replaced by a small vision transformer of 6 blocks and 128 channels, trained from random weights "
    assert (said + "together with the experts" in text) is not frozen
    recipe = {"name": "toy-backbone", "epochs": 5}
    found = {"lsc": {"name": "vit/model", "recipe": recipe}}
    change(model, "run.json", lambda run: run.update(backbones=found))
    change(model, "run.json", lambda run: run["recipe"]["networks"]["lsc"].update(backbone_from="vit/model"))
    text = str(make_card(model, TEMPLATE))
    before = "on this corpus beforehand (recipe `toy-backbone`, 5 epochs) and then frozen**, so these"
    assert (said + before in text) is frozen
    assert "LSC for 3 epochs from the backbone of `vit/model`" in text


@pytest.mark.parametrize("length", [None, 1, 16])
def test_clips_of_one_frame_are_said(model, length):
    change(model, "config.json", lambda config: config.update(model_type="au-lac"))
    if length is not None:
        change(model, "run.json", lambda run: run["recipe"].update(clips={"length": length}))
    assert ("**each picture was a clip of one frame**" in str(make_card(model, TEMPLATE))) is (length != 16)


def test_what_was_not_pretrained_is_said_of_the_open_corpus_alone(model):
    said = "The paper's backbones were pretrained on MS-Celeb-1M; here **no other data were used**."
    assert said in str(make_card(model, TEMPLATE))
    found = {"lsc": {"name": "ms-celeb-1m/model", "recipe": {}}}
    change(model, "run.json", lambda run: run.update(backbones=found))
    assert said not in str(make_card(model, TEMPLATE))
    change(model, "run.json", lambda run: run.update(backbones={}))
    change(model, "run.json", lambda run: run["corpus"]["manifest"].update(corpus="bp4d"))
    assert said not in str(make_card(model, TEMPLATE))


@pytest.mark.parametrize("balanced", [False, True])
def test_weights_of_action_units_that_the_paper_has_are_missed(model, balanced):
    change(model, "run.json", lambda run: run["recipe"].update(balance_aus=balanced))
    said = "The loss weights all action units and their occurrences equally; the paper weights them"
    assert (said in str(make_card(model, TEMPLATE))) is not balanced
    values = {"model_type": "au-auformer", "gamma_bounds": [1.0, 2.0], "freeze_backbone": True}
    change(model, "config.json", lambda config: config.update(values))
    exponents = "and sets exponents between 1.0 and 2.0 accordingly, here all 1.0."
    assert (exponents in str(make_card(model, TEMPLATE))) is not balanced
    change(model, "config.json", lambda config: config.update(model_type="au-gtlenet"))
    assert said not in str(make_card(model, TEMPLATE))  # its paper has none either


@pytest.mark.parametrize(("kind", "name"), [("dynamic", None), ("cross_entropy", "plain cross-entropy")])
def test_another_loss_than_lacs_is_said(model, kind, name):
    values = {"localization_weight": 0.0, "activation_weight": 1.0, "balance_activation": True}
    values |= {"model_type": "au-lac", "au_loss_type": kind}
    change(model, "config.json", lambda config: config.update(values))
    text = str(make_card(model, TEMPLATE))
    assert ("The loss is not the paper's" in text) is (name is not None)
    if name:
        weights = "weights of 0.0 for L_loc and 1.0 for L_act (paper: 0.5 each), and in L_act equal weight"
        assert f"{name} instead of DWA, {weights}" in text


def test_pretraining_of_the_encoder_is_said(model):
    change(model, "config.json", lambda config: config.update(model_type="au-gtlenet", pretraining="none"))
    assert "The encoder was not pretrained" in str(make_card(model, TEMPLATE))
    figures = {
        "name": "expression/model",
        "steps": 6000,
        "validation_triplets": 2000,
        "triplet_accuracy": 0.876,
    }
    encoder = {**figures, "triplets": "synthetic corpus"}
    change(model, "run.json", lambda run: run.update(encoder=encoder))
    text = str(make_card(model, TEMPLATE))
    assert "6,000 steps on triplets of the synthetic corpus. It finds the most similar pair" in text
    assert "in 88 % of 2,000 triplets of held-out people" in text
    change(model, "run.json", lambda run: run["encoder"].update(au_weight=3.0))
    assert "synthetic corpus, with an auxiliary loss on the corpus'" in str(make_card(model, TEMPLATE))


@pytest.mark.parametrize("encoder", [{"name": "a/b"}, {"name": "a/b", "triplets": "fec.csv"}])
def test_an_encoder_of_other_pictures_brings_their_terms(model, encoder):
    change(model, "run.json", lambda run: run.update(encoder=encoder))
    terms = training_terms(json.loads((model / "run.json").read_text()))
    assert [corpus.is_free for corpus in terms] == [True, False]
    assert make_card(model, TEMPLATE).data.license == "other"


@pytest.mark.parametrize("name", [*checkpoints.names(), checkpoints.LANDMARKS])
def test_committed_cards_are_those_of_the_committed_weights(name):
    """The card beside the packaged weights, and its copy in model_cards/, follow from the files there."""
    folder = checkpoints.path(name)
    template = "template_landmarks.md" if name == checkpoints.LANDMARKS else "template.md"
    card = str(make_card(folder, CARDS / template)).rstrip() + "\n"
    assert (folder / "README.md").read_text() == card
    assert (CARDS / f"{published_name(name)}.md").read_text() == card


def test_every_published_card_is_regenerated_here():
    published = {path.stem for path in CARDS.glob("*.md") if not path.name.startswith("template")}
    names = [*checkpoints.names(), checkpoints.LANDMARKS]
    assert published == {published_name(name) for name in names}
    assert len(published) == len(names), "two checkpoints share a card"


def published_name(name):
    run = checkpoints.path(name) / "run.json"
    return card_name(json.loads(run.read_text())) if run.is_file() else "face-landmarks"


def change(folder, file, change_values):
    values = json.loads((folder / file).read_text())
    change_values(values)
    (folder / file).write_text(json.dumps(values))
