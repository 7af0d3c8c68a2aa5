"""What is the same for every kind of code under test.

A subject is an attention function (`functions`), which has the signature of
`torch.nn.functional.scaled_dot_product_attention`, or a sequence model (`models`), which is given
one sequence and returns one. Both have the same methods: `models.Subject` is either.

Query heads that follow one another may share one head of keys and values: then `group` is how
many share one; with 1, everything stays as it is, also without any heads.

Two outputs are compared row by row. A row is one position of the output. It is off by the root mean
square of its difference, as a part of its size: the root mean square of what it should be, or of
the median row where that is larger, so that a row of zeros has a scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ...attention.call import Call
from ...attention.chunks import index_of
from ...attention.outcomes import rms
from ...attention.tolerance import output_tolerance
from ...callables import identical, modules_in, parameters_of, seed_all
from ...failure import Checked, Failure, Place
from ...inputs import check_tolerance, misuse
from .bitwise import check_bits, differing_bits


def check_count(inputs: Sequence[object], assertion: str) -> None:
    """Refuse what are inputs neither of an attention function nor of a sequence model."""
    if len(inputs) not in (1, 3):
        raise TypeError(
            f"{assertion}: got {len(inputs)} inputs; accepted is query, key and value of an "
            "attention function, or the one input of a sequence model"
        )


def as_input(tensor: object, name: str) -> Tensor:
    """Return an input of a subject, detached."""
    accepted = "a dense torch.Tensor with numbers in it"
    if not isinstance(tensor, Tensor):
        raise TypeError(misuse(name, type(tensor).__name__, accepted))
    if tensor.is_nested or tensor.layout != torch.strided or tensor.device.type == "meta":
        kind = "nested" if tensor.is_nested else f"{tensor.layout} {tensor.device.type}"
        raise TypeError(misuse(name, f"a {kind} tensor", accepted))
    if tensor.numel() == 0:
        raise ValueError(
            f"{name}: shape {tuple(tensor.shape)} has no elements, so there is nothing to check; "
            f"accepted is {accepted}"
        )
    # Of a tensor made in inference mode autograd can save nothing.
    return tensor.detach().clone() if tensor.is_inference() else tensor.detach()


def begin(seed: int | None) -> None:
    """Start the random numbers of a call, if there is a seed for them."""
    if seed is not None:
        seed_all(seed)


def settled(
    subject: object, call: Callable[[], Tensor], *, training: bool, seed: int, exact: bool = False
) -> Tensor:
    """Return what a call of a subject gives, but refuse one that answers at random."""
    # In training it may: then each call starts from `seed`. Where bits are judged (`exact`), what
    # two calls differ by in rounding is no refusal.
    begin(seed if training else None)
    first = call()
    begin(seed if training else None)
    second = call()
    if not identical(first, second) and differ(
        second, first, output_tolerance(first.dtype, strict=not exact)
    ):
        raise ValueError(_random_subject(subject))
    return first


def _random_subject(subject: object) -> str:
    repeat = "pass training=True, which repeats every call from the same seed"
    advice = f"call .eval() on it, or {repeat}"
    training = [m for m in modules_in(subject) if any(part.training for part in m.modules())]
    if not training:
        return (
            "the subject is random: two calls with the same input give different outputs, so no "
            "comparison would mean anything: dropout in evaluation mode? assert_deterministic "
            f"looks for it. Or {repeat}"
        )
    dropouts = [
        f"{name or type(part).__name__} (p={part.p})"
        for module in training
        for name, part in module.named_modules()
        if isinstance(part, nn.modules.dropout._DropoutNd) and part.training and part.p > 0
    ]
    because = f" ({', '.join(dropouts[:3])}{', ...' * (len(dropouts) > 3)})" if dropouts else ""
    return (
        f"{type(training[0]).__name__} is in training mode{because}: two calls with the same input "
        f"give different outputs, so no comparison would mean anything; {advice}"
    )


def coarsest(*tensors: Tensor) -> torch.dtype:
    """The coarsest dtype that an output may have been computed in: its own, or that of autocast."""
    dtypes = [tensor.dtype for tensor in tensors]
    device = tensors[0].device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtypes.append(torch.get_autocast_dtype(device))
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def differ(
    got: Tensor, expected: Tensor, allowed: float | Tensor, judged: Tensor | None = None
) -> bool:
    """Whether some judged row of two outputs differs by more than is allowed."""
    wrong = relative_change(got, expected) > allowed
    if judged is not None:
        wrong = wrong & judged.to(wrong.device)
    return bool(wrong.any())


def listed(name: str, numbers: Sequence[int]) -> str:
    """Name a few of some tokens or keys; empty where there are none."""
    shown = ", ".join(map(str, numbers[:4])) + ", ..." * (len(numbers) > 4)
    return shown and f"{name}{'s' * (len(numbers) > 1)} {shown}"


def holds(suspicion: Callable[[], bool]) -> bool:
    """Tell whether a likely cause is the one; not if the subject refuses the unusual inputs."""
    try:
        return suspicion()
    except Exception:  # whatever code under test raises: the failure itself is to be reported
        return False


def as_of_keys(leading: Sequence[int], group: int) -> tuple[int, ...]:
    """Return the leading index of a query, or the leading shape of all, as that of the keys."""
    if group == 1:
        return tuple(leading)
    return (*leading[:-1], leading[-1] // group)


def for_each_query_head(of_keys: Tensor, group: int, *, dim: int = -2) -> Tensor:
    """Repeat what belongs to a head of keys for the query heads that share it."""
    return of_keys if group == 1 else of_keys.repeat_interleave(group, dim)


def of_the_first(of_queries: Tensor, group: int, *, dim: int = -2) -> Tensor:
    """Of the query heads that share their keys, take what belongs to the first."""
    return of_queries if group == 1 else _grouped(of_queries, group, dim).select(dim, 0)


def of_any(of_queries: Tensor, group: int) -> Tensor:
    """Tell what is true of any of the query heads that share their keys."""
    return of_queries if group == 1 else _grouped(of_queries, group, -2).any(-2)


def _grouped(of_queries: Tensor, group: int, dim: int) -> Tensor:
    # Counted from the end, a dimension is then that of the heads within a group.
    assert dim < 0
    return torch.unflatten(of_queries, dim, (-1, group))


def check_relative(tolerance: object, dtype: torch.dtype, *, strict: bool = False) -> float:
    """Return the tolerance that the caller gave, as `check_tolerance`; for None, of the dtype."""
    default = tolerance is None
    return output_tolerance(dtype, strict=strict) if default else check_tolerance(tolerance)


def relative_change(got: Tensor, expected: Tensor, *, floor: float | Tensor = 0.0) -> Tensor:
    """Return by what part of its size each row of `got` (..., length, width) is off, in float64."""
    # A row with NaN or inf is off by inf, also where both have it. `floor`: the size that a row has
    # at least, where all of them may be nothing but rounding.
    wanted = expected.detach().to(got.device, torch.float64)
    size = rms(wanted)
    usual = size.masked_fill(size.isinf(), torch.nan).nanmedian().nan_to_num(nan=0.0)
    off = rms(got.detach().to(torch.float64) - wanted)
    relative = off / torch.maximum(size, usual).clamp(min=floor)
    relative = torch.where(off == 0, torch.zeros_like(off), relative)
    return relative.nan_to_num(nan=torch.inf, posinf=torch.inf)


def check_rows(
    assertion: str,
    got: Tensor,  # (..., length, width)
    expected: Tensor,  # The same shape
    *,
    # What broken rows do, for instance "outputs change with the padding"; or what says so, from the
    # relative changes (..., length), 0 where not judged
    claim: str | Callable[[Tensor], str],
    allowed: float | Tensor,  # The largest relative change of a row
    judged: Tensor | None = None,  # Which rows are judged, boolean (..., length); all by default
    may_be_none: bool = False,  # Whether it is right that no row is judged
    floor: float | Tensor = 0.0,  # The size that a row has at least, see `relative_change`
    place: Callable[[tuple[int, ...]], str] | None = None,  # Names a row by its index
    cause: Callable[[Tensor], str | None] | None = None,  # Looks for a likely cause
    # Whether every element must be bitwise the same; `allowed` then says what would be rounding
    # alone, see `bitwise`
    exact: bool = False,
    cause_of_bits: Callable[[Tensor], str | None] | None = None,  # Looks at rows that differ
    repeat: str | None = None,  # What it takes to see the same again
    again: Callable[[], object] | None = None,  # Makes the call once more that gave `got`
) -> None:
    """Raise a Failure if any judged row of `got` is not what is expected."""
    # As long as none is, the host reads once from the device.
    __tracebackhide__ = True
    compared = _without_equal_infinities(got, expected) if exact else (got, expected)
    change = relative_change(*compared, floor=floor)
    if judged is None:
        judged = torch.ones_like(change, dtype=torch.bool)
    judged = judged.to(change.device).expand(change.shape)
    change = change.masked_fill(~judged, 0.0)
    broken = ~(change <= allowed)
    counted, wrong = torch.stack([judged.sum(), broken.sum()]).tolist()
    if counted == 0 and not may_be_none:
        raise ValueError(f"{assertion}: no row of the output is left to compare")
    name = place or output_place
    if exact:
        check_bits(
            assertion, got, expected, change=change, allowed=float(allowed), judged=judged,
            claim=(lambda _: claim) if isinstance(claim, str) else claim, place=name, cause=cause,
            cause_of_bits=cause_of_bits, repeat=repeat, again=again,
        )  # fmt: skip
        return
    if wrong == 0:
        return
    limit = float(allowed)
    worst = index_of(change.argmax(), change.shape)
    first = index_of(broken.flatten().int().argmax(), broken.shape)

    def placed(index: tuple[int, ...], beside: str = "") -> Place:
        said = f"{name(index)} {_off(got, expected, change, index)}{beside}"
        return Place(said, index, float(change[index]))

    raise Failure(
        assertion, claim if isinstance(claim, str) else claim(change), broken=wrong, of=counted,
        worst=placed(worst, f" (allowed {limit:.1e})"),
        first=None if first == worst else placed(first),
        cause=cause(change) if cause is not None else None, tensor=Checked.of(got), tolerance=limit,
        repeat=repeat, again=again,
    )  # fmt: skip


def _without_equal_infinities(got: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """Both, with 0 where both have the same NaN or infinity: it is no difference of their bits."""
    if got.dtype != expected.dtype:
        return got, expected
    expected = expected.detach().to(got.device)
    same = ~differing_bits(got, expected)
    numbers = [one.detach().double() for one in (got, expected)]  # float8 has no operations
    alike = same & ~numbers[1].isfinite()
    return numbers[0].masked_fill(alike, 0.0), numbers[1].masked_fill(alike, 0.0)


@dataclass(frozen=True)
class Compared:
    """Two outputs that are to be the same: arguments of `check_rows`, by their names."""

    got: Tensor
    expected: Tensor
    claim: str | Callable[[Tensor], str]
    judged: Tensor | None = None
    place: Callable[[tuple[int, ...]], str] | None = None
    cause: Callable[[Tensor], str | None] | None = None
    cause_of_bits: Callable[[Tensor], str | None] | None = None
    repeat: str | None = None
    again: Callable[[], object] | None = None


def check_each(
    assertion: str, compared: Iterable[Compared], *, allowed: float, exact: bool
) -> None:
    """Check one pair of outputs after the other, see `check_rows`."""
    # Where bits count, what is wrong by more than rounding is told before what is not.
    __tracebackhide__ = True
    if exact:
        compared = sorted(
            compared, key=lambda one: not differ(one.got, one.expected, allowed, one.judged)
        )
    for one in compared:
        given = {field.name: getattr(one, field.name) for field in fields(one)}
        check_rows(assertion, **given, allowed=allowed, exact=exact)


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


# --- functions that say what they do of themselves


class Answered(Protocol):
    """What a described function answers."""

    @property
    def output(self) -> Tensor:
        """Its output, (batch, heads, query_len, value_dim)."""


@runtime_checkable
class Described(Protocol):
    """A function that says what it does of itself, as `AttentionSpec`."""

    def described(self, call: Call) -> Call:
        """Return a call with what the function always does."""

    def ask(self, call: Call) -> Answered:
        """Answer a call."""

    def expected(self) -> Described | None:
        """Return code that gives what it is to give; None if that is attention."""

    @property
    def gradients(self) -> bool:
        """Whether it has gradients."""

    @property
    def tolerance(self) -> float | None:
        """How far it may be off anyway, as a part of the largest number of a head."""


def as_described(function: object) -> Described | None:
    """Return a function that says what it does of itself; None for any other."""
    return function if isinstance(function, Described) else None


def takes(function: Callable[..., Any], name: str) -> bool:
    """Whether a function has a parameter of a name; a described one takes all it declares."""
    if as_described(function) is not None:
        return True
    return name in (parameters_of(function) or ())
