"""Clocks, two calls measured in turns, and the machine's ceilings."""

from __future__ import annotations

import functools
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

import fastconv
from benchmarks import fma_peak
from benchmarks.report import Case, Row
from fastconv.ops.conv2d import conv2d

Call = Callable[[], Any]
MIN_ROUNDS, MAX_ROUNDS = 5, 500
PILOT_ROUNDS = 3
PAUSE_SECONDS = 0.02
LONG_SECONDS = 0.3  # beside a call that takes as long, what spinning threads and cold caches cost is nothing


class Clock(Protocol):
    def seconds(self, call: Call) -> float: ...


class CpuClock:
    def seconds(self, call: Call) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start


class CudaClock:
    """Device time between two events on the current stream, with nothing of use in the L2 cache.

    The buffer that is written before each call takes longer than the call's launch, so launching is not measured.
    """

    def __init__(self, device: torch.device) -> None:
        cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self.flush = torch.empty(max(4 * cache_bytes, 1 << 28), dtype=torch.int8, device=device)

    def seconds(self, call: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3


@functools.cache
def clock_of(device: torch.device) -> Clock:
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def replayed(call: Call) -> Call:
    """The call as a CUDA graph: replaying it costs the same few microseconds of launch whatever the call does first."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # cuDNN's search and first allocations cannot be captured
        for _ in range(PILOT_ROUNDS):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


@dataclass
class Turns:
    """Times of two calls that took turns, in seconds; pair by pair, so that both met the same machine."""

    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Ours over theirs, of the medians: below 1 we are the faster."""
        return statistics.median(self.ours) / statistics.median(self.theirs)

    @property
    def spread(self) -> tuple[float, float]:
        """The quartiles of the pairs' own ratios."""
        ratios = [ours / theirs for ours, theirs in zip(self.ours, self.theirs, strict=True)]
        if len(ratios) < 2:
            return ratios[0], ratios[0]
        first, _, third = statistics.quantiles(ratios, n=4, method="inclusive")
        return first, third


def take_turns(
    benchmark: Any,
    clock: Clock,
    ours: Call,
    theirs: Call,
    budget_seconds: float,
    *,
    pilot_rounds: int = PILOT_ROUNDS,
    min_rounds: int = MIN_ROUNDS,
) -> Turns:
    """Runs theirs, ours, theirs, ours, ... under pytest-benchmark, for about ``budget_seconds``.

    pedantic() calls ``setup`` before each round, outside its own times: there the other side takes its turn.
    """
    turns = Turns()
    # Caches, thread pools and cuDNN's search are not what is measured. The least of a few, because one call that a busy
    # machine interrupted would leave a short case with hardly any rounds.
    pair_seconds = min(clock.seconds(ours) + clock.seconds(theirs) for _ in range(pilot_rounds))
    rounds = int(min(MAX_ROUNDS, max(min_rounds, budget_seconds / max(pair_seconds, 1e-9))))

    def their_turn() -> None:
        turns.theirs.append(clock.seconds(theirs))

    def our_turn() -> None:
        turns.ours.append(clock.seconds(ours))

    benchmark.pedantic(our_turn, setup=their_turn, rounds=rounds, iterations=1)
    return turns


def take_rounds(
    benchmark: Any, calls: dict[str, Call], budget_seconds: float, min_rounds: int
) -> dict[str, list[float]]:
    """Times of several calls on the CPU, each in turn in every round; pytest-benchmark times the last one.

    Every call is the second of two, after a pause: thread pools of other runtimes go on spinning for a while after
    their work, on the cores that the next one needs, and leave it cold caches.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    clock = CpuClock()

    def turn(name: str) -> None:
        time.sleep(PAUSE_SECONDS)
        warm = clock.seconds(calls[name])
        long = warm > LONG_SECONDS
        times[name].append(warm if long else clock.seconds(calls[name]))

    def others() -> None:
        for name in names[:-1]:
            turn(name)

    names = list(calls)
    start = time.perf_counter()
    for name in names:
        calls[name]()
        turn(name)
        times[name].clear()
    # Each was called two or three times.
    round_seconds = (time.perf_counter() - start) * 2 / 3
    rounds = int(min(MAX_ROUNDS, max(min_rounds, budget_seconds / round_seconds)))
    benchmark.pedantic(lambda: turn(names[-1]), setup=others, rounds=rounds, iterations=1)
    return times


def kernel_of(call: Call) -> str:
    """Runs the call and says which of our kernels it took."""
    call()  # the first call of a problem may time kernels that will not serve it
    fastconv.reset_stats()
    call()
    ran = (name if name.startswith("torch/") else name.split("/")[-1] for name in fastconv.stats())
    return ", ".join(dict.fromkeys(ran))


@dataclass(frozen=True)
class Ceilings:
    """What the roofline is made of, by proxies: the best rate of some products and convolutions, and ``copy_``'s.

    ``fma_per_second`` are the FLOPs of a loop of multiply-adds in registers, or None where there is no such loop.
    """

    flops_per_second: float
    bytes_per_second: float
    fma_per_second: float | None = None

    def floor_seconds(self, flops: int, moved_bytes: int) -> float:
        return max(flops / self.flops_per_second, moved_bytes / self.bytes_per_second)


def row_of(case: Case, kernel: str, turns: Turns, ceilings: Ceilings, note: str = "") -> Row:
    our_seconds, torch_seconds = statistics.median(turns.ours), statistics.median(turns.theirs)
    floor = ceilings.floor_seconds(case.flops, case.bytes)
    low, high = turns.spread
    return Row(
        case,
        kernel,
        turns.ratio,
        low,
        high,
        floor / our_seconds,
        floor / torch_seconds,
        our_seconds,
        torch_seconds,
        len(turns.ours),
        note,
    )


def measure_ceilings(device: torch.device, dtype: torch.dtype, seconds_each: float) -> Ceilings:
    """On the CPU 16-bit kernels multiply in float32, so there the ceiling is float32's.

    No single call is a safe proxy of the arithmetic: on some processors torch's matrix product reaches half of what its
    convolution does.
    """
    clock = clock_of(device)
    cuda = device.type == "cuda"
    size = 8192 if cuda else 1024
    factor_dtype = dtype if cuda or dtype == torch.float64 else torch.float32
    left, right = (torch.randn(size, size, device=device, dtype=factor_dtype) for _ in range(2))
    product = torch.empty_like(left)
    images, weight = (
        torch.randn(shape, device=device, dtype=factor_dtype) for shape in ((2, 256, 56, 56), (256, 256, 3, 3))
    )
    params: Any = (None, (1, 1), (1, 1, 1, 1), (1, 1), 1)
    convolution_flops = 2 * 2 * 56 * 56 * 256 * 256 * 9
    calls: list[tuple[int, Call]] = [
        (2 * size**3, lambda: torch.mm(left, right, out=product)),
        (convolution_flops, lambda: torch.nn.functional.conv2d(images, weight, padding=1)),
    ]
    if not cuda:
        calls.append((convolution_flops, lambda: conv2d(images, weight, *params, "direct")))
    source = torch.ones(1 << (28 if cuda else 25), device=device)  # larger than any cache
    target = torch.empty_like(source)
    return Ceilings(
        max(flops / _best(clock, call, seconds_each / len(calls)) for flops, call in calls),
        2 * source.numel() * source.element_size() / _best(clock, lambda: target.copy_(source), seconds_each),
        None if cuda else fma_peak.flops_per_second(torch.get_num_threads(), left.element_size(), seconds_each),
    )


def other_load(own_threads: int) -> float:
    """Threads of other processes that want a core, about, over the last minute; NaN where the system does not say."""
    try:
        return max(os.getloadavg()[0] - own_threads, 0)
    except (AttributeError, OSError):
        return math.nan


def _best(clock: Clock, call: Call, budget_seconds: float) -> float:
    call()
    times = []
    end = time.perf_counter() + budget_seconds
    while len(times) < 5 or time.perf_counter() < end:
        times.append(clock.seconds(call))
    return min(times)


def require_agreement(ours: torch.Tensor, theirs: torch.Tensor, terms: int) -> None:
    """Raises AssertionError unless both results of sums of ``terms`` products agree within what rounding explains."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        raise AssertionError(
            f"fastconv gave {tuple(ours.shape)} {ours.dtype}, torch {tuple(theirs.shape)} {theirs.dtype}"
        )
    wide = theirs.double()
    scale = float(wide.square().mean().sqrt())
    error = float((ours.double() - wide).abs().max())
    allowed = 32 * torch.finfo(theirs.dtype).eps * max(terms, 1) ** 0.5 * scale
    if not error <= allowed:  # also where it is NaN
        raise AssertionError(f"fastconv and torch differ by {error:.3g}, rounding explains {allowed:.3g}")
