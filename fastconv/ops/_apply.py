"""autograd Functions without the price of their Python front."""

from __future__ import annotations

from typing import Any

import torch

_functorch_is_active = torch._C._are_functorch_transforms_active
_unwrap_dead_wrappers = torch._functorch.utils.unwrap_dead_wrappers


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)`` for a Function with ``setup_context`` that is given all of its arguments.

    torch's own ``apply`` fills in default arguments through ``inspect.signature``, which costs more than a small
    pooling layer; the rest of what it does is here.
    """
    if _functorch_is_active():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*_unwrap_dead_wrappers(args))  # type: ignore[misc]
