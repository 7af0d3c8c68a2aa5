"""Attention weights as text, for a terminal or the log of a CI job."""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Iterable, Sequence
from itertools import islice, product
from typing import Any, NamedTuple

import numpy as np
import torch

from ..attention.chunks import spans
from ..inputs import as_mask, as_weights, misuse, positive, wide_dtype

# From the lowest to the highest, then for a masked cell; and the same where a stream has no blocks.
_BLOCKS, _PLAIN = "▁▂▃▄▅▆▇█·", "_.:coO8#~"
_NAN, _BELOW, _ABOVE = "?", "-", "+"
# Rounding may lift a weight of 1 above the scale by a hair; that is drawn as full.
_SLACK = 0.02
# The most weights converted at once: 2 MB as float32.
_PART = 2**19
# Maps of a device with at most as many weights are fetched whole: each cell would wait for it.
_FETCHED = 2**22


def format_heatmap(
    weights: torch.Tensor | np.ndarray[Any, Any],
    *,
    mask: torch.Tensor | np.ndarray[Any, Any] | None = None,
    max_columns: int = 64,
    max_rows: int = 32,
    max_maps: int = 8,
    vmin: float = 0.0,
    vmax: float = 1.0,
    first_row: int = 0,
    first_column: int = 0,
    marked: Collection[int] = (),
    notes: Sequence[str] | None = None,
    row_name: str = "q",
    column_name: str = "keys",
    title: str | None = None,
) -> str:
    """Draw attention weights with block characters, one line per query.

    A map that is wider or taller than allowed is pooled by maximum, so that a single large weight
    stays visible. On the right stands what each row sums to, unless rows were pooled.

    Every character has one meaning: ``▁`` to ``█`` a value on the scale, ``-`` a value below it
    (negative), ``+`` one above it, ``?`` NaN, and ``·`` a masked cell that holds no weight. Where
    standard output cannot take these, ``_.:coO8#`` stand for the blocks, and ``~`` for a masked
    cell.

    Args:
        weights: Shape ``(..., queries, keys)``, two or more dimensions, any
            float dtype and device. Nothing is modified.
        mask: Boolean, True where a query may attend, broadcastable to `weights`.
        max_columns: The most characters per row.
        max_rows: The most rows per map.
        max_maps: The most maps; how many were left out is said at the end.
        vmin: The value drawn as the lowest block.
        vmax: The value drawn as the highest block.
        first_row: The number of the first row, where `weights` is a part.
        first_column: The number of the first column, likewise.
        marked: Rows to point at with ``<-``, counted from `first_row` on.
            Where rows are pooled, the line that holds a marked row is marked.
        notes: What stands on the right of each row instead of its sum, one
            text per row, the same in every map.
        row_name: What comes before a row's number.
        column_name: What the columns are called in the line above a map.
        title: What comes before that line; by default the index of the map
            within `weights`, for instance ``head [0, 2]``.

    Returns:
        The text, without a newline at its end.

    Raises:
        TypeError: Not a dense tensor or array of a float dtype, the mask is
            not boolean, or a limit is not a whole number.
        ValueError: Fewer than two dimensions, no elements, a mask that does
            not broadcast, a limit below 1, a scale that does not rise, or a number
            of notes that is not the number of rows.

    Examples:
        >>> print(format_heatmap(torch.eye(3)))
        keys 0..2
          q0  █▁▁  1.000
          q1  ▁█▁  1.000
          q2  ▁▁█  1.000
    """
    operand = as_weights(weights)
    permitted = as_mask(mask, operand)
    limits = {"max_columns": max_columns, "max_rows": max_rows, "max_maps": max_maps}
    for name, limit in limits.items():
        positive(name, limit)
    if operand.numel() <= _FETCHED:
        operand = operand.cpu()
        permitted = permitted if permitted is None else permitted.cpu()
    if not vmin < vmax:
        raise ValueError(misuse("vmin, vmax", f"{vmin} and {vmax}", "vmin < vmax"))
    if notes is not None and len(notes) != operand.shape[-2]:
        accepted = f"one for each row: {operand.shape[-2]}"
        raise ValueError(misuse("notes", len(notes), accepted))
    rows, columns = _at_most(operand.shape[-2], max_rows), _at_most(operand.shape[-1], max_columns)
    caption = _caption(column_name, first_column, operand.shape[-1], columns)
    labels = [row_name + _label(span, first_row) for span in rows]
    arrows = [
        "  <-" if any(first_row + i in marked for i in range(s.start, s.stop)) else "" for s in rows
    ]
    glyphs = _glyphs()
    lines: list[str] = []
    for outer in islice(product(*map(range, operand.shape[:-2])), max_maps):
        head = map_name(outer) if title is None else title
        lines.append(f"{head}    {caption}" if head else caption)
        width = max(map(len, labels))
        one = operand[outer]
        free = None if permitted is None else permitted.expand(operand.shape)[outer]
        read = [_read(one, free, span, columns) for span in rows]
        texts = _beside(notes if notes is not None else [f"{r.total:.3f}" for r in read], rows)
        for cells, label, text, arrow in zip(read, labels, texts, arrows, strict=True):
            drawn = "".join(_glyph(*cell, vmin, vmax, glyphs) for cell in cells.extremes)
            lines.append(f"  {label:<{width}}  {drawn}{text}{arrow}")
    left_out = math.prod(operand.shape[:-2]) - max_maps
    if left_out > 0:
        lines.append(f"({left_out} more not drawn)")
    return "\n".join(lines)


def _at_most(size: int, most: int) -> list[slice]:
    return spans(size, math.ceil(size / most))


def _label(span: slice, first: int) -> str:
    last = span.stop - 1
    if last == span.start:
        return f"{first + last}"
    return f"{first + span.start}-{first + last}"


def _caption(name: str, first: int, size: int, columns: list[slice]) -> str:
    step = columns[0].stop
    pooled = f", the largest of each {step}" if step > 1 else ""
    return f"{name} {first}..{first + size - 1}{pooled}"


def map_name(outer: tuple[int, ...]) -> str:
    """Return what the map at an index is called: a head, where there are batch and heads."""
    if not outer:
        return ""
    return f"{'head' if len(outer) == 2 else 'map'} {list(outer)}"


def _pooled(rows: list[slice]) -> bool:
    return bool(rows[0].stop > 1)


def _beside(texts: Sequence[str], rows: list[slice]) -> list[str]:
    """Align what stands on the right of rows; nothing where a line stands for several."""
    if _pooled(rows):
        return [""] * len(rows)
    width = max(map(len, texts))
    return [f"  {text:>{width}}" for text in texts]


class _Row(NamedTuple):
    """One line of a map: of each cell the extremes, and whether any of it is permitted; the sum."""

    extremes: Iterable[tuple[float, float, bool]]
    total: float


def _read(one: torch.Tensor, mask: torch.Tensor | None, rows: slice, columns: list[slice]) -> _Row:
    """Read some rows of a map, about `_PART` weights at a time, as float32 or float64."""
    if one.shape[1] > _PART:  # a row is too long to hold several of its length
        long = [
            _read_long(one[:, keys], None if mask is None else mask[:, keys], rows)
            for keys in columns
        ]
        return _Row([cell for part in long for cell in part.extremes], sum(p.total for p in long))
    wide, step = wide_dtype(one.dtype), max(1, _PART // one.shape[1])
    low, high, free, total = [], [], [], []
    for some in spans(rows.stop - rows.start, step):
        part = one[rows][some].to(wide)
        low.append(part.amin(0))
        high.append(part.amax(0))
        free.append(torch.ones_like(high[-1]) if mask is None else mask[rows][some].any(0))
        total.append(part.sum())
    lows, highs, frees = torch.stack(low).amin(0), torch.stack(high).amax(0), torch.stack(free)
    found = torch.stack(
        [
            torch.stack([lows[keys].amin(), highs[keys].amax(), frees[:, keys].to(wide).amax()])
            for keys in columns
        ]
    )
    return _Row(
        [(least, most, bool(any_free)) for least, most, any_free in found.tolist()],
        float(torch.stack(total).sum()),
    )


def _read_long(one: torch.Tensor, mask: torch.Tensor | None, rows: slice) -> _Row:
    """Read the one cell that some rows of a map make, a few keys at a time."""
    parts = [
        _read(one[:, keys], None if mask is None else mask[:, keys], rows, [slice(None)])
        for keys in spans(one.shape[1], _PART // 8)
    ]
    # As tensors, since NaN is the smallest and the largest of what it is among.
    low, high, free = torch.tensor(
        [cell for part in parts for cell in part.extremes], dtype=torch.float64
    ).unbind(1)
    cell = (float(low.amin()), float(high.amax()), bool(free.any()))
    return _Row([cell], sum(part.total for part in parts))


def _glyphs() -> str:
    """The characters of values and of a masked cell that standard output can take."""
    for stream in (sys.stdout, sys.__stdout__):
        try:
            _BLOCKS.encode(getattr(stream, "encoding", None) or "utf-8")
        except (LookupError, UnicodeEncodeError):
            return _PLAIN
    return _BLOCKS


def _glyph(low: float, high: float, permitted: bool, vmin: float, vmax: float, glyphs: str) -> str:
    """Return the character for one cell."""
    if math.isnan(high):
        return _NAN
    if low < vmin:
        return _BELOW
    if high > vmax + _SLACK * (vmax - vmin):
        return _ABOVE
    if low == high == 0 and not permitted:
        return glyphs[-1]
    share = (high - vmin) / (vmax - vmin)
    levels = len(glyphs) - 1
    return glyphs[min(int(share * levels), levels - 1)]
