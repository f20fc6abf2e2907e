"""Write the corpus: split people, render in parallel, pack Parquet shards, record a manifest.

Every picture has its own random generator, seeded by (seed, split, index). So the corpus does not depend on
the number of processes, and an interrupted run resumes at the first missing shard.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import pickle
import tempfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from multiprocessing.pool import Pool, ThreadPool
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from actionunits import __version__
from actionunits.files import whole_file

from .complexion import complexion, skin_tone
from .head_model import HeadModel
from .make_up import make_up
from .person import Person, read_people
from .photography import cast_shadow, cut_tightly, occlude, random_background, take_photograph, to_jpeg
from .renderer import render
from .sampling import (
    OCCURRENCE_FROM,
    SYNTHETIC_AUS,
    label_intensities,
    label_occurrence,
    neutral_scene,
    sample_scene,
)

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class CorpusPlan:
    """What to render.

    Attributes:
        pictures: number of pictures in train, validation and test.
        seed: random seed of the splits and the pictures.
        size: side of the pictures in pixels.
        shard_size: pictures per Parquet file.
    """

    pictures: tuple[int, int, int] = (60_000, 3_000, 3_000)
    seed: int = 0
    size: int = 160
    shard_size: int = 2_000

    def __post_init__(self) -> None:
        """Check the numbers before anything is fitted or rendered."""
        if min(self.pictures) < 0:
            raise ValueError(f"pictures={self.pictures} must not be negative; 0 leaves a split out.")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must not be negative.")
        for name in ("size", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more.")

    def files(self) -> list[tuple[str, str, range]]:
        """Name, split and picture indices of every Parquet file."""
        files = []
        for split, count in zip(SPLITS, self.pictures, strict=True):
            starts = range(0, count, self.shard_size)
            for i, start in enumerate(starts):
                name = f"{split}-{i:05d}-of-{len(starts):05d}.parquet"
                files.append((name, split, range(start, min(start + self.shard_size, count))))
        return files


def split_people(names: list[str], seed: int = 0) -> dict[str, list[str]]:
    """Split people 70 / 15 / 15, in the order of a hash of their names."""
    order = sorted(names, key=lambda name: zlib.crc32(f"{seed}/{name}".encode()))
    test = max(1, round(0.15 * len(order)))
    parts = {"test": order[:test], "validation": order[test : 2 * test], "train": order[2 * test :]}
    if any(not part for part in parts.values()):
        raise ValueError(f"{len(names)} people are too few for three disjoint splits; give at least 3.")
    return {split: sorted(parts[split]) for split in SPLITS}


def people_by_split(manifest: Mapping[str, Any], names: list[str]) -> dict[str, list[str]]:
    """Which of these people are in which split of a corpus, by its manifest, else by `split_people`.

    Raises:
        ValueError: The manifest names others.
    """
    people = manifest.get("people") or split_people(sorted(names))
    splits = {split: sorted(set(people[split]) & set(names)) for split in SPLITS}
    if alone := [split for split in SPLITS if not splits[split]]:
        raise ValueError(
            f"none of the {len(people[alone[0]])} people of the split {alone[0]!r}, such as "
            f"{people[alone[0]][:1]}, is among the photographed, such as {names[:1]}; give the photographs "
            "that the corpus was rendered from."
        )
    return splits


def write_corpus(
    head_folder: Path, photo_folder: Path, output: Path, plan: CorpusPlan, processes: int = 0
) -> None:
    """Render the whole corpus into `output`; existing shards are kept.

    Args:
        head_folder: see `HeadModel.load`.
        photo_folder: see `read_people`.
        output: gets the Parquet shards, `manifest.json` and `contact_sheet.png`.
        plan: what to render.
        processes: worker processes, 0 for one per core.

    Raises:
        FileNotFoundError: if the head model or the photographs are missing; nothing is written then.
        ValueError: if `output` holds a corpus of another plan, or `processes` is negative.
    """
    if processes < 0:
        raise ValueError(f"processes={processes} must not be negative; 0 is one per core.")
    # Read here, not in the workers: a pool endlessly restarts workers that fail to start.
    head = HeadModel.load(head_folder)
    people = {row["name"]: row for row in read_people(photo_folder)}
    splits = split_people(sorted(people), plan.seed)
    output.mkdir(parents=True, exist_ok=True)
    _claim(output / "manifest.json", _manifest(plan, splits))
    models = _averaged_faces(photo_folder) or {name: people[name] for name in splits["train"]}
    missing = [(output / name, s, r) for name, s, r in plan.files() if not (output / name).is_file()]
    sheet = output / "contact_sheet.png"
    needs_sheet = not sheet.is_file()
    needed = {name for _, split, _ in missing for name in splits[split]} | set(models if needs_sheet else ())
    with (
        tempfile.TemporaryDirectory() as fitted,
        _pool(processes, head, people | models, splits, plan, Path(fitted)) as pool,
    ):
        fitting = pool.imap_unordered(_fit, sorted(needed))
        list(tqdm(fitting, "fitting heads", len(needed), unit="person", disable=not needed))
        for path, split, indices in missing:
            jobs = pool.imap(_draw, [(split, i) for i in indices], chunksize=16)
            rows = list(tqdm(jobs, path.name, len(indices), unit="picture", smoothing=0.02))
            _write_shard(path, rows)
        if needs_sheet:
            with whole_file(sheet) as part:
                pool.apply(_contact_sheet, (sorted(models),)).save(part, "PNG")


def _manifest(plan: CorpusPlan, splits: dict[str, list[str]]) -> dict:
    return {
        "generator": f"actionunits {__version__}",
        "plan": json.loads(json.dumps(asdict(plan))),
        "action_units": list(SYNTHETIC_AUS),
        "occurrence_from_intensity": OCCURRENCE_FROM,
        "people": splits,
        "sources": {
            "head model": "ICT-FaceKit light, (c) 2020 USC Institute for Creative Technologies, MIT licence",
            "photographs": "Face Research Lab London Set and Young Adult White Faces, "
            "DeBruine & Jones 2017, CC BY 4.0",
        },
    }


def _claim(path: Path, manifest: dict) -> None:
    """Write the manifest, or check that the existing one describes the same corpus."""
    if path.is_file():
        try:
            found = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{path} ({path.stat().st_size} bytes) does not describe a corpus: {error}. If the files "
                "beside it are of this very plan, remove it, to be rewritten; else choose an empty folder."
            ) from error
        different = [key for key in ("plan", "people", "generator") if found.get(key) != manifest[key]]
        if different:
            raise ValueError(
                f"{path} belongs to another corpus ({', '.join(different)} differ); choose an empty folder."
            )
        return
    with whole_file(path) as part:
        part.write_text(json.dumps(manifest, indent=2) + "\n")


def _averaged_faces(folder: Path) -> dict[str, dict]:
    """Averages of several people by name, if there are any: the contact sheet can show them to anybody."""
    rows = read_people(folder, ("composite",)) if (folder / "composite").is_dir() else []
    return {row["name"]: row for row in rows}


_worker: dict = {}  # state of a worker process, see `_start`


def _pool(processes: int, *state: Any) -> Pool:
    """Worker processes with this state, see `_start`; a thread in place of a single one."""
    processes = processes or os.cpu_count() or 1
    # Not forked: copies of OpenCV's thread pool deadlock.
    make_pool: Any = multiprocessing.get_context("spawn").Pool if processes > 1 else ThreadPool
    return make_pool(processes, _start, state)


def _start(
    head: HeadModel, rows: dict[str, dict], splits: dict[str, list[str]], plan: CorpusPlan, fitted: Path
) -> None:
    """Take in head model, photographs by name, names by split, plan and the folder of the fitted people."""
    cv2.setNumThreads(1)
    _worker.update(head=head, rows=rows, splits=splits, plan=plan, fitted=fitted, people={})


def _fit(name: str) -> None:
    """Fit the head model to a photograph, once for all workers."""
    person = Person.of_photograph(_worker["head"], **_worker["rows"][name])
    _fitted(name).write_bytes(pickle.dumps(person))


def _person(name: str) -> Person:
    """A fitted person, read once per worker."""
    if name not in _worker["people"]:
        _worker["people"][name] = pickle.loads(_fitted(name).read_bytes())
    return _worker["people"][name]


def _fitted(name: str) -> Path:
    return _worker["fitted"] / f"{name.replace('/', '-')}.pickle"


def _draw(job: tuple[str, int]) -> dict:
    """Render one row of the corpus."""
    split, index = job
    plan, head = _worker["plan"], _worker["head"]
    rng = np.random.default_rng([plan.seed, SPLITS.index(split), index])
    names = _worker["splits"][split]
    person, other = (_person(names[rng.integers(len(names))]) for _ in range(2))
    scene = sample_scene(head, rng, plan.size)
    drawn = render(head, scene, person, other, random_background(rng))
    linear = occlude(make_up(drawn.image, drawn.landmarks, rng), drawn.landmarks, rng)
    picture = take_photograph(cast_shadow(linear, rng), rng)
    picture = cut_tightly(picture, drawn.landmarks, rng)
    intensities = label_intensities(scene, drawn.lip_gap)
    cheek = person.cheek + scene.blend * (other.cheek - person.cheek)
    return {
        "image": {"bytes": to_jpeg(picture, rng), "path": None},
        "landmarks": drawn.landmarks,
        "au_intensities": intensities,
        "au_occurrence": label_occurrence(intensities),
        "identity": person.name,
        "sex": person.sex,
        "ethnicity": person.ethnicity,
        "skin_tone": skin_tone(complexion(cheek, scene.skin)),
        "age": person.age,
        "parameters": json.dumps({"other": other.name, **scene.parameters()}),
    }


def _write_shard(path: Path, rows: list[dict]) -> None:
    from datasets import Array2D, Dataset, Features, Image, List, Value

    features = Features(
        {
            "image": Image(),
            "landmarks": Array2D((68, 2), "float32"),
            "au_intensities": List(Value("float32"), length=len(SYNTHETIC_AUS)),
            "au_occurrence": List(Value("int8"), length=len(SYNTHETIC_AUS)),
            "identity": Value("string"),
            "sex": Value("string"),
            "ethnicity": Value("string"),
            "skin_tone": Value("string"),
            "age": Value("float32"),
            "parameters": Value("string"),
        }
    )
    with whole_file(path) as part:
        Dataset.from_list(rows, features=features).to_parquet(str(part))


def _contact_sheet(names: list[str], columns: int = 6, size: int = 160) -> Image.Image:
    """Every AU at three intensities, on two blends of the named faces."""
    head = _worker["head"]
    pairs = [(names[(7 * k) % len(names)], names[(7 * k + 3) % len(names)]) for k in range(2)]
    wall = np.full((8, 8, 3), 0.6, np.float32)  # about as bright as the walls of the averaged photographs
    rows: list[dict[int, float]] = [{}, *({au: 1.0} for au in SYNTHETIC_AUS)]
    rows += [{6: 1.0, 12: 1.0, 25: 0.8}, {1: 1.0, 2: 1.0, 5: 1.0, 26: 1.0}]
    tiles = []
    for action_units, (first, second), level in itertools.product(rows, pairs, (0.33, 0.66, 1.0)):
        scene = neutral_scene(head, {au: level * v for au, v in action_units.items()}, size)
        linear = render(head, scene, _person(first), _person(second), wall).image
        text = "+".join(f"AU{au}" for au in action_units) or "neutral"
        tiles.append(_captioned(np.sqrt(np.clip(linear, 0, 1)), f"{text}  {level if action_units else ''}"))
    sheet = Image.new("RGB", (columns * size, -(-len(tiles) // columns) * size))
    for i, tile in enumerate(tiles):
        sheet.paste(tile, ((i % columns) * size, (i // columns) * size))
    return sheet


def _captioned(picture: np.ndarray, text: str) -> Image.Image:
    tile = Image.fromarray((picture * 255).astype(np.uint8))
    font = ImageFont.load_default(12)
    place = (5, tile.height - 17)
    ImageDraw.Draw(tile).text(place, text, "white", font, stroke_width=2, stroke_fill="black")
    return tile
