"""Reading tensors of any size in small pieces.

The pieces are views, or converted copies of at most a few MB, so that the
extra memory does not depend on the size or on the strides of the tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, reduce

import torch
from torch import Tensor

from pytest_attnheat.attention.chunks import pieces, spans
from pytest_attnheat.inputs import wide_dtype

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

_SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _piece_elements(weights: Tensor) -> int:
    """Return how many weights the thorough reading looks at together."""
    return _BYTES // wide_dtype(weights.dtype).itemsize


def mask_at(mask: Tensor, index: tuple[slice, ...]) -> Tensor:
    """Return the part of a mask, or weights, that belongs to a box: not expanded, not moved."""
    own = tuple(
        slice(0, 1) if size == 1 else span for size, span in zip(mask.shape, index, strict=True)
    )
    return mask[own]


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
    """Tell quickly whether all rows are distributions, those without a key zero.

    True is certain. False means that the thorough reading must decide: minus
    zero, for instance, looks negative here.

    Args:
        weights: `(..., queries, keys)`.
        mask: As `as_mask` returns it.
        allowed: The largest |row sum - 1|.

    Returns:
        Whether every row passes.
    """
    sound = _sound(weights, mask, allowed)
    return sound is not None and bool(sound)


def rows_and_columns_sum_to_one(weights: Tensor, mask: Tensor | None, allowed: float) -> bool:
    """Tell the same of rows and columns, and wait for the device once."""
    rows = _sound(weights, mask, allowed)
    columns = _sound(weights.mT, None if mask is None else mask.mT, allowed)
    return rows is not None and columns is not None and bool(rows & columns)


def _sound(weights: Tensor, mask: Tensor | None, allowed: float) -> Tensor | None:
    """Return whether all rows pass, as a scalar on their device; None if they must be read."""
    key_len, size = weights.shape[-1], weights.element_size()
    if weights.is_neg() or key_len > _BYTES_ON_CPU // 8:
        return None  # the sign is kept apart from the bits; a row must fit into a piece
    on_cpu = weights.device.type == "cpu"
    # On a CPU, summing half precision into float32 directly takes ten times as long as converting
    # a piece that then stays in the cache.
    convert = size < (4 if on_cpu else 2)
    budget = _BYTES_ON_CPU if on_cpu or convert else _BYTES_ON_ACCELERATOR
    limit = max(min(budget // max(size, 4), _ROWS * key_len), key_len)
    sound = torch.ones((), dtype=torch.bool, device=weights.device)
    for index in pieces(weights.shape, limit):
        piece = weights[index]
        # The sign bit makes an integer of the same width negative, and integers are compared faster
        # than floats. NaN and infinity need no look of their own: they show in the sum.
        sound &= piece.view(_SIGNED[size]).amin() >= 0
        totals = (piece.float() if convert else piece).sum(-1, dtype=wide_dtype(weights.dtype))
        good = totals.sub(1).abs_() <= allowed
        if mask is not None:
            attends = any_key(mask_at(mask, index)).to(weights.device)
            good = torch.where(attends, good, totals == 0)
        sound &= good.all()
    return sound


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
        height = 1
        for size, span in zip(weights.shape, index, strict=False):
            height *= len(range(size)[span])
        self._key_spans = spans(self.key_len, max(1, _piece_elements(weights) // height))

    def elements(self) -> Iterator[Elements]:
        """Yield the weights, in parts of bounded size."""
        for keys in self._key_spans:
            whole = len(self._key_spans) == 1
            yield Elements(self, keys, self._whole if whole else self._values(keys))

    def permitted(self, keys: slice) -> Tensor:
        """Return the mask of some keys, not expanded; without a mask, every key is permitted."""
        if self._mask is None:
            ones = (1,) * (len(self.index) + 1)
            return torch.ones(ones, dtype=torch.bool, device=self.device)
        return mask_at(self._mask, (*self.index, keys)).to(self.device)

    def reduce(
        self, measure: Callable[[Elements], Tensor], combine: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Measure each part and combine the results."""
        return reduce(combine, map(measure, self.elements()))

    def _values(self, keys: slice) -> Tensor:
        index = (*self.index, keys)
        return self._weights[index].to(wide_dtype(self._weights.dtype))

    # The numbers alone: a block that kept its elements would be kept by them.
    @cached_property
    def _whole(self) -> Tensor:
        return self._values(self._key_spans[0])

    @cached_property
    def total(self) -> Tensor:
        """The sum of each row."""
        return self.reduce(lambda part: part.values.sum(-1), torch.add)

    @cached_property
    def low(self) -> Tensor:
        """The smallest weight of each row."""
        return self.reduce(lambda part: part.values.amin(-1), torch.minimum)

    @cached_property
    def high(self) -> Tensor:
        """The largest weight of each row."""
        return self.reduce(lambda part: part.values.amax(-1), torch.maximum)

    @cached_property
    def numbers(self) -> Tensor:
        """How many weights of each row are not NaN."""
        return self.reduce(lambda part: (part.values == part.values).sum(-1), torch.add)

    @cached_property
    def entropy(self) -> Tensor:
        """The entropy of each row in nats, 0 log 0 being 0."""
        negative = self.reduce(
            lambda part: torch.xlogy(part.values, part.values).sum(-1), torch.add
        )
        return 0 - negative  # not neg(), which makes -0 of the 0 of a one-hot row

    @cached_property
    def permitted_keys(self) -> Tensor:
        """The number of keys to which each row may attend."""

        def count(part: Elements) -> Tensor:
            permitted, values = part.permitted, part.values
            # A mask of one key stands for all of them; counting before expanding is cheaper.
            copies = values.shape[-1] // permitted.shape[-1]
            return (permitted.sum(-1) * copies).to(values.dtype).expand(values.shape[:-1])

        return self.reduce(count, torch.add)

    @cached_property
    def attends(self) -> Tensor:
        """Whether each row may attend to any key."""
        return self.reduce(
            lambda part: any_key(part.permitted).expand(part.values.shape[:-1]), torch.logical_or
        )

    @cached_property
    def leaked(self) -> Tensor:
        """The largest magnitude at a masked key of each row; NaN counts as none."""

        def largest(part: Elements) -> Tensor:
            nothing = part.permitted | part.values.isnan()
            return part.values.abs().masked_fill_(nothing, 0).amax(-1)

        return self.reduce(largest, torch.maximum)

    def misfit(self, *, masked: bool) -> Tensor:
        """Return how far each row strays from uniform, as a part of a uniform weight.

        Args:
            masked: Whether uniform means over the permitted keys and zero
                elsewhere, or over all keys.
        """
        count = self.permitted_keys if masked else torch.full_like(self.low, self.key_len)

        def farthest(part: Elements) -> Tensor:
            relative = part.values * count.unsqueeze(-1)
            everywhere = not masked or self._mask is None
            relative -= 1 if everywhere else part.permitted.to(relative.dtype)
            return relative.abs_().amax(-1)

        return self.reduce(farthest, torch.maximum)


@dataclass(frozen=True)
class Elements:
    """The weights of some keys of a block, in the dtype in which they are added up."""

    block: Block
    keys: slice
    values: Tensor

    @property
    def index(self) -> tuple[slice, ...]:
        """Where they are in the weights."""
        return (*self.block.index, self.keys)

    @property
    def permitted(self) -> Tensor:
        """Where the mask permits, not expanded."""
        return self.block.permitted(self.keys)


def blocks(weights: Tensor, mask: Tensor | None) -> Iterator[Block]:
    """Yield all rows, in blocks of bounded size."""
    limit = max(1, min(_BLOCK_ROWS, _piece_elements(weights) // weights.shape[-1]))
    for rows in pieces(weights.shape[:-1], limit):
        yield Block(weights, mask, rows)


def elements(weights: Tensor, mask: Tensor | None) -> Iterator[Elements]:
    """Yield all weights, in parts of bounded size."""
    for block in blocks(weights, mask):
        yield from block.elements()
