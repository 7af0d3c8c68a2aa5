"""Sequences of several lengths in one tensor, one after the other, and how that goes wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .call import Call, Positions
from .decisions import ROWS, Misreading, defect
from .misreadings import Case, NotApplicable


def lengths_of(call: Call) -> tuple[Tensor, Tensor]:
    """Return how many queries and keys of each batch entry are real, (batch,) both."""
    batch, device = len(call.query), call.query.device
    given = (call.query_lengths, call.query_len), (call.lengths, call.key_len)
    queries, keys = (torch.full((batch,), most, device=device) if some is None else some
                     for some, most in given)  # fmt: skip
    return queries, keys


def bounds(lengths: Tensor) -> Tensor:
    """Return where each sequence begins in a packed tensor, and where the last ends."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def packed(tensor: Tensor, lengths: Tensor) -> Tensor:
    """Return the real part of each sequence, one after the other, (all lengths, heads, width)."""
    real = torch.arange(tensor.shape[2], device=tensor.device) < lengths[:, None]
    return tensor.transpose(1, 2)[real]


def unpacked(tensor: Tensor, lengths: Tensor, longest: int) -> Tensor:
    """Return sequences as a batch again, (batch, longest, ...), with zeros where there is none."""
    real = torch.arange(longest, device=tensor.device) < lengths[:, None]
    whole = tensor.new_zeros(len(lengths), longest, *tensor.shape[1:])
    return whole.index_put((real,), tensor)


# --- how it goes wrong


@dataclass(frozen=True)
class _Reading:
    """Which keys each sequence is given, of all in the packed tensor, and where it stands in them.

    Attributes:
        start: The first key, (batch,).
        stop: The key after the last, (batch,).
        stands: Where query 0 stands, counted from `start`, (batch,); None where that follows from
            how many keys it is given.
    """

    start: Tensor
    stop: Tensor
    stands: Tensor | None = None


def _corner(case: Case, start: Tensor, stop: Tensor) -> Tensor:
    """Where query 0 stands in the keys that a sequence is given."""
    if case.alignment == "top_left":
        return torch.zeros_like(start)
    return stop - start - lengths_of(case)[0]


def _misread(change: Callable[[Case, Tensor, Tensor], _Reading]) -> Misreading:
    """What each sequence is given where it is given something else than its own keys."""

    def misread(case: Case) -> Case:
        if case.query_lengths is None:
            return case
        if case.mask is not None or case.bias is not None:
            raise NotApplicable("packed sequences have no mask")
        ends = bounds(lengths_of(case)[1])
        reading = change(case, ends[:-1], ends[1:])
        start = reading.start.clamp(0, int(ends[-1]))
        stop = torch.maximum(start, reading.stop.clamp(max=int(ends[-1])))
        stands = reading.stands
        stands = _corner(case, start, stop) if stands is None else stands + reading.start - start
        return _given(case, start, stop, stands)

    return misread


def _given(case: Case, start: Tensor, stop: Tensor, stands: Tensor) -> Case:
    """The case whose sequences are given these keys."""
    keys = lengths_of(case)[1]
    at = start[:, None] + torch.arange(max(1, int((stop - start).max())))
    of_all = at.clamp(max=max(0, int(keys.sum()) - 1))
    key, value = (packed(t, keys)[of_all].transpose(1, 2) for t in (case.key, case.value))
    return given(case, key, value, at < stop[:, None], stands)


def given(case: Case, key: Tensor, value: Tensor, seen: Tensor, stands: Tensor) -> Case:
    """Return a case with other keys, and with all rules of positions as its mask."""
    # Key and value are (batch, heads, places, width), `seen` which of them are read, (batch,
    # places) or (batch, queries, places), and `stands` where query 0 of each sequence stands,
    # (batch,).
    maps, query = torch.arange(case.maps)[:, None, None], torch.arange(case.query_len)
    batch, head = maps // case.heads, maps % case.heads
    places = torch.arange(key.shape[2])[None, None]
    behind = query[None, :, None] + stands[batch] - places
    at = Positions(batch, head, query[None, :, None], places, behind)
    bare = replace(case, lengths=None, query_lengths=None)
    seen = seen if seen.ndim == 3 else seen[:, None]
    seen = (seen & (query < lengths_of(case)[0][:, None])[..., None])[:, None]
    seen = seen.expand(*case.query.shape[:3], -1)
    for rule in bare.rules(at):
        seen = seen & rule.expand(case.maps, -1, -1).view(seen.shape)
    distant = case.distant(at, torch.float64)
    bias = None if distant is None else distant.view(seen.shape)
    return replace(bare, key=key, value=value, mask=seen, bias=bias, causal=False, window=None,
                   chunk=None, alibi=None)  # fmt: skip


def _all_as_one(case: Case, start: Tensor, stop: Tensor) -> _Reading:
    queries, keys = lengths_of(case)
    own, total = bounds(queries), int(keys.sum())
    corner = total - int(own[-1]) if case.alignment == "bottom_right" else 0
    return _Reading(torch.zeros_like(start), torch.full_like(stop, total), own[:-1] + corner)


def _moved(first: int, last: int, *, stands: int | None = None) -> Misreading:
    """Some keys more or fewer at the ends, of sequences that have any."""
    # `stands`: where queries stand, by how much further than they did; None where that follows.

    def change(case: Case, start: Tensor, stop: Tensor) -> _Reading:
        place = None if stands is None else _corner(case, start, stop) + stands
        some = stop > start
        return _Reading(start + first * some, stop + last * some, place)

    return _misread(change)


def _corner_of_longest(case: Case, start: Tensor, stop: Tensor) -> _Reading:
    if case.alignment == "top_left":
        raise NotApplicable("it is counted from the top left, whatever the lengths")
    queries, keys = lengths_of(case)
    return _Reading(start, stop, torch.full_like(keys, int(keys.max() - queries.max())))


def _of_queries(case: Case, start: Tensor, stop: Tensor) -> _Reading:
    ends = bounds(lengths_of(case)[0])
    return _Reading(ends[:-1], ends[1:])


def _as_long(length: Callable[[Tensor], int], *, moved: bool) -> Misreading:
    """All sequences are as long as one; where they begin follows from that, or does not."""

    def change(case: Case, start: Tensor, stop: Tensor) -> _Reading:
        every = length(stop - start)
        begin = torch.arange(len(start)) * every if moved else start
        return _Reading(begin, begin + every)

    return _misread(change)


def _without_empty(case: Case, start: Tensor, stop: Tensor) -> _Reading:
    """Empty sequences are left out, so that those after them get the keys of the next."""
    left = (stop > start).nonzero()[:, 0]
    index = torch.arange(len(start))
    if not len(left):
        return _Reading(start, stop)
    taken = left[index.clamp(max=len(left) - 1)]
    end = torch.where(index < len(left), stop[taken], start[taken])
    return _Reading(start[taken], end)


def _of_other(step: int) -> Misreading:
    return _misread(lambda case, start, stop: _Reading(start.roll(step), stop.roll(step)))


def _first(lengths: Tensor) -> int:
    return int(lengths[0])


def _longest(lengths: Tensor) -> int:
    return int(lengths.max())


PACKED = (
    defect("packing_ignored", "that takes all packed sequences for one: it ignores where they end",
           misread=_misread(_all_as_one), fully_masked=ROWS),
    defect("packed_next_key", "whose packed sequences see the first key of the next one",
           misread=[_moved(0, 1, stands=0), _moved(0, 1)], fully_masked=ROWS),
    defect("packed_previous_key", "whose packed sequences see the last key of the one before",
           misread=[_moved(-1, 0), _moved(-1, 0, stands=0)], fully_masked=ROWS),
    defect("packed_last_key_lost", "whose packed sequences do not see their own last key",
           misread=[_moved(0, -1, stands=0), _moved(0, -1)], fully_masked=ROWS),
    defect("packed_first_key_lost", "whose packed sequences do not see their own first key",
           misread=[_moved(1, 0), _moved(1, 0, stands=0)], fully_masked=ROWS),
    defect("packed_keys_shifted", "whose packed sequences see keys one place too early or too late",
           misread=[_moved(1, 1), _moved(-1, -1)], fully_masked=ROWS),
    defect("packed_corner_of_longest",
           "whose packed sequences are all aligned as the longest one is", misread=_misread(
               _corner_of_longest), fully_masked=ROWS),
    defect("packed_by_queries",
           "that takes where queries begin and end for where keys do (cu_seqlens_q for both)",
           misread=_misread(_of_queries), fully_masked=ROWS),
    defect("packed_as_long", "that takes all packed sequences to be as long as the first, or the "
           "longest", misread=[_as_long(length, moved=moved) for length in (_first, _longest)
                               for moved in (True, False)], fully_masked=ROWS),
    defect("packed_empty_shifts",
           "whose packed sequences after an empty one see the keys of the next",
           misread=_misread(_without_empty), fully_masked=ROWS),
    defect("packed_of_another", "whose packed sequences see the keys of another one",
           misread=[_of_other(step) for step in (1, -1)], fully_masked=ROWS),
)  # fmt: skip
