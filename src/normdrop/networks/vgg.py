"""VGG: stacks of 3×3 convolutions between poolings, then a perceptron."""

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
    norm2d,
)
from normdrop.surgery.convert import convert
from normdrop.surgery.convolution import Convolution
from normdrop.surgery.layout import Layout

__all__ = ["VGG", "vgg"]

# Convolutions in each of the five stages: the paper's columns A, B, D, E.
_STAGES = {
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}


class VGG(torch.nn.Module):
    r"""VGG with 11, 13, 16 or 19 layers.

    A "conv3" layer is :math:`y = \mathrm{relu}(\mathrm{BN}(W * x + b))` with a 3×3 kernel and
    "same" padding: x (N, C, H, W) gives y (N, K, H, W), and batch normalization adds K nodes with
    one γ and one α each. Five stages of K = 64, 128, 256, 512, 512 end in a 2×2 max pooling; three
    linear layers follow. Names and shapes of the parameters are torchvision's, ``vgg16_bn`` for
    ``norm=True`` and ``vgg16`` for ``norm=False``, so that published weights load.

    Dropout: ``keep_input`` acts on the (normalized) image, value by value; ``keep_hidden`` on the
    two hidden linear layers after their ReLU, where the paper keeps 0.5. The convolutions'
    activations are not dropped, since batch normalization follows them, nor are the logits.

    Args:
        depth: 11, 13, 16 or 19.
        classes: number of classes.
        in_channels: channels of the image.
        width: K of the first stage; the others follow as 2, 4, 8 and 8 times it.
        hidden: width of the two hidden linear layers.
        pool: side to which the last map is brought by average pooling; 1 makes the linear part 49
            times smaller, which suits small images.
        keep_input: probability to keep a value of the image, in (0, 1].
        keep_hidden: probability to keep a value of the hidden linear layers, in (0, 1].
        norm: normalize after every convolution.
        input_norm: normalize the image, channel by channel.
        layout: memory layout of the maps, ``"channels_last"`` or ``"keep"`` for torch's own;
            ``"auto"`` takes channels_last on the CPU, where it is faster. The numbers are the same.
        convolution: "auto" takes our kernels for 3×3 convolutions: :func:`normdrop.convert`.
        memory: "low" keeps less for backward, with the same gradients: :func:`normdrop.convert`.

    Shape:
        (N, in_channels, H, W) with H and W at least 32, to (N, classes).

    Raises:
        UserError: another depth, a keep outside (0, 1], an image smaller than 32×32.

    Example:
        >>> network = VGG(11, 10, width=8, hidden=32, pool=1, keep_hidden=0.5)
        >>> network(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])

    Reference:
        K. Simonyan, A. Zisserman: Very Deep Convolutional Networks for Large-Scale Image
        Recognition. ICLR 2015.
    """

    least_size = 32
    output = Output("classifier.6")

    def __init__(
        self,
        depth: int = 16,
        classes: int = 1000,
        *,
        in_channels: int = 3,
        width: int = 64,
        hidden: int = 4096,
        pool: int = 7,
        keep_input: float = 1.0,
        keep_hidden: float = 1.0,
        norm: bool = True,
        input_norm: bool = False,
        layout: Layout = "auto",
        convolution: Convolution = "keep",
        memory: Memory = "normal",
    ) -> None:
        super().__init__()
        if depth not in _STAGES:
            raise UserError(f"vgg: expected `depth` to be 11, 13, 16 or 19 but got {depth!r}")
        for name, count in (
            ("classes", classes),
            ("in_channels", in_channels),
            ("width", width),
            ("hidden", hidden),
            ("pool", pool),
        ):
            check_count(name, count)
        keep_hidden = check_keep("keep_hidden", keep_hidden)
        self.input_norm = norm2d(in_channels, norm=input_norm)
        self.input_drop = dropout(check_keep("keep_input", keep_input))
        layers: list[torch.nn.Module] = []
        channels = in_channels
        for stage, convolutions in enumerate(_STAGES[depth]):
            filters = width * min(2**stage, 8)
            for _ in range(convolutions):
                layers.append(torch.nn.Conv2d(channels, filters, 3, padding=1))
                if norm:
                    layers.append(torch.nn.BatchNorm2d(filters))
                layers.append(torch.nn.ReLU())
                channels = filters
            layers.append(torch.nn.MaxPool2d(2, 2))
        self.features = torch.nn.Sequential(*layers)
        self.avgpool = torch.nn.AdaptiveAvgPool2d(pool)
        self.classifier = torch.nn.Sequential(
            torch.nn.Linear(channels * pool * pool, hidden),
            torch.nn.ReLU(),
            dropout(keep_hidden),
            torch.nn.Linear(hidden, hidden),
            torch.nn.ReLU(),
            dropout(keep_hidden),
            torch.nn.Linear(hidden, classes),
        )
        initialize(self, self.output)
        convert(self, layout=layout, convolution=convolution, linear="auto", memory=memory)

    def forward(self, x: Tensor) -> Tensor:
        pieces.check_image(x.shape, self.least_size, "vgg")
        x = self.features(self.input_drop(self.input_norm(x)))
        logits: Tensor = self.classifier(self.avgpool(x).flatten(1))
        return logits


vgg = VGG
