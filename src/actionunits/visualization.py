"""Draw the pipeline's results: boxes and landmarks on the photo, bars beside it, attention maps as heat maps.

Colours are those of Okabe and Ito (2008), which colour-blind people can tell apart; heat runs from dark to
bright, so it also works in grey. Sizes are in units of the font size, which follows the size of the drawing.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from actionunits.pictures import load_picture

PAPER, INK, FAINT = (255, 255, 255), (33, 37, 43), (120, 128, 138)
INACTIVE, ACTIVE, GROOVE = (160, 174, 188), (213, 94, 0), (236, 239, 242)
FACE_COLORS = ((0, 114, 178), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233))
HEAT = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))  # inferno, evenly spaced

_PHOTO_SIDE = (720, 1600)  # range of the drawn photo's longest side [pixels]
_SHARPNESS = 2  # supersampling: Pillow draws lines without antialiasing
_PANEL_WIDTH = 29  # [units]
_FRAME_HEIGHT = (480, 1080)  # range of the frame's height in an annotated video [pixels]


def draw_faces(
    image: Any, faces: Sequence[Mapping[str, Any]], thresholds: Mapping[str, float] | float | None = None
) -> Image.Image:
    """Draw the faces of a photo, with a panel of bars for each.

    Args:
        image: The photo, anything that `load_picture` takes.
        faces: The pipeline's result for it.
        thresholds: Score from which an action unit is active, by label or for all: a mark on the bars.

    Returns:
        RGB picture. The photo keeps its shape; small ones are enlarged, large ones shrunk.
    """
    photo = load_picture(image)
    longest = max(photo.size)
    scale = min(max(longest, _PHOTO_SIDE[0]), _PHOTO_SIDE[1]) / longest * _SHARPNESS
    photo = _resized(photo, scale, Image.Resampling.LANCZOS)
    unit = int(min(max(photo.height / 42, 15 * _SHARPNESS), 26 * _SHARPNESS))
    panels = [_panel(photo, face, i, scale, thresholds, unit) for i, face in enumerate(faces)]
    panels = panels or [_empty_panel(unit)]
    for i, face in enumerate(faces):
        _draw_face(photo, face, i, scale, unit)
    return _beside(photo, panels).reduce(_SHARPNESS)


def draw_frame(
    image: Any, faces: Sequence[Mapping[str, Any]], thresholds: Mapping[str, float]
) -> Image.Image:
    """Draw one frame of a video: its numbered faces, and a panel of bars for the lowest number.

    Args:
        image: The frame, anything that `load_picture` takes.
        faces: The pipeline's result for it, with `face_id`.
        thresholds: Score from which each action unit is active, by label.

    Returns:
        RGB picture, of the same size for all frames of one size.
    """
    frame = load_picture(image)
    scale = min(max(frame.height, _FRAME_HEIGHT[0]), _FRAME_HEIGHT[1]) / frame.height * _SHARPNESS
    frame = _resized(frame, scale, Image.Resampling.BICUBIC)
    unit = int(frame.height / (12 + 1.55 * len(thresholds)))  # the panel of `_panel` is so many units high
    faces = sorted(faces, key=lambda face: -face["face_id"])
    places = [face["face_id"] - 1 for face in faces]  # the marks count from 1, the faces of a video from 0
    panel = _panel(frame, faces[-1], places[-1], scale, thresholds, unit) if faces else _empty_panel(unit)
    for place, face in zip(places, faces, strict=True):
        _draw_face(frame, face, place, scale, max(unit, 12 * _SHARPNESS))
    return _beside(frame, [panel]).reduce(_SHARPNESS)


def draw_maps(image: Any, face: Mapping[str, Any], columns: int | None = None) -> Image.Image:
    """Draw the attention map of each action unit over the aligned face, in a grid.

    Args:
        image: The photo, anything that `load_picture` takes.
        face: One face of the pipeline's result with `return_maps=True`.
        columns: Tiles per row; by default four, or six for more than twelve action units.

    Returns:
        RGB picture. Each map is scaled from its minimum to its maximum: heat shows where, not how much.

    Raises:
        ValueError: The face has no maps.
    """
    if "maps" not in face:
        raise ValueError("The face has no maps; call the pipeline with return_maps=True.")
    side, unit = 220 * _SHARPNESS, 15 * _SHARPNESS
    aligned = face["alignment"].resize(side, side).warp(load_picture(image))
    units = face["action_units"]
    columns = min(columns or (4 if len(units) <= 12 else 6), len(units))
    gap, row_height = unit, side + 3 * unit
    rows = -(-len(units) // columns)
    canvas = Image.new("RGB", (columns * (side + gap) + gap, rows * row_height + gap), PAPER)
    for i, au in enumerate(units):
        left, top = gap + i % columns * (side + gap), gap + i // columns * row_height
        canvas.paste(_heat_over(aligned, face["maps"][au["label"]]), (left, top))
        _caption(ImageDraw.Draw(canvas), au, left, top + side + unit // 3, side, unit)
    return canvas.reduce(_SHARPNESS)


def _resized(photo: Image.Image, scale: float, how: Image.Resampling) -> Image.Image:
    width, height = (max(round(side * scale), 1) for side in photo.size)  # a strip may be a hair's breadth
    return photo.resize((width, height), how)


def _draw_face(photo: Image.Image, face: Mapping[str, Any], i: int, scale: float, unit: int) -> None:
    """Draw the box, number and landmarks of face i on the enlarged photo."""
    draw, color, box = ImageDraw.Draw(photo), face_color(i), _box(face, scale)
    line = max(unit // 7, 2)
    draw.rounded_rectangle(_grown(box, line), radius=unit // 2, outline=PAPER, width=line * 2)
    draw.rounded_rectangle(box, radius=unit // 2, outline=color, width=line)
    dot = min(max((box[2] - box[0]) / 110, 1.0 * _SHARPNESS), unit / 5)
    for x, y in (np.asarray(face["landmarks"]).reshape(-1, 2) + 0.5) * scale:
        draw.ellipse(_grown((x, y, x, y), dot * 1.5), fill=INK)
        draw.ellipse(_grown((x, y, x, y), dot), fill=PAPER)
    _number(draw, i, box[0], max(box[1] - 1.6 * unit, 0), unit)


def _panel(
    photo: Image.Image, face: Mapping[str, Any], i: int, scale: float, thresholds: Any, unit: int
) -> Image.Image:
    """Draw a close-up of one face and its bars."""
    units = face["action_units"]
    row, side = int(1.55 * unit), 9 * unit
    head = side + 2 * unit
    panel = Image.new("RGB", (_PANEL_WIDTH * unit, head + row * len(units) + unit), PAPER)
    box = _box(face, scale)
    left, top, right, bottom = _grown(box, 0.1 * (box[2] - box[0]))
    close_up = photo.crop((max(left, 0), max(top, 0), min(right, photo.width), min(bottom, photo.height)))
    panel.paste(ImageOps.pad(close_up, (side, side), color=GROOVE), (unit, unit))
    draw, left = ImageDraw.Draw(panel), 1.6 * unit + side
    _number(draw, i, left, unit, unit)
    draw.text((left + 2.2 * unit, 1.8 * unit), f"Face {i + 1}", INK, _font(1.15 * unit), anchor="lm")
    active = sum(au["active"] for au in units)
    lines = (f"confidence {face['confidence']:.2f}", f"{active} of {len(units)} action units active")
    for k, line in enumerate(lines):
        draw.text((left, (3.6 + 1.4 * k) * unit), line, FAINT, _font(0.9 * unit), anchor="lm")
    for k, au in enumerate(units):
        threshold = thresholds.get(au["label"]) if isinstance(thresholds, Mapping) else thresholds
        _bar(draw, au, threshold, head + row * k + row // 2, unit)
    return panel


def _bar(
    draw: ImageDraw.ImageDraw, au: Mapping[str, Any], threshold: float | None, middle: int, unit: int
) -> None:
    """Draw one row: label, name, bar with a mark at the threshold, score."""
    font = _font(0.95 * unit)
    ink, faint, fill = (ACTIVE, ACTIVE, ACTIVE) if au["active"] else (INK, FAINT, INACTIVE)
    draw.text((unit, middle), au["label"], ink, font, anchor="lm")
    draw.text((4.2 * unit, middle), au["name"], faint, font, anchor="lm")
    left, width, half = 15.5 * unit, 9.5 * unit, 0.4 * unit
    draw.rounded_rectangle((left, middle - half, left + width, middle + half), half, GROOVE)
    filled = max(au["score"] * width, 2 * half)
    draw.rounded_rectangle((left, middle - half, left + filled, middle + half), half, fill)
    if threshold is not None:
        x = left + threshold * width
        draw.line((x, middle - 1.5 * half, x, middle + 1.5 * half), INK, max(unit // 8, 1))
    draw.text((28 * unit, middle), f"{au['score']:.2f}", ink, font, anchor="rm")


def _empty_panel(unit: int) -> Image.Image:
    panel = Image.new("RGB", (_PANEL_WIDTH * unit, 4 * unit), PAPER)
    ImageDraw.Draw(panel).text((unit, 2 * unit), "No face found", INK, _font(1.15 * unit), anchor="lm")
    return panel


def _beside(photo: Image.Image, panels: Sequence[Image.Image]) -> Image.Image:
    """Stack the panels right of the photo, in as many columns as its height requires."""
    per_column = max(photo.height // panels[0].height, 1)
    columns = [panels[i : i + per_column] for i in range(0, len(panels), per_column)]
    height = max(photo.height, *(sum(panel.height for panel in column) for column in columns))
    canvas = Image.new("RGB", (photo.width + sum(column[0].width for column in columns), height), PAPER)
    canvas.paste(photo, (0, (height - photo.height) // 2))
    left = photo.width
    for column in columns:
        top = 0
        for panel in column:
            canvas.paste(panel, (left, top))
            top += panel.height
        left += column[0].width
    return canvas


def _heat_over(face: Image.Image, map_: np.ndarray) -> Image.Image:
    """Blend a map (h, w) over the grey aligned face, more opaque where it is hotter."""
    heat = np.asarray(map_, dtype=np.float32) - np.min(map_)
    heat = heat / max(float(heat.max()), 1e-12)
    smooth = np.asarray(Image.fromarray(heat).resize(face.size, Image.Resampling.BICUBIC)).clip(0, 1)
    stops = np.linspace(0, 1, len(HEAT))
    colors = np.stack([np.interp(smooth, stops, channel) for channel in np.array(HEAT).T], axis=-1)
    weight = 0.15 + 0.5 * smooth[..., None]
    grey = np.asarray(face.convert("L").convert("RGB"), dtype=np.float32)
    return Image.fromarray(((1 - weight) * grey + weight * colors + 0.5).astype(np.uint8))


def _caption(
    draw: ImageDraw.ImageDraw, au: Mapping[str, Any], left: int, top: int, width: int, unit: int
) -> None:
    color = ACTIVE if au["active"] else INK
    middle = top + 0.8 * unit
    draw.text((left, middle), f"{au['label']}  {au['name']}", color, _font(0.85 * unit), anchor="lm")
    draw.text((left + width, middle), f"{au['score']:.2f}", color, _font(0.85 * unit), anchor="rm")


def _number(draw: ImageDraw.ImageDraw, i: int, left: float, top: float, unit: int) -> None:
    box = (left, top, left + 1.6 * unit, top + 1.6 * unit)
    draw.rounded_rectangle(box, unit // 3, face_color(i))
    draw.text((left + 0.8 * unit, top + 0.8 * unit), str(i + 1), PAPER, _font(unit), anchor="mm")


def face_color(i: int) -> tuple[int, int, int]:
    """Return the RGB colour of face i."""
    return FACE_COLORS[i % len(FACE_COLORS)]


def _box(face: Mapping[str, Any], scale: float) -> list[float]:
    """Edges of the face's box on the enlarged photo."""
    return [(face["box"][edge] + 0.5) * scale for edge in ("xmin", "ymin", "xmax", "ymax")]


def _grown(box: Sequence[float], by: float) -> tuple[float, float, float, float]:
    return box[0] - by, box[1] - by, box[2] + by, box[3] + by


def _font(size: float) -> Any:
    return ImageFont.load_default(max(round(size), 6))
