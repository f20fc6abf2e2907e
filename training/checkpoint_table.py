"""The README's table of the package's checkpoints: size, speed, scores.

    python training/checkpoint_table.py            # prints it, with newly measured times
    python training/checkpoint_table.py --write    # puts it into README.md

Sizes and scores come from the files of each checkpoint; the scores are those on test people at calibrated
thresholds, in `metrics.json`. A test compares them with the README. The time is that of the network for one
aligned face, in float32 on one CPU thread, relative to the default's: the median of the ratios over runs in
turns, so that other load on the machine affects all alike.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import CONFIG_MAPPING, AutoModel

from actionunits import checkpoints
from actionunits.model_card import card_name, group_gaps, members_of
from number_options import from_one
from table import write_between

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- begin: python training/checkpoint_table.py --write -->", "<!-- end -->"
METHODS = {
    "au-escda": "ESCDA",
    "au-lsc": "LSC",
    "au-gda": "GDA",
    "au-ac2d": "AC2D",
    "au-auformer": "AUFormer",
    "au-lac": "LAC",
    "au-gtlenet": "GTLE-Net",
    "au-geometry": "geometry",
}
OTHERWISE = {
    "au-ac2d": "an extra loss on the trunk",
    "au-auformer": "a small ViT, trained here, instead of ImageNet's",
    "au-lac": "ResNet not pretrained, a different loss, clips of one frame",
}
"""Deviations from the paper other than the size; those of pretraining are in the run."""
NO_PAPER = {"au-ensemble": "no paper averages these", "au-geometry": "no paper's network"}
COLUMNS = (
    "`checkpoints/`",
    "method",
    "parameters",
    "size",
    "time",
    "F1",
    "AUC",
    "correlation",
    "largest gap between groups (F1)",
    "not as in the paper",
)


@dataclass(frozen=True)
class Row:
    """A row of the table."""

    name: str
    model: Any
    run: dict[str, Any]
    report: dict[str, Any]
    megabytes: float

    def cells(self, time: float) -> list[str]:
        """The cells, in the order of `COLUMNS`; the time is relative to the first checkpoint's."""
        mean = self.report["calibrated"]["mean"]
        gaps = group_gaps(self.report)
        return [
            f"[`{self.name}`](model_cards/{card_name(self.run)}.md)",
            method_name(self.run),
            _millions(self.run["parameters"]),
            f"{self.megabytes:.1f} MB",
            f"{time:.2g}",
            *(f"{mean[key]:.2f}" for key in ("f1", "auc", "correlation")),
            f"{gaps[0].size:.2f} ({gaps[0].kind}: {gaps[0].worst}, {gaps[0].best})" if gaps else "unknown",
            NO_PAPER.get(self.run["model_type"])
            or "; ".join([paper_size(self.model), *deviations(self.run)]),
        ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, or write it into the README."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="into README.md")
    parser.add_argument("--rounds", type=from_one, default=30, help="runs of each, in turns")
    args = parser.parse_args(arguments)
    names = checkpoints.names()
    table = make_table([read_row(name) for name in names], measure_times(names, args.rounds))
    if args.write:
        write_between(README, BEGIN, table, END)
    else:
        print(table)


def make_table(rows: Sequence[Row], times: dict[str, float]) -> str:
    """The table as Markdown."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---|---|" + "---:|" * 6 + "---|---|"]
    lines += [f"| {' | '.join(row.cells(times[row.name]))} |" for row in rows]
    return "\n".join(lines)


def read_row(name: str) -> Row:
    """Read the files of a checkpoint."""
    folder = checkpoints.path(name)
    run, metrics = (json.loads((folder / f"{file}.json").read_text()) for file in ("run", "metrics"))
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return Row(name, AutoModel.from_pretrained(folder).eval(), run, metrics["test"], size / 1e6)


def _millions(parameters: int) -> str:
    return f"{parameters / 1e6:.{1 if parameters >= 5e4 else 2}f} M"


def method_name(run: dict[str, Any]) -> str:
    """The method of a run, or those of an ensemble."""
    names = [METHODS[member["model_type"]] for member in members_of(run)]
    return f"mean of {', '.join(names[:-1])} and {names[-1]}" if names else METHODS[run["model_type"]]


def paper_size(model: Any) -> str:
    """Parameters and input size of the paper's network for the same action units."""
    make: Any = CONFIG_MAPPING[model.config.model_type]
    config = getattr(make, "paper", make)(aus=list(model.config.aus))
    with torch.device("meta"):
        parameters = sum(p.numel() for p in type(model)(config).parameters())
    side = config.processor_options["size"]["height"]
    return f"{parameters / 1e6:.1f} M parameters, {side} px there"


def deviations(run: dict[str, Any]) -> list[str]:
    """Other deviations of a checkpoint from its paper."""
    found = [OTHERWISE[run["model_type"]]] if run["model_type"] in OTHERWISE else []
    if run["model_type"] in ("au-escda", "au-lsc", "au-gda") and run.get("backbones") == {}:
        found.append("not pretrained on faces")
    if run["model_type"] == "au-gtlenet":
        triplets = run.get("encoder", {}).get("triplets")
        found.append(f"encoder pretrained on the {triplets}" if triplets else "encoder not pretrained")
    return found


def measure_times(names: Sequence[str], rounds: int) -> dict[str, float]:
    """Time for one face, relative to the first checkpoint."""
    torch.set_num_threads(1)
    forwards = {name: forward(name) for name in names}
    for run in forwards.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in tqdm(range(rounds), "measuring", disable=None):
        for name, run in forwards.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    first = np.array(seconds[names[0]])
    return {name: float(np.median(np.array(values) / first)) for name, values in seconds.items()}


def forward(name: str) -> Callable[[], Any]:
    """A function that runs a checkpoint's network on one face."""
    model = AutoModel.from_pretrained(checkpoints.path(name)).eval()
    side = model.config.processor_options["size"]["height"]
    inputs = {
        "pixel_values": torch.randn(1, 3, side, side),
        "au_centers": torch.rand(1, len(model.config.places), 2, 2) * side,
    }
    return torch.inference_mode()(lambda: model(**inputs))


if __name__ == "__main__":
    main()
