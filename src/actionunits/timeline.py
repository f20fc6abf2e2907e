"""All action units of a video in one picture: a block for each face, a strip for each action unit over time.

However long the video is, a face has at most `BINS` bins; when they are full, neighbours are merged in pairs.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from actionunits.action_units import au_name
from actionunits.visualization import ACTIVE, FAINT, GROOVE, INACTIVE, INK, PAPER, face_color

BINS = 2048
MAX_FACES = 6
"""Largest number of blocks, for the faces that were seen longest."""

_KEPT_FACES = 64  # the face seen shortest makes room for a new one
_UNIT = 14  # font size [pixels]
_STRIP, _GAP = 26, 5  # height of a strip, and gap to the next [pixels]
_LEFT, _WIDTH, _RIGHT = 250, 1000, 150  # names, strip, figures [pixels]
_HEAD, _FOOT = 44, 34  # title and axis of a block [pixels]
_TICK_STEPS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400)  # [s]


class Timeline:
    """Collects the results of a video and draws them.

    Args:
        thresholds: Score from which each action unit is active, by label, top to bottom.

    Example:
        >>> timeline = Timeline(decision_thresholds(detect.model.config))
        >>> for frame in detect(video="clip.mp4"):
        ...     timeline.add(frame)
        >>> timeline.draw().save("timeline.png")
    """

    def __init__(self, thresholds: Mapping[str, float]):
        self.thresholds = dict(thresholds)
        self.seconds_per_bin = 1e-3
        self.end = 0.0  # [s]
        self.frames = np.zeros(BINS, dtype=np.int64)
        self.faces: dict[int, _Sums] = {}

    def add(self, answer: Mapping[str, Any]) -> None:
        """Add the pipeline's result for one frame; frames without timestamps count as one second each."""
        time = answer["frame"] if answer["timestamp"] is None else answer["timestamp"]
        self.end = max(self.end, time)
        while time >= BINS * self.seconds_per_bin:
            self._halve()
        place = int(time / self.seconds_per_bin)
        self.frames[place] += 1
        for face in answer["faces"]:
            if face["face_id"] not in self.faces:
                self._make_room()
                self.faces[face["face_id"]] = _Sums(len(self.thresholds))
            self.faces[face["face_id"]].add(place, face["action_units"], list(self.thresholds))

    def scores(self, face_id: int) -> np.ndarray:
        """Mean scores (bins, m) of a face over time, NaN where there were only frames without it.

        A bin in which no frame begins repeats the one before.
        """
        last = int(self.end / self.seconds_per_bin) + 1
        sums = self.faces[face_id]
        with np.errstate(invalid="ignore"):
            means = sums.scores[:last] / sums.count[:last, None]
        shown = np.maximum.accumulate(np.where(self.frames[:last] > 0, np.arange(last), 0))
        return means[shown]

    def longest(self) -> list[int]:
        """Numbers of the faces seen longest, `MAX_FACES` at most, in order."""
        return sorted(sorted(self.faces, key=lambda number: -self.presence(number))[:MAX_FACES])

    def presence(self, face_id: int) -> float:
        """Share of the frames that show the face."""
        return float(self.faces[face_id].count.sum() / max(self.frames.sum(), 1))

    def summary(self, face_id: int) -> dict[str, tuple[float, float]]:
        """Mean score and share of active frames of each action unit, over the frames that show the face."""
        sums = self.faces[face_id]
        shown = sums.count.sum()
        figures = zip(sums.scores.sum(axis=0) / shown, sums.active / shown, strict=True)
        return {
            label: (float(mean), float(active))
            for label, (mean, active) in zip(self.thresholds, figures, strict=True)
        }

    def draw(self) -> Image.Image:
        """Draw a block for each of the faces seen longest, in the order of their numbers."""
        longest = self.longest()
        blocks = [self._block(number) for number in longest] or [_note("No face found")]
        if (left_out := len(self.faces) - len(longest)) > 0:
            blocks.append(_note(f"and at least {left_out} more, seen for a shorter time"))
        canvas = Image.new("RGB", (blocks[0].width, sum(block.height for block in blocks)), PAPER)
        top = 0
        for block in blocks:
            canvas.paste(block, (0, top))
            top += block.height
        return canvas

    def _halve(self) -> None:
        self.seconds_per_bin *= 2
        self.frames = _pairs(self.frames)
        for sums in self.faces.values():
            sums.count, sums.scores = _pairs(sums.count), _pairs(sums.scores)

    def _make_room(self) -> None:
        if len(self.faces) >= _KEPT_FACES:
            del self.faces[min(self.faces, key=self.presence)]

    def _block(self, number: int) -> Image.Image:
        summary, scores = self.summary(number), self.scores(number)
        height = _HEAD + len(self.thresholds) * (_STRIP + _GAP) + _FOOT
        block = Image.new("RGB", (_LEFT + _WIDTH + _RIGHT, height), PAPER)
        draw = ImageDraw.Draw(block)
        draw.rounded_rectangle((16, 14, 30, 28), 4, face_color(number - 1))  # as in `draw_frame`
        seen = f"in {100 * self.presence(number):.0f} % of the frames"
        draw.text((38, 21), f"Face {number}, {seen}", INK, _font(1.1), anchor="lm")
        draw.text((_LEFT + _WIDTH + 62, 21), "mean", FAINT, _font(), anchor="rm")
        draw.text((_LEFT + _WIDTH + 132, 21), "active", FAINT, _font(), anchor="rm")
        for i, (label, threshold) in enumerate(self.thresholds.items()):
            top = _HEAD + i * (_STRIP + _GAP)
            self._strip(block, scores[:, i], threshold, top)
            _name(draw, label, top + _STRIP // 2)
            mean, active = summary[label]
            figures = f"{mean:.2f}", f"{100 * active:.0f} %"
            for x, figure in zip((62, 132), figures, strict=True):
                draw.text((_LEFT + _WIDTH + x, top + _STRIP // 2), figure, INK, _font(), anchor="rm")
        self._axis(draw, height - _FOOT)
        return block

    def _strip(self, block: Image.Image, scores: np.ndarray, threshold: float, top: int) -> None:
        """Fill the area below the scores, in colour where active; hatch where the face was missing."""
        columns = scores[np.arange(_WIDTH) * len(scores) // _WIDTH]  # (W,)
        level = (np.arange(_STRIP)[::-1, None] + 0.5) / _STRIP  # (S, 1), from the bottom
        pixels = np.broadcast_to(np.array(GROOVE, np.uint8), (_STRIP, _WIDTH, 3)).copy()
        pixels[level < columns] = INACTIVE
        pixels[(level < columns) & (columns >= threshold)] = ACTIVE
        y, x = np.indices((_STRIP, _WIDTH))
        pixels[np.isnan(columns) & ((x + y) % 7 > 0)] = PAPER
        pixels[round((1 - threshold) * (_STRIP - 1)), ::4] = INK
        block.paste(Image.fromarray(pixels), (_LEFT, top))

    def _axis(self, draw: ImageDraw.ImageDraw, top: int) -> None:
        span = max(self.end, 1e-3)
        step = next((step for step in _TICK_STEPS if span / step <= 12), _TICK_STEPS[-1])
        for tick in np.arange(0, span + 1e-9, step):
            x = _LEFT + tick / span * (_WIDTH - 1)
            draw.line((x, top, x, top + 5), FAINT)
            draw.text((x, top + 14), _clock(tick, step), FAINT, _font(0.85), anchor="mm")


class _Sums:
    """Of one face: frames and sums of scores per bin; frames with each action unit active overall."""

    def __init__(self, units: int):
        self.count = np.zeros(BINS, dtype=np.int64)
        self.scores = np.zeros((BINS, units))
        self.active = np.zeros(units, dtype=np.int64)

    def add(self, place: int, units: list[dict[str, Any]], labels: list[str]) -> None:
        by_label = {unit["label"]: unit for unit in units}
        self.count[place] += 1
        self.scores[place] += [by_label[label]["score"] for label in labels]
        self.active += [by_label[label]["active"] for label in labels]


def _pairs(bins: np.ndarray) -> np.ndarray:
    """Merge neighbours in pairs; the second half becomes free."""
    sums = bins.reshape(-1, 2, *bins.shape[1:]).sum(axis=1)
    return np.concatenate([sums, np.zeros_like(sums)])


def _name(draw: ImageDraw.ImageDraw, label: str, middle: int) -> None:
    draw.text((16, middle), label, INK, _font(), anchor="lm")
    draw.text((64, middle), au_name(label), FAINT, _font(), anchor="lm")


def _note(text: str) -> Image.Image:
    block = Image.new("RGB", (_LEFT + _WIDTH + _RIGHT, _HEAD), PAPER)
    ImageDraw.Draw(block).text((16, 21), text, INK, _font(1.1), anchor="lm")
    return block


def _clock(seconds: float, step: float) -> str:
    """12 s, 1:05, 2:03:00; tenths of seconds where ticks are closer than a second."""
    if step < 1:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{seconds:02d}"
    return f"{minutes}:{seconds:02d}" if minutes else f"{seconds} s"


def _font(scale: float = 1.0) -> Any:
    return ImageFont.load_default(round(_UNIT * scale))
