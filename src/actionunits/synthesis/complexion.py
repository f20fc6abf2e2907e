"""Complexion: how a scene darkens or lightens skin, and the skin tone of the result.

Skin tones are classes of the individual typology angle, ITA = arctan((L* - 50) / b*) in degrees (Chardon,
Cretois & Hourseau, "Skin colour typology and suntanning pathways", 1991), its six classes merged in pairs.
"""

from __future__ import annotations

import cv2
import numpy as np
from skimage.color import rgb2lab

# Class and its smallest angle [degrees], lightest first.
SKIN_TONES: tuple[tuple[str, float], ...] = (("light", 41.0), ("intermediate", 10.0), ("dark", -np.inf))
CHEEKS = ((1, 3, 48, 31), (15, 13, 54, 35))  # polygons of iBUG-68 points


def complexion(color: np.ndarray, skin: tuple[float, float, float, float]) -> np.ndarray:
    """Apply the exponent (above 1 darkens) and RGB tint of `Scene.skin` to a linear colour (..., 3)."""
    exponent, *tint = skin
    if exponent == 1.0:
        return color
    return np.power(color, np.float32(exponent)) * np.array(tint, np.float32)


def cheek_color(linear: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Median linear colour (3,) of the cheeks in a picture (H, W, 3) with points (68, 2) in pixels."""
    mask = np.zeros(linear.shape[:2], np.uint8)
    for cheek in CHEEKS:
        cv2.fillPoly(mask, [np.round(points[list(cheek)]).astype(np.int32)], 1)
    return np.median(linear[mask > 0], axis=0).astype(np.float32)


def typology_angle(color: np.ndarray) -> float:
    """Individual typology angle [degrees] of a linear colour (3,); its square root approximates sRGB."""
    lightness, _, b = rgb2lab(np.sqrt(np.clip(color, 0, 1)))
    return float(np.degrees(np.arctan2(lightness - 50, b)))


def skin_tone(color: np.ndarray) -> str:
    """Class of `SKIN_TONES` of a linear colour (3,)."""
    angle = typology_angle(color)
    return next(name for name, smallest in SKIN_TONES if angle >= smallest)
