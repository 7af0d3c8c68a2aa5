"""Pairs of features: what is asked, what is refused, the smallest call, and asking it again."""

import re
from dataclasses import replace
from itertools import combinations, product

import pytest
import torch
from attention_subjects import plain

from pytest_attnheat import AttentionSpec, Failure, check_attention
from pytest_attnheat.attention.levels import read, shrunk, text_of
from pytest_attnheat.contract.checks import CHECKS
from pytest_attnheat.contract.combinations import ask_pairs
from pytest_attnheat.contract.examination import Examination

PAIRS = [check for check in CHECKS if check.name == "pairs"]


def examined(function, **declared):
    spec = AttentionSpec(function, dtypes=("float32",), few_shapes=True, **declared)
    return Examination(spec, torch.float32, torch.device("cpu"))


def attention(query, key, value, attn_mask=None, is_causal=False, scale=None):
    return plain(query, key, value, attn_mask, is_causal=is_causal, scale=scale)


def both_refused(query, key, value, attn_mask=None, is_causal=False):
    if attn_mask is not None and is_causal:
        raise RuntimeError("a mask or is_causal, not both\nand more that nobody needs")
    return attention(query, key, value, attn_mask, is_causal)


def test_all_pairs_are_asked_and_those_that_are_refused_are_named_once():
    examination = examined(both_refused)
    levels = examination.space.declared.levels()
    can_occur = {
        pair
        for chosen in product(*levels.values())
        if examination.space.declared.possible(one := dict(zip(levels, chosen, strict=True)))
        and not (one["mask"] == "boolean" and one["causal"])
        for pair in combinations(one.items(), 2)
    }
    note, refused = ask_pairs(examination).split("\n")
    assert re.fullmatch(
        f"{len(can_occur):,} pairs of levels in \\d+ calls per dtype, all that can occur together",
        note,
    )
    assert re.fullmatch(
        r"\d+ more calls were refused: mask=boolean causal=True "
        r"\(RuntimeError: a mask or is_causal, not both\)",
        refused,
    )


def test_what_is_refused_by_three_features_at_once_is_no_failure():
    def three(query, key, value, attn_mask=None, is_causal=False, scale=None):
        if attn_mask is not None and is_causal and scale is not None:
            raise NotImplementedError("too much")
        return attention(query, key, value, attn_mask, is_causal, scale)

    assert "causal=True scale=0.7 (NotImplementedError: too much)" in ask_pairs(examined(three))


@pytest.mark.parametrize(
    ("words", "passes"),
    [
        ("attn_mask should not be set when is_causal=True", True),
        ("no numbers came out", False),
        ("The size of tensor a (5) must match that of b (6): attn_mask, is_causal", False),
    ],
)
def test_an_error_about_two_arguments_declines_them_in_some_of_its_ways(words, passes):
    def in_one_way(query, key, value, attn_mask=None, is_causal=False, scale=None):
        if attn_mask is not None and is_causal and scale is not None and len(query) == 1:
            raise RuntimeError(words)
        return attention(query, key, value, attn_mask, is_causal, scale)

    report = check_attention(AttentionSpec(in_one_way, dtypes=("float32",)), checks=PAIRS)
    assert report.passed == passes
    assert words in report.results[0].message


def no_mask_if_causal(query, key, value, attn_mask=None, is_causal=False, scale=None):
    return attention(query, key, value, None if is_causal else attn_mask, is_causal, scale)


def mask_of_the_first(query, key, value, attn_mask=None, is_causal=False, scale=None):
    mask = None if attn_mask is None else attn_mask[:1]
    return attention(query, key, value, mask, is_causal, scale)


def gradient_of_key_doubled(query, key, value, attn_mask=None, is_causal=False, scale=None):
    key = 2 * key - key.detach() if is_causal else key
    return attention(query, key, value, attn_mask, is_causal, scale)


@pytest.mark.parametrize(
    ("function", "smallest", "shared"),
    [
        (no_mask_if_causal, "sizes=2x2 batch=1 key_heads=1 head_dim=8 mask=boolean causal=True",
         "mask=boolean causal=True"),
        (mask_of_the_first, "sizes=1x2 key_heads=1 head_dim=8 mask=boolean",
         "mask=boolean shape=(B,1,L,S)|(B,1,1,S)|(B,H,L,S)"),
        (gradient_of_key_doubled, "sizes=2x2 batch=1 key_heads=1 head_dim=8 causal=True",
         "causal=True"),
    ],
    ids=lambda given: getattr(given, "__name__", ""),
)  # fmt: skip
def test_the_smallest_call_has_the_features_that_it_takes_and_no_others(function, smallest, shared):
    examination = replace(examined(function), spec=AttentionSpec(function, dtypes=("float32",)))
    with pytest.raises(Failure) as failed:
        ask_pairs(examination)
    text = f"{smallest} dtype=float32 seed=0"
    option, python = failed.value.repeat.split("\n")
    assert option == f'--attn-replay="{text}"'
    assert python == f'check_attention(..., replay="{text}")'
    made_smaller = "; this is one of them, made as small as it still is wrong"
    assert re.fullmatch(
        r"\d+ of \d+ calls are wrong, all with .*" + re.escape(shared) + made_smaller,
        failed.value.cases,
    )
    (result,) = check_attention(function, replay=text).results
    assert [result.status, result.failure.worst] == ["failed", failed.value.worst]


def test_the_cause_is_told_by_a_larger_call_than_the_smallest():
    def other_corner(query, key, value, is_causal=False):
        seen = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool)
        seen = seen.tril(key.shape[-2] - query.shape[-2]) if is_causal else seen
        return plain(query, key, value, seen)

    spec = AttentionSpec(other_corner, dtypes=("float32",))
    with pytest.raises(Failure, match='--attn-replay="sizes=1x2 ') as failed:
        ask_pairs(replace(examined(other_corner), spec=spec))
    # One query and two keys may as well be without causality.
    assert failed.value.cause == (
        "the output is that of attention whose causal mask is aligned to the other corner (top "
        "left, bottom right)"
    )


def test_what_the_subject_raises_is_told_with_the_call_that_raises_it():
    def raising(query, key, value, attn_mask=None, is_causal=False, scale=None):
        if attn_mask is not None and is_causal and scale is not None:
            raise IndexError(f"index {len(query)} is too much")
        return attention(query, key, value, attn_mask, is_causal, scale)

    report = check_attention(
        AttentionSpec(raising, dtypes=("float32",), few_shapes=True), checks=PAIRS
    )
    said = report.failed[0].message.split("\n")
    assert said[0].startswith("it raised IndexError: index 2 is too much (test_combinations.py:")
    assert re.fullmatch(
        r"  \d+ of \d+ calls are wrong, all with mask=.* causal=True scale=.*; this is one of .*",
        said[1],
    )
    assert said[2].startswith('  --attn-replay="mask=boolean causal=True scale=0.7 dtype=')


def test_what_goes_wrong_now_and_then_has_not_passed():
    calls = []

    def restless(query, key, value):
        calls.append(query)
        if len(calls) == 40:
            raise ArithmeticError("now and then")
        return attention(query, key, value)

    with pytest.raises(ArithmeticError, match="now and then"):
        ask_pairs(examined(restless))


def test_a_report_that_passed_says_how_many_pairs_were_asked():
    spec = AttentionSpec(both_refused, dtypes=("float32", "float64"), few_shapes=True)
    lines = str(check_attention(spec, checks=PAIRS)).split("\n")
    assert sum(line.startswith("pairs: ") and "pairs of levels in" in line for line in lines) == 1
    assert sum("more calls were refused: mask=boolean causal=True" in line for line in lines) == 1


# --- smaller choices, and choices as text


def test_shrinking_asks_few_calls_and_finds_the_same_again():
    space, asked = _space(), []

    def fails(chosen):
        asked.append(text_of(chosen))
        return chosen["causal"] and chosen["sizes"][1] > 32

    first = space.choice(
        causal=True, mask="boolean", shape="(B, H, L, S)", empty=True, numbers="large",
        sizes=(63, 65), head_dim=64, batch=3, gradients="key",
    )  # fmt: skip
    smallest = shrunk(first, fails, space)
    assert space.named(smallest) == {
        "sizes": (1, 33), "batch": 1, "key_heads": 1, "head_dim": 8, "causal": True
    }  # fmt: skip
    assert len(asked) == len(set(asked)) <= 60
    assert shrunk(first, fails, space) == smallest


def test_shrinking_asks_no_more_than_it_may():
    space, asked = _space(), []
    first = space.choice(causal=True, mask="boolean", sizes=(127, 129))

    def fails(chosen):
        asked.append(chosen)
        return False

    shrunk(first, fails, space, most=7)
    assert len(asked) == 7


def _space():
    spec = AttentionSpec(attention)
    return Examination(spec, torch.float32, torch.device("cpu")).space


def wide(query, key, value, mask=None, window=None, softcap=None, sinks=None, documents=None):
    """Takes all of it; what it gives is not looked at."""
    return query[..., :1].expand(*query.shape[:-1], value.shape[-1])


@pytest.mark.parametrize(
    "declared",
    [
        {"mask": "any"},
        {"mask": "additive"},
        {"mask": "drop", "mask_shape": "(B, S)", "sinks": torch.ones(6)},
        {"mask": "keep", "mask_shape": "(L, S)", "square": True, "documents": "documents"},
        {"mask": None, "window": (3, 0), "few_shapes": True, "layout": "bld"},
    ],
    ids=str,
)
def test_every_choice_is_read_back_from_its_text(declared):
    spec = AttentionSpec(wide, mask_argument="mask", **declared)
    space = Examination(spec, torch.float32, torch.device("cpu")).space
    for chosen in space.covering().cases:
        assert read(text_of(space.named(chosen)), space) == chosen


# --- replay


def test_a_replay_judges_that_call_and_no_other():
    calls = []

    def subject(query, key, value, attn_mask=None, is_causal=False):
        calls.append((query.dtype, tuple(query.shape), is_causal))
        return attention(query, key, value, attn_mask, is_causal)

    spec = AttentionSpec(subject, dtypes=("float32", "float64"), square=False)
    report = check_attention(spec, replay="sizes=3x9 causal=True batch=1")
    assert [(one.name, one.dtype, one.status) for one in report.results] == [
        ("replay", "float32", "passed"), ("replay", "float64", "passed")
    ]  # fmt: skip
    judged = [call for call in calls if call[2]]
    assert set(judged) == {(dtype, (1, 2, 3, 16), True) for dtype in (torch.float32, torch.float64)}


@pytest.mark.parametrize("quick", [False, True])
def test_a_replay_is_of_the_dtype_and_the_seed_that_it_names(quick):
    values = []

    def seen(query, key, value):
        values.append(value.flatten()[0].item())
        return attention(query, key, value)

    for seed in (3, 4):
        report = check_attention(seen, replay=f"sizes=1x2 dtype=bfloat16 seed={seed}", quick=quick)
        assert [(one.dtype, one.status) for one in report.results] == [("bfloat16", "passed")]
    assert values[-1] != values[0]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("softcap=True", "replay: got 'softcap=True'; accepted is feature=level, of sizes, *"),
        ("dtype=float16", "it is not examined in float16"),
    ],
)
def test_a_replay_that_does_not_fit_is_skipped_with_the_reason(text, reason):
    spec = AttentionSpec(attention, dtypes=("float32",))
    (result,) = check_attention(spec, replay=text).results
    assert result.status == "skipped"
    assert re.match(re.escape(reason).replace(r"\*", ".*"), result.message)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("cauzal=True", "replay: got 'cauzal=True'; accepted is feature=level, of sizes, *"),
        ("sizes=1xx", "replay: got '1xx'; accepted is one of 5x7, *"),
        ("sizes=0x0", "replay: got '0x0'; accepted is one of 5x7, *, or two others from 1"),
        ("sizes=3", "replay: got '3'; accepted is one of 5x7, *, or two others from 1"),
        ("batch=0", "replay: got '0'; accepted is one of 3, 2, 1, 5, or another number from 1"),
        ("head_dim=-8", "replay: got '-8'; accepted is one of 16, *, or another number from 1"),
        ("causal=1", "replay: got '1'; accepted is one of False, True"),
        ("causal=maybe", "replay: got 'maybe'; accepted is one of False, True"),
        ("sizes=1x2 empty=True", "choice: got *"),
    ],
)
def test_a_replay_that_is_a_call_of_no_subject_is_refused(text, reason):
    with pytest.raises(ValueError, match=re.escape(reason).replace(r"\*", ".*")):
        check_attention(attention, replay=text)


def test_a_block_is_not_replayed():
    report = check_attention(torch.nn.MultiheadAttention(8, 2, batch_first=True).eval(), replay="")
    assert {one.message for one in report.results} == {
        "only a call of an attention function can be replayed"
    }


@pytest.mark.parametrize("text", ["dtype=float8", "seed=-1", "seed="])
def test_a_replay_that_names_no_dtype_or_seed_is_refused(text):
    with pytest.raises(ValueError, match=f"replay: got '?{text}'?; accepted is"):
        check_attention(attention, replay=text)


SUBJECTS = """
    from pytest_attnheat import AttentionSpec, parametrize_with_checks
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    def right(query, key, value):
        return sdpa(query, key, value)

    def wrong(query, key, value):
        return sdpa(query, key, value, scale=1.0)

    @parametrize_with_checks(
        [AttentionSpec(one, dtypes=("float32", "float64")) for one in (right, wrong)],
        expected_failures={"plain": "known"}, quick=True)
    def test_contract(check):
        check()
"""


def test_the_option_replaces_all_checks_by_that_call(pytester):
    pytester.makepyfile(test_it=SUBJECTS)
    result = pytester.runpytest("--attn-replay=sizes=1x2 dtype=float64")
    assert result.parseoutcomes() == {"passed": 1, "failed": 1}
    text = result.stdout.str()
    for line in (
        "test_contract[wrong-replay-float64]",
        'repeat   --attn-replay="sizes=1x2 dtype=float64 seed=0"',
        "wrong (test_it.py): 1 of 1 checks failed",
    ):
        assert line in text
    assert "diagnose" not in text


def test_the_option_refuses_what_is_no_call(pytester):
    pytester.makepyfile(test_it=SUBJECTS)
    result = pytester.runpytest("--attn-replay=dtype=float8")
    result.stderr.fnmatch_lines(["*--attn-replay: replay: got 'dtype=float8'; accepted is *"])
    result = pytester.runpytest("--attn-replay=softcap=True", "-rs")
    assert result.parseoutcomes() == {"skipped": 2}
    result.stdout.fnmatch_lines(["SKIPPED *replay: got 'softcap=True'; accepted is feature=level*"])


def test_a_report_says_in_which_dtype_so_many_pairs_were_asked_where_it_is_not_in_all():
    def picky(query, key, value, is_causal=False):
        if query.dtype == torch.float64 and is_causal:
            raise NotImplementedError("no causal float64")
        return plain(query, key, value, is_causal=is_causal)

    def even(query, key, value, is_causal=False):
        return plain(query, key, value, is_causal=is_causal)

    for subject, names in ((picky, ["pairs (float32 on cpu)", "pairs (float64 on cpu)"]),
                           (even, ["pairs"])):  # fmt: skip
        spec = AttentionSpec(subject, dtypes=("float32", "float64"), few_shapes=True)
        lines = str(check_attention(spec, checks=PAIRS)).splitlines()
        assert [line.partition(":")[0] for line in lines if "pairs of levels" in line] == names


def test_the_end_of_a_run_says_how_many_pairs_were_asked(pytester):
    pytester.makepyfile(
        subjects="""
        from torch.nn.functional import scaled_dot_product_attention as sdpa
        from pytest_attnheat import AttentionSpec

        def right(query, key, value):
            return sdpa(query, key, value)

        spec = AttentionSpec(right, dtypes=("float32", "float64"), few_shapes=True)
        """
    )
    result = pytester.runpytest("--attn-check=subjects:spec", "-k", "pairs")
    result.stdout.fnmatch_lines(
        [
            "right (subjects:spec): 0 of 2 checks failed",
            "  pairs      * pairs of levels in * calls per dtype, all that can occur together",
        ]
    )


@pytest.mark.parametrize(
    ("error", "fails"),
    [
        (RuntimeError("CUDA error: misaligned address"), True),
        (RuntimeError("The size of tensor a (65) must match the size of tensor b (64)"), True),
        (IndexError("list index out of range"), True),
        (ValueError("causal attention takes at most 64 keys"), False),
    ],
)
def test_what_breaks_with_some_lengths_alone_is_no_word_of_somebody_who_declines(error, fails):
    def short(query, key, value, attn_mask=None, is_causal=False):
        if is_causal and key.shape[-2] > 64:
            raise error
        return attention(query, key, value, attn_mask, is_causal)

    report = check_attention(AttentionSpec(short, dtypes=("float32",)), checks=PAIRS)
    assert report.passed != fails
    assert str(error) in str(report)


@pytest.mark.parametrize(("refused", "fails"), [(63, True), (2049, False)])
def test_lengths_that_are_refused_between_others_are_no_limit(refused, fails):
    def uneven(query, key, value):
        if refused in (query.shape[-2], key.shape[-2]):
            raise ValueError("it cannot be split")
        return attention(query, key, value)

    report = check_attention(AttentionSpec(uneven, dtypes=("float32",)), checks=PAIRS)
    assert report.passed != fails
    assert "it cannot be split" in str(report)


def test_a_declared_tolerance_allows_what_is_off_by_a_part_of_the_largest_number():
    def in_bfloat16(query, key, value, is_causal=False):
        query, key, value = (t.bfloat16().to(t.dtype) for t in (query, key, value))
        return plain(query, key, value, is_causal=is_causal)

    spec = AttentionSpec(in_bfloat16, dtypes=("float32",), gradients=False)
    few = [check for check in CHECKS if check.name in ("plain", "causal")]
    exactly = check_attention(spec, checks=few)
    assert len(exactly.failed) == 2
    assert check_attention(replace(spec, tolerance=0.1), checks=few).passed
    half = check_attention(replace(spec, tolerance=1e-4), checks=few)
    assert "or tolerance=0.0001 of the largest number of a head" in half.failed[0].message
