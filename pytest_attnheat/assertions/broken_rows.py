"""Failure messages: what was claimed, where it breaks, why perhaps, and a small picture.

`build_message` lays out the message of any assertion; `broken_claim` fills it
in for a claim about rows.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import cast

import torch

from pytest_attnheat.assertions.causes import likely_cause
from pytest_attnheat.assertions.findings import ROWS, Claim, Finding, Lines
from pytest_attnheat.assertions.scan import Block
from pytest_attnheat.heatmaps.terminal import format_heatmap, map_name
from pytest_attnheat.inputs import Operand, dtype_name, view

# A picture shows the worst row and its neighbours.
_ROWS_SHOWN = 6
# Of a number in a sentence, significant digits; 17 tell any two float64 apart.
_LEAST_DIGITS, _MOST_DIGITS = 6, 17
# Of the numbers beside a picture.
_LEAST_DECIMALS, _MOST_DECIMALS = 3, 6


def build_message(
    assertion: str,
    claim: str,
    tensor: Operand,
    *,
    worst: str,
    first: str | None = None,
    cause: str | None = None,
    repeat: str | None = None,
    assumed: str | None = None,
    picture: str = "",
) -> str:
    """Lay out a failure message.

    Args:
        assertion: The name of the assertion.
        claim: How many places break what was claimed, of how many.
        tensor: What was checked, for its dtype, shape and device.
        worst: The worst place, with its value and the allowed value.
        first: The first place, None where it is the worst or says nothing more.
        cause: A likely cause, None where the numbers show none.
        repeat: What it takes to see the same again, for instance "seed=0".
        assumed: What was claimed on the caller's behalf.
        picture: Lines of text that show the place.

    Returns:
        The message, of several lines.
    """
    described = f"{dtype_name(tensor)} {tuple(tensor.shape)} on {tensor.device}"
    entries = {
        "worst": worst,
        "first": first,
        "cause": cause,
        "claim": assumed,
        "tensor": described,
        "repeat": repeat,
    }
    lines = [f"{assertion}: {claim}"]
    lines += [f"  {name:<9}{text}" for name, text in entries.items() if text is not None]
    lines.extend(f"  {line}".rstrip() for line in picture.splitlines())
    return "\n".join(lines)


def broken_claim(
    assertion: str, weights: Operand, mask: Operand | None, finding: Finding, lines: Lines
) -> str:
    """Return the message about a claim that some rows break.

    Args:
        assertion: The name of the assertion.
        weights: The weights as they were read: transposed where the claim is
            about columns.
        mask: Their mask.
        finding: What the thorough reading found.
        lines: Whether the claim is about rows or columns.
    """
    claim = finding.claim
    return build_message(
        assertion,
        f"{finding.broken} of {finding.regarded} {claim.statement}",
        _as_given(weights, lines),
        worst=f"{lines.name(finding.worst)} {claim.verb} {_measured(finding)}",
        cause=likely_cause(weights, mask, finding, lines),
        picture=picture_of(weights, mask, finding, lines),
    )


def _as_given(weights: Operand, lines: Lines) -> Operand:
    """Return the weights as the caller passed them."""
    return weights.mT if lines.transposed else weights


def _measured(finding: Finding) -> str:
    allowed = finding.claim.allowed
    limit = f"allowed {allowed:.1e}" if allowed else "allowed 0"
    if math.isnan(finding.value):
        return f"nan ({limit})"
    if finding.value == finding.deviation or math.isinf(finding.deviation):
        return f"{finding.value:.6g} ({limit})"
    # As many digits as it takes to see the difference, and no more than float64 has.
    largest = max(abs(finding.value), finding.deviation)
    digits = 2 + _exponent(largest) - _exponent(finding.deviation)
    digits = min(max(digits, _LEAST_DIGITS), _MOST_DIGITS)
    return f"{finding.value:.{digits}g} (off by {finding.deviation:.1e}; {limit})"


def _exponent(number: float) -> int:
    return math.floor(math.log10(number))


def picture_of(
    weights: Operand, mask: Operand | None, finding: Finding, lines: Lines = ROWS
) -> str:
    """Return a small heatmap of the worst row and its neighbours, the broken ones pointed at."""
    *place, row = finding.worst
    size = weights.shape[-2]
    first = max(0, min(row - _ROWS_SHOWN // 2, size - _ROWS_SHOWN))
    window = slice(first, min(first + _ROWS_SHOWN, size))
    index = (*(slice(i, i + 1) for i in place), window)
    block = Block(weights, mask, index)
    breaks = finding.claim.breaks(block).flatten().tolist()
    return _draw(
        weights,
        mask,
        tuple(place),
        window,
        marked=[first + i for i, is_broken in enumerate(breaks) if is_broken],
        notes=_notes(finding.claim, block),
        lines=lines,
    )


def _notes(claim: Claim, block: Block) -> list[str] | None:
    """Return what stands beside the rows of a picture, None for the plain sums.

    With as many decimals as it takes to see that the broken rows are broken.
    """
    if claim.kind not in ("sum", "entropy"):
        return None
    off = claim.breach(block)[claim.breaks(block)]
    differences = [number for number in off.tolist() if math.isfinite(number)]
    decimals = max((-_exponent(number) for number in differences), default=0)
    decimals = min(max(decimals, _LEAST_DECIMALS), _MOST_DECIMALS)
    values = claim.value(block).flatten().tolist()
    return [f"{value:.{decimals}f} {claim.unit}".rstrip() for value in values]


def _draw(
    weights: Operand,
    mask: Operand | None,
    place: tuple[int, ...],
    rows: slice,
    *,
    marked: Collection[int],
    notes: Sequence[str] | None,
    lines: Lines,
) -> str:
    """Return a small heatmap of some rows of the map at `place`, the marked ones pointed at."""
    # The text view takes what the public function takes, and whatever an assertion reads.
    part = cast("torch.Tensor", view(weights, (*place, rows)))
    own_place = (
        ()
        if mask is None
        else tuple(0 if size == 1 else i for size, i in zip(mask.shape, place, strict=False))
    )
    own_rows = rows if mask is not None and mask.shape[-2] > 1 else slice(0, 1)
    permitted = None if mask is None else cast("torch.Tensor", view(mask, (*own_place, own_rows)))
    return format_heatmap(
        part,
        mask=permitted,
        first_row=rows.start,
        marked=marked,
        notes=notes,
        row_name=lines.letter,
        column_name=lines.across,
        title=map_name(place),
    )
