"""How a cache of keys and values goes wrong: other slots are read, too many, or too few.

What is read there is computed from what the slots hold, see `storage`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
from torch import Tensor

from .decisions import ROWS, Misreading, defect
from .misreadings import Case, NotApplicable
from .packing import given, lengths_of
from .storage import Cache, laid_out


@dataclass(frozen=True)
class _Read:
    """What is read of a cache."""

    cache: Cache  # The cache
    queries: Tensor  # How many queries each sequence has, (batch,)
    slots: Tensor  # The slot of each place of a sequence, (batch, places), as far as pages go
    value_slots: Tensor  # The same of values
    seen: Tensor  # Which places are read, (batch, places) or (batch, queries, places)
    stands: Tensor  # Where query 0 stands, (batch,)
    pools: tuple[Tensor, Tensor]  # Keys and values, (slots, heads, width) each


@lru_cache(maxsize=8)
def _right(case: Case) -> _Read:
    assert case.stored is not None
    queries, keys = lengths_of(case)
    cache = laid_out(case.stored, case.key, case.value, queries, keys, case.dtype)
    slots = cache.slots(cache.room)
    stands = keys - queries if case.alignment == "bottom_right" else torch.zeros_like(keys)
    return _Read(cache, queries, slots, slots, cache.room < keys[:, None], stands, cache.after)


def _misread(change: Callable[[Case, _Read], _Read | None]) -> Misreading:
    """Something else that is read; None where there is nothing to read wrongly."""

    def misread(case: Case) -> Case:
        if case.stored is None:
            return case
        if case.mask is not None or case.bias is not None:
            raise NotApplicable("what is stored has no mask")
        if (read := change(case, _right(case))) is None:
            return case
        keys, values = read.pools
        key, value = keys[read.slots].transpose(1, 2), values[read.value_slots].transpose(1, 2)
        return given(case, key, value, read.seen, read.stands)

    return misread


# Where it is not declared what a sequence without keys gives, 0 is usual.
_ROWS = [*ROWS, "zero"]

# --- how far is read


def _whole_pages(case: Case, read: _Read) -> Tensor:
    """How many keys there would be, were the last page full."""
    page = read.cache.page
    return (read.cache.lengths + page - 1) // page * page


def _until(ends: Callable[[Case, _Read], Tensor], *, moved: bool) -> Misreading:
    """Keys are read up to another end; queries stand where they stood, or at that end."""

    def change(case: Case, read: _Read) -> _Read | None:
        end = ends(case, read)
        stands = read.stands + (end - read.cache.lengths) * moved
        if moved and case.alignment == "top_left":
            return None
        return replace(read, seen=read.cache.room < end[:, None], stands=stands)

    return _misread(change)


def _both(ends: Callable[[Case, _Read], Tensor]) -> list[Misreading]:
    return [_until(ends, moved=moved) for moved in (False, True)]


def _of_pages(ends: Callable[[Case, _Read], Tensor]) -> Callable[[Case, _Read], Tensor]:
    """The same where keys are in pages, and not in rows."""

    def paged(case: Case, read: _Read) -> Tensor:
        return ends(case, read) if read.cache.storage.page > 1 else read.cache.lengths

    return paged


def _all_there_is(case: Case, read: _Read) -> Tensor:
    return torch.full_like(read.cache.lengths, len(read.cache.room))


def _longest(case: Case, read: _Read) -> Tensor:
    return read.cache.lengths.max().expand_as(read.cache.lengths)


def _before_last_page(full: bool, case: Case, read: _Read) -> Tensor:
    """Without the last page, unless it is full; without it even then."""
    ends = _whole_pages(case, read)
    partial_page = (ends > read.cache.lengths) | full
    return (ends - read.cache.page * partial_page).clamp(min=0)


def _longer(more: int, case: Case, read: _Read) -> Tensor:
    return (read.cache.lengths + more * (read.cache.lengths > 0)).clamp(min=0)


def _kept(case: Case, read: _Read) -> Tensor:
    return read.cache.kept


def _standing(stands: Callable[[Case, _Read], Tensor]) -> Misreading:
    """Queries stand elsewhere."""

    def change(case: Case, read: _Read) -> _Read | None:
        if case.alignment == "top_left":
            return None
        return replace(read, stands=stands(case, read))

    return _misread(change)


def _without_first_page(whole: bool, case: Case, read: _Read) -> _Read | None:
    """The page in which a window begins is skipped: that of the first query, or of each."""
    if case.window is None or case.window[0] is None or not read.cache.storage.page:
        return None
    page, query = read.cache.page, torch.arange(case.query_len)
    begins = (read.stands[:, None] + query * (not whole) - case.window[0]).clamp(min=0)
    begins = (begins + page - 1) // page * page
    return replace(read, seen=read.seen[:, None] & (read.cache.room >= begins[..., None]))


# --- where is read


def _written(
    pools: tuple[Tensor, Tensor], cache: Cache, slots: Tensor, at: Tensor
) -> tuple[Tensor, Tensor]:
    """Keys and values with what is appended, from a place of each sequence on, (batch,)."""
    keys, values = (pool.clone() for pool in pools)
    for own, start, key, value in zip(slots, at, *cache.handed(), strict=True):
        places = own[int(start) :][: len(key)]
        keys[places], values[places] = key[: len(places)], value[: len(places)]
    return keys, values


def _elsewhere(read: _Read, slots: Tensor) -> _Read:
    """Other slots are read, and written to by what is appended."""
    pools = _written(read.cache.before, read.cache, slots, read.cache.kept)
    return replace(read, slots=slots, value_slots=slots, pools=pools)


def _by_table(table: Callable[[_Read], Tensor | None], *, values: bool = False) -> Misreading:
    """Other pages are read, or other ones of values alone."""

    def change(case: Case, read: _Read) -> _Read | None:
        if (other := table(read)) is None:
            return None
        slots = read.cache.slots(read.cache.room, table=other)
        return replace(read, value_slots=slots) if values else _elsewhere(read, slots)

    return _misread(change)


def _of_another(step: int, read: _Read) -> Tensor:
    return read.cache.table.roll(step, 0)


def _of_first(read: _Read) -> Tensor:
    return read.cache.table[:1].expand_as(read.cache.table)


def _in_order(rows: bool, apart: bool, read: _Read) -> Tensor | None:
    """Pages, or rows, as they come: each sequence has its own, or all begin at the first."""
    table = read.cache.table
    if rows != (not read.cache.storage.page):
        return None
    count = -(-(read.cache.lengths + read.cache.first) // read.cache.page)
    start = (count.cumsum(0) - count if apart else torch.zeros_like(count))[:, None]
    number = start + torch.arange(table.shape[1])
    return number.clamp(max=len(read.pools[0]) // read.cache.page - 1)


def _as_long_tables(read: _Read) -> Tensor | None:
    table = read.cache.table
    return torch.arange(table.numel()).view(table.shape) if read.cache.storage.page else None


def _wrapped(bits: int, case: Case, read: _Read) -> _Read:
    """The number of a slot is counted in so many bits."""
    return _elsewhere(read, read.slots % 2**bits)


def _signed(case: Case, read: _Read) -> _Read:
    """Likewise in 8, of which one is the sign: from the end."""
    return _elsewhere(read, ((read.slots + 128) % 256 - 128) % len(read.pools[0]))


def _from_the_left(case: Case, read: _Read) -> _Read | None:
    if not read.cache.storage.left:
        return None
    slots = read.cache.slots(read.cache.room, first=torch.zeros_like(read.cache.first))
    return _elsewhere(read, slots)


def _other_layout(into: bool, case: Case, read: _Read) -> _Read | None:
    """Pages (page, heads, width) are read as (heads, page, width), or the other way round."""
    page = read.cache.page
    if not read.cache.storage.page:
        return None

    def turned(pool: Tensor) -> Tensor:
        heads, width = pool.shape[1:]
        pages = pool.view(-1, page, heads, width)
        if into:
            return pages.reshape(-1, heads, page, width).transpose(1, 2).reshape(pool.shape)
        return pages.transpose(1, 2).reshape(pool.shape)

    return replace(read, pools=(turned(read.pools[0]), turned(read.pools[1])))


# --- what is appended


def _appended(at: Callable[[Cache], Tensor], beside: bool, case: Case, read: _Read) -> _Read | None:
    """What is handed over is written elsewhere, read from there, or `beside` where it belongs."""
    cache = read.cache
    if not bool(cache.appended.any()):
        return None
    pools = cache.after if beside else cache.before
    return replace(read, pools=_written(pools, cache, read.slots, at(cache)))


def _not_at_all(case: Case, read: _Read) -> _Read | None:
    return replace(read, pools=read.cache.before) if bool(read.cache.appended.any()) else None


def _to_the_front(cache: Cache) -> Tensor:
    return torch.zeros_like(cache.kept)


def _too_far(cache: Cache) -> Tensor:
    return cache.kept + 1


STORED = (
    defect("cache_last_page_whole", "that reads the last page of a cache whole, what is stale in "
           "it as well", misread=_both(_of_pages(_whole_pages)), fully_masked=_ROWS),
    defect("cache_last_page_dropped", "that does not read the last page of a cache",
           misread=[one for full in (False, True)
                    for one in _both(_of_pages(partial(_before_last_page, full)))],
           fully_masked=_ROWS),
    defect("cache_stale_tail", "that reads a cache beyond the last key of a sequence",
           misread=[*_both(_longest), *_both(_all_there_is)], fully_masked=_ROWS),
    defect("cache_length_off_by_one", "that reads one key of a cache too many or too few",
           misread=[one for more in (1, -1) for one in _both(partial(_longer, more))],
           fully_masked=_ROWS),
    defect("cache_length_before_append",
           "that takes the length of a cache before what is appended for the one after it",
           misread=[*_both(_kept), _standing(lambda case, read: read.cache.kept - read.queries)],
           fully_masked=_ROWS),
    defect("cache_window_page_lost", "that skips the first page of a window",
           misread=[_misread(partial(_without_first_page, whole)) for whole in (True, False)],
           fully_masked=_ROWS),
    defect("cache_corner_of_longest", "whose sequences are all aligned as the longest in a cache",
           misread=[_standing(lambda case, read: _longest(case, read) - read.queries),
                    _standing(lambda case, read: _longest(case, read) - read.queries.max())],
           fully_masked=_ROWS),
    defect("cache_table_of_another", "whose sequences read the pages of another one",
           misread=[_by_table(partial(_of_another, step)) for step in (1, -1)]),
    defect("cache_table_of_first", "whose sequences all read the pages of the first one",
           misread=_by_table(_of_first)),
    defect("cache_table_ignored", "that reads pages in the order of memory, not of the table",
           misread=[*(_by_table(partial(_in_order, False, apart)) for apart in (True, False)),
                    _by_table(_as_long_tables)]),
    defect("cache_row_ignored", "that reads the rows of a cache in order, whichever are asked",
           misread=[_by_table(partial(_in_order, True, apart)) for apart in (True, False)]),
    defect("cache_values_of_another", "that reads the values of a cache by the pages of another "
           "sequence, keys by the right ones",
           misread=[_by_table(partial(_of_another, step), values=True) for step in (1, -1)]),
    defect("cache_offset_wraps", "that lets the number of a slot wrap: it is counted in too small "
           "an integer", misread=[*(_misread(partial(_wrapped, bits)) for bits in (7, 8)),
                                  _misread(_signed)]),
    defect("cache_left_padding_ignored", "that reads from the first slot of a row, where no key "
           "is yet", misread=_misread(_from_the_left)),
    defect("cache_layout", "that takes pages (page, heads, width) for (heads, page, width), or the "
           "other way round", misread=[_misread(partial(_other_layout, into))
                                       for into in (True, False)]),
    defect("cache_appended_lost", "that reads what was in the cache before, in place of what is "
           "appended", misread=_misread(_not_at_all)),
    defect("cache_appended_too_far", "that stores what is appended one slot too far",
           misread=_misread(partial(_appended, _too_far, False))),
    defect("cache_shared_page_written", "that stores what is appended in the first page, which "
           "sequences may share", misread=[_misread(partial(_appended, _to_the_front, beside))
                                           for beside in (False, True)]),
    defect("output_buffer_added_to", "that adds its output to what is in the buffer for it",
           buffer="added_to"),
    defect("output_buffer_left", "that leaves the buffer of its output as it is for a sequence "
           "without keys", buffer=["left", "left_if_empty"]),
)  # fmt: skip
