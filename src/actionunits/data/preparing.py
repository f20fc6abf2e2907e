"""Align a corpus once, for all folds: Parquet files of small aligned faces with landmarks and labels.

Decoding and warping large pictures costs more than training on them. `prepare_corpus` does it once, in
parallel, and writes

    FOLDER/faces-00000-of-00072.parquet ...   image (JPEG of the aligned face), landmarks, labels, subject
           manifest.json                      source and options; frames that were left out

Shards appear when they are complete, so an interrupted command can be repeated and loses at most one shard.
The margin around the aligned face lets augmentation rotate and shift it.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from fsspec.implementations.local import LocalFileSystem
from PIL import Image
from tqdm import tqdm

from actionunits.alignment import Alignment, five_point, identity, level_eyes
from actionunits.data.aligned_faces import AlignedFaces, check_people_apart
from actionunits.data.corpora import get_corpus, load_corpus
from actionunits.data.corpora.base import AUCorpus, Corpus
from actionunits.data.protocols import refine, split_rows
from actionunits.data.synthetic import as_patterns, file_system, files_like, read_manifest
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
"""Alignments by name: functions of landmarks, the picture's (width, height) and the aligned face's size."""

LANDMARKS = ("disc", "detect", "either")
LABELS = ("occurrence", "intensities")
COLUMNS = ("image", "landmarks", "matrix", *LABELS, "subject", "sequence", "frame", "split")
"""Columns of the Parquet files; others are attributes of the subject."""
FORMAT = 1


@dataclass(frozen=True)
class Plan:
    """How faces are aligned.

    Attributes:
        aligned_size: Width and height of the aligned face in pixels.
        margin: Pixels kept around it.
        alignment: A key of `ALIGNMENTS`.
        landmarks: "disc" for the corpus' own, "detect" for those of the face detector, "either" for the
            corpus' own or, where it has none, the detector's.
        scheme: Landmark scheme of the result.
        quality: JPEG quality.
    """

    aligned_size: int
    margin: int
    alignment: str
    landmarks: str
    scheme: str
    quality: int


@dataclass(frozen=True)
class PreparedCorpus:
    """A corpus prepared by `prepare_corpus`.

    Attributes:
        faces: All faces, in the corpus' order; pictures are decoded batch by batch.
        official: (N,) splits of the official partition, "" where there is none.
        sequences: (N,) names of the recordings.
        frames: (N,) frame numbers.
        manifest: Source and options of the preparation.
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
        """Subject-exclusive splits for training, test and optionally validation.

        Args:
            fold: Fold of the corpus' protocol; None or "" for the official partition; "all" trains on all.
            validation: Share of the training subjects to hold out for validation.
            sample: Equidistant share of the training faces (AUFormer Sec. 4.2).
            folds_file: Subject lists where none are built in.

        Returns:
            "train", "test" (or the official splits), and "validation" if `validation` is above 0.

        Raises:
            ValueError: As in `actionunits.data.protocols.split_rows`.
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
    """Align all faces of a corpus into `output`, or resume an interrupted preparation.

    Frames that cannot be read or aligned are left out and listed in the manifest.

    Args:
        name: One of `actionunits.data.corpora.CORPORA` that has action units.
        data_dir: The corpus' folder.
        output: Folder of the result; it must not hold another preparation.
        aligned_size: Width and height of the aligned face in pixels.
        margin: Pixels kept around it, unless `alignment` is "none".
        alignment: "level_eyes", "five_point", or "none" for pictures of aligned faces.
        landmarks: "disc", "detect" or "either"; see `Plan`.
        quality: JPEG quality.
        shard_rows: Frames per Parquet file.
        workers: Number of threads; by default that of `ThreadPoolExecutor`.
        detector: `FaceDetector` for "detect" and "either"; by default a new one.
        options: `aus`, `frames` and `min_intensity` of `load_corpus`.

    Raises:
        ValueError: The corpus has no action units, an option is out of range, the folder holds another
            preparation, or no face can be aligned.
        WrongCorpusError: `data_dir` holds something else.
    """
    corpus, root, folder = get_corpus(name), Path(data_dir), Path(output)
    _check_arguments(corpus, root, folder, alignment, landmarks)
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
    """Open a corpus prepared by `prepare_corpus`.

    Args:
        folder: Its folder, or the URL of a copy that fsspec can read (s3://bucket/prepared), which is
            downloaded into the cache of `datasets`.

    Raises:
        FileNotFoundError: There is none, it was interrupted, or files are missing.
        ValueError: It has no face.
    """
    import datasets

    manifest = read_manifest(folder)
    if "faces" not in manifest:
        raise FileNotFoundError(
            f"{folder} holds no finished preparation; run `actionunits corpus prepare` (again, it resumes)."
        )
    if not manifest["faces"]:
        first = (manifest["skipped"] or ["no frames"])[0]
        raise ValueError(
            f"{folder} holds no face: all {manifest['rows']} frames were left out; the first: {first}"
        )
    system, path = file_system(folder)
    files = [system.unstrip_protocol(file) for file in files_like(system, path, "faces-*-of-*.parquet")]
    cache = {"cache_dir": str(Path(path) / "cache")} if isinstance(system, LocalFileSystem) else {}
    rows = datasets.Dataset.from_parquet(as_patterns(files), **cache)
    if len(rows) != manifest["faces"]:
        raise FileNotFoundError(
            f"{folder} holds {len(rows)} of {manifest['faces']} faces: files are missing; copy them again "
            "or repeat `actionunits corpus prepare`."
        )
    columns = {name: np.asarray(rows[name][:]) for name in ("split", "sequence", "frame")}
    return PreparedCorpus(
        _as_faces(rows, manifest), columns["split"], columns["sequence"], columns["frame"], manifest
    )


def is_prepared(folder: str | Path) -> bool:
    """Whether the folder holds a preparation, finished or not."""
    return "corpus" in read_manifest(folder)


class StoredPictures:
    """The pictures of Parquet files as an array (N, H, W, 3) uint8 that is decoded when indexed."""

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
    """Turns a corpus' row into an aligned one, or the reason why it cannot. Threads can share it."""

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
            return f"{path}: {error}".replace(
                f"{self.root}{os.sep}", ""
            )  # without the root, as the result may be published
        name = "/".join(str(row[part]) for part in ("subject", "sequence", "frame") if row[part] != "")
        return {
            **row,
            "image": {"bytes": buffer.getvalue(), "path": f"{name}.jpg"},
            "landmarks": canvas.transform(points).tolist(),
            "matrix": canvas.matrix.ravel().tolist(),
        }

    def _points(self, row: dict[str, Any], picture: Image.Image) -> np.ndarray:
        """Landmarks (L, 2) in pixels of the picture, in the plan's scheme."""
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


def _check_arguments(corpus: Corpus, root: Path, folder: Path, alignment: str, landmarks: str) -> None:
    if not isinstance(corpus, AUCorpus):
        raise ValueError(f"{corpus.title} is not prepared here: it has no frames with action unit labels.")
    if alignment not in ALIGNMENTS:
        raise ValueError(f"alignment is one of {list(ALIGNMENTS)}, not {alignment!r}.")
    if landmarks not in LANDMARKS:
        raise ValueError(f"landmarks is one of {list(LANDMARKS)}, not {landmarks!r}.")
    if root.resolve() in (folder.resolve(), *folder.resolve().parents):
        raise ValueError(f"{folder} lies in the corpus' own folder {root}; prepare into another one.")
    file_system(folder)  # raises if the result could not be opened


def _as_faces(rows: Any, manifest: dict[str, Any]) -> AlignedFaces:
    shift = np.array([[1, 0, -manifest["margin"]], [0, 1, -manifest["margin"]]], np.float32)
    count, m = len(rows), len(manifest["aus"])
    intensities = _numbers(rows, "intensities", np.float32)
    return AlignedFaces(
        pictures=cast(np.ndarray, StoredPictures(rows)),  # decoded when indexed
        rows=np.arange(count),
        landmarks=_numbers(rows, "landmarks", np.float32).reshape(count, -1, 2),
        alignments=np.broadcast_to(shift, (count, 2, 3)).copy(),
        aligned_size=manifest["aligned_size"],
        scheme=manifest["scheme"],
        aus=tuple(manifest["aus"]),
        occurrence=_numbers(rows, "occurrence", np.int8).reshape(count, m),
        intensities=intensities.reshape(count, m) if len(intensities) else None,
        people=_text(rows, "subject"),
        groups={name: np.asarray(rows[name][:]) for name in rows.column_names if name not in COLUMNS},
        skipped=tuple(manifest["skipped"]),
        sequences=np.char.add(np.char.add(_text(rows, "subject"), "/"), _text(rows, "sequence")),
    )


def _text(rows: Any, name: str) -> np.ndarray:
    return np.asarray(rows[name][:], dtype=str)


def _numbers(rows: Any, name: str, dtype: Any) -> np.ndarray:
    """A column of (nested) lists as a flat array, without Python lists in between."""
    values = rows.data.column(name).combine_chunks()
    while hasattr(values, "flatten") and hasattr(values.type, "value_type"):
        values = values.flatten()
    return values.to_numpy(zero_copy_only=False).astype(dtype)


def _align_all(folder: Path, rows: Any, aligner: Aligner, shard_rows: int, workers: int | None) -> int:
    """Write the missing shards; return the number of all shards."""
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
    """Align rows into a file, which appears when it is complete."""
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
        "matrix": datasets.List(datasets.Value("float64"), length=6),  # from the original picture's pixels
    }
    columns = {name: [row[name] for row in done] for name in features}  # type: ignore[index]
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features)).data.table
    metadata = {**(table.schema.metadata or {}), b"skipped": json.dumps(skipped).encode()}
    with whole_file(path) as part:
        pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), part)


def _claim(folder: Path, key: dict[str, Any]) -> None:
    """Store the key in the folder, or check that the stored one is the same."""
    stored = read_manifest(folder)
    if changed := sorted(name for name in key if stored and stored.get(name) != key[name]):
        raise ValueError(
            f"{folder} holds a preparation with other values of {changed}; use another folder or delete it."
        )
    if not stored:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "manifest.json", key)


def _write_manifest(folder: Path, key: dict[str, Any], shards: int) -> None:
    """Complete the manifest by what the shards hold."""
    import pyarrow.parquet

    files = [folder / f"faces-{number:05d}-of-{shards:05d}.parquet" for number in range(shards)]
    found = [pyarrow.parquet.read_metadata(file) for file in files]
    skipped = [reason for data in found for reason in json.loads(data.metadata[b"skipped"])]
    _write(folder / "manifest.json", {**key, "faces": sum(d.num_rows for d in found), "skipped": skipped})


def _write(path: Path, values: dict[str, Any]) -> None:
    with whole_file(path) as part:
        part.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _scheme(rows: Any, landmarks: str) -> str:
    """Scheme of the result: that of the corpus' first landmarks, or the detector's."""
    if landmarks != "detect":
        points = rows.select_columns("landmarks")
        if found := next((row["landmarks"] for row in points if row["landmarks"]), None):
            return get_scheme(len(found)).name
        if landmarks == "disc":
            raise ValueError("the corpus' folder has no landmarks; pass landmarks='detect' (or 'either').")
    return "ibug68"
