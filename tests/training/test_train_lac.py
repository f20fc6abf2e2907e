"""LAC by training/train.py: pictures of the toy corpus, and clips of them."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from tiny_run import ROOT
from transformers import AutoModel, Trainer, TrainingArguments
from transformers.models.auto.image_processing_auto import AutoImageProcessor

import network_training
from actionunits.callbacks import EndOfEpochCallback
from actionunits.data import AUCollator, Augmentation, InputGeometry, prepare_corpus, prepare_synthetic
from actionunits.data.corpora import CORPORA
from actionunits.data.sampling import ClipCollator, ClipDataset, sample_clips
from actionunits.evaluation import predict_scores
from actionunits.image_processing_au import AUImageProcessor
from actionunits.models.lac import LacConfig, LacForAUDetection
from recipe import load_recipe, load_variants

BACKBONE = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
LAC = {"lac": {"model_type": "au-lac", "config": {"backbone_config": BACKBONE, "hidden_size": 8}}}
CLIPS = {"length": 2, "subsequences": 4}  # three people of eight pictures, taken for videos: 12 clips


def test_it_trains_on_pictures(run):
    output = run(networks=LAC, image_mean=[0.485, 0.456, 0.406], sharpen=0.5)
    model = AutoModel.from_pretrained(output / "model")
    assert type(model) is LacForAUDetection
    assert [int(each.epochs) for each in model.statistics.values()] == [2, 2, 2]
    processor = AutoImageProcessor.from_pretrained(output / "model")
    assert list(processor.image_mean) == [0.485, 0.456, 0.406] and processor.sharpen == 0.5
    metrics = json.loads((output / "model" / "metrics.json").read_text())
    assert metrics["validation"]["pictures"] == 8


def test_it_trains_on_clips_and_goes_on_to_the_same_bits(run, train, monkeypatch):
    """12 clips in batches of 4: three steps an epoch, checkpoints at 2, 3, 4 and 6."""
    shapes = []
    forward = LacForAUDetection.forward

    def record(self, pixel_values, *args, **kwargs):
        shapes.append(tuple(pixel_values.shape[:-3]))
        return forward(self, pixel_values, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(LacForAUDetection, "forward", record)
        whole = run("whole", networks=LAC, clips=CLIPS, batch_size=4)
    training = [(4, 2)] * 3
    validation = [(1, 2), (1, 1)] * 2 + [(1, 2)]  # of eight pictures: three of two people, two of the third
    assert shapes[:16] == training + validation + training + validation
    assert set(shapes[16:]) == {(8,)}  # the report, picture by picture

    log_step = train.NetworkTraining._log_step

    def log_and_stop(self, *args):
        log_step(self, *args)
        if self.position.step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.NetworkTraining, "_log_step", log_and_stop)
        run("stopped", networks=LAC, clips=CLIPS, batch_size=4)
    resumed = run("stopped", networks=LAC, clips=CLIPS, batch_size=4)
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (whole, resumed)]
    assert weights[0] == weights[1]


def test_the_network_says_what_clips_it_was_trained_on(run):
    """Videos are read by them, so a network of single pictures must not read clips of the paper's length."""
    for clips in ({}, CLIPS):
        config = AutoModel.from_pretrained(
            run(f"run-{len(clips)}", networks=LAC, clips=clips, epochs=1, warmup_epochs=0, batch_size=4)
            / "model"
        ).config
        assert (config.clip_length, config.num_subsequences) == (
            clips.get("length", 1),
            clips.get("subsequences", 12),
        )
    wrong = {"lac": {**LAC["lac"], "config": {**LAC["lac"]["config"], "clip_length": 16}}}
    with pytest.raises(ValueError, match="'clip_length': 16.*length=1.*leave it to the recipe"):
        run("wrong", networks=wrong)


def test_networks_of_pictures_are_trained_on_no_clips(run, tmp_path):
    with pytest.raises(ValueError, match="length=2, but au-geometry takes pictures; use 1"):
        run("wrong", networks={"geometry": {"model_type": "au-geometry"}}, clips=CLIPS)
    assert not (tmp_path / "wrong").exists()


def test_the_trainer_draws_other_clips_each_epoch(corpus, tmp_path):
    """As the README of LAC trains it; the order of clips aside, the Trainer sees those of `sample_clips`."""
    faces = prepare_synthetic(corpus, "train", tmp_path / "prepared").with_aus([1, 12])
    clips = ClipDataset(faces, faces.people, faces.people, clip_length=3, num_subsequences=2, seed=5)
    seen: list[tuple] = []

    class Watched(ClipDataset):
        def __getitems__(self, indices):
            seen.extend(map(tuple, self.clips[np.asarray(indices)].tolist()))
            return super().__getitems__(indices)

    clips.__class__ = Watched
    torch.manual_seed(0)
    model = LacForAUDetection(LacConfig(backbone_config=BACKBONE, hidden_size=8, clip_length=3, aus=[1, 12]))
    before = {name: value.clone() for name, value in model.named_parameters()}
    frames = AUCollator([1, 12], geometry=InputGeometry(input_size=48), augmentation=Augmentation())
    arguments = TrainingArguments(
        str(tmp_path / "run"), num_train_epochs=3, per_device_train_batch_size=2, save_strategy="no",
        remove_unused_columns=False, report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    Trainer(
        model, arguments, train_dataset=clips, data_collator=ClipCollator(frames),
        callbacks=[EndOfEpochCallback()],
    ).train()  # fmt: skip
    drawn = [sample_clips(faces.people, faces.people, 3, 2, (5, epoch)) for epoch in range(3)]
    assert len(seen) == 18
    for epoch, expected in enumerate(drawn):
        assert sorted(seen[6 * epoch : 6 * epoch + 6]) == sorted(map(tuple, expected.tolist()))
    assert sorted(seen[:6]) != sorted(seen[6:12])
    assert any(not torch.equal(before[name], value) for name, value in model.named_parameters())
    assert all(int(each.epochs) == 3 for each in model.statistics.values())


def test_scores_of_clips_are_in_the_order_of_the_faces(corpus, tmp_path):
    faces = prepare_synthetic(corpus, "validation", tmp_path).with_aus([1, 12])
    torch.manual_seed(0)
    model = LacForAUDetection(LacConfig(backbone_config=BACKBONE, hidden_size=8, aus=[1, 12]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    recipe = load_recipe(ROOT / "training" / "recipes" / "lac-synthetic-compact.yaml", ["aus=[1, 12]"])
    collate = network_training.collator(recipe)
    scores = network_training.gathered_clip_scores(model, faces, collate, 100, Accelerator(cpu=True))
    pixels = collate.inputs(faces.__getitems__(range(len(faces))))["pixel_values"]
    with torch.no_grad():
        for person in np.unique(faces.people):
            rows = np.flatnonzero(faces.people == person)
            expected = model(pixels[None, rows]).logits[0].sigmoid().numpy()
            np.testing.assert_allclose(scores[rows], expected, atol=1e-6)
    assert scores.std(0).min() > 1e-4


def test_processes_score_as_many_clips_each(corpus, tmp_path):
    """Five clips on two processes: three forward passes each, and together the scores of one process."""
    faces = prepare_synthetic(corpus, "validation", tmp_path).with_aus([1, 12])
    torch.manual_seed(0)
    model = LacForAUDetection(LacConfig(backbone_config=BACKBONE, hidden_size=8, aus=[1, 12])).eval()
    collate = AUCollator([1, 12], geometry=InputGeometry(input_size=48))
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))

    def scores(rank, processes):
        one = SimpleNamespace(
            num_processes=processes, process_index=rank, device="cpu", reduce=lambda values, _: values
        )
        return network_training.gathered_clip_scores(model, faces, collate, 2, one)

    whole = scores(0, 1)
    assert len(passes) == 5
    parts = [scores(rank, 2) for rank in (0, 1)]
    assert len(passes) == 5 + 3 + 3
    np.testing.assert_array_equal(sum(parts), whole)
    assert whole.min() > 0


@pytest.mark.parametrize("name", ["bp4d", "disfa", "synthetic-compact"])
def test_recipes_have_the_papers_numbers(name):
    recipe = load_recipe(ROOT / "training" / "recipes" / f"lac-{name}.yaml")
    network = recipe.networks["lac"]
    if network.preset == "compact":
        config = LacConfig.compact(**network.config)
        assert config.image_size == recipe.geometry.input_size
        return
    config = LacConfig(**network.config)
    assert (recipe.clips.length, recipe.clips.subsequences) == (16, 12)
    assert network_training.clip_settings(network, recipe) == {"clip_length": 16, "num_subsequences": 12}
    assert recipe.learning_rate == pytest.approx(1e-4)
    assert (recipe.epochs, recipe.batch_size, recipe.weight_decay) == (200, 8, 5e-4)
    assert config.processor_options["image_mean"] == recipe.image_mean
    assert recipe.geometry.aligned_size == config.processor_options["aligned_size"]
    assert recipe.paper.mean == pytest.approx(np.mean(list(recipe.paper.f1.values())), abs=0.051)


@pytest.mark.parametrize(
    "variant", ["backbone", "TS", "ST", "L_loc+L_act", "L_loc+L_act+L_l2g", "L_CE", "L_WA"]
)
def test_variants_are_the_ablations(variant):
    from actionunits.models.lac.configuration_lac import ABLATIONS

    recipe = load_recipe(ROOT / "training" / "recipes" / "lac-bp4d.yaml", variant=variant)
    asked = recipe.networks["lac"].config
    ablation = ABLATIONS["backbone" if variant == "TS" else variant]
    assert LacConfig(**asked).to_dict() == LacConfig(**asked | ablation).to_dict()
    assert recipe.learning_rate == pytest.approx(1e-4)
    is_of_still_pictures = variant in ("backbone", "TS") or ablation.get("temporal") == "none"
    frames = recipe.batch_size * recipe.clips.length
    assert (recipe.epochs, frames) == ((20, 64) if is_of_still_pictures else (200, 8 * 16))
    assert recipe.paper.mean > 60


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("bp4d", {f"t-{t}": (t, 12) for t in (2, 4, 8, 32, 64)}),
        ("disfa", {f"n-sep-{n}": (16, n) for n in (1, 2, 4, 8, 12, 16)}),
    ],
)
def test_variants_are_tables_v_and_vi(name, table):
    """Clips are all that they change of TS, which is the backbone alone on clips."""
    from actionunits.models.lac.configuration_lac import ABLATIONS

    path = ROOT / "training" / "recipes" / f"lac-{name}.yaml"
    assert table.keys() <= load_variants(path).keys()
    for variant, clips in table.items():
        recipe = load_recipe(path, variant=variant)
        network = recipe.networks["lac"]
        assert (recipe.clips.length, recipe.clips.subsequences) == clips
        assert recipe.learning_rate == pytest.approx(1e-4)
        assert recipe.batch_size * recipe.clips.length == 64
        settings = network_training.clip_settings(network, recipe)
        assert (settings["clip_length"], settings["num_subsequences"]) == clips
        config = LacConfig(**network.config | settings)
        assert config.to_dict() == LacConfig(**network.config | settings | ABLATIONS["backbone"]).to_dict()


def test_recordings_of_a_prepared_corpus_are_its_sequences_and_measured_clip_by_clip(tmp_path):
    CORPORA["bp4d"].write_tiny(tmp_path / "disc")
    faces = prepare_corpus("bp4d", tmp_path / "disc", tmp_path / "out", aligned_size=64).faces.select(
        range(8)
    )
    names = network_training.sequence_names(faces)
    assert names.tolist() == ["F001/T1"] * 4 + ["F001/T2"] * 4
    torch.manual_seed(0)
    model = LacForAUDetection(
        LacConfig(backbone_config=BACKBONE, hidden_size=8, clip_length=3, aus=list(faces.aus))
    ).eval()
    size = {"height": 48, "width": 48}
    processor = AUImageProcessor(aligned_size=64, crop_size=size, size=size, aus=list(faces.aus))
    scores = predict_scores(model, processor, faces)
    for rows in ([0, 1, 2], [3], [4, 5, 6], [7]):
        inputs = processor(
            [faces.picture(row) for row in rows], landmarks=list(faces.landmarks[rows]), return_tensors="pt"
        )
        with torch.no_grad():
            expected = model(inputs["pixel_values"][None]).logits.sigmoid()[0].numpy()
            alone = model(inputs["pixel_values"]).logits.sigmoid().numpy()
        np.testing.assert_allclose(scores[rows], expected, atol=1e-6)
        assert len(rows) == 1 or not np.allclose(alone, expected, atol=1e-6)
