"""Autocast and models of another type."""

import torch


def test_autocast_in_bfloat16(pair, images, step):
    ours, theirs = pair()
    exact = pair()[1]
    exact.load_state_dict(theirs.state_dict())
    x = images(32)
    wanted = step(exact, x)
    outputs = []
    for model in (ours, theirs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(x)
            y.float().sin().sum().backward()
        outputs.append(y.detach())
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert outputs[0].dtype == outputs[1].dtype == torch.bfloat16
    # As near to float32 as torch's own layers are.
    errors = [(y.float() - wanted).abs().max() for y in outputs]
    assert errors[0] <= 1.5 * errors[1] + 0.01
    for name, p in exact.named_parameters():
        off = [(dict(m.named_parameters())[name].grad - p.grad).norm() for m in (ours, theirs)]
        assert off[0] <= 1.5 * off[1] + 0.02 * p.grad.norm(), name
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), buffer, rtol=2e-2, atol=2e-2)


def test_double_network(pair, images, check, step):
    ours, theirs = (model.double() for model in pair())
    x = images().double()
    torch.testing.assert_close(step(ours, x), step(theirs, x))
    check(ours, theirs, rtol=1e-7, atol=1e-9)


def test_bfloat16_network(pair, images, step):
    ours, theirs = pair()
    wanted = theirs(images(32).bfloat16().float())
    torch.manual_seed(0)
    ours.bfloat16()
    assert ours.bn1.running_var.dtype == torch.float32
    y = step(ours, images(32).bfloat16())
    assert y.dtype == torch.bfloat16
    assert torch.isfinite(y).all()
    assert wanted.shape == y.shape
