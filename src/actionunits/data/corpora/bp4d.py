"""BP4D and BP4D+: spontaneous expressions of 41 and 140 subjects, FACS-coded frame by frame."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from actionunits.action_units import CORPUS_AUS
from actionunits.data.corpora import tiny
from actionunits.data.corpora.base import AUCorpus, Published, Recording, WrongCorpusError
from actionunits.data.corpora.reading import (
    find_files,
    first_folder,
    index_pictures,
    load_mat,
    read_au_table,
    read_landmarks,
)
from actionunits.data.protocols import PROTOCOLS
from actionunits.landmarks import reduce_landmarks

LABELS = ("AUCoding/AU_OCC", "AU_OCC", "AUCoding")
PICTURES = (
    "2D+3D",
    "Sequences(2D+3D)",
    "BP4D-training",
    "BP4D-Spontaneous",
    "images",
    "Images",
    "frames",
    "Frames",
    ".",
)
POINTS = ("2DFeatures", "Features/2DFeatures", "2D_Features")


class Bp4d(AUCorpus):
    """BP4D-Spontaneous (Zhang et al., 2014)."""

    name = "bp4d"
    title = "BP4D"
    aus = CORPUS_AUS["bp4d"]
    scheme = "ibug49"
    homepage = "http://www.cs.binghamton.edu/~lijun/Research/3DFE/3DFE_Analysis.html"
    licence = "Binghamton University licence agreement, for research; request it at the homepage"
    citation = """\
@article{zhang2014bp4d,
  title = {{BP4D-Spontaneous}: a high-resolution spontaneous {3D} dynamic facial expression database},
  author = {Zhang, Xing and Yin, Lijun and Cohn, Jeffrey F. and Canavan, Shaun and Reale, Michael and
            Horowitz, Andy and Liu, Peng and Girard, Jeffrey M.},
  journal = {Image and Vision Computing}, volume = {32}, number = {10}, pages = {692--706}, year = {2014}
}"""
    layout = """\
BP4D/
  AUCoding/AU_OCC/F001_T1.csv ...   one file a subject and task (T1 to T8); a row a coded frame, the first
                                    column is its number, the others are named by action unit; 9 is unknown
  2D+3D/F001/T1/2440.jpg ...        pictures by frame number, with or without leading zeros
  2DFeatures/F001_T1.mat ...        49 points: variable `fit`, with `pred` (49, 2) of each frame, from 1
  landmarks/F001_T1.csv             instead of 2DFeatures: frame, x0, y0, ... (any scheme; optional)
  lists/BP4D_part1_path.txt ...     for frames=jaanet: the lists of PyTorch-JAANet (optional)"""
    traps: ClassVar[tuple[str, ...]] = (
        "Pictures are named F007/T1/0643.jpg, 643.jpg or 00643.jpg in other copies; only the number counts.",
        "The first CSV column is the frame number although its header reads 0.",
        "9 means that the action unit was not coded; it is unknown here, not absent.",
        "Points in MATLAB files count from 1; here 1 is subtracted, as in JAA-Net.",
        "We have not seen an original copy: the names of the landmarks' folder and variable are those of the "
        "authors' tracker (`fit.pred`). If yours differ, write landmarks/*.csv.",
        "Frame lists differ: all coded frames are 146,847 (ME-GraphAU, MDHR, LAC), JAA-Net's are 146,576.",
        "A subject's name begins with the sex; F001 of BP4D and F001 of BP4D+ are different people.",
    )  # fmt: skip
    published = {
        "all": Published(41, 146_847, "LAC Sec. IV-A; ME-GraphAU's and MDHR's lists"),
        "jaanet": Published(41, 146_576, "the lists of PyTorch-JAANet (JAA-Net, AC2D, ESCDA)"),
    }
    frame_lists = {"jaanet": "lists/BP4D_part[123]_path.txt"}
    tiny_subjects = ("F001", "M001", "F003", "M002", "F004", "M003")  # two of each fold
    tiny_tasks = ("T1", "T2")

    def recognize(self, root: Path) -> None:
        """Raise `WrongCorpusError` unless there are files such as AUCoding/AU_OCC/F001_T1.csv."""
        files = self.label_files(root)
        self.require(root, files, "AUCoding/AU_OCC/F001_T1.csv or the like")
        if sign := self.sign_of_sibling(files):
            raise WrongCorpusError(f"{root} does not hold {self.title}, but its sibling, which has {sign}.")

    def sign_of_sibling(self, files: Sequence[Path]) -> str:
        """A label file's name that only BP4D+ can have, or "": BP4D ends with F023 and M018."""
        own, others = (set().union(*PROTOCOLS[name].groups.values()) for name in ("bp4d", "bp4d_plus"))
        return next((path.name for path in files if path.name[:4] in others - own), "")

    def label_files(self, root: Path) -> list[Path]:
        """The CSV files, in order."""
        folder = first_folder(root, LABELS)
        return find_files(folder, "[FM][0-9][0-9][0-9]_T*.csv") if folder else []

    def recordings(self, root: Path, aus: Sequence[int]) -> Iterator[Recording]:
        """One recording per subject and task."""
        for path in self.label_files(root):
            subject, _, task = path.stem.partition("_")
            frames, codes = read_au_table(path, aus)
            yield Recording(
                subject=subject,
                sequence=task,
                frames=frames,
                codes=codes,
                pictures=self._pictures(root, subject, task),
                landmarks=lambda problems, name=path.stem: _points(root, name, problems),  # type: ignore[misc]
                source=str(path),
            )

    def group_of(self, subject: str) -> dict[str, str]:
        """The sex, the first letter of the name."""
        return {"sex": {"F": "female", "M": "male"}.get(subject[:1], "")}

    def write_tiny(self, root: Path) -> None:
        """Write four coded frames of each of six subjects and two tasks, one with unknown action units."""
        header = [0, *range(1, 28)]
        for subject in self.tiny_subjects:
            for task in self.tiny_tasks:
                frames = range(2440, 2444)
                codes = tiny.codes(4, subject, task)
                codes[:, 3] = codes[2, 14] = 9
                points = [
                    tiny.draw_face(root / "2D+3D" / subject / task / f"{frame}.jpg", subject, task, frame)
                    for frame in frames
                ]
                tiny.write_table(
                    root / "AUCoding" / "AU_OCC" / f"{subject}_{task}.csv",
                    header,
                    [[frame, *row[1:28]] for frame, row in zip(frames, codes, strict=True)],
                )
                _write_fit(root / "2DFeatures" / f"{subject}_{task}.mat", list(frames), points)

    def _pictures(self, root: Path, subject: str, task: str) -> dict[int, Path]:
        for name in PICTURES:
            for folder in (root / name / subject / task, root / name / f"{subject}_{task}"):
                if pictures := index_pictures(folder):
                    return pictures
        return {}


class Bp4dPlus(Bp4d):
    """BP4D+, also MMSE (Zhang et al., 2016)."""

    name = "bp4d_plus"
    title = "BP4D+"
    aus = CORPUS_AUS["bp4d+"]
    citation = """\
@inproceedings{zhang2016mmse,
  title = {Multimodal spontaneous emotion corpus for human behavior analysis},
  author = {Zhang, Zheng and Girard, Jeffrey M. and Wu, Yue and Zhang, Xing and Liu, Peng and Ciftci, Umur and
            Canavan, Shaun and Reale, Michael and Horowitz, Andy and Yang, Huiyuan and Cohn, Jeffrey F. and
            Ji, Qiang and Yin, Lijun},
  booktitle = {CVPR}, pages = {3438--3446}, year = {2016}
}"""
    layout = (
        Bp4d.layout.replace("BP4D/", "BP4D+/", 1).split("\n  lists/")[0]
        + """
  frames/F001_T1/frame_1.jpg ...    instead of 2D+3D: frames of the videos F001_T1.mp4, counted from 1"""
    )
    traps: ClassVar[tuple[str, ...]] = (
        "Four of the ten tasks are coded. The CSV files have rows of frames that nobody coded (all 9); these "
        "are left out.",
        "Columns are not in the order of BP4D's files: they are read by name.",
        *Bp4d.traps[2:5],
        Bp4d.traps[6],
    )
    published = {"all": Published(140, 197_875, "AC2D Sec. 4.1.1")}
    frame_lists = {}
    tiny_subjects = ("F001", "F002", "M003", "M004", "F074", "F037")  # people of every fold of FMAE-IAT
    tiny_tasks = ("T1", "T6")

    def sign_of_sibling(self, files: Sequence[Path]) -> str:
        """A label file's name that only BP4D can have, or "": BP4D+ has no coded tasks T2 to T5."""
        if super().sign_of_sibling(files):
            return ""
        tasks = ("T2", "T3", "T4", "T5")
        return next((path.name for path in files if path.stem.partition("_")[2] in tasks), "")


def _points(root: Path, name: str, problems: list[str]) -> dict[int, np.ndarray]:
    """Landmarks of a recording by frame, without frames where the tracker failed."""
    folder = first_folder(root, POINTS)
    path = folder / f"{name}.mat" if folder else None
    if path is None or not path.is_file():
        return read_landmarks(root, name, problems)
    fits = load_mat(path, "fit", problems)
    found = {}
    for position, fit in enumerate(() if fits is None else np.atleast_1d(fits), start=1):
        try:
            points, frame = (
                np.asarray(getattr(fit, "pred", ()), np.float64),
                int(getattr(fit, "frame", position)),
            )
        except (TypeError, ValueError, OverflowError) as error:
            problems.append(f"{path}: entry {position} of `fit` is unreadable: {error}")
            continue
        if points.shape == (49, 2) and np.isfinite(points).all():
            found[frame] = points - 1
    return found


def _write_fit(path: Path, frames: list[int], points: list[np.ndarray]) -> None:
    from scipy.io import savemat

    fit = np.zeros((1, len(frames)), dtype=[("frame", object), ("pred", object)])
    for i, (frame, face) in enumerate(zip(frames, points, strict=True)):
        fit[0, i] = (frame, reduce_landmarks(face, "ibug68", "ibug49") + 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(str(path), {"fit": fit})
