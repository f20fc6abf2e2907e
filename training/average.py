"""Combine trained networks in an ensemble, the mean of their logits. Nothing is trained.

    python training/average.py escda/members/lsc escda/members/gda gtlenet/model ac2d/model geometry/model \
        --weight geometry=2 --output ensemble
    python training/calibrate.py ensemble/model --data CORPUS --photos FACES

The networks are of different methods (`EnsembleConfig` has a field for each), trained on the same corpus with
the same alignment, crop and normalisation. The first command writes `ensemble/model` without metrics, the
second calibrates its thresholds, evaluates it, and writes the card. The size and sharpening of pictures are
those of the network with the largest input.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoImageProcessor, AutoModel

from actionunits import AUImageProcessor, EnsembleForAUDetection
from actionunits.half_precision import save_in_half
from network_training import replace_folder
from train import installed_versions

NAME = "ensemble-synthetic-compact"
SHARED = (
    *("split", "crossing"),
    *("aus", "target", "full_intensity", "balance_aus", "image_mean", "image_std"),
    *("epoch_selection", "max_false_alarms", "save_dtype"),
)
"""Entries of a recipe that must be equal: the people, the pictures and the meaning of the scores."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the networks' folders, write the ensemble's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="+", type=Path, help="folders that train.py wrote")
    parser.add_argument("--output", type=Path, required=True, help="folder to write `model` into")
    parser.add_argument(
        "--weight",
        action="append",
        default=[],
        type=_weight,
        metavar="NETWORK=NUMBER",
        help="weight of a network in the mean, where it is not 1",
    )
    parser.add_argument("--name", default=NAME, help="its name in the card")
    args = parser.parse_args(arguments)
    try:
        average(args.networks, args.output / "model", args.name, dict(args.weight))
    except (OSError, ValueError, StrictDataclassError) as error:
        parser.error(str(error))
    print(f"wrote {args.output / 'model'}; choose its thresholds with calibrate.py")


def _weight(text: str) -> tuple[str, float]:
    name, _, number = text.partition("=")
    return name, float(number)


def average(
    folders: Sequence[Path],
    output: Path,
    name: str = NAME,
    weights: Mapping[str, float] | None = None,
) -> None:
    """Write the ensemble of the networks in some folders, with weights as in `EnsembleConfig`.

    Raises:
        FileNotFoundError: A folder has no `run.json`.
        ValueError: The networks do not fit together, or one would be overwritten; the message says why.
    """
    if output.resolve() in [folder.resolve() for folder in folders]:
        raise ValueError(f"{output} is one of the networks and would be lost; name another --output.")
    runs = [read_run(folder) for folder in folders]
    processors = [AutoImageProcessor.from_pretrained(folder) for folder in folders]
    check_pictures(folders, processors)
    networks = [AutoModel.from_pretrained(folder) for folder in folders]
    model = EnsembleForAUDetection.from_networks(*networks, network_weights=dict(weights or {}) or None)
    if left_out := sorted(set(weights or {}) - set(model.networks)):
        raise ValueError(f"--weight names {left_out}, the networks are {sorted(model.networks)}.")
    processor = max(processors, key=lambda p: p.size["height"])
    processor.aus = model.config.places
    run = {
        "name": name,
        "member": "",
        "recipe": shared_recipe(folders, runs) | {"name": name, "networks": {}, "sharpen": processor.sharpen},
        "members": {member: run_of(model.config.networks[member], runs) for member in model.networks},
        "corpus": runs[0]["corpus"],
        "inherited": {name: of for run in runs for name, of in run.get("inherited", {}).items()},
        "model_type": model.config.model_type,
        "parameters": sum(p.numel() for p in model.parameters()),
        "versions": installed_versions(),
        "finished": datetime.now(timezone.utc).date().isoformat(),
    }
    partial = output.with_name(f"{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    in_half = run["recipe"]["save_dtype"] == "float16"
    save_in_half(model, partial) if in_half else model.save_pretrained(partial)
    processor.save_pretrained(partial)
    (partial / "run.json").write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    replace_folder(partial, output)


def read_run(folder: Path) -> dict[str, Any]:
    """The `run.json` of a folder."""
    file = folder / "run.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no run.json; take folders that train.py wrote.")
    return json.loads(file.read_text(encoding="utf-8"))


def run_of(config: Any, runs: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The run of a network: the one of its type."""
    return next(run for run in runs if run["model_type"] == config.model_type)


def shared_recipe(folders: Sequence[Path], runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The common entries of the networks' recipes, with the largest input.

    Raises:
        ValueError: The corpora, their splits or an entry of `SHARED` differ.
    """
    recipes = [run["recipe"] for run in runs]
    for folder, run in zip(folders, runs, strict=True):
        if run["corpus"] != runs[0]["corpus"]:
            raise ValueError(f"{folder} was trained on another corpus or other people than {folders[0]}.")
        for key in SHARED:
            if (found := run["recipe"].get(key)) != (wanted := recipes[0].get(key)):
                raise ValueError(
                    f"{folder} was trained with {key}={found!r}, {folders[0]} with {wanted!r}; "
                    "an ensemble needs networks trained alike."
                )
    common = {k: v for k, v in recipes[0].items() if all(recipe.get(k) == v for recipe in recipes)}
    size = max(recipe["geometry"]["input_size"] for recipe in recipes)
    return common | {"geometry": recipes[0]["geometry"] | {"input_size": size}}


def check_pictures(folders: Sequence[Path], processors: Sequence[AUImageProcessor]) -> None:
    """Refuse networks whose pictures differ in more than size and sharpening.

    Raises:
        ValueError: They do; the message names the option.
    """
    # All networks get the largest picture, resized. They may read centres of other places.
    own = {"size": None, "sharpen": None, "aus": None}
    first, *others = ({**processor.to_dict(), **own} for processor in processors)
    for folder, options in zip(folders[1:], others, strict=True):
        for key in sorted(first.keys() | options.keys()):
            if (wanted := first.get(key)) != (found := options.get(key)):
                raise ValueError(
                    f"The pictures of {folder} have {key}={found!r}, those of {folders[0]} {wanted!r}; "
                    "an ensemble shows all networks the same picture."
                )


if __name__ == "__main__":
    main()
