"""The assertions on weights take a trace or one of its records in place of weights."""

import re

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from pytest_attnheat import (
    Trace,
    assert_causal,
    assert_doubly_stochastic,
    assert_entropy,
    assert_masked,
    assert_one_hot,
    assert_padding_masked,
    assert_reproduces_output,
    assert_row_stochastic,
    assert_support,
    assert_uniform,
    capture_attention,
)


class Layer(nn.Module):
    """Causal self-attention written out, over an axis of your choice."""

    def __init__(self, dim: int = -1, future: int = 0):
        super().__init__()
        self.project = nn.Linear(16, 48)
        self.dim, self.future = dim, future

    def forward(self, hidden):
        batch, length, _ = hidden.shape
        projected = self.project(hidden).view(batch, length, 3, 4, 4)
        query, key, value = projected.permute(2, 0, 3, 1, 4)
        seen = torch.ones(length, length, dtype=torch.bool).tril(self.future)
        scores = (query @ key.mT / 2).masked_fill(~seen, -torch.inf)
        return (scores.softmax(self.dim) @ value).transpose(1, 2).flatten(2)


@pytest.fixture
def hidden():
    return torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))


def trace_of(model, hidden, **options):
    torch.manual_seed(0)
    with capture_attention(model, **options) as trace:
        model(hidden)
    return trace


@pytest.fixture
def sound(hidden):
    return trace_of(nn.Sequential(Layer(), Layer()), hidden)


@pytest.mark.parametrize(
    "assertion",
    [assert_row_stochastic, assert_causal, assert_masked, assert_support, assert_reproduces_output],
)
def test_a_sound_trace_and_its_records_pass(assertion, sound):
    assertion(sound)
    assertion(sound[0])
    assert len(sound) == 2


@pytest.mark.parametrize(
    ("assertion", "options"),
    [
        (assert_doubly_stochastic, {}),
        (assert_one_hot, {}),
        (assert_uniform, {}),
        (assert_entropy, {"maximum": 0.1}),
    ],
)
def test_a_claim_that_does_not_hold_names_the_layer(assertion, options, hidden):
    trace = trace_of(nn.Sequential(Layer()), hidden)
    with pytest.raises(AssertionError) as failure:
        assertion(trace, **options)
    lines = str(failure.value).splitlines()
    assert lines[0].startswith(f"{assertion.__name__}: ")
    assert lines[1] == "  layer    0, call 0"


def test_the_first_layer_that_fails_is_named_and_the_message_is_else_as_for_weights(hidden):
    trace = trace_of(nn.Sequential(Layer(), Layer(dim=-2)), hidden)
    assert_row_stochastic(trace[0])
    with pytest.raises(AssertionError) as of_trace:
        assert_row_stochastic(trace)
    with pytest.raises(AssertionError) as of_weights:
        assert_row_stochastic(trace[1].weights, mask=trace[1].mask)
    lines = str(of_trace.value).splitlines()
    assert lines.pop(1) == "  layer    1, call 0"
    assert lines == str(of_weights.value).splitlines()


def test_a_later_call_of_a_layer_is_numbered(hidden):
    layer = Layer(future=1)
    with capture_attention(layer) as trace:
        layer(hidden[:, :1])
        layer(hidden)
    with pytest.raises(AssertionError, match=r"layer    Layer, call 1\n"):
        assert_causal(trace)


def test_steps_that_see_everything_are_passed_over_but_not_a_trace_of_only_such(hidden):
    layer = Layer()
    with capture_attention(layer) as trace:
        layer(hidden[:, :1])
        layer(hidden)
    assert_causal(trace)
    with pytest.raises(ValueError, match="permits every query every key"):
        assert_causal(trace[:1])


def test_a_mask_of_the_caller_is_used_in_place_of_that_of_the_record(hidden):
    trace = trace_of(Layer(future=1), hidden)
    assert_masked(trace)
    with pytest.raises(AssertionError, match="masked weights are not zero"):
        assert_masked(trace, torch.ones(6, 6, dtype=torch.bool).tril())


def test_records_without_a_mask_are_passed_over_and_a_trace_of_only_those_is_refused(hidden):
    with capture_attention() as trace:
        scaled_dot_product_attention(hidden, hidden, hidden)
        scaled_dot_product_attention(hidden, hidden, hidden, is_causal=True)
    assert_masked(trace)
    with pytest.raises(ValueError, match="assert_support: got records of attention that was given"):
        assert_support(trace[:1])


def test_rows_that_may_attend_to_nothing_are_known_from_the_record(hidden):
    mask = torch.ones(6, 6, dtype=torch.bool)
    mask[2] = False
    with capture_attention() as trace:
        scaled_dot_product_attention(hidden, hidden, hidden, attn_mask=mask)
    assert_row_stochastic(trace)
    with pytest.raises(AssertionError, match="do not sum to 1"):
        assert_row_stochastic(trace, mask=None)


def test_padding_is_asserted_of_a_whole_model(hidden):
    lengths = torch.tensor([6, 4])
    padding = torch.arange(6) >= lengths[:, None]
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    with capture_attention(encoder) as trace:
        encoder(hidden, src_key_padding_mask=padding)
    assert_padding_masked(trace, lengths)
    with pytest.raises(AssertionError, match=r"layer    layers\.0\.self_attn, call 0\n"):
        assert_padding_masked(trace, [6, 3])


def test_an_empty_trace_is_refused():
    with pytest.raises(ValueError, match="got a trace without records"):
        assert_row_stochastic(Trace())


def test_output_that_was_not_kept_is_asked_for(hidden):
    trace = trace_of(Layer(), hidden, keep="weights")
    assert_row_stochastic(trace)
    with pytest.raises(ValueError, match='accepted is a capture with keep="inputs"'):
        assert_reproduces_output(trace)


def test_grouped_heads_reproduce_their_output():
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    with capture_attention() as trace:
        scaled_dot_product_attention(query, key, key, enable_gqa=True)
    assert_reproduces_output(trace)


@pytest.mark.parametrize("queries", [slice(0, 3), [1, 4], -2])
def test_selected_queries_keep_their_positions(queries, hidden):
    sound, leaking = trace_of(Layer(), hidden), trace_of(Layer(future=1), hidden)
    assert_causal(sound.select(queries=queries), alignment="bottom_right")
    assert_causal(sound.select(queries=queries))
    said = r"query (\d) of 6 gives \S+ to key (\d), one step in its future"
    with pytest.raises(AssertionError, match=said) as caught:
        assert_causal(leaking.select(queries=queries))
    query, key = re.search(said, str(caught.value)).groups()
    assert int(key) == int(query) + 1
    # One key too many of a single query could be anything.
    assert ("the diagonal is off by one?" in str(caught.value)) == (queries != -2)


def test_selected_queries_that_may_see_everything_are_nothing_to_check(hidden):
    trace = trace_of(Layer(), hidden).select(queries=-1)
    with pytest.raises(ValueError, match="of which causal attention permits every query every key"):
        assert_causal(trace)


def test_weights_that_are_too_many_at_once_are_asserted_a_block_at_a_time():
    inputs = torch.randn(1, 4, 64, 8)
    with capture_attention(max_bytes=40_000) as trace:
        scaled_dot_product_attention(inputs, inputs, inputs, is_causal=True)
    assert trace[0].shape == (1, 4, 64, 64)
    assert_row_stochastic(trace)
    assert_causal(trace)
    with pytest.raises(AssertionError, match="256 of 256 rows are not uniform"):
        assert_uniform(trace, mask=torch.ones(64, 64, dtype=torch.bool))


def test_rows_that_the_model_rounded_are_held_to_its_own_dtype():
    query = torch.randn(2, 4, 33, 8, dtype=torch.bfloat16)
    with capture_attention() as trace:
        (query @ query.mT).softmax(-1) @ query
    assert trace[0].weights.dtype == torch.float32
    assert_row_stochastic(trace)
    with pytest.raises(AssertionError, match="bfloat16"):
        assert_row_stochastic(trace, tolerance=1e-9)


def test_an_output_of_the_caller_is_held_against_the_value_of_the_record(hidden):
    trace = trace_of(Layer(), hidden)
    assert_reproduces_output(trace, output=trace[0].output)
    with pytest.raises(AssertionError, match="layer    Layer, call 0"):
        assert_reproduces_output(trace, output=trace[0].output + 1)


def test_dropout_within_an_attention_is_told_where_its_output_is_not_reproduced():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 6, 8)
    with capture_attention() as trace:
        torch.nn.functional.scaled_dot_product_attention(query, key, value, dropout_p=0.5)
    with pytest.raises(AssertionError, match=r"cause +dropout of 0\.5 was applied within"):
        assert_reproduces_output(trace)
