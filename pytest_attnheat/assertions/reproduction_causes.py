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
from pytest_attnheat.attention.chunks import pieces
from pytest_attnheat.attention.reference import causal_mask
from pytest_attnheat.attention.vocabulary import Alignment
from pytest_attnheat.inputs import Operand

# The most numbers of one operand that a sample holds: 8 MB in float64.
_SAMPLE = 2**20
_MAPS = 32
_QUERIES = 32
_CHANNELS = 32
# The most channels of a value that is inverted.
_SOLVED = 256
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

    def take(self, leading: Place, queries: torch.Tensor, channels: int = _CHANNELS) -> Sample:
        """Return one map in float64: some queries, all keys, at most so many channels."""
        some = _spread(self.output.shape[-1], channels)
        place = tuple(slice(i, i + 1) for i in leading)
        every_query, every_key = (slice(0, size) for size in self.weights.shape[-2:])
        every_channel = slice(0, self.output.shape[-1])
        weights = _gather(self.weights, (*place, every_query, every_key), queries, -2)
        value = _gather(self.value, (*place, every_key, every_channel), some, -1)
        output = _gather(self.output, (*place, every_query, every_channel), queries, -2)
        # A key without weight is not felt, whatever its value.
        value = value.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        return Sample(weights, value, output[:, some], self.slack)


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
    for makes, verb, what in _PERMUTATIONS:
        makers = [
            [i for i, other in enumerate(samples) if sample.made_by(*makes(sample, other))]
            for sample in samples
        ]
        # One maker each: where several heads are alike, nothing can be told.
        if any(len(found) != 1 for found in makers):
            continue
        moved = [(at, found[0]) for at, found in enumerate(makers) if found[0] != at]
        if moved:
            return _moved(moved, noun, verb, what)
    return None


# What may have made a map's output, of this map and another: weights and value, and the words.
_PERMUTATIONS: tuple[
    tuple[Callable[[Sample, Sample], tuple[torch.Tensor, torch.Tensor]], str, str], ...
] = (
    (lambda _, other: (other.weights, other.value), "is that of", "weights"),
    (lambda own, other: (other.weights, own.value), "is made by", "weights"),
    (lambda own, other: (own.weights, other.value), "is made of", "value"),
)


def _moved(moved: list[tuple[int, int]], noun: str, verb: str, what: str) -> str:
    first, *others = moved[:_NAMED]
    named = [f"output of {noun} {first[0]} {verb} {what} {noun} {first[1]}"]
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


def merged_otherwise(subject: Subject) -> str | None:
    """Heads were merged by a reshape alone, or with the channels before the heads."""
    if not subject.merged:
        return None
    *_, query_len, value_dim = subject.output.shape
    heads = _indices(subject.output.shape[1:-2])
    query = query_len // 2
    numbers = range(len(heads) * value_dim)
    # Which head, query and channel each number of one row of the merged output would be.
    as_it_lies = [divmod(query * len(numbers) + n, query_len * value_dim) for n in numbers]
    laid = [(head, *divmod(rest, value_dim)) for head, rest in as_it_lies]
    if _lies(subject, query, laid):
        return "heads were merged without a transpose: output.transpose(1, 2).flatten(2)?"
    if _lies(subject, query, [(n % len(heads), query, n // len(heads)) for n in numbers]):
        return (
            "heads were merged with the channels first, (dim, heads) in place of (heads, dim): "
            "output.transpose(1, 2).flatten(2)?"
        )
    return None


def _lies(subject: Subject, query: int, laid: list[tuple[int, int, int]]) -> bool:
    """Tell whether one row of the merged output holds these heads, queries and channels."""
    entry, (key_len, value_dim) = subject.worst[0], subject.value.shape[-2:]
    heads = _indices(subject.output.shape[1:-2])
    if len(heads) < 2 or key_len * value_dim > _SAMPLE or len(heads) > _MAPS:
        return False
    batch, every_channel = slice(entry, entry + 1), slice(0, value_dim)
    places = [(batch, *(slice(i, i + 1) for i in head)) for head in heads]
    given = [
        mask_at(subject.output, (*place, slice(query, query + 1), every_channel)).double().flatten()
        for place in places
    ]
    made: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
    for head, row in {(head, row) for head, row, _ in laid}:
        place = places[head]
        weights = mask_at(subject.weights, (*place, slice(row, row + 1), slice(0, key_len)))
        value = mask_at(subject.value, (*place, slice(0, key_len), every_channel)).double()
        made[head, row] = (
            (weights.double() @ value).cpu().flatten(),
            (weights.double().abs() @ value.abs()).cpu().flatten(),
        )
    expected, size = (
        torch.stack([made[head, row][i][channel] for head, row, channel in laid]) for i in (0, 1)
    )
    close = (torch.cat(given).cpu() - expected).abs() <= subject.slack * size
    return close.numel() >= _ENOUGH and bool(close.all())


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


def zero(subject: Subject) -> str | None:
    """The output, or that of the worst map, is zero."""
    if bool((_worst_map(subject).output != 0).any()):
        return None
    shape = subject.output.shape
    if all(not bool((subject.output[index] != 0).any()) for index in pieces(shape, _SAMPLE)):
        return "the output is zero everywhere: never written, or all of it masked?"
    place = tuple(slice(i, i + 1) for i in subject.worst[:-2])
    rest = tuple(slice(0, size) for size in shape[-2:])
    if not place or bool((subject.output[place + rest] != 0).any()):
        return None
    return "the output of this map is zero throughout: a head or batch entry that was left out?"


def dropout_solved(subject: Subject) -> str | None:
    """One of weights and output went through dropout; the weights that made the output tell.

    They follow from the output where there are as many channels as keys.
    """
    key_len, value_dim = subject.value.shape[-2:]
    if not key_len <= value_dim <= _SOLVED:
        return None
    sample = subject.take(subject.worst[:-2], _queries(subject, 1), channels=value_dim)
    weights, value, output = sample.weights, sample.value, sample.output
    if not all(bool(x.isfinite().all()) for x in (weights, value, output)):
        return None
    # The error of the output is that of its dtype; a value that is nearly singular amplifies it.
    singular = torch.linalg.svdvals(value)
    error = subject.slack * float(output.abs().max()) * key_len**0.5 / float(singular[-1])
    if not error < 0.05 * float(weights.abs().amax(-1).min()):
        return None
    used = output @ torch.linalg.pinv(value)
    for kept, whole, sentence in (
        (weights, used, "weights after dropout (p about {:.2g}), and the output was not?"),
        (used, weights, "output after dropout of its weights (p about {:.2g}), these are without?"),
    ):
        p = _dropped(kept, whole, 4 * error)
        if p is not None:
            return sentence.format(p)
    return None


def _dropped(kept: torch.Tensor, whole: torch.Tensor, error: float) -> float | None:
    """Return the p of the dropout that makes of some weights others, or None."""
    tells = whole.abs() > 4 * error
    ratio = (kept / whole)[tells]
    gone = ratio.abs() < 0.5
    if int(gone.sum()) < 2 or int((~gone).sum()) < 4:
        return None
    factor = float(ratio[~gone].median())
    left = torch.where(kept.abs() < 0.5 * whole.abs(), 0, factor * whole)
    close = (kept - left).abs() <= (1 + factor) * error
    return 1 - 1 / factor if factor > 1.01 and bool(close[tells].all()) else None


def dropout(subject: Subject) -> str | None:
    """The weights went through dropout."""
    rows = _worst_map(subject).weights
    if not bool(rows.isfinite().all()):
        return None
    finding = Finding(sum_to_one(0.0))
    sentence = causes.dropout(causes.Evidence(subject.weights, None, finding, rows, None))
    return sentence and f"{sentence.rstrip('?')}, and the output was not?"


_CAUSES: tuple[Cause, ...] = (
    zero,
    constant_factor,
    heads_permuted,
    batch_permuted,
    tiled_groups,
    transposed,
    merged_otherwise,
    causal_elsewhere,
    averaged,
    dropout_solved,
    dropout,
)


def _worst_map(subject: Subject) -> Sample:
    return subject.take(subject.worst[:-2], _queries(subject, 1))


def _queries(subject: Subject, maps: int) -> torch.Tensor:
    query_len, key_len = subject.weights.shape[-2:]
    return _spread(query_len, min(_QUERIES, max(1, _SAMPLE // (key_len * maps))))


def _spread(size: int, most: int) -> torch.Tensor:
    count = min(size, most)
    return torch.tensor([i * size // count for i in range(count)], device="cpu")


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
