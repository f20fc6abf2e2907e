"""`actionunits corpus`: layouts that are shown and written, checks with exit codes, preparation."""

import io
import json
import shutil
import sys
from fractions import Fraction

import pyarrow.parquet as pq
import pytest
from PIL import Image

from actionunits.cli import main
from actionunits.data.corpora import CORPORA
from actionunits.video import VideoReader, write_video

NAMES = ("bp4d", "bp4d_plus", "disfa", "gft", "aff_wild2", "casme2", "fec", "ms_celeb")


@pytest.mark.parametrize("name", NAMES)
def test_layout_writes_a_disc_that_check_accepts(name, tmp_path, capsys):
    assert main(["corpus", "layout", name]) == 0
    shown = capsys.readouterr().out
    assert CORPORA[name].layout in shown and "Licence: " in shown and "@" in shown
    assert main(["corpus", "layout", name, "--write", str(tmp_path / name)]) == 0
    assert main(["corpus", "check", name, str(tmp_path / name)]) == 0
    told = capsys.readouterr().out
    assert f"holds {CORPORA[name].title}:" in told and "Results of papers" in told
    assert main(["corpus", "check", name, str(tmp_path / name), "--strict"]) == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_something_else_fails_with_a_sentence(name, tmp_path, capsys):
    (tmp_path / "holiday.jpg").touch()
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert main(["corpus", "check", name, str(folder)]) == 1
        told = capsys.readouterr()
        assert CORPORA[name].title in told.err and not told.out
    assert "holiday.jpg" in _error_of(name, tmp_path, capsys)


def _error_of(name, folder, capsys):
    main(["corpus", "check", name, str(folder)])
    return capsys.readouterr().err


def test_the_report_as_json(tmp_path, capsys):
    CORPORA["disfa"].write_tiny(tmp_path)
    assert main(["corpus", "check", "disfa", str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["found"]["subjects"] == 6 and report["published"]["all"]["frames"] == 130814
    assert any(row["runnable"] for row in report["rows"])
    CORPORA["casme2"].write_tiny(tmp_path / "casme2")
    folds = tmp_path / "folds.csv"
    folds.write_text("subject,fold\nsub01,1\nsub02,1\nsub03,2\nsub04,2\n")
    arguments = ["corpus", "check", "casme2", str(tmp_path / "casme2"), "--json", "--folds", str(folds)]
    assert main(arguments) == 0 and main(arguments[:-2]) == 0
    told = capsys.readouterr().out.split("\n}\n")[:2]
    assert ["folds-file" in json.loads(f"{report}}}")["has"] for report in told] == [True, False]


def test_a_disc_without_pictures_is_of_no_use(tmp_path, capsys):
    CORPORA["bp4d"].write_tiny(tmp_path)
    (tmp_path / "2D+3D").rename(tmp_path / "elsewhere")
    assert main(["corpus", "check", "bp4d", str(tmp_path)]) == 1
    told = capsys.readouterr()
    assert "nothing in" in told.err and "48 of 48 labelled frames have no picture" in told.out


def test_nothing_is_written_over(tmp_path, capsys):
    (tmp_path / "mine.txt").touch()
    assert main(["corpus", "layout", "gft", "--write", str(tmp_path)]) == 1
    assert "is not empty" in capsys.readouterr().err and len(list(tmp_path.iterdir())) == 1


def test_list_and_usage(capsys):
    assert main(["corpus", "list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in CORPORA)
    with pytest.raises(SystemExit) as exit_:
        main(["corpus", "check", "bp5d", "."])
    assert exit_.value.code == 2


def test_a_reader_that_goes_is_no_fault_of_the_disc(monkeypatch):
    class Pipe(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Pipe())
    with pytest.raises(BrokenPipeError):
        main(["corpus", "layout", "gft"])


def test_prepare(tmp_path, capsys):
    CORPORA["gft"].write_tiny(tmp_path / "gft")
    arguments = ["corpus", "prepare", "gft", str(tmp_path / "gft"), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--size", "128", "--workers", "1"]) == 0
    assert "25 faces of 5 people, 0 left out" in capsys.readouterr().out
    assert main([*arguments, "--size", "200"]) == 1
    assert "aligned_size" in capsys.readouterr().err


def test_prepare_reads_the_frames_and_intensities_that_were_asked_for(tmp_path, capsys):
    CORPORA["disfa"].write_tiny(tmp_path / "disfa")
    frames = tmp_path / "frames.txt"
    frames.write_text("SN001/0.png\nSN001/1.png\nSN002/7.png\n")
    arguments = ["corpus", "prepare", "disfa", str(tmp_path / "disfa"), "--output", str(tmp_path / "out")]
    arguments += ["--workers", "1", "--alignment", "none", "--margin", "5", "--frames", str(frames)]
    assert main([*arguments, "--min-intensity", "4"]) == 0
    assert "3 faces of 2 people, 0 left out" in capsys.readouterr().out
    faces = [row for file in (tmp_path / "out").glob("*.parquet") for row in pq.read_table(file).to_pylist()]
    assert [(face["subject"], face["frame"]) for face in faces] == [("SN001", 1), ("SN001", 2), ("SN002", 8)]
    for face in faces:
        assert face["occurrence"] == [int(round(5 * x) >= 4) for x in face["intensities"]]
    assert any(4 > round(5 * x) >= 2 for face in faces for x in face["intensities"])
    arguments[arguments.index(str(tmp_path / "out"))] = str(tmp_path / "detected")
    assert main([*arguments, "--landmarks", "detect"]) == 0
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("out", "detected")]
    assert [manifest["scheme"] for manifest in manifests] == ["ibug66", "ibug68"]


def test_extract_makes_frames_that_the_reader_finds(tmp_path, capsys):
    av = pytest.importorskip("av")
    CORPORA["disfa"].write_tiny(tmp_path)
    frames = tmp_path / "Frames" / "SN001"
    pictures = [Image.open(path).convert("RGB") for path in sorted(frames.iterdir())]
    for path in frames.iterdir():
        path.unlink()
    frames.rmdir()
    video = tmp_path / "Video_LeftCamera" / "LeftVideoSN001_comp.avi"
    video.parent.mkdir()
    with av.open(str(video), "w") as container:
        stream = container.add_stream("mjpeg", rate=20)
        stream.width, stream.height, stream.pix_fmt = (*pictures[0].size, "yuvj420p")
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    assert main(["corpus", "extract", "disfa", str(tmp_path)]) == 0
    assert "wrote 8 pictures" in capsys.readouterr().out
    assert sorted(path.name for path in frames.iterdir()) == [f"{i:05d}.jpg" for i in range(1, 9)]
    assert CORPORA["disfa"].check(tmp_path).found["frames with a picture"] == 48
    assert main(["corpus", "extract", "disfa", str(tmp_path)]) == 0
    assert "wrote 0 pictures" in capsys.readouterr().out
    assert main(["corpus", "extract", "bp4d", str(tmp_path)]) == 1


def test_extract_writes_the_listed_faces_of_ms_celeb(tmp_path, capsys):
    import base64
    import shutil

    CORPORA["ms_celeb"].write_tiny(tmp_path)
    folder = tmp_path / "FaceImageCroppedWithAlignment"
    files = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.jpg")}
    lines = []
    for path, data in [*files.items(), (list(files)[0].with_name("99-FaceId-0.jpg"), b"not listed")]:
        rank, _, face = path.stem.partition("-")
        cells = [
            path.parent.name,
            rank,
            "http://a",
            "http://b",
            face,
            "AAAA",
            base64.b64encode(data).decode(),
        ]
        lines.append("\t".join(cells))
    (tmp_path / "FaceImageCroppedWithAlignment.tsv").write_text("\n".join(lines) + "\n")
    shutil.rmtree(folder)
    assert main(["corpus", "check", "ms_celeb", str(tmp_path)]) == 1
    assert "corpus extract ms_celeb" in capsys.readouterr().out
    assert main(["corpus", "extract", "ms_celeb", str(tmp_path)]) == 0
    assert {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.jpg")} == files
    elsewhere = ["--output", str(tmp_path / "elsewhere")]
    assert main(["corpus", "extract", "ms_celeb", str(tmp_path), *elsewhere]) == 0
    assert len(list((tmp_path / "elsewhere").rglob("*.jpg"))) == len(files)
    for end in ("m.09\t1\n", lines[0][:-3] + "\n"):  # as an interrupted copy ends
        (tmp_path / "FaceImageCroppedWithAlignment.tsv").write_text(f"{lines[1]}\n\n{end}")
        assert main(["corpus", "extract", "ms_celeb", str(tmp_path)]) == 1
        assert "Alignment.tsv, line 3, is incomplete" in capsys.readouterr().err


def test_extract_leaves_out_broken_videos_and_names_them(tmp_path, capsys):
    pytest.importorskip("av")
    CORPORA["gft"].write_tiny(tmp_path)
    shutil.rmtree(tmp_path / "Frames")
    (tmp_path / "Videos").mkdir()
    for name in ("001A.mp4", "001B.mp4", "002C.MP4", "003A.mp4"):
        with write_video(tmp_path / "Videos" / name) as video:
            for i in range(3):
                video.add(Image.new("RGB", (32, 32), (80 * i, 0, 0)), i / 25)
    whole = (tmp_path / "Videos/001A.mp4").read_bytes()
    (tmp_path / "Videos/001A.mp4").write_bytes(b"")
    (tmp_path / "Videos/001B.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    assert main(["corpus", "extract", "gft", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "2 of 4 videos cannot be read, the others are done (6 pictures written)" in error
    assert "001A.mp4" in error and "001B.mp4" in error
    assert sorted(path.name for path in (tmp_path / "Frames").iterdir()) == ["002C", "003A"]
    for name in ("001A.mp4", "001B.mp4"):
        (tmp_path / "Videos" / name).write_bytes(whole)
    assert main(["corpus", "extract", "gft", str(tmp_path)]) == 0
    assert len(list((tmp_path / "Frames/001B").iterdir())) == 3


def test_extract_writes_frames_as_they_are_stored_to_which_points_belong(tmp_path, capsys):
    toy_videos = pytest.importorskip("toy_videos", reason="PyAV is not installed")
    CORPORA["gft"].write_tiny(tmp_path)
    (tmp_path / "Videos").mkdir()
    pictures = toy_videos.moving(Image.effect_noise((60, 60), 90).convert("RGB"), 2, size=(96, 80))
    for name in ("new.mp4", "lost.mp4"):
        toy_videos.write(tmp_path / "Videos" / name, pictures, aspect=Fraction(2, 1), options={"g": "1"})
    for frame in (0, 1):
        toy_videos.damage(tmp_path / "Videos/lost.mp4", frame)
    assert main(["corpus", "extract", "gft", str(tmp_path)]) == 1
    assert "lost.mp4 has only damaged frames" in capsys.readouterr().err
    assert [Image.open(path).size for path in (tmp_path / "Frames/new").iterdir()] == [(96, 80)] * 2
    assert not list((tmp_path / "Frames").glob("*lost*"))


@pytest.mark.parametrize("keep", [8, 400])
def test_extract_leaves_out_damaged_frames_and_numbers_them(tmp_path, capsys, keep):
    """A file whose frames are all there, one of them with noise for its data, or for the rest of it."""
    toy_videos = pytest.importorskip("toy_videos", reason="PyAV is not installed")
    CORPORA["gft"].write_tiny(tmp_path)
    shutil.rmtree(tmp_path / "Frames")
    (tmp_path / "Videos").mkdir()
    pictures = toy_videos.moving(Image.effect_noise((60, 60), 90).convert("RGB"), 8, size=(96, 80))
    for name in ("001A", "001B"):
        toy_videos.write(tmp_path / f"Videos/{name}.mp4", pictures, "mpeg4", options={"g": "1"})
    toy_videos.damage(tmp_path / "Videos/001A.mp4", 4, keep)
    (frame,) = [frame for frame in VideoReader(tmp_path / "Videos/001A.mp4") if frame.error]
    assert frame.error.startswith("the frame cannot be decoded" if keep == 8 else "the frame is damaged")
    assert main(["corpus", "extract", "gft", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "1 of 2 videos have damaged frames, which are left out, all others are written" in error
    assert "remove the folder and repeat" in error and f"001A.mp4: 5 in {tmp_path / 'Frames/001A'}" in error
    numbers = [int(path.stem) for path in sorted((tmp_path / "Frames/001A").iterdir())]
    assert numbers == [1, 2, 3, 4, 6, 7, 8]
    assert len(list((tmp_path / "Frames/001B").iterdir())) == 8
    assert main(["corpus", "extract", "gft", str(tmp_path)]) == 0
