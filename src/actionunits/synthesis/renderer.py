"""Render a `Scene`: the head in pose and expression, relit, in front of the person's hair and a background.

The photograph is already lit. The skin is rendered as photograph x (new shading / shading of the neutral
head), which keeps pores and make-up and relights folds and pose (Liu, Shan & Zhang, "Expressive expression
mapping with ratio images", 2001). Light is linear; integers are pixel centres.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from .complexion import complexion
from .fitting import Camera
from .head_model import EYE, GUMS, LANDMARK_VERTICES, TEETH, HeadModel
from .person import Person, to_linear
from .rasterizer import interpolate, rasterize, vertex_normals
from .sampling import Light, Scene
from .wrinkles import MAP_SCALE

SUPERSAMPLING = 1.4
PHOTO_LIGHT = Light(direction=(0.0, 0.2, 0.98), key=(0.6,) * 3, ambient=(0.5,) * 3)  # of the photographs
GUM_COLOR = np.array([0.34, 0.13, 0.12], np.float32)
TEETH_COLOR = np.array([0.78, 0.72, 0.62], np.float32)
SCLERA_COLOR = np.array([0.62, 0.58, 0.56], np.float32)
IRIS_ANGLE = 28.0  # of the rim of the iris from the eye's axis [degrees]


@dataclass(frozen=True)
class Render:
    """A rendered picture.

    Attributes:
        image: (S, S, 3) float32 linear light 0..1.
        landmarks: (68, 2) float32 iBUG points in pixels.
        lip_gap: vertical distance of the inner lips (points 62 and 66) minus that at rest, in model units
            (cm); negative where one lip covers the other.
    """

    image: np.ndarray
    landmarks: np.ndarray
    lip_gap: float


def render(head: HeadModel, scene: Scene, person: Person, other: Person, background: np.ndarray) -> Render:
    """Render one picture.

    Args:
        head: the head model.
        scene: expression, pose, light and framing.
        person: gives hair, camera and most of the face.
        other: the person whose face is blended in, with the share `scene.blend`.
        background: (S', S', 3) linear light, any size.
    """
    neutral = person.vertices + scene.blend * (other.vertices - person.vertices)
    neutral = neutral + np.tensordot(scene.shape_offset, head.identity_modes[: len(scene.shape_offset)], 1)
    vertices = head.shape(neutral, scene.expression)
    eyeballs = np.unique(head.triangles[head.surface == EYE])
    vertices[eyeballs] = neutral[eyeballs]  # the eyes turn by their texture, see `_eyes`
    size = round(scene.size * SUPERSAMPLING)
    camera = _frame(person.camera.turned(scene.yaw, scene.pitch, scene.roll), vertices, scene, size)
    points = camera.project(vertices).astype(np.float32)

    canvas = cv2.resize(background, (size, size), interpolation=cv2.INTER_LINEAR).astype(np.float32)
    canvas = _hair(canvas, person, points, scene)
    box, surface, color = _head(head, scene, person, other, vertices, points, camera.rotation, size)
    canvas[box] = np.where((surface >= 0)[..., None], color, canvas[box])
    image = cv2.resize(canvas, (scene.size, scene.size), interpolation=cv2.INTER_AREA)
    landmarks = (points[LANDMARK_VERTICES, :2] + 0.5) * (scene.size / size) - 0.5
    return Render(image, landmarks.astype(np.float32), _lip_gap(vertices) - _lip_gap(neutral))


def shading(normals: np.ndarray, light: Light) -> np.ndarray:
    """Light (H, W, 3) on normals (H, W, 3): ambient, stronger from above, plus a Lambertian key light."""
    direction = np.array(light.direction, np.float32)
    direction /= np.linalg.norm(direction)
    lambert = np.clip(normals @ direction, 0, None)[..., None]
    sky = 0.85 + 0.15 * normals[..., 1:2]
    return np.array(light.ambient, np.float32) * sky + np.array(light.key, np.float32) * lambert


def highlight(normals: np.ndarray, light: Light, sharpness: float) -> np.ndarray:
    """Specular reflection (H, W, 3) of the key light on normals (H, W, 3) by Blinn; the camera is at +z."""
    halfway = _unit(_unit(np.array(light.direction, np.float32)) + np.array([0, 0, 1], np.float32))
    return np.clip(normals @ halfway, 0, None)[..., None] ** sharpness * np.array(light.key, np.float32)


def _lip_gap(vertices: np.ndarray) -> float:
    return float(vertices[LANDMARK_VERTICES[62], 1] - vertices[LANDMARK_VERTICES[66], 1])


def _frame(camera: Camera, vertices: np.ndarray, scene: Scene, size: int) -> Camera:
    """The camera that gives the 68 points' box the size and place of the scene."""
    points = camera.project(vertices[LANDMARK_VERTICES])[:, :2]
    low, high = points.min(0), points.max(0)
    scale = scene.face_fraction * size / (high - low).max()
    middle = size * (0.5 + np.array(scene.shift)) - 0.5
    return camera.moved(scale, middle - scale * (low + high) / 2)


def _hair(canvas: np.ndarray, person: Person, points: np.ndarray, scene: Scene) -> np.ndarray:
    """Draw the photograph's hair, neck and shoulders on a plane behind the head that moves with it."""
    front = np.flatnonzero(person.normals[:, 2] > 0.3)[::20]
    source = np.c_[person.texture[front], np.ones(len(front))]
    affine = np.linalg.lstsq(source, points[front, :2].astype(np.float64), rcond=None)[0].T
    photo, silhouette = (
        cv2.warpAffine(layer, affine, canvas.shape[1::-1], borderMode=cv2.BORDER_REPLICATE)
        for layer in (person.photo, person.silhouette)
    )
    facing = np.clip(
        (0.75 - abs(scene.yaw)) / 0.15, 0, 1
    )  # a plane seen from the side does not look like hair
    alpha = silhouette[..., None].astype(np.float32) / 255 * facing
    upright = np.zeros((1, 1, 3), np.float32)
    upright[..., 1:] = (0.3, 0.95)
    light = shading(upright, scene.light) / shading(upright, PHOTO_LIGHT)
    return canvas * (1 - alpha) + complexion(to_linear(photo), scene.skin) * light * alpha


def _head(head, scene, person, other, vertices, points, rotation, size):
    """Rows and columns of the head in the picture, and there surface codes (-1 outside) and colours."""
    normals = vertex_normals(vertices.astype(np.float32), head.triangles) @ rotation.T.astype(np.float32)
    drawn = rasterize(points, head.triangles, size, size)
    box = _box(drawn[0] >= 0)
    triangle_at, depth, weights = (np.ascontiguousarray(part[box]) for part in drawn)
    columns = [normals, person.normals, person.texture, other.texture, person.hidden_color]
    values = np.concatenate([*columns, other.normals[:, 2:], _eye_directions(vertices, head)], 1)
    pixels = interpolate(triangle_at, weights, head.triangles, np.ascontiguousarray(values, np.float32))
    normal, neutral_normal = _unit(pixels[..., :3]), _unit(pixels[..., 3:6])
    surface = np.where(triangle_at >= 0, head.surface[triangle_at], -1)

    light = shading(normal, scene.light)
    ratio = np.clip(light / np.maximum(shading(neutral_normal, PHOTO_LIGHT), 0.3), 0.1, 2.2)
    albedo, shown = _photograph(person, pixels[..., 6:8], neutral_normal[..., 2], scene.wrinkles)
    if scene.blend > 0:
        second, second_shown = _photograph(other, pixels[..., 8:10], pixels[..., 13], scene.wrinkles)
        share = scene.blend * shown * second_shown
        albedo = albedo * (1 - share) + second * share
    albedo = complexion(albedo * shown + pixels[..., 10:13] * (1 - shown), scene.skin)
    color = albedo * ratio + scene.shine * highlight(normal, scene.light, sharpness=12)

    eye = surface == EYE
    if eye.any():
        at = _box(eye)
        eyes = _eyes(pixels[at][..., 14:17], normal[at], light[at], scene) * _lid_shadow(eye, points)[at]
        color[at] = np.where(eye[at][..., None], eyes, color[at])
    behind_lips = np.clip((depth - points[LANDMARK_VERTICES[51], 2]) / 3.0, 0, 1)[..., None]
    for code, paint in ((GUMS, GUM_COLOR), (TEETH, TEETH_COLOR * scene.teeth)):
        inside = paint * light * (1 - 0.65 * np.minimum(behind_lips, 1.0))
        color = np.where((surface == code)[..., None], inside, color)
    return box, surface, color.astype(np.float32)


def _box(mask: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns of the bounding box of a mask (H, W); all of them if it is empty."""
    found = [np.flatnonzero(mask.any(axis)) for axis in (1, 0)]
    return tuple(slice(f[0], f[-1] + 1) if len(f) else slice(None) for f in found)  # type: ignore[return-value]


def _photograph(person: Person, at: np.ndarray, facing: np.ndarray, wrinkles: np.ndarray):
    """Linear colour of the photograph at pixels `at` (H, W, 2), with folds; how visible it is (H, W, 1)."""
    x, y = np.ascontiguousarray(at[..., 0]), np.ascontiguousarray(at[..., 1])
    color = to_linear(cv2.remap(person.photo, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE))
    inside = cv2.remap(person.silhouette, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
    used = np.flatnonzero(wrinkles)
    if len(used):
        strength = (wrinkles[used] / 127).astype(np.float32)
        creases = np.tensordot(strength, person.wrinkles[used].astype(np.float32), 1)
        half_x, half_y = MAP_SCALE * (x + 0.5) - 0.5, MAP_SCALE * (y + 0.5) - 0.5
        crease = cv2.remap(creases, half_x, half_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
        color = color * np.clip(1 + crease, 0.25, 1.3)[..., None]
    shown = np.clip((facing - 0.15) / 0.25, 0, 1) * (inside.astype(np.float32) / 255)
    return color, shown[..., None]


def _eye_directions(vertices: np.ndarray, head: HeadModel) -> np.ndarray:
    """Direction (V, 3) of each eyeball vertex from its eyeball's centre, zero elsewhere."""
    directions = np.zeros_like(vertices)
    eyes = np.unique(head.triangles[head.surface == EYE])
    for side in (eyes[vertices[eyes, 0] > 0], eyes[vertices[eyes, 0] <= 0]):
        directions[side] = vertices[side] - (vertices[side].min(0) + vertices[side].max(0)) / 2
    return directions


def _eyes(direction: np.ndarray, normal: np.ndarray, light: np.ndarray, scene: Scene) -> np.ndarray:
    """Pupil, iris and sclera by the angle from the gaze, and a highlight."""
    yaw, pitch = scene.gaze
    gaze = np.array([np.sin(yaw) * np.cos(pitch), np.sin(pitch), np.cos(yaw) * np.cos(pitch)], np.float32)
    angle = np.degrees(np.arccos(np.clip(_unit(direction) @ gaze, -1, 1)))[..., None]
    rim = np.clip((angle - 23) / 5, 0, 1)
    streaks = 0.8 + 0.2 * np.cos(np.arctan2(direction[..., 1:2], direction[..., :1]) * 9)
    iris = np.array(scene.iris, np.float32) * streaks * (1 - 0.55 * rim)
    color = np.where(angle < IRIS_ANGLE, iris, SCLERA_COLOR)
    color = np.where(angle < scene.pupil, np.float32(0.01), color)
    color = color * (1 - 0.3 * np.clip((angle - 40) / 30, 0, 1))
    toward = _unit(np.array(scene.light.direction, np.float32) + np.array([0, 0, 1], np.float32))
    glint = np.clip(1 - 40 * np.square(normal - toward).sum(-1, keepdims=True), 0, 1)
    return color * light * 0.72 + 0.6 * glint * np.array(scene.light.key, np.float32)


def _lid_shadow(eye: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Darkening (H, W, 1) of the eyeball towards the lids, strongest below the upper one."""
    corners = points[LANDMARK_VERTICES[[36, 39]], :2]
    reach = max(0.10 * float(np.linalg.norm(corners[0] - corners[1])), 0.5)
    open_above = cv2.GaussianBlur(np.roll(eye.astype(np.float32), round(reach), axis=0), (0, 0), reach)
    return np.clip(0.25 + 0.95 * open_above, 0, 1)[..., None]


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / (np.sqrt(np.einsum("...i,...i", vectors, vectors))[..., None] + 1e-6)
