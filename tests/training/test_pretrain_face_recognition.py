"""Pretraining by names: the margin against ArcFace's formula, resuming to the bit, the way into a recipe."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_run import TINY

from actionunits import GdaConfig, GdaForAUDetection, LscConfig, LscForAUDetection
from actionunits.data.corpora import CORPORA


@pytest.fixture
def pretrain(pretrain_face_recognition):
    return pretrain_face_recognition


@pytest.fixture
def run(pretrain, tmp_path):
    CORPORA["ms_celeb"].write_tiny(tmp_path / "disc")
    config = json.dumps({**TINY, "image_size": 48})

    def run(name: str, **options):
        values = {"steps": 5, "batch": 6, "validate-every": 2, "held-out": 0.3, "lr": 0.01, **options}
        arguments = [f"--{key}={value}" for key, value in values.items()]
        folder = tmp_path / name
        cache = ["--cache", str(tmp_path / "cache")]
        pretrain.main(
            [
                "--data",
                str(tmp_path / "disc"),
                "--output",
                str(folder),
                "--config",
                config,
                *cache,
                *arguments,
            ]
        )
        return folder

    return run


def test_the_loss_is_the_formula_of_arcface(pretrain):
    torch.manual_seed(0)
    embeddings = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    directions = torch.randn(5, 8, dtype=torch.float64)
    labels = torch.tensor([0, 4, 2, 1, 3, 0])
    loss = pretrain.margin_softmax_loss(embeddings, directions, labels, scale=10.0, margin=0.5)
    expected = 0.0
    for x, y in zip(embeddings.detach(), labels.tolist(), strict=True):
        angles = [math.acos(float(x @ w / (x.norm() * w.norm()))) for w in directions]
        assert angles[y] < math.pi - 0.5
        logits = [10 * math.cos(a + 0.5 * (i == y)) for i, a in enumerate(angles)]
        expected += math.log(sum(map(math.exp, logits))) - logits[y]
    assert loss.item() == pytest.approx(expected / 6, rel=1e-5)
    plain = pretrain.margin_softmax_loss(embeddings, directions, labels, scale=10.0, margin=0.0)
    cosines = torch.nn.functional.cosine_similarity(embeddings[:, None], directions[None], dim=-1)
    assert float(plain) == pytest.approx(
        float(torch.nn.functional.cross_entropy(10 * cosines, labels)), rel=1e-5
    )
    assert loss > plain


def test_the_loss_rises_with_the_angle_all_the_way_and_stays_finite(pretrain):
    angles = torch.linspace(0, math.pi, 181)
    losses = []
    for angle in angles:
        x = torch.tensor([[math.cos(angle), math.sin(angle), 0.0]], requires_grad=True)
        loss = pretrain.margin_softmax_loss(x, torch.eye(3)[[0, 2]], torch.tensor([0]), scale=1.0)
        loss.backward()
        assert torch.isfinite(x.grad).all()
        losses.append(float(loss))
    assert all(b > a for a, b in zip(losses[:-1], losses[1:], strict=True))
    unread = torch.tensor([pretrain.UNREADABLE])
    assert float(pretrain.margin_softmax_loss(torch.ones(1, 2), torch.eye(2), unread)) == 0


def test_an_interrupted_run_ends_with_the_same_weights_and_figures(pretrain, run, monkeypatch):
    """It dies before its fourth step, and when all are done, before the model is written."""
    whole = run("whole") / "model"
    train_step, calls = pretrain.Training._train_step, []

    def dies(self, batch=None):
        calls.append(1)
        if batch is None or len(calls) == 4:
            raise KeyboardInterrupt
        return train_step(self, batch)

    for method in ("_train_step", "_save_model"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(pretrain.Training, method, dies)
            run("stopped")
    stopped = run("stopped") / "model"
    weights = [load_file(folder / "model.safetensors") for folder in (whole, stopped)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert (stopped / "metrics.json").read_bytes() == (whole / "metrics.json").read_bytes()


def test_faces_are_seen_in_the_range_of_recipes_and_half_of_them_mirrored(
    pretrain, run, tmp_path, monkeypatch
):
    seen, forward = [], pretrain.FaceRecognizer.forward

    def watched(self, pixels):
        if self.training:
            seen.append(pixels)
        return forward(self, pixels)

    monkeypatch.setattr(pretrain.FaceRecognizer, "forward", watched)
    run("run", steps=4)
    files = [Image.open(file).convert("RGB") for file in (tmp_path / "disc").rglob("*.jpg")]
    faces = np.stack([file.resize((48, 48), Image.Resampling.BILINEAR) for file in files]).transpose(
        0, 3, 1, 2
    )
    faces = torch.from_numpy((faces / 255 - 0.5) / 0.5).float()  # `image_mean` and `image_std`
    plain, mirrored = (
        (torch.cat(seen)[:, None] - each).abs().amax((2, 3, 4)).amin(1) < 1e-5
        for each in (faces, faces.flip(-1))
    )
    assert len(plain) == 24 and (plain ^ mirrored).all() and 4 < mirrored.sum() < 20


def test_weights_that_are_no_numbers_are_kept_by_no_checkpoint(run, tmp_path, monkeypatch):
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step 2; lower --lr=1e\+30"):
        run("fast", lr=1e30)
    clip = torch.nn.utils.clip_grad_norm_

    def spoil(parameters, norm):
        parameters[0].grad.fill_(torch.nan)
        return clip(parameters, norm)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spoil)
    with pytest.raises(FloatingPointError, match="the gradient's norm is nan at step 1"):
        run("spoilt", **{"validate-every": 1})
    assert not list(tmp_path.rglob("checkpoint.pt"))


def test_the_networks_of_escda_start_from_it(pretrain, run, tmp_path):
    from network_training import start_from

    broken = next((tmp_path / "disc").rglob("*.jpg"))
    broken.write_bytes(b"no picture")
    folder = run("run") / "model"
    weights = load_file(folder / "model.safetensors")
    for make, config in ((GdaForAUDetection, GdaConfig), (LscForAUDetection, LscConfig)):
        sizes = {**TINY, "image_size": 48}
        model = make(config(**sizes, aus=[1, 12]))
        backbone = {name for name in model.state_dict() if name.startswith("backbone.")}
        assert backbone == set(weights)
        start_from(model, folder)
        assert all(torch.equal(model.state_dict()[name], weights[name]) for name in backbone)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["people"] == 2 and 0 <= metrics["verification_auc"] <= 1
    with pytest.raises(ValueError, match=r"other values of \['margin'\]"):
        run("run", margin=0.3)


def test_a_disc_without_its_pictures_is_refused(run, tmp_path):
    CORPORA["ms_celeb"].write_tiny(tmp_path / "disc")
    shutil.rmtree(next(path for path in (tmp_path / "disc").iterdir() if path.is_dir()))
    with pytest.raises(FileNotFoundError, match="has no pictures to train on"):
        run("run")
    assert not (tmp_path / "run" / "model").exists()


def test_a_command_that_found_too_little_claims_no_folder(run):
    with pytest.raises(ValueError, match="do not fill one batch of 9999"):
        run("run", batch=9999)
    assert (run("run") / "model" / "config.json").is_file()


@pytest.mark.parametrize(
    ("config", "message"),
    [('{"hiden_size": 8}', r"unknown keys ['hiden_size']"), ("[8]", "--config [8] is not a table")],
)
def test_a_mistyped_config_is_refused(pretrain, tmp_path, capsys, config, message):
    with pytest.raises(SystemExit):
        pretrain.main(["--data", "-", "--output", str(tmp_path / "run"), "--config", config])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_verification_is_the_share_of_pairs_in_order(pretrain):
    embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    assert pretrain.verification_auc(embeddings, torch.tensor([0, 0, 1, 1])) == 1.0
    assert pretrain.verification_auc(embeddings, torch.tensor([0, 1, 0, 1])) < 0.5
    assert pretrain.verification_auc(embeddings, torch.tensor([0, 0, 0, 0])) == 0.5
