"""When a number is as near to its reference as its dtype allows, and what to say when it is not.

The rule is that of the best kernel suites (FlashAttention's tests): the error of the subject,
measured against float64, may be `factor` times the error of a plain computation in the same
dtype. They take the largest error of a whole tensor, behind which a small row hides. Here each
element is judged by its own natural scale (see `pytest_attnheat.attention.computation`)::

    |subject - reference|  <=  factor * max(plain * scale, least)

where `plain` is the largest error of the plain computation, in units of the scale, within the
same map. The scale is the error when every step is rounded once and all errors point the same
way, so `plain` is about 0.2 and rarely above 1: with TF32, for instance. `least` is for small
maps, in which the plain computation may happen to be exact. With `factor` 2 each step of the
subject may be rounded twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..failure import Checked


@dataclass(frozen=True)
class Judgement:
    """One tensor of a subject, beside its reference. All but `judged` are (..., length, width)."""

    name: str  # "output", or the input whose gradient it is
    found: Tensor  # What the subject gave, in float64
    exact: Tensor  # What it should be; NaN where NaN is declared
    plain: Tensor  # What a plain computation gave, in float64
    scale: Tensor  # The natural scale
    allowed: Tensor  # How far each element may be off
    judged: Tensor  # Where it is judged, boolean
    dtype: torch.dtype  # The dtype that the subject gave it in
    shape: tuple[int, ...]  # Its shape, which may have fewer than two dimensions
    missing: bool  # Whether the subject gave none, which counts as zeros
    rows: Sequence[int] | None = None  # Their numbers, where they are some of more; else None
    length: int = 0  # How many rows there were

    def given(self, at: tuple[int, ...]) -> tuple[int, ...]:
        """Return an index into this as one into the tensor of all rows."""
        row = self.exact.ndim - 2
        if self.rows is None or len(at) <= row:
            return at
        return (*at[:row], self.rows[at[row]], *at[row + 1 :])

    @property
    def checked(self) -> Checked:
        """What it is."""
        known = Checked.of(self.found.to(self.dtype).reshape(self.shape))
        if self.rows is None:
            return known
        note = f", {len(self.rows)} of {self.length} rows"
        return replace(known, shape=(*self.shape[:-2], self.length, self.shape[-1]), note=note)

    @property
    def error(self) -> Tensor:
        """How far each element is off; inf where it is NaN or inf and should not be."""
        same = (self.found == self.exact) | (self.found.isnan() & self.exact.isnan())
        # A gradient beyond the range of the dtype is rightly inf.
        largest = torch.finfo(self.dtype).max
        beyond = self.exact.abs() + self.allowed >= largest
        same |= beyond & (self.found == self.exact.sign() * math.inf)
        error = (self.found - self.exact).abs().nan_to_num(nan=math.inf)
        return error.masked_fill(same | ~self.judged, 0.0)

    @property
    def broken(self) -> Tensor:
        """Where it is off by more than is allowed."""
        return ~(self.error <= self.allowed)


def judge(
    name: str,
    found: Tensor | None,
    exact: Tensor,
    plain: Tensor,
    scale: Tensor,
    least: Tensor,
    *,
    factor: float,
    dtype: torch.dtype,
    judged: Tensor,
    tolerance: float = 0.0,
) -> Judgement:
    """Lay a tensor of the subject beside its reference; None counts as zeros."""
    # Where scale and least are 0 the tensor must be exact; elsewhere it may be off by `tolerance`,
    # as a part of the largest number of its matrix. It may have fewer than two dimensions, as a
    # mask (key_len,): it is judged as a matrix, and named as it is.
    shape = tuple(exact.shape)
    exact, plain, scale, least, judged = (
        _as_matrices(tensor) for tensor in (exact, plain, scale, least, judged)
    )
    off = ((plain - exact).abs() / scale).nan_to_num(nan=0.0, posinf=0.0)
    # Where the plain computation overflows, it says nothing about rounding.
    usual = off.masked_fill(~judged, 0.0).amax((-2, -1), keepdim=True)
    allowed = factor * torch.maximum(usual * scale, least)
    if tolerance:
        anyway = tolerance * exact.nan_to_num(nan=0.0).abs().amax((-2, -1), keepdim=True)
        allowed = torch.where(scale + least > 0, torch.maximum(allowed, anyway), allowed)
    return Judgement(
        name=name,
        found=torch.zeros_like(exact) if found is None else _as_matrices(found.detach()).to(exact),
        exact=exact, plain=plain, scale=scale, allowed=allowed, judged=judged,
        dtype=dtype if found is None else found.dtype, shape=shape, missing=found is None,
    )  # fmt: skip


def _as_matrices(tensor: Tensor) -> Tensor:
    return tensor.reshape((1,) * max(0, 2 - tensor.ndim) + tuple(tensor.shape))
