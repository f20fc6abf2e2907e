"""Write the corpus: split people, render in parallel, pack Parquet shards, record a manifest.

Every picture has a generator of its own, seeded by (seed, split, index), so the corpus does not depend on the
number of processes, and a run that was stopped goes on at the first missing shard.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import tempfile
import zlib
from dataclasses import asdict, dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from actionunits import __version__

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
        seed: of everything that is drawn.
        size: of the pictures in pixels.
        shard_size: pictures a Parquet file.
    """

    pictures: tuple[int, int, int] = (60_000, 3_000, 3_000)
    seed: int = 0
    size: int = 160
    shard_size: int = 2_000

    def __post_init__(self) -> None:
        """Refuse numbers that make no sense, before anything is fitted or drawn."""
        if min(self.pictures) < 0:
            raise ValueError(f"pictures={self.pictures} must not be negative; 0 leaves a split out.")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must not be negative.")
        for name in ("size", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more.")

    def files(self) -> list[tuple[str, str, range]]:
        """Name, split and indices of the pictures of every Parquet file."""
        files = []
        for split, count in zip(SPLITS, self.pictures, strict=True):
            starts = range(0, count, self.shard_size)
            files += [
                (
                    f"{split}-{i:05d}-of-{len(starts):05d}.parquet",
                    split,
                    range(s, min(s + self.shard_size, count)),
                )
                for i, s in enumerate(starts)
            ]
        return files


def split_people(names: list[str], seed: int = 0) -> dict[str, list[str]]:
    """Split identities 70 / 15 / 15 by a hash of their name, so that adding people moves nobody."""
    order = sorted(names, key=lambda name: zlib.crc32(f"{seed}/{name}".encode()))
    test = max(1, round(0.15 * len(order)))
    parts = {"test": order[:test], "validation": order[test : 2 * test], "train": order[2 * test :]}
    if any(not part for part in parts.values()):
        raise ValueError(f"{len(names)} people are too few for three disjoint splits; give at least 3")
    return {split: sorted(parts[split]) for split in SPLITS}


def write_corpus(
    head_folder: Path, photo_folder: Path, output: Path, plan: CorpusPlan, processes: int = 0
) -> None:
    """Render the whole corpus into `output`; shards that are there already are kept.

    Args:
        head_folder: see `HeadModel.load`.
        photo_folder: see `read_people`.
        output: gets the Parquet shards, `manifest.json` and `contact_sheet.png`.
        plan: what to render.
        processes: worker processes, 0 for one a core.

    Raises:
        FileNotFoundError: if head or photographs are not where they are said to be; nothing is written then.
        ValueError: if `output` holds a corpus of another plan, or `processes` is negative.
    """
    if processes < 0:
        raise ValueError(f"processes={processes} must not be negative; 0 is one a core.")
    # Read here, not in the workers: a pool puts a new worker in the place of one that cannot start, for ever.
    head = HeadModel.load(head_folder)
    people = {row["name"]: row for row in read_people(photo_folder)}
    splits = split_people(sorted(people), plan.seed)
    manifest = {
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
    output.mkdir(parents=True, exist_ok=True)
    _claim(output / "manifest.json", manifest)
    models = {row["name"]: row for row in _averaged_faces(photo_folder)} or {
        n: people[n] for n in splits["train"]
    }
    processes = processes or os.cpu_count() or 1
    # A forked copy of OpenCV's threads would wait for each other for ever; one process needs no copy.
    make_pool = multiprocessing.get_context("spawn").Pool if processes > 1 else ThreadPool
    missing = [(output / name, s, r) for name, s, r in plan.files() if not (output / name).is_file()]
    needs_sheet = not (output / "contact_sheet.png").is_file()
    needed = {name for _, split, _ in missing for name in splits[split]} | (
        set(models) if needs_sheet else set()
    )
    with (
        tempfile.TemporaryDirectory() as fitted,
        make_pool(processes, _start, (head, {**people, **models}, splits, plan, Path(fitted))) as pool,
    ):
        fitting = pool.imap_unordered(_fit, sorted(needed))
        list(tqdm(fitting, "fitting heads", len(needed), unit="person", disable=not needed))
        for path, split, indices in missing:
            jobs = pool.imap(_draw, [(split, i) for i in indices], chunksize=16)
            rows = list(tqdm(jobs, path.name, len(indices), unit="picture", smoothing=0.02))
            _write_shard(path, rows)
        if needs_sheet:
            _save(pool.apply(_contact_sheet, (sorted(models),)), output / "contact_sheet.png")


def _claim(path: Path, manifest: dict) -> None:
    """Write the manifest, or check that the one in place describes the same corpus."""
    if path.is_file():
        try:
            found = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{path} ({path.stat().st_size} bytes) does not describe a corpus: {error}. Remove it if the "
                "files beside it are of this very plan, it is written anew; else choose an empty folder."
            ) from error
        different = [key for key in ("plan", "people", "generator") if found.get(key) != manifest[key]]
        if different:
            raise ValueError(
                f"{path} belongs to another corpus ({', '.join(different)} differ); choose an empty folder"
            )
        return
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(manifest, indent=2) + "\n")
    temporary.replace(path)


_worker: dict = {}  # what a worker process holds: head, rows and people by name, names by split, plan, folder


def _averaged_faces(folder: Path) -> list[dict]:
    """The sets' averages of several people, if they are there: nobody's likeness, so they may be shown."""
    return read_people(folder, ("composite",)) if (folder / "composite").is_dir() else []


def _start(
    head: HeadModel, rows: dict[str, dict], splits: dict[str, list[str]], plan: CorpusPlan, fitted: Path
) -> None:
    cv2.setNumThreads(1)
    _worker.update(head=head, rows=rows, splits=splits, plan=plan, fitted=fitted, people={})


def _fit(name: str) -> None:
    """Fit the head to a photograph, once for all workers."""
    person = Person.of_photograph(_worker["head"], **_worker["rows"][name])
    _fitted(name).write_bytes(pickle.dumps(person))


def _person(name: str) -> Person:
    """A fitted person, read the first time that a worker meets them."""
    if name not in _worker["people"]:
        _worker["people"][name] = pickle.loads(_fitted(name).read_bytes())
    return _worker["people"][name]


def _fitted(name: str) -> Path:
    return _worker["fitted"] / f"{name.replace('/', '-')}.pickle"


def _draw(job: tuple[str, int]) -> dict:
    """One row of the corpus."""
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
    temporary = path.with_suffix(".tmp")
    Dataset.from_list(rows, features=features).to_parquet(str(temporary))
    temporary.replace(path)


def _contact_sheet(names: list[str], columns: int = 6, size: int = 160) -> Image.Image:
    """Every AU at three intensities, on two mixtures of the named faces."""
    head = _worker["head"]
    pairs = [(names[(7 * k) % len(names)], names[(7 * k + 3) % len(names)]) for k in range(2)]
    wall = np.full((8, 8, 3), 0.6, np.float32)  # about as bright as the walls of the averaged photographs
    rows: list[dict[int, float]] = [{}, *({au: 1.0} for au in SYNTHETIC_AUS)]
    rows += [{6: 1.0, 12: 1.0, 25: 0.8}, {1: 1.0, 2: 1.0, 5: 1.0, 26: 1.0}]
    tiles = []
    for action_units in rows:
        for first, second in pairs:
            for level in (0.33, 0.66, 1.0):
                scene = neutral_scene(head, {au: level * v for au, v in action_units.items()}, size)
                linear = render(head, scene, _person(first), _person(second), wall).image
                text = "+".join(f"AU{au}" for au in action_units) or "neutral"
                tiles.append(
                    _captioned(np.sqrt(np.clip(linear, 0, 1)), f"{text}  {level if action_units else ''}")
                )
    sheet = Image.new("RGB", (columns * size, -(-len(tiles) // columns) * size))
    for i, tile in enumerate(tiles):
        sheet.paste(tile, ((i % columns) * size, (i // columns) * size))
    return sheet


def _captioned(picture: np.ndarray, text: str) -> Image.Image:
    tile = Image.fromarray((picture * 255).astype(np.uint8))
    draw = ImageDraw.Draw(tile)
    draw.text(
        (5, tile.height - 17),
        text,
        fill="white",
        font=ImageFont.load_default(12),
        stroke_width=2,
        stroke_fill="black",
    )
    return tile


def _save(picture: Image.Image, path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    picture.save(temporary, "PNG")
    temporary.replace(path)
