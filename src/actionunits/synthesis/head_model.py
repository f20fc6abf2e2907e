"""The blendshape head: ICT-FaceKit's light model (MIT), and the shapes that make each action unit.

Model space: x towards the subject's left, y up, z towards the camera; a unit is about a centimetre.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# Action unit -> blendshape -> gain at intensity 1. A name without suffix includes its halves _L and _R.
# Some shapes also move what their action unit does not, mostly the lips; small gains of others compensate.
AU_SHAPES: dict[int, dict[str, float]] = {
    1: {"browInnerUp": 1.4},
    2: {"browOuterUp": 1.25},
    4: {"browDown": 1.7},
    5: {"eyeWide": 2.0},
    6: {"cheekSquint": 1.2, "cheekRaiser": 1.0, "eyeSquint": 0.35, "mouthUpperUp": -0.15},
    7: {"eyeSquint": 1.75, "eyeBlink": 0.25},
    9: {"noseSneer": 1.1, "browDown": 0.3, "mouthUpperUp": -0.35},
    10: {"mouthUpperUp": 1.0},
    12: {"mouthSmile": 1.05},
    14: {"mouthDimple": 1.3, "mouthFrown": 0.35, "mouthPress": 0.4},
    15: {"mouthFrown": 1.4},
    17: {"mouthShrugLower": 1.0, "mouthShrugUpper": 0.45},
    20: {"mouthStretch": 1.2},
    23: {"mouthRollLower": 0.55, "mouthRollUpper": 0.5, "mouthPress": 0.25, "mouthPucker": 0.12},
    24: {"mouthPress": 1.4, "mouthRollLower": 0.35, "mouthRollUpper": 0.4, "mouthShrugUpper": 0.3},
    25: {"mouthLowerDown": 0.9},
    26: {"jawOpen": 0.55},
}

# Rendered surfaces; lashes, tear film and the iris behind the cornea are left out.
SKIN, HEAD_BACK, GUMS, TEETH, EYE = range(5)
SURFACES = {
    "M_Face": SKIN,
    "M_BackHead": HEAD_BACK,
    "M_GumsTongue": GUMS,
    "M_Teeth": TEETH,
    "M_ScleraLeft": EYE,
    "M_ScleraRight": EYE,
}

# Vertices of the 68 iBUG points, from the head model's `vertex_indices.json`.
# fmt: off
LANDMARK_VERTICES = np.array([
    1225, 1888, 1052, 367, 1719, 1722, 2199, 1447, 966, 3661, 4390, 3927, 3924, 2608, 3272, 4088, 3443,
    268, 493, 1914, 2044, 1401, 3615, 4240, 4114, 2734, 2509,
    978, 4527, 4942, 4857, 1140, 2075, 1147, 4269, 3360,
    1507, 1542, 1537, 1528, 1518, 1511, 3742, 3751, 3756, 3721, 3725, 3732,
    5708, 5695, 2081, 0, 4275, 6200, 6213, 6346, 6461, 5518, 5957, 5841,
    5702, 5711, 5533, 6216, 6207, 6470, 5517, 5966,
])
# fmt: on


@dataclass(frozen=True)
class HeadModel:
    """A linear face: neutral + identity weights x identity modes + expression weights x expression shapes.

    Attributes:
        vertices: (V, 3) neutral mean head.
        triangles: (T, 3) vertex indices of the rendered surfaces, counter-clockwise seen from outside.
        surface: (T,) surface code of each triangle (`SKIN` ... `EYE`).
        identity_modes: (K, V, 3) offsets, one standard deviation each.
        expression_shapes: (E, V, 3) offsets at weight 1.
        expression_names: E names such as `browDown_L` (L = the subject's left).
    """

    vertices: np.ndarray
    triangles: np.ndarray
    surface: np.ndarray
    identity_modes: np.ndarray
    expression_shapes: np.ndarray
    expression_names: tuple[str, ...]

    @classmethod
    def load(cls, folder: str | Path) -> HeadModel:
        """Read the packed arrays (`*.npz`) or the original folder of OBJ files (ICT-FaceKit's `FaceXModel`).

        Args:
            folder: contains `ict_facekit_light.npz` or `generic_neutral_mesh.obj`.

        Raises:
            FileNotFoundError: if it contains neither.
        """
        folder = Path(folder)
        packed = folder / "ict_facekit_light.npz"
        if packed.is_file():
            with np.load(packed) as arrays:
                return cls._of_arrays(dict(arrays))
        if (folder / "generic_neutral_mesh.obj").is_file():
            return cls._of_arrays(_read_obj_folder(folder))
        raise FileNotFoundError(
            f"{folder} holds neither ict_facekit_light.npz nor generic_neutral_mesh.obj. Download the public "
            "repository ICT-VGL/ICT-FaceKit and pass its FaceXModel folder."
        )

    @classmethod
    def _of_arrays(cls, arrays: dict[str, np.ndarray]) -> HeadModel:
        code = np.array([SURFACES.get(str(name), -1) for name in arrays["materials"]])
        surface = code[arrays["triangle_material"]]
        drawn = surface >= 0
        triangles = arrays["triangles"][drawn]
        count = int(triangles.max()) + 1
        return cls(
            vertices=arrays["vertices"][:count].astype(np.float32),
            triangles=np.ascontiguousarray(triangles, dtype=np.int32),
            surface=surface[drawn].astype(np.int32),
            identity_modes=arrays["identity_modes"][:, :count].astype(np.float32),
            expression_shapes=arrays["expression_shapes"][:, :count].astype(np.float32),
            expression_names=tuple(str(name) for name in arrays["expression_names"]),
        )

    def expression_index(self, name: str) -> list[int]:
        """Indices of a shape: its own, or those of its left and right halves (in this order)."""
        found = [i for i, n in enumerate(self.expression_names) if n in (name, f"{name}_L", f"{name}_R")]
        if not found:
            raise KeyError(
                f"The head model has no shape {name!r}; it has {', '.join(self.expression_names)}."
            )
        return found

    def expression_weights(
        self, gains: dict[int, float], left: float = 1.0, right: float = 1.0
    ) -> np.ndarray:
        """Shape weights (E,) of action units, scaled on the subject's left and right side."""
        weights = np.zeros(len(self.expression_names), np.float32)
        for au, intensity in gains.items():
            for shape, gain in AU_SHAPES[au].items():
                for i in self.expression_index(shape):
                    name = self.expression_names[i]
                    side = left if name.endswith("_L") else right if name.endswith("_R") else 1.0
                    weights[i] += intensity * gain * side
        return weights

    def shape(self, neutral: np.ndarray, expression: np.ndarray) -> np.ndarray:
        """Vertices (V, 3) of a neutral head (V, 3) with expression weights (E,)."""
        used = np.flatnonzero(expression)
        return neutral + np.tensordot(expression[used].astype(np.float32), self.expression_shapes[used], 1)

    def identity(self, weights: np.ndarray) -> np.ndarray:
        """Neutral vertices (V, 3) of identity weights (k,), k <= K."""
        return self.vertices + np.tensordot(
            weights.astype(np.float32), self.identity_modes[: len(weights)], 1
        )


def _read_obj_folder(folder: Path) -> dict[str, np.ndarray]:
    """The packed arrays from the original files: identities, one OBJ per expression, the neutral mesh."""
    vertices, triangles, material, materials = _read_neutral(folder / "generic_neutral_mesh.obj")
    identities = sorted(folder.glob("identity[0-9]*.obj"))
    names = sorted(
        p.stem for p in folder.glob("*.obj") if p not in identities and p.stem != "generic_neutral_mesh"
    )
    expected = json.loads((folder / "vertex_indices.json").read_text()).get("idx_to_landmark_verts")
    if expected is not None and list(LANDMARK_VERTICES) != list(expected):
        raise ValueError(
            f"{folder}/vertex_indices.json places the 68 landmarks on other vertices than this package; "
            "use ICT-FaceKit's light model."
        )
    return {
        "vertices": vertices,
        "triangles": triangles,
        "triangle_material": material,
        "materials": np.array(materials),
        "identity_modes": np.stack([_read_vertices(p) - vertices for p in identities]),
        "expression_shapes": np.stack([_read_vertices(folder / f"{n}.obj") - vertices for n in names]),
        "expression_names": np.array(names),
    }


def _read_vertices(path: Path) -> np.ndarray:
    lines = (line.split()[1:4] for line in path.read_text().splitlines() if line.startswith("v "))
    return np.array(list(lines), dtype=np.float32)


def _read_neutral(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """Vertices, triangles (polygons become fans), material of each triangle, material names."""
    triangles: list[tuple[int, int, int]] = []
    material: list[int] = []
    materials: list[str] = []
    for line in path.read_text().splitlines():
        if line.startswith("usemtl"):
            materials.append(line.split()[1])
        elif line.startswith("f "):
            corners = [int(word.split("/")[0]) - 1 for word in line.split()[1:]]
            fan = [(corners[0], corners[i], corners[i + 1]) for i in range(1, len(corners) - 1)]
            triangles += fan
            material += [len(materials) - 1] * len(fan)
    return _read_vertices(path), np.array(triangles), np.array(material), materials
