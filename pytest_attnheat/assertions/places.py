"""Claims about single weights, and what a reading of the weights finds out about them.

They are read as claims about rows are: a passing assertion asks only whether
any row holds a broken place, which makes one wait for the device. A failing
one reads again, to count places and to find the worst and the first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch

from pytest_attnheat.assertions.broken_rows import build_message, picture_of
from pytest_attnheat.assertions.failure import BrokenRowsError
from pytest_attnheat.assertions.findings import Claim, Finding
from pytest_attnheat.assertions.scan import Block, any_key, mask_at, piece_elements
from pytest_attnheat.attention.chunks import index_within, pieces
from pytest_attnheat.inputs import Operand, wide_dtype

Measure = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class PlaceClaim:
    """Something that an assertion says of every permitted, or of every masked, weight.

    Attributes:
        statement: What broken weights are: "masked weights are not zero".
        kind: One word that tells which likely causes to look for.
        permitted: Whether it is about the permitted weights, or the masked.
        every_row: Whether it is also about fully masked rows.
        breaks: Which of some weights break it, a boolean each.
        breach: How badly, for weights that break it; NaN is worst.
    """

    statement: str
    kind: str
    permitted: bool
    every_row: bool
    breaks: Measure
    breach: Measure

    def regards(self, permitted: torch.Tensor) -> torch.Tensor:
        """Return which places it is about, fully masked rows aside."""
        return permitted if self.permitted else ~permitted

    def by_row(self) -> Claim:
        """Return the claim that a row holds no broken place."""

        def broken(block: Block) -> torch.Tensor:
            def broken_part(values: torch.Tensor, keys: slice) -> torch.Tensor:
                permitted = cast("torch.Tensor", block.permitted(keys))
                return any_key(self.breaks(values) & self.regards(permitted))

            return block.reduce(broken_part, torch.logical_or)

        def every(block: Block) -> torch.Tensor:
            return block.attends | self.every_row

        return Claim(self.statement, self.kind, every, broken, broken, 0.0, "")


def masked_is_zero(*, every_row: bool) -> PlaceClaim:
    """Claim that masked keys hold exactly zero: no rounding makes weight where there is none."""
    return PlaceClaim(
        statement="masked weights are not zero",
        kind="outside",
        permitted=False,
        every_row=every_row,
        breaks=lambda values: values != 0,
        breach=torch.abs,
    )


def permitted_is_positive() -> PlaceClaim:
    """Claim that permitted keys hold weight; a negative one is worse than none."""
    return PlaceClaim(
        statement="permitted weights are not positive",
        kind="inside",
        permitted=True,
        every_row=True,
        breaks=lambda values: ~(values > 0),
        breach=lambda values: 1 - values,
    )


@dataclass
class PlaceFinding:
    """What the thorough reading found about a broken claim.

    Attributes:
        claim: The claim.
        maps: Which maps hold a broken place, of the leading shape.
        regarded: How many weights it is about.
        broken: How many of them break it.
        attending: How many of those are in rows with a permitted key.
        worst: The weight that breaks it worst, the first NaN if there is one.
        value: That weight.
        first: The first weight that breaks it.
        first_value: That weight.
    """

    claim: PlaceClaim
    maps: torch.Tensor
    regarded: int = 0
    broken: int = 0
    attending: int = 0
    worst: tuple[int, ...] = ()
    value: float = 0.0
    breach: float = -1.0
    first: tuple[int, ...] = ()
    first_value: float = 0.0


def find_places(weights: Operand, mask: Operand, claim: PlaceClaim) -> PlaceFinding:
    """Read all weights again, count those that break the claim, find the worst and the first."""
    maps = torch.zeros(weights.shape[:-2], dtype=torch.bool, device=weights.device)
    finding = PlaceFinding(claim, maps)
    for index in pieces(weights.shape, piece_elements(weights)):
        _add(finding, weights, mask, index)
    return finding


def _add(finding: PlaceFinding, weights: Operand, mask: Operand, index: tuple[slice, ...]) -> None:
    claim = finding.claim
    values = weights[index].to(wide_dtype(weights.dtype))
    every_key = (*index[:-1], slice(0, weights.shape[-1]))
    attends = any_key(mask_at(mask, every_key).to(values.device)).unsqueeze(-1)
    regards = claim.regards(mask_at(mask, index).to(values.device)).expand(values.shape)
    if not claim.every_row:
        regards = regards & attends
    finding.regarded += int(regards.sum())
    broken = regards & claim.breaks(values)
    if not bool(broken.any()):
        return
    finding.maps[index[:-2]] |= broken.any(-1).any(-1)
    finding.broken += int(broken.sum())
    finding.attending += int((broken & attends).sum())
    if not finding.first:
        at = int(broken.flatten().int().argmax())
        finding.first, finding.first_value = index_within(index, at), float(values.flatten()[at])
    breach = claim.breach(values).nan_to_num(nan=torch.inf, posinf=torch.finfo(values.dtype).max)
    at = int(breach.masked_fill_(~broken, -1).flatten().argmax())
    if float(breach.flatten()[at]) > finding.breach:
        finding.breach = float(breach.flatten()[at])
        finding.worst, finding.value = index_within(index, at), float(values.flatten()[at])


def broken_weights(
    message: str, weights: Operand, mask: Operand, finding: PlaceFinding
) -> BrokenRowsError:
    """Return the error to raise; its picture outlines the rows that hold broken weights."""
    return BrokenRowsError(message, weights, mask, _rows_of(finding))


def place_message(
    assertion: str,
    weights: Operand,
    mask: Operand,
    finding: PlaceFinding,
    *,
    describe: Callable[[tuple[int, ...], float], str],
    cause: str | None,
) -> str:
    """Return the message about a claim that some weights break.

    Args:
        assertion: The name of the assertion.
        weights: What was checked.
        mask: Its mask.
        finding: What the thorough reading found.
        describe: Says of a place and its weight what is wrong there.
        cause: A likely cause, None where the numbers show none.
    """
    first = describe(finding.first, finding.first_value)
    return build_message(
        assertion,
        f"{finding.broken} of {finding.regarded} {finding.claim.statement}",
        weights,
        worst=describe(finding.worst, finding.value),
        first=None if finding.first == finding.worst else first,
        cause=cause,
        picture=picture_of(weights, mask, _rows_of(finding)),
    )


def _rows_of(finding: PlaceFinding) -> Finding:
    """The same of the rows that hold broken weights."""
    return Finding(
        finding.claim.by_row(), finding.regarded, finding.broken, worst=finding.worst[:-1]
    )
