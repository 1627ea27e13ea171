"""Every convolution and pool of the lecture on a GPU against torch with cuDNN: the `bench` part of gpu_check.

    python -m benchmarks.gpu_bench --out DIR --seconds 440 [--dtypes float16,float32]

Needs no pytest. What is measured so far is in DIR/bench.json and DIR/bench.md at all times. A case that cannot be
measured is listed with its reason.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import cases, layers, measure, report
from benchmarks.cases import Pair
from benchmarks.report import Row
from fastconv import backends

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
BATCHES = (1, 128)  # in this order: the time at 1 says whether 128 can be afforded
CASE_SECONDS = 0.1  # of measuring, both sides together
CALL_SECONDS = 0.1  # a call that would take longer is measured at a smaller batch, which its row says
SAVE_SECONDS = 10
CEILING_SECONDS = 2
OUT_OF_TIME = "the time was up"


@dataclass(frozen=True)
class Series:
    """One layer in one direction, layout and dtype: what is measured at each of BATCHES."""

    op: str
    layer: layers.Layer | layers.Norm
    direction: str
    layout: str
    dtype: str

    def pair(self, batch: int, device: torch.device) -> Pair:
        dtype = DTYPES[self.dtype]
        if isinstance(self.layer, layers.Pool):
            return cases.pool(self.layer, batch, self.direction, self.layout, device, dtype)
        if isinstance(self.layer, layers.Norm):
            return cases.norm(self.layer, batch, self.direction, self.layout, device, dtype)
        if self.op == "conv2d_fused":
            return cases.fused(self.layer, batch, self.layout, device, dtype)
        return cases.convolution(self.op, self.layer, batch, self.direction, self.layout, device, dtype)


@dataclass(frozen=True)
class Missing:
    """A case without a row."""

    series: Series
    batch: int
    reason: str


@dataclass
class Results:
    rows: list[tuple[str, Row]] = field(default_factory=list)  # with their dtype
    missing: list[Missing] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def every_series(dtypes: list[str]) -> Iterator[Series]:
    """What is limited by memory first; then by cost, so that little is missing where the time does not suffice."""
    convolutions = sorted(layers.convolutions(depthwise=False), key=lambda layer: layer.flops())
    stems = [layer for layer in convolutions if layer.family == "stem"]
    others = [layer for layer in convolutions if layer.family != "stem"]
    groups: list[tuple[str, list[Any], tuple[str, ...]]] = [
        ("pool", layers.pools(), cases.POOL_DIRECTIONS),
        ("norm", layers.NORMS, cases.POOL_DIRECTIONS),
        ("depthwise", layers.convolutions(depthwise=True), report.DIRECTIONS),
        ("conv2d", stems, report.DIRECTIONS),
        ("conv2d_fused", [*layers.convolutions(depthwise=True), *stems], ("forward",)),
        ("conv2d", others, report.DIRECTIONS),
    ]
    for dtype in dtypes:
        for op, members, directions in groups:
            for layer in members:
                for direction in directions:
                    for layout in report.LAYOUTS:
                        yield Series(op, layer, direction, layout, dtype)


def affordable(batch: int, seconds_per_image: float, limit: float = CALL_SECONDS) -> int:
    """``batch`` halved until a call takes no longer than ``limit``; at least 1."""
    while batch > 1 and batch * seconds_per_image > limit:
        batch //= 2
    return batch


class Rounds:
    """Stands for pytest-benchmark's fixture."""

    def pedantic(self, target: measure.Call, setup: measure.Call, rounds: int, iterations: int) -> None:
        for _ in range(rounds):
            setup()
            target()


class Bench:
    """Measures series after series. ``now`` and ``save`` are parameters for the tests' sake."""

    def __init__(
        self,
        device: torch.device,
        clock: measure.Clock,
        ceilings: dict[str, measure.Ceilings],
        deadline: float,
        save: Callable[[Results], None],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.device, self.clock, self.ceilings, self.deadline = device, clock, ceilings, deadline
        self.save, self.now = save, now
        self.results = Results()
        self.broken = ""  # why nothing more can run in this process
        self.saved = now()

    def run(self, everything: Iterator[Series]) -> Results:
        for series in everything:
            seconds_per_image = 0.0
            for batch in BATCHES:
                row = self.attempt(series, batch, affordable(batch, seconds_per_image))
                if row is not None:
                    self.results.rows.append((series.dtype, row))
                    seconds_per_image = row.our_seconds / row.case.batch
            if self.now() - self.saved > SAVE_SECONDS:
                self.save(self.results)
                self.saved = self.now()
        self.save(self.results)
        return self.results

    def attempt(self, series: Series, wanted: int, batch: int) -> Row | None:
        """The row, or None and a line in ``missing``."""
        reason = self.broken or (OUT_OF_TIME if self.now() > self.deadline else "")
        if not reason:
            try:
                with torch.inference_mode():
                    return self.measured(series, wanted, batch)
            except (RuntimeError, AssertionError) as error:
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                self.recover(reason)
        self.results.missing.append(Missing(series, wanted, reason))
        return None

    def measured(self, series: Series, wanted: int, batch: int) -> Row:
        pair = series.pair(batch, self.device)
        kernel = measure.kernel_of(pair.ours)
        if not kernel or "torch/" in kernel:
            raise RuntimeError(f"no kernel of ours ran ({kernel or 'nothing was counted'})")
        measure.require_agreement(pair.ours(), pair.theirs(), pair.terms)
        ours, theirs = pair.ours, pair.theirs
        if batch == 1 and self.device.type == "cuda":
            ours, theirs = measure.replayed(ours), measure.replayed(theirs)
        turns = measure.take_turns(Rounds(), self.clock, ours, theirs, CASE_SECONDS, pilot_rounds=1, min_rounds=3)
        note = "" if batch == wanted else f"measured at batch {batch} in place of {wanted}, a call would be too slow"
        return measure.row_of(pair.case, kernel, turns, self.ceilings[series.dtype], note)

    def recover(self, reason: str) -> None:
        """After an error: memory back; an error that sticks to the CUDA context ends the run."""
        if self.device.type != "cuda":
            return
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError:
            self.broken = f"the CUDA context broke before: {reason}"


def document(results: Results) -> dict[str, Any]:
    missing = [
        {**asdict(entry.series), "layer": str(entry.series.layer), "family": entry.series.layer.family}
        | {"batch": entry.batch, "reason": entry.reason}
        for entry in results.missing
    ]
    rows = [{"dtype": dtype, **row.as_json()} for dtype, row in results.rows]
    return {"notes": results.notes, "rows": rows, "missing": missing}


def markdown(results: Results) -> str:
    lines = [*(f"{note}." for note in results.notes), ""]
    for dtype in dict.fromkeys(dtype for dtype, _ in results.rows):
        rows = [row for found, row in results.rows if found == dtype]
        lines += [f"## {dtype}", "", f"{report.totals(rows)}.", ""]
        for title, headings, cells in report.summary_tables(rows):
            lines += [f"### Geometric means, {title}", "", *report.markdown_table(headings, cells), ""]
        lines += ["### Every layer", ""]
        lines += [*report.markdown_table(report.HEADINGS, [report.layer_cells(row) for row in rows]), ""]
    if results.missing:
        reasons = Counter((entry.series.dtype, entry.series.op, entry.batch, entry.reason) for entry in results.missing)
        cells = [(*map(str, key), str(number)) for key, number in reasons.items()]
        lines += ["## Not measured", ""]
        lines += [*report.markdown_table(("dtype", "op", "batch", "reason", "cases"), cells), ""]
    return "\n".join(lines)


def save(folder: Path, results: Results) -> None:
    """Whole files or none: the process may be stopped at any moment."""
    for name, text in (("bench.json", json.dumps(document(results), indent=1) + "\n"), ("bench.md", markdown(results))):
        unfinished = folder / f"{name}.part"
        unfinished.write_text(text)
        os.replace(unfinished, folder / name)


def main() -> int:
    parser = argparse.ArgumentParser(description="ratios against cuDNN of every layer of the lecture")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=440, help="when to stop beginning new cases")
    parser.add_argument("--dtypes", default="float16", help=f"some of {','.join(DTYPES)}, comma-separated")
    options = parser.parse_args()
    dtypes = options.dtypes.split(",")
    if not set(dtypes) <= set(DTYPES):
        parser.error(f"--dtypes is {options.dtypes}, expected some of {','.join(DTYPES)}")
    deadline = time.monotonic() + options.seconds
    reason = backends.unavailable("cuda")
    if reason is not None:
        print(f"gpu_bench: {reason}", file=sys.stderr)
        return 1
    device = torch.device("cuda")
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False  # none of ours computes in it, and the two results are compared
    ceilings = {dtype: measure.measure_ceilings(device, DTYPES[dtype], CEILING_SECONDS) for dtype in dtypes}
    bench = Bench(device, measure.clock_of(device), ceilings, deadline, lambda results: save(options.out, results))
    bench.results.notes += [
        "Ratio: our time over torch's, medians of calls in turns; CUDA events; L2 flushed before each call; cuDNN "
        "searches for its fastest algorithm; TF32 off; batch 1 by graph replay on both sides",
        "Roofline: the time that the ceilings of this same run allow (the best of torch.mm and a 3x3 convolution for "
        "FLOPs, copy_ for bytes) over the measured time",
    ]
    results = bench.run(every_series(dtypes))
    print(f"{len(results.rows)} cases measured, {len(results.missing)} not")
    for entry in results.missing:
        if entry.reason != OUT_OF_TIME:
            print(f"  {entry.series} batch {entry.batch}: {entry.reason}")
    return 1 if results.missing else 0


if __name__ == "__main__":
    sys.exit(main())
