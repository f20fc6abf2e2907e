"""Thresholds from renderings and neutral photographs: the rule against counting, and what changes."""

import json

import numpy as np
import pytest
from tiny_run import RECIPE, load_script

from actionunits.data import prepare_synthetic


@pytest.fixture(scope="session")
def calibrate():
    return load_script("calibrate")


@pytest.mark.parametrize("limit", [0.0, 0.05, 0.3, 0.9])
def test_no_lower_threshold_keeps_the_false_alarms_within_the_limit(calibrate, limit):
    scores = np.random.default_rng(0).random((40, 5)) ** 2
    thresholds = calibrate.lowest_thresholds(scores, limit)
    for column, threshold in zip(scores.T, thresholds, strict=True):
        assert (column >= threshold).mean() <= limit
        next_below = column[column < threshold].max()  # at this one, one more would be reported
        assert (column >= next_below).mean() > limit


def test_thresholds_are_raised_and_never_lowered_and_the_weights_stay(calibrate, run, corpus, monkeypatch):
    folder = run(networks={"gda": RECIPE["networks"]["gda"]}, epochs=1) / "model"
    weights = (folder / "model.safetensors").read_bytes()
    before = json.loads((folder / "config.json").read_text())["au_thresholds"]
    neutral = np.tile([0.0, 0.999, 0.0], (30, 1))  # the second action unit fires on every neutral photograph
    monkeypatch.setattr(calibrate, "photograph_scores", lambda *_: neutral)
    faces = {s: prepare_synthetic(corpus, s, folder.parent / "prepared") for s in ("validation", "test")}
    calibrate.calibrate(folder, faces, photographs=[None] * 31)

    config, metrics, described = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("config", "metrics", "run")
    )
    assert config["au_thresholds"] == pytest.approx([before[0], 0.9995, before[2]], abs=1e-3)
    per_au = metrics["test"]["calibrated"]["per_au"].values()
    assert [row["threshold"] for row in per_au] == pytest.approx(config["au_thresholds"])
    assert described["neutral_photographs"] == {"photographs": 31, "found": 30, "raised": ["AU12"]}
    assert (folder / "model.safetensors").read_bytes() == weights
    assert "30 neutral photographs of the training and validation people, too (AU12)" in (
        folder / "README.md"
    ).read_text(encoding="utf-8")
    assert not list(folder.glob("*.partial"))


def test_photographs_of_test_people_are_not_looked_at(calibrate, monkeypatch):
    people = [{"name": f"london/{i:03d}", "picture": i} for i in range(20)]
    monkeypatch.setattr(calibrate, "read_people", lambda folder: people)
    test = calibrate.split_people([row["name"] for row in people])["test"]
    seen = calibrate.neutral_photographs("anywhere")
    assert len(test) == 3 and len(seen) == 17
    assert not {people[i]["name"] for i in seen} & set(test)
