"""Every pair of declared features, and the smallest call of those that go wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch

from pytest_attnheat.attention.covering import Covering
from pytest_attnheat.attention.levels import Choice, Levels, shrunk, text_of
from pytest_attnheat.contract.examination import Examination, Skipped, is_about_dtypes
from pytest_attnheat.failure import Failure

# Features whose levels may be refused: all but what is asked of the answer.
_ASKED = ("numbers", "gradients")


@dataclass
class _Refusals:
    """What the subject turned out not to take, found by asking for little besides.

    Attributes:
        examination: What is examined.
        known: By what was refused, the levels of one feature or of two: its words, or None where
            it is taken.
    """

    examination: Examination
    known: dict[Levels, str | None] = field(default_factory=dict)

    @property
    def banned(self) -> frozenset[Levels]:
        """All levels, or pairs of them, that were refused."""
        return frozenset(some for some, reason in self.known.items() if reason)

    def of(self, chosen: Choice) -> str | None:
        """Return why a choice cannot be asked; None if one alone or two of its levels can."""
        special = self._special(chosen)
        for size in (1, 2):
            for some in combinations(special.items(), size):
                if reason := self._reason(some):
                    return reason
        return None

    def _special(self, chosen: Choice) -> dict[str, Any]:
        ordinary = self.examination.space.choice()
        return {
            name: level
            for name, level in chosen.items()
            if level != ordinary[name] and name not in _ASKED
        }

    def _reason(self, some: Levels) -> str | None:
        if some not in self.known:
            self.known[some] = self._ask(dict(some))
        return self.known[some]

    def _ask(self, levels: Mapping[str, Any]) -> str | None:
        try:
            call = self.examination.case(**levels)
        except Skipped:  # these alone are no call
            return None
        try:
            self.examination.spec.ask(call)
        except Exception as error:
            if is_about_dtypes(error):
                return None
            text = str(error).partition("\n")[0]
            return f"{text_of(levels)} ({type(error).__name__}: {text})"
        return None


def _taken(examination: Examination, refusals: _Refusals) -> Covering:
    """Return the cases that cover all pairs of what the subject does not refuse."""
    every = examination.space.covering()
    with torch.no_grad():
        for chosen in every.cases:
            try:
                examination.spec.ask(examination.drawn(chosen))
            except Exception:  # whatever it raises, it may be what it is asked
                refusals.of(chosen)
    return examination.space.covering(refusals.banned)


def ask_pairs(examination: Examination) -> str:
    """Judge the cases in which every pair of levels occurs; return how many that were.

    Raises:
        Failure: Some case is wrong. It is about the smallest call found that still is.
    """
    refusals = _Refusals(examination)
    covering = _taken(examination, refusals)
    refused = dict.fromkeys(reason for reason in refusals.known.values() if reason)
    wrong: list[tuple[dict[str, Any], Exception]] = []
    asked = 0
    for chosen in covering.cases:
        try:
            examination.judge(chosen, explain=False)
        except Exception as error:
            reason = None if isinstance(error, Failure) else refusals.of(chosen)
            if reason:
                refused[reason] = None
                continue
            wrong.append((chosen, error))
        asked += 1
    if not asked:
        raise Skipped("; ".join(refused) or "nothing can be asked")
    if wrong:
        _raise_smallest(examination, wrong, asked)
    note = f"{covering.pairs} pairs of levels in {asked} cases, all that can occur together"
    return note + (f"; it refuses {'; '.join(refused)}" if refused else "")


def _raise_smallest(
    examination: Examination, wrong: Sequence[tuple[dict[str, Any], Exception]], asked: int
) -> None:
    first, error = min(wrong, key=lambda one: len(_unlike(one[0], examination)))
    kind = type(error)
    smallest = shrunk(
        first, lambda chosen: isinstance(_error(chosen, examination), kind), examination.space
    )
    shared = {
        name: level
        for name, level in _unlike(first, examination).items()
        if all(other[name] == level for other, _ in wrong)
    }
    try:
        examination.judge(smallest)
    except Failure as failure:
        failure.cases = f"{len(wrong)} of {asked} are wrong" + (
            f", all with {text_of(shared)}" if shared else ""
        )
        text = text_of(_unlike(smallest, examination)) or "ordinary"
        failure.repeat = f"--attn-replay='{text}' (the smallest call), {failure.repeat}"
        raise
    raise error  # what keeps something from call to call need not go wrong twice


def _error(chosen: Choice, examination: Examination) -> Exception | None:
    try:
        examination.judge(chosen, explain=False)
    except Exception as error:
        return error
    return None


def _unlike(chosen: Choice, examination: Examination) -> dict[str, Any]:
    """The levels that are not ordinary."""
    ordinary = examination.space.choice()
    return {name: level for name, level in chosen.items() if level != ordinary[name]}
