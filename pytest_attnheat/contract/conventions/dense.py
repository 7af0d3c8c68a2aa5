"""Conventions of callables that take queries, keys and values of one length for all of a batch."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...attention.call import Call
from ...callables import is_compiled
from ..asking import dense, to_layout
from . import reading
from .convention import Convention, Lse

if TYPE_CHECKING:
    from ..spec import AttentionSpec


# What FlashAttention's functions share.
FLASH: dict[str, Any] = {
    "layout": "blhd", "mask": None, "causal": "bottom_right", "causal_argument": "causal",
    "scale_argument": "softmax_scale", "window": "window_size", "softcap": "softcap",
    "grouped": True, "fully_masked": "zero", "returns": "lse",
}  # fmt: skip
FLASH_2: dict[str, Any] = {**FLASH, "alibi": "alibi_slopes", "dropout": "dropout_p"}

# What FlashInfer's functions share.
FLASHINFER: dict[str, Any] = {
    **FLASH, "scale_argument": "sm_scale", "window": "window_left", "softcap": "logits_soft_cap",
    "gradients": False,
}  # fmt: skip
# Of what takes values as wide as its keys alone.
ALIKE: dict[str, tuple[Any, ...]] = {"value_dim": ("equal",)}


def float32(tensor: Tensor) -> Tensor:
    """Numbers per head as kernels take them."""
    return tensor.float()


FLASH_VALUES = {"alibi": float32}


def inclusive(off: Any) -> Any:
    """Return what makes a window a pair; `off` stands for a side that ends nowhere."""
    return lambda window: tuple(off if side is None else side for side in window)


def left_only(window: tuple[int | None, int | None]) -> int:
    """How many keys before a query are seen, where nothing is said of those after it."""
    assert window[0] is not None
    return window[0]


def with_itself(window: tuple[int | None, int | None]) -> int:
    """How many keys a query sees, its own among them."""
    return left_only(window) + 1


# --- tensors that hold several of query, key and value


def _qkv_packed(spec: AttentionSpec, call: Call, arguments: dict[str, Any]) -> Any:
    query, key, value = (to_layout(spec, tensor) for tensor in call.tensors)
    return spec.implementation(torch.stack((query, key, value), 2), **arguments)


def _kv_packed(spec: AttentionSpec, call: Call, arguments: dict[str, Any]) -> Any:
    query, key, value = (to_layout(spec, tensor) for tensor in call.tensors)
    return spec.implementation(query, torch.stack((key, value), 2), **arguments)


PROBABILITIES = {"return_attn_probs": True}

# --- one sample at a time


def _each_sample(spec: AttentionSpec, call: Call, arguments: dict[str, Any]) -> Any:
    """Call it with each sample alone, (length, heads, width), and stack what it returns."""
    mask = arguments.pop("custom_mask", None)
    results = []
    for sample in range(call.query.shape[0]):
        own = {} if mask is None else {"custom_mask": mask[sample if len(mask) > 1 else 0, 0]}
        inputs = (tensor[sample].transpose(0, 1) for tensor in call.tensors)
        results.append(spec.implementation(*inputs, **arguments, **own))
    if not isinstance(results[0], tuple | list):
        return torch.stack(results)
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True))


def _one_query(spec: AttentionSpec, call: Call, arguments: dict[str, Any]) -> Any:
    """Call it with the one query of each sample, (heads, width)."""
    results = []
    for query, key, value in zip(*call.tensors, strict=True):
        inputs = query[:, 0], key.transpose(0, 1), value.transpose(0, 1)
        results.append(spec.implementation(*inputs, **arguments))
    if not isinstance(results[0], tuple | list):
        return torch.stack(results)[:, None]
    return tuple(torch.stack(parts)[:, None] for parts in zip(*results, strict=True))


def _always_causal(spec: AttentionSpec, call: Call, arguments: dict[str, Any]) -> Any:
    """Call what is causal without being told."""
    arguments.pop(spec.causal_argument, None)
    return dense(spec, call, arguments)


# --- PyTorch and transformers


def _flex(spec: AttentionSpec, call: Call, arguments: dict[str, Any]) -> Any:
    """`flex_attention`, or what it was compiled to, with mask and causality as its block mask."""
    from torch.nn.attention.flex_attention import create_block_mask

    mask, causal = arguments.pop("attn_mask", None), arguments.pop("is_causal", False)
    block_mask = None
    if mask is not None or causal:
        shape = (*call.query.shape[:-1], call.key_len)
        device = call.query.device
        whole = torch.ones((), dtype=torch.bool, device=device)
        permitted = (whole if mask is None else mask).expand(shape)

        def may_attend(batch: Tensor, head: Tensor, query_at: Tensor, key_at: Tensor) -> Tensor:
            allowed = permitted[batch, head, query_at, key_at]
            return allowed & (key_at <= query_at) if causal else allowed

        block_mask = create_block_mask(
            may_attend, shape[0], shape[1], shape[2], shape[3], device=str(device)
        )
    arguments["block_mask"] = block_mask
    if is_compiled(spec.implementation):
        return dense(spec, call, arguments)
    with _uncompiled():
        return dense(spec, call, arguments)


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Call `flex_attention` as it is: each of many small shapes would be compiled anew."""
    # And, even where nobody compiles, traced anew.
    stance = getattr(torch.compiler, "set_stance", None)  # since torch 2.6
    untraced = nullcontext() if stance is None else stance("force_eager")
    with warnings.catch_warnings(), untraced:
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        warnings.simplefilter("ignore", DeprecationWarning)  # what is to compile it has some
        yield


_FLEX_OF_TRANSFORMERS = "transformers.integrations.flex_attention"


def _transformers(spec: AttentionSpec, call: Call, arguments: dict[str, Any]) -> Any:
    """An attention function of transformers, with a layer, and its mask as floats."""
    layer = nn.Module().train(bool(arguments.get("dropout")))
    layer.num_key_value_groups = call.group  # type: ignore[assignment]
    layer.is_causal = False  # type: ignore[assignment]
    mask = arguments.pop("attention_mask", None)
    if call.query_len != call.key_len and arguments.pop("is_causal", False):
        # It has no corner of its own: models say it in the mask.
        corner = call.key_len - call.query_len if spec.alignment == "bottom_right" else 0
        every = torch.ones(1, 1, call.query_len, call.key_len, device=call.query.device)
        mask = every.tril(corner).bool()
    if mask is not None:
        lowest = torch.finfo(call.query.dtype).min
        added = torch.zeros(mask.shape, dtype=call.query.dtype, device=call.query.device)
        mask = added.masked_fill(~mask, lowest)
    arguments = {"dropout": 0.0, **arguments, "scaling": call.factor}
    is_flex = getattr(spec.implementation, "__module__", "") == _FLEX_OF_TRANSFORMERS
    if is_flex and mask is not None:  # it reads each place of it
        mask = mask.expand(len(call.query), -1, call.query_len, call.key_len)
    with _uncompiled() if is_flex else nullcontext():
        output = spec.implementation(layer, *call.tensors, mask, **arguments)[0]
    return output.transpose(1, 2)  # of what goes in, heads come first


CONVENTIONS = (
    Convention("flash_attn", "flash_attn_func of FlashAttention 2",
               ("softmax_scale", "alibi_slopes", "dropout_p", "q", "k", "v"), FLASH_2,
               lacks=("cu_seqlens_q", "cu_seqlens", "group"), values=FLASH_VALUES,
               besides=PROBABILITIES, lse=Lse(), only=ALIKE),
    Convention("flash_attn_qkvpacked", "flash_attn_qkvpacked_func of FlashAttention 2",
               ("qkv", "softmax_scale", "window_size"),
               {**FLASH_2, "grouped": False, "square": True, "dropout": False}, limits="dropout",
               lacks=("cu_seqlens",), values=FLASH_VALUES, arrange=_qkv_packed,
               read=reading.qkv_stacked, besides=PROBABILITIES, lse=Lse(), only=ALIKE),
    Convention("flash_attn_kvpacked", "flash_attn_kvpacked_func of FlashAttention 2",
               ("q", "kv", "softmax_scale", "window_size"), {**FLASH_2, "dropout": False},
               limits="dropout", lacks=("cu_seqlens_q", "cu_seqlens"), values=FLASH_VALUES,
               arrange=_kv_packed, read=reading.kv_stacked,
               besides=PROBABILITIES, lse=Lse(), only=ALIKE),
    Convention("flash_attn_3", "flash_attn_func of FlashAttention 3",
               ("q", "k", "v", "softmax_scale", "attention_chunk"),
               {**FLASH, "chunk": "attention_chunk"},
               lacks=("cu_seqlens_q", "k_cache"), values=FLASH_VALUES,
               besides=PROBABILITIES, lse=Lse()),
    Convention("flash_attn_4", "flash_attn_func of FlashAttention 4",
               ("q", "k", "v", "softmax_scale", "learnable_sink"),
               {**FLASH, "sinks": "learnable_sink"},
               lacks=("cu_seqlens_q", "page_table"), values={"window": inclusive(None)},
               besides={"return_lse": True}, lse=Lse(sink=True)),
    Convention("sageattn", "sageattn of SageAttention", ("tensor_layout", "is_causal", "sm_scale"),
               {"mask": None, "causal": "top_left", "causal_argument": "is_causal",
                "scale_argument": "sm_scale", "grouped": True, "returns": "lse"},
               besides={"return_lse": True}, lse=Lse(), only=ALIKE),
    Convention("xformers", "memory_efficient_attention of xformers", ("attn_bias", "p", "scale"),
               {"layout": "blhd", "mask": "additive", "mask_argument": "attn_bias",
                "mask_shape": "(B, H, L, S)", "causal": None, "scale_argument": "scale",
                "dropout": "p", "fully_masked": "undefined"},
               limits="attn_bias as a tensor alone, not as one of its classes"),
    Convention("flashinfer_single_prefill", "single_prefill_with_kv_cache of FlashInfer",
               ("custom_mask", "logits_soft_cap", "window_left", "kv_layout"),
               {**FLASHINFER, "mask": "keep", "mask_argument": "custom_mask",
                "mask_shape": "(B, 1, L, S)"},
               lacks=("qo_indptr",), values={"window": left_only}, arrange=_each_sample,
               read=reading.each_sample, besides={"return_lse": True}, lse=Lse("blh", "2"),
               only={"window": (False, "left")},
               apart=(("mask", "causal"),), limits="custom_mask and causal at once"),
    Convention("flashinfer_single_decode", "single_decode_with_kv_cache of FlashInfer",
               ("logits_soft_cap", "window_left", "kv_layout", "sm_scale"),
               FLASHINFER,
               lacks=("custom_mask", "qo_indptr", "indptr", "causal"), values={"window": left_only},
               arrange=_one_query, read=reading.each_sample, besides={"return_lse": True},
               lse=Lse("blh", "2"),
               only={"window": (False, "left")}, one_query=True),
    Convention("fla_parallel_attn", "parallel_attn of flash-linear-attention",
               ("g", "scale", "window_size", "sink_bias"),
               {"layout": "blhd", "mask": None, "causal": "top_left", "scale_argument": "scale",
                "window": "window_size", "sinks": "sink_bias", "grouped": True, "square": True},
               values={"window": with_itself}, arrange=_always_causal,
               read=reading.always_causal, handles=("is_causal",),
               only={"causal": (True,), "window": (False, "left")}),
    Convention("flex_attention", "flex_attention of PyTorch",
               ("score_mod", "block_mask", "enable_gqa"),
               {"grouped": True, "scale_argument": "scale"}, arrange=_flex, read=reading.flex,
               handles=("attn_mask", "is_causal")),
    Convention("transformers", "an attention function of transformers",
               ("module", "query", "key", "value", "attention_mask"),
               {"causal": "bottom_right", "causal_argument": "is_causal",
                "mask_argument": "attention_mask",
                "scale_argument": "scaling", "softcap": "softcap", "sinks": "s_aux",
                "window": "sliding_window", "dropout": "dropout", "grouped": True,
                "fully_masked": "undefined"},
               values={"window": with_itself}, arrange=_transformers, read=reading.transformers,
               only={"window": (False, "left")}, apart=(("mask", "causal"),)),
)  # fmt: skip
