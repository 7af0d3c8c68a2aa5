"""Which known defect gives an output that is wrong.

The catalogue (`pytest_attnheat.attention.defects`) is tried on the very call that went wrong,
where that is small. The examination (`pytest_attnheat.contract`) asks more calls, and is surer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from pytest_attnheat.attention.call import FEATURES, Call
from pytest_attnheat.attention.defects import DEFECTS, Defect
from pytest_attnheat.attention.plan import Case, NotApplicable, Plan, carry_out
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
        ordinary: The rms of the values that were used.
        unjudged: Rows that are not judged, (batch, heads, query_len); None if all are.
    """

    output: Tensor
    largest_score: Tensor
    ordinary: float
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
        error = off / torch.maximum(*sizes).clamp_(min=max(self.ordinary, 1e-30))
        error.masked_fill_(differs.any(-1), 2.0)
        if self.unjudged is not None:
            error.masked_fill_(self.unjudged, 0.0)
        allowed = answer_units(dtype) * torch.finfo(dtype).eps * (2.0 + self.largest_score)
        return error, allowed.clamp_(min=least, max=max(most, least))


def expected(plan: Plan, case: Case) -> Expected | None:
    """Carry out a plan; None where it cannot be carried out."""
    try:
        result = carry_out(plan, case)
    except NotApplicable:
        return None
    largest_score = finite(result.scores).abs().masked_fill_(~result.permitted, 0.0).amax(-1)
    if plan.dim != "keys" or plan.merge != "transpose":
        # A row of the output is not made by its own scores alone.
        largest_score = torch.full_like(largest_score, float(largest_score.max()))
    unjudged = None
    if case.fully_masked == "undefined":
        unjudged = ~case.visible().expand(case.shape).any(-1)
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
    return f"the output is that of attention {', or '.join(named)}" if named else None


def too_large(call: Call) -> bool:
    """Return whether no mistake is looked for: it would take too long, or is elsewhere."""
    if call.maps * call.query_len * call.key_len > _MOST_SCORES:
        return True
    # Functions may hold tensors of that device.
    return call.query.device.type != "cpu" and bool(call.may_see or call.score_mod)


def fitting(call: Call, output: Tensor) -> dict[str, tuple[Plan, Case]]:
    """Return the mistakes that give an output, by their sentences, with what each computes of what.

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
        if not bool(found[judged].isfinite().all()):
            return {}
        wrong_by, _ = _off(right, found, case)
        if wrong_by <= answer_tolerance(torch.float64):  # the attempts are off by as much
            return {}
        fits: dict[str, tuple[float, Plan, Case]] = {}
        for sentence, plan, other in attempts(case):
            attempt = expected(plan, other)
            if attempt is None:
                continue
            size, fits_well = _off(replace(attempt, unjudged=right.unjudged), found, case)
            nearer = sentence not in fits or size < fits[sentence][0]
            if size < PART * wrong_by and fits_well and nearer:
                fits[sentence] = size, plan, other
    nearest = sorted(fits, key=lambda sentence: fits[sentence][0])[:MOST_NAMED]
    return {
        sentence: fits[sentence][1:]
        for sentence in nearest
        if fits[sentence][0] <= AS_WELL * fits[nearest[0]][0]
    }


def _words(sentence: str, plan: Plan, case: Case) -> str:
    """What a mistake is called; the corner is that of ALiBi alone where nothing else has one."""
    has_corner = case.causal or case.window is not None or case.chunk is not None
    if plan.causal == "other_corner" and not has_corner and case.alibi is not None:
        return "whose ALiBi distances are counted from the other corner"
    return sentence


def attempts(
    case: Case, catalogue: Sequence[Defect] = DEFECTS, start: Plan | None = None
) -> Iterator[tuple[str, Plan, Case]]:
    """Yield each mistake that is seen exactly: its sentence, what it computes, and of which case.

    Args:
        case: What was to be computed.
        catalogue: The mistakes; features that are left out come besides.
        start: What is right but for the mistake; `Plan()` by default.
    """
    start = Plan() if start is None else start
    hides = not bool(case.visible().all())
    for defect in catalogue:
        for change in defect.changes if defect.seen == "exactly" else ():
            plan = change(start)
            # No mask is to blame where nothing is masked.
            if hides or (plan.masking, plan.fill) == ("fill", -math.inf):
                yield _words(defect.sentence, plan, case), plan, case
    usual = {field.name: field.default for field in fields(Case)}
    for name in FEATURES:
        given = getattr(case, name)
        declared = isinstance(given, Tensor) or given != usual[name]
        if declared and name not in ("alignment", "scale", "window"):  # the catalogue knows those
            without: dict[str, Any] = {name: usual[name]}
            yield f"that leaves out {name}", start, replace(case, **without)


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
