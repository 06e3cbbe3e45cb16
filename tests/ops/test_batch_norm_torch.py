"""Batch normalization inside torch: compile, export, func, autocast, checkpointing, threads."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from normdrop.functional import batch_norm
from normdrop.ops import batch_norm as ops

SHAPE = (8, 16, 24, 24)
of_the_kernel = pytest.mark.skipif(not ops.has_kernels(), reason="there is no kernel")


class Layer(torch.nn.Module):
    def __init__(self, channels: int = 16, activation: str | None = "relu") -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(channels) + 0.5)
        self.bias = torch.nn.Parameter(torch.randn(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.activation = activation

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            residual=residual,
            activation=self.activation,
        )


def plain(layer: Layer, x: Tensor, residual: Tensor | None = None) -> Tensor:
    y = torch.nn.functional.batch_norm(
        x, layer.running_mean, layer.running_var, layer.weight, layer.bias, layer.training
    )
    if residual is not None:
        y = y + residual
    return torch.relu(y) if layer.activation else y


@of_the_kernel
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("slope", "with_residual"), [(1.0, True), (0.0, False), (0.01, True)])
def test_batch_norm_opcheck(layout, slope, with_residual):
    x = torch.randn(4, 3, 5, 7).to(memory_format=layout).requires_grad_()
    weight, bias = torch.rand(3, requires_grad=True), torch.randn(3, requires_grad=True)
    residual = torch.randn_like(x).detach().requires_grad_() if with_residual else None
    forward = torch.ops.normdrop.batch_norm.default
    for training in (True, False):
        statistics = (None, None) if training else (torch.zeros(3), torch.ones(3))
        args = (x, *statistics, weight, bias, residual, training, 1e-5, slope)
        torch.library.opcheck(forward, args)
        with torch.no_grad():
            _, mean, var, positive = forward(*args)
        args = (
            torch.randn_like(x), x, mean, var, weight, bias, positive, training, 1e-5, slope,
            True, True, with_residual and slope != 1.0,
        )  # fmt: skip
        torch.library.opcheck(
            torch.ops.normdrop.batch_norm_backward.default,
            args,
            # The first derivative of the backward is checked by gradgradcheck: the operator treats
            # mean and var as functions of x.
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
        )
    torch.library.opcheck(
        torch.ops.normdrop.batch_norm_update.default,
        (torch.zeros(3), torch.ones(3), mean, var, 140, 0.1, 0),
    )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_batch_norm_compiles_to_one_graph(dynamic, layout):
    torch._dynamo.reset()
    layer, other = Layer(), Layer()
    other.load_state_dict(layer.state_dict())
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (8, 5):
        x = torch.randn(batch, *SHAPE[1:]).to(memory_format=layout).requires_grad_()
        residual = torch.randn_like(x).detach().requires_grad_()
        for module in (layer, other):
            module.zero_grad()
        y, wanted = compiled(x, residual), other(x, residual)
        torch.testing.assert_close(y, wanted)
        assert y.stride() == wanted.stride()
        inputs = [x, residual]
        grad = torch.randn_like(y)
        for one, two in zip(
            torch.autograd.grad(y, [*inputs, *layer.parameters()], grad),
            torch.autograd.grad(wanted, [*inputs, *other.parameters()], grad),
            strict=True,
        ):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(layer.running_mean, other.running_mean)
        torch.testing.assert_close(layer.running_var, other.running_var)
    layer.eval()
    other.eval()
    torch.testing.assert_close(compiled(x, residual), other(x, residual))


def test_batch_norm_compiles_with_inductor():
    torch._dynamo.reset()
    layer, other = Layer(), Layer()
    other.load_state_dict(layer.state_dict())
    x = torch.randn(SHAPE, requires_grad=True)
    y, wanted = torch.compile(layer, fullgraph=True)(x), plain(other, x)
    torch.testing.assert_close(y, wanted)
    grad = torch.randn_like(y)
    (one,), (two,) = (torch.autograd.grad(out, [x], grad) for out in (y, wanted))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.running_var, other.running_var)


@pytest.mark.parametrize("strict", [False, True])
def test_batch_norm_exports(strict):
    layer = Layer().eval()
    x = torch.randn(SHAPE)
    program = torch.export.export(
        layer, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch")}}, strict=strict
    )
    other = torch.randn(3, *SHAPE[1:])
    torch.testing.assert_close(program.module()(other), plain(layer, other))


def test_batch_norm_functional_transforms():
    """A formula registered by register_autograd gives jvp zero tangents, and vmap no rule."""
    layer = Layer(3)
    vectors = dict(layer.named_parameters())
    x = torch.randn(4, 3, 40, 40)

    def loss(vectors, function, x):
        out = function(x, vectors["weight"], vectors["bias"])
        return out.sin().sum()

    def ours(x, weight, bias):
        return batch_norm(x, None, None, weight, bias, True, activation="relu")

    def theirs(x, weight, bias):
        return torch.relu(torch.nn.functional.batch_norm(x, None, None, weight, bias, True))

    for transform in (torch.func.grad, torch.func.jacrev):
        one, two = (transform(loss)(vectors, f, x) for f in (ours, theirs))
        for name in vectors:
            torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-3)

    batch = torch.randn(5, 4, 3, 40, 40)
    for run in (
        lambda f: torch.func.vmap(f, in_dims=(0, None, None))(batch, *vectors.values()),
        lambda f: torch.func.vmap(torch.func.grad(lambda x: f(x, *vectors.values()).sin().sum()))(
            batch
        ),
        lambda f: torch.func.jvp(lambda x: f(x, *vectors.values()), (x,), (x.cos(),))[1],
    ):
        torch.testing.assert_close(run(ours), run(theirs), rtol=1e-3, atol=1e-4)
    assert torch.func.jvp(lambda x: ours(x, *vectors.values()), (x,), (x.cos(),))[1].ne(0).any()

    state = {**vectors, **dict(layer.named_buffers())}
    called = torch.func.functional_call(layer, state, (x,))
    torch.testing.assert_close(called, theirs(x, *vectors.values()))
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(lambda x: batch_norm(x, torch.zeros(3), torch.ones(3), training=True))(
            batch
        )


def test_batch_norm_forward_mode():
    x, tangent = torch.randn(4, 3, 40, 40), torch.randn(4, 3, 40, 40)
    tangents = []
    for function in (batch_norm, torch.nn.functional.batch_norm):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, tangent)
            y = function(dual, None, None, training=True)
            tangents.append(torch.autograd.forward_ad.unpack_dual(y).tangent)
    torch.testing.assert_close(*tangents, rtol=1e-4, atol=1e-5)


def test_batch_norm_autocast_keeps_the_input_s_type():
    x = torch.randn(SHAPE)
    layer = Layer()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.float32
        assert layer(x.bfloat16()).dtype == torch.bfloat16
        convolved = torch.nn.functional.conv2d(x, torch.randn(16, 16, 1, 1))
        y = layer(convolved)
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_batch_norm_activation_checkpointing(use_reentrant):
    layer, other = Layer(), Layer()
    other.load_state_dict(layer.state_dict())
    x = torch.randn(SHAPE, requires_grad=True)
    grad = torch.randn(SHAPE)
    checkpoint(layer, x, use_reentrant=use_reentrant).backward(grad)
    one, x.grad = x.grad, None
    other(x).backward(grad)
    torch.testing.assert_close(one, x.grad)
    torch.testing.assert_close(layer.weight.grad, other.weight.grad)


def test_batch_norm_backward_twice_and_retained_graphs():
    x = torch.randn(SHAPE, requires_grad=True)
    y = batch_norm(x, None, None, training=True).pow(2).mean()
    y.backward(retain_graph=True)
    first, x.grad = x.grad, None
    y.backward()
    assert torch.equal(first, x.grad)
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


def test_batch_norm_notices_an_input_changed_in_place():
    x = torch.randn(SHAPE, requires_grad=True) * 1
    y = batch_norm(x, None, None, training=True)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_batch_norm_from_eight_threads_at_once():
    x = torch.randn(SHAPE)
    grad = torch.randn(SHAPE)
    layer = Layer()

    def run() -> tuple[Tensor, Tensor]:
        own = x.clone().requires_grad_()
        y = batch_norm(own, None, None, layer.weight, layer.bias, True, activation="relu")
        return y.detach(), torch.autograd.grad(y, own, grad)[0]

    wanted = run()
    results: list[tuple[Tensor, Tensor]] = []
    threads = [
        threading.Thread(target=lambda: results.extend(run() for _ in range(5))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 40
    for result in results:
        assert torch.equal(result[0], wanted[0])
        assert torch.equal(result[1], wanted[1])


class _Normalized(torch.utils.data.Dataset[Tensor]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(index)
        return batch_norm(torch.randn(SHAPE, generator=generator), None, None, training=True)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
def test_batch_norm_in_a_forked_worker():
    torch.set_num_threads(2)
    data = _Normalized()
    wanted = [data[i] for i in range(4)]  # the kernel has run, with its threads, before the fork
    loader = torch.utils.data.DataLoader(
        data, batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=60
    )
    for one, two in zip(loader, wanted, strict=True):
        assert torch.equal(one, two)


@of_the_kernel
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_batch_norm_instruction_sets_agree(isa, tmp_path):
    """NORMDROP_ISA takes less than the processor has."""
    program = (
        "import sys, torch\n"
        "from normdrop.functional import batch_norm\n"
        "torch.manual_seed(0)\n"
        "results = []\n"
        "for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):\n"
        "    for size in ((4, 6, 9, 11), (33, 70), (2, 3, 50, 100)):\n"
        "        x = torch.randn(size).to(dtype).requires_grad_()\n"
        "        r = torch.randn(size).to(dtype).requires_grad_()\n"
        "        options = {'training': True, 'residual': r}\n"
        "        y = batch_norm(x, None, None, activation='relu', **options)\n"
        "        far = batch_norm(x, None, None, **options).abs() > 0.01  # no sign turns there\n"
        "        grads = torch.autograd.grad(y, (x, r), (torch.randn(size) * far).to(dtype))\n"
        "        results.append([t.detach() for t in (y, *grads)])\n"
        "torch.save(results, sys.argv[1])\n"
    )
    results = []
    for name in (isa, ""):
        path = tmp_path / f"{name or 'own'}.pt"
        environment = {"NORMDROP_ISA": name} if name else {}
        subprocess.run(
            [sys.executable, "-c", program, str(path)],
            check=True,
            env={**os.environ, **environment},
            timeout=600,
        )
        results.append(torch.load(path))
    for ours, theirs in zip(*results, strict=True):
        for one, two in zip(ours, theirs, strict=True):
            off = (one.double() - two.double()).abs()
            assert off.max() <= 8 * torch.finfo(one.dtype).eps * two.abs().max()
