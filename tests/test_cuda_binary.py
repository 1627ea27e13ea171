"""What ptxas says of the CUDA kernels that `make cuda` compiled: registers, and nothing in local memory."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LOGS = sorted((ROOT / "build" / "cuda").glob("**/*.ptxas"))
SOURCES = sorted((ROOT / "csrc").glob("**/cuda*.cu"))

pytestmark = pytest.mark.skipif(not LOGS, reason="no CUDA objects; `make cuda` compiles them")

ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>sm_\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def log_of(source: Path) -> str:
    return (ROOT / "build" / "cuda" / source.relative_to(ROOT / "csrc").with_suffix(".ptxas")).read_text()


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: str(source.relative_to(ROOT / "csrc")))
def test_kernels_keep_out_of_local_memory(source):
    log = log_of(source)
    entries = [match.groupdict() for match in ENTRY.finditer(log)]
    assert len(entries) == log.count("Compiling entry function") > 0
    spilling = [e for e in entries if int(e["stack"]) or int(e["stores"]) or int(e["loads"])]
    assert not spilling, f"kernels with a stack frame or spills: {spilling}"
    wanted = {"sm_90a"} if source.stem.endswith("_sm90") else {"sm_80", "sm_90a"}
    assert {e["arch"] for e in entries} == wanted


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: str(source.relative_to(ROOT / "csrc")))
def test_no_warnings(source):
    assert "warning" not in log_of(source)
