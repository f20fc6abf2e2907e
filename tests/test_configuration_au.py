"""The labels of a configuration stay in step, whichever way they are named."""

import copy

import numpy as np
import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from transformers import AutoConfig, pipeline

from actionunits import Ac2dConfig, AUImageProcessor, GdaConfig, GdaForAUDetection, LscConfig
from actionunits.configuration_au import AUConfig

SHORT = {"aus": [1, 4, 12]}


def assert_in_step(config, labels):
    assert config.au_labels == labels
    assert config.id2label == dict(enumerate(labels))
    assert config.label2id == {label: i for i, label in enumerate(labels)}
    assert config.num_labels == len(labels)


@pytest.mark.parametrize(
    "names",
    [
        {"aus": [1, 12]},
        {"aus": (1, 12)},
        {"aus": np.array([1, 12])},
        {"id2label": {0: "AU1", 1: "AU12"}},
        {"id2label": {"1": "AU12", "0": "AU1"}},
        {"label2id": {"AU12": 1, "AU1": 0}},
        {
            "aus": [1, 12],
            "id2label": {0: "AU1", 1: "AU12"},
            "label2id": {"AU1": 0, "AU12": 1},
            "num_labels": 2,
        },
    ],
    ids=["list", "tuple", "array", "id2label", "json", "label2id", "all"],
)
@pytest.mark.parametrize("moment", ["init", "assignment", "from_pretrained"])
def test_any_name_names_the_outputs(names, moment, tmp_path):
    if moment == "init":
        config = AUConfig(**names)
    elif moment == "assignment":
        config = AUConfig()
        for name, value in names.items():
            setattr(config, name, value)
    else:
        AUConfig(aus=[25]).save_pretrained(tmp_path)
        config = AUConfig.from_pretrained(tmp_path, **names)
    assert_in_step(config, ["AU1", "AU12"])
    assert config.aus == [1, 12]
    assert all(type(au) is int for au in config.aus)


def test_defaults_are_bp4d():
    assert AUConfig().aus == [1, 2, 4, 6, 7, 10, 12, 14, 15, 17, 23, 24]


@pytest.mark.parametrize("names", [{"num_labels": 2}, {"id2label": {0: "LABEL_0", 1: "LABEL_1"}}])
def test_outputs_that_are_no_action_units(names, tmp_path):
    AUConfig(**names).save_pretrained(tmp_path)
    config = AUConfig.from_pretrained(tmp_path)
    assert_in_step(config, ["LABEL_0", "LABEL_1"])
    assert config.aus is None
    config.aus = [6]
    assert_in_step(config, ["AU6"])


def test_same_number_of_labels_changes_nothing():
    config = AUConfig(**SHORT)
    config.num_labels = 3
    assert_in_step(config, ["AU1", "AU4", "AU12"])
    config.num_labels = 2
    assert_in_step(config, ["LABEL_0", "LABEL_1"])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"aus": [1], "id2label": {0: "AU2"}}, r"aus \['AU1'\] and id2label \['AU2'\] disagree"),
        ({"aus": [1, 2], "id2label": {0: "AU2", 1: "AU1"}}, "disagree"),
        ({"aus": [1], "id2label": {0: "brow"}}, "disagree"),
        ({"id2label": {0: "AU1"}, "label2id": {"AU2": 0}}, "id2label .* and label2id .* disagree"),
        ({"aus": [1, 2], "num_labels": 3}, "num_labels=3, but aus names 2 outputs"),
        ({"aus": [3]}, "Unknown action unit 3"),
        ({"aus": []}, "aus is empty"),
        ({"aus": [1, 1]}, "1"),
        ({"aus": "AU1"}, "must be a list"),
        ({"id2label": {0: "AU1", 2: "AU2"}}, "must name the outputs 0, 1"),
        ({"id2label": {0: "AU1", 1: "AU1"}}, "different labels"),
        ({"id2label": {}}, "must name the outputs"),
        ({"num_labels": 0}, "at least one output"),
        ({"num_labels": "3"}, "num_labels='3': a model needs a number"),
        (
            {"id2label": ["AU1", "AU2"]},
            r"must be a dict such as \{0: 'AU1', 1: 'AU12'\}, got \['AU1', 'AU2'\]",
        ),
        ({"label2id": ["AU1", "AU2"]}, r"must be a dict such as \{'AU1': 0, 'AU12': 1\}"),
    ],
)
def test_names_that_make_no_sense(names, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        AUConfig(**names)
    AUConfig(**SHORT).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        AUConfig.from_pretrained(tmp_path, **names)


def test_failed_assignment_leaves_the_config_alone():
    config = AUConfig(**SHORT)
    with pytest.raises(ValueError, match="Unknown action unit 3"):
        config.aus = [3]
    assert_in_step(config, ["AU1", "AU4", "AU12"])


def test_file_whose_labels_disagree_is_refused(tmp_path):
    GdaConfig(**SHORT).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"AU12"', '"AU25"'))
    with pytest.raises(ValueError, match="disagree"):
        AutoConfig.from_pretrained(tmp_path)


def test_lists_follow_the_labels_by_name(tmp_path):
    AUConfig(**SHORT, au_thresholds=[0.1, 0.2, 0.3], au_occurrence_rates=[0.4, 0.5, 0.6]).save_pretrained(
        tmp_path
    )
    config = AUConfig.from_pretrained(tmp_path, aus=[12, 1])
    assert config.au_thresholds == [0.3, 0.1]
    assert config.au_occurrence_rates == [0.6, 0.4]


def test_new_labels_get_the_usual_threshold_and_no_rate(monkeypatch):
    warnings = []
    monkeypatch.setattr("actionunits.configuration_au.logger.warning", warnings.append)
    config = AUConfig(**SHORT, au_thresholds=[0.1, 0.2, 0.3], au_occurrence_rates=[0.4, 0.5, 0.6])
    config.aus = [12, 43]
    assert config.au_thresholds == [0.3, 0.5]
    assert config.au_occurrence_rates is None
    assert warnings == ["au_occurrence_rates dropped: none known for AU43."]


def test_lists_asked_for_with_new_labels(tmp_path):
    AUConfig(**SHORT, au_thresholds=[0.1, 0.2, 0.3]).save_pretrained(tmp_path)
    config = AUConfig.from_pretrained(
        tmp_path, aus=[5, 6], au_thresholds=[0.7, 0.8], au_occurrence_rates=[0.1, 0.2]
    )
    assert config.au_thresholds == [0.7, 0.8]
    assert config.au_occurrence_rates == [0.1, 0.2]


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("au_thresholds", [0.5], "au_thresholds has 1 entries, but the model has 3 outputs"),
        ("au_thresholds", [0.5, 0.5, 1.1], "au_thresholds must lie between 0 and 1, got 1.1"),
        ("au_occurrence_rates", [0.5, 0.5, 0], "au_occurrence_rates must lie between 0 and 1, got 0"),
        ("au_occurrence_rates", [0.1] * 4, "4 entries"),
    ],
)
def test_lists_that_make_no_sense(name, values, message):
    with pytest.raises(ValueError, match=message):
        AUConfig(**SHORT, **{name: values})
    config = AUConfig(**SHORT)
    with pytest.raises(ValueError, match=message):
        setattr(config, name, values)
    assert getattr(config, name) is None


def test_thresholds_may_be_zero_or_one():
    assert AUConfig(**SHORT, au_thresholds=[0, 0.5, 1]).au_thresholds == [0, 0.5, 1]


def test_types_are_checked():
    with pytest.raises(StrictDataclassFieldValidationError, match="au_thresholds"):
        AUConfig(**SHORT, au_thresholds="0.5")


def test_action_units_are_multi_label():
    assert AUConfig().problem_type == "multi_label_classification"
    with pytest.raises(Exception, match="single_label_classification"):
        AUConfig(problem_type="single_label_classification")


def test_copies_are_independent():
    config = AUConfig(**SHORT)
    other = copy.deepcopy(config)
    assert other == config
    other.aus = [9]
    assert_in_step(config, ["AU1", "AU4", "AU12"])
    assert_in_step(other, ["AU9"])


def test_unused_keywords_come_back(tmp_path):
    AUConfig(**SHORT).save_pretrained(tmp_path)
    config, unused = AUConfig.from_pretrained(tmp_path, aus=[6], foo=1, return_unused_kwargs=True)
    assert config.aus == [6]
    assert unused == {"foo": 1}


def test_action_units_without_a_place_have_no_centres(photo, landmarks):
    config = GdaConfig.compact(aus=[6, 46])
    processor = AUImageProcessor(**config.processor_options)
    assert processor.au_definition == "none"
    model = GdaForAUDetection(config)
    detect = pipeline("au-detection", model=model, image_processor=processor)
    (face,) = detect({"image": photo, "landmarks": landmarks})
    assert [unit["label"] for unit in face["action_units"]] == ["AU6", "AU46"]
    assert AUImageProcessor(**GdaConfig.compact(aus=[6, 45]).processor_options).aus == [6, 45]


@pytest.mark.parametrize("labels", [["keys"], ["weight"], ["training"], [""], ["a.b", "a_b"]])
def test_labels_that_cannot_name_layers_are_refused(labels):
    config = GdaConfig.compact(id2label=dict(enumerate(labels)))
    with pytest.raises(ValueError, match=f"The label {labels[0]!r} cannot name a layer"):
        GdaForAUDetection(config)


@pytest.mark.parametrize("config", [GdaConfig, LscConfig, Ac2dConfig])
@pytest.mark.parametrize("size", [0, -8])
def test_pictures_have_pixels(config, size):
    with pytest.raises(StrictDataclassClassValidationError, match=f"image_size={size}"):
        config.compact(image_size=size)
