"""The test kernels (emulator_*.cu) as Python functions: each runs one and says whether the result is right."""

from __future__ import annotations

import functools
from typing import Any

import emulator_library as emulator
import torch
from emulator_library import ConvProblem, DType, Library

SIMT, MMA, PIPELINE, WGMMA, ERRORS = (
    f"tests/emulator_{name}.cu" for name in ("simt", "mma", "pipeline", "wgmma", "errors")
)
NAN = float("nan")


@functools.cache
def _built(kind: str, files: tuple[str, ...]) -> Library:
    return emulator.build(files, kind)


def library(kind: str = "plain", files: tuple[str, ...] = (SIMT, MMA, PIPELINE), **options: Any) -> Library:
    """The test kernels in a library of this kind, with these options and no others."""
    built = _built(kind, files)
    built.configure(check_races=kind == "checked", **options)
    return built


def integers(*shape: int, low: int = -3, high: int = 4, seed: int = 0) -> torch.Tensor:
    """Small enough for exact sums in every type."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def code(dtype: torch.dtype) -> DType:
    return DType[str(dtype).removeprefix("torch.")]


def run_transpose(built: Library, bug: int) -> bool:
    x, y = torch.arange(1024.0).view(32, 32), torch.full((32, 32), NAN)
    built.call("transpose", "tile", x, y, bug)
    return torch.equal(y, x.T)


def run_warp_row(built: Library, bug: int) -> bool:
    y = torch.full((4, 32), NAN)
    built.call("warp_row", "shared", y, bug)
    return torch.equal(y, torch.arange(128.0).view(4, 32).flip(1))


def run_neighbour(built: Library, bug: int) -> bool:
    values, out = torch.arange(16.0), torch.full((8,), NAN)
    built.call("neighbour", "blocks", values, out, 8, bug)
    return torch.equal(out, torch.arange(8.0))


def run_grid_sum(built: Library, bug: int) -> bool:
    x, parts, out = integers(12).float(), torch.full((6,), NAN), torch.full((6,), NAN)
    arrived = torch.zeros(1, dtype=torch.int32)
    built.call("grid_sum", "cooperative", x, parts, arrived, out, 6, bug)
    return torch.equal(out, x.sum().expand(6))


def run_mma(built: Library, bug: int, dtype: torch.dtype = torch.float16) -> bool:
    a, b, c = integers(64, 256).to(dtype), integers(96, 256, seed=1).to(dtype), torch.full((64, 96), NAN)
    built.call("mma", "pipeline", code(dtype), a, b, c, 64, 96, 256, bug)
    return torch.equal(c, a.float() @ b.float().T)


PIPELINE_PROBLEMS = [  # n, c, h, w, k, filter, stride, pad, dilation
    (2, 24, 7, 7, 32, 1, 1, 0, 1),
    (2, 64, 9, 11, 72, 3, 2, 1, 1),
    (2, 40, 10, 7, 136, 3, 1, 1, 1),
    (1, 32, 12, 12, 32, 3, 1, 2, 2),
]
REUSING = (2, 96, 14, 14, 72, 3, 1, 1, 1)  # several tiles per warpgroup, more blocks of K than stages


def pipeline(
    built: Library, cluster: str, problem: tuple[int, ...], bug: int, dtype: torch.dtype = torch.float16
) -> bool:
    n, c, h, w, k, taps, stride, pad, dilation = problem
    x = integers(n, c, h, w, low=-1, high=2).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = integers(k, c, taps, taps, low=-1, high=2, seed=1).to(dtype).contiguous(memory_format=torch.channels_last)
    want = torch.nn.functional.conv2d(x.float(), weight.float(), None, stride, pad, dilation).to(dtype)
    y = torch.full_like(want, NAN).contiguous(memory_format=torch.channels_last)
    described = ConvProblem.of(x, weight, (stride, stride), (pad, pad, pad, pad), (dilation, dilation))
    built.call("pipeline", cluster, described, x, weight, y, bug)
    return torch.equal(y, want)


def product(built: Library, name: str, shift: int = 0, exchanged: int = 0) -> bool:
    kind, columns, _, layout = name.split("_")
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32}[kind]
    n = int(columns)
    a, b = integers(64, 128), integers(n + shift, 128, seed=1)
    stored_a = a.to(dtype) if layout[0] != "m" else a.T.to(dtype).contiguous()
    stored_b = b.to(dtype) if layout[1] != "m" else b.T.to(dtype).contiguous()
    d = torch.full((64, n), NAN)
    built.call("product", name, stored_a, stored_b, d, shift, exchanged)
    return torch.equal(d, (a @ b[shift:].T).float())
