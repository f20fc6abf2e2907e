"""training/evaluate.py and training/table.py: what they measure, write and say."""

import json
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from tiny_run import ROOT, load_script

from actionunits import AUImageProcessor, GeometryConfig, GeometryForAUDetection
from actionunits.checkpoints import path as checkpoint
from actionunits.data import load_synthetic, prepare_synthetic
from actionunits.evaluation import evaluation_report


@pytest.fixture
def measure(evaluate, tmp_path):
    """Run evaluate.py with arguments; returns the report, or the folder where there is none."""

    def measure(*arguments, output: str = "out"):
        evaluate.main([*map(str, arguments), "--output", str(tmp_path / output)])
        reports = list((tmp_path / output).glob("metrics-*.json"))
        return json.loads(reports[0].read_text()) if reports else tmp_path / output

    return measure


def test_thresholds_come_from_the_config_or_from_training_people(measure, escda_folder, corpus):
    model = ["--model", escda_folder, "--data", corpus, "--split", "test"]
    stored = measure(*model)
    assert set(stored) >= {"at_half", "calibrated", "oracle", "neutral", "groups"}
    assert [row["threshold"] for row in stored["calibrated"]["per_au"].values()] == [0.5] * 12
    calibrated = measure(*model, "--calibrate-on", "train", output="again")
    assert calibrated["thresholds_from"] == "the train people"
    thresholds = [row["threshold"] for row in calibrated["calibrated"]["per_au"].values()]
    assert len(set(thresholds)) > 6
    assert calibrated["at_half"] == stored["at_half"] and calibrated["oracle"] == stored["oracle"]
    # Thresholds of other people are no better than those that the test people themselves would choose.
    f1 = [[row["f1"] for row in calibrated[rule]["per_au"].values()] for rule in ("calibrated", "oracle")]
    assert (np.array(f1[0]) <= np.array(f1[1]) + 1e-12).all()
    # The corpus labels 17, the model knows 12 of these.
    assert stored["notes"] == {"not_compared": "AU5, AU9, AU20, AU25, AU26"}


def test_a_target_is_drawn_and_printed_beside(measure, escda_folder, corpus, capsys):
    recipe = ROOT / "training" / "recipes" / "escda-bp4d.yaml"
    report = measure("--model", escda_folder, "--data", corpus, "--recipe", recipe)
    assert report["paper"]["mean"] == 65.5 and report["paper"]["f1"]["AU12"] == 88.7
    assert "| ESCDA, Table 1 |" in capsys.readouterr().out


def test_the_run_of_a_model_says_how_its_epoch_was_selected(measure, corpus, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("default"), folder)
    run = json.loads((folder / "run.json").read_text())
    run["recipe"]["epoch_selection"] = "best-test"
    (folder / "run.json").write_text(json.dumps(run))
    assert measure("--model", folder, "--data", corpus)["epoch_selection"] == "best-test"
    assert "which is optimistic" in (tmp_path / "out" / "metrics-test.md").read_text()


def test_predictions_of_a_tool(measure, tmp_path):
    (tmp_path / "v.csv").write_text("frame, success, AU01_c\n1, 1, 1.0\n2, 1, 1.0\n")
    (tmp_path / "labels.csv").write_text("video,frame,AU1\nv,1,1\nv,2,0\n")
    report = measure(
        "--predictions", tmp_path / "v.csv", "--format", "openface",
        "--labels", tmp_path / "labels.csv", "--first-frame", 1,
    )  # fmt: skip
    assert report["at_half"]["mean"]["f1"] == pytest.approx(2 / 3)
    assert "openface (occurrence)" in (tmp_path / "out" / "metrics-test.md").read_text()


def test_folds_are_averaged_and_corpora_crossed(measure, tmp_path):
    reports = []
    for number, label in enumerate("10"):
        (tmp_path / "v.csv").write_text("frame, success, AU01_c\n1, 1, 1.0\n2, 1, 1.0\n")
        (tmp_path / "labels.csv").write_text(f"video,frame,AU1\nv,0,{label}\nv,1,1\n")
        arguments = ["--predictions", tmp_path / "v.csv", "--format", "openface"]
        measure(*arguments, "--labels", tmp_path / "labels.csv", output=f"fold-{number}")
        reports.append(tmp_path / f"fold-{number}" / "metrics-test.json")
    assert measure("--reports", *reports, output="mean")["at_half"]["mean"]["f1"] == pytest.approx(5 / 6)
    folder = measure("--matrix", f"a:a={reports[0]}", f"a:b={reports[1]}", output="matrix")
    matrix = json.loads((folder / "cross-corpus.json").read_text())
    assert matrix["f1"]["a"] == {"a": 1, "b": pytest.approx(2 / 3)}
    assert "| a | 100.0 (100.0, 1 AUs) | 66.7 (66.7, 1 AUs) |" in (folder / "cross-corpus.md").read_text()
    with pytest.raises(ValueError, match="TRAINED:TESTED"):
        measure("--matrix", str(reports[0]))
    with pytest.raises(ValueError, match="a:a twice"):
        measure("--matrix", f"a:a={reports[0]}", f"a:a={reports[1]}")


def test_every_model_meets_every_fold_and_their_pictures_count_once(measure, evaluate, monkeypatch):
    def report(args, state):
        f1 = {"a": 0.25, "b": 0.5, "c": 0.75}[args.model] + {"1": 0, "2": 0.125}[args.fold]
        people, rule = int(args.fold), {"per_au": {}, "mean": {"f1": f1}}
        return {"split": args.split, "pictures": 100 * people, "people": people, "at_half": rule}

    written = []
    monkeypatch.setattr(evaluate, "find_model", str)
    monkeypatch.setattr(evaluate, "measure_model", report)
    monkeypatch.setattr(evaluate, "write_report", lambda _, report: written.append(report))
    monkeypatch.setattr(evaluate, "f1_table", str)
    measure("--model", *"abc", "--data", "corpus", "--fold", "1", "2")
    measure("--model", "c", "--data", "corpus", "--fold", "2")
    mean, alone = written
    assert mean["at_half"]["mean"]["f1"] == pytest.approx(0.5625)
    assert (mean["folds"], mean["pictures"], mean["people"]) == (6, 300, 3)
    assert (alone["at_half"]["mean"]["f1"], alone["pictures"]) == (0.875, 200)


@pytest.mark.parametrize("text, message", [("{", "is no JSON"), ('{"test": {}}', "is not a report")])
def test_what_is_no_report_is_named(measure, tmp_path, text, message):
    (tmp_path / "metrics.json").write_text(text)
    for arguments in (["--reports", tmp_path / "metrics.json"], ["--matrix", f"a:b={tmp_path}/metrics.json"]):
        with pytest.raises(ValueError, match=rf"metrics\.json {message}"):
            measure(*arguments)


def test_a_model_goes_on_reading_places_that_the_corpus_does_not_label(measure, evaluate, corpus, tmp_path):
    """Its scores of the action units that both have are those of the whole model."""
    torch.manual_seed(0)
    model = GeometryForAUDetection(GeometryConfig(aus=[1, 12, 13], places=[1, 2, 4, 12])).eval()
    model.save_pretrained(tmp_path / "model")
    processor = AUImageProcessor(**model.config.processor_options)
    processor.save_pretrained(tmp_path / "model")
    report = measure("--model", tmp_path / "model", "--data", corpus)
    assert report["notes"]["not_compared"].startswith("AU2, AU4, AU5") and "AU13" in str(report["notes"])
    faces = prepare_synthetic(corpus, "test", tmp_path / "prepared").with_aus([1, 12])
    scores = []
    for i in range(len(faces)):
        inputs = processor(faces.picture(i), landmarks=faces.landmarks[i], return_tensors="pt")
        scores.append(model(**inputs).logits[0, :2].sigmoid().detach().numpy())
    expected = evaluation_report(np.stack(scores), faces, 0.5, "test")
    found, wanted = (
        [r["at_half"]["per_au"][au]["ece"] for au in ("AU1", "AU12")] for r in (report, expected)
    )
    assert found == pytest.approx(wanted, abs=1e-6)


def test_models_of_the_package_go_by_name_and_folders_that_are_none_are_named(measure, corpus, tmp_path):
    assert measure("--model", "geometry", "--data", corpus)["pictures"] == 8
    with pytest.raises(ValueError, match="typo is not a folder, and no name on the Hub"):
        measure("--model", tmp_path / "typo", "--data", corpus)
    with pytest.raises(ValueError, match="--fold 1 is of a prepared corpus.*has splits and no folds"):
        measure("--model", "geometry", "--data", corpus, "--fold", 1)


def test_what_is_missing_is_asked_for(measure, capsys):
    for arguments, message in [
        (["--model", "m"], "needs --data"),
        (["--model", "m", "--data", "d", "--batch-size", -1], "--batch-size -1"),
        (["--predictions", "v.csv"], "needs --format"),
        (["--predictions", "v.csv", "--fold", 1, "--recipe", "r"], "--fold and --recipe would have no"),
        (["--model", "m", "--labels", "l.csv"], "--labels would have no effect without --predictions"),
        (["--model", "m", "--data", "d", "--calibrate-on", "test"], "invalid choice"),
        (["--model", "m", "--data", "d", "--calibrate-on", "train", "--split", "train"], "another split"),
        (["--model", "m", "--data", "d", "--calibrate-on", "train", "--split", "full"], "another split"),
        ([], "required"),
    ]:
        with pytest.raises(SystemExit):
            measure(*arguments)
        assert message in capsys.readouterr().err


def test_corpora_stream_from_an_object_store(corpus, tmp_path):
    """fsspec's memory stands for the store; the arrays are those of the folder, and a change is seen."""
    store = fsspec.filesystem("memory")
    for file in corpus.iterdir():
        store.pipe(f"/bucket/corpus/{file.name}", file.read_bytes())
    url = "memory://bucket/corpus"
    try:
        assert next(iter(load_synthetic(url, "validation")))["image"].size == (64, 64)
        here, there = (
            prepare_synthetic(place, "train", tmp_path / name) for place, name in ((corpus, "a"), (url, "b"))
        )
        for name in ("pictures", "landmarks", "alignments", "occurrence", "intensities", "people"):
            np.testing.assert_array_equal(getattr(here, name), getattr(there, name))
        store.pipe("/bucket/corpus/train-00000-of-00001.parquet", next(corpus.glob("test-*")).read_bytes())
        assert len(prepare_synthetic(url, "train", tmp_path / "b")) == 8
        with pytest.raises(FileNotFoundError, match="memory://elsewhere is not a folder"):
            load_synthetic("memory://elsewhere", "train")
    finally:
        store.rm("/bucket", recursive=True)


def test_the_readme_has_the_table_of_the_recipes():
    table = load_script("table")
    text = (ROOT / "training" / "README.md").read_text(encoding="utf-8")
    assert text.partition(table.BEGIN)[2].partition(table.END)[0].strip() == table.make_table()
    rows = {name: (where, command, target) for name, where, command, target in table.rows()}
    assert rows["escda-disfa"] == (
        "ESCDA, Table 2",
        "python training/train.py --recipe training/recipes/escda-disfa.yaml --folds 1 2 3 "
        "--data prepared/disfa --output runs/escda-disfa",
        69.6,
    )
    assert "--folds 1 2 3 4 --set split.folds_file=casme2-folds.csv" in rows["auformer-casme2"][1]
    training, measuring = rows["ac2d-bp4d-for-gft"][1].split(" && ")
    assert training.endswith("--folds 1 2 3 --data prepared/bp4d --output runs/ac2d-bp4d-for-gft/network")
    assert "fold-*/model --data prepared/gft --split test --output runs/ac2d-bp4d-for-gft" in measuring
    assert "--data prepared/bp4d --fold 1 2 3 --split test" in rows["ac2d-gft-for-bp4d"][1]
    training, measuring = rows["gtlenet-bp4d-for-bp4d+"][1].split(" && ")
    assert "--folds" not in training and "--data prepared/bp4d_plus-300 --split full" in measuring
    assert rows["lsc-bp4d-LSC-fix"][2] == 64.0 and "--variant LSC-fix" in rows["lsc-bp4d-LSC-fix"][1]


def test_the_table_takes_up_what_was_obtained(tmp_path):
    table = load_script("table")
    for fold, f1 in ((1, 0.6), (2, 0.7)):
        report = {"split": "test", "pictures": 1, "people": 1, "at_half": {"per_au": {}, "mean": {"f1": f1}}}
        (tmp_path / "gda-bp4d" / f"fold-{fold}").mkdir(parents=True)
        (tmp_path / "gda-bp4d" / f"fold-{fold}" / "metrics-test.json").write_text(json.dumps(report))
    whole = report | {"at_half": {"per_au": {}, "mean": {"f1": 0.5}}}
    (tmp_path / "gtlenet-bp4d-for-bp4d+").mkdir()
    (tmp_path / "gtlenet-bp4d-for-bp4d+" / "metrics-full.json").write_text(json.dumps(whole))
    lines = table.make_table(tmp_path).splitlines()
    (line,) = (line for line in lines if ": gda-bp4d |" in line)
    assert line.endswith("| 64.2 | 65.0 (2 folds) |")
    (line,) = (line for line in lines if ": gtlenet-bp4d-for-bp4d+ |" in line)
    assert line.endswith(" 50.0 |")
    assert sum("not run here" in line for line in lines) == len(lines) - 4


@pytest.mark.parametrize("method", ["escda", "lsc", "gda"])
@pytest.mark.parametrize(("name", "count"), [("bp4d", 12), ("disfa", 8), ("gft", 10)])
def test_recipes_follow_the_paper(method, name, count):
    """ESCDA Sec. 4.1.2; its tables print the mean of the row, rounded."""
    from recipe import load_recipe, load_variants

    path = Path(ROOT / "training" / "recipes" / f"{method}-{name}.yaml")
    recipe = load_recipe(path)
    assert (recipe.epochs, recipe.warmup_epochs, recipe.weight_decay, recipe.clip_norm) == (20, 5, 0.05, 3.0)
    assert recipe.learning_rate == pytest.approx(3.2e-2 / 256 * recipe.batch_size)
    assert (recipe.geometry.crop_size, recipe.geometry.input_size) == (176, 112)
    for paper in (recipe.paper, *(variant.paper for variant in load_variants(path).values())):
        assert list(paper.f1) == recipe.aus and len(paper.f1) == count
        assert np.mean(list(paper.f1.values())) == pytest.approx(paper.mean, abs=0.0501)
    for variant in load_variants(path):
        assert load_recipe(path, variant=variant).name == f"{method}-{name}-{variant}"
    with pytest.raises(ValueError, match="has no variant 'X'"):
        load_recipe(path, variant="X")
