"""What the compiler made of the sources: nothing of one instruction set leaks, and tiles stay in registers."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from fastconv import _C
from fastconv._library import library_path

ROOT = Path(__file__).resolve().parent.parent
ISAS = ("generic", "avx2", "avx512", "avx512_bf16", "neon")

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files"),
    pytest.mark.skipif(_C.build_info()["sanitized"], reason="instrumented code is built to be slow"),
]


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def isa_objects() -> list[Path]:
    """Object files of the translation units that are compiled for one instruction set."""
    found = sorted(ROOT.glob("build/release-*/fastconv._C_cpu/csrc/**/cpu_*.o"))
    return [path for path in found if path.stem.removeprefix("cpu_") in ISAS]


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs binutils")
def test_units_of_an_instruction_set_share_no_inline_function():
    """The linker keeps one copy of a weak symbol, perhaps the AVX-512 one, and an older CPU would run into it."""
    objects = isa_objects()
    if not objects:
        pytest.skip("the library was not built in this checkout")
    assert {path.stem.removeprefix("cpu_") for path in objects} >= {"generic"}
    leaks = defaultdict(list)
    for path in objects:
        for line in run("nm", "--defined-only", "-C", str(path)).splitlines():
            _, kind, name = line.split(maxsplit=2)
            if kind in "WVu" and not name.startswith("DW.ref."):  # of the exception tables, no code
                leaks[path.name].append(name)
    assert not leaks, f"weak symbols: {dict(leaks)}; make them FASTCONV_INLINE or put them in an unnamed namespace"


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs binutils")
def test_units_of_an_instruction_set_export_their_table_only():
    objects = isa_objects()
    if not objects:
        pytest.skip("the library was not built in this checkout")
    for path in objects:
        isa = path.stem.removeprefix("cpu_")
        names = [
            line.split(maxsplit=2)[2]
            for line in run("nm", "--defined-only", "--extern-only", "-C", str(path)).splitlines()
        ]
        # DW.ref. are data of the exception tables.
        allowed = rf"fastconv::\w+_{isa}\(\)|DW\.ref\..*"
        wrong = [name for name in names if not re.fullmatch(allowed, name)]
        assert not wrong, f"{path.name} defines {wrong}"


PRODUCT = r"vfmadd|vdpbf16ps"


def hot_loop(lines: list[str], addresses: list[int]) -> list[str]:
    """Instructions of the innermost backward jump that covers a multiply-add."""
    best: list[str] = []
    for at, line in enumerate(lines):
        jump = re.match(r"j\w+\s+([0-9a-f]+)", line)
        if jump is None:
            continue
        target = int(jump.group(1), 16)
        if target >= addresses[at] or target not in addresses:
            continue
        body = lines[addresses.index(target) : at + 1]
        if any(re.match(PRODUCT, word) for word in body) and (not best or len(body) < len(best)):
            best = body
    return best


def tiles(isa: str) -> dict[str, list[str]]:
    """The hot loop of each tile of one instruction set, by the function's name."""
    [path] = [path for path in isa_objects() if path.stem == f"cpu_{isa}" and path.parent.name == "conv2d"]
    text = run("objdump", "-d", "--no-show-raw-insn", "-C", str(path))
    result = {}
    for block in text.split("\n\n"):
        head, _, body = block.strip().partition("\n")
        name = re.match(r"[0-9a-f]+ <(.*)>:", head)
        if name is None or "multiply_tile" not in name.group(1) or "cold" in name.group(1):
            continue
        instructions = [re.match(r"\s*([0-9a-f]+):\s+(.*)", line) for line in body.splitlines()]
        kept = [match for match in instructions if match]
        lines = [match.group(2).strip() for match in kept]
        result[name.group(1)] = hot_loop(lines, [int(match.group(1), 16) for match in kept])
    return result


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs binutils")
@pytest.mark.parametrize("isa", ["avx2", "avx512", "avx512_bf16"])
def test_hot_loops_stay_in_registers(isa):
    """A sum that is spilled to the stack costs a load and a store at every step of depth."""
    if not [path for path in isa_objects() if path.stem == f"cpu_{isa}"] or "aarch64" in str(isa_objects()[0]):
        pytest.skip("no x86-64 objects in this checkout")
    found = tiles(isa)
    # 6 or 12 rows, 2 vectors, float and double; a by depth or by row, each with either order of b, and a by offsets;
    # and for NHWC a by depth and by offsets with tiles that finish their sums.
    # Of pairs of bfloat16: a by depth or by row, each with tiles that finish theirs.
    wanted_tiles = {"avx2": 6 * 2 * 2 * 7, "avx512": 12 * 2 * 2 * 7, "avx512_bf16": 12 * 2 * 4}[isa]
    assert len(found) == wanted_tiles, sorted(found)
    for name, loop in found.items():
        shape = re.search(r"multiply_tile<.*?(\w+), (\d+), (\d+)", name)
        assert shape is not None
        products = [line for line in loop if re.match(PRODUCT, line)]
        wanted = int(shape.group(2)) * int(shape.group(3))
        assert len(products) % wanted == 0, f"{name}: {len(products)} multiply-adds, expected a multiple of {wanted}"
        assert products, f"{name} has no loop of multiply-adds"
        stack = [line for line in loop if re.search(r"\((%rsp|%rbp)|\(%rsp,", line) and re.search(r"[xyz]mm", line)]
        # Nor addresses, and not to vector registers either, which goes through a port that the products need.
        stack += [line for line in loop if "%rsp" in line or re.match(r"vmov[dq]\s", line)]
        assert not stack, f"{name} spills in its loop: {stack}"


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs binutils")
def test_code_outside_the_isa_units_is_portable():
    """Host code of an x86-64 build must run on every x86-64: no AVX outside the units compiled for it."""
    found = sorted(ROOT.glob("build/release-*/fastconv._C_cpu/csrc/**/*.o"))
    portable = [path for path in found if path not in isa_objects() or path.stem == "cpu_generic"]
    if not portable or "x86_64" not in str(portable[0]):
        pytest.skip("no x86-64 objects in this checkout")
    for path in portable:
        text = run("objdump", "-d", "--no-show-raw-insn", str(path))
        assert not re.search(r"%[yz]mm\d", text), f"{path.name} uses registers that only AVX has"
        assert not re.search(r"\tv[a-z]+[sp][sd] ", text), f"{path.name} holds AVX instructions"


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs binutils")
def test_library_exports_no_kernel():
    exported = run("nm", "-D", "--defined-only", "-C", library_path)
    assert "fastconv::" not in exported, [line for line in exported.splitlines() if "fastconv::" in line]
