"""fold: the folded model gives the model's numbers, and leaves what it must."""

import copy

import pytest
import torch

from normdrop.surgery.fold import fold

N = torch.nn


def settled(model):
    """The model in evaluation, with statistics, γ and α as training leaves them."""
    for module in model.modules():
        if isinstance(module, N.modules.batchnorm._BatchNorm):
            for name, low, high in (
                ("running_mean", -0.5, 0.5),
                ("running_var", 0.3, 2.0),
                ("weight", 0.5, 1.5),
                ("bias", -0.5, 0.5),
            ):
                tensor = getattr(module, name)
                if tensor is not None:
                    N.init.uniform_(tensor.data, low, high)
    return model.eval()


def in_float64(model, *inputs):
    with torch.no_grad():
        return copy.deepcopy(model).double()(*(x.double() for x in inputs))


def assert_close(got, want):
    scale = float(want.abs().max())
    assert float((got.detach().double() - want).abs().max()) <= 3e-6 * max(scale, 1e-30)


LAYERS = {
    "Conv1d": (N.Conv1d(6, 8, 3, groups=2), N.BatchNorm1d, (2, 6, 11)),
    "Conv1d without bias": (N.Conv1d(6, 8, 3, bias=False), N.BatchNorm1d, (2, 6, 11)),
    "Conv2d": (N.Conv2d(3, 8, 3, stride=2, padding=1), N.BatchNorm2d, (2, 3, 9, 7)),
    "Conv2d, depthwise": (N.Conv2d(8, 8, 3, groups=8, bias=False), N.BatchNorm2d, (2, 8, 9, 7)),
    "Conv2d, dilated": (N.Conv2d(4, 8, 3, groups=2, dilation=2), N.BatchNorm2d, (1, 4, 9, 7)),
    "Conv2d, same": (N.Conv2d(4, 8, (5, 3), padding="same"), N.BatchNorm2d, (2, 4, 5, 6)),
    "Conv2d, reflecting": (
        N.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"),
        N.BatchNorm2d,
        (2, 4, 5, 6),
    ),
    "Conv3d": (N.Conv3d(2, 8, 3, bias=False), N.BatchNorm3d, (2, 2, 4, 5, 6)),
    "Linear": (N.Linear(7, 8), N.BatchNorm1d, (5, 7)),
    "Linear without bias": (N.Linear(7, 8, bias=False), N.BatchNorm1d, (5, 7)),
    # pytorch#180995: the scale of a grouped transposed convolution differs from group to group.
    "ConvTranspose1d": (N.ConvTranspose1d(6, 8, 3, groups=2), N.BatchNorm1d, (2, 6, 5)),
    "ConvTranspose2d": (
        N.ConvTranspose2d(6, 8, 3, stride=2, groups=2, bias=False),
        N.BatchNorm2d,
        (2, 6, 5, 4),
    ),
    "ConvTranspose2d, one group": (N.ConvTranspose2d(3, 8, 3), N.BatchNorm2d, (2, 3, 5, 4)),
    "ConvTranspose3d": (N.ConvTranspose3d(4, 8, 2, groups=4), N.BatchNorm3d, (2, 4, 3, 2, 3)),
}


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_fold_equals_layer_and_norm_in_float64(name, affine):
    layer, norm, shape = LAYERS[name]
    model = settled(N.Sequential(copy.deepcopy(layer), norm(8, affine=affine)))
    x = torch.randn(shape)
    folded = fold(model)
    assert not isinstance(folded[1], norm)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert_close(folded(x), in_float64(model, x))
    with torch.no_grad():
        exact = in_float64(fold(copy.deepcopy(model).double()), x)
    torch.testing.assert_close(exact, in_float64(model, x), rtol=1e-12, atol=1e-12)
