"""Where everything goes, in whole pixels.

A cell that is a whole number of pixels, placed at a whole pixel, is drawn alike by every
version of matplotlib. So the layout is plain integer arithmetic: it knows how wide texts are
only through numbers that do not depend on how they are rasterised (see `writing`).

Positions count pixels from the left and from the top of the figure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from ..inputs import misuse

# Sizes in units of the label font size (em).
LINE = 1.4  # height of a line of text
SMALL = 0.8  # font size of ticks, ranges and notes
PAD = 0.3  # white space around the figure and between texts
TICK = 0.25  # length of a tick mark
BAR_GAP = 0.7  # between panels and colorbar
BAR_WIDTH = 0.7

LARGEST_FONT = 10.0  # points, matplotlib's own default
SMALLEST_FONT = 4.0  # points; below this nobody reads it
# Texts give way to the panels until the panels have this share of each side.
_PANEL_SHARE = 0.5
# Maps of few queries and many keys (or the reverse) would be a thin line: stretch them.
_THINNEST = 12


class Box(NamedTuple):
    """A rectangle in pixels: left and top edge, width and height."""

    left: int
    top: int
    width: int
    height: int


@dataclass(frozen=True)
class Content:
    """What has to find room. Text widths are in em of the label font."""

    grid: tuple[int, int, int, int]  # rows, columns, queries, keys
    title: bool = False
    column_titles: bool = False
    row_titles: bool = False
    xlabel: bool = True
    ylabel: bool = True
    key_ticks: float = SMALL * LINE  # height below the panels
    query_ticks: float = 1.0  # width left of the panels
    bar_ticks: float = 2.0  # width right of the colorbar
    bar: bool = True
    above: float = 0.0  # height above each row of panels
    notes: int = 0  # lines

    @property
    def lift(self) -> float:
        """What keeps a title clear of the upper end of the colorbar, half a small line above it."""
        alone = self.title and not self.column_titles and self.above == 0
        return SMALL * LINE / 2 if alone and self.bar else 0.0


@dataclass(frozen=True)
class Layout:
    """A figure, laid out."""

    size: tuple[int, int]  # width and height of the figure
    em: float  # pixels per em of the label font
    block: tuple[int, int]  # cells (queries, keys) pooled into one drawn cell
    cell: tuple[int, int]  # width and height of a drawn cell
    panel: tuple[int, int]  # width and height of a panel
    lefts: tuple[int, ...]  # the edges of the columns of panels
    tops: tuple[int, ...]  # and of their rows
    bar: Box | None  # the colorbar
    title: float  # vertical centre of this line of text, as of the next two
    column_titles: float
    xlabel: float
    notes: float  # vertical centre of the first of these lines
    ylabel: float  # horizontal centre of this column of text, as of the next
    row_titles: float

    @property
    def area(self) -> Box:
        """The rectangle that holds all panels."""
        width = self.lefts[-1] + self.panel[0] - self.lefts[0]
        height = self.tops[-1] + self.panel[1] - self.tops[0]
        return Box(self.lefts[0], self.tops[0], width, height)


class _Margins(NamedTuple):
    left: int
    right: int
    top: int
    bottom: int


def plan(content: Content, size: tuple[int, int], dpi: float) -> Layout:
    """Lay out a figure of `size` pixels."""
    points = LARGEST_FONT
    while True:
        em = points * dpi / 72
        margins = _margins(content, em)
        room = (size[0] - margins.left - margins.right, size[1] - margins.top - margins.bottom)
        roomy = all(have >= _PANEL_SHARE * side for have, side in zip(room, size, strict=True))
        if roomy or points <= SMALLEST_FONT:
            break
        points = max(SMALLEST_FONT, points - 0.5)
    gaps = _gaps(content, room, em)
    most = (
        (room[0] - gaps[0] * (content.grid[1] - 1)) // content.grid[1],
        (room[1] - gaps[1] * (content.grid[0] - 1)) // content.grid[0],
    )
    if min(most) < 1:
        raise ValueError(_too_small(content, size, dpi, margins))
    return _place(content, size, em, margins, gaps, most)


def natural_size(content: Content, dpi: float, cell: int) -> tuple[int, int]:
    """Return the pixels of a figure whose cells have `cell` pixels and whose texts fit."""
    em = LARGEST_FONT * dpi / 72
    margins = _margins(content, em)
    rows, columns, queries, keys = content.grid
    panel = (max(keys * cell, _THINNEST), max(queries * cell, _THINNEST))
    gaps = _gaps(content, (columns * panel[0], rows * panel[1]), em)
    width = margins.left + margins.right + columns * (panel[0] + gaps[0]) - gaps[0]
    height = margins.top + margins.bottom + rows * (panel[1] + gaps[1]) - gaps[1]
    # The panels must keep their share, or the texts would be made smaller.
    return (
        max(width, math.ceil((margins.left + margins.right) / (1 - _PANEL_SHARE))),
        max(height, math.ceil((margins.top + margins.bottom) / (1 - _PANEL_SHARE))),
    )


def inches(pixels: int, dpi: float) -> float:
    """Return inches that are not a hair less than so many pixels, as matplotlib cuts off."""
    side = pixels / dpi
    while side * dpi < pixels:
        side = math.nextafter(side, math.inf)
    return side


def _margins(content: Content, em: float) -> _Margins:
    left = PAD + content.ylabel * LINE + content.row_titles * LINE + content.query_ticks + PAD
    right = PAD
    if content.bar:
        right += BAR_GAP + BAR_WIDTH + TICK + PAD + content.bar_ticks
    top = PAD + (content.title + content.column_titles) * LINE + content.lift + content.above
    bottom = content.key_ticks + content.xlabel * LINE + content.notes * SMALL * LINE + 2 * PAD
    # A tick label at the end of an axis reaches past the panel, by half a line at the most.
    return _Margins(
        math.ceil((left + TICK) * em),
        math.ceil(max(right, SMALL * LINE) * em),
        math.ceil(max(top, SMALL * LINE / 2) * em),
        math.ceil((bottom + TICK) * em),
    )


def _gaps(content: Content, room: tuple[int, int], em: float) -> tuple[int, int]:
    """Leave up to half an em between panels, less where they are many, never under a pixel."""
    rows, columns = content.grid[:2]
    horizontal = max(1, min(round(em / 2), room[0] // (columns * 8)))
    vertical = max(1, min(round(em / 2), room[1] // (rows * 8)))
    return horizontal, vertical + math.ceil(content.above * em)


def _place(
    content: Content,
    size: tuple[int, int],
    em: float,
    margins: _Margins,
    gaps: tuple[int, int],
    most: tuple[int, int],
) -> Layout:
    rows, columns, queries, keys = content.grid
    block, cell = _fit(queries, keys, most)
    panel = (-(-keys // block[1]) * cell[0], -(-queries // block[0]) * cell[1])
    width = columns * (panel[0] + gaps[0]) - gaps[0]
    height = rows * (panel[1] + gaps[1]) - gaps[1]
    left = margins.left + (size[0] - margins.left - margins.right - width) // 2
    top = margins.top + (size[1] - margins.top - margins.bottom - height) // 2
    above = top - content.above * em
    below = top + height + (TICK + PAD + content.key_ticks) * em
    beside = left - (TICK + PAD + content.query_ticks) * em
    return Layout(
        size=size, em=em, block=block, cell=cell, panel=panel,
        lefts=tuple(left + index * (panel[0] + gaps[0]) for index in range(columns)),
        tops=tuple(top + index * (panel[1] + gaps[1]) for index in range(rows)),
        bar=_bar(em, left + width, top, height) if content.bar else None,
        title=above - (content.column_titles * LINE + content.lift + LINE / 2) * em,
        column_titles=above - LINE / 2 * em, xlabel=below + LINE / 2 * em,
        notes=below + (content.xlabel * LINE + SMALL * LINE / 2) * em,
        ylabel=beside - (content.row_titles * LINE + LINE / 2) * em,
        row_titles=beside - LINE / 2 * em,
    )  # fmt: skip


def _fit(queries: int, keys: int, most: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Choose block (queries, keys) and cell (width, height): square, unless that is a line."""
    wide, high = most
    block = max(-(-keys // wide), -(-queries // high))
    if block == 1:
        side = min(wide // keys, high // queries)
        return (1, 1), (_stretched(keys, side, wide), _stretched(queries, side, high))
    per_query, per_key = _pooled(queries, block, high), _pooled(keys, block, wide)
    return (per_query, per_key), (
        _stretched(-(-keys // per_key), 1, wide),
        _stretched(-(-queries // per_query), 1, high),
    )


def _pooled(count: int, block: int, most: int) -> int:
    """Pool an axis like the other one, unless that leaves a thin line of it."""
    return block if -(-count // block) >= _THINNEST else -(-count // most)


def _stretched(count: int, side: int, most: int) -> int:
    """Return the side of a cell, enlarged where `count` of them would be a thin line."""
    return max(side, min(most // count, -(-_THINNEST // count)))


def _bar(em: float, right: int, top: int, height: int) -> Box:
    # As high as the panels, but with room for its two end labels. It stands on their lower edge,
    # because below that are the tick labels.
    bottom = top + height
    tall = min(max(height, round(4 * em)), bottom - math.ceil(SMALL * LINE / 2 * em))
    left = right + math.ceil(BAR_GAP * em)
    return Box(left, bottom - tall, max(3, round(BAR_WIDTH * em)), tall)


def _too_small(content: Content, size: tuple[int, int], dpi: float, margins: _Margins) -> str:
    rows, columns = content.grid[:2]
    need = (
        (margins.left + margins.right + 2 * columns) / dpi,
        (margins.top + margins.bottom + 2 * rows) / dpi,
    )
    return misuse(
        "figsize",
        f"({size[0] / dpi:.3g}, {size[1] / dpi:.3g}) at {dpi:g} dots per inch, which has no room "
        f"for {rows} x {columns} panels with their labels",
        f"at least ({need[0]:.2f}, {need[1]:.2f}), or None for a size that fits",
    )
