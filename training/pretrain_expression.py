r"""Pretrain GTLE-Net's expression encoder on triplets of faces, with the triplet loss of its Eq. 1.

    python training/pretrain_expression.py --synthetic corpora/synthetic --preset compact \
        --output runs/expression
    python training/pretrain_expression.py --fec-table FEC/faceexp-comparison-data-train-public.csv \
        --fec-photographs FEC/images --init encoders/vggface2 --output runs/expression

The first compares the pictures of a batch by their action units, which gives thousands of triplets; an
auxiliary linear layer predicts these action units, as from random weights triplets alone learn slowly at
first. Accuracy is measured on other people. The second uses the photographs that have been downloaded, and
logs how many triplets lack theirs. Repeating the command resumes an interrupted run exactly. It writes

    RUN/settings.json   the command line
        log.jsonl       one line per event: triplets, losses, accuracy on held-out triplets
        prepared/       decoded and aligned faces
        checkpoint.pt   the state of the run
        model/          the encoder with its image processor and metrics.json:
                        GtleNetForAUDetection.from_encoder("RUN/model")
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from actionunits import AUImageProcessor, FaceDetector, GlobalExpressionEncoder, GlobalExpressionEncoderConfig
from actionunits.data import (
    NO_AUGMENTATION,
    AlignedFaces,
    Augmentation,
    InputGeometry,
    check_people_apart,
    prepare_synthetic,
)
from actionunits.data.augmentation import compose, jitter, sample_placement, warp
from actionunits.data.triplets import ComparableFaces, ExpressionTriplets, prepare_fec, read_fec
from actionunits.models.gtlenet.modeling_gtlenet import triplet_loss
from actionunits.publishing_terms import OPEN_TRIPLETS
from network_training import RunLog, parameter_groups, replace_folder, seeded_generator
from number_options import from_one, from_zero, not_negative, positive
from pretraining_run import PretrainingRun, add_run_options, run_once

# No random crops, only noise of the alignment: with them a short run learns less.
AUGMENTATION = Augmentation(
    random_crop=False, brightness=0.3, contrast=0.3, rotation=2.0, scale=0.03, translation=2.0
)
FULL_INTENSITY = 0.5  # intensity from which on an action unit's soft label is 1
TRIPLETS_RISE = (0.4, 0.7)  # between these shares of a run the weight of the triplet loss rises from 0 to 1
HELD_OUT_SHARE = 0.05  # at most, of FEC's triplets, without a table for validation
MAY_CHANGE = ("output", "cache", "workers")  # options that may differ when a run is resumed


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    args = parse_arguments(arguments)
    run_once(args, MAY_CHANGE, lambda args, log: Training(args, *read_triplets(args, log), log))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_data_options(parser)
    add_training_options(parser)
    add_run_options(parser, validate_every=1000)
    args = parser.parse_args(arguments)
    if (args.synthetic is None) == (args.fec_table is None):
        parser.error("give --synthetic, or --fec-table with --fec-photographs")
    if args.fec_table is not None and args.fec_photographs is None:
        parser.error("--fec-table needs --fec-photographs, the folder of the downloaded photographs")
    if args.init and (args.preset or args.image_size):
        parser.error("--preset and --image-size are for a new encoder; leave them out with --init")
    if args.lr is None:
        args.lr = 5e-4 if args.synthetic is None else 3e-3
    return args


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of faces and triplets."""
    add = parser.add_argument
    add("--synthetic", type=Path, help="folder of the synthetic corpus")
    add("--fec-table", type=Path, help="CSV file of FEC")
    add("--fec-photographs", type=Path, help="folder of FEC's downloaded photographs")
    add("--fec-validation-table", type=Path, help="FEC's CSV file for testing")
    add("--cache", type=Path, help="folder of decoded faces, to share between runs")
    add("--triplets", type=from_one, default=4096, help="triplets per batch of the synthetic corpus")
    add("--min-contrast", type=positive, default=1.3, help="of their distances, see triplets_by_distance")
    add("--validation-triplets", type=from_one, default=2000)
    add("--no-augmentation", action="store_true", help="for short runs")


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the encoder and its optimisation."""
    add = parser.add_argument
    add("--preset", default="", choices=["", "compact"], help="size of a new encoder; default: the paper's")
    add("--image-size", type=from_zero, default=0, help="height and width of a new encoder's input")
    add("--init", default="", help="encoder to start from, such as one of convert_facenet_to_hf")
    add("--au-weight", type=not_negative, default=3.0, help="weight of the auxiliary AU loss")
    add("--steps", type=from_one, default=20_000)
    add(
        "--batch",
        type=from_one,
        default=30,
        help="triplets, or a third of the pictures (synthetic), per step",
    )
    add("--lr", type=positive, help="default: 3e-3 for the synthetic corpus, 5e-4 for FEC")
    add("--weight-decay", type=not_negative, default=1e-4)


Examples = ExpressionTriplets | ComparableFaces


def read_triplets(args: argparse.Namespace, log: RunLog) -> tuple[Examples, ExpressionTriplets]:
    """Training examples and validation triplets."""
    cache = args.cache or args.output / "prepared"
    if args.synthetic is not None:
        return synthetic_triplets(args, cache, log)
    train = fec_triplets(args.fec_table, args.fec_photographs, cache / "fec", log)
    if args.fec_validation_table is not None:
        validation = fec_triplets(
            args.fec_validation_table, args.fec_photographs, cache / "fec-validation", log
        )
    else:
        train, validation = hold_out(train, args.seed, args.validation_triplets)
    log.write("triplets", train=len(train), validation=len(validation))
    tqdm.write(f"{len(train)} training triplets, {len(validation)} for validation")
    return train, validation


def synthetic_triplets(
    args: argparse.Namespace, cache: Path, log: RunLog
) -> tuple[ComparableFaces, ExpressionTriplets]:
    """Training faces of the corpus, and triplets of its validation faces."""
    train, validation = (
        ComparableFaces(prepare_synthetic(args.synthetic, split, cache), args.triplets, args.min_contrast)
        for split in ("train", "validation")
    )
    check_people_apart(train=train.faces, validation=validation.faces)
    log.write("faces", train=len(train), validation=len(validation))
    return train, validation.triplets(args.validation_triplets, args.seed)


def fec_triplets(table: Path, photographs: Path, cache: Path, log: RunLog) -> ExpressionTriplets:
    """FEC's triplets with existing photographs; the number of others is logged."""
    found = read_fec(table, photographs)
    triplets = prepare_fec(found, cache, FaceDetector())
    counts = {**found.counts, "unreadable faces": len(triplets.faces.skipped), "used": len(triplets)}
    log.write("fec", table=table.name, **{name.replace(" ", "_"): count for name, count in counts.items()})
    tqdm.write(f"{table.name}: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    return triplets


def hold_out(
    triplets: ExpressionTriplets, seed: int, wanted: int
) -> tuple[ExpressionTriplets, ExpressionTriplets]:
    """Hold out about `wanted` triplets that share no face with the others.

    Triplets with faces on both sides are lost: several times as many as are held out.
    """
    random = np.random.default_rng(seed)
    share = min(HELD_OUT_SHARE, wanted / len(triplets))
    is_held_out = random.random(len(triplets.faces)) < share ** (1 / 3)
    inside = is_held_out[triplets.triplets].all(axis=1)
    outside = ~is_held_out[triplets.triplets].any(axis=1)
    parts = [
        replace(triplets, triplets=triplets.triplets[rows], margins=triplets.margins[rows])
        for rows in (outside, inside)
    ]
    if not all(len(part) for part in parts):
        raise ValueError(
            f"{len(triplets)} triplets are too few to hold some out; pass --fec-validation-table."
        )
    return parts[0], parts[1]


@dataclass
class Steps(Dataset):
    """The batch of each step, determined by seed and step."""

    examples: Examples
    batch: int
    seed: int

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        return self.examples.draw(self.batch, np.random.default_rng([self.seed, step]))


class Training(PretrainingRun):
    """Training of the encoder, and of a linear layer that predicts action units from its features."""

    unit = "triplets"

    def __init__(
        self, args: argparse.Namespace, train: Examples, validation: ExpressionTriplets, log: RunLog
    ):
        self.train, self.validation = train, validation
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(args.seed)
        model = build_encoder(args)
        self.model = model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-arg]
        self.geometry = InputGeometry(input_size=model.config.image_size)
        self.augmentation = NO_AUGMENTATION if args.no_augmentation else AUGMENTATION
        aus = len(train.faces.aus) if isinstance(train, ComparableFaces) and args.au_weight else 0
        self.au_reader = nn.Linear(model.embedding.in_features, aus).to(self.device) if aus else None
        modules = nn.ModuleList([self.model, *([self.au_reader] if aus else [])])
        optimizer = torch.optim.AdamW(parameter_groups(modules, args.weight_decay), lr=args.lr)
        parts = {"model": self.model, "au_reader": self.au_reader, "optimizer": optimizer}
        super().__init__(args, log, parts, modules.parameters(), warmup_steps=500)

    def _batches(self) -> DataLoader:
        return DataLoader(
            Steps(self.train, self.args.batch, self.args.seed),
            batch_size=None,
            sampler=range(self.step, self.args.steps),
            num_workers=self.args.workers,
            pin_memory=self.device.type == "cuda",
            generator=self._generator(0),
        )

    def _train_step(self, batch: dict[str, Tensor]) -> Tensor:
        batch = {name: values.to(self.device, non_blocking=True) for name, values in batch.items()}
        torch.manual_seed(int(self._generator(1).initial_seed()))  # for dropout
        self.model.train()
        pictures, alignments = batch["pictures"], batch["alignments"]
        embeddings, features = self._embed(pictures, alignments, self.augmentation, self._generator(2))
        loss = triplet_loss(*embeddings[batch["triplets"]].unbind(1), batch["margins"])
        if self.au_reader is not None:
            share = float(np.interp(self.step / self.args.steps, TRIPLETS_RISE, (0, 1)))
            targets = (batch["intensities"] / FULL_INTENSITY).clamp(0, 1)
            reading = F.binary_cross_entropy_with_logits(self.au_reader(features), targets)
            loss = share * loss + self.args.au_weight * reading
        return self._update(loss)

    def _embed(
        self,
        pictures: Tensor,
        alignments: Tensor,
        augmentation: Augmentation = NO_AUGMENTATION,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Pictures (P, H, W, 3), alignments (P, 2, 3) -> embeddings (P, D), and the features before them."""
        placement = sample_placement(len(pictures), self.geometry, augmentation, generator)
        to_input = compose(placement.of_picture.float().to(self.device), alignments)
        pixels = jitter(warp(pictures, to_input, self.geometry.input_size), augmentation, generator)
        pixels = (pixels / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        is_half = self.args.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=is_half):
            outputs = self.model(pixels, output_hidden_states=True)
        return outputs.embeddings.float(), outputs.hidden_states[-1].float().mean((2, 3))

    @torch.no_grad()
    def _validate(self) -> dict[str, Any]:
        """Loss and accuracy on the validation triplets."""
        held_out = self.validation.triplets[: self.args.validation_triplets]
        margins = torch.from_numpy(self.validation.margins[: len(held_out)])
        faces, triplets = np.unique(held_out, return_inverse=True)
        embeddings = self._embed_faces(self.validation.faces, faces)[triplets.reshape(held_out.shape)]
        return {
            "validation_loss": float(triplet_loss(*embeddings.unbind(1), margins)),
            "triplet_accuracy": triplet_accuracy(embeddings),
            "validation_triplets": len(embeddings),
        }

    def _embed_faces(self, faces: AlignedFaces, rows: np.ndarray) -> Tensor:
        """Embeddings (N, D) of faces without augmentation, on the CPU."""
        self.model.eval()
        embeddings = []
        for start in range(0, len(rows), 3 * self.args.batch):
            batch = faces.__getitems__(rows[start : start + 3 * self.args.batch].tolist())
            pictures, alignments = (batch[name].to(self.device) for name in ("pictures", "alignments"))
            embeddings.append(self._embed(pictures, alignments)[0].cpu())
        return torch.cat(embeddings)

    def _generator(self, purpose: int) -> torch.Generator:
        return seeded_generator(self.args.seed, self.step, purpose)

    def _save_model(self) -> None:
        partial = self.args.output / "model.partial"
        self.model.config.pretraining = "expression"
        self.model.save_pretrained(partial)
        AUImageProcessor(**self.model.config.processor_options).save_pretrained(partial)
        source = OPEN_TRIPLETS if self.args.synthetic else self.args.fec_table.name
        metrics = {**self.metrics, "triplets": source}
        if self.args.init and not saw_open_triplets_alone(self.args.init):  # its data's terms hold here, too
            metrics["init"] = "/".join(Path(self.args.init).parts[-2:])
        (partial / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
        replace_folder(partial, self.args.output / "model")


def build_encoder(args: argparse.Namespace) -> GlobalExpressionEncoder:
    """The encoder of `--init`, or a new one."""
    if args.init:
        return GlobalExpressionEncoder.from_pretrained(args.init, dtype=torch.float32)
    make: Any = GlobalExpressionEncoderConfig
    config = getattr(make, args.preset)() if args.preset else make()
    config.image_size = args.image_size or config.image_size
    return GlobalExpressionEncoder(config)


def saw_open_triplets_alone(encoder: str) -> bool:
    """Whether an encoder and its initial weights were trained on open triplets only, by its metrics.json."""
    file = Path(encoder) / "metrics.json"
    figures = json.loads(file.read_text()) if file.is_file() else {}  # unknown without any
    return figures.get("triplets") == OPEN_TRIPLETS and "init" not in figures


def triplet_accuracy(embeddings: Tensor) -> float:
    """Share of triplets (T, 3, D) whose anchor and positive are closer to each other than to the negative."""
    anchor, positive, negative = embeddings.unbind(1)
    near = (anchor - positive).norm(dim=-1)
    far = torch.minimum((anchor - negative).norm(dim=-1), (positive - negative).norm(dim=-1))
    return float((near < far).float().mean())


if __name__ == "__main__":
    main()
