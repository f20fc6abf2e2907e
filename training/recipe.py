"""A training recipe: all settings of a run, read from YAML; `--set` replaces values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from actionunits.action_units import CORPUS_AUS, check_aus
from actionunits.data import Augmentation, InputGeometry
from actionunits.data.protocols import CROSSINGS


@dataclass(frozen=True)
class NetworkRecipe:
    """A network to train.

    Attributes:
        model_type: Registered type, such as "au-gda".
        preset: Class method of the configuration with its defaults ("compact"); "" for the paper's.
        config: Other values of the configuration.
        pretrained: Folder or Hub name of weights to start from; `preset` must then be empty.
        keep_pretrained: Share of the pretrained weights in their average with the trained ones, which reduces
            forgetting (Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022). Statistics of
            batch normalisation are estimated again; heads of new action units are as trained.
        backbone_from: An earlier network of the recipe, or a model folder (with a slash in its name), whose
            weights of the same names and shapes, those of the backbone, are the initial ones.
        epochs: Passes over the training split; 0 for the recipe's number.
    """

    model_type: str
    preset: str = ""
    config: dict = field(default_factory=dict)
    pretrained: str = ""
    keep_pretrained: float = 0.0
    backbone_from: str = ""
    epochs: int = 0


@dataclass(frozen=True)
class PaperFigures:
    """The row of a paper's result table that a recipe reproduces.

    Attributes:
        table: Its table, such as "ESCDA, Table 1".
        f1: F1-frame in percent by FACS number, {1: 56.5, ...}.
        mean: Their mean as printed, in percent; 0 without such a row.
    """

    table: str = ""
    f1: dict[int, float] = field(default_factory=dict)
    mean: float = 0.0


@dataclass(frozen=True)
class Variant:
    """An entry of a recipe's `variants`: another row of a paper's tables, with other settings.

    Attributes:
        settings: "key=value", as for `--set`.
        paper: The figures of this row.
    """

    settings: list = field(default_factory=list)
    paper: PaperFigures = PaperFigures()


@dataclass(frozen=True)
class SplitRecipe:
    """Splits of a prepared corpus; the synthetic corpus has its own.

    Attributes:
        fold: Fold to test, a number or a name of `actionunits.data.protocols`; "" for an official partition,
            "all" to train on all subjects.
        validation: Share of the training subjects to hold out for validation.
        sample: Equidistant share of the training faces (AUFormer Sec. 4.2).
        folds_file: Subject lists where none are built in: CSV with the columns subject and fold.
    """

    fold: object = ""
    validation: float = 0.0
    sample: float = 1.0
    folds_file: str = ""


@dataclass(frozen=True)
class ClipRecipe:
    """Clips of temporal networks, by LAC's temporal sampling (`actionunits.data.sampling`).

    Sequences are the corpus' recordings (or its group "sequence"), or all pictures of a subject in order.

    Attributes:
        length: Frames per clip (t); 1 for networks of single images, whose epochs have each picture once.
        subsequences: Clips per sequence and epoch (N_sep).
    """

    length: int = 1
    subsequences: int = 12


@dataclass(frozen=True)
class Recipe:
    """One training run.

    Attributes:
        name: Name of the result in the model card.
        networks: Networks by name, which are trained one after the other. The result is the only network,
            or the ensemble of `lsc` and `gda`.
        aus: FACS numbers in output order.
        target: Labels of the loss, "occurrence" (binary) or "intensity" (soft labels in [0, 1]).
        full_intensity: A soft label is min(intensity / full_intensity, 1).
        teachers: Model folders or Hub names of networks for distillation, which requires
            target="intensity" (`teaching.taught`).
        teacher_weight: Weight of the teachers in the soft label.
        balance_aus: Weight action units and occurrences by their rates in the training split (ESCDA Eq. 8).
        geometry: Sizes of aligned face, crop and input.
        image_mean: Mean of pixels in [0, 1], per channel.
        image_std: Their standard deviation, per channel.
        sharpen: `AUImageProcessor.sharpen` at inference; training pictures are not sharpened.
        clips: Clips of temporal networks; `batch_size` then counts clips.
        augmentation: Augmentation in training.
        plain_epochs: First epochs with mirroring only, without which a transformer with random initial
            weights hardly starts to learn.
        epochs: Passes over the training split.
        warmup_epochs: Epochs of linear warm-up of the learning rate from 0.
        schedule: Decay of the learning rate after the warm-up: half a "cosine" to 0, or
            "inverse-square-root" in the steps.
        batch_size: Pictures per optimiser step, over all processes and accumulated batches.
        gradient_accumulation: Batches per optimiser step.
        base_learning_rate: Learning rate for a batch of 256; the run's is this * batch_size / 256.
        weight_decay: AdamW's, for matrices and kernels only (not for norms, biases and scalars).
        clip_norm: Gradients are clipped to this norm.
        precision: "fp32" or "bf16" (autocast).
        save_dtype: Type of the stored parameters, "float32" or "float16". The result is evaluated as stored,
            and computes in float32 either way (`actionunits.half_precision`).
        epoch_selection: "last", "best-validation" by `selection_metric`, or "best-test": on the test fold, as
            in the papers, which is optimistic; every report states the rule.
        selection_metric: Mean metric that selects the epoch: "f1" (at 0.5), "auc" or "correlation".
        select_together: Select the epoch whose combined predictions of `lsc` and `gda` are best (ESCDA Sec.
            4.1.2), instead of one for each; until then all epochs are kept.
        max_false_alarms: Bound of the false alarm rate of calibrated thresholds (validation split).
        seed: Seed of initial weights, order of the pictures and augmentation.
        eval_batch_size: Pictures per validation batch.
        log_every: Optimiser steps between lines of the log.
        checkpoint_every: Optimiser steps between checkpoints, which are also saved after each epoch.
        workers: Processes of the data loader; 0 reads in the training process.
        preload: Keep all training pictures in the device's memory (77 kB each at 160 pixels), without
            `workers`.
        ensemble: Combination of `lsc` and `gda`: "average" (ESCDA) or "voting", the maximum (ESCDA-V).
        paper: The paper's figures for this recipe.
        split: Splits of a corpus prepared by `actionunits corpus prepare`.
        crossing: A key of `actionunits.data.protocols.CROSSINGS` if the figures of `paper` are those on
            another corpus, on which training/evaluate.py evaluates the result.
    """

    name: str
    networks: dict[str, NetworkRecipe]
    aus: list[int] = field(default_factory=lambda: list(CORPUS_AUS["synthetic"]))
    target: Literal["occurrence", "intensity"] = "occurrence"
    full_intensity: float = 1.0
    teachers: list[str] = field(default_factory=list)
    teacher_weight: float = 0.5
    balance_aus: bool = True
    geometry: InputGeometry = InputGeometry()
    image_mean: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5])
    image_std: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5])
    sharpen: float = 0.0
    clips: ClipRecipe = ClipRecipe()
    augmentation: Augmentation = Augmentation()
    plain_epochs: int = 0
    epochs: int = 20
    warmup_epochs: float = 5
    schedule: Literal["cosine", "inverse-square-root"] = "cosine"
    batch_size: int = 64
    gradient_accumulation: int = 1
    base_learning_rate: float = 3.2e-2
    weight_decay: float = 0.05
    clip_norm: float = 3.0
    precision: Literal["fp32", "bf16"] = "fp32"
    save_dtype: Literal["float32", "float16"] = "float32"
    epoch_selection: Literal["last", "best-validation", "best-test"] = "last"
    selection_metric: Literal["f1", "auc", "correlation"] = "f1"
    select_together: bool = False
    max_false_alarms: float = 0.1
    seed: int = 0
    eval_batch_size: int = 128
    log_every: int = 50
    checkpoint_every: int = 500
    workers: int = 0
    preload: bool = False
    ensemble: Literal["average", "voting"] = "average"
    paper: PaperFigures = PaperFigures()
    split: SplitRecipe = SplitRecipe()
    crossing: str = ""

    def __post_init__(self) -> None:
        """Check values and their combinations."""
        check_aus(self.aus)
        for names, is_valid, rule in RULES:
            for name in names.split():
                if not is_valid(value := getattr(self, name)):
                    raise ValueError(f"{name}={value!r} {rule}.")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(f"warmup_epochs={self.warmup_epochs} must be below epochs={self.epochs}.")
        if self.teachers and self.target != "intensity":
            raise ValueError(f"teachers={self.teachers} soften labels and need target=intensity.")
        self._check_networks()
        if self.select_together:
            self._check_select_together()

    def _check_networks(self) -> None:
        if len(self.networks) != 1 and set(self.networks) != {"lsc", "gda"}:
            raise ValueError(f"networks must name one network, or lsc and gda; got {sorted(self.networks)}.")
        trained: list[str] = []
        for name, network in self.networks.items():
            is_folder = "/" in network.backbone_from
            if network.backbone_from and not is_folder and network.backbone_from not in trained:
                raise ValueError(
                    f"{name} takes its backbone from {network.backbone_from!r}, which must be trained before "
                    f"it; before it come {trained}."
                )
            if network.epochs < 0:
                raise ValueError(f"{name}: epochs={network.epochs} must not be negative; 0 is the recipe's.")
            if 0 < network.epochs <= self.warmup_epochs:
                raise ValueError(
                    f"{name}: epochs={network.epochs} must be above warmup_epochs={self.warmup_epochs}."
                )
            if not 0 <= network.keep_pretrained < 1:
                raise ValueError(f"{name}: keep_pretrained={network.keep_pretrained} must lie in [0, 1).")
            if network.keep_pretrained and (not network.pretrained or self.epoch_selection != "last"):
                raise ValueError(f"{name}: keep_pretrained needs `pretrained` and epoch_selection=last.")
            trained.append(name)

    def _check_select_together(self) -> None:
        names = list(self.networks)
        if len(names) < 2 or self.epoch_selection == "last":
            raise ValueError(
                f"select_together chooses an epoch for lsc and gda on a split; got {names} and "
                f"epoch_selection={self.epoch_selection}."
            )
        if any(n.epochs not in (0, self.epochs) or n.backbone_from in names for n in self.networks.values()):
            raise ValueError(
                "select_together needs as many epochs of each network, and no backbone_from another one, "
                "which is selected when all are trained."
            )

    @property
    def learning_rate(self) -> float:
        """Peak learning rate of the run (ESCDA Sec. 4.1.2)."""
        return self.base_learning_rate * self.batch_size / 256

    def to_dict(self) -> dict[str, Any]:
        """All values, with defaults, as a YAML- and JSON-ready dictionary."""
        return asdict(self)


def _are_three_numbers(values: list[Any]) -> bool:
    return len(values) == 3 and all(isinstance(value, int | float) for value in values)


RULES: list[tuple[str, Callable[[Any], bool], str]] = [
    (
        "epochs batch_size gradient_accumulation base_learning_rate clip_norm full_intensity "
        "eval_batch_size log_every checkpoint_every",
        lambda value: value > 0,
        "must be above 0",
    ),
    ("plain_epochs workers weight_decay sharpen", lambda value: value >= 0, "must not be negative"),
    ("teacher_weight", lambda value: 0 < value <= 1, "must lie in (0, 1]"),
    ("max_false_alarms", lambda value: 0 <= value <= 1, "must lie in [0, 1]"),
    ("seed", lambda value: 0 <= value < 2**32, "must lie in [0, 2**32)"),
    ("image_mean image_std", _are_three_numbers, "must be three numbers, one per channel"),
    ("image_std", lambda values: all(v > 0 for v in values), "divides the channels, so it must be above 0"),
    ("crossing", lambda name: name in ("", *CROSSINGS), f"is none of {list(CROSSINGS)}"),
]
"""Valid values of a recipe: names of attributes, a check, and the message of its failure."""


def load_recipe(path: str | Path, settings: Sequence[str] = (), variant: str = "") -> Recipe:
    """Read a recipe and replace values.

    Args:
        path: YAML file of the attributes of `Recipe`, and `variants`.
        settings: "key=value" with a dotted key and a YAML value ("networks.lsc.config.mlp_channels=64").
        variant: One of the recipe's variants, whose settings precede these.

    Raises:
        ValueError: A key or variant is unknown, or a value invalid.
    """
    values, variants = _read_file(path)
    if variant:
        if variant not in variants:
            raise ValueError(f"{path} has no variant {variant!r}; it has {sorted(variants) or 'none'}.")
        chosen = variants[variant]
        values |= {"name": f"{values['name']}-{variant}", "paper": asdict(chosen.paper)}
        settings = [*chosen.settings, *settings]
    for setting in settings:
        _replace(values, setting)
    return _read(Recipe, values, "the recipe")


def load_variants(path: str | Path) -> dict[str, Variant]:
    """The variants of a recipe, further rows of the paper's tables."""
    return _read_file(path)[1]


def _read_file(path: str | Path) -> tuple[dict[str, Any], dict[str, Variant]]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not a file; the recipes are in training/recipes.")
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a recipe, which is a table of keys and values, but {values!r:.60}.")
    return values, _read(dict[str, Variant], values.pop("variants", {}), "variants")


def _replace(values: dict[str, Any], setting: str) -> None:
    key, equals, value = setting.partition("=")
    if not equals:
        raise ValueError(f"--set takes key=value, got {setting!r}.")
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ValueError(f"--set {setting}: {parent} is {values!r} and has no {last}.")
    try:
        values[last] = yaml.safe_load(value) if value else ""
    except yaml.YAMLError as error:
        raise ValueError(f"--set {setting}: {value!r} is no YAML: {error}") from error


def _read(kind: Any, value: Any, where: str) -> Any:
    """Convert a YAML value to a `kind`, a dataclass or the annotation of a field."""
    if is_dataclass(kind) and isinstance(kind, type):
        return _read_dataclass(kind, value, where)
    if get_origin(kind) is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where} is a table of keys and values, not {value!r}.")
        keys, inner_kind = get_args(kind)
        return {
            _read(keys, key, where): _read(inner_kind, inner, f"{where}.{key}")
            for key, inner in value.items()
        }
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ValueError(f"{where} is one of {list(get_args(kind))}, not {value!r}.")
        return value
    if kind is float and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-3 as text, as it has no point
        except (TypeError, ValueError):
            pass
    elif isinstance(value, get_origin(kind) or kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise ValueError(f"{where} must be a {getattr(kind, '__name__', kind)}, got {value!r}.")


def _read_dataclass(kind: type, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be a table of keys and values, got {values!r}.")
    known = {f.name for f in fields(kind)}
    if strange := sorted(set(values) - known):
        raise ValueError(f"{where} has unknown keys {strange}; known: {sorted(known)}.")
    hints = get_type_hints(kind)
    return kind(**{key: _read(hints[key], value, f"{where}: {key}") for key, value in values.items()})
