"""float32 on tensor cores, run by the emulator: TF32, and the split into two TF32 numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cuda_convolutions import CudaRun, assert_matches, check_epilogue, configured
from emulator_library import Library, Timing, build, note_error
from reference import Conv, allowances, assert_within, results_by_torch
from test_cuda_implicit_gemm_mma import LAYOUTS, PROBLEMS, random_problem

SOURCES = [f"csrc/conv2d/cuda_implicit_gemm_mma_{part}.cu" for part in ("tf32", "weight_grad_tf32")]
# What a product x y may lose: each operand is rounded to 11 bits, or less than 3 * 2^-22 |x y| in all is left out.
LOSSES = {"implicit_gemm_tf32": 2.0**-11 + 2.0**-11 + 2.0**-22, "implicit_gemm_3xtf32": 3 * 2.0**-22}
ALGOS = pytest.mark.parametrize("algo", LOSSES)


@pytest.fixture(scope="module")
def library() -> Library:
    return build(SOURCES)


def check(library: Library, algo: str, problem: Conv, channels_last: bool, offset: int = 0) -> float:
    """Gives the largest error of the output in units of float32's epsilon and the result's root mean square."""
    run = CudaRun(problem, channels_last, offset)
    results = run.results(library, algo)
    if problem.integers:
        assert_matches(run, results, algo)
        return 0
    exact, allowed = results_by_torch(run.problem, torch.float64), allowances(run.problem)
    x, weight, grad = (run.tensors[name].double().abs() for name in ("x", "weight", "grad"))
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    top, left, bottom, right = problem.padding
    padded = torch.nn.functional.pad(leaves[0], (left, right, top, bottom))
    sums = torch.nn.functional.conv2d(padded, leaves[1], None, problem.stride, 0, problem.dilation, problem.groups)
    grads = torch.autograd.grad(sums, leaves, grad)
    magnitudes = {"output": sums.detach(), "input": grads[0], "weight": grads[1]}
    for name, result in results.items():
        assert_within(result, exact[name], allowed[name] + LOSSES[algo] * magnitudes[name], f"{name} of {problem}")
    unit = torch.finfo(torch.float32).eps * exact["output"].square().mean().sqrt().item()
    error = (results["output"].double() - exact["output"]).abs().max().item() / max(unit, 1e-30)
    note_error("conv2d", algo, error)
    return error


@ALGOS
@LAYOUTS
@pytest.mark.parametrize("name", PROBLEMS)
def test_small_integers_are_exact(library: Library, name: str, algo: str, channels_last: bool) -> None:
    check(library, algo, replace(PROBLEMS[name], dtype=torch.float32), channels_last)


@ALGOS
@LAYOUTS
@pytest.mark.parametrize("seed", range(10))
def test_random_problems(library: Library, seed: int, algo: str, channels_last: bool) -> None:
    with configured(library, sm_count=(1, 3, 132)[seed % 3], seed=seed):
        check(library, algo, replace(random_problem(seed), dtype=torch.float32), channels_last, seed % 4 // 2)


@LAYOUTS
def test_the_split_is_worth_hundreds_of_roundings(library: Library, channels_last: bool) -> None:
    """Random numbers, 3x3 of 40 channels, in units of epsilon: 10,000 for TF32, 28 to 51 for two (CPU: 7 to 11)."""
    problem = replace(PROBLEMS["3x3"], dtype=torch.float32, integers=False)
    errors = {algo: check(library, algo, problem, channels_last) for algo in LOSSES}
    assert errors["implicit_gemm_tf32"] > 100 * errors["implicit_gemm_3xtf32"]


@ALGOS
@LAYOUTS
def test_every_tile(library: Library, algo: str, channels_last: bool) -> None:
    problem = Conv(c_per_group=76, k_per_group=200, size=(11, 13), padding=(1,) * 4, integers=True, n=1)
    for sm_count in (1, 132):
        with configured(library, sm_count=sm_count):
            check(library, algo, problem, channels_last)


@ALGOS
@LAYOUTS
def test_weight_gradients_of_many_shares(library: Library, algo: str, channels_last: bool) -> None:
    for window, c, k, size in ((1, 20, 36, (16, 24)), (3, 8, 8, (23, 25)), (1, 9, 5, (27, 31))):
        problem = Conv(c_per_group=c, k_per_group=k, size=size, kernel=(window, window), integers=True)
        with configured(library, sm_count=3):
            check(library, algo, problem, channels_last)


@LAYOUTS
@pytest.mark.parametrize("timing", list(Timing), ids=str)
def test_no_races(timing: Timing, channels_last: bool) -> None:
    checked = build(SOURCES, "checked")
    with configured(checked, timing=timing, check_races=True, sm_count=132):
        for problem in (Conv(c_per_group=12, k_per_group=8, size=(4, 6)), Conv(c_per_group=9, k_per_group=5)):
            check(checked, "implicit_gemm_tf32", replace(problem, integers=True), channels_last)


@LAYOUTS
def test_epilogue(library: Library, channels_last: bool) -> None:
    for k, size in ((8, (4, 6)), (11, (5, 7))):
        problem = Conv(c_per_group=8, k_per_group=k, size=size, padding=(1,) * 4, integers=True)
        check_epilogue(library, "implicit_gemm_3xtf32", problem, "relu", channels_last)


def test_refuses_other_types(library: Library) -> None:
    for algo in LOSSES:
        with pytest.raises(RuntimeError, match="it needs float32"):
            CudaRun(Conv(dtype=torch.float16)).forward(library, algo)
