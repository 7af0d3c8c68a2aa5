"""Likely causes of an output that its weights did not make, read from a bounded sample.

Most causes are another product than ``weights @ value``. One is named only
where it gives every sampled element of the output, within rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import TypeAlias

import torch

from pytest_attnheat.assertions import causes
from pytest_attnheat.assertions.claims import sum_to_one
from pytest_attnheat.assertions.findings import Finding
from pytest_attnheat.assertions.scan import mask_at
from pytest_attnheat.inputs import Operand
from pytest_attnheat.reference import Alignment, causal_mask

# The most numbers of one operand that a sample holds: 8 MB in float64.
_SAMPLE = 2**20
_MAPS = 32
_QUERIES = 32
_CHANNELS = 32
# Fewer elements than this may agree by chance.
_ENOUGH = 8
# The heads that a sentence names.
_NAMED = 3

Place: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Subject:
    """The operands in shapes that broadcast, and what else a cause needs to know.

    Attributes:
        weights: ``(*leading, queries, keys)``.
        value: ``(*leading, keys, value_dim)``.
        output: ``(*leading, queries, value_dim)``.
        worst: The element of the output that is farthest off.
        merged: Whether the output was given with its heads merged.
        grouped: Whether the last leading dimension is that of a group.
        slack: What rounding may do, as a part of ``|weights| @ |value|``.
    """

    weights: Operand
    value: Operand
    output: Operand
    worst: Place
    merged: bool
    grouped: bool
    slack: float

    @property
    def head_dims(self) -> int:
        """How many of the last leading dimensions count heads."""
        return 2 if self.grouped else 1

    def take(self, leading: Place, queries: torch.Tensor) -> Sample:
        """Return one map in float64: some queries, all keys, some channels."""
        channels = _spread(self.output.shape[-1], _CHANNELS)
        place = tuple(slice(i, i + 1) for i in leading)
        every_query, every_key = (slice(0, size) for size in self.weights.shape[-2:])
        every_channel = slice(0, self.output.shape[-1])
        weights = _gather(self.weights, (*place, every_query, every_key), queries, -2)
        value = _gather(self.value, (*place, every_key, every_channel), channels, -1)
        output = _gather(self.output, (*place, every_query, every_channel), queries, -2)
        # A key without weight is not felt, whatever its value.
        value = value.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        return Sample(weights, value, output[:, channels], self.slack)


@dataclass(frozen=True)
class Sample:
    """Weights ``(n, keys)``, value ``(keys, c)`` and output ``(n, c)`` of one map."""

    weights: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor
    slack: float

    def made_by(self, weights: torch.Tensor, value: torch.Tensor, factor: float = 1.0) -> bool:
        """Tell whether the output is another product, within rounding."""
        expected = factor * (weights @ value)
        size = abs(factor) * (weights.abs() @ value.abs())
        enough = self.output.numel() >= _ENOUGH and bool((expected != 0).any())
        return enough and bool(((self.output - expected).abs() <= self.slack * size).all())


Cause = Callable[[Subject], "str | None"]


def likely_cause(subject: Subject) -> str | None:
    """Return the first cause that the numbers show, or None."""
    key_len, value_dim = subject.value.shape[-2:]
    if key_len * min(value_dim, _CHANNELS) > _SAMPLE:
        return None
    return next((text for cause in _CAUSES if (text := cause(subject)) is not None), None)


def constant_factor(subject: Subject) -> str | None:
    """The output is a multiple of the product."""
    sample = _worst_map(subject)
    product = sample.weights @ sample.value
    length = float(product.square().sum())
    if not (math.isfinite(length) and length > 0):
        return None
    factor = float((product * sample.output).sum()) / length
    if abs(factor) < 1e-6 or abs(factor - 1) <= subject.slack:
        return None
    if not sample.made_by(sample.weights, sample.value, factor):
        return None
    return (
        f"output is {factor:.3g} times weights @ value: a scale after the softmax, or dropout "
        "that rescaled only one of them?"
    )


def heads_permuted(subject: Subject) -> str | None:
    """The output of each head is made by another one."""
    head = len(subject.worst) - 2 - subject.head_dims
    if head < 0 or (head == 0 and subject.output.ndim < 4):
        return None  # the leading dimension of three is called a batch below
    leading = subject.worst[:-2]
    sizes = subject.output.shape[head:-2]
    places = [(*leading[:head], *inner) for inner in _indices(sizes)]
    return _permuted(subject, places, "head")


def batch_permuted(subject: Subject) -> str | None:
    """The output of each batch entry is made by another one."""
    leading = subject.worst[:-2]
    if not leading:
        return None
    places = [(entry, *leading[1:]) for entry in range(subject.output.shape[0])]
    return _permuted(subject, places, "batch entry")


def _permuted(subject: Subject, places: list[Place], noun: str) -> str | None:
    """Look for the weights, with their own value or with that of the place, that made each one."""
    key_len, value_dim = subject.value.shape[-2:]
    most = min(_MAPS, _SAMPLE // (key_len * min(value_dim, _CHANNELS)))
    if not 2 <= len(places) <= most:
        return None
    queries = _queries(subject, len(places))
    samples = [subject.take(place, queries) for place in places]
    for own_value, verb in ((True, "is that of"), (False, "is made by")):
        makers = [
            [
                i
                for i, other in enumerate(samples)
                if sample.made_by(other.weights, other.value if own_value else sample.value)
            ]
            for sample in samples
        ]
        # One maker each: where several heads are alike, nothing can be told.
        if any(len(found) != 1 for found in makers):
            continue
        moved = [(at, found[0]) for at, found in enumerate(makers) if found[0] != at]
        if moved:
            return _moved(moved, noun, verb)
    return None


def _moved(moved: list[tuple[int, int]], noun: str, verb: str) -> str:
    first, *others = moved[:_NAMED]
    named = [f"output of {noun} {first[0]} {verb} weights {noun} {first[1]}"]
    named += [f"{at} {verb} {maker}" for at, maker in others]
    more = ", ..." if len(moved) > _NAMED else ""
    return f"{', '.join(named)}{more}: in another order?"


def tiled_groups(subject: Subject) -> str | None:
    """Grouped heads of the value are laid out one after the other, not each repeated."""
    if not subject.grouped:
        return None
    batch = subject.worst[:-4]
    value_heads, members = subject.output.shape[-4], subject.output.shape[-3]
    queries = _queries(subject, 1)
    for value_head, member in _indices((value_heads, members)):
        head = value_head * members + member
        sample = subject.take((*batch, value_head, member), queries)
        used = subject.take((*batch, head % value_heads, 0), queries).value
        if not sample.made_by(sample.weights, used):
            return None
    return (
        f"head h uses head h % {value_heads} of value, not h // {members}: repeat (tile) in place "
        "of repeat_interleave?"
    )


def transposed(subject: Subject) -> str | None:
    """The queries and keys of the weights have changed places."""
    query_len, key_len = subject.weights.shape[-2:]
    if query_len != key_len:
        return None
    queries = _queries(subject, 1)
    leading = subject.worst[:-2]
    sample = subject.take(leading, queries)
    place = tuple(slice(i, i + 1) for i in leading)
    index = (*place, slice(0, query_len), slice(0, key_len))
    columns = _gather(subject.weights, index, queries, -1).mT
    if sample.made_by(sample.weights, sample.value):
        return None
    return (
        "output is weights.mT @ value: queries and keys of the weights have changed places?"
        if sample.made_by(columns, sample.value)
        else None
    )


def merged_without_transpose(subject: Subject) -> str | None:
    """Heads were merged by a reshape alone: (batch, heads, queries, dim) read as it lies."""
    if not subject.merged:
        return None
    *_, query_len, value_dim = subject.output.shape
    entry = subject.worst[0]
    heads = _indices(subject.output.shape[1:-2])
    key_len = subject.weights.shape[-1]
    if len(heads) < 2 or key_len * value_dim > _SAMPLE or len(heads) > _MAPS:
        return None
    # One row of the merged output holds these rows of all heads' outputs, one after another.
    query = query_len // 2
    rows = [divmod(query * len(heads) + number, query_len) for number in range(len(heads))]
    batch, every_channel = slice(entry, entry + 1), slice(0, value_dim)
    off, size = [], []
    for own, (head, row) in zip(heads, rows, strict=True):
        place, maker = ((batch, *(slice(i, i + 1) for i in h)) for h in (own, heads[head]))
        given = mask_at(subject.output, (*place, slice(query, query + 1), every_channel))
        weights = mask_at(subject.weights, (*maker, slice(row, row + 1), slice(0, key_len)))
        value = mask_at(subject.value, (*maker, slice(0, key_len), every_channel)).double()
        off.append((given.double() - weights.double() @ value).abs().flatten())
        size.append((weights.double().abs() @ value.abs()).flatten())
    wrong = torch.cat(off) > subject.slack * torch.cat(size)
    if wrong.numel() < _ENOUGH or bool(wrong.any()):
        return None
    return "heads were merged without a transpose: output.transpose(1, 2).flatten(2)?"


def causal_elsewhere(subject: Subject) -> str | None:
    """The output is that of causal attention, and the weights are not causal."""
    query_len, key_len = subject.weights.shape[-2:]
    queries = _queries(subject, 1)
    sample = subject.take(subject.worst[:-2], queries)
    alignments: tuple[Alignment, ...] = ("top_left", "bottom_right")
    for alignment in alignments[: 1 if query_len == key_len else 2]:
        mask = causal_mask(query_len, key_len, alignment=alignment, device="cpu")[queries]
        kept = sample.weights * mask
        total = kept.sum(-1, keepdim=True)
        if torch.equal(kept, sample.weights) or bool((total <= 0).any()):
            continue
        if sample.made_by(kept / total, sample.value):
            return "output is that of causal attention, and these weights are not: mask left out?"
    return None


def averaged(subject: Subject) -> str | None:
    """Every head has the same weights."""
    if subject.output.ndim < 4:
        return None
    leading = subject.worst[:-2]
    head = len(leading) - subject.head_dims
    places = [(*leading[:head], *inner) for inner in _indices(subject.output.shape[head:-2])]
    if len(places) < 2:
        return None
    queries = _queries(subject, 1)
    first, *others = (subject.take(place, queries) for place in places[:_MAPS])
    if not all(torch.equal(other.weights, first.weights) for other in others):
        return None
    return (
        "every head has the same weights: averaged over heads? nn.MultiheadAttention returns each "
        "head's own with average_attn_weights=False"
    )


def dropout(subject: Subject) -> str | None:
    """The weights went through dropout."""
    rows = _worst_map(subject).weights
    if not bool(rows.isfinite().all()):
        return None
    finding = Finding(sum_to_one(0.0))
    sentence = causes.dropout(causes.Evidence(subject.weights, None, finding, rows, None))
    return sentence and f"{sentence.rstrip('?')}, and the output was not?"


_CAUSES: tuple[Cause, ...] = (
    constant_factor,
    heads_permuted,
    batch_permuted,
    tiled_groups,
    transposed,
    merged_without_transpose,
    causal_elsewhere,
    averaged,
    dropout,
)


def _worst_map(subject: Subject) -> Sample:
    return subject.take(subject.worst[:-2], _queries(subject, 1))


def _queries(subject: Subject, maps: int) -> torch.Tensor:
    query_len, key_len = subject.weights.shape[-2:]
    return _spread(query_len, min(_QUERIES, max(1, _SAMPLE // (key_len * maps))))


def _spread(size: int, most: int) -> torch.Tensor:
    count = min(size, most)
    return torch.tensor([i * size // count for i in range(count)])


def _gather(
    operand: Operand, index: tuple[slice, ...], numbers: torch.Tensor, dim: int
) -> torch.Tensor:
    """Return a map with only some numbers of a dimension, one at a time: the map may be large."""
    parts = []
    for number in numbers.tolist():
        spans = list(index)
        spans[dim] = slice(number, number + 1)
        part = mask_at(operand, tuple(spans)).double().cpu()
        parts.append(part.reshape(part.shape[-2:]))
    return torch.cat(parts, dim)


def _indices(sizes: torch.Size | tuple[int, ...]) -> list[Place]:
    return list(product(*map(range, sizes)))
