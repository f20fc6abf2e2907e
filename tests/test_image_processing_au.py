import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from PIL import Image, ImageOps
from transformers import image_processing_base
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from actionunits import AUImageProcessor, EscdaConfig, GdaConfig, LscConfig
from actionunits.alignment import Alignment, level_eyes
from actionunits.au_regions import au_centers
from actionunits.image_processing_au import decision_thresholds
from actionunits.landmarks import reduce_landmarks


@pytest.fixture(scope="module")
def processor():
    return AUImageProcessor()


# --- what comes out -------------------------------------------------------------------------------


def test_pixels_centres_and_alignment(processor, photo, landmarks):
    inputs = processor(photo, landmarks=landmarks, return_tensors="pt")
    assert {name: (tuple(v.shape), v.dtype) for name, v in inputs.items()} == {
        "pixel_values": ((1, 3, 112, 112), torch.float32),
        "alignment": ((1, 2, 3), torch.float32),
        "au_centers": ((1, 12, 2, 2), torch.float32),
    }
    alignment = level_eyes(landmarks, "ibug68", 200).crop(12, 12, 176, 176).resize(112, 112)
    expected = np.asarray(alignment.warp(photo), dtype=np.float64) / 127.5 - 1
    np.testing.assert_allclose(inputs["pixel_values"][0], expected.transpose(2, 0, 1), atol=1e-6)
    centers = au_centers(alignment.transform(landmarks), "ibug68", processor.aus)
    np.testing.assert_allclose(inputs["au_centers"][0], centers, atol=1e-4)


def test_the_face_lies_where_the_papers_put_it(processor, photo, landmarks):
    inputs = processor(photo, landmarks=landmarks)
    five = reduce_landmarks(
        Alignment(inputs["alignment"][0], (112, 112)).transform(landmarks), "ibug68", "five"
    )
    left_eye, right_eye = five[:2]
    assert left_eye[1] == pytest.approx(right_eye[1], abs=1e-3)  # level
    middle = (five.min(0) + five.max(0)) / 2
    np.testing.assert_allclose(middle, [55.5, 55.5], atol=1e-3)  # centred
    side = (five.max(0) - five.min(0)).max()
    assert side == pytest.approx(199 / 2.9 * 112 / 176, abs=1e-3)  # 2.9 times the box fills 200 pixels


def test_the_transform_back(processor, photo, landmarks):
    inputs = processor(photo, landmarks=landmarks, aus=[12])
    alignment = Alignment(inputs["alignment"][0], (112, 112))
    corners = alignment.inverse_transform(inputs["au_centers"][0][0])
    np.testing.assert_allclose(corners, landmarks[[48, 54]], atol=1e-3)


def test_interpolating_once_keeps_more_detail_than_the_papers_steps(processor, photo, landmarks):
    once = processor(photo, landmarks=landmarks, do_rescale=False, do_normalize=False)["pixel_values"][0]
    steps = level_eyes(landmarks, "ibug68", 200).warp(photo).crop((12, 12, 188, 188))
    steps = np.asarray(steps.resize((112, 112), Image.Resampling.BILINEAR), dtype=float).transpose(2, 0, 1)
    assert np.abs(once - steps).mean() < 6  # the same picture ...
    assert np.abs(np.diff(once)).mean() > np.abs(np.diff(steps)).mean()  # ... but sharper


def test_sizes_of_other_models(photo, landmarks):
    processor = AUImageProcessor(align="five_point", aligned_size=256, crop_size=224, size=224)
    inputs = processor(photo, landmarks=landmarks, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 224, 224)
    whole = AUImageProcessor(align="five_point", aligned_size=224, crop_size=224, size=224)
    five = [
        Alignment(p(photo, landmarks=landmarks)["alignment"][0], (224, 224)).transform(landmarks)
        for p in (processor, whole)
    ]
    np.testing.assert_allclose((five[0] - 111.5) / (five[1] - 111.5), 256 / 224, rtol=1e-3)


def test_sharpening_adds_what_a_gaussian_of_one_pixel_takes_away(photo, landmarks):
    plain = AUImageProcessor(do_rescale=False, do_normalize=False)
    sharp = AUImageProcessor(do_rescale=False, do_normalize=False, sharpen=1.5)
    before, after = (p(photo, landmarks=landmarks)["pixel_values"][0] for p in (plain, sharp))
    near = np.arange(-5, 6)
    weights = np.exp(-(near[:, None] ** 2 + near**2) / 2)
    for channel, row, column in ((0, 40, 50), (1, 56, 30), (2, 90, 60)):
        patch = before[channel, row - 5 : row + 6, column - 5 : column + 6]
        mean = (weights * patch).sum() / weights.sum()
        expected = np.clip(patch[5, 5] + 1.5 * (patch[5, 5] - mean), 0, 255)
        assert after[channel, row, column] == pytest.approx(expected, abs=0.02)
    assert after.min() == 0 and after.max() == 255  # what goes beyond is cut off
    flat = Image.new("RGB", (112, 112), (90, 120, 200))
    at_ease = sharp(flat, do_align=False)["pixel_values"][0]
    np.testing.assert_allclose(at_ease.mean((1, 2)), [90, 120, 200], atol=1e-3)
    at_call = plain(photo, landmarks=landmarks, sharpen=1.5)["pixel_values"][0]
    np.testing.assert_array_equal(at_call, after)


def test_several_pictures_and_every_form_of_landmarks(processor, photo, landmarks):
    mirrored = ImageOps.mirror(photo)
    other = landmarks * [-1, 1] + [199, 0]
    one = processor(photo, landmarks=landmarks, return_tensors="pt")
    for both in (
        [landmarks, other],
        np.stack([landmarks, other]),
        torch.tensor(np.stack([landmarks, other])),
    ):
        inputs = processor([photo, mirrored], landmarks=both, return_tensors="pt")
        assert inputs["pixel_values"].shape == (2, 3, 112, 112)
        torch.testing.assert_close(inputs["pixel_values"][:1], one["pixel_values"], rtol=0, atol=0)
    for single in (landmarks.tolist(), landmarks[None], [landmarks]):
        torch.testing.assert_close(
            processor([photo], landmarks=single, return_tensors="pt"), one, rtol=0, atol=0
        )
    batch = np.stack([np.asarray(photo), np.asarray(mirrored)])
    torch.testing.assert_close(
        processor(batch, landmarks=[landmarks, other], return_tensors="pt")["pixel_values"],
        inputs["pixel_values"],
    )


def test_boxes_and_detectors_find_the_landmarks(processor, photo, landmarks, detector):
    expected = processor(photo, landmarks=landmarks, return_tensors="pt")
    by_box = processor(photo, boxes=[55, 35, 152, 132], face_detector=detector, return_tensors="pt")
    found = processor(photo, face_detector=detector, return_tensors="pt")
    at_init = AUImageProcessor(face_detector=detector)([photo], return_tensors="pt")
    mixed = processor([photo, photo], landmarks=[landmarks, None], boxes=[None, [55, 35, 152, 132]],
                      face_detector=detector, return_tensors="pt")  # fmt: skip
    for inputs in (by_box, found, at_init):
        torch.testing.assert_close(inputs["pixel_values"], expected["pixel_values"], rtol=0, atol=0)
    torch.testing.assert_close(mixed["au_centers"], expected["au_centers"].repeat(2, 1, 1, 1))


def test_no_picture_of_a_batch_need_have_a_box(processor, photo, landmarks, detector):
    """As in a batch of a corpus some of whose rows have boxes, and others landmarks."""
    expected = processor(photo, landmarks=landmarks)["pixel_values"][0]
    for count in (1, 2):
        inputs = processor([photo] * count, landmarks=[landmarks] * count, boxes=[None] * count)
        np.testing.assert_array_equal(inputs["pixel_values"], [expected] * count)
        found = processor([photo] * count, boxes=(None,) * count, face_detector=detector)
        np.testing.assert_array_equal(found["pixel_values"], [expected] * count)


def test_aligned_pictures_pass_unaligned(processor, photo, landmarks):
    aligned = level_eyes(landmarks, "ibug68", 400).warp(photo)
    inputs = processor(aligned, do_align=False, return_tensors="pt")
    assert "au_centers" not in inputs
    expected = processor(photo, landmarks=landmarks, return_tensors="pt")
    assert (inputs["pixel_values"] - expected["pixel_values"]).abs().mean() < 0.03
    moved = level_eyes(landmarks, "ibug68", 400).transform(landmarks)
    with_centers = processor(aligned, landmarks=moved, do_align=False, return_tensors="pt")
    torch.testing.assert_close(with_centers["au_centers"], expected["au_centers"], atol=0.5, rtol=0)


def test_five_points_align_but_carry_no_centres(processor, photo, landmarks):
    five = reduce_landmarks(landmarks, "ibug68", "five")
    inputs = processor(photo, landmarks=five, return_tensors="pt")
    torch.testing.assert_close(
        inputs["alignment"], processor(photo, landmarks=landmarks, return_tensors="pt")["alignment"]
    )
    assert "au_centers" not in inputs
    assert "au_centers" not in processor(photo, landmarks=landmarks, au_definition="none")
    assert "au_centers" not in processor(photo, landmarks=landmarks, au_definition="lac")  # needs wflw98


# --- what does not come in ------------------------------------------------------------------------


def test_nothing_is_aligned_in_silence(processor, photo, no_face, detector):
    with pytest.raises(ValueError, match=r"landmarks= or boxes=.*FaceDetector\(\).*do_align=False"):
        processor(photo)
    with pytest.raises(ValueError, match="No face found"):
        processor(no_face, face_detector=detector)
    with pytest.raises(ValueError, match="square; this one is 200x150"):
        processor(no_face, do_align=False)
    with pytest.raises(ValueError, match="images is empty"):
        processor([], landmarks=[])


def test_errors_say_which_of_several_pictures_is_wrong(processor, photo, no_face, landmarks, detector):
    with pytest.raises(ValueError, match=r"^images\[1\]: No face found"):
        processor([photo, no_face], face_detector=detector)
    with pytest.raises(TypeError, match=r"^images\[2\]: Cannot read a picture from int"):
        processor([photo, photo, 7], landmarks=[landmarks] * 3)
    with pytest.raises(ValueError, match="^No face found"):
        processor([no_face], face_detector=detector)


def _with(points, i, value):
    points[i] = value
    return points


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p[:50], "50"),
        (lambda p: p[:, 0], "1 picture|shape"),
        (lambda p: np.pad(p, ((0, 0), (0, 1))), r"\(N, 2\)"),
        (lambda p: _with(p, 3, np.nan), "nan"),
        (lambda p: p + 500, "68 of 68 landmarks lie outside"),
        (lambda p: p / 200, "pixels"),
        (lambda p: np.full_like(p, 100.0), "aligned|apart"),
        (lambda p: [p, p], "1 pictures but 2 landmarks"),
    ],
)
def test_wrong_landmarks(processor, photo, landmarks, change, message):
    with pytest.raises(ValueError, match=message):
        processor(photo, landmarks=change(landmarks))


def test_landmarks_and_boxes_may_be_tensors_of_any_kind(processor, photo, landmarks, detector):
    points = torch.tensor(landmarks.round(), requires_grad=True)  # bfloat16 holds whole numbers up to 256
    expected = processor(photo, landmarks=landmarks.round())["pixel_values"][0]
    for given in (points, points.bfloat16()):
        np.testing.assert_array_equal(processor(photo, landmarks=given)["pixel_values"][0], expected)
    box = torch.tensor([55.0, 35, 152, 132], requires_grad=True)
    processor(photo, boxes=box, face_detector=detector)
    with pytest.raises(ValueError, match="one box, the face to align; got 0"):
        processor(photo, boxes=[[]], face_detector=detector)


def test_a_call_without_a_size_is_refused(processor, photo, landmarks):
    with pytest.raises(ValueError, match="square of pixels such as 112, got None"):
        processor(photo, landmarks=landmarks, size=None)


def test_landmark_scheme_is_what_given_landmarks_must_have(photo, landmarks):
    processor = AUImageProcessor(landmark_scheme="ibug49")
    processor(photo, landmarks=reduce_landmarks(landmarks, "ibug68", "ibug49"))
    with pytest.raises(ValueError, match="'ibug49' has 49 landmarks, got 68"):
        processor(photo, landmarks=landmarks)


WRONG_VALUES = [
    ({"align": "umeyama"}, r"choose from \['five_point', 'level_eyes'\]"),
    ({"aus": [1, 3]}, "Unknown action unit 3"),
    ({"aus": [38]}, "au_definition='none'"),
    ({"au_definition": "shaolin"}, "shaolin"),
    ({"landmark_scheme": "ibug70"}, "ibug70"),
    ({"crop_size": 300}, "crop_size 300 .* 1..200"),
    ({"size": {"height": 112, "width": 96}}, "square"),
    ({"size": {"height": -5, "width": -5}}, "square .*-5"),
    ({"image_std": [0.5, 0.0, 0.5]}, "image_std divides"),
    ({"image_std": [0.5, np.inf, 0.5]}, "image_std must be a number, or three"),
    ({"image_std": [0.5, 1e39, 0.5]}, "image_std must be a number, or three"),
    ({"image_mean": [0.5] * 4}, "image_mean must be a number, or three"),
    ({"image_mean": np.nan}, "image_mean must be a number, or three"),
    ({"rescale_factor": 0.0}, "rescale_factor multiplies"),
    ({"rescale_factor": np.nan}, "rescale_factor multiplies"),
    ({"rescale_factor": 1e39}, "rescale_factor multiplies"),
    ({"sharpen": -1}, "sharpen=-1 must be 0"),
    ({"sharpen": np.nan}, "sharpen=nan must be 0"),
    ({"sharpen": np.inf}, "sharpen=inf must be 0"),
    ({"sharpen": 1e39}, "sharpen=1e.39 must be 0"),
    ({"sharpen": 2**2000}, "sharpen=[0-9]* must be 0"),
    ({"data_format": "channels_last"}, "'channels_last': the models take"),
    ({"do_resize": False}, "no effect"),
    ({"do_resize": True}, "do_resize has no effect"),
    ({"alignment_version": 2}, "update actionunits"),
]


@pytest.mark.parametrize(
    ("options", "message"), WRONG_VALUES, ids=lambda v: next(iter(v)) if isinstance(v, dict) else ""
)
def test_wrong_values_at_init_and_at_call(processor, photo, landmarks, options, message):
    with pytest.raises(ValueError, match=message):
        AUImageProcessor(**options)
    with pytest.raises(ValueError, match=message):
        processor(photo, landmarks=landmarks, **options)


def test_wrong_names_and_types_at_init_and_at_call(processor, photo, landmarks):
    with pytest.raises(TypeError, match="did you mean 'do_align'"):
        AUImageProcessor(do_algin=True)
    with pytest.raises(TypeError, match="it takes"):
        AUImageProcessor(wholly_other=1)
    for options in ({"do_align": "yes"}, {"do_align": None}, {"aus": "12"}, {"aligned_size": 200.5}):
        (name,) = options
        with pytest.raises(StrictDataclassFieldValidationError, match=name):
            AUImageProcessor(**options)
        with pytest.raises(StrictDataclassFieldValidationError, match=name):
            processor(photo, landmarks=landmarks, **options)
    with pytest.raises(TypeError, match="do_algin"):
        processor(photo, landmarks=landmarks, do_algin=True)


# --- saving ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("config_class", [GdaConfig, LscConfig, EscdaConfig])
def test_round_trip_through_a_folder(tmp_path, photo, landmarks, detector, config_class):
    processor = AUImageProcessor(
        aus=[12, 25], crop_size=184, size=96, antialias=False, face_detector=detector
    )
    processor.save_pretrained(tmp_path)
    config_class().save_pretrained(tmp_path)
    assert "detector" not in (tmp_path / "preprocessor_config.json").read_text()
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(loaded) is AUImageProcessor
    assert loaded.face_detector is None
    assert loaded.to_dict() == processor.to_dict()
    torch.testing.assert_close(
        dict(loaded(photo, landmarks=landmarks, return_tensors="pt")),
        dict(processor(photo, landmarks=landmarks, return_tensors="pt")),
        rtol=0,
        atol=0,
    )
    assert AutoImageProcessor.from_pretrained(tmp_path, size={"height": 64, "width": 64}).size.height == 64


def test_a_detector_may_come_with_the_folder(tmp_path, photo, landmarks, detector, monkeypatch):
    AUImageProcessor().save_pretrained(tmp_path)
    complaints = []
    for level in ("warning", "warning_once"):
        monkeypatch.setattr(image_processing_base.logger, level, lambda *text: complaints.append(text))
    loaded = AutoImageProcessor.from_pretrained(tmp_path, face_detector=detector, size=96)
    assert loaded.face_detector is detector and loaded.size.height == 96
    assert loaded(photo, return_tensors="pt")["pixel_values"].shape == (1, 3, 96, 96)
    assert complaints == []


def test_the_way_to_the_input_takes_the_options_of_the_class(processor, photo, landmarks):
    short, long = (
        processor.photo_to_input(photo.size, landmarks, size=size)
        for size in (96, {"height": 96, "width": 96})
    )
    np.testing.assert_array_equal(short.matrix, long.matrix)
    assert short.size == long.size == (96, 96)
    with pytest.raises(TypeError, match="no option 'sise'; did you mean 'size'"):
        processor.photo_to_input(photo.size, landmarks, sise=96)


# --- answers by name ------------------------------------------------------------------------------


def test_post_process_names_scores_and_thresholds(processor):
    config = GdaConfig.compact(aus=[12, 25, 1], au_thresholds=[0.9, 0.3, 0.5])
    logits = torch.tensor([[2.0, -0.5, 0.0]], dtype=torch.bfloat16)
    (units,) = processor.post_process_au_detection({"logits": logits}, config)
    assert [(u["label"], u["name"], u["active"]) for u in units] == [
        ("AU12", "lip corner puller", False),
        ("AU25", "lips part", True),
        ("AU1", "inner brow raiser", True),  # a score at the threshold counts
    ]
    np.testing.assert_allclose([u["score"] for u in units], 1 / (1 + np.exp([-2.0, 0.5, 0.0])), rtol=1e-6)
    (best,) = processor.post_process_au_detection({"logits": logits}, config, top_k=2)
    assert [u["label"] for u in best] == ["AU12", "AU1"]


def test_decision_thresholds():
    config = GdaConfig.compact(aus=[12, 25], au_thresholds=[0.9, 0.3])
    assert decision_thresholds(config) == {"AU12": 0.9, "AU25": 0.3}
    assert decision_thresholds(config, 0.4) == {"AU12": 0.4, "AU25": 0.4}
    assert decision_thresholds(config, {"AU25": 0.1}) == {"AU12": 0.9, "AU25": 0.1}
    assert decision_thresholds(GdaConfig.compact(aus=[12])) == {"AU12": 0.5}
    with pytest.raises(ValueError, match="'AU7'.*'AU12', 'AU25'"):
        decision_thresholds(config, {"AU7": 0.1})
    with pytest.raises(ValueError, match="0..1, got 50"):
        decision_thresholds(config, 50)
    assert decision_thresholds(config, torch.tensor(0.25)) == {"AU12": 0.25, "AU25": 0.25}
    for wrong in ([0.9, 0.3], "high", True, {"AU12": None}):
        with pytest.raises(TypeError, match=r"as in \{'AU12': 0.3\}; got .* for AU12"):
            decision_thresholds(config, wrong)
