"""What assert_convex accepts and refuses."""

import math
import random

import numpy as np
import pytest
import torch
from attention_subjects import DTYPES, encoder_layer, multihead, plain, qkv, randn
from devices import on_accelerators
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

from pytest_attnheat import assert_convex
from pytest_attnheat.assertions.behaviour.convexity import visible_range
from pytest_attnheat.assertions.behaviour.functions import AttentionFunction
from pytest_attnheat.assertions.behaviour.sequences import SequenceModel

MASK = torch.tensor(
    [[1, 0, 0, 1, 0, 0], [0, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1],
     [0, 0, 0, 0, 0, 1], [0, 0, 1, 0, 1, 0], [0, 1, 0, 0, 0, 0]]
).bool()  # fmt: skip


def scores_of(query, key, attn_mask=None, is_causal=False):
    scores = query @ key.mT / query.shape[-1] ** 0.5
    if is_causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:]).tril().bool(), -1e9)
    return scores if attn_mask is None else scores.masked_fill(~attn_mask, -math.inf)


def softmax_over(axis):
    def attention(query, key, value, **arguments):
        return scores_of(query, key, **arguments).softmax(axis) @ value

    return attention


def message(function, *inputs, **arguments):
    with pytest.raises(AssertionError) as caught:
        assert_convex(function, *inputs, **arguments)
    return str(caught.value)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [(6, 6), (1, 1), (4, 9), (9, 4), (3, 700)], ids=str)
@pytest.mark.parametrize("function", [sdpa, plain], ids=["torch", "plain"])
def test_attention_passes_in_every_dtype_and_length_with_and_without_masks(
    function, lengths, dtype
):
    query, key, value = qkv(2, 3, *lengths, dtype=dtype)
    mask = randn(2, 1, *lengths) < 0.5
    mask[..., 0] = True
    bias = randn(*lengths, dtype=dtype).masked_fill(~mask[0, 0], -math.inf)
    assert_convex(function, query, key, value)
    assert_convex(function, query, key, value, is_causal=True)
    assert_convex(function, query, key, value, attn_mask=mask)
    assert_convex(function, 20 * query, key, value + 3, attn_mask=bias, scale=-0.3)


@pytest.mark.parametrize("is_causal", [False, True])
def test_query_heads_that_share_a_key_head_are_held_against_its_values(is_causal):
    query, key, value = qkv(2, 4)
    shared = {"key": key[:, :2], "value": value[:, :2] + torch.tensor([0.0, 9.0]).view(2, 1, 1)}
    assert_convex(sdpa, query, **shared, enable_gqa=True, is_causal=is_causal)
    assert_convex(sdpa, query, **shared, enable_gqa=True, attn_mask=MASK)

    def other_order(query, key, value, enable_gqa, **arguments):
        return sdpa(query, key.repeat(1, 2, 1, 1), value.repeat(1, 2, 1, 1), **arguments)

    assert "outputs lie outside the range" in message(
        other_order, query, shared["key"], shared["value"], enable_gqa=True, is_causal=is_causal
    )


@pytest.mark.parametrize("leading", [(), (3,), (2, 1, 2, 3)], ids=str)
def test_any_number_of_leading_dimensions_will_do(leading):
    query, key, value = (randn(*leading, 5, 4, seed=seed) for seed in range(3))
    assert_convex(plain, query, key, value)
    assert_convex(plain, query, key, value, attn_mask=MASK[1:, 1:])
    assert "a factor on the output" in message(lambda *qkv: 2 * plain(*qkv), query, key, value)


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "mask",
    [None, MASK, MASK[:1], randn(2, 1, 6, 6) > 0],
    ids=["none", "mask", "one row", "per batch entry"],
)
def test_the_visible_range_is_that_of_a_loop_over_keys(mask, causal, group, monkeypatch):
    monkeypatch.setattr("pytest_attnheat.attention.chunks.CHUNK_BYTES", 1000)  # chunks of 2 queries
    query, key, value = qkv(2, 4)
    key, value = key[:, ::group], value[:, ::group]
    arguments = {"attn_mask": mask, "is_causal": causal, "enable_gqa": group > 1}
    low, high = visible_range(AttentionFunction(sdpa, query, key, value, arguments), value)
    low, high = (bound.expand(2, 4, 6, 10) for bound in (low, high))
    seen = torch.ones(2, 4, 6, 6, dtype=torch.bool) if mask is None else mask.expand(2, 4, 6, 6)
    for batch, head, row in np.ndindex(2, 4, 6):
        keys = [j for j in range(6) if seen[batch, head, row, j] and (j <= row or not causal)]
        rows = value[batch, head // group, keys].double()
        if keys:
            torch.testing.assert_close(low[batch, head, row], rows.min(0).values)
            torch.testing.assert_close(high[batch, head, row], rows.max(0).values)
        else:
            assert (low[batch, head, row] == math.inf).all()


def test_a_constant_factor_is_told_with_the_place_and_the_range():
    query, key, value = qkv()
    told = message(lambda *qkv: 1.5 * plain(*qkv), query, key, torch.ones_like(value))
    assert told.splitlines() == [
        "assert_convex: 360 of 360 outputs lie outside the range of the values that their query "
        "may see",
        told.splitlines()[1],
        told.splitlines()[2],
        "  cause    the weights of every query sum to 1.5: a factor on the output?",
        "  tensor   float32 (2, 3, 6, 10) on cpu",
    ]
    assert "is 1.5, but every value that query" in told
    assert "is 1 (off by 5.0e-01; allowed 1.0e-05)" in told


def test_the_worst_output_is_named_with_the_value_it_exceeds():
    query, key, value = qkv(1, 2, 5, 5)

    def attention(query, key, value):
        output = plain(query, key, value)
        output[0, 1, 3, 2] = 3 * value[0, 1, :, 2].max()
        return output

    told = message(attention, query, key, value)
    most = value[0, 1, :, 2].max().item()
    assert "assert_convex: 1 of 100 outputs lie outside" in told
    assert (
        f"worst    output[0, 1, 3, 2] is {3 * most:.6g}, above the largest value that query 3 may "
        f"see, {most:.6g} (off by {2 * most:.1e}; allowed " in told
    )
    assert "first" not in told


def test_an_output_below_the_smallest_value_is_found_and_the_first_one_told():
    query, key, value = qkv(1, 1, 4, 4)

    def attention(query, key, value):
        output = plain(query, key, value)
        output[0, 0, 1, 0] = -10.0
        output[0, 0, 2, 1] = -99.0
        return output

    told = message(attention, query, key, value)
    assert "worst    output[0, 0, 2, 1] is -99, below the smallest value that query 2" in told
    assert "first    output[0, 0, 1, 0] is -10, below the smallest value that query 1" in told


def test_weights_that_do_not_sum_to_one_are_found_where_the_values_hide_it():
    query, key, value = qkv()
    small = lambda *qkv: 0.9 * plain(*qkv)  # noqa: E731 (shrinks towards the middle of the range)
    wide = value + 100 * torch.tensor([-1.0, 1.0, -1.0, 1.0, -1.0, 1.0]).unsqueeze(-1)
    told = message(small, 0 * query, key, wide)
    assert told.startswith("assert_convex: 360 of 360 outputs, with every value 1, lie outside")
    assert "the weights of every query sum to 0.9" in told


@pytest.mark.parametrize(
    ("axis", "name"), [(-2, "queries"), (1, "heads"), (0, "batch")], ids=["query", "head", "batch"]
)
@pytest.mark.parametrize("arguments", [{}, {"is_causal": True}], ids=str)
def test_a_softmax_over_another_axis_is_told(axis, name, arguments):
    told = message(softmax_over(axis), *qkv(), **arguments)
    assert f"that of attention whose softmax runs over the {name}" in told


def test_weights_that_are_not_divided_by_their_sum_are_told():
    def attention(query, key, value):
        return torch.exp(scores_of(query, key)) @ value

    assert "exp(score), not divided by their sum" in message(attention, *qkv())


def test_a_mask_that_is_not_applied_is_told():
    def attention(query, key, value, attn_mask):
        return plain(query, key, value)

    told = message(attention, *qkv(), attn_mask=MASK)
    assert "cause    the output is that of attention that ignores the mask" in told


def test_a_window_one_key_too_wide_is_told():
    def attention(query, key, value, is_causal):
        ones = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool)
        return plain(query, key, value, attn_mask=ones.tril(1) if is_causal else None)

    told = message(attention, *qkv(), is_causal=True)
    assert "that of attention whose queries see one key too many: the next one" in told


def test_a_leak_within_the_range_of_the_values_is_found():
    query, key, value = qkv(1, 1, 3, 3)
    value[:] = torch.tensor([-5.0, 5.0, 0.5]).view(3, 1)

    def attention(query, key, value, attn_mask):
        return 0.98 * plain(query, key, value, attn_mask=attn_mask) + 0.02 * value[..., 2:, :]

    mask = torch.tensor([True, True, False])
    told = message(attention, query, key, value, attn_mask=mask)
    assert "outputs, with value[..., j, c] 1 where j % 10 == c and 0 elsewhere, lie" in told
    assert "has 0.02 of its weight on keys that it may not see" in told


def test_a_negative_weight_is_told():
    def attention(query, key, value):
        weights = scores_of(query, key).softmax(-1)
        lower = torch.tensor([0.5, -0.5, 0, 0, 0, 0])
        return (weights - lower) @ value

    told = message(attention, *qkv())
    assert "cause    some weights are negative: they add up to -0." in told


def test_nan_in_a_masked_value_that_reaches_the_output_is_told():
    query, key, value = qkv()
    value[:, :, 4] = math.nan
    mask = torch.tensor([True, True, True, True, False, True])
    told = message(plain, query, key, value, attn_mask=mask)
    assert "output[0, 0, 0, 0] is nan; the values that query 0 may see are from" in told
    assert "cause    a masked key holds nan or inf in its value" in told

    def careful(query, key, value, attn_mask):
        return plain(query, key, value.nan_to_num(0.0), attn_mask=attn_mask)

    assert_convex(careful, query, key, value, attn_mask=mask)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_visible_value_that_is_not_finite_is_refused(bad):
    query, key, value = qkv()
    value[0, 0, 3, 1] = bad
    with pytest.raises(
        ValueError, match=r"value: got (nan|inf) in a key that a query may see; accepted is"
    ):
        assert_convex(plain, query, key, value)


def test_a_query_that_sees_nothing_is_not_judged_and_all_of_them_are_refused():
    query, key, value = qkv()
    mask = MASK.clone()
    mask[2] = False

    def uniform(query, key, value, attn_mask):  # as -1e9 in every place of the row does
        scores = scores_of(query, key).masked_fill(~attn_mask, -1e9)
        return scores.softmax(-1) @ value

    value[..., 0, :] = 50.0
    assert_convex(uniform, query, key, value, attn_mask=mask)
    with pytest.raises(ValueError, match="no query may see any key"):
        assert_convex(uniform, query, key, value, attn_mask=mask & False)


def test_the_tolerance_is_a_part_of_the_largest_visible_value():
    query, key, value = qkv()

    def attention(query, key, value):
        return 1.001 * plain(query, key, value)

    assert "allowed 1.0e-05" in message(attention, query, key, 0 * value + 1)
    assert_convex(attention, query, key, 1000 * value, tolerance=1.1e-3)
    with pytest.raises(ValueError, match="0 <= tolerance < 1"):
        assert_convex(attention, query, key, value, tolerance=1)


@pytest.mark.parametrize(
    "subject", [multihead(), encoder_layer(), SequenceModel(nn.Identity())], ids=["mha", "el", "sm"]
)
def test_what_projects_its_mean_is_refused_with_the_reason(subject):
    inputs = (randn(2, 5, 16),) * 3
    with pytest.raises(TypeError, match="is projected after the mean is taken"):
        assert_convex(subject, inputs[0])
    if not isinstance(subject, nn.TransformerEncoderLayer):
        with pytest.raises(TypeError, match="is projected after the mean is taken"):
            assert_convex(subject, *inputs)


def test_an_output_of_another_width_is_refused():
    with pytest.raises(
        ValueError, match=r"got \(2, 3, 6, 9\); accepted is .*, here \(2, 3, 6, 10\)"
    ):
        assert_convex(lambda *qkv: plain(*qkv)[..., :9], *qkv())


class WithState(nn.Module):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, query, key, value):
        self.calls += 1
        return plain(query, key, value) + 0 * self.dropout(value).sum() * torch.rand(())


def test_everything_is_left_as_it_was_found():
    module, inputs = WithState().train(), [t.requires_grad_() for t in qkv()]
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    assert_convex(module, *inputs, training=True)
    assert module.training
    assert module.calls == 0
    assert all(t.grad is None for t in inputs)
    assert not module._forward_hooks
    assert not module._forward_pre_hooks
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), str(np.random.get_state())) == states[1:]


def test_a_function_that_answers_at_random_is_refused_unless_that_is_wanted():
    def attention(query, key, value):
        return plain(query, key, value, dropout_p=0.5)

    with pytest.raises(ValueError, match="the subject is random"):
        assert_convex(attention, *qkv())
    assert "sum to" in message(attention, *qkv(), training=True)


@on_accelerators(DTYPES)
def test_attention_on_an_accelerator_passes(dtype, accelerator):
    query, key, value = (t.to(accelerator) for t in qkv(2, 4, 64, 300, 32, dtype=dtype))
    assert_convex(sdpa, query, key, value)
    assert_convex(sdpa, query, key, value, is_causal=True)
    assert_convex(
        sdpa, query, key, value, attn_mask=torch.ones(64, 300).tril(9).bool().to(accelerator)
    )


def test_a_mask_that_is_read_as_its_opposite_is_named():
    def opposite(query, key, value, attn_mask):
        return sdpa(query, key, value, ~attn_mask)

    keep = MASK.clone()
    keep[2, 1] = False
    words = "cause    the output is that of attention whose mask is inverted"
    assert words in message(opposite, *qkv(), attn_mask=keep)
    # Where one query may see all, it sees nothing under the opposite: its weights sum to nothing.
    assert words in message(opposite, *qkv(), attn_mask=MASK)


def test_autocast_is_held_to_its_dtype():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for seed in range(5):
            assert_convex(sdpa, *qkv(seed=seed), is_causal=True)
            assert_convex(lambda q, k, v: sdpa(q, k, v).float(), *qkv(seed=seed))
            assert_convex(plain, *qkv(seed=seed))
