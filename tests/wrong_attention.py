"""Attention with planted defects, written from the sentences of the catalogue alone.

But for names, nothing of the catalogue is used here: the tests of the diagnosis would otherwise
compare it with itself. Lengths come first in this house (batch, length, heads, width), masks are
made of positions, and softmax is written out.
"""

import functools

import torch

from pytest_attnheat.attention.defects import DEFECTS

INF = float("inf")

# What goes wrong in calls of several lengths, and of a cache, the stand-ins of public callables
# plant, and what goes wrong over several ranks is planted there: see `public_callables`,
# `public_cached` and `sharded_attention`.
OF_CALLABLES = ("packed", "packing", "positions", "cache", "output_buffer", "shards")
PLANTED = [one for one in DEFECTS if not one.name.startswith(OF_CALLABLES)]
# The two numbers that are fitted, and the rate of dropout.
TEMPERATURE, FACTOR, RATE = 1.37, 0.83, 0.25
BLOCK = 4
SINKS = torch.tensor([0.5, -1.0, 1.5, 0.2], dtype=torch.double)


@functools.cache
def usual_slopes(heads):
    """The slopes of ALiBi for a power of two of heads."""
    return torch.tensor([2.0 ** (-8 * (h + 1) / heads) for h in range(heads)], dtype=torch.double)


def declared_for(*names):
    """What must be declared of attention that is right, for these defects to show in it."""
    declared = {}
    if any("window" in name for name in names):
        declared["window"] = (4, 1) if "window_both_sides" in names else (3, 2)
    if "fully_masked_zero" in names:
        declared["fully_masked"] = "uniform"
    if "scale_absolute" in names:
        declared["scale"] = -0.3
    if any("softcap" in name for name in names):
        declared["softcap"] = 1.5
    if any("sinks" in name for name in names):
        declared["sinks"] = SINKS
    if any("alibi" in name for name in names) or "softcap_after_bias" in names:
        declared["alibi"] = usual_slopes
    if any("chunk" in name for name in names):
        declared["chunk"] = 3
    if any("prefix" in name for name in names):
        declared["prefix"] = 3
    if any("sink_keys" in name for name in names):
        declared |= {"sink_keys": 2, "window": (2, 1)}
    if "score_mod_ignored" in names:
        declared["score_mod"] = later_is_better
    if "may_see_ignored" in names:
        declared["may_see"] = even_sees_even
    return declared


def later_is_better(score, batch, head, query, key):
    return score + 0.1 * key


def even_sees_even(batch, head, query, key):
    return (query + key) % 2 == 0


def attention_with(
    *defects, window=None, bottom_right=False, fully_masked="zero", block=BLOCK, short_kept=False,
    **always
):  # fmt: skip
    """An implementation of attention with defects, of the signature of PyTorch.

    What is given besides it always does; `documents`, `lengths` and `bias` it takes as keywords.
    """
    planted = frozenset({*defects, "short_kept"} if short_kept else defects)
    memory = {}
    own_scale = always.pop("scale", None)

    def attention(query, key, value, attn_mask=None, is_causal=False, *, scale=None, **given):
        scale = own_scale if scale is None else scale
        if torch.is_tensor(given.get("documents")):  # as many queries as keys
            given["documents"] = (given["documents"], given["documents"])
        asked = {"query": query, "key": key, "value": value, "mask": attn_mask, **given}
        asked = _with_memories(planted, memory, asked)
        query, key, value, attn_mask = (asked.pop(n) for n in ("query", "key", "value", "mask"))
        settings = (window, bottom_right, fully_masked, block, {**always, **asked})
        return _attention(planted, query, key, value, attn_mask, is_causal, scale, *settings)

    def narrow(query, key, value, attn_mask=None, is_causal=False, *, scale=None):
        return attention(query, key, value, attn_mask, is_causal, scale=scale)

    narrow.with_more = attention  # type: ignore[attr-defined]
    return narrow


def planted_with(*names):
    """An implementation with defects, and what is to be declared of it."""
    declared = declared_for(*names)
    subject = attention_with(*names, **declared)
    keywords = {k: k for k in ("bias", "documents", "lengths") if any(k in name for name in names)}
    return (subject.with_more if keywords else subject), {**declared, **keywords}


def _with_memories(has, memory, asked):
    """What was asked, with what the code remembers of earlier calls in its place."""
    shapes = tuple(t.shape for t in (asked["query"], asked["key"], asked["value"]))
    first = memory.setdefault(
        shapes, {n: t.clone() if torch.is_tensor(t) else t for n, t in asked.items()}
    )
    if "answer_of_earlier_call" in has:
        return dict(first)
    if "mask_of_earlier_call" in has:
        return {**asked, "mask": first["mask"]}
    if "keys_of_earlier_call" in has:
        return {**asked, "key": first["key"], "value": first["value"]}
    return asked


def _attention(
    has, query, key, value, mask, is_causal, scale, window, bottom_right, fully_masked, block, more
):
    more = {name: t for name, t in more.items() if f"{name}_ignored" not in has}
    q, k, v = _tensors(has, query, key, value)
    rows, heads, width = q.shape[1:]
    columns = k.shape[1]
    default = 1 / width**0.5
    scale = default if scale is None or "scale_argument_ignored" in has else scale
    factor = _factor(has, scale, width, heads, value.shape[-1], rows, columns)
    products = torch.einsum("bqhd,bkhd->bhqk", q, k)
    if "products_in_float16" in has:
        products = products.half().to(products.dtype)
    if "products_overflow" in has:
        products = torch.where(products.abs() > 65519, products.sign() * INF, products)
    for name in ("temperature", "base_two"):
        number = TEMPERATURE if name == "temperature" else 0.6931471805599453
        factor = factor * number if name in has else factor
    at, to = _positions(rows, columns, bottom_right, more.get("lengths"))
    elsewhere, _ = _positions(rows, columns, not bottom_right, more.get("lengths"))

    def after(scores):
        return _with_more(has, scores, at, elsewhere, to, factor, more)

    scores = _capped(has, products, 1.0 if "scale_after_softmax" in has else factor, more, after)
    for name in ("bfloat16", "float16"):
        if f"scores_in_{name}" in has:
            scores = scores.to(getattr(torch, name)).to(query.dtype)
    allowed = _allowed(has, mask, is_causal, scores.shape, window, at, elsewhere, to, block, more)
    filled = _masked(has, scores, allowed)
    if "softcap_after_mask" in has:
        filled = more["softcap"] * torch.tanh(filled / more["softcap"])
    padding = 0
    if "padded_keys_attended" in has and not is_causal and window is None:
        padding = -columns % block
        filled = torch.nn.functional.pad(filled, (0, padding))
    sinks = more.get("sinks")
    if sinks is None or "mean_of_values" in has:
        weights = _softmax(has, filled, allowed, block)
    else:
        weights = _softmax_with_sinks(has, filled, _own_sinks(has, sinks, factor), block)
    weights = weights[..., :columns]
    if "scale_after_softmax" in has:
        weights = weights * factor
    if "weights_averaged" in has:
        weights = sum(weights[:, h] for h in range(heads))[:, None] / heads
        weights = weights.repeat(1, heads, 1, 1)
    meaning = next(
        (w for w in ("nan", "uniform", "zero") if f"fully_masked_{w}" in has), fully_masked
    )
    filler = {"zero": 0.0, "nan": float("nan"), "uniform": 1 / columns}[meaning]
    if sinks is None and not padding:
        weights = torch.where(allowed.sum(-1, keepdim=True) == 0, filler, weights)
    for name in ("bfloat16", "float16"):
        if f"weights_in_{name}" in has:
            weights = weights.to(getattr(torch, name)).to(query.dtype)
    if has & {"dropout_in_eval", "dropout_not_rescaled"}:
        weights = weights * (torch.rand(weights.shape) >= RATE)
        if "dropout_in_eval" in has:
            weights = weights / (1 - RATE)
    if "masked_nan_felt" not in has:
        v = v.nan_to_num(0.0)
    out = torch.einsum("bhqk,bkhd->bqhd", weights.to(v.dtype), v)
    return _finished(has, out, block)


def _positions(rows, columns, bottom_right, lengths):
    """Where queries and keys stand, (batch or 1, 1, rows, columns) both."""
    at, to = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    at, to = at[None, None], to[None, None]
    if bottom_right:
        ends = torch.tensor([columns]) if lengths is None else lengths
        at = at + (ends - rows)[:, None, None, None]
    return at, to


def _with_more(has, scores, at, elsewhere, to, factor, more):
    """Scores with the bias and ALiBi, and a function of all that."""
    heads = scores.shape[1]
    bias, slopes = more.get("bias"), more.get("alibi")
    if bias is not None and not has & {"bias_as_boolean", "bias_as_keep"}:
        bias = _own_bias(has, bias.broadcast_to(scores.shape))
        scores = scores + (bias * factor if "bias_scaled" in has else bias)
    if slopes is not None:
        slopes = slopes(heads) if callable(slopes) else slopes
        slopes = _own_slopes(has, slopes, heads, factor)
        away = elsewhere if has & {"alibi_other_corner", "causal_other_corner"} else at
        far = away - to if "alibi_signed" in has else (away - to).abs()
        scores = scores - slopes[:, None, None] * far
    if "score_mod" in more:
        places = torch.meshgrid(*map(torch.arange, scores.shape), indexing="ij")
        scores = more["score_mod"](scores, *places)
    return scores


def _own_bias(has, bias):
    if "bias_of_first_head" in has:
        return torch.stack([bias[:, 0]] * bias.shape[1], 1)
    if "bias_of_first_sample" in has:
        return torch.stack([bias[0]] * bias.shape[0])
    if "bias_transposed" in has:
        if bias.shape[2] != bias.shape[3]:
            raise ValueError("the bias does not fit")
        return bias.transpose(2, 3)
    return bias


def _own_slopes(has, slopes, heads, factor):
    if "alibi_negative" in has:
        return 0 - slopes
    if "alibi_reversed" in has:
        return torch.stack([slopes[heads - 1 - h] for h in range(heads)])
    if "alibi_of_first_head" in has:
        return torch.stack([slopes[0]] * heads)
    if "alibi_off_by_one" in has:
        return torch.tensor([2.0 ** (-8 * h / heads) for h in range(heads)], dtype=torch.double)
    if "alibi_of_other_heads" in has:
        count = 1
        while count < heads:
            count *= 2
        return usual_slopes(count)[:heads]
    return slopes * factor if "alibi_scaled" in has else slopes


def _own_sinks(has, sinks, factor):
    if "sinks_of_other_heads" in has:
        return torch.stack([sinks[0]] * len(sinks))
    return sinks * factor if "sinks_scaled" in has else sinks


def _softmax_with_sinks(has, scores, sinks, block):
    sink = sinks[None, :, None, None].expand(*scores.shape[:3], 1)
    top = scores.amax(-1, keepdim=True)
    if not has & {"sinks_outside_maximum", "sinks_not_shifted", "sinks_shifted_twice"}:
        top = torch.maximum(top, sink)
    times = 0 if "sinks_not_shifted" in has else 2 if "sinks_shifted_twice" in has else 1
    powers, extra = torch.exp(scores - top), torch.exp(sink - times * top)
    if "sinks_in_every_part" in has:
        extra = sum(extra for _ in range(0, scores.shape[-1], block))
    return powers / (powers.sum(-1, keepdim=True) + extra)


def _capped(has, products, factor, more, after):
    """Scaled scores with their softcap, and what is added to them."""
    cap = more.get("softcap")
    if cap is None:
        return after(products * factor)
    if "softcap_before_scale" in has:
        return after(cap * torch.tanh(products / cap) * factor)
    if "softcap_after_bias" in has:
        return cap * torch.tanh(after(products * factor) / cap)
    if "softcap_after_mask" in has:
        return after(products * factor)
    if "softcap_not_divided" in has:
        return after(cap * torch.tanh(products * factor))
    if "softcap_not_multiplied" in has:
        return after(torch.tanh(products * factor / cap))
    if "softcap_times_score" in has:
        return after(products * factor * torch.tanh(products * factor / cap))
    return after(cap * torch.tanh(products * factor / cap))


def _tensors(has, query, key, value):
    """(batch, length, heads, width) each, with as many heads as queries have."""
    if "heads_split_without_transpose" in has:
        query, key, value = (
            t.permute(0, 2, 1, 3).contiguous().view(t.shape) for t in (query, key, value)
        )
    heads, key_heads = query.shape[1], key.shape[1]
    if heads != key_heads:
        if heads % key_heads:
            raise ValueError("heads do not fit")
        serves = [h // (heads // key_heads) for h in range(heads)]
        in_turn = [h % key_heads for h in range(heads)]
        if "first_key_head_only" in has:
            serves = [0] * heads
        if "key_head_miscounted" in has:
            serves = [min(h // key_heads, key_heads - 1) for h in range(heads)]
        key = key[:, in_turn if has & {"groups_tiled", "keys_tiled"} else serves]
        value = value[:, in_turn if has & {"groups_tiled", "values_tiled"} else serves]
    q, k, v = query, key, value
    if "queries_and_keys_exchanged" in has:
        q, k = key, query
    if "values_as_keys" in has:
        k = value
    if "queries_as_keys" in has:
        k = query
    if "keys_as_queries" in has:
        q = key
    if "keys_as_values" in has:
        v = key
    if "queries_as_values" in has:
        v = query
    if (q.shape[2], k.shape[2], v.shape[2]) != (query.shape[2], key.shape[2], key.shape[2]):
        raise ValueError("lengths do not fit")
    return [t.transpose(1, 2) for t in (q, k, v)]


def _factor(has, scale, width, heads, value_width, rows, columns):
    if "scale_missing" in has:
        return 1.0
    if "scale_squared" in has:
        return scale * scale
    if "scale_inverted" in has:
        return 1 / scale
    if "scale_from_value_width" in has:
        return value_width**-0.5
    if "scale_from_embedding" in has:
        return (heads * width) ** -0.5
    if "scale_from_key_len" in has:
        return columns**-0.5
    if "scale_from_query_len" in has:
        return rows**-0.5
    if "scale_from_heads" in has:
        return heads**-0.5
    if "scale_of_another_width" in has:
        return next(n for n in range(width, width + 16) if n % 16 == 0) ** -0.5
    return abs(scale) if "scale_absolute" in has else scale


def _allowed(has, mask, is_causal, shape, window, at, elsewhere, to, block, more):
    rows, columns = shape[2:]
    if "causal_other_corner" in has:
        at = elsewhere
    allowed = torch.ones(shape, dtype=torch.bool)
    both = mask is not None and is_causal
    causal = (is_causal and "causal_ignored" not in has) or "causal_always" in has
    if both and "causal_ignored_with_mask" in has:
        causal = False
    if causal:
        if "causal_sees_next_with_cache" in has and columns > rows:
            seen = to <= at + 1
        elif "causal_misses_own_with_cache" in has and columns > rows:
            seen = to < at
        elif "causal_sees_next" in has:
            seen = to <= at + 1
        elif "causal_misses_own" in has:
            seen = to < at
        elif "causal_reversed" in has:
            seen = to >= at
        elif "causal_in_blocks" in has:
            seen = to < (at // block + 1) * block
        elif "causal_before_blocks" in has:
            seen = to < at // block * block
        elif "causal_offset_reversed" in has:
            seen = to <= torch.arange(rows)[:, None] + rows - columns
        else:
            seen = to <= at
        allowed &= seen | (to < _off_by_one(has, more, "prefix", 0))
    sink_keys = _off_by_one(has, more, "sink_keys", 0)
    if window is not None and "window_ignored" not in has:
        left, right = window
        if "window_swapped" in has:
            left, right = right, left
        cached = columns > rows
        for name, add in (("wide", 1), ("narrow", -1)):
            left += add * (f"window_left_too_{name}" in has)
            left += add * (f"window_left_too_{name}_with_cache" in has and cached)
            right += add * (f"window_right_too_{name}" in has)
        if "window_both_sides" in has:
            right = left
        stands = elsewhere if "window_other_corner" in has else at
        allowed &= ((stands - to <= left) & (to - stands <= right)) | (to < sink_keys)
    if "chunk" in more:
        size = _off_by_one(has, more, "chunk", 0)
        stands = elsewhere if "chunk_other_corner" in has else at
        near = at - to < size if "chunk_slides" in has else stands // size == to // size
        allowed &= near | (to < sink_keys)
    if "documents" in more:
        of_queries, of_keys = more["documents"]
        if "documents_off_by_one" in has:
            of_keys = torch.cat([of_keys[:, -1:], of_keys[:, :-1]], 1)
        allowed &= of_queries[:, None, :, None] == of_keys[:, None, None, :]
    if "lengths" in more:
        lengths = more["lengths"] + ("lengths_off_by_one" in has)
        allowed &= to < lengths[:, None, None, None]
    if "may_see" in more:
        allowed &= more["may_see"](0, 0, torch.arange(rows)[:, None], torch.arange(columns))
    if "bias" in more:
        bias = _own_bias(has, more["bias"].broadcast_to(shape))
        allowed &= bias != 0 if "bias_as_keep" in has else bias > -INF
    ignored = "mask_ignored" in has or (both and "mask_ignored_when_causal" in has)
    if mask is not None and not ignored:
        allowed &= _own_mask(has, mask.broadcast_to(shape), block)
    if "last_key_ignored" in has:
        allowed[..., columns - 1] = False
    if "first_key_ignored" in has:
        allowed[..., 0] = False
    if "last_block_of_keys_ignored" in has:
        allowed[..., _in_whole_blocks(has, columns, block) :] = False
    if "first_keys_only" in has:
        allowed[..., 16:] = False
    if "keys_as_many_as_queries" in has:
        allowed[..., rows:] = False
    return allowed


def _off_by_one(has, more, name, default):
    return more.get(name, default) + (f"{name}_off_by_one" in has)


def _in_whole_blocks(has, length, block):
    return length if "short_kept" in has and length < block else length - length % block


def _own_mask(has, mask, block):
    batch, heads = mask.shape[:2]
    if "mask_inverted" in has:
        return mask == False  # noqa: E712
    if "mask_transposed" in has:
        if mask.shape[2] != mask.shape[3]:
            raise ValueError("the mask does not fit")
        return mask.transpose(2, 3)
    if "mask_of_another_sample" in has:
        return torch.stack([mask[(b + 1) % batch] for b in range(batch)])
    if "mask_of_first_sample" in has:
        return torch.stack([mask[0] for _ in range(batch)])
    if "mask_of_first_head" in has:
        return torch.stack([mask[:, 0] for _ in range(heads)], 1)
    if "mask_of_first_alone" in has:
        mask = mask.clone()
        mask[:, 1:] = True
        return mask
    if "mask_in_blocks" in has:
        mask = mask.clone()
        for row in range(0, mask.shape[2], block):
            for column in range(0, mask.shape[3], block):
                tile = mask[:, :, row : row + block, column : column + block]
                tile |= tile.any(-1, keepdim=True).any(-2, keepdim=True)
        return mask
    if "mask_tiled_over_heads" in has:
        # (batch * heads, ...) scores against a mask that was repeated as a whole.
        order = [(b * heads + h) % batch for b in range(batch) for h in range(heads)]
        folded = torch.stack([mask[b, i % heads] for i, b in enumerate(order)])
        return folded.reshape(batch, heads, *mask.shape[2:])
    return mask


def _masked(has, scores, allowed):
    hidden = ~allowed
    if has & {"mask_after_softmax", "mask_after_softmax_renormalised"}:
        return scores
    if "mask_added_as_number" in has:
        return scores + allowed.to(scores.dtype)
    if "mask_multiplied" in has:
        return scores * allowed
    if "mask_fill_minus_10" in has:
        return torch.where(hidden, -10.0, scores)
    if "mask_fill_minus_1" in has:
        return torch.where(hidden, -1.0, scores)
    return torch.where(hidden, -INF, scores)


def _softmax(has, scores, allowed, block):
    weights = _normalised(has, scores, block)
    if "mask_after_softmax" in has:
        weights = weights * allowed
    if "mask_after_softmax_renormalised" in has:
        weights = weights * allowed
        weights = weights / weights.sum(-1, keepdim=True)
    return weights


def _normalised(has, scores, block):
    axes = (-1,)
    if "softmax_over_queries" in has:
        axes = (-2,)
    if "softmax_over_heads" in has:
        axes = (1,)
    if "softmax_over_batch" in has:
        axes = (0,)
    if "softmax_over_map" in has:
        axes = (-1, -2)
    if "no_softmax" in has:
        return scores
    if "mean_of_values" in has:
        seen = (scores > -INF).double()
        return seen / seen.sum(axes, keepdim=True)
    if "sigmoid" in has:
        return 1 / (1 + torch.exp(-scores))
    if "relu_normalised" in has:
        kept = torch.clamp(scores, min=0)
        return kept / kept.sum(axes, keepdim=True)
    if "hard_maximum" in has:
        return (torch.cumsum(scores == scores.amax(-1, keepdim=True), -1) == 1) & (
            scores == scores.amax(-1, keepdim=True)
        ).to(scores.dtype).bool()
    if "no_maximum_subtracted" in has:
        powers = torch.exp(scores)
        return powers / powers.sum(axes, keepdim=True)
    top = scores.amax(axes, keepdim=True)
    powers = torch.exp(scores - top)
    if "no_normaliser" in has:
        return powers
    if "softmax_plus_one" in has:
        return powers / (1 + powers.sum(axes, keepdim=True))
    if "log_softmax" in has:
        return scores - top - torch.log(powers.sum(axes, keepdim=True))
    if any(name.startswith("online_") for name in has):
        return _online(has, scores, block)
    if any("part" in name or name.endswith(("_in_base_two", "_bases")) for name in has):
        return _in_parts(has, scores, block)
    weights = powers / powers.sum(axes, keepdim=True)
    if "softmax_twice" in has:
        powers = torch.exp(weights)
        weights = powers / powers.sum(axes, keepdim=True)
    return weights


def _online(has, scores, block):
    """As a fused kernel does it, with a running maximum; column k accumulates what key k adds."""
    rescales_output = "online_sum_not_rescaled" in has
    rescales_sum = "online_output_not_rescaled" in has
    top = torch.full_like(scores[..., :1], torch.finfo(scores.dtype).min)
    total, columns = torch.zeros_like(top), torch.zeros_like(scores)
    for start in range(0, scores.shape[-1], block):
        part = scores[..., start : start + block]
        higher = torch.maximum(top, part.amax(-1, keepdim=True))
        shrink = torch.exp(top - higher)
        powers = torch.exp(part - higher)
        total = (total * shrink if rescales_sum else total) + powers.sum(-1, keepdim=True)
        columns = columns * shrink if rescales_output else columns
        columns[..., start : start + block] = powers
        top = higher
    return columns / total


def _in_parts(has, scores, block):
    """Each part has its own softmax and log-sum-exp; then they are merged, two and two."""
    parts = [scores[..., n : n + block] for n in range(0, scores.shape[-1], block)]
    states = []
    for part in parts:
        lse = torch.logsumexp(part, -1, keepdim=True)
        own = torch.exp(part - lse)
        states.append((own if "empty_parts_nan" in has else own.nan_to_num(0.0), lse))
    if has & {"parts_averaged", "parts_added"}:
        divisor = len(parts) if "parts_averaged" in has else 1
        return torch.cat([own / divisor for own, _ in states], -1)
    log2e = 1.4426950408889634
    total = torch.cat([lse for _, lse in states], -1)
    if "lse_in_base_two" in has:
        total = total * log2e
    if "lse_of_two_bases" in has:
        total = torch.cat([total[..., :1] * log2e, total[..., 1:]], -1)
    total = total - total.amax(-1, keepdim=True)
    powers = torch.exp2(total) if "merge_in_base_two" in has else torch.exp(total)
    share = powers / powers.sum(-1, keepdim=True)
    return torch.cat([own * share[..., i : i + 1] for i, (own, _) in enumerate(states)], -1)


def _finished(has, out, block):
    """From (batch, length, heads, width) to (batch, heads, length, width)."""
    batch, rows, heads, width = out.shape
    if "output_factor" in has:
        out = out * FACTOR
    if "last_block_of_queries_zero" in has:
        out = out.clone()
        out[:, _in_whole_blocks(has, rows, block) :] = 0
    if "first_queries_only" in has:
        out = torch.cat([out[:, :16], torch.zeros_like(out[:, 16:])], 1)
    for name in ("bfloat16", "float16"):
        if f"output_in_{name}" in has:
            out = out.to(getattr(torch, name)).to(out.dtype)
    if "heads_averaged" in has:
        out = out.mean(2, keepdim=True).repeat(1, 1, heads, 1)
    out = out.transpose(1, 2)
    if "heads_merged_without_transpose" in has:
        # Read as (batch, length, heads * width) where it lies head after head.
        out = out.contiguous().view(batch, rows, heads * width)
        out = out.view(batch, rows, heads, width).transpose(1, 2)
    return out
