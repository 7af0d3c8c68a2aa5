"""Which known defect gives an output that is wrong.

The catalogue (`pytest_attnheat.attention.defects`) is tried on the very call that went wrong,
where that is small. The examination (`pytest_attnheat.contract`) asks more calls, and is surer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from pytest_attnheat.attention.call import FEATURES, Call
from pytest_attnheat.attention.defects import DEFECTS
from pytest_attnheat.attention.plan import Case, NotApplicable, Outcome, Plan, carry_out
from pytest_attnheat.attention.tolerance import answer_tolerance, answer_units

# Above so many scores some hundred attempts would take longer than a few seconds.
_MOST_SCORES = 2**18
# Up to which part of how far the output is off it may differ from an attempt; and up to how many
# times the difference of the nearest attempt another one fits as well.
_PART, _AS_WELL = 0.25, 2.0
# Rounding never excuses more than this part of a row.
_MOST_ALLOWED = 0.125
_MOST_NAMED = 3


def likely_mistake(call: Call, output: Tensor) -> str | None:
    """Return the mistake that gives this output, or those that all give it; None if none does.

    Args:
        call: What was to be computed.
        output: What was computed instead, (..., query_len, value_dim).
    """
    if call.maps * call.query_len * call.key_len > _MOST_SCORES:
        return None
    if call.query.device.type != "cpu" and (call.may_see or call.score_mod):
        return None  # functions that may hold tensors of that device
    case = _as_case(call)
    found = output.detach().cpu().double().reshape(*case.shape[:3], -1)
    with torch.no_grad():
        right = carry_out(Plan(), case)
        judged = torch.ones(case.shape[:3], dtype=torch.bool)
        if call.fully_masked == "undefined":
            judged = right.permitted.any(-1)
        if not bool(found[judged].isfinite().all()):
            return None
        wrong_by = float(_off(right, found)[judged].square().mean().sqrt())
        if wrong_by <= answer_tolerance(torch.float64):  # the attempts are off by as much
            return None
        fits: dict[str, float] = {}
        for sentence, attempt in _attempts(case, right):
            off = _off(attempt, found)[judged]
            size = float(off.square().mean().sqrt())  # NaN where only the attempt is: no fit
            if size < _PART * wrong_by and bool((off <= _rounding(attempt, case)[judged]).all()):
                fits[sentence] = min(size, fits.get(sentence, size))
    nearest = sorted(fits, key=lambda sentence: fits[sentence])[:_MOST_NAMED]
    named = [sentence for sentence in nearest if fits[sentence] <= _AS_WELL * fits[nearest[0]]]
    return f"the output is that of attention {', or '.join(named)}" if named else None


def _attempts(case: Case, right: Outcome) -> Iterator[tuple[str, Outcome]]:
    hides = not bool(right.permitted.all())
    for defect in DEFECTS:
        for change in defect.changes if defect.seen == "exactly" else ():
            plan = change(Plan())
            if not hides and (plan.masking, plan.fill) != ("fill", -math.inf):
                continue  # no mask is to blame where nothing is masked
            try:
                yield defect.sentence, carry_out(plan, case)
            except NotApplicable:
                continue
    usual = {field.name: field.default for field in fields(Case)}
    for name in FEATURES:
        given = getattr(case, name)
        declared = isinstance(given, Tensor) or given != usual[name]
        if declared and name not in ("alignment", "scale", "window"):  # the catalogue knows those
            without: dict[str, Any] = {name: usual[name]}
            yield f"that leaves out {name}", carry_out(Plan(), replace(case, **without))


def _off(outcome: Outcome, found: Tensor) -> Tensor:
    """How far each row is off as a part of its size, (batch, heads, query_len)."""
    ordinary = _rms(outcome.value.nan_to_num(0.0, 0.0, 0.0).flatten())
    size = torch.maximum(_rms(found), _rms(outcome.output)).clamp(min=max(1e-30, float(ordinary)))
    return _rms(found - outcome.output) / size


def _rounding(outcome: Outcome, case: Case) -> Tensor:
    """How far rounding may move each row; see **Answers** in `attention.tolerance`."""
    largest = outcome.scores.masked_fill(~outcome.permitted, 0.0).abs().amax(-1)
    allowed = (2.0 + largest) * (answer_units(case.dtype) * torch.finfo(case.dtype).eps)
    least = answer_tolerance(case.dtype)
    return allowed.clamp(min=least, max=max(least, _MOST_ALLOWED))


def _rms(rows: Tensor) -> Tensor:
    return rows.square().mean(-1).sqrt()


def _as_case(call: Call) -> Case:
    """The same call on the CPU, (batch, heads, length, width), as a plan is carried out on it."""
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
    own |= {name: here(name) for name in ("query", "key", "value", "mask", "bias")}
    own |= {
        name: own[name] if own[name] is None else own[name].cpu() for name in ("alibi", "sinks")
    }
    own |= {"upstream": None, "scale_given": call.scale is not None, "dtype": call.query.dtype}
    return Case(**own)
