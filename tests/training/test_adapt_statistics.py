"""Batch statistics that follow photographs: against statistics by hand, and what stays."""

import json
import shutil

import pytest
import torch
from PIL import Image, ImageOps
from tiny_run import RECIPE, load_script
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import AutoImageProcessor, AutoModel, pipeline

from actionunits.pictures import sample_photo
from actionunits.synthesis.corpus import split_people


@pytest.fixture(scope="module")
def script():
    return load_script("adapt_statistics")


@pytest.fixture
def folder(run):
    networks = {"gda": RECIPE["networks"]["gda"]}
    return run(networks=networks, epochs=1, save_dtype="float16") / "model"


@pytest.fixture
def photographs(tmp_path):
    """A face, its mirror image, and a picture without a face."""
    picture = Image.open(sample_photo()).convert("RGB")
    made = {"face": picture, "mirrored": ImageOps.mirror(picture), "none": Image.new("RGB", (64, 64))}
    for name, image in made.items():
        image.save(tmp_path / f"{name}.png")
    return [tmp_path / f"{name}.png" for name in made]


def test_the_first_layer_gets_the_statistics_of_what_it_sees(script, folder, photographs, tmp_path):
    """Its input is the same before and after, so mean and variance can be taken by hand."""
    shutil.copytree(folder, tmp_path / "half")
    before = AutoModel.from_pretrained(folder)
    seen = first_layer_input(before, folder, photographs[:2])
    mean, variance = seen.mean((0, 2, 3)), seen.var((0, 2, 3), correction=1)
    script.adapt(folder, photographs, share=1.0)
    after = AutoModel.from_pretrained(folder)
    torch.testing.assert_close(first_norm(after).running_mean, mean)
    torch.testing.assert_close(first_norm(after).running_var, variance)

    script.adapt(tmp_path / "half", photographs, share=0.25)
    half = first_norm(AutoModel.from_pretrained(tmp_path / "half"))
    torch.testing.assert_close(half.running_mean, 0.75 * first_norm(before).running_mean + 0.25 * mean)
    assert all(map(torch.equal, before.parameters(), after.parameters()))
    run = json.loads((folder / "run.json").read_text())
    assert run["statistics"] == {"photographs": 2, "share": 1.0}
    assert (folder / "metrics.json").is_file() and not list(folder.parent.glob("*.partial"))


def first_norm(model):
    return next(module for module in model.modules() if isinstance(module, _BatchNorm))


def first_layer_input(model, folder, photographs):
    """What the first batch normalisation sees of the photographs' faces, (N, C, H, W)."""
    detect = pipeline("au-detection", model=str(folder))
    processor = AutoImageProcessor.from_pretrained(folder)
    seen = []
    first_norm(model).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for photograph in photographs:
        picture = Image.open(photograph)
        [face] = detect(picture)
        with torch.no_grad():
            model.eval()(**processor(picture, landmarks=face["landmarks"], return_tensors="pt"))
    return torch.cat(seen)


def test_batches_are_of_one_size_and_of_the_first_face_of_each_photograph(script, monkeypatch):
    """All batches have the same weight in the statistics, so a small last one would count too much."""

    class Detector:
        def __call__(self, number):
            return [{"landmarks": number}, {"landmarks": -1}] if number != 5 else []

        def image_processor(self, number, landmarks, return_tensors):
            return {"pixel_values": torch.tensor([[number, landmarks]])}

    monkeypatch.setattr(script, "BATCH", 4)
    monkeypatch.setattr(script, "load_picture", lambda number: number)
    batches = [batch["pixel_values"] for batch in script.batches_of_faces(Detector(), range(10))]
    assert [len(batch) for batch in batches] == [3, 3, 3]  # and not 4, 4 and 1
    assert sorted(torch.cat(batches).tolist()) == [[i, i] for i in range(10) if i != 5]


def test_a_second_time_changes_nothing_and_another_share_is_refused(script, folder, photographs):
    script.adapt(folder, photographs, share=0.5)
    weights = (folder / "model.safetensors").read_bytes()
    script.adapt(folder, photographs, share=0.5)
    assert (folder / "model.safetensors").read_bytes() == weights
    with pytest.raises(ValueError, match="share=0.5 before; take the trained one for 0.75"):
        script.adapt(folder, photographs, share=0.75)


def test_what_cannot_be_adapted_is_named(script, run, folder, photographs):
    with pytest.raises(ValueError, match="1 of 2 photographs show a face"):
        script.adapt(folder, photographs[1:], share=0.5)
    with pytest.raises(ValueError, match="share=0 must be above 0"):
        script.adapt(folder, photographs, share=0)
    with pytest.raises(FileNotFoundError, match="elsewhere has no run.json; take folders"):
        script.adapt(folder / "elsewhere", photographs, share=0.5)
    networks = {"geometry": {"model_type": "au-geometry", "config": {"places": [1, 6, 12]}}}
    geometry = run("geometry", networks=networks, epochs=1) / "model"
    with pytest.raises(ValueError, match="has no batch normalisation"):
        script.adapt(geometry, photographs, share=0.5)


def test_photographs_of_other_people_are_not_looked_at(script, monkeypatch):
    people = [{"name": f"london/{i:03d}", "picture": i} for i in range(20)]
    monkeypatch.setattr(script, "read_people", lambda folder: people)
    names = [row["name"] for row in people]
    for seed, manifest in ((0, {}), (3, {"people": split_people(names, seed=3)})):
        seen = script.training_photographs("anywhere", manifest)
        assert {names[i] for i in seen} == set(split_people(names, seed)["train"])
