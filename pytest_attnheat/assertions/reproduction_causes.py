"""Likely causes of an output that its weights did not make, read from a bounded sample.

Most causes are another product than ``weights @ value``. One is named only
where it gives every sampled element of the output, within rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product as every_combination

import torch

from pytest_attnheat.assertions import causes
from pytest_attnheat.assertions.claims import Index
from pytest_attnheat.assertions.product import CHANNELS, Product, Sample, gather
from pytest_attnheat.assertions.scan import evenly, mask_at
from pytest_attnheat.attention.chunks import pieces
from pytest_attnheat.attention.reference import causal_mask
from pytest_attnheat.attention.vocabulary import Alignment

# The most numbers of one operand that a sample holds: 8 MB in float64.
_SAMPLE = 2**20
_MAPS = 32
_QUERIES = 32

# Of the product, the map with the worst element, and the queries that it was sampled at.
Cause = Callable[[Product, Sample, torch.Tensor], "str | None"]


def likely_cause(product: Product) -> str | None:
    """Return the first cause that the numbers show, or None."""
    key_len, value_dim = product.value.shape[-2:]
    if key_len * min(value_dim, CHANNELS) > _SAMPLE:
        return None
    queries = _queries(product, 1)
    worst = product.take(product.worst[:-2], queries)
    found = (cause(product, worst, queries) for cause in _CAUSES)
    return next((sentence for sentence in found if sentence is not None), None)


def constant_factor(product: Product, worst: Sample, queries: torch.Tensor) -> str | None:
    """The output is a multiple of the product."""
    made = worst.weights @ worst.value
    length = float(made.square().sum())
    if not (math.isfinite(length) and length > 0):
        return None
    factor = float((made * worst.output).sum()) / length
    if abs(factor) < 1e-6 or abs(factor - 1) <= product.slack:
        return None
    if not worst.made_by(worst.weights, worst.value, factor):
        return None
    places = _indices(product.output.shape[:-2])
    others = [product.take(place, queries) for place in (places[0], places[-1])]
    all_are = all(other.made_by(other.weights, other.value, factor) for other in others)
    return (
        f"output {'' if all_are else 'of this map '}is {factor:.3g} times weights @ value: a scale "
        "after the softmax, or dropout that rescaled only one of them?"
    )


def made_by_another(product: Product, _: Sample, __: torch.Tensor) -> str | None:
    """The worst map is made by the weights of another head or batch entry, and of no third."""
    own, places = product.worst[:-2], _indices(product.output.shape[:-2])
    key_len, value_dim = product.value.shape[-2:]
    if len(places) * key_len * min(value_dim, CHANNELS) > _SAMPLE or len(places) > _MAPS:
        return None
    queries = _queries(product, len(places))
    samples = {place: product.take(place, queries) for place in places}
    found = samples[own]
    makers = [
        place
        for place, other in samples.items()
        if any(found.made_by(other.weights, value) for value in (found.value, other.value))
    ]
    if len(makers) != 1 or makers[0] == own:
        return None
    maker = makers[0]
    if product.grouped:
        members = product.output.shape[-3]
        own, maker = ((*at[:-2], at[-2] * members + at[-1]) for at in (own, maker))
    return (
        f"output {list(own)} is made by weights {list(maker)}: heads or batch entries in another "
        "order?"
    )


def rearranged(product: Product, _: Sample, __: torch.Tensor) -> str | None:
    """Heads of the value were repeated as a whole, or heads merged without a transpose."""
    operands = product.weights, product.value, product.output, product.given
    if (
        not (product.grouped or product.merged)
        or sum(math.prod(x.shape) for x in operands) > _SAMPLE
    ):
        return None
    weights, value, output, given = (
        mask_at(x, tuple(slice(0, size) for size in x.shape)).double().cpu() for x in operands
    )
    shape = output.shape
    if product.grouped:
        value_heads, members = shape[-4:-2]
        heads = (torch.arange(value_heads * members, device="cpu") % value_heads).tolist()
        tiled = value[..., 0, :, :][..., heads, :, :].reshape(*shape[:-2], *value.shape[-2:])
        if Sample(weights, tiled, output, product.slack).made_by(weights, tiled):
            return (
                f"head h uses head h % {value_heads} of value, not h // {members}: repeat (tile) "
                "in place of repeat_interleave?"
            )
    if product.merged and Sample(weights, value, given.reshape(shape), product.slack).made_by(
        weights, value
    ):
        return "heads were merged without a transpose: output.transpose(1, 2).flatten(2)?"
    return None


def transposed(product: Product, worst: Sample, queries: torch.Tensor) -> str | None:
    """The queries and keys of the weights have changed places."""
    query_len, key_len = product.weights.shape[-2:]
    if query_len != key_len or worst.made_by(worst.weights, worst.value):
        return None
    place = tuple(slice(i, i + 1) for i in product.worst[:-2])
    index = (*place, slice(0, query_len), slice(0, key_len))
    if worst.made_by(gather(product.weights, index, queries, -1).mT, worst.value):
        return "output is weights.mT @ value: queries and keys of the weights have changed places?"
    return None


def causal_elsewhere(product: Product, worst: Sample, queries: torch.Tensor) -> str | None:
    """The output is that of causal attention, and the weights are not causal."""
    query_len, key_len = product.weights.shape[-2:]
    alignments: tuple[Alignment, ...] = ("top_left", "bottom_right")
    for alignment in alignments[: 1 if query_len == key_len else 2]:
        mask = causal_mask(query_len, key_len, alignment=alignment, device="cpu")[queries]
        kept = worst.weights * mask
        total = kept.sum(-1, keepdim=True)
        if torch.equal(kept, worst.weights) or bool((total <= 0).any()):
            continue
        if worst.made_by(kept / total, worst.value):
            return "output is that of causal attention, and these weights are not: mask left out?"
    return None


def averaged(product: Product, worst: Sample, queries: torch.Tensor) -> str | None:
    """Every head has the same weights, which are not merely uniform."""
    leading = product.worst[:-2]
    head = len(leading) - product.head_dims
    places = [(*leading[:head], *inner) for inner in _indices(product.output.shape[head:-2])]
    if product.output.ndim < 4 or len(places) < 2:
        return None
    some = worst.weights[worst.weights != 0]
    uniform = not len(some) or float(some.max() - some.min()) <= product.slack * float(some.max())
    others = (product.take(place, queries).weights for place in places[:_MAPS])
    if uniform or not all(torch.equal(weights, worst.weights) for weights in others):
        return None
    return (
        "every head has the same weights: averaged over heads? nn.MultiheadAttention returns each "
        "head's own with average_attn_weights=False"
    )


def zero(product: Product, worst: Sample, _: torch.Tensor) -> str | None:
    """The output, or that of the worst map, is zero."""
    if bool((worst.output != 0).any()):
        return None
    shape = product.output.shape
    if all(not bool((product.output[index] != 0).any()) for index in pieces(shape, _SAMPLE)):
        return "the output is zero everywhere: never written, or all of it masked?"
    place = tuple(slice(i, i + 1) for i in product.worst[:-2])
    rest = tuple(slice(0, size) for size in shape[-2:])
    if not place or bool((product.output[place + rest] != 0).any()):
        return None
    return "the output of this map is zero throughout: a head or batch entry that was left out?"


def dropout(_: Product, worst: Sample, __: torch.Tensor) -> str | None:
    """The weights went through dropout."""
    if not bool(worst.weights.isfinite().all()):
        return None
    sentence = causes.dropout(worst.weights, None)
    return sentence and f"{sentence.rstrip('?')}, and the output was not?"


_CAUSES: tuple[Cause, ...] = (
    zero,
    constant_factor,
    made_by_another,
    rearranged,
    transposed,
    causal_elsewhere,
    averaged,
    dropout,
)


def _queries(product: Product, maps: int) -> torch.Tensor:
    query_len, key_len = product.weights.shape[-2:]
    most = min(_QUERIES, max(1, _SAMPLE // (key_len * maps)))
    return torch.tensor(evenly(query_len, most), device="cpu")


def _indices(sizes: torch.Size | tuple[int, ...]) -> list[Index]:
    return list(every_combination(*map(range, sizes)))
