"""Every instruction set that runs here, each in a process of its own, and the path without kernels.

Dropout gives the same bits on all of them; batch normalization agrees with float64.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as torch_functional

import normdrop
from normdrop import functional

TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SETS = ("baseline", "avx2", "avx512")
CAPABILITY = torch.backends.cpu.get_cpu_capability()

Results = dict[str, Tensor]


def layouts(x: Tensor) -> dict[str, Tensor]:
    return {
        "contiguous": x,
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "transposed": x.transpose(1, 2),
        "sliced": x[..., 1:],
    }


def dropout_results() -> Results:
    """Outputs for layouts in which each of the loops runs, rows that are no whole vectors too."""
    results = {}
    for dtype in TYPES:
        for shape in ((2, 19, 7, 9), (2, 40, 8, 9), (1, 64, 16, 16)):
            x = torch.arange(float(torch.Size(shape).numel()))
            x = x.remainder(97).add(1).reshape(shape).to(dtype)
            for layout, y in layouts(x).items():
                for keep in (0.5, 0.3, 1 - 2**-16):
                    for shared in ((), (2, 3)):
                        name = f"{dtype} {shape} {layout} {keep} {shared}"
                        results[name] = functional.dropout(
                            y, keep=keep, seed=77, sample_offset=5, shared_dims=shared
                        )
    return results


def batch_norm_inputs() -> dict[str, tuple[Tensor, ...]]:
    """x, residual, the gradient of y, and γ and α, in float64."""
    generator = torch.Generator().manual_seed(3)
    inputs = {}
    for shape in ((4, 19, 7, 9), (33, 70), (3, 5, 11)):
        x, residual, grad = (
            torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)
        )
        vectors = [torch.rand(shape[1], generator=generator, dtype=torch.float64) for _ in range(2)]
        inputs[str(shape)] = (3 * x + 2, residual, grad, *vectors)
    return inputs


def batch_norm_results(dtype: torch.dtype, function: Any) -> Results:
    """Output and gradients of batch norm + residual + ReLU, in both memory formats."""
    results = {}
    for name, tensors in batch_norm_inputs().items():
        for layout in ("contiguous", "channels_last"):
            x, residual, grad, weight, bias = (
                t.to(dtype).contiguous(memory_format=torch.channels_last)
                if layout == "channels_last" and t.dim() == 4
                else t.to(dtype)
                for t in tensors
            )
            leaves = [t.requires_grad_() for t in (x, residual, weight, bias)]
            y = function(*leaves)
            grads = torch.autograd.grad(y, leaves, grad)
            parts = ("y", "grad_x", "grad_residual", "grad_weight", "grad_bias")
            for part, value in zip(parts, (y.detach(), *grads), strict=True):
                results[f"{name} {layout} {part}"] = value
    return results


def ours(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.batch_norm(
        x, None, None, weight, bias, True, residual=residual, activation="relu"
    )


def torchs(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = torch_functional.batch_norm(x, None, None, weight, bias, True)
    return torch.relu(y + residual)


def results_under(tmp_path: Path, **environment: str) -> tuple[Results, Results]:
    """What another process gives, with these in its environment."""
    path = tmp_path / "results.pt"
    done = subprocess.run(
        [sys.executable, __file__, path],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == environment.get("NORMDROP_ISA", "None")  # None without kernels
    dropout, batch_norm = torch.load(path, weights_only=True)
    return dropout, batch_norm


def check(dropout: Results, batch_norm: Results) -> None:
    here = dropout_results()
    assert dropout.keys() == here.keys()
    assert [name for name in here if not torch.equal(here[name], dropout[name])] == []
    exact = batch_norm_results(torch.float64, torchs)
    assert batch_norm.keys() == exact.keys()
    for name, value in batch_norm.items():
        torch.testing.assert_close(
            value.double(), exact[name], rtol=1e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.skipif(not normdrop.has_kernels(), reason="there are no instruction sets to choose")
@pytest.mark.parametrize("isa", SETS)
def test_instruction_set_gives_the_same(isa, tmp_path):
    lacks = {"DEFAULT": SETS[1:], "AVX2": SETS[2:]}.get(CAPABILITY, ())
    if isa in lacks:
        pytest.skip(f"this processor has no {isa}")
    check(*results_under(tmp_path, NORMDROP_ISA=isa))


@pytest.mark.skipif(not normdrop.has_kernels(), reason="that is the path which is taken here")
def test_path_without_kernels_gives_the_same(tmp_path):
    check(*results_under(tmp_path, NORMDROP_KERNELS="0"))


@pytest.mark.skipif(not normdrop.has_kernels(), reason="there are no instruction sets to choose")
def test_instruction_set_of_unknown_name_is_said():
    done = subprocess.run(
        [sys.executable, "-c", "import normdrop.functional"],
        env={**os.environ, "NORMDROP_ISA": "AVX-512"},
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    assert "NORMDROP_ISA must be one of baseline, avx2, avx512, got 'AVX-512'" in done.stderr


if __name__ == "__main__":
    warnings.simplefilter("error")
    torch.save((dropout_results(), batch_norm_results(torch.float32, ours)), sys.argv[1])
    print(normdrop.instruction_set())
