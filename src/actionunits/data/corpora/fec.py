"""FEC, the Google Facial Expression Comparison dataset: triplets of faces and the least similar one.

Only the pictures' addresses are distributed; files are expected under the last part of the address.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from actionunits.data.corpora import tiny
from actionunits.data.corpora.base import CheckReport, Corpus, Published, Selection
from actionunits.data.corpora.checking import compare, first_of, judge_rows, try_picture
from actionunits.data.corpora.reading import naming

FILES = {
    "train": "faceexp-comparison-data-train-public.csv",
    "test": "faceexp-comparison-data-test-public.csv",
}
FOLDERS = (".", "FEC_dataset")
PICTURES = "images"
OPENED = 100  # pictures opened by the check
TYPES = ("ONE_CLASS_TRIPLET", "TWO_CLASS_TRIPLET", "THREE_CLASS_TRIPLET")


class Fec(Corpus):
    """FEC (Vemulapalli and Agarwala, 2019)."""

    name = "fec"
    title = "FEC"
    subjects = False
    homepage = "https://research.google/resources/datasets/google-facial-expression/"
    licence = (
        "annotations for research, see the README of the download; pictures belong to their photographers"
    )
    citation = """\
@inproceedings{vemulapalli2019fec,
  title = {A compact embedding for facial expression similarity},
  author = {Vemulapalli, Raviteja and Agarwala, Aseem},
  booktitle = {CVPR}, pages = {5683--5692}, year = {2019}
}"""
    layout = """\
FEC/
  faceexp-comparison-data-train-public.csv   a row a triplet, no header: three times address, left, right,
  faceexp-comparison-data-test-public.csv    top, bottom (shares of width and height), then the type, then
                                             rater and choice (1, 2 or 3: the least alike), rater, choice ...
  images/12345_abcdef_b.jpg ...              pictures, named as at the end of their addresses"""
    traps = (
        "Many addresses are dead: triplets that lack a picture are left out, so copies have other counts.",
        "Boxes are left, right, top, bottom in the files; here they are xmin, ymin, xmax, ymax.",
        "Raters disagree: `choice` is that of two thirds of them, as in FEC's paper, else 0.",
    )
    published = {
        "all": Published(None, 499_518, "Vemulapalli and Agarwala: 449,142 triplets train, 50,376 test")
    }

    def recognize(self, root: Path) -> None:
        """Raise `WrongCorpusError` unless there is one of the two CSV files."""
        self.require(root, self.label_files(root), " or ".join(FILES.values()))

    def label_files(self, root: Path) -> list[Path]:
        """The CSV files that exist."""
        return [
            root / folder / name
            for name in FILES.values()
            for folder in FOLDERS
            if (root / folder / name).is_file()
        ]

    def picture_folders(self, root: Path) -> list[Path]:
        """The folder of the pictures, if it exists."""
        return [root / PICTURES] if (root / PICTURES).is_dir() else []

    def features(self, selection: Selection) -> Any:
        """Three pictures with a box each, and the raters' choice."""
        from datasets import Features, Image, List, Value

        return Features(
            {
                "images": List(Image(), length=3),
                "boxes": List(List(Value("float32"), length=4), length=3),  # relative to width and height
                "type": Value("string"),
                "choice": Value("int8"),  # 1, 2, 3: the least similar for two thirds of the raters; else 0
                "votes": List(Value("int8")),
                "split": Value("string"),
            }
        )

    def rows(self, root: Path, selection: Selection) -> Iterator[dict[str, Any]]:
        """Triplets whose three pictures exist, as dictionaries."""
        for path in self.label_files(root):
            for triplet in read_triplets(path, root / PICTURES):
                if all(Path(image).is_file() for image in triplet["images"]):
                    yield triplet

    def check(self, root: Path, folds_file: str | Path | None = None) -> CheckReport:
        """Count triplets, and those with all pictures; open about a hundred pictures."""
        root = Path(root)
        self.recognize(root)
        report, found = CheckReport(self.name, str(root)), Counter[str]()
        present = {
            path.name
            for folder in self.picture_folders(root)
            for path in folder.iterdir()
            if not path.name.startswith(".")  # macOS adds "._a_b.jpg" to "a_b.jpg" on other file systems
        }
        for path in self.label_files(root):
            for triplet in read_triplets(path, root / PICTURES):
                complete = all(Path(image).name in present for image in triplet["images"])
                found.update(
                    {f"triplets, {triplet['split']}": 1, "triplets with three pictures": int(complete)}
                )
        step = max(1, len(present) // OPENED)
        opened = [try_picture(root / PICTURES / name) for name in sorted(present)[::step]]
        report.problems += first_of([problem for problem in opened if problem])
        triplets = sum(count for name, count in found.items() if name.startswith("triplets, "))
        report.found = {**found, "pictures": len(present), "usable": found["triplets with three pictures"]}
        if missing := triplets - found["triplets with three pictures"]:
            report.problems.append(f"{missing} of {triplets} triplets lack a picture in {root / PICTURES}")
        report.published = {"all": compare(self.published["all"], None, triplets)}
        report.has = ["pictures"] if report.usable else []
        report.rows = judge_rows(self, report)
        return report

    def write_tiny(self, root: Path) -> None:
        """Write six training and two test triplets."""
        for split, count in (("train", 6), ("test", 2)):
            rows = []
            for i in range(count):
                row: list[object] = []
                for j in range(3):
                    name = f"{split}{i}_{j}_b.jpg"
                    tiny.draw_face(root / PICTURES / name, split, i, j)
                    row += [f"https://live.staticflickr.com/65535/{name}", 0.1, 0.9, 0.05, 0.95]
                rows.append([*row, TYPES[i % 3], "A", 1 + i % 3, "B", 1 + i % 3, "C", 1])
            tiny.write_table(root / FILES[split], rows[0], rows[1:])


def read_triplets(path: Path, pictures: Path) -> Iterator[dict[str, Any]]:
    """The triplets of a file, whether or not their pictures exist.

    Raises:
        ValueError: A row is not a triplet.
    """
    split = "train" if "train" in path.name else "test"
    with naming(path), path.open(newline="", encoding="utf-8-sig") as file:
        for number, row in enumerate(csv.reader(file), start=1):
            try:
                votes = [int(cell) for cell in row[17::2] if cell.strip()]
                boxes = [[float(row[i + k]) for k in (1, 3, 2, 4)] for i in (0, 5, 10)]
                if not votes or not set(votes) <= {1, 2, 3}:
                    raise ValueError(f"votes {votes}")
            except (ValueError, IndexError) as error:
                raise ValueError(f"{path}, row {number}, is not a triplet: {error}.") from error
            winner, count = Counter(votes).most_common(1)[0]
            yield {
                "images": [str(pictures / picture_name(row[i])) for i in (0, 5, 10)],
                "boxes": boxes,
                "type": row[15].strip(),
                "choice": winner if 3 * count >= 2 * len(votes) else 0,
                "votes": votes,
                "split": split,
            }


def picture_name(address: str) -> str:
    """The expected file name of the picture at an address."""
    return urlsplit(address.strip()).path.rpartition("/")[2]
