"""Memory in pages of 2 MiB on Linux, for what every call reads from end to end: packed weights and workspaces.

With pages of 4 KiB a network's weights take tens of thousands of entries in tables that hold a few thousand, and what
CPUs fetch ahead ends with the page. Only how memory is mapped changes; where the system refuses, nothing does.
"""

from __future__ import annotations

import ctypes
import sys

from torch import Tensor

PAGE = 2 << 20
_HUGEPAGE, _COLLAPSE = 14, 25  # madvise(2); the second from Linux 6.1 on


def advise_huge_pages(tensor: Tensor) -> None:
    """For memory that nothing was written to so far."""
    _advise(tensor, _HUGEPAGE)


def collapse_into_huge_pages(tensor: Tensor) -> None:
    """For memory that is in use: copied once, by the system, at the same addresses; or later, by an older system."""
    if not _advise(tensor, _COLLAPSE):
        _advise(tensor, _HUGEPAGE)


def _advise(tensor: Tensor, advice: int) -> bool:
    """False if the system refused."""
    if tensor.device.type != "cpu":
        return True
    start = -(-tensor.data_ptr() // PAGE) * PAGE
    length = (tensor.data_ptr() + tensor.nbytes) // PAGE * PAGE - start
    return length <= 0 or _madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), advice) == 0


_madvise = getattr(ctypes.CDLL(None), "madvise", lambda *_: -1) if sys.platform.startswith("linux") else lambda *_: -1
