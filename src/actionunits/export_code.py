"""Make a model folder self-contained: add the code of its model, image processor and pipeline.

    export_code(folder)

adds the Python files, flattened into one folder as transformers' loader requires, the face landmark network,
and `auto_map` and `custom_pipelines` in the JSON files. Then, where this package is not installed,

    pipeline("au-detection", model=folder, trust_remote_code=True)

and `AutoModel`, `AutoImageProcessor` work as they do here. Where it is installed, its own code is used, and
`trust_remote_code` is not needed.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoModel

from actionunits import checkpoints
from actionunits.files import whole_file

PACKAGE = "actionunits"
ENTRY = "actionunits_entry"
LANDMARKS = "face_landmarks"
TASK = "au-detection"
ROOTS = (f"{PACKAGE}.image_processing_au", f"{PACKAGE}.pipelines.au_detection")
REPLACED = {f"{PACKAGE}.checkpoints": f"{PACKAGE}.export_checkpoints"}
"""Modules that are replaced by another one, under the name of the first."""

REQUIREMENTS = ("transformers", "torch", "opencv-python-headless", "scikit-image", "pillow", "numpy")
"""Packages that the exported code imports, by their names for pip."""

_HEADER = "# Copied from {package} {version} by its export; SPDX-License-Identifier: Apache-2.0\n"
_ENTRY = '''"""The way into the code of this folder: the classes that `auto_map` and `custom_pipelines` name.

All of them start here, so that the loader of transformers keeps all files in one place.
"""

from .au_detection import AUDetectionPipeline as PackagedPipeline
from .checkpoints import look_in
from .image_processing_au import AUImageProcessor as PackagedProcessor
from .{config_module} import {config_class}
from .{model_module} import {model_class}


class AUImageProcessor(PackagedProcessor):
    """The image processor; for boxes without landmarks it uses the landmark network beside its options."""

    @classmethod
    def get_image_processor_dict(cls, pretrained_model_name_or_path, **kwargs):
        look_in(pretrained_model_name_or_path, kwargs.get("revision"))
        return super().get_image_processor_dict(pretrained_model_name_or_path, **kwargs)


class AUDetectionPipeline(PackagedPipeline):
    """The pipeline; it finds faces by the landmark network beside the weights of the model."""

    _load_image_processor = True

    def __init__(self, model, **kwargs):
        look_in(model.name_or_path, getattr(model.config, "_commit_hash", None))
        super().__init__(model, **kwargs)


__all__ = ["AUDetectionPipeline", "AUImageProcessor", "{config_class}", "{model_class}"]
'''


def export_code(folder: str | os.PathLike) -> list[str]:
    """Add the code, and the landmark network, to a saved model with its image processor.

    Args:
        folder: Folder with `config.json` of a registered model and `preprocessor_config.json`.

    Returns:
        Names of the written files, relative to the folder.

    Raises:
        FileNotFoundError: One of the two is missing.
        ValueError: One of the two is broken, the model is not of this package, or an import cannot be
            flattened.
    """
    folder = Path(folder)
    config = _read(folder / "config.json")
    processor = _read(folder / "preprocessor_config.json")
    config_class, model_class = model_classes(config.get("model_type"))
    files = flatten([config_class.__module__, model_class.__module__, *ROOTS])
    entry = _ENTRY.format(
        config_module=_base(config_class.__module__),
        config_class=config_class.__name__,
        model_module=_base(model_class.__module__),
        model_class=model_class.__name__,
    )
    files[f"{ENTRY}.py"] = _header() + entry
    names = {
        "AutoConfig": config_class.__name__,
        "AutoModel": model_class.__name__,
        "AutoModelForImageClassification": model_class.__name__,
        "AutoImageProcessor": "AUImageProcessor",
    }
    auto_map = {auto: f"{ENTRY}.{name}" for auto, name in names.items()}
    task = {"impl": f"{ENTRY}.AUDetectionPipeline", "pt": ["AutoModel"], "type": "image"}
    config |= {"auto_map": auto_map, "custom_pipelines": {TASK: task}}
    processor |= {"auto_map": {"AutoImageProcessor": auto_map["AutoImageProcessor"]}}
    files["config.json"] = json.dumps(config, indent=2) + "\n"
    files["preprocessor_config.json"] = json.dumps(processor, indent=2) + "\n"
    for name, text in sorted(files.items()):
        with whole_file(folder / name) as part:
            part.write_bytes(text.encode("utf-8"))
    return sorted([*files, *_copy_landmarks(folder)])


def model_classes(model_type: str | None) -> tuple[type, Any]:
    """Return configuration and model class of a registered type of this package.

    Raises:
        ValueError: There is no such type; the message lists those that there are.
    """
    known = sorted(name for name in CONFIG_MAPPING if name.startswith("au-"))  # type: ignore[attr-defined]
    if model_type not in known:
        raise ValueError(f"model_type {model_type!r} is none of this package's: {known}.")
    config_class = CONFIG_MAPPING[model_type]
    return config_class, AutoModel._model_mapping[config_class]  # type: ignore[attr-defined]


def flatten(modules: list[str]) -> dict[str, str]:
    """Return the source of modules, and of all modules of this package that they import, as one flat folder.

    Args:
        modules: Full names, such as "actionunits.models.escda.modeling_escda".

    Returns:
        Source by file name, with imports of this package as `from .name import`.

    Raises:
        ValueError: Two modules have the same flat name, or the form of an import has no flat counterpart.
    """
    files: dict[str, str] = {}
    homes: dict[str, str] = {}
    waiting = sorted(set(modules))
    while waiting:
        module = waiting.pop()
        base = _base(module)
        if homes.setdefault(base, module) != module:
            raise ValueError(f"{homes[base]} and {module} would both become {base}.py; rename one of them.")
        if f"{base}.py" in files:
            continue
        text, imported = _flatten_imports(REPLACED.get(module, module))
        files[f"{base}.py"] = _header() + text
        waiting += sorted(imported)
    return files


def _flatten_imports(module: str) -> tuple[str, set[str]]:
    """Return a module's source with flat imports, and the modules of this package that it imports."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None, module
    text = Path(spec.origin).read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    package = module if spec.submodule_search_locations else module.rpartition(".")[0]
    imported: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            if any(alias.name.split(".")[0] == PACKAGE for alias in node.names):
                raise ValueError(f"{module}, line {node.lineno}: write `from {PACKAGE} import ...`.")
        elif isinstance(node, ast.ImportFrom):
            target = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            if target.split(".")[0] != PACKAGE:
                continue
            if target == PACKAGE:  # `from actionunits import checkpoints` names modules
                imported |= {f"{PACKAGE}.{alias.name}" for alias in node.names}
                flat = "from . import"
            else:
                imported.add(target)
                flat = f"from .{_base(target)} import"
            line = lines[node.lineno - 1]
            lines[node.lineno - 1] = re.sub(r"from\s+\S+\s+import", flat, line, count=1)
    return "".join(lines), imported


def _copy_landmarks(folder: Path) -> list[str]:
    """Copy the landmark network of the face detector."""
    source = checkpoints.path(LANDMARKS)
    names = [f"{LANDMARKS}/{name}" for name in ("README.md", "config.json", "model.safetensors")]
    (folder / LANDMARKS).mkdir(exist_ok=True)
    for name in names:
        with whole_file(folder / name) as part:
            shutil.copyfile(source.parent / name, part)
    return names


def _header() -> str:
    return _HEADER.format(package=PACKAGE, version=version(PACKAGE))


def _base(module: str) -> str:
    """Return the name of a module in the flat folder, prefixed with its package's if it is ambiguous."""
    *parents, name = module.split(".")[1:]
    is_taken = parents and importlib.util.find_spec(f"{PACKAGE}.{name}") is not None
    return "_".join([*parents, name]) if is_taken else name


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}; save the model and its image processor.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no JSON object.")
    return values
