"""Whether two outputs are the same bit by bit, and how far apart they are if not.

Numbers are counted in units in the last place of their own dtype: how many numbers that it can
hold lie between two of them. 0.0 and -0.0 are 0 units apart, though their bits differ; the smallest
number above zero and the one below are 2 apart, the largest finite number and inf 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ...attention.chunks import index_of
from ...failure import Checked, Failure, Place, number_text
from ...inputs import dtype_name

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_OTHER_ORDER = (
    "sums are added up in another order: another kernel, another tile, or another split of the "
    "keys, where a call has another shape?"
)


def differing_bits(a: Tensor, b: Tensor) -> Tensor:
    """Return where two tensors of one float dtype differ; NaN is NaN, whatever its bits."""
    return (_bits(a) != _bits(b)) & ~(_is_nan(a) & _is_nan(b))


def units_apart(a: Tensor, b: Tensor) -> Tensor:
    """Return how many units in the last place two tensors are apart, of their shape, in float64."""
    # Between NaN and a number there are inf, between NaN and NaN 0.
    (size_a, below_a), (size_b, below_b) = _magnitude(a), _magnitude(b)
    # Through zero both sizes count; together they may be more than int64 holds.
    through = size_a.double() + size_b.double()
    apart = torch.where(below_a == below_b, (size_a - size_b).abs().double(), through)
    nan_a, nan_b = _is_nan(a), _is_nan(b)
    return apart.masked_fill(nan_a ^ nan_b, math.inf).masked_fill(nan_a & nan_b, 0.0)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()])


def _magnitude(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bits without the sign, as int64, and whether the sign is minus."""
    bits = _bits(tensor)
    return (bits & torch.iinfo(bits.dtype).max).long(), bits < 0


def _is_nan(tensor: Tensor) -> Tensor:
    # Of float8, torch compares nothing.
    return (tensor.detach().float() if tensor.element_size() == 1 else tensor.detach()).isnan()


def check_bits(
    assertion: str,
    got: Tensor,  # (..., length, width)
    expected: Tensor,  # The same shape and dtype
    *,
    claim: Callable[[Tensor], str],  # What broken rows do, from the changes
    change: Tensor,  # By what part of its size each row is off, (..., length)
    allowed: float,  # How much of that is ordinary rounding
    judged: Tensor,  # Which rows are judged, boolean (..., length)
    place: Callable[[tuple[int, ...]], str],  # Names a row by its index
    cause: Callable[[Tensor], str | None] | None,  # Looks at changes beyond rounding for a cause
    cause_of_bits: Callable[[Tensor], str | None] | None,  # Looks at which rows differ, by rounding
    repeat: str | None,  # What it takes to see the same again
    again: Callable[[], object] | None,  # Makes the call once more that gave `got`
) -> None:
    """Raise a Failure if any element of a judged row has other bits than expected."""
    __tracebackhide__ = True
    dtypes = dtype_name(got), dtype_name(expected)
    if dtypes[0] != dtypes[1]:
        raise Failure(assertion, f"the output is {dtypes[0]} in one call, {dtypes[1]} in another",
                      tensor=Checked.of(got), repeat=repeat, again=again)  # fmt: skip
    expected = expected.detach().to(got.device)
    differs = differing_bits(got, expected) & judged.unsqueeze(-1)
    broken = int(differs.sum())
    if broken == 0:
        return
    rows = differs.any(-1)
    off = change.masked_fill(~rows, 0.0)
    wrong = int((~(off <= allowed)).sum())
    apart = units_apart(got, expected).masked_fill(~differs, -1.0)
    worst, first = (
        index_of(f, got.shape) for f in (apart.argmax(), differs.flatten().int().argmax())
    )
    if float(apart[worst]) == 0:
        verdict = "though equal but for the signs of zeros"
    elif wrong == 0:
        verdict = "though right to rounding"
    else:
        verdict = f"and {wrong} of {int(rows.sum())} rows that differ are off by more than rounding"
    found = cause_of_bits(rows) if cause_of_bits is not None and wrong == 0 else None
    if wrong:
        found = cause(off) if cause is not None else None
    elif found is None and float(apart[worst]) > 0:
        found = _OTHER_ORDER

    def placed(index: tuple[int, ...], more: str = "") -> Place:
        one, other = float(got[index]), float(expected[index])
        beside = one - other
        texts = [number_text(number, beside=beside) for number in (one, other)]
        units = float(apart[index])
        far = f"{units:.15g} unit{'s' * (units != 1)} in the last place apart"
        far = far if math.isfinite(units) else "as far apart as NaN is from a number"
        said = (
            f"{place(index[:-1])} element {index[-1]} is {texts[0]} here, {texts[1]} there, {far}"
        )
        return Place(said + more, index, one)

    limit = f" ({dtypes[0]}; none allowed; ordinary rounding is {allowed:.1e} of a row)"
    raise Failure(
        assertion, f"elements are not bitwise the same, {verdict}: {claim(off)}", broken=broken,
        of=int(judged.sum()) * got.shape[-1], worst=placed(worst, limit),
        first=None if first == worst else placed(first), cause=found, tensor=Checked.of(got),
        tolerance=0.0, repeat=repeat, again=again,
    )  # fmt: skip
