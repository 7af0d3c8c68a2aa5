"""What is written on a picture: labels in any script, the room they need, the pen that writes them.

Widths come from the advance widths that the font's designer wrote into it, not from rendered
text: they are the same for every version of matplotlib and FreeType, and so is the layout.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache

from matplotlib import font_manager
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text

from .layout import (
    LARGEST_FONT,
    LINE,
    PAD,
    SMALL,
    SMALLEST_FONT,
    Content,
    Layout,
    natural_size,
    plan,
)

ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"
# Small letters are moved to whole pixels when they are drawn, which may make a text wider.
_HINTING = 1.1
# Where a label holds characters that the default font lacks, it may be this wide (in em).
_LONGEST_LABEL = 8.0
# The ticks of the colorbar get this width (em of the small font) whatever they say, so that
# panels do not move with the values they show.
BAR_TICKS = 2.6

# A figure that is sized by its content has cells of this many pixels at most ...
_LARGEST_CELL = 24
# ... panels of about this many where that makes cells smaller, the long side of narrow ones up to
# three times as many,
_NATURAL_PANEL = 160
# of this many in a small figure, where larger maps are pooled,
_SMALL_PANEL = 48
# and no side much longer than this.
_LONGEST_SIDE = 1600
# A title (in em) may make a picture wider, up to this.
_WIDEST_TITLE = 60.0
# What a range above a panel needs at its smallest, in em: "-1.23e+05 - 1.23e+05".
_RANGE_WIDTH = 6.0


@dataclass(frozen=True)
class Lettering:
    """The default font, and how wide it sets a text."""

    family: tuple[str, ...]  # matplotlib's names for it
    path: str  # its file

    @classmethod
    def default(cls) -> Lettering:
        """Return the font that matplotlib's settings ask for."""
        properties = font_manager.FontProperties()
        return cls(tuple(properties.get_family()), str(font_manager.findfont(properties)))

    def has(self, character: str) -> bool:
        """Tell whether the default font has a glyph for a character."""
        return _has_glyph(self.path, character)

    def width(self, text: str) -> float:
        """Return the room in em that a text takes. A character the font lacks counts as one em."""
        return _HINTING * sum(_advance(self.path, character) for character in text)


@dataclass(frozen=True)
class Label:
    """A text that can be drawn: its characters, the fonts that have them, its width in em."""

    text: str
    family: tuple[str, ...]
    width: float


def make_labels(texts: Sequence[str], lettering: Lettering, longest: float) -> list[Label]:
    r"""Make labels that no font fails to draw, each at most `longest` em wide.

    A character that no installed font has is written as its Python escape (`\u4e2d`), as are
    line ends and other control characters. Labels that are too long end in an ellipsis.
    """
    labels = []
    for text in texts:
        drawable, fallbacks, foreign = _drawable(str(text), lettering)
        fitting = shorten(drawable, lettering, longest)
        # Panels must not move with the fonts that a machine happens to have.
        width = longest if foreign else lettering.width(fitting)
        labels.append(Label(fitting, (*lettering.family, *fallbacks), width))
    return labels


def shorten(text: str, lettering: Lettering, longest: float) -> str:
    """Cut a text to at most `longest` em, the ellipsis that marks the cut included."""
    width, room, fitting = 0.0, longest - lettering.width(ELLIPSIS), 0
    for position, character in enumerate(text, 1):
        width += lettering.width(character)
        if width <= room:
            fitting = position
        if width > longest:
            return text[:fitting].rstrip() + ELLIPSIS
    return text


def round_up(number: int) -> int:
    """Return the next of 1, 2, 5, 10, 20, 50 ... that is not smaller."""
    power = int(10 ** (len(str(number)) - 1))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= number)


@dataclass(frozen=True)
class Words:
    """All that is written on a picture, as it was given; `numbers` is a format."""

    xlabel: str | None
    ylabel: str | None
    title: str | None = None
    titles: Sequence[str] | None = None
    row_titles: Sequence[str] | None = None
    key_labels: Sequence[str] | None = None
    query_labels: Sequence[str] | None = None
    numbers: str | None = None
    lettering: Lettering = field(default_factory=Lettering.default)

    @cached_property
    def keys(self) -> list[Label] | None:
        """The key labels in drawable form."""
        return self._labels(self.key_labels)

    @cached_property
    def queries(self) -> list[Label] | None:
        """The query labels in drawable form."""
        return self._labels(self.query_labels)

    def _labels(self, texts: Sequence[str] | None) -> list[Label] | None:
        return None if texts is None else make_labels(texts, self.lettering, _LONGEST_LABEL)

    def number(self, value: float) -> str:
        """Return what is written into a cell."""
        return format(value, self.numbers or "")


# What a picture says of itself: the arguments of `show_heatmaps` that are written on it.
LABELS = tuple(entry.name for entry in fields(Words) if entry.name != "lettering")


@dataclass(frozen=True)
class Design:
    """What a picture consists of, apart from the values that it shows."""

    shape: tuple[int, int, int, int]  # (rows, columns, queries, keys) of the maps
    words: Words  # what is written
    colorbar: bool  # whether there is one
    ranges: bool  # whether each panel has its own range written above it
    headline: bool = False  # whether a line is left free above all, for what others write there
    headings: bool = False  # whether one is left free above each row of panels

    def plan(
        self, grid: tuple[int, int], size: tuple[int, int], dpi: float, *, notes: int
    ) -> tuple[Layout, bool]:
        """Lay out panels of `grid` cells (queries, keys) in a figure of `size` pixels."""
        # Key labels stand upright where they fit side by side and are turned where they do not:
        # whether they are is returned as well.
        layout = plan(self._content(grid, notes=notes, turned=False), size, dpi)
        if self.words.keys is None:
            return layout, False
        widest = max(label.width for label in self.words.keys)
        step = layout.panel[0] / self.shape[3]
        if (widest + PAD) * SMALL * layout.em <= step:
            return layout, False
        return plan(self._content(grid, notes=notes, turned=True), size, dpi), True

    def block_for(self, size: tuple[int, int], dpi: float) -> tuple[int, int]:
        """Return how many weights (queries, keys) share a cell in a figure of `size` pixels."""
        grid = self.shape[2:]
        layout, _ = self.plan(grid, size, dpi, notes=0)
        if layout.block != (1, 1):
            layout, _ = self.plan(grid, size, dpi, notes=1)
        return layout.block

    def natural_size(
        self, dpi: float, number_width: float, *, small: bool = False
    ) -> tuple[int, int]:
        """Return the size in pixels at which cells, labels and numbers have room."""
        # A small one has room for small panels, and for those labels that fit beside them.
        rows, columns, queries, keys = self.shape
        em = LARGEST_FONT * dpi / 72
        block = math.ceil(max(queries, keys) / _SMALL_PANEL) if small else 1
        queries, keys = math.ceil(queries / block), math.ceil(keys / block)
        panels = _SMALL_PANEL, _SMALL_PANEL
        if not small:
            panels = _NATURAL_PANEL, 3 * _NATURAL_PANEL
        fitting = min(panels[0] // min(queries, keys), panels[1] // max(queries, keys))
        cell = min(_LARGEST_CELL, max(1, fitting))
        if self.words.numbers:
            cell = max(cell, int((number_width + PAD) * SMALL * em) + 1)
        if (self.words.keys or self.words.queries) and not small:
            cell = max(cell, int(SMALL * LINE * em) + 1)
        if self.ranges:
            cell = max(cell, int(_RANGE_WIDTH * em / keys) + 1)
        cell = min(cell, _LONGEST_SIDE // (columns * keys), _LONGEST_SIDE // (rows * queries))
        content = self._content((queries, keys), notes=1, turned=True)
        width, height = natural_size(content, dpi, max(1, cell))
        titles = [self.words.title or "", *(self.words.titles or [])[: columns == 1]]
        widest = max(map(self.words.lettering.width, titles)) + 2 * PAD
        width = max(width, math.ceil(min(widest, _WIDEST_TITLE) * em))
        return min(width, _LONGEST_SIDE + 1000), min(height, _LONGEST_SIDE + 1000)

    def _content(self, grid: tuple[int, int], *, notes: int, turned: bool) -> Content:
        words = self.words
        key_ticks, query_ticks = LINE, words.lettering.width(str(self.shape[2] - 1))
        if turned and words.keys:
            key_ticks = max(label.width for label in words.keys) + PAD
        if words.queries:
            query_ticks = max(label.width for label in words.queries)
        return Content(
            grid=(*self.shape[:2], *grid), title=words.title is not None or self.headline,
            column_titles=words.titles is not None, row_titles=words.row_titles is not None,
            xlabel=bool(words.xlabel), ylabel=bool(words.ylabel), key_ticks=SMALL * key_ticks,
            query_ticks=SMALL * query_ticks, bar_ticks=SMALL * BAR_TICKS, bar=self.colorbar,
            above=LINE * self.headings + SMALL * LINE * self.ranges, notes=notes,
        )  # fmt: skip


class Pen:
    """Writes texts, each as large as its room allows."""

    def __init__(self, em: float, dpi: float, lettering: Lettering) -> None:
        self.texts: list[Text] = []
        self._em = em
        self._dpi = dpi
        self._lettering = lettering

    def points(self, size: float) -> float:
        """Return a font size in points, from one in em of the label font."""
        return size * self._em * 72 / self._dpi

    def fits(self, text: str, room: float) -> bool:
        """Tell whether a text fits in `room` pixels, set in the smallest font."""
        smallest = min(SMALLEST_FONT * self._dpi / 72, self._em * SMALL)
        return self._lettering.width(text) * smallest <= room

    def across(
        self, text: str, x: float, y: float, room: float, width: float, size: float = 1.0
    ) -> None:
        """Write a centred line, smaller or shortened to fit, moved to lie within `width`."""
        pad = PAD * self._em
        label, size, half = self._fitted(text, min(room, width - 2 * pad), size)
        self.write(label, min(max(x, half + pad), width - half - pad), y, size)

    def down(self, text: str, x: float, y: float, room: float, height: float) -> None:
        """Write a line that reads upwards, as `across` does."""
        pad = PAD * self._em
        label, size, half = self._fitted(text, min(room, height - 2 * pad), 1.0)
        self.write(label, x, min(max(y, half + pad), height - half - pad), size, rotation=90)

    def beside(self, text: str, x: float, y: float, room: float) -> None:
        """Write a text right of (x, y), smaller where it would need more than `room` pixels."""
        label = self._label(text)
        size = min(SMALL, room / label.width / self._em)
        self.write(label, x, y, size, ha="left")

    def write(
        self,
        text: str | Label,
        x: float,
        y: float,
        size: float,
        *,
        ha: str = "center",
        va: str = "center",
        rotation: float = 0,
        color: str = "black",
    ) -> None:
        """Write a text at a position in pixels."""
        label = self._label(text) if isinstance(text, str) else text
        if label.text in ("", ELLIPSIS):
            return  # nothing to read
        # A token may hold dollar signs; it is never a formula.
        self.texts.append(Text(
            x, y, label.text, fontsize=self.points(size), fontfamily=list(label.family), ha=ha,
            va=va, rotation=rotation, rotation_mode="default", color=color, parse_math=False,
            usetex=False,
        ))  # fmt: skip

    def _label(self, text: str) -> Label:
        return make_labels([text], self._lettering, float("inf"))[0]

    def _fitted(self, text: str, room: float, size: float) -> tuple[Label, float, float]:
        """Return a text that fits in `room` pixels, its font size, and half its width."""
        label = self._label(text)
        wide = self._lettering.width(label.text) * self._em
        smallest = min(size, 0.6)
        size = max(smallest, min(size, room / wide if wide else size))
        shortened = shorten(label.text, self._lettering, room / size / self._em)
        width = self._lettering.width(shortened) * size * self._em
        return Label(shortened, label.family, label.width), size, width / 2


def _drawable(text: str, lettering: Lettering) -> tuple[str, list[str], bool]:
    # Returns the text, the further fonts that it needs, and whether it depends on the fonts
    # installed.
    characters: list[str] = []
    fallbacks: list[str] = []
    foreign = False
    for character in text:
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp"):
            characters.append(_escape(character))
        elif lettering.has(character):
            characters.append(character)
        elif unicodedata.category(character) == "Cf" or "\ufe00" <= character <= "\ufe0f":
            continue  # joiners and variation selectors have no shape of their own
        else:
            foreign = True
            name = _font_with(character)
            characters.append(_escape(character) if name is None else character)
            if name is not None and name not in fallbacks:
                fallbacks.append(name)
    return "".join(characters), fallbacks, foreign


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


@lru_cache(maxsize=4096)
def _font_with(character: str) -> str | None:
    """Name an installed font that has a glyph for a character, upright sans-serifs first."""
    entries = sorted(
        font_manager.fontManager.ttflist,
        key=lambda entry: (entry.style != "normal", "sans" not in entry.name.lower(), entry.name),
    )
    for entry in entries:
        # The font of last resort has a box for everything, which reads as nothing.
        if "last" in entry.name.lower() and "resort" in entry.name.lower():
            continue
        try:
            found = _has_glyph(entry.fname, character)
        except (OSError, RuntimeError):
            continue  # removed or damaged since matplotlib listed it
        if found:
            return entry.name
    return None


@lru_cache(maxsize=16384)
def _has_glyph(path: str, character: str) -> bool:
    return bool(_open(path).get_char_index(ord(character)))


@lru_cache(maxsize=16384)
def _advance(path: str, character: str) -> float:
    if not _has_glyph(path, character):
        return 1.0
    font = _open(path)
    font.set_size(100, 72)
    return float(font.load_char(ord(character)).linearHoriAdvance) / 65536 / 100


@lru_cache(maxsize=64)
def _open(path: str) -> FT2Font:
    return FT2Font(path)
