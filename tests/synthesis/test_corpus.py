import json
import re

import numpy as np
import pytest
from datasets import load_dataset

from actionunits.synthesis.complexion import SKIN_TONES
from actionunits.synthesis.corpus import SPLITS, CorpusPlan, split_people, write_corpus
from actionunits.synthesis.photography import occlude, random_background, take_photograph, to_jpeg

PLAN = CorpusPlan(pictures=(5, 2, 2), seed=1, size=64, shard_size=3)


def rows(folder, split):
    files = sorted(str(p) for p in folder.glob(f"{split}-*.parquet"))
    return load_dataset("parquet", data_files=files, split="train", cache_dir=str(folder / ".cache"))


@pytest.fixture(scope="module")
def corpus(head_folder, photo_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(head_folder, photo_folder, folder, PLAN, processes=1)
    return folder


def test_people_of_the_splits_are_apart():
    names = [f"london/{i:03d}" for i in range(40)]
    splits = split_people(names)
    assert sorted(sum(splits.values(), [])) == names
    assert [len(splits[s]) for s in SPLITS] == [28, 6, 6]
    assert splits == split_people(names[::-1]) != split_people(names, seed=1)
    with pytest.raises(ValueError, match="2 people"):
        split_people(names[:2])


def test_shards_cover_every_picture_once():
    files = CorpusPlan(pictures=(7, 2, 1), shard_size=3).files()
    covered = {split: [i for _, s, r in files if s == split for i in r] for split in SPLITS}
    assert covered == {"train": list(range(7)), "validation": [0, 1], "test": [0]}
    names = [name for name, split, _ in files if split == "train"]
    assert names == [f"train-0000{i}-of-00003.parquet" for i in range(3)]


def test_the_corpus_is_what_the_manifest_says(corpus):
    manifest = json.loads((corpus / "manifest.json").read_text())
    scenes = []
    for split, count in zip(SPLITS, PLAN.pictures, strict=True):
        data = rows(corpus, split)
        assert len(data) == count
        assert set(data["identity"]) <= set(manifest["people"][split])
        row = data[0]
        assert set(data["skin_tone"]) <= {name for name, _ in SKIN_TONES}
        assert row["image"].size == (64, 64) and row["image"].mode == "RGB"
        assert np.asarray(row["landmarks"]).shape == (68, 2)
        threshold = manifest["occurrence_from_intensity"]
        assert [int(v >= threshold) for v in row["au_intensities"]] == row["au_occurrence"]
        assert json.loads(row["parameters"])["other"] in manifest["people"][split]
        assert (row["sex"], row["ethnicity"], row["age"]) == ("female", "white", 30)
        scenes += [json.loads(parameters)["light"]["key"] for parameters in data["parameters"]]
    assert len(np.unique(scenes, axis=0)) == sum(PLAN.pictures)  # no two pictures are lit alike
    assert (corpus / "contact_sheet.png").stat().st_size > 1000
    assert not list(corpus.glob("*.tmp")) and not list(corpus.glob(".*.part"))


def test_two_processes_and_a_resumed_run_give_the_same_pictures(corpus, head_folder, photo_folder, tmp_path):
    write_corpus(head_folder, photo_folder, tmp_path, PLAN, processes=2)
    (tmp_path / "train-00001-of-00002.parquet").unlink()
    untouched = (tmp_path / "train-00000-of-00002.parquet").stat().st_mtime_ns
    write_corpus(head_folder, photo_folder, tmp_path, PLAN, processes=1)
    assert (tmp_path / "train-00000-of-00002.parquet").stat().st_mtime_ns == untouched
    for split in SPLITS:
        one, two = rows(corpus, split), rows(tmp_path, split)
        for a, b in zip(one, two, strict=True):
            np.testing.assert_array_equal(np.asarray(a["image"]), np.asarray(b["image"]))
            assert a["au_intensities"] == b["au_intensities"] and a["parameters"] == b["parameters"]


def test_another_plan_does_not_mix_into_a_corpus(corpus, head_folder, photo_folder):
    with pytest.raises(ValueError, match="plan"):
        write_corpus(
            head_folder, photo_folder, corpus, CorpusPlan(pictures=(6, 2, 2), seed=1, size=64, shard_size=3)
        )


@pytest.mark.parametrize(
    "values", [{"pictures": (5, -1, 2)}, {"seed": -1}, {"size": 0}, {"shard_size": 0}], ids=str
)
def test_a_plan_that_nothing_can_follow_is_refused(values):
    [(name, value)] = values.items()
    with pytest.raises(ValueError, match=re.escape(f"{name}={value}")):
        CorpusPlan(**values)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_missing_head_is_named_at_once_and_nothing_written(photo_folder, tmp_path, processes):
    with pytest.raises(FileNotFoundError, match="nowhere holds neither"):
        write_corpus(tmp_path / "nowhere", photo_folder, tmp_path / "corpus", PLAN, processes)
    assert not (tmp_path / "corpus").exists()


def test_a_negative_number_of_processes_is_refused(head_folder, photo_folder, tmp_path):
    with pytest.raises(ValueError, match="processes=-1"):
        write_corpus(head_folder, photo_folder, tmp_path / "corpus", PLAN, -1)


@pytest.mark.parametrize("content", ["", '{"plan": ', "7"])
def test_a_manifest_that_is_broken_is_named(head_folder, photo_folder, tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"manifest\.json \(\d+ bytes\) does not describe a corpus"):
        write_corpus(head_folder, photo_folder, tmp_path, PLAN, 1)


def test_the_camera_keeps_shape_and_range():
    from .conftest import mean_face

    rng = np.random.default_rng(0)
    landmarks = (mean_face() * 20 + 32).astype(np.float32)
    for _ in range(60):
        background = random_background(rng)
        assert background.min() >= 0 and background.max() <= 1
        image = occlude(np.full((64, 64, 3), 0.4, np.float32), landmarks, rng)
        picture = take_photograph(image, rng)
        assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
        assert to_jpeg(picture, rng)[:2] == b"\xff\xd8"
