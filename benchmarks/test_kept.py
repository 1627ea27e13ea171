"""3x3 and 1x1 convolutions with weights that are kept packed, as fused models keep them: the kernels by themselves."""

from __future__ import annotations

import pytest
import torch

from benchmarks import cases, layers

LAYERS = [layer for layer in layers.convolutions(depthwise=False) if layer.family.startswith(("3x3", "1x1"))]


def test_kept(layer, batch, layout, measured, device, dtype):
    if device.type != "cpu" or dtype != torch.float32 or layout != "nhwc":
        pytest.skip("networks of kept weights are channels_last on the CPU")
    pair = cases.kept(layer, batch, layout, dtype)
    measured(pair.case, pair.ours, pair.theirs, pair.terms)
