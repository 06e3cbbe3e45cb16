"""Outputs that autograd need not keep, since what they were computed from is kept anyway.

While a :class:`Recorder` is active, operators note how an output can be computed again. Where
autograd then saves such an output for the backward of the next layer, it saves that note instead,
and the output is freed. A note holds no tensor that would not be kept without it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

__all__ = ["Recorder", "Watcher", "active", "is_plain", "start", "watched"]


class Watcher(Protocol):
    """Who wants to know what is kept; see :func:`watched`."""

    def keep(self, tensor: Tensor) -> Tensor:
        """Autograd keeps the tensor, which is given back."""

    def forget(self, tensor: Tensor) -> None:
        """It is not kept after all."""


class Kept:
    """A tensor that is kept, and the version at which it was."""

    __slots__ = ("__weakref__", "instead", "mark", "tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        # The tensor itself would hold the graph that holds it.
        self.tensor = tensor.detach()
        self.version = tensor._version
        self.instead: View | None = None
        # Of a parameter that an output is computed from again: no version tells of `.data`.
        self.mark: int | None = None

    def get(self) -> Tensor:
        """The tensor; with saved-tensor hooks, torch leaves the check of the version to them."""
        if self.instead is not None:
            return self.instead.get()
        if self.tensor._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: [{self.tensor.type()} {list(self.tensor.shape)}] is at "
                f"version {self.tensor._version}; expected version {self.version} instead. Hint: "
                "enable anomaly detection to find the operation that failed to compute its "
                "gradient, with torch.autograd.set_detect_anomaly(True)."
            )
        if self.mark is not None and self.mark != _mark(self.tensor):
            raise RuntimeError(
                f"a parameter of shape {list(self.tensor.shape)} was written through its `.data` "
                'between forward and backward; with memory="low" the forward is computed again '
                "from it, so write to it before the forward or after backward"
            )
        return self.tensor

    now = get


def _mark(vector: Tensor) -> int:
    """A number that changes with the values, and with their order."""
    # int() of a tensor goes through int64, which half of the hashes are beyond.
    return int(torch.hash_tensor(vector.detach().cumsum(0)).item())


class Output:
    """What is not kept, and how to compute it again: one tensor or several.

    Residual networks chain them: every block's output is computed from the one before. Therefore
    a value is cached from its first use to its last, and none is computed twice in a backward.
    """

    __slots__ = ("cache", "function", "left", "lock", "options", "sources", "uses")

    def __init__(
        self,
        function: Callable[..., tuple[Tensor, ...]],
        sources: tuple[Kept | View | None, ...],
        options: tuple[Any, ...],
        lock: threading.Lock,
    ) -> None:
        self.function = function
        self.sources = sources
        self.options = options
        self.lock = lock
        self.uses = 0
        self.left = 0
        self.cache: tuple[Tensor, ...] | None = None

    def add_use(self) -> None:
        """Count what will ask for the value: autograd's nodes and the outputs computed from it."""
        todo = [self]
        while todo:
            output = todo.pop()
            output.uses += 1
            if output.uses == 1:
                todo += [s.output for s in output.sources if isinstance(s, View)]

    def values(self) -> tuple[Tensor, ...]:
        """The values, computed from where the chain is cached or kept; counts as one use."""
        with self.lock, torch.no_grad():
            todo = [self]
            while todo:
                output = todo[-1]
                if output.cache is None:
                    before = [s.output for s in output.sources if isinstance(s, View)]
                    if missing := [o for o in before if o.cache is None]:
                        todo += missing
                        continue
                    tensors = [None if s is None else s.now() for s in output.sources]
                    output.cache = output.function(*tensors, *output.options)
                    output.left = output.uses
                todo.pop()
            return self.taken()

    def taken(self) -> tuple[Tensor, ...]:
        """What is cached; it leaves the cache with its last use."""
        values = self.cache
        assert values is not None
        self.left -= 1
        if self.left <= 0:
            self.cache = None
        return values


class View:
    """An output, or a view of it."""

    __slots__ = ("offset", "output", "part", "shape", "strides")

    def __init__(self, output: Output, part: int, tensor: Tensor) -> None:
        self.output = output
        self.part = part
        self.shape, self.strides = tensor.shape, tensor.stride()
        self.offset = tensor.storage_offset()

    def get(self) -> Tensor:
        """The tensor, computed again if need be."""
        return self._of(self.output.values()[self.part])

    def now(self) -> Tensor:
        """The same where it is cached and the lock held."""
        return self._of(self.output.taken()[self.part])

    def _of(self, value: Tensor) -> Tensor:
        if value.shape == self.shape and value.stride() == self.strides:
            return value
        return value.as_strided(self.shape, self.strides, self.offset)


class Recorder:
    """What one forward has noted. It must not outlive the forward: it knows tensors by address."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # By the address of the storage, which the weak reference keeps from being given out again.
        self._outputs: dict[int, tuple[StorageWeakRef, int, torch.dtype, Output]] = {}
        self._kept: dict[int, weakref.ref[Kept]] = {}
        self._hooks: saved_tensors_hooks | None = None

    def __enter__(self) -> Recorder:
        self._hooks = saved_tensors_hooks(self._pack, _unpack)
        self._hooks.__enter__()
        _local.recorder = self
        return self

    def __exit__(self, *error: object) -> None:
        """Stop; after this, whatever autograd asks to save is kept."""
        if self.is_on_top() and self._hooks is not None:
            self._hooks.__exit__(*error)
        self._hooks = None
        if getattr(_local, "recorder", None) is self:
            _local.recorder = None
        self._outputs.clear()
        self._kept.clear()

    def is_on_top(self) -> bool:
        """Whether what autograd saves now goes to this recorder."""
        top = torch._C._autograd._top_saved_tensors_default_hooks(True)
        return top is not None and self._hooks is not None and top[0] is self._hooks.pack_hook

    def note(
        self,
        y: Tensor,
        function: Callable[..., tuple[Tensor, ...]],
        saved: tuple[Tensor | None, ...],
        others: tuple[Tensor | None, ...] = (),
        options: tuple[Any, ...] = (),
    ) -> Output | None:
        """``function(*saved, *others, *options)`` computes y again, as the first of a tuple.

        Args:
            y: the output; ``function`` gives its bits and its strides.
            function: it must not keep its arguments.
            saved: tensors that autograd saves for y's own backward in any case.
            others: tensors that it may save elsewhere; where it does not, y is kept as usual.
            options: what else ``function`` takes.
        """
        sources: list[Kept | View | None] = []
        for i, tensor in enumerate((*saved, *others)):
            source: Kept | View | None = None
            if tensor is not None:
                source = self._find(tensor)
                if source is None:
                    if i >= len(saved) and not self._is_kept(tensor):
                        return None
                    source = Kept(tensor)
                    if type(tensor) is torch.nn.Parameter and tensor.is_cpu:
                        source.mark = _mark(tensor)
            sources.append(source)
        output = Output(function, tuple(sources), options, self._lock)
        storage = StorageWeakRef(y.untyped_storage())
        self._outputs[storage.cdata] = (storage, y._version, y.dtype, output)
        return output

    def forget(self, tensor: Tensor, output: Output, part: int) -> None:
        """Free a tensor that was kept just now: it is that part of what ``output`` computes."""
        kept = self._kept_as(tensor)
        if kept is not None:
            if (watcher := _watcher()) is not None:
                watcher.forget(tensor)
            kept.instead = View(output, part, tensor)
            kept.tensor = tensor.new_empty(0)
            output.add_use()

    def _find(self, tensor: Tensor) -> View | None:
        if not self._outputs or not is_plain(tensor):
            return None
        found = self._outputs.get(tensor.untyped_storage()._cdata)
        if found is None or found[1] != tensor._version or found[2] is not tensor.dtype:
            return None
        return View(found[3], 0, tensor)

    def _kept_as(self, tensor: Tensor) -> Kept | None:
        if tensor.layout is not torch.strided:
            return None
        reference = self._kept.get(tensor.untyped_storage()._cdata)
        kept = None if reference is None else reference()
        return kept if kept is not None and kept.version == tensor._version else None

    def _is_kept(self, tensor: Tensor) -> bool:
        kept = self._kept_as(tensor)
        return kept is not None and kept.instead is None

    def _pack(self, tensor: Tensor) -> Kept | View:
        view = self._find(tensor)
        if view is not None:
            view.output.add_use()
            return view
        kept = Kept(tensor)
        if is_plain(tensor):
            self._kept[tensor.untyped_storage()._cdata] = weakref.ref(kept)
        if (watcher := _watcher()) is not None:
            watcher.keep(tensor)
        return kept


def _unpack(saved: Kept | View) -> Tensor:
    return saved.get()


_local = threading.local()


def is_plain(tensor: Tensor) -> bool:
    """No subclass; one without values stands for a tensor where somebody only counts."""
    kind = type(tensor)
    is_known = kind is Tensor or (kind is FakeTensor and _watcher() is not None)
    return is_known and tensor.layout is torch.strided


def _watcher() -> Watcher | None:
    watcher: Watcher | None = getattr(_local, "watcher", None)
    return watcher


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Tell ``watcher`` what autograd keeps in the block, whether a recorder decides it or not."""
    _local.watcher = watcher
    try:
        with saved_tensors_hooks(watcher.keep, _same):
            yield
    finally:
        _local.watcher = None


def _same(tensor: Tensor) -> Tensor:
    return tensor


def active() -> Recorder | None:
    """The recorder of this thread, if what autograd saves now goes to it.

    Inside a checkpointed part of the network, or under ``save_on_cpu``, the hooks are others.
    """
    recorder: Recorder | None = getattr(_local, "recorder", None)
    return recorder if recorder is not None and recorder.is_on_top() else None


def _are_hooks_allowed() -> bool:
    """Not under torch.func's transforms."""
    autograd: Any = torch._C._autograd
    return bool(autograd._saved_tensors_hooks_is_enabled())


def _are_hooks_active() -> bool:
    """Somebody else's; who watches lets a recorder decide."""
    top = torch._C._autograd._top_saved_tensors_default_hooks(True)
    watcher = _watcher()
    return top is not None and (watcher is None or top[0] != watcher.keep)


def start() -> Recorder | None:
    """Begin to record, unless nothing is saved or somebody else's hooks decide what is."""
    if (
        not torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or not _are_hooks_allowed()
        or _are_hooks_active()
    ):
        return None
    return Recorder().__enter__()
