"""A small residual network with torch's layers, and the same with ours: written and converted."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import normdrop
from normdrop import networks, nn

KINDS = ["written", "converted"]


class Theirs(torch.nn.Module):
    """As a user of torch writes it, (N, 3, H, W) to (N, 4)."""

    def __init__(self, momentum: float | None = 0.1, drop: float = 0.0) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(8, momentum=momentum)
        self.conv2 = torch.nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = torch.nn.BatchNorm2d(8, momentum=momentum)
        self.relu = torch.nn.ReLU()
        self.drop = torch.nn.Dropout(drop)
        self.fc = torch.nn.Linear(8, 4)
        with torch.no_grad():
            for layer in (self.bn1, self.bn2):
                layer.weight.uniform_(0.5, 1.5)
                layer.bias.uniform_(-0.5, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)) + x)
        return self.fc(self.drop(x).mean((2, 3)))


class Ours(Theirs):
    """The same with our layers, BN→ReLU and BN→add→ReLU each in one call."""

    def __init__(self, momentum: float | None = 0.1, drop: float = 0.0) -> None:
        super().__init__(momentum, drop)
        self.bn1 = nn.BatchNorm2d(8, momentum=momentum, activation="relu")
        self.bn2 = nn.BatchNorm2d(8, momentum=momentum, activation="relu")
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x))
        x = self.bn2(self.conv2(x), residual=x)
        return self.fc(self.drop(x).mean((2, 3)))


class Block(torch.nn.Module):
    """He et al.'s basic block with the shortcut that pads."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.stride, self.extra = width // channels, width - channels
        self.conv1 = torch.nn.Conv2d(channels, width, 3, self.stride, 1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(width)
        self.conv2 = torch.nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = torch.nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        if self.extra:
            x = x[:, :, :: self.stride, :: self.stride]
            x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, self.extra))
        return torch.relu(y + x)


class PlainResNet8(torch.nn.Module):
    """normdrop.networks.resnet(8, 4, width=8), as a user of torch writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(8)
        self.layer1 = torch.nn.Sequential(Block(8, 8))
        self.layer2 = torch.nn.Sequential(Block(8, 16))
        self.layer3 = torch.nn.Sequential(Block(16, 32))
        self.fc = torch.nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.fc(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def make_pair(kind: str, **options: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Ours and theirs, with the same parameters."""
    theirs = PlainResNet8() if kind == "network" else Theirs(**options)
    if kind == "converted":
        return normdrop.convert(copy.deepcopy(theirs)), theirs
    if kind == "low memory":
        return normdrop.convert(copy.deepcopy(theirs), memory="low"), theirs
    ours = networks.resnet(8, 4, width=8, **options) if kind == "network" else Ours(**options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def make_images(batch: int = 16) -> Tensor:
    """Enough pixels that our own operator takes them, not torch's."""
    return torch.randn(batch, 3, 12, 12)


def check_equal(ours: torch.nn.Module, theirs: torch.nn.Module, **options: float) -> None:
    """The same parameters, gradients and buffers."""
    options = options or {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), **options)
    wanted = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, wanted[name].grad, **options)


def train_step(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A forward and a backward pass; what comes back is the output."""
    y = model(x)
    y.sin().sum().backward()
    return y.detach()


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest) -> Callable[..., tuple[torch.nn.Module, torch.nn.Module]]:
    return lambda **options: make_pair(request.param, **options)


@pytest.fixture(scope="session")
def make_networks() -> Callable[..., tuple[torch.nn.Module, torch.nn.Module]]:
    return make_pair


@pytest.fixture
def network() -> tuple[torch.nn.Module, torch.nn.Module]:
    """One of our own networks, and the same written with torch's layers."""
    return make_pair("network")


@pytest.fixture
def images() -> Callable[..., Tensor]:
    return make_images


@pytest.fixture
def check() -> Callable[..., None]:
    return check_equal


@pytest.fixture
def step() -> Callable[..., Tensor]:
    return train_step
