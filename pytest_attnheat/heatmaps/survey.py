"""Large maps in full: the sketch that stands for them, made while they are pooled if possible.

Most of what a picture of a large map takes is reading it from memory, so that is done once.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from pytest_attnheat.attention.chunks import spans
from pytest_attnheat.attention.sketch import Found, Sketch, Sketcher, exact
from pytest_attnheat.heatmaps.maps import (
    Array,
    Cells,
    Maps,
    block_max,
    is_tensor,
    smallest,
    to_numpy_bool,
)

# So many elements stay in the cache of one core while several things are done with them.
_CACHED = 9 << 15
_SHORTEST = 4
# The largest weights, and the smallest ones if any is below zero.
_Ends: TypeAlias = tuple[npt.NDArray[Any], npt.NDArray[Any] | None]
# Maps of so many elements are held by their picture.
_HELD = 1 << 24
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Whole:
    """What is known of maps besides the cells that they are pooled to.

    Attributes:
        sketch: of their weights.
        masks: a checksum of the mask of each map, by row and column; None without a mask.
        maps: the maps themselves, not copied, to be asked how they differ from others; None where
            they are too many to be held as long as the picture is.
    """

    sketch: Sketch
    masks: list[list[int]] | None
    maps: Maps | None = None


def whole_of(maps: Maps) -> Whole:
    """Sketch maps in full, where the data live."""
    rows, columns, queries, keys = maps.shape
    sketcher = Sketcher(rows * columns, queries, keys)
    for index, row in enumerate(maps.rows):
        sketcher.add(slice(index * columns, (index + 1) * columns), slice(0, queries), row)
    return Whole(
        sketcher.sketch(), None if maps.mask is None else _checksums(maps.mask), _held(maps)
    )


def _held(maps: Maps) -> Maps | None:
    return maps if math.prod(maps.shape) <= _HELD else None


@dataclass(frozen=True)
class Survey:
    """What one pass over maps finds.

    Attributes:
        cells: what `pool` returns.
        signed: what it returns of signed maps.
        low: the smallest weight; 0 where all are between 0 and 1.
        whole: what `whole_of` returns.
    """

    cells: Cells
    signed: Cells
    low: float
    whole: Whole


def survey(maps: Maps, block: tuple[int, int]) -> Survey | None:
    """Pool and sketch maps in one pass over the memory of the host.

    Returns None for what asks for more care: a mask, another device, values that are not finite;
    and for blocks of few queries, whose maxima take longer here than in `pool`.
    """
    if block[0] < _SHORTEST or maps.mask is not None:
        return None
    if is_tensor(maps.rows[0]) and maps.rows[0].device.type != "cpu":
        return None
    rows, columns, queries, keys = maps.shape
    sketcher = Sketcher(rows * columns, queries, keys)
    shape = (rows, columns, -(-queries // block[0]), -(-keys // block[1]))
    largest, signed, low = np.empty(shape, np.float32), np.empty(shape, np.float32), 0.0
    for index, row in enumerate(maps.rows):
        # Of large maps one at a time, of small ones as many as are a chunk.
        for m in spans(columns, max(1, _CACHED // (block[0] * keys))):
            here = slice(index * columns + m.start, index * columns + m.stop)
            step = _CACHED // ((m.stop - m.start) * keys)
            found = _ends_of(
                sketcher, here, row[m], spans(queries, step, multiple_of=block[0]), block[0]
            )
            if found is None:
                return None
            most = block_max(np.concatenate([high for high, _ in found], 1), -1, block[1])
            if all(least is None for _, least in found):
                largest[index, m] = signed[index, m] = most
                continue
            lows = [high if least is None else least for high, least in found]
            least = block_max(np.concatenate(lows, 1), -1, block[1], least=True)
            low = min(low, float(least.min()))
            largest[index, m], signed[index, m] = most, np.where(-least > most, least, most)
    masked = np.zeros(shape, np.bool_)
    cells = Cells(largest, masked, block)
    if low == 0 and float(largest.max()) > 1:
        low = smallest(maps, cells)
    return Survey(
        cells, Cells(signed, masked, block, True), low, Whole(sketcher.sketch(), None, _held(maps))
    )


def _ends_of(
    sketcher: Sketcher, maps: slice, row: Array, chunks: Iterable[slice], size: int
) -> list[_Ends] | None:
    """Sketch some maps, and return `_ends` of each chunk of their queries; None if one has none.

    Two threads do it: what takes the time waits for memory, outside of Python's lock.
    """

    def read(chosen: slice) -> tuple[_Ends, list[Found]] | None:
        part = exact(row[:, chosen])
        ends = _ends(part, size)
        if ends is None:
            return None
        largest = ends[0].max(1) if ends[1] is None else None
        return ends, sketcher.numbers(maps, chosen, part, largest)

    found = []
    with ThreadPoolExecutor(2) as threads:
        for one in threads.map(read, chunks):
            if one is None:
                return None
            found.append(one[0])
            for numbers in one[1]:
                sketcher.take(*numbers)
    return found


def _ends(part: npt.NDArray[Any], size: int) -> _Ends | None:
    """Return the largest weight of each run of rows, (maps, runs, keys), and the smallest one.

    The second is None where no weight is below zero. Nothing is returned of weights that are not
    all finite.
    """
    # Without their signs, bits of what is below zero are more than all others, and those of NaN
    # and infinity lie between: one pass tells whether there are any.
    bits = part.view(f"u{part.itemsize}")
    high = block_max(bits, -2, size)
    if high.max() <= np.array(_LARGEST, part.dtype).view(bits.dtype):
        return high.view(part.dtype), None
    high, low = (block_max(part, -2, size, least=least) for least in (False, True))
    return (high, low) if low.min() >= -_LARGEST and high.max() <= _LARGEST else None


def _checksums(mask: Array) -> list[list[int]]:
    """Return a checksum of each map of a mask, made once where a view repeats it."""
    strides = mask.stride() if is_tensor(mask) else mask.strides
    rows, columns = (slice(0, 1) if step == 0 else slice(None) for step in strides[:2])
    sums = [
        [zlib.crc32(np.packbits(to_numpy_bool(one)).tobytes()) for one in row]
        for row in mask[rows, columns]
    ]
    found: list[list[int]] = np.broadcast_to(sums, tuple(mask.shape[:2])).tolist()
    return found
