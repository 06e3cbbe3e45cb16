"""The batch normalization modules against the lecture's equation and against torch's modules."""

import copy
import io
import pickle
from functools import partial

import pytest
import torch

import normdrop
from normdrop import functional, nn

PAIRS = [
    (nn.BatchNorm1d, torch.nn.BatchNorm1d, (7, 5)),
    (nn.BatchNorm1d, torch.nn.BatchNorm1d, (4, 5, 3)),
    (nn.BatchNorm2d, torch.nn.BatchNorm2d, (4, 5, 3, 3)),
    (nn.BatchNorm3d, torch.nn.BatchNorm3d, (2, 5, 3, 2, 3)),
]


def equation(x, weight, bias, eps):
    """The lecture's y_k = γ_k (x_k − μ_k) / sqrt(σ_k² + ε) + α_k, channel by channel in float64."""
    x = x.double()
    y = torch.empty_like(x)
    for k in range(x.shape[1]):
        values = x[:, k]
        mean = values.sum() / values.numel()
        variance = ((values - mean) ** 2).sum() / values.numel()
        y[:, k] = weight[k].double() * (values - mean) / (variance + eps).sqrt() + bias[k].double()
    return y


def randomized(module):
    """γ and α that are not 1 and 0, so that a mix-up shows."""
    with torch.no_grad():
        module.weight.uniform_(0.5, 2.0)
        module.bias.uniform_(-1.0, 1.0)
    return module


@pytest.mark.parametrize(("ours", "theirs", "shape"), PAIRS)
def test_batch_norm_is_the_lectures_equation(ours, theirs, shape):
    layer = randomized(ours(shape[1]))
    x = torch.randn(shape) * 3 + 2
    torch.testing.assert_close(
        layer(x).double(), equation(x, layer.weight, layer.bias, layer.eps), rtol=1e-5, atol=1e-5
    )


def test_batch_norm_of_a_batch_matrix_has_mean_zero_and_variance_one_per_feature():
    x = torch.randn(1000, 4, dtype=torch.float64) * torch.tensor([1.0, 10.0, 0.1, 5.0]) + 7
    y = nn.BatchNorm1d(4, eps=1e-12, dtype=torch.float64)(x)
    torch.testing.assert_close(y.mean(0), torch.zeros(4, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(
        y.var(0, correction=0), torch.ones(4, dtype=torch.float64), atol=1e-9, rtol=0
    )


def test_batch_norm_after_the_lectures_first_convolution():
    """A 224×224×3 input through conv3-64, "same" padding, gives 224×224×64, 64 γ and 64 α."""
    convolution = torch.nn.Conv2d(3, 64, 3, padding="same")
    layer = randomized(nn.BatchNorm2d(64))
    with torch.no_grad():
        x = convolution(torch.rand(2, 3, 224, 224))
        y = layer(x)
    assert y.shape == (2, 64, 224, 224)
    assert layer.weight.shape == layer.bias.shape == (64,)
    torch.testing.assert_close(
        y.double(), equation(x, layer.weight, layer.bias, layer.eps), rtol=1e-4, atol=1e-5
    )


def test_batch_norm_at_the_input_normalizes_the_data():
    pixels = torch.rand(16, 3, 8, 8) * torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1) + 5
    network = torch.nn.Sequential(nn.BatchNorm2d(3), torch.nn.Conv2d(3, 4, 3))
    normalized = network[0](pixels)
    assert normalized.mean(dim=(0, 2, 3)).abs().max() < 1e-5
    torch.testing.assert_close(network(pixels), network[1](normalized))


@pytest.mark.parametrize(("ours", "theirs", "shape"), PAIRS)
@pytest.mark.parametrize("momentum", [0.1, None, 0.0, 1.0])
def test_batch_norm_trains_and_evaluates_as_torch(ours, theirs, shape, momentum):
    reference = randomized(theirs(shape[1], momentum=momentum)).double()
    layer = ours(shape[1], momentum=momentum, dtype=torch.float64)
    layer.load_state_dict(reference.state_dict())
    for _ in range(3):
        x = torch.randn(shape, dtype=torch.float64) * 2 + 1
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        upstream = torch.randn(shape, dtype=torch.float64)
        y, expected = layer(a), reference(b)
        torch.testing.assert_close(y, expected)
        y.backward(upstream)
        expected.backward(upstream)
        torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(layer.weight.grad, reference.weight.grad)
    torch.testing.assert_close(layer.bias.grad, reference.bias.grad)
    torch.testing.assert_close(layer.state_dict(), reference.state_dict())
    torch.testing.assert_close(layer.eval()(x), reference.eval()(x))


@pytest.mark.parametrize(
    "options",
    [{"affine": False}, {"bias": False}, {"track_running_stats": False}, {"eps": 0.5}],
    ids=str,
)
def test_batch_norm_options_as_torch(options):
    x = torch.randn(6, 3, 4, 4)
    layer = nn.BatchNorm2d(3, **options)
    reference = torch.nn.BatchNorm2d(3, **{k: v for k, v in options.items() if k != "bias"})
    if options.get("bias") is False:
        reference.register_parameter("bias", None)
    assert list(layer.state_dict()) == list(reference.state_dict())
    torch.testing.assert_close(layer(x), reference(x))
    torch.testing.assert_close(layer.eval()(x), reference.eval()(x))


def test_batch_norm_tracking_switched_off_later_stops_updates_but_keeps_the_buffers():
    layer = nn.BatchNorm1d(2)
    layer(torch.randn(8, 2))
    before = layer.running_mean.clone()
    layer.track_running_stats = False
    layer(torch.randn(8, 2) + 9)
    torch.testing.assert_close(layer.running_mean, before)
    assert layer.num_batches_tracked == 1
    x = torch.randn(3, 2)
    scale = (layer.running_var + layer.eps).rsqrt()
    torch.testing.assert_close(layer.eval()(x), (x - before) * scale)


_LEAKY_02 = partial(torch.nn.functional.leaky_relu, negative_slope=0.2)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "leaky_relu(0.2)", "silu"])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_with_residual_and_activation_is_their_sequence(activation, training):
    plain = torch.nn.BatchNorm2d(4).train(training).double()
    layer = nn.BatchNorm2d(4, activation=activation, dtype=torch.float64).train(training)
    x, shortcut = torch.randn(2, 3, 4, 5, 5, dtype=torch.float64).unbind(0)
    a = [x.clone().requires_grad_(), shortcut.clone().requires_grad_()]
    b = [x.clone().requires_grad_(), shortcut.clone().requires_grad_()]
    activate = getattr(torch.nn.functional, activation, _LEAKY_02)
    y, expected = layer(a[0], residual=a[1]), activate(plain(b[0]) + b[1])
    torch.testing.assert_close(y, expected)
    y.sin().sum().backward()
    expected.sin().sum().backward()
    for ours, theirs in zip(a, b, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_batch_norm_with_dropout_is_their_sequence():
    x = torch.randn(8, 3, 4, 4)
    y = functional.batch_norm(x, None, None, training=True, activation="relu", keep=0.7, seed=5)
    separate = functional.dropout(
        torch.relu(functional.batch_norm(x, None, None, training=True)), keep=0.7, seed=5
    )
    torch.testing.assert_close(y, separate)
    evaluated = functional.batch_norm(x, torch.zeros(3), torch.ones(3), keep=0.7)
    torch.testing.assert_close(evaluated, x / (1 + 1e-5) ** 0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_batch_norm_statistics_stay_float32_in_a_half_module(dtype):
    """A float16 variance overflows, a bfloat16 mean sticks at 96 for a true 100 (torch's do)."""
    layer = nn.BatchNorm1d(2).to(dtype)
    assert layer.weight.dtype == dtype
    assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32
    x = torch.randn(64, 2) * torch.tensor([1.0, 400.0]) + torch.tensor([100.0, 0.0])
    for _ in range(200):
        layer(x.to(dtype))
    assert torch.isfinite(layer.running_var).all()
    torch.testing.assert_close(
        layer.running_mean[0], x.to(dtype)[:, 0].float().mean(), rtol=1e-3, atol=0
    )
    assert nn.BatchNorm1d(2, dtype=dtype).running_var.dtype == torch.float32


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_batch_norm_half_module_takes_small_inputs(monkeypatch, dtype, training, kernels):
    """Few elements go to torch's operator, which wants γ, α and the statistics of one type."""
    if not kernels:
        monkeypatch.setattr("normdrop.ops.paths.has_kernels", lambda: False)
    x = torch.randn(4, 6, 5, 5)
    expected = torch.nn.BatchNorm2d(6).train(training)(x)
    layer = nn.BatchNorm2d(6).to(dtype).train(training)
    y = layer(x.to(dtype))
    y.sum().backward()
    assert y.dtype == layer.weight.grad.dtype == layer.bias.grad.dtype == dtype
    torch.testing.assert_close(y.float(), expected, rtol=2e-2, atol=2e-2)


def _loaded(layer, dtype, **options):
    state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in _state(layer)}
    layer.load_state_dict(state, **options)
    return layer


def _state(layer):
    return layer.state_dict().items()


def _swapped(layer, dtype):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return _loaded(layer, dtype, assign=True)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def _assigned(layer, dtype):
    layer.running_mean, layer.running_var = (
        layer.running_mean.to(dtype),
        layer.running_var.to(dtype),
    )
    return layer


def _unpickled(layer, dtype):
    for name in ("running_mean", "running_var"):
        layer._buffers[name] = layer._buffers[name].to(dtype)  # as older pickles have them
    return pickle.loads(pickle.dumps(layer))


def _reverted(layer, dtype):
    with normdrop.reverted(layer):
        layer.to(dtype)
    return layer


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "arrive",
    [
        lambda layer, dtype: layer.to(dtype),
        lambda layer, dtype: torch.nn.Sequential(layer).type(dtype)[0],
        lambda layer, dtype: _loaded(layer, dtype),
        lambda layer, dtype: _loaded(layer, dtype, assign=True),
        lambda layer, dtype: _loaded(layer.to("meta"), dtype).to_empty(device="cpu"),
        lambda layer, dtype: normdrop.convert(torch.nn.BatchNorm2d(3).to(dtype)),
        *(_swapped, _assigned, _unpickled, _reverted),
    ],
    ids=[
        *("to", "type", "load", "load_assign", "load_meta", "convert"),
        *("swap", "assign", "unpickle", "reverted"),
    ],
)
def test_batch_norm_statistics_are_float32_however_they_arrive(arrive, dtype):
    layer = arrive(nn.BatchNorm2d(3), dtype)
    assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32
    assert [name for name, _ in layer.named_buffers()] == list(nn.BatchNorm2d(3)._buffers)


def test_batch_norm_loaded_in_bfloat16_follows_a_mean_of_100():
    layer = _loaded(nn.BatchNorm1d(1), torch.bfloat16, assign=True)
    x = torch.full((64, 1), 100.0) + torch.linspace(-1, 1, 64)[:, None]
    for _ in range(200):
        layer(x.bfloat16())
    assert layer.running_mean.item() == pytest.approx(100.0, abs=0.1)


def test_batch_norm_conversion_to_half_does_not_round_the_statistics():
    layer = nn.BatchNorm1d(1)
    layer.running_mean.fill_(1.0001)
    assert layer.half().running_mean.item() == pytest.approx(1.0001, abs=1e-7)
    assert layer.double().running_mean.dtype == torch.float64


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_batch_norm_nonfinite_batches(value):
    """One NaN batch leaves torch's running_mean NaN for ever (pytorch#1206)."""
    x = torch.randn(4, 3)
    x[0, 1] = value
    propagating = nn.BatchNorm1d(3)
    propagating(x)
    assert not torch.isfinite(propagating.running_mean[1])
    skipping = nn.BatchNorm1d(3, nonfinite="skip")
    before = copy.deepcopy(skipping.state_dict())
    skipping(x)
    torch.testing.assert_close(skipping.running_mean, before["running_mean"])
    torch.testing.assert_close(skipping.running_var, before["running_var"])
    raising = nn.BatchNorm1d(3, nonfinite="raise")
    with pytest.raises(RuntimeError, match=r"NaN or inf"):
        raising(x)
    torch.testing.assert_close(raising.running_mean, before["running_mean"])
    skipping(torch.randn(4, 3))
    assert torch.isfinite(skipping.running_mean).all()


def test_batch_norm_empty_batch():
    layer = nn.BatchNorm2d(3)
    x = torch.empty(0, 3, 4, 4, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 3, 4, 4)
    assert not layer.weight.grad.any()
    assert not layer.running_mean.any()
    assert layer.num_batches_tracked == 1


ERRORS = [
    (
        lambda: nn.BatchNorm2d(3)(torch.randn(2, 3, 4)),
        ValueError,
        "expected 4D input (got 3D input)",
    ),
    (
        lambda: nn.BatchNorm1d(3)(torch.randn(1, 3)),
        ValueError,
        "Expected more than 1 value per channel when training, got input size torch.Size([1, 3])",
    ),
    (
        lambda: nn.BatchNorm1d(3)(torch.randn(5, 4)),
        RuntimeError,
        "running_mean should contain 4 elements not 3",
    ),
    (
        lambda: nn.BatchNorm1d(3, eps=0.0)(torch.randn(5, 3)),
        ValueError,
        "batch_norm eps must be positive during training, but got 0.0",
    ),
    (
        lambda: functional.batch_norm(torch.randn(5, 3), None, None, torch.ones(1), training=True),
        RuntimeError,
        "weight should contain 3 elements not 1",
    ),
    *(
        (
            lambda given=given: functional.batch_norm(torch.randn(5, 3), *given, training=True),
            ValueError,
            "running_mean and running_var must either both be None or neither be None",
        )
        for given in ((torch.zeros(3), None), (None, torch.ones(3)))
    ),
    (lambda: nn.BatchNorm1d(3, activation="gelu"), ValueError, "got 'gelu'"),
    (lambda: nn.BatchNorm1d(3, nonfinite="ignore"), ValueError, "got 'ignore'"),
    (
        lambda: functional.batch_norm(torch.randn(5, 3), None, None, training=True, keep=0.0),
        ValueError,
        "keep must be in (0, 1], got 0.0",
    ),
    (
        lambda: nn.BatchNorm1d(3)(torch.randn(5, 3), torch.randn(5, 1)),
        ValueError,
        "residual must have the input's shape (5, 3), got (5, 1)",
    ),
]


@pytest.mark.parametrize(("call", "error", "text"), ERRORS, ids=[e[2][:40] for e in ERRORS])
def test_batch_norm_errors(call, error, text):
    with pytest.raises(error) as caught:
        call()
    assert text in str(caught.value)


def test_batch_norm_one_pixel_per_sample_needs_two_samples_but_one_image_is_enough():
    assert nn.BatchNorm2d(3)(torch.randn(1, 3, 2, 2)).shape == (1, 3, 2, 2)


def test_batch_norm_is_torchs_class_and_exchanges_checkpoints_with_it():
    layer, reference = nn.BatchNorm2d(3), randomized(torch.nn.BatchNorm2d(3))
    assert isinstance(layer, torch.nn.BatchNorm2d)
    reference(torch.randn(2, 3, 4, 4))
    layer.load_state_dict(reference.state_dict())
    torch.nn.BatchNorm2d(3).load_state_dict(layer.state_dict())
    assert layer.state_dict()._metadata == reference.state_dict()._metadata
    incomplete = {k: v for k, v in reference.state_dict().items() if k != "num_batches_tracked"}
    nn.BatchNorm2d(3).load_state_dict(incomplete)


def test_batch_norm_pickles_copies_and_describes_itself():
    layer = randomized(nn.BatchNorm2d(3, activation="relu", nonfinite="skip"))
    for twin in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert repr(twin) == repr(layer)
        torch.testing.assert_close(twin.state_dict(), layer.state_dict())
    assert repr(layer).endswith("activation='relu', nonfinite='skip')")
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    nn.BatchNorm2d(3).load_state_dict(torch.load(buffer, weights_only=True))


def test_batch_norm_keeps_the_memory_format():
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert nn.BatchNorm2d(3)(x).is_contiguous(memory_format=torch.channels_last)


def test_batch_norm_buffers_are_written_in_place():
    layer = nn.BatchNorm1d(2)
    mean, count = layer.running_mean, layer.num_batches_tracked
    layer(torch.randn(5, 2))
    assert layer.running_mean is mean
    assert layer.num_batches_tracked is count
    assert count == 1
