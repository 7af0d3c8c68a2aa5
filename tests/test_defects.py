"""Each entry of the catalogue is what an implementation with that defect computes, and is named.

The implementations are those of `wrong_attention`, which knows nothing of the catalogue.
"""

from dataclasses import replace

import pytest
import torch
from wrong_attention import BLOCK, attention_with, declared_for

from pytest_attnheat.attention.defects import DEFECTS
from pytest_attnheat.attention.plan import Case, NotApplicable, Plan, carry_out

EXACT = {defect.name: defect for defect in DEFECTS if defect.seen in ("exactly", "rounding")}
# What is given by keyword in a call; all else is what the implementation always does.
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


def large(case):
    """Scores that differ by thousands: they overflow in float16, and exp of them in float64."""
    return replace(case, query=case.query * 10000)


def cases_for(name):
    """Cases on which a defect shows, of the usual kinds and of what it is about."""
    declared = declared_for(name)
    declared |= {"value_dim": 5} if name == "scale_from_value_width" else {}
    slopes = declared.pop("alibi", None)
    if slopes is not None:
        heads = 3 if name == "alibi_of_other_heads" else 4
        declared["alibi"] = slopes(heads)
        base = plain(heads=heads, key_heads=1, **declared)
    else:
        base = plain(**declared)
    square = plain(query_len=6, key_len=6, **declared) if slopes is None else base
    cases = [base, replace(base, causal=True), masked(base), masked(replace(base, causal=True))]
    cases += [square, replace(square, causal=True), masked(square)]
    cases += [replace(base, alignment="bottom_right", causal=True)]
    bias = drawn(*base.shape, seed=9).masked_fill(drawn(*base.shape, seed=8) > 1, 0.0)
    bias[..., 3:5] = -torch.inf
    if "bias" in name:
        cases = [replace(base, bias=bias), masked(replace(base, bias=bias.nan_to_num(neginf=-2)))]
        cases += [replace(square, bias=drawn(*square.shape, seed=4))]
    if "documents" in name:
        of_keys = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2, 2], [0, 0, 0, 0, 0, 1, 1, 1, 1]])
        documents = (of_keys[:, :6], of_keys)
        cases = [replace(case, documents=documents) for case in cases[:2]]
    if "lengths" in name:
        lengths = torch.tensor([8, 6])
        cases = [replace(case, lengths=lengths) for case in cases[:4]]
    if name == "scale_argument_ignored":
        cases = [replace(case, scale=0.7, scale_given=True) for case in cases]
    if name in ("no_maximum_subtracted", "products_overflow"):
        cases = [large(base), large(masked(base))]
    if name == "mask_after_softmax_renormalised":
        cases += [large(masked(base))]
    if name == "mask_tiled_over_heads":
        cases = [masked(plain(3), heads=1)]
    if name == "products_overflow":
        cases = [replace(case, dtype=torch.float16) for case in cases]
    if "first" in name and "only" in name:
        cases = [plain(query_len=20, key_len=23, **declared)]
    if "earlier" in name:
        earlier = masked(plain(seed=30))
        cases = [replace(masked(plain()), earlier=replace(earlier, mask=~earlier.mask))]
    if "fully_masked" in name or "outside" in name or name == "empty_parts_nan":
        mask = drawn(*base.shape, seed=7) > 0
        mask[:, :, 2], mask[:, :, 4, :BLOCK] = False, False
        cases += [replace(base, mask=mask)]
    return cases


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
    cases = cases_for(name)
    answers = [answer(name, case) for case in cases]
    kept = [(case, found) for case, found in zip(cases, answers, strict=True) if found is not None]
    assert any(not agrees(found, outcome(Plan(), case)) for case, found in kept)
    plans = [change(Plan()) for change in EXACT[name].changes]
    assert any(all(agrees(found, outcome(p, case)) for case, found in kept) for p in plans)
