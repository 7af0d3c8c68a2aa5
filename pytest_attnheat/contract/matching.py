"""How well a plan reproduces what a subject answered, and the search for plans that do.

What counts as rounding is said in `pytest_attnheat.attention.tolerance`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import TypeAlias

import torch
from torch import Tensor

from pytest_attnheat.attention.defects import DEFECTS, Defect
from pytest_attnheat.attention.plan import Case, NotApplicable, Plan, carry_out
from pytest_attnheat.attention.tolerance import answer_units, is_fine
from pytest_attnheat.contract.probing import Probe

_MOST_ALLOWED = 0.5
# Where a step is rounded to a coarse dtype, another order of the same operations may round
# a number the other way: so many rows may be off by that.
_OTHER_WAY = 0.25
# By so many times the precision of that dtype, at most: a large score is rounded by more.
_LOUD_STEPS = 8.0
# Constants are not looked for within so many times what rounding does.
_STEPS = 4.0
# So many pairs are compared on all cases.
_FINALISTS = 300
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


@dataclass(frozen=True, eq=False)
class Expected:
    """What a plan gives on a case, and what judging it takes.

    Attributes:
        output: (batch, heads, query_len, value_dim)
        loudness: The largest score of each row, (batch, heads, query_len).
        ordinary: The rms of the values that were used.
        lost: Rows that are not judged, (batch, heads, query_len); None if all are.
    """

    output: Tensor
    loudness: Tensor
    ordinary: float
    lost: Tensor | None


def expected(plan: Plan, case: Case) -> Expected | None:
    """Carry out a plan; None where it cannot be carried out."""
    try:
        result = carry_out(plan, case)
    except NotApplicable:
        return None
    scores = _finite(result.scores).abs().masked_fill_(~result.permitted, 0.0)
    ordinary = float(_finite(result.value).square().mean().sqrt())
    lost = None
    if case.fully_masked == "undefined":
        lost = ~carry_out(Plan(), case).permitted.any(-1)
    loudness = scores.amax(-1)
    if plan.dim != "keys" or plan.merge != "transpose":
        # A row of the output is not made by its own scores alone.
        loudness = torch.full_like(loudness, float(loudness.max()))
    return Expected(result.output, loudness, ordinary, lost)


# What single defects give on the usual cases: about 10 MB for the cases of one specification.
_kept = lru_cache(maxsize=8192)(expected)
Outcome: TypeAlias = Callable[[Plan, Case], Expected | None]


def errors(plan: Plan, probe: Probe) -> tuple[Tensor, Tensor]:
    """Compare what a plan that can be carried out gives with an answer.

    Returns:
        The error of each row as a part of its size and what rounding may do, both (batch, heads,
        query_len). A row of which only one is finite has the largest error that there is, 2;
        rows that are not judged have 0.

    Raises:
        NotApplicable: The plan cannot be carried out.
    """
    outcome = expected(plan, probe.case)
    if outcome is None:
        raise NotApplicable("the plan cannot be carried out on this case")
    return _errors(outcome, probe)


def _errors(outcome: Expected, probe: Probe) -> tuple[Tensor, Tensor]:
    given, wanted = probe.output, outcome.output
    differs = given.isfinite() != wanted.isfinite()
    off = _rms(_finite(given - wanted))
    size = torch.maximum(_rms(_finite(given)), _rms(_finite(wanted)))
    error = off / size.clamp_(min=max(outcome.ordinary, 1e-30))
    error.masked_fill_(differs.any(-1), 2.0)
    if outcome.lost is not None:
        error.masked_fill_(outcome.lost, 0.0)
    return error, _allowed(outcome, probe)


def _allowed(outcome: Expected, probe: Probe) -> Tensor:
    eps = torch.finfo(probe.dtype).eps
    allowed = answer_units(probe.dtype) * eps * (2.0 + outcome.loudness)
    return allowed.clamp_(min=probe.tolerance, max=max(_MOST_ALLOWED, probe.tolerance))


def _rms(rows: Tensor) -> Tensor:
    return rows.square().mean(-1).sqrt()


def _finite(tensor: Tensor) -> Tensor:
    return torch.nan_to_num(tensor, nan=0.0, posinf=0.0, neginf=0.0)


def measure(plan: Plan, probes: Sequence[Probe], *, tolerant: bool = False) -> Fit:
    """Return how far a plan is from all answers.

    Args:
        plan: The plan.
        probes: Cases and answers.
        tolerant: Let a few rows be rounded the other way, for plans with a coarse step.
    """
    return _worst(_fit(plan, expected(plan, one.case), one, tolerant) for one in probes)


def _worst(fits: Iterable[Fit]) -> Fit:
    known = list(fits)
    return Fit(max(fit.residual for fit in known), max(fit.excess for fit in known))


def _fit(plan: Plan, outcome: Expected | None, probe: Probe, tolerant: bool) -> Fit:
    if outcome is None:
        return NOWHERE
    error, allowed = _errors(outcome, probe)
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
    dtype = plan.scores_dtype or plan.weights_dtype
    if dtype is None:
        return ratio
    steps = 2.0 if plan.scores_dtype is None else outcome.loudness.clamp(2.0, _LOUD_STEPS)
    other_way = (ratio > 1.0) & (error <= steps * torch.finfo(dtype).eps)
    if float(other_way.double().mean()) > _OTHER_WAY:
        return ratio
    return ratio.masked_fill(other_way, 1.0)


# --- the search


@dataclass
class Search:
    """What was compared.

    Attributes:
        explanations: Every plan that was compared, with its fit.
        unseen: Defects that change nothing on these cases.
        compared: How many plans there were.
        telling: For each case, how many plans change it.
    """

    explanations: list[Explanation]
    unseen: list[str]
    compared: int
    telling: list[int]


def explain_alone(
    probes: Sequence[Probe], catalogue: Sequence[Defect] = DEFECTS, *, keep: bool = False
) -> Search:
    """Compare the answers with attention that carries each known defect.

    Args:
        probes: Cases and answers.
        catalogue: The known defects.
        keep: Keep what the defects give on these cases, for the next subject that is asked them.
    """
    search = Search([], [], 0, [0] * len(probes))
    cases = tuple(one.case for one in probes)
    for defect in catalogue:
        coarse = defect.seen == "rounding"
        # Coarse steps do not show in answers that are as coarse.
        skipped = coarse and not is_fine(probes[0].dtype)
        ways = () if skipped else (_ways_kept if keep else _ways_seen)(defect, cases)
        for way in ways:
            fit = _fit_all(way.plan, way.outcomes, probes, tolerant=coarse)
            if fit.excess <= 1.0 and _only_loses_rows(way.plan, probes):
                continue
            search.explanations.append(Explanation((defect,), way.plan, fit))
            for i, changes in enumerate(way.changes):
                search.telling[i] += changes
        search.compared += len(ways)
        if defect.changes and not ways:
            search.unseen.append(defect.name)
    return search


@dataclass(frozen=True, eq=False)
class _Way:
    """A plan with one defect, what it gives on some cases, and whether it changes each of them."""

    plan: Plan
    outcomes: tuple[Expected | None, ...]
    changes: tuple[bool, ...]


def _ways_seen(
    defect: Defect, cases: tuple[Case, ...], outcome_of: Outcome = expected
) -> tuple[_Way, ...]:
    """The ways of a defect that change something in some case, and not the same as another."""
    healthy = tuple(outcome_of(Plan(), case) for case in cases)
    ways: list[_Way] = []
    for change in defect.changes:
        plan = change(Plan())
        outcomes = tuple(outcome_of(plan, case) for case in cases)
        changes = tuple(not _equal(a, b) for a, b in zip(outcomes, healthy, strict=True))
        only_lost = replace(Plan(), lost=plan.lost)
        known = [way.outcomes for way in ways]
        if plan.lost is not None and plan != only_lost:
            # What becomes of rows without keys is a defect of its own.
            known.append(tuple(outcome_of(only_lost, case) for case in cases))
        if any(changes) and not any(_same(outcomes, other) for other in known):
            ways.append(_Way(plan, outcomes, changes))
    return tuple(ways)


@lru_cache(maxsize=512)
def _ways_kept(defect: Defect, cases: tuple[Case, ...]) -> tuple[_Way, ...]:
    return _ways_seen(defect, cases, _kept)


def _fit_all(
    plan: Plan, outcomes: Sequence[Expected | None], probes: Sequence[Probe], *, tolerant: bool
) -> Fit:
    return _worst(
        _fit(plan, outcome, one, tolerant) for outcome, one in zip(outcomes, probes, strict=True)
    )


def _only_loses_rows(plan: Plan, probes: Sequence[Probe]) -> bool:
    """Whether answers that a plan reproduces show only what it makes of rows without keys."""
    simpler = replace(Plan(), lost=plan.lost)
    if plan.lost is None or plan == simpler:
        return False
    outcomes = [expected(simpler, one.case) for one in probes]
    return _fit_all(simpler, outcomes, probes, tolerant=False).excess <= 1.0


def _same(one: Sequence[Expected | None], other: Sequence[Expected | None]) -> bool:
    return all(_equal(a, b) for a, b in zip(one, other, strict=True))


def _equal(one: Expected | None, other: Expected | None) -> bool:
    if one is None or other is None:
        return one is other
    if torch.equal(one.output, other.output):
        return True
    return torch.allclose(one.output, other.output, rtol=1e-9, atol=1e-12, equal_nan=True)


def explain_in_pairs(probes: Sequence[Probe], alone: Search) -> list[Explanation]:
    """Compare the answers with attention that carries two defects.

    All pairs are compared on the one case that most defects change, roughly; those that come near
    on all cases, until they are farther off than the best that is excluded.
    """
    order = sorted(range(len(probes)), key=lambda i: -alone.telling[i])
    ordered = [probes[i] for i in order]
    rough = [(roughly_off(plan, ordered[0]), defects, plan) for defects, plan in pairs_of(alone)]
    rough.sort(key=lambda triple: triple[0])
    alone.compared += len(rough)
    limit = math.inf
    finished = []
    for off, defects, plan in rough[:_FINALISTS]:
        if math.isinf(off):
            break
        fit = _measure_until(limit, defects, plan, ordered)
        finished.append(Explanation(defects, plan, fit))
        if fit.excess > nearly(probes):
            limit = min(limit, fit.residual)
    return finished


def roughly_off(plan: Plan, probe: Probe) -> float:
    """Return how far a plan is from an answer, in a norm that is quick to compute."""
    try:
        output = carry_out(plan, probe.case).output
    except NotApplicable:
        return math.inf
    given, differs = probe.output, 0.0
    off = _length(output - given)
    if not math.isfinite(off):
        differs = float((output.isfinite() != given.isfinite()).double().mean())
        output, given = _finite(output), _finite(given)
        off = _length(_finite(output - given))
    return off / max(_length(output) + _length(given), 1e-30) + differs


def _length(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor))


Single: TypeAlias = tuple[Defect, Plan]
Pair: TypeAlias = tuple[tuple[Defect, Defect], Plan]


def pairs_of(alone: Search) -> tuple[Pair, ...]:
    """Return every plan with two of the defects that were compared alone."""
    return _pairs(tuple((one.defects[0], one.plan) for one in alone.explanations))


@lru_cache(maxsize=8)
def _pairs(singles: tuple[Single, ...]) -> tuple[Pair, ...]:
    """Every plan with two defects once, in both orders where they do not commute."""
    known = {plan for _, plan in singles} | {Plan()}
    changes = [
        (defect, next(change for change in defect.changes if change(Plan()) == plan))
        for defect, plan in singles
    ]
    pairs = []
    for (first, plan), (second, change) in product(singles, changes):
        both = plan if first is second else change(plan)
        if both not in known:
            known.add(both)
            pairs.append(((first, second), both))
    return tuple(pairs)


def _measure_until(
    limit: float, defects: Sequence[Defect], plan: Plan, probes: Sequence[Probe]
) -> Fit:
    fit = Fit(0.0, 0.0)
    tolerant = is_tolerant(defects)
    for one in probes:
        fit = _worst([fit, measure(plan, [one], tolerant=tolerant)])
        if fit.residual > limit:
            break
    return fit


# --- constants


def explain_by_constant(
    probes: Sequence[Probe], bases: Sequence[Explanation], catalogue: Sequence[Defect] = DEFECTS
) -> list[Explanation]:
    """Fit one constant, besides each of some plans, on the first answer; measure it on all."""
    by_name = {defect.name: defect for defect in catalogue}
    fits: dict[str, Callable[[Plan, Probe], float | None]] = {
        "temperature": _temperature,
        "output_factor": _output_factor,
    }
    found = []
    limit = math.inf
    for base in bases:
        for name, fit in fits.items():
            if name not in by_name:
                continue
            constant = fit(base.plan, probes[0])
            if constant is None or abs(constant - 1.0) < _least_step(base.plan, probes[0]):
                continue
            plan = _with_constant(base.plan, name, constant)
            defects = (*base.defects, by_name[name])
            quality = _measure_until(limit, defects, plan, probes)
            found.append(Explanation(defects, plan, quality, constant))
            if quality.excess > nearly(probes):
                limit = min(limit, quality.residual)
    return found


def _least_step(plan: Plan, probe: Probe) -> float:
    """How far from 1 a constant must be not to be fitted to rounding."""
    coarse = plan.scores_dtype or plan.weights_dtype
    rounded = torch.finfo(coarse).eps if coarse else 0.0
    return max(1e-6, _STEPS * probe.tolerance, _STEPS * rounded)


def _with_constant(plan: Plan, name: str, constant: float) -> Plan:
    if name == "temperature":
        return replace(plan, temperature=plan.temperature * constant)
    return replace(plan, output_factor=plan.output_factor * constant)


def _output_factor(plan: Plan, probe: Probe) -> float | None:
    result = expected(plan, probe.case)
    if result is None or not bool((result.output.isfinite() == probe.output.isfinite()).all()):
        return None
    output, given = _finite(result.output), _finite(probe.output)
    length = float(output.square().sum())
    return float((output * given).sum()) / length if length > 0 else None


def _temperature(plan: Plan, probe: Probe) -> float | None:
    """The factor of the scores that comes nearest: a coarse search, then Gauss and Newton."""

    def off(logarithm: float) -> Tensor | None:
        result = expected(_with_constant(plan, "temperature", math.exp(logarithm)), probe.case)
        return None if result is None else _finite(result.output - probe.output).flatten()

    nothing = off(0.0)
    if nothing is None or not bool(nothing.any()):
        return None
    grid = [step * 0.5 for step in range(-8, 9)]
    best = min(grid, key=lambda at: _size(off(at)))
    for _ in range(12):
        here, there = off(best), off(best + 1e-5)
        if here is None or there is None:
            return None
        slope = (there - here) / 1e-5
        steepness = float(slope.square().sum())
        if steepness <= 0.0:
            return None
        step = float((slope * here).sum()) / steepness
        best -= max(-0.5, min(0.5, step))
        if abs(step) < 1e-14:
            break
    return math.exp(best)


def _size(vector: Tensor | None) -> float:
    return math.inf if vector is None else _length(vector)
