"""Drawn problems whose keys are cut into parts, and who makes the states of the parts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pytest_attnheat.assertions.behaviour.merge_states import LN2, exactly
from pytest_attnheat.assertions.behaviour.subject import as_described, takes
from pytest_attnheat.attention.call import Call
from pytest_attnheat.attention.computation import reference
from pytest_attnheat.attention.reference import causal_mask
from pytest_attnheat.attention.scoring import draw
from pytest_attnheat.inputs import misuse, wide_dtype

_BATCH, _HEADS, _KEY_HEADS, _QUERIES, _KEYS, _WIDTH = 2, 4, 2, 5, 24, 64
# By how much the scores of some parts are above those of others.
_FAR = 300.0


@dataclass(frozen=True)
class Problem:
    """How keys are cut into parts.

    Attributes:
        name: What is special of it.
        sizes: How many keys each part has.
        levels: What is added to all scores of each part.
        hidden: Who may see what: "nothing" is hidden, "later" keys, or keys at "random".
    """

    name: str
    sizes: tuple[int, ...]
    levels: tuple[float, ...] = ()
    hidden: str = "nothing"

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
class Maker:
    """Makes the states of parts.

    Attributes:
        attention: Code under test that makes them; None for attention in float64.
        per_unit: What a log-sum-exp of 1 is in base e.
        seed: What all is drawn from.
        device: Where the states are.
    """

    attention: Callable[..., Any] | None
    per_unit: float
    seed: int
    device: str

    def can_ask(self, problem: Problem) -> bool:
        """Whether the attention of the caller can be asked."""
        if max(problem.sizes) == 0:
            return False
        return problem.hidden == "nothing" or takes(self.attention, "attn_mask")  # type: ignore[arg-type]

    def call(self, problem: Problem) -> Call:
        """Draw a problem of all keys."""
        queries = _KEYS if problem.hidden == "later" else _QUERIES
        keys = sum(problem.sizes)
        query = 1.5 * draw("query", self.seed, _BATCH, _HEADS, queries, _WIDTH)
        key = draw("key", self.seed, _BATCH, _KEY_HEADS, keys, _WIDTH)
        value = draw("value", self.seed, _BATCH, _KEY_HEADS, keys, _WIDTH)
        # With a query of 8 there, and a scale of 1/8, this is what is added to the score.
        query[..., 0], key[..., 0] = math.sqrt(_WIDTH), 0.0
        for level, part in zip(problem.levels, problem.parts, strict=False):
            key[..., part, 0] = level
        mask = None
        if problem.hidden == "later":
            mask = causal_mask(queries, keys, alignment="top_left")
        elif problem.hidden == "random":
            mask = draw("mask", self.seed, queries, keys) > 0
            first, last = problem.parts
            mask[1, first], mask[2, last], mask[3] = False, False, False
            mask[0], mask[1, last], mask[2, first] = True, True, True
        return Call(query, key, value, mask=mask)

    def states(self, problem: Problem, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        """Return the outputs and log-sum-exps of all parts, as the merge is given them."""
        call = self.call(problem)
        found = [self._state(_part_of(call, part), dtype) for part in problem.parts]
        return [out for out, _ in found], [lse for _, lse in found]

    def whole(self, problem: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the same of all keys."""
        return self._state(self.call(problem), dtype)

    def _state(self, call: Call, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        wide = wide_dtype(dtype)
        if call.key_len == 0:
            shape = call.query.shape
            out, lse = torch.zeros(shape), torch.full(shape[:-1], -math.inf)
        elif self.attention is not None:
            return self._asked(call, dtype)
        else:
            exact = reference(call, wanted=("lse",)).exact
            out, lse = exact["output"], exact["lse"].squeeze(-1) / self.per_unit
        return out.to(self.device, dtype), lse.to(self.device, wide)

    def _asked(self, call: Call, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Ask the code under test, of which the sizes tell the dimensions of the log-sum-exp."""
        assert self.attention is not None
        query, key, value = (tensor.to(self.device, dtype) for tensor in call.tensors)
        mask = None if call.mask is None else call.mask.to(self.device)
        described = as_described(self.attention)
        if described is not None:
            answer = described.ask(Call(query, key, value, mask=mask))
            out, lse = answer.output, getattr(answer, "besides", None)
        else:
            group = query.shape[1] // key.shape[1]
            key, value = (one.repeat_interleave(group, 1) for one in (key, value))
            masks = {} if mask is None else {"attn_mask": mask}
            result = self.attention(query, key, value, **masks)
            out, lse = result[:2] if isinstance(result, (tuple, list)) else (result, None)
        wanted = tuple(query.shape[:-1])
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


def adds_up(
    merged: Sequence[Tensor], whole: Sequence[Tensor], tolerance: tuple[float, float]
) -> bool:
    """Whether two states are the same."""
    size = whole[1].abs().masked_fill(whole[1].isinf(), 0.0) + 1
    off = tolerance[1] * size
    near = (merged[1] == whole[1]) | ((merged[1] - whole[1]).abs() <= off)
    most = whole[0].abs().amax()
    near_out = (merged[0] - whole[0]).abs() <= (tolerance[0] + off.unsqueeze(-1)) * most
    return bool(near.all() & near_out.all())


def cause_of_states(
    states: tuple[Tensor, Tensor],
    whole: Sequence[Tensor],
    per_unit: float,
    tolerance: tuple[float, float],
) -> str | None:
    """Say what is wrong with the log-sum-exps of attention, as the numbers show it."""
    outs, lses = states
    if bool(lses.isposinf().any()):
        return "its log-sum-exp is +inf where no key is seen: -inf is that of no key"
    if bool((outs.isnan().any(-1) | lses.isnan()).any()):
        return "it gives NaN for a query that sees no key of a part: the softmax of -inf?"
    factor, own, other = (LN2, "2", "e") if per_unit == 1.0 else (1 / LN2, "e", "2")
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        f"its log-sum-exps are of base {own}, and the merge is one of base {other}":
            lambda lse: lse * factor,
        "its log-sum-exps have the wrong sign": lambda lse: -lse,
    }  # fmt: skip
    for sentence, change in changes.items():
        if adds_up(exactly(outs, change(lses)), (whole[0], change(whole[1] * per_unit)), tolerance):
            return sentence
    return _sink(states, whole, per_unit, tolerance)


def _sink(
    states: tuple[Tensor, Tensor],
    whole: Sequence[Tensor],
    per_unit: float,
    tolerance: tuple[float, float],
) -> str | None:
    """Say whether what parts have too much is a number of each head, counted in each part."""
    outs, lses = states
    whole_lse = whole[1] * per_unit
    top = lses.amax(0)
    left = ((lses - top).exp().sum(0) - (whole_lse - top).exp()) / (len(lses) - 1)
    sinks = left.clamp(min=0.0).log() + top
    sums = (whole_lse - top).exp().unsqueeze(-1) * whole[0]
    same = ((lses - top).exp().unsqueeze(-1) * outs).sum(0) - sums
    spread = (sinks.amax((0, 2)) - sinks.amin((0, 2))).nan_to_num(nan=math.inf)
    fine = bool((spread <= 0.05).all()) and bool((left > 100 * tolerance[1]).all())
    if not fine or not bool((same.abs() <= 10 * tolerance[0] * sums.abs().amax()).all()):
        return None
    shown = ", ".join(f"{float(sink):.2f}" for sink in sinks.mean((0, 2))[:4])
    return f"a sink (of score {shown}) is counted in each part: give it to one part alone"
