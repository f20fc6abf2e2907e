"""Reports on a corpus: groups, neutral faces, tables and bars, from scores made up by hand."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from actionunits.data import AlignedFaces
from actionunits.evaluation import (
    draw_bars,
    evaluate_model,
    evaluation_report,
    groups_table,
    metrics_table,
    neutral_report,
    predict_scores,
    write_report,
)
from actionunits.metrics import f1_frame


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


def test_neutral_faces_count_false_alarms(faces):
    scores = np.zeros((12, 2))
    scores[2], scores[5], scores[8] = [0.9, 0.9], [0.9, 0.1], [0.1, 0.1]  # faces 2, 5, 8 and 11 are neutral
    scores[0] = 0.9
    report = neutral_report(scores, faces.occurrence, [0.5, 0.5])
    assert report == {"pictures": 4, "false_alarms_per_picture": 0.75, "share_with_any": 0.5}
    assert neutral_report(scores[:2], faces.occurrence[:2], 0.5)["pictures"] == 0


def test_scores_come_through_the_processor_in_order(faces):
    """A stand-in processor and model: the score of an AU is the mean of its colour."""
    seen = []

    class Batch(dict):
        def to(self, device):
            return self

    def processor(pictures, landmarks, return_tensors):
        seen.extend(landmarks)
        return Batch(pixel_values=torch.stack([torch.from_numpy(np.array(p)) for p in pictures]).float())

    class Model:
        device, config = "cpu", SimpleNamespace(au_thresholds=[0.5, 0.5])

        def __call__(self, pixel_values):
            return SimpleNamespace(logits=(pixel_values[..., :2].mean((1, 2)) - 110) / 20)

    scores = predict_scores(Model(), processor, faces, batch_size=5)
    np.testing.assert_array_equal(scores > 0.5, faces.occurrence == 1)
    np.testing.assert_array_equal(np.stack(seen), faces.landmarks)
    assert evaluate_model(Model(), processor, faces, "test", 5)["calibrated"]["mean"]["f1"] == 1


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
