"""The error that a broken claim about rows raises: a message, and a picture on request."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pytest_attnheat.assertions.findings import ROWS, Finding, Lines, blocks
from pytest_attnheat.assertions.scan import mask_at
from pytest_attnheat.inputs import Operand

if TYPE_CHECKING:
    from pytest_attnheat.heatmaps.figure import HeatmapFigure

# More outlines would cover the map that they are to explain.
_MOST_MARKED = 32


class BrokenRowsError(AssertionError):
    """Rows that are not what was claimed.

    The picture is only drawn when somebody asks: under pytest, the plugin does.
    """

    def __init__(
        self,
        message: str,
        weights: Operand,
        mask: Operand | None,
        finding: Finding,
        lines: Lines = ROWS,
    ) -> None:
        super().__init__(message)
        # Of the map alone, so that a kept error does not keep more than it needs.
        self._map = _map_at(weights, finding)
        self._mask = None if mask is None else _map_at(mask, finding)
        self._finding = finding
        self._lines = lines

    def draw_heatmap(self) -> HeatmapFigure:
        """Draw the map with the worst row, its broken rows outlined."""
        from pytest_attnheat.heatmaps.figure import show_heatmaps

        across, down = ("Keys", "Queries")[:: -1 if self._lines.transposed else 1]
        worst = self._finding.worst[-1]
        marked = [worst, *(row for row in self._broken() if row != worst)][:_MOST_MARKED]
        broken = f"{self._finding.broken} of {self._finding.regarded}"
        return show_heatmaps(
            self._map,
            xlabel=across,
            ylabel=down,
            figsize=None,
            mask=self._mask,
            title=f"{broken} {self._finding.claim.statement}",
            highlight=[(0, 0, row) for row in marked],
        )

    def _broken(self) -> list[int]:
        broken: list[int] = []
        for block in blocks(self._map, self._mask):
            breaks = self._finding.claim.breaks(block).nonzero().flatten().tolist()
            broken += [block.rows[0].start + row for row in breaks]
            if len(broken) >= _MOST_MARKED:
                break
        return broken


def _map_at(operand: Operand, finding: Finding) -> torch.Tensor:
    """Return the map that holds the worst row."""
    place = (slice(i, i + 1) for i in finding.worst[:-1])
    part = mask_at(operand, (*place, slice(None), slice(None)))
    return part.detach().reshape(part.shape[-2:])
