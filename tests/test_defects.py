"""Each entry of the catalogue is what an implementation with that defect computes, and is named.

The implementations are those of `wrong_attention`, which knows nothing of the catalogue.
"""

import functools
from dataclasses import replace

import pytest
import torch
from wrong_attention import BLOCK, PLANTED, attention_with, declared_for

from pytest_attnheat.attention.defects import DEFECTS
from pytest_attnheat.attention.plan import Case, NotApplicable, Plan, carry_out
from pytest_attnheat.contract.probing import Probe
from pytest_attnheat.contract.searching import Search

EXACT = {one.name: one for one in PLANTED if one.seen in ("exactly", "rounding")}
FORM_OF = {one.name: set(one.form_of.split()) for one in DEFECTS}
# What is given by keyword in a call; all else is what the implementation always does.
# What gives the very same answers to these cases, and says so of itself.
ALIKE = {
    "sinks_outside_maximum": ["empty_parts_nan"],
    "products_overflow": ["products_in_float16"],
    # Heads of 8 that are padded to 64, and to the 32 of four heads.
    "scale_squared": ["scale_of_another_width"],
    "scale_from_embedding": ["scale_of_another_width"],
}
GIVEN = ("bias", "documents", "lengths", "alibi")


def drawn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def plain(
    batch=2, heads=4, query_len=6, key_len=9, width=8, key_heads=2, seed=0, value_dim=8, **given
):  # fmt: skip
    query = drawn(batch, heads, query_len, width, seed=seed)
    key = drawn(batch, key_heads, key_len, width, seed=seed + 1)
    value = drawn(batch, key_heads, key_len, value_dim, seed=seed + 2)
    return Case(query, key, value, **given)


def masked(case, heads=None):
    batch, own, *lengths = case.shape
    mask = drawn(batch, heads or own, *lengths, seed=7) > -0.3
    mask[..., 0] = True
    return replace(case, mask=mask)


def kind_of(name):
    """What the cases of a defect have, besides what is declared for it."""
    kinds = {"bias": "bias", "documents": "documents", "lengths": "lengths", "earlier": "earlier",
             "argument": "scale", "maximum_sub": "large", "renormalised": "large", "tiled_over":
             "of samples", "overflow": "float16", "s_only": "long", "fully": "empty", "outside":
             "empty", "empty": "empty", "mask_in": "tiles"}  # fmt: skip
    return next((kind for part, kind in kinds.items() if part in name), "")


@functools.cache
def cases_of(kind, declared):
    """Cases of one kind, once for all defects that show on them: what they give is kept as well."""
    base, square = plain(**dict(declared)), plain(**dict(declared), query_len=6, key_len=6)
    causal = replace(base, causal=True)
    earlier = masked(plain(seed=30))
    bias = drawn(*base.shape, seed=9).masked_fill(drawn(*base.shape, seed=8) > 1, 0.0)
    bias[..., 3:5] = -torch.inf
    of_keys = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2, 2], [0, 0, 0, 0, 0, 1, 1, 1, 1]])
    documents, lengths = (of_keys[:, :6], of_keys), torch.tensor([8, 6])
    empty = drawn(*base.shape, seed=7) > 0
    empty[:, :, 2], empty[:, :, 4, :BLOCK] = False, False
    tiles = torch.arange(9) // BLOCK != torch.arange(6)[:, None] // BLOCK
    tiles[1, 1] = True
    usual = [base, causal, masked(causal), replace(square, causal=True), masked(square)]
    usual += [replace(causal, alignment="bottom_right")]
    far = masked(replace(base, query=base.query * 10000))  # exp of its scores is inf or 0
    return {
        "": usual,
        "bias": [replace(base, bias=bias), masked(replace(base, bias=bias.nan_to_num(neginf=-2))),
                 replace(square, bias=drawn(*square.shape, seed=4))],
        "documents": [replace(base, documents=documents), replace(causal, documents=documents)],
        "lengths": [replace(case, lengths=lengths) for case in (base, causal, masked(causal))],
        "earlier": [replace(masked(base), earlier=replace(earlier, mask=earlier.mask.flip(-2)))],
        "scale": [replace(case, scale=0.7, scale_given=True) for case in usual[:2]],
        "large": [far, masked(base)],
        "float16": [replace(far, dtype=torch.float16)],
        "of samples": [masked(plain(3), heads=1)],
        "tiles": [replace(base, mask=tiles.expand(base.shape))],
        "long": [plain(query_len=40, key_len=43)],
        "empty": [*usual, replace(base, mask=empty)],
    }[kind]  # fmt: skip


def cases_for(name):
    """Cases on which a defect shows."""
    declared = declared_for(name)
    if name in ("scale_from_value_width", "scale_argument_ignored"):
        declared["value_dim"] = 5
    if name == "key_head_miscounted":
        declared["heads"] = 6
    if "alibi" in declared:
        declared |= {"heads": 3 if name == "alibi_of_other_heads" else 4, "key_heads": 1}
        declared["alibi"] = declared["alibi"](declared["heads"])
    return cases_of(kind_of(name), tuple(declared.items()))


def answer(name, case):
    """What the planted implementation answers, asked what came earlier before; None if it refuses.

    It is declared as the case is, and asked in float64.
    """
    always = {n: getattr(case, n) for n in ("softcap", "sinks", "chunk", "prefix", "sink_keys",
              "scale", "score_mod", "may_see")}  # fmt: skip
    always = {n: t for n, t in always.items() if t is not None and t is not False}
    scale = always.pop("scale", None)
    subject = attention_with(
        name, window=case.window, bottom_right=case.alignment == "bottom_right",
        fully_masked=case.fully_masked, **always,
    )  # fmt: skip
    for one in (case.earlier, case):
        if one is not None:
            given = {n: getattr(one, n) for n in GIVEN if getattr(one, n) is not None}
            try:
                found = subject.with_more(
                    one.query, one.key, one.value, one.mask, one.causal, scale=scale, **given
                )
            except ValueError:
                return None
    return found


@functools.cache
def answers_of(name):
    """The cases of a defect that the planted implementation answers, and its answers."""
    answers = ((case, answer(name, case)) for case in cases_for(name))
    return [(case, found) for case, found in answers if found is not None]


def outcome(plan, case):
    try:
        return carry_out(plan, case).output
    except NotApplicable:
        return None


def agrees(one, other):
    if one is None or other is None:
        return one is other
    return torch.allclose(one, other, rtol=1e-9, atol=1e-11, equal_nan=True)


@pytest.mark.parametrize("name", EXACT)
def test_a_plan_gives_exactly_what_an_implementation_with_the_defect_gives(name):
    kept = answers_of(name)
    assert any(not agrees(found, outcome(Plan(), case)) for case, found in kept)
    plans = [change(Plan()) for change in EXACT[name].changes]
    assert any(all(agrees(found, outcome(p, case)) for case, found in kept) for p in plans)


@pytest.mark.matrix
@pytest.mark.parametrize("name", [name for name in EXACT if EXACT[name].seen == "exactly"])
def test_what_an_implementation_with_a_defect_answers_is_given_its_name_and_no_other(name):
    probes = [Probe(case, found, torch.float64, 1e-9) for case, found in answers_of(name)]
    fitting = {one.names[0] for one in Search(probes, keep=True).singles if one.reproduces}
    assert {one for one in fitting if not FORM_OF[one] & fitting} == {name, *ALIKE.get(name, ())}
