"""The lecture's networks, with batch normalization and dropout where the lecture puts them.

Every network takes ``keep_input``, ``keep_hidden``, ``norm`` and ``input_norm``; its last layer,
``network.output``, is never dropped. They are written with torch's own layers, and made by
:func:`normdrop.convert` what they are: batch normalization, the addition of the shortcut, the ReLU
and the dropout that follow are computed in one call.
"""

from normdrop.networks.mlp import MLP, mlp
from normdrop.networks.registry import available, build, options
from normdrop.networks.resnet import ResNet, resnet
from normdrop.networks.vgg import VGG, vgg
from normdrop.networks.wide_resnet import WideResNet, wide_resnet

__all__ = [
    "MLP",
    "VGG",
    "ResNet",
    "WideResNet",
    "available",
    "build",
    "mlp",
    "options",
    "resnet",
    "vgg",
    "wide_resnet",
]
