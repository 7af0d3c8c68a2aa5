"""A judge is graded by the defects that it lets through."""

import copy
import json
import math
import random
from dataclasses import replace

import numpy as np
import public_callables as public
import pytest
import torch
from test_conventions import ROWS
from torch import nn
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention as sdpa
from wrong_attention import attention_with, declared_for

from pytest_attnheat import AttentionSpec, assert_matches_reference, grade, hard_case
from pytest_attnheat.attention import chunks
from pytest_attnheat.contract.asking import UndeclaredError
from pytest_attnheat.contract.examination import Examination
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

    found = grade(judge, plain, defects=[*SOME, "mask_ignored", "zeros", "mean_of_all_values"])
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

    same = {"scale_missing", "temperature", "base_two", "queries_as_keys", "hard_maximum",
            "mean_of_values", "online_output_not_rescaled", "mask_inverted"}  # fmt: skip
    assert names(grade(judge, plain, defects=same).inactive) == same


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


def test_a_mask_that_hides_nothing_exercises_nothing():
    def judge(function):
        everything = torch.ones(4, 4, dtype=torch.bool)
        function(*drawn(4, 4), everything)
        function(*drawn(4, 4), torch.zeros(4, 4, dtype=torch.float64))
        function(*drawn(1, 1), is_causal=True)

    missing = grade(judge, sdpa, defects=["scale_missing"]).never_exercised
    assert missing[:3] == ("a mask", "causality", "a mask together with causality")


def test_what_was_exercised_is_not_missed():
    def judge(function):
        query, key, value = (t.requires_grad_() for t in drawn(4, 70, heads=4))
        mask = (torch.arange(70) != 3).expand(4, 70)
        function(query, key[:, :2], value[:, :2, :, :5], mask, scale=0.3, enable_gqa=True).sum(
            ).backward()  # fmt: skip
        function(*drawn(4, 4, dtype=torch.float32), is_causal=True)

    missing = grade(judge, sdpa, defects=["scale_missing"]).never_exercised
    assert missing == ("a mask together with causality",)


# --- planted versions are what they are said to be


# Those that are drawn at random, have another constant, need a declaration of their own.
APART = ("dropout_in_eval", "dropout_not_rescaled", "temperature", "output_factor")


def everything():
    """A target that has each feature, so that no version is left out."""
    declared = {"softcap": 1.5, "sinks": torch.zeros(4), "alibi": torch.ones(4), "chunk": 3,
                "window": (3, 2), "prefix": 1, "sink_keys": 1, "may_see": lambda b, h, q, k: q == q,
                "score_mod": lambda s, b, h, q, k: s}  # fmt: skip
    narrow = {**declared, "bias": "bias", "documents": "documents", "lengths": "lengths"}
    spec = AttentionSpec(attention_with().with_more, grouped=True, **narrow)
    return [v.name for v in Study(spec).versions if v.kind == "forward" and v.name not in APART]


def random_call(name, number):
    """Tensors and keywords of a call that a defect may show in; each shape comes twice."""
    generator = torch.Generator().manual_seed(number)
    query_len, key_len = [(6, 6), (5, 9), (7, 4), (18, 21)][number % 4 * ("documents" not in name)]
    fixed = "sinks" in name or "alibi" in name
    heads, group = 3 if "other_heads" in name and "alibi" in name else 4, 1 if fixed else 2
    query = torch.randn(3, heads, query_len, 8, generator=generator, dtype=torch.float64)
    shape = (3, heads // group, key_len, 8)
    key, value = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in "kv")
    named = {}
    if number % 3 or "mask" in name:
        mask = torch.rand(3, heads, query_len, key_len, generator=generator) > 0.4
        mask[..., 0] = True
        if "fully_masked" in name:
            mask[0, 0, 1] = False
        named["attn_mask"] = mask
    # Queries that are causal from the top left see no key beyond their own number in any case.
    causal = number % 2 and name != "keys_as_many_as_queries"
    if causal or ("causal" in name and name != "causal_always"):
        named["is_causal"] = True
    if name.startswith("scale") or name.endswith("_scaled"):
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
    right, wrong = (attention_with(*names, **declared) for names in ((), (name,)))
    right, wrong = (one.with_more if keywords else one for one in (right, wrong))
    study = Study(AttentionSpec(right, grouped=True, **declared, **keywords))
    version = next(one for one in study.versions if one.name == name)
    forms = [study.plant(replace(version, forms=(form,))) for form in version.forms]
    shown = 0
    for number in range(8 if "earlier" in name else 4):
        tensors, named = random_call(name, number)
        try:
            expected = wrong(*tensors, **named)
        except ValueError:  # sizes that do not fit
            continue
        found = [form(*tensors, **named) for form in forms]
        assert not any(form.effect.refused for form in forms)
        shown += not alike(expected, right(*tensors, **named))
        forms = [form for form, own in zip(forms, found, strict=True) if alike(own, expected)]
        assert forms, f"call {number}"
    assert shown or name in HARMLESS


# Overflow and NaN in masked keys are not drawn here; nor what only differs where exp underflows.
HARMLESS = ("no_maximum_subtracted", "products_overflow", "masked_nan_felt",
            "mask_after_softmax_renormalised")  # fmt: skip


def alike(one, other):
    return torch.allclose(one, other, rtol=1e-9, atol=1e-9, equal_nan=True)


# --- gradients


def gradients(function, tensors, named, upstream):
    leaves = [t.clone().requires_grad_() for t in tensors]
    function(*leaves, **named).backward(upstream)
    return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]


@pytest.mark.parametrize(
    "name", ["softmax_over_queries", "scale_missing", "mask_multiplied", "softmax_plus_one",
             "causal_sees_next", "keys_as_values", "weights_averaged", "softmax_twice",
             "parts_averaged", "groups_tiled", "last_key_ignored"]
)  # fmt: skip
def test_gradients_of_planted_versions_are_those_of_the_wrong_forward(name):
    study = Study(AttentionSpec(attention_with(), grouped=True))
    version = next(one for one in study.versions if one.name == name)
    wrong = attention_with(name, **({"block": 3} if "parts" in name else {}))
    if name == "softmax_plus_one":  # written apart is its second form
        version = replace(version, forms=version.forms[2:])
    # Where a part of the keys is masked, that which was written apart has NaN in its gradient.
    for number in (0, 0) if "parts" in name or "over_queries" in name else (0, 2):
        tensors, named = random_call(name, number)
        if name == "keys_as_values":
            named = {}
        upstream = torch.randn(*tensors[0].shape, dtype=torch.float64)
        expected = gradients(wrong, tensors, named, upstream)
        planted = study.plant(version)
        found = gradients(planted, tensors, named, upstream)
        assert planted.effect.active == 1
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_rows_without_keys_have_no_nan_in_their_gradient():
    study = Study(AttentionSpec(attention_with()))
    tensors = drawn(5, 7)
    mask = masked(5, 7)
    mask[0, 0, 1] = False
    for version in study.versions:
        if version.name in ("parts_averaged", "lse_in_base_two", "scale_missing", "softmax_twice"):
            found = gradients(study.plant(version), tensors, {"attn_mask": mask}, torch.ones(()
                ).expand(2, 3, 5, 8).double())  # fmt: skip
            assert all(one.isfinite().all() for one in found), version.name


def test_a_judge_of_outputs_lets_every_wrong_backward_pass_through():
    def judge(function):
        tensors = [t.requires_grad_() for t in drawn(6, 6)]
        output = function(*tensors)
        output.backward(
            torch.randn(2, 3, 6, 8, generator=torch.Generator().manual_seed(0)).double()
        )
        torch.testing.assert_close(output, plain(*tensors))

    def strict(function):
        upstream = torch.randn(2, 3, 6, 8, generator=torch.Generator().manual_seed(0)).double()
        found, right = (gradients(f, drawn(6, 6), {}, upstream) for f in (function, plain))
        torch.testing.assert_close(found, right)

    known = [v.name for v in Study(plain).versions if v.kind == "backward"]
    found, told = (grade(one, plain, defects=known) for one in (judge, strict))
    active = {"backward_row_term_left_out", "backward_scale_missing", "backward_exchanged",
              "backward_weights_detached", "backward_row_term_of_another_row"}  # fmt: skip
    assert active <= names(found.survived)
    assert found.killed == ()
    assert names(told.killed) == names(found.survived)
    assert told.survived == ()


def test_a_wrong_backward_pass_leaves_the_output_alone_and_is_inactive_without_gradients():
    def judge(function):
        tensors = drawn(5, 7)
        assert torch.equal(function(*tensors), plain(*tensors))

    found = grade(judge, plain, defects=["backward_row_term_left_out"])
    assert names(found.inactive) == {"backward_row_term_left_out"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_backward_pass_shows_in_every_dtype_and_never_where_it_is_right(dtype):
    def judge(function):
        tensors = [t.requires_grad_() for t in drawn(6, 6, dtype=dtype)]
        assert all(one.isfinite().all() for one in torch.autograd.grad(
            function(*tensors).float().square().sum(), tensors))  # fmt: skip

    def one_key(function):  # gradients of query and key are zero
        tensors = [t.requires_grad_() for t in drawn(6, 1, dtype=dtype)]
        torch.autograd.grad(function(*tensors).float().square().sum(), tensors)

    some = ["backward_queries_zero", "backward_scale_missing"]
    assert names(grade(judge, sdpa, defects=some).survived) == set(some)
    assert names(grade(one_key, sdpa, defects=some).inactive) == set(some)


def test_zeros_have_gradients_of_zero():
    study = Study(plain)
    zeros = study.plant(next(one for one in study.versions if one.name == "zeros"))
    found = gradients(zeros, drawn(5, 7), {}, torch.ones(2, 3, 5, 8).double())
    assert all(bool((one == 0).all()) for one in found)


# --- how targets are called

LAYOUTS = {
    "blhd": lambda q, k, v: [t.transpose(1, 2) for t in (q, k, v)],
    "lbhd": lambda q, k, v: [t.permute(2, 0, 1, 3) for t in (q, k, v)],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_target_is_answered_in_its_layout_dtype_and_strides(layout):
    turn = LAYOUTS[layout]

    def target(query, key, value):
        home = {"blhd": (0, 2, 1, 3), "lbhd": (1, 2, 0, 3)}[layout]
        there = {"blhd": (0, 2, 1, 3), "lbhd": (2, 0, 1, 3)}[layout]
        return plain(*(t.permute(home) for t in (query, key, value))).permute(there)

    study = Study(AttentionSpec(target, layout=layout))
    planted = study.plant(next(v for v in study.versions if v.name == "scale_missing"))
    tensors = drawn(5, 7, dtype=torch.float32)
    found, right = planted(*turn(*tensors)), target(*turn(*tensors))
    assert planted.effect.active == 1
    assert (found.dtype, found.shape, found.stride()) == (right.dtype, right.shape, right.stride())
    expected = plain(*tensors, scale=1.0)
    (wanted,) = {tuple(turn(expected, expected, expected)[0].shape)}
    assert tuple(found.shape) == wanted
    torch.testing.assert_close(found, turn(expected, expected, expected)[0])


@pytest.mark.parametrize("dimensions", [2, 3, 5])
def test_other_leading_dimensions_are_read(dimensions):
    shape = {2: (), 3: (4,), 5: (2, 3, 4)}[dimensions]

    def judge(function):
        query, key, value = (torch.randn(*shape, n, 8, dtype=torch.float64) for n in (5, 7, 7))
        torch.testing.assert_close(function(query, key, value), plain(query, key, value))

    found = grade(judge, sdpa, defects=["scale_missing", "softmax_over_queries"])
    assert len(found.killed) == 2


@pytest.mark.parametrize("meaning", ["drop", "additive", "keep"])
def test_masks_of_every_meaning_are_read(meaning):
    mask = masked(5, 7)
    added = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -math.inf)
    given = {"keep": mask, "drop": ~mask, "additive": added}[meaning]

    def target(q, k, v, m=None):
        own = {"keep": m, "drop": None if m is None or meaning != "drop" else ~m,
               "additive": None if m is None else m == 0}[meaning]  # fmt: skip
        return plain(q, k, v, own)

    def judge(function):
        tensors = drawn(5, 7)
        torch.testing.assert_close(function(*tensors, m=given), plain(*tensors, mask))

    spec = AttentionSpec(target, mask=meaning, mask_argument="m")
    assert names(grade(judge, spec, defects=["mask_ignored"]).killed) == {"mask_ignored"}


@pytest.mark.matrix
@pytest.mark.parametrize("row", [row for row in ROWS if row != "vllm_flash_attn"])
def test_calls_of_public_callables_are_read_as_they_are_asked(row):
    """What asking writes, reading reads: the target's own answer is reproduced."""
    spec = AttentionSpec(ROWS[row], dtypes=("float32",))
    watched = Study(spec).watched
    examination = Examination(spec, torch.float32, torch.device("cpu"))
    asked = 0
    for chosen in examination.space.covering().cases[:14]:
        call = examination.space.call(chosen, torch.float32)
        for besides in (False, True):
            try:
                spec.of_another(watched).ask(call, besides=besides)
            except UndeclaredError:
                continue
            asked += 1
        assert not watched.effect.refused, chosen
    assert asked > 8


def test_what_is_returned_beside_the_output_is_that_of_the_wrong_version():
    def with_weights(query, key, value):
        weights = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
        return weights @ value, weights

    study = Study(AttentionSpec(with_weights, returns="weights"))
    planted = study.plant(next(v for v in study.versions if v.name == "scale_missing"))
    query, key, value = drawn(5, 7)
    output, weights = planted(query, key, value)
    torch.testing.assert_close(weights, (query @ key.mT).softmax(-1))
    torch.testing.assert_close(output, weights @ value)


def test_a_module_is_graded_as_it_is_and_left_as_it_was():
    class Core(nn.Module):
        def forward(self, query, key, value):
            return plain(query, key, value)

    core, seen = Core(), set()

    def judge(module):
        seen.add(module)
        torch.testing.assert_close(module(*drawn(5, 7)), plain(*drawn(5, 7)))

    assert len(grade(judge, core, defects=["scale_missing"]).killed) == 1
    assert seen == {core}
    assert "forward" not in vars(core)


# --- blocks


def heads_of(block, inputs):
    """Query, key and value (batch, heads, length, 4) of `nn.MultiheadAttention`, by hand."""
    weight, bias = block.in_proj_weight, block.in_proj_bias
    return [(inputs @ weight[at : at + 8].T + bias[at : at + 8]).unflatten(-1, (2, 4)).transpose(
        1, 2) for at in (0, 8, 16)]  # fmt: skip


@pytest.mark.parametrize("need_weights", [False, True])
def test_a_defect_in_a_block_is_one_of_the_attention_inside(need_weights):
    block = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    inputs = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    query, key, value = heads_of(block, inputs)
    weights = (query @ key.mT).softmax(-1)  # the scale is missing
    expected = block.out_proj((weights @ value).transpose(1, 2).flatten(-2))
    (slope,) = torch.autograd.grad(expected.square().sum(), inputs)
    study = Study(block)
    planted = study.plant(next(v for v in study.versions if v.name == "scale_missing"))
    output, given = planted(inputs, inputs, inputs, need_weights=need_weights)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(torch.autograd.grad(output.square().sum(), inputs)[0], slope)
    assert (given is not None) is need_weights
    if need_weights:
        torch.testing.assert_close(given, weights.mean(1))


def test_masks_and_gradients_of_a_block_are_graded():
    block = nn.MultiheadAttention(8, 2, batch_first=True)
    padding = torch.arange(5) > torch.tensor([[4], [2], [3]])
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    right = nn.MultiheadAttention(8, 2, batch_first=True)
    right.load_state_dict(block.state_dict())

    def judge(module):
        inputs = torch.randn(3, 5, 8, requires_grad=True)
        for named in ({"key_padding_mask": padding}, {"attn_mask": causal}):
            found, expected = (one(*[inputs] * 3, **named)[0] for one in (module, right))
            torch.testing.assert_close(found, expected)
            slopes = [torch.autograd.grad(o.square().sum(), inputs) for o in (found, expected)]
            torch.testing.assert_close(*slopes)

    some = ["mask_ignored", "mask_inverted", "mask_of_first_sample", "backward_scale_missing"]
    found = grade(judge, block, defects=some)
    assert names(found.killed) == set(some)
    assert found.calls == 2
    assert "forward" not in vars(block)


@pytest.mark.parametrize("how", ["sdpa", "eager"])
def test_blocks_of_transformers_are_graded(how):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 9}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_implementation": how}
    model = transformers.LlamaModel(transformers.LlamaConfig(**sizes, **heads)).eval()
    ids = torch.arange(6)[None]
    expected = model(ids).last_hidden_state

    def judge(function):
        torch.testing.assert_close(function(ids).last_hidden_state[:, -1], expected[:, -1])

    found = grade(judge, model, defects=["scale_missing", "groups_tiled", "causal_ignored"])
    assert found.calls == 2  # one in each layer
    assert "scale_missing" in names(found.killed)
    assert found.refused == found.survived == ()


def test_a_grade_that_takes_long_tells_how_far_it_is(monkeypatch, caplog):
    monkeypatch.setattr(chunks, "_SECONDS", -1.0)
    with caplog.at_level("INFO", "pytest_attnheat"):
        grade(lambda own: own(*torch.randn(3, 1, 1, 2, 4)), sdpa, defects=["no_softmax", "zeros"])
    assert "dot_product_attention: 50 % of the versions judged, about 0 s are left" in caplog.text


class _Block(nn.Module):
    """Self-attention of four features, whose weights may be rounded."""

    def __init__(self, rounded=torch.float32):
        super().__init__()
        self.projected, self.rounded = nn.Linear(4, 12), rounded

    def forward(self, x, is_causal=False, note=None):
        query, key, value = self.projected(x).chunk(3, -1)
        if self.rounded == torch.float32:
            return functional.scaled_dot_product_attention(query, key, value, is_causal=is_causal)
        scores = query @ key.mT / 2
        hidden = torch.ones(x.shape[1], x.shape[1]).triu(1).bool() & is_causal
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        return weights.to(self.rounded).float() @ value


@pytest.mark.parametrize(("named", "spec"), [
    ({}, "AttentionSpec(block, inputs=torch.randn(3, 5, 4), causal=None)"),
    ({"is_causal": True},
     'AttentionSpec(block, inputs=torch.randn(3, 5, 4), arguments={"is_causal": True})'),
])  # fmt: skip
def test_the_remedy_of_a_block_can_be_pasted_and_tells_what_survived(named, spec):
    block = _Block().eval()
    right = copy.deepcopy(block)

    def coarse(module):
        x = torch.randn(3, 5, 4)
        torch.testing.assert_close(module(x, **named), right(x, **named), atol=0.1, rtol=0.1)

    found = grade(coarse, block, defects=["weights_in_bfloat16"])
    assert names(found.survived) == {"weights_in_bfloat16"}
    assert f"report = check_attention({spec})\n" in found.remedy.code
    assert str(found.remedy).endswith(found.remedy.code)
    exec(found.remedy.code, {"block": block})
    with pytest.raises(AssertionError, match="weights are rounded to bfloat16"):
        exec(found.remedy.code, {"block": _Block(torch.bfloat16).eval()})


def test_the_remedy_of_a_block_says_what_is_to_be_filled_in():
    block = _Block().eval()

    def blind(module):
        module(torch.randn(1, 5, 4), note="some")

    code = grade(blind, block, defects=["scale_missing"]).remedy.code
    assert 'inputs=torch.randn(2, 5, 4), arguments={"note": ...}, causal=None)' in code
    ready = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    code = grade(lambda own: own(*[torch.randn(2, 3, 8)] * 3), ready).remedy.code
    assert "check_attention(block)" in code
    exec(code, {"block": ready})


def test_a_judge_may_copy_a_module_and_change_the_copy():
    block = nn.MultiheadAttention(8, 2, batch_first=True)
    right = copy.deepcopy(block)
    inputs = torch.randn(2, 5, 8)

    def judge(module):
        other, expected = copy.deepcopy(module), copy.deepcopy(right)
        for one in (other, expected):
            nn.init.ones_(one.out_proj.weight)
        torch.testing.assert_close(other(*[inputs] * 3), expected(*[inputs] * 3))

    assert len(grade(judge, block, defects=["scale_missing"]).killed) == 1


def test_a_block_that_does_its_attention_by_hand_is_refused():
    class ByHand(nn.Linear):
        def forward(self, inputs):
            query, key, value = super().forward(inputs).chunk(3, -1)
            return (query @ key.mT / 3).softmax(-1) @ value

    found = grade(lambda block: block(torch.randn(2, 5, 9)).shape, ByHand(9, 27))
    assert found.refused[0].startswith("inside of it nothing is called that is known as attention")


def test_a_module_with_parameters_of_its_own_may_be_a_function_of_attention():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(8**-0.5, dtype=torch.float64))

        def forward(self, query, key, value):
            return (query @ key.mT * self.scale).softmax(-1) @ value

    def judge(module):
        torch.testing.assert_close(module(*drawn(5, 7)), plain(*drawn(5, 7)))

    assert len(grade(judge, Scaled(), defects=["scale_missing"]).killed) == 1


# --- what is refused


def test_calls_that_drop_weights_are_set_aside_and_the_others_graded():
    def judge(function):
        torch.testing.assert_close(function(*drawn(5, 7), dropout_p=0.0), plain(*drawn(5, 7)))
        assert function(*drawn(5, 7), dropout_p=0.5).isfinite().all()

    found = grade(judge, sdpa, defects=["scale_missing"])
    assert names(found.killed) == {"scale_missing"}
    assert found.set_aside == (("it drops weights at random", 1),)
    assert "set aside 1 call, answered as the right one does" in str(found)
    alone = grade(lambda function: function(*drawn(5, 7), dropout_p=0.5).any(), sdpa)
    assert alone.refused == ("it drops weights at random",)


def test_calls_without_elements_are_set_aside():
    def judge(function):
        assert function(*drawn(5, 7, batch=0)).shape == (0, 3, 5, 8)
        torch.testing.assert_close(function(*drawn(5, 7)), plain(*drawn(5, 7)))

    found = grade(judge, sdpa, defects=["scale_missing"])
    assert names(found.killed) == {"scale_missing"}
    assert found.set_aside == (("query has no elements", 1),)


def test_a_target_that_writes_into_its_query_is_refused():
    def target(query, key, value):
        query *= 8**-0.5
        return (query @ key.mT).softmax(-1) @ value

    found = grade(lambda function: function(*drawn(5, 7)).any(), target)
    assert found.refused == ("it writes into what it is given",)


def test_what_autocast_casts_within_the_function_is_read_as_it_is_cast():
    def judge(function):
        tensors = drawn(5, 7, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(function(*tensors), sdpa(*tensors))

    assert len(grade(judge, sdpa, defects=["scale_missing"]).killed) == 1


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (lambda: AttentionSpec(plain, call=lambda f, c: f(*c.tensors)), "call= says how a call"),
        (lambda: AttentionSpec(plain, reference=plain), "reference= computes something else"),
        (lambda: AttentionSpec(plain, sharding="ring"), "it is called on several ranks"),
    ],
)
def test_a_target_whose_calls_cannot_be_read_is_refused(spec, reason):
    found = grade(lambda function: None, spec())
    assert found.refused[0].startswith(reason)
    assert found.score is None
    assert "no grade, as its calls are not understood" in str(found)


def test_a_target_that_computes_something_else_is_refused():
    def hotter(query, key, value):
        return plain(query, key, value, scale=0.5)

    found = grade(lambda f: f(*drawn(5, 7)), hotter)
    assert found.refused[0].startswith("what is described does not give its own answer")
    assert found.killed == found.survived == ()
    declared = AttentionSpec(hotter, scale=0.5)
    assert grade(lambda f: f(*drawn(5, 7)), declared, defects=["sigmoid"]).survived


@pytest.mark.parametrize(
    ("named", "reason"),
    [
        ({"dropout_p": 0.5}, "it drops weights at random"),
        ({"temperature": 2.0}, "temperature=2.0 is not described"),
        ({"attn_mask": torch.ones(5, 7)}, "its mask holds floats, where booleans are declared"),
    ],
)
def test_a_call_that_is_not_described_is_refused(named, reason):
    def target(query, key, value, attn_mask=None, dropout_p=0.0, temperature=1.0):
        return plain(query, key, value)

    found = grade(lambda f: f(*drawn(5, 7), **named), target)
    assert found.refused[0].startswith(reason)
    assert len(found.refused) == 1


def test_what_is_not_declared_is_said_beside_the_grade():
    def target(query, key, value, mask=None):
        return plain(query, key, value)

    found = grade(lambda f: f(*drawn(5, 7)), target, defects=["scale_missing", "mask_ignored"])
    assert found.unplanted == ("mask_ignored",)
    assert found.undeclared[0].startswith("it takes mask=, and the specification does not say")
    lines = str(found).splitlines()
    assert lines[1].startswith("  undeclared it takes mask=")
    assert lines[2] == "  unplanted mask_ignored: they need what the target is not declared to take"


def test_the_judge_must_accept_the_right_one_and_call_it():
    def never(function):
        raise AssertionError("too slow\nand more")

    with pytest.raises(JudgeError, match=r"rejects the right implementation: AssertionError: too"):
        grade(never, plain)
    with pytest.raises(JudgeError, match="never calls"):
        grade(lambda function: None, plain)


def test_misuse_is_refused():
    with pytest.raises(TypeError, match="judge: got int"):
        grade(3, plain)
    with pytest.raises(ValueError, match="defects: got 'no_such'"):
        grade(TELLING, plain, defects=["no_such"])


# --- the run, and what is said


def test_what_never_ends_is_killed():
    def judge(function):
        tensors = drawn(5, 7)
        while not torch.allclose(function(*tensors), plain(*tensors)):
            pass

    (one,) = grade(judge, plain, defects=["scale_missing"], time_limit=0.3).killed
    assert one.said == "TimeoutError: it took more than 0.3 seconds"


def test_random_numbers_start_alike_each_time_and_are_left_as_they_were():
    drawn_numbers = set()

    def judge(function):
        query = torch.randn(1, 1, 3, 8)
        drawn_numbers.add(float(query[0, 0, 0, 0]))
        function(query, query, query)

    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    grade(judge, plain, defects=["scale_missing", "sigmoid"], seed=5)
    assert torch.equal(torch.rand(1), expected)
    assert len(drawn_numbers) == 1


def test_the_table_begins_with_what_survived_and_ends_with_a_test_to_paste():
    def judge(function):
        assert function(*drawn(5, 7, dtype=torch.float32)).isfinite().all()

    found = grade(judge, sdpa, defects=["scale_missing", "last_key_ignored", "mask_inverted"])
    lines = str(found).splitlines()
    assert lines[0] == (
        "scaled_dot_product_attention: 0 of 2 active defects killed, 2 survived, 1 inactive, in "
        "1 call"
    )
    assert lines[2].startswith("survived, and by how much")
    assert "inactive: mask_inverted" in lines
    assert set(found.remedy.killed) == {"scale_missing", "last_key_ignored"}
    names = {"sdpa": sdpa, "scaled_dot_product_attention": sdpa}
    exec(found.remedy.code, names)
    for name in found.remedy.cases:
        names["test_what_survived"](name)


def test_what_it_proposes_kills_what_survived():
    def judge(function):
        query, key, value = drawn(4, 4)
        function(query, key, value)
        assert function(query, key, value, masked(4, 4)).isfinite().all()

    found = grade(judge, plain, defects=SOME)
    assert len(found.survived) > 4
    assert set(found.remedy.killed) | set(found.remedy.left) == names(found.survived)

    def better(function):
        judge(function)
        for name in found.remedy.cases:
            case = hard_case(name, dtype=found.remedy.dtype, batch=2)
            assert_matches_reference(function, case.query, case.key, case.value, **case.arguments)

    again = grade(better, plain, defects=found.remedy.killed)
    assert names(again.killed) == set(found.remedy.killed)


def test_all_of_it_is_plain_data():
    found = grade(lambda f: f(*drawn(5, 7)), plain, defects=["relu_normalised", "zeros", *SOME])
    data = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert data["score"] == 0.0
    assert data["version"] == 1
    assert {one["name"] for one in data["survived"]} == names(found.survived)


def test_verdicts_may_come_in_any_order():
    study = Study(plain, defects=["scale_missing", "sigmoid", "zeros"])
    tensors = drawn(5, 7)
    study.watched(*tensors)
    verdicts = []
    for version in study.versions:
        planted = study.plant(version)
        planted(*tensors)
        verdicts.append(study.verdict(planted, None))
    assert study.unfit == ()
    assert study.grade(verdicts) == study.grade(verdicts[::-1])


def test_what_is_beyond_the_lengths_of_packed_sequences_is_no_change():
    starts = [torch.tensor(one, dtype=torch.int32) for one in ([0, 4, 9], [0, 5, 12])]
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(n, 2, 8, generator=generator) for n in (9, 12, 12)]

    def exact(attention):
        found = attention(*tensors, *starts, 5, 7, causal=True)
        wanted = public.flash_attn_varlen_func(*tensors, *starts, 5, 7, causal=True)
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0.0)

    names = ["mask_inverted", "fully_masked_nan", "packed_next_key", "causal_ignored"]
    found = grade(exact, public.flash_attn_varlen_func, defects=names)
    assert not found.survived, str(found)
    assert {"packed_next_key", "causal_ignored"} <= {one.name for one in found.killed}


def test_the_remedy_imports_what_stands_at_the_top_of_a_module():
    def shapes(attention):
        query, key, value = (torch.randn(2, 5, 3, 8) for _ in range(3))
        assert attention(query, key, value).shape == query.shape

    found = grade(shapes, public.flash_attn_func, defects=["no_softmax"])
    assert "\nfrom public_callables import flash_attn_func\n" in str(found.remedy)

    def mine(query, key, value):
        return sdpa(query, key, value)

    assert "import mine" not in str(grade(shapes, mine, defects=["no_softmax"]).remedy)


def test_a_judge_draws_the_same_numbers_of_all_kinds_each_time_it_is_graded():
    seen = []

    def accepts(attention):
        seen.append((random.random(), np.random.rand(), float(torch.rand(()))))
        return attention(*drawn(5, 7)).shape is not None

    grade(accepts, sdpa, defects=["scale_missing"])
    random.random(), np.random.rand()  # what ran before does not matter
    grade(accepts, sdpa, defects=["mean_of_values"])
    assert len(seen) == 4
    assert len(set(seen)) == 1
