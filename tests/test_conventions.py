"""Public callables are examined as they are called; each stand-in has a real one's signature."""

import functools
import inspect
import math

import public_callables as public
import pytest
import torch
from public_callables import planted
from torch.nn.functional import scaled_dot_product_attention as sdpa

from pytest_attnheat import AttentionSpec, check_attention, diagnose
from pytest_attnheat.contract import conventions
from pytest_attnheat.contract.checks import CHECKS
from pytest_attnheat.contract.conventions import Convention, Lse, register_convention

ROWS = {
    "flash_attn": public.flash_attn_func,
    "flash_attn_qkvpacked": public.flash_attn_qkvpacked_func,
    "flash_attn_kvpacked": public.flash_attn_kvpacked_func,
    "flash_attn_3": public.flash_attn_3_func,
    "flash_attn_4": public.flash_attn_4_func,
    "sageattn": public.sageattn,
    "xformers": public.memory_efficient_attention,
    "flashinfer_single_prefill": public.single_prefill_with_kv_cache,
    "flashinfer_single_decode": public.single_decode_with_kv_cache,
    "fla_parallel_attn": public.parallel_attn,
    "flash_attn_varlen": public.flash_attn_varlen_func,
    "flash_attn_varlen_qkvpacked": public.flash_attn_varlen_qkvpacked_func,
    "flash_attn_varlen_kvpacked": public.flash_attn_varlen_kvpacked_func,
    "flash_attn_3_varlen": public.flash_attn_3_varlen_func,
    "flash_attn_4_varlen": public.flash_attn_4_varlen_func,
    "vllm_flash_attn": public.vllm_flash_attn_varlen_func,
    "flash_mla_varlen": public.flash_mla_varlen_func,
    "sageattn_varlen": public.sageattn_varlen,
    "torch_varlen": public.varlen_attn,
}
# What each row can express, besides what all do; it has to be asked and not skipped.
ASKED = {
    "flash_attn": {"causal_rectangular", "grouped", "softcap", "alibi", "window", "dropout",
                   "scale_argument", "returned_lse", "gradients"},
    "flash_attn_3": {"causal_rectangular", "grouped", "softcap", "window", "chunk", "returned_lse"},
    "flash_attn_4": {"causal_rectangular", "softcap", "window", "sinks", "returned_lse"},
    "sageattn": {"causal", "scale_argument", "grouped", "returned_lse"},
    "xformers": {"masked", "float_mask", "scale_argument", "dropout"},
    "flashinfer_single_prefill": {"masked", "causal_rectangular", "window", "softcap",
                                  "fully_masked", "scale_argument", "returned_lse"},
    "flashinfer_single_decode": {"window", "softcap", "scale_argument", "returned_lse"},
    "fla_parallel_attn": {"causal", "window", "sinks", "scale_argument", "gradients"},
    "flash_attn_varlen": {"ragged", "causal_rectangular", "alibi", "softcap", "window", "dropout",
                          "scale_argument", "returned_lse", "gradients"},
    "flash_attn_3_varlen": {"ragged", "chunk", "window", "returned_lse"},
    "flash_attn_4_varlen": {"ragged", "sinks", "window", "returned_lse"},
    "vllm_flash_attn": {"ragged", "alibi", "window", "softcap", "returned_lse"},
    "flash_mla_varlen": {"ragged", "causal_rectangular", "scale_argument"},
    "sageattn_varlen": {"ragged", "causal", "scale_argument"},
    "torch_varlen": {"ragged", "causal_rectangular", "window", "scale_argument"},
}  # fmt: skip


def examined(row, **more):
    return AttentionSpec(ROWS[row], dtypes=("float32",), **more)


# Asked everything; the others share their keywords, and are asked in few calls what they express.
WHOLE = ("flash_attn", "flash_attn_varlen", "flashinfer_single_prefill", "fla_parallel_attn",
         "xformers")  # fmt: skip


@pytest.mark.matrix(of=2)
@pytest.mark.parametrize("row", ROWS)
def test_a_public_callable_passes_as_it_is_called_with_nothing_declared(row):
    asked = [one for one in CHECKS if row in WHOLE or one.quick or one.name in ASKED.get(row, ())]
    report = check_attention(examined(row), checks=asked)
    assert report.passed, str(report)
    assert report.spec.like == row
    passed = {one.name for one in report.results if one.status == "passed"}
    assert ASKED.get(row, set()) <= passed


def test_lower_precision_passes_as_well():
    for row in ("flash_attn", "flash_attn_varlen"):
        spec = AttentionSpec(ROWS[row], dtypes=("bfloat16", "float16"))
        report = check_attention(spec, quick=True)
        assert report.passed, str(report)


_Wrong = tuple[dict[str, object], str]
_COMMON: list[_Wrong] = [
    ({"scale_ignored": True}, "scale_argument_ignored"),
    ({"heads_tiled": True}, "groups_tiled"),
]
_FLASH: list[_Wrong] = [
    *_COMMON,
    ({"window_more": 1}, "window_left_too_wide"),
    ({"window_ignored": True}, "window_ignored"),
    ({"softcap_ignored": True}, "softcap_ignored"),
    ({"corner": "top_left"}, "positions_other_corner"),
]
_PACKED: list[_Wrong] = [
    ({"packing": "one"}, "packing_ignored"),
    ({"packing": "next key"}, "packed_next_key"),
    ({"packing": "previous key"}, "packed_previous_key"),
    ({"packing": "last key lost"}, "packed_last_key_lost"),
    ({"packing": "corner of longest"}, "packed_corner_of_longest"),
    ({"packing": "queries' starts"}, "packed_by_queries"),
    ({"packing": "first length for all"}, "packed_as_long"),
    ({"packing": "empty shifts"}, "packed_empty_shifts"),
]
# By row: what a wrong version decides, and what that is called.
WRONG: dict[str, list[_Wrong]] = {
    "flash_attn": [*_FLASH, ({"slopes_sign": -1.0}, "alibi_negative")],
    "flash_attn_kvpacked": _FLASH[:4],
    "flash_attn_3": _FLASH[2:],
    "flash_attn_4": _FLASH[2:],
    "flashinfer_single_prefill": [*_FLASH[2:], ({"polarity": False}, "mask_inverted")],
    "xformers": [
        ({"scale_ignored": True}, "scale_argument_ignored"),
        ({"unscaled": True}, "scale_missing"),
        ({"bias": "first head"}, "bias_of_first_head"),
        ({"bias": "first sample"}, "bias_of_first_sample"),
    ],
    "flashinfer_single_decode": [*_COMMON, *_FLASH[2:5]],
    "fla_parallel_attn": [*_COMMON, *_FLASH[2:4]],
    "sageattn": [
        *_COMMON,
        ({"unscaled": True}, "scale_missing"),
        ({"causal_more": 1}, "causal_sees_next"),
    ],
    "flash_attn_varlen": [*_FLASH[2:5], *_PACKED, ({"slopes_sign": -1.0}, "alibi_negative")],
    "flash_attn_3_varlen": [*_FLASH[:3], *_PACKED[:3]],
    "flash_attn_4_varlen": [*_FLASH[:3], *_PACKED[3:6]],
    "vllm_flash_attn": [*_FLASH[:3], *_PACKED[4:7]],
    "flash_mla_varlen": [*_COMMON, *_PACKED[:3]],
    "sageattn_varlen": [*_COMMON, _PACKED[0], _PACKED[3]],
    "torch_varlen": [*_COMMON, _FLASH[2], _PACKED[1]],
}


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("row", "decisions", "name"), [(row, *one) for row, several in WRONG.items() for one in several]
)
def test_a_wrong_version_of_a_public_callable_is_found_and_named(row, decisions, name):
    with planted(**decisions):
        found = diagnose(examined(row))
    assert not found.healthy
    named = [*found.defects, *(one for several in found.alternatives for one in several)]
    assert name in named, found.sentence


@pytest.mark.parametrize(("of", "begins"), [("q", "cu_seqlens_q"), ("k", "cu_seqlens_k")])
@pytest.mark.parametrize("replay", ["gradients=all", "gradients=all ragged=unequal"])
def test_a_failure_of_a_packed_call_names_the_row_of_the_packed_tensor(of, begins, replay):
    starts, right = [], public.flash_attn_varlen_func

    @functools.wraps(right)
    def wrong_gradient_of_row_2(*tensors, **named):
        given = inspect.signature(right).bind(*tensors, **named).arguments
        starts.append(given[begins].tolist())
        factor = torch.ones(len(given[of]), 1, 1)
        factor[2] = 1.5
        own = given[of] + 0
        if own.requires_grad:
            own.register_hook(lambda gradient: gradient * factor)
        return right(**{**given, of: own})

    spec = AttentionSpec(wrong_gradient_of_row_2, dtypes=("float32",))
    report = check_attention(spec, replay=replay)
    said = str(report.failed[0].failure.worst).splitlines()[-1]
    sequence = max(n for n, start in enumerate(starts[-1][:-1]) if start <= 2)
    begin = starts[-1][sequence]
    assert said == (
        f"row 2 of the packed tensor: {'query' if of == 'q' else 'key'} {2 - begin} of sequence "
        f"{sequence}, which begins at {begins}[{sequence}] = {begin}"
    )


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("row", "decisions", "says"),
    [
        ("flash_attn", {"base": 2.0}, "it is (batch, heads, query_len), base 2"),
        ("flash_attn", {"empty": math.inf}, "a query that sees nothing"),
        ("flash_attn_4", {"sink_in_lse": False}, "base e, without the sink"),
        ("flashinfer_single_prefill", {"base": math.exp(1 / math.log(2.0))}, "base e"),
        ("flash_attn_varlen", {"base": 2.0}, "base 2"),
        ("sageattn", {"base": 10.0}, "base 10"),
        ("sageattn", {"sums": "largest"}, "it is the largest score of each row, not the logarithm"),
        ("sageattn", {"sums": "not added"}, "which is not added again"),
        ("sageattn", {"sums": "sum"}, "it is the sum itself, not its logarithm"),
        ("sageattn", {"sums": "sign"}, "it is the log-sum-exp with the sign turned"),
        ("sageattn", {"sums": "unscaled"}, "of scores that are not scaled"),
    ],
)
def test_a_log_sum_exp_of_another_convention_fails_and_is_called_what_it_is(row, decisions, says):
    (check,) = [one for one in CHECKS if one.name == "returned_lse"]
    with planted(**decisions):
        report = check_attention(examined(row), checks=[check])
    (result,) = report.failed
    assert says in result.message


def test_the_report_says_which_convention_was_taken_and_why():
    quick = check_attention(public.flash_attn_func, quick=True)
    assert (
        "it is called as flash_attn, flash_attn_func of FlashAttention 2, by its parameters"
        in str(quick)
    )
    named = AttentionSpec(public.flash_attn_func, like="flash_attn_3")
    assert "flash_attn_3, flash_attn_func of FlashAttention 3, as declared" in str(
        check_attention(named, quick=True)
    )


def test_what_is_typed_is_taken_from_nowhere_else():
    spec = AttentionSpec(public.flash_attn_func, causal="top_left", softcap=None)
    assert (spec.like, spec.causal, spec.layout) == ("flash_attn", "top_left", "blhd")
    found = diagnose(spec)
    assert "positions_other_corner" in found.defects


def test_what_hands_on_any_keyword_is_asked_all_that_its_convention_says():
    def attention(*given, **more):
        return public.flash_attn_func(*given, **more)

    spec = AttentionSpec(attention, like="flash_attn", dtypes=("float32",))
    asked = [one for one in CHECKS if one.quick or one.name in ASKED["flash_attn"]]
    report = check_attention(spec, checks=asked)
    assert report.passed, str(report)
    assert ASKED["flash_attn"] <= {one.name for one in report.results if one.status == "passed"}


def test_a_dtype_that_a_kernel_is_not_made_for_is_said_once_and_not_held_against_it():
    def halves(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
               alibi_slopes=None):  # fmt: skip
        if q.dtype not in (torch.float16, torch.bfloat16):
            raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
        return public.flash_attn_func(q, k, v, 0.0, softmax_scale, causal, window_size, 0.0,
                                      alibi_slopes)  # fmt: skip

    report = check_attention(AttentionSpec(halves, dropout=False), quick=True)
    assert {one.dtype for one in report.results} == {"float16"}  # the first that it serves
    assert report.passed, str(report)
    report = check_attention(AttentionSpec(halves, dropout=False, dtypes=("float64",)))
    assert "nothing was examined" in str(report)
    assert not report.passed
    spec = AttentionSpec(halves, dropout=False, dtypes=("float32", "bfloat16"))
    quick = [one for one in CHECKS if one.quick]
    report = check_attention(spec, checks=quick)
    assert report.passed, str(report)
    said = {one.message for one in report.results if one.dtype == "float32"}
    assert said == {"it is not for float32 on cpu: FlashAttention only support fp16 and bf16 data "
                    "type"}  # fmt: skip


def test_who_says_how_it_is_called_is_not_contradicted_but_told():
    spec = AttentionSpec(public.flash_attn_func, layout="blhd")
    assert spec.like is None
    assert "like='flash_attn' says how it is called" in str(check_attention(spec, quick=True))


def test_pytorchs_own_signature_is_no_convention_of_others():
    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
        return sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)

    assert AttentionSpec(attention).like is None
    assert AttentionSpec(sdpa).like is None


def test_a_keyword_that_a_signature_lacks_is_not_asked():
    def older(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
              alibi_slopes=None):  # fmt: skip
        return public.flash_attn_func(q, k, v, dropout_p, softmax_scale, causal, window_size,
                                      0.0, alibi_slopes)  # fmt: skip

    spec = AttentionSpec(older, dtypes=("float32",))
    assert (spec.like, spec.softcap, spec.alibi) == ("flash_attn", None, "alibi_slopes")
    report = check_attention(spec)
    assert not [one for one in report.failed if one.name != "returned_lse"], str(report)


OWN = Convention(
    "own", "attend of a project", ("queries", "memory_keys", "sharpness"),
    {"layout": "lbhd", "mask": None, "causal": None, "scale_argument": "sharpness",
     "returns": "lse"},
    lse=Lse("lbh", "2"),
)  # fmt: skip


def attend(queries, memory_keys, memory_values, *, sharpness=None):
    query, key, value = (t.permute(1, 2, 0, 3) for t in (queries, memory_keys, memory_values))
    scores = query @ key.mT * (sharpness or query.shape[-1] ** -0.5)
    output = (scores.softmax(-1) @ value).permute(2, 0, 1, 3)
    return output, scores.logsumexp(-1).permute(2, 0, 1) / math.log(2.0)


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(conventions, "_KNOWN", dict(conventions._KNOWN))
    register_convention(OWN)


@pytest.mark.usefixtures("registered")
def test_a_project_adds_a_row_of_its_own():
    report = check_attention(AttentionSpec(attend, dtypes=("float32",)))
    assert report.passed, str(report)
    assert report.spec.like == "own"
    assert "returned_lse" in {one.name for one in report.results if one.status == "passed"}


def test_a_row_can_be_handed_in_without_being_registered():
    spec = AttentionSpec(attend, like=OWN, dtypes=("float32",))
    assert check_attention(spec).passed


@pytest.mark.usefixtures("registered")
def test_two_rows_that_fit_equally_are_an_error_that_names_both():
    register_convention(
        Convention("other", "another one", ("queries", "memory_values", "sharpness"), {})
    )
    with pytest.raises(ValueError, match="fit 'own' and 'other' equally; accepted is like= one"):
        AttentionSpec(attend)
    assert AttentionSpec(attend, like="own").like == "own"
    said = AttentionSpec(attend, layout="lbhd")  # who says how it is called is not asked which
    assert said.like is None
    hints = str(check_attention(said, quick=True))
    assert "like='own' says" in hints
    assert "like='other' says" in hints


@pytest.mark.usefixtures("registered")
def test_a_bad_row_is_refused_when_it_is_registered():
    with pytest.raises(ValueError, match="convention: got 'own'; accepted is a name that is not"):
        register_convention(OWN)
    with pytest.raises(ValueError, match="parameters: got none"):
        register_convention(Convention("none", "", (), {}))
    with pytest.raises(TypeError, match="convention: got dict; accepted is a Convention"):
        register_convention({"name": "own"})


class Engine:
    """Attention that is asked in two steps, with nothing of a signature of its own."""

    def prepare(self, **options):
        self.options = options

    def go(self, tokens):
        q, k, v = tokens.unbind(0)
        return sdpa(q, k, v, is_causal=self.options["causal"]) * self.options.get("off", 1.0)


def through(engine, case):
    engine.prepare(causal=case.causal)
    return engine.go(torch.stack(case.tensors))


def test_a_few_lines_call_what_no_field_describes():
    engine = Engine()
    spec = AttentionSpec(
        engine.go, name="engine", call=lambda _, case: through(engine, case), causal="top_left",
        square=True, dtypes=("float32",),
    )  # fmt: skip
    report = check_attention(spec)
    assert report.passed, str(report)
    asked = {one.name for one in report.results if one.status == "passed"}
    assert {"plain", "causal", "gradients", "pairs"} <= asked
    assert "masked" not in asked


def test_a_wrong_call_through_a_few_lines_is_named():
    def always(fn, case):
        return fn(*case.tensors, is_causal=case.causal, scale=1.0)

    found = diagnose(AttentionSpec(sdpa, call=always, causal="top_left"))
    assert "scale_missing" in found.defects or "no_scale" in found.defects, found.defects


def test_lines_that_leave_causality_aside_or_return_another_shape_are_told_so():
    def forgets(fn, case):
        return fn(*case.tensors)

    spec = AttentionSpec(sdpa, call=forgets, causal="top_left", dtypes=("float32",))
    asked = [one for one in CHECKS if one.name in ("plain", "causal")]
    (failed,) = check_attention(spec, checks=asked).failed
    assert "the function of call= does not hand it on" in failed.declaration

    def turned(fn, case):
        return fn(*case.tensors).transpose(1, 2)

    spec = AttentionSpec(sdpa, call=turned, dtypes=("float32",))
    (failed,) = check_attention(spec, checks=asked).failed
    assert "the function of call= must return (batch, heads, length, width)" in failed.message
    assert not failed.declaration


def test_call_and_like_exclude_each_other():
    with pytest.raises(ValueError, match="call: got a function beside like; accepted is one of"):
        AttentionSpec(sdpa, call=lambda fn, case: fn(*case.tensors), like="flash_attn")


def test_a_hook_of_a_project_adds_a_row_for_the_session(pytester):
    pytester.makeconftest("""
        from pytest_attnheat import Convention

        def pytest_attnheat_conventions(config):
            return [Convention("ours", "attend of ours", ("queries", "memory_keys"),
                               {"layout": "blhd", "mask": None, "causal": None})]
    """)
    pytester.makepyfile("""
        from torch.nn.functional import scaled_dot_product_attention
        from pytest_attnheat import AttentionSpec, check_attention

        def attend(queries, memory_keys, memory_values):
            turned = (t.transpose(1, 2) for t in (queries, memory_keys, memory_values))
            return scaled_dot_product_attention(*turned).transpose(1, 2)

        def test_it():
            report = check_attention(AttentionSpec(attend), quick=True)
            assert report.passed and report.spec.like == "ours"
    """)
    pytester.runpytest().assert_outcomes(passed=1)
    assert "ours" not in {one.name for one in conventions.conventions()}


def test_a_bad_row_of_a_hook_is_an_error_of_use(pytester):
    pytester.makeconftest("""
        from pytest_attnheat import Convention

        def pytest_attnheat_conventions(config):
            return [Convention("flash_attn", "another one", ("queries",), {})]
    """)
    pytester.makepyfile("def test_it(): pass")
    result = pytester.runpytest()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines("*pytest_attnheat_conventions: convention: got 'flash_attn'; *")
