"""Sample clips from videos: LAC's temporal sampling strategy, and fixed strides for detection.

Huang et al., Lock and Check, IEEE Transactions on Affective Computing (manuscript of 2025), Algorithm 1: each
subject's sequence is cut into N_sep subsequences of equal length, and a clip of t frames is drawn from each.
As printed, every clip comes from the first subsequence and has t + 1 frames; here the j-th clip comes from
the j-th subsequence and has t. Frames are rows of a data set, those of a sequence in temporal order.

A temporal network trains on `ClipDataset` with a `ClipCollator`, which augments all frames of a clip alike; a
network of single images trains on a data set of frames with the `TemporalSampler`. Both draw new clips each
epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor
from torch.utils.data import Dataset, Sampler

from actionunits.data.collator import AUCollator, stack_samples


class ClipDataset(Dataset):
    """Clips of a data set of frames, drawn anew each epoch (Algorithm 1).

    `transformers.Trainer` calls `set_epoch` in a single process; custom training loops must call it.

    Args:
        frames: Its items are dictionaries of tensors, such as `AlignedFaces`.
        sequences: (N,) name of each frame's sequence, such as its video.
        subjects: (N,) name of each frame's subject; the sequences themselves if left out.
        clip_length: Frames per clip (t).
        num_subsequences: Clips per sequence (N_sep).
        seed: Seed of the draw, together with the epoch.
    """

    def __init__(
        self,
        frames: Any,
        sequences: Sequence[str] | np.ndarray,
        subjects: Sequence[str] | np.ndarray | None = None,
        clip_length: int = 16,
        num_subsequences: int = 12,
        seed: int = 0,
    ):
        if len(sequences) != len(frames):
            raise ValueError(
                f"{len(sequences)} names of sequences for {len(frames)} frames; pass one per frame."
            )
        self.frames, self.seed = frames, seed
        self.sequences, self.subjects = sequences, subjects
        self.clip_length, self.num_subsequences = clip_length, num_subsequences
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the clips of an epoch into `clips` (n, t), as rows of `frames`."""
        self.clips = sample_clips(
            self.sequences, self.subjects, self.clip_length, self.num_subsequences, (self.seed, epoch)
        )

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: values[0] for name, values in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """A batch of clips, stacked: (B, T, ...)."""
        clips = self.clips[np.asarray(indices)]
        rows = clips.ravel().tolist()
        if hasattr(self.frames, "__getitems__"):
            frames = stack_samples(self.frames.__getitems__(rows))
        else:
            frames = stack_samples([self.frames[row] for row in rows])
        return {name: values.unflatten(0, clips.shape) for name, values in frames.items()}


@dataclass(frozen=True)
class ClipCollator:
    """Collates clips of `ClipDataset` for a temporal network.

    Attributes:
        collate: Collator of frames, whose augmentation is drawn once per clip.
    """

    collate: AUCollator

    def __call__(self, samples: Any) -> dict[str, Tensor]:
        """Stack the clips and return the model's inputs, augmented with PyTorch's global generator."""
        return self.inputs(stack_samples(samples))

    def inputs(self, batch: dict[str, Tensor], generator: Generator | None = None) -> dict[str, Tensor]:
        """The model's inputs for stacked clips (B, T, ...): those of `AUCollator` with T after B."""
        seed = int(torch.randint(2**62, (), generator=generator))
        frames = [
            self.collate.inputs(
                {name: values[:, t] for name, values in batch.items()}, torch.Generator().manual_seed(seed)
            )
            for t in range(next(iter(batch.values())).shape[1])
        ]
        return {name: torch.stack([frame[name] for frame in frames], dim=1) for name in frames[0]}


class TemporalSampler(Sampler[int]):
    """Samples the frames of an epoch's clips in random order, for networks of single images (Table IV, TS).

    Call `set_epoch` before each epoch. The arguments are those of `ClipDataset`.
    """

    def __init__(
        self,
        sequences: Sequence[str] | np.ndarray,
        subjects: Sequence[str] | np.ndarray | None = None,
        clip_length: int = 16,
        num_subsequences: int = 12,
        seed: int = 0,
    ):
        self.arguments = (sequences, subjects, clip_length, num_subsequences)
        self.seed, self.epoch = seed, 0
        self.count = sample_clips(*self.arguments).size

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose clips are sampled."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        rows = sample_clips(*self.arguments, (self.seed, self.epoch)).ravel()
        # Independent of the random numbers of the clips.
        yield from np.random.default_rng([self.seed, self.epoch, 1]).permutation(rows).tolist()


def sample_clips(
    sequences: Sequence[str] | np.ndarray,
    subjects: Sequence[str] | np.ndarray | None = None,
    clip_length: int = 16,
    num_subsequences: int = 12,
    seed: int | tuple[int, ...] = 0,
) -> np.ndarray:
    """Draw the training clips of an epoch (Algorithm 1).

    All subjects contribute the same number of clips: `num_subsequences` for each sequence of the subject with
    the most sequences; others repeat their sequences with new clips. In a subsequence shorter than a clip,
    the clip extends into the next subsequence, or starts earlier at the end of the sequence. A sequence
    shorter than a clip repeats its last frame.

    Args:
        sequences: (N,) name of each frame's sequence; its frames are in temporal order, gaps are allowed.
        subjects: (N,) name of each frame's subject; the sequences themselves if left out.
        clip_length: Frames per clip (t).
        num_subsequences: Clips per sequence (N_sep).
        seed: Seed of the draw, such as (seed, epoch).

    Returns:
        (n, t) rows, subject by subject.

    Raises:
        ValueError: There are no frames, a number is below 1, or a sequence has several subjects.
    """
    if clip_length < 1 or num_subsequences < 1:
        raise ValueError(
            f"clip_length={clip_length} and num_subsequences={num_subsequences} must be at least 1."
        )
    rng = np.random.default_rng(seed)
    subjects = sequences if subjects is None else subjects
    by_subject = _rows_by_subject(np.asarray(sequences), np.asarray(subjects))
    rounds = max(len(videos) for videos in by_subject)
    clips = []
    for videos in by_subject:
        for i in range(rounds):
            rows = videos[i % len(videos)]
            length = len(rows) // num_subsequences  # N_SF
            for j in range(num_subsequences):
                start = j * length + int(rng.integers(0, max(length - clip_length, 0), endpoint=True))
                start = max(0, min(start, len(rows) - clip_length))
                clips.append(rows[np.minimum(start + np.arange(clip_length), len(rows) - 1)])
    return np.stack(clips)


class InferenceClip(NamedTuple):
    """A clip of consecutive frames for detection.

    Attributes:
        rows: (T,) rows of the frames.
        warm_up: Number of frames at the start that were predicted in the clip before.
    """

    rows: np.ndarray
    warm_up: int


def fixed_stride_clips(
    sequences: Sequence[str] | np.ndarray, clip_length: int = 16, stride: int | None = None
) -> list[InferenceClip]:
    """Cut sequences into clips for detection; each frame is predicted once.

    Args:
        sequences: (N,) name of each frame's sequence; its frames are in temporal order.
        clip_length: Frames per clip; a sequence's last one may be shorter.
        stride: Frames from one clip to the next; by default `clip_length`, as in the paper.

    Raises:
        ValueError: `stride` does not lie in [1, clip_length].
    """
    stride = clip_length if stride is None else stride
    if not 1 <= stride <= clip_length:
        raise ValueError(f"stride={stride} must lie in [1, clip_length={clip_length}] to cover all frames.")
    clips = []
    for rows in _rows_by_name(np.asarray(sequences)):
        starts = range(0, max(1, len(rows) - (clip_length - stride)), stride)
        clips += [InferenceClip(rows[s : s + clip_length], clip_length - stride if s else 0) for s in starts]
    return clips


def _rows_by_subject(sequences: np.ndarray, subjects: np.ndarray) -> list[list[np.ndarray]]:
    """Rows of each sequence of each subject, in the order of first appearance."""
    if not len(sequences) or len(sequences) != len(subjects):
        raise ValueError(
            f"{len(sequences)} names of sequences and {len(subjects)} of subjects; pass one per frame."
        )
    found: dict[str, list[np.ndarray]] = {}
    for rows in _rows_by_name(sequences):
        owners = np.unique(subjects[rows])
        if len(owners) > 1:
            raise ValueError(
                f"sequence {str(sequences[rows[0]])!r} has {len(owners)} subjects, such as "
                f"{owners[:2].tolist()}; give each subject's sequences their own names, such as subject_task."
            )
        found.setdefault(owners[0], []).append(rows)
    return list(found.values())


def _rows_by_name(names: np.ndarray) -> list[np.ndarray]:
    _, first, index = np.unique(names, return_index=True, return_inverse=True)
    order = np.argsort(index, kind="stable")
    groups = np.split(order, np.cumsum(np.bincount(index))[:-1])
    return [groups[i] for i in np.argsort(first)]


__all__ = [
    "ClipCollator",
    "ClipDataset",
    "InferenceClip",
    "TemporalSampler",
    "fixed_stride_clips",
    "sample_clips",
]
