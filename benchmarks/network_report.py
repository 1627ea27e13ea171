"""Results of whole networks, and their tables: how many times as long the others take, the goal beside it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.peers import CHANNELS_LAST, COMPILERS, EAGER, INDUCTOR
from benchmarks.report import Table

CONVERTED, FUSED, FUSED_LAST = "converted", "fused", "fused, channels_last"
EVAL, TRAINING = "eval", "training step"
FUSED_GOAL, CONVERTED_GOAL, TRAINING_GOAL, MEMORY_GOAL = 1.25, 2.0, 1.5, 1.0


@dataclass(frozen=True)
class NetworkRow:
    """Seconds of each contestant, all called in turns; why others are not there."""

    network: str
    what: str
    batch: int
    times: dict[str, list[float]]
    missing: dict[str, str] = field(default_factory=dict)
    flops: int = 0  # of the convolutions
    fma_per_second: float | None = None  # the processor's peak

    def ratio(self, theirs: str, ours: str) -> float | None:
        """Their time over ours, of the medians: above 1 we are the faster."""
        if theirs not in self.times or ours not in self.times:
            return None
        return statistics.median(self.times[theirs]) / statistics.median(self.times[ours])

    @property
    def best_peer(self) -> str | None:
        present = [name for name in COMPILERS if name in self.times]
        return min(present, key=lambda name: statistics.median(self.times[name]), default=None)

    @property
    def fused_ratio(self) -> float | None:
        return None if self.best_peer is None else self.ratio(self.best_peer, FUSED)

    def peak_share(self, name: str | None) -> float | None:
        """Of the arithmetic that the direct algorithm's FLOPs need: above 1 only for other algorithms."""
        if name is None or not self.fma_per_second or not self.flops:
            return None
        return self.flops / statistics.median(self.times[name]) / self.fma_per_second

    def as_json(self) -> dict[str, Any]:
        ours = CONVERTED if self.what == TRAINING else FUSED
        ratios = {name: round(self.ratio(name, ours) or 0, 3) for name in self.times}
        share = self.peak_share(ours)
        return {
            "network": self.network,
            "what": self.what,
            "batch": self.batch,
            "ours": ours,
            **({} if share is None else {"share of FMA peak": round(share, 3)}),
            "theirs over ours": ratios,
            "missing": self.missing,
            "rounds": min(map(len, self.times.values())),
        }


@dataclass(frozen=True)
class MemoryRow:
    network: str
    batch: int
    bytes: dict[str, int]  # "torch", CONVERTED, FUSED

    def ratio(self, ours: str) -> float:
        return self.bytes[ours] / self.bytes["torch"]

    def as_json(self) -> dict[str, Any]:
        ratios = {name: round(self.ratio(name), 3) for name in (CONVERTED, FUSED)}
        return {"network": self.network, "what": "peak memory", "batch": self.batch, "ours over torch's": ratios}


def tables(rows: Sequence[NetworkRow], memory: Sequence[MemoryRow]) -> list[Table]:
    found = [_eval_table([row for row in rows if row.what == EVAL])]
    found.append(_training_table([row for row in rows if row.what == TRAINING]))
    headings = ("network", "batch", "converted", "fused", "goal", "torch's peak, bytes an image")
    cells = [
        (
            *(row.network, str(row.batch), f"{row.ratio(CONVERTED):.2f}", f"{row.ratio(FUSED):.2f}"),
            *(f"<= {MEMORY_GOAL}", f"{row.bytes['torch'] / row.batch / 1e6:.1f} M"),
        )
        for row in memory
    ]
    found.append(("Whole networks, peak memory of an eval forward: ours over torch's", headings, cells))
    return [table for table in found if table[2]]


def _eval_table(rows: Sequence[NetworkRow]) -> Table:
    title = "Whole networks, eval: times of others over ours fused (above 1: ours is faster)"
    contestants = (EAGER, CHANNELS_LAST, INDUCTOR, "onnxruntime", "openvino", CONVERTED, FUSED_LAST)
    headings = (
        *("network", "batch", "best of three", "best / fused", f"goal {FUSED_GOAL}"),
        *("eager / converted", f"goal {CONVERTED_GOAL:g}"),
        *("fused, of FMA peak", "best, of FMA peak"),
        *contestants,
    )
    cells = [
        (
            *(row.network, str(row.batch), row.best_peer or "", _number(row.fused_ratio)),
            *(_verdict(row.fused_ratio, FUSED_GOAL), _number(row.ratio(EAGER, CONVERTED))),
            _verdict(row.ratio(EAGER, CONVERTED), CONVERTED_GOAL),
            *(_percent(row.peak_share(FUSED)), _percent(row.peak_share(row.best_peer))),
            *(_contestant(row, name) for name in contestants),
        )
        for row in rows
    ]
    return title, headings, cells


def _training_table(rows: Sequence[NetworkRow]) -> Table:
    headings = ("network", "batch", "eager NCHW / converted", f"goal {TRAINING_GOAL}")
    cells = []
    for row in rows:
        ratio = row.ratio(EAGER, CONVERTED)
        cells.append((row.network, str(row.batch), _number(ratio), _verdict(ratio, TRAINING_GOAL)))
    return "Whole networks, training step: forward, backward, SGD", headings, cells


def _contestant(row: NetworkRow, name: str) -> str:
    return row.missing[name] if name in row.missing else _number(row.ratio(name, FUSED))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _verdict(value: float | None, goal: float) -> str:
    return "" if value is None else "met" if value >= goal else "missed"
