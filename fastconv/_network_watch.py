"""What a network's programs were made from, and whether it is still so."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from fastconv import _C
from fastconv._packed import PackedWeight

_PLAIN = (bool, int, float, str, tuple, list, type(None))


class Watch:
    """Layers, where they are in the model, their hooks and settings, and their tensors.

    Not seen is what changes neither the identity, the address nor the version of a tensor (``weight.data.mul_``).
    A call asks for a thousand entries, after the last one's data have pushed them out of the caches: native code
    waits for many at a time, Python for one after another.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._entries: dict[tuple[int, str], tuple[dict[str, Any], str, Any]] = {}  # by the dict's id and the key
        self._sizes: dict[int, tuple[dict[Any, Any], int]] = {}
        self._lists: list[tuple[list[Any], list[Any]]] = []  # and what they held
        self._tensors: list[tuple[Tensor, int, int, bool]] = []
        self._flat: tuple[tuple[Any, ...], ...] | None = None

    def add(self, node: fx.Node, layer: nn.Module, packed: PackedWeight) -> None:
        parent = self.model
        for name in str(node.target).split("."):
            child = parent._modules[name]
            assert child is not None
            self._expect(parent._modules, name, child)
            parent = child
        attributes = layer.__dict__
        self._sizes[id(attributes)] = attributes, len(attributes)  # a forward of the object's own is one more
        for key, value in attributes.items():
            if key[0] != "_" and isinstance(value, _PLAIN):  # training is one of them
                self._expect(attributes, key, value)
                if isinstance(value, list):
                    self._lists.append((value, list(value)))
        for key in ("_forward_hooks", "_forward_pre_hooks"):
            self._expect(attributes, key, attributes[key])
            self._sizes[id(attributes[key])] = attributes[key], 0
        self._expect(packed.__dict__, "cleared", packed.cleared)
        for kept in (layer._parameters, layer._buffers):
            for key, tensor in kept.items():
                self._expect(kept, key, tensor)
                if tensor is not None:
                    self._tensors.append((tensor, tensor._version, tensor.data_ptr(), tensor.requires_grad))
        self._flat = None

    def _expect(self, entries: dict[str, Any], key: str, value: Any) -> None:
        self._entries[id(entries), key] = entries, key, value

    def is_current(self) -> bool:
        if self._flat is None:
            columns = (*zip(*self._entries.values(), strict=True),), (*zip(*self._sizes.values(), strict=True),)
            self._flat = (*(columns[0] or ((), (), ())), *(columns[1] or ((), ())))
        if not _C.same_entries(*self._flat):
            return False
        for value, content in self._lists:
            if value != content:
                return False
        for tensor, version, address, trains in self._tensors:
            if tensor._version != version or tensor.data_ptr() != address or tensor.requires_grad != trains:
                return False
        return True
