import io
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import ViTConfig, ViTModel, pipeline
from transformers.models.auto import AutoModel, AutoModelForImageClassification
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.pipelines.pt_utils import KeyDataset
from transformers.utils import logging

import actionunits
from actionunits import AUDetectionPipeline, AUImageProcessor, GdaConfig, GdaForAUDetection, checkpoints
from actionunits.landmarks import reduce_landmarks
from actionunits.pictures import sample_photo

HAS_WEIGHTS = all(
    (checkpoints.FOLDER / name / "config.json").is_file() for name in ("default", "face_landmarks")
)


@pytest.fixture
def detect(escda_folder, detector):
    return pipeline("au-detection", model=str(escda_folder), face_detector=detector, device="cpu")


@pytest.fixture
def group(photo):
    """A picture of two faces, the smaller one on the left, and their landmarks, the larger one first."""
    picture = Image.new("RGB", (320, 200))
    picture.paste(photo.resize((100, 100), Image.Resampling.BOX), (0, 50))
    picture.paste(photo, (120, 0))
    return picture


@pytest.fixture
def group_landmarks(landmarks):
    return [landmarks + [120, 0], (landmarks + 0.5) / 2 - 0.5 + [0, 50]]


def scores(faces):
    return np.array([[au["score"] for au in face["action_units"]] for face in faces])


# --- the answer -------------------------------------------------------------------------------------


def test_the_answer_has_the_promised_form(detect, photo, landmarks):
    (face,) = detect(photo)
    assert set(face) == {"box", "confidence", "landmarks", "landmark_scheme", "action_units"}
    assert list(face["box"]) == ["xmin", "ymin", "xmax", "ymax"]
    assert face["confidence"] == 0.97
    assert face["landmark_scheme"] == "ibug68"
    assert face["landmarks"] == landmarks.tolist()
    assert [au["label"] for au in face["action_units"]] == [
        "AU1", "AU2", "AU4", "AU6", "AU7", "AU10", "AU12", "AU14", "AU15", "AU17", "AU23", "AU24"
    ]  # fmt: skip
    assert set(face["action_units"][6]) == {"label", "name", "score", "active"}
    assert face["action_units"][6]["name"] == "lip corner puller"
    assert all(au["active"] is (au["score"] >= 0.5) for au in face["action_units"])
    json.dumps(face)


def test_no_face_is_an_empty_list(detect, no_face, photo):
    assert detect(no_face) == []
    assert [len(faces) for faces in detect([no_face, photo, no_face, no_face], batch_size=3)] == [0, 1, 0, 0]


def test_pipeline_list_and_model_by_hand_agree(
    model_folder, detector, photo, group, group_landmarks, no_face
):
    detect = pipeline("au-detection", model=str(model_folder), face_detector=detector, device="cpu")
    with_group = {"image": group, "landmarks": group_landmarks}
    pictures = [photo, with_group, no_face, with_group, with_group, no_face]
    one_by_one = [detect(picture, batch_size=1) for picture in pictures]
    assert [len(faces) for faces in one_by_one] == [1, 2, 0, 2, 2, 0]
    for batch_size in (2, 8):
        for faces, expected in zip(detect(pictures, batch_size=batch_size), one_by_one, strict=True):
            assert len(faces) == len(expected)
            if faces:
                np.testing.assert_allclose(scores(faces), scores(expected), atol=1e-5, rtol=0)
                assert [face["landmarks"] for face in faces] == [face["landmarks"] for face in expected]

    processor = AutoImageProcessor.from_pretrained(model_folder)
    inputs = processor([group, group], landmarks=group_landmarks, return_tensors="pt")
    for auto_class in (AutoModel, AutoModelForImageClassification):
        model = auto_class.from_pretrained(model_folder)
        with torch.no_grad():
            logits = model(**inputs).logits
        np.testing.assert_allclose(scores(one_by_one[1]), torch.sigmoid(logits), atol=1e-5, rtol=0)


def test_faces_of_a_picture_are_one_batch(detect, group, group_landmarks, monkeypatch):
    sizes = []
    forward = detect.model.forward
    monkeypatch.setattr(
        detect.model,
        "forward",
        lambda pixel_values, **k: sizes.append(len(pixel_values)) or forward(pixel_values, **k),
    )
    detect({"image": group, "landmarks": group_landmarks})
    assert sizes == [2]
    list(detect(iter([{"image": group, "landmarks": group_landmarks}])))
    assert sizes == [2, 1, 1]  # a stream does not wait for more faces


# --- every kind of input ----------------------------------------------------------------------------


def test_single_inputs(detect, photo, photo_path):
    expected = scores(detect(photo))
    array = np.asarray(photo)
    for source in (
        photo_path,
        str(photo_path),
        photo_path.read_bytes(),
        array,
        torch.tensor(array),
        {"image": photo},
    ):
        np.testing.assert_array_equal(scores(detect(source)), expected)


def test_several_inputs(detect, photo, no_face, photo_path):
    assert detect([]) == []
    assert detect(()) == []
    assert [len(faces) for faces in detect((photo, no_face))] == [1, 0]
    assert [len(faces) for faces in detect(picture for picture in (photo, str(photo_path), no_face))] == [
        1,
        1,
        0,
    ]

    class Rows(Dataset):  # raises no IndexError at its end, as some datasets do not
        def __len__(self):
            return 3

        def __getitem__(self, i):
            return {"picture": (photo, no_face, photo)[i % 3]}

    for batch_size in (1, 2):
        answers = detect(KeyDataset(Rows(), "picture"), batch_size=batch_size)
        assert [len(faces) for faces in answers] == [1, 0, 1]


def test_datasets(detect, photo, photo_path, no_face, landmarks, tmp_path):
    datasets = pytest.importorskip("datasets")
    no_face.save(tmp_path / "plain.png")
    columns = {"image": [str(photo_path), str(tmp_path / "plain.png")], "subject": ["F001", "F002"]}
    dataset = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    column = dataset["image"]  # a list in some versions of the library
    for rows in (dataset, column, KeyDataset(dataset, "image"), dataset.to_iterable_dataset()):
        assert [len(faces) for faces in detect(rows)] == [1, 0]
    with_landmarks = dataset.add_column("landmarks", [landmarks.tolist(), None])
    answers = list(detect(with_landmarks))
    assert answers[0][0]["confidence"] == 1.0
    assert answers[1] == []
    with pytest.raises(ValueError, match="no column 'image' but"):
        detect(dataset.rename_column("image", "img"))
    with pytest.raises(ValueError, match=r"dictionary of datasets, \['train'\]"):
        detect(datasets.DatasetDict({"train": dataset}))


def test_known_landmarks(detect, group, group_landmarks):
    small_first = group_landmarks[::-1]
    faces = detect({"image": group, "landmarks": small_first})
    assert [face["landmarks"] for face in faces] == [points.tolist() for points in group_landmarks]
    assert [face["confidence"] for face in faces] == [1.0, 1.0]
    boxes = [[10, 60, 70, 130], [170, 30, 270, 150]]
    faces = detect({"image": group, "landmarks": np.stack(small_first), "boxes": boxes})
    assert [list(face["box"].values()) for face in faces] == boxes[::-1]
    (face,) = detect({"image": group, "landmarks": group_landmarks[0]})
    assert face["landmarks"] == group_landmarks[0].tolist()


def test_known_boxes(detect, photo, landmarks):
    (face,) = detect({"image": photo, "boxes": [55, 35, 152, 132]})
    assert list(face["box"].values()) == [55, 35, 152, 132]
    assert face["landmarks"] == landmarks.tolist()
    faces = detect({"image": photo, "boxes": [[0, 150, 40, 190], [55, 35, 152, 132]]})
    assert [round(face["confidence"], 2) for face in faces] == [0.97, 0.02]
    assert detect({"image": photo, "boxes": []}) == []


def test_empty_landmarks_are_none(detect, photo, landmarks):
    """The rows of a corpus without points have an empty list; that is not to say that nobody is there."""
    for empty in ([], np.empty((0, 2))):
        (face,) = detect({"image": photo, "landmarks": empty})
        assert face["landmarks"] == landmarks.tolist() and face["confidence"] == 0.97
    (face,) = detect({"image": photo, "landmarks": [], "boxes": [55, 35, 152, 132]})
    assert list(face["box"].values()) == [55, 35, 152, 132]


def test_a_box_whose_face_lies_outside_is_left_out(detect, photo, caplog):
    logging.get_logger("actionunits").addHandler(caplog.handler)
    pictures = [photo, {"image": photo, "boxes": [[0, 0, 4, 4], [55, 35, 152, 132]]}]
    first, second = detect(pictures)
    logging.get_logger("actionunits").removeHandler(caplog.handler)
    assert [list(face["box"].values()) for face in second] == [[55, 35, 152, 132]]
    np.testing.assert_allclose(scores(second), scores(first), atol=1e-5)
    assert "Left out the box [0.0, 0.0, 4.0, 4.0]" in caplog.text


def test_wrong_inputs(detect, photo, landmarks):
    for wrong in (None, 3, [None], io.BytesIO(b"of a file")):
        with pytest.raises(TypeError, match="give a path"):
            detect(wrong)
    with pytest.raises(FileNotFoundError):
        detect("nowhere.jpg")
    with pytest.raises(ValueError, match="key image.*got \\['image', 'landmark'\\]"):
        detect({"image": photo, "landmark": landmarks})
    with pytest.raises(ValueError, match="2 faces by landmarks but 1 by boxes"):
        detect({"image": photo, "landmarks": [landmarks, landmarks], "boxes": [1, 1, 50, 50]})
    with pytest.raises(ValueError, match="outside"):
        detect({"image": photo, "landmarks": landmarks + 1000})
    with pytest.raises(ValueError, match="list of .*; got 5"):
        detect({"image": photo, "landmarks": 5})
    with pytest.raises(ValueError, match="as a list"):
        detect(np.zeros((2, 64, 64, 3), np.uint8))


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (np.zeros((40, 40, 3), np.int64), ValueError, "Pixels of type int64"),
        ("nowhere.jpg", FileNotFoundError, "There is no picture file 'nowhere.jpg'"),
        (None, TypeError, "Cannot read a picture from NoneType"),
        ({"image": Image.new("RGB", (64, 64)), "boxes": [9, 9, 3, 3]}, ValueError, "Box .* is empty"),
    ],
)
@pytest.mark.parametrize("form", [list, tuple, iter, lambda p: KeyDataset([{"a": one} for one in p], "a")])
def test_errors_say_which_of_several_inputs_is_wrong(detect, photo, no_face, form, wrong, error, message):
    answers = []
    with pytest.raises(error, match=rf"^inputs\[2\]: {message}"):
        answers.extend(detect(form([photo, no_face, wrong, photo])))
    assert [len(faces) for faces in answers] == ([] if form in (list, tuple) else [1, 0])
    with pytest.raises(error, match=rf"^{message}"):
        detect(wrong)


def test_five_points_serve_models_without_centres(tmp_path, photo, landmarks, detect):
    model = GdaForAUDetection(GdaConfig.compact())
    gda = AUDetectionPipeline(model, AUImageProcessor(), device="cpu")
    five = {"image": photo, "landmarks": reduce_landmarks(landmarks, "ibug68", "five")}
    np.testing.assert_array_equal(scores(gda(five)), scores(gda({"image": photo, "landmarks": landmarks})))
    with pytest.raises(
        ValueError, match="EscdaForAUDetection needs .*au_centers, which .*'five' do not tell"
    ):
        detect(five)


# --- options ----------------------------------------------------------------------------------------


def test_threshold(detect, photo):
    score = detect(photo)[0]["action_units"][6]["score"]
    for threshold, active in ((score - 1e-3, True), (score + 1e-3, False)):
        assert detect(photo, threshold=threshold)[0]["action_units"][6]["active"] is active
        assert detect(photo, threshold={"AU12": threshold})[0]["action_units"][6]["active"] is active
    for wrong in (1.5, {"AU99": 0.5}):
        with pytest.raises(ValueError, match="threshold"):
            detect(photo, threshold=wrong)


def test_options_given_to_the_pipeline_hold_for_every_call(escda_folder, detector, photo):
    detect = pipeline("au-detection", model=str(escda_folder), face_detector=detector, threshold=0.0, top_k=3)
    (face,) = detect(photo)
    assert [au["active"] for au in face["action_units"]] == [True] * 3
    assert len(detect(photo, top_k=5)[0]["action_units"]) == 5


def test_a_misspelt_option_is_named_with_those_there_are(detect, photo):
    with pytest.raises(TypeError, match="no option treshold; .* threshold, top_k, return_maps"):
        detect(photo, treshold=0.5)


@pytest.mark.parametrize("count", ["a", 0, -1, 2.5, True, float("nan")])
def test_a_batch_size_that_is_none_is_refused_at_once(detect, escda_folder, photo, count):
    message = f"batch_size must be a whole number from 1 on, got {count!r}"
    for inputs in (photo, [photo, photo], iter([photo])):
        with pytest.raises(ValueError, match=message):
            detect(inputs, batch_size=count)
    with pytest.raises(ValueError, match=message):
        pipeline("au-detection", model=str(escda_folder), batch_size=count)
    with pytest.raises(ValueError, match="num_workers must be a whole number from 0 on, got -1"):
        detect(iter([photo]), num_workers=-1)


def test_top_k(detect, photo):
    every = sorted(scores(detect(photo))[0], reverse=True)
    assert scores(detect(photo, top_k=4))[0].tolist() == every[:4]
    assert scores(detect(photo, top_k=np.int64(4)))[0].tolist() == every[:4]
    assert len(detect(photo, top_k=99)[0]["action_units"]) == 12
    for wrong in (0, 2.5, True):
        with pytest.raises(ValueError, match="top_k"):
            detect(photo, top_k=wrong)
    with pytest.raises(TypeError, match="topk"):
        detect(photo, topk=3)


def test_maps_lie_on_the_photo(detect, photo, group, group_landmarks):
    single, (large, small) = detect([photo, {"image": group, "landmarks": group_landmarks}], return_maps=True)
    for face in (*single, large, small):
        assert list(face["maps"]) == [au["label"] for au in face["action_units"]]
        assert face["maps"]["AU12"].shape == (7, 7)
        assert face["alignment"].size == (7, 7)
    # the small face is half as large, so are the cells of its map
    cells = [
        np.linalg.norm(np.diff(f["alignment"].inverse_transform([[0, 0], [1, 0]]), axis=0))
        for f in (large, small)
    ]
    assert cells[0] / cells[1] == pytest.approx(2, rel=1e-4)
    back = large["alignment"].warp_back(np.ones((7, 7)), group.size)
    inside = [back[round(y), round(x)] for x, y in group_landmarks[0][17:]]
    assert min(inside) == 1.0 and back[:, :110].max() == 0.0


def test_half_precision_and_labels_that_are_no_action_units(photo, landmarks, detector):
    model = GdaForAUDetection(GdaConfig.compact(num_labels=2)).to(torch.bfloat16)
    detect = AUDetectionPipeline(model, AUImageProcessor(), face_detector=detector, device="cpu")
    (face,) = detect(photo)
    assert [au["name"] for au in face["action_units"]] == ["LABEL_0", "LABEL_1"]


def test_other_action_units_than_the_processor_was_saved_with(model_folder, detector, photo):
    model = AutoModel.from_pretrained(model_folder, aus=[12, 25, 4])
    detect = pipeline("au-detection", model=model, image_processor=str(model_folder), face_detector=detector)
    assert [au["label"] for au in detect(photo)[0]["action_units"]] == ["AU12", "AU25", "AU4"]


# --- loading, saving --------------------------------------------------------------------------------


def test_a_loaded_model_brings_its_processor(escda_folder, detector, photo, detect):
    model = AutoModel.from_pretrained(escda_folder).train()
    again = pipeline("au-detection", model=model, face_detector=detector, device="cpu")
    assert not model.training
    np.testing.assert_array_equal(scores(again(photo)), scores(detect(photo)))
    with pytest.raises(ValueError, match="image_processor=AUImageProcessor"):
        pipeline("au-detection", model=GdaForAUDetection(GdaConfig.compact()))
    with pytest.raises(ValueError, match="do_align=True"):
        pipeline("au-detection", model=model, image_processor=AUImageProcessor(do_align=False))
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "image_size": 16}
    with pytest.raises(ValueError, match="detects action units, got a ViTModel"):
        vit = ViTModel(ViTConfig(hidden_size=8, **sizes))
        pipeline("au-detection", model=vit, image_processor=AUImageProcessor())


def test_save_and_load(tmp_path, detect, detector, photo):
    detect.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    assert "custom_pipelines" not in (tmp_path / "config.json").read_text()
    again = pipeline("au-detection", model=str(tmp_path), face_detector=detector, device="cpu")
    np.testing.assert_array_equal(scores(again(photo)), scores(detect(photo)))


def test_public_names():
    assert all(hasattr(actionunits, name) for name in actionunits.__all__)
    assert actionunits.AUDetectionPipeline is AUDetectionPipeline


def test_a_pipeline_can_be_pickled_and_goes_on_with_videos(detect, photo):
    """Where processes do not fork, `num_workers` sends the pipeline itself to them."""
    list(detect(video=[photo]))
    copy = pickle.loads(pickle.dumps(detect))
    assert copy(photo) == detect(photo)
    assert [len(frame["faces"]) for frame in copy(video=[photo, photo])] == [1, 1]


def test_detectors_travel_to_worker_processes(photo):
    detector = actionunits.FaceDetector()
    again = pickle.loads(pickle.dumps(detector))
    np.testing.assert_array_equal(again(photo)[0].box, detector(photo)[0].box)


@pytest.mark.skipif(not HAS_WEIGHTS, reason="the default weights are not in this checkout")
def test_default_weights_see_the_smile_of_a_real_photo(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (face,) = pipeline("au-detection", device="cpu")(sample_photo())
    active = {au["label"] for au in face["action_units"] if au["active"]}
    assert "AU12" in active
    assert "AU15" not in active
