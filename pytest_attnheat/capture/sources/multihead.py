"""`multi_head_attention_forward`, in which all of `nn.MultiheadAttention` happens."""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from torch.nn import functional

from pytest_attnheat.capture.watching import Watcher

_HEADS_POSITION = 4


def see(
    watcher: Watcher, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run its own code under the watcher: the products or the fused call within are seen.

    A mode is set aside while it handles a function, and the function would hand itself to the
    mode for ever if the mode came back. So a copy of the function runs that never asks for modes.
    """
    before = watcher.heads
    watcher.heads = args[_HEADS_POSITION] if len(args) > _HEADS_POSITION else kwargs["num_heads"]
    try:
        with watcher:
            return _unasking()(*args, **kwargs)
    finally:
        watcher.heads = before


@lru_cache(maxsize=1)
def _unasking() -> Callable[..., Any]:
    """The function's own code, with globals in which no argument is special."""
    original = functional.multi_head_attention_forward
    names = {**original.__globals__, "has_torch_function": lambda tensors: False}
    copy = types.FunctionType(
        original.__code__, names, original.__name__, original.__defaults__, original.__closure__
    )
    copy.__kwdefaults__ = original.__kwdefaults__
    return copy
