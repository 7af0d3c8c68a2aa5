"""Claims about rows, and what a reading of the weights finds out about them.

A passing assertion asks only whether any row breaks a claim, which makes one
wait for the device. A failing one reads again, to count and to find the worst.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from pytest_attnheat.assertions.scan import Block, piece_elements
from pytest_attnheat.attention.chunks import index_within, pieces
from pytest_attnheat.inputs import Operand

# A failing reading holds a dozen numbers per row; rows of few keys would make many of them.
_ROWS = 2**17


@dataclass(frozen=True)
class Claim:
    """Something that an assertion says of every row.

    Attributes:
        statement: What broken rows do, for instance "rows do not sum to 1".
        kind: One word that tells which likely causes to look for.
        regards: Which rows it is about, a boolean per row.
        value: What is measured, a number per row.
        deviation: How far each row is from what is claimed; NaN breaks it.
        allowed: The largest deviation that is accepted.
        verb: What comes before the worst value in a message: "sums to".
        unit: What comes after a value in a picture, for instance "nats".
    """

    statement: str
    kind: str
    regards: Callable[[Block], torch.Tensor]
    value: Callable[[Block], torch.Tensor]
    deviation: Callable[[Block], torch.Tensor]
    allowed: float
    verb: str
    unit: str = ""

    def breach(self, block: Block) -> torch.Tensor:
        """Return the deviation of the rows that the claim is about, 0 elsewhere."""
        deviation = self.deviation(block)
        return torch.where(self.regards(block), deviation, torch.zeros_like(deviation))

    def breaks(self, block: Block) -> torch.Tensor:
        """Return which rows break the claim."""
        return ~(self.breach(block) <= self.allowed)


def blocks(weights: Operand, mask: Operand | None) -> Iterator[Block]:
    """Yield all rows, in blocks of bounded size."""
    limit = max(1, min(_ROWS, piece_elements(weights) // weights.shape[-1]))
    for rows in pieces(weights.shape[:-1], limit):
        yield Block(weights, mask, rows)


def first_broken(weights: Operand, mask: Operand | None, claims: Sequence[Claim]) -> Claim | None:
    """Return the first claim that some row breaks, waiting for the device once."""
    broken = torch.zeros(len(claims), dtype=torch.bool, device=weights.device)
    for block in blocks(weights, mask):
        broken |= torch.stack([claim.breaks(block).any() for claim in claims])
    return next(
        (c for c, is_broken in zip(claims, broken.tolist(), strict=True) if is_broken), None
    )


@dataclass
class Finding:
    """What the thorough reading found about a broken claim.

    Attributes:
        claim: The claim.
        regarded: How many rows it is about.
        broken: How many of them break it.
        zeros: How many broken rows have the value 0.
        nans: How many broken rows have the value NaN.
        first_nan: The first row with the value NaN.
        worst: The row that is farthest off, the first with NaN if there is one.
        value: Its value.
        deviation: Its deviation.
    """

    claim: Claim
    regarded: int = 0
    broken: int = 0
    zeros: int = 0
    nans: int = 0
    first_nan: tuple[int, ...] | None = None
    worst: tuple[int, ...] = ()
    value: float = 0.0
    deviation: float = -1.0


def find(weights: Operand, mask: Operand | None, claim: Claim) -> Finding:
    """Read all rows again, count those that break the claim and find the worst."""
    finding = Finding(claim)
    for block in blocks(weights, mask):
        _add(finding, block)
    return finding


def _add(finding: Finding, block: Block) -> None:
    breaks = finding.claim.breaks(block)
    finding.regarded += int(finding.claim.regards(block).sum())
    if not bool(breaks.any()):
        return
    value = finding.claim.value(block)
    nan = value.isnan() & breaks
    finding.broken += int(breaks.sum())
    finding.zeros += int(((value == 0) & breaks).sum())
    finding.nans += int(nan.sum())
    if finding.first_nan is None and bool(nan.any()):
        finding.first_nan = index_within(block.rows, nan.flatten().int().argmax())
    breach = finding.claim.breach(block).nan_to_num(nan=torch.inf, posinf=torch.inf)
    at = int(breach.flatten().argmax())
    deviation = float(breach.flatten()[at])
    if deviation > finding.deviation:
        finding.deviation = deviation
        finding.value = float(value.flatten()[at])
        finding.worst = index_within(block.rows, at)


@dataclass(frozen=True)
class Lines:
    """What the rows that were read are, in the caller's tensor.

    Attributes:
        transposed: Whether they are its columns.
        letter: What comes before the number of one of them.
        across: What they run over.
    """

    transposed: bool
    letter: str
    across: str

    def name(self, index: tuple[int, ...]) -> str:
        """Return one of them as an index into the caller's tensor."""
        *place, number = map(str, index)
        inner = [":", number] if self.transposed else [number, ":"]
        return f"weights[{', '.join([*place, *inner])}]"


ROWS = Lines(transposed=False, letter="q", across="keys")
COLUMNS = Lines(transposed=True, letter="k", across="queries")
