"""What the tests of converted models share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import normdrop
from normdrop.nn.batch_norm import _BatchNorm


def make_images(dtype: torch.dtype = torch.float32) -> Tensor:
    """Enough pixels that our own operator takes them, not torch's."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(16, 3, 12, 12, generator=generator).to(dtype)


def step(model: torch.nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """The output, and the gradients of the input and of every parameter."""
    x = x.clone().requires_grad_()
    y = model(x)
    inputs = [x, *model.parameters()]
    grads = torch.autograd.grad(y.sin().sum(), inputs, allow_unused=True)
    return y.detach(), list(grads)


def check_as_original(converted: torch.nn.Module, original: torch.nn.Module) -> None:
    """Outputs, gradients and running statistics, in training and evaluation, in both types."""
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        ours = copy.deepcopy(converted).to(dtype)
        theirs = copy.deepcopy(original).to(dtype)
        for training in (True, True, False):
            ours.train(training)
            theirs.train(training)
            results = [step(model, make_images(dtype)) for model in (ours, theirs)]
            torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)
            states = [model.state_dict() for model in (ours, theirs)]
            torch.testing.assert_close(*states, rtol=tolerance, atol=tolerance)


@pytest.fixture
def as_original() -> Callable[[torch.nn.Module, torch.nn.Module], None]:
    return check_as_original


@pytest.fixture
def convert_checked() -> Callable[..., torch.nn.Module]:
    """A function that converts a copy, checks it against the original, and gives it back.

    ``expected`` is what plan says of the norms that are fused, by name.
    """

    def convert(original: torch.nn.Module, expected: dict[str, str]) -> torch.nn.Module:
        plan = normdrop.plan(original)
        assert {row.path: row.why for row in plan if row.action == "fuse"} == expected
        converted = normdrop.convert(copy.deepcopy(original))
        check_as_original(converted, original)
        return converted

    return convert


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, str | None]]:
    """For every batch normalization that runs: has it a residual, which activation."""
    calls: list[tuple[bool, str | None]] = []
    normalize = _BatchNorm.normalize

    def spy(
        self: Any, x: Tensor, residual: Tensor | None, activation: str | None, *keep: float
    ) -> Tensor:
        calls.append((residual is not None, activation))
        return normalize(self, x, residual, activation, *keep)

    monkeypatch.setattr(_BatchNorm, "normalize", spy)
    return calls


@pytest.fixture
def images() -> Tensor:
    return make_images()
