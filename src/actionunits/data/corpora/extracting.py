"""Pictures out of what a disc has instead: frames of videos (DISFA, GFT), faces of MS-Celeb-1M's table.

Frames are numbered from 1 in the order of decoding, as the label files count them.
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

QUALITY = 95  # of the JPEG files


def extract(corpus: Corpus, root: Path, output: Path | None = None) -> int:
    """Write a corpus' pictures, or go on where an interrupted run stopped.

    Args:
        corpus: DISFA, GFT or MS-Celeb-1M.
        root: Its folder.
        output: Where the pictures go; by default into the corpus' folder, where the reader looks for them.

    Returns:
        Number of pictures written.

    Raises:
        ValueError: The corpus comes with pictures.
        WrongCorpusError: The folder holds no video, or not the table.
        VideoError: Videos that are broken, or have damaged frames, after all else was extracted.
        ImportError: PyAV is missing, for videos.
    """
    if corpus.name == "ms_celeb":
        return extract_faces(root, output or root / PICTURES[0])
    if not hasattr(corpus, "videos"):
        raise ValueError(f"{corpus.title} is read from pictures as it comes; there is nothing to extract.")
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
    problems = []
    if broken:
        problems.append(
            f"{len(broken)} of {len(videos)} videos cannot be read, the others are done ({count} pictures "
            f"written); copy these again: {'; '.join(broken)}"
        )
    if damaged:
        problems.append(
            f"{len(damaged)} of {len(videos)} videos have damaged frames, which are left out, all others are "
            f"written; if there is a better copy, remove the folder and repeat this: {'; '.join(damaged)}"
        )
    if problems:
        raise VideoError(". ".join(problems))
    return count


def extract_video(video: Path, folder: Path) -> tuple[int, list[int]]:
    """Write all frames of a video as 00001.jpg, 00002.jpg, ...; a folder that is there is complete.

    Returns:
        Number of pictures written, and the numbers of the frames that are damaged; these have no picture, and
        the others keep their numbers.

    Raises:
        VideoError: The video is broken or cut off; then there is no folder.
    """
    if folder.is_dir():
        return 0, []
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    count, damaged = 0, []
    try:
        reader = VideoReader(video, upright=False)  # labels and points are of the frames as they are stored
        for number, frame in enumerate(tqdm(reader, desc=video.name, unit="frame", disable=None), start=1):
            if frame.picture is not None:
                frame.picture.save(partial / f"{number:05d}.jpg", quality=QUALITY)
                count += 1
            elif str(frame.error).startswith((DAMAGED, UNDECODABLE)):
                damaged.append(number)
            else:
                raise VideoError(f"{video}, frame {number}: {frame.error}")
        if not count:
            raise VideoError(f"{video} has damaged frames only")
    except (VideoError, ImportError):
        shutil.rmtree(partial)
        raise
    os.replace(partial, folder)
    return count, damaged


def extract_faces(root: Path, folder: Path) -> int:
    """Write the pictures of the cleaned list out of MS-Celeb-1M's table."""
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
