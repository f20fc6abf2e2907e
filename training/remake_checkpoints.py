"""Remake everything included in the package: corpus, landmark network, all weights, metrics and cards.

    python training/remake_checkpoints.py --head ICT-FaceKit/FaceXModel --photos FACES --output runs/package
    python training/remake_checkpoints.py ... --only lac gtlenet      # these, and what they need
    python training/remake_checkpoints.py ... --install               # and puts the results into the package

Runs the scripts of this folder one after the other and stops at the first that fails. The same command
resumes there: finished steps, and those that only they need, are skipped. A step is finished if
OUTPUT/STEP.done exists, or its result, copied from another machine. `--dry-run` only prints. The recipes are
for a GPU; on a CPU use `--set precision=fp32 --set preload=false --set batch_size=64`, and expect long runs.

`--install` copies each result to `src/actionunits/checkpoints/NAME` and its card to `model_cards/`, replacing
existing ones. Results above 16 MB are refused. Thresholds are calibrated with the package's face detector:
install a new one first, by `--only face_landmarks --install`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from actionunits import checkpoints
from actionunits.model_card import card_name, write_card
from network_training import replace_folder

HERE = Path(__file__).parent
CARDS = HERE.parent / "model_cards"
LARGEST = 16_000_000  # bytes of a folder in the package
FILES = ("config.json", "preprocessor_config.json", "model.safetensors", "metrics.json", "run.json")
BEST = "ensemble"
"""The pipeline's default model; its folder in the package is `default`."""
ENCODER = shlex.split(
    "--preset compact --image-size 64 --batch 11 --steps 3000 --validate-every 500 --precision bf16"
)
"""Pretraining of GTLE-Net's encoder: five minutes on one core."""
RESULTS = {
    "default" if name == BEST else name: folder
    for name, folder in {
        "ensemble": "ensemble/model",
        "escda": "escda/model",
        "lsc": "escda/members/lsc",
        "gda": "escda/members/gda",
        "ac2d": "ac2d/model",
        "auformer": "auformer/model",
        "lac": "lac/model",
        "gtlenet": "gtlenet/model",
        "geometry": "geometry/model",
        checkpoints.LANDMARKS: "landmarks",
    }.items()
}
"""Folder in the package -> folder of the result in OUTPUT."""
MEMBERS = {"lsc": 1, "gda": 1, "gtlenet": 1, "ac2d": 1, "geometry": 2}
"""Networks of the default model, and their weights in the mean."""
ADAPTED = ("escda", "lac")
"""Trainings whose batch statistics are adapted to photographs (training/SYNTHETIC.md, section 13)."""


@dataclass(frozen=True)
class Step:
    """A script of this folder with its options.

    Attributes:
        script: Its name.
        options: Its command line.
        needs: Steps whose results it reads.
        result: JSON file that it writes atomically at its end, relative to OUTPUT.
        key: A key that the file has then, if it exists before.
    """

    script: str
    options: Sequence[str | Path]
    needs: Sequence[str] = ()
    result: str = ""
    key: str = ""

    @property
    def command(self) -> list[str]:
        """The command line."""
        return [sys.executable, str(HERE / f"{self.script}.py"), *map(str, self.options)]

    def has_result(self, output: Path) -> bool:
        """Whether its result exists."""
        file = output / self.result
        return file.is_file() and (not self.key or self.key in json.loads(file.read_text(encoding="utf-8")))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, or print, every step whose result is missing, and install the results if asked."""
    args = parse_arguments(arguments)
    steps = make_steps(args.head, args.photos, args.output, args.set)
    for name in missing(steps, [step_of(name) for name in args.only], args.output):
        print(shlex.join(steps[name].command), flush=True)
        if not args.dry_run:
            subprocess.run(steps[name].command, check=True)
            (args.output / f"{name}.done").touch()
    if args.install and not args.dry_run:
        install(args.output, args.only)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--head", type=Path, required=True, help="folder of the ICT-FaceKit head model")
    parser.add_argument("--photos", type=Path, required=True, help="folder of the photographs and people.csv")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(RESULTS),
        default=list(RESULTS),
        metavar="NAME",
        help=", ".join(RESULTS),
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the recipes")
    parser.add_argument("--install", action="store_true", help="put the results into the package")
    parser.add_argument("--dry-run", action="store_true", help="print the commands only")
    return parser.parse_args(arguments)


def make_steps(head: Path, photos: Path, output: Path, changes: Sequence[str] = ()) -> dict[str, Step]:
    """All steps by name, in order."""
    corpus, cache = output / "corpus", output / "prepared"
    overrides = [word for change in changes for word in ("--set", change)]

    def train(name: str, *more: str, needs: Sequence[str] = ("corpus",)) -> Step:
        recipe = HERE / "recipes" / f"{name}-synthetic-compact.yaml"
        places = ["--data", corpus, "--cache", cache, "--output", output / name]
        return Step(
            "train", ["--recipe", recipe, *places, *more, *overrides], needs, f"{name}/model/metrics.json"
        )

    def landmarks(name: str, *more: str, needs: Sequence[str]) -> Step:
        places = ["--data", corpus, "--photos", photos, "--output", output / name]
        return Step("train_landmarks", [*places, *more], needs)

    first = str(output / "first_landmarks")
    backbone = f"networks.auformer.backbone_from={output / 'auformer-backbone' / 'model'}"
    encoder = f"networks.gtlenet.config.encoder_name_or_path={output / 'expression' / 'model'}"
    expression = ["--synthetic", corpus, "--cache", cache, "--output", output / "expression", *ENCODER]
    steps = {
        "corpus": Step("synthesize", ["--head", head, "--photos", photos, "--output", corpus]),
        "first_landmarks": landmarks("first_landmarks", needs=["corpus"]),
        "landmarks": landmarks("landmarks", "--fine", "--init", first, needs=["corpus", "first_landmarks"]),
        "expression": Step("pretrain_expression", expression, ["corpus"], "expression/model/metrics.json"),
        "escda": train("escda"),
        "ac2d": train("ac2d"),
        "auformer-backbone": train("auformer-backbone"),
        "auformer": train("auformer", "--set", backbone, needs=["corpus", "auformer-backbone"]),
        "lac": train("lac"),
        "gtlenet": train("gtlenet", "--set", encoder, needs=["corpus", "expression"]),
        "geometry": train("geometry"),
    }

    calibration = ["--data", corpus, "--photos", photos, "--cache", cache]
    for name in ("escda", "ac2d", "auformer", "lac", "gtlenet", "geometry"):
        steps |= finishing_steps(name, output, photos, calibration)
    weights = [word for name, n in MEMBERS.items() if n != 1 for word in ("--weight", f"{name}={n}")]
    members = [*(output / RESULTS[name] for name in MEMBERS), *weights, "--output", output / BEST]
    steps[BEST] = Step(
        "average", members, [step_of(name) for name in MEMBERS], f"{RESULTS['default']}/run.json"
    )
    steps |= finishing_steps(BEST, output, photos, calibration)
    report = output / "real_photos.json"
    options = ["--photos", photos, "--model", output / RESULTS["default"], "--output", report]
    return {**steps, "real_photos": Step("check_real_photos", options, [thresholds_of(BEST)], report.name)}


def finishing_steps(
    name: str, output: Path, photos: Path, calibration: Sequence[str | Path]
) -> dict[str, Step]:
    """The steps that adapt and calibrate the result of a training and its members."""
    models = sorted(place for place in RESULTS.values() if place.startswith(f"{name}/"))  # members first
    folders, run = [output / model for model in models], f"{models[-1]}/run.json"
    adapt = Step("adapt_statistics", [*folders, "--photos", photos], [name], run, "statistics")
    made = {f"{name}_statistics": adapt} if name in ADAPTED else {}
    needs = ["corpus", *(made or [name])]
    calibrate = Step("calibrate", [*folders, *calibration], needs, run, "neutral_photographs")
    return made | {thresholds_of(name): calibrate}


def thresholds_of(name: str) -> str:
    """The step that chooses the thresholds of a training's results."""
    return f"{name}_thresholds"


def step_of(name: str) -> str:
    """The last step for a folder of the package; the default is also evaluated on real photographs."""
    if name == "default":
        return "real_photos"
    return "landmarks" if name == checkpoints.LANDMARKS else thresholds_of(RESULTS[name].partition("/")[0])


def missing(steps: Mapping[str, Step], wanted: Sequence[str], output: Path) -> list[str]:
    """The steps to run, in order: those wanted and those they need, if they have no result."""
    waiting, found = list(wanted), set()
    while waiting:
        name = waiting.pop()
        if not (output / f"{name}.done").is_file() and not steps[name].has_result(output):
            found.add(name)
            waiting += steps[name].needs
    return [name for name in steps if name in found]


def install(
    output: Path, names: Sequence[str], package: Path = checkpoints.FOLDER, cards: Path = CARDS
) -> None:
    """Copy results into the package, with cards by the current template, and the cards into `model_cards`.

    Raises:
        ValueError: A result is too large for the package; nothing is copied then.
    """
    files = {name: model_files(output / RESULTS[name]) for name in names}
    sizes = {name: sum(path.stat().st_size for path in files[name]) for name in names}
    if large := {name: f"{size / 1e6:.1f} MB" for name, size in sizes.items() if size > LARGEST}:
        raise ValueError(f"Too large for the package: {large}; leave them out with --only.")
    for name in names:
        partial = package / f"{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for path in files[name]:
            shutil.copyfile(path, partial / path.name)
        template = "template_landmarks.md" if name == checkpoints.LANDMARKS else "template.md"
        write_card(partial, CARDS / template)
        shutil.copyfile(partial / "README.md", cards / f"{card_of(partial)}.md")
        replace_folder(partial, package / name)
        print(f"installed {package / name}, {sizes[name] / 1e6:.1f} MB")


def model_files(folder: Path) -> list[Path]:
    """The files of a result for the package; its card is made anew.

    Raises:
        FileNotFoundError: There is no such result.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is not there yet; run this command without --install first.")
    return [path for path in sorted(folder.iterdir()) if path.name in FILES]


def card_of(folder: Path) -> str:
    """Name of a folder's card in `model_cards`."""
    run = folder / "run.json"
    return card_name(json.loads(run.read_text(encoding="utf-8"))) if run.is_file() else "face-landmarks"


if __name__ == "__main__":
    main()
