"""A data set of faces that are decoded once, each with its landmarks and its alignment.

Decoding and alignment cost more than a small network's forward pass, so both are done once. The pictures are
kept unaligned in a memory-mapped array, next to the matrices that align them. `actionunits.data.collator`
warps a batch from the pictures to the model's input with a single interpolation.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from io import BytesIO
from mmap import mmap
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from actionunits.action_units import UNKNOWN, au_label
from actionunits.alignment import level_eyes
from actionunits.landmarks import get_scheme


@dataclass(frozen=True, eq=False)
class AlignedFaces(Dataset):
    """N faces in pictures of one size, with landmarks, labels and subjects.

    Attributes:
        pictures: (P, H, W, 3) uint8 RGB, usually a memory map; P >= N.
        rows: (N,) index into `pictures`.
        landmarks: (N, L, 2) float32 x, y in pixels of the picture.
        alignments: (N, 2, 3) float32 affine maps from pixels of the picture to pixels of the aligned face.
        aligned_size: Width and height of the aligned face in pixels.
        scheme: Name of the landmark scheme with L points.
        aus: FACS numbers of the m label columns.
        occurrence: (N, m) int8, 1, 0 or `UNKNOWN`.
        intensities: (N, m) float32 in [0, 1] or `UNKNOWN`; None if the corpus has none.
        people: (N,) names of the subjects.
        groups: Attributes of the subjects, such as "sex", each (N,).
        skipped: Pictures that could not be read, with the reason.
        sequences: (N,) names of the recordings, whose frames are in temporal order; None for photographs.
    """

    pictures: np.ndarray
    rows: np.ndarray
    landmarks: np.ndarray
    alignments: np.ndarray
    aligned_size: int
    scheme: str
    aus: tuple[int, ...]
    occurrence: np.ndarray
    intensities: np.ndarray | None
    people: np.ndarray
    groups: dict[str, np.ndarray]
    skipped: tuple[str, ...] = ()
    sequences: np.ndarray | None = None

    def __getstate__(self) -> dict[str, Any]:
        """The attributes, with a memory-mapped file replaced by its path, so that workers open it."""
        state, pictures = dict(vars(self)), self.pictures
        if isinstance(pictures, np.memmap) and isinstance(pictures.base, mmap):  # the whole file, no slice
            file = Path(pictures.filename or "")
            state["pictures"] = file if file.suffix == ".npy" else pictures
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if isinstance(state["pictures"], Path):
            state = {**state, "pictures": np.load(state["pictures"], mmap_mode="r")}
        vars(self).update(state)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: values[0] for name, values in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """A stacked batch; PyTorch's data loader prefers this method to `__getitem__`."""
        chosen = np.asarray(indices)
        batch = {
            "pictures": torch.from_numpy(self.pictures[self.rows[chosen]]),
            "landmarks": torch.from_numpy(self.landmarks[chosen]),
            "alignments": torch.from_numpy(self.alignments[chosen]),
            "occurrence": torch.from_numpy(self.occurrence[chosen]),
        }
        if self.intensities is not None:
            batch["intensities"] = torch.from_numpy(self.intensities[chosen])
        return batch

    def select(self, indices: Any) -> AlignedFaces:
        """The faces at these indices (or where a mask is true), in this order."""
        indices = np.arange(len(self))[indices]
        return replace(
            self,
            rows=self.rows[indices],
            landmarks=self.landmarks[indices],
            alignments=self.alignments[indices],
            occurrence=self.occurrence[indices],
            intensities=None if self.intensities is None else self.intensities[indices],
            people=self.people[indices],
            groups={name: values[indices] for name, values in self.groups.items()},
            sequences=None if self.sequences is None else self.sequences[indices],
        )

    def with_aus(self, aus: Sequence[int]) -> AlignedFaces:
        """The same faces with these label columns, in this order.

        Raises:
            ValueError: The corpus lacks labels of one of them.
        """
        if missing := [au_label(au) for au in aus if au not in self.aus]:
            raise ValueError(
                f"the corpus has no labels of {missing}; it has {[au_label(a) for a in self.aus]}."
            )
        columns = [self.aus.index(au) for au in aus]
        return replace(
            self,
            aus=tuple(aus),
            occurrence=self.occurrence[:, columns],
            intensities=None if self.intensities is None else self.intensities[:, columns],
        )

    def picture(self, index: int) -> Image.Image:
        """The picture of a face, for the image processor or for display."""
        return Image.fromarray(self.pictures[self.rows[index]])

    def occurrence_rates(self) -> list[float]:
        """Occurrence rate of each AU among its known labels (ESCDA Eq. 8), 0 where none is known."""
        known = (self.occurrence != UNKNOWN).sum(axis=0)
        return ((self.occurrence == 1).sum(axis=0) / np.maximum(known, 1)).tolist()


def check_people_apart(**splits: AlignedFaces) -> None:
    """Check that splits are subject-exclusive.

    Raises:
        ValueError: A subject is in two splits.
    """
    names = list(splits)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            if shared := sorted(set(splits[first].people) & set(splits[second].people)):
                raise ValueError(
                    f"{len(shared)} people are both in {first} and {second}, such as {str(shared[0])!r}; "
                    "split the corpus by person."
                )


def prepare_faces(
    folder: Path,
    records: Iterable[dict[str, Any]],
    count: int,
    aus: Sequence[int],
    scheme: str,
    key: dict[str, Any],
    aligned_size: int = 200,
) -> AlignedFaces:
    """Decode and align pictures into `folder`, or open the folder if it was prepared with the same `key`.

    Unreadable pictures are skipped and listed in `skipped`. The folder appears when it is complete.

    Args:
        folder: Folder of the arrays.
        records: One per picture: `{"image": encoded bytes, "landmarks": (L, 2), "occurrence": (m,),
            "intensities": (m,) or None, "person": str, "groups": {name: value}}`; or, to skip it,
            `{"unreadable": reason, "person": str}`.
        count: Number of records.
        aus: FACS numbers of the m labels.
        scheme: Name of the landmark scheme.
        key: All that the result depends on (JSON); if it changes, the faces are prepared again.
        aligned_size: Width and height of the aligned face in pixels.

    Raises:
        ValueError: No picture could be read, or two have different sizes.
    """
    key = {**key, "aus": list(aus), "scheme": scheme, "aligned_size": aligned_size, "format": 1}
    if not _holds(folder, key):
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        bar = tqdm(records, total=count, desc=f"preparing {folder.name}", unit="picture", disable=None)
        _write_arrays(partial, bar, count, scheme, aligned_size)
        (partial / "key.json").write_text(json.dumps(key))
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    return _open(folder, key)


def _holds(folder: Path, key: dict[str, Any]) -> bool:
    stored = folder / "key.json"
    return stored.is_file() and json.loads(stored.read_text()) == json.loads(json.dumps(key))


def _open(folder: Path, key: dict[str, Any]) -> AlignedFaces:
    with np.load(folder / "faces.npz") as arrays:
        columns = dict(arrays)
    return AlignedFaces(
        pictures=np.load(folder / "pictures.npy", mmap_mode="r"),
        **{name: columns.pop(name) for name in ("rows", "landmarks", "alignments", "occurrence", "people")},
        intensities=columns.pop("intensities", None),
        skipped=tuple(columns.pop("skipped")),
        groups={name.removeprefix("group_"): values for name, values in columns.items()},
        aligned_size=key["aligned_size"],
        scheme=key["scheme"],
        aus=tuple(key["aus"]),
    )


def _write_arrays(folder: Path, records: Iterable[dict], count: int, scheme: str, aligned_size: int) -> None:
    pictures: np.memmap | None = None
    rows: list[int] = []
    columns: dict[str, list] = {}
    skipped: list[str] = []
    with ThreadPoolExecutor() as pool:
        for row, (record, decoded) in enumerate(_ahead(pool, records)):
            if isinstance(decoded, str):
                skipped.append(f"picture {row} ({record['person']}): {decoded}")
                continue
            if pictures is None:
                pictures = np.lib.format.open_memmap(
                    folder / "pictures.npy", mode="w+", dtype=np.uint8, shape=(count, *decoded.shape)
                )
            if decoded.shape != pictures.shape[1:]:
                size, first = (f"{s[1]}x{s[0]}" for s in (decoded.shape, pictures.shape[1:]))
                raise ValueError(f"picture {row} is {size}, the first was {first}; make all of one size.")
            pictures[row] = decoded
            rows.append(row)
            _append(columns, record, scheme, aligned_size)
    if pictures is None:
        raise ValueError(
            f"none of {count} pictures could be read; the first: {(skipped or ['no records'])[0]}"
        )
    pictures.flush()
    arrays = {name: np.asarray(values) for name, values in columns.items()}
    arrays |= {"rows": np.asarray(rows), "skipped": np.asarray(skipped, dtype=str)}
    np.savez(folder / "faces.npz", **arrays)  # type: ignore[arg-type]


def _append(columns: dict[str, list], record: dict[str, Any], scheme: str, aligned_size: int) -> None:
    landmarks = np.asarray(record["landmarks"], np.float32)
    values = {
        "landmarks": landmarks,
        "alignments": level_eyes(landmarks, get_scheme(scheme), aligned_size).matrix.astype(np.float32),
        "occurrence": np.asarray(record["occurrence"], np.int8),
        "people": str(record["person"]),
        **{f"group_{name}": str(value) for name, value in record["groups"].items()},
    }
    if record["intensities"] is not None:
        values["intensities"] = np.asarray(record["intensities"], np.float32)
    for name, value in values.items():
        columns.setdefault(name, []).append(value)


def _ahead(pool: ThreadPoolExecutor, records: Iterable[dict], window: int = 64) -> Iterable[tuple[dict, Any]]:
    """Each record with its picture, or the reason why there is none; threads decode a window at a time."""
    waiting: list[dict] = []
    for record in records:
        waiting.append(record)
        if len(waiting) == window:
            yield from zip(waiting, pool.map(_decode, waiting), strict=True)
            waiting = []
    yield from zip(waiting, pool.map(_decode, waiting), strict=True)


def _decode(record: dict[str, Any]) -> np.ndarray | str:
    if "unreadable" in record:
        return record["unreadable"]
    try:
        return np.asarray(Image.open(BytesIO(record["image"])).convert("RGB"))
    except Exception as error:  # Pillow's decoders raise exceptions of many kinds
        return f"{type(error).__name__}: {error}"
