"""Each check is needed: some defect is found by it and few others."""

import math
from functools import partial

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa
from wrong_attention import attention_with

from pytest_attnheat import AttentionSpec, check_attention
from pytest_attnheat.contract.checks import CHECKS
from pytest_attnheat.contract.examination import check, registered
from pytest_attnheat.contract.running import examinations_of, run_check

# A defect is found by few others if no more than this many checks find it, besides `pairs`, which
# asks what the others ask and more.
FEW = 4
NAMED = [one for one in CHECKS if one.name != "pairs"]


class Hidden(torch.autograd.Function):
    """Passes a value through, and its gradient times a number."""

    @staticmethod
    def forward(ctx, tensor, factor):
        ctx.factor = factor
        return tensor.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


def whole(query, key, value, attn_mask=None, is_causal=False):
    """Attention that takes a mask and is_causal at once."""
    mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool)
    if is_causal:
        mask = mask.tril()
    if attn_mask is not None:
        mask = mask & attn_mask
    return sdpa(query, key, value, mask)


def wider_dtype(query, key, value):
    return sdpa(query, key, value).double()


def tail_dropped(query, key, value):
    full = key.shape[-2] // 32 * 32 or key.shape[-2]
    return sdpa(query, key[..., :full, :], value[..., :full, :])


def causal_in_the_first_block(query, key, value, attn_mask=None, is_causal=False):
    mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool)
    if is_causal:
        mask = mask.tril()
        mask[16:] = True
    return sdpa(query, key, value, mask if attn_mask is None else mask & attn_mask)


def masked_in_the_first_block(query, key, value, attn_mask=None):
    if attn_mask is not None:
        attn_mask = attn_mask | (torch.arange(key.shape[-2]) >= 16)
    return sdpa(query, key, value, attn_mask)


def wrong_gradient(query, key, value):
    return sdpa(Hidden.apply(query, 1.1), key, value)


def nan_gradient(query, key, value, attn_mask=None):
    scores = query @ key.mT / query.shape[-1] ** 0.5
    if attn_mask is not None:
        scores = scores + torch.zeros_like(scores).masked_fill(~attn_mask, -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ value


def gradient_through_the_future(query, key, value, attn_mask=None, is_causal=False):
    leak = value.mean(-2, keepdim=True)
    factor = 1.0 if is_causal else 0.0
    return whole(query, key, value, attn_mask, is_causal) + factor * (leak - leak.detach())


def gradient_through_the_mask(query, key, value, attn_mask=None):
    leak = value.mean(-2, keepdim=True)
    factor = 0.0 if attn_mask is None else 1.0
    return sdpa(query, key, value, attn_mask) + factor * (leak - leak.detach())


def mask_of_square_maps(query, key, value, attn_mask=None):
    """Ignores a mask whose last key is hidden from all, as if that were a wrong shape."""
    if attn_mask is not None and not attn_mask[..., -1].any():
        attn_mask = None
    return sdpa(query, key, value, attn_mask)


def squeezed_batch(query, key, value):
    output = sdpa(query, key, value)
    return output.flip(1) if query.shape[0] == 1 else output


def one_query_is_different(query, key, value, attn_mask=None, is_causal=False):
    output = whole(query, key, value, attn_mask, is_causal)
    return output * 1.5 if query.shape[-2] == 1 else output


def strides_ignored(query, key, value):
    key = key if key.is_contiguous() else key.mT.reshape(key.shape)
    return sdpa(query, key, value)


def random_at_times(query, key, value):
    output = sdpa(query, key, value)
    return output + torch.empty(()).uniform_() * torch.finfo(output.dtype).eps * output


def not_rescaled(query, key, value, dropout_p=0.0):
    weights = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)
    return (weights * (torch.rand(weights.shape) >= dropout_p)) @ value


def gradient_without_dropout(query, key, value, dropout_p=0.0):
    return sdpa(Hidden.apply(query, 1.1 if dropout_p else 1.0), key, value, dropout_p=dropout_p)


def sum_before_the_scale(query, key, value):
    return sdpa(query, key, value), (query @ key.mT).logsumexp(-1)


def of_another_head(query, key, value):
    weights = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)
    return weights @ value, weights.roll(1, 1)


def added(query, key, value, added=None):
    """Takes a mask of floats for one of booleans."""
    return sdpa(query, key, value, None if added is None else added.isfinite())


def featured(query, key, value, *, softcap=None, sinks=None, alibi=None, bias=None, documents=None,
             lengths=None, window=(-1, -1), chunk=None):  # fmt: skip
    """Attention with all that a call may be given, each under a keyword of that name."""
    scores = query @ key.mT / query.shape[-1] ** 0.5
    at_query, at_key = torch.arange(query.shape[-2])[:, None], torch.arange(key.shape[-2])
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    if alibi is not None:
        scores = scores - alibi[:, None, None] * (at_query - at_key).abs()
    hidden = torch.zeros(len(query), 1, 1, key.shape[-2], dtype=torch.bool)
    if documents is not None:
        hidden = hidden | (documents[:, None, :, None] != documents[:, None, None])
    if lengths is not None:
        hidden = hidden | (at_key >= lengths[:, None, None, None])
    if window is not None:
        left, right = (math.inf if side < 0 else side for side in window)
        hidden = hidden | (at_key < at_query - left) | (at_key > at_query + right)
    if chunk is not None:
        hidden = hidden | (at_key // chunk != at_query // chunk)
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is None:
        return scores.softmax(-1) @ value
    sink = sinks[None, :, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat([scores, sink], -1).softmax(-1)[..., :-1] @ value


FEATURES = ("softcap", "sinks", "alibi", "bias", "documents", "lengths", "window", "chunk")


def without(dropped):
    """The specification of what takes every feature, and leaves one of them aside."""

    def attention(query, key, value, *, softcap=None, sinks=None, alibi=None, bias=None,
                  documents=None, lengths=None, window=None, chunk=None):  # fmt: skip
        given = {"softcap": softcap, "sinks": sinks, "alibi": alibi, "bias": bias,
                 "documents": documents, "lengths": lengths, "window": window,
                 "chunk": chunk}  # fmt: skip
        return featured(query, key, value, **(given | {dropped: None}))

    return AttentionSpec(attention, dtypes=("float32",), **{name: name for name in FEATURES})


NEEDED = {
    "shape_and_dtype": wider_dtype,
    "causal_rectangular": attention_with("causal_other_corner"),
    "masked_and_causal": attention_with("mask_ignored_when_causal"),
    "scale_argument": attention_with("scale_argument_ignored"),
    "fully_masked": attention_with("fully_masked_uniform"),
    "grouped": AttentionSpec(attention_with("groups_tiled"), grouped=True, dtypes=("float32",)),
    "large_scores": attention_with("no_maximum_subtracted"),
    "block_lengths": tail_dropped,
    "gradients": wrong_gradient,
    "gradients_masked": nan_gradient,
    "no_leakage": gradient_through_the_future,
    "no_leakage_through_mask": gradient_through_the_mask,
    "padding": mask_of_square_maps,
    "batch": squeezed_batch,
    "decoding": one_query_is_different,
    "layout": strides_ignored,
    "repeats": random_at_times,
    "dropout": not_rescaled,
    "dropout_gradients": gradient_without_dropout,
    "returned_lse": AttentionSpec(sum_before_the_scale, returns="lse", dtypes=("float32",)),
    "returned_weights": AttentionSpec(of_another_head, returns="weights", dtypes=("float32",)),
    "float_mask": AttentionSpec(added, mask="additive", mask_argument="added", dtypes=("float32",)),
    **{name: without(name) for name in FEATURES},
}
# The three that nearly every defect fails: they tell at once without a mask, with one, and causal.
COMMON = ["plain", "masked", "causal"]


@pytest.mark.matrix
@pytest.mark.parametrize("name", NEEDED)
def test_some_defect_is_found_by_a_check_and_few_others(name):
    subject = NEEDED[name]
    if not isinstance(subject, AttentionSpec):
        subject = AttentionSpec(subject, dtypes=("float32",))
    torch.manual_seed(0)
    found = {result.name for result in check_attention(subject, checks=NAMED).failed}
    assert name in found
    assert len(found) <= FEW, found


def test_a_subject_that_writes_into_what_it_is_given_is_found_where_few_checks_are_made():
    def scaled_in_place(query, key, value, is_causal=False):
        output = sdpa(query, key, value, is_causal=is_causal)
        query *= query.shape[-1] ** -0.5
        return output

    spec = AttentionSpec(scaled_in_place, dtypes=("float32",))
    (found,) = check_attention(spec, quick=True).failed
    assert found.name == "repeats"
    assert "elements change: the subject writes into query" in found.message


@pytest.mark.parametrize("subject", [causal_in_the_first_block, masked_in_the_first_block])
def test_what_goes_wrong_with_two_features_alone_is_found_by_the_pairs_of_them(subject):
    report = check_attention(AttentionSpec(subject, dtypes=("float32",)))
    assert [result.name for result in report.failed] == ["pairs"]


def test_what_takes_every_feature_passes():
    spec = AttentionSpec(featured, dtypes=("float32",), **{name: name for name in FEATURES})
    report = check_attention(spec)
    assert report.passed, str(report)
    asked = {result.name for result in report.results if result.status == "passed"}
    assert {"pairs", *FEATURES} <= asked


def failing(subject, name, **declared):
    """The replay of one check of a subject, None where it passes."""
    spec = AttentionSpec(subject, dtypes=("float32",), **declared)
    (result,) = check_attention(spec, checks=[one for one in CHECKS if one.name == name]).results
    assert result.status in ("passed", "failed"), result.message
    return result.replay if result.status == "failed" else None


def from_the_end(query, key, value, is_causal=False):
    """Causal from the bottom right; NaN where nothing is seen."""
    behind = torch.arange(query.shape[-2])[:, None] - torch.arange(key.shape[-2])
    hidden = behind + key.shape[-2] - query.shape[-2] < 0
    scores = query @ key.mT / query.shape[-1] ** 0.5
    return (scores.masked_fill(hidden, -torch.inf) if is_causal else scores).softmax(-1) @ value


def test_more_queries_than_keys_are_asked_from_the_bottom_right_and_judged_where_declared():
    def one_too_far(query, key, value, is_causal=False):
        if is_causal and query.shape[-2] > key.shape[-2]:
            key, value = key[..., 1:, :], value[..., 1:, :]
        return from_the_end(query, key, value, is_causal=is_causal)

    def zeros(query, key, value, is_causal=False):
        return from_the_end(query, key, value, is_causal=is_causal).nan_to_num(0.0)

    ask = partial(failing, name="causal_rectangular", causal="bottom_right")
    assert ask(one_too_far).startswith("sizes=9x5 causal=True ")
    assert ask(from_the_end) is None
    assert ask(from_the_end, fully_masked="zero").startswith("sizes=9x5 causal=True ")
    assert ask(zeros, fully_masked="zero") is ask(from_the_end, fully_masked="nan") is None


def test_a_batch_entry_without_any_key_is_asked_where_it_is_declared():
    def clamped(query, key, value, *, lengths=None):
        return featured(query, key, value, lengths=lengths if lengths is None else lengths.clamp(1))

    ask = partial(failing, name="lengths", lengths="lengths")
    assert ask(clamped) is None
    assert "lengths=empty" in ask(clamped, fully_masked="zero")
    assert ask(featured, fully_masked="nan") is None


def test_a_window_wider_than_all_calls_is_asked_in_one_that_it_shortens():
    def unlimited(query, key, value):
        return from_the_end(query, key, value, is_causal=True)

    declared = {"window": (2500, 0), "causal": "bottom_right", "fully_masked": "undefined"}
    assert failing(unlimited, "block_lengths", **declared).startswith("sizes=3x2505 ")


@pytest.mark.parametrize("tile", [16, 8, None])
def test_a_tile_of_query_heads_that_reaches_into_the_next_group_is_found(tile):
    def attention(query, key, value, enable_gqa=False):
        heads, key_heads = query.shape[1], key.shape[1]
        if tile is None and heads // key_heads > 16:
            raise RuntimeError("at most 16 heads share one")
        group, head = heads // key_heads, torch.arange(heads)
        own = head // group
        if tile is not None and group > tile:  # tiles are dealt out over all heads
            own = head // tile // -(-group // tile)
        return sdpa(query, key[:, own], value[:, own])

    found = failing(attention, "grouped")
    assert found is None if tile != 16 else found.startswith("sizes=3x7 group=24 ")


def test_queries_before_all_real_keys_are_asked_where_it_is_declared_what_they_give():
    def added(query, key, value, mask=None, is_causal=False, hide=-1e4):
        scores = query @ key.mT / query.shape[-1] ** 0.5
        if is_causal:
            scores = scores + torch.ones(scores.shape[-2:]).triu(1) * hide
        if mask is not None:
            scores = scores + (~mask[:, None, None]) * hide
        return scores.softmax(-1) @ value

    def filled(query, key, value, mask=None, is_causal=False):
        seen = torch.ones(query.shape[2], key.shape[2]).tril() > 0 if is_causal else True
        seen = seen if mask is None else seen & mask[:, None, None]
        return sdpa(query, key, value, seen if torch.is_tensor(seen) else None)

    declared = {"mask": "keep", "mask_argument": "mask", "mask_shape": "(B, S)"}
    ask = partial(failing, name="pairs", gradients=False, **declared)
    assert ask(added) is None
    assert "empty=True" in ask(added, fully_masked="zero")
    assert ask(filled, fully_masked="zero") is None


def as_if_contiguous(tensor):
    """What is read where the strides of a tensor are not looked at, as far as memory goes."""
    own = torch.empty(tensor.shape).stride()
    room = tensor.untyped_storage().nbytes() // tensor.element_size() - tensor.numel()
    return tensor.as_strided(tensor.shape, own, 0) if room >= 0 else tensor


def test_a_mask_is_laid_out_otherwise_as_well():
    def attention(query, key, value, attn_mask=None):
        mask = attn_mask if attn_mask is None else as_if_contiguous(attn_mask)
        return sdpa(query, key, value, mask)

    assert failing(sdpa, "layout") is None
    assert failing(attention, "layout", fully_masked="undefined") == ""


def test_an_output_that_is_stored_as_the_query_lies_is_found_though_only_of_values_as_wide():
    def attention(query, key, value):
        output = sdpa(query, key, value)
        if output.shape != query.shape or query.is_contiguous():
            return output
        memory = torch.zeros(max(output.numel(), query.untyped_storage().nbytes()))
        memory.as_strided(output.shape, query.stride()).copy_(output)
        return memory[: output.numel()].view(output.shape)

    assert failing(attention, "layout", gradients=False) == ""


def summed(query, key, value, *, sinks=None, factor=1.0, shifted=True):
    """The output, and the log-sum-exp times a factor; a sink may be left out of its maximum."""
    scores = query @ key.mT / query.shape[-1] ** 0.5
    if sinks is None:
        return scores.softmax(-1) @ value, scores.logsumexp(-1) * factor
    both = torch.cat([scores, sinks[:, None, None].expand_as(scores[..., :1])], -1)
    top = (both if shifted else scores).amax(-1, keepdim=True)
    lse = (both - top).exp().sum(-1).log() + top[..., 0]
    return both.softmax(-1)[..., :-1] @ value, lse


@pytest.mark.parametrize(
    ("subject", "cause"),
    [
        (partial(summed, sinks=None), None),
        (partial(summed, sinks=None, factor=0.0), "it is 0 in every row"),
        (partial(summed, sinks=None, factor=math.log(2)), "times ln(2), as if it had been in"),
        (lambda query, key, value, sinks=None: summed(query, key, value, sinks=sinks), None),
        (
            lambda query, key, value, sinks=None: summed(
                query, key, value, sinks=sinks, shifted=False
            ),
            "it is (batch, heads, query_len), base e, but not beside a sink",
        ),
    ],
)
def test_a_log_sum_exp_is_asked_beside_large_scores_and_told_by_what_is_made_of_it(subject, cause):
    spec = AttentionSpec(subject, returns="lse", name="summed", dtypes=("float32",))
    checks = [one for one in CHECKS if one.name == "returned_lse"]
    (result,) = check_attention(spec, checks=checks).results
    assert result.status == ("failed" if cause else "passed"), result.message
    assert cause is None or cause in result.message


def test_every_check_is_needed():
    names = {one.name for one in NAMED}
    elsewhere = {"ragged", "stored"}  # of conventions: test_conventions, test_conventions_cached
    assert names - elsewhere == {*NEEDED, *COMMON}, (
        "a defect that a new check finds goes into NEEDED"
    )


def test_what_a_check_needs_is_looked_at_before_the_subject_is_called():
    def never(query, key, value):
        raise AssertionError("it was called")

    spec = AttentionSpec(never, gradients=False, dtypes=("float32",))
    (examination,) = examinations_of(spec)
    needing = [one for one in CHECKS if one.needs is not None and one.needs(spec)]
    names = {one.name for one in needing}
    assert {"masked", "causal", "grouped", "gradients", "returned_weights", *FEATURES} <= names
    for one in needing:
        result = run_check(one, examination)
        assert (result.status, result.message) == ("skipped", one.needs(spec))


def test_a_check_is_registered_where_it_is_written_for_each_kind_of_subject():
    @check("own", "it is so", "block", "captured", needs=lambda spec: "never", issue="a/b#1")
    def own(examination):
        """Nothing."""

    for kind in ("block", "captured"):
        *_, last = registered(kind)
        assert (last.name, last.run, last.quick, last.issue) == ("own", own, False, "a/b#1")
    assert "own" not in {one.name for one in registered("function")}


def test_every_check_has_a_sentence_and_a_docstring():
    for one in CHECKS:
        assert one.sentence
        assert one.run.__doc__
