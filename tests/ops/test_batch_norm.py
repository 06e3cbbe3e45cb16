"""Batch normalization against float64 and against torch: values, gradients, layouts, types."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from normdrop.functional import batch_norm, dropout
from normdrop.ops import batch_norm as ops
from normdrop.ops import reference
from normdrop.ops.activations import activation_of

of_the_kernel = pytest.mark.skipif(
    not ops.has_kernels(), reason="torch's operator loses these digits"
)

SHAPES = [
    pytest.param((2, 3, 2, 2), id="tiny"),
    pytest.param((8, 16, 14, 14), id="rows shorter than a block"),
    pytest.param((3, 7, 31, 37), id="primes: no row is a whole number of vectors"),
    pytest.param((520, 33, 1, 1), id="one pixel, odd channels"),
    pytest.param((2, 3, 96, 100), id="rows longer than a block, fewer channels than threads"),
    pytest.param((1, 1, 130, 131), id="one sample, one channel"),
    pytest.param((300, 70), id="matrix, channels no multiple of a vector"),
    pytest.param((17, 1025), id="matrix, more than one strip of columns"),
    pytest.param((11, 12, 150), id="sequence"),
    pytest.param((4, 5, 6, 13, 14), id="volume"),
    pytest.param((700, 9, 3), id="rows of 3"),
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "channels_last", "permuted", "sliced"]


def arrange(x: Tensor, layout: str) -> Tensor:
    if layout == "channels_last" and x.dim() in (4, 5):
        x = x.to(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    elif layout == "permuted":  # (C, N, ...) in memory
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "sliced":  # every second element of a larger tensor
        x = torch.stack([x, x], dim=-1)[..., 0]
    return x


def expected(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    slope: float,
    eps: float = 1e-5,
) -> Tensor:
    """From the definition, in float64."""
    dims = [d for d in range(x.dim()) if d != 1]
    shape = (1, -1) + (1,) * (x.dim() - 2)
    mean = x.mean(dims, keepdim=True)
    var = ((x - mean) ** 2).mean(dims, keepdim=True)
    y = (x - mean) / (var + eps).sqrt()
    if weight is not None:
        y = y * weight.view(shape)
    if bias is not None:
        y = y + bias.view(shape)
    if residual is not None:
        y = y + residual
    return torch.where(y > 0, y, slope * y)


def assert_close(actual: Tensor, wanted: Tensor, dtype: torch.dtype, factor: float = 16) -> None:
    scale = wanted.abs().max().item() + 1e-3
    error = (actual.double() - wanted).abs().max().item()
    if dtype == torch.float64:  # the expected value has rounding errors, too
        factor *= 8
    assert error <= factor * torch.finfo(dtype).eps * scale, (error, scale)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_batch_norm_values_and_gradients(shape, dtype, layout):
    torch.manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for activation, with_residual in [
        (None, False),
        ("relu", False),
        ("leaky_relu", True),
        ("relu", True),
        (None, True),
    ]:
        x = arrange((torch.randn(shape) * 2 + 3).to(dtype), layout).requires_grad_()
        weight = (torch.rand(shape[1], dtype=wide) + 0.5).requires_grad_()
        bias = torch.randn(shape[1], dtype=wide, requires_grad=True)
        residual = torch.randn(shape).to(dtype).requires_grad_() if with_residual else None
        inputs = [t for t in (x, weight, bias, residual) if t is not None]
        doubles = [t.detach().double().requires_grad_() for t in inputs]
        z = expected(*doubles[:3], doubles[3] if with_residual else None, 1.0)
        # Where rounding may turn the sign, and with it the gradient, nothing comes from above.
        is_far = z.abs() > z.abs().max() * torch.finfo(wide).eps * 1000
        grad = torch.where(is_far, torch.randn(shape), 0.0).to(dtype)
        y = batch_norm(x, None, None, weight, bias, True, residual=residual, activation=activation)
        grads = torch.autograd.grad(y, inputs, grad)

        wanted = expected(
            *doubles[:3], doubles[3] if with_residual else None, activation_of(activation).slope
        )
        wanted_grads = torch.autograd.grad(wanted, doubles, grad.double())

        assert y.dtype == dtype
        assert_close(y, wanted, dtype, 16 if ops.has_kernels() else 64)
        for actual, correct, given_ in zip(grads, wanted_grads, inputs, strict=True):
            assert actual.dtype == given_.dtype
            assert actual.shape == given_.shape
            off = (actual.double() - correct).abs() / (correct.abs().max() + 1e-3)
            assert off.max() <= 500 * torch.finfo(dtype).eps


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(8, 16, 14, 14), (3, 4, 4, 20, 20), (11, 12, 150), (300, 70)])
def test_batch_norm_keeps_the_layout_that_torch_keeps(shape, layout):
    x = arrange(torch.randn(shape), layout)
    ours = batch_norm(x, None, None, training=True)
    theirs = torch.nn.functional.batch_norm(x, None, None, training=True)
    assert ours.stride() == theirs.stride()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_batch_norm_evaluation(shape, layout):
    torch.manual_seed(0)
    channels = shape[1]
    x = arrange(torch.randn(shape), layout).requires_grad_()
    mean, var = torch.randn(channels), torch.rand(channels) + 0.5
    weight = torch.randn(channels, requires_grad=True)
    bias = torch.randn(channels, requires_grad=True)
    residual = torch.randn(shape, requires_grad=True)
    before = mean.clone(), var.clone()
    y = batch_norm(x, mean, var, weight, bias, residual=residual, activation="relu")
    wanted = torch.relu(torch.nn.functional.batch_norm(x, mean, var, weight, bias) + residual)
    torch.testing.assert_close(y, wanted)
    grad = torch.randn(shape)
    inputs = [x, weight, bias, residual]
    for actual, correct in zip(
        torch.autograd.grad(y, inputs, grad),
        torch.autograd.grad(wanted, inputs, grad),
        strict=True,
    ):
        torch.testing.assert_close(actual, correct, rtol=1e-4, atol=1e-3)
    assert torch.equal(mean, before[0])
    assert torch.equal(var, before[1])


@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_batch_norm_running_statistics_move_as_torch_s(dtype, momentum):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = (torch.randn(8, 12, 16, 16) + 2).to(dtype)
    ours = torch.randn(12, dtype=wide), torch.rand(12, dtype=wide)
    theirs = tuple(t.clone() for t in ours)
    for _ in range(3):
        batch_norm(x, *ours, training=True, momentum=momentum)
        torch.nn.functional.batch_norm(x, *theirs, training=True, momentum=momentum)
    for actual, correct in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, correct)


@pytest.mark.parametrize("need", ["x", "weight", "bias", "residual", "nothing"])
def test_batch_norm_gradient_of_one_input(need):
    tensors = {
        "x": torch.randn(8, 16, 14, 14),
        "weight": torch.randn(16),
        "bias": torch.randn(16),
        "residual": torch.randn(8, 16, 14, 14),
    }
    if need != "nothing":
        tensors[need].requires_grad_()
    y = batch_norm(
        tensors["x"],
        None,
        None,
        tensors["weight"],
        tensors["bias"],
        True,
        residual=tensors["residual"],
        activation="relu",
    )
    assert y.requires_grad == (need != "nothing")
    if need == "nothing":
        return
    y.sum().backward()  # the gradient is expanded, of stride 0
    for name, tensor in tensors.items():
        assert (tensor.grad is not None) == (name == need)


@of_the_kernel
@pytest.mark.parametrize("mean", [0.0, 1e3, 1e4])
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((32, 16, 28, 28), "contiguous"),
        ((32, 16, 28, 28), "channels_last"),
        ((4096, 24), "contiguous"),
        ((1, 2, 1000, 1000), "contiguous"),
        ((1, 2, 1000, 1000), "channels_last"),
    ],
)
def test_batch_norm_is_as_accurate_as_torch_s_contiguous_kernel(shape, layout, mean):
    """pytorch: channels_last loses a digit at a large mean (SEMANTICS, trap 6)."""
    torch.manual_seed(1)
    x = torch.randn(shape, dtype=torch.float64).add(mean).float()
    wanted = expected(x.double(), None, None, None, 1.0)
    theirs = torch.nn.functional.batch_norm(
        x if x.dim() > 2 else x[:, :, None], None, None, training=True
    ).view(shape)
    ours = batch_norm(arrange(x, layout), None, None, training=True)
    error, reference_error = ((y.double() - wanted).abs().max() for y in (ours, theirs))
    assert error <= max(reference_error.item(), 2e-6)


@of_the_kernel
@pytest.mark.parametrize("mean", [0.0, 1e3, 1e4])
def test_batch_norm_is_as_accurate_with_ten_million_values_a_channel(mean):
    torch.manual_seed(2)
    pixels = torch.randn(10_000_000, 2).add_(mean)
    wide = pixels.double()
    true_mean = wide.mean(0)
    wide -= true_mean
    true_var = wide.square().mean(0)
    wanted = (wide / (true_var + 1e-5).sqrt())[::97]
    rows = pixels.t().contiguous().view(1, 2, 4000, 2500)
    theirs = torch.nn.functional.batch_norm(rows, None, None, training=True)

    def error(y):
        values = y.flatten(2)[0].t() if y.dim() == 4 else y
        return (values[::97].double() - wanted).abs().max().item()

    for x in (rows, arrange(rows, "channels_last"), pixels):
        y = batch_norm(x, None, None, training=True)
        assert error(y) <= max(error(theirs), 2e-6)
        _, batch_mean, batch_var, _ = torch.ops.normdrop.batch_norm.default(
            x, None, None, None, None, None, True, 1e-5, 1.0
        )
        torch.testing.assert_close(batch_mean, true_mean, rtol=1e-9, atol=1e-8)
        torch.testing.assert_close(batch_var, true_var, rtol=3e-8, atol=0.0)


@of_the_kernel
def test_batch_norm_variance_is_never_negative_nor_nan_from_cancellation():
    """tenstorrent/tt-metal#45968: E[x²] − E[x]² cancels to NaN for a large mean."""
    for value in (1e4, 1e8, -3e12):
        for x in (torch.full((64, 8, 12, 12), value), torch.full((900, 70), value)):
            mean, var = torch.zeros(x.shape[1]), torch.ones(x.shape[1])
            y = batch_norm(x, mean, var, training=True, momentum=1.0)
            assert y.isfinite().all()
            assert (var >= 0).all()
            assert (var <= 1e-12 * value**2).all()
            torch.testing.assert_close(mean, torch.full_like(mean, value))


@of_the_kernel
def test_batch_norm_values_whose_squares_overflow_float():
    x = torch.randn(64, 8, 12, 12) * 1e25
    for layout in ("contiguous", "channels_last"):
        y = batch_norm(arrange(x, layout), None, None, training=True)
        assert_close(y, expected(x.double(), None, None, None, 1.0), torch.float32)


SMALL = [(3, 5, 1, 1), (257, 33), (4, 8, 6, 6, 6), (32, 10), (2, 3, 2, 2), (8, 16, 11, 11), (9, 1)]


@of_the_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SMALL)
def test_small_inputs_have_the_same_bits_for_any_number_of_threads(shape, dtype):
    """Torch's own sums of channels that lie side by side depend on them at every size."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    x, residual, grad = (torch.randn(shape).to(dtype) for _ in range(3))
    wide = torch.promote_types(dtype, torch.float32)
    weight, bias = (torch.randn(shape[1], dtype=wide) for _ in range(2))
    ways = [
        {},
        {"activation": "relu"},
        {"activation": "silu"},
        {"activation": "relu", "residual": residual},
        {"activation": "relu", "keep": 0.5, "seed": 3},
    ]
    try:
        for layout, training, way in itertools.product(LAYOUTS, (True, False), ways):
            results = []
            for count in (1, 2, 3, 8):
                torch.set_num_threads(count)
                inputs = [arrange(x, layout).detach(), weight.clone(), bias.clone()]
                for t in inputs:
                    t.requires_grad_()
                mean, var = torch.zeros_like(weight), torch.ones_like(bias)
                y = batch_norm(inputs[0], mean, var, *inputs[1:], training, **way)
                grads = torch.autograd.grad(y, inputs, grad)
                results.append([y.detach(), mean, var, *grads])
            for result in results[1:]:
                for one, many in zip(results[0], result, strict=True):
                    assert torch.equal(one, many), (layout, training, way)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", [(8, 16, 28, 28), (2, 3, 96, 100), (500, 70), (30, 20, 40)])
def test_batch_norm_has_the_same_bits_for_any_number_of_threads(shape):
    threads = torch.get_num_threads()
    results = []
    torch.manual_seed(0)
    x, residual, grad = (torch.randn(shape) for _ in range(3))
    weight, bias = torch.randn(shape[1]), torch.randn(shape[1])
    try:
        for layout in ("contiguous", "channels_last"):
            for count in (1, 2, 3, 8):
                torch.set_num_threads(count)
                inputs = [
                    t.clone(memory_format=torch.preserve_format).requires_grad_()
                    for t in (arrange(x, layout), weight, bias, arrange(residual, layout))
                ]
                y = batch_norm(
                    inputs[0],
                    None,
                    None,
                    *inputs[1:3],
                    True,
                    residual=inputs[3],
                    activation="relu",
                )
                result = [y.detach(), *torch.autograd.grad(y, inputs, grad)]
                if count == 1:
                    results.append(result)
                if ops.has_kernels():
                    for one, many in zip(results[-1], result, strict=True):
                        assert torch.equal(one, many)
    finally:
        torch.set_num_threads(threads)
    if len(shape) == 4:
        for rows, columns in zip(*results, strict=True):
            torch.testing.assert_close(rows, columns, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_batch_norm_nonfinite_batches(layout, bad):
    """pytorch#1206: one NaN batch leaves the running mean NaN for ever."""
    x = torch.randn(8, 16, 14, 14)
    x[3, 5, 2, 1] = bad
    x = arrange(x, layout)

    mean, var = torch.zeros(16), torch.ones(16)
    y = batch_norm(x, mean, var, training=True)
    assert y[:, 5].isnan().any()
    assert y[:, :5].isfinite().all()
    assert mean.isfinite().sum() == 15

    mean, var = torch.zeros(16), torch.ones(16)
    skipped = batch_norm(x, mean, var, training=True, nonfinite="skip")
    torch.testing.assert_close(skipped, y, equal_nan=True)
    assert torch.equal(mean, torch.zeros(16))
    assert torch.equal(var, torch.ones(16))
    batch_norm(torch.randn(8, 16, 14, 14), mean, var, training=True, nonfinite="skip")
    assert mean.ne(0).all()

    with pytest.raises(RuntimeError, match="NaN or infinity"):
        batch_norm(x, mean, var, training=True, nonfinite="raise")
    with pytest.raises(RuntimeError, match="NaN or infinity"):
        batch_norm(x, None, None, training=True, nonfinite="raise")


def test_batch_norm_relu_of_infinities_and_nan():
    x = torch.randn(8, 16, 14, 14)
    residual = torch.zeros_like(x)
    residual[0, 0, 0, 0] = -float("inf")
    residual[0, 0, 0, 1] = float("inf")
    residual[0, 0, 0, 2] = float("nan")
    y = batch_norm(x, None, None, training=True, residual=residual, activation="relu")
    assert y[0, 0, 0, 0] == 0
    assert y[0, 0, 0, 1] == float("inf")
    assert y[0, 0, 0, 2].isnan()
    assert y.isnan().sum() == 1


def test_batch_norm_silu():
    x = torch.randn(8, 16, 14, 14, requires_grad=True)
    y = batch_norm(x, None, None, training=True, activation="silu")
    plain = torch.nn.functional.silu(torch.nn.functional.batch_norm(x, None, None, training=True))
    torch.testing.assert_close(y, plain)


def test_batch_norm_empty_batch():
    for shape in [(0, 16), (0, 16, 5, 5), (4, 16, 0)]:
        x = torch.empty(shape, requires_grad=True)
        weight = torch.ones(16, requires_grad=True)
        mean, var = torch.zeros(16), torch.ones(16)
        y = batch_norm(x, mean, var, weight, None, True)
        assert y.shape == shape
        y.sum().backward()
        assert x.grad.shape == shape
        assert torch.equal(weight.grad, torch.zeros(16))
        assert torch.equal(mean, torch.zeros(16))


@pytest.mark.parametrize("shape", [(1, 70), (1, 5000), (1, 5000, 1, 1)])
def test_batch_norm_one_value_per_channel_raises(shape):
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        batch_norm(torch.randn(shape), None, None, training=True)


@pytest.mark.parametrize("size", [(4, 3), (64, 300)])
def test_batch_norm_errors_are_torch_s(size):
    x = torch.randn(size)
    vector = torch.ones(size[1])
    with pytest.raises(ValueError, match="eps must be positive during training"):
        batch_norm(x, None, None, training=True, eps=0.0)
    for name in ("running_mean", "running_var", "weight", "bias"):
        vectors = {"running_mean": vector, "running_var": vector.clone(), name: torch.ones(1)}
        message = f"{name} should contain {size[1]} elements not 1"
        with pytest.raises(RuntimeError, match=message):
            batch_norm(x, **vectors, training=True)
    with pytest.raises((RuntimeError, NotImplementedError)):
        batch_norm(x.double(), None, None, vector, vector, training=True)
    with pytest.raises((RuntimeError, NotImplementedError)):
        batch_norm(x.to(torch.complex64), None, None, training=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_batch_norm_half_vectors(dtype):
    """A module after .half(): everything in half."""
    x = torch.randn(8, 16, 14, 14).to(dtype).requires_grad_()
    weight = torch.ones(16, dtype=dtype, requires_grad=True)
    bias = torch.zeros(16, dtype=dtype, requires_grad=True)
    mean, var = torch.zeros(16, dtype=dtype), torch.ones(16, dtype=dtype)
    y = batch_norm(x, mean, var, weight, bias, True)
    y.backward(torch.ones_like(y))
    assert y.dtype == weight.grad.dtype == bias.grad.dtype == mean.dtype == dtype
    assert weight.grad.abs().max() <= 0.25  # the truth is 0; torch gives up to 1.8
    assert (bias.grad == 8 * 14 * 14).all()


@pytest.mark.parametrize("keep", [1.0, 0.5])
@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
def test_batch_norm_past_the_cache_where_rows_begin_unaligned(activation, keep):
    """34 MB, written past every cache: rows of 529 elements begin and end within a vector."""
    torch.manual_seed(0)
    x = torch.randn(252, 64, 23, 23, requires_grad=True)
    assert x.numel() * 4 > 32 << 20
    weight, bias = torch.randn(64), torch.randn(64)
    y = batch_norm(x, None, None, weight, bias, True, activation=activation, keep=keep, seed=3)
    some = [0, 1, 2, 3, 31, 63]
    mask = dropout(torch.ones_like(x), keep=keep, seed=3)[:, some].double()
    slope = activation_of(activation).slope
    doubles = x.detach()[:, some].double().requires_grad_()
    z = expected(doubles, weight[some].double(), bias[some].double(), None, 1.0)
    wanted = torch.where(z > 0, z, slope * z) * mask
    grad = torch.zeros_like(x)
    grad[:, some] = torch.where(z.abs() > 1e-3, torch.randn(z.shape), 0.0).float()
    (grad_x,) = torch.autograd.grad(y, x, grad)
    (wanted_grad,) = torch.autograd.grad(wanted, doubles, grad[:, some].double())
    assert_close(y[:, some], wanted, torch.float32)
    assert_close(grad_x[:, some], wanted_grad, torch.float32, 64)


@pytest.mark.parametrize("shape", [(2, 3), (3, 2, 5), (4, 3, 1, 2)])
def test_reference_moves_the_running_statistics_as_torch_does(shape):
    x = torch.randn(shape, dtype=torch.float64)
    ours = [torch.rand(shape[1], dtype=torch.float64) + 1 for _ in range(2)]
    theirs = [t.clone() for t in ours]
    mean, var = reference.batch_statistics(x)
    reference.update_running_statistics(*ours, mean, var, x.numel() // shape[1], 0.3)
    torch.nn.functional.batch_norm(x, *theirs, training=True, momentum=0.3)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


SMALL_ROWS = [
    pytest.param((4, 1, 3, 3), id="one channel"),
    pytest.param((2, 1, 8), id="one channel, rows of whole bytes"),
    pytest.param((1, 1, 3, 5), id="one channel, one sample"),
    pytest.param((1, 3, 3, 3), id="one sample"),
    pytest.param((5, 3, 1, 1), id="one position, whose channels lie side by side"),
    pytest.param((2, 3, 1, 5), id="one row of positions"),
    pytest.param((2, 1, 2, 2, 3), id="volume of one channel"),
    pytest.param((7, 1), id="matrix of one channel"),
    pytest.param((3, 2, 2, 1, 3), id="volume"),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SMALL_ROWS)
def test_batch_norm_second_derivatives_find_the_bits_of_the_sign(shape, layout):
    torch.manual_seed(0)
    sizes = (shape, shape[1], shape[1], shape)
    x, weight, bias, residual = (torch.randn(size, dtype=torch.float64) for size in sizes)
    tensors = [arrange(x, layout), weight, bias, arrange(residual, layout)]
    tensors = [t.detach().requires_grad_() for t in tensors]
    for activation in ("relu", "leaky_relu(0.3)"):

        def run(x, weight, bias, residual, activation=activation):
            options = {"residual": residual, "activation": activation}
            return batch_norm(x, None, None, weight, bias, training=True, **options)

        assert torch.autograd.gradgradcheck(run, tensors)


def test_batch_norm_gradcheck():
    torch.manual_seed(0)
    for shape in [(3, 2, 5), (5, 3)]:
        tensors = [
            torch.randn(size, dtype=torch.float64, requires_grad=True)
            for size in (shape, shape[1], shape[1], shape)
        ]
        for training in (True, False):
            for activation in (None, "leaky_relu"):

                def run(x, weight, bias, residual, training=training, activation=activation):
                    mean = torch.zeros(x.shape[1], dtype=x.dtype)
                    var = torch.ones(x.shape[1], dtype=x.dtype)
                    options = {"residual": residual, "activation": activation}
                    return batch_norm(x, mean, var, weight, bias, training, **options)

                assert torch.autograd.gradcheck(run, tensors)
                assert torch.autograd.gradgradcheck(run, tensors)


def test_batch_norm_third_derivative():
    def norm(x, function):
        y = function(x)
        for _ in range(3):
            (y,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        return y

    x = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)

    def plain(x):
        mean, var = reference.batch_statistics(x)
        return reference.batch_norm(x, mean, var, None, None, 1e-5)

    ours = norm(x, lambda x: batch_norm(x, None, None, training=True))
    if ops.has_kernels():  # torch's own third derivative is wrong (2.13: by 50 %)
        wanted = norm(x, plain)
        torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=1e-9 * wanted.abs().max().item())


def test_batch_norm_saves_x_and_a_bit_an_element():
    x = torch.randn(16, 64, 28, 28, requires_grad=True)
    weight, bias = torch.ones(64, requires_grad=True), torch.zeros(64, requires_grad=True)
    for residual in (None, torch.randn_like(x)):
        saved = {}

        def pack(t, saved=saved):
            saved[t.data_ptr()] = t.numel() * t.element_size()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            batch_norm(x, None, None, weight, bias, True, residual=residual, activation="relu")
        extra = sum(saved.values()) - x.numel() * 4
        if ops.has_kernels():
            assert extra <= (x.numel() // 8 if residual is not None else 0) + 16 * 64 * 8


def test_batch_norm_dropout_afterwards():
    x = torch.randn(8, 16, 14, 14, requires_grad=True)
    plain = batch_norm(x, None, None, training=True, activation="relu")
    dropped = batch_norm(x, None, None, training=True, activation="relu", keep=0.5, seed=3)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], 2 * plain[kept])
    assert 0.2 < kept.float().mean() < 0.3
    last = x.detach().to(memory_format=torch.channels_last)
    again = batch_norm(last, None, None, training=True, activation="relu", keep=0.5, seed=3)
    torch.testing.assert_close(again, dropped, rtol=1e-4, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_batch_norm_any_shape_stride_and_type(data):
    dims = data.draw(st.integers(2, 5))
    shape = data.draw(
        st.lists(st.integers(1, 9), min_size=dims, max_size=dims).filter(
            lambda s: torch.Size(s).numel() > s[1]
        )
    )
    order = data.draw(st.permutations(range(dims)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    step = data.draw(st.sampled_from([1, 1, 2]))
    activation = data.draw(st.sampled_from([None, "relu", "leaky_relu"]))
    residual = torch.randn(shape).to(dtype) if data.draw(st.booleans()) else None
    x = torch.randn([shape[d] for d in order] + [step]).to(dtype)[..., 0]
    x = x.permute([order.index(d) for d in range(dims)])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight = torch.randn(shape[1], dtype=wide)
    options = {"residual": residual, "activation": activation}
    y = batch_norm(x, None, None, weight, None, True, 0.1, 1e-3, **options)
    wanted = expected(
        x.double(),
        weight.double(),
        None,
        residual if residual is None else residual.double(),
        activation_of(activation).slope,
        1e-3,
    )
    assert_close(y, wanted, dtype, 64)
