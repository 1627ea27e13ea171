"""Weights of a fused model in the form that a kernel reads, made once.

The transformed filters of Winograd take four times the weight's memory, for small images 1.8 times, and both where a
layer sees both; the panels of ``tiled``, for channels_last, as much as the weight in float32. Fused weights are frozen,
so what is watched for is what replaces a weight, and the version counter, which operators that write in place count up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastconv import _C
from fastconv._huge_pages import collapse_into_huge_pages
from fastconv._library import EMULATED, ops
from fastconv.ops._autograd import suggested_format

CHANNELS = 32  # with fewer Winograd is not chosen (csrc/conv2d/select.h)
INPUTS = 64  # kinds of inputs whose kernel is remembered; a layer that sees more starts anew


class _Forms:
    """Of one state of a weight. Holds the weight's storage, so that no other weight comes to lie at its address."""

    def __init__(self, key: tuple[Any, ...], weight: Tensor) -> None:
        self.key, self.storage = key, weight.untyped_storage()
        self.by_kernel: dict[tuple[str, int], Tensor] = {}
        self.by_input: dict[tuple[Any, ...], Tensor | None] = {}


class PackedWeight:
    """The packed forms of one layer's weight. A copy, or one that was loaded, starts without any.

    ``last_only``: there are none for contiguous inputs, which then need not ask (that takes a microsecond).
    """

    def __init__(self, last_only: bool = False) -> None:
        self._forms: _Forms | None = None
        self.cleared = 0  # times
        self._last_only = last_only

    def __reduce__(self) -> Any:
        return PackedWeight, (self._last_only,)

    def clear(self) -> None:
        self._forms = None
        self.cleared += 1

    def bytes(self) -> int:
        forms = self._forms
        return 0 if forms is None else sum(packed.nbytes for packed in forms.by_kernel.values())

    def find(self, input: Tensor, weight: Tensor, geometry: tuple[int, ...], groups: int) -> Tensor | None:
        """The form for this call, of plain tensors on the CPU; None if its kernel reads the weight itself."""
        if EMULATED or weight.is_inference():  # such a tensor counts no versions
            return None
        if self._last_only and input.is_contiguous():
            return None
        key = (weight.data_ptr(), weight._version, weight.shape, weight.stride(), weight.dtype, geometry, groups)
        forms = self._forms
        if forms is None or forms.key != key:
            forms = self._forms = _Forms(key, weight)  # threads may do so twice, to the same effect
        place = (input.shape, input.stride(), input.dtype)
        try:
            return forms.by_input[place]
        except KeyError:
            pass
        if len(forms.by_input) >= INPUTS:
            forms.by_input.clear()
        packed = forms.by_input[place] = _pack(forms, input, weight, geometry, groups)
        return packed


def _pack(forms: _Forms, input: Tensor, weight: Tensor, geometry: tuple[int, ...], groups: int) -> Tensor | None:
    if input.dtype != weight.dtype or not weight.is_cpu or weight.dim() != 4 or 0 in (*input.shape, *weight.shape):
        return None
    last = suggested_format(input, weight) == torch.channels_last
    try:
        plan = _C.plan_conv2d(
            tuple(input.shape), tuple(weight.shape), stride=geometry[:2], padding=geometry[2:6], dilation=geometry[6:],
            groups=groups, channels_last=last, dtype=str(weight.dtype).removeprefix("torch."), pass_name="forward",
            packed=True,
        )  # fmt: skip
    except ValueError:  # the operator will say what is wrong
        return None
    if not plan["keeps_weight"]:
        return None
    # Winograd has two forms, each for both layouts; tiled has one, in channels_last alone.
    kernel = plan["algo"], plan["winograd_tile"] or 4
    if kernel not in forms.by_kernel:
        forms.by_kernel[kernel] = ops.conv2d_pack(weight, geometry, groups, last, *kernel)
        collapse_into_huge_pages(forms.by_kernel[kernel])
    return forms.by_kernel[kernel]


def packed_weight(layer: Any) -> PackedWeight | None:
    """For a convolution that has a packed form which some image may want."""
    filters, depth, *kernel = layer.weight.shape
    plain = kernel == [3, 3] and layer.stride == (1, 1) and layer.dilation == (1, 1) and layer.groups == 1
    if layer.groups > 1 and filters // layer.groups < 16:  # as refuse_keeping has it (csrc/conv2d/select.h)
        return None
    return PackedWeight(last_only=not plain or min(filters, depth) < CHANNELS)


class KeepsPacked(nn.Module):
    """A layer of frozen weights that may keep packed forms of them (:func:`fastconv.fuse`)."""

    packed: PackedWeight | None = None  # of the class: a model that was saved by an earlier version has none

    def _forget(self) -> None:
        if self.packed is not None:
            self.packed.clear()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._forget()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        self._forget()
        super()._load_from_state_dict(*arguments, **options)

    def train(self, mode: bool = True) -> Any:
        if mode:  # eval() may come before every call
            self._forget()
        return super().train(mode)
