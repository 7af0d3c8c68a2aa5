"""An assertion that weights are the ones that made an output.

An element of the output may be off by::

    row_rounding(dtype, key_len) * (sum |w||v| + clamp(log_range, 4, 32) / 4 * spread)

- ``rounding`` is the rule for the sum of a row, see `tolerance`, in the
  coarsest of the three dtypes: about 2 eps, and the sum in float32. Of the
  2 eps, the weights that were returned, those that a fused kernel used and the
  output take half an eps each; half is left for the normaliser. ``sum |w||v|``
  is what is added up there without its signs.
- The rest is for scores that were rounded to the dtype before the softmax, on
  one of the two ways only: a fused kernel keeps them in float32, a softmax
  written by hand often does not. A score `s` is then off by up to half an eps
  times ``|s|``. The normaliser takes off what such errors have in common, so
  they move the output by ``sum w e (v - output)`` and hence by no more than
  the largest error times ``spread``, the standard deviation of the values
  under the weights. A row with all its weight on one key has none, and keys
  with next to no weight do not count, however far off their scores are. Where
  rows do not sum to 1, as after dropout, ``spread`` is about zero, not about
  the mean.
- The scores are not known here, but where they lie on both sides of zero none
  is larger than their range in the row, which is the log of the largest over
  the smallest weight. Rows of few keys may hide the range: at least 4 is
  taken, four standard deviations of the unit variance that scaled attention is
  made for. A finite mask stretches it: no more than 32 is taken. Just that is
  taken of float16 rows with a zero, which may be a weight of 3e-8. So no more
  than 9 times ``rounding`` is ever allowed, where the spread is as large as
  what is added up: 14 % in bfloat16, 2 % in float16.

Measured, the worst of 30 seeds, six sizes up to 2048 keys, values with and without a mean and two
backends of `F.scaled_dot_product_attention` on a CPU: weights from a softmax in float32 that were
cast to float16 or bfloat16 miss its output by 0.54 of ``rounding * sum |w||v|`` at most, whatever
the scores. Weights from scores rounded to these dtypes miss it by 0.8, 2.0, 5.1 and 12.6 of that
where the scores have a standard deviation of 1, 2, 4 and 8: 0.4, 0.5, 0.6 and 0.8 of what is
allowed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch

from ..attention.chunks import pieces
from ..failure import number_text
from ..inputs import check_tolerance, dtype_name, misuse
from .captured import Weights, takes_records
from .claims import Claim, Spot, find, first_broken
from .product import Product, likely_cause
from .scan import Parts, holds_nothing, mask_at

Array: TypeAlias = "torch.Tensor | np.ndarray[Any, Any]"

# Numbers in float64 of one operand that are looked at together: 1 MB.
_ELEMENTS = 2**17
# The range of scores that is believed: few keys hide it, and a finite mask stretches it.
_LEAST_RANGE, _MOST_RANGE = 4.0, 32.0
# The significant digits of an output and of what it should be.
_LEAST_DIGITS = 3
# Where the rule would let an output miss half of what it is made of, it asserts nothing.
_MEANINGLESS = 0.5


@takes_records
def assert_reproduces_output(
    weights: Weights,
    value: Array | None = None,
    output: Array | None = None,
    *,
    tolerance: float | None = None,
) -> None:
    """Assert that the weights are the ones that made the output: weights @ value is the output.

    It exposes weights that were averaged over heads or belong to another head,
    that went through dropout (or did not, where the output did), and masks or
    scales that only one of the two has seen.

    A key with zero weight is not felt, even if its value is NaN or inf, as in `attend`. Elsewhere
    NaN and inf never pass, in both of output and product neither.

    Args:
        weights: ``(..., queries, keys)``, two or more dimensions, any float dtype, device and
            strides, with or without gradient. Nothing is modified. ``(batch, queries, keys)`` with
            `value` of four dimensions means that all heads share them.
        value: ``(..., keys, value_dim)``. With three or more dimensions it may have fewer heads
            than the weights, a number that divides theirs: grouped heads, head h of the weights
            uses head ``h // group`` of the value, as `repeat_interleave` lays them out.
        output: ``(..., queries, value_dim)`` with all heads of the weights or
            of a value that shares them; or heads merged, ``(batch, queries,
            heads * value_dim)``, all channels of head 0 first.
        tolerance: How far an output element may be off, as a part of ``|weights| @ |value|``. By
            default it follows the coarsest of the three dtypes, the number of keys, the range of
            the weights in the row and how far apart the values lie that they weigh, see
            `pytest_attnheat.assertions.reproduction`.

    Raises:
        Failure: Some element of the output is not what the weights make of the value.
        TypeError: An argument is not a dense float tensor or array, or they
            lie on different devices.
        ValueError: An argument is empty, the shapes do not fit, the tolerance
            is out of range, or the dtype is too coarse for a default.

    Examples:
        >>> weights, value = torch.rand(2, 4, 6, 8).softmax(-1), torch.randn(2, 4, 8, 16)
        >>> assert_reproduces_output(weights, value, weights @ value)
    """
    __tracebackhide__ = True
    product = Product.read(weights, value, output)
    limit = None if tolerance is None else check_tolerance(tolerance)
    if limit is None:
        _check_meaning(product)
    claim = Claim(
        statement="output elements are not weights @ value", kind="output",
        regards=lambda part: torch.ones_like(part.output, dtype=torch.bool),
        value=lambda part: part.output, deviation=lambda part: part.off,
        allowed=lambda part: part.allowed, says=partial(_says, product), given=product.index_given,
    )  # fmt: skip
    # To have passed is certain. Else the careful reading decides: the NaN in the value of a key
    # without weight, for instance, spreads in the quick one.
    if first_broken(_parts(product, limit, careful=False), [claim]) is None:
        return
    finding = find(claim, _parts(product, limit, careful=True))
    if finding is not None:
        cause = likely_cause(replace(product, worst=product.index_seen(finding.worst.index)))
        raise finding.failure("assert_reproduces_output", product.given, cause)


def _check_meaning(product: Product) -> None:
    most = product.rounding * (1 + _MOST_RANGE / 4)
    if most >= _MEANINGLESS:
        name, key_len = dtype_name(product.coarsest), product.weights.shape[-1]
        got = (
            f"{name}, which is too coarse to tell whether weights over {key_len} keys made an "
            f"output (rounding alone may be off by {most:.2g})"
        )
        raise ValueError(misuse("dtype", got, "what there was before the cast, or tolerance="))


@dataclass(frozen=True)
class _Part:
    """Some elements of the output beside what the weights make of the value."""

    index: tuple[slice, ...]
    output: torch.Tensor
    expected: torch.Tensor
    allowed: torch.Tensor

    @property
    def off(self) -> torch.Tensor:
        """How far each element is off; NaN where that is not finite, which never passes."""
        off = (self.output - self.expected).abs()
        return off.masked_fill_(~off.isfinite(), math.nan)


def _parts(product: Product, tolerance: float | None, *, careful: bool) -> Parts[_Part]:
    """Return all elements of the output in parts of bounded size, with what they should be."""
    # Of weights on several ranks, those of the rows that lie here.
    here = product.here
    own = product if here is None else here.product
    *_, query_len, value_dim = own.output.shape
    key_len = product.weights.shape[-1]
    # Several whole maps, or a part of one, whichever of its operands is the largest.
    maps = _ELEMENTS // max(1, key_len * max(query_len, value_dim))
    rows = maps * query_len if maps else max(1, _ELEMENTS // max(min(key_len, 4096), value_dim))
    keys = key_len if maps else max(1, min(key_len, 4096, _ELEMENTS // value_dim))

    def make() -> Iterator[_Part]:
        if 0 in own.output.shape:
            return
        for index in pieces(own.output.shape[:-1], rows if maps else min(rows, query_len)):
            yield _part(product, index, keys, tolerance, careful=careful)

    return Parts(make, None if here is None else here.placed, of_rows=True)


def _part(
    product: Product, rows: tuple[slice, ...], step: int, tolerance: float | None, *, careful: bool
) -> _Part:
    own = product if product.here is None else product.here.product
    *_, value_dim = own.output.shape
    every_channel = slice(0, value_dim)
    index = (*rows, every_channel)
    output = own.output[index].double()
    expected, size, mean, square = (torch.zeros_like(output) for _ in range(4))
    felt = torch.zeros_like(output, dtype=torch.bool)
    least = torch.full_like(output[..., :1], math.inf)
    largest, sums = torch.zeros_like(least), torch.zeros_like(least)
    zero = torch.zeros_like(least, dtype=torch.bool)
    key_len = own.weights.shape[-1]
    for start in range(0, key_len, step):
        keys = slice(start, min(start + step, key_len))
        if holds_nothing(own.weights, (*rows, keys)):
            zero.fill_(True)
            continue
        weights = mask_at(own.weights, (*rows, keys)).double()
        value = mask_at(own.value, (*rows[:-1], keys, every_channel)).double()
        if careful:
            bad = ~value.isfinite()
            felt |= ((weights != 0).double() @ bad.double()) > 0
            value = value.masked_fill(bad, 0)
        expected += weights @ value
        magnitude = weights.abs()
        size += magnitude @ value.abs()
        if tolerance is not None:
            continue
        mean += magnitude @ value
        square += magnitude @ value.square()
        sums += magnitude.sum(-1, keepdim=True)
        none = magnitude == 0
        zero |= none.any(-1, keepdim=True)
        some = magnitude.masked_fill(none, math.inf)
        least = torch.minimum(least, some.amin(-1, keepdim=True))
        largest = torch.maximum(largest, magnitude.amax(-1, keepdim=True))
    if product.here is not None:  # other ranks have other keys of these rows
        over_keys = product.here.placed.over_keys
        widths = [value_dim] * 4 + [1]
        added = over_keys(torch.cat([expected, size, mean, square, sums], -1), torch.add)
        expected, size, mean, square, sums = torch.split(added, widths, -1)
        felt, zero = (over_keys(one, torch.logical_or) for one in (felt, zero))
        least, largest = over_keys(least, torch.minimum), over_keys(largest, torch.maximum)
        least = least.masked_fill(sums.isnan(), math.nan)  # which a minimum may lose
        index = tuple(slice(span.start + at, span.stop + at)
                      for span, at in zip(index, product.here.offset, strict=True))  # fmt: skip
    if tolerance is None:
        log_range = (largest / least).log().clamp(_LEAST_RANGE, _MOST_RANGE)
        if -math.log(torch.finfo(product.weights.dtype).smallest_normal) < _MOST_RANGE:
            # A zero may be a weight that was too small: the range does not show.
            log_range = log_range.masked_fill(zero, _MOST_RANGE)
        spread = _spread(sums, mean, square, size, product.rounding)
        allowed = product.rounding * (size + log_range / 4 * spread)
    else:
        allowed = tolerance * size
    # An output below the normal numbers of its dtype is off by up to half a step.
    info = torch.finfo(product.output.dtype)
    allowed = allowed + info.smallest_normal * info.eps
    return _Part(index, output, expected.masked_fill(felt, math.nan), allowed)


def _spread(
    sums: torch.Tensor, mean: torch.Tensor, square: torch.Tensor, size: torch.Tensor, slack: float
) -> torch.Tensor:
    """Return how far the values that an element is made of lie apart, from sums over its keys."""
    # `sums` is ``sum |w|``, with a `slack` of rounding, `mean` ``sum |w| v``, `square` ``sum |w| v
    # ** 2``, and `size` ``sum |w| |v|``.
    # What dropout took away is gone from the mean, and the normaliser knew of it.
    whole = (sums - 1).abs() <= slack
    apart = (sums * square - torch.where(whole, mean.square(), 0)).clamp(min=0).sqrt()
    # The squares of the largest float64 overflow.
    return torch.where(apart.isfinite(), apart, size)


def _says(product: Product, part: _Part, spot: Spot) -> str:
    place = ", ".join(map(str, product.index_given(spot.index)))
    within = tuple(i - span.start for i, span in zip(spot.index, part.index, strict=True))
    expected = float(part.expected[within])
    output, made = (
        number_text(number, beside=spot.deviation, least=_LEAST_DIGITS)
        for number in (spot.value, expected)
    )
    how = f"off by {spot.deviation:.1e}; allowed {spot.allowed:.1e}"
    if math.isnan(spot.deviation):
        how = f"{'nan' if math.isnan(spot.value + expected) else 'infinity'} never passes"
    return f"output[{place}] is {output}, weights @ value gives {made} ({how})"
