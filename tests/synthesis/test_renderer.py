import dataclasses
from collections import Counter

import numpy as np
import pytest

from actionunits.landmarks import SCHEMES
from actionunits.synthesis.head_model import EYE, LANDMARK_VERTICES
from actionunits.synthesis.person import TEMPLATE_POINTS, Person, read_people, read_template
from actionunits.synthesis.renderer import highlight, render, shading
from actionunits.synthesis.sampling import Light, neutral_scene
from actionunits.synthesis.wrinkles import WRINKLED_AUS, wrinkle_maps

from .conftest import mean_face

WALL = np.full((4, 4, 3), 0.2, np.float32)


@pytest.fixture(scope="module")
def person(head, photo_folder) -> Person:
    return Person.of_photograph(head, **read_people(photo_folder)[0])


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


def test_silhouette_is_the_person(person):
    height, width = person.silhouette.shape
    assert person.silhouette[height // 2, width // 2] == 255
    assert person.silhouette[2, 2] == 0


def test_landmarks_lie_on_the_drawn_face_where_the_frame_says(head, person):
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


    drawn = draw(head, person)
    low, high = drawn.landmarks.min(0), drawn.landmarks.max(0)
    assert (high - low).max() == pytest.approx(0.62 * 96, abs=1.0)
    np.testing.assert_allclose((low + high) / 2, 47.5, atol=1.0)
    shifted = draw(head, person, shift=(0.1, -0.05))
    np.testing.assert_allclose(shifted.landmarks - drawn.landmarks, [[9.6, -4.8]] * 68, atol=0.1)


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


def test_highlight_is_brightest_half_way_between_light_and_camera():
    light = Light((0.0, 1.0, 0.0), (2.0, 1.0, 0.5), (0, 0, 0))
    angles = np.radians(np.arange(0, 91, 5))
    normals = np.stack([0 * angles, np.sin(angles), np.cos(angles)], -1)[None].astype(np.float32)
    shine = highlight(normals, light, sharpness=12)[0]
    assert np.argmax(shine[:, 0]) == 9  # 45 degrees
    np.testing.assert_allclose(shine[9], [2.0, 1.0, 0.5], rtol=1e-5)
    np.testing.assert_allclose(shine[0, 0], 2 * np.cos(np.pi / 4) ** 12, rtol=1e-4)
