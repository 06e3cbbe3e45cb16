#!/usr/bin/env bash
# opacus 1.6.0 (torch 2.13.0): the validator calls a model with a subclass of BatchNorm2d valid.
#
# Expected: ModuleValidator refuses batch normalization, since a sample's output depends on its
# peers; a subclass of torch's layer, with its forward, is batch normalization.
# Seen: it refuses nn.BatchNorm2d and finds nothing wrong with a subclass of it. Without running
# statistics PrivacyEngine.make_private accepts that model as well and trains it, where the gradient
# of a sample changes with the other samples of the batch. (With running statistics another check
# stops it, since the layer has buffers.)
# Why: validators are looked up by type(module), not by isinstance.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --disable-pip-version-check install -q torch==2.13.0 opacus==1.6.0 numpy
cd "$folder"
venv/bin/python -W ignore - <<'END'
import torch
from opacus import PrivacyEngine
from opacus.validators import ModuleValidator
from torch import nn


class Norm(nn.BatchNorm2d):
    """A user's own: the name is new, the forward is torch's."""


def network(kind):
    torch.manual_seed(0)
    norm = kind(8, track_running_stats=False)
    pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), norm, nn.ReLU(), *pool, nn.Linear(8, 2))


refused = {kind.__name__: len(ModuleValidator.validate(network(kind))) for kind in (nn.BatchNorm2d, Norm)}
print("layers refused:", refused)
assert refused == {"BatchNorm2d": 1, "Norm": 0}

images, labels = torch.randn(16, 3, 8, 8), torch.randint(0, 2, (16,))
model = network(Norm)
model, optimizer, _ = PrivacyEngine().make_private(
    module=model,
    optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
    data_loader=torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), 4),
    noise_multiplier=1.0,
    max_grad_norm=1.0,
)


def gradient_of_the_first(peers):
    model.zero_grad()
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(images[[0, *peers]]), labels[[0, *peers]]).backward()
    return model._module[5].weight.grad_sample[0].clone()


change = float((gradient_of_the_first([1, 2]) - gradient_of_the_first([3, 4])).abs().max())
optimizer.step()
print(f"make_private took it; with other peers the first sample's gradient moves by {change:.3f}")
assert change > 1e-3
END
