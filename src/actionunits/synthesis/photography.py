"""Surroundings and camera: background, occlusion, shadow, exposure, blur, tight crops, JPEG."""

from __future__ import annotations

import io
from typing import Any

import cv2
import numpy as np
from PIL import Image

# Linear RGB of black, brown, chestnut, blond, red and grey hair.
HAIR = (
    *((0.01, 0.01, 0.01), (0.03, 0.02, 0.012), (0.09, 0.05, 0.03)),
    *((0.35, 0.24, 0.12), (0.22, 0.07, 0.03), (0.3, 0.3, 0.3)),
)
HAIR_SCALE = 3  # supersampling of strands of hair
FILL = 128  # grey level outside of the picture in aligned pictures


def random_background(rng: np.random.Generator, size: int = 64) -> np.ndarray:
    """An out-of-focus background with clutter, (size, size, 3) linear light."""
    cells = int(rng.integers(2, 14))
    hue = rng.random(3) ** 2
    colors = (0.7 * hue + 0.3 * rng.random((cells, cells, 3)) ** 2) * rng.uniform(0.1, 1.0)
    colors = colors + (colors.mean(-1, keepdims=True) - colors) * rng.uniform(0, 1)
    picture = cv2.resize(colors.astype(np.float32), (size, size), interpolation=cv2.INTER_CUBIC)
    for _ in range(int(rng.integers(0, 6))):  # furniture, windows, other people, all as blocks and discs
        color = tuple((rng.random(3) ** 2 * rng.uniform(0.1, 1.0)).tolist())
        x, y, w, h = (int(v) for v in rng.integers(0, size, 4))
        if rng.random() < 0.5:
            cv2.rectangle(picture, (x, y), (x + w // 2, y + h), color, -1)
        else:
            cv2.ellipse(picture, (x, y), (w // 3 + 1, h // 3 + 1), 0, 0, 360, color, -1)
    return np.clip(cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.3, 3.0)), 0, 1)


def occlude(image: Any, landmarks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Cover some faces by glasses, a cap or a fringe, fingers, or a patch of one colour."""
    image = image.copy()
    if rng.random() < 0.12:
        image = _glasses(image, landmarks, rng)
    cover = rng.random()
    if cover < 0.06:
        image = _cap(image, landmarks, rng)
    elif cover < 0.13:
        image = _fringe(image, landmarks, rng)
    if rng.random() < 0.05:
        image = _fingers(image, landmarks, rng)
    if rng.random() < 0.08:
        image = _patch(image, landmarks, rng)
    return image


def cast_shadow(image: Any, rng: np.random.Generator) -> np.ndarray:
    """Shade half of some pictures, with a soft or a hard edge."""
    if rng.random() > 0.12:
        return image
    size = image.shape[0]
    y, x = (np.mgrid[0:size, 0:size] / size - 0.5).astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    side = (x * np.cos(angle) + y * np.sin(angle) - rng.uniform(-0.25, 0.25)) / rng.uniform(0.01, 0.3)
    return image * (1 - rng.uniform(0.2, 0.7) * np.clip(side + 0.5, 0, 1))[..., None].astype(np.float32)


def cut_tightly(picture: Any, landmarks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """uint8 RGB: of some pictures only a tight box around the face is kept, with black or grey around it."""
    if rng.random() > 0.15:
        return picture
    low, high = landmarks.min(0), landmarks.max(0)
    left, top = (low - rng.uniform(0.0, 0.35, 2) * (high - low)).astype(int)
    right, bottom = (high + rng.uniform(0.02, 0.3, 2) * (high - low)).astype(int)
    framed = np.full_like(picture, rng.choice([0, FILL, FILL]))
    inside = np.s_[max(top, 0) : bottom, max(left, 0) : right]
    framed[inside] = picture[inside]
    return framed


def take_photograph(image: Any, rng: np.random.Generator) -> np.ndarray:
    """Linear light (S, S, 3) -> uint8 RGB, as cameras of varying quality would take it."""
    size = image.shape[0]
    picture = np.clip(image * rng.uniform(0.75, 1.4), 0, 1) ** (0.5 * rng.uniform(0.8, 1.25))
    picture = picture * rng.uniform(0.85, 1.1) + rng.normal(0, 0.03)
    if rng.random() < 0.27:
        picture = np.repeat(picture @ np.array([[0.30], [0.59], [0.11]], np.float32), 3, -1)
    elif rng.random() < 0.4:
        gray = picture.mean(-1, keepdims=True)
        picture = gray + (picture - gray) * rng.uniform(0.4, 1.3)
    picture = picture.astype(np.float32)
    if rng.random() < 0.3:
        picture = cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.3, 1.6))
    if rng.random() < 0.08:
        picture = _shaken(picture, rng)
    if rng.random() < 0.35:
        small = round(size * rng.uniform(0.24, 0.9))
        picture = cv2.resize(picture, (small, small), interpolation=cv2.INTER_AREA)
        picture = cv2.resize(picture, (size, size), interpolation=cv2.INTER_LINEAR)
    picture = picture + rng.normal(0, rng.uniform(0, 0.03), picture.shape)
    return (np.clip(picture, 0, 1) * 255).astype(np.uint8)


def to_jpeg(picture: np.ndarray, rng: np.random.Generator) -> bytes:
    """JPEG bytes; six in ten with a quality from 30 to 90, the others with 94."""
    quality = int(rng.integers(30, 90)) if rng.random() < 0.6 else 94
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _shaken(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Blur along a line of 2 to 7 pixels: the camera or the face moved."""
    length, angle = rng.uniform(1, 3.5), rng.uniform(0, np.pi)
    kernel = np.zeros((9, 9), np.float32)
    reach = length * np.array([np.cos(angle), np.sin(angle)])
    ends = [np.round((4 + sign * reach) * 16).astype(int).tolist() for sign in (-1, 1)]
    cv2.line(kernel, ends[0], ends[1], 1.0, 1, cv2.LINE_AA, 4)
    return cv2.filter2D(picture, -1, kernel / kernel.sum(), borderType=cv2.BORDER_REPLICATE)


def _cap(image: Any, landmarks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Cover all above a line between hairline and brows, with a shadow below."""
    up = landmarks[27] - landmarks[33]
    across = (landmarks[16] - landmarks[0]) * rng.uniform(0.6, 0.9)
    middle = landmarks[27] + up * rng.uniform(0.45, 1.0)
    bow = up * rng.uniform(-0.15, 0.3)
    edge = [middle - across, middle - across / 3 + bow, middle + across / 3 + bow, middle + across]
    corners = np.array([*edge, edge[-1] + 3 * up, edge[0] + 3 * up])
    cover = np.zeros(image.shape[:2], np.float32)
    cv2.fillPoly(cover, [np.round(corners * 16).astype(np.int32)], 1.0, cv2.LINE_AA, 4)
    color = rng.random(3).astype(np.float32) ** 3 * rng.uniform(0.05, 0.8)
    shade = cv2.GaussianBlur(cover, (0, 0), 0.06 * float(np.linalg.norm(across)))
    image = image * (1 - 0.5 * shade * rng.random())[..., None]  # the brim's shadow
    return (image * (1 - cover[..., None]) + color * cover[..., None]).astype(np.float32)


def _fringe(image: Any, landmarks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Strands of hair over the forehead and sometimes the brows, swept to one side, with gaps."""
    up, across = landmarks[27] - landmarks[33], (landmarks[16] - landmarks[0]) / 2
    color = np.array(HAIR[rng.integers(len(HAIR))], np.float32) * rng.uniform(0.6, 1.5)
    reach, sweep = rng.uniform(0.15, 1.0), rng.normal(0, 0.4)
    width = 0.03 * float(np.linalg.norm(across)) * HAIR_SCALE
    cover = np.zeros([HAIR_SCALE * length for length in image.shape[:2]], np.uint8)
    shade = np.zeros_like(cover)
    for place in np.sort(rng.uniform(-1, 1, int(rng.integers(60, 220)))):
        root = landmarks[27] + 2.4 * up + 0.8 * place * across
        tip = landmarks[27] + (reach + rng.normal(0, 0.13) - 0.25 * place**2) * up
        tip = tip + (place + sweep + rng.normal(0, 0.08)) * across
        bend = (root + tip) / 2 + (0.3 * place - 0.3 * sweep) * across
        share = np.linspace(0, 1, 9)[:, None]
        strand = (1 - share) ** 2 * root + 2 * share * (1 - share) * bend + share**2 * tip
        strand = [np.round(strand * HAIR_SCALE * 16).astype(np.int32)]
        thickness = max(1, round(width * rng.uniform(0.3, 1.6)))
        cv2.polylines(cover, strand, False, 255, thickness, cv2.LINE_AA, 4)
        cv2.polylines(shade, strand, False, int(rng.integers(90, 256)), thickness, cv2.LINE_AA, 4)
    size = image.shape[1::-1]
    opaque, bright = (
        cv2.resize(m, size, interpolation=cv2.INTER_AREA)[..., None] / np.float32(255) for m in (cover, shade)
    )
    return (image * (1 - opaque) + color * bright).astype(np.float32)


def _fingers(image: Any, landmarks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Two to four fingers of the face's own colour over its lower part."""
    scale = float(np.linalg.norm(landmarks[45] - landmarks[36]))
    x, y = np.clip(landmarks[30], 0, image.shape[0] - 1).astype(int)
    skin = image[y, x] * rng.uniform(0.7, 1.1)
    tip = landmarks[rng.integers(17)] * 0.4 + landmarks[rng.integers(48, 60)] * 0.6
    angle = rng.uniform(0, 2 * np.pi)
    along = np.array([np.cos(angle), np.sin(angle)])
    beside = np.array([-along[1], along[0]])
    width = rng.uniform(0.14, 0.22) * scale
    for k in range(int(rng.integers(2, 5))):
        start = tip + k * beside * 1.15 * width + along * rng.uniform(0, 0.4) * width
        middle = start + along * rng.uniform(0.5, 0.9) * scale
        box = (tuple(middle.tolist()), (2 * float(np.linalg.norm(middle - start)), width * 1.1))
        for factor, share in ((0.7, 1.0), (0.85, 0.85), (1.0, 0.6)):  # from the dark rim to the light middle
            size = (box[1][0] * (0.9 + 0.1 * share), box[1][1] * share)
            color = tuple((skin * factor).tolist())
            cv2.ellipse(image, (box[0], size, float(np.degrees(angle))), color, -1, cv2.LINE_AA)
    return image


def _glasses(image: Any, landmarks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Two rims, a bridge and temples; sometimes tinted."""
    color = tuple((rng.random(3) * 0.15).tolist())
    lenses = [landmarks[36:42].mean(0), landmarks[42:48].mean(0)]
    between = float(np.linalg.norm(lenses[1] - lenses[0]))
    angle = float(np.degrees(np.arctan2(*(lenses[1] - lenses[0])[::-1])))
    width, height = rng.uniform(0.62, 0.85) * between, rng.uniform(0.42, 0.65) * between
    line = max(1, round(between * rng.uniform(0.02, 0.07)))
    tint = rng.uniform(0.0, 0.9) if rng.random() < 0.25 else 0.0
    glass: Any = image.copy()
    for middle in lenses:
        box = ((float(middle[0]), float(middle[1] + 0.05 * between)), (width, height), angle)
        cv2.ellipse(glass, box, color, -1, cv2.LINE_AA)
        image = image * (1 - tint) + glass * tint if tint else image
        cv2.ellipse(image, box, color, line, cv2.LINE_AA)
    half = (lenses[1] - lenses[0]) / between * width / 2
    bridge = (lenses[0] + half, lenses[1] - half)
    temples = (lenses[0] - half, landmarks[0]), (lenses[1] + half, landmarks[16])
    for ends in (bridge, *temples):
        start, end = (np.round(point).astype(int).tolist() for point in ends)
        cv2.line(image, start, end, color, line)
    return image


def _patch(image: Any, landmarks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An ellipse of any colour, or of the face's own, as a hand has, over part of the face."""
    low, high = landmarks.min(0), landmarks.max(0)
    middle = rng.uniform(low, high)
    axes = rng.uniform(0.06, 0.22, 2) * (high - low)
    color = tuple((rng.random(3) ** 2).tolist())
    if rng.random() < 0.5:
        x, y = np.clip(landmarks[30], 0, image.shape[0] - 1).astype(int)
        color = tuple((image[y, x] * rng.uniform(0.7, 1.2)).tolist())
    box = (tuple(middle.tolist()), tuple((2 * axes).tolist()), float(rng.uniform(0, 180)))
    return cv2.ellipse(image, box, color, -1, cv2.LINE_AA)
