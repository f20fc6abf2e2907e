"""Aff-Wild2: videos from the internet with twelve action units and an official partition."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from actionunits.action_units import CORPUS_AUS
from actionunits.data.corpora import tiny
from actionunits.data.corpora.base import AUCorpus, Published, Recording
from actionunits.data.corpora.reading import (
    find_files,
    first_folder,
    index_pictures,
    read_au_table,
    read_landmarks,
)

LABELS = (
    "annotations/AU_Set",
    "annotations/AU_Detection_Challenge",
    "Annotations/annotations/AU_Set",
    "AU_Set",
    "AU_Detection_Challenge",
)
PICTURES = (
    "cropped_aligned",
    "cropped_aligned_images/cropped_aligned",
    "cropped_aligned_images",
    "Frames",
    "frames",
)
SPLITS = {"Train_Set": "train", "Validation_Set": "validation"}


class AffWild2(AUCorpus):
    """The action unit part of Aff-Wild2 (Kollias and Zafeiriou, 2019)."""

    name = "aff_wild2"
    title = "Aff-Wild2"
    aus = CORPUS_AUS["aff-wild2"]
    official_split = True
    homepage = "https://ibug.doc.ic.ac.uk/resources/aff-wild2/"
    licence = "agreement with Imperial College London, for research; request it at the homepage"
    citation = """\
@inproceedings{kollias2019affwild2,
  title = {Expression, affect, action unit recognition: {Aff-Wild2}, multi-task learning and {ArcFace}},
  author = {Kollias, Dimitrios and Zafeiriou, Stefanos},
  booktitle = {BMVC}, year = {2019}
}"""
    layout = """\
Aff-Wild2/
  annotations/AU_Set/Train_Set/VIDEO.txt ...        header AU1,AU2,AU4,..., then a line a frame; -1 is unknown
  annotations/AU_Set/Validation_Set/VIDEO.txt ...   (AU_Detection_Challenge in later releases)
  cropped_aligned/VIDEO/00001.jpg ...               faces of 112 pixels, by frame number from 1
  landmarks/VIDEO.csv ...                           frame, x0, y0, ... (any scheme; optional)"""
    traps = (
        "Line k below the header is frame k: the label files have no frame numbers.",
        "Frames where no face was found have a label and no picture; they are left out.",
        "-1 is unknown; a frame whose labels are all -1 is left out.",
        "VIDEO_left and VIDEO_right are two people in one video. A video counts as a subject here; the "
        "official partition is subject-exclusive.",
        "Landmarks are not distributed. AC2D uses those of Shao et al. (2023); `actionunits corpus prepare "
        "--landmarks detect` detects others.",
    )
    published = {
        "all": Published(
            410,
            1_830_000,
            "AC2D Sec. 4.1.1: 305 videos, about 1,390,000 frames; 105, about 440,000",
            about=True,
        ),
    }
    tiny_videos = {"1-30-1280x720": "Train_Set", "video2": "Train_Set", "video7_left": "Validation_Set"}

    def recognize(self, root: Path) -> None:
        """Raise `WrongCorpusError` unless there are files such as annotations/AU_Set/Train_Set/VIDEO.txt."""
        self.require(root, self.label_files(root), "annotations/AU_Set/Train_Set/*.txt or the like")

    def label_files(self, root: Path) -> list[Path]:
        """Text files of the training videos, then of the validation videos."""
        folder = first_folder(root, LABELS)
        return [path for name in SPLITS for path in find_files(folder / name, "*.txt")] if folder else []

    def recordings(self, root: Path, aus: Sequence[int]) -> Iterator[Recording]:
        """One recording per video (or person in it)."""
        for path in self.label_files(root):
            frames, codes = read_au_table(path, aus, frame_column=False)
            candidates = (index_pictures(root / name / path.stem) for name in PICTURES)
            yield Recording(
                subject=path.stem,
                sequence="",
                frames=frames,
                codes=codes,
                pictures=next((pictures for pictures in candidates if pictures), {}),
                landmarks=lambda problems, name=path.stem: read_landmarks(root, name, problems),  # type: ignore[misc]
                split=SPLITS[path.parent.name],
                source=str(path),
            )

    def write_tiny(self, root: Path) -> None:
        """Write three videos of eight frames; one frame is uncoded, another has no picture."""
        for video, folder in self.tiny_videos.items():
            codes = tiny.codes(8, video)[:, list(self.aus)]
            codes[4] = -1
            tiny.write_table(
                root / "annotations" / "AU_Set" / folder / f"{video}.txt",
                [f"AU{au}" for au in self.aus],
                codes,
            )
            points = {
                frame: tiny.draw_face(root / "cropped_aligned" / video / f"{frame:05d}.jpg", video, frame)
                for frame in range(1, 8)
            }
            tiny.write_landmarks(root, video, points)
