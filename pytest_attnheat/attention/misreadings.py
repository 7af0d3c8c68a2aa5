"""How a call may be misread: with another mask, another scale, without its softcap.

What a misreading computes is right attention of another call. What the call lacks is not misread.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pytest_attnheat.attention.call import FEATURES, Call, Positions


class NotApplicable(ValueError):  # noqa: N818 (no error, a fact about a plan and a case)
    """A plan cannot be carried out on a case, for instance because lengths would have to agree."""


@dataclass(frozen=True, eq=False)
class Case(Call):
    """A call that a plan is carried out on, (batch, heads, length, width).

    Attributes:
        name: What it is called in messages.
        scale_given: Whether the scale is passed as an argument of this call.
        dtype: The dtype in which it is computed: beyond its range exp is 0 or inf.
        earlier: What the same code was asked just before, in the same memory; None if nothing
            that matters.
    """

    name: str = ""
    scale_given: bool = False
    dtype: torch.dtype = torch.float64
    earlier: Case | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of the weights: (batch, heads, query_len, key_len)."""
        batch, heads, query_len = self.query.shape[:3]
        return batch, heads, query_len, self.key.shape[2]

    @cached_property
    def seen(self) -> Tensor:
        """Where a query may attend, of the shape of the weights."""
        return self.visible().expand(self.shape)

    @cached_property
    def has_empty_rows(self) -> bool:
        """Whether some query may attend to nothing."""
        return not bool(self.seen.any(-1).all())

    @cached_property
    def hides(self) -> bool:
        """Whether some query may not attend to some key."""
        return not bool(self.seen.all())

    def other_corner(self) -> Case:
        """Return the same call, its positions counted from the other corner."""
        other = "bottom_right" if self.alignment == "top_left" else "top_left"
        return replace(self, alignment=other)  # type: ignore[arg-type]


Misreading: TypeAlias = Callable[[Case], Case]
# The blocks that keys and queries are usually taken in, and small ones for small cases.
BLOCKS = (2, 4, 8, 16, 32, 64, 128)
_USUAL: dict[str, Any] = {field.name: field.default for field in fields(Case)}
# Where positions hide no key, all of a padded tail is seen.
_HIDING = ("causal", "window", "chunk", "documents", "lengths", "may_see")
# What has a decision of its own, or is only what others are counted from.
IGNORED = tuple(name for name in ("mask", "causal", *FEATURES) if name not in ("alignment",
                "scale"))  # fmt: skip


def _has(case: Case, name: str) -> bool:
    given = getattr(case, name)
    return isinstance(given, Tensor) or given != _USUAL[name]


def _without(*names: str) -> Misreading:
    def misread(case: Case) -> Case:
        given = {name: _USUAL[name] for name in names if _has(case, name)}
        return replace(case, **given) if given else case

    return misread


def _read(name: str, change: Callable[[Case, Any], Any]) -> Misreading:
    """Something else in place of what is given; a mask and a bias are expanded before."""

    def misread(case: Case) -> Case:
        if not _has(case, name):
            return case
        given = getattr(case, name)
        given = given.expand(case.shape) if name in ("mask", "bias") else given
        return replace(case, **{name: change(case, given)})

    return misread


def _scale(rule: Callable[[Case], float | None]) -> Misreading:
    def misread(case: Case) -> Case:
        scale = rule(case)
        return case if scale in (case.scale, case.factor) else replace(case, scale=scale)

    return misread


def _ruled(case: Case, rule: Tensor, **without: Any) -> Case:
    """The mask with one rule more, for all maps in a row if it has three dimensions."""
    rule = rule.expand(case.maps, *case.shape[2:]).view(case.shape) if rule.ndim == 3 else rule
    return replace(case, mask=rule if case.mask is None else case.mask & rule, **without)


def _transposed(case: Case, given: Tensor) -> Tensor:
    if case.query_len != case.key_len:
        raise NotApplicable("what is not square cannot be transposed")
    return given.mT


def _tiled(case: Case, mask: Tensor) -> Tensor:
    batch, heads = mask.shape[:2]
    return mask[torch.arange(batch * heads).reshape(batch, heads) % batch, torch.arange(heads)]


# --- positions


def _at(case: Case) -> Positions:
    return case.everywhere(case.query.device)


def _wider(more: tuple[int, int], case: Case, *, decoding: bool = False) -> Case:
    if case.window is None or (decoding and case.key_len <= case.query_len):
        return case
    sides = tuple(
        side if side is None else side + add for side, add in zip(case.window, more, strict=True)
    )
    if any(side is not None and side < 0 for side in sides):
        raise NotApplicable("a window cannot be smaller than its own key")
    return replace(case, window=sides)  # type: ignore[arg-type]


def _longer(more: int, case: Case, given: Any) -> Any:
    if isinstance(given, Tensor):
        return (given + more).clamp(0, case.key_len)
    return max(given + more, 0) or given


def _rolled(more: int, case: Case, documents: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return documents[0], documents[1].roll(more, -1)


def _counted_elsewhere(name: str, case: Case) -> Case:
    """One rule of positions that is counted from the other corner, and no other."""
    if not _has(case, name):
        return case
    kept: dict[str, Any] = {other: _USUAL[other] for other in _HIDING if other != name}
    (rule,) = replace(case.other_corner(), **kept).rules(_at(case.other_corner()))
    return _ruled(case, rule, **{name: None})


def _in_blocks(block: int, to_the_end: bool, case: Case) -> Case:
    """Causal in steps: the block of a query is seen as a whole, or not at all."""
    if not case.causal:
        return case
    at = _at(case)
    own, its = (at.behind + at.key) // block, at.key // block
    seen = its <= own if to_the_end else its < own
    return _ruled(case, seen | (at.key < case.prefix), causal=False)


# --- numbers that are added to scores, and sinks


def _alibi_as(case: Case, added: Tensor | None) -> Case:
    if added is None:
        return case
    added = added.view(case.shape)
    return replace(case, alibi=None, bias=added if case.bias is None else case.bias + added)


def _signed(case: Case) -> Case:
    """A key after the query is as if it were nearer than the query's own."""
    if case.alibi is None:
        return case
    at = _at(case)
    return _alibi_as(case, -case.alibi.double()[at.head] * at.behind)


def _next_slopes(first: int, case: Case, slopes: Tensor) -> Tensor:
    """The slopes of the heads before (from 0, not 1) or after, as far as they are a series."""
    ratio = slopes[1:2] / slopes[:1] if len(slopes) > 1 else 2.0**-8
    if first == 0:
        return torch.cat([slopes[:1] / ratio, slopes[:-1]])
    return torch.cat([slopes[1:], slopes[-1:] * ratio])


def _slopes_of(count: Callable[[float], float], case: Case, slopes: Tensor) -> Tensor:
    """The usual slopes of another number of heads: a power of two that is near."""
    heads = 2 ** count(math.log2(len(slopes)))
    return 2.0 ** (-8.0 / heads * torch.arange(1, len(slopes) + 1, dtype=slopes.dtype))


def _scaled_bias(case: Case, bias: Tensor) -> Tensor:
    return torch.where(bias.isinf(), bias, bias * case.factor)


def _bias_as_keep(case: Case) -> Case:
    return case if case.bias is None else _ruled(case, (case.bias != 0), bias=None)


def _padded(block: int, masked_too: bool, case: Case) -> Case:
    """Keys and values of zeros up to a whole block: scores of 0, that is a sink."""
    more = -case.key_len % block
    shut = any(_has(case, name) for name in _HIDING) or (case.mask is not None and not masked_too)
    if not more or shut:
        return case
    tail = torch.full((case.heads,), math.log(more), dtype=torch.float64)
    return replace(case, sinks=tail if case.sinks is None else case.sinks.double().logaddexp(tail))


def _counted(times: int, block: int, case: Case, sinks: Tensor) -> Tensor:
    """Sinks that are counted so many times, or once for each block of keys."""
    return sinks + math.log(times or -(-case.key_len // block))


# --- what an earlier call left


def _remembered(*names: str) -> Misreading:
    def misread(case: Case) -> Case:
        left = case.earlier
        if left is None or left.shape != case.shape or not any(_has(case, n) for n in names):
            return case
        return replace(case, **{name: getattr(left, name) for name in names})

    return misread


MISREADINGS: dict[str, Misreading] = {
    **{f"no {name}": _without(name) for name in IGNORED},
    "no rules": _without(*IGNORED),
    "scale missing": _scale(lambda case: 1.0),
    "scale squared": _scale(lambda case: case.factor**2),
    "scale inverse": _scale(lambda case: 1.0 / case.factor if case.factor else math.inf),
    "scale of value_width": _scale(lambda case: case.value.shape[-1] ** -0.5),
    "scale of embedding": _scale(lambda case: (case.heads * case.query.shape[-1]) ** -0.5),
    "scale of key_len": _scale(lambda case: case.key_len**-0.5),
    "scale of query_len": _scale(lambda case: case.query_len**-0.5),
    "scale of heads": _scale(lambda case: case.heads**-0.5),
    "scale absolute": _scale(lambda case: abs(case.factor)),
    "scale default": _scale(lambda case: None if case.scale_given else case.scale),
    "mask inverted": _read("mask", lambda case, mask: ~mask),
    "mask transposed": _read("mask", _transposed),
    "mask rolled": _read("mask", lambda case, mask: mask.roll(1, 0)),
    "mask rolled back": _read("mask", lambda case, mask: mask.roll(-1, 0)),
    "mask first sample": _read("mask", lambda case, mask: mask[:1].expand(case.shape)),
    "mask first head": _read("mask", lambda case, mask: mask[:, :1].expand(case.shape)),
    "mask tiled": _read("mask", _tiled),
    "causal": lambda case: case if case.causal else replace(case, causal=True),
    **{f"causal to the end of blocks of {block}": partial(_in_blocks, block, True)
       for block in BLOCKS},
    **{f"causal before blocks of {block}": partial(_in_blocks, block, False) for block in BLOCKS},
    "window swapped": _read("window", lambda case, window: window[::-1]),
    **{f"window {more}": partial(_wider, more) for more in ((1, 0), (-1, 0), (0, 1), (0, -1))},
    **{f"window {more} decoding": partial(_wider, more, decoding=True)
       for more in ((1, 0), (-1, 0))},
    **{f"{name} elsewhere": partial(_counted_elsewhere, name) for name in ("window", "chunk")},
    **{f"{name} {more:+}": _read(name, partial(_longer, more))
       for name in ("chunk", "prefix", "sink_keys", "lengths") for more in (1, -1)},
    **{f"documents {more:+}": _read("documents", partial(_rolled, more)) for more in (1, -1)},
    "alibi reversed": _read("alibi", lambda case, slopes: slopes.flip(0)),
    "alibi first head": _read("alibi", lambda case, slopes: slopes[:1].expand_as(slopes)),
    "alibi negative": _read("alibi", lambda case, slopes: -slopes),
    "alibi scaled": _read("alibi", lambda case, slopes: slopes * case.factor),
    "alibi from 0": _read("alibi", partial(_next_slopes, 0)),
    "alibi from 2": _read("alibi", partial(_next_slopes, 2)),
    "alibi of more heads": _read("alibi", partial(_slopes_of, math.ceil)),
    "alibi of fewer heads": _read("alibi", partial(_slopes_of, math.floor)),
    "alibi of any number of heads": _read("alibi", partial(_slopes_of, float)),
    "alibi elsewhere": lambda case: _alibi_as(
        case, case.other_corner().distant(_at(case.other_corner()), torch.float64)),
    "alibi signed": _signed,
    "bias scaled": _read("bias", _scaled_bias),
    "bias first head": _read("bias", lambda case, bias: bias[:, :1].expand(case.shape)),
    "bias first sample": _read("bias", lambda case, bias: bias[:1].expand(case.shape)),
    "bias transposed": _read("bias", _transposed),
    "bias of -inf alone": _read("bias", lambda case, bias: bias.masked_fill(bias.isfinite(), 0.0)),
    "bias as keep": _bias_as_keep,
    "sinks first head": _read("sinks", lambda case, sinks: sinks[:1].expand_as(sinks)),
    "sinks of key heads": _read("sinks", lambda case, sinks:
                                sinks[torch.arange(case.heads) // case.group]),
    "sinks scaled": _read("sinks", lambda case, sinks: sinks * case.factor),
    **{f"sinks {n} times": _read("sinks", partial(_counted, n, 0)) for n in (2, 4, 8)},
    **{f"sinks in blocks of {n}": _read("sinks", partial(_counted, 0, n)) for n in BLOCKS},
    **{f"padded to {block}": partial(_padded, block, True) for block in BLOCKS},
    **{f"padded to {block} without a mask": partial(_padded, block, False) for block in BLOCKS},
    "earlier answer": _remembered("query", "key", "value", "mask", "bias"),
    "earlier mask": _remembered("mask", "bias"),
    "earlier keys": _remembered("key", "value"),
}  # fmt: skip
