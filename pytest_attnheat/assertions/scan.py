"""Reading tensors of any size in small pieces.

The pieces are views, or converted copies of at most a few MB, so that the
extra memory does not depend on the size or on the strides of the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Generic, Literal, TypeAlias, TypeVar, cast

import torch
from torch import Tensor

from ..attention.blocks import shared
from ..attention.boxes import LazyMask, Transposed, as_lazy, merged
from ..attention.chunks import pieces, spans
from ..attention.placed import Placed, as_own, as_placed
from ..inputs import wide_dtype

# The thorough reading may hold a handful of temporaries of this size at once.
_BYTES = 2**20
# The quick reading holds one number per row, for this many rows at most; the thorough reading
# holds a dozen per row, and rows of few keys would make many of them.
_ROWS = 2**18
_BLOCK_ROWS = 2**17
# A piece is summed and then searched for signs: the second reading should come from a cache.
# On a GPU fewer launches count for more.
_BYTES_ON_CPU = 2**22
_BYTES_ON_ACCELERATOR = 2**28

# Which keys of a row are read: `Block.elements`.
Where: TypeAlias = Literal["weights", "mask", "either", "masked"]

P = TypeVar("P")

_SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _piece_elements(weights: Tensor) -> int:
    """Return how many weights the thorough reading looks at together."""
    return _BYTES // wide_dtype(weights.dtype).itemsize


def mask_at(mask: Tensor, index: tuple[slice, ...]) -> Tensor:
    """Return the part of a mask, or weights, that belongs to a box: not expanded, not moved."""
    return mask[_own(mask, index)]


def _own(operand: Tensor, index: tuple[slice, ...]) -> tuple[slice, ...]:
    sizes = operand.shape[: len(index)]
    return tuple(
        slice(0, 1) if size == 1 else span for size, span in zip(sizes, index, strict=True)
    )


def row_of(operand: Tensor, index: tuple[int, ...]) -> Tensor:
    """Return one row of weights or of a mask, ``(keys,)`` or ``(1,)``, on the CPU."""
    spans = (*(slice(i, i + 1) for i in index), slice(0, operand.shape[-1]))
    return mask_at(operand, spans).cpu().flatten()


def evenly(size: int, most: int) -> list[int]:
    """Return at most so many of the numbers below `size`, evenly spaced, 0 among them."""
    count = min(size, most)
    return [i * size // count for i in range(count)]


def any_key(mask: Tensor) -> Tensor:
    """Return `mask.any(-1)`, as a maximum: on a CPU that is ten times faster."""
    return mask.view(torch.uint8).amax(-1) > 0


def rows_sum_to_one(weights: Tensor, mask: Tensor | None, allowed: float) -> bool:
    """Tell quickly whether all rows are distributions, those without a key zero."""
    # True is certain. False means that the thorough reading must decide: minus zero, for instance,
    # looks negative here.
    sound = _sound(weights, mask, allowed)
    return sound is not None and bool(sound)


def rows_and_columns_sum_to_one(weights: Tensor, mask: Tensor | None, allowed: float) -> bool:
    """Tell the same of rows and columns, and wait for the device once."""
    rows = _sound(weights, mask, allowed)
    columns = _sound(weights.mT, None if mask is None else mask.mT, allowed)
    return rows is not None and columns is not None and bool(rows & columns)


def _sound(weights: Tensor, mask: Tensor | None, allowed: float) -> Tensor | None:
    """Return whether all rows pass, as a scalar on their device; None if they must be read."""
    key_len, size = weights.shape[-1], weights.dtype.itemsize
    lazy = as_lazy(weights)
    if isinstance(lazy, Transposed) or as_placed(weights) or key_len > _BYTES_ON_CPU // 8:
        return None  # a row must fit into a piece
    if lazy is None and weights.is_neg():
        return None  # the sign is kept apart from the bits
    on_cpu = weights.device.type == "cpu"
    # On a CPU, summing half precision into float32 directly takes ten times as long as converting
    # a piece that then stays in the cache.
    convert = size < (4 if on_cpu else 2)
    budget = _BYTES_ON_CPU if on_cpu or convert else _BYTES_ON_ACCELERATOR
    sound = torch.ones((), dtype=torch.bool, device=weights.device)
    for rows in _boxes(weights, _ROWS, budget // max(size, 4)):
        totals: Tensor | None = None
        for keys in _runs(weights, rows):
            index = (*rows, keys)
            piece = weights[index]
            # The sign bit makes an integer of the same width negative, and integers are compared
            # faster than floats. NaN and infinity need no look of their own: they show in the sum.
            sound &= piece.view(_SIGNED[size]).amin() >= 0
            own = (piece.float() if convert else piece).sum(-1, dtype=wide_dtype(weights.dtype))
            totals = own if totals is None else totals + own
        assert totals is not None
        good = totals.sub(1).abs_() <= allowed
        if mask is not None:
            attends = Block(weights, mask, rows).attends
            good = torch.where(attends, good, totals == 0)
        sound &= good.all()
    return sound


def _boxes(weights: Tensor, most_rows: int, most_elements: int) -> Iterator[tuple[slice, ...]]:
    """Yield all rows in order, in boxes of bounded size: of what is not held, as it is computed."""
    if (held := as_lazy(weights) or as_own(weights)) is not None:
        return held.boxes(most_rows, most_elements)
    return pieces(weights.shape[:-1], max(1, min(most_rows, most_elements // weights.shape[-1])))


def _runs(operand: Tensor, rows: tuple[slice, ...]) -> list[slice]:
    """Return the keys of some rows of weights, or of a mask, that may hold anything; some key."""
    lazy = as_lazy(operand) or as_own(operand)
    whole = [slice(0, operand.shape[-1])]
    return whole if lazy is None else lazy.runs(_own(operand, rows)) or [slice(0, 1)]


def holds_nothing(weights: Tensor, index: tuple[slice, ...]) -> bool:
    """Tell whether it is known, without a look, that a box of weights is zero."""
    if (lazy := as_lazy(weights)) is None:
        return False
    *rows, keys = _own(weights, index)
    runs = lazy.runs(tuple(rows))
    return all(run.stop <= keys.start or keys.stop <= run.start for run in runs)


class Block:
    """Some rows of the weights, and what can be measured on them.

    Every measure returns a tensor with one number per row, shape
    ``weights[index].shape[:-1]``. Rows longer than a piece are read in parts.
    """

    def __init__(self, weights: Tensor, mask: Tensor | None, index: tuple[slice, ...]) -> None:
        """Look at `weights[index]`; nothing is read yet."""
        self.index = index
        self.key_len = weights.shape[-1]
        self.device = weights.device
        self._weights = weights
        self._mask = mask
        lazy = as_lazy(mask)
        self._lazy_mask = lazy if isinstance(lazy, LazyMask) else None
        self._wide = wide_dtype(weights.dtype)
        sizes = zip(weights.shape, index, strict=False)
        self.shape = tuple(len(range(size)[span]) for size, span in sizes)
        self._step = max(1, _piece_elements(weights) // math.prod(self.shape))
        self._runs = _runs(weights, index)
        self._seen = None if mask is None else _runs(mask, index)
        if mask is not None and (isinstance(as_lazy(weights), Transposed) or as_own(weights)):
            self._seen = self._runs  # a block of rows at a time, or the keys that lie here
        # How many keys of each row are known to be zero, and are not read.
        self.hidden = self.key_len - sum(run.stop - run.start for run in self._runs)
        self._own = as_own(weights)
        if self._own is not None:  # other ranks read them
            self.hidden = 0

    def elements(self, *, where: Where = "weights") -> Iterator[Elements]:
        """Yield the weights, in parts of bounded size."""
        # `where`: where weights may be anything but zero, and of these, "masked", where the mask
        # may hide any; where the mask may permit any; or where either may. Other keys are left out.
        runs = self._runs if where in ("weights", "masked") or self._seen is None else self._seen
        if where == "either" and runs is not self._runs:
            runs = merged([*self._runs, *runs])
        if where == "masked" and self._lazy_mask is not None:
            hidden = self._lazy_mask.hides(self.index)
            runs = [both for one in runs for two in hidden if (both := shared(one, two))]
        for run in runs or [slice(self._runs[0].start, self._runs[0].start + 1)]:
            for keys in spans(run.stop - run.start, self._step):
                yield Elements(self, slice(run.start + keys.start, run.start + keys.stop))

    def whole(self) -> Elements:
        """Return the weights from the first to the last key that may hold or be permitted any."""
        runs = merged([*self._runs, *(self._runs if self._seen is None else self._seen)])
        keys = slice(runs[0].start, runs[-1].stop)
        return Elements(self, keys, self.key_len - (keys.stop - keys.start))

    def permitted(self, keys: slice) -> Tensor:
        """Return the mask of some keys, not expanded; without a mask, every key is permitted."""
        if self._mask is None:
            ones = (1,) * (len(self.index) + 1)
            return torch.ones(ones, dtype=torch.bool, device=self.device)
        return mask_at(self._mask, (*self.index, keys)).to(self.device)

    def reduce(
        self,
        measure: Callable[[Elements], Tensor],
        combine: Callable[[Tensor, Tensor], Tensor],
        *,
        where: Where = "weights",
    ) -> Tensor:
        """Measure each part and combine the results; parts as in `elements`."""
        found = reduce(combine, map(measure, self.elements(where=where)))
        return found if self._own is None else self._own.placed.over_keys(found, combine)

    def values(self, keys: slice) -> Tensor:
        """Return the weights of some keys, in the dtype in which they are added up."""
        # The last ones are kept, for what is measured next.
        if self._last is None or self._last[0] != keys:
            index = (*self.index, keys)
            self._last = keys, self._weights[index].to(self._wide)
        return self._last[1]

    _last: tuple[slice, Tensor] | None = None

    def _sum(self, measure: Callable[[Elements], Tensor]) -> Tensor:
        """Add up each row, rounded once: it does not show in which parts a row was read."""
        found = self.reduce(lambda p: measure(p).sum(-1, dtype=torch.float64), torch.add)
        return found.to(self._wide)

    @cached_property
    def total(self) -> Tensor:
        """The sum of each row."""
        return self._sum(lambda part: part.values)

    @cached_property
    def low(self) -> Tensor:
        """The smallest weight of each row."""
        low = self.reduce(lambda part: part.values.amin(-1), torch.minimum)
        return low.clamp(max=0) if self.hidden else low

    @cached_property
    def high(self) -> Tensor:
        """The largest weight of each row."""
        high = self.reduce(lambda part: part.values.amax(-1), torch.maximum)
        return high.clamp(min=0) if self.hidden else high

    @cached_property
    def numbers(self) -> Tensor:
        """How many weights of each row are not NaN."""
        read = self.reduce(lambda part: (part.values == part.values).sum(-1), torch.add)
        return read.add(self.hidden)

    @cached_property
    def entropy(self) -> Tensor:
        """The entropy of each row in nats, 0 log 0 being 0."""
        least = torch.finfo(self._wide).tiny
        # Six times as fast as `xlogy`, and of what has no logarithm nothing is left either way.
        negative = self._sum(lambda p: p.values.clamp_min(least).log_().mul_(p.values))
        return 0 - negative  # not neg(), which makes -0 of the 0 of a one-hot row

    @cached_property
    def permitted_keys(self) -> Tensor:
        """The number of keys to which each row may attend."""

        def count(part: Elements) -> Tensor:
            permitted = part.permitted
            # A mask of one key stands for all of them; counting before expanding is cheaper.
            copies = part.shape[-1] // permitted.shape[-1]
            return (permitted.sum(-1) * copies).to(self._wide).expand(part.shape[:-1])

        if self._mask is None:
            return torch.full_like(self.low, self.key_len)
        if self._counts is not None:
            return self._counts.to(self._wide)
        return self.reduce(count, torch.add, where="mask")

    @cached_property
    def _counts(self) -> Tensor | None:
        """How many keys each row may attend to, where the mask tells without a look."""
        found = None if self._lazy_mask is None else self._lazy_mask.counts(self.index)
        return None if found is None else found.expand(self.shape)

    @cached_property
    def attends(self) -> Tensor:
        """Whether each row may attend to any key."""
        if self._counts is not None:
            return self._counts > 0
        return self.reduce(
            lambda part: any_key(part.permitted).expand(part.shape[:-1]),
            torch.logical_or,
            where="mask",
        )

    @cached_property
    def masks(self) -> Tensor:
        """Whether each row has a masked key."""
        if self._counts is not None:
            return self._counts < self.key_len
        read = self.key_len
        if self._seen is not None and self._own is None:
            read = sum(r.stop - r.start for r in self._seen)
        if read < self.key_len:
            return torch.ones(self.shape, dtype=torch.bool, device=self.device)
        return self.reduce(
            lambda part: any_key(~part.permitted).expand(part.shape[:-1]),
            torch.logical_or,
            where="mask",
        )

    @cached_property
    def leaked(self) -> Tensor:
        """The largest magnitude at a masked key of each row; NaN counts as none."""

        def largest(part: Elements) -> Tensor:
            nothing = part.permitted | part.values.isnan()
            return part.values.abs().masked_fill_(nothing, 0).amax(-1)

        return self.reduce(largest, torch.maximum, where="masked")

    def misfit(self, *, masked: bool) -> Tensor:
        """Return how far each row strays from uniform, as a part of a uniform weight."""
        # `masked`: uniform over the permitted keys and zero elsewhere, not over all keys.
        everywhere = not masked or self._mask is None
        count = self.permitted_keys if masked else torch.full_like(self.low, self.key_len)

        def farthest(part: Elements) -> Tensor:
            relative = part.values * count.unsqueeze(-1)
            relative -= 1 if everywhere else part.permitted.to(relative.dtype)
            return relative.abs_().amax(-1)

        found = self.reduce(farthest, torch.maximum, where="either")
        return found.clamp(min=1) if everywhere and self.hidden else found


@dataclass(frozen=True)
class Elements:
    """The weights of some keys of a block."""

    block: Block  # The block
    keys: slice  # The keys
    unread: int = 0  # How many others of each row are in no part: they are zero, and masked

    @property
    def shape(self) -> tuple[int, ...]:
        """How many they are."""
        return (*self.block.shape, self.keys.stop - self.keys.start)

    @property
    def values(self) -> Tensor:
        """The weights, in the dtype in which they are added up."""
        return self.block.values(self.keys)

    @property
    def index(self) -> tuple[slice, ...]:
        """Where they are in the weights."""
        return (*self.block.index, self.keys)

    @property
    def permitted(self) -> Tensor:
        """Where the mask permits, not expanded."""
        return self.block.permitted(self.keys)


@dataclass(frozen=True)
class Parts(Generic[P]):
    """Parts of weights, and what else there is of them."""

    make: Callable[[], Iterator[P]]  # Goes through the parts that lie here
    placed: Placed | None  # The weights, where others lie on other ranks; else None
    of_rows: bool  # Whether the parts are whole rows

    def __iter__(self) -> Iterator[P]:
        """Go through the parts that lie here."""
        return self.make()


def blocks(weights: Tensor, mask: Tensor | None) -> Parts[Block]:
    """Return all rows, in blocks of bounded size."""
    placed, its_mask = as_placed(weights), as_placed(mask)
    here = weights if placed is None else cast(Tensor, placed.own)
    seen = mask if its_mask is None else cast(Tensor, its_mask.own)

    def make() -> Iterator[Block]:
        for rows in _boxes(here, _BLOCK_ROWS, _piece_elements(weights)):
            yield Block(here, seen, rows)

    return Parts(make, placed, of_rows=True)


def elements(weights: Tensor, mask: Tensor | None) -> Parts[Elements]:
    """Return all weights in order, in parts of bounded size; not those known to be zero."""
    rows = blocks(weights, mask)

    def make() -> Iterator[Elements]:
        for block in rows:
            if as_lazy(weights) is not None:
                yield block.whole()
            else:
                yield from block.elements()

    return Parts(make, rows.placed, of_rows=False)
