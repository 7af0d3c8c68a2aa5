"""Attention as a kernel author writes it in Triton: one pass over the keys, and planted defects.

Each program computes a block of queries of one head. The maximum and the sum of a row are carried
from block to block of keys; what was summed is rescaled when the maximum grows.
"""

import torch
import triton
import triton.language as tl

BLOCK = 32


@triton.jit
def _kernel(
    query, key, value, output, batch_q, head_q, row_q, batch_k, head_k, row_k, batch_v, head_v,
    row_v, batch_o, head_o, row_o, query_len, key_len, heads, group, width, value_width, scale,
    causal: tl.constexpr, defect: tl.constexpr, block: tl.constexpr, columns: tl.constexpr,
    value_columns: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    which = tl.program_id(1)
    batch = which // heads
    head = which % heads
    key_head = head // group
    if defect == "wrong heads":
        key_head = head % (heads // group)
    rows = tl.program_id(0) * block + tl.arange(0, block)
    inside = tl.arange(0, columns)
    inside_value = tl.arange(0, value_columns)
    at = query + batch * batch_q + head * head_q + rows[:, None] * row_q + inside[None, :]
    kept = (rows[:, None] < query_len) & (inside[None, :] < width)
    q = tl.load(at, mask=kept, other=0.0)
    most = tl.full([block], -float("inf"), tl.float32)
    total = tl.zeros([block], tl.float32)
    summed = tl.zeros([block, value_columns], tl.float32)
    for first in range(0, key_len, block):
        keys = first + tl.arange(0, block)
        real = keys < key_len
        k = tl.load(
            key + batch * batch_k + key_head * head_k + keys[None, :] * row_k + inside[:, None],
            mask=real[None, :] & (inside[:, None] < width), other=0.0,
        )  # fmt: skip
        v = tl.load(
            value + batch * batch_v + key_head * head_v + keys[:, None] * row_v
            + inside_value[None, :],
            mask=real[:, None] & (inside_value[None, :] < value_width), other=0.0,
        )  # fmt: skip
        scores = tl.dot(q, k, input_precision=precision).to(tl.float32) * scale
        seen = real[None, :] & (rows[:, None] < query_len)
        if defect == "tail counted":
            seen = rows[:, None] < query_len
        if causal:
            last = rows[:, None]
            if defect == "one key more":
                last = last + 1
            if defect == "other corner":
                last = last + key_len - query_len
            seen = seen & (keys[None, :] <= last)
        scores = tl.where(seen, scores, -float("inf"))
        larger = tl.maximum(most, tl.max(scores, 1))
        shift = tl.where(larger == -float("inf"), 0.0, larger)
        weights = tl.exp(scores - shift[:, None])
        rescale = tl.exp(most - shift)
        if defect == "no rescale":
            rescale = tl.where(rescale == 0.0, 0.0, 1.0)
        total = total * rescale + tl.sum(weights, 1)
        products = tl.dot(weights.to(v.dtype), v, input_precision=precision)
        summed = summed * rescale[:, None] + products
        most = larger
    summed = summed / tl.where(total == 0.0, 1.0, total)[:, None]
    kept = (rows[:, None] < query_len) & (inside_value[None, :] < value_width)
    at = output + batch * batch_o + head * head_o + rows[:, None] * row_o + inside_value[None, :]
    tl.store(at, summed.to(output.dtype.element_ty), mask=kept)


def attention(
    query, key, value, is_causal=False, scale=None, enable_gqa=False, *, defect="", precision="ieee"
):
    """Attention of (batch, heads, length, width), without gradients and without float64."""
    if query.dtype == torch.float64:
        raise NotImplementedError("float64 is not supported")
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    batch, heads, query_len, width = query.shape
    output = query.new_empty(batch, heads, query_len, value.shape[-1])
    grid = (triton.cdiv(query_len, BLOCK), batch * heads)
    _kernel[grid](
        query, key, value, output, *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        *output.stride()[:3], query_len, key.shape[-2], heads, heads // key.shape[1], width,
        value.shape[-1], width**-0.5 if scale is None else scale, is_causal, defect, BLOCK,
        max(16, triton.next_power_of_2(width)), max(16, triton.next_power_of_2(value.shape[-1])),
        precision,
    )  # fmt: skip
    return output
