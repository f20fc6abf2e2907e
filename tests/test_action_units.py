import numpy as np
import pytest

from actionunits.action_units import (
    ACTION_UNITS,
    CORPUS_AUS,
    UNKNOWN,
    ActionUnit,
    au_label,
    au_name,
    check_aus,
    id2label,
    parse_au_label,
)


def test_names_and_muscles_of_facs():
    assert ACTION_UNITS[12] == ActionUnit(12, "lip corner puller", ("zygomaticus major",))
    assert ACTION_UNITS[12].label == "AU12"
    assert ACTION_UNITS[4].muscles == ("corrugator supercilii", "depressor supercilii", "depressor glabellae")
    assert ACTION_UNITS[19].muscles == ()
    assert [au_name(label) for label in ("AU12", "AU99", "LABEL_0")] == ["lip corner puller", "", ""]


def test_table_is_consistent():
    assert list(ACTION_UNITS) == sorted(ACTION_UNITS)
    assert all(au.number == number for number, au in ACTION_UNITS.items())
    names = [au.name for au in ACTION_UNITS.values()]
    assert len(set(names)) == len(names)
    assert all(name == name.lower().strip() for name in names)


@pytest.mark.parametrize(
    ("corpus", "count"),
    [
        ("bp4d", 12),
        ("bp4d+", 12),
        ("disfa", 8),
        ("gft", 10),
        ("aff-wild2", 12),
        ("casme2", 8),
        ("synthetic", 17),
    ],
)
def test_corpora(corpus, count):
    aus = CORPUS_AUS[corpus]
    assert len(aus) == count
    assert check_aus(aus) == sorted(aus)


def test_unknown_is_no_probability():
    assert UNKNOWN == -1


def test_check_aus_returns_plain_ints_in_the_given_order():
    aus = check_aus(np.array([12, 1, 4]))
    assert aus == [12, 1, 4]
    assert all(type(au) is int for au in aus)


@pytest.mark.parametrize(
    ("aus", "message"),
    [
        ([], "empty"),
        ([1, 3], "Unknown action unit 3 .* known FACS numbers: .*43"),
        ([1, 12, 1], r"\[1\] more than once"),
        (["AU1"], "Unknown action unit 'AU1'"),
        ([True], "Unknown action unit True"),
        ([1.5], "Unknown action unit 1.5"),
        ([None], "Unknown action unit None"),
        ("12", "list of FACS numbers"),
        (12, "list of FACS numbers"),
    ],
)
def test_check_aus_refuses(aus, message):
    with pytest.raises(ValueError, match=message):
        check_aus(aus)


def test_labels_there_and_back():
    labels = id2label([12, 1, 25])
    assert labels == {0: "AU12", 1: "AU1", 2: "AU25"}
    assert [parse_au_label(label) for label in labels.values()] == [12, 1, 25]
    assert all(parse_au_label(au_label(au)) == au for au in ACTION_UNITS)


@pytest.mark.parametrize(
    "label", ["LABEL_0", "AU", "AU012", "au12", "AU12 ", "AU1\n", "AU１２", "", 12, None]
)
def test_other_labels_are_none(label):
    assert parse_au_label(label) is None
