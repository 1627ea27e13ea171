"""LeNet-5, of LeCun, Bottou, Bengio, Haffner: Gradient-Based Learning Applied to Document Recognition (1998)."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

# Table I of the paper: which of S2's 6 maps each of C3's 16 maps reads. Three neighbours, four neighbours (both
# cyclic), four in two pairs, all: no two maps see the same inputs, so they cannot learn the same thing.
CONNECTIONS: tuple[tuple[int, ...], ...] = (
    *(tuple((first + step) % 6 for step in range(3)) for first in range(6)),
    *(tuple((first + step) % 6 for step in range(4)) for first in range(6)),
    (0, 1, 3, 4),
    (1, 2, 4, 5),
    (0, 2, 3, 5),
    (0, 1, 2, 3, 4, 5),
)


class Layers(Protocol):
    """Where a model takes its layers from: the module ``fastconv``, ``torch.nn``, or anything that has these two."""

    @property
    def Conv2d(self) -> type[nn.Conv2d]: ...
    @property
    def AvgPool2d(self) -> type[nn.AvgPool2d]: ...


class ConnectionTable(nn.Module):
    """Parametrization of a convolution's weight: zero wherever an output map does not read an input map."""

    mask: Tensor

    def __init__(self, connections: tuple[tuple[int, ...], ...], in_channels: int) -> None:
        super().__init__()
        mask = torch.zeros(len(connections), in_channels, 1, 1)
        for row, inputs in enumerate(connections):
            mask[row, list(inputs)] = 1
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


class Subsampling(nn.Module):
    """2x2 average pooling, then a trainable scale and bias per channel: ``(N, C, H, W) -> (N, C, H/2, W/2)``."""

    def __init__(self, channels: int, layers: Layers) -> None:
        super().__init__()
        self.pool = layers.AvgPool2d(2)
        self.scale = nn.Parameter(torch.ones(channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias, self.pool(x), self.scale)


class RadialBasis(nn.Module):
    """Squared distances between the input and one parameter vector for each class: ``(N, features) -> (N, classes)``.

    The paper draws the vectors by hand, as +1 and -1 pixels of a small picture of each character, and keeps them fixed.
    Here they start as random signs and are trained.
    """

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randint(0, 2, (classes, features)) * 2.0 - 1.0)

    def forward(self, x: Tensor) -> Tensor:
        return (x[:, None, :] - self.centres).square().sum(-1)


class LeNet5(nn.Module):
    """LeNet-5 for 32x32 grey images of zero mean and unit variance: ``(N, 1, 32, 32) -> (N, classes)``.

    The output is the squared distance to each class's vector, so the smallest is the answer. To train with cross
    entropy, give it the negative: ``cross_entropy(-model(x), target)``.

    Args:
        classes: number of RBF units.
        layers: where ``Conv2d`` and ``AvgPool2d`` come from, ``fastconv`` by default. ``LeNet5(layers=torch.nn)``
            builds the same network of torch's layers, with equal weights after the same ``torch.manual_seed``.
    """

    def __init__(self, classes: int = 10, *, layers: Layers | None = None) -> None:
        super().__init__()
        if layers is None:
            import fastconv

            layers = fastconv
        self.c1 = layers.Conv2d(1, 6, 5)  # 28 x 28
        self.s2 = Subsampling(6, layers)  # 14 x 14
        self.c3 = layers.Conv2d(6, 16, 5)  # 10 x 10
        parametrize.register_parametrization(self.c3, "weight", ConnectionTable(CONNECTIONS, 6))
        self.s4 = Subsampling(16, layers)  # 5 x 5
        self.c5 = layers.Conv2d(16, 120, 5)  # 1 x 1
        self.f6 = nn.Linear(120, 84)
        self.output = RadialBasis(84, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.c1(x))
        x = torch.tanh(self.s2(x))
        x = torch.tanh(self.c3(x))
        x = torch.tanh(self.s4(x))
        x = torch.tanh(self.c5(x))
        x = torch.tanh(self.f6(x.flatten(1)))
        distances: Tensor = self.output(x)
        return distances
