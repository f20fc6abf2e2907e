"""Triplets of expressions: anchor, positive and negative, the face least similar to the other two.

There are two sources. FEC (Vemulapalli & Agarwala, CVPR 2019) has triplets of web photographs with human
annotations; see `actionunits.data.corpora.fec` for its layout. Only downloaded photographs are used. In the
open synthetic corpus, any three faces are compared by the distances of their `expression_vectors`, computed
from AU intensities, so that a batch of pictures has thousands of triplets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from actionunits.data.aligned_faces import AlignedFaces, prepare_faces
from actionunits.data.corpora.fec import read_triplets
from actionunits.files import file_version
from actionunits.pictures import PictureError, load_picture

FEC_MARGINS = {"ONE_CLASS_TRIPLET": 0.1, "TWO_CLASS_TRIPLET": 0.2, "THREE_CLASS_TRIPLET": 0.2}
"""Margin of the triplet loss by type of triplet, as in FEC's paper."""

LEAST_CONFIDENCE = 0.5
"""Lowest confidence of the landmarks in a box of FEC."""

FACE_SIDE = 256
"""Side in pixels of the square kept of a photograph, twice as large as the face's box."""


@dataclass(frozen=True, eq=False)
class ExpressionTriplets(Dataset):
    """A data set of T triplets of faces.

    Attributes:
        faces: The N faces; labels are not used.
        triplets: (T, 3) int64 indices of `faces`: anchor, positive and negative.
        margins: (T,) float32 margin of each in the triplet loss.
    """

    faces: AlignedFaces
    triplets: np.ndarray
    margins: np.ndarray

    def __len__(self) -> int:
        return len(self.triplets)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: values[0] for name, values in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """A batch of B: `pictures` (B, 3, H, W, 3) uint8, `alignments` (B, 3, 2, 3) and `margins` (B,)."""
        rows = self.triplets[np.asarray(indices)]
        faces = self.faces.__getitems__(rows.reshape(-1))
        batch = {name: faces[name].unflatten(0, rows.shape) for name in ("pictures", "alignments")}
        return batch | {"margins": torch.from_numpy(self.margins[np.asarray(indices)])}

    def draw(self, count: int, random: np.random.Generator) -> dict[str, torch.Tensor]:
        """Draw a batch of `count` triplets, in the form of `ComparableFaces.draw`."""
        batch = self.__getitems__(random.integers(len(self), size=count).tolist())
        triplets = torch.arange(3 * count).view(count, 3)
        pictures, alignments = batch["pictures"].flatten(0, 1), batch["alignments"].flatten(0, 1)
        return batch | {"pictures": pictures, "alignments": alignments, "triplets": triplets}


@dataclass(frozen=True, eq=False)
class ComparableFaces:
    """Faces with known AU intensities, any three of which can form a triplet.

    Attributes:
        faces: The N faces, with intensities.
        triplets_of_batch: Triplets per batch.
        min_contrast: See `triplets_by_distance`.
        margin: Margin of the triplet loss.
    """

    faces: AlignedFaces
    triplets_of_batch: int = 4096
    min_contrast: float = 1.3
    margin: float = 0.2

    def __len__(self) -> int:
        return len(self.faces)

    def draw(self, count: int, random: np.random.Generator) -> dict[str, torch.Tensor]:
        """Draw as many pictures as `count` triplets have, and form triplets of all of them.

        Args:
            count: A third of the number of pictures P, which is at most N.
            random: Generator.

        Returns:
            `pictures` (P, H, W, 3) uint8, `alignments` (P, 2, 3), `intensities` (P, m); `triplets` (T, 3),
            rows of the anchor, positive and negative; `margins` (T,).
        """
        rows = random.permutation(len(self))[: 3 * count]
        batch = self.faces.__getitems__(rows.tolist())
        vectors = expression_vectors(batch["intensities"].numpy())
        seed = int(random.integers(2**32))
        triplets = triplets_by_distance(vectors, self.triplets_of_batch, seed, self.min_contrast)
        return {
            "pictures": batch["pictures"],
            "alignments": batch["alignments"],
            "intensities": batch["intensities"],
            "triplets": torch.from_numpy(triplets),
            "margins": torch.full((len(triplets),), self.margin),
        }

    def triplets(self, count: int, seed: int) -> ExpressionTriplets:
        """A fixed set of `count` triplets for evaluation."""
        vectors = expression_vectors(np.asarray(self.faces.intensities))
        triplets = triplets_by_distance(vectors, count, seed, self.min_contrast)
        return ExpressionTriplets(self.faces, triplets, np.full(count, self.margin, np.float32))


# FEC


@dataclass(frozen=True)
class FecTable:
    """The triplets of a CSV file of FEC whose photographs exist.

    Attributes:
        files: The photographs of the F faces.
        boxes: (F, 4) xmin, ymin, xmax, ymax relative to width and height.
        triplets: (T, 3) int64 indices of faces: anchor, positive, negative.
        margins: (T,) float32 margin of each in the triplet loss.
        counts: Number of triplets: "triplets" in the file, "undecided", "without a photograph".
    """

    files: tuple[Path, ...]
    boxes: np.ndarray
    triplets: np.ndarray
    margins: np.ndarray
    counts: dict[str, int]


def read_fec(table: str | Path, photographs: str | Path, agreement: float = 2 / 3) -> FecTable:
    """Read a CSV file of FEC, such as `faceexp-comparison-data-train-public.csv`.

    Args:
        table: The file.
        photographs: Folder of downloaded photographs, named as at the end of their addresses.
        agreement: Smallest share of raters who agree on the negative; two thirds in FEC's paper.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: A row is not a triplet, or no triplet remains.
    """
    folder = Path(photographs)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; download FEC's photographs into it first.")
    there = {path.name for path in folder.iterdir() if path.is_file()}  # not links to nothing
    faces: dict[tuple[str, tuple[float, ...]], int] = {}
    triplets, margins, counts = [], [], {"triplets": 0, "undecided": 0, "without a photograph": 0}
    for row in read_triplets(Path(table), folder):
        counts["triplets"] += 1
        odd, votes = Counter(row["votes"]).most_common(1)[0]
        if votes < agreement * len(row["votes"]) - 1e-9:
            counts["undecided"] += 1
        elif not all(Path(image).name in there for image in row["images"]):
            counts["without a photograph"] += 1
        else:
            pairs = zip(row["images"], map(tuple, row["boxes"]), strict=True)
            numbers = [faces.setdefault(face, len(faces)) for face in pairs]
            negative = numbers.pop(odd - 1)
            triplets.append([*numbers, negative])
            margins.append(_margin(row["type"], table))
    if not triplets:
        raise ValueError(f"{table} leaves no triplet with the photographs in {folder}: {counts}.")
    files, boxes = zip(*faces, strict=True)
    return FecTable(
        tuple(map(Path, files)), np.array(boxes), np.array(triplets), np.array(margins, np.float32), counts
    )


def prepare_fec(
    table: FecTable, folder: str | Path, detector: Any, aligned_size: int = 200
) -> ExpressionTriplets:
    """Crop, decode and align FEC's faces into `folder`, where the next run finds them.

    Args:
        table: The triplets, from `read_fec`.
        folder: Folder of the arrays.
        detector: `FaceDetector` that locates the landmarks in FEC's boxes.
        aligned_size: Width and height of the aligned face in pixels.

    Returns:
        The triplets of readable faces; `faces.skipped` lists the others.

    Raises:
        ValueError: No photograph could be read.
    """
    faces = prepare_faces(
        Path(folder),
        _fec_records(table, detector),
        count=len(table.files),
        aus=(),
        scheme="ibug68",
        key={"files": list(map(file_version, table.files)), "boxes": table.boxes.tolist()},
        aligned_size=aligned_size,
    )
    place = np.full(len(table.files), -1)
    place[faces.rows] = np.arange(len(faces))
    triplets = place[table.triplets]
    readable = (triplets >= 0).all(axis=1)
    return ExpressionTriplets(faces, triplets[readable], table.margins[readable])


# Corpora with intensities


def expression_vectors(intensities: np.ndarray, weak: float = 0.3) -> np.ndarray:
    """Normalize AU intensities (N, m) to unit vectors, which show the kind of expression, not its strength.

    By distances of the intensities themselves any two weak expressions are similar: anchor and positive share
    an action unit in only a quarter of the triplets. Vectors shorter than `weak` are divided by `weak`, so
    that nearly neutral faces remain close to each other, at the origin.
    """
    length = np.linalg.norm(intensities, axis=1, keepdims=True)
    return intensities / np.maximum(length, weak)


def triplets_by_distance(
    vectors: np.ndarray, count: int, seed: int = 0, min_contrast: float = 1.3, attempts: int = 200
) -> np.ndarray:
    """Draw triplets with two clearly more similar faces, by the distances of their vectors.

    Args:
        vectors: (N, m), such as `expression_vectors`.
        count: T, the number of triplets.
        seed: Seed of the draw.
        min_contrast: Smallest ratio of either distance to the negative and the distance between anchor and
            positive, which must be above 0.
        attempts: Rounds of `count` draws each.

    Returns:
        (T, 3) int64: anchor, positive, negative.

    Raises:
        ValueError: Too few such triplets are found.
    """
    random, found = np.random.default_rng(seed), []
    for _ in range(attempts):
        drawn = random.integers(len(vectors), size=(count, 3))
        distances = np.stack([_distance(vectors, drawn, pair) for pair in ((1, 2), (0, 2), (0, 1))], axis=1)
        odd = distances.argmin(1)  # the k-th distance is that of the pair without the k-th face
        near, middle, _ = np.sort(distances, axis=1).T
        is_clear = (near > 0) & (middle > min_contrast * near)
        order = np.stack([(odd + 1) % 3, (odd + 2) % 3, odd], axis=1)
        found.append(np.take_along_axis(drawn, order, axis=1)[is_clear])
        if sum(map(len, found)) >= count:
            return np.concatenate(found)[:count]
    raise ValueError(
        f"Only {sum(map(len, found))} of {count} triplets found among {len(vectors)} faces; lower "
        f"min_contrast={min_contrast}."
    )


def _distance(vectors: np.ndarray, rows: np.ndarray, pair: tuple[int, int]) -> np.ndarray:
    return np.linalg.norm(vectors[rows[:, pair[0]]] - vectors[rows[:, pair[1]]], axis=1)


def _margin(kind: str, table: str | Path) -> float:
    if kind not in FEC_MARGINS:
        raise ValueError(f"{table}: a triplet of type {kind!r}; known are {', '.join(FEC_MARGINS)}.")
    return FEC_MARGINS[kind]


def _fec_records(table: FecTable, detector: Any) -> Iterator[dict[str, Any]]:
    """Faces as records of `prepare_faces`: crops of one size, with landmarks in their pixels."""
    for file, box in zip(table.files, table.boxes, strict=True):
        record: dict[str, Any] = {"occurrence": [], "intensities": None, "person": file.name, "groups": {}}
        try:
            photograph = load_picture(file)
            # Boxes of faces at the border extend beyond the photograph.
            pixels = box.clip(0, 1) * np.tile(photograph.size, 2) - 0.5
            face = detector.locate(photograph, [pixels])[0]
            if face.confidence < LEAST_CONFIDENCE:
                raise ValueError(f"the landmarks have a confidence of {face.confidence:.2f} only")
            picture, landmarks = _cut_out(photograph, pixels, face.landmarks)
            yield {"image": picture, "landmarks": landmarks, **record}
        except (PictureError, ValueError) as error:
            yield {"unreadable": str(error), "person": file.name}


def _cut_out(photograph: Image.Image, box: np.ndarray, landmarks: np.ndarray) -> tuple[bytes, np.ndarray]:
    """The square around a face, twice as large as its box, as PNG, and the landmarks in its pixels."""
    centre, side = (box[:2] + box[2:]) / 2 + 0.5, 2 * float((box[2:] - box[:2]).max())
    left, top = centre - side / 2
    square = (left, top, left + side, top + side)
    shrink = max(1, int(side / FACE_SIDE))  # antialiasing, if the photograph has more pixels
    size = (shrink * FACE_SIDE, shrink * FACE_SIDE)
    cut = photograph.transform(size, Image.Transform.EXTENT, square, Image.Resampling.BILINEAR).reduce(shrink)
    encoded = BytesIO()
    cut.save(encoded, "PNG", compress_level=1)
    return encoded.getvalue(), (landmarks + 0.5 - [left, top]) * (FACE_SIDE / side) - 0.5
