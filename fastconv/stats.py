"""Which kernels ran, and which calls went to torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastconv import _C
from fastconv._library import EMULATED, cuda_problem, ops, torch_calls
from fastconv._plans import kernel_key


def stats() -> dict[str, int]:
    """Calls per kernel since import or :func:`reset_stats`.

    Keys are ``"<op>/<algo>"`` for CPU kernels of this package, for example ``"conv2d/tiled"``, ``"cuda/<op>/<algo>"``
    for CUDA kernels (``"emulated/..."`` under ``FASTCONV_EMULATE=1``), and ``"torch/<function>"`` for calls that were
    handed to torch because no kernel here serves them. Kernels that did not run are left out.
    """
    result: dict[str, int] = {}
    for device, read, _ in _counters():
        counts = zip(_C.kernel_names(device), read().tolist(), strict=True)
        result.update({kernel_key(device, name): count for name, count in counts if count})
    result.update({f"torch/{name}": count for name, count in torch_calls.items() if count})
    return result


def reset_stats() -> None:
    """Sets every counter of :func:`stats` to zero."""
    for _, _, reset in _counters():
        reset()
    torch_calls.clear()


def _counters() -> Iterator[tuple[str, Callable[[], Any], Callable[[], Any]]]:
    """(device, read, reset) for each library that is loaded."""
    cpu = torch.ops.fastconv
    yield "cpu", cpu.kernel_counts, cpu.reset_kernel_counts
    if EMULATED or cuda_problem is None:
        yield "cuda", ops.cuda_kernel_counts, ops.reset_cuda_kernel_counts
