"""Alignment of a face: one object that maps pictures and points together, back and forth.

`level_eyes` is the alignment of JAA-Net, AC2D and ESCDA (200 x 200, then a 176 x 176 crop), `five_point` a
template for networks that expect 224 or 256 pixels. Coordinates are (x, y) in pixels; integers are pixel
centres.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from actionunits.landmarks import LandmarkScheme, check_landmarks, reduce_landmarks


@dataclass(frozen=True, eq=False)
class Alignment:
    """An affine map from a photo to an aligned picture.

    It is immutable: `crop`, `resize` and `flip` return new ones.

    Attributes:
        matrix: (2, 3) float64, photo pixel (x, y, 1) -> aligned pixel (x, y).
        size: Width and height of the aligned picture in pixels.
    """

    matrix: np.ndarray
    size: tuple[int, int]

    def __post_init__(self) -> None:
        """Check and freeze the matrix."""
        matrix = np.array(self.matrix, dtype=np.float64)
        if matrix.shape != (2, 3) or not np.isfinite(matrix).all() or np.linalg.det(matrix[:, :2]) == 0:
            raise ValueError(
                f"An alignment needs an invertible (2, 3) matrix of numbers, got {matrix.tolist()}."
            )
        if len(self.size) != 2 or min(self.size) < 1:
            raise ValueError(
                f"An alignment needs a size (width, height) of at least one pixel, got {self.size}."
            )
        matrix.setflags(write=False)
        object.__setattr__(self, "matrix", matrix)
        object.__setattr__(self, "size", (int(self.size[0]), int(self.size[1])))

    @property
    def inverse_matrix(self) -> np.ndarray:
        """(2, 3) float64, aligned pixel (x, y, 1) -> photo pixel (x, y)."""
        inverse = np.linalg.inv(self.matrix[:, :2])
        return np.column_stack([inverse, -inverse @ self.matrix[:, 2]])

    def transform(self, points: Any) -> np.ndarray:
        """Map points (..., 2) from the photo to the aligned picture."""
        return _apply(self.matrix, points)

    def inverse_transform(self, points: Any) -> np.ndarray:
        """Map points (..., 2) from the aligned picture to the photo."""
        return _apply(self.inverse_matrix, points)

    def warp(
        self, image: Image.Image, fill: tuple[int, int, int] = (128, 128, 128), antialias: bool = True
    ) -> Image.Image:
        """Draw the aligned picture, with bilinear interpolation.

        Args:
            image: The photo, mode "L" or "RGB".
            fill: Colour outside of the photo; mode "L" uses its first number.
            antialias: Average blocks of photo pixels first where an aligned pixel covers two or more.

        Returns:
            A picture of the same mode and of `size` (Pillow truncates the interpolated values).

        Raises:
            ValueError: The picture has another mode.
        """
        if image.mode not in ("L", "RGB"):
            raise ValueError(
                f"warp takes pictures of mode 'L' or 'RGB', got {image.mode!r}; convert it first."
            )
        to_photo = self.inverse_matrix
        # The smaller singular value: photo pixels per aligned pixel where the picture shrinks least.
        factor = int(np.linalg.svd(to_photo[:, :2], compute_uv=False).min() + 1e-6) if antialias else 1
        if factor > 1:
            image = image.reduce(factor)
            # The centre of a reduced pixel is the mean of the centres of its originals.
            to_photo = _scaling(1 / factor, 1 / factor) @ np.vstack([to_photo, [0, 0, 1]])
        return _resample(image, to_photo, self.size, fill if image.mode == "RGB" else fill[0])

    def warp_back(self, map_: np.ndarray, photo_size: tuple[int, int]) -> np.ndarray:
        """Draw a map of the aligned picture onto the photo, with bilinear interpolation.

        Args:
            map_: (H, W), as large as the aligned picture; for a map of w x h cells call `resize(w, h)` first.
            photo_size: Width and height of the photo in pixels.

        Returns:
            (height, width) float32 on the photo, zero outside of the aligned picture.

        Raises:
            ValueError: The map is not as large as the aligned picture.
        """
        values = np.asarray(map_, dtype=np.float32)
        if values.shape != self.size[::-1]:
            raise ValueError(
                f"The map has shape {values.shape}, the aligned picture (height, width) {self.size[::-1]}; "
                "call resize(width, height) with the map's size first."
            )
        return np.asarray(_resample(Image.fromarray(values), self.matrix, photo_size, 0))

    def crop(self, left: float, top: float, width: int, height: int) -> "Alignment":
        """Cut a part out of the aligned picture, its top-left pixel at (left, top)."""
        return self._then(np.array([[1, 0, -left], [0, 1, -top]]), (width, height))

    def resize(self, width: int, height: int) -> "Alignment":
        """Scale the aligned picture to another size."""
        return self._then(_scaling(width / self.size[0], height / self.size[1]), (width, height))

    def flip(self) -> "Alignment":
        """Mirror the aligned picture left to right; landmarks also change order (`LandmarkScheme.mirror`)."""
        return self._then(np.array([[-1, 0, self.size[0] - 1], [0, 1, 0]]), self.size)

    def _then(self, matrix: np.ndarray, size: tuple[int, int]) -> "Alignment":
        return Alignment(matrix @ np.vstack([self.matrix, [0, 0, 1]]), size)


def level_eyes(
    landmarks: Any, scheme: str | int | LandmarkScheme | None = None, size: int = 200
) -> Alignment:
    """Level the eyes and fit the box of eyes, nose tip and mouth corners: the alignment of JAA-Net.

    The box of the five points is centred; its larger side, times 2.9, fills the picture.

    Args:
        landmarks: (N, 2) landmarks of one face in photo pixels.
        scheme: Their scheme, any that reduces to `five`; by default the one with N points.
        size: Width and height of the aligned picture in pixels.

    Raises:
        ValueError: The landmarks are wrong or degenerate.
    """
    five = _five(landmarks, scheme)
    x, y = five[1] - five[0]
    cos, sin = np.array([x, y]) / np.hypot(x, y)
    rotation = np.array([[cos, sin], [-sin, cos]])
    low, high = (five @ rotation.T).min(0), (five @ rotation.T).max(0)
    half = 0.5 * 2.9 * (high - low).max()
    scale = (size - 1) / 2 / half
    shift = (size - 1) / 2 - scale * (low + high) / 2
    return Alignment(np.column_stack([scale * rotation, shift]), (size, size))


FIVE_POINT_TEMPLATE = np.array(
    [[-0.158, -0.171], [0.158, -0.171], [0.0, -0.013], [-0.125, 0.169], [0.125, 0.169]]
)
"""The mean face of `level_eyes` as `five` points: offsets from the picture's centre in picture widths."""


def five_point(
    landmarks: Any, scheme: str | int | LandmarkScheme | None = None, size: int = 224
) -> Alignment:
    """Fit eyes, nose tip and mouth corners to a template by a least-squares similarity (Umeyama, 1991).

    It frames the mean face as `level_eyes` does, but lets all five points decide.

    Args:
        landmarks: (N, 2) landmarks of one face in photo pixels.
        scheme: Their scheme, any that reduces to `five`; by default the one with N points.
        size: Width and height of the aligned picture in pixels.

    Raises:
        ValueError: The landmarks are wrong or degenerate.
    """
    # In the plane a similarity is multiplication with a complex number, and least squares are linear.
    source = _five(landmarks, scheme) @ [1, 1j]
    target = (FIVE_POINT_TEMPLATE * size + (size - 1) / 2) @ [1, 1j]
    centered = source - source.mean()
    factor = np.vdot(centered, target) / np.vdot(centered, centered).real
    shift = target.mean() - factor * source.mean()
    a, b = factor.real, factor.imag
    return Alignment(np.array([[a, -b, shift.real], [b, a, shift.imag]]), (size, size))


def identity(photo_size: tuple[int, int], size: tuple[int, int] | None = None) -> Alignment:
    """Take the whole photo (width, height) as aligned, scaled to `size` (width, height) if given."""
    return Alignment(_scaling(1, 1), photo_size).resize(*(size or photo_size))


def _five(landmarks: Any, scheme: str | int | LandmarkScheme | None) -> np.ndarray:
    """Eye centres, nose tip and mouth corners, (5, 2), of a face that can be aligned."""
    five = reduce_landmarks(*check_landmarks(landmarks, scheme), "five")
    distance = np.hypot(*(five[1] - five[0]))
    if distance < 1:
        raise ValueError(
            f"The eye centres lie {distance:.3g} pixels apart, so the face cannot be aligned; "
            "pass landmarks in pixels of the photo (not 0 to 1) of a face with two visible eyes."
        )
    return five


def _scaling(across: float, down: float) -> np.ndarray:
    """(2, 3) matrix of a resize about the corner of the picture: x -> (x + 0.5) * across - 0.5."""
    return np.array([[across, 0, (across - 1) / 2], [0, down, (down - 1) / 2]])


def _apply(matrix: np.ndarray, points: Any) -> np.ndarray:
    return np.asarray(points, dtype=np.float64) @ matrix[:, :2].T + matrix[:, 2]


def _resample(image: Image.Image, matrix: np.ndarray, size: tuple[int, int], fill: Any) -> Image.Image:
    """Draw a picture of `size` whose pixel p shows the input at `matrix` @ (p, 1)."""
    # Pillow counts from the corner of the top-left pixel: its point is ours plus one half.
    shift = matrix[:, 2] + 0.5 - matrix[:, :2] @ [0.5, 0.5]
    data = np.column_stack([matrix[:, :2], shift]).ravel().tolist()
    return image.transform(
        size, Image.Transform.AFFINE, data, resample=Image.Resampling.BILINEAR, fillcolor=fill
    )
