"""Training of one network of a recipe: loop, checkpoints, sampling and learning rate."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather, load, send_to_device, set_seed
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedConfig

import actionunits  # noqa: F401  (registers the models)
from actionunits.data import NO_AUGMENTATION, AlignedFaces, AUCollator, Augmentation
from actionunits.data.collator import stack_samples
from actionunits.data.sampling import ClipCollator, ClipDataset, fixed_stride_clips
from actionunits.files import whole_file
from actionunits.metrics import au_report
from recipe import NetworkRecipe, Recipe

KEEP_CHECKPOINTS = 2
STATISTICS_BATCHES = 24  # batches to estimate the batch statistics of averaged weights


class NetworkTraining:
    """Training of one network, from its last checkpoint to its folder `model`.

    Order and augmentation of the pictures depend on seed, epoch and batch only, so checkpoints hold weights,
    optimiser, scheduler, dropout's random state and the number of steps.
    """

    def __init__(
        self,
        name: str,
        recipe: Recipe,
        splits: dict[str, AlignedFaces],
        folder: Path,
        accelerator: Accelerator,
        log: RunLog,
    ):
        self.name, self.recipe, self.folder = name, recipe, folder
        self.accelerator, self.log = accelerator, log
        self.train_faces = splits["train"]
        self.watched_faces = splits.get(watched_split(recipe, list(splits)))
        graded = self.watched_faces is not None and self.watched_faces.intensities is not None
        if recipe.epoch_selection != "last" and recipe.selection_metric == "correlation" and not graded:
            raise ValueError(
                "selection_metric=correlation needs intensities, which this corpus lacks; use f1 or auc."
            )
        faces: Any = self.train_faces
        self.examples = training_examples(
            FacesOnDevice(faces, accelerator.device) if recipe.preload else faces, self.train_faces, recipe
        )
        self.position = Position()
        self.steps_per_epoch = steps_per_epoch(len(self.examples), recipe, accelerator.num_processes)
        self.epochs = recipe.networks[name].epochs or recipe.epochs
        self.total_steps = self.steps_per_epoch * self.epochs

    def run(self) -> None:
        """Train the remaining steps, and select the epoch."""
        if (self.folder / "model" / "config.json").is_file():
            return
        self._build()
        self._resume()
        description = f"{self.name}: training"
        with tqdm(
            total=self.total_steps,
            initial=self.position.step,
            desc=description,
            unit="step",
            disable=None if self.accelerator.is_main_process else True,
        ) as bar:
            while self.position.step < self.total_steps:
                self._train_epoch(bar)
                self._end_epoch()
                self._validate()
                self._save_checkpoint()
        if self.recipe.networks[self.name].keep_pretrained:
            self._average_with_pretrained()
        if not self.recipe.select_together:
            self._keep_selected()

    def _build(self) -> None:
        set_seed(self.recipe.seed)
        network = self.recipe.networks[self.name]
        model = build_network(network, self.recipe, self.train_faces)
        if network.backbone_from:
            is_folder = "/" in network.backbone_from
            inner = self.folder.parent / network.backbone_from / "model"
            start_from(model, Path(network.backbone_from) if is_folder else inner)
        if self.accelerator.distributed_type is not DistributedType.FSDP:  # which refuses this order
            model = model.to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(
            parameter_groups(model, self.recipe.weight_decay), lr=self.recipe.learning_rate
        )
        warmup_steps = self.recipe.warmup_epochs * self.steps_per_epoch
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, SCHEDULES[self.recipe.schedule](warmup_steps, self.total_steps)
        )
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.accelerator.register_for_checkpointing(self.scheduler, self.position)
        set_seed(self.recipe.seed, device_specific=True)  # dropout differs between processes

    @property
    def _places(self) -> list[int]:
        return self.accelerator.unwrap_model(self.model).config.places

    def _train_epoch(self, bar: tqdm) -> None:
        self.model.train()
        epoch, done = divmod(self.position.step, self.steps_per_epoch)
        started, losses = time.monotonic(), []
        for inputs in self._batches(epoch, done):
            with self.accelerator.accumulate(self.model):
                loss = self.model(**inputs).loss
                self.accelerator.backward(loss)
                losses.append(loss.detach())
                if self.accelerator.sync_gradients:
                    norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            if not self.accelerator.sync_gradients:
                continue
            self.scheduler.step()
            self.position.step += 1
            bar.update()
            is_last = self.position.step % self.steps_per_epoch == 0
            is_due = self.position.step % self.recipe.checkpoint_every == 0
            if is_last or is_due or self.position.step % self.recipe.log_every == 0:
                self._log_step(losses, float(norm), time.monotonic() - started, bar)
                started, losses = time.monotonic(), []
            if is_due and not is_last:  # epochs end with validation and a checkpoint
                self._save_checkpoint()

    def _end_epoch(self) -> None:
        """Let a model update its state per epoch, such as AC2D's prototypes."""
        model = self.accelerator.unwrap_model(self.model)
        if hasattr(model, "end_of_epoch"):
            model.end_of_epoch(self._batches(self.position.step // self.steps_per_epoch - 1, 0))

    def _batches(self, epoch: int, steps_done: int) -> Iterator[dict[str, torch.Tensor]]:
        """The model's inputs, augmented on its device, from a step of the epoch on."""
        accelerator, recipe = self.accelerator, self.recipe
        sampler = ShuffledBatches(
            count=len(self.examples),
            batch_size=recipe.batch_size // recipe.gradient_accumulation,
            batches=self.steps_per_epoch * recipe.gradient_accumulation,
            seed=(recipe.seed, epoch),
            share=(accelerator.process_index, accelerator.num_processes),
            start=steps_done * recipe.gradient_accumulation,
        )
        if isinstance(self.examples, ClipDataset):
            self.examples.set_epoch(epoch)
        loader = DataLoader(
            self.examples,
            batch_sampler=sampler,
            collate_fn=stack_samples,
            num_workers=0 if recipe.preload else recipe.workers,
            pin_memory=accelerator.device.type == "cuda" and not recipe.preload,
            # not the global one, which checkpoints restore for dropout
            generator=seeded_generator(recipe.seed, epoch),
        )
        augmentation = recipe.augmentation
        if epoch < recipe.plain_epochs:
            augmentation = replace(NO_AUGMENTATION, mirror=augmentation.mirror)
        collate: Any = collator(recipe, augmentation, self.train_faces.scheme, self._places)
        collate = ClipCollator(collate) if isinstance(self.examples, ClipDataset) else collate
        for number, batch in enumerate(loader, start=sampler.start):
            random = seeded_generator(recipe.seed, epoch, number, accelerator.process_index)
            yield collate.inputs(send_to_device(batch, accelerator.device, non_blocking=True), random)

    @torch.no_grad()
    def _average_with_pretrained(self) -> None:
        """Average the trained weights with the pretrained ones, and estimate the batch statistics again."""
        network = self.recipe.networks[self.name]
        model = self.accelerator.unwrap_model(self.model)
        before = pretrained_weights(network, self.recipe, self.train_faces)
        for name, value in model.state_dict().items():
            if value.is_floating_point() and name in before:  # not those of new action units
                value.lerp_(before[name].to(value.device), network.keep_pretrained)
        batches = itertools.islice(self._batches(self.epochs, 0), STATISTICS_BATCHES)
        pictures = ({name: batch[name] for name in batch if name != "labels"} for batch in batches)
        update_bn(pictures, TakesKeywords(model))

    def _log_step(self, losses: list[torch.Tensor], norm: float, seconds: float, bar: tqdm) -> None:
        loss = float(self.accelerator.reduce(torch.stack(losses).mean(), "mean"))
        for name, value in {"loss": loss, "gradient's norm": norm}.items():
            if not math.isfinite(value):  # weights are broken before the loss shows it
                raise self._diverged(f"the {name} is {value} at step {self.position.step}")
        clips = len(losses) * self.recipe.batch_size / self.recipe.gradient_accumulation
        pictures = clips * self.recipe.clips.length
        rate = self.optimizer.param_groups[0]["lr"]
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        self.log.write(
            "step",
            network=self.name,
            step=self.position.step,
            epoch=round(self.position.step / self.steps_per_epoch, 3),
            loss=loss,
            learning_rate=rate,
            gradient_norm=norm,
            pictures_per_second=round(pictures / seconds, 1),
        )

    def _diverged(self, seen: str) -> FloatingPointError:
        """The error of a diverged training."""
        recipe, kept = self.recipe, self._checkpoints()
        remedy = f"lower base_learning_rate={recipe.base_learning_rate} or clip_norm={recipe.clip_norm}"
        if recipe.precision != "fp32":
            remedy += f", or set precision=fp32 instead of {recipe.precision}"
        before = f"The last checkpoint, {kept[-1]}, is from before." if kept else "No checkpoint was saved."
        return FloatingPointError(
            f"{self.name}: {seen}; {remedy}, and choose another --output, as a run keeps its recipe. {before}"
        )

    def _validate(self) -> None:
        faces, split = self.watched_faces, watched_split(self.recipe)
        if faces is None:
            return
        scores = self._scores(faces)
        if useless := int((~np.isfinite(scores)).any(axis=1).sum()):
            raise self._diverged(
                f"{useless} of {len(scores)} faces of the {split} people have a score that is not finite "
                f"after step {self.position.step}"
            )
        report = au_report(faces.aus, scores, faces.occurrence, faces.intensities)
        epoch = self.position.step // self.steps_per_epoch
        place = {"network": self.name, "epoch": epoch, "step": self.position.step, "split": split}
        self.log.write("epoch", **place, validation=report)
        mean = {name: value for name, value in report["mean"].items() if value is not None}
        if self.accelerator.is_main_process:
            shown = ", ".join(
                f"{name} {mean[name]:.3f}" for name in ("f1", "auc", "correlation") if name in mean
            )
            tqdm.write(f"{self.name}: epoch {epoch}/{self.epochs}, {split} {shown}")
        if self.recipe.select_together:
            self._keep_epoch(epoch, scores)
            return
        score = mean.get(self.recipe.selection_metric, 0.0)
        if self.recipe.epoch_selection != "last" and score > self.position.best_score:
            self.position.best_score, self.position.best_epoch = score, epoch
            self._save_network(self._best)

    def _scores(self, faces: AlignedFaces) -> np.ndarray:
        """Probabilities (N, m) of the faces, by clips where the network is trained on clips."""
        collate = collator(self.recipe, scheme=faces.scheme, places=self._places)
        clip_length, batch_size = self.recipe.clips.length, self.recipe.eval_batch_size
        if clip_length > 1:
            return gathered_clip_scores(self.model, faces, collate, clip_length, self.accelerator)
        return gathered_scores(self.model, faces, collate, batch_size, self.accelerator)

    def _checkpoints(self) -> list[Path]:
        """All checkpoints, the latest last."""
        return sorted((self.folder / "checkpoints").glob("step-*[0-9]"))

    def _resume(self) -> None:
        """Resume from the latest checkpoint that all processes can read.

        Raises:
            ValueError: There are checkpoints, but none can be read.
        """
        broken = []
        for checkpoint in reversed(self._checkpoints()):
            if (problem := self._load(checkpoint)) is None:
                for reason in broken:
                    self._warn(f"{reason}. Resuming from {checkpoint.name}, the one before.")
                self.log.write("resumed", network=self.name, step=self.position.step)
                if self.position.best_epoch and not (self.folder / self._best).is_dir():
                    # A later best epoch has replaced it.
                    self.position.best_score, self.position.best_epoch = -math.inf, 0
                return
            broken.append(problem)
        if broken:
            raise ValueError(
                f"{self.name}: no checkpoint can be read: {'; '.join(broken)}. Copy one of them here again, "
                f"or remove the folder {self.folder / 'checkpoints'} to train this network from the start."
            )

    def _load(self, checkpoint: Path) -> str | None:
        """Load a checkpoint; return the problem if a process cannot, else None."""
        problem = None
        found = sorted(file.name for file in checkpoint.iterdir())
        try:
            if (file := f"random_states_{self.accelerator.process_index}.pkl") in found:
                load(str(checkpoint / file))  # as Accelerate ignores random states that it cannot read
            self.accelerator.load_state(str(checkpoint))
        except Exception as error:  # of missing, truncated or mismatched files
            reason = f"{type(error).__name__}: {error}".split("\n")[0]
            problem = f"{checkpoint} cannot be read ({reason}; it holds {found or 'nothing'})"
        failed = torch.tensor(float(problem is not None), device=self.accelerator.device)
        if not self.accelerator.reduce(failed, "sum"):
            return None
        return problem or f"{checkpoint} cannot be read by another process"

    def _warn(self, message: str) -> None:
        self.log.write("warning", network=self.name, message=message)
        if self.accelerator.is_main_process:
            tqdm.write(f"{self.name}: {message}", file=sys.stderr)

    def _save_checkpoint(self) -> None:
        """Save a checkpoint, which appears when it is complete, and remove old ones."""
        folder = self.folder / "checkpoints"
        final = folder / f"step-{self.position.step:09d}"
        partial = folder / f"{final.name}.partial"
        if self.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(partial))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            replace_folder(partial, final)
            for old in self._checkpoints()[:-KEEP_CHECKPOINTS]:
                shutil.rmtree(old)
            for old in self.folder.glob("best-*"):
                if old.name != self._best:  # which no checkpoint refers to
                    shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    @property
    def _best(self) -> str:
        """Folder of the best epoch so far, named by the epoch for checkpoints to find it."""
        return f"best-{self.position.best_epoch:04d}"

    def _save_network(self, name: str) -> None:
        weights = self.accelerator.get_state_dict(self.model)  # gathered from all processes
        if self.accelerator.is_main_process:
            partial = self.folder / f"{name}.partial"
            self.accelerator.unwrap_model(self.model).save_pretrained(partial, state_dict=weights)
            replace_folder(partial, self.folder / name)
        self.accelerator.wait_for_everyone()

    def _keep_epoch(self, epoch: int, scores: np.ndarray) -> None:
        """Keep an epoch's weights and scores for `joint_selection`."""
        self._save_network(epoch_folder(epoch))
        if self.accelerator.is_main_process:
            with whole_file(self.folder / epoch_scores(epoch)) as part, part.open("wb") as file:
                np.save(file, scores)
        self.accelerator.wait_for_everyone()

    def _keep_selected(self) -> None:
        """Write the selected epoch's weights into `model`, which marks the network as trained."""
        selected = self.position.best_epoch
        self.log.write("trained", network=self.name, selected_epoch=selected or self.epochs)
        if selected and self.accelerator.is_main_process:
            shutil.copytree(self.folder / self._best, self.folder / "model.partial", dirs_exist_ok=True)
            replace_folder(self.folder / "model.partial", self.folder / "model")
        elif not selected:
            self._save_network("model")
        self.accelerator.wait_for_everyone()


class TakesKeywords(nn.Module):
    """A model whose inputs are one dictionary, as in `update_bn`."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, torch.Tensor]) -> Any:
        """Pass the inputs as keyword arguments."""
        return self.model(**inputs)


@dataclass
class Position:
    """Progress of a network's training, saved in checkpoints."""

    step: int = 0
    best_score: float = -math.inf
    best_epoch: int = 0

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        vars(self).update(state)


class ShuffledBatches(Sampler[list[int]]):
    """Shuffled batches of an epoch, determined by `seed`, with this process' share of each."""

    def __init__(
        self, count: int, batch_size: int, batches: int, seed: tuple, share: tuple[int, int], start: int = 0
    ):
        order = torch.randperm(count, generator=seeded_generator(*seed))
        self.order = order[: batches * batch_size].view(batches, batch_size)
        self.share, self.start = share, start

    def __iter__(self) -> Iterator[list[int]]:
        index, count = self.share
        for batch in self.order[self.start :]:
            yield batch[index::count].tolist()

    def __len__(self) -> int:
        return len(self.order) - self.start


class WarmupCosine:
    """Learning rate factor: linear warm-up from 0, then half a cosine to 0."""

    def __init__(self, warmup_steps: float, total_steps: int):
        self.warmup_steps, self.total_steps = warmup_steps, total_steps

    def __call__(self, step: int) -> float:
        """The factor for the update after `step` updates."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class WarmupInverseSquareRoot(WarmupCosine):
    """Learning rate factor: linear warm-up from 0, then sqrt(warm-up steps / steps)."""

    def __call__(self, step: int) -> float:
        """The factor for the update after `step` updates."""
        if step < self.warmup_steps:
            return super().__call__(step)
        start = max(1.0, self.warmup_steps)
        return math.sqrt(start / max(start, step))


SCHEDULES = {"cosine": WarmupCosine, "inverse-square-root": WarmupInverseSquareRoot}


def seeded_generator(*seed: int) -> torch.Generator:
    """A generator seeded by numbers, such as seed, epoch, batch and process."""
    state = np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def epoch_folder(epoch: int) -> str:
    """Folder of a network's weights after an epoch."""
    return f"epoch-{epoch:04d}"


def epoch_scores(epoch: int) -> str:
    """File of the scores (N, m) on the monitored split after an epoch."""
    return f"epoch-{epoch:04d}.npy"


def watched_split(recipe: Recipe, splits: Sequence[str] | None = None) -> str:
    """The split that is evaluated after every epoch, and may select it.

    Raises:
        ValueError: Selection needs a split that is not among `splits`.
    """
    watched = "test" if recipe.epoch_selection == "best-test" else "validation"
    if splits is not None and recipe.epoch_selection != "last" and watched not in splits:
        raise ValueError(
            f"epoch_selection={recipe.epoch_selection} needs a split {watched!r}, there are {list(splits)}; "
            "hold subjects out, or use epoch_selection=last."
        )
    return watched


def steps_per_epoch(count: int, recipe: Recipe, processes: int) -> int:
    """Optimiser steps per epoch; the rest of the pictures, less than a batch, is dropped.

    Raises:
        ValueError: The batch cannot be divided among processes and accumulation, or is larger than `count`.
    """
    shares = processes * recipe.gradient_accumulation
    if recipe.batch_size % shares:
        raise ValueError(
            f"batch_size={recipe.batch_size} does not divide by {processes} processes times "
            f"gradient_accumulation={recipe.gradient_accumulation}."
        )
    if count < recipe.batch_size:
        raise ValueError(f"{count} training pictures do not fill one batch of {recipe.batch_size}.")
    return count // recipe.batch_size


def build_network(network: NetworkRecipe, recipe: Recipe, faces: AlignedFaces) -> nn.Module:
    """A new or pretrained network for the recipe's action units, with the corpus' occurrence rates."""
    settings = network_settings(network, recipe, faces)
    if network.pretrained:
        return AutoModel.from_pretrained(network.pretrained, **settings, dtype=torch.float32)
    return AutoModel.from_config(network_config(network, image_size=recipe.geometry.input_size, **settings))


def pretrained_weights(
    network: NetworkRecipe, recipe: Recipe, faces: AlignedFaces
) -> dict[str, torch.Tensor]:
    """The weights that a pretrained network does not initialise at random, such as those of a new head."""
    settings = network_settings(network, recipe, faces)
    model, found = AutoModel.from_pretrained(
        network.pretrained, **settings, dtype=torch.float32, output_loading_info=True
    )
    return {name: value for name, value in model.state_dict().items() if name not in found["missing_keys"]}


def network_settings(network: NetworkRecipe, recipe: Recipe, faces: AlignedFaces) -> dict[str, Any]:
    """Configuration of a network by the recipe and the corpus."""
    settings: dict[str, Any] = {"aus": list(recipe.aus), **clip_settings(network, recipe), **network.config}
    if recipe.balance_aus:
        margin = 1 / (len(faces) + 1)  # weights of Eq. 8 are undefined at rates of 0 and 1
        settings["au_occurrence_rates"] = np.clip(faces.occurrence_rates(), margin, 1 - margin).tolist()
    return settings


def clip_settings(network: NetworkRecipe, recipe: Recipe) -> dict[str, int]:
    """The recipe's clips as configuration of a temporal network; empty for others.

    Raises:
        ValueError: They do not fit the network or its own configuration.
    """
    if network.model_type not in CONFIG_MAPPING:  # pretrained weights have their own type
        return {}
    if "clip_length" not in (field.name for field in fields(CONFIG_MAPPING[network.model_type])):
        if recipe.clips.length > 1:
            raise ValueError(
                f"clips.length={recipe.clips.length}, but {network.model_type} takes pictures; use 1."
            )
        return {}
    settings = {"clip_length": recipe.clips.length, "num_subsequences": recipe.clips.subsequences}
    if other := {
        name: network.config[name]
        for name in settings
        if network.config.get(name, settings[name]) != settings[name]
    }:
        raise ValueError(
            f"the network's config has {other}, but the recipe {recipe.clips}; leave it to the recipe."
        )
    return settings


def network_config(network: NetworkRecipe, **settings: Any) -> Any:
    """The configuration of a new network: its preset with other values.

    Raises:
        ValueError: There is no such type, preset or key. Transformers would silently ignore an unknown key.
    """
    types = sorted(name for name in CONFIG_MAPPING if name.startswith("au-"))  # type: ignore[attr-defined]
    if network.model_type not in types:
        raise ValueError(f"model_type {network.model_type!r} is unknown; known: {types}.")
    config_class = CONFIG_MAPPING[network.model_type]
    known, common = ({field.name for field in fields(each)} for each in (config_class, PreTrainedConfig))
    if strange := sorted(set(network.config) - known):
        own = sorted(known - common)
        raise ValueError(f"config has unknown keys {strange}; those of {config_class.__name__}: {own}.")
    make = getattr(config_class, network.preset, None) if network.preset else config_class
    if make is None:
        raise ValueError(f"{config_class.__name__} has no preset {network.preset!r}, such as 'compact'.")
    return make(**settings)


def start_from(model: nn.Module, folder: Path) -> None:
    """Load the weights of another network that have the same names and shapes.

    Raises:
        FileNotFoundError: There are no weights.
        ValueError: There are no such weights.
    """
    if not (file := folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"{file} does not exist; train it first, or start from random weights: "
            "--set networks.NAME.backbone_from="
        )
    found, own = load_file(file), model.state_dict()
    shared = {name: value for name, value in found.items() if name in own and own[name].shape == value.shape}
    if not shared:
        raise ValueError(
            f"{folder} shares no weight with this {type(model).__name__}; correct `backbone_from`."
        )
    model.load_state_dict(shared, strict=False)


def training_examples(pictures: Any, faces: AlignedFaces, recipe: Recipe) -> Any:
    """The examples of an epoch: `pictures` (the faces, or `FacesOnDevice`), or clips of them."""
    clips = recipe.clips
    if clips.length == 1:
        return pictures
    return ClipDataset(
        pictures, sequence_names(faces), faces.people, clips.length, clips.subsequences, recipe.seed
    )


class FacesOnDevice(Dataset):
    """Faces in the memory of a device."""

    def __init__(self, faces: AlignedFaces, device: torch.device, piece: int = 1024):
        parts = [
            {name: values.to(device) for name, values in faces.__getitems__(rows).items()}
            for rows in np.split(np.arange(len(faces)), range(piece, len(faces), piece))
        ]
        self.tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def __len__(self) -> int:
        return len(self.tensors["pictures"])

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """A stacked batch, like that of `AlignedFaces`."""
        return {name: values[torch.as_tensor(indices)] for name, values in self.tensors.items()}


def sequence_names(faces: AlignedFaces) -> np.ndarray:
    """Names of the sequences of the pictures (N,)."""
    return faces.groups.get("sequence", faces.people) if faces.sequences is None else faces.sequences


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Apply weight decay to matrices and kernels, but not to norms, biases and scalars."""
    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decays = {name for name, p in parameters if p.ndim > 1 and not name.endswith("bias")}
    return [
        {"params": [p for name, p in parameters if name in decays], "weight_decay": weight_decay},
        {"params": [p for name, p in parameters if name not in decays], "weight_decay": 0.0},
    ]


def collator(
    recipe: Recipe,
    augmentation: Augmentation = NO_AUGMENTATION,
    scheme: str = "ibug68",
    places: Sequence[int] | None = None,
) -> AUCollator:
    """The recipe's collator, for a model with AU centres of `places`, by default of its AUs."""
    return AUCollator(
        aus=recipe.aus,
        places=places,
        scheme=scheme,
        geometry=recipe.geometry,
        mean=recipe.image_mean,
        std=recipe.image_std,
        augmentation=augmentation,
        target=recipe.target,
        full_intensity=recipe.full_intensity,
    )


@torch.no_grad()
def gathered_scores(
    model: nn.Module, faces: AlignedFaces, collate: AUCollator, batch_size: int, accelerator: Accelerator
) -> np.ndarray:
    """Probabilities (N, m) of all faces in all processes, each of which predicts its share."""
    model.eval()
    processes = accelerator.num_processes
    order = np.arange(math.ceil(len(faces) / processes) * processes) % len(faces)  # equal shares
    mine = order[accelerator.process_index :: processes]
    scores = []
    for start in range(0, len(mine), batch_size):
        batch = send_to_device(faces.__getitems__(mine[start : start + batch_size]), accelerator.device)
        inputs = collate.inputs(batch)
        del inputs["labels"]
        scores.append(torch.sigmoid(model(**inputs).logits.float()))
    shares = gather(torch.cat(scores)).view(processes, len(mine), -1)
    return shares.transpose(0, 1).flatten(0, 1)[: len(faces)].cpu().numpy()


@torch.no_grad()
def gathered_clip_scores(
    model: nn.Module, faces: AlignedFaces, collate: AUCollator, clip_length: int, accelerator: Accelerator
) -> np.ndarray:
    """Probabilities (N, m) of all faces like `gathered_scores`, predicted clip by clip."""
    model.eval()
    clips = fixed_stride_clips(sequence_names(faces), clip_length)
    scores = torch.zeros(len(faces), len(faces.aus), device=accelerator.device)
    processes = accelerator.num_processes
    # Wrapped models synchronise in each forward pass, so all processes need the same number of passes.
    for number in range(accelerator.process_index, math.ceil(len(clips) / processes) * processes, processes):
        rows = clips[number % len(clips)].rows
        batch = send_to_device(faces.__getitems__(rows), accelerator.device)
        logits = model(collate.inputs(batch)["pixel_values"][None]).logits[0]
        if number < len(clips):
            scores[torch.from_numpy(rows).to(scores.device)] = torch.sigmoid(logits.float())
    return accelerator.reduce(scores, "sum").cpu().numpy()


def new_accelerator(recipe: Recipe) -> Accelerator:
    """An accelerator for CPU, GPU or several processes; each network needs its own."""
    return Accelerator(
        mixed_precision="bf16" if recipe.precision == "bf16" else "no",
        gradient_accumulation_steps=recipe.gradient_accumulation,
        cpu=not torch.accelerator.is_available(),  # for torchrun's processes on CPUs to communicate
    )


@dataclass
class RunLog:
    """Log of events as JSON lines; does nothing without a path (in all processes but the first)."""

    path: Path | None

    def __post_init__(self) -> None:
        """Remove an incomplete last line of a killed process."""
        if self.path is not None and self.path.exists():
            with self.path.open("rb+") as file:
                file.truncate(file.read().rfind(b"\n") + 1)

    def write(self, event: str, **values: Any) -> None:
        """Append an event, with the time."""
        if self.path is not None:
            line = {"event": event, "time": datetime.now(timezone.utc).isoformat(timespec="seconds")}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**line, **values}) + "\n")

    def events(self, event: str) -> list[dict[str, Any]]:
        """All events of a kind so far."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path and self.path.exists() else []
        return [line for line in map(json.loads, lines) if line["event"] == event]


def read_state(path: Path, device: torch.device) -> dict[str, Any]:
    """Load the state of a training saved by `torch.save`.

    Raises:
        ValueError: The file is truncated or broken.
    """
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises exceptions of many kinds
        reason = str(error).split("\n")[0] or type(error).__name__
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) cannot be read: {reason}; copy it here again, or remove "
            "it to train from the start."
        ) from error


def replace_folder(source: Path, target: Path) -> None:
    """Move a complete folder to `target`, replacing it."""
    shutil.rmtree(target, ignore_errors=True)
    source.rename(target)
