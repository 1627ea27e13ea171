"""The measured peak of fused multiply-adds on the CPU: a loop in registers, compiled for this machine.

No call into torch shows it, since a product or a convolution also loads, packs and stores.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("fma_peak.cpp")
STEPS = 1 << 20  # a few milliseconds: much longer than handing work to a thread


def flops_per_second(threads: int, element_bytes: int, seconds: float) -> float | None:
    """The best rate of ``threads`` threads together; None where there is no compiler to build the loop with."""
    library = _load()
    if library is None:
        return None
    loop: Callable[[int], float] = library.fma_float64 if element_bytes == 8 else library.fma_float32
    flops = STEPS * threads * library.fma_flops_per_step(element_bytes)
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:  # ctypes releases the interpreter's lock during a call
        list(pool.map(loop, [STEPS] * threads))
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            start = time.perf_counter()
            list(pool.map(loop, [STEPS] * threads))
            best = max(best, flops / (time.perf_counter() - start))
    return best


def _load() -> Any:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "fma_peak.so"
        command = [compiler, "-O2", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC", SOURCE, "-o", target]
        if subprocess.run(command, capture_output=True, check=False).returncode != 0:
            return None
        library = ctypes.CDLL(str(target))
    for name in ("fma_float32", "fma_float64"):
        getattr(library, name).argtypes, getattr(library, name).restype = [ctypes.c_int64], ctypes.c_double
    return library
