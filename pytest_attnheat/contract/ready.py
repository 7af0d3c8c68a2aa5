"""Ready-made specifications: of PyTorch's modules, `flex_attention` and transformers' functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from pytest_attnheat.attention.scoring import draw
from pytest_attnheat.callables import is_compiled
from pytest_attnheat.capture.record import AttentionRecord
from pytest_attnheat.capture.trace import Trace
from pytest_attnheat.contract.spec import AttentionSpec
from pytest_attnheat.inputs import misuse

_BATCH, _LENGTH = 2, 9


def as_spec(subject: AttentionSpec | Callable[..., Any] | Trace | AttentionRecord) -> AttentionSpec:
    """Return a specification: as it is, ready-made, or of a callable with nothing declared.

    Ready-made are those of `nn.MultiheadAttention`, `nn.TransformerEncoderLayer` and
    `nn.TransformerEncoder`, as blocks in evaluation mode, and of the function `flex_attention`.
    """
    if isinstance(subject, AttentionSpec):
        return subject
    width = _width_of(subject)
    if width is not None and isinstance(subject, nn.Module):
        dtype = next(p.dtype for p in subject.parameters())
        inputs = draw("block", 0, _BATCH, _LENGTH, width).to(dtype)
        return AttentionSpec(subject, inputs=inputs, causal=None)
    if getattr(subject, "__module__", "") == "torch.nn.attention.flex_attention":
        if not is_compiled(subject):
            return AttentionSpec(_flex, name="flex_attention")
        compiled = partial(_flex, attend=cast(Callable[..., Any], subject))
        return AttentionSpec(compiled, name="flex_attention (compiled)", few_shapes=True)
    return AttentionSpec(subject, few_shapes=is_compiled(subject))


def _width_of(subject: object) -> int | None:
    if isinstance(subject, nn.MultiheadAttention):
        return int(subject.embed_dim)
    if isinstance(subject, nn.TransformerEncoderLayer):
        return int(subject.self_attn.embed_dim)
    if isinstance(subject, nn.TransformerEncoder):
        return _width_of(subject.layers[0])
    return None


def _flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    attend: Callable[..., Any] | None = None,
) -> Any:
    """`flex_attention`, or what it was compiled to, with a mask as its block mask."""
    import warnings

    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    block_mask = None
    if attn_mask is not None or is_causal:
        shape = (*query.shape[:-1], key.shape[-2])
        whole = torch.ones((), dtype=torch.bool, device=query.device)
        permitted = (whole if attn_mask is None else attn_mask).expand(shape)

        def may_attend(batch: Tensor, head: Tensor, query_at: Tensor, key_at: Tensor) -> Tensor:
            allowed = permitted[batch, head, query_at, key_at]
            return allowed & (key_at <= query_at) if is_causal else allowed

        block_mask = create_block_mask(
            may_attend, shape[0], shape[1], shape[2], shape[3], device=str(query.device)
        )
    if attend is not None:
        return attend(query, key, value, block_mask=block_mask, scale=scale, enable_gqa=enable_gqa)
    # Not compiled: each of the many small shapes would be compiled anew, and, even where nobody
    # compiles, traced anew.
    stance = getattr(torch.compiler, "set_stance", None)  # since torch 2.6
    untraced = nullcontext() if stance is None else stance("force_eager")
    with warnings.catch_warnings(), untraced:
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        return flex_attention(
            query, key, value, block_mask=block_mask, scale=scale, enable_gqa=enable_gqa
        )


def transformers_attention(name: str = "sdpa") -> AttentionSpec:
    """Return the specification of an attention function that transformers has registered.

    Args:
        name: Its name in `transformers.AttentionInterface`, or `"eager"` (that of Llama).

    Returns:
        A specification. It is handed its mask as models hand it: floats of 0 and the lowest
        number of the dtype. Fully masked rows are not judged; eager attention computes its softmax
        in float32, so that it is not examined in float64.

    Raises:
        ValueError: There is no such function.
    """
    from transformers import AttentionInterface
    from transformers.models.llama.modeling_llama import eager_attention_forward

    registered = AttentionInterface()  # type: ignore[no-untyped-call]
    if name != "eager" and name not in registered:
        known = ", ".join(map(repr, ["eager", *sorted(registered)]))
        raise ValueError(misuse("name", repr(name), f"one of {known}"))
    forward = eager_attention_forward if name == "eager" else registered[name]
    dtypes = ("float32", "float16", "bfloat16") + (() if name == "eager" else ("float64",))
    return AttentionSpec(
        _adapted(forward),
        name=f"transformers_{name}",
        grouped=True,
        fully_masked="undefined",
        dtypes=dtypes,
    )


def _adapted(forward: Callable[..., Any]) -> Callable[..., Tensor]:
    def function(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None
    ) -> Tensor:
        layer = nn.Module().eval()
        layer.num_key_value_groups = query.shape[1] // key.shape[1]  # type: ignore[assignment]
        layer.is_causal = False  # type: ignore[assignment]
        added = None
        if attn_mask is not None:
            lowest = torch.finfo(query.dtype).min
            added = torch.zeros(attn_mask.shape, dtype=query.dtype, device=query.device)
            added = added.masked_fill(~attn_mask, lowest)
        scale = 1 / math.sqrt(query.shape[-1])
        output: Tensor = forward(layer, query, key, value, added, scaling=scale, dropout=0.0)[0]
        return output.transpose(1, 2)

    return function
