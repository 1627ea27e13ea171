"""Random problems for the CUDA kernels in the emulator, tensors between pages that may not be touched.

    PYTHONPATH=.:tests FASTCONV_FENCES=1 python tests/cuda_fuzz.py pool --seed 100 --count 500 [--kind checked]

A line for each problem before it runs: a process that dies says where. Problems are small, and chosen for what is
rarely right: odd sizes, tensors of one element, padding on one side, few multiprocessors, little shared memory.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import os
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import test_cuda_conv2d
import test_cuda_depthwise
import test_cuda_implicit_gemm
import test_cuda_implicit_gemm_mma
import test_cuda_implicit_gemm_tf32
import test_cuda_norm
import test_cuda_pool
import test_cuda_pool_average
import test_cuda_stem
import torch
from cuda_convolutions import ACTIVATIONS, CudaRun, assert_matches, check_epilogue
from cuda_memory import DTYPES, generators, whole_numbers
from cuda_pools import drawn, gradient_of
from emulator_library import Library, Timing, build
from reference import Conv


def fuzz_direct(library: Library, seed: int) -> None:
    run = CudaRun(say(test_cuda_conv2d.random_problem(seed)), seed % 4 < 2, seed % 3)
    assert_matches(run, run.results(library, "direct"), "direct")


def fuzz_bias(library: Library, seed: int) -> None:
    dice = random.Random(seed)
    shape = (dice.randint(1, 9), dice.choice([1, 3, 64, 70, 130]), dice.randint(1, 9), dice.randint(1, 9))
    test_cuda_conv2d.check_bias_grad(library, DTYPES[seed % 3], say(shape), seed % 2 == 0)


def fuzz_stem(library: Library, seed: int) -> None:
    problem = test_cuda_stem.random_problem(seed)
    if seed % 5 == 0:
        problem = replace(problem, k_per_group=random.Random(seed).randint(1, 100))
    test_cuda_stem.check(library, say(problem), seed % 4 < 2, seed % 3)
    if seed % 5 == 1:
        for algo in ("stem", "stem_mma"):
            test_cuda_stem.check_nan(library, algo, *say((3, 1), (5, 1), (7, 2))[seed % 3], seed % 2 == 0)


def fuzz_gemm(library: Library, seed: int) -> None:
    dice = random.Random(seed)
    problem = test_cuda_implicit_gemm.random_problem(seed)
    if seed % 3 == 0:  # several looked-up batches of the depth, and on a large device several parts
        problem = replace(problem, n=dice.randint(1, 4), c_per_group=dice.choice([28, 41, 64]), k_per_group=33)
    test_cuda_implicit_gemm.check(library, say(problem), seed % 4 < 2, dice.choice([0, 0, 1, 4]))
    if seed % 3 == 0:
        activation = dice.choice(list(ACTIVATIONS))
        check_epilogue(library, test_cuda_implicit_gemm.ALGO, problem, activation, seed % 2 == 0)


def fuzz_mma(library: Library, seed: int) -> None:
    problem, dice = test_cuda_implicit_gemm_mma.random_problem(seed), random.Random(seed)
    kind = dice.choice(["any", "any", "planes", "shares"])
    if kind == "planes":  # 1x1 on planes of whole chunks
        problem = replace(problem, kernel=(1, 1), padding=(0,) * 4, stride=(1, 1), size=(dice.randint(1, 9), 8))
        problem = replace(problem, c_per_group=8 * dice.randint(1, 9), k_per_group=8 * dice.randint(1, 9))
    if kind == "shares":  # of the depth, and of the pixels; no 3x3, which the CPU may compute by Winograd
        problem = replace(problem, n=5, size=(14, 15), kernel=(3, 2), c_per_group=100, k_per_group=70, groups=1)
        library.configure(seed=seed, sm_count=132)
    test_cuda_implicit_gemm_mma.check(library, say(problem), dice.random() < 0.5, dice.choice([0, 0, 1]))


def fuzz_tf32(library: Library, seed: int) -> None:
    problem = replace(test_cuda_implicit_gemm_mma.random_problem(seed), dtype=torch.float32)
    algo = ("implicit_gemm_tf32", "implicit_gemm_3xtf32")[seed // 2 % 2]
    test_cuda_implicit_gemm_tf32.check(library, algo, say(problem), seed % 2 == 0, seed % 3)


def fuzz_depthwise(library: Library, seed: int) -> None:
    dice = random.Random(seed)
    window = dice.choice([3, 3, 3, 5, 7])
    padding = tuple(dice.choice([window // 2, dice.randint(0, window)]) for _ in range(4))
    size = tuple(max(1, window - padding[i] - padding[i + 2]) + dice.choice([0, 1, 6, 17, 40]) for i in range(2))
    problem = Conv(
        n=dice.choice([1, 2, 3, 17]),
        groups=dice.choice([2, 3, 8, 12, 16, 33, 130, 136]),
        c_per_group=1,
        k_per_group=1,
        size=(size[0], size[1]),
        kernel=(window, window),
        stride=(1 + seed % 2,) * 2,
        padding=(padding[0], padding[1], padding[2], padding[3]),
        dtype=dice.choice(DTYPES),
        integers=dice.random() < 0.5,
        seed=seed,
    )
    test_cuda_depthwise.check(library, say(problem), dice.random() < 0.5, dice.choice([0, 0, 1]))


def fuzz_pool(library: Library, seed: int) -> None:
    choose, generator = generators(seed)
    pool = say(drawn(choose))
    values = test_cuda_pool.spiced(whole_numbers(pool.shape, pool.dtype, generator), seed % 3, generator)
    test_cuda_pool.check_max(library, pool, values, gradient_of(pool, generator))
    regular = drawn(choose, dilated=False)
    divisor = say(test_cuda_pool_average.DIVISORS[seed % 4], regular)[0]
    test_cuda_pool_average.check_average(library, regular, divisor, generator)
    size = (choose.randint(1, 20), choose.randint(1, 20))
    adaptive = say(replace(pool, kernel=(1, 1), stride=(1, 1), padding=(0, 0), dilation=(1, 1), ceil_mode=False), size)
    test_cuda_pool_average.check_adaptive(library, adaptive[0], size, generator)
    test_cuda_pool_average.check_global(library, adaptive[0], generator)


def fuzz_norm(library: Library, seed: int) -> None:
    choose, generator = generators(seed)
    norm = say(test_cuda_norm.drawn(choose, seed))
    test_cuda_norm.check(library, norm, *torch.randn((2, *norm.shape), generator=generator))
    if seed % 3 == 0:
        test_cuda_norm.check_edges(library, norm.memory_format, choose.choice([3, 5]), generator)


FAMILIES: dict[str, tuple[list[str], Callable[[Library, int], None]]] = {
    "direct": (test_cuda_conv2d.SOURCES, fuzz_direct),
    "bias": (test_cuda_conv2d.SOURCES, fuzz_bias),
    "stem": (test_cuda_stem.SOURCES, fuzz_stem),
    "gemm": (test_cuda_implicit_gemm.SOURCES, fuzz_gemm),
    "mma": (test_cuda_implicit_gemm_mma.SOURCES, fuzz_mma),
    "tf32": (test_cuda_implicit_gemm_tf32.SOURCES, fuzz_tf32),
    "depthwise": (test_cuda_depthwise.SOURCES, fuzz_depthwise),
    "pool": (test_cuda_pool.SOURCES, fuzz_pool),
    "norm": (test_cuda_norm.SOURCES, fuzz_norm),
}


def say(*what):  # type: ignore[no-untyped-def]
    print(*what, flush=True)
    return what[0] if len(what) == 1 else what


def fuzz(families: list[str], library: Library, seeds: range, check_races: bool = False) -> None:
    for seed in seeds:
        dice = random.Random(seed)
        library.configure(
            timing=dice.choice(list(Timing)),
            seed=seed,
            check_races=check_races,
            sm_count=dice.choice([1, 3, 132]),
            capability=dice.choice([80, 86, 90]),
        )
        say("seed", seed)
        for family in families:
            FAMILIES[family][1](library, seed)


def is_caught(families: list[str], path: Path, seeds: range, bug: int) -> bool:
    """Whether the bug of this number is noticed, in a process of its own: it may write anywhere."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        ctypes.c_int.in_dll(ctypes.CDLL(str(path)), "fastconv_planted_bug").value = bug
        try:
            fuzz(families, Library(path), seeds)
        except (AssertionError, RuntimeError):
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] != 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="+", choices=FAMILIES)
    parser.add_argument("--kind", default="plain", choices=["plain", "checked", "address"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--planted", type=Path, help="a library with planted bugs: prints the numbers of those missed")
    parser.add_argument("--bugs", type=int, default=0, help="how many it has; 0 is none, and must not be noticed")
    chosen = parser.parse_args()
    seeds = range(chosen.seed, chosen.seed + chosen.count)
    if chosen.planted:
        caught = [is_caught(chosen.families, chosen.planted, seeds, bug) for bug in range(chosen.bugs + 1)]
        print(*(number for number, is_right in enumerate(caught) if is_right == (number == 0)))
    else:
        faulthandler.enable()
        sources = {source for family in chosen.families for source in FAMILIES[family][0]}
        fuzz(chosen.families, build(sources, chosen.kind), seeds, chosen.kind == "checked")


if __name__ == "__main__":
    main()
