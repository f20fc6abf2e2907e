"""Align a corpus once: every face a small picture in Parquet, with its landmarks and labels, for all folds.

Photographs of a megapixel cost more to decode and warp than to train on. `prepare_corpus` does it once, in
parallel, and writes

    FOLDER/faces-00000-of-00072.parquet ...   image (JPEG of the aligned face), landmarks, labels, person
           manifest.json                      what it was made of; what could not be read

A shard appears when it is complete, so whatever stops the work costs at most the shard at hand; the same
command goes on. Around the aligned face lies a margin, from which augmentation can turn and shift it.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from PIL import Image
from tqdm import tqdm

from actionunits.alignment import Alignment, five_point, identity, level_eyes
from actionunits.data.aligned_faces import AlignedFaces, check_people_apart
from actionunits.data.corpora import get_corpus, load_corpus
from actionunits.data.corpora.base import AUCorpus
from actionunits.data.protocols import refine, split_rows
from actionunits.data.synthetic import as_patterns, files_like, read_manifest
from actionunits.files import whole_file
from actionunits.landmarks import check_inside, check_landmarks, get_scheme, reduce_landmarks
from actionunits.pictures import load_picture

if TYPE_CHECKING:
    import datasets

ALIGNMENTS: dict[str, Callable[[np.ndarray, tuple[int, int], int], Alignment]] = {
    "level_eyes": lambda points, photo, size: level_eyes(points, size=size),
    "five_point": lambda points, photo, size: five_point(points, size=size),
    "none": lambda points, photo, size: identity(photo, (size, size)),  # for pictures that are aligned faces
}
"""Ways from a photo's (points, (width, height)) to an aligned face of a size."""

LANDMARKS = ("disc", "detect", "either")
FORMAT = 1


@dataclass(frozen=True)
class Plan:
    """How faces are aligned.

    Attributes:
        aligned_size: Width and height of the aligned face in pixels.
        margin: Pixels around it that are kept, too.
        alignment: One of `ALIGNMENTS`.
        landmarks: "disc" for the corpus' own, "detect" for the package's face detector, "either" for the
            corpus' own and the detector's where it has none.
        scheme: Landmark scheme of the result.
        quality: Of the JPEG pictures.
    """

    aligned_size: int
    margin: int
    alignment: str
    landmarks: str
    scheme: str
    quality: int


@dataclass(frozen=True)
class PreparedCorpus:
    """A corpus that `prepare_corpus` wrote.

    Attributes:
        faces: All faces, in the disc's order; their pictures are decoded when a batch asks.
        official: (N,) official partition of each, "" where there is none.
        sequences: (N,) names of the recordings.
        frames: (N,) frame numbers.
        manifest: What it was made of.
    """

    faces: AlignedFaces
    official: np.ndarray
    sequences: np.ndarray
    frames: np.ndarray
    manifest: dict[str, Any]

    def splits(
        self,
        fold: int | str | None = None,
        *,
        validation: float = 0.0,
        sample: float = 1.0,
        folds_file: str | Path | None = None,
    ) -> dict[str, AlignedFaces]:
        """Faces to train and to test on, and to validate on if some are held out; people are apart.

        Args:
            fold: Fold of the corpus' protocol; None or "" for the official one; "all" trains on everybody.
            validation: Share of the training people to hold out.
            sample: Equidistant share of the training faces (AUFormer Sec. 4.2).
            folds_file: Subject lists where none are built in.

        Returns:
            "train", "test" (or what the official partition has), and "validation" if `validation` is above 0.

        Raises:
            ValueError: As `actionunits.data.protocols.split_rows`.
        """
        people = self.faces.people
        if fold == "all":
            rows = {"train": np.arange(len(people))}
        else:
            name, chosen = self.manifest["corpus"], None if fold == "" else fold
            rows = split_rows(name, people, self.official, chosen, folds_file or None)
        rows = refine(rows, people, validation, sample)
        splits = {name: self.faces.select(indices) for name, indices in rows.items()}
        check_people_apart(**splits)
        return splits

    def part(self, split: str, fold: int | str | None = None) -> AlignedFaces:
        """One split of a fold, or "full" for all faces.

        Raises:
            ValueError: There is no such split or fold.
        """
        if split == "full":
            return self.faces
        splits = self.splits(fold)
        if split not in splits:
            raise ValueError(f"there is no split {split!r} here, but {[*splits, 'full']}.")
        return splits[split]


def prepare_corpus(
    name: str,
    data_dir: str | Path,
    output: str | Path,
    *,
    aligned_size: int = 200,
    margin: int = 20,
    alignment: str = "level_eyes",
    landmarks: str = "disc",
    quality: int = 95,
    shard_rows: int = 2048,
    workers: int | None = None,
    detector: Any = None,
    **options: Any,
) -> PreparedCorpus:
    """Align all faces of a corpus into `output`, or go on where an interrupted run stopped.

    A frame that cannot be read or aligned is left out and named in the manifest.

    Args:
        name: One of `actionunits.data.corpora.CORPORA` that has action units.
        data_dir: The corpus' folder.
        output: Folder of the result; files of another preparation in it are refused.
        aligned_size: Width and height of the aligned face in pixels.
        margin: Pixels around it that are kept, too; none around pictures that are aligned faces.
        alignment: "level_eyes", "five_point", or "none" for pictures that are aligned faces.
        landmarks: "disc", "detect" or "either"; see `Plan`.
        quality: Of the JPEG pictures.
        shard_rows: Frames of one Parquet file.
        workers: Threads; the number of cores (and some) by default.
        detector: Another `FaceDetector`, for "detect" and "either".
        options: `aus`, `frames` and `min_intensity` of `load_corpus`.

    Raises:
        ValueError: The corpus has no action units, an option is out of range, the folder holds another
            preparation, or no face was left.
        WrongCorpusError: `data_dir` holds something else.
    """
    corpus, root, folder = get_corpus(name), Path(data_dir), Path(output)
    if not isinstance(corpus, AUCorpus):
        raise ValueError(
            f"{corpus.title} is not prepared here: it has no frames with action units of its own."
        )
    _check_choice("alignment", alignment, ALIGNMENTS)
    _check_choice("landmarks", landmarks, LANDMARKS)
    if root.resolve() in (folder.resolve(), *folder.resolve().parents):
        raise ValueError(f"{folder} lies in the corpus' own folder {root}; prepare into another one.")
    rows = load_corpus(name, root, split="full", cache_dir=folder / "cache", **options)
    margin = 0 if alignment == "none" else margin
    plan = Plan(aligned_size, margin, alignment, landmarks, _scheme(rows, landmarks), quality)
    selection = corpus.select(root, **options)
    key = {
        "corpus": name,
        **vars(selection),
        **vars(plan),
        "disc": corpus.fingerprint(root, selection.frames),
        "rows": len(rows),
        "shard_rows": shard_rows,
        "format": FORMAT,
    }
    _claim(folder, json.loads(json.dumps(key)))
    shards = _align_all(folder, rows, Aligner(plan, root, detector), shard_rows, workers)
    _write_manifest(folder, key, shards)
    return open_prepared(folder)


def open_prepared(folder: str | Path) -> PreparedCorpus:
    """A corpus that `prepare_corpus` wrote.

    Args:
        folder: Its folder, or the URL of an object store that fsspec knows (s3://bucket/prepared), where its
            files were copied to; they are fetched into the cache of `datasets`.

    Raises:
        FileNotFoundError: There is none, or its preparation was interrupted.
        ValueError: No face is in it.
    """
    import datasets

    manifest = read_manifest(folder)
    if "faces" not in manifest:
        raise FileNotFoundError(
            f"{folder} holds no finished preparation; run `actionunits corpus prepare` (again: it goes on)."
        )
    if not manifest["faces"]:
        first = (manifest["skipped"] or ["no frames"])[0]
        raise ValueError(
            f"{folder} holds no face: all {manifest['rows']} frames were left out; the first: {first}"
        )
    system, path = url_to_fs(str(folder))
    files = [system.unstrip_protocol(file) for file in files_like(system, path, "faces-*-of-*.parquet")]
    cache = {"cache_dir": str(Path(path) / "cache")} if isinstance(system, LocalFileSystem) else {}
    rows = datasets.Dataset.from_parquet(as_patterns(files), **cache)
    if len(rows) != manifest["faces"]:
        raise FileNotFoundError(
            f"{folder} holds {len(rows)} of {manifest['faces']} faces: files are missing; copy them again, "
            "or run `actionunits corpus prepare` again."
        )
    columns = {name: np.asarray(rows[name][:]) for name in ("split", "sequence", "frame")}
    return PreparedCorpus(
        _as_faces(rows, manifest), columns["split"], columns["sequence"], columns["frame"], manifest
    )


def is_prepared(folder: str | Path) -> bool:
    """Whether a preparation lies in this folder, finished or not."""
    return "corpus" in read_manifest(folder)


class StoredPictures:
    """The pictures of Parquet files as an array (N, H, W, 3) uint8 that decodes what is asked of it."""

    def __init__(self, rows: datasets.Dataset):
        import datasets

        self.rows = rows.select_columns("image").cast_column("image", datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> np.ndarray:
        if isinstance(index, int | np.integer):
            return self._decode(self.rows[int(index)]["image"])
        return np.stack([self._decode(image) for image in self.rows[np.asarray(index).tolist()]["image"]])

    @staticmethod
    def _decode(image: dict[str, Any]) -> np.ndarray:
        return np.array(Image.open(BytesIO(image["bytes"])).convert("RGB"))


class Aligner:
    """From a corpus' row to a row of the result, or to the reason why there is none; threads may share it."""

    def __init__(self, plan: Plan, root: Path, detector: Any = None):
        self.plan, self.root = plan, root
        self._detector, self._lock = detector, threading.Lock()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any] | str:
        """Align one frame."""
        path = row["image"]["path"]
        try:
            picture = load_picture(path)
            points = self._points(row, picture)
            check_inside(points, *picture.size)
            size, margin = self.plan.aligned_size, self.plan.margin
            aligned = ALIGNMENTS[self.plan.alignment](points, picture.size, size)
            canvas = aligned.crop(-margin, -margin, size + 2 * margin, size + 2 * margin)
            buffer = BytesIO()
            canvas.warp(picture).save(buffer, "JPEG", quality=self.plan.quality)
        except (OSError, SyntaxError, ValueError) as error:
            return f"{path}: {error}".replace(f"{self.root}{os.sep}", "")  # the result may be published
        name = "/".join(str(row[part]) for part in ("subject", "sequence", "frame") if row[part] != "")
        return {
            **row,
            "image": {"bytes": buffer.getvalue(), "path": f"{name}.jpg"},
            "landmarks": canvas.transform(points).tolist(),
            "matrix": canvas.matrix.ravel().tolist(),
        }

    def _points(self, row: dict[str, Any], picture: Image.Image) -> np.ndarray:
        """Landmarks in pixels of the picture, in the plan's scheme."""
        if row["landmarks"] and self.plan.landmarks != "detect":
            points, scheme = check_landmarks(row["landmarks"])
            return reduce_landmarks(points, scheme, self.plan.scheme)
        if self.plan.landmarks == "disc":
            raise ValueError("the corpus has no landmarks of this frame")
        with self._lock:
            if self._detector is None:
                from actionunits.face_detection import FaceDetector

                self._detector = FaceDetector()
            faces = self._detector(picture)
        if not faces:
            raise ValueError("no face was found")
        return reduce_landmarks(faces[0].landmarks, faces[0].scheme, self.plan.scheme)


def _as_faces(rows: Any, manifest: dict[str, Any]) -> AlignedFaces:
    shift = np.array([[1, 0, -manifest["margin"]], [0, 1, -manifest["margin"]]], np.float32)
    count, m = len(rows), len(manifest["aus"])
    intensities = _numbers(rows, "intensities", np.float32)
    fixed = {
        "image",
        "landmarks",
        "matrix",
        "occurrence",
        "intensities",
        "subject",
        "sequence",
        "frame",
        "split",
    }
    return AlignedFaces(
        pictures=cast(np.ndarray, StoredPictures(rows)),  # indexed alike; decodes what is asked of it
        rows=np.arange(count),
        landmarks=_numbers(rows, "landmarks", np.float32).reshape(count, -1, 2),
        alignments=np.broadcast_to(shift, (count, 2, 3)).copy(),
        aligned_size=manifest["aligned_size"],
        scheme=manifest["scheme"],
        aus=tuple(manifest["aus"]),
        occurrence=_numbers(rows, "occurrence", np.int8).reshape(count, m),
        intensities=intensities.reshape(count, m) if len(intensities) else None,
        people=_text(rows, "subject"),
        groups={name: np.asarray(rows[name][:]) for name in rows.column_names if name not in fixed},
        skipped=tuple(manifest["skipped"]),
        sequences=np.char.add(np.char.add(_text(rows, "subject"), "/"), _text(rows, "sequence")),
    )


def _text(rows: Any, name: str) -> np.ndarray:
    return np.asarray(rows[name][:], dtype=str)


def _numbers(rows: Any, name: str, dtype: Any) -> np.ndarray:
    """A column of lists of numbers, one behind the other, without a detour through Python's lists."""
    values = rows.data.column(name).combine_chunks()
    while hasattr(values, "flatten") and hasattr(values.type, "value_type"):
        values = values.flatten()
    return values.to_numpy(zero_copy_only=False).astype(dtype)


def _align_all(folder: Path, rows: Any, aligner: Aligner, shard_rows: int, workers: int | None) -> int:
    """Write the shards that are not there yet; return how many there are in all."""
    spans = [range(start, min(start + shard_rows, len(rows))) for start in range(0, len(rows), shard_rows)]
    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=len(rows), desc=f"preparing {folder.name}", unit="frame", disable=None) as bar,
    ):
        for number, span in enumerate(spans):
            path = folder / f"faces-{number:05d}-of-{len(spans):05d}.parquet"
            if path.is_file():
                bar.update(len(span))
            else:
                _write_shard(path, rows.select(span), aligner, pool, bar)
    return len(spans)


def _write_shard(path: Path, rows: Any, aligner: Aligner, pool: ThreadPoolExecutor, bar: tqdm) -> None:
    """Align some rows into a file, which appears when it is complete."""
    import datasets
    import pyarrow.parquet

    rows = rows.cast_column("image", datasets.Image(decode=False))
    results = []
    for result in pool.map(aligner, rows):
        results.append(result)
        bar.update()
    done = [result for result in results if not isinstance(result, str)]
    skipped = [result for result in results if isinstance(result, str)]
    for reason in skipped:
        tqdm.write(f"left out {reason}")
    features = rows.features | {
        "image": datasets.Image(),
        "matrix": datasets.List(datasets.Value("float64"), length=6),  # pixels of the photo to the picture's
    }
    columns = {name: [row[name] for row in done] for name in features}  # type: ignore[index]
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features)).data.table
    metadata = {**(table.schema.metadata or {}), b"skipped": json.dumps(skipped).encode()}
    with whole_file(path) as part:
        pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), part)


def _claim(folder: Path, key: dict[str, Any]) -> None:
    """Make the folder ours, or refuse one that holds another preparation."""
    stored = read_manifest(folder)
    if changed := sorted(name for name in key if stored and stored.get(name) != key[name]):
        raise ValueError(
            f"{folder} holds a preparation with other values of {changed}; choose another or delete it."
        )
    if not stored:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "manifest.json", key)


def _write_manifest(folder: Path, key: dict[str, Any], shards: int) -> None:
    """Say what came out, from the files themselves."""
    import pyarrow.parquet

    files = [folder / f"faces-{number:05d}-of-{shards:05d}.parquet" for number in range(shards)]
    found = [pyarrow.parquet.read_metadata(file) for file in files]
    skipped = [reason for data in found for reason in json.loads(data.metadata[b"skipped"])]
    _write(folder / "manifest.json", {**key, "faces": sum(d.num_rows for d in found), "skipped": skipped})


def _write(path: Path, values: dict[str, Any]) -> None:
    with whole_file(path) as part:
        part.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _scheme(rows: Any, landmarks: str) -> str:
    """Scheme of the result: that of the disc's first points, or the detector's."""
    if landmarks != "detect":
        points = rows.select_columns("landmarks")
        if found := next((row["landmarks"] for row in points if row["landmarks"]), None):
            return get_scheme(len(found)).name
        if landmarks == "disc":
            raise ValueError("no frame of this disc has landmarks; pass landmarks='detect' (or 'either').")
    return "ibug68"


def _check_choice(name: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} is one of {list(known)}, not {value!r}.")
