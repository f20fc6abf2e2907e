"""Publish a model folder on the Hub.

    python hub_upload.py FOLDER --repo org/name --dry-run     # all checks, and what would be sent; no network
    python hub_upload.py FOLDER --repo org/name --with-code   # also loads where this package is not installed

The folder is checked: files, card, weights, image processor, a run on a photograph. Then the files missing in
the repository are sent in one commit, read back, compared, and tagged. After an interruption the same command
sends the rest. Exit codes: 0 done, 1 refused or failed, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from transformers.utils import logging

import actionunits
from actionunits.publishing import HubUpload, PublishedFile, PublishError, list_files
from actionunits.publishing_checks import check_folder, folder_terms, stage_folder
from actionunits.publishing_terms import DataTerms

TEMPLATE = Path(__file__).parent / "model_cards" / "template.md"


def main(arguments: Sequence[str] | None = None) -> int:
    """Publish as the command line says, and return the exit code."""
    args = parse_arguments(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        staged = Path(scratch) / "model"

        def named(text: object) -> str:
            """Name the user's folder instead of the staged copy."""
            return str(text).replace(str(staged), str(args.folder))

        try:
            upload = HubUpload(args.repo)
            if not args.dry_run:
                print(f"Access to {args.repo} as {upload.check_access()}.")
            stage_folder(args.folder, staged, args.repo, args.with_code, TEMPLATE)
            if check_folder(staged, lambda name, problems: print_check(name, problems, named), TEMPLATE):
                raise PublishError("Nothing was sent: put right what is said above.")
            check_rights(folder_terms(staged), args)
            publish(upload, list_files(staged), args)
        except (PublishError, OSError, ValueError) as error:
            print(named(error), file=sys.stderr)
            return 1
    return 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="saved model with image processor and card"
    )
    parser.add_argument("--repo", required=True, metavar="ORG/NAME", help="repository on the Hub")
    parser.add_argument("--private", action="store_true", help="only members see it")
    parser.add_argument("--gated", choices=["no", "auto", "manual"], help="takers agree to the terms first")
    parser.add_argument("--with-code", action="store_true", help="make it work without this package, too")
    parser.add_argument(
        "--tag", default=f"v{actionunits.__version__}", help="name of this version (%(default)s)"
    )
    parser.add_argument("--dry-run", action="store_true", help="check and show; no network is used")
    parser.add_argument("--yes", action="store_true", help="do not ask before sending")
    parser.add_argument(
        "--i-hold-the-rights",
        action="store_true",
        help="I have read the agreement of the training data, and it lets me publish these weights",
    )
    args = parser.parse_args(arguments)
    if not args.folder.is_dir():
        parser.error(f"there is no folder {args.folder}.")
    if args.tag == "main" or not re.fullmatch(r"\w[\w.+/-]*", args.tag, re.ASCII):
        parser.error(f"{args.tag!r} cannot name a version; give --tag v1, or the like.")
    return args


def print_check(name: str, problems: list[str], named: Callable[[str], str]) -> None:
    """Print the problems that a check found, in the words of `named`."""
    print(f"{name}: {'ok' if not problems else ''}")
    for problem in problems:
        print(f"  - {named(problem)}")


def check_rights(terms: Sequence[DataTerms], args: argparse.Namespace) -> None:
    """Refuse weights of licensed data until the publisher confirms their rights and decides on gating.

    Raises:
        PublishError: An option is missing; the terms are printed before.
    """
    bound = [corpus for corpus in terms if not corpus.is_free]
    for corpus in bound:
        print(f"Trained on {corpus.name} (by {corpus.holder}). {corpus.terms}")
    if bound and not args.i_hold_the_rights:
        raise PublishError("Nothing was sent: if the terms let you publish, say --i-hold-the-rights.")
    if bound and args.gated is None:
        raise PublishError(
            "Nothing was sent: decide with --gated manual, auto or no whether takers must agree to the terms."
        )


def publish(upload: HubUpload, files: Sequence[PublishedFile], args: argparse.Namespace) -> None:
    """Print the plan, ask, send, read back, tag."""
    missing = list(files) if args.dry_run else upload.missing(files)
    print_plan(files, missing, args)
    if args.dry_run:
        print("Dry run: nothing was sent, no network was used.")
        return
    upload.check_weights(files)
    upload.check_tag(args.tag, is_complete=not missing)
    if not args.yes and not agreed():
        raise PublishError("Nothing was sent.")
    upload.create(args.private, None if args.gated == "no" else args.gated)
    commit = upload.send(missing, f"Add {args.folder.name}, {args.tag}")
    upload.read_back(files, commit)
    upload.tag(args.tag, commit)
    print(f"Published as {args.repo}@{args.tag}, commit {commit}; read back, all hashes are equal.")


def print_plan(
    files: Sequence[PublishedFile], missing: Sequence[PublishedFile], args: argparse.Namespace
) -> None:
    """Print every file with its size and whether it is to be sent."""
    for file in files:
        state = "send" if file in missing else "is there"
        print(f"  {state:<9} {file.size:>13,} bytes  {file.sha256[:12]}  {file.name}")
    total = sum(file.size for file in missing)
    access = (
        f"{'private' if args.private else 'public'}, {f'gated: {args.gated}' if args.gated else 'not gated'}"
    )
    print(f"{len(missing)} of {len(files)} files, {total:,} bytes, to {args.repo} ({access}), tag {args.tag}")


def agreed() -> bool:
    """Ask on the terminal; without one the answer is no."""
    if not sys.stdin.isatty():
        print("Nobody is there to ask; say --yes.")
        return False
    return input("Send? [y/N] ").strip().lower() in ("y", "yes")


if __name__ == "__main__":
    sys.exit(main())
