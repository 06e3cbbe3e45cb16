"""The figures of a test, against the definitions written out."""

import math

import pytest
import torch

from normdrop import nn
from normdrop.training.measure import (
    count_parameters,
    machine,
    measure,
    predict_batches,
)


@pytest.fixture
def answers():
    generator = torch.Generator().manual_seed(3)
    probabilities = torch.randn(500, 4, generator=generator).mul(2).softmax(1)
    labels = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
    return probabilities, labels


def test_figures_against_their_definitions(answers):
    probabilities, labels = answers
    result = measure(probabilities, labels, "abcd")
    guess = [max(range(4), key=row.__getitem__) for row in probabilities.tolist()]
    truth = labels.tolist()
    assert result["count"] == 500
    assert result["accuracy"] == sum(a == b for a, b in zip(guess, truth, strict=True)) / 500
    assert result["loss"] == pytest.approx(
        -sum(math.log(row[t]) for row, t in zip(probabilities.tolist(), truth, strict=True)) / 500
    )
    for t in range(4):
        for g in range(4):
            pairs = sum(a == g and b == t for a, b in zip(guess, truth, strict=True))
            assert result["confusion"][t][g] == pairs
    for place, row in enumerate(result["per_class"]):
        hits = result["confusion"][place][place]
        assert row["class"] == "abcd"[place]
        assert row["support"] == truth.count(place)
        assert row["recall"] == pytest.approx(hits / truth.count(place))
        assert row["precision"] == pytest.approx(hits / guess.count(place))


def test_calibration_error_against_its_definition(answers):
    probabilities, labels = answers
    result = measure(probabilities, labels, "abcd")
    bins = {}
    for row, truth in zip(probabilities.double().tolist(), labels.tolist(), strict=True):
        confidence = max(row)
        place = next(b for b in range(15) if confidence <= (b + 1) / 15)
        bins.setdefault(place, []).append((confidence, row.index(confidence) == truth))
    error = sum(
        abs(sum(c for c, _ in pairs) - sum(right for _, right in pairs)) / 500
        for pairs in bins.values()
    )
    assert result["calibration_error"] == pytest.approx(error)
    assert result["reliability"]["count"] == [len(bins.get(b, [])) for b in range(15)]
    assert len(result["reliability"]["edges"]) == 16


def test_certain_and_right_has_no_calibration_error():
    result = measure(torch.eye(3), torch.arange(3), "abc")
    assert result["calibration_error"] == 0
    assert result["reliability"]["count"][-1] == 3


def test_a_class_that_never_comes_up_counts_as_zero():
    result = measure(torch.eye(3)[:2], torch.tensor([0, 1]), "abc")
    assert result["per_class"][2] == {
        "class": "c", "precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0,
    }  # fmt: skip


def test_the_loss_of_a_sure_mistake_is_its_own_but_finite():
    given = torch.tensor([[1 - 1e-9, 1e-9]], dtype=torch.float64)
    assert measure(given, torch.tensor([1]), "ab")["loss"] == pytest.approx(-math.log(1e-9))
    assert measure(given.round(), torch.tensor([1]), "ab")["loss"] == pytest.approx(
        -math.log(1e-12)
    )


@pytest.mark.parametrize(("confidence", "place"), [(0.6, 8), (0.8, 11), (0.8001, 12), (1.0, 14)])
def test_a_bin_of_calibration_holds_its_upper_edge(confidence, place):
    given = torch.tensor([[confidence, 1 - confidence]], dtype=torch.float64)
    reliability = measure(given, torch.tensor([0]), "ab")["reliability"]
    assert reliability["count"] == [int(n == place) for n in range(15)]
    assert reliability["edges"][place] < confidence <= reliability["edges"][place + 1]
    assert reliability["confidence"][place] == confidence
    assert reliability["accuracy"][place] == 1


@pytest.mark.parametrize(
    ("right", "count"), [(0, 10), (10, 10), (7, 10), (359, 360), (9490, 10000)]
)
def test_the_interval_of_the_accuracy_solves_wilsons_equation(right, count):
    # Its ends are the shares p with |p̂ − p| = z·sqrt(p(1 − p)/n).
    z = 1.959963984540054
    labels = (torch.arange(count) >= right).long()
    result = measure(torch.tensor([[1.0, 0.0]]).expand(count, 2), labels, "ab")
    assert result["accuracy"] == right / count
    for end in result["accuracy_interval"]:
        share = right / count
        assert abs(share - end) == pytest.approx(z * math.sqrt(end * (1 - end) / count), abs=1e-7)
        assert 0 <= end <= 1


def test_parameters_of_the_network_and_of_its_norms():
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.BatchNorm2d(64, affine=False)
    )
    assert count_parameters(network) == {
        "theta": 64 * 27 + 64, "gamma_alpha": 128, "norm_nodes": 128,
    }  # fmt: skip


def test_predictions_are_made_in_evaluation_mode():
    network = torch.nn.Sequential(nn.Dropout(keep=0.1), torch.nn.Linear(3, 2)).double()
    x = torch.randn(5, 3)
    probabilities, labels = predict_batches(network, [(x, torch.zeros(5, dtype=torch.int64))] * 2)
    assert torch.equal(probabilities[:5], probabilities[5:])
    assert labels.shape == (10,)
    assert probabilities.dtype == torch.float32


def test_flip_averages_over_each_image_and_its_mirror():
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    x = torch.randn(5, 1, 3, 4)
    labels = torch.zeros(5, dtype=torch.int64)
    averaged, _ = predict_batches(network, [(x, labels)], flip=True)
    mirrored = x[..., [3, 2, 1, 0]]
    expected = (network(x).softmax(1) + network(mirrored).softmax(1)) / 2
    torch.testing.assert_close(averaged, expected)
    assert not torch.allclose(averaged, network(x).softmax(1), atol=1e-3)


def test_the_machine_is_named():
    assert {"processor", "threads", "torch", "normdrop", "kernels"} == set(machine())
