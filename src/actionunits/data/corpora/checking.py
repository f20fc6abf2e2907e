"""Check a folder of a corpus: compare counts with the published ones, and find the results it allows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from actionunits.data.corpora.base import AUCorpus, CheckReport, Corpus, Published, Recording
from actionunits.data.protocols import PROTOCOLS, get_protocol, rows_of_tables
from actionunits.landmarks import check_inside

if TYPE_CHECKING:
    from collections.abc import Sequence

SHOWN = 3  # examples per problem


def check_frames(corpus: AUCorpus, root: Path, folds_file: str | Path | None = None) -> CheckReport:
    """Count subjects, recordings, frames, pictures and landmarks; open three pictures of each recording."""
    lists: dict[str, set | None] = {"all": None}
    lists |= {
        name: corpus.listed_frames(root, name) for name in corpus.frame_lists if _has_list(corpus, root, name)
    }
    listed: dict[str, Counter[str]] = {name: Counter() for name in lists}
    found: Counter[str] = Counter()
    broken: list[str] = []
    people, splits = set[str](), set[str]()  # with pictures
    bar = tqdm(
        corpus.recordings(root, corpus.evaluated_aus(root)),
        desc=f"checking {corpus.name}",
        unit="recording",
        disable=None,
    )
    for recording in bar:
        occurrence, _ = corpus.labels(recording, min_intensity=2)
        for name, counter in listed.items():
            counter[recording.subject] += len(corpus.chosen(recording, occurrence, lists[name]))
        frames = recording.frames[corpus.chosen(recording, occurrence, None)].tolist()
        counts = _count(recording, frames, broken)
        found.update(counts)
        if counts["frames with a picture"]:
            people.add(recording.subject)
            splits.add(recording.split)
    report = CheckReport(corpus.name, str(root))
    report.found = {"subjects": len(+listed["all"]), **found, "usable": found["frames with a picture"]}
    report.published = {
        name: compare(published, len(+listed[name]), listed[name].total())
        if name in listed
        else compare(published)
        for name, published in corpus.published.items()
    }
    report.problems = shortfalls(report.found) + first_of(broken)
    report.has = _abilities(corpus, report, splits, listed, people, folds_file)
    report.rows = judge_rows(corpus, report)
    return report


def _count(recording: Recording, frames: list[int], broken: list[str]) -> dict[str, int]:
    """Numbers of labelled frames of a recording, with pictures and landmarks; problems go to `broken`."""
    points = recording.landmarks(broken)
    pictured = [frame for frame in frames if frame in recording.pictures]
    broken += try_pictures(recording, pictured, points)
    if not len(recording.frames):
        broken.append(f"{recording.source} labels no frame")
    return {
        "recordings": 1,
        "labelled frames": len(frames),
        "frames with a picture": len(pictured),
        "frames with landmarks": sum(frame in points for frame in pictured),
    }


def judge_rows(corpus: Corpus, report: CheckReport) -> list[dict[str, Any]]:
    """The rows of the papers' tables on this corpus, each with what it `lacks` to be runnable."""
    rows = []
    for row in rows_of_tables(corpus.name):
        others = [name for name in row["corpora"] if name != corpus.name]
        lacks = [NEEDS.get(need, need) for need in row["needs"] if need not in report.has]
        rows.append({**row, "runnable": report.usable and not lacks, "lacks": lacks, "also_needs": others})
    return rows


NEEDS = {
    "landmarks": "landmarks (`actionunits corpus prepare --landmarks detect` finds others)",
    "folds": "subjects in every fold",
    "split": "the official partition",
    "folds-file": "the subject lists of its folds, which are not published; pass a folds file",
    "jaanet": "the frame list of PyTorch-JAANet",
}


def compare(published: Published, subjects: int | None = None, frames: int | None = None) -> dict[str, Any]:
    """Counts found beside the published ones; None where they cannot be counted."""
    return {
        "subjects": published.subjects,
        "frames": published.frames,
        "source": published.source,
        "about": published.about,
        "found_subjects": subjects,
        "found_frames": frames,
    }


def shortfalls(found: dict[str, int]) -> list[str]:
    """Numbers of labelled frames without picture or landmarks, in words."""
    labelled, pictured = found.get("labelled frames", 0), found.get("frames with a picture", 0)
    problems = []
    if pictured < labelled:
        problems.append(f"{labelled - pictured} of {labelled} labelled frames have no picture")
    if (missing := pictured - found.get("frames with landmarks", 0)) > 0:
        problems.append(f"{missing} of {pictured} frames with a picture have no landmarks")
    return problems


def try_pictures(recording: Recording, frames: Sequence[int], points: dict[int, np.ndarray]) -> list[str]:
    """Problems with the first, middle and last picture of a recording or their landmarks."""
    chosen = sorted({frames[0], frames[len(frames) // 2], frames[-1]}) if frames else []
    found = (try_picture(recording.pictures[frame], points.get(frame)) for frame in chosen)
    return [problem for problem in found if problem]


def try_picture(path: Path, points: np.ndarray | None = None) -> str:
    """The problem with a picture or its landmarks (L, 2); "" if there is none."""
    try:
        with Image.open(path) as picture:
            picture.load()
            if points is not None:
                check_inside(points, *picture.size)
    except Exception as error:  # Pillow's decoders raise exceptions of many kinds
        return f"{path}: {error}"
    return ""


def first_of(problems: list[str]) -> list[str]:
    """The first problems, and the number of others."""
    more = [f"... and {len(problems) - SHOWN} more like these"] if len(problems) > SHOWN else []
    return problems[:SHOWN] + more


def _has_list(corpus: AUCorpus, root: Path, name: str) -> bool:
    return any(root.glob(corpus.frame_lists[name]))


def _abilities(
    corpus: AUCorpus,
    report: CheckReport,
    splits: set[str],
    listed: Iterable[str],
    people: set[str],
    folds_file: str | Path | None,
) -> list[str]:
    """The `NEEDS` that the folder fulfils."""
    found = report.found
    has = [name for name in listed if name != "all"]
    if found["usable"]:
        has.append("pictures")
    if found["usable"] and found["frames with landmarks"] >= 0.9 * found["usable"]:  # trackers lose a few
        has.append("landmarks")
    if corpus.official_split and len(splits - {""}) > 1:
        has.append("split")
    protocols = {
        "folds": PROTOCOLS.get(corpus.name),
        "folds-file": folds_file and get_protocol(corpus.name, folds_file),
    }
    for ability, protocol in protocols.items():
        if protocol and all(people.intersection(group) for group in protocol.groups.values()):
            has.append(ability)
    return has
