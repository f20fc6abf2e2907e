import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from actionunits import checkpoints
from actionunits.cli import sample_photo
from actionunits.face_landmarks import FaceLandmarker, FaceLandmarkerConfig, landmark_loss

TINY = FaceLandmarkerConfig(image_size=32, hidden_sizes=[4, 4, 4, 8, 8], neck_size=4, intermediate_size=8)
CARD = Path(__file__).parents[1] / "model_cards" / "face-landmarks.md"


@pytest.fixture(scope="module")
def trained() -> FaceLandmarker:
    return FaceLandmarker.from_pretrained(checkpoints.path("face_landmarks"), dtype=torch.float32)


def test_saves_and_loads_to_the_bit(tmp_path):
    torch.manual_seed(0)
    model = FaceLandmarker(TINY).eval()
    model.save_pretrained(tmp_path)
    again, info = FaceLandmarker.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(pixels).landmarks, again(pixels).landmarks)


def test_loss_against_the_formula_and_its_gradient():
    torch.manual_seed(0)
    landmarks = torch.rand(3, 68, 2, requires_grad=True)
    logits = torch.randn(3, requires_grad=True)
    labels, is_face = torch.rand(3, 68, 2), torch.tensor([1, 0, 1])
    loss = landmark_loss(landmarks, logits, labels, is_face)
    expected = 0.0
    for i in (0, 2):
        distance = (landmarks[i] - labels[i]).abs().detach().numpy()
        smooth = np.where(distance < 0.01, distance**2 / 0.02, distance - 0.005)
        smooth[:17] /= 2
        expected += smooth.mean() / 2
    probability = torch.sigmoid(logits).detach().numpy()
    expected -= 0.1 * np.mean(np.log([probability[0], 1 - probability[1], probability[2]]))
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert not landmarks.grad[1].any() and landmarks.grad[0].any() and logits.grad.all()


def test_wrong_sizes_are_refused():
    with pytest.raises(Exception, match="image_size=100"):
        FaceLandmarkerConfig(image_size=100)


def test_no_box_no_answer(trained):
    assert trained.locate(Image.new("RGB", (64, 64)), []) == []


def test_finds_the_face_of_the_sample_wherever_the_box_is_a_little_off(trained):
    image = Image.open(sample_photo()).convert("RGB")
    answers = trained.locate(image, [(175, 70, 275, 175), (165, 80, 280, 190), (185, 75, 270, 165)])
    assert all(score > 0.9 for _, score in answers)
    first = answers[0][0]
    eyes = np.linalg.norm(first[36] - first[45])
    for points, _ in answers[1:]:
        assert np.linalg.norm(points - first, axis=1)[17:].mean() < 0.05 * eyes
    left_eye, right_eye, mouth = first[36:42].mean(0), first[42:48].mean(0), first[48:60].mean(0)
    assert left_eye[0] < right_eye[0] and mouth[1] > left_eye[1]
    assert 190 < left_eye[0] < 220 and 95 < left_eye[1] < 125  # by eye, in the photograph


def test_many_boxes_are_one_box_at_a_time(trained):
    image = Image.open(sample_photo()).convert("RGB")
    boxes = [(175, 70, 275, 175), (165, 80, 280, 190)]
    together = trained.locate(image, boxes)
    for box, (points, score) in zip(boxes, together, strict=True):
        [(alone, alone_score)] = trained.locate(image, [box])
        np.testing.assert_allclose(points, alone, atol=0.02)
        assert score == pytest.approx(alone_score, abs=1e-4)


def test_turned_faces_are_found_turned(trained):
    image = Image.open(sample_photo()).convert("RGB").crop((125, 25, 325, 225))  # the face in the middle
    center = 99.5
    [(upright, _)] = trained.locate(image, [(50, 45, 150, 150)])
    turned = image.rotate(15, Image.Resampling.BILINEAR)  # counter-clockwise
    [(found, score)] = trained.locate(turned, [(50, 45, 150, 150)])
    c, s = np.cos(np.radians(15)), np.sin(np.radians(15))
    expected = (upright - center) @ np.array([[c, -s], [s, c]]) + center
    assert score > 0.9
    assert np.linalg.norm(found - expected, axis=1)[17:].mean() < 0.06 * np.linalg.norm(
        upright[36] - upright[45]
    )


def test_card_quotes_the_recorded_figures():
    metrics = json.loads((checkpoints.path("face_landmarks") / "metrics.json").read_text())
    text = CARD.read_text(encoding="utf-8")
    assert text == (checkpoints.path("face_landmarks") / "README.md").read_text(encoding="utf-8")
    for name in ("synthetic test people", "photographs of test people"):
        row = metrics[name]
        figures = [
            f"{100 * row[key]:.2f} %" for key in ("inner error mean", "inner error median", "worse than 10 %")
        ]
        assert f"| {name} | {row['pictures']} | {' | '.join(figures)} |" in text
