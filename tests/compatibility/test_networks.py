"""Our own networks in each of these places, against the same written with torch's layers."""

import copy
import io
import pickle

import pytest
import torch
import torch._dynamo.testing
from torch.func import functional_call, grad
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint


def same(one, two):
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_network_compiles_to_one_graph_for_any_batch(network, images, check, step):
    ours, theirs = network
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours, backend=counter, fullgraph=True)
    for batch in (16, 21):
        x = images(batch)
        torch._dynamo.mark_dynamic(x, 0)
        same(step(compiled, x), step(theirs, x))
    check(ours, theirs)
    assert counter.frame_count == 1


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_network_exports(network, images, training):
    ours, theirs = (model.train(training) for model in network)
    batch = {0: torch.export.Dim("batch", min=2)}
    module = torch.export.export(ours, (images(),), dynamic_shapes=(batch,)).module()
    x = images(24)
    same(module(x), theirs(x))
    same(module.state_dict(), dict(theirs.state_dict()))


def test_network_under_autocast(network, images, step):
    ours, theirs = network
    exact = copy.deepcopy(theirs)
    x = images(32)
    wanted = step(exact, x)
    outputs = []
    for model in network:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs.append(step(model, x))
    assert outputs[0].dtype == outputs[1].dtype == torch.bfloat16
    errors = [(y.float() - wanted).norm() for y in outputs]
    assert errors[0] <= 1.5 * errors[1] + 0.01 * wanted.norm()
    theirs, ours = dict(theirs.named_parameters()), dict(ours.named_parameters())
    for name, p in exact.named_parameters():
        off = [(dict_[name].grad - p.grad).norm() for dict_ in (ours, theirs)]
        assert off[0] <= 1.5 * off[1] + 0.02 * p.grad.norm(), name


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_network_counts_a_batch_once(network, images, check, step, reentrant):
    ours, theirs = network
    x = images().requires_grad_()
    step(lambda x: checkpoint(ours, x, use_reentrant=reentrant), x)
    step(theirs, x)
    check(ours, theirs)


def test_network_in_torch_func(network, images):
    x, results = images(), []
    for model in network:
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        buffers = {name: b.clone() for name, b in model.named_buffers()}

        def loss(parameters, buffers, model=model):
            return functional_call(model, (parameters, buffers), (x,)).sin().sum()

        results.append((grad(loss)(parameters, buffers), buffers))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


def test_averaged_network(network, images, step):
    averaged = []
    for model in network:
        torch.manual_seed(1)
        mean = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(2):
            optimizer.zero_grad()
            step(model, images())
            optimizer.step()
            mean.update_parameters(model)
        averaged.append(mean.state_dict())
    torch.testing.assert_close(*(dict(a) for a in averaged), rtol=1e-3, atol=1e-4)


def test_copies_of_a_network_train_alike(network, images, check, step):
    ours, theirs = network
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    copies = [
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(file, weights_only=False),
    ]
    x = images()
    step(theirs, x)
    for twin in copies:
        step(twin, x)
        check(twin, theirs)
    assert ours.bn1.num_batches_tracked == 0
