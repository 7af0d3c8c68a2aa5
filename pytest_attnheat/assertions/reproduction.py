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

Measured, the worst of 30 seeds, six sizes up to 2048 keys, values with and
without a mean and two backends of `F.scaled_dot_product_attention` on a CPU:
weights from a softmax in float32 that were cast to float16 or bfloat16 miss
its output by 0.54 of ``rounding * sum |w||v|`` at most, whatever the scores.
Weights from scores rounded to these dtypes miss it by 0.8, 2.0, 5.1 and 12.6
of that where the scores have a standard deviation of 1, 2, 4 and 8: 0.4, 0.5,
0.6 and 0.8 of what is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from pytest_attnheat.assertions.broken_rows import build_message
from pytest_attnheat.assertions.captured import Weights, takes_records
from pytest_attnheat.assertions.reproduction_causes import Subject, likely_cause
from pytest_attnheat.assertions.scan import mask_at
from pytest_attnheat.attention.chunks import index_within, pieces
from pytest_attnheat.attention.tolerance import row_rounding
from pytest_attnheat.inputs import Operand, as_weights, check_tolerance

Array: TypeAlias = "torch.Tensor | np.ndarray[Any, Any]"
Place: TypeAlias = tuple[int, ...]

# Numbers in float64 of one operand that are looked at together: 1 MB.
_ELEMENTS = 2**17
# The range of scores that is believed: few keys hide it, and a finite mask stretches it.
_LEAST_RANGE, _MOST_RANGE = 4.0, 32.0
# What a cause may miss, in units of `rounding`.
_SLACK = 4.0
# Where the rule would let an output miss half of what it is made of, it asserts nothing.
_MEANINGLESS = 0.5

_DIMENSIONS = {
    "weights": "(..., queries, keys)",
    "value": "(..., keys, value_dim)",
    "output": "(..., queries, value_dim)",
}
_ACCEPTED = """accepted are
  weights (..., queries, keys), value (..., keys, value_dim), output (..., queries, value_dim)
  value (..., value_heads, keys, value_dim), where value_heads divide the heads of the weights
  weights (batch, queries, keys) that all heads of value (batch, heads, keys, value_dim) share
  with value of four dimensions, output merged: (batch, queries, heads * value_dim)"""


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

    A key with zero weight is not felt, even if its value is NaN or inf, as in
    `attend`. Elsewhere NaN and inf never pass, in both of output and product
    neither.

    Args:
        weights: ``(..., queries, keys)``, two or more dimensions, any float
            dtype, device and strides, with or without gradient. Nothing is
            modified. ``(batch, queries, keys)`` with `value` of four
            dimensions means that all heads share them.
        value: ``(..., keys, value_dim)``. With three or more dimensions it may
            have fewer heads than the weights, a number that divides theirs:
            grouped heads, head h of the weights uses head ``h // group`` of
            the value, as `repeat_interleave` lays them out.
        output: ``(..., queries, value_dim)`` with all heads of the weights or
            of a value that shares them; or heads merged, ``(batch, queries,
            heads * value_dim)``, all channels of head 0 first.
        tolerance: How far an output element may be off, as a part of
            ``|weights| @ |value|``. By default it follows the coarsest of the
            three dtypes, the number of keys, the range of the weights in the
            row and how far apart the values lie that they weigh, see
            `pytest_attnheat.assertions.reproduction`.

    Raises:
        AssertionError: Some element of the output is not what the weights
            make of the value.
        TypeError: An argument is not a dense float tensor or array, or they
            lie on different devices.
        ValueError: An argument is empty, the shapes do not fit, the tolerance
            is out of range, or the dtype is too coarse for a default.

    Example:
        >>> weights, value = torch.rand(2, 4, 6, 8).softmax(-1), torch.randn(2, 4, 8, 16)
        >>> assert_reproduces_output(weights, value, weights @ value)
    """
    __tracebackhide__ = True
    trio = _read(weights, value, output)
    limit = None if tolerance is None else check_tolerance(tolerance)
    if limit is None:
        _check_meaning(trio)
    if _passes_quickly(trio, limit):
        return
    finding = _find(trio, limit)
    if finding.broken:
        raise AssertionError(_message(trio, finding))


@dataclass(frozen=True)
class _Trio:
    """The three operands, in shapes that broadcast: `(..., queries, keys)` and so on.

    Attributes:
        weights: Seen as ``(*leading, queries, keys)``, with size 1 where they are shared.
        value: Seen as ``(*leading, keys, value_dim)``, with size 1 where heads are grouped.
        output: Seen as ``(*leading, queries, value_dim)``.
        given: The output as the caller passed it.
        merged: Whether heads are merged in it.
        grouped: Whether the last leading dimension of all three is that of a group.
    """

    weights: Operand
    value: Operand
    output: Operand
    given: Operand
    merged: bool
    grouped: bool

    @property
    def coarsest(self) -> torch.dtype:
        """The dtype with the largest steps."""
        dtypes = (self.weights.dtype, self.value.dtype, self.output.dtype)
        return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)

    def place(self, index: Place) -> Place:
        """Return an index into `output` as an index into the output that was given."""
        *leading, query, channel = index
        if self.grouped:
            *leading, value_head, member = leading
            leading.append(value_head * self.output.shape[-3] + member)
        if self.merged:
            *batch, head = leading
            return (*batch, query, head * self.output.shape[-1] + channel)
        return (*leading, query, channel)


@dataclass
class _Finding:
    """How many elements of the output are off, the worst and the first, as `_Trio` has them."""

    regarded: int = 0
    broken: int = 0
    excess: float = -1.0
    worst: str = ""
    worst_at: Place = ()
    first: str = ""


def _read(weights: object, value: object, output: object) -> _Trio:
    """Check the arguments, and see them in shapes that broadcast."""
    operands = {
        name: _as_operand(given, name)
        for name, given in (("weights", weights), ("value", value), ("output", output))
    }
    devices = {name: operand.device for name, operand in operands.items()}
    if len(set(devices.values())) > 1:
        on = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise TypeError(f"got {on}; accepted are three on one device")
    shapes = [tuple(operand.shape) for operand in operands.values()]
    # A NumPy array that torch cannot share has views of its own.
    viewable = [
        operand if isinstance(operand, torch.Tensor) else given
        for operand, given in zip(operands.values(), (weights, value, output), strict=True)
    ]
    try:
        w, v, o, merged, grouped = _see(*viewable)
    except _MisfitError:
        raise ValueError(
            "weights {}, value {} and output {} do not fit together; ".format(*shapes) + _ACCEPTED
        ) from None
    return _Trio(
        as_weights(w),
        as_weights(v),
        as_weights(o),
        operands["output"],
        merged,
        grouped,
    )


def _as_operand(given: object, name: str) -> Operand:
    """Read an argument; an error names the dimensions that this one has."""
    try:
        return as_weights(given, name)
    except (TypeError, ValueError) as error:
        words = str(error).replace("(..., queries, keys)", _DIMENSIONS[name])
        raise type(error)(words) from None


class _MisfitError(Exception):
    """Shapes that do not fit together."""


def _see(weights: Any, value: Any, output: Any) -> tuple[Any, Any, Any, bool, bool]:
    """Return views of shapes that broadcast, whether heads are merged and whether grouped."""
    shared = weights.ndim == 3 and value.ndim == 4
    if shared:
        weights = weights[:, None]
    merged = weights.ndim == 4 and output.ndim == 3
    if merged:
        output = _split(output, -1, value.shape[-1]).swapaxes(1, 2)
    grouped = not shared and weights.ndim == value.ndim > 2
    grouped = grouped and value.shape[-3] < weights.shape[-3] == output.shape[-3]
    if grouped:
        members = weights.shape[-3] // value.shape[-3]
        weights, output = _split(weights, -3, members), _split(output, -3, members)
        value = value[..., None, :, :]
    leading = tuple(output.shape[:-2])
    (query_len, key_len), value_dim = weights.shape[-2:], value.shape[-1]
    wanted = (
        (*((leading[0], 1) if shared else leading), query_len, key_len),
        (*((*leading[:-1], 1) if grouped else leading), key_len, value_dim),
        (*leading, query_len, value_dim),
    )
    if wanted != tuple(tuple(x.shape) for x in (weights, value, output)):
        raise _MisfitError
    return weights, value, output, merged, grouped


def _split(array: Any, dim: int, inner: int) -> Any:
    """Return a view in which a dimension is two, the second of size `inner`."""
    shape = list(array.shape)
    at = dim % len(shape)
    if shape[at] % inner:
        raise _MisfitError
    return array.reshape(*shape[:at], shape[at] // inner, inner, *shape[at + 1 :])


def _check_meaning(trio: _Trio) -> None:
    dtype, key_len = trio.coarsest, trio.weights.shape[-1]
    most = row_rounding(dtype, key_len) * (1 + _MOST_RANGE / 4)
    if most >= _MEANINGLESS:
        name = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"{name} is too coarse to tell whether weights over {key_len} keys made an output "
            f"(rounding alone may be off by {most:.2g}); check before the cast to {name}, or "
            "pass tolerance="
        )


@dataclass(frozen=True)
class _Part:
    """Some elements of the output beside what the weights make of the value."""

    index: tuple[slice, ...]
    output: torch.Tensor
    expected: torch.Tensor
    allowed: torch.Tensor

    @property
    def off(self) -> torch.Tensor:
        """How far each element is off."""
        return (self.output - self.expected).abs()

    @property
    def broken(self) -> torch.Tensor:
        """Which elements are further off than allowed; NaN and infinity always are."""
        off = self.off
        return ~((off <= self.allowed) & off.isfinite())


def _passes_quickly(trio: _Trio, tolerance: float | None) -> bool:
    """Tell quickly whether every element is right, waiting for the device once.

    True is certain. False means that the thorough reading must decide: the
    NaN in the value of a key without weight, for instance, spreads here.
    """
    broken = torch.zeros((), dtype=torch.bool, device=trio.weights.device)
    for part in _parts(trio, tolerance, careful=False):
        broken |= part.broken.any()
    return not bool(broken)


def _find(trio: _Trio, tolerance: float | None) -> _Finding:
    finding = _Finding()
    for part in _parts(trio, tolerance, careful=True):
        broken = part.broken
        finding.regarded += broken.numel()
        if not bool(broken.any()):
            continue
        finding.broken += int(broken.sum())
        if not finding.first:
            at = int(broken.flatten().int().argmax())
            finding.first = _describe(trio, part, at)
        excess = (part.off - part.allowed).nan_to_num(nan=math.inf, posinf=math.inf)
        at = int(excess.masked_fill_(~broken, -1).flatten().argmax())
        if float(excess.flatten()[at]) > finding.excess:
            finding.excess = float(excess.flatten()[at])
            finding.worst = _describe(trio, part, at)
            finding.worst_at = index_within(part.index, at)
    return finding


def _parts(trio: _Trio, tolerance: float | None, *, careful: bool) -> Iterator[_Part]:
    """Yield all elements of the output in parts of bounded size, with what they should be."""
    *_, query_len, value_dim = trio.output.shape
    key_len = trio.weights.shape[-1]
    # Several whole maps, or a part of one, whichever of its operands is the largest.
    maps = _ELEMENTS // (key_len * max(query_len, value_dim))
    rows = maps * query_len if maps else max(1, _ELEMENTS // max(min(key_len, 4096), value_dim))
    keys = key_len if maps else max(1, min(key_len, 4096, _ELEMENTS // value_dim))
    for index in pieces(trio.output.shape[:-1], rows if maps else min(rows, query_len)):
        yield _part(trio, index, keys, tolerance, careful=careful)


def _part(
    trio: _Trio, rows: tuple[slice, ...], step: int, tolerance: float | None, *, careful: bool
) -> _Part:
    *_, value_dim = trio.output.shape
    every_channel = slice(0, value_dim)
    index = (*rows, every_channel)
    output = trio.output[index].double()
    expected, size, mean, square = (torch.zeros_like(output) for _ in range(4))
    felt = torch.zeros_like(output, dtype=torch.bool)
    least = torch.full_like(output[..., :1], math.inf)
    largest, sums = torch.zeros_like(least), torch.zeros_like(least)
    zero = torch.zeros_like(least, dtype=torch.bool)
    key_len = trio.weights.shape[-1]
    for start in range(0, key_len, step):
        keys = slice(start, min(start + step, key_len))
        weights = mask_at(trio.weights, (*rows, keys)).double()
        value = mask_at(trio.value, (*rows[:-1], keys, every_channel)).double()
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
    if tolerance is None:
        log_range = (largest / least).log().clamp(_LEAST_RANGE, _MOST_RANGE)
        if -math.log(torch.finfo(trio.weights.dtype).smallest_normal) < _MOST_RANGE:
            # A zero may be a weight that was too small: the range does not show.
            log_range = log_range.masked_fill(zero, _MOST_RANGE)
        spread = _spread(sums, mean, square, size, row_rounding(trio.coarsest, key_len))
        relative = size + log_range / 4 * spread
        allowed = row_rounding(trio.coarsest, key_len) * relative
    else:
        allowed = tolerance * size
    # An output below the normal numbers of its dtype is off by up to half a step.
    info = torch.finfo(trio.output.dtype)
    allowed = allowed + info.smallest_normal * info.eps
    return _Part(index, output, expected.masked_fill(felt, math.nan), allowed)


def _spread(
    sums: torch.Tensor,
    mean: torch.Tensor,
    square: torch.Tensor,
    size: torch.Tensor,
    slack: float,
) -> torch.Tensor:
    """Return how far the values that an element is made of lie apart.

    Args:
        sums: ``sum |w|``.
        mean: ``sum |w| v``, and so on.
        square: ``sum |w| v ** 2``.
        size: ``sum |w| |v|``.
        slack: What rounding does to `sums`.
    """
    # What dropout took away is gone from the mean, and the normaliser knew of it.
    whole = (sums - 1).abs() <= slack
    apart = (sums * square - torch.where(whole, mean.square(), 0)).clamp(min=0).sqrt()
    # The squares of the largest float64 overflow.
    return torch.where(apart.isfinite(), apart, size)


def _describe(trio: _Trio, part: _Part, at: int) -> str:
    place = ", ".join(map(str, trio.place(index_within(part.index, at))))
    output, expected, off, allowed = (
        float(numbers.expand(part.output.shape).flatten()[at])
        for numbers in (part.output, part.expected, part.off, part.allowed)
    )
    # As many digits as it takes to see the difference.
    digits = 3
    if math.isfinite(off) and 0 < off < abs(expected):
        digits = min(17, max(3, 2 + math.ceil(math.log10(abs(expected) / off))))
    how = f"off by {off:.1e}; allowed {allowed:.1e}"
    if not math.isfinite(off):
        how = f"{'nan' if math.isnan(output + expected) else 'infinity'} never passes"
    return (
        f"output[{place}] is {output:.{digits}g}, weights @ value gives {expected:.{digits}g} "
        f"({how})"
    )


def _message(trio: _Trio, finding: _Finding) -> str:
    subject = Subject(
        trio.weights,
        trio.value,
        trio.output,
        finding.worst_at,
        merged=trio.merged,
        grouped=trio.grouped,
        slack=_SLACK * row_rounding(trio.coarsest, trio.weights.shape[-1]),
    )
    return build_message(
        "assert_reproduces_output",
        f"{finding.broken} of {finding.regarded} output elements are not weights @ value",
        trio.given,
        worst=finding.worst,
        first=None if finding.first == finding.worst else finding.first,
        cause=likely_cause(subject),
    )
