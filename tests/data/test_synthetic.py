"""Reading the synthetic corpus into arrays: nothing changed, nothing decoded twice, clear errors."""

import dataclasses
import json
import os
import pickle
import shutil
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from toy_corpus import huge_header, toy_row, write_corpus

from actionunits.action_units import CORPUS_AUS
from actionunits.alignment import level_eyes
from actionunits.data import aligned_faces, check_people_apart, load_synthetic, prepare_synthetic
from actionunits.data.collator import stack_samples
from actionunits.data.corpora import CORPORA, load_corpus
from actionunits.data.synthetic import available_splits, read_manifest


def raw_rows(corpus, split):
    return [
        row for file in sorted(corpus.glob(f"{split}-*.parquet")) for row in pq.read_table(file).to_pylist()
    ]


def test_arrays_hold_what_the_files_hold(corpus, faces):
    rows = raw_rows(corpus, "train")
    assert len(faces) == len(rows) == 24
    assert faces.aus == CORPUS_AUS["synthetic"]
    for i, row in enumerate(rows):
        expected = np.asarray(Image.open(BytesIO(row["image"]["bytes"])))
        np.testing.assert_array_equal(np.asarray(faces.picture(i)), expected)
        np.testing.assert_array_equal(faces.landmarks[i], np.float32(row["landmarks"]))
        np.testing.assert_allclose(
            faces.alignments[i], level_eyes(row["landmarks"]).matrix, rtol=1e-5, atol=1e-4
        )
        assert faces.occurrence[i].tolist() == row["au_occurrence"]
        assert faces.intensities[i].tolist() == row["au_intensities"]
        assert faces.people[i] == row["identity"]
        assert faces.groups["sex"][i] == row["sex"]
        assert float(faces.groups["age"][i]) == row["age"]


def test_streaming_rows_decode_to_pictures(corpus):
    row = next(iter(load_synthetic(corpus, "validation")))
    assert row["image"].size == (64, 64)
    assert np.shape(row["landmarks"]) == (68, 2)


def test_pictures_are_decoded_once(corpus, tmp_path, monkeypatch):
    first = prepare_synthetic(corpus, "validation", tmp_path)
    assert isinstance(first.pictures, np.memmap)
    monkeypatch.setattr(aligned_faces, "_decode", lambda record: pytest.fail("decoded again"))
    again = prepare_synthetic(corpus, "validation", tmp_path)
    for name in ("pictures", "landmarks", "alignments", "occurrence", "intensities", "people"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))


def test_a_changed_corpus_or_size_is_prepared_anew(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", (8, 4, 4))
    before = prepare_synthetic(corpus, "train", tmp_path / "prepared")
    write_corpus(corpus, (10, 4, 4), seed=1)
    after = prepare_synthetic(corpus, "train", tmp_path / "prepared")
    assert (len(before), len(after)) == (8, 10)
    file, key = next(corpus.glob("train-*")), tmp_path / "prepared" / "train" / "key.json"
    written = file.stat().st_mtime_ns
    write_corpus(corpus, (12, 4, 4), seed=1)
    os.utime(file, ns=(written, written))  # as a copy that keeps the times
    assert len(prepare_synthetic(corpus, "train", tmp_path / "prepared")) == 12
    before = key.stat().st_mtime_ns
    os.utime(file)  # as other pictures of the same size
    prepare_synthetic(corpus, "train", tmp_path / "prepared")
    assert key.stat().st_mtime_ns > before
    larger = prepare_synthetic(corpus, "train", tmp_path / "prepared", aligned_size=256)
    assert larger.aligned_size == 256
    assert not np.allclose(larger.alignments[:10], after.alignments)


def test_an_interrupted_preparation_leaves_nothing_to_mistake(corpus, tmp_path, monkeypatch):
    decode, calls = aligned_faces._decode, []

    def stop(record):
        calls.append(record)
        if len(calls) > 5:
            raise KeyboardInterrupt
        return decode(record)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(aligned_faces, "_decode", stop)
        prepare_synthetic(corpus, "train", tmp_path)
    assert not (tmp_path / "train").exists()
    assert len(prepare_synthetic(corpus, "train", tmp_path)) == 24
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


def test_corrupt_pictures_are_left_out_and_named(tmp_path):
    whole = prepare_synthetic(write_corpus(tmp_path / "whole"), "train", tmp_path / "a")
    faces = prepare_synthetic(write_corpus(tmp_path / "broken", corrupt=(0, 7)), "train", tmp_path / "b")
    assert len(faces) == 22
    assert [reason.split(":")[0] for reason in faces.skipped] == [
        "picture 0 (train-0)",
        "picture 7 (train-1)",
    ]
    kept = [i for i in range(24) if i not in (0, 7)]
    np.testing.assert_array_equal(faces.landmarks, whole.landmarks[kept])
    for i, row in enumerate(kept):
        np.testing.assert_array_equal(np.asarray(faces.picture(i)), np.asarray(whole.picture(row)))


def test_a_corpus_of_corrupt_pictures_only(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", (3, 2, 2), corrupt=(0, 1, 2))
    with pytest.raises(ValueError, match="none of 3 pictures could be read; the first: picture 0"):
        prepare_synthetic(corpus, "train", tmp_path / "prepared")


def test_pictures_of_different_sizes_are_refused(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", (4, 2, 2))
    write_corpus(tmp_path / "other", (4, 2, 2), size=48)
    (corpus / "train-00000-of-00001.parquet").rename(corpus / "train-00000-of-00002.parquet")
    os.rename(tmp_path / "other" / "train-00000-of-00001.parquet", corpus / "train-00001-of-00002.parquet")
    with pytest.raises(ValueError, match="picture 4 is 48x48, the first was 64x64"):
        prepare_synthetic(corpus, "train", tmp_path / "prepared")


def test_what_is_missing_is_named(corpus, tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder; render the corpus"):
        load_synthetic(tmp_path / "nowhere", "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="'train'; it holds nothing"):
        load_synthetic(tmp_path / "empty", "train")
    with pytest.raises(FileNotFoundError, match=r"it holds \['manifest.json'"):
        load_synthetic(corpus, "dev")
    partial = write_corpus(tmp_path / "partial", (6, 2, 2), shards=2)
    (partial / "train-00000-of-00002.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="has 1 of 2 files of the split 'train'"):
        load_synthetic(partial, "train")
    shutil.copy(corpus / "train-00000-of-00002.parquet", partial)
    shutil.copy(corpus / "train-00000-of-00002.parquet", partial / "train-00000-of-00001.parquet")
    with pytest.raises(FileNotFoundError, match="two renderings of the split 'train', .*of-00001.*of-00002"):
        load_synthetic(partial, "train")
    bare = tmp_path / "bare"
    bare.mkdir()
    table = pq.read_table(next(corpus.glob("test-*.parquet"))).drop_columns(["landmarks", "age"])
    pq.write_table(table, bare / "test-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=r"lacks the columns \['age', 'landmarks'\]"):
        load_synthetic(bare, "test")


@pytest.mark.parametrize("name", ["faces [1]", "a*b", "what?", "**"])
def test_the_name_of_the_folder_is_no_pattern(tmp_path, name):
    write_corpus(tmp_path / "axb", (5, 2, 2)), write_corpus(tmp_path / "what1", (5, 2, 2))
    corpus = write_corpus(tmp_path / name, (4, 2, 2), shards=2)
    assert available_splits(corpus) == ["train", "validation", "test"]
    assert len(prepare_synthetic(corpus, "train", tmp_path / "prepared" / name)) == 4
    rows = load_corpus("synthetic", corpus, split="train", cache_dir=tmp_path / "cache")
    assert rows.num_rows == 4
    assert all(tmp_path / "cache" in Path(file["filename"]).parents for file in rows.cache_files)


@pytest.mark.parametrize("content", ["", '{"name": "op', "[1]"])
def test_a_broken_manifest_is_named(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match="manifest.json .* does not describe a corpus.*Copy it again"):
        read_manifest(tmp_path)


def test_splits_and_manifest(corpus, tmp_path):
    assert available_splits(corpus) == ["train", "validation", "test"]
    assert available_splits(tmp_path) == []
    assert read_manifest(corpus) == json.loads((corpus / "manifest.json").read_text())
    assert read_manifest(tmp_path) == {}


def test_workers_open_the_pictures_instead_of_copying_them(faces):
    sent = pickle.dumps(faces.select([3, 1, 7]))
    assert len(sent) < faces.pictures.nbytes / 10
    there = pickle.loads(sent)
    assert isinstance(there.pictures, np.memmap)
    for name, values in faces.select([3, 1, 7])[1].items():
        np.testing.assert_array_equal(there[1][name], values)
    part = dataclasses.replace(faces, pictures=faces.pictures[5:], rows=faces.rows[5:] - 5)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(part)).pictures, faces.pictures[5:])
    loader = torch.utils.data.DataLoader(
        faces, batch_size=8, num_workers=1, multiprocessing_context="spawn", collate_fn=stack_samples
    )
    np.testing.assert_array_equal(next(iter(loader))["pictures"], faces.pictures[faces.rows[:8]])


def test_choosing_action_units_and_faces(faces):
    chosen = faces.with_aus([26, 1])
    assert chosen.aus == (26, 1)
    np.testing.assert_array_equal(chosen.occurrence, faces.occurrence[:, [16, 0]])
    np.testing.assert_array_equal(chosen.intensities, faces.intensities[:, [16, 0]])
    with pytest.raises(ValueError, match=r"no labels of \['AU28'\]"):
        faces.with_aus([1, 28])
    some = faces.select(faces.groups["sex"] == "male")
    assert 0 < len(some) < len(faces) and set(some.groups["sex"]) == {"male"}
    np.testing.assert_array_equal(some[0]["pictures"], faces.pictures[1])
    assert some.select([1, 0]).people.tolist() == some.people[[1, 0]].tolist()
    named = dataclasses.replace(faces, sequences=np.arange(100, 124)).select([-1, 5])
    assert named.sequences.tolist() == [123, 105] and faces.select([5]).sequences is None
    for i, row in enumerate((23, 5)):
        assert all(torch.equal(value, faces[row][name]) for name, value in named[i].items())
    assert named[0].keys() == faces[0].keys()
    assert named.groups["age"].tolist() == faces.groups["age"][[23, 5]].tolist()


def test_occurrence_rates_leave_unknown_labels_out(faces):
    labels = np.array([[1, 0, -1], [1, -1, -1], [0, 0, -1], [0, 1, -1]], np.int8)
    rated = dataclasses.replace(faces, occurrence=labels)
    np.testing.assert_allclose(rated.occurrence_rates(), [0.5, 1 / 3, 0])


def test_a_person_in_two_splits_is_refused(faces):
    check_people_apart(
        train=faces.select(faces.people == "train-0"), test=faces.select(faces.people == "train-1")
    )
    with pytest.raises(ValueError, match=r"1 people are both in validation and test, such as 'train-1'"):
        check_people_apart(
            train=faces.select(faces.people == "train-0"),
            validation=faces.select(faces.people == "train-1"),
            test=faces.select(faces.people != "train-0"),
        )


def test_more_pictures_than_are_decoded_at_once_keep_their_labels(tmp_path):
    def record(i):
        picture = BytesIO()
        Image.new("RGB", (4, 4), (i, 0, 0)).save(picture, "PNG")
        face = {"image": picture.getvalue(), "landmarks": toy_row("train", 0, 16, 0, 1)["landmarks"]}
        return {
            **face,
            "occurrence": [i % 2],
            "intensities": None,
            "person": str(i),
            "groups": {"tens": i // 10},
        }

    records = [{"unreadable": "lost", "person": "70"} if i == 70 else record(i) for i in range(150)]
    faces = aligned_faces.prepare_faces(tmp_path / "p", records, 150, [12], "ibug68", {})
    kept = [i for i in range(150) if i != 70]
    assert faces.people.tolist() == [str(i) for i in kept] and faces.skipped == ("picture 70 (70): lost",)
    assert faces.pictures[faces.rows][:, 3, 3, 0].tolist() == kept
    assert faces.occurrence[:, 0].tolist() == [i % 2 for i in kept]
    assert faces.groups["tens"].tolist() == [str(i // 10) for i in kept]


def test_the_check_counts_pictures_and_people_of_each_split(corpus, tmp_path):
    report = CORPORA["synthetic"].check(corpus)
    people = {"train": 3, "validation": 3, "test": 3}
    pictures = {"train": 24, "validation": 8, "test": 8}
    expected = {f"pictures, {split}": count for split, count in pictures.items()}
    expected |= {f"people, {split}": count for split, count in people.items()}
    assert report.found == {**expected, "usable": 40} and report.complete
    part = shutil.copytree(corpus, tmp_path / "part")
    (part / "manifest.json").unlink()
    for file in part.glob("test-*"):
        file.unlink()
    report = CORPORA["synthetic"].check(part)
    assert report.problems == ["no split test", "no manifest.json, so its origin is unknown"]
    assert report.usable and not report.complete
    with pytest.raises(ValueError, match=r"no split 'test'; it has \['train', 'validation'\]"):
        load_corpus("synthetic", part, split="test", cache_dir=tmp_path / "cache")
    for options in ({"aus": [12]}, {"frames": "jaanet"}, {"sample": 0.5}, {"validation": 0.1}, {"fold": 1}):
        with pytest.raises(ValueError, match="out"):
            load_corpus("synthetic", part, **options)


def test_a_picture_whose_header_lies_about_its_size_is_skipped(tmp_path):
    row = toy_row("train", 0, 64, 0, 1)
    record = {
        "image": row["image"]["bytes"],
        "landmarks": row["landmarks"],
        "occurrence": row["au_occurrence"],
        "intensities": None,
        "person": "a",
        "groups": {},
    }
    records = [record | {"image": huge_header()}, record]
    prepared = aligned_faces.prepare_faces(tmp_path / "p", records, 2, CORPUS_AUS["synthetic"], "ibug68", {})
    assert len(prepared) == 1 and "exceeds limit" in prepared.skipped[0]
