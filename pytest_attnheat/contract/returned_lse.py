"""What log-sum-exp a subject returns beside its output: in which shape and base, with its sink."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from pytest_attnheat.attention.call import Call
from pytest_attnheat.attention.computation import reference
from pytest_attnheat.attention.levels import OPTIONS
from pytest_attnheat.contract.examination import Examination, Skipped
from pytest_attnheat.failure import Checked, Failure

_BASES = {"e": 1.0, "2": math.log(2.0), "10": math.log(10.0)}
# Our (batch, heads, query_len) of what is returned.
_SHAPES = {
    "(batch, heads, query_len)": (0, 1, 2),
    "(batch, query_len, heads)": (0, 2, 1),
    "(heads, batch, query_len)": (1, 0, 2),
    "(query_len, batch, heads)": (1, 2, 0),
}
# As what rounding is allowed of an output.
_FACTOR = 2.0


@dataclass(frozen=True)
class _Reading:
    """How a log-sum-exp may be meant."""

    shape: str
    base: str
    with_sink: bool

    def __str__(self) -> str:
        return f"{self.shape}, base {self.base}" + ("" if self.with_sink else ", without the sink")

    def excess(self, given: Tensor, call: Call) -> float:
        """How far it is off, as a multiple of what is allowed; inf where it cannot be this."""
        squeezed = given.squeeze(-1) if given.ndim == 4 and given.shape[-1] == 1 else given
        order = _SHAPES[self.shape]
        wanted = call.query.shape[:-1]
        if squeezed.ndim != 3 or tuple(squeezed.shape[d] for d in order) != tuple(wanted):
            return math.inf
        own = call if self.with_sink else replace(call, sinks=None)
        expected = reference(own, wanted=("lse",))
        exact, scale = (of["lse"].squeeze(-1) for of in (expected.exact, expected.scale))
        found = squeezed.permute(order).double() * _BASES[self.base]
        empty = exact.isinf()
        if bool((found[empty].isfinite() | found[empty].isnan()).any()):
            return math.inf
        allowed = _FACTOR * torch.maximum(scale, expected.least["lse"].squeeze(-1))
        off = ((found - exact).abs() / allowed)[~empty]
        return float(off.nan_to_num(nan=math.inf).max()) if off.numel() else 0.0


def judge_lse(examination: Examination) -> str:
    """Judge the log-sum-exp of a few calls; return how it is meant.

    Raises:
        Failure: No way to read it fits all calls.
        Skipped: There are no calls to ask.
    """
    with_sinks = (True,) if examination.spec.sinks is None else (True, False)
    readings = [_Reading(*one) for one in product(_SHAPES, _BASES, with_sinks)]
    worst = dict.fromkeys(readings, 0.0)
    given: Any = None
    asked = 0
    for call in _calls(examination):
        given = examination.spec.ask(call).besides
        if not isinstance(given, Tensor):
            raise Failure("", f"the log-sum-exp is a {type(given).__name__}, no tensor")
        worst = {one: max(off, one.excess(given, call)) for one, off in worst.items()}
        asked += 1
    if not asked:
        raise Skipped("no call can be asked")
    fitting = [one for one, off in worst.items() if off <= 1.0]
    if fitting:
        return f"lse {fitting[0]}"
    nearest = min(worst, key=lambda one: worst[one])
    claim = "the log-sum-exp is not that of the scores, however it is read"
    cause = None
    if math.isfinite(worst[nearest]):
        cause = f"nearest to one of {nearest}, off by {worst[nearest]:.2g} times what is allowed"
    raise Failure("", claim, tensor=Checked.of(given), cause=cause)


def _calls(examination: Examination) -> Iterator[Call]:
    options = {name: True for name in OPTIONS if name in ("softcap", "sinks", "alibi")}
    asked: list[dict[str, Any]] = [{}, {"mask": "boolean"}, {"causal": True}, {"group": 2}]
    asked += [{name: level} for name, level in options.items()]
    asked += [{"mask": "boolean", "empty": True}, {"batch": 1, "key_heads": 3}]
    for levels in asked:
        try:
            yield examination.case(**levels)
        except Skipped:
            continue
