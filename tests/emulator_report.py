"""pytest plugin of `make emulate`: which emulated kernels ran, in how many cases, with which worst error.

The run fails if a launcher of a csrc/*/cuda*.cu file was never called: a kernel that is not emulated is not tested.
"""

from __future__ import annotations

import emulator_library as emulator
import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section("emulated kernels")
    terminalreporter.write_line(f"{'op':<34}{'algo':<16}{'cases':>8}  worst error")
    for op, algo in sorted(emulator.declared_launchers()):
        record = emulator.records.get((op, algo), emulator.Record())
        error = "" if record.worst_error is None else f"{record.worst_error:.2e}"
        terminalreporter.write_line(f"{op:<34}{algo:<16}{record.cases:>8}  {error}")
    for name in _never_called():
        terminalreporter.write_line(f"{name} was never called", red=True)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if exitstatus == pytest.ExitCode.OK and _never_called():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _never_called() -> list[str]:
    return [
        f"({op}, {algo}) of {source}"
        for (op, algo), source in emulator.declared_launchers().items()
        if (op, algo) not in emulator.records
    ]
