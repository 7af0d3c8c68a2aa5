"""Attention as a list of decisions, carried out in float64 in plain sight.

`Plan()` is correct attention. A defect is a plan with another decision (see `defects`), so that
what a wrong implementation computes can be computed as well, and compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pytest_attnheat.attention.call import Call, Positions
from pytest_attnheat.attention.decisions import Plan as Plan
from pytest_attnheat.attention.decisions import Source
from pytest_attnheat.attention.vocabulary import Alignment


class NotApplicable(ValueError):  # noqa: N818 (no error, a fact about a plan and a case)
    """A plan cannot be carried out on a case, for instance because lengths would have to agree."""


@dataclass(frozen=True, eq=False)
class Case(Call):
    """A call that a plan is carried out on, (batch, heads, length, width).

    Attributes:
        name: What it is called in messages.
        scale_given: Whether the scale is passed as an argument of this call.
        dtype: The dtype in which it is computed: beyond its range exp is 0 or inf.
    """

    name: str = ""
    scale_given: bool = False
    dtype: torch.dtype = torch.float64

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of the weights: (batch, heads, query_len, key_len)."""
        batch, heads, query_len = self.query.shape[:3]
        return batch, heads, query_len, self.key.shape[2]


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a plan gives on a case.

    Attributes:
        output: (batch, heads, query_len, value_dim), float64
        weights: (batch, heads, query_len, key_len), float64
        scores: Of the same shape: scaled, without any mask.
        permitted: Of the same shape: where the plan lets a query attend.
        value: (batch, heads, key_len, value_dim): what was used as values.
    """

    output: Tensor
    weights: Tensor
    scores: Tensor
    permitted: Tensor
    value: Tensor


# How a step is done: it is called with its function, the plan, the case, and what it works on.
Step: TypeAlias = Callable[..., Any]


def directly(function: Callable[..., Any], *arguments: Any) -> Any:
    """Do a step."""
    return function(*arguments)


def carry_out(plan: Plan, case: Case, step: Step = directly) -> Outcome:
    """Carry out a plan in float64, and keep what there was on the way.

    Args:
        plan: How attention is computed; `Plan()` is correct.
        case: Inputs, on the CPU.
        step: Does each step. What it comes to may depend on the plan, the case and what the steps
            before came to, and on nothing else.

    Raises:
        NotApplicable: The plan cannot be carried out on these shapes, for instance keys as values
            of another width.
    """
    query, key, value = step(_operands, plan, case)
    scores = step(_scores, plan, case, query, key)
    hard, soft = step(_permitted, plan, case)
    filled = step(_filled, plan, scores, hard, soft)
    numbers = step(_with_sinks, plan, case, filled)
    weights = step(_weights, plan, case, numbers, hard, soft)
    output = step(_output, plan, weights, value)
    return Outcome(output, weights, scores, hard & soft, value)


# --- queries, keys and values


def _operands(plan: Plan, case: Case) -> tuple[Tensor, Tensor, Tensor]:
    groups = case.query.shape[1] // case.key.shape[1]
    tensors: dict[Source, Tensor] = {
        "query": _split(plan, case.query.double()),
        "key": _grouped(plan, _split(plan, case.key.double()), groups),
        "value": _grouped(plan, _split(plan, case.value.double()), groups),
    }
    query, key, value = (tensors[n] for n in (plan.query_from, plan.key_from, plan.value_from))
    query_len, key_len = case.shape[2:]
    fits = (
        query.shape[2] == query_len
        and key.shape[2] == value.shape[2] == key_len
        and query.shape[3] == key.shape[3]
        and value.shape[3] == case.value.shape[3]
    )
    if not fits:
        raise NotApplicable("the tensors that are used in place of others have other sizes")
    return query, key, value


def _split(plan: Plan, tensor: Tensor) -> Tensor:
    if plan.split == "transpose":
        return tensor
    return tensor.transpose(1, 2).reshape(tensor.shape)


def _grouped(plan: Plan, tensor: Tensor, groups: int) -> Tensor:
    if groups == 1:
        return tensor
    if plan.grouping == "tile":
        return tensor.repeat(1, groups, 1, 1)
    if plan.grouping == "first":
        return tensor[:, :1].expand(-1, groups * tensor.shape[1], -1, -1)
    return tensor.repeat_interleave(groups, 1)


# --- scores


def _scores(plan: Plan, case: Case, query: Tensor, key: Tensor) -> Tensor:
    factor = 1.0 if plan.scale_after else scale_of(plan, case)
    products = _rounded((query @ key.mT) * (factor * plan.temperature), plan.scores_dtype)
    return replace(case, alignment=_alignment(plan, case)).scored(products)


def scale_of(plan: Plan, case: Case) -> float:
    """Return what a plan multiplies scores by, but for its temperature."""
    width, declared = case.query.shape[-1], case.factor
    rules: dict[str, float] = {
        "declared": declared,
        "missing": 1.0,
        "squared": declared * declared,
        "inverse": 1.0 / declared if declared else math.inf,
        "value_width": case.value.shape[-1] ** -0.5,
        "embedding": (case.heads * width) ** -0.5,
        "key_len": case.key_len**-0.5,
        "default": width**-0.5 if case.scale_given else declared,
    }
    return rules[plan.scale]


def _rounded(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if dtype is None else tensor.to(dtype).double()


# --- who may attend to whom


def _permitted(plan: Plan, case: Case) -> tuple[Tensor, Tensor]:
    """Return what is filled with -inf and what is treated by `plan.masking`, both as True = may."""
    mask, by_position = _mask(plan, case), _by_position(plan, case)
    if case.causal and case.mask is not None:
        if plan.together == "mask_only":
            by_position = _by_position(replace(plan, causal="ignored"), case)
        elif plan.together == "causal_only":
            mask = torch.ones_like(mask)
    nothing = torch.ones_like(mask)
    hard, soft = {
        "all": (nothing, mask & by_position),
        "mask": (by_position, mask),
        "causal": (mask, by_position),
    }[plan.covers]
    return hard & _used_keys(plan, case), soft


def _mask(plan: Plan, case: Case) -> Tensor:
    mask = _given_mask(plan, case)
    return mask if case.bias is None else mask & (case.bias != -math.inf)


def _given_mask(plan: Plan, case: Case) -> Tensor:
    batch, heads, query_len, key_len = case.shape
    if case.mask is None or plan.mask == "ignored":
        return torch.ones(case.shape, dtype=torch.bool)
    mask = case.mask.expand(case.shape)
    if plan.mask == "transposed" and query_len != key_len:
        raise NotApplicable("a mask that is not square cannot be transposed")
    sample = torch.arange(batch * heads).reshape(batch, heads) % batch
    wrong = {
        "inverted": lambda: ~mask,
        "transposed": lambda: mask.mT,
        "tiled": lambda: mask[sample, torch.arange(heads)],
        "first": lambda: mask[:1].expand(case.shape),
        "rolled": lambda: mask.roll(1, 0),
        "rolled_back": lambda: mask.roll(-1, 0),
    }
    return wrong[plan.mask]() if plan.mask in wrong else mask


def _alignment(plan: Plan, case: Case) -> Alignment:
    if plan.causal != "other_corner":
        return case.alignment
    return "bottom_right" if case.alignment == "top_left" else "top_left"


def _by_position(plan: Plan, case: Case) -> Tensor:
    """What is permitted by where queries and keys stand, as the plan reads it."""
    read = replace(case, causal=False, window=None, alignment=_alignment(plan, case))
    at = read.everywhere(case.query.device)
    permitted = torch.ones(case.maps, *case.shape[2:], dtype=torch.bool)
    for rule in (*read.rules(at), *_causal(plan, case, at), *_window(plan, case, at)):
        permitted &= rule
    return permitted.view(case.shape)


def _causal(plan: Plan, case: Case, at: Positions) -> Iterator[Tensor]:
    if not ((case.causal and plan.causal != "ignored") or plan.causal == "always"):
        return
    _, _, query_len, key_len = case.shape
    shifted = {
        "all": True, "differ": query_len != key_len, "more_keys": query_len < key_len
    }[plan.causal_shift_where]  # fmt: skip
    shift = plan.causal_shift * shifted
    seen = at.within(-shift, None) if plan.causal == "reversed" else at.within(None, shift)
    yield seen | (at.key < case.prefix)


def _window(plan: Plan, case: Case, at: Positions) -> Iterator[Tensor]:
    if case.window is None or plan.window == "ignored":
        return
    sides = case.window[::-1] if plan.window == "swapped" else case.window
    wider = [
        side if side is None else side + more
        for side, more in zip(sides, plan.window_shift, strict=True)
    ]
    if any(side is not None and side < 0 for side in wider):
        raise NotApplicable("a window cannot be smaller than its own key")
    yield at.within(*wider) | (at.key < case.sink_keys)


def _used_keys(plan: Plan, case: Case) -> Tensor:
    key_len = case.shape[3]
    used = torch.ones(key_len, dtype=torch.bool)
    if plan.dropped_key != "none":
        used[0 if plan.dropped_key == "first" else -1] = False
    if plan.key_block:
        used[_whole_blocks(plan, plan.key_block, key_len) :] = False
    return used


def _whole_blocks(plan: Plan, block: int, length: int) -> int:
    """How many of some keys or queries are in whole blocks."""
    if plan.short_block == "kept" and length < block:
        return length
    return length // block * block


# --- weights


def _weights(plan: Plan, case: Case, weights: Tensor, hard: Tensor, soft: Tensor) -> Tensor:
    if plan.masking in ("after", "after_renormalised"):
        weights = weights.masked_fill(~soft, 0.0)
    if plan.masking == "after_renormalised":
        weights = _divided(plan, weights, weights.sum(-1, keepdim=True))
    weights = _fully_masked_rows(plan, case, weights, hard & soft)
    if plan.scale_after:
        weights = weights * scale_of(plan, case)
    if plan.weights_of_heads == "averaged":
        weights = weights.mean(1, keepdim=True).expand_as(weights)
    return _rounded(weights, plan.weights_dtype)


def _filled(plan: Plan, scores: Tensor, hard: Tensor, soft: Tensor) -> Tensor:
    masked = {
        "fill": lambda: scores.masked_fill(~soft, plan.fill),
        "added": lambda: torch.where(soft, scores, scores + plan.fill),
        "ones": lambda: scores + soft.double(),
        "ones_masked": lambda: scores + (~soft).double(),
    }
    scores = masked[plan.masking]() if plan.masking in masked else scores
    return scores.masked_fill(~hard, -math.inf)


def _in_range(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers as large or small as a dtype holds; half precision is left to float32 here."""
    if dtype == torch.float64:
        return numbers
    limits = torch.finfo(torch.float32)
    held = numbers.masked_fill(numbers.abs() < limits.tiny, 0.0)
    return held.masked_fill(numbers > limits.max, math.inf)


def _with_sinks(plan: Plan, case: Case, scores: Tensor) -> Tensor:
    """The weights, where a sink is one key more that has no value."""
    if case.sinks is None or plan.dim != "keys":
        return _in_range(_normalised(plan, scores, case.dtype), case.dtype)
    sinks = case.sinks.double()[:, None, None].expand(*scores.shape[:-1], 1)
    weights = _normalised(plan, torch.cat([scores, sinks], -1), case.dtype)
    return _in_range(weights[..., :-1], case.dtype)


def _normalised(plan: Plan, scores: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights of scores that are -inf where they are masked."""
    dims = {"keys": (-1,), "queries": (-2,), "heads": (1,), "batch": (0,), "map": (-2, -1)}
    dim = dims[plan.dim]
    kind = plan.normaliser
    if plan.online_block and (kind != "softmax" or plan.dim != "keys"):
        raise NotApplicable("only a softmax over the keys is taken block by block")
    if kind == "scores":
        return scores
    if kind == "sigmoid":
        return torch.sigmoid(scores)
    if kind == "hard":
        best = torch.zeros_like(scores).scatter(-1, scores.argmax(-1, keepdim=True), 1.0)
        return best.masked_fill(scores.isneginf().all(-1, keepdim=True), math.nan)
    if kind == "relu":
        positive = scores.relu()
        return _divided(plan, positive, positive.sum(dim, keepdim=True))
    largest = scores.amax(dim, keepdim=True)
    shifted = scores - largest  # NaN where there is nothing but -inf
    if kind == "unnormalised":
        return scores.exp()
    if kind == "unnormalised_shifted":
        return shifted.exp()
    if kind == "no_maximum":
        numbers = _in_range(scores.exp(), dtype)
        return _divided(plan, numbers, numbers.sum(dim, keepdim=True))
    numbers = shifted.exp()
    if kind == "plus_one":
        # In units of the largest, which is at least that of the score 0 of the extra key.
        top = largest.clamp(min=0.0)
        numbers = (scores - top).exp()
        return numbers / (torch.exp(-top) + numbers.sum(dim, keepdim=True))
    if plan.online_block:
        return _online(plan, scores, numbers)
    total = numbers.sum(dim, keepdim=True)
    if kind == "plus_one_shifted":
        return numbers / (1.0 + total)
    if kind == "log_softmax":
        return shifted - total.log()
    weights = _slices(plan, numbers / total, scores, dim)
    if kind == "softmax":
        return weights
    again = weights if kind == "twice" else weights.masked_fill(scores.isneginf(), -math.inf)
    return torch.softmax(again, dim[0])


def _online(plan: Plan, scores: Tensor, numbers: Tensor) -> Tensor:
    """Softmax block by block: what is stale has the maximum of its own block's time subtracted."""
    blocks = torch.split(scores, plan.online_block, -1)
    largest = torch.stack([block.amax(-1) for block in blocks], -1).cummax(-1).values
    so_far = largest.repeat_interleave(plan.online_block, -1)[..., : scores.shape[-1]]
    stale = (scores - so_far).exp().masked_fill(scores.isneginf(), 0.0)
    above = stale if plan.stale in ("output", "both") else numbers
    below = stale if plan.stale in ("sum", "both") else numbers
    return above / below.sum(-1, keepdim=True)


def _divided(plan: Plan, numbers: Tensor, total: Tensor) -> Tensor:
    quotient = numbers / total
    return quotient if plan.empty_slices == "nan" else quotient.masked_fill(total == 0, 0.0)


def _slices(plan: Plan, weights: Tensor, scores: Tensor, dim: tuple[int, ...]) -> Tensor:
    """Give what the softmax made of nothing but -inf its meaning, where it is not a row."""
    if plan.dim == "keys" or plan.empty_slices == "nan":
        return weights
    size = math.prod(scores.shape[d] for d in dim)
    meaning = 0.0 if plan.empty_slices == "zero" else 1.0 / size
    empty = scores.isneginf().all(dim[-1], keepdim=True)
    for other in dim[:-1]:
        empty = empty.all(other, keepdim=True)
    return weights.masked_fill(empty, meaning)


def _fully_masked_rows(plan: Plan, case: Case, weights: Tensor, permitted: Tensor) -> Tensor:
    meaning = plan.fully_masked or case.fully_masked
    if case.sinks is not None:  # a row that has one is never empty
        permitted = permitted | (case.sinks > -math.inf)[:, None, None]
    if meaning in ("natural", "undefined"):
        return weights
    number = {"zero": 0.0, "nan": math.nan, "uniform": 1.0 / case.shape[3]}[meaning]
    return weights.masked_fill(~permitted.any(-1, keepdim=True), number)


# --- output


def _output(plan: Plan, weights: Tensor, value: Tensor) -> Tensor:
    if plan.masked_nan == "unfelt":
        value = value.nan_to_num(nan=0.0)
    output = (weights @ value) * plan.output_factor
    if plan.query_block:
        output[:, :, _whole_blocks(plan, plan.query_block, output.shape[2]) :] = 0.0
    if plan.merge == "averaged":
        return output.mean(1, keepdim=True).expand_as(output)
    if plan.merge == "reshape":
        batch, heads, query_len, width = output.shape
        return output.reshape(batch, query_len, heads, width).transpose(1, 2)
    return output
