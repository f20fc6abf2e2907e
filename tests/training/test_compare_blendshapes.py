"""The comparison with MediaPipe's blendshapes: its figures by hand, its cut around a face."""

import sys
from types import SimpleNamespace

import pytest
from PIL import Image
from tiny_run import load_script

from actionunits.synthesis.head_model import AU_SHAPES


@pytest.fixture(scope="module")
def comparison():
    load_script("check_real_photos")  # which it imports
    return load_script("compare_blendshapes")


def test_figures_by_hand(comparison):
    rows = [
        {"present": present, "unsure": unsure}
        for present, unsure in (("12", ""), ("12 26", ""), ("", ""), ("4", ""), ("", "12"))
    ]
    shapes = [  # AU 12 is the mean of both sides: 0.5, 0.2, 0.3, 0.0, 0.9
        {"mouthSmileLeft": left, "mouthSmileRight": right, "jawOpen": jaw}
        for left, right, jaw in ((1, 0, 0.1), (0.2, 0.2, 0.9), (0.3, 0.3, 0.2), (0, 0, 0.3), (0.9, 0.9, 0))
    ]
    scores = [[0.9, 0.0, 0.5], [0.8, 0.9, 0.5], [0.1, 0.2, 0.5], [0.2, 0.3, 0.5], [0.95, 0.1, 0.5]]
    figures = comparison.compare(rows, list(zip(scores, shapes, strict=True)), [12, 26, 6])
    assert list(figures) == ["AU12", "AU26"]  # no blendshape draws AU 6
    assert figures["AU12"] == {
        "present": 2,
        "of": 4,  # the last is not sure
        "blendshapes": pytest.approx(3 / 4),  # 0.5 beats 0.3 and 0.0, 0.2 only 0.0
        "model": pytest.approx(1),
        # ranks 4 3 1 2 5 and 4 2 3 1 5: 1 - 6 (0 + 1 + 4 + 1 + 0) / (5 * 24)
        "correlation": pytest.approx(0.7),
    }
    assert figures["AU26"]["present"] == 1 and figures["AU26"]["model"] is None


def test_an_action_unit_has_the_blendshapes_that_draw_it(comparison):
    """On both sides of the face. Lips part by several, of which AU 25 draws one."""
    for au, names in comparison.BLENDSHAPES.items():
        left, right = (
            {name.removesuffix(side) for name in names if name.endswith(side)} for side in ("Left", "Right")
        )
        assert left == right
        shapes = {name.removesuffix("Left").removesuffix("Right") for name in names}
        assert shapes <= AU_SHAPES[au].keys() or (au == 25 and shapes > AU_SHAPES[au].keys())


def test_mediapipe_sees_the_face_with_half_of_its_size_around_it(comparison, monkeypatch, tmp_path):
    seen = []

    def detect(image):
        seen.append(image.data)
        shape = SimpleNamespace(category_name="jawOpen", score=0.25)
        return SimpleNamespace(face_blendshapes=[[shape]] if len(seen) == 1 else [])

    vision = SimpleNamespace(
        FaceLandmarkerOptions=lambda **options: options,
        FaceLandmarker=SimpleNamespace(
            create_from_options=lambda _: SimpleNamespace(detect=detect, close=lambda: None)
        ),
    )
    fake = SimpleNamespace(
        tasks=SimpleNamespace(vision=vision, BaseOptions=lambda **options: options),
        Image=SimpleNamespace,
        ImageFormat=SimpleNamespace(SRGB="srgb"),
    )
    monkeypatch.setitem(sys.modules, "mediapipe", fake)
    task = tmp_path / "face_landmarker.task"
    task.write_bytes(b"weights")
    blendshapes = comparison.Blendshapes(task)
    picture = Image.new("RGB", (100, 80))
    picture.putpixel((20, 10), (9, 8, 7))
    box = {"xmin": 30, "ymin": 20, "xmax": 50, "ymax": 40}
    assert blendshapes(picture, box) == {"jawOpen": 0.25}
    assert seen[0].shape == (40, 40, 3) and seen[0][0, 0].tolist() == [9, 8, 7]
    assert blendshapes(picture, box) is None
