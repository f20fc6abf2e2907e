"""Metrics against scikit-learn and NumPy as independent oracles, and against hand-counted tables."""

import doctest
import json
import pickle
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from transformers import Trainer, TrainingArguments

from actionunits import metrics
from actionunits.metrics import UNKNOWN
from tiny_models import TINY_MODELS


@pytest.fixture
def predictions():
    """Scores with ties, labels at five base rates, one AU that never occurs; (400, 6) each."""
    rng = np.random.default_rng(0)
    labels = (rng.random((400, 6)) < [0.05, 0.2, 0.5, 0.8, 0.95, 0.0]).astype(int)
    scores = np.round(np.clip(0.3 * labels + rng.normal(0.4, 0.25, labels.shape), 0, 1), 2)
    return scores, labels


@pytest.mark.parametrize(
    ("figure", "oracle"),
    [
        (metrics.f1_frame, lambda y, s: sk.f1_score(y, s >= 0.5, zero_division=0)),
        (metrics.accuracy, lambda y, s: sk.accuracy_score(y, s >= 0.5)),
        (metrics.mcc, lambda y, s: sk.matthews_corrcoef(y, s >= 0.5)),
        (metrics.false_alarm_rate, lambda y, s: 1 - sk.recall_score(y, s >= 0.5, pos_label=0)),
        (metrics.base_rate, lambda y, s: y.mean()),
    ],
)
def test_figures_equal_scikit_learn(predictions, figure, oracle):
    scores, labels = predictions
    got = figure(labels) if figure is metrics.base_rate else figure(scores, labels)
    expected = [oracle(labels[:, i], scores[:, i]) for i in range(6)]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)


def test_mean_f1_is_that_of_the_papers(predictions):
    """They average scikit-learn's F1 of each AU; to the last bit, for their tables are compared with it."""
    scores, labels = predictions
    expected = [sk.f1_score(labels[:, i], scores[:, i] >= 0.5, zero_division=0) for i in range(6)]
    assert metrics.f1_frame(scores, labels).tolist() == expected
    macro = sk.f1_score(labels, scores >= 0.5, average="macro", zero_division=0)
    assert metrics.f1_frame(scores, labels).mean() == pytest.approx(macro, abs=1e-15)


@pytest.mark.parametrize(
    ("figure", "oracle"),
    [
        (metrics.balanced_accuracy, lambda y, s: sk.balanced_accuracy_score(y, s >= 0.5)),
        (metrics.roc_auc, sk.roc_auc_score),
        (metrics.average_precision, sk.average_precision_score),
    ],
)
def test_figures_that_need_both_classes(predictions, figure, oracle):
    scores, labels = predictions
    got = figure(scores, labels)
    np.testing.assert_allclose(got[:5], [oracle(labels[:, i], scores[:, i]) for i in range(5)], atol=1e-12)
    assert np.isnan(got[5])


def test_thresholds_are_per_au_and_reached_by_equality():
    scores = [[0.3, 0.3], [0.2, 0.2]]
    count = metrics.confusion(scores, [[1, 1], [0, 0]], thresholds=[0.3, 0.2])
    assert [cell.tolist() for cell in count] == [[1, 1], [0, 1], [0, 0], [1, 0]]
    by_default = metrics.confusion([[0.49], [0.5], [0.6]], [[1], [1], [0]])
    assert [cell.tolist() for cell in by_default] == [[1], [1], [1], [0]]


@pytest.mark.parametrize("figure", [*metrics.DECISION_FIGURES.values(), *metrics.RANKING_FIGURES.values()])
def test_unknown_labels_are_left_out_per_au(predictions, figure):
    scores, labels = predictions
    labels = labels.copy()
    labels[::3, 1] = UNKNOWN
    labels[1::4, 2] = UNKNOWN
    for i, known in enumerate((labels != UNKNOWN).T):
        np.testing.assert_allclose(
            figure(scores, labels)[i], figure(scores[known, i : i + 1], labels[known, i : i + 1])[0]
        )


@pytest.mark.parametrize("figure", metrics.DECISION_FIGURES.values())
def test_action_units_without_a_known_label_have_no_figure(predictions, figure):
    scores, labels = predictions
    labels[:, 0] = UNKNOWN
    assert np.isnan(figure(scores, labels)[:2]).tolist() == [True, False]


def test_correlation_equals_numpy_and_skips_unknown():
    rng = np.random.default_rng(1)
    truth, noise = rng.random((50, 3)), rng.random((50, 3))
    expected = [np.corrcoef(truth[:, i] + noise[:, i], truth[:, i])[0, 1] for i in range(3)]
    np.testing.assert_allclose(metrics.correlation(truth + noise, truth), expected, atol=1e-12)
    holes = truth.copy()
    holes[:10, 0], holes[:10, 1] = np.nan, UNKNOWN
    np.testing.assert_allclose(
        metrics.correlation(truth + noise, holes)[:2],
        metrics.correlation((truth + noise)[10:], truth[10:])[:2],
    )


@pytest.mark.parametrize("count", [1, 3, 6, 7, 10, 49, 1000])
@pytest.mark.parametrize("value", [0.0, 0.1, 0.3, 0.7])
def test_constants_have_no_correlation(count, value):
    """Nor if their mean is rounded, so that all seem to lie on one side of it."""
    constant, varying = np.full((count, 1), value), np.linspace(0, 1, count)[:, None]
    for scores, truth in ((constant, varying), (varying, constant), (constant, np.full((count, 1), 0.1))):
        assert np.isnan(metrics.correlation(scores, truth)).all()
    assert np.isnan(metrics.icc(constant, constant)).all()
    assert np.isnan(metrics.icc(constant, np.full((count, 1), 0.9))).all()
    if count > 1:
        np.testing.assert_allclose(metrics.icc(constant, varying), 0, atol=1e-12)


def test_icc_of_two_judges_is_twice_the_covariance_over_the_variances():
    """What Shrout and Fleiss' mean squares come to for two judges; a scale costs, an offset does not."""
    rng = np.random.default_rng(3)
    truth = rng.integers(0, 6, (40, 2)) / 5
    scores = np.clip(truth + rng.normal(0, 0.2, truth.shape), 0, 1)
    for i, value in enumerate(metrics.icc(scores, truth)):
        (x, xy), (_, y) = np.cov(scores[:, i], truth[:, i])
        assert value == pytest.approx(2 * xy / (x + y), abs=1e-12)
    np.testing.assert_allclose(metrics.icc(truth + 0.3, truth), 1)
    np.testing.assert_allclose(metrics.icc(2 * truth, truth), 2 * 2 / (4 + 1))
    np.testing.assert_allclose(metrics.icc(1 - truth, truth), -1)


def test_calibration_error_is_the_mean_gap_of_the_intervals(predictions):
    scores, labels = predictions
    for i, value in enumerate(metrics.calibration_error(scores, labels, bins=10)):
        expected = 0.0
        for low in range(10):
            inside = (scores[:, i] * 10 >= low) & ((scores[:, i] * 10 < low + 1) | (low == 9))
            if inside.any():
                gap = scores[inside, i].mean() - labels[inside, i].mean()
                expected += abs(gap) * inside.sum() / len(scores)
        assert value == pytest.approx(expected, abs=1e-12)
    # Scores of 0.25 and 1 that come true as often as they say, and the same that never do.
    honest = [[0.25]] * 4 + [[1.0]] * 2
    assert metrics.calibration_error(honest, [[1], [0], [0], [0], [1], [1]]) == 0
    assert metrics.calibration_error(honest, [[0]] * 6) == pytest.approx((4 * 0.25 + 2) / 6)
    assert np.isnan(metrics.calibration_error([[3.2]], [[1]])).all()


def test_an_au_that_nobody_coded_has_no_figures():
    scores, labels = np.array([[0.9, 0.9], [0.1, 0.9]]), np.array([[1, UNKNOWN], [0, UNKNOWN]])
    report = metrics.au_report([1, 2], scores, labels, subjects=["a", "b"])
    figures = {name: value for name, value in report["per_au"]["AU2"].items() if name != "threshold"}
    assert figures.pop("f1_interval") == [None, None]
    assert set(figures.values()) <= {None, 0.0} and figures["f1"] is None
    assert report["mean"]["f1"] == 1  # of AU1 alone
    assert report["mean"]["f1_interval"] == [0, 1]  # drawing b twice leaves nothing to find
    compute = metrics.trainer_metrics([1, 2])
    assert compute(SimpleNamespace(predictions=scores, label_ids=labels)) == {
        "f1": pytest.approx(2 / 3),  # both logits are above 0
        "auc": 1.0,
        "f1_AU1": pytest.approx(2 / 3),
    }


def test_calibrated_thresholds_are_the_best_of_a_brute_force_search(predictions):
    scores, labels = predictions
    best = metrics.f1_frame(scores, labels, metrics.calibrate_thresholds(scores, labels))
    for threshold in np.arange(-0.005, 1.01, 0.01):
        assert (metrics.f1_frame(scores, labels, threshold) <= best + 1e-12).all()


def test_calibration_keeps_false_alarms_below_the_bound(predictions):
    scores, labels = predictions
    thresholds = metrics.calibrate_thresholds(scores, labels, max_false_alarms=0.1)
    alarms = metrics.false_alarm_rate(scores, labels, thresholds)
    assert (alarms[:5] <= 0.1).all()
    allowed = [
        t for t in np.arange(0.005, 1, 0.01) if (metrics.false_alarm_rate(scores, labels, t)[3] <= 0.1)
    ]
    reachable = max(metrics.f1_frame(scores, labels, t)[3] for t in allowed)
    assert metrics.f1_frame(scores, labels, thresholds)[3] == pytest.approx(reachable)
    assert thresholds[5] == 0.5  # never occurs


def test_calibration_puts_the_threshold_in_the_middle_of_the_gap():
    assert metrics.calibrate_thresholds([[0.9], [0.7], [0.3], [0.1]], [[1], [1], [0], [0]]) == [0.5]
    assert metrics.calibrate_thresholds([[0.9], [0.7], [0.8]], [[UNKNOWN], [1], [0]]) == [0.35]


def test_calibration_of_a_constant_score_reports_nothing_when_alarms_are_bounded():
    (threshold,) = metrics.calibrate_thresholds(
        np.full((4, 1), 0.4), [[1], [0], [0], [0]], max_false_alarms=0.1
    )
    assert 0.4 < threshold < 1


def test_calibration_reports_nothing_rather_than_false_alarms_alone():
    scores = np.array([[0.9], [0.85], [0.8], [0.5], *[[0.1]] * 17])
    labels = np.array([[0], [0], [0], [1], *[[0]] * 17])
    (threshold,) = metrics.calibrate_thresholds(scores, labels, max_false_alarms=0.1)  # two of 20
    assert 0.9 < threshold <= 1
    (threshold,) = metrics.calibrate_thresholds(scores, labels, max_false_alarms=0.15)
    assert 0.1 < threshold < 0.5


def test_interval_over_people():
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 2, (600, 2))
    scores = np.where(rng.random((600, 2)) < 0.8, labels, 1 - labels).astype(float)
    people = np.repeat(np.arange(30), 20).astype(str)
    low, high = metrics.f1_interval(scores, labels, people)
    f1 = metrics.f1_frame(scores, labels)
    expected = np.append(f1, f1.mean())
    assert ((low < expected) & (expected < high) & (high - low < 0.15)).all()
    # Were every picture the same person, nothing could vary.
    low, high = metrics.f1_interval(scores, labels, ["one"] * 600)
    np.testing.assert_allclose([low, high], [expected, expected])


def test_interval_weighs_people_by_their_draws():
    # Two people, one always right and one always wrong: a resample has F1 0, 2/3 or 1 on these labels.
    scores, labels = np.array([[1.0], [0.0], [0.0], [1.0]]), np.array([[1], [0], [1], [0]])
    low, high = metrics.f1_interval(scores, labels, ["right", "right", "wrong", "wrong"])
    assert (low[0], high[0]) == (0.0, 1.0)
    low, high = metrics.f1_interval(scores, labels, ["right", "right", "wrong", "wrong"], level=0.01)
    assert low[0] == high[0] == pytest.approx(0.5)  # both once: TP 1, FP 1, FN 1


def test_report_is_json_and_holds_the_figures(predictions):
    scores, labels = predictions
    people = [str(i // 40) for i in range(400)]
    aus = [1, 2, 4, 6, 12, 26]
    report = metrics.au_report(aus, scores, labels, labels * 0.7, thresholds=0.4, subjects=people)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert (report["pictures"], report["people"]) == (400, 10)
    f1 = metrics.f1_frame(scores, labels, 0.4)
    assert [row["f1"] for row in report["per_au"].values()] == f1.tolist()
    assert report["mean"]["f1"] == pytest.approx(f1.mean())
    assert report["per_au"]["AU26"]["auc"] is None
    assert report["mean"]["auc"] == pytest.approx(np.nanmean(metrics.roc_auc(scores, labels)))
    low, high = report["mean"]["f1_interval"]
    assert low < f1.mean() < high


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.f1_frame([[0.5]], [[9]]), "not 9"),
        (lambda: metrics.f1_frame([[0.5, 0.5]], [[1]]), r"\(1, 2\) and labels \(1, 1\)"),
        (lambda: metrics.f1_frame([0.5], [1]), r"got shape \(1,\)"),
        (lambda: metrics.f1_frame([[np.nan]], [[1]]), "1 pictures have a nan"),
        (lambda: metrics.correlation([[0.5]], [[1, 2]]), "both be"),
        (
            lambda: metrics.calibrate_thresholds([[0.5]], [[1]], max_false_alarms=1.5),
            "max_false_alarms=1.5 must",
        ),
        (lambda: metrics.f1_interval([[0.5]], [[1]], ["a", "b"]), "2 subjects"),
        (lambda: metrics.au_report([1, 2], [[0.5]], [[1]]), "2 AUs"),
        (lambda: metrics.f1_frame([[0.5, 0.5]], [[1, 0]], [0.5] * 3), r"each of 2 AUs, not \(3,\)"),
        (lambda: metrics.f1_frame([[0.5], [0.5]], [[1], [0]], [[0.1], [0.9]]), r"not \(2, 1\)"),
        (
            lambda: metrics.trainer_metrics([6, 12, 25])(
                SimpleNamespace(predictions=np.zeros((1, 2)), label_ids=np.ones((1, 2)))
            ),
            "names 3 AUs, but the model has 2 outputs",
        ),
    ],
)
def test_bad_input_is_refused_with_the_value_seen(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_report_of_no_pictures_has_no_figures():
    report = metrics.au_report([6, 12], np.zeros((0, 2)), np.zeros((0, 2)), subjects=[])
    assert (report["pictures"], report["people"]) == (0, 0)
    assert report["mean"]["f1"] is None and report["mean"]["f1_interval"] == [None, None]


def test_trainer_metrics_read_logits_and_tuples():
    logits, labels = np.array([[4.0, -4.0], [-4.0, 4.0]]), np.array([[1, 0], [0, UNKNOWN]])
    compute = metrics.trainer_metrics([6, 12])
    expected = {"f1": 0.5, "auc": 1.0, "f1_AU6": 1.0, "f1_AU12": 0.0}
    assert compute(SimpleNamespace(predictions=logits, label_ids=labels)) == expected
    assert compute(SimpleNamespace(predictions=(logits, None), label_ids=labels)) == expected
    clip = SimpleNamespace(predictions=logits[None], label_ids=labels[None])  # (clips, frames, AUs)
    assert compute(clip) == expected


@pytest.mark.parametrize(
    "options", [{}, {"eval_do_concat_batches": False}, {"batch_eval_metrics": True}], ids=str
)
def test_trainer_metrics_of_videos_of_different_lengths(tmp_path, options):
    """Each video is a batch; the Trainer fills up the shorter ones, or hands over batches, or each alone."""
    torch.manual_seed(0)
    model = TINY_MODELS["lac"]()
    faces = [
        {"pixel_values": torch.randn(n, 3, 64, 64), "au_centers": torch.full((n, 12, 2, 2), 32.0)}
        for n in (3, 5, 2)
    ]
    for video in faces:
        video["labels"] = torch.randint(UNKNOWN, 2, (len(video["pixel_values"]), 12))
    arguments = TrainingArguments(
        str(tmp_path), per_device_eval_batch_size=1, bf16_full_eval=True, use_cpu=True, **options
    )
    compute = metrics.trainer_metrics(model.config.aus)
    trainer = Trainer(model, arguments, eval_dataset=faces, compute_metrics=compute)
    figures = trainer.evaluate()
    assert trainer.evaluate()["eval_f1"] == figures["eval_f1"]  # nothing is left of the first time
    with torch.no_grad():
        logits = torch.cat([model.eval()(video["pixel_values"][None]).logits[0] for video in faces])
    labels = torch.cat([video["labels"] for video in faces])
    for i, au in enumerate(model.config.aus):
        known = labels[:, i] != UNKNOWN
        expected = sk.f1_score(labels[known, i], logits[known, i] >= 0, zero_division=0)
        assert figures[f"eval_f1_AU{au}"] == pytest.approx(expected)


def test_trainer_metrics_without_labels_are_no_figures():
    nothing = SimpleNamespace(predictions=np.zeros((2, 2)), label_ids=np.full((2, 2), UNKNOWN))
    figures = metrics.trainer_metrics([6, 12])(nothing)
    assert set(figures) == {"f1", "auc"} and all(np.isnan(value) for value in figures.values())


def test_evaluate_metric_agrees_over_batches(predictions):
    pytest.importorskip("evaluate")
    scores, labels = predictions
    metric = metrics.AUF1(keep_in_memory=True)
    for rows in np.array_split(np.arange(400), 3):
        metric.add_batch(predictions=scores[rows], references=labels[rows])
    result = metric.compute(thresholds=0.455)
    np.testing.assert_allclose(result["f1_per_au"], metrics.f1_frame(scores, labels, 0.455))
    assert result["f1"] == pytest.approx(np.mean(result["f1_per_au"]))
    report = metrics.au_report([1, 2, 4, 6, 12, 26], np.float32(scores), labels, None, 0.455)
    for name, value in report["mean"].items():
        if name != "threshold":
            assert result[name] == pytest.approx(value, abs=1e-6)
            assert result[f"{name}_per_au"] == pytest.approx([r[name] for r in report["per_au"].values()])


def test_evaluate_metric_finds_what_just_reaches_its_threshold():
    """Of 0.7 float32 has 0.69999999."""
    pytest.importorskip("evaluate")
    scores, labels = [[0.7], [0.7], [0.2]], [[1], [0], [1]]
    result = metrics.AUF1(keep_in_memory=True).compute(predictions=scores, references=labels, thresholds=0.7)
    assert result["f1_per_au"] == [0.5]  # one hit, one false alarm, one miss


def test_evaluate_metric_runs_its_example_and_travels_to_other_processes(tmp_path):
    pytest.importorskip("evaluate")
    tests = doctest.DocTestFinder().find(metrics.AUF1, "AUF1", globs={"AUF1": metrics.AUF1})
    results = [doctest.DocTestRunner().run(test) for test in tests if test.examples]
    assert sum(r.attempted for r in results) > 1 and not any(r.failed for r in results)
    (tmp_path / "metric").write_bytes(pickle.dumps(metrics.AUF1(keep_in_memory=True)))
    code = (
        "import pickle; metric = pickle.load(open('metric', 'rb'))\n"
        "print(metric.compute(predictions=[[0.9], [0.6]], references=[[1], [0]])['f1'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    assert float(done.stdout) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    "as_given",
    [
        np.ndarray.tolist,
        np.asarray,
        torch.tensor,
        lambda a: pytest.importorskip("pandas").Series(a.tolist()),
        lambda a: [torch.tensor(row) for row in a],
    ],
    ids=["lists", "arrays", "tensors", "series", "list of tensors"],
)
def test_evaluate_metric_takes_whatever_holds_rows(predictions, as_given):
    pytest.importorskip("evaluate")
    scores, labels = predictions
    metric = metrics.AUF1(keep_in_memory=True)
    metric.add(prediction=as_given(scores)[0], reference=labels[0])
    metric.add_batch(predictions=as_given(scores[1:]), references=as_given(labels[1:]))
    np.testing.assert_allclose(metric.compute()["f1_per_au"], metrics.f1_frame(scores, labels))


def test_evaluate_metric_does_not_round_soft_labels():
    pytest.importorskip("evaluate")
    with pytest.raises(ValueError, match="labels are 0, 1 or -1"):
        metrics.AUF1(keep_in_memory=True).compute(predictions=[[0.5]], references=[[0.75]])


def test_module_needs_neither_evaluate_nor_datasets():
    code = (
        "import sys; sys.modules['evaluate'] = sys.modules['datasets'] = None\n"
        "from actionunits.metrics import f1_frame; assert f1_frame([[1.0]], [[1]]) == 1"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
