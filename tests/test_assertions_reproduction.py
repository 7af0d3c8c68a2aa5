"""Whether weights made an output: what the assertion accepts, refuses and says."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from devices import on_accelerators
from pretend_device import reads
from torch.nn.attention import SDPBackend, sdpa_kernel

from pytest_attnheat import assert_reproduces_output
from pytest_attnheat.assertions import reproduction

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def softmax(*shape, seed=0):
    return normal(*shape, seed=seed).softmax(-1)


def product(weights, value):
    """weights @ value of four dimensions by a loop over everything, value heads repeated."""
    batch, heads, queries, keys = weights.shape
    group = heads // value.shape[1]
    output = torch.zeros(batch, heads, queries, value.shape[-1], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for q in range(queries):
                for k in range(keys):
                    output[b, h, q] += weights[b, h, q, k].double() * value[b, h // group, k]
    return output


def merge(output):
    """Output (batch, heads, queries, dim) as (batch, queries, heads * dim), by a loop."""
    batch, heads, queries, dim = output.shape
    merged = torch.zeros(batch, queries, heads * dim, dtype=output.dtype)
    for h in range(heads):
        for c in range(dim):
            merged[:, :, h * dim + c] = output[:, h, :, c]
    return merged


def message(*args, **kwargs):
    with pytest.raises(AssertionError) as error:
        assert_reproduces_output(*args, **kwargs)
    return str(error.value)


def cause(*args, **kwargs):
    lines = message(*args, **kwargs).splitlines()
    causes = [line.removeprefix("  cause    ") for line in lines if line.startswith("  cause")]
    assert len(causes) <= 1
    return causes[0] if causes else None


WEIGHTS = softmax(2, 4, 6, 8)
VALUE = normal(2, 4, 8, 5, seed=1)
GROUPED = normal(2, 2, 8, 5, seed=1)
OUTPUT = product(WEIGHTS, VALUE).float()
FROM_GROUPED = product(WEIGHTS, GROUPED).float()
SQUARE = softmax(2, 4, 8, 8)


# --- shapes

ACCEPTED = {
    "two dimensions": (WEIGHTS[0, 0], VALUE[0, 0], OUTPUT[0, 0]),
    "three": (WEIGHTS[0], VALUE[0], OUTPUT[0]),
    "four": (WEIGHTS, VALUE, OUTPUT),
    "five": (WEIGHTS[None], VALUE[None], OUTPUT[None]),
    "merged": (WEIGHTS, VALUE, merge(OUTPUT)),
    "grouped": (WEIGHTS, GROUPED, FROM_GROUPED),
    "grouped, unbatched": (WEIGHTS[0], GROUPED[0], FROM_GROUPED[0]),
    "grouped, merged": (WEIGHTS, GROUPED, merge(FROM_GROUPED)),
    "one value head": (WEIGHTS, VALUE[:, :1], product(WEIGHTS, VALUE[:, :1]).float()),
    "shared": (WEIGHTS[:, 1], VALUE, product(WEIGHTS[:, [1] * 4], VALUE).float()),
    "shared, merged": (WEIGHTS[:, 1], VALUE, merge(product(WEIGHTS[:, [1] * 4], VALUE).float())),
    "one head, merged": (WEIGHTS[:, :1], VALUE[:, :1], merge(OUTPUT[:, :1])),
    "one of everything": (torch.ones(1, 1), torch.full((1, 1), 3.0), torch.full((1, 1), 3.0)),
    "one key": (torch.ones(6, 1), VALUE[0, 0, :1], VALUE[0, 0, :1].expand(6, 5)),
    "one query": (WEIGHTS[..., :1, :], VALUE, OUTPUT[..., :1, :]),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_product_passes_in_every_accepted_shape(name):
    assert_reproduces_output(*ACCEPTED[name])


@pytest.mark.parametrize("name", ACCEPTED)
def test_every_element_of_every_shape_is_compared_and_named_as_the_caller_has_it(name):
    weights, value, output = ACCEPTED[name]
    for flat in range(0, output.numel(), 7):
        place = tuple(int(i) for i in np.unravel_index(flat, output.shape))
        broken = output.clone()
        broken[place] += 0.5
        text = message(weights, value, broken)
        assert f"1 of {output.numel()} output elements are not weights @ value\n" in text
        assert f"\n  worst    output[{', '.join(map(str, place))}] is " in text


REFUSED = {
    "value heads that do not divide": (WEIGHTS, VALUE[:, :3], OUTPUT),
    "more value heads than weights": (WEIGHTS[:, :2], VALUE, OUTPUT[:, :2]),
    "another batch": (WEIGHTS, VALUE[:1], OUTPUT),
    "another number of keys": (WEIGHTS, VALUE[:, :, :7], OUTPUT),
    "another number of queries": (WEIGHTS, VALUE, OUTPUT[:, :, :5]),
    "another value_dim": (WEIGHTS, VALUE, OUTPUT[..., :4]),
    "another width": (WEIGHTS, VALUE, merge(OUTPUT)[..., :18]),
    "merged without heads": (WEIGHTS[0], VALUE[0], merge(OUTPUT)[0]),
    "shared by another batch": (WEIGHTS[0], VALUE, OUTPUT),
    "output of fewer dimensions": (WEIGHTS, VALUE, OUTPUT[0, 0]),
    "queries and heads swapped": (WEIGHTS, VALUE, OUTPUT.transpose(1, 2)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_shapes_that_do_not_fit_are_refused_with_those_that_would(name):
    with pytest.raises(ValueError) as error:
        assert_reproduces_output(*REFUSED[name])
    shapes = [tuple(x.shape) for x in REFUSED[name]]
    text = str(error.value)
    given = "weights, value, output: got {}, {}, {}; accepted is one of\n"
    assert text.startswith(given.format(*shapes))
    assert "output merged: (batch, queries, heads * value_dim)" in text


@pytest.mark.parametrize("at", range(3))
def test_what_is_no_float_tensor_is_refused_by_its_name(at):
    name = ("weights", "value", "output")[at]

    def replaced(by):
        return [by if i == at else x for i, x in enumerate((WEIGHTS, VALUE, OUTPUT))]

    with pytest.raises(TypeError, match=f"{name}: got dtype int64"):
        assert_reproduces_output(*replaced(torch.ones(2, 4, 6, 8, dtype=torch.long)))
    with pytest.raises(ValueError, match=f"{name}: got shape .* has no elements"):
        assert_reproduces_output(*replaced(torch.ones(0, 4, 6, 8)))
    with pytest.raises(TypeError, match=f"{name}: got NoneType"):
        assert_reproduces_output(*replaced(None))


def test_tolerances_that_make_no_sense_are_refused():
    for wrong in (-0.1, 1, math.nan):
        with pytest.raises(ValueError, match="tolerance: got"):
            assert_reproduces_output(WEIGHTS, VALUE, OUTPUT, tolerance=wrong)
    with pytest.raises(TypeError, match="tolerance: got str"):
        assert_reproduces_output(WEIGHTS, VALUE, OUTPUT, tolerance="0.1")


@pytest.mark.skipif(not hasattr(torch, "float8_e4m3fn"), reason="this torch has no float8")
def test_a_dtype_too_coarse_to_tell_needs_a_tolerance():
    narrow = torch.eye(8)[:6].expand(2, 4, 6, 8).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="dtype: got float8_e4m3fn, which is too coarse to tell"):
        assert_reproduces_output(narrow, VALUE, VALUE[:, :, :6])
    assert_reproduces_output(narrow, VALUE, VALUE[:, :, :6], tolerance=0.1)


# --- strides, devices, NumPy


def test_strides_gradients_and_numpy_do_not_matter():
    broken = OUTPUT.clone()
    broken[1, 2, 3, 4] += 0.1
    for make in (
        lambda x: x.mT.contiguous().mT,
        lambda x: torch.stack([x, x + 7], -1)[..., 0],
        lambda x: x.clone().requires_grad_() * 1,
        lambda x: x.numpy(),
        lambda x: np.ascontiguousarray(x.numpy()[..., ::-1, ::-1])[..., ::-1, ::-1],
        lambda x: x.numpy().astype(">f4"),
    ):
        assert_reproduces_output(make(WEIGHTS), make(VALUE), make(OUTPUT))
        assert "output[1, 2, 3, 4]" in message(make(WEIGHTS), make(VALUE), make(broken))
        assert_reproduces_output(make(WEIGHTS), make(GROUPED), make(merge(FROM_GROUPED)))
        assert_reproduces_output(*map(make, ACCEPTED["shared, merged"]))


def test_the_operands_are_left_alone():
    before = [x.clone() for x in (WEIGHTS, VALUE, OUTPUT)]
    assert_reproduces_output(WEIGHTS, VALUE, OUTPUT)
    assert all(torch.equal(*pair) for pair in zip(before, (WEIGHTS, VALUE, OUTPUT), strict=True))


@pytest.mark.parametrize(
    ("name", "elements"),
    [("four", 50), ("merged", 300), ("grouped, merged", 50), ("shared", 50), ("two dimensions", 8)],
)
def test_no_element_is_missed_where_pieces_meet(monkeypatch, name, elements):
    monkeypatch.setattr(reproduction, "_ELEMENTS", elements)
    weights, value, output = ACCEPTED[name]
    assert_reproduces_output(weights, value, output)
    for flat in range(0, output.numel(), 31):
        place = tuple(int(i) for i in np.unravel_index(flat, output.shape))
        broken = output.clone()
        broken[place] += 0.5
        text = message(weights, value, broken)
        assert f"1 of {output.numel()} output elements" in text
        assert f"output[{', '.join(map(str, place))}]" in text


@pytest.mark.parametrize("key", [0, 50, 99])
def test_the_range_of_a_row_is_known_across_pieces(monkeypatch, key):
    monkeypatch.setattr(reproduction, "_ELEMENTS", 8)
    weights, value = torch.full((1, 100), 0.01), torch.ones(100, 1)
    value[::2] = -1  # as far apart as can be
    weights[0, key] = 0.01 * math.exp(-12)  # 4 times the rounding of float32, 1e-5, not twice
    weights /= weights.double().sum(-1, keepdim=True)
    output = weights.double() @ value.double()
    assert_reproduces_output(weights, value, output + 3.8e-5)
    with pytest.raises(AssertionError):
        assert_reproduces_output(weights, value, output + 4.2e-5)


@pytest.mark.parametrize("last", [0, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_keys_with_next_to_no_weight_do_not_widen_what_is_allowed(dtype, last):
    dust = torch.zeros(8).masked_fill(torch.arange(8) > last, -85.0)
    weights = (normal(64, 8) + dust).softmax(-1).to(dtype)
    value = normal(8, 8, seed=1).to(dtype)
    assert_reproduces_output(weights, value, weights @ value)
    for factor in (1.5, 1.2):
        assert "output elements are not" in message(weights, value, (weights @ value) * factor)


def test_a_row_with_all_its_weight_on_one_key_is_held_to_rounding_alone():
    weights = torch.tensor([[1.0, 1e-30, 1e-38]]).bfloat16()
    value = torch.tensor([[1.0], [-3.0], [5.0]]).bfloat16()
    assert_reproduces_output(weights, value, torch.tensor([[1.015]]))
    assert "allowed 1.6e-02" in message(weights, value, torch.tensor([[1.017]]))


def test_values_whose_squares_overflow_are_compared():
    weights, large = torch.full((1, 4), 0.25).double(), torch.tensor(1e200, dtype=torch.float64)
    assert_reproduces_output(weights, large.expand(4, 1), large.expand(1, 1))
    assert "1 of 1 output" in message(weights, large.expand(4, 1), 2 * large.expand(1, 1))


def test_the_first_element_is_named_across_pieces(monkeypatch):
    monkeypatch.setattr(reproduction, "_ELEMENTS", 50)
    output = OUTPUT.clone()
    output[0, 3, 5, 4] += 0.1
    output[1, 2, 3, 1] += 0.5
    output[1, 3, 5, 4] += 0.1
    lines = message(WEIGHTS, VALUE, output).splitlines()
    assert "  worst    output[1, 2, 3, 1] is " in lines[1]
    assert "  first    output[0, 3, 5, 4] is " in lines[2]


def test_long_rows_and_many_heads_are_compared():
    weights, value = softmax(1, 2, 4096, 600), normal(1, 2, 600, 4, seed=1)
    output = weights @ value
    assert_reproduces_output(weights, value, output)
    output[0, 1, 4095, 3] += 0.1
    assert "output[0, 1, 4095, 3]" in message(weights, value, output)
    weights, value = softmax(2, 144, 8, 8), normal(2, 144, 8, 4, seed=1)
    assert_reproduces_output(weights, value, weights @ value)


def test_a_passing_assertion_waits_for_the_device_once(pretend):
    weights = softmax(2, 8, 64, 512).to(pretend)
    value = normal(2, 8, 512, 32, seed=1).to(pretend)
    output = weights @ value
    with reads() as seen:
        assert_reproduces_output(weights, value, output)
    assert seen.count == 1


# --- the tolerance


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("backend", ["FLASH_ATTENTION", "MATH"])
@pytest.mark.parametrize("spread", [1, 8])
@pytest.mark.parametrize(("query_len", "key_len", "dim"), [(7, 1, 8), (16, 512, 64)])
def test_fused_attention_passes_with_weights_computed_apart(
    dtype, backend, spread, query_len, key_len, dim
):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    mask = torch.ones(query_len, key_len, dtype=torch.bool).tril(max(0, key_len - query_len))
    for seed in range(2):
        query = (spread**0.5 * normal(2, 4, query_len, dim, seed=seed)).to(dtype)
        key = (spread**0.5 * normal(2, 4, key_len, dim, seed=seed + 50)).to(dtype)
        value = (normal(2, 4, key_len, dim, seed=seed + 100) + seed % 2).to(dtype)
        with sdpa_kernel(getattr(SDPBackend, backend)):
            output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        for precision in (dtype, wide):
            scores = (query.to(precision) @ key.to(precision).mT) * dim**-0.5
            weights = scores.masked_fill(~mask, -math.inf).softmax(-1).to(dtype)
            assert_reproduces_output(weights, value, output)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_an_error_beyond_rounding_is_found_in_every_dtype(dtype):
    allowed = {"float64": 1e-12, "float32": 1e-5, "float16": 1.95e-3, "bfloat16": 1.56e-2}
    # Equal values have no spread, so that scores do not matter.
    weights, value = torch.full((3, 4), 0.25, dtype=dtype), torch.ones(4, 2, dtype=dtype)
    limit = allowed[str(dtype).removeprefix("torch.")]
    ones = torch.ones(3, 2, dtype=torch.float64)
    assert_reproduces_output(weights, value, ones + 0.95 * limit)
    off = ones + 1.05 * limit
    assert "6 of 6 output elements" in message(weights, value, off)


def test_the_coarsest_dtype_sets_the_tolerance():
    off = OUTPUT * 1.002
    assert "output elements are not weights @ value" in message(WEIGHTS, VALUE, off)
    for at in range(3):
        trio = [WEIGHTS, VALUE, off]
        trio[at] = trio[at].bfloat16()
        assert_reproduces_output(*trio)


def test_the_tolerance_can_be_set():
    assert_reproduces_output(WEIGHTS, VALUE, OUTPUT * 1.01, tolerance=0.011)
    weights, value = torch.full((1, 4), 0.25), torch.ones(4, 1)
    assert_reproduces_output(weights, value, torch.full((1, 1), 1.009), tolerance=0.01)
    assert "(off by 1.1e-02; allowed 1.0e-02)" in message(
        weights, value, torch.full((1, 1), 1.011), tolerance=0.01
    )


def test_what_cancels_is_held_to_what_was_added_up():
    weights, value = torch.tensor([[0.5, 0.5]]), torch.tensor([[1000.0], [-1000.0]])
    assert_reproduces_output(weights, value, torch.tensor([[0.01]]))
    assert "allowed 2.0e-02" in message(weights, value, torch.tensor([[0.03]]))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_never_passes(bad):
    for at in range(3):
        trio = [WEIGHTS.clone(), VALUE.clone(), OUTPUT.clone()]
        trio[at][1, 2, 3, 4] = bad
        with pytest.raises(AssertionError):
            assert_reproduces_output(*trio)
        if at < 2:
            with pytest.raises(AssertionError):
                assert_reproduces_output(*trio[:2], trio[0] @ trio[1])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_value_of_a_key_without_weight_is_not_felt(bad):
    weights, value = WEIGHTS.clone(), VALUE.clone()
    weights[1, 2, :, 3] = 0
    output = product(weights, value).float()
    value[1, 2, 3, 0] = bad
    assert_reproduces_output(weights, value, output)
    output[1, 2, 5, 1] += 0.1
    assert "1 of 240 output elements" in message(weights, value, output)
    weights[1, 2, 4, 3] = 1e-9
    lines = message(weights, value, output).splitlines()
    assert "2 of 240 output elements" in lines[0]
    assert "output[1, 2, 4, 0] is " in lines[1]
    assert "weights @ value gives nan" in lines[1]


# --- the message


def test_the_message_says_all_that_a_ci_log_needs():
    weights, value = torch.eye(4).repeat(1, 3, 1, 1), torch.arange(24.0).reshape(1, 3, 4, 2)
    output = value.clone()
    output[0, 2, 1, 0] = 0.5
    output[0, 0, 3, 1] = 7.5
    assert message(weights, value, output) == (
        "assert_reproduces_output: 2 of 24 output elements are not weights @ value\n"
        "  worst    output[0, 2, 1, 0] is 0.5, weights @ value gives 18 (off by 1.8e+01; "
        "allowed 1.8e-04)\n"
        "  first    output[0, 0, 3, 1] is 7.5, weights @ value gives 7 (off by 5.0e-01; "
        "allowed 7.0e-05)\n"
        "  tensor   float32 (1, 3, 4, 2) on cpu"
    )


def test_a_small_difference_is_told_with_enough_digits():
    output = OUTPUT.double()
    weights, value = WEIGHTS.double(), VALUE.double()
    output = product(weights, value)
    output[0, 0, 0, 0] = 1e-9 + output[0, 0, 0, 0]
    worst = message(weights, value, output).splitlines()[1]
    said, computed = (part.split()[-1] for part in worst.split(" (off")[0].split(", weights @"))
    assert said != computed
    assert "off by 1.0e-09" in worst


def test_the_function_itself_is_left_out_of_the_traceback():
    with pytest.raises(AssertionError) as error:
        assert_reproduces_output(WEIGHTS, VALUE, -OUTPUT)
    shown = {entry.path for entry in error.traceback if not entry.ishidden(error)}
    assert shown == {Path(__file__)}


# --- causes


def dropped_out(weights):
    keep = torch.rand(weights.shape, generator=torch.Generator().manual_seed(1)) > 0.1
    return weights * keep / 0.9


def causal(weights, offset=0):
    kept = weights * torch.ones(weights.shape[-2:]).tril(offset)
    return kept / kept.sum(-1, keepdim=True)


# As many channels as keys: the weights follow from the output.
DEEP, DEEP_VALUE = softmax(2, 4, 16, 16), normal(2, 4, 16, 32, seed=1)
LONG, LONG_VALUE = softmax(2, 4, 32, 40), normal(2, 4, 40, 5, seed=1)

ORDER = [2, 3, 0, 1]

CAUSES = {
    "heads permuted": ((WEIGHTS, VALUE, OUTPUT[:, ORDER]), "heads or batch entries in another"),
    "weights of other heads": (
        (WEIGHTS[:, [0, 1, 3, 2]], VALUE, OUTPUT),
        re.compile(r"output \[(\d), 2\] is made by weights \[\1, 3\]|3\] is made by weights .*2\]"),
    ),
    "heads permuted, merged": ((WEIGHTS, VALUE, merge(OUTPUT[:, ORDER])), "is made by weights ["),
    "heads permuted, grouped": (
        (WEIGHTS, GROUPED, FROM_GROUPED[:, [1, 0, 2, 3]]),
        re.compile(r"output \[(\d), 0\] is made by weights \[\1, 1\]|1\] is made by weights .*0\]"),
    ),
    "weights of another batch entry": ((WEIGHTS.flip(0), VALUE, OUTPUT), "is made by weights ["),
    "averaged": ((WEIGHTS.mean(1), VALUE, OUTPUT), "averaged over heads? nn.MultiheadAttention"),
    "averaged, merged": ((WEIGHTS.mean(1), VALUE, merge(OUTPUT)), "averaged over heads?"),
    "averaged and expanded": (
        (WEIGHTS.mean(1, keepdim=True).expand_as(WEIGHTS), VALUE, OUTPUT),
        "every head has the same weights: averaged over heads?",
    ),
    "scaled": ((WEIGHTS, VALUE, OUTPUT * 0.9), "output is 0.9 times weights @ value"),
    "negated": ((WEIGHTS, VALUE, -OUTPUT), "output is -1 times weights @ value"),
    "transposed": (
        (SQUARE, VALUE, product(SQUARE.mT, VALUE).float()),
        "output is weights.mT @ value: queries and keys of the weights have changed places?",
    ),
    "tiled": (
        (WEIGHTS, GROUPED, product(WEIGHTS, GROUPED.repeat(1, 2, 1, 1)).float()),
        "head h uses head h % 2 of value, not h // 2: repeat (tile) in place of repeat_interleave",
    ),
    "merged without a transpose": (
        (WEIGHTS, VALUE, OUTPUT.reshape(2, 6, 20)),
        "heads were merged without a transpose: output.transpose(1, 2).flatten(2)?",
    ),
    "grouped, merged without a transpose": (
        (WEIGHTS, GROUPED, FROM_GROUPED.reshape(2, 6, 20)),
        "heads were merged without a transpose",
    ),
    "causal output": (
        (SQUARE, VALUE, product(causal(SQUARE), VALUE).float()),
        "output is that of causal attention, and these weights are not: mask left out?",
    ),
    "causal output, bottom right": (
        (WEIGHTS, VALUE, product(causal(WEIGHTS, 2), VALUE).float()),
        "output is that of causal attention, and these weights are not: mask left out?",
    ),
    "weights after dropout": (
        (dropped_out(LONG), LONG_VALUE, LONG @ LONG_VALUE),
        "weights after dropout (p about 0.095), and the output was not?",
    ),
    "output of other weights, as many channels as keys": (
        (DEEP, DEEP_VALUE, softmax(2, 4, 16, 16, seed=7) @ DEEP_VALUE),
        None,
    ),
    "output after dropout of its own": ((DEEP, DEEP_VALUE, dropped_out(DEEP @ DEEP_VALUE)), None),
    "zero": ((WEIGHTS, VALUE, OUTPUT * 0), "the output is zero everywhere"),
    "one head zero": (
        (WEIGHTS, VALUE, OUTPUT * torch.tensor([1, 0, 1, 1])[:, None, None]),
        "the output of this map is zero throughout: a head or batch entry that was left out?",
    ),
    "one head scaled": (
        (WEIGHTS, VALUE, OUTPUT * torch.tensor([1, 1.5, 1, 1])[:, None, None]),
        "output of this map is 1.5 times weights @ value",
    ),
    "each query scaled": ((WEIGHTS, VALUE, OUTPUT * torch.linspace(0.5, 0.9, 6)[:, None]), None),
    "uniform in all heads": ((WEIGHTS * 0 + 1 / 8, VALUE, OUTPUT), None),
    "nearly causal": ((SQUARE, VALUE, (causal(SQUARE) @ VALUE).roll(1, -1)), None),
    "weights that are zero here and there": (
        (LONG * (torch.arange(40) % 3 > 0), LONG_VALUE, LONG @ LONG_VALUE),
        None,
    ),
    "one element": ((WEIGHTS, VALUE, OUTPUT + torch.eye(5)[0] * (OUTPUT > 0.9)), None),
    "something else": ((WEIGHTS, VALUE, normal(2, 4, 6, 5, seed=9)), None),
    "heads alike": ((WEIGHTS[:, [0, 0, 1]], VALUE[:, [0, 0, 1]], OUTPUT[:, [1, 0, 0]]), None),
    "too few to tell": ((torch.eye(2), normal(2, 1), normal(2, 1) / 2), None),
}


def told(phrase):
    return phrase if isinstance(phrase, re.Pattern) else re.escape(phrase)


@pytest.mark.parametrize("name", CAUSES)
def test_the_cause_is_named_where_the_numbers_show_it(name):
    trio, phrase = CAUSES[name]
    found = cause(*trio)
    assert (found is None) if phrase is None else re.search(told(phrase), found)


@pytest.mark.parametrize("name", CAUSES)
def test_every_cause_is_the_same_whatever_the_default_device(name):
    trio, phrase = CAUSES[name]
    with torch.device("meta"):
        found = cause(*trio)
    assert (found is None) if phrase is None else re.search(told(phrase), found)


def test_what_is_not_finite_is_said_never_to_pass():
    weights, value, output = WEIGHTS.clone(), VALUE.clone(), OUTPUT.clone()
    value[0, 0, 0, 0] = output[0, 0, :, 0] = math.nan
    text = message(weights, value, output)
    assert "output[0, 0, 0, 0] is nan, weights @ value gives nan (nan never passes)" in text
    output = OUTPUT.clone()
    output[1, 2, 3, 4] = math.inf
    assert " is inf, " in message(WEIGHTS, VALUE, output)
    assert "(infinity never passes)" in message(WEIGHTS, VALUE, output)


def test_an_argument_is_refused_in_the_words_of_its_own_dimensions():
    with pytest.raises(ValueError, match=r"value: got 1 dimension.*\(\.\.\., keys, value_dim\)"):
        assert_reproduces_output(WEIGHTS, VALUE[0, 0, 0], OUTPUT)
    with pytest.raises(TypeError, match=r"output: got .*\(\.\.\., queries, value_dim\)"):
        assert_reproduces_output(WEIGHTS, VALUE, OUTPUT.long())
    with pytest.raises(TypeError, match=r"weights: got .*\(\.\.\., queries, keys\)"):
        assert_reproduces_output(WEIGHTS.long(), VALUE, OUTPUT)


def test_rounding_alone_is_no_factor():
    assert cause(WEIGHTS, VALUE, OUTPUT, tolerance=0) is None


def test_a_cause_shows_in_half_precision_and_in_long_maps():
    weights, value = softmax(1, 4, 1024, 512).half(), normal(1, 4, 512, 64, seed=1).half()
    output = (weights.float() @ value.float()).half()
    assert "is made by weights [0, " in cause(weights, value, output[:, ORDER])
    assert "0.5 times" in cause(weights, value, output * 0.5)


# --- attention that others wrote


def test_multihead_attention_returns_the_weights_of_each_head_only_when_asked():
    torch.manual_seed(0)
    attention = torch.nn.MultiheadAttention(16, 4, batch_first=True).eval()
    with torch.no_grad():
        attention.out_proj.weight.copy_(torch.eye(16))  # so that the output is the heads', merged
        attention.out_proj.bias.zero_()
    x = normal(2, 6, 16)
    projected = F.linear(x, attention.in_proj_weight[32:], attention.in_proj_bias[32:])
    value = projected.reshape(2, 6, 4, 4).transpose(1, 2)
    output, weights = attention(x, x, x, average_attn_weights=False)
    assert_reproduces_output(weights, value, output)
    output, weights = attention(x, x, x)
    assert weights.shape == (2, 6, 6)
    assert "averaged over heads?" in cause(weights, value, output)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model", ["bert", "gpt2", "llama"])
def test_eager_attention_of_transformers_returns_the_weights_that_made_its_output(
    monkeypatch, model, dtype
):
    transformers = pytest.importorskip("transformers")
    module = getattr(getattr(transformers.models, model), f"modeling_{model}")
    eager, calls = module.eager_attention_forward, []

    def spy(attention, query, key, value, *args, **kwargs):
        output, weights = eager(attention, query, key, value, *args, **kwargs)
        calls.append((weights, value, output))
        return output, weights

    monkeypatch.setattr(module, "eager_attention_forward", spy)
    tiny = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    make = {
        "bert": lambda: transformers.BertModel(
            transformers.BertConfig(**tiny, intermediate_size=32, attn_implementation="eager")
        ),
        "gpt2": lambda: transformers.GPT2Model(
            transformers.GPT2Config(
                vocab_size=50, n_embd=32, n_layer=2, n_head=4, attn_implementation="eager"
            )
        ),
        "llama": lambda: transformers.LlamaModel(
            transformers.LlamaConfig(
                **tiny, intermediate_size=32, num_key_value_heads=2, attn_implementation="eager"
            )
        ),
    }
    torch.manual_seed(0)
    network = make[model]().to(dtype).eval()
    with torch.no_grad():
        network(input_ids=torch.randint(0, 50, (2, 7)), output_attentions=True)
    assert len(calls) == 2
    for weights, value, output in calls:
        assert_reproduces_output(weights, value, output.transpose(1, 2))
        assert_reproduces_output(weights, value, output.flatten(2))
        if dtype == torch.float32:  # fresh heads are too much alike for bfloat16
            with pytest.raises(AssertionError):
                assert_reproduces_output(weights.flip(1), value, output.flatten(2))


@on_accelerators(FLOATS)
def test_everything_works_on_an_accelerator(dtype, accelerator):
    query, key, value = (normal(2, 4, 64, 32, seed=i).to(accelerator, dtype) for i in range(3))
    output = F.scaled_dot_product_attention(query, key, value)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for precision in (dtype, wide):
        weights = (query.to(precision) @ key.to(precision).mT * 32**-0.5).softmax(-1).to(dtype)
        assert_reproduces_output(weights, value, output)
    text = message(weights, value, output / 2)
    assert f"on {accelerator}:0" in text
    assert "output is 0.5 times weights @ value" in text
    there = f"{accelerator}:0"
    refused = f"got weights on {there}, value on cpu, output on {there};"
    with pytest.raises(TypeError, match=refused):
        assert_reproduces_output(weights, value.cpu(), output)
