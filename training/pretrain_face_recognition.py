r"""Train ESCDA's backbone to tell people apart, on MS-Celeb-1M or other faces by name (its Sec. 4.1.2).

    python training/pretrain_face_recognition.py --data MS-Celeb-1M --output runs/ms-celeb-1m
    python training/pretrain_face_recognition.py --data TINY --output runs/tiny --preset compact --steps 100

The recipes of LSC, GDA and ESCDA start from `runs/ms-celeb-1m/model` (`backbone_from`). The paper names the
corpus only; the rest is ArcFace's (Deng et al., CVPR 2019): 512 numbers a face, an additive angular margin,
stochastic gradient descent, mirrored faces of 112 pixels. One process, on a GPU if there is one. The same
command again continues an interrupted run, to the bit on a CPU. It writes

    RUN/settings.json   the command line as it was used
        log.jsonl       one line an event: losses, and how well people that were held out are told apart
        checkpoint.pt   the state of the run
        model/          the backbone's weights under the names of GDA and LSC, and metrics.json
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
from tqdm import tqdm

from actionunits import GdaConfig, GdaForAUDetection
from actionunits.data.corpora import get_corpus, load_corpus
from actionunits.data.protocols import hold_out
from actionunits.files import whole_file
from network_training import (
    RunLog,
    ShuffledBatches,
    WarmupCosine,
    network_config,
    read_state,
    replace_folder,
    seeded_generator,
)
from number_options import from_one, from_zero, not_negative, positive, share
from pretraining_run import keep_settings, open_run, settings_of
from recipe import NetworkRecipe

UNREADABLE = -100  # label of a picture that cannot be read; the loss leaves it out
SAID_ANEW = ("output", "data", "cache", "workers")  # what another command may change about the same run


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as the command line says."""
    args = parse_arguments(arguments)
    settings = settings_of(args, SAID_ANEW)
    if open_run(args.output, settings):
        log = RunLog(args.output / "log.jsonl")
        train, held = read_faces(args, log)
        training = Training(args, train, held, log)
        keep_settings(args.output, settings)
        training.run()
    print(f"wrote {args.output / 'model'}")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of MS-Celeb-1M (actionunits corpus layout ms_celeb)")
    add("--output", type=Path, required=True, help="folder of the run")
    add("--cache", type=Path, help="where the list of pictures is cached")
    add("--preset", default="", choices=["", "compact"], help="size of the backbone; the paper's by default")
    add("--config", type=json.loads, default={}, metavar="JSON", help="values of GdaConfig that differ")
    add("--steps", type=from_one, default=180_000)
    add("--batch", type=from_one, default=512, help="pictures of a step")
    add("--lr", type=positive, default=0.1)
    add("--weight-decay", type=not_negative, default=5e-4)
    add("--scale", type=positive, default=64.0, help="of the cosines (s)")
    add(
        "--margin",
        type=not_negative,
        default=0.5,
        help="added to the angle of the right person, in radians (m)",
    )
    add("--held-out", type=share, default=0.005, help="share of people to check with")
    add("--held-out-pictures", type=from_one, default=4000, help="at most so many of theirs")
    add("--validate-every", type=from_one, default=5000, help="steps; the run is saved then, too")
    add("--precision", default="fp32", choices=["fp32", "bf16"])
    add("--workers", type=from_zero, default=0, help="processes that read pictures")
    add("--seed", type=from_zero, default=0)
    args = parser.parse_args(arguments)
    if not isinstance(args.config, dict):
        parser.error(f'--config {args.config!r} is no table of keys and values, such as {{"image_size": 96}}')
    try:
        build_config(args)  # a mistyped key is told of before days of training at another size
    except (ValueError, StrictDataclassError) as error:
        parser.error(f"--config: {error}")
    return args


def read_faces(args: argparse.Namespace, log: RunLog) -> tuple[Faces, Faces]:
    """Faces to train with, and those of other people to check with."""
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
    """Aligned faces by name: `pixels` (3, S, S) uint8 and `labels`, the number of the person among these."""

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
        except Exception:  # Pillow's decoders raise whatever they stumble over
            face, label = Image.new("RGB", (self.size, self.size)), UNREADABLE
        return {"pixels": torch.from_numpy(np.array(face)).permute(2, 0, 1), "labels": torch.tensor(label)}


class FaceRecognizer(nn.Module):
    """ESCDA's backbone, 512 numbers a face, and a direction in their space for every person."""

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
    """Cross-entropy of s cos(theta), where the right person's angle theta is made larger by m (ArcFace).

    Beyond pi - m, where the cosine of theta + m would rise again, a line falls on, as in ArcFace's code.

    Args:
        embeddings: (B, D).
        directions: (people, D).
        labels: (B,) number of the person; `UNREADABLE` is left out.
        scale: s.
        margin: m in radians.

    Returns:
        The mean, a scalar; 0 where no picture could be read.
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


class Training:
    """The run, from wherever its checkpoint stands to its folder `model`.

    The order of the pictures and their mirroring follow from seed and step alone.
    """

    def __init__(self, args: argparse.Namespace, train: Faces, held: Faces, log: RunLog):
        if len(train) < args.batch:
            raise ValueError(f"{len(train)} pictures do not fill one batch of {args.batch}; lower --batch.")
        self.args, self.train, self.held, self.log = args, train, held, log
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(args.seed)
        self.config = build_config(args)
        self.model = FaceRecognizer(self.config, train.people).to(self.device)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=args.lr, momentum=0.9, weight_decay=args.weight_decay
        )
        self.factor = WarmupCosine(min(2000, args.steps / 10), args.steps)
        self.step, self.metrics = 0, {}

    def run(self) -> None:
        """Train what is left to train, and save the backbone."""
        self._resume()
        losses: list[Tensor] = []
        total = self.args.steps
        with tqdm(total=total, initial=self.step, desc="faces", unit="step", disable=None) as bar:
            while self.step < total:
                for batch in self._batches():
                    losses.append(self._train_step(batch))
                    bar.update()
                    if self.step % self.args.validate_every == 0 or self.step == total:
                        self._validate(losses, bar)
                        self._save_checkpoint()
                        losses = []
                    if self.step == total:
                        break
        self._save_model()

    def _batches(self) -> DataLoader:
        """What is left of the epoch that the step lies in."""
        batches = len(self.train) // self.args.batch
        epoch, start = divmod(self.step, batches)
        order = ShuffledBatches(
            len(self.train), self.args.batch, batches, (self.args.seed, epoch), (0, 1), start
        )
        return DataLoader(self.train, batch_sampler=order, num_workers=self.args.workers)

    def _train_step(self, batch: dict[str, Tensor]) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.lr * self.factor(self.step)
        mirrored = (
            torch.rand(len(batch["labels"]), generator=seeded_generator(self.args.seed, self.step)) < 0.5
        )
        pixels = torch.where(mirrored[:, None, None, None], batch["pixels"].flip(-1), batch["pixels"])
        embeddings = self._embed(self.model.train(), pixels)
        labels = batch["labels"].to(self.device)
        args = self.args
        loss = margin_softmax_loss(embeddings, self.model.directions, labels, args.scale, args.margin)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
        self.optimizer.step()
        self.step += 1
        return loss.detach()

    def _embed(self, model: FaceRecognizer, pixels: Tensor) -> Tensor:
        pixels = pixels.to(self.device).float() / 127.5 - 1
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.precision == "bf16"):
            return model(pixels)

    @torch.no_grad()
    def _validate(self, losses: list[Tensor], bar: tqdm) -> None:
        """How well pairs of pictures of one person are told from pairs of two, among people held out."""
        found, names = [], []
        for batch in DataLoader(
            self.held, batch_size=min(256, self.args.batch), num_workers=self.args.workers
        ):
            is_known = batch["labels"] != UNREADABLE
            found.append(self._embed(self.model.eval(), batch["pixels"][is_known]).float().cpu())
            names.append(batch["labels"][is_known])
        self.metrics = {
            "steps": self.step,
            "training_loss": float(torch.stack(losses).mean()),
            "verification_auc": verification_auc(torch.cat(found), torch.cat(names)),
        }
        if not math.isfinite(self.metrics["training_loss"]):
            raise FloatingPointError(f"the loss is no number at step {self.step}; lower --lr={self.args.lr}.")
        bar.set_postfix(loss=f"{self.metrics['training_loss']:.3f}")
        self.log.write("validation", **self.metrics)

    def _save_checkpoint(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "metrics": self.metrics,
        }
        with whole_file(self.args.output / "checkpoint.pt") as part:
            torch.save(state, part)

    def _resume(self) -> None:
        path = self.args.output / "checkpoint.pt"
        if path.is_file():
            state = read_state(path, self.device)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.metrics = state["step"], state["metrics"]
            self.log.write("resumed", step=self.step)

    def _save_model(self) -> None:
        """Write the backbone alone: a recipe's `backbone_from` takes what has the names of its network."""
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
    """The backbone's sizes."""
    network = NetworkRecipe("au-gda", preset=args.preset, config=args.config)
    config: Any = network_config(network, **network.config)
    return config


def verification_auc(embeddings: Tensor, people: Tensor) -> float:
    """Probability that two pictures of one person are more alike than two of different ones, (N, D), (N,).

    Undefined, and 0.5, where nobody has two pictures or there is but one person.
    """
    alike = F.normalize(embeddings) @ F.normalize(embeddings).T
    first, second = torch.triu_indices(len(people), len(people), offset=1)
    same = people[first] == people[second]
    if same.all() or not same.any():
        return 0.5
    return float(roc_auc_score(same.numpy(), alike[first, second].numpy()))


if __name__ == "__main__":
    main()
