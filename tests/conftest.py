"""What all tests share: threads, seeds, poisoned memory, and proof of which kernels ran."""

from __future__ import annotations

import ctypes
import os
import sys

# Two test processes on two cores must not spin against each other while their thread pools wait.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# torch is the yardstick here, and oneDNN's AVX512-BF16 kernels are none: the weight gradient of 1x1 convolutions frees
# a pointer that was never set (an abort where fresh memory is not zero), depthwise ones lose a NaN at some places.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_VNNI")

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from reference import kernel_counts

import fastconv
from fastconv.stats import reset_stats

M_PERTURB = -6  # glibc's mallopt: fill every block from malloc with a byte
PERTURB_BYTE = 0x80  # blocks are filled with its complement: 0x7f7f... is 3.4e38 as float32, 1.4e306 as float64

try:
    from hypothesis import settings
except ImportError:  # the sanitized run needs no hypothesis
    pass
else:
    # The same problems in every run: a failure is the change's, not the dice's. FASTCONV_EXAMPLES=20000 digs deeper.
    settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
    settings.load_profile("fixed")


def pytest_configure(config: pytest.Config) -> None:
    # More than one, so that every kernel's work is split; few, so that test processes beside each other stay quick.
    torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    reset_stats()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that a kernel is given holds NaN (torch.empty: outputs) or huge numbers (malloc: workspaces)."""
    before = torch.are_deterministic_algorithms_enabled()
    filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    perturb(PERTURB_BYTE)
    yield
    perturb(0)
    torch.utils.deterministic.fill_uninitialized_memory = filling
    torch.use_deterministic_algorithms(before)


def perturb(byte: int) -> bool:
    """Switches glibc's filling of malloc; False where the C library has no such switch."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and mallopt(M_PERTURB, byte) == 1


Ran = Callable[..., AbstractContextManager[None]]


@pytest.fixture
def ran() -> Ran:
    """``with ran("conv2d", "conv2d_weight_grad/tiled"):`` fails unless these kernels ran and nothing went to torch."""

    @contextmanager
    def check(*kernels: str, torch_calls: int = 0) -> Iterator[None]:
        reset_stats()
        yield
        counts = kernel_counts()
        handed_over = {name: count for name, count in counts.items() if name.startswith("torch/")}
        assert sum(handed_over.values()) == torch_calls, f"went to torch: {handed_over}"
        for kernel in kernels:
            hit = [name for name in counts if name == kernel or name.split("/")[0] == kernel]
            assert hit, f"{kernel} did not run; what ran: {counts}"

    return check


@pytest.fixture(params=[torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=[torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def memory_format(request: pytest.FixtureRequest) -> torch.memory_format:
    return request.param


def pytest_report_header() -> str:
    return (
        f"fastconv from {os.path.dirname(fastconv.__file__ or '')}, torch {torch.__version__}, "
        f"instruction set {fastconv._C.active_isa()}, {torch.get_num_threads()} threads"
    )
