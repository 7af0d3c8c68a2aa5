"""Conventions of callables that read keys and values from a cache: rows, pages, slots."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...attention.call import Call
from ...attention.drawing import RAGGED
from ...attention.packing import bounds, lengths_of, packed, unpacked
from ...attention.storage import OWN, Cache, Storage, laid_out
from ..asking import Beside, UndeclaredError
from .convention import Arrange, Convention, Lse
from .dense import ALIKE, FLASH_2, FLASH_VALUES, FLASHINFER, float32, inclusive, left_only
from .packed import flat_mask, packing, unpack

if TYPE_CHECKING:
    from ..spec import AttentionSpec

# What caches have in common: no gradients, and a sequence that has no key gives 0.
_CACHED: dict[str, Any] = {**FLASH_2, "dropout": False, "gradients": False}


def _laid_out(spec: AttentionSpec, call: Call) -> Cache:
    """The keys and values of a call as it says they are stored, or as is most usual."""
    usual = spec.convention.kept(spec.parameters or {}) if spec.convention else {}
    ordinary = Storage(usual.get("pages", (0,))[0], usual.get("append", (0,))[0])
    return laid_out(call.stored or ordinary, call.key, call.value, *lengths_of(call))


def _pools(cache: Cache, *, heads_first: bool = False) -> tuple[Tensor, Tensor]:
    """Keys and values before the call, (pages, page, heads, width), or heads before the page."""
    keys, values = (pool.view(-1, cache.page, *pool.shape[1:]).clone() for pool in cache.before)
    if heads_first:
        return keys.transpose(1, 2).contiguous(), values.transpose(1, 2).contiguous()
    return keys, values


def _beside(
    result: Any, cache: Cache, pools: tuple[Tensor, Tensor], *, heads_first: bool = False
) -> Beside:
    """A result, and what became of the cache; pools are as `_pools` makes them."""
    turned = [pool.transpose(1, 2) if heads_first else pool for pool in pools]
    keys, values = (pool.reshape(-1, *pool.shape[2:]) for pool in turned)
    return Beside(result, cache.fault((keys, values)))


def _buffer(call: Call) -> Tensor:
    """The buffer of a packed output, (tokens, heads, width), with what memory holds before."""
    stored, shape = call.stored or Storage(), call.shapes["output"]
    return packed(stored.filled("output", call.query, *shape), lengths_of(call)[0])


# --- rows and pages, a batch of queries


def _flash_cache(table: str) -> Arrange:
    """Return what calls a `flash_attn_with_kvcache`, with pages by the keyword `table`."""

    def arrange(spec: AttentionSpec, call: Call, arguments: dict[str, Any]) -> Any:
        cache, queries = _laid_out(spec, call), lengths_of(call)[0]
        pools, query = _pools(cache), call.query.transpose(1, 2)
        told: dict[str, Any] = {"cache_seqlens": (cache.kept + cache.first).int()}
        if cache.storage.page:
            told[table] = cache.table.int()
        else:
            told["cache_batch_idx"] = cache.table[:, 0].int()
        if cache.storage.left:
            told["cache_leftpad"] = cache.first.int()
        if bool(cache.appended.any()):
            told["k"], told["v"] = map(torch.stack, cache.handed())
        if call.query_lengths is not None:
            query = packed(call.query, queries)
            told |= {"cu_seqlens_q": bounds(queries).int(), "max_seqlen_q": int(queries.max())}
        result = spec.implementation(query, *pools, **{**arguments, **told})
        if call.query_lengths is not None:
            result = unpack(result, call, heads_first=True)
        return _beside(result, cache, pools)

    return arrange


# --- pages, packed queries


def _by_table(cache: Cache, queries: Tensor) -> dict[str, Any]:
    """What vLLM's functions are told of packed queries, and of keys in pages."""
    return {
        "cu_seqlens_q": bounds(queries).int(),
        "max_seqlen_q": int(queries.max()),
        "seqused_k": cache.lengths.int(),
        "max_seqlen_k": int(cache.lengths.max()),
        "block_table": cache.table.int(),
    }


def _paged_packed(spec: AttentionSpec, call: Call, arguments: dict[str, Any]) -> Any:
    """The varlen function of vLLM: with a block table, or, of no pages, as any of them."""
    if "s_aux" in arguments:  # which the second version does not take
        arguments["fa_version"] = 3
    if call.stored is not None and not call.stored.page:
        return packing()(spec, call, arguments)
    cache, queries = _laid_out(spec, call), lengths_of(call)[0]
    pools = _pools(cache)
    told = _by_table(cache, queries)
    result = spec.implementation(packed(call.query, queries), *pools, **told, **arguments)
    return _beside(unpack(result, call, heads_first=True), cache, pools)


def _into_buffer(spec: AttentionSpec, call: Call, arguments: dict[str, Any]) -> Any:
    """`unified_attention`, which writes into `out` and has to be told everything."""
    cache, queries = _laid_out(spec, call), lengths_of(call)[0]
    pools, out = _pools(cache), _buffer(call)
    needed = {"softmax_scale": call.factor, "causal": True, "window_size": (-1, -1),
              "softcap": 0.0, "q_descale": None, "k_descale": None, "v_descale": None}  # fmt: skip
    given = {name: one for name, one in arguments.items() if one is not None}
    told = _by_table(cache, queries)
    spec.implementation(packed(call.query, queries), *pools, out, **{**needed, **given, **told})
    return _beside(unpacked(out, queries, call.query_len), cache, pools)


def _planned(spec: AttentionSpec, call: Call, arguments: dict[str, Any]) -> Any:
    """A wrapper of FlashInfer: told by `plan` where pages are, and asked by `run`."""
    cache, queries = _laid_out(spec, call), lengths_of(call)[0]
    wrapper: Any = spec.subject
    page, width = cache.page, call.query.shape[-1]
    count = (cache.lengths + page - 1) // page
    of_sequence = torch.arange(cache.table.shape[1], device=count.device) < count[:, None]
    last = (cache.lengths - (count - 1).clamp(min=0) * page).int()
    pages = [bounds(count).int(), cache.table[of_sequence].int(), last, call.heads,
             call.key.shape[1], width, page]  # fmt: skip
    first = [] if spec.convention and spec.convention.one_query else [bounds(queries).int()]
    dtype = call.query.dtype
    told: dict[str, Any] = {"q_data_type": dtype, "kv_data_type": dtype}
    if first:
        told |= {"head_dim_vo": call.value.shape[-1], "o_data_type": dtype}
    if (mask := arguments.pop("custom_mask", None)) is not None:
        told["custom_mask"] = flat_mask(mask, queries, cache.lengths)
    run = {name: arguments.pop(name) for name in ("sinks", "return_lse") if name in arguments}
    wrapper.plan(*first, *pages, **told, **arguments)
    heads_first = getattr(wrapper, "_kv_layout", "NHD") == "HND"
    pools, out = _pools(cache, heads_first=heads_first), _buffer(call)
    result = wrapper.run(packed(call.query, queries), pools, out=out, **run)
    return _beside(unpack(result, call, heads_first=False), cache, pools, heads_first=heads_first)


def _trtllm(spec: AttentionSpec, call: Call, arguments: dict[str, Any]) -> Any:
    """TensorRT-LLM's functions in FlashInfer: heads come before the page, the scale is needed."""
    cache, queries = _laid_out(spec, call), lengths_of(call)[0]
    pools, out = _pools(cache, heads_first=True), _buffer(call)
    told = {"kv_cache": pools, "block_tables": cache.table.int(), "seq_lens": cache.lengths.int(),
            "workspace_buffer": out.new_zeros(1024, dtype=torch.uint8), "bmm2_scale": 1.0,
            "out": out}  # fmt: skip
    longest = int(cache.lengths.max())
    if spec.names("batch_size"):
        told |= {"max_q_len": int(queries.max()), "max_kv_len": longest, "batch_size": len(queries),
                 "cum_seq_lens_q": bounds(queries).int(),
                 "cum_seq_lens_kv": bounds(cache.lengths).int()}  # fmt: skip
    else:
        arguments.pop("causal", None)
        told |= {"max_seq_len": longest, "q_len_per_req": call.query_len}
    given = {"bmm1_scale": call.factor} | {
        n: one for n, one in arguments.items() if one is not None
    }
    result = spec.implementation(packed(call.query, queries), **{**given, **told})
    return _beside(unpack(result, call, heads_first=False), cache, pools, heads_first=True)


def _latent(spec: AttentionSpec, call: Call, arguments: dict[str, Any]) -> Any:
    """`flash_mla_with_kvcache`, whose values are the first part of its keys, of one head."""
    cache, width = _laid_out(spec, call), call.value.shape[-1]
    if not torch.equal(call.key[..., :width], call.value):
        raise UndeclaredError(f"{spec.name} takes no values that are not part of its keys")
    keys, values = _pools(cache)
    told: dict[str, Any] = {"block_table": cache.table.int(), "head_dim_v": width,
                            "cache_seqlens": cache.lengths.int()}  # fmt: skip
    make = getattr(spec.implementation, "__globals__", {}).get("get_mla_metadata")
    made = {"tile_scheduler_metadata": None} if make is None else dict(
        zip(("tile_scheduler_metadata", "num_splits"), make(), strict=True))  # fmt: skip
    given = {**made, **arguments, **told}
    result = spec.implementation(call.query.transpose(1, 2), keys, **given)
    return _beside(result, cache, (keys, values))


# --- slots


def _slots(pools: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return pools[0].flatten(0, 1), pools[1].flatten(0, 1)


def _extend(spec: AttentionSpec, call: Call, arguments: dict[str, Any]) -> Any:
    """`extend_attention_fwd`: keys of its queries are handed over, those before are in slots."""
    cache, queries = _laid_out(spec, call), lengths_of(call)[0]
    if not torch.equal(cache.appended, queries):
        raise NotImplementedError(f"{spec.name} takes no fewer keys than queries")
    keys, values = (torch.cat(parts) for parts in cache.handed())
    pools, out = _pools(cache), _buffer(call)
    told: dict[str, Any] = {
        "qo_indptr": bounds(queries).int(), "kv_indptr": bounds(cache.kept).int(),
        "kv_indices": cache.indices(cache.kept), "mask_indptr": None, "custom_mask": None,
        "max_len_extend": int(queries.max()),
    }  # fmt: skip
    if (mask := arguments.pop("custom_mask", None)) is not None:
        told |= {"custom_mask": flat_mask(mask, queries, cache.lengths),
                 "mask_indptr": bounds(queries * cache.lengths),
                 "skip_prefix_custom_mask": False}  # fmt: skip
    told |= {name: 1.0 for name in ("k_scale", "v_scale") if spec.names(name)}
    arguments.setdefault("is_causal", False)
    query = packed(call.query, queries)
    spec.implementation(query, keys, values, out, *_slots(pools), **told, **arguments)
    kept = Cache(**{**vars(cache), "after": cache.before})  # who calls it stores them
    return _beside(unpacked(out, queries, call.query_len), kept, pools)


def _decode(spec: AttentionSpec, call: Call, arguments: dict[str, Any]) -> Any:
    """`decode_attention_fwd`: one query of each sequence, and room for the parts of its keys."""
    cache, batch = _laid_out(spec, call), len(call.query)
    pools, out = _pools(cache), _buffer(call)
    splits, width = 4, call.value.shape[-1]
    told = {"kv_indptr": bounds(cache.lengths).int(), "kv_indices": cache.indices(cache.lengths),
            "attn_logits": out.new_zeros(batch, call.heads, splits, width, dtype=torch.float32),
            "attn_lse": out.new_zeros(batch, call.heads, splits, dtype=torch.float32),
            "num_kv_splits": torch.full((batch,), splits, dtype=torch.int32, device=out.device),
            "max_kv_splits": splits, "k_scale": 1.0, "v_scale": 1.0}  # fmt: skip
    given = {"sm_scale": call.factor} | {n: one for n, one in arguments.items() if one is not None}
    query = packed(call.query, lengths_of(call)[0])
    spec.implementation(query, *_slots(pools), out, **told, **given)
    return _beside(unpacked(out, lengths_of(call)[0], 1), cache, pools)


def _listed(sinks: Tensor) -> list[Tensor]:
    return [_at_least_float32(sinks)]


def _at_least_float32(sinks: Tensor) -> Tensor:
    return sinks if sinks.dtype == torch.float64 else sinks.float()


def _as_list(window: tuple[int | None, int | None]) -> list[int]:
    return list(inclusive(-1)(window))


_LEFT: Mapping[str, tuple[Any, ...]] = {"window": (False, "left")}
_FLASH_STORED: Mapping[str, tuple[Any, ...]] = {
    "append": (0, 1, 3), "left": (False, True), "shared": (False, True),
}  # fmt: skip
_FLASH_STORED_BY = {"append": ("k", "v"), "left": ("cache_leftpad",), "rows": ("cache_batch_idx",)}
# What a row of slots has, pages have not, and the other way round.
_ROWS_OR_PAGES = (("left", "pages"),)
_SGLANG: dict[str, Any] = {
    **_CACHED, "scale_argument": "sm_scale", "softcap": "logit_cap", "sinks": "sinks",
    "returns": "output",
}  # fmt: skip

_FLASHINFER: dict[str, Any] = {**FLASHINFER, "sinks": "sinks"}
_TREES = {"mask": "keep", "mask_argument": "custom_mask", "mask_shape": "(B, 1, L, S)"}
_PAGES: Mapping[str, tuple[Any, ...]] = {"pages": (4, 16, 1), "shared": (False, True)}
_LARGE_PAGES: Mapping[str, tuple[Any, ...]] = {"pages": (16, 32, 64), "shared": (False, True)}

CONVENTIONS = (
    Convention("flash_attn_cache", "flash_attn_with_kvcache of FlashAttention 2",
               ("q", "k_cache", "v_cache", "cache_seqlens", "block_table"),
               {**_CACHED, "lengths": "cache_seqlens"}, lacks=("attention_chunk",),
               values=FLASH_VALUES, stored_by=_FLASH_STORED_BY,
               arrange=_flash_cache("block_table"), besides={"return_softmax_lse": True},
               lse=Lse(), only=ALIKE, apart=_ROWS_OR_PAGES,
               stored={**_FLASH_STORED, "pages": (0, 256)}, limits="rotary embeddings"),
    Convention("flash_attn_3_cache", "flash_attn_with_kvcache of FlashAttention 3",
               ("q", "k_cache", "v_cache", "cache_seqlens", "page_table", "attention_chunk"),
               {**_CACHED, "chunk": "attention_chunk"}, values=FLASH_VALUES,
               arrange=_flash_cache("page_table"), besides={"return_softmax_lse": True},
               lse=Lse(), ragged=RAGGED, apart=_ROWS_OR_PAGES, stored_by=_FLASH_STORED_BY,
               stored={**_FLASH_STORED, "pages": (4, 0, 16, 1)},
               limits="rotary embeddings, and what is appended of several lengths"),
    Convention("vllm_flash_attn", "flash_attn_varlen_func of vLLM",
               ("q", "k", "v", "max_seqlen_q", "cu_seqlens_q", "max_seqlen_k", "cu_seqlens_k",
                "seqused_k", "softmax_scale", "block_table", "fa_version"),
               {**_CACHED, "sinks": "s_aux"}, arrange=_paged_packed,
               values={"alibi": float32, "window": _as_list}, begins=("cu_seqlens_q",),
               besides={"return_softmax_lse": True}, lse=Lse(), ragged=RAGGED,
               only=ALIKE, apart=(("sinks", "alibi"),),
               stored={"pages": (16, 0, 32), "shared": (False, True)}),
    Convention("vllm_unified_attention", "unified_attention of vLLM, in Triton",
               ("q", "k", "v", "out", "seqused_k", "block_table", "softmax_scale", "qq_bias"),
               {**_CACHED, "sinks": "sinks", "fully_masked": "undefined", "returns": "output"},
               values=FLASH_VALUES, arrange=_into_buffer, ragged=RAGGED, begins=("cu_seqlens_q",),
               only={**ALIKE, **_LEFT, "causal": (True,)},
               stored={"pages": (16, 32), "shared": (False, True)},
               limits="trees (qq_bias), and sequences without keys"),
    Convention("flashinfer_paged", "BatchPrefillWithPagedKVCacheWrapper of FlashInfer",
               ("qo_indptr", "paged_kv_indptr", "paged_kv_indices", "paged_kv_last_page_len",
                "paged_kv_cache"), {**_FLASHINFER, **_TREES}, values={"window": left_only},
               arrange=_planned, besides={"return_lse": True}, lse=Lse(base="2"), ragged=RAGGED,
               begins=("qo_indptr",),
               only=_LEFT, apart=(("mask", "causal"),), stored=_PAGES,
               limits="custom_mask and causal at once"),
    Convention("flashinfer_decode", "BatchDecodeWithPagedKVCacheWrapper of FlashInfer",
               ("indptr", "indices", "last_page_len", "paged_kv_cache"),
               {**_FLASHINFER, "causal_argument": ""}, lacks=("qo_indptr",),
               values={"window": left_only}, arrange=_planned, besides={"return_lse": True},
               lse=Lse(base="2"), handles=("sm_scale", "logits_soft_cap"), one_query=True,
               ragged=("unequal", "equal", "without keys"), only={**_LEFT, **ALIKE},
               stored=_PAGES),
    Convention("flash_mla", "flash_mla_with_kvcache of FlashMLA",
               ("q", "k_cache", "block_table", "cache_seqlens", "head_dim_v",
                "tile_scheduler_metadata"),
               {**_CACHED, "lengths": "cache_seqlens", "sinks": "attn_sink"},
               values={"sinks": _at_least_float32}, arrange=_latent,
               lse=Lse(sink=False, empty="+inf"),
               only={"head_dim": (576,), "value_dim": ("latent",), "key_heads": (1,),
                     "sizes": ((5, 7), (1, 33), (1, 1), (7, 7), (9, 5), (33, 33), (63, 65),
                               (2, 257))},
               stored={"pages": (64,), "shared": (False, True)},
               limits="sparse indices, a cache in float8"),
    Convention("trtllm_context", "trtllm_batch_context_with_kv_cache of FlashInfer",
               ("query", "kv_cache", "block_tables", "seq_lens", "bmm1_scale", "cum_seq_lens_q",
                "batch_size"), {**_FLASHINFER, "scale_argument": "bmm1_scale", "softcap": None,
                "fully_masked": "undefined"},
               values={"window": left_only, "sinks": _listed}, arrange=_trtllm,
               besides={"return_lse": True}, lse=Lse(base="2"), ragged=RAGGED,
               begins=("cum_seq_lens_q",),
               only={**_LEFT, **ALIKE}, stored=_LARGE_PAGES, limits="sequences without keys"),
    Convention("trtllm_decode", "trtllm_batch_decode_with_kv_cache of FlashInfer",
               ("query", "kv_cache", "block_tables", "seq_lens", "bmm1_scale", "q_len_per_req"),
               {**_FLASHINFER, "scale_argument": "bmm1_scale", "softcap": None,
                "lengths": "seq_lens", "fully_masked": "undefined"}, handles=("causal",),
               values={"window": left_only, "sinks": _listed}, arrange=_trtllm,
               besides={"return_lse": True}, lse=Lse(base="2"),
               only={**_LEFT, **ALIKE, "causal": (True,)}, stored=_LARGE_PAGES,
               limits="trees (mask), and sequences without keys"),
    Convention("sglang_extend", "extend_attention_fwd of SGLang",
               ("q_extend", "k_extend", "v_extend", "o_extend", "k_buffer", "v_buffer",
                "kv_indices", "is_causal"),
               {**_SGLANG, **_TREES, "causal_argument": "is_causal",
                "window": "sliding_window_size"},
               values={"window": left_only}, arrange=_extend, ragged=RAGGED, only=_LEFT,
               begins=("qo_indptr",),
               apart=(("mask", "causal"), ("mask", "window")),
               stored={"pages": (1,), "append": (OWN,), "shared": (False, True)},
               limits="custom_mask with is_causal or a window"),
    Convention("sglang_decode", "decode_attention_fwd of SGLang",
               ("q", "k_buffer", "v_buffer", "o", "kv_indptr", "kv_indices", "attn_logits",
                "num_kv_splits"),
               {**_SGLANG, "fully_masked": "undefined", "causal": None, "window": None},
               arrange=_decode,
               ragged=("unequal", "equal"), one_query=True,
               stored={"pages": (1,), "shared": (False, True)}),
)  # fmt: skip
