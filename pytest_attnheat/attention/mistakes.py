"""Which known defect gives an output that is wrong.

The catalogue (`pytest_attnheat.attention.defects`) is tried on the very call that went wrong,
where that is small. The examination (`pytest_attnheat.contract`) asks more calls, and is surer.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from pytest_attnheat.attention.call import Call
from pytest_attnheat.attention.decisions import Change, Defect
from pytest_attnheat.attention.defects import DEFECTS
from pytest_attnheat.attention.outcomes import Decisions, Outcomes, decisions_of
from pytest_attnheat.attention.outcomes import Expected as Expected
from pytest_attnheat.attention.outcomes import expected as expected
from pytest_attnheat.attention.outcomes import finite as finite
from pytest_attnheat.attention.outcomes import rms as rms
from pytest_attnheat.attention.plan import Case, Plan
from pytest_attnheat.attention.tolerance import answer_tolerance

# Above so many scores some hundred attempts would take longer than a few seconds.
_MOST_SCORES = 2**18
# Up to which part of how far the output is off it may differ from an attempt; and up to how many
# times the difference of the nearest attempt another one fits as well.
PART, AS_WELL = 0.25, 2.0
# Rounding never excuses more than this part of a row.
MOST_ALLOWED = 0.125
MOST_NAMED = 3


def likely_mistake(call: Call, output: Tensor) -> str | None:
    """Return the mistake that gives this output, or those that all give it; None if none does."""
    named = fitting(call, output)
    if named and not bool(output.any()):  # whatever drops all there is fits, and says less
        return "every number of the output is 0"
    return f"the output is that of attention {listed(list(named))}" if named else None


def listed(named: Sequence[str]) -> str:
    """Return what may all be the mistake, in words."""
    more = len(named) - MOST_NAMED
    rest = [f"{more} more that give the same"] if more > 0 else []
    return ", or ".join([*named[:MOST_NAMED], *rest])


def too_large(call: Call) -> bool:
    """Return whether no mistake is looked for: it would take too long, or is elsewhere."""
    if call.maps * call.query_len * call.key_len > _MOST_SCORES:
        return True
    # Functions may hold tensors of that device.
    return call.query.device.type != "cpu" and bool(call.may_see or call.score_mod)


def fitting(call: Call, output: Tensor) -> dict[str, Plan]:
    """Return the mistakes that give an output, by their sentences, with what each computes."""
    # None are returned where the output is right.
    if too_large(call):
        return {}
    case = as_case(call)
    found = output.detach().cpu().double().reshape(*case.shape[:3], -1)
    with torch.no_grad():
        outcomes = Outcomes(case)
        right = outcomes.healthy
        assert right is not None
        judged = slice(None) if right.unjudged is None else ~right.unjudged
        if not bool(found[judged].isfinite().all(-1).any()):
            return {}  # whatever gives nothing but NaN would fit
        wrong_by = _off(right, found, case)[0]
        if wrong_by <= answer_tolerance(torch.float64):  # the attempts are off by as much
            return {}
        tried: dict[Expected | None, float] = {None: math.inf, right: math.inf}

        def off(decided: Decisions) -> float:
            outcome = outcomes.of(decided)
            if outcome not in tried:
                assert outcome is not None
                size, fits = _off(outcome, found, case)
                tried[outcome] = size if fits and size < PART * wrong_by else math.inf
            return tried[outcome]

        # If only rows without keys are wrong, nothing else is to blame for them.
        rows = case.has_empty_rows and any(
            off({"fully_masked": row}) < math.inf for row in ("zero", "uniform", "nan", "natural")
        )
        fits: dict[str, tuple[float, Plan]] = {}
        for defect, change in changes():
            decided = decisions_of(change)
            to_blame = len(decided) == 1 or not (rows and "fully_masked" in decided)
            if to_blame and (size := off(decided)) < fits.get(defect.sentence, (math.inf,))[0]:
                fits[defect.sentence] = size, change(Plan())
    least = min((size for size, _ in fits.values()), default=0.0)
    most = AS_WELL * max(least, answer_tolerance(torch.float64))
    near = {sentence: plan for sentence, (size, plan) in fits.items() if size <= most}
    return {sentence: near[sentence] for sentence in simplest(near)}


def simplest(named: Collection[str], catalogue: Sequence[Defect] = DEFECTS) -> list[str]:
    """Leave out of some sentences those of mistakes that are a form of another one of them."""
    of_name = {one.name: one.sentence for one in catalogue}
    forms = {one.sentence for one in catalogue
             if any(of_name.get(simple) in named for simple in one.form_of.split())}  # fmt: skip
    return [sentence for sentence in named if sentence not in forms]


def changes(catalogue: Sequence[Defect] = DEFECTS) -> Iterator[tuple[Defect, Change]]:
    """Yield each mistake that is seen exactly, in each of its forms."""
    for defect in catalogue:
        if defect.seen == "exactly":
            yield from ((defect, change) for change in defect.changes)


def _off(attempt: Expected, found: Tensor, case: Case) -> tuple[float, bool]:
    """How far an output is off, the rms of its rows, and whether each is off by rounding alone."""
    least = answer_tolerance(case.dtype)
    error, allowed = attempt.errors(found, case.dtype, least=least, most=MOST_ALLOWED)
    return float(error.square().mean().sqrt()), bool((error <= allowed).all())


def as_case(call: Call) -> Case:
    """Return the call on the CPU, (batch, heads, length, width), as a plan is carried out on it."""
    lead = call.query.shape[:-2][:-1]

    def here(name: str) -> Tensor | None:
        given: Tensor | None = getattr(call, name)
        if given is None:
            return None
        given = given.detach().cpu()
        return given.double() if given.is_floating_point() else given

    def batched(name: str) -> Tensor | None:
        if (given := here(name)) is None:
            return None
        given = given[(None,) * max(0, 3 - given.ndim)]
        last = given.shape[-3:]
        return given.expand(*lead, *last).reshape(lead.numel(), *last)

    own: dict[str, Any] = {f.name: getattr(call, f.name) for f in fields(Call)}
    own |= {n: batched(n) for n in ("query", "key", "value", "mask", "bias", "upstream")}
    own |= {n: here(n) for n in ("alibi", "sinks")}
    own |= {"scale_given": call.scale is not None, "dtype": call.query.dtype}
    return Case(**own)
