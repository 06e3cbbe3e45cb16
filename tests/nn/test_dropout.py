"""The dropout modules and functions: the lecture's equation, and torch's behaviour."""

import copy
import itertools
import math
import pickle
import warnings

import pytest
import torch

from normdrop import functional, nn

MODULES = [
    (nn.Dropout, torch.nn.Dropout, (6, 5)),
    (nn.Dropout1d, torch.nn.Dropout1d, (4, 3, 5)),
    (nn.Dropout2d, torch.nn.Dropout2d, (4, 3, 5, 5)),
    (nn.Dropout3d, torch.nn.Dropout3d, (4, 3, 2, 5, 5)),
    (nn.AlphaDropout, torch.nn.AlphaDropout, (6, 5)),
    (nn.FeatureAlphaDropout, torch.nn.FeatureAlphaDropout, (4, 3, 5, 5)),
]
IDS = [ours.__name__ for ours, _, _ in MODULES]


def test_dropout_is_the_lectures_equation():
    """z_m = σ(⟨r ⊙ x, α_m⟩) with r_i ∈ {0, 1}: the mask applied by hand gives the same unit."""
    x, alpha = torch.randn(7, 20, dtype=torch.float64), torch.randn(20, dtype=torch.float64)
    dropped = functional.dropout(x, keep=0.8, scaling="test", seed=3)
    r = functional.dropout(torch.ones_like(x), keep=0.8, scaling="test", seed=3)
    assert set(r.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(torch.sigmoid(dropped @ alpha), torch.sigmoid((r * x) @ alpha))


@pytest.mark.parametrize("keep", [0.8, 0.5])
def test_both_scalings_agree_in_expectation(keep):
    """E[r ⊙ x / keep] = x, and E[r ⊙ x] = keep · x, which is what evaluation multiplies by."""
    x = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    draws = 40_000
    many = x.expand(draws, 3)
    inverted = functional.dropout(many, keep=keep, seed=1).mean(0)
    lecture = functional.dropout(many, keep=keep, scaling="test", seed=1).mean(0)
    at_test = functional.dropout(x, keep=keep, scaling="test", training=False)
    assert functional.dropout(x, keep=keep, training=False) is x
    torch.testing.assert_close(at_test, keep * x)
    deviation = x.abs() * (keep * (1 - keep) / draws) ** 0.5
    assert ((inverted - x).abs() < 4 * deviation / keep).all()
    assert ((lecture - at_test).abs() < 4 * deviation).all()


def test_dropout_gradient_is_the_mask():
    x = torch.randn(50, 10, requires_grad=True)
    z = functional.dropout(x, keep=0.6, seed=9)
    (gradient,) = torch.autograd.grad(z, x, torch.ones_like(z))
    expected = torch.where(z != 0, torch.tensor(1 / 0.6), torch.tensor(0.0))
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(("ours", "theirs", "shape"), MODULES, ids=IDS)
def test_dropout_in_evaluation_gives_the_same_object(ours, theirs, shape):
    x = torch.randn(shape)
    assert ours(0.5).eval()(x) is x


@pytest.mark.parametrize(("ours", "theirs", "shape"), MODULES, ids=IDS)
def test_dropout_extremes_are_exact(ours, theirs, shape):
    x = torch.randn(shape, requires_grad=True)
    torch.testing.assert_close(ours(0.0)(x), x)
    z = ours(1.0)(x)
    torch.testing.assert_close(z, theirs(1.0)(x))
    z.sum().backward()
    assert not x.grad.any()


@pytest.mark.parametrize(("ours", "theirs", "shape"), MODULES, ids=IDS)
def test_dropout_follows_torchs_generator(ours, theirs, shape):
    x = torch.randn(shape)
    layer = ours(0.5)
    torch.manual_seed(4)
    first, second = layer(x), layer(x)
    torch.manual_seed(4)
    torch.testing.assert_close(layer(x), first, rtol=0, atol=0)
    with torch.random.fork_rng():
        layer(x)
    torch.testing.assert_close(layer(x), second, rtol=0, atol=0)


@pytest.mark.parametrize(("ours", "theirs", "shape"), MODULES, ids=IDS)
def test_dropout_is_torchs_class_with_torchs_state(ours, theirs, shape):
    layer = ours(0.3)
    assert isinstance(layer, theirs)
    assert repr(layer) == repr(theirs(0.3))
    assert layer.state_dict() == {}
    for twin in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert twin.p == 0.3


@pytest.mark.parametrize("layer", [nn.Dropout1d, nn.Dropout2d, nn.Dropout3d])
def test_channel_dropout_drops_whole_channels(layer):
    dims = {"1": 1, "2": 2, "3": 3}[layer.__name__[-2]]
    z = layer(0.4)(torch.ones(50, 20, *[3] * dims)).flatten(2)
    assert (z == z[..., :1]).all()
    kept = (z[..., 0] != 0).double().mean().item()
    assert abs(kept - 0.6) < 4 * (0.24 / 1000) ** 0.5
    torch.testing.assert_close(z.max(), torch.tensor(1 / 0.6))


def test_dropout1d_reads_two_dimensions_as_unbatched():
    z = functional.dropout1d(torch.ones(64, 9), 0.5)
    assert (z == z[:, :1]).all()
    assert 0 < (z != 0).double().mean() < 1


def test_dropout2d_warns_as_torch():
    for function in (functional.dropout2d, torch.nn.functional.dropout2d):
        with pytest.warns(UserWarning, match="Received a 3D input to dropout2d"):
            function(torch.ones(2, 3, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        functional.dropout2d(torch.ones(2, 3, 4, 4))


def test_alpha_dropout_values_are_torchs():
    """Kept and dropped elements take the two values that torch gives them."""
    x = torch.zeros(2000, dtype=torch.float64)
    ours = functional.alpha_dropout(x, 0.3, training=True).unique()
    theirs = torch.nn.functional.alpha_dropout(x, 0.3, training=True).unique()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_dropout_inplace_returns_the_same_object():
    x = torch.ones(100)
    z = functional.dropout(x, 0.5, inplace=True, seed=2)
    assert z is x
    torch.testing.assert_close(x, functional.dropout(torch.ones(100), 0.5, seed=2))
    leaf = torch.ones(4, requires_grad=True)
    with pytest.raises(RuntimeError, match="leaf Variable"):
        functional.dropout(leaf, 0.5, inplace=True)


def test_dropped_infinities_and_nans_give_zero():
    """torch on CPU gives nan there; CUDA gives 0, and so do we."""
    x = torch.tensor([float("inf"), float("nan")]).repeat(200)
    z = functional.dropout(x, 0.5, seed=1)
    assert 100 < (z == 0).sum() < 300
    assert not torch.isfinite(z[z != 0]).any()


def test_dropout_shards_get_the_whole_batchs_mask():
    """Data-parallel ranks of one seed drop the same elements otherwise (transformers#31412)."""
    x = torch.ones(10, 3, 5)
    whole = functional.dropout(x, keep=0.5, seed=11)
    parts = [
        functional.dropout(x[a:b], keep=0.5, seed=11, sample_offset=a)
        for a, b in [(0, 3), (3, 4), (4, 10)]
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=0)


def test_dropout_generator_is_used_and_leaves_torchs_alone():
    """torch's dropout takes no generator (pytorch#76580)."""
    x = torch.ones(100)
    generator = torch.Generator().manual_seed(3)
    state = torch.get_rng_state()
    first = functional.dropout(x, generator=generator)
    torch.testing.assert_close(torch.get_rng_state(), state)
    generator.manual_seed(3)
    torch.testing.assert_close(functional.dropout(x, generator=generator), first)


ERRORS = [
    (
        lambda: nn.Dropout(1.5),
        ValueError,
        "dropout probability has to be between 0 and 1, but got 1.5",
    ),
    (lambda: nn.Dropout(float("nan")), ValueError, "has to be between 0 and 1, but got nan"),
    (lambda: nn.Dropout(keep=-0.1), ValueError, "keep has to be between 0 and 1, but got -0.1"),
    (lambda: nn.Dropout(0.5, keep=0.5), ValueError, "give either p"),
    (
        lambda: functional.dropout(torch.ones(3), 0.5, keep=0.5),
        ValueError,
        "got p=0.5 and keep=0.5",
    ),
    (
        lambda: nn.Dropout(0.5, scaling="never"),
        ValueError,
        "must be 'train' or 'test', got 'never'",
    ),
    (lambda: functional.dropout(torch.arange(3)), RuntimeError, "floating"),
    (
        lambda: functional.dropout1d(torch.ones(3)),
        RuntimeError,
        "Expected 2D or 3D input, but received a 1D",
    ),
    (
        lambda: functional.feature_alpha_dropout(torch.ones(3), training=True),
        RuntimeError,
        "Feature dropout requires at least 2 dimensions in the input",
    ),
]


@pytest.mark.parametrize(("call", "error", "text"), ERRORS, ids=[e[2][:30] for e in ERRORS])
def test_dropout_errors(call, error, text):
    with pytest.raises(error) as caught:
        call()
    assert text in str(caught.value)


@pytest.mark.parametrize(("p", "keep"), [(0.1, 0.9), (0.2, 0.8), (0.7, 0.3), (0.9, 0.1)])
def test_keep_is_one_minus_p(p, keep):
    """1 − 0.9 is 0.09999999999999998 in binary."""
    assert nn.Dropout(keep=keep).p == p
    assert nn.Dropout(p).keep == keep


WITH_SCALING = MODULES[:4]


@pytest.mark.parametrize(("ours", "theirs", "shape"), WITH_SCALING, ids=IDS[:4])
def test_modules_hand_on_inplace_and_scaling(ours, theirs, shape):
    x = torch.ones(shape)
    assert ours(0.5, inplace=True)(x) is x
    lectures = ours(0.25, scaling="test")
    assert set(lectures(torch.ones(shape)).unique().tolist()) <= {0.0, 1.0}
    assert lectures.eval()(torch.ones(shape)).eq(0.75).all()


def test_feature_alpha_dropout_drops_whole_channels():
    z = nn.FeatureAlphaDropout(0.5)(torch.zeros(50, 20, 3, 3)).flatten(2)
    assert (z == z[..., :1]).all()
    assert len(z.unique()) == 2


def test_a_module_that_torchs_class_pickled_scales_in_training():
    layer = nn.Dropout.__new__(nn.Dropout)
    layer.__setstate__(vars(torch.nn.Dropout(0.3)))
    assert (layer.p, layer.scaling) == (0.3, "train")
    layer = pickle.loads(pickle.dumps(nn.Dropout(0.3, scaling="test")))
    assert layer.scaling == "test"
    assert repr(layer) == "Dropout(p=0.3, inplace=False, scaling='test')"


def result_of(function, shape, p, training, inplace):
    """What comes back: an error, the values where nothing is left to chance, or the shape."""
    x = torch.full(shape, 3.0)
    try:
        y = function(x, p, training, inplace)
    except RuntimeError as error:
        return str(error).partition(": ")[2] or str(error)
    written = inplace and training
    assert (y.data_ptr() == x.data_ptr()) == (written or p == 0.0 or not training)
    return y.shape if training and p == 0.5 else y.tolist()


@pytest.mark.filterwarnings("ignore:.*dropout[23]d.*")
@pytest.mark.parametrize("dims", range(7))
@pytest.mark.parametrize(
    "name",
    ["dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"],
)
def test_any_number_of_dimensions_is_taken_or_refused_as_in_torch(name, dims):
    shape = (2, 3, 2, 2, 1, 2)[:dims]
    for p, training, inplace in itertools.product((0.0, 0.5, 1.0), (True, False), (True, False)):
        results = [
            result_of(getattr(module, name), shape, p, training, inplace)
            for module in (functional, torch.nn.functional)
        ]
        assert results[0] == results[1], (p, training, inplace)


@pytest.mark.parametrize("name", ["dropout", "dropout2d", "alpha_dropout", "feature_alpha_dropout"])
def test_with_p_of_one_infinity_and_nan_become_zero(name):
    x = torch.tensor([-1.0, math.inf, math.nan, 2.0]).view(1, 4, 1, 1)
    for inplace in (False, True):
        y = getattr(functional, name)(x.clone(), 1.0, True, inplace)
        assert y.flatten().tolist() == [0.0] * 4
