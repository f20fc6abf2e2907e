import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from actionunits import checkpoints
from actionunits.cli import sample_photo
from actionunits.face_landmarks import (
    GAPS,
    FaceLandmarker,
    FaceLandmarkerConfig,
    FaceLandmarkerMaps,
    landmark_loss,
)
from actionunits.landmarks import SCHEMES, mirror_landmarks

TINY = FaceLandmarkerConfig(image_size=32, hidden_sizes=[4, 4, 4, 8, 8], neck_size=4, intermediate_size=8)
CARD = Path(__file__).parents[1] / "model_cards" / "face-landmarks.md"


@pytest.fixture(scope="module")
def trained() -> FaceLandmarker:
    return FaceLandmarker.from_pretrained(checkpoints.path("face_landmarks"), dtype=torch.float32)


def test_the_second_network_can_be_left_out(tmp_path):
    torch.manual_seed(0)
    model = FaceLandmarker(FaceLandmarkerConfig(**TINY.to_dict() | {"fine_look": True})).eval()
    model.save_pretrained(tmp_path / "both")
    first, info = FaceLandmarker.from_pretrained(tmp_path / "both", fine_look=False, output_loading_info=True)
    assert first.fine is None and not info["missing_keys"] and not info["unexpected_keys"]
    first.save_pretrained(tmp_path / "first")
    again = FaceLandmarker.from_pretrained(tmp_path / "first")
    pixels = torch.randn(2, 3, 32, 32)
    assert again.fine is None and torch.equal(again(pixels).landmarks, model(pixels).landmarks)


@pytest.mark.parametrize("change", [{}, {"map_size": 4}, {"fine_look": True}], ids=str)
def test_saves_and_loads_to_the_bit(tmp_path, change):
    torch.manual_seed(0)
    model = FaceLandmarker(FaceLandmarkerConfig(**TINY.to_dict() | change)).eval()
    model.save_pretrained(tmp_path)
    again, info = FaceLandmarker.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(pixels).landmarks, again(pixels).landmarks)
    assert again.config.fine_look == (again.fine is not None) == ("fine_look" in change)
    if again.fine is not None:
        assert torch.equal(model.fine(pixels).landmarks, again.fine(pixels).landmarks)
        assert not torch.equal(again.fine(pixels).landmarks, again(pixels).landmarks)


def test_the_configuration_may_ask_for_tuples():
    model = FaceLandmarker(FaceLandmarkerConfig(**{**TINY.to_dict(), "return_dict": False})).eval()
    pixels = torch.randn(2, 3, 32, 32)
    output = model(pixels, return_dict=True)
    for as_tuple in (model(pixels), model(pixels, return_dict=None)):
        assert isinstance(as_tuple, tuple) and len(as_tuple) == 2
        assert torch.equal(as_tuple[0], output.landmarks) and torch.equal(as_tuple[1], output.face_logits)
    assert len(model.locate(Image.new("RGB", (64, 64)), [(8, 8, 56, 56)])) == 1


def test_a_map_points_where_its_mass_lies():
    class Peaks(torch.nn.Module):
        def forward(self, x):
            assert x.shape == (2, 6, 8, 8)  # as fine as the finest
            maps = torch.zeros(2, 68, 8, 8)
            maps[:, :, 2, 5] = maps[:, 0, 3, 5] = 40.0  # row 2, column 5; the first point's is twice as high
            maps[1] = 0
            return maps

    maps = FaceLandmarkerMaps((3, 4, 5), 6)
    maps.out = Peaks()
    points = maps(torch.randn(2, 3, 8, 8), torch.randn(2, 4, 4, 4), torch.randn(2, 5, 2, 2))
    expected = torch.tensor([5.5 / 8, 2.5 / 8]).repeat(68, 1)
    expected[0, 1] = 3 / 8
    torch.testing.assert_close(points, torch.stack([expected, torch.full((68, 2), 0.5)]))


def test_the_maps_see_where_features_lie():
    torch.manual_seed(0)
    maps = FaceLandmarkerMaps((3, 4, 5), 6).eval()
    fine = torch.zeros(2, 3, 16, 16)
    fine[0, :, 5, 5] = fine[1, :, 5, 9] = 50.0
    points = maps(fine, torch.zeros(2, 4, 8, 8), torch.zeros(2, 5, 4, 4))
    moved = (points[1] - points[0]).detach()
    assert moved[:, 0].abs().mean() > 0.003 and moved[:, 1].abs().max() < 1e-4


def test_the_mirror_image_of_a_crop_counts_as_much_as_the_crop():
    torch.manual_seed(0)
    model = FaceLandmarker(TINY).eval()
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    crop = model._crop(np.array([15.5, 15.5]), 32, np.zeros(2))
    mirror = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    with torch.inference_mode():
        (points,), (score,) = model._look(picture, [crop], also_mirrored=True)
        (others,), (other,) = model._look(mirror, [crop], also_mirrored=True)
        (alone,), (alone_score,) = model._look(picture, [crop])
        (other_alone,), (other_alone_score,) = model._look(mirror, [crop])
        pixels = (torch.from_numpy(noise).permute(2, 0, 1)[None] / 255 - 0.5) / 0.5  # the crop is all of it
        output = model(pixels)
    assert np.abs(alone - 15.5).max() < 3  # an untrained network points to the middle
    np.testing.assert_allclose(alone, 32 * output.landmarks[0] - 0.5, atol=1e-3)
    assert alone_score == pytest.approx(torch.sigmoid(output.face_logits).item(), abs=1e-5)
    mean = (alone + mirror_landmarks(other_alone, "ibug68", 32)) / 2
    np.testing.assert_allclose(points, mean, atol=1e-4)
    assert score == pytest.approx((alone_score + other_alone_score) / 2, abs=1e-6)
    np.testing.assert_allclose(mirror_landmarks(others, "ibug68", 32), points, atol=1e-4)
    assert score == pytest.approx(other, abs=1e-6)
    assert np.abs(alone - points).max() > 0.01


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
        wrong = (landmarks[i] - labels[i]).detach().numpy()
        expected += smooth.mean() / 2
        for pairs in GAPS.values():
            gaps = np.abs([wrong[start] - wrong[end] for start, end in pairs])
            expected += 0.5 * np.where(gaps < 0.02, gaps**2 / 0.04, gaps - 0.01).mean() / 2
    probability = torch.sigmoid(logits).detach().numpy()
    expected -= 0.1 * np.mean(np.log([probability[0], 1 - probability[1], probability[2]]))
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert not landmarks.grad[1].any() and landmarks.grad[0].any() and logits.grad.all()
    labels[1] = float("nan")  # what is not a face has no points
    before, landmarks.grad = landmarks.grad, None
    landmark_loss(landmarks, logits, labels, is_face).backward()
    torch.testing.assert_close(landmarks.grad, before, rtol=0, atol=0)


def test_gaps_mirror_each_other_and_do_not_tell_where_a_face_lies():
    mirror = SCHEMES["ibug68"].mirror
    for gap in GAPS.values():
        sides = {frozenset(pair) for pair in gap}
        assert {frozenset(mirror[point] for point in pair) for pair in sides} == sides
    assert {point for pair in GAPS["lip"] for point in pair} == {61, 62, 63, 65, 66, 67}
    assert {point for pair in GAPS["lid"] for point in pair} == {37, 38, 40, 41, 43, 44, 46, 47}
    shut = torch.rand(1, 68, 2)
    moved = shut + torch.tensor([0.1, -0.2])  # a face that lies elsewhere is as open as before
    rest = landmark_loss(moved, torch.full((1,), 99.0), shut)
    assert rest.item() == pytest.approx((0.1 - 0.005 + 0.2 - 0.005) / 2 * (51 + 17 / 2) / 68, rel=1e-4)


def test_wrong_sizes_are_refused():
    with pytest.raises(Exception, match="image_size=100"):
        FaceLandmarkerConfig(image_size=100)


def test_no_box_no_answer(trained):
    assert trained.locate(Image.new("RGB", (64, 64)), []) == []


def test_looks_again_where_it_pays(trained, monkeypatch):
    """Hopeless boxes get one look, sure faces two, doubtful ones a third, of which the surer points stay."""
    monkeypatch.setitem(trained._modules, "fine", None)
    scores = [[0.01, 0.9, 0.9, 0.9, 0.9], [0.99, 0.5, 0.5, 0.01], [0.4, 0.97]]
    looks = iter(scores)

    def look(image, crops, also_mirrored=False):
        answer = next(looks)
        assert len(crops) == len(answer)
        number = scores.index(answer)
        return [np.full((68, 2), 10.0 * number) + np.arange(136).reshape(68, 2) for _ in answer], list(answer)

    monkeypatch.setattr(trained, "_look", look)
    located = trained.locate(Image.new("RGB", (64, 64)), [(0, 0, 30, 30)] * 5)
    np.testing.assert_allclose([score for _, score in located], [0.01, 0.99, 0.45, 0.735, 0.01])
    assert [points[0, 0] for points, _ in located] == [0, 10, 10, 20, 10]


def test_fine_looks_correct_the_points_of_faces_and_leave_scores(monkeypatch):
    torch.manual_seed(0)
    model = FaceLandmarker(FaceLandmarkerConfig(**TINY.to_dict() | {"fine_look": True})).eval()
    square = np.random.default_rng(0).uniform(5, 25, (68, 2))
    first = iter([[0.01, 0.4, 0.97, 0.5], [0.3, 0.96, 0.99], [0.1]])  # a first, second and third look

    def look(image, crops, also_mirrored=False):
        scores = next(first)
        assert len(scores) == len(crops)
        return [square + 100 * score for score in scores], scores

    seen = []

    def look_finely(image, crops, also_mirrored=False):
        assert also_mirrored
        seen.append([crop.inverse_transform(np.full((1, 2), 15.5))[0] for crop in crops])  # their middles
        return [square + 7 * len(seen) + i for i in range(len(crops))], [0.0] * len(crops)

    monkeypatch.setattr(model, "_look", look)
    monkeypatch.setattr(model.fine, "_look", look_finely)
    located = model.locate(Image.new("RGB", (64, 64)), [(0, 0, 30, 30)] * 4)
    np.testing.assert_allclose([score for _, score in located], [0.01, 0.2, 0.96, 0.99])
    for (points, _), moved in zip(located, (1, 30, 14, 15), strict=True):
        np.testing.assert_allclose(points, square + moved)
    assert [len(middles) for middles in seen] == [2, 2]
    for i, (before, after) in enumerate(zip(*seen, strict=True)):  # the second cuts as the first corrected
        np.testing.assert_allclose(after - before, 7 + i - 100 * (0.96, 0.99)[i])


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
        parts = [f"{100 * row[part + ' error mean']:.2f} %" for part in ("brows", "nose", "eyes", "lips")]
        gaps = [f"{row[gap + ' gap correlation']:.2f}" for gap in GAPS]
        assert f"| {name} | {' | '.join(parts)} |" in text and f"| {name} | {' | '.join(gaps)} |" in text


def test_lips_of_the_packaged_network_open_with_the_mouth():
    metrics = json.loads((checkpoints.path("face_landmarks") / "metrics.json").read_text())
    assert metrics["synthetic test people"]["lip gap correlation"] > 0.7
