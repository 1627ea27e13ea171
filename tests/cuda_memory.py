"""Memory for emulated CUDA kernels: every tensor on 64 bytes or a stated number of elements past them, between guards.

Guards and fresh outputs are filled with the byte 0xff: NaN in every floating-point type, 255 as an offset, -1 as an
index, none of which a right kernel writes.

Guards do not tell who reads them and drops the value. With ``FASTCONV_FENCES=1`` in the environment, tensors lie
between pages that may not be touched, their first or their last byte ``shift`` bytes from one: a read outside ends the
process, as it may on a GPU. ``cuda_fuzz.py`` runs with it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random

import torch
from emulator_library import Argument, Library
from torch import Tensor

GUARD_BYTES = 128
POISON = 0xFF


FENCES = os.environ.get("FASTCONV_FENCES") == "1"
_sides = random.Random(0)


def _fenced(size: int, shift: int) -> tuple[Tensor, int]:
    page = mmap.PAGESIZE
    inside = max(1, -(-(size + shift) // page)) * page
    pages = mmap.mmap(-1, inside + 2 * page)
    memory = torch.frombuffer(pages, dtype=torch.uint8, count=inside, offset=page)  # keeps `pages`
    for fence in (memory.data_ptr() - page, memory.data_ptr() + inside):
        if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(fence), page, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    return memory.fill_(POISON), _sides.choice([shift, inside - size - shift])


def room(size: int, shift: int) -> tuple[Tensor, int]:
    """Poisoned bytes and where in them a tensor of ``size`` starts, ``shift`` bytes past a multiple of 64."""
    if FENCES:
        return _fenced(size, shift)
    memory = torch.full((size + shift + 2 * GUARD_BYTES + 64,), POISON, dtype=torch.uint8)
    return memory, GUARD_BYTES + -(memory.data_ptr() + GUARD_BYTES) % 64 + shift


def fresh(shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format, shift: int = 0) -> Tensor:
    """A dense poisoned tensor that starts ``shift`` elements past a multiple of 64 bytes."""
    strides = torch.empty(shape, device="meta").contiguous(memory_format=memory_format).stride()
    bytes_each = torch.empty(0, dtype=dtype).element_size()
    count = 1
    for size in shape:
        count *= size
    memory, start = room(count * bytes_each, shift * bytes_each)
    typed = torch.tensor([], dtype=dtype)
    assert start % bytes_each == 0, "a tensor's place counts in elements"
    return typed.set_(memory.untyped_storage(), start // bytes_each, shape, strides)


def placed(values: Tensor, memory_format: torch.memory_format, shift: int = 0) -> Tensor:
    return fresh(tuple(values.shape), values.dtype, memory_format, shift).copy_(values)


def check_guards(*tensors: Tensor) -> None:
    for tensor in tensors:
        every = torch.tensor([], dtype=torch.uint8).set_(tensor.untyped_storage())
        start = tensor.storage_offset() * tensor.element_size()
        end = start + tensor.numel() * tensor.element_size()
        assert (every[:start] == POISON).all(), "the kernel wrote before a tensor"
        assert (every[end:] == POISON).all(), "the kernel wrote past a tensor"


def same(actual: Tensor, expected: Tensor, what: object) -> None:
    """Equal, and NaN where NaN is expected."""
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype), what
    if actual.is_floating_point():
        assert torch.equal(actual.isnan(), expected.isnan()), what
        actual, expected = actual.nan_to_num(0.5), expected.nan_to_num(0.5)
    wrong = actual != expected
    assert not wrong.any(), (
        f"{what}: {int(wrong.sum())} of {wrong.numel()} differ, first at {wrong.nonzero()[0].tolist()}"
    )


def explained(library: Library, op: str, *arguments: Argument, algo: str = "windows") -> str:
    """What an explaining launcher says: the kernel and the reason."""
    text = torch.zeros(200, dtype=torch.uint8)
    library.call(op, algo, *arguments, text, text.numel())
    return bytes(text.tolist()).split(b"\0")[0].decode()


DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FORMATS = [torch.contiguous_format, torch.channels_last]


def whole_numbers(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, largest: int = 3) -> Tensor:
    """Sums of a few hundred of them are exact in every type."""
    return torch.randint(-largest, largest + 1, shape, generator=generator).to(dtype)


def generators(seed: int) -> tuple[random.Random, torch.Generator]:
    return random.Random(seed), torch.Generator().manual_seed(seed)
