"""The failure of a claim about rows or weights, with a small picture and a full one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from ..attention.boxes import as_lazy
from ..attention.placed import as_placed
from ..failure import Failure, exponent
from ..heatmaps.terminal import format_heatmap, map_name
from .claims import Claim, Finding, Index, by_row
from .scan import Block, blocks, mask_at

if TYPE_CHECKING:
    from ..heatmaps.figure import HeatmapFigure

# A small picture shows the worst row and its neighbours.
_ROWS_SHOWN = 6
# Of the numbers beside it.
_LEAST_DECIMALS, _MOST_DECIMALS = 3, 6
# More outlines would cover the map that they are to explain.
_MOST_MARKED = 32
# Of a map that is too large to be seen whole, so many rows and keys around the worst are drawn.
_NEIGHBOURS = 64


def failure(
    assertion: str, weights: Tensor, mask: Tensor | None, finding: Finding[Any], cause: str | None
) -> Failure:
    """Return the failure of a claim about rows or weights, with its pictures."""
    # `weights` as they were read: transposed where the claim is about columns.
    of_rows = len(finding.worst.index) < weights.ndim
    claim: Claim[Block] = finding.claim if of_rows else by_row(finding.claim)
    row = finding.worst.index[: weights.ndim - 1]
    # All ranks would have to draw a map that lies on several.
    draw = (
        None
        if as_placed(weights)
        else partial(
            _draw,
            # Of the map alone, so that a kept failure does not keep more than it needs.
            _map_at(weights, row),
            None if mask is None else _map_at(mask, row),
            claim,
            finding.worst.index[weights.ndim - 2 :],
            f"{finding.broken} of {finding.of} {claim.statement}",
        )
    )
    return finding.failure(
        assertion, weights.mT if claim.lines.transposed else weights, cause,
        names_first=not of_rows, picture=_small_picture(weights, mask, claim, row), draw=draw,
    )  # fmt: skip


def _small_picture(weights: Tensor, mask: Tensor | None, claim: Claim[Block], row: Index) -> str:
    """Return a small heatmap of a row and its neighbours, the broken ones pointed at."""
    *place, number = row
    window = _around(number, weights.shape[-2], _ROWS_SHOWN)
    block = Block(weights, mask, (*(slice(i, i + 1) for i in place), window))
    breaks = claim.breaks(block).flatten().tolist()
    return format_heatmap(
        _rows_at(weights, place, window),
        mask=None if mask is None else _rows_at(mask, place, window), first_row=window.start,
        marked=[window.start + i for i, broken in enumerate(breaks) if broken],
        notes=_notes(claim, block), row_name=claim.lines.letter, column_name=claim.lines.across,
        title=map_name(tuple(place)),
    )  # fmt: skip


def _notes(claim: Claim[Block], block: Block) -> list[str] | None:
    """Return what stands beside the rows of a picture, None for the plain sums."""
    # With as many decimals as it takes to see that the broken rows are broken.
    if claim.kind not in ("sum", "entropy"):
        return None
    off = claim.deviation(block)[claim.breaks(block)]
    differences = [number for number in off.tolist() if math.isfinite(number)]
    decimals = max((-exponent(number) for number in differences), default=0)
    decimals = min(max(decimals, _LEAST_DECIMALS), _MOST_DECIMALS)
    values = claim.value(block).flatten().tolist()
    return [f"{value:.{decimals}f} {claim.unit}".rstrip() for value in values]


def _draw(
    weights: Tensor, mask: Tensor | None, claim: Claim[Block], worst: Index, title: str
) -> HeatmapFigure:
    """Draw a map with its broken rows outlined, the worst among them."""
    # Of a large one the neighbourhood of the worst row and key alone, whose numbers are its labels:
    # no more is read, and a weight among so many would not be seen. `worst` is a row, or a row and
    # a key; where no key is worst, all are shown.
    from ..heatmaps.maps import HELD
    from ..heatmaps.showing import show_heatmaps

    names = ("queries", "keys")[:: -1 if claim.lines.transposed else 1]
    shown = [slice(0, size) for size in weights.shape]
    labels: list[list[str] | None] = [None, None]
    if weights.shape.numel() > HELD:
        for axis, at in enumerate(worst):
            here = shown[axis] = _around(at, weights.shape[axis], _NEIGHBOURS)
            labels[axis] = [str(number) for number in range(here.start, here.stop)]
            of = f"{names[axis]} {here.start}..{here.stop - 1} of {weights.shape[axis]}"
            title += f"{', ' if axis else '; shown: '}{of}"
        weights_shown, mask_shown = weights[tuple(shown)], _part(mask, shown)
    else:
        weights_shown, mask_shown = weights, mask
    others = (row for row in _broken(weights, mask, claim, shown[0]) if row != worst[0])
    marked = [worst[0], *islice(others, _MOST_MARKED - 1)]
    return show_heatmaps(
        weights_shown,
        xlabel=names[1].capitalize(),
        ylabel=names[0].capitalize(),
        figsize=None,
        mask=mask_shown,
        title=title,
        query_labels=labels[0],
        key_labels=labels[1],
        scale="largest",  # of many keys, each has little
        highlight=[(0, 0, row - shown[0].start) for row in marked],
    )


def _around(at: int, size: int, count: int) -> slice:
    """Return so many neighbours, fewer where there are no more."""
    first = max(0, min(at - count // 2, size - count))
    return slice(first, min(first + count, size))


def _part(mask: Tensor | None, shown: list[slice]) -> Tensor | None:
    return None if mask is None else mask_at(mask, tuple(shown))


def _broken(
    weights: Tensor, mask: Tensor | None, claim: Claim[Block], rows: slice
) -> Iterator[int]:
    """Yield the rows of a map that break a claim, of those that are shown."""
    some = rows.stop - rows.start < weights.shape[0]
    for block in [Block(weights, mask, (rows,))] if some else blocks(weights, mask):
        breaks = claim.breaks(block).nonzero().flatten().tolist()
        yield from (block.index[0].start + row for row in breaks)


def _rows_at(operand: Tensor, place: Sequence[int], rows: slice) -> Tensor:
    """Look at some rows of one map of the weights, or of their mask; nothing is copied."""
    own = (0 if size == 1 else i for size, i in zip(operand.shape, place, strict=False))
    index = (*own, rows if operand.shape[-2] > 1 else slice(0, 1))
    return operand[index]


def _map_at(operand: Tensor, row: Index) -> Tensor:
    if (lazy := as_lazy(operand)) is not None:
        sizes = zip(operand.shape[:-2], row, strict=False)
        return cast("Tensor", lazy.map_at([0 if size == 1 else at for size, at in sizes]))
    box = (slice(i, i + 1) for i in row[:-1])
    part = mask_at(operand, (*box, slice(None), slice(None)))
    return part.detach().reshape(part.shape[-2:])
