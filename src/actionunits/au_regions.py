"""Where on the face an action unit shows: two centres each, Gaussian maps and boxes around them.

Two definitions stand side by side. "shao" is that of ESCDA and AC2D (Fig. 3 of both; after EAC-Net and
JAA-Net), for faces with level eyes: points of the 49-point scheme, moved by parts of `scale`, the horizontal
distance between the inner eye corners. "lac" is Table I of LAC ("Lock and Check"), means of WFLW points.
Action units that a paper does not place are in tables of our own.
"""

from collections.abc import Iterable
from typing import Any

import torch

from actionunits.action_units import check_aus
from actionunits.landmarks import LandmarkScheme, get_scheme, reduce_landmarks, stack

Points = int | tuple[int, ...]  # one landmark, or the mean of several

# AU: landmark (ibug49) of the first centre, of the second, offset of both downwards in units of `scale`
SHAO: dict[int, tuple[Points, Points, float]] = {
    1: (4, 5, -1 / 2),
    2: (1, 8, -1 / 3),
    4: (2, 7, 1 / 3),
    6: (24, 29, 1),
    7: (21, 26, 0),
    9: (15, 17, -1 / 2),
    10: (43, 45, 0),
    12: (31, 37, 0),
    14: (31, 37, 0),
    15: (31, 37, 0),
    17: (39, 41, 1 / 2),
    23: (34, 40, 0),
    24: (34, 40, 0),
    25: (34, 40, 0),
    26: (39, 41, 1 / 2),
}

# Ours, in the same columns: action units that the papers do not place.
SHAO_EXTENSION: dict[int, tuple[Points, Points, float]] = {
    5: ((20, 21), (26, 27), 0),  # middles of the upper lids
    13: (31, 37, 0),  # mouth corners
    16: (39, 41, 0),  # lower lip
    18: (34, 40, 0),  # middles of the lips
    20: (31, 37, 0),  # mouth corners
    22: (34, 40, 0),  # middles of the lips
    27: (39, 41, 1 / 2),  # chin, as AU26
    28: (34, 40, 0),  # middles of the lips
    43: ((19, 20, 21, 22, 23, 24), (25, 26, 27, 28, 29, 30), 0),  # eyes
    45: ((19, 20, 21, 22, 23, 24), (25, 26, 27, 28, 29, 30), 0),
}

_LEFT_EYE, _RIGHT_EYE = tuple(range(60, 68)), tuple(range(68, 76))

# AU: landmarks (wflw98) whose means are x, y of the first centre and x, y of the second, as in LAC Table I
LAC: dict[int, tuple[Points, Points, Points, Points]] = {
    1: (37, 37, 42, 42),
    2: (40, 40, 48, 48),
    4: ((37, 51), 37, (42, 51), 42),
    7: (_LEFT_EYE, _LEFT_EYE, _RIGHT_EYE, _RIGHT_EYE),
    6: (67, 52, 73, 52),
    9: (51, 51, 53, 53),
    10: ((77, 78), (77, 78), (80, 81), (80, 81)),
    12: (88, 88, 92, 92),
    14: (88, 88, 92, 92),
    15: (88, 88, 92, 92),
    17: ((15, 86), (15, 86), (17, 84), (17, 84)),
    23: ((89, 95), (89, 95), (91, 93), (91, 93)),
    24: ((89, 95), (89, 95), (91, 93), (91, 93)),
    25: ((89, 95), (89, 95), (91, 93), (91, 93)),
    26: (83, 83, 87, 87),
}

# Ours, in the same columns: action units that LAC does not place.
LAC_EXTENSION: dict[int, tuple[Points, Points, Points, Points]] = {
    5: (62, 62, 70, 70),  # middles of the upper lids
    13: (88, 88, 92, 92),  # mouth corners
    16: (86, 86, 84, 84),  # lower lip
    18: ((89, 95), (89, 95), (91, 93), (91, 93)),  # lips, as AU23
    20: (88, 88, 92, 92),  # mouth corners
    22: ((89, 95), (89, 95), (91, 93), (91, 93)),
    27: (83, 83, 87, 87),  # as AU26
    28: ((89, 95), (89, 95), (91, 93), (91, 93)),
    43: (_LEFT_EYE, _LEFT_EYE, _RIGHT_EYE, _RIGHT_EYE),  # eyes
    45: (_LEFT_EYE, _LEFT_EYE, _RIGHT_EYE, _RIGHT_EYE),
}


def au_centers(
    landmarks: Any, scheme: str | int | LandmarkScheme, aus: Iterable[int], definition: str = "shao"
) -> Any:
    """Return the two centres of each action unit.

    Args:
        landmarks: (..., N, 2) array or tensor of a face with level eyes, in any unit, y down.
        scheme: Scheme of the landmarks: "shao" takes all that reduce to `ibug49`, "lac" takes `wflw98`.
        aus: The m FACS numbers.
        definition: "shao" (ESCDA and AC2D, Fig. 3) or "lac" (LAC, Table I).

    Returns:
        (..., m, 2, 2), array or tensor as given: action unit; centre, in the paper's order; x and y, in the
        unit of the landmarks.

    Raises:
        ValueError: An action unit has no centres, the definition is unknown, or the landmarks do not fit it.
    """
    if definition not in _DEFINITIONS:
        raise ValueError(f"Unknown definition {definition!r} of AU centres; known: {sorted(_DEFINITIONS)}.")
    needed, table, place = _DEFINITIONS[definition]
    aus = check_aus(aus)
    if missing := [au for au in aus if au not in table]:
        raise ValueError(
            f"Definition {definition!r} has no centres for action units {missing}; it has {sorted(table)}."
        )
    points = reduce_landmarks(landmarks, get_scheme(scheme), needed)
    return stack([place(points[..., 0], points[..., 1], *table[au]) for au in aus], -3)


def have_centers(aus: Iterable[int]) -> bool:
    """Whether each of these action units has centres; both definitions have the same ones."""
    return all(au in SHAO or au in SHAO_EXTENSION for au in aus)


def gaussian_maps(
    centers: torch.Tensor,
    map_size: int | tuple[int, int],
    input_size: int | tuple[int, int],
    sigma: float,
    round_centers: bool = False,
) -> torch.Tensor:
    """Draw a Gaussian around both centres of each action unit (ESCDA Eqs. 1-2, AC2D Eqs. 3-4).

    Args:
        centers: (..., m, 2, 2) x and y in pixels of the model's input.
        map_size: Size of the maps in cells, one number or (h, w).
        input_size: Size of the model's input in pixels, one number or (height, width).
        sigma: Standard deviation in cells.
        round_centers: Round each centre to the cell floor(x / input * map + 0.5), possibly outside of the
            map, as AC2D's authors do. By default it is exact: (x + 0.5) * map / input - 0.5.

    Returns:
        (..., m, h, w) in (0, 1], in the dtype of `centers`: the larger of the two Gaussians in each cell.

    Raises:
        ValueError: sigma is not positive.
    """
    if not sigma > 0:
        raise ValueError(f"sigma must be a positive number of map cells, got {sigma}.")
    (h, w), (height, width) = _height_width(map_size), _height_width(input_size)
    dtype = centers.dtype if centers.is_floating_point() else torch.float32
    # Half precision would round the distances to an eighth of a cell.
    centers = centers.to(torch.promote_types(dtype, torch.float32))
    cells_per_pixel = centers.new_tensor([w / width, h / height])
    if round_centers:
        centers = torch.floor(centers * cells_per_pixel + 0.5)
    else:
        centers = (centers + 0.5) * cells_per_pixel - 0.5
    across, down = (
        torch.exp(
            -((torch.arange(n, device=centers.device) - centers[..., axis, None]) ** 2) / (2 * sigma**2)
        )
        for axis, n in enumerate((w, h))
    )  # (..., m, 2, w) and (..., m, 2, h)
    gaussians = down[..., :, None] * across[..., None, :]  # Eq. 1: the two axes separate
    return gaussians.amax(-3).to(dtype)  # Eq. 2


def roi_boxes(centers: Any, size: float | tuple[float, float]) -> Any:
    """Return a box around each centre.

    Args:
        centers: (..., m, 2, 2) array or tensor of x and y.
        size: Width of the square boxes, or (width, height), in the unit of the centres.

    Returns:
        (..., m, 2, 4) of the same kind: xmin, ymin, xmax, ymax; not clipped to the picture.
    """
    width, height = size if isinstance(size, tuple) else (size, size)
    x, y = centers[..., 0], centers[..., 1]
    return stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], -1)


def _place_shao(x: Any, y: Any, first: Points, second: Points, offset: float) -> Any:
    """(..., 49) x and y -> (..., 2, 2)."""
    _, left_inner, right_inner, _ = get_scheme("ibug49").eye_corners
    down = offset * abs(x[..., left_inner] - x[..., right_inner])
    return stack([stack([_mean(x, points), _mean(y, points) + down], -1) for points in (first, second)], -2)


def _place_lac(x: Any, y: Any, x1: Points, y1: Points, x2: Points, y2: Points) -> Any:
    """(..., 98) x and y -> (..., 2, 2)."""
    return stack([stack([_mean(x, xs), _mean(y, ys)], -1) for xs, ys in ((x1, y1), (x2, y2))], -2)


def _mean(values: Any, points: Points) -> Any:
    return values[..., points] if isinstance(points, int) else values[..., list(points)].mean(-1)


def _height_width(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


# name: scheme it needs, rows, what turns a row into two centres
_DEFINITIONS: dict[str, tuple[str, dict[int, Any], Any]] = {
    "shao": ("ibug49", SHAO | SHAO_EXTENSION, _place_shao),
    "lac": ("wflw98", LAC | LAC_EXTENSION, _place_lac),
}
