"""What :func:`normdrop.describe` gives: a table of layers with totals."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

__all__ = ["Description", "Layer"]


@dataclass
class Layer:
    """One layer of a model, as it ran.

    Attributes:
        name: its name in the model, as in the state_dict; empty for the model itself.
        type: its class, with what it does in the same operator, such as ``BatchNorm2d+add+relu``.
        output_shape: shape of what it gives, in torch's order and without the batch; None where it
            did not run or gives no tensor.
        theta: number of its parameters Θ, besides γ and α.
        norm_nodes: K, the nodes that batch normalization adds: one a channel or feature.
        gamma_alpha: number of its γ and α, two a node.
        multiply_adds: of its convolutions and matrix products, for one sample.
        kept_bytes: what it keeps for the backward pass, for the whole batch; a tensor that several
            layers keep is counted at the first.
        path: which path it takes, "kernel" or "torch: " and why, if that was asked and it ran.
    """

    name: str
    type: str
    output_shape: tuple[int, ...] | None = None
    theta: int = 0
    norm_nodes: int = 0
    gamma_alpha: int = 0
    multiply_adds: int = 0
    kept_bytes: int = 0
    path: str | None = None

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
        kernels: the instruction set of the kernels, or "none", if the paths were asked for.
        theta, norm_nodes, gamma_alpha, multiply_adds, kept_bytes: sums over the layers.
    """

    model: str
    input_shape: tuple[int, ...]
    batch_size: int
    layers: list[Layer]
    kernels: str | None = None
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
        head = ["layer", "type", "output", "Θ", "K", "γ, α", "multiply-adds", "kept"]
        body = [
            [
                layer.name or "(model)",
                layer.type,
                _sides(layer.output_shape),
                *map(
                    _count,
                    (layer.theta, layer.norm_nodes, layer.gamma_alpha, layer.multiply_adds),
                ),
                _bytes(layer.kept_bytes),
            ]
            for layer in self.layers
        ]
        counts = (self.theta, self.norm_nodes, self.gamma_alpha, self.multiply_adds)
        total = ["total", "", "", *map(_count, counts), _bytes(self.kept_bytes)]
        widths = [max(map(len, column)) for column in zip(head, *body, total, strict=True)]
        paths = [layer.path or "" for layer in self.layers]

        def line(cells: Sequence[str], path: str = "") -> str:
            texts = [
                cell.ljust(width) if place < 2 else cell.rjust(width)
                for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
            ]
            return "  ".join([*texts, path]).rstrip()

        rule = "─" * (sum(widths) + 2 * (len(widths) - 1))
        share = self.gamma_alpha / max(self.theta + self.gamma_alpha, 1)
        return "\n".join(
            [
                f"{self.model}, input {_sides(self.input_shape)}",
                line(head, "" if self.kernels is None else "path"),
                rule,
                *map(line, body, paths),
                rule,
                line(total),
                "",
                f"Batch normalization adds {self.norm_nodes:,} nodes (K) with "
                f"{self.gamma_alpha:,} parameters (γ, α), {share:.2%} of "
                f"{self.theta + self.gamma_alpha:,}."
                if self.norm_nodes
                else "It has no batch normalization.",
                f"Multiply-adds are for one sample; kept for backward is for a batch of "
                f"{self.batch_size}, in training.",
                *self._kernels(),
            ]
        )

    def _kernels(self) -> tuple[str, ...]:
        if self.kernels is None:
            return ()
        if self.kernels == "none":
            return ("Paths are those of training on this machine, where no kernels are loaded.",)
        return (
            f"Paths are those of training on this machine, where the kernels use {self.kernels}.",
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
