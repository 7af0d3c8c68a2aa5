"""What the assertions for engines that promise the same bits accept, find and say."""

import math

import pytest
import torch
from attention_subjects import DTYPES, qkv, randn
from torch import nn

from pytest_attnheat import (
    AttentionSpec,
    Failure,
    SequenceModel,
    assert_batch_independent,
    assert_decode_matches_prefill,
)
from pytest_attnheat.assertions.behaviour.bitwise import differing_bits, units_apart

HALVES = [torch.float16, torch.bfloat16]


def ordered_sum(terms, dim, *, backwards=False):
    """Add up one by one, so that the order of the sum is that of the terms, whatever the shape."""
    parts = terms.unbind(dim)
    total = torch.zeros_like(parts[0])
    for part in reversed(parts) if backwards else parts:
        total = total + part
    return total


def invariant(query, key, value, attn_mask=None, is_causal=False, backwards=False):
    """Attention in which the sum of a query is the same whatever else is computed beside it."""
    products = query.unsqueeze(-2) * key.unsqueeze(-3)
    scores = ordered_sum(products, -1) / math.sqrt(query.shape[-1])
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    weights = weights / ordered_sum(weights, -1, backwards=backwards).unsqueeze(-1)
    terms = weights.unsqueeze(-1) * value.unsqueeze(-3)
    return ordered_sum(terms, -2, backwards=backwards)


def alone_in_another_order(query, key, value, **options):
    """A batch of one is given to another kernel, which adds up from the other end."""
    return invariant(query, key, value, backwards=query.shape[0] == 1, **options)


def one_query_in_another_order(query, key, value, **options):
    """One query, as in decoding, is given to another kernel."""
    return invariant(query, key, value, backwards=query.shape[-2] == 1, **options)


def failure_of(assertion, *given, **options):
    with pytest.raises(Failure) as caught:
        assertion(*given, **options)
    return caught.value


# --- how far numbers are apart


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
def test_units_in_the_last_place_are_counted_as_steps_to_the_next_number(dtype):
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps
    pairs = [
        (1.0, 1.0, 0), (1.0, 1 + info.eps, 1), (1.0, 1 - info.eps / 2, 1), (1.0, 2.0, 1 / info.eps),
        (-1.0, -1 - info.eps, 1), (0.0, smallest, 1), (-smallest, smallest, 2), (0.0, -0.0, 0),
        (info.max, math.inf, 1), (math.inf, math.inf, 0), (math.nan, math.nan, 0),
        (math.nan, 1.0, math.inf), (math.inf, math.nan, math.inf),
    ]  # fmt: skip
    a, b, wanted = (
        torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True)
    )
    a, b = a.to(dtype), b.to(dtype)
    assert units_apart(a, b).equal(wanted)
    assert units_apart(b, a).equal(wanted)
    expected = (wanted != 0) | ((a == 0) & (b == 0))  # of zeros, the sign is another bit
    assert differing_bits(a, b).equal(expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
def test_steps_are_those_of_nextafter(dtype):
    start = randn(64).to(dtype)
    there = start
    for _ in range(5):
        there = torch.nextafter(there, torch.full_like(there, math.inf))
    assert units_apart(start, there).eq(5).all()


def test_the_widest_distance_of_float64_is_no_overflow():
    a, b = torch.tensor([math.inf]).double(), torch.tensor([-math.inf]).double()
    assert float(units_apart(a, b)) == 2 * (0x7FF << 52)


def test_nan_is_nan_whatever_its_bits():
    quiet = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert not differing_bits(quiet[:1], quiet[1:]).any()


# --- the batch


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_invariant_function_passes(dtype):
    inputs = qkv(batch=3, dtype=dtype)
    assert_batch_independent(invariant, *inputs, exact=True)
    assert_decode_matches_prefill(invariant, *inputs, exact=True, is_causal=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_another_order_for_a_batch_of_one_is_right_to_rounding_but_not_the_same(dtype):
    inputs = qkv(batch=3, key_len=32, dtype=dtype)
    assert_batch_independent(alone_in_another_order, *inputs)
    found = failure_of(assert_batch_independent, alone_in_another_order, *inputs, exact=True)
    batch = alone_in_another_order(*inputs)
    alone = torch.cat([alone_in_another_order(*(t[i : i + 1] for t in inputs)) for i in range(3)])
    differs = batch != alone
    assert found.broken == int(differs.sum()) > 0
    assert found.of == batch.numel()
    assert found.tolerance == 0.0
    assert "not bitwise the same, though right to rounding: " in found.claim
    index = found.worst.index
    assert units_apart(batch, alone)[index] == units_apart(batch, alone).max()
    assert f"{int(units_apart(batch, alone).max())} unit" in found.worst.text
    assert str(dtype).removeprefix("torch.") in found.worst.text
    assert "as alone, in samples 0, 1, 2" in found.claim
    assert found.cause.startswith("the bits of sample ")
    assert "with the size of the batch alone" in found.cause


def test_an_order_that_follows_the_place_in_the_batch_is_named():
    def by_place(query, key, value):
        pairs = [invariant(query, key, value, backwards=back) for back in (False, True)]
        even = (torch.arange(len(query)) % 2 == 0).view(-1, *[1] * (query.ndim - 1))
        return torch.where(even, *pairs)

    found = failure_of(assert_batch_independent, by_place, *qkv(batch=4, key_len=32), exact=True)
    assert "with its place in a batch of the same size" in found.cause


@pytest.mark.parametrize("place", [0, 2, 3])
def test_one_place_of_the_batch_that_goes_another_way_is_told_from_its_size(place):
    def one_apart(query, key, value):
        there = (torch.arange(len(query)) == min(place, len(query) - 1)).view(-1, 1, 1, 1)
        pairs = [invariant(query, key, value, backwards=back) for back in (True, False)]
        return torch.where(there, *pairs)

    found = failure_of(assert_batch_independent, one_apart, *qkv(batch=4, key_len=32), exact=True)
    assert "with its place in a batch of the same size" in found.cause


def test_bits_that_follow_several_samples_together_are_told_from_the_size_of_the_batch():
    def by_largest(query, key, value):
        return invariant(query, key, value, backwards=bool(query.max() > 10))

    query, key, value = qkv(batch=4, key_len=32)
    query[:2, ..., 0] = 11
    found = failure_of(assert_batch_independent, by_largest, query, key, value, exact=True)
    assert "change with the other samples together, and with none of them alone" in found.cause


def test_bits_that_follow_another_sample_name_it():
    def with_scale(query, key, value):
        shift = value[0].mean()  # cancels, but for rounding
        return invariant(query, key, value + shift) - shift

    found = failure_of(assert_batch_independent, with_scale, *qkv(batch=3, key_len=16), exact=True)
    assert "though right to rounding" in found.claim
    assert "change with the first sample, whichever that is: a scale or" in found.cause


@pytest.mark.parametrize("size", [4, 6, 12, 16])
def test_a_kernel_of_one_other_size_is_found(size):
    def of_size(query, key, value):
        return invariant(query, key, value, backwards=len(query) == size)

    inputs = qkv(batch=3, key_len=32) if size != 12 else qkv(batch=6, key_len=32)
    found = failure_of(assert_batch_independent, of_size, *inputs, exact=True)
    assert f"padded to {size} samples" in found.claim


def test_two_halves_are_compared():
    def of_two(query, key, value):
        return invariant(query, key, value, backwards=len(query) == 2)

    found = failure_of(assert_batch_independent, of_two, *qkv(batch=4, key_len=32), exact=True)
    assert "in two halves" in found.claim


def test_calls_that_differ_in_their_last_bits_are_named():
    calls = []

    def restless(query, key, value):
        calls.append(None)
        return invariant(query, key, value, backwards=len(calls) % 2 == 0)

    inputs = qkv(batch=2, key_len=32, dtype=torch.float64)
    found = failure_of(assert_batch_independent, restless, *inputs, exact=True)
    assert "though right to rounding" in found.claim
    assert "two calls with the same input differ" in found.cause


def test_what_is_wrong_is_told_as_wrong_and_before_what_is_rounding():
    def mixing(query, key, value):
        rest = 0.01 * value.mean(0, keepdim=True) if len(query) > 4 else 0.0
        return alone_in_another_order(query, key, value) + rest

    found = failure_of(assert_batch_independent, mixing, *qkv(batch=3, key_len=6), exact=True)
    assert "rows that differ are off by more than rounding: rows change when" in found.claim
    assert "padded to 6 samples" in found.claim


def test_the_sign_of_zero_is_said():
    def signed(query, key, value):
        return invariant(query, key, value).mul(0.0).abs() * (-1 if len(query) == 1 else 1)

    found = failure_of(assert_batch_independent, signed, *qkv(batch=2), exact=True)
    assert "equal but for the signs of zeros" in found.claim
    assert "is 0 here, -0 there, 0 units in the last place apart" in found.worst.text
    assert_batch_independent(signed, *qkv(batch=2))


def test_nan_in_the_same_places_is_the_same_and_elsewhere_is_not():
    def with_nan(query, key, value, only_alone=False):
        output = invariant(query, key, value)
        output[..., 0, 0] = math.nan if len(query) == 1 or not only_alone else 1.0
        output[..., 1, 0] = -math.inf
        return output

    assert_batch_independent(with_nan, *qkv(batch=2), exact=True)
    found = failure_of(
        assert_batch_independent, with_nan, *qkv(batch=2), exact=True, only_alone=True
    )
    assert "off by more than rounding" in found.claim
    assert "as far apart as NaN is from a number" in found.worst.text
    assert found.broken == 2 * 3  # one for each head


def test_rounding_beside_the_same_infinity_is_rounding():
    def beside(query, key, value):
        output = alone_in_another_order(query, key, value)
        output[..., 0] = math.inf
        return output

    found = failure_of(assert_batch_independent, beside, *qkv(batch=2, key_len=32), exact=True)
    assert "though right to rounding" in found.claim


def test_another_dtype_of_the_output_is_said():
    def widening(query, key, value):
        output = invariant(query, key, value)
        return output.double() if len(query) == 5 else output

    found = failure_of(assert_batch_independent, widening, *qkv(batch=4), exact=True)
    assert "the output is float64 in one call, float32 in another" in found.claim


def test_an_output_that_is_a_view_is_compared():
    def transposed(query, key, value):
        return invariant(query, key, value).mT.contiguous().mT

    assert_batch_independent(transposed, *qkv(batch=2), exact=True)


def test_outputs_of_one_byte_are_compared():
    def narrow(query, key, value, wrong=False):
        output = invariant(query, key, value) * (1.1 if wrong and len(query) == 1 else 1)
        return output.to(torch.float8_e4m3fn)

    assert_batch_independent(narrow, *qkv(batch=2), exact=True)
    found = failure_of(assert_batch_independent, narrow, *qkv(batch=2), exact=True, wrong=True)
    assert "2 units in the last place apart (float8_e4m3fn" in found.worst.text


def test_nothing_to_compare_is_refused():
    everything = torch.zeros(6, 6, dtype=torch.bool)
    with pytest.raises(ValueError, match="no row of the output is left to compare"):
        assert_batch_independent(invariant, *qkv(batch=2), attn_mask=everything, exact=True)


def test_a_specification_is_held_to_its_bits():
    def blhd(query, key, value):
        swapped = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return alone_in_another_order(*swapped).transpose(1, 2)

    spec = AttentionSpec(blhd, layout="blhd")
    assert_batch_independent(spec, *qkv(batch=2, key_len=32))
    found = failure_of(assert_batch_independent, spec, *qkv(batch=2, key_len=32), exact=True)
    assert "though right to rounding" in found.claim


class Model(nn.Module):
    """One causal layer of invariant attention, with a cache of what came before."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, states, cache=None):
        seen = states if cache is None else torch.cat([cache, states], 1)
        hidden = torch.ones(states.shape[1], seen.shape[1], dtype=torch.bool)
        mask = hidden.tril(seen.shape[1] - states.shape[1])
        return self.function(states, seen, seen, attn_mask=mask), seen


def test_models_are_held_to_their_bits():
    states = randn(3, 12, 8)
    right = SequenceModel(Model(invariant), decode=Model(invariant))
    assert_batch_independent(right, states, exact=True)
    assert_decode_matches_prefill(right, states, exact=True)
    wrong = SequenceModel(Model(alone_in_another_order))
    assert (
        "right to rounding" in failure_of(assert_batch_independent, wrong, states, exact=True).claim
    )
    one = Model(one_query_in_another_order)
    found = failure_of(
        assert_decode_matches_prefill, SequenceModel(one, decode=one), states, exact=True
    )
    assert "though right to rounding: outputs decoded" in found.claim


class Padded(nn.Module):
    """What it leaves in padding follows the size of the batch."""

    def forward(self, states, mask=None, wrong=0.0):
        return torch.where(mask.unsqueeze(-1), states + wrong * len(states), float(len(states)))


def test_padding_of_a_model_is_not_judged():
    model = SequenceModel(Padded(), mask="keep", mask_argument="mask")
    assert_batch_independent(model, randn(3, 6, 16), lengths=[6, 2, 4], exact=True)
    found = failure_of(
        assert_batch_independent, model, randn(3, 6, 16), lengths=[6, 2, 4], exact=True, wrong=1e-7
    )
    assert found.of == 12 * 16


# --- decoding


def test_a_single_query_of_another_kernel_is_named_by_its_chunks():
    inputs = qkv(batch=2, query_len=16, key_len=16)
    assert_decode_matches_prefill(one_query_in_another_order, *inputs, is_causal=True)
    found = failure_of(
        assert_decode_matches_prefill,
        one_query_in_another_order,
        *inputs,
        is_causal=True,
        exact=True,
        chunks=[5, 1, 1, 1, 8],
    )
    assert (
        "not bitwise the same, though right to rounding: outputs decoded in chunks" in found.claim
    )
    assert "chunks of 1 differ in their bits, chunks of 5, 8 do not" in found.cause
    assert "decoded alone" in found.worst.text


def test_a_wrong_chunk_is_told_with_its_cause():
    def top_left(query, key, value, is_causal=False, attn_mask=None):
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
        return invariant(query, key, value, attn_mask=mask)

    found = failure_of(
        assert_decode_matches_prefill,
        top_left,
        *qkv(batch=2),
        is_causal=True,
        alignment="bottom_right",
        exact=True,
    )
    assert "off by more than rounding" in found.claim
    assert "top left" in found.cause


def test_bits_are_compared_on_an_accelerator(accelerator):
    inputs = [tensor.to(accelerator) for tensor in qkv(batch=2, key_len=32)]
    assert_batch_independent(invariant, *inputs, exact=True)
    found = failure_of(assert_batch_independent, alone_in_another_order, *inputs, exact=True)
    assert "with the size of the batch alone" in found.cause
