"""torch.compile of a whole network: one graph, any batch size."""

import copy

import torch
import torch._dynamo.testing

from normdrop import nn


def compiled_with_counter(model):
    """The compiled model, and what counts its graphs."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    return torch.compile(model, backend=counter, fullgraph=True), counter


def test_compiled_network_trains_with_any_batch_size_in_one_graph(pair, images, check, step):
    ours, theirs = pair()
    compiled, counter = compiled_with_counter(ours)
    for batch in (16, 19, 33, 16):
        x = images(batch)
        torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(step(compiled, x), step(theirs, x), rtol=1e-4, atol=1e-4)
    check(ours, theirs)
    assert counter.frame_count == 1
    ours.eval()
    theirs.eval()
    with torch.no_grad():
        # torch's own convolution compiles another graph below 16.
        for batch in (16, 40):
            x = images(batch)
            torch._dynamo.mark_dynamic(x, 0)
            torch.testing.assert_close(compiled(x), theirs(x), rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 2


def test_compiled_network_becomes_dynamic_by_itself(pair, images, check, step):
    ours, theirs = pair()
    compiled, counter = compiled_with_counter(ours)
    for batch in (16, 19, 33):
        x = images(batch)
        step(compiled, x)
        step(theirs, x)
    check(ours, theirs)
    assert counter.frame_count == 2


def test_copy_is_compiled_before_its_first_call(pair, images, check, step):
    ours, theirs = pair()
    compiled, counter = compiled_with_counter(copy.deepcopy(ours))
    x = images()
    torch.testing.assert_close(step(compiled, x), step(theirs, x), rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1
    check(compiled._orig_mod, theirs)


def test_compiled_by_the_default_backend(pair, images, check, step):
    torch._dynamo.reset()
    ours, theirs = pair()
    compiled = torch.compile(ours, fullgraph=True)
    x = images()
    torch.testing.assert_close(step(compiled, x), step(theirs, x), rtol=1e-4, atol=1e-4)
    check(ours, theirs)


def test_compiled_cumulative_average():
    """torch's own layer breaks the graph at float(num_batches_tracked)."""
    layer, reference = nn.BatchNorm1d(30, momentum=None), torch.nn.BatchNorm1d(30, momentum=None)
    compiled, counter = compiled_with_counter(layer)
    for _ in range(3):
        x = torch.randn(600, 30)
        torch.testing.assert_close(compiled(x), reference(x))
    torch.testing.assert_close(layer.state_dict(), reference.state_dict())
    assert counter.frame_count == 1
