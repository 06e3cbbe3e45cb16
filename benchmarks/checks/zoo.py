"""Architectures that others wrote, with random weights, for architectures.py.

From pytorchcv, from transformers (vision models of small configurations) and from MONAI (volumes);
what is not installed is left out. A few of torch alone stand for the shapes of code that users
write; the tests run those.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

__all__ = ["Architecture", "architectures"]

IMAGE, SMALL, VOLUME = (4, 3, 64, 64), (8, 3, 32, 32), (2, 1, 32, 32, 32)
LARGER_IMAGE, MORE_SMALL, MORE_IMAGES = (4, 3, 128, 128), (32, 3, 32, 32), (16, 3, 64, 64)


@dataclass(frozen=True)
class Architecture:
    """A network: where it is from, how it is made, what it takes.

    Attributes:
        source: the package that it is from.
        name: its name there.
        make: gives a new one.
        shape: of its input.
        timed: of its input where a step is timed, with as much to do as takes a second or so.
        draws: it draws random numbers besides dropout's (the same ones for every seed, but others
            in float64), so that float64 is no referee for float32.
    """

    source: str
    name: str
    make: Callable[[], torch.nn.Module]
    shape: tuple[int, ...] = IMAGE
    timed: tuple[int, ...] = ()
    draws: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        return f"{self.source} {self.name}"


def architectures() -> Iterator[Architecture]:
    """All of those whose package is installed."""
    for package, listing in (
        ("torch", _torch),
        ("pytorchcv", _pytorchcv),
        ("transformers", _transformers),
        ("monai", _monai),
    ):
        if importlib.util.find_spec(package) is None:
            print(f"{package} is not installed: its architectures are left out")
        else:
            yield from listing()


# ---- torch -------------------------------------------------------------------------------------


class _Residual(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(width)
        self.conv2 = torch.nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = torch.nn.BatchNorm2d(width)
        self.relu = torch.nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


def _residual_network() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, padding=1, bias=False),
        torch.nn.BatchNorm2d(16),
        torch.nn.ReLU(),
        *(_Residual(16) for _ in range(2)),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(16, 10),
    )


def _perceptron() -> torch.nn.Module:
    layers: list[torch.nn.Module] = [torch.nn.Flatten()]
    for width, wider in ((3 * 32 * 32, 64), (64, 64)):
        layers += [
            torch.nn.Linear(width, wider),
            torch.nn.BatchNorm1d(wider),
            torch.nn.ReLU(),
            torch.nn.Dropout(0.2),
        ]
    return torch.nn.Sequential(*layers, torch.nn.Linear(64, 10))


def _torch() -> Iterator[Architecture]:
    yield Architecture("torch", "residual", _residual_network, SMALL, MORE_SMALL)
    yield Architecture("torch", "perceptron", _perceptron, SMALL, MORE_SMALL)


# ---- pytorchcv ---------------------------------------------------------------------------------

# Module of pytorchcv.models: functions in it.
_IMAGES = {
    "airnet": "airnet50_1x64d_r2",
    "airnext": "airnext50_32x4d_r2",
    "bagnet": "bagnet9",
    "bamresnet": "bam_resnet18",
    "bninception": "bninception",
    "cbamresnet": "cbam_resnet18",
    "condensenet": "condensenet74_c4_g4",
    "darknet": "darknet_ref",
    "darknet53": "darknet53",
    "densenet": "densenet121",
    "diapreresnet": "diapreresnet18",
    "diaresnet": "diaresnet18",
    "diracnetv2": "diracnet18v2",
    "dla": "dla34",
    "dpn": "dpn68",
    "drn": "drnc26",
    "efficientnet": "efficientnet_b0",
    "efficientnetedge": "efficientnet_edge_small_b",
    "fbnet": "fbnet_cb",
    "fdmobilenet": "fdmobilenet_w1",
    "fishnet": "fishnet99",
    "ghostnet": "ghostnet",
    "hardnet": "hardnet39ds",
    "hrnet": "hrnet_w18_small_v1",
    "ibnbresnet": "ibnb_resnet50",
    "ibndensenet": "ibn_densenet121",
    "ibnresnet": "ibn_resnet50",
    "igcv3": "igcv3_w1",
    "menet": "menet108_8x1_g3",
    "mixnet": "mixnet_s",
    "mnasnet": "mnasnet_b1",
    "mobilenet": "mobilenet_w1",
    "mobilenetv2": "mobilenetv2_w1",
    "mobilenetv3": "mobilenetv3_large_w1",
    "octresnet": "octresnet10_ad2",
    "peleenet": "peleenet",
    "preresnet": "preresnet18",
    "proxylessnas": "proxylessnas_cpu",
    "regnet": "regnetx002 regnety002",
    "resattnet": "resattnet56",
    "resnesta": "resnesta18",
    "resnet": "resnet18 resnet50",
    "resneta": "resneta50b",
    "resnetd": "resnetd50b",
    "resnext": "resnext14_32x4d",
    "revnet": "revnet38",
    "selecsls": "selecsls42",
    "senet": "senet16",
    "sepreresnet": "sepreresnet18",
    "seresnet": "seresnet18",
    "seresnext": "seresnext50_32x4d",
    "sharesnet": "sharesnet18",
    "shufflenet": "shufflenet_g1_w1",
    "shufflenetv2": "shufflenetv2_w1",
    "shufflenetv2b": "shufflenetv2b_w1",
    "sknet": "sknet50",
    "sparsenet": "sparsenet121",
    "spnasnet": "spnasnet",
    "squeezenext": "sqnxt23_w1",
    "tresnet": "tresnet_m",
    "vgg": "bn_vgg11b",
    "vovnet": "vovnet27s",
}
_CIFAR = {
    "densenet_cifar": "densenet40_k12_cifar10",
    "fractalnet_cifar": "fractalnet_cifar10",
    "nin_cifar": "nin_cifar10",
    "preresnet_cifar": "preresnet20_cifar10",
    "pyramidnet_cifar": "pyramidnet110_a48_cifar10",
    "resdropresnet_cifar": "resdropresnet20_cifar10",
    "resnet_cifar": "resnet20_cifar10 resnet56_cifar10",
    "resnext_cifar": "resnext20_16x4d_cifar10",
    "rir_cifar": "rir_cifar10",
    "ror_cifar": "ror3_56_cifar10",
    "seresnet_cifar": "seresnet20_cifar10",
    "shakedropresnet_cifar": "shakedropresnet20_cifar10",
    "shakeshakeresnet_cifar": "shakeshakeresnet20_2x16d_cifar10",
    "wrn_cifar": "wrn16_10_cifar10",
    "xdensenet_cifar": "xdensenet40_2_k24_bc_cifar10",
}
_LARGER = {
    "inceptionresnetv1": ("inceptionresnetv1", 128),
    "inceptionresnetv2": ("inceptionresnetv2", 128),
    "inceptionv3": ("inceptionv3", 128),
    "inceptionv4": ("inceptionv4", 128),
    "nasnet": ("nasnet_4a1056", 96),
    "scnet": ("scnet50", 128),
    "xception": ("xception", 96),
}
_DENSE = {
    "deeplabv3": "deeplabv3_resnetd50b_voc",
    "erfnet": "erfnet_cityscapes",
    "fastscnn": "fastscnn_cityscapes",
    "linknet": "linknet_cityscapes",
    "pspnet": "pspnet_resnetd50b_voc",
    "segnet": "segnet_cityscapes",
    "unet": "unet_cityscapes",
}
_DRAWS = ("fractalnet", "resdrop", "shakedrop", "shakeshake")


def _cv(module: str, function: str, **options: Any) -> torch.nn.Module:
    make = getattr(importlib.import_module(f"pytorchcv.models.{module}"), function)
    network: torch.nn.Module = make(**options)
    # Some end in a pooling of the 7x7 or 10x10 that large images give; smaller ones give less.
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is torch.nn.AvgPool2d and (
                name == "final_pool" or child.kernel_size in (7, 8, 10)
            ):
                setattr(parent, name, torch.nn.AdaptiveAvgPool2d(1))
    if module == "vgg":
        network.features.append(torch.nn.AdaptiveAvgPool2d(7))
    return network


def _pytorchcv() -> Iterator[Architecture]:
    for shape, timed, listed in ((IMAGE, LARGER_IMAGE, _IMAGES), (SMALL, MORE_SMALL, _CIFAR)):
        for module, names in listed.items():
            for name in names.split():
                make = partial(_cv, module, name)
                draws = name.startswith(_DRAWS)
                yield Architecture("pytorchcv", name, make, shape, timed, draws)
    for module, (name, size) in _LARGER.items():
        yield Architecture("pytorchcv", name, partial(_cv, module, name), (4, 3, size, size))
    for module, name in _DENSE.items():
        make = partial(_cv, module, name, in_size=(64, 64))
        yield Architecture("pytorchcv", name, make, (2, 3, 64, 64))
    yield Architecture(
        "pytorchcv",
        "quartznet5x5_en_ls",
        partial(_Speech, "quartznet", "quartznet5x5_en_ls"),
        (2, 64, 64),
    )
    yield Architecture(
        "pytorchcv", "jasper5x3", partial(_Speech, "jasper", "jasper5x3"), (2, 64, 64)
    )


class _Speech(torch.nn.Module):
    """A network of spectra (N, C, L) that asks for their lengths as well."""

    def __init__(self, module: str, function: str) -> None:
        super().__init__()
        self.network = _cv(module, function, from_audio=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x, torch.full((len(x),), x.shape[2]))[0]


# ---- transformers ------------------------------------------------------------------------------

_TRANSFORMERS: dict[str, dict[str, Any]] = {
    "Bit": {"embedding_size": 64, "hidden_sizes": [128, 256], "depths": [2, 2]},
    "ConvNext": {"hidden_sizes": [16, 32], "depths": [2, 2], "num_stages": 2},
    "ConvNextV2": {"hidden_sizes": [16, 32], "depths": [2, 2], "num_stages": 2},
    "Cvt": {"embed_dim": [16, 32, 64], "num_heads": [1, 2, 4], "depth": [1, 2, 3]},
    "EfficientNet": {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280},
    "FocalNet": {"embed_dim": 16, "depths": [1, 1], "focal_levels": [2, 2], "image_size": 64},
    "HGNetV2": {},
    "Levit": {
        "image_size": 64,
        "hidden_sizes": [32, 48, 64],
        "num_attention_heads": [2, 3, 4],
        "key_dim": [16, 16, 16],
    },
    "MobileNetV1": {"depth_multiplier": 0.5},
    "MobileNetV2": {"depth_multiplier": 0.5},
    "MobileViT": {"image_size": 64, "hidden_sizes": [48, 64, 80]},
    "MobileViTV2": {"image_size": 64, "width_multiplier": 0.5},
    "PoolFormer": {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]},
    "Pvt": {"image_size": 64},
    "RegNet": {"hidden_sizes": [32, 64, 160, 384], "depths": [1, 1, 2, 2], "groups_width": 16},
    "ResNet": {"hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic"},
    "Segformer": {"hidden_sizes": [16, 32, 48, 64]},
    "SwiftFormer": {"embed_dims": [16, 32, 48, 64], "depths": [1, 1, 1, 1], "image_size": 64},
    "Swin": {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "image_size": 64},
    "TextNet": {},
    "ViT": {
        "image_size": 64,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "hidden_dropout_prob": 0.1,
    },
}


def _transformer(
    name: str, options: dict[str, Any], task: str = "ImageClassification"
) -> torch.nn.Module:
    transformers = importlib.import_module("transformers")
    kind = getattr(transformers, f"{name}For{task}")
    network: torch.nn.Module = kind(getattr(transformers, f"{name}Config")(**options))
    return network


def _transformers() -> Iterator[Architecture]:
    for name, options in _TRANSFORMERS.items():
        make = partial(_transformer, name, options)
        yield Architecture("transformers", name, make, IMAGE, MORE_IMAGES)
    dense = {**_TRANSFORMERS["Segformer"], "decoder_hidden_size": 32}
    make = partial(_transformer, "Segformer", dense, "SemanticSegmentation")
    yield Architecture("transformers", "Segformer, dense", make, IMAGE, MORE_IMAGES)


# ---- MONAI -------------------------------------------------------------------------------------

_UNET = {"channels": (8, 16, 32), "strides": (2, 2)}
_PLAIN = {"in_channels": 1, "out_channels": 2}
_3D = {"spatial_dims": 3, **_PLAIN}

_MONAI: dict[str, dict[str, Any]] = {
    "AttentionUnet": {**_3D, **_UNET, "dropout": 0.1},
    "AutoEncoder": {**_3D, "channels": (8, 16), "strides": (2, 2), "norm": "batch", "dropout": 0.1},
    "BasicUNet": {**_3D, "features": (8, 8, 16, 16, 32, 8), "norm": "batch", "dropout": 0.1},
    "BasicUNetPlusPlus": {**_3D, "features": (8, 8, 16, 16, 32, 8), "norm": "batch"},
    "DenseNet121": _3D,
    "DynUNet": {
        **_3D,
        "kernel_size": [3, 3, 3],
        "strides": [1, 2, 2],
        "upsample_kernel_size": [2, 2],
        "filters": [8, 16, 32],
        "norm_name": "batch",
        "res_block": True,
        "dropout": 0.1,
    },
    "EfficientNetBN": {
        "model_name": "efficientnet-b0",
        "spatial_dims": 3,
        "in_channels": 1,
        "num_classes": 2,
        "pretrained": False,
    },
    "HighResNet": {**_3D, "dropout_prob": 0.1},
    "RegUNet": {
        **_PLAIN,
        "spatial_dims": 3,
        "num_channel_initial": 8,
        "depth": 2,
    },
    "SegResNet": {**_3D, "init_filters": 8, "norm": "batch", "dropout_prob": 0.1},
    "SegResNetDS": {**_3D, "init_filters": 8, "norm": "batch"},
    "SEResNet50": {"spatial_dims": 3, "in_channels": 1, "num_classes": 2},
    "SEResNext50": {"spatial_dims": 3, "in_channels": 1, "num_classes": 2},
    "UNet": {**_3D, **_UNET, "num_res_units": 2, "norm": "batch", "dropout": 0.1},
    "UNETR": {
        **_PLAIN,
        "img_size": (32, 32, 32),
        "feature_size": 8,
        "hidden_size": 48,
        "mlp_dim": 96,
        "num_heads": 4,
        "norm_name": "batch",
        "dropout_rate": 0.1,
    },
    "VNet": {**_3D, "dropout_prob_down": 0.2},
    "resnet10": {"spatial_dims": 3, "n_input_channels": 1, "num_classes": 2},
    "resnet50": {"spatial_dims": 3, "n_input_channels": 1, "num_classes": 2},
}
# Where little is left of the volume in the end, batch normalization needs more of them.
_MONAI_SHAPES = dict.fromkeys(
    ("DenseNet121", "EfficientNetBN", "SEResNet50", "SEResNext50", "resnet10", "resnet50"),
    (4, 1, 32, 32, 32),
)


def _volume(name: str, options: dict[str, Any]) -> torch.nn.Module:
    network: torch.nn.Module = getattr(importlib.import_module("monai.networks.nets"), name)(
        **options
    )
    return network


def _monai() -> Iterator[Architecture]:
    for name, options in _MONAI.items():
        shape = _MONAI_SHAPES.get(name, VOLUME)
        yield Architecture("monai", name, partial(_volume, name, options), shape)
