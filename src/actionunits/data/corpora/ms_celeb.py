"""MS-Celeb-1M: faces of celebrities, for pretraining ESCDA's backbone on face recognition."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from actionunits.data.corpora import tiny
from actionunits.data.corpora.base import CheckReport, Corpus, Published, Selection
from actionunits.data.corpora.checking import compare, first_of, judge_rows, try_picture
from actionunits.data.corpora.reading import naming

LIST = "MS-Celeb-1M_clean_list.txt"
TABLE = "FaceImageCroppedWithAlignment.tsv"
PICTURES = ("FaceImageCroppedWithAlignment", "images", ".")
LOOKED_FOR = 1000  # evenly spaced pictures of the list that the check looks for
OPENED = 100  # of them that it opens


class MsCeleb(Corpus):
    """The pictures of MS-Celeb-1M (Guo et al., 2016) in LightCNN's cleaned list."""

    name = "ms_celeb"
    title = "MS-Celeb-1M"
    homepage = "https://www.microsoft.com/en-us/research/project/ms-celeb-1m-challenge-recognizing-one-million-celebrities-real-world/"
    licence = "withdrawn by Microsoft in 2019: only for holders of a copy who may use it"
    citation = """\
@inproceedings{guo2016msceleb,
  title = {{MS-Celeb-1M}: a dataset and benchmark for large-scale face recognition},
  author = {Guo, Yandong and Zhang, Lei and Hu, Yuxiao and He, Xiaodong and Gao, Jianfeng},
  booktitle = {ECCV}, pages = {87--102}, year = {2016}
}"""
    layout = """\
MS-Celeb-1M/
  MS-Celeb-1M_clean_list.txt           a line a picture: m.0109kg/14-FaceId-0.jpg 0 (path, person)
  FaceImageCroppedWithAlignment/m.0109kg/14-FaceId-0.jpg ...   the aligned faces
  FaceImageCroppedWithAlignment.tsv    the disc's own form; `actionunits corpus extract ms_celeb DIR`
                                       makes the pictures of the list from it"""
    traps = (
        "The corpus has many wrong names: only the cleaned list of LightCNN (79,077 people, 5,049,824 "
        "pictures) is read.",
        "The people in it did not consent. Consider that before you use it.",
    )
    published = {"all": Published(79_077, 5_049_824, "the cleaned list of LightCNN")}

    def recognize(self, root: Path) -> None:
        """Raise `WrongCorpusError` unless there is the cleaned list."""
        self.require(root, self.label_files(root), LIST)

    def label_files(self, root: Path) -> list[Path]:
        """The cleaned list."""
        return [root / LIST] if (root / LIST).is_file() else []

    def picture_folders(self, root: Path) -> list[Path]:
        """The folder of the pictures; the corpus' own folder if there is no other."""
        return [root / name for name in PICTURES if (root / name).is_dir()][:1]

    def features(self, selection: Selection) -> Any:
        """Picture, and name and number of the person."""
        from datasets import Features, Image, Value

        return Features(
            {"image": Image(), "subject": Value("string"), "label": Value("int32"), "split": Value("string")}
        )

    def rows(self, root: Path, selection: Selection) -> Iterator[dict[str, Any]]:
        """Pictures of the list as dictionaries; their files need not exist."""
        folder = self.picture_folders(root)[0]
        for name, label in read_list(root / LIST):
            yield {
                "image": str(folder / name),
                "subject": name.partition("/")[0],
                "label": label,
                "split": "",
            }

    def check(self, root: Path, folds_file: str | Path | None = None) -> CheckReport:
        """Count the list's people and pictures, look for a thousand of its files and open a hundred."""
        root = Path(root)
        self.recognize(root)
        people, pictures = set(), 0
        for _, label in read_list(root / LIST):
            people.add(label)
            pictures += 1
        step = max(1, pictures // LOOKED_FOR)
        folder = self.picture_folders(root)[0]
        sample = [folder / name for name, _ in islice(read_list(root / LIST), 0, None, step)]
        missing = [f"{path} is missing" for path in sample if not path.is_file()]
        report = CheckReport(self.name, str(root))
        report.found = {
            "people": len(people),
            "pictures of the list": pictures,
            "files looked for": len(sample),
            "files found": len(sample) - len(missing),
            "usable": len(sample) - len(missing),
        }
        broken = [try_picture(path) for path in sample[:: max(1, len(sample) // OPENED)] if path.is_file()]
        report.problems = first_of(missing) + first_of([problem for problem in broken if problem])
        if missing and (root / TABLE).is_file():
            report.problems.append(
                f"{TABLE} is there: `actionunits corpus extract ms_celeb {root}` writes its pictures"
            )
        report.published = {"all": compare(self.published["all"], len(people), pictures)}
        report.has = ["pictures"] if report.usable else []
        report.rows = judge_rows(self, report)
        return report

    def write_tiny(self, root: Path) -> None:
        """Write six pictures of each of four people."""
        lines = []
        for label in range(4):
            for i in range(6):
                name = f"m.01{label}abc/{i}-FaceId-0.jpg"
                tiny.draw_face(root / PICTURES[0] / name, label, i, size=(112, 112))
                lines.append(f"{name} {label}\n")
        (root / LIST).write_text("".join(lines))


def read_list(path: Path) -> Iterator[tuple[str, int]]:
    """Path of the picture and number of the person in each line."""
    with naming(path), path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            name, _, label = line.strip().rpartition(" ")
            if not name or not label.isdecimal():
                raise ValueError(f"{path}, line {number}: {line.strip()!r} is no 'PATH NUMBER'.")
            yield name, int(label)


def read_table(path: Path) -> Iterator[tuple[str, bytes]]:
    """Path of the picture as in the list, and its encoded bytes, in each line of the distributed table.

    Raises:
        ValueError: A line is incomplete.
    """
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                person, rank, _, _, face, _, *_, picture = line.rstrip("\n").split("\t")
                yield f"{person}/{rank}-{face}.jpg", base64.b64decode(picture)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}, is incomplete: {error}; copy it again.") from error
