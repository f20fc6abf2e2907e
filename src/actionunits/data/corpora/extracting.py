"""Extract pictures from the videos of DISFA and GFT and from the table of MS-Celeb-1M.

Frames are numbered from 1 in decoding order, as in the label files.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from tqdm import tqdm

from actionunits.data.corpora import Corpus, WrongCorpusError
from actionunits.data.corpora.checking import first_of
from actionunits.data.corpora.ms_celeb import LIST, PICTURES, TABLE, read_list, read_table
from actionunits.data.corpora.reading import find_files
from actionunits.files import whole_file
from actionunits.video import DAMAGED, UNDECODABLE, VideoError, VideoReader

QUALITY = 95  # JPEG quality


def extract(corpus: Corpus, root: Path, output: Path | None = None) -> int:
    """Extract a corpus' pictures, or resume an interrupted extraction.

    Args:
        corpus: DISFA, GFT or MS-Celeb-1M.
        root: Folder of the corpus.
        output: Folder of the pictures; by default below `root`, where the reader looks for them.

    Returns:
        Number of pictures written.

    Raises:
        ValueError: The corpus is distributed with pictures.
        WrongCorpusError: The folder has no video or table.
        VideoError: Videos are broken or have damaged frames; everything else is extracted before.
        ImportError: PyAV, which reads videos, is not installed.
    """
    if corpus.name == "ms_celeb":
        return extract_faces(root, output or root / PICTURES[0])
    if not hasattr(corpus, "videos"):
        raise ValueError(f"{corpus.title} is distributed with pictures; there is nothing to extract.")
    videos = find_files((root / corpus.videos).parent, Path(corpus.videos).name)
    if not videos:
        raise WrongCorpusError(f"{root} has no {corpus.videos}; `actionunits corpus layout {corpus.name}`.")
    frames = output or root / "Frames"
    folder_of: Any = corpus.video_folder  # type: ignore[attr-defined]
    count, broken, damaged = 0, list[str](), list[str]()
    for video in videos:
        folder = frames / folder_of(video)
        try:
            written, left_out = extract_video(video, folder)
        except VideoError as error:
            broken.append(str(error))
            continue
        count += written
        if left_out:
            damaged.append(
                f"{video}: {', '.join(first_of([str(number) for number in left_out]))} in {folder}"
            )
    _report_problems(len(videos), count, broken, damaged)
    return count


def _report_problems(videos: int, written: int, broken: list[str], damaged: list[str]) -> None:
    problems = []
    if broken:
        problems.append(
            f"{len(broken)} of {videos} videos cannot be read, the others are done ({written} pictures "
            f"written); copy these again: {'; '.join(broken)}"
        )
    if damaged:
        problems.append(
            f"{len(damaged)} of {videos} videos have damaged frames, which are left out, all others are "
            f"written; if there is a better copy, remove the folder and repeat this: {'; '.join(damaged)}"
        )
    if problems:
        raise VideoError(". ".join(problems))


def extract_video(video: Path, folder: Path) -> tuple[int, list[int]]:
    """Write all frames of a video as 00001.jpg, 00002.jpg, ..., unless the folder exists.

    Returns:
        Number of pictures written, and the numbers of damaged frames, which have no picture.

    Raises:
        VideoError: The video is broken or truncated; no folder is left behind.
    """
    if folder.is_dir():
        return 0, []
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    count, damaged = 0, []
    try:
        reader = VideoReader(video, upright=False)  # labels and landmarks belong to the frames as stored
        for number, frame in enumerate(tqdm(reader, desc=video.name, unit="frame", disable=None), start=1):
            if frame.picture is not None:
                frame.picture.save(partial / f"{number:05d}.jpg", quality=QUALITY)
                count += 1
            elif str(frame.error).startswith((DAMAGED, UNDECODABLE)):
                damaged.append(number)
            else:
                raise VideoError(f"{video}, frame {number}: {frame.error}")
        if not count:
            raise VideoError(f"{video} has only damaged frames")
    except (VideoError, ImportError):
        shutil.rmtree(partial)
        raise
    os.replace(partial, folder)
    return count, damaged


def extract_faces(root: Path, folder: Path) -> int:
    """Extract the pictures of the cleaned list from MS-Celeb-1M's table; return their number."""
    for name in (LIST, TABLE):
        if not (root / name).is_file():
            raise WrongCorpusError(f"{root} has no {name}; `actionunits corpus layout ms_celeb`.")
    wanted, count = {name for name, _ in read_list(root / LIST)}, 0
    for name, data in tqdm(read_table(root / TABLE), desc=TABLE, unit="picture", disable=None):
        path = folder / name
        if name in wanted and not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as part:
                part.write_bytes(data)
            count += 1
    return count
