"""Index arithmetic past 2^31 elements, without allocating them.

csrc/common/problem.h is the one place where shapes become numbers: a small program is compiled against it, and the same
numbers are asked of the introspection module. The kernels' own loops are read for narrow integers, and run over a
tensor of 2.2e9 elements whose pages are never touched but for the few that a long stride sees.
"""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from fastconv import _C, functional
from fastconv.ops import conv2d as ops

CSRC = Path(__file__).resolve().parent.parent / "csrc"
COMPILER = shutil.which("g++") or shutil.which("clang++")

PROGRAM = r"""
#include <cstdio>
#include "common/problem.h"
#include "conv2d/gemm_plan.h"
using namespace fastconv;

static int failures = 0;
#define CHECK(expression, wanted)                                                                   \
  do {                                                                                              \
    const int64_t got = (expression), want = (wanted);                                              \
    if (got != want)                                                                                \
      ++failures, std::printf("%s is %lld, expected %lld\n", #expression, (long long)got, (long long)want); \
  } while (0)

constexpr int64_t kBig = int64_t(1) << 31;

static_assert(window_positions(kBig, 0, 0, 1, 1, 1) == kBig);
static_assert(window_positions(kBig + 5, 1, 2, 3, 2, 2) == (kBig + 5 + 3 - 4 - 1) / 2 + 1);
static_assert(strides_of(Layout::nchw, 65536, 65536, 3).n == int64_t(65536) * 65536 * 3);
static_assert(strides_of(Layout::nhwc, 65536, 65536, 3).h == int64_t(65536) * 3);

int main() {
  for (Layout layout : {Layout::nchw, Layout::nhwc}) {
    ConvProblem p{};
    p.n = 70000, p.c = 64, p.h = 1000, p.w = 1200;  // 5.4e12 elements
    p.k = 128, p.r = 3, p.s = 5;
    p.stride = {1, 2}, p.dilation = {2, 1}, p.padding = {1, 2, 3, 4};
    p.layout = layout;
    CHECK(p.p(), 1000 + 4 - 2 * 2);
    CHECK(p.q(), (1200 + 6 - 4 - 1) / 2 + 1);
    CHECK(p.input_strides().n, int64_t(64) * 1000 * 1200);
    CHECK(p.output_strides().n, int64_t(128) * p.p() * p.q());
    CHECK(p.flops(), 2 * int64_t(70000) * 128 * p.p() * p.q() * 64 * 15);
    CHECK(p.bytes(), 4 * (int64_t(70000) * 64 * 1000 * 1200 + 128 * 64 * 15 + int64_t(70000) * 128 * p.p() * p.q()));

    std::vector<Tap> taps;
    const GemmConv forward = forward_product(p, nullptr, nullptr, nullptr, taps);
    CHECK(forward.x_strides.n * (forward.n - 1), int64_t(69999) * 64 * 1000 * 1200);
    CHECK(forward.y_strides.n * (forward.n - 1), int64_t(69999) * 128 * p.p() * p.q());
    CHECK(forward.tap_count, 15);
    CHECK(taps[0].dh, -1);
    CHECK(taps[14].dw, 2);

    // Phases of the input gradient: every row and column of the input belongs to exactly one.
    int64_t rows = 0, columns = 0;
    for (int64_t b = 0; b < 2; ++b) {
      const GemmConv phase = input_grad_product(p, {0, b}, nullptr, nullptr, nullptr, taps);
      columns += phase.j, rows = phase.i;
      CHECK(phase.y_strides.w, 2 * p.input_strides().w);
      CHECK(phase.y_offset, b * p.input_strides().w);
    }
    CHECK(rows, 1000);
    CHECK(columns, 1200);

    // One plane of more than 2^31 pixels
    ConvProblem wide{};
    wide.n = 1, wide.c = 1, wide.h = 3, wide.w = kBig;
    wide.k = 1, wide.r = 1, wide.s = 1;
    wide.layout = layout;
    CHECK(wide.q(), kBig);
    CHECK(wide.output_strides().n, 3 * kBig);

    PoolProblem pool{};
    pool.n = 3, pool.c = 7, pool.h = 50000, pool.w = 60000, pool.r = 3, pool.s = 2;
    pool.stride = {2, 2}, pool.padding = {1, 1};
    pool.layout = layout, pool.ceil_mode = true;
    CHECK(pool.p(), 25001);
    CHECK(pool.q(), 30001);
    CHECK(pool.input_strides().n, int64_t(7) * 50000 * 60000);
    CHECK(pool.output_strides().n, int64_t(7) * 25001 * 30001);
  }
  return failures;
}
"""


@pytest.mark.skipif(COMPILER is None or not CSRC.exists(), reason="needs a C++ compiler and the sources")
def test_index_header(tmp_path):
    source, program = tmp_path / "index.cpp", tmp_path / "index"
    source.write_text(PROGRAM)
    flags = ["-std=c++20", "-O1", "-Wall", "-Wconversion", "-Werror=conversion", "-fsanitize=undefined",
             "-fno-sanitize-recover=all", f"-I{CSRC}"]  # fmt: skip
    build = [COMPILER, *flags, str(source), str(CSRC / "conv2d" / "cpu_plan.cpp"), "-o", str(program)]
    compiled = subprocess.run(build, capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_plans_of_huge_problems():
    """The introspection module answers for shapes that no machine could hold."""
    shape, weight = (70000, 64, 1000, 1200), (128, 64, 3, 3)
    for channels_last, dtype in itertools.product([False, True], ["float32", "float64", "float16", "bfloat16"]):
        plan = _C.plan_conv2d(
            shape, weight, stride=(1, 1), padding=(1, 1, 1, 1), dilation=(1, 1), groups=1,
            channels_last=channels_last, dtype=dtype, pass_name="forward",
        )  # fmt: skip
        assert plan["output_shape"] == (70000, 128, 1000, 1200)
        assert plan["flops"] == 2 * 70000 * 128 * 1000 * 1200 * 64 * 9
        size = {"float32": 4, "float64": 8}.get(dtype, 2)
        assert plan["bytes"] == size * (70000 * 1000 * 1200 * (64 + 128) + 128 * 64 * 9)
    window = {"kernel": (2, 2), "stride": (2, 2), "padding": (0, 0), "dilation": (1, 1)}
    pool = _C.plan_pool("max_pool2d", shape, **window, ceil_mode=False, divisor_override=False, dtype="float32")
    assert pool["output_shape"] == (70000, 64, 500, 600)
    assert pool["bytes"] == 4 * 70000 * 64 * (1000 * 1200 + 500 * 600)


NARROW = re.compile(r"\b(?:u?int(?:8|16|32)_t|unsigned|short|size_t|long|int) (\w+) ?(?==[^=]|;|,|\)|\{)")
LOOP = re.compile(r"for \(int (\w+) = ([^;]*); \1 < ([^;]*);")
DERIVED = re.compile(r"const int (\w+) = ([^;]*);")
CONSTANT = re.compile(r"k[A-Z]\w*$")
TYPES = {"Acc", "T", "X", "Y", "simd", "int", "int64_t", "static_cast", "sizeof"}
# Bit patterns of 16-bit numbers, and the window offsets that are int32 by design.
BITS = {"bits", "sign", "magnitude", "half", "raw", "a"}  # a: the phase of a stride of 2, 0 or 1
# Positions in a register tile: fields and parameters that only ever hold numbers up to a tile's width.
IN_TILE = {"lane", "length", "run_count"}


def narrow_integers(text: str) -> list[str]:
    """Declarations of integers under 64 bits, other than those that compile-time constants bound."""
    bounded = set(IN_TILE | BITS)
    for pattern in (LOOP, DERIVED, DERIVED):
        for match in pattern.finditer(text):
            if all(
                CONSTANT.match(name) or name in bounded | TYPES
                for name in re.findall(r"[A-Za-z_]\w*", match.group(match.lastindex))
            ):
                bounded.add(match.group(1))
    return [name for name in NARROW.findall(text) if not CONSTANT.match(name) and name not in bounded]


def test_narrow_integers_are_found():
    """The search below must be able to fail."""
    assert narrow_integers("for (int n = 0; n < p.n; ++n)") == ["n"]
    assert narrow_integers("int offset = n * p.x_strides.n;") == ["offset"]
    assert narrow_integers("const int j = (e - s) / kStep;") == ["j"]
    assert narrow_integers("for (int e = 0; e < kWidth; ++e) { const int j = e / kStep; }") == []


@pytest.mark.skipif(not CSRC.exists(), reason="reads the sources")
def test_kernels_count_in_64_bits():
    """Loops over a tensor's axes and offsets into it are int64_t: what is narrower must be bounded by a constant."""
    found = {}
    for path in sorted(CSRC.rglob("cpu*")):
        names = narrow_integers(re.sub(r"//.*|\bconstexpr int\b", "", path.read_text()))
        if names:
            found[str(path.relative_to(CSRC))] = names
    assert found == {}


ROWS, COLUMNS = 33001, 33000  # of 2 channels: 2.18e9 elements, 8.7 GB as float32
STRIDE = (500, 500)


@pytest.fixture(scope="module", params=[False, True], ids=["nchw", "nhwc"])
def huge(request):
    """(1, 2, 33001, 33000) in either format, zero but for the pixels that a window of 1x1 with the stride above sees.

    Pages that nobody touches are not there: only one row in 500 is.
    """
    try:
        memory = torch.from_numpy(np.zeros(2 * ROWS * COLUMNS, dtype=np.float32))
    except MemoryError:
        pytest.skip("no address space for 8.7 GB of zero pages")
    shape = (1, ROWS, COLUMNS, 2) if request.param else (1, 2, ROWS, COLUMNS)
    tensor = memory.view(shape)
    tensor = tensor.permute(0, 3, 1, 2) if request.param else tensor
    assert tensor.is_contiguous(memory_format=torch.channels_last if request.param else torch.contiguous_format)
    seen = tensor[:, :, :: STRIDE[0], :: STRIDE[1]]
    seen.copy_(torch.randint(-8, 9, seen.shape))
    return tensor, seen.clone(memory_format=torch.contiguous_format)


@pytest.mark.slow
@pytest.mark.parametrize("algo", [None, "naive"])
@pytest.mark.parametrize("groups", [1, 2])
def test_convolution_reads_past_2_31_elements(huge, groups, algo):
    input, seen = huge
    assert input.numel() > 2**31
    weight = torch.randint(-4, 5, (2, 2 // groups, 1, 1)).float().requires_grad_()
    with torch.no_grad():
        output = functional.conv2d(input, weight, stride=STRIDE, groups=groups, algo=algo)
    expected = torch.nn.functional.conv2d(seen, weight, groups=groups)
    assert torch.equal(output, expected)
    grad = torch.randint(-2, 3, output.shape).float()
    arguments = ((1, 1), STRIDE, (0, 0, 0, 0), (1, 1), groups, algo)
    [wanted] = torch.autograd.grad(expected, weight, grad)
    assert torch.equal(ops.conv2d_weight_grad(grad, input, *arguments), wanted)


@pytest.mark.slow
def test_pooling_reads_past_2_31_elements(huge):
    input, seen = huge
    output, indices = functional.max_pool2d(input, 1, STRIDE, return_indices=True)
    assert torch.equal(output, seen)
    rows = torch.arange(0, ROWS, STRIDE[0]).reshape(-1, 1) * COLUMNS
    assert torch.equal(indices, (rows + torch.arange(0, COLUMNS, STRIDE[1])).expand(1, 2, -1, -1))
    assert torch.equal(functional.avg_pool2d(input, 1, STRIDE), seen)
