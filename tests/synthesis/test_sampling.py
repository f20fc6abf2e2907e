import json
from collections import Counter

import numpy as np
import pytest

from actionunits.synthesis import sampling
from actionunits.synthesis.fitting import Camera
from actionunits.synthesis.head_model import AU_SHAPES
from actionunits.synthesis.sampling import (
    BRINGS,
    EXCLUSIVE,
    FULL_LIP_GAP,
    GRIMACE_MOST,
    GRIMACE_SHARE,
    OCCURRENCE_FROM,
    OWN_WAY,
    RESTING_FOLDS,
    SYNTHETIC_AUS,
    WIDE_JAW,
    label_intensities,
    label_occurrence,
    neutral_scene,
    sample_action_units,
    sample_scene,
)
from actionunits.synthesis.wrinkles import WRINKLED_AUS


@pytest.fixture(scope="module")
def many() -> list[dict[int, float]]:
    rng = np.random.default_rng(0)
    return [sample_action_units(rng) for _ in range(4000)]


def test_impossible_pairs_never_meet(many):
    assert not [pair for face in many for pair in EXCLUSIVE if set(pair) <= set(face)]


def test_intensities_are_intensities_and_every_action_unit_comes_alone_and_in_company(many):
    assert all(0 < v <= 1 for face in many for v in face.values())
    alone, together = Counter(), Counter()
    for face in many:
        (alone if len(face) == 1 else together).update(face)
    assert set(alone) == set(together) == set(SYNTHETIC_AUS)
    assert 0.12 < np.mean([not face for face in many]) < 0.25


def test_cheeks_go_with_strong_smiles_and_outer_brows_with_inner_ones_mostly(many):
    def share(shown, among):
        return np.mean([shown in face for face in among])

    smiles = [face for face in many if 12 in face]
    weak, strong = ([f for f in smiles if (f[12] > 0.8) == s] for s in (False, True))
    # 4 of the 11 smiles among the prototypes come without AU 6; of the strong ones it joins three quarters.
    assert share(6, weak) < 0.75 < share(6, strong) < 0.97
    assert 0.01 < share(6, [face for face in many if 12 not in face]) < 0.06
    assert 0.7 < share(1, [face for face in many if 2 in face]) < 0.9
    assert share(2, [face for face in many if 1 in face]) < 0.65  # inner brows rise alone as well


@pytest.mark.parametrize(("au", "other", "chance"), BRINGS)
def test_an_action_unit_brings_another_as_often_as_the_table_says(monkeypatch, au, other, chance):
    """Not beside one that excludes the other. AU 6 is drawn with a smile, without which it seldom stays."""

    def share(*drawn):
        monkeypatch.setattr(sampling, "PROTOTYPES", (drawn,))
        monkeypatch.setattr(sampling, "SYNTHETIC_AUS", drawn)
        rng = np.random.default_rng(0)
        faces = [f for f in (sample_action_units(rng) for _ in range(3000)) if f.keys() >= set(drawn)]
        assert len(faces) > 500
        return np.mean([other in face for face in faces])

    company = (12,) if au == 6 else ()
    assert share(au, *company) == pytest.approx(chance, abs=0.05)
    excluding = next(a + b - other for a, b in EXCLUSIVE if other in (a, b)) if other != 4 else None
    assert excluding is None or share(au, excluding, *company) == 0


def test_lips_decide_about_25_and_silence_23_and_24(head):
    scene = neutral_scene(head, {12: 0.7, 23: 0.9, 24: 0.4})
    closed = dict(zip(SYNTHETIC_AUS, label_intensities(scene, 0.0), strict=True))
    apart = dict(zip(SYNTHETIC_AUS, label_intensities(scene, 0.5 * FULL_LIP_GAP), strict=True))
    assert (closed[12], closed[23], closed[24], closed[25]) == pytest.approx((0.7, 0.9, 0.4, 0.0))
    assert (apart[12], apart[23], apart[24], apart[25]) == pytest.approx((0.7, 0.0, 0.0, 0.5))
    assert label_intensities(scene, -1.0)[SYNTHETIC_AUS.index(25)] == 0
    assert label_intensities(scene, 99.0)[SYNTHETIC_AUS.index(25)] == 1


def test_occurrence_begins_at_the_stated_intensity():
    values = np.array([0, OCCURRENCE_FROM - 1e-4, OCCURRENCE_FROM, 1], np.float32)
    assert label_occurrence(values).tolist() == [0, 0, 1, 1]


def test_scenes_follow_their_generator(head):
    first, second, other = (sample_scene(head, np.random.default_rng(s)).parameters() for s in (5, 5, 6))
    assert first == second != other
    assert json.loads(json.dumps(first)) == first


def test_wrinkles_grow_with_intensity_and_only_of_posed_action_units(head):
    weak, strong = neutral_scene(head, {4: 0.4}), neutral_scene(head, {4: 1.0})
    column = WRINKLED_AUS.index(4)
    assert 0 < weak.wrinkles[column] < strong.wrinkles[column]
    assert np.count_nonzero(strong.wrinkles) == 1


def test_poses_reach_profile_like_views_but_stay_mostly_frontal(head):
    rng = np.random.default_rng(2)
    yaw = np.abs([sample_scene(head, rng).yaw for _ in range(300)])
    assert 0.8 < yaw.max() <= 1.05 and np.median(yaw) < 0.3 and 0.03 < (yaw > 0.6).mean() < 0.2


def test_half_of_the_people_look_into_the_camera_and_the_lids_follow_the_eyes(head, monkeypatch):
    """The eyes undo the turn of the head, as far as eyes can turn; AU 5 keeps the lids open."""
    monkeypatch.setattr(sampling, "RESTING_FACE", ())
    rng = np.random.default_rng(3)
    scenes = [sample_scene(head, rng) for _ in range(400)]
    turned = Camera(np.eye(3), np.zeros(2), 1.0).turned
    met = []
    for s in scenes:
        (yaw, pitch), gentle = s.gaze, abs(s.yaw) < 0.5 and abs(s.pitch) < 0.4
        eye = np.array([np.sin(yaw) * np.cos(pitch), np.sin(pitch), np.cos(yaw) * np.cos(pitch)])
        met += [np.allclose(turned(s.yaw, s.pitch).rotation @ eye, [0, 0, 1], atol=1e-6)] * gentle
    assert np.mean(met) == pytest.approx(0.5, abs=0.1)
    up, down, blink = (head.expression_index(f"eye{name}") for name in ("LookUp", "LookDown", "Blink"))
    for s in scenes:
        followed, resting = (up, down) if s.gaze[1] > 0 else (down, up)
        np.testing.assert_allclose(s.expression[followed], abs(s.gaze[1]) / 0.5, rtol=1e-5)
        assert not s.expression[resting].any()
        assert not (5 in s.action_units and s.expression[blink].any())


def test_faces_move_in_their_own_way_and_fold_at_rest(head):
    rng = np.random.default_rng(4)
    scenes = [sample_scene(head, rng) for _ in range(400)]
    folded = [s.wrinkles.max() for s in scenes if not s.action_units]
    assert 0.15 < np.mean(np.array(folded) > 0) < 0.55 and max(folded) <= RESTING_FOLDS
    jaw, open_jaw = head.expression_index("jawOpen")[0], max(OWN_WAY) * AU_SHAPES[26]["jawOpen"]
    factors = [
        s.expression[jaw] / (AU_SHAPES[26]["jawOpen"] * s.action_units[26])
        for s in scenes
        if s.action_units.get(26, 0) > 0.3 and s.expression[jaw] <= open_jaw * s.action_units[26]
    ]
    assert min(OWN_WAY) - 1e-4 <= min(factors) < 0.9 and max(factors) > 1.1


def test_the_lower_lip_follows_a_lifted_upper_lip_in_half_of_the_closed_mouths(head):
    lower = head.expression_index("mouthLowerDown")
    rng = np.random.default_rng(5)
    scenes = [sample_scene(head, rng) for _ in range(1200)]
    lifted = [s for s in scenes if max(s.action_units.get(9, 0), s.action_units.get(10, 0)) > 0.1]
    shut, open_ = ([s for s in lifted if bool(s.action_units.keys() & {25, 26}) is o] for o in (False, True))
    follows = [(s.expression[lower] < -0.02).all() for s in shut]
    assert len(shut) > 50 and 0.35 < np.mean(follows) < 0.65
    assert not any((s.expression[lower] < 0).any() for s in open_)


def test_smiles_move_what_others_move_too_without_their_labels(head, monkeypatch):
    """A toothy smile lifts the upper lip, a closed one presses the lips, and both dimple the cheeks."""

    def mean_weights(*aus):
        monkeypatch.setattr(sampling, "sample_action_units", lambda rng: dict.fromkeys(aus, 0.5))
        scenes = [sample_scene(head, np.random.default_rng(seed)) for seed in range(300)]
        assert all(label_intensities(s, 0.0)[SYNTHETIC_AUS.index(14)] == 0.5 * (14 in aus) for s in scenes)
        weights = np.mean([s.expression for s in scenes], 0)
        shapes = ("mouthUpperUp", "mouthDimple", "mouthPress")
        return [float(weights[head.expression_index(shape)].mean()) for shape in shapes]

    assert mean_weights(12) == pytest.approx([0, 0.175, 0.15], abs=0.02)
    assert mean_weights(12, 25) == pytest.approx([0.25, 0.175, 0], abs=0.02)
    gains = AU_SHAPES[14]
    expected = [0, 0.5 * gains["mouthDimple"], 0.5 * gains["mouthPress"]]
    assert mean_weights(14) == pytest.approx(expected, abs=0.03)


def test_some_jaws_drop_farther_than_26_has_labels_for(head, monkeypatch):
    monkeypatch.setattr(sampling, "sample_action_units", lambda rng: {26: 1.0})
    jaw, most = head.expression_index("jawOpen")[0], max(OWN_WAY) * AU_SHAPES[26]["jawOpen"]
    opened = np.array([sample_scene(head, np.random.default_rng(s)).expression[jaw] for s in range(300)])
    assert 0.1 < np.mean(opened > most) < 0.4 and opened.max() < most + WIDE_JAW + 0.09


def test_some_strong_faces_grimace_beyond_their_intensities(head, monkeypatch):
    nose = head.expression_index("noseSneer")
    monkeypatch.setattr(sampling, "OWN_WAY", (1.0, 1.0))
    monkeypatch.setattr(sampling, "RESTING_FACE", ())

    def factors(intensity):
        """Of the gains, against the same faces without grimaces."""
        monkeypatch.setattr(sampling, "sample_action_units", lambda rng: {9: intensity})
        weights = []
        for share in (GRIMACE_SHARE, 0.0):
            monkeypatch.setattr(sampling, "GRIMACE_SHARE", share)
            scenes = [sample_scene(head, np.random.default_rng(seed)) for seed in range(400)]
            labels = {label_intensities(s, 0.0)[SYNTHETIC_AUS.index(9)] for s in scenes}
            assert labels == {np.float32(intensity)}
            weights.append(np.array([s.expression[nose] for s in scenes]))
        return weights[0] / weights[1]

    strong = factors(1.0)
    assert np.mean(strong > 1.0001) == pytest.approx(GRIMACE_SHARE, abs=0.07)
    assert strong.min() > 1 - 1e-5 and 1.3 < strong.max() <= GRIMACE_MOST + 1e-5
    assert factors(0.6) == pytest.approx(1.0)
