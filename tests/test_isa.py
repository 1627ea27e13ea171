"""Every instruction set that this machine has: the key tests again, in processes that are told to use it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastconv
from fastconv import _C

TESTS = Path(__file__).resolve().parent
ISAS = [isa for isa in _C.supported_isas() if isa != _C.active_isa()]
# Numbers by hand, all small cases exactly, long sums, random problems, views, special values.
SUBSET = ["test_conv2d.py", "test_properties.py", "test_properties_pool.py", "test_edges.py", "test_depthwise.py",
          "test_pool.py", "test_norm.py", "test_conv2d_fused.py"]  # fmt: skip
EXCEPT = "not opcheck and not compile and not export and not gradcheck and not threads"


def environment(isa: str, **more: str) -> dict[str, str]:
    # Freed and fresh memory of the C library holds garbage from the first allocation on.
    folder = str(Path(fastconv.__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, "FASTCONV_CPU_ISA": isa, "MALLOC_PERTURB_": "127", **more}


def test_the_widest_is_chosen_and_all_are_listed():
    order = ["generic", "neon", "avx2", "avx512", "avx512_bf16"]
    if not os.environ.get("FASTCONV_CPU_ISA"):
        assert _C.active_isa() == max(_C.supported_isas(), key=order.index)
    assert "generic" in _C.supported_isas()


@pytest.mark.skipif("FASTCONV_CPU_ISA" in os.environ, reason="this process has been told already")
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("file", [name for name in SUBSET if (TESTS / name).exists()])
def test_key_tests(isa, file):
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not slow"]
    result = subprocess.run(
        [*command, str(TESTS / file), "-k", EXCEPT],
        env=environment(isa, FASTCONV_EXAMPLES="600"),
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert f"instruction set {isa}," in result.stdout, "the header says which one the tests ran on"
    assert " passed" in result.stdout


@pytest.mark.parametrize("isa", _C.supported_isas())
def test_the_variable_is_obeyed_by_both_libraries(isa):
    """The operators and the introspection module are two libraries: both must read it, and the answer must be right."""
    script = (
        "import torch, fastconv; from fastconv import _C; x = torch.arange(2 * 3 * 9 * 9.).reshape(2, 3, 9, 9);"
        "w = torch.arange(27.).reshape(1, 3, 3, 3);"
        "y = torch.nn.functional.conv2d(x.double(), w.double()).float();"
        "assert torch.equal(fastconv.functional.conv2d(x, w), y);"
        "print(_C.active_isa())"
    )
    result = subprocess.run([sys.executable, "-c", script], env=environment(isa), capture_output=True, text=True)
    assert result.stdout.strip() == isa, result.stderr


def test_instruction_sets_run_code_of_their_own():
    """The generic build rounds every product, the others fuse it with the sum: last bits of long sums must differ."""
    script = (
        "import torch, fastconv, hashlib; torch.manual_seed(0);"
        "x, w = torch.randn(1, 64, 9, 9), torch.randn(32, 64, 3, 3);"
        "ours = fastconv.functional.conv2d(x, w); exact = torch.nn.functional.conv2d(x.double(), w.double());"
        "assert (ours - exact).abs().max() < 1e-4; print(hashlib.sha256(ours.numpy().tobytes()).hexdigest())"
    )
    results = {}
    for isa in _C.supported_isas():
        run = subprocess.run([sys.executable, "-c", script], env=environment(isa), capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        results[isa] = run.stdout.strip()
    fused = {results[isa] for isa in results if isa != "generic"}
    assert results["generic"] not in fused


@pytest.mark.skipif("avx512_bf16" not in _C.supported_isas(), reason="this CPU has no AVX512-BF16")
def test_only_its_own_level_multiplies_pairs_of_bfloat16():
    script = (
        "import torch, fastconv; x, w = torch.ones(1, 8, 9, 9).bfloat16(), torch.ones(8, 8, 3, 3).bfloat16();"
        "y = fastconv.functional.conv2d(x, w); assert torch.equal(y, torch.full_like(y, 72));"
        "print(*fastconv.stats())\n"
        "try: fastconv.functional.conv2d(x, w, algo='pairs'); print('served')\n"
        "except RuntimeError as error: print(error)"
    )
    printed = {}
    for isa in ("avx512", "avx512_bf16"):
        run = subprocess.run([sys.executable, "-c", script], env=environment(isa), capture_output=True, text=True)
        printed[isa] = run.stdout.splitlines()
    assert printed["avx512_bf16"] == ["conv2d/pairs", "served"]
    assert printed["avx512"][0] == "conv2d/tiled"
    assert "it needs the instruction set avx512_bf16" in printed["avx512"][1]


@pytest.mark.parametrize("isa", ["avx1024", "AVX2", "neon" if "neon" not in _C.supported_isas() else "avx512"])
def test_an_instruction_set_that_is_not_there_is_an_error(isa):
    """Not an illegal instruction, and not silently another one."""
    script = "import torch, fastconv; fastconv.functional.conv2d(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3))"
    result = subprocess.run([sys.executable, "-c", script], env=environment(isa), capture_output=True, text=True)
    assert result.returncode == 1, "the process must end with Python's exception"
    assert f"FASTCONV_CPU_ISA is {isa}" in result.stderr
    assert "expected one of generic, neon, avx2, avx512, avx512_bf16" in result.stderr or "unset it" in result.stderr
