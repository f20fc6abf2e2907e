r"""Pretrain ESCDA's backbone on face recognition, on MS-Celeb-1M or another corpus in its form (Sec. 4.1.2).

    python training/pretrain_face_recognition.py --data MS-Celeb-1M --output runs/ms-celeb-1m
    python training/pretrain_face_recognition.py --data TINY --output runs/tiny --preset compact --steps 100

The recipes of LSC, GDA and ESCDA start from `runs/ms-celeb-1m/model` (`backbone_from`). The paper only
names the corpus; the rest follows ArcFace (Deng et al., CVPR 2019): 512-dimensional embeddings, an additive
angular margin, stochastic gradient descent, mirrored faces of 112 pixels. It uses one process, on a GPU if
there is one. Repeating the command resumes an interrupted run, exactly on a CPU. It writes

    RUN/settings.json   the command line
        log.jsonl       one line per event: losses, and verification of held-out people
        checkpoint.pt   the state of the run
        model/          the backbone's weights with the names of GDA and LSC, and metrics.json
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors.torch import save_file
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from actionunits import GdaConfig, GdaForAUDetection
from actionunits.data.corpora import get_corpus, load_corpus
from actionunits.data.protocols import hold_out
from network_training import RunLog, ShuffledBatches, network_config, replace_folder, seeded_generator
from number_options import from_one, not_negative, positive, share
from pretraining_run import PretrainingRun, add_run_options, run_once
from recipe import NetworkRecipe

UNREADABLE = -100  # label of an unreadable picture, which the loss ignores
MAY_CHANGE = ("output", "data", "cache", "workers")  # options that may differ when a run is resumed


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    args = parse_arguments(arguments)
    run_once(args, MAY_CHANGE, lambda args, log: Training(args, *read_faces(args, log), log))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of MS-Celeb-1M (actionunits corpus layout ms_celeb)")
    add("--cache", type=Path, help="folder of the cached list of pictures")
    add("--preset", default="", choices=["", "compact"], help="size of the backbone; default: the paper's")
    add("--config", type=json.loads, default={}, metavar="JSON", help="other values of GdaConfig")
    add("--steps", type=from_one, default=180_000)
    add("--batch", type=from_one, default=512, help="pictures per step")
    add("--lr", type=positive, default=0.1)
    add("--weight-decay", type=not_negative, default=5e-4)
    add("--scale", type=positive, default=64.0, help="s, of the cosines")
    add("--margin", type=not_negative, default=0.5, help="m, added to the true person's angle [radians]")
    add("--held-out", type=share, default=0.005, help="share of people for validation")
    add("--held-out-pictures", type=from_one, default=4000, help="of these, at most")
    add_run_options(parser, validate_every=5000)
    args = parser.parse_args(arguments)
    if not isinstance(args.config, dict):
        parser.error(
            f'--config {args.config!r} is not a table of keys and values, such as {{"image_size": 96}}'
        )
    try:
        build_config(args)  # finds a mistyped key before training
    except (ValueError, StrictDataclassError) as error:
        parser.error(f"--config: {error}")
    return args


def read_faces(args: argparse.Namespace, log: RunLog) -> tuple[Faces, Faces]:
    """Training faces, and validation faces of other people."""
    report = get_corpus("ms_celeb").check(args.data)
    if not report.usable:
        raise FileNotFoundError(f"{args.data} has no pictures to train on: {'; '.join(report.problems)}.")
    rows: Any = load_corpus("ms_celeb", args.data, cache_dir=args.cache)
    people = np.asarray(rows["subject"][:])
    held = np.isin(people, list(hold_out(people, args.held_out)))
    chosen = np.flatnonzero(held)[:: max(1, math.ceil(held.sum() / args.held_out_pictures))]
    size = build_config(args).image_size
    train, check = Faces(rows, np.flatnonzero(~held), people, size), Faces(rows, chosen, people, size)
    counts = {"pictures": len(train), "people": train.people, "held_out_pictures": len(check)}
    log.write("faces", **counts)
    return train, check


class Faces(Dataset):
    """Aligned faces: `pixels` (3, S, S) uint8 and `labels`, the index of the person."""

    def __init__(self, rows: Any, indices: np.ndarray, people: np.ndarray, size: int):
        from datasets import Image as Pictures

        self.rows = rows.select(indices).cast_column("image", Pictures(decode=False))
        names, self.labels = np.unique(people[indices], return_inverse=True)
        self.people, self.size = len(names), size

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        label = int(self.labels[index])
        try:
            with Image.open(self.rows[index]["image"]["path"]) as picture:
                face = picture.convert("RGB").resize((self.size, self.size), Image.Resampling.BILINEAR)
        except Exception:  # Pillow's decoders raise exceptions of many kinds
            face, label = Image.new("RGB", (self.size, self.size)), UNREADABLE
        return {"pixels": torch.from_numpy(np.array(face)).permute(2, 0, 1), "labels": torch.tensor(label)}


class FaceRecognizer(nn.Module):
    """ESCDA's backbone with an embedding layer, and a class centre per person (`directions`)."""

    def __init__(self, config: GdaConfig, people: int, width: int = 512):
        super().__init__()
        self.backbone = GdaForAUDetection(config).backbone
        cells, channels = config.map_size, config.hidden_size
        self.summary = nn.Sequential(
            nn.Conv2d(channels, channels, cells, groups=channels, bias=False),
            nn.BatchNorm2d(channels),
            nn.Flatten(),
            nn.Linear(channels, width, bias=False),
            nn.BatchNorm1d(width),
        )
        self.directions = nn.Parameter(torch.empty(people, width).normal_(std=0.01))

    def forward(self, pixels: Tensor) -> Tensor:
        """Pictures (B, 3, S, S) in [-1, 1] -> embeddings (B, 512)."""
        return self.summary(self.backbone(pixels)[-1])


def margin_softmax_loss(
    embeddings: Tensor, directions: Tensor, labels: Tensor, scale: float = 64.0, margin: float = 0.5
) -> Tensor:
    """Cross-entropy of s cos(theta), with m added to the true person's angle theta (ArcFace).

    Beyond pi - m, where cos(theta + m) would rise again, it is continued linearly, as in ArcFace's code.

    Args:
        embeddings: (B, D).
        directions: (people, D).
        labels: (B,) index of the person, or `UNREADABLE`, which is ignored.
        scale: s.
        margin: m in radians.

    Returns:
        The mean over readable pictures, a scalar; 0 without any.
    """
    is_known = labels != UNREADABLE
    embeddings, labels = embeddings[is_known].float(), labels[is_known]
    cosines = F.linear(F.normalize(embeddings), F.normalize(directions.float()))  # (B, people)
    right = cosines.gather(1, labels[:, None])
    sines = (1 - right**2).clamp(min=1e-12).sqrt()
    harder = right * math.cos(margin) - sines * math.sin(margin)
    line = right - math.sin(math.pi - margin) * margin
    harder = torch.where(right > math.cos(math.pi - margin), harder, line)
    logits = scale * cosines.scatter(1, labels[:, None], harder)
    return F.cross_entropy(logits, labels, reduction="sum") / max(1, len(labels))


class Training(PretrainingRun):
    """Training of the backbone."""

    unit = "faces"

    def __init__(self, args: argparse.Namespace, train: Faces, held: Faces, log: RunLog):
        if len(train) < args.batch:
            raise ValueError(f"{len(train)} pictures do not fill one batch of {args.batch}; lower --batch.")
        self.train, self.held = train, held
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(args.seed)
        self.config = build_config(args)
        self.model = FaceRecognizer(self.config, train.people).to(self.device)
        parameters = list(self.model.parameters())
        optimizer = torch.optim.SGD(parameters, lr=args.lr, momentum=0.9, weight_decay=args.weight_decay)
        parts = {"model": self.model, "optimizer": optimizer}
        super().__init__(args, log, parts, parameters, warmup_steps=2000)

    def _batches(self) -> DataLoader:
        """The remaining batches of the epoch."""
        batches = len(self.train) // self.args.batch
        epoch, start = divmod(self.step, batches)
        order = ShuffledBatches(
            len(self.train), self.args.batch, batches, (self.args.seed, epoch), (0, 1), start
        )
        return DataLoader(self.train, batch_sampler=order, num_workers=self.args.workers)

    def _train_step(self, batch: dict[str, Tensor]) -> Tensor:
        generator = seeded_generator(self.args.seed, self.step)
        mirrored = torch.rand(len(batch["labels"]), generator=generator) < 0.5
        pixels = torch.where(mirrored[:, None, None, None], batch["pixels"].flip(-1), batch["pixels"])
        embeddings = self._embed(self.model.train(), pixels)
        labels = batch["labels"].to(self.device)
        scale, margin = self.args.scale, self.args.margin
        return self._update(margin_softmax_loss(embeddings, self.model.directions, labels, scale, margin))

    def _embed(self, model: FaceRecognizer, pixels: Tensor) -> Tensor:
        pixels = pixels.to(self.device).float() / 127.5 - 1
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.precision == "bf16"):
            return model(pixels)

    @torch.no_grad()
    def _validate(self) -> dict[str, Any]:
        """Verification of the held-out people."""
        found, names = [], []
        for batch in DataLoader(
            self.held, batch_size=min(256, self.args.batch), num_workers=self.args.workers
        ):
            is_known = batch["labels"] != UNREADABLE
            found.append(self._embed(self.model.eval(), batch["pixels"][is_known]).float().cpu())
            names.append(batch["labels"][is_known])
        return {"verification_auc": verification_auc(torch.cat(found), torch.cat(names))}

    def _save_model(self) -> None:
        """Write the backbone alone, with the names that a recipe's `backbone_from` expects."""
        partial = self.args.output / "model.partial"
        partial.mkdir(exist_ok=True)
        weights = {
            f"backbone.{name}": value.cpu() for name, value in self.model.backbone.state_dict().items()
        }
        save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
        metrics = {**self.metrics, "people": self.train.people, "pictures": len(self.train)}
        (partial / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
        self.config.save_pretrained(partial)
        replace_folder(partial, self.args.output / "model")


def build_config(args: argparse.Namespace) -> GdaConfig:
    """The backbone's configuration."""
    network = NetworkRecipe("au-gda", preset=args.preset, config=args.config)
    config: Any = network_config(network, **network.config)
    return config


def verification_auc(embeddings: Tensor, people: Tensor) -> float:
    """AUC of verifying pairs of pictures by cosine similarity; embeddings (N, D), people (N,).

    Undefined, and 0.5, if nobody has two pictures or there is only one person.
    """
    alike = F.normalize(embeddings) @ F.normalize(embeddings).T
    first, second = torch.triu_indices(len(people), len(people), offset=1)
    same = people[first] == people[second]
    if same.all() or not same.any():
        return 0.5
    return float(roc_auc_score(same.numpy(), alike[first, second].numpy()))


if __name__ == "__main__":
    main()
