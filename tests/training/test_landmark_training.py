"""The training of the landmark network: crops, disturbances, a tiny run that is stopped and goes on."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import load_script

from actionunits.face_landmarks import FaceLandmarker, FaceLandmarkerConfig
from actionunits.landmarks import mirror_landmarks

# Eight channels at least: with fewer, oneDNN's AVX2 kernel for the weights' gradient of a strided 1x1
# convolution in channels_last writes beyond its memory (github.com/uxlfoundation/oneDNN/issues/6035).
SHAPE = {
    "image_size": 32,
    "hidden_sizes": [8, 8, 8, 8, 8],
    "neck_size": 8,
    "intermediate_size": 8,
    "map_size": 4,
}


@pytest.fixture(scope="module")
def batches():
    return load_script("landmark_batches")


@pytest.fixture
def script(monkeypatch):
    script = load_script("train_landmarks")
    monkeypatch.setattr(script, "SHAPE", SHAPE)
    return script


def faces(count, seed=0):
    """Pictures (N, 160, 160, 3) and points (N, 68, 2) spread over a face of about 90 pixels."""
    rng = np.random.default_rng(seed)
    pictures = rng.integers(0, 255, (count, 160, 160, 3), dtype=np.uint8)
    return torch.from_numpy(pictures), torch.from_numpy(
        rng.uniform(35, 125, (count, 68, 2)).astype(np.float32)
    )


def test_points_move_with_the_crops(batches):
    """A white dot at the nose tip is still there after turning, mirroring, stretching and cutting."""
    torch.manual_seed(0)
    _, points = faces(64)
    pictures = torch.zeros(64, 160, 160, 3, dtype=torch.uint8)
    for picture, (x, y) in zip(pictures, points[:, 30].round().int().tolist(), strict=True):
        picture[y - 1 : y + 2, x - 1 : x + 2] = 255
    places = points.mean(1), torch.full((64,), 130.0), torch.linspace(-0.5, 0.5, 64)
    crops, labels = batches.cut(pictures, points, *places, torch.arange(64) % 2 == 0, 128)
    dot = labels[:, 30] * 128 - 0.5
    seen = 0
    for crop, (x, y) in zip(crops, dot.round().int().tolist(), strict=True):
        patch = crop[:, max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2]
        seen += bool(patch.numel() and patch.mean() > 0.3)
    assert seen > 55  # some lie beyond the rims


def test_points_of_crops_are_exact(batches):
    """In pictures whose channels are x and y, every point of a crop shows where in the picture it was."""
    torch.manual_seed(0)
    _, points = faces(32)
    y, x = torch.meshgrid(torch.arange(160), torch.arange(160), indexing="ij")
    pictures = torch.stack([x, y, x], -1).to(torch.uint8).expand(32, -1, -1, -1)
    places = points.mean(1), torch.full((32,), 130.0), torch.linspace(-0.5, 0.5, 32)
    flip = torch.arange(32) % 2 == 0
    plain = batches.Disturbance(stretch=0.05, tight=0.0, covered=(), poor=())
    crops, labels = batches.cut(pictures, points, *places, flip, 128, plain)
    shown = torch.nn.functional.grid_sample(crops, labels[:, None] * 2 - 1, align_corners=False)
    was = torch.where(flip[:, None, None], points[:, batches.MIRROR], points)
    inside = ((labels > 0.01) & (labels < 0.99)).all(-1)
    assert inside.float().mean() > 0.9
    found = (shown[:, :2, 0].mT + 1) * 127.5
    torch.testing.assert_close(found[inside], was[inside], atol=0.01, rtol=0)


def test_mirrored_crops_have_mirrored_points(batches):
    pictures, points = faces(8)
    places = points.mean(1), torch.full((8,), 130.0), torch.zeros(8)
    both = []
    for flip in (torch.zeros(8, dtype=bool), torch.ones(8, dtype=bool)):
        torch.manual_seed(0)
        both.append(batches.cut(pictures, points, *places, flip, 32)[1])
    torch.testing.assert_close(
        both[1][:, batches.MIRROR] * torch.tensor([-1, 1]) + torch.tensor([1, 0]), both[0]
    )


def test_points_move_to_mediapipes_along_the_face(script):
    """In an upright face by parts of the outer eye distance; turned ones along with them; no contour."""
    points = torch.zeros(2, 68, 2)
    points[0, 36], points[0, 45] = torch.tensor([10.0, 10.0]), torch.tensor([110.0, 10.0])
    points[0, 48], points[0, 54] = torch.tensor([30.0, 88.0]), torch.tensor([90.0, 88.0])
    points[1] = points[0] @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]])  # a quarter turn
    _, moved = script.with_mediapipe_points((torch.zeros(2), points))
    moves = moved - points
    torch.testing.assert_close(moves[0, 21], torch.tensor([-1.0, -5.8]))
    torch.testing.assert_close(moves[0, 22], torch.tensor([1.0, -5.8]))  # its mirror image
    torch.testing.assert_close(moves[0, 57], torch.tensor([0.0, 0.1]))
    torch.testing.assert_close(moves[1], moves[0] @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))
    assert not moves[:, :17].any() and (moves[0, 17:] != 0).any(1).all()


def test_a_network_is_centred_on_photographs(script):
    """Its mean error there, left and right alike, is gone where every picture is cut alike."""

    class Shifted(FaceLandmarker):
        """Finds every point at 0.5 + bias of the one crop there is."""

        def locate(self, image, boxes):
            places = (self.points.bias.detach().view(68, 2).numpy() + 0.5) * image.width - 0.5
            return [(places.astype(np.float64), 1.0)]

        def _crop_of_points(self, points):
            return self._crop(np.full(2, 79.5), 160.0, np.zeros(2))

    torch.manual_seed(0)
    model = Shifted(FaceLandmarkerConfig(**SHAPE))
    pictures, points = faces(6)
    points = (points + mirror_landmarks(points, "ibug68", 160)) / 2  # no side is another
    before = model.points.bias.clone()
    middle = script.centred(model, (pictures, points))
    assert torch.equal(model.points.bias, before)
    found = torch.from_numpy(middle.locate(Image.new("RGB", (160, 160)), [None])[0][0])
    torch.testing.assert_close(found.float(), points.mean(0), atol=1e-3, rtol=0)

    both = Shifted(FaceLandmarkerConfig(**SHAPE, fine_look=True))  # the last look is the second network's
    with torch.no_grad():
        both.points.bias.copy_(before)
    moved = script.centred(both, (pictures, points))
    assert torch.equal(moved.points.bias, before)
    torch.testing.assert_close(moved.fine.points.bias - both.fine.points.bias, middle.points.bias - before)


def test_a_quarter_of_a_batch_is_no_face(batches):
    torch.manual_seed(0)
    clutter = torch.full((3, 160, 160, 3), 90, dtype=torch.uint8)
    stock = batches.LandmarkBatches(faces(40), faces(3, seed=1), clutter, torch.device("cpu"))
    order = stock.order(20)
    assert len(order) == 2 and len(torch.cat(order).unique()) == 40
    crops, labels, is_face = stock.draw(order[0], 32)
    assert crops.shape == (20, 3, 32, 32) and crops.min() >= -1 and crops.max() <= 1
    assert is_face.tolist() == [1.0] * 15 + [0.0] * 5
    inside = ((labels > 0) & (labels < 1)).all(-1).float().mean(1)
    assert inside[:15].min() > 0.5 and inside[:15].mean() > 0.9
    assert inside[17] < 0.5  # half out
    misfit = (labels[18] - labels[18].mean(0)).abs().amax()
    assert misfit > 1 or misfit < 0.35


def test_fine_looks_see_faces_only_as_points_that_are_off_by_a_little_cut_them(batches):
    torch.manual_seed(0)
    clutter = torch.full((3, 160, 160, 3), 90, dtype=torch.uint8)
    stock = batches.LandmarkBatches(faces(400), None, clutter, torch.device("cpu"), fine=True)
    _, labels, is_face = stock.draw(stock.order(400)[0], 32)
    assert is_face.tolist() == [1.0] * 400
    inner = labels[:, 17:]
    low, high = inner.amin(1), inner.amax(1)
    assert low.min() > 0 and high.max() < 1  # the first look's crops also cut faces, see above
    middle, size = (low + high) / 2, (high - low).amax(1)
    assert middle.mean(0).sub(0.5).abs().max() < 0.01 and 0.015 < middle.std() < 0.04
    assert 1 / size.median() == pytest.approx(batches.CROP_MARGIN, abs=0.1)


@pytest.mark.parametrize(
    ("step", "more"), [("disturb", []), ("_occlude", [(0.25, 0.12)]), ("_lower", [])], ids=lambda x: str(x)
)
def test_disturbances_change_crops_and_keep_their_range(batches, step, more):
    torch.manual_seed(0)
    crops = torch.rand(32, 3, 32, 32) * 2 - 1
    changed = getattr(batches, step)(crops.clone(), *more)
    assert changed.shape == crops.shape and changed.abs().max() <= 1
    assert not torch.equal(changed, crops)


def test_crops_that_no_disturbance_strikes_stay_as_they_are(batches, monkeypatch):
    crops = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: torch.ones(*shape))  # above all shares
    sharp = batches.Disturbance(stretch=0.0, tight=0.0, covered=(0.5, 0.5), poor=("sharp",))
    torch.testing.assert_close(batches.disturb(crops, sharp), crops, atol=0.003, rtol=0)


def test_a_covering_object_is_of_at_most_two_fifths_of_the_side_anywhere_in_the_crop(batches):
    torch.manual_seed(0)
    changed = batches._occlude(torch.full((500, 3, 40, 40), 2.0), (1.0,)) != 2  # beyond all colours
    covered = changed.any(1)
    assert covered.any(2).sum(1).max() <= 16 and covered.any(1).sum(1).max() <= 16
    is_plain = covered.flatten(1).any(1)
    assert 0.4 < is_plain.float().mean() < 0.6  # the others are covered by pieces of equal crops
    often = covered[is_plain].float().mean(0)
    for half in (often[:20], often[20:], often[:, :20], often[:, 20:]):
        assert float(half.mean()) == pytest.approx(float(often.mean()), rel=0.2)
    assert 0.03 < often.mean() < 0.06  # at a mean half side of 0.12: (2 * 0.12) ** 2, less corners and rims


def test_mild_disturbances_leave_every_second_crop_sharp(batches, monkeypatch):
    treated = {}
    for kind in ("coarse", "blurred", "shaken", "sharp"):
        count = lambda crops, kind=kind: treated.update({kind: treated.get(kind, 0) + len(crops)}) or crops  # noqa: E731
        monkeypatch.setitem(batches.POOR, kind, count)
    batches.disturb(torch.zeros(40, 3, 8, 8), batches.MILD)
    assert treated == {"coarse": 12, "blurred": 4, "shaken": 4, "sharp": 20}
    treated.clear()
    batches.disturb(torch.zeros(40, 3, 8, 8))
    assert treated == {"coarse": 15, "blurred": 10, "shaken": 5, "sharp": 10}


@pytest.mark.parametrize("length", [0, 7])
def test_blur_keeps_a_plain_picture_and_spreads_a_dot(batches, length):
    torch.manual_seed(0)
    plain = torch.full((2, 3, 32, 32), 0.3)
    torch.testing.assert_close(batches._blur(plain, length), plain)
    dot = torch.zeros(1, 3, 32, 32)
    dot[..., 16, 16] = 1
    spread = batches._blur(dot, length)
    assert spread.max() < 0.6 and spread.sum() == pytest.approx(3.0, abs=0.01)


def test_shuffled_crops_are_the_same_pieces(batches):
    torch.manual_seed(0)
    crops = torch.arange(2 * 3 * 32 * 32).float().view(2, 3, 32, 32)
    mixed = batches.shuffled(crops)
    assert not torch.equal(mixed, crops)
    assert torch.equal(mixed.flatten(1).sort(1)[0], crops.flatten(1).sort(1)[0])
    assert torch.equal(mixed[0, 0, 0, :8].diff(), torch.ones(7))


def test_a_stopped_training_goes_on_to_the_same_weights(script, corpus, tmp_path, monkeypatch, capsys):
    """Twice it stops while it measures a network, the second time the last one, which is not written yet."""
    # the toy corpus' pictures and a wall for clutter
    monkeypatch.setattr(script, "read_clutter", lambda: torch.full((2, 64, 64, 3), 90, dtype=torch.uint8))
    words = ["x", "--data", str(corpus), "--epochs", "3", "--batch", "8", "--check-every", "1"]
    words += ["--save-every", "0", "--output"]
    check, calls = script.check, []

    def stopped(*args):
        calls.append(args)
        if len(calls) in (2, 4):
            raise KeyboardInterrupt
        return check(*args)

    monkeypatch.setattr("sys.argv", [*words, str(tmp_path / "whole")])
    script.main()
    words = [*words, str(tmp_path)]
    monkeypatch.setattr("sys.argv", words)
    monkeypatch.setattr(script, "check", stopped)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            script.main()
    capsys.readouterr()
    script.main()
    assert "resuming after epoch 1" in capsys.readouterr().out
    whole = (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert (tmp_path / "model.safetensors").read_bytes() == whole
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["epoch"] == 2 and metrics["synthetic test people"]["pictures"] > 0
    model = FaceLandmarker.from_pretrained(tmp_path, dtype=torch.float32)
    assert model.config.map_size == 4
    ((points, score),) = model.locate(Image.new("RGB", (64, 64)), [(10, 10, 50, 50)])
    assert np.isfinite(points).all() and 0 <= score <= 1
    other = FaceLandmarkerConfig(**SHAPE)
    FaceLandmarker(other).save_pretrained(tmp_path / "other")
    for changed in (["--lr", "1"], ["--map-size", "8"], ["--init", str(tmp_path / "other")]):
        monkeypatch.setattr("sys.argv", [*words, *changed])
        with pytest.raises(ValueError, match="another training"):
            script.main()


def test_fine_looks_go_on_beside_the_network_that_they_began_with(script, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "read_clutter", lambda: torch.full((2, 64, 64, 3), 90, dtype=torch.uint8))
    for name in ("first", "other"):
        FaceLandmarker(FaceLandmarkerConfig(**SHAPE)).save_pretrained(tmp_path / name)
    shutil.copytree(tmp_path / "first", tmp_path / "moved")
    words = ["x", "--data", str(corpus), "--epochs", "1", "--batch", "8", "--fine"]
    words += ["--output", str(tmp_path / "run"), "--init"]
    monkeypatch.setattr(script, "check", lambda *_: {})
    for name in ("first", "moved"):
        monkeypatch.setattr("sys.argv", [*words, str(tmp_path / name)])
        script.main()
    monkeypatch.setattr("sys.argv", [*words, str(tmp_path / "other")])
    with pytest.raises(ValueError, match="belongs to another training, .*model.safetensors"):
        script.main()


def test_photographs_of_people_whom_the_corpus_does_not_name_are_told(script, corpus, tmp_path, monkeypatch):
    words = ["x", "--data", str(corpus), "--output", str(tmp_path / "run"), "--photos", str(tmp_path)]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(ValueError, match="does not name the people of train, test, validation.*None"):
        script.main()
    (tmp_path / "people.csv").write_text("set,person,age,gender,ethnicity\n")
    for name in ("london_neutral", "canada_neutral"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "001.jpg").touch(), (tmp_path / name / "001.tem").touch()
    with pytest.raises(ValueError, match=r"no photograph of 1 people of the corpus, such as \['nobody'\]"):
        script.read_photos(tmp_path, ["nobody"])


def test_points_of_photographs_move_with_their_square_crops(script, tmp_path, monkeypatch):
    """A white disc around the nose tip has its middle at the point; the face takes 1 / 1.8 of the crop."""
    marks = np.random.default_rng(0).uniform([210, 120], [520, 400], (68, 2))
    y, x = np.mgrid[:600, :800]
    disc = np.hypot(x - marks[30, 0], y - marks[30, 1]) < 15
    for name in ("seen", "other"):
        Image.fromarray(disc).convert("RGB").save(tmp_path / f"{name}.png")
    people = [{"name": name, "picture": tmp_path / f"{name}.png"} for name in ("other", "seen")]
    monkeypatch.setattr(script, "read_people", lambda folder: people)
    monkeypatch.setattr(script, "read_template", {tmp_path / "seen.tem": marks}.get)
    pictures, points = script.read_photos(tmp_path, ["seen"])
    assert pictures.shape == (1, 160, 160, 3)
    light = pictures[0].float().mean(-1)
    found = torch.stack([light.sum(axis) @ torch.arange(160.0) for axis in (0, 1)]) / light.sum()
    torch.testing.assert_close(found, points[0, 30], atol=0.05, rtol=0)
    assert float((points[0].amax(0) - points[0].amin(0)).max()) == pytest.approx(160 / 1.8)


def test_fine_looks_are_trained_beside_a_network_that_stays(script, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "read_clutter", lambda: torch.full((2, 64, 64, 3), 90, dtype=torch.uint8))
    torch.manual_seed(0)
    FaceLandmarker(FaceLandmarkerConfig(**SHAPE)).save_pretrained(tmp_path / "first")
    words = ["x", "--data", str(corpus), "--epochs", "1", "--batch", "8", "--fine"]
    monkeypatch.setattr("sys.argv", [*words, "--output", str(tmp_path / "both")])
    with pytest.raises(SystemExit):
        script.main()  # nobody said of which
    monkeypatch.setattr("sys.argv", [*words, "--output", "-", "--init", str(tmp_path / "first")])
    whole = script.first_weights(script.parse_arguments())
    for name, weight in whole.fine.state_dict().items():
        assert torch.equal(weight, whole.state_dict()[name])  # it begins as a copy
    monkeypatch.setattr(
        "sys.argv", [*words, "--output", str(tmp_path / "both"), "--init", str(tmp_path / "first")]
    )
    script.main()
    first, both = (
        FaceLandmarker.from_pretrained(tmp_path / name, dtype=torch.float32).state_dict()
        for name in ("first", "both")
    )
    for name, weight in first.items():
        assert torch.equal(weight.half().float(), both[name]), name  # as it is saved
    assert not torch.equal(both["fine.points.weight"], both["points.weight"])
    metrics = json.loads((tmp_path / "both" / "metrics.json").read_text())
    assert {"synthetic test people", "synthetic test people, no fine looks"} <= set(metrics)
    monkeypatch.setattr(
        "sys.argv", [*words[:-1], "--output", "-", "--init", str(tmp_path / "both"), "--fine"]
    )
    again = script.first_weights(script.parse_arguments()).state_dict()
    assert all(torch.equal(weight, both[name]) for name, weight in again.items())  # and may go on


def test_fine_looks_are_measured_beside_their_absence(script, monkeypatch):
    monkeypatch.setattr(script, "check", lambda model, *faces: {"fine": model.fine is not None})
    first, both = (FaceLandmarker(FaceLandmarkerConfig(**SHAPE, fine_look=fine)) for fine in (False, True))
    assert script.compare_looks(first, "people", faces(1), 9) == {"people": {"fine": False}}
    assert script.compare_looks(both, "people", faces(1), 9) == {
        "people": {"fine": True},
        "people, no fine looks": {"fine": False},
    }
    assert both.fine is not None


class Locator:
    """Finds the points that it is told to, in turn."""

    def __init__(self, points):
        self.found = iter(points)

    def eval(self):
        pass

    def locate(self, image, boxes):
        return [(next(self.found), 0.4)]


def test_figures_tell_parts_of_the_face_and_whether_lips_and_lids_open(script):
    pictures, points = faces(40)
    exact = script.check(Locator(points.numpy()), pictures, points)
    assert exact["inner error mean"] == exact["lips error mean"] == exact["worse than 10 %"] == 0
    assert exact["lip gap correlation"] == exact["lid gap correlation"] == exact["face score below 0.5"] == 1
    shut = points.clone()
    shut[:, 65:68] = shut[:, [63, 62, 61]]  # the lower lip lies on the upper one, whatever the mouth does
    shut[:, 17:27, 0] += (points[:, 36] - points[:, 45]).norm(dim=1)[:, None]
    figures = script.check(Locator(shut.numpy()), pictures, points)
    assert figures["brows error mean"] == pytest.approx(1, abs=1e-3)
    assert figures["lip gap correlation"] == 0 < figures["lips error mean"]
    assert figures["nose error mean"] == figures["eyes error mean"] == 0
    assert figures["lid gap correlation"] == 1


def test_a_network_without_maps_may_begin_one_with_maps(script, tmp_path, monkeypatch):
    before = FaceLandmarker(FaceLandmarkerConfig(**SHAPE | {"map_size": 0}))
    before.save_pretrained(tmp_path / "before")
    words = ["x", "--data", "-", "--output", str(tmp_path / "after"), "--init", str(tmp_path / "before")]
    for more, size in (([], 0), (["--map-size", "4"], 4)):
        monkeypatch.setattr("sys.argv", [*words, *more])
        model = script.Training(script.parse_arguments(), 5, torch.device("cpu")).model
        assert model.config.map_size == size
        assert torch.equal(model.points.weight, before.points.weight)


def test_a_corpus_smaller_than_a_batch_is_refused(script, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["x", "--data", str(corpus), "--output", str(tmp_path), "--batch", "9999"]
    )
    with pytest.raises(ValueError, match="9999"):
        script.main()


def test_a_network_to_start_from_that_is_not_there_is_named(script, tmp_path, monkeypatch, capsys):
    words = ["x", "--data", "-", "--output", str(tmp_path / "run"), "--init", str(tmp_path / "typo")]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit):
        script.main()
    assert "typo holds no network" in capsys.readouterr().err


def test_an_empty_folder_is_named(script, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train-\*.parquet"):
        script.read_split(tmp_path, "train")
