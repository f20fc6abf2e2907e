"""The temporal sampling strategy: where clips come from, that subjects weigh the same, that seeds decide."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from actionunits.data import NO_AUGMENTATION, AUCollator, Augmentation, InputGeometry
from actionunits.data.sampling import (
    ClipCollator,
    ClipDataset,
    TemporalSampler,
    fixed_stride_clips,
    sample_clips,
)


def names(**lengths):
    return [name for name, length in lengths.items() for _ in range(length)]


def test_each_clip_comes_from_its_own_subsequence():
    """Algorithm 1 with the offset that it lacks: three subsequences of 40 frames, clips of 16."""
    starts = []
    for epoch in range(300):
        clips = sample_clips(names(a=120), num_subsequences=3, seed=(0, epoch))
        assert clips.shape == (3, 16)
        assert (np.diff(clips) == 1).all()
        for j, clip in enumerate(clips):
            assert 40 * j <= clip[0]
            assert clip[-1] < 40 * (j + 1)
        starts.append(clips[:, 0])
    starts = np.array(starts)
    for j in range(3):
        assert set(starts[:, j]) == set(range(40 * j, 40 * j + 25))  # all starts, both ends included


def test_every_subject_gives_as_many_clips():
    sequences = names(a1=60, a2=60, a3=60, b1=500, c1=40, c2=90)
    subjects = [name[0] for name in sequences]
    clips = sample_clips(sequences, subjects, clip_length=8, num_subsequences=4, seed=1)
    owners = Counter(subjects[row] for row in clips[:, 0])
    assert owners == {"a": 12, "b": 12, "c": 12}
    sources = Counter(sequences[row] for row in clips[:, 0])
    assert sources == {"a1": 4, "a2": 4, "a3": 4, "b1": 12, "c1": 8, "c2": 4}
    for clip in clips:
        assert len({sequences[row] for row in clip}) == 1
    of_b = clips[[sequences[row] == "b1" for row in clips[:, 0]]]
    assert len(np.unique(of_b[:, 0])) > 4  # not the same clips again


def test_rows_of_a_sequence_may_lie_apart():
    sequences = ["a", "b"] * 20
    clips = sample_clips(sequences, clip_length=4, num_subsequences=2)
    assert (np.diff(clips) == 2).all()
    assert {sequences[row] for row in clips[:2].ravel()} == {"a"}


def test_short_sequences_borrow_and_repeat():
    clips = sample_clips(names(a=20), clip_length=16, num_subsequences=4)  # subsequences of five frames
    assert (np.diff(clips) == 1).all()
    assert clips[0, 0] == 0
    assert clips[-1, -1] == 19
    clips = sample_clips(names(a=3), clip_length=5, num_subsequences=2)
    assert clips.tolist() == [[0, 1, 2, 2, 2]] * 2


def test_a_clip_may_be_one_frame_of_the_whole_sequence():
    starts = {int(sample_clips(names(a=5), None, 1, 1, (0, epoch))[0, 0]) for epoch in range(200)}
    assert starts == set(range(5))


def test_seed_and_epoch_decide():
    sequences = names(a=400, b=400)
    draw = [sample_clips(sequences, seed=s) for s in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert (draw[0] == draw[1]).all()
    assert (draw[0] != draw[2]).any()
    assert (draw[0] != draw[3]).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "0 names of sequences"),
        ((["a", "b"], ["x"]), "2 names of sequences and 1 of subjects"),
        ((["a", "a"], ["x", "y"]), "sequence 'a' has 2 subjects"),
        ((["a"], None, 0), "clip_length=0"),
        ((["a"], None, 1, 0), "num_subsequences=0"),
    ],
)
def test_nonsense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        sample_clips(*arguments)


# Detection.


@pytest.mark.parametrize("stride", [None, 1, 3, 4])
def test_fixed_strides_answer_for_each_frame_once(stride):
    sequences = names(a=11, b=4, c=1, d=5)
    answered = Counter()
    for rows, warm_up in fixed_stride_clips(sequences, 4, stride):
        assert 0 <= warm_up < len(rows) <= 4
        assert (np.diff(rows) == 1).all()
        answered.update(rows[warm_up:].tolist())
    assert answered == Counter(range(len(sequences)))


def test_the_papers_stride_is_the_window():
    clips = fixed_stride_clips(names(a=35), 16)
    assert [(len(clip.rows), clip.warm_up) for clip in clips] == [(16, 0), (16, 0), (3, 0)]
    overlapping = fixed_stride_clips(names(a=35), 16, stride=12)
    assert [clip.rows[0] for clip in overlapping] == [0, 12, 24]
    assert [clip.warm_up for clip in overlapping] == [0, 4, 4]
    for stride in (0, 17):
        with pytest.raises(ValueError, match=f"stride={stride} must lie in"):
            fixed_stride_clips(names(a=35), 16, stride)


# Data sets.


class Numbers(Dataset):
    """Frames that know their own row."""

    def __len__(self):
        return 100

    def __getitem__(self, index):
        return {"row": torch.tensor(index), "labels": torch.full((3,), index)}


def test_clip_dataset_gives_clips_that_change_by_the_epoch():
    clips = ClipDataset(Numbers(), names(a=60, b=40), clip_length=4, num_subsequences=5, seed=3)
    assert len(clips) == 10
    first = clips[7]
    assert first["row"].tolist() == clips.clips[7].tolist()
    assert first["labels"].shape == (4, 3)
    batch = next(iter(DataLoader(clips, batch_size=3, collate_fn=lambda batch: batch)))
    assert batch["row"].tolist() == clips.clips[:3].tolist()
    before = clips.clips
    clips.set_epoch(1)
    assert (clips.clips != before).any()
    clips.set_epoch(0)
    assert (clips.clips == before).all()
    with pytest.raises(ValueError, match="3 names of sequences for 100 frames"):
        ClipDataset(Numbers(), ["a"] * 3)


def test_sampler_of_stills_gives_the_frames_of_the_clips():
    sequences = names(a=60, b=40)
    sampler = TemporalSampler(sequences, clip_length=4, num_subsequences=5, seed=3)
    clips = ClipDataset(Numbers(), sequences, clip_length=4, num_subsequences=5, seed=3)
    for epoch in (0, 1):
        sampler.set_epoch(epoch), clips.set_epoch(epoch)
        rows = list(sampler)
        assert len(rows) == len(sampler) == 40
        assert sorted(rows) == sorted(clips.clips.ravel().tolist())
        assert rows != clips.clips.ravel().tolist()
        assert rows == list(sampler)


def make_clips(batch=2, frames=3, size=20):
    generator = torch.Generator().manual_seed(0)
    face = torch.randint(0, 256, (batch, 1, size, size, 3), generator=generator, dtype=torch.uint8)
    points = 4 + 12 * torch.rand(batch, 1, 68, 2, generator=generator)
    identity = torch.tensor([[1.0, 0, 0], [0, 1, 0]])
    return {
        "pictures": face.expand(-1, frames, -1, -1, -1),
        "landmarks": points.expand(-1, frames, -1, -1),
        "alignments": identity.expand(batch, frames, 2, 3),
        "occurrence": torch.arange(batch * frames).view(batch, frames, 1).expand(-1, -1, 2) % 2,
    }


def test_all_frames_of_a_clip_are_varied_alike_and_clips_differently():
    geometry = InputGeometry(aligned_size=20, crop_size=16, input_size=16)
    strong = Augmentation(rotation=5, scale=0.1, translation=1, landmark_noise=1, blur=0.5, erase=0.5)
    collate = ClipCollator(AUCollator([1, 12], geometry=geometry, augmentation=strong))
    batch = make_clips()
    inputs = collate.inputs(batch, torch.Generator().manual_seed(5))
    assert inputs["pixel_values"].shape == (2, 3, 3, 16, 16)
    assert inputs["au_centers"].shape == (2, 3, 2, 2, 2)
    for name in ("pixel_values", "au_centers"):
        for t in (1, 2):
            torch.testing.assert_close(inputs[name][:, t], inputs[name][:, 0], rtol=0, atol=0)
    assert inputs["labels"].tolist() == batch["occurrence"].tolist()
    other = collate.inputs(batch, torch.Generator().manual_seed(6))
    assert not torch.equal(other["pixel_values"], inputs["pixel_values"])
    same_faces = {name: value[:1].expand(2, *value.shape[1:]) for name, value in batch.items()}
    varied = collate.inputs(same_faces, torch.Generator().manual_seed(5))["pixel_values"]
    assert not torch.equal(varied[0], varied[1])


def test_unvaried_clips_are_their_frames():
    collate = AUCollator([1, 12], geometry=InputGeometry(20, 16, 16), augmentation=NO_AUGMENTATION)
    batch = make_clips()
    clips = ClipCollator(collate)([{n: v[i] for n, v in batch.items()} for i in range(2)])
    frames = collate({name: value.flatten(0, 1) for name, value in batch.items()})
    for name, value in clips.items():
        torch.testing.assert_close(value.flatten(0, 1), frames[name])
