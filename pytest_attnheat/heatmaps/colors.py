"""From weights to pixels: the colour scale, and panels painted cell by cell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.colors import Colormap

from ..inputs import misuse
from .layout import Box, Layout
from .maps import Cells, Floats

Levels = npt.NDArray[np.uint16]
Image = npt.NDArray[np.uint8]

# Colormaps of more colours are read at this many.
_COLORS = 256
# Codes beyond the colours of the scale.
_MASKED, _STRIPE, _NAN, _BLACK, _WHITE, _FRAME, _CLEAR = range(_COLORS, _COLORS + 7)
_BEYOND = {
    _MASKED: (232, 232, 232, 255), _STRIPE: (176, 176, 176, 255), _NAN: (0, 160, 255, 255),
    _BLACK: (0, 0, 0, 255), _WHITE: (255, 255, 255, 255), _FRAME: (96, 96, 96, 255),
    _CLEAR: (255, 255, 255, 0),
}  # fmt: skip
# How bright red, green and blue are.
LUMINANCE = (0.299, 0.587, 0.114)
# Weights beyond 0..1 by rounding are weights all the same.
_ROUNDING = 0.01


@dataclass(frozen=True)
class Scale:
    """The range of values that the colours stand for.

    Attributes:
        low, high: float64 (rows, columns), equal everywhere unless each panel has its own.
        shared: whether one range holds for all panels.
    """

    low: npt.NDArray[np.float64]
    high: npt.NDArray[np.float64]
    shared: bool

    @property
    def range(self) -> tuple[float, float]:
        """The range of the first panel, which is that of all where it is shared."""
        return float(self.low[0, 0]), float(self.high[0, 0])


def shared_scale(
    cells: Cells, smallest: float, vmin: float | None, vmax: float | None, *, tight: bool = False
) -> Scale:
    """Make one range for all panels: 0 to 1 for weights, else that of the values."""
    # A tight one ends at the largest weight.
    largest = float(cells.values.max())
    if cells.masked.any() or not np.isfinite(largest):
        shown = np.isfinite(cells.values) & ~cells.masked
        largest = float(np.max(cells.values, where=shown, initial=-np.inf))
    if smallest > largest:  # no finite cell at all
        smallest, largest = 0.0, 1.0
    if smallest >= -_ROUNDING and largest <= 1 + _ROUNDING:
        smallest, largest = 0.0, largest if tight and largest > 0 else 1.0
    try:
        low = smallest if vmin is None else float(vmin)
        high = largest if vmax is None else float(vmax)
    except (TypeError, ValueError):
        got = f"{vmin!r} and {vmax!r}"
        raise TypeError(misuse("vmin, vmax", got, "numbers, or None")) from None
    if low == high and vmin is None and vmax is None:
        low, high = low - 0.5, high + 0.5
    if not (np.isfinite(low) and np.isfinite(high) and low < high):
        raise ValueError(misuse("vmin, vmax", f"{low:g} and {high:g}", "finite vmin < vmax"))
    grid = np.ones(cells.values.shape[:2])
    return Scale(low * grid, high * grid, shared=True)


def panel_scales(cells: Cells) -> Scale:
    """Give each panel the range of its own cells."""
    finite = np.isfinite(cells.values) & ~cells.masked
    low = np.min(cells.values, axis=(2, 3), where=finite, initial=np.inf).astype(np.float64)
    high = np.max(cells.values, axis=(2, 3), where=finite, initial=-np.inf).astype(np.float64)
    nothing = low > high  # no finite cell at all
    low[nothing], high[nothing] = 0.0, 1.0
    return Scale(low, high, shared=False)


def paint(
    cells: Cells, scale: Scale, cmap: str | Colormap, layout: Layout, highlight: list[Box]
) -> Image:
    """Paint panels, tick marks' frame, colorbar and highlights on a transparent figure."""
    # RGBA (height, width, 4), the first row on top.
    width, height = layout.size
    canvas = np.full((height, width), _CLEAR, dtype=np.uint16)
    levels = _levels(cells, scale, _count(cmap))
    leaks = leaking(cells, scale)
    framed = len(layout.tops) == 1 or layout.tops[1] - layout.tops[0] > layout.panel[1] + 2
    framed &= len(layout.lefts) == 1 or layout.lefts[1] - layout.lefts[0] > layout.panel[0] + 2
    for row, top in enumerate(layout.tops):
        for column, left in enumerate(layout.lefts):
            if framed:
                _outline(canvas, Box(left, top, *layout.panel), _FRAME)
            panel = canvas[top : top + layout.panel[1], left : left + layout.panel[0]]
            panel[:] = _enlarged(levels[row, column], layout)
            if leaks[row, column].any():
                _stripe(panel, _enlarged(leaks[row, column], layout), _BLACK)
    _stripe(canvas, canvas == _MASKED, _STRIPE)
    if layout.bar is not None:
        _outline(canvas, layout.bar, _FRAME)
        left, top, wide, tall = layout.bar
        gradient = np.linspace(_count(cmap) - 1, 0, tall).round().astype(np.uint16)
        canvas[top : top + tall, left : left + wide] = gradient[:, None]
    for box in highlight:
        for away, code in enumerate((_BLACK, _WHITE, _BLACK)):
            _outline(canvas, box, code, away)
    return _palette(cmap)[canvas].view(np.uint8).reshape(height, width, 4)


def tick(image: Image, left: int, top: int, wide: int, high: int) -> None:
    """Paint a tick mark."""
    image[max(0, top) : top + high, max(0, left) : left + wide] = _BEYOND[_FRAME]


def is_dark(cmap: str | Colormap, cells: Cells, scale: Scale) -> npt.NDArray[np.bool_]:
    """Tell for each cell whether its colour is so dark that a number on it must be white."""
    colors = _palette(cmap).view(np.uint8).reshape(-1, 4)[:, :3].astype(np.float64)
    luminance = colors @ LUMINANCE
    dark: npt.NDArray[np.bool_] = (luminance < 128)[_levels(cells, scale, _count(cmap))]
    return dark


def leaking(cells: Cells, scale: Scale) -> npt.NDArray[np.bool_]:
    """Tell which masked cells hold weight all the same."""
    # Only where weights are shown: scores are usually drawn before they are masked.
    weights = (scale.low == 0) & (scale.high <= 1)
    if not cells.masked.any() or not weights.any():
        return np.zeros_like(cells.masked)
    held = cells.masked & np.isfinite(cells.values) & (cells.values != 0)
    leaks: npt.NDArray[np.bool_] = held & weights[:, :, None, None]
    return leaks


def _levels(cells: Cells, scale: Scale, colors: int) -> Levels:
    values: Floats = cells.values
    ends = scale.high - scale.low
    ends[ends == 0] = 1  # a panel of one value, on a scale of its own
    # float32 is twice as fast, and has room for all but the most extreme ranges.
    usual = ends.min() > 1e-30 and ends.max() < 1e30
    precision = np.float32 if usual else np.float64
    low, span = (array[:, :, None, None].astype(precision) for array in (scale.low, ends))
    missing = np.isnan(values)
    with np.errstate(over="ignore"):  # what is far beyond the scale, as behind a mask
        scaled = (values - low) * (colors / span)
    scaled[missing] = 0
    levels: Levels = scaled.clip(0, colors - 1, out=scaled).astype(np.uint16)
    levels[missing] = _NAN
    levels[cells.masked & ~leaking(cells, scale)] = _MASKED
    return levels


def _enlarged(cells: npt.NDArray[Any], layout: Layout) -> npt.NDArray[Any]:
    return cells.repeat(layout.cell[1], 0).repeat(layout.cell[0], 1)


def _count(cmap: str | Colormap) -> int:
    """Return how many colours a colormap has, at most _COLORS."""
    colormap = matplotlib.colormaps[cmap] if isinstance(cmap, str) else cmap
    return min(int(colormap.N), _COLORS)


def _palette(cmap: str | Colormap) -> npt.NDArray[np.uint32]:
    """Return RGBA packed in 32 bits for every code."""
    colormap = matplotlib.colormaps[cmap] if isinstance(cmap, str) else cmap
    # A colormap of few colours has them in the middle of equal parts.
    count = _count(cmap)
    positions = np.linspace(0, 1, _COLORS) if count == _COLORS else (np.arange(count) + 0.5) / count
    scale = np.zeros((_COLORS, 4), np.uint8)
    scale[:count] = colormap(positions, bytes=True)
    beyond = np.array([_BEYOND[code] for code in sorted(_BEYOND)], dtype=np.uint8)
    packed: npt.NDArray[np.uint32] = np.concatenate([scale, beyond]).view(np.uint32).ravel()
    return packed


def _stripe(canvas: Levels, where: npt.NDArray[np.bool_], code: int) -> None:
    """Draw diagonal stripes, which no colour of a scale can look like."""
    if where.any():
        down, across = np.ogrid[: canvas.shape[0], : canvas.shape[1]]
        canvas[where & ((down + across) % 4 == 0)] = code


def _outline(canvas: Levels, box: Box, code: int, away: int = 0) -> None:
    """Draw a line around a box, so far away from it, as far as it lies within the canvas."""
    left, top = box.left - away - 1, box.top - away - 1
    right, bottom = box.left + box.width + away, box.top + box.height + away
    across, down = slice(max(0, left), right + 1), slice(max(0, top), bottom + 1)
    canvas[max(0, top) : max(0, top + 1), across] = code
    canvas[bottom : bottom + 1, across] = code
    canvas[down, max(0, left) : max(0, left + 1)] = code
    canvas[down, right : right + 1] = code
