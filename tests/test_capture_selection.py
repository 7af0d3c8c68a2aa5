"""Which layers, heads and queries are kept, in which form, and how much memory that takes."""

import numpy as np
import pytest
import torch
from capture_oracles import CLOSE, Memory, assert_weights, draw, plain_weights, three, top_left
from torch import nn
from torch.nn import functional as F  # noqa: N812

from pytest_attnheat import capture_attention
from pytest_attnheat.capture import CaptureError, CaptureMemoryError
from pytest_attnheat.capture.trace import Trace

QUERY, KEY, VALUE = three(2, 6, key_heads=2)
MASK = draw("mask", 2, 6, 5, 7) > -0.5
EXPECTED = plain_weights(QUERY, KEY, allowed=MASK)


def fused():
    return F.scaled_dot_product_attention(QUERY, KEY, VALUE, MASK, enable_gqa=True)


def written():
    scores = QUERY @ KEY.repeat_interleave(3, 1).mT / 2
    weights = scores.masked_fill(~MASK, -torch.inf).softmax(-1)
    return weights @ VALUE.repeat_interleave(3, 1)


def captured(function=fused, **options):
    with capture_attention(**options) as trace:
        function()
    (record,) = trace
    return record


class Layer(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleList(nn.ModuleDict({"attention": Layer()}) for _ in range(11))
        self.decoder = Layer()

    def forward(self, x):
        for layer in self.encoder:
            x = x + layer["attention"](x)
        return self.decoder(x)


X = draw("x", 2, 3, 5, 4)


# --- layers


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("decoder", ["decoder"]),
        ("encoder.1", ["encoder.1.attention"]),
        ("encoder.1*", ["encoder.1.attention", "encoder.10.attention"]),
        ("*.3.attention", ["encoder.3.attention"]),
        ("encoder.[02].*", ["encoder.0.attention", "encoder.2.attention"]),
        (["decoder", "encoder.5"], ["encoder.5.attention", "decoder"]),
        (("encoder.?.attention", "nothing"), [f"encoder.{i}.attention" for i in range(10)]),
        ("encoder", [f"encoder.{i}.attention" for i in range(11)]),
    ],
)
def test_layers_are_named_or_matched(layers, expected):
    model = Model()
    with capture_attention(model, layers=layers) as trace:
        model(X)
    assert [record.layer for record in trace] == expected
    with capture_attention(model) as whole:
        model(X)
    assert [record.layer for record in whole.select(layers=layers)] == expected


def test_layers_that_match_nothing_are_an_error_that_lists_what_there_is():
    model = Model()
    with (
        pytest.raises(CaptureError) as caught,
        capture_attention(model, layers="encoder.0.self_attn"),
    ):
        model(X)
    message = str(caught.value)
    assert "attention happened in Model, in no layer that layers=['encoder.0.self_attn']" in message
    assert "encoder.0.attention" in message


@pytest.mark.parametrize("layers", [[], ()])
def test_no_layers_are_refused(layers):
    message = r"^layers: got .*; accepted is one or more names"
    with pytest.raises(ValueError, match=message), capture_attention(layers=layers):
        raise AssertionError("ran")


@pytest.mark.parametrize("layers", [3, [3], {"decoder": 1}, b"decoder"])
def test_layers_that_are_no_names_are_refused(layers):
    message = r"^layers: got .*; accepted is one or more names of layers, or patterns"
    with pytest.raises(TypeError, match=message), capture_attention(layers=layers):
        raise AssertionError("ran")
    with pytest.raises(TypeError, match=message):
        Trace().select(layers=layers)


# --- heads and queries

SELECTIONS = {
    "one": (2, [2]),
    "the last": (-1, [5]),
    "several in their order": ([4, 0], [4, 0]),
    "one twice": ([1, 1], [1, 1]),
    "a tuple": ((0, -2), [0, 4]),
    "a range": (range(1, 4), [1, 2, 3]),
    "a slice": (slice(1, 3), [1, 2]),
    "a slice from the end": (slice(-2, None), [4, 5]),
    "every other": (slice(None, None, 2), [0, 2, 4]),
    "a tensor": (torch.tensor([3, 1]), [3, 1]),
    "an array": (np.array([3, 1]), [3, 1]),
    "a number of numpy": (np.int64(3), [3]),
}


@pytest.mark.parametrize("function", [fused, written])
@pytest.mark.parametrize(("wanted", "numbers"), SELECTIONS.values(), ids=SELECTIONS)
def test_heads_are_selected_while_it_runs_and_afterwards(function, wanted, numbers):
    for record in (
        captured(function, heads=wanted),
        captured(function, heads=wanted, keep="weights"),
        captured(function).select(heads=wanted),
        captured(function, keep="weights").select(heads=wanted),
    ):
        assert record.heads.tolist() == numbers
        assert record.shape == (2, 6, 5, 7)
        assert record.shape_here == (2, len(numbers), 5, 7)
        assert_weights(record, EXPECTED[:, numbers])
        assert torch.equal(record.mask, MASK[:, numbers])
        assert record.trusted


@pytest.mark.parametrize("function", [fused, written])
@pytest.mark.parametrize(("wanted", "numbers"), [(2, [2]), (-1, [4]), ([3, 0], [3, 0]),
                                                 (slice(1, 9), [1, 2, 3, 4])])  # fmt: skip
def test_queries_are_selected_while_it_runs_and_afterwards(function, wanted, numbers):
    for record in (
        captured(function, queries=wanted),
        captured(function, queries=wanted, keep="weights"),
        captured(function).select(queries=wanted),
    ):
        assert record.queries.tolist() == numbers
        assert record.shape_here == (2, 6, len(numbers), 7)
        assert_weights(record, EXPECTED[:, :, numbers])
        assert torch.equal(record.mask, MASK[:, :, numbers])
        assert record.trusted


def test_heads_and_queries_together_and_again():
    record = captured(heads=[5, 1, 3], queries=slice(1, 4))
    assert_weights(record, EXPECTED[:, [5, 1, 3]][:, :, 1:4])
    again = record.select(heads=[3, 5], queries=-3)
    assert again.heads.tolist() == [3, 5]
    assert again.queries.tolist() == [2]
    assert_weights(again, EXPECTED[:, [3, 5]][:, :, [2]])


def test_causality_of_selected_queries():
    query, key, value = three(2, 3)
    with capture_attention(queries=[4, 1]) as trace:
        F.scaled_dot_product_attention(query, key, value, is_causal=True)
    expected = plain_weights(query, key, allowed=top_left(5, 7))
    assert_weights(trace[0], expected[:, :, [4, 1]])
    assert torch.equal(trace[0].mask, top_left(5, 7)[[4, 1]])


@pytest.mark.parametrize("what", ["heads", "queries"])
@pytest.mark.parametrize("wanted", [9, -9, [0, 9], [], slice(9, 12)])
def test_what_is_absent_is_refused_with_what_there_is(what, wanted):
    last = {"heads": 5, "queries": 4}[what]
    message = rf"^{what}: got .*; accepted is numbers from 0 to {last}, or a slice of them"
    with pytest.raises(ValueError, match=message):
        captured(**{what: wanted})
    with pytest.raises(ValueError, match=message):
        captured().select(**{what: wanted})


@pytest.mark.parametrize("what", ["heads", "queries"])
@pytest.mark.parametrize("wanted", ["0", 1.5, [1.5], True, [True], {"a": 1}, torch.tensor([1.0])])
def test_what_is_no_number_is_refused_before_the_model_runs(what, wanted):
    message = rf"^{what}: got .*; accepted is a number, several, or a slice"
    with pytest.raises(TypeError, match=message), capture_attention(**{what: wanted}):
        raise AssertionError("ran")
    with pytest.raises(TypeError, match=message):
        captured().select(**{what: wanted})


def test_what_was_not_kept_cannot_be_selected():
    record = captured(heads=[1, 2])
    with pytest.raises(
        ValueError, match=r"^heads: got \[0, 1\]; accepted is numbers that were kept: \[1, 2\]"
    ):
        record.select(heads=[0, 1])


# --- in which form


def test_inputs_are_what_the_attention_was_given():
    record = captured(keep="inputs")
    assert torch.equal(record.query, QUERY)
    assert torch.equal(record.key, KEY)
    assert torch.equal(record.given_mask, MASK)
    assert record.statistics is None
    assert record.query.data_ptr() != QUERY.data_ptr()


@pytest.mark.parametrize("function", [fused, written])
def test_weights_alone(function):
    record = captured(function, keep="weights")
    assert record.query is record.key is record.value is record.output is None
    assert_weights(record, EXPECTED)
    assert torch.equal(record.mask, MASK)


@pytest.mark.parametrize("function", [fused, written])
@pytest.mark.parametrize("selected", [{}, {"heads": [4, 1], "queries": slice(1, 3)}])
def test_statistics_are_those_of_the_weights(function, selected):
    record = captured(function, keep="statistics", **selected)
    expected = EXPECTED[:, [4, 1]][:, :, 1:3] if selected else EXPECTED
    found = record.statistics
    torch.testing.assert_close(found.row_sum.double(), expected.sum(-1), **CLOSE)
    torch.testing.assert_close(found.maximum.double(), expected.amax(-1), **CLOSE)
    assert torch.equal(found.most_attended, expected.argmax(-1))
    entropy = -(expected * expected.clamp_min(1e-300).log()).sum(-1)
    torch.testing.assert_close(found.entropy.double(), entropy, atol=3e-6, rtol=0)
    assert {part.dtype for part in vars(found).values()} == {torch.float32, torch.int64}
    assert record.trusted
    assert record.residual <= record.tolerance


def test_statistics_may_be_selected_from():
    record = captured(keep="statistics").select(heads=[4, 1], queries=-1)
    expected = EXPECTED[:, [4, 1]][:, :, [4]]
    torch.testing.assert_close(record.statistics.maximum.double(), expected.amax(-1), **CLOSE)


def test_statistics_of_many_parts_are_those_of_the_whole(monkeypatch):
    monkeypatch.setattr("pytest_attnheat.capture.record._PART_BYTES", 2 * 5 * 7 * 4)
    record = captured(keep="statistics")
    torch.testing.assert_close(record.statistics.maximum.double(), EXPECTED.amax(-1), **CLOSE)
    assert_weights(captured(), EXPECTED)
    monkeypatch.setattr("pytest_attnheat.capture.record._PART_BYTES", 1)
    assert_weights(captured(), EXPECTED)


def test_statistics_alone_have_no_weights_and_no_mask():
    record = captured(keep="statistics")
    with pytest.raises(ValueError, match='weights cannot be computed any more: keep="statistics"'):
        record.weights  # noqa: B018
    with pytest.raises(ValueError, match='the mask is not known any more: keep="statistics"'):
        record.mask  # noqa: B018


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"keep": "all"}, ValueError, "keep: got 'all'; accepted is one of 'inputs', "),
        ({"keep": None}, ValueError, "keep: got None"),
        ({"dtype": torch.int32}, TypeError, r"dtype: got torch\.int32; accepted is a dtype"),
        ({"dtype": "float32"}, TypeError, "dtype: got 'float32'"),
        ({"max_bytes": "1 GB"}, TypeError, "max_bytes: got '1 GB'; accepted is a number of"),
        ({"max_bytes": -1}, ValueError, "max_bytes: got -1"),
        ({"model": Layer}, TypeError, "model: got type; accepted is a torch.nn.Module, or None"),
        ({"model": lambda x: x}, TypeError, "model: got function"),
    ],
)
def test_misuse_is_refused_before_the_model_runs(options, error, message):
    with pytest.raises(error, match=message), capture_attention(**options):
        raise AssertionError("ran")


def test_many_bytes_may_be_written_as_a_float():
    assert captured(max_bytes=1e9).trusted


# --- memory


WHOLE = 8 * 1024 * 1024 * 4
LONG = torch.zeros(1, 8, 1024, 4)
MIB = 2**20


def test_a_cap_is_raised_before_memory_is_spent():
    with (
        Memory() as memory,
        pytest.raises(CaptureMemoryError) as caught,
        capture_attention(keep="weights", max_bytes=WHOLE - 1),
    ):
        F.scaled_dot_product_attention(LONG, LONG, LONG)
    assert memory.peak < MIB
    lines = str(caught.value).splitlines()
    assert lines == [
        "capture_attention: attention (1, 8, 1024, 1024) in the block takes 33.6 MB with "
        "keep='weights'; 0 records hold 0 B of the 33.6 MB allowed.",
        "  accepted: layers=['...'], heads=[0], queries=slice(0, 64), max_bytes=...",
        "  or keep='inputs', which takes 524 kB of it",
        "  or keep='statistics', which takes 164 kB of it",
    ]


def test_what_is_selected_is_what_counts():
    with capture_attention(keep="weights", heads=[0], queries=slice(0, 64), max_bytes=MIB) as trace:
        F.scaled_dot_product_attention(LONG, LONG, LONG)
    assert trace[0].weights.shape == (1, 1, 64, 1024)


def test_all_records_together_are_within_the_cap():
    model = Model()
    one = 4 * X.numel() * 4
    with (
        pytest.raises(
            CaptureMemoryError, match=r"in encoder\.3\.attention takes 1\.92 kB .*; 3 records"
        ),
        capture_attention(model, max_bytes=3 * one),
    ):
        model(X)
    with capture_attention(model, max_bytes=12 * one) as trace:
        model(X)
    assert len(trace) == 12


def test_layers_that_are_not_wanted_take_no_memory():
    model = Model()
    with capture_attention(model, layers="decoder", max_bytes=4 * X.numel() * 4) as trace:
        model(X)
    assert len(trace) == 1


def test_weights_asked_for_later_are_within_the_cap():
    with capture_attention(max_bytes=10 * MIB) as trace:
        F.scaled_dot_product_attention(LONG, LONG, LONG)
    with Memory() as memory, pytest.raises(CaptureMemoryError) as caught:
        trace[0].weights  # noqa: B018
    assert memory.peak < MIB
    assert str(caught.value) == (
        "the block: weights (1, 8, 1024, 1024) in float32 take 33.6 MB; accepted is 10.5 MB. "
        "Take record.select(heads=[0], queries=range(64)).weights, or a larger max_bytes"
    )
    assert trace[0].select(heads=[0], queries=range(64)).weights.shape == (1, 1, 64, 1024)


def test_statistics_never_hold_the_weights():
    with Memory() as memory, capture_attention(keep="statistics") as trace:
        F.scaled_dot_product_attention(LONG, LONG, LONG)
    assert memory.peak < WHOLE
    torch.testing.assert_close(trace[0].statistics.row_sum, torch.ones(1, 8, 1024))


def test_inputs_never_hold_the_weights():
    with Memory() as memory, capture_attention(keep="inputs"):
        F.scaled_dot_product_attention(LONG, LONG, LONG)
    assert memory.peak < 10 * MIB


def test_weights_are_held_once_while_they_are_computed_and_verified():
    with Memory() as memory, capture_attention(keep="weights") as trace:
        F.scaled_dot_product_attention(LONG, LONG, LONG)
    assert WHOLE <= memory.peak < 1.6 * WHOLE
    assert trace[0].trusted
