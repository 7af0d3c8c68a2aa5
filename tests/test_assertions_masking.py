"""Where weights may be: what the assertions accept, refuse and say."""

import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from attention_subjects import kept
from devices import on_accelerators
from pretend_device import reads

from pytest_attnheat import (
    Failure,
    assert_causal,
    assert_masked,
    assert_padding_masked,
    assert_support,
    read_heatmaps,
)
from pytest_attnheat.assertions import scan

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
TRIL = torch.ones(6, 6, dtype=torch.bool).tril()
ALL = torch.ones(1, 1, dtype=torch.bool)


def scores(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def softmax(mask, *shape, seed=0):
    return scores(*shape, seed=seed).masked_fill(~mask, -math.inf).softmax(-1)


def permits(query_len, key_len, rule):
    """A mask from a rule about one query and one key, by a loop."""
    mask = torch.zeros(query_len, key_len, dtype=torch.bool)
    for query, key in product(range(query_len), range(key_len)):
        mask[query, key] = rule(query, key)
    return mask


def real_keys(lengths, key_len, side="right"):
    """The mask of padding, (batch, 1, 1, keys), by a loop."""
    mask = torch.zeros(len(lengths), 1, 1, key_len, dtype=torch.bool)
    for entry, length in enumerate(lengths):
        for key in range(key_len):
            mask[entry, ..., key] = key < length if side == "right" else key_len - key <= length
    return mask


def message(check, *args, **kwargs):
    with pytest.raises(AssertionError) as error:
        check(*args, **kwargs)
    return str(error.value)


def cause(check, *args, **kwargs):
    lines = message(check, *args, **kwargs).splitlines()
    causes = [line.removeprefix("  cause    ") for line in lines if line.startswith("  cause")]
    assert len(causes) <= 1
    return causes[0] if causes else None


# --- all four, on the same weights

CHECKS = {
    "assert_masked": (lambda w, **kw: assert_masked(w, TRIL, **kw), TRIL),
    "assert_causal": (assert_causal, TRIL),
    "assert_support": (lambda w, **kw: assert_support(w, TRIL, **kw), TRIL),
    "assert_padding_masked": (
        lambda w, **kw: assert_padding_masked(w, [6, 4], **kw),
        real_keys([6, 4], 6),
    ),
}


def each():
    return pytest.mark.parametrize("name", CHECKS)


@each()
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_softmax_under_the_mask_passes_in_every_dtype(name, dtype):
    check, mask = CHECKS[name]
    check(softmax(mask, 2, 4, 6, 6).to(dtype))


@each()
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bad", [1e-7, 0.5, -1e-7, math.nan, math.inf, -math.inf])
def test_anything_but_zero_at_one_masked_place_is_found(name, dtype, bad):
    check, mask = CHECKS[name]
    weights = softmax(mask, 2, 4, 6, 6).to(dtype)
    weights[1, 2, 3, 5] = bad
    masked = int((~mask).expand(2, 4, 6, 6).sum())
    text = message(check, weights)
    assert text.startswith(f"{name}: 1 of {masked} masked weights are not zero\n")
    assert "weights[1, 2, 3, 5]" in text.splitlines()[1]
    assert "  first" not in text


@each()
def test_minus_zero_is_zero(name):
    check, mask = CHECKS[name]
    weights = softmax(mask, 2, 4, 6, 6)
    weights[(~mask).expand_as(weights)] = -0.0
    check(weights)


@each()
def test_strides_gradients_and_numpy_do_not_matter(name):
    check, mask = CHECKS[name]
    weights = softmax(mask, 2, 4, 6, 6)
    broken = weights.clone()
    broken[1, 3, 0, 5] = 0.25
    for make in (
        lambda w: w,
        lambda w: w.mT.contiguous().mT,
        lambda w: w.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0),
        lambda w: torch.stack([w, w + 7], -1)[..., 0],
        lambda w: w.clone().requires_grad_() * 1,
        lambda w: w.numpy(),
        lambda w: np.ascontiguousarray(w.numpy()[..., ::-1, ::-1])[..., ::-1, ::-1],
        lambda w: w.numpy().astype(">f4"),
    ):
        check(make(weights))
        assert "weights[1, 3, 0, 5]" in message(check, make(broken))


@each()
def test_the_weights_are_left_alone(name):
    check, mask = CHECKS[name]
    weights = softmax(mask, 2, 4, 6, 6)
    before = weights.clone()
    check(weights)
    assert torch.equal(weights, before)


@each()
def test_what_is_not_attention_weights_is_refused(name):
    check, _ = CHECKS[name]
    with pytest.raises(TypeError, match=r"weights: got dtype int64; accepted is a dense"):
        check(torch.ones(2, 4, 6, 6, dtype=torch.long))
    with pytest.raises(TypeError, match=r"weights: got list"):
        check([[1.0]])
    with pytest.raises(ValueError, match=r"weights: got shape \(0, 4, 6, 6\), which has no"):
        check(torch.ones(0, 4, 6, 6))
    with pytest.raises(ValueError, match=r"weights: got 1 dimension"):
        check(torch.ones(6))
    with pytest.raises(ValueError, match=r"fully_masked: got 'none'"):
        check(softmax(TRIL, 2, 4, 6, 6), fully_masked="none")


@each()
def test_144_heads_pass_and_one_broken_place_in_them_is_named(name):
    check, mask = CHECKS[name]
    weights = softmax(mask, 2, 144, 6, 6)
    check(weights)
    weights[1, 143, 2, 4] = 0.1
    assert "weights[1, 143, 2, 4]" in message(check, weights)


@each()
def test_infinity_is_worse_than_any_number_and_nan_is_worst(name):
    check, mask = CHECKS[name]
    weights = softmax(mask, 2, 4, 6, 6).double()
    weights[1, 0, 0, 5], weights[1, 0, 1, 4], weights[1, 0, 2, 4] = 1e300, math.inf, 0.2
    assert "weights[1, 0, 1, 4]" in message(check, weights).splitlines()[1]
    weights[1, 0, 3, 5] = math.nan
    lines = message(check, weights).splitlines()
    assert " 4 of " in lines[0]
    assert "weights[1, 0, 3, 5]" in lines[1]
    assert " gives nan to key 5" in lines[1]
    assert lines[2].startswith("  first    weights[1, 0, 0, 5]")


@each()
def test_a_failure_is_told_whatever_the_default_device(name):
    check, mask = CHECKS[name]
    everywhere = torch.full((2, 4, 6, 6), 1 / 6)
    right = softmax(mask, 2, 4, 6, 6)
    weights = right.clone()
    weights[1, 2, 3, 5] = 0.5
    expected = message(check, weights), message(check, everywhere)
    with torch.device("meta"):
        check(right)
        found = message(check, weights), message(check, everywhere)
    assert found == expected


@each()
def test_the_function_itself_is_left_out_of_the_traceback(name):
    check, _ = CHECKS[name]
    with pytest.raises(AssertionError) as error:
        check(torch.full((2, 4, 6, 6), 1 / 6))
    shown = {entry.path for entry in error.traceback if not entry.ishidden(error)}
    assert shown == {Path(__file__)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_passing_assertion_waits_for_the_device_once(dtype, pretend):
    mask = torch.ones(512, 512, dtype=torch.bool).tril().to(pretend)
    weights = (
        torch.zeros(1, 3, 512, 512, device=pretend)
        .masked_fill(~mask, -math.inf)
        .softmax(-1)
        .to(dtype)
    )
    for check in (
        lambda: assert_masked(weights, mask),
        lambda: assert_support(weights, mask),
        lambda: assert_causal(weights),
        lambda: assert_causal(weights, fully_masked="uniform"),
    ):
        with reads() as seen:
            check()
        assert seen.count == 1


@pytest.mark.parametrize("elements", [3, 40, 64])
@pytest.mark.parametrize("place", [(0, 0, 1), (0, 5, 6), (1, 0, 6), (1, 3, 4), (1, 5, 6)])
def test_no_place_is_missed_where_pieces_meet(monkeypatch, elements, place):
    monkeypatch.setattr(scan, "_BYTES", 4 * elements)
    weights = softmax(permits(6, 7, lambda q, k: k <= q), 2, 6, 7)
    check = lambda: assert_causal(weights, alignment="top_left")  # noqa: E731
    check()
    weights[place] = 1e-9
    text = message(check)
    assert "1 of 42 masked weights" in text
    assert f"weights[{', '.join(map(str, place))}]" in text


def test_the_first_place_and_the_broken_heads_are_known_across_pieces(monkeypatch):
    monkeypatch.setattr(scan, "_BYTES", 4 * 12)
    weights = softmax(TRIL, 2, 4, 6, 6)
    weights[:, 3] = scores(2, 6, 6, seed=1).softmax(-1)
    weights[1, 3, 0, 5] = 2
    lines = message(assert_causal, weights).splitlines()
    assert lines[0] == "assert_causal: 30 of 120 masked weights are not zero"
    assert lines[1].startswith("  worst    weights[1, 3, 0, 5]: query 0 gives 2 to key 5")
    assert lines[2].startswith("  first    weights[0, 3, 0, 1]: ")
    assert lines[3].endswith("; only in head 3")


def test_4096_rows_and_long_rows_are_read():
    mask = torch.ones(4096, 4096, dtype=torch.bool).tril()
    weights = mask / mask.sum(-1, keepdim=True)
    assert_causal(weights)
    weights[4000, 4095] = 1e-20
    assert "query 4000 gives 1e-20 to key 4095, 95 steps in its future" in message(
        assert_causal, weights
    )
    long = torch.full((1, 2**20), 2**-20)
    long[0, 77] = 0
    assert_masked(long, torch.arange(2**20) != 77)
    assert "weights[0, 78]" in message(assert_masked, long, torch.arange(2**20) != 78)


# --- assert_masked


def test_the_message_of_a_leak_says_all_that_a_ci_log_needs():
    weights = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.25, 0.25], [0.5, 0.25, 0.25]])
    weights = weights.repeat(1, 2, 1, 1)
    weights[0, 1, 0] = torch.tensor([0.25, 0.75, 0.0])
    assert message(assert_masked, weights, TRIL[:3, :3]) == (
        "assert_masked: 3 of 6 masked weights are not zero\n"
        "  worst    weights[0, 1, 0, 1] gives 0.75 to key 1, which the mask forbids (allowed 0)\n"
        "  first    weights[0, 0, 1, 2] gives 0.25 to key 2, which the mask forbids (allowed 0)\n"
        "  tensor   float32 (1, 2, 3, 3) on cpu\n"
        "  head [0, 1]    keys 0..2\n"
        "    q0  ▃▇·  1.000  <-\n"
        "    q1  ▅▃▃  1.000  <-\n"
        "    q2  ▅▃▃  1.000"
    )


@pytest.mark.parametrize("shape", [(6, 6), (1, 6, 6), (2, 4, 6, 6), (6, 1), (1, 6), (2, 1, 1, 6)])
def test_a_mask_broadcasts(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.4
    weights = softmax(mask, 2, 4, 6, 6).nan_to_num()
    assert_masked(weights, mask)
    assert_masked(weights, mask.numpy())
    assert_masked(weights, np.ascontiguousarray(mask.numpy()[..., ::-1])[..., ::-1])
    with pytest.raises(AssertionError):
        assert_masked(scores(2, 4, 6, 6).softmax(-1), mask)


def test_a_mask_that_permits_every_key_is_refused():
    weights = scores(2, 6, 6).softmax(-1)
    with pytest.raises(ValueError, match=r"mask: got shape \(6, 6\) that permits every key, so th"):
        assert_masked(weights, torch.ones(6, 6, dtype=torch.bool))
    assert_support(weights, torch.ones(6, 6, dtype=torch.bool))


@pytest.mark.parametrize(
    ("mask", "error", "words"),
    [
        (None, TypeError, "mask: got None; accepted is a boolean"),
        (TRIL.float(), TypeError, "mask: got dtype float32"),
        (TRIL[:5], ValueError, r"mask: got shape \(5, 6\); .* broadcasts .*\(2, 6, 6\)"),
    ],
)
@pytest.mark.parametrize("check", [assert_masked, assert_support])
def test_what_is_no_mask_of_these_weights_is_refused(check, mask, error, words):
    with pytest.raises(error, match=words):
        check(softmax(TRIL, 2, 6, 6), mask)


def test_what_permitted_keys_hold_is_not_asked():
    assert_masked(torch.full((6, 6), -7.0) * TRIL, TRIL)
    assert_masked(torch.where(TRIL, math.nan, 0.0), TRIL)


def finite_mask(value):
    return (scores(2, 4, 6, 6) + torch.where(TRIL, 0.0, value)).softmax(-1)


# What is broken, the mask that is claimed, and a phrase from the cause.
LEAKS = {
    "no mask": (scores(2, 4, 6, 6).softmax(-1), TRIL, "like the others: no mask was applied?"),
    "opposite": (softmax(~TRIL, 2, 4, 6, 6), TRIL, "opposite meaning? Then pass ~mask"),
    "transposed": (softmax(TRIL.mT, 2, 4, 6, 6), TRIL, "the transposed mask permits it"),
    "no mask, though another entry needs none": (
        scores(2, 4, 6, 8).softmax(-1),
        real_keys([5, 8], 8),
        "like the others: no mask was applied?",
    ),
    "finite": (finite_mask(-7.0), TRIL, "masked by a finite number that is too small, or clamped?"),
    "uniform": (torch.full((2, 4, 6, 6), 1 / 6), TRIL, "no mask was applied?"),
    "all NaN": (torch.full((2, 4, 6, 6), math.nan), TRIL, "this row is NaN at every key"),
    "NaN where masked": (
        softmax(TRIL, 2, 4, 6, 6).masked_fill(~TRIL, math.nan),
        TRIL,
        "all that masked keys hold is NaN",
    ),
    "random": (softmax(TRIL, 2, 4, 6, 6) + (scores(2, 4, 6, 6) > 1) * 0.1, TRIL, None),
}


@pytest.mark.parametrize("leak", LEAKS)
def test_the_cause_of_a_leak_is_named_where_the_numbers_show_it(leak):
    weights, mask, phrase = LEAKS[leak]
    found = cause(assert_masked, weights, mask)
    assert (found is None) if phrase is None else (phrase in found)
    assert cause(assert_support, weights, mask) == found


def test_one_nan_row_is_told_from_a_leak():
    weights = softmax(TRIL, 2, 4, 6, 6)
    weights[1, 2, 3] = math.nan
    assert cause(assert_masked, weights, TRIL) == (
        "this row is NaN at every key: NaN in its scores, or no key left by the mask in use?"
    )


@pytest.mark.skipif(not hasattr(torch, "float8_e8m0fnu"), reason="this torch has no such float8")
@each()
def test_a_dtype_without_a_zero_is_refused(name):
    check, mask = CHECKS[name]
    with pytest.raises(ValueError, match="weights: got dtype float8_e8m0fnu, which has no zero"):
        check(softmax(mask, 2, 4, 6, 6).to(torch.float8_e8m0fnu))


# --- fully masked rows

CONTENT = {"zero": 0.0, "uniform": 1 / 6, "nan": math.nan}
BELOW = torch.ones(6, 6, dtype=torch.bool).tril(-1)


def with_full_row(fill):
    weights = softmax(BELOW, 2, 6, 6)
    weights[:, 0] = fill
    return weights


@pytest.mark.parametrize("declared", CONTENT)
@pytest.mark.parametrize("content", CONTENT)
@pytest.mark.parametrize("check", [assert_masked, assert_support])
def test_a_fully_masked_row_holds_what_was_declared_and_nothing_else(check, content, declared):
    weights = with_full_row(CONTENT[content])
    if content == declared:
        check(weights, BELOW, fully_masked=declared)
        return
    text = message(check, weights, BELOW, fully_masked=declared)
    assert text.startswith(f"{check.__name__}: 2 of 2 fully masked rows ")
    assert f'fully_masked="{content}"' in text


def test_declared_zero_counts_the_weights_of_fully_masked_rows_with_the_others():
    weights = with_full_row(0.5)
    weights[1, 3, 5] = 0.1
    assert "assert_masked: 13 of 42 masked" in message(assert_masked, weights, BELOW)


@pytest.mark.parametrize("declared", ["uniform", "nan"])
def test_otherwise_only_rows_with_a_permitted_key_are_asked_for_zeros(declared):
    weights = with_full_row(CONTENT[declared])
    weights[1, 3, 5] = 0.1
    text = message(assert_masked, weights, BELOW, fully_masked=declared)
    assert text.startswith("assert_masked: 1 of 30 masked weights are not zero")


def test_a_mask_of_fully_masked_rows_alone_is_something_to_check():
    mask = torch.tensor([[True], [False]])
    weights = torch.tensor([[0.5, 0.5], [math.nan, math.nan]])
    assert_masked(weights, mask, fully_masked="nan")
    with pytest.raises(AssertionError, match="1 of 1 fully masked rows hold numbers"):
        assert_masked(torch.ones(2, 2), mask, fully_masked="nan")


# --- assert_causal


@pytest.mark.parametrize(("query_len", "key_len"), [(1, 2), (3, 5), (5, 3), (7, 7), (2, 9)])
@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
@pytest.mark.parametrize("window", [None, 0, 1, 3])
def test_causal_is_what_a_loop_over_positions_says(query_len, key_len, alignment, window):
    offset = key_len - query_len if alignment == "bottom_right" else 0

    def rule(query, key):
        behind = query + offset - key
        return behind >= 0 and (window is None or behind <= window)

    mask = permits(query_len, key_len, rule)
    asked = {"alignment": alignment, "window": window}
    if mask.all():
        with pytest.raises(ValueError, match="nothing to check"):
            assert_causal(torch.ones(query_len, key_len), **asked)
        return
    assert_causal(mask.float(), **asked)
    for query, key in (~mask).nonzero().tolist():
        weights = mask.float()
        weights[query, key] = 0.5
        with pytest.raises(AssertionError, match=rf"weights\[{query}, {key}\]|fully masked"):
            assert_causal(weights, **asked)


def test_the_alignment_must_be_named_where_it_matters_and_only_there():
    with pytest.raises(ValueError) as error:
        assert_causal(torch.ones(2, 3))
    assert str(error.value) == (
        "alignment: got None for 2 queries and 3 keys; accepted is 'top_left' (query 0 stands at "
        "key 0: what is_causal=True means in PyTorch) or 'bottom_right' (the last query stands at "
        "the last key: decoding with a cache)"
    )
    weights = softmax(TRIL, 6, 6)
    for alignment in (None, "top_left", "bottom_right"):
        assert_causal(weights, alignment=alignment)
    with pytest.raises(ValueError, match="alignment: got 'left'; accepted is one of 'top_l"):
        assert_causal(weights, alignment="left")


@pytest.mark.parametrize(
    ("shape", "asked", "rule"),
    [
        ((1, 1), {}, "causal attention"),
        ((1, 9), {"alignment": "bottom_right"}, "alignment='bottom_right'"),
        ((9, 1), {"alignment": "top_left"}, "alignment='top_left'"),
        ((1, 3), {"alignment": "bottom_right", "window": 2}, "window=2"),
    ],
)
def test_weights_in_which_nothing_is_forbidden_are_refused(shape, asked, rule):
    with pytest.raises(ValueError, match=f"{rule} permits every query every key, so there is no"):
        assert_causal(torch.ones(shape), **asked)


def test_a_window_can_be_a_pair_without_a_future():
    weights = softmax(permits(6, 6, lambda q, k: q - 2 <= k <= q), 6, 6)
    assert_causal(weights, window=2)
    assert_causal(weights, window=(2, 0))
    with pytest.raises(ValueError, match=r"window: got \(2, 1\), which reaches into the future"):
        assert_causal(weights, window=(2, 1))
    with pytest.raises(ValueError, match=r"window: got -1; accepted is None, a whole number"):
        assert_causal(weights, window=-1)
    for number in (np.int64(2), torch.tensor(2)):
        assert_causal(weights, window=number)
        assert_causal(weights, window=(number, 0))
        with pytest.raises(AssertionError):
            assert_causal(weights, window=number - 1)
    for wrong in ("2", 2.0, True, np.True_, torch.tensor(True), (1, 2, 3), (True, 0)):
        with pytest.raises(TypeError, match=r"window: got .*; accepted is None, a whole number"):
            assert_causal(weights, window=wrong)


def test_the_message_says_how_far_in_the_future():
    weights = torch.tensor([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 1, 0], [0, 0, 0.5, 0.5]])
    weights[0, 1], weights[1, 3] = 0.31, 0.62
    assert message(assert_causal, weights) == (
        "assert_causal: 2 of 6 masked weights are not zero\n"
        "  worst    weights[1, 3]: query 1 gives 0.62 to key 3, two steps in its future "
        "(allowed 0)\n"
        "  first    weights[0, 1]: query 0 gives 0.31 to key 1, one step in its future "
        "(allowed 0)\n"
        "  tensor   float32 (4, 4) on cpu\n"
        "  keys 0..3\n"
        "    q0  █▃··  1.310  <-\n"
        "    q1  ▅▅·▅  1.620  <-\n"
        "    q2  ▁▁█·  1.000\n"
        "    q3  ▁▁▅▅  1.000"
    )


def test_the_message_says_how_far_before_the_window():
    weights = torch.zeros(4, 8)
    weights[:, 4:] = torch.eye(4)
    weights[2, 1] = 0.25
    text = message(assert_causal, weights, alignment="bottom_right", window=3)
    assert text.splitlines()[1] == (
        "  worst    weights[2, 1]: query 2 gives 0.25 to key 1, two steps before its window of 3 "
        "(allowed 0)"
    )


def window(left, right):
    return permits(12, 12, lambda q, k: q - left <= k <= q + right)


# Which mask was used, what is claimed, and a phrase from the cause.
NOT_CAUSAL = {
    "none": (lambda q, k: True, {}, "every query gives weight to every key: no mask was applied?"),
    "off by one": (lambda q, k: k <= q + 1, {}, "one key of its future: the diagonal is off by"),
    "transposed": (lambda q, k: k >= q, {}, "sees itself and its future, not its past: mask.mT?"),
    "opposite": (lambda q, k: k > q, {}, "on keys that causal attention forbids: a mask of the op"),
    "wider window": (
        lambda q, k: q - 4 <= k <= q,
        {"window": 3},
        "the window is one key too wide?",
    ),
    "no window": (lambda q, k: k <= q, {"window": 3}, "sees all keys before it: no window of 3?"),
    "two sides": (lambda q, k: abs(q - k) <= 3, {"window": 3}, "as far into the future as into"),
    "late window": (
        lambda q, k: q - 3 <= k <= q + 1,
        {"window": 3},
        "one key of its future: the diagonal is off by one?",
    ),
    "far future": (lambda q, k: k <= q + 3, {}, None),
    "wide window": (lambda q, k: q - 6 <= k <= q, {"window": 3}, None),
}


@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_the_cause_of_weight_in_the_future_is_named(name):
    rule, asked, phrase = NOT_CAUSAL[name]
    weights = softmax(permits(12, 12, rule), 2, 4, 12, 12)
    found = cause(assert_causal, weights, **asked)
    assert (found is None) if phrase is None else (phrase in found)


@pytest.mark.parametrize("asked", ["top_left", "bottom_right"])
@pytest.mark.parametrize(("query_len", "key_len"), [(5, 9), (9, 5)])
def test_the_other_alignment_is_recognised(asked, query_len, key_len):
    other = "bottom_right" if asked == "top_left" else "top_left"
    offset = key_len - query_len if other == "bottom_right" else 0
    mask = permits(query_len, key_len, lambda q, k: k <= q + offset)
    weights = softmax(mask, 2, 4, query_len, key_len).nan_to_num()
    if offset < (key_len - query_len if asked == "bottom_right" else 0):
        assert_causal(weights, alignment=asked)  # it permits less
        return
    assert cause(assert_causal, weights, alignment=asked) == (
        f'weight lies exactly where alignment="{other}" permits it'
    )


def test_one_leak_has_no_cause():
    weights = softmax(TRIL, 2, 4, 6, 6)
    weights[1, 2, 3, 5] = 0.31
    assert cause(assert_causal, weights) is None


def test_whole_heads_without_a_mask_are_named():
    weights = softmax(TRIL, 2, 4, 6, 6)
    weights[:, [1, 3]] = scores(2, 2, 6, 6, seed=1).softmax(-1)
    assert cause(assert_causal, weights) == (
        "every query gives weight to every key: no mask was applied?; only in heads 1, 3"
    )
    weights[1, 3] = softmax(TRIL, 6, 6)
    assert "only in" not in cause(assert_causal, weights)


def test_a_broken_assertion_leaves_a_picture_with_its_rows_outlined(pytester):
    weights = softmax(TRIL, 2, 4, 6, 6)
    weights[1, 2, 3, 5] = weights[1, 2, 0, 1] = 0.31
    with pytest.raises(Failure) as caught:
        assert_causal(weights)
    shown = caught.value.draw().picture.shown
    np.testing.assert_array_equal(shown.cells.values[0, 0], weights[1, 2].numpy())
    np.testing.assert_array_equal(shown.cells.masked[0, 0], ~TRIL.numpy())
    assert set(shown.highlight) == {(0, 0, 0), (0, 0, 3)}
    assert shown.design.words.title == "2 of 120 masked weights are not zero"
    pytester.makepyfile(
        """
        import torch
        from pytest_attnheat import assert_causal

        def test_it():
            assert_causal(torch.full((1, 2, 6, 6), 1 / 6))
        """
    )
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    result.stdout.fnmatch_lines(
        [
            "E*assert_causal: 30 of 30 masked weights are not zero",
            "*- heatmap of the broken rows -*",
        ]
    )
    path = next((pytester.path / "attn-artifacts").rglob("rows.png"))
    assert read_heatmaps(path).shape == (1, 1, 6, 6)


# --- assert_support


@pytest.mark.parametrize("bad", [0.0, -0.0, -1e-7, math.nan])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_permitted_key_without_a_positive_weight_is_found(dtype, bad):
    weights = softmax(TRIL, 2, 4, 6, 6).to(dtype)
    weights[1, 2, 3, 1] = bad
    text = message(assert_support, weights, TRIL)
    assert text.startswith("assert_support: 1 of 168 permitted weights are not positive\n")
    assert "weights[1, 2, 3, 1] gives" in text
    assert "to key 1, which the mask permits (allowed: more than 0)" in text


def test_nan_is_worse_than_a_negative_weight_and_that_is_worse_than_none():
    weights = softmax(TRIL, 6, 6)
    weights[1, 0] = 0
    weights[3, 1] = -0.5
    lines = message(assert_support, weights, TRIL).splitlines()
    assert lines[1].startswith("  worst    weights[3, 1] gives -0.5 ")
    assert lines[2].startswith("  first    weights[1, 0] gives 0 ")
    weights[5, 2] = math.nan
    assert "worst    weights[5, 2] gives nan" in message(assert_support, weights, TRIL)


def test_weight_outside_is_reported_before_weight_missing_inside():
    text = message(assert_support, softmax(~TRIL, 6, 6).nan_to_num(), TRIL)
    assert text.startswith("assert_support: 15 of 15 masked weights are not zero")


def test_the_message_of_a_mask_that_hides_too_much():
    mask = torch.ones(3, 3, dtype=torch.bool).tril()
    weights = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.5, 0.5, 0.0]])
    assert message(assert_support, weights, mask) == (
        "assert_support: 3 of 6 permitted weights are not positive\n"
        "  worst    weights[0, 0] gives 0 to key 0, which the mask permits "
        "(allowed: more than 0)\n"
        "  cause    no query gives weight to its own position: key < query in place of "
        "key <= query?\n"
        "  tensor   float32 (3, 3) on cpu\n"
        "  keys 0..2\n"
        "    q0  ▁··  0.000  <-\n"
        "    q1  █▁·  1.000  <-\n"
        "    q2  ▅▅▁  1.000  <-"
    )


def rows_left_out():
    weights = softmax(TRIL, 2, 4, 6, 6)
    weights[:, :, [1, 4]] = 0
    return weights


def dropped_out():
    keep = torch.rand(2, 4, 6, 6, generator=torch.Generator().manual_seed(0)) > 0.3
    return softmax(TRIL, 2, 4, 6, 6) * keep


def after_dropout(p):
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(2, 4, 24, 24, generator=generator) > p
    causal = permits(24, 24, lambda q, k: k <= q)
    return softmax(causal, 2, 4, 24, 24) * keep / (1 - p), causal


def head_left_out():
    weights = softmax(TRIL, 2, 4, 6, 6)
    weights[:, 3] = 0
    return weights


HIDDEN = {
    "strictly causal": (softmax(BELOW, 2, 4, 6, 6).nan_to_num(), TRIL, "to its own position"),
    "nan in the first row": (softmax(BELOW, 2, 4, 6, 6), TRIL, "no key left by the mask in use?"),
    "narrow window": (
        softmax(window(2, 0), 2, 12, 12),
        window(3, 0),
        "a window that is one key too narrow?",
    ),
    "narrow padding": (
        softmax(real_keys([4, 6], 8), 2, 4, 6, 8),
        real_keys([5, 7], 8),
        "the last permitted key of every row gets no weight: off by one?",
    ),
    "causal": (softmax(TRIL, 2, 4, 6, 6), ALL, "its future: a causal mask where none was meant?"),
    "rows": (rows_left_out(), TRIL, "2 rows hold only zeros although the mask permits keys"),
    "head": (head_left_out(), TRIL, "a head that was left out?; only in head 3"),
    "negative": (scores(2, 4, 6, 6) * TRIL, TRIL, "negative weights: scores that no softmax"),
    "one key too few, none in the first rows": (
        softmax(BELOW.tril(-2), 2, 4, 6, 6).nan_to_num(),
        BELOW,
        "the last permitted key of every row gets no weight: off by one?",
    ),
    "dropped without a scale": (dropped_out(), TRIL, None),
    "dropout": (*after_dropout(0.1), "weights after dropout (p about 0.1"),
    "much dropout": (*after_dropout(0.5), "weights after dropout (p about 0."),
    "one place": (
        torch.ones(24, 24).index_put((torch.tensor([7]),) * 2, torch.zeros(1)),
        ALL,
        None,
    ),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_missing_weight_is_told_whatever_the_default_device(name):
    weights, mask, phrase = HIDDEN[name]
    with torch.device("meta"):
        found = cause(assert_support, weights, mask)
    assert (found is None) if phrase is None else (phrase in found)


@pytest.mark.parametrize("name", HIDDEN)
def test_the_cause_of_missing_weight_is_named(name):
    weights, mask, phrase = HIDDEN[name]
    found = cause(assert_support, weights, mask)
    assert (found is None) if phrase is None else (phrase in found)


# --- assert_padding_masked


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("shape", [(3, 4, 8), (3, 2, 4, 8), (3, 2, 5, 4, 8)], ids=str)
@pytest.mark.parametrize("kind", [list, torch.tensor, np.array, tuple])
def test_weights_of_any_shape_with_padding_pass(shape, side, kind):
    lengths = [5, 8, 2]
    mask = real_keys(lengths, 8, side).reshape(3, *[1] * (len(shape) - 2), 8)
    weights = softmax(mask, *shape)
    assert_padding_masked(weights, kind(lengths), side=side)
    key = 6 if side == "right" else 1
    place = (0,) * (len(shape) - 1) + (key,)
    weights[place] = 0.12
    with pytest.raises(AssertionError, match="padding of batch entry 0 "):
        assert_padding_masked(weights, kind(lengths), side=side)


@pytest.mark.parametrize(
    "lengths",
    [
        np.array([3, 5])[::-1],
        np.array([5, 3], ">i8"),
        np.array([5, 3], object),
        np.array([5, 3], np.uint16),
        [np.int64(5), torch.tensor(3)],
    ],
    ids=["reversed", "big endian", "objects", "unsigned", "scalars"],
)
def test_lengths_of_any_whole_numbers_are_read(lengths):
    weights = softmax(real_keys([5, 3], 6), 2, 4, 6, 6)
    assert_padding_masked(weights, lengths)
    weights[1, 0, 0, 3] = 0.5
    assert "(its length is 3; allowed 0)" in message(assert_padding_masked, weights, lengths)


def test_the_message_names_the_batch_entry_and_its_length():
    weights = torch.zeros(2, 1, 2, 4)
    weights[..., 0] = 1
    weights[1, 0, 1, 3] = 0.12
    assert message(assert_padding_masked, weights, [4, 3]) == (
        "assert_padding_masked: 1 of 2 masked weights are not zero\n"
        "  worst    weights[1, 0, 1, 3] gives 0.12 to key 3, padding of batch entry 1 (its length "
        "is 3; allowed 0)\n"
        "  tensor   float32 (2, 1, 2, 4) on cpu\n"
        "  head [1, 0]    keys 0..3\n"
        "    q0  █▁▁·  1.000\n"
        "    q1  █▁▁▁  1.120  <-"
    )


def test_an_entry_without_any_real_key_is_fully_masked():
    weights = softmax(real_keys([4, 0], 5), 2, 3, 6, 5)
    assert_padding_masked(weights, [4, 0], fully_masked="nan")
    text = message(assert_padding_masked, weights, [4, 0])
    assert text.startswith("assert_padding_masked: 18 of 18 fully masked rows are not zero")


def padded_rows_uniform():
    weights = softmax(real_keys([5, 8, 3], 8), 3, 2, 8, 8)
    weights[0, :, 5:] = weights[2, :, 3:] = 1 / 8
    return weights


def padded(lengths, side="right"):
    return softmax(real_keys(lengths, 8, side), 3, 2, 8, 8)


def causal_padded():
    return softmax(permits(8, 8, lambda q, k: k <= q), 3, 2, 8, 8)


def some_nan():
    weights = padded([5, 8, 3])
    weights[:, :, 2, 3:] = math.nan
    return weights


LEAKY = {
    "causal alone": (
        causal_padded(),
        "causal attention without a padding mask: only queries that are padding themselves reach "
        "it; pass the weights of the real queries, or mask the padding",
    ),
    "all NaN": (torch.full((3, 2, 8, 8), math.nan), "this row is NaN at every key: NaN in its"),
    "some NaN": (some_nan(), "all that masked keys hold is NaN"),
    "ignored": (scores(3, 2, 8, 8).softmax(-1), "no padding mask was applied?"),
    "ignored by one head": (
        torch.cat([padded([5, 8, 3])[:, :1], scores(3, 1, 8, 8).softmax(-1)], 1),
        "in some rows or heads, and none in others: are these the weights of other heads or",
    ),
    "other side": (padded([5, 8, 3], "left"), 'exactly where side="left" permits it'),
    "off by one": (padded([6, 8, 4]), "exactly one padded key: the length is off by one?"),
    "causal, off by one": (
        softmax(real_keys([6, 8, 4], 8) & permits(8, 8, lambda q, k: k <= q), 3, 2, 8, 8),
        "exactly one padded key: the length is off by one?",
    ),
    "padded queries": (padded_rows_uniform(), "only queries that are padding themselves"),
    "random": (padded([5, 8, 3]) + (scores(3, 2, 8, 8) > 1.5) * 0.1, None),
}


@pytest.mark.parametrize("name", LEAKY)
def test_the_cause_of_weight_on_padding_is_named(name):
    weights, phrase = LEAKY[name]
    found = cause(assert_padding_masked, weights, [5, 8, 3])
    assert (found is None) if phrase is None else (phrase in found)


@pytest.mark.parametrize(
    ("lengths", "error", "words"),
    [
        ([6, 6], ValueError, r"got \[6, 6\] for 6 keys: no batch entry has padding, so there is"),
        ([6], ValueError, r"lengths: got shape \(1,\) for 2 batch entries; accepted is one whole"),
        ([], ValueError, r"lengths: got shape \(0,\) for 2 batch entries"),
        ([[1, 2]], ValueError, r"lengths: got shape \(1, 2\)"),
        ([7, 1], ValueError, r"lengths: got \[7, 1\]; accepted is one whole number from 0 to 6"),
        ([-1, 1], ValueError, r"lengths: got \[-1, 1\]"),
        ([1.0, 2.0], TypeError, "lengths: got dtype float64"),
        ([True, False], TypeError, "lengths: got dtype bool"),
        ("ab", TypeError, "lengths: got 'ab'; accepted is one whole number"),
        (None, TypeError, "lengths: got None"),
    ],
)
def test_lengths_that_make_no_sense_are_refused(lengths, error, words):
    with pytest.raises(error, match=words):
        assert_padding_masked(softmax(TRIL, 2, 4, 6, 6), lengths)


def test_a_batch_and_a_known_side_are_needed():
    with pytest.raises(ValueError, match=r"got 2 dimensions, .*accepted is three or more: \(batch"):
        assert_padding_masked(softmax(TRIL, 6, 6), [3] * 6)
    with pytest.raises(ValueError, match="side: got 'top'; accepted is one of 'right', 'l"):
        assert_padding_masked(softmax(TRIL, 2, 6, 6), [3, 3], side="top")


# --- attention that others wrote


def test_the_weights_of_multihead_attention_are_causal_and_hide_padding():
    torch.manual_seed(0)
    attention = torch.nn.MultiheadAttention(16, 4, batch_first=True).eval()
    x = scores(2, 6, 16)
    forbidden = ~TRIL
    padding = ~real_keys([6, 4], 6).reshape(2, 6)
    ask = {"need_weights": True, "average_attn_weights": False}
    _, weights = attention(x, x, x, attn_mask=forbidden, key_padding_mask=padding, **ask)
    assert_causal(weights)
    assert_padding_masked(weights, [6, 4])
    assert_support(weights, TRIL & real_keys([6, 4], 6))
    _, unmasked = attention(x, x, x, **ask)
    assert "no mask was applied?" in cause(assert_causal, unmasked)
    assert "no padding mask was applied?" in cause(assert_padding_masked, unmasked, [6, 4])


TINY = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
}


def attentions(model, **batch):
    with torch.no_grad():
        return model.eval()(**batch, output_attentions=True).attentions


def test_bert_hides_padding_and_sees_everything_else():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(**TINY, attn_implementation="eager")
    ids = torch.randint(0, 50, (2, 7))
    attended = real_keys([7, 4], 7).reshape(2, 7)
    for weights in attentions(
        transformers.BertModel(config), input_ids=ids, attention_mask=attended.long()
    ):
        assert_padding_masked(weights, [7, 4])
        assert_support(weights, real_keys([7, 4], 7))
        with pytest.raises(AssertionError, match="masked weights are not zero"):
            assert_causal(weights)


def test_gpt2_is_causal():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=16, attn_implementation="eager"
    )
    for weights in attentions(
        transformers.GPT2Model(config), input_ids=torch.randint(0, 50, (2, 7))
    ):
        assert_causal(weights)
        assert_support(weights, permits(7, 7, lambda q, k: k <= q))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_llama_is_causal_with_grouped_heads_a_cache_and_left_padding(dtype):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**TINY, num_key_value_heads=2, attn_implementation="eager")
    model = transformers.LlamaModel(config).eval().to(dtype)
    ids = torch.randint(0, 50, (2, 7))
    for weights in attentions(model, input_ids=ids):
        assert_causal(weights)
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    for weights in attentions(model, input_ids=ids[:, :3], **kept(model, cache)):
        assert weights.shape == (2, 4, 3, 10)
        assert_causal(weights, alignment="bottom_right")
        assert 'alignment="bottom_right"' in cause(assert_causal, weights, alignment="top_left")
    # Left-padded queries have no key: eager attention gives them a uniform row.
    real = real_keys([7, 4], 7, "left")
    mask = real & permits(7, 7, lambda q, k: k <= q)
    attended = real.reshape(2, 7).long()
    for weights in attentions(model, input_ids=ids, attention_mask=attended):
        assert_masked(weights, mask, fully_masked="uniform")
        found = cause(assert_padding_masked, weights, [7, 4], side="left")
        assert found.startswith("only queries that are padding themselves attend to it")
        assert cause(assert_causal, weights) == (
            "these rows are uniform: fully masked, by a finite number? Pass the whole mask to "
            'assert_masked with fully_masked="uniform"'
        )


@on_accelerators(FLOATS)
@each()
def test_everything_works_on_an_accelerator(name, dtype, accelerator):
    check, mask = CHECKS[name]
    weights = softmax(mask, 2, 4, 6, 6).to(accelerator, dtype)
    check(weights)
    weights[1, 2, 3, 5] = 0.25
    assert f"on {accelerator}:0" in message(check, weights)
    assert_masked(softmax(TRIL, 2, 6, 6).to(accelerator), TRIL.to(accelerator))
    assert_padding_masked(
        softmax(real_keys([6, 4], 6), 2, 4, 6, 6).to(accelerator),
        torch.tensor([6, 4], device=accelerator),
    )
