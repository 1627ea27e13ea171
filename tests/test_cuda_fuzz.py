"""Random problems for every family of CUDA kernels: between fences, and under ASan and UBSan."""

from __future__ import annotations

import os
import subprocess
import sys

import cuda_fuzz
import pytest


def run(families: list[str], count: int, *options: str, **environment: str) -> None:
    command = [sys.executable, cuda_fuzz.__file__, *families, "--seed", "5000", "--count", str(count), *options]
    everywhere = {"FASTCONV_FENCES": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run(
        command, env=os.environ | everywhere | environment, capture_output=True, text=True, timeout=600
    )
    assert ran.returncode == 0, "\n".join(ran.stdout.splitlines()[-8:]) + "\n" + ran.stderr[-3000:]


def test_between_fences() -> None:
    run(list(cuda_fuzz.FAMILIES), 10)


@pytest.mark.slow
def test_under_address_sanitizer() -> None:
    # libstdc++ is preloaded as well, because ASan must find its __cxa_throw when it starts.
    names = ("libasan.so", "libstdc++.so")
    found = [subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip() for name in names]
    families = ["stem", "gemm", "mma", "tf32", "depthwise", "pool", "norm"]
    run(families, 3, "--kind", "address", LD_PRELOAD=" ".join(found), ASAN_OPTIONS="detect_leaks=0")
