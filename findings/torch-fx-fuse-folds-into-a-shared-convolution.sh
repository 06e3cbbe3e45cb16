#!/usr/bin/env bash
# torch 2.13.0: both FX folders of batch normalization fold into a convolution that is used twice.
#
# Expected: torch.fx.experimental.optimization.fuse and torch.ao.quantization's fuse_fx leave a model's
# output as it was, but for rounding.
# Seen: where a convolution is called twice and only one of its results is normalized, both fold the
# norm into the weights that the other call uses too. The output is off by 1.0; nothing is said.
# Why: they ask whether the result of this call has other users, not whether the module is called
# again.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --disable-pip-version-check install -q torch==2.13.0 numpy
cd "$folder"
venv/bin/python -W ignore - <<'END'
import copy

import torch
from torch import nn
from torch.ao.quantization.quantize_fx import fuse_fx
from torch.fx.experimental.optimization import fuse


class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.norm.running_mean.fill_(1.0)

    def forward(self, x, other):
        return self.norm(self.conv(x)) + self.conv(other)


torch.manual_seed(0)
model = Siamese().eval()
x, other = torch.randn(2, 2, 3, 8, 8)
with torch.no_grad():
    expected = model(x, other)
    for function in (fuse, fuse_fx):
        off = float((function(copy.deepcopy(model))(x, other) - expected).abs().max())
        print(f"{function.__module__}.{function.__name__}: off by {off:.2f}")
        assert off > 0.9
END
