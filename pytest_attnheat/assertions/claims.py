"""What the assertions about rows claim, one small function per claim."""

from __future__ import annotations

import math

import torch

from pytest_attnheat.assertions.findings import Claim
from pytest_attnheat.assertions.scan import Block
from pytest_attnheat.attention.vocabulary import FullyMasked
from pytest_attnheat.inputs import Operand


def sum_to_one(allowed: float, lines: str = "rows") -> Claim:
    """Claim that rows with a permitted key sum to one."""
    return Claim(
        statement=f"{lines} do not sum to 1",
        kind="sum",
        regards=_attends,
        value=lambda block: block.total,
        deviation=lambda block: (block.total - 1).abs(),
        allowed=allowed,
        verb="sums to",
    )


def nonnegative(lines: str = "rows") -> Claim:
    """Claim that rows with a permitted key hold no negative weight, however small."""
    return Claim(
        statement=f"{lines} hold a negative weight",
        kind="negative",
        regards=_attends,
        value=lambda block: block.low,
        deviation=lambda block: block.low.neg().clamp(min=0),
        allowed=0.0,
        verb="holds",
    )


def fully_masked_rows(
    mask: Operand | None, declared: FullyMasked, allowed: float, lines: str = "rows"
) -> list[Claim]:
    """Claim that rows without a permitted key hold what was declared."""
    if mask is None:
        return []
    if declared == "zero":
        return [_masked_is_zero(lines)]
    if declared == "uniform":
        return [_masked_is_uniform(allowed)]
    return [_masked_is_nan()]


def _masked_is_zero(lines: str) -> Claim:
    return Claim(
        statement=f'fully masked {lines} are not zero (fully_masked="zero")',
        kind="masked",
        regards=_fully_masked,
        value=_farthest_from_zero,
        deviation=lambda block: _farthest_from_zero(block).abs(),
        allowed=0.0,
        verb="holds",
    )


def _masked_is_uniform(allowed: float) -> Claim:
    return Claim(
        statement='fully masked rows are not uniform (fully_masked="uniform")',
        kind="masked",
        regards=_fully_masked,
        value=lambda block: block.misfit(masked=False),
        deviation=lambda block: block.misfit(masked=False),
        allowed=allowed,
        verb="strays, relative to 1 / key_len, by",
    )


def _masked_is_nan() -> Claim:
    return Claim(
        statement='fully masked rows hold numbers (fully_masked="nan")',
        kind="masked",
        regards=_fully_masked,
        value=lambda block: block.numbers,
        deviation=lambda block: block.numbers,
        allowed=0.0,
        verb="holds numbers, not NaN, at this many keys:",
    )


def largest_is_one(allowed: float) -> Claim:
    """Claim that the largest weight of rows with a permitted key is one."""
    return Claim(
        statement="rows do not put all weight on one key",
        kind="one-hot",
        regards=_attends,
        value=lambda block: block.high,
        deviation=lambda block: (block.high - 1).abs(),
        allowed=allowed,
        verb="has as its largest weight",
    )


def uniform(allowed: float) -> Claim:
    """Claim that rows are uniform over their permitted keys, and zero elsewhere."""
    return Claim(
        statement="rows are not uniform",
        kind="uniform",
        regards=_attends,
        value=lambda block: block.misfit(masked=True),
        deviation=lambda block: block.misfit(masked=True),
        allowed=allowed,
        verb="strays, relative to 1 / (permitted keys), by",
    )


def nothing_on_masked_keys(mask: Operand | None) -> list[Claim]:
    """Claim that masked keys hold exactly zero in rows with a permitted key.

    No rounding makes weight where there is none, so there is no tolerance.
    """
    if mask is None:
        return []
    return [
        Claim(
            statement="rows are not uniform: masked keys hold weight",
            kind="leak",
            regards=_attends,
            value=lambda block: block.leaked,
            deviation=lambda block: block.leaked,
            allowed=0.0,
            verb="holds, at a masked key,",
        )
    ]


def entropy_within(
    minimum: float | None, maximum: float | None, unit: str, slack: float
) -> list[Claim]:
    """Claim that the entropy of rows with a permitted key is within bounds."""
    per_nat = 1 / math.log(2) if unit == "bits" else 1.0
    claims = []
    for bound, sign, word in ((minimum, 1.0, "below"), (maximum, -1.0, "above")):
        if bound is not None:
            claims.append(_entropy_bound(bound, sign, word, unit, per_nat, slack))
    return claims


def _entropy_bound(
    bound: float, sign: float, word: str, unit: str, per_nat: float, slack: float
) -> Claim:
    return Claim(
        statement=f"rows have an entropy {word} {bound:.6g} {unit}",
        kind="entropy",
        regards=_attends,
        value=lambda block: block.entropy * per_nat,
        deviation=lambda block: ((bound - block.entropy * per_nat) * sign).clamp(min=0),
        allowed=slack,
        verb=f"has an entropy ({unit}) of",
        unit=unit,
    )


def _attends(block: Block) -> torch.Tensor:
    return block.attends


def _fully_masked(block: Block) -> torch.Tensor:
    return ~block.attends


def _farthest_from_zero(block: Block) -> torch.Tensor:
    return torch.where(block.high > block.low.neg(), block.high, block.low)
