"""What attention over several ranks does wrong: it takes shards for what they are not.

A call that is not sharded is not misread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from .decisions import ROWS, Misreading, defect
from .misreadings import Case, NotApplicable, padded, ruled
from .shards import SCHEMES, Shards

# For each position of a sequence, the one that it is taken for: another tensor (length,).
Order: TypeAlias = Callable[[Shards, int], Tensor]


def _sharded(misread: Callable[[Case, Shards], Case]) -> Misreading:
    return lambda case: case if case.shards is None else misread(case, case.shards)


def _within(case: Case, behind: Tensor, *, causal: bool = False, window: bool = False) -> Tensor:
    """Where causality and the window permit, (query_len, key_len), of other distances."""
    at, seen = case.everywhere(case.query.device), torch.ones_like(behind, dtype=torch.bool)
    at = replace(at, behind=behind[None])
    if causal and case.causal:
        seen &= (at.within(None, 0) | (at.key < case.prefix))[0]
    if window and case.window is not None:
        seen &= (at.within(*case.window) | (at.key < case.sink_keys))[0]
    return seen


def _distances(query: Tensor, key: Tensor) -> Tensor:
    return query[:, None] - key[None, :]


# --- shards in another order


def _as_scheme(number: int, shards: Shards, length: int) -> Tensor:
    """Taken for shards of another scheme."""
    own = "ring" if shards.scheme == "ulysses" else shards.scheme
    other = [name for name in SCHEMES[:3] if name != own][number]
    return _taken_for(shards, Shards(other, shards.ranks), length, lambda rank: rank)


def turned(by: int, shards: Shards, length: int) -> Tensor:
    """Taken for the shard of the rank before or after, or, by 0, from the other end."""
    ranks = shards.ranks
    return _taken_for(
        shards, shards, length, lambda rank: (rank + by) % ranks if by else ranks - 1 - rank
    )


def _taken_for(shards: Shards, other: Shards, length: int, rank_of: Callable[[int], int]) -> Tensor:
    found, there = torch.empty(length, dtype=torch.long), other.of(length)
    for rank, positions in enumerate(shards.of(length)):
        taken = there[rank_of(rank)]
        if len(taken) != len(positions):
            raise NotApplicable("shards of other lengths are not taken for one another")
        found[positions] = taken
    return found


_ORDERS: tuple[Order, ...] = (
    *(partial(_as_scheme, number) for number in (0, 1)),
    *(partial(turned, by) for by in (0, 1, -1)),
)


def _has_positions(case: Case) -> bool:
    return case.causal or case.window is not None


def _positions(order: Order, whose: str, case: Case, shards: Shards) -> Case:
    """Rules of positions are told of the wrong ones."""
    if not _has_positions(case):
        return case
    query, key = (
        order(shards, length) if whose in ("both", name) else torch.arange(length)
        for name, length in (("query", case.query_len), ("key", case.key_len))
    )
    seen = _within(case, _distances(query, key), causal=True, window=True)
    return ruled(case, seen, causal=False, window=None)


def _ring_backwards(case: Case, shards: Shards) -> Case:
    """Keys travel one way around the ring, and are taken for those that travel the other way."""
    if not _has_positions(case):
        return case
    there = shards.of(case.key_len)
    if len({len(one) for one in there}) > 1:
        raise NotApplicable("shards of other lengths are not taken for one another")
    own, its = shards.owner(case.query_len)[:, None], shards.owner(case.key_len)[None]
    taken = torch.stack(there)[(2 * own - its) % shards.ranks, shards.local(case.key_len)[None]]
    seen = _within(case, torch.arange(case.query_len)[:, None] - taken, causal=True, window=True)
    return ruled(case, seen, causal=False, window=None)


def _values(order: Order, case: Case, shards: Shards) -> Case:
    return replace(case, value=case.value[:, :, order(shards, case.key_len)])


def _outputs(order: Order, case: Case, shards: Shards) -> Case:
    """Each rank answers the queries of another one."""
    place = order(shards, case.query_len)
    seen = case.seen[:, :, place]
    case = replace(case, query=case.query[:, :, place], mask=None, causal=False, window=None)
    return replace(case, mask=seen)


# --- rules that are told local positions


def _local(case: Case, shards: Shards) -> tuple[Tensor, Tensor]:
    """How far each key is behind in its shard, and whether it is of the query's own shard."""
    query, key = case.query_len, case.key_len
    behind = _distances(shards.local(query), shards.local(key))
    return behind, _distances(shards.owner(query), shards.owner(key)) == 0


def _causal_alone(form: str, case: Case, shards: Shards) -> Case:
    if not case.causal:
        return case
    behind, own = _local(case, shards)
    local = _within(case, behind, causal=True)
    if form == "own":
        local = local | ~own
    elif form == "whole":
        local = _distances(shards.owner(case.query_len), shards.owner(case.key_len)) >= 0
    return ruled(case, local, causal=False)


def _window_alone(form: str, case: Case, shards: Shards) -> Case:
    if case.window is None:
        return case
    behind, own = _local(case, shards)
    if form == "own":  # and none elsewhere
        true = _distances(torch.arange(case.query_len), torch.arange(case.key_len))
        return ruled(case, _within(case, true, window=True) | ~own, window=None)
    return ruled(case, _within(case, behind, window=True), window=None)


def _alone(case: Case, shards: Shards) -> Case:
    return ruled(case, _local(case, shards)[1])


# --- a last shard that is shorter


def _padded(masked_too: bool, case: Case, shards: Shards) -> Case:
    return padded(-(-case.key_len // shards.parts) * shards.parts, masked_too, case)


def _cut_off(queries_too: bool, case: Case, shards: Shards) -> Case:
    """All shards as short as the shortest."""
    shortest = min(len(one) for one in shards.of(case.key_len))
    if all(len(one) == shortest for one in shards.of(case.key_len)):
        return case
    seen = (shards.local(case.key_len) < shortest).expand(case.query_len, -1)
    if queries_too:
        seen = seen & (shards.local(case.query_len) < shortest)[:, None]
    return ruled(case, seen)


def _forms(*misreadings: Callable[[Case, Shards], Case]) -> list[Misreading]:
    return [_sharded(one) for one in misreadings]


def _orders() -> Iterator[Callable[[Case, Shards], Case]]:
    for order in _ORDERS:
        yield from (partial(_positions, order, whose) for whose in ("both", "query", "key"))
        yield from (partial(_values, order), partial(_outputs, order))


SHARDED = (
    defect("shards_out_of_order",
           "whose shards are taken in another order than the one they lie in",
           misread=_forms(_ring_backwards, *_orders())),
    defect("shards_causal_alone",
           "whose causality is counted within each shard, not over the whole sequence",
           misread=_forms(*(partial(_causal_alone, form) for form in ("every", "own", "whole")))),
    defect("shards_window_alone",
           "whose window is counted within each shard, not over the whole sequence",
           misread=_forms(*(partial(_window_alone, form) for form in ("every", "own"))),
           fully_masked=ROWS),
    defect("shards_alone", "that sees the keys of its own shard alone", misread=_sharded(_alone)),
    defect("shards_padded",
           "that attends to the zeros with which the last shard is filled up",
           misread=_forms(*(partial(_padded, too) for too in (True, False)))),
    defect("shards_cut_off", "whose shards are all cut off where the shortest ends",
           misread=_forms(*(partial(_cut_off, too) for too in (False, True))), fully_masked=ROWS),
    defect("shards_dropped_alike",
           "whose ranks drop the same weights, as from one seed of dropout for all of them",
           seen="randomness"),
)  # fmt: skip
