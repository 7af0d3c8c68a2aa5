"""The weights of a record, computed from its queries and keys, in parts that fit a cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pytest_attnheat.attention.chunks import pieces
from pytest_attnheat.attention.reference import causal_mask

if TYPE_CHECKING:
    from pytest_attnheat.capture.record import AttentionRecord, Statistics

# Scores are computed for so many bytes at a time: a few batch entries, or heads of one.
_PART_BYTES = 16 * 2**20


@contextmanager
def apart(device: torch.device) -> Iterator[None]:
    """Compute without gradients, autocast, and the functions of modes: it is not the model's."""
    with (
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        torch._C.DisableTorchFunction(),
    ):
        yield


def weights_of(record: AttentionRecord, dtype: torch.dtype, entry: int | None = None) -> Tensor:
    """Return the weights (batch, heads, query_len, key_len) of a record with query and key.

    Args:
        record: Of which weights are computed.
        dtype: Theirs.
        entry: The only batch entry that is wanted; None for all.
    """
    assert record.query is not None
    entries, first = (record.shape_here[0], 0) if entry is None else (1, entry)
    with apart(record.query.device):
        shape = (entries, *record.shape_here[1:])
        weights = torch.empty(shape, dtype=dtype, device=record.query.device)
        for batch, heads in parts_of(record, entry):
            here = slice(batch.start - first, batch.stop - first)
            weights[here, heads] = part_of(record, batch, heads)
        return weights


def statistics_of(record: AttentionRecord) -> Statistics:
    """Return what the rows of a record are like; its weights are never held at once."""
    from pytest_attnheat.capture.record import Statistics

    source = record.kept_weights if record.query is None else record.query
    assert source is not None
    shape = record.shape_here[:3]
    row_sum, entropy, maximum = (
        torch.empty(shape, dtype=torch.float32, device="cpu") for _ in range(3)
    )
    places = torch.empty(shape, dtype=torch.int64, device="cpu")
    found = Statistics(row_sum, entropy, maximum, places)
    with apart(source.device):
        for batch, heads in parts_of(record):
            given = record.kept_weights
            weights = (
                part_of(record, batch, heads) if given is None else given[batch, heads].float()
            )
            if weights.shape[-1] == 0:
                for part, nothing in zip(vars(found).values(), (0.0, 0.0, 0.0, -1), strict=True):
                    part.fill_(nothing)
                break
            maximum, place = weights.max(-1)
            found.row_sum[batch, heads] = weights.sum(-1).float().cpu()
            found.entropy[batch, heads] = (
                -torch.special.xlogy(weights, weights).sum(-1).float().cpu()
            )
            found.maximum[batch, heads] = maximum.float().cpu()
            found.most_attended[batch, heads] = place.cpu()
    return found


def parts_of(record: AttentionRecord, entry: int | None = None) -> Iterator[tuple[slice, slice]]:
    """Whole batch entries as long as they are small, else groups of heads that share keys."""
    batch, heads, query_len, key_len = record.shape_here
    first, entries = (0, batch) if entry is None else (entry, 1)
    group_bytes = max(query_len * key_len * 4 * record.group, 1)
    for some, groups in pieces(
        (entries, heads // record.group), max(_PART_BYTES // group_bytes, 1)
    ):
        yield (
            slice(first + some.start, first + some.stop),
            slice(groups.start * record.group, groups.stop * record.group),
        )


def part_of(record: AttentionRecord, batch: slice, heads: slice) -> Tensor:
    """Weights of some batch entries and heads, in float32 or, where the model was, float64."""
    query, key, group = record.query, record.key, record.group
    assert query is not None
    assert key is not None
    assert record.scale is not None
    precise = torch.float64 if query.dtype == torch.float64 else torch.float32
    part = query[batch, heads].to(precise)
    keys = key[batch, heads.start // group : -(-heads.stop // group)].to(precise)
    entries, count, query_len, head_dim = part.shape
    # Heads that share keys are one taller matrix: no key is repeated.
    rows = (part * record.scale).reshape(entries, count // group, group * query_len, head_dim)
    scores = (rows @ keys.mT).reshape(entries, count, query_len, keys.shape[2])
    if record.score_change is not None:
        scores = record.score_change(scores, *_numbers(record, batch, heads))
    if record.bias is not None:
        scores += _share(record.bias, batch, heads).to(precise)
    hidden = _hidden(record, batch, heads)
    if hidden is not None:
        scores.masked_fill_(hidden, -torch.inf)
    weights = scores.softmax(-1)
    # A row without keys is NaN after the softmax; fused attention makes it zero.
    lost = _lost(record, hidden, scores)
    return weights if lost is None else weights.masked_fill_(lost, 0.0)


def _hidden(record: AttentionRecord, batch: slice, heads: slice) -> Tensor | None:
    hidden = None
    if record.given_mask is not None:
        hidden = ~_share(record.given_mask, batch, heads)
    if record.causal is not None:
        assert record.query is not None
        query_len, key_len = record.shape[2:]
        seen = causal_mask(query_len, key_len, alignment=record.causal, device=record.query.device)
        if record.queries is not None:
            seen = seen[record.queries.to(seen.device)]
        hidden = ~seen if hidden is None else hidden | ~seen
    return hidden


def _lost(record: AttentionRecord, hidden: Tensor | None, scores: Tensor) -> Tensor | None:
    if record.bias is None and record.score_change is None:
        return None if hidden is None else hidden.all(-1, keepdim=True)
    return scores.isneginf().all(-1, keepdim=True)


def _numbers(record: AttentionRecord, batch: slice, heads: slice) -> tuple[Tensor, ...]:
    """The numbers that batch entries, heads and queries have in the whole attention."""
    entries = torch.arange(batch.start, batch.stop)
    of_heads = torch.arange(record.shape[1]) if record.heads is None else record.heads
    queries = torch.arange(record.shape[2]) if record.queries is None else record.queries
    return entries, of_heads[heads], queries


def _share(tensor: Tensor, batch: slice, heads: slice) -> Tensor:
    if tensor.shape[0] > 1:
        tensor = tensor[batch]
    return tensor[:, heads] if tensor.shape[1] > 1 else tensor
