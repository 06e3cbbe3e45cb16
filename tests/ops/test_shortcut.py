"""A part of x with zeros around it, against torch's slice and pad."""

import pytest
import torch
import torch.nn.functional as F

from normdrop.ops.shortcut import padded_part

ALL = slice(None)
EVERY = slice(None, None, 2)
CASES = [
    ((ALL, ALL, EVERY, EVERY), (0, 0, 0, 0, 0, 5)),  # He et al.'s option A
    ((ALL, ALL, EVERY, EVERY), (0, 0, 0, 0, 2, 3)),
    ((ALL, slice(1, 3)), (1, 2)),
    ((slice(1, None), ALL, slice(0, -1), slice(2, 7, 3)), (2, 0, 0, 1, 1, 0, 0, 2)),
    ((EVERY,), ()),
]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def images(layout, dtype=torch.float64):
    x = torch.randn(3, 4, 7, 8, dtype=dtype, generator=torch.Generator().manual_seed(0))
    return x.contiguous(memory_format=layout).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("index", "pad"), CASES)
def test_values_and_gradients_equal_torchs_and_lie_as_x_does(index, pad, layout, dtype):
    x = images(layout, dtype)
    y, expected = padded_part(x, index, pad), F.pad(x[index], pad)
    assert torch.equal(y, expected)
    assert y.stride() == expected.stride()
    grad = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad(out, x, grad)[0] for out in (y, expected))
    assert torch.equal(ours, theirs)
    assert ours.stride() == x.stride()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_derivatives_of_both_orders(layout):
    x = images(layout)
    for index, pad in CASES:
        assert torch.autograd.gradcheck(lambda x, i=index, p=pad: padded_part(x, i, p), (x,))
        assert torch.autograd.gradgradcheck(lambda x, i=index, p=pad: padded_part(x, i, p), (x,))


def test_inputs_that_are_views():
    index, pad = CASES[0]
    wide = torch.randn(2, 9, 6, 6, requires_grad=True)
    for x in (wide[:, 2:6], wide[:, :1].expand(2, 4, 6, 6), wide.transpose(2, 3)):
        grads = [
            torch.autograd.grad(y.sin().sum(), wide)[0]
            for y in (padded_part(x, index, pad), F.pad(x[index], pad))
        ]
        assert torch.equal(*grads)


def test_transforms_and_tracing_see_plain_torch():
    index, pad = CASES[0]
    x = torch.randn(2, 3, 4, 5, 6)
    expected = F.pad(x[(ALL, *index)], pad)
    assert torch.equal(torch.func.vmap(lambda x: padded_part(x, index, pad))(x), expected)
    grad = torch.func.grad(lambda x: padded_part(x, index, pad).pow(2).sum())(x[0])
    assert torch.equal(torch.count_nonzero(grad), torch.count_nonzero(expected[0]))
    traced = torch.fx.symbolic_trace(lambda x: padded_part(x, index, pad))
    assert torch.equal(traced(x[0]), expected[0])
