"""The backward pass of attention as a kernel writes it, and the mistake that gives wrong gradients.

For a query and its keys, dO is the gradient of the output, and M what dropout does to a weight: it
becomes 0, or is divided by 1 - p; without dropout M is 1::

    P = exp(S - lse)    dP = M (dO V^T)    D = rowsum(dO O)    dS = P (dP - D)    dZ = slope dS
    dQ = scale dZ K     dK = scale dZ^T Q  dV = (M P)^T dO     dbias = dS         dsink = -P_sink D
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from pytest_attnheat.attention.call import Call
from pytest_attnheat.attention.decisions import BackwardPlan, Plan
from pytest_attnheat.attention.defects import BACKWARD, DEFECTS
from pytest_attnheat.attention.mistakes import (
    MOST_NAMED,
    as_case,
    attempts,
    finite,
    fitting,
    too_large,
)
from pytest_attnheat.attention.plan import (
    Case,
    NotApplicable,
    Outcome,
    carry_out,
    misread,
    operands,
    whole_blocks,
)
from pytest_attnheat.attention.tolerance import answer_tolerance, answer_units

# Up to which part of how far a gradient is off it may differ from an attempt; and up to how many
# times the difference of the nearest attempt another one fits as well.
_PART, _AS_WELL = 0.25, 2.0
# Rounding never excuses more than this part of what a gradient is made of.
_MOST_ALLOWED = 0.125
# Decisions that change the weights in another way than by the scores and by what is masked.
_FORWARD_ALONE = (
    "split", "merge", "weights_of_heads", "scale_after", "overflow", "products_dtype",
    "scores_dtype", "weights_dtype", "output_dtype", "softcap", "part", "masking", "fill", "dim",
    "normaliser", "sinks", "output_factor", "masked_nan",
)  # fmt: skip
# How a backward pass computes the weights once more, and what it subtracts.
_STARTS = (
    BackwardPlan(),
    BackwardPlan(weights_from="own", fully_masked="zero"),
    BackwardPlan(weights_from="own", row_term="own", fully_masked="zero"),
)


@dataclass(frozen=True, eq=False)
class _Saved:
    """What the forward pass leaves for the backward pass.

    Attributes:
        call: What was computed.
        case: The same on the CPU, (batch, heads, length, width).
        forward: What attention gives on it.
        lse: The logarithm of the sum of each row, (batch, heads, query_len, 1).
        kept: What dropout does to each weight, (batch, heads, query_len, key_len), or 1.
        output: With that, (batch, heads, query_len, value_dim).
        allowed: By which part of its size a number may be off by rounding.
    """

    call: Call
    case: Case
    forward: Outcome
    lse: Tensor
    kept: Tensor
    output: Tensor
    allowed: float

    @classmethod
    def of(cls, call: Call, kept: Tensor | None) -> _Saved:
        case = as_case(call)
        forward = carry_out(Plan(), case)
        scores = forward.scores.masked_fill(~forward.permitted, -math.inf)
        lse = scores.logsumexp(-1, keepdim=True)
        if case.sinks is not None:
            lse = torch.logaddexp(lse, case.sinks.double()[:, None, None].expand_as(lse))
        drop = torch.ones(()).double() if kept is None else kept.double().view_as(scores)
        largest = float(finite(scores).abs().max())
        units = answer_units(case.dtype) * torch.finfo(case.dtype).eps * (2 + largest)
        allowed = min(max(answer_tolerance(case.dtype), units), _MOST_ALLOWED)
        output = finite(forward.weights * drop) @ forward.value
        return cls(call, case, forward, lse, drop, output, allowed)


@dataclass(frozen=True)
class _Gradients:
    """What a backward pass gives, by name, and what rounding of each number is in proportion to.

    The errors of the numbers that a sum adds up are taken to be independent: they add up by their
    squares.
    """

    exact: dict[str, Tensor]
    size: dict[str, Tensor]

    def off(self, found: Mapping[str, Tensor], saved: _Saved) -> dict[str, tuple[float, bool]]:
        """By how much each gradient that was found differs, and whether by rounding alone."""
        tiny = torch.finfo(saved.case.dtype).smallest_normal * torch.finfo(saved.case.dtype).eps
        compared = {}
        for name, one in found.items():
            width = one.shape[-1]
            rows, exact, size = (
                t.reshape(-1, width) for t in (one, self.exact[name], self.size[name])
            )
            off, allowed = _rms(finite(rows - exact)), saved.allowed * _rms(finite(size)) + tiny
            same = bool((rows.isfinite() == exact.isfinite()).all())
            error = float(off.square().mean().sqrt()) if same else math.inf
            compared[name] = error, same and bool((off <= allowed).all())
        return compared


def likely_backward_mistake(
    call: Call,
    gradients: Mapping[str, Tensor],
    output: Tensor | None = None,
    *,
    kept: Tensor | None = None,
) -> str | None:
    """Return the mistake that gives these gradients, or those that all give them; None if none.

    Args:
        call: What was to be computed, with the gradient of its output.
        gradients: What was computed instead, under the names of `Call.shapes`.
        output: The output that they were found with, (..., query_len, value_dim); None where it is
            known to be right. Of one that is wrong, no mistake of the backward pass is named.
        kept: What dropout did to each weight, (..., query_len, key_len): it became 0, or was
            divided by 1 - p.
    """
    if too_large(call) or call.upstream is None or call.rounded:
        return None
    found = {name: one.detach().cpu().double() for name, one in gradients.items()}
    with torch.no_grad():
        saved = _Saved.of(call, kept)
        right = _carried_back(BackwardPlan(), saved)
        by = {name: off for name, (off, fits) in right.off(found, saved).items() if not fits}
        if not by:
            return None
        which = ("gradient" + "s" * (len(by) > 1) + " of ") + _listed(list(by))
        if output is not None and (wrong := fitting(call, output)):
            return _of_a_wrong_output(wrong, found, which, saved)
        fits: dict[str, tuple[bool, float]] = {}
        for sentence, plan, attempt in _attempted(saved):
            if (plan.detached or plan.exchanged) and not {"query", "key"} <= by.keys():
                continue  # of one tensor alone, that is not known
            off = attempt.off(found, saved)
            share = max(off[name][0] / by[name] for name in by)
            if share < _PART and all(off[name][1] for name in by):
                # One that gives what is right as well comes first.
                size = not all(fitting for _, fitting in off.values()), share
                fits[sentence] = min(size, fits.get(sentence, size))
    nearest = sorted(fits, key=lambda sentence: fits[sentence])[:MOST_NAMED]
    named = [
        sentence
        for sentence in nearest
        if fits[sentence][0] == fits[nearest[0]][0]
        and fits[sentence][1] <= _AS_WELL * fits[nearest[0]][1]
    ]
    are = "are those" if len(by) > 1 else "is that"
    return f"the {which} {are} of attention {', or '.join(named)}" if named else None


def _of_a_wrong_output(
    wrong: Mapping[str, Plan], found: Mapping[str, Tensor], which: str, saved: _Saved
) -> str:
    """Say that the output is wrong, and whether the gradients are those of that output."""
    named = f"that of attention {', or '.join(wrong)}"
    for plan in wrong.values():
        again = BackwardPlan(**vars(plan) | {"weights_from": "own", "row_term": "own"})
        if all(fits for _, fits in _carried_back(again, saved).off(found, saved).values()):
            return f"the {which} follow the output, which is wrong: it is {named}"
    return f"the output is wrong: it is {named}"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _rms(rows: Tensor) -> Tensor:
    return rows.square().mean(-1).sqrt()


def _attempted(saved: _Saved) -> Iterator[tuple[str, BackwardPlan, _Gradients]]:
    """What each known mistake gives: of the backward pass alone, or of the weights in it."""
    usual = Plan()
    every = [*attempts(saved.case, BACKWARD, _STARTS[0])]
    for start in _STARTS:
        every += [
            (sentence, plan)
            for sentence, plan in attempts(saved.case, DEFECTS, start)
            if all(getattr(plan, name) == getattr(usual, name) for name in _FORWARD_ALONE)
        ]
    for sentence, plan in every:
        assert isinstance(plan, BackwardPlan)
        try:
            yield sentence, plan, _carried_back(plan, saved)
        except NotApplicable:
            continue


def _carried_back(plan: BackwardPlan, saved: _Saved) -> _Gradients:
    """Carry out a backward pass.

    Raises:
        NotApplicable: The plan cannot be carried out on these shapes.
    """
    assert saved.case.upstream is not None
    above, read = saved.case.upstream.double(), misread(plan, saved.case)
    query, key, value = operands(plan, read)
    weights = _weights(plan, carry_out(plan, saved.case), saved)
    kept = {
        "applied": saved.kept,
        "ignored": torch.ones_like(saved.kept),
        "not_rescaled": (saved.kept > 0).double(),
    }
    felt = (above @ value.mT) * kept[plan.kept_of_scores]
    values = weights * kept[plan.kept_of_values]
    term = _row_term(plan, saved, (weights * felt).sum(-1, keepdim=True))
    scale = read.factor * plan.temperature
    slope, bias_slope = _slopes(plan, read, (query @ key.mT) * scale)
    scale = {
        "applied": scale,
        "missing": 1.0,
        "twice": scale * scale,
        "base_two": scale * math.log(2),
        "base_e": scale / math.log(2),
    }[plan.gradient_scale]
    attached = weights * (not plan.detached)
    sinks = torch.zeros(()) if read.sinks is None else read.sinks.double()[:, None, None]
    sink = (sinks - saved.lse).exp() * (read.sinks is not None and not plan.detached)
    scores = attached * (felt - term)
    exact = _summed(
        plan, saved, (scores * slope, scores * bias_slope, values, -sink * term),
        (query, key, above, scale),
    )  # fmt: skip
    # The terms of dP - D are rounded each on its own, and the weight and what it is multiplied by.
    of_term = (above * saved.output).square().sum(-1, keepdim=True) + term.square()
    of_felt = above.square() @ value.square().mT * kept[plan.kept_of_scores].square()
    scores = attached.square() * (of_felt + of_term + (felt - term).square())
    size = _summed(
        plan, saved,
        (scores * slope**2, scores * bias_slope**2, values.square(), sink.square() * of_term),
        (query.square(), key.square(), above.square(), scale**2),
    )  # fmt: skip
    return _Gradients(exact, {name: square.sqrt() for name, square in size.items()})


def _weights(plan: BackwardPlan, again: Outcome, saved: _Saved) -> Tensor:
    """The weights that the backward pass computes once more."""
    weights = again.weights
    if plan.weights_from == "saved":
        weights = (again.scores - saved.lse).exp()
        weights = weights.masked_fill(~again.permitted | saved.lse.isinf(), 0.0)
    if plan.query_block:
        weights = weights.clone()
        weights[:, :, whole_blocks(plan, plan.query_block, weights.shape[2]) :] = 0.0
    if plan.skipped_block:
        weights = weights * _whole(again.permitted, plan.skipped_block)
    return weights


def _whole(permitted: Tensor, block: int) -> Tensor:
    """Which scores are in blocks that are permitted as a whole."""
    hidden = F.max_pool2d((~permitted).float(), block, ceil_mode=True)
    hidden = hidden.repeat_interleave(block, -2).repeat_interleave(block, -1)
    return hidden[..., : permitted.shape[-2], : permitted.shape[-1]] == 0


def _row_term(plan: BackwardPlan, saved: _Saved, own: Tensor) -> Tensor:
    """D in the formulas above, (batch, heads, query_len, 1) or broadcastable to it."""
    assert saved.case.upstream is not None
    above = saved.case.upstream.double()
    right = (above * saved.output).sum(-1, keepdim=True)
    heads = torch.arange(saved.case.heads)
    return {
        "saved": right,
        "own": own,
        "none": torch.zeros_like(right),
        "added": -right,
        "mean": right / above.shape[-1],
        "upstream": above.sum(-1, keepdim=True),
        "next_row": right.roll(-1, 2),
        "previous_row": right.roll(1, 2),
        "first_row": right[:, :, :1],
        "next_head": right.roll(-1, 1),
        "previous_head": right.roll(1, 1),
        "first_head": right[:, :1],
        "key_head": right[:, heads // saved.case.group],
        "next_sample": right.roll(-1, 0),
        "first_sample": right[:1],
    }[plan.row_term].expand_as(right)


def _slopes(plan: BackwardPlan, read: Case, products: Tensor) -> tuple[Tensor, Tensor]:
    """How scores grow with the scaled products, and with the bias."""
    one = torch.ones(()).double()
    if plan.score_slope == "missing" or (read.softcap is None and read.score_mod is None):
        return one, one
    with torch.enable_grad():
        leaf, added = (t.requires_grad_() for t in (products.clone(), torch.zeros_like(products)))
        bias = added if read.bias is None else read.bias.double() + added
        scores = replace(read, bias=bias).scored(leaf)
        scores = scores + 0.0 * (leaf + added)  # which a function of the score may leave out
        slope, bias_slope = torch.autograd.grad(scores.sum(), (leaf, added))
    return slope, bias_slope


def _summed(
    plan: BackwardPlan,
    saved: _Saved,
    slopes: tuple[Tensor, Tensor, Tensor, Tensor],
    factors: tuple[Tensor, Tensor, Tensor, float],
) -> dict[str, Tensor]:
    """The gradients by name, of those of products, bias, weights of values and sinks."""
    products, biases, values, sinks = slopes
    query, key, above, scale = factors
    found = {
        "query": products @ key * scale,
        "key": _of_groups(plan, products.mT @ query * scale, saved.case),
        "value": _of_groups(plan, values.mT @ above, saved.case),
        "sinks": sinks.expand(*products.shape[:-1], 1).sum((0, 2, 3)),
    }
    if saved.call.bias is not None:
        whole = biases.view(*saved.call.query.shape[:-1], -1)
        found["attn_mask"] = _of_bias(plan, whole, saved.call.bias.shape)
    if plan.exchanged:
        if found["query"].shape != found["key"].shape:
            raise NotApplicable("gradients of other shapes cannot be exchanged")
        found["query"], found["key"] = found["key"], found["query"]
    return found


def _of_groups(plan: BackwardPlan, heads: Tensor, case: Case) -> Tensor:
    """Add up what the query heads that share a key head give it."""
    (batch, _, *matrix), key_heads = heads.shape, case.key.shape[1]
    if plan.group_sum == "tile":
        return heads.reshape(batch, case.group, key_heads, *matrix).sum(1)
    groups = heads.reshape(batch, key_heads, case.group, *matrix)
    one = {"first": groups[:, :, 0], "last": groups[:, :, -1], "mean": groups.mean(2)}
    return one.get(plan.group_sum, groups.sum(2))


def _of_bias(plan: BackwardPlan, whole: Tensor, shape: torch.Size) -> Tensor:
    """Reduce what every score gives to the shape of a bias that is broadcast."""
    wide = (1,) * (whole.ndim - len(shape)) + tuple(shape)
    for dim, size in enumerate(wide):
        if size < whole.shape[dim]:
            last = whole.shape[dim] - 1
            one = {"first": whole.narrow(dim, 0, 1), "last": whole.narrow(dim, last, 1),
                   "mean": whole.mean(dim, keepdim=True)}  # fmt: skip
            whole = one.get(plan.bias_sum, whole.sum(dim, keepdim=True))
    return whole.reshape(shape)
