"""What is computed when it is read, a box at a time: maps of a call, and their mask."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..inputs import InBoxes, as_whole, dtype_name
from .blocks import Blocks
from .call import Call
from .chunks import pieces, spans
from .parts import own_rows
from .vocabulary import permits

Box = tuple[slice, ...]


class Lazy(InBoxes):
    """What is computed when it is read, and which of it need not be."""

    def runs(self, box: Box) -> list[slice]:
        """Return the keys of some rows that may hold anything, as runs in order."""
        raise NotImplementedError

    def boxes(self, most_rows: int, most_elements: int) -> Iterator[Box]:
        """Yield the rows in order, in boxes that each lie in one block: none is computed twice."""
        # A box has at most so many rows, and weights that may be anything but zero; or it is one
        # row.
        raise NotImplementedError

    def map_at(self, place: Sequence[int]) -> Lazy:
        """Return one map, of its two last dimensions alone."""
        raise NotImplementedError


def as_lazy(operand: object) -> Lazy | None:
    """Return what is computed when it is read; None for a tensor."""
    return operand if isinstance(operand, Lazy) else None


class LazyBoxes(Lazy):
    """Some maps of a call, of which boxes are computed when they are read."""

    def __init__(self, blocks: Blocks, numbers: Tensor, shape: Sequence[int]) -> None:
        self.blocks, self.numbers = blocks, numbers
        self.shape, self.device = torch.Size(shape), blocks.call.query.device

    def __repr__(self) -> str:
        """Say what it is, and how large it would be."""
        return f"<{type(self).__name__} {dtype_name(self.dtype)} {tuple(self.shape)}>"

    def __getitem__(self, box: Any) -> Tensor:
        """Return a box, of slices without steps and whole numbers; the rest is whole."""
        given = box if isinstance(box, tuple) else (box,)
        if ... in given and len(given) <= self.ndim + 1:
            at = given.index(...)
            every = [slice(None)] * (self.ndim - len(given) + 1)
            given = (*given[:at], *every, *given[at + 1 :])
        given = (*given, *[slice(None)] * (self.ndim - len(given)))
        if len(given) > self.ndim:
            raise IndexError(f"{len(given)} indices for {self.ndim} dimensions")
        whole = tuple(map(_span, given, self.shape))
        found = self.read(whole)
        dropped = [at for at, one in enumerate(given) if not isinstance(one, slice)]
        for at in reversed(dropped):
            found = found.squeeze(at)
        return found

    def __iter__(self) -> Iterator[Tensor]:
        """Yield each place of the first dimension."""
        yield from (self[number] for number in range(self.shape[0]))

    def read(self, box: Box) -> Tensor:
        """Return a box of slices, one for each dimension."""
        raise NotImplementedError

    def seen(self, numbers: Sequence[int], rows: slice) -> list[slice]:
        """Return the keys that some rows of some maps may see, as runs in order."""
        found: list[slice] = []
        for some in neighbours(numbers):
            found += self.blocks.seen(some, rows)
        return merged(found)

    @property
    def mT(self) -> Transposed:  # noqa: N802 (as of a tensor)
        """Queries and keys in each other's place."""
        return Transposed(self)


class LazyMask(LazyBoxes):
    """Where a query may attend by what is declared, read a box at a time."""

    dtype = torch.bool

    def __init__(
        self, blocks: Blocks, numbers: Tensor, shape: Sequence[int], *, with_sink: bool = False
    ) -> None:
        call = blocks.call
        given = (call.mask, call.bias, call.documents, call.lengths, call.query_lengths)
        self._alike = call.may_see is None and all(one is None for one in given)
        lead = [1] * numbers.ndim if self._alike else numbers.shape
        numbers = numbers.flatten()[:1].view(lead) if self._alike else numbers
        self._with_sink = with_sink
        super().__init__(blocks, numbers, (*lead, *shape[-2:]))

    @classmethod
    def causal(
        cls, shape: Sequence[int], offset: int, window: int | None, device: torch.device
    ) -> LazyMask:
        """Return that of causal attention, where query 0 stands at key `offset`."""
        *lead, query_len, key_len = shape
        nothing = torch.zeros(1, 1, device=device)
        call = Call(
            nothing.expand(query_len, 1), nothing.expand(key_len, 1), nothing.expand(key_len, 1),
            causal=True, alignment="bottom_right" if offset else "top_left",
            window=None if window is None else (window, 0),
        )  # fmt: skip
        return cls(Blocks(call, torch.float32), torch.zeros([1] * len(lead)).long(), shape)

    def map_at(self, place: Sequence[int]) -> LazyMask:
        """Return one map, (queries, keys)."""
        own = tuple(0 if self._alike else at for at in place)
        return LazyMask(self.blocks, self.numbers[own], self.shape[-2:], with_sink=self._with_sink)

    def unsqueeze(self, dim: int) -> LazyMask:
        """Return the same with one leading dimension more, of size 1."""
        numbers, shape = self.numbers.unsqueeze(dim), self.shape[-2:]
        return LazyMask(self.blocks, numbers, shape, with_sink=self._with_sink)

    def expand(self, shape: Sequence[int]) -> LazyMask:
        """Return itself: who reads a box of it broadcasts that."""
        return self

    def read(self, box: Box) -> Tensor:
        """Return a box of slices, one for each dimension; alike in all maps where it is."""
        *lead, rows, keys = box
        call = self.blocks.call
        numbers = self.numbers[tuple(lead)]
        maps = numbers.flatten().to(self.device)
        key = torch.arange(keys.start, min(keys.stop, call.key_len), device=self.device)
        shape = (*numbers.shape, rows.stop - rows.start, len(key))
        seen = self.blocks.permitted(maps, rows, key)
        found = torch.ones((), dtype=torch.bool, device=self.device) if seen is None else seen
        for name, given in (("mask", call.mask), ("bias", call.bias)):
            if given is not None:
                own = self.blocks.given(name, maps)
                own = own[:, own_rows(own, rows)]
                own = own[..., key] if own.shape[-1] > 1 else own
                found = found & permits(own)
        found = found.expand(maps.numel(), *shape[-2:]).reshape(shape)
        if keys.stop > call.key_len:  # a sink is always seen
            found = torch.cat([found, found.new_ones(*shape[:-1], 1)], -1)
        return found

    def counts(self, rows: Box) -> Tensor | None:
        """Return how many keys each row of a box may see, where no key need be looked at."""
        found = self.blocks.counts
        return None if found is None else found[rows[-1]] + int(self._with_sink)

    def hides(self, rows: Box) -> list[slice]:
        """Return the keys that may be hidden from any of some rows, as runs in order."""
        key_len, blocks = self.shape[-1], self.blocks
        if blocks.counts is None:
            return [slice(0, key_len)]
        start, stop = blocks.seen_by_all(rows[-1])
        return merged([slice(0, min(start, key_len)), slice(max(stop, 0), key_len)])

    def runs(self, box: Box) -> list[slice]:
        """Return the keys of some rows that may be permitted, as runs in order."""
        *lead, rows = box
        found = self.seen(self.numbers[tuple(lead)].flatten().tolist(), rows)
        key_len = self.blocks.call.key_len
        return [*found, slice(key_len, key_len + 1)] if self._with_sink else found


class Transposed(Lazy):
    """Weights, or their mask, with queries and keys in each other's place.

    A block of it has all columns of a map, and is read a block of rows at a time: each is computed
    once for whatever is measured.
    """

    def __init__(self, base: LazyBoxes) -> None:
        *lead, queries, keys = base.shape
        self.mT, self.dtype, self.device = base, base.dtype, base.device
        self.shape = torch.Size((*lead, keys, queries))

    def __getitem__(self, box: Any) -> Tensor:
        """Return a box, of slices and whole numbers; the rest is whole."""
        given = box if isinstance(box, tuple) else (box,)
        whole: list[Any] = [*given, *[slice(None)] * (self.ndim - len(given))]
        keys, queries = whole[-2:]
        index = (*whole[:-2], queries, keys)
        found = self.mT[index]
        both = isinstance(keys, slice) and isinstance(queries, slice)
        return found.mT if both else found

    def map_at(self, place: Sequence[int]) -> Transposed:
        """Return one map, (keys, queries)."""
        return Transposed(cast("LazyBoxes", self.mT.map_at(place)))

    def runs(self, box: Box) -> list[slice]:
        """Return the rows of each block."""
        return list(self.mT.blocks.spans)

    def boxes(self, most_rows: int, most_elements: int) -> Iterator[Box]:
        """Yield all columns of each map."""
        *lead, columns, _ = self.shape
        groups: list[Box] = [()] if not lead else list(pieces(lead, 1))
        for group in groups:
            for span in spans(columns, most_rows):
                yield (*group, span)


def merged(runs: Sequence[slice]) -> list[slice]:
    """Return runs that do not touch, in order, which cover what the given ones do."""
    found: list[slice] = []
    for run in sorted(runs, key=lambda run: run.start):
        if found and run.start <= found[-1].stop:
            found[-1] = slice(found[-1].start, max(found[-1].stop, run.stop))
        elif run.start < run.stop:
            found.append(run)
    return found


def _span(one: Any, size: int) -> slice:
    """What a slice or a whole number means in a dimension of some size."""
    if isinstance(one, slice):
        start, stop, step = one.indices(size)
        if step != 1:
            raise IndexError(f"a slice with a step of {step}: read it whole, and take the step")
        return slice(start, stop)
    number = as_whole(one)
    if number is None:
        raise TypeError(f"an index of {type(one).__name__}: a slice or a whole number is read")
    if not -size <= number < size:
        raise IndexError(f"index {number} of a dimension of {size}")
    return slice(number % size, number % size + 1)


def neighbours(numbers: Sequence[int], step: int | None = None) -> Iterator[slice]:
    """Yield numbers as runs that follow one another, none across a multiple of `step`."""
    start = 0
    for at in range(1, len(numbers) + 1):
        ends = at == len(numbers) or numbers[at] != numbers[at - 1] + 1
        if ends or (step is not None and numbers[at] % step == 0):
            yield slice(numbers[start], numbers[at - 1] + 1)
            start = at
