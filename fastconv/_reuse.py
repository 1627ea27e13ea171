"""Memory for large results of a model's layers, used again as soon as nobody holds the result.

The allocator gives blocks of tens of megabytes back to the system and gets fresh pages for the next, which the kernel
must map and clear: at batch 16 that is up to a third of a network's time. What is free is told by the storage's own
count of holders, so that views, saved activations and results that were returned stay as they are.
"""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SMALLEST = 1 << 22  # bytes; below, the allocator keeps its blocks, and asking here would cost more than it saves
KEPT = 256  # requests, several passes of a model; a block that nobody wanted for longer is given back
_holders = getattr(torch._C, "_storage_Use_Count", None)


@dataclass
class _Block:
    """``keeper`` holds the memory; ``alone`` is how its storage is held when nobody else does; ``wanted`` is the number
    of the last request that got it."""

    keeper: Tensor
    alone: tuple[int, int]
    size: int
    wanted: int

    def is_free(self) -> bool:
        return _held(self.keeper) == self.alone

    def is_lent(self) -> bool:
        """True if it does not behave as fresh memory any more: another process may read it (``share_memory_``, a result
        put into a queue), or it cannot be resized (``numpy()``)."""
        storage = self.keeper.untyped_storage()
        return storage.is_shared() or not storage.resizable()


def _held(tensor: Tensor) -> tuple[int, int]:
    """References to the storage: in C++, where its object in Python counts as one, and to that object."""
    assert _holders is not None
    storage = tensor.untyped_storage()
    return _holders(storage._cdata), sys.getrefcount(storage)


class Memory:
    """Blocks of one model. A copy, or a model that was loaded, starts without any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks: list[_Block] = []
        self._requests = 0

    def __reduce__(self) -> Any:
        return Memory, ()

    def empty(self, like: Tensor, shape: tuple[int, int, int, int], channels_last: bool) -> Tensor | None:
        """An uninitialised dense tensor on the CPU, or None if it is too small to be worth it."""
        n, c, h, w = shape
        size = n * c * h * w * like.element_size()
        if size < SMALLEST or _holders is None or not like.is_cpu:
            return None
        strides = (c * h * w, 1, w * c, c) if channels_last else (c * h * w, h * w, w, 1)
        result = torch.empty(0, dtype=like.dtype)
        with self._lock:  # until the result holds it, a block looks free to other threads
            return result.set_(self._block(size), 0, shape, strides)

    def _block(self, size: int) -> torch.UntypedStorage:
        self._requests += 1
        self._blocks = [block for block in self._blocks if not block.is_lent()]
        free = [block for block in self._blocks if block.is_free()]
        # Only a block of this very size: a result's storage is copied and saved as a whole.
        fitting = next((block for block in free if block.size == size), None)
        # What is too small now was for smaller images or batches; what is too large may be wanted again, for a while.
        dropped = {
            id(block)
            for block in free
            if block is not fitting
            and ((fitting is None and block.size < size) or self._requests - block.wanted > KEPT)
        }
        self._blocks = [block for block in self._blocks if id(block) not in dropped]
        if fitting is None:
            keeper = torch.empty(size, dtype=torch.uint8)
            fitting = _Block(keeper, _held(keeper), size, 0)
            self._blocks.append(fitting)
        fitting.wanted = self._requests
        return fitting.keeper.untyped_storage()

    def bytes(self) -> int:
        """Of all blocks, in use or not."""
        return sum(block.size for block in self._blocks)
