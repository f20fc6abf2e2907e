r"""Train GTLE-Net's expression encoder on triplets of faces: the two that look alike are to lie near.

    python training/pretrain_expression.py --synthetic corpora/synthetic --preset compact \
        --output runs/expression
    python training/pretrain_expression.py --fec-table FEC/faceexp-comparison-data-train-public.csv \
        --fec-photographs FEC/images --init encoders/vggface2 --output runs/expression

The second takes the photographs that have been downloaded, and says how many triplets lack theirs. The loss
is GTLE-Net's Eq. 1. The same command again continues an interrupted run, to the bit. It writes

    RUN/settings.json   the command line as it was used
        log.jsonl       one line an event: triplets, losses, accuracy on triplets that were held out
        prepared/       faces decoded and aligned once
        checkpoint.pt   the state of the run
        model/          the encoder with its image processor and metrics.json:
                        GtleNetForAUDetection.from_encoder("RUN/model")
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from actionunits import AUImageProcessor, FaceDetector, GlobalExpressionEncoder, GlobalExpressionEncoderConfig
from actionunits.data import NO_AUGMENTATION, Augmentation, InputGeometry, prepare_synthetic
from actionunits.data.augmentation import compose, jitter, sample_placement, warp
from actionunits.data.triplets import ExpressionTriplets, prepare_fec, read_fec, triplets_by_distance
from actionunits.models.gtlenet.modeling_gtlenet import triplet_loss
from network_training import RunLog, WarmupCosine, parameter_groups, replace_folder, seeded_generator

AUGMENTATION = Augmentation(brightness=0.3, contrast=0.3)
HELD_OUT_SHARE = 0.05  # of FEC's triplets, where no file for validation is given
SAID_ANEW = ("output", "cache")  # what another command may change about the same run


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as the command line says."""
    args = parse_arguments(arguments)
    if open_run(args):
        log = RunLog(args.output / "log.jsonl")
        train, validation = read_triplets(args, log)
        training = Training(args, train, validation, log)
        training.run()
    print(f"wrote {args.output / 'model'}")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--synthetic", type=Path, help="folder of the synthetic corpus")
    add("--fec-table", type=Path, help="CSV file of FEC")
    add("--fec-photographs", type=Path, help="folder of FEC's photographs, as far as downloaded")
    add("--fec-validation-table", type=Path, help="FEC's CSV file for testing")
    add("--output", type=Path, required=True, help="folder of the run")
    add("--cache", type=Path, help="decoded faces, to share between runs")
    add(
        "--preset", default="", choices=["", "compact"], help="size of a new encoder; the paper's if left out"
    )
    add("--init", default="", help="encoder to start from, such as one of convert_facenet_to_hf")
    add("--triplets", type=int, default=100_000, help="drawn from the synthetic corpus")
    add("--min-contrast", type=float, default=1.3, help="of their distances, see triplets_by_distance")
    add("--steps", type=int, default=20_000)
    add("--batch", type=int, default=30, help="triplets of a step")
    add("--lr", type=float, default=5e-4)
    add("--weight-decay", type=float, default=1e-4)
    add("--validation-triplets", type=int, default=2000)
    add("--validate-every", type=int, default=1000, help="steps; the run is saved then, too")
    add("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    if (args.synthetic is None) == (args.fec_table is None):
        parser.error("give --synthetic, or --fec-table with --fec-photographs")
    if args.fec_table is not None and args.fec_photographs is None:
        parser.error("--fec-table needs --fec-photographs, the folder where they have been downloaded to")
    return args


def open_run(args: argparse.Namespace) -> bool:
    """Make the run's folder, or check that the run found there is this one; say whether anything is to do.

    Raises:
        ValueError: The folder holds a run with other settings.
    """
    settings = {name: value for name, value in vars(args).items() if name not in SAID_ANEW}
    settings = json.loads(json.dumps(settings, default=str))
    stored = args.output / "settings.json"
    if stored.is_file():
        if (before := json.loads(stored.read_text())) != settings:
            changed = sorted(name for name in settings if before.get(name) != settings[name])
            raise ValueError(
                f"{args.output} holds a run with other values of {changed}; choose another --output."
            )
    else:
        args.output.mkdir(parents=True, exist_ok=True)
        partial = stored.with_name("settings.partial")
        partial.write_text(json.dumps(settings, indent=1) + "\n")
        os.replace(partial, stored)
    return not (args.output / "model" / "config.json").is_file()


def read_triplets(args: argparse.Namespace, log: RunLog) -> tuple[ExpressionTriplets, ExpressionTriplets]:
    """Triplets to train with, and others to check with."""
    cache = args.cache or args.output / "prepared"
    if args.synthetic is not None:
        count = {"train": args.triplets, "validation": args.validation_triplets}
        train, validation = (synthetic_triplets(args, split, count[split], cache) for split in count)
    else:
        train = fec_triplets(args.fec_table, args.fec_photographs, cache / "fec", log)
        if args.fec_validation_table is not None:
            validation = fec_triplets(
                args.fec_validation_table, args.fec_photographs, cache / "fec-validation", log
            )
        else:
            train, validation = hold_out(train, args.seed)
    log.write("triplets", train=len(train), validation=len(validation))
    return train, validation


def synthetic_triplets(args: argparse.Namespace, split: str, count: int, cache: Path) -> ExpressionTriplets:
    """Triplets of a split by the distances of its AU vectors."""
    faces = prepare_synthetic(args.synthetic, split, cache)
    triplets = triplets_by_distance(faces.intensities, count, args.seed, args.min_contrast)
    return ExpressionTriplets(faces, triplets, np.full(count, 0.2, np.float32))


def fec_triplets(table: Path, photographs: Path, cache: Path, log: RunLog) -> ExpressionTriplets:
    """FEC's triplets whose photographs are there, and a word about those that are not."""
    found = read_fec(table, photographs)
    triplets = prepare_fec(found, cache, FaceDetector())
    counts = {**found.counts, "unreadable faces": len(triplets.faces.skipped), "used": len(triplets)}
    log.write("fec", table=table.name, **{name.replace(" ", "_"): count for name, count in counts.items()})
    tqdm.write(f"{table.name}: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    return triplets


def hold_out(triplets: ExpressionTriplets, seed: int) -> tuple[ExpressionTriplets, ExpressionTriplets]:
    """Split off triplets, none of whose faces remains in the others."""
    random = np.random.default_rng(seed)
    is_held_out = random.random(len(triplets.faces)) < HELD_OUT_SHARE ** (1 / 3)
    inside = is_held_out[triplets.triplets].all(axis=1)
    outside = ~is_held_out[triplets.triplets].any(axis=1)
    parts = [
        replace(triplets, triplets=triplets.triplets[rows], margins=triplets.margins[rows])
        for rows in (outside, inside)
    ]
    if not all(len(part) for part in parts):
        raise ValueError(
            f"{len(triplets)} triplets are too few to hold some out; give --fec-validation-table."
        )
    return parts[0], parts[1]


class Training:
    """The run, from wherever its checkpoint stands to its folder `model`.

    Batches and augmentation follow from seed and step alone, so that a checkpoint needs little.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        train: ExpressionTriplets,
        validation: ExpressionTriplets,
        log: RunLog,
    ):
        self.args, self.train, self.validation, self.log = args, train, validation, log
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(args.seed)
        model = build_encoder(args)
        self.model = model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-arg]
        self.geometry = InputGeometry(input_size=model.config.image_size)
        groups = parameter_groups(self.model, args.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=args.lr)
        self.factor = WarmupCosine(min(500, args.steps / 10), args.steps)
        self.step, self.metrics = 0, {}

    def run(self) -> None:
        """Train what is left to train, and save the encoder."""
        self._resume()
        losses: list[Tensor] = []
        total = self.args.steps
        with tqdm(total=total, initial=self.step, desc="triplets", unit="step", disable=None) as bar:
            while self.step < total:
                losses.append(self._train_step())
                bar.update()
                if self.step % self.args.validate_every == 0 or self.step == total:
                    self._validate(losses, bar)
                    self._save_checkpoint()
                    losses = []
        self._save_model()

    def _train_step(self) -> Tensor:
        chosen = torch.randint(len(self.train), (self.args.batch,), generator=self._generator(0))
        batch = self.train.__getitems__(chosen.tolist())
        torch.manual_seed(int(self._generator(1).initial_seed()))  # dropout
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.lr * self.factor(self.step)
        embeddings = self._embed(self.model.train(), batch, AUGMENTATION, self._generator(2))
        loss = triplet_loss(*embeddings.unbind(1), batch["margins"].to(self.device))
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
        self.optimizer.step()
        self.step += 1
        return loss.detach()

    def _embed(
        self,
        model: GlobalExpressionEncoder,
        batch: dict[str, Tensor],
        augmentation: Augmentation = NO_AUGMENTATION,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Pictures of triplets (B, 3, H, W, 3) -> embeddings (B, 3, D)."""
        pictures, alignments = (
            batch[name].flatten(0, 1).to(self.device) for name in ("pictures", "alignments")
        )
        placement = sample_placement(len(pictures), self.geometry, augmentation, generator)
        to_input = compose(placement.of_picture.float().to(self.device), alignments)
        pixels = jitter(warp(pictures, to_input, self.geometry.input_size), augmentation, generator)
        pixels = (pixels / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        return model(pixels).embeddings.unflatten(0, (-1, 3))

    @torch.no_grad()
    def _validate(self, losses: list[Tensor], bar: tqdm) -> None:
        """Share of held-out triplets whose negative is the farthest of both, and their loss."""
        results = []
        for start in range(0, min(len(self.validation), self.args.validation_triplets), self.args.batch):
            stop = min(start + self.args.batch, len(self.validation))
            batch = self.validation.__getitems__(range(start, stop))
            results.append(self._embed(self.model.eval(), batch).cpu())
        embeddings = torch.cat(results)
        margins = torch.from_numpy(self.validation.margins[: len(embeddings)])
        self.metrics = {
            "steps": self.step,
            "training_loss": float(torch.stack(losses).mean()),
            "validation_loss": float(triplet_loss(*embeddings.unbind(1), margins)),
            "triplet_accuracy": triplet_accuracy(embeddings),
            "validation_triplets": len(embeddings),
        }
        if not math.isfinite(self.metrics["training_loss"]):
            raise FloatingPointError(f"the loss is no number at step {self.step}; lower --lr={self.args.lr}.")
        bar.set_postfix({name: f"{self.metrics[name]:.3f}" for name in ("training_loss", "triplet_accuracy")})
        self.log.write("validation", **self.metrics)

    def _generator(self, purpose: int) -> torch.Generator:
        return seeded_generator(self.args.seed, self.step, purpose)

    def _save_checkpoint(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "metrics": self.metrics,
        }
        partial = self.args.output / "checkpoint.partial"
        torch.save(state, partial)
        os.replace(partial, self.args.output / "checkpoint.pt")

    def _resume(self) -> None:
        path = self.args.output / "checkpoint.pt"
        if path.is_file():
            state = torch.load(path, map_location=self.device, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.metrics = state["step"], state["metrics"]
            self.log.write("resumed", step=self.step)

    def _save_model(self) -> None:
        partial = self.args.output / "model.partial"
        self.model.config.pretraining = "expression"
        self.model.save_pretrained(partial)
        AUImageProcessor(**self.model.config.processor_options).save_pretrained(partial)
        source = "synthetic corpus" if self.args.synthetic else self.args.fec_table.name
        metrics = {**self.metrics, "triplets": source}
        (partial / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
        replace_folder(partial, self.args.output / "model")


def build_encoder(args: argparse.Namespace) -> GlobalExpressionEncoder:
    """A new encoder, or the one to start from."""
    if args.init:
        return GlobalExpressionEncoder.from_pretrained(args.init, dtype=torch.float32)
    make: Any = GlobalExpressionEncoderConfig
    return GlobalExpressionEncoder(getattr(make, args.preset)() if args.preset else make())


def triplet_accuracy(embeddings: Tensor) -> float:
    """Share of triplets (T, 3, D) whose anchor and positive are nearer to each other than to the negative."""
    anchor, positive, negative = embeddings.unbind(1)
    near = (anchor - positive).norm(dim=-1)
    far = torch.minimum((anchor - negative).norm(dim=-1), (positive - negative).norm(dim=-1))
    return float((near < far).float().mean())


if __name__ == "__main__":
    main()
