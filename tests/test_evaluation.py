"""Reports on a corpus: groups, neutral faces, tables and bars, from scores made up by hand."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from actionunits.action_units import UNKNOWN
from actionunits.data import AlignedFaces
from actionunits.evaluation import (
    cross_corpus,
    evaluate_model,
    evaluation_report,
    mean_over_folds,
    neutral_report,
    predict_scores,
    threshold_reports,
)
from actionunits.metrics import f1_frame
from actionunits.reports import (
    cross_corpus_table,
    draw_bars,
    f1_table,
    figures_table,
    groups_table,
    metrics_table,
    report_text,
    write_report,
)


@pytest.fixture
def faces():
    """Twelve faces of three people; AU12 and AU26 are told apart by the picture's red and green."""
    rng = np.random.default_rng(0)
    occurrence = np.array([[1, 0], [0, 1], [0, 0]] * 4, np.int8)
    pictures = np.full((12, 8, 8, 3), 10, np.uint8)
    pictures[..., :2] += (200 * occurrence.astype(np.uint8))[:, None, None, :]
    return AlignedFaces(
        pictures=pictures,
        rows=np.arange(12),
        landmarks=rng.random((12, 68, 2), np.float32),
        alignments=np.zeros((12, 2, 3), np.float32),
        aligned_size=200,
        scheme="ibug68",
        aus=(12, 26),
        occurrence=occurrence,
        intensities=occurrence * 0.5,
        people=np.repeat(["ann", "bob", "eve"], 4),
        groups={"sex": np.repeat(["f", "m", "f"], 4), "age": np.repeat(["22.0", "44.9", "nan"], 4)},
    )


def test_report_has_both_thresholds_groups_and_people(faces):
    scores = np.where(faces.occurrence == 1, 0.4, 0.1)
    report = evaluation_report(scores, faces, [0.3, 0.45], "test")
    assert json.loads(json.dumps(report)) == report
    assert (report["pictures"], report["people"]) == (12, 3)
    assert report["at_half"]["mean"]["f1"] == 0
    assert [row["f1"] for row in report["calibrated"]["per_au"].values()] == [1, 0]
    assert report["calibrated"]["mean"]["correlation"] == pytest.approx(1)
    assert report["groups"]["sex"]["f"]["pictures"] == 8 and report["groups"]["sex"]["f"]["people"] == 2
    assert set(report["groups"]["age"]) == {"18-29", "30-44", "unknown"}
    rows = faces.people == "bob"
    assert (
        report["groups"]["age"]["30-44"]["f1"]
        == f1_frame(scores[rows], faces.occurrence[rows], [0.3, 0.45]).mean()
    )


def test_three_thresholds_stand_side_by_side():
    """The oracle never does worse, and its thresholds are those of a search on the very same pictures."""
    rng = np.random.default_rng(1)
    labels = (rng.random((300, 2)) < [0.1, 0.6]).astype(int)
    scores = np.clip(0.3 * labels + rng.normal(0.3, 0.2, labels.shape), 0, 1)
    people = np.repeat(np.arange(10), 30)
    reports = threshold_reports([1, 12], scores, labels, None, people, calibrated=[0.4, 0.45])
    assert list(reports) == ["at_half", "calibrated", "oracle"]
    assert [row["threshold"] for row in reports["calibrated"]["per_au"].values()] == [0.4, 0.45]
    for i, label in enumerate(("AU1", "AU12")):
        best = max(f1_frame(scores, labels, t)[i] for t in np.linspace(0, 1, 2001))
        assert reports["oracle"]["per_au"][label]["f1"] == pytest.approx(best)
        assert best >= max(reports[rule]["per_au"][label]["f1"] for rule in ("at_half", "calibrated"))
    assert all(len(reports[rule]["mean"]["f1_interval"]) == 2 for rule in reports)
    assert list(threshold_reports([1, 12], scores, labels)) == ["at_half", "oracle"]


ABOUT = {
    "thresholds_from": "the training people",
    "epoch_selection": "best-test",
    "paper": {"table": "A paper, Table 1", "f1": {12: 60.0, 26: 75.0}, "mean": 67.5},
}


def test_report_names_its_rules_and_the_papers_figures(faces, tmp_path):
    report = evaluation_report(np.where(faces.occurrence == 1, 0.6, 0.1), faces, [0.3, 0.7], "test", ABOUT)
    assert report["paper"]["f1"] == {"AU12": 60.0, "AU26": 75.0}
    table = f1_table(report).splitlines()
    assert table[0] == "| AU | name | base rate | at 0.5 | calibrated | oracle | A paper, Table 1 |"
    assert table[2].startswith(
        "| AU12 | lip corner puller | 33 % | 100.0 (100-100) | 100.0 (100-100) | 100.0"
    )
    assert table[2].endswith("| 60.0 |") and table[-1].endswith("| 67.5 |")
    assert table[3].split(" | ")[3:5] == ["100.0 (100-100)", "0.0 (0-0)"]
    text = report_text(report)
    assert "the best on the evaluated pictures themselves" in text
    assert "Calibrated thresholds: the training people." in text
    assert "ICC(3,1)" in figures_table(report["calibrated"])
    assert groups_table(report) in text

    bars = np.asarray(draw_bars(report)).astype(int)
    red = (np.abs(bars - [0xD0, 0x3A, 0x2B]).max(-1) < 8).any(0)
    left, right = 64, 640 - 64
    marks = [left + (right - left) * f1 for f1 in (0.6, 0.75)]
    assert all(red[int(mark)] for mark in marks) and red.sum() <= 6
    dark = (np.abs(bars - 0x44).max(-1) < 8)[2 * 24 + 3, left + 8 : right + 8]  # above AU26, 1 at 0.5
    assert np.flatnonzero(dark).tolist() == pytest.approx([right - left - 8] * 2, abs=2)

    unnamed = evaluation_report(np.zeros((12, 2)), faces, 0.5, "test", {"paper": {"f1": {}, "mean": 0.0}})
    assert "paper" not in unnamed and f1_table(unnamed).splitlines()[0].endswith("| oracle |")


def test_what_nobody_coded_measured_or_published_is_a_dash():
    labels = np.array([[1, UNKNOWN], [0, UNKNOWN], [1, UNKNOWN]])
    reports = threshold_reports([1, 12], np.array([[0.9, 0.9], [0.1, 0.1], [0.8, 0.2]]), labels)
    paper = {"table": "Table 1", "f1": {"AU1": 60.0}, "mean": 60.0}
    report = {"split": "test", "pictures": 3, "paper": paper, **reports}  # without calibrated thresholds
    assert f1_table(report).splitlines()[2:4] == [
        "| AU1 | inner brow raiser | 67 % | 100.0 | 100.0 | 60.0 |",
        "| AU12 | lip corner puller | - | - | - | - |",
    ]
    assert figures_table(report["at_half"]).splitlines()[3].startswith("| AU12 | 0.50 | - | - |")
    assert "Further figures, calibrated" not in report_text(report)


def test_figures_of_folds_are_averaged_and_folds_of_other_corpora_refused(faces):
    good = evaluation_report(faces.occurrence * 0.9, faces, 0.5, "test", ABOUT)
    bad = evaluation_report(np.zeros((12, 2)), faces, 0.5, "test", ABOUT)
    half = faces.select(np.arange(12) < 4)
    small = evaluation_report(np.ones((4, 2)), half, 0.5, "test", ABOUT)
    mean = mean_over_folds([good, bad, small])
    for label in ("AU12", "AU26"):
        f1 = [report["at_half"]["per_au"][label]["f1"] for report in (good, bad, small)]
        assert mean["at_half"]["per_au"][label]["f1"] == pytest.approx(np.mean(f1))
    assert f1[:2] == [1, 0]
    assert mean["at_half"]["per_au"]["AU12"]["auc"] == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert (mean["folds"], mean["pictures"], mean["people"]) == (3, 28, 7)
    same_people = mean_over_folds([good, bad, small], apart=[good])  # three models of one fold
    assert (same_people["folds"], same_people["pictures"], same_people["people"]) == (3, 12, good["people"])
    assert "means over 3 folds" in report_text(mean)
    assert f1_table(mean).splitlines()[2].endswith("| 60.0 |")
    with pytest.raises(ValueError, match="folds of one corpus"):
        mean_over_folds([good, evaluation_report(np.zeros((12, 1)), faces.with_aus([26]), 0.5, "test")])


def test_corpora_cross_over_the_action_units_that_all_share(faces):
    def report(aus, *wrong):
        chosen = faces.with_aus(aus)
        scores = chosen.occurrence.astype(float)
        scores[:, [aus.index(au) for au in wrong]] = 0
        return evaluation_report(scores, chosen, 0.5, "test")

    matrix = cross_corpus(
        {"a": {"a": report([12, 26]), "b": report([26])}, "b": {"a": report([26, 12], 26), "b": report([26])}}
    )
    assert matrix["aus"] == ["AU26"]
    assert matrix["f1"] == {"a": {"a": 1, "b": 1}, "b": {"a": 0, "b": 1}}
    assert matrix["pairs"]["b"]["a"] == {"aus": ["AU26", "AU12"], "f1": 0.5}
    table = cross_corpus_table(matrix).splitlines()
    assert table[2] == "| trained on | tested on a | tested on b |"
    assert table[-1] == "| b | 0.0 (50.0, 2 AUs) | 100.0 (100.0, 1 AUs) |"
    part = cross_corpus({"a": {"b": report([26])}, "b": {"a": report([26, 12]), "b": report([26])}})
    table = cross_corpus_table(part).splitlines()  # nobody trained on a was tested on it
    assert table[2] == "| trained on | tested on b | tested on a |"
    assert table[-2] == "| a | 100.0 (100.0, 1 AUs) | - |"
    with pytest.raises(ValueError, match="no action unit is in all 2"):
        cross_corpus({"a": {"a": report([12]), "b": report([26])}})


def test_neutral_faces_count_false_alarms(faces):
    scores = np.zeros((12, 2))
    scores[2], scores[5], scores[8] = [0.9, 0.9], [0.9, 0.1], [0.1, 0.1]  # faces 2, 5, 8 and 11 are neutral
    scores[0] = 0.9
    report = neutral_report(scores, faces.occurrence, [0.5, 0.5])
    assert report == {"pictures": 4, "false_alarms_per_picture": 0.75, "share_with_any": 0.5}
    assert neutral_report(scores[:2], faces.occurrence[:2], 0.5)["pictures"] == 0


class Batch(dict):
    def to(self, device):
        return self


@pytest.fixture
def stand_in():
    """A stand-in processor and model, whose score of an AU is the mean of its colour, and what they saw."""
    seen = SimpleNamespace(landmarks=[], shapes=[])

    def processor(pictures, landmarks, return_tensors):
        seen.landmarks.extend(landmarks)
        return Batch(pixel_values=torch.stack([torch.from_numpy(np.array(p)) for p in pictures]).float())

    class Model:
        device, config = "cpu", SimpleNamespace(au_thresholds=[0.5, 0.5])

        def __call__(self, pixel_values):
            seen.shapes.append(tuple(pixel_values.shape[:-3]))
            return SimpleNamespace(logits=(pixel_values[..., :2].mean((-3, -2)) - 110) / 20)

    return Model(), processor, seen


def test_scores_come_through_the_processor_in_order(faces, stand_in):
    model, processor, seen = stand_in
    scores = predict_scores(model, processor, faces, batch_size=5)
    np.testing.assert_array_equal(scores > 0.5, faces.occurrence == 1)
    np.testing.assert_array_equal(np.stack(seen.landmarks), faces.landmarks)
    assert seen.shapes == [(5,), (5,), (2,)]
    assert evaluate_model(model, processor, faces, "test", 5)["calibrated"]["mean"]["f1"] == 1


def test_temporal_networks_see_recordings_clip_by_clip(faces, stand_in):
    """Two recordings in turns: no clip has frames of both, and each score returns to its frame."""
    model, processor, seen = stand_in
    model.config = SimpleNamespace(clip_length=4)
    recordings = replace(faces, sequences=np.array(["a", "b"] * 6))
    scores = predict_scores(model, processor, recordings, batch_size=5)
    assert seen.shapes == [(1, 4), (1, 2)] * 2
    order = [0, 2, 4, 6, 8, 10, 1, 3, 5, 7, 9, 11]
    np.testing.assert_array_equal(np.stack(seen.landmarks), faces.landmarks[order])
    np.testing.assert_array_equal(scores > 0.5, faces.occurrence == 1)
    seen.shapes.clear()
    predict_scores(model, processor, faces, batch_size=12)
    assert seen.shapes == [(12,)], "faces without recordings are single pictures"


def test_tables_bars_and_files(faces, tmp_path):
    report = evaluation_report(np.where(faces.occurrence == 1, 0.4, 0.1), faces, [0.3, 0.45], "test")
    table = metrics_table(report).splitlines()
    assert table[2] == "| AU12 | lip corner puller | 33 % | 0.00 | 0.30 | 1.00 | 0 % | 1.00 | 1.00 |"
    assert table[-1].startswith("| mean |  | 33 % | 0.00 | 0.38 | 0.50 |")
    assert "| sex: f | 2 | 8 | 0.50 | 0 % | 1.00 | 1.00 |" in groups_table(report)
    write_report(tmp_path / "new", report)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [
        f"metrics-test.{s}" for s in ("json", "md", "png")
    ]
    assert json.loads((tmp_path / "new" / "metrics-test.json").read_text()) == report

    bars = np.asarray(draw_bars(report).convert("RGB")).astype(int)
    blue = (np.abs(bars - [0x3B, 0x76, 0xC4]).max(-1) < 8).sum(1)
    full, none = blue[24 + 6], blue[48 + 12]
    assert full > 500 and none <= 2
