"""Folds of the skin that action units make, as shading maps on a person's photograph.

The blendshapes are too coarse to crease the skin, and creases are important cues for FACS coders (Ekman,
Friesen & Hager 2002: crow's feet for 6, nasolabial furrow for 9, 10, 12, brow furrow for 4).
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from scipy.interpolate import make_interp_spline

from actionunits.landmarks import SCHEMES

# A knot of a fold: iBUG-68 point and offset (outwards, down) in distances of the inner eye corners.
Knot = tuple[int, float, float]


@dataclass(frozen=True)
class Fold:
    """A fold of one side of the face (the other mirrors it) and its darkness at intensity 1."""

    au: int
    knots: tuple[Knot, ...]
    darkness: float


FOLDS = (
    Fold(1, ((21, -0.55, -0.45), (21, 0.0, -0.5), (20, 0.05, -0.42)), 0.30),
    Fold(1, ((21, -0.55, -0.75), (21, 0.0, -0.8), (20, 0.0, -0.7)), 0.28),
    Fold(1, ((21, -0.5, -1.02), (21, 0.1, -1.05)), 0.18),
    Fold(2, ((20, -0.05, -0.42), (19, 0.0, -0.4), (18, 0.1, -0.35)), 0.28),
    Fold(2, ((20, -0.05, -0.68), (19, 0.0, -0.66), (18, 0.05, -0.58)), 0.26),
    Fold(4, ((21, -0.20, 0.22), (21, -0.16, 0.0), (21, -0.20, -0.28)), 0.55),
    Fold(4, ((21, 0.05, -0.22), (20, 0.0, -0.26)), 0.18),
    Fold(6, ((36, 0.18, -0.06), (36, 0.52, -0.22)), 0.36),
    Fold(6, ((36, 0.20, 0.05), (36, 0.56, 0.06)), 0.36),
    Fold(6, ((36, 0.16, 0.16), (36, 0.48, 0.32)), 0.30),
    Fold(6, ((39, 0.05, 0.22), (40, 0.0, 0.34), (41, 0.05, 0.34), (36, 0.12, 0.24)), 0.34),
    Fold(7, ((39, 0.08, 0.12), (40, 0.0, 0.17), (41, 0.0, 0.17), (36, 0.02, 0.12)), 0.42),
    Fold(9, ((27, 0.0, -0.10), (27, 0.20, -0.06)), 0.36),
    Fold(9, ((27, 0.0, 0.06), (27, 0.22, 0.10)), 0.40),
    Fold(9, ((28, 0.14, 0.0), (28, 0.30, 0.22)), 0.30),
    Fold(9, ((31, 0.08, -0.36), (31, 0.26, -0.10), (31, 0.36, 0.14)), 0.45),
    Fold(10, ((31, 0.14, -0.20), (31, 0.38, 0.10), (48, 0.16, -0.28)), 0.45),
    Fold(12, ((31, 0.12, -0.14), (31, 0.40, 0.16), (48, 0.34, -0.20), (48, 0.36, 0.10)), 0.50),
    Fold(12, ((48, 0.40, -0.24), (48, 0.48, 0.0), (48, 0.42, 0.22)), 0.30),
    Fold(14, ((48, 0.10, -0.14), (48, 0.16, 0.0), (48, 0.10, 0.14)), 0.60),
    Fold(15, ((48, 0.04, 0.08), (48, 0.14, 0.26), (48, 0.14, 0.48)), 0.34),
    Fold(17, ((57, 0.0, 0.24), (57, 0.30, 0.30), (57, 0.48, 0.46)), 0.40),
    Fold(17, ((8, 0.08, -0.36), (8, 0.16, -0.26)), 0.30),
    Fold(17, ((8, 0.02, -0.24), (8, 0.10, -0.16)), 0.26),
    Fold(24, ((57, 0.0, 0.13), (57, 0.25, 0.10), (57, 0.44, 0.0)), 0.36),
    Fold(24, ((48, 0.06, -0.10), (48, 0.11, 0.0), (48, 0.06, 0.10)), 0.30),
    Fold(20, ((48, 0.18, -0.22), (48, 0.26, 0.0), (48, 0.20, 0.26)), 0.26),
)
WRINKLED_AUS = tuple(sorted({fold.au for fold in FOLDS}))
MAP_SCALE = 0.5  # resolution of the shading maps, relative to the photograph


def wrinkle_maps(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """Draw the folds of every AU of `WRINKLED_AUS`.

    Args:
        points: (68, 2) iBUG points in pixels of the photograph.
        height: height of the photograph in pixels.
        width: width of the photograph in pixels.

    Returns:
        (len(WRINKLED_AUS), height / 2, width / 2) int8: 127 x the relative change of brightness at
        intensity 1.
    """
    unit = float(np.linalg.norm(points[42] - points[39]))
    shape = int(height * MAP_SCALE), int(width * MAP_SCALE)
    maps = np.zeros((len(WRINKLED_AUS), *shape), np.float32)
    for fold in FOLDS:
        for side in (points, _mirrored(points)):
            maps[WRINKLED_AUS.index(fold.au)] += _crease(fold, side, unit, shape)
    return (np.clip(maps, -1, 1) * 127).astype(np.int8)


def _mirrored(points: np.ndarray) -> np.ndarray:
    """Swap left and right points, so that a left index gives the right point."""
    return points[list(SCHEMES["ibug68"].mirror)]


def _crease(fold: Fold, points: np.ndarray, unit: float, shape: tuple[int, int]) -> np.ndarray:
    """A dark line with a bright rim below it, on the side that left indices of `points` give."""
    outward = (points[36] - points[45]) / np.linalg.norm(points[36] - points[45])
    down = points[8] - points[27]
    down = down / np.linalg.norm(down)
    knots = np.array([points[i] + unit * (x * outward + y * down) for i, x, y in fold.knots]) * MAP_SCALE
    spline = make_interp_spline(np.arange(len(knots)), knots, k=min(2, len(knots) - 1))
    curve = spline(np.linspace(0, len(knots) - 1, 24))
    line = np.zeros(shape, np.float32)
    cv2.polylines(line, [np.round(curve * 16).astype(np.int32)], False, 1.0, 1, cv2.LINE_AA, 4)
    thickness = 0.035 * unit * MAP_SCALE
    groove = cv2.GaussianBlur(line, (0, 0), thickness)
    soft = cv2.GaussianBlur(line, (0, 0), 3 * thickness)
    rim = np.roll(groove, round(2.5 * thickness), axis=0)
    peak = 1.0 / (np.sqrt(2 * np.pi) * thickness)  # maximum of a blurred line of width 1
    return fold.darkness * (-groove + 0.45 * rim - 0.5 * soft) / peak
