"""Which backend serves a call, and why the others do not.

A tensor's device decides: ``"cpu"``, or ``"cuda"`` where the library ``_C_cuda`` is built and torch has CUDA. What a
backend refuses goes to torch, visibly: :func:`fastconv.stats` counts such calls under ``"torch/..."``. The reasons are
those of :mod:`fastconv.functional` itself, asked on tensors without data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from fastconv import _arguments, functional
from fastconv._library import cuda_problem, device_problem, ops, runs_cuda_kernels
from fastconv._plans import plan_of

BACKENDS = ("cpu", "cuda", "triton")


@dataclass(frozen=True)
class Refusal:
    """Why a backend does not serve a call: what it got, what it wants, the remedy."""

    function: str
    reason: str

    def __str__(self) -> str:
        return f"{self.function}: {self.reason}"


def unavailable(backend: str) -> str | None:
    """Why nothing at all can run on ``backend``; None if it has kernels.

    Raises:
        ValueError: there is no backend of that name.
    """
    if backend == "cpu":
        return None
    if backend == "cuda":
        if cuda_problem is not None:
            return cuda_problem
        if not torch.cuda.is_available():
            return "torch finds no CUDA device"
        return device_problem(torch.device("cuda", torch.cuda.current_device()))
    if backend == "triton":
        return "fastconv has no Triton kernels yet; use the CPU kernels, or torch.nn's layers on the GPU"
    raise ValueError(f"backend is {backend!r}, expected one of {', '.join(BACKENDS)}")


def can_run(function: str, *args: Any, **kwargs: Any) -> Refusal | None:
    """Why no kernel serves ``fastconv.functional.<function>(*args, **kwargs)``; None if one does. Computes nothing.

    Example:
        >>> can_run("conv2d", torch.zeros(1, 3, 8, 8, dtype=torch.int64), torch.zeros(4, 3, 3, 3, dtype=torch.int64))
        Refusal(function='conv2d', reason='input is torch.int64, ...')

    Raises:
        ValueError: there is no function of that name.
    """
    if function not in functional.__all__:
        raise ValueError(f"function is {function!r}, expected one of {', '.join(sorted(functional.__all__))}")
    names = ("input", "weight", "bias")
    for name, value in [*zip(names, args, strict=False), *kwargs.items()]:
        # Before fakes are made of them: not every tensor can have one.
        reason = _arguments.tensor_refusal(function, name, value) if isinstance(value, Tensor) else None
        if reason is not None:
            return Refusal(function, reason)
    refusals: list[Refusal] = []

    def handle(refusal: Refusal, arguments: Any, run: Callable[[], Any]) -> Any:
        refusals.append(refusal)
        return run()

    with intercepted(handle), FakeTensorMode() as mode, torch.no_grad(), _Named(refusals):
        fake_args, fake_kwargs = tree_map_only(Tensor, mode.from_tensor, (args, kwargs))
        try:
            getattr(functional, function)(*fake_args, **fake_kwargs)
        except Exception:
            # A call that torch would not take either has its refusal by now.
            if not refusals:
                raise
    return refusals[0] if refusals else None


class _Named(TorchDispatchMode):
    """Asks whether the kernel that a convolution names serves it: fakes take any name."""

    def __init__(self, refusals: list[Refusal]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.refusals = refusals

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is ops.conv2d.default and isinstance(args[-1], str):
            try:
                plan_of(func, args, None)
            except RuntimeError as error:
                self.refusals.append(Refusal("conv2d", str(error).removeprefix("conv2d: ")))
        return func(*args, **(kwargs or {}))


def choose(function: str, *args: Any, **kwargs: Any) -> tuple[str, Refusal | None]:
    """``("cpu", None)`` or ``("cuda", None)``, or ``("torch", refusal)`` for a call that no kernel serves."""
    refusal = can_run(function, *args, **kwargs)
    if refusal is not None:
        return "torch", refusal
    first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    return ("cuda" if runs_cuda_kernels(first) else "cpu"), None


@contextmanager
def intercepted(handle: Callable[[Refusal, tuple[Any, ...], Callable[[], Any]], Any]) -> Iterator[None]:
    """Inside the block, ``handle(refusal, arguments, run)`` gets this thread's calls that go to torch.

    ``run()`` is torch's computation; what ``handle`` returns is the call's result. They are not counted.
    """

    def caught(name: str, refusal: str | None, arguments: tuple[Any, ...], run: Callable[[], Any]) -> Any:
        return handle(Refusal(name, refusal or "no kernel serves these arguments"), arguments, run)

    before = functional.interception.handle
    functional.interception.handle = caught
    try:
        yield
    finally:
        functional.interception.handle = before
