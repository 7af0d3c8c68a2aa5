"""How well a plan reproduces what a subject answered.

What counts as rounding is said in `pytest_attnheat.attention.outcomes`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..attention.defects import Defect
from ..attention.outcomes import Decisions, Expected, Outcomes, expected, kept_outcomes, stacked
from ..attention.plan import Plan
from ..attention.tolerance import is_fine
from .probing import Probe

_MOST_ALLOWED = 0.5
# Where a step is rounded to a coarse dtype, another order of the same operations may round
# a number up or down: so many rows may be off by that.
_OTHER_WAY = 0.25
# By so many times the precision of that dtype, at most: a large score is rounded by more.
_MOST_STEPS = 8.0
# Explanations that are off by less than so many times what is allowed are not excluded.
_NEARLY, _NEARLY_IN_HALF = 10.0, 2.0
# So many numbers are compared at once.
_AT_ONCE = 2**20


@dataclass(frozen=True)
class Fit:
    """How far a plan is from the answers."""

    residual: float  # The worst relative rms over the cases
    excess: float  # The worst row, as a multiple of what rounding may do. At most 1: it reproduces.


PERFECT, NOWHERE = Fit(0.0, 0.0), Fit(math.inf, math.inf)


def worst(fits: Iterable[Fit]) -> Fit:
    """Return the worst of some fits."""
    known = [PERFECT, *fits]
    return Fit(max(fit.residual for fit in known), max(fit.excess for fit in known))


@dataclass(eq=False, slots=True)
class Explanation:
    """A plan that might be what the subject computes."""

    defects: tuple[Defect, ...] = ()  # What makes it differ from the correct plan, if it does
    decided: Decisions = field(default_factory=dict)  # What the plan decides otherwise
    fit: Fit = NOWHERE  # How far it is from the answers
    constant: float | None = None  # The constant that was fitted, if any
    partly: bool = False  # Whether it is compared with the wrong answers alone

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the defects."""
        return tuple(defect.name for defect in self.defects)

    @property
    def reproduces(self) -> bool:
        """Whether every answer is reproduced to within rounding."""
        return self.fit.excess <= 1.0

    @property
    def is_coarse(self) -> bool:
        """Whether one of the defects is a coarse step."""
        return any(defect.seen == "rounding" for defect in self.defects)


def errors(probe: Probe, outcome: Expected | None = None) -> tuple[Tensor, Tensor]:
    """Return the error of each row of an answer, and what rounding may do."""
    wanted = outcome or expected(Plan(), probe.case)
    assert wanted is not None
    return wanted.errors(probe.output, probe.dtype, least=probe.tolerance, most=_MOST_ALLOWED)


def wrong_rows(one: Probe) -> Tensor:
    """Return which rows of an answer are wrong, (batch, heads, query_len)."""
    error, allowed = errors(one)
    return error > allowed


def measure(probes: Sequence[Probe]) -> Fit:
    """Return how far correct attention is from all answers."""
    return worst(_fit(*errors(one)) for one in probes)


def _fit(error: Tensor, ratio_of: Tensor) -> Fit:
    return Fit(float(error.square().mean().sqrt()), float((error / ratio_of).max()))


def nearly(probes: Sequence[Probe]) -> float:
    """Return up to which excess an explanation is not excluded."""
    # What float16 and bfloat16 allow is large beside any defect: there it is 2, not 10.
    return _NEARLY if is_fine(probes[0].dtype) else _NEARLY_IN_HALF


class Answers:
    """What a subject answered, and how far what plans give is from it."""

    def __init__(self, probes: Sequence[Probe], *, keep: bool) -> None:
        self.probes = list(probes)
        of = kept_outcomes if keep else Outcomes
        self.outcomes = [of(one.case) for one in probes]
        self._fits: list[dict[Expected | None, Fit]] = [{None: NOWHERE} for _ in probes]

    def compare(self, i: int, explanations: Iterable[Explanation]) -> list[Fit]:
        """Return how far plans are from the answer to case `i`: all at once, each once."""
        fits, outcomes = self._fits[i], self.outcomes[i]
        some = list(explanations)
        given = [outcomes.of(one.decided) for one in some]
        new = [one for one in dict.fromkeys(given) if one is not None and one not in fits]
        at_once = max(1, _AT_ONCE // max(1, self.probes[i].output.numel()))
        for start in range(0, len(new), at_once):
            part = new[start : start + at_once]
            error, allowed = errors(self.probes[i], stacked(part))
            residual = error.square().mean((1, 2, 3)).sqrt().tolist()
            excess = (error / allowed).amax((1, 2, 3)).tolist()
            fits.update(zip(part, map(Fit, residual, excess), strict=True))
        return [
            self._tolerant(i, one, outcome) if one.is_coarse else fits[outcome]
            for one, outcome in zip(some, given, strict=True)
        ]

    def _tolerant(self, i: int, one: Explanation, outcome: Expected | None) -> Fit:
        """How far a plan with a coarse step is, of which a few rows are rounded the other way."""
        fit = self._fits[i][outcome]
        coarse = {name: dtype for name, dtype in one.decided.items() if name.endswith("_dtype")}
        if outcome is None or not coarse or fit.excess <= 1.0:
            return fit
        error, allowed = errors(self.probes[i], outcome)
        steps: Tensor | float = 2.0
        if coarse.keys() & {"scores_dtype", "products_dtype"}:
            steps = outcome.largest_score.clamp(2.0, _MOST_STEPS)
        eps = max(torch.finfo(dtype).eps for dtype in coarse.values())
        other_way = (error > allowed) & (error <= steps * eps)
        if float(other_way.double().mean()) > _OTHER_WAY:
            return fit
        return Fit(fit.residual, float((error / allowed).masked_fill(other_way, 1.0).max()))

    def measured(self, one: Explanation) -> Explanation:
        """Return an explanation with how far it is from all answers."""
        fits = (self.compare(i, [one])[0] for i in range(len(self.probes)))
        return replace(one, fit=worst(fits))
