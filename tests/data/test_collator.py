"""What the collator makes of faces is what the image processor makes of the same pictures."""

import dataclasses

import numpy as np
import pytest
import torch

from actionunits import AUImageProcessor
from actionunits.action_units import UNKNOWN
from actionunits.data import AUCollator, Augmentation, InputGeometry
from actionunits.landmarks import reduce_landmarks

GEOMETRY = InputGeometry(200, 176, 48)


def collate(faces, **options) -> AUCollator:
    return AUCollator(aus=faces.aus, geometry=GEOMETRY, **options)


@pytest.mark.parametrize(
    ("mean", "std"), [([0.5] * 3, [0.5] * 3), ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]
)
def test_it_agrees_with_the_image_processor(faces, mean, std):
    processor = AUImageProcessor(
        size={"height": 48, "width": 48}, aus=list(faces.aus), image_mean=mean, image_std=std
    )
    rows = range(6)
    expected = processor(
        [faces.picture(i) for i in rows], landmarks=[faces.landmarks[i] for i in rows], return_tensors="pt"
    )
    batch = collate(faces, mean=mean, std=std)([faces[i] for i in rows])
    torch.testing.assert_close(batch["au_centers"], expected["au_centers"], rtol=0, atol=1e-3)
    scale, shift = (255 * torch.tensor(values).view(3, 1, 1) for values in (std, mean))
    drawn, reference = (values["pixel_values"] * scale + shift for values in (batch, expected))  # grey levels
    difference = (torch.floor(drawn + 1e-3) - reference).abs()  # Pillow drops the fraction
    assert difference.mean() < 0.2 and difference.quantile(0.99) < 2
    assert batch["pixel_values"].is_contiguous(memory_format=torch.channels_last)


def test_centres_of_other_places_than_the_labels(faces):
    rows = [faces[i] for i in range(3)]
    plain, others = collate(faces)(rows), collate(faces, places=[25, *faces.aus[:2]])(rows)
    torch.testing.assert_close(others["au_centers"][:, 1:], plain["au_centers"][:, :2], rtol=0, atol=0)
    assert others["au_centers"].shape == (3, 3, 2, 2) and torch.equal(others["labels"], plain["labels"])


def test_centres_of_the_definition_that_is_asked_for(faces):
    points = np.random.default_rng(0).uniform(20, 180, (3, 98, 2)).astype(np.float32)
    batch = faces.__getitems__(range(3)) | {"landmarks": torch.from_numpy(points)}
    batch["alignments"] = torch.eye(2, 3).expand(3, 2, 3)
    found = collate(faces.with_aus([4]), scheme="wflw98", au_centers="lac").inputs(batch)["au_centers"]
    x, y = points.transpose(2, 1, 0)
    expected = [[(x[37] + x[51]) / 2, y[37]], [(x[42] + x[51]) / 2, y[42]]]  # LAC, Table I
    expected = (np.transpose(expected, (2, 0, 1)) - 12 + 0.5) * 48 / 176 - 0.5  # cropped and shrunk
    np.testing.assert_allclose(found[:, 0], expected, atol=1e-3)


def test_a_stacked_batch_equals_stacked_samples(faces):
    one_by_one, at_once = (
        collate(faces)([faces[i] for i in (4, 1, 7)]),
        collate(faces)(faces.__getitems__([4, 1, 7])),
    )
    assert one_by_one.keys() == at_once.keys() == {"pixel_values", "au_centers", "labels"}
    assert all(torch.equal(one_by_one[name], at_once[name]) for name in at_once)


@pytest.mark.parametrize("scheme", ["ibug68", "ibug49"])
def test_mirrored_faces_keep_left_centres_left(faces, scheme):
    points = np.stack([reduce_landmarks(face, "ibug68", scheme) for face in faces.landmarks])
    faces = dataclasses.replace(faces, landmarks=points.astype(np.float32), scheme=scheme)
    batch = faces.__getitems__(range(4))
    mirror = Augmentation(random_crop=False, mirror=1, brightness=0, contrast=0)
    plain, mirrored = (
        collate(faces, scheme=scheme, **o).inputs(batch) for o in ({}, {"augmentation": mirror})
    )
    torch.testing.assert_close(mirrored["pixel_values"], plain["pixel_values"].flip(-1), rtol=0, atol=1e-3)
    expected = plain["au_centers"].flip(2)  # the other side's centre
    expected = torch.stack([47 - expected[..., 0], expected[..., 1]], -1)
    paired = [i for i, au in enumerate(faces.aus) if au in (1, 2, 4, 6, 7, 12, 14, 15)]
    torch.testing.assert_close(mirrored["au_centers"][:, paired], expected[:, paired], rtol=0, atol=1e-3)
    assert (mirrored["au_centers"][:, paired, 0, 0] < mirrored["au_centers"][:, paired, 1, 0]).all()


def test_landmark_noise_moves_centres_and_not_the_picture(faces):
    batch = faces.__getitems__(range(8))
    still = {"random_crop": False, "mirror": 0, "brightness": 0, "contrast": 0}
    plain = collate(faces).inputs(batch)
    noisy = collate(faces, augmentation=Augmentation(**still, landmark_noise=3)).inputs(
        batch, torch.Generator().manual_seed(0)
    )
    assert torch.equal(plain["pixel_values"], noisy["pixel_values"])
    corner = faces.aus.index(12)  # AU12's centres are the mouth corners themselves
    moved = (noisy["au_centers"] - plain["au_centers"])[:, corner] * 176 / 48
    assert moved.std().item() == pytest.approx(3, rel=0.3)


def test_targets(faces):
    batch = faces.__getitems__(range(5))
    batch["occurrence"] = batch["occurrence"].clone()
    batch["occurrence"][2, 3] = UNKNOWN
    labels = collate(faces).inputs(batch)["labels"]
    assert torch.equal(labels, batch["occurrence"].float())
    soft = collate(faces, target="intensity").inputs(batch)["labels"]
    expected = batch["intensities"].clone()
    expected[2, 3] = UNKNOWN
    assert torch.equal(soft, expected)
    half = collate(faces, target="intensity", full_intensity=0.5).inputs(batch)["labels"]
    torch.testing.assert_close(half, torch.where(expected < 0, expected, (expected * 2).clamp(max=1)))
    batch["intensities"][4, 1] = UNKNOWN  # coded as there, but not how strongly
    labels = collate(faces, target="intensity", full_intensity=0.5).inputs(batch)["labels"]
    half[4, 1] = UNKNOWN
    assert torch.equal(labels, half)
    del batch["intensities"]
    with pytest.raises(ValueError, match="needs a corpus with intensities"):
        collate(faces, target="intensity").inputs(batch)


def test_the_faces_are_not_changed(faces):
    before = [faces.pictures.copy(), faces.landmarks.copy(), faces.occurrence.copy()]
    strong = Augmentation(rotation=3, translation=3, landmark_noise=2, blur=1, erase=1)
    collate(faces, augmentation=strong)([faces[i] for i in range(len(faces))])
    for array, kept in zip((faces.pictures, faces.landmarks, faces.occurrence), before, strict=True):
        np.testing.assert_array_equal(array, kept)


def test_it_serves_the_trainer(faces, tmp_path):
    """`transformers.Trainer` takes faces and collator as they are, and computes metrics on them."""
    from transformers import Trainer, TrainingArguments

    from actionunits import GdaConfig, GdaForAUDetection
    from actionunits.metrics import trainer_metrics

    config = GdaConfig.compact(image_size=48, aus=list(faces.aus), stage_depths=[0, 0, 0])
    trainer = Trainer(
        GdaForAUDetection(config),
        TrainingArguments(
            str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=6,
            remove_unused_columns=False,
            use_cpu=True,
        ),
        data_collator=collate(faces, augmentation=Augmentation()),
        train_dataset=faces,
        eval_dataset=faces,
        compute_metrics=trainer_metrics(faces.aus),
    )
    trainer.train()
    figures = trainer.evaluate()
    assert {"eval_loss", "eval_f1", "eval_auc", "eval_f1_AU26"} <= figures.keys()
    trainer.args.remove_unused_columns = True  # the default: it leaves nothing of our items
    with pytest.raises(ValueError, match="pass remove_unused_columns=False"):
        trainer.train()


def test_frozen_settings_can_be_replaced(faces):
    assert dataclasses.replace(collate(faces), target="intensity").target == "intensity"
