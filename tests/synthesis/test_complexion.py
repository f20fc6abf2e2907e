"""Skin tone by its published formula, worked by hand in CIE L*a*b*; complexions darken and tint."""

import numpy as np
import pytest

from actionunits.synthesis.complexion import cheek_color, complexion, skin_tone, typology_angle

from .conftest import mean_face


def linear_of(lightness: float, b: float) -> np.ndarray:
    """Colour of L*, a* = 0, b* by CIE's equations for D65, linear as the corpus takes it: sRGB squared."""
    fy = (lightness + 16) / 116
    xyz = np.array([0.95047, 1.0, 1.08883]) * [
        t**3 if t > 6 / 29 else 3 * (6 / 29) ** 2 * (t - 4 / 29) for t in (fy, fy, fy - b / 200)
    ]
    matrix = [[3.2406, -1.5372, -0.4986], [-0.9689, 1.8758, 0.0415], [0.0557, -0.2040, 1.0570]]
    linear = np.array(matrix) @ xyz
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return encoded**2


@pytest.mark.parametrize(
    ("lightness", "b", "tone"),
    [(70, 15, "light"), (60, 18, "intermediate"), (45, 15, "dark"), (30, 12, "dark")],
)
def test_skin_tone_follows_the_typology_angle(lightness, b, tone):
    color = linear_of(lightness, b)
    assert typology_angle(color) == pytest.approx(np.degrees(np.arctan((lightness - 50) / b)), abs=0.3)
    assert skin_tone(color) == tone


def test_a_complexion_above_one_darkens_and_one_changes_nothing():
    color = np.array([[0.5, 0.3, 0.2]], np.float32)
    assert complexion(color, (1.0, 1.0, 1.0, 1.0)) is color
    np.testing.assert_allclose(complexion(color, (2.0, 1.1, 1.0, 0.9)), [[0.275, 0.09, 0.036]], rtol=1e-5)


def test_cheeks_are_beside_the_nose_and_nothing_else_counts():
    points = mean_face() * 40 + 64
    picture = np.zeros((128, 128, 3), np.float32)
    middle_of_cheeks = np.round([points[[1, 3, 48, 31]].mean(0), points[[15, 13, 54, 35]].mean(0)]).astype(
        int
    )
    for x, y in middle_of_cheeks:
        picture[y - 14 : y + 15, x - 16 : x + 17] = (0.4, 0.2, 0.1)
    np.testing.assert_allclose(cheek_color(picture, points), [0.4, 0.2, 0.1], rtol=1e-6)
