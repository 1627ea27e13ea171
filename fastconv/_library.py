"""Loads the native libraries and gives their ops.

Everything else in the package reaches the kernels through :data:`ops`. ``_C_cpu`` holds the operator schemas and the
CPU kernels and must be there; ``_C_cuda`` adds CUDA kernels for the same operators and is optional.

With ``FASTCONV_EMULATE=1`` the operators are those of ``_C_emulated`` (``make emulated``): the CUDA kernels, run on CPU
tensors by ``csrc/emulator``, for tests and for study. The variable may also name the library's file.
"""

from __future__ import annotations

import glob
import os
from collections import Counter
from typing import Any

import torch

_HERE = os.path.dirname(os.path.abspath(__file__))
_EMULATE = os.environ.get("FASTCONV_EMULATE", "")

EMULATED = _EMULATE not in ("", "0")
NAMESPACE = "fastconv_emulated" if EMULATED else "fastconv"


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


def _load_cuda() -> str | None:
    """Why there are no CUDA kernels; None if there are."""
    path = find_library("_C_cuda")
    if path is None:
        return (
            "fastconv's CUDA library _C_cuda is not built; install with FASTCONV_CUDA=1 (or `make cuda` in the source "
            "folder), which needs nvcc"
        )
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA; install one with CUDA"
    try:
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as error:
        return f"{path} does not load beside torch {torch.__version__}: {error}"
    driver: int = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]  # CUDA builds have it
    return driver_problem(driver, torch.ops.fastconv.cuda_runtime_version())


def driver_problem(driver: int, runtime: int) -> str | None:
    """Why kernels of a CUDA ``runtime`` (13000 is 13.0) do not run on ``driver``, which is 0 where there is none."""
    if driver == 0 or driver // 1000 >= runtime // 1000:
        return None
    return (
        f"_C_cuda is built with CUDA {runtime // 1000}, and the driver serves CUDA {driver // 1000}."
        f"{driver % 1000 // 10} at most; update the driver, or build with an older nvcc"
    )


def device_problem(device: torch.device) -> str | None:
    """Why the CUDA kernels do not run on this GPU. torch.compile knows the answers while it traces."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(device)
    if properties.major >= 8:
        return None
    return (
        f"the GPU, {properties.name}, has compute capability {properties.major}.{properties.minor}, and the kernels "
        "want 8.0 (Ampere) or later"
    )


def _load_emulated() -> None:
    path = find_library("_C_emulated") if _EMULATE == "1" else _EMULATE
    if path is None or not os.path.exists(path):
        raise ImportError(
            f"FASTCONV_EMULATE is {_EMULATE!r}, but the library of emulated CUDA kernels is not built; run "
            "`make emulated` in the source folder and set it to 1, or unset the variable"
        )
    torch.ops.load_library(path)


library_path = _load()
cuda_problem = "FASTCONV_EMULATE is set: CUDA kernels run on CPU tensors, emulated" if EMULATED else _load_cuda()
if EMULATED:
    _load_emulated()
ops: Any = getattr(torch.ops, NAMESPACE)

# Calls that were handed to torch, by function: what stats() reports under "torch/...".
torch_calls: Counter[str] = Counter()


def runs_cuda_kernels(tensor: torch.Tensor) -> bool:
    """True if operators on ``tensor`` are served by CUDA kernels, on a GPU or emulated."""
    return EMULATED or tensor.is_cuda
