"""Every depthwise convolution of the lecture: forward, input gradient and weight gradient."""

from __future__ import annotations

import pytest

from benchmarks import cases, layers
from benchmarks.report import DIRECTIONS

LAYERS = layers.convolutions(depthwise=True)
OP = "depthwise"


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_depthwise(layer, batch, direction, layout, measured, device, dtype):
    pair = cases.convolution(OP, layer, batch, direction, layout, device, dtype)
    measured(pair.case, pair.ours, pair.theirs, pair.terms)
