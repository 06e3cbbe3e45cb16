"""The 3×3 convolution by Winograd's algorithm, against float64 and against torch's float32."""

import itertools

import pytest
import torch
import torch._dynamo.backends.common
import torch.nn.functional as F
from functorch.compile import make_boxed_func

from normdrop.ops import reference
from normdrop.ops.conv2d import HAS_CONV2D, conv2d

pytestmark = pytest.mark.skipif(not HAS_CONV2D, reason="no kernels for this processor")

LAST = torch.channels_last

# (samples, channels, filters, height, width)
TAKEN = {
    "the usual": (4, 64, 64, 16, 16),
    "few channels": (8, 16, 16, 8, 8),
    "many channels, few tiles": (2, 512, 512, 7, 7),
    "many channels, tiles in several rounds": (3, 512, 512, 28, 28),
    "sums in several rounds": (2, 128, 96, 28, 28),
    "one sample": (1, 32, 64, 14, 14),
    "fewest tiles": (8, 64, 64, 4, 4),
    "odd sides": (2, 32, 32, 13, 17),
    "tiles half full": (4, 64, 64, 5, 7),
    "one column of tiles": (8, 24, 24, 9, 4),
    "channels of no whole vector": (4, 17, 19, 10, 10),
    "filters of half a panel": (4, 40, 24, 12, 12),
    "fewest channels": (4, 8, 8, 12, 12),
}
LEFT = {
    "one channel short": (8, 7, 16, 8, 8),
    "one filter short": (8, 16, 7, 8, 8),
    "one tile short": (7, 16, 16, 4, 4),
    "tiles less than half full": (64, 16, 16, 5, 5),
    "lines": (32, 16, 16, 1, 64),
    "no samples": (0, 16, 16, 8, 8),
}
AT_THE_EDGE = {
    "one pixel": (1, 16, 16, 1, 1),
    "two by two": (3, 16, 32, 2, 2),
    "one tile": (1, 64, 64, 4, 4),
    "one channel": (1, 1, 1, 3, 3),
    "images": (2, 3, 64, 16, 16),
    "prime channels": (1, 37, 5, 6, 7),
    "a line": (1, 16, 16, 1, 9),
}


def tensors(shape, relu=False):
    n, channels, filters, height, width = shape
    x = torch.randn(n, channels, height, width)
    weight = torch.randn(filters, channels, 3, 3) / (9 * channels) ** 0.5
    grad = torch.randn(n, filters, height, width)
    x = x.relu() if relu else x
    return *(t.contiguous(memory_format=LAST) for t in (x, weight, grad)), torch.randn(filters)


def results(function, x, weight, grad, bias):
    """y and the gradients of x, weight and bias."""
    inputs = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = function(*inputs)
    return y, *torch.autograd.grad(y, inputs, grad)


def torchs(x, weight, bias):
    return F.conv2d(x, weight, bias, padding=1)


def is_taken(x, weight, bias=None):
    weight = weight.detach().requires_grad_()
    return "_Conv2d" in type(conv2d(x, weight, bias).grad_fn).__name__


def error(result, exact):
    return ((result.double() - exact).abs().max() / exact.abs().max()).item()


@pytest.mark.parametrize("relu", [False, True], ids=["normal", "after ReLU"])
@pytest.mark.parametrize("shape", TAKEN.values(), ids=TAKEN)
def test_errors_are_a_few_times_those_of_torch(shape, relu):
    x, weight, grad, bias = tensors(shape, relu)
    assert is_taken(x, weight, bias)
    exact = results(torchs, x.double(), weight.double(), grad.double(), bias.double())
    ours, theirs = (results(f, x, weight, grad, bias) for f in (conv2d, torchs))
    # A single sample torch leaves to products of MKL, whose error is half of oneDNN's or less.
    most = 4 if shape[0] > 1 else 9
    for name, mine, other, truth in zip(("y", "x", "w", "b"), ours, theirs, exact, strict=True):
        assert mine.dtype is torch.float32
        assert mine.shape == truth.shape
        assert error(mine, truth) <= most * error(other, truth), name


@pytest.mark.parametrize("shape", {**LEFT, **AT_THE_EDGE}.values(), ids=[*LEFT, *AT_THE_EDGE])
def test_shapes_that_gain_nothing_are_left_to_torch(shape):
    x, weight, grad, bias = tensors(shape)
    assert not is_taken(x, weight, bias)
    ours, theirs = (results(f, x, weight, grad, bias) for f in (conv2d, torchs))
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("shape", AT_THE_EDGE.values(), ids=AT_THE_EDGE)
def test_the_kernels_take_every_shape(shape):
    x, weight, grad, bias = tensors(shape)
    exact = results(reference.conv2d, x.double(), weight.double(), grad.double(), bias.double())
    y = torch.ops.normdrop.conv2d(x, weight, bias)
    grads = torch.ops.normdrop.conv2d_backward(grad, x, weight, True, True)
    for mine, truth in zip((y, *grads), exact[:3], strict=True):
        assert error(mine, truth) < 3e-6


@pytest.mark.parametrize("shape", TAKEN.values(), ids=TAKEN)
def test_bits_do_not_depend_on_the_number_of_threads(shape):
    x, weight, grad, bias = tensors(shape)
    first = None
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        found = results(conv2d, x, weight, grad, bias)[:3]
        first = first or found
        assert all(map(torch.equal, found, first)), threads


@pytest.mark.parametrize("x_last", [True, False], ids=["x last", "x first"])
@pytest.mark.parametrize("weight_last", [True, False], ids=["weight last", "weight first"])
def test_the_output_lies_as_torchs_does(x_last, weight_last):
    x, weight, grad, bias = tensors(TAKEN["the usual"])
    x = x if x_last else x.contiguous()
    weight = weight if weight_last else weight.contiguous()
    assert is_taken(x, weight) == (x_last or weight_last)
    ours, theirs = (results(f, x, weight, grad, bias) for f in (conv2d, torchs))
    assert ours[0].stride() == theirs[0].stride()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


def test_inputs_and_gradients_of_any_strides():
    x, weight, _, bias = tensors((4, 16, 16, 10, 10))
    for part in (x[:, :, 1:9, ::2], x.transpose(2, 3), x[:1].expand(4, -1, -1, -1)):
        for loss in (torch.sum, lambda y: y[:, ::2].square().sum()):
            found = []
            for function in (conv2d, torchs):
                inputs = [t.detach().requires_grad_() for t in (part, weight, bias)]
                found.append(torch.autograd.grad(loss(function(*inputs)), inputs))
            torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-3)


def test_only_what_is_asked_for_has_a_gradient():
    x, weight, grad, bias = tensors(TAKEN["few channels"])
    whole = results(conv2d, x, weight, grad, bias)[1:]
    for needed in itertools.product([True, False], repeat=3):
        inputs = [
            t.detach().requires_grad_(n) for t, n in zip((x, weight, bias), needed, strict=True)
        ]
        y = conv2d(*inputs)
        assert y.requires_grad == any(needed)
        if y.requires_grad:
            y.backward(grad)
        for tensor, is_needed, expected in zip(inputs, needed, whole, strict=True):
            assert torch.equal(tensor.grad, expected) if is_needed else tensor.grad is None
    with torch.no_grad():
        assert conv2d(*(t.requires_grad_() for t in inputs)).grad_fn is None


def test_second_derivatives_are_those_of_float64():
    given = [tensors(TAKEN["few channels"])[i] for i in (0, 1, 3)]
    found = []
    for function, dtype in ((conv2d, torch.float32), (torchs, torch.float64)):
        inputs = [t.to(dtype).requires_grad_() for t in given]
        first = torch.autograd.grad(function(*inputs).square().sum(), inputs, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().mean() for g in first), inputs))
    for mine, truth in zip(*found, strict=True):
        assert error(mine, truth) < 1e-5


def test_jacobians_by_batched_gradients():
    x, weight, grad, bias = tensors(TAKEN["few channels"])
    grads = torch.stack([grad, 2 * grad])
    x.requires_grad_()
    ours, theirs = (
        torch.autograd.grad(f(x, weight, bias), x, grads, is_grads_batched=True)[0]
        for f in (conv2d, torchs)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("place", [(0, 0, 0, 0), (1, 3, 5, 6), (0, 2, 11, 3)], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_what_is_not_finite_spreads_over_tiles_that_read_it(value, place):
    x, weight, _, bias = tensors((2, 8, 8, 12, 12))
    clean = conv2d(x, weight, bias)
    x[place] = value
    y = conv2d(x, weight, bias)
    n, _, h, w = place
    touched = torch.zeros(2, 12, 12, dtype=torch.bool)
    for top, left in itertools.product(range(0, 12, 4), repeat=2):
        if top - 1 <= h <= top + 4 and left - 1 <= w <= left + 4:
            touched[n, top : top + 4, left : left + 4] = True
    touched = touched.unsqueeze(1).expand_as(y)
    assert torch.equal(y[~touched], clean[~touched])
    beside = torchs(x, weight, bias).isfinite().logical_not()
    assert beside.any()
    assert not y[beside].isfinite().any()


@pytest.mark.parametrize(
    "case", ["float64", "autocast", "vmap", "grad", "jvp", "meta", "no oneDNN", "bfloat16 inside"]
)
def test_the_rest_is_left_to_torch(case, monkeypatch):
    x, weight, _, bias = tensors(TAKEN["few channels"])
    monkeypatch.setattr("normdrop.ops.conv2d._Conv2d", None)  # would fail
    weight.requires_grad_()
    with pytest.raises(AttributeError, match="apply"):
        conv2d(x, weight, bias)
    if case == "float64":
        assert conv2d(x.double(), weight.double(), bias.double()).dtype is torch.float64
    elif case == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            assert conv2d(x, weight, bias).dtype is torch.bfloat16
    elif case == "vmap":
        assert torch.func.vmap(lambda t: conv2d(t, weight, bias))(x[None]).shape == (1, *x.shape)
    elif case == "grad":
        assert torch.func.grad(lambda t: conv2d(t, weight, bias).sum())(x).shape == x.shape
    elif case == "jvp":
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, x)
            tangent = torch.autograd.forward_ad.unpack_dual(conv2d(dual, weight, bias)).tangent
        torch.testing.assert_close(tangent, torchs(x, weight, None), rtol=1e-4, atol=1e-4)
    elif case == "meta":
        assert conv2d(x.to("meta"), weight.to("meta"), bias.to("meta")).is_meta
    elif case == "no oneDNN":
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
        assert torch.equal(conv2d(x, weight, bias), torchs(x, weight, bias))
    else:
        before = torch.backends.mkldnn.conv.fp32_precision
        try:
            torch.backends.mkldnn.conv.fp32_precision = "bf16"
            assert torch.equal(conv2d(x, weight, bias), torchs(x, weight, bias))
        finally:
            torch.backends.mkldnn.conv.fp32_precision = before


def test_wrong_arguments_raise_what_torch_raises():
    x, weight, _, bias = tensors(TAKEN["few channels"])
    for args in ((x, weight[:, :8], bias), (x, weight, bias[:5]), (x[0, 0], weight, bias)):
        messages = []
        for function in (conv2d, torchs):
            with pytest.raises(RuntimeError) as caught:
                function(*args)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, b: (x, w[:, :8], b), r"weight must have shape \(16, 16, 3, 3\)"),
        (lambda x, w, b: (x, w, b[:8]), "bias must be 16 elements of float32 on the CPU, got 8"),
        (lambda x, w, b: (x[0], w, b), "x must have 4 dimensions, got 3"),
        (lambda x, w, b: (x[:0], w, b), "x must not be empty"),
        (lambda x, w, b: (x.double(), w, b), "x must be float32, got Double"),
    ],
)
def test_the_operator_says_what_is_wrong(change, message):
    x, weight, _, bias = tensors(TAKEN["few channels"])
    with pytest.raises(RuntimeError, match=f"conv2d: {message}"):
        torch.ops.normdrop.conv2d(*change(x, weight, bias))


def test_the_backward_operator_says_what_is_wrong():
    x, weight, grad, _ = tensors(TAKEN["few channels"])
    with pytest.raises(RuntimeError, match=r"grad_y must have shape \(8, 16, 8, 8\), got"):
        torch.ops.normdrop.conv2d_backward(grad[:, :, :4], x, weight, True, True)


@pytest.mark.parametrize("last", [True, False], ids=["channels_last", "contiguous"])
def test_opcheck(last):
    x, weight, grad, bias = tensors(TAKEN["few channels"])
    layout = LAST if last else torch.contiguous_format
    x, weight, grad = (t.contiguous(memory_format=layout) for t in (x, weight, grad))
    forward, backward = (
        torch.ops.normdrop.conv2d.default,
        torch.ops.normdrop.conv2d_backward.default,
    )
    torch.library.opcheck(forward, (x, weight, None))
    torch.library.opcheck(forward, tuple(t.detach().requires_grad_() for t in (x, weight, bias)))
    for needed in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(backward, (grad, x, weight, *needed))


def test_compiled_code_has_both_operators():
    x, weight, grad, bias = tensors(TAKEN["few channels"])
    seen = []

    def backend(module, _):
        seen.extend(str(node.target) for node in module.graph.nodes)
        return make_boxed_func(module)

    aot = torch._dynamo.backends.common.aot_autograd(fw_compiler=backend, bw_compiler=backend)
    compiled = torch.compile(conv2d, backend=aot, fullgraph=True)
    ours, eager = (results(f, x, weight, grad, bias) for f in (compiled, conv2d))
    assert all(map(torch.equal, ours[:3], eager[:3]))
    assert {"normdrop.conv2d.default", "normdrop.conv2d_backward.default"} <= set(seen)


def test_exported_programs_have_torchs_operator_only():
    x, weight, _, bias = tensors(TAKEN["few channels"])

    class Module(torch.nn.Module):
        def forward(self, x):
            return conv2d(x, weight, bias)

    program = torch.export.export(Module(), (x,))
    calls = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert calls == ["aten.conv2d.default"]
