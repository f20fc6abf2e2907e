"""Configuration shared by all methods: the action units of the outputs, their thresholds and rates."""

from collections.abc import Mapping
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.utils import logging

from actionunits.action_units import CORPUS_AUS, au_label, check_aus, parse_au_label
from actionunits.au_regions import have_centers

logger = logging.get_logger(__name__)

LABEL_FIELDS = ("aus", "id2label", "label2id", "num_labels")
"""Four ways to name the outputs; a config keeps them consistent."""
PER_LABEL_FIELDS = ("au_thresholds", "au_occurrence_rates")
"""Lists with an entry per output, which follow their labels when the outputs change."""
REMOTE_CODE_FIELDS = ("auto_map", "custom_pipelines")
"""Fields that name the code of a self-contained folder."""


@strict
class AUConfig(PreTrainedConfig):
    """Base class of the configurations of all action unit models.

    The outputs can be set by `aus`, `id2label` / `label2id` or (without names) `num_labels`: in the
    constructor, in `from_pretrained(folder, aus=[1, 12])` or by assignment. The other fields follow.

    Args:
        aus: FACS numbers in output order; the twelve of BP4D by default. `None` if the labels are not action
            units ("LABEL_0").
        au_thresholds: Decision threshold of each output; `None` means 0.5 for all. They follow their labels
            when the outputs change (0.5 for new ones).
        au_occurrence_rates: Occurrence rate of each action unit in the training set, in (0, 1), for the
            weights of the training loss (ESCDA Eq. 8); `None` for no weights. They follow their labels when
            the outputs change, and are dropped, with a warning, if a new one has no rate.

    Raises:
        ValueError: Unknown or repeated action units, contradictory names (`aus=[1]`, `id2label={0: "AU2"}`),
            a list of the wrong length or out of range, or a `problem_type` other than multi-label.
    """

    # Outputs that are not predictions for the Trainer.
    keys_to_ignore_at_inference = [
        "branch_logits",
        "au_attentions",
        "au_attentions_unconstrained",
        "au_masks",
        "au_evidence",
        "hidden_states",
        "attentions",
    ]

    # For `processor_options`: size of the aligned face, and of its centre crop.
    _aligned_size, _crop_size = 200, 176

    aus: Any = None
    au_thresholds: list[float | int] | None = None
    au_occurrence_rates: list[float | int] | None = None

    def __post_init__(self, **kwargs):
        """Resolve the labels, then initialise the base class."""
        if self.problem_type not in (None, "multi_label_classification"):
            raise ValueError(
                f"problem_type={self.problem_type!r}: action units are not exclusive, so only "
                '"multi_label_classification" fits; leave it out.'
            )
        self.problem_type = "multi_label_classification"
        self._store_labels(
            _resolve_labels(self.aus, self.id2label, self.label2id, kwargs.pop("num_labels", None))
        )
        for name in PER_LABEL_FIELDS:
            self._check_per_label(name, getattr(self, name))
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """Make a config from a saved one; labels given by keyword replace the saved ones."""
        if __name__.startswith("actionunits."):  # prefer the package to the folder's copy of its code
            config_dict = {key: value for key, value in config_dict.items() if key not in REMOTE_CODE_FIELDS}
        asked = {name: kwargs.pop(name) for name in LABEL_FIELDS if name in kwargs}
        per_label = {name: kwargs.pop(name) for name in PER_LABEL_FIELDS if name in kwargs}
        result = super().from_dict(config_dict, **kwargs)
        config = result[0] if isinstance(result, tuple) else result
        config.relabel(**asked)
        for name, values in per_label.items():
            setattr(config, name, values)
        config.validate()  # transformers does not validate other keywords
        return result

    @property
    def au_labels(self) -> list[str]:
        """The labels in output order, such as "AU12"."""
        return list((self.id2label or {}).values())

    @property
    def places(self) -> list[int] | None:
        """The action units whose centres are inputs of the model, in order: by default its own.

        `None` if the labels are not action units.
        """
        return self.aus

    @property
    def processor_options(self) -> dict[str, Any]:
        """Options of the image processor that fits the model, `AUImageProcessor(**config.processor_options)`.

        It crops the centre of an aligned face, resizes it to the model's `image_size`, and returns the
        centres of its `places`. Subclasses set other sizes by `_aligned_size` and `_crop_size`, and add
        options as in `return super().processor_options | {"image_mean": [0.485, 0.456, 0.406]}`.
        """
        image_size = getattr(self, "image_size", self._crop_size)
        crop, size = ({"height": side, "width": side} for side in (self._crop_size, image_size))
        return {"aligned_size": self._aligned_size, "crop_size": crop, "size": size, **self.center_options}

    @property
    def center_options(self) -> dict[str, Any]:
        """Options of the image processor for the centres."""
        places = self.places
        if places is None or not have_centers(places):
            return {"au_definition": "none"}
        return {"aus": list(places)}

    def relabel(self, **names: Any) -> None:
        """Rename the outputs by some of `aus`, `id2label`, `label2id` and `num_labels`, which must agree."""
        names = {name: value for name, value in names.items() if value is not None}
        if names and names != {"num_labels": self.num_labels}:
            old_labels = self.au_labels
            self._store_labels(_resolve_labels(**names))
            self._carry_over(old_labels)

    def __setattr__(self, name: str, value: Any) -> None:
        is_complete = "_name_or_path" in self.__dict__  # transformers sets it after the labels
        if is_complete and name in LABEL_FIELDS:
            self.relabel(**{name: value})
            return
        if is_complete and name in PER_LABEL_FIELDS:
            self._check_per_label(name, value)
        super().__setattr__(name, value)

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the saved fields, always with labels; transformers leaves out two anonymous ones."""
        return super().to_diff_dict() | {"id2label": self.id2label, "label2id": self.label2id}

    def _store_labels(self, labels: list[str]) -> None:
        numbers = [parse_au_label(label) for label in labels]
        store = super().__setattr__  # avoids recursion of our own __setattr__
        store("aus", None if None in numbers else check_aus(numbers))
        store("id2label", dict(enumerate(labels)))
        store("label2id", {label: i for i, label in enumerate(labels)})

    def _carry_over(self, old_labels: list[str]) -> None:
        labels = self.au_labels
        if self.au_thresholds is not None:
            old_thresholds = dict(zip(old_labels, self.au_thresholds, strict=True))
            self.au_thresholds = [old_thresholds.get(label, 0.5) for label in labels]
        if self.au_occurrence_rates is not None:
            old_rates = dict(zip(old_labels, self.au_occurrence_rates, strict=True))
            if missing := [label for label in labels if label not in old_rates]:
                logger.warning(f"au_occurrence_rates dropped: none known for {', '.join(missing)}.")
            self.au_occurrence_rates = None if missing else [old_rates[label] for label in labels]

    def _check_per_label(self, name: str, values: list[float] | None) -> None:
        if values is None:
            return
        if len(values) != self.num_labels:
            raise ValueError(
                f"{name} has {len(values)} entries, but the model has {self.num_labels} outputs."
            )
        bounds_allowed = name == "au_thresholds"  # a rate of 0 or 1 would give weights of 0 or infinity
        if wrong := [x for x in values if not (0 < x < 1 or bounds_allowed and x in (0, 1))]:
            raise ValueError(f"{name} must lie between 0 and 1, got {wrong[0]}.")


class CompositeAUConfig(AUConfig):
    """Base class of the configurations of models that combine several networks.

    All networks share the ensemble's action units and occurrence rates, which by default are those of the
    networks' configurations. Thresholds belong to the ensemble. A subclass lists the networks in
    `sub_configs` and has a field for each: a configuration, a dictionary, or `None` for no such network.

    Raises:
        ValueError: Networks or ensemble name different action units.
    """

    def __post_init__(self, **kwargs):
        """Turn the networks' dictionaries into configurations, and share labels and rates."""
        named = {}
        for key, config_class in self.sub_configs.items():
            if (given := getattr(self, key)) is None:
                continue
            network = given if isinstance(given, AUConfig) else config_class(**given)
            setattr(self, key, network)
            if given is network or any(name in given for name in LABEL_FIELDS):
                named[key] = network.au_labels
        if "num_labels" not in kwargs and self.aus is self.id2label is self.label2id is None:
            self.id2label = next((dict(enumerate(labels)) for labels in named.values()), None)
        if self.au_occurrence_rates is None:
            rates = (network.au_occurrence_rates for network in self.networks.values())
            self.au_occurrence_rates = next((rate for rate in rates if rate is not None), None)
        super().__post_init__(**kwargs)
        for key, labels in named.items():
            if labels != self.au_labels:
                raise ValueError(
                    f"{key} names {labels}, the ensemble {self.au_labels}; "
                    "all networks must have the same action units in the same order."
                )
        self._share()

    @property
    def networks(self) -> dict[str, AUConfig]:
        """The networks' configurations by name: "lsc" for the field `lsc_config`."""
        given = {key.removesuffix("_config"): getattr(self, key) for key in self.sub_configs}
        return {name: config for name, config in given.items() if config is not None}

    @property
    def places(self) -> list[int] | None:
        """The action units of the whole, then others whose centres a network reads.

        Where the labels have no centres, only the latter.
        """
        read = [places for places in (self.aus, *(n.places for n in self.networks.values())) if places]
        places = dict.fromkeys(au for places in read if have_centers(places) for au in places)
        return list(places) or self.aus

    @property
    def processor_options(self) -> dict[str, Any]:
        """Options of the image processor that fits all networks."""
        first = next(iter(self.networks.values())).processor_options
        first.pop("au_definition", None)  # it may read no centres where others do
        return first | self.center_options

    def relabel(self, **names: Any) -> None:
        """Rename the outputs of the whole and of every network."""
        super().relabel(**names)
        self._share()

    def __setattr__(self, name: str, value: Any) -> None:
        is_complete = "_name_or_path" in self.__dict__
        if is_complete and name in self.sub_configs and isinstance(value, dict):
            value = self.sub_configs[name](**value)
        super().__setattr__(name, value)
        if is_complete and (name == "au_occurrence_rates" or name in self.sub_configs):
            self._share()

    def _share(self) -> None:
        for network in self.networks.values():
            network.relabel(id2label=self.id2label)
            network.au_occurrence_rates = self.au_occurrence_rates


def _resolve_labels(aus=None, id2label=None, label2id=None, num_labels: int | None = None) -> list[str]:
    """Return the labels in output order; BP4D's where nothing is given."""
    given: dict[str, list[str]] = {}
    if aus is not None:
        given["aus"] = [au_label(au) for au in check_aus(aus)]
    if id2label is not None:
        given["id2label"] = _in_order(id2label)
    if label2id is not None:
        if not isinstance(label2id, Mapping):
            raise ValueError(f"label2id must be a dict such as {{'AU1': 0, 'AU12': 1}}, got {label2id!r}.")
        given["label2id"] = _in_order({index: label for label, index in label2id.items()})
    if not given:
        return [au_label(au) for au in CORPUS_AUS["bp4d"]] if num_labels is None else _anonymous(num_labels)

    (name, labels), *others = given.items()
    for other_name, other_labels in others:
        if other_labels != labels:
            raise ValueError(
                f"{name} {labels} and {other_name} {other_labels} disagree; pass only one of them."
            )
    if num_labels not in (None, len(labels)):
        raise ValueError(
            f"num_labels={num_labels}, but {name} names {len(labels)} outputs; leave num_labels out."
        )
    return labels


def _in_order(id2label: Mapping[int | str, str]) -> list[str]:
    if not isinstance(id2label, Mapping):
        raise ValueError(f"id2label must be a dict such as {{0: 'AU1', 1: 'AU12'}}, got {id2label!r}.")
    by_index = {int(index): label for index, label in id2label.items()}
    labels = [by_index.get(i) for i in range(len(id2label))]
    if not labels or None in labels or len(set(labels)) < len(labels):
        raise ValueError(
            f"id2label must name the outputs 0, 1, ... with different labels, got {dict(id2label)}."
        )
    return labels  # type: ignore[return-value]


def _anonymous(num_labels: int) -> list[str]:
    if not isinstance(num_labels, int) or num_labels < 1:
        raise ValueError(
            f"num_labels={num_labels!r}: a model needs a number of outputs, at least one output."
        )
    return [f"LABEL_{i}" for i in range(num_labels)]


__all__ = ["AUConfig", "CompositeAUConfig"]
