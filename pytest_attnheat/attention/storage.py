"""How keys and values are stored: in pages or rows of slots, in any order, beside what is stale."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .scoring import draw

# What slots hold that are not in use. Of ordinary numbers it can be computed what read them.
UNUSED = ("ordinary", "nan", "large")
# `Storage.appended` for as many keys as there are queries.
OWN = -1
# So many slots there are at least: a number of one byte does not count them.
_LEAST_SLOTS = 320
# So many numbers are drawn and come again: a prime, so that no two slots hold the same.
_DRAWN = 32749
# Slots of a row before the first key, after the last, and rows and pages that nobody has.
_LEFT, _ROOM, _SPARE = 3, 5, 2


@dataclass(frozen=True)
class Storage:
    """How the keys and values of a call are stored. What is stored is the same attention."""

    page: int = 0  # How many keys a page holds; 0 for one row of slots for each sequence
    # How many last keys of each sequence are handed over in the call, as far as it has so many;
    # `OWN` for as many as it has queries
    appended: int = 0
    shared: bool = False  # Whether sequences that begin alike share the pages of that
    left: bool = False  # Whether the keys of a row begin after its first slot
    unused: str = "ordinary"  # What slots that are not in use hold, of `UNUSED`, and the buffer
    seed: int = 0  # Where the order of pages and ordinary numbers are drawn from

    def filled(
        self, name: str, like: Tensor, *shape: int, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Return what memory holds before it is used; each name has numbers of its own."""
        if self.unused == "ordinary":
            count = math.prod(shape)
            few = draw(f"unused {name}", self.seed, min(count, _DRAWN)).to(dtype or like.dtype)
            return few.repeat(-(-count // _DRAWN))[:count].view(shape).to(like)
        found = like.new_full(shape, math.nan if self.unused == "nan" else 1e4)
        found.view(-1)[::2] *= -1
        return found


@dataclass(frozen=True)
class Fault:
    """What code did to a cache that it was not to do: a name, and a sentence."""

    name: str
    sentence: str


@dataclass(frozen=True, eq=False)
class Cache:
    """The keys and values of a batch of sequences as they are stored.

    Slot `n` is place `n % page` of page `n // page`.
    """

    storage: Storage  # How they are stored
    page: int  # How many slots a page has; a row of slots is a page
    table: Tensor  # The pages of each sequence, (batch, pages); those after its last hold nothing
    first: Tensor  # The place of its first key, (batch,)
    lengths: Tensor  # How many keys it has, with those that are appended, (batch,)
    appended: Tensor  # How many of them are handed over in the call, (batch,)
    before: tuple[Tensor, Tensor]  # Keys and values before the call, (slots, heads, width) each
    after: tuple[Tensor, Tensor]  # The same with what is appended where it belongs

    @property
    def kept(self) -> Tensor:
        """How many keys of each sequence are stored before the call, (batch,)."""
        return self.lengths - self.appended

    @property
    def room(self) -> Tensor:
        """The number of each place of a sequence that its pages have room for, (places,)."""
        return torch.arange(self.table.shape[1] * self.page, device=self.table.device)

    def slots(
        self, places: Tensor, *, table: Tensor | None = None, first: Tensor | None = None
    ) -> Tensor:
        """Return the slots of keys, (keys,) or (batch, keys), of each sequence, (batch, keys)."""
        table = self.table if table is None else table
        at = places + (self.first if first is None else first)[:, None]
        number = (at // self.page).clamp(0, table.shape[1] - 1)
        return table.gather(1, number) * self.page + at % self.page

    def given(self) -> Iterator[tuple[int, Tensor]]:
        """Yield each sequence and the slots of what is appended to it."""
        slots = self.slots(self.room)
        for batch, (start, stop) in enumerate(zip(self.kept, self.lengths, strict=True)):
            yield batch, slots[batch, start:stop]

    def indices(self, lengths: Tensor) -> Tensor:
        """Return the slots of the first keys of each sequence, one sequence after the other."""
        return self.slots(self.room)[self.room < lengths[:, None]]

    def handed(self) -> tuple[list[Tensor], list[Tensor]]:
        """The keys and values that are handed over, of each sequence (appended, heads, width)."""
        each = [slots for _, slots in self.given()]
        keys, values = ([pool[slots] for slots in each] for pool in self.after)
        return keys, values

    def fault(self, found: tuple[Tensor, Tensor]) -> Fault | None:
        """Return what is wrong with keys and values after a call; None if nothing is."""
        wrong = torch.zeros(len(found[0]), dtype=torch.bool, device=found[0].device)
        for pool, expected in zip(found, self.after, strict=True):
            same = (pool == expected) | (pool.isnan() & expected.isnan())
            wrong |= ~same.flatten(1).all(1)
        if not bool(wrong.any()):
            return None
        belong = torch.zeros_like(wrong)
        for _, slots in self.given():
            belong[slots] = True
        pages, others = (wrong & ~belong).view(-1, self.page).any(1), int((wrong & ~belong).sum())
        shared = self.table.flatten().bincount() > 1
        front = torch.zeros_like(self.kept)
        if bool(pages[: len(shared)][shared].any()) or (others and self._stands_at(front, found)):
            words = "what is appended is stored in the first page, which sequences may share"
            return Fault("cache_shared_page_written", words)
        if others and self._stands_at(self.kept + 1, found):
            return Fault("cache_appended_too_far", "what is appended is stored one slot too far")
        if others:
            words = f"{others} slots are written to that nothing is appended to"
            return Fault("cache_overwritten", words)
        return Fault("cache_appended_lost", "what is appended is not stored where it belongs")

    def _stands_at(self, places: Tensor, found: tuple[Tensor, Tensor]) -> bool:
        """Whether what is appended stands from some places on, one of each sequence."""
        slots, keys = self.slots(self.room), self.handed()[0]
        return all(
            torch.equal(found[0][own[start : start + len(new)]], new)
            for own, start, new in zip(slots, places.tolist(), keys, strict=True)
        )


def laid_out(
    storage: Storage,  # How
    key: Tensor,  # (batch, heads, key_len, width)
    value: Tensor,  # Likewise
    queries: Tensor,  # How many queries each sequence has, (batch,)
    keys: Tensor,  # How many keys, (batch,)
    dtype: torch.dtype | None = None,  # What stale numbers are rounded to, by default its own
) -> Cache:
    """Store keys and values."""
    batch, _, key_len, _ = key.shape
    page = storage.page or key_len + _LEFT + _ROOM
    first = torch.arange(batch, device=key.device) % _LEFT + 1
    first = first if storage.left and not storage.page else torch.zeros_like(first)
    appended = queries if storage.appended == OWN else keys.clamp(max=storage.appended)
    if storage.appended > 0:  # as many of each
        appended = appended.min().expand(batch)
    appended = torch.minimum(appended, keys)
    count = 1 if not storage.page else -(-key_len // page) + 1
    spare = max(_SPARE, -(-_LEAST_SLOTS // page) - batch * count)
    order = draw("order of pages", storage.seed, batch * count + spare).argsort().to(key.device)
    table = order[: batch * count].view(batch, count)
    if storage.shared:
        table = _with_shared(table, key, value, keys - appended, page)
    cache = Cache(storage, page, table, first, keys, appended, (key, value), (key, value))
    places = torch.arange(key_len, device=key.device)
    slots = cache.slots(places)
    whole, old = places < keys[:, None], places < cache.kept[:, None]
    pools: list[tuple[Tensor, Tensor]] = []
    # Values that are a part of the keys are stored once.
    latent = torch.equal(key[..., : value.shape[-1]], value)
    for name, tensor in (("key", key), ("value", value)):
        of_keys = tensor.detach().transpose(1, 2)
        shape = (len(order) * page, *of_keys.shape[2:])
        if latent and pools:
            before = pools[0][0][..., : shape[-1]].clone()
        else:
            before = storage.filled(name, of_keys, *shape, dtype=dtype)
        before[slots[old]] = of_keys[old]
        after = before.clone()
        after[slots[whole]] = of_keys[whole]
        pools.append((before, after))
    (keys_before, keys_after), (values_before, values_after) = pools
    return Cache(storage, page, table, first, keys, appended, (keys_before, values_before),
                 (keys_after, values_after))  # fmt: skip


def _with_shared(table: Tensor, key: Tensor, value: Tensor, kept: Tensor, page: int) -> Tensor:
    """The table whose sequences have the first pages of the first one, as far as they are alike."""
    table = table.clone()
    for batch in range(1, len(table)):
        for number in range(int(torch.minimum(kept[0], kept[batch])) // page):
            part = slice(number * page, (number + 1) * page)
            if not all(torch.equal(t[0, :, part], t[batch, :, part]) for t in (key, value)):
                break
            table[batch, number] = table[0, number]
    return table
