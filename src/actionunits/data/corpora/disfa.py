"""DISFA: 27 subjects watching a four-minute video; intensities of twelve action units, frame by frame."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from actionunits.action_units import CORPUS_AUS
from actionunits.data.corpora import tiny
from actionunits.data.corpora.base import AUCorpus, Published, Recording
from actionunits.data.corpora.reading import (
    check_once,
    find_files,
    index_pictures,
    load_mat,
    naming,
    read_landmarks,
)
from actionunits.landmarks import reduce_landmarks

CODED = (1, 2, 4, 5, 6, 9, 12, 15, 17, 20, 25, 26)
PICTURES = ("Frames", "frames", "Images", "images", "aligned_images", ".")
MISSING_POINTS = {("SN031", 3631): 3630}
"""(subject, frame) without a landmark file in any copy, and the frame that OpenFace's code takes instead."""

_POINT_FILE = re.compile(r"(?:[^.].*_|l)([0-9]+)_lm\.mat")  # not "._SN001_0000_lm.mat", which macOS adds


class Disfa(AUCorpus):
    """DISFA (Mavadati et al., 2013)."""

    name = "disfa"
    title = "DISFA"
    aus = CORPUS_AUS["disfa"]
    scheme = "ibug66"
    coding = "intensity"
    homepage = "http://mohammadmahoor.com/disfa/"
    licence = "University of Denver licence agreement, for research; request it at the homepage"
    citation = """\
@article{mavadati2013disfa,
  title = {{DISFA}: a spontaneous facial action intensity database},
  author = {Mavadati, S. Mohammad and Mahoor, Mohammad H. and Bartlett, Kevin and Trinh, Philip and
            Cohn, Jeffrey F.},
  journal = {IEEE Transactions on Affective Computing}, volume = {4}, number = {2}, pages = {151--160},
  year = {2013}
}"""
    layout = """\
DISFA/
  ActionUnit_Labels/SN001/SN001_au1.txt ...   a line a frame: its number from 1, and the intensity 0 to 5
  Landmark_Points/SN001/tmp_frame_lm/SN001_0000_lm.mat ...   66 points: variable `pts` (66, 2)
  Video_LeftCamera/LeftVideoSN001_comp.avi ...  the videos; `actionunits corpus extract disfa DIR` makes
  Frames/SN001/00001.jpg ...                  pictures; others are found by number, from 0 or from 1
  landmarks/SN001.csv                         instead of Landmark_Points: frame, x0, y0, ... (optional)
  lists/DISFA_part1_path.txt ...              for frames=jaanet: PyTorch-JAANet's lists (optional)"""
    traps = (
        "Label files count frames from 1, many copies of the pictures from 0 (SN001/0.png): if a folder has "
        "a number 0, its numbers are shifted by one.",
        "Points are named SN001_0000_lm.mat (from 0) or l00001_lm.mat (from 1), in tmp_frame_lm or frame_lm.",
        "SN031 lacks the points of frame 3631; those of 3630 are used, as in OpenFace's code.",
        "SN010 has 4,844 labelled frames, everybody else 4,845.",
        "Occurrence is intensity >= 2 in the papers here; OpenFace 3 uses >= 1 (`min_intensity`).",
        "There are videos of two cameras; labels belong to both, the literature mostly uses the left one.",
        "Frame lists differ: 130,814 labelled frames (ME-GraphAU, MDHR), 126,144 in JAA-Net's lists, which "
        "leave out frames with bad points.",
        "Points in MATLAB files count from 1; here 1 is subtracted, as in JAA-Net.",
    )  # fmt: skip
    published = {
        "all": Published(27, 130_814, "ME-GraphAU's and MDHR's lists (LAC Sec. IV-A counts 130,815)"),
        "jaanet": Published(27, 126_144, "the lists of PyTorch-JAANet (JAA-Net, AC2D, ESCDA)"),
    }
    frame_lists = {"jaanet": "lists/DISFA_part[123]_path.txt"}
    first_in_list = 0
    videos = "Video_LeftCamera/LeftVideo*_comp.avi"
    tiny_subjects = ("SN001", "SN002", "SN006", "SN011", "SN003", "SN004")  # two of each fold

    def recognize(self, root: Path) -> None:
        """Raise `WrongCorpusError` unless there are files such as ActionUnit_Labels/SN001/SN001_au1.txt."""
        self.require(root, self.label_files(root), "ActionUnit_Labels/SN001/SN001_au1.txt or the like")

    def label_files(self, root: Path) -> list[Path]:
        """The text files, in order."""
        folders = sorted(root.glob("ActionUnit_Labels/SN[0-9][0-9][0-9]"))
        return [path for folder in folders for path in find_files(folder, "SN*_au*.txt")]

    def recordings(self, root: Path, aus: Sequence[int]) -> Iterator[Recording]:
        """One recording per subject."""
        for folder in sorted(root.glob("ActionUnit_Labels/SN[0-9][0-9][0-9]")):
            frames, codes = _intensities(folder, aus)
            subject = folder.name
            candidates = (index_pictures(root / name / subject, "auto") for name in PICTURES)
            yield Recording(
                subject=subject,
                sequence="",
                frames=frames,
                codes=codes,
                pictures=next((pictures for pictures in candidates if pictures), {}),
                landmarks=lambda problems, subject=subject: _points(root, subject, problems),  # type: ignore[misc]
                source=str(folder),
            )

    def video_folder(self, video: Path) -> str:
        """The folder below Frames for a video's pictures."""
        match = re.search(r"SN[0-9]{3}", video.name)
        return match[0] if match else video.stem

    def write_tiny(self, root: Path) -> None:
        """Write eight frames of each of six subjects."""
        for subject in self.tiny_subjects:
            intensities = tiny.codes(8, subject) * tiny.random(subject).integers(1, 6, (8, 99))
            folder = root / "ActionUnit_Labels" / subject
            folder.mkdir(parents=True, exist_ok=True)
            for au in CODED:
                lines = [f"{frame},{intensities[frame - 1, au]}\n" for frame in range(1, 9)]
                (folder / f"{subject}_au{au}.txt").write_text("".join(lines))
            for frame in range(1, 9):
                points = tiny.draw_face(root / "Frames" / subject / f"{frame:05d}.jpg", subject, frame)
                name = f"Landmark_Points/{subject}/tmp_frame_lm/{subject}_{frame - 1:04d}_lm.mat"
                _write_points(root / name, points)


def _intensities(folder: Path, aus: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Frame numbers (n,) and codes (n, m) from the files of one subject."""
    columns: list[np.ndarray] = []
    frames = np.empty(0, np.int64)
    files = {path.stem: path for path in find_files(folder, "*.txt")}
    for au in aus:
        name = f"{folder.name}_au{au}"
        path = files.get(name, folder / f"{name}.txt")
        if not path.is_file():
            raise ValueError(f"{path} is missing; DISFA codes the action units {list(CODED)}.")
        with naming(path):
            text = path.read_text(encoding="utf-8-sig")
        if not text.strip():
            raise ValueError(f"{path} is empty; copy it again.")
        try:
            table = np.loadtxt(text.splitlines(), delimiter=",", dtype=np.int64, ndmin=2)
        except ValueError as error:
            raise ValueError(f"{path} is not a table of whole numbers: {error}; copy it again.") from error
        if table.shape[1] != 2:
            raise ValueError(f"{path} has {table.shape[1]} columns, not frame and intensity; copy it again.")
        check_once(path, table[:, 0])
        if columns and not np.array_equal(table[:, 0], frames):
            raise ValueError(f"{path} labels other frames than the files before it; copy it again.")
        frames = table[:, 0]
        columns.append(table[:, 1])
    return frames, np.stack(columns, axis=1)


def _points(root: Path, subject: str, problems: list[str]) -> dict[int, np.ndarray]:
    """The 66 landmarks by frame, where they are finite; numbers that begin at 0 are shifted by one."""
    files = {
        int(match[1]): path
        for path in root.glob(f"Landmark_Points/{subject}/*/*_lm.mat")
        if (match := _POINT_FILE.fullmatch(path.name))
    }
    if not files:
        return read_landmarks(root, subject, problems)
    shift = 1 if 0 in files else 0
    points = {}
    for frame, path in files.items():
        if (pts := load_mat(path, "pts", problems)) is None:
            continue
        if np.shape(pts) != (66, 2) or np.asarray(pts).dtype.kind not in "fiu":
            problems.append(f"{path} holds `pts` of shape {np.shape(pts)}; 66 points x, y are expected")
            continue
        if np.isfinite(pts).all():
            points[frame + shift] = np.asarray(pts, np.float64) - 1
    for (person, frame), substitute in MISSING_POINTS.items():
        if person == subject and frame not in points and substitute in points:
            points[frame] = points[substitute]
    return points


def _write_points(path: Path, points: np.ndarray) -> None:
    from scipy.io import savemat

    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(str(path), {"pts": reduce_landmarks(points, "ibug68", "ibug66") + 1})
