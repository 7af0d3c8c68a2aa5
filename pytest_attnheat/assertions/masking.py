"""Assertions about where weights may be: on permitted keys, and nowhere else."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex, TypeAlias, cast

import numpy as np
import torch

from pytest_attnheat.assertions.broken_rows import broken_claim
from pytest_attnheat.assertions.captured import (
    NothingForbiddenError,
    Weights,
    takes_masked_records,
    takes_positioned_records,
    takes_records,
)
from pytest_attnheat.assertions.causal import CausalRule, causal_cause
from pytest_attnheat.assertions.claims import fully_masked_rows
from pytest_attnheat.assertions.failure import BrokenRowsError
from pytest_attnheat.assertions.findings import ROWS, Claim, find, first_broken
from pytest_attnheat.assertions.masking_causes import mask_cause, padding_cause, support_cause
from pytest_attnheat.assertions.masking_evidence import Evidence
from pytest_attnheat.assertions.places import (
    PlaceClaim,
    broken_weights,
    find_places,
    masked_is_zero,
    permitted_is_positive,
    place_message,
)
from pytest_attnheat.assertions.scan import Block, any_key
from pytest_attnheat.attention.reference import padding_mask
from pytest_attnheat.attention.tolerance import row_tolerance
from pytest_attnheat.attention.vocabulary import (
    ALIGNMENTS,
    Alignment,
    FullyMasked,
    Side,
    check_fully_masked,
)
from pytest_attnheat.inputs import Operand, as_mask, as_weights

Mask: TypeAlias = "torch.Tensor | np.ndarray[Any, Any]"
Lengths: TypeAlias = "Sequence[int] | torch.Tensor | np.ndarray[Any, Any]"

_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


@takes_masked_records
def assert_masked(
    weights: Weights, mask: Mask | None = None, *, fully_masked: FullyMasked = "zero"
) -> None:
    """Assert that masked keys get exactly zero weight.

    There is no tolerance: no rounding makes weight where there is none. NaN
    and infinity at a masked place break it too. What permitted keys hold is
    not asked; `assert_support` does. Under `torch.set_flush_denormal(True)`
    the CPU reads numbers below the normal ones, such as 1e-40, as zero.

    Args:
        weights: Attention weights of shape ``(..., queries, keys)``, two or
            more dimensions, any float dtype, device and strides, with or
            without gradient. Nothing is modified.
        mask: Boolean, True where a query may attend, broadcastable to
            `weights`, with a False somewhere.
        fully_masked: What a row without any permitted key holds: ``"zero"``
            (every weight is exactly 0), ``"uniform"`` (every weight is
            1 / key_len) or ``"nan"`` (every weight is NaN).

    Raises:
        AssertionError: Some masked key holds something else than zero. The
            message tells how many, which is worst, and a likely cause.
        TypeError: `weights` is not a dense float tensor or array, or `mask`
            is not boolean.
        ValueError: `weights` is empty or has fewer than two dimensions, the
            mask does not broadcast or permits every key, or `fully_masked` is
            unknown.

    Example:
        >>> mask = torch.ones(6, 6, dtype=torch.bool).tril()
        >>> scores = torch.randn(2, 4, 6, 6).masked_fill(~mask, float("-inf"))
        >>> assert_masked(scores.softmax(-1), mask)
    """
    __tracebackhide__ = True
    operand = _read_weights(weights)
    permitted = _required_mask(mask, operand)
    subject = _Subject("assert_masked", operand, permitted, check_fully_masked(fully_masked))
    if not _check(subject, _describe_masked, mask_cause):
        raise NothingForbiddenError(
            f"mask: shape {_shape(mask)} permits every key, so there is nothing to check; "
            "accepted is a boolean mask that is False where a query may not attend"
        )


def _assert_causal_of_some(
    weights: Weights,
    queries: torch.Tensor,
    query_len: int,
    alignment: Alignment | None = None,
    window: int | tuple[int, int] | None = None,
    fully_masked: FullyMasked = "zero",
) -> None:
    """`assert_causal` of some queries of a record, at the positions that they had."""
    __tracebackhide__ = True
    operand = _read_weights(weights)
    declared = check_fully_masked(fully_masked)
    key_len = operand.shape[-1]
    rule = CausalRule(
        query_len, key_len, _check_alignment(alignment, query_len, key_len), _check_window(window)
    )
    rows = rule.rows(queries.to(operand.device))
    if bool(rows.all()):
        raise NothingForbiddenError(
            f"queries {queries.tolist()} of {query_len}: {rule} permits them every key, so there "
            "is nothing to check"
        )

    def describe(place: tuple[int, ...], weight: float) -> str:
        query = int(queries[place[-2]])
        return (
            f"weights[{_commas(place)}]: query {query} of {query_len} gives {weight:.3g} to key "
            f"{place[-1]} (allowed 0)"
        )

    permitted = cast("Operand", as_mask(rows, operand))
    _check(_Subject("assert_causal", operand, permitted, declared), describe, mask_cause)


@takes_positioned_records(_assert_causal_of_some)
def assert_causal(
    weights: Weights,
    *,
    alignment: Alignment | None = None,
    window: int | tuple[int, int] | None = None,
    fully_masked: FullyMasked = "zero",
) -> None:
    """Assert that no query gives weight to a key in its future.

    Args:
        weights: As in `assert_masked`.
        alignment: Where query 0 stands; needed only where there are not as
            many queries as keys. ``"top_left"``: at key 0, which is what
            ``is_causal=True`` means in PyTorch. ``"bottom_right"``: so that
            the last query stands at the last key, as in decoding with a cache.
        window: How many keys before its own position a query may attend to;
            None for all of them. A pair ``(left, right)`` as
            `sliding_window_mask` takes it is accepted where `right` is 0. Keys
            before the window must get exactly zero too.
        fully_masked: What a row without any permitted key holds, as in
            `assert_masked`. There are such rows where queries stand before the
            first key (``"bottom_right"`` with more queries than keys), or
            where all keys lie before their window.

    Raises:
        AssertionError: Some query gives weight to its future, or to a key
            before its window.
        TypeError: `weights` is not a dense float tensor or array, or `window`
            is neither a whole number nor a pair of them.
        ValueError: As in `assert_masked`; or the alignment is unknown or
            missing, the window reaches into the future or is below 0, or
            nothing is forbidden, as for a single query at the last key.

    Example:
        >>> mask = torch.ones(6, 6, dtype=torch.bool).tril()
        >>> scores = torch.randn(2, 4, 6, 6).masked_fill(~mask, float("-inf"))
        >>> assert_causal(scores.softmax(-1))
    """
    __tracebackhide__ = True
    operand = _read_weights(weights)
    declared = check_fully_masked(fully_masked)
    query_len, key_len = operand.shape[-2:]
    rule = CausalRule(
        query_len, key_len, _check_alignment(alignment, query_len, key_len), _check_window(window)
    )
    if not rule.forbids_something:
        raise NothingForbiddenError(
            f"weights: shape {tuple(operand.shape)}: {rule} permits every query every key, so "
            "there is nothing to check"
        )
    permitted = cast("Operand", as_mask(rule.mask(operand.device), operand))
    subject = _Subject("assert_causal", operand, permitted, declared)

    def describe(place: tuple[int, ...], weight: float) -> str:
        query, key = place[-2:]
        position = query + rule.offset
        where = f"weights[{_commas(place)}]: query {query} gives {weight:.3g} to key {key}"
        if key > position:
            return f"{where}, {_steps(key - position)} in its future (allowed 0)"
        before = _steps(position - cast("int", rule.window) - key)
        return f"{where}, {before} before its window of {rule.window} (allowed 0)"

    _check(subject, describe, lambda evidence: causal_cause(evidence, rule))


@takes_masked_records
def assert_support(
    weights: Weights, mask: Mask | None = None, *, fully_masked: FullyMasked = "zero"
) -> None:
    """Assert that weight is where the mask permits it, all of there, and nowhere else.

    Masked keys get exactly zero, and permitted keys a positive weight: a mask
    that hides too much is a defect as well.

    A permitted weight can be too small for its dtype and become zero, the
    sooner the narrower the dtype. Compare such weights before the cast, or
    ask only for `assert_masked`.

    Args:
        weights: As in `assert_masked`.
        mask: As there; it may permit every key.
        fully_masked: As there.

    Raises:
        AssertionError: Some masked key holds something else than zero, or
            some permitted key something that is not positive.
        TypeError: As in `assert_masked`.
        ValueError: As there, but for a mask that permits every key.

    Example:
        >>> mask = torch.ones(6, 6, dtype=torch.bool).tril()
        >>> scores = torch.randn(2, 4, 6, 6).masked_fill(~mask, float("-inf"))
        >>> assert_support(scores.softmax(-1), mask)
    """
    __tracebackhide__ = True
    operand = _read_weights(weights)
    permitted = _required_mask(mask, operand)
    subject = _Subject("assert_support", operand, permitted, check_fully_masked(fully_masked))
    _check(subject, _describe_support(permitted), support_cause, [permitted_is_positive()])


@takes_records
def assert_padding_masked(
    weights: Weights,
    lengths: Lengths,
    *,
    side: Side = "right",
    fully_masked: FullyMasked = "zero",
) -> None:
    """Assert that keys which are padding get exactly zero weight.

    It is asked of every query, of padded ones too.

    Args:
        weights: Attention weights of shape ``(batch, ..., queries, keys)``,
            three or more dimensions, otherwise as in `assert_masked`.
        lengths: How many keys of each batch entry are real, ``(batch,)``; 0
            to the number of keys, as in `padding_mask`.
        side: The side the padding is on, ``"right"`` or ``"left"``.
        fully_masked: What the rows of a batch entry of length 0 hold, as in
            `assert_masked`.

    Raises:
        AssertionError: Some padded key gets weight.
        TypeError: `weights` is not a dense float tensor or array, or the
            lengths are not whole numbers.
        ValueError: As in `assert_masked`; or `weights` has fewer than three
            dimensions, there is not one length per batch entry, one is out of
            range, the side is unknown, or no batch entry has padding.

    Example:
        >>> mask = padding_mask([5, 3], key_len=5)
        >>> scores = torch.randn(2, 4, 6, 5).masked_fill(~mask, float("-inf"))
        >>> assert_padding_masked(scores.softmax(-1), [5, 3])
    """
    __tracebackhide__ = True
    operand = _read_weights(weights)
    declared = check_fully_masked(fully_masked)
    real = _check_lengths(lengths, operand, side)
    mask = padding_mask(real, operand.shape[-1], side=side, device=operand.device).view(
        -1, *[1] * (operand.ndim - 2), operand.shape[-1]
    )
    permitted = cast("Operand", as_mask(mask, operand))
    subject = _Subject("assert_padding_masked", operand, permitted, declared)

    def describe(place: tuple[int, ...], weight: float) -> str:
        entry, key = place[0], place[-1]
        return (
            f"weights[{_commas(place)}] gives {weight:.3g} to key {key}, padding of batch entry "
            f"{entry} (its length is {real[entry]}; allowed 0)"
        )

    _check(subject, describe, lambda evidence: padding_cause(evidence, real, side))


@dataclass(frozen=True)
class _Subject:
    """What is checked, under which name and mask."""

    assertion: str
    weights: Operand
    mask: Operand
    declared: FullyMasked


def _check(
    subject: _Subject,
    describe: Callable[[tuple[int, ...], float], str],
    cause: Callable[[Evidence], str | None],
    more: Sequence[PlaceClaim] = (),
) -> bool:
    """Raise an AssertionError about the first claim that does not hold.

    Returns:
        Whether the mask forbids anything, so that something was compared.
    """
    __tracebackhide__ = True
    weights, mask, declared = subject.weights, subject.mask, subject.declared
    places = {claim.kind: claim for claim in (masked_is_zero(every_row=declared == "zero"), *more)}
    # The quick reading tells in the same wait whether there was anything to read.
    claims = [claim.by_row() for claim in places.values()]
    broken = first_broken(weights, mask, [*claims, *_full_rows(subject), _FORBIDS_NOTHING])
    if broken is None or broken is _FORBIDS_NOTHING:
        return broken is not None
    if broken.kind in places:
        finding = find_places(weights, mask, places[broken.kind])
        if finding.attending:
            likely = cause(Evidence.of(weights, mask, finding))
            message = place_message(
                subject.assertion, weights, mask, finding, describe=describe, cause=likely
            )
            raise broken_weights(message, weights, mask, finding)
        # Nothing but fully masked rows: what is said of those is said of whole rows.
        (broken,) = fully_masked_rows(mask, declared, 0.0)
    rows = find(weights, mask, broken)
    message = broken_claim(subject.assertion, weights, mask, rows, ROWS)
    raise BrokenRowsError(message, weights, mask, rows)


def _full_rows(subject: _Subject) -> list[Claim]:
    """Return what fully masked rows hold, where that is something else than zeros."""
    weights, declared = subject.weights, subject.declared
    if declared == "zero":
        return []
    allowed = 0.0
    if declared == "uniform":
        allowed = row_tolerance(weights.dtype, weights.shape[-1])
    return fully_masked_rows(subject.mask, declared, allowed)


def _forbids(block: Block) -> torch.Tensor:
    def forbids(values: torch.Tensor, keys: slice) -> torch.Tensor:
        permitted = cast("torch.Tensor", block.permitted(keys))
        return any_key(~permitted).expand(values.shape[:-1])

    return block.reduce(forbids, torch.logical_or)


_FORBIDS_NOTHING = Claim(
    statement="rows have a masked key",
    kind="permits",
    regards=_forbids,
    value=_forbids,
    deviation=_forbids,
    allowed=0.0,
    verb="",
)


def _read_weights(weights: object) -> Operand:
    operand = as_weights(weights)
    if str(operand.dtype) == "torch.float8_e8m0fnu":
        raise ValueError(
            "weights: got dtype float8_e8m0fnu, which has no zero: no key can be masked in it; "
            "check before the cast"
        )
    return operand


def _shape(mask: Mask | None) -> tuple[int, ...]:
    return () if mask is None else tuple(mask.shape)


def _required_mask(mask: object, weights: Operand) -> Operand:
    permitted = as_mask(mask, weights)
    if permitted is None:
        raise TypeError(
            "mask: got None; accepted is a boolean torch.Tensor or numpy.ndarray, True where a "
            "query may attend"
        )
    return permitted


def _check_alignment(alignment: object, query_len: int, key_len: int) -> Alignment:
    if alignment is not None and alignment not in ALIGNMENTS:
        raise ValueError(
            f"alignment: got {alignment!r}; accepted are 'top_left' and 'bottom_right'"
        )
    if alignment is None and query_len != key_len:
        raise ValueError(
            f"alignment: {query_len} queries and {key_len} keys need one; accepted are 'top_left' "
            "(query 0 stands at key 0: what is_causal=True means in PyTorch) and 'bottom_right' "
            "(the last query stands at the last key: decoding with a cache)"
        )
    return cast("Alignment", alignment or "top_left")


def _check_window(window: object) -> int | None:
    """Return how many keys before its own position a query may attend to."""
    if window is None:
        return None
    accepted = (
        "accepted is None, a whole number from 0 (how many keys before its own position a query "
        "may attend to) or a pair (left, 0)"
    )
    sides = window if isinstance(window, (tuple, list)) else (window, 0)
    if len(sides) != 2 or not all(_is_whole(side) for side in sides):
        raise TypeError(f"window: got {window!r}; {accepted}")
    left, right = map(operator.index, sides)
    if right != 0:
        raise ValueError(
            f"window: got {window!r}, which reaches into the future; {accepted}. For a window on "
            "both sides there is assert_masked with sliding_window_mask"
        )
    if left < 0:
        raise ValueError(f"window: got {window!r}; {accepted}")
    return left


def _is_whole(number: object) -> bool:
    """Tell whether it is a whole number, of Python, NumPy or torch; a boolean is none."""
    if isinstance(number, (bool, np.bool_)) or getattr(number, "dtype", None) == torch.bool:
        return False
    try:
        operator.index(cast("SupportsIndex", number))
    except TypeError:
        return False
    return True


def _check_lengths(lengths: object, weights: Operand, side: object) -> list[int]:
    """Return the lengths as plain numbers."""
    if weights.ndim < 3:
        raise ValueError(
            f"weights: got {weights.ndim} dimensions, shape {tuple(weights.shape)}; accepted are "
            "three or more: (batch, ..., queries, keys)"
        )
    if side not in ("right", "left"):
        raise ValueError(f"side: got {side!r}; accepted are 'right' and 'left'")
    accepted = f"accepted is one whole number from 0 to {weights.shape[-1]} for each batch entry"
    given = lengths.detach().cpu() if isinstance(lengths, torch.Tensor) else lengths
    try:
        # NumPy knows all byte orders, strides and lists.
        array = np.asarray(given)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"lengths: got {lengths!r}; {accepted}") from None
    numbers = array.flatten().tolist()
    if not all(_is_whole(number) for number in numbers):
        if array.dtype.kind in "biufc":
            raise TypeError(f"lengths: got dtype {array.dtype}; {accepted}")
        raise TypeError(f"lengths: got {lengths!r}; {accepted}")
    if array.shape != (weights.shape[0],):
        raise ValueError(
            f"lengths: got shape {array.shape} for {weights.shape[0]} batch entries; {accepted}"
        )
    real = [operator.index(number) for number in numbers]
    if min(real) < 0 or max(real) > weights.shape[-1]:
        raise ValueError(f"lengths: got {real}; {accepted}")
    if min(real) == weights.shape[-1]:
        raise NothingForbiddenError(
            f"lengths: got {real} for {weights.shape[-1]} keys: no batch entry has padding, so "
            "there is nothing to check"
        )
    return real


def _describe_masked(place: tuple[int, ...], weight: float) -> str:
    return (
        f"weights[{_commas(place)}] gives {weight:.3g} to key {place[-1]}, which the mask forbids "
        "(allowed 0)"
    )


def _describe_support(mask: Operand) -> Callable[[tuple[int, ...], float], str]:
    def describe(place: tuple[int, ...], weight: float) -> str:
        own = tuple(0 if size == 1 else i for size, i in zip(mask.shape, place, strict=True))
        if not bool(mask[tuple(slice(i, i + 1) for i in own)]):
            return _describe_masked(place, weight)
        return (
            f"weights[{_commas(place)}] gives {weight:.3g} to key {place[-1]}, which the mask "
            "permits (allowed: more than 0)"
        )

    return describe


def _steps(count: int) -> str:
    number = _WORDS[count] if count < len(_WORDS) else str(count)
    return f"{number} step{'' if count == 1 else 's'}"


def _commas(place: tuple[int, ...]) -> str:
    return ", ".join(map(str, place))
