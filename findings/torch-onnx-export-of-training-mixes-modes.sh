#!/usr/bin/env bash
# torch 2.13.0 (onnx 1.23.2, onnxscript 0.7.2, onnxruntime 1.32.0): the ONNX of a model in training
# mode is neither training nor inference.
#
# Expected: torch.onnx.export of a model in training mode exports one mode. It warns that the model is
# in training mode and may behave otherwise at inference, so training is what should come.
# Seen: batch normalization is exported as inference, folded into the convolution by the running
# statistics, and dropout as training: every call of the file drops other values.
# Why: the exporter decomposes the two operators by different rules.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --disable-pip-version-check install -q torch==2.13.0 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0 numpy
cd "$folder"
venv/bin/python -W ignore - <<'END'
import contextlib
import io

import onnx
import onnxruntime
import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
x = torch.randn(2, 3, 8, 8)
with contextlib.redirect_stdout(io.StringIO()):
    torch.onnx.export(model.train(), (x,), "model.onnx")
operators = [node.op_type for node in onnx.load("model.onnx").graph.node]
session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
name = session.get_inputs()[0].name
first, second = (torch.from_numpy(session.run(None, {name: x.numpy()})[0]) for _ in range(2))
with torch.no_grad():
    inference = model.eval()(x)
kept = first != 0
print("operators:", operators)
print(f"dropped: {float((first == 0).float().mean()):.2f}, and others the second time")
print(f"what is kept: {float((first / 2 - inference)[kept].abs().max()):.1e} from inference")
assert operators == ["Conv", "Dropout"]
assert not torch.equal(first, second)
assert float((first / 2 - inference)[kept].abs().max()) < 1e-5
END
