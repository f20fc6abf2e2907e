import numpy as np
import pytest
import torch

from actionunits.landmarks import (
    SCHEMES,
    check_inside,
    check_landmarks,
    get_scheme,
    mirror_landmarks,
    reduce_landmarks,
)

SIZES = {"five": 5, "ibug49": 49, "ibug66": 66, "ibug68": 68, "wflw98": 98, "mediapipe478": 478}
WAYS = {
    "mediapipe478": ["ibug68", "ibug66", "ibug49", "five"],
    "wflw98": ["ibug68", "ibug66", "ibug49", "five"],
    "ibug68": ["ibug66", "ibug49", "five"],
    "ibug66": ["ibug49", "five"],
    "ibug49": ["five"],
    "five": [],
}
# Left and right points that everybody knows, and points on the midline.
MIRRORED = {
    "five": [(0, 1), (2, 2), (3, 4)],
    "ibug49": [(0, 9), (13, 13), (19, 28), (22, 25), (31, 37), (43, 45), (46, 48)],
    "ibug66": [(0, 16), (8, 8), (48, 54), (60, 62)],
    "ibug68": [
        (0, 16),
        (8, 8),
        (17, 26),
        (30, 30),
        (31, 35),
        (36, 45),
        (39, 42),
        (48, 54),
        (60, 64),
        (67, 65),
    ],
    "wflw98": [
        (0, 32),
        (16, 16),
        (33, 46),
        (37, 42),
        (40, 48),
        (60, 72),
        (64, 68),
        (76, 82),
        (88, 92),
        (96, 97),
    ],
    "mediapipe478": [
        *[(33, 263), (133, 362), (61, 291), (159, 386), (145, 374), (234, 454), (105, 334), (78, 308)],
        *[(0, 0), (1, 1), (4, 4), (17, 17), (152, 152), (10, 10)],
        *[(468, 473), (469, 476), (470, 475), (471, 474), (472, 477)],
    ],
}


def random_points(scheme, seed=0):
    return np.random.default_rng(seed).uniform(0, 100, (SIZES[scheme], 2))


def test_schemes():
    assert {name: scheme.size for name, scheme in SCHEMES.items()} == SIZES
    assert all(
        get_scheme(name) is get_scheme(size) is get_scheme(SCHEMES[name]) for name, size in SIZES.items()
    )
    assert get_scheme(np.int64(68)).name == "ibug68"


@pytest.mark.parametrize("scheme", ["ibug70", "68", 7, True, None])
def test_unknown_scheme(scheme):
    with pytest.raises(ValueError, match=r"Unknown landmark scheme .*'ibug68' \(68 points\)"):
        get_scheme(scheme)


@pytest.mark.parametrize("name", SIZES)
def test_mirror_is_an_involution_of_the_known_pairs(name):
    mirror = np.array(SCHEMES[name].mirror)
    assert np.array_equal(mirror[mirror], np.arange(SIZES[name]))
    for left, right in MIRRORED[name]:
        assert mirror[left] == right


@pytest.mark.parametrize("name", SIZES)
def test_named_points_mirror_into_each_other(name):
    scheme = SCHEMES[name]
    mirror = scheme.mirror
    assert {mirror[i] for i in scheme.left_eye} == set(scheme.right_eye)
    assert tuple(mirror[i] for i in reversed(scheme.eye_corners)) == scheme.eye_corners
    assert mirror[scheme.nose_tip] == scheme.nose_tip
    assert mirror[scheme.mouth_corners[0]] == scheme.mouth_corners[1]
    if scheme.eye_corners:
        assert set(scheme.eye_corners[:2]) <= set(scheme.left_eye)
        assert set(scheme.eye_corners[2:]) <= set(scheme.right_eye)


def test_mirror_of_49_is_that_of_the_authors():
    """The 1-based table that EAC-Net, JAA-Net and AC2D read from `reflect_49`."""
    table = [
        *range(10, 0, -1),
        *range(11, 15),
        *range(19, 14, -1),
        29,
        28,
        27,
        26,
        31,
        30,
        23,
        22,
        21,
        20,
        25,
        24,
    ]
    table += [*range(38, 31, -1), *range(43, 38, -1), 46, 45, 44, 49, 48, 47]
    assert [i + 1 for i in SCHEMES["ibug49"].mirror] == table


@pytest.mark.parametrize("name", SIZES)
def test_reduction_and_mirror_commute(name):
    points = random_points(name)
    for target in WAYS[name]:
        mirrored_first = reduce_landmarks(mirror_landmarks(points, name, 101), name, target)
        mirrored_last = mirror_landmarks(reduce_landmarks(points, name, target), target, 101)
        np.testing.assert_allclose(mirrored_first, mirrored_last, rtol=0, atol=1e-12)


def test_mirror_keeps_the_face_in_the_picture():
    points = np.array([[2.0, 3], [8, 3], [5, 5], [3, 8], [7, 8]])
    # Ten pixels wide: the left eye at x 2 is then the right one at 9 - 2 = 7.
    assert mirror_landmarks(points, "five", 10).tolist() == [[1, 3], [7, 3], [4, 5], [2, 8], [6, 8]]
    assert np.array_equal(mirror_landmarks(mirror_landmarks(points, 5, 10), 5, 10), points)


def test_66_and_49_are_68_without_points():
    points = random_points("ibug68")
    np.testing.assert_array_equal(reduce_landmarks(points, 68, 66), np.delete(points, [60, 64], 0))
    np.testing.assert_array_equal(
        reduce_landmarks(points, 68, 49), np.delete(points, [*range(17), 60, 64], 0)
    )
    np.testing.assert_array_equal(reduce_landmarks(points[None], 68, 68), points[None])


@pytest.mark.parametrize("name", ["ibug49", "ibug66", "ibug68"])
def test_five_points_of_68(name):
    points = random_points("ibug68")
    expected = [points[36:42].mean(0), points[42:48].mean(0), points[30], points[48], points[54]]
    np.testing.assert_allclose(reduce_landmarks(reduce_landmarks(points, 68, name), name, "five"), expected)


@pytest.mark.parametrize("name", ["wflw98", "mediapipe478"])
def test_68_points_of_larger_schemes_mean_the_same(name):
    scheme, small = SCHEMES[name], SCHEMES["ibug68"]
    points = random_points(name)
    reduced = reduce_landmarks(points, name, "ibug68")
    assert len(np.unique(reduced, axis=0)) == 68
    for part in ("eye_corners", "mouth_corners", "nose_tip"):
        np.testing.assert_array_equal(
            reduced[list_of(getattr(small, part))], points[list_of(getattr(scheme, part))]
        )
    for eye in ("left_eye", "right_eye"):
        taken = [np.flatnonzero((points == p).all(1))[0] for p in reduced[list(getattr(small, eye))]]
        ring = [getattr(scheme, eye).index(i) for i in taken]
        turned = np.roll(ring, -int(np.argmin(ring)))
        assert list(turned) in (sorted(ring), sorted(ring)[:1] + sorted(ring)[:0:-1])  # the same ring order


def list_of(indices):
    return [indices] if isinstance(indices, int) else list(indices)


def test_chin_and_pupils_of_wflw():
    points = random_points("wflw98")
    reduced = reduce_landmarks(points, 98, 68)
    np.testing.assert_array_equal(reduced[[0, 8, 16, 17, 26]], points[[0, 16, 32, 33, 46]])
    np.testing.assert_array_equal(reduced[48:], points[76:96])


@pytest.mark.parametrize("name", SIZES)
def test_impossible_reductions(name):
    for target in set(SIZES) - set(WAYS[name]) - {name}:
        with pytest.raises(ValueError, match=f"'{name}' landmarks do not reduce to '{target}'"):
            reduce_landmarks(random_points(name), name, target)


def test_batches_and_tensors():
    points = np.stack([random_points("ibug68", seed) for seed in range(6)]).reshape(2, 3, 68, 2)
    five = reduce_landmarks(points, 68, 5)
    assert five.shape == (2, 3, 5, 2)
    np.testing.assert_array_equal(five[1, 2], reduce_landmarks(points[1, 2], 68, 5))
    tensor = reduce_landmarks(torch.from_numpy(points).float(), 68, 5)
    assert tensor.dtype == torch.float32
    np.testing.assert_allclose(tensor.numpy(), five, rtol=1e-6)
    np.testing.assert_allclose(
        mirror_landmarks(torch.from_numpy(points), 68, 100).numpy(), mirror_landmarks(points, 68, 100)
    )


def test_whole_numbers_become_floats():
    points = random_points("ibug68").astype(int)
    np.testing.assert_allclose(reduce_landmarks(points, 68, 5), reduce_landmarks(points.astype(float), 68, 5))
    assert reduce_landmarks(torch.from_numpy(points), 68, 5).is_floating_point()


def test_reduction_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"'ibug68' landmarks must end in the axes \(68, 2\), got \(49, 2\)"):
        reduce_landmarks(random_points("ibug49"), 68, 49)


def test_check_landmarks_finds_the_scheme():
    points, scheme = check_landmarks(random_points("wflw98").tolist())
    assert scheme.name == "wflw98" and points.dtype == np.float64 and points.shape == (98, 2)
    points, scheme = check_landmarks(torch.zeros(5, 2), "five")
    assert scheme.name == "five" and isinstance(points, np.ndarray)


@pytest.mark.parametrize(
    ("points", "scheme", "message"),
    [
        (np.zeros((67, 2)), None, r"67 landmarks fit no scheme.*'ibug68' \(68 points\)"),
        (np.zeros((67, 2)), "ibug68", r"'ibug68' has 68 landmarks, got 67"),
        (np.zeros((68, 2)), "ibug49", r"'ibug49' has 49 landmarks, got 68"),
        (np.zeros((68, 2)), "ibug70", r"Unknown landmark scheme 'ibug70'"),
        (np.zeros((0, 2)), None, r"0 landmarks fit no scheme"),
        (np.zeros((68, 3)), None, r"shape \(N, 2\).*got \(68, 3\)"),
        (np.zeros((1, 68, 2)), None, r"one face at a time"),
        (np.zeros(136), None, r"got \(136,\)"),
        ("face", None, r"array of numbers"),
        ([[1, 2], [3]], None, r"array of numbers \(N, 2\), got list"),
        (np.where(np.arange(10).reshape(5, 2) == 4, np.nan, 1), 5, r"landmark 2 is \[nan, 1.0\] \(1 of 5"),
        (np.full((68, 2), -np.inf), None, r"landmark 0 is \[-inf, -inf\] \(68 of 68"),
    ],
)
def test_check_landmarks_refuses(points, scheme, message):
    with pytest.raises(ValueError, match=message):
        check_landmarks(points, scheme)


def test_inside():
    square = np.array([[0.0, 0], [9, 0], [0, 9], [9, 9]])
    one_beyond_a_corner = [[-3.0, -3], *square[1:]]
    for points in (square, square - 0.5, square + 0.5, square - [5, 0], one_beyond_a_corner):
        check_inside(points, 10, 10)


@pytest.mark.parametrize("shift", [(10.6, 0), (0, -9.6), (1000, 1000), (7, 7)])
def test_outside(shift):
    square = np.array([[0.0, 0], [9, 0], [0, 9], [9, 9]]) + shift
    with pytest.raises(ValueError, match=r"of 4 landmarks lie outside the 10 x 10 picture \(x .* to "):
        check_inside(square, 10, 10)
