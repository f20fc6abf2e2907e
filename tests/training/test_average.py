"""Networks put together after their training: what is written, and what does not go together."""

import json
import shutil

import pytest
import torch
from tiny_run import RECIPE, TINY_AC2D, load_script
from transformers import AutoImageProcessor, AutoModel

from actionunits import EnsembleForAUDetection
from actionunits.checkpoints import path as checkpoint
from actionunits.data import prepare_synthetic
from actionunits.publishing_terms import training_corpora

AC2D = {"ac2d": {"model_type": "au-ac2d", "config": TINY_AC2D}}


@pytest.fixture(scope="module")
def average():
    return load_script("average")


@pytest.fixture
def folders(run):
    """LSC and GDA for 48 pixels, AC2D for 32."""
    escda = run("escda", epochs=1, save_dtype="float16")
    small = RECIPE["geometry"] | {"input_size": 32}
    ac2d = run("ac2d", networks=AC2D, geometry=small, epochs=1, save_dtype="float16")
    return [escda / "members" / "lsc", escda / "members" / "gda", ac2d / "model"]


def test_the_answer_is_the_mean_and_the_run_tells_of_all(average, folders, tmp_path):
    average.main([*map(str, folders), "--output", str(tmp_path / "ensemble"), "--name", "mean-of-three"])
    folder = tmp_path / "ensemble" / "model"
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(model) is EnsembleForAUDetection and not any(info.values())
    assert AutoImageProcessor.from_pretrained(folder).size == {"height": 48, "width": 48}
    pictures, centers = torch.randn(2, 3, 48, 48), torch.rand(2, 3, 2, 2) * 48
    gda = AutoModel.from_pretrained(folders[1])
    output = model(pictures, centers)
    torch.testing.assert_close(output.branch_logits[:, 1], gda(pictures).logits)
    torch.testing.assert_close(output.logits, output.branch_logits.mean(1))

    run = json.loads((folder / "run.json").read_text())
    members = [json.loads((each / "run.json").read_text()) for each in folders]
    assert run["name"] == "mean-of-three" and list(run["members"].values()) == members
    assert run["parameters"] == sum(member["parameters"] for member in members)
    assert run["recipe"]["geometry"]["input_size"] == 48 and run["recipe"]["networks"] == {}
    assert training_corpora(run) == ["synthetic"]


def test_weights_and_places_travel_into_the_folder(average, folders, run, tmp_path, capsys):
    small = RECIPE["geometry"] | {"input_size": 16}
    networks = {"geometry": {"model_type": "au-geometry", "config": {"places": [1, 6, 12]}}}
    geometry = run("geometry", networks=networks, geometry=small, epochs=1, save_dtype="float16") / "model"
    assert AutoImageProcessor.from_pretrained(geometry).aus == [1, 6, 12]
    words = [*map(str, [folders[1], geometry]), "--output", str(tmp_path / "mean")]
    average.main([*words, "--weight", "geometry=2"])
    model = AutoModel.from_pretrained(tmp_path / "mean" / "model")
    assert model.config.network_weights == {"geometry": 2}
    assert AutoImageProcessor.from_pretrained(tmp_path / "mean" / "model").aus == model.config.places
    with pytest.raises(SystemExit):
        average.main([*words, "--weight", "lsc=2"])
    assert "--weight names ['lsc'], the networks are ['gda', 'geometry']" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        average.main([*words, "--weight", "gda=-1"])
    assert "network_weights has 'gda': -1.0; it takes positive numbers" in capsys.readouterr().err


def test_pictures_are_as_sharp_as_the_largest_networks_are(average, folders, tmp_path):
    for folder, amount in zip(folders, (1.5, 1.5, 0.0), strict=True):
        processor = json.loads((folder / "preprocessor_config.json").read_text()) | {"sharpen": amount}
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    average.average([folders[2], *folders[:2]], tmp_path / "model")
    assert AutoImageProcessor.from_pretrained(tmp_path / "model").sharpen == 1.5
    assert json.loads((tmp_path / "model" / "run.json").read_text())["recipe"]["sharpen"] == 1.5


def test_no_network_is_overwritten_by_the_mean(average, tmp_path, capsys):
    for name in ("lsc", "gda"):
        shutil.copytree(checkpoint(name), tmp_path / name / "model")
    before = (tmp_path / "gda" / "model" / "config.json").read_bytes()
    words = [str(tmp_path / name / "model") for name in ("lsc", "gda")]
    with pytest.raises(SystemExit):
        average.main([*words, "--output", str(tmp_path / "gda")])
    assert "is one of the networks and would be lost" in capsys.readouterr().err
    assert (tmp_path / "gda" / "model" / "config.json").read_bytes() == before


def test_it_is_calibrated_as_any_other(average, folders, corpus, tmp_path, monkeypatch):
    average.average(folders, tmp_path / "model")
    calibrate = load_script("calibrate")
    monkeypatch.setattr(
        calibrate, "photograph_scores", lambda *_: torch.rand(30, 3, generator=torch.manual_seed(0)).numpy()
    )
    faces = {s: prepare_synthetic(corpus, s, tmp_path / "prepared") for s in ("validation", "test")}
    calibrate.calibrate(tmp_path / "model", faces, photographs=[None] * 30)
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert "the mean of the logits of 3 networks (LSC, the local network of ESCDA" in card
    assert "described in the cards of `tiny-lsc`, `tiny-gda` and `tiny`." in card
    assert card.count("IJCV, 2025") == card.count("Pattern Recognition, 2025") == 2
    assert "The methods are those of" in card and "Assembled 20" in card
    assert "{{" not in card and "{%" not in card and "Recipe `" not in card


def test_networks_that_were_not_trained_alike_are_refused(average, folders, run, tmp_path, capsys):
    def refused(*networks):
        with pytest.raises(SystemExit):
            average.main([*map(str, networks), "--output", str(tmp_path / "no")])
        assert not (tmp_path / "no").exists()
        return capsys.readouterr().err

    lsc, gda, ac2d = folders
    assert "one network of each kind, got ['gda', 'gda']" in refused(gda, gda)
    assert "has no run.json; take folders that train.py wrote" in refused(lsc, tmp_path)
    other = run("other", networks=AC2D, epochs=1, target="occurrence", save_dtype="float16") / "model"
    assert "was trained with target='occurrence'" in refused(lsc, other)
    described = json.loads((ac2d / "run.json").read_text())
    of_lsc = json.loads((lsc / "run.json").read_text())
    fold = described["recipe"] | {"split": described["recipe"]["split"] | {"fold": "2"}}
    (ac2d / "run.json").write_text(json.dumps(described | {"recipe": fold, "corpus": of_lsc["corpus"]}))
    assert "was trained with split={'fold': '2'," in refused(lsc, ac2d)
    described["corpus"]["splits"]["train"]["people"] = 1
    (ac2d / "run.json").write_text(json.dumps(described))
    assert "was trained on another corpus or other people than" in refused(lsc, ac2d)
    processor = json.loads((ac2d / "preprocessor_config.json").read_text()) | {"image_mean": [0.4, 0.5, 0.5]}
    (ac2d / "preprocessor_config.json").write_text(json.dumps(processor))
    assert "have image_mean=(0.4, 0.5, 0.5)" in refused(lsc, ac2d)
