import numpy as np
import pytest
from PIL import Image

from actionunits.action_units import ACTION_UNITS, CORPUS_AUS, au_label
from actionunits.alignment import level_eyes
from actionunits.visualization import ACTIVE, FACE_COLORS, INACTIVE, draw_faces, draw_frame, draw_maps


def answer(landmarks, aus=CORPUS_AUS["bp4d"], scores=None, **more):
    """One face as the pipeline answers it; an action unit is active from 0.5 on."""
    scores = np.linspace(0.05, 0.95, len(aus)) if scores is None else scores
    low, high = landmarks.min(0), landmarks.max(0)
    return {
        "box": dict(zip(("xmin", "ymin", "xmax", "ymax"), [*low, *high], strict=True)),
        "confidence": 0.97,
        "landmarks": landmarks.tolist(),
        "landmark_scheme": "ibug68",
        "action_units": [
            {
                "label": au_label(au),
                "name": ACTION_UNITS[au].name,
                "score": float(s),
                "active": bool(s >= 0.5),
            }
            for au, s in zip(aus, scores, strict=True)
        ],
        **more,
    }


def count(picture, color, tolerance=12):
    return int((np.abs(np.asarray(picture, dtype=int) - color).max(axis=-1) <= tolerance).sum())


def panel(picture, photo_width):
    return picture.crop((photo_width, 0, *picture.size))


def test_the_photo_keeps_its_shape_and_gets_marks_at_the_landmarks(photo, landmarks):
    drawn = draw_faces(photo, [answer(landmarks)])
    left = drawn.crop((0, 0, 720, 720))
    assert drawn.height == 720 and drawn.width > 720  # small photos are enlarged
    difference = np.abs(
        np.asarray(left, dtype=int) - np.asarray(photo.resize((720, 720), Image.Resampling.LANCZOS))
    ).max(-1)
    assert (difference[:, 640:] < 40).all()  # nothing is drawn off the face
    for x, y in (landmarks + 0.5) * 720 / 200:
        around = difference[round(y) - 3 : round(y) + 4, round(x) - 3 : round(x) + 4]
        assert around.max() > 40
    assert count(left, FACE_COLORS[0]) > 500


def test_bars_are_as_long_as_scores_and_coloured_by_decision(photo, landmarks):
    def bar(score):
        bars = draw_faces(photo, [answer(landmarks, [12], [score])]).crop((720 + 262, 188, 1213, 720))
        return count(bars, ACTIVE), count(bars, INACTIVE)

    empty, half, full = bar(0.0), bar(0.499), bar(1.0)
    assert empty[0] == half[0] == 0 and full[1] == 0
    assert half[1] == pytest.approx(full[0] / 2, rel=0.25)  # the active one's letters are coloured too
    assert empty[1] < half[1] / 5


def test_thresholds_are_marked(photo, landmarks):
    face = answer(landmarks, [12, 25], [0.1, 0.2])
    plain = draw_faces(photo, [face])
    same = draw_faces(photo, [face], 0.5)
    one = draw_faces(photo, [face], {"AU12": 0.8})
    changed, both = (np.argwhere((np.asarray(d) != np.asarray(plain)).any(-1)) for d in (one, same))
    assert len(both) > 1.4 * len(changed) > 50
    assert np.ptp(changed[:, 1]) < 6  # one upright line
    assert changed[:, 1].mean() - 720 == pytest.approx((15.5 + 0.8 * 9.5) * 17, abs=2)  # at 0.8 of the bar


@pytest.mark.parametrize("size", [(24, 24), (150, 100), (3000, 300), (200, 1500), (5000, 4000)])
def test_any_size_is_readable(photo, landmarks, size):
    scale = np.array(size) / 200
    drawn = draw_faces(photo.resize(size), [answer(landmarks * scale)])
    assert 300 < drawn.height <= 1600 and drawn.width < 3200
    assert count(panel(drawn, drawn.width - 420), ACTIVE) > 1000


@pytest.mark.parametrize("size", [(24, 100_000), (100_000, 24)])
def test_a_strip_of_a_picture_is_drawn_as_a_line(size):
    drawn = draw_faces(Image.new("L", size), [])
    assert max(drawn.size) >= 1600 and min(drawn.size) >= 60  # with "No face found" beside it


def test_a_box_far_beyond_the_picture_costs_nothing(photo, landmarks):
    wide = answer(landmarks)
    wide["box"] = {"xmin": -9000.0, "ymin": -9000.0, "xmax": 30000.0, "ymax": 30000.0}
    assert draw_faces(photo, [wide]).size == draw_faces(photo, [answer(landmarks)]).size


def test_a_panel_for_each_face(photo, landmarks):
    widths, colors = [], []
    for n in (0, 1, 2, 7):
        drawn = draw_faces(photo, [answer(landmarks)] * n)
        widths.append(drawn.width)
        colors.append([count(panel(drawn, 720), color) > 200 for color in FACE_COLORS])
    assert widths[0] == widths[1] < widths[2] < widths[3]
    assert [sum(row) for row in colors] == [0, 1, 2, 5]


def test_the_photo_given_is_left_alone(photo, landmarks):
    before = photo.copy()
    draw_faces(photo, [answer(landmarks)])
    assert photo.tobytes() == before.tobytes()


def test_a_frame_has_its_numbered_faces_and_the_bars_of_the_lowest_number(photo, landmarks):
    """Drawn 480 pixels high, whoever is in it; a face keeps its colour while others come and go."""
    first, second = (answer(landmarks, [12], [score], face_id=i) for i, score in enumerate((0.9, 0.1)))
    second["box"] = {"xmin": 19.5, "ymin": 9.5, "xmax": 119.5, "ymax": 99.5}
    both, one, nobody = (draw_frame(photo, faces, {"AU12": 0.5}) for faces in ([second, first], [first], []))
    assert both.size == one.size == nobody.size and both.height == 480
    assert panel(both, 480).tobytes() == panel(one, 480).tobytes() != panel(nobody, 480).tobytes()
    both, one, nobody = (drawn.crop((0, 0, 480, 480)) for drawn in (both, one, nobody))
    np.testing.assert_array_equal(nobody, photo.resize((960, 960), Image.Resampling.BICUBIC).reduce(2))
    assert count(one, FACE_COLORS[-1]) > 500 and count(one, FACE_COLORS[0]) == 0
    lines = (
        np.abs(np.asarray(both, dtype=int)[160] - FACE_COLORS[0]).max(-1) < 12
    )  # left and right of the box
    assert count(both.crop((48, 0, 104, 22)), FACE_COLORS[0]) > 500  # the number above the box
    assert np.flatnonzero(lines)[[0, -1]] + [0, 1] == pytest.approx([20 * 2.4, 120 * 2.4], abs=1)


def test_maps_are_hot_where_the_attention_is(photo, landmarks):
    aus = [1, 12, 26]
    alignment = level_eyes(landmarks, "ibug68", 200).resize(7, 7)
    maps = {au_label(au): np.zeros((7, 7), np.float32) for au in aus}
    maps["AU1"][1, 1] = 1e-3  # stretched to its own maximum
    maps["AU12"][5, 5] = 0.9
    drawn = draw_maps(photo, answer(landmarks, aus, maps=maps, alignment=alignment), columns=2)
    assert drawn.width < drawn.height  # two rows of two
    tiles = [
        drawn.crop((15 + 235 * (i % 2), 15 + 265 * (i // 2), 235 + 235 * (i % 2), 235 + 265 * (i // 2)))
        for i in range(3)
    ]
    for tile, (row, column) in zip(tiles, [(1, 1), (5, 5)], strict=False):
        red, _, blue = np.asarray(tile, dtype=float).transpose(2, 0, 1)
        y, x = np.unravel_index((red - blue).argmax(), red.shape)
        assert abs(y / 220 * 7 - 0.5 - row) < 0.9 and abs(x / 220 * 7 - 0.5 - column) < 0.9
    red, _, blue = np.asarray(tiles[2], dtype=float).transpose(2, 0, 1)
    assert (red - blue).max() < 15  # an empty map has no heat


def test_maps_must_be_there(photo, landmarks):
    with pytest.raises(ValueError, match="return_maps=True"):
        draw_maps(photo, answer(landmarks))
