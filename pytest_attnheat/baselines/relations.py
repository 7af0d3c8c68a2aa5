"""How a picture follows from its baseline, where the numbers show it.

Where all weights are shown, what could have happened is done to the baseline, and compared with the
picture. Of pooled maps there are the baseline's sketch and the picture's maps: some of what could
have happened can be done to a sketch, and all else is undone in the maps, of which a sketch is made
for comparison. A relation is only named where it leaves far less than "nothing changed" does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from ..attention.chunks import spans
from ..attention.sketch import Numbers, Sketch, Sketcher, positions
from ..heatmaps.maps import Maps
from ..heatmaps.record import Heatmaps
from .scaling import factors_of_keys

# A relation is named where it explains the values to this part of their range.
CLOSE = 1e-3
# A weight so small may be zero.
_NOTHING = 1e-6
# Of more queries or keys, it is not asked whether they trade places.
MOST_PLACES = 512
# Elements of maps that are undone at a time, and queries that are tried before all are.
_CHUNK, _TRIED = 1 << 20, 24
# Steps of the search for a temperature.
_STEPS = 30

Panels = npt.NDArray[np.float64]  # (panels, queries, keys)
_AVERAGED = "each panel is the mean of its row of panels: heads are averaged"
_TRANSPOSED = "transposed: queries and keys are exchanged"
_SCORES = "its softmax is the baseline: scores (logits) in place of weights?"
_NORMALISED = "the {} are normalised differently: each is multiplied by its own number"
_TEMPERATURE = "its scores are multiplied by {:.4g}: another temperature or scale"
_ELSEWHERE = "each panel holds the same numbers in other places"
_SIGMOID = "it is the sigmoid of its scores, in place of their softmax"
_OVER_QUERIES = "its softmax runs over the queries, in place of the keys"
# By what part of its norm the number of one query may be off before all are looked at.
_LOOSE = 1e-2

Undo: TypeAlias = Callable[[Numbers, Numbers], Numbers]


def relation_of_cells(
    expected: Heatmaps, actual: Heatmaps, panels: list[tuple[int, int]]
) -> str | None:
    """Name how the panels that differ follow from the baseline, if the numbers show it."""
    chosen = tuple(np.array(panels).T)
    shown = ~(expected.masked | actual.masked)
    one = np.where(shown, expected.values, 0)[chosen].astype(np.float64)
    other = np.where(shown, actual.values, 0)[chosen].astype(np.float64)
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        return None
    # An explanation must leave far less than "nothing changed" does.
    if np.array_equal(one, other):
        moved = not np.array_equal(expected.masked, actual.masked)
        return "the mask changed, and no weight that both show" if moved else None
    allowed = min(CLOSE * np.abs(other).max(), 0.1 * np.abs(other - one).max())
    heads = np.where(shown, expected.values, 0).mean(axis=1, dtype=np.float64)[chosen[0]]
    for sentence, explained in _explanations(one, other, panels, heads):
        if np.abs(explained - other).max() <= allowed:
            return sentence
    return None


def _explanations(
    one: Panels, other: Panels, panels: list[tuple[int, int]], heads: Panels
) -> Iterator[tuple[str, Panels]]:
    """Yield what could have happened to the baseline, and what that would have made of it."""
    # Of the baseline there are the panels that differ, and the mean of all panels in each's row.
    sources = [int(np.abs(one - panel).max(axis=(1, 2)).argmin()) for panel in other]
    if len(panels) > 1 and len(set(sources)) == len(sources):
        yield _permutation(panels, sources), one[sources]
    if len(panels) > 1:
        yield _AVERAGED, heads
    if one.shape[1] == one.shape[2]:
        yield _TRANSPOSED, one.swapaxes(1, 2)
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
        if one.shape[axis] <= MOST_PLACES:
            order = _order(one[0], other[0], axis - 1)
            if len(set(order)) == len(order):
                yield f"the {name} are permuted{moves(order)}", np.take(one, order, axis)
    if (one > 0).all():
        scores = np.log(one)
        scores += (other - scores).mean(axis=2, keepdims=True)
        yield _SCORES, scores
    exponent = np.exp(one - one.max(axis=2, keepdims=True))
    softmax = exponent / exponent.sum(axis=2, keepdims=True)
    yield "it is the softmax of the baseline, which shows scores (logits)", softmax
    for axis, name in ((2, "rows"), (1, "columns")):
        sums = [array.sum(axis=axis, keepdims=True) for array in (one, other)]
        if (np.abs(sums[0]) > 1e-12).all():
            yield _NORMALISED.format(name), one * (sums[1] / sums[0])
    if (one >= 0).all() and (other >= 0).all():
        yield from _other_softmaxes(one, other)
    first, second = (np.sort(array.reshape(len(array), -1)) for array in (one, other))
    if np.allclose(first, second, rtol=CLOSE, atol=0):
        yield _ELSEWHERE, other


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
    yield (_TEMPERATURE.format(factor), (exponent / total * one.sum(axis=2, keepdims=True)))
    odds = np.where(seen & (other < 1), others - np.log1p(-np.minimum(other, 1 - 1e-16)), 0)
    shift = np.where(seen, odds - logarithms, 0).sum(axis=2, keepdims=True) / counts
    sigmoid = np.where(seen, 1 / (1 + np.exp(-(logarithms + shift))), 0)
    yield _SIGMOID, sigmoid
    if np.allclose(other.sum(axis=1)[seen.any(axis=1)], 1, atol=CLOSE):
        rows, ratio = np.zeros(counts.shape), np.where(seen, others - logarithms, 0)
        for _ in range(50):  # a factor for each row and each column, by turns
            left = np.where(seen, ratio - rows, 0).sum(axis=1, keepdims=True)
            left = left / np.maximum(seen.sum(axis=1, keepdims=True), 1)
            rows = np.where(seen, ratio - left, 0).sum(axis=2, keepdims=True) / counts
        found = np.where(seen, np.exp(logarithms + rows), 0)
        columns = np.maximum(found.sum(axis=1, keepdims=True), 1e-300)
        yield _OVER_QUERIES, found / columns


def _order(one: Panels, other: Panels, axis: int) -> npt.NDArray[np.int64]:
    """Return which query (or key) of one map each of another is nearest to."""
    rows, others = (np.moveaxis(panel, axis, 0) for panel in (one, other))
    far = (rows**2).sum(1)[None] + (others**2).sum(1)[:, None] - 2 * others @ rows.T
    found: npt.NDArray[np.int64] = far.argmin(axis=1)
    return found


def moves(order: npt.NDArray[np.int64], places: npt.NDArray[np.int64] | None = None) -> str:
    """Say what moved where, of some places; by default of all."""
    names = np.arange(len(order)) if places is None else places
    if len(order) > 2 and np.array_equal(order, np.arange(len(order))[::-1]):
        return ": their order is reversed"
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


# -- of sketches -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Numbers:
    """What is compared of some maps: three lists of numbers for each."""

    rows: Numbers  # (maps, queries), sums of weights times the numbers of their positions
    sums: Numbers  # (maps, queries), sums of weights
    columns: Numbers  # (maps, keys), as `rows`, of keys

    def far(self, other: _Numbers, norms: tuple[Numbers, Numbers]) -> float:
        """Return how far the worst number is off, as a part of the norm of its weights."""
        return max(
            float((np.abs(one - two) / scale).max())
            for one, two, scale in (
                (self.rows, other.rows, norms[0]),
                (self.sums, other.sums, norms[0]),
                (self.columns, other.columns, norms[1]),
            )
        )


def _numbers_of(sketch: Sketch, chosen: Sequence[int]) -> _Numbers:
    sums = sketch.rows.sums
    assert sums is not None  # sketches of pictures have those of rows
    numbers = sketch.rows.signed, sums, sketch.columns.signed
    rows, sums, columns = (array[list(chosen)] for array in numbers)
    return _Numbers(rows, sums, columns)


def relation_of_sketches(
    expected: Heatmaps, actual: Heatmaps, panels: Sequence[int], maps: Maps | None
) -> str | None:
    """Name how pooled panels that differ follow from the baseline, if the numbers show it."""
    if expected.sketch is None or actual.sketch is None:
        return None
    before, after = (_numbers_of(data.sketch, panels) for data in (expected, actual) if data.sketch)
    step = expected.sketch.step + actual.sketch.step

    def norms_of(sketch: Sketch) -> tuple[Numbers, Numbers]:
        found = [side.norms[list(panels)] for side in (sketch.rows, sketch.columns)]
        typical = [np.sqrt((side**2).mean(1, keepdims=True)) for side in found]
        one, other = (np.maximum(n, 0.1 * t + 1e-300) for n, t in zip(found, typical, strict=True))
        return one, other

    norms = norms_of(actual.sketch)
    allowed = min(CLOSE + step, 0.1 * before.far(after, norms))
    for sentence, explained in _of_numbers(expected, before, after, panels):
        if explained.far(after, norms) <= allowed:
            return sentence
    if maps is None:
        return None
    norms = norms_of(expected.sketch)
    allowed = min(CLOSE + step, 0.1 * before.far(after, norms))
    live = [maps.map(*divmod(number, expected.shape[1])) for number in panels]
    for sentence, undone in _undoings(live, before, after, expected.sketch, panels):
        if undone is not None and undone.far(before, norms) <= allowed:
            return sentence
    return None


def _of_numbers(
    expected: Heatmaps, one: _Numbers, other: _Numbers, panels: Sequence[int]
) -> Iterator[tuple[str, _Numbers]]:
    """Yield what could have happened, and what that would have made of the baseline's numbers."""
    places, columns = [divmod(number, expected.shape[1]) for number in panels], expected.shape[1]
    if len(panels) > 1:
        far = np.abs(one.rows[None] - other.rows[:, None]).max(-1)
        sources = [int(source) for source in far.argmin(1)]
        if len(set(sources)) == len(sources):
            yield (
                _permutation(places, sources),
                _Numbers(one.rows[sources], one.sums[sources], one.columns[sources]),
            )
        assert expected.sketch is not None
        whole = _numbers_of(expected.sketch, range(expected.sketch.rows.signed.shape[0]))
        rows = [row for row, _ in places]
        means = (
            array.reshape(-1, columns, array.shape[-1]).mean(1)[rows]
            for array in (whole.rows, whole.sums, whole.columns)
        )
        yield _AVERAGED, _Numbers(*means)
    factor = float((one.rows * other.rows).sum() / max(float((one.rows**2).sum()), 1e-300))
    yield (
        f"every value is multiplied by {factor:.4g}",
        _Numbers(factor * one.rows, factor * one.sums, factor * one.columns),
    )


def _undoings(
    live: Sequence[Numbers],
    before: _Numbers,
    after: _Numbers,
    sketch: Sketch,
    panels: Sequence[int],
) -> Iterator[tuple[str, _Numbers | None]]:
    """Yield what could have happened, and the numbers of maps in which it is undone."""
    # None is yielded where a few queries already show that it is not so.
    same = _undone(live, after, lambda rows, sums: rows)
    if same is None:  # they were changed since they were drawn
        return
    queries, keys = live[0].shape
    if queries == keys:
        transposed = [panel.T for panel in live]
        yield _TRANSPOSED, _undone(transposed, before, lambda rows, sums: rows)
    if all((panel >= 0).all() for panel in live):
        power = _temperature(live, before)
        yield (
            _TEMPERATURE.format(1 / power),
            _undone(live, before, lambda rows, sums: _scaled(_power(rows, power), sums)),
        )
        if all((panel <= 1).all() for panel in live):
            yield _SIGMOID, _undone(live, before, lambda rows, sums: _scaled(_odds(rows), sums))
        yield _OVER_QUERIES, _keys_scaled(live, before, sketch, panels)
    yield _SCORES, _undone(live, before, lambda rows, sums: _scaled(_exponents(rows), sums))
    yield _NORMALISED.format("rows"), _undone(live, before, _scaled)


def _undone(live: Sequence[Numbers], before: _Numbers, undo: Undo) -> _Numbers | None:
    """Return the numbers of maps after something was undone in each row, given its sum, or None."""
    # None where a few rows do not have the numbers that they should have.
    queries, keys = live[0].shape
    left = positions(keys)[1]
    tried = np.unique(np.linspace(0, queries - 1, _TRIED).astype(int))
    for panel, rows, sums in zip(live, before.rows, before.sums, strict=True):
        undone = undo(panel[tried], sums[tried, None])
        off = np.abs(undone @ left - rows[tried])
        if not (off <= _LOOSE * (np.linalg.norm(undone, axis=1) + np.abs(rows[tried]))).all():
            return None
    sketcher = Sketcher(len(live), queries, keys)
    for number, panel in enumerate(live):
        for rows in spans(queries, max(1, _CHUNK // keys)):
            undone = undo(panel[rows], before.sums[number, rows, None])
            sketcher.add(slice(number, number + 1), rows, undone[None])
    return _numbers_of(sketcher.sketch(), range(len(live)))


def _scaled(rows: Numbers, sums: Numbers) -> Numbers:
    """Multiply each row so that it has its sum."""
    totals = rows.sum(1, keepdims=True)
    scaled: Numbers = rows * (sums / np.where(totals == 0, 1.0, totals))
    return scaled


def _power(rows: Numbers, power: float) -> Numbers:
    largest = np.maximum(rows.max(1, keepdims=True), 1e-300)
    found: Numbers = (rows / largest) ** power
    return found


def _odds(rows: Numbers) -> Numbers:
    found: Numbers = rows / np.maximum(1 - rows, 1e-9)
    return found


def _exponents(rows: Numbers) -> Numbers:
    largest = rows.max(1, keepdims=True)
    found: Numbers = np.exp(rows - np.where(np.isfinite(largest), largest, 0))
    return found


def _temperature(live: Sequence[Numbers], before: _Numbers) -> float:
    """Return the power of the weights that has the numbers of the baseline, of a few queries."""
    queries, keys = live[0].shape
    tried = np.unique(np.linspace(0, queries - 1, _TRIED).astype(int))
    signs = positions(keys)[1]
    rows = np.concatenate([panel[tried] for panel in live])
    wanted, sums = (array[:, tried].reshape(-1) for array in (before.rows, before.sums))
    logarithms = np.log(np.where(rows > 0, rows, 1))
    best = (np.inf, 1.0)
    for power in (1.0, 0.3, 3.0):
        for _ in range(_STEPS):
            weights = _scaled(_power(rows, power), sums[:, None])
            off = weights @ signs - wanted
            best = min(best, (float(off @ off), power))
            mean = (weights * logarithms).sum(1, keepdims=True) / np.where(sums, sums, 1)[:, None]
            slope = (weights * (logarithms - mean)) @ signs
            step = float(off @ slope) / max(float(slope @ slope), 1e-300)
            power = float(np.clip(power - step, power / 2, power * 2))
            if abs(step) < 1e-9 * power:
                break
    return best[1]


def _keys_scaled(
    live: Sequence[Numbers], before: _Numbers, sketch: Sketch, panels: Sequence[int]
) -> _Numbers | None:
    """Return the numbers of maps of which each column was divided by its sum, with that undone."""
    if not all(np.allclose(panel.sum(0), 1, atol=CLOSE) for panel in live):
        return None
    if not np.allclose(before.sums, 1, atol=CLOSE):
        return None
    undone = [
        panel * factors_of_keys(panel.astype(np.float32), sketch.rows, sketch.columns, number)
        for number, panel in zip(panels, live, strict=True)
    ]
    return _undone(undone, before, _scaled)
