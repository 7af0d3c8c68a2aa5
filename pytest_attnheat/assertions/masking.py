"""Assertions about where weights may be: on permitted keys, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor

from ..attention.boxes import LazyMask, as_lazy
from ..attention.placed import as_placed
from ..attention.reference import padding_mask, read_lengths
from ..attention.tolerance import row_tolerance
from ..attention.vocabulary import SIDES, Alignment, FullyMasked, Side, check_fully_masked
from ..inputs import ACCEPTED_MASK, as_mask, as_weights, misuse, one_of
from .captured import NothingForbiddenError, Weights, takes_records
from .causes import Evidence, likely_cause
from .claims import (
    Claim,
    Index,
    Says,
    by_row,
    find,
    first_broken,
    fully_masked_rows,
    masked_is_zero,
    masks_nothing,
    permitted_is_positive,
)
from .masking_causes import CausalRule, causal_cause, mask_cause, padding_cause, support_cause
from .pictures import failure
from .scan import Block, Elements, Parts, blocks, elements

Mask: TypeAlias = "Tensor | np.ndarray[Any, Any]"
Lengths: TypeAlias = "Sequence[int] | Tensor | np.ndarray[Any, Any]"

_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


@partial(takes_records, needs_mask=True)
def assert_masked(
    weights: Weights, mask: Mask | None = None, *, fully_masked: FullyMasked = "zero"
) -> None:
    """Assert that masked keys get exactly zero weight.

    There is no tolerance: no rounding makes weight where there is none. NaN
    and infinity at a masked place break it too. What permitted keys hold is
    not asked; `assert_support` does. Under `torch.set_flush_denormal(True)`
    the CPU reads numbers below the normal ones, such as 1e-40, as zero.

    Args:
        weights: Attention weights of shape ``(..., queries, keys)``, two or more dimensions, any
            float dtype, device and strides, with or without gradient. Nothing is modified.
        mask: Boolean, True where a query may attend, broadcastable to
            `weights`, with a False somewhere.
        fully_masked: What a row without any permitted key holds: ``"zero"``
            (every weight is exactly 0), ``"uniform"`` (every weight is
            1 / key_len) or ``"nan"`` (every weight is NaN).

    Raises:
        Failure: Some masked key holds something else than zero. The
            message tells how many, which is worst, and a likely cause.
        TypeError: `weights` is not a dense float tensor or array, or `mask` is not boolean.
        ValueError: `weights` is empty or has fewer than two dimensions, the mask does not broadcast
            or permits every key, or `fully_masked` is unknown.

    Examples:
        >>> mask = torch.ones(6, 6, dtype=torch.bool).tril()
        >>> scores = torch.randn(2, 4, 6, 6).masked_fill(~mask, float("-inf"))
        >>> assert_masked(scores.softmax(-1), mask)
    """
    __tracebackhide__ = True
    operand = _read_weights(weights)
    permitted = _required_mask(mask, operand)
    masked = _Masked("assert_masked", operand, permitted, check_fully_masked(fully_masked))
    if not masked.check(_says_masked, mask_cause):
        shape = tuple(permitted.shape if mask is None else mask.shape)
        got = f"shape {shape} that permits every key, so there is nothing to check"
        accepted = "a boolean mask that is False where a query may not attend"
        raise NothingForbiddenError(misuse("mask", got, accepted))


def _assert_causal(
    weights: Weights,
    *,
    alignment: Alignment | None = None,
    window: int | tuple[int, int] | None = None,
    fully_masked: FullyMasked = "zero",
    queries: Tensor | None = None,
    query_len: int | None = None,
) -> None:
    """`assert_causal`, of some queries of a record too, at the positions that they had."""
    __tracebackhide__ = True
    operand = _read_weights(weights)
    declared = check_fully_masked(fully_masked)
    rule = CausalRule.read(query_len or operand.shape[-2], operand.shape[-1], alignment, window)
    every = torch.arange(rule.query_len, device="cpu")
    numbers = every if queries is None else queries.cpu()

    def says(index: Index, weight: float) -> str:
        query, key = int(numbers[index[-2]]), index[-1]
        position, of = query + rule.offset, f" of {rule.query_len}" if query_len else ""
        where = f"weights[{_commas(index)}]: query {query}{of} gives {weight:.3g} to key {key}"
        if key > position:
            return f"{where}, {_steps(key - position)} in its future (allowed 0)"
        before = _steps(position - cast("int", rule.window) - key)
        return f"{where}, {before} before its window of {rule.window} (allowed 0)"

    if as_lazy(operand) is not None or as_placed(operand) is not None:
        mask: Any = LazyMask.causal(operand.shape, rule.offset, rule.window, operand.device)
    else:
        mask = rule.rows(numbers.to(operand.device))
    permitted = cast("Tensor", as_mask(mask, operand))
    masked = _Masked("assert_causal", operand, permitted, declared)
    if not masked.check(says, lambda evidence: causal_cause(evidence, rule, numbers)):
        got = (
            f"shape {tuple(operand.shape)}, of which {rule} permits every query every key, so "
            "there is nothing to check"
        )
        accepted = "weights with a query that may not attend to every key"
        raise NothingForbiddenError(misuse("weights", got, accepted))


@partial(takes_records, of_some=_assert_causal, by_position=True)
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
        window: How many keys before its own position a query may attend to; None for all of them. A
            pair ``(left, right)`` as `sliding_window_mask` takes it is accepted where `right` is 0.
            Keys before the window must get exactly zero too.
        fully_masked: What a row without any permitted key holds, as in `assert_masked`. There are
            such rows where queries stand before the first key (``"bottom_right"`` with more queries
            than keys), or where all keys lie before their window.

    Raises:
        Failure: Some query gives weight to its future, or to a key before its window.
        TypeError: `weights` is not a dense float tensor or array, or `window`
            is neither a whole number nor a pair of them.
        ValueError: As in `assert_masked`; or the alignment is unknown or
            missing, the window reaches into the future or is below 0, or
            nothing is forbidden, as for a single query at the last key.

    Examples:
        >>> mask = torch.ones(6, 6, dtype=torch.bool).tril()
        >>> scores = torch.randn(2, 4, 6, 6).masked_fill(~mask, float("-inf"))
        >>> assert_causal(scores.softmax(-1))
    """
    __tracebackhide__ = True
    _assert_causal(weights, alignment=alignment, window=window, fully_masked=fully_masked)


@partial(takes_records, needs_mask=True)
def assert_support(
    weights: Weights, mask: Mask | None = None, *, fully_masked: FullyMasked = "zero"
) -> None:
    """Assert that weight is where the mask permits it, all of there, and nowhere else.

    Masked keys get exactly zero, and permitted keys a positive weight: a mask
    that hides too much is a defect as well.

    A permitted weight can be too small for its dtype and become zero, the sooner the narrower the
    dtype. Compare such weights before the cast, or ask only for `assert_masked`.

    Args:
        weights: As in `assert_masked`.
        mask: As there; it may permit every key.
        fully_masked: As there.

    Raises:
        Failure: Some masked key holds something else than zero, or
            some permitted key something that is not positive.
        TypeError: As in `assert_masked`.
        ValueError: As there, but for a mask that permits every key.

    Examples:
        >>> mask = torch.ones(6, 6, dtype=torch.bool).tril()
        >>> scores = torch.randn(2, 4, 6, 6).masked_fill(~mask, float("-inf"))
        >>> assert_support(scores.softmax(-1), mask)
    """
    __tracebackhide__ = True
    operand = _read_weights(weights)
    permitted = _required_mask(mask, operand)
    masked = _Masked("assert_support", operand, permitted, check_fully_masked(fully_masked))
    masked.check(_says_masked, support_cause, permitted_is_positive(_says_permitted))


@partial(takes_records, by_position=True)
def assert_padding_masked(
    weights: Weights, lengths: Lengths, *, side: Side = "right", fully_masked: FullyMasked = "zero"
) -> None:
    """Assert that keys which are padding get exactly zero weight.

    It is asked of every query, of padded ones too.

    Args:
        weights: Attention weights of shape ``(batch, ..., queries, keys)``,
            three or more dimensions, otherwise as in `assert_masked`.
        lengths: How many keys of each batch entry are real, ``(batch,)``; 0
            to the number of keys, as in `padding_mask`.
        side: The side the padding is on, ``"right"`` or ``"left"``.
        fully_masked: What the rows of a batch entry of length 0 hold, as in `assert_masked`.

    Raises:
        Failure: Some padded key gets weight.
        TypeError: `weights` is not a dense float tensor or array, or the
            lengths are not whole numbers.
        ValueError: As in `assert_masked`; or `weights` has fewer than three
            dimensions, there is not one length per batch entry, one is out of
            range, the side is unknown, or no batch entry has padding.

    Examples:
        >>> mask = padding_mask([5, 3], key_len=5)
        >>> scores = torch.randn(2, 4, 6, 5).masked_fill(~mask, float("-inf"))
        >>> assert_padding_masked(scores.softmax(-1), [5, 3])
    """
    __tracebackhide__ = True
    operand = _read_weights(weights)
    declared = check_fully_masked(fully_masked)
    one_of("side", side, SIDES)
    real = _read_lengths(lengths, operand)
    mask = padding_mask(real, operand.shape[-1], side=side, device=operand.device).view(
        -1, *[1] * (operand.ndim - 2), operand.shape[-1]
    )
    permitted = cast("Tensor", as_mask(mask, operand))
    masked = _Masked("assert_padding_masked", operand, permitted, declared)

    def says(index: Index, weight: float) -> str:
        entry, key = index[0], index[-1]
        return (
            f"weights[{_commas(index)}] gives {weight:.3g} to key {key}, padding of batch entry "
            f"{entry} (its length is {real[entry]}; allowed 0)"
        )

    masked.check(says, lambda evidence: padding_cause(evidence, real, side))


@dataclass(frozen=True)
class _Masked:
    """What is checked, under which name and mask."""

    assertion: str
    weights: Tensor
    mask: Tensor
    declared: FullyMasked

    def check(
        self, says: Says, cause: Callable[[Evidence], str | None], *more: Claim[Elements]
    ) -> bool:
        """Raise a Failure about the first claim that does not hold."""
        # Returns whether the mask forbids anything, so that something was compared.
        __tracebackhide__ = True
        zeros_declared = self.declared == "zero"
        zero = masked_is_zero(says, every_row=zeros_declared)
        of_weights = {claim.kind: claim for claim in (zero, *more)}
        # Rows are left out as rows: to leave out their weights one by one is slow.
        anywhere = by_row(masked_is_zero(says, every_row=True))
        elsewhere = replace(anywhere, regards=lambda block: block.attends)
        claims = [anywhere if zeros_declared else elsewhere, *map(by_row, more)]
        full_rows = [] if zeros_declared else self._full_rows()
        # The quick reading tells in the same wait whether there was anything to read.
        broken = first_broken(self._blocks(), [*claims, *full_rows, masks_nothing()])
        if broken is None or broken.kind == "permits":
            return broken is not None
        if broken is anywhere and first_broken(self._blocks(), [elsewhere]) is None:
            # Nothing but fully masked rows: what is said of those is said of whole rows.
            (broken,) = self._full_rows()
        if broken.kind in of_weights:
            of_weight = find(of_weights[broken.kind], elements(self.weights, self.mask))
            if of_weight is not None:
                likely = cause(Evidence.of_map(self.weights, self.mask, of_weight))
                raise failure(self.assertion, self.weights, self.mask, of_weight, likely)
        of_row = find(broken, self._blocks())
        if of_row is not None:
            likely = likely_cause(self.weights, self.mask, of_row)
            raise failure(self.assertion, self.weights, self.mask, of_row, likely)
        return True

    def _blocks(self) -> Parts[Block]:
        return blocks(self.weights, self.mask)

    def _full_rows(self) -> list[Claim[Block]]:
        """What fully masked rows hold."""
        allowed = 0.0
        if self.declared == "uniform":
            allowed = row_tolerance(self.weights.dtype, self.weights.shape[-1])
        return fully_masked_rows(self.mask, self.declared, allowed)


def _read_weights(weights: object) -> Tensor:
    operand = as_weights(weights)
    if str(operand.dtype) == "torch.float8_e8m0fnu":
        got = "dtype float8_e8m0fnu, which has no zero, so that no key can be masked in it"
        raise ValueError(misuse("weights", got, "what there was before the cast"))
    return operand


def _required_mask(mask: object, weights: Tensor) -> Tensor:
    permitted = as_mask(mask, weights)
    if permitted is None:
        raise TypeError(misuse("mask", "None", ACCEPTED_MASK))
    return permitted


def _read_lengths(lengths: object, weights: Tensor) -> list[int]:
    """Return the lengths as plain numbers."""
    batch, key_len = weights.shape[0], weights.shape[-1]
    if weights.ndim < 3:
        got = f"{weights.ndim} dimensions, shape {tuple(weights.shape)}"
        raise ValueError(misuse("weights", got, "three or more: (batch, ..., queries, keys)"))
    real = read_lengths(lengths, key_len, batch=batch)
    if min(real) == key_len:
        got = f"{real} for {key_len} keys: no batch entry has padding, so there is nothing to check"
        raise NothingForbiddenError(misuse("lengths", got, "a length below the number of keys"))
    return real


def _says(which: str, index: Index, weight: float) -> str:
    return (
        f"weights[{_commas(index)}] gives {weight:.3g} to key {index[-1]}, which the mask {which}"
    )


_says_masked: Says = partial(_says, "forbids (allowed 0)")
_says_permitted: Says = partial(_says, "permits (allowed: more than 0)")


def _steps(count: int) -> str:
    number = _WORDS[count] if count < len(_WORDS) else str(count)
    return f"{number} step{'' if count == 1 else 's'}"


def _commas(index: Index) -> str:
    return ", ".join(map(str, index))
