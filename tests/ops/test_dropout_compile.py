"""Registration, torch.compile and torch.export: the same masks as in eager mode."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import normdrop
from normdrop import functional

needs_kernels = pytest.mark.skipif(
    not normdrop.has_kernels(), reason="the operator exists with the kernels only"
)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shared_dims", [[], [2, 3]])
def test_dropout_opcheck(dtype, shared_dims):
    x = torch.randn(2, 5, 3, 3).to(dtype).to(memory_format=torch.channels_last)
    rest = (torch.tensor(3), 2**31, 2.0, 0.0, 0.0, 1, shared_dims)
    torch.library.opcheck(torch.ops.normdrop.dropout.default, (x, *rest))
    torch.library.opcheck(torch.ops.normdrop.dropout.default, (x.detach().requires_grad_(), *rest))
    torch.library.opcheck(torch.ops.normdrop.dropout_into.default, (x, *rest, torch.empty_like(x)))


def both(f, *inputs, **options):
    """Outputs and gradients of f, eager and compiled, from the same generator state."""
    results = []
    for g in (f, torch.compile(f, fullgraph=True, **options)):
        torch.manual_seed(5)
        leaves = [x.detach().requires_grad_() for x in inputs]
        outputs = g(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        grads = torch.autograd.grad(sum((z * (i + 1)).sum() for i, z in enumerate(outputs)), leaves)
        results.append([*outputs, *grads])
    return results


def test_compiled_masks_are_those_of_eager_mode():
    """torch's compiled dropout draws other masks than its eager one.

    pytorch#118735, #94855, #192635.
    """

    def f(x):
        a, b = functional.dropout(x), functional.dropout(x)  # equal calls must not be merged
        return a, b, functional.dropout2d((a + b).relu(), 0.3), functional.alpha_dropout(a, 0.2)

    eager, compiled = both(f, torch.randn(4, 6, 5, 5))
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b)
        assert torch.equal(a == 0, b == 0)
    assert not torch.equal(compiled[0], compiled[1])


def test_compiled_branches_draw_in_the_order_of_the_program():
    # The second branch is ready first, and is used first.
    def f(x, y):
        a = functional.dropout((x @ x).softmax(1))
        b = functional.dropout(y)
        return b * 2, a

    eager, compiled = both(f, torch.randn(40, 40), torch.randn(40, 40))
    for a, b in zip(eager, compiled, strict=True):
        assert torch.equal(a == 0, b == 0)


def test_compiled_calls_draw_anew():
    compiled = torch.compile(lambda x: functional.dropout(x), fullgraph=True)
    x = torch.ones(500)
    assert not torch.equal(compiled(x), compiled(x))


def test_compiled_with_given_seed_and_offset():
    def f(x, seed, offset):
        return functional.dropout(x, 0.4, seed=seed, sample_offset=offset)

    compiled = torch.compile(f, fullgraph=True, dynamic=True)
    for rows, seed, offset in [(3, 1, 0), (5, 2**63 - 1, 7), (6, 3, 2)]:
        x = torch.randn(rows, 33)
        assert torch.equal(compiled(x, seed, offset), f(x, seed, offset))


def test_compiled_in_place():
    def f(x):
        y = x * 1
        return functional.dropout(y, inplace=True)

    eager, compiled = both(f, torch.randn(100))
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))


def test_compiled_activation_checkpointing():
    def block(x):
        return functional.dropout(functional.dropout(x.sin()).cos()).sin()

    def f(x):
        return checkpoint(block, x, use_reentrant=False)

    eager, compiled = both(f, torch.randn(100))
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_module_in_training_and_evaluation():
    model = nn.Sequential(nn.Linear(6, 80), nn.ReLU(), normdrop.nn.Dropout(0.5))
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(4, 6)
    torch.manual_seed(1)
    expected = model(x)
    torch.manual_seed(1)
    torch.testing.assert_close(compiled(x), expected)
    model.eval()
    torch.testing.assert_close(compiled(x), model(x))


class Drops(nn.Module):
    def __init__(self, drop):
        super().__init__()
        self.drop = drop

    def forward(self, x):
        return self.drop(x) + self.drop(x)


@pytest.mark.parametrize("strict", [False, True])
def test_exported_dropout_is_torchs_and_draws_anew(strict):
    x = torch.ones(3, 50)
    batch = ({0: torch.export.Dim("batch", min=2)},)
    program = torch.export.export(
        Drops(functional.dropout), (x,), dynamic_shapes=batch, strict=strict
    )
    z = program.module()(torch.ones(300, 50))
    assert sorted(z.unique().tolist()) == [0.0, 2.0, 4.0]  # two masks, and each was drawn
    assert (z == 2.0).float().mean().item() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("strict", [False, True])
def test_exported_mask_of_a_seed_is_that_of_eager_mode(strict):
    drop = Drops(lambda x: functional.dropout(x, 0.3, seed=4, sample_offset=1, shared_dims=(2,)))
    x = torch.randn(3, 50, 2)
    program = torch.export.export(drop, (x,), strict=strict)
    assert torch.equal(program.module()(x), drop(x))


def test_exported_evaluation_has_no_dropout():
    """Dropout left in the graph after eval(): pytorch#103681, #151726, #156542."""
    model = nn.Sequential(nn.Linear(3, 3), normdrop.nn.Dropout(0.5)).eval()
    program = torch.export.export(model, (torch.randn(2, 3),))
    assert not [
        n for n in program.graph.nodes if "drop" in str(n.target) or "seed" in str(n.target)
    ]


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_compiled_vmap(randomness):
    compiled = torch.compile(
        torch.func.vmap(functional.dropout, randomness=randomness), fullgraph=True
    )
    z = compiled(torch.ones(4, 300))
    assert set(z.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(z[0], z[1]) is (randomness == "same")
