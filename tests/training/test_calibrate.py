"""Thresholds from renderings and neutral photographs: the rule against counting, and what changes."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit, logit
from tiny_run import RECIPE, load_script

from actionunits.data import prepare_synthetic
from actionunits.files import whole_file
from actionunits.synthesis.corpus import split_people


@pytest.fixture(scope="session")
def calibrate():
    return load_script("calibrate")


@pytest.mark.parametrize("limit", [0.0, 0.05, 0.3, 0.9])
@pytest.mark.parametrize("steps", [10, 10**9])  # of ten, many scores are equal
def test_no_lower_threshold_keeps_the_false_alarms_within_the_limit(calibrate, limit, steps):
    scores = np.floor(np.random.default_rng(0).random((40, 5)) ** 2 * steps) / steps
    thresholds = calibrate.lowest_thresholds(scores, limit)
    for column, threshold in zip(scores.T, thresholds, strict=True):
        assert (column >= threshold).mean() <= limit
        next_below = column[column < threshold].max()  # at this one, one more would be reported
        assert (column >= next_below).mean() > limit


@pytest.mark.parametrize("limit", [1.0, 1.5])
def test_a_limit_that_all_may_reach_raises_nothing(calibrate, limit):
    """Among smiles the limit is three times the recipe's `max_false_alarms`, which may be 1."""
    assert calibrate.lowest_thresholds(np.full((4, 2), 0.7), limit).tolist() == [0, 0]


def test_thresholds_are_raised_and_the_weights_stay(calibrate, run, corpus, monkeypatch):
    folder = run(networks={"gda": RECIPE["networks"]["gda"]}, epochs=1) / "model"
    weights = (folder / "model.safetensors").read_bytes()
    before = json.loads((folder / "config.json").read_text())["au_thresholds"]
    neutral = np.linspace(0, 1e-3, 30)[:, None].repeat(3, axis=1)
    neutral[:, 1] = 0.999  # the second action unit fires on every neutral photograph
    monkeypatch.setattr(calibrate, "photograph_scores", lambda *_: neutral)
    faces = {s: prepare_synthetic(corpus, s, folder.parent / "prepared") for s in ("validation", "test")}

    def stop_at_metrics(path):
        if path.name == "metrics.json":
            raise KeyboardInterrupt
        return whole_file(path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(calibrate, "whole_file", stop_at_metrics)
        calibrate.calibrate(folder, faces, photographs=[None] * 31)
    # remake_checkpoints.py does it again without this entry
    assert "neutral_photographs" not in json.loads((folder / "run.json").read_text())
    calibrate.calibrate(folder, faces, photographs=[None] * 31)

    config, metrics, described = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("config", "metrics", "run")
    )
    assert config["au_thresholds"] == pytest.approx([before[0], 0.9995, before[2]])
    per_au = metrics["test"]["calibrated"]["per_au"].values()
    assert [row["threshold"] for row in per_au] == pytest.approx(config["au_thresholds"])
    assert described["neutral_photographs"] == {
        "photographs": 31,
        "found": 30,
        "shift": {"AU1": 0.0, "AU12": 0.0, "AU26": 0.0},  # of so few renderings
        "raised": ["AU12"],
    }
    assert (folder / "model.safetensors").read_bytes() == weights
    assert "these photographs (AU12)" in (folder / "README.md").read_text(encoding="utf-8")
    assert not list(folder.glob("*.partial")) and not list(folder.glob(".*.part"))


@dataclass
class Faces:
    """What `choose_thresholds` looks at."""

    aus: tuple[int, ...]
    occurrence: np.ndarray
    intensities: np.ndarray


def renderings(count=400, seed=0):
    """AU 12 and 14 at random, and scores: AU 14 of a smile without it looks like a weak AU 14."""
    rng = np.random.default_rng(seed)
    intensities = rng.uniform(0.3, 1, (count, 2)) * (rng.random((count, 2)) < 0.4)
    logits = 6 * intensities - 3 + rng.normal(0, 1, (count, 2))
    logits[:, 1] += 3 * (intensities[:, 0] > 0)
    return expit(logits), Faces((12, 14), (intensities > 0.25).astype(np.int8), intensities)


def test_a_threshold_moves_as_neutral_photographs_score(calibrate):
    """By the difference of the median logits; nothing else differs between two sets of photographs."""
    scores, faces = renderings()
    neutral = scores[faces.intensities.max(1) <= 0.1]
    assert len(neutral) > 100
    same, how = calibrate.choose_thresholds(scores, faces, neutral, 0.2)
    assert how == {"shift": {"AU12": 0.0, "AU14": 0.0}, "raised": []}
    lower, how = calibrate.choose_thresholds(scores, faces, expit(logit(neutral) - [0.7, 0.2]), 0.2)
    assert how == {"shift": {"AU12": -0.7, "AU14": -0.2}, "raised": []}
    np.testing.assert_allclose(logit(lower), logit(same) - [0.7, 0.2])
    _, how = calibrate.choose_thresholds(scores, faces, expit(logit(neutral) + [-0.9, 0.2]), 0.2)
    assert how["shift"] == {"AU12": -0.7, "AU14": 0.0}


@pytest.mark.parametrize("limit", [0.05, 0.1])
def test_smiles_have_a_limit_of_their_own_that_does_not_move(calibrate, limit):
    scores, faces = renderings()
    share = calibrate.SMILE_SHARE * limit
    bound = calibrate.smile_thresholds(scores, faces, share)
    smiles = (faces.occurrence == [1, 0]).all(1)
    overall = logit(calibrate.calibrate_thresholds(scores, faces.occurrence, limit))
    assert (logit(scores[smiles, 1]) >= overall[1] - 0.7).mean() > share  # what it is for
    assert (scores[smiles, 1] >= bound[1]).mean() <= share
    assert bound[0] == 0  # no smile is without it
    neutral = expit(logit(scores[faces.intensities.max(1) <= 0.1]) - 0.7)
    chosen, how = calibrate.choose_thresholds(scores, faces, neutral, limit)
    assert how["shift"] == {"AU12": -0.7, "AU14": -0.7}
    assert logit(chosen[0]) == pytest.approx(overall[0] - 0.7)
    assert chosen[1] == pytest.approx(bound[1])


def test_too_few_faces_tell_nothing(calibrate):
    """Twenty are enough, of photographs as of neutral renderings."""
    scores, faces = renderings(30)
    dark = np.full((20, 2), 1e-3)  # photographs that score far below all renderings
    for neutral, photographs, shift in ((20, 20, -0.7), (20, 19, 0), (19, 20, 0)):
        graded = replace(faces, intensities=(np.arange(30) >= neutral)[:, None] * [1.0, 0.2])
        assert calibrate.neutral_shift(dark[:photographs], scores, graded).tolist() == [shift, shift]
    assert not calibrate.smile_thresholds(scores[:19], replace_rows(faces, 19), 0.1).any()
    assert not calibrate.smile_thresholds(scores, replace(faces, aus=(6, 14)), 0.1).any()


def test_the_first_face_of_each_photograph_counts(calibrate, monkeypatch):
    """The pipeline gives the largest face first; photographs without any are left out, but not all may be."""

    def detector(*photographs):
        faces = {
            str(i): [{"action_units": [{"score": s}, {"score": s / 2}]} for s in scores]
            for i, scores in enumerate(photographs)
        }
        monkeypatch.setattr(calibrate, "pipeline", lambda task, model: faces.get)
        return calibrate.photograph_scores("model", list(map(Path, faces)))

    assert detector([0.8, 0.1], [], [0.2]).tolist() == [[0.8, 0.4], [0.2, 0.1]]
    with pytest.raises(ValueError, match="No face was found on 2 photographs"):
        detector([], [])


def test_logits_are_finite_and_exact_inside(calibrate):
    scores = np.array([1e-5, 0.3, 1 - 1e-5])
    np.testing.assert_allclose(expit(calibrate.logit(scores)), scores)
    low, high = calibrate.logit(np.array([0.0, 1.0]))
    assert -np.inf < low < logit(1e-5) and logit(1 - 1e-5) < high < np.inf


def replace_rows(faces, count):
    """The first of the faces."""
    return Faces(faces.aus, faces.occurrence[:count], faces.intensities[:count])


def test_photographs_of_test_people_are_not_looked_at(calibrate, monkeypatch):
    people = [{"name": f"london/{i:03d}", "picture": i} for i in range(20)]
    monkeypatch.setattr(calibrate, "read_people", lambda folder: people)
    names = [row["name"] for row in people]
    for seed, manifest in ((0, {}), (3, {"people": split_people(names, seed=3)})):
        test = split_people(names, seed)["test"]
        seen = calibrate.neutral_photographs("anywhere", manifest)
        assert len(test) == 3 and len(seen) == 17
        assert not {names[i] for i in seen} & set(test)
    with pytest.raises(ValueError, match="people of the split 'train', such as .*'a'.* is among the photo"):
        calibrate.neutral_photographs("anywhere", {"people": split_people(["a", "b", "c", "d", "e", "f"])})
