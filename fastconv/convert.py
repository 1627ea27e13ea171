"""Whole models: torch's layers exchanged for fastconv's, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from fastconv import layers
from fastconv._arguments import DTYPES
from fastconv._module_copy import copy_structure, layer_type, opaque_reason, set_layer_type
from fastconv._report import ConversionReport, Entry, attach
from fastconv.fused import FusedConv2d

__all__ = ["convert", "revert"]

Classes = dict[type[nn.Module], type[nn.Module]]
Filter = Callable[[str, nn.Module], bool]

TO_FASTCONV: Classes = {
    nn.Conv2d: layers.Conv2d,
    nn.MaxPool2d: layers.MaxPool2d,
    nn.AvgPool2d: layers.AvgPool2d,
    nn.AdaptiveAvgPool2d: layers.AdaptiveAvgPool2d,
    nn.LocalResponseNorm: layers.LocalResponseNorm,
}
TO_TORCH: Classes = {ours: theirs for theirs, ours in TO_FASTCONV.items()}
TO_TORCH[layers.GlobalAvgPool2d] = nn.AdaptiveAvgPool2d
_FORWARDS = ("forward", "_conv_forward", "_call_impl")


def convert(model: nn.Module, *, filter_fn: Filter | None = None, inplace: bool = False) -> nn.Module:
    """Exchanges torch.nn's Conv2d, MaxPool2d, AvgPool2d, AdaptiveAvgPool2d and LocalResponseNorm for fastconv's.

    Parameters and buffers are the same objects as in ``model``, so an optimizer made for ``model`` trains the result;
    names, hooks, shared modules, tied weights, parametrizations, pruning, modes and extra attributes stay as they are.
    Only layers of exactly these classes are exchanged: a subclass may compute something else. Functions that
    ``forward`` calls itself are not seen; for those there is :func:`fastconv.patch`.

    Args:
        model: any module, also a single layer.
        filter_fn: called with the name and the module of each candidate; False leaves it as it is.
        inplace: exchange the layers of ``model`` itself. Otherwise ``model`` keeps its layers, and the result has
            modules of its own around the shared parameters and buffers; removing a hook by its handle then acts on
            ``model`` only.

    Returns:
        The model, whose attribute ``fastconv_report`` (:func:`fastconv.conversion_report`) says what was exchanged,
        what was left, and why.

    Raises:
        TypeError: if ``model`` is no module, or one compiled by torch.jit or torch.compile.
    """
    return _exchange("convert", model, TO_FASTCONV, filter_fn, inplace)


def revert(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """The inverse of :func:`convert`: fastconv's layers become torch.nn's, around the same parameters and buffers.

    Layers that :func:`fastconv.fuse` made stay: their weights hold the normalisation, which cannot be taken out again.

    Args:
        model: any module.
        inplace: as for :func:`convert`.

    Returns:
        The model, with a report.

    Raises:
        TypeError: as :func:`convert`.
    """
    return _exchange("revert", model, TO_TORCH, None, inplace)


def require_model(action: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"fastconv.{action}: model is {type(model).__name__}, expected a torch.nn.Module")
    reason = opaque_reason(model)
    if reason is not None:
        raise TypeError(f"fastconv.{action}: model is {reason}")


def _exchange(action: str, model: nn.Module, classes: Classes, filter_fn: Filter | None, inplace: bool) -> nn.Module:
    require_model(action, model)
    report = ConversionReport(action)
    copies = None if inplace else copy_structure(model)
    for name, module in named_layers(model):
        target = module if copies is None else copies[id(module)]
        exchange_layer(report, classes, name, module, target, filter_fn)
    result = model if copies is None else copies[id(model)]
    attach(result, report)
    return result


def exchange_layer(
    report: ConversionReport,
    classes: Classes,
    name: str,
    module: nn.Module,
    target: nn.Module,
    filter_fn: Filter | None = None,
) -> None:
    """Gives ``target`` (``module`` or its copy) its new class, or notes why not."""
    kind = layer_type(module)
    reason = _refusal(module, kind, classes)
    new = classes.get(kind)
    if reason is None and new is None:
        return
    if reason is None and filter_fn is not None and not filter_fn(name, module):
        reason = "filter_fn returned False"
    if reason is not None or new is None:
        report.left.append(Entry(name, kind.__name__, str(reason)))
        return
    set_layer_type(target, new)
    report.swapped.append(Entry(name, class_name(kind), class_name(new)))


def named_layers(model: nn.Module, prefix: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, nn.Module]]:
    """As ``named_modules``, without the insides of modules that cannot be changed."""
    seen = set() if seen is None else seen
    if id(model) in seen:
        return
    seen.add(id(model))
    yield prefix, model
    if opaque_reason(model) is None:
        for name, child in model._modules.items():
            if child is not None:
                yield from named_layers(child, f"{prefix}.{name}" if prefix else name, seen)


def class_name(kind: type) -> str:
    if kind.__module__.startswith("torch.nn."):
        return f"torch.nn.{kind.__name__}"
    return f"fastconv.{kind.__name__}" if kind.__module__.startswith("fastconv.") else kind.__name__


def _refusal(module: nn.Module, kind: type[nn.Module], classes: Classes) -> str | None:
    """Why a layer that looks like a candidate is left; None for candidates and for all that does not look like one."""
    opaque = opaque_reason(module)
    if opaque is not None:
        return opaque
    if kind in classes:
        replaced = [name for name in _FORWARDS if name in module.__dict__]
        if replaced:
            return f"{replaced[0]} is replaced on the object itself"
        return _dtype_refusal(module) if classes is TO_FASTCONV else None
    if kind is FusedConv2d:
        return "its weight holds a folded normalisation; keep the model that was fused" if classes is TO_TORCH else None
    if kind in TO_TORCH or kind in TO_FASTCONV:
        return None
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and isinstance(module, tuple(classes)):
        return "not initialised yet; run a batch through the model, then convert"
    for base in classes:
        if isinstance(module, base):
            return f"a subclass of {class_name(base)}, which may compute something else"
    names = {candidate.__name__ for candidate in TO_FASTCONV}
    if "quantized" in kind.__module__ and kind.__name__ in names:
        return "quantised; fastconv has no integer kernels"
    return None


def _dtype_refusal(module: nn.Module) -> str | None:
    weight = module._parameters.get("weight")
    if weight is None or weight.dtype in DTYPES:
        return None
    return f"its weight is {weight.dtype}; fastconv has kernels for float32, float64, float16 and bfloat16"
