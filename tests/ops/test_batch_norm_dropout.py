"""Dropout in batch normalization's operator: the mask of functional.dropout, values, gradients."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from normdrop import has_kernels
from normdrop.functional import batch_norm, dropout
from normdrop.ops import batch_norm as ops
from normdrop.ops.activations import activation_of

of_the_kernel = pytest.mark.skipif(not has_kernels(), reason="there is no kernel")

SHAPES = [
    pytest.param((8, 16, 28, 28), id="rows of whole vectors, not of whole words"),
    pytest.param((3, 128, 16, 16), id="rows and tiles of whole words"),
    pytest.param((4, 24, 8, 8), id="channels that are no multiple of 16"),
    pytest.param((3, 7, 31, 37), id="primes"),
    pytest.param((9, 64, 7, 7), id="odd rows, whole bytes of channels"),
    pytest.param((30, 24, 2, 2), id="several samples in a byte of positions"),
    pytest.param((2, 3, 96, 100), id="rows longer than a block, fewer channels than threads"),
    pytest.param((1, 1, 130, 131), id="one channel"),
    pytest.param((300, 70), id="matrix"),
    pytest.param((1041, 64), id="matrix, folded, with a remainder"),
    pytest.param((5, 3), id="matrix that is all remainder"),
    pytest.param((11, 12, 150), id="sequence"),
    pytest.param((4, 8, 4, 6, 8), id="volume"),
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
KEEP = 0.625  # 1 / keep is exact in every type


def arrange(x: Tensor, layout: str) -> Tensor:
    if layout == "channels_last" and x.dim() in (4, 5):
        x = x.to(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    elif layout == "permuted":  # (C, N, ...) in memory
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    return x


def mask_of(
    shape: tuple[int, ...], seed: int, sample_offset: int = 0, keep: float = KEEP
) -> Tensor:
    return dropout(torch.ones(shape), keep=keep, seed=seed, sample_offset=sample_offset) != 0


def dropped(x: Tensor, *vectors: Any, residual: Any = None, activation: Any = None) -> Tensor:
    """Seed 11, for a shard that begins with the third sample."""
    options = {"residual": residual, "activation": activation}
    drop = {"keep": KEEP, "seed": 11, "sample_offset": 2}
    return batch_norm(x, None, None, *vectors, training=True, **options, **drop)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_batch_norm_dropout_mask_values_and_gradients(shape, dtype, layout):
    """What is kept is what functional.dropout keeps; all else as torch has it in float64."""
    torch.manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    mask = mask_of(shape, seed=11, sample_offset=2)
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
        z = torch.nn.functional.batch_norm(doubles[0], None, None, *doubles[1:3], True)
        z = z + doubles[3] if with_residual else z
        # Where rounding may turn the sign, and with it the gradient, nothing comes from above.
        is_far = z.abs() > z.abs().max() * torch.finfo(wide).eps * 1000
        grad = torch.where(is_far, torch.randn(shape), 0.0).to(dtype)
        y = dropped(x, weight, bias, residual=residual, activation=activation)
        grads = torch.autograd.grad(y, inputs, grad)
        slope = activation_of(activation).slope
        wanted = torch.where(mask, torch.where(z > 0, z, slope * z) / KEEP, 0.0)
        wanted_grads = torch.autograd.grad(wanted, doubles, grad.double())

        assert y.dtype == dtype
        assert (y[~mask] == 0).all()
        if slope:  # else a kept element may be 0, too
            assert ((y != 0) == mask).float().mean() > 0.9999
        eps = torch.finfo(dtype).eps
        error = (y.double() - wanted).abs().max() / wanted.abs().max()
        assert error <= (128 if dtype == torch.float64 or not has_kernels() else 16) * eps
        for actual, correct, given_ in zip(grads, wanted_grads, inputs, strict=True):
            assert actual.dtype == given_.dtype
            off = (actual.double() - correct).abs() / (correct.abs().max() + 1e-3)
            assert off.max() <= 500 * eps


@of_the_kernel
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_norm_dropout_rounds_once(dtype, layout):
    """With a scale that is a power of two the bits are those of dropout after the operator."""
    x = arrange(torch.randn(8, 16, 28, 28).to(dtype), layout)
    residual = torch.randn_like(x)
    for activation in (None, "relu", "leaky_relu"):
        z = batch_norm(x, None, None, training=True, residual=residual, activation=activation)
        y = batch_norm(
            x, None, None, training=True, residual=residual, activation=activation, keep=0.5, seed=3
        )
        # Numbers too small for a normal half lose a bit when they are rounded before the doubling.
        is_normal = z.abs() >= torch.finfo(dtype).tiny
        wanted = dropout(z, keep=0.5, seed=3)
        assert torch.equal(y[is_normal], wanted[is_normal])
        assert y.stride() == x.stride()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "shape", [(8, 16, 28, 28), (6, 64, 16, 16), (13, 33, 7, 7), (500, 70), (30, 20, 40)]
)
def test_batch_norm_dropout_has_the_same_bits_for_any_number_of_threads(shape, layout):
    torch.manual_seed(0)
    x, grad = (arrange(torch.randn(shape), layout) for _ in range(2))
    weight, bias = torch.randn(shape[1]), torch.randn(shape[1])
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            inputs = [t.clone().requires_grad_() for t in (x, weight, bias)]
            y = batch_norm(
                inputs[0], None, None, *inputs[1:], True, activation="relu", keep=0.7, seed=5
            )
            results.append([y.detach(), *torch.autograd.grad(y, inputs, grad)])
    finally:
        torch.set_num_threads(threads)
    if has_kernels():
        for one, *others in zip(*results, strict=True):
            assert all(torch.equal(one, other) for other in others)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(8, 16, 28, 28), (9, 33, 7, 7), (600, 71), (40, 12, 50)])
@pytest.mark.parametrize("start", [1, 3])
def test_batch_norm_dropout_of_a_shard_is_that_of_the_whole(shape, layout, start):
    statistics = ops.Statistics(torch.zeros(shape[1]), torch.ones(shape[1]), training=False)
    whole = arrange(torch.rand(shape) + 1, layout)
    shard = arrange(whole[start:].clone(), layout)
    one, two = (
        ops.batch_norm(x, statistics, ops.Affine(), 1e-5, drop=ops.Drop(0.4, 9, offset))
        for x, offset in ((whole, 0), (shard, start))
    )
    assert torch.equal(one[start:] != 0, two != 0)
    assert torch.equal(one != 0, mask_of(shape, seed=9, keep=0.4))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("keep", [2**-20, 1 - 2**-20])
def test_batch_norm_dropout_of_almost_all_and_almost_nothing(keep, layout):
    """The second stream of the generator decides."""
    x = arrange(torch.rand(16, 64, 32, 32) + 1, layout)
    y = batch_norm(x, None, None, training=True, keep=keep, seed=1)
    assert torch.equal(y != 0, mask_of(tuple(x.shape), seed=1, keep=keep))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_batch_norm_dropout_makes_zero_of_what_is_not_finite(layout, bad):
    """torch's CPU dropout makes NaN of a dropped infinity."""
    shape = (8, 16, 28, 28)
    mask = mask_of(shape, seed=4)
    x = arrange(torch.randn(shape), layout)
    residual, grad = torch.full_like(x, bad), torch.full_like(x, bad)
    for activation in (None, "relu", "leaky_relu"):
        inputs = [t.clone().requires_grad_() for t in (x, residual)]
        y = batch_norm(
            inputs[0], None, None, training=True, residual=inputs[1], activation=activation,
            keep=KEEP, seed=4,
        )  # fmt: skip
        _, grad_residual = torch.autograd.grad(y, inputs, grad)
        for result in (y, grad_residual):
            assert (result[~mask] == 0).all()
            assert not result[mask].isfinite().any()
    # ReLU of minus infinity is zero, not zero times infinity.
    y = batch_norm(
        x, None, None, training=True, residual=-residual.abs(), activation="relu", keep=KEEP, seed=4
    )
    if bad == float("inf"):
        assert (y == 0).all()


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu", "leaky_relu(0.3)", "silu"])
def test_batch_norm_dropout_gradcheck(activation):
    torch.manual_seed(0)
    for shape in [(3, 2, 5), (5, 3)]:
        tensors = [
            torch.randn(size, dtype=torch.float64, requires_grad=True)
            for size in (shape, shape[1], shape[1], shape)
        ]

        def run(x, weight, bias, residual):
            return dropped(x, weight, bias, residual=residual, activation=activation)

        assert torch.autograd.gradcheck(run, tensors)
        assert torch.autograd.gradgradcheck(run, tensors)
        assert torch.autograd.gradgradcheck(lambda x: dropped(x, activation=activation), tensors[0])


@pytest.mark.parametrize("need", ["x", "weight", "bias", "residual"])
def test_batch_norm_dropout_gradient_of_one_input(need):
    size = (8, 16, 28, 28)
    tensors = {"x": torch.randn(size), "weight": torch.randn(16), "bias": torch.randn(16)}
    tensors["residual"] = torch.randn(size)

    def run():
        vectors = tensors["weight"], tensors["bias"]
        return dropped(tensors["x"], *vectors, residual=tensors["residual"])

    grad = torch.randn(size)
    for tensor in tensors.values():
        tensor.requires_grad_()
    wanted = dict(
        zip(tensors, torch.autograd.grad(run(), list(tensors.values()), grad), strict=True)
    )
    for name, tensor in tensors.items():
        tensor.requires_grad_(name == need)
    run().backward(grad)
    for name, tensor in tensors.items():
        assert (tensor.grad is not None) == (name == need)
    torch.testing.assert_close(tensors[need].grad, wanted[need])


@of_the_kernel
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("slope", "with_residual"), [(1.0, True), (0.0, False), (0.01, True)])
def test_batch_norm_dropout_opcheck(layout, slope, with_residual):
    x = torch.randn(4, 3, 5, 7).to(memory_format=layout).requires_grad_()
    weight, bias = torch.rand(3, requires_grad=True), torch.randn(3, requires_grad=True)
    residual = torch.randn_like(x).detach().requires_grad_() if with_residual else None
    drop = (torch.tensor(3), 2**31, 2.0, 5)
    forward = torch.ops.normdrop.batch_norm.default
    args = (x, None, None, weight, bias, residual, True, 1e-5, slope, *drop)
    torch.library.opcheck(forward, args)
    with torch.no_grad():
        _, mean, var, positive = forward(*args)
    args = (
        torch.randn_like(x), x, mean, var, weight, bias, positive, True, 1e-5, slope,
        True, True, with_residual, *drop,
    )  # fmt: skip
    torch.library.opcheck(
        torch.ops.normdrop.batch_norm_backward.default,
        args,
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_batch_norm_dropout_compiles_to_one_graph(dynamic, layout):
    torch._dynamo.reset()
    weight, bias = torch.rand(16, requires_grad=True), torch.rand(16, requires_grad=True)

    def run(x):
        return batch_norm(x, None, None, weight, bias, True, activation="relu", keep=0.5)

    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (8, 5):
        x = torch.randn(batch, 16, 28, 28).to(memory_format=layout).requires_grad_()
        grad, results = torch.randn_like(x), []
        for function in (run, compiled):
            torch.manual_seed(7)
            y = function(x)
            results.append([y, *torch.autograd.grad(y, (x, weight, bias), grad)])
        for one, two in zip(*results, strict=True):
            torch.testing.assert_close(one, two)
            assert one.stride() == two.stride()


def test_batch_norm_dropout_functional_transforms():
    x, mask = torch.randn(4, 3, 40, 40), mask_of((4, 3, 40, 40), seed=2)

    def ours(x):
        return batch_norm(x, None, None, training=True, activation="relu", keep=KEEP, seed=2)

    def theirs(x):
        y = torch.relu(torch.nn.functional.batch_norm(x, None, None, training=True))
        return torch.where(mask, y / KEEP, 0.0)

    for run in (
        lambda f: torch.func.grad(lambda x: f(x).sin().sum())(x),
        lambda f: torch.func.jvp(f, (x,), (x.cos(),))[1],
        lambda f: torch.func.vmap(f)(torch.stack([x, 2 * x])),
    ):
        torch.testing.assert_close(run(ours), run(theirs), rtol=1e-3, atol=1e-4)


def test_batch_norm_dropout_saves_x_and_the_seed():
    x = torch.randn(16, 64, 28, 28, requires_grad=True)
    weight, bias = torch.ones(64, requires_grad=True), torch.zeros(64, requires_grad=True)
    saved = {}

    def pack(t):
        saved[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = batch_norm(x, None, None, weight, bias, True, activation="relu", keep=0.5)
    if has_kernels():
        assert sum(saved.values()) <= x.numel() * 4 + 5 * 64 * 8
        # One node of the graph: nothing but leaves before it.
        assert {type(node).__name__ for node, _ in y.grad_fn.next_functions if node} == {
            "AccumulateGrad"
        }


@of_the_kernel
def test_batch_norm_dropout_is_one_operator_each_way():
    x = torch.randn(8, 16, 28, 28, requires_grad=True)
    with torch.profiler.profile() as profile:
        batch_norm(
            x, None, None, training=True, activation="relu", keep=0.5, seed=1
        ).sum().backward()
    names = [event.name for event in profile.events() if event.name.startswith("normdrop::")]
    assert names == ["normdrop::batch_norm", "normdrop::batch_norm_backward"]


def test_batch_norm_dropout_refuses_a_negative_sample_offset():
    for shape in ((4, 3), (8, 16, 28, 28)):
        with pytest.raises(ValueError, match="sample_offset must not be negative, got -1"):
            batch_norm(torch.randn(shape), None, None, training=True, keep=0.5, sample_offset=-1)


@of_the_kernel
def test_batch_norm_dropout_operator_refuses_what_it_cannot_do():
    def call(x, seed=None, threshold=2**31, sample_offset=0):
        seed = torch.tensor(1) if seed is None else seed
        torch.ops.normdrop.batch_norm(
            x, None, None, None, None, None, True, 1e-5, 1.0, seed, threshold, 2.0, sample_offset
        )

    x = torch.randn(4, 3, 5, 5)
    for run, message in (
        (lambda: call(x, torch.tensor(1.0)), "seed must be one int64 element, got 1 of Float"),
        (lambda: call(x, torch.tensor([1, 2])), "seed must be one int64 element, got 2 of Long"),
        (lambda: call(x, threshold=-1), r"threshold must be in \[0, 2\^32\], got -1"),
        (lambda: call(x, sample_offset=-1), "sample_offset must not be negative, got -1"),
        (lambda: call(x.transpose(2, 3)), "dropout needs x to be contiguous or channels_last"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run()


@of_the_kernel
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_batch_norm_dropout_mask_is_that_of_every_instruction_set(isa, tmp_path):
    program = (
        "import sys, torch\n"
        "from normdrop.functional import batch_norm\n"
        "torch.manual_seed(0)\n"
        "results = []\n"
        "for size in ((8, 24, 16, 16), (5, 33, 13, 13), (6, 64, 7, 7), (700, 70)):\n"
        "    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):\n"
        "        x = (torch.rand(size) + 1).to(dtype)\n"
        "        for layout in range(2 if len(size) == 4 else 1):\n"
        "            x = x.to(memory_format=torch.channels_last) if layout else x\n"
        "            y = batch_norm(x, None, None, None, torch.full(size[1:2], 9.0).to(dtype),\n"
        "                           True, keep=0.3, seed=5)\n"
        "            results.append(y != 0)\n"
        "torch.save(results, sys.argv[1])\n"
    )
    path = tmp_path / "masks.pt"
    subprocess.run(
        [sys.executable, "-c", program, str(path)],
        check=True,
        env={**os.environ, "NORMDROP_ISA": isa},
        timeout=600,
    )
    masks = torch.load(path)
    assert len(masks) == 28
    for mask in masks:
        assert torch.equal(mask, mask_of(tuple(mask.shape), seed=5, keep=0.3))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_batch_norm_dropout_any_shape_and_layout(data):
    dims = data.draw(st.integers(2, 5))
    sizes = st.integers(1, 17)
    shape = data.draw(
        st.lists(sizes, min_size=dims, max_size=dims).filter(
            lambda s: s[1] < torch.Size(s).numel() < 40000
        )
    )
    layout = data.draw(st.sampled_from(["contiguous", "channels_last"]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    offset = data.draw(st.integers(0, 70))
    x = arrange(torch.randn(shape).to(dtype), layout)
    bias = torch.full((shape[1],), 99.0, dtype=torch.promote_types(dtype, torch.float32))
    drop = {"keep": 0.5, "seed": 6, "sample_offset": offset}
    y = batch_norm(x, None, None, None, bias, True, 0.1, 1e-3, **drop)
    assert torch.equal(y != 0, mask_of(tuple(shape), seed=6, sample_offset=offset, keep=0.5))
