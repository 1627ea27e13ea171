"""What the project wants of its speed, beside what a run found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from benchmarks import layers
from benchmarks.measure import Ceilings
from benchmarks.network_report import (
    CONVERTED,
    CONVERTED_GOAL,
    EVAL,
    FUSED,
    FUSED_GOAL,
    MEMORY_GOAL,
    TRAINING,
    TRAINING_GOAL,
    MemoryRow,
    NetworkRow,
)
from benchmarks.peers import EAGER
from benchmarks.report import DIRECTIONS, LAYOUTS, Case, Row, Table, geometric_mean

HEADINGS = ("what", "of", "goal", "geometric mean", "lowest", "at", "verdict")
CONVOLUTIONS = {str(layer): layer for layer in layers.distinct(layers.Conv)}
WIDE, PEAK_CHANNELS = 64, 128


@dataclass(frozen=True)
class Found:
    """One ratio, theirs over ours, and what it is of."""

    ratio: float
    at: str


def table(
    rows: Sequence[Row], networks: Sequence[NetworkRow], memory: Sequence[MemoryRow], ceilings: Ceilings | None
) -> Table:
    nchw, nhwc = LAYOUTS
    lines = [
        _line("convolutions, batch 1, NCHW", 2.5, 1.0, _forward(rows, nchw, lambda _: True)),
        _line("convolutions, batch 1, channels_last", 1.5, 0.95, _forward(rows, nhwc, lambda _: True)),
        _line("3x3 stride 1, C and K >= 64, batch 1, channels_last", 2.0, None, _forward(rows, nhwc, _is_wide_3x3)),
        _line("forward and backward, batch 8, NCHW", 1.8, None, _whole_passes(rows, 8, nchw)),
        _line("pools, batch 1, NCHW", 6, None, _pools(rows, nchw)),
        _line("pools, batch 1, channels_last", 1.3, None, _pools(rows, nhwc)),
        _line("networks, best of three / fused", None, FUSED_GOAL, _networks(networks, EVAL, None, FUSED)),
        _line("networks, eager NCHW / converted", None, CONVERTED_GOAL, _networks(networks, EVAL, EAGER, CONVERTED)),
        _line("training step, eager NCHW / ours", None, TRAINING_GOAL, _networks(networks, TRAINING, EAGER, CONVERTED)),
        *(_peak_line(rows, ("conv2d", "depthwise"), layout, ceilings) for layout in LAYOUTS),
        _peak_line(rows, ("kept",), nhwc, ceilings),
        _line(
            *("eval forward, torch's peak memory / ours fused", None, 1 / MEMORY_GOAL),
            [Found(1 / row.ratio(FUSED), f"{row.network}, batch {row.batch}") for row in memory],
        ),
    ]
    title = "Goals: others' time over ours (above 1: ours is faster), geometric means and the lowest"
    return title, HEADINGS, [line for line in lines if line is not None]


def _line(what: str, mean_goal: float | None, least_goal: float | None, found: list[Found]) -> tuple[str, ...] | None:
    """Goals for the geometric mean and for the lowest; None where nothing was measured."""
    if not found:
        return None
    mean, least = geometric_mean(one.ratio for one in found), min(found, key=lambda one: one.ratio)
    met = (mean_goal is None or mean >= mean_goal) and (least_goal is None or least.ratio >= least_goal)
    parts = [f"mean >= {mean_goal:g}"] if mean_goal is not None else []
    parts += [f"each >= {least_goal:g}"] if least_goal is not None else []
    verdict = "met" if met else "missed"
    return what, str(len(found)), ", ".join(parts), f"{mean:.2f}", f"{least.ratio:.2f}", least.at, verdict


def _convolution_rows(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row.case.op in ("conv2d", "depthwise")]


def _is_wide_3x3(layer: layers.Conv) -> bool:
    return layer.family == "3x3" and layer.channels >= WIDE and layer.filters >= WIDE


def _forward(rows: Sequence[Row], layout: str, wanted: Callable[[layers.Conv], bool]) -> list[Found]:
    return [
        Found(1 / row.ratio, row.case.layer)
        for row in _convolution_rows(rows)
        if (row.case.direction, row.case.layout, row.case.batch) == ("forward", layout, 1)
        and wanted(CONVOLUTIONS[row.case.layer])
    ]


def _whole_passes(rows: Sequence[Row], batch: int, layout: str) -> list[Found]:
    """Sums over a layer's three passes; layers of which one was not measured are left out."""
    passes: dict[str, dict[str, Row]] = {}
    for row in _convolution_rows(rows):
        if (row.case.batch, row.case.layout) == (batch, layout):
            passes.setdefault(row.case.layer, {})[row.case.direction] = row
    return [
        Found(sum(row.torch_seconds for row in found.values()) / sum(row.our_seconds for row in found.values()), layer)
        for layer, found in passes.items()
        if set(found) == set(DIRECTIONS)
    ]


def _pools(rows: Sequence[Row], layout: str) -> list[Found]:
    wanted = ("pool", "forward", layout, 1)
    return [Found(1 / row.ratio, row.case.layer) for row in rows if _key(row.case) == wanted]


def _key(case: Case) -> tuple[str, str, str, int]:
    return case.op, case.direction, case.layout, case.batch


def _networks(rows: Sequence[NetworkRow], what: str, theirs: str | None, ours: str) -> list[Found]:
    found = []
    for row in rows:
        ratio = row.fused_ratio if theirs is None else row.ratio(theirs, ours)
        if row.what == what and ratio is not None:
            found.append(Found(ratio, f"{row.network}, batch {row.batch}"))
    return found


def _peak_line(
    rows: Sequence[Row], ops: tuple[str, ...], layout: str, ceilings: Ceilings | None
) -> tuple[str, ...] | None:
    if ceilings is None or ceilings.fma_per_second is None:
        return None
    found = []
    for row in rows:
        case = row.case
        if case.op not in ops or (case.direction, case.layout, case.batch) != ("forward", layout, 1):
            continue
        layer = CONVOLUTIONS[case.layer]
        fits = layer.family in ("3x3", "1x1") and min(layer.channels, layer.filters) >= PEAK_CHANNELS
        if fits and "winograd" not in row.kernel:
            found.append(Found(case.flops / row.our_seconds / ceilings.fma_per_second, case.layer))
    kept = ", weights kept" if ops == ("kept",) else ""
    return _line(
        f"share of the FMA peak, direct 3x3 and 1x1, C and K >= 128, batch 1, {layout}{kept}", None, 0.85, found
    )
