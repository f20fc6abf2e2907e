"""Corpora are read from tiny discs of their real layout; what is expected is written here a second time."""

import csv
import re
import shutil
import zipfile

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from toy_corpus import huge_header

from actionunits.action_units import UNKNOWN
from actionunits.data.corpora import CORPORA, WrongCorpusError, get_corpus, load_corpus, load_crossing
from actionunits.data.corpora.base import CheckReport, Published
from actionunits.data.corpora.casme2 import read_units
from actionunits.data.corpora.checking import compare
from actionunits.data.corpora.fec import read_triplets
from actionunits.data.corpora.reading import index_pictures, read_au_table, read_frame_list, read_landmarks
from actionunits.data.corpora.xlsx import read_sheet, write_sheet

ON_DISCS = ("bp4d", "bp4d_plus", "disfa", "gft", "aff_wild2", "casme2", "fec", "ms_celeb", "folder")
WITH_AUS = ("bp4d", "bp4d_plus", "disfa", "gft", "aff_wild2", "casme2", "folder")


@pytest.fixture(scope="module")
def discs(tmp_path_factory):
    """A tiny disc of every corpus."""
    root = tmp_path_factory.mktemp("discs")
    for name in ON_DISCS:
        CORPORA[name].write_tiny(root / name)
    return root


@pytest.fixture
def load(discs, tmp_path):
    """Load a corpus with a cache of its own."""
    return lambda name, *args, **options: load_corpus(
        name, options.pop("root", discs / name), *args, cache_dir=tmp_path / "cache", **options
    )


@pytest.fixture
def own(discs, tmp_path):
    """A copy of a disc that a test may spoil."""
    return lambda name: shutil.copytree(discs / name, tmp_path / name)


@pytest.mark.parametrize("name", WITH_AUS)
def test_rows_have_the_features_of_every_corpus(load, discs, name):
    rows = load(name, split="full")
    row = rows[0]
    assert len(rows) > 3
    assert isinstance(row["image"], Image.Image)
    assert np.asarray(row["landmarks"]).shape[1:] == (2,)
    labels = np.asarray(rows["occurrence"][:])
    assert labels.shape == (len(rows), len(CORPORA[name].evaluated_aus(discs / name)))
    assert set(np.unique(labels)) <= {UNKNOWN, 0, 1}
    assert ((labels != UNKNOWN).any(axis=1)).all()


def test_the_cache_holds_paths_and_no_pictures(load, discs, tmp_path):
    rows = load("bp4d")
    arrow = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.arrow"))
    pictures = sum(path.stat().st_size for path in (discs / "bp4d" / "2D+3D").rglob("*.jpg"))
    assert rows.data.table["image"][0].as_py() == {
        "bytes": None,
        "path": str(discs / "bp4d" / "2D+3D" / "F001" / "T1" / "2440.jpg"),
    }
    assert arrow < pictures


def test_rows_of_a_relative_folder_find_their_pictures_from_anywhere(load, discs, tmp_path, monkeypatch):
    monkeypatch.chdir(discs)
    rows = load("bp4d", root="bp4d", split="full")
    monkeypatch.chdir(tmp_path)
    assert rows[0]["image"].size == load("bp4d", split="full")[0]["image"].size


def test_bp4d_labels_are_those_of_the_csv_columns_by_name(load, discs):
    rows = load("bp4d", aus=[12, 1])
    text = (discs / "bp4d" / "AUCoding" / "AU_OCC" / "M001_T2.csv").read_text().splitlines()
    header = text[0].split(",")
    expected = {
        int(line.split(",")[0]): [int(line.split(",")[header.index(au)]) for au in ("12", "1")]
        for line in text[1:]
    }
    found = {
        row["frame"]: row["occurrence"] for row in rows if (row["subject"], row["sequence"]) == ("M001", "T2")
    }
    assert found == expected and len(found) == 4
    assert {(row["subject"][0], row["sex"]) for row in rows} == {("F", "female"), ("M", "male")}


def test_codes_of_unknown_become_unknown_and_others_are_refused(load, own):
    root = own("bp4d")
    table = root / "AUCoding" / "AU_OCC" / "F001_T1.csv"
    lines = table.read_text().splitlines()
    cells = lines[1].split(",")
    cells[1], cells[2], cells[4] = "9", "999", "-1"
    table.write_text("\n".join([lines[0], ",".join(cells), *lines[2:]]))
    assert load("bp4d", root=root, aus=[1, 2, 4, 6])[0]["occurrence"][:3] == [UNKNOWN] * 3
    cells[1] = "2"
    table.write_text("\n".join([lines[0], ",".join(cells), *lines[2:]]))
    with pytest.raises(ValueError, match="F001_T1.csv holds the label 2; BP4D has 0 to 1"):
        load("bp4d", root=root)


def test_intensities_are_from_0_to_5(load, own):
    root = own("disfa")
    table = root / "ActionUnit_Labels" / "SN001" / "SN001_au1.txt"
    table.write_text("".join(f"{frame},{code}\n" for frame, code in enumerate([5, 0, 9, 1, 2, 3, 4, 5], 1)))
    rows = load("disfa", root=root, aus=[1]).filter(lambda row: row["subject"] == "SN001")
    assert sum(rows["occurrence"][:], []) == [1, 0, 0, 1, 1, 1, 1]  # frame 3 is not coded
    assert sum(rows["intensities"][:], []) == pytest.approx([1, 0, 0.2, 0.4, 0.6, 0.8, 1])
    rows = load("disfa", root=root, aus=[1, 12]).filter(lambda row: row["subject"] == "SN001")
    assert [rows[2][column][0] for column in ("occurrence", "intensities")] == [UNKNOWN, UNKNOWN]
    table.write_text(table.read_text().replace("5,2", "5,6"))
    with pytest.raises(ValueError, match="SN001 holds the label 6; DISFA has 0 to 5"):
        load("disfa", root=root)


def test_frames_that_nobody_coded_are_left_out(load, own):
    root = own("bp4d_plus")
    table = root / "AUCoding" / "AU_OCC" / "F001_T1.csv"
    width = len(table.read_text().splitlines()[0].split(","))
    with table.open("a") as file:
        file.write("9000," + ",".join(["9"] * (width - 1)) + "\n")
    assert len(load("bp4d_plus", root=root)) == len(load("bp4d_plus"))


def test_pictures_are_found_by_number_whatever_their_padding(tmp_path):
    for name in ("0001.jpg", "2.jpg", "frame_00003.png", "notes.txt", "4.JPG"):
        Image.new("L", (2, 2)).save(tmp_path / name) if "." in name and "txt" not in name else (
            tmp_path / name
        ).touch()
    assert {frame: path.name for frame, path in index_pictures(tmp_path).items()} == {
        1: "0001.jpg",
        2: "2.jpg",
        3: "frame_00003.png",
        4: "4.JPG",
    }
    (tmp_path / "01.jpg").touch()
    with pytest.raises(ValueError, match="both frame 1"):
        index_pictures(tmp_path)


@pytest.mark.parametrize("first", [0, 1])
def test_disfa_frames_agree_however_the_pictures_are_counted(load, own, first):
    root = own("disfa")
    folder = root / "Frames" / "SN001"
    pictures = sorted(folder.iterdir())
    for number, path in enumerate(pictures, start=first):
        path.rename(folder / f"_{number}.jpg")
    for path in list(folder.iterdir()):
        path.rename(folder / path.name[1:])
    row = load("disfa", root=root, split="full").filter(
        lambda row: (row["subject"], row["frame"]) == ("SN001", 3)
    )[0]
    assert row["image"].filename.endswith(f"SN001/{3 + first - 1}.jpg")
    lines = (root / "ActionUnit_Labels" / "SN001" / "SN001_au12.txt").read_text().splitlines()
    intensity = int(lines[2].split(",")[1])
    column = CORPORA["disfa"].aus.index(12)
    assert row["occurrence"][column] == int(intensity >= 2)
    assert row["intensities"][column] == pytest.approx(intensity / 5)


def test_disfa_threshold_of_occurrence_is_an_option(load):
    rates = [np.mean(load("disfa", min_intensity=t)["occurrence"][:]) for t in (1, 2, 4)]
    intensities = np.asarray(load("disfa")["intensities"][:])
    assert rates == pytest.approx([np.mean(intensities >= t / 5 - 1e-6) for t in (1, 2, 4)])
    assert rates[0] > rates[1] > rates[2]


def test_points_in_matlab_files_count_from_one(load, own):
    root = own("disfa")
    points = np.arange(132, dtype=float).reshape(66, 2)
    savemat(str(root / "Landmark_Points" / "SN001" / "tmp_frame_lm" / "SN001_0000_lm.mat"), {"pts": points})
    row = load("disfa", root=root)[0]
    np.testing.assert_allclose(row["landmarks"], points - 1)
    assert row["frame"] == 1


def test_disfa_frame_without_points_takes_its_known_substitute(own, monkeypatch):
    from actionunits.data.corpora import disfa

    root = own("disfa")
    (root / "Landmark_Points" / "SN003" / "tmp_frame_lm" / "SN003_0004_lm.mat").unlink()
    monkeypatch.setattr(disfa, "MISSING_POINTS", {("SN003", 5): 4, ("SN003", 7): 6, ("SN004", 2): 3})
    points = {r.subject: r.landmarks([]) for r in CORPORA["disfa"].recordings(root, [1])}["SN003"]
    np.testing.assert_array_equal(points[5], points[4])
    assert (points[7] != points[6]).any(), "a copy with these points keeps them"
    assert disfa.MISSING_POINTS != {}


def test_disfa_files_of_a_subject_label_the_same_frames(own, load):
    root = own("disfa")
    last = root / "ActionUnit_Labels" / "SN001" / "SN001_au26.txt"
    lines = last.read_text().splitlines()
    last.write_text("\n".join([*lines[:-1], f"9{lines[-1][1:]}"]))
    with pytest.raises(ValueError, match=r"SN001_au26\.txt labels other frames than the files before it"):
        load("disfa", root=root)
    last.unlink()
    with pytest.raises(
        ValueError, match=r"SN001_au26\.txt is missing; DISFA codes the action units \[1, 2, 4"
    ):
        load("disfa", root=root)


def test_official_partitions_are_read_from_the_disc(load, own, caplog):
    gft = load("gft")
    assert {k: sorted(set(v["subject"])) for k, v in gft.items()} == {
        "train": ["001A", "001B", "002C"],
        "test": ["003A", "004B"],
    }
    assert set(load("aff_wild2")) == {"train", "validation"}
    root = own("gft")
    for path in list((root / "AUs").glob("*/*.csv")):
        path.rename(root / "AUs" / path.name)
    (root / "split.csv").write_text("subject,split\n001A,test\n001B,train\n")
    assert {k: sorted(set(v["subject"])) for k, v in load("gft", root=root).items()} == {
        "train": ["001B"],
        "test": ["001A"],
    }
    assert "does not list ['002C', '003A', '004B']" in caplog.text
    (root / "split.csv").write_text("Subject, Split\n001A , Train\n001B,test\n")
    assert set(load("gft", root=root)["train"]["subject"]) == {"001A"}
    (root / "split.csv").write_text("subject,split\n001A,train\n001B,test\n001A,test\n")
    with pytest.raises(ValueError, match="'001A' both in train and in test"):
        load("gft", root=root)
    (root / "split.csv").write_text("person,split\n001A,train\n")
    with pytest.raises(ValueError, match="subject and split are needed"):
        load("gft", root=root)


def test_aff_wild2_counts_lines_and_leaves_out_faces_that_were_not_found(load, caplog):
    rows = load("aff_wild2", split="train")
    frames = sorted(row["frame"] for row in rows if row["subject"] == "video2")
    assert frames == [1, 2, 3, 4, 6, 7]  # line 5 is all -1, frame 8 has no picture
    assert "aff_wild2: left out 3 labelled frames without a picture" in caplog.text  # one a video


def test_casme2_samples_are_apex_frames(load):
    rows = {row["sequence"]: row for row in load("casme2")}
    assert rows["EP02_01f"]["frame"] == 46 and rows["EP02_01f"]["subject"] == "sub01"
    assert rows["EP07_04"]["frame"] == 61  # "/": halfway between onset 60 and offset 62


def test_casme2_reads_the_newest_sheet_and_no_empty_rows(own, load):
    root = own("casme2")
    (root / "CASME2-coding-20130101.csv").write_text("no sheet")
    header = "Subject,Filename,OnsetFrame,ApexFrame,OffsetFrame,Action Units"
    (root / "CASME2-coding-20200101.csv").write_text(f"{header}\n1,EP02_01f,45,,47,4+R12\n,,,,,\n1,,,,,\n")
    rows = load("casme2", root=root, aus=[4, 7, 12])
    assert (rows["frame"][:], rows["occurrence"][:]) == ([46], [[1, 0, 1]])


@pytest.mark.parametrize(
    ("cell", "codes"),
    [
        ("4+7", [0, 0, 1, 1, 0, 0]),
        ("R12+L14", [0, 0, 0, 0, 1, 1]),
        ("12A+ AU1", [1, 0, 0, 0, 1, 0]),
        ("4?", [0, 0, UNKNOWN, 0, 0, 0]),
        ("4 or 7+2", [0, 1, UNKNOWN, UNKNOWN, 0, 0]),
        ("L12?+R12", [0, 0, 0, 0, 1, 0]),
        ("L12+R12?", [0, 0, 0, 0, 1, 0]),  # one side is certain
        ("25", [0, 0, 0, 0, 0, 0]),
        ("?", [UNKNOWN] * 6),
        ("  ", [UNKNOWN] * 6),
    ],
)
def test_casme2_cells_of_action_units(cell, codes):
    assert read_units(cell, [1, 2, 4, 7, 12, 14]).tolist() == codes


def test_sheets_round_trip(tmp_path):
    write_sheet(tmp_path / "a.xlsx", [["a", "", "b & c"], [1, "", "<x>"], ["", 2.5, ""]])
    assert list(read_sheet(tmp_path / "a.xlsx")) == [{"a": "1", "b & c": "<x>"}, {"a": "", "b & c": ""}]
    (tmp_path / "b.xlsx").write_text("no zip")
    with pytest.raises(ValueError, match="is no .xlsx file"):
        list(read_sheet(tmp_path / "b.xlsx"))
    main = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
    with zipfile.ZipFile(tmp_path / "c.xlsx", "w") as archive:  # a cell with the fifth text, of which none is
        cell = '<c r="A1" t="s"><v>4</v></c>'
        sheet = f"<worksheet {main}><sheetData><row>{cell}</row></sheetData></worksheet>"
        archive.writestr("xl/worksheets/sheet1.xml", sheet)
    with pytest.raises(ValueError, match=r"c\.xlsx is no .xlsx file"):
        list(read_sheet(tmp_path / "c.xlsx"))


def test_a_sheet_as_excel_writes_it(tmp_path):
    """Texts are shared and may change their font midway; empty cells and rows are not written."""
    main = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
    texts = ["<t>Subject</t>", "<r><t>Action </t></r><r><t>Units</t></r>", "<t>4+L10</t>"]
    cells = [
        '<c r="A1" t="s"><v>0</v></c><c r="AB1" t="s"><v>1</v></c>',
        '<c r="A2"><v>7</v></c><c r="B2"/><c r="AB2" t="s"><v>2</v></c>',
        '<c r="A4" t="str"><f>A2+1</f><v>8</v></c>',
    ]
    rows = "".join(f"<row>{row}</row>" for row in cells)
    with zipfile.ZipFile(tmp_path / "a.xlsx", "w") as archive:
        shared = "".join(f"<si>{text}</si>" for text in texts)
        archive.writestr("xl/sharedStrings.xml", f"<sst {main}>{shared}</sst>")
        archive.writestr("xl/worksheets/sheet2.xml", f"<worksheet {main}/>")
        archive.writestr(
            "xl/worksheets/sheet1.xml", f"<worksheet {main}><sheetData>{rows}</sheetData></worksheet>"
        )
    assert list(read_sheet(tmp_path / "a.xlsx")) == [
        {"Subject": "7", "Action Units": "4+L10"},
        {"Subject": "8", "Action Units": ""},
    ]


def test_au_columns_are_known_by_many_names(tmp_path):
    (tmp_path / "a.csv").write_text("frame,AU01,AU2_c,12\n7,1,0,9\n\n")
    frames, codes = read_au_table(tmp_path / "a.csv", [12, 1, 2])
    assert frames.tolist() == [7] and codes.tolist() == [[9, 1, 0]]
    with pytest.raises(ValueError, match=r"no column of the action units \[4\]"):
        read_au_table(tmp_path / "a.csv", [4])
    (tmp_path / "a.csv").write_text("frame,AU12_c,AU12_r,AU1\n7,1,3,0\n")  # occurrence and intensity
    assert read_au_table(tmp_path / "a.csv", [1])[1].tolist() == [[0]]
    with pytest.raises(ValueError, match=r"several columns of the action units \[12\]"):
        read_au_table(tmp_path / "a.csv", [1, 12])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("7,0.9", "'0.9' is not a whole number"),
        ("7,inf", "'inf' is not a whole number"),
        ("7,1\n8,0\n7,0", "labels frame 7 more than once"),
    ],
)
def test_labels_that_say_two_things_or_none_are_refused(tmp_path, lines, message):
    (tmp_path / "a.csv").write_text(f"frame,AU1\n{lines}\n")
    with pytest.raises(ValueError, match=message):
        read_au_table(tmp_path / "a.csv", [1])


def test_an_empty_line_moves_no_label_to_another_frame(tmp_path):
    (tmp_path / "a.csv").write_text("AU1,AU2\n1,0\n\n0,1\n")
    with pytest.raises(ValueError, match="missing or non-integer cell"):
        read_au_table(tmp_path / "a.csv", [1, 2], frame_column=False)
    (tmp_path / "a.csv").write_text("AU1,AU2\n1,0\n0,1\n\n \n")
    frames, codes = read_au_table(tmp_path / "a.csv", [1, 2], frame_column=False)
    assert frames.tolist() == [1, 2] and codes.tolist() == [[1, 0], [0, 1]]


def test_frame_lists_are_read_with_their_line_ends(tmp_path):
    (tmp_path / "list.txt").write_bytes(b"F007/T1/0643.jpg\r\nSN001/0.png\r\n")
    assert list(read_frame_list(tmp_path / "list.txt")) == [("F007", "T1", 643), ("SN001", "", 0)]
    (tmp_path / "list.txt").write_text("\ufeffBP4D/F007/T2/643.jpg 1 0 1\n\nM001\\T8\\img_7.png\n", "utf-8")
    assert list(read_frame_list(tmp_path / "list.txt")) == [("F007", "T2", 643), ("M001", "T8", 7)]
    for line in ("0643.jpg", "F007/T1/frame.jpg"):
        (tmp_path / "list.txt").write_text(f"F007/T1/0643.jpg\n{line}\n")
        with pytest.raises(ValueError, match=rf"list\.txt: '{line}' is no SUBJECT"):
            list(read_frame_list(tmp_path / "list.txt"))


def test_a_frame_list_chooses_the_frames(load, own):
    for name, lines, expected in (
        ("bp4d", "F001/T1/2440.jpg\r\nF003/T2/02443.jpg\r\n", [("F001", 2440), ("F003", 2443)]),
        ("disfa", "SN001/0.png\r\nSN006/7.png\r\n", [("SN001", 1), ("SN006", 8)]),
    ):
        root = own(name)
        with pytest.raises(FileNotFoundError, match="frame list 'jaanet'"):
            load(name, root=root, frames="jaanet")
        (root / "lists").mkdir()
        (root / "lists" / f"{name.upper()}_part1_path.txt").write_text(lines)
        rows = load(name, root=root, frames="jaanet")
        assert [(row["subject"], row["frame"]) for row in rows] == expected
        check = CORPORA[name].check(root)
        assert check.published["jaanet"]["found_frames"] == 2 and "jaanet" in check.has


def spoil(table, old, new, count=-1):
    text = table.read_text()
    assert old in text
    table.write_text(text.replace(old, new, count))


@pytest.mark.parametrize("names", ["AU01,au12", "AU1, AU12", "AU_01_c,AU12_c"])
def test_label_columns_may_be_written_differently(load, own, names):
    root = own("folder")
    before = load("folder", root=root, split="full")["occurrence"][:]
    spoil(root / "labels.csv", "AU1,AU12", names)
    assert CORPORA["folder"].evaluated_aus(root) == (1, 12)
    assert load("folder", root=root, split="full")["occurrence"][:] == before
    assert CORPORA["folder"].check(root).found["labelled frames"] == 24


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("AU1,AU12", "AU1,AU1", "has a column 'AU1' that is no label of an action unit of its own"),
        ("AU1,AU12", "AU1,AU12_r", "has a column 'AU12_r'"),
        ("AU1,AU12", "AU1,AU99", r"labels\.csv: Unknown action unit 99"),
        ("AU1,AU12", "one,twelve", "has no column of an action unit"),
        ("person-0,train", "person-0,Train", r"labels\.csv, row 2: the split 'Train' is none of train, val"),
        ("person-0,train,0", "person-0,train,yes", r"labels\.csv, row 2: could not convert.*'yes'"),
        ("person-0,train,0", "person-0,train", r"labels\.csv, row 2: it has fewer or more cells"),
        ("person-0,train,0", "person-0,train,0,0", r"labels\.csv, row 2: it has fewer or more cells"),
        ("person-0,train,0", ",train,0", r"labels\.csv, row 2: it names no subject"),
        (
            "pictures/0-1.jpg",
            "pictures/0-0.jpg",
            r"row 3: it labels pictures/0-0\.jpg of person-0 again, as row 2",
        ),
        (
            "image,subject,split",
            "image;subject;split",
            r"lacks the columns .*; it has \['image;subject;split'",
        ),
        ("y5,x6", "y5,x60", r"labels\.csv, row 2: it lacks x6 or y6 and has later points"),
    ],
)
def test_what_cannot_be_read_of_an_own_table_is_named(load, own, old, new, message):
    root = own("folder")
    spoil(root / "labels.csv", old, new, 1)
    with pytest.raises(ValueError, match=message):
        load("folder", root=root)
    with pytest.raises(ValueError, match=message):
        CORPORA["folder"].check(root)


def test_an_own_table_may_name_points_and_sequences_in_any_order(load, own):
    root = own("folder")
    rows = [dict(row) for row in csv.DictReader((root / "labels.csv").open())]
    for number, row in enumerate(rows):
        row["sequence"] = f"clip {number // 2}"
    names = sorted(rows[0], reverse=True)  # y9, y8, ..., x9, ..., subject, ...
    with (root / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([names, *([row[name] for name in names] for row in rows)])
    found = load("folder", root=root, split="full")
    assert found["sequence"][:] == [row["sequence"] for row in rows]
    expected = [[[float(row[f"{axis}{i}"]) for axis in "xy"] for i in range(68)] for row in rows]
    np.testing.assert_allclose(found["landmarks"][:], expected, rtol=1e-6)
    assert [label for label, _ in found["occurrence"][:]] == [int(row["AU12"] or UNKNOWN) for row in rows]


def test_frames_of_an_own_table_are_whole_numbers(load, own):
    root = own("folder")
    header, *rows = (root / "labels.csv").read_text().splitlines()

    def numbered(*frames):
        lines = [f"frame,{header}", *(f"{frame},{row}" for frame, row in zip(frames, rows, strict=False))]
        (root / "labels.csv").write_text("\n".join(lines))
        return load("folder", root=root, split="full")["frame"][:]

    assert numbered("7.0", " 8", "") == [7, 8, 3]  # as pandas, people, and nobody write them
    for frame, message in (("0.5", "'0.5' is not a whole number"), (2**31, "more than 32 bits")):
        with pytest.raises(
            ValueError, match=rf"labels\.csv, row 2: the frame {message}|{frame} has {message}"
        ):
            numbered(frame)


def test_empty_lines_of_an_own_table_are_nobody(load, own):
    root = own("folder")
    table = root / "labels.csv"
    commas = "," * table.read_text().splitlines()[0].count(",")
    table.write_text(f"{table.read_text()}{commas}\n{commas}\n")  # as spreadsheets leave them
    assert len(load("folder", root=root, split="full")) == 24


def test_an_own_table_needs_rows_and_a_known_encoding(load, own):
    root = own("folder")
    header, *rows = (root / "labels.csv").read_text().splitlines()
    (root / "labels.csv").write_text(header + "\n")
    with pytest.raises(ValueError, match="a header and no rows"):
        load("folder", root=root)
    (root / "labels.csv").write_bytes("\n".join([header, *rows]).replace("person-0", "Zoë").encode("latin-1"))
    with pytest.raises(ValueError, match=r"labels\.csv is not a text file"):
        load("folder", root=root)


def test_rows_without_a_split_are_counted(load, own, caplog):
    root = own("folder")
    spoil(root / "labels.csv", "person-5,test", "person-5,")
    assert {name: len(rows) for name, rows in load("folder", root=root).items()} == {
        "train": 16,
        "validation": 4,
    }
    assert "folder: 4 of 24 rows name no split" in caplog.text


def test_a_changed_label_file_is_read_anew(load, own):
    root = own("folder")
    before = load("folder", root=root, split="full")
    table = root / "labels.csv"
    table.write_text("\n".join(table.read_text().splitlines()[:-1]))
    assert len(load("folder", root=root, split="full")) == len(before) - 1


def test_another_version_of_the_package_reads_anew(load, monkeypatch):
    """Rows that an older one misread do not stay in the cache."""
    reader, before = type(CORPORA["fec"]), len(load("fec", split="full"))
    rows = reader.rows
    monkeypatch.setattr(reader, "rows", lambda *args: list(rows(*args))[1:])
    assert len(load("fec", split="full")) == before
    monkeypatch.setattr("actionunits.data.corpora.builder.__version__", "next")
    assert len(load("fec", split="full")) == before - 1


def test_pictures_that_come_later_are_seen(load, own):
    root = own("disfa")
    (root / "Frames" / "SN001").rename(root / "SN001-later")
    assert len(load("disfa", root=root)) == 40
    (root / "SN001-later").rename(root / "Frames" / "SN001")
    assert len(load("disfa", root=root)) == 48
    root = own("fec")
    (root / "images" / "train0_1_b.jpg").rename(root / "later.jpg")
    assert len(load("fec", root=root, split="train")) == 5
    (root / "later.jpg").rename(root / "images" / "train0_1_b.jpg")
    assert len(load("fec", root=root, split="train")) == 6
    root = own("ms_celeb")
    faces = root / "FaceImageCroppedWithAlignment"
    faces.rename(root / "not-yet")
    assert len(load("ms_celeb", root=root)) == 24
    (root / "not-yet").rename(faces)
    assert load("ms_celeb", root=root)[0]["image"].size == (112, 112)


def test_pictures_behind_links_lists_and_corrected_points_are_seen(load, own, tmp_path):
    root = own("disfa")
    elsewhere, linked = tmp_path / "elsewhere", root / "Frames"
    linked.rename(elsewhere)
    linked.symlink_to(elsewhere)
    (elsewhere / "circle").symlink_to(elsewhere)
    (elsewhere / "SN001").rename(tmp_path / "SN001-later")
    assert len(load("disfa", root=root)) == 40
    (tmp_path / "SN001-later").rename(elsewhere / "SN001")
    assert len(load("disfa", root=root)) == 48

    frames = tmp_path / "list.txt"
    frames.write_text("F001/T1/2440.jpg\nF003/T2/2443.jpg\n")
    assert len(load("bp4d", frames=str(frames), split="full")) == 2
    frames.write_text("F001/T1/2440.jpg\n")
    assert len(load("bp4d", frames=str(frames), split="full")) == 1

    root = own("gft")
    before = load("gft", root=root, split="full")[0]["landmarks"][0][0]
    points = root / "landmarks" / "001A.csv"
    rows = points.read_text().splitlines()
    rows = [rows[0], *(",".join([c[0], "41.7", *c[2:]]) for c in (row.split(",") for row in rows[1:]))]
    points.write_text("\n".join([*rows, "", ""]))  # an empty line at the end costs nothing
    after = load("gft", root=root, split="full")[0]["landmarks"][0][0]
    assert after == pytest.approx(41.7) != before


def test_a_disc_without_its_pictures_says_so(load, own):
    root = own("disfa")
    shutil.rmtree(root / "Frames")
    with pytest.raises(ValueError, match="of the frames 'all', 48 are labelled and lack a picture"):
        load("disfa", root=root)


def test_pictures_and_points_of_other_systems_are_none(own, tmp_path):
    for name in ("1.jpg", "._1.jpg"):
        (tmp_path / name).touch()
    assert index_pictures(tmp_path) == {1: tmp_path / "1.jpg"}
    for name, file in (
        ("disfa", "Landmark_Points/SN001/tmp_frame_lm/._SN001_0003_lm.mat"),
        ("fec", "images/._train0_0_b.jpg"),
    ):
        root = own(name)
        before = CORPORA[name].check(root)
        (root / file).write_bytes(b"\x00\x05\x16\x07Mac OS X")
        assert CORPORA[name].check(root) == before


def test_fec_rows_are_triplets(load):
    splits = load("fec")
    row = splits["train"][1]
    assert {name: len(part) for name, part in splits.items()} == {"train": 6, "test": 2}
    assert [image.filename.rpartition("/")[2] for image in row["images"]] == [
        f"train1_{j}_b.jpg" for j in range(3)
    ]
    assert row["boxes"][0] == pytest.approx([0.1, 0.05, 0.9, 0.95])
    assert (row["choice"], row["votes"], row["type"]) == (2, [2, 2, 1], "TWO_CLASS_TRIPLET")
    with pytest.raises(ValueError, match="fec names no subjects, so none can be held out"):
        load("fec", validation=0.5)


def test_ms_celeb_rows_are_those_of_the_list(load):
    rows = load("ms_celeb")
    assert len(rows) == 24 and sorted(set(rows["label"][:])) == [0, 1, 2, 3]
    assert (rows[7]["subject"], rows[7]["label"]) == ("m.011abc", 1)


@pytest.mark.parametrize(
    ("votes", "choice"),
    [([3, 3, 3], 3), ([2, 1, 2, 2, 2, 3], 2), ([1, 1, 1, 2, 2, 3], 0), ([1, 2, 3], 0), ([2], 2)],
)
def test_fec_needs_two_thirds_of_the_raters(tmp_path, votes, choice):
    faces = [f"http://farm5.staticflickr.com/4117/{n}_o.jpg?size=big,0.3,0.7,0.1,0.6" for n in "abc"]
    raters = ",".join(f"rater{i},{vote}" for i, vote in enumerate(votes))
    table = tmp_path / "faceexp-comparison-data-test-public.csv"
    padded = f"{raters},,"  # shorter rows end in empty cells once a spreadsheet has saved them
    table.write_text(f"{','.join(faces)},ONE_CLASS_TRIPLET,{padded}\n")
    (row,) = read_triplets(table, tmp_path)
    assert (row["choice"], row["votes"], row["split"]) == (choice, votes, "test")
    assert row["images"] == [str(tmp_path / f"{n}_o.jpg") for n in "abc"]
    assert row["boxes"] == [[0.3, 0.1, 0.7, 0.6]] * 3


@pytest.mark.parametrize(
    ("old", "new"), [(",C,1", ",C,4"), ("0.05,0.95,ONE", "0.05,low,ONE"), (",A,1,B,1,C,1", "")]
)
def test_rows_that_are_no_triplets_are_named(own, old, new):
    root = own("fec")
    spoil(root / "faceexp-comparison-data-train-public.csv", old, new, 1)
    with pytest.raises(ValueError, match=r"train-public\.csv, row 1, is not a triplet"):
        CORPORA["fec"].check(root)


def test_the_check_counts_triplets_that_lack_a_picture(own):
    root = own("fec")
    (root / "images" / "test1_2_b.jpg").unlink()
    report = CORPORA["fec"].check(root)
    assert {name: report.found[name] for name in ("triplets, train", "triplets, test", "pictures")} == {
        "triplets, train": 6,
        "triplets, test": 2,
        "pictures": 23,
    }
    assert report.found["triplets with three pictures"] == report.found["usable"] == 7
    assert len(report.problems) == 1 and "1 of 8 triplets lack a picture" in report.problems[0]


@pytest.mark.parametrize("line", ["m.010abc/1-FaceId-0.jpg", "m.010abc/1-FaceId-0.jpg one", "7"])
def test_lines_without_person_or_picture_are_refused(own, line):
    root = own("ms_celeb")
    table = root / "MS-Celeb-1M_clean_list.txt"
    table.write_text(f"m.010abc/0-FaceId-0.jpg 0\n\n{line}\n")
    with pytest.raises(ValueError, match=rf"clean_list\.txt, line 3: '{line}' is no 'PATH NUMBER'"):
        CORPORA["ms_celeb"].check(root)


def test_folds_validation_people_and_samples(load):
    splits = load("bp4d", fold=1, validation=0.3, sample=0.1)
    people = {name: set(part["subject"]) for name, part in splits.items()}
    assert people["test"] == {"F004", "M003"}
    assert not people["train"] & people["validation"] and people["train"] | people["validation"] == {
        "F001",
        "M001",
        "F003",
        "M002",
    }
    assert len(splits["train"]) == 2  # every tenth of 16
    assert set(load("bp4d", fold="jaanet:combine_1_3", split="test")["subject"]) == {"F003", "M002"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "train"}, "pass fold="),
        ({"fold": 4}, "has no fold 4"),
        ({"fold": 1, "split": "validation"}, "no split 'validation'"),
        ({"aus": [46]}, "no column of the action units"),
        ({"sample": 0.5}, "shares of the training rows; give a fold"),
        ({"split": "full", "validation": 0.2}, "shares of the training rows; give a fold"),
        ({"min_intensity": 0}, "min_intensity=0 must lie between 1 and 5"),
    ],
)
def test_what_does_not_exist_is_named(load, options, message):
    with pytest.raises(ValueError, match=message):
        load("bp4d", **options)


def test_other_people_than_the_lists_have_are_refused(load, own):
    root = own("bp4d")
    labels = root / "AUCoding" / "AU_OCC"
    shutil.copy(labels / "F001_T1.csv", labels / "F099_T1.csv")
    shutil.copytree(root / "2D+3D" / "F001", root / "2D+3D" / "F099")
    with pytest.raises(ValueError, match=r"does not list 1 subjects: \['F099'\]"):
        load("bp4d", fold=1, root=root)


def test_casme2_folds_come_from_the_user(load, tmp_path):
    with pytest.raises(ValueError, match="are not published.*folds_file"):
        load("casme2", fold=1)
    folds = tmp_path / "folds.csv"
    folds.write_text("subject,fold\n" + "".join(f"sub{i:02d},{1 + i % 2}\n" for i in range(1, 5)))
    assert set(load("casme2", fold=1, folds_file=folds, split="test")["subject"]) == {"sub02", "sub04"}
    assert (
        "folds-file"
        in CORPORA["casme2"].check(load("casme2")[0]["image"].filename.split("/CASME2")[0], folds).has
    )


def test_crossings_share_their_action_units(discs, tmp_path):
    options = {"cache_dir": tmp_path / "cache"}
    crossed = load_crossing("bp4d->disfa", discs / "bp4d", discs / "disfa", fold=2, **options)
    assert np.asarray(crossed["train"]["occurrence"][:]).shape[1] == 5
    assert "F003" not in crossed["train"]["subject"][:] and len(crossed["test"]) == 48
    gft = load_crossing("gft->bp4d", discs / "gft", discs / "bp4d", fold=2, **options)
    assert set(gft["test"]["subject"]) == {"F003", "M002"} and set(gft["train"]["subject"]) == {
        "001A",
        "001B",
        "002C",
    }
    whole = load_crossing("bp4d->bp4d_plus", discs / "bp4d", discs / "bp4d_plus", **options)
    assert len(whole["train"]) == len(whole["test"]) == 48
    thin = load_crossing("bp4d->bp4d_plus", discs / "bp4d", discs / "bp4d_plus", sample=0.5, **options)
    assert (len(thin["train"]), len(thin["test"])) == (24, 48)
    with pytest.raises(ValueError, match="needs fold="):
        load_crossing("bp4d->gft", discs / "bp4d", discs / "gft", **options)


@pytest.mark.parametrize("name", ON_DISCS)
def test_a_tiny_disc_passes_the_check_and_no_other_does(discs, name):
    report = get_corpus(name).check(discs / name)
    assert report.usable and report.complete == (name == "folder")
    for other in ON_DISCS:
        if {name, other} not in ({name}, {"bp4d", "bp4d_plus"}):
            with pytest.raises(WrongCorpusError, match=f"corpus layout {name}"):
                get_corpus(name).check(discs / other)


def test_the_check_counts_what_is_missing_and_broken(own):
    root = own("bp4d")
    (root / "2D+3D" / "F001" / "T1" / "2440.jpg").unlink()
    broken = root / "2D+3D" / "M001" / "T1" / "2442.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    shutil.rmtree(root / "2DFeatures")
    report = CORPORA["bp4d"].check(root)
    assert report.found["labelled frames"] == 48 and report.found["frames with a picture"] == 47
    assert "1 of 48 labelled frames have no picture" in report.problems
    assert "47 of 47 frames with a picture have no landmarks" in report.problems
    assert any(str(broken) in problem for problem in report.problems)
    runnable = {(row["paper"], row["method"]): row["runnable"] for row in report.rows}
    assert runnable["AUFormer", "AUFormer"] and not runnable["ESCDA", "LSC"]


def test_the_check_names_points_of_other_pictures(own):
    root = own("gft")
    table = root / "landmarks" / "002C.csv"
    header, *lines = table.read_text().splitlines()
    moved = [",".join([cells[0], *(f"{float(x) + 500}" for x in cells[1:])]) for cells in csv.reader(lines)]
    table.write_text("\n".join([header, *moved]))
    problems = CORPORA["gft"].check(root).problems
    assert "002C/00002.jpg: 49 of 49 landmarks lie outside the 120 x 96 picture" in problems[0]


def test_partitions_and_folds_need_people_in_every_part(own):
    root = own("gft")
    assert "split" in CORPORA["gft"].check(root).has
    for subject in ("003A", "004B"):  # all test people
        shutil.rmtree(root / "Frames" / subject)
    assert "split" not in CORPORA["gft"].check(root).has
    root = own("bp4d")
    shutil.rmtree(root / "2D+3D" / "F004")
    assert "folds" in CORPORA["bp4d"].check(root).has
    shutil.rmtree(root / "2D+3D" / "M003")  # the other one of the third part
    report = CORPORA["bp4d"].check(root)
    assert "folds" not in report.has and report.usable and report.found["subjects"] == 6
    rows = [row for row in report.rows if "folds" in row["needs"]]
    assert rows and all("subjects in every fold" in row["lacks"] and not row["runnable"] for row in rows)


def test_the_check_knows_a_complete_disc(own, monkeypatch):
    corpus, root = CORPORA["disfa"], own("disfa")
    assert not corpus.check(root).complete
    monkeypatch.setattr(type(corpus), "published", {"all": Published(6, 48, "this test")})
    assert corpus.check(root).complete


@pytest.mark.parametrize(
    ("people", "frames", "about", "complete"),
    [
        (5, 1000, False, True),
        (5, 999, False, False),
        (5, 1001, False, False),
        (4, 1000, False, False),
        (5, 980, True, True),
        (5, 979, True, False),
        (5, None, True, False),
    ],
)
def test_complete_is_what_was_published(people, frames, about, complete):
    counts = {"all": compare(Published(5, 1000, "a paper", about), people, frames)}
    assert CheckReport("x", ".", {"usable": 1}, counts).complete is complete
    lists = counts | {"list": compare(Published(5, 900, "another"), 5, 900)}
    assert CheckReport("x", ".", {"usable": 1}, lists).complete, "one of the lists suffices"
    assert not CheckReport("x", ".", {"usable": 1}, lists, ["a broken picture"]).complete
    assert not CheckReport("x", ".", {"usable": 0}, lists).complete


def test_every_corpus_says_what_it_is():
    for corpus in CORPORA.values():
        assert corpus.layout and corpus.traps
        assert corpus.name in ("folder", "synthetic") or (corpus.citation.startswith("@") and corpus.licence)


def test_unknown_names_are_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="Unknown corpus 'bp5d'.*bp4d_plus"):
        load_corpus("bp5d", ".")
    with pytest.raises(WrongCorpusError, match="is not a folder"):
        load_corpus("bp4d", "/nowhere")


@pytest.mark.parametrize(
    ("name", "file", "lost"),
    [
        ("bp4d", "2DFeatures/F001_T1.mat", 4),
        ("disfa", "Landmark_Points/SN001/tmp_frame_lm/SN001_0000_lm.mat", 1),
        ("gft", "landmarks/001A.csv", 5),
    ],
)
def test_a_broken_file_of_points_costs_its_points_alone(name, file, lost, own, load, caplog):
    root = own(name)
    whole = root / file
    content = whole.read_bytes()
    whole.write_bytes(b"half a file" * 9)
    rows = load(name, root=root, split="full")
    assert sum(not row["landmarks"] for row in rows) == lost and file.split("/")[-1] in caplog.text
    report = CORPORA[name].check(root)
    assert any(file in problem for problem in report.problems) and report.usable
    whole.write_bytes(content)  # copied again
    assert all(load(name, root=root, split="full")["landmarks"][:])
    whole.unlink()
    without = load(name, root=root, split="full")
    assert rows["frame"][:] == without["frame"][:] and rows["occurrence"][:] == without["occurrence"][:]


def test_siblings_are_told_apart(discs):
    for name, other in (("bp4d", "bp4d_plus"), ("bp4d_plus", "bp4d")):
        with pytest.raises(WrongCorpusError, match="but its sibling, which has [FM]"):
            CORPORA[name].recognize(discs / other)


def test_bytes_that_are_no_text_name_their_file(own):
    files = {"bp4d": "AUCoding/AU_OCC/F001_T1.csv", "disfa": "ActionUnit_Labels/SN001/SN001_au1.txt"}
    for name, file in files.items():
        root = own(name)
        for content in (b"\x00\xff\xfe" * 9, b""):
            (root / file).write_bytes(content)
            try:
                problems = CORPORA[name].check(root).problems
            except ValueError as error:
                problems = [str(error)]
            assert any(file in problem for problem in problems)


@pytest.mark.parametrize("name", ["bp4d", "fec", "ms_celeb"])
def test_the_check_opens_pictures(name, own):
    root = own(name)
    for place in (min, max):
        broken = place(root.rglob("*.jpg"))
        broken.write_bytes(broken.read_bytes()[:200])
        assert any(str(broken) in problem for problem in CORPORA[name].check(root).problems)


@pytest.mark.parametrize("name", ["fec", "ms_celeb"])
def test_the_check_of_a_large_corpus_opens_evenly_spaced_pictures(name, discs, monkeypatch):
    module, opened = f"actionunits.data.corpora.{name}", []
    monkeypatch.setattr(f"{module}.try_picture", opened.append)
    monkeypatch.setattr(f"{module}.OPENED", 5)
    monkeypatch.setattr(f"{module}.LOOKED_FOR", 12, raising=False)
    CORPORA[name].check(discs / name)
    assert opened == sorted((discs / name).rglob("*.jpg"))[::4]  # 6 of 24


LABELS = {
    "bp4d": "AUCoding/AU_OCC/F001_T1.csv",
    "bp4d_plus": "AUCoding/AU_OCC/F001_T1.csv",
    "disfa": "ActionUnit_Labels/SN001/SN001_au1.txt",
    "gft": "AUs/Train/001A.csv",
    "aff_wild2": "annotations/AU_Set/Train_Set/video2.txt",
}


@pytest.mark.parametrize("name", LABELS)
def test_label_files_from_other_systems_give_the_same_rows(name, own, load):
    file = own(name) / LABELS[name]
    root = file.parents[LABELS[name].count("/")]
    before = load(name, split="full")
    file.with_name(f"._{file.name}").write_bytes(b"\x00\x05\x16\x07Mac OS X")
    lines = b"\r\n".join(file.read_bytes().splitlines())
    file.with_suffix(file.suffix.upper()).write_bytes(b"\xef\xbb\xbf" + lines)
    file.unlink()
    after = load(name, root=root, split="full")
    for column in ("subject", "sequence", "frame", "occurrence"):
        assert after[column][:] == before[column][:]
    assert CORPORA[name].check(root).found["labelled frames"] >= len(before)
    file.write_bytes(lines)
    with pytest.raises(ValueError, match="are the same file; remove one of them"):
        CORPORA[name].label_files(root)


@pytest.mark.parametrize(
    ("name", "path", "other"),
    [
        ("bp4d_plus", r"2D\+3D/(\w+)/(\w+)/(\d+)", r"frames/\1_\2/frame_\3"),
        ("disfa", r"tmp_frame_lm/SN\d+_(\d+)_lm", lambda m: f"frame_lm/l{int(m[1]) + 1:05d}_lm"),
        ("aff_wild2", "AU_Set", "AU_Detection_Challenge"),
        ("casme2", "CASME2_RAW_selected/(.*)/img", r"Cropped/\1/reg_img"),
    ],
)
def test_other_copies_that_the_layout_names_give_the_same_rows(name, path, other, discs, load, tmp_path):
    for file in (file for file in (discs / name).rglob("*") if file.is_file()):
        there = tmp_path / "other" / re.sub(path, other, str(file.relative_to(discs / name)))
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, there)
    rows, others = load(name, split="full"), load(name, root=tmp_path / "other", split="full")
    for column in ("subject", "sequence", "frame", "occurrence", "landmarks"):
        assert others[column][:] == rows[column][:]
    assert all(rows["landmarks"][:])


def test_points_with_an_upper_case_suffix_are_found(own, load):
    root = own("gft")
    (root / "landmarks/001A.csv").rename(root / "landmarks/001A.CSV")
    assert load("gft", root=root, split="full")["landmarks"][:] == load("gft", split="full")["landmarks"][:]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("disfa", "1,x\n", "is not a table of whole numbers: could not convert string 'x'"),
        ("disfa", "1,0\n2\n", "is not a table of whole numbers: the number of columns changed"),
        ("disfa", "1\n2\n", "has 1 columns, not frame and intensity"),
        ("disfa", "\n \n", "is empty; copy it again"),
        ("disfa", "1,0\n2,0\n2,1\n", "labels frame 2 more than once"),
        (
            "gft",
            "frame,1,2,4,6,10,12,14,15,23,24\n1" + ",1e30" * 10,
            "has a row with a missing or non-integer cell",
        ),
        (
            "gft",
            "frame,1,2,4,6,10,12,14,15,23,24\n1e30" + ",1" * 10,
            "has a row with a missing or non-integer cell",
        ),
    ],
)
def test_wrong_values_of_labels_name_their_file(name, content, message, own, load):
    root = own(name)
    (root / LABELS[name]).write_text(content)
    for read in (CORPORA[name].check, lambda root: load(name, root=root, split="full")):
        with pytest.raises(ValueError, match=f"{LABELS[name]} {message}"):
            read(root)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("Subject,Filename,\xff\xfe\n", "is not a text file: .*; copy it again, or save it as UTF-8"),
        ("Person,Filename\n1,EP02_01f\n", r"has no column \['Subject'\]; it has \['Person', 'Filename'\]"),
        ("Subject,Filename,ApexFrame,Action Units\n1,EP02_01f,inf,4\n", "row 2: .*infinity"),
    ],
)
def test_what_is_wrong_with_a_coding_sheet_is_named(content, message, own):
    root = own("casme2")
    next(root.glob("*.xlsx")).unlink()
    (root / "CASME2-coding-20140508.csv").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=f"CASME2-coding-20140508.csv.*{message}"):
        CORPORA["casme2"].check(root)


@pytest.mark.parametrize("points", [np.ones((66, 3)), np.ones((2, 66)), np.ones((0, 2)), "text"])
def test_points_of_another_shape_are_left_out_and_named(points, own, load, caplog):
    root, file = own("disfa"), "Landmark_Points/SN001/tmp_frame_lm/SN001_0000_lm.mat"
    savemat(str(root / file), {"pts": points})
    rows = load("disfa", root=root, split="full")
    assert sum(not row["landmarks"] for row in rows) == 1 and "SN001_0000_lm.mat" in caplog.text
    assert any(file in problem for problem in CORPORA["disfa"].check(root).problems)


@pytest.mark.parametrize("size", [5, 49, 66, 68, 98, 478])
def test_points_of_every_scheme_are_read_pair_by_pair(tmp_path, size):
    (tmp_path / "landmarks").mkdir()
    numbers = ",".join(str(i) for i in range(2 * size))
    (tmp_path / "landmarks" / "a[1].csv").write_text(f"\ufeffframe,x0,...\n\n7.0,{numbers}\n", "utf-8")
    problems = []
    points = read_landmarks(tmp_path, "a[1]", problems)
    assert list(points) == [7] and not problems
    assert points[7].tolist() == [[2 * i, 2 * i + 1] for i in range(size)]


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ("1,2,3,4,5,6,7,8,9,10,one", "is not a table of points: could not convert"),
        ("1,2,3,4,5,6,7,8,9,10,11\n2,3", "is not a table of points"),
        ("0.5,2,3,4,5,6,7,8,9,10,11", "'0.5' is not a whole number"),
        ("1,2,3,4,5,6,7,8,9", "has 9 columns; frame and x, y of [5, 49, "),
        ("1,2,3,4,5,6,7,8,9,10,11,12", "has 12 columns"),
    ],
)
def test_what_is_no_table_of_points_is_named(tmp_path, rows, problem):
    (tmp_path / "landmarks").mkdir()
    (tmp_path / "landmarks" / "a.csv").write_text(f"frame,x0,y0\n{rows}\n")
    problems = []
    assert read_landmarks(tmp_path, "a", problems) == {}
    assert len(problems) == 1 and "a.csv" in problems[0] and problem in problems[0]


def test_frames_that_the_tracker_lost_have_no_points(own, load):
    root = own("gft")
    table = root / "landmarks" / "001A.csv"
    header, *lines = table.read_text().splitlines()
    lines[2] = "3" + "," * lines[2].count(",")  # as pandas writes NaN
    lines[4] = lines[4].rsplit(",", 1)[0] + ",nan"
    table.write_text("\n".join([header, *lines]))
    rows = load("gft", root=root, split="train").filter(lambda row: row["subject"] == "001A")
    assert {row["frame"]: len(row["landmarks"]) for row in rows} == {2: 49, 3: 0, 4: 49, 5: 0, 6: 49}
    report = CORPORA["gft"].check(root)
    assert report.problems == ["2 of 25 frames with a picture have no landmarks"]
    assert "landmarks" in report.has, "trackers lose a few frames"
    table.write_text("\n".join([header, *lines[:1], *lines[-1:]]))
    assert "landmarks" not in CORPORA["gft"].check(root).has  # 21 of 25
    root = own("disfa")
    points = root / "Landmark_Points" / "SN001" / "tmp_frame_lm" / "SN001_0002_lm.mat"
    savemat(str(points), {"pts": np.full((66, 2), np.nan)})
    lost = load("disfa", root=root).filter(lambda row: not row["landmarks"])
    assert [(row["subject"], row["frame"]) for row in lost] == [("SN001", 3)]


@pytest.mark.parametrize("frame", [np.nan, np.inf, np.zeros(0)])
def test_points_of_no_frame_are_left_out_and_named(frame, own, load, caplog):
    root, file = own("bp4d"), "2DFeatures/F001_T1.mat"
    fit = np.zeros((1, 2), dtype=[("frame", object), ("pred", object)])
    fit[0, 0], fit[0, 1] = (frame, np.ones((49, 2))), (2441, np.full((49, 2), 8.0))
    savemat(str(root / file), {"fit": fit})
    rows = load("bp4d", root=root, split="full").select(range(4))  # of F001, T1
    assert [row["landmarks"] for row in rows] == [[], [[7.0, 7.0]] * 49, [], []]
    assert "F001_T1.mat: entry 1 of `fit` is unreadable" in caplog.text


def test_points_of_bp4d_belong_to_the_frame_that_is_named_or_counted(own):
    root, points, lost = own("bp4d"), np.arange(98.0).reshape(49, 2), np.full((49, 2), np.nan)

    def read(columns, *fits):
        fit = np.zeros((1, len(fits)), dtype=[(column, object) for column in columns])
        for i, values in enumerate(fits):
            fit[0, i] = values
        savemat(str(root / "2DFeatures" / "F001_T1.mat"), {"fit": fit})
        return next(CORPORA["bp4d"].recordings(root, [1])).landmarks([])

    named = read(["frame", "pred"], (2441, points), (2442, lost), (2443, np.zeros((0, 2))))
    assert list(named) == [2441]
    np.testing.assert_array_equal(named[2441], points - 1)
    assert list(read(["pred"], (points,), (lost,), (points,))) == [1, 3]
    assert list(read(["frame", "pred"], (2440, points))) == [2440]  # one frame has no axis of frames


def test_a_picture_whose_header_lies_about_its_size_is_a_problem(own):
    root = own("bp4d")
    first = min(root.rglob("*.jpg"))
    first.write_bytes(huge_header())
    problems = CORPORA["bp4d"].check(root).problems
    assert any(str(first) in problem and "exceeds limit" in problem for problem in problems)
