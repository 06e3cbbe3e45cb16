"""Training in less memory: outputs of batch normalization are worked out again in backward."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from normdrop.arguments import check_choice
from normdrop.memory import recompute

__all__ = [
    "Memory",
    "is_saving_memory",
    "memory_restored",
    "restore_memory",
    "save_memory",
    "with_memory",
]

Memory = Literal["normal", "low"]
"""What a model keeps for backward: what autograd asks for, or less; see :func:`save_memory`."""

_Module = TypeVar("_Module", bound=torch.nn.Module)


def with_memory(model: _Module, memory: Memory) -> _Module:
    """Give the model back, with :func:`save_memory` where ``memory`` is "low".

    Raises:
        UserError: another ``memory`` than "normal" or "low".
    """
    check_choice("memory", memory, Memory)
    return save_memory(model) if memory == "low" else model


def save_memory(model: _Module) -> _Module:
    r"""Let a model keep less for backward: not what batch normalization and its activation gave.

    .. math:: y = \mathrm{activation}(\mathrm{BN}(x) + \mathrm{residual})

    A layer that follows keeps its input y for backward. Here y is computed a second time from
    what batch normalization keeps anyway: x, the batch's mean and variance, γ and α, and the
    residual, itself maybe such an output. So of the two tensors x and y one is kept, for one more
    pass of normalization a layer. The gradients have the same bits.

    Training: as said, for the outputs of this package's batch normalization on CPU, and of its
    dropout after it, whose mask is drawn again from its seed. An output that is changed in place
    before the next layer saves it is kept. Evaluation without gradients: nothing changes.

    The model steps aside, and all is kept, under ``torch.compile``, ``torch.jit.trace`` and
    torch.func, and where other saved-tensor hooks are active around it (activation checkpointing of
    the whole model, ``save_on_cpu``). Parts of the model that are checkpointed follow their own
    rule. γ and α must not be written through ``.data`` between forward and backward: that raises.

    Args:
        model: any module; call it, not its ``forward``, since hooks do the work. They are pickled
            and copied with it.

    Returns:
        The model itself.

    Example:
        >>> from normdrop import networks
        >>> network = save_memory(networks.resnet(8, width=8))
        >>> network(torch.randn(2, 3, 32, 32)).sum().backward()
        >>> is_saving_memory(network)
        True

    Reference:
        S. Rota Bulò, L. Porzi, P. Kontschieder: In-Place Activated BatchNorm for Memory-Optimized
        Training of DNNs. CVPR 2018 (checkpointing batch normalization, section 3).
    """
    if not is_saving_memory(model):
        model.register_forward_pre_hook(_begin, prepend=True)
        model.register_forward_hook(_end, always_call=True)
        for module in model.modules():
            if type(module) is torch.nn.MaxPool2d and _note_pooling not in _hooks(module):
                module.register_forward_hook(_note_pooling)
    return model


def restore_memory(model: _Module) -> _Module:
    """Undo :func:`save_memory`, on the model and on all its parts.

    Example:
        >>> model = restore_memory(save_memory(torch.nn.ReLU()))
        >>> is_saving_memory(model)
        False
    """
    for module in model.modules():
        for key in [k for k, hook in module._forward_pre_hooks.items() if hook is _begin]:
            del module._forward_pre_hooks[key]
        for key in [k for k, hook in module._forward_hooks.items() if hook in _OURS]:
            del module._forward_hooks[key]
            module._forward_hooks_always_called.pop(key, None)
    return model


@contextmanager
def memory_restored(model: torch.nn.Module) -> Iterator[None]:
    """Undo :func:`save_memory` for a while; then its hooks are again where they stood.

    Example:
        >>> model = save_memory(torch.nn.ReLU())
        >>> with memory_restored(model):
        ...     is_saving_memory(model)
        False
        >>> is_saving_memory(model)
        True
    """
    before = [(hooks, dict(hooks)) for module in model.modules() for hooks in _tables(module)]
    restore_memory(model)
    taken = [then.keys() - hooks.keys() for hooks, then in before]
    try:
        yield
    finally:
        for (hooks, then), ours in zip(before, taken, strict=True):
            ordered = {k: hook for k, hook in then.items() if k in ours or k in hooks} | hooks
            hooks.clear()
            hooks.update(ordered)


def _tables(module: torch.nn.Module) -> tuple[dict[int, Any], ...]:
    return module._forward_pre_hooks, module._forward_hooks, module._forward_hooks_always_called


def is_saving_memory(model: torch.nn.Module) -> bool:
    """Whether :func:`save_memory` acts on the model itself (not only on a part of it)."""
    return any(hook is _begin for hook in model._forward_pre_hooks.values())


def _hooks(module: torch.nn.Module) -> list[Any]:
    return list(module._forward_hooks.values())


class _Calls(threading.local):
    """This thread's calls that are under way: the frame, the module, and what records it."""

    def __init__(self) -> None:
        self.entries: list[tuple[FrameType, torch.nn.Module, recompute.Recorder]] = []


_calls = _Calls()


def _begin(module: torch.nn.Module, args: Any) -> None:
    if torch.compiler.is_compiling():
        return
    if _calls.entries:
        _drop_interrupted()
    recorder = recompute.start()
    if recorder is not None:
        _calls.entries.append((sys._getframe(1), module, recorder))


def _end(module: torch.nn.Module, args: Any, output: Any) -> None:
    if torch.compiler.is_compiling() or all(entry[1] is not module for entry in _calls.entries):
        return
    while True:
        _, caller, recorder = _calls.entries.pop()
        recorder.__exit__(None, None, None)
        if caller is module:
            return


def _drop_interrupted() -> None:
    """End the calls that KeyboardInterrupt left: torch calls a forward hook for Exceptions only."""
    running: set[FrameType] = set()
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        running.add(frame)
        frame = frame.f_back
    while _calls.entries and _calls.entries[-1][0] not in running:
        _calls.entries.pop()[2].__exit__(None, None, None)


def _note_pooling(module: torch.nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
    """Max pooling of an output that is not kept: neither is y, nor where the maxima lay."""
    recorder = None if torch.compiler.is_compiling() else recompute.active()
    if recorder is None or not recompute.is_plain(y) or len(args) != 1 or y.grad_fn is None:
        return
    options = (module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode)
    output = recorder.note(y, _pool, (), args, options)
    if output is not None and hasattr(y.grad_fn, "_saved_result1"):
        recorder.forget(y.grad_fn._saved_result1, output, 1)


def _pool(x: Tensor, *options: Any) -> tuple[Tensor, ...]:
    y, indices = torch.nn.functional.max_pool2d_with_indices(x, *options)
    return y, indices


_OURS = (_end, _note_pooling)
