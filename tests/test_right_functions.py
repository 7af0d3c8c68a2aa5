"""Right functions that may be taken for wrong, and what is said of what cannot be asked."""

import functools
import importlib.util
import warnings

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.utils.checkpoint import checkpoint

from pytest_attnheat import (
    AttentionSpec,
    assert_decode_matches_prefill,
    assert_gradients_match,
    assert_no_leakage,
    check_attention,
)
from pytest_attnheat.attention.levels import text_of
from pytest_attnheat.contract.checks import CHECKS
from pytest_attnheat.contract.examination import Examination

ONE = ("float32",)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def statuses(report):
    return {result.name: result.status for result in report.results}


def later(query, key, *, from_the_end=False):
    """Where a key is in the future of a query."""
    sizes = query.shape[-2], key.shape[-2]
    begins = sizes[1] - sizes[0] if from_the_end else 0
    return torch.ones(sizes, dtype=torch.bool).triu(begins + 1)


# --- what is asked of float16


def behind(left, wide):
    """A window of so many keys before each query, computed in a dtype."""

    def attention(query, key, value):
        sizes = query.shape[-2], key.shape[-2]
        far = torch.ones(sizes, dtype=torch.bool).tril(sizes[1] - sizes[0] - left - 1)
        hidden = far | later(query, key, from_the_end=True)
        scores = query.to(wide) @ key.to(wide).mT / query.shape[-1] ** 0.5
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num()
        return (weights @ value.to(wide)).to(value.dtype)

    return attention


@pytest.mark.parametrize("left", [0, 1, 2, 4, 8])
def test_products_beyond_float16_are_asked_only_of_what_computes_in_more(left):
    def numbers(wide):
        declared = {"window": (left, 0), "causal": "bottom_right", "dtypes": ("float16",)}
        spec = AttentionSpec(behind(left, wide), **declared)
        return Examination(spec, torch.float16, torch.device("cpu")).space.declared.numbers

    assert "overflowing" not in numbers(torch.float16)
    # Of one key, nothing tells them apart.
    assert ("overflowing" in numbers(torch.float32)) == (left > 0)


# --- shapes that are not taken


def always_causal_from_the_end(query, key, value):
    return sdpa(query, key, value, ~later(query, key, from_the_end=True))


def of_as_many_keys(query, key, value):
    """Self-attention: its mask is made for the queries, and must fit the keys."""
    scores = query @ key.mT / query.shape[-1] ** 0.5
    return scores.masked_fill(later(query, query), -torch.inf).softmax(-1) @ value


def of_as_many_keys_if_causal(query, key, value, is_causal=False):
    return of_as_many_keys(query, key, value) if is_causal else sdpa(query, key, value)


def of_equal_widths(query, key, value):
    assert key.shape == value.shape
    return sdpa(query, key, value)


def of_widths_of_sixteen(query, key, value, attn_mask=None, is_causal=False):
    if query.shape[-1] % 16:
        raise ValueError("head_dim must be a multiple of 16")
    if attn_mask is not None and (is_causal or attn_mask.shape[1] > 1):
        raise ValueError("one mask for all heads, and nothing besides")
    return sdpa(query, key, value, attn_mask, is_causal=is_causal)


def without_masks(query, key, value, attn_mask=None, is_causal=False):
    if attn_mask is not None:
        raise NotImplementedError("no mask yet")
    return sdpa(query, key, value, is_causal=is_causal)


def through_a_checkpoint(query, key, value):
    with warnings.catch_warnings():  # of a call without gradients
        warnings.simplefilter("ignore")
        return checkpoint(sdpa, query, key, value, use_reentrant=True)


LOWER = torch.ones(5, 5, dtype=torch.bool).tril()
SINKS = torch.linspace(-1, 1.5, 4)


def by_rule(rule):
    """Attention in float64 of what a rule of positions, a mask and causality permit."""

    def attention(query, key, value, attn_mask=None, is_causal=False):
        scores = query.double() @ key.double().mT * query.shape[-1] ** -0.5
        i, j = torch.arange(scores.shape[-2])[:, None], torch.arange(scores.shape[-1])
        seen = rule(i, j, is_causal)
        seen = seen if attn_mask is None else seen & attn_mask
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
        return (weights @ value.double()).to(value.dtype)

    return attention


def causal_and(rule):
    return by_rule(lambda i, j, is_causal: rule(i, j) & ((j <= i) | (not is_causal)))


def with_sinks_of_its_own(q, k, v):
    """(batch, length, heads, width), and sums in another order than a product of matrices."""
    k, v = (tensor.repeat_interleave(q.shape[2] // k.shape[2], 2) for tensor in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    sinks = SINKS.to(scores)[:, None, None].expand(*scores.shape[:-1], 1)
    weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    return torch.einsum("bhij,bjhd->bihd", weights, v)


RIGHT = {
    "chunks": AttentionSpec(causal_and(lambda i, j: i // 3 == j // 3), chunk=3, dtypes=ONE),
    "every second key": AttentionSpec(
        causal_and(lambda i, j: (i + j) % 2 == 0),
        may_see=lambda batch, head, i, j: (i + j) % 2 == 0,
        dtypes=ONE,
    ),
    "booleans of few positions": AttentionSpec(
        causal_and(lambda i, j: LOWER[i, j]), may_see=LOWER, dtypes=ONE
    ),
    "a prefix": AttentionSpec(
        by_rule(lambda i, j, is_causal: (j <= i) | (j < 2) | (not is_causal)), prefix=2, dtypes=ONE
    ),
    "sinks of its own": AttentionSpec(
        with_sinks_of_its_own, layout="blhd", sinks=SINKS, grouped=True, dtypes=["float64"]
    ),
    "always causal from the end": AttentionSpec(
        always_causal_from_the_end, causal="bottom_right", window=(None, 0), dtypes=ONE
    ),
    "self-attention": AttentionSpec(of_as_many_keys, window=(None, 0), dtypes=ONE),
    "self-attention, declared": AttentionSpec(
        of_as_many_keys, window=(None, 0), square=True, dtypes=ONE
    ),
    "self-attention if causal": AttentionSpec(of_as_many_keys_if_causal, dtypes=ONE),
    "equal widths": AttentionSpec(of_equal_widths, dtypes=ONE),
    "few widths and shapes of masks": AttentionSpec(of_widths_of_sixteen, dtypes=ONE),
    "no masks": AttentionSpec(without_masks, dtypes=ONE),
    "a checkpoint": AttentionSpec(through_a_checkpoint, dtypes=ONE),
}


@functools.cache
def report_on(name):
    return check_attention(RIGHT[name])


@pytest.mark.parametrize("name", RIGHT)
def test_right_functions_pass(name):
    report = report_on(name)
    assert report.passed, str(report)
    found = statuses(report)
    for asked in ("plain", "gradients", "pairs", "no_leakage"):
        assert found[asked] == "passed", asked
    few = name == "booleans of few positions"
    assert found["block_lengths"] == ("skipped" if few else "passed")


def test_what_is_always_causal_from_the_end_is_asked_to_decode():
    name = "always causal from the end"
    assert statuses(report_on(name))["decoding"] == "passed"


def merged_with_a_sink(query, key, value, is_causal=False):
    """Three parts of the keys and a high sink, merged by the logarithms of their sums."""
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if is_causal:
        scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -torch.inf)
    parts = list(zip(scores.tensor_split(3, -1), value.tensor_split(3, -2), strict=True))
    sums = [part.logsumexp(-1) for part, _ in parts]
    shares = torch.stack([*sums, HIGH.to(query.dtype)[:, None].expand_as(sums[0])], -1).softmax(-1)
    outputs = [part.softmax(-1).nan_to_num() @ own for part, own in parts]
    return sum(shares[..., i, None] * output for i, output in enumerate(outputs))


HIGH = torch.tensor([20.0, 9.0])


@pytest.mark.parametrize("seed", range(3))
def test_a_high_sink_that_is_merged_as_a_part_is_allowed_its_rounding(seed):
    spec = AttentionSpec(merged_with_a_sink, causal="top_left", sinks=HIGH, dtypes=ONE)
    examination = Examination(spec, torch.float32, torch.device("cpu"), seed)
    for sizes in ((7, 7), (16, 16), (31, 31)):
        for causal in (False, True):
            chosen = {"sizes": sizes, "numbers": "structured", "causal": causal}
            examination.judge(examination.choice(**chosen, gradients="all"))


def test_an_answer_that_the_next_call_overwrites_is_told_and_nothing_else_is():
    answers = {}

    def attention(query, key, value):
        output = sdpa(query, key, value)
        return answers.setdefault(output.shape, torch.empty_like(output)).copy_(output)

    report = check_attention(AttentionSpec(attention, dtypes=ONE, gradients=False))
    assert [result.name for result in report.failed] == ["repeats"]
    assert "it returns the same memory at each call" in report.failed[0].reason


def test_what_is_refused_is_said():
    report = report_on("few widths and shapes of masks")
    (said,) = (result.message for result in report.results if result.name == "pairs")
    assert "head_dim=40" in said
    assert "(ValueError: head_dim must be a multiple of 16)" in said
    assert "mask=boolean shape=(1,H,L,S) (ValueError: one mask for all heads, and " in said
    assert statuses(report)["padding"] == "passed"
    report = report_on("self-attention if causal")
    assert statuses(report)["causal_rectangular"] == "skipped"
    assert statuses(report)["causal"] == "passed"


@pytest.mark.parametrize("words", ["No available kernel.", "No viable backend for this."])
def test_a_kernel_that_is_not_there_is_refused_and_not_wrong(words):
    def absent(query, key, value):
        raise RuntimeError(words)

    report = check_attention(AttentionSpec(absent, dtypes=ONE), quick=True)
    assert not report.failed
    assert not report.passed
    assert f"the subject refuses: {words}" in {result.message for result in report.results}


@pytest.mark.filterwarnings("ignore")  # PyTorch says why there is no kernel
def test_a_backend_of_pytorch_that_is_not_there_is_refused():
    def efficient(query, key, value):
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            return sdpa(query, key, value)

    report = check_attention(AttentionSpec(efficient, dtypes=ONE, devices=("cpu",)))
    assert not report.failed, str(report)


def bare_assert(tmp_path):
    """A function of a module that pytest does not rewrite, as installed ones are not."""
    path = tmp_path / "installed.py"
    path.write_text(BARE, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("installed", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.attention


BARE = """
from torch.nn.functional import scaled_dot_product_attention as sdpa


def attention(query, key, value, is_causal=False):
    assert not is_causal
    return sdpa(query, key, value)
"""


def test_an_assert_of_the_subject_is_told_in_its_own_words(tmp_path):
    def asserting(query, key, value, is_causal=False):
        assert not is_causal
        return sdpa(query, key, value)

    report = check_attention(AttentionSpec(asserting, dtypes=ONE), quick=True)
    (result,) = (result for result in report.failed if result.name == "causal")
    line = asserting.__code__.co_firstlineno + 1
    assert "AssertionError" in result.message
    assert f"test_right_functions.py:{line}" in result.message

    # What pytest does not rewrite says nothing: then its line does.
    bare = bare_assert(tmp_path)
    report = check_attention(AttentionSpec(bare, dtypes=ONE), quick=True)
    (result,) = (result for result in report.failed if result.name == "causal")
    wanted = "it raised AssertionError: assert not is_causal (installed.py:6)"
    assert result.message.startswith(wanted)

    def saying(query, key, value):
        raise AssertionError("no such head")

    report = check_attention(AttentionSpec(saying, dtypes=ONE), quick=True)
    assert all("AssertionError: no such head" in result.message for result in report.failed)


def test_a_checkpoint_is_asked_for_gradients_by_the_assertions_too():
    tensors = randn(3, 2, 2, 7, 8).unbind()
    assert_no_leakage(through_a_checkpoint, *tensors)
    assert_gradients_match(through_a_checkpoint, *tensors)

    def leaking(query, key, value):
        return through_a_checkpoint(query, key, value.cumsum(1))

    with pytest.raises(AssertionError, match="assert_no_leakage"):
        assert_no_leakage(leaking, *tensors)


# --- wrong ones of the same kinds


def causal_wrong_where_lengths_differ(query, key, value, is_causal=False):
    shift = 1 if query.shape[-2] != key.shape[-2] else 0
    mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool)
    return sdpa(query, key, value, mask.tril(shift) if is_causal else mask)


def of_equal_widths_and_wrong(query, key, value, is_causal=False):
    if key.shape != value.shape:
        raise ValueError("equal widths only")
    return causal_wrong_where_lengths_differ(query, key, value, is_causal)


def self_attention_without_a_scale(query, key, value):
    scores = query @ key.mT
    return scores.masked_fill(later(query, query), -torch.inf).softmax(-1) @ value


@pytest.mark.parametrize(
    ("function", "declared", "rows"),
    [
        (causal_wrong_where_lengths_differ, {}, {"causal_rectangular", "pairs"}),
        (of_equal_widths_and_wrong, {}, {"causal_rectangular", "pairs"}),
        (self_attention_without_a_scale, {"window": (None, 0)}, {"plain", "gradients", "pairs"}),
    ],
    ids=lambda given: getattr(given, "__name__", ""),
)
def test_wrong_functions_of_few_shapes_are_found(function, declared, rows):
    asked = [one for one in CHECKS if one.name in {*rows, "shape_and_dtype"}]
    report = check_attention(AttentionSpec(function, dtypes=ONE, **declared), checks=asked)
    assert rows == {result.name for result in report.failed}


# --- what a mask of two dimensions means


def mask_of_keys(query, key, value, mask=None, causal=False):
    """A mask of two dimensions is (batch, key_len), as this code says."""
    scores = query @ key.mT / query.shape[-1] ** 0.5
    lowest = torch.finfo(scores.dtype).min
    if mask is not None:
        mask = mask[:, None, None] if mask.ndim == 2 else mask
        scores = scores.masked_fill(~mask, lowest)
    if causal:
        scores = scores.masked_fill(later(query, key, from_the_end=True), lowest)
    return scores.softmax(-1) @ value


def keys_alone(query, key, value, mask=None):
    assert mask is None or mask.ndim == 2
    return mask_of_keys(query, key, value, mask)


def queries_and_keys_alone(query, key, value, attn_mask=None, is_causal=False):
    assert attn_mask is None or attn_mask.shape == (query.shape[-2], key.shape[-2])
    keep = ~later(query, key) | (not is_causal)
    return sdpa(query, key, value, keep if attn_mask is None else keep & attn_mask)


def test_a_mask_of_keys_is_handed_over_in_a_shape_that_cannot_be_misread():
    spec = AttentionSpec(
        mask_of_keys, mask_argument="mask", causal_argument="causal", causal="bottom_right",
        fully_masked="undefined", dtypes=ONE,
    )  # fmt: skip
    report = check_attention(spec)
    assert report.passed, str(report)
    tensors = randn(3, 2, 4, 7, 8).unbind()
    assert_no_leakage(spec, *tensors, is_causal=True)
    assert_decode_matches_prefill(spec, *tensors, is_causal=True)


@pytest.mark.parametrize(
    ("function", "shape", "declared"),
    [(keys_alone, "(B, S)", {"mask_argument": "mask"}), (queries_and_keys_alone, "(L, S)", {})],
)
def test_one_shape_of_masks_is_asked_where_it_is_declared(function, shape, declared):
    spec = AttentionSpec(function, mask_shape=shape, dtypes=ONE, **declared)
    report = check_attention(spec)
    assert report.passed, str(report)
    found = statuses(report)
    assert found["masked"] == found["pairs"] == found["padding"] == "passed"


def test_the_smallest_call_is_told_as_it_is_replayed():
    spec = AttentionSpec(causal_wrong_where_lengths_differ, dtypes=ONE)
    pairs = [one for one in CHECKS if one.name == "pairs"]
    (result,) = check_attention(spec, checks=pairs).failed
    smallest = {"sizes": (1, 2), "batch": 1, "key_heads": 1, "head_dim": 8}
    assert f'--attn-replay="{text_of(smallest)} causal=True' in result.message
    assert "all with causal=True" in result.message
