"""Large maps in full: the sketch that stands for them, made while they are pooled if possible.

Most of what a picture of a large map takes is reading it from memory, so that is done once.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from ..attention.chunks import spans
from ..attention.sketch import Sketch, Sketcher, exact
from ..inputs import InBoxes
from .maps import HELD, Array, Cells, Maps, at, block_max, is_tensor, smallest, to_numpy_bool

# So many elements stay in the cache of one core while several things are done with them.
_CACHED = 9 << 15
_SHORTEST = 4
# The largest weights, and the smallest ones if any is below zero.
_Ends: TypeAlias = tuple[npt.NDArray[Any], npt.NDArray[Any] | None]
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Whole:
    """What is known of maps besides the cells that they are pooled to."""

    sketch: Sketch  # of their weights
    masks: list[list[int]] | None  # a checksum for each map, by row and column; None without mask
    # the maps themselves, not copied, to be asked how they differ from others; None where they are
    # too many to be held as long as the picture is
    maps: Maps | None = None


def whole_of(maps: Maps) -> Whole:
    """Sketch maps in full, where the data live."""
    rows, columns, queries, keys = maps.shape
    sketcher = Sketcher(rows * columns, queries, keys)
    for index, row in enumerate(maps.rows):
        sketcher.add(slice(index * columns, (index + 1) * columns), slice(0, queries), row)
    return Whole(
        sketcher.sketch(),
        None if maps.mask is None else _checksums(maps.mask, maps.shape[:2]),
        _held(maps),
    )


def _held(maps: Maps) -> Maps | None:
    return maps if math.prod(maps.shape) <= HELD else None


@dataclass(frozen=True)
class Survey:
    """What one pass over maps finds."""

    cells: Cells  # what `pool` returns
    signed: Cells  # what it returns of signed maps
    low: float  # the smallest weight; 0 where all are between 0 and 1
    whole: Whole  # what `whole_of` returns


def survey(maps: Maps, block: tuple[int, int]) -> Survey | None:
    """Pool and sketch maps in one pass over the memory of the host."""
    # Returns None for what asks for more care: a mask, another device, values that are not finite;
    # and for blocks of few queries, whose maxima take longer here than in `pool`.
    held = not isinstance(maps.rows[0], InBoxes)
    if maps.mask is not None or (held and block[0] < _SHORTEST):
        return None
    if is_tensor(maps.rows[0]) and maps.rows[0].device.type != "cpu":
        return None
    rows, columns, queries, keys = maps.shape
    sketcher = Sketcher(rows * columns, queries, keys)
    shape = (rows, columns, -(-queries // block[0]), -(-keys // block[1]))
    # What is known to be zero is not read.
    largest, least = np.full(shape, -math.inf if held else 0.0, np.float32), np.zeros(shape)
    for index, row in enumerate(maps.rows):
        # Of large maps one at a time, of small ones as many as are a chunk.
        for m in spans(columns, max(1, _CACHED // (block[0] * keys))):
            here = slice(index * columns + m.start, index * columns + m.stop)
            step = _CACHED // ((m.stop - m.start) * keys)
            for chosen in spans(queries, step, multiple_of=block[0]) if held else _cuts(row, block):
                first, part = _read(row, m, chosen, block[1])
                ends = _ends(part, block[0])
                if ends is None:
                    return None
                most = ends[0].max(1) if ends[1] is None and not is_tensor(part) else None
                sketcher.add(here, chosen, part, most, first)
                cell = (
                    index,
                    m,
                    slice(chosen.start // block[0], -(-chosen.stop // block[0])),
                    slice(first // block[1], -(-(first + ends[0].shape[-1]) // block[1])),
                )
                high = block_max(ends[0], -1, block[1])
                low = high if ends[1] is None else block_max(ends[1], -1, block[1], least=True)
                largest[cell] = np.maximum(largest[cell], high)
                least[cell] = np.minimum(least[cell], low)
    masked, low = np.zeros(shape, np.bool_), min(0.0, float(least.min()))
    signed = np.where(-least > largest, least, largest).astype(np.float32)
    cells = Cells(largest, masked, block)
    if low == 0 and float(largest.max()) > 1:
        low = smallest(maps, cells)
    return Survey(
        cells, Cells(signed, masked, block, True), low, Whole(sketcher.sketch(), None, _held(maps))
    )


def _cuts(row: Array, block: tuple[int, int]) -> list[slice]:
    """Cut the queries of maps that are not held where their blocks end, and where cells do."""
    step = row.blocks.rows
    step = step // block[0] * block[0] or step
    return [
        slice(cell + own.start, cell + own.stop)
        for cell in range(0, row.shape[1], max(block[0], step))
        for own in spans(min(max(block[0], step), row.shape[1] - cell), step)
    ]


def _read(row: Array, maps: slice, queries: slice, width: int) -> tuple[int, Array]:
    """Return some queries of some maps from a key on: where a cell begins that may hold weight."""
    if not isinstance(row, InBoxes):
        return 0, exact(row[maps, queries])
    runs = row.runs((maps, queries)) or [slice(0, 1)]  # type: ignore[attr-defined]
    first = runs[0].start // width * width
    last = min(-(-runs[-1].stop // width) * width, row.shape[-1])
    return first, exact(row[maps, queries, first:last])


def _ends(part: npt.NDArray[Any], size: int) -> _Ends | None:
    """Return the largest weight of each run of rows, (maps, runs, keys), and the smallest one."""
    # The second is None where no weight is below zero. Nothing is returned of weights that are not
    # all finite.
    if is_tensor(part):  # of softmax, on another device
        high = block_max(tensor := cast("Any", part), -2, size)
        sound = high.isfinite().all() & (tensor.amin() >= 0)
        return (high.float().cpu().numpy(), None) if bool(sound) else None
    # Without their signs, bits of what is below zero are more than all others, and those of NaN
    # and infinity lie between: one pass tells whether there are any.
    bits = part.view(f"u{part.itemsize}")
    high = block_max(bits, -2, size)
    if high.max() <= np.array(_LARGEST, part.dtype).view(bits.dtype):
        return high.view(part.dtype), None
    high, low = (block_max(part, -2, size, least=least) for least in (False, True))
    return (high, low) if low.min() >= -_LARGEST and high.max() <= _LARGEST else None


def _checksums(mask: Array, shape: tuple[int, ...]) -> list[list[int]]:
    """Return a checksum of each map of a mask, made once where a view repeats it."""
    if isinstance(mask, InBoxes):
        numbers = [range(size) for size in mask.shape[:2]]
        some = [[at(at(mask, row), column) for column in numbers[1]] for row in numbers[0]]
    else:
        strides = mask.stride() if is_tensor(mask) else mask.strides
        rows, columns = (slice(0, 1) if step == 0 else slice(None) for step in strides[:2])
        some = mask[rows, columns]
    sums = [[_checksum(one) for one in row] for row in some]
    found: list[list[int]] = np.broadcast_to(sums, shape).tolist()
    return found


def _checksum(mask: Array) -> int:
    """Return that of one map, of a few queries after the others: bytes hold eight each."""
    found = 0
    for rows in spans(mask.shape[0], max(1, HELD // mask.shape[1]), multiple_of=8):
        found = zlib.crc32(np.packbits(to_numpy_bool(mask[rows])).tobytes(), found)
    return found
