#!/usr/bin/env bash
# pytorch-lightning 2.6.6 (torch 2.13.0): a frozen batch normalization normalizes by the batch.
#
# Expected: after BaseFinetuning.freeze(backbone, train_bn=False) the backbone is a fixed function: what
# it was trained to be, until it is thawed.
# Seen: in training mode, which Trainer.fit sets, the frozen layer normalizes by the statistics of the
# batch. It keeps its running statistics, and does not use them: an image's features change with the
# images beside it, and are not what evaluation gives.
# Why: freezing sets track_running_stats to False, and torch's layer in training mode then neither
# moves nor uses its running statistics. Only evaluation mode does.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --disable-pip-version-check install -q torch==2.13.0 pytorch-lightning==2.6.6 numpy
cd "$folder"
venv/bin/python -W ignore - <<'END'
import torch
from pytorch_lightning.callbacks import BaseFinetuning
from torch import nn

torch.manual_seed(0)
backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
backbone[1].running_mean.fill_(3.0)
backbone[1].running_var.fill_(9.0)
images = torch.randn(8, 3, 8, 8)

BaseFinetuning.freeze(backbone, train_bn=False)
with torch.no_grad():
    together = backbone.train()(images)[:1]
    alone = backbone(images[:1])
    evaluated = backbone.eval()(images[:1])
print("running mean:", backbone[1].running_mean.tolist())
print(f"beside others and alone: {float((together - alone).abs().max()):.2f} apart")
print(f"in training and in evaluation: {float((together - evaluated).abs().max()):.2f} apart")
assert backbone[1].running_mean.tolist() == [3.0] * 4
assert float((together - alone).abs().max()) > 0.1
assert float((together - evaluated).abs().max()) > 1.0
END
