"""How well a plan reproduces what a subject answered.

What counts as rounding is said in `pytest_attnheat.attention.mistakes`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pytest_attnheat.attention.defects import Defect
from pytest_attnheat.attention.mistakes import Expected, expected, finite
from pytest_attnheat.attention.plan import NotApplicable, Plan, carry_out
from pytest_attnheat.attention.tolerance import is_fine
from pytest_attnheat.contract.probing import Probe

_MOST_ALLOWED = 0.5
# Where a step is rounded to a coarse dtype, another order of the same operations may round
# a number up or down: so many rows may be off by that.
_OTHER_WAY = 0.25
# By so many times the precision of that dtype, at most: a large score is rounded by more.
_MOST_STEPS = 8.0
# Explanations that are off by less than so many times what is allowed are not excluded.
_NEARLY, _NEARLY_IN_HALF = 10.0, 2.0


@dataclass(frozen=True)
class Fit:
    """How far a plan is from the answers.

    Attributes:
        residual: The worst relative rms over the cases.
        excess: The worst row, as a multiple of what rounding may do. At most 1: it reproduces.
    """

    residual: float
    excess: float


@dataclass(frozen=True)
class Explanation:
    """A plan that might be what the subject computes.

    Attributes:
        defects: What makes it differ from the correct plan; none for the correct plan.
        plan: The plan.
        fit: How far it is from the answers.
        constant: The constant that was fitted, if any.
    """

    defects: tuple[Defect, ...]
    plan: Plan
    fit: Fit
    constant: float | None = None

    def change(self, plan: Plan) -> Plan:
        """Return another plan with what a single defect does to the correct one."""
        (defect,) = self.defects
        return next(change for change in defect.changes if change(Plan()) == self.plan)(plan)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the defects."""
        return tuple(defect.name for defect in self.defects)

    @property
    def reproduces(self) -> bool:
        """Whether every answer is reproduced to within rounding."""
        return self.fit.excess <= 1.0


NOWHERE = Fit(math.inf, math.inf)


def errors(probe: Probe, outcome: Expected | None = None) -> tuple[Tensor, Tensor]:
    """Return the error of each row of an answer, and what rounding may do: see `Expected.errors`.

    It is compared with correct attention, or else with what is given.
    """
    wanted = outcome or expected(Plan(), probe.case)
    assert wanted is not None
    return wanted.errors(probe.output, probe.dtype, least=probe.tolerance, most=_MOST_ALLOWED)


def measure(plan: Plan, probes: Sequence[Probe], *, tolerant: bool = False) -> Fit:
    """Return how far a plan is from all answers.

    Args:
        plan: The plan.
        probes: Cases and answers.
        tolerant: Let a few rows be rounded the other way, for plans with a coarse step.
    """
    return fit_outcomes(plan, [expected(plan, one.case) for one in probes], probes, tolerant)


def _worst(fits: Iterable[Fit]) -> Fit:
    known = list(fits)
    return Fit(max(fit.residual for fit in known), max(fit.excess for fit in known))


def _fit(plan: Plan, outcome: Expected | None, probe: Probe, tolerant: bool) -> Fit:
    if outcome is None:
        return NOWHERE
    error, allowed = errors(probe, outcome)
    ratio = error / allowed
    if tolerant:
        ratio = _without_other_way(ratio, error, plan, outcome)
    return Fit(float(error.square().mean().sqrt()), float(ratio.max()))


def nearly(probes: Sequence[Probe]) -> float:
    """Return up to which excess an explanation is not excluded.

    What float16 and bfloat16 allow is large beside any defect: there it is 2, not 10.
    """
    return _NEARLY if is_fine(probes[0].dtype) else _NEARLY_IN_HALF


def is_tolerant(defects: Sequence[Defect]) -> bool:
    """Whether one of some defects is a coarse step."""
    return any(defect.seen == "rounding" for defect in defects)


def _without_other_way(ratio: Tensor, error: Tensor, plan: Plan, outcome: Expected) -> Tensor:
    dtype = plan.coarse
    if dtype is None:
        return ratio
    steps = (
        2.0
        if plan.scores_dtype is plan.products_dtype is None
        else outcome.largest_score.clamp(2.0, _MOST_STEPS)
    )
    other_way = (ratio > 1.0) & (error <= steps * torch.finfo(dtype).eps)
    if float(other_way.double().mean()) > _OTHER_WAY:
        return ratio
    return ratio.masked_fill(other_way, 1.0)


def fit_outcomes(
    plan: Plan, outcomes: Sequence[Expected | None], probes: Sequence[Probe], tolerant: bool
) -> Fit:
    """Return how far what a plan gives is from all answers."""
    judged = zip(outcomes, probes, strict=True)
    return _worst(_fit(plan, outcome, one, tolerant) for outcome, one in judged)


def roughly_off(plan: Plan, probe: Probe) -> float:
    """Return how far a plan is from an answer, in a norm that is quick to compute."""
    try:
        output = carry_out(plan, probe.case).output
    except NotApplicable:
        return math.inf
    given, differs = probe.output, 0.0
    off = length(output - given)
    if not math.isfinite(off):
        differs = float((output.isfinite() != given.isfinite()).double().mean())
        output, given = finite(output), finite(given)
        off = length(finite(output - given))
    return off / max(length(output) + length(given), 1e-30) + differs


def length(tensor: Tensor) -> float:
    """Return the length of a tensor as a vector."""
    return float(torch.linalg.vector_norm(tensor))


def measure_until(
    limit: float, defects: Sequence[Defect], plan: Plan, probes: Sequence[Probe]
) -> Fit:
    """Measure a plan case by case, and stop where it is farther off than a limit."""
    fit = Fit(0.0, 0.0)
    tolerant = is_tolerant(defects)
    for one in probes:
        fit = _worst([fit, measure(plan, [one], tolerant=tolerant)])
        if fit.residual > limit:
            break
    return fit
