"""A kernel at lengths where no whole map can be held: some rows, beside float64 of these alone."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from pytest_attnheat import (
    AttentionSpec,
    Failure,
    assert_gradients_match,
    assert_matches_reference,
    check_attention,
)
from pytest_attnheat.assertions.precision_rows import Runs, chosen_rows, of_rows
from pytest_attnheat.attention.call import Call
from pytest_attnheat.attention.computation import reference
from pytest_attnheat.attention.scoring import draw
from pytest_attnheat.contract import long_calls

KEYS = 2**16 + 100


def three(queries=24, keys=KEYS, heads=1, width=32, dtype=torch.float32):
    shapes = ("query", queries), ("key", keys), ("value", keys)
    return [draw(name, 5, 1, heads, length, width).to(dtype) for name, length in shapes]


def plain(query, key, value, mask=None):
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    scores = scores if mask is None else scores.masked_fill(~mask, -math.inf)
    return scores.softmax(-1) @ value


def of_first(count):
    return lambda q, k, v: plain(q, k[..., :count, :], v[..., :count, :])


def wrapping(bits):
    """Offsets of so many bits: what is beyond is read from the front."""

    def attention(query, key, value):
        at = torch.arange(key.shape[-2]) % (1 << bits)
        return plain(query, key[..., at, :], value[..., at, :])

    return attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_right_kernel_passes_at_a_length_that_no_map_can_be_held_of(dtype):
    assert_matches_reference(sdpa, *three(dtype=dtype, width=16), rows=12)


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("attention", "cause"),
    [
        (of_first(2**16), "keys 65536..65635 of 65636 get no weight .*: a tail that is lost"),
        (of_first(KEYS - 1), "key 65635 of 65636 gets no weight .*: a tail that is lost"),
        (of_first(KEYS // 128 * 128), "keys 65536..65635 of 65636 .* cut at 65536"),
        (wrapping(16), r"keys 65536..65635 .*offsets that wrap at 65536 \(2\^16\)\?"),
        (wrapping(15), r"keys 32768..65635 .*offsets that wrap at 32768 \(2\^15\)\?"),
    ],
    ids=["tail", "one", "block", "16 bits", "15 bits"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keys_that_are_lost_or_read_twice_are_named(attention, cause, dtype):
    with pytest.raises(Failure, match=f"weights of runs of keys(.|\n)*{cause}"):
        assert_matches_reference(attention, *three(24, dtype=dtype), rows=8, gradients=False)


def without(*spans):
    """Attention in float32 that leaves out some keys in the middle."""

    def attention(query, key, value):
        hidden = torch.zeros(key.shape[-2], dtype=torch.bool)
        for start, stop in spans:
            hidden[start:stop] = True
        own = plain(query.float(), key.float(), value.float(), ~hidden)
        return own.to(value.dtype)

    return attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("spans", "said"),
    [
        ([(7001, 7002)], "key 7001 of 9973"),
        ([(2048, 2112), (6000, 6064)], "keys 2048..2111, 6000..6063 of 9973"),
    ],
)
def test_keys_in_the_middle_that_are_skipped_are_named_one_by_one(spans, said, dtype):
    given = three(24, 9973, dtype=dtype)
    with pytest.raises(Failure, match=f"{said} gets? no weight from any of these rows: (are|is)"):
        assert_matches_reference(without(*spans), *given, rows=8, gradients=False)


@pytest.mark.parametrize("queries", [1, 16])
def test_keys_are_counted_of_a_call_that_has_no_more_queries_than_rows_are_judged(queries):
    for dtype, lost in ((torch.bfloat16, (9972, 9973)), (torch.float32, (6000, 6010))):
        query, key, value = three(queries, 9973, heads=2, dtype=dtype)
        assert_matches_reference(without(), query, key, value, rows=64)
        said = Runs((lost,), 9973).name(0)
        with pytest.raises(Failure, match=f"cause +{said} of 9973 gets? no weight"):
            assert_matches_reference(without(lost), query, key, value, rows=64, gradients=False)


@pytest.mark.parametrize(
    ("queries", "width", "dtype"), [(1, 12, torch.float32), (16, 32, torch.bfloat16)]
)
def test_a_key_is_named_where_only_an_element_that_it_makes_is_off(queries, width, dtype):
    given = three(queries, 2**15 + 7, width=width, dtype=dtype)
    assert_matches_reference(without(), *given, rows=64)
    with pytest.raises(Failure, match="key 20001 of 32775 gets no weight"):
        assert_matches_reference(without((20001, 20002)), *given, rows=64)


def test_the_gradient_of_a_mask_is_judged_where_all_rows_are():
    mask = torch.zeros(5, 40, requires_grad=True)

    def attention(query, key, value, attn_mask):
        return sdpa(query, key, value, attn_mask + 1e-3 * (attn_mask - attn_mask.detach()))

    with pytest.raises(Failure, match=r"gradient of attn_mask(.|\n)*rows=9, seed=0"):
        assert_matches_reference(attention, *three(5, 40), attn_mask=mask, rows=9)


@pytest.mark.parametrize("width", [8, 12])
def test_keys_that_are_lost_are_named_to_the_first_and_the_last(width):
    keys, lost = 2**17 - 27, (90000, 90063)
    read = torch.ones(keys, dtype=torch.float64)
    read[slice(*lost)] = 0

    def count(runs):
        exact = runs.value(torch.zeros(1, keys, width, dtype=torch.float64)).sum(1, keepdim=True)
        found = runs.value(torch.zeros(1, keys, width, dtype=torch.float64)).mT @ read[:, None]
        broken = found.mT != exact
        return SimpleNamespace(exact=exact, found=found.mT, broken=broken, allowed=exact * 1e-9)

    assert "keys 90000..90062 of 131045 get no weight" in Runs.of(keys, width).lost(count)


@pytest.mark.parametrize("width", [12, 64])
def test_a_single_key_is_found_in_half_precision_whatever_the_width(width):
    given = three(48, 9973, width=width, dtype=torch.bfloat16)
    with pytest.raises(Failure, match="key 3324 of 9973 gets no weight"):
        assert_matches_reference(without((3324, 3325)), *given, rows=32, gradients=False)


def test_right_kernels_in_half_precision_are_not_accused_of_a_key():
    for seed in range(4):
        query, key, value = (draw(name, seed, 1, 2, 5000, 16).bfloat16()
                             for name in ("query", "key", "value"))  # fmt: skip
        for attention in (sdpa, without()):
            assert_matches_reference(
                attention, query[..., :20, :], key, value, rows=8, seed=seed, gradients=False
            )


def test_a_window_that_is_wrong_where_rows_are_many_is_found():
    length, left = 600, 40

    at = torch.arange(length)[:, None] - torch.arange(length)
    later = torch.arange(length)[:, None] >= 512

    def attention(wide):
        return lambda q, k, v, is_causal: plain(q, k, v, (at >= 0) & (at <= wide))

    given = three(length, length)
    options = {"is_causal": True, "window": (left, 0), "rows": 24}
    right, wrong = attention(left), attention(left + later)
    assert_matches_reference(right, *given, **options)
    with pytest.raises(Failure, match=r"rows that may not see them|is off|not those of attention"):
        assert_matches_reference(wrong, *given, **options)


class Grads(torch.autograd.Function):
    """Right forward; a backward that leaves out the last keys, or writes rows that have none."""

    @staticmethod
    def forward(ctx, query, key, value, wrong):
        ctx.save_for_backward(query, key, value)
        ctx.wrong = wrong
        return plain(query, key, value)

    @staticmethod
    def backward(ctx, above):
        leaves = [t.detach().requires_grad_() for t in ctx.saved_tensors]
        with torch.enable_grad():
            slopes = list(torch.autograd.grad(plain(*leaves), leaves, above))
        if ctx.wrong == "tail":
            slopes[1][..., -4:, :] = 0
        if ctx.wrong == "rows":
            slopes[0][..., 7, :] += 1e-3
        if ctx.wrong == "query":
            slopes[0][..., -1, :] *= 1.01
        if ctx.wrong == "tail of query":
            leaves[1:] = [leaf.detach()[..., :-4, :].requires_grad_() for leaf in leaves[1:]]
            with torch.enable_grad():
                slopes[0] = torch.autograd.grad(plain(*leaves), leaves[0], above)[0]
        return (*slopes, None)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("tail", r"elements of the gradient of key(.|\n)*key.grad\[0, 0, 509[6-9]"),
        ("rows", r"gradient of query are not zero(.|\n)*query.grad\[0, 0, 7, 0\]"),
        ("query", r"elements of the gradient of query(.|\n)*query.grad\[0, 0, 23, "),
        ("tail of query", r"elements of the gradient of query(.|\n)*values that count"),
    ],
)
def test_gradients_of_chosen_rows_and_of_all_keys_are_judged(wrong, said):
    given = three(24, 5100)
    for check in (assert_matches_reference, assert_gradients_match):
        with pytest.raises(Failure, match=said):
            check(lambda q, k, v: Grads.apply(q, k, v, wrong), *given, rows=8)


def test_nan_in_a_row_that_was_not_chosen_is_found():
    def attention(query, key, value):
        found = plain(query, key, value).clone()
        found[..., 7, 3] = math.nan
        return found

    with pytest.raises(Failure, match=r"NaN or infinite, in rows that were not(.|\n)*\[0, 0, 7, 3"):
        assert_matches_reference(attention, *three(24, 500), rows=4, gradients=False)


def test_rows_of_a_call_are_those_of_the_whole_call():
    given = three(60, 90, heads=2, width=4, dtype=torch.float64)
    call = Call(
        *given, causal=True, alignment="bottom_right", window=(30, 0), sink_keys=2, softcap=3.0,
        alibi=torch.tensor([0.3, 0.1], dtype=torch.float64),
        bias=draw("bias", 1, 60, 90), mask=draw("mask", 1, 1, 2, 60, 90) > -1,
        score_mod=lambda score, batch, head, query, key: score + 0.01 * query,
        sinks=torch.tensor([0.3, 1.0], dtype=torch.float64),
    )  # fmt: skip
    rows = [0, 3, 31, 59]
    torch.testing.assert_close(
        reference(of_rows(call, rows)).exact["output"],
        reference(call).exact["output"][..., rows, :],
    )


def test_the_rows_that_are_chosen_are_where_kernels_go_wrong():
    rows = chosen_rows(131072, 131072, 64, 0)
    assert len(rows) == len(set(rows)) == 64
    assert {0, 131071, 32767, 32768, 65535, 65536, 63, 64, 127, 128} <= set(rows)
    assert chosen_rows(131072, 131072, 64, 0) != chosen_rows(131072, 131072, 64, 1)
    assert chosen_rows(5, 9, 8, 0) == [0, 1, 2, 3, 4]


LENGTHS = [(131072, 64), (131101, 16), (5, 64), (300, 2), (9, 4)]


@pytest.mark.parametrize(("key_len", "width"), LENGTHS)
def test_runs_of_keys_cover_all_keys_and_are_no_more_than_the_channels(key_len, width):
    spans = Runs.of(key_len, width).spans
    assert [key for start, stop in spans for key in range(start, stop)] == [*range(key_len)]
    assert len(spans) <= min(width, key_len)


# --- in the examination


def reads_past_the_end(query, key, value, *, scale=None):
    """One key too many, as by `<=` in the loop over keys."""
    many = key.shape[-2] + 1
    longer = key.as_strided((*key.shape[:-2], many, key.shape[-1]), key.stride())
    scores = query @ longer.mT / math.sqrt(query.shape[-1])
    return scores.softmax(-1)[..., :-1] @ value


def examined(subject, **declared):
    spec = AttentionSpec(subject, dtypes=("float32",), devices=("cpu",), **declared)
    report = check_attention(spec, checks=[long_calls.LONG])
    return report.results[0]


@pytest.fixture
def shorter(monkeypatch):
    monkeypatch.setattr(long_calls, "LONGEST", 3001)
    monkeypatch.setattr(long_calls, "_ROWS", 8)


@pytest.mark.usefixtures("shorter")
def test_the_examination_makes_a_long_call_if_it_is_told():
    report = check_attention(
        AttentionSpec(sdpa, dtypes=("float32",), devices=("cpu",)), quick=True, long=True
    )
    assert report.passed
    assert "long: 8 of 256 queries were judged, of 3001 keys" in str(report)


@pytest.mark.usefixtures("shorter")
def test_a_read_past_the_end_shows_as_nan_lies_there():
    result = examined(reads_past_the_end, causal=None)
    assert result.status == "failed"
    assert "what lies before and after query, key and value in memory is NaN" in result.message
    assert "check_attention(..., long=True, seed=0)" in result.message


@pytest.mark.usefixtures("shorter")
def test_keys_that_a_long_call_loses_are_named():
    result = examined(of_first(2900), causal=None)
    assert "get no weight from any of these rows" in result.message


def test_a_long_call_is_as_long_as_memory_allows():
    sizes = partial(long_calls.sizes_for, longest=None, width=128)
    assert sizes(24 * 10**9, square=False) == (256, 131045)
    queries, keys = sizes(24 * 10**9, square=True)
    assert queries == keys < 20_000
    assert sizes(4 * 10**9, square=False)[1] < sizes(8 * 10**9, square=False)[1]
    assert long_calls.sizes_for(24 * 10**9, square=False, longest=2048, width=8) == (256, 2048)


def test_a_long_call_is_one_of_a_function():
    block = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    with pytest.raises(ValueError, match="long: got True; accepted is False for a block"):
        check_attention(AttentionSpec(block, inputs=torch.randn(2, 5, 8)), long=True)
