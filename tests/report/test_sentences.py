"""A warning is given where the run shows its sign, and nowhere else."""

import dataclasses

import numpy as np
import pytest

from normdrop.report import layer_sentences, sentences
from normdrop.report.wording import duration, number, percent, probability
from normdrop.runs.options import Options, RecipeOptions
from normdrop.runs.read import DropoutLayer, NormLayer, read_run


@pytest.fixture(scope="module")
def run(finished_run):
    return read_run(finished_run)


def with_metrics(run, **columns):
    """The run with other curves; the best epoch is the last."""
    length = len(next(iter(columns.values())))
    metrics = {name: values[:length].copy() for name, values in run.metrics.items()}
    metrics |= {name: np.array(values, dtype=np.float64) for name, values in columns.items()}
    result = dict(run.result, best_epoch=length)
    return dataclasses.replace(run, metrics=metrics, result=result)


def norm_layer(gamma=(1.0, 1.0), alpha=(0.0, 0.0), mean=(0.0, 0.0), variance=(1.0, 1.0)):
    values = [np.array(v, dtype=np.float32) for v in (gamma, alpha, mean, variance)]
    return NormLayer("layer1.bn", len(gamma), *values)


@pytest.mark.parametrize(
    ("train", "val", "sign"),
    [
        ([3, 2, 1, 0.5, 0.4], [2, 1, 1.1, 1.2, 1.3], "risen for the last 3 epochs, from 1.00"),
        ([3, 2, 1, 0.5, 0.4], [2, 1, 1.3, 1.1, 1.25], "ends 25\u00a0% above its lowest"),
        ([1, 1.2, 1.1], [1, 1, 1], "has not fallen since the first epoch"),
        ([1, np.inf, 1], [1, 1, 1], "not finite in epoch 2"),
        ([3, 2, 1, 0.5, 0.4], [2, 1, 0.9, 0.8, 0.7], None),
        ([3, 2, 1, 1.5, 2], [2, 1, 1.1, 1.2, 1.3], None),
        ([3, 2], [1, 2], None),
        ([3], [1], None),
    ],
    ids=[
        "overfits", "ends-higher", "stuck", "infinite", "falls", "both-rise", "two-epochs", "one",
    ],
)  # fmt: skip
def test_describe_loss_warnings(run, train, val, sign):
    sentence = sentences.describe_loss(with_metrics(run, train_loss=train, val_loss=val))
    assert sentence.warning == (sign is not None)
    assert sign is None or sign in sentence.sign


def test_describe_loss_names_label_smoothing(run):
    smooth = dataclasses.replace(run, options=Options(recipe=RecipeOptions(label_smoothing=0.1)))
    assert "label smoothing (0.1)" in sentences.describe_loss(smooth).seen
    assert "smoothing" not in sentences.describe_loss(run).seen


@pytest.mark.parametrize(
    ("train", "val", "sign"),
    [
        ([0.5, 0.99], [0.5, 0.8], "19 points above"),
        ([0.5, 0.1], [0.1, 0.1], "is no better than always naming the most frequent class"),
        ([0.5, 0.1], [0.1, 0.11], "is hardly better than always naming the most frequent class"),
        ([0.5, 0.85], [0.6, 0.8], None),
    ],
    ids=["gap", "chance", "near-chance", "fine"],
)
def test_describe_accuracy_warnings(run, train, val, sign):
    sentence = sentences.describe_accuracy(
        with_metrics(run, train_accuracy=train, val_accuracy=val)
    )
    assert sentence.warning == (sign is not None)
    assert sign is None or sign in sentence.sign
    assert "in epoch 2, whose weights were kept" in sentence.seen


def with_samples(run, **samples):
    return dataclasses.replace(run, record=run.record | {"samples": samples})


def test_describe_accuracy_compares_with_the_same_split(run):
    """Nine tenths of the validation samples are of one class, in the test a tenth, or reversed."""
    run = with_metrics(run, train_accuracy=[0.7, 0.9], val_accuracy=[0.8, 0.9])
    even, skewed = [10] * 10, [91] + [1] * 9
    sentence = sentences.describe_accuracy(with_samples(run, train=even, val=skewed, test=even))
    assert sentence.warning
    assert percent(0.9) in sentence.sign
    assert percent(0.91) + " of the validation split" in sentence.sign
    sentence = sentences.describe_accuracy(with_samples(run, train=even, val=even, test=skewed))
    assert not sentence.warning


def test_describe_accuracy_of_a_run_that_did_not_count_its_splits(run):
    """The test's accuracy is compared with the test's classes, which result.json holds."""
    run = with_samples(with_metrics(run, train_accuracy=[0.1, 0.1], val_accuracy=[0.1, 0.1]))
    assert not sentences.describe_accuracy(run).warning
    rows = [dict(row, support=91 if k == 0 else 1) for k, row in enumerate(run.result["per_class"])]
    result = dict(run.result, accuracy=0.92, per_class=rows)
    sentence = sentences.describe_accuracy(dataclasses.replace(run, result=result))
    assert sentence.warning
    assert f"The test accuracy, {percent(0.92)}" in sentence.sign
    assert percent(0.91) + " of the test split" in sentence.sign


@pytest.mark.parametrize(
    ("kind", "left_out", "sign"),
    [
        ("image", {}, "images left out because they could not be read; there are none"),
        ("image", {"skipped": [["a.png", "damaged"]]}, "1 image was left out because it could"),
        ("image", {"skipped": [["a.png", "damaged"]] * 2}, "2 images were left out because they"),
        ("table", {}, "rows left out for missing values; there are none"),
        ("table", {"dropped": 1200}, "1,200 rows were left out for missing values"),
    ],
)
def test_describe_data_says_what_was_left_out(run, kind, left_out, sign):
    record = run.record | {"data": run.record["data"] | {"kind": kind}} | left_out
    sentence = sentences.describe_data(dataclasses.replace(run, record=record))
    assert "900 training, 100 validation and 360 test samples of 10 classes" in sentence.seen
    assert sign in sentence.sign
    assert sentence.warning == bool(left_out)
    assert sentences.describe_data(with_samples(run)) is None


@pytest.mark.parametrize(
    ("rate", "seen", "warning"),
    [
        ([0.05, 0.1, 0.0], "rises to 0.1 in epoch 2 and ends at 0.", False),
        ([0.1, 0.09, 0.08], "starts at 0.1 and ends at 0.08", True),
        ([0.1, 0.1, 0.1], "is 0.1 in every epoch", False),
        ([0.1], "is 0.1 in the only epoch", False),
        ([0.1, 0.2], "rises to 0.2 in epoch 2, the last one recorded", False),
    ],
    ids=["warm-up", "cut-off", "constant", "one", "rising"],
)
def test_describe_learning_rate_warnings(run, rate, seen, warning):
    sentence = sentences.describe_learning_rate(with_metrics(run, learning_rate=rate))
    assert seen in sentence.seen
    assert sentence.warning == warning


def test_describe_speed_names_slow_epochs_but_not_the_first(run):
    slow = sentences.describe_speed(with_metrics(run, images_per_second=[9, 100, 100, 40, 100]))
    assert slow.warning
    assert slow.sign.startswith("Epoch 4 ran")
    first = sentences.describe_speed(with_metrics(run, images_per_second=[9, 100, 100, 90, 100]))
    assert not first.warning


@pytest.mark.parametrize(
    ("cells", "sign"),
    [
        ({}, None),
        ({(0, 0): 0, (0, 1): 20}, "never names “0”"),
        ({(0, 0): 12, (0, 1): 8}, "takes 40\u00a0% of “0” for “1”"),
        ({(0, 0): 15, (0, 1): 5}, "takes 25\u00a0% of “0” for “1”"),
        ({(0, 0): 16, (0, 1): 4}, None),
        ({(0, 0): 2, (0, 1): 2}, None),
    ],
    ids=["diagonal", "never", "mixed", "a quarter", "a fifth", "few"],
)
def test_describe_confusion_warnings(run, cells, sign):
    confusion = 20 * np.eye(10, dtype=np.int64)
    for place, count in cells.items():
        confusion[place] = count
    sentence = sentences.describe_confusion(run, confusion)
    assert sentence.warning == (sign is not None)
    assert sign is None or sign in sentence.sign


@pytest.mark.parametrize(
    ("support", "recall", "warning"), [(10, 0.49, True), (10, 0.5, False), (9, 0.1, False)]
)
def test_describe_per_class_warns_of_classes_that_are_rarely_found(run, support, recall, warning):
    rows = [dict(row, support=20, recall=0.9) for row in run.result["per_class"]]
    rows[3] |= {"support": support, "recall": recall}
    sentence = sentences.describe_per_class(
        dataclasses.replace(run, result=dict(run.result, per_class=rows))
    )
    assert sentence.warning == warning
    assert ("fewer than half of the samples of “3”" in sentence.sign) == warning


def test_describe_reliability_says_to_which_side_it_errs(run):
    labels = np.zeros(100, dtype=np.int64)
    labels[:30] = 1
    for top, accuracy, side in ((0.95, 0.7, "too sure"), (0.55, 0.9, "less sure")):
        probabilities = np.tile([top, 1 - top], (100, 1))
        result = dict(run.result, accuracy=accuracy, calibration_error=abs(top - accuracy))
        changed = dataclasses.replace(
            run, probabilities=probabilities, labels=labels, result=result
        )
        sentence = sentences.describe_reliability(changed)
        assert sentence.warning
        assert side in sentence.sign
    calm = dataclasses.replace(run, result=dict(run.result, calibration_error=0.02))
    assert not sentences.describe_reliability(calm).warning


@pytest.mark.parametrize(
    ("part", "layer", "sign"),
    [
        (
            "gamma",
            norm_layer(gamma=(1, 5e-4)),
            "1 channel is dead (|γ| < 0.001): channel 1 of layer1",
        ),
        (
            "gamma",
            norm_layer(gamma=(0, -9e-4)),
            "2 channels are dead (|γ| < 0.001), the first being",
        ),
        ("gamma", norm_layer(gamma=(1, 2e-3)), None),
        ("gamma", norm_layer(gamma=(np.nan, 0)), "Channel 0 of layer1.bn is not finite"),
        ("alpha", norm_layer(alpha=(0, -4.1)), "1 channel has α below −4·|γ|"),
        ("alpha", norm_layer(alpha=(0, -3.9)), None),
        ("mean", norm_layer(mean=(0, 101)), "more than 100 standard deviations"),
        ("mean", norm_layer(mean=(0, 99)), None),
        ("variance", norm_layer(variance=(1, 0)), "hardly varies"),
        ("variance", norm_layer(variance=(1, 1e-6)), None),
        ("variance", norm_layer(variance=(1, np.inf)), "Channel 1 of layer1.bn is not finite"),
    ],
)
def test_describe_norm_warnings(part, layer, sign):
    sentence = layer_sentences.describe_norm((layer,), part)
    assert sentence.warning == (sign is not None)
    assert sign is None or sign in sentence.sign


def test_describe_norm_without_affine_parameters_or_statistics():
    bare = NormLayer("bn", 2, None, None, np.zeros(2), np.ones(2))
    assert "nothing to see" in layer_sentences.describe_norm((bare,), "gamma").sign
    assert not layer_sentences.describe_norm((bare,), "mean").warning


def test_describe_dropout_warns_of_a_keep_that_is_too_low(run):
    layers = (DropoutLayer("drop", "Dropout", 0.5), DropoutLayer("idle", "Dropout", 1.0))
    curves = {"train_accuracy": [0.2, 0.3, 0.6], "val_accuracy": [0.5, 0.6, 0.8]}
    low = dataclasses.replace(with_metrics(run, **curves), dropout_layers=layers)
    sentence = layer_sentences.describe_dropout(low)
    assert "1 layer kept each value with probability 0.5" in sentence.seen
    assert sentence.warning
    assert "20 points above" in sentence.sign
    curves["train_accuracy"][-1] = 0.75
    fine = dataclasses.replace(with_metrics(run, **curves), dropout_layers=layers)
    assert not layer_sentences.describe_dropout(fine).warning
    assert "cannot tell" not in layer_sentences.describe_dropout(fine).sign
    early = with_metrics(run, train_accuracy=[0.2, 0.5], val_accuracy=[0.5, 0.8])
    early = dataclasses.replace(early, dropout_layers=layers)
    assert not layer_sentences.describe_dropout(early).warning
    assert "fewer than three epochs cannot tell" in layer_sentences.describe_dropout(early).sign
    none = dataclasses.replace(run, dropout_layers=layers[1:])
    assert "No value was dropped" in layer_sentences.describe_dropout(none).seen


def test_describe_mistakes_counts_the_confident_ones(run):
    probabilities = np.array([[0.995, 0.005], [0.6, 0.4], [0.2, 0.8]])
    labels = np.array([1, 1, 1])
    changed = dataclasses.replace(
        run, probabilities=probabilities, labels=labels, mistakes=np.array([0, 1])
    )
    sentence = sentences.describe_mistakes(changed)
    assert sentence.seen.startswith("2 test samples of")
    assert "all are shown" in sentence.seen
    assert sentence.sign.startswith("In 1 mistake")
    right = dataclasses.replace(changed, labels=np.array([0, 0, 1]), mistakes=labels[:0])
    assert "classified right" in sentences.describe_mistakes(right).seen


def test_wording_of_numbers():
    assert [number(v) for v in (0.0999999, 999.9, 99950.0, float("nan"), -np.inf)] == [
        "0.100", "1,000", "100,000", "not a number", "−∞",
    ]  # fmt: skip
    assert percent(0.0) == "0\u00a0%"
    assert percent(1e-9) == "<\u00a00.1\u00a0%"
    assert probability(1.0) == "1.000"
    assert duration(59.7) == "1 min 0 s"
    assert duration(float("nan")) == "an unknown time"
