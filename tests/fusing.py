"""Small networks for the tests of fuse, and the comparison of a fused one with its original."""

from __future__ import annotations

import copy
import operator

import torch
from torch import nn
from torch.nn import functional as F

import fastconv
from fastconv._report import conversion_report
from fastconv.fused import FusedConv2d
from fastconv.fusion import fuse


def norm(channels):
    """Batch normalisation that is not the identity."""
    layer = nn.BatchNorm2d(channels)
    with torch.no_grad():
        layer.running_mean.normal_(0, 0.3)
        layer.running_var.uniform_(0.5, 2)
        layer.weight.normal_(1, 0.3)
        layer.bias.normal_(0, 0.3)
    return layer


def images(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def kinds(model):
    return [type(module) for module in model.modules() if not list(module.children())]


def check(model, *inputs, fused, rest=0, tolerance=1e-4):
    """fuse(model) agrees with model, has ``fused`` fused layers, and calls no convolution of torch's."""
    inputs = inputs or (images(2, 3, 16, 16),)
    before = [type(module) for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    result = fuse(model)
    assert [type(module) for module in model.modules()] == before
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    with torch.no_grad():
        fastconv.reset_stats()
        outputs = result(*(value.clone() for value in inputs))
        calls = {name: count for name, count in fastconv.stats().items() if name.startswith(("conv2d/", "depthwise"))}
        assert not [name for name in fastconv.stats() if name.startswith("torch/")]
        expected = model(*inputs)
    torch.testing.assert_close(outputs, expected, rtol=tolerance, atol=tolerance)
    assert kinds(result).count(FusedConv2d) == fused, conversion_report(result)
    assert kinds(result).count(fastconv.Conv2d) == rest
    assert nn.Conv2d not in kinds(result)
    assert sum(calls.values()) >= fused + rest
    return result


def names(entries):
    return [entry.name for entry in entries]


class BasicBlock(nn.Module):
    """ResNet's, with the in-place habits of the usual implementations."""

    def __init__(self, inputs, outputs, stride=1, add=operator.iadd, inplace=True):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = norm(outputs)
        self.relu = nn.ReLU(inplace=inplace)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = norm(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))
        self.add = add

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out = self.add(out, identity)
        return self.relu(out)


class Bottleneck(nn.Module):
    def __init__(self, inputs, width, outputs, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), norm(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), norm(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=False), norm(outputs)
        self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))

    def forward(self, x):
        identity = self.downsample(x)
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        return torch.relu(torch.add(self.bn3(self.conv3(out)), identity))


class ResNetLike(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.num_classes = 5
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 7, 2, 3, bias=False), norm(8), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        )
        self.layers = nn.Sequential(*blocks)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(16, self.num_classes)

    def forward(self, x):
        return self.fc(torch.flatten(self.avgpool(self.layers(self.stem(x))), 1))


class InvertedResidual(nn.Module):
    """MobileNet-v2's: expansion, depthwise, linear projection, and a skip without an activation after it."""

    def __init__(self, inputs, outputs, stride, expansion):
        super().__init__()
        self.use_residual = stride == 1 and inputs == outputs
        hidden = inputs * expansion
        self.conv = nn.Sequential(
            *(nn.Conv2d(inputs, hidden, 1, bias=False), norm(hidden), nn.ReLU6(inplace=True)),
            *(nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), norm(hidden), nn.ReLU6(inplace=True)),
            *(nn.Conv2d(hidden, outputs, 1, bias=False), norm(outputs)),
        )

    def forward(self, x):
        return x + self.conv(x) if self.use_residual else self.conv(x)


def resnet(**options):
    return ResNetLike(BasicBlock(8, 8, **options), BasicBlock(8, 16, 2, **options)).eval()
