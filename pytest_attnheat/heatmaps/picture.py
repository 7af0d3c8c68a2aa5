"""A picture: what it shows, composed anew for every size and resolution, and drawn.

Everything is one artist, so that its pixels and its texts move together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.colors import Colormap, to_rgba
from matplotlib.figure import Figure, SubFigure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Affine2D, Bbox

from ..inputs import misuse
from . import colors
from .layout import LINE, PAD, SMALL, SMALLEST_FONT, TICK, Box, Layout
from .maps import Cells, pool_cells
from .survey import Whole
from .writing import BAR_TICKS, Design, Label, Lettering, Pen, round_up

# What tells the image of a picture from others in an SVG.
IMAGE_ID = "attnheat-panels"
# Weights below this are all so pale that a number must say how large they are.
_FAINT = 0.25
_LARGER = "a larger one, or None for a size that fits (26 inches at most), or fewer cells"


@dataclass(frozen=True)
class Shown:
    """Everything that a picture shows, independent of its size."""

    design: Design  # what it consists of
    cells: Cells  # the values
    scale: colors.Scale  # the range of the colours
    cmap: str | Colormap  # the colours
    highlight: Sequence[tuple[int, ...]]  # outlined cells (row, column, query, key), or queries
    dtype: str  # the dtype that the values were given in, by name
    # what is known of the maps besides their cells, where these are pooled, or too many for a
    # record; else None
    whole: Whole | None = None


@dataclass(frozen=True)
class Sheet:
    """A picture for one size: pixels, and texts placed in pixels from the top left.

    `texts` stand on the background, `numbers` in cells.
    """

    layout: Layout
    image: colors.Image
    texts: list[Text]
    numbers: list[Text]


class Picture(Artist):
    """Panels, colorbar and every text of a heatmap figure."""

    def __init__(self, shown: Shown, host: Figure | SubFigure | Axes) -> None:
        super().__init__()
        self.shown = shown
        # What the picture fills; saving with bbox_inches="tight" moves the one of a figure.
        self._box = host.transAxes if isinstance(host, Axes) else host.transSubfigure
        owner = host.figure if isinstance(host, Axes) else host
        self._subfigure = host if isinstance(host, SubFigure) else None
        self._below = (owner, owner.figure)
        self._figure = owner.figure
        self._nominal_dpi: float | None = None
        # The sheet composed last, by size and resolution, and what it shows.
        self._composed = shown
        self._sheets: dict[tuple[tuple[int, int], float], Sheet] = {}

    def prepare(self, size: tuple[int, int], dpi: float) -> Sheet:
        """Compose the picture for a size in pixels, unless that was done last."""
        if (size, dpi) not in self._sheets or self._composed is not self.shown:
            self._composed = self.shown
            self._nominal_dpi = self._nominal_dpi or dpi
            sheet = compose(self.shown, size, dpi)
            for text in (*sheet.texts, *sheet.numbers):
                text.set_figure(self._figure)
            self._sheets = {(size, dpi): sheet}
        return self._sheets[size, dpi]

    def sheet_for(self, renderer: RendererBase | None) -> tuple[Sheet, Bbox, float]:
        """Compose the picture for a renderer."""
        # Returns the box that it is drawn into as well, and how many pixels each of its own takes.
        box, figure = self.get_window_extent(renderer), self._figure
        scalable = renderer is not None and renderer.option_scale_image()
        # Vector formats draw at 72 dots per inch, but keep the pixels that the figure was made for.
        dpi = (self._nominal_dpi or figure.dpi) if scalable else figure.dpi
        zoom = figure.dpi / dpi
        size = int(box.width / zoom + 1e-6), int(box.height / zoom + 1e-6)
        return self.prepare(size, dpi), box, zoom

    def draw(self, renderer: RendererBase) -> None:
        """Draw on any of matplotlib's renderers."""
        if not self.get_visible():
            return
        sheet, box, zoom = self.sheet_for(renderer)
        left, bottom = box.p0
        height, width = sheet.image.shape[0] * zoom, sheet.image.shape[1] * zoom
        graphics = renderer.new_gc()
        graphics.set_gid(IMAGE_ID)  # type: ignore[arg-type]  # any text will do
        image = sheet.image[::-1]
        if renderer.option_scale_image():
            renderer.draw_image(graphics, left, bottom, image, Affine2D().scale(width, height))
        else:
            renderer.draw_image(graphics, round(left), round(bottom), image)
        graphics.restore()
        to_figure = Affine2D().scale(zoom, -zoom).translate(left, bottom + height)
        ink = self.ink()
        for text in sheet.texts:
            text.set_color(ink)
        for text in (*sheet.texts, *sheet.numbers):
            text.set_transform(to_figure)
            text.draw(renderer)

    def ink(self) -> str:
        """Return the colour of what stands beside panels, so that the background shows it."""
        for owner in self._below:
            *color, alpha = to_rgba(owner.get_facecolor())
            if alpha > 0:
                return "white" if np.dot(color, colors.LUMINANCE) < 0.5 else "black"
        return "black"

    def covers(self, text: Text) -> bool:
        """Tell whether a text begins on a panel, whose colours the background does not change."""
        sheet, box, zoom = self.sheet_for(None)
        x, y = (text.get_transform().transform(text.get_position()) - box.p0) / zoom
        layout = sheet.layout
        places = (
            (x, layout.lefts, layout.panel[0]),
            (layout.size[1] - y, layout.tops, layout.panel[1]),
        )
        return all(any(e <= at <= e + side for e in edges) for at, edges, side in places)

    def get_children(self) -> list[Artist]:
        """Return the texts of the sheet composed last."""
        return [t for sheet in self._sheets.values() for t in (*sheet.texts, *sheet.numbers)]

    def get_window_extent(self, renderer: RendererBase | None = None) -> Bbox:
        """Return all that the picture fills: a tight bounding box must not cut its margins."""
        left, bottom, right, top = self._box.transform([(0, 0), (1, 1)]).ravel()
        # A subfigure may get a title of its own at any time.
        title = self._subfigure.get_suptitle() if self._subfigure else ""
        for text in self._subfigure.texts if self._subfigure and title else ():
            low = text.get_window_extent(renderer).y0
            if text.get_text() == title and low > (bottom + top) / 2:
                top = min(top, low)
        return Bbox([(left, bottom), (right, top)])

    def get_tightbbox(self, renderer: RendererBase | None = None) -> Bbox:
        """Return all that the picture fills."""
        return self.get_window_extent(renderer)


@dataclass(frozen=True)
class Place:
    """Where an axes lies that covers one panel of a picture."""

    picture: Picture
    row: int
    column: int

    def __call__(self, _axes: object, renderer: RendererBase | None) -> Bbox:
        """Return the place in parts of the figure."""
        sheet, box, zoom = self.picture.sheet_for(renderer)
        layout, shown = sheet.layout, self.picture.shown
        # The last block of a panel may stand for more keys than there are.
        high, wide = (
            count / (pooled * again) * side
            for count, pooled, again, side in zip(
                shown.design.shape[2:], shown.cells.block, layout.block, layout.cell[::-1],
                strict=True,
            )
        )  # fmt: skip
        left, bottom = layout.lefts[self.column], layout.size[1] - layout.tops[self.row] - high
        across, down = box.width / zoom, box.height / zoom
        return Bbox.from_bounds(left / across, bottom / down, wide / across, high / down)


def compose(shown: Shown, size: tuple[int, int], dpi: float) -> Sheet:
    """Compose a picture of `size` pixels."""
    design = shown.design
    grid = (shown.cells.values.shape[2], shown.cells.values.shape[3])
    notes = len(_notes(shown.cells, shown.scale))
    layout, turned = design.plan(grid, size, dpi, notes=notes)
    if layout.block != (1, 1) and shown.cells.block == (1, 1):
        notes = len(_notes(replace(shown.cells, block=layout.block), shown.scale))
        layout, turned = design.plan(grid, size, dpi, notes=notes)
    # A figure drawn smaller than it was made for is pooled once more.
    cells = pool_cells(shown.cells, layout.block)
    boxes = [_box(index, cells.block, layout) for index in shown.highlight]
    image = colors.paint(cells, shown.scale, shown.cmap, layout, boxes)
    pen = Pen(layout.em, dpi, design.words.lettering)
    _write_names(pen, design, layout, _notes(cells, shown.scale))
    _write_ticks(pen, image, design, layout, turned=turned)
    if layout.bar is not None:
        _write_bar(pen, image, layout.bar, shown.scale, layout.em)
    if not shown.scale.shared:
        _write_ranges(pen, shown.scale, layout)
    inside = Pen(layout.em, dpi, design.words.lettering)
    if design.words.numbers is not None:
        _write_numbers(inside, shown, cells, layout)
    return Sheet(layout, image, pen.texts, inside.texts)


def _notes(cells: Cells, scale: colors.Scale) -> list[str]:
    """Say what the colours do not: pooling, what is not a number, weight where none may be."""
    notes, missing, infinite = [], 0, 0
    largest = float(cells.values.max())
    if cells.masked.any() or not math.isfinite(largest):
        shown = ~cells.masked
        missing = int((np.isnan(cells.values) & shown).sum())
        infinite = int((np.isposinf(cells.values) & shown).sum())
        shown &= np.isfinite(cells.values)
        largest = float(np.max(cells.values, where=shown, initial=-np.inf))
    faint = scale.shared and scale.range == (0.0, 1.0) and 0 <= largest < _FAINT
    if cells.block != (1, 1):
        size = "{}\N{MULTIPLICATION SIGN}{}".format(*cells.block)
        what = f"farthest from 0 of {size}" if cells.signed else f"max of {size} weights"
        notes.append(f"cell = {what}" + f", largest {largest:.2g}" * faint)
    elif faint:
        notes.append(f"largest weight {largest:.2g}")
    if missing:
        notes.append(f"NaN in {missing} cell{'s' * (missing > 1)} (blue)")
    if infinite:
        notes.append(f"inf or above 3e38 in {infinite} cell{'s' * (infinite > 1)} (darkest)")
    leaks = int(colors.leaking(cells, scale).sum())
    if leaks:
        notes.append(f"{leaks} masked cell{'s hold' if leaks > 1 else ' holds'} weight")
    return notes


def _box(index: tuple[int, ...], block: tuple[int, int], layout: Layout) -> Box:
    """Return where a cell (row, column, query, key) or a whole query of them is drawn."""
    row, column, query = index[:3]
    top = layout.tops[row] + query // block[0] * layout.cell[1]
    if len(index) == 3:
        return Box(layout.lefts[column], top, layout.panel[0], layout.cell[1])
    left = layout.lefts[column] + index[3] // block[1] * layout.cell[0]
    return Box(left, top, *layout.cell)


def _write_names(pen: Pen, design: Design, layout: Layout, notes: list[str]) -> None:
    words, area, (width, height) = design.words, layout.area, layout.size
    middle, centre = area.left + area.width / 2, area.top + area.height / 2
    pen.across(words.xlabel or "", middle, layout.xlabel, width, width)
    # The query axis' name ends above the line that has the key axis' name.
    above = layout.xlabel - LINE / 2 * layout.em
    pen.down(words.ylabel or "", layout.ylabel, centre, above, above)
    pen.across(words.title or "", middle, layout.title, width, width)
    for line, note in enumerate(notes):
        y = layout.notes + line * SMALL * LINE * layout.em
        pen.across(note, middle, y, width, width, SMALL)
    # A title alone in its line may be wider than its panel.
    room = width if len(layout.lefts) == 1 else _pitch(layout.lefts, layout.panel[0])
    for left, text in zip(layout.lefts, words.titles or (), strict=False):
        pen.across(text, left + layout.panel[0] / 2, layout.column_titles, room, width)
    room = height if len(layout.tops) == 1 else _pitch(layout.tops, layout.panel[1])
    for top, text in zip(layout.tops, words.row_titles or (), strict=False):
        pen.down(text, layout.row_titles, top + layout.panel[1] / 2, room, height)


def _pitch(edges: tuple[int, ...], side: int) -> int:
    return edges[1] - edges[0] if len(edges) > 1 else side


def _write_ticks(
    pen: Pen, image: colors.Image, design: Design, layout: Layout, *, turned: bool
) -> None:
    length, pad = max(2, round(TICK * layout.em)), PAD * layout.em
    lettering, words = design.words.lettering, design.words
    line = SMALL * LINE * layout.em

    def width(label: Label) -> float:
        return line if turned else SMALL * (label.width + 2 * PAD) * layout.em

    def height(label: Label) -> float:
        return line

    bottom = layout.area.top + layout.area.height
    keys = _Axis(layout.lefts, layout.panel[0], design.shape[3], words.keys, lettering)
    for label, x in keys.ticks(width):
        colors.tick(image, int(x), bottom + 1, 1, length)
        pen.write(label, x, bottom + length + pad, SMALL, va="top", rotation=90 if turned else 0)
    left = layout.area.left
    queries = _Axis(layout.tops, layout.panel[1], design.shape[2], words.queries, lettering)
    for label, y in queries.ticks(height):
        colors.tick(image, left - 1 - length, int(y), length, 1)
        pen.write(label, left - length - pad, y, SMALL, ha="right")


@dataclass(frozen=True)
class _Axis:
    """One axis of all panels side by side, and the labels along it."""

    edges: tuple[int, ...]  # where each panel begins
    side: int  # pixels along one panel
    count: int  # keys or queries of one panel
    given: list[Label] | None  # their labels, if the user gave any
    lettering: Lettering

    def ticks(self, extent: Callable[[Label], float]) -> list[tuple[Label, float]]:
        """Choose labels that do not overlap, the same ones for every panel that has any."""
        step = self.side / self.count
        widest = max(map(extent, self.given or [self._label(self.count - 1)]))
        every = max(1, math.ceil(widest / step))
        if self.given is None:
            every = round_up(every)
        indices = list(range(0, self.count, every))
        # Where steps that are easy to count leave the first label alone, the last joins it.
        if self.given is None and len(indices) == 1 and (self.count - 1) * step >= widest / LINE:
            indices.append(self.count - 1)
        pitch = _pitch(self.edges, self.side)
        first = self._label(0)
        # The last label of a panel must keep clear of the first one of the next.
        while len(self.edges) > 1 and len(indices) > 1:
            clear = (extent(self._label(indices[-1])) + extent(first)) / 2
            if pitch - (indices[-1] - indices[0]) * step >= clear:
                break
            indices.pop()
        skip = max(1, math.ceil(extent(first) / pitch))
        return [
            (self._label(index), edge + (index + 0.5) * step)
            for edge in self.edges[::skip]
            for index in indices
        ]

    def _label(self, index: int) -> Label:
        if self.given is not None:
            return self.given[index]
        text = str(index)
        return Label(text, self.lettering.family, self.lettering.width(text))


def _write_bar(pen: Pen, image: colors.Image, bar: Box, scale: colors.Scale, em: float) -> None:
    length, right = max(2, round(TICK * em)), bar.left + bar.width
    most = int(bar.height / (2 * SMALL * LINE * em))
    for share, text in _bar_ticks(scale, most):
        y = bar.top + (bar.height - 1) * (1 - share)
        colors.tick(image, right + 1, round(y), length, 1)
        pen.beside(text, right + length + PAD * em, y + 0.5, SMALL * BAR_TICKS * em)


def _bar_ticks(scale: colors.Scale, most: int) -> list[tuple[float, str]]:
    """Return the ticks of the colorbar: share of its height and text."""
    if not scale.shared:
        return [(0.0, "min"), (1.0, "max")]
    low, high = scale.range
    slack = 1e-6 * (high - low)
    ticks = MaxNLocator(max(1, min(most, 4)), steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    inside = [tick for tick in ticks if low - slack <= tick <= high + slack]
    if len(inside) < 2:
        inside = [low, high]
    shares = [(tick - low) / (high - low) for tick in inside]
    texts = [f"{tick:.4g}" for tick in inside]
    if len(set(texts)) < len(texts):  # a small range far from zero: say how far above its end
        return [(0.0, f"{low:.4g}"), (1.0, _above(low, high))]
    return list(zip(shares, texts, strict=True))


def _above(low: float, high: float) -> str:
    return f"+{high - low:.1g}".replace("e-0", "e-")


def _write_ranges(pen: Pen, scale: colors.Scale, layout: Layout) -> None:
    air = (0.5 if len(layout.lefts) > 1 else 2) * layout.em
    room = layout.panel[0] + air
    for row, top in enumerate(layout.tops):
        for column, left in enumerate(layout.lefts):
            low, high = scale.low[row, column], scale.high[row, column]
            start, end = f"{low:.3g}", f"{high:.3g}"
            text = (
                f"{start} \N{EN DASH} {_above(low, high) if start == end and low < high else end}"
            )
            if not pen.fits(text, room):
                got = f"panels of {layout.panel[0]} pixels, which have no room for a range {text!r}"
                raise ValueError(misuse("figsize", got, _LARGER))
            y = top - SMALL * LINE / 2 * layout.em
            pen.across(text, left + layout.panel[0] / 2, y, room, layout.size[0], SMALL)


def _write_numbers(pen: Pen, shown: Shown, cells: Cells, layout: Layout) -> None:
    words, (wide, high) = shown.design.words, layout.cell
    shown_at = np.argwhere(~cells.masked)
    texts = [words.number(float(cells.values[tuple(index)])) for index in shown_at]
    widest = max(map(words.lettering.width, texts), default=0.0) + PAD
    size = min(SMALL, wide / layout.em / widest, high / layout.em / LINE)
    if cells.block != (1, 1) or pen.points(size) < SMALLEST_FONT:
        got = f"cells of {wide} x {high} pixels, which have no room for numbers"
        raise ValueError(misuse("figsize", got, _LARGER))
    dark = colors.is_dark(shown.cmap, cells, shown.scale)
    for (row, column, query, key), text in zip(shown_at, texts, strict=True):
        x = layout.lefts[column] + (key + 0.5) * wide
        y = layout.tops[row] + (query + 0.5) * high
        pen.write(text, x, y, size, color="white" if dark[row, column, query, key] else "black")
