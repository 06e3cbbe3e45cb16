#!/usr/bin/env bash
# torch 2.13.0: optim.swa_utils.update_bn weighs every batch alike, whatever its size.
#
# Expected: after update_bn the running statistics are those of the data that it was given.
# Seen: 96 values 0 and then 4 values 10, as a loader with a short last batch gives them: the running
# mean is 5.0 and the data's is 0.4. The running variance is 0, since it is the mean of the batches'
# own variances, and the data's is 3.88. (fvcore's update_bn_stats weighs by size, and adds the
# variance of the means.)
# Why: it sets momentum to None, the plain average over batches.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --disable-pip-version-check install -q torch==2.13.0 fvcore==0.1.5.post20221221 numpy
cd "$folder"
venv/bin/python -W ignore - <<'END'
import torch
from fvcore.nn.precise_bn import update_bn_stats
from torch import nn

data = torch.cat([torch.zeros(96, 1), torch.full((4, 1), 10.0)])
batches = data.split(96)
model = nn.Sequential(nn.BatchNorm1d(1))
torch.optim.swa_utils.update_bn(batches, model)
mean, var = float(model[0].running_mean), float(model[0].running_var)
print(f"the data: {float(data.mean()):.2f}, {float(data.var()):.2f}; update_bn: {mean:.2f}, {var:.2f}")
assert (round(mean, 4), round(var, 4)) == (5.0, 0.0)

update_bn_stats(model.train(), batches, len(batches))
mean, var = float(model[0].running_mean), float(model[0].running_var)
print(f"fvcore's update_bn_stats: {mean:.2f}, {var:.2f}")
assert (round(mean, 4), round(var, 4)) == (0.4, 3.84)
END
