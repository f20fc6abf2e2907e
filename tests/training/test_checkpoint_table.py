"""The README's table of checkpoints: its sizes and scores are those of the files in the package."""

import json

import pytest
from tiny_run import ROOT, load_script
from transformers import AutoConfig, AutoModel

from actionunits import checkpoints

README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def script():
    return load_script("checkpoint_table")


@pytest.fixture(scope="module")
def rows(script):
    return [script.read_row(name) for name in checkpoints.names()]


def without_times(table):
    lines = [line.split(" | ") for line in table.strip().splitlines()]
    return [cells[:4] + cells[5:] for cells in lines]


def test_readme_has_the_table_of_the_files(script, rows):
    table = script.make_table(rows, dict.fromkeys(checkpoints.names(), 1.0))
    written = README.partition(script.BEGIN)[2].partition(script.END)[0]
    assert without_times(written) == without_times(table)


def test_scores_are_those_measured_on_test_people(rows):
    for row in rows:
        metrics = json.loads((checkpoints.path(row.name) / "metrics.json").read_text())
        mean = metrics["test"]["calibrated"]["mean"]
        shown = row.cells(1.0)
        assert [shown[i] for i in (5, 6, 7)] == [f"{mean[k]:.2f}" for k in ("f1", "auc", "correlation")]
        assert f"{metrics['test']['people']} people who were not in training" in " ".join(README.split())


def test_times_are_ratios_to_the_first(script, rows):
    times = script.measure_times([rows[0].name, rows[0].name, rows[-1].name], rounds=2)
    assert times[rows[0].name] == 1.0 and times[rows[-1].name] > 0
    assert rows[0].cells(0.123)[4] == "0.12"


def test_the_papers_sizes_are_named(script):
    gda = AutoModel.from_config(AutoConfig.for_model("au-gda", stage_depths=[1, 1, 1], aus=[1, 2]))
    assert script.paper_size(gda) == "4.1 M parameters, 112 px there"


def test_what_else_is_otherwise_is_named(script):
    assert script.deviations({"model_type": "au-gda"}) == []
    assert script.deviations({"model_type": "au-gda", "backbones": {}}) == ["not pretrained on faces"]
    assert script.deviations({"model_type": "au-gda", "backbones": {"gda": {"name": "a/b"}}}) == []
    assert script.deviations({"model_type": "au-gtlenet"}) == ["encoder not pretrained"]
    run = {"model_type": "au-gtlenet", "encoder": {"triplets": "synthetic corpus"}}
    assert script.deviations(run) == ["encoder pretrained on the synthetic corpus"]
    assert len(script.deviations({"model_type": "au-lac"})) == 1
