"""The networks are those of the papers, written again here with plain ``torch.nn`` layers."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normdrop import networks


class Basic(nn.Module):
    def __init__(self, channels: int, width: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.extra = stride, width - channels
        self.changes = stride != 1 or self.extra != 0
        if self.changes and shortcut == "projection":
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if hasattr(self, "downsample"):
            x = self.downsample(x)
        elif self.changes:
            x = F.max_pool2d(x, 1, self.stride)
            x = torch.cat([x, x.new_zeros(len(x), self.extra, *x.shape[2:])], dim=1)
        return F.relu(x + y)


class Neck(nn.Module):
    def __init__(self, channels: int, width: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        if stride != 1 or channels != 4 * width:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        if hasattr(self, "downsample"):
            x = self.downsample(x)
        return F.relu(x + y)


class PlainResNet(nn.Module):
    def __init__(
        self, blocks: list[int], width: int, *, neck: bool, large: bool, shortcut: str
    ) -> None:
        super().__init__()
        self.large = large
        self.conv1 = (
            nn.Conv2d(3, width, 7, 2, 3, bias=False)
            if large
            else nn.Conv2d(3, width, 3, 1, 1, bias=False)
        )
        self.bn1 = nn.BatchNorm2d(width)
        channels = width
        self.names = []
        for stage, count in enumerate(blocks):
            layers = []
            for position in range(count):
                stride = 2 if stage and not position else 1
                block = (Neck if neck else Basic)(channels, width * 2**stage, stride, shortcut)
                layers.append(block)
                channels = width * 2**stage * (4 if neck else 1)
            self.names.append(f"layer{stage + 1}")
            setattr(self, self.names[-1], nn.Sequential(*layers))
        self.fc = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        if self.large:
            x = F.max_pool2d(x, 3, 2, 1)
        for name in self.names:
            x = getattr(self, name)(x)
        return self.fc(x.mean(dim=(2, 3)))


class WideBlock(nn.Module):
    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        if channels != width or stride != 1:
            self.shortcut = nn.Conv2d(channels, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.bn1(x))
        y = self.conv2(F.relu(self.bn2(self.conv1(a))))
        return y + (self.shortcut(a) if hasattr(self, "shortcut") else x)


class PlainWideResNet(nn.Module):
    def __init__(self, blocks: int, widen: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        channels = 16
        for stage in range(3):
            layers = []
            for position in range(blocks):
                width = 16 * widen * 2**stage
                layers.append(WideBlock(channels, width, 2 if stage and not position else 1))
                channels = width
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layers))
        self.bn1 = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.fc(F.relu(self.bn1(x)).mean(dim=(2, 3)))


class PlainVGG(nn.Module):
    """Configuration A of the paper with batch normalization, at a tenth of its width."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for step in (1, "pool", 2, "pool", 4, 4, "pool", 8, 8, "pool", 8, 8, "pool"):
            if step == "pool":
                layers.append(nn.MaxPool2d(2))
                continue
            filters = width * int(step)
            layers += [nn.Conv2d(channels, filters, 3, 1, 1), nn.BatchNorm2d(filters), nn.ReLU()]
            channels = filters
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(channels * 49, hidden),
            nn.ReLU(),
            nn.Identity(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Identity(),
            nn.Linear(hidden, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(F.adaptive_avg_pool2d(self.features(x), 7).flatten(1))


class PlainMLP(nn.Module):
    def __init__(self, first: int, second: int) -> None:
        super().__init__()
        self.input_norm = nn.BatchNorm1d(12)
        self.hidden = nn.Sequential(
            nn.Linear(12, first, bias=False),
            nn.BatchNorm1d(first),
            nn.ReLU(),
            nn.Linear(first, second, bias=False),
            nn.BatchNorm1d(second),
            nn.ReLU(),
        )
        self.fc = nn.Linear(second, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.hidden(self.input_norm(x.reshape(len(x), 12))))


# Small widths and few blocks; both families, both shortcuts and every kind of block.
_PAIRS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet14": (
        lambda: networks.resnet(14, 10, width=4),
        lambda: PlainResNet([2, 2, 2], 4, neck=False, large=False, shortcut="pad"),
        (3, 3, 9, 12),  # an odd side, and not square
    ),
    "resnet8, projection": (
        lambda: networks.resnet(8, 10, width=4, shortcut="projection"),
        lambda: PlainResNet([1, 1, 1], 4, neck=False, large=False, shortcut="projection"),
        (3, 3, 8, 8),
    ),
    "resnet18": (
        lambda: networks.resnet(18, 10, width=4),
        lambda: PlainResNet([2, 2, 2, 2], 4, neck=False, large=True, shortcut="projection"),
        (3, 3, 35, 33),
    ),
    "resnet18, small stem": (
        lambda: networks.resnet(18, 10, width=4, stem="small"),
        lambda: PlainResNet([2, 2, 2, 2], 4, neck=False, large=False, shortcut="projection"),
        (3, 3, 16, 16),
    ),
    "resnet50": (
        lambda: networks.resnet(50, 10, width=2),
        lambda: PlainResNet([3, 4, 6, 3], 2, neck=True, large=True, shortcut="projection"),
        (3, 3, 33, 33),
    ),
    "wide_resnet16_2": (
        lambda: networks.wide_resnet(16, 2, 10),
        lambda: PlainWideResNet(2, 2),
        (3, 3, 11, 8),
    ),
    "vgg11": (
        lambda: networks.vgg(11, 10, width=4, hidden=16),
        lambda: PlainVGG(4, 16),
        (3, 3, 66, 64),
    ),
    "mlp": (
        lambda: networks.mlp((12, 7, 5, 10), input_norm=True),
        lambda: PlainMLP(7, 5),
        (5, 3, 2, 2),
    ),
}


def _loss(y: Tensor) -> Tensor:
    return (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum()


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", _PAIRS)
def test_outputs_gradients_and_statistics_equal_plain_torchs(name: str, training: bool) -> None:
    make, make_plain, shape = _PAIRS[name]
    network, plain = make().double(), make_plain().double()
    state = network.state_dict()
    for key, tensor in state.items():
        # γ, α and the running statistics begin as ones and zeros, which would hide a mistake.
        if tensor.dim() == 1:
            state[key] = torch.rand_like(tensor) + 0.5
    network.load_state_dict(state)
    plain.load_state_dict(state)
    network.train(training)
    plain.train(training)
    x = torch.randn(shape, dtype=torch.float64)
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()

    y1, y2 = network(x1), plain(x2)
    _loss(y1).backward()
    _loss(y2).backward()

    torch.testing.assert_close(y1, y2, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(x1.grad, x2.grad, rtol=1e-8, atol=1e-8)
    theirs = dict(plain.named_parameters())
    for key, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[key].grad, rtol=1e-8, atol=1e-8)
    for key, tensor in plain.state_dict().items():
        torch.testing.assert_close(network.state_dict()[key], tensor, rtol=1e-9, atol=1e-9)
