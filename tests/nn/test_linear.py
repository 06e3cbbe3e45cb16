"""Linear layers whose large products are oneDNN's."""

import copy
import pickle

import pytest
import torch

import normdrop
from normdrop import networks
from normdrop.errors import UserError
from normdrop.nn.linear import Linear
from normdrop.ops import linear as ops

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN"
)


@pytest.fixture(autouse=True)
def onednn(monkeypatch):
    """Take the path on every processor, and record the products that it computes."""
    calls = []
    product = ops._product

    def recorded(*args):
        calls.append(args)
        return product(*args)

    monkeypatch.setattr(ops, "_product", recorded)
    monkeypatch.setattr(ops, "prefers_onednn", lambda: True)
    monkeypatch.setattr(ops, "_LEAST", 1)
    monkeypatch.setattr(ops, "_LEAST_ROWS", 1)
    return calls


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", [(1, 7), (13, 7), (2, 5, 7), (2, 3, 4, 7)], ids=str)
def test_output_and_gradients_equal_those_of_float64(shape, bias, onednn):
    torch.manual_seed(0)
    layer = Linear(7, 11, bias=bias)
    exact = torch.nn.Linear(7, 11, bias=bias).double()
    exact.load_state_dict(layer.state_dict())
    x = torch.randn(shape, requires_grad=True)
    wide = x.detach().double().requires_grad_()
    y, truth = layer(x), exact(wide)
    grad = torch.randn(y.shape)
    y.backward(grad)
    truth.backward(grad.double())
    pairs = [(y, truth), (x.grad, wide.grad)]
    pairs += [(p.grad, q.grad) for p, q in zip(layer.parameters(), exact.parameters(), strict=True)]
    for ours, theirs in pairs:
        assert ours.dtype is torch.float32
        torch.testing.assert_close(ours.double(), theirs.detach(), rtol=1e-5, atol=1e-5)
    assert len(onednn) == 3


def test_inputs_of_any_strides_and_expanded_gradients():
    torch.manual_seed(0)
    layer = Linear(6, 5)
    for x in (torch.randn(6, 9).t(), torch.randn(9, 12)[:, ::2], torch.randn(6).expand(9, 6)):
        grads = []
        for function in (layer, torch.nn.functional.linear):
            given = x.detach().requires_grad_()
            args = () if function is layer else (layer.weight, layer.bias)
            grads.append(torch.autograd.grad(function(given, *args).sum(), [given, layer.weight]))
        torch.testing.assert_close(grads[0], grads[1])


def test_only_what_is_asked_for_is_computed(onednn):
    layer = Linear(6, 5)
    layer(torch.randn(4, 6)).sum().backward()
    assert len(onednn) == 2  # not the gradient of an input that has none
    layer.requires_grad_(False)
    assert layer(torch.randn(4, 6)).grad_fn is None


def test_second_derivatives_are_those_of_torch():
    torch.manual_seed(0)
    layer = Linear(6, 5)
    x = torch.randn(4, 6, requires_grad=True)
    results = []
    for y in (layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias)):
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), [x, layer.weight]))
    torch.testing.assert_close(results[0], results[1])


def test_jacobians_by_batched_gradients():
    layer = Linear(6, 5)
    x = torch.randn(4, 6, requires_grad=True)
    rows = torch.autograd.grad(layer(x), x, torch.eye(20).view(20, 4, 5), is_grads_batched=True)[0]
    assert torch.equal(rows[0, 0], layer.weight[0])


@pytest.mark.parametrize("case", ["float64", "autocast", "vmap", "vector", "jvp", "meta"])
def test_the_rest_is_left_to_torch(case, onednn):
    layer = Linear(6, 5)
    x = torch.randn(4, 6)
    if case == "float64":
        assert layer.double()(x.double()).dtype is torch.float64
    elif case == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype is torch.bfloat16
    elif case == "vmap":
        torch.testing.assert_close(torch.func.vmap(layer)(x), layer.forward(x), rtol=0, atol=1e-6)
        assert len(onednn) == 1  # the one without vmap
        return
    elif case == "vector":
        assert layer(x[0]).shape == (5,)
    elif case == "jvp":
        _, tangent = torch.func.jvp(layer, (x,), (torch.ones(4, 6),))
        torch.testing.assert_close(tangent, layer.weight.sum(1).expand(4, 5))
    else:
        assert layer.to("meta")(x.to("meta")).shape == (4, 5)
    assert onednn == []


def test_wrong_shapes_raise_what_torch_raises():
    for layer in (Linear(6, 5), torch.nn.Linear(6, 5)):
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            layer(torch.randn(4, 7))


def test_small_products_are_left_to_torch(monkeypatch, onednn):
    monkeypatch.undo()
    assert ops._LEAST > 64 * 64 * 64
    calls = []
    monkeypatch.setattr(ops, "_product", lambda *args: calls.append(args))
    monkeypatch.setattr(ops, "prefers_onednn", lambda: True)
    Linear(64, 64)(torch.randn(64, 64))
    assert calls == []


def test_compiled_and_exported_it_is_a_plain_linear_layer():
    layer = Linear(6, 5)
    x = torch.randn(4, 6)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    nodes = torch.export.export(layer, (x,)).graph.nodes
    assert "aten.linear.default" in {str(node.target) for node in nodes}
    # As a part of a model it is a leaf for torch.fx, as torch's is.
    assert [n.op for n in torch.fx.symbolic_trace(torch.nn.Sequential(layer)).graph.nodes][
        1
    ] == "call_module"


def test_convert_gives_the_class_and_revert_takes_it():
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Dropout(0.5))
    names = list(model.state_dict())
    assert type(normdrop.convert(copy.deepcopy(model))[0]) is torch.nn.Linear
    weight = model[0].weight
    normdrop.convert(model, linear="auto")
    assert type(model[0]) is Linear
    assert model[0].weight is weight
    assert list(model.state_dict()) == names
    assert type(pickle.loads(pickle.dumps(model))[0]) is Linear
    assert type(normdrop.revert(model)[0]) is torch.nn.Linear
    with pytest.raises(UserError, match='"auto" or "keep" but got \'always\''):
        normdrop.convert(model, linear="always")


def test_a_perceptron_of_ours_trains_like_one_of_torchs():
    torch.manual_seed(0)
    ours = networks.mlp((12, 16, 4), norm=False)
    exact = normdrop.revert(copy.deepcopy(ours)).double()
    x, labels = torch.randn(32, 12), torch.arange(32) % 4
    for model, images in ((ours, x), (exact, x.double())):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
        for _ in range(5):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    for ours_, exact_ in zip(ours.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(ours_.double(), exact_, rtol=1e-4, atol=1e-5)
