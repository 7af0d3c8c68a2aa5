"""The sources of records: where attention is seen to happen, one small module each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from pytest_attnheat.capture.sources import flex, fused, multihead, sdpa, written
from pytest_attnheat.capture.watching import Source


def source_of(func: Callable[..., Any]) -> Source | None:
    """Return the source that knows a function; None for one that tells nothing."""
    if func is functional.multi_head_attention_forward:
        return multihead.see
    if func in (functional.scaled_dot_product_attention,):
        return sdpa.see
    if isinstance(func, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return _source_of_operator(func)
    if isinstance(func, torch._ops.HigherOrderOperator):
        return flex.see if func._name == "flex_attention" else None
    name = getattr(func, "__name__", "")
    return fused.see if fused.is_attention(name) else written.source_of(name, func)


def _source_of_operator(func: Any) -> Source | None:
    """An operator called by its name: of PyTorch, as in an exported model, or somebody's own."""
    namespace, _, name = str(func).partition(".")
    name = name.split(".")[0]
    if namespace != "aten":
        return fused.see if fused.is_attention(name) else None
    if name == "scaled_dot_product_attention":
        return sdpa.see
    return fused.see if fused.is_attention(name) else written.source_of(name, func)
