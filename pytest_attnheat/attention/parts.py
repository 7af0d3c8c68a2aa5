"""A call of attention, some of its queries at a time, in bounded memory; put together again."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from . import chunks
from .call import Call, Positions

# How many float64 matrices (queries x keys) one chunk may make.
_MATRICES = 16


@dataclass(frozen=True)
class Part:
    """Some queries of some maps. Tensors are (maps, length, width); `own` tells which maps."""

    own: dict[str, Tensor]
    maps: slice
    rows: slice
    at: Positions
    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    distant: Tensor | None
    sinks: Tensor | None
    permitted: Tensor
    upstream: Tensor | None


def parts_of(call: Call, dtype: torch.dtype) -> Iterator[Part]:
    """Yield all queries of all maps, in parts whose matrices fit into the budget."""
    row_bytes = _MATRICES * 8 * call.key_len
    rows = max(1, min(call.query_len, chunks.CHUNK_BYTES // row_bytes))
    together = max(1, chunks.CHUNK_BYTES // (row_bytes * rows))
    flat, own = flattened(call)
    numbers = torch.arange(call.maps, device=call.query.device)
    for some, span in product(
        chunks.spans(call.maps, together), chunks.spans(call.query_len, rows)
    ):
        mine = {name: index[some] for name, index in own.items()}
        maps = numbers[some]
        mine["sinks"] = maps % call.heads
        part = {
            name: tensor[mine[name]][:, own_rows(tensor, span)]
            for name, tensor in flat.items()
            if name not in ("key", "value")
        }
        bias = part.get("bias")
        shape = (len(maps), span.stop - span.start, call.key_len)
        hidden = None if bias is None else bias != -math.inf
        permitted = torch.ones((), dtype=torch.bool, device=maps.device)
        for rule in (call.permitted(maps, span), part.get("mask"), hidden):
            permitted = permitted if rule is None else permitted & rule
        if bias is not None:
            # Their weight is 0 by the mask; a -inf left in the scores would make NaN.
            bias = bias.masked_fill(bias == -math.inf, 0.0).to(dtype)
        at = call.positions(maps, span)
        yield Part(
            own=mine, maps=some, rows=span, at=at,
            query=rounded(call, "query", part["query"]).to(dtype),
            key=rounded(call, "key", flat["key"][mine["key"]]).to(dtype),
            value=rounded(call, "value", flat["value"][mine["value"]]).to(dtype), bias=bias,
            distant=call.distant(at, dtype),
            sinks=None if call.sinks is None else call.sinks.detach().to(dtype)[at.head],
            permitted=permitted.expand(shape),
            upstream=part["upstream"].to(dtype) if "upstream" in part else None,
        )  # fmt: skip


def flattened(call: Call) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All inputs as (maps, length, width), and for each which of its maps each query map uses."""
    given = {
        name: tensor
        for name in ("query", "key", "value", "mask", "bias", "upstream")
        if (tensor := getattr(call, name)) is not None
    }
    flat = {name: _flat(tensor.detach()) for name, tensor in given.items()}
    own = {
        name: _own_maps(tensor, call.query, grouped=name in ("key", "value"))
        for name, tensor in given.items()
    }
    return flat, own


def _own_maps(tensor: Tensor, query: Tensor, *, grouped: bool) -> Tensor:
    lead = tensor.shape[:-2]
    index = torch.arange(lead.numel(), device=query.device).view(lead)
    if grouped and lead != query.shape[:-2]:
        index = index.repeat_interleave(query.shape[-3] // tensor.shape[-3], -1)
    return index.expand(query.shape[:-2]).reshape(-1)


def own_maps(tensor: Tensor, own: Tensor, some: slice) -> Tensor:
    """Return what some maps use of a tensor: a view where each has its own, or all of them one."""
    if len(tensor) == 1:
        return tensor
    return tensor[some] if len(tensor) == len(own) else tensor[own[some]]


def own_rows(tensor: Tensor, rows: slice) -> slice:
    """Rows of a tensor that has them all, or one for all."""
    return rows if tensor.shape[-2] > 1 else slice(0, 1)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, *(1, 1, *tensor.shape)[-2:])


def rounded(call: Call, step: str, numbers: Tensor) -> Tensor:
    """Numbers as a step that is rounded on purpose leaves them."""
    dtype = (call.rounded or {}).get(step)
    return numbers if dtype is None else numbers.to(dtype).to(numbers.dtype)


def add(total: Tensor, name: str, part: Part, found: Tensor) -> None:
    """Add what a part found where it belongs: keys that several parts share sum up."""
    if name == "sinks":
        total.index_add_(0, part.own["sinks"], found.sum((-2, -1)))
        return
    flat = _flat(total)
    if name in ("key", "value"):
        flat.index_add_(0, part.own[name], found)
    elif name == "attn_mask":
        found = found.sum(-1, keepdim=True) if flat.shape[-1] == 1 else found
        found = found.sum(-2, keepdim=True) if flat.shape[-2] == 1 else found
        rows = own_rows(flat, part.rows)
        flat[:, rows].index_add_(0, part.own["bias"], found)
    else:
        flat[part.own["query"], part.rows] = found
