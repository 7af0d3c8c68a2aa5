"""The weights of a call, a block of rows at a time, and of these only the keys that they may see.

A block is computed on a fixed grid of maps and rows: whoever reads a weight, alone or among
others, reads the same bits. Keys that no row of a block may see are not read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from .call import Call
from .chunks import spans
from .parts import flattened, own_maps, own_rows

# So many scores at a time stay near the processor while weights are made of them; on a GPU, to
# start kernels for fewer takes longer than they do. Products of fewer rows are slow.
_BLOCK, _BLOCK_ELSEWHERE, _ROWS = 2**17, 2**24, 64
# A block of more scores would take too much memory, of however few rows it is.
_MOST = 2**23
# Keys are left out so many at a time; more runs of keys than these take longer than they save.
_CELL, _RUNS = 128, 16
Place = TypeVar("Place", int, Tensor)
_EXTREMES: tuple[Any, Any] = (
    (min, max),
    (lambda one, two: torch.clamp(one, max=two), lambda one, two: torch.clamp(one, min=two)),
)
# What a mask of blocks shows: some maps, some rows -> which keys.
Tiles: TypeAlias = Callable[[slice, slice], Tensor]
# Since PyTorch 2.8, a GPU multiplies half precision and keeps what it adds up in float32.
_KEEPS_SUMS = "out_dtype" in (torch.bmm.__doc__ or "")


@dataclass(frozen=True, eq=False)
class Block:
    """Some rows of some maps."""

    seen: tuple[slice, ...]  # The keys that any of the rows may see, as runs in order; or all
    weights: Tensor  # (maps, rows, keys), of the keys of these runs
    sink: Tensor | None  # (maps, rows, 1), the weight of the sink; None without one


class Blocks:
    """The weights of a call, to be had by the block: some rows (`spans`) of some maps."""

    def __init__(
        self,
        call: Call,
        dtype: torch.dtype,
        tiles: Tiles | None = None,
        most_rows: int | None = None,
    ) -> None:
        self.call, self.dtype, self._tiles = call, dtype, tiles
        self._flat, self._own = flattened(call)
        self._device = call.query.device
        block = _BLOCK if self._device.type == "cpu" else _BLOCK_ELSEWHERE
        key_len, (left, right) = call.key_len, self._sides
        near = key_len if left is None or right is None else left + right + 1
        near = max(1, min(key_len, near + call.sink_keys, call.chunk or key_len))
        # Of rows that see other keys each, a block computes no more than a quarter in vain.
        most = block // key_len if near == key_len else min(near // 4, 4 * block // near)
        self.rows = min(call.query_len, max(1, min(_ROWS, _MOST // key_len), most))
        self.rows = min(self.rows, most_rows or self.rows)
        self.together = max(1, block // (self.rows * key_len))
        self._kept: tuple[slice, dict[str, Tensor]] | None = None
        self._last: tuple[slice, slice, Block] | None = None
        self.maps, self.spans = spans(call.maps, self.together), spans(call.query_len, self.rows)
        # Where each row may see one run of keys, its two ends say what it is.
        self._stands = _stands(call)
        sinks = call.sink_keys and not (call.window is None and call.chunk is None)
        self._by_ends = self._stands[0] == self._stands[1] and not sinks
        self._others = replace(call, mask=None, bias=None)
        if self._by_ends:
            self._others = replace(self._others, causal=False, window=None, chunk=None)
        self._has_others = not self._others.sees_all
        self._has_ends = self._by_ends and (call.causal or call.window is not None
                                            or call.chunk is not None)  # fmt: skip

    def grid(self) -> Iterator[tuple[slice, slice]]:
        """Yield the maps and the rows of each block."""
        yield from product(self.maps, self.spans)

    def holding(self, number: int, row: int) -> tuple[slice, slice, Block]:
        """Return the maps, the rows and the weights of the block with a row of a map."""
        # The last one is kept, for who reads a block in several boxes.
        some, span = self.maps[number // self.maps[0].stop], self.spans[row // self.spans[0].stop]
        if self._last is None or self._last[:2] != (some, span):
            self._last = None  # its memory is free while the next one is made
            self._last = some, span, self.block(some, span)
        return self._last

    def among_last(self, numbers: Sequence[int], rows: slice) -> tuple[slice, ...] | None:
        """Return what the block that was computed last sees, if it holds these rows; else None."""
        if self._last is None or not numbers:
            return None
        some, span, block = self._last
        inside = some.start <= min(numbers) and max(numbers) < some.stop
        return (
            block.seen if inside and span.start <= rows.start and rows.stop <= span.stop else None
        )

    def given(self, name: str, maps: Tensor) -> Tensor:
        """Return the mask or the bias of some maps, (maps or 1, rows or 1, keys or 1)."""
        tensor = self._flat[name]
        return tensor if len(tensor) == 1 else tensor[self._own[name][maps]]

    def permitted(self, maps: Tensor, rows: slice, keys: Tensor) -> Tensor | None:
        """Return what the rules of positions permit, (maps, rows, keys) or broadcastable."""
        rule = self._others.permitted(maps, rows, keys) if self._has_others else None
        if not self._has_ends:
            return rule
        first, last = (end[rows] for end in self._of_rows)
        inside = ((keys >= first) & (keys <= last))[None]
        return inside if rule is None else inside & rule

    @property
    def _sides(self) -> tuple[int | None, int | None]:
        """How many keys before and after its own position a query sees; None is no limit."""
        left, right = self.call.window or (None, None)
        if self.call.causal and not self.call.prefix:
            right = 0 if right is None else min(right, 0)
        return left, right

    def ends(self, place: Place) -> tuple[Place, Place]:
        """The first and the last key that a query at some place sees, but for sink keys."""
        call, (least, most) = self.call, _EXTREMES[isinstance(place, Tensor)]
        first = place * 0
        last = first + call.key_len - 1
        if call.causal:
            last = least(last, most(place, call.prefix - 1))
        left, right = call.window or (None, None)
        if left is not None:
            first = most(first, place - left)
        if right is not None:
            last = least(last, place + right)
        if call.chunk is not None:
            own = place // call.chunk * call.chunk
            first, last = most(first, own), least(last, own + call.chunk - 1)
        return first, last

    @cached_property
    def _of_rows(self) -> tuple[Tensor, Tensor]:
        """The first and the last key that each row sees, (query_len, 1)."""
        places = torch.arange(self.call.query_len, device=self._device, dtype=torch.int32)
        places += self._stands[0]
        first, last = self.ends(places)
        return first[:, None], last[:, None]

    @cached_property
    def counts(self) -> Tensor | None:
        """How many keys each row may see, (query_len,), where its ends say so; else None."""
        call = self.call
        if self._has_others or not self._by_ends or not call.mask is call.bias is None:
            return None
        first, last = self._of_rows
        return (last - first + 1).clamp(min=0)[:, 0]

    def seen_by_all(self, rows: slice) -> tuple[int, int]:
        """Return from which key on, and up to which one, some rows all see the keys."""
        # Where `counts` are known.
        stand = self._stands[0]
        return self.ends(rows.stop - 1 + stand)[0], self.ends(rows.start + stand)[1] + 1

    def seen(self, some: slice, span: slice) -> tuple[slice, ...]:
        """Return the keys that some rows of some maps may see, as runs in order."""
        call = self.call
        if call.fully_masked in ("uniform", "nan"):
            return (slice(0, call.key_len),)
        least, most = self._stands
        start, stop = self.ends(span.start + least)[0], self.ends(span.stop - 1 + most)[1] + 1
        if call.lengths is not None:
            stop = min(stop, int(call.lengths.max()))
        sinks = min(call.sink_keys, call.key_len)
        if sinks and call.causal:
            sinks = min(sinks, max(span.stop + most, call.prefix))
        if call.window is None and call.chunk is None:
            sinks = 0
        runs = [slice(0, sinks), slice(start, stop)]
        if start <= sinks:
            runs = [slice(0 if sinks > 0 else start, max(sinks, stop))]
        runs = [run for run in runs if run.start < run.stop]
        for rule in self._shown(some, span):
            if not runs:
                break
            hull = slice(runs[0].start, runs[-1].stop)
            mine = _runs(rule[hull] if rule.numel() > 1 else rule.expand(call.key_len)[hull])
            mine = [slice(hull.start + run.start, hull.start + run.stop) for run in mine]
            runs = [both for one in runs for two in mine if (both := shared(one, two))]
        return tuple(runs)

    def _shown(self, some: slice, span: slice) -> Iterator[Tensor]:
        """Yield what masks and documents show of the keys to any of these rows: (key_len or 1,)."""
        call = self.call
        if self._tiles is not None:
            yield self._tiles(some, span)
        if call.mask is not None:
            mask = own_maps(self._flat["mask"], self._own["mask"], some)
            yield mask[:, own_rows(mask, span)].flatten(0, 1).any(0)
        if call.documents is not None:
            queries, keys = (numbers.to(self._device) for numbers in call.documents)
            entries = range(some.start // call.heads, (some.stop - 1) // call.heads + 1)
            seen = [torch.isin(keys[e], queries[e, span]) for e in entries]
            yield torch.stack(seen).any(0)

    def _operands(self, some: slice) -> dict[str, Tensor]:
        if self._kept is None or self._kept[0] != some:
            mine = {n: own_maps(t, self._own[n], some) for n, t in self._flat.items()}
            given = {mine[name].dtype for name in ("query", "key")}
            halves = given <= {torch.float16, torch.bfloat16} and len(given) == 1
            if not (halves and self._device.type == "cuda" and _KEEPS_SUMS):
                mine |= {name: mine[name].to(self.dtype) for name in ("query", "key")}
            mine["key"] = mine["key"].mT.expand(len(mine["query"]), -1, -1)
            self._kept = (some, mine)
        return self._kept[1]

    def _products(self, query: Tensor, key: Tensor) -> Tensor:
        if query.dtype != self.dtype:  # `_operands`
            return torch.bmm(query, key, out_dtype=torch.float32).mul_(self.call.factor)
        nothing = query.new_empty(1, 1, 1)
        return torch.baddbmm(nothing, query, key, beta=0, alpha=self.call.factor)

    def block(self, some: slice, span: slice, into: Tensor | None = None) -> Block:
        """Compute a block of the grid, if possible `into` memory (maps, query_len, key_len)."""
        call, seen = self.call, self.seen(some, span)
        mine = self._operands(some)
        maps = torch.arange(some.start, some.stop, device=self._device)
        if not seen:
            nothing = mine["query"].new_empty(len(maps), span.stop - span.start, 0).to(self.dtype)
            sink = None if call.sinks is None else nothing.new_ones(*nothing.shape[:2], 1)
            return Block(seen, nothing, sink)
        scores = call.capped(self._products(mine["query"][:, span], _taken(mine["key"], seen)))
        positional = call.alibi is not None or call.score_mod is not None
        at, rule = None, None
        if positional or self._has_others:
            keys = torch.cat([torch.arange(s.start, s.stop, device=self._device) for s in seen])
            at = call.positions(maps, span, keys) if positional else None
            rule = self._others.permitted(maps, span, keys)
        given = {
            n: _taken(t[:, own_rows(t, span)], seen)
            for n, t in mine.items()
            if n in ("bias", "mask")
        }
        for added in (given.get("bias"), None if at is None else call.distant(at, self.dtype)):
            scores = scores if added is None else scores.add_(added.to(self.dtype))
        scores = scores if at is None else call.modified(scores, at).contiguous()
        for hides in (rule, given.get("mask")):
            scores = scores if hides is None else torch.where(hides, scores, -math.inf)
        cut = self._cut(scores, span, seen) if self._has_ends else False
        if call.sinks is not None:
            column = call.sinks.detach().to(self._device, self.dtype)[maps % call.heads, None, None]
            scores = torch.cat([scores, column.expand(*scores.shape[:2], 1)], -1)
        some_empty = bool(given) or rule is not None or cut
        empty = scores.amax(-1, keepdim=True).isneginf() if some_empty else None
        fits = into is not None and call.sinks is None and into.dtype == scores.dtype
        made = into[some, span, seen[0]] if fits and into is not None and not seen[1:] else scores
        torch.softmax(scores, -1, out=made)
        if empty is not None and bool(empty.any()):
            what = {"uniform": 1 / call.key_len, "nan": math.nan}.get(call.fully_masked, 0.0)
            made.masked_fill_(empty, what)
        sink = None if call.sinks is None else made[..., -1:]
        made = made if sink is None else made[..., :-1]
        if seen != (whole := (slice(0, call.key_len),)):
            nan = made[..., :1].isnan()  # a softmax makes whole rows NaN
            if bool(nan.any()):
                seen, made = whole, _scattered(made, seen, call.key_len).masked_fill_(nan, math.nan)
        return Block(seen, made, sink)

    def _cut(self, scores: Tensor, span: slice, seen: tuple[slice, ...]) -> bool:
        """Hide in each row what lies before its first key, and after its last one."""
        # Returns whether a row may be left with nothing: it stands where there is no key.
        call, stand = self.call, self._stands[0]
        start, stop = (end[span] for end in self._of_rows)
        since_all, until_all = self.seen_by_all(span)
        numbers: Any = {"dtype": torch.int32, "device": scores.device}
        at = 0
        for run in seen:
            own = scores[..., at : at + run.stop - run.start]
            at += run.stop - run.start
            if (until := min(since_all, run.stop)) > run.start:
                early = torch.arange(run.start, until, **numbers) < start
                own[..., : until - run.start].masked_fill_(early, -math.inf)
            if (since := max(until_all, run.start)) < run.stop:
                late = torch.arange(since, run.stop, **numbers) > stop
                own[..., since - run.start :].masked_fill_(late, -math.inf)
        return not 0 <= span.start + stand <= span.stop + stand <= call.key_len


def _stands(call: Call) -> tuple[int, int]:
    """Where query 0 stands: the first and the last such place of all batch entries."""
    if call.alignment != "bottom_right":
        return 0, 0
    stands = torch.tensor([call.key_len], device="cpu") if call.lengths is None else call.lengths
    queries = call.query_len if call.query_lengths is None else call.query_lengths.cpu()
    places = stands.cpu() - queries
    return int(places.min()), int(places.max())


def weights(
    call: Call, dtype: torch.dtype, *, into: Tensor | None = None
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield some maps, some of their queries, and their weights (maps, rows, keys) in a dtype."""
    # Keys after the last that any of these queries may see are left out, as is the weight of a
    # sink. A query that may attend to nothing has zeros. Where it can be, they are made in the
    # memory of `into`, (maps, query_len, key_len).
    blocks = Blocks(call, dtype)
    for some, span in blocks.grid():
        made = blocks.block(some, span, into)
        yield some, span, _from_the_first(made, None if into is None else into[some, span])


def _from_the_first(block: Block, into: Tensor | None) -> Tensor:
    """The weights of a block from the first key to the last that is seen."""
    runs, found = block.seen, block.weights
    if not runs or (len(runs) == 1 and runs[0].start == 0):
        return found
    if into is not None and len(runs) == 1 and found.is_set_to(into[..., runs[0]]):
        into[..., : runs[0].start] = 0
        return into[..., : runs[0].stop]
    return _scattered(found, runs, runs[-1].stop)


def _scattered(found: Tensor, runs: tuple[slice, ...], key_len: int) -> Tensor:
    """The weights of some runs of keys among zeros for the other keys."""
    whole = found.new_zeros(*found.shape[:-1], key_len)
    at = 0
    for run in runs:
        whole[..., run] = found[..., at : at + run.stop - run.start]
        at += run.stop - run.start
    return whole


def _taken(tensor: Tensor, runs: tuple[slice, ...]) -> Tensor:
    """Some of the last dimension, or what stands there once for all."""
    if tensor.shape[-1] == 1:
        return tensor
    return tensor[..., runs[0]] if len(runs) == 1 else torch.cat([tensor[..., r] for r in runs], -1)


def shared(one: slice, two: slice) -> slice | None:
    """Return what two runs share; None for nothing."""
    start, stop = max(one.start, two.start), min(one.stop, two.stop)
    return slice(start, stop) if start < stop else None


def _runs(shown: Tensor) -> list[slice]:
    """The runs of what is shown, in whole cells: (keys,) -> slices; one where there are many."""
    size = shown.shape[0]
    padded = torch.nn.functional.pad(shown, (0, -size % _CELL)).view(-1, _CELL)
    cells = padded.any(-1).int().cpu()
    steps = torch.diff(cells, prepend=cells.new_zeros(1), append=cells.new_zeros(1))
    starts, stops = ((steps == way).nonzero().flatten().tolist() for way in (1, -1))
    if len(starts) > _RUNS:
        starts, stops = starts[:1], stops[-1:]
    return [slice(a * _CELL, min(b * _CELL, size)) for a, b in zip(starts, stops, strict=True)]
