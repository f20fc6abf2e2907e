"""A toy corpus like the synthetic one: grey faces on which every AU is a bright spot at its place."""

import json
import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
from datasets import Array2D, Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from actionunits.action_units import CORPUS_AUS
from actionunits.au_regions import au_centers

AUS = CORPUS_AUS["synthetic"]
FEATURES = Features(
    {
        "image": Image(),
        "landmarks": Array2D((68, 2), "float32"),
        "au_intensities": List(Value("float32"), length=17),
        "au_occurrence": List(Value("int8"), length=17),
        "identity": Value("string"),
        "sex": Value("string"),
        "ethnicity": Value("string"),
        "skin_tone": Value("string"),
        "age": Value("float32"),
        "parameters": Value("string"),
    }
)


def write_corpus(
    folder: Path,
    pictures=(24, 8, 8),
    size: int = 64,
    seed: int = 0,
    people: int = 3,
    shards: int = 1,
    corrupt=(),
) -> Path:
    """Write train, validation and test splits of so many pictures, in so many files each, and a manifest.

    The training pictures of the indices `corrupt` lack the second half of their bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in zip(("train", "validation", "test"), pictures, strict=True):
        rows = [toy_row(split, i, size, seed, people) for i in range(count)]
        for i in corrupt if split == "train" else ():
            rows[i]["image"]["bytes"] = rows[i]["image"]["bytes"][: len(rows[i]["image"]["bytes"]) // 2]
        for shard, part in enumerate(np.array_split(np.arange(count), shards)):
            dataset = Dataset.from_list([rows[i] for i in part], features=FEATURES)
            dataset.to_parquet(str(folder / f"{split}-{shard:05d}-of-{shards:05d}.parquet"))
    (folder / "manifest.json").write_text(json.dumps({"generator": "toy", "sources": {"faces": "drawn"}}))
    return folder


def toy_row(split: str, index: int, size: int, seed: int, people: int) -> dict:
    """One row; the person decides the background."""
    rng = np.random.default_rng([seed, len(split), index])
    person = index % people
    landmarks = toy_landmarks(size, rng)
    present = rng.random(17) < 0.5
    intensities = np.where(present, rng.uniform(0.3, 1, 17), 0).astype(np.float32)
    if index % 8 == 7:  # a neutral face now and then
        intensities[:] = 0
    y, x = np.mgrid[:size, :size]
    picture = np.full((size, size, 3), 40.0 + 20 * person) + rng.normal(0, 4, (size, size, 3))
    for au, (centers, intensity) in enumerate(
        zip(au_centers(landmarks, "ibug68", AUS), intensities, strict=True)
    ):
        for cx, cy in centers:
            spot = np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * (size / 40) ** 2))
            picture[..., au % 3] += 150 * intensity * spot
    return {
        "image": {"bytes": to_jpeg(picture), "path": None},
        "landmarks": landmarks.astype(np.float32),
        "au_intensities": intensities,
        "au_occurrence": (intensities > 0).astype(np.int8),
        "identity": f"{split}-{person}",
        "sex": ["female", "male"][person % 2],
        "ethnicity": "drawn",
        "skin_tone": ["light", "dark"][index % 2],
        "age": 20.0 + 15 * person,
        "parameters": "{}",
    }


def toy_landmarks(size: int, rng: np.random.Generator) -> np.ndarray:
    """iBUG-68 points of a schematic face, a little turned and moved, (68, 2) in pixels."""
    t = np.linspace(0, np.pi, 17)
    jaw = np.stack([-0.36 * np.cos(t), 0.05 + 0.4 * np.sin(t)], 1)
    brows = [
        np.stack([np.linspace(a, b, 5), np.full(5, -0.22)], 1) for a, b in ((-0.28, -0.06), (0.06, 0.28))
    ]
    bridge = np.stack([np.zeros(4), np.linspace(-0.12, 0.06, 4)], 1)
    nostrils = np.stack([np.linspace(-0.07, 0.07, 5), np.full(5, 0.1)], 1)
    eye = np.array([[-1, 0], [-0.4, -0.5], [0.4, -0.5], [1, 0], [0.4, 0.5], [-0.4, 0.5]]) * 0.055
    outer, inner = np.linspace(-np.pi, np.pi, 13)[:12], np.linspace(-np.pi, np.pi, 9)[:8]
    lips = [
        np.stack([r * np.cos(a), 0.23 + r * 0.45 * np.sin(a)], 1) for r, a in ((0.13, outer), (0.09, inner))
    ]
    face = np.concatenate([jaw, *brows, bridge, nostrils, eye + [-0.16, -0.12], eye + [0.16, -0.12], *lips])
    angle = rng.normal(0, 0.08)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return size * (0.8 * face @ turn.T + 0.5 + rng.normal(0, 0.02, 2)) - 0.5


def to_jpeg(picture: np.ndarray) -> bytes:
    """Encode (H, W, 3) in [0, 255]."""
    buffer = BytesIO()
    PILImage.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def huge_header() -> bytes:
    """A PNG of a few bytes that says it has 60000 x 60000 pixels, as a damaged header may."""
    parts = (b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)), (b"IDAT", b""), (b"IEND", b"")
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
