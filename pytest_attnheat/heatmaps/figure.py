"""The figure that `show_heatmaps` returns, and its axes."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import IO, Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis, XAxis, YAxis
from matplotlib.backend_bases import RendererBase
from matplotlib.cbook import normalize_kwargs
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import NullLocator

from .layout import LINE, PAD, SMALL, Layout, inches
from .picture import Picture, Place
from .record import encode, metadata_of

# Attention compresses well at any level; a higher one mostly takes time.
_PNG_LEVEL = 1


class HeatmapFigure(Figure):
    """A matplotlib figure that shows heatmaps, made by `show_heatmaps`.

    It belongs to no window and to no pyplot state, and notebooks show it as SVG. The picture is
    laid out in whole pixels for whatever size and resolution it is drawn at.

    Its axes are made when they are asked for: an invisible one over each panel, row by row, in
    which key 3 of query 5 is the point (3, 5). What they write above a panel, and `suptitle`, gets
    a line of its own. Texts beside the panels that were given no colour are white on what is dark.

    Attributes:
        picture: the artist that draws it; `picture.shown` is what it shows.
        natural: whether its size follows from what it shows.
    """

    picture: Picture
    natural = False
    _covered = 0  # panels whose axes are made
    _frozen = False  # matplotlib need not place those that are not

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._uncoloured: dict[Text, object] = {}

    @property  # type: ignore[misc]
    def axes(self) -> list[Axes]:  # type: ignore[override]  # like Figure
        """The axes, one over each panel and then those that the user has added."""
        if not self._frozen:
            self._cover(None)
        return sorted(super().axes, key=lambda axes: not isinstance(axes, PanelAxes))

    def get_axes(self) -> list[Axes]:
        """Return the axes, as `axes` does."""
        return self.axes

    def gca(self) -> Axes:
        """Return the current axes, at first those of the first panel."""
        if not super().axes:
            self._cover(1)
        return super().gca()

    def _cover(self, count: int | None) -> None:
        """Make the axes of the first panels, or of all, unless that was done."""
        if getattr(self, "picture", None) not in self.artists:
            return
        rows, columns, queries, keys = self.picture.shown.design.shape
        count = rows * columns if count is None else count
        if self._covered >= count:
            return
        current = super().gca() if super().axes else None
        for row, column in list(product(range(rows), range(columns)))[self._covered : count]:
            panel = self.add_axes((0, 0, 1, 1), label=f"[{row}, {column}]", axes_class=PanelAxes)
            panel.set(xlim=(-0.5, keys - 0.5), ylim=(queries - 0.5, -0.5), autoscale_on=False)
            panel.set_axis_off()
            for axis in (panel.xaxis, panel.yaxis):
                axis.set_major_locator(NullLocator())
            panel.set_axes_locator(Place(self.picture, row, column))
        self._covered = count
        self.sca(current or super().axes[0])

    def text(
        self, x: float, y: float, s: str, fontdict: dict[str, Any] | None = None, **kwargs: Any
    ) -> Text:
        """Write a text, as `matplotlib.figure.Figure.text` does."""
        text = super().text(x, y, s, fontdict, **kwargs)
        self.colour_by_background(text, {**(fontdict or {}), **kwargs})
        return text

    def colour_by_background(self, text: Text, given: Mapping[str, object]) -> None:
        """Give a text the colour of those beside the panels, unless it was given one."""
        if not {"color", "c"} & set(given):
            self._uncoloured[text] = text.get_color()

    def draw(self, renderer: RendererBase) -> None:
        """Draw on any of matplotlib's renderers."""
        ink = self.picture.ink()
        for text, color in self._uncoloured.items():
            if text.get_color() == color and not self.picture.covers(text):
                text.set_color(ink)
                self._uncoloured[text] = ink
        super().draw(renderer)

    def suptitle(self, t: str, **kwargs: Any) -> Text:
        """Write a title for the figure, in a line of its own, in the place of an earlier one."""
        words = replace(self.picture.shown.design.words, title=None)
        layout = self.make_room(words=words, headline=True)
        above = {"y": 1 - layout.title / layout.size[1], "verticalalignment": "center"}
        look = {"fontsize": layout.em * 72 / self.dpi, **normalize_kwargs(kwargs, Text)}
        return super().suptitle(t, **{**above, **look})

    def make_room(self, **changes: Any) -> Layout:
        """Lay the picture out anew, with changes to its design."""
        shown = self.picture.shown
        design = replace(shown.design, **changes)
        before, _, _ = self.picture.sheet_for(None)
        if design == shown.design:
            return before.layout
        self.picture.shown = replace(shown, design=design)
        if self.natural:
            lines = (design.headline - shown.design.headline) + design.shape[0] * (
                design.headings - shown.design.headings
            )
            lines -= design.words.title is None and shown.design.words.title is not None
            height = before.layout.size[1] + math.ceil(lines * LINE * before.layout.em)
            self.set_figheight(inches(height, self.dpi))
        sheet, _, _ = self.picture.sheet_for(None)
        return sheet.layout

    def tight_layout(self, **_kwargs: Any) -> None:
        """Do nothing: the picture has its place for everything."""

    def savefig(
        self, fname: str | Path | IO[bytes] | Any, *, transparent: bool | None = None, **kwargs: Any
    ) -> None:
        """Save as `matplotlib.figure.Figure.savefig` does.

        PNG is compressed fast. PNG and SVG carry the data that they show, which
        `pytest_attnheat.read_heatmaps` returns.
        """
        suffix = Path(fname).suffix[1:] if isinstance(fname, (str, Path)) else ""
        kind = kwargs.get("format") or suffix or str(matplotlib.rcParams["savefig.format"])
        kind = kind.lower()
        if kind == "png":
            options = kwargs.get("pil_kwargs") or {}
            kwargs["pil_kwargs"] = {"compress_level": _PNG_LEVEL, **options}
        if kind in ("png", "svg"):
            carried = metadata_of(encode(self.picture.shown), kind)
            kwargs["metadata"] = {**carried, **(kwargs.get("metadata") or {})}
        # "auto" is the figure's own white, whatever the user's settings ask for.
        kwargs.setdefault("facecolor", "auto")
        self._frozen = True
        try:
            super().savefig(fname, transparent=transparent, **kwargs)
        finally:
            self._frozen = False

    def _repr_svg_(self) -> str:
        """Show the figure in a notebook, crisp at any zoom."""
        return self._saved("svg").decode("utf-8")

    def _repr_png_(self) -> bytes:
        """Show it where no SVG can be shown."""
        return self._saved("png")

    def _saved(self, kind: str) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format=kind)
        return file.getvalue()


class _Bare(Axis):
    """An axis that makes no ticks while its Axes is made: they take half of the time."""

    axes: PanelAxes

    def set_tick_params(self, *args: Any, **kwargs: Any) -> None:
        if self.axes.made:
            super().set_tick_params(*args, **kwargs)

    def set_clip_path(self, *args: Any, **kwargs: Any) -> None:
        if self.axes.made:
            super().set_clip_path(*args, **kwargs)


class _BareX(_Bare, XAxis): ...


class _BareY(_Bare, YAxis): ...


class PanelAxes(Axes):
    """An invisible axes over a panel, in the coordinates of its keys and queries."""

    made = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.made = True

    def _init_axis(self) -> None:  # where matplotlib has its projections make their own
        super()._init_axis()  # type: ignore[misc]
        self.xaxis.__class__, self.yaxis.__class__ = _BareX, _BareY

    def set_title(
        self,
        label: str,
        fontdict: dict[str, Any] | None = None,
        loc: Literal["left", "center", "right"] | None = None,
        pad: float | None = None,
        **kwargs: Any,
    ) -> Text:
        """Write a title above the panel, in a line that is left free for it."""
        figure = self.figure
        if isinstance(figure, HeatmapFigure):
            em = figure.make_room(headings=True).em * 72 / figure.dpi
            ranges = figure.picture.shown.design.ranges
            pad = (PAD + ranges * SMALL * LINE) * em if pad is None else pad
            kwargs = {"fontsize": em, **(fontdict or {}), **normalize_kwargs(kwargs, Text)}
        text = super().set_title(label, None, loc, pad, **kwargs)
        if isinstance(figure, HeatmapFigure):
            figure.colour_by_background(text, kwargs)
        return text
