import math

import numpy as np
import pytest
from PIL import Image
from skimage.transform import SimilarityTransform

from actionunits.alignment import FIVE_POINT_TEMPLATE, Alignment, five_point, identity, level_eyes
from actionunits.landmarks import mirror_landmarks, reduce_landmarks

ANGLES = [0, 20, -35, 100, 180]


def tilted_face(degrees=20.0, scale=1.0, shift=(130, 110)):
    """Five points of a face with width 60, turned about its middle."""
    face = np.array([[-30, -35], [31, -33], [2, 3], [-24, 36], [22, 38]]) * scale
    turn = np.deg2rad(degrees)
    return face @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]) + shift


def photo(width=260, height=220, mode="RGB", seed=0):
    """A smooth random picture."""
    small = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def naive_warp(pixels, matrix, size, fill):
    """Bilinear sampling with loops; `matrix` maps photo to aligned pixels, (2, 3)."""
    height, width = pixels.shape[:2]
    (a, b, c), (d, e, f) = matrix
    det = a * e - b * d
    out = np.empty((size[1], size[0], *pixels.shape[2:]))
    for v in range(size[1]):
        for u in range(size[0]):
            x = (e * (u - c) - b * (v - f)) / det
            y = (a * (v - f) - d * (u - c)) / det
            if not (-0.5 <= x < width - 0.5 and -0.5 <= y < height - 0.5):
                out[v, u] = fill
                continue
            left, top = math.floor(x), math.floor(y)
            out[v, u] = sum(
                (1 - abs(x - i))
                * (1 - abs(y - j))
                * pixels[min(max(j, 0), height - 1), min(max(i, 0), width - 1)]
                for i in (left, left + 1)
                for j in (top, top + 1)
            )
    return out


def naive_level_eyes(five, size):
    """JAA-Net's rule step by step: angle, rotation of each point, box, half side, scale."""
    (left, right), turned = five[:2], []
    angle = math.atan2(right[1] - left[1], right[0] - left[0])
    for x, y in five:
        turned.append((math.cos(angle) * x + math.sin(angle) * y, -math.sin(angle) * x + math.cos(angle) * y))
    xs, ys = [x for x, _ in turned], [y for _, y in turned]
    centre = ((min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2)
    half = 0.5 * 2.9 * max(max(xs) - min(xs), max(ys) - min(ys))
    scale = (size - 1) / 2 / half
    return np.array([[scale * (x - centre[0] + half), scale * (y - centre[1] + half)] for x, y in turned])


def umeyama(source, target):
    """(3, 3) similarity of least squares, by scikit-image."""
    if hasattr(SimilarityTransform, "from_estimate"):  # since 0.26
        return SimilarityTransform.from_estimate(source, target).params
    transform = SimilarityTransform()
    transform.estimate(source, target)
    return transform.params


def centroid(image):
    """(x, y) of a bright spot on black."""
    values = np.asarray(image, dtype=float)
    y, x = np.indices(values.shape)
    return np.array([(values * x).sum(), (values * y).sum()]) / values.sum()


def spot(width, height, x, y, sigma):
    """A Gaussian spot on black, mode "L"."""
    rows, columns = np.indices((height, width))
    values = 250 * np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * sigma**2))
    return Image.fromarray(np.round(values).astype(np.uint8))


@pytest.mark.parametrize("degrees", ANGLES)
@pytest.mark.parametrize("size", [200, 112])
def test_level_eyes_is_the_rule_of_the_papers(degrees, size):
    five = tilted_face(degrees)
    alignment = level_eyes(five, "five", size)
    aligned = alignment.transform(five)
    assert alignment.size == (size, size)
    np.testing.assert_allclose(aligned, naive_level_eyes(five, size), atol=1e-10)
    assert aligned[0, 1] == pytest.approx(aligned[1, 1]) and aligned[0, 0] < aligned[1, 0]
    # The box is centred, its larger side 1 / 2.9 of the picture.
    low, high = aligned.min(0), aligned.max(0)
    np.testing.assert_allclose((low + high) / 2, (size - 1) / 2)
    assert (high - low).max() == pytest.approx((size - 1) / 2.9)


@pytest.mark.parametrize("scheme", [49, 66, 68, 98, 478])
def test_larger_schemes_align_by_their_five_points(scheme):
    points = np.random.default_rng(scheme).uniform(0, 300, (scheme, 2))
    five = reduce_landmarks(points, scheme, "five")
    for align in (level_eyes, five_point):
        np.testing.assert_allclose(align(points).matrix, align(five, "five").matrix)


@pytest.mark.parametrize("degrees", ANGLES)
def test_five_point_is_the_similarity_of_umeyama(degrees):
    five = tilted_face(degrees)
    template = FIVE_POINT_TEMPLATE * 224 + 111.5
    np.testing.assert_allclose(five_point(five, "five", 224).matrix, umeyama(five, template)[:2], atol=1e-9)


def test_five_point_frames_the_mean_face_as_level_eyes_does():
    face = FIVE_POINT_TEMPLATE * 300 + 400
    np.testing.assert_allclose(five_point(face, 5, 200).transform(face), FIVE_POINT_TEMPLATE * 200 + 99.5)
    np.testing.assert_allclose(
        level_eyes(face, 5, 200).transform(face), FIVE_POINT_TEMPLATE * 200 + 99.5, atol=1
    )
    mirrored = FIVE_POINT_TEMPLATE[[1, 0, 2, 4, 3]] * [-1, 1]
    np.testing.assert_array_equal(FIVE_POINT_TEMPLATE, mirrored)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("degrees", [0, 20, 180])
def test_warp_against_loops(mode, degrees):
    image = photo(mode=mode)
    alignment = level_eyes(tilted_face(degrees, scale=1.2), "five", 90)
    warped = alignment.warp(image, fill=(10, 10, 10), antialias=False)
    assert warped.mode == mode and warped.size == (90, 90)
    expected = naive_warp(np.asarray(image, float), alignment.matrix, (90, 90), 10)
    difference = np.asarray(warped, float) - expected
    # Pillow cuts fractions off; a point on the very border may fall to either side.
    wrong = (difference > 1e-6) | (difference <= -1 - 1e-6)
    assert wrong.sum() <= 3
    assert 0 < (expected == 10).mean() < 0.5


def test_outside_of_the_photo_is_filled():
    corner = identity((20, 10)).crop(-5, -5, 40, 30).warp(photo(20, 10), fill=(1, 2, 3))
    pixels = np.asarray(corner)
    np.testing.assert_array_equal(pixels[5:15, 5:25], np.asarray(photo(20, 10)))
    pixels = pixels.copy()
    pixels[5:15, 5:25] = [1, 2, 3]
    assert (pixels == [1, 2, 3]).all()
    assert np.asarray(identity((9, 9)).crop(20, 0, 2, 2).warp(photo(9, 9, "L"))).tolist() == [[128, 128]] * 2


def test_identity_is_bit_exact():
    image = photo()
    assert np.array_equal(np.asarray(identity(image.size).warp(image)), np.asarray(image))


@pytest.mark.parametrize("degrees", [0, 20, 180])
def test_a_spot_lands_where_transform_says(degrees):
    five = tilted_face(degrees)
    alignment = level_eyes(five, "five", 200)
    for point in five[[0, 2, 4]]:
        warped = alignment.warp(spot(260, 220, *point, sigma=3), fill=(0, 0, 0))
        np.testing.assert_allclose(centroid(warped), alignment.transform(point), atol=0.1)


@pytest.mark.parametrize("factor", [2.0, 5.3, 16.9])
def test_a_spot_lands_there_from_a_large_photo(factor):
    """With antialiasing, blocks of up to 16 x 16 pixels are averaged first."""
    scale = factor / 90 * 70
    five = tilted_face(20, scale, shift=np.array([101, 103]) * scale * 1.2)
    alignment = level_eyes(five, "five", 70)
    width, height = np.ceil(np.array([203, 197]) * scale * 1.2).astype(int)
    for point in five[[0, 3]]:
        image = spot(width, height, *point, sigma=3 * factor)
        warped = alignment.warp(image, fill=(0, 0, 0))
        np.testing.assert_allclose(centroid(warped), alignment.transform(point), atol=0.1)


def test_antialias_averages():
    """A fine checkerboard becomes grey, and a photo less than twice as large is left as it is."""
    board = Image.fromarray((np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8))
    grey = np.asarray(identity((256, 256), (32, 32)).warp(board), float)
    assert abs(grey - 127.5).max() <= 1
    assert np.ptp(np.asarray(identity((256, 256)).crop(0.1, 0, 200, 200).warp(board), float)) > 200
    mild = identity((256, 256), (136, 136))
    assert np.array_equal(np.asarray(mild.warp(board)), np.asarray(mild.warp(board, antialias=False)))


def test_block_average_of_a_whole_factor():
    image = photo(64, 48, "L")
    means = np.asarray(image, float).reshape(12, 4, 16, 4).mean((1, 3))
    warped = np.asarray(identity((64, 48), (16, 12)).warp(image), float)
    assert abs(warped - means).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "I;16", "F", "P"])
def test_warp_refuses_other_modes(mode):
    with pytest.raises(ValueError, match=f"mode 'L' or 'RGB', got '{mode}'"):
        identity((4, 4)).warp(Image.new(mode, (4, 4)))


def test_points_go_there_and_back():
    alignment = level_eyes(tilted_face(33), "five").crop(12, 7, 176, 170).resize(112, 90).flip()
    points = np.random.default_rng(0).uniform(-50, 300, (3, 7, 2))
    np.testing.assert_allclose(alignment.inverse_transform(alignment.transform(points)), points, atol=1e-10)
    np.testing.assert_allclose(
        np.vstack([alignment.matrix, [0, 0, 1]]) @ np.vstack([alignment.inverse_matrix, [0, 0, 1]]),
        np.eye(3),
        atol=1e-12,
    )


def test_composition_of_points_is_step_by_step():
    start = level_eyes(tilted_face(15), "five", 200)
    points = np.random.default_rng(0).uniform(0, 250, (9, 2))
    x, y = start.transform(points).T
    x, y = x - 12, y - 5.5
    x, y = (x + 0.5) * 112 / 176 - 0.5, (y + 0.5) * 56 / 176 - 0.5
    x = 111 - x
    composed = start.crop(12, 5.5, 176, 176).resize(112, 56).flip()
    assert composed.size == (112, 56)
    np.testing.assert_allclose(composed.transform(points), np.stack([x, y], 1))
    assert start.size == (200, 200)


def test_composition_of_pictures_is_step_by_step():
    image = photo()
    start = level_eyes(tilted_face(15, 1.3), "five", 200)
    crop = start.crop(12, 20, 176, 160)
    in_steps = start.warp(image).crop((12, 20, 188, 180))
    np.testing.assert_allclose(np.asarray(crop.warp(image), int), np.asarray(in_steps, int), atol=1)
    flipped = in_steps.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    np.testing.assert_allclose(np.asarray(crop.flip().warp(image), int), np.asarray(flipped, int), atol=1)
    small = np.asarray(identity((176, 160), (88, 80)).warp(in_steps), float)
    once = np.asarray(crop.resize(88, 80).warp(image, antialias=False), float)
    assert abs(once - small)[1:-1, 1:-1].mean() < 3


@pytest.mark.parametrize("align", [level_eyes, five_point])
def test_a_mirrored_photo_gives_the_mirrored_picture(align):
    image = photo()
    points = np.random.default_rng(1).normal(0, 3, (68, 2)) + 120
    points[36:42], points[42:48], points[30] = [90, 80], [150, 90], [118, 115]
    points[48], points[54] = [90, 150], [140, 152]
    straight = align(points, "ibug68", 100)
    mirrored = align(mirror_landmarks(points, "ibug68", image.width), "ibug68", 100)
    a = np.asarray(straight.flip().warp(image), int)
    b = np.asarray(mirrored.warp(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)), int)
    np.testing.assert_allclose(a, b, atol=1)
    np.testing.assert_allclose(
        mirror_landmarks(straight.transform(points), 68, 100),
        mirrored.transform(mirror_landmarks(points, 68, image.width)),
        atol=1e-9,
    )


def test_warp_back_against_loops():
    alignment = level_eyes(tilted_face(20, 0.4, shift=(40, 35)), "five", 60)
    values = np.random.default_rng(0).uniform(-2, 5, (60, 60))
    back = alignment.warp_back(values, (90, 70))
    assert back.shape == (70, 90) and back.dtype == np.float32
    expected = naive_warp(values, alignment.inverse_matrix, (90, 70), 0)
    np.testing.assert_allclose(back, expected, atol=1e-4)
    assert 0.1 < (expected == 0).mean() < 0.9


def test_maps_go_there_and_back():
    """A spot on the photo, aligned, and drawn back, is where it was."""
    five = tilted_face(20)
    alignment = level_eyes(five, "five", 200)
    aligned = alignment.warp(spot(260, 220, *five[2], sigma=4), fill=(0, 0, 0))
    back = alignment.warp_back(np.asarray(aligned), (260, 220))
    np.testing.assert_allclose(centroid(back), five[2], atol=0.1)
    assert back.max() == pytest.approx(250, abs=8)


def test_a_coarse_map_goes_back_by_resize():
    """Cell (1, 2) of a 4 x 4 map over 200 pixels has its middle at (124.5, 74.5)."""
    alignment = level_eyes(tilted_face(20), "five", 200)
    cells = np.zeros((4, 4))
    cells[1, 2] = 1
    back = alignment.resize(4, 4).warp_back(cells, (260, 220))
    np.testing.assert_allclose(centroid(back), alignment.inverse_transform([124.5, 74.5]), atol=0.1)
    with pytest.raises(
        ValueError, match=r"shape \(4, 4\), the aligned picture \(height, width\) \(200, 200\)"
    ):
        alignment.warp_back(cells, (260, 220))


@pytest.mark.parametrize("align", [level_eyes, five_point])
def test_degenerate_landmarks(align):
    relative = tilted_face() / 1000
    same_eyes = tilted_face()
    same_eyes[1] = same_eyes[0]
    for points in (np.full((5, 2), 30.0), np.full((68, 2), 30.0), relative, same_eyes):
        with pytest.raises(ValueError, match="eye centres lie .* pixels apart.*pass landmarks in pixels"):
            align(points)
    with pytest.raises(ValueError, match="landmark 0 is"):
        align(np.full((68, 2), np.nan))
    with pytest.raises(ValueError, match="'five' has 5 landmarks, got 68"):
        align(np.zeros((68, 2)), "five")


@pytest.mark.parametrize(
    ("matrix", "size", "message"),
    [
        (np.eye(3), (9, 9), r"\(2, 3\) matrix"),
        ([[1, 0, 0], [2, 0, 0]], (9, 9), "invertible"),
        ([[1, 0, np.nan], [0, 1, 0]], (9, 9), "numbers"),
        ([[1, 0, 0], [0, 1, 0]], (9, 0), r"size \(width, height\).*got \(9, 0\)"),
    ],
)
def test_impossible_alignments(matrix, size, message):
    with pytest.raises(ValueError, match=message):
        Alignment(np.asarray(matrix), size)


def test_alignments_never_change():
    matrix = np.array([[1.0, 0, 0], [0, 1, 0]])
    alignment = Alignment(matrix, (9, 9))
    matrix[0, 2] = 5
    assert alignment.matrix[0, 2] == 0
    with pytest.raises(ValueError, match="read-only"):
        alignment.matrix[0, 2] = 5
