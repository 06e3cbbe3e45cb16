"""Describe a model: layers, shapes, Θ and what batch normalization adds, multiply-adds, memory."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from normdrop.arguments import check_flag
from normdrop.errors import UserError
from normdrop.inspection.description import Description, Layer
from normdrop.inspection.paths import paths_of
from normdrop.inspection.visits import visited
from normdrop.memory import recompute
from normdrop.ops import instruction_set

__all__ = ["describe"]

_BatchNorm = torch.nn.modules.batchnorm._BatchNorm


def describe(
    model: torch.nn.Module,
    input_size: str | Sequence[int] | Tensor | Sequence[Tensor] | Mapping[str, Tensor],
    *,
    batch_size: int = 2,
    kernels: bool = False,
) -> Description:
    r"""Run a model once in training mode and say what each layer is, gives, costs and keeps.

    For a batch normalization of K channels, one node a channel,

    .. math:: y_k = \gamma_k \hat{x}_k + \alpha_k, \qquad k = 1, \dots, K

    adds K nodes with 2K parameters γ, α, which are counted apart from the other parameters Θ.

    The run is real: multiply-adds are those of the convolutions and matrix products that it makes,
    and the memory is that of the tensors that autograd saves for backward. Parameters and buffers
    are left out of it, and a storage counts once. Afterwards the model is as before: training
    flags, running statistics, gradients and the random number generators. A model on the meta
    device is described as if it were on the CPU, without computing.

    Args:
        model: any module.
        input_size: ``"224x224x3"`` or ``(224, 224, 3)``, as the lecture writes an image, or torch's
            ``(3, 224, 224)``: the side that agrees with the first convolution or batch
            normalization is the channels. ``(13,)`` for a row of a table. Or the input itself, with
            its batch: a tensor, a sequence of tensors (the arguments) or a mapping (the keyword
            arguments).
        batch_size: samples in the batch. Batch normalization in training needs two at least where
            it sees one value a sample.
        kernels: run the model once more and say which path each layer takes here in training: a
            kernel, fused or why not, or torch's operators and why; and the instruction set.

    Raises:
        UserError: an input size that is none, or a model with lazy layers that never ran; with
            ``kernels``, a model on the meta device. Also what the model itself raises for this
            input.
        TypeError: a ``kernels`` that is neither True nor False.

    Example:
        >>> from normdrop import networks
        >>> description = describe(networks.resnet(8, 10), "32x32x3")
        >>> description.theta, description.norm_nodes, description.gamma_alpha
        (74810, 240, 480)
        >>> description.layers[0].name, description.layers[0].output_shape
        ('conv1', (16, 32, 32))
        >>> describe(networks.resnet(8, 10).double(), "32x32x3", kernels=True).layers[1].path
        'kernel'

    Reference:
        S. Ioffe, C. Szegedy: Batch Normalization. ICML 2015.
    """
    # What torch.compile gives is a wrapper without rows of its own.
    model = getattr(model, "_orig_mod", model)
    if any(map(torch.nn.parameter.is_lazy, model.parameters())):
        raise UserError(
            "describe: the model has lazy layers without parameters; call it on one batch first"
        )
    check_flag("describe", "kernels", kernels)
    if kernels and any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        raise UserError(
            "describe: expected a model with values for `kernels`, since the path of a layer "
            "depends on its tensors, but got one on the meta device; build it on the CPU"
        )
    run = _Run(model)
    paths: dict[str, str] = {}
    with torch.inference_mode(False), torch.enable_grad(), _left_as_it_was(model) as tensors:
        arguments, keywords, shape = _inputs(model, input_size, batch_size)
        with run.watched(tensors):
            torch.func.functional_call(model, tensors, arguments, keywords)
        if kernels:
            again = partial(torch.func.functional_call, model, tensors, arguments, keywords)
            paths = paths_of(model, run.names, again)
    first = (*arguments, *keywords.values())[0]
    samples = first.shape[0] if first.dim() else 1
    for layer in run.layers:
        layer.multiply_adds //= max(samples, 1)
        layer.path = paths.get(layer.name)
    found = (instruction_set() or "none") if kernels else None
    return Description(type(model).__name__, shape, samples, run.rows(), found)


class _Run:
    """What happens while a model runs: which module is at work, what it computes and keeps."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.layers: list[Layer] = []
        self._at_work: list[Layer] = []
        self.names: dict[torch.nn.Module, str] = {m: n for n, m in model.named_modules()}
        self._sizes = _own_sizes(self.names)
        self._is_leaf: dict[int, bool] = {}
        # Parameters and buffers are there with and without a backward pass.
        self._storages: dict[int, Any] = {}
        self._keepers: dict[int, Layer] = {}
        for parameter in model.parameters():
            self._is_new(parameter)

    @contextmanager
    def watched(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Watch all modules, products and saved tensors until the end of the block."""
        for tensor in tensors.values():
            self._is_new(tensor)
        with visited(self.names, self), recompute.watched(self), _Products(self):
            yield

    def rows(self) -> list[Layer]:
        """Give the layers that ran, and those that did not but have parameters."""
        for module, size in list(self._sizes.items()):
            if size:
                self._count(module, self._add(module))
        return [
            layer
            for layer in self.layers
            if layer.has_own() or (self._is_leaf[id(layer)] and layer.type != "Identity")
        ]

    def multiply(self, count: int) -> None:
        """Count multiply-adds at the module at work."""
        self._now().multiply_adds += count

    def _now(self) -> Layer:
        """Give the innermost module at work; before and after its hooks, the model."""
        return self._at_work[-1] if self._at_work else self.layers[0]

    def enter(self, module: torch.nn.Module, fused: str) -> None:
        """Begin a module's row."""
        layer = self._add(module)
        if fused:
            layer.type += f"+{fused}"
        self._count(module, layer)
        self._at_work.append(layer)

    def leave(self, module: torch.nn.Module, output: Any) -> None:
        """End it with what the module gives."""
        layer = self._at_work.pop()
        first = _first_tensor(output)
        layer.output_shape = None if first is None else tuple(first.shape[1:])

    def _add(self, module: torch.nn.Module) -> Layer:
        layer = Layer(self.names[module], _type(module))
        self.layers.append(layer)
        self._is_leaf[id(layer)] = next(module.children(), None) is None
        return layer

    def _count(self, module: torch.nn.Module, layer: Layer) -> None:
        """Count a module's parameters and nodes, once."""
        size = self._sizes.pop(module, None)
        if size is None:
            return
        if isinstance(module, _BatchNorm):
            layer.gamma_alpha, layer.norm_nodes = size, module.num_features
        else:
            layer.theta = size

    def keep(self, tensor: Tensor) -> Tensor:
        """Count a tensor that autograd keeps at the module at work."""
        if self._is_new(tensor):
            storage = tensor.untyped_storage()
            self._now().kept_bytes += storage.nbytes()
            self._keepers[storage._cdata] = self._now()
        return tensor

    def forget(self, tensor: Tensor) -> None:
        """Take back one that is not kept after all."""
        storage = tensor.untyped_storage()
        keeper = self._keepers.pop(storage._cdata, None)
        if keeper is not None:
            keeper.kept_bytes -= storage.nbytes()

    def _is_new(self, tensor: Tensor) -> bool:
        """Say whether this storage is new; hold it, so that its number goes to no other."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._storages:
            return False
        self._storages[storage._cdata] = storage
        return True


def _own_sizes(modules: Iterable[torch.nn.Module]) -> dict[torch.nn.Module, int]:
    """Give the number of parameters of each module itself; a shared one is its first module's."""
    seen: set[int] = set()
    sizes = {}
    for module in modules:
        own = {id(p): p.numel() for p in module._parameters.values() if p is not None}
        sizes[module] = sum(size for key, size in own.items() if key not in seen)
        seen.update(own)
    return sizes


class _Products(TorchDispatchMode):
    """Count the multiply-adds of convolutions and matrix products, by torch's own formulas."""

    def __init__(self, run: _Run) -> None:
        TorchDispatchMode.__init__(self)
        self.run = run

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            # torch counts a multiplication and an addition as two operations.
            self.run.multiply(formula(*args, **kwargs, out_val=output) // 2)
        return output


@contextmanager
def _left_as_it_was(model: torch.nn.Module) -> Iterator[dict[str, Tensor]]:
    """Put the model in training mode for the block, and give copies of its buffers to run with.

    On the meta device give stand-ins for its parameters too, which say that they are on the CPU, so
    that the operators do as there, and have no values.
    """
    flags = [(module, module.training) for module in model.modules()]
    tensors = (*model.parameters(), *model.buffers())
    accelerators = sorted({t.device for t in tensors if t.is_cuda}, key=str)
    is_meta = any(t.is_meta for t in tensors)
    fake = FakeTensorMode(allow_non_fake_inputs=True) if is_meta else nullcontext()
    try:
        with torch.random.fork_rng(devices=accelerators), fake:
            model.train()
            if is_meta:
                named = (*model.named_parameters(), *model.named_buffers())
                yield {name: _stand_in(tensor) for name, tensor in named}
            else:
                yield {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    finally:
        for module, training in flags:
            module.training = training


def _stand_in(tensor: Tensor) -> Tensor:
    return torch.empty_strided(
        tensor.size(),
        tensor.stride(),
        dtype=tensor.dtype,
        device="cpu",
        requires_grad=tensor.requires_grad,
    )


def _type(module: torch.nn.Module) -> str:
    activation = getattr(module, "activation", None)
    name = type(module).__name__
    return f"{name}+{activation}" if isinstance(activation, str) else name


def _first_tensor(output: Any) -> Tensor | None:
    """Give the first tensor with a batch in what a module gave."""
    if isinstance(output, Tensor):
        return output if output.dim() else None
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, (list, tuple)):
        return next(filter(lambda found: found is not None, map(_first_tensor, output)), None)
    return None


def _sizes(given: object) -> tuple[int, ...]:
    """Read sizes such as "224x224x3" or (224, 224, 3)."""
    numbers: list[Any] = list(given) if isinstance(given, Sequence) else []
    if isinstance(given, str):
        text = given.replace(" ", "").lower()
        numbers = [int(n) if n.isdecimal() else 0 for n in re.split("[x×,]", text)]
    if not numbers or not all(isinstance(n, Integral) and int(n) > 0 for n in numbers):
        raise UserError(
            'Expected an input size such as "224x224x3", (224, 224, 3) or (13,) but got '
            f"{given!r}: sizes of at least 1, without the batch"
        )
    return tuple(int(n) for n in numbers)


def _in_torch_order(sizes: tuple[int, ...], channels: int | None) -> tuple[int, ...]:
    """Put the channels first; where their number is not known, a last side of 1 to 4 is."""
    if len(sizes) < 3:
        return sizes
    if channels in (sizes[0], sizes[-1]):
        is_last = sizes[-1] == channels
    else:
        is_last = sizes[-1] <= 4 < sizes[0]
    return (sizes[-1], *sizes[:-1]) if is_last else sizes


def _first_channels(model: torch.nn.Module) -> int | None:
    """Give the channels that the first convolution or batch normalization takes."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.conv._ConvNd):
            return module.in_channels
        if isinstance(module, _BatchNorm):
            return module.num_features
    return None


def _inputs(
    model: torch.nn.Module, given: Any, batch_size: int
) -> tuple[tuple[Tensor, ...], dict[str, Tensor], tuple[int, ...]]:
    """Give the arguments and keyword arguments to run with, and the shape of one sample."""
    if isinstance(given, Tensor):
        given = (given,)
    if isinstance(given, Mapping) and given:
        first = next(iter(given.values()))
        return (), dict(given), tuple(first.shape[1:])
    if isinstance(given, (list, tuple)) and given and isinstance(given[0], Tensor):
        return tuple(given), {}, tuple(given[0].shape[1:])
    if batch_size < 1:
        raise UserError(f"Expected `batch_size` to be at least 1 but got {batch_size}")
    shape = _in_torch_order(_sizes(given), _first_channels(model))
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    # A generator of its own: the user's is not touched.
    generator = torch.Generator().manual_seed(0)
    x = torch.rand((batch_size, *shape), generator=generator, device="cpu")
    device = "cpu" if like.is_meta else like.device
    return (x.to(device, like.dtype),), {}, shape
