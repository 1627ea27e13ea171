"""Whether float32 convolutions may be rounded to TF32 on CUDA: torch's settings decide, and only Python reads them.

``torch.backends.cudnn.allow_tf32`` and the ``fp32_precision`` of ``torch.backends.cudnn.conv``, ``.cudnn`` and
``torch.backends`` are one setting to torch, which knows what overrides what. ``torch.compile`` cannot trace the
question: ``algo="implicit_gemm_tf32"`` breaks its graph.
"""

from __future__ import annotations

import torch

_ROUNDED = "implicit_gemm_tf32"
# Its sums are as good as float32's, but an infinite number becomes NaN (csrc/conv2d/README_cuda.md): by name alone.
_BY_NAME = frozenset({"implicit_gemm_3xtf32"})


def tf32_is_allowed() -> bool:
    precision: str = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return precision == "tf32"


def precision_refusal(algo: str | None) -> str | None:
    """Why torch's settings forbid the kernel; None if they do not."""
    if algo != _ROUNDED or tf32_is_allowed():
        return None
    return (
        "it rounds float32 to TF32, which torch's settings forbid; set torch.backends.cudnn.conv.fp32_precision = "
        '"tf32", or name implicit_gemm_3xtf32'
    )


def may_be_chosen(algo: str) -> bool:
    """False for kernels that must not be taken for being fast."""
    return algo not in _BY_NAME and precision_refusal(algo) is None
