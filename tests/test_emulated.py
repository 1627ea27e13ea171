"""The package on emulated CUDA kernels, in processes of their own: FASTCONV_EMULATE is read at import."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import emulator_library as emulator
import pytest

from fastconv import _C
from fastconv._library import EMULATED

TESTS = Path(__file__).resolve().parent
# The tests of CUDA tensors, and torch's samples and error inputs for these functions and modules. No CUDA kernel
# computes in float64.
FILES = {
    "test_gpu.py": "",
    "test_gpu_tuning.py": "",
    "test_gpu_gemm.py": "",
    "test_opinfo.py": "not float64",
    "test_moduleinfo.py": "not float64",
}

pytestmark = pytest.mark.skipif(EMULATED, reason="this process has been told already")


def environment(library: Path | str) -> dict[str, str]:
    return {**os.environ, "FASTCONV_EMULATE": str(library)}


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_on_emulated_kernels(file):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(TESTS / file)]
    if FILES[file]:
        command += ["-k", FILES[file]]
    result = subprocess.run(
        command, env=environment(emulator.build_ops()), cwd=TESTS.parent, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


def test_the_doctor_checks_the_emulated_kernels():
    command = [sys.executable, "-m", "fastconv", "doctor"]
    result = subprocess.run(command, env=environment(emulator.build_ops()), capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"emulated/conv2d +direct, stem, stem_mma, implicit_gemm_mma", result.stdout)
    assert re.search(r"conv2d stem channels_last +ok .*emulated/conv2d/stem", result.stdout)


def test_without_the_library_the_error_names_the_remedy(tmp_path):
    script = "import fastconv._library as l; l.find_library = lambda stem: None; l._EMULATE = '1'; l._load_emulated()"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "run `make emulated`" in result.stderr
    script = "import fastconv"
    missing = {**os.environ, "FASTCONV_EMULATE": str(tmp_path / "missing.so")}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=missing)
    assert result.returncode != 0
    assert "run `make emulated`" in result.stderr


def test_the_registry_and_the_launchers_are_the_same_list():
    """Every kernel that is counted is one that the emulator runs, and the other way round."""
    launchers = {
        f"{op}/{algo}"
        for op, algo in emulator.declared_launchers()
        if not op.startswith("explain_") and "workspace" not in op
    }
    counted = {name for name in _C.kernel_names("cuda") if not name.startswith("max_pool2d_with_offsets/")}
    assert counted == launchers
