#!/usr/bin/env bash
# captum 0.9.0 (torch 2.13.0): DeepLift takes a subclass of ReLU as a linear layer.
#
# Expected: the attributions sum to the difference of the outputs (DeepLift's completeness), or a
# layer that it does not know is refused.
# Seen: with nn.ReLU they do, within 1e-7. With a subclass of it, whose forward is nn.ReLU's, they are
# off by 0.15 where the outputs differ by 0.08, and nothing is said: the nonlinearity got the plain
# gradient. (GuidedBackprop finds the same layer.)
# Why: the rules are looked up by type(module).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --disable-pip-version-check install -q torch==2.13.0 captum==0.9.0
cd "$folder"
venv/bin/python -W ignore - <<'END'
import torch
from captum.attr import DeepLift
from torch import nn


class Activation(nn.ReLU):
    """A user's own: the name is new, the forward is torch's."""


torch.manual_seed(0)
first, last = nn.Linear(4, 8), nn.Linear(8, 2)
x, baseline = torch.randn(3, 4), torch.zeros(3, 4)
missing = {}
for kind in (nn.ReLU, Activation):
    model = nn.Sequential(first, kind(), last).eval()
    parts = DeepLift(model).attribute(x, baseline, target=0).sum(1)
    whole = (model(x) - model(baseline))[:, 0]
    missing[kind.__name__] = float((parts - whole).detach().abs().max())
    print(kind.__name__, "attributions", parts.detach(), "outputs", whole.detach())
print("missing:", missing)
assert missing["ReLU"] < 1e-6 < 0.05 < missing["Activation"]
END
