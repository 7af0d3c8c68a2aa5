"""How a plan makes weights of scores: over which keys, in which parts, by which function."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .decisions import PREFIX, SHARDS, Plan
from .misreadings import Case, NotApplicable


def in_range(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers as large or small as a dtype holds; half precision is left to float32 here."""
    if dtype == torch.float64:
        return numbers
    limits = torch.finfo(torch.float32)
    held = numbers.masked_fill(numbers.abs() < limits.tiny, 0.0)
    return held.masked_fill(numbers > limits.max, math.inf)


def normalised(plan: Plan, scores: Tensor, case: Case) -> Tensor:
    """Weights of scores that are -inf where they are masked."""
    dims = {"keys": (-1,), "queries": (-2,), "heads": (1,), "batch": (0,), "map": (-2, -1)}
    dim = dims[plan.dim]
    kind = plan.normaliser
    if plan.part and (kind != "softmax" or plan.dim != "keys"):
        raise NotApplicable("only a softmax over the keys is taken part by part")
    if kind == "uniform":
        numbers = scores.isneginf().logical_not().double()
        return numbers / numbers.sum(dim, keepdim=True)
    if kind == "scores":
        return scores
    if kind == "sigmoid":
        return torch.sigmoid(scores)
    if kind == "hard":
        best = torch.zeros_like(scores).scatter(-1, scores.argmax(-1, keepdim=True), 1.0)
        return best.masked_fill(scores.isneginf().all(-1, keepdim=True), math.nan)
    if kind == "relu":
        positive = scores.relu()
        return divided(plan, positive, positive.sum(dim, keepdim=True))
    largest = scores.amax(dim, keepdim=True)
    shifted = scores - largest  # NaN where there is nothing but -inf
    if kind == "unnormalised":
        return scores.exp()
    if kind == "unnormalised_shifted":
        return shifted.exp()
    if kind == "no_maximum":
        numbers = in_range(scores.exp(), case.dtype)
        return divided(plan, numbers, numbers.sum(dim, keepdim=True))
    numbers = shifted.exp()
    if kind == "plus_one":
        # In units of the largest, which is at least that of the score 0 of the extra key.
        top = largest.clamp(min=0.0)
        numbers = (scores - top).exp()
        return numbers / (torch.exp(-top) + numbers.sum(dim, keepdim=True))
    if plan.part:
        return _in_parts(plan, scores, numbers, case)
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


def _parts(plan: Plan, scores: Tensor, case: Case) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The part of each key, the parts in the order of each query, and the scores of each part."""
    length = scores.shape[-1]
    if plan.part == SHARDS:
        if case.shards is None or length != case.key_len:
            raise NotApplicable("keys do not lie on several ranks, or a sink lies on none")
        every, own = torch.arange(case.shards.ranks), case.shards.owner(case.query_len)
        number = case.shards.owner(length)
        order = (own[:, None] - every) % case.shards.ranks
        return number, order, [scores.masked_fill(number != one, -math.inf) for one in every]
    size = plan.part if plan.part > 0 else max(1, (length + (plan.part < -1)) // 2)
    if plan.part == PREFIX:
        before = case.key_len - case.query_len
        size = before if before > 0 else length
    number = torch.arange(length) // size
    number = number if plan.part > 0 else number.clamp(max=1)
    parts = torch.split(scores, number.bincount().tolist(), -1)
    return number, torch.arange(len(parts)), list(parts)


def _in_parts(plan: Plan, scores: Tensor, numbers: Tensor, case: Case) -> Tensor:
    """Softmax part by part; `numbers` have the maximum of the whole row subtracted."""
    number, order, parts = _parts(plan, scores, case)
    empty = torch.stack([part.isneginf().all(-1) for part in parts], -1)
    if plan.merging.endswith("empty"):
        states = {"first_empty": empty[..., 0], "first_two_empty": empty[..., :2].all(-1),
                  "any_empty": empty.any(-1)}  # fmt: skip
        weights = numbers / numbers.sum(-1, keepdim=True)
        return weights.masked_fill(states[plan.merging][..., None], math.nan)
    if plan.merging in ("output", "sum", "both"):
        # What is stale has the maximum of its own part's time subtracted.
        largest = torch.stack([part.amax(-1) for part in parts], -1)
        order = order.expand_as(largest)
        largest = largest.gather(-1, order).cummax(-1).values.gather(-1, order.argsort(-1))
        stale = (scores - largest[..., number]).exp().masked_fill(scores.isneginf(), 0.0)
        above = stale if plan.merging in ("output", "both") else numbers
        below = stale if plan.merging in ("sum", "both") else numbers
        return above / below.sum(-1, keepdim=True)
    lse = torch.stack([part.logsumexp(-1) for part in parts], -1)
    own = (scores - lse[..., number]).exp()
    own = own.nan_to_num(nan=0.0) if plan.empty_slices == "zero" else own
    if plan.merging in ("mean", "mean_of_seen", "added"):
        seen = (~empty).sum(-1, keepdim=True).double()
        if plan.merging == "mean_of_seen":
            return own / seen
        return own / len(parts) if plan.merging == "mean" else own
    which, _, bases = plan.merging.partition(":")
    base = math.log(2.0) if bases.startswith("e_") else 1.0 / math.log(2.0)
    first = torch.arange(len(parts)) == 0
    wrong = {"all": torch.ones_like(first), "first": first, "others": ~first}[which]
    return own * torch.softmax(torch.where(wrong, lse * base, lse), -1)[..., number]


def divided(plan: Plan, numbers: Tensor, total: Tensor) -> Tensor:
    """Divide by a sum; what 0 / 0 gives is decided."""
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
