"""Maps in few numbers: any change of a map shows in them, with its row and its column.

A sketch of a map of n x n weights has a few numbers for each row and each column: their sum, and
their sum after each weight was multiplied by the number of its position, which is between 1 and 2
and of either sign. Weights that trade places, or that change so that sums stay, change the second
one. The numbers of positions are drawn by Philox from a fixed key: they are the same on every
machine and under every version. Blocks are added up in float64: no map need ever be held at once.

Nothing here imports torch: a tensor can only be given by somebody who has.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from .chunks import pieces
from .vocabulary import HIDDEN_FROM

Array: TypeAlias = Any  # a torch.Tensor or a numpy.ndarray
Numbers: TypeAlias = npt.NDArray[np.float64]

_KEY = 20260711
# Elements of a block: as float64, it stays in the cache of one core, or keeps a GPU busy.
_BLOCK, _GPU_BLOCK = 9 << 15, 1 << 24
# What stands for a value that cannot be added up, or that would drown all others.
_NAN, _INFINITE, _HIDDEN = 2.718, 1.414, -3.142
# Beyond float32 is infinite, as it is in pictures.
_LARGEST = float(np.finfo(np.float32).max)
# Rounding may move a number by the tolerance times itself and so many norms of the weights behind
# it (a trained model takes 3.9 in bfloat16 and 1.7 in float32), and this part of the typical norm
# of its map, where weights are so small that the rounding of their logarithms shows.
_NORMS, _TYPICAL = 4.0, 0.1
# Stored norms are powers of 2, rounded up; this one is no norm at all.
_NO_NORM = -(1 << 15)
# Numbers that are rounded have so many bits less than float32.
_DROPPED_BITS = 6


@dataclass(frozen=True)
class Side:
    """The numbers of all rows, or of all columns, of some maps."""

    sums: Numbers | None  # (maps, groups), what the weights of a row sum to; None if not kept
    signed: Numbers  # (maps, groups), what they sum to, each times the number of its position
    norms: Numbers  # (maps, groups), the roots of the sums of their squares
    span: int = 1  # Rows that are one group; the numbers of their positions go into `signed`

    def folded(self, span: int) -> Side:
        """Return the numbers of groups of so many neighbours, of rows or columns not grouped."""
        if span == 1:
            return self
        starts = np.arange(0, self.signed.shape[1], span)

        def added(numbers: Numbers) -> Numbers:
            return np.add.reduceat(numbers, starts, axis=1)

        sums = None if self.sums is None else added(self.sums)
        signed = added(self.signed * _within(self.signed.shape[1], span))
        return Side(sums, signed, np.sqrt(added(self.norms**2)), span)

    def excess(self, other: Side, tolerance: float | Numbers, step: float) -> Numbers:
        """Return how far each group is from another's, (maps, groups), as a part of what may be."""
        # Weights may differ by a part of themselves, (maps, 1) for each map; `step`: by what part
        # of their norm both numbers were rounded, together.
        norms = np.maximum(self.norms, other.norms)
        typical = np.sqrt((norms**2).mean(axis=1, keepdims=True))
        free = tolerance * (_NORMS * norms + _TYPICAL * typical) + step * norms
        found = [np.zeros_like(norms)]
        for one, two in ((self.sums, other.sums), (self.signed, other.signed)):
            if one is not None and two is not None:
                off = np.abs(one - two)
                allowed = free + (tolerance + step) * np.abs(one)
                with np.errstate(divide="ignore", invalid="ignore"):
                    found.append(np.where(off > 0, off / allowed, 0.0))
        most: Numbers = np.maximum.reduce(found)
        return most


@dataclass(frozen=True)
class Sketch:
    """What stands for some maps."""

    rows: Side  # Of their rows, which are queries
    columns: Side  # Of their columns, which are keys
    step: float = 0.0  # What the numbers were rounded by, as a part of their norm; 0 for not at all

    def folded(self, spans: tuple[int, int]) -> Sketch:
        """Return the sketch of groups of rows and of columns."""
        return Sketch(self.rows.folded(spans[0]), self.columns.folded(spans[1]), self.step)

    def excess(self, other: Sketch, tolerance: float | Numbers) -> tuple[Numbers, Numbers]:
        """Return how far rows and columns are from another's; above 1 is more than may be."""
        step = (self.step + other.step) / 2
        return (
            self.rows.excess(other.rows, tolerance, step),
            self.columns.excess(other.columns, tolerance, step),
        )


class Sketcher:
    """Adds up the sketch of some maps, from blocks of their rows in any order."""

    def __init__(self, maps: int, queries: int, keys: int) -> None:
        self._left, self._right = positions(queries), positions(keys)
        self._rows = np.zeros((3, maps, queries))
        self._columns = np.zeros((3, maps, keys))
        # The squares of a block: memory that is new each time takes longer than the sums.
        self._squares = np.empty(min(_BLOCK, maps * queries * keys))

    def add(
        self,
        maps: slice,  # Which maps
        rows: slice,  # Which of their rows
        part: Array,  # Their weights
        # (maps, keys), of an array without anything below zero or infinite, what no weight of each
        # column exceeds, if known: then norms of columns are at least what they are, as the square
        # root of this times the sum, which takes no time
        largest: npt.NDArray[Any] | None = None,
        key: int = 0,  # The number of the first key; those before it may be left out
    ) -> None:
        """Add some rows of some maps, (maps, rows, keys); the last keys may be left out."""
        first, top = maps.start or 0, rows.start or 0
        on_host = not _is_tensor(part) or part.device.type in ("cpu", "mps")
        for m, r, k in pieces(part.shape, _BLOCK if on_host else _GPU_BLOCK):
            here = slice(top + r.start, top + r.stop)
            among = slice(first + m.start, first + m.stop)
            block, there = exact(part[m, r, k]), slice(key + k.start, key + k.stop)
            found = self._numbers(block, here, there, None if largest is None else largest[m, k])
            if not (found[0][2] < HIDDEN_FROM**2).all():
                found = self._numbers(_cleaned(block), here, there)
            totals = *self._rows[:, among, here], *self._columns[:, among, there]
            for total, numbers in zip(totals, (*found[0], *found[1]), strict=True):
                total += numbers.cpu().numpy() if _is_tensor(numbers) else numbers

    def join(self, summed: Callable[[Numbers], Numbers]) -> None:
        """Add what others added of the same maps, elsewhere: `summed` returns the sum of all."""
        self._rows, self._columns = summed(self._rows), summed(self._columns)

    def _numbers(
        self, block: Array, rows: slice, columns: slice, largest: npt.NDArray[Any] | None = None
    ) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """Return sums, signed sums and sums of squares of rows, (maps, rows), and of columns."""
        left, right = self._left[:, rows], self._right[:, columns]
        if _is_tensor(block):
            left, right = (sys.modules["torch"].from_numpy(n).to(block) for n in (left, right))
            squares = block * block
            of_squares = squares.sum(-1), squares.sum(-2)
            both, sums = block @ right.T, left @ block
        else:
            left, right = left.astype(block.dtype), right.astype(block.dtype)
            # What is infinite is seen to later.
            with np.errstate(invalid="ignore", over="ignore"):
                both, sums = block @ right.T, left @ block
                # Each row times itself: of the ways to norms the one that only reads.
                of_rows = (block[..., None, :] @ block[..., None])[..., 0, 0]
                if largest is None:
                    squares = self._squares.view(block.dtype)[: block.size].reshape(block.shape)
                    np.multiply(block, block, out=squares)
                    of_squares = of_rows, left[0] @ squares
                else:
                    of_squares = of_rows, largest * sums[..., 0, :]
        return (
            (both[..., 0], both[..., 1], of_squares[0]),
            (sums[..., 0, :], sums[..., 1, :], of_squares[1]),
        )

    def sketch(self) -> Sketch:
        """Return what was added up so far."""
        rows, columns = (
            Side(sums, signed, np.sqrt(squares))
            for sums, signed, squares in (self._rows, self._columns)
        )
        return Sketch(rows, columns)


def positions(count: int) -> Numbers:
    """Return ones, and the numbers of positions: (2, count)."""
    raw = np.random.Philox(key=_KEY).random_raw(count)
    sizes = 1 + (raw >> np.uint64(8)) % np.uint64(256) / 256
    return np.stack([np.ones(count), np.where(raw & np.uint64(1), sizes, -sizes)])


def _within(count: int, span: int) -> Numbers:
    """Return numbers of positions that differ within each group: (count,)."""
    # Of two rows of equal numbers, nobody would see that they trade places.
    own = positions(count)[1]
    groups = np.arange(count) // span
    order = np.lexsort((np.abs(own), groups))
    ranks = np.empty(count)
    ranks[order] = np.arange(count) - groups[order] * span
    return np.where(own > 0, 1, -1) * (1 + (ranks + 0.5) / span)


def exact(part: Array) -> Array:
    """Return a block where it is, as float64; on the host as an array, as float32 if exact."""
    # Sums of a block in float32 are off by 1e-7 of their norm, a hundredth of what may differ.
    if _is_tensor(part):
        if part.device.type not in ("cpu", "mps"):
            return part.double()
        part = part.float() if part.itemsize < 4 else part
        part = part.cpu().numpy()
    return part.astype(np.result_type(part.dtype.newbyteorder("="), np.float32), copy=False)


def _cleaned(block: Array) -> Array:
    """Put other numbers in the place of what would drown all others, in float64."""
    library = sys.modules["torch"] if _is_tensor(block) else np
    wide = block if _is_tensor(block) else block.astype(np.float64)
    found = library.where(wide <= HIDDEN_FROM, _HIDDEN, wide)
    found = library.where(wide > _LARGEST, _INFINITE, found)
    return library.where(library.isnan(wide), _NAN, found)


def _is_tensor(value: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


# -- in bytes ------------------------------------------------------------------------------------


def packed(sketch: Sketch, step: float, *, column_sums: bool = True) -> bytes:
    """Return a sketch in as few bytes as show what is larger than `step` times a norm."""
    # The sums of columns take as much as all else of them.
    sums = sketch.columns.sums if column_sums else None
    sides = (sketch.rows, Side(sums, sketch.columns.signed, sketch.columns.norms))
    return b"".join(_packed(side, step) for side in sides)


def _packed(side: Side, step: float) -> bytes:
    with np.errstate(divide="ignore"):
        octaves = np.where(side.norms > 0, np.ceil(np.log2(side.norms)), _NO_NORM)
    norms = np.where(side.norms > 0, 2.0**octaves, 1.0)
    numbers = np.rint(side.signed / norms / step).astype(np.int64)
    # Signs in the last bit: else, those of small numbers fill bytes.
    parts = [octaves.astype("<i2"), np.where(numbers < 0, -2 * numbers - 1, 2 * numbers)]
    parts[1] = parts[1].astype("<u4")
    if side.sums is not None:
        sums = np.clip(side.sums, -_LARGEST / 2, _LARGEST / 2)
        parts.append(rounded(sums.astype("<f4")))
    return b"".join(planes(part) for part in parts)


def rounded(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Round float32 to 18 bits, which is by 4e-6 of themselves; what is not finite stays."""
    bits = values.view(np.uint32).astype(np.uint64)
    half = 1 << (_DROPPED_BITS - 1)
    found = ((bits + half) >> _DROPPED_BITS << _DROPPED_BITS).astype(np.uint32).view(np.float32)
    return np.where(np.isfinite(values) & np.isfinite(found), found, values)


def unpacked(
    data: bytes,
    shape: tuple[int, int, int],
    step: float,
    *,
    column_sums: bool = True,
    spans: tuple[int, int] = (1, 1),
) -> Sketch:
    """Read what `packed` wrote of (maps, row groups, column groups); of the `packed_size` of it."""
    maps, *counts = shape
    sides = []
    for count, with_sums, span in zip(counts, (True, column_sums), spans, strict=True):
        octaves, data = _taken(data, "<i2", (maps, count))
        numbers, data = _taken(data, "<u4", (maps, count))
        sums = None
        if with_sums:
            sums, data = _taken(data, "<f4", (maps, count))
        wide = octaves.astype(np.float64)
        norms = np.where(octaves == _NO_NORM, 1.0, 2.0**wide)
        numbers = numbers.astype(
            np.int64
        )  # to numpy 1.26, a uint32 and an np.int64(1) are a uint32
        sizes = (numbers + 1) // 2
        signed = np.where(numbers % 2, -sizes, sizes) * norms * step
        norms = np.where(octaves == _NO_NORM, 0.0, norms)
        sides.append(Side(None if sums is None else np.float64(sums), signed, norms, span))
    return Sketch(sides[0], sides[1], step)


def packed_size(shape: tuple[int, int, int], *, column_sums: bool = True) -> int:
    """Return how many bytes a packed sketch has."""
    maps, rows, columns = shape
    return maps * (10 * rows + (10 if column_sums else 6) * columns)


def _taken(data: bytes, dtype: str, shape: tuple[int, int]) -> tuple[npt.NDArray[Any], bytes]:
    size = shape[0] * shape[1] * np.dtype(dtype).itemsize
    return from_planes(data[:size], dtype).reshape(shape), data[size:]


def planes(array: npt.NDArray[Any]) -> bytes:
    """Return all first bytes, then all second ones ...: exponents compress, mantissas do not."""
    narrow = np.ascontiguousarray(array)
    return bytes(narrow.view(np.uint8).reshape(-1, narrow.itemsize).T.tobytes())


def from_planes(data: bytes, dtype: str) -> npt.NDArray[Any]:
    """Read what `planes` wrote, as one dimension."""
    octets = np.frombuffer(data, np.uint8).reshape(np.dtype(dtype).itemsize, -1)
    return np.ascontiguousarray(octets.T).view(dtype).ravel()
