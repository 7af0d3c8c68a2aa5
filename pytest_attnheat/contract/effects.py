"""What a defect changes on a call, and whether that is more than rounding."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from ..assertions.precision_elements import judge
from ..attention import computation
from ..attention.backward import Saved, carried_back, off_by
from ..attention.call import Call
from ..attention.decisions import BackwardPlan
from ..attention.outcomes import MOST_ALLOWED, Expected, Outcomes, digest
from ..attention.plan import Case, NotApplicable, Outcome, Plan, carry_out
from ..attention.tolerance import answer_tolerance
from .spec import AttentionSpec
from .versions import Form, Version

# By how many times what a plain computation is off, at each number, a defect has to be: what
# `assert_matches_reference` allows. And by how many times what the target itself is off.
_FACTOR = 2.0
# Of the largest number of a head: two computations in float64 differ by as much.
_FLOOR = 1e-12
# What calls may have, and whether a target takes it.
_FEATURES: dict[str, Callable[[AttentionSpec], object]] = {
    "a mask": lambda spec: spec.mask,
    "causality": lambda spec: spec.takes_causal,
    "a mask together with causality": lambda spec: spec.mask and spec.takes_causal,
    "other numbers of keys than of queries": lambda spec: not spec.square,
    "grouped heads": lambda spec: spec.grouped,
    "several heads": lambda spec: spec.has_heads,
    "several samples": lambda spec: True,
    "values of another width": lambda spec: spec.convention is None,
    "more than 64 keys": lambda spec: True,
    "a number of keys that 16 does not divide": lambda spec: True,
    "a scale": lambda spec: spec.scale_argument,
    "negative numbers in query and key": lambda spec: True,
    "gradients": lambda spec: spec.gradients,
    **{name: (lambda spec, name=name: isinstance(getattr(spec, name), str))  # type: ignore[misc]
       for name in ("window", "chunk", "documents", "lengths", "softcap", "alibi", "sinks")},
}  # fmt: skip


@dataclass(frozen=True)
class Change:
    """By how much numbers are off: of a head, of all, and by rounding at most; see `Effect`."""

    off: float
    off_by: float
    rounding: float

    @classmethod
    def of(cls, error: Tensor, exact: Tensor, rounding: float) -> Change:
        """Measure an error (..., length, width) beside what is exact."""
        error = error.nan_to_num(nan=math.inf).abs()
        parts = error.amax((-2, -1)) / largest_of_heads(exact)
        return cls(float(parts.max()), float(error.max()), rounding)


def largest_of_heads(exact: Tensor) -> Tensor:
    """The largest number of each head, (...); where a head holds zeros alone, that of all."""
    largest = exact.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).abs().amax((-2, -1))
    whole = largest.max().clamp(min=torch.finfo(exact.dtype).tiny)
    return torch.where(largest > 0, largest, whole)


@dataclass
class Effect:
    """What was asked of a version, and what its defect changed."""

    calls: int = 0  # How many calls there were
    active: int = 0  # On how many of them it changed the answer, or the gradients, beyond rounding
    off: float = 0.0  # By how much at most, as a part of the largest number of a head
    off_by: float = 0.0  # Likewise, in numbers
    rounding: float = 0.0  # What rounding may do at most where it was off, likewise
    dtype: str = ""  # The dtype of that call
    # How many calls were answered as the target does, whatever is planted, by why
    set_aside: Counter[str] = field(default_factory=Counter)
    refused: dict[str, None] = field(default_factory=dict)  # Why calls were not understood
    seen: set[str] = field(default_factory=set)  # What the calls had, see `never_exercised`

    @property
    def unfit(self) -> tuple[str, ...]:
        """Why nothing can be said by these calls, if they are not understood."""
        none = self.calls and self.calls == self.set_aside.total()
        return tuple(self.refused) or (tuple(self.set_aside) if none else ())

    def changed(self, change: Change, dtype: torch.dtype) -> None:
        """Note a call on which numbers were off."""
        self.active += 1
        self.off_by = max(self.off_by, change.off_by)
        if change.off >= self.off:
            self.off, self.rounding = change.off, change.rounding
            self.dtype = str(dtype).removeprefix("torch.")


@dataclass(frozen=True, eq=False)
class Slopes:
    """The gradients of a call, and how far rounding may move each number of them."""

    saved: Saved  # What the forward pass leaves, with the gradient of the output
    right: dict[str, Tensor]  # By name, as `Call.shapes` has them
    allowed: dict[str, Tensor]  # By how much each matrix may be off: a plain one, twice

    @classmethod
    def of(cls, call: Call, upstream: Tensor) -> Slopes:
        """Compute them, for the gradient (batch, heads, query_len, value_dim) of the output."""
        call = replace(call, upstream=upstream)
        with torch.no_grad():
            saved = Saved.of(replace(call, upstream=upstream.double()), None)
            right = dict(carried_back(BackwardPlan(), saved))
        with torch.enable_grad():
            plain = computation.plain(call)
        allowed = {}
        for name, exact in right.items():
            off = (plain[name].cpu().reshape(exact.shape) - exact).abs().nan_to_num(nan=0.0)
            worst = off.amax((-2, -1), keepdim=True) if off.ndim > 1 else off.max()
            floor = _FLOOR * exact.nan_to_num(nan=0.0).abs().max()
            allowed[name] = (_FACTOR * worst).clamp(min=floor).expand_as(exact)
        return cls(saved, right, allowed)

    def change(self, name: str, own: Tensor) -> Change | None:
        """By how much a gradient is off; None if by rounding alone."""
        exact, allowed = self.right[name], self.allowed[name]
        error = (own.reshape(exact.shape) - exact).abs().nan_to_num(nan=math.inf)
        if off_by(exact, own, self.saved)[1] or not bool((error > allowed).any()):
            return None
        matrix = (1,) * max(0, 2 - exact.ndim) + tuple(exact.shape)
        exact, error, allowed = (one.reshape(matrix) for one in (exact, error, allowed))
        parts = allowed.amax((-2, -1)) / largest_of_heads(exact)
        return Change.of(error, exact, float(parts.max()))


@dataclass(frozen=True, eq=False)
class Chosen:
    """The form of a defect that shows on a call, what it changes, and its output, if kept."""

    form: Form
    change: Change
    output: Tensor | None = None


class Known:
    """A call that was read, what attention gives on it, and which forms of defects show."""

    def __init__(self, case: Case, tolerance: float, found: Tensor | None = None) -> None:
        """Compute what attention gives."""
        self.case = case
        self._least = max(answer_tolerance(case.dtype), tolerance)
        self._outcomes = Outcomes(case)
        assert self._outcomes.healthy is not None
        self.healthy: Expected = self._outcomes.healthy
        self._chosen: dict[Version, Chosen | None] = {}
        self._slopes: dict[int, Slopes] = {}
        self._allowed = self._rounding(tolerance, found)
        self._found = found

    def slopes(self, call: Call, upstream: Tensor) -> Slopes:
        """The gradients of this call, for a gradient of its output; the last are kept."""
        key = digest(upstream.cpu().double())
        if key not in self._slopes:
            self._slopes = {key: Slopes.of(call, upstream)}
        return self._slopes[key]

    @cached_property
    def right(self) -> Outcome:
        """What attention gives, and what there is on the way."""
        return carry_out(Plan(), self.case)

    @property
    def numbers(self) -> int:
        """How many numbers it holds, about."""
        tensors = sum(tensor.numel() for tensor in self.case.tensors)
        return 4 * tensors + 4 * self.healthy.output.numel() + 6 * math.prod(self.case.shape)

    def _rounding(self, tolerance: float, found: Tensor | None) -> Tensor:
        """How far each number may be off by rounding, (batch, heads, query_len, value_dim)."""
        case, exact = self.case, self.healthy.output
        query, key, value = (tensor.to(case.dtype) for tensor in case.tensors)
        call = replace(case, query=query, key=key, value=value.nan_to_num(nan=0.0), upstream=None)
        expected, plain = computation.reference(call), computation.plain(call)
        of = [one["output"] for one in (expected.exact, plain, expected.scale, expected.least)]
        judged = torch.ones_like(exact, dtype=torch.bool)
        allowed = judge(
            "output", None, *of, factor=_FACTOR, dtype=case.dtype, judged=judged,
            tolerance=tolerance,
        ).allowed  # fmt: skip
        largest = exact.nan_to_num(nan=0.0).abs().amax((-2, -1), keepdim=True)
        allowed = torch.maximum(allowed.nan_to_num(nan=0.0), _FLOOR * largest)
        if found is None:
            return allowed
        # A target that rounds more than that is not graded by less than it is off itself.
        own = (found - exact).abs().nan_to_num(nan=0.0, posinf=0.0)
        worst = own.amax((-2, -1), keepdim=True)
        coarse = (own > allowed).any(-1).any(-1)[..., None, None]
        return torch.where(coarse, torch.maximum(allowed, _FACTOR * worst), allowed)

    @cached_property
    def is_reproduced(self) -> bool:
        """Whether the answer of the target is what is described, to within rounding."""
        if self._found is None:
            return False
        dtype = self.case.dtype
        error, allowed = self.healthy.errors(
            self._found, dtype, least=self._least, most=MOST_ALLOWED
        )
        return bool((error <= allowed).all())

    def chosen(self, version: Version) -> Chosen | None:
        """Return the first form of a defect that changes this call, None if none does."""
        # The output is kept of the version that was asked last.
        if version not in self._chosen:
            self._chosen = {one: known and replace(known, output=None)
                            for one, known in self._chosen.items()}  # fmt: skip
            self._chosen[version] = self._first_that_shows(version)
            self._outcomes.forget()
        return self._chosen[version]

    def _first_that_shows(self, version: Version) -> Chosen | None:
        for form in version.forms:
            if form.decided is None:
                output = None
                with suppress(NotApplicable):
                    output = form.make(self.case).output
            else:
                outcome = self._outcomes.of(form.decided)
                output = None if outcome in (None, self.healthy) else outcome.output
            if output is not None and (change := self._change(output)) is not None:
                return Chosen(form, change, output)
        return None

    def _change(self, output: Tensor) -> Change | None:
        """By how much an output is off; None if by rounding alone."""
        exact = self.healthy.output
        same = (output == exact) | (output.isnan() & exact.isnan())
        if self.healthy.unjudged is not None:
            same |= self.healthy.unjudged[..., None]
        if self.case.query_lengths is not None:  # what is beyond them is never handed out
            real = torch.arange(self.case.query_len) < self.case.query_lengths.cpu()[:, None]
            same |= ~real[:, None, :, None]
        error = (output - exact).abs().nan_to_num(nan=math.inf).masked_fill(same, 0.0)
        if not bool((error > self._allowed).any()):
            return None
        parts = self._allowed.amax((-2, -1)) / largest_of_heads(exact)
        return Change.of(error, exact, float(parts.max()))


def never_exercised(spec: AttentionSpec, effect: Effect) -> tuple[str, ...]:
    """Return what calls never had, though the target takes it."""
    missing = [n for n, takes in _FEATURES.items() if takes(spec) and n not in effect.seen]
    dtypes = sorted(name for name in effect.seen if name.startswith("torch."))
    one = [f"any dtype but {dtypes[0].removeprefix('torch.')}"] if len(dtypes) == 1 else []
    return (*missing, *one)
