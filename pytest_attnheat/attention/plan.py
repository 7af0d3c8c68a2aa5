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

from .call import Positions
from .decisions import Plan as Plan
from .decisions import Source
from .defects import in_order
from .misreadings import Case as Case
from .misreadings import NotApplicable as NotApplicable
from .normalising import divided, in_range, normalised
from .packing import lengths_of


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a plan gives on a case."""

    output: Tensor  # (batch, heads, query_len, value_dim), float64
    weights: Tensor  # (batch, heads, query_len, key_len), float64
    scores: Tensor  # Of the same shape: scaled, without any mask
    permitted: Tensor  # Of the same shape: where the plan lets a query attend
    value: Tensor  # (batch, heads, key_len, value_dim): what was used as values


# How a step is done: it is called with its function, the plan, the case, and what it works on.
Step: TypeAlias = Callable[..., Any]


def directly(function: Callable[..., Any], *arguments: Any) -> Any:
    """Do a step."""
    return function(*arguments)


def carry_out(plan: Plan, case: Case, step: Step = directly) -> Outcome:
    """Carry out a plan in float64, on the CPU, and keep what there was on the way."""
    # What a step comes to may depend on the plan, the case and what the steps before came to, and
    # on nothing else. NotApplicable: the plan cannot be carried out on these shapes, for instance
    # keys as values of another width.
    case = step(misread, plan, case)
    query, key, value = step(operands, plan, case)
    scores = step(_scores, plan, case, query, key)
    hard, soft = step(_permitted, plan, case)
    filled = step(_filled, plan, case, scores, hard, soft)
    numbers, sink = step(_with_sinks, plan, case, filled)
    weights = step(_weights, plan, case, numbers, sink, hard, soft)
    output = step(_buffered, plan, case, step(_output, plan, weights, value), hard & soft)
    return Outcome(output, weights, scores, hard & soft, value)


def misread(plan: Plan, case: Case) -> Case:
    """Return a case as a plan reads it."""
    for reading in in_order(plan.misread):
        case = reading(case)
    return case


# --- queries, keys and values


def operands(plan: Plan, case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Return what is used as query, key and value, all of as many heads as queries have."""
    groups = case.query.shape[1] // case.key.shape[1]
    tensors: dict[Source, Tensor] = {
        "query": _split(plan, case.query.double()),
        "key": _grouped(plan, "keys", _split(plan, case.key.double()), groups),
        "value": _grouped(plan, "values", _split(plan, case.value.double()), groups),
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


def _grouped(plan: Plan, name: str, tensor: Tensor, groups: int) -> Tensor:
    key_heads = tensor.shape[1]
    if groups == 1 and not plan.in_groups_of_one:
        return tensor
    head = torch.arange(groups * key_heads)
    served = {
        "interleave": head // groups,
        "tile": head % key_heads,
        "first": torch.zeros_like(head),
        "divided": (head // key_heads).clamp(max=key_heads - 1),
    }[plan.grouping if plan.grouped in ("both", name) else "interleave"]
    return tensor[:, served]


# --- scores


def _scores(plan: Plan, case: Case, query: Tensor, key: Tensor) -> Tensor:
    products = _rounded(query @ key.mT, plan.products_dtype)
    if plan.overflow and case.dtype == torch.float16:
        beyond = products.to(case.dtype).isinf()
        products = torch.where(beyond, products * math.inf, products)
    factor = plan.temperature * (1.0 if plan.scale_after else case.factor)
    scaled = _rounded(products * factor, plan.scores_dtype)
    case = _counted(plan, case)
    cap = case.softcap
    if plan.softcap == "declared" or cap is None:
        return case.scored(scaled)
    uncapped = replace(case, softcap=None)
    if plan.softcap in ("after_bias", "after_mask"):
        return case.capped(uncapped.scored(scaled))
    changed = {
        "before_scale": lambda: case.capped(products) * factor,
        "not_divided": lambda: cap * torch.tanh(scaled),
        "not_multiplied": lambda: torch.tanh(scaled / cap),
        "times_score": lambda: scaled * torch.tanh(scaled / cap),
        "times_own": lambda: scaled * torch.tanh(scaled),
        "times_quotient": lambda: scaled / cap * torch.tanh(scaled / cap),
    }
    return uncapped.scored(changed[plan.softcap]())


def _rounded(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if dtype is None else tensor.to(dtype).double()


# --- who may attend to whom


def _permitted(plan: Plan, case: Case) -> tuple[Tensor, Tensor]:
    """Return what is filled with -inf and what is treated by `plan.masking`, both as True = may."""
    mask, by_position = _mask(case), _by_position(plan, case)
    if case.causal and case.mask is not None:
        if plan.together == "mask_only":
            by_position = _by_position(plan, replace(case, causal=False))
        elif plan.together == "causal_only":
            mask = torch.ones_like(mask)
    nothing = torch.ones_like(mask)
    hard, soft = {
        "all": (nothing, mask & by_position),
        "mask": (by_position, mask),
        "causal": (mask, by_position),
    }[plan.covers]
    return hard & _used_keys(plan, case), soft


def _mask(case: Case) -> Tensor:
    mask = torch.ones(case.shape, dtype=torch.bool)
    mask = mask if case.mask is None else case.mask.expand(case.shape)
    return mask if case.bias is None else mask & (case.bias != -math.inf)


def _counted(plan: Plan, case: Case) -> Case:
    """The case as positions are counted in it."""
    elsewhere = plan.causal == "other_corner" and case.causal
    return case.other_corner() if elsewhere else case


def _by_position(plan: Plan, case: Case) -> Tensor:
    """What is permitted by where queries and keys stand, as the plan reads it."""
    read = _counted(plan, case)
    at = read.everywhere(case.query.device)
    permitted = torch.ones(case.maps, *case.shape[2:], dtype=torch.bool)
    for rule in (*replace(read, causal=False).rules(at), *_causal(plan, read, at)):
        permitted &= rule
    return permitted.view(case.shape)


def _causal(plan: Plan, case: Case, at: Positions) -> Iterator[Tensor]:
    if not case.causal:
        return
    if plan.causal == "other_corner_alone":
        at = case.other_corner().everywhere(case.query.device)
    shift = plan.causal_shift if _is_shifted(plan, case) else 0
    seen = at.within(-shift, None) if plan.causal == "reversed" else at.within(None, shift)
    yield seen | (at.key < case.prefix)


def _is_shifted(plan: Plan, case: Case) -> bool:
    return {
        "all": True,
        "differ": case.query_len != case.key_len,
        "more_keys": case.query_len < case.key_len,
    }[plan.causal_shift_where]


def _used_keys(plan: Plan, case: Case) -> Tensor:
    key_len = case.shape[3]
    used = torch.ones(key_len, dtype=torch.bool)
    if plan.dropped_key != "none":
        used[0 if plan.dropped_key == "first" else -1] = False
    if plan.key_block:
        used[whole_blocks(plan, plan.key_block, key_len) :] = False
    return used


def whole_blocks(plan: Plan, block: int, length: int) -> int:
    """Return how many of some keys or queries are in whole blocks."""
    if plan.blocks == "first" or (plan.blocks == "short" and length < block):
        return min(length, block)
    return length // block * block


# --- weights


def _weights(
    plan: Plan, case: Case, weights: Tensor, sink: Tensor | float, hard: Tensor, soft: Tensor
) -> Tensor:
    if plan.masking in ("after", "after_renormalised"):
        weights = weights.masked_fill(~soft, 0.0)
    if plan.masking == "after_renormalised":
        weights = divided(plan, weights, weights.sum(-1, keepdim=True) + sink)
    weights = _fully_masked_rows(plan, case, weights, hard & soft)
    if plan.scale_after:
        weights = weights * case.factor
    if plan.weights_of_heads == "averaged":
        weights = weights.mean(1, keepdim=True).expand_as(weights)
    return _rounded(weights, plan.weights_dtype)


def _filled(plan: Plan, case: Case, scores: Tensor, hard: Tensor, soft: Tensor) -> Tensor:
    fill = plan.fill
    if plan.softcap == "after_mask" and case.softcap is not None:
        fill = -case.softcap
    masked = {
        "fill": lambda: scores.masked_fill(~soft, fill),
        "added": lambda: torch.where(soft, scores, scores + plan.fill),
        "ones": lambda: scores + soft.double(),
        "ones_masked": lambda: scores + (~soft).double(),
    }
    scores = masked[plan.masking]() if plan.masking in masked else scores
    return scores.masked_fill(~hard, -math.inf)


def _with_sinks(plan: Plan, case: Case, scores: Tensor) -> tuple[Tensor, Tensor | float]:
    """The weights, and that of the sink: one key more that has no value."""
    if case.sinks is None or plan.dim != "keys" or plan.normaliser == "uniform":
        return in_range(normalised(plan, scores, case), case.dtype), 0.0
    sinks = case.sinks.double()[:, None, None].expand(*scores.shape[:-1], 1)
    if plan.sinks == "declared":
        weights = normalised(plan, torch.cat([scores, sinks], -1), case)
    else:
        largest = scores.amax(-1, keepdim=True)
        sinks = sinks - {"outside": 1, "not_shifted": 0, "twice": 2}[plan.sinks] * largest
        numbers = torch.cat([scores - largest, sinks], -1).exp()
        weights = numbers / numbers.sum(-1, keepdim=True)
    weights = in_range(weights, case.dtype)
    return weights[..., :-1], weights[..., -1:]


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
    output = _rounded((weights @ value) * plan.output_factor, plan.output_dtype)
    if plan.query_block:
        output[:, :, whole_blocks(plan, plan.query_block, output.shape[2]) :] = 0.0
    if plan.merge == "averaged":
        return output.mean(1, keepdim=True).expand_as(output)
    if plan.merge == "reshape":
        batch, heads, query_len, width = output.shape
        return output.reshape(batch, query_len, heads, width).transpose(1, 2)
    return output


def _buffered(plan: Plan, case: Case, output: Tensor, permitted: Tensor) -> Tensor:
    """The output as the buffer has it that it is written into, where there is one."""
    if plan.buffer == "written" or case.stored is None:
        return output
    before = case.stored.filled("output", output, *output.shape, dtype=case.dtype)
    queries, keys = lengths_of(case)
    real = (torch.arange(case.query_len) < queries[:, None])[:, None, :, None]
    if plan.buffer == "added_to":
        return output + before.masked_fill(~real, 0.0)
    left = ~permitted.any(-1, keepdim=True) & real
    if plan.buffer == "left_if_empty":
        left &= (keys == 0)[:, None, None, None]
    return torch.where(left, before, output)
