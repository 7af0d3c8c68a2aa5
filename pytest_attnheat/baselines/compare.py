"""Two pictures compared by the data that they carry.

What differs is said in the words of attention: which cell, how far, and, where the numbers show
it, how the one follows from the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pytest_attnheat.attention.sketch import Numbers, Sketch
from pytest_attnheat.attention.tolerance import drift_allowed, drift_tolerance
from pytest_attnheat.failure import number_text
from pytest_attnheat.heatmaps.record import Heatmaps

# A relation is named where it explains the values to this part of their range.
_CLOSE = 1e-3
# Sums of rows that differ by less are not mentioned.
_SUM_MOVED = 1e-4
# A weight so small may be zero.
_NOTHING = 1e-6
# Of more queries or keys, it is not asked whether they trade places.
_MOST_PLACES = 512

Panels = npt.NDArray[np.float64]  # (panels, queries, keys)


@dataclass(frozen=True)
class DataDifference:
    """How the data of a picture differ from those of its baseline.

    Attributes:
        reason: one line, for example "3 of 64 cells differ".
        details: further lines: the worst cell and a likely relation.
        worst: (row, column, query, key) of the worst cell; None where shapes or labels differ.
    """

    reason: str
    details: list[str]
    worst: tuple[int, int, int, int] | None = None


def tolerance_for(expected: Heatmaps, actual: Heatmaps, precision: Iterable[str] = ()) -> float:
    """Return what follows from both dtypes, rows of panels, which are layers, and keys.

    Args:
        expected: The data of the baseline.
        actual: The data of the picture.
        precision: Other dtypes, by name, in which the same model must agree.
    """
    dtypes = (expected.dtype, actual.dtype, *precision)
    return drift_tolerance(dtypes, expected.shape[0], expected.shape[3])


def compare_data(
    expected: Heatmaps, actual: Heatmaps, tolerance: float | None = None
) -> DataDifference | None:
    """Compare what two pictures show, and the sketches of maps that they show pooled.

    Args:
        expected: The data of the baseline.
        actual: The data of the picture.
        tolerance: By what part of itself a weight may differ (`drift_allowed`); by default that of
            `tolerance_for`.

    Returns:
        The difference, or None.
    """
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
        _compare_cells(expected, actual, tolerance)
        or _compare_sketches(expected, actual, tolerance)
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
    expected: Heatmaps, actual: Heatmaps, tolerance: float
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
    panels = [divmod(int(number), expected.shape[1]) for number in np.flatnonzero(worst > 1)]
    details = [
        *said_of_sketches(expected.sketch, actual.sketch, excess, panel),
        f"panels          {_listed(panels)} of {expected.shape[0]} x {expected.shape[1]}",
    ]
    reason = f"weights differ within pooled cells, most in panel {list(place)}"
    return DataDifference(reason, details, (*place, *_cell_of(expected, query, key)))


def _cell_of(data: Heatmaps, query: int, key: int) -> tuple[int, int]:
    return query // data.block[0], key // data.block[1]


def said_of_sketches(
    expected: Sketch, actual: Sketch, excess: tuple[Numbers, Numbers], number: int
) -> list[str]:
    """Say which queries and keys of one map differ, and what the worst query sums to."""
    lines = [
        f"{name:<15} {numbered(np.flatnonzero(found[number] > 1), side.span)} differ"
        for name, found, side in (
            ("queries", excess[0], expected.rows),
            ("keys", excess[1], expected.columns),
        )
        if (found[number] > 1).any()
    ]
    for name, found, one, other in (
        ("queries", excess[0], expected.rows, actual.rows),
        ("keys", excess[1], expected.columns, actual.columns),
    ):
        places = np.flatnonzero(found[number] > 1)
        if one.span == 1 and 1 < len(places) <= _MOST_PLACES:
            before, after = (side.signed[number, places][:, None] for side in (one, other))
            order = np.abs(before.T - after).argmin(axis=1)
            near = np.abs(before[order] - after) <= _CLOSE * np.abs(before - after)
            if near.all() and len(set(order)) == len(order):
                lines.append(f"relation        the {name} are permuted{_moves(order, places)}")
    query, (one, other) = int(excess[0][number].argmax()), (expected.rows, actual.rows)
    if excess[0][number, query] > 1 and one.sums is not None and other.sums is not None:
        before, after = float(one.sums[number, query]), float(other.sums[number, query])
        if abs(after - before) > _SUM_MOVED * abs(before):
            where = numbered([query], one.span)
            lines.append(f"row sums        of {where}: expected {before:.6g}, got {after:.6g}")
    return lines


def numbered(groups: Iterable[int], span: int) -> str:
    """Say which groups of so many neighbours there are: "3, 17", or "64..127"."""
    found = [f"{g * span}..{g * span + span - 1}" if span > 1 else str(g) for g in groups]
    return (
        ", ".join(found)
        if len(found) <= 4
        else (f"{', '.join(found[:3])} and {len(found) - 3} more")
    )


def allowed_of(data: Heatmaps, tolerance: float) -> npt.NDArray[np.float64]:
    """Return by how much each cell may differ, (rows, columns, queries, keys)."""
    return drift_allowed(data.values.astype(np.float64), data.masked, tolerance)


def _compare_cells(expected: Heatmaps, actual: Heatmaps, tolerance: float) -> DataDifference | None:
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
    panels = [(int(r), int(c)) for r, c in np.argwhere(broken.any(axis=(2, 3)))]
    details = [
        f"worst           panel [{row}, {column}], query {query}, key {key}: expected "
        f"{_cell(expected, index, off[index])}, got {_cell(actual, index, off[index])} "
        f"(allowed difference {allowed[index]:.1e})",
        f"panels          {_listed(panels)} of {expected.values.shape[0]} x "
        f"{expected.values.shape[1]}",
    ]
    relation = _relation(expected, actual, panels)
    if relation is not None:
        details.append(f"relation        {relation}")
    sketches = _compare_sketches(expected, actual, tolerance)
    details += [] if sketches is None else sketches.details[:-1]
    reason = f"{int(broken.sum())} of {broken.size} cells differ"
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


def _listed(panels: list[tuple[int, int]]) -> str:
    text = ", ".join(f"[{row}, {column}]" for row, column in panels[:4])
    return text if len(panels) <= 4 else f"{text} and {len(panels) - 4} more"


# -- how the one follows from the other --------------------------------------------------------


def _relation(expected: Heatmaps, actual: Heatmaps, panels: list[tuple[int, int]]) -> str | None:
    """Name how the panels that differ follow from the baseline, if the numbers show it."""
    chosen = tuple(np.array(panels).T)
    shown = ~(expected.masked | actual.masked)
    one = np.where(shown, expected.values, 0)[chosen].astype(np.float64)
    other = np.where(shown, actual.values, 0)[chosen].astype(np.float64)
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        return None
    if np.array_equal(one, other):
        moved = not np.array_equal(expected.masked, actual.masked)
        return "the mask changed, and no weight that both show" if moved else None
    # An explanation must leave far less than "nothing changed" does.
    allowed = min(_CLOSE * np.abs(other).max(), 0.1 * np.abs(other - one).max())
    heads = np.where(shown, expected.values, 0).mean(axis=1, dtype=np.float64)[chosen[0]]
    for sentence, explained in _explanations(one, other, panels, heads):
        if np.abs(explained - other).max() <= allowed:
            return sentence
    return None


def _explanations(
    one: Panels, other: Panels, panels: list[tuple[int, int]], heads: Panels
) -> Iterator[tuple[str, Panels]]:
    """Yield what could have happened to the baseline, and what that would have made of it.

    Args:
        one: Of the baseline, the panels that differ.
        other: What they are now.
        panels: Where they are.
        heads: Of the baseline, the mean of all panels in the row of each.
    """
    sources = [int(np.abs(one - panel).max(axis=(1, 2)).argmin()) for panel in other]
    if len(panels) > 1 and len(set(sources)) == len(sources):
        yield _permutation(panels, sources), one[sources]
    if len(panels) > 1:
        yield "each panel is the mean of its row of panels: heads are averaged", heads
    if one.shape[1] == one.shape[2]:
        yield "transposed: queries and keys are exchanged", one.swapaxes(1, 2)
    factor = float((one * other).sum() / max((one * one).sum(), 1e-300))
    yield f"every value is multiplied by {factor:.4g}", factor * one
    constant = float((other - one).mean())
    yield f"every value has {constant:.4g} added", one + constant
    for axis, name in ((2, "key"), (1, "query")):
        for step, direction in ((1, "higher"), (-1, "lower")):
            # What came in at the edge is not known.
            moved, edge = np.roll(one, step, axis), 0 if step == 1 else -1
            inside = tuple(edge if number == axis else slice(None) for number in range(3))
            moved[inside] = other[inside]
            if one.shape[axis] > 2:
                yield f"shifted by one {name}, to {direction} numbers", moved
    for axis, name in ((1, "queries"), (2, "keys")):
        if one.shape[axis] <= _MOST_PLACES:
            order = _order(one[0], other[0], axis - 1)
            if len(set(order)) == len(order):
                yield f"the {name} are permuted{_moves(order)}", np.take(one, order, axis)
    if (one > 0).all():
        scores = np.log(one)
        scores += (other - scores).mean(axis=2, keepdims=True)
        yield "its softmax is the baseline: scores (logits) in place of weights?", scores
    exponent = np.exp(one - one.max(axis=2, keepdims=True))
    softmax = exponent / exponent.sum(axis=2, keepdims=True)
    yield "it is the softmax of the baseline, which shows scores (logits)", softmax
    for axis, name in ((2, "rows"), (1, "columns")):
        sums = [array.sum(axis=axis, keepdims=True) for array in (one, other)]
        if (np.abs(sums[0]) > 1e-12).all():
            yield (
                f"the {name} are normalised differently: each is multiplied by its own number",
                one * (sums[1] / sums[0]),
            )
    if (one >= 0).all() and (other >= 0).all():
        yield from _other_softmaxes(one, other)


def _other_softmaxes(one: Panels, other: Panels) -> Iterator[tuple[str, Panels]]:
    """Yield what else weights could have been made of their scores by."""
    seen = (one > 0) & (other > 0)
    if np.where(seen, 0, np.maximum(one, other)).max() > _NOTHING:  # what was hidden is seen
        return
    logarithms = np.log(np.where(seen, one, 1))
    others = np.log(np.where(seen, other, 1))
    counts = np.maximum(seen.sum(axis=2, keepdims=True), 1)

    def centred(numbers: Panels) -> Panels:
        mean = numbers.sum(axis=2, keepdims=True) / counts
        return np.where(seen, numbers - mean, 0)

    scores, wanted = centred(logarithms), centred(others)
    factor = float((scores * wanted).sum() / max(float((scores**2).sum()), 1e-300))
    exponent = np.where(seen, np.exp(factor * (scores - scores.max(axis=2, keepdims=True))), 0)
    total = np.maximum(exponent.sum(axis=2, keepdims=True), 1e-300)
    yield (
        f"its scores are multiplied by {factor:.4g}: another temperature or scale",
        (exponent / total * one.sum(axis=2, keepdims=True)),
    )
    odds = np.where(seen & (other < 1), others - np.log1p(-np.minimum(other, 1 - 1e-16)), 0)
    shift = np.where(seen, odds - logarithms, 0).sum(axis=2, keepdims=True) / counts
    sigmoid = np.where(seen, 1 / (1 + np.exp(-(logarithms + shift))), 0)
    yield "it is the sigmoid of its scores, in place of their softmax", sigmoid
    if np.allclose(other.sum(axis=1)[seen.any(axis=1)], 1, atol=_CLOSE):
        rows, ratio = np.zeros(counts.shape), np.where(seen, others - logarithms, 0)
        for _ in range(50):  # a factor for each row and each column, by turns
            left = np.where(seen, ratio - rows, 0).sum(axis=1, keepdims=True)
            left = left / np.maximum(seen.sum(axis=1, keepdims=True), 1)
            rows = np.where(seen, ratio - left, 0).sum(axis=2, keepdims=True) / counts
        found = np.where(seen, np.exp(logarithms + rows), 0)
        columns = np.maximum(found.sum(axis=1, keepdims=True), 1e-300)
        yield "its softmax runs over the queries, in place of the keys", found / columns


def _order(one: Panels, other: Panels, axis: int) -> npt.NDArray[np.int64]:
    """Return which query (or key) of one map each of another is nearest to."""
    rows, others = (np.moveaxis(panel, axis, 0) for panel in (one, other))
    far = (rows**2).sum(1)[None] + (others**2).sum(1)[:, None] - 2 * others @ rows.T
    found: npt.NDArray[np.int64] = far.argmin(axis=1)
    return found


def _moves(order: npt.NDArray[np.int64], places: npt.NDArray[np.int64] | None = None) -> str:
    """Say what moved where, of some places; by default of all."""
    names = np.arange(len(order)) if places is None else places
    moved = np.flatnonzero(order != np.arange(len(order)))
    said = ", ".join(f"{names[at]} shows what was {names[order[at]]}" for at in moved[:3])
    more = f" and {len(moved) - 3} more" if len(moved) > 3 else ""
    return f": {said}{more}"


def _permutation(panels: list[tuple[int, int]], sources: list[int]) -> str:
    moves = [
        f"{list(panel)} shows what was {list(panels[source])}"
        for panel, source in zip(panels, sources, strict=True)
    ]
    more = f" and {len(moves) - 3} more" if len(moves) > 3 else ""
    return f"the panels are permuted: {', '.join(moves[:3])}{more}"
