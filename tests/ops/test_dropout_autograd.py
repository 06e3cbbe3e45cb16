"""Derivatives of dropout, and how it composes with what PyTorch does to functions."""

import math

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import normdrop
from normdrop import functional
from normdrop.ops import dropout as ops

SHAPES = [(30,), (4, 6, 5), (2, 5, 3, 3)]


def fixed(**options):
    return lambda x: functional.dropout(x, keep=0.6, seed=21, **options)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", [{}, {"shared_dims": (-1,)}, {"sample_offset": 3}])
def test_dropout_gradcheck(shape, options):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(fixed(**options), x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(fixed(**options), x)


def test_alpha_dropout_gradcheck():
    def f(x):
        return ops.alpha_dropout(x, 0.7, 0.9, -1.7, 0.3, seed=5)

    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(f, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradient_has_the_mask_of_the_output(dtype):
    x = torch.ones(4, 33, 5, 5, dtype=dtype).to(memory_format=torch.channels_last)
    x.requires_grad_()
    z = functional.dropout(x, keep=0.3)
    upstream = torch.randn(x.shape).to(dtype)  # in another memory format
    z.backward(upstream)
    kept = z != 0
    assert torch.equal(x.grad, torch.where(kept, upstream * (1 / 0.3), 0))
    assert x.grad.dtype is dtype


def test_nothing_but_the_seed_is_kept_for_backward():
    """torch on the CPU keeps a float mask, 4 bytes an element (SEMANTICS, trap 8)."""
    x = torch.randn(1000, 100, requires_grad=True)
    kept = []

    def pack(tensor):
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        functional.dropout(x)
    assert sum(kept) == 8 or not normdrop.has_kernels()


def test_dropped_infinity_has_zero_gradient():
    x = torch.full((100,), math.inf, requires_grad=True)
    z = functional.dropout(x, seed=1)
    z.backward(torch.full((100,), math.nan))
    assert torch.equal(x.grad == 0, z == 0)
    assert (z == 0).any()


def test_keep_zero_has_zero_gradient():
    x = torch.randn(10, requires_grad=True)
    functional.dropout(x, keep=0.0).sum().backward()
    assert torch.equal(x.grad, torch.zeros(10))


def test_in_place_gradient_equals_out_of_place():
    x = torch.randn(3, 40, requires_grad=True)
    (expected,) = torch.autograd.grad(functional.dropout(x.exp(), seed=4).sum(), x)
    y = x.exp() * 1
    z = functional.dropout(y, seed=4, inplace=True)
    assert z is y
    (grad,) = torch.autograd.grad(z.sum(), x)
    torch.testing.assert_close(grad, expected)


def test_in_place_on_a_view_changes_the_base():
    x = torch.randn(4, 6, requires_grad=True)
    base = x * 1
    functional.dropout(base[1:3], seed=4, inplace=True)
    expected = torch.cat([x[:1], functional.dropout(x[1:3], seed=4), x[3:]])
    assert torch.equal(base, expected)
    (a,) = torch.autograd.grad((base**2).sum(), x)
    (b,) = torch.autograd.grad((expected**2).sum(), x)
    torch.testing.assert_close(a, b)


def test_in_place_on_a_leaf_raises_as_torch_does():
    x = torch.randn(4, requires_grad=True)
    with pytest.raises(RuntimeError, match="leaf"):
        functional.dropout(x, inplace=True)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_draws_the_same_mask_again(reentrant):
    def block(x):
        return functional.dropout(functional.dropout(x.sin()).cos()).sin()

    x = torch.randn(50, 20, requires_grad=True)
    torch.manual_seed(2)
    (expected,) = torch.autograd.grad(block(x).sum(), x)
    torch.manual_seed(2)
    checkpoint(block, x, use_reentrant=reentrant).sum().backward()
    torch.testing.assert_close(x.grad, expected)


def test_autocast_keeps_the_type():
    x = torch.randn(10, 10)
    with torch.autocast("cpu", torch.bfloat16):
        assert functional.dropout(x).dtype is torch.float32
        assert functional.dropout(x @ x).dtype is torch.bfloat16


# ---- torch.func --------------------------------------------------------------------------------


def test_func_grad_and_jvp():
    x, tangent = torch.randn(2, 6, 5)
    z = fixed()(x)
    scale = (z != 0) / 0.6
    torch.testing.assert_close(torch.func.grad(lambda x: fixed()(x).sum())(x), scale)
    output, derivative = torch.func.jvp(fixed(), (x,), (tangent,))
    torch.testing.assert_close(output, z)
    torch.testing.assert_close(derivative, scale * tangent)
    torch.testing.assert_close(torch.func.jacrev(fixed())(x.flatten()).diagonal(), scale.flatten())


def test_dual_numbers_have_a_tangent():
    # A custom operator without a rule silently gives a zero tangent.
    x, tangent = torch.randn(2, 30)
    with forward_ad.dual_level():
        z = functional.dropout(forward_ad.make_dual(x, tangent), seed=1)
        torch.testing.assert_close(forward_ad.unpack_dual(z).tangent, (z != 0) * 2 * tangent)


def test_vmap_follows_randomness():
    x = torch.ones(5, 400)
    same = torch.func.vmap(functional.dropout, randomness="same")(x)
    assert torch.equal(same, same[:1].expand(5, -1))
    different = torch.func.vmap(functional.dropout, randomness="different")(x)
    assert len({tuple(row.tolist()) for row in different}) == 5
    assert set(different.unique().tolist()) == {0.0, 2.0}
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(functional.dropout, randomness="error")(x)


def test_vmap_of_grad():
    x = torch.randn(5, 40)
    grads = torch.func.vmap(torch.func.grad(lambda x: fixed()(x).sum()))(x)
    torch.testing.assert_close(grads, torch.stack([(fixed()(row) != 0) / 0.6 for row in x]))


def test_vmap_in_place():
    x = torch.ones(5, 40)
    torch.func.vmap(lambda x: functional.dropout(x, seed=1, inplace=True))(x)
    assert torch.equal(x[3], functional.dropout(torch.ones(40), seed=1))


def test_batched_gradients():
    x = torch.randn(30, requires_grad=True)
    z = fixed()(x)
    (jacobian,) = torch.autograd.grad(z, x, torch.eye(30), is_grads_batched=True)
    torch.testing.assert_close(jacobian.diagonal(), (z != 0) / 0.6)


def test_functional_call():
    model = nn.Sequential(nn.Linear(4, 50), normdrop.nn.Dropout(0.5))
    parameters = {name: p * 2 for name, p in model.named_parameters()}
    x = torch.randn(3, 4)
    torch.manual_seed(1)
    z = torch.func.functional_call(model, parameters, x)
    torch.manual_seed(1)
    assert torch.equal(z, functional.dropout(model[0](x) * 2))


def test_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        model = nn.Sequential(nn.Linear(4, 50), normdrop.nn.Dropout(0.5), nn.Linear(50, 1))
        x = torch.randn(8, 4)
        torch.manual_seed(1)
        expected = torch.autograd.grad(model(x).sum(), model[0].weight)[0]
        torch.manual_seed(1)
        nn.parallel.DistributedDataParallel(model)(x).sum().backward()
        torch.testing.assert_close(model[0].weight.grad, expected)
    finally:
        torch.distributed.destroy_process_group()
