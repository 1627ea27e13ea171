"""A quick look at every kernel family: each on a small problem, against torch's float64 result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastconv import functional
from fastconv._library import runs_cuda_kernels
from fastconv.ops.conv2d_fused import conv2d_fused
from fastconv.stats import stats

# Of the root mean square of the reference, for sums of up to 200 products in float32.
_TOLERANCE = 32 * torch.finfo(torch.float32).eps * 200**0.5

_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Result:
    name: str
    passed: bool
    detail: str


def run(device: str = "cpu") -> Iterator[Result]:
    """Checks forward and gradients of each operator on ``device``, in both memory formats."""
    torch_functional = torch.nn.functional
    convolutions = _CUDA_CONVOLUTIONS if runs_cuda_kernels(torch.empty(0, device=device)) else _CPU_CONVOLUTIONS
    for name, ours, theirs, shapes in (
        *(
            (f"conv2d {name}", _conv(functional.conv2d, groups, algo=algo), _conv(torch_functional.conv2d, groups), at)
            for name, groups, algo, at in convolutions
        ),
        ("conv2d_fused", _fused, _fused_by_torch, _FUSED),
        ("max_pool2d", _window(functional.max_pool2d), _window(torch_functional.max_pool2d), _PLANES),
        ("avg_pool2d", _window(functional.avg_pool2d), _window(torch_functional.avg_pool2d), _PLANES),
        ("adaptive_avg_pool2d", _adaptive(functional, (2, 3)), _adaptive(torch_functional, (2, 3)), _PLANES),
        ("adaptive_avg_pool2d global", _adaptive(functional, 1), _adaptive(torch_functional, 1), _PLANES),
        ("local_response_norm", _norm(functional), _norm(torch_functional), _PLANES),
    ):
        for layout in _FORMATS:
            yield _check(f"{name} {layout}", ours, theirs, shapes, layout, device)


_DENSE = ((2, 19, 9, 11), (21, 19, 3, 3), (21,))
_GROUPED = ((2, 18, 9, 11), (22, 9, 3, 3), (22,))
_DEPTHWISE = ((2, 18, 9, 11), (36, 1, 3, 3), (36,))
_STEM = ((2, 3, 9, 11), (21, 3, 3, 3), (21,))
_PER_CHANNEL = ((2, 18, 9, 11), (18, 1, 3, 3), (18,))
_PLANES = ((2, 19, 9, 11),)
_FUSED = ((2, 19, 9, 11), (21, 19, 3, 3), (21,), (21,), (2, 21, 9, 11))
_Convolutions = tuple[tuple[str, int, str | None, Any], ...]  # name, groups, algo, shapes
_CPU_CONVOLUTIONS: _Convolutions = (
    ("tiled", 1, "tiled", _DENSE),
    ("naive", 1, "naive", _DENSE),
    ("grouped", 2, None, _GROUPED),
    ("depthwise", 18, None, _DEPTHWISE),
)
_CUDA_CONVOLUTIONS: _Convolutions = (
    ("direct", 1, "direct", _DENSE),
    ("grouped", 2, "direct", _GROUPED),
    ("implicit_gemm_fp32", 1, "implicit_gemm_fp32", _DENSE),
    ("implicit_gemm_fp32 grouped", 2, "implicit_gemm_fp32", _GROUPED),
    ("implicit_gemm_3xtf32", 1, "implicit_gemm_3xtf32", _DENSE),
    ("implicit_gemm_3xtf32 grouped", 2, "implicit_gemm_3xtf32", _GROUPED),
    ("stem", 1, "stem", _STEM),
    ("depthwise", 18, "depthwise", _PER_CHANNEL),
)


def _check(
    name: str, ours: Callable[..., Tensor], theirs: Callable[..., Tensor], shapes: Any, layout: str, device: str
) -> Result:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    before = stats()
    try:
        found = _with_gradients(ours, [_laid_out(x, layout) for x in values])
    except Exception as error:  # whatever is wrong with one kernel, the other checks are still wanted
        return Result(name, False, str(error).splitlines()[0])
    after = stats()
    wanted = _with_gradients(theirs, [_laid_out(x, layout).double() for x in values])
    worst = max(_error(ours_part, part) for ours_part, part in zip(found, wanted, strict=True))
    ran = [key for key, count in after.items() if count > before.get(key, 0)]
    by_torch = [key for key in ran if key.startswith("torch/")]
    passed = worst <= _TOLERANCE and not by_torch and bool(ran)
    detail = f"error {worst:.1e} of {_TOLERANCE:.1e} allowed; {', '.join(ran) or 'no kernel ran'}"
    return Result(name, passed, detail)


def _laid_out(tensor: Tensor, layout: str) -> Tensor:
    return tensor.to(memory_format=_FORMATS[layout]) if tensor.dim() == 4 else tensor


def _with_gradients(function: Callable[..., Tensor], values: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in values]
    output = function(*leaves)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device).reshape(output.shape)
    return [output.detach(), *torch.autograd.grad(output, leaves, weights)]


def _error(found: Tensor, wanted: Tensor) -> float:
    difference = float((found.double() - wanted).abs().max() / wanted.square().mean().sqrt())
    return difference if difference == difference else float("inf")


def _conv(function: Any, groups: int, **options: Any) -> Callable[..., Tensor]:
    return lambda x, w, b: function(x, w, b, stride=2, padding=1, groups=groups, **options)


def _fused(x: Tensor, w: Tensor, scale: Tensor, shift: Tensor, residual: Tensor) -> Tensor:
    return conv2d_fused(x, w, scale, shift, residual, (1, 1), (1, 1, 1, 1), (1, 1), 1, "tanh")


def _fused_by_torch(x: Tensor, w: Tensor, scale: Tensor, shift: Tensor, residual: Tensor) -> Tensor:
    y = torch.nn.functional.conv2d(x, w, padding=1)
    return torch.tanh(y * scale[:, None, None] + shift[:, None, None] + residual)


def _window(function: Any) -> Callable[..., Tensor]:
    return lambda x: function(x, 3, 2, 1)


def _adaptive(module: Any, size: Any) -> Callable[..., Tensor]:
    return lambda x: module.adaptive_avg_pool2d(x, size)


def _norm(module: Any) -> Callable[..., Tensor]:
    return lambda x: module.local_response_norm(x, 5)
