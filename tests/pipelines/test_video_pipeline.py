import itertools
import re
import weakref

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from actionunits import AUDetectionPipeline, AUImageProcessor, FaceDetector, LacConfig, LacForAUDetection
from actionunits.image_processing_au import decision_thresholds
from actionunits.timeline import BINS, MAX_FACES, Timeline, _clock, _note
from actionunits.tracking import FaceTracker
from actionunits.video import Frame, VideoError, VideoReader
from actionunits.video_tables import openface_rows, tidy_rows, write_csv, write_parquet

toy_videos = pytest.importorskip("toy_videos", reason="PyAV is not installed")


@pytest.fixture(scope="module")
def face_detector():
    return FaceDetector()


@pytest.fixture
def detect(escda_folder, face_detector):
    return pipeline("au-detection", model=str(escda_folder), face_detector=face_detector, device="cpu")


@pytest.fixture
def still(escda_folder, detector):
    """A pipeline whose detector knows the face of the photo where it is, and takes no time."""
    return pipeline("au-detection", model=str(escda_folder), face_detector=detector, device="cpu")


@pytest.fixture
def clip(photo, tmp_path):
    return toy_videos.write(tmp_path / "clip.mp4", toy_videos.moving(photo, 6))


@pytest.fixture
def lac(detector):
    torch.manual_seed(0)
    backbone = {"embedding_size": 8, "hidden_sizes": [8, 8, 16], "depths": [1, 1, 1], "layer_type": "basic"}
    config = LacConfig.compact(backbone_config=backbone, hidden_size=16, clip_length=3, aus=[1, 12])
    model = LacForAUDetection(config).eval()
    for parameter in model.parameters():  # or all answers are close to one half
        parameter.data.mul_(3)
    processor = AUImageProcessor(aus=[1, 12], au_definition="none")
    return AUDetectionPipeline(model, processor, face_detector=detector, device="cpu")


def without_number(faces):
    return [{key: value for key, value in face.items() if key != "face_id"} for face in faces]


def scores(answers):
    return np.array([[au["score"] for au in face["action_units"]] for a in answers for face in a["faces"]])


# --- the same numbers as pictures -------------------------------------------------------------------


def test_a_frame_has_the_very_numbers_of_its_picture(detect, clip):
    answers = list(detect(video=clip))
    assert [answer["frame"] for answer in answers] == list(range(6))
    np.testing.assert_allclose([answer["timestamp"] for answer in answers], np.arange(6) * 0.04, atol=1e-6)
    for answer, frame in zip(answers, VideoReader(clip), strict=True):
        assert set(answer) == {"frame", "timestamp", "faces"}
        assert [face["face_id"] for face in answer["faces"]] == [0]
        assert without_number(answer["faces"]) == detect(frame.picture)  # bit for bit
    assert np.ptp(scores(answers), axis=0).max() > 0  # the frames differ
    assert list(detect(str(clip))) == answers  # the suffix tells


def test_two_faces_in_a_frame(detect, photo):
    picture = Image.new("RGB", (340, 200))
    picture.paste(photo, (140, 0))
    picture.paste(photo.resize((130, 130)), (0, 50))
    first, second = detect(video=[picture, picture])
    assert without_number(first["faces"]) == detect(picture) and len(first["faces"]) == 2
    assert [face["face_id"] for face in second["faces"]] == [face["face_id"] for face in first["faces"]]
    assert {face["face_id"] for face in first["faces"]} == {0, 1}


def test_between_detections_landmarks_are_followed(detect, clip):
    every, some = list(detect(video=clip)), list(detect(video=clip, detect_every=3))
    for i, (one, other) in enumerate(zip(every, some, strict=True)):
        assert (one["faces"] == other["faces"]) is (i % 3 == 0)
        assert other["faces"][0]["face_id"] == 0
        marks = [np.array(answer["faces"][0]["landmarks"]) for answer in (one, other)]
        assert np.abs(marks[0] - marks[1]).mean() < 2.0  # of a face 100 pixels wide


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_frames_share_forward_passes(still, photo, no_face, batch_size):
    frames = [photo, no_face, photo, photo, no_face, no_face, photo]
    one_by_one = list(still(video=frames))
    together = list(still(video=frames, batch_size=batch_size))
    assert [len(answer["faces"]) for answer in together] == [1, 0, 1, 1, 0, 0, 1]
    assert [answer["frame"] for answer in together] == list(range(7))
    np.testing.assert_allclose(scores(together), scores(one_by_one), atol=1e-5, rtol=0)


def test_frames_are_read_here_however_many_workers_pictures_have(escda_folder, detector, photo, no_face):
    """A worker process would follow faces for itself, and keep the frames that wait for their answers."""
    options = {"model": str(escda_folder), "face_detector": detector, "device": "cpu"}
    frames = [photo, no_face, photo]
    expected = list(pipeline("au-detection", **options)(video=frames, batch_size=2))
    assert list(pipeline("au-detection", num_workers=1, **options)(video=frames, batch_size=2)) == expected


# --- what is missing --------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [None, 4])
@pytest.mark.parametrize("count", [0, 2, 4, 5])
def test_a_camera_that_fails_costs_no_frame_before(still, photo, batch_size, count):
    def camera():
        yield from [photo] * count
        raise RuntimeError("the camera is gone")

    answered = []
    with pytest.raises(RuntimeError, match="the camera is gone"):
        for answer in still(video=camera(), batch_size=batch_size):
            answered.append(answer)
    assert [(answer["frame"], len(answer["faces"])) for answer in answered] == [(i, 1) for i in range(count)]


def test_frames_without_a_face_keep_their_place(still, photo, no_face):
    answers = list(still(video=[no_face, photo, no_face], fps=10))
    assert answers[0] == {"frame": 0, "timestamp": 0.0, "faces": []}
    assert [len(answer["faces"]) for answer in answers] == [0, 1, 0]
    assert answers[2]["timestamp"] == 0.2


def test_broken_frames_keep_their_place(detect, photo, tmp_path):
    path = toy_videos.write(tmp_path / "c.mp4", toy_videos.moving(photo, 6), options={"g": "2", "bf": "0"})
    answers = list(detect(video=toy_videos.damage(path, 2), return_frames=True))
    assert len(answers) == 6
    assert answers[2]["faces"] == [] and answers[2]["image"] is None and "frame" in answers[2]["error"]
    assert all("error" not in answer and answer["image"].size == (260, 220) for answer in answers[4:])
    assert [face["face_id"] for face in answers[5]["faces"]] == [0]  # it is the same face as before


# --- memory -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"batch_size": 2}, {"detect_every": 4}])
def test_frames_are_read_when_needed_and_forgotten(still, photo, options, monkeypatch):
    frames, pictures = weakref.WeakSet(), []

    def watched(*args):
        frame = Frame(*args)
        frames.add(frame)
        pictures.append(weakref.ref(frame.picture))
        return frame

    monkeypatch.setattr("actionunits.video.Frame", watched)
    answers = still(video=(photo.copy() for _ in itertools.count()), **options)
    assert pictures == []  # nothing is read before the first answer is asked for
    for asked in range(1, 17):
        next(answers)
        assert len(frames) <= 3
        assert sum(picture() is not None for picture in pictures) <= 3
        assert asked <= len(pictures) <= asked + 2  # at most a batch ahead


def test_streams_end_with_their_tracks(lac, photo, no_face):
    answers = lac(video=itertools.chain([photo] * 2, itertools.repeat(no_face)))
    for _ in range(3):
        next(answers)
    assert len(lac._streams) == 1
    for _ in range(40):
        next(answers)
    assert len(lac._streams) == 0


# --- models that see time ---------------------------------------------------------------------------


def lac_inputs(lac, pictures, landmarks):
    inputs = lac.image_processor(pictures, landmarks=[landmarks] * len(pictures), return_tensors="pt")
    return inputs["pixel_values"]


@pytest.fixture
def grins(photo):
    """Frames that differ, with the face in one place."""
    return [photo.point(lambda value, k=k: value * (10 - k) // 10) for k in range(8)]


@pytest.mark.parametrize("batch_size", [None, 3, 5])
def test_lac_goes_by_clips(lac, grins, landmarks, batch_size):
    found = scores(lac(video=grins, batch_size=batch_size))
    values = lac_inputs(lac, grins, landmarks)
    with torch.no_grad():
        clips = [lac.model(values[None, i : i + 3]).logits[0] for i in (0, 3, 6)]
        stills = lac.model(values).logits
    np.testing.assert_allclose(found, torch.cat(clips).sigmoid(), atol=1e-5)
    assert np.abs(found - stills.sigmoid().numpy()).max() > 1e-3  # time does matter
    np.testing.assert_allclose(found[::3], stills[::3].sigmoid(), atol=1e-5)  # not where a clip begins


def test_lac_starts_anew_after_a_gap(lac, grins, landmarks, no_face):
    frames = [*grins[:2], no_face, *grins[2:4]]
    for batch_size in (None, 2):
        found = scores(lac(video=frames, batch_size=batch_size))
        values = lac_inputs(lac, grins[:4], landmarks)
        with torch.no_grad():
            clips = [lac.model(values[None, i : i + 2]).logits[0] for i in (0, 2)]
        np.testing.assert_allclose(found, torch.cat(clips).sigmoid(), atol=1e-5)


def test_lac_follows_each_of_two_faces(lac, photo, landmarks, known_landmarker):
    faces = [landmarks, landmarks + [200, 0]]
    lac._face_detector = FaceDetector(landmarker=known_landmarker(*faces))
    frames = []
    for k in range(4):
        frame = Image.new("RGB", (400, 200))
        frame.paste(photo.point(lambda value, k=k: value * (10 - k) // 10), (0, 0))
        frame.paste(photo.point(lambda value, k=k: value * (6 + k) // 10), (200, 0))
        frames.append(frame)
    for batch_size in (None, 3):
        answers = list(lac(video=frames, batch_size=batch_size))
        for points in faces:
            found = scores(
                {"faces": [face for face in answer["faces"] if face["landmarks"] == points.tolist()]}
                for answer in answers
            )
            values = lac_inputs(lac, frames, points)
            with torch.no_grad():
                clips = [lac.model(values[None, :3]).logits[0], lac.model(values[None, 3:]).logits[0]]
            np.testing.assert_allclose(found, torch.cat(clips).sigmoid(), atol=1e-5)


def test_lac_maps_and_pictures(lac, photo):
    (answer,) = lac(video=[photo], return_maps=True)
    (face,) = lac(photo, return_maps=True)
    for label, map_ in face["maps"].items():
        np.testing.assert_allclose(answer["faces"][0]["maps"][label], map_, atol=1e-5)


# --- options and errors -----------------------------------------------------------------------------


def test_options_hold_for_videos(still, photo):
    (answer,) = still(video=[photo], threshold=0.0, top_k=2, return_frames=True)
    assert [au["active"] for au in answer["faces"][0]["action_units"]] == [True, True]
    assert answer["image"].tobytes() == photo.tobytes()


def test_wrong_usage_is_said_at_once(still, photo, tmp_path, clip):
    with pytest.raises(FileNotFoundError, match="no video file"):
        still(video=tmp_path / "nowhere.mp4")
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(VideoError, match="not a video that FFmpeg can read"):
        still(str(tmp_path / "text.mp4"))
    for options, error, message in [
        ({"fps": 25}, ValueError, "a file knows its own times"),
        ({"detect_every": 0}, ValueError, "detect_every"),
        ({"threshold": 7}, ValueError, "threshold"),
        ({"topk": 3}, TypeError, "topk"),
    ]:
        with pytest.raises(error, match=message):
            still(video=clip, **options)
    with pytest.raises(ValueError, match="fps must be more than 0"):
        still(video=[photo], fps=0)
    for fps in (-5, float("nan"), float("inf"), np.float32(0)):
        with pytest.raises(ValueError, match=re.escape(f"more than 0 and finite, got {fps}; leave it out")):
            still(video=[photo], fps=fps)
    for fps in ("a", "25", [25], True, 25j):
        with pytest.raises(TypeError, match=re.escape(f"frames per second, such as 25, got {fps!r}")):
            still(video=[photo], fps=fps)
    for count in ("a", 0, -1, 2.5, True, float("nan")):
        for name in ("batch_size", "detect_every", "top_k"):
            with pytest.raises(ValueError, match=f"{name} must be a whole number from 1 on, got {count!r}"):
                still(video=[photo], **{name: count})
    with pytest.raises(TypeError, match="path of a file or an iterable"):
        still(video=3)
    with pytest.raises(TypeError, match="not both"):
        still(photo, video=clip)


# --- tables and time lines --------------------------------------------------------------------------


@pytest.fixture
def answers(still, photo, no_face):
    return list(still(video=[photo, no_face, photo], fps=25, threshold=0.5))


def test_openface_rows(answers):
    rows = [row for answer in answers for row in openface_rows(answer)]
    assert list(rows[0])[:7] == ["frame", "timestamp", "face_id", "confidence", "success", "AU01_c", "AU01_p"]
    assert [row["frame"] for row in rows] == [1, 2, 3]  # OpenFace counts from 1
    assert [row["success"] for row in rows] == [1, 0, 1]
    assert rows[1] == {"frame": 2, "timestamp": 0.04, "confidence": 0.0, "success": 0}
    units = answers[0]["faces"][0]["action_units"]
    assert [rows[0][f"AU{int(au['label'][2:]):02d}_p"] for au in units] == [au["score"] for au in units]
    assert all(rows[0][f"AU{n:02d}_c"] == (rows[0][f"AU{n:02d}_p"] >= 0.5) for n in (1, 2, 12, 24))


@pytest.mark.parametrize("rows_of", [openface_rows, tidy_rows])
def test_rows_come_by_the_number_of_the_face_not_by_its_size(rows_of):
    box = dict.fromkeys(("xmin", "ymin", "xmax", "ymax"), 1.0)
    answer = fake(0, 0.0, f2=0.9, f0=0.1, f1=0.5)  # largest first
    answer["faces"] = [{**face, "confidence": 1.0, "box": box} for face in answer["faces"]]
    rows = list(rows_of(answer, {"AU1": 0.5}))
    score, active = ("AU01_p", "AU01_c") if rows_of is openface_rows else ("score", "active")
    assert [(row["face_id"], row[score], row[active]) for row in rows] == [
        (0, 0.1, 0),
        (1, 0.5, 1),
        (2, 0.9, 1),
    ]


def test_tidy_rows(still, answers):
    thresholds = decision_thresholds(still.model.config, 0.5)
    rows = [row for answer in answers for row in tidy_rows(answer, thresholds)]
    assert len(rows) == 3 * 12 and [row["frame"] for row in rows[::12]] == [0, 1, 2]
    assert rows[6]["au"] == "AU12"
    assert rows[6]["score"] == answers[0]["faces"][0]["action_units"][6]["score"]
    assert "score" not in rows[12] and rows[12]["au"] == "AU1" and rows[12]["error"] is None


@pytest.mark.parametrize("form", ["openface", "tidy"])
def test_csv_and_parquet_agree(still, answers, tmp_path, form):
    pandas = pytest.importorskip("pandas")
    parquet = pytest.importorskip("pyarrow.parquet")
    thresholds = decision_thresholds(still.model.config, 0.5)
    with (
        write_csv(tmp_path / "a.csv", form, thresholds) as to_csv,
        write_parquet(tmp_path / "a.parquet", form, thresholds, {"model": "tiny"}) as to_parquet,
    ):
        for answer in answers:
            to_csv(answer)
            to_parquet(answer)
        assert not (tmp_path / "a.csv").exists()  # only when it is complete
    text, table = pandas.read_csv(tmp_path / "a.csv"), pandas.read_parquet(tmp_path / "a.parquet")
    assert list(text.columns) == list(table.columns)
    for name in text.columns:
        if text[name].dtype.kind in "if":
            np.testing.assert_allclose(text[name].astype(float), table[name].astype(float), atol=1e-6)
    missing = text[text["frame"] == (2 if form == "openface" else 1)]
    assert missing["face_id"].isna().all() and missing.filter(regex="_p|score").isna().all(axis=None)
    assert b'"tiny"' in parquet.read_schema(tmp_path / "a.parquet").metadata[b"actionunits"]


def fake(frame, timestamp, **scores_of_faces):
    faces = [
        {"face_id": int(name[1:]), "action_units": [{"label": "AU1", "score": s, "active": s >= 0.5}]}
        for name, s in scores_of_faces.items()
    ]
    return {"frame": frame, "timestamp": timestamp, "faces": faces}


def test_timeline_is_the_mean_over_time_however_long(tmp_path):
    timeline = Timeline({"AU1": 0.5})
    seconds, fps = 7200, 25
    for i in range(seconds * fps // 50):  # every 50th frame of two hours
        time = i * 50 / fps
        timeline.add(fake(i, time, **({} if time < 1800 else {"f0": float(time >= 3600)})))
    shown = timeline.scores(0)[:, 0]
    assert BINS // 2 <= len(shown) <= BINS
    times = np.arange(len(shown)) * timeline.seconds_per_bin
    assert np.isnan(shown[times < 1790]).all()
    np.testing.assert_array_equal(shown[(times > 1810) & (times < 3590)], 0)
    np.testing.assert_array_equal(shown[times > 3610], 1)
    assert timeline.presence(0) == pytest.approx(0.75)
    assert timeline.summary(0)["AU1"] == pytest.approx((2 / 3, 2 / 3))


def test_timeline_shows_gaps_activity_and_the_longest_faces():
    timeline = Timeline({"AU1": 0.5, "AU12": 0.5})
    for i in range(100):
        units = [
            {"label": "AU1", "score": 0.9, "active": True},
            {"label": "AU12", "score": 0.3, "active": False},
        ]
        face = {"face_id": 3, "action_units": units}
        timeline.add({"frame": i, "timestamp": i / 25, "faces": [] if 50 <= i < 75 else [face]})
    pixels = np.asarray(timeline.draw(), dtype=int)
    strip = pixels[44:70, 250:1250]  # of AU1
    orange = (np.abs(strip - (213, 94, 0)).max(-1) == 0).mean(axis=0)
    assert orange[:495].min() > 0.8 and orange[510:740].max() == 0 and orange[765:].min() > 0.8
    grey = (np.abs(pixels[75:101, 250:1250] - (160, 174, 188)).max(-1) == 0).mean(axis=0)
    assert grey[:495] == pytest.approx(0.3, abs=0.06)
    for number in range(4, 100):
        timeline.add(fake(number, 4.0))
        timeline.faces.pop(number, None)
    one = timeline.draw().height
    crowd = Timeline({"AU1": 0.5})
    for i in range(80):
        crowd.add(fake(i, i / 25, **{f"f{number}": 0.2 for number in range(i, 80)}))
    assert len(crowd.faces) <= 64 and len(crowd.longest()) == MAX_FACES
    drawn = crowd.draw()
    assert drawn.height > one
    note = _note("and at least 58 more, seen for a shorter time")  # of 64
    np.testing.assert_array_equal(drawn.crop((0, drawn.height - note.height, *drawn.size)), note)


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.5, 0.85, 1.0])
def test_timeline_marks_the_threshold_and_colours_what_reaches_it(threshold):
    timeline = Timeline({"AU1": threshold})
    for second, score in enumerate((threshold, threshold - 0.02)):
        timeline.add(fake(second, float(second), f0=score))
    timeline.add(fake(2, 2.0))
    strip = np.asarray(timeline.draw(), dtype=int)[44:70, 250:1250]
    (mark,) = np.unique(np.argwhere((strip[:, ::4] == (33, 37, 43)).all(-1))[:, 0])
    assert 1 - (mark + 0.5) / 26 == pytest.approx(threshold, abs=1 / 26)  # rows of the strip, top down
    orange = (strip == (213, 94, 0)).all(-1)
    assert orange[:, :495].mean() == pytest.approx(threshold, abs=0.07) and not orange[:, 505:].any()


@pytest.mark.parametrize(
    ("seconds", "step", "text"),
    [
        (0.3, 0.1, "0.3 s"),
        (1, 0.5, "1.0 s"),
        (59, 1, "59 s"),
        (60, 5, "1:00"),
        (65, 5, "1:05"),
        (7380, 600, "2:03:00"),
    ],
)
def test_times_below_a_timeline(seconds, step, text):
    assert _clock(seconds, step) == text


def test_tracker_is_new_for_each_video(still, photo):
    for _ in range(2):
        (answer,) = still(video=[photo])
        assert answer["faces"][0]["face_id"] == 0
    assert FaceTracker(still.face_detector)(photo)[0].track.number == 0
