"""What the assertion about merging partial states of attention accepts, finds and says."""

import functools
import math

import pytest
import torch
from torch import nn

from pytest_attnheat import AttentionSpec, Failure, assert_merges
from pytest_attnheat.assertions.behaviour.merge_calls import Merge, form_of
from pytest_attnheat.assertions.behaviour.merge_parts import PROBLEMS, Maker, drawn
from pytest_attnheat.assertions.behaviour.merge_states import exactly

DTYPES = ("float64", "float32", "float16", "bfloat16")
LN2 = math.log(2.0)


def failure_of(merge, *given, dtypes="float32", **options):
    with pytest.raises(Failure) as caught:
        assert_merges(merge, *given, dtypes=dtypes, **options)
    return caught.value


def passes(merge, *given, **options):
    assert_merges(merge, *given, dtypes="float32", **options)


# --- right merges, written in several ways


def stable(a, lse_a, b, lse_b):
    top = torch.maximum(lse_a, lse_b)
    top = torch.where(top.isinf(), torch.zeros_like(top), top)
    of_a, of_b = (lse_a - top).exp(), (lse_b - top).exp()
    total = of_a + of_b
    out = of_a[..., None] * a + of_b[..., None] * b
    return (out / total.clamp(min=1e-30)[..., None]).to(a.dtype), top + total.log()


def by_logaddexp(a, lse_a, b, lse_b):
    lse = torch.logaddexp(lse_a, lse_b)
    safe = lse.masked_fill(lse.isinf(), 0.0)
    out = (lse_a - safe).exp()[..., None] * a + (lse_b - safe).exp()[..., None] * b
    return out.to(a.dtype), lse


def by_sigmoid(a, lse_a, b, lse_b):
    of_b = torch.sigmoid(lse_b - lse_a).nan_to_num(nan=0.0)[..., None]
    return (a - of_b * (a - b)).to(a.dtype), torch.logaddexp(lse_a, lse_b)


def with_half_weights(a, lse_a, b, lse_b):
    weights = torch.stack([lse_a, lse_b]).softmax(0).nan_to_num(nan=0.0).to(a.dtype)
    return weights[0][..., None] * a + weights[1][..., None] * b, torch.logaddexp(lse_a, lse_b)


def widening(a, lse_a, b, lse_b):
    return stable(a.to(lse_a.dtype), lse_a, b, lse_b)


def output_alone(a, lse_a, b, lse_b):
    return stable(a, lse_a, b, lse_b)[0]


def of_all(outs, lses):
    weights = lses.softmax(0).nan_to_num(nan=0.0)[..., None]
    return (weights * outs).sum(0).to(outs.dtype), lses.logsumexp(0)


RIGHT = [stable, by_logaddexp, by_sigmoid, with_half_weights, widening, output_alone, of_all]


@pytest.mark.parametrize("merge", RIGHT, ids=lambda merge: merge.__name__)
def test_right_merges_pass_in_all_dtypes(merge):
    assert_merges(merge, dtypes=DTYPES)
    assert_merges(merge, dtypes="float16", seed=1)


def test_what_merges_are_compared_with_is_attention_over_all_keys():
    maker = Maker(None, 1.0, seed=0, device="cpu")
    for problem in PROBLEMS:
        if sum(problem.sizes):
            ((outs, lses),) = maker.states(problem, [torch.float64])
            call = drawn(problem, 0)
            group = call.query.shape[1] // call.key.shape[1]
            key, value = (one.repeat_interleave(group, 1) for one in (call.key, call.value))
            scores = call.query @ key.mT / math.sqrt(call.query.shape[-1])
            if call.mask is not None:
                scores = scores.masked_fill(~call.mask, -math.inf)
            out, lse = exactly(torch.stack(outs), torch.stack(lses))
            torch.testing.assert_close(lse, scores.logsumexp(-1))
            torch.testing.assert_close(out, scores.softmax(-1).nan_to_num(nan=0.0) @ value)


# --- functions of public packages, by their parameters: stand-ins with the same signatures


def merge_state(v_a, s_a, v_b, s_b):
    """(tokens, heads, width) and (tokens, heads), of base 2."""
    out, lse = stable(v_a, s_a * LN2, v_b, s_b * LN2)
    return out, lse / LN2


def merge_state_in_place(v, s, v_other, s_other, mask=None):
    out, lse = merge_state(v, s, v_other, s_other)
    v.copy_(out), s.copy_(lse)


def merge_states(v, s):
    """(tokens, parts, heads, width) and (tokens, parts, heads), of base 2."""
    weights = (s * LN2).softmax(1).nan_to_num(nan=0.0)[..., None]
    return (weights * v).sum(1).to(v.dtype), (s * LN2).logsumexp(1) / LN2


def merge_state_v2(v_a, s_a, v_b, s_b, v_merged=None, s_merged=None):
    return stable(v_a, s_a, v_b, s_b)


def merge_state_triton(prefix_output, prefix_lse, suffix_output, suffix_lse,
                       output=None, output_lse=None):  # fmt: skip
    return stable(prefix_output, prefix_lse, suffix_output, suffix_lse)


def merge_attn_states(output, prefix_output, prefix_lse, suffix_output, suffix_lse,
                      output_lse=None, prefill_tokens_with_context=None,
                      output_scale=None):  # fmt: skip
    """(tokens, heads, width) and (heads, tokens)."""
    out, lse = stable(prefix_output, prefix_lse.mT, suffix_output, suffix_lse.mT)
    output.copy_(out)
    if output_lse is not None:
        output_lse.copy_(lse.mT)


def flash_attn_combine(out_partial, lse_partial, out=None, out_dtype=None):
    """(parts, batch, tokens, heads, width) and (parts, batch, tokens, heads)."""
    assert lse_partial.stride(-2) == 1  # as the kernel asks
    return of_all(out_partial, lse_partial)


PUBLIC = [merge_state, merge_state_in_place, merge_states, merge_state_v2, merge_state_triton,
          merge_attn_states, flash_attn_combine]  # fmt: skip


@pytest.mark.parametrize("merge", PUBLIC, ids=lambda merge: merge.__name__)
def test_functions_of_public_packages_are_taken_as_they_are(merge):
    assert_merges(merge)


@pytest.mark.parametrize("merge", PUBLIC, ids=lambda merge: merge.__name__)
def test_each_is_called_with_the_shapes_that_it_has(merge):
    states = {3: (10, 4), 4: (10, 3, 4), 5: (3, 2, 5, 4)}
    seen = []

    form, said = form_of(merge, calling=None, layout=None, lse_layout=None, base=None)
    count = 3 if form.takes_all else 2
    outs, lses = torch.randn(count, 2, 4, 5, 8), torch.randn(count, 2, 4, 5)

    @functools.wraps(merge)
    def spied(*given, **options):
        seen.extend(one.shape for one in given)
        return merge(*given, **options)

    out, lse = Merge(spied, form)([*outs], [*lses])
    wanted = exactly(outs, lses * (LN2 if form.base == "2" else 1.0))[0]
    torch.testing.assert_close(out, wanted)
    assert lse is not None
    assert out.shape == (2, 4, 5, 8)
    first = seen[1] if form.calling == "output_first" else seen[0]
    assert tuple(first[:-1]) == states[len(first)]
    tokens = (4, 10) if merge is merge_attn_states else states[len(first)]
    assert tuple(seen[2 if form.calling == "output_first" else 1]) == tokens
    assert "merge is called as " in said


def test_an_output_that_is_not_written_is_found():
    def lazy(output, prefix_output, prefix_lse, suffix_output, suffix_lse, output_lse=None):
        output[:-1].copy_(
            stable(prefix_output, prefix_lse.mT, suffix_output, suffix_lse.mT)[0][:-1]
        )
        output_lse.copy_(torch.logaddexp(prefix_lse, suffix_lse))

    assert "is nan" in failure_of(lazy).worst.text


def test_layouts_and_bases_can_be_declared():
    def blhd(a, lse_a, b, lse_b):
        a, b = a.transpose(1, 2), b.transpose(1, 2)
        out, lse = stable(a, lse_a[..., 0] * LN2, b, lse_b[..., 0] * LN2)
        return out.transpose(1, 2), (lse / LN2)[..., None]

    passes(blhd, layout="blhd", lse_layout="bhl1", base="2")
    passes(lambda outs, lses: of_all(torch.stack(outs), torch.stack(lses)), calling="list")
    passes(lambda *all: of_all(*all), calling="stacked")
    passes(lambda *all: stable(*all), calling="pair")
    passes(merge_state_v2, calling="pair", layout="lhd", base="e")


def test_a_module_merges_too():
    class Merging(nn.Module):
        def forward(self, out_a, lse_a, out_b, lse_b):
            return stable(out_a, lse_a, out_b, lse_b)

    passes(Merging())


# --- refusals


@pytest.mark.parametrize(
    ("merge", "options", "words"),
    [
        (lambda v, s, v_other=None, s_other=None: None, {},
         "merge_state_in_place and of FlashInfer's merge_states"),
        (lambda a, b, c: None, {}, "merge: got a function of a, b, c; accepted is calling="),
        (lambda *states: None, {}, "merge: got a function of states; accepted is calling="),
        (stable, {"layout": "blhd"}, "lse_layout: got None for layout='blhd'"),
        (stable, {"layout": "bhl"}, "layout: got 'bhl'; accepted is each of l and d once"),
        (stable, {"layout": "nbhld", "calling": "pair"}, "layout: got 'nbhld'"),
        (of_all, {"layout": "bhld"}, "layout: got 'bhld'"),
        (stable, {"lse_layout": "lh"}, "lse_layout: got 'lh'"),
        (stable, {"lse_layout": "bhll"}, "lse_layout: got 'bhll'"),
        (stable, {"base": 2}, "base: got 2; accepted is one of 'e', '2'"),
        (stable, {"calling": "pairs"}, "calling: got 'pairs'"),
        (stable, {"dtypes": ()}, "dtypes: got (); accepted is one name at least"),
        (stable, {"dtypes": "float8"}, "dtypes: got 'float8'"),
        (stable, {"fully_masked": "uniform"}, "fully_masked: got 'uniform'"),
        (stable, {"device": "gpu"}, "device: got 'gpu'"),
        (stable, {"seed": -1}, "seed: got -1"),
        (lambda a, b, c, d: (a[..., :1], b), {}, "what merge returns: got shape"),
    ],
)  # fmt: skip
def test_what_says_nothing_or_two_things_is_refused(merge, options, words):
    with pytest.raises(ValueError) as error:
        assert_merges(merge, **options)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("merge", "given", "words"),
    [
        (3, (), "merge: got int"),
        (stable, (3,), "attention: got int"),
        (lambda a, b, c, d: None, (), "what merge returns: got NoneType; accepted is (out, lse)"),
        (lambda a, b, c, d: (a, 3), (), "what merge returns: got a tuple of Tensor, int"),
        (stable, (lambda q, k, v: v,), "what attention returns: got Tensor and NoneType"),
    ],
)
def test_what_is_no_function_or_gives_no_tensor_is_refused(merge, given, words):
    with pytest.raises(TypeError) as error:
        assert_merges(merge, *given)
    assert words in str(error.value)


# --- wrong merges, and what they are called


def changed(out=None, lse=None):
    """A right merge but for the output, or the log-sum-exp, or both."""

    def merge(a, lse_a, b, lse_b):
        right = by_logaddexp(a, lse_a, b, lse_b)
        given = a, lse_a, b, lse_b
        return right[0] if out is None else out(*given), right[1] if lse is None else lse(*given)

    return merge


def of_base_2(a, lse_a, b, lse_b):
    out, lse = stable(a, lse_a * LN2, b, lse_b * LN2)
    return out, lse / LN2


def with_weights(weigh):
    return changed(lambda a, s, b, t: _weighed(a, b, *weigh(s, t)))


def _weighed(a, b, of_a, of_b):
    return (of_a[..., None] * a + of_b[..., None] * b).to(a.dtype)


def _softmax(s, t):
    return torch.stack([s, t]).softmax(0).nan_to_num(nan=0.0)


def _scaled(s, t):
    top = torch.maximum(s, t)
    top = top.masked_fill(top.isinf(), 0.0)
    return (s - top).exp(), (t - top).exp()


def misread(lse):
    """(batch, heads, queries) in memory is taken for (batch, queries, heads)."""
    return lse.reshape(lse.shape[0], lse.shape[2], lse.shape[1]).mT


WRONG = {
    "as if they were of base 2": of_base_2,
    "takes the mean of the outputs": changed(lambda a, s, b, t: (a + b) / 2),
    "adds up the outputs without weights": changed(lambda a, s, b, t: a + b),
    "of the part with the largest log-sum-exp": with_weights(lambda s, t: (s >= t, s < t)),
    "exp(lse - maximum), and does not divide": with_weights(_scaled),
    "by exp(-lse): the sign": with_weights(lambda s, t: _softmax(-s, -t)),
    "the weights are exchanged": with_weights(lambda s, t: _softmax(t, s)),
    "returns the output of the first part": changed(lambda a, s, b, t: a),
    "returns the output of the last part": changed(lambda a, s, b, t: b),
    "is of base 2, not of base e": changed(lse=lambda a, s, b, t: torch.logaddexp(s, t) / LN2),
    "it was not updated": changed(lse=lambda a, s, b, t: s),
    "is that of the last part": changed(lse=lambda a, s, b, t: t),
    "is the largest, not the logarithm": changed(lse=lambda a, s, b, t: torch.maximum(s, t)),
    "is the sum of those of the parts": changed(lse=lambda a, s, b, t: s + t),
    "is the mean of those of the parts": changed(lse=lambda a, s, b, t: (s + t) / 2),
    "has the wrong sign": changed(lse=lambda a, s, b, t: -torch.logaddexp(s, t)),
    "the logarithm of the mean": changed(lse=lambda a, s, b, t: torch.logaddexp(s, t) - LN2),
    "is rounded to float16": changed(lse=lambda a, s, b, t: torch.logaddexp(s, t).half()),
    "of the first head for all": changed(
        lambda a, s, b, t: stable(a, s[:, :1].expand_as(s), b, t[:, :1].expand_as(t))[0]),
    "of the first sample for all": changed(
        lambda a, s, b, t: stable(a, s[:1].expand_as(s), b, t[:1].expand_as(t))[0]),
    "(heads, queries) as if they were (queries, heads)": changed(
        lambda a, s, b, t: stable(a, misread(s), b, misread(t))[0]),
    "log-sum-exps to float16": changed(
        lambda a, s, b, t: stable(a, s.half().float(), b, t.half().float())[0]),
    "log-sum-exps to bfloat16": changed(
        lambda a, s, b, t: stable(a, s.bfloat16().float(), b, t.bfloat16().float())[0]),
}  # fmt: skip


@pytest.mark.parametrize("words", WRONG)
def test_a_mistake_is_called_by_its_name(words):
    found = failure_of(WRONG[words])
    assert words in str(found.cause)
    twins = ("the sign", "the weights are exchanged")  # of two parts they are the same
    assert ", or " not in found.cause or all(twin in found.cause for twin in twins)
    assert found.broken > 0
    assert "merges are wrong: two halves" in found.cases


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_the_wrong_base_is_named_in_every_dtype_both_ways(dtype):
    assert "base e as if they were of base 2" in failure_of(of_base_2, dtypes=dtype).cause
    found = failure_of(merge_state_v2, base="2", dtypes=dtype)
    assert "base 2 as if they were of base e" in found.cause
    found = failure_of(stable, base="2", dtypes=dtype)
    assert "base 2 as if they were of base e" in found.cause
    assert "base='2'" in found.assumed


def test_a_stand_in_of_flashinfer_that_is_of_base_e_says_what_was_assumed():
    def merge(v_a, s_a, v_b, s_b):
        return stable(v_a, s_a, v_b, s_b)

    found = failure_of(merge)
    assert found.assumed == (
        "merge is called as FlashInfer's merge_state: calling='pair', layout='lhd', "
        "lse_layout='lh', base='2'"
    )
    assert "reads log-sum-exps of base 2 as if they were of base e" in found.cause
    passes(merge, base="e")


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_two_mistakes_at_once_are_both_named(dtype):
    merge = changed(lambda a, s, b, t: (a + b) / 2, lambda a, s, b, t: s)
    found = failure_of(merge, dtypes=dtype)
    assert found.cause.startswith("it takes the mean of the outputs, and the log-sum-exp")
    assert "not updated" in found.cause


def test_mistakes_of_a_merge_of_all_parts_are_named():
    found = failure_of(lambda outs, lses: (outs.mean(0), lses.logsumexp(0)))
    assert found.cause.startswith("it takes the mean of the outputs")
    found = failure_of(lambda outs, lses: (of_all(outs, lses)[0], lses[0]))
    assert "not updated" in found.cause
    found = failure_of(lambda outs, lses: (of_all(outs, lses * LN2)[0], lses.logsumexp(0)))
    assert "base 2" in found.cause


def naive(a, s, b, t):
    """No maximum is subtracted."""
    of_a, of_b = s.exp(), t.exp()
    return _weighed(a, b, of_a / (of_a + of_b), of_b / (of_a + of_b)), (of_a + of_b).log()


def test_an_exponential_without_the_maximum_is_named():
    found = failure_of(naive, dtypes="float32", empty_parts=False)
    assert "exp of float32 overflows from 88.7 on, no maximum was subtracted?" in found.cause
    assert_merges(naive, dtypes="float64", empty_parts=False)  # which holds exp of 500


def test_an_exponential_of_float16_without_the_maximum_is_named():
    def in_half(a, s, b, t):
        out, _ = naive(a, s.half(), b, t.half())
        return out, torch.logaddexp(s, t)

    found = failure_of(in_half, dtypes="float16", empty_parts=False)
    assert "exp of float16 overflows from 11.1 on" in found.cause


@pytest.mark.parametrize("last", [True, False])
def test_an_exponential_of_the_difference_is_named(last):
    def ratio(a, s, b, t):
        if not last:
            a, s, b, t = b, t, a, s
        of_b = (t - s).exp()
        return _weighed(a, b, 1 / (1 + of_b), of_b / (1 + of_b)), torch.logaddexp(s, t)

    found = failure_of(ratio, empty_parts=False)
    above = ("last", "first") if last else ("first", "last")
    assert f"rows whose {above[0]} log-sum-exp is 29" in found.cause
    assert f"or more above the {above[1]} are NaN or infinite" in found.cause
    assert "exp of float32 overflows from 88.7 on" in found.cause
    assert "dominates" in found.cases
    assert "large scores in both parts" not in found.cases


def test_each_order_of_more_than_two_parts_is_tried():
    def from_the_right(a, s, b, t):
        wide = b.dtype != a.dtype == torch.float16  # the second state was merged before
        return (a.float(), s) if wide else stable(a.float(), s, b.float(), t)

    found = failure_of(from_the_right, dtypes="float16")
    assert "merged from the right" in found.cases
    assert "two halves" not in found.cases

    def where_the_first_of_three_dominates(outs, lses):
        out, lse = of_all(outs, lses)
        others = lses[1:].amax(0) if len(lses) == 3 else math.inf * torch.ones_like(lse)
        first = (lses[0] > others + 200) & others.isfinite()
        return torch.where(first[..., None], 1.1 * out, out), lse

    found = failure_of(where_the_first_of_three_dominates)
    assert found.cases.startswith("1 of ")
    assert "parts of 6 + 9 + 9, merged at once" in found.cases


def unguarded(a, s, b, t):
    """NaN where neither part has a key."""
    lse = torch.logaddexp(s, t)
    return _weighed(a, b, (s - lse).exp(), (t - lse).exp()), lse


def of_ring(a, s, b, t):
    """NaN where the first part has no key."""
    out = a - torch.sigmoid(t - s)[..., None] * (a - b)
    return out.to(a.dtype), s - nn.functional.logsigmoid(s - t)


def test_empty_parts_that_give_nan_are_named():
    found = failure_of(unguarded)
    assert found.cause.startswith("rows that neither part has a key for are NaN: -inf minus -inf?")
    assert "empty parts alone" in found.cases
    assert "two halves" not in found.cases
    passes(unguarded, fully_masked="nan")
    passes(unguarded, fully_masked="undefined")
    found = failure_of(of_ring)
    assert found.cause.startswith("rows for which a part has no key (its log-sum-exp is -inf)")
    passes(of_ring, empty_parts=False)


def test_zero_where_nan_is_declared_is_found():
    found = failure_of(stable, fully_masked="nan")
    assert "hold other numbers" in found.cause
    assert "empty parts alone" in found.cases


def test_an_infinite_log_sum_exp_of_nothing_is_named():
    def merge(a, s, b, t):
        out, lse = stable(a, s, b, t)
        return out, lse.masked_fill(lse.isneginf(), math.inf)

    found = failure_of(merge, gradients=False)
    assert "+inf" in found.cause


def test_a_low_number_for_no_key_passes():
    def merge(a, s, b, t):
        out, lse = stable(a, s, b, t)
        return out, lse.clamp(min=-1e30)

    passes(merge)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_mistake_with_more_than_two_parts_alone_is_found(place):
    def merge(outs, lses):
        if len(outs) > 2:
            lses = lses.clone()
            lses[place] -= 0.01
        return of_all(outs, lses)

    found = failure_of(merge, dtypes="float32")
    assert "two halves" not in found.cases
    assert "three parts" in found.cases
    assert found.cause is None


def test_a_mistake_that_nobody_knows_has_no_cause():
    found = failure_of(changed(lambda a, s, b, t: 0.9 * by_logaddexp(a, s, b, t)[0]))
    assert found.cause is None
    assert "off by" in found.worst.text


def test_layouts_of_log_sum_exps_that_are_exchanged_are_named():
    def heads_first(output, prefix_output, prefix_lse, suffix_output, suffix_lse, output_lse):
        """Reads (heads, tokens) as (tokens, heads)."""
        shape = prefix_output.shape[:2]
        out, _ = stable(prefix_output, prefix_lse.reshape(shape),
                        suffix_output, suffix_lse.reshape(shape))  # fmt: skip
        output.copy_(out)
        output_lse.copy_(torch.logaddexp(prefix_lse, suffix_lse))

    found = failure_of(heads_first)
    assert found.cause == "it reads log-sum-exps (heads, tokens) as if they were (tokens, heads)"

    def tokens_first(v_a, s_a, v_b, s_b, v_merged=None, s_merged=None):
        a, b = (s.reshape(s.shape[::-1]).mT for s in (s_a, s_b))
        return stable(v_a, a, v_b, b)[0], torch.logaddexp(s_a, s_b)

    found = failure_of(tokens_first)
    assert found.cause == "it reads log-sum-exps (tokens, heads) as if they were (heads, tokens)"


def test_what_is_wrong_everywhere_has_no_cause_that_explains_a_part_of_it():
    torch.manual_seed(0)
    assert failure_of(lambda a, s, b, t: (torch.randn_like(a), s)).cause is None
    assert failure_of(lambda a, s, b, t: (a * math.nan, s * math.nan)).cause is None
    found = failure_of(lambda a, s, b, t: (0.9 * unguarded(a, s, b, t)[0], torch.logaddexp(s, t)))
    assert "-inf minus -inf" in found.cause
    assert found.cause.endswith("wrong as well, and no known mistake gives their numbers")


def test_a_single_wrong_row_is_found():
    def merge(a, s, b, t):
        out, lse = stable(a, s, b, t)
        out = out.clone()
        out[1, 3, -1, 7] += 0.02
        return out, lse

    found = failure_of(merge, dtypes="float32")
    assert found.broken == 1
    assert found.worst.index[-1] == 7


def test_a_failure_says_it_all_and_again_makes_the_call():
    found = failure_of(WRONG["it was not updated"], dtypes="float32")
    lines = str(found).splitlines()
    assert lines[0].startswith("assert_merges: 40 of 40 merged log-sum-exps are not those of all")
    assert any(line.startswith("  repeat   seed=0") for line in lines)
    assert any("float32 (2, 4, 5, 64) on cpu" in line for line in lines)
    again = found.again()[1]
    assert again[found.worst.index] == pytest.approx(found.worst.value)


# --- gradients


def test_detached_weights_are_named():
    def merge(a, s, b, t):
        return by_logaddexp(a, s.detach(), b, t.detach())

    found = failure_of(merge)
    assert "no gradient reaches the log-sum-exps of the parts" in found.claim
    assert "detached" in found.cause
    passes(merge, gradients=False)


def test_weights_that_are_detached_from_the_output_alone_are_found():
    def merge(a, s, b, t):
        return by_logaddexp(a, s.detach(), b, t.detach())[0], torch.logaddexp(s, t)

    found = failure_of(merge)
    assert "gradients of the parts' log-sum-exps" in found.claim
    assert "what is returned is right" in found.cases


def test_a_gradient_that_is_not_of_an_output_is_found():
    def merge(a, s, b, t):
        return by_logaddexp(a, s, b.detach(), t)

    assert "gradients of the parts' outputs" in failure_of(merge).claim


def test_a_gradient_that_is_nan_beside_an_empty_part_is_named():
    def merge(a, s, b, t):
        of_b = torch.sigmoid(t - s).nan_to_num(nan=0.0)
        # Its value is 0; its gradient is inf / inf where s is -inf.
        nothing = torch.where(s.isneginf(), 0.0, 0.0 / (1 + (t - s).square()))
        return a - (of_b + nothing)[..., None] * (a - b), torch.logaddexp(s, t)

    found = failure_of(merge)
    assert "gradients of the parts' log-sum-exps" in found.claim
    assert "only where a part has no key" in found.cause
    assert "nan" in found.worst.text


def test_a_merge_without_gradients_passes():
    passes(torch.no_grad()(stable))


def test_a_merge_is_compared_under_inference_mode_too():
    with torch.inference_mode():
        assert_merges(stable, dtypes="float32")
        assert (
            "no gradient"
            in failure_of(lambda a, s, b, t: stable(a, s.detach(), b, t.detach())).claim
        )


# --- states that the caller's attention makes


def attention(query, key, value, attn_mask=None, *, base=1.0, sink=None, empty=-math.inf):
    """(out, lse), in float32 at least; a row without keys gives 0 and -inf."""
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(wide) @ key.to(wide).mT / math.sqrt(query.shape[-1])
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    lse = scores.logsumexp(-1)
    if sink is not None:
        lse = torch.logaddexp(lse, sink.to(lse)[:, None].expand_as(lse))
    safe = lse.masked_fill(lse.isneginf(), 0.0)
    out = (scores - safe[..., None]).exp() @ value.to(wide)
    return out.to(query.dtype), lse.masked_fill(lse.isneginf(), empty) / base


def test_states_of_the_callers_attention_are_merged():
    passes(stable, attention)
    passes(stable, lambda query, key, value: attention(query, key, value))
    passes(merge_state, lambda *qkv, **more: attention(*qkv, **more, base=LN2))
    spec = AttentionSpec(attention, returns="lse")
    passes(stable, spec)


def test_a_log_sum_exp_of_another_order_of_dimensions_is_told_by_its_sizes():
    def tokens_first(query, key, value):
        out, lse = attention(query, key, value)
        return out, lse.transpose(1, 2)

    passes(stable, tokens_first)


def test_an_attention_of_its_own_kind_is_no_failure():
    def capped(query, key, value):
        query = query * 0.7
        return attention(query, key, value)

    passes(stable, capped)


def test_a_base_2_state_that_is_given_to_a_base_e_merge_is_named():
    found = failure_of(stable, lambda *qkv: attention(*qkv, base=LN2))
    assert found.cause == "its log-sum-exps are of base 2, and the merge is one of base e"
    found = failure_of(merge_state, lambda *qkv: attention(*qkv))
    assert found.cause == "its log-sum-exps are of base e, and the merge is one of base 2"


def test_a_sink_that_is_counted_in_each_part_is_named():
    sink = torch.tensor([0.5, 1.0, 2.0, 3.0])
    found = failure_of(stable, lambda *qkv: attention(*qkv, sink=sink))
    assert "a sink (of score 0.50, 1.00, 2.00, 3.00) is counted in each part" in found.cause


def test_a_sign_and_plus_infinity_and_nan_of_the_callers_attention_are_named():
    def negative(query, key, value):
        out, lse = attention(query, key, value)
        return out, -lse

    assert "wrong sign" in failure_of(stable, negative).cause

    def infinite(query, key, value, attn_mask=None):
        return attention(query, key, value, attn_mask, empty=math.inf)

    assert "+inf where no key is seen" in failure_of(stable, infinite).cause

    def undefined(query, key, value, attn_mask=None):
        out, lse = attention(query, key, value, attn_mask)
        return out.masked_fill(lse.isneginf()[..., None], math.nan), lse

    assert "NaN for a query that sees no key" in failure_of(stable, undefined).cause
    passes(stable, undefined, empty_parts=False)


def test_other_numbers_for_a_log_sum_exp_of_the_callers_attention_are_named():
    def returning(make):
        def made(query, key, value):
            scores = query.float() @ key.float().mT / math.sqrt(query.shape[-1])
            return attention(query, key, value)[0], make(scores)

        return failure_of(stable, made).cause

    assert "the largest score of a row" in returning(lambda scores: scores.amax(-1))
    assert "the products before the scale" in returning(lambda scores: (8 * scores).logsumexp(-1))
    assert "the sum of a row, not" in returning(lambda scores: scores.logsumexp(-1).exp())
    assert returning(lambda scores: scores.logsumexp(-1) * 1.1) is None


def test_a_sink_that_scales_the_output_alone_is_named():
    def scaled(query, key, value):
        out, lse = attention(query, key, value)
        return out * torch.sigmoid(lse - 3.0)[..., None], lse

    found = failure_of(stable, scaled)
    assert "a sink (of score 3.00, 3.00, 3.00, 3.00) makes the output of each part" in found.cause


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_right_attention_that_computes_in_its_own_dtype_passes(dtype):
    def plain(query, key, value):
        scores = query @ key.mT / math.sqrt(query.shape[-1])
        return scores.softmax(-1) @ value, scores.logsumexp(-1)

    assert_merges(stable, plain, dtypes=dtype)


def test_a_wrong_merge_of_right_states_is_the_merges_fault():
    found = failure_of(WRONG["takes the mean of the outputs"], attention)
    assert found.cause.startswith("it takes the mean")


@pytest.mark.parametrize("merge", [merge_state, flash_attn_combine])
def test_states_are_made_where_the_merge_is_wanted(merge, accelerator):
    seen = set()

    @functools.wraps(merge)
    def placed(*states):
        seen.update(state.device.type for state in states)
        return merge(*states)

    assert_merges(placed, device=accelerator, dtypes="float32", gradients=False)
    assert seen == {torch.device(accelerator).type}


def test_a_mistake_is_named_on_an_accelerator(accelerator):
    found = failure_of(WRONG["it was not updated"], device=accelerator)
    assert "it was not updated" in found.cause
    assert found.tensor.device.startswith(str(accelerator))
    assert_merges(stable, attention, device=accelerator, dtypes="float32")
