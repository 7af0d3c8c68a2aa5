"""The search for plans that reproduce what a subject answered.

First each known defect alone, then with a constant, then two at once. For more than two: most
defects show in some cases alone, under a mask, when causal, in long inputs. So the cases are
explained one after another, those first that the fewest defects change, and where a case is not
yet explained what explained those before it is extended by one defect.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import TypeAlias

import torch
from torch import Tensor

from pytest_attnheat.attention.defects import DEFECTS, Defect
from pytest_attnheat.attention.mistakes import Expected, expected, finite
from pytest_attnheat.attention.plan import Case, Plan
from pytest_attnheat.attention.tolerance import is_fine
from pytest_attnheat.contract.matching import (
    NOWHERE,
    Explanation,
    fit_outcomes,
    is_tolerant,
    length,
    measure,
    measure_until,
    nearly,
    roughly_off,
)
from pytest_attnheat.contract.probing import Probe

# Constants are not looked for within so many times what rounding does.
_STEPS = 4.0
# So many pairs are compared on all cases.
_FINALISTS = 300
# So many explanations of the cases so far are kept.
_KEPT = 12
# Above so many weights a case comes last, and few explanations are tried on it.
_LARGE, _KEPT_LARGE = 2000, 2
# What is farther off than this does not reproduce a case, however it rounds.
_FAR = 0.2
_NOTHING = Explanation((), Plan(), NOWHERE)

# What single defects give on the usual cases: about 10 MB for the cases of one specification.
_kept = lru_cache(maxsize=8192)(expected)
Compute: TypeAlias = Callable[[Plan, Case], Expected | None]


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
        variants = () if skipped else (_variants_kept if keep else _variants)(defect, cases)
        for variant in variants:
            fit = fit_outcomes(variant.plan, variant.outcomes, probes, coarse)
            if fit.excess <= 1.0 and _only_masks_rows(variant.plan, probes):
                continue
            search.explanations.append(Explanation((defect,), variant.plan, fit))
            for i, changes in enumerate(variant.changes):
                search.telling[i] += changes
        search.compared += len(variants)
        if defect.changes and not variants:
            search.unseen.append(defect.name)
    return search


@dataclass(frozen=True, eq=False)
class _Variant:
    """A plan with one defect, what it gives on some cases, and whether it changes each of them."""

    plan: Plan
    outcomes: tuple[Expected | None, ...]
    changes: tuple[bool, ...]


def _variants(
    defect: Defect, cases: tuple[Case, ...], outcome_of: Compute = expected
) -> tuple[_Variant, ...]:
    """The variants of a defect that change something in some case, and not the same as another."""
    healthy = tuple(outcome_of(Plan(), case) for case in cases)
    variants: list[_Variant] = []
    for change in defect.changes:
        plan = change(Plan())
        outcomes = tuple(outcome_of(plan, case) for case in cases)
        changes = tuple(not _equal(a, b) for a, b in zip(outcomes, healthy, strict=True))
        only_masked_rows = replace(Plan(), fully_masked=plan.fully_masked)
        known = [variant.outcomes for variant in variants]
        if plan.fully_masked is not None and plan != only_masked_rows:
            # What becomes of rows without keys is a defect of its own.
            known.append(tuple(outcome_of(only_masked_rows, case) for case in cases))
        if any(changes) and not any(_same(outcomes, other) for other in known):
            variants.append(_Variant(plan, outcomes, changes))
    return tuple(variants)


@lru_cache(maxsize=512)
def _variants_kept(defect: Defect, cases: tuple[Case, ...]) -> tuple[_Variant, ...]:
    return _variants(defect, cases, _kept)


def _only_masks_rows(plan: Plan, probes: Sequence[Probe]) -> bool:
    """Whether answers that a plan reproduces show only what it makes of rows without keys."""
    simpler = replace(Plan(), fully_masked=plan.fully_masked)
    if plan.fully_masked is None or plan == simpler:
        return False
    outcomes = [expected(simpler, one.case) for one in probes]
    return fit_outcomes(simpler, outcomes, probes, False).excess <= 1.0


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
        fit = measure_until(limit, defects, plan, ordered)
        finished.append(Explanation(defects, plan, fit))
        if fit.excess > nearly(probes):
            limit = min(limit, fit.residual)
    return finished


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
            quality = measure_until(limit, defects, plan, probes)
            found.append(Explanation(defects, plan, quality, constant))
            if quality.excess > nearly(probes):
                limit = min(limit, quality.residual)
    return found


def _least_step(plan: Plan, probe: Probe) -> float:
    """How far from 1 a constant must be not to be fitted to rounding."""
    rounded = torch.finfo(plan.coarse).eps if plan.coarse else 0.0
    return max(1e-6, _STEPS * probe.tolerance, _STEPS * rounded)


def _with_constant(plan: Plan, name: str, constant: float) -> Plan:
    if name == "temperature":
        return replace(plan, temperature=plan.temperature * constant)
    return replace(plan, output_factor=plan.output_factor * constant)


def _output_factor(plan: Plan, probe: Probe) -> float | None:
    result = expected(plan, probe.case)
    if result is None or not bool((result.output.isfinite() == probe.output.isfinite()).all()):
        return None
    output, given = finite(result.output), finite(probe.output)
    length = float(output.square().sum())
    return float((output * given).sum()) / length if length > 0 else None


def _temperature(plan: Plan, probe: Probe) -> float | None:
    """The factor of the scores that comes nearest: a coarse search, then Gauss and Newton."""

    def off(logarithm: float) -> Tensor | None:
        result = expected(_with_constant(plan, "temperature", math.exp(logarithm)), probe.case)
        return None if result is None else finite(result.output - probe.output).flatten()

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
    return math.inf if vector is None else length(vector)


# --- several defects, step by step


def explain_step_by_step(
    probes: Sequence[Probe], alone: Search, fitted: Sequence[Explanation]
) -> list[Explanation]:
    """Compare the answers with attention that carries several defects, one more at each step.

    Args:
        probes: Cases and answers.
        alone: What single defects give; what is compared besides is counted there.
        fitted: What defects give with a constant besides, which may explain the first case.

    Returns:
        What reproduces every answer, if anything does.
    """
    order = sorted(range(len(probes)), key=lambda i: (_is_large(probes[i]), alone.telling[i]))
    explained: list[Probe] = []
    kept = [_NOTHING]
    for one in (probes[i] for i in order):
        explained.append(one)
        kept = _those_that_reproduce(kept, explained) or _extended(kept, explained, alone, fitted)
        if not kept:
            return []
        kept.sort(key=lambda explanation: len(explanation.defects))
        del kept[_KEPT:]
    return [_measured(one, probes) for one in kept if one.defects]


def _is_large(one: Probe) -> bool:
    batch, heads, query_len, key_len = one.case.shape
    return batch * heads * query_len * key_len > _LARGE


def _extended(
    kept: Sequence[Explanation],
    explained: Sequence[Probe],
    alone: Search,
    fitted: Sequence[Explanation],
) -> list[Explanation]:
    """What explains the last case as well, by the fewest more defects."""
    bases = kept[:_KEPT_LARGE] if _is_large(explained[-1]) else kept
    attempts: list[Callable[[], list[Explanation]]] = [
        lambda: _with_one_more(bases, alone),
        # One constant at most: a second one would be fitted to what the first left.
        lambda: explain_by_constant(explained[-1:], [one for one in bases if one.constant is None]),
    ]
    if len(explained) == 1:
        # Nothing is known yet: two at once may be needed to begin with.
        attempts.append(lambda: list(fitted))
        attempts.append(lambda: [Explanation(*pair, NOWHERE) for pair in pairs_of(alone)])
    for attempt in attempts:
        tried = attempt()
        alone.compared += len(tried)
        if found := _those_that_reproduce(tried, explained):
            return _simplest(found, bases)
    return []


def _simplest(found: list[Explanation], bases: Sequence[Explanation]) -> list[Explanation]:
    """Without what says nothing but what becomes of rows that have no keys."""
    known = {replace(base.plan, fully_masked=None) for base in bases}
    only_masked_rows = [one for one in found if replace(one.plan, fully_masked=None) in known]
    return only_masked_rows or found


def _with_one_more(bases: Sequence[Explanation], alone: Search) -> list[Explanation]:
    tried: dict[Plan, Explanation] = {}
    for base in bases:
        for single in alone.explanations:
            (defect,) = single.defects
            plan = single.change(base.plan)
            if defect not in base.defects and plan != base.plan:
                defects = (*base.defects, defect)
                tried.setdefault(plan, Explanation(defects, plan, NOWHERE, base.constant))
    return list(tried.values())


def _those_that_reproduce(
    tried: Sequence[Explanation], explained: Sequence[Probe]
) -> list[Explanation]:
    last = explained[-1]
    near = [one for one in tried if roughly_off(one.plan, last) < _FAR]
    # The last case first: it tells most of them apart.
    return [
        one
        for one in near
        if all(_measured(one, [seen]).reproduces for seen in reversed(explained))
    ]


def _measured(one: Explanation, probes: Sequence[Probe]) -> Explanation:
    return replace(one, fit=measure(one.plan, probes, tolerant=is_tolerant(one.defects)))
