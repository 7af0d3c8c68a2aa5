"""Causal attention as a rule, and what else weights in the future or far in the past may follow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import cast

import torch

from pytest_attnheat.assertions.causes import Evidence
from pytest_attnheat.assertions.masking_causes import finite_mask, named, not_a_number
from pytest_attnheat.attention.vocabulary import ALIGNMENTS, Alignment
from pytest_attnheat.inputs import misuse, one_of, whole_number

Candidate = tuple[torch.Tensor, str]

# How far a weight of a uniform row is from 1 / key_len, as a part of it: bfloat16 rounds so.
_UNIFORM = 2**-8


@dataclass(frozen=True)
class CausalRule:
    """Which keys a causal query may attend to.

    Attributes:
        query_len: Number of queries.
        key_len: Number of keys.
        alignment: Where query 0 stands.
        window: How many keys before its own position a query may attend to, None for all.
    """

    query_len: int
    key_len: int
    alignment: Alignment
    window: int | None

    @classmethod
    def read(cls, query_len: int, key_len: int, alignment: object, window: object) -> CausalRule:
        """Read the arguments of `assert_causal`.

        Raises:
            TypeError: The window is neither a whole number nor a pair of them.
            ValueError: The alignment is unknown, or missing where it matters; or the window is
                below 0 or reaches into the future.
        """
        if alignment is None and query_len != key_len:
            got = f"None for {query_len} queries and {key_len} keys"
            raise ValueError(
                misuse(
                    "alignment",
                    got,
                    "'top_left' (query 0 stands at key 0: what is_causal=True means in PyTorch) "
                    "or 'bottom_right' (the last query stands at the last key: decoding with a "
                    "cache)",
                )
            )
        if alignment is not None:
            one_of("alignment", alignment, ALIGNMENTS)
        named = cast("Alignment", alignment or "top_left")
        return cls(query_len, key_len, named, _keys_before(window))

    @property
    def offset(self) -> int:
        """The position of query 0, counted in keys."""
        return self.key_len - self.query_len if self.alignment == "bottom_right" else 0

    def __str__(self) -> str:
        """Say it in the words of the arguments."""
        named = "" if self.query_len == self.key_len else f" with alignment={self.alignment!r}"
        window = "" if self.window is None else f" and window={self.window}"
        return f"causal attention{named}{window}"

    def rows(self, queries: torch.Tensor) -> torch.Tensor:
        """Return the mask of some queries, ``(n, key_len)``; nothing wider than it is made."""
        keys = torch.arange(self.key_len, device=queries.device)
        position = queries.unsqueeze(-1) + self.offset
        permitted = keys <= position
        return permitted if self.window is None else permitted & (keys >= position - self.window)


def _keys_before(window: object) -> int | None:
    """Return how many keys before its own position a query may attend to, None for all."""
    if window is None:
        return None
    accepted = (
        "None, a whole number from 0 (how many keys before its own position a query may attend "
        "to) or a pair (left, 0)"
    )
    sides = window if isinstance(window, (tuple, list)) else (window, 0)
    try:
        if len(sides) != 2:
            raise TypeError
        left, right = (whole_number("window", side, least=0) for side in sides)
    except (TypeError, ValueError) as error:
        raise type(error)(misuse("window", repr(window), accepted)) from None
    if right != 0:
        got = f"{window!r}, which reaches into the future"
        raise ValueError(
            f"{misuse('window', got, accepted)}. For a window on both sides there is "
            "assert_masked with sliding_window_mask"
        )
    return left


def causal_cause(evidence: Evidence, rule: CausalRule, numbers: torch.Tensor) -> str | None:
    """Return a likely cause of weight in the future, or before the window, or None.

    Args:
        evidence: What was found.
        rule: What was claimed.
        numbers: Which query each row is of, ``(queries,)``.
    """
    telling = evidence.telling()
    candidates = _first_that_explains(telling, _causal_candidates(numbers[telling.queries], rule))
    causes = (finite_mask(telling), candidates, _uniform_rows(telling), not_a_number(evidence))
    return named(evidence, causes)


def _uniform_rows(evidence: Evidence) -> str | None:
    """Rows that break the mask hold one number throughout, as fully masked rows may."""
    leaks = ((evidence.rows != 0) & ~evidence.permitted).any(-1)
    broken = evidence.rows[leaks]
    key_len = broken.shape[-1]
    if key_len < 2 or not bool(leaks.any()) or bool(leaks.all()):
        return None
    if bool(((broken * key_len - 1).abs() > _UNIFORM).any()):
        return None
    return (
        "these rows are uniform: fully masked, by a finite number? Pass the whole mask to "
        'assert_masked with fully_masked="uniform"'
    )


def _causal_candidates(queries: torch.Tensor, rule: CausalRule) -> Iterator[Candidate]:
    """Yield other masks that causal code may have used by mistake.

    The widest first where some are the same: in small maps a window that is
    one too wide is no window, and a diagonal that is off by one no mask.
    """
    # How many keys each key is behind each query, below 0 in its future.
    keys = torch.arange(rule.key_len, device="cpu")
    behind = queries.unsqueeze(-1) + rule.offset - keys
    if rule.query_len != rule.key_len:
        name: Alignment = "top_left" if rule.alignment == "bottom_right" else "bottom_right"
        other = replace(rule, alignment=name).rows(queries)
        yield other, f'weight lies exactly where alignment="{name}" permits it'
    yield (
        torch.ones_like(behind, dtype=torch.bool),
        ("every query gives weight to every key: no mask was applied?"),
    )
    if rule.window is None:
        yield (
            behind >= -1,
            "every query sees exactly one key of its future: the diagonal is off by one?",
        )
    else:
        yield behind >= 0, f"every query sees all keys before it: no window of {rule.window}?"
        yield (
            (behind >= 0) & (behind <= rule.window + 1),
            "every query sees exactly one key before its window: the window is one key too wide?",
        )
        yield (
            (behind >= -1) & (behind <= rule.window),
            "every query sees exactly one key of its future: the diagonal is off by one?",
        )
        yield (
            behind.abs() <= rule.window,
            "the window reaches as far into the future as into the past: no causal mask?",
        )
    yield behind <= 0, "every query sees itself and its future, not its past: mask.mT?"
    yield (
        ~rule.rows(queries),
        "all weight lies on keys that causal attention forbids: a mask of the opposite meaning?",
    )


def _first_that_explains(evidence: Evidence, candidates: Iterable[Candidate]) -> str | None:
    for other, sentence in candidates:
        if evidence.explained_by(other):
            return sentence
    return None
