"""torch.save, torch.load, pickle and deepcopy of a whole network."""

import copy
import io
import pickle

import pytest
import torch


def saved_and_loaded(thing, **options):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, **options)


COPIES = [
    copy.deepcopy,
    lambda model: saved_and_loaded(model, weights_only=False),
    lambda model: pickle.loads(pickle.dumps(model)),
]


@pytest.mark.parametrize("copied", COPIES, ids=["deepcopy", "torch.save", "pickle"])
def test_copies_go_on_training_alone(pair, images, check, step, copied):
    ours, theirs = pair()
    x = images()
    step(ours, x)
    step(theirs, x)
    twin = copied(ours)
    reference = copied(theirs)
    for model in (ours, twin, theirs, reference):
        model.zero_grad()
    before = copy.deepcopy(ours.state_dict())
    x = images()
    step(twin, x)
    step(reference, x)
    check(twin, reference)
    torch.testing.assert_close(ours.state_dict(), before, rtol=0, atol=0)
    step(ours, x)
    step(theirs, x)
    check(ours, theirs)


def test_checkpoints_go_both_ways_with_torch(pair, images):
    ours, theirs = pair()
    for model in (ours, theirs):
        model(images())
    weights = saved_and_loaded(theirs.state_dict(), weights_only=True)
    ours.load_state_dict(weights)
    x = images()
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-4, atol=1e-4)
    ours.train()(images(32))
    theirs.load_state_dict(saved_and_loaded(ours.state_dict(), weights_only=True))
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-4, atol=1e-4)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.state_dict()._metadata == theirs.state_dict()._metadata


def test_optimizer_state_goes_on(pair, images, check, step):
    ours, theirs = pair()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9) for m in (ours, theirs)]
    for _ in range(2):
        x = images()
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            step(model, x)
            optimizer.step()
        optimizers[0].load_state_dict(
            saved_and_loaded(optimizers[1].state_dict(), weights_only=True)
        )
    check(ours, theirs, rtol=1e-3, atol=1e-3)
