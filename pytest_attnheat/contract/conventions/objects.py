"""Conventions of what is told its options before it is called, and of what writes into buffers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...attention.call import Call
from ...attention.drawing import RAGGED
from ...attention.packing import bounds, lengths_of, packed
from ...failure import Failure
from ..asking import dense, to_layout
from .convention import Convention, Lse
from .dense import FLASHINFER, float32, inclusive, left_only
from .packed import flat_mask, unpack

if TYPE_CHECKING:
    from ..spec import AttentionSpec


def poisoned(*shape: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a buffer that holds NaN, so that what is not written to shows."""
    return torch.full(shape, math.nan, dtype=dtype or like.dtype, device=like.device)


def written(buffer: Tensor, name: str) -> Tensor:
    """Return a buffer that was handed to a subject; a Failure if nothing was written into it."""
    if buffer.numel() and bool(buffer.isnan().all()):
        raise Failure("", f"nothing is written into the buffer {name}=", cause=f"{name} is ignored")
    return buffer


# --- what writes its output into a buffer


def _in_place(spec: AttentionSpec, call: Call, arguments: dict[str, Any]) -> Any:
    """Hand it a buffer for the output, in its layout."""
    inputs = [to_layout(spec, tensor) for tensor in call.tensors]
    out = to_layout(spec, poisoned(*call.shapes["output"], like=call.query)).contiguous()
    result = spec.implementation(*inputs, out=out, **arguments)
    return written(out, "out") if result is None or result is out else (result, written(out, "out"))


def _kernel(spec: AttentionSpec, call: Call, arguments: dict[str, Any]) -> Any:
    """Call a kernel of PyTorch that relies on its caller for strides, and for gradients."""
    mask = arguments.get("attn_mask")
    if mask is not None and mask.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError("it has no gradient of attn_mask")
    if any(tensor.stride(-1) != 1 for tensor in call.tensors):
        raise NotImplementedError("it takes numbers of a row one after the other")
    return dense(spec, call, arguments)


# --- an object that plans, and then runs


def _plan_and_run(spec: AttentionSpec, call: Call, arguments: dict[str, Any]) -> Any:
    """Tell it the lengths of all sequences and the options, then hand it the packed tensors."""
    # Where the number of heads is odd, it is handed buffers for what it returns.
    subject: Any = spec.subject
    queries, keys = lengths_of(call)
    inputs = packed(call.query, queries), packed(call.key, keys), packed(call.value, keys)
    asked = {"return_lse": arguments.pop("return_lse", False)}
    if (mask := arguments.pop("custom_mask", None)) is not None:
        arguments["custom_mask"] = flat_mask(mask, queries, keys)
    dtype = call.query.dtype
    subject.plan(
        bounds(queries).int(), bounds(keys).int(), num_qo_heads=call.heads,
        num_kv_heads=call.key.shape[1], head_dim_qk=call.query.shape[-1],
        head_dim_vo=call.value.shape[-1], q_data_type=dtype, kv_data_type=dtype, **arguments,
    )  # fmt: skip
    if call.heads % 2 == 0 or not len(inputs[0]):
        return unpack(subject.run(*inputs, **asked), call, heads_first=False)
    shape = inputs[0].shape[:-1]
    asked["out"] = poisoned(*shape, inputs[2].shape[-1], like=call.query)
    if asked["return_lse"]:
        asked["lse"] = poisoned(*shape, like=call.query, dtype=torch.float32)
    subject.run(*inputs, **asked)
    found = [written(asked[name], name) for name in ("out", "lse") if name in asked]
    return unpack(found if len(found) > 1 else found[0], call, heads_first=False)


# --- a class whose constructor takes the options


def _made_for_each(spec: AttentionSpec, call: Call, arguments: dict[str, Any]) -> Any:
    """Make a module for the heads, the widths and the options of a call, and call it once."""
    mask, causal = (arguments.pop(n, None) for n in ("attention_mask", "attn_mask_type"))
    slopes, bias = (arguments.pop(n, None) for n in ("alibi_slopes", "core_attention_bias"))
    kind = "no_mask" if mask is None else "arbitrary"
    if causal:
        kind = "causal_bottom_right" if spec.alignment == "bottom_right" else "causal"
    if (window := arguments.pop("window_size", None)) is not None:
        right = call.key_len if window[1] is None else window[1]
        arguments["window_size"] = window[0], 0 if causal else right
    if "bottom_right_diagonal" in (spec.parameters or {}):
        arguments["bottom_right_diagonal"] = spec.alignment == "bottom_right"
    if spec.layout != "lbhd":
        arguments["qkv_format"] = {"blhd": "bshd"}[spec.layout]
    width, value_width = call.query.shape[-1], call.value.shape[-1]
    module = spec.implementation(
        call.heads, width if width == value_width else (width, value_width),
        num_gqa_groups=call.key.shape[1], attn_mask_type=kind, **arguments,
    )  # fmt: skip
    asked: dict[str, Any] = {} if mask is None else {"attention_mask": mask}
    if slopes is not None:
        asked |= {"core_attention_bias_type": "alibi", "alibi_slopes": slopes}
    if bias is not None:
        asked |= {"core_attention_bias_type": "post_scale_bias", "core_attention_bias": bias}
    output = module(*(to_layout(spec, tensor) for tensor in call.tensors), **asked)
    return output.unflatten(-1, (call.heads, -1))


# What packs its sequences or keeps them in pages is called otherwise.
_NOT_DENSE = ("cu_seqlens_q", "cu_seq_q", "qo_indptr", "kv_indptr", "indptr", "seq_lens",
              "block_table", "block_tables", "page_table")  # fmt: skip

CONVENTIONS = (
    Convention("out_parameter", "a function that writes into a buffer out", ("out",),
               {"scale_argument": ("scale", "softmax_scale", "sm_scale")}, lacks=_NOT_DENSE,
               arrange=_in_place),
    Convention("flashinfer_ragged", "BatchPrefillWithRaggedKVCacheWrapper of FlashInfer",
               ("qo_indptr", "kv_indptr", "num_qo_heads", "num_kv_heads", "q", "k", "v"),
               {**FLASHINFER, "mask": "keep", "mask_argument": "custom_mask",
                "mask_shape": "(B, 1, L, S)"},
               lacks=("paged_kv_indptr",), values={"window": left_only}, arrange=_plan_and_run,
               besides={"return_lse": True}, lse=Lse("bhl", "2"), ragged=RAGGED,
               begins=("qo_indptr", "kv_indptr"),
               only={"window": (False, "left")}, apart=(("mask", "causal"),),
               limits="custom_mask and causal at once"),
    Convention("transformer_engine", "DotProductAttention of TransformerEngine",
               ("num_attention_heads", "kv_channels", "attn_mask_type", "softmax_scale"),
               {"layout": "lbhd", "mask": "drop", "mask_argument": "attention_mask",
                "causal": "top_left", "causal_argument": "attn_mask_type",
                "scale_argument": "softmax_scale", "window": "window_size",
                "alibi": "alibi_slopes", "bias": "core_attention_bias",
                "dropout": "attention_dropout", "grouped": True, "fully_masked": "undefined"},
               handles=("attention_mask", "alibi_slopes", "core_attention_bias"),
               values={"alibi": float32, "window": inclusive(None)}, makes=True,
               arrange=_made_for_each,
               apart=(("mask", "causal"), ("alibi", "bias")),
               limits="a softmax_type of its own, or a mask and causality at once"),
    Convention("aten_flash_cpu", "_scaled_dot_product_flash_attention_for_cpu of PyTorch",
               ("dropout_p", "is_causal", "attn_mask", "scale", "logsumexp"),
               {"mask": "additive", "causal": "top_left", "scale_argument": "scale",
                "dropout": False, "returns": "lse", "fully_masked": "undefined"},
               arrange=_kernel, lse=Lse()),
    Convention("diffusers", "dispatch_attention_fn of diffusers",
               ("query", "key", "value", "attn_mask", "attention_kwargs", "parallel_config"),
               {"layout": "blhd", "mask": "any", "causal": "top_left", "scale_argument": "scale",
                "grouped": True}),
)  # fmt: skip
