"""Two pictures compared by the data that they carry.

What differs is said in the words of attention: which cell, how far, and, where the numbers show
it, how the one follows from the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..attention.sketch import Numbers, Sketch, positions
from ..attention.tolerance import drift_allowed, drift_tolerance
from ..failure import number_text
from ..heatmaps.maps import Maps
from ..heatmaps.record import Heatmaps
from .relations import CLOSE, MOST_PLACES, moves, relation_of_cells, relation_of_sketches

# To what part of a change of one weight the numbers of its row and column agree in it.
_AGREE = 0.05
# By what part of itself a sum may be off that was read from a file.
_SUM_ROUNDED = 1e-5
# Sums of rows that differ by less are not mentioned.
_SUM_MOVED = 1e-4


@dataclass(frozen=True)
class DataDifference:
    """How the data of a picture differ from those of its baseline."""

    reason: str  # one line, for example "3 of 64 cells differ"
    details: list[str]  # further lines: the worst cell and a likely relation
    worst: tuple[int, int, int, int] | None = None  # (row, column, query, key), or None


def tolerance_for(expected: Heatmaps, actual: Heatmaps, precision: Iterable[str] = ()) -> float:
    """Return what follows from the dtypes, rows of panels, which are layers, and keys."""
    # `precision`: other dtypes, by name, in which the same model must agree.
    dtypes = (expected.dtype, actual.dtype, *precision)
    return drift_tolerance(dtypes, expected.shape[0], expected.shape[3])


def compare_data(
    expected: Heatmaps, actual: Heatmaps, tolerance: float | None = None, maps: Maps | None = None
) -> DataDifference | None:
    """Compare what two pictures show, and the sketches of maps that they show pooled."""
    # Without a tolerance (`drift_allowed`) that of `tolerance_for` counts. `maps` is what the
    # picture shows, in full: relations of pooled maps are found with it.
    if expected.shape != actual.shape:
        return DataDifference(f"the shape changed from {expected.shape} to {actual.shape}", [])
    if expected.block != actual.block:
        return DataDifference(f"the pooling changed from {expected.block} to {actual.block}", [])
    for name in sorted({*expected.labels, *actual.labels}):
        one, other = expected.labels.get(name), actual.labels.get(name)
        if one != other:
            return DataDifference(f"{name} changed from {one!r} to {other!r}", [])
    if expected.scale != actual.scale:
        return DataDifference(
            f"the colour scale changed from {expected.scale!r} to {actual.scale!r}", []
        )
    if tolerance is None:
        tolerance = tolerance_for(expected, actual)
    return (
        _compare_cells(expected, actual, tolerance, maps)
        or _compare_sketches(expected, actual, tolerance, maps)
        or _compare_masks(expected, actual)
        or _compare_limits(expected, actual, tolerance)
    )


def _compare_limits(
    expected: Heatmaps, actual: Heatmaps, tolerance: float
) -> DataDifference | None:
    moved = np.abs(expected.limits - actual.limits)
    if not moved.any():
        return None
    # The ends of a scale move with the weights that they are taken from.
    allowed = tolerance * np.abs(expected.limits) + allowed_of(expected, tolerance).max(
        (0, 1, 2, 3)
    )
    if not (moved > allowed).any():
        return None
    panel = np.unravel_index(int(moved.max(-1).argmax()), moved.shape[:2])
    old, new = (
        "..".join(
            number_text(float(end), beside=float(by))
            for end, by in zip(data.limits[panel], moved[panel], strict=True)
        )
        for data in (expected, actual)
    )
    return DataDifference(f"the colour scale changed from {old} to {new}", [])


def _compare_masks(expected: Heatmaps, actual: Heatmaps) -> DataDifference | None:
    """Compare the masks of maps that are pooled: their cells do not show them all."""
    if expected.masks == actual.masks or expected.sketch is None or actual.sketch is None:
        return None
    if expected.masks is None or actual.masks is None:
        without = "the baseline" if expected.masks is None else "the picture"
        return DataDifference(f"the mask changed: {without} has none", [])
    pairs = np.argwhere(np.array(expected.masks) != np.array(actual.masks))
    panels = [(int(row), int(column)) for row, column in pairs]
    return DataDifference(f"the mask changed in {_listed(panels)}, within pooled cells", [])


def _compare_sketches(
    expected: Heatmaps, actual: Heatmaps, tolerance: float, maps: Maps | None
) -> DataDifference | None:
    """Compare what stands for weights that the cells do not show."""
    if expected.sketch is None or actual.sketch is None:
        return None
    excess = expected.sketch.excess(actual.sketch, tolerance)
    worst = np.maximum(excess[0].max(1), excess[1].max(1))
    if not (worst > 1).any():
        return None
    panel = int(worst.argmax())
    place = divmod(panel, expected.shape[1])
    query, key = (int(side[panel].argmax()) for side in excess)
    numbers = [int(number) for number in np.flatnonzero(worst > 1)]
    panels = [divmod(number, expected.shape[1]) for number in numbers]
    relation = relation_of_sketches(expected, actual, numbers, maps)
    details = [
        *said_of_sketches(expected.sketch, actual.sketch, excess, panel),
        *([] if relation is None else [f"relation        {relation}"]),
        f"panels          {_listed(panels)} of {expected.shape[0]} x {expected.shape[1]}",
    ]
    reason = f"weights differ within pooled cells, most in {panel_name(expected, *place)}"
    cell = query // expected.block[0], key // expected.block[1]
    return DataDifference(reason, details, (*place, *cell))


def said_of_sketches(
    expected: Sketch,  # The sketch of what was expected
    actual: Sketch,  # Of what there is
    excess: tuple[Numbers, Numbers],  # How far both are apart, as `Sketch.excess` says
    number: int,  # Which map
    queries: Sequence[int] | None = None,  # The numbers of its queries, where they are a selection
) -> list[str]:
    """Say which queries and keys of one map differ, and what the worst query sums to."""
    lines = []
    for singular, plural, found, side, names in (
        ("query", "queries", excess[0], expected.rows, queries),
        ("key", "keys", excess[1], expected.columns, None),
    ):
        groups = np.flatnonzero(found[number] > 1)
        if len(groups):
            alone = len(groups) == 1 and side.span == 1
            name, verb = (singular, "differs") if alone else (plural, "differ")
            lines.append(f"{name:<15} {numbered(groups, side.span, names)} {verb}")
    for name, found, one, other, names in (
        ("queries", excess[0], expected.rows, actual.rows, queries),
        ("keys", excess[1], expected.columns, actual.columns, None),
    ):
        places = np.flatnonzero(found[number] > 1)
        if one.span == 1 and 1 < len(places) <= MOST_PLACES:
            before, after = (side.signed[number, places][:, None] for side in (one, other))
            order = np.abs(before.T - after).argmin(axis=1)
            shown = places if names is None else np.array(names)[places]
            near = np.abs(before[order] - after) <= CLOSE * np.abs(before - after)
            if near.all() and len(set(order)) == len(order):
                lines.append(f"relation        the {name} are permuted{moves(order, shown)}")
    query, (one, other) = int(excess[0][number].argmax()), (expected.rows, actual.rows)
    if excess[0][number, query] > 1 and one.sums is not None and other.sums is not None:
        before, after = float(one.sums[number, query]), float(other.sums[number, query])
        if abs(after - before) > _SUM_MOVED * abs(before):
            where = numbered([query], one.span, queries)
            lines.append(f"row sums        of {where}: expected {before:.6g}, got {after:.6g}")
    few = _few_weights(expected, actual, excess, number, queries)
    return lines if few is None else [*lines, f"relation        {few}"]


def _few_weights(
    expected: Sketch,
    actual: Sketch,
    excess: tuple[Numbers, Numbers],
    number: int,
    names: Sequence[int] | None,
) -> str | None:
    """Say that one weight of a map changed, or moved to another key, if all numbers agree in it."""
    sides = (expected.rows, actual.rows), (expected.columns, actual.columns)
    queries, keys = (np.flatnonzero(found[number] > 1) for found in excess)
    if len(queries) != 1 or len(keys) not in (1, 2) or expected.rows.span != 1:
        return None
    query = int(queries[0])
    name = query if names is None else names[query]
    (of_row, *_), of_keys = (
        (after.signed - before.signed)[number, places]
        for (before, after), places in zip(sides, (queries, keys), strict=True)
    )
    changes = of_keys / positions(query + 1)[1][query]
    # What rounding leaves: each number is off by a part of its norm.
    step, norms = expected.step + actual.step, (s.norms[number] for s, _ in sides)
    rounding = step * (next(norms)[query] + next(norms)[keys].max())
    near = _AGREE * np.abs(changes).max() + rounding
    if abs(changes @ positions(int(keys.max()) + 1)[1][keys] - of_row) > 2 * near:
        return None
    size = float(np.abs(changes).max())
    if size > 1.1:  # more than a weight can change: what stands for NaN or infinity
        return None
    if len(keys) == 1:
        sums = expected.rows.sums, actual.rows.sums
        if sums[0] is not None and sums[1] is not None:  # they are rounded less
            by = float(sums[1][number, query] - sums[0][number, query])
            if abs(by - changes[0]) > near:
                return None
            size, rounding = abs(by), _SUM_ROUNDED * abs(float(sums[0][number, query]))
        said = _roughly(size, rounding, "-" if changes[0] < 0 else "+")
        return f"one weight changed, that of query {name} and key {keys[0]}, by {said}"
    if abs(changes.sum()) > near:
        return None
    start, end = keys if changes[0] < 0 else keys[::-1]
    return f"{_roughly(size, rounding)} of query {name} moved from key {start} to key {end}"


def _roughly(size: float, rounding: float, sign: str = "") -> str:
    return f"{sign}{size:.3g}" if rounding < 0.01 * size else f"about {sign}{size:.1g}"


def numbered(groups: Iterable[int], span: int, names: Sequence[int] | None = None) -> str:
    """Say which groups of so many neighbours there are: "3, 17", or "64..127"; by their names."""

    def named(number: int) -> int:
        return number if names is None else names[min(number, len(names) - 1)]

    found = [
        f"{named(g * span)}..{named(g * span + span - 1)}" if span > 1 else str(named(g))
        for g in groups
    ]
    return (
        ", ".join(found)
        if len(found) <= 4
        else (f"{', '.join(found[:3])} and {len(found) - 3} more")
    )


def allowed_of(data: Heatmaps, tolerance: float) -> npt.NDArray[np.float64]:
    """Return by how much each cell may differ, (rows, columns, queries, keys)."""
    return drift_allowed(data.values.astype(np.float64), data.masked, tolerance)


def _compare_cells(
    expected: Heatmaps, actual: Heatmaps, tolerance: float, maps: Maps | None
) -> DataDifference | None:
    off = _distance(expected, actual)
    if not off.any():
        return None
    allowed = allowed_of(expected, tolerance)
    broken = ~(off <= allowed)
    if not broken.any():
        return None
    worst = np.unravel_index(int(np.argmax(np.where(broken, off, -1))), off.shape)
    row, column, query, key = (int(index) for index in worst)
    index = (row, column, query, key)
    reason = f"{int(broken.sum())} of {broken.size} cells differ"
    panels = [(int(r), int(c)) for r, c in np.argwhere(broken.any(axis=(2, 3)))]
    details = [
        f"worst           {panel_name(expected, row, column)}, query {query}, key {key}: expected "
        f"{_cell(expected, index, off[index])}, got {_cell(actual, index, off[index])} "
        f"(allowed difference {allowed[index]:.1e})",
        f"panels          {_listed(panels)} of {expected.values.shape[0]} x "
        f"{expected.values.shape[1]}",
    ]
    sketches = _compare_sketches(expected, actual, tolerance, maps)
    if sketches is not None:
        return DataDifference(reason, details + sketches.details[:-1], index)
    relation = relation_of_cells(expected, actual, panels)
    if relation is not None:
        details.append(f"relation        {relation}")
    return DataDifference(reason, details, index)


def _distance(expected: Heatmaps, actual: Heatmaps) -> npt.NDArray[np.float64]:
    """Return how far each cell is off; infinity where one is masked, NaN or infinite alone."""
    one, other = expected.values.astype(np.float64), actual.values.astype(np.float64)
    same = (one == other) | (np.isnan(one) & np.isnan(other))
    both_finite = np.isfinite(one) & np.isfinite(other)
    off = np.full(one.shape, np.inf)
    off[both_finite] = np.abs(one[both_finite] - other[both_finite])
    off[same] = 0
    off[expected.masked != actual.masked] = np.inf
    return off


def _cell(data: Heatmaps, index: tuple[int, int, int, int], off: float) -> str:
    value = number_text(float(data.values[index]), beside=float(off))
    return f"{value} (masked)" if data.masked[index] else value


def panel_name(data: Heatmaps, row: int, column: int) -> str:
    """Name a panel by its place, and by the titles that are written beside it."""
    written: list[str] = []
    for name, number in (("row_titles", row), ("titles", column)):
        titles = data.labels.get(name)  # of a picture with much text, no more than a checksum
        if isinstance(titles, list) and number < len(titles):
            written.append(" ".join(str(titles[number]).split()))
    said = ", ".join(title for title in written if title)
    return f"panel [{row}, {column}]" + (f" ({said})" if said else "")


def _listed(panels: list[tuple[int, int]]) -> str:
    text = ", ".join(f"[{row}, {column}]" for row, column in panels[:4])
    return text if len(panels) <= 4 else f"{text} and {len(panels) - 4} more"
