"""What many tests share: a real photo with known landmarks, tiny models, and a known-answer landmarker."""

import os

import cv2
import pytest
import torch
from PIL import Image
from transformers.utils import logging

from actionunits import AUImageProcessor, FaceDetector, cli
from actionunits.pictures import sample_photo
from fake_hub import FakeHub, connect
from known_landmarker import ASTRONAUT, KnownLandmarker
from scripts import ROOT, load_script
from tiny_models import TINY_MODELS

MOST_WORKERS = 4  # each needs one or two GB

logging.disable_progress_bar()


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the options
def pytest_cmdline_main(config):
    """Spread the files of the whole suite over the cores if pytest-xdist is there; `pytest -n0` does not."""
    is_whole = (
        config.args_source is pytest.Config.ArgsSource.TESTPATHS and "PYTEST_XDIST_WORKER" not in os.environ
    )
    if is_whole and getattr(config.option, "numprocesses", 0) is None and not config.option.usepdb:
        config.option.numprocesses, config.option.dist = min(os.cpu_count() or 1, MOST_WORKERS), "loadfile"


def pytest_configure():
    """Let workers share the cores; each would take all of them, and what tests start would, too."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        threads = max(1, (os.cpu_count() or 1) // workers)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)
        cv2.setNumThreads(threads)


@pytest.fixture
def photo():
    """A real photo with one face, cut to 200 x 200 pixels around it, for the cascades are quick then."""
    return Image.open(sample_photo()).convert("RGB").crop((120, 30, 320, 230))


@pytest.fixture
def landmarks():
    """68 points of the photo's face."""
    return ASTRONAUT - [120, 30]


@pytest.fixture
def photo_path(photo, tmp_path_factory):
    path = tmp_path_factory.mktemp("photos") / "astronaut.png"
    photo.save(path)
    return path


@pytest.fixture
def no_face():
    """A picture in which nobody would see a face."""
    return Image.new("RGB", (200, 150), (40, 90, 160))


@pytest.fixture
def known_landmarker():
    return KnownLandmarker


@pytest.fixture
def detector(landmarks):
    """A detector that works on the photo, and on whatever has its face in the same place."""
    return FaceDetector(landmarker=KnownLandmarker(landmarks))


@pytest.fixture(scope="session", params=list(TINY_MODELS))
def model_folder(request, tmp_path_factory):
    """A saved tiny model of each method, with random weights and its image processor."""
    return _saved(request.param, tmp_path_factory)


@pytest.fixture(scope="session")
def escda_folder(tmp_path_factory):
    """A saved tiny ESCDA, with random weights and its image processor."""
    return _saved("escda", tmp_path_factory)


def _saved(name, tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(name)
    model = TINY_MODELS[name]()
    model.save_pretrained(folder)
    AUImageProcessor(**model.config.processor_options).save_pretrained(folder)
    return folder


@pytest.fixture
def command(capsys):
    """Run `actionunits`; returns exit code, stdout and stderr."""

    def run(*args):
        try:
            code = cli.main([str(arg) for arg in args])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def hub_upload():
    """The script hub_upload.py as a module."""
    return load_script(ROOT / "hub_upload.py")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub on loopback that huggingface_hub talks to."""
    with FakeHub() as hub:
        connect(monkeypatch, hub, tmp_path / "cache")
        yield hub
