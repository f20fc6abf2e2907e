"""A toy head and toy photographs with the real files' layouts, small enough to render in milliseconds."""

import csv

import numpy as np
import pytest
from PIL import Image, ImageDraw

from actionunits.synthesis.head_model import AU_SHAPES, LANDMARK_VERTICES, HeadModel
from actionunits.synthesis.person import CONTOUR, TEMPLATE_POINTS
from actionunits.synthesis.sampling import RESTING_FACE, UNLABELLED

SPLIT_SHAPES = {"brow", "cheek", "eye", "nose"}  # shapes of the real model that come in _L and _R halves
GRID = 41


def mean_face() -> np.ndarray:
    """68 points of a schematic face: x right, y down, chin to brows about 2 long, centred on the nose."""
    angle = np.linspace(np.pi, 0, 17)
    contour = np.c_[np.cos(angle), 0.1 + 1.1 * np.sin(angle)]
    brow = np.c_[np.linspace(-0.75, -0.2, 5), [-0.42, -0.5, -0.53, -0.5, -0.45]]
    ridge = np.c_[np.zeros(4), np.linspace(-0.25, 0.2, 4)]
    base = np.c_[np.linspace(-0.2, 0.2, 5), [0.3, 0.33, 0.35, 0.33, 0.3]]
    eye = np.array(
        [[-0.6, -0.25], [-0.5, -0.31], [-0.38, -0.31], [-0.28, -0.24], [-0.38, -0.2], [-0.5, -0.2]]
    )
    upper = np.c_[np.linspace(-0.35, 0.35, 7), [0.62, 0.57, 0.54, 0.56, 0.54, 0.57, 0.62]]
    lower = np.c_[np.linspace(0.25, -0.25, 5), [0.7, 0.75, 0.77, 0.75, 0.7]]
    inner = [
        [-0.3, 0.62],
        [-0.12, 0.61],
        [0, 0.62],
        [0.12, 0.61],
        [0.3, 0.62],
        [0.12, 0.64],
        [0, 0.64],
        [-0.12, 0.64],
    ]
    mirror = np.array([-1, 1])
    brows = np.concatenate([brow, brow[::-1] * mirror])
    eyes = np.concatenate([eye, (eye * mirror)[[3, 2, 1, 0, 5, 4]]])
    return np.concatenate([contour, brows, ridge, base, eyes, upper, lower, np.array(inner)])


@pytest.fixture(scope="session")
def head_arrays() -> dict[str, np.ndarray]:
    """The packed arrays of a toy head: a bulge, triangles for eyeballs and a tooth, 68 landmark vertices."""
    rng = np.random.default_rng(0)
    across, down = np.meshgrid(np.linspace(-1.3, 1.3, GRID), np.linspace(-1.3, 1.3, GRID))
    skin = _on_head(np.c_[across.ravel(), down.ravel()] * 0.99)
    points = np.zeros((LANDMARK_VERTICES.max() + 1, 3), np.float32)
    points[LANDMARK_VERTICES] = _on_head(mean_face())
    eyes = np.concatenate([_on_head(mean_face()[[36, 41, 39]]), _on_head(mean_face()[[42, 46, 45]])])
    tooth = _on_head(np.array([[-0.1, 0.62], [0.0, 0.66], [0.1, 0.62]])) - [0, 0, 0.5]
    vertices = np.concatenate([points, skin, eyes, tooth]).astype(np.float32)
    corner = (np.arange(GRID - 1)[:, None] * GRID + np.arange(GRID - 1)).ravel() + len(points)
    quads = np.stack([corner, corner + GRID, corner + GRID + 1, corner + 1], 1)
    extra = len(points) + len(skin) + np.arange(9).reshape(3, 3)
    names = sorted(
        {name for shapes in AU_SHAPES.values() for name in shapes}
        | {row[0] for row in UNLABELLED + RESTING_FACE}
    )
    names += ["eyeBlink", "eyeLookUp", "eyeLookDown"]
    names = [
        half
        for n in names
        for half in ([f"{n}_L", f"{n}_R"] if n[:3] in {s[:3] for s in SPLIT_SHAPES} else [n])
    ]
    return {
        "vertices": vertices,
        "triangles": np.concatenate([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]], extra]).astype(np.int32),
        "triangle_material": np.r_[np.zeros(2 * len(quads)), 1, 2, 3].astype(np.int32),
        "materials": np.array(["M_Face", "M_ScleraRight", "M_ScleraLeft", "M_Teeth"]),
        "identity_modes": rng.normal(0, 0.05, (60, *vertices.shape)).astype(np.float16),
        "expression_shapes": rng.normal(0, 0.1, (len(names), *vertices.shape)).astype(np.float16),
        "expression_names": np.array(names),
    }


@pytest.fixture(scope="session")
def head_folder(head_arrays, tmp_path_factory):
    folder = tmp_path_factory.mktemp("head")
    np.savez(folder / "ict_facekit_light.npz", **head_arrays)
    return folder


@pytest.fixture(scope="session")
def head(head_folder) -> HeadModel:
    return HeadModel.load(head_folder)


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory):
    """Six drawn people in two sets with templates and the table."""
    folder = tmp_path_factory.mktemp("photos")
    rows = []
    for set_name, person in [
        ("london", "001"),
        ("london", "002"),
        ("london", "003"),
        ("london", "004"),
        ("canada", "7f"),
        ("canada", "8m"),
    ]:
        target = folder / f"{set_name}_neutral"
        target.mkdir(exist_ok=True)
        stem = f"{person}_03" if set_name == "london" else person
        points = mean_face() * [150, 160] + [300, 320]
        _draw(points, seed=len(rows)).save(target / f"{stem}.jpg")
        (target / f"{stem}.tem").write_text(_template(points))
        rows.append(
            {"set": set_name, "person": person, "age": "30", "gender": "female", "ethnicity": "white"}
        )
    with (folder / "people.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["set", "person", "age", "gender", "ethnicity"])
        writer.writeheader()
        writer.writerows(rows)
    return folder


def _on_head(points: np.ndarray) -> np.ndarray:
    """Schematic face points (N, 2) -> model space (N, 3): 8 wide, y up, bulging towards the camera."""
    x, y = points[:, 0] * 7, -points[:, 1] * 7.5
    return np.c_[x, y, 9 - 0.06 * x**2 - 0.04 * y**2]


def _draw(points: np.ndarray, seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (600, 650), (205, 206, 208))
    draw = ImageDraw.Draw(image)
    skin = tuple(int(v) for v in rng.integers(90, 190, 3))
    draw.ellipse((140, 120, 460, 520), fill=skin)
    for part, color in ((slice(36, 42), "white"), (slice(42, 48), "white"), (slice(48, 60), "brown")):
        draw.polygon([tuple(p) for p in points[part].tolist()], fill=color)
    return image


def _template(points: np.ndarray) -> str:
    template = np.zeros((189, 2))
    for target, sources in TEMPLATE_POINTS.items():
        template[list(sources)] = points[target]
    template[list(CONTOUR)] = points[:17]
    return "\n".join(["189", *(f"{x:.2f}\t{y:.2f}" for x, y in template)])
