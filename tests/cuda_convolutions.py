"""Runs the CUDA convolution kernels in the emulator on the problems of ``reference.py``."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from cuda_memory import check_guards as assert_guarded
from cuda_memory import room
from emulator_library import Argument, ConvProblem, DType, Library, note_error
from reference import Conv, Results, allowances, assert_within, results_by_torch
from torch import Tensor

from fastconv.ops import conv2d as ops

NAN = float("nan")


class ChannelNumbers(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("dtype", ctypes.c_int32)]


class CudaEpilogue(ctypes.Structure):
    """csrc/conv2d/cuda_epilogue.cuh; the tensors must outlive it."""

    _fields_ = [
        ("scale", ChannelNumbers),
        ("shift", ChannelNumbers),
        ("residual", ctypes.c_void_p),
        ("activation", ctypes.c_int32),
    ]

    @classmethod
    def of(
        cls,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        residual: Tensor | None = None,
        activation: str = "none",
    ) -> CudaEpilogue:
        def numbers(values: Tensor | None) -> ChannelNumbers:
            if values is None:
                return ChannelNumbers(None, 0)
            return ChannelNumbers(values.data_ptr(), DType[str(values.dtype).removeprefix("torch.")])

        pointer = None if residual is None else residual.data_ptr()
        return cls(numbers(scale), numbers(shift), pointer, ("none", "relu", "relu6", "tanh").index(activation))


def placed(values: Tensor, offset: int) -> Tensor:
    """A copy with the same strides, `offset` elements past an address aligned to 64 bytes, amid NaN."""
    bytes_each = values.element_size()
    memory, start = room(values.numel() * bytes_each, offset * bytes_each)
    typed = torch.tensor([], dtype=values.dtype)
    typed.set_(memory.untyped_storage(), start // bytes_each, values.shape, values.stride())
    return typed.copy_(values)


def empty(shape: Sequence[int], dtype: torch.dtype, channels_last: bool, offset: int = 0) -> Tensor:
    """A tensor of NaN amid NaN."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return placed(torch.full(shape, NAN, dtype=dtype).to(memory_format=layout), offset)


@dataclass
class CudaRun:
    """A problem on its way through one family of kernels."""

    problem: Conv
    channels_last: bool = False
    offset: int = 0  # of all tensors, in elements from an aligned address
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.problem = replace(self.problem, bias=False)  # a bias belongs to the epilogue
        x, weight, _, grad = self.problem.tensors()
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        for name, values in (("x", x), ("weight", weight), ("grad", grad)):
            self.tensors[name] = placed(values.contiguous().clone(memory_format=layout), self.offset)
        stride, padding, dilation, groups = self.problem.params
        self.described = ConvProblem.of(self.tensors["x"], weight, stride, padding, dilation, groups)
        self.described.layout = int(self.channels_last)  # torch cannot tell the layout of 1 channel or of 1x1 maps

    def output(self, name: str) -> Tensor:
        return empty(self.tensors[name].shape, self.problem.dtype, self.channels_last, self.offset)

    def call(self, library: Library, op: str, algo: str, result: Tensor, *arguments: Argument) -> Tensor:
        """Runs the launcher, with a workspace of NaN of the size it asks for, if it asks for one."""
        if (f"{op}_workspace", algo) not in library.signatures:
            library.call(op, algo, self.described, *arguments)
        else:
            floats = library.call(f"{op}_workspace", algo, self.described)
            assert floats is not None
            workspace = placed(torch.full((floats,), NAN), 0)
            library.call(op, algo, self.described, *arguments, workspace)
            assert_guarded(workspace)
        assert_guarded(result)
        return result

    def forward(self, library: Library, algo: str, epilogue: CudaEpilogue | None = None) -> Tensor:
        y, x, weight = self.output("grad"), self.tensors["x"], self.tensors["weight"]
        return self.call(library, "conv2d", algo, y, x, weight, y, epilogue or CudaEpilogue.of())

    def input_grad(self, library: Library, algo: str) -> Tensor:
        grad_x, grad, weight = self.output("x"), self.tensors["grad"], self.tensors["weight"]
        return self.call(library, "conv2d_input_grad", algo, grad_x, grad, weight, grad_x)

    def weight_grad(self, library: Library, algo: str) -> Tensor:
        grad_weight, grad, x = self.output("weight"), self.tensors["grad"], self.tensors["x"]
        return self.call(library, "conv2d_weight_grad", algo, grad_weight, grad, x, grad_weight)

    def results(self, library: Library, algo: str) -> Results:
        return {
            "output": self.forward(library, algo),
            "input": self.input_grad(library, algo),
            "weight": self.weight_grad(library, algo),
        }

    def results_by_cpu(self) -> Results:
        """What fastconv's CPU ops give."""
        x, weight, grad = (self.tensors[name] for name in ("x", "weight", "grad"))
        params = self.problem.params
        return {
            "output": ops.conv2d(x, weight, None, *params, "direct"),
            "input": ops.conv2d_input_grad(grad, weight, x.shape[2:], *params, "direct"),
            "weight": ops.conv2d_weight_grad(grad, x, weight.shape[2:], *params, "direct"),
        }


OPS = {"output": "conv2d", "input": "conv2d_input_grad", "weight": "conv2d_weight_grad"}


def assert_matches(run: CudaRun, results: Results, algo: str) -> None:
    """Integers: equal to the CPU kernels' results. Others: as close to float64's as `allowances` says.

    The report gets the error in units of the dtype's epsilon and the result's root mean square.
    """
    problem = run.problem
    if problem.integers:
        expected = run.results_by_cpu()
        for name, result in results.items():
            assert torch.equal(result, expected[name]), f"{name} of {problem} is not exact"
            note_error(OPS[name], algo, 0)
        return
    exact, allowed = results_by_torch(problem, torch.float64), allowances(problem)
    for name, result in results.items():
        assert_within(result, exact[name], allowed[name], f"{name} of {problem}")
        unit = torch.finfo(problem.dtype).eps * exact[name].square().mean().sqrt().item()
        if unit:
            note_error(OPS[name], algo, (result.double() - exact[name]).abs().max().item() / unit)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda values: values,
    "relu": torch.relu,
    "relu6": torch.nn.functional.relu6,
    "tanh": torch.tanh,
}


def check_epilogue(library: Library, algo: str, problem: Conv, activation: str, channels_last: bool) -> None:
    """activation(scale * sum + shift + residual), with every part alone and all together."""
    run = CudaRun(problem, channels_last)
    sums, dtype = results_by_torch(run.problem, torch.float64)["output"], problem.dtype
    allowed_sums = allowances(run.problem)["output"]
    per_channel = (sums.shape[1], 1, 1)
    for parts in ("scale", "shift", "residual", "scale shift residual"):
        for numbers in (torch.float32, dtype, torch.float64):
            scale = torch.randn(per_channel).to(numbers) if "scale" in parts else None
            shift = torch.randn(per_channel).to(numbers) if "shift" in parts else None
            residual = run.output("grad").copy_(torch.randn(sums.shape)) if "residual" in parts else None
            y = run.forward(library, algo, CudaEpilogue.of(scale, shift, residual, activation))
            times = torch.ones(per_channel, dtype=torch.float64) if scale is None else scale.double()
            terms = [sums * times, *(values.double() for values in (shift, residual) if values is not None)]
            expected = ACTIVATIONS[activation](sum(terms[1:], start=terms[0]))
            # float32 rounds once per step; the result is stored once. No activation is steeper than 1.
            rounding = (
                4 * torch.finfo(torch.float32).eps * sum((term.abs() for term in terms[1:]), start=terms[0].abs())
            )
            allowed = allowed_sums * times.abs() + rounding + torch.finfo(dtype).eps * (expected.abs() + 1e-6)
            assert_within(y, expected, allowed, f"{activation} after {parts} in {numbers}")


@contextmanager
def configured(library: Library, **options: object) -> Iterator[None]:
    library.configure(**options)  # type: ignore[arg-type]
    try:
        yield
    finally:
        library.configure()
