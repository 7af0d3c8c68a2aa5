"""What plans give on one case, computed once for all plans that decide alike what matters on it.

Most decisions of a plan are never looked at on a case: those about masks where there is no mask.
And most that are looked at change nothing: blocks that are longer than the keys. So it is watched
which decisions each step of a plan reads, and what it comes to. What two plans give is the same
from the first step on at which all before came to the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from functools import lru_cache
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pytest_attnheat.attention.defects import Change
from pytest_attnheat.attention.misreadings import MISREADINGS
from pytest_attnheat.attention.mistakes import Expected, expected
from pytest_attnheat.attention.plan import Case, Plan, misread

# The decisions of a plan that differ from those of the correct one, by name.
Decisions: TypeAlias = Mapping[str, Any]
# Cases with more weights are large.
_LARGE = 2000
_USUAL: dict[str, Any] = {one.name: getattr(Plan(), one.name) for one in fields(Plan)}


def decisions_of(change: Change) -> Decisions:
    """Return what a defect decides."""
    plan = change(Plan())
    return {name: getattr(plan, name) for name in _USUAL if getattr(plan, name) != _USUAL[name]}


def together(first: Decisions, second: Decisions) -> dict[str, Any]:
    """Return what is decided where the second comes on top of the first."""
    both = {**first, **second}
    for name in first.keys() & second.keys():
        if isinstance(first[name], frozenset):
            both[name] = first[name] | second[name]
    return both


def is_large(case: Case) -> bool:
    """Return whether a case has so many weights that few plans are tried on it."""
    return math.prod(case.shape) > _LARGE


class _Node:
    """A point in carrying out plans: which decision is read next, or that a step ends here."""

    __slots__ = ("by_value", "ends", "name", "outcome", "reached", "then")

    def __init__(self) -> None:
        self.name: str | None = None
        self.by_value: dict[Any, _Node] = {}
        self.then: _Node | None = None  # where a step ends: the point of all that came to the same
        self.reached: Any = None  # what that step came to, if it is kept
        self.ends = False
        self.outcome: Expected | None = None

    def next(self, decided: Decisions) -> _Node | None:
        """Return where a plan goes from here, None if that is not known."""
        if self.name is None:
            return self.then
        return self.by_value.get(decided.get(self.name, _USUAL[self.name]))


class _Watched(Plan):
    """A plan that tells which of its decisions are read."""

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        # A copy of it tells nothing: all was read to make it.
        if name in _USUAL and (told := super().__getattribute__("__dict__").get("told")):
            told(name, value)
        return value


class Outcomes:
    """What plans give on a case.

    Attributes:
        case: The case.
        healthy: What correct attention gives. What hardly differs from it is the same object.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        # What steps came to on long inputs takes too much room.
        self._keeps = not is_large(case)
        self._root = _Node()
        # By the step before and what it came to.
        self._states: dict[tuple[int, int], _Node] = {}
        self._known: dict[int, Expected] = {}
        self._readings: dict[tuple[Case, str], Case] = {}
        self.healthy: Expected | None = None
        self.healthy = self.of({})

    def of(self, decided: Decisions) -> Expected | None:
        """Return what a plan gives, None if it cannot be carried out; the same is one object."""
        node: _Node | None = self._root
        while node is not None and not node.ends:
            node = node.next(decided)
        return self._computed(decided) if node is None else node.outcome

    def _computed(self, decided: Decisions) -> Expected | None:
        """Carry out a plan, but for the steps that are known."""
        node = last = self._root
        seen = set[str]()

        def told(name: str, value: Any) -> None:
            nonlocal node
            if name not in seen:
                seen.add(name)
                node.name = name
                node = node.by_value.setdefault(value, _Node())

        def step(function: Callable[..., Any], *arguments: Any) -> Any:
            nonlocal node, last
            known: _Node | None = node
            while known is not None and known.then is None:
                known = known.next(decided)
            if known is not None and known.then is not None and known.then.reached is not None:
                node = last = known.then
                return node.reached
            seen.clear()
            reached = self._read_as(plan) if function is misread else function(*arguments)
            same = id(last), _digest(reached)
            node.then = self._states.setdefault(same, _Node())
            node = last = node.then
            if node.reached is not None:
                return node.reached
            if self._keeps or isinstance(reached, Case):
                node.reached = reached
            return reached

        plan = object.__new__(_Watched)
        vars(plan).update(_USUAL, **decided, told=told)
        outcome = expected(plan, self.case, step)
        node.outcome, node.ends = self._one(outcome), True
        return node.outcome

    def _read_as(self, plan: Plan) -> Case:
        """The case as a plan reads it, each misreading done once."""
        case = self.case
        for name in sorted(plan.misread):
            if (case, name) not in self._readings:
                self._readings[case, name] = MISREADINGS[name](case)
            case = self._readings[case, name]
        return case

    def _one(self, outcome: Expected | None) -> Expected | None:
        if outcome is None:
            return None
        if self.healthy is not None and _equal(outcome, self.healthy):
            return self.healthy
        return self._known.setdefault(_digest(outcome), outcome)


kept_outcomes = lru_cache(maxsize=64)(Outcomes)


def _digest(reached: object) -> int:
    """A number that tells what was reached from all else, as long as that is kept."""
    if isinstance(reached, Expected):
        reached = reached.output, reached.largest_score
    if isinstance(reached, Case):
        reached = tuple(getattr(reached, one.name) for one in fields(Case) if one.name != "earlier")
    if isinstance(reached, tuple):
        return hash(tuple(map(_digest, reached)))
    if isinstance(reached, Tensor):
        return hash((reached.shape, reached.contiguous().numpy().tobytes()))
    return hash(repr(reached))


def _equal(one: Expected, other: Expected) -> bool:
    if torch.equal(one.output, other.output):
        return True
    return torch.allclose(one.output, other.output, rtol=1e-9, atol=1e-12, equal_nan=True)


def stacked(outcomes: Iterable[Expected]) -> Expected:
    """Return several outcomes of a case as one, with a dimension before all others."""
    some = list(outcomes)
    return Expected(
        torch.stack([one.output for one in some]),
        torch.stack([one.largest_score for one in some]),
        torch.tensor([one.ordinary for one in some], dtype=torch.float64)[:, None, None, None],
        some[0].unjudged,
    )
