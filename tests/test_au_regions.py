import math

import numpy as np
import pytest
import torch

from actionunits.action_units import CORPUS_AUS
from actionunits.au_regions import (
    LAC,
    LAC_EXTENSION,
    SHAO,
    SHAO_EXTENSION,
    au_centers,
    gaussian_maps,
    have_centers,
    roi_boxes,
)
from actionunits.landmarks import mirror_landmarks, reduce_landmarks

ALL = sorted(SHAO | SHAO_EXTENSION)


def face(size, seed=0):
    return np.random.default_rng(seed).uniform(0, 176, (size, 2))


def shao_oracle(p, au):
    """The definition written once more, with the indices of iBUG-68 (EAC-Net, JAA-Net, ESCDA Fig. 3)."""
    scale = abs(p[39, 0] - p[42, 0])
    first, second, down = {
        1: (21, 22, -scale / 2),
        2: (18, 25, -scale / 3),
        4: (19, 24, scale / 3),
        6: (41, 46, scale),
        7: (38, 43, 0),
        9: (32, 34, -scale / 2),
        10: (61, 63, 0),
        12: (48, 54, 0),
        14: (48, 54, 0),
        15: (48, 54, 0),
        17: (56, 58, scale / 2),
        23: (51, 57, 0),
        24: (51, 57, 0),
        25: (51, 57, 0),
        26: (56, 58, scale / 2),
    }[au]
    return np.array([p[first] + [0, down], p[second] + [0, down]])


def lac_oracle(p, au):
    """LAC Table I, cell by cell."""
    x, y = p[:, 0], p[:, 1]
    corners = [(x[88], y[88]), (x[92], y[92])]
    lips = [((x[89] + x[95]) / 2, (y[89] + y[95]) / 2), ((x[91] + x[93]) / 2, (y[91] + y[93]) / 2)]
    return np.array(
        {
            1: [(x[37], y[37]), (x[42], y[42])],
            2: [(x[40], y[40]), (x[48], y[48])],
            4: [((x[37] + x[51]) / 2, y[37]), ((x[42] + x[51]) / 2, y[42])],
            6: [(x[67], y[52]), (x[73], y[52])],
            7: [(sum(x[60:68]) / 8, sum(y[60:68]) / 8), (sum(x[68:76]) / 8, sum(y[68:76]) / 8)],
            9: [(x[51], y[51]), (x[53], y[53])],
            10: [((x[77] + x[78]) / 2, (y[77] + y[78]) / 2), ((x[80] + x[81]) / 2, (y[80] + y[81]) / 2)],
            **dict.fromkeys((12, 14, 15), corners),
            17: [((x[15] + x[86]) / 2, (y[15] + y[86]) / 2), ((x[17] + x[84]) / 2, (y[17] + y[84]) / 2)],
            **dict.fromkeys((23, 24, 25), lips),
            26: [(x[83], y[83]), (x[87], y[87])],
        }[au]
    )


@pytest.mark.parametrize("au", sorted(SHAO))
def test_shao_matches_its_definition_in_68_points(au):
    points = face(68)
    np.testing.assert_allclose(au_centers(points, 68, [au])[0], shao_oracle(points, au), rtol=1e-14)


@pytest.mark.parametrize("au", sorted(LAC))
def test_lac_matches_table_i(au):
    points = face(98)
    np.testing.assert_allclose(au_centers(points, 98, [au], "lac")[0], lac_oracle(points, au), rtol=1e-14)


def test_tables_place_every_corpus_and_do_not_overlap():
    assert not set(SHAO) & set(SHAO_EXTENSION) and not set(LAC) & set(LAC_EXTENSION)
    assert set(SHAO) == set(LAC) and set(SHAO_EXTENSION) == set(LAC_EXTENSION)
    assert all(set(aus) <= set(ALL) for aus in CORPUS_AUS.values())
    assert have_centers(ALL) and not have_centers([12, 38])


def test_extension_of_lids_and_corners():
    points = face(68)
    lids, corners = au_centers(points, 68, [5, 20])
    np.testing.assert_allclose(lids, [points[37:39].mean(0), points[43:45].mean(0)])
    np.testing.assert_allclose(corners, points[[48, 54]])


def test_closing_eyes_are_in_the_middle_of_the_eyes():
    points = face(98)
    eyes = reduce_landmarks(points, 98, 5)[:2]
    for au in (43, 45):
        np.testing.assert_allclose(au_centers(points, 98, [au])[0], eyes)
        np.testing.assert_allclose(
            au_centers(points, 98, [au], "lac"), au_centers(points, 98, [7], "lac"), err_msg=f"AU{au}"
        )


@pytest.mark.parametrize("scheme", [66, 68, 98, 478])
def test_shao_takes_whatever_reduces_to_49(scheme):
    points = face(scheme)
    expected = au_centers(reduce_landmarks(points, scheme, 49), 49, ALL)
    np.testing.assert_array_equal(au_centers(points, scheme, ALL), expected)


@pytest.mark.parametrize(("definition", "scheme"), [("shao", 68), ("lac", 98)])
def test_batches_tensors_and_the_order_of_action_units(definition, scheme):
    points = np.stack([face(scheme, seed) for seed in range(6)]).reshape(2, 3, scheme, 2)
    centers = au_centers(points, scheme, [12, 4, 1], definition)
    assert centers.shape == (2, 3, 3, 2, 2)
    one = au_centers(points[1, 2], scheme, [1, 4, 12], definition)
    np.testing.assert_array_equal(centers[1, 2], one[::-1])
    tensor = au_centers(torch.from_numpy(points), scheme, [12, 4, 1], definition)
    np.testing.assert_allclose(tensor.numpy(), centers, rtol=1e-14)


@pytest.mark.parametrize(("definition", "scheme"), [("shao", 68), ("lac", 98)])
def test_centres_move_and_grow_with_the_face(definition, scheme):
    points = face(scheme)
    expected = au_centers(points, scheme, ALL, definition) * 0.5 + [7, -3]
    np.testing.assert_allclose(au_centers(points * 0.5 + [7, -3], scheme, ALL, definition), expected)


@pytest.mark.parametrize(("definition", "scheme"), [("shao", 68), ("lac", 98)])
def test_centres_of_the_mirrored_face(definition, scheme):
    points = face(scheme)
    centers = au_centers(points, scheme, ALL, definition)
    mirrored = au_centers(mirror_landmarks(points, scheme, 176), scheme, ALL, definition)
    back = np.stack([175 - mirrored[..., 0], mirrored[..., 1]], -1)
    for au, before, after in zip(ALL, centers, back, strict=True):
        same = np.allclose(before, after) or np.allclose(before, after[::-1])
        assert same, f"AU{au}"


def test_refusals():
    with pytest.raises(ValueError, match=r"no centres for action units \[38\]; it has \[1, 2, 4"):
        au_centers(face(68), 68, [1, 38])
    with pytest.raises(ValueError, match="Unknown action unit 3 "):
        au_centers(face(68), 68, [3])
    with pytest.raises(ValueError, match="Unknown definition 'jaa'"):
        au_centers(face(68), 68, [1], "jaa")
    with pytest.raises(ValueError, match="'ibug68' landmarks do not reduce to 'wflw98'"):
        au_centers(face(68), 68, [1], "lac")
    with pytest.raises(ValueError, match="'five' landmarks do not reduce to 'ibug49'"):
        au_centers(face(5), 5, [1])


def naive_maps(centers, h, w, height, width, sigma, rounded):
    """ESCDA Eqs. 1-2 with loops over (m, 2, 2) centres."""
    maps = np.zeros((len(centers), h, w))
    for i, pair in enumerate(centers.tolist()):
        for b in range(h):
            for a in range(w):
                values = []
                for x, y in pair:
                    if rounded:
                        x, y = math.floor(x / width * w + 0.5), math.floor(y / height * h + 0.5)
                    else:
                        x, y = (x + 0.5) * w / width - 0.5, (y + 0.5) * h / height - 0.5
                    values.append(math.exp(-((a - x) ** 2 + (b - y) ** 2) / (2 * sigma**2)))
                maps[i, b, a] = max(values)
    return maps


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize(("map_size", "input_size"), [(22, 176), (7, 112), ((5, 9), (60, 112))])
def test_gaussian_maps_against_loops(rounded, map_size, input_size):
    centers = torch.rand(2, 3, 2, 2, dtype=torch.float64, generator=torch.manual_seed(0)) * 120 - 4
    maps = gaussian_maps(centers, map_size, input_size, 1.7, round_centers=rounded)
    (h, w), (height, width) = ((s, s) if isinstance(s, int) else s for s in (map_size, input_size))
    assert maps.shape == (2, 3, h, w) and maps.dtype == torch.float64
    for one, expected in zip(centers, maps, strict=True):
        naive = naive_maps(one, h, w, height, width, 1.7, rounded)
        np.testing.assert_allclose(expected.numpy(), naive, rtol=1e-12)


def test_gaussian_peaks_where_the_centre_is():
    # Cell 3 of 7 over 112 pixels covers the pixels 48 to 63, whose middle is 55.5.
    centers = torch.tensor([[[[55.5, 55.5], [7.5, 103.5]]]])
    maps = gaussian_maps(centers, 7, 112, 1.0)[0, 0]
    assert maps[3, 3] == maps[6, 0] == 1
    assert (maps < 1).sum() == 47 and (maps > 0).all()
    # The authors' rounding puts the same centre half a cell further.
    assert gaussian_maps(centers, 7, 112, 1.0, round_centers=True)[0, 0, 3, 3] == 1
    assert gaussian_maps(centers + 1, 7, 112, 1.0, round_centers=True)[0, 0, 4, 4] == 1
    # By default a pixel is a sixteenth of a cell, in either direction.
    assert gaussian_maps(centers + 1, 7, 112, 1.0)[0, 0, 3, 3] == pytest.approx(math.exp(-((1 / 16) ** 2)))


def test_gaussian_type_follows_and_half_precision_is_safe():
    centers = torch.tensor([[[[141.0, 97.0], [5000.0, -5000.0]]]])
    for dtype in (torch.float16, torch.bfloat16):
        half = gaussian_maps(centers.to(dtype), 22, 176, 3.0)
        full = gaussian_maps(centers.to(dtype).float(), 22, 176, 3.0)
        assert half.dtype == dtype
        assert torch.equal(half, full.to(dtype))  # only the result is rounded
    assert gaussian_maps(centers.long(), 22, 176, 3.0).dtype == torch.float32


@pytest.mark.parametrize("sigma", [0, -1.0, float("nan")])
def test_gaussian_needs_a_width(sigma):
    with pytest.raises(ValueError, match="sigma must be a positive number of map cells, got"):
        gaussian_maps(torch.zeros(1, 1, 2, 2), 7, 112, sigma)


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_roi_boxes(kind):
    centers = kind([[[10.0, 20.0], [30.0, 40.0]]])
    assert roi_boxes(centers, 4).tolist() == [[[8, 18, 12, 22], [28, 38, 32, 42]]]
    assert roi_boxes(centers, (4, 10)).tolist() == [[[8, 15, 12, 25], [28, 35, 32, 45]]]
