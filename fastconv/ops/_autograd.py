"""What the ops share: when a gradient path is needed, calling below autograd, memory formats of fakes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

_functorch_level = torch._C._functorch.maybe_current_level
_BelowAutograd = torch._C._AutoDispatchBelowAutograd


def needs_function(*tensors: Tensor | None) -> bool:
    """True if a derivative or a functorch transform may look at this call; otherwise the raw op is enough."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return forward_ad._current_level >= 0 or _functorch_level() is not None


def tracing() -> bool:
    """True where a graph is being recorded: torch.compile, torch.export, torch.jit.trace."""
    return torch.compiler.is_compiling() or torch._C._is_tracing()


def call_raw(op: Any, *args: Any) -> Any:
    """Runs ``op`` below its Python autograd registration, which would cost more than a small convolution."""
    with _BelowAutograd():
        return call(op, *args)


def call(op: Any, *args: Any) -> Any:
    """Runs ``op``; if memory runs out, the error is torch's own."""
    try:
        return op(*args)
    except RuntimeError as error:
        if "API call failed" not in str(error):
            raise
        _raise_as_torch(op, args, error)


def _raise_as_torch(op: Any, args: tuple[Any, ...], error: RuntimeError) -> NoReturn:
    """The native side has lost the words and the type of an error of torch's: of memory, mostly, which torch is asked
    for once more."""
    fakes = torch.utils._pytree.tree_map_only(Tensor, lambda tensor: tensor.to("meta"), args)
    device = next(value.device for value in args if isinstance(value, Tensor))
    try:
        torch.utils._pytree.tree_map(lambda result: torch.empty_like(result, device=device), op(*fakes))
    except RuntimeError as torchs:
        raise torchs from None
    if device.type == "cuda" and "empty" in str(error):
        raise torch.OutOfMemoryError(f"{op.name()}: CUDA out of memory for a workspace; {error}") from None
    raise error


def suggested_format(*tensors: Tensor) -> torch.memory_format:
    """torch's rule for convolutions: channels_last if any of the (N, C, H, W) operands is."""
    for tensor in tensors:
        if torch._prims_common.suggest_memory_format(tensor) == torch.channels_last:
            return torch.channels_last
    return torch.contiguous_format


def empty_like_format(like: Tensor, shape: tuple[Any, ...], memory_format: torch.memory_format) -> Tensor:
    """A fake output: dtype and device of ``like``, dense in ``memory_format``."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


def allow_empty(rule: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a vmap rule serve a batch of none too, of which it could not tell the shape of one: it is given a batch of
    one, of zeros, and that is cut off its results."""

    @functools.wraps(rule)
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        if info.batch_size != 0:
            return rule(info, in_dims, *args)
        one = []
        for arg, dim in zip(args, in_dims, strict=True):
            batched = isinstance(arg, Tensor) and dim is not None
            one.append(arg.new_zeros([*arg.shape[:dim], 1, *arg.shape[dim + 1 :]]) if batched else arg)
        results, dims = rule(info._replace(batch_size=1), in_dims, *one)
        if isinstance(results, Tensor):
            return results.narrow(dims, 0, 0), dims
        return tuple(result.narrow(dim, 0, 0) for result, dim in zip(results, dims, strict=True)), dims

    return vmap


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """For the backward pass, and for the tangent if ``ctx`` is a Function's: that of torch.library has none."""
    ctx.save_for_backward(*tensors)
    if hasattr(ctx, "save_for_forward"):
        ctx.save_for_forward(*tensors)


def sum_of(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Their sum, where a missing one counts as zero."""
    if first is None or second is None:
        return second if first is None else first
    return first + second


def fold(tensor: Tensor, dim: int | None, into: int, size: int) -> Tensor:
    """Folds vmap's dimension ``dim`` (expanded to ``size`` if None) into axis ``into`` of the unbatched tensor."""
    batched = tensor.unsqueeze(0).expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return batched.movedim(0, into).flatten(into, into + 1)
