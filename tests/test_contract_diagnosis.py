"""What `diagnose` says of correct, wrong and strange attention.

The wrong ones are planted in `wrong_attention`, which knows nothing of the code under test.
"""

import functools
import json
import math
import random
import re
from dataclasses import fields

import attention_subjects as subjects
import pytest
import torch
from attention_subjects import randn
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.attention import SDPBackend, sdpa_kernel
from wrong_attention import FACTOR, PLANTED, RATE, TEMPERATURE, attention_with, declared_for

from pytest_attnheat.attention.defects import DEFECTS
from pytest_attnheat.attention.plan import Case, NotApplicable, Plan, carry_out
from pytest_attnheat.attention.reference import attend
from pytest_attnheat.contract.diagnosing import _answers, diagnose
from pytest_attnheat.contract.diagnosis import Diagnosis
from pytest_attnheat.contract.examination import Examination
from pytest_attnheat.contract.observing import observed
from pytest_attnheat.contract.probing import inferred_weights
from pytest_attnheat.contract.spec import AttentionSpec

NAMES = [defect.name for defect in PLANTED]
# What is no defect, what float16 alone shows, and what reads masks without numbers upside down.
UNSEEN = {"masked_nan_felt", "products_overflow", "bias_as_keep"}
# Those that are declared alike one after the other: they share what plans give on their cases.
ALL = sorted((name for name in NAMES if name not in UNSEEN), key=lambda n: [*declared_for(n)])
# What is declared has one set of tensors for all specimens, so that they share their cases.
SHARED = {"sinks": declared_for("sinks_ignored")["sinks"],
          "alibi": functools.cache(declared_for("alibi_ignored")["alibi"])}  # fmt: skip
# Two of them at once: not those that need another declaration, or call for another method.
IN_PAIRS = [
    defect.name
    for defect in PLANTED
    if defect.seen not in ("garbage", "randomness")
    and not declared_for(defect.name)
    and defect.name not in UNSEEN
    and defect.name != "scale_argument_ignored"
    and not defect.name.startswith(("bias", "documents", "lengths"))
]
# Where a row that sees its sink alone is the only one with an empty part of its keys.
OVER_QUERIES = "attention whose softmax runs over the queries (dim=-2)"

# Declared of a subject whose masks a test does not ask about: fewer cases take less time.
PLAIN = {"mask": None, "causal": None}
# Defects that have cases of their own, and words in the names of those that only masks show.
OWN_CASES = ("bias", "documents", "lengths", "keys_as", "queries_as")
WITH_MASKS = ("mask", "prefix", "causal", "boolean", "keep", "outside")


def with_keyword(subject, name):
    """The same with one keyword more; it is told of documents by those of the keys alone."""

    def attention(query, key, value, attn_mask=None, is_causal=False, scale=None, **given):
        given = {n: (t, t) if n == "documents" else t for n, t in given.items() if t is not None}
        return subject(query, key, value, attn_mask, is_causal, scale=scale, **given)

    return attention


def with_bias_as_mask(subject):
    """The same, whose mask is what it is elsewhere told as a bias."""

    def attention(query, key, value, attn_mask=None, is_causal=False, scale=None):
        given = {} if attn_mask is None else {"bias": attn_mask}
        return subject(query, key, value, None, is_causal, scale=scale, **given)

    return attention


def specimen(*names, dtypes=("float64",), **declared):
    """A subject with planted defects, and what is declared about it."""
    needed = declared_for(*names)
    needed |= {name: SHARED[name] for name in needed if name in SHARED}
    subject = attention_with(*names, **needed)
    given = [one for one in ("bias", "documents", "lengths") if any(one in name for name in names)]
    if any(name.startswith("bias_as") for name in names):  # told by numbers beside -inf
        subject, needed["mask"] = with_bias_as_mask(subject.with_more), "additive"
    elif given and "softcap_after_bias" not in names:
        subject = with_keyword(subject.with_more, given[0])
        needed[given[0]] = given[0]
    return AttentionSpec(subject, name="mine", grouped=True, dtypes=dtypes, **needed, **declared)


@functools.cache
def diagnosed(*names):
    """What is said of planted defects, once for the tests that ask about it alone.

    What needs cases of its own, and shows without a mask, is asked without one: each new set of
    cases takes seconds.
    """
    own = declared_for(*names) or any(name.startswith(OWN_CASES) for name in names)
    shown = not any(word in name for name in names for word in WITH_MASKS)
    return diagnose(specimen(*names, **(PLAIN if own and shown else {})))


@functools.cache
def large(name, block):
    """What is said of a defect of large blocks."""
    subject = attention_with(name, block=block, short_kept=True)
    return diagnose(AttentionSpec(subject, dtypes=("float32",)))


def noisy_head(query, key, value, attn_mask=None, is_causal=False):
    output = subjects.plain(query, key, value, attn_mask, is_causal=is_causal)
    if output.shape[1] > 1:
        output[:, 1] += 0.1 * randn(*output[:, 1].shape, dtype=output.dtype)
    return output


# --- the catalogue


def test_names_are_unique_and_every_defect_is_one_sentence():
    assert len({defect.name for defect in DEFECTS}) == len(DEFECTS)
    for defect in DEFECTS:
        assert defect.sentence.split()[0] in ("whose", "that", "with", "without"), defect
        assert not defect.sentence.endswith((".", "?"))


def test_every_change_gives_another_plan():
    plans = [change(Plan()) for defect in DEFECTS for change in defect.changes]
    assert len(set(plans)) == len(plans)
    assert Plan() not in plans


@pytest.mark.matrix
@pytest.mark.parametrize("name", ALL)
def test_a_planted_defect_is_named(name):
    found = diagnosed(name)
    assert not found.healthy
    assert found.defects == (name,)
    assert found.alternatives == ()
    assert name not in found.excluded


@pytest.mark.matrix(of=3)
@pytest.mark.parametrize(
    "name", [name for name in IN_PAIRS if not name.startswith(OWN_CASES)][::10]
)
def test_a_planted_defect_is_named_in_float32(name):
    found = diagnose(specimen(name, dtypes=("float32",)), seed=1)
    assert (found.defects, found.alternatives) == ((name,), ())


@pytest.mark.parametrize("block", [16, 32, 64])
@pytest.mark.parametrize(
    "name",
    [
        "last_block_of_keys_ignored",
        "last_block_of_queries_zero",
        "online_output_not_rescaled",
        "online_sum_not_rescaled",
        "online_never_rescaled",
    ],
)
def test_what_large_blocks_do_wrong_is_named(name, block):
    found = large(name, block)
    assert (found.defects, found.alternatives) == ((name,), ())
    assert found.where["wrong"].endswith(("rows in long", "rows in long, causal, long"))
    assert len(found.where.get("queries", "")) < 60
    words = "all of the wrong cases are with long inputs, and none of the right ones"
    assert found.where.get("pattern", words) == words  # of one case it says nothing


@pytest.mark.matrix
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    "name", ["softmax_over_queries", "scale_missing", "mask_inverted", "groups_tiled"]
)
def test_a_large_defect_is_named_in_half_precision(name, dtype):
    found = diagnose(specimen(name, dtypes=(dtype,), causal=None))
    assert (found.defects, found.alternatives) == ((name,), ())


def test_nan_in_masked_keys_is_noted_and_no_defect():
    found = diagnose(specimen("masked_nan_felt"))
    assert found.healthy
    assert found.notes == ("masked_nan_felt: it feels NaN in a masked key (0 * NaN is NaN)",)
    assert diagnosed().notes == ()


def test_two_names_of_one_thing_are_both_given():
    # Without a key on the right a window is causal.
    window = (3, 1)
    spec = AttentionSpec(
        attention_with("window_right_too_narrow", window=window), window=window, name="mine",
        mask=None,
    )  # fmt: skip
    found = diagnose(spec)
    assert found.defects == ("window_right_too_narrow",)
    assert found.alternatives == (("causal_always",),)
    assert "which these cases cannot tell apart" in found.sentence


@pytest.mark.parametrize(
    ("name", "constant"),
    [
        ("temperature", TEMPERATURE),
        ("output_factor", FACTOR),
        ("dropout_in_eval", RATE),
        ("dropout_not_rescaled", 0.0),
    ],
)
def test_a_constant_is_found(name, constant):
    assert diagnosed(name).constant == pytest.approx(constant, abs=1e-6)


# --- pairs


@pytest.mark.matrix
def test_most_pairs_are_named_and_none_with_certainty_that_is_wrong():
    choice = random.Random(5)
    # Two of those that benchmarks/defect_pairs.py takes.
    pairs = [tuple(choice.sample(IN_PAIRS, 2)) for _ in range(2)]
    named, wrong = [], []
    for pair in pairs:
        found = diagnose(specimen(*pair))
        explanations = [set(names) for names in (found.defects, *found.alternatives)]
        # One of two may hide the other: what is then computed has one defect.
        if any(names and names <= set(pair) for names in explanations):
            named.append(pair)
        elif found.defects:
            wrong.append((pair, found.defects))
    assert not wrong
    assert named


@pytest.mark.parametrize(
    ("other", "declared"),
    [("no_maximum_subtracted", PLAIN), ("mask_after_softmax_renormalised", {"causal": None})],
)
def test_numbers_beyond_the_range_of_the_dtype_are_those_of_the_subject(other, declared):
    # Smaller scores, so that exp overflows or vanishes in float32 alone.
    found = diagnose(specimen(other, "scale_from_embedding", dtypes=("float32",), **declared))
    assert set(found.defects) == {other, "scale_from_embedding"}


def test_no_constant_is_fitted_to_what_a_coarse_step_leaves():
    names = ("scores_in_float16", "heads_split_without_transpose")
    found = diagnose(specimen(*names, dtypes=("float32",), **PLAIN))
    assert set(found.defects) == set(names)
    assert found.constant is None


def test_a_defect_besides_a_constant_is_named():
    found = diagnose(specimen("causal_misses_own", "temperature", mask=None))
    assert set(found.defects) == {"causal_misses_own", "temperature"}
    assert found.constant == pytest.approx(TEMPERATURE)
    assert "scores are 1.37 times what they should be" in found.sentence


@pytest.mark.parametrize(
    ("names", "declared"), [(("groups_tiled", "causal_misses_own", "temperature"), {"mask": None})]
)
def test_three_defects_at_once_are_named(names, declared):
    found = diagnose(specimen(*names, **declared))
    assert set(found.defects) == set(names)
    assert found.residual < 1e-12


@pytest.mark.parametrize(
    ("name", "dropout"),
    [("mask_ignored", "dropout_in_eval"), ("softmax_over_queries", "dropout_not_rescaled")],
)
def test_a_defect_beside_dropout_is_named(name, dropout):
    found = diagnose(specimen(name, dropout, causal=None))
    assert found.defects == (dropout, name)
    assert found.residual < 1e-12
    assert found.constant == pytest.approx(RATE if dropout == "dropout_in_eval" else 0.0)


def test_dropout_beside_another_factor_is_not_named():
    # How much is dropped is known to a hundredth only, and so is what is left of the factor.
    assert diagnose(specimen("dropout_in_eval", "output_factor", **PLAIN)).defects == ()


# --- no false alarm


def shifted(query, key, value, attn_mask=None, is_causal=False, *, scale=None):
    """A constant added to each row of scores, as in ALiBi, and the query scaled."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query * scale) @ key.mT + 1.0 + torch.arange(query.shape[-2])[:, None]
    if is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, -math.inf)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
        scores = scores.masked_fill(~attn_mask.any(-1, keepdim=True), 0.0)
    powers = (scores - scores.amax(-1, keepdim=True)).exp()
    weights = powers / powers.sum(-1, keepdim=True)
    if attn_mask is not None:
        weights = weights * attn_mask
    return weights @ value


def repeated(query, key, value, attn_mask=None, is_causal=False, enable_gqa=False):
    """Grouped keys repeated explicitly."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask, is_causal=is_causal)


def math_backend(*arguments, **options):
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*arguments, **options)


@pytest.mark.parametrize(
    "subject",
    [F.scaled_dot_product_attention, math_backend, subjects.plain, repeated, attention_with()],
)
def test_correct_attention_is_healthy_in_every_dtype(subject):
    spec = AttentionSpec(subject, causal=None if subject is math_backend else "top_left")
    found = diagnose(spec, seed=3)
    assert found.healthy, str(found)
    assert found.defects == ()
    assert found.dtype == "float32, float64, float16, bfloat16"


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_an_equivalent_rewrite_is_healthy(dtype):
    # Its float16 scores are near 60 and rounded: that is a matter of precision.
    found = diagnose(AttentionSpec(shifted, dtypes=(dtype,)))
    assert found.healthy, str(found)


def test_flex_attention_is_healthy():
    # It is traced again for each shape and mask: fewer of them take less time.
    spec = AttentionSpec(
        subjects.flex, dtypes=("float32",), causal=None, grouped=False, few_shapes=True
    )
    found = diagnose(spec)
    assert found.healthy, str(found)


@pytest.mark.parametrize(
    ("planted", "declared"),
    [
        ({"bottom_right": True}, {"causal": "bottom_right"}),
        ({"window": (2, 0)}, {"window": (2, 0)}),
        ({"window": (1, 3), "bottom_right": True}, {"window": (1, 3), "causal": "bottom_right"}),
        ({"fully_masked": "nan"}, {"fully_masked": "nan"}),
        ({"fully_masked": "uniform"}, {"fully_masked": "uniform"}),
        ({"fully_masked": "nan"}, {"fully_masked": "undefined"}),
    ],
)
def test_what_is_declared_is_healthy(planted, declared):
    found = diagnose(AttentionSpec(attention_with(**planted), dtypes=("float64",), **declared))
    assert found.healthy, str(found)


def test_the_layout_and_the_mask_are_as_declared():
    def inner(query, key, value, hidden=None):
        turned = (tensor.transpose(1, 2) for tensor in (query, key, value))
        keep = None if hidden is None else ~hidden
        return subjects.plain(*turned, keep).transpose(1, 2)

    spec = AttentionSpec(inner, layout="blhd", mask="drop", mask_argument="hidden", causal=None)
    assert diagnose(spec).healthy
    wrong = AttentionSpec(inner, layout="blhd", mask="keep", mask_argument="hidden", causal=None)
    assert diagnose(wrong).defects == ("mask_inverted",)


def test_attention_without_heads_is_diagnosed():
    def flat(query, key, value):
        return (query @ key.mT).softmax(-1) @ value

    spec = AttentionSpec(flat, layout="bld", mask=None, causal=None)
    assert diagnose(spec).defects == ("scale_missing",)


# --- what a subject refuses


def test_a_subject_that_takes_squares_only_is_diagnosed():
    def square(query, key, value, attn_mask=None, is_causal=False):
        assert query.shape == key.shape == value.shape, "one shape please"
        return attention_with("mask_transposed")(query, key, value, attn_mask, is_causal)

    found = diagnose(square)
    assert found.defects == ("mask_transposed",)
    assert found.refused == {}  # what it does not take is not asked


def test_a_subject_that_refuses_everything_is_an_error_that_quotes_it():
    def refuses(query, key, value):
        raise RuntimeError("not today")

    with pytest.raises(ValueError, match=r"refuses answered no case .*RuntimeError: not today"):
        diagnose(refuses)


def test_a_dtype_that_is_refused_is_left_out():
    def single(query, key, value, attn_mask=None, is_causal=False):
        if query.dtype != torch.float32:
            raise TypeError("float32 only")
        return subjects.plain(query, key, value, attn_mask, is_causal=is_causal)

    found = diagnose(single)
    assert found.healthy
    assert found.dtype == "float32"
    assert found.refused["float64"] == "TypeError: float32 only"


def test_what_is_wrong_in_one_dtype_alone_is_diagnosed_there():
    def careless(query, key, value, attn_mask=None, is_causal=False):
        name = () if query.dtype == torch.float32 else ("scale_missing",)
        return attention_with(*name)(query, key, value, attn_mask, is_causal)

    found = diagnose(AttentionSpec(careless, **PLAIN))
    assert (found.dtype, found.defects) == ("float64", ("scale_missing",))
    assert "correct in float32" in found.notes


def test_the_subject_and_the_generator_are_left_alone():
    threads = torch.get_num_threads()
    state = torch.get_rng_state()
    diagnose(specimen("dropout_in_eval", **PLAIN))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_a_subject_that_writes_into_its_inputs_does_not_spoil_the_comparison():
    def writes(query, key, value, attn_mask=None, is_causal=False):
        output = attention_with("scale_missing")(query, key, value, attn_mask, is_causal)
        query.zero_()
        key.zero_()
        return output

    assert diagnose(AttentionSpec(writes, **PLAIN)).defects == ("scale_missing",)


@pytest.mark.parametrize(
    ("arguments", "error"), [(("attention",), TypeError), ((subjects.plain, "0"), TypeError)]
)
def test_misuse_is_refused(arguments, error):
    subject, *seed = arguments
    with pytest.raises(error):
        diagnose(subject, **({"seed": seed[0]} if seed else {}))


def test_products_that_overflow_are_named_in_float16():
    def attention(query, key, value):
        wide = torch.promote_types(query.dtype, torch.float32)
        narrow = (
            query @ key.mT if query.dtype == torch.float16 else query.to(wide) @ key.to(wide).mT
        )
        weights = (narrow.to(wide) * query.shape[-1] ** -0.5).softmax(-1)
        return (weights @ value.to(wide)).to(value.dtype)

    found = diagnose(AttentionSpec(attention, dtypes=("float32", "float16"), **PLAIN))
    assert found.defects == ("products_overflow",)


def test_a_defect_in_some_calls_alone_is_named_with_that_condition():
    wrong = attention_with("keys_as_values")

    def attention(query, key, value, attn_mask=None, is_causal=False):
        answers = wrong if query.shape[-1] == value.shape[-1] and is_causal else subjects.plain
        return answers(query, key, value, attn_mask, is_causal=is_causal)

    found = diagnose(AttentionSpec(attention, dtypes=("float64",)))
    assert found.defects == ("keys_as_values",)
    assert (
        ", in each case in which it is wrong, equals attention that uses its keys" in found.sentence
    )


def test_a_mask_of_which_no_defect_knows_is_told_by_the_keys_that_are_seen():
    def attention(query, key, value):
        steps = torch.arange(key.shape[2])
        hidden = (steps % 3 == 2) & (steps > 2)
        scores = (query @ key.mT * query.shape[-1] ** -0.5).masked_fill(hidden, -torch.inf)
        return scores.softmax(-1) @ value

    found = diagnose(AttentionSpec(attention, dtypes=("float64",), **PLAIN))
    said, first, *_ = found.shows
    assert said == "its weights are right but for the mask"
    assert first == "in plain, head [0, 0], query 0 sees keys 0..4, 6, and may see keys 0..6"


# --- when nothing fits


def test_an_unknown_defect_is_not_named_but_placed():
    found = diagnose(AttentionSpec(noisy_head, dtypes=("float64",), **PLAIN))
    assert not found.healthy
    assert found.defects == ()
    assert "no known defect gives its output, nor any pair of them that was tried" in found.sentence
    assert found.where["heads"] == "only head 1 of 4"
    assert "softmax_over_queries" in found.excluded
    assert 0.01 < found.residual < 1.0


def test_rows_and_batch_entries_are_placed():
    def last_row(query, key, value, attn_mask=None, is_causal=False):
        output = subjects.plain(query, key, value, attn_mask, is_causal=is_causal)
        output[0, :, -1] += 1.0
        return output

    found = diagnose(AttentionSpec(last_row, dtypes=("float64",), **PLAIN))
    assert found.defects == ()
    assert found.where["queries"] == "only query 4 of 5 in plain"
    assert found.where["batch"].startswith("only batch entry 0 of")


def of_scores(change):
    """Attention whose scores are changed before the softmax."""

    def attention(query, key, value):
        return change(query @ key.mT / query.shape[-1] ** 0.5).softmax(-1) @ value

    return attention


def test_rows_of_a_single_weight_are_in_no_order_of_scores():
    def attention(query, key, value):
        chosen = (query @ key.mT).roll(1, -1).argmax(-1)
        return torch.nn.functional.one_hot(chosen, key.shape[-2]).to(value.dtype) @ value

    found = diagnose(AttentionSpec(attention, dtypes=("float64",), **PLAIN))
    assert not found.healthy
    assert "in the order of the scores" not in str(found)


def far(scores):
    return (torch.arange(scores.shape[-2])[:, None] - torch.arange(scores.shape[-1])).abs()


def with_sinks(query, key, value):
    scores = query @ key.mT / query.shape[-1] ** 0.5
    sinks = torch.linspace(-1, 1, scores.shape[1])[:, None, None].expand_as(scores[..., :1])
    return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1] @ value


def by_head(tensor):
    return torch.arange(tensor.shape[1])[:, None, None]


@pytest.mark.parametrize(
    ("subject", "words"),
    [
        (of_scores(lambda s: 3 * torch.tanh(s / 3)), "scores that saturate: 3 * tanh(score / 3)"),
        (of_scores(torch.atan), "in the order of the scores, but not as exp of them"),
        (of_scores(lambda s: s - 0.25 * far(s)), "lose 0.25 with each position between query"),
        (
            of_scores(lambda s: s + torch.sin(far(s) ** 2)),
            "same in all samples: a bias by position",
        ),
        (with_sinks, "less than 1, as if a sink of -1, 0, 1 (by head) joined the sum"),
        (lambda q, k, v: subjects.plain(q, k, v) + 0.5, "is 1 times the right one, and 0.5"),
        (
            lambda q, k, v: subjects.plain(q, k, v).roll(1, 1),
            "the place of others: of another head",
        ),
        (
            lambda q, k, v: (
                subjects.plain(q, k, v)[:, [0, 1, 1]]
                if q.shape[1] == 3
                else subjects.plain(q, k, v)
            ),
            "some twice: head 2 that of head 1",
        ),
        (
            lambda q, k, v: subjects.plain(q, k, v) * torch.arange(1.0, q.shape[2] + 1)[:, None],
            "right but for a factor of each query, 1 to ",
        ),
        (lambda q, k, v: subjects.plain(q, k, v).tanh(), "is no weighted sum of the values"),
        (lambda q, k, v: subjects.plain(q, k, v) * (by_head(k) != 1), "0 in head 1 of 3, and"),
        (lambda q, k, v: subjects.plain(q, k, v) * (1 + by_head(k)), "outputs are 1, 2, 3; 1, 2,"),
        (of_scores(lambda s: s * (1 + by_head(s) / 5)), "scores are 1, 1.2, 1.4; 1, 1.2, 1.4 (by"),
        (
            lambda q, k, v: subjects.plain(q, k.roll(1, 1), v),
            "head 0 reads key head 2 and the values of 0, not 0; head 1 reads key head 0 and",
        ),
    ],
)
def test_what_no_defect_explains_is_told_by_its_numbers(subject, words):
    spec = AttentionSpec(subject, **PLAIN)
    probes, _ = _answers(Examination(spec, torch.float32, torch.device("cpu")))
    (said,) = observed(functools.partial(inferred_weights, spec), probes)
    assert words in said


def test_the_slope_of_one_head_is_told_beside_the_one_declared():
    def slopes(heads):
        return 2.0 ** -torch.arange(1.0, heads + 1)

    def attention(query, key, value):
        steep = torch.where(by_head(query) == 1, 1.5, 1.0)
        scores = query @ key.mT / query.shape[-1] ** 0.5
        distant = slopes(query.shape[1])[:, None, None] * steep * far(scores)
        return (scores - distant).softmax(-1) @ value

    found = diagnose(AttentionSpec(attention, alibi=slopes, dtypes=("float32",), **PLAIN))
    assert found.defects == ()
    assert found.shows == (
        "its ALiBi slopes are 0.5, 0.375, 0.125, not 0.5, 0.25, 0.125 (by head)",
    )


def test_what_is_wrong_in_one_head_alone_is_no_step_in_a_coarse_dtype():
    def attention(query, key, value):
        output = subjects.plain(query, key, value)
        nearly = output * (1 + 1e-3 * torch.sin(1e3 * output))
        return torch.where(by_head(query) == 1, nearly, output)

    found = diagnose(AttentionSpec(attention, dtypes=("float32",), **PLAIN))
    assert found.where["heads"] == "only head 1 of 4"
    assert "coarse" not in found.sentence
    assert "leave float32 out" not in found.sentence


def test_one_scale_for_all_widths_is_told_as_such():
    def attention(query, key, value):
        return (query @ key.mT * 0.05).softmax(-1) @ value

    found = diagnose(AttentionSpec(attention, dtypes=("float32",), **PLAIN))
    assert found.defects == ("scale_missing", "temperature")
    assert "equals attention whose scores are multiplied by 0.05, whatever head_dim is" in str(
        found
    )
    assert found.alternatives == ()


@pytest.mark.parametrize("name", ["window_ignored", "window_left_too_narrow"])
def test_what_is_wrong_in_decoding_alone_is_named(name):
    right, wrong = (attention_with(*has, window=(4, 0), bottom_right=True) for has in ((), (name,)))

    def attention(query, key, value):
        return (wrong if query.shape[2] == 1 else right)(query, key, value)

    found = diagnose(
        AttentionSpec(attention, window=(4, 0), causal="bottom_right", dtypes=("float32",))
    )
    assert found.defects == (name,)
    assert found.where["wrong"].endswith("rows in one query")


def test_numbers_that_show_nothing_are_told_nothing_of():
    restless = of_scores(lambda s: s + 0.3 * torch.sin(40 * s))
    spec = AttentionSpec(restless, **PLAIN)
    for one in (spec, AttentionSpec(subjects.plain, **PLAIN)):
        probes, _ = _answers(Examination(one, torch.float32, torch.device("cpu")))
        assert observed(functools.partial(inferred_weights, one), probes) == ()


def test_what_the_numbers_show_is_in_the_message():
    found = diagnose(AttentionSpec(with_sinks, dtypes=("float32",), **PLAIN))
    assert found.defects == ()
    assert "  shows " in str(found)
    assert found.as_dict()["shows"] == list(found.shows)


def test_an_error_that_only_masks_show_is_placed():
    found = diagnosed("mask_of_first_sample")
    assert (
        found.where["pattern"]
        == "all of the wrong cases are with a mask, and none of the right ones"
    )
    found = diagnosed("causal_ignored")
    assert found.where["pattern"] == "all of the wrong cases are causal, and none of the right ones"


def test_a_small_error_is_said_to_be_of_the_size_of_a_coarse_step():
    def coarse(query, key, value, attn_mask=None, is_causal=False):
        query, key = query * (1 + 3e-4 * randn(*query.shape, dtype=query.dtype)), key
        return subjects.plain(query, key, value, attn_mask, is_causal=is_causal)

    found = diagnose(AttentionSpec(coarse, dtypes=("float32",), mask=None, causal=None))
    assert found.defects == ()
    assert "as small as if some step were done in" in found.sentence


def test_an_error_hardly_above_rounding_is_not_named():
    def nearly(query, key, value, attn_mask=None, is_causal=False):
        output = subjects.plain(query, key, value, attn_mask, is_causal=is_causal)
        return output * (1 + 3e-5)

    found = diagnose(AttentionSpec(nearly, dtypes=("float32",)))
    assert found.defects == ()
    assert not found.healthy
    assert "too little to tell by what" in found.sentence


def test_randomness_without_a_pattern_is_said_to_be_that():
    def restless(query, key, value, attn_mask=None, is_causal=False):
        output = subjects.plain(query, key, value, attn_mask, is_causal=is_causal)
        return output + torch.randn_like(output)

    found = diagnose(restless)
    assert found.defects == ()
    assert found.sentence == "restless gives another output when called again"


def test_dropout_of_the_output_is_not_taken_for_dropout_of_the_weights():
    def dropped(query, key, value, attn_mask=None, is_causal=False):
        return F.dropout(subjects.plain(query, key, value, attn_mask, is_causal=is_causal), 0.2)

    found = diagnose(dropped)
    assert found.defects == ()
    assert "single numbers of it are 0" in found.sentence


def test_dropout_of_a_module_in_training_is_found():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout = nn.Dropout(0.2)

        def forward(self, query, key, value):
            weights = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
            return self.dropout(weights) @ value

    spec = AttentionSpec(Block(), mask=None, causal=None)
    found = diagnose(spec)
    assert found.defects == ("dropout_in_eval",)
    assert "with dropout (p = 0.2)" in found.sentence
    assert spec.subject.training
    assert diagnose(AttentionSpec(Block().eval(), mask=None, causal=None)).healthy


# --- returned weights


def returning(change, averaged=False):
    """Attention that is right but for the weights it returns."""

    def attention(query, key, value, attn_mask=None, is_causal=False, dropout_p=0.0):
        scores = query @ key.mT / query.shape[-1] ** 0.5
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool)
        mask = mask.tril() if is_causal else mask
        mask = mask if attn_mask is None else mask & attn_mask
        hidden = scores.masked_fill(~mask, -math.inf)
        weights = hidden.softmax(-1).nan_to_num(0.0)
        kept = F.dropout(weights, dropout_p)
        stages = {"scores": scores, "hidden": hidden, "weights": weights, "kept": kept}
        returned = change(stages)
        return kept @ value, returned.mean(1) if averaged else returned

    return attention


RETURNED = {
    "returned_transposed": lambda s: s["weights"].mT,
    "returned_averaged": lambda s: s["weights"].mean(1),
    "returned_before_mask": lambda s: s["scores"].softmax(-1),
    "returned_scores": lambda s: s["hidden"],
    "returned_unnormalised": lambda s: s["hidden"].exp(),
    "returned_of_other_heads": lambda s: torch.cat([s["weights"][:, 1:], s["weights"][:, :1]], 1),
    "returned_of_another_sample": lambda s: torch.cat([s["weights"][-1:], s["weights"][:-1]]),
    "returned_softmax_over_queries": lambda s: s["scores"].softmax(-2),
    "returned_log_softmax": lambda s: s["hidden"].log_softmax(-1),
    "returned_after_dropout": lambda s: s["kept"],
}


@pytest.mark.parametrize("name", RETURNED)
def test_what_is_wrong_with_returned_weights_is_named(name):
    plain = name in ("returned_softmax_over_queries", "returned_log_softmax")
    asked = {"mask": None, "causal": None} if plain else {}
    found = diagnose(
        AttentionSpec(returning(RETURNED[name]), name="mine", returns="weights", **asked)
    )
    assert found.defects == (name,)
    assert found.sentence.startswith("mine gives the output of attention as declared, but returns")
    assert "weights in " in found.where["wrong"]
    with pytest.raises(ValueError, match="its output is right"):
        found.draw()


def test_weights_of_each_head_are_not_averaged_ones():
    spec = AttentionSpec(returning(lambda s: s["weights"]), returns="averaged")
    assert diagnose(spec).defects == ("returned_per_head",)


def test_strange_returned_weights_are_described():
    spec = AttentionSpec(returning(lambda s: s["weights"] * 0.5 + 0.1), returns="weights")
    found = diagnose(spec)
    assert (found.healthy, found.defects) == (False, ())
    assert "weights that did not make it (their shape is (2, 3, 5, 7), their rows sum" in str(found)


@pytest.mark.parametrize("averaged", [True, False])
def test_returned_weights_that_are_right_are_healthy(averaged):
    subject = returning(lambda s: s["weights"], averaged)
    returns = "averaged" if averaged else "weights"
    assert diagnose(AttentionSpec(subject, returns=returns)).healthy
    if not averaged:
        dropped = returning(lambda s: s["kept"])
        assert diagnose(AttentionSpec(dropped, returns="dropped_weights")).healthy


def test_returned_weights_of_a_query_that_may_see_nothing_are_not_judged():
    subject = returning(lambda s: s["hidden"].softmax(-1))
    assert diagnose(AttentionSpec(subject, returns="weights")).healthy


def test_returned_weights_without_heads_are_healthy():
    def flat(query, key, value):
        weights = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)
        return weights @ value, weights

    spec = AttentionSpec(flat, layout="bld", mask=None, causal=None, returns="weights")
    assert diagnose(spec).healthy


# --- messages and pictures


def qkv():
    return randn(2, 3, 5, 6), randn(2, 3, 7, 6, seed=1), randn(2, 3, 7, 4, seed=2)


def test_the_message_says_what_where_and_how_surely():
    found = diagnosed("softmax_over_queries")
    text = str(found)
    assert text.startswith(f"diagnose: mine equals {OVER_QUERIES}; residual ")
    assert ", next best " in text.splitlines()[0]
    assert found.residual < 1e-14
    assert found.next_best > 0.1
    for part in ("wrong", "next best", "compared", "expected", "inferred", "|difference|"):
        assert f"  {part}" in text
    assert max(map(len, text.splitlines()[1:])) < 160


@pytest.mark.parametrize("name", ALL[::7])
def test_the_next_best_is_not_what_is_named(name):
    found = diagnosed(name)
    assert not set(found.defects) <= set(found.next_best_defects)


def test_the_maps_of_the_message_are_cut_where_the_error_is():
    found = large("last_block_of_keys_ignored", 32)
    lines = str(found).splitlines()
    (captions,) = (line for line in lines if "|difference|" in line)
    assert captions.count("keys 117..132") == 3
    heading = lines[lines.index(captions) - 1]
    assert "long, causal, head [0, 0]" in heading
    assert "drawn up to 0." in heading
    rows = [line.split() for line in lines[lines.index(captions) + 1 :][:8]]
    assert {row[2] for row in rows} == {row[5] for row in rows} == {"1.000"}
    assert {block for row in rows for block in row[4][-5:]} == {"▁"}
    assert {block for row in rows for block in row[7][-5:]} > {"▁"}


def test_the_message_of_a_healthy_subject_is_one_line():
    text = str(diagnosed())
    said = r"diagnose: mine is attention as declared in the \d\d cases that were asked; residual "
    assert re.match(said, text)
    assert "\n" not in text


def test_a_diagnosis_is_plain_data_that_json_holds():
    for found in (diagnosed(), diagnosed("softmax_over_queries")):
        data = json.loads(json.dumps(found.as_dict(), allow_nan=False))
        assert data == found.as_dict()
        assert data["version"] == 1
        assert data["defects"] == list(found.defects)
        assert (data["healthy"], data["sentence"]) == (found.healthy, found.sentence)
    assert diagnosed().as_dict()["next_best"] is None  # there is none
    assert set(data) == {f.name for f in fields(Diagnosis)} - {
        "expected_weights",
        "inferred_weights",
    } | {"version"}


def test_its_repr_is_the_beginning_of_its_message():
    found = diagnosed("softmax_over_queries")
    assert repr(found) == "\n".join(str(found).splitlines()[:2])
    assert "  wrong" in repr(found)


def test_a_notebook_shows_it_as_a_table_and_its_weights_as_text():
    found = diagnosed("scale_missing")
    shown = found._repr_html_()
    assert shown.startswith(f"<table><tr><th></th><th>{found.sentence}</th></tr><tr><td>wrong</td>")
    assert "<pre>" in shown
    assert "weights as inferred from the output" in shown


def test_weights_are_inferred_from_the_output_alone():
    found = diagnosed("softmax_over_queries")
    assert torch.allclose(found.inferred_weights.sum(-2), torch.ones(()).double())
    assert torch.allclose(found.expected_weights.sum(-1), torch.ones(()).double())


def test_the_picture_shows_three_maps(tmp_path):
    found = diagnosed("softmax_over_queries")
    found.draw().savefig(tmp_path / "diagnosis.png")
    assert (tmp_path / "diagnosis.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="healthy"):
        diagnosed().draw()


def test_the_picture_of_a_long_case_shows_what_differs_by_little():
    def skipping(query, key, value):
        scores = query @ key.mT / query.shape[-1] ** 0.5
        scores[..., 64:72] -= 99 * (key.shape[-2] > 100)
        return scores.softmax(-1) @ value

    found = diagnose(AttentionSpec(skipping, dtypes=["float32"]))
    assert found.case == "long"
    off = float((found.inferred_weights - found.expected_weights)[found.place].abs().max())
    assert 0.01 < off < 0.3
    assert found.draw().picture.shown.scale.range == pytest.approx((-off, off))


# --- the plan


def test_the_plan_without_a_change_is_attend():
    query, key, value = (tensor.double() for tensor in qkv())
    mask = randn(5, 7, seed=3) > -0.5
    found = carry_out(Plan(), Case(query, key, value, mask=mask))
    expected, expected_weights = attend(query, key, value, mask=mask)
    torch.testing.assert_close(found.output, expected)
    torch.testing.assert_close(found.weights, expected_weights)


def test_a_plan_that_does_not_fit_the_shapes_says_so():
    query, key, value = qkv()
    with pytest.raises(NotApplicable, match="other sizes"):
        carry_out(Plan(value_from="key"), Case(query, key, value))


def test_a_log_sum_exp_is_not_taken_for_weights():
    def attention(query, key, value):
        scores = query @ key.mT / query.shape[-1] ** 0.5
        return scores.softmax(-1) @ value, scores.logsumexp(-1)

    assert diagnose(AttentionSpec(attention, returns="lse", dtypes=("float64",))).healthy


def test_what_has_a_reference_of_its_own_is_not_diagnosed_as_plain_attention():
    spec = AttentionSpec(F.scaled_dot_product_attention, reference=F.scaled_dot_product_attention)
    with pytest.raises(ValueError, match="known defects are those of attention as declared; use c"):
        diagnose(spec)
