"""Captured attention that is written out, in the spellings that people use."""

import math

import pytest
import torch
from capture_oracles import assert_weights, bottom_right, draw, plain_softmax, plain_weights, three
from torch import nn
from torch.nn import functional as F  # noqa: N812

from pytest_attnheat import capture_attention, check_attention, diagnose

QUERY, KEY, VALUE = three(2, 3)
MASK = draw("mask", 2, 1, 5, 7) > -0.5
PADDED = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])[:, None, None, :]


def captured(function, *args, **kwargs):
    with capture_attention() as trace:
        output = function(*args, **kwargs)
    (record,) = trace
    assert record.trusted
    assert record.residual <= record.tolerance
    return record, output


# --- spellings of the same attention


def with_at(q, k, v):
    return (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1) @ v


def with_matmul(q, k, v):
    scores = torch.matmul(q, k.mT) * q.size(-1) ** -0.5
    return torch.matmul(F.softmax(scores, dim=-1), v)


def with_keywords(q, k, v):
    scores = torch.matmul(input=q * 0.5, other=k.transpose(2, 3))
    return torch.matmul(input=torch.softmax(input=scores, dim=3), other=v)


def with_bmm(q, k, v):
    b, h = q.shape[:2]
    q, k, v = (t.reshape(b * h, *t.shape[2:]) for t in (q, k, v))
    weights = torch.softmax(torch.bmm(q, k.transpose(1, 2)) * 0.5, -1)
    return torch.bmm(weights, v).view(b, h, *q.shape[1:2], -1)


def with_baddbmm(q, k, v):
    b, h = q.shape[:2]
    q, k, v = (t.reshape(b * h, *t.shape[2:]) for t in (q, k, v))
    start = torch.zeros(b * h, q.shape[1], k.shape[1])
    weights = torch.baddbmm(start, q, k.mT, beta=1, alpha=0.5).softmax(-1)
    return torch.bmm(weights, v).unflatten(0, (b, h))


def with_einsum(q, k, v):
    weights = torch.einsum("bhid,bhjd->bhij", q, k).mul(0.5).softmax(-1)
    return torch.einsum("bhij,bhjd->bhid", weights, v)


def with_einsum_in_another_order(q, k, v):
    scores = torch.einsum("bhjd, bhid -> bhji", k, q) * 0.5
    return torch.einsum("bhjd,bhji->bhid", v, scores.softmax(dim=2))


def with_einsum_that_moves_heads(q, k, v):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    weights = torch.einsum("blhe,bshe->bhls", q, k).mul(0.5).softmax(-1)
    return torch.einsum("bhls,bshd->blhd", weights, v).transpose(1, 2)


def with_ellipses(q, k, v):
    weights = torch.einsum("...id,...jd->...ij", q, k).div(2).softmax(-1)
    return torch.einsum("...ij,...jd->...id", weights, v)


def with_operands_in_a_list(q, k, v):
    weights = torch.einsum("bhid,bhjd->bhij", [q, k]).div(2).softmax(-1)
    return torch.einsum("bhij,bhjd->bhid", [weights, v])


def with_queries_last(q, k, v):
    scores = k @ q.mT * 0.5
    return (v.mT @ scores.softmax(-2)).mT


def from_the_right(q, k, v):
    weights = (q @ k.mT / 2).softmax(-1)
    return (v.mT @ weights.mT).mT


def with_scaled_queries(q, k, v):
    return (q * 0.5 @ k.mT).softmax(-1) @ v


def in_float32(q, k, v):
    weights = F.softmax((q @ k.mT * 0.5).float(), dim=-1, dtype=torch.float32).to(q.dtype)
    return weights @ v


def in_place(q, k, v):
    scores = q @ k.mT
    scores /= 2
    scores += 0
    return torch.softmax(scores, -1, out=scores) @ v if not q.requires_grad else None


def into_given_memory(q, k, v):
    scores = torch.empty(*q.shape[:-1], k.shape[-2])
    torch.matmul(q, k.mT, out=scores)
    scores.mul_(0.5)
    torch.softmax(scores, -1, out=scores)
    return torch.matmul(scores, v, out=torch.empty(*q.shape[:-1], v.shape[-1]))


def with_the_maximum_subtracted(q, k, v):
    scores = q @ k.mT * 0.5
    shares = (scores - scores.amax(-1, keepdim=True)).exp()
    return shares / shares.sum(-1, keepdim=True) @ v


def with_log_softmax(q, k, v):
    return F.log_softmax(q @ k.mT * 0.5, -1).exp() @ v


def with_nan_to_num(q, k, v):
    return torch.nan_to_num((q @ k.mT * 0.5).softmax(-1)) @ v


def head_by_head(q, k, v):
    return torch.stack([with_at(q[:, h], k[:, h], v[:, h]) for h in range(q.shape[1])], 1)


SPELLINGS = (
    with_at, with_matmul, with_keywords, with_bmm, with_baddbmm, with_einsum,
    with_einsum_in_another_order, with_einsum_that_moves_heads, with_ellipses,
    with_operands_in_a_list, with_queries_last, from_the_right, with_scaled_queries, in_float32,
    in_place, into_given_memory, with_the_maximum_subtracted, with_log_softmax, with_nan_to_num,
)  # fmt: skip


@pytest.mark.parametrize("attend", SPELLINGS, ids=lambda f: f.__name__)
def test_every_spelling(attend):
    record, output = captured(attend, QUERY, KEY, VALUE)
    expected = plain_weights(QUERY, KEY)
    assert record.shape == (2, 3, 5, 7)
    assert_weights(record, expected)
    torch.testing.assert_close(output, (expected @ VALUE.double()).float())
    torch.testing.assert_close(record.output, output)
    torch.testing.assert_close(record.value, VALUE)


@pytest.mark.parametrize("attend", SPELLINGS, ids=lambda f: f.__name__)
def test_what_a_record_tells_of_queries_keys_and_scale_makes_its_weights(attend):
    record, _ = captured(attend, QUERY, KEY, VALUE)
    assert record.scale == 0.5
    assert_weights(record, plain_weights(record.query, record.key, scale=record.scale))


def test_heads_one_by_one_are_records_of_one_head():
    with capture_attention() as trace:
        head_by_head(QUERY, KEY, VALUE)
    assert [record.shape for record in trace] == [(2, 1, 5, 7)] * 3
    for head, record in enumerate(trace):
        assert_weights(record, plain_weights(QUERY, KEY)[:, head : head + 1])


def test_one_attention_without_batch_and_heads():
    record, _ = captured(with_at, QUERY[0, 0], KEY[0, 0], VALUE[0, 0])
    assert record.shape == (1, 1, 5, 7)
    assert_weights(record, plain_weights(QUERY[0, 0], KEY[0, 0])[None, None])


def test_a_query_without_an_axis_of_its_own():
    def attend(q, k, v):
        weights = torch.einsum("bhd,bhjd->bhj", q, k).mul(0.5).softmax(-1)
        return torch.einsum("bhj,bhjd->bhd", weights, v)

    record, _ = captured(attend, QUERY[:, :, 0], KEY, VALUE)
    assert record.shape == (2, 3, 1, 7)
    assert_weights(record, plain_weights(QUERY[:, :, :1], KEY))


@pytest.mark.parametrize("style", ["matmul", "einsum", "value first"])
def test_grouped_queries_in_five_axes(style):
    query, key, value = three(2, 6, key_heads=2)
    expected = plain_weights(query, key)

    def attend(q, k, v):
        q = q.unflatten(1, (2, 3))
        if style == "matmul":
            weights = (q @ k.unsqueeze(2).mT * 0.5).softmax(-1)
            return (weights @ v.unsqueeze(2)).flatten(1, 2)
        weights = torch.einsum("bgrid,bgjd->bgrij", q, k).mul(0.5).softmax(-1)
        if style == "value first":
            return torch.einsum("bgjd,bgrij->bgrid", v, F.dropout(weights, 0.3)).flatten(1, 2)
        return torch.einsum("bgrij,bgjd->bgrid", weights, v).flatten(1, 2)

    record, output = captured(attend, query, key, value)
    assert record.shape == (2, 6, 5, 7)
    assert_weights(record, expected)
    torch.testing.assert_close(record.output, output)
    # Values may be shared by other heads than keys are, as far as the capture sees.
    assert style == "value first" or diagnose(record).healthy  # not with dropout


def test_grouped_keys_that_were_repeated():
    query, key, value = three(2, 6, key_heads=2)
    record, _ = captured(with_at, query, key.repeat_interleave(3, 1), value.repeat_interleave(3, 1))
    assert_weights(record, plain_weights(query, key))


# --- masks and biases


def hidden_by_masked_fill(scores):
    return scores.masked_fill(~MASK, -torch.inf)


def hidden_in_place(scores):
    return scores.masked_fill_(mask=~MASK, value=torch.finfo(scores.dtype).min)


def hidden_by_where(scores):
    return torch.where(MASK, scores, torch.tensor(-1e9))


def hidden_by_where_of_the_other(scores):
    return torch.where(~MASK, torch.full_like(scores, -torch.inf), scores)


def hidden_by_where_of_a_number(scores):
    return torch.where(MASK, scores, float("-inf"))


def hidden_by_adding(scores):
    return scores + (~MASK) * -1e9


def hidden_by_adding_in_place(scores):
    return scores.add_(torch.zeros(2, 1, 5, 7).masked_fill_(~MASK, -torch.inf))


def hidden_by_adding_to_a_mask(scores):
    return torch.zeros(2, 1, 5, 7).masked_fill(~MASK, -torch.inf) + scores


def hidden_by_an_index(scores):
    scores[~MASK.expand_as(scores)] = -torch.inf
    return scores


def hidden_twice(scores):
    left, right = MASK.clone(), MASK.clone()
    left[..., :4] = True
    right[..., 4:] = True
    return scores.masked_fill(~left, -1e4 * 9).masked_fill(~right, -1e4 * 9)


@pytest.mark.parametrize("hide", [
    hidden_by_masked_fill, hidden_in_place, hidden_by_where, hidden_by_where_of_the_other,
    hidden_by_where_of_a_number, hidden_by_adding, hidden_by_adding_in_place,
    hidden_by_adding_to_a_mask, hidden_by_an_index, hidden_twice,
], ids=lambda f: f.__name__)  # fmt: skip
def test_a_mask_however_it_is_written(hide):
    def attend(q, k, v):
        return hide(q @ k.mT / 2).softmax(-1) @ v

    record, _ = captured(attend, QUERY, KEY, VALUE)
    assert_weights(record, plain_weights(QUERY, KEY, allowed=MASK))
    assert record.mask is not None
    assert torch.equal(record.mask.expand(2, 3, 5, 7), MASK.expand(2, 3, 5, 7))


def test_a_mask_that_is_an_additive_tensor_of_an_earlier_scale():
    def attend(q, k, v):
        return ((q @ k.mT + MASK.logical_not() * -1e9) / 2).softmax(-1) @ v

    record, _ = captured(attend, QUERY, KEY, VALUE)
    assert torch.equal(record.mask.expand(2, 3, 5, 7), MASK.expand(2, 3, 5, 7))
    assert record.scale == 0.5


def test_alibi():
    slopes = torch.tensor([0.5, 0.25, 0.125]).view(3, 1, 1)
    bias = slopes * (torch.arange(7) - torch.arange(5)[:, None])

    def attend(q, k, v):
        return (q @ k.mT / 2 + bias).softmax(-1) @ v

    record, _ = captured(attend, QUERY, KEY, VALUE)
    assert_weights(record, plain_weights(QUERY, KEY, bias=bias))
    assert record.mask is None
    assert torch.equal(record.bias, bias.unsqueeze(0))


def test_causality_of_a_buffer():
    seen = bottom_right(5, 7)

    def attend(q, k, v):
        scores = q @ k.mT / 2
        return scores.masked_fill(seen[None, None, : q.shape[2]] == 0, -torch.inf).softmax(-1) @ v

    record, _ = captured(attend, QUERY, KEY, VALUE)
    assert torch.equal(record.mask[0, 0], seen)


def test_a_cap_of_scores():
    def attend(q, k, v):
        return (torch.tanh(q @ k.mT / 2 / 3) * 3).softmax(-1) @ v

    record, _ = captured(attend, QUERY, KEY, VALUE)
    scores = torch.tanh(QUERY.double() @ KEY.double().mT / 6) * 3
    assert_weights(record, plain_softmax(scores))
    assert (record.scale, record.softcap) == (0.5, 3.0)


MOVES = {
    "flip": lambda scores: scores.flip(2),
    "index": lambda scores: scores[:, :, [4, 2, 0, 1, 3]],
    "roll": lambda scores: scores.roll(1, -1),
    "index_select": lambda scores: scores.index_select(1, torch.tensor([2, 0, 1])),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_scores_that_were_moved_move_queries_keys_and_masks(move):
    def attend(q, k, v):
        return move((q @ k.mT / 2).masked_fill(~MASK, -torch.inf)).softmax(-1) @ v

    record, _ = captured(attend, QUERY, KEY, VALUE)
    scores = (QUERY @ KEY.mT / 2).masked_fill(~MASK, -torch.inf)
    assert_weights(record, plain_softmax(move(scores)))
    again = plain_weights(record.query, record.key, allowed=record.mask, scale=record.scale)
    assert_weights(record, again)


def test_a_mask_in_a_layout_of_windows_is_told_in_that_of_the_weights():
    windows = MASK[:, :1].view(1, 2, 1, 5, 7)

    def attend(q, k, v):
        scores = (q @ k.mT / 2).view(1, 2, 3, 5, 7).masked_fill(~windows, -torch.inf)
        return scores.view(2, 3, 5, 7).softmax(-1) @ v

    record, _ = captured(attend, QUERY, KEY, VALUE)
    assert_weights(record, plain_weights(QUERY, KEY, allowed=MASK))
    assert torch.equal(record.mask.expand(2, 3, 5, 7), MASK.expand(2, 3, 5, 7))
    assert record.scale == 0.5


# --- what people get wrong is recorded as it is


def test_a_softmax_over_the_wrong_axis_is_what_is_recorded():
    def attend(q, k, v):
        return (q @ k.mT / 2).softmax(2) @ v

    record, _ = captured(attend, QUERY, KEY, VALUE)
    assert_weights(record, plain_softmax((QUERY @ KEY.mT / 2).mT).mT)
    assert_column_sums = record.weights.sum(-2)
    torch.testing.assert_close(assert_column_sums, torch.ones(2, 3, 7))


def test_a_scale_after_the_softmax_is_what_is_recorded():
    def attend(q, k, v):
        return (q @ k.mT).softmax(-1) / 2 @ v

    record, _ = captured(attend, QUERY, KEY, VALUE)
    assert_weights(record, plain_weights(QUERY, KEY, scale=1.0) / 2)


def test_a_mask_after_the_softmax_is_what_is_recorded():
    def attend(q, k, v):
        return (q @ k.mT / 2).softmax(-1).masked_fill(~MASK, 0.0) @ v

    record, _ = captured(attend, QUERY, KEY, VALUE)
    assert_weights(record, plain_weights(QUERY, KEY) * MASK)


# --- what comes after the softmax


@pytest.mark.parametrize("spelling", ["function", "module", "in place", "einsum", "torch", "cast"])
def test_weights_are_those_before_dropout(spelling):
    def attend(q, k, v):
        weights = (q @ k.mT / 2).softmax(-1)
        if spelling == "function":
            return F.dropout(weights, 0.5) @ v
        if spelling == "in place":
            return nn.Dropout(0.5, inplace=True)(weights) @ v
        if spelling == "torch":
            return torch.dropout(weights, 0.5, True) @ v
        if spelling == "cast":
            return F.dropout(weights.double(), p=0.5, training=True).float() @ v
        dropped = nn.Dropout(0.5)(weights)
        if spelling == "module":
            return dropped @ v
        return torch.einsum("bhij,bhjd->bhid", dropped, v)

    torch.manual_seed(5)
    record, _ = captured(attend, QUERY, KEY, VALUE)
    assert record.dropout == 0.5
    assert_weights(record, plain_weights(QUERY, KEY))


def test_dropout_that_does_nothing_is_none():
    def attend(q, k, v):
        return F.dropout((q @ k.mT / 2).softmax(-1), 0.5, training=False) @ v

    assert captured(attend, QUERY, KEY, VALUE)[0].dropout == 0


def test_head_masks_belong_to_the_weights():
    mask = torch.tensor([1.0, 0.0, 0.5]).view(1, 3, 1, 1)

    def attend(q, k, v):
        return (q @ k.mT / 2).softmax(-1) * mask @ v

    record, _ = captured(attend, QUERY, KEY, VALUE)
    assert_weights(record, plain_weights(QUERY, KEY) * mask)


@pytest.mark.parametrize("in_place", [False, True])
def test_head_masks_after_dropout_belong_to_the_weights_and_dropout_does_not(in_place):
    mask = torch.tensor([1.0, 0.0, 0.5]).view(1, 3, 1, 1)

    def attend(q, k, v):
        weights = F.dropout((q @ k.mT / 2).softmax(-1), 0.5)
        return (weights.mul_(mask) if in_place else weights * mask) @ v

    torch.manual_seed(5)
    record, _ = captured(attend, QUERY, KEY, VALUE)
    assert record.dropout == 0.5
    assert_weights(record, plain_weights(QUERY, KEY) * mask)


def test_a_gate_behind_attention_does_not_disturb():
    gate = draw("gate", 2, 3, 5, 5)

    def attend(q, k, v):
        return with_at(q, k, v) * torch.sigmoid(gate)

    record, _ = captured(attend, QUERY, KEY, VALUE)
    assert_weights(record, plain_weights(QUERY, KEY))


def test_weights_that_were_joined_for_the_product():
    def attend(q, k, v):
        weights = (q @ k.mT / 2).masked_fill(~MASK, -torch.inf).softmax(-1).view(6, 5, 7)
        return torch.bmm(weights, v.reshape(6, 7, 5))

    record, _ = captured(attend, QUERY, KEY, VALUE)
    assert record.shape == (2, 3, 5, 7)
    assert_weights(record, plain_weights(QUERY, KEY, allowed=MASK))
    assert torch.equal(record.mask, MASK.expand(2, 3, 5, 7))
    assert torch.equal(record.query, QUERY)


def test_a_sink_that_is_cut_off_leaves_rows_below_one():
    def attend(q, k, v):
        scores = torch.cat([q @ k.mT / 2, torch.ones(2, 3, 5, 1)], -1)
        return F.dropout(scores.softmax(-1)[..., :-1], 0.3) @ v

    record, _ = captured(attend, QUERY, KEY, VALUE)
    scores = torch.cat([QUERY @ KEY.mT / 2, torch.ones(2, 3, 5, 1)], -1)
    assert_weights(record, plain_softmax(scores)[..., :-1])
    assert record.shape == (2, 3, 5, 7)
    assert torch.equal(record.query, QUERY)
    assert torch.equal(record.sinks, torch.ones(3))
    torch.testing.assert_close(record.sink_weights, 1 - record.weights.sum(-1))


def test_dropout_before_the_sink_is_cut_off():
    def attend(q, k, v):
        scores = torch.cat([q @ k.mT / 2, torch.ones(2, 3, 5, 1)], -1)
        return F.dropout(scores.softmax(-1), 0.3)[..., :-1] @ v

    record, _ = captured(attend, QUERY, KEY, VALUE)
    scores = torch.cat([QUERY @ KEY.mT / 2, torch.ones(2, 3, 5, 1)], -1)
    assert record.dropout == 0.3
    assert_weights(record, plain_softmax(scores)[..., :-1])
    torch.testing.assert_close(record.sink_weights, 1 - record.weights.sum(-1))


@pytest.mark.parametrize("dropping", [0.0, 0.3])
def test_heads_that_were_computed_apart_and_stacked(dropping):
    def attend(q, k, v):
        each = [(q[:, h] @ k[:, h].mT / 2).softmax(-1) for h in range(3)]
        return torch.stack([F.dropout(one, dropping) for one in each], 1) @ v

    record, _ = captured(attend, QUERY, KEY, VALUE)
    assert record.dropout == dropping
    assert_weights(record, plain_weights(QUERY, KEY))


MIXING = nn.Parameter(draw("mixing", 3, 3))
MIXINGS = {
    "einsum": lambda w: torch.einsum("hg,bgij->bhij", MIXING, w),
    "einsum, weights first": lambda w: torch.einsum("bgij,hg->bhij", w, MIXING),
    "linear": lambda w: F.linear(w.permute(0, 2, 3, 1), MIXING).permute(0, 3, 1, 2),
    "convolution": lambda w: F.conv2d(w, MIXING[:, :, None, None]),
}


@pytest.mark.parametrize("mix", MIXINGS.values(), ids=MIXINGS)
def test_heads_that_talk_to_one_another_after_the_softmax(mix):
    def attend(q, k, v):
        return mix((q @ k.mT / 2).softmax(-1)) @ v

    record, _ = captured(attend, QUERY, KEY, VALUE)
    expected = torch.einsum("hg,bgij->bhij", MIXING.double(), plain_weights(QUERY, KEY))
    assert_weights(record, expected.detach(), atol=3e-6, rtol=0)
    assert record.kind == "mixed"
    assert check_attention(record).passed  # rows need not sum to 1


def test_the_difference_of_two_softmaxes_is_no_softmax_of_either():
    def attend(q, k, v):
        weights = (q @ k.mT / 2).softmax(-1).unflatten(1, (2, 2))
        return (weights[:, :, 0] - 0.4 * weights[:, :, 1]) @ v[:, :2]

    query, key, value = three(2, 4)
    record, _ = captured(attend, query, key, value)
    first, second = plain_weights(query, key).unflatten(1, (2, 2)).unbind(2)
    assert_weights(record, first - 0.4 * second)
    assert record.kind == "mixed"
    assert check_attention(record).passed


@pytest.mark.parametrize("side", ["left", "right"])
def test_one_query_and_nothing_else(side):
    def attend(q, k, v):
        weights = (k @ q / 2).softmax(-1)
        return weights @ v if side == "left" else v.mT @ weights

    record, _ = captured(attend, QUERY[0, 0, 0], KEY[0, 0], VALUE[0, 0])
    assert record.shape == (1, 1, 1, 7)
    assert_weights(record, plain_weights(QUERY[0, 0, :1], KEY[0, 0])[None, None])


# --- weights by other means


def test_sigmoid_attention():
    def attend(q, k, v):
        return torch.sigmoid(q @ k.mT / 2 - math.log(7)) @ v

    record, _ = captured(attend, QUERY, KEY, VALUE)
    assert record.source == "sigmoid"
    assert_weights(record, torch.sigmoid(QUERY.double() @ KEY.double().mT / 2 - math.log(7)))


def sparse_by_loops(scores):
    """The projection onto distributions, one row at a time."""
    rows = []
    for row in scores.double().reshape(-1, scores.shape[-1]).tolist():
        falling, total, threshold = sorted(row, reverse=True), 0.0, 0.0
        for count, score in enumerate(falling, 1):
            total += score
            if 1 + count * score > total:
                threshold = (total - 1) / count
        rows.append([max(score - threshold, 0.0) for score in row])
    return torch.tensor(rows, dtype=torch.float64).view(scores.shape)


def sparsemax(scores):
    falling = scores.sort(-1, descending=True).values
    total = falling.cumsum(-1)
    counts = torch.arange(1, scores.shape[-1] + 1)
    support = (1 + counts * falling > total).sum(-1, keepdim=True)
    threshold = (total.gather(-1, support - 1) - 1) / support
    return (scores - threshold).clamp(min=0)


class SparseMax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores):
        return sparsemax(scores)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


@pytest.mark.parametrize("function", [sparsemax, SparseMax.apply], ids=["written", "a Function"])
@pytest.mark.parametrize("dropping", [False, True])
def test_sparse_attention(function, dropping):
    def attend(q, k, v):
        return F.dropout(function(q @ k.mT / 2), 0.3, training=dropping) @ v

    torch.manual_seed(5)
    record, _ = captured(attend, QUERY, KEY, VALUE)
    assert record.source == "rows that sum to 1"
    assert_weights(record, sparse_by_loops(QUERY.double() @ KEY.double().mT / 2))


def test_additive_attention():
    torch.manual_seed(3)
    left, right, out = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 1)

    def attend(q, k, v):
        scores = out(torch.tanh(left(q).unsqueeze(-2) + right(k).unsqueeze(-3))).squeeze(-1)
        return scores.softmax(-1) @ v, scores

    record, (_, scores) = captured(attend, QUERY, KEY, VALUE)
    assert_weights(record, plain_softmax(scores), atol=1e-6, rtol=0)
    assert record.query is None


def test_attention_pooling():
    torch.manual_seed(3)
    score = nn.Linear(4, 1)
    x = draw("x", 2, 7, 4)

    def pool(x):
        return (score(x).softmax(dim=1).mT @ x).squeeze(1)

    record, _ = captured(pool, x)
    assert record.shape == (2, 1, 1, 7)
    assert_weights(record, plain_softmax(score(x).mT).unsqueeze(1))


def test_pooling_with_heads_by_einsum():
    torch.manual_seed(3)
    score = nn.Linear(4, 3)
    x = draw("x", 2, 7, 4)

    def pool(x):
        return torch.einsum("blh,bld->bhd", score(x).softmax(dim=1), x)

    record, _ = captured(pool, x)
    assert record.shape == (2, 1, 3, 7)
    assert_weights(record, plain_softmax(score(x).mT).unsqueeze(1))


def test_an_attention_made_of_products_without_a_softmax_is_none():
    with capture_attention(allow_empty=True) as trace:
        QUERY @ KEY.mT @ VALUE
    assert len(trace) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [False, True], ids=["written", "fused"])
def test_a_factor_of_query_and_key_is_one_of_the_scores(fused, dtype):
    query, key, value = (torch.randn(2, 4, 5, 12, dtype=dtype) for _ in range(3))
    with capture_attention() as trace:
        scaled, small = 12**-0.25 * query.transpose(1, 2).transpose(1, 2), key / 12**0.25
        if fused:
            torch.nn.functional.scaled_dot_product_attention(scaled, small, value, scale=1.0)
        else:
            (scaled @ small.mT).softmax(-1) @ value
    (record,) = trace
    assert record.scale == pytest.approx(12**-0.5)
    torch.testing.assert_close(record.query, query, check_dtype=False)
    torch.testing.assert_close(record.key, key, check_dtype=False)
    expected = (query.double() @ key.double().mT * 12**-0.5).softmax(-1)
    bound = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(record.weights.double(), expected, rtol=0, atol=bound)


def test_a_bias_that_was_added_while_batch_and_heads_were_one_axis_is_told():
    query, key, value = (torch.randn(2, 4, 5, 8) for _ in range(3))
    bias = torch.randn(8, 1, 5)
    with capture_attention() as trace:
        scores = bias.baddbmm(
            batch1=query.flatten(0, 1), batch2=key.flatten(0, 1).mT, beta=1.0, alpha=0.5
        )
        scores.view(2, 4, 5, 5).softmax(-1) @ value
    (record,) = trace
    assert record.scale == 0.5
    assert torch.equal(record.bias, bias.view(2, 4, 1, 5))
