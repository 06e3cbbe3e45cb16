"""Off the CPU: torch's generator where nobody asks for a certain mask, Philox where one does.

The meta device shows which way is taken; what the way without Philox computes is tried on the CPU.
"""

import math

import pytest
import torch

import normdrop
from normdrop import functional
from normdrop.ops import dropout as ops
from normdrop.ops import reference


@pytest.fixture
def masks(monkeypatch):
    """The thresholds of the masks that were drawn by Philox."""
    drawn = []
    original = ops.keep_mask

    def noted(shape, threshold, *rest):
        drawn.append(threshold)
        return original(shape, threshold, *rest)

    monkeypatch.setattr(ops, "keep_mask", noted)
    return drawn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inplace", [False, True])
def test_meta_tensors_take_torchs_generator(masks, dtype, inplace):
    x = torch.empty(4, 6, 5, 5, dtype=dtype, device="meta").to(memory_format=torch.channels_last)
    state = torch.get_rng_state()
    for z in (
        functional.dropout(x, 0.3, inplace=inplace),
        functional.dropout(x, keep=0.3, scaling="test", inplace=inplace),
        functional.dropout2d(x, 0.3, inplace=inplace),
        functional.alpha_dropout(x, 0.3, True, inplace),
        normdrop.nn.Dropout(0.5, inplace)(x),
    ):
        assert (z is x) is inplace
        assert (z.shape, z.dtype, z.stride()) == (x.shape, x.dtype, x.stride())
    assert masks == []
    assert torch.equal(torch.get_rng_state(), state)  # the CPU's generator is left alone


@pytest.mark.parametrize("asked", [{"seed": 1}, {"sample_offset": 8}, {"generator": None}])
def test_meta_tensors_take_philox_where_a_mask_is_asked_for(masks, asked):
    if "generator" in asked:
        asked = {"generator": torch.Generator()}
    x = torch.empty(4, 6, device="meta")
    z = functional.dropout(x, 0.5, **asked)
    assert z.shape == x.shape
    assert masks == [2**31]


def test_meta_tensors_with_a_certain_mask_draw_nothing(masks):
    z = functional.dropout(torch.empty(4, 6, device="meta"), keep=0.0)
    assert z.is_meta
    assert masks == [0]


def by_torch(x, keep, scaling="train", shared_dims=()):
    coefficients = (1 / keep if scaling == "train" else 1.0, 0.0, 0.0)
    return ops._drop_by_torch(x, keep, coefficients, shared_dims, is_exported=False)


@pytest.mark.parametrize("scaling", ["train", "test"])
@pytest.mark.parametrize("keep", [0.3, 0.5, 0.9])
def test_torchs_generator_keeps_as_many_and_scales(keep, scaling):
    x = torch.full((1000, 1000), 3.0, requires_grad=True)
    z = by_torch(x, keep, scaling)
    factor = 1 / keep if scaling == "train" else 1.0
    kept = z != 0
    torch.testing.assert_close(z, kept * 3.0 * factor)
    assert abs(kept.float().mean().item() - keep) < 4 * math.sqrt(keep * (1 - keep) / x.numel())
    (grad,) = torch.autograd.grad(z, x, torch.full_like(z, 2.0))
    torch.testing.assert_close(grad, kept * 2.0 * factor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shared_dims", [(), (1,)])
def test_torchs_generator_drops_infinity_and_nan_to_zero(dtype, shared_dims):
    x = torch.tensor([math.inf, -math.inf, math.nan, 1.0], dtype=dtype).repeat(64, 1)
    x.requires_grad_()
    torch.manual_seed(0)
    z = by_torch(x, 0.5, shared_dims=shared_dims)
    torch.manual_seed(0)
    kept = by_torch(torch.ones_like(x), 0.5, shared_dims=shared_dims) != 0
    assert 0 < kept.sum() < kept.numel()
    assert z.dtype is dtype
    torch.testing.assert_close(z, torch.where(kept, x * 2, 0), equal_nan=True)
    (grad,) = torch.autograd.grad(z, x, torch.full_like(z, math.nan))
    assert torch.equal(grad == 0, ~kept)


def test_torchs_generator_shares_draws_and_fills():
    x = torch.randn(50, 20, 3, 3)
    z = by_torch(x, 0.5, shared_dims=(2, 3))
    kept = (z != 0).all(dim=3).all(dim=2)
    torch.testing.assert_close(z, kept[..., None, None] * x * 2)
    assert 0 < kept.sum() < kept.numel()
    torch.manual_seed(4)
    y = ops._drop_by_torch(x, 0.7, (0.9, 0.3, -1.2), (), is_exported=False)
    torch.manual_seed(4)
    mask = torch.rand(x.shape) < 0.7
    torch.testing.assert_close(y, reference.dropout(x, mask, 0.9, 0.3, -1.2))


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_torchs_generator_under_vmap(randomness):
    x = torch.ones(4, 300)
    z = torch.func.vmap(lambda x: by_torch(x, 0.5), randomness=randomness)(x)
    assert set(z.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(z[0], z[1]) is (randomness == "same")
