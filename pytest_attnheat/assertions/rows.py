"""Assertions about rows of attention weights: that they are the distributions they claim to be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, TypeAlias

import numpy as np
from torch import Tensor

from ..attention.boxes import as_lazy
from ..attention.tolerance import row_tolerance
from ..attention.vocabulary import FullyMasked, check_fully_masked
from ..inputs import as_mask, as_weights, check_number, check_tolerance, misuse, one_of
from .captured import Weights, takes_records
from .causes import likely_cause
from .claims import COLUMNS, ROWS, Claim, Lines, find, first_broken, fully_masked_rows, of_rows
from .pictures import failure
from .scan import Block, blocks, rows_and_columns_sum_to_one, rows_sum_to_one

Mask: TypeAlias = "Tensor | np.ndarray[Any, Any] | None"


@partial(takes_records, with_sinks=True)
def assert_row_stochastic(
    weights: Weights,
    *,
    mask: Mask = None,
    fully_masked: FullyMasked = "zero",
    tolerance: float | None = None,
) -> None:
    """Assert that every row is a distribution: no negative weight, and a sum of one.

    Args:
        weights: Attention weights of shape ``(..., queries, keys)``, two or more dimensions, any
            float dtype, device and strides, with or without gradient. Nothing is modified. In a
            record of attention with sinks, the sink counts as one more key.
        mask: Boolean, True where a query may attend, broadcastable to `weights`. It only tells
            which rows are fully masked; whether masked keys get no weight is not asked here.
        fully_masked: What a row without any permitted key holds: ``"zero"``
            (every weight is exactly 0), ``"uniform"`` (every weight is
            1 / key_len) or ``"nan"`` (every weight is NaN).
        tolerance: The largest accepted |row sum - 1|. By default it follows the dtype and the row
            length, see `pytest_attnheat.attention.tolerance`. A weight below zero is never
            accepted.

    Raises:
        Failure: Some row is not a distribution. The message tells how
            many, which is worst, and a likely cause.
        TypeError: `weights` is not a dense float tensor or array, or `mask` is not boolean.
        ValueError: `weights` is empty or has fewer than two dimensions, the
            mask does not broadcast, or an argument is out of range.

    Examples:
        >>> assert_row_stochastic(torch.softmax(torch.randn(2, 4, 6, 8), dim=-1))
    """
    __tracebackhide__ = True
    operand, permitted, declared, allowed = _read(weights, mask, fully_masked, tolerance)
    if declared == "zero" and rows_sum_to_one(operand, permitted, allowed):
        return
    claims = _distribution(permitted, declared, allowed)
    _check("assert_row_stochastic", operand, permitted, claims)


@takes_records
def assert_doubly_stochastic(
    weights: Weights,
    *,
    mask: Mask = None,
    fully_masked: FullyMasked = "zero",
    tolerance: float | None = None,
) -> None:
    """Assert that rows and columns are distributions, as after Sinkhorn normalisation.

    Args:
        weights: Attention weights of shape ``(..., n, n)``, as in `assert_row_stochastic`.
        mask: Boolean, True where a query may attend, broadcastable to
            `weights`. A row or a column without any True is zero.
        fully_masked: Only ``"zero"``: whatever else a fully masked row held
            would count in every column.
        tolerance: The largest accepted |sum - 1|, by default that of `assert_row_stochastic`.

    Raises:
        Failure: Some row or column is not a distribution.
        TypeError: As in `assert_row_stochastic`.
        ValueError: As there; or the maps are not square, or `fully_masked` is not ``"zero"``.
    """
    __tracebackhide__ = True
    operand, permitted, declared, allowed = _read(weights, mask, fully_masked, tolerance)
    if operand.shape[-2] != operand.shape[-1]:
        accepted = "(..., n, n): only as many rows as columns can all sum to 1"
        raise ValueError(misuse("weights", f"shape {tuple(operand.shape)}", accepted))
    if declared != "zero":
        accepted = "'zero': whatever else a fully masked row held would count in every column"
        raise ValueError(misuse("fully_masked", repr(declared), accepted))
    name = "assert_doubly_stochastic"
    if (lazy := as_lazy(operand)) is not None:
        lazy.whole("weights")
    if not rows_and_columns_sum_to_one(operand, permitted, allowed):
        _check(name, operand, permitted, _distribution(permitted, declared, allowed))
        columns, by_column = operand.mT, None if permitted is None else permitted.mT
        claims = _distribution(by_column, declared, allowed, COLUMNS)
        _check(name, columns, by_column, claims)


@partial(takes_records, with_sinks=True)
def assert_one_hot(
    weights: Weights,
    *,
    mask: Mask = None,
    fully_masked: FullyMasked = "zero",
    tolerance: float | None = None,
) -> None:
    """Assert that every row puts all its weight on one key, as hard attention does.

    Args:
        weights: As in `assert_row_stochastic`.
        mask: As there.
        fully_masked: As there.
        tolerance: How far the largest weight of a row and its sum may be from
            1. By default both follow the dtype, and the sum the row length.

    Raises:
        Failure: Some row is not a distribution, or its largest weight is not 1.
        TypeError: As in `assert_row_stochastic`.
        ValueError: As in `assert_row_stochastic`.
    """
    __tracebackhide__ = True
    operand, permitted, declared, allowed = _read(weights, mask, fully_masked, tolerance)
    one_weight = row_tolerance(operand.dtype, 1) if tolerance is None else allowed
    largest_is_one = of_rows(
        "rows do not put all weight on one key", "one-hot", lambda block: block.high,
        "has as its largest weight", deviation=lambda block: (block.high - 1).abs(),
        allowed=one_weight,
    )  # fmt: skip
    claims = [*_distribution(permitted, declared, allowed), largest_is_one]
    _check("assert_one_hot", operand, permitted, claims)


@takes_records
def assert_uniform(
    weights: Weights,
    *,
    mask: Mask = None,
    fully_masked: FullyMasked = "zero",
    tolerance: float | None = None,
) -> None:
    """Assert that every row spreads its weight evenly over the keys it may attend to.

    Args:
        weights: As in `assert_row_stochastic`.
        mask: Boolean, True where a query may attend, broadcastable to `weights`. A permitted key
            holds 1 / (number of permitted keys), any other holds exactly zero. None permits all.
        fully_masked: As in `assert_row_stochastic`.
        tolerance: How far a permitted weight may be off, as a part of the weight it
            should be: an absolute figure would accept anything in long rows.
            By default that of `assert_row_stochastic`.

    Raises:
        Failure: Some weight is not what it should be.
        TypeError: As in `assert_row_stochastic`.
        ValueError: As in `assert_row_stochastic`.
    """
    __tracebackhide__ = True
    operand, permitted, declared, allowed = _read(weights, mask, fully_masked, tolerance)
    # No rounding makes weight where there is none, so that masked keys have no tolerance.
    leak = "rows are not uniform: masked keys hold weight"
    claims = [
        of_rows(leak, "leak", lambda block: block.leaked, "holds, at a masked key,"),
        of_rows("rows are not uniform", "uniform", lambda block: block.misfit(masked=True),
                "strays, relative to 1 / (permitted keys), by", allowed=allowed),
        *fully_masked_rows(permitted, declared, allowed),
    ]  # fmt: skip
    _check("assert_uniform", operand, permitted, claims[permitted is None :])


@partial(takes_records, with_sinks=True)
def assert_entropy(
    weights: Weights,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    unit: Literal["nats", "bits"] = "nats",
    mask: Mask = None,
    fully_masked: FullyMasked = "zero",
    tolerance: float | None = None,
) -> None:
    """Assert that the entropy of every row lies within bounds.

    A low entropy is a row that looks at few keys, a high one a row that looks at many: 0 is
    one-hot, ``log(key_len)`` uniform. Rows must be distributions; fully masked rows have no entropy
    and only need to hold what was declared.

    Args:
        weights: As in `assert_row_stochastic`.
        minimum: The least entropy that is accepted, None for any. A row with
            one permitted key, as the first under a causal mask, has 0.
        maximum: The largest entropy that is accepted, None for any.
        unit: The unit of the bounds, ``"nats"`` or ``"bits"``.
        mask: As in `assert_row_stochastic`.
        fully_masked: As there.
        tolerance: As there. A bound may be missed by ``tolerance * (1 + log(key_len))``, which is
            what errors of that size in the weights do to the entropy.

    Raises:
        Failure: Some row is not a distribution, or its entropy is out of bounds.
        TypeError: As in `assert_row_stochastic`; or a bound is not a number.
        ValueError: As there; or no bound is given, the unit is unknown, or
            the bounds leave nothing between them.
    """
    __tracebackhide__ = True
    least, most = _bounds(minimum, maximum, unit)
    operand, permitted, declared, allowed = _read(weights, mask, fully_masked, tolerance)
    slack = allowed * (1 + math.log(operand.shape[-1])) / (math.log(2) if unit == "bits" else 1)
    claims = [
        *_distribution(permitted, declared, allowed),
        *_entropy_within(least, most, unit, slack),
    ]
    _check("assert_entropy", operand, permitted, claims)


def _read(
    weights: object, mask: object, fully_masked: object, tolerance: object
) -> tuple[Tensor, Tensor | None, FullyMasked, float]:
    """Check the arguments that all assertions share."""
    operand = as_weights(weights)
    permitted = as_mask(mask, operand)
    declared = check_fully_masked(fully_masked)
    if tolerance is not None:
        return operand, permitted, declared, check_tolerance(tolerance)
    return operand, permitted, declared, row_tolerance(operand.dtype, operand.shape[-1])


def _bounds(minimum: object, maximum: object, unit: str) -> tuple[float | None, float | None]:
    """Check the bounds of an entropy and return them as plain numbers."""
    if minimum is None and maximum is None:
        accepted = "a number for one of them, or for both"
        raise ValueError(misuse("minimum, maximum", "None and None", accepted))
    one_of("unit", unit, ("nats", "bits"))
    least = None if minimum is None else check_number(minimum, "minimum")
    most = None if maximum is None else check_number(maximum, "maximum")
    if least is not None and most is not None and least > most:
        accepted = "a minimum that is not above the maximum"
        got = f"{least} and {most}, and nothing lies between"
        raise ValueError(misuse("minimum, maximum", got, accepted))
    return least, most


def _check(name: str, weights: Tensor, mask: Tensor | None, claims: Sequence[Claim[Block]]) -> None:
    """Raise a Failure about the first claim that does not hold."""
    __tracebackhide__ = True
    broken = first_broken(blocks(weights, mask), claims)
    finding = None if broken is None else find(broken, blocks(weights, mask))
    if finding is not None:
        cause = likely_cause(weights, mask, finding)
        raise failure(name, weights, mask, finding, cause)


def _distribution(
    mask: Tensor | None, declared: FullyMasked, allowed: float, lines: Lines = ROWS
) -> list[Claim[Block]]:
    """Claim that rows sum to one and hold no negative weight, however small."""
    return [
        of_rows(f"{lines.noun} do not sum to 1", "sum", lambda block: block.total, "sums to",
                deviation=lambda block: (block.total - 1).abs(), allowed=allowed, lines=lines),
        of_rows(f"{lines.noun} hold a negative weight", "negative", lambda block: block.low,
                "holds", deviation=lambda block: block.low.neg().clamp(min=0), lines=lines),
        *fully_masked_rows(mask, declared, allowed, lines),
    ]  # fmt: skip


def _entropy_within(
    minimum: float | None, maximum: float | None, unit: str, slack: float
) -> list[Claim[Block]]:
    """Claim that the entropy of rows with a permitted key is within bounds."""
    per_nat = 1 / math.log(2) if unit == "bits" else 1.0

    def claim(bound: float, sign: float, word: str) -> Claim[Block]:
        return of_rows(
            f"rows have an entropy {word} {bound:.6g} {unit}", "entropy",
            lambda block: block.entropy * per_nat, f"has an entropy ({unit}) of",
            deviation=lambda block: ((bound - block.entropy * per_nat) * sign).clamp(min=0),
            allowed=slack, unit=unit,
        )  # fmt: skip

    least = [] if minimum is None else [claim(minimum, 1.0, "below")]
    return least if maximum is None else [*least, claim(maximum, -1.0, "above")]
