"""A judge is graded by the defects that it lets through."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as sdpa
from wrong_attention import attention_with, declared_for

from pytest_attnheat import AttentionSpec, assert_matches_reference, grade, hard_case
from pytest_attnheat.attention.decisions import BLOCKS
from pytest_attnheat.contract.grading import JudgeError, Study

# One of each kind: of the softmax, the scale, the mask, causality, heads, tensors, history.
SOME = ("softmax_over_queries", "softmax_plus_one", "scale_missing", "mask_inverted",
        "mask_of_first_sample", "causal_ignored", "causal_sees_next", "groups_tiled",
        "keys_as_values", "last_key_ignored", "answer_of_earlier_call")  # fmt: skip


def drawn(*sizes, batch=2, heads=3, dtype=torch.float64, seed=0):
    """Query (batch, heads, query_len, 8), key and value."""
    generator = torch.Generator().manual_seed(seed)
    query_len, key_len = sizes
    return [torch.randn(batch, heads, n, 8, generator=generator, dtype=torch.float64).to(dtype)
            for n in (query_len, key_len, key_len)]  # fmt: skip


def plain(query, key, value, attn_mask=None, is_causal=False, *, scale=None):
    """Attention in plain sight."""
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -math.inf)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    return scores.softmax(-1) @ value


def close(*calls):
    """A judge that compares with attention in plain sight, as nearly as float64 allows."""

    def judge(function):
        for tensors, named in calls:
            torch.testing.assert_close(
                function(*tensors, **named), plain(*tensors, **named), rtol=0, atol=1e-10
            )

    return judge


def masked(*sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(2, 1, *sizes, generator=generator) > 0.3
    mask[..., 0] = True
    return mask


TELLING = close(
    (drawn(5, 7), {}),
    (drawn(5, 7, seed=1), {"attn_mask": masked(5, 7)}),
    (drawn(6, 6), {"is_causal": True}),
    (drawn(6, 6, seed=2), {"is_causal": True}),
)


def names(verdicts):
    return {one.name for one in verdicts}


# --- what a judge lets through


def test_a_judge_of_shapes_lets_every_active_defect_through():
    def judge(function):
        query, key, value = drawn(5, 7)
        assert function(query, key, value, attn_mask=masked(5, 7)).shape == query.shape

    found = grade(judge, plain)
    assert found.killed == ()
    assert found.score == 0.0
    assert {"softmax_over_queries", "mask_ignored", "scale_missing"} <= names(found.survived)
    assert {"zeros", "mean_of_all_values"} <= names(
        one for one in found.trivial if one.status == "survived"
    )


def test_a_judge_that_compares_closely_kills_every_active_defect():
    found = grade(TELLING, plain)
    assert found.survived == ()
    assert found.score == 1.0
    assert len(found.killed) > 60
    assert {one.status for one in found.trivial} <= {"killed", "inactive"}


def test_a_judge_may_return_false():
    def judge(function):
        query, key, value = drawn(5, 7)
        return torch.allclose(function(query, key, value), plain(query, key, value))

    found = grade(judge, plain, defects=["scale_missing"])
    assert found.killed[0].said == "it returns False"


def test_a_judge_that_reads_one_sample_misses_what_mixes_samples():
    def judge(function):
        query, key, value = drawn(5, 7)
        mask = masked(5, 7)
        found = function(query, key, value, attn_mask=mask)
        torch.testing.assert_close(found[:1], plain(query, key, value, attn_mask=mask)[:1])

    found = grade(judge, plain, defects=["mask_of_first_sample", "mask_inverted"])
    assert names(found.survived) == {"mask_of_first_sample"}
    assert names(found.killed) == {"mask_inverted"}


def test_it_says_by_how_much_a_survivor_was_off():
    tensors = drawn(5, 7)

    def judge(function):
        assert function(*tensors).isfinite().all()

    (one,) = grade(judge, plain, defects=["output_factor"]).survived
    right = plain(*tensors)
    assert one.off == pytest.approx(0.2)
    assert one.off_by == pytest.approx(0.2 * float(right.abs().max()))
    assert "0.8 times" in one.sentence


# --- what is not active


def test_what_equals_the_right_one_never_survives():
    def judge(function):
        assert function(*drawn(5, 1, heads=1, batch=1)).isfinite().all()  # one key: its value

    found = grade(judge, plain)
    assert names(found.survived) & {"scale_missing", "softmax_twice", "temperature",
                                    "base_two", "queries_as_keys"} == set()  # fmt: skip
    assert {"scale_missing", "hard_maximum", "mean_of_values"} <= names(found.inactive)


def test_where_a_defect_does_not_show_the_answer_is_the_very_one_of_the_right():
    def judge(function):
        tensors = drawn(4, 4, dtype=torch.float32)
        assert torch.equal(function(*tensors), sdpa(*tensors))

    found = grade(judge, sdpa, defects=["mask_inverted", "causal_ignored", "first_keys_only"])
    assert names(found.inactive) == {"mask_inverted", "causal_ignored", "first_keys_only"}


def test_what_rounding_hides_is_inactive():
    def judge(function):
        assert function(*drawn(5, 7, dtype=torch.float16)).isfinite().all()

    found = grade(judge, sdpa, defects=["output_in_float16", "weights_in_float16"])
    assert len(found.inactive) == 2


def test_it_says_what_was_never_exercised():
    def judge(function):
        query, key, value = drawn(4, 4, batch=1, heads=1, dtype=torch.float32)
        function(query.abs(), key, value)

    missing = grade(judge, sdpa, defects=SOME).never_exercised
    assert missing == ("a mask", "causality", "a mask together with causality",
                       "other numbers of keys than of queries", "grouped heads", "several heads",
                       "several samples", "values of another width", "more than 64 keys",
                       "a scale", "negative numbers in query and key", "gradients",
                       "any dtype but float32")  # fmt: skip


def test_what_was_exercised_is_not_missed():
    def judge(function):
        query, key, value = (t.requires_grad_() for t in drawn(4, 70, heads=4))
        mask = torch.ones(4, 70, dtype=torch.bool)
        function(query, key[:, :2], value[:, :2, :, :5], mask, scale=0.3, enable_gqa=True).sum(
            ).backward()  # fmt: skip
        function(*drawn(4, 4, dtype=torch.float32), is_causal=True)

    missing = grade(judge, sdpa, defects=["scale_missing"]).never_exercised
    assert missing == ("a mask together with causality",)


# --- planted versions are what they are said to be


def of_every(*, kind="forward", seen=()):
    found = Study(AttentionSpec(attention_with(), grouped=True)).versions
    return [one.name for one in found if one.kind == kind and one.name not in seen]


# Those that are drawn at random, have another constant, need a declaration of their own.
APART = ("dropout_in_eval", "dropout_not_rescaled", "temperature", "output_factor")
FEATURES = ("window", "softcap", "sinks", "alibi", "chunk", "prefix", "sink_keys", "score_mod",
            "may_see", "bias", "documents", "lengths")  # fmt: skip


def everything():
    """A target that has each feature, so that no version is left out."""
    declared = {"softcap": 1.5, "sinks": torch.zeros(4), "alibi": torch.ones(4), "chunk": 3,
                "window": (3, 2), "prefix": 1, "sink_keys": 1, "may_see": lambda b, h, q, k: q == q,
                "score_mod": lambda s, b, h, q, k: s}  # fmt: skip
    narrow = {**declared, "bias": "bias", "documents": "documents", "lengths": "lengths"}
    spec = AttentionSpec(attention_with().with_more, grouped=True, **narrow)
    return [v.name for v in Study(spec).versions if v.kind == "forward" and v.name not in APART]


def random_call(name, number, declared):
    """Tensors and keywords of a call that a defect may show in."""
    generator = torch.Generator().manual_seed(number)
    square = number % 2 == 0
    query_len, key_len = (6, 6) if square else [(5, 9), (7, 4)][number // 2 % 2]
    group = 2 if number % 4 < 2 and "sinks" not in name and "alibi" not in name else 1
    heads = 4
    query = torch.randn(3, heads, query_len, 8, generator=generator, dtype=torch.float64)
    shape = (3, heads // group, key_len, 8)
    key, value = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in "kv")
    named = {}
    if number % 3 or "mask" in name:
        mask = torch.rand(3, heads, query_len, key_len, generator=generator) > 0.4
        mask[0, 0, 1] = False
        named["attn_mask"] = mask
    if number % 4 > 1 or "causal" in name:
        named["is_causal"] = True
    if "scale" in name and "bias" not in name:
        named["scale"] = -0.6 if "absolute" in name else 0.7
    if "bias" in name:
        named["bias"] = torch.randn(3, heads, query_len, key_len, generator=generator).double()
        named["bias"][:, :, :, 2] = -math.inf
    if "documents" in name:
        named["documents"] = torch.tensor([[0, 0, 1, 1, 1, 2]] * 3)
    if "lengths" in name:
        named["lengths"] = torch.tensor([key_len, 2, 3])
    return (query, key, value), named


@pytest.mark.parametrize("name", everything())
def test_planted_versions_are_those_that_were_written_apart(name):
    declared = declared_for(name)
    keywords = {k: k for k in ("bias", "documents", "lengths") if k in name}
    square = "documents" in name
    always = {k: v for k, v in declared.items() if k != "scale"}

    def written(*defects, **more):
        made = attention_with(*defects, **declared, **more)
        return made.with_more if keywords else made

    # What it does without keys is declared, where a defect is about that.
    spec = AttentionSpec(written(), grouped=True, **keywords, **always,
                         scale=declared.get("scale"))  # fmt: skip
    study = Study(spec)
    version = {one.name: one for one in study.versions}.get(name)
    if version is None:
        pytest.skip("it cannot act on this target")
    shown = 0
    planted = study.plant(version)
    wrong = {(block, short): written(name, block=block, short_kept=short)
             for block in BLOCKS[:4] for short in (False, True)}  # fmt: skip
    for number in (0, 4, 8) if square else range(8):
        tensors, named = random_call(name, number, declared)
        right = spec.implementation(*tensors, **named)
        expected = []
        for function in wrong.values():
            try:
                expected.append(function(*tensors, **named))
            except ValueError:  # sizes that do not fit
                continue
        found = planted(*tensors, **named)
        assert not planted.effect.refused
        same = [torch.allclose(found, one, rtol=1e-9, atol=1e-9, equal_nan=True)
                for one in (right, *expected)]  # fmt: skip
        if not any(torch.allclose(right, one, rtol=1e-9, equal_nan=True) for one in expected):
            assert any(same[1:]) or not expected, f"call {number}"
            shown += bool(expected)
    assert shown or name in ("no_maximum_subtracted", "products_overflow", "masked_nan_felt"), name
