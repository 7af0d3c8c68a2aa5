"""Two maps and how far they are apart: what a failed comparison draws, for anybody."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from pytest_attnheat.heatmaps.colors import Scale, shared_scale
from pytest_attnheat.heatmaps.figure import HeatmapFigure
from pytest_attnheat.heatmaps.maps import Bools, distance, read_maps
from pytest_attnheat.heatmaps.picture import Picture, Shown
from pytest_attnheat.heatmaps.showing import show_heatmaps
from pytest_attnheat.inputs import misuse

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
        "xlabel": axes[1],
        "ylabel": axes[0],
        "titles": ["expected", "actual", "difference"],
        "title": title,
        "figsize": None,
        "mask": np.stack([*masks, either]),
        "highlight": [] if worst is None else [(0, number, *worst) for number in range(3)],
    }
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
