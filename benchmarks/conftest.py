"""Options, and the fixture that measures ours and torch's in turns.

pytest benchmarks --benchmark-only                                every layer
    ... --quick                                                   a few layers of each family, under two minutes
    ... --save-table benchmarks/results/cpu.md                    also tables, the same as JSON, a picture
    ... -k "forward and nchw and b1"                              a part
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import goals, layers, measure, network_report, peers, picture, report
from benchmarks.network_report import MemoryRow, NetworkRow
from benchmarks.report import Case, Row, Table
from fastconv import _C, backends

DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}
FULL_SECONDS, QUICK_SECONDS = 0.4, 0.05  # for each case
QUICK_LAYERS = {1: 2, 8: 1}  # of each family, by batch size
QUICK_FLOPS = 3e9  # no single call above this in the quick run
CONTEST_SECONDS, QUICK_CONTEST_SECONDS = 6, 2  # for each network
CONTEST_ROUNDS = 5

Measure = Callable[..., Row]
Contest = Callable[..., dict[str, list[float]]]
ROWS = pytest.StashKey[list[Row]]()
NETWORKS = pytest.StashKey[list["NetworkRow | MemoryRow"]]()
CEILINGS = pytest.StashKey[measure.Ceilings]()
NOTES = pytest.StashKey[list[str]]()
LOAD = pytest.StashKey[float]()  # of other processes, when the run began
BUSY = 0.7


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastconv")
    group.addoption("--quick", action="store_true", help="a few layers of each family, small budgets")
    group.addoption("--device", default="cpu", help="cpu (default) or cuda, there against cuDNN")
    group.addoption("--dtype", default="float32", choices=sorted(DTYPES), help="of all tensors (default float32)")
    group.addoption("--save-table", metavar="PATH", help="write ratios to PATH (.md) and the same as .json beside it")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS], config.stash[NETWORKS], config.stash[NOTES] = [], [], []
    config.stash[LOAD] = measure.other_load(own_threads=0)
    try:
        device = torch.device(config.getoption("--device"))
    except RuntimeError as error:
        raise pytest.UsageError(f"--device: {error}") from None
    if device.type not in ("cpu", "cuda"):
        raise pytest.UsageError(f"--device is {device}, expected cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device is cuda, but torch finds no CUDA device; leave the option out to use the CPU")
    # pytest-benchmark's own table would list a thousand bare times; -v or --benchmark-verbose brings it back.
    if not config.getoption("benchmark_verbose") and config.getoption("verbose") <= 0:
        config.option.benchmark_quiet = True


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`layer` and `batch` cover the LAYERS of the test's module, `layout` both memory formats."""
    if "layer" in metafunc.fixturenames:
        quick = metafunc.config.getoption("--quick")
        cases = [
            pytest.param(layer, batch, id=f"{layer.family.replace(' ', '-')}-{layer}-b{batch}".replace(" ", "_"))
            for batch in QUICK_LAYERS
            for layer in _layers(metafunc.module.LAYERS, batch, quick)
        ]
        metafunc.parametrize(("layer", "batch"), cases)
    if "layout" in metafunc.fixturenames:
        metafunc.parametrize("layout", report.LAYOUTS)


def _layers(everything: list[Any], batch: int, quick: bool) -> list[Any]:
    if not quick:
        return everything
    affordable = [layer for layer in everything if layer.flops(batch) <= QUICK_FLOPS]
    return layers.representative(affordable, QUICK_LAYERS[batch])


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return DTYPES[request.config.getoption("--dtype")]


@pytest.fixture(scope="session")
def ceilings(request: pytest.FixtureRequest, device: torch.device, dtype: torch.dtype) -> measure.Ceilings:
    quick = request.config.getoption("--quick")
    found = measure.measure_ceilings(device, dtype, 0.5 if quick else 3)
    request.config.stash[CEILINGS] = found
    knee = found.flops_per_second / found.bytes_per_second
    request.config.stash[NOTES].append(
        "Roofline ceilings are proxies measured in the same run: the best of torch.mm and 3x3 convolutions for FLOPs, "
        f"copy_ for bytes ({knee:.0f} FLOPs per byte where they meet); data that stay in a cache can pass 100 %"
    )
    if found.fma_per_second is not None:
        share = found.flops_per_second / found.fma_per_second
        request.config.stash[NOTES].append(
            "The FMA peak is that of a loop in registers, on all threads; the best of those products and convolutions "
            f"reaches {share:.0%} of it"
        )
    return found


@pytest.fixture
def measured(
    request: pytest.FixtureRequest,
    benchmark: Any,
    device: torch.device,
    dtype: torch.dtype,
    ceilings: measure.Ceilings,
) -> Measure:
    """measured(case, ours, theirs, terms): checks that results agree, then measures both in turns.

    ``terms`` is the length of the sums: the allowed disagreement depends on it. Without ``autograd=True`` both run in
    inference mode.
    """
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        # Of ours none computes in TF32, and the two results are compared.
        torch.backends.cudnn.allow_tf32 = False
        reason = backends.unavailable("cuda")
        if reason is not None:
            pytest.skip(reason)

    budget = QUICK_SECONDS if request.config.getoption("--quick") else FULL_SECONDS

    def run(case: Case, ours: measure.Call, theirs: measure.Call, terms: int, *, autograd: bool = False) -> Row:
        with torch.inference_mode(not autograd):
            kernel = measure.kernel_of(ours)
            measure.require_agreement(ours().detach(), theirs().detach(), terms)
            if device.type == "cuda" and case.batch == 1 and case.flops and not autograd:
                ours, theirs = measure.replayed(ours), measure.replayed(theirs)
            turns = measure.take_turns(benchmark, measure.clock_of(device), ours, theirs, budget)
        row = measure.row_of(case, kernel, turns, ceilings)
        benchmark.group = f"{case.op} {case.family} {case.direction}"
        benchmark.extra_info.update(row.as_json())
        request.config.stash[ROWS].append(row)
        return row

    return run


@pytest.fixture
def contest(request: pytest.FixtureRequest, benchmark: Any) -> Contest:
    """contest(calls, allowed): checks that all agree with the first, then times each in every round.

    ``allowed`` is the largest difference as a share of the first result's RMS.
    """
    quick = request.config.getoption("--quick")

    def run(calls: dict[str, measure.Call], allowed: float) -> dict[str, list[float]]:
        results = {name: call().double() for name, call in calls.items()}
        reference = next(iter(results.values()))
        for name, result in results.items():
            error = (result - reference).abs().max() / reference.square().mean().sqrt()
            if not error <= allowed:  # also where it is NaN
                raise AssertionError(
                    f"{name} is {error:.2g} of the result's RMS off {next(iter(calls))}, allowed: {allowed}"
                )
        seconds = QUICK_CONTEST_SECONDS if quick else CONTEST_SECONDS
        return measure.take_rounds(benchmark, calls, seconds, CONTEST_ROUNDS)

    return run


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[NetworkRow | MemoryRow], None]:
    """Keeps a result of a whole network for the tables."""
    return request.config.stash[NETWORKS].append


def tables(config: pytest.Config) -> list[Table]:
    """Of goals and whole networks."""
    found = config.stash[NETWORKS]
    whole = [row for row in found if isinstance(row, NetworkRow)]
    memory = [row for row in found if isinstance(row, MemoryRow)]
    aims = goals.table(config.stash[ROWS], whole, memory, config.stash.get(CEILINGS, None))
    return [*([aims] if aims[2] else []), *network_report.tables(whole, memory)]


def facts(config: pytest.Config) -> dict[str, str]:
    device = torch.device(config.getoption("--device"))
    return {
        "device": report.machine(device),
        "instruction set": _C.active_isa(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "dtype": config.getoption("--dtype"),
        "selection": "quick" if config.getoption("--quick") else "full",
    }


def pytest_report_header(config: pytest.Config) -> str:
    return "fastconv: " + ", ".join(f"{name} {value}" for name, value in facts(config).items())


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows, networks, notes = config.stash[ROWS], config.stash[NETWORKS], config.stash[NOTES]
    if not rows and not networks:
        return
    load = max(config.stash[LOAD], measure.other_load(torch.get_num_threads()))
    if load > BUSY:
        notes.append(
            f"The machine was busy with other work (load {load:.1f}). That hits the side that joins its threads more "
            "often, so these ratios say little: measure again on a quiet machine"
        )
    write = terminalreporter.write_line
    terminalreporter.section("fastconv against torch")
    sections = tables(config)
    if rows:
        every = ("Every layer, our time / torch's time", report.HEADINGS, [report.layer_cells(row) for row in rows])
        means = [(f"Geometric means, {title}", *table) for title, *table in report.summary_tables(rows)]
        sections = [every, *means, *sections]
    for title, headings, cells in sections:
        write(title)
        for line in report.plain_table(headings, cells):
            write(line)
        write("")
    for note in notes:
        write(note + ".")
    if rows:
        write(report.totals(rows))
    path = config.getoption("--save-table")
    if path:
        _save(config, Path(path))
        write(f"saved {path}")


def _save(config: pytest.Config, path: Path) -> None:
    rows, networks, found = config.stash[ROWS], config.stash[NETWORKS], facts(config)
    if networks:
        found |= peers.versions()
    drawn = picture.draw(path.with_suffix(".png"), found["device"], rows, config.stash.get(CEILINGS, None))
    more = {"networks": [row.as_json() for row in networks]} if networks else {}
    report.save(path, found, rows, config.stash[NOTES], tables(config), more, drawn)
