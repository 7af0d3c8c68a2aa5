"""`show_heatmaps`, from what a user gives to a figure; and `show_difference`, of two maps."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, Literal

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap
from matplotlib.figure import SubFigure

from ..inputs import check_number, misuse, one_of
from .colors import Scale, panel_scales, shared_scale
from .figure import HeatmapFigure
from .layout import inches
from .maps import Bools, Maps, distance, has_both_signs, pool, read_maps, smallest
from .picture import Picture, Shown
from .record import MOST_CELLS
from .survey import survey, whole_of
from .writing import Design, Words

# What the textbook's function has by default. Who gives the same numbers gets them: it is told by
# identity, and no constant, which some Pythons share between modules.
_TEXTBOOK: tuple[float, float] = (float("2.5"), 2.5)
# Where a panel would be thinner in such a figure (inches), there is a better size.
_THIN = 0.2
# Figures of more pixels a side take gigabytes.
_LONGEST_SIDE = 1 << 13
# More numbers take minutes to write, and nobody reads them.
_MOST_NUMBERS = 10_000


def show_heatmaps(
    matrices: object,
    xlabel: str | None,
    ylabel: str | None,
    titles: Sequence[str] | None = None,
    figsize: tuple[float, float] | Literal["small"] | None = _TEXTBOOK,
    cmap: str | Colormap = "Reds",
    *,
    title: str | None = None,
    row_titles: Sequence[str] | None = None,
    key_labels: Sequence[str] | None = None,
    query_labels: Sequence[str] | None = None,
    mask: object = None,
    scale: Literal["shared", "largest", "panel"] = "shared",
    vmin: float | None = None,
    vmax: float | None = None,
    colorbar: bool = True,
    numbers: bool | str = False,
    highlight: Sequence[Sequence[int]] = (),
    dpi: float | None = None,
    ax: Axes | SubFigure | None = None,
) -> HeatmapFigure:
    """Draw attention weights as a grid of heatmaps.

    Every cell is a whole number of pixels. Maps with more weights than the figure has pixels
    are pooled in whole blocks to their largest weight, on their own device, and the figure says
    so: a single weight of 1 among millions of zeros stays visible. Of signed values, such as
    differences, the one farthest from zero is kept.

    Args:
        matrices: Weights (queries, keys), (columns, queries, keys) or (rows, columns, queries,
            keys): a tensor of any real dtype, device and gradient state, a NumPy array, or
            nested lists of equal maps. Usually rows are layers or samples and columns heads:
            `outputs.attentions` of a model, a tuple of (1, heads, queries, keys), is drawn so,
            with titles "Layer 0" and "Head 0" unless others are given.
            NaN is drawn blue; -inf, as in masked scores, like a masked cell.
        xlabel: Name of the key axis; None for none.
        ylabel: Name of the query axis; None for none.
        titles: One title for each column.
        figsize: Width and height of the whole figure in inches; None for a size at which all
            cells and labels have room; "small" for one with small panels, for many of them. By
            default the textbook's (2.5, 2.5) for one map without labels and numbers, unless it
            is a thin line then; else None.
        cmap: A matplotlib colormap or its name.
        title: A title for the figure.
        row_titles: One title for each row.
        key_labels: One label for each key, for example its token. Any script; what no installed
            font can draw is written as an escape.
        query_labels: One label for each query.
        mask: Boolean, True where a query may attend; broadcast to the maps. Cells where it may
            not are striped grey, whatever their weight.
        scale: "shared" for one colour scale for all panels, 0 to 1 where all values are in that
            range and else from the smallest to the largest; "largest" for a shared one that ends
            at the largest value, where weights are all small; "panel" for one scale a panel, its
            range written above it.
        vmin: Lower end of the shared scale.
        vmax: Upper end of the shared scale.
        colorbar: Whether to draw the colour scale.
        numbers: True to write each weight into its cell, or a format such as ".1f" (the default
            is ".2f").
        highlight: What to outline: (row, column, query, key) for a cell, without the key for
            a whole query; row and column are 0 where the maps have fewer dimensions.
        dpi: Pixels per inch; matplotlib's `figure.dpi` by default.
        ax: An Axes or a subfigure to fill with the picture as well, in place of its axis; size and
            resolution are those that it has.

    Returns:
        The figure, whether `ax` shows it too or not. No window opens and pyplot does not know it.

    Raises:
        TypeError: Something other than real numbers, or a mask that is not boolean.
        ValueError: Nothing to show, shapes that do not fit together, or a figure too small.
    """
    __tracebackhide__ = True
    maps = read_maps(matrices, mask)
    if maps.layered:
        titles = _numbered("Head", maps.shape[1]) if titles is None else titles
        row_titles = _numbered("Layer", maps.shape[0]) if row_titles is None else row_titles
    words = Words(
        xlabel=xlabel,
        ylabel=ylabel,
        title=title,
        titles=_texts("titles", titles, maps.shape[1], "columns"),
        row_titles=_texts("row_titles", row_titles, maps.shape[0], "rows"),
        key_labels=_texts("key_labels", key_labels, maps.shape[3], "keys"),
        query_labels=_texts("query_labels", query_labels, maps.shape[2], "queries"),
        numbers=_number_format(numbers),
    )
    one_of("scale", scale, ("shared", "largest", "panel"))
    if scale == "panel" and not (vmin is None and vmax is None):
        got = f"{vmin!r} and {vmax!r} with scale='panel'"
        raise ValueError(misuse("vmin, vmax", got, "None for both; they belong to scale='shared'"))
    if not isinstance(cmap, Colormap) and cmap not in list(matplotlib.colormaps):
        raise ValueError(misuse("cmap", repr(cmap), "a Colormap, or the name of one"))
    if words.numbers and math.prod(maps.shape) > _MOST_NUMBERS:
        got = f"{numbers!r} for {math.prod(maps.shape)} cells"
        raise ValueError(misuse("numbers", got, f"False for more than {_MOST_NUMBERS} cells"))
    if colorbar not in (True, False):
        raise TypeError(misuse("colorbar", repr(colorbar), "True or False"))
    if dpi is not None and not check_number(dpi, "dpi") > 0:
        raise ValueError(misuse("dpi", repr(dpi), "a number above 0"))
    if ax is not None and not isinstance(ax, (Axes, SubFigure)):
        raise TypeError(misuse("ax", repr(ax), "an Axes or a SubFigure of matplotlib"))
    if ax is not None:
        dpi = ax.figure.dpi
        figsize = (ax.bbox.width / dpi, ax.bbox.height / dpi)
    outlined = [_checked_index(index, maps.shape) for index in _listed("highlight", highlight)]
    design = Design(maps.shape, words, colorbar, ranges=scale == "panel")
    if figsize is _TEXTBOOK and not _fits_the_textbook(design):
        figsize = None
    # Always on white, as the colours are made for it: a dark style would hide the texts.
    figure = HeatmapFigure(dpi=dpi, facecolor="white")
    FigureCanvasAgg(figure)  # so that its pixels can be asked for without saving it
    # An engine that the user's settings ask for has nothing to lay out here.
    figure.set_layout_engine("none")
    size = _size(figsize, design, maps, figure.dpi)
    figure.set_size_inches((inches(size[0], figure.dpi), inches(size[1], figure.dpi)))
    block = design.block_for(size, figure.dpi)
    found = survey(maps, block)
    cells = pool(maps, block) if found is None else found.cells
    positive = vmin is not None and vmax is not None and vmin >= 0
    low = 0.0 if positive else smallest(maps, cells) if found is None else found.low
    scales = shared_scale(cells, low, vmin, vmax, tight=scale == "largest")
    if has_both_signs(cells, low):
        cells = pool(maps, block, signed=True) if found is None else found.signed
    if scale == "panel":
        scales = panel_scales(cells)
    complete = cells.block == (1, 1) and cells.values.size <= MOST_CELLS
    whole = None if complete else whole_of(maps) if found is None else found.whole
    shown = Shown(design, cells, scales, cmap, outlined, maps.dtype, whole)
    figure.picture = Picture(shown, figure)
    figure.add_artist(figure.picture)
    figure.natural = figsize is None or isinstance(figsize, str)
    figure.picture.prepare(size, figure.dpi)
    if ax is not None:
        if isinstance(ax, Axes):
            ax.set_axis_off()
        ax.add_artist(Picture(shown, ax))
    return figure


def _numbered(name: str, count: int) -> list[str]:
    return [f"{name} {number}" for number in range(count)]


def _listed(name: str, given: Iterable[Any]) -> list[Any]:
    if not isinstance(given, Iterable):
        raise TypeError(misuse(name, repr(given), "a list"))
    return list(given)


def _texts(name: str, texts: Sequence[str] | None, count: int, what: str) -> Sequence[str] | None:
    if texts is None:
        return None
    given = [texts] if isinstance(texts, str) else [str(text) for text in _listed(name, texts)]
    if len(given) != count:
        accepted = f"as many as there are {what}: {count}"
        raise ValueError(misuse(name, f"{len(given)} text(s)", accepted))
    return given


def _number_format(numbers: bool | str) -> str | None:
    if numbers is False:
        return None
    spec = ".2f" if numbers is True else numbers
    try:
        format(0.5, spec)
    except (TypeError, ValueError):
        accepted = "True, False or a format of floats such as '.1f'"
        raise ValueError(misuse("numbers", repr(numbers), accepted)) from None
    return spec


def _checked_index(given: Sequence[int], shape: tuple[int, int, int, int]) -> tuple[int, ...]:
    try:
        indices = tuple(operator.index(index) for index in given)
    except TypeError:
        indices = ()
    inside = all(-side <= index < side for index, side in zip(indices, shape, strict=False))
    if len(indices) not in (3, 4) or not inside:
        accepted = (
            "(row, column, query, key) for a cell or (row, column, query) for a whole query, "
            f"within the shape {shape}"
        )
        raise ValueError(misuse("highlight", repr(given), accepted))
    return tuple(index % side for index, side in zip(indices, shape, strict=False))


def _fits_the_textbook(design: Design) -> bool:
    """Tell whether a figure of the textbook's size shows what there is to see."""
    words, dpi = design.words, 100
    if design.shape[:2] != (1, 1) or words.keys or words.queries or words.numbers:
        return False
    size = int(_TEXTBOOK[0] * dpi), int(_TEXTBOOK[1] * dpi)
    layout, _ = design.plan(design.shape[2:], size, dpi, notes=0)
    return min(layout.panel) >= _THIN * dpi


def _size(
    figsize: tuple[float, float] | Literal["small"] | None, design: Design, maps: Maps, dpi: float
) -> tuple[int, int]:
    if figsize is None or (isinstance(figsize, str) and figsize == "small"):
        width = _number_width(design.words, maps)
        return design.natural_size(dpi, width, small=figsize is not None)
    try:
        sides = tuple(float(side) for side in figsize)
    except (TypeError, ValueError):
        sides = ()
    if len(sides) != 2 or not all(0 < side * dpi < math.inf for side in sides):
        accepted = "(width, height) in inches, None for a size that fits, or 'small'"
        raise ValueError(misuse("figsize", repr(figsize), accepted))
    # Inches such as 2.9 are a hair less than 290 pixels.
    size = int(sides[0] * dpi + 1e-6), int(sides[1] * dpi + 1e-6)
    if max(size) >= _LONGEST_SIDE:
        got = f"{figsize} at {dpi:g} dots per inch, which is {size[0]} x {size[1]} pixels"
        raise ValueError(misuse("figsize", got, f"less than {_LONGEST_SIDE} pixels a side"))
    return size


def _number_width(words: Words, maps: Maps) -> float:
    if words.numbers is None:
        return 0.0
    values = pool(maps, (1, 1)).values
    return max(words.lettering.width(words.number(float(value))) for value in values.ravel())


Map = npt.NDArray[Any]  # (queries, keys)


def show_difference(
    expected: object, actual: object, *, mask: object = None, **options: Any
) -> HeatmapFigure:
    """Draw two maps and how far they are apart, side by side.

    Both maps have one scale, which ends at the largest weight. The difference has its own, from 0
    to the largest, so that a small one is seen, too; the ranges stand above the panels. Of grids
    of maps, the one is drawn that differs most. The largest difference is outlined, and the title
    says where it is.

    Args:
        expected: Weights, of a kind and shape that `show_heatmaps` takes.
        actual: Others of the same shape, of any kind.
        mask: Boolean, True where a query may attend. Where it may not is striped, and not compared.
        **options: Further arguments of `show_heatmaps`: `figsize`, `key_labels` ... `vmin` and
            `vmax` are those of both maps; a `scale` is that of all three panels.

    Raises:
        TypeError: Something other than real numbers, or a mask that is not boolean.
        ValueError: Nothing to show, or shapes that do not fit together.
    """
    __tracebackhide__ = True
    one, other = read_maps(expected, mask), read_maps(actual, mask)
    if one.shape != other.shape:
        raise ValueError(misuse("actual", f"shape {other.shape}", f"{one.shape}, as expected has"))
    most, worst = 0.0, (0, 0, 0, 0)
    for row, column in product(range(one.shape[0]), range(one.shape[1])):
        apart = distance(one.map(row, column), other.map(row, column))
        apart[~one.permitted(row, column)] = 0
        if apart.max() > most:
            most = float(apart.max())
            worst = (row, column, *divmod(int(apart.argmax()), one.shape[3]))
    row, column = worst[:2]
    pair = one.map(row, column), other.map(row, column)
    masks = [one.permitted(row, column)] * 2
    where = f"layer {row}, head {column}" if one.layered else f"panel [{row}, {column}]"
    panel = f"{where}: " if one.layered or one.shape[:2] != (1, 1) else ""
    return triptych(pair, masks, worst[2:] if most else None, panel=panel, **options)


def triptych(
    pair: tuple[Map, Map],  # The maps
    masks: Sequence[Bools],  # True where a query may attend, for each map
    worst: tuple[int, int] | None,  # The query and key that are outlined; None for none
    *,
    panel: str = "",  # What the title begins with
    block: tuple[int, int] = (1, 1),  # How many queries and keys each of theirs stands for
    **options: Any,  # As in `show_difference`
) -> HeatmapFigure:
    """Draw two maps and their difference, and say and outline where they differ most."""
    either = masks[0] | masks[1]
    apart = np.where(either, distance(*pair), 0)
    title = "no difference" if worst is None else panel + _said(apart, masks, worst, block)
    own = options.get("scale") is None
    limits = [options.pop(name, None) for name in ("vmin", "vmax")] if own else []
    axes = [
        f"{name} (cells of {size})" if size > 1 else name
        for name, size in zip(("Queries", "Keys"), block, strict=True)
    ]
    defaults: dict[str, Any] = {
        "xlabel": axes[1], "ylabel": axes[0], "titles": ["expected", "actual", "difference"],
        "title": title, "figsize": None, "mask": np.stack([*masks, either]),
        "highlight": [] if worst is None else [(0, number, *worst) for number in range(3)],
    }  # fmt: skip
    given = {**defaults, **options, **({"scale": "panel"} if own else {})}
    figure = show_heatmaps([*pair, apart], **given)
    if own:
        shown = figure.picture.shown
        shown = replace(shown, scale=_scale(shown, pair, masks, *limits))
        beside = [] if given.get("ax") is None else given["ax"].artists
        pictures = [artist for artist in beside if isinstance(artist, Picture)]
        for picture in (figure.picture, *pictures[-1:]):
            picture.shown = shown
    return figure


def _said(
    apart: npt.NDArray[np.float64],
    masks: Sequence[Bools],
    worst: tuple[int, int],
    block: tuple[int, int],
) -> str:
    query, key = (
        f"{number * size}..{(number + 1) * size - 1}" if size > 1 else str(number)
        for number, size in zip(worst, block, strict=True)
    )
    where = f"at query {query}, key {key}"
    if masks[0][worst] != masks[1][worst]:
        return f"one mask hides the weight {where}"
    if not apart.any():
        return f"no difference is seen in cells; most behind them {where}"
    if apart[worst] < apart.max():
        return f"difference {apart[worst]:.2g} {where}; largest {apart.max():.2g}"
    return f"largest difference {apart[worst]:.2g} {where}"


def _scale(
    shown: Shown, pair: tuple[Map, Map], masks: Sequence[Bools], low: Any, high: Any
) -> Scale:
    """Give both maps one range, and the difference its own from 0."""
    cells = shown.cells
    two = replace(cells, values=cells.values[:, :2], masked=cells.masked[:, :2])
    finite = [one[mask & np.isfinite(one)] for one, mask in zip(pair, masks, strict=True)]
    smallest = float(np.concatenate(finite).min(initial=np.inf))
    shared = shared_scale(two, smallest, low, high, tight=True)
    lows, highs = shown.scale.low.copy(), shown.scale.high.copy()
    lows[:, :2], highs[:, :2], lows[:, 2] = *shared.range, 0.0
    return Scale(lows, highs, shared=False)
