"""Two pictures compared: by the data that they carry, and by their pixels where the data agree.

What differs in the data is said in the words of attention: which cell, how far, and, where the
numbers show it, how the one follows from the other.

The data of a baseline, drawn anew, must give the very pixels that it has: panels are the same
bytes under every matplotlib. Text is not, and is only told apart.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib import ft2font
from PIL import Image

from pytest_attnheat.attention.tolerance import picture_tolerance
from pytest_attnheat.failure import number_text
from pytest_attnheat.heatmaps.colors import Scale
from pytest_attnheat.heatmaps.layout import Layout
from pytest_attnheat.heatmaps.maps import Cells
from pytest_attnheat.heatmaps.picture import IMAGE_ID, Picture, compose
from pytest_attnheat.heatmaps.record import Heatmaps

# A relation is named where it explains the values to this part of their range.
_CLOSE = 1e-3

Panels = npt.NDArray[np.float64]  # (panels, queries, keys)
Pixels = npt.NDArray[np.uint8]
# The image of a picture among others of an SVG, by the name that `picture` gives it.
_IMAGE = re.compile(rf'data:image/png;base64,\s*([A-Za-z0-9+/=\s]+)"(?=[^>]*id="{IMAGE_ID}")')
Outcome = Literal["equal", "text", "size", "panels", "rest"]


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


def tolerance_for(expected: Heatmaps, actual: Heatmaps) -> float:
    """Return the tolerance that follows from the coarser dtype of two pictures."""
    return max(picture_tolerance(data.dtype) for data in (expected, actual))


def compare_data(
    expected: Heatmaps, actual: Heatmaps, tolerance: float | None = None
) -> DataDifference | None:
    """Compare what two pictures show.

    Args:
        expected: The data of the baseline.
        actual: The data of the picture.
        tolerance: Largest accepted difference of a cell, relative to its value plus the median
            of the values of its panel; by default that of the coarser dtype (`tolerance_for`).

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
    difference = _compare_cells(expected, actual, tolerance)
    moved = np.abs(expected.limits - actual.limits)
    typical = _typical(expected)[..., None]
    if difference is None and (moved > tolerance * (np.abs(expected.limits) + typical)).any():
        panel = np.unravel_index(int(moved.max(-1).argmax()), moved.shape[:2])
        old, new = (
            "..".join(
                number_text(float(end), beside=float(by))
                for end, by in zip(data.limits[panel], moved[panel], strict=True)
            )
            for data in (expected, actual)
        )
        return DataDifference(f"the colour scale changed from {old} to {new}", [])
    return difference


def _compare_cells(expected: Heatmaps, actual: Heatmaps, tolerance: float) -> DataDifference | None:
    finite = np.where(np.isfinite(expected.values), expected.values, 0).astype(np.float64)
    allowed = tolerance * (np.abs(finite) + _typical(expected)[..., None, None])
    off = _distance(expected, actual)
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
    reason = f"{int(broken.sum())} of {broken.size} cells differ"
    return DataDifference(reason, details, index)


def _typical(data: Heatmaps) -> npt.NDArray[np.float64]:
    """Return the median of what each panel holds besides zeros, (rows, columns).

    Not the largest value: a fill of -1e9 would allow anything everywhere else.
    """
    values = np.abs(data.values).astype(np.float64)
    values[~np.isfinite(values) | (values == 0)] = np.nan
    flat = values.reshape(*values.shape[:2], -1)
    some = ~np.isnan(flat).all(-1)
    typical = np.zeros(flat.shape[:2])
    typical[some] = np.nanmedian(flat[some], axis=-1)
    return typical


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
    # An explanation must leave far less than "nothing changed" does.
    allowed = min(_CLOSE * np.abs(other).max(), 0.1 * np.abs(other - one).max())
    for sentence, explained in _explanations(one, other, panels):
        if np.abs(explained - other).max() <= allowed:
            return sentence
    return None


def _explanations(
    one: Panels, other: Panels, panels: list[tuple[int, int]]
) -> Iterator[tuple[str, Panels]]:
    """Yield what could have happened to the baseline, and what that would have made of it."""
    sources = [int(np.abs(one - panel).max(axis=(1, 2)).argmin()) for panel in other]
    if len(panels) > 1 and len(set(sources)) == len(sources):
        yield _permutation(panels, sources), one[sources]
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


def _permutation(panels: list[tuple[int, int]], sources: list[int]) -> str:
    moves = [
        f"{list(panel)} shows what was {list(panels[source])}"
        for panel, source in zip(panels, sources, strict=True)
    ]
    more = f" and {len(moves) - 3} more" if len(moves) > 3 else ""
    return f"the panels are permuted: {', '.join(moves[:3])}{more}"


# -- by their pixels ----------------------------------------------------------------------------


def compare_pixels(
    picture: Picture, data: Heatmaps, expected: Path, actual: Path, dpi: float
) -> Outcome:
    """Compare two files of a picture whose data agree.

    Args:
        picture: The picture that was drawn.
        data: The data of the baseline.
        expected: The baseline, PNG or SVG.
        actual: The file that was saved from the picture.
        dpi: The resolution of the picture.

    Returns:
        "equal"; "text" where only text differs, which another matplotlib or FreeType drew;
        "size" or "panels" where these differ; "rest" where something else does, under the same
        matplotlib and FreeType.
    """
    images = [_read(path) for path in (expected, actual)]
    if images[0].shape != images[1].shape:
        return "size"
    scale = Scale(data.limits[..., 0], data.limits[..., 1], data.scale == "shared")
    cells = Cells(data.values, data.masked, data.block)
    height, width = images[1].shape[:2]
    sheet = compose(replace(picture.shown, cells=cells, scale=scale), (width, height), dpi)
    painted: npt.NDArray[np.bool_] = sheet.image[..., 3] == 255
    channels = images[0].shape[2]
    # What the user has drawn over the panels hides them: there the pictures must agree as they are.
    own = picture.prepare((width, height), dpi).image[..., :channels]
    seen = painted & (images[1] == own).all(-1)
    has_numbers = picture.shown.design.words.numbers is not None
    if has_numbers:
        seen &= _edges(sheet.layout, painted.shape)
    if not np.array_equal(images[0][seen], sheet.image[seen][:, :channels]):
        return "panels"
    # Numbers in cells are not such an overlay: they change with the data, and with the text.
    overlay = painted & ~seen & (not has_numbers)
    # Where even the data are equal to the bit, nothing at all may differ.
    exact = np.array_equal(data.values, picture.shown.cells.values, equal_nan=True)
    compared = np.ones_like(painted) if exact else ~painted | overlay
    # The numbers of an SVG cannot be told from its other texts.
    same_rest = (has_numbers and not exact) or _rest(expected) == _rest(actual)
    if same_rest and np.array_equal(images[0][compared], images[1][compared]):
        return "equal"
    if not np.array_equal(images[0][overlay], images[1][overlay]):
        return "rest"
    by = (matplotlib.__version__, ft2font.__freetype_version__)
    return "text" if (data.matplotlib, data.freetype) != by else "rest"


def _read(path: Path) -> Pixels:
    """Return RGB of a PNG, or RGBA of the image that an SVG holds."""
    if path.suffix == ".png":
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    found = _IMAGE.search(path.read_text("utf-8"))
    if found is None:
        raise ValueError("it has no image of show_heatmaps")
    with Image.open(io.BytesIO(base64.b64decode(found[1]))) as image:
        # The image of an SVG stands on its head, as its transform turns it around.
        return np.asarray(image.convert("RGBA"))[::-1]


def _rest(path: Path) -> str:
    """Return what an SVG draws besides its image: paths, which are its text."""
    if path.suffix == ".png":
        return ""
    text = path.read_text("utf-8")
    body = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    return _IMAGE.sub("", body)


def _edges(layout: Layout, shape: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    """Return everything but the inside of cells, where numbers stand."""
    edges = np.ones(shape, dtype=np.bool_)
    wide, high = layout.cell
    down = np.arange(layout.panel[1]) % high == 0
    across = np.arange(layout.panel[0]) % wide == 0
    for top in layout.tops:
        for left in layout.lefts:
            panel = edges[top : top + layout.panel[1], left : left + layout.panel[0]]
            panel[:] = down[:, None] | across[None, :]
    return edges
