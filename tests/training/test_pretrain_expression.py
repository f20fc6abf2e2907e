"""Triplets of both sources, and whole runs of training/pretrain_expression.py on few of them."""

import csv
import itertools
import json
import shutil
from dataclasses import replace
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import load_script
from transformers import AutoModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from actionunits import GlobalExpressionEncoderConfig, GtleNetForAUDetection
from actionunits.data import prepare_synthetic
from actionunits.data.triplets import (
    ComparableFaces,
    FecTable,
    _cut_out,
    expression_vectors,
    prepare_fec,
    read_fec,
    triplets_by_distance,
)
from actionunits.publishing_terms import training_corpora

TINY_ENCODER = {"image_size": 32, "width_multiplier": 0.125, "depths": [1, 1, 1]}
FEW = [
    "--triplets",
    "40",
    "--batch",
    "4",
    "--steps",
    "6",
    "--validate-every",
    "2",
    "--min-contrast",
    "1.02",
    "--validation-triplets",
    "8",
]


@pytest.fixture(scope="session")
def script():
    return load_script("pretrain_expression")


@pytest.fixture
def run(script, corpus, tmp_path, monkeypatch):
    """Train a tiny encoder on the toy corpus; returns the run's folder."""
    tiny = classmethod(lambda cls: cls(**TINY_ENCODER))
    monkeypatch.setattr(GlobalExpressionEncoderConfig, "compact", tiny)

    def run(name="run", *options, source=("--synthetic", str(corpus))):
        arguments = [*source, "--preset", "compact", "--output", str(tmp_path / name), *FEW]
        script.main([*arguments, "--cache", str(tmp_path / "cache"), *options])
        return tmp_path / name

    return run


def events(folder, kind):
    return [e for e in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if e["event"] == kind]


# Runs.


def test_a_run_ends_in_an_encoder_for_gtlenet(run):
    folder = run() / "model"
    encoder, processor = AutoModel.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    assert encoder.config.pretraining == "expression"
    assert processor.size["height"] == 32
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["steps"] == 6
    assert metrics["validation_triplets"] == 8
    assert 0 <= metrics["triplet_accuracy"] <= 1
    model = GtleNetForAUDetection.from_encoder(
        folder, aus=[1, 12], feature_channels=[8], mask_channels=[8], classifier_channels=[4]
    )
    assert model(torch.zeros(1, 3, 32, 32)).logits.shape == (1, 2)
    assert not list(folder.parent.rglob("*.partial")) and not list(folder.parent.rglob(".*.part"))


def test_an_encoder_names_what_binds_it(run, script, corpus, tmp_path):
    """What it began with, unless that saw nothing but the open corpus."""
    first = run() / "model"
    arguments = ["--synthetic", str(corpus), "--init", str(first), *FEW, "--cache", str(tmp_path / "cache")]
    script.main([*arguments, "--output", str(tmp_path / "on")])
    (first / "metrics.json").unlink()
    script.main([*arguments, "--output", str(tmp_path / "bound")])
    for name, bound_by in (("on", []), ("bound", ["what run/model was trained on"])):
        metrics = json.loads((tmp_path / name / "model" / "metrics.json").read_text())
        assert metrics["triplets"] == "synthetic corpus"
        encoder = {"name": f"{name}/model", **metrics}
        described = {"recipe": {"corpus": "synthetic"}, "encoder": encoder}
        assert training_corpora(described) == ["synthetic", *bound_by]


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        ({"triplets": "synthetic corpus"}, True),
        ({"triplets": "synthetic corpus", "init": "encoders/vggface2"}, False),
        ({"triplets": "fec.csv"}, False),
        ({}, False),
    ],
)
def test_what_an_encoder_saw(script, tmp_path, figures, expected):
    assert not script.saw_open_triplets_alone(tmp_path)
    (tmp_path / "metrics.json").write_text(json.dumps(figures))
    assert script.saw_open_triplets_alone(tmp_path) is expected


def test_an_interrupted_run_goes_on_to_the_same_bits(run, script, monkeypatch):
    whole = run("whole")
    train_step = script.Training._train_step

    def step_and_stop(self, batch):
        if self.step == 3:
            raise KeyboardInterrupt
        return train_step(self, batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(script.Training, "_train_step", step_and_stop)
        run("stopped")
    checkpoint = whole.parent / "stopped" / "checkpoint.pt"
    content = checkpoint.read_bytes()
    for broken in (b"", content[: len(content) // 2], b"text"):
        checkpoint.write_bytes(broken)
        with pytest.raises(
            ValueError, match=rf"checkpoint.pt \({len(broken)} bytes\) cannot be read.*remove it"
        ):
            run("stopped")
    checkpoint.write_bytes(content)
    stopped = run("stopped")
    assert [e["step"] for e in events(stopped, "resumed")] == [2]
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (whole, stopped)]
    assert weights[0] == weights[1]
    other = run("other", "--seed", "1")
    assert (other / "model" / "model.safetensors").read_bytes() != weights[0]


def test_a_finished_run_is_left_alone_and_another_is_refused(run, script, monkeypatch):
    run()
    monkeypatch.setattr(script, "Training", lambda *args: pytest.fail("trained again"))
    run()
    with pytest.raises(ValueError, match=r"other values of \['lr'\]"):
        run("run", "--lr", "0.1")


def test_a_command_that_found_nothing_claims_no_folder(run, tmp_path):
    with pytest.raises(FileNotFoundError):
        run("run", source=("--synthetic", str(tmp_path / "typo")))
    run()  # the same --output, the right corpus


@pytest.fixture(scope="module")
def larger_corpus(tmp_path_factory):
    from toy_corpus import write_corpus

    return write_corpus(tmp_path_factory.mktemp("larger"), pictures=(160, 48, 4))


@pytest.mark.parametrize("au_weight", ["3", "0"])
def test_it_learns_which_faces_of_other_people_are_alike(run, larger_corpus, tmp_path, au_weight):
    """Judged by the saved folder alone: pictures through its processor, distances one by one."""
    steps = ("--steps", "60", "--batch", "8", "--lr", "5e-3", "--validate-every", "60")
    options = (
        "--au-weight",
        au_weight,
        *steps,
        "--triplets",
        "500",
        "--min-contrast",
        "1.2",
        "--validation-triplets",
        "300",
    )
    folder = run("run", *options, source=("--synthetic", str(larger_corpus))) / "model"
    encoder, processor = AutoModel.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    faces = prepare_synthetic(larger_corpus, "validation", tmp_path / "held-out")
    inputs = processor([faces.picture(i) for i in range(48)], landmarks=list(faces.landmarks))
    with torch.no_grad():
        embeddings = encoder(torch.as_tensor(np.stack(inputs["pixel_values"]))).embeddings.numpy()
    shown = [v / max(np.linalg.norm(v), 0.3) for v in faces.intensities]
    right = []
    for i, j, k in itertools.combinations(range(48), 3):
        by_labels, by_embeddings = (
            [np.linalg.norm(x[a] - x[b]) for a, b in ((j, k), (i, k), (i, j))] for x in (shown, embeddings)
        )
        near, middle, _ = sorted(by_labels)
        if near > 0 and middle > 1.2 * near:
            right.append(np.argmin(by_labels) == np.argmin(by_embeddings))
    assert len(right) > 1000
    assert np.mean(right) > 0.45, "chance is 1/3"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["triplet_accuracy"] == pytest.approx(np.mean(right), abs=0.1)


def test_triplets_alone_train_too(run):
    folder = run("run", "--au-weight", "0", "--precision", "bf16", "--workers", "1")
    assert json.loads((folder / "model" / "metrics.json").read_text())["steps"] == 6
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert state["au_reader"] is None


def test_command_lines_that_say_too_little(script, capsys):
    for arguments, message in (
        ([], "--synthetic, or --fec-table"),
        (["--fec-table", "x"], "--fec-photographs"),
    ):
        with pytest.raises(SystemExit):
            script.main([*arguments, "--output", "nowhere"])
        assert message in capsys.readouterr().err


def test_accuracy_counts_triplets_whose_negative_is_far_from_both(script):
    triplets = torch.tensor([[0.0, 1, 3], [0, 2, 3], [0, 2, -1], [0, 1, 2.5]])[..., None]
    assert script.triplet_accuracy(triplets) == 0.5


# Triplets.


def test_triplets_of_intensities_by_hand():
    vectors = np.array([[0.0, 0], [0.1, 0], [1, 1], [0.1, 0.0]])
    triplets = triplets_by_distance(vectors, 50, seed=3)
    assert triplets.shape == (50, 3)
    assert set(triplets[:, 2]) == {2}, "the third face is the odd one out, whoever is drawn with it"
    assert all(0 in row[:2] for row in triplets.tolist()), "faces 1 and 3 do not differ"
    np.testing.assert_array_equal(triplets, triplets_by_distance(vectors, 50, seed=3))
    with pytest.raises(ValueError, match="Only 0 of 5 triplets.* min_contrast=1.3"):
        triplets_by_distance(np.eye(3), 5)


def test_a_strong_and_a_weak_smile_are_alike():
    strong, weak, brows, rest = np.array([[0.9, 0, 0], [0.4, 0, 0], [0, 0.3, 0.4], [0.03, 0, 0]])
    vectors = expression_vectors(np.stack([strong, weak, brows, rest]))
    np.testing.assert_allclose(vectors, [[1, 0, 0], [1, 0, 0], [0, 0.6, 0.8], [0.1, 0, 0]], atol=1e-9)


def test_a_batch_of_comparable_faces_is_compared_whole(corpus, tmp_path):
    faces = prepare_synthetic(corpus, "train", tmp_path)
    batch = ComparableFaces(faces, triplets_of_batch=200).draw(5, np.random.default_rng(0))
    assert batch["pictures"].shape[0] == batch["alignments"].shape[0] == 15
    assert set(batch["triplets"].flatten().tolist()) == set(range(15)), "every picture takes part"
    assert batch["margins"].tolist() == pytest.approx([0.2] * 200)
    v = batch["intensities"] / batch["intensities"].norm(dim=1, keepdim=True).clamp(min=0.3)
    for a, p, n in batch["triplets"].tolist():
        near = (v[a] - v[p]).norm()
        assert 0 < 1.3 * near < min((v[a] - v[n]).norm(), (v[p] - v[n]).norm())
    pictures = {picture.numpy().tobytes() for picture in batch["pictures"]}
    assert len(pictures) == 15, "no picture twice"
    other = ComparableFaces(faces, 200).draw(5, np.random.default_rng(1))
    assert not torch.equal(other["triplets"], batch["triplets"])


def test_triplets_of_a_corpus_are_clear(corpus, tmp_path):
    faces = prepare_synthetic(corpus, "train", tmp_path)
    triplets = triplets_by_distance(faces.intensities, 200, min_contrast=1.3)
    a, p, n = (faces.intensities[rows] for rows in triplets.T)
    near, far = (np.linalg.norm(x - y, axis=1) for x, y in ((a, p), (a, n)))
    assert (near > 0).all()
    assert (far > 1.3 * near).all()
    assert (np.linalg.norm(p - n, axis=1) > 1.3 * near).all()


@pytest.fixture
def fec(tmp_path, photo, landmarks):
    """FEC's table and folder; the photograph is a real one, with the face where `detector` sees it."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a_o.jpg", "b_o.jpg", "c_o.jpg", "d_o.jpg"):
        photo.save(folder / name, quality=95)
    (folder / "broken_o.jpg").write_bytes((folder / "a_o.jpg").read_bytes()[:300])
    inner = (landmarks[17:] + 0.5) / 200  # shares of the sides count from the picture's edges
    left, top, right, bottom = [*inner.min(0), *inner.max(0)]

    def row(names, answers, kind="TWO_CLASS_TRIPLET"):
        faces = [[f"http://farm5.staticflickr.com/4117/{n}_o.jpg", left, right, top, bottom] for n in names]
        return [*sum(faces, []), kind, *sum([[f"rater{i}", a] for i, a in enumerate(answers)], [])]

    rows = [
        row("abc", [1, 1, 1, 1, 2, 3]),  # b and c are alike
        row("bcd", [3, 3, 3, 3, 3, 3], "ONE_CLASS_TRIPLET"),
        row("abd", [1, 1, 2, 2, 3, 3]),  # nobody knows
        row("abx", [2, 2, 2]),  # x was never downloaded
        row(["a", "b", "broken"], [1, 1, 1]),
    ]
    table = tmp_path / "faceexp-comparison-data-train-public.csv"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return table, folder


def test_fec_as_it_is_published(fec):
    table = read_fec(*fec)
    assert table.counts == {"triplets": 5, "undecided": 1, "without a photograph": 1}
    names = [path.name[0] for path in table.files]
    assert ["".join(names[i] for i in row) for row in table.triplets] == ["bca", "bcd", "bba"]
    assert table.margins.tolist() == pytest.approx([0.2, 0.1, 0.2])
    assert read_fec(*fec, agreement=0.9).counts["undecided"] == 2
    with pytest.raises(FileNotFoundError, match="download FEC's photographs"):
        read_fec(fec[0], fec[1] / "none")
    with pytest.raises(ValueError, match="leaves no triplet"):
        read_fec(fec[0], fec[0].parent)


def test_faces_of_fec_are_cut_out_and_aligned(fec, detector, landmarks, photo, tmp_path):
    triplets = prepare_fec(read_fec(*fec), tmp_path / "prepared", detector)
    assert len(triplets) == 2, "one has a broken photograph"
    assert [reason.split(" (")[1].split(")")[0] for reason in triplets.faces.skipped] == ["broken_o.jpg"]
    batch = triplets.__getitems__([1, 0])
    assert batch["pictures"].shape == (2, 3, 256, 256, 3)
    assert batch["margins"].tolist() == pytest.approx([0.1, 0.2])
    # The cut shows the photograph where the landmarks say it does.
    face, (left, top) = triplets.faces, landmarks[17:].min(0)
    side = 2 * (landmarks[17:].max(0) - landmarks[17:].min(0)).max()
    centre = (landmarks[17:].max(0) + [left, top]) / 2
    expected = (landmarks - centre + side / 2) * 256 / side - 0.5
    np.testing.assert_allclose(face.landmarks[0], expected, atol=1e-3)
    cut = np.asarray(Image.fromarray(face.pictures[0]).resize((32, 32), Image.Resampling.BOX), float)
    corner = centre + 0.5 - side / 2
    box = (*corner, *(corner + side))
    direct = photo.transform((256, 256), Image.Transform.EXTENT, box, Image.Resampling.BILINEAR)
    assert np.abs(cut - np.asarray(direct.resize((32, 32), Image.Resampling.BOX), float)).mean() < 3
    (broken := fec[1] / "broken_o.jpg").unlink()
    broken.symlink_to(tmp_path / "moved.jpg")
    assert len(prepare_fec(read_fec(*fec), tmp_path / "prepared", detector)) == 2, "the link leads nowhere"
    shutil.copy(fec[1] / "a_o.jpg", tmp_path / "moved.jpg")  # downloaded again
    assert len(prepare_fec(read_fec(*fec), tmp_path / "prepared", detector)) == 3


def test_boxes_beyond_the_border_end_there(fec, landmarks, tmp_path):
    """Of a photograph of 200 x 200; pixels are counted from the centre of the first."""

    class Detector:
        def locate(self, photograph, boxes):
            self.boxes = boxes
            return [SimpleNamespace(confidence=1.0, landmarks=landmarks)]

    detector, box = Detector(), np.array([[-0.1, 0.2, 0.6, 1.3]])
    table = FecTable((fec[1] / "a_o.jpg",), box, np.zeros((0, 3), int), np.zeros(0), {})
    (face,) = prepare_fec(table, tmp_path / "prepared", detector).faces.landmarks
    np.testing.assert_allclose(detector.boxes, [[-0.5, 39.5, 119.5, 199.5]])
    side, centre = 2 * 160, np.array([60, 120])  # the box is 120 x 160
    np.testing.assert_allclose((face + 0.5) / 256 * side + centre - 160, landmarks + 0.5, atol=1e-3)


def test_large_photographs_are_cut_out_alike_and_without_aliases(photo, landmarks):
    box, sides = np.array([49.5, 39.5, 149.5, 159.5]), (200, 1000)
    stripes = Image.fromarray(np.tile(np.uint8([0, 255]), (1000, 500))).convert("RGB")
    cuts = [
        _cut_out(photo.resize((side, side)), *((side / 200) * (x + 0.5) - 0.5 for x in (box, landmarks)))
        for side in sides
    ] + [_cut_out(stripes, 5 * (box + 0.5) - 0.5, landmarks)]
    np.testing.assert_allclose(cuts[0][1], cuts[1][1])
    small, large, fine = (np.asarray(Image.open(BytesIO(cut)), float)[40:-40, 40:-40] for cut, _ in cuts)
    assert np.abs(small - large).mean() < 3
    assert fine.std() < 40, "stripes of a pixel blur; sampled, they would have a deviation of 127"


def test_faces_on_which_no_landmarks_lie_are_left_out(fec, detector, monkeypatch, tmp_path):
    locate = type(detector).locate
    monkeypatch.setattr(
        type(detector),
        "locate",
        lambda self, *where: [replace(face, confidence=0.3) for face in locate(self, *where)],
    )
    with pytest.raises(ValueError, match="0.30 only"):
        prepare_fec(read_fec(*fec), tmp_path / "prepared", detector)


def test_triplets_of_an_unknown_type_are_refused(fec):
    table, folder = fec
    table.write_text(table.read_text().replace("ONE_CLASS_TRIPLET", "FOUR_CLASS_TRIPLET"))
    with pytest.raises(ValueError, match="'FOUR_CLASS_TRIPLET'; known are ONE_CLASS_TRIPLET"):
        read_fec(table, folder)


def test_fec_trains_and_says_what_is_missing(run, fec, script, monkeypatch, detector, capsys):
    monkeypatch.setattr(script, "FaceDetector", lambda: detector)
    source = (
        "--fec-table",
        str(fec[0]),
        "--fec-photographs",
        str(fec[1]),
        "--fec-validation-table",
        str(fec[0]),
    )
    folder = run("run", source=source)
    (counted, _) = events(folder, "fec")
    assert (counted["without_a_photograph"], counted["unreadable_faces"], counted["used"]) == (1, 1, 2)
    assert "1 without a photograph, 1 unreadable faces, 2 used" in "".join(capsys.readouterr())
    assert json.loads((folder / "model" / "metrics.json").read_text())["triplets"] == fec[0].name


def test_held_out_triplets_share_no_face(script, corpus, tmp_path):
    from actionunits.data.triplets import ExpressionTriplets

    faces = prepare_synthetic(corpus, "train", tmp_path)
    rows = triplets_by_distance(faces.intensities, 500, min_contrast=1.1)
    triplets = ExpressionTriplets(faces, rows, np.full(500, 0.2, np.float32))
    kept, held_out = script.hold_out(triplets, 0, 100)
    assert not set(kept.triplets.ravel()) & set(held_out.triplets.ravel())
    assert len(kept) > len(held_out) > 0
    assert len(kept.margins) == len(kept)
    one = replace(triplets, triplets=rows[:1], margins=triplets.margins[:1])
    with pytest.raises(ValueError, match="1 triplets are too few to hold some out"):
        script.hold_out(one, 0, 1)


def test_few_held_out_triplets_cost_few_others(script, corpus, tmp_path):
    """Of triplets without a face in common p are held out and (1 - p^1/3)^3 are left."""
    from actionunits.data.triplets import ExpressionTriplets

    faces = prepare_synthetic(corpus, "train", tmp_path).select(np.arange(30_000) % 24)
    rows = np.arange(30_000).reshape(-1, 3)
    triplets = ExpressionTriplets(faces, rows, np.full(10_000, 0.2, np.float32))
    for wanted, share in ((100, 0.01), (10_000, 0.05)):
        parts = [script.hold_out(triplets, seed, wanted) for seed in range(20)]
        kept, held_out = (sum(map(len, part)) / 20 for part in zip(*parts, strict=True))
        assert held_out == pytest.approx(10_000 * share, rel=0.1)
        assert kept == pytest.approx(10_000 * (1 - share ** (1 / 3)) ** 3, rel=0.05)
