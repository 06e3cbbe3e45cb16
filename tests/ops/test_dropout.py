"""Values: the operator against the reference, bit for bit, over shapes, layouts, types, threads."""

import math
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import normdrop
from normdrop import functional
from normdrop.ops import dropout as ops
from normdrop.ops import reference

TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

SHAPES = [
    (),
    (1,),
    (7,),  # less than a Philox block
    (64,),  # one word of the mask
    (65,),
    (1000003,),  # prime, several threads
    (0, 3),
    (3, 5, 7),
    (256, 96),
    (4, 16, 8, 8),  # channels_last: positions a multiple of 8
    (2, 33, 7, 7),  # odd channels, odd positions
    (2, 3, 32, 32),  # fewer channels than a vector has lanes
    (1, 1030, 3, 3),  # more channels than the kernel's tile
    (3, 21, 4, 6),  # channels_last, positions a multiple of 8, odd channels
    (2, 530, 2, 4),  # more channels than the tile of such a kernel
    (2, 40, 3, 4, 5),
    (5, 1, 3, 1),
]


def with_reference(x, keep, seed, sample_offset=0, shared_dims=()):
    shape = tuple(1 if d in shared_dims else size for d, size in enumerate(x.shape))
    mask = reference.keep_mask(shape, keep, torch.tensor(seed), sample_offset)
    return reference.dropout(x, mask, 1 / keep)


def same(a, b):
    return a.dtype == b.dtype and torch.equal(a, b)


def layouts(x):
    """x in all memory formats that dropout meets; the values are the same."""
    yield x
    if x.dim() == 4:
        yield x.contiguous(memory_format=torch.channels_last)
    if x.dim() == 5:
        yield x.contiguous(memory_format=torch.channels_last_3d)
    if x.dim() >= 2:
        yield x.transpose(0, 1).contiguous().transpose(0, 1)
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), math.nan, dtype=x.dtype)
        wide[..., 1::2] = x
        yield wide[..., 1::2]  # a step in the innermost dimension
        wide[..., 1 : x.shape[-1] + 1] = x
        yield wide[..., 1 : x.shape[-1] + 1]  # rows apart from each other, not aligned


@pytest.mark.parametrize("keep", [0.5, 0.9, 1 - 2**-17])
@pytest.mark.parametrize("shape", SHAPES)
def test_dropout_equals_reference_in_every_layout(shape, keep):
    """torch's mask changes with the memory format (SEMANTICS, trap 8)."""
    x = torch.randn(shape)
    expected = with_reference(x, keep, 17)
    for y in layouts(x):
        z = functional.dropout(y, keep=keep, seed=17)
        assert same(z, expected)
        assert z.stride() == torch.empty_like(y).stride() or z.numel() == 0


@pytest.mark.parametrize("channels", [64, 33])  # with 33 the rows do not begin at whole vectors
def test_dropout_past_the_cache(channels):
    """Results of 16 MiB and more are stored around the cache, where memory is aligned."""
    x = torch.randn(8, channels, 128, 128)
    assert x.numel() * x.element_size() >= 1 << 24
    expected = with_reference(x, 0.7, 23)
    for y in (x, x.contiguous(memory_format=torch.channels_last)):
        assert same(functional.dropout(y, keep=0.7, seed=23), expected)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(1001,), (3, 20, 5, 5)])
def test_dropout_equals_reference_in_every_type(dtype, shape):
    x = torch.randn(shape).to(dtype)
    for y in layouts(x):
        for keep in (0.5, 0.3):
            z = functional.dropout(y, keep=keep, seed=4, sample_offset=3)
            assert same(z, with_reference(x, keep, 4, sample_offset=3))
            assert torch.equal(z != 0, functional.dropout(torch.ones(shape), keep=keep, seed=4,
                                                          sample_offset=3) != 0)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_dropout_equals_reference_for_any_shape_and_strides(data):
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=5), label="sizes")
    order = data.draw(st.permutations(range(len(sizes))), label="order in memory")
    step = data.draw(st.integers(1, 2), label="step of the innermost")
    shared = data.draw(st.sets(st.integers(0, len(sizes) - 1)), label="shared_dims")
    keep = data.draw(st.floats(0.001, 0.999), label="keep")
    seed = data.draw(st.integers(-(2**63), 2**63 - 1), label="seed")
    offset = data.draw(st.integers(0, 2**40), label="sample_offset")
    dtype = data.draw(st.sampled_from(TYPES), label="dtype")
    memory = torch.randn([sizes[d] for d in order[:-1]] + [sizes[order[-1]] * step]).to(dtype)
    x = memory[..., ::step].permute([order.index(d) for d in range(len(sizes))])
    assert list(x.shape) == sizes
    dims = tuple(sorted(shared))
    z = functional.dropout(x, keep=keep, seed=seed, sample_offset=offset, shared_dims=dims)
    assert same(z, with_reference(x, keep, seed, offset, dims))


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_dropout_is_the_same_for_any_number_of_threads(threads):
    """torch draws by one thread, from a serial generator (pytorch#6940, #138199)."""
    x = torch.randn(8, 48, 33, 31)
    expected = with_reference(x, 0.8, 5)
    shared = with_reference(x, 0.8, 5, shared_dims=(2, 3))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for y in layouts(x):
            assert same(functional.dropout(y, keep=0.8, seed=5), expected)
            assert same(functional.dropout(y, keep=0.8, seed=5, shared_dims=(2, 3)), shared)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(12, 7), (12, 3, 5, 5), (12,)])
def test_shards_get_the_whole_batch_mask(shape):
    x = torch.randn(shape)
    whole = functional.dropout(x, seed=2)
    first, rest = x[:5], x[5:]
    shards = [
        functional.dropout(first, seed=2),
        functional.dropout(rest, seed=2, sample_offset=5),
    ]
    assert same(torch.cat(shards), whole)


def test_sample_offset_beyond_32_bits():
    x = torch.ones(3, 50)
    a = functional.dropout(x, seed=1, sample_offset=2**33)
    b = functional.dropout(torch.ones(4, 50), seed=1, sample_offset=2**33 - 1)
    assert same(a, b[1:])
    assert not same(a, functional.dropout(x, seed=1))


@pytest.mark.parametrize("shared", [(2, 3), (1,), (0,), (0, 1, 2, 3), (-1, -2)])
def test_shared_dims_share_one_draw(shared):
    x = torch.ones(6, 20, 5, 4)
    dims = tuple(d % 4 for d in shared)
    for y in layouts(x):
        z = functional.dropout(y, keep=0.5, seed=9, shared_dims=shared)
        assert same(z, with_reference(x, 0.5, 9, shared_dims=dims))
        assert z.stride() == torch.empty_like(y).stride() or z.numel() == 0
        assert torch.equal(z.amin(dims), z.amax(dims))


def test_channel_dropout_is_dropout_on_the_channels_mask():
    x = torch.ones(4, 10, 3, 3)
    torch.manual_seed(1)
    z = functional.dropout2d(x, 0.5)
    torch.manual_seed(1)
    assert torch.equal(z[:, :, 0, 0], functional.dropout(torch.ones(4, 10), 0.5))


@pytest.mark.parametrize("dtype", TYPES)
def test_dropped_infinity_and_nan_give_zero(dtype):
    # torch on CPU multiplies by zero and gives NaN.
    x = torch.tensor([math.inf, -math.inf, math.nan, 1.0] * 25, dtype=dtype)
    for shared in ((), (0,)):
        for seed in range(3):
            mask = functional.dropout(torch.ones(100), seed=seed, shared_dims=shared) != 0
            z = functional.dropout(x, seed=seed, shared_dims=shared)
            assert (z[~mask] == 0).all()
            assert torch.equal(z[mask].isnan(), x[mask].isnan())
            assert torch.equal(z[mask].isinf(), x[mask].isinf())


def test_keep_one_and_zero_are_exact():
    x = torch.tensor([1.5, math.inf, math.nan])
    assert functional.dropout(x, keep=1.0) is x
    assert functional.dropout(x, p=0.0) is x
    assert same(functional.dropout(x, keep=0.0), torch.zeros(3))
    assert same(functional.dropout(x, p=1.0), torch.zeros(3))
    assert same(functional.dropout(x, keep=0.0, scaling="test"), torch.zeros(3))


def test_keep_just_below_one_and_just_above_zero():
    x = torch.ones(100)
    assert (functional.dropout(x, keep=1 - 2**-40) != 0).all()  # rounds to T = 2³²
    assert (functional.dropout(x, keep=2**-40) == 0).all()  # rounds to T = 0


def test_scaling_test_leaves_training_unscaled_and_scales_evaluation():
    x = torch.randn(1000)
    z = functional.dropout(x, keep=0.8, scaling="test", seed=1)
    assert torch.equal(z[z != 0], x[z != 0])
    assert torch.equal(functional.dropout(x, keep=0.8, scaling="test", training=False), x * 0.8)


@pytest.mark.parametrize("dtype", TYPES)
def test_in_place_writes_the_same_and_returns_the_input(dtype):
    x = torch.randn(3, 10, 5, 5).to(dtype)
    expected = functional.dropout(x, seed=3)
    for y in layouts(x):
        y = y.clone() if y.is_contiguous() else y
        assert functional.dropout(y, seed=3, inplace=True) is y
        assert same(y, expected)


def test_in_place_is_seen_by_autograd():
    a = torch.randn(10, requires_grad=True)
    saved = a.exp()
    out = saved * 1
    y = saved.detach()
    functional.dropout(y, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_in_place_on_an_expanded_tensor_is_refused():
    with pytest.raises(RuntimeError, match=r"expanded|single memory location"):
        functional.dropout(torch.ones(3, 1).expand(3, 4), inplace=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_alpha_dropout_equals_its_equation(dtype):
    x = torch.randn(3, 20, 5, 5, dtype=dtype)
    a, low, b = 0.88, -1.758, 0.31
    for shared in ((), (2, 3)):
        shape = (3, 20, 1, 1) if shared else (3, 20, 5, 5)
        mask = reference.keep_mask(shape, 0.7, torch.tensor(6))
        exact = torch.where(mask, x.double(), torch.tensor(low, dtype=torch.float64)) * a + b
        for y in layouts(x):
            z = ops.alpha_dropout(y, 0.7, a, low, b, shared, seed=6)
            torch.testing.assert_close(z, exact.to(dtype))


def test_alpha_dropout_keeps_mean_and_variance():
    x = torch.randn(1 << 20)
    z = functional.alpha_dropout(x, 0.2, training=True)
    assert abs(z.mean().item()) < 0.01
    assert abs(z.var().item() - 1) < 0.01


def test_complex_input_takes_the_reference():
    x = torch.randn(50, dtype=torch.complex64)
    z = functional.dropout(x, keep=0.5, seed=1)
    mask = reference.keep_mask((50,), 0.5, torch.tensor(1))
    assert torch.equal(z, torch.where(mask, x * 2, 0))


def test_integer_input_is_refused():
    with pytest.raises(RuntimeError, match=r"input must be floating-point, got torch\.int64"):
        functional.dropout(torch.ones(3, dtype=torch.int64))


def test_wrong_shared_dims_are_refused():
    with pytest.raises(ValueError, match=r"shared_dims must lie in \[-2, 2\).*got \(2,\)"):
        functional.dropout(torch.ones(3, 3), shared_dims=(2,))


def test_negative_sample_offset_is_refused():
    with pytest.raises(ValueError, match="sample_offset must not be negative, got -1"):
        functional.dropout(torch.ones(3, 3), sample_offset=-1)


@pytest.mark.skipif(not normdrop.has_kernels(), reason="checks of the kernel")
def test_kernel_checks_its_arguments():
    x, seed = torch.ones(3, 3), torch.tensor(1)
    rest = (2**31, 2.0, 0.0, 0.0, 0, [])
    op = torch.ops.normdrop.dropout
    with pytest.raises(RuntimeError, match="seed must be one int64 element"):
        op(x, torch.zeros(2, dtype=torch.int64), *rest)
    with pytest.raises(RuntimeError, match="x must be float32, float64, bfloat16 or float16"):
        op(x.int(), seed, *rest)
    with pytest.raises(RuntimeError, match=r"threshold must be in \[0, 2\^32\], got -1"):
        op(x, seed, -1, *rest[1:])
    with pytest.raises(RuntimeError, match=r"shared_dims must lie in \[0, 2\), got 5"):
        op(x, seed, *rest[:-1], [5])
    with pytest.raises(RuntimeError, match="y must have x's shape and type"):
        torch.ops.normdrop.dropout_into(x, seed, *rest, torch.ones(2, 3))


def test_eight_python_threads_at_once():
    x = torch.randn(64, 3000)
    expected = [with_reference(x, 0.5, seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            results = list(pool.map(lambda seed: functional.dropout(x, seed=seed), range(8)))
            assert all(same(a, b) for a, b in zip(results, expected, strict=True))


class DroppedRows(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return functional.dropout(torch.ones(300, 300), seed=index)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_forked_data_loader_worker_after_a_kernel_call():
    functional.dropout(torch.ones(300, 300), seed=0)
    loader = torch.utils.data.DataLoader(
        DroppedRows(), batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=60
    )
    for index, rows in enumerate(loader):
        assert same(rows, with_reference(torch.ones(300, 300), 0.5, index))
