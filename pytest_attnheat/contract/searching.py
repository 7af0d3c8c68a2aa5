"""The search for plans that reproduce what a subject answered.

First each known defect alone, then with a constant, then two at once. For more than two: most
defects show in some cases alone, under a mask, when causal, in long inputs. So the cases are
explained one after another, those first that the fewest defects change, and where a case is not
yet explained what explained those before it is extended by one defect.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, product

import torch
from torch import Tensor

from ..attention.defects import DEFECTS, Defect
from ..attention.outcomes import (
    Decisions,
    Expected,
    decisions_of,
    expected,
    finite,
    is_large,
    together,
)
from ..attention.plan import Plan
from ..attention.tolerance import is_fine
from .matching import PERFECT, Answers, Explanation, nearly, worst
from .probing import Probe

# Constants are not looked for within so many times what rounding does.
_STEPS = 4.0
# What the factors of the scores that are tried first are powers of, and how near the nearest of
# them comes, as a part of the output, where one between them fits.
_GRID, _NEAR = [step * 0.5 for step in range(-8, 9)], 0.3
# So many pairs are measured in full that reproduce nothing, to say how far the next best is.
_NEXT = 20
# So many explanations of the cases so far are kept.
_KEPT = 12
# On a case that comes last few explanations are tried.
_KEPT_LARGE = 2
_BY_NAME = {defect.name: defect for defect in DEFECTS}


class Search:
    """The search among the known defects for what a subject computes.

    `singles` are the plans with one defect that were compared, `telling` how many of them change
    each case, and `unseen` the defects that change nothing on these cases.
    """

    def __init__(self, probes: Sequence[Probe], *, keep: bool = False) -> None:
        """Compare the answers with attention that carries each known defect."""
        # `keep`: keep what they give on these cases, for the next subject that is asked them.
        self.answers = Answers(probes, keep=keep)
        self._begun: list[Explanation] = []  # pairs that reproduce the first case that is wrong
        self.singles: list[Explanation] = []
        self.unseen: list[str] = []
        self.telling = [0] * len(probes)
        # Coarse steps do not show in answers that are as coarse.
        known = [d for d in DEFECTS if d.seen != "rounding" or is_fine(probes[0].dtype)]
        for defect in known:
            self._add(defect)
        self.compared = len(self.singles)
        fits = [self.answers.compare(i, self.singles) for i in range(len(probes))]
        for one, own in zip(self.singles, zip(*fits, strict=True), strict=True):
            one.fit = worst(own)
        self.singles = [one for one in self.singles if not self._only_masks_rows(one)]

    def _add(self, defect: Defect) -> None:
        """Add the variants of a defect that change something, and not the same as another."""
        outcomes = self.answers.outcomes
        healthy = tuple(of.healthy for of in outcomes)
        known = {healthy}
        for change in defect.changes:
            decided = decisions_of(change)
            if len(decided) > 1 and "fully_masked" in decided:
                # What becomes of rows without keys is a defect of its own.
                rows = {"fully_masked": decided["fully_masked"]}
                known.add(tuple(of.of(rows) for of in outcomes))
            given = tuple(of.of(decided) for of in outcomes)
            if given in known:
                continue
            known.add(given)
            self.singles.append(Explanation((defect,), decided))
            for i, (one, right) in enumerate(zip(given, healthy, strict=True)):
                self.telling[i] += one is not right
        if defect.changes and (not self.singles or self.singles[-1].defects != (defect,)):
            self.unseen.append(defect.name)

    def _only_masks_rows(self, one: Explanation) -> bool:
        """Whether answers that a plan reproduces show only what it makes of rows without keys."""
        if not one.reproduces or len(one.decided) == 1 or "fully_masked" not in one.decided:
            return False
        meanings = ("zero", "uniform", "nan", "natural")
        simpler = (Explanation((), {"fully_masked": meaning}) for meaning in meanings)
        return any(self.answers.measured(one).reproduces for one in simpler)

    def _in_order(self) -> list[int]:
        """The numbers of the cases, those first that the fewest defects change; large ones last."""
        probes = self.answers.probes
        return sorted(range(len(probes)), key=lambda i: (is_large(probes[i].case), self.telling[i]))

    def in_some_cases(self) -> list[Explanation]:
        """Return the defects that reproduce every wrong answer, in one form of them or another."""
        # Where they would change answers that are right, the subject has them in some calls alone.
        count = range(len(self.answers.probes))
        wrong = [i for i in count if self.answers.compare(i, [Explanation()])[0].excess > 1.0]
        found = []
        for defects, forms in groupby(self.singles, key=lambda one: one.defects):
            some = list(forms)
            fits = list(zip(*(self.answers.compare(i, some) for i in wrong), strict=True))
            whole = min(map(worst, fits), key=lambda fit: fit.excess)
            if whole.excess > 1.0:
                each = (min(of, key=lambda fit: fit.excess) for of in zip(*fits, strict=True))
                whole = worst(each)
            if whole.excess <= 1.0:
                found.append(Explanation(defects, fit=whole, partly=True))
        return found

    def in_pairs(self) -> list[Explanation]:
        """Compare the answers with attention that carries two defects."""
        # All pairs are compared on the first case that is wrong, what comes near on the next.
        # Returns what comes near on all cases, and the best of what does not.
        limit = nearly(self.answers.probes)
        correct = Explanation()
        ordered = self._in_order()
        right = {i: self.answers.compare(i, [correct])[0].excess <= 1.0 for i in ordered}
        ordered.sort(key=right.__getitem__)  # those that are wrong first: they exclude most
        if is_large(self.answers.probes[ordered[0]].case):
            return []
        alive, others = list(self._pairs()), list[Explanation]()
        self.compared += len(alive)
        for i in ordered:
            for one, fit in zip(alive, self.answers.compare(i, alive), strict=True):
                one.fit = worst((one.fit, fit))
            others += [one for one in alive if one.fit.excess > limit]
            alive = [one for one in alive if one.fit.excess <= limit]
            if i == ordered[0]:
                self._begun = [one for one in alive if one.reproduces]
        best = heapq.nsmallest(_NEXT, others, key=lambda one: one.fit.residual)
        return alive + [self.answers.measured(one) for one in best]

    def _pairs(self) -> Iterator[Explanation]:
        """Every plan with two defects, in both orders where they decide one thing differently."""
        for number, first in enumerate(self.singles):
            for second in self.singles[number + 1 :]:
                defects = first.defects + second.defects
                if first.defects == second.defects:
                    continue
                both = together(first.decided, second.decided)
                yield Explanation(defects, both, PERFECT)
                if len(both) < len(first.decided) + len(second.decided):
                    other = together(second.decided, first.decided)
                    if other != both:
                        yield Explanation(defects[::-1], other, PERFECT)

    # --- constants

    def by_constant(
        self, bases: Sequence[Explanation], i: int = 0, *, factors: bool = False
    ) -> list[Explanation]:
        """Fit a constant, besides each of some plans, to answer `i`; measure it on all."""
        # What was fitted need not reproduce anything.
        probe, outcomes = self.answers.probes[i], self.answers.outcomes[i]
        alike: dict[Expected, list[Explanation]] = {}
        for base in bases:
            if (outcome := outcomes.of(base.decided)) is not None:
                alike.setdefault(outcome, []).append(base)
        found: list[Explanation] = []
        limit = math.inf
        for outcome, some in alike.items():
            constants: dict[str, float | None] = {}
            if not factors:
                constants["temperature"] = self._temperature(some[0].decided, outcome, i)
            constants["output_factor"] = _output_factor(outcome, probe)
            for (name, constant), base in product(constants.items(), some):
                if name == "temperature" and base.names[-1:] == ("scale_of_another_width",):
                    continue  # a fixed scale times a constant is a fixed scale
                if constant is None or abs(constant - 1.0) < _least_step(base.decided, probe):
                    continue
                defects = (*base.defects, _BY_NAME[name])
                decided = _with_constant(base.decided, name, constant)
                one = self._until(limit, Explanation(defects, decided, PERFECT, constant), i)
                found.append(one)
                if one.fit.excess > nearly(self.answers.probes):
                    limit = min(limit, one.fit.residual)
        self.compared += len(found)
        return found

    def _until(self, limit: float, one: Explanation, first: int) -> Explanation:
        """Measure case by case, from one of them on, until it is farther off than a limit."""
        count = len(self.answers.probes)
        for i in (first, *(i for i in range(count) if i != first)):
            one.fit = worst((one.fit, *self.answers.compare(i, [one])))
            if one.fit.residual > limit:
                break
        return one

    def _temperature(self, decided: Decisions, outcome: Expected, i: int) -> float | None:
        """The factor of the scores that comes nearest: a coarse search, then Gauss and Newton."""
        probe, outcomes = self.answers.probes[i], self.answers.outcomes[i]

        def off(result: Expected | None) -> Tensor:
            return torch.tensor(math.inf) if result is None else _off(result, probe)

        def exactly(logarithm: float) -> Tensor:
            return off(expected(Plan(**_with_constant(decided, "temperature", math.exp(logarithm))),
                                probe.case))  # fmt: skip

        if not bool(_off(outcome, probe).any()):
            return None
        sizes = {
            at: length(off(outcomes.of(_with_constant(decided, "temperature", math.exp(at)))))
            for at in _GRID
        }
        best = min(_GRID, key=sizes.__getitem__)
        if not sizes[best] <= _NEAR * length(finite(probe.output)):
            return None
        for _ in range(12):
            here = exactly(best)
            slope = (exactly(best + 1e-5) - here) / 1e-5
            steepness = float(slope.square().sum())
            if not 0.0 < steepness < math.inf:
                return None
            step = float((slope * here).sum()) / steepness
            best -= max(-0.5, min(0.5, step))
            if abs(step) < 1e-14:
                break
        return math.exp(best)

    # --- several defects, step by step

    def step_by_step(self, fitted: Sequence[Explanation]) -> list[Explanation]:
        """Compare the answers with attention with several defects, one more at each step."""
        # Returns what reproduces every answer, if anything does.
        explained: list[int] = []
        kept = [Explanation()]
        for i in self._in_order():
            explained.append(i)
            kept = self._those_that_reproduce(kept, explained) or self._extended(
                kept, explained, fitted
            )
            if not kept:
                return []
            kept.sort(key=lambda one: len(one.defects))
            del kept[_KEPT:]
        return [self.answers.measured(one) for one in kept if one.defects]

    def _extended(
        self, kept: Sequence[Explanation], explained: Sequence[int], fitted: Sequence[Explanation]
    ) -> list[Explanation]:
        """What explains the last case as well, by the fewest more defects."""
        last = explained[-1]
        bases = kept[:_KEPT_LARGE] if is_large(self.answers.probes[last].case) else kept
        attempts: list[Callable[[], list[Explanation]]] = [
            lambda: self._with_one_more(bases),
            # One constant at most: a second one would be fitted to what the first left.
            lambda: self.by_constant([one for one in bases if one.constant is None], last),
        ]
        if not any(one.defects for one in kept):
            # Nothing is known yet: two at once may be needed to begin with.
            attempts += [lambda: list(fitted), lambda: self._begun]
        for attempt in attempts:
            tried = attempt()
            self.compared += len(tried)
            if found := self._those_that_reproduce(tried, explained):
                return _simplest(found, bases)
        return []

    def _with_one_more(self, bases: Sequence[Explanation]) -> list[Explanation]:
        tried = []
        for base in bases:
            for single in self.singles:
                decided = together(base.decided, single.decided)
                if single.defects[0] not in base.defects and decided != base.decided:
                    defects = (*base.defects, *single.defects)
                    tried.append(Explanation(defects, decided, PERFECT, base.constant))
        return tried

    def _those_that_reproduce(
        self, tried: Sequence[Explanation], explained: Sequence[int]
    ) -> list[Explanation]:
        left = list(tried)
        for i in reversed(explained):  # the last case first: it tells most of them apart
            fits = self.answers.compare(i, left)
            left = [one for one, fit in zip(left, fits, strict=True) if fit.excess <= 1.0]
        return left


def _simplest(found: list[Explanation], bases: Sequence[Explanation]) -> list[Explanation]:
    """Without what says nothing but what becomes of rows that have no keys."""
    known = [_but_for_rows(base.decided) for base in bases]
    only_masked_rows = [one for one in found if _but_for_rows(one.decided) in known]
    return only_masked_rows or found


def _but_for_rows(decided: Decisions) -> Decisions:
    return {name: one for name, one in decided.items() if name != "fully_masked"}


def _least_step(decided: Decisions, probe: Probe) -> float:
    """How far from 1 a constant must be not to be fitted to rounding."""
    coarse = [dtype for name, dtype in decided.items() if name.endswith("_dtype")]
    rounded = max((torch.finfo(dtype).eps for dtype in coarse), default=0.0)
    return max(1e-6, _STEPS * probe.tolerance, _STEPS * rounded)


def _with_constant(decided: Decisions, name: str, constant: float) -> Decisions:
    return {**decided, name: decided.get(name, 1.0) * constant}


def _off(outcome: Expected, probe: Probe) -> Tensor:
    return finite(outcome.output - probe.output).flatten()


def length(tensor: Tensor) -> float:
    """Return the length of a tensor as a vector."""
    return float(torch.linalg.vector_norm(tensor))


def _output_factor(outcome: Expected, probe: Probe) -> float | None:
    if not bool((outcome.output.isfinite() == probe.output.isfinite()).all()):
        return None
    output, given = finite(outcome.output), finite(probe.output)
    size = float(output.square().sum())
    return float((output * given).sum()) / size if size > 0 else None
