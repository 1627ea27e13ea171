"""A picture of a run: every layer's ratio, and where ours and torch's stand under the roofline. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import Ceilings
from benchmarks.report import LAYOUTS, Row

TITLES = {"nchw": "NCHW", "nhwc": "channels_last"}


def draw(path: Path, machine: str, rows: Sequence[Row], ceilings: Ceilings | None) -> Path | None:
    """Forward passes at batch 1; None, and no file, without matplotlib or without such rows."""
    try:
        import matplotlib
    except ImportError:
        return None
    chosen = [row for row in rows if row.case.direction == "forward" and row.case.batch == 1 and row.case.flops]
    chosen = [row for row in chosen if row.case.op in ("conv2d", "depthwise", "pool")]
    if not chosen or ceilings is None:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(LAYOUTS), figsize=(14, 10), squeeze=False)
    for column, layout in enumerate(LAYOUTS):
        if not any(row.case.layout == layout for row in chosen):
            axes[0][column].set_axis_off()
            axes[1][column].set_axis_off()
            continue
        here = [row for row in chosen if row.case.layout == layout]
        _ratios(axes[0][column], TITLES[layout], here)
        _roofline(axes[1][column], TITLES[layout], here, ceilings)
    figure.suptitle(f"{machine}, forward, batch 1")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _ratios(axis: Any, title: str, rows: Sequence[Row]) -> None:
    """torch's time over ours, layer by layer, a colour for each family."""
    rows = sorted(rows, key=lambda row: (row.case.op, row.case.family, row.case.flops))
    for number, family in enumerate(dict.fromkeys(row.case.family for row in rows)):
        places = [place for place, row in enumerate(rows) if row.case.family == family]
        heights = [1 / rows[place].ratio for place in places]
        axis.bar(places, heights, color=f"C{number % 10}", hatch="//" if number >= 10 else None, label=family)
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_title(f"{title}: torch's time over ours (above 1: ours is faster)")
    axis.set_xlabel("layer, by family and FLOPs")
    axis.legend(fontsize=7, ncols=6, loc="upper center", bbox_to_anchor=(0.5, -0.12))


def _roofline(axis: Any, title: str, rows: Sequence[Row], ceilings: Ceilings) -> None:
    """FLOPs a byte, and the share of the peak that was reached: shares, because a bare rate means little elsewhere."""
    peak = ceilings.fma_per_second or ceilings.flops_per_second
    intensities = [row.case.flops / row.case.bytes for row in rows]
    ends = (min(intensities) / 2, max(intensities) * 2)
    knee = peak / ceilings.bytes_per_second
    axis.plot([ends[0], knee, max(ends[1], knee)], [ends[0] / knee, 1, 1], color="black", linewidth=0.8)
    for name, marker, seconds in (
        ("torch", "x", [row.torch_seconds for row in rows]),
        ("fastconv", "o", [row.our_seconds for row in rows]),
    ):
        shares = [row.case.flops / taken / peak for row, taken in zip(rows, seconds, strict=True)]
        axis.scatter(intensities, shares, marker=marker, s=18, label=name)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_title(f"{title}: share of the measured FMA peak, under the roofline")
    axis.set_xlabel("FLOPs per byte that must be moved")
    axis.legend(fontsize=8)
