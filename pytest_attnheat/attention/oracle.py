"""Attention in float64 and its gradients, and how far rounding may move each of their numbers.

The formulas, for one query i and its keys j (Vaswani et al. 2017; the gradients as in Dao et al.
2022: FlashAttention, appendix B), where dO is the gradient of the output::

    s_ij = scale q_i . k_j + bias_ij    w_i = softmax(s_i)    o_i = sum_j w_ij v_j
    dS_ij = w_ij (dO_i . v_j - D_i)     D_i = sum_j w_ij dO_i . v_j
    dQ_i = scale sum_j dS_ij k_j        dK_j = scale sum_i dS_ij q_i      dV_j = sum_i w_ij dO_i

**The natural scale** of a number is the error it would have if each step were rounded once, and
all errors pointed the same way (the componentwise bounds of Higham: Accuracy and Stability of
Numerical Algorithms, chapter 3). With the unit roundoff u, a score is off by ::

    d_ij = u (1 + |s_ij| + |bias_ij| + scale sqrt(sum_d (q_id k_jd)^2))

where 1 stands for a constant that a computation may add to all scores of a row, and the root for
inputs that are rounded once more, each on its own. Then a weight is off by ::

    W_ij = e_ij (1 - w_ij) + w_ij (u + sum_(l != j) e_il) + t    e_ij = min(1, w_ij expm1(d_ij))

(t is the smallest subnormal) and an output by `W @ |v|`. That is u times the weighted mean of
|v|, and a part for the scores, which vanishes where one key has all the weight. Added to u in W
is the rounding of the logarithm of a row's normaliser, in float32 or wider: FlashAttention keeps
that, and recomputes the weights from it. The gradients follow in the same way, see
`_gradient_scales`. Every element has a scale of its own, so that a key with a value of 1e4
excuses no other place.

What a key with a weight of 0 scores must not matter, or a mask of -1e9 would excuse anything: its
d_ij counts only through its weight, and a normaliser is as large as the largest score of its row.

Everything is computed for some maps or some queries at a time, in bounded memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from pytest_attnheat.attention import chunks
from pytest_attnheat.attention.reference import causal_mask, masked_softmax
from pytest_attnheat.inputs import wide_dtype

# How many float64 matrices (queries x keys) one chunk may make.
_MATRICES = 16
# A score that is off by more than this says no more.
_LARGEST_EXPONENT = 600.0


@dataclass(frozen=True)
class Problem:
    """One attention, fully described.

    Attributes:
        query: (..., query_len, head_dim)
        key: (..., key_len, head_dim), of fewer heads where they are grouped.
        value: (..., key_len, value_dim), likewise.
        mask: Boolean, True where a query may attend, (..., query_len or 1, key_len or 1); None
            permits all.
        bias: Added to the scores, of such a shape; -inf forbids. Or None.
        is_causal: Whether a query may only attend up to its own position, from the top left.
        scale: What the products of queries and keys are multiplied with.
        uniform: Whether a row without any permitted key is the mean of all values; else it is 0.
        upstream: The gradient of the output, (..., query_len, value_dim); None for no gradients.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    bias: Tensor | None
    is_causal: bool
    scale: float
    uniform: bool
    upstream: Tensor | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the results, by name."""
        shapes = {"output": (*self.query.shape[:-1], self.value.shape[-1])}
        if self.upstream is not None:
            shapes |= {"query": tuple(self.query.shape), "key": tuple(self.key.shape)}
            shapes["value"] = tuple(self.value.shape)
            if self.bias is not None:
                shapes["attn_mask"] = tuple(self.bias.shape)
        return shapes

    @property
    def unit(self) -> float:
        """The unit roundoff of the dtype, with what a long sum adds to it.

        Sums are kept in float32 or wider, as in `pytest_attnheat.attention.tolerance`.
        """
        steps = max(*self.query.shape[-2:], *self.key.shape[-2:], self.value.shape[-1])
        return torch.finfo(self.query.dtype).eps / 2 + math.sqrt(steps) * self.sum_unit

    @property
    def sum_unit(self) -> float:
        """The unit roundoff of the dtype that sums are kept in."""
        return torch.finfo(wide_dtype(self.query.dtype)).eps / 2

    @property
    def tiny(self) -> float:
        """The smallest number that the dtype holds."""
        info = torch.finfo(self.query.dtype)
        return info.smallest_normal * info.eps


@dataclass(frozen=True)
class Reference:
    """What attention in float64 gives.

    Attributes:
        exact: By name (output, and the gradients of query, key, value, attn_mask), in float64.
        scale: How far rounding may move each of these numbers, if all errors point the same way.
        least: What is allowed for at any rate. The result and its normaliser are rounded, and
            of an output the errors of n keys add up like a random walk::

                2 u |o_i| + sqrt(sum_j w_ij^2) scale        2 u |gradient| + scale
        unit: The unit roundoff that the scale was computed with.
        top_score: The largest permitted score; None if unknown.
    """

    exact: dict[str, Tensor]
    scale: dict[str, Tensor]
    least: dict[str, Tensor]
    unit: float
    top_score: float | None = None


@dataclass(frozen=True)
class _Chunk:
    """Some queries of some maps. Tensors are (maps, length, width); `own` tells which maps."""

    own: dict[str, Tensor]
    rows: slice
    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    permitted: Tensor
    upstream: Tensor | None


def reference(problem: Problem) -> Reference:
    """Compute attention in float64, its gradients, and the natural scale of each number."""
    exact, scale = _zeros(problem), _zeros(problem)
    drift = _zeros(replace(problem, upstream=None))["output"]
    top = -math.inf
    for chunk in _chunks(problem, torch.float64):
        scores = _scores(problem, chunk)
        weights = _weights(problem, chunk, scores)
        felt = _felt(problem, chunk, scores)
        unsure = _unsure(problem, chunk, scores, weights, felt)
        parts = {"output": weights @ chunk.value}
        sizes = {"output": unsure @ chunk.value.abs() + problem.tiny}
        if chunk.upstream is not None:
            parts |= _gradients(problem, chunk, weights, chunk.upstream)
            highest = _highest(problem, chunk, scores, felt)
            logarithm = _logarithm(problem, chunk, scores)
            sizes |= _gradient_scales(
                problem, chunk, weights, unsure, highest, logarithm, chunk.upstream
            )
        walk = weights.square().sum(-1, keepdim=True).sqrt() * sizes["output"] + problem.tiny
        _add(drift, "output", chunk, walk)
        for name in exact:
            _add(exact[name], name, chunk, parts[name])
            _add(scale[name], name, chunk, sizes[name])
        top = max(top, float(scores.masked_fill(~chunk.permitted, -math.inf).amax()))
    rounded = {name: 2 * problem.unit * tensor.abs() for name, tensor in exact.items()}
    least = {name: rounded[name] + (drift if name == "output" else scale[name]) for name in exact}
    return Reference(exact, scale, least, problem.unit, top)


def plain(problem: Problem) -> dict[str, Tensor]:
    """Compute the same in plain PyTorch and the dtype of the query; return it as float64."""
    found = _zeros(problem)
    wanted = [name for name in found if name != "output"]
    for chunk in _chunks(problem, problem.query.dtype):
        leaves = {"query": chunk.query, "key": chunk.key, "value": chunk.value}
        if chunk.bias is not None:
            leaves["attn_mask"] = chunk.bias
        leaves = {k: t.detach().requires_grad_(bool(wanted)) for k, t in leaves.items()}
        own = replace(
            chunk,
            query=leaves["query"],
            key=leaves["key"],
            value=leaves["value"],
            bias=leaves.get("attn_mask"),
        )
        output = _weights(problem, own, _scores(problem, own)) @ own.value
        parts = {"output": output.detach()}
        if wanted:
            slopes = torch.autograd.grad(output, [leaves[k] for k in wanted], chunk.upstream)
            parts |= dict(zip(wanted, slopes, strict=True))
        for name in found:
            _add(found[name], name, chunk, parts[name].double())
    return found


def _scores(problem: Problem, chunk: _Chunk) -> Tensor:
    scores = (chunk.query @ chunk.key.mT) * problem.scale
    return scores if chunk.bias is None else scores + chunk.bias


def _weights(problem: Problem, chunk: _Chunk, scores: Tensor) -> Tensor:
    return masked_softmax(
        scores, chunk.permitted, fully_masked="uniform" if problem.uniform else "zero"
    )


def _felt(problem: Problem, chunk: _Chunk, scores: Tensor) -> Tensor:
    """What the rounding of a score is in proportion to: d / u - 1 in the formulas above."""
    felt = (chunk.query.square() @ chunk.key.square().mT).sqrt_().mul_(abs(problem.scale))
    felt += scores.abs()
    if chunk.bias is not None:
        felt += chunk.bias.abs()
    # Twice finfo.min would be inf, and with it a masked key the largest of its row.
    return felt.clamp_(max=torch.finfo(felt.dtype).max)


def _logarithm(problem: Problem, chunk: _Chunk, scores: Tensor) -> Tensor:
    """How far rounding may move the logarithm of a row's normaliser, (maps, rows, 1)."""
    largest = scores.masked_fill(~chunk.permitted, -math.inf).amax(-1, keepdim=True)
    return largest.abs_().nan_to_num_(posinf=0.0).mul_(problem.sum_unit)


def _highest(problem: Problem, chunk: _Chunk, scores: Tensor, felt: Tensor) -> Tensor:
    """Which scores may be the largest of their row, within rounding."""
    off = felt * problem.unit
    low = (scores - off).masked_fill_(~chunk.permitted, -math.inf).amax(-1, keepdim=True)
    return (off.add_(scores) >= low) & chunk.permitted


def _unsure(
    problem: Problem, chunk: _Chunk, scores: Tensor, weights: Tensor, felt: Tensor
) -> Tensor:
    """How far each weight may be off: W in the formulas above."""
    moved = (felt + 1).mul_(problem.unit).clamp_(max=_LARGEST_EXPONENT).expm1_()
    moved = moved.mul_(weights).clamp_(max=1.0).masked_fill_(~chunk.permitted, 0.0)
    others = moved.sum(-1, keepdim=True) - moved
    others += problem.unit + _logarithm(problem, chunk, scores)
    # No weight is off by more than 1, even where all scores of a row are -1e9.
    off = moved.mul_(1 - weights).add_(others.mul_(weights)).clamp_(max=1.0)
    return off.add_(chunk.permitted, alpha=problem.tiny)


def _gradients(
    problem: Problem, chunk: _Chunk, weights: Tensor, above: Tensor
) -> dict[str, Tensor]:
    """The gradients by the formulas above. A row that may attend to nothing has none."""
    felt = above @ chunk.value.mT
    mean = (weights * felt).sum(-1, keepdim=True)
    slope = felt.sub_(mean).mul_(weights).masked_fill_(~chunk.permitted, 0.0)
    return {
        "query": slope @ chunk.key * problem.scale,
        "key": slope.mT @ chunk.query * problem.scale,
        "value": weights.mT @ above,
        "attn_mask": slope,
    }


def _gradient_scales(
    problem: Problem,
    chunk: _Chunk,
    weights: Tensor,
    unsure: Tensor,
    highest: Tensor,
    logarithm: Tensor,
    above: Tensor,
) -> dict[str, Tensor]:
    """How far the gradients may be off.

    dS_ij = w_ij (dP_ij - D_i) is off by the error of its weight times |dP_ij - D_i|, and by its
    weight times the errors of dP_ij = dO_i . v_j (u |dO_i| . |v_j|) and of D_i (those of each
    dP_ij, and of each weight). Where the row maximum is subtracted first, autograd adds the sum
    of a row of dS to the highest score: zero, but for the errors of all. Where parts of the keys
    are merged by the logarithms of their normalisers, the parts of dP_ij - D_i that cancel are
    each off by the rounding of those.
    """
    felt = above @ chunk.value.mT
    away = felt.sub_((weights * felt).sum(-1, keepdim=True)).abs_()
    step = (above.abs() @ chunk.value.abs().mT).mul_(problem.unit + logarithm.clamp(max=1.0))
    mean_off = (unsure * away).add_(weights * step).sum(-1, keepdim=True)
    off = step.add_(mean_off).mul_(weights).add_(away.mul_(unsure))
    off.masked_fill_(~chunk.permitted, 0.0)
    off += highest * off.sum(-1, keepdim=True)
    off.add_(chunk.permitted, alpha=problem.tiny)
    factor = abs(problem.scale)
    return {
        "query": off @ chunk.key.abs() * factor + problem.tiny,
        "key": off.mT @ chunk.query.abs() * factor + problem.tiny,
        "value": unsure.mT @ above.abs() + problem.tiny,
        "attn_mask": off + problem.tiny,
    }


def _zeros(problem: Problem) -> dict[str, Tensor]:
    """A float64 tensor for each result."""
    device = problem.query.device
    return {
        name: torch.zeros(shape, dtype=torch.float64, device=device)
        for name, shape in problem.shapes.items()
    }


def _add(total: Tensor, name: str, chunk: _Chunk, part: Tensor) -> None:
    """Add the part of a chunk where it belongs: keys that several chunks share sum up."""
    flat = _flat(total)
    if name in ("key", "value"):
        flat.index_add_(0, chunk.own[name], part)
    elif name == "attn_mask":
        part = part.sum(-1, keepdim=True) if flat.shape[-1] == 1 else part
        part = part.sum(-2, keepdim=True) if flat.shape[-2] == 1 else part
        rows = _own_rows(flat, chunk.rows)
        flat[:, rows].index_add_(0, chunk.own["bias"], part)
    else:
        flat[chunk.own["query"], chunk.rows] = part


def _chunks(problem: Problem, dtype: torch.dtype) -> Iterator[_Chunk]:
    """Yield all queries of all maps, in parts whose matrices fit into the budget."""
    query_len, key_len = problem.query.shape[-2], problem.key.shape[-2]
    maps = problem.query.shape[:-2].numel()
    row_bytes = _MATRICES * 8 * key_len
    rows = max(1, min(query_len, chunks.CHUNK_BYTES // row_bytes))
    together = max(1, chunks.CHUNK_BYTES // (row_bytes * rows))
    causal = None
    if problem.is_causal:
        device = problem.query.device
        causal = causal_mask(query_len, key_len, alignment="top_left", device=device)
    flat, own = _flattened(problem)
    for some, span in product(chunks.spans(maps, together), chunks.spans(query_len, rows)):
        mine = {name: index[some] for name, index in own.items()}
        part = {
            name: tensor[mine[name]][:, _own_rows(tensor, span)]
            for name, tensor in flat.items()
            if name not in ("key", "value")
        }
        bias = part.get("bias")
        permitted = torch.ones(
            (len(mine["query"]), span.stop - span.start, key_len),
            dtype=torch.bool,
            device=problem.query.device,
        )
        if causal is not None:
            permitted &= causal[span]
        if "mask" in part:
            permitted &= part["mask"]
        if bias is not None:
            permitted &= bias != -math.inf
            # Their weight is 0 by the mask; a -inf left in the scores would make NaN.
            bias = bias.masked_fill(bias == -math.inf, 0.0).to(dtype)
        yield _Chunk(
            own=mine,
            rows=span,
            query=part["query"].to(dtype),
            key=flat["key"][mine["key"]].to(dtype),
            value=flat["value"][mine["value"]].to(dtype),
            bias=bias,
            permitted=permitted,
            upstream=part["upstream"].to(dtype) if "upstream" in part else None,
        )


def _flattened(problem: Problem) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All inputs as (maps, length, width), and for each which of its maps each query map uses."""
    given = {
        name: tensor
        for name in ("query", "key", "value", "mask", "bias", "upstream")
        if (tensor := getattr(problem, name)) is not None
    }
    flat = {name: _flat(tensor.detach()) for name, tensor in given.items()}
    own = {
        name: _own_maps(tensor, problem.query, grouped=name in ("key", "value"))
        for name, tensor in given.items()
    }
    return flat, own


def _own_maps(tensor: Tensor, query: Tensor, *, grouped: bool) -> Tensor:
    lead = tensor.shape[:-2]
    index = torch.arange(lead.numel(), device=query.device).view(lead)
    if grouped and lead != query.shape[:-2]:
        index = index.repeat_interleave(query.shape[-3] // tensor.shape[-3], -1)
    return index.expand(query.shape[:-2]).reshape(-1)


def _own_rows(tensor: Tensor, rows: slice) -> slice:
    return rows if tensor.shape[-2] > 1 else slice(0, 1)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, *tensor.shape[-2:])
