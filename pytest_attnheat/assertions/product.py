"""Weights, a value and the output that they are said to make, and why they may not have made it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product as every_combination

import torch
from torch import Tensor

from ..attention.boxes import neighbours
from ..attention.chunks import pieces
from ..attention.placed import Placed, as_placed
from ..attention.reference import causal_mask
from ..attention.tolerance import row_rounding
from ..attention.vocabulary import Alignment
from ..inputs import as_weights, misuse
from . import causes
from .claims import Index
from .scan import evenly, mask_at

# What a cause may miss, in units of what rounding does to a row.
_SLACK = 4.0
# The channels that a sample holds.
CHANNELS = 32
# Fewer elements than this may agree by chance.
ENOUGH = 8
# The most numbers of one operand that a sample holds: 8 MB in float64.
_SAMPLE = 2**20
_MAPS = 32
_QUERIES = 32

_DIMENSIONS = {
    "weights": "(..., queries, keys)",
    "value": "(..., keys, value_dim)",
    "output": "(..., queries, value_dim)",
}
_ACCEPTED = """one of
  weights (..., queries, keys), value (..., keys, value_dim), output (..., queries, value_dim)
  value (..., value_heads, keys, value_dim), where value_heads divide the heads of the weights
  weights (batch, queries, keys) that all heads of value (batch, heads, keys, value_dim) share
  with value of four dimensions, output merged: (batch, queries, heads * value_dim)"""


@dataclass(frozen=True)
class Product:
    """Weights, value and output."""

    weights: Tensor  # Seen as ``(*leading, queries, keys)``, with size 1 where they are shared
    value: Tensor  # Seen as ``(*leading, keys, value_dim)``, with size 1 where heads are grouped
    output: Tensor  # Seen as ``(*leading, queries, value_dim)``
    given: Tensor  # The output as the caller passed it
    merged: bool  # Whether heads are merged in it
    grouped: bool  # Whether the last leading dimension of all three is that of a group
    worst: Index = ()  # The element of `output` that is farthest off, once it is known
    here: Here | None = None  # What of it lies on this rank, if the weights lie on several

    @classmethod
    def read(cls, weights: object, value: object, output: object) -> Product:
        """Read what the caller passed."""
        operands = {
            name: as_weights(given, name, _DIMENSIONS[name])
            for name, given in (("weights", weights), ("value", value), ("output", output))
        }
        devices = {name: operand.device for name, operand in operands.items()}
        names = ", ".join(operands)
        if len(set(devices.values())) > 1:
            on = ", ".join(f"{name} on {device}" for name, device in devices.items())
            raise TypeError(misuse(names, on, "three on one device"))
        try:
            seen = _see(*operands.values())
        except _MisfitError:
            shapes = ", ".join(str(tuple(operand.shape)) for operand in operands.values())
            raise ValueError(misuse(names, shapes, _ACCEPTED)) from None
        found = cls(*seen[:3], operands["output"], *seen[3:])
        placed = as_placed(operands["weights"])
        if placed is None:
            return found
        return replace(found, here=Here.of(found, placed, operands["value"], operands["output"]))

    @property
    def coarsest(self) -> torch.dtype:
        """The dtype with the largest steps."""
        dtypes = (self.weights.dtype, self.value.dtype, self.output.dtype)
        return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)

    @property
    def rounding(self) -> float:
        """What rounding does to the sum of a row, in the coarsest dtype."""
        return row_rounding(self.coarsest, self.weights.shape[-1])

    @property
    def slack(self) -> float:
        """What rounding may do where a cause is looked for, as a part of |weights| @ |value|."""
        return _SLACK * self.rounding

    @property
    def head_dims(self) -> int:
        """How many of the last leading dimensions count heads."""
        return 2 if self.grouped else 1

    def index_given(self, index: Index) -> Index:
        """Return an index into `output` as an index into the output that was given."""
        *leading, query, channel = index
        if self.grouped and len(index) == self.output.ndim:
            *leading, value_head, member = leading
            leading.append(value_head * self.output.shape[-3] + member)
        if self.merged:
            *batch, head = leading
            return (*batch, query, head * self.output.shape[-1] + channel)
        return (*leading, query, channel)

    def index_seen(self, index: Index) -> Index:
        """Return an index as `Here` has it, whose heads are not grouped, as one into `output`."""
        if not self.grouped or len(index) == self.output.ndim:
            return index
        *leading, head, query, channel = index
        return (*leading, *divmod(head, self.output.shape[-3]), query, channel)

    def take(self, leading: Index, queries: Tensor, channels: int = CHANNELS) -> Sample:
        """Return one map in float64: some queries, all keys, at most so many channels."""
        value_dim = self.output.shape[-1]
        some = torch.tensor(evenly(value_dim, channels), device="cpu")
        place = tuple(slice(i, i + 1) for i in leading)
        every_query, every_key = (slice(0, size) for size in self.weights.shape[-2:])
        every_channel = slice(0, value_dim)
        weights = gather(self.weights, (*place, every_query, every_key), queries, -2)
        value = gather(self.value, (*place, every_key, every_channel), some, -1)
        output = gather(self.output, (*place, every_query, every_channel), queries, -2)
        # A key without weight is not felt, whatever its value.
        value = value.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        return Sample(weights, value, output[:, some], self.slack)


@dataclass(frozen=True)
class Here:
    """What lies on this rank of a product whose weights lie on several."""

    placed: Placed  # Those weights
    # The shard of this rank, with what it needs of value and output; heads of the value are
    # repeated where they are grouped
    product: Product
    offset: Index  # Where the shard of the output begins

    @classmethod
    def of(cls, whole: Product, placed: Placed, value: Tensor, output: Tensor) -> Here:
        """Bring what the shard of this rank needs to it."""
        *lead, query, key = range(placed.ndim)
        along = {at: at for at in lead if value.shape[at] == placed.shape[at]}
        merged = {0: 0, query: 1} if whole.merged else {at: at for at in lead}
        own_value = placed.beside(value, {**along, key: value.ndim - 2})
        own = placed.beside(output, merged if whole.merged else {**merged, query: output.ndim - 2})
        weights, offset = placed.local, placed.offset[:-1]
        shared = placed.ndim == 3 and value.ndim == 4
        heads = slice(0, whole.output.shape[1])
        if (whole.merged or whole.grouped) and not shared:
            heads = slice(offset[-2], offset[-2] + weights.shape[-3])
        if whole.merged:
            own = _split(own, -1, value.shape[-1]).swapaxes(1, 2)[:, heads]
        if whole.grouped:
            used = torch.arange(heads.start, heads.stop, device=value.device)
            own_value = own_value.index_select(-3, used // whole.output.shape[-3])
        if shared:
            weights, offset = weights.unsqueeze(1), (offset[0], 0, offset[1])
        shard = replace(whole, weights=weights, value=own_value, output=own, grouped=False)
        return cls(placed, shard, (*offset, 0))


@dataclass(frozen=True)
class Sample:
    """Weights ``(n, keys)``, value ``(keys, c)`` and output ``(n, c)`` of one map."""

    weights: Tensor
    value: Tensor
    output: Tensor
    slack: float

    def made_by(self, weights: Tensor, value: Tensor, factor: float = 1.0) -> bool:
        """Tell whether the output is another product, within rounding."""
        expected = factor * (weights @ value)
        size = abs(factor) * (weights.abs() @ value.abs())
        enough = self.output.numel() >= ENOUGH and bool((expected != 0).any())
        return enough and bool(((self.output - expected).abs() <= self.slack * size).all())


class _MisfitError(Exception):
    """Shapes that do not fit together."""


def _see(
    weights: Tensor, value: Tensor, output: Tensor
) -> tuple[Tensor, Tensor, Tensor, bool, bool]:
    """Return views of shapes that broadcast, whether heads are merged and whether grouped."""
    shared = weights.ndim == 3 and value.ndim == 4
    if shared:
        weights = weights.unsqueeze(1)
    merged = weights.ndim == 4 and output.ndim == 3
    if merged:
        output = _split(output, -1, value.shape[-1]).swapaxes(1, 2)
    grouped = not shared and weights.ndim == value.ndim > 2
    grouped = grouped and value.shape[-3] < weights.shape[-3] == output.shape[-3]
    if grouped:
        members = weights.shape[-3] // value.shape[-3]
        weights, output = _split(weights, -3, members), _split(output, -3, members)
        value = value.unsqueeze(-3)
    leading = tuple(output.shape[:-2])
    (query_len, key_len), value_dim = weights.shape[-2:], value.shape[-1]
    wanted = (
        (*((leading[0], 1) if shared else leading), query_len, key_len),
        (*((*leading[:-1], 1) if grouped else leading), key_len, value_dim),
        (*leading, query_len, value_dim),
    )
    if wanted != tuple(tuple(x.shape) for x in (weights, value, output)):
        raise _MisfitError
    return weights, value, output, merged, grouped


def _split(tensor: Tensor, dim: int, inner: int) -> Tensor:
    """Return a view in which a dimension is two, the second of size `inner`."""
    if tensor.shape[dim] % inner:
        raise _MisfitError
    found: Tensor = tensor.unflatten(dim, (-1, inner))  # type: ignore[no-untyped-call]
    return found


def gather(operand: Tensor, index: tuple[slice, ...], numbers: Tensor, dim: int) -> Tensor:
    """Return a map with only some numbers of a dimension, read apart: the map may be large."""
    parts = []
    for some in neighbours(numbers.tolist()):
        spans = list(index)
        spans[dim] = some
        part = mask_at(operand, tuple(spans)).double().cpu()
        parts.append(part.reshape(part.shape[-2:]))
    return torch.cat(parts, dim)


# --- likely causes: another product is named only where it gives every sampled element

# Of the product, the map with the worst element, and the queries that it was sampled at.
Cause = Callable[[Product, Sample, Tensor], "str | None"]


def likely_cause(product: Product) -> str | None:
    """Return the first cause that the numbers show, or None."""
    key_len, value_dim = product.value.shape[-2:]
    if key_len * min(value_dim, CHANNELS) > _SAMPLE:
        return None
    queries = _queries(product, 1)
    worst = product.take(product.worst[:-2], queries)
    found = (cause(product, worst, queries) for cause in _CAUSES)
    return next((sentence for sentence in found if sentence is not None), None)


def constant_factor(product: Product, worst: Sample, queries: Tensor) -> str | None:
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


def made_by_another(product: Product, _: Sample, __: Tensor) -> str | None:
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


def rearranged(product: Product, _: Sample, __: Tensor) -> str | None:
    """Heads of the value were repeated as a whole, or heads merged without a transpose."""
    operands = product.weights, product.value, product.output, product.given
    if (
        not (product.grouped or product.merged)
        or sum(math.prod(x.shape) for x in operands) > _SAMPLE
    ):
        return None
    weights, value, output, given = (operand.double().cpu() for operand in operands)
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


def transposed(product: Product, worst: Sample, queries: Tensor) -> str | None:
    """The queries and keys of the weights have changed places."""
    query_len, key_len = product.weights.shape[-2:]
    if query_len != key_len or worst.made_by(worst.weights, worst.value):
        return None
    place = tuple(slice(i, i + 1) for i in product.worst[:-2])
    index = (*place, slice(0, query_len), slice(0, key_len))
    if worst.made_by(gather(product.weights, index, queries, -1).mT, worst.value):
        return "output is weights.mT @ value: queries and keys of the weights have changed places?"
    return None


def causal_elsewhere(product: Product, worst: Sample, queries: Tensor) -> str | None:
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


def averaged(product: Product, worst: Sample, queries: Tensor) -> str | None:
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


def zero(product: Product, worst: Sample, _: Tensor) -> str | None:
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


def dropout(_: Product, worst: Sample, __: Tensor) -> str | None:
    """The weights went through dropout."""
    if not bool(worst.weights.isfinite().all()):
        return None
    sentence = causes.dropout(worst.weights, None)
    return sentence and f"{sentence.rstrip('?')}, and the output was not?"


_CAUSES: tuple[Cause, ...] = (
    zero, constant_factor, made_by_another, rearranged, transposed, causal_elsewhere, averaged,
    dropout,
)  # fmt: skip


def _queries(product: Product, maps: int) -> Tensor:
    query_len, key_len = product.weights.shape[-2:]
    most = min(_QUERIES, max(1, _SAMPLE // (key_len * maps)))
    return torch.tensor(evenly(query_len, most), device="cpu")


def _indices(sizes: torch.Size | tuple[int, ...]) -> list[Index]:
    return list(every_combination(*map(range, sizes)))
