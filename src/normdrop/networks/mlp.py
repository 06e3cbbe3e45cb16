"""The multilayer perceptron: linear, batch normalization, ReLU, dropout, again and again."""

from collections.abc import Sequence

import torch
from torch import Tensor

from normdrop.errors import UserError
from normdrop.memory.low import Memory
from normdrop.networks.layers import Output, check_count, check_keep, dropout, initialize, norm1d
from normdrop.surgery.convert import convert

__all__ = ["MLP", "mlp"]


class MLP(torch.nn.Module):
    r"""A multilayer perceptron with batch normalization and dropout.

    .. math::
        h_0 = d_{input}(x), \qquad
        h_l = d_l(\mathrm{relu}(\mathrm{BN}(W_l h_{l-1}))), \qquad
        y = W_L h_{L-1} + b

    with :math:`x` (N, ``widths[0]``), :math:`h_l` (N, ``widths[l]``), :math:`y`
    (N, ``widths[-1]``). A batch of any shape (N, …) is flattened to (N, ``widths[0]``) first, and
    with ``input_norm`` normalized feature by feature. Without ``norm`` a hidden layer is
    :math:`d_l(\mathrm{relu}(W_l h_{l-1} + b_l))`; with it, the shift α takes the bias's place.

    Dropout: ``keep_input`` acts on the (normalized) input, ``keep_hidden`` on what each hidden
    layer gives after its ReLU. The logits y are never dropped.

    Args:
        widths: the input's width, those of the hidden layers, the number of classes.
        keep_input: probability to keep an input value, in (0, 1].
        keep_hidden: probability to keep a hidden value, in (0, 1]; or one for each hidden layer.
        norm: normalize the hidden layers.
        input_norm: normalize the input.
        memory: "low" keeps less for backward, with the same gradients: :func:`normdrop.convert`.

    Shape:
        (N, …) with ``widths[0]`` values a sample, to (N, ``widths[-1]``).

    Raises:
        UserError: fewer than two widths, a keep outside (0, 1], or more keeps than hidden layers,
            since the last of them would drop the output.

    Example:
        >>> network = MLP((784, 1024, 1024, 10), keep_input=0.8, keep_hidden=0.5)
        >>> network(torch.randn(2, 1, 28, 28)).shape
        torch.Size([2, 10])

    Reference:
        N. Srivastava et al.: Dropout: A Simple Way to Prevent Neural Networks from Overfitting.
        JMLR 15, 2014, whose networks for MNIST have keep_input=0.8 and keep_hidden=0.5.
    """

    output = Output("fc")

    def __init__(
        self,
        widths: Sequence[int],
        *,
        keep_input: float = 1.0,
        keep_hidden: float | Sequence[float] = 1.0,
        norm: bool = True,
        input_norm: bool = False,
        memory: Memory = "normal",
    ) -> None:
        super().__init__()
        if isinstance(widths, (str, int)) or len(widths) < 2:
            raise UserError(
                "mlp: expected `widths` to name the input's width, those of the hidden layers and "
                f"the number of classes, such as (784, 1024, 10), but got {widths!r}"
            )
        first, *hidden, classes = (check_count("widths", width) for width in widths)
        keeps = _keeps(keep_hidden, len(hidden))
        self.input_norm = norm1d(first, norm=input_norm)
        self.input_drop = dropout(check_keep("keep_input", keep_input))
        layers: list[torch.nn.Module] = []
        for width, keep in zip(hidden, keeps, strict=True):
            # Three places a layer, so that a parameter has one name with and without norm and keep.
            relu = torch.nn.ReLU()
            layers += [
                torch.nn.Linear(first, width, bias=not norm),
                norm1d(width, norm=norm),
                relu if keep == 1 else torch.nn.Sequential(relu, dropout(keep)),
            ]
            first = width
        self.hidden = torch.nn.Sequential(*layers)
        self.fc = torch.nn.Linear(first, classes)
        initialize(self, self.output)
        convert(self, linear="auto", memory=memory)

    def forward(self, x: Tensor) -> Tensor:
        x = self.input_drop(self.input_norm(x.flatten(1)))
        logits: Tensor = self.fc(self.hidden(x))
        return logits


def _keeps(keep: float | Sequence[float], layers: int) -> list[float]:
    """Give one keep for each hidden layer."""
    if not isinstance(keep, (list, tuple)):
        keep_all = check_keep("keep_hidden", keep)
        if keep_all < 1 and layers == 0:
            raise UserError(
                f"mlp: keep_hidden={keep!r} would drop the output, since there is no hidden layer; "
                "add hidden widths or leave keep_hidden at 1"
            )
        return [keep_all] * layers
    if len(keep) == layers + 1:
        raise UserError(
            f"mlp: the last of the {len(keep)} values of `keep_hidden` would drop the output; give "
            f"one for each of the {layers} hidden layers"
        )
    if len(keep) != layers:
        raise UserError(
            f"mlp: expected one value of `keep_hidden` for each of the {layers} hidden layers but "
            f"got {len(keep)}"
        )
    return [check_keep("keep_hidden", value) for value in keep]


mlp = MLP
