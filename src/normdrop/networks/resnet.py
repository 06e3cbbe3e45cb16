"""Residual networks: torchvision's for 224×224 images, and He et al.'s for small images."""

from typing import Literal

import torch
import torch.nn.functional as F
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
    zero_last,
)
from normdrop.surgery.convert import convert
from normdrop.surgery.convolution import Convolution
from normdrop.surgery.layout import Layout

__all__ = ["BasicBlock", "Bottleneck", "Pad", "ResNet", "resnet"]

# Blocks in each of the four stages (He et al. 2015, table 1); from 50 on they are bottlenecks.
_STAGES = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


class Pad(torch.nn.Module):
    """A shortcut without parameters: every ``stride``-th pixel, and zeros as the new channels.

    This is He et al.'s option A, (N, C, H, W) to (N, C + extra, ceil(H/stride), ceil(W/stride)).

    Example:
        >>> Pad(extra=2, stride=2)(torch.ones(1, 2, 4, 4)).shape
        torch.Size([1, 4, 2, 2])
    """

    def __init__(self, extra: int, stride: int) -> None:
        super().__init__()
        self.extra = extra
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))

    def extra_repr(self) -> str:
        return f"extra={self.extra}, stride={self.stride}"


def _shortcut(
    channels: int, filters: int, stride: int, *, norm: bool, kind: str
) -> torch.nn.Module | None:
    """Give the shortcut of a block, or None where the input itself can be added."""
    if stride == 1 and channels == filters:
        return None
    if kind == "pad":
        return Pad(filters - channels, stride)
    return torch.nn.Sequential(
        torch.nn.Conv2d(channels, filters, 1, stride=stride, bias=not norm),
        norm2d(filters, norm=norm),
    )


class BasicBlock(torch.nn.Module):
    r"""Two 3×3 convolutions around which the input goes unchanged.

    .. math:: y = \mathrm{relu}(\mathrm{BN}_2(W_2 * \mathrm{relu}(\mathrm{BN}_1(W_1 * x))) + s(x))

    with x (N, C, H, W), y (N, ``width``, H/stride, W/stride) and s the identity, a 1×1 convolution
    with batch normalization, or :class:`Pad`. BN₂, the addition and the ReLU are one call.
    """

    expansion = 1

    def __init__(
        self, channels: int, width: int, stride: int = 1, *, norm: bool = True, shortcut: str
    ) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(channels, width, 3, stride, padding=1, bias=not norm)
        self.bn1 = norm2d(width, norm=norm)
        self.relu1 = torch.nn.ReLU()
        self.conv2 = torch.nn.Conv2d(width, width, 3, padding=1, bias=not norm)
        self.bn2 = norm2d(width, norm=norm)
        self.relu2 = torch.nn.ReLU()
        self.downsample = _shortcut(channels, width, stride, norm=norm, kind=shortcut)

    def zero_last(self) -> None:
        """Let the residual branch begin as zero."""
        zero_last(self.bn2, self.conv2)

    def forward(self, x: Tensor) -> Tensor:
        a = self.relu1(self.bn1(self.conv1(x)))
        a = self.bn2(self.conv2(a))
        y: Tensor = self.relu2(a + (x if self.downsample is None else self.downsample(x)))
        return y


class Bottleneck(torch.nn.Module):
    r"""A 3×3 convolution between two 1×1 convolutions, around which the input goes unchanged.

    .. math::
        y = \mathrm{relu}(\mathrm{BN}_3(W_3 * \mathrm{relu}(\mathrm{BN}_2(W_2 *
        \mathrm{relu}(\mathrm{BN}_1(W_1 * x))))) + s(x))

    with x (N, C, H, W), y (N, 4·``width``, H/stride, W/stride) and s as in :class:`BasicBlock`. The
    stride is at the 3×3 convolution, as in the published weights.
    """

    expansion = 4

    def __init__(
        self, channels: int, width: int, stride: int = 1, *, norm: bool = True, shortcut: str
    ) -> None:
        super().__init__()
        filters = width * self.expansion
        self.conv1 = torch.nn.Conv2d(channels, width, 1, bias=not norm)
        self.bn1 = norm2d(width, norm=norm)
        self.relu1 = torch.nn.ReLU()
        self.conv2 = torch.nn.Conv2d(width, width, 3, stride, padding=1, bias=not norm)
        self.bn2 = norm2d(width, norm=norm)
        self.relu2 = torch.nn.ReLU()
        self.conv3 = torch.nn.Conv2d(width, filters, 1, bias=not norm)
        self.bn3 = norm2d(filters, norm=norm)
        self.relu3 = torch.nn.ReLU()
        self.downsample = _shortcut(channels, filters, stride, norm=norm, kind=shortcut)

    def zero_last(self) -> None:
        """Let the residual branch begin as zero."""
        zero_last(self.bn3, self.conv3)

    def forward(self, x: Tensor) -> Tensor:
        a = self.relu1(self.bn1(self.conv1(x)))
        a = self.relu2(self.bn2(self.conv2(a)))
        a = self.bn3(self.conv3(a))
        y: Tensor = self.relu3(a + (x if self.downsample is None else self.downsample(x)))
        return y


class ResNet(torch.nn.Module):
    r"""A residual network; ``depth`` says which.

    .. math:: x_{l+1} = \mathrm{relu}(F_l(x_l) + s_l(x_l))

    where a branch F is convolutions with batch normalization, and s the shortcut
    (:class:`BasicBlock`, :class:`Bottleneck`).

    - depth 18, 34, 50, 101, 152: for images of about 224×224. A 7×7 convolution of stride 2, a max
      pooling, four stages of 64, 128, 256, 512 channels (times 4 from depth 50 on), each but the
      first halving the image. Names and shapes of the parameters are torchvision's, so that
      published weights load.
    - depth 6n+2, such as 8, 14, 20, 32, 44, 56, 110: for small images. A 3×3 convolution, three
      stages of n blocks with 16, 32, 64 channels. Its shortcuts have no parameters.

    Average pooling and one linear layer, ``fc``, end both.

    Dropout: ``keep_input`` acts on the (normalized) image, value by value; ``keep_hidden`` on the
    pooled features that enter ``fc``. That is the one place that no batch normalization follows:
    dropout before one shifts the variance between training and test. For dropout inside the
    residual branches see :func:`normdrop.networks.wide_resnet`. The logits are never dropped.

    Args:
        depth: one of the above.
        classes: number of classes.
        in_channels: channels of the image.
        width: channels of the first stage; 64 for the large family and 16 for the small by default.
        keep_input: probability to keep a value of the image, in (0, 1].
        keep_hidden: probability to keep a pooled feature, in (0, 1].
        norm: normalize after every convolution; without it, the convolutions have biases.
        input_norm: normalize the image, channel by channel.
        zero_init_last: let every residual branch begin as zero, so that every block begins as its
            shortcut: its last γ is 0 (with ``norm=False``, its last convolution is).
        stem: ``"large"``, a 7×7 convolution of stride 2 and a max pooling, or ``"small"``, a 3×3
            convolution; None takes the family's. Depth 18 with a small stem suits 32×32 images.
        stem_stride: stride of a small stem, 1 or 2; 2 takes about a quarter of the
            multiply-adds.
        shortcut: ``"projection"`` (1×1 convolution and norm) or ``"pad"`` (no parameters) where the
            shape changes; None takes the family's.
        layout: memory layout of the maps, ``"channels_last"`` or ``"keep"`` for torch's own;
            ``"auto"`` takes channels_last on the CPU, where it is faster. The numbers are the same.
        convolution: "auto" takes our kernels for 3×3 convolutions: :func:`normdrop.convert`.
        memory: "low" keeps less for backward, with the same gradients: :func:`normdrop.convert`.

    Shape:
        (N, in_channels, H, W) to (N, classes). H and W are at least :attr:`least_size`, with which
        every layer that halves the image has two pixels to halve.

    Raises:
        UserError: an unknown depth or option, a keep outside (0, 1], an image too small.

    Example:
        >>> network = ResNet(20, 10, keep_hidden=0.8)
        >>> network(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
        >>> sum(p.numel() for p in network.parameters())
        269722

    Reference:
        K. He, X. Zhang, S. Ren, J. Sun: Deep Residual Learning for Image Recognition. CVPR 2016.
        X. Li, S. Chen, X. Hu, J. Yang: Understanding the Disharmony between Dropout and Batch
        Normalization by Variance Shift. CVPR 2019 (where dropout may stand).
        P. Goyal et al.: Accurate, Large Minibatch SGD. 2017 (``zero_init_last``).
    """

    least_size: int
    output = Output("fc")

    def __init__(
        self,
        depth: int = 20,
        classes: int = 10,
        *,
        in_channels: int = 3,
        width: int | None = None,
        keep_input: float = 1.0,
        keep_hidden: float = 1.0,
        norm: bool = True,
        input_norm: bool = False,
        zero_init_last: bool = False,
        stem: Literal["large", "small"] | None = None,
        stem_stride: int = 1,
        shortcut: Literal["projection", "pad"] | None = None,
        layout: Layout = "auto",
        convolution: Convolution = "keep",
        memory: Memory = "normal",
    ) -> None:
        super().__init__()
        blocks = _blocks(depth)
        is_large = depth in _STAGES
        stem = stem or ("large" if is_large else "small")
        shortcut = shortcut or ("projection" if is_large else "pad")
        _check_options(stem, stem_stride, shortcut)
        width = check_count("width", (64 if is_large else 16) if width is None else width)
        check_count("classes", classes)
        check_count("in_channels", in_channels)
        self._name = f"resnet{depth}"

        self.input_norm = norm2d(in_channels, norm=input_norm)
        self.input_drop = dropout(check_keep("keep_input", keep_input))
        if stem == "large":
            self.conv1 = torch.nn.Conv2d(in_channels, width, 7, 2, padding=3, bias=not norm)
        else:
            self.conv1 = torch.nn.Conv2d(
                in_channels, width, 3, stem_stride, padding=1, bias=not norm
            )
        self.bn1 = norm2d(width, norm=norm)
        self.relu = torch.nn.ReLU()
        self.maxpool = torch.nn.MaxPool2d(3, 2, 1) if stem == "large" else torch.nn.Identity()
        halvings = len(blocks) - 1 + (2 if stem == "large" else stem_stride - 1)
        self.least_size = least_size(halvings)

        is_deep = is_large and depth >= 50
        block: type[BasicBlock | Bottleneck] = Bottleneck if is_deep else BasicBlock
        channels = width
        self.stages = [f"layer{stage + 1}" for stage in range(len(blocks))]
        for stage, count in enumerate(blocks):
            filters = width * 2**stage
            layers: list[torch.nn.Module] = []
            for position in range(count):
                stride = 2 if stage > 0 and position == 0 else 1
                layers.append(block(channels, filters, stride, norm=norm, shortcut=shortcut))
                channels = filters * block.expansion
            self.add_module(self.stages[stage], torch.nn.Sequential(*layers))
        self.avgpool = torch.nn.AdaptiveAvgPool2d(1)
        self.hidden_drop = dropout(check_keep("keep_hidden", keep_hidden))
        self.fc = torch.nn.Linear(channels, classes)

        initialize(self, self.output)
        if zero_init_last:
            for module in self.modules():
                if isinstance(module, (BasicBlock, Bottleneck)):
                    module.zero_last()
        convert(self, layout=layout, convolution=convolution, memory=memory)

    def forward(self, x: Tensor) -> Tensor:
        pieces.check_image(x.shape, self.least_size, self._name)
        x = self.input_drop(self.input_norm(x))
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in self.stages:
            x = self.get_submodule(stage)(x)
        x = self.hidden_drop(self.avgpool(x).flatten(1))
        logits: Tensor = self.fc(x)
        return logits


def _blocks(depth: int) -> tuple[int, ...]:
    """Give the number of blocks in each stage."""
    if depth in _STAGES:
        return _STAGES[depth]
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 8 or depth % 6 != 2:
        raise UserError(
            "resnet: expected `depth` to be 18, 34, 50, 101 or 152, or 6n+2 for small images "
            f"(8, 14, 20, 32, 44, 56, 110, …), but got {depth!r}"
        )
    return ((depth - 2) // 6,) * 3


def _check_options(stem: object, stem_stride: object, shortcut: object) -> None:
    if stem not in ("large", "small"):
        raise UserError(f'resnet: expected `stem` to be "large" or "small" but got {stem!r}')
    if stem_stride not in (1, 2):
        raise UserError(f"resnet: expected `stem_stride` to be 1 or 2 but got {stem_stride!r}")
    if stem == "large" and stem_stride != 1:
        raise UserError(
            f'resnet: `stem_stride={stem_stride}` is for stem="small"; a large stem has stride 2'
        )
    if shortcut not in ("projection", "pad"):
        raise UserError(
            f'resnet: expected `shortcut` to be "projection" or "pad" but got {shortcut!r}'
        )


resnet = ResNet
