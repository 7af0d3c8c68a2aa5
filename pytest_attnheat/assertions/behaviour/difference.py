"""How far one output is from another, row by row, and the message about it.

A row is one position of the output. It is off by the root mean square of its
difference, as a part of its size: the root mean square of what it should be,
or of the median row where that is larger, so that a row of zeros has a scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pytest_attnheat.attention.chunks import index_of
from pytest_attnheat.attention.outcomes import rms
from pytest_attnheat.attention.tolerance import output_tolerance
from pytest_attnheat.failure import Checked, Failure, Place
from pytest_attnheat.inputs import check_number, misuse


def check_relative(tolerance: object, dtype: torch.dtype, *, strict: bool = False) -> float:
    """Return the tolerance that the caller gave, or that of the dtype for None.

    Raises:
        TypeError: Not a number.
        ValueError: Not in 0 <= tolerance < 1.
    """
    if tolerance is None:
        return output_tolerance(dtype, strict=strict)
    given = check_number(tolerance, "tolerance")
    if not 0 <= given < 1:
        raise ValueError(misuse("tolerance", repr(given), "0 <= tolerance < 1, or None"))
    return given


def relative_change(got: Tensor, expected: Tensor, *, floor: float | Tensor = 0.0) -> Tensor:
    """Return by what part of its size each row of `got` is off.

    Args:
        got: (..., length, width)
        expected: The same shape, on any device.
        floor: The size that a row has at least, where all of them may be nothing but rounding.

    Returns:
        (..., length) in float64. A row with NaN or inf is off by inf, also where both have it.
    """
    wanted = expected.detach().to(got.device, torch.float64)
    size = rms(wanted)
    usual = size.masked_fill(size.isinf(), torch.nan).nanmedian().nan_to_num(nan=0.0)
    off = rms(got.detach().to(torch.float64) - wanted)
    relative = off / torch.maximum(size, usual).clamp(min=floor)
    relative = torch.where(off == 0, torch.zeros_like(off), relative)
    return relative.nan_to_num(nan=torch.inf, posinf=torch.inf)


def check_rows(
    assertion: str,
    got: Tensor,
    expected: Tensor,
    *,
    claim: str | Callable[[Tensor], str],
    allowed: float | Tensor,
    judged: Tensor | None = None,
    may_be_none: bool = False,
    floor: float | Tensor = 0.0,
    place: Callable[[tuple[int, ...]], str] | None = None,
    cause: Callable[[Tensor], str | None] | None = None,
    repeat: str | None = None,
    again: Callable[[], object] | None = None,
) -> None:
    """Raise a Failure if any judged row of `got` is not what is expected.

    As long as none is, the host reads once from the device.

    Args:
        assertion: Its name.
        got: (..., length, width)
        expected: The same shape.
        claim: What broken rows do, for instance "outputs change with the padding"; or what says
            so, from the relative changes (..., length), 0 where not judged.
        allowed: The largest relative change of a row.
        judged: Which rows are judged, boolean (..., length); all by default.
        may_be_none: Whether it is right that no row is judged.
        floor: The size that a row has at least, see `relative_change`.
        place: Names a row by its index; "output[0, 3]" by default.
        cause: Looks at the same changes for a likely cause.
        repeat: What it takes to see the same again.
        again: Makes the call once more that gave `got`.

    Raises:
        Failure: Some row is off.
        ValueError: No row is judged.
    """
    __tracebackhide__ = True
    change = relative_change(got, expected, floor=floor)
    if judged is None:
        judged = torch.ones_like(change, dtype=torch.bool)
    judged = judged.to(change.device).expand(change.shape)
    change = change.masked_fill(~judged, 0.0)
    broken = ~(change <= allowed)
    counted, wrong = torch.stack([judged.sum(), broken.sum()]).tolist()
    if counted == 0 and not may_be_none:
        raise ValueError(f"{assertion}: no row of the output is left to compare")
    if wrong == 0:
        return
    limit = float(allowed)
    worst = index_of(change.argmax(), change.shape)
    first = index_of(broken.flatten().int().argmax(), broken.shape)
    name = place or output_place

    def placed(index: tuple[int, ...], beside: str = "") -> Place:
        said = f"{name(index)} {_off(got, expected, change, index)}{beside}"
        return Place(said, index, float(change[index]))

    raise Failure(
        assertion,
        claim if isinstance(claim, str) else claim(change),
        broken=wrong,
        of=counted,
        worst=placed(worst, f" (allowed {limit:.1e})"),
        first=None if first == worst else placed(first),
        cause=cause(change) if cause is not None else None,
        tensor=Checked.of(got),
        tolerance=limit,
        repeat=repeat,
        again=again,
    )


def output_place(index: tuple[int, ...], name: str = "output") -> str:
    """Name a row of the output, or of another tensor."""
    return f"{name}[{', '.join(map(str, index))}]"


def _off(got: Tensor, expected: Tensor, change: Tensor, index: tuple[int, ...]) -> str:
    """Say how far a row is off: absolutely, and as a part of its size."""
    row, wanted = got[index].detach(), expected[index].detach().to(got.device)
    if not bool(row.isfinite().all()):
        return f"holds {_not_finite(row)}"
    if not bool(wanted.isfinite().all()):
        return f"is compared with a row that holds {_not_finite(wanted)}"
    largest = float((row.double() - wanted.double()).abs().max())
    said = f"is off by up to {largest:.3g}"
    # Where most rows are zeros there is no size to compare with.
    share = float(change[index])
    return f"{said}, {share:.2g} of its size" if math.isfinite(share) else said


def _not_finite(row: Tensor) -> str:
    return "nan" if bool(row.isnan().any()) else "inf"
