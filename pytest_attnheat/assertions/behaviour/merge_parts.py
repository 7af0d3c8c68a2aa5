"""Drawn problems whose keys are cut into parts, and who makes the states of the parts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...attention.call import Call
from ...attention.computation import reference
from ...attention.reference import causal_mask
from ...attention.scoring import draw
from ...attention.tolerance import output_tolerance
from ...inputs import misuse, wide_dtype
from .merge_states import LN2, exactly
from .subject import as_described, takes

_BATCH, _HEADS, _KEY_HEADS, _QUERIES, _KEYS, _WIDTH = 2, 4, 2, 5, 24, 64
# By how much the scores of some parts are above those of others.
_FAR = 300.0


@dataclass(frozen=True)
class Problem:
    """How keys are cut into parts."""

    name: str  # What is special of it
    sizes: tuple[int, ...]  # How many keys each part has
    levels: tuple[float, ...] = ()  # What is added to all scores of each part
    hidden: str = "nothing"  # "nothing", "later" keys, or keys at "random"

    @property
    def parts(self) -> list[slice]:
        """The keys of each part."""
        ends = [sum(self.sizes[: i + 1]) for i in range(len(self.sizes))]
        return [slice(end - size, end) for end, size in zip(ends, self.sizes, strict=True)]

    @property
    def has_empty(self) -> bool:
        """Whether some row of some part sees no key."""
        return 0 in self.sizes or self.hidden != "nothing"


# The simple ones first: the first that goes wrong is shown.
PROBLEMS = (
    Problem("two halves", (12, 12)),
    Problem("uneven parts", (3, 21)),
    Problem("a first part of one key", (1, 23)),
    Problem("a last part of one key", (23, 1)),
    Problem("one part alone", (24,)),
    Problem("three parts", (7, 12, 5)),
    Problem("many parts", (1, 2, 8, 3, 5, 5)),
    Problem("scores of 14 and 13 more", (12, 12), (14.0, 13.0)),
    Problem("scores of 40 more in the first part", (12, 12), (40.0, 0.0)),
    Problem("scores of 40 more in the last part", (12, 12), (0.0, 40.0)),
    Problem("a first part that dominates", (12, 12), (_FAR, 0.0)),
    Problem("a last part that dominates", (12, 12), (0.0, _FAR)),
    Problem("large scores in both parts", (12, 12), (200.0, 199.0)),
    Problem("very negative scores in both parts", (12, 12), (-200.0, -201.0)),
    Problem("a part of three that dominates", (9, 6, 9), (0.0, _FAR, -_FAR)),
    Problem("an empty first part", (0, 24)),
    Problem("an empty last part", (24, 0)),
    Problem("an empty part between others", (9, 0, 15)),
    Problem("causal: some rows of a part see nothing", (8, 16), hidden="later"),
    Problem("causal, three parts", (5, 9, 10), hidden="later"),
    Problem("rows that see nothing in a part", (10, 14), hidden="random"),
    Problem("empty parts alone", (0, 0)),
    Problem("three empty parts", (0, 0, 0)),
)


@dataclass(frozen=True)
class Added:
    """What attention gave for parts of the keys, and for all keys: float64, base e, on the CPU."""

    outs: Tensor  # Of the parts, (n, batch, heads, query_len, width)
    lses: Tensor  # (n, batch, heads, query_len)
    out: Tensor  # Of all keys
    lse: Tensor  # Likewise
    call: Call  # What was asked of all keys
    tolerance: tuple[float, float]  # By what part an output and a log-sum-exp may be off
    per_unit: float  # What a log-sum-exp of 1 is in base e

    def wrong(self, change: Callable[[Tensor], Tensor] = lambda lse: lse) -> tuple[Tensor, Tensor]:
        """Where the parts do not add up, (..., width) and (...), if log-sum-exps are read so."""
        out, lse = exactly(self.outs, change(self.lses))
        off = self._off(change(self.lse))
        near = self._near(lse, change(self.lse), off)
        largest = self.out.abs().amax()
        near_out = (out - self.out).abs() <= (self.tolerance[0] + off.unsqueeze(-1)) * largest
        return ~near_out, ~near

    def _off(self, lse: Tensor) -> Tensor:
        return self.tolerance[1] * (1 + lse.abs().masked_fill(lse.isinf(), 0.0))

    def _near(self, found: Tensor, wanted: Tensor, off: Tensor) -> Tensor:
        return (found == wanted) | ((found - wanted).abs() <= off)

    def cause(self) -> str | None:
        """Say what is wrong with the states, as the numbers show it."""
        if bool(self.lses.isposinf().any()):
            return "its log-sum-exp is +inf where no key is seen: -inf is that of no key"
        if bool((self.outs.isnan().any(-1) | self.lses.isnan()).any()):
            return "it gives NaN for a query that sees no key of a part: the softmax of -inf?"
        factor, own, other = (LN2, "2", "e") if self.per_unit == 1.0 else (1 / LN2, "e", "2")
        changes: dict[str, Callable[[Tensor], Tensor]] = {
            f"its log-sum-exps are of base {own}, and the merge is one of base {other}":
                lambda lse: lse * factor,
            "its log-sum-exps have the wrong sign": lambda lse: -lse,
        }  # fmt: skip
        for sentence, change in changes.items():
            if not any(bool(wrong.any()) for wrong in self.wrong(change)):
                return sentence
        return self._sink() or self._other()

    def _other(self) -> str | None:
        """Say what the log-sum-exps of plain attention became, if it is one."""
        group = self.call.query.shape[1] // self.call.key.shape[1]
        key, value = (t.repeat_interleave(group, 1) for t in (self.call.key, self.call.value))
        products = self.call.query @ key.mT
        scores = products * self.call.factor
        if self.call.mask is not None:
            scores = scores.masked_fill(~self.call.mask, -math.inf)
        lse, right = scores.logsumexp(-1), scores.softmax(-1) @ value
        known = {
            "is the largest score of a row, not the logarithm of its sum": scores.amax(-1),
            "is that of the products before the scale": products.logsumexp(-1),
            "is the sum of a row, not its logarithm": lse.exp(),
        }
        for sentence, found in known.items():
            if bool(self._near(self.lse, found, self._off(found)).all()):
                return f"its log-sum-exp {sentence}"
        share = ((self.out * right).sum(-1) / right.square().sum(-1)).clamp(1e-6, 1 - 1e-6)
        sinks = lse - share.logit()
        same = (self.out - share.unsqueeze(-1) * right).abs().amax()
        if not bool(self._near(self.lse, lse, self._off(lse)).all()) or (
            float(same) > self.tolerance[0] * float(right.abs().amax())
        ):
            return None
        return _named_sink(sinks, "makes the output of each part smaller, and its log-sum-exp not")

    def _sink(self) -> str | None:
        """Say whether what parts have too much is a number of each head, counted in each part."""
        top = self.lses.amax(0)
        parts, whole = (self.lses - top).exp(), (self.lse - top).exp()
        left = (parts.sum(0) - whole) / max(1, len(parts) - 1)
        sums = whole.unsqueeze(-1) * self.out
        same = (parts.unsqueeze(-1) * self.outs).sum(0) - sums
        clear = bool((left > 100 * self.tolerance[1]).all())
        if not clear or bool((same.abs() > 10 * self.tolerance[0] * sums.abs().amax()).any()):
            return None
        return _named_sink(left.log() + top, "is counted in each part: give it to one part alone")


def _named_sink(sinks: Tensor, said: str) -> str | None:
    """Name sinks (batch, heads, query_len), if they are one for each head."""
    if not bool((sinks.amax((0, 2)) - sinks.amin((0, 2)) <= 0.05).all()):
        return None
    shown = ", ".join(f"{float(sink):.2f}" for sink in sinks.mean((0, 2))[:4])
    return f"a sink (of score {shown}) {said}"


@dataclass(frozen=True)
class Maker:
    """Makes the states of parts."""

    attention: Callable[..., Any] | None  # Code that makes them; None for attention in float64
    per_unit: float  # What a log-sum-exp of 1 is in base e
    seed: int  # What all is drawn from
    device: str  # Where the states are

    def can_ask(self, problem: Problem) -> bool:
        """Whether a problem can be asked of the caller's attention, if that makes the states."""
        if self.attention is None:
            return True
        asked = problem.hidden == "nothing" or takes(self.attention, "attn_mask")
        return max(problem.sizes) > 0 and asked

    def states(
        self, problem: Problem, dtypes: Sequence[torch.dtype]
    ) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """Yield the outputs and log-sum-exps of all parts, in each dtype."""
        call = drawn(problem, self.seed)
        for dtype in dtypes:
            given = [(out, lse / self.per_unit) for out, lse in _exact_states(problem, self.seed)]
            if self.attention is not None:
                given = [self._asked(_part_of(call, part), dtype) for part in problem.parts]
            found = [self._in(dtype, *state) for state in given]
            yield [out for out, _ in found], [lse for _, lse in found]

    def added(self, problem: Problem, outs: Sequence[Tensor], lses: Sequence[Tensor]) -> Added:
        """Lay states that the attention of the caller made beside what it gives for all keys."""
        call, dtype = drawn(problem, self.seed), outs[0].dtype
        out, lse = self._asked(call, dtype)
        return Added(
            torch.stack([*outs]).cpu().double(),
            torch.stack([*lses]).cpu().double() * self.per_unit, out.cpu().double(),
            lse.cpu().double() * self.per_unit, call,
            (2 * output_tolerance(dtype), output_tolerance(lse.dtype)), self.per_unit,
        )  # fmt: skip

    def _in(self, dtype: torch.dtype, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        wide = wide_dtype(dtype)  # what kernels keep log-sum-exps in
        return out.to(self.device, dtype), lse.to(self.device, wide)

    def _asked(self, call: Call, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Ask the code under test, of which the sizes tell the dimensions of the log-sum-exp."""
        assert self.attention is not None
        if call.key_len == 0:  # which few can be asked
            return _exact(call)
        query, key, value = (tensor.to(self.device, dtype) for tensor in call.tensors)
        group = query.shape[1] // key.shape[1]
        key, value = (one.repeat_interleave(group, 1) for one in (key, value))
        mask = None if call.mask is None else call.mask.to(self.device)
        described = as_described(self.attention)
        if described is not None:
            answer = described.ask(Call(query, key, value, mask=mask))
            out, lse = answer.output, getattr(answer, "besides", None)
        else:
            masks = {} if mask is None else {"attn_mask": mask}
            with torch.no_grad():
                result = self.attention(query, key, value, **masks)
            out, lse = result[:2] if isinstance(result, (tuple, list)) else (result, None)
        wanted = tuple(query.shape[:-1])  # all of other sizes
        if not isinstance(out, Tensor) or not isinstance(lse, Tensor):
            got = f"{type(out).__name__} and {type(lse).__name__}"
            raise TypeError(misuse("what attention returns", got, "two tensors, (out, lse)"))
        lse = lse.squeeze(-1) if lse.ndim > 3 else lse
        if out.shape != query.shape or sorted(lse.shape) != sorted(wanted):
            got = f"{tuple(out.shape)} and {tuple(lse.shape)}"
            accepted = f"{tuple(query.shape)} and {wanted}"
            raise ValueError(misuse("what attention returns", got, accepted))
        return out.detach(), lse.detach().permute([lse.shape.index(size) for size in wanted])


def _part_of(call: Call, part: slice) -> Call:
    mask = None if call.mask is None else call.mask[..., part]
    return Call(call.query, call.key[..., part, :], call.value[..., part, :], mask=mask)


def drawn(problem: Problem, seed: int) -> Call:
    """Draw a problem of all keys."""
    queries = _KEYS if problem.hidden == "later" else _QUERIES
    keys = sum(problem.sizes)
    query = 1.5 * draw("query", seed, _BATCH, _HEADS, queries, _WIDTH)
    key = draw("key", seed, _BATCH, _KEY_HEADS, keys, _WIDTH)
    value = draw("value", seed, _BATCH, _KEY_HEADS, keys, _WIDTH)
    # With a query of 8 there, and a scale of 1/8, this is what is added to the score.
    query[..., 0], key[..., 0] = math.sqrt(_WIDTH), 0.0
    for level, part in zip(problem.levels, problem.parts, strict=False):
        key[..., part, 0] = level
    mask = None
    if problem.hidden == "later":
        mask = causal_mask(queries, keys, alignment="top_left")
    elif problem.hidden == "random":
        mask = draw("mask", seed, queries, keys) > 0
        first, last = problem.parts
        mask[1, first], mask[2, last], mask[3] = False, False, False
        mask[0], mask[1, last], mask[2, first] = True, True, True
    return Call(query, key, value, mask=mask)


# Each of them takes some milliseconds, and every merge is given the same.
@lru_cache(maxsize=64)
def _exact_states(problem: Problem, seed: int) -> tuple[tuple[Tensor, Tensor], ...]:
    """The states of all parts in float64 and base e, which nobody writes to."""
    call = drawn(problem, seed)
    return tuple(_exact(_part_of(call, part)) for part in problem.parts)


def _exact(call: Call) -> tuple[Tensor, Tensor]:
    if call.key_len == 0:
        shape = call.query.shape
        return torch.zeros(shape), torch.full(shape[:-1], -math.inf)
    exact = reference(call, wanted=("lse",)).exact
    return exact["output"], exact["lse"].squeeze(-1)
