"""torch.func through a whole network."""

import copy

import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, stack_module_state, vmap


def loss_of(model):
    def loss(parameters, buffers, x):
        return functional_call(model, (parameters, buffers), (x,)).sin().sum()

    return loss


def state(model):
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    return parameters, {name: b.clone() for name, b in model.named_buffers()}


def same(one, two):
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)


def test_grad_of_training_moves_the_given_buffers(pair, images):
    ours, theirs = pair()
    x, results = images(), []
    for model in (ours, theirs):
        before = copy.deepcopy(model.state_dict())
        parameters, buffers = state(model)
        results.append((grad(loss_of(model))(parameters, buffers, x), buffers))
        torch.testing.assert_close(model.state_dict(), before)
    same(*results)
    assert results[0][1]["bn1.num_batches_tracked"] == 1


def test_gradients_of_single_samples(pair, images):
    ours, theirs = pair()
    x = images(4)
    of_sample = [
        vmap(grad(lambda p, b, x, m=model: loss_of(m)(p, b, x[None])), in_dims=(None, None, 0))(
            *state(model.eval()), x
        )
        for model in (ours, theirs)
    ]
    same(*of_sample)


def test_an_ensemble_trains_side_by_side(pair, images):
    x, results = images(), []
    pairs = [pair() for _ in range(3)]
    for models in zip(*pairs, strict=True):
        parameters, buffers = stack_module_state(list(models))
        parameters = {name: p.detach() for name, p in parameters.items()}
        skeleton = models[0]
        y = vmap(lambda p, b, m=skeleton: functional_call(m, (p, b), (x,)))(parameters, buffers)
        results.append((y, buffers))
    same(*results)


def test_forward_mode(pair, images):
    """Tangents of training: zero with an operator that has no rule for them."""
    x, tangent, results = images(), images(), []
    for model in pair():
        parameters, buffers = state(model)

        def output(x, model=model, parameters=parameters, buffers=buffers):
            # A transform writes to no tensor from outside.
            mine = {name: b.clone() for name, b in buffers.items()}
            return functional_call(model, (parameters, mine), (x,))

        results.append(jvp(output, (x,), (tangent,)))
    same(*results)
    assert results[0][1].any()


def test_dual_numbers(pair, images):
    x, tangent, results = images(), images(), []
    for model in pair():
        with forward_ad.dual_level():
            y = forward_ad.unpack_dual(model(forward_ad.make_dual(x, tangent)))
            results.append((y.primal.detach(), y.tangent.detach()))
    same(*results)
    assert results[0][1].any()


def test_batch_statistics_are_taken_away_as_from_torchs_layers(pair, images):
    ours, theirs = pair()
    for model in (ours, theirs):
        torch.func.replace_all_batch_norm_modules_(model)
    assert ours.bn1.running_mean is None
    x = images()
    same(ours(x), theirs(x))
