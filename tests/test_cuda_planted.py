"""Mistakes planted in the CUDA kernels: the checks of the other tests must catch each.

A bug replaces a piece of a kernel's text, which must be there once. All bugs of a family are compiled into one library,
where a number says which of them is in force; with none, the library must pass.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import cuda_fuzz
import pytest
from emulator_library import ROOT, build_file


@dataclass(frozen=True)
class Bug:
    file: str
    right: str
    wrong: str

    @property
    def is_statement(self) -> bool:
        return self.right.endswith(";")

    def planted(self, text: str, number: int) -> str:
        assert text.count(self.right) == 1, f"{self.file} has {text.count(self.right)} times {self.right!r}"
        in_force = f"fastconv_planted_bug == {number}"
        if self.is_statement:
            return text.replace(self.right, f"if ({in_force}) {{ {self.wrong} }} else {{ {self.right} }}")
        return text.replace(self.right, f"({in_force} ? ({self.wrong}) : ({self.right}))")


# In every file that has a bug.
SWITCH = """#if !defined(FASTCONV_PLANTED_BUG)
#define FASTCONV_PLANTED_BUG
extern "C" {
inline __attribute__((visibility("default"))) int fastconv_planted_bug = 0;
}
#endif
"""


def build_with_bugs(family: str, bugs: list[Bug]) -> Path:
    """The family's library, with the bugs numbered from 1."""
    overlay = ROOT / "build" / "emulator" / f"planted-{family}"
    texts: dict[str, str] = {}
    for number, bug in enumerate(bugs, 1):
        before = texts.get(bug.file) or (ROOT / "csrc" / bug.file).read_text()
        texts[bug.file] = bug.planted(before, number)
    for name, text in texts.items():
        target, text = overlay / "csrc" / name, SWITCH + text
        if not target.exists() or target.read_text() != text:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
    return build_file(cuda_fuzz.FAMILIES[family][0], "planted", overlay=overlay)


POOL = [
    Bug("pool/cuda_reduce.cuh", "wide > value[i] || wide != wide", "wide >= value[i] || wide != wide"),
    Bug("pool/cuda_reduce.cuh", "x > value || x != x ? x : value", "x > value ? x : value"),
    Bug("pool/cuda_max.cuh", "left == 0 && best[o].offset[0] % kWindow == 0", "false"),
    Bug("pool/cuda_max.cuh", "min(max(left + s, 0), g.w - 1)", "max(left + s, 0)"),
    Bug("pool/cuda_max_backward.cuh", "kPad == 1 && left + kIn < g.q", "false"),
    Bug("pool/cuda_max_backward.cuh", "exists ? offset[ki][kj][n] : -1", "offset[ki][kj][n]"),
    Bug("pool/cuda_average.cuh", "min(start + window, size + pad)", "min(start + window, size)"),
    Bug("pool/cuda_average.cuh", "step.divide((i + 1) * size + positions - 1)", "step.divide((i + 1) * size)"),
    Bug("pool/cuda_average.cuh", "divisor != 0", "divisor > 0"),
    Bug("pool/cuda_global.cu", "staged[i] = from[i];", ""),
    # Reads one number beside the tensor and drops it: the fences of cuda_memory.py.
    Bug("pool/cuda_global.cu", "min(first + which, planes - 1)", "first + which"),
    Bug("pool/cuda_select.h", "p.w % lanes == 0", "true"),
    Bug("pool/cuda_select.h", "aligned(wide, 16) && aligned(narrow, 16)", "true"),
]
NORM = [
    Bug("norm/cuda_channels.cuh", "i < 0 ? !place.has_before : i >= N && !place.has_after", "false"),
    Bug("norm/cuda_channels.cuh", "has_before ? load_vector<kMargin>(own - kMargin) : none", "none"),
    Bug("norm/cuda_walk.cuh", "if (!exists) share[kStep + i][n] = 0;", ""),
    Bug("norm/cuda_walk.cuh", "shift(direct);", ""),
    Bug("norm/cuda_any.cuh", "max(-response.after, -place.channel)", "max(-response.before, -place.channel)"),
    Bug("norm/cuda_power.cuh", "root == 0 || root == INFINITY ? root : fourth", "fourth"),
    Bug("norm/cuda_response.cu", "p.c % (16 / bytes) == 0 && all_aligned(pointers, 16)", "p.c % (16 / bytes) == 0"),
]
DEPTHWISE = [
    Bug("depthwise/cuda_slide.cuh", "tap == 0", "false"),
    Bug("depthwise/cuda_planes.cuh", "min(count, (kPiece - skew) % kPiece)", "0"),
    Bug("depthwise/cuda_planes.cuh", "copy[at] = from[at];", ""),
    Bug("depthwise/cuda_planes.cu", "column + 1 < width", "true"),
    Bug("depthwise/cuda_pass.h", "narrow(live - 1 - shift - first)", "narrow(live - 1 - first)"),
    Bug(
        "depthwise/cuda_channels.cuh",
        "static_cast<unsigned>(first_column + i) < static_cast<unsigned>(width)",
        "static_cast<unsigned>(first_column + i) <= static_cast<unsigned>(width)",
    ),
    Bug("depthwise/cuda_channels.cu", "column + q >= pass.w.out", "false"),
    Bug("depthwise/cuda_weight_grad_planes.cu", "ptx::cp_async_wait_group<1>();", "ptx::cp_async_wait_group<2>();"),
    Bug("depthwise/cuda_weight_grad_planes.cu", "blocks.channels == 1 ? kPlaneThreads : per_channel", "kPlaneThreads"),
    Bug("depthwise/cuda_weight_grad_channels.cu", "first_channel + own < static_cast<unsigned>(channels)", "true"),
    Bug("depthwise/cuda_launch.cu", "slots(forward_pass(p)) * p.c * p.r * p.s", "p.c * p.r * p.s"),
]
STEM = [
    Bug("conv2d/cuda_stem_input_grad.cu", "tile.h.reach - phase.taps_h", "0"),
    Bug("conv2d/cuda_stem_input_grad.cu", "tile.w.reach - phase.taps_w", "0"),
    Bug("conv2d/cuda_stem_input_grad.cu", "is_aligned(grad_y, p.k, sizeof(T), 16)", "true"),
    Bug("conv2d/cuda_stem_input_grad.cu", "min(tile.filters, filters - k)", "tile.filters"),
    Bug(
        "conv2d/cuda_stem_input_grad.cu",
        "window / stride * place + min(window % stride, place)",
        "window / stride * place",
    ),
    Bug("conv2d/cuda_stem_weight_grad.cu", "turn == 0", "false"),
    Bug("conv2d/cuda_stem_mma.cu", "inside ? from[base[2 * m]] : uint2{0, 0}", "from[base[2 * m]]"),
]
GEMM = [
    Bug("conv2d/cuda_implicit_gemm.cuh", "at >= 0 && at < size", "at < size"),
    Bug("conv2d/cuda_implicit_gemm.cuh", "index >= extent<kAxis>(g, windows)", "false"),
    Bug(
        "conv2d/cuda_implicit_gemm.cuh",
        "(a.rows & b.rows) != 0 && (a.columns & b.columns) != 0",
        "(a.rows & b.rows) != 0 && b.columns != 0",
    ),
    Bug("conv2d/cuda_implicit_gemm.cuh", "(origin - r * apart) % by != 0", "false"),
    Bug("conv2d/cuda_implicit_gemm.cuh", "r - first", "by"),
    Bug("conv2d/cuda_implicit_gemm.cuh", "every * apart / by", "every"),
    Bug("conv2d/cuda_implicit_gemm.cuh", "phase % g.phases_w", "phase % g.phases_h"),
    Bug("conv2d/cuda_implicit_gemm.cuh", "w.first + s * w.every", "s * w.every"),
    Bug("conv2d/cuda_implicit_gemm_fp32.cuh", "ptx::cp_async_wait_group<0>();", "ptx::cp_async_wait_group<1>();"),
    Bug("conv2d/cuda_implicit_gemm_fp32.cuh", "stage % kStagesLookedUp == 0", "stage == 0"),
    Bug("conv2d/cuda_implicit_gemm_fp32.cuh", "stage / kStagesLookedUp % 2", "0"),
    Bug("conv2d/cuda_implicit_gemm_fp32.cuh", "min(share, stages - block.first_stage)", "share + 1"),
    Bug("conv2d/cuda_implicit_gemm_fp32.cuh", "reinterpret_cast<uintptr_t>(result + first) % 16 == 0", "true"),
    Bug(
        "conv2d/cuda_implicit_gemm_fp32.cuh",
        "shared.columns[column + 3].offset == shared.columns[column].offset + 3",
        "true",
    ),
    Bug("conv2d/cuda_implicit_gemm_fp32.cuh", "block.group * at.columns_group", "0"),
    Bug("conv2d/cuda_implicit_gemm_fp32.cuh", "block.group * at.result_group", "0"),
    Bug("conv2d/cuda_implicit_gemm_fp32.cuh", "index / channel_elements % channels", "index % channels"),
    Bug("conv2d/cuda_implicit_gemm_fp32_launch.cuh", "is_aligned(data, together, sizeof(float), 16)", "together > 3"),
    Bug("conv2d/cuda_implicit_gemm_fp32_launch.cuh", "tensor == GemmTensor::grid || one_pixel", "true"),
    Bug("conv2d/cuda_implicit_gemm_plan.h", "ceil_div(p.h, p.stride.h)", "p.h / p.stride.h"),
]

MMA = [
    Bug(f"conv2d/cuda_implicit_gemm_mma{part}", right, wrong)
    for part, right, wrong in (
        ("_loop.cuh", "ptx::cp_async_wait_group<kStages - 2>();", "ptx::cp_async_wait_group<kStages - 1>();"),
        ("_operands.cuh", "count > 0 ? 16 : 0", "16"),
        ("_operands.cuh", "i < count ? from[i] : from_float<T>(0.0f)", "from[i]"),
        ("_operands.cuh", "channel + i * kDepths < channels", "true"),
        ("_operands.cuh", "at[i].high < block.h.taps && filter < p.depth && rest > 0", "rest > 0"),
        ("_gather.cuh", "at.high < p.depth ? 1u << at.middle | 0x10000u << at.low : kNoRow", "1u << at.middle"),
        ("_gather.cuh", "filter < p.depth && row < block.h.taps ? 1 : kNoRow", "1"),
        ("_output.cuh", "h >= block.h.write_size || w >= block.w.write_size", "false"),
        ("_forward.cu", "all_vectors(p, p.c_per_group(), tensors.read, tensors.weight)", "true"),
        ("_shares.cuh", "sum += partial[int64_t{share} * results + at];", "sum += partial[at];"),
        ("_weight_operands.cuh", "at < p.pixels && rest > 0", "rest > 0"),
        ("_weight_operands.cuh", "exists && i * kStep < rest", "i * kStep < rest"),
        ("_weight_grad.cuh", "tap < taps ? p.depth - channel : 0", "p.depth - channel"),
    )
]
TF32 = [
    Bug(f"conv2d/cuda_implicit_gemm_mma{part}", right, wrong)
    for part, right, wrong in (
        ("_loop.cuh", "__uint_as_float(bits) - __uint_as_float(tf32_of(bits))", "0.0f"),
        ("_loop.cuh", "ptx::mma_m16n8k8_tf32(d, left_rest, right);", ";"),
        ("_loop.cuh", "ptx::mma_m16n8k8_tf32(d, left, right_rest);", ";"),
        ("_weight_floats.cuh", "pixel < p.pixels ? rest : 0", "rest"),
        ("_weight_floats.cuh", "if (at < 0) count = 0;", ";"),
        ("_weight_floats.cuh", "i < count ? from[i] : 0.0f", "from[i]"),
        ("_tf32.cu", "all_vectors(p, p.k_per_group(), grad_y)", "true"),
    )
]

FAMILIES = {
    "pool": (POOL, 40),
    "norm": (NORM, 80),
    "depthwise": (DEPTHWISE, 40),
    "stem": (STEM, 20),
    "gemm": (GEMM, 24),
    "mma": (MMA, 25),
    "tf32": (TF32, 25),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_planted_bug_is_caught(family: str) -> None:
    bugs, problems = FAMILIES[family]
    library = build_with_bugs(family, bugs)
    command = [sys.executable, cuda_fuzz.__file__, family, "--count", str(problems)]
    run = subprocess.run(
        [*command, "--planted", str(library), "--bugs", str(len(bugs))],
        env=os.environ | {"FASTCONV_FENCES": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    missed = [int(number) for number in run.stdout.split()]
    assert 0 not in missed, "the kernels fail without a bug"
    assert not missed, f"not noticed: {[bugs[number - 1] for number in missed]}"
