"""Convolutions that take our kernels: which, and what stays as it was."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F

import normdrop
from normdrop.errors import UserError
from normdrop.nn.conv2d import Conv2d
from normdrop.ops.conv2d import HAS_CONV2D

pytestmark = pytest.mark.skipif(not HAS_CONV2D, reason="no kernels for this processor")

N = torch.nn
OPTIONS = {"convolution": "auto", "layout": "channels_last"}

LEFT = {
    "its kernel is (5, 5)": N.Conv2d(8, 8, 5, padding=2),
    "its kernel is (1, 3)": N.Conv2d(8, 8, (1, 3), padding=1),
    "its stride is (2, 2)": N.Conv2d(8, 8, 3, stride=2, padding=1),
    "its dilation is (2, 2)": N.Conv2d(8, 8, 3, padding=1, dilation=2),
    "it has 2 groups": N.Conv2d(8, 8, 3, padding=1, groups=2),
    "its padding is (0, 0)": N.Conv2d(8, 8, 3),
    "its padding is valid": N.Conv2d(8, 8, 3, padding="valid"),
    "it pads with reflect": N.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
    "it has fewer than 8 channels": N.Conv2d(3, 8, 3, padding=1),
    "its weight is float64": N.Conv2d(8, 8, 3, padding=1).double(),
    "it is lazy: call the model on one batch first": N.LazyConv2d(8, 3, padding=1),
    "a subclass that normdrop does not know": type("Other", (N.Conv2d,), {})(8, 8, 3, padding=1),
    "it is parametrized": N.utils.parametrizations.weight_norm(N.Conv2d(8, 8, 3, padding=1)),
}


def network():
    return N.Sequential(
        N.Conv2d(3, 16, 3, padding=1), N.BatchNorm2d(16), N.ReLU(),
        N.Conv2d(16, 16, 3, padding=1, bias=False), N.BatchNorm2d(16), N.ReLU(),
        N.Conv2d(16, 24, 3, padding="same"), N.Flatten(), N.Linear(24 * 64, 5),
    )  # fmt: skip


def step(model, x):
    y = model(x)
    y.square().sum().backward()
    return y, [p.grad for p in model.parameters()]


def took_kernels(module, x):
    return "_Conv2d" in type(module(x.detach().requires_grad_()).grad_fn).__name__


def test_outputs_and_gradients_are_the_originals():
    model, x = network(), torch.randn(4, 3, 8, 8)
    exact = copy.deepcopy(model).double()
    normdrop.convert(model, **OPTIONS)
    assert [type(m) is Conv2d for m in model if isinstance(m, N.Conv2d)] == [False, True, True]
    y, grads = step(model, x)
    truth, true_grads = step(exact, x.double())
    torch.testing.assert_close(y.double(), truth, rtol=1e-4, atol=1e-5)
    for grad, true in zip(grads, true_grads, strict=True):
        scale = true.abs().max() + 1e-3
        torch.testing.assert_close(grad.double() / scale, true / scale, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("why", "layer"), LEFT.items(), ids=LEFT)
def test_a_plan_says_why_a_layer_is_left(why, layer):
    model = N.Sequential(copy.deepcopy(layer))
    kind = type(model[0])
    (row,) = normdrop.plan(model, convolution="auto")
    assert (row.path, row.action, row.why) == ("0", "leave", why)
    normdrop.convert(model, **OPTIONS)
    assert type(model[0]) is kind
    assert len(normdrop.plan(model)) == 0


def test_a_plan_shows_what_is_chosen():
    model = network()
    assert str(normdrop.plan(model, convolution="auto")).splitlines() == [
        "layer  class        action   why",
        "0      Conv2d       leave    it has fewer than 8 channels",
        "1      BatchNorm2d  fuse     with relu",
        "3      Conv2d       replace",
        "4      BatchNorm2d  fuse     with relu",
        "6      Conv2d       replace",
        "1 leave, 2 fuse, 2 replace",
        "convolution: acts where the channels lie last; layout='auto' lays them so",
    ]
    normdrop.convert(model, **OPTIONS)
    rows = normdrop.plan(model, convolution="auto")
    assert [row.action for row in rows if row.type == "Conv2d"] == ["leave", "already", "already"]


def test_what_is_quantized_is_left():
    qat = N.Module()
    qat.__class__ = type("ConvBn2d", (N.Module,), {"__module__": "torch.ao.nn.intrinsic"})
    qat.conv = N.Conv2d(8, 8, 3, padding=1)
    prepared = N.Conv2d(8, 8, 3, padding=1)
    prepared.qconfig = object()
    model = N.Sequential(qat, prepared)
    normdrop.convert(model, **OPTIONS)
    assert type(qat.conv) is type(prepared) is N.Conv2d
    assert all("quantization" in row.why for row in normdrop.plan(model, convolution="auto"))


def test_the_default_changes_no_convolution():
    model = normdrop.convert(network(), layout="channels_last")
    assert not any(type(m) is Conv2d for m in model)


def test_another_word_is_refused_before_anything_changes():
    model = network()
    for function in (normdrop.convert, normdrop.plan):
        with pytest.raises(UserError, match="convolution"):
            function(model, convolution="fast")
    assert type(model[1]) is N.BatchNorm2d


def test_revert_gives_torchs_class_back():
    model = network()
    normdrop.revert(normdrop.convert(model, **OPTIONS))
    assert all(type(m).__module__.startswith("torch.nn") for m in model)


def test_parameters_hooks_and_shared_layers_stay():
    model = network()
    model.append(model[3])
    before, keys = list(model.parameters()), list(model.state_dict())
    calls = []
    model[3].register_forward_hook(lambda *_: calls.append("forward"))
    model[3].register_full_backward_hook(lambda *_: calls.append("backward"))
    normdrop.convert(model, **OPTIONS)
    assert model[9] is model[3]
    assert all(a is b for a, b in zip(model.parameters(), before, strict=True))
    assert list(model.state_dict()) == keys
    x = torch.randn(4, 16, 8, 8, requires_grad=True)
    model[3](x).sum().backward()
    assert calls == ["forward", "backward"]


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_take_the_kernels_too(way):
    model = normdrop.convert(network(), **OPTIONS)
    if way == "deepcopy":
        copied = copy.deepcopy(model)
    elif way == "pickle":
        copied = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        copied = torch.load(buffer, weights_only=False)
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(model(x), copied(x))
    assert took_kernels(copied[3], torch.randn(4, 16, 8, 8))


@pytest.mark.parametrize("change", ["float64", "bfloat16", "meta", "other filters", "strided"])
def test_a_layer_that_changes_later_is_torchs_again(change):
    layer = normdrop.convert(N.Sequential(N.Conv2d(16, 16, 3, padding=1)), **OPTIONS)[0]
    x = torch.randn(4, 16, 8, 8)
    assert took_kernels(layer, x)
    if change in ("float64", "bfloat16"):
        dtype = getattr(torch, change)
        assert not took_kernels(layer.to(dtype), x.to(dtype))
    elif change == "meta":
        assert layer.to("meta")(x.to("meta")).is_meta
    elif change == "other filters":
        layer.weight = N.Parameter(torch.randn(4, 16, 3, 3))
        layer.bias = None
        assert torch.equal(layer(x), F.conv2d(x, layer.weight, padding=1))
    else:
        layer.stride = (2, 2)
        assert torch.equal(layer(x), F.conv2d(x, layer.weight, layer.bias, 2, 1))


def test_new_weights_are_taken_at_once():
    layer = normdrop.convert(N.Sequential(N.Conv2d(16, 16, 3, padding=1)), **OPTIONS)[0]
    x = torch.randn(4, 16, 8, 8)
    layer(x)
    other = N.Conv2d(16, 16, 3, padding=1)
    layer.load_state_dict(other.state_dict())
    torch.testing.assert_close(layer(x), other(x), rtol=1e-4, atol=1e-5)
    layer.weight.data.mul_(2)
    torch.testing.assert_close(
        layer(x), F.conv2d(x, 2 * other.weight, other.bias, padding=1), rtol=1e-4, atol=1e-5
    )


def test_folding_and_low_memory_go_with_it():
    model, x = network(), torch.randn(4, 3, 8, 8)
    normdrop.convert(model, memory="low", **OPTIONS)
    step(model, x)
    model.eval()
    with torch.no_grad():
        expected = model(x)
        folded = normdrop.fold(copy.deepcopy(model))
        torch.testing.assert_close(folded(x), expected, rtol=1e-3, atol=1e-4)
