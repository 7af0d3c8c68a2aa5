"""Ready-made specifications: of PyTorch's modules and transformers' functions."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import nn

from ..attention.scoring import draw
from ..callables import is_compiled
from ..capture.record import AttentionRecord
from ..capture.trace import Trace
from ..inputs import misuse
from .spec import AttentionSpec

_BATCH, _LENGTH = 2, 9
# Blocks that need no inputs to be given.
READY_MADE = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)


def as_spec(subject: AttentionSpec | Callable[..., Any] | Trace | AttentionRecord) -> AttentionSpec:
    """Return a specification: as it is, ready-made, or of a callable with nothing declared."""
    # Ready-made are those of `nn.MultiheadAttention`, `nn.TransformerEncoderLayer` and
    # `nn.TransformerEncoder`, as blocks in evaluation mode. Public callables that are recognised by
    # their parameters are called as they are, see `conventions`.
    if isinstance(subject, AttentionSpec):
        return subject
    width = _width_of(subject)
    if width is not None and isinstance(subject, nn.Module):
        dtype = next(p.dtype for p in subject.parameters())
        inputs = draw("block", 0, _BATCH, _LENGTH, width).to(dtype)
        return AttentionSpec(subject, inputs=inputs, causal=None)
    # What is not typed is what its convention says.
    return (
        AttentionSpec(subject, few_shapes=True) if is_compiled(subject) else AttentionSpec(subject)
    )


def _width_of(subject: object) -> int | None:
    if isinstance(subject, nn.MultiheadAttention):
        return int(subject.embed_dim)
    if isinstance(subject, nn.TransformerEncoderLayer):
        return int(subject.self_attn.embed_dim)
    if isinstance(subject, nn.TransformerEncoder):
        return _width_of(subject.layers[0])
    return None


def transformers_attention(name: str = "sdpa") -> AttentionSpec:
    """Return the specification of an attention function that transformers has registered.

    Args:
        name: Its name in `transformers.AttentionInterface`, or `"eager"` (that of Llama).

    Returns:
        A specification. It is handed its mask as models hand it: floats of 0 and the lowest
        number of the dtype. Fully masked rows are not judged; eager attention computes its softmax
        in float32, so that it is not examined in float64, and `"flex_attention"` is not compiled.

    Raises:
        ValueError: There is no such function.
        ImportError: transformers is not installed, or older than 4.53, whose `"sdpa"` is causal
            whatever its layer says.
    """
    try:
        found = version("transformers")
    except PackageNotFoundError:
        found = "none"
    if tuple(map(int, re.findall(r"\d+", found)[:2])) < (4, 53):
        raise ImportError(misuse("transformers", found, "version 4.53 or newer"))
    from transformers import AttentionInterface
    from transformers.models.llama.modeling_llama import eager_attention_forward

    registered = AttentionInterface()  # type: ignore[no-untyped-call]
    if name != "eager" and name not in registered:
        known = ", ".join(map(repr, ["eager", *sorted(registered)]))
        raise ValueError(misuse("name", repr(name), f"one of {known}"))
    forward = eager_attention_forward if name == "eager" else registered[name]
    dtypes = ("float32", "float16", "bfloat16") + (() if name == "eager" else ("float64",))
    # Of a mask for each head it reads the first: models hand it none.
    shape = "(B, 1, L, S)" if name == "flex_attention" else None
    return AttentionSpec(
        forward, name=f"transformers_{name}", like="transformers", dtypes=dtypes, mask_shape=shape
    )
