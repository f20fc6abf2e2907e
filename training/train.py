"""Train action unit detection networks by a recipe.

    python training/train.py --recipe training/recipes/escda-synthetic-compact.yaml --data CORPUS --output RUN
    torchrun --nproc_per_node 2 training/train.py ...                  # several processes
    python training/train.py ... --set epochs=2 --set batch_size=32    # other values
    python training/train.py ... --folds 1 2 3                         # RUN/fold-1, ..., and their mean

Repeating the command resumes an interrupted run exactly from its last checkpoint. It writes

    RUN/recipe.yaml     the recipe with all settings
        log.jsonl       one line per event: losses, learning rate, metrics of every epoch
        prepared/       decoded and aligned pictures, and teachers' predictions
        NETWORK/        checkpoints/, best/ and the trained network's model/, for each network of the recipe
        model/          the result: weights, image processor, thresholds, metrics.json, run.json, README.md
        members/NAME/   the same for each network of an ensemble
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from torch import nn
from transformers import AutoModel

import actionunits  # registers the models
from actionunits.data import AlignedFaces, check_people_apart, prepare_synthetic
from actionunits.data.preparing import is_prepared, open_prepared
from actionunits.data.synthetic import available_splits, read_manifest
from actionunits.evaluation import evaluation_report, mean_over_folds, predict_scores
from actionunits.files import whole_file
from actionunits.half_precision import round_parameters, save_in_half
from actionunits.image_processing_au import AUImageProcessor
from actionunits.metrics import calibrate_thresholds
from actionunits.model_card import write_card
from actionunits.models.escda import EscdaForAUDetection
from actionunits.publishing_terms import started_from, training_corpora
from actionunits.reports import write_report
from joint_selection import keep_best_together
from network_training import (
    NetworkTraining,
    RunLog,
    clip_settings,
    network_config,
    new_accelerator,
    replace_folder,
)
from recipe import Recipe, SplitRecipe, load_recipe
from teaching import taught

TEMPLATE = Path(__file__).parents[1] / "model_cards" / "template.md"
logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line: one run, or one per fold and the mean of their reports."""
    args = parse_arguments(arguments)
    runs = [(args.output / f"fold-{fold}", [f"split.fold={fold}"]) for fold in args.folds]
    recipes = {
        output: load_recipe(args.recipe, [*args.set, *settings], args.variant)
        for output, settings in runs or [(args.output, [])]
    }
    accelerator = new_accelerator(next(iter(recipes.values())))
    if args.folds and is_prepared(args.data):
        check_folds(args.data, list(recipes.values()), accelerator)
    for output, recipe in recipes.items():
        train(output, recipe, args, accelerator)
    if args.folds and accelerator.is_main_process:
        reports = [json.loads((output / "metrics-test.json").read_text()) for output in recipes]
        write_report(args.output, mean_over_folds(reports))
    accelerator.wait_for_everyone()
    accelerator.end_training()


def check_folds(data: str, recipes: Sequence[Recipe], accelerator: Accelerator) -> None:
    """Check that the corpus has all folds before training.

    Raises:
        ValueError: There is no such fold.
    """
    with accelerator.main_process_first():
        corpus = open_prepared(data)
    for recipe in recipes:
        corpus.splits(**asdict(recipe.split))


def train(output: Path, recipe: Recipe, args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Train the networks of one run, then assemble the result."""
    for network in recipe.networks.values():
        if not network.pretrained:  # which has its own configuration
            network_config(network, **network.config)  # fails early if a name is wrong
        clip_settings(network, recipe)
    manifest = read_manifest(args.data)
    log = open_run(output, recipe, manifest, accelerator)
    splits = prepare_splits(args, recipe, accelerator, log)
    if any(not (output / name / "model" / "config.json").is_file() for name in recipe.networks):
        cache = args.cache or output / "prepared"
        splits["train"] = taught(splits["train"], recipe, accelerator.device, cache)
    keep_recipe(output, recipe, manifest, accelerator)
    for name in recipe.networks:
        NetworkTraining(name, recipe, splits, output / name, new_accelerator(recipe), log).run()
    if recipe.select_together:
        keep_best_together(recipe, splits, output, accelerator, log)
    finish(output, recipe, splits, manifest, accelerator, log)
    accelerator.wait_for_everyone()


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", required=True, type=Path, help="YAML file, see training/recipes")
    parser.add_argument("--variant", default="", help="a variant of the recipe, such as an ablation")
    parser.add_argument("--data", required=True, help="prepared or synthetic corpus (or the latter's URL)")
    parser.add_argument(
        "--folds", nargs="+", default=[], help="one run per fold, such as 1 2 3, and their mean"
    )
    parser.add_argument("--output", required=True, type=Path, help="folder of the run")
    parser.add_argument(
        "--cache",
        type=Path,
        help="folder of decoded pictures and teachers' predictions, to share between runs",
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="replace a value")
    return parser.parse_args(arguments)


def open_run(output: Path, recipe: Recipe, manifest: dict[str, Any], accelerator: Accelerator) -> RunLog:
    """Make the run's folder, or check that a run found there has the same recipe and corpus.

    Raises:
        ValueError: The folder holds a run with another recipe or corpus, or broken files.
    """
    stored = output / "recipe.yaml"
    if stored.is_file() and (before := load_recipe(stored)) != recipe:
        changed = sorted(key for key, value in vars(recipe).items() if vars(before)[key] != value)
        raise ValueError(f"{output} holds a run with other values of {changed}; choose another --output.")
    corpus = output / "corpus.json"
    if corpus.is_file() and (before := read_corpus(corpus)) != manifest:
        changed = sorted(key for key in before.keys() | manifest if before.get(key) != manifest.get(key))
        raise ValueError(
            f"{output} holds a run on a corpus with other values of {changed}; choose another --output."
        )
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()
    return RunLog(output / "log.jsonl" if accelerator.is_main_process else None)


def keep_recipe(output: Path, recipe: Recipe, manifest: dict[str, Any], accelerator: Accelerator) -> None:
    """Write recipe and corpus into the run's folder, once data and teachers are known to be valid."""
    stored = output / "recipe.yaml"
    if accelerator.is_main_process and not (output / "corpus.json").is_file():
        with whole_file(output / "corpus.json") as part:
            part.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    if accelerator.is_main_process and not stored.is_file():
        with whole_file(stored) as part:
            part.write_text(yaml.safe_dump(recipe.to_dict(), sort_keys=False), encoding="utf-8")
    accelerator.wait_for_everyone()


def read_corpus(path: Path) -> dict[str, Any]:
    """The manifest of the corpus that a run was trained on."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        found = error
    if not isinstance(found, dict):
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) does not describe a corpus: {found!r:.100}. Remove it if "
            "this run was on the same corpus, it will be written again; else choose another --output."
        )
    return found


def prepare_splits(
    args: argparse.Namespace, recipe: Recipe, accelerator: Accelerator, log: RunLog
) -> dict[str, AlignedFaces]:
    """All splits of the corpus, decoded and aligned, with the recipe's action units."""
    if is_prepared(args.data):
        return prepared_splits(args.data, recipe, accelerator, log)
    if changed := {k: v for k, v in asdict(recipe.split).items() if v != getattr(SplitRecipe(), k)}:
        raise ValueError(
            f"the synthetic corpus in {args.data} has its own splits; leave {changed} of the recipe's split "
            "and --folds out."
        )
    splits = {}
    cache = args.cache or args.output / "prepared"
    found = available_splits(args.data)
    for split in ["train", "validation", *(["test"] if "test" in found else [])]:
        with accelerator.main_process_first():
            faces = prepare_synthetic(args.data, split, cache, recipe.geometry.aligned_size)
        splits[split] = faces.with_aus(recipe.aus)
        report_skipped(split, faces, accelerator, log)
    check_people_apart(**splits)
    return splits


def prepared_splits(
    folder: str, recipe: Recipe, accelerator: Accelerator, log: RunLog
) -> dict[str, AlignedFaces]:
    """The splits of a corpus prepared by `actionunits corpus prepare`, with the recipe's action units."""
    with accelerator.main_process_first():
        corpus = open_prepared(folder)
    if corpus.faces.aligned_size != recipe.geometry.aligned_size:
        raise ValueError(
            f"{folder} holds faces of {corpus.faces.aligned_size} pixels, the recipe needs "
            f"{recipe.geometry.aligned_size}; prepare the corpus again with --size."
        )
    splits = corpus.splits(**asdict(recipe.split))
    for split, faces in splits.items():
        splits[split] = faces.with_aus(recipe.aus)
        report_skipped(split, faces, accelerator, log)
    return splits


def report_skipped(split: str, faces: AlignedFaces, accelerator: Accelerator, log: RunLog) -> None:
    """Log the size of a split, and pictures that could not be read."""
    skipped = [str(reason) for reason in faces.skipped]
    log.write("split", split=split, pictures=len(faces), people=len(set(faces.people)), skipped=skipped)
    if skipped and accelerator.is_main_process:
        logger.warning("%s: skipped %d unreadable pictures; the first: %s", split, len(skipped), skipped[0])


def finish(
    output: Path,
    recipe: Recipe,
    splits: dict[str, AlignedFaces],
    manifest: dict[str, Any],
    accelerator: Accelerator,
    log: RunLog,
) -> None:
    """Evaluate and write the result with its card, and each network of an ensemble."""
    networks = {name: AutoModel.from_pretrained(output / name / "model") for name in recipe.networks}
    results = {"": next(iter(networks.values()))}
    if len(networks) > 1:
        ensemble = EscdaForAUDetection.from_networks(
            networks["lsc"], networks["gda"], ensemble=recipe.ensemble
        )
        results = {**networks, "": ensemble}
    processor = build_processor(recipe, manifest.get("alignment", "level_eyes"))
    for member, model in results.items():
        if recipe.save_dtype == "float16":
            round_parameters(model)
        processor.aus = list(model.config.places)
        metrics = measure(model.to(accelerator.device).eval(), processor, recipe, splits)
        if not accelerator.is_main_process:
            continue
        run = describe_run(recipe, splits, manifest, model, accelerator, log, member)
        folder = output / "members" / member if member else output / "model"
        write_model(folder, model, processor, metrics, run)
    if not accelerator.is_main_process:
        return
    for report in metrics.values():
        write_report(output, report)
    log.write("finished", metrics={split: report["calibrated"]["mean"] for split, report in metrics.items()})
    print(f"wrote {output / 'model'}")


def measure(
    model: nn.Module, processor: AUImageProcessor, recipe: Recipe, splits: dict[str, AlignedFaces]
) -> dict[str, Any]:
    """Calibrate the thresholds of a model, and evaluate it on all splits but that of training."""
    calibration = "validation" if {"validation", "test"} <= set(splits) else "train"
    measured = [split for split in splits if split != "train"]
    scores = {  # every process predicts its share
        split: predict_scores(model, processor, splits[split], recipe.eval_batch_size)
        for split in dict.fromkeys([calibration, *measured])
    }
    known = splits[calibration].occurrence
    model.config.au_thresholds = calibrate_thresholds(scores[calibration], known, recipe.max_false_alarms)
    about = {
        "thresholds_from": f"the {calibration} people",
        "epoch_selection": recipe.epoch_selection,
        "paper": {} if recipe.crossing else asdict(recipe.paper),  # whose row is of another corpus
    }
    return {
        split: evaluation_report(scores[split], splits[split], model.config.au_thresholds, split, about)
        for split in measured
    }


def write_model(
    folder: Path, model: nn.Module, processor: AUImageProcessor, metrics: dict[str, Any], run: dict[str, Any]
) -> None:
    """Write a model's folder, which appears when it is complete."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    save: Callable[[nn.Module, Path], None] = type(model).save_pretrained
    if run["recipe"]["save_dtype"] == "float16":
        save = save_in_half
    save(model, partial)
    processor.save_pretrained(partial)
    (partial / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    (partial / "run.json").write_text(json.dumps(run, indent=1) + "\n")
    if metrics:  # there are none after training on all subjects
        write_card(partial, TEMPLATE)
    replace_folder(partial, folder)


def build_processor(recipe: Recipe, alignment: str = "level_eyes") -> AUImageProcessor:
    """The image processor that preprocesses pictures as in validation."""
    crop, size = recipe.geometry.crop_size, recipe.geometry.input_size
    return AUImageProcessor(
        do_align=alignment != "none",
        align="level_eyes" if alignment == "none" else alignment,
        aligned_size=recipe.geometry.aligned_size,
        crop_size={"height": crop, "width": crop},
        size={"height": size, "width": size},
        image_mean=list(recipe.image_mean),
        image_std=list(recipe.image_std),
        sharpen=recipe.sharpen,
        aus=list(recipe.aus),
    )


def describe_run(
    recipe: Recipe,
    splits: dict[str, AlignedFaces],
    manifest: dict[str, Any],
    model: nn.Module,
    accelerator: Accelerator,
    log: RunLog,
    member: str = "",
) -> dict[str, Any]:
    """The origin of the weights, for `run.json` and the card.

    Encoders, backbones and weights that networks started from are named without the path of their folder.
    """
    described = recipe.to_dict()
    inherited = inherited_corpora(recipe)
    described["teachers"] = [short_name(teacher) for teacher in recipe.teachers]
    described["split"]["folds_file"] = short_name(recipe.split.folds_file)
    encoder = take_out_encoder(model, described) or inherited_encoder(described)
    backbones = take_out_backbones(described)
    for network in described["networks"].values():
        network["pretrained"] = short_name(network["pretrained"])
        if backbone := network["config"].get("backbone_name_or_path"):
            network["config"]["backbone_name_or_path"] = short_name(backbone)
    return {
        "name": recipe.name if not member else name_of_member(recipe.name, member),
        "member": member,
        "recipe": described,
        "encoder": encoder,
        "backbones": backbones,
        "inherited": inherited,
        "corpus": describe_corpus(splits, manifest),
        "model_type": model.config.model_type,
        "parameters": sum(p.numel() for p in model.parameters()),
        "selected_epochs": {line["network"]: line["selected_epoch"] for line in log.events("trained")},
        "device": accelerator.device.type,
        "processes": accelerator.num_processes,
        "versions": installed_versions(),
        "finished": datetime.now(timezone.utc).date().isoformat(),
    }


def describe_corpus(splits: dict[str, AlignedFaces], manifest: dict[str, Any]) -> dict[str, Any]:
    """The corpus' manifest, and the numbers of pictures and people of each split."""
    if "frames" in manifest:
        manifest = {**manifest, "frames": short_name(manifest["frames"])}
    sizes = {
        split: {"pictures": len(faces), "people": len(set(faces.people)), "skipped": len(faces.skipped)}
        for split, faces in splits.items()
    }
    return {"manifest": manifest, "splits": sizes}


def installed_versions() -> dict[str, str]:
    """Versions of Python, this package and its main dependencies, if installed."""
    versions = {"python": platform.python_version(), "actionunits": actionunits.__version__}
    for name in ("torch", "transformers", "accelerate", "datasets", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # corpora prepared elsewhere need no datasets
            continue
    return versions


def name_of_member(name: str, member: str) -> str:
    """Name of one network of an ensemble in its card: "lsc-bp4d" of "escda-bp4d"."""
    return name.replace("escda", member, 1) if "escda" in name else f"{name}-{member}"


def short_name(name: str) -> str:
    """A Hub name, or the last two parts of a folder's path."""
    return "/".join(Path(name).parts[-2:]) if name else ""


def inherited_corpora(recipe: Recipe) -> dict[str, list[str]]:
    """Training corpora of a run's initial models and teachers, as far as their folders tell."""
    found: dict[str, list[str]] = {}
    for place in started_from({"recipe": recipe.to_dict()}):
        if (file := Path(place) / "run.json").is_file():
            corpora = training_corpora(json.loads(file.read_text(encoding="utf-8")))
        else:
            corpora = [f"what {short_name(place)} was trained on"]
        found[short_name(place)] = [*found.get(short_name(place), []), *corpora]
    return found


def take_out_encoder(model: nn.Module, recipe: dict[str, Any]) -> dict[str, Any]:
    """Name and metrics of a network's initial encoder; model and recipe lose the path of a local one."""
    name = getattr(model.config, "encoder_name_or_path", None)
    if name is None:
        return {}
    if not (folder := Path(name)).is_dir():  # on the Hub
        return {"name": name}
    model.config.encoder_name_or_path = None
    short = short_name(name)
    for network in recipe["networks"].values():
        if network["config"].get("encoder_name_or_path") == name:
            network["config"]["encoder_name_or_path"] = short
    figures, settings = (
        json.loads(file.read_text()) if file.is_file() else {}
        for file in (folder / "metrics.json", folder.parent / "settings.json")
    )
    return {"name": short, **figures, "au_weight": settings.get("au_weight", 0)}


def inherited_encoder(recipe: dict[str, Any]) -> dict[str, Any]:
    """The initial encoder of local pretrained weights, by their `run.json`."""
    folders = [network["pretrained"] for network in recipe["networks"].values() if network["pretrained"]]
    runs = [run for folder in folders if (run := Path(folder) / "run.json").is_file()]
    return next(filter(None, (json.loads(run.read_text()).get("encoder") for run in runs)), {})


def take_out_backbones(recipe: dict[str, Any]) -> dict[str, Any]:
    """Names and recipes of local initial backbones, whose paths are removed from the recipe."""
    found = {}
    for name, network in recipe["networks"].items():
        if "/" not in network["backbone_from"]:
            continue
        folder = Path(network["backbone_from"])
        network["backbone_from"] = short = short_name(network["backbone_from"])
        run = json.loads(file.read_text()) if (file := folder / "run.json").is_file() else {}
        found[name] = {"name": short, "recipe": run.get("recipe", {})}
    return found


if __name__ == "__main__":
    main()
