"""torch.fx sees our modules as it sees torch's: as leaves."""

import pytest
import torch

from normdrop import nn

MODULES = [
    (nn.BatchNorm1d(4), (3, 4)),
    (nn.BatchNorm2d(4, activation="relu"), (3, 4, 2, 2)),
    (nn.BatchNorm3d(4), (3, 4, 2, 2, 2)),
    (nn.Dropout(0.5), (3, 4)),
    (nn.Dropout1d(0.5), (3, 4, 2)),
    (nn.Dropout2d(0.5), (3, 4, 2, 2)),
    (nn.Dropout3d(0.5), (3, 4, 2, 2, 2)),
    (nn.AlphaDropout(0.5), (3, 4)),
    (nn.FeatureAlphaDropout(0.5), (3, 4)),
]


@pytest.mark.parametrize(("module", "shape"), MODULES, ids=lambda m: type(m).__name__)
def test_symbolic_trace_takes_modules_as_leaves(module, shape):
    network = torch.nn.Sequential(torch.nn.Identity(), module)
    traced = torch.fx.symbolic_trace(network)
    assert [node.op for node in traced.graph.nodes][-2] == "call_module"
    assert getattr(traced, "1") is module
    x = torch.randn(shape)
    torch.manual_seed(1)
    expected = network(x)
    torch.manual_seed(1)
    torch.testing.assert_close(traced(x), expected)


def test_symbolic_trace_neither_counts_nor_loses_the_residual():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3, activation="relu")

        def forward(self, x):
            return self.norm(x, residual=x)

    block = Block()
    traced = torch.fx.symbolic_trace(block)
    assert block.norm.num_batches_tracked == 0
    x = torch.randn(4, 3, 2, 2)
    torch.testing.assert_close(traced(x), block(x))
    assert block.norm.num_batches_tracked == 2
