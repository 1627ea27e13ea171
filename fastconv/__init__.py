"""Convolution and pooling kernels for PyTorch, hand-written, as drop-in layers and functions."""

from __future__ import annotations

from fastconv import functional, tuning
from fastconv._report import conversion_report
from fastconv.convert import convert, revert
from fastconv.explain import explain
from fastconv.functional import adaptive_avg_pool2d, avg_pool2d, conv2d, local_response_norm, max_pool2d
from fastconv.fused import ConvBNReLU2d, DepthwiseSeparableConv2d, FusedConv2d
from fastconv.fusion import fuse
from fastconv.layers import AdaptiveAvgPool2d, AvgPool2d, Conv2d, GlobalAvgPool2d, LocalResponseNorm, MaxPool2d
from fastconv.patch import patch
from fastconv.stats import reset_stats, stats

__version__ = "0.1.0"

__all__ = [
    # layers
    "Conv2d",
    "MaxPool2d",
    "AvgPool2d",
    "AdaptiveAvgPool2d",
    "GlobalAvgPool2d",
    "LocalResponseNorm",
    "ConvBNReLU2d",
    "DepthwiseSeparableConv2d",
    "FusedConv2d",
    # functions
    "functional",
    "conv2d",
    "max_pool2d",
    "avg_pool2d",
    "adaptive_avg_pool2d",
    "local_response_norm",
    # whole models
    "convert",
    "revert",
    "conversion_report",
    "fuse",
    "patch",
    # what runs, what ran, what runs fastest
    "tuning",
    "explain",
    "stats",
    "reset_stats",
]
