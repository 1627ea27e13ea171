"""Rows of results, and what is printed and saved of them: ratios, never times."""

from __future__ import annotations

import json
import math
import platform
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

DIRECTIONS = ("forward", "input_grad", "weight_grad")
WHOLE_STEP = "step"  # forward and backward
LAYOUTS = ("nchw", "nhwc")

Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]  # title, headings, cells


@dataclass(frozen=True)
class Case:
    """What is measured; one call's FLOPs and the bytes that it must move at least."""

    op: str
    family: str
    layer: str
    direction: str
    layout: str
    batch: int
    flops: int
    bytes: int


@dataclass(frozen=True)
class Row:
    """A case's result. ``ratio`` is our time over torch's; shares are of the roofline."""

    case: Case
    kernel: str
    ratio: float
    low: float
    high: float
    our_share: float
    torch_share: float
    our_seconds: float
    torch_seconds: float
    rounds: int
    note: str = ""  # what sets this row apart, such as a smaller batch than its fellows'

    def as_json(self) -> dict[str, Any]:
        values = asdict(self)
        case = values.pop("case")
        del values["our_seconds"], values["torch_seconds"]
        if not self.note:
            del values["note"]
        return {**case, **{key: _rounded(value) for key, value in values.items()}}


def _rounded(value: Any) -> Any:
    return float(f"{value:.3g}") if isinstance(value, float) else value


def geometric_mean(ratios: Iterable[float]) -> float:
    logarithms = [math.log(ratio) for ratio in ratios]
    return math.exp(sum(logarithms) / len(logarithms)) if logarithms else math.nan


def machine(device: torch.device) -> str:
    """Name of the processor that ran."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def count(value: float) -> str:
    """123456 -> "123 K"."""
    for unit in ("", "K", "M", "G"):
        if value < 999.5:
            return f"{value:.3g} {unit}".rstrip()
        value /= 1000
    return f"{value:.3g} T"


HEADINGS = (
    "family",
    "layer",
    "pass",
    "layout",
    "batch",
    "ratio",
    "quartiles",
    "FLOPs",
    "bytes",
    "roofline",
    "torch's",
    "kernel",
)


def layer_cells(row: Row) -> tuple[str, ...]:
    case = row.case
    return (
        case.family,
        case.layer,
        case.direction,
        case.layout,
        str(case.batch),
        f"{row.ratio:.2f}",
        f"{row.low:.2f}-{row.high:.2f}",
        count(case.flops) if case.flops else "",
        count(case.bytes) if case.flops else "",
        f"{row.our_share:.0%}" if case.flops else "",
        f"{row.torch_share:.0%}" if case.flops else "",
        f"{row.kernel} ({row.note})" if row.note else row.kernel,
    )


def summary_tables(rows: Sequence[Row]) -> list[Table]:
    """For each batch size (title, headings, cells): geometric means by family over pass and layout, and in total."""
    tables = []
    directions = [d for d in (*DIRECTIONS, WHOLE_STEP) if any(row.case.direction == d for row in rows)]
    columns = [
        (direction, layout)
        for direction in directions
        for layout in LAYOUTS
        if any((row.case.direction, row.case.layout) == (direction, layout) for row in rows)
    ]
    for batch in sorted({row.case.batch for row in rows}):
        chosen = [row for row in rows if row.case.batch == batch]
        families = list(dict.fromkeys((row.case.op, row.case.family) for row in chosen))
        cells = [
            (op, family, *_means([row for row in chosen if (row.case.op, row.case.family) == (op, family)], columns))
            for op, family in families
        ]
        for op in dict.fromkeys(op for op, _ in families):
            cells.append((op, "all", *_means([row for row in chosen if row.case.op == op], columns)))
        headings = ("op", "family", *(f"{direction} {layout}" for direction, layout in columns), "all")
        tables.append((f"batch {batch}", headings, cells))
    return tables


def _means(rows: Sequence[Row], columns: Sequence[tuple[str, str]]) -> list[str]:
    cells = [
        geometric_mean(row.ratio for row in rows if (row.case.direction, row.case.layout) == column)
        for column in columns
    ]
    cells.append(geometric_mean(row.ratio for row in rows))
    return ["" if math.isnan(cell) else f"{cell:.2f}" for cell in cells]


def totals(rows: Sequence[Row]) -> str:
    by_time = sum(row.our_seconds for row in rows) / sum(row.torch_seconds for row in rows)
    mean = geometric_mean(row.ratio for row in rows)
    sums = f"geometric mean {mean:.2f}, sum of our times over torch's {by_time:.2f}"
    return f"{len(rows)} cases: {sums} (below 1: faster than torch)"


def plain_table(headings: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(headings, *cells, strict=True)]
    return [
        "  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in (headings, *cells)
    ]


def markdown_table(headings: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    lines = [headings, ["---"] * len(headings), *cells]
    return ["| " + " | ".join(line) + " |" for line in lines]


def save(
    path: Path,
    facts: dict[str, str],
    rows: Sequence[Row],
    notes: Sequence[str],
    first: Sequence[Table] = (),
    more: dict[str, Any] | None = None,
    picture: Path | None = None,
) -> None:
    """Tables at ``path``, ``first`` above those of the rows; rows and ``more`` as JSON beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"# {facts['device']}", "", ", ".join(f"{name} {value}" for name, value in facts.items()) + ".", ""]
    lines += [*(f"{note}." for note in notes), ""] if notes else []
    for title, headings, cells in first:
        lines += [f"## {title}", "", *markdown_table(headings, cells), ""]
    if picture is not None:
        lines += [f"![Ratios of every layer, and rooflines]({picture.name})", ""]
    if rows:
        lines += [f"Ratios below are our time over torch's, both measured in turns in one process. {totals(rows)}.", ""]
        for title, headings, cells in summary_tables(rows):
            lines += [f"## Geometric means, {title}", "", *markdown_table(headings, cells), ""]
        lines += ["## Every layer", "", *markdown_table(HEADINGS, [layer_cells(row) for row in rows]), ""]
    path.write_text("\n".join(lines))
    document = {**facts, "notes": list(notes), **(more or {}), "rows": [row.as_json() for row in rows]}
    path.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
