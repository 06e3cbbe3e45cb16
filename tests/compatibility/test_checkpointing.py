"""Activation checkpointing: a batch is counted once (pytorch#96136, #62471)."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from normdrop import nn


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_network_is_the_plain_one(pair, images, check, step, momentum, reentrant):
    ours, theirs = pair(momentum=momentum)
    for _ in range(2):
        x = images().requires_grad_()
        y = step(lambda x: checkpoint(ours, x, use_reentrant=reentrant), x)
        torch.testing.assert_close(y, step(theirs, x), rtol=1e-4, atol=1e-4)
    check(ours, theirs)
    assert ours.bn1.num_batches_tracked == 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_torch_counts_a_checkpointed_batch_twice(images, pair, step, reentrant):
    """What the layers here are spared; with it gone from torch, our check can go too."""
    _, theirs = pair()
    step(lambda x: checkpoint(theirs, x, use_reentrant=reentrant), images().requires_grad_())
    assert theirs.bn1.num_batches_tracked == 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_dropout_has_one_mask(pair, images, step, reentrant):
    ours, _ = pair(drop=0.5)
    twin = copy.deepcopy(ours)
    x = images().requires_grad_()
    torch.manual_seed(5)
    y = step(lambda x: checkpoint(ours, x, use_reentrant=reentrant), x)
    torch.manual_seed(5)
    assert torch.equal(y, step(twin, x))
    for one, two in zip(ours.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)
    torch.testing.assert_close(ours.state_dict(), twin.state_dict())


@pytest.mark.parametrize("shape", [(6, 4), (300, 4, 20)])
def test_checkpoints_within_checkpoints(shape):
    """Columns (the channels lie side by side) and rows."""
    layers = torch.nn.Sequential(nn.BatchNorm1d(4), torch.nn.Tanh(), nn.BatchNorm1d(4))
    twin = copy.deepcopy(layers)
    x = torch.randn(shape, requires_grad=True)

    def inner(x):
        return checkpoint(layers[:2], x, use_reentrant=False)

    y = checkpoint(lambda x: layers[2](inner(x)), x, use_reentrant=False)
    (one,) = torch.autograd.grad(y.sin().sum(), x)
    (two,) = torch.autograd.grad(twin(x).sin().sum(), x)
    torch.testing.assert_close(one, two)
    torch.testing.assert_close(layers.state_dict(), twin.state_dict())


def test_checkpoint_sequential(images):
    layers = torch.nn.Sequential(
        *(torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)) for _ in range(4))
    )
    twin = copy.deepcopy(layers)
    x = images()
    checkpoint_sequential(layers, 2, x, use_reentrant=False).sum().backward()
    twin(x)
    torch.testing.assert_close(layers.state_dict(), twin.state_dict())


def test_a_nan_batch_is_skipped_in_both_passes():
    layer = nn.BatchNorm1d(2, nonfinite="skip")
    x = torch.tensor([[1.0, 2.0], [3.0, float("nan")]], requires_grad=True)
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert layer.running_mean.tolist() == [0.0, 0.0]
    assert layer.num_batches_tracked == 1


def test_evaluation_and_frozen_layers_are_checkpointed_as_ever(pair, images, check, step):
    ours, theirs = pair()
    ours.eval()
    theirs.eval()
    x = images().requires_grad_()
    step(lambda x: checkpoint(ours, x, use_reentrant=False), x)
    step(theirs, x)
    check(ours, theirs)


def test_compiled_checkpoint_counts_once(pair, images, check, step):
    ours, theirs = pair()
    compiled = torch.compile(
        lambda x: checkpoint(ours, x, use_reentrant=False), backend="aot_eager", fullgraph=True
    )
    x = images().requires_grad_()
    step(compiled, x)
    step(theirs, x)
    check(ours, theirs)
    assert ours.bn1.num_batches_tracked == 1
