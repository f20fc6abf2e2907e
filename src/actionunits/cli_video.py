"""The command `actionunits video`: tables, annotated videos and time lines of videos of any length."""

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from actionunits.action_units import au_name
from actionunits.cli_common import add_model_options, check_inputs_stay, load_pipeline, stems
from actionunits.files import whole_file
from actionunits.image_processing_au import decision_thresholds
from actionunits.timeline import Timeline
from actionunits.video import VideoError, write_video
from actionunits.video_tables import FORMS, write_csv, write_parquet
from actionunits.visualization import draw_frame

Sink = Callable[[dict[str, Any]], None]
"""Takes the pipeline's result for each frame."""

_TOLD_ERRORS = 3  # printed errors per video; further ones are only counted


def add_video_command(commands: Any) -> None:
    """Add the command to those of `actionunits`."""
    video = commands.add_parser(
        "video",
        help="detect the action units of every face in videos",
        description="Detect the action units of every face in every frame of videos. "
        "Each option writes a file named after the video into DIR, and a summary is printed.",
        epilog="Exit codes: 0 every video had a face, 1 one was unreadable, in part or whole, or faceless, "
        "2 wrong usage. The columns of the tables are documented in actionunits.video_tables.",
    )
    video.set_defaults(run=run, usage_error=video.error)
    video.add_argument("videos", nargs="+", metavar="VIDEO", help="video file")
    video.add_argument("--output", type=Path, metavar="DIR", default=Path(), help="default: current folder")
    video.add_argument("--csv", action="store_true", help="write a table, VIDEO_au.csv")
    video.add_argument("--parquet", action="store_true", help="write the table as VIDEO_au.parquet")
    video.add_argument("--overlay", action="store_true", help="write the annotated video, VIDEO_au.mp4")
    video.add_argument("--timeline", action="store_true", help="draw all action units, VIDEO_timeline.png")
    video.add_argument(
        "--form",
        choices=FORMS,
        default="openface",
        help="of the tables: a row for each face with OpenFace's columns, or one for each action unit (tidy)",
    )
    video.add_argument(
        "--detect-every",
        type=_from_one,
        default=1,
        metavar="K",
        help="detect faces every K frames and track them in between: faster, a little different",
    )
    video.add_argument("--batch-size", type=_from_one, metavar="N", help="faces per forward pass")
    add_model_options(video)


def run(args: argparse.Namespace) -> int:
    """Analyse video by video; one that fails does not affect the others."""
    if args.overlay:
        check_inputs_stay(args, args.videos, r"_au\.mp4")
    detect = load_pipeline(args)
    thresholds = decision_thresholds(detect.model.config, args.threshold)
    failed = False
    for name, stem in zip(args.videos, stems(args.videos), strict=True):
        try:
            failed |= not _analyse(detect, name, stem, thresholds, args)
        except ImportError as error:
            args.usage_error(str(error))
        except BrokenPipeError:  # an OSError, but not of the video
            raise
        except (OSError, ValueError) as error:
            tqdm.write(f"{name}: skipped. {error}", file=sys.stderr)
            failed = True
    return int(failed)


def _analyse(
    detect: Any, name: str, stem: str, thresholds: dict[str, float], args: argparse.Namespace
) -> bool:
    """Analyse one video and write its files; return whether it was whole and had a face."""
    timeline = Timeline(thresholds)
    options = {"threshold": args.threshold, "detect_every": args.detect_every, "batch_size": args.batch_size}
    answers = detect(video=name, return_frames=args.overlay, **options)
    errors = 0
    problems: list[str] = []
    with ExitStack() as stack:
        sinks = [
            stack.enter_context(_Apart(path, sink, problems))
            for path, sink in _sinks(args, stem, thresholds, name)
        ]
        for answer in answers:
            for take in (timeline.add, *sinks):
                take(answer)
            if "error" in answer:
                errors += 1
                if errors <= _TOLD_ERRORS:
                    where = f"{name}: frame {answer['frame']} at {answer['timestamp']:.2f} s"
                    tqdm.write(f"{where}: {answer['error']}", file=sys.stderr)
    if args.timeline:
        _draw(timeline, args.output / f"{stem}_timeline.png", problems)
    for problem in problems:
        tqdm.write(f"{name}: {problem}", file=sys.stderr)
    if errors > _TOLD_ERRORS:
        tqdm.write(f"{name}: {errors} frames could not be read", file=sys.stderr)
    if not timeline.faces:
        tqdm.write(f"{name}: no face found", file=sys.stderr)
    tqdm.write(_summary(name, timeline), file=sys.stdout)
    return bool(timeline.faces) and not errors and not problems


class _Apart:
    """An output file that may fail alone: the error is recorded, and the other files are still written."""

    def __init__(self, path: Path, sink: AbstractContextManager[Sink], problems: list[str]):
        self._path, self._sink, self._problems = path, sink, problems
        self._stack = ExitStack()
        self._take: Sink | None = None

    def __enter__(self) -> Sink:
        with self._told():
            self._take = self._stack.enter_context(self._sink)
        return self._add

    def __exit__(self, *raised: Any) -> None:
        with self._told():
            self._stack.__exit__(*raised)

    def _add(self, answer: dict[str, Any]) -> None:
        if self._take is not None:
            with self._told():
                self._take(answer)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (OSError, VideoError) as error:
            self._take = None
            self._problems.append(_unwritten(self._path, error))
            with suppress(OSError, VideoError):  # remove the partial file, to free space for the others
                self._stack.__exit__(type(error), error, error.__traceback__)


def _draw(timeline: Timeline, path: Path, problems: list[str]) -> None:
    try:
        with whole_file(path) as part:
            timeline.draw().save(part, format="PNG")
    except OSError as error:
        problems.append(_unwritten(path, error))


def _unwritten(path: Path, error: OSError | VideoError) -> str:
    others = "The other files are not affected."
    if isinstance(error, VideoError):
        return f"{path} could not be written: {error} {others}"
    reason = error.strerror or error
    return f"{path} could not be written: {reason}; make room, or name another --output. {others}"


def _sinks(
    args: argparse.Namespace, stem: str, thresholds: dict[str, float], name: str
) -> Iterator[tuple[Path, AbstractContextManager[Sink]]]:
    """The requested output files."""
    from actionunits import __version__

    about = {"video": Path(name).name, "model": args.model or "default", "actionunits": __version__}
    about |= {"form": args.form, "detect_every": args.detect_every, "thresholds": thresholds}
    if args.csv:
        path = args.output / f"{stem}_au.csv"
        yield path, write_csv(path, args.form, thresholds)
    if args.parquet:
        path = args.output / f"{stem}_au.parquet"
        yield path, write_parquet(path, args.form, thresholds, about)
    if args.overlay:
        path = args.output / f"{stem}_au.mp4"
        yield path, _overlay(path, thresholds)


@contextmanager
def _overlay(path: Path, thresholds: dict[str, float]) -> Iterator[Sink]:
    """Write the annotated video, if any frame can be read.

    Unreadable frames are left out, so the frame before stays on screen.
    """
    with ExitStack() as stack:
        video: Any = None

        def add(answer: dict[str, Any]) -> None:
            nonlocal video
            if answer["image"] is not None:
                video = video or stack.enter_context(write_video(path))
                drawn = draw_frame(answer["image"], answer["faces"], thresholds)
                video.add(drawn, answer["timestamp"])

        yield add


def _summary(name: str, timeline: Timeline) -> str:
    """Return the lines for the terminal."""
    faces = f"{len(timeline.faces)} face{'' if len(timeline.faces) == 1 else 's'}"
    count = int(timeline.frames.sum())
    frames = f"{count} frame{'' if count == 1 else 's'}"
    lines = [f"{name}: {frames}, {timeline.end:.1f} s, {faces}"]
    for number in timeline.longest():
        lines += ["", f"  face {number}   in {100 * timeline.presence(number):.0f} % of the frames"]
        for label, (mean, active) in timeline.summary(number).items():
            lines.append(
                f"    {label:<5} {au_name(label):<22} mean {mean:.2f}   active {100 * active:3.0f} %"
            )
    return "\n".join([*lines, ""])


def _from_one(text: str) -> int:
    if not re.fullmatch("0*[1-9][0-9]*", text):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 on")
    return int(text)
