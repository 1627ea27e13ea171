"""Machine code of the kernels whose speed hangs on single instructions: read from what nvcc makes, without tools.

An instruction has 16 bytes: its opcode in the lowest 12 bits, and for loads and stores the width in bits 73 to 75. The
numbers below are those of sm_80 and sm_90, found beside cuobjdump's text.
"""

from __future__ import annotations

import importlib.util
import re
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "csrc" / "cuda_support" / "nvcc.py"
if not SCRIPT.exists():
    pytest.skip("runs from a checkout only", allow_module_level=True)
SPEC = importlib.util.spec_from_file_location("fastconv_nvcc_for_sass", SCRIPT)
assert SPEC is not None
assert SPEC.loader is not None
nvcc = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = nvcc  # dataclasses look their module up
SPEC.loader.exec_module(nvcc)
NVCC = nvcc.find_nvcc()

pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc; `make cuda` installs it")

FFMA, LDS, LDGSTS, LDL, STL = 0x223, 0x984, 0xFAE, 0x983, 0x387
BYTES_4, BYTES_16 = 4, 6


def instructions(cubin: bytes) -> dict[str, Counter[tuple[int, int]]]:
    """For each kernel how often it has an opcode with a width."""
    (sections,) = struct.unpack_from("<Q", cubin, 40)
    entry_bytes, count, names = struct.unpack_from("<HHH", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQ", cubin, sections + i * entry_bytes) for i in range(count)]
    found = {}
    for name_at, _, _, _, start, size in headers:
        name_start = headers[names][4] + name_at
        name = cubin[name_start : cubin.index(b"\0", name_start)].decode()
        if name.startswith(".text."):
            words = struct.iter_unpack("<QQ", cubin[start : start + size])
            found[name] = Counter((low & 0xFFF, high >> 9 & 7) for low, high in words)
    return found


def compiled(source: str, folder: Path) -> dict[str, Counter[tuple[int, int]]]:
    target = folder / "kernels.cubin"
    flags = [flag for flag in nvcc.FLAGS if not flag.startswith(("-gencode", "-Xptxas"))]
    command = [NVCC, "-cubin", "-arch=sm_90a", *flags, f"-I{ROOT / 'csrc'}", str(ROOT / "csrc" / source)]
    subprocess.run([*command, "-o", str(target)], check=True)
    return instructions(target.read_bytes())


@pytest.mark.parametrize("part", ["", "_input_grad", "_weight_grad"])
def test_implicit_gemm_fp32(part: str, tmp_path: Path) -> None:
    """Its products read shared memory 16 bytes at a time, its copies are as wide as their names say."""
    seen = set()
    for name, found in compiled(f"conv2d/cuda_implicit_gemm_fp32{part}.cu", tmp_path).items():
        match = re.search(r"SimtTileILi(\d+)ELi(\d+)EEELi(\d)ELi(\d)EEEv", name)
        if match is None:
            continue
        rows, columns, row_vector, column_vector = map(int, match.groups())
        seen.add((rows, columns, row_vector, column_vector))
        assert 8 * 8 * 4 <= found[FFMA, 0] < 8 * 8 * 4 + 32  # four steps, not unrolled further; tanh has some
        assert found[LDS, BYTES_16] >= 16
        copies = {1: 0, 4: 0}  # before the loop and in it, of a thread
        for lines, vector in ((rows, row_vector), (columns, column_vector)):
            copies[vector] += 2 * lines * 8 // vector // (rows * columns // 64)
        assert found[LDGSTS, BYTES_4] == copies[1]
        assert found[LDGSTS, BYTES_16] == copies[4]
        assert not [key for key in found if key[0] in (LDL, STL)]
    assert {tile[:2] for tile in seen} >= {(128, 128), (64, 64), (64, 128)}
    assert {tile[2:] for tile in seen} == ({(1, 1), (4, 4)} if "input" in part else {(1, 1), (4, 1), (4, 4)})
