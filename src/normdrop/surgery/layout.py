"""Memory layout of a model: the weights of its convolutions decide it."""

from __future__ import annotations

from typing import Literal

import torch

from normdrop.arguments import check_choice
from normdrop.nn.conv2d import Conv2d, is_strided_point

__all__ = ["Layout", "set_layout", "weights_to_lay_out"]

Layout = Literal["auto", "channels_last", "keep"]

_CONVOLUTIONS = (torch.nn.Conv2d, torch.nn.ConvTranspose2d)

_FAST = (torch.float32, torch.bfloat16, torch.float16)
"""Types in which oneDNN's convolutions are faster in channels_last."""


def set_layout(model: torch.nn.Module, layout: Layout) -> None:
    """Let a model compute in channels_last, in place; ``"keep"`` does nothing.

    Torch's convolution gives channels_last whenever its weight lies so, and what follows keeps the
    layout of its input. So it is enough to lay out the weights of 2-D convolutions anew: shapes,
    numbers, parameter objects and the state_dict stay, only strides change. The input comes in
    either layout; one in NCHW is brought over by the first convolution.

    A strided 1×1 convolution becomes a :class:`normdrop.nn.conv2d.Conv2d`, since oneDNN computes
    wrong gradients for some of those in channels_last; parametrized ones and subclasses stay.

    ``torch.distributed.fsdp.fully_shard`` takes contiguous parameters only: "keep" is for it.

    Args:
        model: any module.
        layout: "channels_last" lays out the weights of all 2-D convolutions, plain, grouped,
            depthwise and transposed. "auto" does so on the CPU where torch has oneDNN, in float32,
            bfloat16 and float16; elsewhere, and for float64, which is slower so, it changes
            nothing. The choice rests on measurements of each kind: docs/training-step.md. Volumes
            and sequences keep their layout, which gains little there.

    Raises:
        UserError: another layout.

    Example:
        >>> convolution = torch.nn.Conv2d(3, 8, 3)
        >>> set_layout(convolution, "channels_last")
        >>> y = convolution(torch.randn(2, 3, 32, 32))
        >>> y.is_contiguous(memory_format=torch.channels_last)
        True
    """
    weights = weights_to_lay_out(model, layout)
    for module in model.modules() if layout != "keep" else ():
        # A weight on the meta device gets its values, and perhaps this layout, later.
        if (
            type(module) is torch.nn.Conv2d
            and is_strided_point(module)
            and (weights or module.weight.is_meta)
        ):
            module.__class__ = Conv2d
    for weight in weights:
        # In inference mode an ordinary weight would become one that cannot be trained later.
        with torch.inference_mode(weight.is_inference()):
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
            if weight.grad is not None:
                weight.grad = weight.grad.contiguous(memory_format=torch.channels_last)


def weights_to_lay_out(model: torch.nn.Module, layout: Layout) -> list[torch.nn.Parameter]:
    """The weights that :func:`set_layout` brings into channels_last, each once."""
    check_choice("layout", layout, Layout)
    found: dict[int, torch.nn.Parameter] = {}
    for module in model.modules() if layout != "keep" else ():
        weight = module._parameters.get("weight") if isinstance(module, _CONVOLUTIONS) else None
        # Left alone: lazy and distributed weights, which have storage of another kind.
        if type(weight) is not torch.nn.Parameter or weight.dim() != 4:
            continue
        if layout == "channels_last" or _is_faster(weight):
            found[id(weight)] = weight
    return list(found.values())


def _is_faster(weight: torch.Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype in _FAST
        and torch.backends.mkldnn.is_available()
    )
