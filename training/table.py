"""The rows of the papers' result tables that recipes stand for: command, target, and what was obtained.

    python training/table.py                # prints the table
    python training/table.py --runs runs    # with the figures of the runs that are there
    python training/table.py --write        # puts it into training/README.md, as a test expects it there

A row is obtained where RUNS/NAME holds `metrics-test.json` (`-validation` where the corpus has that part,
`-full` where all of another corpus is measured), or folders `fold-*` that do: then it is the mean
over folds. All figures are mean F1-frame in percent at a threshold of 0.5.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from actionunits.data.protocols import CROSSINGS, PROTOCOLS
from actionunits.evaluation import mean_over_folds
from actionunits.files import whole_file
from recipe import Recipe, load_recipe, load_variants

HERE = Path(__file__).parent
OWN_FOLDS = {"casme2": 4, "bp4d_plus": 3}
"""Folds of papers that publish no lists of them, and their number; `split.folds_file` is the user's own."""
BEGIN, END = "<!-- begin: python training/table.py --write -->", "<!-- end -->"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, or write it into the README."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, help="folder of runs, each named after its recipe")
    parser.add_argument("--write", action="store_true", help="into training/README.md")
    args = parser.parse_args(arguments)
    table = make_table(args.runs)
    if args.write:
        write_between(HERE / "README.md", BEGIN, table, END)
    else:
        print(table)


def write_between(file: Path, begin: str, text: str, end: str) -> None:
    """Replace what stands between two marks in a file."""
    before, _, rest = file.read_text(encoding="utf-8").partition(begin)
    with whole_file(file) as part:
        part.write_text(f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}", encoding="utf-8")


def make_table(runs: Path | None = None) -> str:
    """The table as Markdown; `runs` is searched for what was obtained."""
    lines = ["| row | command | target | obtained |", "|---|---|---:|---:|"]
    for name, table, command, target in rows():
        found = (obtained(runs / name) if runs else "") or "not run here"
        lines.append(f"| {table}: {name} | `{command}` | {target:.1f} | {found} |")
    return "\n".join(lines)


def rows() -> Iterator[tuple[str, str, str, float]]:
    """Name, table of the paper, command and target of every recipe with a target and of its variants."""
    for path in sorted((HERE / "recipes").glob("*.yaml")):
        for variant in ("", *load_variants(path)):
            recipe = load_recipe(path, variant=variant)
            if recipe.paper.mean:
                chosen = f"{path.name} --variant {variant}" if variant else path.name
                command = " && ".join(commands(recipe, chosen, corpus_of(path.stem)))
                yield recipe.name, recipe.paper.table, command, recipe.paper.mean


def commands(recipe: Recipe, chosen: str, corpus: str) -> list[str]:
    """The training with its test people and, for a crossing, the measuring on the other corpus instead."""
    crossing, run = CROSSINGS.get(recipe.crossing), f"runs/{recipe.name}"
    source = crossing.source if crossing else corpus
    folds = [] if recipe.split.fold == "all" else folds_of(source)
    training = ["python training/train.py --recipe", f"training/recipes/{chosen}"]
    training += ["--folds", *folds] if folds else []
    training += [f"--set split.folds_file={source}-folds.csv"] if source in OWN_FOLDS else []
    training += [f"--data {prepared(source, recipe)} --output", f"{run}/network" if crossing else run]
    if not crossing:
        return [" ".join(training)]
    models = f"{run}/network/fold-*/model" if folds else f"{run}/network/model"
    measuring = [f"python training/evaluate.py --model {models} --data {prepared(crossing.target, recipe)}"]
    measuring += ["--fold", *folds_of(crossing.target)] if crossing.folds == crossing.target else []
    measuring += ["--split", "full" if crossing.test == "all" else crossing.test, "--output", run]
    return [" ".join(training), " ".join(measuring)]


def prepared(corpus: str, recipe: Recipe) -> str:
    """Where the README prepares a corpus in the recipe's size."""
    size = recipe.geometry.aligned_size
    return f"prepared/{corpus}" if size == 200 else f"prepared/{corpus}-{size}"


def folds_of(corpus: str) -> list[str]:
    """The folds of a corpus in its default numbering, or those of the papers' own; none of a partition."""
    if corpus in OWN_FOLDS:
        return [str(fold) for fold in range(1, OWN_FOLDS[corpus] + 1)]
    protocol = PROTOCOLS.get(corpus)
    return list(protocol.numberings.get(protocol.default, protocol.groups)) if protocol else []


def corpus_of(name: str) -> str:
    """The corpus in a recipe's name: "bp4d" in "lsc-bp4d", "bp4d_plus" in "gtlenet-bp4d+"."""
    return name.partition("-")[2].replace("+", "_plus").replace("-", "_")


def obtained(run: Path) -> str:
    """Mean F1 in percent of a run, or of its folds and how many there are; "" where there is none."""
    folds = sorted(run.glob("fold-*/metrics-test.json"))
    wholes = (run / f"metrics-{split}.json" for split in ("test", "validation", "full"))
    files = folds or [path for path in wholes if path.is_file()][:1]
    if not files:
        return ""
    report = mean_over_folds([json.loads(file.read_text(encoding="utf-8")) for file in files])
    count = f" ({len(folds)} fold{'s' * (len(folds) > 1)})" if folds else ""
    return f"{100 * report['at_half']['mean']['f1']:.1f}{count}"


if __name__ == "__main__":
    main()
