"""A person: the head model fitted to a neutral photograph, to be rendered in any expression, pose and light.

Photographs come with templates of 189 manual points (DeBruine & Jones' `.tem`: a count, then lines of x y).
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from scipy.spatial import cKDTree

from actionunits.data.corpora.reading import naming

from .complexion import cheek_color
from .fitting import Camera, fit_head
from .head_model import LANDMARK_VERTICES, SKIN, HeadModel
from .rasterizer import vertex_normals
from .wrinkles import wrinkle_maps

FACE_WIDTH = 280.0  # of the stored photograph, from ear to ear [pixels]

# iBUG-68 point -> the template points that it is the mean of. The contour (0-16) is resampled, see CONTOUR.
TEMPLATE_POINTS: dict[int, tuple[int, ...]] = {
    **{17: (71,), 18: (72, 83), 19: (73, 83), 20: (74, 84), 21: (75, 76)},
    **{22: (77, 78), 23: (79, 85), 24: (80, 86), 25: (81, 86), 26: (82,)},
    **{27: (50, 51, 56, 57), 28: (52, 58), 29: (53, 59), 30: (54, 60)},
    **{31: (64, 65), 32: (170,), 33: (55,), 34: (172,), 35: (69, 70)},
    **{36: (18,), 37: (19, 20), 38: (20, 21), 39: (22,), 40: (29, 30), 41: (28, 29)},
    **{42: (23,), 43: (24, 25), 44: (25, 26), 45: (27,), 46: (32, 33), 47: (31, 32)},
    **{48: (87,), 49: (88,), 50: (89,), 51: (90,), 52: (91,), 53: (92,), 54: (93,)},
    **{55: (108,), 56: (107,), 57: (106,), 58: (105,), 59: (104,)},
    **{60: (87, 94), 61: (95,), 62: (96,), 63: (97,), 64: (93, 98), 65: (102,), 66: (101,), 67: (100,)},
}
CONTOUR = (109, 185, 110, 186, 125, 126, 127, 128, 129, 130, 131, 132, 133, 188, 113, 187, 112)


@dataclass(frozen=True)
class Person:
    """One photographed person on the head model. Pixels are those of `photo`.

    Attributes:
        name: `set/id`, the identity that splits keep together.
        sex, ethnicity, age: from `people.csv`; age 0 where it is unknown.
        photo: (H, W, 3) uint8 RGB, scaled so that the face is `FACE_WIDTH` wide.
        silhouette: (H, W) uint8, 255 where the person is (hair, neck and clothes too).
        vertices: (V, 3) neutral head.
        camera: camera of the photograph.
        texture: (V, 2) pixel of each vertex.
        normals: (V, 3) of the neutral head in the camera's frame.
        hidden_color: (V, 3) linear colour for vertices that the photograph does not show.
        wrinkles: `wrinkle_maps` of the photograph.
        cheek: (3,) linear colour of the cheeks.
    """

    name: str
    sex: str
    ethnicity: str
    age: float
    photo: np.ndarray
    silhouette: np.ndarray
    vertices: np.ndarray
    camera: Camera
    texture: np.ndarray
    normals: np.ndarray
    hidden_color: np.ndarray
    wrinkles: np.ndarray
    cheek: np.ndarray

    @classmethod
    def of_photograph(
        cls, head: HeadModel, picture: Path, name: str, sex: str, ethnicity: str, age: float
    ) -> Person:
        """Fit the head model to a photograph with its template (`.tem`) beside it."""
        photo, points = _crop_to_head(picture, read_template(picture.with_suffix(".tem")))
        camera, weights, _ = fit_head(head, points)
        vertices = head.identity(weights)
        texture = _warp_to_points(camera.project(vertices)[:, :2], points, head)
        normals = vertex_normals(vertices, head.triangles) @ camera.rotation.T.astype(np.float32)
        photo, silhouette = _without_background(photo, points)
        return cls(
            name=name,
            sex=sex,
            ethnicity=ethnicity,
            age=age,
            photo=photo,
            silhouette=silhouette,
            vertices=vertices,
            camera=camera,
            texture=texture,
            normals=normals,
            hidden_color=_vertex_colors(photo, silhouette, texture, normals, vertices),
            wrinkles=wrinkle_maps(points, *photo.shape[:2]),
            cheek=cheek_color(to_linear(photo), points),
        )


def read_people(
    folder: str | Path, sets: tuple[str, ...] = ("london_neutral", "canada_neutral")
) -> list[dict]:
    """List the photographs below `folder`: a row per person with name, picture, sex, ethnicity, age.

    Args:
        folder: contains a folder per set (JPEG pictures, `.tem` templates) and `people.csv` (set, person,
            age, gender, ethnicity).
        sets: names of the folders.

    Raises:
        FileNotFoundError: if the table or a set is missing, or a set has no pictures with templates.
        ValueError: if the table is no text or does not name the people.
    """
    folder = Path(folder)
    if not (folder / "people.csv").is_file():
        found = sorted(path.name for path in folder.iterdir())[:8] if folder.is_dir() else "no folder"
        raise FileNotFoundError(
            f"{folder} has no people.csv with the columns set, person, age, gender, ethnicity, but "
            f"{found or 'nothing'}; name the folder with it and the folders of photographs, or write one: "
            "with the header alone, sex, age and ethnicity are unknown."
        )
    table = _people_table(folder / "people.csv")
    people = []
    for name in sets:
        pictures = sorted(p for p in (folder / name).glob("*.jpg") if p.with_suffix(".tem").is_file())
        if not pictures:
            raise FileNotFoundError(f"{folder / name} has no JPEG picture with a .tem template beside it.")
        short = name.split("_")[0]
        for picture in pictures:
            row = table.get((short, picture.stem.split("_")[0]), {})
            age = row.get("age", "")
            people.append(
                {
                    "name": f"{short}/{picture.stem}",
                    "picture": picture,
                    "sex": row.get("gender", ""),
                    "ethnicity": row.get("ethnicity", ""),
                    "age": float(age) if age.replace(".", "", 1).isdigit() else 0.0,
                }
            )
    return people


def _people_table(path: Path) -> dict[tuple[str, str], dict[str, str]]:
    """Rows of `people.csv` by set and person; missing cells are empty."""
    with naming(path), path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, restval="")
        if missing := {"set", "person"} - set(reader.fieldnames or ()):
            raise ValueError(
                f"{path} has no column {', '.join(sorted(missing))}; its header should be "
                f"set,person,age,gender,ethnicity, but is {','.join(reader.fieldnames or ())!r}."
            )
        return {(row["set"], row["person"]): row for row in reader}


def read_template(path: Path) -> np.ndarray:
    """The 68 iBUG points (68, 2) in pixels of a template of 189 points."""
    lines = path.read_text().splitlines()
    count = int(lines[0])
    if count != 189:
        raise ValueError(f"{path} has {count} points; the templates of these sets have 189.")
    template = np.array([[float(word) for word in line.split()[:2]] for line in lines[1 : count + 1]])
    points = np.zeros((68, 2))
    for target, sources in TEMPLATE_POINTS.items():
        points[target] = template[list(sources)].mean(0)
    points[:17] = _resample(template[list(CONTOUR)], 17)
    return points


def to_linear(color: np.ndarray) -> np.ndarray:
    """0..255 colour -> linear light 0..1, by a square instead of the sRGB curve (fast, close enough)."""
    return np.square(np.asarray(color, np.float32) / 255)


def _resample(curve: np.ndarray, count: int) -> np.ndarray:
    """Resample a polyline to `count` equidistant points."""
    length = np.r_[0, np.cumsum(np.linalg.norm(np.diff(curve, axis=0), axis=1))]
    at = np.linspace(0, length[-1], count)
    return np.stack([np.interp(at, length, curve[:, k]) for k in (0, 1)], 1)


def _crop_to_head(picture: Path, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale photograph and points to `FACE_WIDTH` and crop to head, hair and shoulders."""
    scale = FACE_WIDTH / np.ptp(points[:17, 0])
    image = Image.open(picture).convert("RGB")
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    points = (points + 0.5) * scale - 0.5
    left, top = np.floor(points.min(0) - FACE_WIDTH * np.array([0.65, 0.95])).astype(int)
    right, bottom = np.ceil(points.max(0) + FACE_WIDTH * np.array([0.65, 0.75])).astype(int)
    left, top, right, bottom = max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height)
    return np.asarray(image.crop((left, top, right, bottom))), points - [left, top]


def _warp_to_points(projected: np.ndarray, points: np.ndarray, head: HeadModel) -> np.ndarray:
    """Pixel of each vertex: its projection, warped so that landmark vertices coincide with the points."""
    anchors = projected[LANDMARK_VERTICES]
    offsets = points - anchors
    offsets[:17] *= 0.3  # a contour is an outline in the picture, no place on the skin
    reach = 0.18 * np.ptp(anchors[17:48, 0])
    kernel = np.exp(-np.square(anchors[:, None] - anchors).sum(-1) / (2 * reach**2)) + 0.02 * np.eye(68)
    strength = np.linalg.solve(kernel, offsets)
    skin = np.unique(head.triangles[head.surface <= SKIN + 1])
    influence = np.exp(-np.square(projected[skin, None] - anchors).sum(-1) / (2 * reach**2))
    texture = projected.copy()
    texture[skin] += influence @ strength
    return texture.astype(np.float32)


def _without_background(photo: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The photograph, white-balanced by its background, and the silhouette (H, W) uint8.

    The studio's wall is plain: a surface is fitted to the picture's rims above the shoulders, then to all
    that resembles it. It predicts the wall everywhere, and what differs from it is the person.
    """
    height, width = photo.shape[:2]
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j].astype(np.float32)
    terms = np.stack([np.ones_like(x), x, y, x * y, x * x, y * y], -1)
    above = np.arange(height)[:, None] < int(points[8, 1])
    rim = np.zeros((height, width), bool)
    rim[:8] = rim[:, :8] = rim[:, -8:] = True
    rim &= above
    color = photo.astype(np.float32)
    for order in (1, 1, 3, 6, 6):  # from a constant to a quadratic surface; hair at the rim drops out
        wall = terms[..., :order] @ np.linalg.lstsq(terms[rim][:, :order], color[rim], rcond=None)[0]
        distance = np.linalg.norm(color - wall, axis=-1)
        rim = (distance < np.clip(2.5 * np.median(distance[rim]), 10, 30)) & above
    wall_color = wall[rim].mean(0)
    balanced = np.clip(color * (wall_color.mean() / wall_color), 0, 255).astype(np.uint8)
    mask = np.clip((cv2.GaussianBlur(distance, (0, 0), 1.2) - 14) / 20, 0, 1)
    mask = cv2.erode(mask, np.ones((3, 3), np.uint8))
    solid = np.zeros((height, width), np.float32)
    cv2.fillConvexPoly(solid, cv2.convexHull(np.round(points).astype(np.int32)), 1.0)
    mask = cv2.morphologyEx(np.maximum(mask, solid), cv2.MORPH_CLOSE, np.ones((9, 9), np.uint8))
    return balanced, (cv2.GaussianBlur(mask, (0, 0), 1.0) * 255).astype(np.uint8)


def _vertex_colors(photo, silhouette, texture, normals, vertices) -> np.ndarray:
    """Linear colour (V, 3) of each vertex, from the nearest one that the photograph shows."""
    height, width = photo.shape[:2]
    x, y = np.round(texture).astype(int).T
    inside = (x >= 0) & (y >= 0) & (x < width) & (y < height)
    x, y = np.clip(x, 0, width - 1), np.clip(y, 0, height - 1)
    smooth = to_linear(cv2.GaussianBlur(photo, (0, 0), 4))
    seen = inside & (normals[:, 2] > 0.4) & (silhouette[y, x] > 200)
    # Prefer neighbours at the same height: hair for hair, neck for neck.
    stretch = np.array([0.4, 1.0, 0.4])
    _, nearest = cKDTree(vertices[seen] * stretch).query(vertices * stretch)
    return smooth[y[seen], x[seen]][nearest].astype(np.float32)
