"""Paint, shadow and cutting: what they change, and what they leave."""

from collections import Counter
from dataclasses import replace

import cv2
import numpy as np
import pytest

from actionunits.synthesis.make_up import BEARD, LIDS, LIPS, MOUSTACHE, PAINTS, _put_on, make_up
from actionunits.synthesis.photography import FILL, _cap, _fringe, _glasses, cast_shadow, cut_tightly, occlude

from .conftest import mean_face

SIZE = 128
POINTS = (mean_face() * 40 + SIZE / 2).astype(np.float32)
GRAY = np.full((SIZE, SIZE, 3), 0.5, np.float32)


def many(function, picture, count=400):
    """`function(picture, rng)` for many generators: the changed results, and the share that they are."""
    results = [function(picture, np.random.default_rng(seed)) for seed in range(count)]
    changed = [r for r in results if not np.array_equal(r, picture)]
    return changed, len(changed) / count


def test_almost_half_of_the_faces_are_painted_and_colours_stay_colours():
    painted, share = many(lambda picture, rng: make_up(picture, POINTS, rng), GRAY)
    assert 0.35 < share < 0.5
    assert all(r.min() >= 0 and r.max() <= 1 for r in painted)
    assert np.array_equal(GRAY, np.full_like(GRAY, 0.5))  # the input is not painted on


def test_paint_goes_where_its_points_are():
    lips = next(p for p in PAINTS if p.areas == LIPS)
    assert {i for area in lips.areas for i in area} == set(range(48, 68))
    assert {i for p in PAINTS if p.line for area in p.areas for i in area} <= set(range(17, 27)) | set(
        range(36, 48)
    )
    for hair in (BEARD, MOUSTACHE):
        assert {i for area in hair.areas for i in area} & set(range(17, 31)) == set()
        assert {i for area in hair.areas for i in area} & set(range(36, 48)) == set()
    painted, _ = many(lambda picture, rng: make_up(picture, POINTS, rng), GRAY)
    touched = np.mean([np.abs(r - 0.5).sum(-1) > 0.01 for r in painted], 0)
    x, y = np.round(POINTS[36:40].mean(0)).astype(int)
    assert touched[y, x] > 0.2 and touched[:4].max() == 0 and touched[-4:].max() == 0


def test_paints_are_worn_as_often_as_they_say(monkeypatch):
    """Each of make-up's own chance by a quarter of the faces; beards by one in 7, moustaches in 12."""
    worn = Counter()
    monkeypatch.setattr("actionunits.synthesis.make_up._put_on", lambda _, paint, *__: worn.update([paint]))
    for seed in range(4000):
        make_up(GRAY, POINTS, np.random.default_rng(seed))
    expected = {paint: paint.chance / 4 for paint in PAINTS} | {BEARD: 1 / 7, MOUSTACHE: 1 / 12}
    assert {paint: worn[paint] / 4000 for paint in worn} == pytest.approx(expected, abs=0.015)


def test_shadow_of_the_lids_lies_above_their_edges():
    """By up to `lift`; without it, the same paint is on the edges."""
    (shadow,) = (paint for paint in PAINTS if paint.areas == LIDS and paint.lift > 0.1)
    heights = []
    for paint in (replace(shadow, lift=0.0), shadow):
        worn = [_put_on(GRAY, paint, POINTS, np.random.default_rng(seed)) for seed in range(100)]
        rows = [np.abs(w - GRAY).sum((1, 2)) for w in worn]
        heights.append(np.array([r @ np.arange(SIZE) / r.sum() for r in rows]))
    edges, unit = POINTS[36:40, 1].mean(), POINTS[42, 0] - POINTS[39, 0]
    assert np.abs(heights[0] - edges).max() < 0.1 * unit
    lifted = (heights[0] - heights[1]) / unit
    assert lifted.mean() == pytest.approx(shadow.lift / 2, abs=0.01) and lifted.max() < shadow.lift + 0.01


def test_shadow_darkens_one_side_and_brightens_nothing():
    shadowed, share = many(cast_shadow, GRAY)
    assert 0.08 < share < 0.17
    assert all((r <= GRAY + 1e-6).all() and r.min() < 0.42 for r in shadowed)


def test_tight_cut_keeps_the_face_and_fills_around_it():
    picture = np.full((SIZE, SIZE, 3), 200, np.uint8)
    low, high = np.ceil(POINTS.min(0)).astype(int), np.floor(POINTS.max(0)).astype(int)
    framed, share = many(lambda picture, rng: cut_tightly(picture, POINTS, rng), picture)
    assert 0.1 < share < 0.2
    for cut in framed:
        assert set(np.unique(cut)) <= {0, FILL, 200}
        assert (cut[low[1] : high[1], low[0] : high[0]] == 200).all()


def test_what_hides_the_face_is_now_and_then_a_cap_above_the_brows_or_a_hand_below_them():
    hidden, share = many(lambda picture, rng: occlude(picture, POINTS, rng), GRAY, count=800)
    assert 0.2 < share < 0.4
    assert all(np.isfinite(r).all() and r.min() >= 0 and r.max() <= 1 for r in hidden)
    changed = np.array([np.abs(r - 0.5).sum(-1) > 0.02 for r in hidden])
    capped = changed[:, 1, :].all(1)  # only a cap covers the whole of the upper rim
    assert 0.1 < capped.mean() < 0.35  # 6 of about 33 that are hidden at all
    nose, chin = np.round(POINTS[[30, 8]]).astype(int)
    only_cap = capped & ~changed[:, chin[1], chin[0]] & ~changed[:, nose[1], nose[0]]
    assert only_cap.sum() > 0.7 * capped.sum()


@pytest.mark.parametrize("cover", [_cap, _fringe, _glasses])
def test_what_hides_the_face_turns_with_it(cover):
    turned = np.stack([POINTS[:, 1], SIZE - 1 - POINTS[:, 0]], 1)  # a quarter turn, as np.rot90
    for seed in range(6):
        upright, tilted = (
            cv2.GaussianBlur(cover(GRAY.copy(), p, np.random.default_rng(seed)), (0, 0), 2).mean(-1) - 0.5
            for p in (POINTS, turned)
        )
        assert np.corrcoef(np.rot90(upright).ravel(), tilted.ravel())[0, 1] > 0.85


def test_glasses_are_around_the_eyes_and_seldom_tinted():
    worn = np.array([_glasses(GRAY.copy(), POINTS, np.random.default_rng(seed)) for seed in range(200)])
    hidden = (np.abs(worn - 0.5).max(-1) > 0.02).mean(0)
    eyes = np.array([POINTS[36:42].mean(0), POINTS[42:48].mean(0)])
    x, y = np.round([*eyes, eyes.mean(0), POINTS[0], POINTS[16]]).astype(int).T
    *tinted, bridge, right_temple, left_temple = hidden[y, x]
    assert tinted == pytest.approx([0.22, 0.22], abs=0.08)
    assert bridge == right_temple == left_temple == 1


def test_the_brim_of_a_cap_shades_some_brows_and_brightens_nothing():
    capped = np.array([_cap(GRAY.copy(), POINTS, np.random.default_rng(seed)) for seed in range(100)])
    below = capped[:, round(float(POINTS[27, 1])) :]
    assert below.max() <= 0.5 + 1e-6 and below[:, -20:].min() >= 0.5 - 1e-6
    x, y = np.round(POINTS[19]).astype(int)
    assert 0.1 < np.mean(capped[:, y, x].max(-1) < 0.49) < 0.4


def test_a_fringe_hides_forehead_and_now_and_then_brows_but_neither_mouth_nor_chin():
    combed = np.array([_fringe(GRAY, POINTS, np.random.default_rng(seed)) for seed in range(200)])
    assert combed.dtype == np.float32 and combed.min() >= 0 and combed.max() <= 1
    hidden = (np.abs(combed - 0.5).max(-1) > 0.05).mean(0)
    forehead = np.round(POINTS[27] + 0.9 * (POINTS[27] - POINTS[33])).astype(int)
    brows, eyes = (np.round(POINTS[part]).astype(int) for part in (slice(17, 27), slice(36, 48)))
    assert hidden[forehead[1], forehead[0]] > 0.8
    assert 0.2 < hidden[brows[:, 1], brows[:, 0]].mean() < 0.7
    assert hidden[eyes[:, 1], eyes[:, 0]].mean() < 0.2
    assert hidden[round(float(POINTS[33, 1])) :].max() < 0.02
    assert np.array_equal(GRAY, np.full_like(GRAY, 0.5))
