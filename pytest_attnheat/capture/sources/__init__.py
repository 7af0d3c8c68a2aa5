"""The sources of records: where attention is seen to happen, one small module each."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch.nn import functional

from ..watching import Call, Function, Source
from . import flex, sdpa, written

# Operators of these names do attention and tell nothing, as far as names tell.
_ATTENTION = re.compile(r"attention|attn|sdpa|flash|mha(_|$)", re.IGNORECASE)


def source_of(func: Function) -> Source | None:
    """Return the source that knows a function; None for one that tells nothing."""
    if func is functional.multi_head_attention_forward:
        return sdpa.see_within
    if func in (functional.scaled_dot_product_attention,):
        return sdpa.see
    if isinstance(func, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return _source_of_operator(func)
    if isinstance(func, torch._ops.HigherOrderOperator):
        return flex.see if func._name == "flex_attention" else None
    name = getattr(func, "__name__", "")
    return _name if _ATTENTION.search(name) else written.source_of(name, func)


def _source_of_operator(func: Any) -> Source | None:
    """An operator called by its name: of PyTorch, as in an exported model, or somebody's own."""
    namespace, _, name = str(func).partition(".")
    name = name.split(".")[0]
    if namespace == "aten" and name == "scaled_dot_product_attention":
        return sdpa.see
    if _ATTENTION.search(name):
        return _name
    return written.source_of(name, func) if namespace == "aten" else None


def _name(call: Call) -> None:
    """Tell that an operator happened that cannot be read."""
    operator = isinstance(call.func, torch._ops.OpOverload | torch._ops.OpOverloadPacket)
    call.watcher.miss(
        str(call.func) if operator else call.func.__name__,
        "a fused operator, which does not tell its mask, scale and causality",
    )
