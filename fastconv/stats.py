"""Which kernels ran, and which calls went to torch."""

from __future__ import annotations

from fastconv import _C
from fastconv._library import ops, torch_calls


def stats() -> dict[str, int]:
    """Calls per kernel since import or :func:`reset_stats`.

    Keys are ``"<op>/<algo>"`` for kernels of this package, for example ``"conv2d/tiled"``, and ``"torch/<function>"``
    for calls that were handed to torch because no kernel here serves them. Kernels that did not run are left out.
    """
    counts = zip(_C.kernel_names(), ops.kernel_counts().tolist(), strict=True)
    result = {name: count for name, count in counts if count}
    result.update({f"torch/{name}": count for name, count in torch_calls.items() if count})
    return result


def reset_stats() -> None:
    """Sets every counter of :func:`stats` to zero."""
    ops.reset_kernel_counts()
    torch_calls.clear()
