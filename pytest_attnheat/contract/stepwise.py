"""The search for more than two defects at once, case by case.

Most defects show in some cases alone: under a mask, when causal, in long inputs. So the cases
are explained one after another, those first that the fewest defects change, and where a case is
not yet explained what explained those before it is extended by one defect.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from pytest_attnheat.attention.plan import Plan
from pytest_attnheat.contract.matching import (
    NOWHERE,
    Explanation,
    Search,
    explain_by_constant,
    is_tolerant,
    measure,
    pairs_of,
    roughly_off,
)
from pytest_attnheat.contract.probing import Probe

# So many explanations of the cases so far are kept.
_KEPT = 12
# Above so many weights a case comes last, and few explanations are tried on it.
_LARGE, _KEPT_LARGE = 2000, 2
# What is farther off than this does not reproduce a case, however it rounds.
_FAR = 0.2
_NOTHING = Explanation((), Plan(), NOWHERE)


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
    ways: list[Callable[[], list[Explanation]]] = [
        lambda: _with_one_more(bases, alone),
        lambda: _with_a_constant(bases, explained[-1]),
    ]
    if len(explained) == 1:
        # Nothing is known yet: two at once may be needed to begin with.
        ways.append(lambda: list(fitted))
        ways.append(lambda: _two_at_once(alone))
    for way in ways:
        tried = way()
        alone.compared += len(tried)
        if found := _those_that_reproduce(tried, explained):
            return _simplest(found, bases)
    return []


def _simplest(found: list[Explanation], bases: Sequence[Explanation]) -> list[Explanation]:
    """Without what only says in another way what becomes of rows that have no keys."""
    known = {replace(base.plan, lost=None) for base in bases}
    only_lost = [one for one in found if replace(one.plan, lost=None) in known]
    return only_lost or found


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


def _two_at_once(alone: Search) -> list[Explanation]:
    return [Explanation(defects, plan, NOWHERE) for defects, plan in pairs_of(alone)]


def _with_a_constant(bases: Sequence[Explanation], one: Probe) -> list[Explanation]:
    # One constant at most: a second one would be fitted to what the first left.
    return explain_by_constant([one], [base for base in bases if base.constant is None])


def _those_that_reproduce(
    tried: Sequence[Explanation], explained: Sequence[Probe]
) -> list[Explanation]:
    last = explained[-1]
    near = [one for one in tried if roughly_off(one.plan, last) < _FAR]
    # The last case first: it tells most of them apart.
    return [one for one in near if all(_reproduces(one, seen) for seen in reversed(explained))]


def _reproduces(one: Explanation, probe: Probe) -> bool:
    return _measured(one, [probe]).reproduces


def _measured(one: Explanation, probes: Sequence[Probe]) -> Explanation:
    return replace(one, fit=measure(one.plan, probes, tolerant=is_tolerant(one.defects)))
