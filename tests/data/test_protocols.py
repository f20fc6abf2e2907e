"""Folds as data: the lists against each other, their numberings, and splits that keep people apart."""

import numpy as np
import pytest

from actionunits.action_units import CORPUS_AUS
from actionunits.data.corpora import CORPORA
from actionunits.data.protocols import (
    CROSSINGS,
    PROTOCOLS,
    SAMPLING_RATES,
    Protocol,
    SubjectSplit,
    check_subjects_apart,
    equidistant,
    get_protocol,
    hold_out,
    read_folds,
    refine,
    rows_of_tables,
    split_rows,
)


@pytest.mark.parametrize(
    ("corpus", "sizes", "women"),
    [("bp4d", [14, 14, 13], 23), ("disfa", [9, 9, 9], None), ("bp4d_plus", [35, 35, 35, 35], 82)],
)
def test_groups_have_the_published_sizes(corpus, sizes, women):
    groups = PROTOCOLS[corpus].groups
    people = [person for group in groups.values() for person in group]
    assert [len(group) for group in groups.values()] == sizes
    assert len(set(people)) == len(people) == CORPORA[corpus].published["all"].subjects
    if women:
        assert sum(person.startswith("F") for person in people) == women


@pytest.mark.parametrize("corpus", ["bp4d", "disfa"])
def test_code_bases_number_the_same_three_folds(corpus):
    protocol = PROTOCOLS[corpus]
    assert (
        protocol.split(1)
        == protocol.split("me-graphau:1")
        == protocol.split("combine_1_2")
        == protocol.split("part3")
    )
    assert protocol.split("fg-net:0").test == protocol.split(3).test == set(protocol.groups["part1"])
    for fold in (1, 2, 3):
        split = protocol.split(fold)
        assert len(split.train) + len(split.test) == CORPORA[corpus].published["all"].subjects
    for wrong in (0, 4, "part4", "jaanet:1", "nobody:1", ""):
        with pytest.raises(ValueError, match="has no fold"):
            protocol.split(wrong)


def test_a_person_on_two_sides_is_refused():
    with pytest.raises(ValueError, match="'b' is both in train and test"):
        SubjectSplit("x", frozenset("ab"), frozenset("bc"))
    with pytest.raises(ValueError, match="both in one and two"):
        Protocol("x", "x", {"one": ("a",), "two": ("a", "b")})
    with pytest.raises(ValueError, match="both in test and train"):
        check_subjects_apart(test=["a"], train=["a"])
    with pytest.raises(ValueError, match="'a' is both in train and test"):
        split_rows("gft", ["a", "a"], ["train", "test"])


def test_rows_follow_their_people():
    subjects = ["SN003", "SN001", "SN006", "SN003"]
    splits = split_rows("disfa", subjects, [""] * 4, fold=1)
    assert splits["test"].tolist() == [0, 3] and splits["train"].tolist() == [1, 2]
    with pytest.raises(ValueError, match="nobody of \\['test'\\]"):
        split_rows("disfa", ["SN001"], [""], fold=1)
    with pytest.raises(ValueError, match="official partition and no folds"):
        split_rows("gft", ["a"], ["train"], fold=1)
    with pytest.raises(ValueError, match="is split by folds: pass fold="):
        split_rows("disfa", subjects, [""] * 4)


def test_official_splits_are_those_that_have_rows(caplog):
    splits = split_rows("aff_wild2", list("abc"), ["validation", "", "train"])
    assert "1 of 3 rows name no split" in caplog.text
    assert {name: rows.tolist() for name, rows in splits.items()} == {"train": [2], "validation": [0]}


def test_folds_from_files(tmp_path):
    (tmp_path / "f.csv").write_text("subject,fold\na,1\nb,2\nc,2\n")
    (tmp_path / "f.yaml").write_text("1: [a]\n2: [b, c]\n")
    for name in ("f.csv", "f.yaml"):
        protocol = get_protocol("casme2", tmp_path / name)
        assert protocol.split(2) == SubjectSplit("2", frozenset("a"), frozenset("bc"))
    (tmp_path / "g.csv").write_text("subject,fold\na,1\na,2\n")
    with pytest.raises(ValueError, match="'a' is both"):
        read_folds("casme2", tmp_path / "g.csv")
    (tmp_path / "h.csv").write_text("person,fold\na,1\n")
    with pytest.raises(ValueError, match="columns subject and fold"):
        read_folds("casme2", tmp_path / "h.csv")
    (tmp_path / "i.csv").write_text("subject,fold\na,1\nb,1\n")
    with pytest.raises(ValueError, match="has 1 folds; at least two"):
        read_folds("casme2", tmp_path / "i.csv")
    with pytest.raises(ValueError, match="are not published"):
        get_protocol("casme2")


def test_subjects_of_yaml_folds_are_texts(tmp_path):
    (tmp_path / "f.yaml").write_text("1: [001, 1e3]\n2:\n- no\n- 010\n", encoding="utf-8-sig")
    assert read_folds("casme2", tmp_path / "f.yaml").groups == {"1": ("001", "1e3"), "2": ("no", "010")}
    for text in ("- a\n- b\n", "1: [a]\n2:\n", "1: a\n2: b\n", "a"):
        (tmp_path / "f.yaml").write_text(text)
        with pytest.raises(ValueError, match="f.yaml must map each fold to a list of subjects"):
            read_folds("casme2", tmp_path / "f.yaml")


@pytest.mark.parametrize(("rate", "count"), [*zip(SAMPLING_RATES, (9666, 967, 484, 97), strict=True)])
def test_equidistant_samples_of_two_folds_of_bp4d(rate, count):
    rows = equidistant(96_660, rate)
    assert len(rows) == count and set(np.diff(rows)) == {round(1 / rate)}


@pytest.mark.parametrize("rate", [0.9, 0.7, 0.6, 0.4, 0.3, 0.07])
def test_equidistant_samples_have_their_share_and_even_gaps(rate):
    rows = equidistant(1000, rate)
    assert len(rows) == round(1000 * rate) and rows[-1] < 1000
    assert set(np.diff(rows)) <= {int(1 / rate), int(1 / rate) + 1}


def test_equidistant_limits():
    assert equidistant(5, 1).tolist() == [0, 1, 2, 3, 4]
    for rate in (0, -0.1, 1.5):
        with pytest.raises(ValueError, match="must lie in"):
            equidistant(5, rate)


def test_the_same_people_are_held_out_whatever_the_order():
    people = [f"p{i}" for i in range(20)]
    held = hold_out(people, 0.15)
    assert len(held) == 3 and held == hold_out(people[::-1] * 2, 0.15)
    assert len(hold_out(["a", "b"], 0.99)) == 1
    assert len(hold_out(map(str, range(100)), 0.07)) == 7  # although 0.07 * 100 is a little more
    with pytest.raises(ValueError, match="cannot hold out"):
        hold_out(["a"], 0.5)


def test_refining_touches_training_rows_only():
    people = list("aabbccdd")
    rows = {"train": np.arange(6), "test": np.array([6, 7])}
    refined = refine(rows, people, validation=0.3, sample=0.5)
    groups = {name: {people[i] for i in indices} for name, indices in refined.items()}
    assert (
        refined["test"].tolist() == [6, 7] and len(refined["train"]) == 2 and len(refined["validation"]) == 2
    )
    check_subjects_apart(**groups)
    same = refine(rows, people)
    assert {name: indices.tolist() for name, indices in same.items()} == {
        "train": [0, 1, 2, 3, 4, 5],
        "test": [6, 7],
    }
    with pytest.raises(ValueError, match="validation split"):
        refine({**rows, "validation": np.array([0])}, people, validation=0.3)


def test_crossings_use_action_units_that_both_corpora_evaluate():
    names = {"bp4d_plus": "bp4d+"}
    for crossing in CROSSINGS.values():
        both = [CORPUS_AUS[names.get(name, name)] for name in (crossing.source, crossing.target)]
        assert crossing.aus == tuple(au for au in both[0] if au in both[1])


def test_tables_name_known_corpora():
    rows = [row for name in CORPORA for row in rows_of_tables(name)]
    assert {name for row in rows for name in row["corpora"]} <= set(CORPORA)
    assert {row["f1"] for row in rows_of_tables("gft") if row["paper"] == "ESCDA"} == {61.8, 62.7, 63.0}
