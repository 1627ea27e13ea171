"""torch's functions replaced by fastconv's for a scope, for models that call them by themselves."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from contextlib import ContextDecorator
from types import TracebackType
from typing import Any

import torch

from fastconv import functional

__all__ = ["patch"]

# Where torch's functions are found, and fastconv's functions of those names. nn.Conv2d and its like look theirs up in
# torch.nn.functional at each call.
_PLACES: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
    (torch.nn.functional, "conv2d", functional.conv2d),
    (torch.nn.functional, "max_pool2d", functional.max_pool2d),
    (torch.nn.functional, "avg_pool2d", functional.avg_pool2d),
    (torch.nn.functional, "adaptive_avg_pool2d", functional.adaptive_avg_pool2d),
    (torch.nn.functional, "local_response_norm", functional.local_response_norm),
    (torch, "conv2d", functional.conv2d),
)


class _Scope(threading.local):
    """How many patches this thread is inside of."""

    depth = 0


_scope = _Scope()
_lock = threading.Lock()
_installed: list[tuple[Any, str, Any, Any]] = []  # place, name, torch's function, ours in its stead
_scopes = 0


def patch() -> ContextDecorator:
    """Within ``with fastconv.patch():`` torch's own functions and layers compute with fastconv's kernels.

    Replaced are conv2d, max_pool2d, avg_pool2d, adaptive_avg_pool2d and local_response_norm of ``torch.nn.functional``,
    with them the layers of ``torch.nn`` that call them, and ``torch.conv2d``. Names that were imported before
    (``from torch.nn.functional import conv2d``) are not reached.

    Scopes nest, may be left by an exception, and the returned object may be entered again, also while it is entered; it
    is a decorator too. A scope belongs to its thread: other threads, a DataLoader's or DataParallel's among them, go on
    with torch's functions. When the last scope of the process ends, torch's modules hold the very objects that they
    held before.
    """
    return _Patch()


class _Patch(ContextDecorator):
    def __enter__(self) -> _Patch:
        global _scopes
        with _lock:
            if _scopes == 0:
                _install()
            _scopes += 1
        _scope.depth += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        global _scopes
        _scope.depth -= 1
        with _lock:
            _scopes -= 1
            if _scopes == 0:
                _restore()


def _install() -> None:
    for place, name, ours in _PLACES:
        theirs = getattr(place, name)
        switch = _switch(ours, theirs)
        _installed.append((place, name, theirs, switch))
        setattr(place, name, switch)


def _restore() -> None:
    while _installed:
        place, name, theirs, switch = _installed.pop()
        # Someone may have put a wrapper of his own around ours: his to take away; ours then passes on to torch.
        if getattr(place, name) is switch:
            setattr(place, name, theirs)


def _switch(ours: Callable[..., Any], theirs: Any) -> Callable[..., Any]:
    @functools.wraps(ours)
    def switch(*args: Any, **kwargs: Any) -> Any:
        return ours(*args, **kwargs) if _scope.depth else theirs(*args, **kwargs)

    return switch
