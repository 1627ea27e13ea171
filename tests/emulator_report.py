"""pytest plugin of `make emulate` and `make test`: which emulated kernels ran, in how many cases, how far off at worst.

The run fails if a launcher of a csrc/*/cuda*.cu file was never called: a kernel that is not emulated is not tested.
"""

from __future__ import annotations

from typing import Any

import emulator_library as emulator
import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section("emulated kernels")
    terminalreporter.write_line(f"{'op':<34}{'algo':<16}{'cases':>8}  worst error, in the dtype's epsilon")
    for op, algo in sorted(emulator.declared_launchers()):
        record = emulator.records.get((op, algo), emulator.Record())
        error = "" if record.worst_error is None else f"{record.worst_error:.2e}"
        terminalreporter.write_line(f"{op:<34}{algo:<16}{record.cases:>8}  {error}")
    for name in _never_called():
        terminalreporter.write_line(f"{name} was never called", red=True)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    worker = getattr(session.config, "workeroutput", None)
    if worker is not None:  # one of several processes: the first of them collects what all have seen
        worker["emulated"] = [(*name, record.cases, record.worst_error) for name, record in emulator.records.items()]
    elif exitstatus == pytest.ExitCode.OK and _never_called():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    for op, algo, cases, worst_error in getattr(node, "workeroutput", {}).get("emulated", []):
        emulator.records.setdefault((op, algo), emulator.Record()).cases += cases
        if worst_error is not None:
            emulator.note_error(op, algo, worst_error)


def _never_called() -> list[str]:
    return [
        f"({op}, {algo}) of {source}"
        for (op, algo), source in emulator.declared_launchers().items()
        if (op, algo) not in emulator.records
    ]
