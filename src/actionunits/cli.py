"""The command `actionunits`.

    actionunits detect PHOTO... | --sample [--output DIR] [--json] [--csv] [--maps] [--model NAME]
    actionunits video VIDEO... [--csv] [--parquet] [--overlay] [--timeline] [--output DIR] [--model NAME]
    actionunits corpus list | layout | check | extract | prepare ...
    actionunits export FOLDER --onnx | --code

Exit codes: 0 every photo or video had a face, 1 one could not be read or had no face, 2 wrong usage,
130 interrupted with Ctrl-C, 141 broken pipe.
"""

import argparse
import csv
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from actionunits.cli_common import add_model_options, check_inputs_stay, load_pipeline, stems
from actionunits.cli_corpus import add_corpus_command
from actionunits.cli_export import add_export_command
from actionunits.cli_video import add_video_command
from actionunits.files import whole_file
from actionunits.image_processing_au import decision_thresholds
from actionunits.pictures import load_picture, sample_photo
from actionunits.video_tables import EDGES
from actionunits.visualization import draw_faces, draw_maps

_BAR_LENGTH = 20  # [characters]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    args = _parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # the terminal may not know all letters of file names
        sys.stdout.reconfigure(errors="backslashreplace")
    return args.run(args)


def console() -> int:
    """Run the command for the shell: without a traceback for an interrupt or a broken pipe."""
    try:
        try:
            return main()
        finally:
            sys.stdout.flush()  # at Python's exit it would be too late to catch a broken pipe
    except KeyboardInterrupt:
        print("actionunits: stopped", file=sys.stderr)
        return 130  # 128 + SIGINT, the shells' convention
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at exit
        return 141  # 128 + SIGPIPE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="actionunits", description="Facial action units in photos and videos."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    detect = commands.add_parser(
        "detect",
        help="detect the action units of every face in photos",
        description="Detect the action units of every face in photos.",
        epilog="Exit codes: 0 every photo had a face, 1 a photo was unreadable or faceless, 2 wrong usage.",
    )
    detect.set_defaults(run=_detect, usage_error=detect.error)
    detect.add_argument("photos", nargs="*", metavar="PHOTO", help="picture file or URL")
    detect.add_argument("--sample", action="store_true", help="use a photo that comes with scikit-image")
    detect.add_argument("--output", type=Path, metavar="DIR", help="write an overlay PNG for each photo")
    detect.add_argument("--json", action="store_true", help="print JSON, or write results.json into DIR")
    detect.add_argument("--csv", action="store_true", help="print CSV, or write results.csv into DIR")
    detect.add_argument(
        "--maps", action="store_true", help="also write the attention maps of each face into DIR"
    )
    add_model_options(detect)
    add_video_command(commands)
    add_corpus_command(commands)
    add_export_command(commands)
    return parser


def _detect(args: argparse.Namespace) -> int:
    """Analyse photo by photo; results so far are written even if the command ends early."""
    _check_usage(args)
    detect = load_pipeline(args)
    if args.maps:
        _check_maps(detect, args)
    photos = {"astronaut.png": sample_photo()} if args.sample else {photo: photo for photo in args.photos}
    thresholds = decision_thresholds(detect.model.config, args.threshold)
    records: list[dict[str, Any]] = []
    given = True
    try:
        _analyse(detect, photos, thresholds, args, records)
    finally:
        if args.json:
            given &= _give(_as_json(records), args.output, "results.json")
        if args.csv:
            given &= _give(_as_csv(records, list(thresholds)), args.output, "results.csv")
    return int(not given or any("error" in record for record in records))


def _check_usage(args: argparse.Namespace) -> None:
    if bool(args.photos) == args.sample:
        args.usage_error("give photos, or --sample for a photo that comes with scikit-image.")
    if args.maps and args.output is None:
        args.usage_error("--maps needs --output DIR, where its pictures go.")
    if args.json and args.csv and args.output is None:
        args.usage_error("--json and --csv together need --output DIR; the terminal takes only one of them.")
    if args.output is not None:
        check_inputs_stay(args, args.photos, r"_au\.png|_maps_\d+\.png" if args.maps else r"_au\.png")


def _check_maps(detect: Any, args: argparse.Namespace) -> None:
    """Refuse `--maps` before any photo is read if the model has none, as geometry and ONNX have not."""
    try:
        detect.check_maps()
    except ValueError:
        name = type(detect.model).__name__
        args.usage_error(f"{name} has no attention maps; leave out --maps, or name another --model.")


def _analyse(
    detect: Any,
    photos: dict[str, Any],
    thresholds: dict[str, float],
    args: argparse.Namespace,
    records: list[dict[str, Any]],
) -> None:
    """Fill the records photo by photo; one that fails does not affect the others."""
    hidden = True if len(photos) == 1 else None  # None hides the bar where there is no terminal
    progress = tqdm(photos.items(), unit="photo", disable=hidden)
    for (name, source), stem in zip(progress, stems(photos), strict=True):
        record: dict[str, Any] = {"photo": name, "faces": []}
        try:
            picture = load_picture(source)
            faces = detect(picture, threshold=args.threshold, return_maps=args.maps)
        except (OSError, ValueError) as error:
            record["error"] = str(error)
            records.append(record)
            tqdm.write(f"{name}: skipped. {error}", file=sys.stderr)
            continue
        records.append(record)
        if not faces:
            record["error"] = "no face found"
            tqdm.write(f"{name}: no face found", file=sys.stderr)
        record["faces"] = [_plain(face) for face in faces]
        if args.output is not None:
            try:
                _draw(args.output, stem, picture, faces, thresholds)
            except OSError as error:
                record["error"] = str(error)
                tqdm.write(f"{name}: could not be drawn. {error}", file=sys.stderr)
        if faces and (args.output is not None or not (args.json or args.csv)):
            tqdm.write(_table(name, faces), file=sys.stdout)


def _draw(
    folder: Path, stem: str, picture: Any, faces: list[dict[str, Any]], thresholds: dict[str, float]
) -> None:
    """Write the overlay, and the maps if there are any."""
    pictures = {f"{stem}_au.png": draw_faces(picture, faces, thresholds)}
    for i, face in enumerate(faces, start=1):
        if "maps" in face:
            pictures[f"{stem}_maps_{i}.png"] = draw_maps(picture, face)
    for name, drawing in pictures.items():
        with whole_file(folder / name) as part:
            drawing.save(part, format="PNG")


def _plain(face: dict[str, Any]) -> dict[str, Any]:
    """Return a face for JSON and CSV: without maps, coordinates to a hundredth of a pixel."""
    return {
        "box": {edge: round(value, 2) for edge, value in face["box"].items()},
        "confidence": round(face["confidence"], 6),
        "landmarks": [[round(x, 2), round(y, 2)] for x, y in face["landmarks"]],
        "landmark_scheme": face["landmark_scheme"],
        "action_units": [{**au, "score": round(au["score"], 6)} for au in face["action_units"]],
    }


def _table(name: str, faces: list[dict[str, Any]]) -> str:
    """Return the lines for the terminal."""
    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    try:
        "█·●".encode(encoding)
        full, empty, mark = "█·●"
    except UnicodeEncodeError:  # a Windows console with an old code page
        full, empty, mark = "#-*"
    lines = [f"{name}: {len(faces)} face{'s' if len(faces) > 1 else ''}"]
    for i, face in enumerate(faces, start=1):
        corners = " ".join(f"{value:.0f}" for value in face["box"].values())
        lines += ["", f"  face {i}   box {corners}   confidence {face['confidence']:.2f}"]
        for au in face["action_units"]:
            length = round(au["score"] * _BAR_LENGTH)
            bar = full * length + empty * (_BAR_LENGTH - length)
            shown = mark if au["active"] else " "
            lines.append(f"  {shown} {au['label']:<5} {au['name']:<22} {bar} {au['score']:.2f}")
    return "\n".join([*lines, ""])


def _as_json(records: list[dict[str, Any]]) -> str:
    """Return a JSON list with a line for each photo."""
    return "[\n" + ",\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n]\n"


def _as_csv(records: list[dict[str, Any]], labels: list[str]) -> str:
    """Return a row for each face, and one with empty cells for a photo without."""
    decisions = [f"{label}_active" for label in labels]
    columns = ["photo", "face", *EDGES, "confidence", *labels, *decisions, "error"]
    text = io.StringIO()
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    for record in records:
        error = record.get("error")
        if not record["faces"]:
            table.writerow({"photo": record["photo"], "error": error})
        for i, face in enumerate(record["faces"], start=1):
            row = {"photo": record["photo"], "face": i, **face["box"], "confidence": face["confidence"]}
            for au in face["action_units"]:
                row |= {au["label"]: au["score"], f"{au['label']}_active": int(au["active"])}
            table.writerow({**row, "error": error})
    return text.getvalue()


def _give(text: str, folder: Path | None, name: str) -> bool:
    """Write a text into the folder, or print it if there is none; return whether that succeeded."""
    if folder is None:
        sys.stdout.write(text)
        return True
    try:
        # file names need not be UTF-8; other bytes become \\udcff, which JSON reads back
        with whole_file(folder / name) as part:
            part.write_bytes(text.encode("utf-8", "backslashreplace"))
    except OSError as error:
        print(f"{name} could not be written. {error}", file=sys.stderr)
        return False
    return True


if __name__ == "__main__":
    sys.exit(console())
