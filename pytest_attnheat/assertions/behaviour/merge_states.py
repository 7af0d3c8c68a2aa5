"""Partial states of attention, what they come to, and what a wrong merge makes of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from ...attention.tolerance import output_tolerance
from ...attention.vocabulary import HIDDEN_FROM, DeclaredFullyMasked
from ...inputs import dtype_name

LN2 = math.log(2.0)
_UNKNOWN = "other rows are wrong as well, and no known mistake gives their numbers"
# What merges the states of some parts: outputs (n, ..., width), log-sum-exps (n, ...), both in
# float64, and of base e.
Rule: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def exactly(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Merge states: the output is 0 and the log-sum-exp -inf where no part has a key."""
    lse = lses.logsumexp(0)
    return (_shares(lses).unsqueeze(-1) * outs).sum(0), lse


def _shares(lses: Tensor) -> Tensor:
    """The weight of each part, 0 where none has any."""
    top = lses.amax(0)
    sizes = (lses - top.masked_fill(top.isinf(), 0.0)).exp()
    return sizes / sizes.sum(0).clamp(min=torch.finfo(sizes.dtype).tiny)


def folded(
    rule: Callable[[list[Tensor], list[Tensor]], tuple[Tensor, Tensor | None]],
    outs: Sequence[Tensor],
    lses: Sequence[Tensor],
    order: str,
) -> tuple[Tensor, Tensor | None]:
    """Merge more than two states in pairs, from the left or from the right."""
    states = list(zip(outs, lses, strict=True))
    if order == "from the right":
        states.reverse()
    out, lse = states[0]
    for other in states[1:]:
        pair = [(out, lse), other] if order != "from the right" else [other, (out, lse)]
        out, merged = rule([pair[0][0], pair[1][0]], [pair[0][1], pair[1][1]])
        if merged is None:
            return out, None
        lse = merged
    return out, lse


@dataclass(frozen=True)
class Comparison:
    """The states of some parts, and what merging them gave. All but `lses` in base e."""

    name: str  # What is special of the parts
    sizes: tuple[int, ...]  # How many keys each part has
    order: str  # How more than two are merged: "at once", "from the left", "from the right"
    outs: list[Tensor]  # The outputs as they were handed over, one of each part
    lses: list[Tensor]  # Their log-sum-exps likewise, in the base of the merge
    per_unit: float  # What one of that base is in base e
    out: Tensor  # What was returned, (..., width), in float64, on the CPU
    lse: Tensor | None  # (...) likewise, in base e; None if none is returned
    empty: DeclaredFullyMasked  # What is declared of a row that no part has a key for

    @property
    def dtype(self) -> torch.dtype:
        """That of the outputs."""
        return self.outs[0].dtype

    @property
    def words(self) -> str:
        """How to name it."""
        how = f", merged {self.order}" if len(self.sizes) > 2 else ""
        return f"{dtype_name(self.dtype)}, keys in parts of {' + '.join(map(str, self.sizes))}{how}"

    @cached_property
    def states(self) -> tuple[Tensor, Tensor]:
        """The states in float64 and base e, on the CPU: (n, ..., width) and (n, ...)."""
        lses = torch.stack(self.lses).detach().cpu().double() * self.per_unit
        return torch.stack(self.outs).detach().cpu().double(), lses

    @cached_property
    def exact(self) -> tuple[Tensor, Tensor]:
        """What merging gives."""
        out, lse = exactly(*self.states)
        nothing = self.without_keys.unsqueeze(-1)
        return out.masked_fill(nothing, math.nan if self.empty == "nan" else 0.0), lse

    @cached_property
    def without_keys(self) -> Tensor:
        """Which rows no part has a key for, (...)."""
        return self.states[1].isneginf().all(0)

    @cached_property
    def without_keys_once(self) -> Tensor:
        """Which rows two parts, or all that are merged at once, have no key for."""
        lses = self.states[1]
        if self.order != "at once":
            lses = lses[-2:] if self.order == "from the right" else lses[:2]
        return lses.isneginf().all(0)

    @cached_property
    def with_empty_part(self) -> Tensor:
        """Which rows some part has no key for."""
        return self.states[1].isneginf().any(0)

    @cached_property
    def judged(self) -> Tensor:
        """Which rows are judged: what comes of two states without keys may be declared as open."""
        if self.empty == "zero":
            return torch.ones_like(self.without_keys)
        declared = self.without_keys & (self.empty == "nan")
        return ~self.without_keys_once | declared

    def allowed(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """How far rounding may move an output and a log-sum-exp that come to this."""
        # As two calls of other shapes, see `tolerance.output_tolerance`, for each merge of a pair;
        # and an exponential is off by its argument times the eps of the log-sum-exps, four times.
        # An output counts as large as the largest of the parts: `a - w (a - b)` is a right merge.
        outs, lses = self.states
        merges = max(1, len(self.sizes) - 1)
        wide = self.lses[0].dtype
        sizes = [one.masked_fill(~one.isfinite(), 0.0).abs() for one in (*lses, lse)]
        largest = torch.stack(sizes).amax(0)
        moved = 4 * torch.finfo(wide).eps * largest
        info = torch.finfo(self.dtype)
        own = torch.maximum(outs.abs().amax(0), out.abs().nan_to_num(nan=0.0, posinf=0.0))
        of_out = (output_tolerance(self.dtype) + moved).unsqueeze(-1) * own
        of_out = of_out + 4 * info.smallest_normal * info.eps * (own > 0)
        return merges * of_out, merges * (output_tolerance(wide) + moved)

    def off(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """Where what was returned is not this, (..., width) and (...)."""
        of_out, of_lse = self.allowed(out, lse)
        rows = self.judged
        wrong = ~_within(self.out, out, of_out) & rows.unsqueeze(-1)
        if self.lse is None:
            return wrong, torch.zeros_like(rows)
        near = _within(self.lse, lse, of_lse) | (lse.isneginf() & (self.lse <= HIDDEN_FROM))
        if self.empty == "nan":
            near = near | (self.without_keys & self.lse.isnan())
        return wrong, ~near & rows

    @cached_property
    def broken(self) -> tuple[Tensor, Tensor]:
        """Where the output and the log-sum-exp are wrong."""
        return self.off(*self.exact)

    @property
    def is_wrong(self) -> bool:
        """Whether anything is."""
        return any(bool(one.any()) for one in self.broken)

    def by(self, rule: Rule) -> tuple[Tensor, Tensor]:
        """What another rule makes of the same states, merged in the same order."""
        outs, lses = self.states
        if self.order == "at once":
            return rule(outs, lses)
        stacked = lambda o, s: rule(torch.stack(o), torch.stack(s))  # noqa: E731
        out, lse = folded(stacked, [*outs], [*lses], self.order)
        assert lse is not None
        return out, lse

    def fits(self, rule: Rule, *, out: bool = True, lse: bool = True) -> bool:
        """Whether a rule gives what was returned in all rows in which that is finite."""
        # Rows that no part has a key for are not looked at: what they give is a matter of its own.
        found = self.by(rule)
        wrong, wrong_lse = self.off(*found)
        finite = self.finite & ~self.without_keys
        rows = wrong.any(-1) if out else torch.zeros_like(finite)
        rows = rows | wrong_lse if lse else rows
        # What overflows in float64 as well was not what gave a number.
        return not bool((rows & finite & found[0].isfinite().all(-1)).any())

    @cached_property
    def finite(self) -> Tensor:
        """Which rows hold numbers."""
        finite = self.out.isfinite().all(-1)
        return finite if self.lse is None else finite & ~(self.lse.isnan() | self.lse.isposinf())


def _within(found: Tensor, exact: Tensor, allowed: Tensor) -> Tensor:
    same = (found == exact) | (found.isnan() & exact.isnan())
    return same | ((found - exact).abs() <= allowed)


# --- what wrong merges give


def _of_lses(change: Callable[[Tensor], Tensor], back: float = 1.0) -> Rule:
    """A merge that reads other log-sum-exps, and gives one that is read otherwise again."""

    def rule(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = exactly(outs, change(lses))
        return out, lse * back

    return rule


def _with_out(make: Callable[[Tensor, Tensor], Tensor]) -> Rule:
    """A merge that gives another output."""
    return lambda outs, lses: (make(outs, lses), exactly(outs, lses)[1])


def _with_lse(make: Callable[[Tensor, Tensor], Tensor]) -> Rule:
    """A merge that gives another log-sum-exp."""
    return lambda outs, lses: (exactly(outs, lses)[0], make(outs, lses))


def _relative(lses: Tensor) -> Tensor:
    top = lses.amax(0)
    return (lses - top.masked_fill(top.isinf(), 0.0)).exp()


def _largest(outs: Tensor, lses: Tensor) -> Tensor:
    index = lses.argmax(0, keepdim=True).unsqueeze(-1).expand(1, *outs.shape[1:])
    return outs.gather(0, index)[0]


# Of which log-sum-exps (n, batch, heads, query_len) others are taken.
_MISREAD: dict[str, Callable[[Tensor], Tensor]] = {
    "the log-sum-exps of the first head for all": lambda lses: lses[:, :, :1].expand_as(lses),
    "the log-sum-exps of the first sample for all": lambda lses: lses[:, :1].expand_as(lses),
    "the log-sum-exps of the first query for all": lambda lses: lses[..., :1].expand_as(lses),
    "log-sum-exps (heads, queries) as if they were (queries, heads)":
        lambda lses: lses.reshape(*lses.shape[:2], *lses.shape[:1:-1]).mT,
    "log-sum-exps (queries, heads) as if they were (heads, queries)":
        lambda lses: lses.mT.reshape(lses.shape),
    "log-sum-exps (heads, tokens) as if they were (tokens, heads)":
        lambda lses: _tokens_last(_tokens_last(lses).reshape(
            len(lses), -1, lses.shape[2]).mT, lses.shape),
    "log-sum-exps (tokens, heads) as if they were (heads, tokens)":
        lambda lses: _tokens_last(_tokens_last(lses).mT.reshape(
            len(lses), lses.shape[2], -1), lses.shape),
}  # fmt: skip


def _tokens_last(lses: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """Turn (n, batch, heads, query_len) into (n, heads, tokens), or that back into a shape."""
    if shape is None:
        return lses.transpose(1, 2).flatten(2)
    return lses.reshape(shape[0], shape[2], shape[1], shape[3]).transpose(1, 2)


def _out_rules(per_unit: float) -> dict[str, Rule]:
    """What may be wrong with the output, in words; some change the log-sum-exp as well."""
    is_e = per_unit == 1.0
    wrong = LN2 if is_e else 1 / LN2
    own, other = ("e", "2") if is_e else ("2", "e")
    return {
        f"reads log-sum-exps of base {own} as if they were of base {other}":
            _of_lses(lambda lses: lses * wrong, 1 / wrong),
        "takes the mean of the outputs": _with_out(lambda outs, _: outs.mean(0)),
        "adds up the outputs without weights": _with_out(lambda outs, _: outs.sum(0)),
        "takes the output of the part with the largest log-sum-exp": _with_out(_largest),
        "weighs each part by exp(lse - maximum), and does not divide by the sum":
            _with_out(lambda outs, lses: (_relative(lses).unsqueeze(-1) * outs).sum(0)),
        "weighs each part by exp(lse), and does not divide by the sum":
            _with_out(lambda outs, lses: (lses.exp().unsqueeze(-1) * outs).sum(0)),
        "divides by the number of parts once more":
            _with_out(lambda outs, lses: exactly(outs, lses)[0] / len(outs)),
        "weighs each part by exp(-lse): the sign":
            _with_out(lambda outs, lses: exactly(outs, -lses)[0]),
        "weighs each part by the log-sum-exp of another: the weights are exchanged":
            _with_out(lambda outs, lses: exactly(outs, lses.flip(0))[0]),
        "returns the output of the first part": _with_out(lambda outs, _: outs[0]),
        "returns the output of the last part": _with_out(lambda outs, _: outs[-1]),
        "weighs each part by its log-sum-exp, not by the exponential of it":
            _with_out(lambda outs, lses: ((lses / lses.sum(0)).unsqueeze(-1) * outs).sum(0)),
        **{f"reads {of}": _of_lses(change) for of, change in _MISREAD.items()},
        **{f"rounds the log-sum-exps to {dtype_name(dtype)}":
            _with_out(lambda outs, lses, dtype=dtype:  # type: ignore[misc]
                      exactly(outs, (lses / per_unit).to(dtype).double() * per_unit)[0])
           for dtype in (torch.float16, torch.bfloat16)},
    }  # fmt: skip


def _lse_rules(per_unit: float) -> dict[str, Rule]:
    """What may be wrong with the log-sum-exp alone, in words."""
    is_e = per_unit == 1.0
    factor = 1 / LN2 if is_e else LN2
    return {
        "is of base 2, not of base e" if is_e else "is of base e, not of base 2":
            _with_lse(lambda outs, lses: lses.logsumexp(0) * factor),
        "is that of the first part: it was not updated": _with_lse(lambda outs, lses: lses[0]),
        "is that of the last part": _with_lse(lambda outs, lses: lses[-1]),
        "is the largest, not the logarithm of the sum": _with_lse(lambda outs, lses: lses.amax(0)),
        "is the sum of those of the parts": _with_lse(lambda outs, lses: lses.sum(0)),
        "is the mean of those of the parts": _with_lse(lambda outs, lses: lses.mean(0)),
        "is rounded to float16": _with_lse(
            lambda outs, lses: (lses.logsumexp(0) / per_unit).half().double() * per_unit),
        "is rounded to bfloat16": _with_lse(
            lambda outs, lses: (lses.logsumexp(0) / per_unit).bfloat16().double() * per_unit),
        "has the wrong sign": _with_lse(lambda outs, lses: -lses.logsumexp(0)),
        "is the logarithm of the sum without the largest": _with_lse(
            lambda outs, lses: lses.logsumexp(0) - lses.amax(0)),
        "is the sum of exponentials, not its logarithm":
            _with_lse(lambda outs, lses: lses.logsumexp(0).exp()),
        "is the logarithm of the mean, not of the sum":
            _with_lse(lambda outs, lses: lses.logsumexp(0) - math.log(len(lses))),
    }  # fmt: skip


def cause_of(every: Sequence[Comparison]) -> str | None:
    """Return the mistakes that give what a merge returned, in all that was compared."""
    # Each is tried against all numbers, those that are right as well; of pairs first, and what fits
    # them in what is merged of more parts.
    found = [sentence for sentence in (_not_finite(every), _numbers(every)) if sentence]
    return "; ".join(found) if found else None


def _numbers(every: Sequence[Comparison]) -> str | None:
    if not any(bool(part.any()) for one in every for part in _where_finite(one)):
        return None
    pairs = [one for one in every if len(one.sizes) == 2] or list(every)
    per_unit, found = every[0].per_unit, []
    for of_out, rule in {"": exactly, **_out_rules(per_unit)}.items():
        if not all(one.fits(rule, lse=False) for one in pairs):
            continue
        for of_lse, other in {"": rule, " ": exactly, **_lse_rules(per_unit)}.items():
            if all(one.fits(_both(rule, other)) for one in every):
                said = f"the log-sum-exp that it returns {of_lse}" * bool(of_lse.strip())
                both = (of_out and f"it {of_out}", said)
                found.append(", and ".join(part for part in both if part))
                break
    if found:
        return ", or ".join(found)
    return _UNKNOWN if any(bool((~one.finite & one.judged).any()) for one in every) else None


def _both(of_out: Rule, of_lse: Rule) -> Rule:
    return lambda outs, lses: (of_out(outs, lses)[0], of_lse(outs, lses)[1])


def _where_finite(one: Comparison) -> tuple[Tensor, Tensor]:
    rows = one.finite & ~one.without_keys
    out, lse = one.broken
    return out & rows.unsqueeze(-1), lse & rows


def _not_finite(every: Sequence[Comparison]) -> str | None:
    """Say of rows that are NaN or infinite what they have in common, and others have not."""
    bad = [~one.finite & (one.broken[0].any(-1) | one.broken[1]) for one in every]
    if not any(bool(rows.any()) for rows in bad):
        return _of_empty_rows(every)
    fit = list(zip(every, bad, strict=True))
    if all(not bool((rows & ~one.without_keys_once).any()) for one, rows in fit):
        alone = [pair for pair in fit if len(pair[0].sizes) == 2 and bool(pair[1].any())]
        if alone and all(_is_inf(*pair) for pair in alone):
            return "where no part has a key, the log-sum-exp is +inf: -inf is that of no key"
        return (
            "rows that neither part has a key for are NaN: -inf minus -inf? If that is meant, "
            'fully_masked="nan", or "undefined"'
        )
    if all(not bool((rows & ~one.with_empty_part).any()) for one, rows in fit):
        return (
            "rows for which a part has no key (its log-sum-exp is -inf) are NaN or infinite: -inf "
            "minus -inf, or 0 times inf? If it is never given one, empty_parts=False"
        )
    return _overflow(fit)


def _is_inf(one: Comparison, rows: Tensor) -> bool:
    if one.lse is None:
        return False
    return bool((one.lse.isposinf() & one.out.isfinite().all(-1))[rows].all())


def _of_empty_rows(every: Sequence[Comparison]) -> str | None:
    """Say whether all that is wrong are rows that no part has a key for."""
    if any(bool(part.any()) for one in every for part in _where_finite(one)):
        return None
    return "rows that no part has a key for hold other numbers than 0, and -inf as log-sum-exp"


# What may be beyond what exp can hold: of which number it is taken, and how large that is.
_ARGUMENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "whose log-sum-exps are {:.3g} or more in size": lambda lses: lses.amax(0).abs(),
    "whose last log-sum-exp is {:.3g} or more above the first": lambda lses: lses[-1] - lses[0],
    "whose first log-sum-exp is {:.3g} or more above the last": lambda lses: lses[0] - lses[-1],
}


def _overflow(fit: Sequence[tuple[Comparison, Tensor]]) -> str | None:
    """Say what is too large for exp in all rows that are not finite, and in no others."""
    pairs = [one for one in fit if len(one[0].sizes) == 2]
    for words, of in _ARGUMENTS.items():
        texts = []
        for dtype in dict.fromkeys(one.dtype for one, _ in pairs):
            own = [(one, rows) for one, rows in pairs if one.dtype == dtype]
            sizes = [of(one.states[1]).masked_fill(one.without_keys, 0.0) for one, _ in own]
            bad = torch.cat([size[rows & ~one.without_keys]
                             for size, (one, rows) in zip(sizes, own, strict=True)])  # fmt: skip
            good = torch.cat([size[one.finite & ~one.without_keys]
                              for size, (one, _) in zip(sizes, own, strict=True)])  # fmt: skip
            if len(bad):
                texts.append(_beyond(words, float(bad.min()), good))
        if texts and None not in texts:
            return texts[-1]
    return None


def _beyond(words: str, bad: float, good: Tensor) -> str | None:
    most = float(good.max()) if len(good) else math.inf
    limits = {name: math.log(torch.finfo(getattr(torch, name)).max)
              for name in ("float16", "float32", "float64")}  # fmt: skip
    between = [name for name, limit in limits.items() if most <= limit <= bad]
    if len(between) != 1:  # else the numbers do not say which
        return None
    return (
        f"rows {words.format(bad)} are NaN or infinite: exp of {between[0]} overflows from "
        f"{limits[between[0]]:.3g} on, no maximum was subtracted?"
    )
