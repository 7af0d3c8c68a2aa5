"""`scaled_dot_product_attention`, and `multi_head_attention_forward`, in which it happens."""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ...attention.vocabulary import Alignment
from ..record import AttentionRecord
from ..shaping import Shaping
from ..tags import doubt_of, without_factor
from ..watching import After, Call, Instead, Watcher

_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
SOURCE = "scaled_dot_product_attention"


def see(call: Call) -> After:
    """Tell what it was given."""
    watcher, given = call.watcher, {**dict(zip(_NAMES, call.args, strict=False)), **call.kwargs}
    tensors = given["query"], given["key"], given["value"]

    def after(output: Any) -> None:
        strange = next((t for t in tensors if t.is_nested or t.is_sparse), None)
        if strange is not None or not isinstance(output, Tensor) or output.is_meta:
            kind = "nested" if strange is not None and strange.is_nested else "unusual"
            watcher.miss(SOURCE, f"it was given {kind} tensors")
            return
        watcher.tell(_record(watcher, given, output))

    return after


def _record(watcher: Watcher, given: dict[str, Any], output: Tensor) -> AttentionRecord:
    query, key, value = given["query"], given["key"], given["value"]
    tag, factors = watcher.tags[query], (watcher.tags.factor(query), watcher.tags.factor(key))
    before = None if tag is None else tag.before
    if query.dtype != output.dtype:  # Autocast, within the function.
        query, key, value = (t.to(output.dtype) for t in (query, key, value))
    if query.ndim == 3 and given.get("enable_gqa"):  # Its first axis is one of heads.
        query, key, value, output = (t.unsqueeze(0) for t in (query, key, value, output))
    if query.shape[:-2] != output.shape[:-2]:  # One query for several keys.
        query = query.expand(*output.shape[:-2], *query.shape[-2:])
    shaping = Shaping.of(query, before, watcher.heads)
    mask, bias, causal = _mask(given)
    scale = given.get("scale")
    scale = max(query.shape[-1], 1) ** -0.5 if scale is None else float(scale)
    # Some models scale queries in place of scores.
    query, key = (without_factor(t, f) for t, f in zip((query, key), factors, strict=True))
    return AttentionRecord(
        layer="", source=SOURCE, doubt=shaping.doubt or doubt_of([tag], query),
        shape=shaping.weights_shape(query.shape[-2], key.shape[-2]), dtype=output.dtype,
        query=shaping.queries(query), key=shaping.keys(key), value=shaping.keys(value),
        output=shaping.queries(output), given_mask=None if mask is None else shaping.mask(mask),
        bias=None if bias is None else shaping.mask(bias), causal=causal,
        scale=math.prod(factor for factor in (scale, *factors) if not math.isnan(factor)),
        scale_steps=(scale,), scaled_before=factors, dropout=float(given.get("dropout_p", 0.0)),
    )  # fmt: skip


def _mask(given: dict[str, Any]) -> tuple[Tensor | None, Tensor | None, Alignment | None]:
    """What was given as a mask: permitted keys, something added, an alignment."""
    mask = given.get("attn_mask")
    causal: Alignment | None = "top_left" if given.get("is_causal") else None
    if mask is None:
        return None, None, causal
    variant = getattr(mask, "variant", None)
    if variant is not None:  # torch.nn.attention.bias.CausalBias: no tensor is behind it.
        lower = "LOWER" in str(getattr(variant, "name", variant)).upper()
        return None, None, "bottom_right" if lower else "top_left"
    if mask.dtype == torch.bool:
        return mask, None, causal
    return None, mask, causal


def see_within(call: Call) -> Instead:
    """Run `multi_head_attention_forward` under the watcher: what happens within is seen."""
    # A mode is set aside while it handles a function, and the function would hand itself to the
    # mode for ever if the mode came back. So a copy of the function runs that never asks for modes.
    watcher = call.watcher

    def run() -> Any:
        before = watcher.heads
        watcher.heads = call.given(4, "num_heads")
        try:
            with watcher:
                return multi_head_unasking()(*call.args, **call.kwargs)
        finally:
            watcher.heads = before

    return Instead(run)


@lru_cache(maxsize=1)
def multi_head_unasking() -> Callable[..., Any]:
    """The code of `multi_head_attention_forward`, which asks no mode in place of itself."""
    original = functional.multi_head_attention_forward
    names = {**original.__globals__, "has_torch_function": lambda tensors: False}
    copy = types.FunctionType(
        original.__code__, names, original.__name__, original.__defaults__, original.__closure__
    )
    copy.__kwdefaults__ = original.__kwdefaults__
    return copy
