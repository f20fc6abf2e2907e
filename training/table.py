"""The rows of the papers' result tables that recipes stand for: command, target, and what was obtained.

    python training/table.py                # prints the table
    python training/table.py --runs runs    # with the figures of the runs that are there
    python training/table.py --write        # puts it into training/README.md, as a test expects it there

A row is obtained where RUNS/NAME holds `metrics-test.json`, or folders `fold-*` that do: then it is the mean
over folds. All figures are mean F1-frame in percent at a threshold of 0.5.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from actionunits.data.protocols import PROTOCOLS
from actionunits.evaluation import mean_over_folds
from recipe import load_recipe, load_variants

HERE = Path(__file__).parent
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
    if not args.write:
        print(table)
        return
    readme = HERE / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    partial = readme.with_name("README.md.partial")
    partial.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    partial.replace(readme)


def make_table(runs: Path | None = None) -> str:
    """The table as Markdown; `runs` is searched for what was obtained."""
    lines = ["| row | command | target | obtained |", "|---|---|---:|---:|"]
    for name, table, command, target in rows():
        found = obtained(runs / name) if runs else None
        shown = "not run here" if found is None else f"{found:.1f}"
        lines.append(f"| {table}: {name} | `{command}` | {target:.1f} | {shown} |")
    return "\n".join(lines)


def rows() -> Iterator[tuple[str, str, str, float]]:
    """Name, table of the paper, command and target of every recipe with a target and of its variants."""
    for path in sorted((HERE / "recipes").glob("*.yaml")):
        for variant in ("", *load_variants(path)):
            recipe = load_recipe(path, variant=variant)
            if recipe.paper.mean:
                chosen = f" --variant {variant}" if variant else ""
                if corpus_of(path.stem) in PROTOCOLS and recipe.split.fold != "all":
                    chosen += f" --folds {' '.join(folds_of(corpus_of(path.stem)))}"
                command = f"python training/train.py --recipe training/recipes/{path.name}{chosen}"
                command += f" --data prepared/{corpus_of(path.stem)} --output runs/{recipe.name}"
                yield recipe.name, recipe.paper.table, command, recipe.paper.mean


def folds_of(corpus: str) -> list[str]:
    """The folds of a corpus in its default numbering."""
    protocol = PROTOCOLS[corpus]
    return list(protocol.numberings.get(protocol.default, protocol.groups))


def corpus_of(name: str) -> str:
    """The corpus in a recipe's name: "bp4d" in "lsc-bp4d"."""
    return name.partition("-")[2]


def obtained(run: Path) -> float | None:
    """Mean F1 in percent of a run or of its folds; None where there is none."""
    files = sorted(run.glob("fold-*/metrics-test.json")) or [*run.glob("metrics-test.json")]
    if not files:
        return None
    report = mean_over_folds([json.loads(file.read_text(encoding="utf-8")) for file in files])
    return 100 * report["at_half"]["mean"]["f1"]


if __name__ == "__main__":
    main()
