"""Landmark schemes as tables: 5, 49, 66, 68, 98 (WFLW) and 478 (MediaPipe mesh) points, and their reductions.

Points are (x, y) in pixels, the origin is the centre of the top-left pixel, x goes right, y goes down. "Left"
is the left of the picture, which is the person's right. All indices count from 0.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class LandmarkScheme:
    """What the indices of a landmark set mean.

    Attributes:
        name: Name in `SCHEMES`.
        size: Number of points N.
        mirror: Point i of a picture flipped left to right is point `mirror[i]` of the original.
        left_eye: Contour of the left eye, in ring order (`five`: its centre).
        right_eye: Contour of the right eye, in ring order (`five`: its centre).
        eye_corners: Outer and inner corner of the left eye, inner and outer of the right (`five`: none).
        nose_tip: The nose's tip.
        mouth_corners: Left and right corner of the lips.
    """

    name: str
    size: int
    mirror: tuple[int, ...] = field(repr=False)
    left_eye: tuple[int, ...]
    right_eye: tuple[int, ...]
    eye_corners: tuple[int, ...]
    nose_tip: int
    mouth_corners: tuple[int, int]


def get_scheme(scheme: "str | int | LandmarkScheme") -> LandmarkScheme:
    """Return a scheme by its name or its number of points.

    Raises:
        ValueError: There is no such scheme.
    """
    if isinstance(scheme, LandmarkScheme):
        return scheme
    for known in SCHEMES.values():
        if scheme == known.name or (not isinstance(scheme, bool | str) and scheme == known.size):
            return known
    raise ValueError(f"Unknown landmark scheme {scheme!r}; known: {_known_schemes()}.")


def check_landmarks(
    points: Any, scheme: str | int | LandmarkScheme | None = None
) -> tuple[np.ndarray, LandmarkScheme]:
    """Check the landmarks of one face.

    Args:
        points: (N, 2) x and y in pixels; anything numpy reads, or a tensor of any device and type.
        scheme: Their scheme; by default the one with N points.

    Returns:
        The points, (N, 2) float64, and their scheme.

    Raises:
        ValueError: Wrong shape, wrong number of points for the scheme (or any scheme), NaN or infinity.
    """
    try:
        array = as_numbers(points)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"landmarks must be an array of numbers (N, 2), got {type(points).__name__}."
        ) from error
    if array.ndim != 2 or array.shape[1] != 2:
        raise ValueError(
            f"landmarks must have shape (N, 2), x and y in pixels, got {array.shape}; "
            f"pass one face at a time, without z or visibility. Accepted schemes: {_known_schemes()}."
        )
    if scheme is None and len(array) not in {known.size for known in SCHEMES.values()}:
        raise ValueError(f"{len(array)} landmarks fit no scheme; accepted: {_known_schemes()}.")
    found = get_scheme(len(array) if scheme is None else scheme)
    if len(array) != found.size:
        raise ValueError(
            f"{found.name!r} has {found.size} landmarks, got {len(array)}; accepted: {_known_schemes()}."
        )
    if len(bad := np.flatnonzero(~np.isfinite(array).all(1))):
        raise ValueError(
            f"landmark {bad[0]} is {array[bad[0]].tolist()} ({len(bad)} of {len(array)} are not finite); "
            f"leave the face out, or let a detector find its {found.name!r} landmarks again."
        )
    return array, found


def check_inside(points: np.ndarray, width: float, height: float) -> None:
    """Check that landmarks can belong to this picture.

    Args:
        points: (N, 2) in pixels.
        width: Width of the picture in pixels.
        height: Height of the picture in pixels.

    Raises:
        ValueError: The box of the points does not touch the picture, or most points lie outside of it.
    """
    points = np.asarray(points, dtype=np.float64)
    # The picture reaches half a pixel beyond the centres of its outer pixels.
    limit = np.array([width, height]) - 0.5
    low, high = points.min(0), points.max(0)
    inside = ((points >= -0.5) & (points <= limit)).all(1).sum()
    if (high < -0.5).any() or (low > limit).any() or inside * 2 < len(points):
        raise ValueError(
            f"{len(points) - inside} of {len(points)} landmarks lie outside the {width} x {height} picture "
            f"(x {low[0]:.1f} to {high[0]:.1f}, y {low[1]:.1f} to {high[1]:.1f}); "
            "pass (x, y) in pixels of this very picture."
        )


def reduce_landmarks(
    points: Any, source: str | int | LandmarkScheme, target: str | int | LandmarkScheme
) -> Any:
    """Convert landmarks to a smaller scheme.

    The steps are 478 -> 68, 98 -> 68, 68 -> 66 -> 49 -> 5, and any chain of these. `five` is left eye centre
    (mean of the six contour points), right eye centre, nose tip, left and right mouth corner.

    Args:
        points: (..., N, 2) array or tensor in the source scheme.
        source: Scheme of `points`.
        target: Scheme of the result.

    Returns:
        (..., M, 2) of the same kind, in the target scheme.

    Raises:
        ValueError: `points` do not fit their scheme, or it does not reduce to the target.
    """
    scheme, goal = get_scheme(source), get_scheme(target)
    points = as_points(points, scheme)
    chain = _chain(scheme.name)
    if goal.name not in chain:
        raise ValueError(
            f"{scheme.name!r} landmarks do not reduce to {goal.name!r}; they reduce to: {chain[1:]}."
        )
    for step in chain[: chain.index(goal.name)]:
        points = _eyes_nose_mouth(points) if step == "ibug49" else points[..., list(_SUBSETS[step][1]), :]
    return points


def mirror_landmarks(points: Any, scheme: str | int | LandmarkScheme, width: float) -> Any:
    """Return the landmarks of the picture flipped left to right.

    Args:
        points: (..., N, 2) array or tensor.
        scheme: Their scheme.
        width: Width of the picture in pixels.

    Returns:
        (..., N, 2) of the same kind; x becomes width - 1 - x and left points become right ones.
    """
    scheme = get_scheme(scheme)
    points = as_points(points, scheme)[..., list(scheme.mirror), :]
    return stack([width - 1 - points[..., 0], points[..., 1]], -1)


def as_numbers(values: Any) -> np.ndarray:
    """Return anything that numpy reads, or any tensor, as a float64 array.

    Raises:
        TypeError, ValueError: It is neither.
    """
    if isinstance(values, torch.Tensor):  # numpy knows neither gradients, nor other devices, nor bfloat16
        values = values.detach().cpu().double()
    return np.asarray(values, dtype=np.float64)


def as_points(points: Any, scheme: LandmarkScheme) -> Any:
    """Return `points` as a floating array or tensor whose last axes are (scheme.size, 2); else ValueError."""
    if not isinstance(points, torch.Tensor):
        points = np.asarray(points)
        points = points if np.issubdtype(points.dtype, np.floating) else points.astype(np.float64)
    elif not points.is_floating_point():
        points = points.float()
    if tuple(points.shape[-2:]) != (scheme.size, 2):
        raise ValueError(
            f"{scheme.name!r} landmarks must end in the axes ({scheme.size}, 2), got {tuple(points.shape)}."
        )
    return points


def stack(parts: Sequence[Any], axis: int) -> Any:
    """Stack arrays with numpy or tensors with torch."""
    return torch.stack(list(parts), axis) if isinstance(parts[0], torch.Tensor) else np.stack(parts, axis)


def _eyes_nose_mouth(points: Any) -> Any:
    """(..., 49, 2) -> (..., 5, 2), the `five` scheme."""
    scheme = SCHEMES["ibug49"]
    eyes = [points[..., list(eye), :].mean(-2) for eye in (scheme.left_eye, scheme.right_eye)]
    return stack([*eyes, *(points[..., i, :] for i in (scheme.nose_tip, *scheme.mouth_corners))], -2)


def _chain(name: str) -> list[str]:
    """Every scheme that `name` reduces to, itself first."""
    chain = [name]
    while chain[-1] in _SUBSETS:
        chain.append(_SUBSETS[chain[-1]][0])
    return chain + ["five"] if chain[-1] == "ibug49" else chain


def _known_schemes() -> str:
    return ", ".join(f"{name!r} ({scheme.size} points)" for name, scheme in SCHEMES.items())


def _mirror(size: int, pairs: Iterable[tuple[int, int]]) -> tuple[int, ...]:
    """The permutation that swaps these pairs and leaves the other points."""
    mirror = list(range(size))
    for left, right in pairs:
        mirror[left], mirror[right] = right, left
    return tuple(mirror)


def _span(first: int, last: int) -> range:
    """The indices from first to last, both included, up or down."""
    return range(first, last + 1) if first <= last else range(first, last - 1, -1)


# --- iBUG-68 and its subsets: 66 lacks the inner mouth corners 60 and 64, 49 also the jaw 0 to 16 -----------

_68_TO_66 = tuple(i for i in range(68) if i not in (60, 64))
_66_TO_49 = tuple(range(17, 66))
_MIRROR_PAIRS_68 = (
    *zip(_span(0, 7), _span(16, 9), strict=True),  # jaw
    *zip(_span(17, 21), _span(26, 22), strict=True),  # brows
    *zip((31, 32), (35, 34), strict=True),  # nostrils
    *zip(_span(36, 41), (45, 44, 43, 42, 47, 46), strict=True),  # eyes
    *zip((48, 49, 50, 59, 58), (54, 53, 52, 55, 56), strict=True),  # outer lips
    *zip((60, 61, 67), (64, 63, 65), strict=True),  # inner lips
)


def _subset_of_68(name: str, kept: Sequence[int]) -> LandmarkScheme:
    """The scheme of the 68 points in `kept`, counted anew."""
    new = {old: i for i, old in enumerate(kept)}
    return LandmarkScheme(
        name=name,
        size=len(kept),
        mirror=_mirror(len(kept), [(new[a], new[b]) for a, b in _MIRROR_PAIRS_68 if a in new and b in new]),
        left_eye=tuple(new[i] for i in _span(36, 41)),
        right_eye=tuple(new[i] for i in _span(42, 47)),
        eye_corners=tuple(new[i] for i in (36, 39, 42, 45)),
        nose_tip=new[30],
        mouth_corners=(new[48], new[54]),
    )


# --- WFLW-98 (Wu et al., "Look at Boundary", CVPR 2018) -----------------------------------------------------

_98_TO_68 = (
    *range(0, 33, 2),  # jaw: every second point
    *_span(33, 37),  # brows: upper edges
    *_span(42, 46),
    *_span(51, 59),  # nose
    *(60, 61, 63, 64, 65, 67),  # eyes without the middles of the lids
    *(68, 69, 71, 72, 73, 75),
    *_span(76, 95),  # lips
)
_MIRROR_PAIRS_98 = (
    *zip(_span(0, 15), _span(32, 17), strict=True),  # jaw
    *zip(_span(33, 37), _span(46, 42), strict=True),  # brows, upper edges
    *zip(_span(38, 41), _span(50, 47), strict=True),  # brows, lower edges
    *zip((55, 56), (59, 58), strict=True),  # nostrils
    *zip(_span(60, 67), (72, 71, 70, 69, 68, 75, 74, 73), strict=True),  # eyes
    *zip((76, 77, 78, 87, 86), (82, 81, 80, 83, 84), strict=True),  # outer lips
    *zip((88, 89, 95), (92, 91, 93), strict=True),  # inner lips
    (96, 97),  # pupils
)

# --- MediaPipe face mesh ------------------------------------------------------------------------------------

_478_TO_68 = (
    *(127, 234, 132, 58, 172, 136, 149, 148, 152, 377, 378, 365, 397, 288, 361, 454, 356),  # jaw
    *(70, 63, 105, 66, 107, 336, 296, 334, 293, 300),  # brows
    *(168, 197, 5, 4, 240, 97, 2, 326, 460),  # nose
    *(33, 160, 158, 133, 153, 144, 362, 385, 387, 263, 373, 380),  # eyes
    *(61, 39, 37, 0, 267, 269, 291, 321, 314, 17, 84, 91),  # outer lips
    *(78, 82, 13, 312, 308, 317, 14, 87),  # inner lips
)
_MESH_MIDLINE = (0, 1, 2, 4, 5, 6, 8, *_span(9, 19), 94, 151, 152, 164, 168, 175, 195, 197, 199, 200)
_MIRROR_PAIRS_478 = (
    # The mesh counts its left and middle points first, then the right ones in the order of the left ones.
    *zip((i for i in range(248) if i not in _MESH_MIDLINE), range(248, 468), strict=True),
    # Irises: centre, then a ring that turns the same way round in both eyes.
    *zip(_span(468, 472), (473, 476, 475, 474, 477), strict=True),
)

# Where a scheme's points are a subset of another's: the larger -> (the smaller, indices in the larger).
_SUBSETS = {
    "mediapipe478": ("ibug68", _478_TO_68),
    "wflw98": ("ibug68", _98_TO_68),
    "ibug68": ("ibug66", _68_TO_66),
    "ibug66": ("ibug49", _66_TO_49),
}

SCHEMES: dict[str, LandmarkScheme] = {
    scheme.name: scheme
    for scheme in (
        LandmarkScheme(
            name="five",
            size=5,
            mirror=_mirror(5, [(0, 1), (3, 4)]),
            left_eye=(0,),
            right_eye=(1,),
            eye_corners=(),
            nose_tip=2,
            mouth_corners=(3, 4),
        ),
        _subset_of_68("ibug49", [_68_TO_66[i] for i in _66_TO_49]),
        _subset_of_68("ibug66", _68_TO_66),
        _subset_of_68("ibug68", range(68)),
        LandmarkScheme(
            name="wflw98",
            size=98,
            mirror=_mirror(98, _MIRROR_PAIRS_98),
            left_eye=tuple(_span(60, 67)),
            right_eye=tuple(_span(68, 75)),
            eye_corners=(60, 64, 68, 72),
            nose_tip=54,
            mouth_corners=(76, 82),
        ),
        LandmarkScheme(
            name="mediapipe478",
            size=478,
            mirror=_mirror(478, _MIRROR_PAIRS_478),
            left_eye=(33, 246, 161, 160, 159, 158, 157, 173, 133, 155, 154, 153, 145, 144, 163, 7),
            right_eye=(362, 398, 384, 385, 386, 387, 388, 466, 263, 249, 390, 373, 374, 380, 381, 382),
            eye_corners=(33, 133, 362, 263),
            nose_tip=4,
            mouth_corners=(61, 291),
        ),
    )
}
"""The landmark schemes, by name."""
