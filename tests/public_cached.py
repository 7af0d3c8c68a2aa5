"""Public callables that read a cache, written in plain torch with their exact signatures.

Each is right. A wrong one is made of it by `wrong`: what is read of the cache, and what is written,
is decided in small functions that can be changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


class Steps:
    """What a cached kernel does, each step on its own: a test can make one of them wrong."""

    def slots(self, b: int, count: int, table: Tensor, page: int) -> Tensor:
        """The slots of the first keys of a sequence."""
        j = torch.arange(count)
        return table[b].long()[j // page] * page + j % page

    def length(self, b: int, lengths: Tensor) -> int:
        """How many keys it has."""
        return int(lengths[b])

    def corner(self, b: int, keys: int, queries: int, lengths: Tensor) -> int:
        """Where query 0 stands."""
        return keys - queries

    def begin(self, i: int, stand: int, left: int, page: int) -> int:
        """The first key in the window of a query."""
        return max(0, stand + i - left) if left >= 0 else 0

    def cells(self, keys: Tensor, values: Tensor, slots: Tensor, b: int) -> tuple[Tensor, Tensor]:
        """Keys and values of some slots."""
        return keys[slots], values[slots]

    def append(self, pool: Tensor, slots: Tensor, new: Tensor, kept: int) -> None:
        """Store what is handed over behind what is kept."""
        for n, row in enumerate(new):
            pool[slots[kept + n]] = row

    def keep(self, mask: Tensor) -> Tensor:
        """Where a tree lets its queries attend."""
        return mask

    def into(self, out: Tensor, rows: slice, result: Tensor, keys: int) -> None:
        """Write an output."""
        out[rows] = result


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, stand: int, first: Callable[[int], int],
    scale: float, causal: bool, right: int = -1, softcap: float = 0.0,
    slopes: Tensor | None = None, sinks: Tensor | None = None, chunk: int = 0,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One sequence: (queries, heads, width), and its log-sum-exp (queries, heads)."""
    count, heads, _ = query.shape
    if not len(key):
        empty = torch.full((count, heads), -math.inf, dtype=torch.float64)
        if sinks is not None:
            empty = sinks.double().expand(count, -1)
        return query.new_zeros(count, heads, value.shape[-1]), empty
    of = torch.tensor([h // (heads // key.shape[1]) for h in range(heads)])
    place, j = stand + torch.arange(count)[:, None], torch.arange(len(key))[None]
    begins = torch.tensor([first(i) for i in range(count)])[:, None]
    seen = j >= begins
    if causal:
        seen = seen & (j <= place)
    if right >= 0:
        seen = seen & (j <= place + right)
    if keep is not None:
        seen = seen & keep
    if chunk:
        seen = seen & (
            j.div(chunk, rounding_mode="floor") == place.div(chunk, rounding_mode="floor")
        )
    scores = torch.einsum("qhd,khd->hqk", query.double(), key[:, of].double()) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if slopes is not None:
        slopes = slopes if slopes.ndim == 1 else slopes[0]
        scores = scores - slopes.double()[:, None, None] * (place - j).abs()
    scores = torch.where(seen, scores, -math.inf)
    every = scores
    if sinks is not None:
        column = sinks.double()[:, None, None].expand(heads, count, 1)
        every = torch.cat([scores, column], -1)
    lse = torch.logsumexp(every, -1)
    weights = torch.where(seen & lse.isfinite()[..., None], (scores - lse[..., None]).exp(), 0.0)
    # What a row does not see is not read at all: it may be NaN.
    read = torch.where(seen.any(0)[:, None, None], value.double(), 0.0)[:, of]
    return torch.einsum("hqk,khd->qhd", weights, read).to(query.dtype), lse.T


def _flash(steps: Steps) -> Callable[..., Any]:
    def flash_attn_with_kvcache(
        q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
        cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, rotary_interleaved=True,
        alibi_slopes=None, num_splits=0, return_softmax_lse=False,
    ):  # fmt: skip
        if block_table is not None and k_cache.shape[1] % 256:
            raise RuntimeError("Paged KV cache block size must be divisible by 256")
        out, lse = _over_sequences(
            steps, list(q), k_cache, v_cache, k, v, cache_seqlens, cache_batch_idx, cache_leftpad,
            block_table, scale=softmax_scale, causal=causal, window=window_size, softcap=softcap,
            slopes=alibi_slopes,
        )  # fmt: skip
        out, lse = torch.stack(out), torch.stack(lse).transpose(1, 2)
        return (out, lse) if return_softmax_lse else out

    return flash_attn_with_kvcache


def _flash_3(steps: Steps) -> Callable[..., Any]:
    def flash_attn_with_kvcache(
        q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None,
        cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, page_table=None,
        cu_seqlens_q=None, cu_seqlens_k_new=None, max_seqlen_q=None, rotary_seqlens=None,
        q_descale=None, k_descale=None, v_descale=None, softmax_scale=None, causal=False,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True,
        scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0,
        return_softmax_lse=False,
    ):  # fmt: skip
        queries = list(q)
        if cu_seqlens_q is not None:
            ends = cu_seqlens_q.tolist()
            queries = [q[a:b] for a, b in pairwise(ends)]
        out, lse = _over_sequences(
            steps, queries, k_cache, v_cache, k, v, cache_seqlens, cache_batch_idx, cache_leftpad,
            page_table, scale=softmax_scale, causal=causal, window=window_size, softcap=softcap,
            chunk=attention_chunk,
        )  # fmt: skip
        if cu_seqlens_q is not None:
            out, lse = torch.cat(out), torch.cat(lse).T
        else:
            out, lse = torch.stack(out), torch.stack(lse).transpose(1, 2)
        return (out, lse) if return_softmax_lse else out

    return flash_attn_with_kvcache


def _over_sequences(
    steps, queries, k_cache, v_cache, k, v, lengths, rows, left, table, *, window, **options
):  # fmt: skip
    page = k_cache.shape[1]
    if table is None:
        table = (torch.arange(len(queries)) if rows is None else rows)[:, None]
    keys, values = k_cache.view(-1, *k_cache.shape[2:]), v_cache.view(-1, *v_cache.shape[2:])
    new = 0 if k is None else k.shape[1]
    padding = torch.zeros(len(queries), dtype=torch.int) if left is None else left
    totals = lengths - padding + new
    scale = options.pop("scale") or queries[0].shape[-1] ** -0.5
    out, lse = [], []
    for b in range(len(queries)):
        if new:
            slots = steps.slots(b, page * table.shape[1], table, page)
            for pool, given in ((keys, k), (values, v)):
                steps.append(pool, slots, given[b], int(lengths[b]))
    for b, query in enumerate(queries):
        count = steps.length(b, totals)
        begin = steps.left(int(padding[b])) if hasattr(steps, "left") else int(padding[b])
        slots = steps.slots(b, begin + count, table, page)[begin:]
        key, value = steps.cells(keys, values, slots, b)
        stand = steps.corner(b, count, len(query), totals)
        own = attend(
            query, key, value, stand=stand, scale=scale, right=window[1],
            first=lambda i, s=stand: steps.begin(i, s, window[0], page), **options,
        )  # fmt: skip
        out.append(own[0])
        lse.append(own[1])
    return out, lse


def _vllm(steps: Steps) -> Callable[..., Any]:
    def flash_attn_varlen_func(
        q, k, v, max_seqlen_q, cu_seqlens_q, max_seqlen_k, cu_seqlens_k=None, seqused_k=None,
        q_v=None, dropout_p=0.0, softmax_scale=None, causal=False, window_size=None, softcap=0.0,
        alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None,
        return_softmax_lse=False, out=None, scheduler_metadata=None, q_descale=None,
        k_descale=None, v_descale=None, num_splits=0, output_scale=None, fa_version=2, s_aux=None,
        cp_world_size=1, cp_rank=0, cp_tot_seqused_k=None, mask_mod=None,
        block_sparse_tensors=None, aux_tensors=None, aux_tensor_leading_dims=None,
        dynamic_causal=None,
    ):  # fmt: skip
        assert (cu_seqlens_k is None) != (seqused_k is None)
        assert fa_version > 2 or s_aux is None
        assert window_size is None or isinstance(window_size, list)
        assert fa_version == 2 or alibi_slopes is None
        ends = cu_seqlens_q.tolist()
        queries = [q[a:b] for a, b in pairwise(ends)]
        window = (-1, -1) if window_size is None else tuple(window_size)
        options = {"scale": softmax_scale, "causal": causal, "softcap": softcap,
                   "slopes": alibi_slopes, "sinks": s_aux}  # fmt: skip
        if block_table is None:
            scale = options.pop("scale") or q.shape[-1] ** -0.5
            each = []
            for b, query in enumerate(queries):
                rows = slice(*cu_seqlens_k[b : b + 2].tolist())
                stand = rows.stop - rows.start - len(query)
                each.append(attend(
                    query, k[rows], v[rows], stand=stand, scale=scale, right=window[1],
                    first=lambda i, s=stand: steps.begin(i, s, window[0], 1), **options,
                ))  # fmt: skip
            out, lse = zip(*each, strict=True)
        else:
            out, lse = _over_sequences(
                steps, queries, k, v, None, None, seqused_k, None, None, block_table,
                window=window, **options,
            )  # fmt: skip
        out, lse = torch.cat(out), torch.cat(lse).T
        return (out, lse) if return_softmax_lse else out

    return flash_attn_varlen_func


def _unified(steps: Steps) -> Callable[..., Any]:
    def unified_attention(
        q, k, v, out, cu_seqlens_q, max_seqlen_q, seqused_k, max_seqlen_k, softmax_scale, causal,
        window_size, block_table, softcap, q_descale, k_descale, v_descale,
        seq_threshold_3D=None, num_par_softmax_segments=None, softmax_segm_output=None,  # noqa: N803
        softmax_segm_max=None, softmax_segm_expsum=None, alibi_slopes=None, output_scale=None,
        qq_bias=None, sinks=None, mm_prefix_range=None, use_alibi_sqrt=False,
    ):  # fmt: skip
        assert causal, "Only causal attention is supported"
        ends = cu_seqlens_q.tolist()
        queries = [q[a:b] for a, b in pairwise(ends)]
        found, _ = _over_sequences(
            steps, queries, k, v, None, None, seqused_k, None, None, block_table,
            scale=softmax_scale, causal=True, window=window_size, softcap=softcap,
            slopes=alibi_slopes, sinks=sinks,
        )  # fmt: skip
        for b, own in enumerate(found):
            steps.into(out, slice(ends[b], ends[b + 1]), own, int(seqused_k[b]))

    return unified_attention


def _extend(steps: Steps) -> Callable[..., Any]:
    def extend_attention_fwd(
        q_extend, k_extend, v_extend, o_extend, k_buffer, v_buffer, qo_indptr, kv_indptr,
        kv_indices, custom_mask, is_causal, mask_indptr, max_len_extend, sm_scale=None,
        logit_cap=0.0, skip_prefix_custom_mask=True, sliding_window_size=-1, sinks=None,
        window_kv_offsets=None, xai_temperature_len=-1,
    ):  # fmt: skip
        scale = sm_scale or q_extend.shape[-1] ** -0.5
        ends, begins = qo_indptr.tolist(), kv_indptr.tolist()
        kept = kv_indptr.diff()
        for b in range(len(ends) - 1):
            rows, count = slice(ends[b], ends[b + 1]), steps.length(b, kept)
            mine = kv_indices[begins[b] : begins[b] + count][None]
            slots = steps.slots(0, mine.shape[1], mine, 1)
            key, value = steps.cells(k_buffer, v_buffer, slots, b)
            key, value = torch.cat([key, k_extend[rows]]), torch.cat([value, v_extend[rows]])
            queries = rows.stop - rows.start
            stand = steps.corner(b, len(key), queries, kept + qo_indptr.diff())
            keep = None
            if custom_mask is not None:
                begin, end = mask_indptr[b : b + 2].tolist()
                keep = custom_mask[begin:end].view(queries, len(key)).clone()
                if skip_prefix_custom_mask:
                    keep[:, :count] = True
                keep = steps.keep(keep)
            own, _ = attend(
                q_extend[rows], key, value, stand=stand, scale=scale, keep=keep,
                causal=is_causal and keep is None, softcap=logit_cap, sinks=sinks,
                first=lambda i, s=stand: steps.begin(i, s, sliding_window_size, 1),
            )  # fmt: skip
            steps.into(o_extend, rows, own, len(key))

    return extend_attention_fwd


def _decode(steps: Steps) -> Callable[..., Any]:
    def decode_attention_fwd(
        q, k_buffer, v_buffer, o, kv_indptr, kv_indices, attn_logits, attn_lse, num_kv_splits,
        max_kv_splits, sm_scale, k_scale, v_scale, logit_cap=0.0, sinks=None,
        xai_temperature_len=-1,
    ):  # fmt: skip
        begins, lengths = kv_indptr.tolist(), kv_indptr.diff()
        for b in range(len(q)):
            count = steps.length(b, lengths)
            mine = kv_indices[begins[b] : begins[b] + count][None]
            slots = steps.slots(0, count, mine, 1)
            key, value = steps.cells(k_buffer, v_buffer, slots, b)
            own, _ = attend(
                q[b : b + 1], key, value, stand=count - 1, scale=sm_scale, causal=False,
                softcap=logit_cap, sinks=sinks, first=lambda i: 0,
            )  # fmt: skip
            steps.into(o, slice(b, b + 1), own, count)

    return decode_attention_fwd


class _Wrapper:
    """A wrapper of FlashInfer: `plan` says where pages are, `run` attends."""

    def __init__(self, steps: Steps, kv_layout: str = "NHD") -> None:
        self._steps, self._kv_layout = steps, kv_layout

    def _keep(self, ends, indptr, indices, last, page, **options):
        self._ends, self._page, self._options = ends.tolist(), page, options
        count = indptr.diff()
        self._lengths = (count - 1).clamp(min=0) * page + last
        self._table = torch.zeros(len(count), int(count.max()) + 1, dtype=torch.int64)
        for b in range(len(count)):
            own = indices[int(indptr[b]) : int(indptr[b + 1])]
            self._table[b, : len(own)] = own

    def _run(self, q, paged_kv_cache, out, lse, return_lse, sinks):
        ends, options = self._ends, dict(self._options)
        queries = [q[a:b] for a, b in pairwise(ends)]
        pools = [pool.transpose(1, 2) if self._kv_layout == "HND" else pool
                 for pool in paged_kv_cache]  # fmt: skip
        keys, values = (pool.reshape(-1, *pool.shape[2:]) for pool in pools)
        scale = options.pop("scale") or q.shape[-1] ** -0.5
        left, mask, start = options.pop("left"), options.pop("mask", None), 0
        out = (
            torch.empty(len(q), q.shape[1], values.shape[-1], dtype=q.dtype) if out is None else out
        )
        each = []
        for b, query in enumerate(queries):
            count = self._steps.length(b, self._lengths)
            slots = self._steps.slots(b, count, self._table, self._page)
            key, value = self._steps.cells(keys, values, slots, b)
            stand = self._steps.corner(b, count, len(query), self._lengths)
            own = None
            if mask is not None:
                own = mask[start : start + len(query) * count].view(len(query), count)
                own, start = self._steps.keep(own), start + len(query) * count
            found, logs = attend(
                query, key, value, stand=stand, scale=scale, sinks=sinks, keep=own,
                first=lambda i, s=stand: self._steps.begin(i, s, left, self._page), **options,
            )  # fmt: skip
            self._steps.into(out, slice(ends[b], ends[b + 1]), found, count)
            each.append(logs / math.log(2.0))
        return (out, torch.cat(each)) if return_lse else out


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
    """Chunks of several lengths."""

    def plan(
        self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads,
        num_kv_heads, head_dim_qk, page_size, head_dim_vo=None, custom_mask=None,
        packed_custom_mask=None, causal=False, pos_encoding_mode="NONE",
        use_fp16_qk_reduction=False, sm_scale=None, window_left=-1, logits_soft_cap=None,
        rope_scale=None, rope_theta=None, q_data_type="float16", kv_data_type=None,
        o_data_type=None, non_blocking=True, prefix_len_ptr=None, token_pos_in_items_ptr=None,
        token_pos_in_items_len=0, max_item_len_ptr=None, seq_lens=None, seq_lens_q=None,
        block_tables=None, max_token_per_sequence=None, max_sequence_kv=None,
        fixed_split_size=None, disable_split_kv=False,
    ):  # fmt: skip
        self._keep(
            qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, page_size,
            causal=causal and custom_mask is None, scale=sm_scale, left=window_left,
            softcap=logits_soft_cap or 0.0, mask=custom_mask,
        )  # fmt: skip

    def run(
        self, q, paged_kv_cache, *args, q_scale=None, k_scale=None, v_scale=None, out=None,
        lse=None, return_lse=False, enable_pdl=None, window_left=None, sinks=None,
        kv_cache_sf=None, skip_softmax_threshold_scale_factor=None, use_fp16_softmax=None,
        uses_spcompress=None,
    ):  # fmt: skip
        return self._run(q, paged_kv_cache, out, lse, return_lse, sinks)


class BatchDecodeWithPagedKVCacheWrapper(_Wrapper):
    """One query of each sequence."""

    def plan(
        self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size,
        *deprecated_positional_args, **kwargs,
    ):  # fmt: skip
        self._keep(
            torch.arange(len(indptr)), indptr, indices, last_page_len, page_size, causal=False,
            scale=kwargs.get("sm_scale"), left=kwargs.get("window_left", -1),
            softcap=kwargs.get("logits_soft_cap") or 0.0,
        )  # fmt: skip

    def run(
        self, q, paged_kv_cache, *args, q_scale=None, k_scale=None, v_scale=None, out=None,
        lse=None, return_lse=False, enable_pdl=None, window_left=None, sinks=None,
        q_len_per_req=None, skip_softmax_threshold_scale_factor=None, kv_cache_sf=None,
    ):  # fmt: skip
        return self._run(q, paged_kv_cache, out, lse, return_lse, sinks)


def _flash_mla(steps: Steps) -> Callable[..., Any]:
    def flash_mla_with_kvcache(
        q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata,
        num_splits=None, softmax_scale=None, causal=False, is_fp8_kvcache=False, indices=None,
        attn_sink=None, extra_k_cache=None, extra_indices_in_kvcache=None, topk_length=None,
        extra_topk_length=None,
    ):  # fmt: skip
        assert k_cache.shape[1:] == (64, 1, 576)
        out, lse = _over_sequences(
            steps, list(q), k_cache, k_cache[..., :head_dim_v].contiguous(), None, None,
            cache_seqlens, None, None, block_table, window=(-1, -1), scale=softmax_scale,
            causal=causal,
        )  # fmt: skip
        out, lse = torch.stack(out), torch.stack(lse)
        if attn_sink is not None:
            out = (out * torch.sigmoid(lse - attn_sink.double())[..., None]).to(q.dtype)
        return out, torch.where(lse == -math.inf, math.inf, lse).transpose(1, 2)

    return flash_mla_with_kvcache


def _paged_hnd(
    steps, ends, query, kv_cache, block_tables, seq_lens, out, *, window_left, **options
):  # fmt: skip
    pools = [pool.transpose(1, 2).contiguous() for pool in kv_cache]
    queries = [query[a:b] for a, b in pairwise(ends)]
    found, lse = _over_sequences(
        steps, queries, *pools, None, None, seq_lens, None, None, block_tables,
        window=(window_left, -1), **options,
    )  # fmt: skip
    for b, own in enumerate(found):
        steps.into(out, slice(ends[b], ends[b + 1]), own, int(seq_lens[b]))
    return out, torch.cat(lse) / math.log(2.0)


def _trtllm_context(steps: Steps) -> Callable[..., Any]:
    def trtllm_batch_context_with_kv_cache(
        query, kv_cache, workspace_buffer, block_tables, seq_lens, max_q_len, max_kv_len,
        bmm1_scale, bmm2_scale, batch_size, cum_seq_lens_q, cum_seq_lens_kv, window_left=-1,
        out=None, out_dtype=None, o_sf_scale=None, o_sf_vec_size=None, kv_layout="HND",
        enable_pdl=None, sinks=None, kv_cache_sf=None, skip_softmax_threshold_scale_factor=None,
        uses_shared_paged_kv_idx=True, causal=True, lse=None, return_lse=False,
        multi_ctas_kv_counter_buffer=None, use_fp16_softmax=None, uses_spcompress=None,
    ):  # fmt: skip
        found = _paged_hnd(
            steps, cum_seq_lens_q.tolist(), query, kv_cache, block_tables, seq_lens, out,
            window_left=window_left, scale=bmm1_scale, causal=causal,
            sinks=None if sinks is None else sinks[0],
        )  # fmt: skip
        return found if return_lse else found[0]

    return trtllm_batch_context_with_kv_cache


def _trtllm_decode(steps: Steps) -> Callable[..., Any]:
    def trtllm_batch_decode_with_kv_cache(
        query, kv_cache, workspace_buffer, block_tables, seq_lens, max_seq_len, bmm1_scale=1.0,
        bmm2_scale=1.0, window_left=-1, out=None, out_dtype=None, o_sf_scale=None,
        o_sf_vec_size=None, sinks=None, kv_layout="HND", enable_pdl=None, backend="auto",
        q_len_per_req=1, o_scale=1.0, mask=None, max_q_len=None, cum_seq_lens_q=None,
        skip_softmax_threshold_scale_factor=None, kv_cache_sf=None, uses_shared_paged_kv_idx=True,
        lse=None, return_lse=False, bmm1_scale_log2=None, multi_ctas_kv_counter_buffer=None,
        enable_block_sparse_attention=False, bf16q_fp8kv_transform_mode=None,
    ):  # fmt: skip
        ends = list(range(0, len(query) + 1, q_len_per_req))
        found = _paged_hnd(
            steps, ends, query, kv_cache, block_tables, seq_lens, out, window_left=window_left,
            scale=bmm1_scale, causal=True, sinks=None if sinks is None else sinks[0],
        )  # fmt: skip
        return found if return_lse else found[0]

    return trtllm_batch_decode_with_kv_cache


MADE: dict[str, Callable[[Steps], Callable[..., Any]]] = {
    "flash_attn_cache": _flash,
    "flash_attn_3_cache": _flash_3,
    "vllm_flash_attn": _vllm,
    "vllm_unified_attention": _unified,
    "flashinfer_paged": BatchPrefillWithPagedKVCacheWrapper,
    "flashinfer_decode": BatchDecodeWithPagedKVCacheWrapper,
    "flash_mla": _flash_mla,
    "trtllm_context": _trtllm_context,
    "trtllm_decode": _trtllm_decode,
    "sglang_extend": _extend,
    "sglang_decode": _decode,
}
