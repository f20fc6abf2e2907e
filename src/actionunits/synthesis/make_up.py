"""Paint on a rendered face, placed by its 68 points: make-up, darkened brows, beards.

None of it is an expression, but each resembles one: dark lids widened eyes, pencilled brows raised ones,
rouge lifted cheeks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

Color = tuple[float, float, float]


@dataclass(frozen=True)
class Paint:
    """One kind of paint.

    Attributes:
        chance: share of the faces with make-up that wear it.
        areas: polygons of iBUG-68 points, or lines if `line`.
        colors: linear RGB; the colour is sampled between the two.
        most: largest opacity.
        line: largest thickness of a line in distances of the inner eye corners, 0 for polygons.
        soft: sigma of the blur of its edge in the same unit.
        lift: largest shift of the points upwards in the same unit.
        grain: how unevenly it covers, 0 to 1: hairs instead of paint.
    """

    chance: float
    areas: tuple[tuple[int, ...], ...]
    colors: tuple[Color, Color]
    most: float
    line: float = 0.0
    soft: float = 0.03
    lift: float = 0.0
    grain: float = 0.0


DARK: tuple[Color, Color] = ((0.005, 0.005, 0.005), (0.05, 0.03, 0.02))
LIDS = ((36, 37, 38, 39), (42, 43, 44, 45))
BROWS = ((17, 18, 19, 20, 21), (22, 23, 24, 25, 26))
LIPS = ((48, 49, 50, 51, 52, 53, 54, 64, 63, 62, 61, 60), (60, 67, 66, 65, 64, 54, 55, 56, 57, 58, 59, 48))
PAINTS = (
    Paint(0.6, LIDS, DARK, 0.9, line=0.10, soft=0.02, lift=0.02),
    Paint(0.3, LIDS, ((0.02, 0.02, 0.05), (0.35, 0.2, 0.25)), 0.6, line=0.35, soft=0.08, lift=0.15),
    Paint(0.4, BROWS, DARK, 0.7, line=0.20, soft=0.04),
    Paint(0.5, LIPS, ((0.25, 0.0, 0.02), (0.6, 0.15, 0.15)), 0.7),
    Paint(0.3, ((1, 3, 48, 31), (15, 13, 54, 35)), ((0.5, 0.15, 0.12), (0.7, 0.35, 0.3)), 0.3, soft=0.25),
)
HAIR: tuple[Color, Color] = ((0.005, 0.005, 0.005), (0.45, 0.42, 0.38))  # from black to grey
JAW = (2, 4, 6, 8, 10, 12, 14, 54, 55, 57, 59, 48)
UPPER_LIP = (48, 31, 33, 35, 54, 52, 51, 50)
BEARD = Paint(1.0, (JAW, UPPER_LIP), HAIR, 0.75, soft=0.10, grain=0.6)
MOUSTACHE = Paint(1.0, (UPPER_LIP,), HAIR, 0.95, soft=0.06, grain=0.6)


def make_up(image: Any, landmarks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A quarter of the faces wear make-up, one in seven a beard or stubble, one in twelve a moustache.

    Args:
        image: (S, S, 3) linear light.
        landmarks: (68, 2) iBUG points in pixels.
        rng: gives all randomness.
    """
    kind = rng.random()
    if kind < 0.25:
        for paint in PAINTS:
            if rng.random() < paint.chance:
                image = _put_on(image, paint, landmarks, rng)
    elif kind < 0.39:
        image = _put_on(image, BEARD, landmarks, rng)
    elif kind < 0.47:
        image = _put_on(image, MOUSTACHE, landmarks, rng)
    return image


def _put_on(image: Any, paint: Paint, landmarks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    unit = float(np.linalg.norm(landmarks[42] - landmarks[39])) + 1e-3
    points = landmarks - [0, rng.uniform(0, paint.lift) * unit]
    mask = np.zeros(image.shape[:2], np.float32)
    for area in paint.areas:
        corners = [np.round(points[list(area)] * 16).astype(np.int32)]
        if paint.line:
            thickness = max(1, round(rng.uniform(0.3, 1.0) * paint.line * unit))
            cv2.polylines(mask, corners, False, 1.0, thickness, cv2.LINE_AA, 4)
        else:
            cv2.fillPoly(mask, corners, 1.0, cv2.LINE_AA, 4)
    mask = cv2.GaussianBlur(mask, (0, 0), max(paint.soft * unit, 0.3)) * rng.uniform(0.15, paint.most)
    if paint.grain:
        hairs = rng.random((image.shape[0], image.shape[1])).astype(np.float32)
        mask *= 1 - paint.grain * cv2.GaussianBlur(hairs, (0, 0), 0.5)
    low, high = np.array(paint.colors, np.float32)
    color = low + rng.random() * (high - low)
    return image * (1 - mask[..., None]) + color * mask[..., None]
