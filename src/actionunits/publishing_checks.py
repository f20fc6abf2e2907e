"""Checks of a model folder before it is published, and the copy of it that is published.

    stage_folder(folder, staged, "org/name")  # the card names the repository; optionally adds the code
    check_folder(staged)                      # all problems at once; needs no network

The checks are named in `CHECKS`; each returns its problems as sentences for the publisher.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from transformers import AutoModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from actionunits.export_code import LANDMARKS, REQUIREMENTS, export_code
from actionunits.face_detection import FaceDetector
from actionunits.image_processing_au import AUImageProcessor
from actionunits.model_card import PLACEHOLDER, SECTIONS, group_gaps, make_card, weights_hashes, write_card
from actionunits.modeling_au import AUPreTrainedModel
from actionunits.onnx_model import FILE as ONNX_FILE
from actionunits.onnx_model import TOLERANCE, OnnxAUModel, largest_difference
from actionunits.pictures import sample_photo
from actionunits.publishing_terms import DataTerms, training_terms
from actionunits.reports import groups_table, metrics_table

ALLOWED = (
    *("README.md", "LICENSE*", ".gitattributes", "run.json", "metrics.json", "recipe.yaml"),
    *("config.json", "preprocessor_config.json", "model*.safetensors", "model.safetensors.index.json"),
    *(ONNX_FILE, f"{LANDMARKS}/README.md", f"{LANDMARKS}/config.json", f"{LANDMARKS}/model.safetensors"),
)
"""Files allowed in a published folder, beside the Python files of its export."""
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz")
"""Suffixes of files that may run code when they are loaded."""
REQUIRED = ("README.md", "config.json", "preprocessor_config.json")
EXPORTED = "# Copied from actionunits "
"""Beginning of an export's Python files."""
MEASURED_SECTIONS = ("Evaluation", "Groups of people")
_MEASURE = re.compile(r"\b(F1|AUC|accuracy|correlations?|false alarms?)\b", re.IGNORECASE)
_NUMBER = re.compile(r"(?<!\w)\d")  # but not that of AU12
CARD_FIELDS = ("license", "library_name", "model_name", "tags")


def stage_folder(
    folder: Path, staged: Path, repo: str, with_code: bool = False, template: Path | None = None
) -> None:
    """Copy a model folder as it will be published: its card names the repository, code can be added.

    Args:
        folder: The saved model; it is not changed.
        staged: Folder of the copy.
        repo: Name on the Hub, "org/name".
        with_code: Make the copy self-contained, see `export_code`.
        template: Template of the card, for a folder with a run but no card.

    Raises:
        OSError: A file cannot be copied.
        ValueError: No card can be made from the run, or the model is not of this package.
    """
    _copy_writable(folder, staged)
    card = staged / "README.md"
    if template is not None and not os.path.lexists(card) and (staged / "run.json").is_file():
        try:
            write_card(staged, template)
        except Exception as error:  # whatever the run lacks
            raise ValueError(f"No card can be written from the run: {_reason(error)}") from error
    if with_code and not check_files(staged):  # a folder that is refused anyway may have links to elsewhere
        export_code(staged)
    if card.is_file() and not card.is_symlink() and (text := _text(card)) is not None:
        text = text.replace(PLACEHOLDER, repo)
        if with_code and "trust_remote_code=True" not in text:
            text = _with_code_note(text, repo)
        card.write_text(text, encoding="utf-8")


def check_folder(
    folder: Path,
    report: Callable[[str, list[str]], None] = lambda name, problems: None,
    template: Path | None = None,
) -> list[str]:
    """Return all problems that prevent publishing a folder, from its own files alone.

    Args:
        folder: A staged folder.
        report: Called after each check with its name and its problems.
        template: Template of the card, to compare the card with one made from the run.
    """
    found = []
    for name, check in CHECKS.items():
        problems = check(folder)
        if name == "card" and template is not None and not problems:
            problems = check_card_against_run(folder, template)
        report(name, problems)
        found += problems
    return found


def check_files(folder: Path) -> list[str]:
    """All files of a model are there, and no pickles, links or others."""
    required = [folder / name for name in REQUIRED]
    problems = [f"{path.name} is missing." for path in required if not (path.is_file() or path.is_symlink())]
    if not any(folder.glob("*.safetensors")):
        problems.append("There are no weights, model.safetensors.")
    for path in sorted(p for p in folder.rglob("*") if p.is_symlink() or not p.is_dir()):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            problems.append(f"{name} is a link; put the file itself there.")
        elif path.suffix in PICKLES:
            problems.append(f"{name} may run code when it is read; publish safetensors only.")
        elif not _belongs(name, path):
            problems.append(f"{name} does not belong to a model; take it out.")
        elif path.suffix == ".json" and not _read(path):
            problems.append(f"{name} is broken: it holds no JSON object.")
    return problems


def check_card(folder: Path) -> list[str]:
    """The card is complete, and its figures, hashes and terms are those of the other files."""
    file = folder / "README.md"
    if not file.is_file():
        return ["There is no card; write README.md with `python -m actionunits.model_card`."]
    try:
        card = ModelCard.load(file)
    except Exception as error:  # broken YAML raises errors of many types
        return [f"The head of README.md cannot be read: {error}"]
    text = file.read_text(encoding="utf-8")
    data = card.data.to_dict()
    names = {**data, "model_name": card.data.model_name or data.get("model_name")}
    problems = [f"The head of README.md lacks {field}." for field in CARD_FIELDS if not names.get(field)]
    problems += [
        f"README.md lacks the section '## {section}', or it is empty."
        for section in SECTIONS
        if not re.search(rf"^## {re.escape(section)}\n+(?!#)\S", text, re.MULTILINE)
    ]
    problems += [
        f"README.md does not give the SHA-256 of {n}."
        for n, sha in weights_hashes(folder).items()
        if sha not in text
    ]
    problems += [
        f"README.md still says {mark}." for mark in (PLACEHOLDER, "More Information Needed") if mark in text
    ]
    try:
        return problems + _check_figures(folder, card, text) + _check_terms(folder, card, text)
    except (AttributeError, LookupError, TypeError) as error:
        return [*problems, f"metrics.json or run.json is not as train.py writes it: {_reason(error)}."]


def check_card_against_run(folder: Path, template: Path) -> list[str]:
    """Every line of the card with a figure is in the card made from the run, and the other way round.

    Args:
        folder: A staged folder; without a run there is nothing to compare.
        template: Template of the card.
    """
    if not (folder / "run.json").is_file():
        return []
    try:
        expected = make_card(folder, template)
    except Exception as error:  # whatever the run lacks
        return [f"No card can be written from the run to compare README.md with: {_reason(error)}"]
    card = ModelCard.load(folder / "README.md")
    lines, own = _figure_lines(card.text), _figure_lines(expected.text)
    problems = [f"README.md gives figures that the run does not: {line}" for line in lines if line not in own]
    if not problems:
        problems = [f"README.md leaves out what was measured: {line}" for line in own if line not in lines]
    given, measured = (getattr(side.data, "eval_results", None) or [] for side in (card, expected))
    of = measured[0].dataset_type, measured[0].dataset_name
    problems += [
        f"README.md gives {result.metric_type} on {result.dataset_name} ({result.dataset_type}), "
        f"but it was measured on {of[1]} ({of[0]})."
        for result in given
        if (result.dataset_type, result.dataset_name) != of
    ]
    return problems


def check_model(folder: Path) -> list[str]:
    """The model loads without missing or unexpected keys, and runs on a photograph."""
    paths = [
        f"{name} names a place on this machine: {value}."
        for name in ("config.json", "preprocessor_config.json", "run.json")
        for value in _strings(_read(folder / name))
        if os.path.isabs(value)
    ]
    try:
        model, info = AutoModel.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
        processor = AutoImageProcessor.from_pretrained(folder)
    except Exception as error:  # whatever is wrong with the files
        return [*paths, f"The folder does not load: {error}"]
    if not isinstance(model, AUPreTrainedModel) or not isinstance(processor, AUImageProcessor):
        return [*paths, f"{type(model).__name__}, {type(processor).__name__} are not of this package."]
    keys = [
        f"{kind.replace('_', ' ').capitalize()}: {sorted(found)}." for kind, found in info.items() if found
    ]
    return [*paths, *keys, *_check_answer(model.eval(), processor), *_check_onnx(folder, model)]


def check_code(folder: Path) -> list[str]:
    """A self-contained folder works without this package, in a fresh interpreter."""
    if "auto_map" not in _read(folder / "config.json"):
        is_left = any(folder.glob("*.py"))  # a model that is saved again loses its auto_map
        return ["There is code that config.json does not name; export it anew, or take it out."] * is_left
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "HF_MODULES_CACHE": cache, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", _STRANGER, str(folder), str(sample_photo())]
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
    return [f"Without the package the folder fails: {run.stderr.strip()[-800:]}"] if run.returncode else []


CHECKS: dict[str, Callable[[Path], list[str]]] = {
    "files": check_files,
    "card": check_card,
    "model": check_model,
    "code": check_code,
}

_STRANGER = """
import sys


class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "actionunits":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Hidden())
from transformers import AutoModel, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor

folder, photo = sys.argv[1:]
AutoModel.from_pretrained(folder, trust_remote_code=True)
AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
assert pipeline("au-detection", model=folder, trust_remote_code=True)(photo), "no face found"
"""
"""A script that uses a folder without this package; arguments are the folder and a photograph."""


def folder_terms(folder: Path) -> list[DataTerms]:
    """Return the terms of the training data of a folder's model."""
    run = folder / "run.json"
    return training_terms(_read(run) if run.is_file() else None)


def _copy_writable(folder: Path, copy: Path) -> None:
    """Copy a folder that may be read-only."""
    try:
        shutil.copytree(folder, copy, symlinks=True, dirs_exist_ok=True)
    except shutil.Error as error:
        raise OSError("; ".join(reason for *_, reason in error.args[0])) from error
    for path in (copy, *copy.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() else 0o644)


def _belongs(name: str, path: Path) -> bool:
    if path.suffix == ".py" and "/" not in name:
        return path.read_text(encoding="utf-8", errors="replace").startswith(EXPORTED)
    return any(
        fnmatch.fnmatchcase(name, pattern) and name.count("/") == pattern.count("/")  # * matches a / too
        for pattern in ALLOWED
    )


def _check_figures(folder: Path, card: ModelCard, text: str) -> list[str]:
    """The figures of the card's head and tables are those of `metrics.json`."""
    results = getattr(card.data, "eval_results", None) or []
    if not (folder / "metrics.json").is_file():
        return ["README.md has figures, but there is no metrics.json that they come from."] if results else []
    metrics = _read(folder / "metrics.json")
    split = "test" if "test" in metrics else "validation"
    report = metrics[split]
    mean = report["calibrated"]["mean"]
    problems = [] if results else ["README.md gives no figures in its head (model-index)."]
    for result in results:
        name, recorded = result.metric_type, mean.get(result.metric_type)
        if result.dataset_split != split or recorded is None or result.metric_value != round(recorded, 4):
            problems.append(
                f"README.md gives {name} {result.metric_value} on {result.dataset_split}, "
                f"but metrics.json has {recorded} on {split}."
            )
    problems += _check_thresholds(_read(folder / "config.json"), report)
    tables = {"action units": metrics_table(report)}
    if gaps := group_gaps(report):
        tables |= {"groups of people": groups_table(report)}
        if f"**{gaps[0].size:.2f}**" not in text:
            problems.append(f"README.md does not give the largest gap between groups, {gaps[0].size:.2f}.")
    problems += [
        f"The table of {what} in README.md is not that of metrics.json."
        for what, table in tables.items()
        if table not in text
    ]
    return problems


def _check_thresholds(config: Mapping[str, Any], report: Mapping[str, Any]) -> list[str]:
    """The model's thresholds are those of its evaluation."""
    labels = config.get("id2label", {}).values()
    decides = dict(zip(labels, config.get("au_thresholds") or [0.5] * len(labels), strict=False))
    measured = {label: row["threshold"] for label, row in report["calibrated"]["per_au"].items()}
    return [
        f"config.json decides {label} at {decides[label]}, but metrics.json was measured at {threshold}."
        for label, threshold in measured.items()
        if label in decides and abs(decides[label] - threshold) > 1e-6
    ]


def _figure_lines(text: str) -> list[str]:
    """Lines of a card with measured numbers: all of two sections, elsewhere those that name a metric."""
    lines, section = [], ""
    for line in text.splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ").strip()
        elif _NUMBER.search(line) and (section in MEASURED_SECTIONS or _MEASURE.search(line)):
            lines.append(line.strip())
    return lines


def _check_terms(folder: Path, card: ModelCard, text: str) -> list[str]:
    """The card states the terms of the training data."""
    if not (folder / "run.json").is_file():
        return []
    bound = [terms for terms in folder_terms(folder) if not terms.is_free]
    problems = [
        f"README.md does not give the terms of {terms.name}."
        for terms in bound
        if terms.terms not in text or terms.name not in text
    ]
    licence = card.data.to_dict().get("license")
    if bound and licence not in (None, "other"):
        problems.append(f"README.md puts weights trained on {bound[0].name} under {licence}; say `other`.")
    return problems


def _check_answer(model: Any, processor: Any) -> list[str]:
    """Run the model on a real photograph, from the picture to the logits."""
    if (
        model.config.places
        and processor.au_definition != "none"
        and list(processor.aus) != list(model.config.places)
    ):
        return [f"The processor's action units {processor.aus} are not the model's {model.config.places}."]
    try:
        inputs = processor(sample_photo(), face_detector=FaceDetector(), return_tensors="pt")
        with torch.inference_mode():
            logits = model(**inputs).logits
    except Exception as error:  # of any type, from the model
        return [f"The model fails on a photograph: {error}"]
    if logits.shape != (1, model.config.num_labels) or not logits.isfinite().all():
        return [f"The model answers {logits.tolist()} for one face and {model.config.num_labels} labels."]
    return []


def _check_onnx(folder: Path, model: Any) -> list[str]:
    if not (folder / ONNX_FILE).is_file():
        return []
    try:
        difference = largest_difference(OnnxAUModel(folder / ONNX_FILE, model.config), model)
    except Exception as error:  # ONNX Runtime is missing, or the file is of another model
        return [f"{ONNX_FILE} cannot be checked: {error}"]
    if difference <= TOLERANCE:
        return []
    return [f"{ONNX_FILE} answers otherwise than the weights, by {difference:.2g}; export anew."]


def _with_code_note(text: str, repo: str) -> str:
    """Explain below the first example how to run without the package."""
    note = (
        "\nThe code is in this repository, too; without the package, but with "
        f"{', '.join(REQUIREMENTS)} installed, this does the same:\n\n"
        "```python\nfrom transformers import pipeline\n\n"
        f'detect = pipeline("au-detection", model="{repo}", trust_remote_code=True)\n```\n'
    )
    start = text.find("```python\n")
    end = text.find("\n```\n", start) + len("\n```\n") if start >= 0 else len(text)
    return text[:end] + note + text[end:]


def _strings(value: Any) -> Iterator[str]:
    """Yield all strings in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from _strings(inner)


def _read(path: Path) -> dict[str, Any]:
    """Read a JSON object; {} if there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _text(path: Path) -> str | None:
    """Read a text; None if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


def _reason(error: Exception) -> str:
    """The message of an error; that of a KeyError is the key alone."""
    return f"there is no {error}" if isinstance(error, KeyError) else str(error)
