"""pytest plugin of gpu_check: writes each test's outcome to a file as soon as it is known.

A run that is stopped, or a CUDA error that takes the process with it, loses nothing of what came before.

    FASTCONV_RESULTS=DIR/tests.jsonl pytest -p benchmarks.gpu_results
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

RESULTS = Path(os.environ["FASTCONV_RESULTS"])


def _write(**line: object) -> None:
    with RESULTS.open("a") as file:
        file.write(json.dumps(line) + "\n")


def pytest_collection_finish(session: pytest.Session) -> None:
    _write(selected=len(session.items))


def pytest_runtest_logstart(nodeid: str) -> None:
    _write(test=nodeid, outcome="started")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    # A test has one outcome, that of its call; setup and teardown count where they go wrong or skip it.
    if report.when == "call" or report.outcome != "passed":
        text = report.longreprtext if report.failed else str(report.longrepr[-1]) if report.skipped else ""
        _write(test=report.nodeid, outcome=report.outcome, seconds=round(report.duration, 3), text=text[-2000:])
