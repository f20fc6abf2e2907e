"""CASME II: micro-expressions of 26 subjects at 200 frames per second; samples are the clips' apex frames."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from actionunits.action_units import CORPUS_AUS, UNKNOWN
from actionunits.data.corpora import tiny
from actionunits.data.corpora.base import AUCorpus, Published, Recording
from actionunits.data.corpora.reading import index_pictures, read_landmarks
from actionunits.data.corpora.xlsx import read_sheet, write_sheet

PICTURES = ("CASME2_RAW_selected", "CASME2-RAW", "CASME2_RAW", "frames", "Cropped", ".")
_UNIT = re.compile(r"(?:AU)?[LRB]?\s*([0-9]+)\s*[A-E]?", re.IGNORECASE)


class Casme2(AUCorpus):
    """CASME II (Yan et al., 2014)."""

    name = "casme2"
    title = "CASME II"
    aus = CORPUS_AUS["casme2"]
    homepage = "http://casme.psych.ac.cn/casme/e2"
    licence = "agreement with the Chinese Academy of Sciences, for research; request it at the homepage"
    citation = """\
@article{yan2014casme2,
  title = {{CASME II}: an improved spontaneous micro-expression database and the baseline evaluation},
  author = {Yan, Wen-Jing and Li, Xiaobai and Wang, Su-Jing and Zhao, Guoying and Liu, Yong-Jin and
            Chen, Yu-Hsin and Fu, Xiaolan},
  journal = {PLoS ONE}, volume = {9}, number = {1}, pages = {e86041}, year = {2014}
}"""
    layout = """\
CASME2/
  CASME2-coding-20140508.xlsx                   a row a clip: Subject, Filename, OnsetFrame, ApexFrame,
                                                OffsetFrame, Action Units (CASME2-coding*.xlsx or .csv)
  CASME2_RAW_selected/sub01/EP02_01f/img46.jpg ...   pictures by frame number
  Cropped/sub01/EP02_01f/reg_img46.jpg ...      or the aligned faces of the disc
  landmarks/sub01_EP02_01f.csv ...              frame, x0, y0, ... of 68 points (or any scheme; optional)"""
    traps = (
        "Some clips have / instead of an apex: the frame halfway between onset and offset is taken.",
        "Action units are written as 4+R10, L2 or 12A: sides and strengths are left out. Those with a "
        "question mark or an 'or' are unknown.",
        "The sheet has empty columns without a name; columns are read by name.",
        "The sheet has 255 clips, the publication 247.",
        "The subject lists of the four folds are not published; pass a folds file.",
    )
    published = {"all": Published(26, 255, "the coding sheet of 2014-05-08 (Yan et al. count 247 clips)")}
    tiny_clips = {1: ("EP02_01f", "EP03_02"), 2: ("EP01_11f",), 3: ("EP07_04",), 4: ("EP12_01", "EP13_06f")}

    def recognize(self, root: Path) -> None:
        """Raise `WrongCorpusError` unless there is a coding sheet."""
        self.require(root, self.label_files(root), "CASME2-coding*.xlsx or .csv")

    def label_files(self, root: Path) -> list[Path]:
        """The coding sheet; of several the last by name, which is the newest."""
        found = [p for p in root.glob("CASME2-coding*") if p.suffix.lower() in (".xlsx", ".csv")]
        return sorted(found)[-1:]

    def recordings(self, root: Path, aus: Sequence[int]) -> Iterator[Recording]:
        """One recording per clip, with its apex frame."""
        sheet = self.label_files(root)[0]
        for number, row in enumerate(read_sheet(sheet), start=2):
            if missing := {"Subject", "Filename"} - row.keys():
                raise ValueError(f"{sheet} has no column {sorted(missing)}; it has {list(row)}.")
            if not row.get("Subject") or not row.get("Filename"):
                continue
            try:
                subject = f"sub{int(float(row['Subject'])):02d}"
                frame, codes = apex_frame(row), read_units(row["Action Units"], aus)
            except (ValueError, KeyError, OverflowError) as error:
                raise ValueError(f"{sheet}, row {number}: {error}; the cells are {row}.") from error
            clip = row["Filename"].strip()
            candidates = (index_pictures(root / name / subject / clip) for name in PICTURES)
            yield Recording(
                subject=subject,
                sequence=clip,
                frames=np.array([frame]),
                codes=codes[None],
                pictures=next((pictures for pictures in candidates if pictures), {}),
                landmarks=lambda problems, name=f"{subject}_{clip}": read_landmarks(root, name, problems),  # type: ignore[misc]
                source=f"{sheet}, row {number}",
            )

    def write_tiny(self, root: Path) -> None:
        """Write six clips of three pictures of four subjects; one clip has no apex."""
        units = ("4+7", "R12", "1+2", "4 or 5?", "L14+17", "15")
        rows: list[list[object]] = [
            [
                "Subject",
                "Filename",
                "",
                "OnsetFrame",
                "ApexFrame",
                "OffsetFrame",
                "",
                "Action Units",
                "Estimated Emotion",
            ]
        ]
        for person, clips in self.tiny_clips.items():
            for clip in clips:
                onset = 40 + 5 * len(rows)
                apex = "/" if clip == "EP07_04" else onset + 1
                rows.append([person, clip, "", onset, apex, onset + 2, "", units[len(rows) - 1], "others"])
                points = {}
                for frame in range(onset, onset + 3):
                    path = root / "CASME2_RAW_selected" / f"sub{person:02d}" / clip / f"img{frame}.jpg"
                    points[frame] = tiny.draw_face(path, person, clip, frame)
                tiny.write_landmarks(root, f"sub{person:02d}_{clip}", points)
        write_sheet(root / "CASME2-coding-20140508.xlsx", rows)


def apex_frame(row: dict[str, str]) -> int:
    """The apex frame, or where the sheet has none the frame halfway between onset and offset."""
    apex = row["ApexFrame"].strip()
    if apex in ("", "/"):
        return (int(float(row["OnsetFrame"])) + int(float(row["OffsetFrame"]))) // 2
    return int(float(apex))


def read_units(text: str, aus: Sequence[int]) -> np.ndarray:
    """Codes (m,) of a cell such as "4+R10": 1 if named, `UNKNOWN` if doubtful or the cell is empty, else 0.

    Raises:
        ValueError: A part is not an action unit.
    """
    if not text.replace("?", "").strip():
        return np.full(len(aus), UNKNOWN)
    codes = dict.fromkeys(aus, 0)
    for part in re.split(r"[+,;]", text):
        doubtful = "?" in part or "or" in part.lower()
        for name in re.split(r"or", part.replace("?", ""), flags=re.IGNORECASE):
            if not name.strip():
                continue
            if not (unit := _UNIT.fullmatch(name.strip())):
                raise ValueError(f"{part.strip()!r} is not an action unit")
            if (au := int(unit[1])) in codes and codes[au] != 1:  # L12+R12? is certain of one side
                codes[au] = UNKNOWN if doubtful else 1
    return np.array([codes[au] for au in aus])
