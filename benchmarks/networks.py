"""The lecture's networks as plain torch modules: what whole-network benchmarks convert, fuse and export.

The convolutions and pools are those of :mod:`benchmarks.layers`; classifiers have 1000 classes. AlexNet is the
one-piece network without local response normalisation, as inference runtimes know it; VGG has no batch normalisation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from benchmarks.layers import MOBILENET_V2_STAGES, VGG_FILTERS

IMAGE = (3, 224, 224)
CLASSES = 1000


def alexnet() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 96, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(96, 256, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(256, 384, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(384, 384, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *classifier(256 * 6 * 6),
    )


def classifier(features: int) -> list[nn.Module]:
    return [
        nn.Flatten(),
        *(nn.Linear(features, 4096), nn.ReLU(), nn.Dropout()),
        *(nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout()),
        nn.Linear(4096, CLASSES),
    ]


def vgg(convolutions: Sequence[int]) -> nn.Module:
    layers: list[nn.Module] = []
    channels = IMAGE[0]
    for filters, count in zip(VGG_FILTERS, convolutions, strict=True):
        for _ in range(count):
            layers += [nn.Conv2d(channels, filters, 3, padding=1), nn.ReLU()]
            channels = filters
        layers.append(nn.MaxPool2d(2, 2))
    return nn.Sequential(*layers, *classifier(channels * 7 * 7))


def conv_norm(channels: int, filters: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Convolution that keeps the size (over the stride), and batch normalisation."""
    conv = nn.Conv2d(channels, filters, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(filters)]


class ResidualBlock(nn.Module):
    def __init__(self, channels: int, width: int, stride: int, *, bottleneck: bool) -> None:
        super().__init__()
        filters = 4 * width if bottleneck else width
        if bottleneck:
            parts = [*conv_norm(channels, width, 1), nn.ReLU(), *conv_norm(width, width, 3, stride), nn.ReLU()]
            parts += conv_norm(width, filters, 1)
        else:
            parts = [*conv_norm(channels, width, 3, stride), nn.ReLU(), *conv_norm(width, filters, 3)]
        self.body = nn.Sequential(*parts)
        straight = stride == 1 and channels == filters
        self.skip: nn.Module = nn.Identity() if straight else nn.Sequential(*conv_norm(channels, filters, 1, stride))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.relu(self.body(x) + self.skip(x))
        return result


def resnet(blocks: Sequence[int], *, bottleneck: bool) -> nn.Module:
    layers: list[nn.Module] = [*conv_norm(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for width, count in zip((64, 128, 256, 512), blocks, strict=True):
        for block in range(count):
            stride = 2 if block == 0 and width > 64 else 1
            layers.append(ResidualBlock(channels, width, stride, bottleneck=bottleneck))
            channels = 4 * width if bottleneck else width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))


class InvertedResidual(nn.Module):
    def __init__(self, channels: int, filters: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = channels * expansion
        parts = [*conv_norm(channels, hidden, 1), nn.ReLU6()] if expansion > 1 else []
        parts += [*conv_norm(hidden, hidden, 3, stride, hidden), nn.ReLU6(), *conv_norm(hidden, filters, 1)]
        self.body = nn.Sequential(*parts)
        self.adds = stride == 1 and channels == filters

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.body(x)
        return x + result if self.adds else result


def mobilenet_v2() -> nn.Module:
    layers: list[nn.Module] = [*conv_norm(3, 32, 3, 2), nn.ReLU6()]
    channels = 32
    for expansion, filters, count, first_stride in MOBILENET_V2_STAGES:
        for block in range(count):
            layers.append(InvertedResidual(channels, filters, first_stride if block == 0 else 1, expansion))
            channels = filters
    layers += [*conv_norm(channels, 1280, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2)]
    return nn.Sequential(*layers, nn.Linear(1280, CLASSES))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-18": lambda: resnet((2, 2, 2, 2), bottleneck=False),
    "ResNet-50": lambda: resnet((3, 4, 6, 3), bottleneck=True),
    "VGG-16": lambda: vgg((2, 2, 3, 3, 3)),
    "MobileNet-v2": mobilenet_v2,
    "AlexNet": alexnet,
}


def make(name: str) -> nn.Module:
    """The network with random weights that keep activations at one scale, and statistics that are not trivial."""
    torch.manual_seed(0)
    model = NETWORKS[name]()
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model
