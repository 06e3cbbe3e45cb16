"""torch.export, torch.fx and torch.jit.trace of a whole network."""

import pytest
import torch

BATCH = {0: torch.export.Dim("batch", min=2)}


@pytest.mark.parametrize("strict", [False, True])
def test_exported_evaluation(pair, images, strict):
    ours, theirs = pair()
    for model in (ours, theirs):
        model(images(30))
        model.eval()
    theirs.load_state_dict(ours.state_dict())
    program = torch.export.export(ours, (images(),), dynamic_shapes=(BATCH,), strict=strict)
    for batch in (2, 40):
        x = images(batch)
        torch.testing.assert_close(program.module()(x), theirs(x), rtol=1e-4, atol=1e-4)


def test_exported_training_moves_the_statistics(pair, images, check, step):
    ours, theirs = pair()
    program = torch.export.export(ours, (images(),), dynamic_shapes=(BATCH,))
    module = program.module()
    for batch in (16, 40):
        x = images(batch)
        torch.testing.assert_close(step(module, x), step(theirs, x), rtol=1e-4, atol=1e-4)
    check(module, theirs)
    assert module.state_dict()["bn1.num_batches_tracked"] == 2


def test_exported_program_is_saved_and_decomposed(pair, images, tmp_path):
    ours, theirs = pair()
    x = images()
    program = torch.export.export(ours.eval(), (x,))
    torch.export.save(program, tmp_path / "network.pt2")
    loaded = torch.export.load(tmp_path / "network.pt2")
    for one in (loaded, program.run_decompositions()):
        torch.testing.assert_close(one.module()(x), theirs.eval()(x), rtol=1e-4, atol=1e-4)


def test_symbolically_traced(pair, images, check, step):
    ours, theirs = pair()
    traced = torch.fx.symbolic_trace(ours)
    x = images()
    torch.testing.assert_close(step(traced, x), step(theirs, x), rtol=1e-4, atol=1e-4)
    check(traced, theirs)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_jit_traced_evaluation(pair, images, tmp_path):
    ours, theirs = pair()
    x = images()
    traced = torch.jit.trace(ours.eval(), x)
    torch.testing.assert_close(traced(x), theirs.eval()(x), rtol=1e-4, atol=1e-4)
    torch.jit.save(traced, str(tmp_path / "network.pt"))
    loaded = torch.jit.load(str(tmp_path / "network.pt"))
    y = images(40)
    torch.testing.assert_close(loaded(y), theirs(y), rtol=1e-4, atol=1e-4)
