"""Captured `scaled_dot_product_attention` against exp and sums in float64."""

import pytest
import torch
from capture_oracles import assert_weights, bottom_right, draw, plain_weights, three, top_left
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.nn.functional import scaled_dot_product_attention

from pytest_attnheat import capture_attention
from pytest_attnheat.attention import blocks
from pytest_attnheat.attention.vocabulary import permits


def captured(*args, **kwargs):
    with capture_attention(keep="inputs") as trace:
        F.scaled_dot_product_attention(*args, **kwargs)
    (record,) = trace
    assert record.source == "scaled_dot_product_attention"
    assert record.trusted
    assert record.residual <= record.tolerance
    return record


def test_without_a_mask():
    query, key, value = three(2, 3)
    record = captured(query, key, value)
    assert_weights(record, plain_weights(query, key))
    assert record.shape == record.shape_here == (2, 3, 5, 7)
    assert record.mask is None
    assert record.scale == 0.5
    assert torch.equal(record.query, query)
    assert torch.equal(record.key, key)
    assert torch.equal(record.value, value)
    assert torch.equal(record.output, F.scaled_dot_product_attention(query, key, value))


MASKS = {
    "of all": (2, 3, 5, 7), "of batch entries": (2, 1, 5, 7), "of heads": (1, 3, 5, 7),
    "of padding": (2, 1, 1, 7), "of pairs": (5, 7), "of three axes": (3, 5, 7),
    "of keys": (1, 7), "of queries": (2, 3, 5, 1),
}  # fmt: skip


@pytest.mark.parametrize("shape", MASKS.values(), ids=MASKS)
def test_a_boolean_mask_is_true_where_a_query_may_attend(shape):
    query, key, value = three(2, 3)
    mask = draw("mask", *shape) > -0.3
    record = captured(query, key, value, mask)
    assert_weights(record, plain_weights(query, key, allowed=mask))
    assert torch.equal(record.mask.expand(2, 3, 5, 7), mask.expand(2, 3, 5, 7))


@pytest.mark.parametrize("block", [14, 70, 105])
def test_weights_are_made_in_blocks_of_any_size(monkeypatch, block):
    """Of some queries of one head, or of some heads and all their queries."""
    monkeypatch.setattr(blocks, "_BLOCK", block)
    monkeypatch.setattr(blocks, "_ROWS", 1)
    query, key, value = three(2, 6, key_heads=2)
    for shape in ((2, 1, 5, 7), (2, 1, 1, 7), (1, 6, 5, 7)):
        mask = draw("mask", *shape) > -0.3
        record = captured(query, key, value, mask, enable_gqa=True)
        assert_weights(record, plain_weights(query, key, allowed=mask))
    record = captured(query, key, value, is_causal=True, enable_gqa=True)
    assert_weights(record, plain_weights(query, key, allowed=top_left(5, 7)))
    assert record.compute_weights(torch.float64, batch=1).shape == (1, 6, 5, 7)


@pytest.mark.parametrize("shape", MASKS.values(), ids=MASKS)
def test_a_float_mask_is_added(shape):
    query, key, value = three(2, 3)
    bias = draw("bias", *shape)
    hidden = draw("mask", *shape) < -0.8
    bias[hidden] = -torch.inf
    record = captured(query, key, value, attn_mask=bias)
    assert_weights(record, plain_weights(query, key, bias=bias.expand(2, 3, 5, 7)))
    assert torch.equal(record.mask.expand(2, 3, 5, 7), ~hidden.expand(2, 3, 5, 7))


def test_a_bias_that_hides_nothing_is_no_mask():
    record = captured(*three(2, 3), attn_mask=draw("bias", 5, 7))
    assert record.mask is None
    assert record.bias.shape == (1, 1, 5, 7)


def test_the_smallest_number_of_a_dtype_hides_a_key():
    query, key, value = three(2, 3)
    bias = torch.zeros(5, 7).masked_fill(~top_left(5, 7), torch.finfo(torch.float32).min)
    record = captured(query, key, value, attn_mask=bias)
    assert torch.equal(record.mask[0, 0], top_left(5, 7))


def test_a_row_that_may_attend_to_nothing_is_zero():
    query, key, value = three(2, 3)
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[2] = False
    record = captured(query, key, value, attn_mask=mask)
    assert record.weights[:, :, 2].abs().max() == 0
    assert_weights(record, plain_weights(query, key, allowed=mask))


@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (3, 7), (7, 3), (1, 6)])
def test_causal_is_top_left_whatever_the_lengths(queries, keys):
    query, key, value = three(2, 3, queries=queries, keys=keys)
    record = captured(query, key, value, is_causal=True)
    assert record.causal == "top_left"
    assert torch.equal(record.mask, top_left(queries, keys))
    assert_weights(record, plain_weights(query, key, allowed=top_left(queries, keys)))


@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (3, 7)])
def test_causal_biases_tell_their_alignment(queries, keys):
    query, key, value = three(2, 3, queries=queries, keys=keys)
    record = captured(query, key, value, causal_lower_right(queries, keys))
    assert record.causal == "bottom_right"
    assert_weights(record, plain_weights(query, key, allowed=bottom_right(queries, keys)))
    record = captured(query, key, value, attn_mask=causal_upper_left(queries, keys))
    assert record.causal == "top_left"
    assert_weights(record, plain_weights(query, key, allowed=top_left(queries, keys)))


@pytest.mark.parametrize("scale", [0.1, 1.0, 0.0, -2.0])
def test_the_scale_that_was_given(scale):
    query, key, value = three(2, 3)
    record = captured(query, key, value, scale=scale)
    assert record.scale == scale
    assert_weights(record, plain_weights(query, key, scale=scale))


@pytest.mark.parametrize("key_heads", [1, 2, 6])
def test_grouped_queries_share_keys(key_heads):
    query, key, value = three(2, 6, key_heads=key_heads)
    record = captured(query, key, value, enable_gqa=True)
    assert record.group == 6 // key_heads
    assert record.key.shape[1] == key_heads
    assert_weights(record, plain_weights(query, key))


def test_grouped_queries_with_masks_of_heads_and_causality():
    query, key, value = three(2, 6, queries=5, keys=5, key_heads=2)
    mask = draw("mask", 2, 6, 5, 5) > -0.5
    record = captured(query, key, value, mask, enable_gqa=True)
    assert_weights(record, plain_weights(query, key, allowed=mask))
    record = captured(query, key, value, is_causal=True, enable_gqa=True)
    assert_weights(record, plain_weights(query, key, allowed=top_left(5, 5)))


def test_grouped_queries_without_a_batch_axis():
    query, key, value = three(6, key_heads=2)
    record = captured(query, key, value, enable_gqa=True)
    assert record.shape == (1, 6, 5, 7)
    assert_weights(record, plain_weights(query, key).unsqueeze(0))


@pytest.mark.parametrize(
    ("lead", "shape"),
    [((), (1, 1)), ((3,), (3, 1)), ((2, 3), (2, 3)), ((2, 3, 4), (2, 12)), ((2, 1, 3, 4), (2, 12))],
)
def test_any_number_of_leading_axes(lead, shape):
    query, key, value = three(*lead)
    record = captured(query, key, value)
    assert record.shape == (*shape, 5, 7)
    assert_weights(record, plain_weights(query, key).reshape(*shape, 5, 7))
    mask = draw("mask", *lead, 5, 7) > -0.5
    record = captured(query, key, value, mask)
    assert_weights(record, plain_weights(query, key, allowed=mask).reshape(*shape, 5, 7))


def test_a_mask_of_fewer_axes_than_five():
    query, key, value = three(2, 3, 4)
    mask = draw("mask", 3, 1, 5, 7) > -0.5
    record = captured(query, key, value, mask)
    assert_weights(record, plain_weights(query, key, allowed=mask).reshape(2, 12, 5, 7))


def test_batch_and_heads_that_were_joined_are_read_apart():
    query, key, value = three(2, 3)
    joined = [tensor.reshape(6, *tensor.shape[2:]) for tensor in (query, key, value)]
    with capture_attention() as trace:
        F.scaled_dot_product_attention(query.view(6, 5, 4), key.flatten(0, 1), value.flatten(0, 1))
    assert trace[0].shape == (2, 3, 5, 7)
    assert_weights(trace[0], plain_weights(query, key))
    # Joined before the capture, nobody can tell.
    assert captured(*joined).shape == (6, 1, 5, 7)


@pytest.mark.parametrize("shape", [(3, 7), (1, 7), (2, 1, 1, 7), (2, 2, 3, 7), (2, 1, 3, 7)])
def test_grouped_heads_of_one_query_that_were_written_as_queries(shape):
    query, key, value = three(2, 6, queries=1, key_heads=2)
    mask = draw("mask", *shape) > -0.5
    with capture_attention() as trace:
        F.scaled_dot_product_attention(query.view(2, 2, 3, 4), key, value, mask)
    (record,) = trace
    assert record.trusted
    assert record.shape == (2, 6, 1, 7)
    allowed = mask.expand(2, 2, 3, 7).reshape(2, 6, 1, 7)
    assert_weights(record, plain_weights(query, key, allowed=allowed))
    assert torch.equal(record.mask.expand(2, 6, 1, 7), allowed)


@pytest.mark.parametrize("broadcast", ["keys", "heads of keys", "queries", "heads of queries"])
def test_leading_axes_that_broadcast(broadcast):
    query, key, value = three(2, 3)
    if broadcast == "keys":
        key, value = key[:1], value[:1]
    elif broadcast == "heads of keys":
        key, value = key[:, :1], value[:, :1]
    elif broadcast == "queries":
        query = query[:1]
    else:
        query = query[:, :1]
    record = captured(query, key, value)
    assert record.shape == (2, 3, 5, 7)
    expected = plain_weights(query.expand(2, 3, 5, 4), key.expand(2, 3, 7, 4))
    assert_weights(record, expected)


def test_a_key_without_batch_axis_broadcasts():
    query, key, value = three(2, 3)
    record = captured(query, key[0, 0], value[0, 0])
    assert_weights(record, plain_weights(query, key[0, 0].expand(2, 3, 7, 4)))


def test_every_argument_by_position_and_by_name():
    query, key, value = three(2, 3)
    mask = draw("mask", 5, 7) > -0.5
    expected = plain_weights(query, key, allowed=mask, scale=0.3)
    by_position = captured(query, key, value, mask, 0.0, False, scale=0.3)
    by_name = captured(
        value=value, key=key, query=query, attn_mask=mask, dropout_p=0.0, is_causal=False,
        scale=0.3, enable_gqa=False,
    )  # fmt: skip
    assert_weights(by_position, expected)
    assert_weights(by_name, expected)


def test_a_function_that_was_imported_by_name_is_seen():
    query, key, value = three(2, 3)
    with capture_attention() as trace:
        scaled_dot_product_attention(query, key, value)
        torch.nn.functional.scaled_dot_product_attention(query, key, value)
        torch._C._nn.scaled_dot_product_attention(query, key, value)
        torch.ops.aten.scaled_dot_product_attention(query, key, value)
        torch.ops.aten.scaled_dot_product_attention.default(query, key, value)
    assert len(trace) == 5
    for record in trace:
        assert_weights(record, plain_weights(query, key))


@pytest.mark.parametrize("keep", ["inputs", "weights"])
def test_dropout_is_told_and_weights_are_those_before_it(keep):
    query, key, value = three(2, 3)
    with capture_attention(keep=keep) as trace:
        F.scaled_dot_product_attention(query, key, value, dropout_p=0.4)
    (record,) = trace
    assert record.dropout == 0.4
    assert_weights(record, plain_weights(query, key))
    assert record.unverified == "dropout of 0.4 was applied within"
    assert record.trusted


def test_values_may_have_another_width_than_keys():
    query, key, _ = three(2, 3)
    for width in (1, 9):
        record = captured(query, key, draw("value", 2, 3, 7, width))
        assert record.value.shape[-1] == width
        assert_weights(record, plain_weights(query, key))


def test_the_way_tensors_lie_in_memory_does_not_matter():
    query, key, value = three(2, 3)
    expected = plain_weights(query, key)
    lying = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, key, value)]
    assert not lying[0].is_contiguous()
    assert_weights(captured(*lying), expected)
    strided = [torch.stack([t, t], -1)[..., 0] for t in (query, key, value)]
    assert strided[0].stride(-1) == 2
    assert_weights(captured(*strided), expected)
    expanded = key[:, :1].expand(2, 3, 7, 4)
    record = captured(query, expanded, value)
    assert record.key.stride(1) == 0
    assert_weights(record, plain_weights(query, expanded))


def by_sdpa(query, key, value, bias):
    F.scaled_dot_product_attention(query, key, value, attn_mask=bias)


def by_adding(query, key, value, bias):
    (query @ key.mT + bias).softmax(-1) @ value


def by_filling(query, key, value, bias):
    (query @ key.mT).masked_fill(bias != 0, bias.amin().item()).softmax(-1) @ value


def by_where(query, key, value, bias):
    torch.where(bias != 0, bias.amin(), query @ key.mT).softmax(-1) @ value


def by_setting(query, key, value, bias):
    scores = query @ key.mT
    scores[(bias != 0).expand_as(scores)] = bias.amin().item()
    scores.softmax(-1) @ value


@pytest.mark.parametrize("attend", [by_sdpa, by_adding, by_filling, by_where, by_setting])
@pytest.mark.parametrize(
    ("number", "hidden"), [(-9500.0, True), (-9000.0, True), (-8999.0, False), (-8000.0, False)]
)
def test_one_rule_says_which_numbers_hide_a_key(attend, number, hidden):
    bias = torch.zeros(2, 1, 5, 7)
    bias[0, :, 1, 2:4] = bias[1, :, :, 6] = number
    with capture_attention() as trace:
        attend(*three(2, 3), bias)
    mask = trace[0].mask
    if hidden:
        assert torch.equal(mask.expand(2, 3, 5, 7), permits(bias).expand(2, 3, 5, 7))
        assert not mask.all()
    else:
        assert mask is None
        assert permits(bias).all()


def test_a_module_is_named_by_its_path():
    class Attention(nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(x, x, x)

    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(Attention(), Attention()))
    with capture_attention(model) as trace:
        model(draw("x", 2, 3, 5, 4))
    assert [record.layer for record in trace] == ["1.0", "1.1"]


def test_what_happens_outside_of_the_model_is_told_and_not_recorded():
    model = nn.Linear(4, 4)
    with (
        pytest.warns(match="happened outside of the model that is captured"),
        capture_attention(model, allow_empty=True) as trace,
    ):
        F.scaled_dot_product_attention(*three(2, 3))
    assert len(trace) == 0
