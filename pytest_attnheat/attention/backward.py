"""The backward pass of attention as a kernel writes it, and the mistake that gives wrong gradients.

For a query and its keys, dO is the gradient of the output, and M what dropout does to a weight: it
becomes 0, or is divided by 1 - p; without dropout M is 1::

    P = exp(S - lse)    dP = M (dO V^T)    D = rowsum(dO O)    dS = P (dP - D)    dZ = slope dS
    dQ = scale dZ K     dK = scale dZ^T Q  dV = (M P)^T dO     dbias = dS         dsink = -P_sink D
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from pytest_attnheat.attention.call import Call
from pytest_attnheat.attention.decisions import BackwardPlan, Plan
from pytest_attnheat.attention.defects import BACKWARD
from pytest_attnheat.attention.mistakes import (
    AS_WELL,
    MOST_ALLOWED,
    MOST_NAMED,
    PART,
    as_case,
    changes,
    finite,
    fitting,
    rms,
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

# Decisions that change the weights in another way than by the scores and by what is masked.
_FORWARD_ALONE = (
    "split", "merge", "weights_of_heads", "scale_after", "overflow", "products_dtype",
    "scores_dtype", "weights_dtype", "output_dtype", "softcap", "part", "masking", "fill", "dim",
    "normaliser", "sinks", "output_factor", "masked_nan",
)  # fmt: skip
# What a backward pass computes the weights from once more, and what it subtracts.
_AGAIN = (("saved", "saved"), ("own", "saved"), ("own", "own"))
_ONE = torch.ones((), dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class _Saved:
    """What the forward pass leaves for the backward pass.

    Attributes:
        call: What was computed.
        case: The same on the CPU, (batch, heads, length, width).
        above: The gradient of its output.
        forward: What attention gives on it.
        lse: The logarithm of the sum of each row, (batch, heads, query_len, 1).
        kept: What dropout does to each weight, (batch, heads, query_len, key_len), or 1.
        right: The row term D, (batch, heads, query_len, 1).
    """

    call: Call
    case: Case
    above: Tensor
    forward: Outcome
    lse: Tensor
    kept: Tensor
    right: Tensor

    @classmethod
    def of(cls, call: Call, kept: Tensor | None) -> _Saved:
        case = as_case(call)
        assert case.upstream is not None
        forward, above = carry_out(Plan(), case), case.upstream.double()
        lse = _masked(forward).logsumexp(-1, keepdim=True)
        if case.sinks is not None:
            lse = torch.logaddexp(lse, case.sinks.double()[:, None, None].expand_as(lse))
        drop = _ONE if kept is None else kept.double().view(case.shape)
        output = finite(forward.weights * drop) @ forward.value
        return cls(call, case, above, forward, lse, drop, (above * output).sum(-1, keepdim=True))


def _masked(outcome: Outcome) -> Tensor:
    return outcome.scores.masked_fill(~outcome.permitted, -math.inf)


def likely_backward_mistake(
    call: Call,
    gradients: Mapping[str, Tensor],
    output: Tensor | None = None,
    *,
    wrong: Collection[str] = (),
    kept: Tensor | None = None,
) -> str | None:
    """Return the mistake that gives these gradients, or those that all give them; None if none.

    Args:
        call: What was to be computed, with the gradient of its output.
        gradients: What was computed instead, under the names of `Call.shapes`.
        output: The output, (..., query_len, value_dim), if it is wrong: no mistake of the backward
            pass is named then.
        wrong: Which of them are wrong; those that are off by more than rounding by default.
        kept: What dropout did to each weight, (..., query_len, key_len): it became 0, or was
            divided by 1 - p.
    """
    if too_large(call) or call.upstream is None or call.rounded:
        return None
    found = {name: one.detach().cpu().double() for name, one in gradients.items()}
    with torch.no_grad():
        saved = _Saved.of(call, kept)
        off = _off(_carried_back(BackwardPlan(), saved), found, saved)
        wrong = [name for name in found if (name in wrong if wrong else not off[name][1])]
        by = {name: off[name][0] for name in wrong}
        if not by or not all(0 < size < math.inf for size in by.values()):
            return None
        which = f"the gradient{'s' * (len(by) > 1)} of {listed(list(by))}"
        if output is not None:
            return _of_a_wrong_output(fitting(call, output), found, which, saved)
        fits: dict[str, tuple[bool, float]] = {}
        for sentence, plan, attempt in _attempted(saved):
            if (plan.detached or plan.exchanged) and not {"query", "key"} <= by.keys():
                continue  # of one tensor alone, that is not known
            off = _off(attempt, found, saved)
            share = max(off[name][0] / by[name] for name in by)
            if share < PART and all(off[name][1] for name in by):
                # One that gives what is right as well comes first.
                size = not all(fitting for _, fitting in off.values()), share
                fits[sentence] = min(size, fits.get(sentence, size))
    if not fits:
        return None
    others, share = min(fits.values())
    nearest = sorted(fits, key=lambda one: fits[one])[:MOST_NAMED]
    named = [s for s in nearest if fits[s][0] == others and fits[s][1] <= AS_WELL * share]
    return f"{which} {'are those' if len(by) > 1 else 'is that'} of attention {', or '.join(named)}"


def _of_a_wrong_output(
    causes: Mapping[str, Plan], found: Mapping[str, Tensor], which: str, saved: _Saved
) -> str | None:
    """Say whether the gradients are those of an output that is wrong."""
    named = f"that of attention {', or '.join(causes)}"
    for plan in causes.values():
        again = _carried_back(_started(plan, "own", "own"), saved)
        if all(fits for _, fits in _off(again, found, saved).values()):
            return f"{which} follow the output, which is wrong: it is {named}"
    return f"the output is wrong: it is {named}" if causes else None


def listed(names: list[str]) -> str:
    """Return names as a list in a sentence."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _off(
    attempt: Mapping[str, Tensor], found: Mapping[str, Tensor], saved: _Saved
) -> dict[str, tuple[float, bool]]:
    """By how much each gradient that was found differs, and whether by rounding alone."""
    dtype, scores = saved.case.dtype, finite(_masked(saved.forward))
    units = answer_units(dtype) * torch.finfo(dtype).eps * (2 + float(scores.abs().max()))
    allowed = min(max(answer_tolerance(dtype), units), MOST_ALLOWED)
    compared = {}
    for name, one in found.items():
        rows = one.reshape(-1, *one.shape[-1:])
        exact = attempt[name].reshape(rows.shape)
        if bool((rows.isfinite() != exact.isfinite()).any()):
            compared[name] = math.inf, False
            continue
        error, size = rms(finite(rows - exact)), finite(exact)
        least = size.square().mean().sqrt()
        fits = bool((error <= allowed * rms(size).clamp(min=float(least))).all())
        compared[name] = float(error.square().mean().sqrt()), fits
    return compared


def _attempted(saved: _Saved) -> Iterator[tuple[str, BackwardPlan, dict[str, Tensor]]]:
    """What each known mistake gives: of the backward pass alone, or of the weights in it."""
    every: list[tuple[str, BackwardPlan]] = []
    for defect, change in changes(BACKWARD):
        plan = change(BackwardPlan())
        assert isinstance(plan, BackwardPlan)
        every.append((defect.sentence, plan))
    for defect, change in changes():
        forward = change(Plan())
        if _is_of_both(forward, saved):
            every += [(defect.sentence, _started(forward, *how)) for how in _AGAIN]
    for sentence, plan in every:
        try:
            yield sentence, plan, _carried_back(plan, saved)
        except NotApplicable:
            continue


def _is_of_both(plan: Plan, saved: _Saved) -> bool:
    """Whether a backward pass may be wrong like this as well, and is something else then."""
    right = Plan()
    if any(getattr(plan, name) != getattr(right, name) for name in _FORWARD_ALONE):
        return False
    try:
        other = vars(carry_out(plan, saved.case))
    except NotApplicable:
        return False
    return not all(torch.equal(other[name], one) for name, one in vars(saved.forward).items())


def _started(plan: Plan, weights_from: str, row_term: str) -> BackwardPlan:
    """The backward pass that computes its weights by a plan."""
    again: dict[str, Any] = {"weights_from": weights_from, "row_term": row_term}
    if weights_from == "own":  # the softmax of a row without keys has no gradient
        again["fully_masked"] = plan.fully_masked or "zero"
    return BackwardPlan(**vars(plan) | again)


def _carried_back(plan: BackwardPlan, saved: _Saved) -> dict[str, Tensor]:
    """Return the gradients, by name, of a backward pass.

    Raises:
        NotApplicable: The plan cannot be carried out on these shapes.
    """
    case, above, read = saved.case, saved.above, misread(plan, saved.case)
    query, key, value = operands(plan, read)
    weights = _weights(plan, carry_out(plan, case), saved)
    kept = {"applied": saved.kept, "ignored": _ONE, "not_rescaled": (saved.kept > 0).double()}
    felt = (above @ value.mT) * kept[plan.kept_of_scores]
    term = _row_term(plan, saved, (weights * felt).sum(-1, keepdim=True))
    scores = weights * (felt - term) * (not plan.detached)
    scale = read.factor * plan.temperature
    slope, bias_slope = _slopes(plan, read, (query @ key.mT) * scale)
    scale = {
        "applied": scale,
        "missing": 1.0,
        "twice": scale * scale,
        "base_two": scale * math.log(2),
        "base_e": scale / math.log(2),
    }[plan.gradient_scale]
    found = {
        "query": (scores * slope) @ key * scale,
        "key": _of_groups(plan, (scores * slope).mT @ query * scale, case),
        "value": _of_groups(plan, (weights * kept[plan.kept_of_values]).mT @ above, case),
    }
    if case.sinks is not None:
        sinks = case.sinks.double()[:, None, None]
        attached = read.sinks is not None and not plan.detached
        found["sinks"] = (-(sinks - saved.lse).exp() * term * attached).sum((0, 2, 3))
    if case.bias is not None:
        found["attn_mask"] = _of_bias(plan, scores * bias_slope, saved.call)
    if plan.exchanged:
        if found["query"].shape != found["key"].shape:
            raise NotApplicable("gradients of other shapes cannot be exchanged")
        found["query"], found["key"] = found["key"], found["query"]
    return found


def _weights(plan: BackwardPlan, again: Outcome, saved: _Saved) -> Tensor:
    """The weights that the backward pass computes once more."""
    weights = again.weights.clone()
    if plan.weights_from == "saved":
        weights = (_masked(again) - saved.lse).exp().masked_fill(saved.lse.isinf(), 0.0)
    if plan.query_block:
        weights[:, :, whole_blocks(plan, plan.query_block, weights.shape[2]) :] = 0.0
    if size := plan.skipped_block:
        hidden = F.max_pool2d((~again.permitted).double(), size, ceil_mode=True)
        hidden = hidden.repeat_interleave(size, -2).repeat_interleave(size, -1)
        weights *= 1 - hidden[..., : weights.shape[-2], : weights.shape[-1]]
    return weights


def _row_term(plan: BackwardPlan, saved: _Saved, own: Tensor) -> Tensor:
    """D in the formulas above, (batch, heads, query_len, 1)."""
    right, heads = saved.right, torch.arange(saved.case.heads)
    return {
        "saved": right,
        "own": own,
        "none": torch.zeros_like(right),
        "upstream": saved.above.sum(-1, keepdim=True),
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
    if plan.score_slope == "missing" or (read.softcap is None and read.score_mod is None):
        return _ONE, _ONE
    with torch.enable_grad():
        leaf, added = (t.requires_grad_() for t in (products.clone(), torch.zeros_like(products)))
        bias = added if read.bias is None else read.bias.double() + added
        scores = replace(read, bias=bias).scored(leaf)
        scores = scores + 0.0 * (leaf + added)  # which a function of the score may leave out
        slope, bias_slope = torch.autograd.grad(scores.sum(), (leaf, added))
    return slope, bias_slope


def _of_groups(plan: BackwardPlan, heads: Tensor, case: Case) -> Tensor:
    """Add up what the query heads that share a key head give it."""
    (batch, _, *matrix), key_heads = heads.shape, case.key.shape[1]
    if plan.group_sum == "tile":
        return heads.reshape(batch, case.group, key_heads, *matrix).sum(1)
    return _total(plan.group_sum, heads.reshape(batch, key_heads, case.group, *matrix), 2).squeeze(
        2
    )


def _of_bias(plan: BackwardPlan, whole: Tensor, call: Call) -> Tensor:
    """Reduce what every score gives to the shape of a bias that is broadcast."""
    assert call.bias is not None
    whole = whole.view(*call.query.shape[:-1], -1)
    for dim, size in enumerate((1,) * (whole.ndim - call.bias.ndim) + call.bias.shape):
        if size < whole.shape[dim]:
            whole = _total(plan.bias_sum, whole, dim)
    return whole


def _total(how: str, parts: Tensor, dim: int) -> Tensor:
    """The sum of some parts, or what a mistake takes for it; the dimension is kept."""
    one = {
        "first": parts.narrow(dim, 0, 1),
        "last": parts.narrow(dim, parts.shape[dim] - 1, 1),
        "mean": parts.mean(dim, keepdim=True),
    }
    return one.get(how, parts.sum(dim, keepdim=True))
