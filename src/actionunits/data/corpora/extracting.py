"""Pictures out of what a disc has instead: frames of videos (DISFA, GFT), faces of MS-Celeb-1M's table.

Frames are numbered from 1 in the order of decoding, as the label files count them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from actionunits.data.corpora import Corpus, WrongCorpusError
from actionunits.data.corpora.ms_celeb import LIST, PICTURES, TABLE, read_list, read_table
from actionunits.data.corpora.reading import find_files
from actionunits.video import VideoError

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
        VideoError: Videos that are broken, after all others were extracted.
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
    count, broken = 0, list[str]()
    for video in videos:
        try:
            count += extract_video(video, frames / folder_of(video))
        except VideoError as error:
            broken.append(str(error))
    if broken:
        raise VideoError(
            f"{len(broken)} of {len(videos)} videos cannot be read, the others are done ({count} pictures "
            f"written); copy these again: {'; '.join(broken)}"
        )
    return count


def extract_video(video: Path, folder: Path) -> int:
    """Write all frames of a video as 00001.jpg, 00002.jpg, ...; a folder that is there is complete."""
    if folder.is_dir():
        return 0
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    count = 0
    try:
        for count, picture in enumerate(
            tqdm(_frames(video), desc=video.name, unit="frame", disable=None), start=1
        ):
            picture.save(partial / f"{count:05d}.jpg", quality=QUALITY)
        if not count:
            raise VideoError(f"{video} holds not a single frame")
    except VideoError:
        shutil.rmtree(partial)
        raise
    os.replace(partial, folder)
    return count


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
            partial = path.with_suffix(".partial")
            partial.write_bytes(data)
            os.replace(partial, path)
            count += 1
    return count


def _frames(video: Path) -> Iterator[Any]:
    try:
        import av
    except ImportError as error:
        raise ImportError('reading videos needs PyAV: pip install "actionunits[video]".') from error
    try:
        with av.open(os.path.abspath(video)) as container:
            for frame in container.decode(video=0):
                yield frame.to_image()
    except (av.FFmpegError, IndexError) as error:  # IndexError: no stream of pictures
        raise VideoError(f"{video}: {error}") from error
