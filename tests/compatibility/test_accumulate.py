"""normdrop.accumulate against torch on the concatenated batch, and what it leaves alone.

Without it, the statistics move with every micro-batch (pytorch#46516).
"""

import copy
import io
import pickle

import pytest
import torch
import torch._dynamo.testing
from torch.utils.checkpoint import checkpoint

import normdrop
from normdrop import nn

LAYERS = [nn.BatchNorm1d, torch.nn.BatchNorm1d]
BOTH = pytest.mark.parametrize("layer_type", LAYERS, ids=["ours", "torch"])


@BOTH
@pytest.mark.parametrize("momentum", [0.1, None, 1.0])
@pytest.mark.parametrize("sizes", [(5, 3), (2, 2, 2, 2), (7, 120), (600, 300)], ids=str)
def test_accumulated_statistics_are_those_of_the_whole_batch(layer_type, momentum, sizes):
    layer = layer_type(30, momentum=momentum)
    reference = torch.nn.BatchNorm1d(30, momentum=momentum).double()
    for _ in range(3):
        x = torch.randn(sum(sizes), 30) * 3 + 100
        reference(x.double())
        with normdrop.accumulate(layer):
            for part in x.split(sizes):
                # Of two values with a mean of 100, torch's rounding shows; ours is held to float64.
                wide = part if layer_type is torch.nn.BatchNorm1d else part.double()
                y = torch.nn.BatchNorm1d(30, dtype=wide.dtype)(wide).float()
                torch.testing.assert_close(layer(part), y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        layer.double().state_dict(), reference.state_dict(), rtol=1e-6, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_accumulate_in_every_type(dtype):
    layer = nn.BatchNorm2d(5).to(dtype)
    x = (torch.randn(12, 5, 20, 20) + 2).to(dtype)
    with normdrop.accumulate(layer):
        for part in x.split([3, 4, 5]):
            layer(part)
    wanted = x.double().mean((0, 2, 3)) * 0.1
    torch.testing.assert_close(layer.running_mean.double(), wanted, rtol=1e-5, atol=1e-5)
    wanted = x.double().transpose(0, 1).flatten(1).var(1) * 0.1 + 0.9
    torch.testing.assert_close(layer.running_var.double(), wanted, rtol=1e-5, atol=1e-5)


def test_accumulate_a_large_mean_does_not_cancel():
    x = torch.randn(4000, 3) + 10_000
    layer = nn.BatchNorm1d(3, momentum=1.0)
    with normdrop.accumulate(layer):
        for part in x.split(500):
            layer(part)
    torch.testing.assert_close(layer.running_var, x.double().var(0).float(), rtol=1e-3, atol=0)


def test_accumulate_in_a_network(pair, images, step):
    """The gradients are those without it; every layer merges what came to it."""
    ours, theirs = pair()
    parts = images(40).split([16, 24])
    with normdrop.accumulate(ours):
        for part in parts:
            step(ours, part)
    seen = {"bn1": [], "bn2": []}
    for name in seen:
        theirs.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen[name].append(args[0].detach())
        )
    for part in parts:
        step(theirs, part)
    for name, inputs in seen.items():
        layer, values = ours.get_submodule(name), torch.cat(inputs).transpose(0, 1).flatten(1)
        torch.testing.assert_close(layer.running_mean, 0.1 * values.mean(1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.running_var, 0.9 + 0.1 * values.var(1))
        assert layer.num_batches_tracked == 1
    wanted = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, wanted[name].grad, rtol=1e-4, atol=1e-4)


@BOTH
@pytest.mark.parametrize("reentrant", [False, True])
def test_accumulate_counts_a_checkpointed_micro_batch_once(layer_type, reentrant):
    layer, reference = layer_type(4), torch.nn.BatchNorm1d(4)
    x = torch.randn(12, 4, requires_grad=True)
    reference(x)
    with normdrop.accumulate(layer):
        for part in x.split(4):
            checkpoint(layer, part, use_reentrant=reentrant).sum().backward()
    torch.testing.assert_close(layer.state_dict(), reference.state_dict())


@BOTH
def test_accumulate_leaves_frozen_layers_alone(layer_type):
    model = torch.nn.Sequential(
        layer_type(3).eval(), layer_type(3), layer_type(3, track_running_stats=False)
    )
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(6, 3) + 1
    expected = copy.deepcopy(model)(x)
    with normdrop.accumulate(model):
        torch.testing.assert_close(model(x), expected)
        model[1].eval()
        model(x + 5)
    for name, value in model[0].state_dict().items():
        assert torch.equal(value, before[f"0.{name}"])
    assert model[1].num_batches_tracked == 1
    torch.testing.assert_close(model[1].running_mean, 0.1 * model[0](x).mean(0))


@BOTH
def test_accumulate_a_shared_layer_moves_once_with_all_that_it_saw(layer_type):
    layer = layer_type(3)
    model = torch.nn.Sequential(layer, torch.nn.Linear(3, 3), layer)
    x = torch.randn(8, 3)
    with torch.no_grad():
        middle = [model[1](torch.nn.BatchNorm1d(3)(part)) for part in x.split(4)]
    with normdrop.accumulate(model):
        for part in x.split(4):
            model(part)
    values = torch.cat([x, *middle])
    torch.testing.assert_close(layer.running_mean, 0.1 * values.mean(0))
    torch.testing.assert_close(layer.running_var, 0.9 + 0.1 * values.var(0))
    assert layer.num_batches_tracked == 1


@BOTH
def test_accumulate_after_an_exception_changes_nothing(layer_type):
    model = torch.nn.Sequential(layer_type(3))
    model(torch.randn(5, 3))
    before, names = copy.deepcopy(model.state_dict()), set(vars(model[0]))

    def interrupted():
        with normdrop.accumulate(model):
            model(torch.randn(5, 3))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert set(vars(model[0])) == names
    with normdrop.accumulate(model):
        pass
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    model(torch.randn(5, 3))
    assert model[0].num_batches_tracked == 2


@BOTH
def test_accumulate_refuses_a_block_within_a_block(layer_type):
    model = torch.nn.Sequential(layer_type(3))
    x = torch.randn(5, 3)
    with normdrop.accumulate(model):
        model(x)
        with (
            pytest.raises(RuntimeError, match=r"layer '0' is in a block of accumulate already"),
            normdrop.accumulate(model),
        ):
            pass
        model(x)
    assert model[0].num_batches_tracked == 1


class Peculiar(torch.nn.BatchNorm1d):
    def forward(self, input):
        return super().forward(input) * 2


@pytest.mark.parametrize(
    "layer", [torch.nn.SyncBatchNorm(3), torch.nn.LazyBatchNorm1d(), Peculiar(3)]
)
def test_accumulate_refuses_what_it_does_not_know(layer):
    model = torch.nn.Sequential(nn.BatchNorm1d(3), layer)
    message = f"expected layer '1' to (be|have) .* got {type(layer).__name__}"
    with pytest.raises(TypeError, match=message), normdrop.accumulate(model):
        pass
    assert "_micro_batches" not in vars(model[0])
    layer.eval()
    with normdrop.accumulate(model):
        model[0](torch.randn(4, 3))
    assert model[0].num_batches_tracked == 1


def test_accumulate_nonfinite_and_empty_batches():
    skipping, reference = nn.BatchNorm1d(2, nonfinite="skip"), torch.nn.BatchNorm1d(2)
    x, bad = torch.randn(9, 2), torch.full((3, 2), float("inf"))
    reference(x)
    with normdrop.accumulate(skipping):
        for part in (bad, x[:4], torch.empty(0, 2), bad, x[4:]):
            skipping(part)
    torch.testing.assert_close(skipping.state_dict(), reference.state_dict())
    propagating = nn.BatchNorm1d(2)
    with normdrop.accumulate(propagating):
        propagating(x)
        propagating(bad)
    assert not propagating.running_mean.isfinite().any()


@BOTH
def test_accumulate_copies_and_checkpoints_made_inside_are_whole(layer_type):
    model = torch.nn.Sequential(layer_type(3))
    x = torch.randn(6, 3)
    with normdrop.accumulate(model):
        model(x)
        inside = copy.deepcopy(model.state_dict())
        twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    assert inside["0.num_batches_tracked"] == 0
    for twin in twins:
        twin(x)
        torch.testing.assert_close(twin.state_dict(), model.state_dict())
        with normdrop.accumulate(twin):
            twin(x)
            twin(x)
        assert twin[0].num_batches_tracked == 2
    torch.save(model, io.BytesIO())


@BOTH
def test_accumulate_in_compiled_code(layer_type):
    """One graph outside and one inside of the block, whichever the step."""
    layer, reference = layer_type(30), torch.nn.BatchNorm1d(30)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    x = torch.randn(600, 30)
    compiled(x)
    reference(x)
    for _ in range(3):
        x = torch.randn(1800, 30) + 1
        reference(x)
        with normdrop.accumulate(compiled):
            for part in x.split(600):
                compiled(part)
    torch.testing.assert_close(layer.state_dict(), reference.state_dict())
    assert counter.frame_count == 2
