"""Give an existing model our layers, and take them away again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from normdrop.arguments import check_choice, check_flag, check_model
from normdrop.graph import fusion
from normdrop.graph.forward import FusedForward
from normdrop.memory.low import Memory, memory_restored, restore_memory, with_memory
from normdrop.nn import batch_norm
from normdrop.nn.conv2d import Conv2d
from normdrop.nn.linear import Linear
from normdrop.surgery.classes import CLASSES, replaceable
from normdrop.surgery.convolution import Convolution, set_convolution
from normdrop.surgery.layout import Layout, set_layout
from normdrop.surgery.linear import Products, set_linear

__all__ = ["convert", "revert", "reverted"]

_Module = TypeVar("_Module", bound=torch.nn.Module)

_TORCH = {ours: theirs for theirs, ours in CLASSES.items()}
_TORCH |= {
    Conv2d: torch.nn.Conv2d,
    Linear: torch.nn.Linear,
}  # given for layout, convolution and linear

_NORM = {"activation": None, "nonfinite": "propagate"}
_DROPOUT = {"scaling": "train"}


def convert(
    model: _Module,
    *,
    fuse: bool = True,
    layout: Layout = "keep",
    linear: Products = "keep",
    convolution: Convolution = "keep",
    memory: Memory = "normal",
) -> _Module:
    """Give a model our batch normalization and dropout, in place, and fuse what follows them.

    The layers stay the same objects and get another class: parameters, buffers, hooks, flags and
    the places where a shared layer stands are what they were, so optimizers and checkpoints go on
    working. Left as they are: SyncBatchNorm, subclasses, lazy, parametrized and quantized layers,
    layers whose forward was replaced; :func:`normdrop.plan` names them.

    Where the model's code can be traced, BN → ReLU, BN → add → ReLU and either of them followed by
    dropout become one operator (also leaky ReLU, and a mere BN → add). Nothing is
    fused across a hook or a second use of what lies between. A call that is not as it was when
    traced (other arguments, a hook or an attribute set since) runs the model's own code.

    Outputs, gradients and running statistics equal the original's up to rounding. Dropout's masks
    differ from torch's, from which another generator draws them.

    Args:
        model: any module; it is changed.
        fuse: fuse batch normalization with what follows it.
        layout: ``"channels_last"`` lays out the weights of 2-D convolutions so, and with them
            everything behind; ``"auto"`` does so where that is faster, on the CPU. It is not the
            default, since some code looks at strides. A model that flattens a map by
            ``x.view(n, -1)`` needs ``x.flatten(1)``. Convert before the optimizer's first step:
            its momentum keeps the strides it began with, and torch's ``fused=True`` takes them
            for the weight's without a check. Parameters and numbers are the same, checkpoints
            load either way, and :func:`revert` leaves the layout. Strided 1×1 convolutions get a
            subclass, which goes around a fault of oneDNN in this layout.
        linear: ``"auto"`` lets ``torch.nn.Linear`` layers take oneDNN's products where those are
            faster: float32 on AMD processors with AVX-512, about twice as fast. It is not the
            default, since the layers become a subclass, which tools that look for the very class
            (dynamic quantization) pass by.
        convolution: ``"auto"`` lets 3×3 convolutions with stride 1 and padding 1 take Winograd's
            algorithm in float32, less than half the time on processors with AVX2. It acts where
            the channels lie last: together with ``layout``. Numbers differ by rounding, as
            docs/convolution.md has it; the default keeps torch's. These layers become a
            subclass, too.
        memory: "low" keeps less for backward, for some more time and with the same gradients:
            what batch normalization and its activation gave is worked out again. "normal" leaves
            the model as it is in this respect.

    Returns:
        The model.

    Raises:
        UserError: another ``layout``, ``linear``, ``convolution`` or ``memory``. Nothing is
            changed.
        TypeError: no module, or a ``fuse`` that is neither True nor False.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.ReLU(),
        ...                             torch.nn.Dropout(0.2))
        >>> model is convert(model)
        True
        >>> type(model[0]), model[2].keep
        (<class 'normdrop.nn.batch_norm.BatchNorm1d'>, 0.8)
        >>> type(revert(model)[0])
        <class 'torch.nn.modules.batchnorm.BatchNorm1d'>
    """
    check_model("convert", model)
    check_flag("convert", "fuse", fuse)
    for name, value, choices in (
        ("layout", layout, Layout),
        ("linear", linear, Products),
        ("convolution", convolution, Convolution),
        ("memory", memory, Memory),
    ):
        check_choice(name, value, choices)
    set_layout(model, layout)
    set_linear(model, linear)
    set_convolution(model, convolution)
    found = fusion.find(model) if fuse else []
    for module in replaceable(model):
        _give_class(module, CLASSES[type(module)])
    for forward in found:
        forward.install()
    return with_memory(model, memory)


def revert(model: _Module) -> _Module:
    """Give torch's classes back to every layer of ours, in place; fusion and ``memory`` end too.

    The layout stays. In channels_last, strided 1×1 convolutions are then torch's again, with what
    :class:`normdrop.nn.conv2d.Conv2d` says of oneDNN's fault in their gradients.

    Args:
        model: a converted model, or one built of our layers.

    Returns:
        The model.

    Raises:
        ValueError: a layer that does what torch's class cannot: an activation of its own, another
            ``nonfinite`` than "propagate", another ``scaling`` than "train". Nothing is changed.
        TypeError: no module.

    Example:
        >>> model = convert(torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.ReLU()))
        >>> type(revert(model)[0]) is torch.nn.BatchNorm1d
        True
    """
    check_model("revert", model)
    layers = _ours("revert", model)
    fusion.remove(model)
    restore_memory(model)
    for module in layers:
        for name in _extras(module):
            vars(module).pop(name, None)
        module.__class__ = _TORCH[type(module)]
    return model


@contextmanager
def reverted(model: _Module) -> Iterator[_Module]:
    """Give torch's classes back for the block, and ours again behind it.

    Some tools look for the very classes of torch and pass by all others without a word: torch.fx's
    quantization does not fold batch normalization, opacus' validator does not see it. Inside the
    block the model is as after :func:`revert`. Behind it the same layers have our classes again,
    and fusion, ``layout``, ``linear`` and ``memory="low"`` act as before, also after an exception.

    What was done to the model meanwhile stays: parameters, flags, hooks. A layer that was put in is
    left as it is, and so is one that got another class, or a ``qconfig``; fused code steps aside
    where such a layer stands, and :func:`convert` takes it up. What a tool made of the model by
    copying it stays torch's.

    Args:
        model: a converted model, or one built of our layers, such as those of
            :mod:`normdrop.networks`.

    Yields:
        The model.

    Raises:
        ValueError: as :func:`revert`. Nothing is changed.
        TypeError: no module.

    Example:
        >>> model = convert(torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.ReLU()))
        >>> with reverted(model):
        ...     type(model[0])
        <class 'torch.nn.modules.batchnorm.BatchNorm1d'>
        >>> type(model[0])
        <class 'normdrop.nn.batch_norm.BatchNorm1d'>
    """
    check_model("reverted", model)
    layers = [(module, type(module)) for module in _ours("reverted", model)]
    forwards = [
        (module, forward)
        for module in model.modules()
        if isinstance(forward := vars(module).get("forward"), FusedForward)
    ]
    with memory_restored(model):
        try:
            yield revert(model)
        finally:
            for module, kind in layers:
                if type(module) is _TORCH[kind] and getattr(module, "qconfig", None) is None:
                    _give_class(module, kind)
            for module, forward in forwards:
                vars(module).setdefault("forward", forward)


def _give_class(module: torch.nn.Module, kind: type[torch.nn.Module]) -> None:
    """Make a layer ours; whatever keeps a reference to it goes on meaning the same object."""
    module.__class__ = kind
    vars(module).update(_extras(module))
    if isinstance(module, batch_norm._BatchNorm):
        with torch.inference_mode(False):  # statistics made in it could not be trained later
            module.widen_statistics()


def _ours(who: str, model: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers of our classes, if they do nothing that torch's cannot."""
    layers = [(path, module) for path, module in model.named_modules() if type(module) in _TORCH]
    for path, module in layers:
        for name, value in _extras(module).items():
            if getattr(module, name) != value:
                raise ValueError(
                    f"{who}: expected layers that torch has as well, got {path or 'the model'} "
                    f"with {name}={getattr(module, name)!r}; build it with {name}={value!r}"
                )
    return [module for _, module in layers]


def _extras(module: torch.nn.Module) -> dict[str, str | None]:
    """The attributes that ours have and torch's have not, with what they are by default."""
    if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
        return dict(_NORM)
    return dict(_DROPOUT) if isinstance(module, torch.nn.modules.dropout._DropoutNd) else {}
