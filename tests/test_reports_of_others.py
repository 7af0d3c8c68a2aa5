"""Public reports of wrong attention functions, rebuilt: the wrong is found, the right left alone.

Each is a pair that differs in the reported defect alone. No sizes are picked by hand: what is
declared decides what is asked.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.nn.functional import dropout, pad
from torch.nn.functional import scaled_dot_product_attention as sdpa

from pytest_attnheat import AttentionSpec, check_attention
from pytest_attnheat.contract.checks import CHECKS

FOUR = ("float32", "float16", "bfloat16", "float64")
HALVES = (torch.float16, torch.bfloat16)
BY_NAME = {check.name: check for check in CHECKS}


@dataclass(frozen=True)
class Reported:
    """A public report.

    Attributes:
        make: Returns the function, given whether it has the defect.
        rows: Which checks find it, each of them.
        declared: Fields of its specification.
        dtypes: In which it is right.
        wrong_in: In which the wrong one is asked.
    """

    make: Callable[[bool], Callable[..., Any]]
    rows: tuple[str, ...]
    declared: Mapping[str, Any] = field(default_factory=dict)
    dtypes: tuple[str, ...] = FOUR
    wrong_in: tuple[str, ...] = ("float32",)


def kept(query_len, key_len, *, from_the_end=False):
    """What causality permits, (query_len, key_len)."""
    later = key_len - query_len if from_the_end else 0
    return torch.ones(query_len, key_len, dtype=torch.bool).tril(later)


def scored(query, key, is_causal=False, **corner):
    scores = query @ key.mT / query.shape[-1] ** 0.5
    if is_causal:
        scores = scores.masked_fill(~kept(*scores.shape[-2:], **corner), -math.inf)
    return scores


def weighted(scores):
    """The softmax, zero for queries that see nothing."""
    return scores.softmax(-1).nan_to_num(0.0)


def flash(attend):
    """Attention with the arguments of flash-attn, and another one's work on (b, h, l, d)."""

    def flash_attention(q, k, v, causal=False):
        return attend(*(t.transpose(1, 2) for t in (q, k, v)), causal).transpose(1, 2)

    return flash_attention


FLASH = {"layout": "blhd", "causal": "bottom_right", "causal_argument": "causal"}


# --- backward passes


class Fused(torch.autograd.Function):
    """Keeps the log of each row's sum, and computes the weights a second time on the way back."""

    @staticmethod
    def forward(ctx, query, key, value, causal, forgets):
        ctx.dtype = query.dtype
        if query.dtype in HALVES:
            query, key, value = query.float(), key.float(), value.float()
        scores = scored(query, key, causal)
        lse = scores.logsumexp(-1, keepdim=True)
        ctx.save_for_backward(query, key, value, lse)
        ctx.causal = causal and not forgets
        return ((scores - lse).exp() @ value).to(ctx.dtype)

    @staticmethod
    def backward(ctx, above):
        query, key, value, lse = ctx.saved_tensors
        above = above.to(query.dtype)
        weights = (scored(query, key, ctx.causal) - lse).exp()
        slopes = above @ value.mT
        slopes = weights * (slopes - (slopes * weights).sum(-1, keepdim=True))
        slopes = slopes / query.shape[-1] ** 0.5
        found = slopes @ key, slopes.mT @ query, weights.mT @ above
        return (*(t.to(ctx.dtype) for t in found), None, None)


def forgetful_backward(wrong):
    """triton-lang/triton#4541: on the way back nothing is masked."""

    def fused_attention(query, key, value, is_causal=False):
        return Fused.apply(query, key, value, is_causal, wrong)

    return fused_attention


class Folded(torch.autograd.Function):
    """Grouped heads whose gradients are added up by hand."""

    @staticmethod
    def forward(ctx, query, key, value, causal, wrong):
        group = query.shape[1] // key.shape[1]
        weights = weighted(scored(query, key.repeat_interleave(group, 1), causal))
        ctx.save_for_backward(query, key, value, weights)
        ctx.wrong = wrong and group != key.shape[1]
        return weights @ value.repeat_interleave(group, 1)

    @staticmethod
    def backward(ctx, above):
        query, key, value, weights = ctx.saved_tensors
        heads = key.shape[1]
        group = query.shape[1] // heads
        slopes = above @ value.repeat_interleave(group, 1).mT
        slopes = weights * (slopes - (slopes * weights).sum(-1, keepdim=True))
        slopes = slopes / query.shape[-1] ** 0.5

        def folded(tensor):
            if ctx.wrong:
                return tensor.unflatten(1, (group, heads)).sum(1)
            return tensor.unflatten(1, (heads, group)).sum(2)

        of_keys, of_values = folded(slopes.mT @ query), folded(weights.mT @ above)
        return slopes @ key.repeat_interleave(group, 1), of_keys, of_values, None, None


def folded_wrongly(wrong):
    """XunhaoLai/native-sparse-attention-triton#27: right where there are as many as in a group."""

    def attention(query, key, value, is_causal=False, enable_gqa=False):
        return Folded.apply(query, key, value, is_causal, wrong)

    return attention


# --- grouped heads


def other_kernel_for_few_queries(wrong):
    """pytorch/pytorch#174861: few queries of a thousand keys, and the key heads in turn."""

    def attention(query, key, value, is_causal=False, enable_gqa=False):
        group = query.shape[1] // key.shape[1]
        of_query = torch.arange(query.shape[1]) // group
        if wrong and query.shape[2] <= 8 and key.shape[2] >= 1024:
            of_query = torch.arange(query.shape[1]) % key.shape[1]
        return scored(query, key[:, of_query], is_causal).softmax(-1) @ value[:, of_query]

    return attention


def groups_of_powers_of_two(wrong):
    """ikawrakow/ik_llama.cpp#1521: the last heads of another group are taken from its first."""

    def attention(query, key, value, is_causal=False, enable_gqa=False):
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        output = sdpa(query, key, value, is_causal=is_causal)
        whole = 2 ** (group.bit_length() - 1)
        if wrong and whole != group:
            groups = output.unflatten(1, (-1, group))
            output = torch.cat([groups[:, :, :whole], groups[:, :, : group - whole]], 2)
            output = output.flatten(1, 2)
        return output

    return attention


# --- blocks of keys


def last_block_read_whole(wrong):
    """pytorch/pytorch#169222: of few queries, what lies behind the last key is seen too."""

    def attention(query, key, value, is_causal=False):
        if wrong and query.shape[2] <= 8 and not is_causal:
            key, value = (pad(t, (0, 0, 0, -t.shape[2] % 32)) for t in (key, value))
        return scored(query, key, is_causal).softmax(-1) @ value

    return attention


def merged_in_another_base(wrong):
    """sgl-project/sglang#35045: logs to the base 2 are merged as natural ones."""

    def attention(query, key, value, is_causal=False):
        half = max(1, key.shape[2] // 2)
        scores = scored(query, key, is_causal)
        parts = []
        for places in (slice(0, half), slice(half, None)):
            part = scores[..., places]
            if part.shape[-1]:
                lse = part.logsumexp(-1, keepdim=True)
                lse = lse / math.log(2) if wrong else lse
                parts.append((weighted(part) @ value[:, :, places], lse))
        lse = torch.cat([lse for _, lse in parts], -1)
        shares = (lse - lse.amax(-1, keepdim=True)).exp()
        shares = shares / shares.sum(-1, keepdim=True)
        return sum(output * shares[..., [at]] for at, (output, _) in enumerate(parts))

    return attention


PAGE = 4


def paged(wrong):
    """vllm-project/vllm#2231: one query each, keys in pages; the last page is taken to be full."""

    def decode(query, pages, values, tables, lengths, window):
        outputs = []
        for one, table, length in zip(query, tables, lengths.tolist(), strict=True):
            table = table[: -(-length // PAGE)]
            first = max(0, length - window)
            if wrong and length > window:
                table, first, length = table[-(window // PAGE) :], 0, window
            keys, kept_values = (
                cache[table].flatten(0, 1)[first:length].transpose(0, 1)
                for cache in (pages, values)
            )
            group = len(one) // len(keys)
            keys, kept_values = (t.repeat_interleave(group, 0) for t in (keys, kept_values))
            outputs.append(scored(one[:, None], keys).softmax(-1) @ kept_values)
        return torch.stack(outputs)[:, :, 0]

    return decode


WINDOW = 8


def through_pages(decode):
    """Attention of a paged decoder: each query is a sequence of its own, over shuffled pages."""

    def paged_attention(query, key, value):
        batch, _, query_len, _ = query.shape
        key_len = key.shape[2]
        if query_len > key_len:
            raise NotImplementedError("more queries than keys")
        pages = -(-key_len // PAGE)
        order = torch.randperm(batch * pages, generator=torch.Generator().manual_seed(1))

        def stored(tensor):
            whole = pad(tensor.transpose(1, 2), (0, 0, 0, 0, 0, -key_len % PAGE), value=7.0)
            places = order.argsort()
            return whole.reshape(batch * pages, PAGE, *whole.shape[2:])[places]

        tables = order.view(batch, pages).repeat_interleave(query_len, 0)
        lengths = torch.arange(key_len - query_len + 1, key_len + 1).repeat(batch)
        queries = query.transpose(1, 2).flatten(0, 1)
        output = decode(queries, stored(key), stored(value), tables, lengths, WINDOW)
        return output.unflatten(0, (batch, query_len)).transpose(1, 2)

    return paged_attention


# --- masks


def mask_read_as_booleans(wrong):
    """huggingface/transformers#38094: what is added becomes True where it is not 0."""

    def attention(query, key, value, attention_mask=None):
        if wrong and attention_mask is not None:
            attention_mask = attention_mask.bool()
        return sdpa(query, key, value, attention_mask)

    return attention


def stale_mask(wrong):
    """ml-explore/mlx#3071: a mask is kept for each number of keys, whatever that of queries."""
    known = {}

    def attention(query, key, value, is_causal=False):
        lengths = query.shape[2], key.shape[2]
        scores = scored(query, key)
        if not is_causal:
            return scores.softmax(-1) @ value
        name = lengths[1] if wrong else lengths
        if name not in known or len(known[name]) < lengths[0]:
            known[name] = kept(*lengths, from_the_end=wrong and lengths[0] < lengths[1])
        return scores.masked_fill(~known[name][: lengths[0]], -math.inf).softmax(-1) @ value

    return attention


def packed(attend):
    """The batch packed into one sequence, with the places where each entry begins."""

    def flash_varlen(query, key, value, is_causal=False):
        batch, query_len, key_len = len(query), query.shape[1], key.shape[1]
        begins = [torch.arange(batch + 1) * length for length in (query_len, key_len)]
        output = attend(*(t.flatten(0, 1) for t in (query, key, value)), *begins, is_causal)
        return output.unflatten(0, (batch, query_len))

    return flash_varlen


def packed_without_causality(wrong):
    """huggingface/candle#3606: packed sequences are not causal, and nobody is told."""

    def varlen(query, key, value, of_queries, of_keys, causal):
        outputs = []
        for at in range(len(of_queries) - 1):
            here = slice(int(of_queries[at]), int(of_queries[at + 1]))
            there = slice(int(of_keys[at]), int(of_keys[at + 1]))
            q, k, v = (t.transpose(0, 1) for t in (query[here], key[there], value[there]))
            group = len(q) // len(k)
            k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
            scores = scored(q, k, causal and not wrong, from_the_end=True)
            outputs.append((weighted(scores) @ v).transpose(0, 1))
        return torch.cat(outputs)

    return varlen


# --- scores


def distances(wrong, slopes, query_len, key_len):
    """ALiBi, counted from where the last query stands at the last key; wrong: from the first."""
    begins = 0 if wrong else key_len - query_len
    behind = torch.arange(query_len)[:, None] + begins - torch.arange(key_len)
    return slopes[:, None, None] * behind.abs()


def alibi_as_keyword(wrong):
    """Dao-AILab/flash-attention#907: two kernels count the distance from different corners."""

    def flash_attention(q, k, v, causal=False, softmax_scale=None, alibi_slopes=None):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        scores = q @ k.mT * scale
        if alibi_slopes is not None:
            scores = scores - distances(wrong, alibi_slopes, *scores.shape[-2:])
        if causal:
            hidden = ~kept(*scores.shape[-2:], from_the_end=True)
            scores = scores.masked_fill(hidden, -math.inf)
        return (weighted(scores) @ v).transpose(1, 2)

    return flash_attention


def slopes_of(heads):
    return 2.0 ** -torch.arange(1, heads + 1)


def alibi_of_its_own(wrong):
    """The same with slopes that the function knows."""
    attend = alibi_as_keyword(wrong)

    def flash_attention(q, k, v, causal=False):
        return attend(q, k, v, causal, alibi_slopes=slopes_of(q.shape[2]).to(q.dtype))

    return flash_attention


def softcap_as_keyword(wrong):
    """sgl-project/sgl-kernel-xpu#491: softcap is taken, and dropped."""

    def flash_attention(q, k, v, causal=False, softcap=0.0):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        scores = scored(q, k)
        if softcap and not wrong:
            scores = softcap * torch.tanh(scores / softcap)
        if causal:
            hidden = ~kept(*scores.shape[-2:], from_the_end=True)
            scores = scores.masked_fill(hidden, -math.inf)
        return (weighted(scores) @ v).transpose(1, 2)

    return flash_attention


def softcap_of_its_own(wrong):
    """The same with a number that is always used."""
    attend = softcap_as_keyword(wrong)

    def flash_attention(q, k, v, causal=False):
        return attend(q, k, v, causal, softcap=2.0)

    return flash_attention


def products_in_float16(wrong):
    """mlc-ai/mlc-llm#1870: products overflow before they are scaled."""

    def attention(query, key, value, is_causal=False):
        dtype = query.dtype
        wide = torch.promote_types(dtype, torch.float32)
        if wrong and dtype == torch.float16:
            scores = scored(query, key, is_causal).to(wide)
        else:
            scores = scored(query.to(wide), key.to(wide), is_causal)
        return (scores.softmax(-1) @ value.to(wide)).to(dtype)

    return attention


def summed_after_dropout(wrong):
    """aws-neuron/nki-samples#80: what is kept is divided by its own sum."""

    def attention(query, key, value, dropout_p=0.0, is_causal=False):
        scores = scored(query, key, is_causal)
        powers = (scores - scores.amax(-1, keepdim=True)).exp()
        left = dropout(powers, dropout_p)
        return (left / (left if wrong else powers).sum(-1, keepdim=True)) @ value

    return attention


REPORTS = {
    "a backward pass that forgets the mask": Reported(forgetful_backward, ("pairs",)),
    "gradients of grouped heads": Reported(folded_wrongly, ("pairs",)),
    "few queries of many keys": Reported(other_kernel_for_few_queries, ("pairs",)),
    "groups of three": Reported(groups_of_powers_of_two, ("grouped", "pairs")),
    "the last block": Reported(last_block_read_whole, ("plain", "block_lengths", "gradients")),
    "another base": Reported(merged_in_another_base, ("plain",), dtypes=("float32", "float64")),
    "pages": Reported(
        lambda wrong: through_pages(paged(wrong)),
        ("block_lengths",),
        {"causal": "bottom_right", "window": (WINDOW - 1, 0), "grouped": True},
        dtypes=("float32", "bfloat16"),  # it takes long
    ),
    "a mask of floats": Reported(
        mask_read_as_booleans,
        ("float_mask", "masked"),
        {"mask": "additive", "mask_argument": "attention_mask"},
    ),
    "a stale mask": Reported(stale_mask, ("pairs",)),
    "packed sequences": Reported(
        lambda wrong: packed(packed_without_causality(wrong)),
        ("causal", "causal_rectangular", "no_leakage"),
        {"layout": "blhd", "causal": "bottom_right", "grouped": True},
    ),
    "slopes": Reported(alibi_as_keyword, ("alibi",), FLASH),
    "its own slopes": Reported(alibi_of_its_own, ("plain",), {**FLASH, "alibi": slopes_of}),
    "softcap": Reported(softcap_as_keyword, ("softcap",), FLASH),
    "its own softcap": Reported(softcap_of_its_own, ("plain",), {**FLASH, "softcap": 2.0}),
    "overflow": Reported(products_in_float16, ("pairs",), wrong_in=("float16",)),
    "dropout": Reported(summed_after_dropout, ("dropout",)),
}


def spec_of(reported, wrong, dtypes):
    return AttentionSpec(reported.make(wrong), dtypes=dtypes, **reported.declared)


@pytest.mark.matrix(of=2)
@pytest.mark.parametrize("name", REPORTS)
def test_what_was_reported_is_found(name):
    reported = REPORTS[name]
    rows = [BY_NAME[row] for row in reported.rows]
    report = check_attention(spec_of(reported, True, reported.wrong_in), checks=rows)
    assert {result.name for result in report.failed} == set(reported.rows)


@pytest.mark.matrix(of=2)
@pytest.mark.parametrize("name", REPORTS)
def test_what_was_mended_is_left_alone(name):
    """Each in one dtype, all of them in turn: right code of one kind is asked in four elsewhere."""
    reported = REPORTS[name]
    turn = list(REPORTS).index(name) % len(reported.dtypes)
    report = check_attention(spec_of(reported, False, reported.dtypes[turn : turn + 1]))
    assert report.passed, str(report)
    asked = {result.name for result in report.results if result.status == "passed"}
    assert {*reported.rows, "pairs"} <= asked


# --- code that answers a benchmark, and does not compute (meta-pytorch/BackendBench#41,
# gpu-mode/pygpubench#7)


def kept_by_shape():
    known = {}

    def attention(query, key, value, is_causal=False):
        name = query.shape, key.shape, value.shape, query.dtype, is_causal
        if name not in known:
            known[name] = sdpa(query, key, value, is_causal=is_causal)
        return known[name]

    return attention


def kept_by_place():
    known = {}

    def attention(query, key, value, is_causal=False):
        places = query.data_ptr(), key.data_ptr(), value.data_ptr()
        name = *places, query.shape, key.shape, query.dtype, is_causal
        if name not in known:
            known[name] = sdpa(query, key, value, is_causal=is_causal)
        return known[name]

    return attention


def mean_of_values():
    def attention(query, key, value, is_causal=False):
        return value.mean(-2, keepdim=True).expand(*query.shape[:-1], value.shape[-1])

    return attention


def of_one_shape():
    def attention(query, key, value, is_causal=False):
        if query.shape[-1] == 64 and query.shape[-2] % 128 == 0:
            return sdpa(query, key, value, is_causal=is_causal)
        return torch.zeros(*query.shape[:-1], value.shape[-1], dtype=query.dtype)

    return attention


def of_first_keys():
    def attention(query, key, value, is_causal=False):
        return sdpa(query, key[:, :, :512], value[:, :, :512], is_causal=is_causal)

    return attention


def one_memory_for_all():
    memory = {}

    def attention(query, key, value, is_causal=False):
        output = sdpa(query, key, value, is_causal=is_causal)
        kept_output = memory.setdefault((output.shape, output.dtype), torch.empty_like(output))
        with torch.no_grad():
            return kept_output.copy_(output)

    return attention


CHEATS = {
    kept_by_shape: "large_scores",
    kept_by_place: "layout",
    mean_of_values: "plain",
    of_one_shape: "plain",
    of_first_keys: "block_lengths",
    one_memory_for_all: "gradients",
}


@pytest.mark.parametrize("make", CHEATS, ids=lambda make: make.__name__)
def test_what_does_not_compute_is_found(make):
    rows = [BY_NAME[row] for row in dict.fromkeys(["shape_and_dtype", "plain", CHEATS[make]])]
    report = check_attention(AttentionSpec(make(), dtypes=("float32",)), checks=rows)
    assert [result.name for result in report.failed] == [CHEATS[make]]
