"""Adapt the batch statistics of trained networks to photographs, like AdaBN (arXiv:1603.04779).

    python training/adapt_statistics.py MODEL [MODEL ...] --photos FACES --share 0.5
    python training/calibrate.py MODEL [MODEL ...] --data CORPUS --photos FACES

Batch normalisation removes what pictures have in common, which in a trained network is what renderings have
in common: light, skin, lens. Here means and variances move a share of the way to those of photographs, taken
through the whole pipeline: detector, alignment, network. No label is used and no weight is changed. AdaBN
moves them all the way, but these photographs are neutral, and faces in use are not.

The photographs are those of the training people from which the renderings are made. `model.safetensors` and
`run.json` are rewritten; thresholds, metrics and card are those of the old network until calibrate.py runs.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn
from tqdm import tqdm
from transformers import pipeline

import actionunits  # noqa: F401  (registers the models and the task)
from actionunits.half_precision import save_in_half
from actionunits.pictures import load_picture
from actionunits.synthesis.corpus import people_by_split
from actionunits.synthesis.person import read_people
from average import read_run
from network_training import TakesKeywords, replace_folder

BATCH = 32


def main(arguments: Sequence[str] | None = None) -> None:
    """Adapt every model of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", type=Path, help="folders that train.py wrote")
    parser.add_argument("--photos", type=Path, required=True, help="folder of the photographs and people.csv")
    parser.add_argument("--share", type=float, default=0.5, help="share of the way, 0 to 1 (default: 0.5)")
    args = parser.parse_args(arguments)
    try:
        for folder in args.models:
            manifest = read_run(folder).get("corpus", {}).get("manifest", {})
            adapt(folder, training_photographs(args.photos, manifest), args.share)
    except (OSError, ValueError) as error:
        parser.error(str(error))


def adapt(folder: Path, photographs: Sequence[Path], share: float) -> None:
    """Adapt the batch statistics of the model in a folder, in place, and record it in its `run.json`.

    A folder that was adapted with the same share before is not changed.

    Raises:
        FileNotFoundError: The folder has no `run.json`.
        ValueError: `share` is not between 0 and 1, the model has no batch normalisation or was adapted with
            another share before, or too few faces were found.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share} must be above 0 and at most 1.")
    run = read_run(folder)
    if done := run.get("statistics"):
        if done["share"] != share:
            raise ValueError(
                f"{folder} was adapted with share={done['share']} before; take the trained one for {share}."
            )
        return
    detect = pipeline("au-detection", model=str(folder), device="cpu")  # type: ignore[call-overload]
    norms = [module for module in detect.model.modules() if isinstance(module, _BatchNorm)]
    if not norms:
        raise ValueError(f"{folder} has no batch normalisation, so there is nothing to adapt.")
    before = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms]
    batches = list(batches_of_faces(detect, photographs))
    update_bn(batches, TakesKeywords(detect.model))
    detect.model.eval()
    for norm, (mean, variance) in zip(norms, before, strict=True):
        norm.running_mean.lerp_(mean, 1 - share)
        norm.running_var.lerp_(variance, 1 - share)
    found = sum(len(batch["pixel_values"]) for batch in batches)
    run["statistics"] = {"photographs": found, "share": share}
    save(detect.model, run, folder)
    print(f"{folder}: {len(norms)} layers moved {share:.0%} of the way to {found} photographs")


def training_photographs(folder: Path, manifest: Mapping[str, Any] = MappingProxyType({})) -> list[Path]:
    """The photographs of the training people of a corpus with this manifest."""
    people = read_people(folder)
    names = people_by_split(manifest, [row["name"] for row in people])["train"]
    return [row["picture"] for row in people if row["name"] in names]


def batches_of_faces(detect, photographs: Sequence[Path]) -> Iterator[dict[str, torch.Tensor]]:
    """The network's inputs for the largest face of each photograph, in batches of about `BATCH`.

    Raises:
        ValueError: There are fewer than two, too few for a variance.
    """
    faces = []
    for photograph in tqdm(photographs, "photographs", disable=None):
        picture = load_picture(photograph)
        if found := detect(picture):
            faces.append(
                detect.image_processor(picture, landmarks=found[0]["landmarks"], return_tensors="pt")
            )
    if len(faces) < 2:
        raise ValueError(f"{len(faces)} of {len(photographs)} photographs show a face; look at --photos.")
    count = math.ceil(len(faces) / BATCH)
    for rows in (faces[i::count] for i in range(count)):  # of about one size, as each has the same weight
        yield {name: torch.cat([face[name] for face in rows]) for name in rows[0]}


def save(model, run: dict, folder: Path) -> None:
    """Save weights, in their own precision, and `run.json` in a copy of the folder that replaces it."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(folder, partial)
    in_half = run["recipe"]["save_dtype"] == "float16"
    save_in_half(model, partial) if in_half else model.save_pretrained(partial)
    (partial / "run.json").write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    replace_folder(partial, folder)


if __name__ == "__main__":
    main()
