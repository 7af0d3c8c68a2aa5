"""What is claimed of weights, and the one way in which a claim is read.

A claim is made of every row, or of every element. It says which of them it is about, what is
measured there, how far that is from what is claimed, and how far it may be.

A passing assertion asks only whether anything breaks a claim, which makes one wait for the device
(`first_broken`). A failing one reads again, counts what breaks the claim and finds the worst and
the first (`find`), and says so (`Finding.failure`). All of it reads parts of bounded size: rows
as `Block`, weights as `Elements`, and whatever else has an index.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING, Generic, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

from ..attention.chunks import index_within
from ..attention.vocabulary import FullyMasked
from ..failure import Checked, Failure, Place, number_text
from .scan import Block, Elements, Parts, Where, any_key

if TYPE_CHECKING:
    from ..heatmaps.figure import HeatmapFigure

# How many last bits of what is off say nothing of which is worst.
_LAST_BITS = 6
Index: TypeAlias = tuple[int, ...]


class Part(Protocol):
    """Some of what a claim is made of."""

    @property
    def index(self) -> tuple[slice, ...]:
        """Where it is, in the tensor that is checked."""


P = TypeVar("P", bound=Part)


@dataclass(frozen=True)
class Lines:
    """What the rows that are read are, in the caller's tensor."""

    transposed: bool  # Whether they are its columns
    noun: str  # What they are called
    letter: str  # What comes before the number of one of them
    across: str  # What they run over

    def name(self, index: Index) -> str:
        """Return one of them as an index into the caller's tensor."""
        *place, number = map(str, index)
        inner = [":", number] if self.transposed else [number, ":"]
        return f"weights[{', '.join([*place, *inner])}]"


ROWS = Lines(transposed=False, noun="rows", letter="q", across="keys")
COLUMNS = Lines(transposed=True, noun="columns", letter="k", across="queries")


@dataclass(frozen=True)
class Spot:
    """A row or an element that breaks a claim, and the numbers there."""

    index: Index
    value: float
    deviation: float
    allowed: float
    text: str = ""


@dataclass(frozen=True)
class Claim(Generic[P]):
    """Something that an assertion says of every row, or of every element.

    The functions take a part, and return one number or boolean for each row or element of it.
    """

    statement: str  # What broken ones do, for instance "rows do not sum to 1"
    kind: str  # One word that tells which likely causes to look for
    regards: Callable[[P], Tensor]  # Which the claim is about
    value: Callable[[P], Tensor]  # What is measured
    deviation: Callable[[P], Tensor]  # How far each is from what is claimed; NaN breaks it
    allowed: float | Callable[[P], Tensor]  # The largest deviation that is accepted
    says: Callable[[P, Spot], str]  # What is said of one that breaks it, in this part
    given: Callable[[Index], Index] = tuple  # What its index is in the tensor as the caller has it
    lines: Lines = ROWS  # What the rows are, of a claim about rows
    unit: str = ""  # What comes after a value in a picture, for instance "nats"
    besides: Callable[[P], int] = lambda _: 0  # How many more, that keep it, are not read

    def limit(self, part: P) -> float | Tensor:
        """Return what is allowed in a part."""
        return self.allowed(part) if callable(self.allowed) else self.allowed

    def breaks(self, part: P) -> Tensor:
        """Return which of a part break the claim."""
        return self.regards(part) & ~(self.deviation(part) <= self.limit(part))

    def excess(self, part: P, breaks: Tensor) -> Tensor:
        """Return by how much each is further off than allowed, below 0 where it is not."""
        # NaN is worst, and infinity is worse than any number. What differs in its last bits is as
        # bad: in which order a row was added up does not decide which is worst.
        over = self.deviation(part) - self.limit(part)
        mantissa, exponent = torch.frexp(over)
        steps = 2.0**_LAST_BITS / torch.finfo(over.dtype).eps
        over = torch.ldexp((mantissa * steps).round() / steps, exponent)
        over = over.nan_to_num(nan=math.inf, posinf=torch.finfo(over.dtype).max)
        return over.masked_fill_(~breaks, -1)


def first_broken(parts: Iterable[P], claims: Sequence[Claim[P]]) -> Claim[P] | None:
    """Return the first claim that is broken anywhere, waiting for the device once."""
    found: Tensor | None = None
    placed = parts.placed if isinstance(parts, Parts) else None
    for part in parts:
        broken = torch.stack([claim.breaks(part).any() for claim in claims])
        found = broken if found is None else found.logical_or_(broken)
        # On a CPU there is nothing to wait for, and what is computed when it is read takes long.
        if placed is None and found.device.type == "cpu" and found[0]:
            break
    if placed is not None:
        found = placed.any_of(torch.zeros(len(claims)) if found is None else found)
    if found is None:
        return None
    at = int(torch.cat([found, found.new_ones(1)]).int().argmax())
    return claims[at] if at < len(claims) else None


@dataclass(frozen=True)
class Finding(Generic[P]):
    """What the thorough reading found about a broken claim."""

    claim: Claim[P]  # The claim
    of: int  # How many rows or elements it is about
    broken: int  # How many of them break it
    zeros: int  # How many broken ones have the value 0
    nans: int  # How many broken ones have the value NaN
    first_nan: Index | None  # The first of those
    worst: Spot  # The one that is farthest off, the first with NaN if there is one
    first: Spot  # The first one that is broken

    def failure(
        self,
        assertion: str,  # The name of the assertion
        checked: Tensor,  # What was checked, as the caller passed it
        cause: str | None,  # A likely cause, None where the numbers show none
        *,
        names_first: bool = True,  # Whether to name the first beside the worst
        picture: str = "",  # The small picture
        draw: Callable[[], HeatmapFigure] | None = None,  # Draws the full one
    ) -> Failure:
        """Return the failure to raise."""
        elsewhere = names_first and self.first.index != self.worst.index
        return Failure(
            assertion, self.claim.statement, broken=self.broken, of=self.of,
            worst=self._place(self.worst), first=self._place(self.first) if elsewhere else None,
            cause=cause, tensor=Checked.of(checked), tolerance=self.worst.allowed or None,
            picture=picture, draw=draw,
        )  # fmt: skip

    def _place(self, spot: Spot) -> Place:
        return Place(spot.text, self.claim.given(spot.index), spot.value)


def find(claim: Claim[P], parts: Iterable[P]) -> Finding[P] | None:
    """Read everything again: count what breaks a claim, find the worst and the first; or None."""
    found = _here(claim, parts)
    if isinstance(parts, Parts) and parts.placed is not None:
        told = parts.placed.told(found, of_rows=parts.of_rows)
        found = reduce(_Tally.joined, told)
    if found.worst is None or found.first is None:
        return None
    counts = found.of, found.broken, found.zeros, found.nans
    return Finding(claim, *counts, found.first_nan, found.worst, found.first)


@dataclass(frozen=True)
class _Tally:
    """What was found so far, the worst and by how much."""

    of: int = 0
    broken: int = 0
    zeros: int = 0
    nans: int = 0
    first_nan: Index | None = None
    first: Spot | None = None
    worst: Spot | None = None
    most: float = -math.inf

    def joined(self, other: _Tally) -> _Tally:
        nans = [one for one in (self.first_nan, other.first_nan) if one is not None]
        firsts = [one for one in (self.first, other.first) if one is not None]
        worse = [one for one in (self, other) if one.worst is not None]
        worse.sort(key=lambda one: (-one.most, one.worst.index if one.worst else ()))
        return _Tally(
            self.of + other.of, self.broken + other.broken, self.zeros + other.zeros,
            self.nans + other.nans, min(nans, default=None),
            min(firsts, key=lambda one: one.index, default=None),
            worse[0].worst if worse else None, worse[0].most if worse else -math.inf,
        )  # fmt: skip


def _here(claim: Claim[P], parts: Iterable[P]) -> _Tally:
    of = broken = zeros = nans = 0
    first_nan: Index | None = None
    worst = first = None
    most = -math.inf
    for part in parts:
        of += int(claim.regards(part).sum()) + claim.besides(part)
        breaks = claim.breaks(part)
        if not bool(breaks.any()):
            continue
        value = claim.value(part)
        nan = breaks & value.isnan()
        broken += int(breaks.sum())
        zeros += int((breaks & (value == 0)).sum())
        nans += int(nan.sum())
        # Parts of what is computed when it is read hold some rows of several maps each.
        start = tuple(span.start for span in part.index)
        if (first_nan is None or start < first_nan) and bool(nan.any()):
            at = index_within(part.index, nan.flatten().int().argmax())
            first_nan = at if first_nan is None else min(at, first_nan)
        if first is None or start < first.index:
            spot = _spot(claim, part, int(breaks.flatten().int().argmax()))
            first = spot if first is None else min(spot, first, key=lambda one: one.index)
        excess = claim.excess(part, breaks).flatten()
        at_most = int(excess.argmax())
        reached = float(excess[at_most])
        if reached < most or (worst is not None and reached == most and start > worst.index):
            continue
        spot = _spot(claim, part, at_most)
        if worst is None or reached > most or spot.index < worst.index:
            most, worst = reached, spot
    return _Tally(of, broken, zeros, nans, first_nan, first, worst, most)


def _spot(claim: Claim[P], part: P, at: int) -> Spot:
    value = claim.value(part)
    found, deviation, allowed = (
        numbers if isinstance(numbers, float) else float(numbers.expand(value.shape).flatten()[at])
        for numbers in (value, claim.deviation(part), claim.limit(part))
    )
    spot = Spot(index_within(part.index, at), found, deviation, allowed)
    return replace(spot, text=claim.says(part, spot))


# --- claims about rows


def of_rows(
    statement: str,
    kind: str,
    value: Callable[[Block], Tensor],
    verb: str,
    *,
    deviation: Callable[[Block], Tensor] | None = None,
    regards: Callable[[Block], Tensor] = lambda block: block.attends,
    allowed: float = 0.0,
    lines: Lines = ROWS,
    unit: str = "",
) -> Claim[Block]:
    """Make a claim about rows."""
    # Without more, it is about those with a permitted key, and what is measured is the deviation.
    return Claim(
        statement=statement, kind=kind, regards=regards, value=value, deviation=deviation or value,
        allowed=allowed, says=lambda _, spot: f"{lines.name(spot.index)} {verb} {_measured(spot)}",
        lines=lines, unit=unit,
    )  # fmt: skip


def _measured(spot: Spot) -> str:
    limit = f"allowed {spot.allowed:.1e}" if spot.allowed else "allowed 0"
    if math.isnan(spot.value):
        return f"nan ({limit})"
    if spot.value == spot.deviation or not math.isfinite(spot.deviation):
        return f"{spot.value:.6g} ({limit})"
    value = number_text(spot.value, beside=spot.deviation)
    return f"{value} (off by {spot.deviation:.1e}; {limit})"


def fully_masked_rows(
    mask: Tensor | None, declared: FullyMasked, allowed: float, lines: Lines = ROWS
) -> list[Claim[Block]]:
    """Claim that rows without a permitted key hold what was declared."""
    if mask is None:
        return []
    broken, verb, value = {
        "zero": ("are not zero", "holds", _farthest_from_zero),
        "uniform": ("are not uniform", "strays, relative to 1 / key_len, by",
                    lambda block: block.misfit(masked=False)),
        "nan": ("hold numbers", "holds numbers, not NaN, at this many keys:",
                lambda block: block.numbers),
    }[declared]  # fmt: skip
    statement = f'fully masked {lines.noun} {broken} (fully_masked="{declared}")'
    return [of_rows(
        statement, "masked", value, verb, regards=lambda block: ~block.attends, lines=lines,
        deviation=lambda block: value(block).abs(),
        allowed=allowed if declared == "uniform" else 0.0,
    )]  # fmt: skip


def _farthest_from_zero(block: Block) -> Tensor:
    return torch.where(block.high > block.low.neg(), block.high, block.low)


# --- claims about single weights

# Says of an index and the weight there what is wrong with it.
Says: TypeAlias = Callable[[Index, float], str]


def masked_is_zero(says: Says, *, every_row: bool) -> Claim[Elements]:
    """Claim that masked keys hold exactly zero: no rounding makes weight where there is none."""

    def regards(part: Elements) -> Tensor:
        masked = ~part.permitted
        if not every_row:
            masked = masked & part.block.attends.unsqueeze(-1)
        return masked.expand(part.values.shape)

    def besides(part: Elements) -> int:
        rows = math.prod(part.block.shape) if every_row else int(part.block.attends.sum())
        return part.unread * rows if part.unread else 0

    return Claim(
        statement="masked weights are not zero", kind="outside", regards=regards,
        value=lambda part: part.values, deviation=lambda part: part.values.abs(), allowed=0.0,
        says=lambda _, spot: says(spot.index, spot.value), besides=besides,
    )  # fmt: skip


def permitted_is_positive(says: Says) -> Claim[Elements]:
    """Claim that permitted keys hold weight; a negative one is worse than none."""
    return Claim(
        statement="permitted weights are not positive",
        kind="inside",
        regards=lambda part: part.permitted.expand(part.values.shape),
        value=lambda part: part.values,
        deviation=lambda part: (1 - part.values).masked_fill_(part.values > 0, 0),
        allowed=0.0,
        says=lambda _, spot: says(spot.index, spot.value),
    )


def by_row(claim: Claim[Elements]) -> Claim[Block]:
    """Claim that a row holds no element that breaks a claim."""
    # Where weights are known to be zero, all that can be wrong is that they should not be.
    where: Where = "either" if claim.kind == "inside" else "masked"

    def broken(block: Block) -> Tensor:
        return block.reduce(lambda part: any_key(claim.breaks(part)), torch.logical_or, where=where)

    return _quick(claim.statement, claim.kind, broken)


def masks_nothing() -> Claim[Block]:
    """Claim that rows have no masked key."""
    return _quick("rows have a masked key", "permits", lambda block: block.masks)


def _quick(statement: str, kind: str, broken: Callable[[Block], Tensor]) -> Claim[Block]:
    """Claim something that is asked, of every row, and never counted."""
    return Claim(
        statement=statement, kind=kind,
        regards=lambda block: torch.ones((), dtype=torch.bool, device=block.device), value=broken,
        deviation=broken, allowed=0.0, says=lambda *_: "",
    )  # fmt: skip
