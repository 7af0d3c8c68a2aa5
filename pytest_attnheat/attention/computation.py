"""Attention in float64 and its gradients, and how far rounding may move each of their numbers.

The formulas, for one query i and its keys j (Vaswani et al. 2017; the gradients as in Dao et al.
2022: FlashAttention, appendix B), where dO is the gradient of the output::

    s_ij = scale q_i . k_j + bias_ij    w_i = softmax(s_i)    o_i = sum_j w_ij v_j
    dS_ij = w_ij (dO_i . v_j - D_i)     D_i = sum_j w_ij dO_i . v_j       dZ_ij = a_ij dS_ij
    dQ_i = scale sum_j dZ_ij k_j        dK_j = scale sum_i dZ_ij q_i      dV_j = sum_i w_ij dO_i
    dsink = -sum_i w_i,sink D_i

**The natural scale** of a number is the error it would have if each step were rounded once, and
all errors pointed the same way (the componentwise bounds of Higham: Accuracy and Stability of
Numerical Algorithms, chapter 3). With the unit roundoff u, a score is off by ::

    d_ij = u (1 + |s_ij| + |bias_ij| + a_ij scale sqrt(sum_d (q_id k_jd)^2)) + x

where a_ij is the slope of the score as a function of the product (1, but for softcap and functions
of the score), 1 stands for a constant that a computation may add to all scores of a row, the root
for inputs that are rounded once more, each on its own, and x for an exp that is approximate. Then
a weight is off by ::

    W_ij = e_ij (1 - w_ij) + w_ij (u + sum_(l != j) e_il) + t    e_ij = min(1, w_ij expm1(d_ij))

(t is the smallest subnormal) and an output by `W @ |v|`. That is u times the weighted mean of
|v|, and a part for the scores, which vanishes where one key has all the weight. Added to u in W
is the rounding of the logarithm of a row's normaliser (as large as the highest score, or a higher
sink), in float32 or wider: FlashAttention keeps that, and recomputes the weights from it. The
gradients follow in the same way, see `_gradient_scales`. Every element has a scale of its own, so
that a key with a value of 1e4 excuses no other place.

What a key with a weight of 0 scores must not matter, or a mask of -1e9 would excuse anything: its
d_ij counts only through its weight, and a normaliser is as large as the largest score of its row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..inputs import wide_dtype
from .call import Call
from .parts import Part, add, parts_of, rounded
from .reference import masked_softmax
from .vocabulary import FullyMasked

# Vectorised kernels take an exp in float32 that is up to 20 units in the last place off (as
# PyTorch's own on the CPU).
_EXP_UNITS = 20
# A score that is off by more than this says no more.
_LARGEST_EXPONENT = 600.0


@dataclass(frozen=True)
class Reference:
    """What attention in float64 gives.

    Attributes:
        exact: By name (output, lse and weights if they are wanted, and the gradients of query,
            key, value, attn_mask, sinks), in float64.
        scale: How far rounding may move each of these numbers, if all errors point the same way.
        least: What is allowed for at any rate. The result and its normaliser are rounded, and
            of an output the errors of n keys add up like a random walk::

                2 u |o_i| + sqrt(sum_j w_ij^2) / (sum_j w_ij) scale        2 u |gradient| + scale
        unit: The unit roundoff that the scale was computed with.
        top_score: The largest permitted score; None if unknown.
    """

    exact: dict[str, Tensor]
    scale: dict[str, Tensor]
    least: dict[str, Tensor]
    unit: float
    top_score: float | None = None


@dataclass(frozen=True)
class _Units:
    """The roundoff of a computation in the dtype of a call."""

    one: float  # That of the dtype, with what a long sum adds to it
    sums: float  # That of the dtype of sums: float32 or wider, as in `attention.tolerance`
    # The smallest number that the dtype holds; at least the smallest normal one of float32 where
    # that is what is computed in, as many kernels take a smaller one for zero
    tiny: float
    exp: float  # How far exp is off by its approximation, as a part of itself

    @classmethod
    def of(cls, call: Call) -> _Units:
        info = torch.finfo(call.query.dtype)
        steps = max(*call.query.shape[-2:], *call.key.shape[-2:], call.value.shape[-1])
        sums = torch.finfo(wide_dtype(call.query.dtype)).eps / 2
        tiny = info.smallest_normal * info.eps
        is_exact = call.query.dtype == torch.float64
        exp = 0.0 if is_exact else _EXP_UNITS * torch.finfo(torch.float32).eps
        if not is_exact:
            tiny = max(tiny, torch.finfo(torch.float32).smallest_normal)
        return cls(info.eps / 2 + math.sqrt(steps) * sums, sums, tiny, exp)


@dataclass(frozen=True)
class _Row:
    """What the rows of a part come to, all (maps, rows, key_len) but for the last dimension."""

    scores: Tensor  # As they enter the softmax, not masked
    weights: Tensor  # Without that of the sink
    sink: Tensor | None  # The weight of the sink, (maps, rows, 1); None without one
    slope: Tensor | None  # How scores grow with the scaled product; None where it is 1
    bias_slope: Tensor | None  # How they grow with the bias; None where it is 1
    felt: Tensor  # What the rounding of a score is in proportion to: d / u - 1 above


def reference(call: Call, *, wanted: Sequence[str] = ()) -> Reference:
    """Compute attention in float64, its gradients, and the natural scale of each number."""
    # Besides the output and the gradients, "lse", the logarithm of the sum of each row, with the
    # sink where there is one, (..., query_len), and "weights", all of them at once, may be wanted.
    units = _Units.of(call)
    exact, scale = _zeros(call, wanted), _zeros(call, wanted)
    drift = _zeros(replace(call, upstream=None), ())["output"]
    top = -math.inf
    for part in parts_of(call, torch.float64):
        row = _row(call, units, part)
        unsure = _unsure(units, part, row) + _once_more(call, "weights") * row.weights
        parts = {"output": row.weights @ part.value, "weights": row.weights, "lse": _lse(part, row)}
        of_values = unsure + _once_more(call, "value") * row.weights
        sizes = {"output": of_values @ part.value.abs() + units.tiny, "weights": unsure}
        sizes["lse"] = _lse_scale(units, part, row, parts["lse"])
        if part.upstream is not None:
            parts |= _gradients(call, part, row, part.upstream)
            again = _recomputed(units, row, unsure)
            sizes |= _gradient_scales(call, units, part, row, again, part.upstream)
        # As a part of what the keys have of a row, of which a sink may have most.
        of_keys = row.weights.sum(-1, keepdim=True).clamp_(min=units.tiny)
        share = (row.weights / of_keys).square().sum(-1, keepdim=True).sqrt()
        walk = share * sizes["output"] + units.tiny
        add(drift, "output", part, walk)
        for name in exact:
            add(exact[name], name, part, parts[name])
            add(scale[name], name, part, sizes[name])
        top = max(top, float(row.scores.masked_fill(~part.permitted, -math.inf).amax()))
    own = {name: 2 * units.one * tensor.abs() for name, tensor in exact.items()}
    least = {name: own[name] + (drift if name == "output" else scale[name]) for name in exact}
    return Reference(exact, scale, least, units.one, top)


def plain(call: Call) -> dict[str, Tensor]:
    """Compute the same in plain PyTorch and the dtype of the query; return it as float64."""
    found = _zeros(call, ())
    wanted = [name for name in found if name != "output"]
    for part in parts_of(call, call.query.dtype):
        given = {"query": part.query, "key": part.key, "value": part.value}
        given |= {} if part.bias is None else {"attn_mask": part.bias}
        given |= {} if part.sinks is None else {"sinks": part.sinks}
        leaves = {k: t.detach().requires_grad_(bool(wanted)) for k, t in given.items()}
        named: dict[str, Any] = {"bias" if k == "attn_mask" else k: t for k, t in leaves.items()}
        own = replace(part, **named)
        output = _weights(call, own, _scores(call, own))[0] @ own.value
        parts = {"output": output.detach()}
        if wanted:
            slopes = torch.autograd.grad(output, [leaves[k] for k in wanted], part.upstream)
            parts |= dict(zip(wanted, slopes, strict=True))
        for name in found:
            add(found[name], name, part, parts[name].double())
    return found


def _once_more(call: Call, *steps: str) -> float:
    """By which part of itself a step may be off that is rounded once more, the other way."""
    dtypes = [(call.rounded or {}).get(step) for step in steps]
    return sum(torch.finfo(dtype).eps / 2 for dtype in dtypes if dtype is not None)


def _products(call: Call, part: Part) -> Tensor:
    return (part.query @ part.key.mT) * call.factor


def _biased(part: Part, scores: Tensor) -> Tensor:
    for added in (part.bias, part.distant):
        scores = scores if added is None else scores + added
    return scores


def _scores(call: Call, part: Part) -> Tensor:
    scores = call.modified(_biased(part, call.capped(_products(call, part))), part.at)
    return rounded(call, "scores", scores)


def _weights(call: Call, part: Part, scores: Tensor) -> tuple[Tensor, Tensor | None]:
    """The weights, and the weight of the sink: one key more, which every query may see."""
    meaning: FullyMasked = "uniform" if call.fully_masked == "uniform" else "zero"
    if part.sinks is None:
        weights = masked_softmax(scores, part.permitted, fully_masked=meaning)
        return rounded(call, "weights", weights), None
    sinks = part.sinks.expand(*scores.shape[:-1], 1)
    every = torch.cat([scores, sinks], -1)
    permitted = torch.cat([part.permitted, sinks > -math.inf], -1)
    weights = masked_softmax(every, permitted)
    return rounded(call, "weights", weights[..., :-1]), weights[..., -1:]


def _row(call: Call, units: _Units, part: Part) -> _Row:
    products = _products(call, part)
    capped = call.capped(products)
    biased = _biased(part, capped)
    scores, bias_slope = biased, None
    if call.score_mod is not None:
        with torch.enable_grad():
            leaf = biased.detach().requires_grad_()
            scores = call.modified(leaf, part.at)
            bias_slope = _grad(scores, leaf)
        scores = scores.detach()
    slope = bias_slope
    if call.softcap is not None:
        slope = 1 - (capped / call.softcap).square()
        slope = slope if bias_slope is None else slope * bias_slope
    scores = rounded(call, "scores", scores)
    weights, sink = _weights(call, part, scores)
    felt = (part.query.square() @ part.key.square().mT).sqrt_().mul_(abs(call.factor))
    felt *= 1 + _once_more(call, "query", "key") / units.one
    if call.softcap is not None:  # the product is rounded before, and felt by its slope alone
        felt += products.abs()
    felt = felt if slope is None else felt.mul_(slope.abs())
    felt += scores.abs() * (1 + _once_more(call, "scores") / units.one)
    for added in (part.bias, part.distant):
        felt = felt if added is None else felt + added.abs()
    # Twice finfo.min would be inf, and with it a masked key the largest of its row.
    felt = felt.clamp_(max=torch.finfo(felt.dtype).max)
    return _Row(scores, weights, sink, slope, bias_slope, felt)


def _grad(scores: Tensor, leaf: Tensor) -> Tensor:
    if not scores.requires_grad:  # a function that leaves the score out
        return torch.zeros_like(leaf)
    (slope,) = torch.autograd.grad(scores.sum(), leaf)
    return slope


def _lse(part: Part, row: _Row) -> Tensor:
    """The logarithm of the sum of each row, -inf where there is nothing to sum, (maps, rows, 1)."""
    lse = row.scores.masked_fill(~part.permitted, -math.inf).logsumexp(-1, keepdim=True)
    return lse if part.sinks is None else torch.logaddexp(lse, part.sinks.expand_as(lse))


def _lse_scale(units: _Units, part: Part, row: _Row, lse: Tensor) -> Tensor:
    moved = (row.felt + 1).mul_(row.weights).masked_fill_(~part.permitted, 0.0)
    off = (moved.sum(-1, keepdim=True) + lse.abs().nan_to_num_(posinf=0.0)).mul_(units.one)
    if row.sink is not None and part.sinks is not None:
        off += row.sink * (part.sinks.abs().nan_to_num_(posinf=0.0) + 1) * units.one
    return off.add_(units.tiny)


def _logarithm(units: _Units, part: Part, row: _Row) -> Tensor:
    """How far rounding may move the logarithm of a row's normaliser, (maps, rows, 1)."""
    largest = row.scores.masked_fill(~part.permitted, -math.inf).amax(-1, keepdim=True)
    off = largest.abs().nan_to_num_(posinf=0.0)
    if part.sinks is not None:  # which may be most of it: that of the keys is rounded beside it
        off = torch.maximum(off, torch.maximum(largest, part.sinks).abs_().nan_to_num_(posinf=0.0))
    return off.mul_(units.sums)


def _highest(units: _Units, part: Part, row: _Row) -> Tensor:
    """Which scores may be the largest of their row, within rounding."""
    off = row.felt * units.one
    low = (row.scores - off).masked_fill_(~part.permitted, -math.inf).amax(-1, keepdim=True)
    return (off.add_(row.scores) >= low) & part.permitted


def _unsure(units: _Units, part: Part, row: _Row) -> Tensor:
    """How far each weight may be off: W in the formulas above."""
    moved = (row.felt + 1).mul_(units.one).add_(units.exp)
    moved = moved.clamp_(max=_LARGEST_EXPONENT).expm1_()
    moved = moved.mul_(row.weights).clamp_(max=1.0).masked_fill_(~part.permitted, 0.0)
    others = moved.sum(-1, keepdim=True) - moved
    others += units.one + _logarithm(units, part, row)
    if row.sink is not None and part.sinks is not None:
        felt = (part.sinks.abs() + 1).nan_to_num_(posinf=0.0).mul_(units.one)
        others += row.sink * felt.clamp_(max=_LARGEST_EXPONENT).expm1_()
    # No weight is off by more than 1, even where all scores of a row are -1e9.
    off = moved.mul_(1 - row.weights).add_(others.mul_(row.weights)).clamp_(max=1.0)
    return off.add_(part.permitted, alpha=units.tiny)


def _recomputed(units: _Units, row: _Row, unsure: Tensor) -> Tensor:
    """How far each weight may be off in the backward pass."""
    # FlashAttention computes the scores once more there, in another order, and subtracts the
    # logarithm of the sum of before: what they differ by is felt where one key has all the weight
    # as well.
    off = (row.felt * units.one).clamp_(max=_LARGEST_EXPONENT).expm1_()
    return off.mul_(row.weights).add_(unsure).clamp_(max=1.0)


def _gradients(call: Call, part: Part, row: _Row, above: Tensor) -> dict[str, Tensor]:
    """The gradients by the formulas above. A row that may attend to nothing has none."""
    felt = above @ part.value.mT
    mean = (row.weights * felt).sum(-1, keepdim=True)
    slope = felt.sub_(mean).mul_(row.weights).masked_fill_(~part.permitted, 0.0)
    of_products = slope if row.slope is None else slope * row.slope
    found = {
        "query": of_products @ part.key * call.factor,
        "key": of_products.mT @ part.query * call.factor,
        "value": row.weights.mT @ above,
        "attn_mask": slope if row.bias_slope is None else slope * row.bias_slope,
    }
    if row.sink is not None:
        found["sinks"] = -row.sink * mean
    return found


def _gradient_scales(
    call: Call, units: _Units, part: Part, row: _Row, unsure: Tensor, above: Tensor
) -> dict[str, Tensor]:
    """How far the gradients may be off."""
    # dS_ij = w_ij (dP_ij - D_i) is off by the error of its weight times |dP_ij - D_i|, and by its
    # weight times the errors of dP_ij = dO_i . v_j (u |dO_i| . |v_j|) and of D_i (those of each
    # dP_ij, and of each weight). Where the row maximum is subtracted first, autograd adds the sum
    # of a row of dS to the highest score: zero, but for the errors of all. Where parts of the keys
    # are merged by the logarithms of their normalisers, the parts of dP_ij - D_i that cancel are
    # each off by the rounding of those; a sink that is merged so parts it from the mean of the
    # keys. The slope of softcap is off by a few units of itself and, through its argument, of the
    # score.
    weights, logarithm = row.weights, _logarithm(units, part, row)
    felt = above @ part.value.mT
    mean = (weights * felt).sum(-1, keepdim=True)
    away = felt.sub_(mean).abs_()
    step = (above.abs() @ part.value.abs().mT).mul_(units.one + logarithm.clamp(max=1.0))
    mean_step = (weights * step).sum(-1, keepdim=True)
    mean_off = (unsure * away).sum(-1, keepdim=True).add_(mean_step)
    if row.sink is not None:  # beside a sink that has most of it, the mean over the keys alone
        step.add_(mean_step / weights.sum(-1, keepdim=True).clamp_(min=units.tiny))
    off = step.add_(mean_off).mul_(weights).add_(away * unsure)
    off.masked_fill_(~part.permitted, 0.0)
    off += _highest(units, part, row) * off.sum(-1, keepdim=True)
    # dP, its difference from D, its part of the sum and its product with the weight are rounded,
    # each by the smallest number at least.
    off.add_(part.permitted, alpha=4 * units.tiny)
    of_products = off if row.slope is None else off * row.slope.abs()
    if row.slope is not None:
        steep = (weights * away).masked_fill_(~part.permitted, 0.0)
        of_products = of_products + steep * (row.felt + 4) * units.one
    factor = abs(call.factor)
    found = {
        "query": of_products @ part.key.abs() * factor + units.tiny,
        "key": of_products.mT @ part.query.abs() * factor + units.tiny,
        "value": unsure.mT @ above.abs() + units.tiny,
        "attn_mask": (off if row.bias_slope is None else of_products) + units.tiny,
    }
    if row.sink is not None and part.sinks is not None:
        felt_sink = (part.sinks.abs().nan_to_num(posinf=0.0) + 4) * units.one
        own = row.sink * mean.abs() * (felt_sink + mean_off + unsure.sum(-1, keepdim=True))
        found["sinks"] = own + row.sink * mean_off + units.tiny
    return found


def _zeros(call: Call, wanted: Sequence[str]) -> dict[str, Tensor]:
    more = {"lse": (*call.query.shape[:-1], 1), "weights": (*call.query.shape[:-1], call.key_len)}
    shapes = call.shapes | {name: more[name] for name in wanted}
    device = call.query.device
    return {n: torch.zeros(s, dtype=torch.float64, device=device) for n, s in shapes.items()}
