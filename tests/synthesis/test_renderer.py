import dataclasses
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from actionunits.landmarks import SCHEMES
from actionunits.synthesis import renderer
from actionunits.synthesis.fitting import Camera
from actionunits.synthesis.head_model import EYE, LANDMARK_VERTICES, SKIN, TEETH
from actionunits.synthesis.person import (
    FACE_WIDTH,
    TEMPLATE_POINTS,
    Person,
    _crop_to_head,
    _vertex_colors,
    _warp_to_points,
    _without_background,
    read_people,
    read_template,
)
from actionunits.synthesis.rasterizer import vertex_normals
from actionunits.synthesis.renderer import TEETH_COLOR, _eyes, highlight, render, shading
from actionunits.synthesis.sampling import Light, neutral_scene
from actionunits.synthesis.wrinkles import WRINKLED_AUS, wrinkle_maps

from .conftest import mean_face

WALL = np.full((4, 4, 3), 0.2, np.float32)


@pytest.fixture(scope="module")
def person(head, photo_folder) -> Person:
    return Person.of_photograph(head, **read_people(photo_folder)[0])


def spot(height: int, width: int, at, sigma: float) -> np.ndarray:
    """A bright spot (height, width), 0 to 1, at a pixel (x, y)."""
    y, x = np.mgrid[:height, :width]
    return np.exp(-((x - at[0]) ** 2 + (y - at[1]) ** 2) / (2 * sigma**2))


def centroid(picture: np.ndarray) -> np.ndarray:
    """(x, y) of the middle of the brightness of (H, W)."""
    y, x = np.mgrid[: picture.shape[0], : picture.shape[1]]
    return np.array([(x * picture).sum(), (y * picture).sum()]) / picture.sum()


def draw(head, person, **changes):
    action_units = changes.pop("action_units", {})
    scene = dataclasses.replace(neutral_scene(head, action_units, size=96), **changes)
    return render(head, scene, person, person, WALL)


def test_people_are_listed_with_their_table_rows(photo_folder):
    people = read_people(photo_folder)
    assert [row["name"] for row in people] == [
        *(f"london/00{i}_03" for i in (1, 2, 3, 4)),
        *("canada/7f", "canada/8m"),
    ]
    assert all(row["sex"] == "female" and row["age"] == 30 for row in people)
    with pytest.raises(FileNotFoundError, match="nobody"):
        read_people(photo_folder, sets=("nobody",))


def test_a_folder_without_the_table_of_people_is_named(photo_folder, tmp_path):
    for folder, found in (("london_neutral", r"\['001_03.jpg', "), ("nowhere", "no folder")):
        with pytest.raises(FileNotFoundError, match=rf"{folder} has no people.csv .* but {found}"):
            read_people(photo_folder / folder)
    (tmp_path / "london_neutral").symlink_to(photo_folder / "london_neutral")
    with pytest.raises(FileNotFoundError, match="with the header alone"):
        read_people(tmp_path, sets=("london_neutral",))
    (tmp_path / "people.csv").write_text("set,person,age,gender,ethnicity\n")
    people = read_people(tmp_path, sets=("london_neutral",))
    assert [(row["sex"], row["age"], row["ethnicity"]) for row in people] == [("", 0.0, "")] * 4


def test_the_table_of_people_may_come_from_a_spreadsheet_but_must_name_them(photo_folder, tmp_path):
    (tmp_path / "london_neutral").symlink_to(photo_folder / "london_neutral")
    table, header = tmp_path / "people.csv", "set,person,age,gender,ethnicity"
    table.write_text(f"{header}\nlondon,003,41.5,male\nlondon,001,NA,female,white\n", encoding="utf-8-sig")
    people = read_people(tmp_path, sets=("london_neutral",))
    facts = [(row["sex"], row["age"], row["ethnicity"]) for row in people]
    assert facts == [("female", 0.0, "white"), ("", 0.0, ""), ("male", 41.5, ""), ("", 0.0, "")]
    table.write_text(f"{header}\n".replace(",", ";"))
    with pytest.raises(ValueError, match=r"people.csv has no column person, set; .* but is 'set;person"):
        read_people(tmp_path, sets=("london_neutral",))
    table.write_bytes(b"set,person,ethnicity\nlondon,001,\xff\n")
    with pytest.raises(ValueError, match="people.csv is not a text file"):
        read_people(tmp_path, sets=("london_neutral",))


def test_template_gives_the_points_it_was_made_of(photo_folder):
    points = read_template(photo_folder / "london_neutral" / "001_03.tem")
    expected = mean_face() * [150, 160] + [300, 320]
    error = np.linalg.norm(points - expected, axis=1)
    uses = Counter(source for sources in TEMPLATE_POINTS.values() for source in sources)
    alone = [i for i, sources in TEMPLATE_POINTS.items() if all(uses[s] == 1 for s in sources)]
    assert len(alone) > 30
    assert error[alone].max() < 0.01
    assert error[:17].max() < 8  # resampled along the contour


def test_a_template_of_another_kind_is_refused(tmp_path):
    (tmp_path / "x.tem").write_text("3\n1 2\n3 4\n5 6\n")
    with pytest.raises(ValueError, match="3 points"):
        read_template(tmp_path / "x.tem")


def test_cropping_keeps_the_points_on_the_photograph(tmp_path):
    points = mean_face() * 0.25 * FACE_WIDTH + [300.3, 320.6]
    for i in (36, 54):
        image = np.repeat((255 * spot(650, 600, points[i], 6)).astype(np.uint8)[..., None], 3, -1)
        Image.fromarray(image).save(tmp_path / "spot.png")
        photo, moved = _crop_to_head(tmp_path / "spot.png", points)
        assert np.ptp(moved[:17, 0]) == pytest.approx(FACE_WIDTH)
        np.testing.assert_allclose(centroid(photo[..., 0].astype(float)), moved[i], atol=0.1)


def test_the_texture_has_the_points_where_the_photograph_has_them(head):
    """The outline less so, since it is no place on the skin; the eyes and what is far away not at all."""
    drawn = dataclasses.replace(
        head,
        triangles=np.concatenate([np.resize(LANDMARK_VERTICES, (23, 3)), head.triangles]),
        surface=np.r_[np.full(23, SKIN), head.surface],
    )
    projected = Camera(np.eye(3), np.array([150.0, 150.0]), 15.0).project(head.vertices)[:, :2]
    offset = np.array([6.0, -4.0])
    texture = _warp_to_points(projected, projected[LANDMARK_VERTICES] + offset, drawn)
    moved = texture - projected
    np.testing.assert_allclose(moved[LANDMARK_VERTICES[17:]], np.tile(offset, (51, 1)), atol=0.4)
    np.testing.assert_allclose(moved[LANDMARK_VERTICES[:17]], np.tile(0.3 * offset, (17, 1)), atol=0.4)
    eyes, corner = (np.unique(head.triangles[head.surface == code]) for code in (EYE, SKIN))
    np.testing.assert_allclose(moved[eyes], 0, atol=1e-4)
    np.testing.assert_allclose(moved[corner[0]], 0, atol=0.1)


def test_a_tinted_wall_is_balanced_and_is_not_the_person():
    points = mean_face() * [100, 110] + [180, 200]
    across = np.linspace(0.9, 1.1, 360)[None, :, None]  # the wall is not lit evenly
    photo = np.broadcast_to(across * np.array([150.0, 170.0, 190.0]), (420, 360, 3)).astype(np.uint8)
    photo[100:, 60:300] = (120, 80, 60)
    balanced, silhouette = _without_background(photo, points)
    wall = balanced[:80].reshape(-1, 3).mean(0)
    np.testing.assert_allclose(wall, wall.mean(), atol=1)
    ratios = balanced[200, 180] / photo[200, 180]
    np.testing.assert_allclose(ratios, 170 / np.array([150, 170, 190]), rtol=0.02)
    assert silhouette[110:, 70:290].min() > 250 and silhouette[:90].max() < 5
    assert max(silhouette[:, :50].max(), silhouette[:, 310:].max()) < 5


def test_vertices_that_the_photograph_hides_take_the_colour_of_the_nearest_at_their_height():
    photo = np.zeros((100, 100, 3), np.uint8)
    photo[:50], photo[50:] = (255, 0, 0), (0, 0, 255)
    vertices = np.array([[0, 3, 1], [0, -3, 1], [2, 2, -4], [2, -2, -4], [0, 9, 1]], np.float64)
    texture = np.array([[50, 20], [50, 80], [50, 80], [50, 20], [50, -20]], np.float32)
    normals = np.array([[0, 0, 1], [0, 0, 1], [0, 0, -1], [0, 0, 0.3], [0, 0, 1]], np.float32)
    colors = _vertex_colors(photo, np.full((100, 100), 255, np.uint8), texture, normals, vertices)
    np.testing.assert_allclose(colors, np.array([[1, 0, 0], [0, 0, 1]])[[0, 1, 0, 1, 0]], atol=1e-3)


def test_silhouette_is_the_person(person):
    height, width = person.silhouette.shape
    assert person.silhouette[height // 2, width // 2] == 255
    assert person.silhouette[2, 2] == 0


def test_landmarks_lie_on_the_drawn_face_where_the_frame_says(head, person):
    drawn = draw(head, person)
    low, high = drawn.landmarks.min(0), drawn.landmarks.max(0)
    assert (high - low).max() == pytest.approx(0.62 * 96, abs=1.0)
    np.testing.assert_allclose((low + high) / 2, 47.5, atol=1.0)
    shifted = draw(head, person, shift=(0.1, -0.05))
    np.testing.assert_allclose(shifted.landmarks - drawn.landmarks, [[9.6, -4.8]] * 68, atol=0.1)


def test_what_is_drawn_at_a_point_is_what_the_photograph_shows_there(head, person, monkeypatch):
    """To a fraction of a pixel: the landmarks are labels. Shading is divided out."""
    camera, (height, width) = person.camera, person.photo.shape[:2]
    texture = camera.project(head.vertices)[:, :2].astype(np.float32)
    plain = dataclasses.replace(
        person,
        vertices=head.vertices,
        texture=texture,
        normals=vertex_normals(head.vertices, head.triangles) @ camera.rotation.T.astype(np.float32),
        hidden_color=np.zeros_like(person.hidden_color),
    )
    skin = np.unique(head.triangles[head.surface == SKIN])
    still = {"expression": np.zeros(len(head.expression_names), np.float32), "shine": 0.0}
    for place in ([-3, -2], [3.5, -1.5], [0.5, 3]):  # on the cheeks and the brow
        vertex = skin[np.linalg.norm(head.vertices[skin, :2] - place, axis=1).argmin()]
        monkeypatch.setattr(renderer, "LANDMARK_VERTICES", np.r_[vertex, LANDMARK_VERTICES[1:]])
        photos = np.ones((height, width)), spot(height, width, texture[vertex], 6)
        white, spotted = (
            draw(head, dataclasses.replace(plain, photo=np.uint8(255 * p[..., None].repeat(3, -1))), **still)
            for p in photos
        )
        shown = spotted.image.mean(-1) / np.maximum(white.image.mean(-1), 0.05)
        shown *= spot(96, 96, spotted.landmarks[0], 3) > 0.05  # not the eyes and teeth, which are drawn
        np.testing.assert_allclose(centroid(shown), spotted.landmarks[0], atol=0.03)


def test_rendering_repeats_itself_and_is_linear_light(head, person):
    first, second = draw(head, person), draw(head, person)
    np.testing.assert_array_equal(first.image, second.image)
    assert first.image.shape == (96, 96, 3) and np.isfinite(first.image).all() and first.image.min() >= 0


def test_action_units_and_wrinkles_change_the_face_and_not_the_wall(head, person):
    neutral, raised = draw(head, person), draw(head, person, action_units={4: 1.0, 17: 1.0})
    assert np.abs(neutral.image - raised.image).max() > 0.05
    folded = draw(head, person, wrinkles=np.ones(len(WRINKLED_AUS), np.float32))
    difference = np.abs(folded.image - neutral.image).max(-1)
    assert difference.max() > 0.02
    assert difference[:4, :4].max() == 0
    at_rest = draw(head, person, expression=np.zeros(len(head.expression_names), np.float32))
    assert at_rest.lip_gap == 0


def test_lips_that_cover_each_other_are_not_apart(head, person):
    """The lower lip moved up or down by hand: the gap has a sign, so a raised chin does not part the lips."""
    gaps = []
    for drop in (0.4, 0.0, -0.4):
        shapes = np.zeros((1, *head.vertices.shape), np.float32)
        shapes[0, LANDMARK_VERTICES[66], 1] = -1.0
        moved = dataclasses.replace(head, expression_shapes=shapes, expression_names=("lowerLipDown",))
        scene = dataclasses.replace(neutral_scene(head, {}, size=96), expression=np.array([drop], np.float32))
        gaps.append(render(moved, scene, person, person, WALL).lip_gap)
    np.testing.assert_allclose(gaps, [0.4, 0.0, -0.4], atol=1e-5)


def test_a_turned_head_turns(head, person):
    turned = draw(head, person, yaw=0.5)
    nose = turned.landmarks[30, 0] - turned.landmarks[[36, 45], 0].mean()
    straight = draw(head, person).landmarks
    assert nose > straight[30, 0] - straight[[36, 45], 0].mean() + 3


def test_light_from_the_right_lights_the_right(head, person):
    lights = [Light((x, 0.0, 0.4), (1.0, 1.0, 1.0), (0.1, 0.1, 0.1)) for x in (-1.0, 1.0)]
    left, right = (draw(head, person, light=light).image.mean(-1) for light in lights)
    cheek = slice(45, 60)
    assert right[cheek, 62:70].mean() > left[cheek, 62:70].mean()
    assert right[cheek, 26:34].mean() < left[cheek, 26:34].mean()


def test_shading_is_ambient_plus_lambert():
    light = Light((0.0, 0.0, 2.0), (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))
    toward, away = shading(np.array([[[0.0, 0.0, 1.0]], [[0.0, 0.0, -1.0]]], np.float32), light)
    np.testing.assert_allclose(toward[0], 0.85 * 0.2 + np.array([0.5, 0.4, 0.3]), rtol=1e-6)
    np.testing.assert_allclose(away[0], 0.85 * 0.2, rtol=1e-6)


def test_eyes_follow_the_gaze(head, person):
    assert (head.surface == EYE).sum() == 2
    ahead, aside = draw(head, person), draw(head, person, gaze=(0.6, 0.0))
    assert np.abs(ahead.image - aside.image).max() > 0


def test_the_pupil_is_where_the_eye_looks(head):
    yaw, pitch = np.meshgrid(np.linspace(-0.8, 0.8, 33), np.linspace(-0.8, 0.8, 33))
    direction = np.stack([np.sin(yaw) * np.cos(pitch), np.sin(pitch), np.cos(yaw) * np.cos(pitch)], -1)
    sideways = np.broadcast_to(np.array([1.0, 0.0, 0.0]), direction.shape)  # no highlight
    for gaze in ((0.4, 0.0), (-0.3, 0.2), (0.0, -0.4)):
        scene = dataclasses.replace(neutral_scene(head, {}), gaze=gaze)
        eye = _eyes(3 * direction, sideways, np.ones_like(direction), scene).mean(-1)
        pupil = eye < 0.02
        assert pupil.any()
        assert (yaw[pupil].mean(), pitch[pupil].mean()) == pytest.approx(gaze, abs=0.03)


# Where FACS looks for the folds of an action unit, between points of the subject's right side.
FOLDED = {
    **{1: (19, 22), 2: (18, 21), 4: (21, 27), 6: (0, 41), 7: (36, 39), 9: (39, 33)},
    **{10: (31, 48), 12: (31, 48, 3), 14: (3, 48), 15: (48, 6), 17: (57, 8), 20: (4, 48), 24: (48, 57)},
}


@pytest.mark.parametrize("au", WRINKLED_AUS)
def test_folds_lie_where_facs_looks_for_them(au):
    points = mean_face() * 100 + [200, 150]
    fold = wrinkle_maps(points, 320, 400)[WRINKLED_AUS.index(au)].astype(float)
    dark = np.clip(-fold, 0, None) * (np.arange(200) < 100)
    x, y = 2 * centroid(dark * (dark > 0.5 * dark.max()))
    middle = points[list(FOLDED[au])].mean(0)
    unit = points[42, 0] - points[39, 0]
    above = 0.55 * unit * (au in (1, 2))  # on the forehead, above the brows
    np.testing.assert_allclose([x, y], middle - [0, above], atol=0.35 * unit)


def test_wrinkles_are_symmetric_on_a_symmetric_face():
    points = mean_face() * 100 + [200, 150]
    assert np.allclose(points[list(SCHEMES["ibug68"].mirror)] * [-1, 1] + [400, 0], points)
    maps = wrinkle_maps(points, 320, 400).astype(int)
    assert maps.shape == (len(WRINKLED_AUS), 160, 200)
    assert (np.abs(maps).max((1, 2)) > 5).all()
    rounding = np.abs(maps - np.roll(maps[:, :, ::-1], 1, axis=2))
    assert np.quantile(rounding, 0.99) <= 6


def test_a_darker_complexion_darkens_the_skin_and_leaves_geometry(head, person):
    as_photographed = draw(head, person)
    darker = draw(head, person, skin=(1.6, 1.0, 1.0, 1.0))
    nose = tuple(np.round(as_photographed.landmarks[30]).astype(int)[::-1])
    assert (darker.image[nose] < 0.9 * as_photographed.image[nose]).all()
    np.testing.assert_array_equal(darker.landmarks, as_photographed.landmarks)


def test_teeth_have_their_own_colour_and_darken_towards_the_throat(head, person):
    bared = dataclasses.replace(head, surface=np.where(head.surface == SKIN, TEETH, head.surface))
    light = Light((0.0, 0.0, 1.0), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    plain = dataclasses.replace(person, vertices=head.vertices)
    still = {"expression": np.zeros(len(head.expression_names), np.float32), "light": light}
    picture, brighter = (draw(bared, plain, teeth=teeth, **still) for teeth in (0.8, 1.0))
    x, y = np.round(picture.landmarks[30]).astype(int)
    from_nose_to_rim = picture.image[y, x : x + 28] / (0.8 * TEETH_COLOR)
    np.testing.assert_allclose(from_nose_to_rim[0], 0.85, atol=0.05)  # in front of the lips: as lit
    assert (np.diff(from_nose_to_rim, axis=0) < 0.01).all() and from_nose_to_rim[-1].max() < 0.7
    np.testing.assert_allclose(brighter.image[y, x] / picture.image[y, x], 1.25, rtol=1e-4)


def test_highlight_is_brightest_half_way_between_light_and_camera():
    light = Light((0.0, 1.0, 0.0), (2.0, 1.0, 0.5), (0, 0, 0))
    angles = np.radians(np.arange(0, 91, 5))
    normals = np.stack([0 * angles, np.sin(angles), np.cos(angles)], -1)[None].astype(np.float32)
    shine = highlight(normals, light, sharpness=12)[0]
    assert np.argmax(shine[:, 0]) == 9  # 45 degrees
    np.testing.assert_allclose(shine[9], [2.0, 1.0, 0.5], rtol=1e-5)
    np.testing.assert_allclose(shine[0, 0], 2 * np.cos(np.pi / 4) ** 12, rtol=1e-4)
