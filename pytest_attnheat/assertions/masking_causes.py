"""Likely causes of weight in the wrong places, read from the map with the worst one.

Most causes are another mask than the one that was claimed. Such a mask is
named only where it explains all there is: no weight outside of it, and weight
on nearly all that it permits and the claimed one does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from ..attention.reference import padding_mask
from ..attention.vocabulary import ALIGNMENTS, Alignment, Side
from ..inputs import misuse, one_of, whole_number
from .causes import NEARLY_ALL, Evidence, dropout, opposite_mask, rows_of, share
from .claims import by_row
from .scan import blocks, row_of

# The most weights and batch entries that a sample of keys holds.
_SAMPLE = 2**17
_SAMPLE_ENTRIES = 64
# Of what is padding so much gets weight where no mask was applied; some weights underflow.
_MOST = 0.9
# The heads that a sentence names.
_HEADS_NAMED = 4
# Masked keys with less than this part of the largest permitted weight hold a little of it.
_LITTLE = 0.05
Candidate = tuple[Tensor, str]

# How far a weight of a uniform row is from 1 / key_len, as a part of it: bfloat16 rounds so.
_UNIFORM = 2**-8


def named(evidence: Evidence, found: Iterable[str | None]) -> str | None:
    """Return the first cause, and to which maps alone it applies."""
    sentence = next((cause for cause in found if cause is not None), None)
    where = _only_in(evidence)
    # In a batch of one, an index says as much.
    if sentence is None and evidence.weights.shape[0] == 1:
        return None
    return "; ".join(part for part in (sentence, where) if part) or None


def _only_in(evidence: Evidence) -> str | None:
    """Name the broken heads where whole heads are broken in every batch entry."""
    weights, claim = evidence.weights, by_row(evidence.finding.claim)
    if weights.ndim != 4:
        return None
    maps = torch.zeros(weights.shape[:2], dtype=torch.bool, device=weights.device)
    parts = blocks(weights, evidence.mask)
    for block in parts:
        maps[block.index[:2]] |= claim.breaks(block).any(-1)
    maps = maps if parts.placed is None else parts.placed.any_of(maps)
    heads = maps.any(0)
    if bool(heads.all()) or not torch.equal(maps, heads.expand_as(maps)):
        return None
    named = heads.nonzero().flatten().tolist()
    if len(named) > _HEADS_NAMED:
        return f"only in {len(named)} of {heads.numel()} heads"
    return f"only in head{'s' if len(named) > 1 else ''} {', '.join(map(str, named))}"


def mask_cause(evidence: Evidence) -> str | None:
    """Return a likely cause of weight that a mask forbids, or None."""
    return named(evidence, _mask_causes(evidence))


def support_cause(evidence: Evidence) -> str | None:
    """Return a likely cause of weight that is not where a mask permits it, or None."""
    if evidence.finding.claim.kind == "outside":
        return mask_cause(evidence)
    return named(evidence, _missing_causes(evidence))


def padding_cause(evidence: Evidence, lengths: Sequence[int], side: Side) -> str | None:
    """Return a likely cause of weight on padding, or None."""
    telling, seen = evidence.telling(), _seen_keys(evidence)
    found = (
        finite_mask(telling), other_padding(seen, lengths, side),
        padded_queries(telling, lengths, side),
        no_padding(seen, lengths, evidence.finding.broken / evidence.finding.of),
        not_a_number(evidence),
    )  # fmt: skip
    return named(evidence, found)


def not_a_number(evidence: Evidence) -> str | None:
    """A row that is NaN throughout, or masked keys that hold nothing but zeros and NaN."""
    worst = evidence.rows[evidence.queries == evidence.finding.worst.index[-2]]
    if bool(worst.isnan().all()):
        return "this row is NaN at every key: NaN in its scores, or no key left by the mask in use?"
    wrong = evidence.rows[~evidence.permitted]
    if not bool(wrong.isnan().any()) or bool((wrong.nan_to_num(nan=0.0) != 0).any()):
        return None
    return "all that masked keys hold is NaN: a product of 0 and infinity, or NaN made elsewhere?"


def finite_mask(evidence: Evidence) -> str | None:
    """Masked keys hold a little weight, far less than permitted ones."""
    rows, permitted = evidence.rows, evidence.permitted
    both = permitted.any(-1) & ~permitted.all(-1)
    if int(both.sum()) < 3 or share(rows[~permitted] > 0) < NEARLY_ALL or _like_others(evidence):
        return None
    most = float(rows[both].masked_fill(permitted[both], 0).max())
    return (
        f"masked keys get a little weight each, {most:.1e} at most: masked by a finite number that "
        "is too small, or clamped?"
    )


def _like_others(evidence: Evidence) -> bool:
    """Whether some masked key holds more than a little, beside the largest of its row."""
    rows, permitted = evidence.rows, evidence.permitted
    masked = rows.masked_fill(permitted, 0).amax(-1)
    largest = rows.masked_fill(~permitted, 0).amax(-1)
    return bool((masked > _LITTLE * largest)[permitted.any(-1)].any())


def _mask_causes(evidence: Evidence) -> Iterator[str | None]:
    telling = evidence.telling()
    yield finite_mask(telling)
    yield opposite_mask(telling)
    yield _transposed(telling)
    if _like_others(telling) and telling.explained_by(torch.ones_like(telling.permitted)):
        yield "masked keys get weight like the others: no mask was applied?"
    # Last: another mask may leave rows without a key, and those are NaN too.
    yield not_a_number(evidence)


def _transposed(evidence: Evidence) -> str | None:
    """The weights are those of the mask transposed."""
    mask, key_len = evidence.mask, evidence.weights.shape[-1]
    if (
        mask is not None
        and evidence.weights.shape[-2] == key_len == mask.shape[-1] == mask.shape[-2]
    ):
        indices = [(*evidence.place, query) for query in evidence.queries.tolist()]
        if evidence.explained_by(rows_of(mask.mT, indices, key_len)):
            return "weight lies where the transposed mask permits it: mask.mT?"
    return None


def padded_queries(evidence: Evidence, lengths: Sequence[int], side: Side) -> str | None:
    """Only queries that are padding themselves attend to padding."""
    query_len, key_len = evidence.weights.shape[-2:]
    length = lengths[evidence.place[0]]
    if query_len != key_len or not 0 < length < query_len:
        return None  # they are not the tokens that the keys are, or none of them is padding
    real = evidence.queries < length
    if side == "left":
        real = evidence.queries >= query_len - length
    leaks = ((evidence.rows != 0) & ~evidence.permitted).any(-1)
    if not bool(real.any()) or bool(leaks[real].any()) or not bool(leaks[~real].all()):
        return None
    future = torch.arange(key_len, device="cpu") > evidence.queries.unsqueeze(-1)
    if bool(future.any()) and not bool((evidence.rows[future] != 0).any()):
        return (
            "causal attention without a padding mask: only queries that are padding themselves "
            "reach it; pass the weights of the real queries, or mask the padding"
        )
    return (
        "only queries that are padding themselves attend to it: fully masked rows? Then pass the "
        "whole mask to assert_masked, with fully_masked="
    )


def other_padding(seen: Tensor, lengths: Sequence[int], side: Side) -> str | None:
    """Batch entries are masked, but as if other keys were padding; `seen` as of `_seen_keys`."""
    key_len = seen.shape[-1]
    if len(seen) < len(lengths):
        return None
    other: Side = "left" if side == "right" else "right"
    if torch.equal(seen, _real(lengths, key_len, other)):
        return f'weight lies exactly where side="{other}" permits it'
    found = [int(entry.sum()) for entry in seen]
    if not torch.equal(seen, _real(found, key_len, side)):
        return None
    if found == [min(length + 1, key_len) for length in lengths]:
        return "every batch entry sees exactly one padded key: the length is off by one?"
    return None


def no_padding(seen: Tensor, lengths: Sequence[int], part: float) -> str | None:
    """Every key of every batch entry gets weight, in some part of all that is padding."""
    padded = [i for i, length in enumerate(lengths[: len(seen)]) if length < seen.shape[-1]]
    if not padded or not bool(seen[padded].all()):
        return None
    if part > _MOST:
        return "padding gets weight like the rest: no padding mask was applied?"
    return (
        "padding gets weight in some rows or heads, and none in others: are these the weights of "
        "other heads or entries, or is the map turned?"
    )


def _real(lengths: Sequence[int], key_len: int, side: Side) -> Tensor:
    return padding_mask(lengths, key_len, side=side, device="cpu").flatten(1)


def _seen_keys(evidence: Evidence) -> Tensor:
    """Return which keys of each batch entry get weight from any query, ``(batch, keys)``."""
    weights, place = evidence.weights, evidence.place[1:]
    query_len, key_len = weights.shape[-2:]
    entries = min(weights.shape[0], _SAMPLE_ENTRIES)
    count = min(query_len, max(2, _SAMPLE // (entries * key_len)))
    # Causal queries see all real keys only at the end, so the last one must be among them.
    queries = [query_len - 1 - i * query_len // count for i in range(count)]
    seen = torch.zeros(entries, key_len, dtype=torch.bool, device="cpu")
    for entry in range(entries):
        for query in queries:
            # NaN tells nothing about the mask.
            row = row_of(weights, (entry, *place, query)).double().nan_to_num(nan=0.0)
            seen[entry] |= row != 0
    return seen


def _missing_causes(evidence: Evidence) -> Iterator[str | None]:
    """Yield causes of permitted keys without weight."""
    if evidence.finding.worst.value < 0:
        yield "negative weights: scores that no softmax has seen, or a difference of weights?"
        return
    query_len, key_len = evidence.weights.shape[-2:]
    finite = replace(evidence, permitted=evidence.permitted & evidence.rows.isfinite())
    permitted = finite.permitted
    if int(permitted.sum()) >= 2 and not bool(finite.rows[permitted].any()):
        finding = evidence.finding
        if finding.zeros == finding.of:
            yield "nothing holds weight where the mask permits it: never written?"
        yield "this map holds only zeros where the mask permits weight: a head that was left out?"
    # The one permitted key of a row is its first and its last: it says neither.
    several = permitted & (permitted.sum(-1, keepdim=True) > 1)
    keys = torch.arange(key_len, device="cpu")
    last = several & (several.flip(-1).int().cumsum(-1).flip(-1) == 1)
    first = several & (several.int().cumsum(-1) == 1)
    own = keys == finite.queries.unsqueeze(-1) + (key_len - query_len)
    single = permitted & ~several
    # Only where a window is full can it be cut short.
    count = permitted.sum(-1, keepdim=True)
    full = count == count.max()
    for missing, sentence in (
        (
            permitted & own,
            "no query gives weight to its own position: key < query in place of key <= query?",
        ),
        (last, "the last permitted key of every row gets no weight: off by one?"),
        (
            first & full,
            "the first permitted key gets no weight: off by one, or a window that is one key too "
            "narrow?",
        ),
        (
            permitted & (keys > finite.queries.unsqueeze(-1) + (key_len - query_len)),
            "no query gives weight to its future: a causal mask where none was meant?",
        ),
    ):
        if finite.lacks_exactly(missing) or finite.lacks_exactly(missing | single):
            yield sentence
    empty = (finite.rows == 0).all(-1, keepdim=True) & permitted
    if finite.lacks_exactly(empty):
        rows = int(empty.any(-1).sum())
        these = "1 row holds" if rows == 1 else f"{rows} rows hold"
        yield f"{these} only zeros although the mask permits keys"
    yield dropout(finite.rows, permitted)
    yield whole_after_dropout(finite)
    yield not_a_number(evidence)


def whole_after_dropout(evidence: Evidence) -> str | None:
    """Rows that dropout took nothing from tell its p, and the share of zeros is about the same."""
    # Where a few keys hold most weight, as in the first causal rows, sums vary too much for
    # `causes.dropout`.
    rows, permitted = evidence.rows, evidence.permitted
    gone = (rows == 0) & permitted
    whole = rows.sum(-1)[permitted.any(-1) & ~gone.any(-1)]
    if len(whole) < 2 or float(whole.min()) < 1.02 or float(whole.max() / whole.min()) > 1.01:
        return None
    factor, zeros = float(whole.median()), share(gone[permitted])
    p = 1 - 1 / factor
    if not 0.5 * p < zeros < 2 * p:
        return None
    return (
        f"{zeros:.0%} of the weights are zero, and rows without a zero sum to {factor:.3g}: "
        f"weights after dropout (p about {p:.2g})?"
    )


# --- causal attention as a rule, and what weights in the future or far in the past may follow


@dataclass(frozen=True)
class CausalRule:
    """Which keys a causal query may attend to."""

    query_len: int  # Number of queries
    key_len: int  # Number of keys
    alignment: Alignment  # Where query 0 stands
    window: int | None  # How many keys before its own position a query may attend to, None for all

    @classmethod
    def read(cls, query_len: int, key_len: int, alignment: object, window: object) -> CausalRule:
        """Read the arguments of `assert_causal`."""
        if alignment is None and query_len != key_len:
            got = f"None for {query_len} queries and {key_len} keys"
            accepted = (
                "'top_left' (query 0 stands at key 0: what is_causal=True means in PyTorch) or "
                "'bottom_right' (the last query stands at the last key: decoding with a cache)"
            )
            raise ValueError(misuse("alignment", got, accepted))
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

    def rows(self, queries: Tensor) -> Tensor:
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


def causal_cause(evidence: Evidence, rule: CausalRule, numbers: Tensor) -> str | None:
    """Return a likely cause of weight in the future, or before the window, or None."""
    telling = evidence.telling()
    others = _causal_candidates(numbers[telling.queries], rule)
    other = next((said for mask, said in others if telling.explained_by(mask)), None)
    causes = (finite_mask(telling), other, _uniform_rows(telling), not_a_number(evidence))
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


def _causal_candidates(queries: Tensor, rule: CausalRule) -> Iterator[Candidate]:
    """Yield other masks that causal code may have used by mistake."""
    # The widest first where some are the same: in small maps a window that is one too wide is no
    # window, and a diagonal that is off by one no mask.
    keys = torch.arange(rule.key_len, device="cpu")
    behind = queries.unsqueeze(-1) + rule.offset - keys  # how many keys; below 0 in its future
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
