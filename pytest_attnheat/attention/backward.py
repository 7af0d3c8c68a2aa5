"""The backward pass of attention as a kernel writes it, and the mistake that gives wrong gradients.

For a query and its keys, dO is the gradient of the output, and M what dropout does to a weight: it
becomes 0, or is divided by 1 - p; without dropout M is 1::

    P = exp(S - lse)    dP = M (dO V^T)    D = rowsum(dO O)    dS = P (dP - D)    dZ = slope dS
    dQ = scale dZ K     dK = scale dZ^T Q  dV = (M P)^T dO     dbias = dS         dsink = -P_sink D
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from .call import Call
from .decisions import BLOCKS, BackwardPlan, Defect, Plan
from .decisions import backward_defect as _backward
from .defects import DEFECTS
from .outcomes import (
    AS_WELL,
    MOST_ALLOWED,
    PART,
    Outcomes,
    as_case,
    changes,
    decisions_of,
    finite,
    fitting,
    listed,
    rms,
    simplest,
    too_large,
)
from .plan import Case, NotApplicable, Outcome, carry_out, misread, operands, whole_blocks
from .sharding import turned
from .tolerance import answer_tolerance, answer_units

# What a backward pass may do wrong of itself. It may also compute the weights once more with any
# defect of the forward pass: see `attention.backward`.
BACKWARD: tuple[Defect, ...] = (
    _backward("backward_row_term_left_out",
              "whose backward pass leaves out the row term: sum(dO * O) is not subtracted from dP",
              row_term="none"),
    _backward("backward_row_term_from_upstream",
              "whose backward pass takes sum(dO) for the row term sum(dO * O)",
              row_term="upstream"),
    _backward("backward_row_term_of_another_row",
              "whose backward pass takes the row term sum(dO * O) of another row",
              row_term=["next_row", "previous_row", "first_row"]),
    _backward("backward_row_term_of_another_head",
              "whose backward pass takes the row term sum(dO * O) of another head or sample",
              row_term=["next_head", "previous_head", "first_head", "key_head", "next_sample",
                        "first_sample"]),
    _backward("backward_scale_missing", "whose backward pass leaves out the scale",
              gradient_scale="missing"),
    _backward("backward_scale_twice", "whose backward pass applies the scale twice",
              gradient_scale="twice"),
    _backward("backward_of_exp2",
              "whose backward pass mixes exp and exp2: log2(e) is missing or too much",
              gradient_scale=["base_two", "base_e"]),
    _backward("backward_softcap_slope_missing",
              "whose backward pass leaves out the slope of softcap, or of a function of the score",
              score_slope="missing"),
    _backward("backward_groups_tiled", "that sums over the wrong heads of a group",
              "XunhaoLai/native-sparse-attention-triton#27", group_sum="tile",
              grouping=["interleave", "tile"]),
    _backward("backward_group_not_summed",
              "that keeps one head of a group, where the gradient sums over all",
              group_sum=["first", "last"]),
    _backward("backward_group_averaged", "that takes the mean over a group of heads, not the sum",
              group_sum="mean"),
    _backward("backward_bias_not_summed",
              "that does not sum over the dimensions in which the bias is broadcast",
              bias_sum=["first", "last", "mean"]),
    _backward("backward_sinks_averaged",
              "that takes a mean for the gradient of the sinks, not the sum over samples and "
              "queries", sink_sum=["mean", "sample_mean"]),
    _backward("backward_weights_detached",
              "whose weights are detached: a gradient passes through the values alone",
              detached=True),
    _backward("backward_exchanged", "that exchanges the gradients of query and key",
              exchanged=True),
    _backward("backward_dropout_ignored",
              "whose backward pass does not apply the dropout of the forward pass",
              kept_of_scores=["ignored", "applied"], kept_of_values=["ignored", "applied"],
              row_term=["saved", "own"]),
    _backward("backward_dropout_not_rescaled",
              "whose backward pass does not divide by 1 - p what dropout left",
              kept_of_scores=["not_rescaled", "applied"],
              kept_of_values=["not_rescaled", "applied"], row_term=["saved", "own"]),
    _backward("backward_shards_not_summed",
              "that does not sum the gradients of keys and values over the ranks, or gives the sum "
              "to another rank", "NVIDIA/Megatron-LM#1464",
              shard_sum=["own", "next", "previous"]),
    _backward("backward_queries_zero", "whose gradient of the queries is zero",
              queries="zero"),
    _backward("backward_partly_masked_blocks_skipped",
              "whose backward pass skips blocks that are masked in part",
              skipped_block=list(BLOCKS), form_of="causal_before_blocks"),
)  # fmt: skip

# Decisions that change the weights in another way than by the scores and by what is masked.
_FORWARD_ALONE = (
    "split", "merge", "weights_of_heads", "scale_after", "overflow", "products_dtype",
    "scores_dtype", "weights_dtype", "output_dtype", "softcap", "part", "masking", "fill", "dim",
    "normaliser", "sinks", "output_factor", "masked_nan",
)  # fmt: skip
# What a backward pass computes the weights from once more, and what it subtracts.
_AGAIN = (("saved", "saved"), ("own", "saved"), ("own", "own"))
_ONE = torch.ones((), dtype=torch.float64)
# Above so many numbers in scores and tensors, some hundred attempts would take too long.
_MOST_NUMBERS = 2**18


@dataclass(frozen=True, eq=False)
class Saved:
    """What the forward pass leaves for the backward pass."""

    call: Call  # What was computed
    case: Case  # The same on the CPU, (batch, heads, length, width)
    above: Tensor  # The gradient of its output
    forward: Outcome  # What attention gives on it
    lse: Tensor  # The logarithm of the sum of each row, (batch, heads, query_len, 1)
    kept: Tensor  # What dropout does to each weight, (batch, heads, query_len, key_len), or 1
    right: Tensor  # The row term D, (batch, heads, query_len, 1)
    allowed: float  # By which part of its size a row of a gradient may be off by rounding

    @classmethod
    def of(cls, call: Call, kept: Tensor | None) -> Saved:
        """Compute a call that has the gradient of its output."""
        case = as_case(call)
        tensors = {n: getattr(case, n).double() for n in ("query", "key", "value")}
        case = replace(case, **tensors)
        assert case.upstream is not None
        forward, above = carry_out(Plan(), case), case.upstream.double()
        lse = _masked(forward).logsumexp(-1, keepdim=True)
        if case.sinks is not None:
            lse = torch.logaddexp(lse, case.sinks.double()[:, None, None].expand_as(lse))
        drop = _ONE if kept is None else kept.double().view(case.shape)
        output = finite(forward.weights * drop) @ forward.value
        right = (above * output).sum(-1, keepdim=True)
        largest = 2 + float(finite(_masked(forward)).abs().max())
        units = answer_units(case.dtype) * torch.finfo(case.dtype).eps * largest
        allowed = min(max(answer_tolerance(case.dtype), units), MOST_ALLOWED)
        return cls(call, case, above, forward, lse, drop, right, allowed)


def _masked(outcome: Outcome) -> Tensor:
    return outcome.scores.masked_fill(~outcome.permitted, -math.inf)


def likely_backward_mistake(
    call: Call,  # What was to be computed, with the gradient of its output
    gradients: Mapping[str, Tensor],  # What was computed instead, under the names of `Call.shapes`
    output: Tensor | None = None,  # It, if it is wrong: no mistake of the pass is named then
    *,
    wrong: Collection[str] = (),  # Those that are off by more than rounding by default
    # What dropout did to each weight, (..., query_len, key_len): it became 0, or was divided by 1 -
    # p
    kept: Tensor | None = None,
) -> str | None:
    """Return the mistake that gives these gradients, or those that all give them; None if none."""
    numbers = call.maps * (call.query_len + call.key_len) * sum(t.shape[-1] for t in call.tensors)
    if numbers > _MOST_NUMBERS or too_large(call) or call.upstream is None or call.rounded:
        return None
    found = {name: one.detach().cpu().double() for name, one in gradients.items()}
    with torch.no_grad():
        saved = Saved.of(call, kept)
        off = {
            name: off_by(exact, found[name], saved)
            for name, exact in carried_back(BackwardPlan(), saved)
            if name in found
        }
        by = {n: size for n, (size, same) in off.items() if (n in wrong if wrong else not same)}
        if not by or not all(0 < size < math.inf for size in by.values()):
            return None
        which = f"the gradient{'s' * (len(by) > 1)} of {names_of([n for n in found if n in by])}"
        if output is not None:
            return _of_a_wrong_output(fitting(call, output), found, which, saved)
        fits: dict[str, tuple[bool, float]] = {}
        for sentence, plan in _attempted(saved):
            if (plan.detached or plan.exchanged) and not {"query", "key"} <= by.keys():
                continue  # of one tensor alone, that is not known
            if size := _fit(plan, found, by, saved):
                fits[sentence] = min(size, fits.get(sentence, size))
    if not fits:
        return None
    others, share = min(fits.values())
    near = [s for s, (no, far) in fits.items() if no == others and far <= AS_WELL * share]
    named = simplest(near, (*DEFECTS, *BACKWARD))
    are = "are those" if len(by) > 1 else "is that"
    return f"{which} {are} of attention {listed(named)}"


def _of_a_wrong_output(
    causes: Mapping[str, Plan], found: Mapping[str, Tensor], which: str, saved: Saved
) -> str | None:
    """Say whether the gradients are those of an output that is wrong."""
    named = f"that of attention {listed(list(causes))}"
    for plan in causes.values():
        again = carried_back(_started(plan, "own", "own"), saved)
        if all(off_by(one, found[name], saved)[1] for name, one in again if name in found):
            return f"{which} follow the output, which is wrong: it is {named}"
    return f"the output is wrong: it is {named}" if causes else None


def names_of(names: list[str]) -> str:
    """Return names as a list in a sentence."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _fit(
    plan: BackwardPlan, found: Mapping[str, Tensor], by: Mapping[str, float], saved: Saved
) -> tuple[bool, float] | None:
    """How far a plan is from what was found: what gives all that is right as well comes first."""
    # None if it does not give each gradient that is wrong.
    misses, share = False, 0.0
    with suppress(NotApplicable):
        for name, exact in carried_back(plan, saved):
            if name in found:
                off, fits = off_by(exact, found[name], saved)
                share = max(share, off / by[name]) if name in by else share
                if name in by and (not fits or share >= PART):
                    return None
                misses |= not fits
        return misses, share
    return None


def off_by(exact: Tensor, found: Tensor, saved: Saved) -> tuple[float, bool]:
    """By how much a gradient differs, and whether by rounding alone."""
    found = found.reshape(-1, *found.shape[-1:])
    exact = exact.reshape(found.shape)
    error, size = rms(found - exact), rms(exact)
    if not bool(error.isfinite().all()):
        return math.inf, False
    fits = bool((error <= saved.allowed * size.clamp(min=float(rms(size)))).all())
    return float(rms(error)), fits


def _attempted(saved: Saved) -> Iterator[tuple[str, BackwardPlan]]:
    """Yield each known mistake: of the backward pass alone, or of the weights in it."""
    every: list[tuple[str, Plan]] = [
        (defect.sentence, change(BackwardPlan())) for defect, change in changes(BACKWARD)
    ]
    outcomes = Outcomes(saved.case)
    for defect, change in changes():
        decided = decisions_of(change)
        # What a backward pass may do wrong as well, and does otherwise on this call.
        if decided.keys().isdisjoint(_FORWARD_ALONE) and (
            outcomes.of(decided) not in (None, outcomes.healthy)
        ):
            every += [(defect.sentence, _started(change(Plan()), *how)) for how in _AGAIN]
    for sentence, plan in every:
        assert isinstance(plan, BackwardPlan)
        yield sentence, plan


def _started(plan: Plan, weights_from: str, row_term: str) -> BackwardPlan:
    """The backward pass that computes its weights by a plan."""
    again: dict[str, Any] = {"weights_from": weights_from, "row_term": row_term}
    if weights_from == "own":  # the softmax of a row without keys has no gradient
        again["fully_masked"] = plan.fully_masked or "zero"
    return BackwardPlan(**vars(plan) | again)


def carried_back(plan: BackwardPlan, saved: Saved) -> Iterator[tuple[str, Tensor]]:
    """Yield the gradients, by name, of a backward pass."""
    case, above, read = saved.case, saved.above, misread(plan, saved.case)
    query, key, value = operands(plan, read)
    if (query.shape[-2], key.shape[-2]) != (case.query_len, case.key_len):
        raise NotApplicable("it reads fewer tokens than it gives gradients to")
    weights = _weights(plan, carry_out(plan, case), saved)
    kept = {"applied": saved.kept, "ignored": _ONE, "not_rescaled": (saved.kept > 0).double()}
    felt = (above @ value.mT) * kept[plan.kept_of_scores]
    term = _row_term(plan, saved, (weights * felt).sum(-1, keepdim=True))
    scores = weights * (felt - term) * (not plan.detached)
    scale = read.factor * plan.temperature
    slope, bias_slope = _slopes(plan, read, (query @ key.mT) * scale)
    scale = {
        "applied": scale, "missing": 1.0, "twice": scale * scale, "base_two": scale * math.log(2),
        "base_e": scale / math.log(2),
    }[plan.gradient_scale]  # fmt: skip
    products = scores * slope
    names = ("query", "key")
    if plan.exchanged:
        if case.query.shape != case.key.shape:
            raise NotApplicable("gradients of other shapes cannot be exchanged")
        names = ("key", "query")
    own, place = _shards(plan, case)
    yield names[0], products @ key * scale * (plan.queries == "given")
    yield names[1], _of_groups(plan, (products * own).mT @ query * scale, case)[..., place, :]
    weights = weights * kept[plan.kept_of_values] * own
    yield "value", _of_groups(plan, weights.mT @ above, case)[..., place, :]
    if case.sinks is not None:
        sinks = case.sinks.double()[:, None, None]
        attached = read.sinks is not None and not plan.detached
        total = (-(sinks - saved.lse).exp() * term * attached).sum((0, 2, 3))
        samples = case.query.shape[0]
        parts = {"sum": 1, "sample_mean": samples, "mean": samples * case.query_len}
        yield "sinks", total / parts[plan.sink_sum]
    if case.bias is not None:
        yield "attn_mask", _of_bias(plan, scores * bias_slope, saved.call)


def _weights(plan: BackwardPlan, again: Outcome, saved: Saved) -> Tensor:
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


def _row_term(plan: BackwardPlan, saved: Saved, own: Tensor) -> Tensor:
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


def _shards(plan: BackwardPlan, case: Case) -> tuple[Tensor, Tensor]:
    """Which queries a key hears of, and whose gradients each key gets."""
    every = torch.arange(case.key_len)
    if plan.shard_sum == "sum" or case.shards is None:
        return _ONE, every
    if plan.shard_sum != "own":
        return _ONE, turned(1 if plan.shard_sum == "previous" else -1, case.shards, case.key_len)
    own, its = (case.shards.owner(length) for length in (case.query_len, case.key_len))
    return (own[:, None] == its).double(), every


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
    last = parts.shape[dim] - 1
    if how in ("first", "last"):
        return parts.narrow(dim, 0 if how == "first" else last, 1)
    return parts.mean(dim, keepdim=True) if how == "mean" else parts.sum(dim, keepdim=True)
