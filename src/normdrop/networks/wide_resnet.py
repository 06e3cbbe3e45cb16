"""Wide residual networks: pre-activation, with dropout inside the residual branch."""

import torch
from torch import Tensor

from normdrop.errors import UserError
from normdrop.memory.low import Memory
from normdrop.networks import layers as pieces
from normdrop.networks.layers import (
    Output,
    check_count,
    check_keep,
    dropout,
    initialize,
    least_size,
    norm2d,
)
from normdrop.surgery.convert import convert
from normdrop.surgery.convolution import Convolution
from normdrop.surgery.layout import Layout

__all__ = ["WideBlock", "WideResNet", "wide_resnet"]


class WideBlock(torch.nn.Module):
    r"""Batch normalization and ReLU before each of two 3×3 convolutions, dropout between these.

    .. math::
        a = \mathrm{relu}(\mathrm{BN}_1(x)), \qquad
        y = W_2 * d(\mathrm{relu}(\mathrm{BN}_2(W_1 * a))) + s

    with x (N, C, H, W), y (N, ``width``, H/stride, W/stride) and d the dropout; s is x where the
    shapes agree, and a 1×1 convolution of a where not.
    """

    def __init__(
        self, channels: int, width: int, stride: int, *, keep: float = 1.0, norm: bool = True
    ) -> None:
        super().__init__()
        self.bn1 = norm2d(channels, norm=norm)
        self.relu1 = torch.nn.ReLU()
        self.conv1 = torch.nn.Conv2d(channels, width, 3, stride, padding=1, bias=not norm)
        self.bn2 = norm2d(width, norm=norm)
        self.relu2 = torch.nn.ReLU()
        self.drop = dropout(keep)
        self.conv2 = torch.nn.Conv2d(width, width, 3, padding=1, bias=not norm)
        self.shortcut: torch.nn.Module | None = None
        if stride != 1 or channels != width:
            self.shortcut = torch.nn.Conv2d(channels, width, 1, stride, bias=not norm)

    def forward(self, x: Tensor) -> Tensor:
        a = self.relu1(self.bn1(x))
        y: Tensor = self.conv2(self.drop(self.relu2(self.bn2(self.conv1(a)))))
        return y + (x if self.shortcut is None else self.shortcut(a))


class WideResNet(torch.nn.Module):
    r"""A wide residual network, WRN-depth-widen.

    .. math:: x_{l+1} = x_l + F_l(x_l)

    where a branch F is BN, ReLU, convolution, BN, ReLU, dropout, convolution (:class:`WideBlock`).
    A 3×3 convolution to 16 channels, three stages of (depth − 4)/6 blocks with 16, 32 and 64 times
    ``widen`` channels, batch normalization, ReLU, average pooling and a linear layer, ``fc``.

    Dropout: ``keep_input`` acts on the (normalized) image, value by value; ``keep_hidden`` in every
    residual branch, between its two convolutions, after the second ReLU (Zagoruyko and Komodakis
    keep 0.7 for CIFAR, 0.6 for SVHN). The logits are never dropped.

    Args:
        depth: 6n+4, such as 10, 16, 22, 28, 40.
        widen: how many times wider than a small residual network.
        classes: number of classes.
        in_channels: channels of the image.
        width: channels of the first convolution.
        keep_input: probability to keep a value of the image, in (0, 1].
        keep_hidden: probability to keep a value between the convolutions of a branch, in (0, 1].
        norm: normalize; without it, the convolutions have biases.
        input_norm: normalize the image, channel by channel.
        zero_init_last: let every residual branch begin as zero. Here the last convolution is 0
            and not the last γ, since the ReLU after γ would give it a zero gradient for ever.
        stem_stride: stride of the first convolution, 1 or 2; 2 takes about a quarter of the
            multiply-adds.
        layout: memory layout of the maps, ``"channels_last"`` or ``"keep"`` for torch's own;
            ``"auto"`` takes channels_last on the CPU, where it is faster. The numbers are the same.
        convolution: "auto" takes our kernels for 3×3 convolutions: :func:`normdrop.convert`.
        memory: "low" keeps less for backward, with the same gradients: :func:`normdrop.convert`.

    Shape:
        (N, in_channels, H, W) to (N, classes); H and W are at least 3 (5 with ``stem_stride=2``).

    Raises:
        UserError: a depth that is not 6n+4, a keep outside (0, 1], an image too small.

    Example:
        >>> network = WideResNet(10, 2, 10, keep_hidden=0.7)
        >>> network(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])

    Reference:
        S. Zagoruyko, N. Komodakis: Wide Residual Networks. BMVC 2016.
    """

    least_size: int
    output = Output("fc")

    def __init__(
        self,
        depth: int = 28,
        widen: int = 10,
        classes: int = 10,
        *,
        in_channels: int = 3,
        width: int = 16,
        keep_input: float = 1.0,
        keep_hidden: float = 1.0,
        norm: bool = True,
        input_norm: bool = False,
        zero_init_last: bool = False,
        stem_stride: int = 1,
        layout: Layout = "auto",
        convolution: Convolution = "keep",
        memory: Memory = "normal",
    ) -> None:
        super().__init__()
        if isinstance(depth, bool) or not isinstance(depth, int) or depth < 10 or depth % 6 != 4:
            raise UserError(
                "wide_resnet: expected `depth` to be 6n+4 (10, 16, 22, 28, 40, …) but got "
                f"{depth!r}"
            )
        for name, count in (
            ("widen", widen),
            ("classes", classes),
            ("in_channels", in_channels),
            ("width", width),
        ):
            check_count(name, count)
        if stem_stride not in (1, 2):
            raise UserError(
                f"wide_resnet: expected `stem_stride` to be 1 or 2 but got {stem_stride!r}"
            )
        keep_hidden = check_keep("keep_hidden", keep_hidden)
        self._name = f"wide_resnet{depth}_{widen}"
        self.least_size = least_size(1 + stem_stride)

        self.input_norm = norm2d(in_channels, norm=input_norm)
        self.input_drop = dropout(check_keep("keep_input", keep_input))
        self.conv1 = torch.nn.Conv2d(in_channels, width, 3, stem_stride, padding=1, bias=not norm)
        channels = width
        self.stages = ["layer1", "layer2", "layer3"]
        for stage, name in enumerate(self.stages):
            filters = width * widen * 2**stage
            layers: list[torch.nn.Module] = []
            for position in range((depth - 4) // 6):
                stride = 2 if stage > 0 and position == 0 else 1
                layers.append(WideBlock(channels, filters, stride, keep=keep_hidden, norm=norm))
                channels = filters
            self.add_module(name, torch.nn.Sequential(*layers))
        self.bn1 = norm2d(channels, norm=norm)
        self.relu = torch.nn.ReLU()
        self.avgpool = torch.nn.AdaptiveAvgPool2d(1)
        self.fc = torch.nn.Linear(channels, classes)

        initialize(self, self.output)
        if zero_init_last:
            for module in self.modules():
                if isinstance(module, WideBlock):
                    torch.nn.init.zeros_(module.conv2.weight)
        convert(self, layout=layout, convolution=convolution, memory=memory)

    def forward(self, x: Tensor) -> Tensor:
        pieces.check_image(x.shape, self.least_size, self._name)
        x = self.conv1(self.input_drop(self.input_norm(x)))
        for stage in self.stages:
            x = self.get_submodule(stage)(x)
        x = self.avgpool(self.relu(self.bn1(x))).flatten(1)
        logits: Tensor = self.fc(x)
        return logits


wide_resnet = WideResNet
