"""What a picture shows: the maps a user gives, checked and pooled to the cells that fit.

Maps may be tensors of any device, NumPy arrays or nested lists. Tensors are reduced where
they live, and only the reduced cells are copied to the host. Nothing here imports torch: a
tensor can only be given by somebody who has.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ..attention.chunks import spans
from ..inputs import InBoxes, dtype_name, misuse

Array: TypeAlias = Any  # a torch.Tensor or a numpy.ndarray
Floats: TypeAlias = npt.NDArray[np.float32]
Bools: TypeAlias = npt.NDArray[np.bool_]

_ACCEPTED = (
    "a tensor or array of real numbers with 2 dimensions (queries, keys), 3 (columns, queries, "
    "keys) or 4 (rows, columns, queries, keys), a list of layers (1, heads, queries, keys), or "
    "nested lists of equal maps"
)

# A weight that is below zero by no more than this share of the largest one is so by rounding.
_ROUNDING = 0.01
# Maps of so many elements are held by their picture.
HELD = 1 << 24
# Reducing works through at most this many elements at a time where it needs a copy of them.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Maps:
    """A grid of maps as nested views: `rows[r]` is an array (columns, queries, keys).

    `mask` is boolean, True where a query may attend, and has the full shape (as a view). Layered
    are those of a list (1, heads, queries, keys), as models return them.
    """

    rows: list[Array]
    mask: Array | None
    shape: tuple[int, int, int, int]
    dtype: str
    layered: bool = False

    def map(self, row: int, column: int) -> npt.NDArray[np.float64]:
        """Return a copy of one map on the host."""
        chosen = self.rows[row][column]
        array = chosen.cpu().double().numpy() if is_tensor(chosen) else chosen
        return np.array(array, dtype=np.float64)

    def permitted(self, row: int, column: int) -> Bools:
        """Return where the queries of one map may attend."""
        if self.mask is None:
            return np.ones(self.shape[2:], np.bool_)
        return to_numpy_bool(self.mask[row, column])


def distance(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return how far numbers are apart; infinity where one is none or infinite, and only that."""
    with np.errstate(invalid="ignore", over="ignore"):
        apart = np.abs(other - one, dtype=np.float64)
    same = (one == other) | (np.isnan(one) & np.isnan(other))
    return np.where(same, 0.0, np.where(np.isnan(apart), np.inf, apart))


@dataclass(frozen=True)
class Cells:
    """Maps reduced to the cells that a picture can show."""

    values: Floats  # float32 (rows, columns, queries, keys), the largest weight of each block
    masked: Bools  # boolean, the same shape; True where no element of the block may be attended to
    # elements (queries, keys) that one cell stands for; (1, 1) is every weight itself
    block: tuple[int, int]
    signed: bool = False  # whether a cell shows what lies farthest from zero, not the largest


def is_tensor(value: object) -> bool:
    """Tell whether a value is a torch.Tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def at(rows: Array, index: int) -> Array:
    """Return one row of maps, or of their mask: what is not held is not read."""
    if not isinstance(rows, InBoxes):
        return rows[index]
    return rows.map_at((index if rows.shape[0] > 1 else 0,))  # type: ignore[attr-defined]


def read_maps(matrices: object, mask: object = None) -> Maps:
    """Check what a user gave and view it as a grid of maps."""
    rows = _rows(matrices)
    shapes = {tuple(row.shape) for row in rows}
    if len(shapes) > 1:
        got = f"maps of different shapes {sorted(shape[1:] for shape in shapes)}"
        raise ValueError(_refused(got))
    shape = (len(rows), *shapes.pop())
    if 0 in shape:
        raise ValueError(_refused(f"shape {shape}, in which there is nothing to show"))
    layered = isinstance(matrices, (list, tuple)) and getattr(matrices[0], "ndim", 0) == 4
    given = _read_mask(mask, shape, is_tensor(rows[0]))
    return Maps(rows, given, shape, dtype_name(rows[0]), layered)


def _refused(got: str) -> str:
    return misuse("matrices", got, _ACCEPTED)


def _rows(matrices: object) -> list[Array]:
    if isinstance(matrices, (list, tuple)):
        return _rows_of_list(matrices)
    array = _number_array(matrices)
    if array.ndim not in (2, 3, 4):
        raise ValueError(_refused(f"{array.ndim} dimension(s), shape {tuple(array.shape)}"))
    if 0 in array.shape:
        got = f"shape {tuple(array.shape)}, in which there is nothing to show"
        raise ValueError(_refused(got))
    if array.ndim == 4:
        return [at(array, index) for index in range(array.shape[0])]
    if isinstance(array, InBoxes):
        return [array if array.ndim == 3 else array.unsqueeze(0)]  # type: ignore[attr-defined]
    return [array if array.ndim == 3 else array[None]]


def _rows_of_list(matrices: Sequence[object]) -> list[Array]:
    if not matrices:
        raise ValueError(_refused("an empty list"))
    if any(entry is None for entry in matrices):
        advice = "A model of transformers computes weights with attn_implementation='eager'"
        raise TypeError(f"{_refused('a list with None')}. {advice}")
    if not _holds_arrays(matrices):
        try:
            array = np.array(matrices, dtype=np.float32)
        except (TypeError, ValueError) as error:
            got = f"nested lists that are not equal maps of numbers ({error})"
            raise ValueError(_refused(got)) from None
        return _rows(array)
    entries = [entry if _holds_arrays(entry) else np.array(entry) for entry in matrices]
    if any(isinstance(row, (list, tuple)) for row in entries):
        return [_stack(row if isinstance(row, (list, tuple)) else [row]) for row in entries]
    arrays = [_number_array(array) for array in entries]
    if all(array.ndim == 3 for array in arrays):
        return arrays
    if all(array.ndim == 4 for array in arrays):  # layers, as transformers returns them
        return [_only_entry(array) for array in arrays]
    return [_stack(arrays)]


def _only_entry(layer: Array) -> Array:
    if layer.shape[0] != 1:
        got = f"a list of arrays (batch, heads, queries, keys) with a batch of {layer.shape[0]}"
        accepted = "one batch entry of each, for example [layer[0] for layer in attentions]"
        raise ValueError(misuse("matrices", got, accepted))
    return layer[0]


def _holds_arrays(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_holds_arrays(entry) for entry in value)
    return is_tensor(value) or (isinstance(value, np.ndarray) and value.ndim > 0)


def _stack(maps: Sequence[object]) -> Array:
    arrays = [_number_array(np.array(m) if isinstance(m, (list, tuple)) else m) for m in maps]
    shapes = [tuple(array.shape) for array in arrays]
    if any(len(shape) != 2 for shape in shapes) or len(set(shapes)) > 1:
        got = f"a list with a row of maps of shapes {shapes}, not equal two-dimensional ones"
        raise ValueError(_refused(got))
    if all(is_tensor(array) for array in arrays):
        return sys.modules["torch"].stack(arrays)
    return np.stack([_to_numpy(array) for array in arrays])


def _number_array(value: object) -> Array:
    """Return the value as a real array or detached dense tensor, or say what is wrong with it."""
    if isinstance(value, InBoxes):
        value.whole("matrices")
        return value[()] if math.prod(value.shape) <= HELD else value
    if is_tensor(value):
        return _number_tensor(value)
    if isinstance(value, np.ma.MaskedArray):
        text = _refused("a masked array, whose mask is True where values are hidden")
        advice = "Pass array.data, with mask=~numpy.ma.getmaskarray(array)"
        raise TypeError(f"{text}. {advice}")
    if not isinstance(value, np.ndarray):
        raise TypeError(_refused(type(value).__name__))
    # ml_dtypes registers bfloat16 and the 8-bit floats with NumPy as kind "V".
    if value.dtype.kind not in "fiub" and "float" not in value.dtype.name:
        raise TypeError(_refused(f"dtype {value.dtype}"))
    return value


def _number_tensor(tensor: Array) -> Array:
    torch = sys.modules["torch"]
    if tensor.is_complex() or tensor.is_quantized:
        raise TypeError(_refused(f"dtype {dtype_name(tensor)}"))
    if tensor.is_nested or tensor.layout != torch.strided or tensor.device.type == "meta":
        kind = "nested" if tensor.is_nested else tensor.layout
        got = f"a tensor without dense values (layout {kind}, device {tensor.device})"
        raise TypeError(f"{_refused(got)}. Pass a dense one, for example tensor.to_dense()")
    return tensor.detach().resolve_neg()


def _read_mask(mask: Any, shape: tuple[int, ...], as_tensor: bool) -> Array | None:
    if mask is None:
        return None
    if isinstance(mask, InBoxes):
        if math.prod(shape) > HELD:
            while mask.ndim < 4:
                mask = mask.unsqueeze(0)  # type: ignore[attr-defined]
            return mask
        mask = mask[()]
    if isinstance(mask, (list, tuple)):
        mask = np.array(mask)
    if isinstance(mask, np.ndarray) and as_tensor:
        # A copy, because torch warns of arrays that may not be written to.
        mask = sys.modules["torch"].from_numpy(np.array(mask))
    accepted = "a boolean tensor or array, True where a query may attend"
    if not (is_tensor(mask) or isinstance(mask, np.ndarray)):
        raise TypeError(misuse("mask", type(mask).__name__, accepted))
    array: Array = mask.detach() if is_tensor(mask) else mask
    if dtype_name(array) != "bool":
        text = misuse("mask", f"dtype {dtype_name(array)}", accepted)
        advice = "Pass mask.bool() for ones and zeros, mask == 0 for an additive mask"
        raise TypeError(f"{text}. {advice}")
    try:
        return array.expand(shape) if is_tensor(array) else np.broadcast_to(array, shape)
    except (RuntimeError, ValueError):
        accepted = f"one that broadcasts to the shape {shape} of the maps"
        raise ValueError(misuse("mask", f"shape {tuple(array.shape)}", accepted)) from None


def pool(maps: Maps, block: tuple[int, int], *, signed: bool = False) -> Cells:
    """Reduce maps by whole blocks to their largest permitted weight, where the data live."""
    # Signed maps, such as differences, are reduced to what lies farthest from zero instead.
    # The last block of a row or column may be smaller. NaN stays visible: a block that holds one is
    # NaN. A block without any permitted weight is masked, and its value is the largest weight that
    # it holds all the same; so is one of nothing but -inf, which is what masked scores hold.
    rows = [
        _pool_row(row, None if maps.mask is None else at(maps.mask, index), block, signed=signed)
        for index, row in enumerate(maps.rows)
    ]
    values = np.stack([_to_numpy(values) for values, _ in rows])
    masked = np.isneginf(values)
    if maps.mask is not None:
        masked |= ~np.stack([to_numpy_bool(permitted) for _, permitted in rows])
    return Cells(values, masked, block, signed)


def _pool_row(
    row: Array, mask: Array | None, block: tuple[int, int], *, signed: bool
) -> tuple[Array, Array | None]:
    """Pool one row of maps, bit by bit where that needs a copy of them."""
    if block == (1, 1):
        return row, mask
    held = not isinstance(row, InBoxes)
    if held and mask is None and not signed and _ordered(row[:1, :1, :1]).dtype == row.dtype:
        return _block_amax(row, block), None
    values, permitted = [], []
    for chosen in _query_chunks(row, block[0]):
        part = _ordered(row[:, chosen])
        if mask is None:
            values.append(_extreme(part, None, block, signed=signed))
            continue
        allowed = _like(mask[:, chosen], part)
        any_allowed = _block_amax(allowed, block)
        filled = _extreme(part, allowed, block, signed=signed)
        held = _block_amax(part, block)
        values.append(_choose(any_allowed, filled, held))
        permitted.append(any_allowed)
    return _concatenate(values), _concatenate(permitted) if permitted else None


def _extreme(array: Array, allowed: Array | None, block: tuple[int, int], *, signed: bool) -> Array:
    """Return the largest allowed value of each block, or the one that is farthest from zero."""
    shown = array if allowed is None else _where(allowed, array, -float("inf"))
    high = _block_amax(shown, block)
    if not signed:
        return high
    low = _block_amax(
        array if allowed is None else _where(allowed, array, math.inf), block, least=True
    )
    if bool((low == -math.inf).any()):  # what masked scores hold counts on neither side
        low = _block_amax(_where(shown != -math.inf, array, math.inf), block, least=True)
    return _choose(-low > high, low, high)


def _query_chunks(row: Array, multiple_of: int) -> list[slice]:
    """Cut the queries of a row of maps so that a part has at most _CHUNK elements."""
    step = _CHUNK // (row.shape[0] * row.shape[2])
    return spans(row.shape[1], step, multiple_of=multiple_of)


def _ordered(array: Array) -> Array:
    """Return the array in a dtype that its library can take a maximum of."""
    if not is_tensor(array):
        return array if array.dtype.kind in "fiub" else array.astype(np.float32)
    name = str(array.dtype)
    if array.dtype.is_floating_point:
        return array.float() if array.itemsize == 1 else array
    return array.double() if name in ("torch.uint16", "torch.uint32", "torch.uint64") else array


def _block_amax(array: Array, block: tuple[int, int], *, least: bool = False) -> Array:
    """Take the maximum of each block, or the minimum."""
    fewer = block_max(array, -2, block[0], least=least)
    if is_tensor(fewer) and fewer.device.type == "cpu":
        # torch is slow along a last axis that is not a multiple of the vector width.
        return block_max(fewer.mT.contiguous(), -2, block[1], least=least).mT
    return block_max(fewer, -1, block[1], least=least)


def block_max(array: Array, axis: int, size: int, *, least: bool = False) -> Array:
    """Take the maximum of each run of `size` along an axis; the last run may be shorter."""
    length = array.shape[axis]
    if size == 1:
        return array
    if not is_tensor(array):
        extreme = np.minimum if least else np.maximum
        if axis == -1:
            return extreme.reduceat(array, np.arange(0, length, size), axis)
        whole = length // size * size
        runs = array[..., :whole, :].reshape(*array.shape[:-2], -1, size, array.shape[-1])
        parts = [extreme.reduce(runs, -2)] if whole else []
        if whole < length:
            parts.append(extreme.reduce(array[..., whole:, :], -2, keepdims=True))
        return _concatenate(parts, axis)
    torch = sys.modules["torch"]
    reduce, whole = torch.amin if least else torch.amax, length // size * size
    cut = array.narrow(axis, 0, whole).unflatten(axis, (-1, size)) if whole else None
    parts = [] if cut is None else [reduce(cut, axis)]
    if whole < length:
        parts.append(reduce(array.narrow(axis, whole, length - whole), axis, keepdim=True))
    return _concatenate(parts, axis)


def _where(condition: Array, array: Array, other: float) -> Array:
    if is_tensor(array):
        floating = array if array.is_floating_point() else array.float()
        return floating.masked_fill(~condition, other)
    return np.where(condition, array, np.float32(other))


def _choose(condition: Array, array: Array, other: Array) -> Array:
    if is_tensor(array):
        return array.where(condition, other.to(array.dtype))
    return np.where(condition, array, other)


def _concatenate(parts: list[Array], axis: int = -2) -> Array:
    if len(parts) == 1:
        return parts[0]
    if is_tensor(parts[0]):
        return sys.modules["torch"].cat(parts, axis)
    return np.concatenate(parts, axis)


def _like(mask: Array, row: Array) -> Array:
    """Bring a row of the mask to where the row of maps is."""
    if is_tensor(row):
        return sys.modules["torch"].as_tensor(mask).to(row.device)
    return to_numpy_bool(mask)


def _to_numpy(array: Array) -> Floats:
    """Return a float32 copy on the host."""
    if is_tensor(array):
        array = array.float().cpu().numpy()
    with np.errstate(over="ignore"):  # beyond float32 is infinite
        return np.array(array, dtype=np.float32)


def to_numpy_bool(array: Array) -> Bools:
    """Return a boolean array on the host."""
    return np.asarray(array.cpu().numpy() if is_tensor(array) else array, dtype=np.bool_)


def smallest(maps: Maps, cells: Cells) -> float:
    """Return the smallest finite permitted weight, which pooling by maxima does not keep."""
    # Returns infinity where there is none.
    if cells.block == (1, 1):
        low = float(cells.values.min())
        if np.isfinite(low) and not cells.masked.any():
            return low
        shown = np.isfinite(cells.values) & ~cells.masked
        return float(np.min(cells.values, where=shown, initial=np.inf))
    found = [float("inf")]
    for index, row in enumerate(maps.rows):
        mask = None if maps.mask is None else at(maps.mask, index)
        for chosen in _query_chunks(row, 1):
            part = _ordered(row[:, chosen])
            low = float(part.min()) if mask is None else float("nan")
            if not np.isfinite(low):
                counts = part.isfinite() if is_tensor(part) else np.isfinite(part)
                if mask is not None:
                    counts = counts & _like(mask[:, chosen], part)
                low = float(_where(counts, part, float("inf")).min())
            found.append(low)
    return min(found)


def pool_cells(cells: Cells, block: tuple[int, int]) -> Cells:
    """Pool cells once more."""
    if block == (1, 1):
        return cells
    shown = _extreme(cells.values, ~cells.masked, block, signed=cells.signed)
    held, free = _block_amax(cells.values, block), _block_amax(~cells.masked, block)
    values: Floats = _choose(free, shown, held)
    blocks = cells.block[0] * block[0], cells.block[1] * block[1]
    return Cells(values, ~free, blocks, cells.signed)


def has_both_signs(cells: Cells, low: float) -> bool:
    """Tell whether the smallest value is below zero by more than rounding, and another above."""
    high = float(np.max(cells.values, where=np.isfinite(cells.values), initial=-np.inf))
    return high > 0 and low < -_ROUNDING * high
