"""Tiny imitations of corpora: drawn faces of an ellipse with eyes, nose and mouth, and their 68 points."""

from __future__ import annotations

import csv
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

SIZE = (120, 96)  # width and height of a tiny picture [pixels]


def random(*names: object) -> np.random.Generator:
    """A generator seeded by names."""
    return np.random.default_rng(zlib.crc32(repr(names).encode()))


def face_points(*names: object, size: tuple[int, int] = SIZE) -> np.ndarray:
    """iBUG-68 landmarks (68, 2) of a schematic face, in pixels of a picture of this size."""
    rng = random("face", *names)
    t = np.linspace(0, np.pi, 17)
    outer, inner = np.linspace(-np.pi, np.pi, 13)[:12], np.linspace(-np.pi, np.pi, 9)[:8]
    eye = np.array([[-1, 0], [-0.4, -0.5], [0.4, -0.5], [1, 0], [0.4, 0.5], [-0.4, 0.5]]) * 0.055
    face = np.concatenate(
        [
            np.stack([-0.36 * np.cos(t), 0.05 + 0.4 * np.sin(t)], 1),  # jaw
            np.stack([np.linspace(-0.28, -0.06, 5), np.full(5, -0.22)], 1),  # brows
            np.stack([np.linspace(0.06, 0.28, 5), np.full(5, -0.22)], 1),
            np.stack([np.zeros(4), np.linspace(-0.12, 0.06, 4)], 1),  # nose
            np.stack([np.linspace(-0.07, 0.07, 5), np.full(5, 0.1)], 1),
            eye + [-0.16, -0.12],
            eye + [0.16, -0.12],
            np.stack([0.13 * np.cos(outer), 0.23 + 0.06 * np.sin(outer)], 1),  # lips
            np.stack([0.09 * np.cos(inner), 0.23 + 0.04 * np.sin(inner)], 1),
        ]
    )
    centre = (np.array(size) - 1) / 2 + rng.normal(0, 1.5, 2)
    return 0.9 * min(size) * face + centre


def draw_face(path: Path, *names: object, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Draw a face into a new picture file and return its landmarks (68, 2)."""
    points = face_points(*names, size=size)
    shade = int(random(*names[:1]).integers(90, 200))  # by subject
    picture = Image.new("RGB", size, (40, 44, 52))
    draw = ImageDraw.Draw(picture)
    low, high = points.min(0), points.max(0)
    draw.ellipse([*(low - [2, 12]), *high], fill=(shade, shade - 20, shade - 40))
    for part in (slice(36, 42), slice(42, 48), slice(48, 60)):
        draw.polygon([tuple(p) for p in points[part]], fill=(30, 20, 20))
    for part in (slice(17, 22), slice(22, 27), slice(27, 31)):
        draw.line([tuple(p) for p in points[part]], fill=(30, 20, 20), width=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, quality=92)
    return points


def codes(count: int, *names: object) -> np.ndarray:
    """Binary labels (count, 99); column a is that of AU a."""
    return (random("codes", *names).random((count, 99)) < 0.4).astype(int)


def write_table(path: Path, header: Sequence[object], rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def write_landmarks(root: Path, sequence: str, points: dict[int, np.ndarray]) -> None:
    """Write `landmarks/SEQUENCE.csv`, the package's landmark format."""
    size = len(next(iter(points.values())))
    header = ["frame", *(f"{axis}{i}" for i in range(size) for axis in "xy")]
    rows = ([frame, *np.round(p, 2).ravel()] for frame, p in points.items())
    write_table(root / "landmarks" / f"{sequence}.csv", header, rows)
