"""Streaming detection with LAC in videos of any length, with constant memory."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actionunits.modeling_outputs import AUDetectionOutput

if TYPE_CHECKING:
    from .modeling_lac import LacForAUDetection, State


class LacStream:
    """Detection of one face in a video, called like the model with consecutive portions of frames.

    The LSTM is causal, so predictions need no later frames and do not depend on the portions. They equal
    those of clips, up to the order of summation of floats:

        stream(clip_length=16)             model(clips) of `fixed_stride_clips(..., 16)`: as in the paper
        stream(clip_length=16, overlap=4)  the same with `fixed_stride_clips(..., 16, stride=12)`
        stream(clip_length=None)           model(video[None]), the whole video as one clip

    These differ from each other, as the LSTM is reset at the start of a clip. Streams differ from clips after
    a `reset` within a clip, and in training mode, in which batch normalisation uses the frames of a portion.

    Args:
        model: The model, in evaluation mode.
        clip_length: Frames after which the LSTM is reset; None for never.
        overlap: Frames before a clip that warm up its LSTM, among the clip's `clip_length` frames.

    Raises:
        ValueError: `clip_length` is below 1, or `overlap` not in [0, clip_length).

    Example:
        >>> stream = model.stream()
        >>> for pixel_values in portions:  # (n, 3, 224, 224), any n
        ...     probabilities = stream(pixel_values).logits.sigmoid()  # (n, m)
    """

    def __init__(self, model: LacForAUDetection, clip_length: int | None, overlap: int = 0):
        if clip_length is not None and clip_length < 1:
            raise ValueError(f"clip_length={clip_length} must be at least 1, or None for no end.")
        if not 0 <= overlap < (clip_length or 1):
            raise ValueError(f"overlap={overlap} must lie in [0, clip_length={clip_length}), or be 0.")
        self.model, self.clip_length, self.overlap = model, clip_length, overlap
        self.reset()

    def reset(self) -> None:
        """Start a new clip with the next frame, after a cut or when the face was lost."""
        self._state: State | None = None
        self._position = 0  # frames of the current clip so far
        self._recent: deque[Tensor] = deque(maxlen=self.overlap)  # f' (m, d) of the frames before

    @torch.no_grad()
    def __call__(self, pixel_values: Tensor, output_au_attentions: bool = False) -> AUDetectionOutput:
        """Detect in the next n frames.

        Args:
            pixel_values: (n, 3, H, W), the normalised aligned face.
            output_au_attentions: Return `au_attentions` and `au_evidence` (n, m, h, w), too.

        Returns:
            `logits` (n, m).
        """
        locked = self.model._lock(pixel_values)
        logits = locked.logits
        if self.model.config.state_detection:
            logits = self.advance(self.model._relate(locked))
        maps: dict[str, Any] = locked.attentions() if output_au_attentions else {}
        return AUDetectionOutput(logits=logits, **maps)

    @torch.no_grad()
    def advance(self, vectors: Tensor) -> Tensor:
        """Detect in the next n frames from their vectors: `model.spatial_vectors` (n, m, d) -> logits (n, m).

        This allows batches of pictures with the faces of several streams.
        """
        logits = [vectors.new_zeros(0, vectors.shape[1])]
        while len(vectors):
            if self._position == self.clip_length:
                self._begin_clip()
            room = len(vectors) if self.clip_length is None else self.clip_length - self._position
            part, vectors = vectors[:room], vectors[room:]
            answer, self._state = self.model.check(part[None], self._state)
            self._position += len(part)
            self._recent.extend(part[-self.overlap :] if self.overlap else ())
            logits.append(answer[0])
        return torch.cat(logits)

    def _begin_clip(self) -> None:
        """Reset the LSTM and warm it up with the frames before."""
        self._state, self._position = None, len(self._recent)
        if self._recent:
            _, self._state = self.model.check(torch.stack(tuple(self._recent))[None])


__all__ = ["LacStream"]
