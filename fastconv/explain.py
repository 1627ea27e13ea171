"""What a call would run: the path from the layer to the kernel, and what it costs. Nothing is computed.

The module runs once on fake tensors, which have shapes but no data, while a dispatch mode watches the operators. So the
arguments are those that would reach the kernels, and the plan for them comes from the selection that the kernels' host
functions use (``csrc/conv2d/select.h``).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastconv import _C
from fastconv._library import EMULATED, NAMESPACE
from fastconv._plans import Plan, plan_of
from fastconv.backends import Refusal, intercepted

__all__ = ["Explanation", "PlannedCall", "explain"]

_sequence_number: Callable[[], int] = torch._C._autograd._get_sequence_nr

# Not hops of a call: this module's own, and the helper that leaves out autograd.
_NOT_HOPS = frozenset({__name__, "fastconv._plans", "fastconv.backends", "fastconv.ops._autograd", "fastconv.tuning"})

# torch's own operators that do a layer's arithmetic: shown, so that a report of a whole model has no gaps.
_TORCH_ARITHMETIC = frozenset({
    "addmm", "mm", "bmm", "baddbmm", "linear", "convolution", "convolution_backward", "max_pool2d_with_indices",
    "max_pool2d_with_indices_backward", "avg_pool2d", "avg_pool2d_backward", "_adaptive_avg_pool2d",
    "_adaptive_avg_pool2d_backward",
})  # fmt: skip


@dataclass(frozen=True)
class PlannedCall:
    """One call of one operator.

    ``path`` leads from the layer to the kernel. ``kernel`` is fastconv's, as in :func:`fastconv.stats`, or None where
    torch computes, ``by_torch`` then says why. ``refused`` tells for each kernel of the operator that cannot serve the
    call why not, ``others`` names those that could (``algo=``). ``condition`` says for which
    values the kernel is chosen, if not for all. ``bytes`` must be moved at least: every operand once.
    """

    layer: str
    kind: str
    op: str
    kernel: str | None
    path: tuple[str, ...]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    memory_format: str
    dtype: torch.dtype
    flops: int
    bytes: int
    tile: str | None = None
    refused: dict[str, str] = field(default_factory=dict)
    others: tuple[str, ...] = ()
    by_torch: str | None = None
    condition: str | None = None

    @property
    def intensity(self) -> float:
        """FLOPs for each byte."""
        return self.flops / self.bytes if self.bytes else 0.0

    def details(self) -> str:
        """Everything, over several lines."""
        lines = [
            " -> ".join(self.path),
            f"  {_shape(self.input_shape)} -> {_shape(self.output_shape)}, {_name(self.dtype)}, {self.memory_format}",
            f"  kernel     {self.kernel or 'torch'}" + (f", tile {self.tile}" if self.tile else ""),
        ]
        lines += [f"  condition  {self.condition}"] if self.condition else []
        lines += [f"  by torch   {self.by_torch}"] if self.by_torch else []
        lines += [f"  refused    {algo}: {reason}" for algo, reason in self.refused.items()]
        lines += [f"  also able  {', '.join(self.others)} (algo=)"] if self.others else []
        lines += [
            f"  work       {_count(self.flops)}FLOP, {_count(self.bytes)}B, {self.intensity:.1f} FLOP per byte",
        ]
        return "\n".join(lines)


@dataclass(frozen=True, repr=False)
class Explanation:
    """What :func:`explain` found; ``str()`` of it is the report."""

    calls: tuple[PlannedCall, ...]
    isa: str
    threads: int
    device: str = "cpu"

    @property
    def kernels(self) -> dict[str, int]:
        """Calls per kernel, as :func:`fastconv.stats` would report after the call, all conditions met."""
        counts: dict[str, int] = {}
        for call in self.calls:
            if call.kernel is not None:
                counts[call.kernel] = counts.get(call.kernel, 0) + 1
        return counts

    @property
    def flops(self) -> int:
        return sum(call.flops for call in self.calls)

    @property
    def bytes(self) -> int:
        return sum(call.bytes for call in self.calls)

    def __repr__(self) -> str:
        return f"<Explanation of {len(self.calls)} calls, {_count(self.flops)}FLOP>"

    def __str__(self) -> str:
        where = f"instruction set {self.isa}, {self.threads} threads" if self.device == "cpu" else self.device
        if not self.calls:
            return f"{where}\nno layer of this call does arithmetic that fastconv knows"
        if len({call.layer for call in self.calls}) == 1:
            return "\n".join([where, *(call.details() for call in self.calls)])
        return "\n".join([where, *self._table()])

    def _table(self) -> list[str]:
        rows = [("layer", "kind", "input", "output", "kernel", "MFLOP", "MB", "FLOP/B", "why torch")]
        rows += [
            (
                call.layer,
                call.kind,
                _shape(call.input_shape),
                _shape(call.output_shape),
                call.kernel or (f"torch ({call.op.split('::')[-1]})" if call.op else "torch"),
                f"{call.flops / 1e6:.2f}",
                f"{call.bytes / 1e6:.2f}",
                f"{call.intensity:.1f}",
                call.by_torch or "",
            )
            for call in self.calls
        ]
        ours = sum(call.flops for call in self.calls if call.kernel is not None)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        numeric = {5, 6, 7}
        lines = [
            "  ".join(
                f"{c:>{w}}" if i in numeric else f"{c:{w}}" for i, (c, w) in enumerate(zip(r, widths, strict=True))
            )
            for r in rows
        ]
        total = f"total: {_count(self.flops)}FLOP, {_count(self.bytes)}B; fastconv's kernels do {_count(ours)}FLOP"
        share = f" ({ours / self.flops:.1%})" if self.flops else ""
        return [line.rstrip() for line in lines] + [total + share]


def explain(
    call: Callable[..., Any],
    *input_shapes: Sequence[int],
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format | str | None = None,
    device: torch.device | str = "cpu",
    backward: bool = False,
    quiet: bool = False,
) -> Explanation:
    """Prints which kernels a call would run and why, and returns the same as an object. Computes nothing.

    Args:
        call: a layer, a whole model, or any function of tensors.
        input_shapes: shape of each input tensor, batch first.
        dtype: of the inputs.
        memory_format: ``torch.channels_last`` or ``"channels_last"`` for inputs in that format; contiguous if None.
        device: of the inputs; ``call``'s parameters must be there too.
        backward: also the gradients of the inputs and parameters.
        quiet: return without printing.

    Raises:
        TypeError: ``call`` is not callable or there is no shape.
        RuntimeError: the call itself fails for these shapes, or its path depends on values, which fakes do not have.
    """
    if not callable(call):
        raise TypeError(f"call is {type(call).__name__}, expected a module or function")
    if not input_shapes:
        raise TypeError(
            "no input shape is given, expected one for each input, for example explain(model, (1, 3, 224, 224))"
        )
    formats = {
        None: torch.contiguous_format,
        "channels_last": torch.channels_last,
        "contiguous": torch.contiguous_format,
    }
    layout = (
        formats.get(memory_format, memory_format)
        if not isinstance(memory_format, torch.memory_format)
        else memory_format
    )
    if not isinstance(layout, torch.memory_format):
        raise TypeError(f"memory_format is {memory_format!r}, expected torch.channels_last, 'channels_last' or None")
    watcher = _Watcher()
    # Real parameters become fakes as they meet the input.
    with intercepted(watcher.by_torch), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        inputs = [
            torch.empty(tuple(shape), dtype=dtype, device=device).to(
                memory_format=layout if len(shape) == 4 else torch.contiguous_format
            )
            for shape in input_shapes
        ]
        if backward:
            inputs = [x.requires_grad_(x.is_floating_point()) for x in inputs]
        with torch.set_grad_enabled(backward), _layers_of(call, watcher), watcher:
            if isinstance(call, nn.Module):
                # In-place updates, such as batch norm's counter, are for copies.
                buffers: dict[str, Tensor] = {name: mode.from_tensor(buffer) for name, buffer in call.named_buffers()}
                outputs = torch.func.functional_call(call, buffers, tuple(inputs))
            else:
                outputs = call(*inputs)
            if backward:
                _run_backward(call, inputs, outputs)
    explanation = Explanation(tuple(watcher.calls), _C.active_isa(), torch.get_num_threads(), _device_name(device))
    if not quiet:
        print(explanation)
    return explanation


def _device_name(device: torch.device | str) -> str:
    if EMULATED:
        return "CUDA kernels, emulated on the CPU"
    return "cpu" if torch.device(device).type == "cpu" else str(device)


def _run_backward(call: Any, inputs: list[Tensor], outputs: Any) -> None:
    """Gradients without touching ``.grad``."""
    leaves = [x for x in inputs if x.requires_grad]
    if isinstance(call, nn.Module):
        leaves += [parameter for parameter in call.parameters() if parameter.requires_grad]
    roots = [y for y in _tensors(outputs) if y.requires_grad]
    if roots:
        torch.autograd.grad(roots, leaves, [torch.empty_like(y) for y in roots], allow_unused=True)


class _Watcher(TorchDispatchMode):
    """Records the operators that do arithmetic, under the layer they belong to."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[PlannedCall] = []
        self.open: list[_Layer] = []  # layers being run, outermost first
        # Inner layers finish first, so the first one whose span holds a node's number is the innermost.
        self.finished: list[_Layer] = []
        self.muted = False

    def layer(self) -> tuple[str, str]:
        node = torch._C._current_autograd_node()
        if node is not None:
            number = node._sequence_nr()
            for layer in self.finished:
                if layer.first_node <= number < layer.end_node:
                    return layer.name, layer.kind
        return (self.open[-1].name, self.open[-1].kind) if self.open else ("", "")

    def enter(self, name: str, module: nn.Module) -> None:
        kind = ("fastconv." if type(module).__module__.startswith("fastconv.") else "") + type(module).__name__
        self.open.append(_Layer(name, kind, _sequence_number(), len(self.calls)))

    def leave(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        if len(self.calls) == self.open[-1].first_call and not any(True for _ in module.children()):
            self.record("", inputs, outputs, None, None)
        layer = self.open.pop()
        layer.end_node = _sequence_number()
        self.finished.append(layer)

    def by_torch(self, refusal: Refusal, arguments: Any, run: Callable[[], Any]) -> Any:
        self.muted = True
        try:
            result = run()
        finally:
            self.muted = False
        self.record(f"torch.nn.functional.{refusal.function}", arguments, result, None, refusal.reason)
        return result

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == NAMESPACE:
            plan = plan_of(func, args, result)
            if plan is not None:
                self.record(func._schema.name, args, result, plan, None)
        elif func.namespace == "aten" and func._schema.name.split("::")[-1] in _TORCH_ARITHMETIC and not self.muted:
            self.record(func._schema.name, args, result, None, None, _torch_flops(func, args, result))
        return result

    def record(self, op: str, args: Any, result: Any, plan: Plan | None, by_torch: str | None, flops: int = 0) -> None:
        tensors, outputs = _tensors(args), _tensors(result)
        if not outputs or outputs[0].numel() == 0:
            return  # no kernel runs
        first = (tensors or outputs)[0]
        if first.numel() == 0:
            return  # the result is zeros
        if op in ("aten::addmm", "aten::baddbmm"):
            first = tensors[1]  # the bias leads
        name, kind = self.layer()
        self.calls.append(
            PlannedCall(
                layer=name,
                kind=kind,
                op=op,
                kernel=plan.kernel if plan else None,
                path=_path(name, kind, op, plan),
                input_shape=tuple(first.shape),
                output_shape=tuple(outputs[0].shape),
                memory_format=_format(outputs[0]),
                dtype=first.dtype,
                flops=plan.flops if plan else flops,
                bytes=sum(x.numel() * x.element_size() for x in [*tensors, *outputs]),
                tile=plan.tile if plan else None,
                refused=plan.refused if plan else {},
                others=plan.others if plan else (),
                by_torch=by_torch,
                condition=plan.condition if plan else None,
            )
        )


@dataclass
class _Layer:
    """A running layer. Autograd numbers its nodes in order of creation: this one's are in [first_node, end_node)."""

    name: str
    kind: str
    first_node: int
    first_call: int
    end_node: int = 0


@contextmanager
def _layers_of(call: Any, watcher: _Watcher) -> Iterator[None]:
    """Tells the watcher which module is running."""
    handles: list[Any] = []

    def watch(name: str, module: nn.Module) -> None:
        handles.append(module.register_forward_pre_hook(lambda *_: watcher.enter(name, module)))
        handles.append(module.register_forward_hook(lambda _, inputs, outputs: watcher.leave(module, inputs, outputs)))

    if isinstance(call, nn.Module):
        for name, module in call.named_modules():
            watch(name, module)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in torch.utils._pytree.tree_leaves(values) if isinstance(value, Tensor)]


def _path(name: str, kind: str, op: str, plan: Plan | None) -> tuple[str, ...]:
    """The functions of this package on the stack between the layer and the operator, outermost first."""
    hops: list[str] = []
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code is not explain.__code__:
        module = frame.f_globals.get("__name__", "")
        if module.startswith("fastconv.") and module not in _NOT_HOPS:
            # co_qualname came with Python 3.11
            hops.append(f"{module}.{getattr(frame.f_code, 'co_qualname', frame.f_code.co_name)}")
        frame = frame.f_back
    layer = [f"{name}: {kind}" if name else kind] if kind else []
    operator = [f"torch.ops.{op.replace('::', '.')}" if "::" in op else op] if op else []
    return (*layer, *reversed(hops), *operator, plan.kernel if plan else "torch")


def _torch_flops(func: Any, args: Any, result: Any) -> int:
    from torch.utils.flop_counter import flop_registry

    formula = flop_registry.get(func._overloadpacket)
    return int(formula(*args, out_val=result)) if formula else 0


def _format(tensor: Tensor) -> str:
    if tensor.dim() == 4 and torch._prims_common.suggest_memory_format(tensor) == torch.channels_last:
        return "channels_last"
    return "contiguous"


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _count(value: float) -> str:
    for unit in ("", "k", "M", "G"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} T"
