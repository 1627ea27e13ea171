"""Every depthwise convolution of the lecture: forward, input gradient and weight gradient."""

from __future__ import annotations

import pytest

from benchmarks import layers
from benchmarks.report import DIRECTIONS
from benchmarks.test_conv2d import run_convolution

LAYERS = layers.convolutions(depthwise=True)
OP = "depthwise"


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_depthwise(layer, batch, direction, layout, measured, device, dtype):
    run_convolution(OP, measured, layer, batch, direction, layout, device, dtype)
