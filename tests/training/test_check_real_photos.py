"""The check on real photographs: its codes, its figures by hand, its reading of archives."""

import csv
import io
import json
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tiny_run import load_script

from actionunits.action_units import CORPUS_AUS


@pytest.fixture(scope="module")
def check():
    return load_script("check_real_photos")


def archive_of(path, name: str, content: bytes):
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    return path


def test_codes_are_known_action_units_in_places_inside_the_picture(check):
    rows = list(csv.DictReader(check.CODES.open(newline="")))
    assert len({(r["archive"], r["member"], r["frame"], r["x"], r["y"]) for r in rows}) == len(rows) == 88
    for row in rows:
        present, unsure = ({int(n) for n in row[k].split()} for k in ("present", "unsure"))
        assert not present & unsure
        assert present <= set(CORPUS_AUS["synthetic"])
        assert 0 < float(row["x"]) < 1 and 0 < float(row["y"]) < 1


def test_figures_of_one_au_by_hand(check):
    present = np.array([True, True, False, False, False])
    score, active = np.array([0.9, 0.4, 0.5, 0.1, 0.0]), np.array([True, False, True, False, False])
    figures = check.au_figures(present, score, active)
    # 0.9 beats all three negatives, 0.4 two of them: 5 of 6 pairs
    assert figures == {
        "present": 2,
        "of": 5,
        "auc": pytest.approx(5 / 6),
        "f1": pytest.approx(0.5),
        "false_alarms": pytest.approx(1 / 3),
        "hits": 1,
    }
    one = check.au_figures(present[1:], score[1:], active[1:])
    assert (one["auc"], one["f1"], one["false_alarms"]) == (None, None, pytest.approx(1 / 3))
    all_ = check.au_figures(present[:2], score[:2], active[:2])
    assert (all_["auc"], all_["f1"], all_["false_alarms"]) == (None, pytest.approx(2 / 3), None)


def test_codes_of_a_face(check):
    assert check.codes({"present": "1 25", "unsure": "2"}, [1, 2, 5, 25]) == [1, -1, 0, 1]


def test_means_leave_out_unsure_codes_and_action_units_that_one_face_shows(check):
    truth = np.array([[1, 0], [1, 1], [0, 0], [0, -1], [-1, 0]])
    score = np.array([[0.9, 0.2], [0.4, 0.8], [0.5, 0.1], [0.1, 0.9], [1.0, 0.3]])
    means = check.means_with_intervals(truth, score, score >= 0.5, ["a", "b", "c", "d", "e"])
    assert means["auc"]["mean"] == pytest.approx(3 / 4)  # 0.4 loses to 0.5; the second AU has one face
    assert means["f1"]["mean"] == pytest.approx(1 / 2)
    for low, high in (row["interval"] for row in means.values()):
        assert 0 <= low < high <= 1


def test_intervals_shrink_with_the_number_of_pictures_not_of_faces(check, monkeypatch):
    """Four times as many pictures halve the interval; four faces of each picture that say the same do not."""
    monkeypatch.setattr(check, "DRAWS", 200)
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 2, (50, 1))
    score = truth + rng.normal(0, 1, truth.shape)

    def width(copies, pictures):
        repeated = [np.tile(a, (copies, 1)) for a in (truth, score, score > 0.5)]
        return -np.subtract(*check.means_with_intervals(*repeated, pictures)["auc"]["interval"])

    names = [f"{i:03}" for i in range(200)]
    once = width(1, names[:50])
    assert width(4, names[:50] * 4) == pytest.approx(once)
    assert width(4, names) == pytest.approx(once / 2, rel=0.2)


def test_a_new_folder_for_the_figures_is_made_first(check, monkeypatch, tmp_path):
    output = tmp_path / "new" / "figures.json"
    monkeypatch.setattr("sys.argv", ["x", "--photos", "-", "--output", str(output)])
    monkeypatch.setattr(check, "pipeline", lambda *args, **kwargs: None)
    monkeypatch.setattr(check, "check_neutral_portraits", lambda *args: {"made": output.parent.is_dir()})
    check.main()
    assert json.loads(output.read_text()) == {"neutral portraits": {"made": True}}


def test_portraits_are_told_by_the_splits_of_the_model_s_own_corpus(check, monkeypatch, tmp_path):
    people = [{"name": str(i), "picture": i} for i in range(6)]
    splits = {"train": ["0"], "validation": ["1", "2"], "test": ["3", "4", "5"]}
    (tmp_path / "run.json").write_text(json.dumps({"corpus": {"manifest": {"people": splits}}}))
    monkeypatch.setattr(check, "read_people", lambda folder: people)

    def detect(file):  # the action unit fires on the test people
        return [{"action_units": [{"active": int(file) > 2}]}]

    detect.model = SimpleNamespace(name_or_path=str(tmp_path), config=SimpleNamespace(aus=[12]))
    figures = check.check_neutral_portraits(detect, tmp_path)
    assert {split: f["people"] for split, f in figures.items()} == {"train": 1, "validation": 2, "test": 3}
    assert [figures[split]["false alarms, mean"] for split in splits] == [0, 0, 1]


def test_a_face_is_taken_by_its_place(check):
    picture = Image.new("RGB", (100, 50))
    boxes = [{"xmin": 0, "ymin": 0, "xmax": 40, "ymax": 40}, {"xmin": 20, "ymin": 0, "xmax": 90, "ymax": 50}]
    faces = [{"box": box} for box in boxes]
    at = lambda x, y: check.face_at(lambda _: faces, picture, {"x": x, "y": y})  # noqa: E731
    assert at("0.1", "0.2") is faces[0]
    assert at("0.38", "0.5") is faces[1]  # in both, nearer to the second's middle
    assert at("0.95", "0.5") is None


def test_pictures_are_read_out_of_archives_and_reduced(check, tmp_path):
    content = io.BytesIO()
    Image.new("RGB", (2560, 640), (10, 200, 30)).save(content, "PNG")
    archive = archive_of(tmp_path / "a.tgz", "deep/green.png", content.getvalue())
    picture = check.read_picture(archive, "deep/green.png", None)
    assert picture.size == (1280, 320) and picture.getpixel((5, 5)) == (10, 200, 30)
    with pytest.raises(FileNotFoundError, match="none.tgz is missing"):
        check.read_picture(tmp_path / "none.tgz", "x.png", None)


def test_frames_are_counted_from_zero(check, tmp_path):
    cv2 = pytest.importorskip("cv2")
    video = tmp_path / "v.avi"
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 64))
    for level in (20, 120, 220):
        writer.write(np.full((64, 64, 3), [60, 120, level], np.uint8))  # blue, green, red
    writer.release()
    archive = archive_of(tmp_path / "v.tgz", "v.avi", video.read_bytes())
    colour = np.asarray(check.read_picture(archive, "v.avi", 2)).mean((0, 1))
    np.testing.assert_allclose(colour, [220, 120, 60], atol=6)
    with pytest.raises(ValueError, match="no frame 9"):
        check.read_picture(archive, "v.avi", 9)
