"""What the pretraining scripts share: a folder that belongs to one run, told by its `settings.json`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from actionunits.files import whole_file


def settings_of(args: argparse.Namespace, said_anew: Collection[str]) -> dict[str, Any]:
    """What makes a run this one, as JSON holds it: all options but those that may change when it goes on."""
    settings = {name: value for name, value in vars(args).items() if name not in said_anew}
    return json.loads(json.dumps(settings, default=str))


def open_run(output: Path, settings: dict[str, Any]) -> bool:
    """Make the run's folder, or check that the run found there is this one; say whether anything is to do.

    Raises:
        ValueError: The folder holds a run with other settings.
    """
    stored = output / "settings.json"
    if stored.is_file() and (before := json.loads(stored.read_text(encoding="utf-8"))) != settings:
        changed = sorted(name for name in settings if before.get(name) != settings[name])
        raise ValueError(f"{output} holds a run with other values of {changed}; choose another --output.")
    output.mkdir(parents=True, exist_ok=True)
    return not (output / "model" / "config.json").is_file()


def keep_settings(output: Path, settings: dict[str, Any]) -> None:
    """Make the folder this run's, once its data have turned out to be there and to fit."""
    with whole_file(output / "settings.json") as part:
        part.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
