"""The examination finds every planted defect, and finds nothing in correct implementations."""

import dataclasses
import functools
import json
import math
import re
import warnings
from html import escape
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from attention_subjects import (
    TRANSFORMERS,
    WIDTH,
    causal_encoder,
    encoder,
    encoder_layer,
    multihead,
    of_transformers,
    plain,
    plus_one,
    randn,
    repeated_keys,
    scaled_query,
    tokens,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa
from wrong_attention import PLANTED, attention_with, declared_for, planted_with

from pytest_attnheat import (
    AttentionSpec,
    SequenceModel,
    check_attention,
    diagnose,
    parametrize_with_checks,
    sliding_window_mask,
    transformers_attention,
)
from pytest_attnheat.contract.asking import KEYWORDS
from pytest_attnheat.contract.checks import BLOCK_CHECKS, CHECKS, Check
from pytest_attnheat.contract.declarations import hints_of
from pytest_attnheat.contract.examination import Examination, Skipped
from pytest_attnheat.contract.running import as_data, examinations_of
from pytest_attnheat.failure import Failure

ONE_DTYPE = ("float32",)
# PyTorch's own kernels let NaN through masked keys: the diagnosis notes it, no check asks it.
# What `pairs` asks besides takes longer than all others.
NAMED = [check for check in CHECKS if check.name != "pairs"]
BY_NAME = {check.name: check for check in CHECKS}
# No call has products that float16 cannot hold. Every second one: the table in the docs has all.
NOT_FOUND = ("masked_nan_felt", "products_overflow")
FOUND = [defect.name for defect in PLANTED if defect.name not in NOT_FOUND][::2]


class Exiting(torch.nn.Module):
    """Ends Python where a sequence is alone, or always."""

    def __init__(self, always):
        super().__init__()
        self.always = always

    def forward(self, hidden):
        if self.always or len(hidden) == 1:
            raise SystemExit("no more")
        return hidden


@pytest.mark.parametrize(("always", "name"), [(False, "batch"), (True, "call")])
def test_a_block_that_exits_fails_the_checks_in_which_it_does(always, name):
    spec = AttentionSpec(Exiting(always).eval(), inputs=randn(2, 5, WIDTH), causal=None)
    found = {result.name: result for result in check_attention(spec).failed}
    assert found[name].reason.startswith("it raised SystemExit: no more (test_contract_report.py:")
    assert not always or list(found) == [name]


def test_what_exits_in_its_backward_pass_fails():
    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise SystemExit

    def exiting(query, key, value):
        return sdpa(query, key, Backward.apply(value))

    report = check_attention(AttentionSpec(exiting, dtypes=ONE_DTYPE), checks=NAMED)
    assert any(result.reason.startswith("it raised SystemExit") for result in report.failed)


def test_what_is_interrupted_ends_the_examination():
    def interrupted(query, key, value):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check_attention(interrupted, quick=True)


def failed(report):
    return list(dict.fromkeys(result.name for result in report.failed))


def statuses(report, name):
    return {result.status for result in report.results if result.name == name}


# --- correct implementations


def by_math(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, enable_gqa=False):
    with sdpa_kernel(SDPBackend.MATH):
        return sdpa(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa=enable_gqa)


def flash(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, enable_gqa=False):
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # why there is no kernel
        return sdpa(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa=enable_gqa)


CORRECT = [sdpa, by_math, plain, plus_one, scaled_query, repeated_keys]


@pytest.mark.parametrize("function", CORRECT, ids=lambda f: f.__name__)
def test_correct_functions_pass_in_every_dtype(function):
    report = check_attention(function, checks=NAMED)
    assert report.passed, str(report)
    assert {result.dtype for result in report.results} == {
        "float64", "float32", "float16", "bfloat16",
    }  # fmt: skip
    assert statuses(report, "plain") == statuses(report, "layout") == {"passed"}


def test_a_fused_kernel_that_refuses_some_inputs_passes():
    report = check_attention(flash, checks=[BY_NAME[n] for n in ("plain", "masked", "dropout")])
    assert report.passed, str(report)
    assert statuses(report, "plain") == statuses(report, "masked") == {"passed"}
    assert statuses(report, "dropout") == {"skipped"}
    (message,) = {result.message for result in report.results if result.name == "dropout"}
    assert message.startswith("the subject refuses: No available kernel")


def test_what_refuses_everything_has_not_passed():
    def refusing(query, key, value):
        raise NotImplementedError("not on this device")

    report = check_attention(AttentionSpec(refusing, dtypes=ONE_DTYPE))
    assert not report.passed
    assert not report.failed
    assert str(report).splitlines()[0].startswith("refusing: nothing was examined; each check was")


def test_what_takes_values_as_wide_as_keys_alone_is_asked_of_such():
    def of_one_width(query, key, value):
        return sdpa(query, key, value).view(query.shape)

    report = check_attention(AttentionSpec(of_one_width, dtypes=ONE_DTYPE))
    assert report.passed, str(report)
    assert statuses(report, "plain") == statuses(report, "pairs") == {"passed"}


def test_flex_attention_passes_in_every_dtype():
    from torch.nn.attention.flex_attention import flex_attention

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        some = ("plain", "masked", "causal", "grouped", "scale_argument", "gradients")
        report = check_attention(flex_attention, checks=[BY_NAME[name] for name in some])
    assert report.passed, str(report)
    assert report.spec.name == "flex_attention"
    # There is no backward pass of it on a CPU, but in old versions of torch.
    assert statuses(report, "gradients") in ({"skipped"}, {"passed"})
    assert statuses(report, "grouped") == statuses(report, "masked") == {"passed"}


def rotated(x):
    width, length = x.shape[-1], x.shape[-2]
    at = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(0, width, 2) / width)
    cos, sin, even, odd = at.cos().to(x), at.sin().to(x), x[..., ::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def with_rotation(query, key, value, is_causal=False):
    return sdpa(rotated(query), rotated(key), value, is_causal=is_causal)


def in_float64(query, key, value, is_causal=False):
    return with_rotation(query.double(), key.double(), value.double(), is_causal)


def test_a_reference_that_rounds_nothing_leaves_room_for_the_steps_it_does_not_show():
    spec = AttentionSpec(with_rotation, reference=in_float64, dtypes=ONE_DTYPE)
    report = check_attention(spec)
    assert report.passed, str(report)


def test_beside_a_reference_no_defect_of_other_attention_is_named():
    def sees_one_more(query, key, value, is_causal=False):
        seen = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril(1)
        return sdpa(rotated(query), rotated(key), value, attn_mask=seen if is_causal else None)

    spec = AttentionSpec(sees_one_more, reference=in_float64, dtypes=ONE_DTYPE)
    report = check_attention(spec, checks=[BY_NAME["plain"], BY_NAME["causal"]])
    assert [result.name for result in report.failed] == ["causal"]
    assert report.diagnosis is None


def test_expected_failures_are_given_with_their_reasons():
    with pytest.raises(TypeError, match="expected_failures: got list; accepted is reasons by the"):
        check_attention(sdpa, expected_failures=["dropout"])


def test_another_layout_and_meaning_of_the_mask_are_declared():
    def own(q, k, v, dropped=None):
        turned = (t.transpose(1, 2) for t in (q, k, v))
        mask = None if dropped is None else ~dropped
        return sdpa(*turned, attn_mask=mask).transpose(1, 2)

    spec = AttentionSpec(
        own, layout="blhd", mask="drop", mask_argument="dropped", dtypes=("float32", "bfloat16")
    )
    report = check_attention(spec, checks=NAMED)
    assert report.passed, str(report)
    assert statuses(report, "masked") == {"passed"}
    assert statuses(report, "causal") == {"skipped"}


def test_one_head_without_a_dimension_of_heads_is_examined():
    def single(query, key, value, mask=None):
        scores = query @ key.mT / query.shape[-1] ** 0.5
        if mask is not None:
            scores = scores + mask
        return scores.softmax(-1).nan_to_num(0.0) @ value

    spec = AttentionSpec(single, layout="bld", mask="additive", mask_argument="mask",
                         fully_masked="undefined", dtypes=ONE_DTYPE)  # fmt: skip
    report = check_attention(spec, checks=NAMED)
    assert set(failed(report)) <= {"gradients_masked"}, str(report)
    assert statuses(report, "masked") == {"passed"}


@pytest.mark.parametrize("name", ["eager", "sdpa", "flex_attention"])
def test_the_attention_functions_of_transformers_pass(name):
    report = check_attention(transformers_attention(name), checks=NAMED)
    assert report.passed, str(report)
    assert statuses(report, "masked") == statuses(report, "grouped") == {"passed"}
    with pytest.raises(ValueError, match="name: got 'flasher'; accepted is one of 'eager', "):
        transformers_attention("flasher")


@pytest.mark.parametrize("found", ["4.52.4", "4.6.0rc1", None])
def test_transformers_that_is_too_old_or_absent_is_refused_in_one_sentence(monkeypatch, found):
    def version(name):
        if found is None:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr("pytest_attnheat.contract.ready.version", version)
    with pytest.raises(ImportError) as refused:
        transformers_attention("sdpa")
    said = f"transformers: got {found or 'none'}; accepted is version 4.53 or newer"
    assert str(refused.value) == said


@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention_passes_with_and_without_weights(need_weights):
    module = multihead()

    def block(x, mask=None):
        return module(x, x, x, key_padding_mask=mask, need_weights=need_weights)[0]

    model = SequenceModel(block, mask="drop", mask_argument="mask")
    report = check_attention(AttentionSpec(model, inputs=randn(2, 9, WIDTH), causal=None))
    assert report.passed, str(report)
    assert statuses(report, "padding") == {"passed"}


def test_known_subjects_need_no_words():
    for module in (multihead(), encoder_layer(), encoder()):
        report = check_attention(module)
        assert report.passed, str(report)
        assert statuses(report, "padding") == {"passed"}


def test_returned_weights_are_checked():
    def right(query, key, value):
        weights = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)
        return weights @ value, weights

    def averaged(query, key, value):
        output, weights = right(query, key, value)
        return output, weights.mean(1)

    def of_another_head(query, key, value):
        output, weights = right(query, key, value)
        return output, weights.roll(1, 1)

    def report(function, returns):
        spec = AttentionSpec(function, returns=returns, dtypes=ONE_DTYPE)
        return check_attention(spec, checks=NAMED)

    assert report(right, "weights").passed
    assert report(averaged, "averaged").passed
    assert failed(report(of_another_head, "weights")) == ["returned_weights"]
    assert failed(report(right, "averaged")) == ["returned_weights"]
    assert failed(report(averaged, "weights")) == ["returned_weights"]

    def of_one_head(query, key, value):
        output, weights = right(query, key, value)
        return output, weights[:, 0]

    (result,) = report(of_one_head, "averaged").failed
    assert result.failure.claim == "weights are not the mean of those of the heads"
    assert result.failure.of == 2 * 5 * 7


# --- planted defects


@pytest.mark.matrix
@pytest.mark.parametrize("name", FOUND)
def test_every_defect_of_the_catalogue_is_found(name):
    subject, declared = planted_with(name)
    of_groups = ("groups_tiled", "first_key_head_only", "keys_tiled", "values_tiled")
    grouped = True if name in of_groups else None
    spec = AttentionSpec(subject, grouped=grouped, dtypes=ONE_DTYPE, **declared)
    (examination,) = examinations_of(spec)
    # One check after the other, up to the first that finds it.
    assert any(finds(check, examination) for check in CHECKS)


def finds(check, examination):
    try:
        check.examine(examination)
    except Skipped:
        return False
    except Exception:  # as run_check takes it
        return True
    return False


@pytest.mark.parametrize(
    "names", [(), ("window_ignored",), ("fully_masked_zero",)], ids=["plain", "window", "uniform"]
)
def test_what_the_planted_defects_are_planted_in_is_right(names):
    declared = declared_for(*names)
    sound = AttentionSpec(attention_with(**declared), dtypes=ONE_DTYPE, **declared)
    # With the pairs of all that is declared where nothing else asks them.
    assert check_attention(sound, checks=CHECKS if names else NAMED).passed


@pytest.mark.matrix
def test_the_pairs_of_a_correct_function_pass_in_half_precision():
    spec = AttentionSpec(sdpa, dtypes=("bfloat16",))
    assert statuses(check_attention(spec, checks=[BY_NAME["pairs"]]), "pairs") == {"passed"}


@pytest.mark.parametrize(
    ("declared", "check", "message"),
    [
        (
            {"mask": "drop"},
            "masked",
            "mask='drop' is declared, but the code means 'keep': True where a query may attend",
        ),
        (
            {"causal": "bottom_right"},
            "causal_rectangular",
            "causal='bottom_right' is declared, but the code means 'top_left'",
        ),
        (
            {"fully_masked": "nan"},
            "fully_masked",
            "fully_masked='nan' is declared, but the code means 'zero'",
        ),
    ],
)
def test_a_wrong_declaration_is_called_one(declared, check, message):
    spec = AttentionSpec(sdpa, dtypes=ONE_DTYPE, **declared)
    report = check_attention(spec, checks=[BY_NAME[check]])
    found = next(result for result in report.failed if result.name == check)
    assert found.declaration == f"wrong declaration: {message}"
    if check == "masked":  # the diagnosis that leads the report takes longest
        assert str(report).splitlines()[1] == found.declaration
        assert f"{found.declaration}\n{found.message}" in str(report)


def test_what_the_subject_raises_is_a_failure_with_its_words():
    def refusing(query, key, value):
        raise KeyError("no such head")

    report = check_attention(AttentionSpec(refusing, dtypes=ONE_DTYPE))
    assert "it raised KeyError: 'no such head'" in report.failed[0].message
    assert report.diagnosis is None
    assert report.failed[0].message in str(report)


# --- blocks


@pytest.mark.parametrize(("name", "implementation"), TRANSFORMERS)
def test_models_of_transformers_pass_as_blocks(name, implementation):
    causal = None if name == "bert" else "top_left"
    model = of_transformers(name, implementation)
    report = check_attention(AttentionSpec(model, inputs=tokens(2, 9), causal=causal))
    assert report.passed, str(report)
    assert statuses(report, "padding") == {"passed"}
    assert statuses(report, "decoding") == {"skipped" if causal is None else "passed"}


def test_a_block_without_inputs_is_refused_in_one_line_within_a_sequence_model_too():
    def recurrent(tokens):
        return tokens

    wrapped = SequenceModel(causal_encoder(), decode=lambda tokens, cache: (tokens, cache))
    for block, name in ((causal_encoder(), "CausalEncoder"), (wrapped, "CausalEncoder"),
                        (SequenceModel(recurrent), "recurrent")):  # fmt: skip
        with pytest.raises(ValueError) as caught:
            check_attention(block)
        assert str(caught.value) == (
            f"subject: got {name}, which is not called with query, key and value; accepted is a "
            "block with its inputs: AttentionSpec(module, inputs=...) examines it as one"
        )


def test_blocks_of_torch_pass():
    for module in (multihead(), multihead(False), encoder_layer(), encoder()):
        report = check_attention(AttentionSpec(module, inputs=randn(2, 9, WIDTH), causal=None))
        assert report.passed, str(report)
    report = check_attention(AttentionSpec(causal_encoder(), inputs=tokens(2, 9)))
    assert report.passed, str(report)
    assert statuses(report, "padding") == {"skipped"}  # nobody said how it takes its mask
    assert {result.name for result in report.results} == {check.name for check in BLOCK_CHECKS}


def test_a_block_with_a_cache_that_nobody_can_use_is_not_asked_to_decode():
    class Cached(torch.nn.Module):
        def forward(self, ids, cache=None):
            return causal_encoder()(ids), cache

    report = check_attention(AttentionSpec(Cached().eval(), inputs=tokens(2, 9)))
    assert statuses(report, "decoding") == {"skipped"}


def test_a_defect_of_a_block_is_found():
    report = check_attention(AttentionSpec(encoder_layer(), inputs=randn(2, 9, WIDTH)))
    # It was declared causal.
    assert set(failed(report)) == {"no_leakage", "decoding", "attention_inside"}
    assert report.diagnosis.defects == ("causal_ignored",)


# --- the report


def test_what_every_check_raises_is_printed_once():
    def broken(query, key, value, attn_mask=None, is_causal=False):
        raise KeyError("no such head")

    text = str(check_attention(AttentionSpec(broken, dtypes=ONE_DTYPE), quick=True))
    assert text.count("it raised KeyError: 'no such head'") == 1
    assert "\nshape_and_dtype, plain, masked, causal, " in text
    assert text.count("check_attention(..., replay=") == 1


def test_the_report_leads_with_the_diagnosis_and_is_a_table():
    subject = attention_with("softmax_over_queries")
    spec = AttentionSpec(subject, name="mine", dtypes=("float32", "float64"))
    some = ("plain", "masked", "grouped")
    report = check_attention(spec, checks=[BY_NAME[name] for name in some])
    assert not report.passed
    assert report.diagnosis.defects == ("softmax_over_queries",)
    assert repr(report) == f"<Report {str(report).splitlines()[0]}>"
    shown = report._repr_html_()
    assert shown.startswith(f"<pre>{escape(str(report).splitlines()[0])}")
    assert "</pre><table><tr><th></th><th>float32</th><th>float64</th></tr>" in shown
    assert "<td>plain</td><td>failed</td>" in shown
    lines = str(report).splitlines()
    skipped = sum(result.status == "skipped" for result in report.results)
    asked = len(report.results) - skipped
    assert lines[0] == f"mine: {len(report.failed)} of {asked} checks failed, {skipped} skipped"
    assert "softmax runs over the queries (dim=-2)" in lines[2]
    assert any(line.split() == ["float32", "float64"] for line in lines)
    assert any(line.split() == ["plain", "failed", "failed"] for line in lines)
    assert any(line.split() == ["grouped", "skipped", "skipped"] for line in lines)
    assert "plain (float32, cpu)" in lines
    right = check_attention(AttentionSpec(sdpa, dtypes=ONE_DTYPE), checks=[BY_NAME["plain"]])
    assert "it computes" not in str(right)


def test_the_quick_form_asks_less():
    quick = check_attention(sdpa, quick=True)
    assert quick.passed
    assert {result.dtype for result in quick.results} == {"float32"}
    assert len(quick.results) < len(CHECKS)
    assert "all quick checks passed, " in str(quick).splitlines()[0]
    said = "not asked in the quick form: scale_argument, block_lengths, gradients, "
    (line,) = [line for line in str(quick).splitlines() if said in line]
    assert quick.as_dict()["left_out"] == line.partition(": ")[2].split(", ")
    named = check_attention(sdpa, quick=True, checks=[BY_NAME["plain"]])
    assert "all checks passed" in str(named)
    assert "not asked" not in str(named)


def test_the_quick_form_asks_a_softcap_beside_what_hides():
    def wrong(query, key, value, attn_mask=None, is_causal=False, scale=None, softcap=None):
        scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -1e9)
        if is_causal:
            hidden = ~torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
            scores = scores.masked_fill(hidden, -1e9)
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        return scores.softmax(-1) @ value

    spec = AttentionSpec(wrong, softcap="softcap", causal="top_left", dtypes=ONE_DTYPE)
    assert BY_NAME["softcap"].quick
    (result,) = check_attention(spec, checks=[BY_NAME["softcap"]]).failed
    assert "whose softcap comes after the mask" in result.message


def test_what_takes_no_strided_inputs_fails_the_layout_alone():
    def compact(query, key, value, attn_mask=None, is_causal=False):
        if not all(one.is_contiguous() for one in (query, key, value)):
            raise ValueError("strides are not looked at")
        return sdpa(query, key, value, attn_mask, is_causal=is_causal)

    spec = AttentionSpec(compact, dtypes=["float64"])
    asked = [BY_NAME[name] for name in ("plain", "masked", "pairs", "layout")]
    report = check_attention(spec, checks=asked)
    assert [result.name for result in report.failed] == ["layout"]


def test_a_call_that_is_replayed_of_what_is_not_declared_says_so_first():
    report = check_attention(sdpa, replay="sizes=3x3 chunk=True")
    said = "nothing was examined; replay: got 'chunk=True'; accepted is feature=level, of sizes, b"
    assert said in str(report).splitlines()[0]


def test_expected_failures_are_said_so_with_their_reason():
    subject = AttentionSpec(attention_with("causal_other_corner"), dtypes=ONE_DTYPE)
    known = {"causal_rectangular": "see issue 7", "pairs": "see issue 8"}
    report = check_attention(subject, expected_failures=known)
    assert report.passed
    said = {r.name: r.message for r in report.results if r.status == "xfailed"}
    assert said == known
    with pytest.raises(ValueError, match=r"expected_failures: got \['causl'\]; accepted is names"):
        check_attention(sdpa, expected_failures={"causl": "typo"})


def test_a_failed_check_keeps_its_failure_and_says_it_in_one_line():
    spec = AttentionSpec(attention_with("scale_missing"), dtypes=ONE_DTYPE)
    (result,) = check_attention(spec, checks=[BY_NAME["plain"]]).failed
    assert isinstance(result.failure, Failure)
    assert result.message == str(result.failure)
    assert result.reason == f"{result.failure.headline}; {result.failure.cause}"
    assert "that of attention whose scores are not scaled" in result.reason


def test_a_report_is_plain_data_that_says_all_of_it():
    def wrong(query, key, value):
        return (query @ key.mT).softmax(-1) @ value

    spec = AttentionSpec(wrong, softcap=None, may_see=lambda b, h, q, k: k >= 0, dtypes=ONE_DTYPE)
    report = check_attention(spec, checks=[BY_NAME[n] for n in ("plain", "masked", "pairs")])
    data = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert data["version"] == 1
    assert (data["subject"], data["passed"]) == ("wrong", False)
    assert data["counts"] == {"passed": 0, "failed": 2, "skipped": 1, "xfailed": 0}
    assert data["spec"]["typed"] == ["dtypes", "may_see", "softcap", "subject"]
    assert data["spec"]["may_see"].endswith("<lambda>")
    assert data["diagnosis"]["defects"] == ["scale_missing"]
    assert "scores are not scaled" in data["diagnosis"]["sentence"]
    plain, masked, pairs = data["results"]
    failure = report.failed[0].failure
    assert (plain["check"], plain["dtype"], plain["device"]) == ("plain", "float32", "cpu")
    assert (plain["message"], plain["cause"]) == (report.failed[0].message, failure.cause)
    assert (plain["broken"], plain["of"]) == (failure.broken, failure.of)
    assert plain["worst"]["index"] == list(failure.worst.index)
    assert (masked["status"], masked["reason"]) == ("skipped", "it does not take a mask")
    again = check_attention(spec, replay=pairs["replay"])
    assert [result.status for result in again.results] == ["failed"]


def test_the_data_of_a_report_count_the_pairs_and_hold_no_number_that_json_lacks():
    spec = AttentionSpec(lambda q, k, v: sdpa(q, k, v), gradients=False, dtypes=ONE_DTYPE)
    report = check_attention(spec, checks=[BY_NAME["pairs"]])
    (result,) = report.as_dict()["results"]
    counts = result["counts"]
    assert f"{counts['asked']:,} pairs of levels in {counts['calls']} calls" in result["message"]
    assert as_data({"a": math.inf, "b": [math.nan, -math.inf, 0.5], "c": torch.ones(2, 3)}) == {
        "a": "inf", "b": ["nan", "-inf", 0.5], "c": "float32 (2, 3)",
    }  # fmt: skip


def test_own_checks_may_be_added():
    def never_negative(examination):
        if bool((examination.spec.ask(examination.case()).output < 0).any()):
            raise AssertionError("an output is negative")

    own = Check("never_negative", "no output is negative", never_negative)
    report = check_attention(AttentionSpec(sdpa, dtypes=ONE_DTYPE), checks=[BY_NAME["plain"], own])
    assert failed(report) == ["never_negative"]


def test_what_is_no_check_is_refused_in_words():
    for ask in (lambda given: check_attention(sdpa, checks=given),
                lambda given: parametrize_with_checks([sdpa], checks=given)):  # fmt: skip
        with pytest.raises(TypeError, match=r"checks: got \['plain'\]; accepted is one or"):
            ask(["plain"])
        with pytest.raises(ValueError, match=r"checks: got \[\]; accepted is one or more checks"):
            ask([])


# --- specifications


def test_what_was_read_off_one_subject_is_not_kept_for_another():
    def own(query, key, value, scale=None):
        return query

    spec = dataclasses.replace(AttentionSpec(sdpa, causal="top_left"), subject=own)
    plain = AttentionSpec(own)
    for name in ("name", "mask", "grouped", "dropout", "scale_argument"):
        assert getattr(spec, name) == getattr(plain, name), name
    assert dataclasses.replace(AttentionSpec(sdpa, name="mine"), subject=own).name == "mine"
    assert dataclasses.replace(AttentionSpec(own), subject=sdpa).mask == "any"
    assert spec.typed == {"subject", "causal"}


def test_what_was_typed_is_not_called_a_default():
    leaking = AttentionSpec(encoder_layer(), inputs=randn(2, 9, WIDTH), causal="top_left")
    (check,) = (check for check in BLOCK_CHECKS if check.name == "no_leakage")
    (result,) = check_attention(leaking, checks=[check]).failed
    assert result.declaration.startswith("wrong declaration: causal='top_left' is declared, but")


@pytest.mark.parametrize(
    ("declared", "error", "message"),
    [
        ({"score_mod": lambda score, batch, head: score}, ValueError, "raised TypeError"),
        ({"score_mod": lambda score, b, h, q, k: 3.0}, TypeError, "one that returned float"),
        ({"score_mod": lambda score, b, h, q, k: q > k}, ValueError, "one that returned bool"),
        ({"may_see": lambda q, k: q > k}, ValueError, "raised TypeError"),
        ({"may_see": lambda b, h, q, k: 1.0 * k}, ValueError, "one that returned float32"),
        ({"sinks": torch.zeros(3), "layout": "bld"}, ValueError, "'bld', which has no heads"),
    ],
)
def test_what_the_subject_would_be_blamed_for_is_refused_where_it_is_declared(
    declared, error, message
):
    with pytest.raises(error, match=message):
        AttentionSpec(sdpa, **declared)


def test_a_specification_reads_what_the_signature_says():
    spec = AttentionSpec(lambda query, key, value, enable_gqa=False: query)
    assert (spec.mask, spec.causal, spec.grouped, spec.dropout) == (None, None, True, False)
    spec = AttentionSpec(sdpa)
    assert (spec.mask, spec.causal, spec.grouped, spec.dropout) == ("any", "top_left", True, True)
    assert spec.name == "scaled_dot_product_attention"


REFUSED = [
    ({"subject": 3}, TypeError, "subject: got int; accepted is a callable, as subject("),
    ({"name": 3}, TypeError, "name: got 3; accepted is a text"),
    ({"sharding": "spiral"}, ValueError, "sharding: got 'spiral'; accepted is one of 'ring', "),
    ({"uneven": 3}, TypeError, "uneven: got 3; accepted is True or False"),
    ({"mask_argument": 3}, TypeError, "mask_argument: got 3; accepted is a text"),
    ({"causal_argument": None}, TypeError, "causal_argument: got None; accepted is a text"),
    ({"layout": "bhqd"}, ValueError, "layout: got 'bhqd'; accepted is the letters b (batch), h"),
    ({"layout": 4}, TypeError, "layout: got 4; accepted is the letters b (batch), h"),
    ({"mask": "hide"}, ValueError, "mask: got 'hide'; accepted is one of 'keep', 'drop', "
     "'additive', 'any', or None"),
    ({"causal": True}, TypeError, "causal: got True; accepted is one of 'top_left', "
     "'bottom_right', or None"),
    ({"returns": None}, TypeError, "returns: got None; accepted is one of 'output', "),
    ({"fully_masked": 0.0}, TypeError, "fully_masked: got 0.0; accepted is one of 'zero', "),
    ({"window": 3}, TypeError, "window: got 3; accepted is a pair of whole numbers from 0, with "),
    ({"window": (1, 2, 3)}, ValueError, "window: got (1, 2, 3); accepted is a pair of whole "),
    ({"window": (1, 2.5)}, ValueError, "window: got (1, 2.5); accepted is a pair of whole "),
    ({"window": (-1, 0)}, ValueError, "window: got (-1, 0); accepted is a pair of whole "),
    ({"grouped": "yes"}, TypeError, "grouped: got 'yes'; accepted is True, False, or None"),
    ({"dropout": 1}, TypeError, "dropout: got 1; accepted is True, False, its keyword, or "),
    ({"scale": True}, TypeError, "scale: got bool; accepted is a number, or None"),
    ({"scale": "softmax_scale"}, TypeError, "scale: got str; accepted is a number, or None"),
    ({"scale": float("nan")}, ValueError, "scale: got nan; accepted is a finite number, or None"),
    ({"tolerance": -1}, ValueError, "tolerance: got -1.0; accepted is 0 <= tolerance < 1, or "),
    ({"dtypes": "float32"}, TypeError, "dtypes: got 'float32'; accepted is a tuple or list of "),
    ({"dtypes": ("flaot32",)}, ValueError, "dtypes: got ('flaot32',); accepted is a tuple or "
     "list of one or more of 'float16', 'bfloat16', 'float32', 'float64'"),
    ({"dtypes": ()}, ValueError, "dtypes: got (); accepted is a tuple or list of one or more of "),
    ({"devices": "cpu"}, TypeError, "devices: got 'cpu'; accepted is a tuple or list of "),
    ({"devices": ("gpu",)}, ValueError, "got 'gpu'; accepted is "),
    ({"devices": ()}, ValueError, "devices: got (); accepted is a tuple or list of one or "),
    ({"inputs": [[1, 2]]}, TypeError, "inputs: got [[1, 2]]; accepted is floats (batch, length, "),
    ({"inputs": randn(2, 9)}, ValueError, "inputs: got float32 (2, 9); accepted is floats "),
    ({"inputs": randn(1, 9, 4)}, ValueError, "inputs: got float32 (1, 9, 4); accepted is floats "),
    ({"inputs": randn(2, 1, 4)}, ValueError, "inputs: got float32 (2, 1, 4); accepted is floats "),
    ({"inputs": torch.full((2, 9), 7)}, ValueError, "inputs: got int64 (2, 9); accepted is floats"),
    ({"inputs": tokens(2, 9).bool()}, ValueError, "inputs: got bool (2, 9); accepted is floats "),
    ({"softcap": 0}, ValueError, "softcap: got 0; accepted is a finite number above 0, the keywo"),
    ({"softcap": float("inf")}, ValueError, "softcap: got inf; accepted is a finite number above "),
    ({"sinks": 0.5}, TypeError, "sinks: got 0.5; accepted is a tensor of one number per head, "),
    ({"sinks": randn(1, 4)}, ValueError, "sinks: got float32 (1, 4); accepted is a tensor of one "),
    ({"alibi": True}, TypeError, "alibi: got True; accepted is a function of the number of heads"),
    ({"alibi": randn(4, 1)}, ValueError, "alibi: got float32 (4, 1); accepted is a function of "),
    ({"bias": randn(4)}, TypeError, "bias: got float32 (4,); accepted is the name of a parameter"),
    ({"bias": "a bias"}, ValueError, "bias: got 'a bias'; accepted is the name of a parameter, o"),
    ({"score_mod": 2.0}, TypeError, "score_mod: got 2.0; accepted is a function, or None"),
    ({"may_see": randn(4, 4)}, ValueError, "may_see: got float32 (4, 4); accepted is a function"),
    ({"may_see": "causal"}, TypeError, "may_see: got 'causal'; accepted is a function of positio"),
    ({"chunk": 0}, ValueError, "chunk: got 0; accepted is a whole number above 0, the keyword "),
    ({"chunk": 2.5}, TypeError, "chunk: got 2.5; accepted is a whole number above 0, the keyw"),
    ({"prefix": -1}, ValueError, "prefix: got -1; accepted is a whole number from 0"),
    ({"sink_keys": None}, TypeError, "sink_keys: got None; accepted is a whole number from 0"),
    ({"documents": 3}, TypeError, "documents: got 3; accepted is numbers (batch, length) or "),
    ({"lengths": 3}, TypeError, "lengths: got 3; accepted is the name of a parameter, or None"),
    ({"scale_argument": 2.0}, TypeError, "scale_argument: got 2.0; accepted is the name of a "),
    ({"mask_shape": "(L, L)"}, ValueError, "mask_shape: got '(L, L)'; accepted is one of '(B, 1, "),
    ({"rounded": {"output": torch.float16}}, ValueError, "rounded: got {'output': torch.float16}; "
     "accepted is a dtype of torch for some of 'query', 'key', 'value', 'scores', 'weights', or "),
    ({"rounded": {"key": "float16"}}, ValueError, "rounded: got {'key': 'float16'}; accepted is"),
    ({"gradients": None}, TypeError, "gradients: got None; accepted is True or False"),
    ({"few_shapes": 3}, TypeError, "few_shapes: got 3; accepted is True or False"),
    ({"square": "yes"}, TypeError, "square: got 'yes'; accepted is True, False, or None"),
    ({"reference": "sdpa"}, TypeError, "reference: got 'sdpa'; accepted is a function, or None"),
    ({"arguments": ["memory"]}, TypeError, "arguments: got ['memory']; accepted is values by name"),
    ({"arguments": {3: 4}}, ValueError, "arguments: got {3: 4}; accepted is values by name, or "),
    ({"like": 3}, TypeError, "like: got 3; accepted is the name of a convention, one, or None"),
    ({"like": "flash"}, ValueError, "like: got 'flash'; accepted is one of 'flash_attn', "),
    ({"call": "flash"}, TypeError, "call: got 'flash'; accepted is a function, or None"),
    ({"memory": 3}, TypeError, "memory: got 3; accepted is the name of a parameter, or None"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "error", "says"), REFUSED)
def test_a_bad_specification_is_refused_when_it_is_made(fields, error, says):
    with pytest.raises(error, match=re.escape(says)):
        AttentionSpec(**{"subject": sdpa, **fields})


def test_every_field_of_a_specification_is_checked():
    checked = {name for fields, _, _ in REFUSED for name in dict(fields)}
    names = {field.name for field in dataclasses.fields(AttentionSpec)}
    assert checked == {name for name in names if not name.startswith("_")}


def test_an_output_in_another_layout_than_declared_is_refused():
    with pytest.raises(ValueError, match=r"must return \(batch, length, heads, width\), here"):
        AttentionSpec(lambda query, key, value: query.mT, layout="blhd")(
            torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4)
        )


def windowed(alignment):
    def attention(query, key, value):
        sizes = query.shape[-2], key.shape[-2]
        mask = sliding_window_mask(*sizes, window=(2, 1), alignment=alignment)
        return plain(query, key, value, mask)

    return attention


def test_a_window_is_counted_from_the_declared_corner_without_a_keyword_for_causality():
    def examined(code, declared):
        return AttentionSpec(
            windowed(code), window=(2, 1), causal=declared, fully_masked="undefined",
            dtypes=ONE_DTYPE,
        )  # fmt: skip

    spec = examined("bottom_right", "bottom_right")
    assert (spec.causal, spec.takes_causal) == ("bottom_right", False)
    report = check_attention(spec, checks=NAMED)
    assert report.passed, str(report)
    assert statuses(report, "plain") == {"passed"}
    assert statuses(report, "causal") == statuses(report, "decoding") == {"skipped"}
    assert diagnose(spec).healthy
    assert check_attention(examined("top_left", "top_left"), checks=NAMED).passed
    assert examined("top_left", "top_left").causal is None
    for code, declared in (("bottom_right", "top_left"), ("top_left", "bottom_right")):
        spec = examined(code, declared)
        assert "plain" in failed(check_attention(spec, quick=True))
        assert not diagnose(spec).healthy


@pytest.mark.parametrize(
    ("declared", "says"),
    [
        (
            {"causal": "bottom_right"},
            "causal: got 'bottom_right' for a subject that has neither a parameter is_causal nor "
            "a window; accepted is None, or with causal_argument= the name of its parameter, or",
        ),
        (
            {"mask": "drop"},
            "mask: got 'drop' for a subject that has no parameter attn_mask; accepted is None, or "
            "with mask_argument= the name of its parameter",
        ),
    ],
)
def test_a_declaration_that_can_have_no_effect_is_refused(declared, says):
    def plain_alone(query, key, value):
        return sdpa(query, key, value)

    with pytest.raises(ValueError, match=re.escape(says)):
        AttentionSpec(plain_alone, **declared)


# --- what a stranger stumbled over


def always_causal(query, key, value, attn_mask=None):
    mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
    return sdpa(query, key, value, mask if attn_mask is None else mask & attn_mask)


def test_a_function_that_is_always_causal_is_declared_by_a_window_that_ends_nowhere():
    spec = AttentionSpec(always_causal, window=(None, 0), dtypes=ONE_DTYPE)
    report = check_attention(spec)
    assert report.passed, str(report)
    spec = AttentionSpec(always_causal, dtypes=ONE_DTYPE)
    report = check_attention(spec, checks=[BY_NAME["plain"]])
    wrong = (
        "not declared: window=None is assumed, but the code means (None, 0): it is always causal; "
    )
    assert report.failed[0].declaration.startswith(wrong)


def test_a_function_that_is_causal_by_default_is_told_when_it_is_not_to_be():
    def by_default(query, key, value, is_causal=True):
        return sdpa(query, key, value, is_causal=is_causal)

    report = check_attention(AttentionSpec(by_default, dtypes=ONE_DTYPE))
    assert report.passed, str(report)


def test_a_softmax_in_float32_is_diagnosed_in_float32():
    def unscaled(query, key, value):
        return (query @ key.mT).float().softmax(-1).to(value.dtype) @ value

    def right(query, key, value):
        scores = query @ key.mT / query.shape[-1] ** 0.5
        return scores.float().softmax(-1).to(value.dtype) @ value

    plainly = BY_NAME["plain"]
    assert check_attention(unscaled, checks=[plainly]).diagnosis.defects == ("scale_missing",)
    report = check_attention(right, checks=[plainly])
    assert {result.dtype for result in report.failed} == {"float64"}
    assert "as if some step were done in float32; if that is meant, leave float64" in str(report)


def test_another_layout_is_recognised():
    def turned(query, key, value):
        return sdpa(*(t.transpose(1, 2) for t in (query, key, value))).transpose(1, 2)

    report = check_attention(AttentionSpec(turned, dtypes=ONE_DTYPE), quick=True)
    assert report.failed[0].declaration == (
        "not declared: layout='bhld' is assumed, but the code means 'blhd'; if it is to mean that, "
        "declare it: AttentionSpec(..., layout='blhd')"
    )


def test_a_window_that_is_read_as_one_number_is_told_that_it_is_a_pair():
    def windowed(query, key, value, reach=None):
        behind = torch.arange(query.shape[-2])[:, None] - torch.arange(key.shape[-2])
        seen = torch.ones_like(behind) > 0 if reach is None else behind < reach
        return sdpa(query, key, value, attn_mask=seen)

    window = [BY_NAME["plain"], BY_NAME["window"]]
    spec = AttentionSpec(windowed, window="reach", causal=None, dtypes=ONE_DTYPE)
    report = check_attention(spec, checks=window)
    assert failed(report) == ["window"]
    assert "'tuple'" in report.failed[0].message
    assert "; reach was given a pair: how many keys before and after its" in str(report)
    fixed = functools.partial(windowed, reach=4)
    spec = AttentionSpec(fixed, window=(3, None), causal=None, dtypes=ONE_DTYPE)
    assert check_attention(spec, quick=True).passed
    raising = functools.partial(windowed, reach="4")
    report = check_attention(dataclasses.replace(spec, subject=raising), checks=window[:1])
    assert "a pair" not in str(report)


def test_under_a_layout_that_is_known_to_be_wrong_nothing_else_is_diagnosed():
    def turned(query, key, value, attn_mask=None, is_causal=False):
        turned = (t.transpose(1, 2) for t in (query, key, value))
        return sdpa(*turned, attn_mask=attn_mask, is_causal=is_causal).transpose(1, 2)

    report = check_attention(AttentionSpec(turned, dtypes=ONE_DTYPE))
    (said,) = {result.declaration for result in report.failed} - {""}
    assert (report.diagnosis.sentence, report.diagnosis.defects) == (said, ())
    text = str(report)
    assert "no known defect" not in text
    assert len(report.failed) > 10
    telling = {result.name for result in report.failed if result.declaration}
    assert text.count("\nassert") + text.count("(float32, cpu)\n") == len(telling)
    others = [name for name in failed(report) if name not in telling]
    assert text.endswith(f"\n{', '.join(others)}: failed under a wrong layout, which tells nothing")


def test_what_nobody_declared_is_not_called_a_wrong_declaration_of_two_fields_either():
    def aligned_at_the_end(query, key, value, attn_mask=None, is_causal=False):
        scores = query @ key.mT / query.shape[-1] ** 0.5
        length, keys = scores.shape[-2:]
        seen = torch.ones(length, keys, dtype=torch.bool).tril(keys - length)
        scores = scores.masked_fill(~seen, -math.inf) if is_causal else scores
        scores = scores if attn_mask is None else scores.masked_fill(~attn_mask, -math.inf)
        return scores.softmax(-1) @ value

    rectangular = BY_NAME["causal_rectangular"]
    spec = AttentionSpec(aligned_at_the_end, dtypes=ONE_DTYPE)
    report = check_attention(spec, checks=[rectangular])
    assert report.failed[0].declaration == (
        "not declared: causal='top_left' and fully_masked='zero' are assumed, but the code means "
        "'bottom_right' and 'nan'; if it is to mean that, declare it: AttentionSpec(..., "
        "causal='bottom_right', fully_masked='nan')"
    )
    said = dataclasses.replace(spec, causal="bottom_right", fully_masked="nan")
    assert check_attention(said, checks=[rectangular]).passed


def test_a_module_that_is_no_attention_function_is_called_a_block():
    with pytest.raises(ValueError, match=r"AttentionSpec\(module, inputs=\.\.\.\) examines it"):
        AttentionSpec(causal_encoder())
    with pytest.raises(TypeError, match="subject: got the class Linear; accepted is an instance"):
        AttentionSpec(torch.nn.Linear)


def test_a_parameter_that_sounds_like_a_mask_or_causality_gets_a_hint():
    def own(query, key, value, mask, causal=False, causal_mask=None):
        return sdpa(query, key, value, mask, is_causal=causal)

    masks = (
        "it takes mask=, and the specification does not say what that means: AttentionSpec(..., "
        "mask_argument='mask', mask='keep') (or 'drop', 'additive')"
    )
    causality = (
        "it takes causal=, and the specification does not say what that means: AttentionSpec(..., "
        "causal_argument='causal', causal='top_left') (or 'bottom_right')"
    )
    report = check_attention(AttentionSpec(own, dtypes=ONE_DTYPE), quick=True)
    needed = "it needs mask besides query, key and value: a function around it that takes these "
    first, *hints = str(report).splitlines()[:3]
    assert first.startswith(f"own: nothing was examined: {needed}")
    assert hints == [f"hint: {masks}", f"hint: {causality}"]
    assert {result.status for result in report.results} == {"skipped"}

    def with_defaults(query, key, value, mask=None, causal=False):
        return sdpa(query, key, value, mask, is_causal=causal)

    report = check_attention(AttentionSpec(with_defaults, dtypes=ONE_DTYPE), quick=True)
    by_name = {result.name: result.message for result in report.results}
    assert (by_name["masked"], by_name["causal"]) == (masks, causality)

    # That it takes anything does not make it take a mask under another name.
    def with_others(query, key, value, mask=None, **others):
        return sdpa(query, key, value, mask)

    assert AttentionSpec(with_others).mask is None
    assert AttentionSpec(with_others, mask_argument="mask").mask == "keep"
    # Declared, it is called without a mask as with None.
    spec = AttentionSpec(own, mask_argument="mask", causal_argument="causal", dtypes=ONE_DTYPE)
    report = check_attention(spec, quick=True)
    assert report.passed, str(report)
    assert "hint" not in str(report)
    assert "hint" not in str(check_attention(AttentionSpec(sdpa, causal=None), quick=True))


def test_a_module_takes_what_its_forward_takes():
    class Own(torch.nn.Module):
        def forward(self, query, key, value, attn_mask=None):
            return sdpa(query, key, value, attn_mask)

    report = check_attention(AttentionSpec(Own(), dtypes=ONE_DTYPE))
    assert failed(report) == ["repeats"]
    assert "Own is in training mode, in which no output is promised" in report.failed[0].message
    assert statuses(report, "masked") == {"passed"}
    assert statuses(report, "causal") == {"skipped"}


def test_causality_that_nobody_takes_is_a_wrong_declaration():
    def own(query, key, value, attn_mask=None, **others):
        return sdpa(query, key, value, attn_mask)

    spec = AttentionSpec(own, grouped=False, dropout=False, dtypes=ONE_DTYPE)
    report = check_attention(spec, checks=[BY_NAME["causal"]])
    wrong = (
        "not declared: causal='top_left' is assumed, but is_causal=True changes nothing, and no "
    )
    assert report.failed[0].declaration.startswith(wrong)


def test_a_block_that_is_declared_causal_and_is_not_is_a_wrong_declaration():
    model = of_transformers("bert", "sdpa")
    report = check_attention(AttentionSpec(model, inputs=tokens(2, 9)), quick=True)
    wrong = "not declared: causal='top_left' is assumed, but the code means None: each output "
    assert [r.name for r in report.failed] == ["no_leakage", "decoding", "attention_inside"]
    assert all(result.declaration.startswith(wrong) for result in report.failed)
    model = of_transformers("gpt2", "sdpa")
    report = check_attention(AttentionSpec(model, inputs=tokens(2, 9), causal=None), quick=True)
    wrong = "wrong declaration: causal=None is declared, but the code means 'top_left': no output "
    assert report.failed[0].declaration.startswith(wrong)


def test_a_block_is_not_asked_of_padding_that_nobody_explained_and_says_so():
    report = check_attention(AttentionSpec(causal_encoder(), inputs=tokens(2, 9)), quick=True)
    message = next(r.message for r in report.results if r.name == "padding")
    assert message == (
        "it takes padding=, and nothing says what that means: SequenceModel(module, mask=..., "
        "mask_argument='padding')"
    )


def test_a_module_in_training_mode_is_to_be_set_to_evaluation():
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True)
    report = check_attention(AttentionSpec(layer, inputs=randn(2, 9, WIDTH), causal=None))
    assert set(failed(report)) == {"no_leakage", "padding", "batch", "layout", "repeats"}
    advice = "is promised to repeat itself: call .eval() on it before it is examined"
    for result in report.failed:
        assert result.message.endswith(advice)
        assert "dropout=" not in result.message

    def always_dropping(query, key, value):
        return torch.nn.functional.dropout(sdpa(query, key, value))

    report = check_attention(AttentionSpec(always_dropping, dtypes=ONE_DTYPE), quick=True)
    assert "it gives another output at each call" in report.failed[0].message


def test_a_diagnosis_of_what_its_cases_do_not_show_is_not_that_of_a_report_that_failed():
    def wrong_with_many_keys(query, key, value):
        output = sdpa(query, key, value)
        return output * 1.5 if key.shape[-2] > 1000 else output

    spec = AttentionSpec(wrong_with_many_keys, dtypes=ONE_DTYPE)
    report = check_attention(spec, checks=[BY_NAME[name] for name in ("plain", "block_lengths")])
    assert failed(report) == ["block_lengths"]
    assert report.diagnosis is None
    assert report.as_dict()["diagnosis"] is None
    assert "is attention as declared" not in str(report)
    said = diagnose(spec).sentence
    assert re.search(r" is attention as declared in the \d+ cases that were asked; residual", said)


class Masked(torch.nn.Module):
    """Takes a mask, and leaves it aside."""

    def forward(self, masked_tokens, attention_mask=None):
        return masked_tokens * 2


def test_a_parameter_of_a_block_that_sounds_like_a_mask_gets_a_hint():
    hint = (
        "it takes attention_mask=, and nothing says what that means: SequenceModel(module, "
        "mask=..., mask_argument='attention_mask')"
    )
    block = Masked().eval()
    told = {"inputs": randn(2, 5, WIDTH), "causal": None}
    for subject in (block, SequenceModel(block)):
        report = check_attention(AttentionSpec(subject, **told), quick=True)
        assert report.as_dict()["hints"] == [hint]
        assert f"hint: {hint}" in str(report).splitlines()
        reasons = {result.name: result.message for result in report.results}
        assert reasons["padding"] == hint


def test_a_block_whose_mask_is_declared_gets_no_hint():
    block, told = Masked().eval(), {"inputs": randn(2, 5, WIDTH), "causal": None}
    model = SequenceModel(block, mask="keep", mask_argument="attention_mask")
    declared = [
        AttentionSpec(model, **told),
        AttentionSpec(block, mask_argument="attention_mask", **told),
        AttentionSpec(block, mask=None, **told),
        AttentionSpec(block, arguments={"attention_mask": None}, **told),
    ]
    assert [hints_of(spec) for spec in declared] == [()] * len(declared)


def test_a_subject_that_raises_whatever_it_is_asked_is_still_reported():
    class Broken(torch.nn.Module):
        def forward(self, hidden):
            raise KeyError("no such layer")

    report = check_attention(AttentionSpec(Broken().eval(), inputs=randn(2, 9, WIDTH)))
    assert report.diagnosis is None
    assert "it raised KeyError: 'no such layer'" in str(report)

    def refusing_causality(query, key, value, **others):
        if "is_causal" in others:
            raise KeyError("is_causal")
        return sdpa(query, key, value)

    report = check_attention(AttentionSpec(refusing_causality, mask=None, dtypes=ONE_DTYPE))
    assert "it raised KeyError: 'is_causal'" in str(report)


def test_what_a_subject_raises_is_told_with_its_place():
    def raising(query, key, value):
        return query.view(1, 2, 3)

    report = check_attention(AttentionSpec(raising, dtypes=ONE_DTYPE), quick=True)
    line = raising.__code__.co_firstlineno + 1
    assert f"(test_contract_report.py:{line})" in report.failed[0].message


def test_a_mix_of_dtypes_is_no_refusal():
    def mixing(query, key, value, attn_mask=None, is_causal=False):
        if attn_mask is not None and is_causal:
            return query @ key.mT.double() @ value
        return sdpa(query, key, value, attn_mask, is_causal=is_causal)

    report = check_attention(AttentionSpec(mixing, dtypes=ONE_DTYPE), quick=True)
    assert failed(report) == ["masked_and_causal"]


@pytest.mark.parametrize("field", ["mask_argument", "causal_argument", *KEYWORDS])
def test_a_keyword_that_the_subject_does_not_have_is_refused(field):
    def own(query, key, value, hidden=None):
        return sdpa(query, key, value)

    with pytest.raises(
        ValueError, match=f"{field}: got 'nope'; accepted is a parameter of the subject: q"
    ):
        AttentionSpec(own, **{field: "nope"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one here")
def test_a_declared_device_that_is_absent_is_skipped_with_the_reason():
    report = check_attention(AttentionSpec(sdpa, devices=("cuda",)), quick=True)
    assert {result.status for result in report.results} == {"skipped"}
    assert not report.passed
    (reason,) = {result.message for result in report.results}
    assert reason.startswith("attention device 'cuda' is absent (present: cpu")


def test_wrong_arguments_of_the_examination_are_refused_with_what_is_accepted():
    with pytest.raises(ValueError, match=r"^checks: got \[\]; accepted is one or more checks"):
        check_attention(sdpa, checks=[])
    with pytest.raises(TypeError, match=r"^specs: got AttentionSpec; accepted is a list of one"):
        parametrize_with_checks(AttentionSpec(sdpa))
    with pytest.raises(TypeError, match=r"^expected_failures: got list; accepted is reasons by"):
        parametrize_with_checks([sdpa], expected_failures=["dropout"])


def test_a_module_of_torch_that_is_declared_without_inputs_gets_a_hint():
    module = torch.nn.MultiheadAttention(8, 2, batch_first=True).eval()
    report = check_attention(AttentionSpec(module, dtypes=("float32",)), quick=True)
    hint = (
        "MultiheadAttention is a block: hand it to check_attention itself, or give inputs= as well"
    )
    assert hint in str(report)


@pytest.mark.parametrize(
    ("levels", "said"),
    [
        ({"sizes": (5, 7), "causal": True, "gradients": "none"},
         "it is declared to take as many keys as queries alone: not 5 queries and 7 keys"),
        ({"unused": "ordinary"},
         "what is declared leaves out ordinary numbers in unused slots of a cache"),
        ({"causal": True, "scale": -0.4},
         "what is declared leaves out calls with causality, with scale -0.4"),
    ],
)  # fmt: skip
def test_what_is_left_out_is_said_in_the_words_of_a_user(levels, said):
    spec = AttentionSpec(sdpa, square=True)
    examination = Examination(spec, torch.float32, torch.device("cpu"))
    with pytest.raises(Skipped, match=re.escape(said)):
        examination.choice(**levels)
