"""The generator against published vectors and against itself in plain integers; seeds."""

import math

import pytest
import torch

from normdrop import functional
from normdrop.ops import random, reference

LOW = 0xFFFFFFFF

# The lines "philox4x32 7 …" and "philox4x32 10 …" of the file kat_vectors of Random123 1.14 (D. E.
# Shaw Research, https://github.com/DEShawResearch/random123): rounds, counter, key, output.
KNOWN_ANSWERS = [
    (7, "00000000 00000000 00000000 00000000", "00000000 00000000",
     "5f6fb709 0d893f64 4f121f81 4f730a48"),
    (7, "ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "5207ddc2 45165e59 4d8ee751 8c52f662"),
    (7, "243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "4dfccaba 190a87f0 c47362ba b6b5242a"),
    (10, "00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (10, "ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (10, "243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


def words(text):
    return [int(word, 16) for word in text.split()]


def signed(seed):
    return seed - 2**64 if seed >= 2**63 else seed


def philox_in_integers(counter, key, rounds):
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & LOW, (p0 >> 32) ^ c3 ^ k1, p0 & LOW
        k0, k1 = (k0 + 0x9E3779B9) & LOW, (k1 + 0xBB67AE85) & LOW
    return [c0, c1, c2, c3]


def keeps_in_integers(i, seed, keep):
    """The rule in functional.dropout's docstring, element by element."""
    key = (seed & LOW, (seed >> 32) & LOW)

    def half_word(stream):
        block = i >> 3
        out = philox_in_integers((block & LOW, block >> 32, stream, 0), key, 7)
        return (out[(i & 7) >> 1] >> (16 * (i & 1))) & 0xFFFF

    threshold = round(keep * 2**32)
    upper, lower = threshold >> 16, threshold & 0xFFFF
    r = half_word(0)
    return r < upper or (r == upper and half_word(1) < lower)


@pytest.mark.parametrize(("rounds", "counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_vectors(rounds, counter, key, expected):
    k0, k1 = words(key)
    seed = torch.tensor(signed(k0 | k1 << 32))
    as_tensors = tuple(torch.tensor([word]) for word in words(counter))
    output = reference.philox(as_tensors, seed, rounds)
    assert [word.item() for word in output] == words(expected)
    assert philox_in_integers(words(counter), (k0, k1), rounds) == words(expected)


@pytest.mark.parametrize("keep", [0.5, 0.8, 0.999, 1 / 3, 2**-16 + 2**-18])
@pytest.mark.parametrize(
    "first",
    [
        0,
        5,  # inside a block
        61,  # across a word of 64
        2**35 - 40,  # the block's number passes 2³²
        2**40 + 3,
    ],
)
def test_mask_follows_the_rule(first, keep):
    seed = 0xA4093822299F31D0
    expected = [keeps_in_integers(first + j, seed, keep) for j in range(150)]
    ones = torch.ones(150, dtype=torch.float64)
    z = functional.dropout(ones, keep=keep, seed=seed, sample_offset=first)
    assert (z != 0).tolist() == expected
    mask = reference.keep_mask((150,), keep, torch.tensor(signed(seed)), first)
    assert mask.tolist() == expected


def test_second_stream_decides_where_sixteen_bits_are_equal():
    # keep is below 2⁻¹⁶, so all that is kept was decided by the second stream.
    keep, count = 0.9 * 2**-16, 1 << 22
    z = functional.dropout(torch.ones(count), keep=keep, seed=11)
    kept = z.nonzero().flatten().tolist()
    assert abs(len(kept) - keep * count) < 4 * math.sqrt(keep * count)
    assert all(keeps_in_integers(i, 11, keep) for i in kept)
    assert torch.equal(z != 0, reference.keep_mask((count,), keep, torch.tensor(11)))


@pytest.mark.parametrize("keep", [0.5, 0.8, 0.9, 0.999, 1 - 2**-20, 1e-6])
def test_keep_rate_over_ten_million_draws(keep):
    count = 10**7
    z = functional.dropout(torch.ones(count, dtype=torch.bfloat16), keep=keep, seed=12345)
    kept = torch.count_nonzero(z).item()
    assert abs(kept - keep * count) < 4 * math.sqrt(count * keep * (1 - keep))


@pytest.mark.parametrize("distance", [1, 2, 8, 64, 1000])
def test_neighbours_are_independent(distance):
    kept = (functional.dropout(torch.ones(1 << 22), keep=0.5, seed=99) != 0).double() * 2 - 1
    correlation = (kept[distance:] * kept[:-distance]).mean().item()
    assert abs(correlation) < 4 / math.sqrt(len(kept) - distance)


@pytest.mark.parametrize("other", [1, 2**32, 2**63])
def test_seeds_that_differ_in_one_bit_are_independent(other):
    def signs(seed):
        return (functional.dropout(torch.ones(1 << 20), keep=0.5, seed=seed) != 0).double() * 2 - 1

    correlation = (signs(0) * signs(other)).mean().item()
    assert abs(correlation) < 4 / math.sqrt(1 << 20)


def test_seed_is_taken_modulo_64_bits():
    x = torch.ones(100)
    assert torch.equal(functional.dropout(x, seed=2**64 - 1), functional.dropout(x, seed=-1))
    assert torch.equal(
        functional.dropout(x, seed=torch.tensor([7], dtype=torch.int32)),
        functional.dropout(x, seed=7),
    )


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_seed_beyond_64_bits_is_refused(seed):
    with pytest.raises(ValueError, match="seed must fit into 64 bits"):
        functional.dropout(torch.ones(3), seed=seed)


@pytest.mark.parametrize("seed", [torch.zeros(2, dtype=torch.int64), torch.zeros(())])
def test_seed_tensor_that_is_not_one_integer_is_refused(seed):
    with pytest.raises(ValueError, match="seed must be an integer or an integer tensor"):
        functional.dropout(torch.ones(3), seed=seed)


def test_a_seed_that_is_no_integer_is_refused():
    with pytest.raises(TypeError, match=r"seed must be an integer .* got 1\.5"):
        functional.dropout(torch.ones(3), seed=1.5)


def test_manual_seed_repeats_the_masks_and_calls_differ():
    x = torch.ones(1000)
    torch.manual_seed(3)
    first = [functional.dropout(x) for _ in range(3)]
    torch.manual_seed(3)
    second = [functional.dropout(x) for _ in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1])


def test_fork_rng_leaves_the_outer_state():
    x = torch.ones(1000)
    torch.manual_seed(3)
    expected = functional.dropout(x)
    torch.manual_seed(3)
    with torch.random.fork_rng(devices=[]):
        functional.dropout(x)
    assert torch.equal(functional.dropout(x), expected)


def test_generator_is_used_and_torch_is_left_alone():
    x = torch.ones(1000)
    state = torch.get_rng_state()
    a = functional.dropout(x, generator=torch.Generator().manual_seed(5))
    b = functional.dropout(x, generator=torch.Generator().manual_seed(5))
    c = functional.dropout(x, generator=torch.Generator().manual_seed(6))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), state)


def test_explicit_seed_and_certain_masks_draw_nothing():
    state = torch.get_rng_state()
    functional.dropout(torch.ones(10), seed=1)
    functional.dropout(torch.ones(10), keep=1.0)
    functional.dropout(torch.ones(10), keep=0.0)
    functional.dropout(torch.ones(10), training=False)
    assert torch.equal(torch.get_rng_state(), state)


def test_draw_under_a_default_device():
    x = torch.ones(10)
    with torch.device("meta"):
        assert functional.dropout(x).device.type == "cpu"


def test_draw_seed_operator_has_a_fake():
    torch.library.opcheck(
        torch.ops.normdrop.draw_seed.default,
        (torch.ones(3), torch.empty(())),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_operator_draws_what_eager_mode_draws():
    torch.manual_seed(8)
    eager = [random.draw_seed(torch.ones(1)).item() for _ in range(3)]
    torch.manual_seed(8)
    drawn = [torch.ops.normdrop.draw_seed(torch.ones(1), torch.empty(())).item() for _ in range(3)]
    assert eager == drawn
    assert len(set(eager)) == 3
