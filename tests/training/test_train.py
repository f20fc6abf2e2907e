"""Whole runs of training/train.py on a toy corpus: what comes out, and that interruptions leave no trace."""

import json
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_run import RECIPE, ROOT, SAME_FOR_ALL, TINY, TINY_AC2D
from transformers import AutoModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor

import joint_selection
import network_training
import teaching
from actionunits import EscdaForAUDetection, GdaForAUDetection
from actionunits.data import NO_AUGMENTATION, AUCollator, Augmentation, load_synthetic, prepare_synthetic
from actionunits.evaluation import predict_scores
from recipe import load_recipe

GDA = {"gda": RECIPE["networks"]["gda"]}


class InterruptedRunError(Exception):
    """Stands for anything that ends a run early."""


def events(run: Path, kind: str) -> list[dict]:
    return [e for e in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if e["event"] == kind]


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def test_a_run_ends_in_a_model_folder_that_loads_and_says_what_it_is(run, evaluate, corpus, tmp_path):
    output = run()
    folder = output / "model"
    model, processor = AutoModel.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    assert type(model) is EscdaForAUDetection
    assert model.config.aus == processor.aus == [1, 12, 26]
    assert (processor.size["height"], processor.crop_size["height"], processor.aligned_size) == (48, 176, 200)

    # The ensemble holds the two networks as they were trained.
    for name, network in (("lsc", model.lsc), ("gda", model.gda)):
        alone = AutoModel.from_pretrained(output / name / "model").state_dict()
        assert alone.keys() == network.state_dict().keys()
        assert all(torch.equal(value, network.state_dict()[key]) for key, value in alone.items())

    # Thresholds and figures are those of the weights: measuring again gives the same report.
    metrics = json.loads((folder / "metrics.json").read_text())
    assert model.config.au_thresholds == [
        row["threshold"] for row in metrics["test"]["calibrated"]["per_au"].values()
    ]
    assert len(set(model.config.au_thresholds)) == 3
    evaluate.main(
        ["--model", str(folder), "--data", str(corpus), "--split", "test", "--output", str(tmp_path / "e")]
    )
    again = json.loads((tmp_path / "e" / "metrics-test.json").read_text())
    assert again["calibrated"] == metrics["test"]["calibrated"]
    assert set(again["groups"]["age"]) == {"18-29", "30-44", "45-120"}

    # Occurrence rates are the training split's (ESCDA Eq. 8).
    labels = [row["au_occurrence"] for row in load_synthetic(corpus, "train")]
    rates = np.mean(labels, axis=0)[[0, 8, 16]]
    np.testing.assert_allclose(model.config.au_occurrence_rates, rates)

    described = json.loads((folder / "run.json").read_text())
    assert described["recipe"]["batch_size"] == 8
    assert described["corpus"]["splits"]["train"] == {"pictures": 24, "people": 3, "skipped": 0}
    assert "BP4D" in (folder / "README.md").read_text()
    assert not list(output.rglob("*.partial")) and not list(output.rglob(".*.part"))


def test_half_precision_is_rounded_before_it_is_measured(run, train, evaluate, corpus, tmp_path):
    """Measured again, the stored weights give the figures beside them; the trained ones are kept whole."""
    folder = run(networks=GDA, epochs=1, save_dtype="float16") / "model"
    trained = AutoModel.from_pretrained(folder.parent / "gda" / "model")
    stored = load_file(folder / "model.safetensors")
    assert {stored[name].dtype for name, _ in trained.named_parameters()} == {torch.float16}
    model = AutoModel.from_pretrained(folder)
    assert model.dtype == torch.float32 and trained.dtype == torch.float32
    pairs = zip(model.parameters(), trained.parameters(), strict=True)
    assert all(torch.equal(a, b.half().float()) for a, b in pairs)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), trained.parameters(), strict=True))
    metrics = json.loads((folder / "metrics.json").read_text())
    options = {"model": folder, "data": corpus, "split": "test", "output": tmp_path / "e"}
    evaluate.main([f"--{name}={value}" for name, value in options.items()])
    again = json.loads((tmp_path / "e" / "metrics-test.json").read_text())
    assert again["calibrated"] == metrics["test"]["calibrated"]
    assert "stored as float16" in (folder / "README.md").read_text()


def test_members_of_an_ensemble_are_measured_alone(run, evaluate, corpus, tmp_path):
    output = run("escda", epochs=1, save_dtype="float16")
    thresholds = {}
    for name in ("lsc", "gda"):
        folder = output / "members" / name
        model = AutoModel.from_pretrained(folder)
        whole = getattr(AutoModel.from_pretrained(output / "model"), name).state_dict()
        assert all(torch.equal(value, whole[key]) for key, value in model.state_dict().items())
        described = json.loads((folder / "run.json").read_text())
        assert (described["name"], described["member"]) == (f"tiny-{name}", name)
        assert described["model_type"] == f"au-{name}" == model.config.model_type
        assert f"# tiny-{name}" in (folder / "README.md").read_text()
        options = {"model": folder, "data": corpus, "split": "test", "output": tmp_path / name}
        evaluate.main([f"--{key}={value}" for key, value in options.items()])
        again = json.loads((tmp_path / name / "metrics-test.json").read_text())
        metrics = json.loads((folder / "metrics.json").read_text())
        assert again["calibrated"] == metrics["test"]["calibrated"]
        thresholds[name] = model.config.au_thresholds
    assert thresholds["lsc"] != thresholds["gda"]


def test_an_interrupted_run_goes_on_to_the_same_bits(run, train, monkeypatch):
    """24 pictures in batches of 8: epochs end at steps 3 and 6, checkpoints lie at 2, 3, 4 and 6."""
    whole = run("whole")
    log_step = train.NetworkTraining._log_step
    for stop_at, checkpoint in ((3, 2), (5, 4)):

        def log_and_stop(self, *args, stop_at=stop_at):
            log_step(self, *args)
            if self.name == "gda" and self.position.step == stop_at:
                raise InterruptedRunError

        name = f"stopped-{stop_at}"
        with monkeypatch.context() as patch, pytest.raises(InterruptedRunError):
            patch.setattr(train.NetworkTraining, "_log_step", log_and_stop)
            run(name)
        assert not (whole.parent / name / "model").exists()
        resumed = run(name)
        assert [e["step"] for e in events(resumed, "resumed")] == [checkpoint]
        assert weights(resumed) == weights(whole)
        losses = [
            {e["step"]: e["loss"] for e in events(output, "step") if e["network"] == "gda"}
            for output in (whole, resumed)
        ]
        assert losses[0] == losses[1]


def stopped_run(run, train, monkeypatch, **values):
    """A run "stopped" that ended at step 5; its checkpoints are of steps 3 and 4."""
    log_step = train.NetworkTraining._log_step

    def log_and_stop(self, *args):
        log_step(self, *args)
        if self.position.step == 5:
            raise InterruptedRunError

    with monkeypatch.context() as patch, pytest.raises(InterruptedRunError):
        patch.setattr(train.NetworkTraining, "_log_step", log_and_stop)
        run("stopped", **{"networks": GDA, **values})


def empty(folder):
    for file in folder.iterdir():
        file.unlink()


def cut_off(name):
    def cut(folder):
        file = folder / name
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    return cut


@pytest.mark.parametrize(
    "damage",
    [
        empty,
        cut_off("model.safetensors"),
        cut_off("optimizer.bin"),
        cut_off("random_states_0.pkl"),
        lambda folder: (folder / "random_states_0.pkl").write_bytes(b""),
        lambda folder: (folder / "custom_checkpoint_0.pkl").write_bytes(b""),
        lambda folder: (folder / "custom_checkpoint_1.pkl").unlink(),
    ],
)
def test_a_broken_checkpoint_gives_way_to_the_one_before(run, train, monkeypatch, tmp_path, capsys, damage):
    whole = run("whole", networks=GDA)
    stopped_run(run, train, monkeypatch)
    newest = tmp_path / "stopped/gda/checkpoints/step-000000004"
    damage(newest)
    capsys.readouterr()
    resumed = run("stopped", networks=GDA)
    shown = capsys.readouterr().err
    assert f"{newest} cannot be read" in shown and "Resuming from step-000000003" in shown
    assert [e["step"] for e in events(resumed, "resumed")] == [3]
    assert len(events(resumed, "warning")) == 1
    assert weights(resumed) == weights(whole)


def test_without_any_checkpoint_that_can_be_read_the_folder_is_named(run, train, monkeypatch, tmp_path):
    stopped_run(run, train, monkeypatch)
    folder = tmp_path / "stopped/gda/checkpoints"
    for checkpoint in folder.iterdir():
        empty(checkpoint)
    with pytest.raises(ValueError, match="holds nothing.*Copy one of them here again, or remove") as caught:
        run("stopped", networks=GDA)
    assert str(folder) in str(caught.value) and "step-000000003 cannot be read" in str(caught.value)
    for checkpoint in folder.iterdir():
        checkpoint.rmdir()
    assert weights(run("stopped", networks=GDA)) == weights(run("whole", networks=GDA))


def test_the_best_epoch_that_a_later_one_replaced_is_not_looked_for(run, train, monkeypatch, tmp_path):
    """An epoch's weights go once a checkpoint knows better ones; should that be broken, others are chosen."""
    best = {"networks": GDA, "epoch_selection": "best-validation", "epochs": 3, "warmup_epochs": 0}
    save = train.NetworkTraining._save_checkpoint

    def save_and_stop(self):
        save(self)
        if self.position.step == 6:
            raise InterruptedRunError

    with monkeypatch.context() as patch, pytest.raises(InterruptedRunError):
        patch.setattr(train.NetworkTraining, "_save_checkpoint", save_and_stop)
        run("stopped", **best)
    empty(tmp_path / "stopped/gda/checkpoints/step-000000006")
    for folder in (tmp_path / "stopped/gda").glob("best-*"):
        empty(folder)
        folder.rmdir()
    resumed = run("stopped", **best)
    (trained,) = events(resumed, "trained")
    assert trained["selected_epoch"] in (2, 3) and weights(resumed)


@pytest.mark.parametrize("content", ["", '{"pictures": 24', "[]", "null"])
def test_a_broken_description_of_the_corpus_is_named(run, train, monkeypatch, tmp_path, content):
    stopped_run(run, train, monkeypatch)
    file = tmp_path / "stopped/corpus.json"
    before = file.read_text()
    file.write_text(content)
    with pytest.raises(ValueError, match="does not describe a corpus.*Remove it if this run") as caught:
        run("stopped", networks=GDA)
    assert str(file) in str(caught.value)
    file.unlink()
    run("stopped", networks=GDA)
    assert file.read_text() == before


def test_a_finished_run_trains_nothing_again(run, train, monkeypatch):
    output = run(networks=GDA)
    before = weights(output)
    monkeypatch.setattr(train.NetworkTraining, "_build", lambda self: pytest.fail("trained again"))
    assert weights(run(networks=GDA)) == before


def test_another_recipe_in_the_same_folder_is_refused(run):
    run(networks=GDA, epochs=1)
    with pytest.raises(ValueError, match=r"other values of \['seed'\]"):
        run(networks=GDA, epochs=1, seed=1)


def test_a_call_that_failed_for_its_data_or_values_can_be_corrected(run, train, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run(data=tmp_path / "nowhere", networks=GDA)
    mistaken = {"gda": {**GDA["gda"], "config": {"hiden_size": 8}}}
    with pytest.raises(ValueError, match=r"unknown keys \['hiden_size'\]"):
        run(networks=mistaken, epochs=1)
    assert weights(run(networks=GDA, epochs=1))  # in the same folder


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, FileNotFoundError, "recipe.yaml is not a file; the recipes are in"),
        ("just words", ValueError, "recipe.yaml is not a recipe, .* 'just words'"),
        ("a: [1", ValueError, "recipe.yaml is no YAML"),
    ],
)
def test_files_that_are_no_recipes_are_named(train, tmp_path, content, error, message):
    if content is not None:
        (tmp_path / "recipe.yaml").write_text(content)
    with pytest.raises(error, match=message):
        train.load_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("epochs.x=3", "epochs is 1 and has no x"),
        ("aus=[1", "'[1' is no YAML"),
        ("paper.f1=", "f1 is a table of keys and values, not ''"),
        ("epochs", "takes key=value"),
        ("log_every=0", "log_every=0 must be above 0"),
        ("checkpoint_every=0", "checkpoint_every=0 must be above 0"),
        ("eval_batch_size=0", "eval_batch_size=0 must be above 0"),
        ("full_intensity=.nan", "full_intensity=nan must be above 0"),
        ("base_learning_rate=.nan", "base_learning_rate=nan must be above 0"),
        ("workers=-1", "workers=-1 must not be negative"),
        ("weight_decay=-1", "weight_decay=-1.0 must not be negative"),
        ("seed=-1", "seed=-1 must lie in [0, 2**32)"),
        ("max_false_alarms=5", "max_false_alarms=5.0 must lie in [0, 1]"),
        ("image_mean=[0.5]", "image_mean=[0.5] must be three numbers"),
        ("image_mean=[a, b, c]", "image_mean=['a', 'b', 'c'] must be three numbers"),
        ("image_std=[0, 1, 1]", "image_std=[0, 1, 1] divides the channels"),
        ("networks.gda.epochs=-2", "gda: epochs=-2 must not be negative"),
    ],
)
def test_settings_that_make_no_sense_are_named(train, tmp_path, setting, message):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | {"epochs": 1, "networks": GDA}))
    with pytest.raises(ValueError, match=re.escape(message)):
        train.load_recipe(tmp_path / "recipe.yaml", [setting])


def test_versions_of_what_is_not_installed_are_left_out(train, monkeypatch):
    def known(name):
        if name == "datasets":
            raise train.PackageNotFoundError(name)
        return "1.2"

    monkeypatch.setattr(train, "version", known)
    versions = train.installed_versions()
    assert "datasets" not in versions and versions["torch"] == "1.2"
    assert versions["actionunits"] == train.actionunits.__version__


def test_the_log_has_means_of_the_steps_since_its_line_before(run):
    """A line after every second step, and after the third, at the end of the first epoch."""
    every, second = (run(f"by-{n}", networks=GDA, log_every=n, checkpoint_every=500) for n in (1, 2))
    losses = [event["loss"] for event in events(every, "step")]
    found = {event["step"]: event["loss"] for event in events(second, "step")}
    expected = {2: np.mean(losses[:2]), 3: losses[2], 4: losses[3], 6: np.mean(losses[4:])}
    assert found == pytest.approx(expected)
    # The rate of the next step, which rises over 1.5 steps to 3.2e-2 * 8 / 256 and falls over 4.5.
    rates = [0.8, *(0.5 + 0.5 * np.cos(np.pi * (k - 1.5) / 4.5) for k in range(2, 7))]
    assert [1e3 * event["learning_rate"] for event in events(every, "step")] == pytest.approx(rates)


def test_seed_decides_the_weights(run):
    first, same, other = (
        run(name, networks=GDA, epochs=1, seed=s) for name, s in (("a", 0), ("b", 0), ("c", 1))
    )
    assert weights(first) == weights(same) != weights(other)


def test_pictures_in_the_memory_of_the_device_train_the_same_weights(run, monkeypatch):
    streamed = run("streamed", networks=GDA, epochs=1)
    monkeypatch.setattr(network_training.AlignedFaces, "__getitem__", None)
    held = run("held", networks=GDA, epochs=1, preload=True, workers=7)
    assert weights(held) == weights(streamed)


def test_a_share_of_the_pretrained_weights_is_kept_and_batch_statistics_are_those_of_the_average(run):
    before = run("before", networks=GDA, aus=[1, 12], epochs=1, seed=1) / "gda" / "model"
    network = {"model_type": "au-gda", "pretrained": str(before)}
    results = {
        share: AutoModel.from_pretrained(
            run(f"kept-{share}", networks={"gda": {**network, "keep_pretrained": share}}, epochs=1)
            / "gda"
            / "model"
        )
        for share in (0.0, 0.25)
    }
    old, new = dict(AutoModel.from_pretrained(before).named_parameters()), results[0.0]
    added = {name for name, _ in new.named_parameters()} - old.keys()
    assert added == {"classifier.AU26.weight", "classifier.AU26.bias"}
    for (name, kept), last in zip(results[0.25].named_parameters(), new.parameters(), strict=True):
        first = old.get(name, last)  # what is new has no pretrained weights
        torch.testing.assert_close(kept, 0.25 * first + 0.75 * last, msg=name)

    model = results[0.25]
    norm = next(m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    assert not torch.equal(
        norm.running_mean, next(m for m in new.modules() if isinstance(m, torch.nn.BatchNorm2d)).running_mean
    )
    assert int(norm.num_batches_tracked) == 3  # 24 pictures in batches of 8, an epoch that was not trained on
    assert torch.isfinite(norm.running_var).all()


@pytest.mark.parametrize("changes", [{"pretrained": ""}, {"keep_pretrained": 1.0}])
def test_keeping_a_share_of_what_was_not_there_is_refused(run, changes):
    network = {"model_type": "au-gda", "pretrained": "anywhere", "keep_pretrained": 0.5, **changes}
    with pytest.raises(ValueError, match="keep_pretrained"):
        run(networks={"gda": network}, epochs=1)


def test_best_validation_epoch_is_kept(run, monkeypatch):
    """Validation is made to be best after the second of three epochs."""
    figures = iter([0.2, 0.9, 0.5])
    report = network_training.au_report

    def scripted(*args):
        return {**report(*args), "mean": {**report(*args)["mean"], "f1": next(figures)}}

    monkeypatch.setattr(network_training, "au_report", scripted)
    output = run(networks=GDA, epochs=3, epoch_selection="best-validation")
    assert events(output, "trained")[0]["selected_epoch"] == 2
    kept = AutoModel.from_pretrained(output / "gda" / "model").state_dict()
    batches_seen = {int(value) for name, value in kept.items() if name.endswith("num_batches_tracked")}
    assert batches_seen == {6}  # two epochs of three
    assert json.loads((output / "model" / "run.json").read_text())["selected_epochs"] == {"gda": 2}


def test_the_papers_way_selects_on_the_test_people_and_says_so(run):
    output = run(networks=GDA, epochs=1, epoch_selection="best-test")
    assert [e["split"] for e in events(output, "epoch")] == ["test"]
    report = json.loads((output / "metrics-test.json").read_text())
    assert (report["epoch_selection"], report["thresholds_from"]) == ("best-test", "the validation people")
    assert "which is optimistic" in (output / "metrics-test.md").read_text()


@pytest.mark.parametrize(("ensemble", "found"), [("average", [2, 4, 2]), ("voting", [3, 4, 4])])
def test_figures_of_joint_answers_by_hand(tmp_path, ensemble, found):
    """Four pictures that show the action unit; alone LSC finds 3, 2 and 0 of them, GDA 0, 2 and 4."""
    scores = {
        "lsc": [[0.9, 0.9, 0.9, 0.2], [0.9, 0.9, 0.3, 0.3], [0.4, 0.4, 0.1, 0.1]],
        "gda": [[0.2, 0.2, 0.05, 0.2], [0.4, 0.3, 0.8, 0.9], [0.7, 0.7, 0.7, 0.7]],
    }
    for name, epochs in scores.items():
        (tmp_path / name).mkdir()
        for number, answers in enumerate(epochs, start=1):
            np.save(tmp_path / name / f"epoch-{number:04d}.npy", np.array(answers)[:, None])
    faces = SimpleNamespace(aus=(12,), occurrence=np.ones((4, 1), np.int8), intensities=None)
    path = ROOT / "training" / "recipes" / "escda-bp4d.yaml"
    recipe = load_recipe(path, ["epochs=3", "warmup_epochs=1", f"ensemble={ensemble}"])
    figures = joint_selection.figures_together(recipe, faces, [tmp_path / "lsc", tmp_path / "gda"])
    np.testing.assert_allclose(figures, [2 * n / (n + 4) for n in found])  # 2 TP / (2 TP + FN)


@pytest.mark.parametrize("is_stopped", [False, True])
def test_networks_selected_together_are_of_one_epoch(run, train, monkeypatch, is_stopped):
    """Joint answers are made to be best after the second of three epochs."""
    selected = {"epochs": 3, "epoch_selection": "best-test", "select_together": True}
    figures_together = joint_selection.figures_together

    def scripted(*args):
        assert len(figures_together(*args)) == 3
        return [0.2, 0.9, 0.5]

    monkeypatch.setattr(joint_selection, "figures_together", scripted)
    if is_stopped:
        with monkeypatch.context() as patch, pytest.raises(InterruptedRunError):
            patch.setattr(joint_selection, "replace_folder", stop_at("gda"))
            run(**selected)
    output = run(**selected)
    assert events(output, "together")[-1]["selected_epoch"] == 2
    for name in ("lsc", "gda"):
        kept = AutoModel.from_pretrained(output / name / "model").state_dict()
        batches_seen = {int(value) for key, value in kept.items() if key.endswith("num_batches_tracked")}
        assert batches_seen == {6}  # two epochs of three
        assert not list((output / name).glob("epoch-*"))
    described = json.loads((output / "model" / "run.json").read_text())
    assert described["selected_epochs"] == {"lsc": 2, "gda": 2}


def stop_at(name: str):
    """Stands for `replace_folder` in a process that is killed when it comes to a network."""

    def replace_or_stop(source: Path, target: Path) -> None:
        if target.parent.name == name:
            raise InterruptedRunError
        network_training.replace_folder(source, target)

    return replace_or_stop


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epoch_selection": "last"}, "chooses an epoch"),
        ({"networks": {"gda": {"model_type": "au-gda"}}}, "chooses an epoch"),
        ({"networks": RECIPE["networks"] | {"gda": {"model_type": "au-gda", "epochs": 1}}}, "as many epochs"),
        (
            {"networks": RECIPE["networks"] | {"lsc": {"model_type": "au-lsc", "backbone_from": "gda"}}},
            "backbone_from",
        ),
    ],
)
def test_what_cannot_be_selected_together_is_refused(run, values, message):
    with pytest.raises(ValueError, match=message):
        run(**{"epoch_selection": "best-test", "select_together": True, **values})


def test_folds_are_runs_of_their_own_and_their_mean(train, corpus, tmp_path, monkeypatch):
    recipe = tmp_path / "recipe.yaml"
    variants = {"slow": {"settings": ["epochs=7"], "paper": {"table": "T", "mean": 50.0}}}
    recipe.write_text(yaml.safe_dump({**RECIPE, "variants": variants}))
    seen = []

    def measured(output, recipe, args, accelerator):
        seen.append((output.name, recipe.name, recipe.split.fold, recipe.epochs, recipe.paper.mean))
        mean = {"f1": recipe.split.fold / 10, "base_rate": 0.5}
        report = {"split": "test", "pictures": 4, "people": 2, "at_half": {"mean": mean, "per_au": {}}}
        output.mkdir(parents=True)
        (output / "metrics-test.json").write_text(json.dumps(report))

    monkeypatch.setattr(train, "train", measured)
    arguments = ["--recipe", recipe, "--variant", "slow", "--data", corpus, "--output", tmp_path / "run"]
    train.main([*map(str, arguments), "--folds", "1", "2"])
    assert seen == [("fold-1", "tiny-slow", 1, 7, 50.0), ("fold-2", "tiny-slow", 2, 7, 50.0)]
    report = json.loads((tmp_path / "run" / "metrics-test.json").read_text())
    assert report["at_half"]["mean"]["f1"] == pytest.approx(0.15)
    assert (report["folds"], report["pictures"]) == (2, 8)


@pytest.mark.parametrize(
    ("words", "seen"),
    [(["--folds", "1", "2"], "'fold': 1"), (["--set", "split.sample=0.1"], "'sample': 0.1")],
)
def test_the_synthetic_corpus_has_no_other_splits_than_its_own(train, corpus, tmp_path, words, seen):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    with pytest.raises(ValueError, match=f"has its own splits; leave .*{seen}"):
        train.main(
            ["--recipe", str(recipe), "--data", str(corpus), "--output", str(tmp_path / "run"), *words]
        )


def test_it_learns_what_it_sees(run, train, monkeypatch):
    """The same few pictures again and again, as they are: their loss must fall."""
    monkeypatch.setattr(train.NetworkTraining, "_validate", lambda self: None)
    monkeypatch.setattr(train.NetworkTraining, "_save_checkpoint", lambda self: None)
    output = run(
        networks=GDA,
        epochs=25,
        warmup_epochs=1,
        augmentation={"random_crop": False, "mirror": 0.0, "brightness": 0.0, "contrast": 0.0},
        base_learning_rate=0.3,
        target="occurrence",
    )
    losses = [e["loss"] for e in events(output, "step")]
    assert np.mean(losses[-3:]) < 0.5 * np.mean(losses[:3])


def test_a_network_can_start_from_the_backbone_of_another(run):
    """Its own steps are tiny, so LSC must end near GDA's backbone, after its own number of epochs."""
    networks = {
        "gda": RECIPE["networks"]["gda"],
        "lsc": {**RECIPE["networks"]["lsc"], "backbone_from": "gda", "epochs": 1},
    }
    output = run(networks=networks, base_learning_rate=1e-6)
    gda, lsc = (AutoModel.from_pretrained(output / name / "model") for name in ("gda", "lsc"))
    for name, weight in gda.backbone.named_parameters():
        torch.testing.assert_close(lsc.backbone.get_parameter(name), weight, rtol=0, atol=1e-5)
    assert [e["selected_epoch"] for e in events(output, "trained")] == [2, 1]
    assert max(e["step"] for e in events(output, "step") if e["network"] == "lsc") == 3
    with pytest.raises(FileNotFoundError, match="start from random weights: --set networks.NAME.backbone_"):
        network_training.start_from(torch.nn.Linear(2, 2), output / "elsewhere")
    with pytest.raises(ValueError, match="shares no weight with this Linear"):
        network_training.start_from(torch.nn.Linear(2, 2), output / "gda" / "model")


def test_a_model_with_state_by_the_epoch_renews_it(run):
    """AC2D's prototypes are zero before the first epoch ends, and come with the weights afterwards."""
    output = run(networks={"ac2d": {"model_type": "au-ac2d", "config": TINY_AC2D}}, epochs=1)
    prototypes = AutoModel.from_pretrained(output / "model").prototypes
    assert prototypes.shape == (3, 8)
    assert prototypes.abs().amin(1).gt(0).all()


def test_batches_in_parts_train_as_whole_ones_do_and_resume_exactly(run, train, monkeypatch):
    whole, parts = (run(f"{n}", **SAME_FOR_ALL, gradient_accumulation=n) for n in (1, 4))
    found, expected = (AutoModel.from_pretrained(each / "model").state_dict() for each in (parts, whole))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)
    for kind in ("loss", "gradient_norm", "learning_rate"):
        figures = [{e["step"]: e[kind] for e in events(each, "step")} for each in (parts, whole)]
        assert figures[0] == pytest.approx(figures[1], rel=1e-4)
    stopped_run(run, train, monkeypatch, **SAME_FOR_ALL, gradient_accumulation=4)
    assert weights(run("stopped", **SAME_FOR_ALL, gradient_accumulation=4)) == weights(parts)


def test_bf16_and_accumulation_run(run):
    output = run(networks=GDA, epochs=1, precision="bf16", gradient_accumulation=2)
    assert [e["step"] for e in events(output, "step")] == [1, 2, 3]
    model = AutoModel.from_pretrained(output / "model")
    assert type(model) is GdaForAUDetection
    assert model.dtype == torch.float32


def test_a_corrupt_picture_is_reported_and_skipped(run, tmp_path, caplog):
    from toy_corpus import write_corpus

    output = run(data=write_corpus(tmp_path / "corpus", corrupt=(3, 5)), networks=GDA, epochs=1)
    assert "train: skipped 2 unreadable pictures; the first: picture 3 (train-0)" in caplog.text
    (line,) = (e for e in events(output, "split") if e["split"] == "train")
    assert (line["pictures"], len(line["skipped"])) == (22, 2)
    described = json.loads((output / "model" / "run.json").read_text())
    assert described["corpus"]["splits"]["train"]["skipped"] == 2


def test_plain_epochs_come_first(run, monkeypatch):
    pixels = []

    class Watched(AUCollator):
        def inputs(self, batch, generator=None):
            made = super().inputs(batch, generator)
            still = AUCollator.inputs(replace(self, augmentation=NO_AUGMENTATION), batch)["pixel_values"]
            # the mirror image is an exact one where nothing else varies
            either = torch.stack([still, still.flip(-1)]) - made["pixel_values"]
            if generator is not None:  # for training, not for validation
                pixels.append(float(either.abs().flatten(2).amax(2).amin(0).max()))
            return made

    monkeypatch.setattr(network_training, "AUCollator", Watched)
    augmentation = {"random_crop": False, "mirror": 0.5, "brightness": 0.5, "contrast": 0.0}
    run(networks=GDA, epochs=3, plain_epochs=2, warmup_epochs=1, augmentation=augmentation)
    assert len(pixels) == 9  # 24 pictures in batches of 8, three times
    assert max(pixels[:6]) < 0.05 and min(pixels[6:]) > 0.1


def test_teachers_soften_the_labels(run, corpus, monkeypatch):
    """Every label the loss sees is the weighted mean that the formula says, of what the teachers answer."""
    teachers = [str(run(name, networks=GDA, epochs=1, warmup_epochs=0, seed=i) / "model") for i, name in
                enumerate(("first", "second"))]  # fmt: skip
    seen: dict[int, np.ndarray] = {}

    class Watched(AUCollator):
        def inputs(self, batch, generator=None):
            made = super().inputs(batch, generator)
            if generator is not None:
                for picture, labels in zip(batch["pictures"], made["labels"], strict=True):
                    seen[hash(picture.numpy().tobytes())] = labels.numpy()
            return made

    monkeypatch.setattr(network_training, "AUCollator", Watched)
    output = run(
        "pupil", networks=GDA, epochs=1, warmup_epochs=0, full_intensity=0.5, teachers=teachers,
        teacher_weight=0.25,
    )  # fmt: skip
    faces = prepare_synthetic(corpus, "train", output / "prepared").with_aus([1, 12, 26])
    models = [(AutoModel.from_pretrained(t), AutoImageProcessor.from_pretrained(t)) for t in teachers]
    for row in range(len(faces)):
        logits = []
        for model, processor in models:
            inputs = processor(faces.picture(row), landmarks=faces.landmarks[row], return_tensors="pt")
            logits.append(model.eval()(**inputs).logits[0].detach().numpy())
        teachers_say = 1 / (1 + np.exp(-(logits[0] + logits[1]) / 2))
        own = np.minimum(faces.intensities[row] / 0.5, 1)
        labels = seen.pop(hash(faces.pictures[faces.rows[row]].tobytes()))
        np.testing.assert_allclose(labels, 0.75 * own + 0.25 * teachers_say, atol=1e-5)
    assert not seen
    described = json.loads((output / "model" / "run.json").read_text())
    assert described["recipe"]["teachers"] == ["first/model", "second/model"]
    card = (output / "model" / "README.md").read_text()
    assert "75 % ground truth and 25 % predictions of teachers" in card
    assert "`first/model`, `second/model`" in card


def test_what_nobody_coded_is_not_learnt_from_teachers_either(monkeypatch):
    """Elsewhere a teacher in doubt, with a logit of 0, moves the label a quarter of the way to 1/2."""

    @dataclass
    class Faces:
        occurrence: np.ndarray
        intensities: np.ndarray

    faces = Faces(np.int8([[1, -1], [0, 1]]), np.float32([[0.4, 0.2], [-1, 1.0]]))
    monkeypatch.setattr(teaching, "_logits", lambda *_: np.zeros((2, 2)))
    recipe = SimpleNamespace(teachers=["one"], teacher_weight=0.25, full_intensity=0.8)
    softened = teaching.taught(faces, recipe, torch.device("cpu"), Path()).intensities / 0.8
    expected = [[0.75 * 0.5 + 0.25 * 0.5, -1 / 0.8], [-1 / 0.8, 0.75 * 1 + 0.25 * 0.5]]
    np.testing.assert_allclose(softened, expected, rtol=1e-6)
    with pytest.raises(ValueError, match="need labels of intensity, which this corpus lacks"):
        teaching.taught(replace(faces, intensities=None), recipe, torch.device("cpu"), Path())


def test_a_teacher_is_asked_once_about_the_same_pictures(run, corpus, tmp_path, monkeypatch):
    output = run("teacher", networks=GDA, epochs=1, warmup_epochs=0)
    recipe = replace(load_recipe(output / "recipe.yaml"), teachers=[str(output / "model")])
    faces = prepare_synthetic(corpus, "train", output / "prepared")
    asked = []

    def predict(model, processor, pictures, batch_size):
        asked.append(len(pictures))
        return predict_scores(model, processor, pictures, batch_size)

    monkeypatch.setattr(teaching, "predict_scores", predict)

    def answers(of, aus):
        wanted = replace(recipe, aus=aus)
        return teaching.taught(of.with_aus(aus), wanted, torch.device("cpu"), tmp_path).intensities

    first = answers(faces, [1, 12, 26])
    np.testing.assert_array_equal(answers(faces, [26, 1]), first[:, [2, 0]])
    assert asked == [24]
    answers(replace(faces, pictures=255 - faces.pictures), [1, 12, 26])
    answers(faces.select(np.arange(12)), [1, 12, 26])
    assert asked == [24, 24, 12] and len(list(tmp_path.glob("*.npy"))) == 3


def test_a_teacher_must_know_the_action_units(run):
    teacher = run("teacher", networks=GDA, aus=[1, 12], epochs=1, warmup_epochs=0) / "model"
    with pytest.raises(ValueError, match=r"does not predict \['AU26'\]"):
        run(networks=GDA, teachers=[str(teacher)])
    run(networks=GDA, aus=[1, 12], teachers=[str(teacher)], epochs=1, warmup_epochs=0)  # no trace is left


def test_a_loss_that_is_no_number_stops_the_run(run):
    with pytest.raises(FloatingPointError, match="lower base_learning_rate"):
        run(networks=GDA, base_learning_rate=1e30, clip_norm=1e30, warmup_epochs=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_network_that_is_found_useless_at_validation_says_what_to_do(run, train, monkeypatch, precision):
    """Its last step before spoilt the weights; checkpoints are not to keep that."""
    end_epoch = train.NetworkTraining._end_epoch

    def spoil(self):
        end_epoch(self)
        if self.position.step == 6:
            next(self.model.parameters()).data.fill_(torch.nan)

    monkeypatch.setattr(train.NetworkTraining, "_end_epoch", spoil)
    with pytest.raises(FloatingPointError, match="gda: 8 of 8 faces of the validation people") as caught:
        run(networks=GDA, precision=precision)
    for part in ("after step 6", "lower base_learning_rate=0.032 or clip_norm=", "another --output"):
        assert part in str(caught.value)
    assert ("precision=fp32" in str(caught.value)) == (precision == "bf16")
    assert re.search(r"The last checkpoint, \S*step-000000004, is from before", str(caught.value))


def test_a_gradient_that_is_no_number_is_kept_by_no_checkpoint(run, train, monkeypatch, tmp_path):
    """The loss is still a number then, the weights after the step are none."""
    clip = train.Accelerator.clip_grad_norm_

    def spoil(self, parameters, norm):
        parameters = list(parameters)
        if self.step == 2:
            parameters[0].grad.fill_(torch.nan)
        return clip(self, parameters, norm)

    monkeypatch.setattr(train.Accelerator, "clip_grad_norm_", spoil)
    with pytest.raises(
        FloatingPointError, match="gradient's norm is nan at step 2;.*No checkpoint was saved"
    ):
        run(networks=GDA)
    assert not (tmp_path / "run/gda/checkpoints").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 9, "gradient_accumulation": 2}, "batch_size=9 does not divide"),
        ({"batch_size": 64}, "24 training pictures do not fill one batch of 64"),
        ({"aus": [1, 27]}, r"no labels of \['AU27'\]"),
        ({"teacher_weight": 0}, "teacher_weight=0.0 must lie in"),
        ({"teachers": ["a"], "target": "occurrence"}, "need target=intensity"),
    ],
)
def test_recipes_that_cannot_run_say_why(run, values, message):
    with pytest.raises(ValueError, match=message):
        run(networks=GDA, **values)


def test_batches_of_all_processes_are_an_epoch():
    """Whatever the number of processes, batch k is the same set of pictures, and no picture comes twice."""
    for processes in (1, 2, 4):
        shares = [
            list(network_training.ShuffledBatches(103, 8, 12, (0, 5), (i, processes)))
            for i in range(processes)
        ]
        batches = [Counter(sum((share[k] for share in shares), [])) for k in range(12)]
        if processes == 1:
            expected = batches
        assert batches == expected
    assert max(sum(expected, Counter()).values()) == 1
    other_epoch = list(network_training.ShuffledBatches(103, 8, 12, (0, 6), (0, 1)))
    assert Counter(other_epoch[0]) != expected[0]
    assert (
        list(network_training.ShuffledBatches(103, 8, 12, (0, 5), (0, 1), start=9))
        == list(network_training.ShuffledBatches(103, 8, 12, (0, 5), (0, 1)))[9:]
    )


def test_learning_rate_rises_linearly_then_falls_as_a_cosine():
    factor = network_training.WarmupCosine(warmup_steps=4, total_steps=12)
    np.testing.assert_allclose([factor(step) for step in range(4)], [0.2, 0.4, 0.6, 0.8])
    expected = [(1 + np.cos(np.pi * k / 8)) / 2 for k in range(9)]
    np.testing.assert_allclose([factor(4 + k) for k in range(9)], expected, atol=1e-12)


def test_only_matrices_and_kernels_decay():
    from actionunits import LscConfig, LscForAUDetection

    model = LscForAUDetection(LscConfig(aus=[1, 12], **RECIPE["networks"]["lsc"]["config"]))
    decayed, spared = network_training.parameter_groups(model, 0.05)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)].rpartition(".")[2] for p in decayed["params"]} == {"weight"}
    assert len(decayed["params"]) + len(spared["params"]) == len(names)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d | torch.nn.PReLU)]
    free = {id(p) for p in spared["params"]}
    assert norms and all(id(p) in free for norm in norms for p in norm.parameters())
    assert all(id(p) in free for name, p in model.named_parameters() if "bias" in name or "epsilon" in name)


def test_recipes_in_the_project_are_valid():
    from recipe import load_recipe

    for path in (ROOT / "training" / "recipes").glob("*.yaml"):
        assert load_recipe(path).name == path.stem


def test_a_rule_of_selection_needs_its_split(tmp_path):
    from recipe import load_recipe

    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    for rule, splits in (("best-validation", ["train", "test"]), ("best-test", ["train", "validation"])):
        recipe = load_recipe(tmp_path / "recipe.yaml", [f"epoch_selection={rule}"])
        with pytest.raises(ValueError, match=f"epoch_selection={rule} needs a split"):
            network_training.watched_split(recipe, splits)
    assert network_training.watched_split(load_recipe(tmp_path / "recipe.yaml"), ["train"]) == "validation"


def test_recipe_settings_and_their_errors(tmp_path):
    from recipe import load_recipe

    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    recipe = load_recipe(
        path, ["base_learning_rate=1e-3", "networks.gda.config.hidden_size=64", "augmentation.mirror=0"]
    )
    assert recipe.learning_rate == pytest.approx(1e-3 * 8 / 256)
    assert recipe.networks["gda"].config == {**TINY, "hidden_size": 64}
    assert recipe.augmentation.mirror == 0 and recipe.augmentation.random_crop
    for setting, message in [
        ("epoch=3", r"unknown keys \['epoch'\]; known: .*'epochs'"),
        ("epochs=three", "epochs must be a int, got 'three'"),
        ("precision=fp16", r"one of \['fp32', 'bf16'\], not 'fp16'"),
        ("augmentation.mirror=2", "mirror=2"),
        ("warmup_epochs=2", "must be below epochs=2"),
        ("networks.other={model_type: au-gda}", "one network, or lsc and gda"),
        ("networks.gda.backbone_from=lsc", r"from 'lsc', which must be .*; before it come \[\]"),
        ("full_intensity=0", "full_intensity=0.0 must be above 0"),
        ("batch_size", "takes key=value"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_recipe(path, [setting])
    with pytest.raises(ValueError, match=r"gda: epochs=1 must be above warmup_epochs=1\.5"):
        load_recipe(path, ["warmup_epochs=1.5", "networks.gda.epochs=1"])


def test_the_readme_fine_tunes(corpus, tmp_path, monkeypatch, capsys):
    from actionunits import GdaConfig

    text = (ROOT / "training" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(code.splitlines()) < 15
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpora").mkdir()
    (tmp_path / "corpora" / "synthetic").symlink_to(corpus)
    GdaForAUDetection(GdaConfig.compact(aus=[12, 6, 1], stage_depths=[0, 0, 0])).save_pretrained(
        "runs/escda/gda/model"
    )
    exec(code.replace("num_train_epochs=3", "max_steps=1, use_cpu=True"), {})
    assert "eval_f1_AU12" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_batch_of_the_cpu(train, corpus, tmp_path):
    faces = train.prepare_synthetic(corpus, "train", tmp_path)
    collate = AUCollator(faces.aus, augmentation=Augmentation(blur=0.5, erase=0.5, landmark_noise=1.0))
    batch = faces.__getitems__(range(8))
    expected, found = (
        collate.inputs(
            {name: values.to(device) for name, values in batch.items()}, network_training.seeded_generator(0)
        )
        for device in ("cpu", "cuda")
    )
    for name, values in expected.items():
        assert found[name].is_cuda
        torch.testing.assert_close(found[name].cpu(), values, rtol=1e-4, atol=1e-3)
