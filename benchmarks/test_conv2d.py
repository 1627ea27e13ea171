"""Every convolution of the lecture that is not depthwise: forward, input gradient and weight gradient."""

from __future__ import annotations

import pytest

from benchmarks import cases, layers
from benchmarks.report import DIRECTIONS

LAYERS = layers.convolutions(depthwise=False)
OP = "conv2d"


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_conv2d(layer, batch, direction, layout, measured, device, dtype):
    pair = cases.convolution(OP, layer, batch, direction, layout, device, dtype)
    measured(pair.case, pair.ours, pair.theirs, pair.terms)
