"""Predictions of other tools: their files as they write them, joined to labels by picture and frame."""

import numpy as np
import pytest

from actionunits.action_units import UNKNOWN
from actionunits.adapters import read_labels, read_predictions, score_predictions
from actionunits.metrics import f1_frame

LABELS = """\
video,frame,subject,split,AU1,AU12,AU4
v1,0,ann,test,1,0,9
v1,1,ann,test,0,1,-1
v1,2,ann,test,1,1,
v2,0,bob,test,0,0,1
v2,1,bob,train,1,0,999
"""


@pytest.fixture
def labels(tmp_path):
    (tmp_path / "labels.csv").write_text(LABELS)
    return read_labels(tmp_path / "labels.csv")


@pytest.fixture
def openface(tmp_path):
    """FeatureExtraction of OpenFace 2.2: frames from 1, blanks after commas, success 0 without a face."""
    header = (
        "frame, face_id, timestamp, confidence, success, AU01_r, AU12_r, AU45_r, AU01_c, AU12_c, AU28_c\n"
    )
    (tmp_path / "v1.csv").write_text(
        header
        + "1, 0, 0.000, 0.98, 1, 3.00, 0.20, 0.00, 1.00, 0.00, 0.00\n"
        + "2, 0, 0.033, 0.98, 1, 0.10, 5.50, 0.00, 0.00, 1.00, 0.00\n"
        + "3, 0, 0.067, 0.02, 0, 4.00, 4.00, 0.00, 1.00, 1.00, 0.00\n"
    )
    (tmp_path / "v2.csv").write_text(
        header
        + "1, 0, 0.000, 0.98, 1, 0.00, 0.00, 0.00, 0.00, 0.00, 0.00\n"
        + "2, 0, 0.033, 0.70, 1, 0.00, 0.00, 0.00, 0.00, 0.00, 0.00\n"
        + "2, 1, 0.033, 0.95, 1, 2.00, 0.00, 0.00, 1.00, 0.00, 0.00\n"  # the surer of two faces
    )
    return [tmp_path / "v1.csv", tmp_path / "v2.csv"]


def test_openface_by_video_and_frame(openface, labels):
    predictions = read_predictions(openface, "openface")
    assert predictions.aus == [1, 12, 28]
    scores, found = predictions.scores_of(labels)
    assert found.tolist() == [True, True, False, True, True]
    assert scores[:, :2].tolist() == [[1, 0], [0, 1], [0, 0], [0, 0], [1, 0]]
    intensities = read_predictions(openface, "openface", "intensity")
    assert intensities.aus == [1, 12, 45]
    np.testing.assert_allclose(intensities.scores_of(labels)[0][:2, :2], [[0.6, 0.04], [0.02, 1.0]])


def test_report_counts_lost_faces_and_names_what_it_left_out(openface, labels):
    predictions = read_predictions(openface, "openface")
    report = score_predictions(predictions, labels)
    truth = [[1, 0], [0, 1], [1, 1], [0, 0]]
    f1 = f1_frame([[1, 0], [0, 1], [0, 0], [0, 0]], truth)
    assert (
        [row["f1"] for row in report["at_half"]["per_au"].values()]
        == f1.tolist()
        == pytest.approx([2 / 3] * 2)
    )
    assert (report["pictures"], report["people"]) == (4, 2)
    assert report["notes"] == {
        "tool": "openface (occurrence)",
        "faces_found": "75.0%; others count as nothing",
        "not_compared": "AU4, AU28",
    }
    assert report["thresholds_from"] == "the training subjects" and "calibrated" in report
    without = score_predictions(predictions, labels, missing="unknown")
    assert [row["f1"] for row in without["at_half"]["per_au"].values()] == [1, 1]
    ours = score_predictions(predictions, labels, "train")  # thresholds of the very same rows tell nothing
    assert "calibrated" not in ours and ours["thresholds_from"] == "none: no training rows"
    assert (ours["pictures"], ours["people"]) == (1, 1)


def test_lost_faces_count_for_the_intensity_as_for_the_occurrence(openface, tmp_path):
    (tmp_path / "labels.csv").write_text(
        "video,frame,AU12,AU1\nv1,1,0,5\nv1,2,5,1\nv1,3,4,4\nv2,1,1,0\nv2,2,9,2\n"
    )
    labels = read_labels(tmp_path / "labels.csv", first_frame=1, from_intensity=2)
    predictions = read_predictions(openface, "openface", "intensity")
    truth, scores = np.array([5, 1, 4, 0, 2]), np.array([3, 0.1, 0, 0, 2])  # of AU1; no face in the third
    for missing, rows in (("nothing", [0, 1, 2, 3, 4]), ("unknown", [0, 1, 3, 4])):
        report = score_predictions(predictions, labels, missing=missing)
        row = report["at_half"]["per_au"]["AU1"]
        assert row["correlation"] == pytest.approx(np.corrcoef(scores[rows], truth[rows])[0, 1])
        assert row["base_rate"] == (truth[rows] >= 2).mean()


def test_py_feat_by_picture(tmp_path):
    """A row a face; a picture without a face has empty cells; the input is a path."""
    (tmp_path / "fex.csv").write_text(
        "FaceRectX,FaceScore,AU01,AU02,AU43,anger,input,frame\n"
        "1.0,0.99,0.7,0.2,0.1,0.0,/photos/F001/T1/2440.jpg,0\n"
        "1.0,0.60,0.1,0.9,0.1,0.0,/photos/F001/T1/2440.jpg,0\n"
        ",,,,,,/photos/F001/T2/2440.jpg,1\n"
        "1.0,0.90,0.3,0.4,0.1,0.0,/photos/F002/T1/2440.jpg,2\n"
    )
    (tmp_path / "labels.csv").write_text(
        "image,AU2,AU1\nF001/T1/2440.png,0,1\nF001/T2/2440.png,1,1\nF002\\T1\\2440.png,1,0\n"
    )
    predictions = read_predictions([tmp_path / "fex.csv"], "py-feat")
    scores, found = predictions.scores_of(read_labels(tmp_path / "labels.csv"))
    assert predictions.aus == [1, 2, 43]
    assert found.tolist() == [True, False, True]
    assert scores[:, :2].tolist() == [[0.7, 0.2], [0, 0], [0.3, 0.4]]
    report = score_predictions(predictions, read_labels(tmp_path / "labels.csv"))
    assert list(report["at_half"]["per_au"]) == ["AU2", "AU1"]  # in the order of the labels
    assert "calibrated" not in report and report["people"] is None

    (tmp_path / "ends.csv").write_text("picture,AU1\n2440.png,1\n")
    with pytest.raises(ValueError, match=r"fits both .*F001/T1/2440 .* and .*F002/T1/2440"):
        predictions.scores_of(read_labels(tmp_path / "ends.csv"))


def test_libreface_frames_count_from_zero(tmp_path, labels):
    """Twelve action units occur or not, twelve others have intensities, under names of their own."""
    (tmp_path / "v1.csv").write_text(
        ",frame_idx,frame_time_in_ms,path_to_frame,aligned_frame_path,facial_expression,au_1,au_12,au_1_intensity\n"
        "0,0,0.0,tmp/v1/0000000000.png,a.png,Neutral,1,0,2.5\n"
        "1,1,33.3,tmp/v1/0000000001.png,b.png,Happiness,0,1,0.0\n"
    )
    predictions = read_predictions([tmp_path / "v1.csv"], "libreface")
    scores, found = predictions.scores_of(labels)
    assert predictions.aus == [1, 12]
    assert scores[:2].tolist() == [[1, 0], [0, 1]] and found.tolist() == [True, True, False, False, False]
    intensity = read_predictions([tmp_path / "v1.csv"], "libreface", "intensity")
    assert intensity.aus == [1] and intensity.scores_of(labels)[0][0] == 0.5


def test_our_own_command_is_a_tool_too(tmp_path):
    (tmp_path / "results.csv").write_text(
        "photo,face,xmin,confidence,AU1,AU12,AU1_active,error\n"
        "in/a.jpg,1,3,0.9,0.2,0.8,0,\n"
        "in/b.jpg,,,,,,,no face\n"
    )
    predictions = read_predictions([tmp_path / "results.csv"], "actionunits")
    assert predictions.aus == [1, 12]
    assert {key: row.tolist() for key, row in predictions.rows.items()} == {(("in", "a"), 0): [0.2, 0.8]}


def test_labels_may_be_intensities_and_frames_may_start_anywhere(tmp_path):
    (tmp_path / "disfa.csv").write_text("video,frame,AU1,AU12\nv,1,2,0\nv,2,1,5\nv,3,,9\n")
    labels = read_labels(tmp_path / "disfa.csv", first_frame=1, from_intensity=2)
    assert labels.keys == [(("v",), 0), (("v",), 1), (("v",), 2)]
    assert labels.occurrence.tolist() == [[1, 0], [0, 1], [UNKNOWN, UNKNOWN]]
    np.testing.assert_allclose(labels.intensities, [[0.4, 0], [0.2, 1], [np.nan, np.nan]])
    with pytest.raises(ValueError, match="are they intensities"):
        read_labels(tmp_path / "disfa.csv")
    (tmp_path / "more.csv").write_text("picture,AU1,AU1_r,AU999,age\na,1,0.3,1,40\n\nb,0,0.1,0,,\n")
    more = read_labels(tmp_path / "more.csv")
    assert more.aus == [1] and more.occurrence.tolist() == [[1], [0]]
    (tmp_path / "floats.csv").write_text("video,frame,AU1\nv,1.0,1\nv,2.0,0\n")  # as pandas may write them
    assert read_labels(tmp_path / "floats.csv", first_frame=1).keys == [(("v",), 0), (("v",), 1)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("who,AU1\na,1\n", "needs picture, or video and frame"),
        ("video,AU1\na,1\n", "needs picture, or video and frame"),
        ("picture,mood\na,1\n", "needs picture"),
        ("picture,AU1\n", "needs picture"),
        ("picture,AU1,au12\na,1,0\n", "column 'au12' that is no label"),
        ("picture,AU1,AU12_r\na,1,0\n", "column 'AU12_r' that is no label"),
        ("picture,AU1,AU01\na,1,0\n", "column 'AU1' that is no label of an action unit of its own"),
        ("picture,AU1,AU12\na,1,0\nb,1\n", "2 cells in the row of 'b', but 3 in the header"),
        ("picture,AU1,AU12\na,1,0\nb,1,0,1\n", "4 cells in the row of 'b'"),
        ("picture,AU1\na,7\n", "has the label '7'"),
        ("picture,AU1\na,yes\n", "has the label 'yes'"),
        ("picture,AU1\nZoë/a,1\n", "labels.csv is not a text file"),
        ("picture,AU1\nb/a.jpg,1\nb/a.png,0\n", r"labels b/a \(frame 0 from 0\) more than once"),
        ("video,frame,AU1\na,,1\n", "has the frame ''"),
        ("video,frame,AU1\na,0.5,1\n", "has the frame '0.5'"),
    ],
)
def test_strange_labels_are_refused(tmp_path, text, message):
    (tmp_path / "labels.csv").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=message):
        read_labels(tmp_path / "labels.csv")


def test_strange_predictions_are_refused(tmp_path, openface, labels):
    with pytest.raises(ValueError, match=r"unknown tool 'afar'; known are \['actionunits', "):
        read_predictions(openface, "afar")
    with pytest.raises(ValueError, match="py-feat gives no intensity"):
        read_predictions(openface, "py-feat", "intensity")
    with pytest.raises(ValueError, match=r"v1.csv has the action units \[\], expected"):
        read_predictions(openface, "libreface")
    (tmp_path / "v3.csv").write_text("frame, success, AU01_c\n1, 1, 0.0\n")
    with pytest.raises(ValueError, match=r"v3.csv has the action units \[1\], expected \[1, 12, 28\]"):
        read_predictions([*openface, tmp_path / "v3.csv"], "openface")
    (tmp_path / "v4.csv").write_text("frame, success, AU01_c\n1st, 1, 0.0\n")
    with pytest.raises(ValueError, match="v4.csv has the frame '1st'; number the frames"):
        read_predictions([tmp_path / "v4.csv"], "openface")
    (tmp_path / "others.csv").write_text("video,frame,AU1\nv9,0,1\n")
    with pytest.raises(ValueError, match="no label row has a prediction: the labels name 'v9'"):
        score_predictions(read_predictions(openface, "openface"), read_labels(tmp_path / "others.csv"))
    with pytest.raises(ValueError, match="0 rows of the split 'validation'"):
        score_predictions(read_predictions(openface, "openface"), labels, "validation")
    (tmp_path / "frown.csv").write_text("video,frame,AU4\nv1,0,1\n")
    with pytest.raises(ValueError, match=r"the labels \[4\] and 1 rows .*: nothing can be compared"):
        score_predictions(read_predictions(openface, "openface"), read_labels(tmp_path / "frown.csv"))
