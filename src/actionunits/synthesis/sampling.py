"""Sample scenes: action units, pose, light and framing; and label the pictures.

Frequent combinations of AUs follow the prototypes of the FACS literature (Ekman, Friesen & Hager 2002). Every
AU also occurs alone and in rare combinations, so that a network cannot infer one from another.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import numpy as np
from scipy.spatial.transform import Rotation

from actionunits.action_units import CORPUS_AUS

from .head_model import HeadModel
from .wrinkles import WRINKLED_AUS

SYNTHETIC_AUS = CORPUS_AUS["synthetic"]
OCCURRENCE_FROM = 0.25  # intensity from which an AU occurs: visible on the contact sheet

# Common combinations, each about equally often; broad smiles and surprise are listed twice.
# fmt: off
PROTOTYPES: tuple[tuple[int, ...], ...] = (
    (6, 12), (6, 12, 25), (6, 12, 25, 10), (6, 12, 25, 26), (12,), (12, 25), (6, 7, 12, 25), (6, 12, 25),
    (12, 25), (6, 7, 12, 25, 26),
    (1, 2, 5, 25, 26), (1, 2, 5, 25), (1, 2), (1, 2, 26, 25), (1,), (2,), (5,), (1, 2, 5, 25, 26), (1, 2, 5),
    (1, 4, 15), (1, 4, 15, 17), (1, 4), (15,), (15, 17), (17,), (1, 2, 4), (1, 2, 4, 5, 20, 25),
    (4, 5, 7, 23), (4, 7, 24), (4, 7), (4,), (4, 5, 7, 10, 25), (4, 17, 24), (7,),
    (9, 10, 17), (9, 10, 25), (9,), (4, 7, 9), (4, 9), (10,), (10, 25), (9, 17),
    (12, 14), (14,), (14, 24), (17, 24), (23,), (24,), (20,), (20, 25), (25,), (25, 26), (26, 25),
    (6,), (17, 23),
)
# fmt: on
# Pairs that a face cannot clearly show at once; one of them is dropped.
EXCLUSIVE: tuple[tuple[int, int], ...] = (
    *((12, 15), (24, 25), (24, 26), (23, 26), (23, 25), (5, 7), (17, 26), (23, 24), (14, 20)),
    *((23, 10), (24, 10), (12, 20)),
)
# AUs that rarely occur apart. A strong smile lifts the cheeks: intensities of AU 12, chances of AU 6.
CHEEKS_OF_SMILES = ((0.3, 0.8), (0.0, 0.75))
LONE_CHEEKS = 0.3  # share of the faces drawn with AU 6 and without 12 that keep it
LONE_OUTER_BROWS = 0.6  # share of the faces drawn with AU 2 and without 1 that stay so
# An AU, another that often accompanies it though it was not sampled, and its chance.
BRINGS: tuple[tuple[int, int, float], ...] = ((9, 4, 0.5), (9, 10, 0.3), (15, 17, 0.5), (6, 7, 0.3))
# Movements without a label, which must not be mistaken for others: shape, chance, largest weight.
UNLABELLED: tuple[tuple[str, float, float], ...] = (
    *(("jawLeft", 0.04, 0.5), ("jawRight", 0.04, 0.5), ("mouthLeft", 0.04, 0.5), ("mouthRight", 0.04, 0.5)),
    *(("jawOpen", 0.2, 0.08), ("mouthPucker", 0.05, 0.8), ("mouthFunnel", 0.03, 0.5)),
    *(("cheekPuff", 0.03, 0.6), ("jawForward", 0.03, 0.5)),
)
# Variation of neutral faces: shape, standard deviation of its weight. It has no label, so high brows or wide
# eyes are not yet AU 1, 2 or 5.
RESTING_FACE: tuple[tuple[str, float], ...] = (
    *(("browInnerUp", 0.12), ("browOuterUp", 0.14), ("browDown", 0.14), ("eyeWide", 0.2)),
    *(("eyeSquint", 0.15), ("cheekSquint", 0.08), ("noseSneer", 0.07), ("mouthUpperUp", 0.05)),
    *(("mouthSmile", 0.05), ("mouthFrown", 0.06), ("mouthPress", 0.08), ("mouthShrugLower", 0.06)),
    *(("mouthPucker", 0.06), ("mouthStretch", 0.05), ("mouthDimple", 0.06)),
    *(("mouthRollLower", 0.06), ("mouthRollUpper", 0.06)),
)
# Individual ways to make an action unit: each shape's gain is multiplied by a factor in this range.
OWN_WAY = (0.75, 1.3)
# Grimaces go far beyond what other faces show at full intensity: their AUs, the smallest intensity, the share
# of such faces, the largest factor of the gains. Labels are not affected.
GRIMACES: tuple[int, ...] = (1, 2, 4, 9, 10, 12, 15, 17, 20)
GRIMACE_FROM, GRIMACE_SHARE, GRIMACE_MOST = 0.7, 0.3, 1.4
RESTING_FOLDS = 0.45  # largest strength of the folds of a neutral face
RELAXED_LID = 0.1  # weight of eyeBlink: the head model's eyes are a little too wide open
WIDE_JAW = 0.45  # largest weight of jawOpen beyond AU 26 at full intensity: AU 27, which has no label
FULL_LIP_GAP = 1.1  # opening in model units (cm) that counts as AU 25 at intensity 1


@dataclass(frozen=True)
class Light:
    """A key light from `direction` (x right, y up, z to the camera) and ambient light; linear RGB."""

    direction: tuple[float, float, float]
    key: tuple[float, float, float]
    ambient: tuple[float, float, float]


@dataclass(frozen=True)
class Scene:
    """The parameters of a picture, apart from the persons in it.

    Attributes:
        action_units: FACS number -> posed intensity 0..1 (the label of AU 25 comes from the rendered lips).
        expression: (E,) weights of the head model's shapes.
        wrinkles: (W,) strength of the folds of each AU of `WRINKLED_AUS`.
        blend: share of the second person's face, 0..1.
        shape_offset: (k,) change of the identity weights.
        yaw, pitch, roll: radians, of the head.
        gaze: yaw and pitch of the eyes in the head, radians.
        iris, pupil: linear RGB, and the pupil's edge in degrees from the eye's axis.
        teeth: brightness factor.
        light: see `Light`.
        shine: strength of the highlight on the skin.
        skin: exponent of the linear colour of skin and hair (above 1 darkens) and its linear RGB tint.
        size: side of the picture in pixels.
        face_fraction: longer side of the 68 points' box / size.
        shift: (x, y) of that box's centre from the picture's centre, in parts of the size.
    """

    action_units: dict[int, float]
    expression: np.ndarray
    wrinkles: np.ndarray
    blend: float
    shape_offset: np.ndarray
    yaw: float
    pitch: float
    roll: float
    gaze: tuple[float, float]
    iris: tuple[float, float, float]
    pupil: float
    teeth: float
    light: Light
    shine: float
    skin: tuple[float, float, float, float]
    size: int
    face_fraction: float
    shift: tuple[float, float]

    def parameters(self) -> dict:
        """The scene as JSON-ready values, floats rounded to five decimals."""
        return {key: _plain(value) for key, value in asdict(self).items()}


def sample_scene(head: HeadModel, rng: np.random.Generator, size: int = 160) -> Scene:
    """Sample a scene: intensities, asymmetry, gaze, pose up to 60 degrees, light, framing."""
    action_units = sample_action_units(rng)
    yaw = float(
        np.clip(rng.normal(0, 0.22) if rng.random() < 0.75 else rng.uniform(-1.05, 1.05), -1.05, 1.05)
    )
    pitch, roll = float(np.clip(rng.normal(0, 0.16), -0.5, 0.5)), float(rng.normal(0, 0.13))
    gaze = _sample_gaze(rng, yaw, pitch)
    return Scene(
        action_units=action_units,
        expression=_sample_expression(head, action_units, gaze, rng),
        wrinkles=_sample_wrinkles(action_units, rng),
        blend=float(rng.uniform(0.0, 0.5)) if rng.random() < 0.6 else 0.0,
        shape_offset=(rng.normal(0, 0.4, 60) * np.r_[np.full(6, 0.6), np.ones(54)]).astype(np.float32),
        yaw=yaw,
        pitch=pitch,
        roll=roll,
        gaze=gaze,
        iris=_sample_iris(rng),
        pupil=float(rng.uniform(6, 12)),
        teeth=float(rng.uniform(0.7, 1.1)),
        light=_sample_light(rng),
        shine=float(rng.uniform(0, 0.35)) if rng.random() < 0.5 else 0.0,
        skin=_sample_skin(rng),
        size=size,
        face_fraction=float(rng.uniform(0.50, 0.66)),
        shift=tuple(rng.normal(0, 0.02, 2).tolist()),
    )


def neutral_scene(head: HeadModel, action_units: dict[int, float], size: int = 160) -> Scene:
    """A frontal scene in even light with the given intensities."""
    expression = head.expression_weights(_posed(action_units))
    expression[head.expression_index("eyeBlink")] += 0.0 if 5 in action_units else RELAXED_LID
    return Scene(
        action_units=action_units,
        expression=expression,
        wrinkles=_wrinkle_strengths(action_units, 0.8),
        blend=0.35,
        shape_offset=np.zeros(60, np.float32),
        yaw=0.0,
        pitch=0.0,
        roll=0.0,
        gaze=(0.0, 0.0),
        iris=(0.14, 0.09, 0.06),
        pupil=9.0,
        teeth=1.0,
        light=Light((0.3, 0.5, 0.9), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        shine=0.1,
        skin=(1.0, 1.0, 1.0, 1.0),
        size=size,
        face_fraction=0.62,
        shift=(0.0, 0.0),
    )


def sample_action_units(rng: np.random.Generator) -> dict[int, float]:
    """Intensities 0..1 by FACS number: none (17 %), a prototype and maybe another AU (53 %), random AUs."""
    chosen: set[int] = set()
    kind = rng.random()
    if kind < 0.17:
        return {}
    if kind < 0.7:
        chosen |= set(PROTOTYPES[rng.integers(len(PROTOTYPES))])
        if rng.random() < 0.4:
            chosen.add(int(rng.choice(SYNTHETIC_AUS)))
    else:
        chosen |= {au for au in SYNTHETIC_AUS if rng.random() < 0.18}
    for pair in EXCLUSIVE:
        if chosen.issuperset(pair):
            chosen.discard(pair[int(rng.random() < 0.5)])
    level = rng.uniform(0.3, 1.1)  # the AUs of one face rise together, roughly
    posed = {au: _near(level, rng) for au in sorted(chosen)}
    return dict(sorted(_keep_company(posed, rng).items()))


def label_intensities(scene: Scene, lip_gap: float) -> np.ndarray:
    """Intensities (17,) in the order of `SYNTHETIC_AUS`.

    AU 25 is `lip_gap` / `FULL_LIP_GAP`, whatever parted the lips (jaw, upper lip or AU 25 itself). With the
    lips visibly apart, AU 23 and 24, which tighten and press them, are 0.
    """
    intensities = dict(scene.action_units)
    intensities[25] = float(np.clip(lip_gap / FULL_LIP_GAP, 0, 1))
    if intensities[25] >= OCCURRENCE_FROM:
        intensities[23] = intensities[24] = 0.0
    return np.array([intensities.get(au, 0.0) for au in SYNTHETIC_AUS], np.float32)


def label_occurrence(intensities: np.ndarray) -> np.ndarray:
    """Whether each AU occurs, (17,) int8 0 or 1, from `OCCURRENCE_FROM` on."""
    return (intensities >= OCCURRENCE_FROM).astype(np.int8)


def _near(level: float, rng: np.random.Generator) -> float:
    return float(np.clip(level + rng.normal(0, 0.2), 0.12, 1.0))


def _keep_company(posed: dict[int, float], rng: np.random.Generator) -> dict[int, float]:
    """Add AUs that usually occur together, and drop some that rarely occur alone."""
    kept = dict(posed)
    if 12 in kept and 6 not in kept and rng.random() < np.interp(kept[12], *CHEEKS_OF_SMILES):
        kept[6] = _near(kept[12], rng)
    if 6 in kept and 12 not in kept and rng.random() > LONE_CHEEKS:
        del kept[6]
    if 2 in kept and 1 not in kept and rng.random() > LONE_OUTER_BROWS:
        kept[1] = _near(kept[2], rng)
    for au, other, chance in BRINGS:
        if au in kept and other not in kept and rng.random() < chance and not _excluded(other, kept):
            kept[other] = _near(kept[au], rng)
    return kept


def _excluded(au: int, others: Iterable[int]) -> bool:
    return any((au, other) in EXCLUSIVE or (other, au) in EXCLUSIVE for other in others)


def _posed(action_units: dict[int, float], rng: np.random.Generator | None = None) -> dict[int, float]:
    """Posed gains: AU 25 adds less to an open jaw, which parts the lips by itself; some faces grimace."""
    gains = dict(action_units)
    if 25 in gains and 26 in gains:
        gains[25] *= 0.3
    strong = [au for au in GRIMACES if gains.get(au, 0.0) >= GRIMACE_FROM]
    if rng and strong and rng.random() < GRIMACE_SHARE:
        factor = rng.uniform(1, GRIMACE_MOST)
        gains |= {au: factor * gains[au] for au in strong}
    return gains


def _sample_expression(head: HeadModel, action_units, gaze, rng: np.random.Generator) -> np.ndarray:
    """Shape weights (E,): the AUs, clearly asymmetric in a fifth of the faces, and unlabelled movements."""
    left, right = np.clip(rng.normal(1, 0.1 if rng.random() < 0.8 else 0.35, 2), 0.25, 1.4)
    weights = head.expression_weights(_posed(action_units, rng), float(left), float(right))
    weights *= _own_way(head, rng)
    closed = rng.uniform(0, 2.5 * RELAXED_LID) if rng.random() < 0.85 else rng.uniform(0.3, 1.0)
    look = {"eyeLookUp": max(gaze[1], 0) / 0.5, "eyeLookDown": max(-gaze[1], 0) / 0.5}
    extra = {"eyeBlink": 0.0 if 5 in action_units else closed, **look}
    extra |= {shape: rng.normal(0, spread) for shape, spread in RESTING_FACE}
    extra |= {shape: extra.get(shape, 0.0) + weight for shape, weight in _company(action_units, rng).items()}
    lifted = max(action_units.get(9, 0.0), action_units.get(10, 0.0))
    if lifted and not action_units.keys() & {25, 26} and rng.random() < 0.5:
        extra["mouthLowerDown"] = -rng.uniform(0.3, 1.0) * lifted  # the lower lip follows: a closed mouth
    for shape, chance, most in UNLABELLED:
        if rng.random() < chance:
            extra[shape] = extra.get(shape, 0.0) + rng.uniform(0, most)
    for shape, weight in extra.items():
        weights[head.expression_index(shape)] += weight
    return weights


def _company(action_units: dict[int, float], rng: np.random.Generator) -> dict[str, float]:
    """Shape -> weight of other AUs' muscles that move along with these, without being coded."""
    extra: dict[str, float] = {}
    if action_units.keys() >= {12, 25} and 10 not in action_units:
        extra["mouthUpperUp"] = rng.uniform(0, 0.5)  # a toothy smile lifts the lip without AU 10
    if 12 in action_units and 14 not in action_units:
        extra["mouthDimple"] = rng.uniform(0, 0.35)  # and dimples the cheeks without AU 14,
        if not action_units.keys() & {24, 25, 26}:
            extra["mouthPress"] = rng.uniform(0, 0.3)  # with the lips held together
    if action_units.get(26, 0.0) > 0.6 and rng.random() < 0.4:
        extra["jawOpen"] = rng.uniform(0, WIDE_JAW)
    return extra


def _own_way(head: HeadModel, rng: np.random.Generator) -> np.ndarray:
    """Factors (E,) of the shapes' gains, equal for a shape's left and right half."""
    names = [name.removesuffix("_L").removesuffix("_R") for name in head.expression_names]
    factors = {name: rng.uniform(*OWN_WAY) for name in sorted(set(names))}
    return np.array([factors[name] for name in names], np.float32)


def _sample_wrinkles(action_units: dict[int, float], rng: np.random.Generator) -> np.ndarray:
    """Strength of each fold (W,): skin folds more or less deeply, in a third of the faces also at rest."""
    depth = float(rng.uniform(0.0, 1.3))
    moved = _wrinkle_strengths(action_units, depth) * rng.uniform(0.5, 1.3, len(WRINKLED_AUS))
    at_rest = rng.uniform(0, RESTING_FOLDS) if rng.random() < 0.35 else 0.0
    folds = np.maximum(moved, at_rest * rng.uniform(0, 1, len(WRINKLED_AUS)))
    return folds.astype(np.float32)


def _wrinkle_strengths(action_units: dict[int, float], depth: float) -> np.ndarray:
    return np.array([depth * action_units.get(au, 0.0) ** 1.3 for au in WRINKLED_AUS], np.float32)


def _sample_gaze(rng: np.random.Generator, yaw: float, pitch: float) -> tuple[float, float]:
    """Half of the people look into the camera, whatever the head pose."""
    if rng.random() < 0.5:
        forward = Rotation.from_euler("YXZ", [yaw, pitch, 0]).inv().apply([0, 0, 1])
        look = (np.arctan2(forward[0], forward[2]), np.arcsin(forward[1]))
    else:
        look = (rng.normal(0, 0.25), rng.normal(0, 0.18))
    return float(np.clip(look[0], -0.6, 0.6)), float(np.clip(look[1], -0.45, 0.45))


def _sample_iris(rng: np.random.Generator) -> tuple[float, float, float]:
    brown, blue = np.array([0.13, 0.08, 0.05]), np.array([0.16, 0.24, 0.32])
    color = (brown if rng.random() < 0.7 else blue) * rng.uniform(0.5, 1.5)
    return tuple(color.tolist())


def _sample_light(rng: np.random.Generator) -> Light:
    """Soft to hard light, from any side above the chin, warm to cool."""
    ambient = rng.uniform(0.25, 0.75)
    key = rng.uniform(0.4, 1.0) * (1.3 - ambient)
    warm = np.array([1.0, 0.0, -1.0]) * rng.normal(0, 0.08)
    direction = (float(rng.normal(0, 0.7)), float(rng.uniform(-0.2, 1.0)), 0.8)
    tint = np.array([1.0, 0.0, -1.0]) * rng.normal(0, 0.05)
    if rng.random() < 0.06:  # a coloured lamp
        warm = rng.uniform(-0.7, 0.7, 3)
    return Light(direction, tuple((key * (1 + warm)).tolist()), tuple((ambient * (1 + tint)).tolist()))


def _sample_skin(rng: np.random.Generator) -> tuple[float, float, float, float]:
    """Half of the faces have another complexion than the photograph."""
    if rng.random() < 0.5:
        return 1.0, 1.0, 1.0, 1.0
    red, blue = rng.normal(1, 0.05, 2)
    return float(rng.uniform(0.65, 1.7)), float(red), 1.0, float(blue)


def _plain(value):
    if isinstance(value, np.ndarray):
        return [round(float(v), 5) for v in value]
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return round(value, 5) if isinstance(value, float) else value
