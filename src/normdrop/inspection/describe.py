"""Describe a model: layers, shapes, Θ and what batch normalization adds, multiply-adds, memory."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from normdrop.errors import UserError

__all__ = ["Description", "Layer", "describe"]

_BatchNorm = torch.nn.modules.batchnorm._BatchNorm


@dataclass
class Layer:
    """One layer of a model, as it ran.

    Attributes:
        name: its name in the model, as in the state_dict; empty for the model itself.
        type: its class, with the activation that it applies.
        output_shape: shape of what it gives, in torch's order and without the batch; None where it
            did not run or gives no tensor.
        theta: number of its parameters Θ, besides γ and α.
        norm_nodes: K, the nodes that batch normalization adds: one a channel or feature.
        gamma_alpha: number of its γ and α, two a node.
        multiply_adds: of its convolutions and matrix products, for one sample.
        kept_bytes: what it keeps for the backward pass, for the whole batch; a tensor that several
            layers keep is counted at the first.
    """

    name: str
    type: str
    output_shape: tuple[int, ...] | None = None
    theta: int = 0
    norm_nodes: int = 0
    gamma_alpha: int = 0
    multiply_adds: int = 0
    kept_bytes: int = 0

    def has_own(self) -> bool:
        """Say whether anything is counted at this layer itself."""
        return any((self.theta, self.norm_nodes, self.multiply_adds, self.kept_bytes))


@dataclass
class Description:
    """A model's layers in the order in which they ran, and their totals; ``print`` gives a table.

    Attributes:
        model: the model's class.
        input_shape: shape of its input without the batch.
        batch_size: samples in the batch for which :attr:`kept_bytes` was counted.
        layers: the layers.
        theta, norm_nodes, gamma_alpha, multiply_adds, kept_bytes: sums over the layers.
    """

    model: str
    input_shape: tuple[int, ...]
    batch_size: int
    layers: list[Layer]
    theta: int = field(init=False)
    norm_nodes: int = field(init=False)
    gamma_alpha: int = field(init=False)
    multiply_adds: int = field(init=False)
    kept_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.theta = sum(layer.theta for layer in self.layers)
        self.norm_nodes = sum(layer.norm_nodes for layer in self.layers)
        self.gamma_alpha = sum(layer.gamma_alpha for layer in self.layers)
        self.multiply_adds = sum(layer.multiply_adds for layer in self.layers)
        self.kept_bytes = sum(layer.kept_bytes for layer in self.layers)

    def to_json(self) -> str:
        """Give everything as JSON."""
        return json.dumps(asdict(self), indent=2)

    def __str__(self) -> str:
        head = ("layer", "type", "output", "Θ", "K", "γ, α", "multiply-adds", "kept")
        body = [
            (
                layer.name or "(model)",
                layer.type,
                _sides(layer.output_shape),
                *map(
                    _count,
                    (layer.theta, layer.norm_nodes, layer.gamma_alpha, layer.multiply_adds),
                ),
                _bytes(layer.kept_bytes),
            )
            for layer in self.layers
        ]
        counts = (self.theta, self.norm_nodes, self.gamma_alpha, self.multiply_adds)
        total = ("total", "", "", *map(_count, counts), _bytes(self.kept_bytes))
        widths = [max(map(len, column)) for column in zip(head, *body, total, strict=True)]

        def line(cells: Sequence[str]) -> str:
            texts = [
                cell.ljust(width) if place < 2 else cell.rjust(width)
                for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
            ]
            return "  ".join(texts).rstrip()

        rule = "─" * (sum(widths) + 2 * (len(widths) - 1))
        share = self.gamma_alpha / max(self.theta + self.gamma_alpha, 1)
        return "\n".join(
            [
                f"{self.model}, input {_sides(self.input_shape)}",
                line(head),
                rule,
                *map(line, body),
                rule,
                line(total),
                "",
                f"Batch normalization adds {self.norm_nodes:,} nodes (K) with "
                f"{self.gamma_alpha:,} parameters (γ, α), {share:.2%} of "
                f"{self.theta + self.gamma_alpha:,}.",
                f"Multiply-adds are for one sample; kept for backward is for a batch of "
                f"{self.batch_size}, in training.",
            ]
        )


def _sides(shape: tuple[int, ...] | None) -> str:
    """Write a shape, that of a map as the lecture does: height × width × channels."""
    if shape is None:
        return ""
    if len(shape) == 3:
        shape = (*shape[1:], shape[0])
    return "×".join(map(str, shape))


def _count(number: int) -> str:
    return f"{number:,}" if number else ""


def _bytes(number: int) -> str:
    """Write a number of bytes in decimal units.

    Example:
        >>> _bytes(12_845_056), _bytes(512), _bytes(0)
        ('12.8 MB', '512 B', '')
    """
    if number < 1000:
        return f"{number} B" if number else ""
    value, unit = float(number), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.95:
            break
        value, unit = value / 1000, larger
    return f"{value:.1f} {unit}"


def describe(
    model: torch.nn.Module,
    input_size: str | Sequence[int] | Tensor | Sequence[Tensor] | Mapping[str, Tensor],
    *,
    batch_size: int = 2,
) -> Description:
    r"""Run a model once in training mode and say what each layer is, gives, costs and keeps.

    For a batch normalization of K channels, one node a channel,

    .. math:: y_k = \gamma_k \hat{x}_k + \alpha_k, \qquad k = 1, \dots, K

    adds K nodes with 2K parameters γ, α, which are counted apart from the other parameters Θ.

    The run is real: multiply-adds are those of the convolutions and matrix products that it makes,
    and the memory is that of the tensors that autograd saves for backward. Parameters and buffers
    are left out of it, and a storage counts once. Afterwards the model is as before: training
    flags, running statistics, gradients and the random number generators. A model on the meta
    device gives the same figures without computing.

    Args:
        model: any module.
        input_size: ``"224x224x3"`` or ``(224, 224, 3)``, as the lecture writes an image, or torch's
            ``(3, 224, 224)``: the side that agrees with the first convolution is the channels.
            ``(13,)`` for a row of a table. Or the input itself, with its batch: a tensor, a
            sequence of tensors (the arguments) or a mapping (the keyword arguments).
        batch_size: samples in the batch. Batch normalization in training needs two at least where
            it sees one value a sample.

    Raises:
        UserError: an input size that is none, or a model with lazy layers that never ran. Also
            what the model itself raises for this input.

    Example:
        >>> from normdrop import networks
        >>> description = describe(networks.resnet(8, 10), "32x32x3")
        >>> description.theta, description.norm_nodes, description.gamma_alpha
        (74810, 240, 480)
        >>> description.layers[0].name, description.layers[0].output_shape
        ('conv1', (16, 32, 32))

    Reference:
        S. Ioffe, C. Szegedy: Batch Normalization. ICML 2015.
    """
    if any(map(torch.nn.parameter.is_lazy, model.parameters())):
        raise UserError(
            "describe: the model has lazy layers without parameters; call it on one batch first"
        )
    run = _Run(model)
    with torch.inference_mode(False), torch.enable_grad():
        arguments, keywords, shape = _inputs(model, input_size, batch_size)
        with _left_as_it_was(model) as buffers, run.watched(buffers):
            torch.func.functional_call(model, buffers, arguments, keywords)
    first = (*arguments, *keywords.values())[0]
    samples = first.shape[0] if first.dim() else 1
    for layer in run.layers:
        layer.multiply_adds //= max(samples, 1)
    return Description(type(model).__name__, shape, samples, run.rows())


class _Run:
    """What happens while a model runs: which module is at work, what it computes and keeps."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.layers: list[Layer] = []
        self._at_work: list[Layer] = []
        self._names: dict[torch.nn.Module, str] = {m: n for n, m in model.named_modules()}
        self._is_leaf: dict[int, bool] = {}
        self._counted: set[int] = set()
        # Parameters and buffers are there with and without a backward pass.
        self._storages: dict[int, Any] = {}

    @contextmanager
    def watched(self, buffers: Mapping[str, Tensor]) -> Iterator[None]:
        """Watch all modules, products and saved tensors until the end of the block."""
        handles = []
        for tensor in (*self.model.parameters(), *buffers.values()):
            self._is_new(tensor)
        try:
            for module in self._names:
                handles.append(module.register_forward_pre_hook(self._enter, prepend=True))
                handles.append(module.register_forward_hook(self._leave, always_call=True))
            with (
                torch.autograd.graph.saved_tensors_hooks(self._keep, lambda kept: kept),
                _Products(self),
            ):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def rows(self) -> list[Layer]:
        """Give the layers that ran, and those that did not but have parameters."""
        for module in self._names:
            self._add_parameters(module, None)
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

    def _enter(self, module: torch.nn.Module, arguments: Any) -> None:
        layer = self._add(module)
        self._add_parameters(module, layer)
        self._at_work.append(layer)

    def _leave(self, module: torch.nn.Module, arguments: Any, output: Any) -> None:
        layer = self._at_work.pop()
        first = _first_tensor(output)
        layer.output_shape = None if first is None else tuple(first.shape[1:])

    def _add(self, module: torch.nn.Module) -> Layer:
        layer = Layer(self._names[module], _type(module))
        self.layers.append(layer)
        self._is_leaf[id(layer)] = next(module.children(), None) is None
        return layer

    def _add_parameters(self, module: torch.nn.Module, layer: Layer | None) -> None:
        own = [p for p in module._parameters.values() if p is not None]
        for parameter in own:
            if id(parameter) in self._counted:
                continue
            self._counted.add(id(parameter))
            layer = layer or self._add(module)
            if isinstance(module, _BatchNorm):
                layer.gamma_alpha += parameter.numel()
            else:
                layer.theta += parameter.numel()
        if isinstance(module, _BatchNorm) and id(module) not in self._counted and layer:
            self._counted.add(id(module))
            layer.norm_nodes = module.num_features

    def _keep(self, tensor: Tensor) -> Tensor:
        if self._is_new(tensor):
            self._now().kept_bytes += tensor.untyped_storage().nbytes()
        return tensor

    def _is_new(self, tensor: Tensor) -> bool:
        """Say whether this storage is new; hold it, so that its number goes to no other."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._storages:
            return False
        self._storages[storage._cdata] = storage
        return True


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
    """Put the model in training mode for the block, and give copies of its buffers to run with."""
    flags = [(module, module.training) for module in model.modules()]
    tensors = (*model.parameters(), *model.buffers())
    accelerators = sorted({t.device for t in tensors if t.is_cuda}, key=str)
    try:
        with torch.random.fork_rng(devices=accelerators):
            model.train()
            yield {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    finally:
        for module, training in flags:
            module.training = training


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


def parse_input(text: str) -> tuple[int, ...]:
    """Read an input's shape and give it in torch's order, as ``networks.build`` takes it.

    Example:
        >>> parse_input("224x224x3"), parse_input("3x224x224"), parse_input("13")
        ((3, 224, 224), (3, 224, 224), (13,))
    """
    return _in_torch_order(_sizes(text), None)


def _sizes(given: object) -> tuple[int, ...]:
    """Read sizes such as "224x224x3" or (224, 224, 3)."""
    numbers: list[Any] = list(given) if isinstance(given, Sequence) else []
    if isinstance(given, str):
        text = given.replace(" ", "").lower()
        numbers = [int(n) if n.isdecimal() else 0 for n in re.split("[x×,]", text)]
    if not numbers or not all(isinstance(n, Integral) and int(n) > 0 for n in numbers):
        raise UserError(
            'Expected an input size such as "224x224x3", (224, 224, 3) or (13,) but got '
            f"{given!r}; it has no batch"
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
    convolutions = (m for m in model.modules() if isinstance(m, torch.nn.modules.conv._ConvNd))
    first_convolution = next(convolutions, None)
    channels = first_convolution.in_channels if first_convolution else None
    shape = _in_torch_order(_sizes(given), channels)
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    # A generator of its own: the user's is not touched.
    generator = torch.Generator().manual_seed(0)
    x = torch.rand((batch_size, *shape), generator=generator, device="cpu")
    return (x.to(like.device, like.dtype),), {}, shape
