"""Fold batch normalization into the convolution or linear layer before it."""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from normdrop.arguments import check_model
from normdrop.errors import UserError
from normdrop.graph import fusion
from normdrop.graph.absorb import absorb
from normdrop.graph.matches import Match, Matches, find_matches
from normdrop.memory.low import restore_memory
from normdrop.nn.add_activate import AddActivate

__all__ = ["FoldPlan", "FoldRow", "fold", "fold_plan"]


@dataclass(frozen=True)
class FoldRow:
    """What becomes of one batch normalization.

    Attributes:
        path: its name in the model.
        into: the name of the layer that takes it, or None.
        why: why it is left; empty if it is folded.
    """

    path: str
    into: str | None
    why: str


@dataclass(frozen=True)
class FoldPlan:
    """What :func:`fold_plan` gives; ``print`` gives a table.

    Attributes:
        rows: one for each batch normalization.
        notes: where the folded model takes inputs of other dimensions than the model.
    """

    rows: tuple[FoldRow, ...]
    notes: tuple[str, ...] = ()

    @property
    def folded(self) -> tuple[FoldRow, ...]:
        """The rows of what is folded."""
        return tuple(row for row in self.rows if row.into is not None)

    @property
    def left(self) -> tuple[FoldRow, ...]:
        """The rows of what is left."""
        return tuple(row for row in self.rows if row.into is None)

    def __str__(self) -> str:
        if not self.rows:
            return "no batch normalization"
        header = ("batch normalization", "folded into", "why not")
        lines = [
            header,
            *((row.path or "(model)", row.into or "", row.why) for row in self.rows),
        ]
        widths = [max(len(line[i]) for line in lines) for i in range(2)]
        table = [
            "  ".join([*(c.ljust(w) for c, w in zip(line, widths, strict=False)), line[2]]).rstrip()
            for line in lines
        ]
        total = f"{len(self.folded)} of {len(self.rows)} batch normalizations folded"
        return "\n".join([*table, total, *self.notes])

    __repr__ = __str__


def fold_plan(model: torch.nn.Module) -> FoldPlan:
    """Say what :func:`fold` would do to each batch normalization, and why it would leave one.

    Args:
        model: any module; it stays as it is.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).eval()
        >>> print(fold_plan(model))
        batch normalization  folded into  why not
        1                    0
        1 of 1 batch normalizations folded
        dimensions: where 1 stood, the folded model also takes a map without a batch dimension, ...
    """
    check_model("fold_plan", model)
    return _plan(model, find_matches(model))


def _plan(model: torch.nn.Module, matches: Matches) -> FoldPlan:
    into = {match.norm_path: match.layer_path for match in matches.found}
    rows = {path: FoldRow(path, into.get(path), "") for path in into}
    rows.update({path: FoldRow(path, None, why) for path, why in matches.left.items()})
    order = [name for name, _ in model.named_modules() if name in rows]
    return FoldPlan(tuple(rows[name] for name in order), tuple(_notes(matches)))


def _notes(matches: Matches) -> Iterator[str]:
    """Say where a folded layer takes inputs of other dimensions than the two that it was."""
    vectors: list[str] = []
    maps: list[str] = []
    for match in matches.found:
        (vectors if isinstance(match.norm, torch.nn.BatchNorm1d) else maps).append(match.norm_path)
    if vectors:
        yield (
            f"dimensions: where {_named(vectors)} stood, the folded model takes (N, C) behind a "
            "linear layer and (N, C, L) behind a convolution, and raises for what BatchNorm1d "
            "takes besides"
        )
    if maps:
        yield (
            f"dimensions: where {_named(maps)} stood, the folded model also takes a map without a "
            "batch dimension, for which batch normalization raises"
        )


def _named(paths: list[str]) -> str:
    shown = ", ".join(path or "(model)" for path in paths[:3])
    return shown if len(paths) <= 3 else f"{shown} and {len(paths) - 3} more"


def fold(
    model: torch.nn.Module,
    example: Any = None,
    *,
    inplace: bool = False,
    fuse: bool = True,
) -> torch.nn.Module:
    r"""Fold every batch normalization in evaluation mode into the layer before it.

    A convolution or linear layer with weight W (K, …) and bias b (K), and the batch normalization
    of its K channels, are together one layer of the same kind:

    .. math::
        W'_k = \frac{\gamma_k}{\sqrt{\sigma_k^2 + \epsilon}} W_k, \qquad
        b'_k = \frac{\gamma_k}{\sqrt{\sigma_k^2 + \epsilon}} (b_k - \mu_k) + \alpha_k

    with the running mean μ (K) and variance σ² (K). They are computed in float64 and stored in the
    weight's type, so the model's outputs change by rounding only.

    The result is for inference: it has no batch normalization to train any more. It is a module of
    the same class, made of the same layers, with ``Identity`` (or, for our layers with an
    activation, a stand-in that adds and activates) where a batch normalization was. The statistics
    are gone from the state_dict, and a folded layer has a bias. It pickles, copies, saves, compiles
    and exports.

    On the CPU the model's 2-D convolutions also add the residual and apply the ReLU, leaky ReLU,
    ReLU6, SiLU or hardswish that follow them while they write their output, by oneDNN's operators.
    That is done
    in float32 without autograd, so call the model under ``torch.inference_mode()``. Otherwise,
    under torch.compile, torch.export, autocast and torch.func, and where a hook or a layer was set
    since, the same is computed in plain PyTorch. Each convolution keeps a second copy of its
    weight, in oneDNN's layout, for each of the last two input shapes.

    Left as they are, and named with the reason by :func:`fold_plan`: batch normalizations in
    training mode or without running statistics; layers with hooks, of unknown classes, that are
    used twice or share a parameter; a layer whose output is read by anything else, or may be where
    an argument with a default, or one of several norms, chooses what runs. What follows what is
    read off ``torch.fx``, for the model, or where it cannot be traced for its children, if its code
    does no more with them than to call them. Where an attribute or argument that is set later makes
    the forward run another way, a call of the folded model raises instead of being wrong.
    All that is about what the forward calls: whoever calls a part of the model by itself, ending
    between a convolution and its batch normalization, gets the folded layer's output there.

    Args:
        model: any module, in evaluation mode.
        example: an input (a tensor, a tuple of arguments or a dict of keyword arguments) on which
            the result is compared with the model.
        inplace: change the model itself instead of a copy.
        fuse: let convolutions add and activate.

    Returns:
        The folded model.

    Raises:
        UserError: the result differs on the example (then the model is as it was), or the model
            cannot be copied.
        TypeError: no module, or an example without a tensor.

    Warns:
        UserWarning: the model is in training mode, so that nothing is folded.

    Example:
        >>> from normdrop import networks
        >>> model = networks.resnet(8, 10).eval()
        >>> x = torch.randn(2, 3, 32, 32)
        >>> with torch.inference_mode():
        ...     bool(torch.allclose(fold(model)(x), model(x), atol=1e-5))
        True

    Reference:
        B. Jacob et al.: Quantization and Training of Neural Networks for Efficient
        Integer-Arithmetic-Only Inference. CVPR 2018 (section 3.2).
    """
    check_model("fold", model)
    if example is not None and not any(isinstance(leaf, Tensor) for leaf in tree_leaves(example)):
        raise TypeError(
            "fold: expected `example` to be a tensor, a tuple of arguments or a dict of keyword "
            f"arguments but got {example!r}"
        )
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    if norms and all(norm.training for norm in norms):
        warnings.warn(
            "fold: nothing is folded, since the model is in training mode; call model.eval() first",
            stacklevel=2,
        )
    # Tensors made in inference mode could not be written to later.
    with torch.inference_mode(False), torch.no_grad():
        folded = model
        if example is not None or not inplace:
            folded = _copy(model)
            # A copy runs: a batch normalization that is still in training mode would change.
            expected = None if example is None else _run(_copy(model), example)
            _fold(folded, fuse)
            if expected is not None:
                _check(expected, _run(_copy(folded), example))
        if inplace:
            folded = model
            _fold(model, fuse)
    return folded


def _copy(model: torch.nn.Module) -> torch.nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise UserError(
            f"fold: expected a model that copy.deepcopy can copy, but {type(model).__name__} "
            f"cannot be copied ({error}); `inplace=True`, without an example, changes it instead"
        ) from error


def _fold(model: torch.nn.Module, fuse_convolutions: bool) -> None:
    # What convert did for training is undone first; a norm that is left keeps its class.
    fusion.remove(model)
    restore_memory(model)
    matches = find_matches(model)
    pairs = defaultdict(list)
    for match in matches.found:
        stand_in = _fold_one(match)
        pairs[match.trace].append((match.layer, stand_in))
        head, _, name = match.norm_path.rpartition(".")
        setattr(model.get_submodule(head), name, stand_in)
        match.trace.modules[match.norm_node] = stand_in
    for trace, nodes in matches.convolutions:
        absorb(trace, nodes if fuse_convolutions else [], pairs[trace])


def _fold_one(match: Match) -> torch.nn.Module:
    """Fold one batch normalization; give what stands where it was."""
    layer, norm = match.layer, match.norm
    scale, shift = _scale_and_shift(norm)
    # Only inference mode may write to tensors that were made in it.
    with torch.inference_mode(layer.weight.is_inference()), torch.no_grad():
        layer.weight.copy_(layer.weight.double() * _along_outputs(layer, scale))
        if layer.bias is None:
            bias = shift.to(layer.weight.dtype)
            layer.bias = torch.nn.Parameter(bias, requires_grad=layer.weight.requires_grad)
        else:
            layer.bias.copy_(shift + scale * layer.bias.double())
    dims = None
    if isinstance(norm, torch.nn.BatchNorm1d):
        dims = 2 if isinstance(layer, torch.nn.Linear) else 3
    activation = getattr(norm, "activation", None)
    is_torchs = type(norm).__module__.startswith("torch.")
    stand_in = torch.nn.Identity() if is_torchs and dims is None else AddActivate(activation, dims)
    return stand_in.train(norm.training)


def _scale_and_shift(norm: Any) -> tuple[Tensor, Tensor]:
    """Give γ/√(σ² + ε) and α − μγ/√(σ² + ε), in float64."""
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return scale, shift


def _along_outputs(layer: Any, scale: Tensor) -> Tensor:
    """Shape a vector of the outputs so that it multiplies the weight.

    A transposed convolution's weight is (C, K / groups, …): its inputs lie group after group along
    the first dimension, so the scale differs from group to group.
    """
    weight = layer.weight
    sides = (1,) * (weight.dim() - 2)
    if not getattr(layer, "transposed", False):
        return scale.view(-1, 1, *sides)
    by_group = scale.view(layer.groups, 1, -1)
    inputs = weight.shape[0] // layer.groups
    return by_group.expand(-1, inputs, -1).reshape(weight.shape[0], -1, *sides)


def _run(model: torch.nn.Module, example: Any) -> list[Tensor]:
    """Give the tensors that the model gives for an example."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        if isinstance(example, Mapping):
            output = model(**example)
        elif isinstance(example, (tuple, list)):
            output = model(*example)
        else:
            output = model(example)
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _check(expected: Sequence[Tensor], got: Sequence[Tensor]) -> None:
    """Raise UserError where the folded model does another thing than the model."""
    for want, have in zip(expected, got, strict=True):
        if want.numel() == 0 or not want.is_floating_point():
            continue
        difference = float((have.double() - want.double()).abs().max())
        allowed = torch.finfo(want.dtype).eps ** 0.5 * float(want.double().abs().max())
        if not difference <= allowed:
            raise UserError(
                f"fold: expected the folded model to agree with the model within {allowed:.2g} on "
                f"the example, but they differ by {difference:.2g}; torch.fx may have recorded "
                "another path through its forward than the one that the example takes"
            )
