"""Operators that do attention and tell nothing: they are named, since they cannot be read."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

from pytest_attnheat.capture.watching import Watcher

_ATTENTION = re.compile(r"attention|attn|sdpa|flash|mha(_|$)", re.IGNORECASE)


def is_attention(name: str) -> bool:
    """Whether an operator of this name does attention, as far as names tell."""
    return _ATTENTION.search(name) is not None


def see(
    watcher: Watcher, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Call it, and tell that it happened."""
    operator = isinstance(func, torch._ops.OpOverload | torch._ops.OpOverloadPacket)
    watcher.miss(
        str(func) if operator else func.__name__,
        "a fused operator, which does not tell its mask, scale and causality",
    )
    return func(*args, **kwargs)
