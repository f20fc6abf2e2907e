"""Shared by the pretraining scripts: options, settings, checkpoints and the loop of a run."""

from __future__ import annotations

import argparse
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from actionunits.files import whole_file
from network_training import RunLog, WarmupCosine, read_state
from number_options import from_one, from_zero


def add_run_options(parser: argparse.ArgumentParser, validate_every: int) -> None:
    """Add the options that all pretraining scripts share."""
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder of the run")
    add("--validate-every", type=from_one, default=validate_every, help="steps between checkpoints, too")
    add("--precision", default="fp32", choices=["fp32", "bf16"])
    add("--workers", type=from_zero, default=0, help="processes of the data loader")
    add("--seed", type=from_zero, default=0)


def run_once(
    args: argparse.Namespace,
    may_change: Collection[str],
    prepare: Callable[[argparse.Namespace, RunLog], PretrainingRun],
) -> None:
    """Start, resume or skip the run in the folder `args.output`, which belongs to the settings of one run.

    Args:
        args: The command line.
        may_change: Options that may differ when the run is resumed.
        prepare: Reads the data and returns the run.

    Raises:
        ValueError: The folder holds a run with other settings.
    """
    settings = {name: value for name, value in vars(args).items() if name not in may_change}
    settings = json.loads(json.dumps(settings, default=str))
    stored = args.output / "settings.json"
    if stored.is_file() and (before := json.loads(stored.read_text(encoding="utf-8"))) != settings:
        changed = sorted(name for name in settings if before.get(name) != settings[name])
        raise ValueError(
            f"{args.output} holds a run with other values of {changed}; choose another --output."
        )
    args.output.mkdir(parents=True, exist_ok=True)
    if not (args.output / "model" / "config.json").is_file():
        run = prepare(args, RunLog(args.output / "log.jsonl"))
        with whole_file(stored) as part:  # only now, as the data may have been invalid
            part.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        run.run()
    print(f"wrote {args.output / 'model'}")


class PretrainingRun(ABC):
    """A run from its last checkpoint to the folder `model`.

    Batches and augmentation must depend on seed and step only, as checkpoints hold no random state.

    Args:
        args: The command line.
        log: The run's log.
        parts: Modules (or None) and "optimizer" by their name in checkpoints.
        parameters: The trained parameters.
        warmup_steps: Upper bound of the steps of warm-up, which are at most a tenth of all.
    """

    unit: str  # of the progress bar

    def __init__(
        self,
        args: argparse.Namespace,
        log: RunLog,
        parts: dict[str, Any],
        parameters: Iterable[nn.Parameter],
        warmup_steps: int,
    ):
        self.args, self.log = args, log
        self.parts, self.parameters = parts, list(parameters)
        self.factor = WarmupCosine(min(warmup_steps, args.steps / 10), args.steps)
        self.step, self.metrics = 0, dict[str, Any]()
        self.norm = torch.zeros(())  # of the last gradient

    @abstractmethod
    def _batches(self) -> Iterable[dict[str, Tensor]]:
        """Batches from the current step on, at most to the last step."""

    @abstractmethod
    def _train_step(self, batch: dict[str, Tensor]) -> Tensor:
        """Train on a batch and return its loss."""

    @abstractmethod
    def _validate(self) -> dict[str, Any]:
        """Metrics on the validation data."""

    @abstractmethod
    def _save_model(self) -> None:
        """Write the folder `model`."""

    def run(self) -> None:
        """Train the remaining steps, and save the model."""
        self._resume()
        losses: list[Tensor] = []
        total = self.args.steps
        with tqdm(total=total, initial=self.step, desc=self.unit, unit="step", disable=None) as bar:
            while self.step < total:
                for batch in self._batches():
                    losses.append(self._train_step(batch))
                    bar.update()
                    if self.step % self.args.validate_every == 0 or self.step == total:
                        self._log_metrics(float(torch.stack(losses).mean()), bar)
                        self._save_checkpoint()
                        losses = []
                    if self.step == total:
                        break
        self._save_model()

    def _update(self, loss: Tensor) -> Tensor:
        """Update the parameters by the gradient of a loss."""
        optimizer = self.parts["optimizer"]
        for group in optimizer.param_groups:
            group["lr"] = self.args.lr * self.factor(self.step)
        optimizer.zero_grad()
        loss.backward()
        self.norm = torch.nn.utils.clip_grad_norm_(self.parameters, 5.0)
        optimizer.step()
        self.step += 1
        return loss.detach()

    def _log_metrics(self, loss: float, bar: tqdm) -> None:
        for name, value in {"loss": loss, "gradient's norm": float(self.norm)}.items():
            if not math.isfinite(value):  # weights are broken before the loss shows it
                raise FloatingPointError(
                    f"the {name} is {value} at step {self.step}; lower --lr={self.args.lr}."
                )
        self.metrics = {"steps": self.step, "training_loss": loss, **self._validate()}
        bar.set_postfix({k: f"{v:.3f}" for k, v in self.metrics.items() if isinstance(v, float)})
        self.log.write("validation", **self.metrics)

    def _save_checkpoint(self) -> None:
        state = {name: part and part.state_dict() for name, part in self.parts.items()}
        with whole_file(self.args.output / "checkpoint.pt") as file:
            torch.save({**state, "step": self.step, "metrics": self.metrics}, file)

    def _resume(self) -> None:
        path = self.args.output / "checkpoint.pt"
        if path.is_file():
            state = read_state(path, next(iter(self.parameters)).device)
            for name, part in self.parts.items():
                if part is not None:
                    part.load_state_dict(state[name])
            self.step, self.metrics = state["step"], state["metrics"]
            self.log.write("resumed", step=self.step)
