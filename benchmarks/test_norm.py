"""AlexNet's two local response normalisations: forward without gradient, and the input gradient."""

from __future__ import annotations

import pytest

from benchmarks import cases, layers

LAYERS = layers.NORMS
DIRECTIONS = cases.POOL_DIRECTIONS


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_norm(layer, batch, direction, layout, measured, device, dtype):
    pair = cases.norm(layer, batch, direction, layout, device, dtype)
    measured(pair.case, pair.ours, pair.theirs, pair.terms, autograd=direction == "input_grad")
