"""Preparation: aligned once, to the pixel where the paper's rule says, and safe against being killed."""

import json
import os
import signal
import subprocess
import sys
import time

import datasets
import fsspec
import numpy as np
import pytest
from PIL import Image

from actionunits.alignment import level_eyes
from actionunits.data.corpora import CORPORA
from actionunits.data.preparing import is_prepared, open_prepared, prepare_corpus, read_manifest


@pytest.fixture
def disc(tmp_path):
    CORPORA["bp4d"].write_tiny(tmp_path / "disc")
    return tmp_path / "disc"


@pytest.fixture
def prepare(disc, tmp_path):
    def prepare(output="out", **options):
        return prepare_corpus("bp4d", disc, tmp_path / output, **{"shard_rows": 10, "workers": 2, **options})

    return prepare


def test_faces_lie_where_the_alignment_puts_them(prepare, disc):
    corpus = prepare()
    faces = corpus.faces
    assert (len(faces), faces.scheme, faces.aligned_size) == (48, "ibug49", 200)
    assert faces.pictures[[0, 5]].shape == (2, 240, 240, 3) and faces.pictures[3].dtype == np.uint8
    recording = next(iter(CORPORA["bp4d"].recordings(disc, [1])))
    points = recording.landmarks([])[2441]
    alignment = level_eyes(points, size=200)
    np.testing.assert_allclose(faces.landmarks[1], alignment.transform(points) + 20, atol=1e-3)
    sample = faces[1]  # the stored alignment takes the margin off again
    np.testing.assert_allclose(
        sample["landmarks"] + sample["alignments"][:, 2], alignment.transform(points), atol=1e-3
    )
    with Image.open(recording.pictures[2441]) as photo:
        expected = np.asarray(alignment.warp(photo), float)
    got = faces.pictures[1][20:-20, 20:-20].astype(float)
    assert np.abs(got - expected).mean() < 2  # JPEG


def test_it_is_read_from_an_object_store_as_from_a_folder(prepare, tmp_path, monkeypatch):
    """fsspec's memory stands for the store."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # else no store is asked at all
    here = prepare()
    store = fsspec.filesystem("memory")
    for file in (tmp_path / "out").glob("*.*"):
        store.pipe(f"/bucket/bp4d/{file.name}", file.read_bytes())
    try:
        there = open_prepared("memory://bucket/bp4d")
        assert is_prepared("memory://bucket/bp4d") and not is_prepared("memory://bucket")
        np.testing.assert_array_equal(here.faces.pictures[[0, 7, 30]], there.faces.pictures[[0, 7, 30]])
        np.testing.assert_array_equal(here.faces.occurrence, there.faces.occurrence)
        assert list(here.faces.people) == list(there.faces.people)
    finally:
        store.rm("/bucket", recursive=True)


@pytest.mark.parametrize("name", ["out [1]", "o*t"])
def test_the_name_of_the_folder_is_no_pattern(prepare, name):
    assert len(prepare().faces) == len(prepare(output=name).faces) == 48


def test_no_folder_is_taken_for_a_chain_of_urls(prepare, tmp_path):
    """fsspec would read "out" instead of "out::2", without a word."""
    prepare()
    for use in (lambda: prepare(output="out::2"), lambda: open_prepared(tmp_path / "out::2")):
        with pytest.raises(ValueError, match="out::2 is in a folder with '::' in its name"):
            use()
    assert not (tmp_path / "out::2").exists()


def test_the_collator_takes_prepared_faces(prepare):
    from actionunits.data import AUCollator, InputGeometry

    faces = prepare().faces.with_aus([1, 12])
    batch = AUCollator([1, 12], scheme=faces.scheme, geometry=InputGeometry(200, 176, 48))(
        faces.__getitems__([0, 7])
    )
    assert batch["pixel_values"].shape == (2, 3, 48, 48)
    assert ((batch["au_centers"] > 0) & (batch["au_centers"] < 48)).all()
    assert set(batch["labels"].unique().tolist()) <= {-1.0, 0.0, 1.0}


def test_splits_follow_the_protocol(prepare):
    corpus = prepare()
    splits = corpus.splits(1)
    assert {name: sorted(set(part.people)) for name, part in splits.items()} == {
        "train": ["F001", "F003", "M001", "M002"],
        "test": ["F004", "M003"],
    }
    assert set(corpus.splits("all")) == {"train"}
    assert len(corpus.splits(1, sample=0.1)["train"]) == 4
    assert set(corpus.splits(1, validation=0.3)) == {"train", "validation", "test"}
    assert corpus.part("full") is corpus.faces
    assert set(corpus.part("test", 1).people) == {"F004", "M003"}
    sexes = {"F": "female", "M": "male"}
    assert corpus.faces.groups["sex"].tolist() == [sexes[name[0]] for name in corpus.faces.people]
    with pytest.raises(ValueError, match="no split 'validation'"):
        corpus.part("validation", 1)


def test_a_corrupt_frame_is_left_out_and_named(prepare, disc, tmp_path):
    broken = disc / "2D+3D" / "F001" / "T1" / "2442.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    corpus = prepare()
    assert len(corpus.faces) == 47 and (2442 not in corpus.frames[:4])
    assert len(corpus.faces.skipped) == 1 and "2D+3D/F001/T1/2442.jpg: " in corpus.faces.skipped[0]
    assert read_manifest(tmp_path / "out")["skipped"] == list(corpus.faces.skipped)
    assert str(tmp_path) not in corpus.faces.skipped[0]  # nobody else's business


def test_finished_shards_are_not_made_again(prepare, tmp_path, monkeypatch):
    prepare()
    files = sorted((tmp_path / "out").glob("faces-*.parquet"))
    before = [(path.name, path.read_bytes()) for path in files]
    assert len(files) == 5
    files[2].unlink()
    from actionunits.data.preparing import Aligner

    calls = []
    align = Aligner.__call__
    monkeypatch.setattr(Aligner, "__call__", lambda self, row: (calls.append(1), align(self, row))[1])
    prepare()
    assert len(calls) == 10
    assert [(path.name, path.read_bytes()) for path in files] == before


def test_a_copy_that_lacks_a_file_is_refused(prepare, tmp_path):
    prepare()
    next((tmp_path / "out").glob("faces-00001-*.parquet")).unlink()
    with pytest.raises(FileNotFoundError, match="holds 38 of 48 faces: files are missing"):
        open_prepared(tmp_path / "out")


def test_another_preparation_in_the_folder_is_refused(prepare):
    prepare()
    with pytest.raises(ValueError, match=r"other values of \['aligned_size'\]"):
        prepare(aligned_size=128)


def test_kill_9_loses_at_most_the_shard_at_hand(disc, tmp_path):
    """It dies while a shard is in work; the next run keeps the others and ends like an undisturbed one."""
    script = f"""
import sys, time
from actionunits.data.preparing import Aligner, prepare_corpus
align, slow = Aligner.__call__, int(sys.argv[1])
def wait(self, row):
    if row["subject"] == "M001" and slow: time.sleep(60)
    return align(self, row)
Aligner.__call__ = wait
prepare_corpus("bp4d", {str(disc)!r}, {str(tmp_path / "out")!r}, shard_rows=10, workers=2)
"""
    folder = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", script, "1"], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while (
        len(list(folder.glob("faces-*.parquet"))) < 2
        and time.monotonic() < deadline
        and process.poll() is None
    ):
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("faces-*.parquet")}
    assert len(kept) >= 2
    with pytest.raises(FileNotFoundError, match="no finished preparation"):
        open_prepared(folder)
    corpus = prepare_corpus("bp4d", disc, folder, shard_rows=10, workers=2)
    assert len(corpus.faces) == 48
    assert {name: (folder / name).stat().st_mtime_ns for name in kept} == kept
    undisturbed = prepare_corpus("bp4d", disc, tmp_path / "again", shard_rows=10)
    np.testing.assert_array_equal(corpus.faces.landmarks, undisturbed.faces.landmarks)
    for path in sorted(folder.glob("faces-*.parquet")):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_points_can_come_from_a_detector(tmp_path):
    """CASME II has no points; the drawn faces' own stand for what a detector finds."""
    import shutil
    from types import SimpleNamespace

    from actionunits.data.corpora import tiny

    disc = tmp_path / "casme2"
    CORPORA["casme2"].write_tiny(disc)
    shutil.rmtree(disc / "landmarks")
    with pytest.raises(ValueError, match="landmarks='detect'"):
        prepare_corpus("casme2", disc, tmp_path / "none")
    points = tiny.face_points(1, "EP02_01f", 46)

    def detector(picture):
        return [SimpleNamespace(landmarks=points, scheme="ibug68")] if picture.size == tiny.SIZE else []

    corpus = prepare_corpus("casme2", disc, tmp_path / "out", landmarks="detect", detector=detector)
    assert corpus.faces.scheme == "ibug68" and len(corpus.faces) == 6
    with pytest.raises(ValueError, match="no face was found"):
        prepare_corpus("casme2", disc, tmp_path / "nobody", landmarks="detect", detector=lambda picture: [])
    points += tiny.SIZE[0]
    with pytest.raises(ValueError, match="outside"):
        prepare_corpus("casme2", disc, tmp_path / "beside", landmarks="detect", detector=detector)


def test_a_corpus_is_not_prepared_into_its_own_folder(prepare, disc):
    for output in (disc, disc / "2D+3D"):
        with pytest.raises(ValueError, match="prepare into another one"):
            prepare(output)
    prepare(disc.with_name("disc2"))


def test_aligned_pictures_can_stay_as_they_are(tmp_path):
    CORPORA["folder"].write_tiny(tmp_path / "disc")
    corpus = prepare_corpus("folder", tmp_path / "disc", tmp_path / "out", alignment="none", aligned_size=96)
    assert corpus.faces.pictures[0].shape == (96, 96, 3)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["margin"] == 0
    assert {name: len(part) for name, part in corpus.splits().items()} == {
        "train": 16,
        "validation": 4,
        "test": 4,
    }


def test_triplets_are_not_prepared_here(tmp_path):
    with pytest.raises(ValueError, match="FEC is not prepared here"):
        prepare_corpus("fec", tmp_path, tmp_path / "out")
