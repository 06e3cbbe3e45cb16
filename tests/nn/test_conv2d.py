"""Strided 1×1 convolutions run as a slice and a convolution of stride 1 where we chose the layout.

oneDNN writes beyond its buffer for them in channels_last (uxlfoundation/oneDNN#6035).
"""

import copy
import io
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import normdrop
from normdrop import networks
from normdrop.nn.conv2d import Conv2d
from normdrop.surgery.fold import fold

N = torch.nn

STRIDED_POINTS = {
    "few channels": {"stride": 2},
    "many channels": {"stride": 2, "channels": (17, 5)},
    "one side": {"stride": (2, 1)},
    "the other side": {"stride": (1, 3), "bias": False},
    "beyond the map": {"stride": (2, 11)},
    "groups": {"stride": 2, "groups": 2},
    "depthwise": {"stride": 2, "channels": (4, 4), "groups": 4},
    "dilated": {"stride": 2, "dilation": 3},
    "valid": {"stride": 2, "padding": "valid"},
}
OTHERS = {
    "stride 1": {},
    "padded": {"stride": 2, "padding": 1},
    "one side": {"stride": 2, "kernel_size": (1, 3)},
    "the other side": {"stride": 2, "kernel_size": (3, 1)},
}


def layer_of(stride=1, channels=(4, 8), kernel_size=1, **options):
    return N.Conv2d(*channels, kernel_size, stride, **options)


class Strides(TorchDispatchMode):
    """The strides of the convolutions that run."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default:
            self.seen.append(tuple(args[3]))
        return func(*args, **(kwargs or {}))


def strides_of(model, x):
    mode = Strides()
    mode.seen = []
    with mode:
        model(x)
    return mode.seen


def images(channels=4):
    return torch.randn(3, channels, 7, 9).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", STRIDED_POINTS)
def test_output_and_gradients_are_those_of_float64(name):
    layer = layer_of(**STRIDED_POINTS[name])
    exact = copy.deepcopy(layer).double()
    normdrop.convert(layer, layout="channels_last")
    for x in (images(layer.in_channels), images(layer.in_channels)[0], torch.empty(0, 4, 7, 9)):
        if x.dim() == 4 and x.shape[1] != layer.in_channels:
            continue
        results = []
        for model, given in ((layer, x), (exact, x.double())):
            given = given.detach().requires_grad_()
            y = model(given)
            inputs = [given, *model.parameters()]
            results.append([y, *torch.autograd.grad(y.sin().sum(), inputs)])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", STRIDED_POINTS)
def test_the_slice_is_taken(name):
    layer = layer_of(**STRIDED_POINTS[name])
    model = normdrop.convert(N.Sequential(layer), layout="auto")
    stored = io.BytesIO()
    torch.save(model, stored)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model)]
    copies.append(torch.load(io.BytesIO(stored.getvalue()), weights_only=False))
    for other in (model, *copies):
        assert strides_of(other, images(layer.in_channels)) == [(1, 1)]


@pytest.mark.parametrize("name", OTHERS)
def test_other_layers_are_torchs(name):
    layer = normdrop.convert(layer_of(**OTHERS[name]), layout="channels_last")
    assert type(layer) is N.Conv2d
    # A class that is exchanged decides at every call: surgery may change the stride later.
    x = images()
    want = layer(x)
    layer.__class__ = Conv2d
    assert strides_of(layer, x) == [layer.stride]
    torch.testing.assert_close(layer(x), want, rtol=0, atol=0)


def test_a_stride_that_is_taken_away_later_is_taken_away():
    layer = normdrop.convert(layer_of(stride=2), layout="channels_last")
    layer.stride = (1, 1)
    assert layer(images()).shape == (3, 8, 7, 9)


def test_no_layout_no_other_class():
    for layout in ("keep", "auto"):
        model = normdrop.convert(layer_of(stride=2).double(), layout=layout)
        assert type(model) is N.Conv2d


@pytest.mark.parametrize(
    "network",
    [
        lambda: networks.resnet(18, 5, width=4),
        lambda: networks.resnet(50, 5, width=4),
        lambda: networks.wide_resnet(10, 1, 5),
    ],
    ids=["resnet18", "resnet50", "wide_resnet"],
)
def test_networks_take_the_slice(network):
    model = network()
    shape = (2, 3, 64, 64)
    points = [m for m in model.modules() if isinstance(m, N.Conv2d) and m.kernel_size == (1, 1)]
    strided = [m for m in points if m.stride != (1, 1)]
    assert strided
    assert all(type(m) is Conv2d for m in strided)
    exact = copy.deepcopy(model).double().train()
    x = torch.randn(shape)
    model(x).sin().sum().backward()
    exact(x.double()).sin().sum().backward()
    for ours, theirs in zip(model.parameters(), exact.parameters(), strict=True):
        scale = float(theirs.grad.abs().max())
        assert float((ours.grad.double() - theirs.grad).abs().max()) <= 2e-3 * scale


class Shortcut(N.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = N.Conv2d(4, 8, 3, 2, 1), N.BatchNorm2d(8)
        self.down, self.norm = N.Conv2d(4, 8, 1, 2), N.BatchNorm2d(8)

    def forward(self, x):
        return torch.relu(self.bn(self.conv(x)) + self.norm(self.down(x)))


def test_convert_fuses_as_without_and_revert_undoes():
    model = Shortcut()
    calls = []
    model.down.register_forward_hook(lambda *_: calls.append(1))
    before, names = model.state_dict(), [type(m) for m in model.modules()]
    rows = [(row.path, row.action, row.why) for row in normdrop.plan(model)]
    x = images()
    want = copy.deepcopy(model)(x)
    calls.clear()
    normdrop.convert(model, layout="channels_last")
    fused = {row.path: row.why for row in normdrop.plan(model) if row.why}
    assert fused == {path: why for path, action, why in rows if action == "fuse"}
    assert isinstance(model.down, N.Conv2d)
    assert str(model.down) == str(N.Conv2d(4, 8, 1, 2))
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
    assert calls == [1]
    assert list(model.state_dict()) == list(before)
    normdrop.revert(model)
    assert [type(m) for m in model.modules()] == names


def test_traced_exported_and_folded():
    model = normdrop.convert(Shortcut(), layout="channels_last").eval()
    x = images()
    with torch.no_grad():
        want = model(x)
        graph = torch.fx.symbolic_trace(normdrop.revert(copy.deepcopy(model)))
        assert [n.target for n in graph.graph.nodes if n.op == "call_module"].count("down") == 1
        leaf = torch.fx.symbolic_trace(N.Sequential(copy.deepcopy(model.down)))
        assert [n.op for n in leaf.graph.nodes] == ["placeholder", "call_module", "output"]
        exported = torch.export.export(model, (x,)).module()
        traced = torch.jit.trace(model.down, (x,))
        torch.testing.assert_close(traced(x), model.down(x), rtol=1e-5, atol=1e-6)
        folded = fold(model, x)
        assert not list(folded.norm.parameters())
        for other in (graph, exported, folded):
            torch.testing.assert_close(other(x), want, rtol=1e-4, atol=1e-5)


def test_a_folded_model_takes_the_slice_where_it_is_differentiated():
    """What stands before may have given channels_last there, by its own operator."""
    folded = fold(N.Sequential(layer_of(stride=2), N.BatchNorm2d(8)).eval())
    todo, names = [folded(images().requires_grad_()).grad_fn], []
    while todo:
        node = todo.pop()
        names.append(node.name())
        todo += [before for before, _ in node.next_functions if before is not None]
    assert any("PaddedPart" in name for name in names)


def test_second_derivatives():
    layer = normdrop.convert(layer_of(stride=2, channels=(2, 2)), layout="channels_last").double()
    x = torch.randn(2, 2, 3, 4, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    assert torch.autograd.gradgradcheck(layer, (x,))
