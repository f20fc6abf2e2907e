"""A training recipe: all that decides the outcome of a run, read from YAML; `--set` replaces values."""

from __future__ import annotations

from collections.abc import Sequence
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
        preset: Class method of the configuration that gives its defaults ("compact"); "" for the paper's.
        config: Values that differ from these defaults.
        pretrained: Folder or Hub name of weights to start from; `preset` must then be empty.
        keep_pretrained: Share of the pretrained weights in the result, which is the average of these and the
            trained ones (Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022): what the new
            corpus does not show is forgotten less. Statistics of batch normalisation are estimated anew.
        backbone_from: Another network of the recipe, trained before, or a model folder (with a slash in its
            name); this one starts from its weights where names agree, which is the backbone.
        epochs: Passes over the training split; 0 for the recipe's.
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
    """The row of a paper's result table that a recipe is to reach.

    Attributes:
        table: Where the row stands, such as "ESCDA, Table 1".
        f1: F1-frame in percent by FACS number, {1: 56.5, ...}.
        mean: Their mean as printed, in percent; 0 where there is no such row.
    """

    table: str = ""
    f1: dict[int, float] = field(default_factory=dict)
    mean: float = 0.0


@dataclass(frozen=True)
class Variant:
    """Another row of a paper's tables, by other values of the same recipe: an entry of its `variants`.

    Attributes:
        settings: "key=value", as `--set` takes them.
        paper: The figures of this row.
    """

    settings: list = field(default_factory=list)
    paper: PaperFigures = PaperFigures()


@dataclass(frozen=True)
class SplitRecipe:
    """Who of a prepared corpus trains and who tests; the synthetic corpus comes split.

    Attributes:
        fold: Fold to test, a number or a name of `actionunits.data.protocols`; "" for an official partition,
            "all" to train on everybody.
        validation: Share of the training people to hold out for validation.
        sample: Equidistant share of the training faces (AUFormer Sec. 4.2).
        folds_file: Subject lists where none are built in: CSV with the columns subject and fold.
    """

    fold: object = ""
    validation: float = 0.0
    sample: float = 1.0
    folds_file: str = ""


@dataclass(frozen=True)
class ClipRecipe:
    """How a clip network sees the training split: LAC's temporal sampling (`actionunits.data.sampling`).

    Sequences are the corpus' recordings (or its group "sequence"), or all pictures of a person in its order.

    Attributes:
        length: Frames of a clip (t); 1 for networks of pictures, which see all of them once an epoch.
        subsequences: Clips of a sequence in an epoch (N_sep).
    """

    length: int = 1
    subsequences: int = 12


@dataclass(frozen=True)
class Recipe:
    """One training run.

    Attributes:
        name: What the model card calls the result.
        networks: Networks by name; each is trained alone, one after the other. The result is the only
            network, or the ensemble of `lsc` and `gda`.
        aus: FACS numbers in output order.
        target: Labels of the loss, "occurrence" (0 or 1) or "intensity" (soft labels from 0 to 1).
        full_intensity: Intensity from which on a soft label is 1; below it is intensity / full_intensity.
        teachers: Model folders or Hub names of trained networks that soften the labels, which must be
            intensities: distillation (`teaching.taught`).
        teacher_weight: Share of the teachers in the soft label.
        balance_aus: Weigh action units and occurrences by their rates in the training split (ESCDA Eq. 8).
        geometry: Sizes of the aligned face, the crop and the input.
        image_mean: Subtracted from the channels, which lie in [0, 1].
        image_std: Divides them.
        sharpen: `AUImageProcessor.sharpen` of pictures in use; those of training stay as they are.
        clips: Clips that a network of videos trains on; `batch_size` then counts clips.
        augmentation: What varies between epochs.
        plain_epochs: Epochs at the start in which only the mirror image varies: a transformer that starts
            from random weights hardly begins to learn otherwise.
        epochs: Passes over the training split.
        warmup_epochs: Epochs in which the learning rate rises linearly from 0; a cosine to 0 follows.
        schedule: How the learning rate falls after the warm-up: as half a "cosine" to 0, or as the
            "inverse-square-root" of the steps.
        batch_size: Pictures of one optimiser step, over all processes and accumulated batches.
        gradient_accumulation: Batches that a step is split into where memory is short.
        base_learning_rate: Learning rate for a batch of 256; the run's is this * batch_size / 256.
        weight_decay: AdamW's, for matrices and kernels only (not for norms, biases and scalars).
        clip_norm: Largest norm of the gradient.
        precision: "fp32" or "bf16" (autocast).
        save_dtype: How the result's parameters are stored, "float32" or "float16"; it is measured as it is
            stored, and computes with float32 either way (`actionunits.half_precision`).
        epoch_selection: "last", "best-validation" by `selection_metric`, or "best-test": on the test fold, as
            the papers choose, which flatters; every report names the rule.
        selection_metric: Mean figure of the split that selects: "f1" (at 0.5), "auc" or "correlation".
        select_together: Whether `lsc` and `gda` are those of one epoch, after which their answers together
            are best (ESCDA Sec. 4.1.2), instead of each its own best; until then all epochs are kept.
        max_false_alarms: Bound of the false alarm rate when thresholds are calibrated (validation split).
        seed: Of initial weights, order of the pictures and augmentation.
        eval_batch_size: Pictures of one validation batch.
        log_every: Optimiser steps between lines of the log.
        checkpoint_every: Optimiser steps between checkpoints; epochs end with one, too.
        workers: Processes that read pictures; 0 reads in the training process.
        preload: Keep all training pictures in the memory of the device (77 kB each at 160 pixels); `workers`
            then have nothing to do.
        ensemble: How `lsc` and `gda` become one answer: "average" (ESCDA) or "voting", the maximum (ESCDA-V).
        paper: The figures that the paper reports for this recipe.
        split: Who trains and who tests, for corpora that come by `actionunits corpus prepare`.
        crossing: A key of `actionunits.data.protocols.CROSSINGS` where the figures of `paper` are those on
            another corpus, on which training/evaluate.py then measures the result.
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
        """Refuse what no run could follow."""
        check_aus(self.aus)
        if self.crossing not in ("", *CROSSINGS):
            raise ValueError(f"crossing={self.crossing!r} is none of {list(CROSSINGS)}.")
        if len(self.networks) != 1 and set(self.networks) != {"lsc", "gda"}:
            raise ValueError(f"networks must name one network, or lsc and gda; got {sorted(self.networks)}.")
        positive = ("epochs", "batch_size", "gradient_accumulation", "base_learning_rate", "clip_norm")
        positive += ("full_intensity", "eval_batch_size", "log_every", "checkpoint_every")
        for name in positive:
            if not getattr(self, name) > 0:  # nor is nan
                raise ValueError(f"{name}={getattr(self, name)} must be above 0.")
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
            if not 0 <= network.keep_pretrained < 1:
                raise ValueError(f"{name}: keep_pretrained={network.keep_pretrained} must lie in [0, 1).")
            if network.keep_pretrained and (not network.pretrained or self.epoch_selection != "last"):
                raise ValueError(f"{name}: keep_pretrained wants `pretrained` and epoch_selection=last.")
            trained.append(name)
        if self.select_together:
            self._check_select_together()
        if not 0 < self.teacher_weight <= 1:
            raise ValueError(f"teacher_weight={self.teacher_weight} must lie in (0, 1].")
        if self.teachers and self.target != "intensity":
            raise ValueError(f"teachers={self.teachers} soften labels; with them goes target=intensity.")
        for name in ("plain_epochs", "workers", "weight_decay", "sharpen"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} must lie in [0, 2**32).")
        if not 0 <= self.max_false_alarms <= 1:
            raise ValueError(f"max_false_alarms={self.max_false_alarms} is a share in [0, 1].")
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            if len(values) != 3 or not all(isinstance(value, int | float) for value in values):
                raise ValueError(f"{name}={values} must be three numbers, one a channel.")
        if not all(value > 0 for value in self.image_std):
            raise ValueError(f"image_std={self.image_std} divides the channels, so it must be above 0.")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(f"warmup_epochs={self.warmup_epochs} must be below epochs={self.epochs}.")

    def _check_select_together(self) -> None:
        names = list(self.networks)
        if len(names) < 2 or self.epoch_selection == "last":
            raise ValueError(
                f"select_together chooses an epoch for lsc and gda by a split; got {names} and "
                f"epoch_selection={self.epoch_selection}."
            )
        if any(n.epochs not in (0, self.epochs) or n.backbone_from in names for n in self.networks.values()):
            raise ValueError(
                "select_together wants as many epochs of each network, and no backbone_from another one, "
                "which is only chosen when all are trained."
            )

    @property
    def learning_rate(self) -> float:
        """Highest learning rate of the run (ESCDA Sec. 4.1.2)."""
        return self.base_learning_rate * self.batch_size / 256

    def to_dict(self) -> dict[str, Any]:
        """All values, defaults included, as YAML and JSON hold them."""
        return asdict(self)


def load_recipe(path: str | Path, settings: Sequence[str] = (), variant: str = "") -> Recipe:
    """Read a recipe and replace single values.

    Args:
        path: YAML file; keys are the attributes of `Recipe`, and `variants`.
        settings: "key=value" with a dotted key and a YAML value ("networks.lsc.config.mlp_channels=64").
        variant: One of the recipe's variants, whose settings come before these.

    Raises:
        ValueError: Unknown key or variant, wrong type or value out of range.
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
    """The further rows of the paper's tables that a recipe names."""
    return _read_file(path)[1]


def _read_file(path: str | Path) -> tuple[dict[str, Any], dict[str, Variant]]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is no file; the recipes lie in training/recipes.")
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is no recipe, which is a table of keys and values, but {values!r:.60}.")
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
    """Make a `kind` (a dataclass or an annotation of one's field) of a YAML value."""
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
            return float(value)  # YAML reads 1e-3, without a point, as text
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
