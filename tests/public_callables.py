"""Stand-ins of public callables, with their exact signatures, in plain torch.

Each is written as its project documents it: a loop over sequences and heads, which shares no code
with the package. `planted` makes wrong versions: it changes one decision of the loop.
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise

import torch


@dataclass(frozen=True)
class Decisions:
    """What a wrong version decides differently."""

    corner: str = "bottom_right"
    window_more: int = 0
    polarity: bool = True
    base: float = math.e
    scale_ignored: bool = False
    softcap_ignored: bool = False
    window_ignored: bool = False
    slopes_sign: float = 1.0
    heads_tiled: bool = False
    sink_in_lse: bool = True
    empty: float = -math.inf
    packing: str = "right"
    unscaled: bool = False
    causal_more: int = 0
    bias: str = "right"
    sums: str = "right"


DECIDED = [Decisions()]


@contextmanager
def planted(**decisions):
    """Let every stand-in take some decisions differently."""
    DECIDED.append(replace(DECIDED[-1], **decisions))
    try:
        yield
    finally:
        DECIDED.pop()


def scaled(width, scale):
    """What products of queries and keys are multiplied by."""
    own = DECIDED[-1]
    return 1.0 if own.unscaled else width**-0.5 if own.scale_ignored else scale


def one_sequence(
    q, k, v, *, scale, causal=False, corner="bottom_right", window=(None, None), softcap=None,
    slopes=None, sinks=None, chunk=0, allowed=None, stands=None, dropout=0.0,
):  # fmt: skip
    """Attention of q (L, H, D) over k, v (S, K, D): output (L, H, Dv) and lse (L, H)."""
    own = DECIDED[-1]
    if own.corner != "bottom_right":
        corner = {"bottom_right": "top_left", "top_left": "bottom_right"}[corner]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    query_len, heads = q.shape[:2]
    key_len, key_heads = k.shape[:2]
    shift = key_len - query_len if corner == "bottom_right" else 0
    shift = shift if stands is None else stands
    at_query, at_key = torch.arange(query_len)[:, None] + shift, torch.arange(key_len)[None]
    seen = torch.ones(query_len, key_len, dtype=torch.bool)
    if causal:
        seen = seen & (at_key <= at_query + own.causal_more)
    left, right = (None if side is None or side < 0 else side for side in window)
    if left is not None and not own.window_ignored:
        seen = seen & (at_key >= at_query - left - own.window_more)
    if right is not None and not own.window_ignored:
        seen = seen & (at_key <= at_query + right)
    if chunk:
        floors = [torch.div(at, chunk, rounding_mode="floor") for at in (at_query, at_key)]
        seen = seen & (floors[0] == floors[1])
    outputs, sums = [], []
    for head in range(heads):
        shared = head % key_heads if own.heads_tiled else head // (heads // key_heads)
        factor = scaled(q.shape[-1], scale)
        scores = (q[:, head].to(wide) @ k[:, shared].to(wide).T) * factor
        if softcap and not own.softcap_ignored:
            scores = softcap * torch.tanh(scores / softcap)
        if slopes is not None:
            distance = (at_query - at_key).abs()
            scores = scores - own.slopes_sign * slopes[head].to(wide) * distance
        hidden = ~seen
        if allowed is not None:
            hidden = hidden | (~allowed if own.polarity else allowed)
        scores = scores.masked_fill(hidden, -math.inf)
        whole = scores
        if sinks is not None:
            whole = torch.cat([scores, sinks[head].to(wide).expand(query_len, 1)], -1)
        lse = torch.logsumexp(whole, -1)
        nothing = lse.isneginf()
        weights = (scores - lse.masked_fill(nothing, 0.0)[:, None]).exp()
        weights = torch.dropout(weights, dropout, True) if dropout else weights
        outputs.append((weights @ v[:, shared].to(wide)).to(q.dtype))
        told = lse if own.sink_in_lse or sinks is None else torch.logsumexp(scores, -1)
        if own.sums != "right":
            top = scores.amax(-1)
            told = {"largest": top, "not added": told - top, "sum": told.exp(),
                    "sign": -told.masked_fill(nothing, math.inf),
                    "unscaled": torch.logsumexp(scores / factor, -1)}[own.sums]  # fmt: skip
        sums.append(told.masked_fill(told.isneginf(), own.empty) / math.log(own.base))
    if not query_len:
        return q.new_zeros(0, heads, v.shape[-1]), q.new_zeros(0, heads, dtype=wide)
    return torch.stack(outputs, 1), torch.stack(sums, 1)


def batched(q, k, v, slopes=None, **more):
    """The same of q (B, L, H, D): output (B, L, H, Dv) and lse (B, H, L)."""
    found = [one_sequence(q[n], k[n], v[n], slopes=_of(slopes, n), **more) for n in range(len(q))]
    outputs, sums = zip(*found, strict=True)
    return torch.stack(outputs), torch.stack(sums).transpose(1, 2)


def _of(slopes, sample):
    return slopes if slopes is None or slopes.ndim == 1 else slopes[sample]


def packed(q, k, v, starts_q, starts_k, slopes=None, **more):
    """The same of sequences back to back: output (T, H, Dv) and lse (H, T)."""
    kind = DECIDED[-1].packing
    starts_q, starts_k = starts_q.tolist(), starts_k.tolist()
    longest = max(b - a for a, b in pairwise(starts_k))
    longest_q = max(b - a for a, b in pairwise(starts_q))
    outputs, sums = [], []
    for n in range(len(starts_q) - 1):
        (first, last), (begin, end) = starts_q[n : n + 2], starts_k[n : n + 2]
        stands = None
        if kind == "one":
            begin, end, stands = 0, len(k), first + len(k) - len(q)
        elif kind == "next key" and end > begin:
            stands, end = end - begin - last + first, min(end + 1, len(k))
        elif kind == "previous key" and end > begin:
            begin = max(0, begin - 1)
        elif kind == "last key lost" and end > begin:
            end -= 1
        elif kind == "corner of longest":
            stands = longest - longest_q
        elif kind == "queries' starts":
            begin, end = first, min(last, len(k))
        elif kind == "first length for all":
            begin, end = n * starts_k[1], min((n + 1) * starts_k[1], len(k))
            begin = min(begin, end)
        elif kind == "empty shifts":
            filled = [pair for pair in pairwise(starts_k)
                      if pair[1] > pair[0]]  # fmt: skip
            begin, end = filled[n] if n < len(filled) else (0, 0)
        output, lse = one_sequence(
            q[first:last], k[begin:end], v[begin:end], slopes=_of(slopes, n), stands=stands, **more
        )
        outputs.append(output)
        sums.append(lse)
    return torch.cat(outputs), torch.cat(sums).T


# --- FlashAttention 2


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False,
):  # fmt: skip
    assert alibi_slopes is None or alibi_slopes.dtype == torch.float32
    output, lse = batched(q, k, v, alibi_slopes, dropout=dropout_p,
                          scale=softmax_scale or q.shape[-1] ** -0.5, causal=causal,
                          window=window_size, softcap=softcap)  # fmt: skip
    return (output, lse, None) if return_attn_probs else output


def flash_attn_qkvpacked_func(
    qkv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False,
):  # fmt: skip
    return flash_attn_func(*qkv.unbind(2), dropout_p, softmax_scale, causal, window_size, softcap,
                           alibi_slopes, deterministic, return_attn_probs)  # fmt: skip


def flash_attn_kvpacked_func(
    q, kv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False,
):  # fmt: skip
    return flash_attn_func(q, *kv.unbind(2), dropout_p, softmax_scale, causal, window_size, softcap,
                           alibi_slopes, deterministic, return_attn_probs)  # fmt: skip


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False, block_table=None,
):  # fmt: skip
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    output, lse = packed(q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, dropout=dropout_p,
                         scale=softmax_scale or q.shape[-1] ** -0.5, causal=causal,
                         window=window_size, softcap=softcap)  # fmt: skip
    return (output, lse, None) if return_attn_probs else output


def flash_attn_varlen_qkvpacked_func(
    qkv, cu_seqlens, max_seqlen, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
    return_attn_probs=False,
):  # fmt: skip
    return flash_attn_varlen_func(
        *qkv.unbind(1), cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale,
        causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_kvpacked_func(
    q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
):  # fmt: skip
    return flash_attn_varlen_func(
        q, *kv.unbind(1), cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip


# --- FlashAttention 3 and 4


def flash_attn_3_func(
    q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None,
    v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1,
    pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False,
):  # fmt: skip
    output, lse = batched(q, k, v, scale=softmax_scale or q.shape[-1] ** -0.5, causal=causal,
                          window=window_size, softcap=softcap, chunk=attention_chunk)  # fmt: skip
    return (output, lse) if return_attn_probs else output


def flash_attn_3_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None,
    seqused_k=None, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None,
    v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1,
    pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False,
):  # fmt: skip
    output, lse = packed(q, k, v, cu_seqlens_q, cu_seqlens_k,
                         scale=softmax_scale or q.shape[-1] ** -0.5, causal=causal,
                         window=window_size, softcap=softcap, chunk=attention_chunk)  # fmt: skip
    return (output, lse) if return_attn_probs else output


def flash_attn_4_func(
    q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False,
    window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None,
    deterministic=False, score_mod=None, score_mod_bwd=None, mask_mod=None, aux_tensors=None,
    aux_scalars=None, block_sparse_tensors=None, block_sparse_tensors_bwd=None, return_lse=False,
):  # fmt: skip
    output, lse = batched(q, k, v, scale=softmax_scale or q.shape[-1] ** -0.5, causal=causal,
                          window=window_size, softcap=softcap, sinks=learnable_sink)  # fmt: skip
    return output, lse if return_lse else None


def flash_attn_4_varlen_func(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
    min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None,
    softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0,
    num_splits=1, pack_gqa=None, deterministic=False, score_mod=None, score_mod_bwd=None,
    mask_mod=None, block_sparse_tensors=None, aux_tensors=None, aux_scalars=None,
    return_lse=False, scheduler_metadata=None, seqlen_k_per_split=None,
    disable_scheduler_metadata=False,
):  # fmt: skip
    output, lse = packed(q, k, v, cu_seqlens_q, cu_seqlens_k,
                         scale=softmax_scale or q.shape[-1] ** -0.5, causal=causal,
                         window=window_size, softcap=softcap, sinks=learnable_sink)  # fmt: skip
    return output, lse if return_lse else None


# --- vLLM, FlashMLA, SageAttention


def vllm_flash_attn_varlen_func(
    q, k, v, max_seqlen_q, cu_seqlens_q, max_seqlen_k, cu_seqlens_k=None, seqused_k=None,
    q_v=None, dropout_p=0.0, softmax_scale=None, causal=False, window_size=None, softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None,
    return_softmax_lse=False, out=None, scheduler_metadata=None, q_descale=None, k_descale=None,
    v_descale=None, num_splits=0, output_scale=None, fa_version=2, s_aux=None, cp_world_size=1,
    cp_rank=0, cp_tot_seqused_k=None, mask_mod=None, block_sparse_tensors=None, aux_tensors=None,
    aux_tensor_leading_dims=None, dynamic_causal=None,
):  # fmt: skip
    assert window_size is None or isinstance(window_size, list)
    if block_table is not None:
        k, v = (torch.cat([pool[pages.long()].flatten(0, 1)[:n]
                           for pages, n in zip(block_table, seqused_k, strict=True)])
                for pool in (k, v))  # fmt: skip
        cu_seqlens_k = torch.cat([seqused_k.new_zeros(1), seqused_k.cumsum(0)])
    output, lse = packed(q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, dropout=dropout_p,
                         scale=softmax_scale or q.shape[-1] ** -0.5, causal=causal,
                         window=window_size or (None, None), softcap=softcap,
                         sinks=s_aux)  # fmt: skip
    return (output, lse) if return_softmax_lse else output


def flash_mla_varlen_func(
    q, k, v, cu_seqlens_qo, cu_seqlens_kv, max_seqlen_qo, max_seqlen_kv, dropout_p=0.0,
    softmax_scale=None, causal=False, deterministic=False, is_varlen=True,
):  # fmt: skip
    return packed(q, k, v, cu_seqlens_qo, cu_seqlens_kv, dropout=dropout_p,
                  scale=softmax_scale or q.shape[-1] ** -0.5, causal=causal)  # fmt: skip


def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False,
             **kwargs):  # fmt: skip
    if is_causal and q.shape[2] != k.shape[2]:
        raise NotImplementedError("is_causal needs as many queries as keys")
    inputs = [t.transpose(1, 2) for t in (q, k, v)]
    output, lse = batched(*inputs, scale=sm_scale or q.shape[-1] ** -0.5, causal=is_causal)
    output = output.transpose(1, 2)
    return (output, lse) if return_lse else output


def sageattn_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                    is_causal=False, sm_scale=None, smooth_k=True, **kwargs):  # fmt: skip
    return packed(q, k, v, cu_seqlens_q, cu_seqlens_k, scale=sm_scale or q.shape[-1] ** -0.5,
                  causal=is_causal, corner="top_left")[0]  # fmt: skip


# --- xformers, FlashInfer, flash-linear-attention, PyTorch


def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
    scale = scaled(query.shape[-1], scale if scale is not None else query.shape[-1] ** -0.5)
    scores = torch.einsum("blhd,bshd->bhls", query.double(), key.double()) * scale
    if attn_bias is not None:
        assert attn_bias.shape == scores.shape
        if DECIDED[-1].bias == "first head":
            attn_bias = attn_bias[:, :1]
        if DECIDED[-1].bias == "first sample":
            attn_bias = attn_bias[:1]
        scores = scores + attn_bias
    weights = torch.dropout(scores.softmax(-1), p, p > 0)
    return torch.einsum("bhls,bshd->blhd", weights, value.double()).to(query.dtype)


def single_prefill_with_kv_cache(
    q, k, v, scale_q=None, scale_k=None, scale_v=None, o_dtype=None, custom_mask=None,
    packed_custom_mask=None, causal=False, kv_layout="NHD", pos_encoding_mode="NONE",
    use_fp16_qk_reduction=False, sm_scale=None, window_left=-1, logits_soft_cap=None,
    rope_scale=None, rope_theta=None, backend="auto", return_lse=False, kv_cache_sf=None,
    k_scale=None, v_scale=None,
):  # fmt: skip
    output, lse = one_sequence(
        q, k, v, scale=sm_scale or q.shape[-1] ** -0.5, causal=causal and custom_mask is None,
        window=(window_left, -1), softcap=logits_soft_cap, allowed=custom_mask,
    )  # fmt: skip
    return (output, lse / math.log(2.0)) if return_lse else output


def single_decode_with_kv_cache(
    q, k, v, kv_layout="NHD", pos_encoding_mode="NONE", use_tensor_cores=False, q_scale=None,
    k_scale=None, v_scale=None, window_left=-1, logits_soft_cap=None, sm_scale=None,
    rope_scale=None, rope_theta=None, return_lse=False,
):  # fmt: skip
    assert q.ndim == 2
    output, lse = one_sequence(q[None], k, v, scale=sm_scale or q.shape[-1] ** -0.5,
                               window=(window_left, -1), softcap=logits_soft_cap)  # fmt: skip
    return (output[0], lse[0] / math.log(2.0)) if return_lse else output[0]


def parallel_attn(q, k, v, g=None, scale=None, window_size=None, cu_seqlens=None,
                  chunk_indices=None, *, sink_bias=None, **kwargs):  # fmt: skip
    window = (None if window_size is None else window_size - 1, None)
    return batched(q, k, v, scale=scale or q.shape[-1] ** -0.5, causal=True, corner="top_left",
                   window=window, sinks=sink_bias)[0]  # fmt: skip


def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None,
                scale=None, window_size=(-1, -1), enable_gqa=False, seqused_k=None,
                block_table=None, num_splits=None):  # fmt: skip
    assert enable_gqa or query.shape[1] == key.shape[1]
    return packed(query, key, value, cu_seq_q, cu_seq_k, scale=scale or query.shape[-1] ** -0.5,
                  window=window_size)[0]  # fmt: skip
