"""Which known defect gives an output that is wrong.

The catalogue (`pytest_attnheat.attention.defects`) is tried on the very call that went wrong,
where that is small. The examination (`pytest_attnheat.contract`) asks more calls, and is surer.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from pytest_attnheat.attention.call import Call
from pytest_attnheat.attention.defects import DEFECTS, ROWS, Defect
from pytest_attnheat.attention.plan import (
    Case,
    NotApplicable,
    Outcome,
    Plan,
    Step,
    carry_out,
    directly,
    reduced,
)
from pytest_attnheat.attention.tolerance import answer_tolerance, answer_units

# Above so many scores some hundred attempts would take longer than a few seconds.
_MOST_SCORES = 2**18
# Up to which part of how far the output is off it may differ from an attempt; and up to how many
# times the difference of the nearest attempt another one fits as well.
PART, AS_WELL = 0.25, 2.0
# Rounding never excuses more than this part of a row.
MOST_ALLOWED = 0.125
MOST_NAMED = 3


@dataclass(frozen=True, eq=False)
class Expected:
    """What a plan gives on a case, and what judging it takes.

    Attributes:
        output: (batch, heads, query_len, value_dim)
        largest_score: The largest score of each row, (batch, heads, query_len).
        ordinary: The rms of the values that were used; of several outcomes, a tensor of theirs.
        unjudged: Rows that are not judged, (batch, heads, query_len); None if all are.
    """

    output: Tensor
    largest_score: Tensor
    ordinary: float | Tensor
    unjudged: Tensor | None

    def errors(
        self, found: Tensor, dtype: torch.dtype, *, least: float, most: float
    ) -> tuple[Tensor, Tensor]:
        """Compare it with what was found, (batch, heads, query_len, value_dim).

        Args:
            found: An answer in float64.
            dtype: The dtype that it was computed in.
            least: The least part of a row by which it may be off.
            most: The most.

        Returns:
            The error of each row as a part of its size and what rounding may do (see **Answers**
            in `attention.tolerance`), both (batch, heads, query_len). A row of which only one is
            finite has the largest error that there is, 2; rows that are not judged have 0.
        """
        differs = found.isfinite() != self.output.isfinite()
        off, sizes = rms(finite(found - self.output)), map(rms, map(finite, (found, self.output)))
        least_size = torch.as_tensor(self.ordinary, dtype=torch.float64).clamp(min=1e-30)
        error = off / torch.maximum(*sizes).clamp_(min=least_size)
        error.masked_fill_(differs.any(-1), 2.0)
        if self.unjudged is not None:
            error.masked_fill_(self.unjudged, 0.0)
        allowed = answer_units(dtype) * torch.finfo(dtype).eps * (2.0 + self.largest_score)
        return error, allowed.clamp_(min=least, max=max(most, least))


def expected(plan: Plan, case: Case, step: Step = directly) -> Expected | None:
    """Carry out a plan, each step by `step`; None where it cannot be carried out."""
    try:
        result = carry_out(plan, case, step)
    except NotApplicable:
        return None
    outcome: Expected = step(_judgeable, plan, case, result)
    return outcome


def _judgeable(plan: Plan, case: Case, result: Outcome) -> Expected:
    largest_score = finite(result.scores).abs().masked_fill_(~result.permitted, 0.0).amax(-1)
    if plan.dim != "keys" or plan.merge != "transpose":
        # A row of the output is not made by its own scores alone.
        largest_score = torch.full_like(largest_score, float(largest_score.max()))
    unjudged = None
    if case.fully_masked == "undefined":
        unjudged = ~case.seen.any(-1)
    ordinary = float(finite(result.value).square().mean().sqrt())
    return Expected(result.output, largest_score, ordinary, unjudged)


def finite(tensor: Tensor) -> Tensor:
    """Return a tensor with 0 in place of NaN and inf."""
    return torch.nan_to_num(tensor, nan=0.0, posinf=0.0, neginf=0.0)


def rms(rows: Tensor) -> Tensor:
    """Return the root of the mean square of each row."""
    return rows.square().mean(-1).sqrt()


def likely_mistake(call: Call, output: Tensor) -> str | None:
    """Return the mistake that gives this output, or those that all give it; None if none does.

    Args:
        call: What was to be computed.
        output: What was computed instead, (..., query_len, value_dim).
    """
    named = fitting(call, output)
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
    """Return the mistakes that give an output, by their sentences, with what each computes.

    None are returned where the output is right.
    """
    if too_large(call):
        return {}
    case = as_case(call)
    found = output.detach().cpu().double().reshape(*case.shape[:3], -1)
    with torch.no_grad():
        right = expected(Plan(), case)
        assert right is not None
        judged = slice(None) if right.unjudged is None else ~right.unjudged
        if not bool(found[judged].isfinite().all(-1).any()):
            return {}  # whatever gives nothing but NaN would fit
        wrong_by, _ = _off(right, found, case)
        if wrong_by <= answer_tolerance(torch.float64):  # the attempts are off by as much
            return {}
        tried: dict[Plan, float] = {Plan(): math.inf}

        def off(plan: Plan) -> float:
            if plan not in tried:
                tried[plan] = _off_if_fitting(plan, found, case)
            return tried[plan] if tried[plan] < PART * wrong_by else math.inf

        # If only rows without keys are wrong, nothing else is to blame for them.
        alone = {Plan(fully_masked=row) for row in ROWS if case.has_empty_rows}
        rows = {plan.fully_masked for plan in alone if off(plan) < math.inf}
        fits: dict[str, tuple[float, Plan]] = {}
        for sentence, plan in attempts(case):
            to_blame = plan.fully_masked not in rows or plan in alone
            if to_blame and off(plan) < fits.get(sentence, (math.inf,))[0]:
                fits[sentence] = off(plan), plan
    nearest = max(
        min((size for size, _ in fits.values()), default=0.0), answer_tolerance(torch.float64)
    )
    as_near = {
        sentence: plan for sentence, (size, plan) in fits.items() if size <= AS_WELL * nearest
    }
    return {sentence: as_near[sentence] for sentence in simplest(as_near)}


def simplest(named: Collection[str], catalogue: Sequence[Defect] = DEFECTS) -> list[str]:
    """Leave out of some sentences those of mistakes that are a form of another one of them."""
    of_name = {one.name: one.sentence for one in catalogue}
    forms = {one.sentence for one in catalogue if of_name.get(one.form_of) in named}
    return [sentence for sentence in named if sentence not in forms]


def attempts(
    case: Case, catalogue: Sequence[Defect] = DEFECTS, start: Plan | None = None
) -> Iterator[tuple[str, Plan]]:
    """Yield each mistake that is seen exactly: its sentence, and what it may change on a case.

    Args:
        case: What was to be computed.
        catalogue: The mistakes.
        start: What is right but for the mistake; `Plan()` by default.
    """
    start = Plan() if start is None else start
    for defect in catalogue:
        for change in defect.changes if defect.seen == "exactly" else ():
            yield defect.sentence, reduced(change(start), case)


def _off_if_fitting(plan: Plan, found: Tensor, case: Case) -> float:
    attempt = expected(plan, case)
    size, fits = (math.inf, False) if attempt is None else _off(attempt, found, case)
    return size if fits else math.inf


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
        given = given[(None,) * max(0, 3 - given.ndim)]
        last = given.shape[-3:]
        return given.expand(*lead, *last).reshape(lead.numel(), *last)

    own: dict[str, Any] = {f.name: getattr(call, f.name) for f in fields(Call)}
    own |= {name: here(name) for name in ("query", "key", "value", "mask", "bias", "upstream")}
    own |= {
        name: own[name] if own[name] is None else own[name].cpu() for name in ("alibi", "sinks")
    }
    own |= {"scale_given": call.scale is not None, "dtype": call.query.dtype}
    return Case(**own)
