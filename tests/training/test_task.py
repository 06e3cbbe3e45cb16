"""The schedule, the groups of the optimizer, the seeds and the average."""

import math

import pytest
import torch

from normdrop import nn
from normdrop.runs.options import RecipeOptions
from normdrop.training.task import Task, learning_rate, step_seed


def recipe(**changes):
    values = {
        "epochs": 2, "batch_size": 8, "learning_rate": 0.1, "warmup": 0.1, "momentum": 0.9,
        "weight_decay": 1e-3, "label_smoothing": 0.1, "average": 0.0, "channels_last": False,
    }  # fmt: skip
    return RecipeOptions(**{**values, **changes})


def network():
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), torch.nn.Flatten(), torch.nn.Linear(12, 2)
    )


def test_the_learning_rate_rises_and_falls():
    rates = [learning_rate(step / 1000, 0.4, 0.25) for step in range(1001)]
    peak = rates.index(max(rates))
    assert peak == 250
    assert rates[peak] == pytest.approx(0.4)
    assert rates[0] == 0
    assert rates[-1] == pytest.approx(0, abs=1e-12)
    assert rates[:251] == sorted(rates[:251])
    assert rates[250:] == sorted(rates[250:], reverse=True)
    assert learning_rate(0.125, 0.4, 0.25) == pytest.approx(0.2)
    # Halfway down the cosine is half the height.
    assert learning_rate(0.625, 0.4, 0.25) == pytest.approx(0.2)


def test_without_a_warm_up_the_rate_begins_at_its_height():
    assert learning_rate(0.0, 0.1, 0.0) == 0.1


def test_progress_beyond_the_end_has_rate_zero():
    assert learning_rate(1.7, 0.1, 0.1) == pytest.approx(0, abs=1e-12)


def test_only_weights_decay():
    model = network()
    task = Task(model, recipe())
    decayed, others = task.configure_optimizers().param_groups
    assert [id(p) for p in decayed["params"]] == [id(model[0].weight), id(model[3].weight)]
    assert decayed["weight_decay"] == 1e-3
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in others["params"]} == {"0.bias", "1.weight", "1.bias", "3.bias"}
    assert others["weight_decay"] == 0
    assert decayed["nesterov"]


def test_frozen_parameters_stay_out_of_the_optimizer():
    model = network()
    model[0].weight.requires_grad_(False)
    groups = Task(model, recipe()).configure_optimizers().param_groups
    assert sum(len(group["params"]) for group in groups) == 5


def test_momentum_zero_is_plain_sgd():
    optimizer = Task(network(), recipe(momentum=0.0)).configure_optimizers()
    assert not optimizer.param_groups[0]["nesterov"]


def test_step_seeds_differ_in_the_bits_that_torch_takes():
    seeds = {step_seed(seed, step, rank) % 2**32
             for seed in range(3) for step in range(2000) for rank in range(2)}  # fmt: skip
    assert len(seeds) > 12_000 - 30
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_average_starts_young():
    # After n steps with a young average, the first weights weigh little.
    task = Task(network(), recipe(average=0.999))
    weight = 1.0
    for step in range(1, 50):
        weight *= min(0.999, (1 + step) / (10 + step))
    assert weight < 1e-5
    assert set(task.averaged) == {
        name for name, value in task.network.state_dict().items() if value.is_floating_point()
    }


def test_swapping_the_average_twice_changes_nothing():
    task = Task(network(), recipe(average=0.9))
    for value in task.averaged.values():
        value.add_(1.0)
    before = {name: value.clone() for name, value in task.network.state_dict().items()}
    task._swap_average()
    assert torch.equal(task.network[0].weight, before["0.weight"] + 1)
    task._swap_average()
    for name, value in task.network.state_dict().items():
        assert torch.equal(value, before[name])


def test_counts_are_exact_for_many_batches():
    task = Task(network(), recipe())
    scores = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 1.0]])
    labels = torch.tensor([0, 1, 1])
    for _ in range(10):
        task._count("train", torch.tensor(0.3), scores, labels)
    loss, accuracy, count = task.running()
    assert count == 30
    assert accuracy == pytest.approx(2 / 3)
    assert loss == pytest.approx(0.3, rel=1e-6)
    assert math.isfinite(loss)
