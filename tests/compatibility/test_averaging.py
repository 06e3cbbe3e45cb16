"""Averages of models: SWA and EMA (torch.optim.swa_utils)."""

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

AVERAGES = [None, get_ema_multi_avg_fn(0.9)]


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("average", AVERAGES, ids=["swa", "ema"])
def test_averaged_model(pair, images, step, use_buffers, average):
    models = pair()
    averaged = [AveragedModel(m, multi_avg_fn=average, use_buffers=use_buffers) for m in models]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in models]
    data = [images() for _ in range(3)]
    for x in data:
        for model, mean, optimizer in zip(models, averaged, optimizers, strict=True):
            optimizer.zero_grad()
            step(model, x)
            optimizer.step()
            mean.update_parameters(model)
    ours, theirs = averaged
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-3, atol=1e-4)
    if not use_buffers:
        for mean in averaged:
            update_bn(data, mean)
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-3, atol=1e-4)
        assert ours.module.bn1.momentum == 0.1
    x = images()
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-3, atol=1e-3)
