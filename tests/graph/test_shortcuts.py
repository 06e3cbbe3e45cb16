"""Shortcuts that slice and pad: found in convert, exact, and taken away again."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

import normdrop
from normdrop import networks
from normdrop.graph.forward import FusedForward

LAST = torch.channels_last


class Lambda(torch.nn.Module):
    """As many implementations of ResNets for small images have it."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Pad(torch.nn.Module):
    def __init__(self, extra, stride=2):
        super().__init__()
        self.extra = extra
        self.stride = stride

    def forward(self, x):
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))


class Block(torch.nn.Module):
    def __init__(self, shortcut):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, 2, padding=1, bias=False)
        self.norm = torch.nn.BatchNorm2d(8)
        self.shortcut = shortcut

    def forward(self, x):
        return torch.relu(self.norm(self.conv(x)) + self.shortcut(x))


def is_fused(module):
    return type(vars(module).get("forward")) is FusedForward


FOUND = {
    "module": Pad(5),
    "lambda": Lambda(lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 3), "constant", 0)),
    "keywords": Lambda(lambda x: F.pad(x[:, :, ::2, ::2], pad=[0, 0, 0, 0, 2, 3], value=0.0)),
}
LEFT = {
    "average": Lambda(lambda x: F.pad(F.avg_pool2d(x, 2), (0, 0, 0, 0, 2, 3))),
    "ones": Lambda(lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 3), value=1.0)),
    "used twice": Lambda(lambda x: F.pad(y := x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 3)) + y.mean()),
    "by size": Lambda(lambda x: F.pad(x[:, :, : x.shape[2] // 2, ::2], (0, 0, 0, 0, 5, 0))),
    "cropped": Lambda(lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 6, -1))),
}


@pytest.mark.parametrize("kind", FOUND)
def test_found_shortcuts_compute_the_same(kind, convert_checked):
    block = Block(copy.copy(FOUND[kind]))
    converted = convert_checked(block, {"norm": "with add, relu"})
    assert is_fused(converted.shortcut)


@pytest.mark.parametrize("kind", LEFT)
def test_others_are_left(kind):
    block = Block(copy.copy(LEFT[kind]))
    assert not is_fused(normdrop.convert(block).shortcut)
    block(torch.randn(2, 3, 12, 12)).sum().backward()


def test_the_gradient_lies_as_the_input():
    block = normdrop.convert(Block(Pad(5)), layout="channels_last")
    x = torch.randn(4, 3, 12, 12).contiguous(memory_format=LAST).requires_grad_()
    y = block.shortcut(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.stride() == x.stride()
    assert not torch.equal(grad, torch.zeros_like(grad))


def test_what_the_module_says_later_holds():
    shortcut = Pad(5)
    block = normdrop.convert(Block(shortcut))
    shortcut.extra, shortcut.stride = 1, 3
    assert block.shortcut(torch.ones(1, 3, 9, 9)).shape == (1, 4, 3, 3)


def test_plan_counts_them_and_revert_takes_them_away():
    block = Block(Pad(5))
    assert "shortcuts: 1 that slice and pad become one call" in str(normdrop.plan(block))
    assert "shortcuts" not in str(normdrop.plan(block, fuse=False))
    assert is_fused(normdrop.convert(block).shortcut)
    assert not is_fused(normdrop.revert(block).shortcut)


def test_copies_and_pickles_keep_them():
    block = normdrop.convert(Block(Pad(5)))
    x = torch.randn(4, 3, 12, 12)
    expected = block(x)
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert is_fused(other.shortcut)
        assert other.shortcut.forward.module is other.shortcut
        assert torch.equal(other(x), expected)


def test_our_own_network_traces_and_has_such_shortcuts():
    network = networks.resnet(8, classes=2, shortcut="pad")
    targets = [node.target for node in torch.fx.symbolic_trace(network).graph.nodes]
    assert targets.count(F.pad) == 2
    pads = [m for m in normdrop.convert(network).modules() if type(m).__name__ == "Pad"]
    assert [is_fused(pad) for pad in pads] == [True, True]
