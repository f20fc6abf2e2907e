"""The command `actionunits corpus`: the layout of corpora, checks of your copies, and their preparation.

    actionunits corpus list
    actionunits corpus layout NAME [--write DIR]
    actionunits corpus check NAME DIR [--folds FILE] [--strict] [--json]
    actionunits corpus extract NAME DIR [--output DIR]
    actionunits corpus prepare NAME DIR --output DIR [--size 200] [--landmarks disc|detect|either] ...

Exit codes: 0 it worked, 1 the folder is not that corpus or nothing in it can be used, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from actionunits.data.corpora import CORPORA, CheckReport, Corpus, get_corpus


def add_corpus_command(commands: Any) -> None:
    """Add `corpus` and its verbs to the parser of the command line."""
    corpus = commands.add_parser(
        "corpus",
        help="layout, check and preparation of BP4D, DISFA and other corpora",
        description="Corpora on your own discs: what is expected, what is there, and its preparation.",
        epilog="Exit codes: 0 it worked, 1 the folder is not that corpus or of no use, 2 wrong usage.",
    )
    verbs = corpus.add_subparsers(required=True, metavar="VERB")
    _verb(verbs, "list", "name the corpora", _list)
    layout = _verb(verbs, "layout", "show what a disc must look like", _layout, named=True)
    layout.add_argument("--write", type=Path, metavar="DIR", help="write a tiny disc of this form into DIR")
    check = _verb(verbs, "check", "say what a disc has, and which results it allows", _check, named=True)
    check.add_argument("dir", type=Path, metavar="DIR", help="folder of the corpus")
    check.add_argument("--folds", type=Path, metavar="FILE", help="subject lists of folds: CSV subject,fold")
    check.add_argument("--strict", action="store_true", help="fail unless all published frames are there")
    check.add_argument("--json", action="store_true", help="print the report as JSON")
    extract = _verb(verbs, "extract", "write the pictures of videos or tables", _extract, named=True)
    extract.add_argument("dir", type=Path, metavar="DIR", help="folder of the corpus")
    extract.add_argument("--output", type=Path, metavar="DIR", help="where they go; by default into DIR")
    _add_prepare(verbs)


def _add_prepare(verbs: Any) -> None:
    prepare = _verb(verbs, "prepare", "align all faces once, for training", _prepare, named=True)
    prepare.add_argument("dir", type=Path, metavar="DIR", help="folder of the corpus")
    prepare.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the result")
    prepare.add_argument("--size", type=int, default=200, help="pixels a side of the aligned face (200)")
    prepare.add_argument("--margin", type=int, default=20, help="pixels kept around it (20)")
    prepare.add_argument("--alignment", default="level_eyes", choices=["level_eyes", "five_point", "none"])
    prepare.add_argument("--landmarks", default="disc", choices=["disc", "detect", "either"])
    prepare.add_argument("--frames", default="all", help="all, a published list, or a file of a list")
    prepare.add_argument("--min-intensity", type=int, default=2, help="from which an AU occurs (DISFA; 2)")
    prepare.add_argument("--workers", type=int, help="threads")


def _verb(
    verbs: Any, name: str, text: str, run: Callable[[argparse.Namespace], int], named: bool = False
) -> argparse.ArgumentParser:
    parser = verbs.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    parser.set_defaults(run=lambda args: _guarded(run, args))
    if named:
        parser.add_argument("name", metavar="NAME", choices=list(CORPORA), help=", ".join(CORPORA))
    return parser


def _guarded(run: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Report problems of a corpus in a sentence instead of a traceback."""
    try:
        return run(args)
    except BrokenPipeError:  # an OSError, but not of the corpus
        raise
    except (OSError, ValueError, ImportError) as error:
        print(f"actionunits corpus: {error}", file=sys.stderr)
        return 1


def _list(args: argparse.Namespace) -> int:
    for corpus in CORPORA.values():
        counts = next(iter(corpus.published.values()), None)
        size = (
            f"{counts.subjects or '-':>7} people {counts.frames:>10,} samples"
            if counts and counts.frames
            else ""
        )
        print(f"{corpus.name:<11} {corpus.title:<26} {size}".rstrip())
    return 0


def _layout(args: argparse.Namespace) -> int:
    corpus = get_corpus(args.name)
    if args.write is not None:
        if args.write.exists() and any(args.write.iterdir()):
            raise ValueError(f"{args.write} is not empty; name a new folder.")
        corpus.write_tiny(args.write)
        print(f"wrote a tiny {corpus.title} with drawn faces into {args.write}")
        return 0
    print(corpus.layout)
    print("\nWhat to know:")
    for trap in corpus.traps:
        print(_wrapped(trap))
    for name, counts in corpus.published.items():
        people = f"{counts.subjects:,} people, " if counts.subjects else ""
        print(
            _wrapped(f"{name}: {people}{'about ' * counts.about}{counts.frames:,} samples ({counts.source})")
        )
    if corpus.homepage:
        print(f"\nHomepage: {corpus.homepage}\nLicence: {corpus.licence}\n\n{corpus.citation}".rstrip())
    return 0


def _check(args: argparse.Namespace) -> int:
    corpus = get_corpus(args.name)
    report = corpus.check(args.dir, args.folds)
    if args.json:
        print(json.dumps(report.to_dict(), indent=1))
    else:
        _print_report(corpus, report)
    if not report.usable:
        print(f"nothing in {args.dir} can be used", file=sys.stderr)
    return int(not (report.complete if args.strict else report.usable))


def _print_report(corpus: Corpus, report: CheckReport) -> None:
    print(f"{report.folder} holds {corpus.title}:")
    for what, count in report.found.items():
        if what != "usable":
            print(f"  {count:>10,} {what}")
    for name, counts in report.published.items():
        about = "about " * counts["about"]
        found = "not on this disc" if counts["found_frames"] is None else f"{counts['found_frames']:,} here"
        if counts["found_subjects"] is not None:
            found += f", of {counts['found_subjects']:,} of {counts['subjects']:,} people"
        print(f"Published, {name}: {about}{counts['frames']:,} ({counts['source']}); {found}.")
    for problem in report.problems:
        print(f"Problem: {problem}.")
    if report.rows:
        print("Results of papers that this disc allows:")
    for row in report.rows:
        mark = "yes" if row["runnable"] else "no "
        why = f" Lacks {'; '.join(row['lacks'])}." if row["lacks"] else ""
        others = f" With {' and '.join(row['also_needs'])}." if row["also_needs"] else ""
        print(f"  {mark} {row['paper']}, {row['table']}: {row['method']}.{others}{why}")


def _extract(args: argparse.Namespace) -> int:
    from actionunits.data.corpora.extracting import extract

    count = extract(get_corpus(args.name), args.dir, args.output)
    print(f"wrote {count:,} pictures")
    return 0


def _prepare(args: argparse.Namespace) -> int:
    from actionunits.data.preparing import prepare_corpus

    prepared = prepare_corpus(
        args.name,
        args.dir,
        args.output,
        aligned_size=args.size,
        margin=args.margin,
        alignment=args.alignment,
        landmarks=args.landmarks,
        workers=args.workers,
        frames=args.frames,
        min_intensity=args.min_intensity,
    )
    people = len(set(prepared.faces.people))
    left_out = len(prepared.faces.skipped)
    print(f"{args.output}: {len(prepared.faces):,} faces of {people} people, {left_out} left out")
    return 0


def _wrapped(text: str, width: int = 100) -> str:
    return textwrap.fill(text, width, initial_indent="- ", subsequent_indent="  ")
