"""The lecture's networks as lists of shapes: what the benchmarks measure.

LeNet-5 (LeCun et al. 1998), AlexNet (Krizhevsky et al. 2012) in one piece and in the original's two halves, VGG-11, -16
and -19 (Simonyan, Zisserman 2014), ResNet-18 to -152 (He et al. 2015, with the bottleneck's stride in its 3x3),
MobileNet-v2 (Sandler et al. 2018). Images are 224x224, for LeNet-5 32x32. Every plane is square.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

CONV_FAMILIES = ("stem", "3x3", "3x3 stride 2", "5x5", "1x1", "1x1 stride 2", "grouped", "depthwise")
POOL_FAMILIES = ("max", "avg", "global avg")
STEM_CHANNELS = 4  # an input of so few channels is an image
VGG_FILTERS = (64, 128, 256, 512, 512)
# Expansion, output channels, blocks, stride of the first block.
MOBILENET_V2_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


@dataclass(frozen=True)
class Conv:
    channels: int
    size: int
    filters: int
    kernel: int
    stride: int = 1
    padding: int = 0
    groups: int = 1

    @property
    def family(self) -> str:
        if self.groups > 1:
            return "depthwise" if self.groups == self.channels else "grouped"
        if self.channels <= STEM_CHANNELS:
            return "stem"
        return f"{self.kernel}x{self.kernel}" + (f" stride {self.stride}" if self.stride > 1 else "")

    @property
    def out_size(self) -> int:
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return self.filters, self.channels // self.groups, self.kernel, self.kernel

    def input_shape(self, batch: int) -> tuple[int, int, int, int]:
        return batch, self.channels, self.size, self.size

    def output_shape(self, batch: int) -> tuple[int, int, int, int]:
        return batch, self.filters, self.out_size, self.out_size

    @property
    def weights(self) -> int:
        return self.filters * (self.channels // self.groups) * self.kernel**2

    def flops(self, batch: int = 1) -> int:
        """Two per multiply-add over the output's pixels; the same for the output and for either gradient."""
        return 2 * batch * self.out_size**2 * self.weights

    def elements(self, batch: int = 1) -> int:
        """Input, weights and output: each pass reads two of the three and writes the third."""
        return batch * (self.channels * self.size**2 + self.filters * self.out_size**2) + self.weights

    def __str__(self) -> str:
        extras = f" /{self.stride}" if self.stride > 1 else ""
        extras += f" groups {self.groups}" if self.groups > 1 else ""
        return f"{self.channels}->{self.filters} {self.kernel}x{self.kernel}{extras} at {self.size}"


@dataclass(frozen=True)
class Pool:
    family: str
    channels: int
    size: int
    kernel: int
    stride: int
    padding: int = 0

    @property
    def out_size(self) -> int:
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1

    def input_shape(self, batch: int) -> tuple[int, int, int, int]:
        return batch, self.channels, self.size, self.size

    def output_shape(self, batch: int) -> tuple[int, int, int, int]:
        return batch, self.channels, self.out_size, self.out_size

    def flops(self, batch: int = 1) -> int:
        """One comparison or addition for each element of each window."""
        return batch * self.channels * self.out_size**2 * self.kernel**2

    def elements(self, batch: int = 1) -> int:
        return batch * self.channels * (self.size**2 + self.out_size**2)

    def __str__(self) -> str:
        return f"{self.family} {self.channels} {self.kernel}x{self.kernel} /{self.stride} at {self.size}"


Layer = Conv | Pool
LayerT = TypeVar("LayerT", Conv, Pool)


@dataclass(frozen=True)
class Norm:
    """Local response normalisation over 5 channels."""

    channels: int
    size: int
    family: str = "lrn"

    def input_shape(self, batch: int = 1) -> tuple[int, int, int, int]:
        return batch, self.channels, self.size, self.size

    def elements(self, batch: int = 1) -> int:
        return 2 * batch * self.channels * self.size**2

    def flops(self, batch: int = 1) -> int:
        """The squares and their sums."""
        return batch * self.channels * self.size**2 * 2 * 5

    def __str__(self) -> str:
        return f"lrn {self.channels} at {self.size}"


NORMS = [Norm(96, 55), Norm(256, 27)]  # AlexNet's


@dataclass
class Walk:
    """Follows one image through a network; `layers` is where it has been."""

    channels: int
    size: int
    layers: list[Layer] = field(default_factory=list)

    def conv(self, filters: int, kernel: int, stride: int = 1, padding: int = 0, groups: int = 1) -> Conv:
        layer = Conv(self.channels, self.size, filters, kernel, stride, padding, groups)
        self.layers.append(layer)
        self.channels, self.size = filters, layer.out_size
        return layer

    def pool(self, family: str, kernel: int, stride: int, padding: int = 0) -> None:
        layer = Pool(family, self.channels, self.size, kernel, stride, padding)
        self.layers.append(layer)
        self.size = layer.out_size


def lenet5() -> list[Layer]:
    walk = Walk(1, 32)
    walk.conv(6, 5)
    walk.pool("avg", 2, 2)
    walk.conv(16, 5)
    walk.pool("avg", 2, 2)
    walk.conv(120, 5)
    return walk.layers


def alexnet(halves: int = 1) -> list[Layer]:
    walk = Walk(3, 224)
    walk.conv(96, 11, stride=4, padding=2)
    walk.pool("max", 3, 2)
    walk.conv(256, 5, padding=2, groups=halves)
    walk.pool("max", 3, 2)
    walk.conv(384, 3, padding=1)  # the only convolution that reads both halves
    walk.conv(384, 3, padding=1, groups=halves)
    walk.conv(256, 3, padding=1, groups=halves)
    walk.pool("max", 3, 2)
    return walk.layers


def vgg(convolutions: Sequence[int]) -> list[Layer]:
    walk = Walk(3, 224)
    for filters, count in zip(VGG_FILTERS, convolutions, strict=True):
        for _ in range(count):
            walk.conv(filters, 3, padding=1)
        walk.pool("max", 2, 2)
    return walk.layers


def resnet(blocks: Sequence[int], *, bottleneck: bool) -> list[Layer]:
    walk = Walk(3, 224)
    walk.conv(64, 7, stride=2, padding=3)
    walk.pool("max", 3, 2, padding=1)
    for width, count in zip((64, 128, 256, 512), blocks, strict=True):
        filters = 4 * width if bottleneck else width
        for block in range(count):
            stride = 2 if block == 0 and width > 64 else 1
            came_from = Walk(walk.channels, walk.size, walk.layers)
            if bottleneck:
                walk.conv(width, 1)
                walk.conv(width, 3, stride=stride, padding=1)
                walk.conv(filters, 1)
            else:
                walk.conv(width, 3, stride=stride, padding=1)
                walk.conv(width, 3, padding=1)
            if stride > 1 or came_from.channels != filters:
                came_from.conv(filters, 1, stride=stride)  # the skip connection
    walk.pool("global avg", walk.size, 1)
    return walk.layers


def mobilenet_v2() -> list[Layer]:
    walk = Walk(3, 224)
    walk.conv(32, 3, stride=2, padding=1)
    for expansion, filters, count, first_stride in MOBILENET_V2_STAGES:
        for block in range(count):
            hidden = walk.channels * expansion
            if expansion > 1:
                walk.conv(hidden, 1)
            walk.conv(hidden, 3, stride=first_stride if block == 0 else 1, padding=1, groups=hidden)
            walk.conv(filters, 1)
    walk.conv(1280, 1)
    walk.pool("global avg", walk.size, 1)
    return walk.layers


NETWORKS: dict[str, Callable[[], list[Layer]]] = {
    "lenet5": lenet5,
    "alexnet": alexnet,
    "alexnet-2gpu": lambda: alexnet(halves=2),
    "vgg11": lambda: vgg((1, 1, 2, 2, 2)),
    "vgg16": lambda: vgg((2, 2, 3, 3, 3)),
    "vgg19": lambda: vgg((2, 2, 4, 4, 4)),
    "resnet18": lambda: resnet((2, 2, 2, 2), bottleneck=False),
    "resnet34": lambda: resnet((3, 4, 6, 3), bottleneck=False),
    "resnet50": lambda: resnet((3, 4, 6, 3), bottleneck=True),
    "resnet101": lambda: resnet((3, 4, 23, 3), bottleneck=True),
    "resnet152": lambda: resnet((3, 8, 36, 3), bottleneck=True),
    "mobilenet_v2": mobilenet_v2,
}


def distinct(kind: type[LayerT]) -> dict[LayerT, Counter[str]]:
    """Every distinct layer of a kind, in order of first use, with how often each network uses it."""
    uses: dict[LayerT, Counter[str]] = {}
    for network, walk in NETWORKS.items():
        for layer in walk():
            if isinstance(layer, kind):
                uses.setdefault(layer, Counter())[network] += 1
    return uses


def convolutions(*, depthwise: bool) -> list[Conv]:
    return [layer for layer in distinct(Conv) if (layer.family == "depthwise") == depthwise]


def pools() -> list[Pool]:
    return list(distinct(Pool))


def representative(layers: Sequence[LayerT], per_family: int) -> list[LayerT]:
    """Of each family, layers spread evenly over its order by FLOPs: the middle one if ``per_family`` is 1."""
    chosen = []
    for family in dict.fromkeys(layer.family for layer in layers):
        members = sorted((layer for layer in layers if layer.family == family), key=lambda layer: layer.flops())
        count = min(per_family, len(members))
        chosen += [members[(2 * i + 1) * len(members) // (2 * count)] for i in range(count)]
    return chosen
