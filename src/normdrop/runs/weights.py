"""Weights and checkpoints that were written before: read them, or say what is wrong with them."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from normdrop.errors import UserError
from normdrop.runs.folder import (
    RESULT,
    WEIGHTS,
    best_checkpoint,
    command_to_repeat,
    command_to_resume,
    damaged,
)
from normdrop.runs.network import build_network
from normdrop.runs.read import read_record, read_result

__all__ = ["best_weights", "load_checkpoint", "load_network", "with_weights"]


def load_network(folder: Path) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The trained network of a run folder, in evaluation mode, and what run.json says.

    Raises:
        UserError: the folder is no finished run, or its weights belong to another network.
    """
    record = read_record(folder)
    path = folder / WEIGHTS
    if not path.exists():
        raise UserError(_without_weights(folder))
    network = build_network(record["network"])
    try:
        weights = safetensors.torch.load(path.read_bytes())
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise damaged(path, error) from error
    return with_weights(network, weights, path).eval(), record


def _without_weights(folder: Path) -> str:
    """Why a run has no weights, and how to get some."""
    if not (folder / RESULT).exists():
        return f"The run {folder} has no weights yet; finish it with: {command_to_resume(folder)}"
    if best_checkpoint(folder).exists():
        return (
            f"The run {folder} has lost its weights; write them again from its checkpoint with: "
            f"{command_to_resume(folder)}"
        )
    if diverged := read_result(folder).get("diverged"):
        return (
            f"The run {folder} diverged in epoch {diverged} and left no weights; train again with "
            f"a lower learning rate: {command_to_repeat(folder)} --learning-rate …"
        )
    return (
        f"The run {folder} has lost its weights and its checkpoints; train again with: "
        f"{command_to_repeat(folder)}"
    )


def with_weights(
    network: torch.nn.Module, weights: Mapping[str, Tensor], path: str | os.PathLike[str]
) -> torch.nn.Module:
    """Load weights into a network; when names or shapes differ, say which.

    Raises:
        UserError: the weights belong to another network.
    """
    own = network.state_dict()
    differ = [f"{name} is missing" for name in own if name not in weights]
    differ += [f"{name} is unknown" for name in weights if name not in own]
    differ += [
        f"{name} should have shape {tuple(own[name].shape)}, not {tuple(value.shape)}"
        for name, value in weights.items()
        if name in own and own[name].shape != value.shape
    ]
    if differ:
        more = f"; and {len(differ) - 3} more" if len(differ) > 3 else ""
        raise UserError(
            f"{os.fspath(path)} belongs to another network: {'; '.join(differ[:3])}{more}"
        )
    dtypes = {value.dtype for value in weights.values() if value.is_floating_point()}
    if len(dtypes) == 1:
        network.to(dtypes.pop())
    network.load_state_dict(dict(weights))
    return network


def load_checkpoint(path: Path, network: torch.nn.Module) -> dict[str, Any]:
    """A checkpoint of this network; loading it never runs code from the file.

    Raises:
        UserError: the file is missing, cut off, no checkpoint, or of another network.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        state, _ = checkpoint["state_dict"], checkpoint["callbacks"]["Record"]
    except FileNotFoundError:
        raise UserError(f"There is no checkpoint {path}; start the run again") from None
    except (
        RuntimeError,
        OSError,
        EOFError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        KeyError,
        TypeError,
        ValueError,
    ) as error:
        reason = str(error).strip().split("\n")[0][:120]
        raise damaged(path, f"it is no checkpoint of a run: {reason}") from error
    own = {f"network.{name}": value for name, value in network.state_dict().items()}
    shapes = {name: tuple(value.shape) for name, value in own.items()}
    if shapes != {name: tuple(value.shape) for name, value in state.items()}:
        with_weights(network, _network_part(state), path)
    return dict(checkpoint)


def best_weights(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights to evaluate: those of the moving average where there is one."""
    return _network_part(checkpoint["state_dict"]) | dict(checkpoint["averaged"])


def _network_part(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("network."): value for name, value in state.items()}
