"""The hard cases are what their names say, in every dtype."""

import dataclasses
import functools
import math
import re
from pathlib import Path

import pytest
import torch

from pytest_attnheat import assert_matches_reference
from pytest_attnheat.attention.computation import reference
from pytest_attnheat.attention.hard_cases import FEATURE_CASES, HARD_CASES, HardCase, hard_case

DTYPES = ["float64", "float32", "float16", "bfloat16"]
# What exp of each dtype can still hold, written out: the oracle of "large_magnitudes".
EXP_OVERFLOWS = {"float64": 709.8, "float32": 88.8, "float16": 11.1, "bfloat16": 88.8}


def scores(case):
    return case.query.double() @ case.key.double().mT / math.sqrt(case.query.shape[-1])


def lengths(case):
    return case.query.shape[-2], case.key.shape[-2]


def test_names_are_unique_and_good_as_pytest_ids():
    names = (*HARD_CASES, *FEATURE_CASES)
    assert len(set(names)) == len(names)
    assert len(HARD_CASES) > 30
    assert all(re.fullmatch(r"[a-z0-9_]+", name) for name in names)


@pytest.mark.parametrize("name", [*HARD_CASES, *FEATURE_CASES])
def test_every_case_says_in_a_sentence_what_breaks_on_it(name):
    case = hard_case(name)
    assert case.name == name
    assert case.why[0].isupper() or case.why.startswith(("exp", "is_causal"))
    assert case.why.endswith(".")
    assert case.why in repr(case)
    assert name in repr(case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", HARD_CASES)
def test_all_numbers_and_scores_are_within_the_range_of_the_dtype(name, dtype):
    case = hard_case(name, dtype=dtype)
    for tensor in (case.query, case.key, case.value, (case.query @ case.key.mT)):
        assert tensor.dtype == getattr(torch, dtype)
        assert tensor.isfinite().all()


@pytest.mark.parametrize("name", [*HARD_CASES, *FEATURE_CASES])
def test_a_case_depends_on_its_seed_and_on_nothing_else(name):
    torch.manual_seed(1)
    first, state = hard_case(name, seed=3), torch.get_rng_state()
    torch.manual_seed(2)
    again, other = hard_case(name, seed=3), hard_case(name, seed=4)
    assert torch.equal(first.query, again.query)
    assert torch.equal(first.value, again.value)
    assert not torch.equal(first.value, other.value)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", HARD_CASES)
def test_batch_and_heads_are_the_callers(name):
    case = hard_case(name, batch=3, heads=5)
    assert case.query.shape[:2] == case.key.shape[:2] == case.value.shape[:2] == (3, 5)
    if case.attn_mask is not None:
        torch.broadcast_shapes(case.attn_mask.shape, (3, 5, *lengths(case)))


@pytest.mark.parametrize("name", HARD_CASES)
def test_arguments_hold_only_what_is_set(name):
    case = hard_case(name)
    expected = {"attn_mask": case.attn_mask} if case.attn_mask is not None else {}
    expected |= {"is_causal": True} if case.is_causal else {}
    assert case.arguments.keys() == expected.keys()
    assert case.attn_mask is None or case.attn_mask.dtype == torch.bool


@pytest.mark.parametrize("name", HARD_CASES)
def test_only_the_case_of_fully_masked_rows_has_any(name):
    case = hard_case(name, batch=2)
    lost = case.attn_mask is not None and not bool(case.attn_mask.any(-1).all())
    assert lost == (name == "fully_masked_rows")


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_magnitudes_overflow_exp_and_nothing_else(dtype):
    top = float(scores(hard_case("large_magnitudes", dtype=dtype)).max())
    assert top > 2 * EXP_OVERFLOWS[dtype]
    assert not torch.tensor(top, dtype=getattr(torch, dtype)).exp().isfinite()


def test_tiny_magnitudes_are_tiny_and_not_zero_in_float16():
    case = hard_case("tiny_magnitudes", dtype="float16")
    for tensor in (case.query, case.key, case.value):
        assert 0 < float(tensor.abs().max()) < 0.01
        assert (tensor != 0).double().mean() > 0.99


def test_one_key_dominates():
    weights = scores(hard_case("one_dominant_key")).softmax(-1)
    assert float(weights[..., 3].median()) > 0.99


def test_identical_keys_and_values_are_identical():
    for name, tensor in (("identical_keys", "key"), ("identical_values", "value")):
        rows = getattr(hard_case(name), tensor)
        assert torch.equal(rows, rows[..., :1, :].expand_as(rows))
        assert rows[0, 0, 0].unique().numel() > 8


def test_repeated_keys_come_four_times_each():
    keys = hard_case("repeated_keys").key[0, 0]
    assert keys.unique(dim=0, return_counts=True)[1].tolist() == [4, 4, 4]


def test_one_key_has_a_huge_negative_score():
    found = scores(hard_case("one_huge_negative", dtype="float16"))
    assert bool((found[..., 3] < -1900).all())
    others = torch.arange(12) != 5
    assert float(found[..., others, :][..., torch.arange(12) != 3].abs().max()) < 50


def test_one_query_has_only_huge_negative_scores_and_attends_to_several_keys():
    found = scores(hard_case("one_huge_negative"))[..., 5, :]
    assert bool((found < -1900).all())
    assert float(found.softmax(-1).amax()) < 0.9


def plainly(query, key, value, *, factor=1.0, forbidden=-math.inf):
    logits = query @ key.mT * query.shape[-1] ** -0.5
    logits = logits.masked_fill(logits < forbidden, -math.inf)
    return (logits.softmax(-1) * factor).nan_to_num(0) @ value


class Flushed(torch.autograd.Function):
    """Its gradient has no number below the normal range of float16."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, above):
        return above.masked_fill(above.abs() < torch.finfo(torch.float16).smallest_normal, 0)


# What the sentences of three cases say: each is wrong on the case alone, and is seen there.
@pytest.mark.parametrize(
    ("name", "dtype", "wrong"),
    [
        *(
            ("one_huge_negative", dtype, functools.partial(plainly, forbidden=-1000.0))
            for dtype in ("float64", "float32")
        ),
        (
            "tiny_magnitudes",
            "float16",
            lambda query, key, value: plainly(Flushed.apply(query), key, value),
        ),
        ("identical_values", "float16", functools.partial(plainly, factor=0.99)),
        ("identical_values", "bfloat16", functools.partial(plainly, factor=0.97)),
        ("identical_values", "bfloat16", functools.partial(plainly, factor=1.03)),
    ],
)
def test_what_the_sentence_names_is_seen_on_the_case(name, dtype, wrong):
    case = hard_case(name, dtype=dtype)
    assert_matches_reference(plainly, case.query, case.key, case.value)
    with pytest.raises(AssertionError, match="are not those of attention"):
        assert_matches_reference(wrong, case.query, case.key, case.value)


def test_the_documentation_lists_every_case_with_its_sentence():
    text = (Path(__file__).parents[1] / "docs" / "numerics.md").read_text(encoding="utf-8")
    for name in (*HARD_CASES, *FEATURE_CASES):
        assert f"| `{name}` | {hard_case(name).why} |" in text


def test_one_key_and_one_head_are_outliers():
    value = hard_case("values_with_outlier").value.abs()
    assert float(value[0, 0, 5].median()) > 100
    assert float(value[0, 1].max()) < 10
    value = hard_case("huge_head").value.abs()
    assert float(value[:, 0].median()) > 100 > float(value[:, 1].max())


@pytest.mark.parametrize(
    ("name", "query", "key", "value"),
    [
        ("odd_head_dim_7", (12, 7), (12, 7), (12, 16)),
        ("odd_head_dim_33", (12, 33), (12, 33), (12, 16)),
        ("head_dim_one", (12, 1), (12, 1), (12, 1)),
        ("value_dim_differs", (12, 16), (12, 16), (12, 24)),
        ("one_query", (1, 16), (12, 16), (12, 16)),
        ("one_key", (12, 16), (1, 16), (1, 16)),
        ("more_queries_than_keys", (12, 16), (5, 16), (5, 16)),
        ("more_keys_than_queries", (5, 16), (12, 16), (12, 16)),
        ("causal_fewer_queries", (5, 16), (12, 16), (12, 16)),
        ("causal_more_queries", (12, 16), (5, 16), (5, 16)),
        ("many_keys", (3, 16), (1000, 16), (1000, 16)),
    ],
)
def test_sizes_are_what_the_name_says(name, query, key, value):
    case = hard_case(name)
    assert [tuple(t.shape[2:]) for t in (case.query, case.key, case.value)] == [query, key, value]


@pytest.mark.parametrize("length", [31, 32, 33, 63, 64, 65, 127, 128, 129])
def test_lengths_around_a_block_are_what_the_name_says(length):
    case = hard_case(f"length_{length}")
    assert lengths(case) == (length, length)
    block = {3: 32, 6: 64, 1: 128}[int(str(length)[0])]
    assert f"Blocks of {block}:" in case.why


def test_the_masks_are_what_the_names_say():
    left, right = (hard_case(f"padding_{side}", batch=2).attn_mask for side in ("left", "right"))
    assert left[:, 0, 0].tolist() == [[False] * 4 + [True] * 8, [False] * 5 + [True] * 7]
    assert right[:, 0, 0].tolist() == [[True] * 8 + [False] * 4, [True] * 7 + [False] * 5]
    one = hard_case("one_permitted_key").attn_mask
    assert one.sum(-1).tolist() == [1] * 12
    assert one.sum(-2).tolist() == [1] * 12
    window = hard_case("sliding_window").attn_mask
    assert window[5].nonzero().flatten().tolist() == [3, 4, 5, 6]
    corner = hard_case("causal_bottom_right").attn_mask
    assert corner.sum(-1).tolist() == [8, 9, 10, 11, 12]
    lost = ~hard_case("fully_masked_rows").attn_mask.any(-1)
    assert lost.nonzero().flatten().tolist() == [0, 6, 11]


def test_every_head_and_batch_entry_has_its_own_mask():
    mask = hard_case("mask_per_head", batch=2, heads=3).attn_mask
    rows = {tuple(mask[b, h, 0].tolist()) for b in range(2) for h in range(3)}
    assert len(rows) == 6


def test_heads_last_in_memory_are_not_contiguous():
    case = hard_case("heads_last_in_memory")
    for tensor in (case.query, case.key, case.value):
        assert not tensor.is_contiguous()
        assert tensor.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (
            {"name": "gausian"},
            ValueError,
            "name: got 'gausian'; accepted is one of 'gaussian', 'large_magnitudes'",
        ),
        ({"dtype": "int8"}, ValueError, "dtype: got 'int8'; accepted is one of"),
        ({"batch": 0}, ValueError, "batch: got .*; accepted is a whole number from 1"),
        ({"heads": 1.5}, TypeError, "heads: got .*; accepted is a whole number"),
        ({"seed": -1}, ValueError, "seed: got .*; accepted is a whole number from 0"),
    ],
)
def test_what_makes_no_sense_is_refused(options, error, words):
    with pytest.raises(error, match=words):
        hard_case(**{"name": "gaussian", **options})


def by_hand(case, *, without=""):
    """Attention as the fields of a case declare it, in its dtype, but for what is left out."""
    query, key, value = case.query, case.key, case.value
    group = query.shape[1] // key.shape[1]
    repeat = torch.Tensor.repeat if without == "order" else torch.Tensor.repeat_interleave
    if group > 1:
        sizes = (1, group, 1, 1) if without == "order" else (group, 1)
        key, value = (repeat(tensor, *sizes) for tensor in (key, value))
    scores = (query / 4) @ key.mT
    if without == "scale first":
        scores = (query @ key.mT) / 4
    if case.softcap and without != "softcap":
        scores = case.softcap * torch.tanh(scores / case.softcap)
    scores = scores if case.bias is None or without == "bias" else scores + case.bias
    at = torch.arange(query.shape[2])[:, None] + key.shape[2] - query.shape[2]
    behind = at - torch.arange(key.shape[2])
    if case.alibi is not None:
        scores = scores - case.alibi[:, None, None] * (behind if without != "alibi" else 0)
        scores = scores.masked_fill(behind < 0, -math.inf)
    if without == "last key":
        scores[..., -1] = -math.inf
    if case.sinks is not None and without != "sinks":
        sinks = case.sinks[:, None, None].expand(*scores.shape[:-1], 1)
        return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1] @ value
    return scores.softmax(-1) @ value


@pytest.mark.parametrize(
    ("name", "without"),
    [
        ("grouped_decode", "order"),
        ("grouped_decode", "last key"),
        ("mask_added_finfo_min", "bias"),
        ("mask_added_minus_1e9", "bias"),
        ("mask_added_minus_1e4", "bias"),
        ("softcap_saturated", "softcap"),
        ("sinks_above_all", "sinks"),
        ("alibi_far", "alibi"),
    ],
)
def test_a_case_of_a_feature_is_right_as_declared_and_shows_what_leaves_it_out(name, without):
    case = hard_case(name, batch=2)
    expected = reference(case)
    allowed = 2 * expected.scale["output"]
    assert ((by_hand(case) - expected.exact["output"]).abs() <= allowed).all()
    assert ((by_hand(case, without=without) - expected.exact["output"]).abs() > allowed).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FEATURE_CASES)
def test_right_code_passes_on_every_case_of_a_feature(name, dtype):
    case = hard_case(name, dtype=dtype, heads=3)

    def attention(query, key, value, attn_mask=None, is_causal=False, enable_gqa=False):
        return by_hand(dataclasses.replace(case, query=query, key=key, value=value))

    assert_matches_reference(attention, case.query, case.key, case.value, **case.arguments)
    assert case.query.shape[1] == 3 * case.group


def test_products_overflow_float16_alone_and_only_before_they_are_scaled():
    for dtype in DTYPES:
        case = hard_case("products_overflow", dtype=dtype)
        assert by_hand(case).isfinite().all()
        assert by_hand(case, without="scale first").isfinite().all() == (dtype != "float16")


def test_a_case_is_frozen():
    case = hard_case("gaussian")
    assert isinstance(case, HardCase)
    with pytest.raises(AttributeError):
        case.query = None


def test_a_case_is_the_same_on_an_accelerator(accelerator):
    for name in (*HARD_CASES, *FEATURE_CASES):
        here, there = hard_case(name), hard_case(name, device=accelerator)
        assert torch.equal(here.query, there.query.cpu()), name
        assert there.attn_mask is None or there.attn_mask.device.type == accelerator.type
