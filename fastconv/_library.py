"""Loads the native library and gives its ops.

Everything else in the package reaches the kernels through :data:`ops`.
"""

from __future__ import annotations

import glob
import os
from collections import Counter
from typing import Any

import torch

_HERE = os.path.dirname(os.path.abspath(__file__))


def find_library(stem: str) -> str | None:
    """Path of the shared library ``stem`` beside this file, or None."""
    found = sorted(glob.glob(os.path.join(_HERE, stem + ".*so"))) + sorted(
        glob.glob(os.path.join(_HERE, stem + ".*pyd"))
    )
    return found[0] if found else None


def _load() -> str:
    path = find_library("_C_cpu")
    if path is None:
        raise ImportError(
            "fastconv's native library _C_cpu is not built; run `pip install .` (or `make test`) in the source folder, "
            "which needs g++ or clang++"
        )
    torch.ops.load_library(path)
    return path


library_path = _load()
ops: Any = torch.ops.fastconv

# Calls that were handed to torch, by function: what stats() reports under "torch/...".
torch_calls: Counter[str] = Counter()
