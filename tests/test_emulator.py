"""The emulator of CUDA kernels (csrc/emulator): threads, warps, blocks, grids; races; limits.

The kernels are in emulator_*.cu. Planted bugs are chosen by a kernel parameter; each must be caught as the tables say.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import emulator_library as emulator
import pytest
import torch
from emulator_kernels import (
    ERRORS,
    MMA,
    NAN,
    PIPELINE,
    SIMT,
    WGMMA,
    code,
    integers,
    library,
    run_grid_sum,
    run_mma,
    run_neighbour,
    run_transpose,
    run_warp_row,
)
from emulator_library import Library, PoolProblem, Timing

# ---------------------------------------------------------------- elements


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 7), (2, 16, 31, 33)])
def test_vector_access(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = torch.full_like(x, NAN)
    library().call("scale", "vector", PoolProblem.of(x, (1, 1), (1, 1)), x, y, 1.5)
    assert torch.equal(y, (x.float() * 1.5).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_conversion_rounds_as_torch(dtype: torch.dtype) -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()  # every value
    ties = patterns + 0.5 * (patterns - patterns.nextafter(torch.tensor(0.0)).to(dtype).float())
    spread = torch.randn(50_000, generator=torch.Generator().manual_seed(2)) * 10 ** torch.linspace(-10, 6, 50_000)
    special = torch.tensor([65519.0, 65520.0, 3.4e38, 2.0**-25, 2.0**-24 * 1.5, 1e-45, -0.0, float("inf"), NAN])
    given = torch.cat([patterns, ties, spread, special])
    rounded, back = torch.empty_like(given, dtype=dtype), torch.empty_like(given)
    library().call("convert", "float", code(dtype), given, rounded, back, given.numel())
    torch.testing.assert_close(rounded, given.to(dtype), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(back, given.to(dtype).float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("divisor", [1, 2, 3, 7, 10, 56, 112, 641, 2**16 - 1, 2**16, 2**30 + 1, 2**31 - 1])
def test_fast_divide_is_exact(divisor: int) -> None:
    near = [m * divisor + d for m in (0, 1, 2, 1000, (2**31 - 1) // divisor) for d in (-1, 0, 1)]
    values = [v for v in near if 0 <= v < 2**31] + [2**31 - 1, 2**31 - 2, 123456789]
    given = torch.tensor(values)
    quotients, rests = torch.empty_like(given), torch.empty_like(given)
    library().call("divide", "fast", given, quotients, rests, divisor, len(values))
    assert quotients.tolist() == [v // divisor for v in values]
    assert rests.tolist() == [v % divisor for v in values]


def test_fast_divide_refuses_what_it_cannot() -> None:
    one = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="FastDivide by 0, expected 1 to 2147483647"):
        library().call("divide", "fast", one, one, one, 0, 1)


# ---------------------------------------------------------------- blocks and warps


def test_identity_in_three_dimensions() -> None:
    out = torch.full((12 * 30,), -1, dtype=torch.int32)
    library().call("identity", "3d", out)
    assert out.tolist() == [1000 * block + thread for block in range(12) for thread in range(30)]


@pytest.mark.parametrize("kind", ["plain", "checked", "ucontext"])
def test_block_sum(kind: str) -> None:
    x = integers(5, 1000).float()
    sums = torch.full((5,), NAN)
    library(kind).call("sum", "block", x, sums, 5, 1000)
    assert torch.equal(sums, x.sum(1))


def test_shuffles_votes_and_intrinsics() -> None:
    x = integers(32, low=0, high=100).to(torch.int32)
    out = torch.full((32, 12), -1, dtype=torch.int32)
    library().call("warp", "shuffles", x, out)
    v = x.tolist()
    ballot = sum(1 << lane for lane in range(32) if v[lane] % 3 == 0)
    for lane, row in enumerate(out.tolist()):
        assert row[0] == v[5]
        assert row[1] == v[lane // 8 * 8 + 3]
        assert row[2] == v[lane - 2 if lane >= 2 else lane]
        assert row[3] == v[lane + 4 if lane % 16 + 4 < 16 else lane]
        assert row[4] == v[lane ^ 1]
        assert row[5] & 0xFFFFFFFF == ballot
        assert row[6] == (7 in v)
        assert row[7] == 1
        assert row[8] == (v[lane ^ 7] if lane < 8 else 0)
        bits = bin(v[lane])[2:]
        lowest = (v[lane] & -v[lane]).bit_length()
        assert row[9] == bits.count("1") + 32 - v[lane].bit_length() + lowest
        first = 0x03020100 + lane
        assert row[10] == (first >> 16 & 255) << 24 | 6 << 16 | (first >> 8 & 255) << 8 | 5
        assert row[11] == ((v[lane] << 28) % 2**32) * 48 >> 32


def test_votes_of_a_block() -> None:
    x = integers(64, low=0, high=100).to(torch.int32)
    out = torch.full((64,), -1, dtype=torch.int32)
    library().call("vote", "block", x, out)
    want = 10000 * int((x == 3).any()) + 1000 + int((x % 2).sum())
    assert out.tolist() == [want] * 64


@pytest.mark.parametrize("os_threads", [1, 4])
def test_atomics(os_threads: int) -> None:
    x = integers(3000, low=0, high=1000).to(torch.int32)
    integer = torch.tensor([0, -1, 10**6, 0, -1], dtype=torch.int32)
    total, wide = torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    library(os_threads=os_threads).call("atomic", "global", x, integer, total, wide, 3000)
    assert integer[:3].tolist() == [int(x.sum()), int(x.max()), int(x.min())]
    assert integer[3] == functools.reduce(lambda a, b: a | b, (1 << value % 16 for value in x.tolist()))
    assert 0 <= integer[4] < 3000
    assert total.item() == x.sum().item()
    assert wide.item() == 3000 * 2**33


def test_a_kernel_that_never_waits_needs_no_switches() -> None:
    built = library()
    x = torch.ones(1, 64, 64, 64)
    before = built.statistics()["switches"]
    built.call("scale", "vector", PoolProblem.of(x, (1, 1), (1, 1)), x, torch.empty_like(x), 2.0)
    blocks = 64**3 // (256 * 4)
    assert built.statistics()["switches"] - before == blocks  # one fiber runs all 256 threads of a block


def test_polling_and_flags_in_shared_memory() -> None:
    for kind in ("plain", "checked"):
        out = torch.zeros(1, dtype=torch.int32)
        library(kind).call("handover", "flag", out)
        assert out.item() == 42


# ---------------------------------------------------------------- planted bugs


SIMT_BUGS = [
    # which, bug, kind of library, the error's text; None: a wrong result
    (run_transpose, 1, "plain", None),  # no barrier
    (run_transpose, 1, "checked", "race on shared address"),
    (run_transpose, 3, "plain", r"deadlock: nothing can run\n  named barrier 1 at emulator_simt.cu:"),
    (run_transpose, 4, "checked", "race on global address"),  # two threads write one element, with equal values
    (run_warp_row, 1, "plain", None),  # no __syncwarp
    (run_warp_row, 1, "checked", "race on shared address"),
    (run_neighbour, 1, "checked", "a block of another cluster"),  # reads what another block writes
    (run_neighbour, 2, "checked", "race on global address"),  # all blocks write one element
    (run_grid_sum, 1, "checked", "race on global address"),  # a counter without release
    (run_grid_sum, 2, "checked", "race on global address"),  # no wait
    (run_grid_sum, 3, "plain", r"deadlock: nothing can run\n  polling at emulator_simt.cu:"),  # not cooperative
    (run_mma, 1, "plain", "a thread exits with 16 cp.async that it has not waited for"),
    (run_mma, 2, "plain", None),  # no barrier after cp_async_wait_group
    (run_mma, 2, "checked", "race on shared address"),
    (run_mma, 3, "checked", "race on shared address"),  # a slot is filled before all have read it
    (run_mma, 4, "plain", None),  # wrong swizzle
    (run_mma, 5, "plain", "cp.async that it has not waited for"),
    (run_mma, 5, "checked", "race on shared address"),
    (run_mma, 6, "plain", "ldmatrix: shared address .* is not aligned to 16 bytes"),
    (run_mma, 7, "plain", "the lanes of a warp disagree"),
    (run_mma, 8, "plain", "a thread exits with 1 cp.async"),
]


@pytest.mark.parametrize("kind", ["plain", "checked", "ucontext"])
@pytest.mark.parametrize("run", [run_transpose, run_warp_row, run_neighbour, run_grid_sum, run_mma])
def test_right_kernels_pass(run: Callable[[Library, int], bool], kind: str) -> None:
    for timing, seed in ((Timing.lazy, 1), (Timing.eager, 2), (Timing.random, 3), (Timing.lazy, 0)):
        assert run(library(kind, timing=timing, seed=seed, sm_count=3), 0)


@pytest.mark.parametrize(("run", "bug", "kind", "error"), SIMT_BUGS)
def test_planted_bugs_are_caught(run: Callable[[Library, int], bool], bug: int, kind: str, error: str | None) -> None:
    built = library(kind, sm_count=3)
    if error is None:
        assert not run(built, bug)
    else:
        with pytest.raises(RuntimeError, match=error):
            run(built, bug)


def test_an_error_names_kernel_line_and_both_sides() -> None:
    with pytest.raises(RuntimeError) as raised:
        run_mma(library("checked"), 3)
    text = str(raised.value)
    source = (Path(__file__).parent / "emulator_mma.cu").read_text().splitlines()
    copy = next(i for i, line in enumerate(source, 1) if "cp_async_cg_16(slot + chunk" in line)
    assert f"emulated kernel mma_kernel<T>: emulator_mma.cu:{copy}: race" in text
    assert "ldmatrix at emulator_mma.cu:" in text
    assert "warp" in text


@pytest.mark.skipif(shutil.which("addr2line") is None, reason="without binutils a plain access has no line")
def test_a_race_of_plain_accesses_names_their_lines() -> None:
    site = r"a (load|store) at emulator_simt.cu:\d+"
    with pytest.raises(RuntimeError, match=rf"{site} .* \({site}"):
        run_transpose(library("checked"), 1)


def test_an_error_does_not_poison_the_next_launch() -> None:
    built = library()
    for _ in range(3):
        with pytest.raises(RuntimeError, match="deadlock"):
            run_transpose(built, 3)
        assert run_transpose(built, 0)


# ---------------------------------------------------------------- limits


def test_launch_limits() -> None:
    x = torch.zeros(1, 1, 1, 1)
    problem = PoolProblem.of(x, (1, 1), (1, 1))
    built = library()
    built.call("budget", "shared", problem, x, 227 * 1024, 1)
    for shared_bytes, threads in ((227 * 1024 + 1, 1), (0, 1025), (0, 0)):
        with pytest.raises(RuntimeError, match=r"CUDA kernel scale_kernel<float> did not start: invalid"):
            built.call("budget", "shared", problem, x, shared_bytes, threads)
    with pytest.raises(RuntimeError, match="50176 bytes of static shared memory, expected at most 49152"):
        built.call("budget", "shared", problem, torch.zeros(32), -1, 0)


def test_a_cooperative_grid_must_fit() -> None:
    x, parts, out = torch.zeros(400), torch.zeros(200), torch.zeros(200)
    with pytest.raises(RuntimeError, match="too many blocks in cooperative launch"):
        library(sm_count=1).call("grid_sum", "cooperative", x, parts, torch.zeros(1, dtype=torch.int32), out, 200, 0)


def test_registers_are_a_budget() -> None:
    out = torch.zeros(512, dtype=torch.int32)
    library().call("registers", "setmaxnreg", out, 0)
    assert out.sum() == 512
    with pytest.raises(RuntimeError, match="deadlock: nothing can run\n  setmaxnreg.inc to 168"):
        library().call("registers", "setmaxnreg", out, 1)


def test_a_launcher_is_called_with_what_it_takes() -> None:
    built = library()
    with pytest.raises(KeyError, match="no launcher is called"):
        built.call("sum", "unknown")
    with pytest.raises(TypeError, match="takes 4 arguments"):
        built.call("sum", "block", torch.zeros(1))
    with pytest.raises(TypeError, match="expected a tensor"):
        built.call("sum", "block", 1, torch.zeros(1), 1, 1)


# ---------------------------------------------------------------- torch


@pytest.mark.slow
def test_one_host_function_serves_the_emulator_and_the_gpu() -> None:
    torch.ops.load_library(emulator.build_ops([SIMT, "tests/emulator_op.cpp", "csrc/common/checks.cpp"]))
    x = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0)).half()
    for given in (x, x.contiguous(memory_format=torch.channels_last)):
        y = torch.ops.fastconv_emulated.scale(given, 3.0)
        assert torch.equal(y, (given.float() * 3).half())
        assert y.stride() == given.stride()
    with pytest.raises(RuntimeError, match="input has shape \\(3, 5, 7\\), expected 4 dimensions"):
        torch.ops.fastconv_emulated.scale(x[0], 3.0)
    with pytest.raises(RuntimeError, match="scale: got float64, expected float32"):
        torch.ops.fastconv_emulated.scale(x.double(), 3.0)


# ---------------------------------------------------------------- other compilers


@pytest.mark.slow
def test_under_address_sanitizer() -> None:
    """The same kernels, right and with an access past the end of shared memory, in a process of their own."""
    built = emulator.build_file((SIMT, MMA, PIPELINE), "address")
    asan = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout
    script = (
        "import sys, emulator_kernels as t, emulator_library as e\n"
        f"built = e.Library(e.Path({str(built)!r}))\n"
        "built.configure(sm_count=3)\n"
        "t.run_transpose(built, 2) if sys.argv[1] == 'bug' else None\n"
        "assert all(run(built, 0) for run in (t.run_transpose, t.run_warp_row, t.run_grid_sum, t.run_mma))\n"
        "assert t.pipeline(built, 'single', t.PIPELINE_PROBLEMS[1], 0)\n"
    )
    environment = os.environ | {
        "LD_PRELOAD": asan.strip(),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": str(Path(__file__).parent),
    }
    runs = {
        which: subprocess.run(
            [sys.executable, "-c", script, which], env=environment, capture_output=True, text=True, timeout=300
        )
        for which in ("right", "bug")
    }
    assert runs["right"].returncode == 0, runs["right"].stderr[-3000:]
    assert runs["bug"].returncode != 0
    assert "use-after-poison" in runs["bug"].stderr
    assert "transpose_kernel" in runs["bug"].stderr


NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="no nvcc on this machine")
@pytest.mark.parametrize("source", [SIMT, MMA, PIPELINE, WGMMA, ERRORS])
def test_nvcc_accepts_the_same_source(source: str, tmp_path: Path) -> None:
    command = [NVCC, "-std=c++20", "--expt-relaxed-constexpr", "-gencode=arch=compute_90a,code=sm_90a", "-Icsrc", "-c"]
    result = subprocess.run(
        [*map(str, command), source, "-o", str(tmp_path / "kernel.o")],
        cwd=emulator.ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
