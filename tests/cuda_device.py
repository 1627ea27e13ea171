"""Where tests of CUDA tensors run: on a GPU, else on CPU tensors with emulated kernels (tests/test_emulated.py)."""

from __future__ import annotations

import pytest

from fastconv._library import EMULATED
from fastconv.backends import unavailable

ON_GPU = unavailable("cuda") is None
DEVICE = "cuda" if ON_GPU else "cpu"
WHERE = "cuda" if ON_GPU else "emulated"  # what stats() calls the kernels

cuda_kernels = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (ON_GPU or EMULATED), reason=f"no CUDA kernels: {unavailable('cuda')}"),
]
on_a_gpu = pytest.mark.skipif(not ON_GPU, reason="a GPU's streams, graphs and memory are not emulated")
