"""Choosing few cases in which every pair of levels occurs together.

Defects that need three features at once are rare, those that need two are common (Kuhn, Wallace
and Gallo 2004: Software Fault Interactions); and where features have five levels each, all pairs
take some dozens of cases where all combinations take billions.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any, TypeAlias

Levels: TypeAlias = Mapping[str, Sequence[Any]]
Chosen: TypeAlias = Mapping[str, Any]
# The number of a feature and of its level, twice, in the order of the features.
_Pair: TypeAlias = tuple[int, int, int, int]
# Numbers of levels by the number of their feature.
_Case: TypeAlias = dict[int, int]

# Of each case so many are tried, and the one with most new pairs is taken.
_TRIES = 4


@dataclass(frozen=True)
class Covering:
    """Cases that cover all pairs."""

    cases: tuple[dict[str, Any], ...]  # A level for each feature
    pairs: int  # How many pairs of levels occur in some case: all that can
    impossible: int  # How many pairs cannot occur together in any case


def covering(
    levels: Levels,  # The levels of each feature, the most ordinary first
    # Whether some levels can occur together. It is asked of parts of a case, and may say no as soon
    # as it knows; a part of what is possible must be possible.
    possible: Callable[[Chosen], bool],
    *,
    known: Sequence[Chosen] = (),  # Cases that need not be found again: what they cover is covered
    seed: int = 0,  # Which of many coverings is found
) -> Covering:
    """Return cases (but those known) in which every pair of levels occurs that can."""
    # If none is known, the first has the first level of each feature, if that is possible.
    search = _Search(levels, possible, random.Random(seed))
    cases: list[_Case] = []
    for case in known:
        search.cover(search.numbered(case))
    ordinary = None if known else search.complete({}, ordinary=True)
    if ordinary is not None:
        cases.append(search.cover(ordinary))
    impossible = 0
    while search.missing:
        pair = next(iter(search.missing))
        part = {pair[0]: pair[1], pair[2]: pair[3]}
        tried = (search.complete(part) for _ in range(_TRIES))
        found = [case for case in tried if case is not None]
        if found:
            cases.append(search.cover(max(found, key=search.news)))
        else:
            del search.missing[pair]
            impossible += 1
    return Covering(tuple(map(search.named, cases)), search.every - impossible, impossible)


class _Search:
    """Which pairs are missing, and completing a part of a case."""

    def __init__(
        self, levels: Levels, possible: Callable[[Chosen], bool], chance: random.Random
    ) -> None:
        self._names, self._levels = list(levels), [list(some) for some in levels.values()]
        self._possible, self._random = possible, chance
        # How often nothing was found for a feature: those are decided first, so that what fits
        # nothing is seen at once and not in every case of all other features.
        self._stuck = [0] * len(self._names)
        # A dictionary keeps an order, so that the seed alone decides.
        self.missing: dict[_Pair, None] = dict.fromkeys(
            _pairs([len(some) for some in self._levels])
        )
        self.every = len(self.missing)

    def named(self, case: _Case) -> dict[str, Any]:
        """Return a case in words, in the order of the features."""
        return {self._names[one]: self._levels[one][case[one]] for one in sorted(case)}

    def numbered(self, case: Chosen) -> _Case:
        """Return a case in words as numbers."""
        return {one: self._levels[one].index(case[name]) for one, name in enumerate(self._names)}

    def complete(self, part: _Case, *, ordinary: bool = False) -> _Case | None:
        """Return a case with these levels, None if there is none."""
        # `ordinary`: prefer the first level of each feature to one that covers more pairs.
        if not self._possible(self.named(part)):
            return None
        left = [one for one in range(len(self._names)) if one not in part]
        if not left:
            return part
        self._random.shuffle(left)
        one = min(left) if ordinary else max(left, key=self._stuck.__getitem__)
        numbers = list(range(len(self._levels[one])))
        if not ordinary:
            self._random.shuffle(numbers)
            numbers.sort(key=lambda number: -self._news_of(part, one, number))
        for number in numbers:
            done = self.complete({**part, one: number}, ordinary=ordinary)
            if done is not None:
                return done
        self._stuck[one] += 1
        return None

    def news(self, case: _Case) -> int:
        """Count the missing pairs in a case."""
        return sum(pair in self.missing for pair in _pairs_in(case))

    def _news_of(self, part: _Case, one: int, number: int) -> int:
        """Count the missing pairs of one level with those of a part of a case."""
        return sum(
            ((other, at, one, number) if other < one else (one, number, other, at)) in self.missing
            for other, at in part.items()
        )

    def cover(self, case: _Case) -> _Case:
        """Count the pairs of a case as covered, and return it."""
        for pair in _pairs_in(case):
            self.missing.pop(pair, None)
        return case


def _pairs(counts: Sequence[int]) -> Iterator[_Pair]:
    for one, other in combinations(range(len(counts)), 2):
        for first, second in product(range(counts[one]), range(counts[other])):
            yield one, first, other, second


def _pairs_in(case: _Case) -> Iterator[_Pair]:
    for one, other in combinations(sorted(case), 2):
        yield one, case[one], other, case[other]
