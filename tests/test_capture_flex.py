"""Captured `flex_attention` against loops over its own score_mod and mask_mod."""

import pytest
import torch
from capture_oracles import (
    CLOSE,
    assert_weights,
    draw,
    plain_softmax,
    plain_weights,
    three,
    top_left,
)
from torch import nn
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from pytest_attnheat import capture_attention

pytestmark = pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")


def captured(*args, **kwargs):
    with capture_attention() as trace:
        output = flex_attention(*args, **kwargs)
    (record,) = trace
    assert record.source == "flex_attention"
    assert record.trusted
    assert record.residual <= record.tolerance
    return record, output


def by_loops(query, key, score_mod=None, mask_mod=None, scale=0.5):
    batch, heads, query_len, _ = query.shape
    group = heads // key.shape[1]
    scores = torch.empty(batch, heads, query_len, key.shape[2], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for q in range(query_len):
                for k in range(key.shape[2]):
                    score = (query[b, h, q].double() @ key[b, h // group, k].double()) * scale
                    at = [torch.tensor(number) for number in (b, h, q, k)]
                    if score_mod is not None:
                        score = score_mod(score, *at)
                    seen = mask_mod is None or bool(mask_mod(*at))
                    scores[b, h, q, k] = score if seen else -torch.inf
    return plain_softmax(scores)


def test_without_anything():
    query, key, value = three(2, 3)
    record, output = captured(query, key, value)
    assert_weights(record, plain_weights(query, key))
    assert record.mask is None
    assert torch.equal(record.output, output)


def test_its_own_scale():
    query, key, value = three(2, 3)
    record, _ = captured(query, key, value, scale=0.1)
    assert record.scale == pytest.approx(0.1)
    assert_weights(record, plain_weights(query, key, scale=0.1))


SLOPES = draw("slopes", 3)
LENGTHS = torch.tensor([7, 4])


def alibi(score, b, h, q, k):
    return score + SLOPES[h] * (k - q)


def soft_cap(score, b, h, q, k):
    return 2 * torch.tanh(score / 2)


def causal_by_score(score, b, h, q, k):
    return torch.where(q >= k, score, -float("inf"))


def of_batch(score, b, h, q, k):
    return score * (b + 1) + h


@pytest.mark.parametrize("score_mod", [alibi, soft_cap, causal_by_score, of_batch])
def test_what_a_score_mod_does_to_each_score(score_mod):
    query, key, value = three(2, 3)
    record, _ = captured(query, key, value, score_mod=score_mod)
    assert_weights(record, by_loops(query, key, score_mod))
    some = record.select(heads=[2, 0], queries=[3, 1])
    assert_weights(some, by_loops(query, key, score_mod)[:, [2, 0]][:, :, [3, 1]])


def causal(b, h, q, k):
    return q >= k


def padded(b, h, q, k):
    return k < LENGTHS[b]


def window_of_head(b, h, q, k):
    return (q - k).abs() <= h


@pytest.mark.parametrize(
    ("mask_mod", "of"),
    [(causal, (None, None)), (padded, (2, None)), (window_of_head, (None, 3)), (padded, (2, 3))],
)
def test_block_masks_of_batch_entries_and_heads(mask_mod, of):
    query, key, value = three(2, 3)
    blocks = create_block_mask(mask_mod, *of, 5, 7, device="cpu")
    record, _ = captured(query, key, value, block_mask=blocks)
    assert_weights(record, by_loops(query, key, mask_mod=mask_mod))
    expected = by_loops(query, key, mask_mod=mask_mod) > 0
    assert torch.equal(record.mask.expand(2, 3, 5, 7), expected)


def test_a_block_mask_that_hides_nothing_is_none():
    blocks = create_block_mask(lambda b, h, q, k: k < 9, None, None, 5, 7, device="cpu")
    record, _ = captured(*three(2, 3), block_mask=blocks)
    assert record.mask is None


def test_a_score_mod_and_a_block_mask_together():
    query, key, value = three(2, 3)
    blocks = create_block_mask(padded, 2, None, 5, 7, device="cpu")
    record, _ = captured(query, key, value, score_mod=alibi, block_mask=blocks)
    assert_weights(record, by_loops(query, key, alibi, padded))


def test_grouped_queries():
    query, key, value = three(2, 6, key_heads=2)
    record, _ = captured(query, key, value, score_mod=of_batch, enable_gqa=True)
    assert record.group == 3
    assert_weights(record, by_loops(query, key, of_batch))


def test_the_logarithm_of_the_sum_may_be_returned():
    query, key, value = three(2, 3)
    asked = {"return_lse": True}
    if hasattr(flex, "AuxRequest"):
        asked = {"return_aux": flex.AuxRequest(lse=True)}
    record, (output, total) = captured(query, key, value, **asked)
    total = getattr(total, "lse", total)
    assert torch.equal(record.output, output)
    expected = (query.double() @ key.double().mT / 2).logsumexp(-1)
    torch.testing.assert_close(total.double(), expected, **CLOSE)


def test_a_row_without_keys_is_zero():
    query, key, value = three(2, 3)
    blocks = create_block_mask(
        lambda b, h, q, k: (q != 2) & (k < 9), None, None, 5, 7, device="cpu"
    )
    record, output = captured(query, key, value, block_mask=blocks)
    assert record.weights[:, :, 2].abs().max() == 0
    assert output[:, :, 2].abs().max() == 0


def test_what_the_score_mod_reads_may_change_afterwards():
    query, key, value = three(2, 3)
    slopes = SLOPES.clone()

    def score_mod(score, b, h, q, k):
        return score + slopes[h] * (k - q)

    record, _ = captured(query, key, value, score_mod=score_mod)
    slopes.zero_()
    assert_weights(record, by_loops(query, key, alibi))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.projection = nn.Linear(4, 12)
        self.slopes = nn.Parameter(draw("slopes", 3))

    def forward(self, x):
        def score_mod(score, b, h, q, k):
            return score + self.slopes[h] * (k - q)

        q, k, v = self.projection(x).chunk(3, -1)
        return flex_attention(*(t[:, None].expand(-1, 3, -1, -1).contiguous() for t in (q, k, v)),
                              score_mod=score_mod)  # fmt: skip


def test_a_parameter_in_the_score_mod_may_be_trained_afterwards():
    model, x = Model(), draw("x", 2, 5, 4)
    with torch.no_grad(), capture_attention(model) as trace:
        model(x)
    expected = trace[0].weights
    assert not expected.requires_grad
    with torch.no_grad():
        model.slopes.mul_(2)
    assert torch.equal(trace[0].weights, expected)


def test_compiled_flex_attention_is_set_aside():
    query, key, value = three(2, 3)
    compiled = torch.compile(flex_attention, backend="eager")
    before = compiled(query, key, value, score_mod=alibi)
    with capture_attention() as trace:
        output = compiled(query, key, value, score_mod=alibi)
    torch.testing.assert_close(output, before)
    assert_weights(trace[0], by_loops(query, key, alibi))
    torch.testing.assert_close(compiled(query, key, value, score_mod=alibi), before)


def test_statistics_and_weights_may_be_kept():
    query, key, value = three(2, 3)
    expected = by_loops(query, key, alibi)
    for keep in ("weights", "statistics"):
        with capture_attention(keep=keep) as trace:
            flex_attention(query, key, value, score_mod=alibi)
        if keep == "weights":
            assert_weights(trace[0], expected)
        else:
            found = trace[0].statistics.maximum.double()
            torch.testing.assert_close(found, expected.amax(-1), **CLOSE)


def test_the_causal_mask_of_unequal_lengths_is_what_mask_mod_says():
    query, key, value = three(2, 3)
    blocks = create_block_mask(causal, None, None, 5, 7, device="cpu")
    record, _ = captured(query, key, value, block_mask=blocks)
    assert torch.equal(record.mask[0, 0], top_left(5, 7))
