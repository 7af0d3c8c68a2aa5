"""What is known of each attention of a model: a sketch of its weights, and a few statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch

from ..attention.chunks import CHUNK_BYTES
from ..attention.lazy import LazyWeights
from ..attention.placed import Placed, is_placed, with_whole_rows
from ..attention.sketch import Numbers, Sketch, Sketcher
from ..callables import apart
from ..capture.record import AttentionRecord, name_of, parts_of
from ..capture.trace import Trace
from ..inputs import dtype_name, misuse, wide_dtype

STATISTICS = ("entropy", "largest weight", "on the first key", "on the key before", "on itself")


@dataclass(frozen=True)
class Layer:
    """What is known of one attention of a model."""

    name: str  # The layer, and the number of its call after the first
    shape: tuple[int, int, int, int]  # (batch, heads, query_len, key_len)
    dtype: str  # What the model computed in, by name
    sketch: Sketch  # Of batch x heads maps
    statistics: Numbers  # (maps, 5), means over the queries of each map, as `STATISTICS` names them
    # (maps,), how far the logarithm of the largest weight is above their mean, over keys that have
    # any; a mean over queries
    spread: Numbers
    heads: tuple[int, ...] | None = None  # Numbers of its heads, where selected; so are queries
    queries: tuple[int, ...] | None = None  # Those of its queries


def layers_of(trace: object) -> list[Layer]:
    """Sketch what was captured; no map is held at once."""
    if isinstance(trace, AttentionRecord):
        return [_layer_of(trace)]
    if isinstance(trace, LazyWeights):
        return [_layer_of_lazy(trace)]
    if is_placed(trace):
        return [_layer_of_placed(Placed(with_whole_rows(trace), "trace"))]
    if not isinstance(trace, Trace):
        accepted = "what capture_attention returns, a record of it, LazyWeights or a DTensor"
        raise TypeError(misuse("trace", type(trace).__name__, accepted))
    if not len(trace):
        raise ValueError(misuse("trace", "no attention", "one or more records"))
    return [_layer_of(record) for record in trace]


def _layer_of(record: AttentionRecord) -> Layer:
    if record.kept_weights is None and record.query is None:
        got = f'a record of {name_of(record)} without weights (keep="statistics")'
        raise ValueError(misuse("trace", got, 'one with weights: keep="inputs" or "weights"'))
    queries = record.shape_here[2]
    if 0 in record.shape_here:
        raise ValueError(misuse("trace", f"a record of shape {record.shape_here}", "weights"))
    # Where lengths differ, the last query is at the last key.
    here = torch.arange(queries) if record.queries is None else record.queries
    found = _sketched(record.shape_here, _parts(record), here + record.shape[3] - record.shape[2])
    name = name_of(record) + (f", call {record.call}" if record.call else "")
    dtypes = [record.dtype, *([] if record.kept_weights is None else [record.kept_weights.dtype])]
    coarsest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    numbers = (
        None if numbers is None else tuple(numbers.tolist())
        for numbers in (record.heads, record.queries)
    )
    return Layer(name, record.shape_here, dtype_name(coarsest), *found, *numbers)


def _layer_of_lazy(weights: LazyWeights) -> Layer:
    """Sketch weights that are never held, in one pass; of rows that were drawn, these alone."""
    _, _, queries, keys = shape = _four(weights)
    here = torch.arange(queries) + keys - queries
    found = _sketched(shape, weights.with_zeros().parts(), here)
    runs = () if weights.sampled is None else weights.rows
    rows = tuple(n for run in runs for n in range(run.start, run.stop)) or None
    dtype = dtype_name(weights.blocks.call.query)
    return Layer("weights", shape, dtype, *found, None, rows)


def _parts(record: AttentionRecord) -> Iterator[tuple[slice, slice, torch.Tensor, int]]:
    empty = _empty_rows(record)
    for maps, rows, part in parts_of(record):
        if empty is not None:
            part = part.masked_fill(empty[maps, rows, None].to(part.device), 0.0)
        yield maps, rows, part, 0


def _sketched(
    shape: tuple[int, int, int, int],  # (batch, heads, query_len, key_len)
    parts: Iterator[tuple[slice, slice, torch.Tensor, int]],  # Maps, rows, weights, first key
    here: torch.Tensor,  # The key at each query
    summed: Callable[[Numbers], Numbers] | None = None,  # Sums what each rank has
) -> tuple[Sketch, Numbers, Numbers]:
    """Return the sketch, the statistics and the spread of maps."""
    batch, heads, queries, keys = shape
    sketcher, totals = Sketcher(batch * heads, queries, keys), np.zeros((batch * heads, 6))
    counts = np.zeros((batch * heads, 1))
    with apart():
        for maps, rows, part, first in parts:
            sketcher.add(maps, rows, part, key=first)
            found = _statistics(part, here[rows] - first, first).cpu().double()
            totals[maps] += found.sum(1).numpy()
            counts[maps] += found.shape[1]
    if summed is not None:
        sketcher.join(summed)
        totals, counts = summed(totals), summed(counts)
    means = totals / counts
    return sketcher.sketch(), means[:, :5], means[:, 5]


def _layer_of_placed(weights: Placed) -> Layer:
    """Sketch weights that lie on several ranks: each adds up its own, and all get the sum."""
    _, _, queries, keys = shape = _four(weights)
    here = torch.arange(queries) + keys - queries
    found = _sketched(shape, _own_parts(weights), here, weights.summed)
    return Layer("weights", shape, dtype_name(weights.dtype), *found)


def _own_parts(weights: Placed) -> Iterator[tuple[slice, slice, torch.Tensor, int]]:
    _, heads, queries, keys = weights.shape
    for index in weights.own.boxes(queries, CHUNK_BYTES // 8):
        for entry, head in product(*(range(one.start, one.stop) for one in index[:2])):
            at, rows = entry * heads + head, index[2]
            box = (slice(entry, entry + 1), slice(head, head + 1), rows, slice(0, keys))
            yield slice(at, at + 1), rows, weights.own[box].flatten(0, 1), 0


def _four(weights: LazyWeights | Placed) -> tuple[int, int, int, int]:
    if weights.ndim != 4:
        got = f"shape {tuple(weights.shape)}"
        raise ValueError(misuse("trace", got, "(batch, heads, query_len, key_len)"))
    batch, heads, queries, keys = weights.shape
    return batch, heads, queries, keys


def _empty_rows(record: AttentionRecord) -> torch.Tensor | None:
    """Queries that may attend to nothing, (maps, queries): what they show is left open."""
    mask = None if record.mask_lost else record.mask
    if mask is None:
        return None
    empty = ~mask.any(-1)
    return empty.expand(record.shape_here[:3]).flatten(0, 1) if bool(empty.any()) else None


def _statistics(part: torch.Tensor, itself: torch.Tensor, first: int = 0) -> torch.Tensor:
    """Return statistics and spread of each row, (maps, rows, 6); `itself` is the key at each."""
    # Keys are counted from `first`.
    wide = part.to(wide_dtype(part.dtype))
    logarithms = wide.clamp_min(torch.finfo(wide.dtype).tiny).log()
    found = [
        -(logarithms * wide).sum(-1),
        wide.amax(-1),
        wide[..., 0] if first == 0 else wide.new_zeros(wide.shape[:-1]),
    ]
    for key in (itself - 1, itself):
        key = key.to(wide.device)
        inside = (key >= 0) & (key < wide.shape[-1])
        at = key.clamp(0, wide.shape[-1] - 1).expand(wide.shape[:-1])[..., None]
        found.append(wide.gather(-1, at)[..., 0].where(inside, 0.0))
    seen = wide > 0
    mean = logarithms.where(seen, 0.0).sum(-1) / seen.sum(-1).clamp_min(1)
    found.append((logarithms.amax(-1) - mean).where(seen.any(-1), 0.0))
    return torch.stack(found, -1)
