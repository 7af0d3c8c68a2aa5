"""Conventions of callables that take sequences of several lengths in one tensor, back to back."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...attention.call import Call
from ...attention.drawing import RAGGED, SAME
from ...attention.packing import bounds, lengths_of, packed, unpacked
from . import reading
from .convention import Arrange, Convention, Lse
from .dense import ALIKE, FLASH, FLASH_2, FLASH_VALUES, inclusive

if TYPE_CHECKING:
    from ..spec import AttentionSpec

# What `packing` needs to be told: keywords of where sequences begin, and of the longest.
CU = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")


def packing(*, names: tuple[str, ...] = CU, together: str = "") -> Arrange:
    """Return what packs the sequences of a call, and unpacks what comes back."""
    # `names`: of where sequences of queries and of keys begin, and of how long the longest is; two
    # of them where queries and keys share one. `together`: "qkv" where all three are one tensor
    # (tokens, 3, heads, width), "kv" where keys and values are.

    def arrange(spec: AttentionSpec, call: Call, arguments: dict[str, Any]) -> Any:
        queries, keys = lengths_of(call)
        inputs = [packed(call.query, queries), packed(call.key, keys), packed(call.value, keys)]
        if together:
            first = 0 if together == "qkv" else 1
            inputs[first:] = [torch.stack(inputs[first:], 1)]
        told = [
            *(bounds(n).int() for n in (queries, keys)),
            *(int(n.max()) for n in (queries, keys)),
        ]
        told = told[::2] if together == "qkv" else told
        named = dict(zip(names, told, strict=True))
        return unpack(spec.implementation(*inputs, **named, **arguments), call, heads_first=True)

    return arrange


def in_a_row(*, names: tuple[str, ...] = CU, together: str = "") -> dict[str, Any]:
    """How calls of a row are made and read, see `packing`."""
    return {
        "arrange": packing(names=names, together=together),
        "read": partial(reading.back_to_back, names, together),
        "begins": (names[0], names[len(names) // 2 - 1]),
    }


def unpack(result: Any, call: Call, heads_first: bool) -> Any:
    """Return an output (tokens, heads, width), and a log-sum-exp beside it, as of a whole batch."""
    queries, _ = lengths_of(call)
    if not isinstance(result, tuple | list):
        return unpacked(result, queries, call.query_len)
    lse = result[1] if len(result) > 1 else None
    if isinstance(lse, Tensor):
        own = lse.T if heads_first else lse
        turned = len(own) != len(result[0])  # the other way round: a check says so
        lse = unpacked(own.T if turned else own, queries, call.query_len)
        lse = lse if turned else lse.transpose(1, 2)
    return unpacked(result[0], queries, call.query_len), lse


def flat_mask(mask: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """Return a mask (batch, 1, queries, keys) of all sequences, one after the other."""
    whole = mask.expand(len(queries), -1, -1, -1)[:, 0]
    return torch.cat(
        [own[:q, :k].flatten() for own, q, k in zip(whole, queries, keys, strict=True)]
    )


def _window_alone(spec: AttentionSpec, call: Call, arguments: dict[str, Any]) -> Any:
    """Call what is causal by its window, whose right side is then 0."""
    left, right = call.window or (None, None)
    if arguments.pop("is_causal", False):
        right = 0
    arguments["window_size"] = inclusive(-1)((left, right))
    return packing(names=("cu_seq_q", "cu_seq_k", "max_q", "max_k"))(spec, call, arguments)


_PACKED: dict[str, Any] = {
    "ragged": RAGGED, "besides": {"return_attn_probs": True}, "lse": Lse(), "values": FLASH_VALUES,
}  # fmt: skip
# Without what FlashAttention has besides.
_BARE = {name: FLASH[name] for name in ("layout", "mask", "causal", "grouped", "fully_masked")}

CONVENTIONS = (
    Convention("flash_attn_varlen", "flash_attn_varlen_func of FlashAttention 2",
               ("q", "k", "v", *CU, "softmax_scale"), FLASH_2,
               lacks=("seqused_k", "attention_chunk"), **in_a_row(), only=ALIKE, **_PACKED),
    Convention("flash_attn_varlen_qkvpacked",
               "flash_attn_varlen_qkvpacked_func of FlashAttention 2",
               ("qkv", "cu_seqlens", "max_seqlen", "softmax_scale"),
               {**FLASH_2, "grouped": False, "square": True, "dropout": False},
               limits="dropout", only=ALIKE,
               **in_a_row(names=("cu_seqlens", "max_seqlen"), together="qkv"),
               **{**_PACKED, "ragged": SAME}),
    Convention("flash_attn_varlen_kvpacked", "flash_attn_varlen_kvpacked_func of FlashAttention 2",
               ("q", "kv", *CU, "softmax_scale"), {**FLASH_2, "dropout": False},
               **in_a_row(together="kv"), limits="dropout", only=ALIKE, **_PACKED),
    Convention("flash_attn_3_varlen", "flash_attn_varlen_func of FlashAttention 3",
               ("q", "k", "v", *CU, "softmax_scale", "attention_chunk"),
               {**FLASH, "chunk": "attention_chunk"}, lacks=("k_cache",), **in_a_row(),
               **_PACKED),
    Convention("flash_attn_4_varlen", "flash_attn_varlen_func of FlashAttention 4",
               ("q", "k", "v", *CU, "softmax_scale", "learnable_sink"),
               {**FLASH, "sinks": "learnable_sink"}, **in_a_row(),
               **{**_PACKED, "values": {"window": inclusive(None)}, "lse": Lse(sink=True),
                  "besides": {"return_lse": True}}),
    Convention("flash_mla_varlen", "flash_attn_varlen_func of FlashMLA",
               ("q", "k", "v", "cu_seqlens_qo", "cu_seqlens_kv", "max_seqlen_qo", "max_seqlen_kv"),
               {**_BARE, "causal_argument": "causal", "scale_argument": "softmax_scale",
                "dropout": "dropout_p"}, ragged=RAGGED,
               **in_a_row(names=("cu_seqlens_qo", "cu_seqlens_kv", "max_seqlen_qo",
                                 "max_seqlen_kv"))),
    Convention("torch_varlen", "varlen_attn of PyTorch",
               ("query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"),
               {**_BARE, "causal_argument": "is_causal", "scale_argument": "scale",
                "window": "window_size"},
               handles=("is_causal",), arrange=_window_alone, read=reading.varlen_of_torch,
               begins=("cu_seq_q", "cu_seq_k"),
               only=ALIKE, ragged=RAGGED),
    Convention("sageattn_varlen", "sageattn_varlen of SageAttention",
               ("q", "k", "v", *CU, "is_causal", "sm_scale"),
               {**_BARE, "causal": "top_left", "causal_argument": "is_causal",
                "scale_argument": "sm_scale", "square": True},
               **in_a_row(), only=ALIKE, ragged=SAME,
               limits="other numbers of keys than of queries"),
)  # fmt: skip
