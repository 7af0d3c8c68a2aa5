"""`LazyWeights`: attention weights that are read a block at a time, and never held as a whole."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..inputs import (
    as_weights,
    dtype_name,
    meant,
    misuse,
    one_of,
    positive,
    seed_number,
    wide_dtype,
)
from .blocks import Block, Blocks, Tiles, shared
from .boxes import Box, LazyBoxes, LazyMask, merged, neighbours
from .call import FEATURES, Call, check_features
from .chunks import Progress, pieces, spans
from .vocabulary import ALIGNMENTS, Alignment, FullyMasked, check_fully_masked

# Rows are sampled so many neighbours at a time: products of fewer are slow.
_NEIGHBOURS = 16


class LazyWeights(LazyBoxes):
    """Attention weights of queries and keys, (..., heads, query_len, key_len), never held at once.

    Every assertion on weights, `assert_same_attention` and `show_heatmaps` take it in place of
    weights, and read it a block of rows at a time. A row is computed over the keys that a window,
    a chunk, causality, documents or a mask of blocks let its block see: the others cost nothing.
    What is asked of the mask and not given comes from what is declared here.

    Attributes:
        shape: That of the weights.
        dtype: What they are computed in: float64 of float64, else float32.
        device: That of the queries.
        mask: Where a query may attend, read in the same manner; None for everywhere.

    Args:
        query: (..., heads, query_len, head_dim), any float dtype and device.
        key: (..., key_heads, key_len, head_dim); `key_heads` divide the heads, as in grouped
            queries.
        mask: Boolean, True where a query may attend, broadcastable to the weights; a float mask is
            a `bias`. Or a `BlockMask` of `flex_attention`, whose empty blocks are not read.
        causal: Whether a query sees no later key.
        alignment: Where query 0 stands: ``"top_left"``, at key 0, or ``"bottom_right"``, so that
            the last query is at the last key. Needed where lengths differ and something is counted
            from it.
        window: ``(left, right)``, how many keys before and after its own place a query sees; None
            for no limit.
        bias: Added to the scores, broadcastable to the weights; -inf forbids.
        fully_masked: What a row without any permitted key holds: ``"zero"``, ``"uniform"`` or
            ``"nan"``. Of the last two, no key is left out.
        rows: How many rows of each map are read, about; None for all. They are drawn from `seed`,
            in runs of 16 neighbours, the first and the last of each map among them; a failure says
            so.
        seed: Where they are drawn from.
        features: What else is declared: chunk, scale, softcap, alibi, sinks, score_mod, prefix,
            sink_keys, documents, lengths, query_lengths, may_see, as `AttentionSpec` and
            `assert_matches_reference` have them. A sink counts as one more key in
            `assert_row_stochastic`, `assert_one_hot` and `assert_entropy`.

    Raises:
        TypeError: Query or key are no float tensors, or a feature has no such name.
        ValueError: Shapes do not fit, or the alignment is unknown or missing.

    Example:
        >>> query, key = torch.randn(2, 1, 4, 4096, 64).unbind()
        >>> assert_causal(LazyWeights(query, key, causal=True, window=(127, 0)))
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        *,
        mask: Any = None,
        causal: bool = False,
        alignment: Alignment | None = None,
        window: tuple[int | None, int | None] | None = None,
        bias: Tensor | None = None,
        fully_masked: FullyMasked = "zero",
        rows: int | None = None,
        seed: int = 0,
        **features: Any,
    ) -> None:
        query, key = (as_weights(t, n, "(..., length, head_dim)") for t, n in
                      ((query, "query"), (key, "key")))  # fmt: skip
        if unknown := set(features) - set(FEATURES):
            names = ", ".join(("mask", "causal", *FEATURES))
            near = meant(min(unknown), ("mask", "causal", *FEATURES))
            raise TypeError(misuse("features", sorted(unknown), f"one of {names}{near}"))
        _check_shapes(query, key)
        features = {name: one for name, one in features.items() if one is not None}
        said: Any = causal
        if not isinstance(said, bool):
            got, accepted = type(causal).__name__, "True or False; alignment= says whence it counts"
            raise TypeError(misuse("causal", got, accepted))
        if isinstance(features.get("may_see"), Tensor):
            mask = _both(mask, features.pop("may_see"))
        check_features({**features, "window": window}, query.shape, key.shape, query.device)
        tiles = None
        if hasattr(mask, "mask_mod"):
            tiles, features = _tiles_of(mask, query, key), {**features, "may_see": mask.mask_mod}
            mask = None
        mask, bias = _masks(mask, bias, (*query.shape[:-1], key.shape[-2]))
        counted = causal or window is not None or features.get("chunk") or "alibi" in features
        if alignment is None and counted and query.shape[-2] != key.shape[-2]:
            got = f"None for {query.shape[-2]} queries and {key.shape[-2]} keys"
            raise ValueError(misuse("alignment", got, f"one of {', '.join(map(repr, ALIGNMENTS))}"))
        one_of("alignment", alignment or "top_left", ALIGNMENTS)
        call = Call(
            query, key, key, mask=mask, bias=bias, causal=causal, alignment=alignment or "top_left",
            window=window, fully_masked=check_fully_masked(fully_masked), **features,
        )  # fmt: skip
        sampled = None
        if rows is not None:
            sampled = _sample(call.query_len, positive("rows", rows), seed_number(seed))
        most_rows = None if sampled is None else _NEIGHBOURS
        self._set(Blocks(call, wide_dtype(query.dtype), tiles, most_rows))
        self.sampled, self.seed = sampled, seed

    def _set(self, blocks: Blocks) -> None:
        call = blocks.call
        lead = call.query.shape[:-2]
        numbers = torch.arange(call.maps, device="cpu").view(lead)
        super().__init__(blocks, numbers, (*lead, call.query_len, call.key_len))
        self.dtype, self.sampled, self.seed, self.with_sink = blocks.dtype, None, 0, False

    sampled: list[slice] | None
    seed: int
    with_sink: bool

    @classmethod
    def of_call(cls, call: Call, dtype: torch.dtype | None = None) -> LazyWeights:
        """Return the weights of a call, computed in a dtype; by default as `LazyWeights` does."""
        new = cls.__new__(cls)
        new._set(Blocks(call, dtype or wide_dtype(call.query.dtype)))
        return new

    def __repr__(self) -> str:
        """Say what it is, and whether some rows stand for all."""
        return f"<LazyWeights {dtype_name(self.dtype)} {tuple(self.shape)}{self.note}>"

    @property
    def note(self) -> str:  # type: ignore[override]
        """What a verdict has to say of it: which rows stand for all."""
        if self.sampled is None:
            return ""
        count = sum(span.stop - span.start for span in self.sampled)
        return f", {count} of {self.shape[-2]} rows of each map, drawn from seed={self.seed}"

    @property
    def mask(self) -> LazyMask | None:
        """Where a query may attend, read in the same manner; None for everywhere."""
        if self.blocks.call.sees_all:
            return None
        return LazyMask(self.blocks, self.numbers, self.shape, with_sink=self.with_sink)

    @property
    def sinks(self) -> LazyWeights | None:
        """The same with the weight of the sink as one more key; None where there is no sink."""
        if self.blocks.call.sinks is None or self.with_sink:
            return None
        return self._like(self.numbers, with_sink=True)

    def _like(self, numbers: Tensor, *, with_sink: bool | None = None) -> LazyWeights:
        new = self.__class__.__new__(self.__class__)
        call = self.blocks.call
        sink = self.with_sink if with_sink is None else with_sink
        shape = (*numbers.shape, call.query_len, call.key_len + sink)
        LazyBoxes.__init__(new, self.blocks, numbers, shape)
        new.dtype, new.sampled, new.seed, new.with_sink = self.dtype, self.sampled, self.seed, sink
        return new

    def map_at(self, place: Sequence[int]) -> LazyWeights:
        """Return one map, (queries, keys)."""
        return self._like(self.numbers[tuple(place)])

    def unflatten(self, dim: int, sizes: Sequence[int]) -> LazyWeights:
        """Return the same with a leading dimension, counted from the end, as two."""
        return self._like(torch.unflatten(self.numbers, dim + 2, tuple(sizes)))

    def unsqueeze(self, dim: int) -> LazyWeights:
        """Return the same with one leading dimension more, of size 1."""
        return self._like(self.numbers.unsqueeze(dim))

    def numel(self) -> int:
        """How many weights there are."""
        return math.prod(self.shape)

    def element_size(self) -> int:
        """How many bytes each has."""
        return self.dtype.itemsize

    def dense(self) -> Tensor:
        """Return all of them as a tensor."""
        return self[()].clone()

    def double(self) -> Tensor:
        """Return all of them as a tensor, in float64."""
        return self[()].double()

    def cpu(self) -> Tensor:
        """Return all of them as a tensor, on the CPU."""
        return self.dense().cpu()

    def read(self, box: Box) -> Tensor:
        """Return a box of slices, one for each dimension."""
        *lead, rows, keys = box
        numbers = self.numbers[tuple(lead)]
        shape = (*numbers.shape, rows.stop - rows.start, keys.stop - keys.start)
        if 0 in shape:
            return torch.zeros(shape, dtype=self.dtype, device=self.device)
        maps = []
        for some in neighbours(numbers.flatten().tolist(), self.blocks.maps[0].stop):
            parts, row = [], rows.start
            while row < rows.stop:
                held, span, block = self.blocks.holding(some.start, row)
                until = min(rows.stop, span.stop)
                mine = slice(some.start - held.start, some.stop - held.start)
                here = slice(row - span.start, until - span.start)
                parts.append(self._keys(block, mine, here, keys))
                row = until
            maps.append(parts[0] if len(parts) == 1 else torch.cat(parts, -2))
        return (maps[0] if len(maps) == 1 else torch.cat(maps)).view(shape)

    def _keys(self, block: Block, maps: slice, rows: slice, keys: slice) -> Tensor:
        """Some keys of some rows of a block: a view where no other key is among them."""
        found, made, at = block.weights[maps, rows], None, 0
        for run in block.seen:
            if (both := shared(run, keys)) is not None:
                first = at - run.start
                part = found[..., first + both.start : first + both.stop]
                if both == keys:
                    return part
                made = (
                    found.new_zeros(*part.shape[:-1], keys.stop - keys.start)
                    if made is None
                    else made
                )
                made[..., both.start - keys.start : both.stop - keys.start] = part
            at += run.stop - run.start
        if made is None:
            made = found.new_zeros(*found.shape[:-1], keys.stop - keys.start)
        if block.sink is not None and keys.stop > self.blocks.call.key_len:
            made[..., -1:] = block.sink[maps, rows]
        return made

    def runs(self, box: Box) -> list[slice]:
        """Return the keys of some rows that may hold anything, as runs in order."""
        *lead, rows = box
        numbers = self.numbers[tuple(lead)].flatten().tolist()
        if numbers and rows.start < rows.stop:  # what is asked of is read next
            self.blocks.holding(numbers[0], rows.start)
        held = self.blocks.among_last(numbers, rows)
        found = merged(held) if held is not None else self.seen(numbers, rows)
        key_len = self.blocks.call.key_len
        return [*found, slice(key_len, key_len + 1)] if self.with_sink else found

    def boxes(self, most_rows: int, most_elements: int) -> Iterator[Box]:
        """Yield the rows in order, in boxes that each lie in one block."""
        lead = self.numbers.shape
        alike = lead == self.blocks.call.query.shape[:-2]
        together = self.blocks.maps[0].stop if alike else 1
        groups: list[Box] = [()] if not lead else list(pieces(lead, together))
        progress = Progress(repr(self), len(groups) * len(self.blocks.spans), "are read")
        for group in groups:
            number = int(self.numbers[group].flatten()[0])
            for span in self.blocks.spans:
                progress.step()
                for part in _within(span, self.sampled):
                    some = self.numbers[group].numel()
                    self.blocks.holding(number, span.start)
                    wide = sum(r.stop - r.start for r in self.runs((*group, part)))
                    height = min(most_rows, most_elements // max(1, wide))
                    if some > 1 and height < some * (part.stop - part.start):
                        yield from self._apart(group, part, height)
                        continue
                    for rows in spans(part.stop - part.start, max(1, height // some)):
                        yield (*group, slice(part.start + rows.start, part.start + rows.stop))

    @property
    def rows(self) -> list[slice]:
        """The rows of each map that are read, as runs in order."""
        return [slice(0, self.shape[-2])] if self.sampled is None else self.sampled

    def with_zeros(self) -> LazyWeights:
        """Return the same with zeros in rows that may attend to nothing: these are left open."""
        call = self.blocks.call
        if call.fully_masked == "zero":
            return self
        new = LazyWeights.of_call(replace(call, fully_masked="zero"), self.dtype)
        new.sampled, new.seed = self.sampled, self.seed
        return new

    def parts(self) -> Iterator[tuple[slice, slice, Tensor, int]]:
        """Yield all weights once: some maps, some rows, (maps, rows, keys), and the first key.

        Maps are counted through all leading dimensions. Keys that are left out weigh nothing. Each
        part can be reduced where it is computed, and what it comes to added to the others'.
        """
        lead = len(self.shape) - 2
        flat = torch.arange(self.numbers.numel()).view(self.numbers.shape)
        for box in self.boxes(2**31, 2**31):
            group = box[:lead]
            maps = flat[group].flatten()
            runs = self.runs(box) or [slice(0, 1)]
            index = (*box, slice(runs[0].start, runs[-1].stop))
            found = self[index].flatten(0, -3) if lead else self[index][None]
            yield slice(int(maps[0]), int(maps[-1]) + 1), box[-1], found, runs[0].start

    def _apart(self, group: Box, part: slice, height: int) -> Iterator[Box]:
        """Boxes of a group of maps that are too many for one, in order."""
        sizes = [span.stop - span.start for span in (*group, part)]
        for box in pieces(sizes, max(1, height)):
            yield tuple(
                slice(whole.start + own.start, whole.start + own.stop)
                for whole, own in zip((*group, part), box, strict=True)
            )


def _within(span: slice, sampled: list[slice] | None) -> Iterator[slice]:
    """The rows of a block that are read."""
    for part in [span] if sampled is None else sampled:
        start, stop = max(span.start, part.start), min(span.stop, part.stop)
        if start < stop:
            yield slice(start, stop)


def _sample(query_len: int, rows: int, seed: int) -> list[slice] | None:
    """Runs of neighbours, about so many rows in all, the first and the last among them."""
    if rows >= query_len:
        return None
    runs = -(-query_len // _NEIGHBOURS)
    wanted = min(runs, max(2, rows // _NEIGHBOURS))
    drawn = torch.randperm(runs, generator=torch.Generator("cpu").manual_seed(seed)).tolist()
    ends = {0, runs - 1}
    chosen = sorted(ends | set([one for one in drawn if one not in ends][: wanted - 2]))
    return merged([slice(r * _NEIGHBOURS, min((r + 1) * _NEIGHBOURS, query_len)) for r in chosen])


def _check_shapes(query: Tensor, key: Tensor) -> None:
    shapes = f"{tuple(query.shape)} and {tuple(key.shape)}"
    lead, others = query.shape[:-2], key.shape[:-2]
    grouped = (
        len(lead) == len(others) > 0
        and lead[:-1] == others[:-1]
        and lead[-1] % max(1, others[-1]) == 0
    )
    if query.shape[-1] != key.shape[-1] or not (lead == others or grouped):
        accepted = (
            "(..., heads, query_len, head_dim) and (..., key_heads, key_len, head_dim), where "
            "key_heads divide heads"
        )
        raise ValueError(misuse("query, key", shapes, accepted))
    if query.device != key.device:
        raise TypeError(misuse("query, key", f"on {query.device} and {key.device}", "one device"))


_ACCEPTED = {
    "mask": "a boolean tensor, True where a query may attend, or a BlockMask; a function of "
    "positions is may_see=",
    "bias": "a tensor of floats, which are added to the scores; booleans are a mask=",
}


def _both(mask: Any, may_see: Tensor) -> Tensor:
    """A mask and booleans (query_len, key_len) that hold beside it."""
    if mask is None:
        return may_see
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or may_see.dtype != torch.bool:
        raise TypeError(misuse("may_see", "a tensor beside such a mask", "a function, or no mask"))
    return mask & may_see


def _as_tensor(name: str, given: Any) -> Tensor | None:
    if given is None or isinstance(given, Tensor):
        return given
    try:
        return torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(misuse(name, type(given).__name__, _ACCEPTED[name])) from None


def _masks(
    mask: Any, bias: Tensor | None, shape: Sequence[int]
) -> tuple[Tensor | None, Tensor | None]:
    """Check a mask and a bias; a float mask is a bias."""
    mask, bias = (_as_tensor(*one) for one in (("mask", mask), ("bias", bias)))
    if mask is not None and mask.is_floating_point():
        if bias is not None:
            got = "a mask of floats beside a bias"
            raise ValueError(misuse("mask", got, "one of them, with the sum of both"))
        mask, bias = None, mask
    for name, one in (("mask", mask), ("bias", bias)):
        if one is None:
            continue
        if not (one.dtype == torch.bool if name == "mask" else one.is_floating_point()):
            raise TypeError(misuse(name, f"dtype {dtype_name(one)}", _ACCEPTED[name]))
        try:
            torch.broadcast_to(one, tuple(shape))
        except RuntimeError:
            accepted = f"a shape that broadcasts to that of the weights, {tuple(shape)}"
            raise ValueError(misuse(name, f"shape {tuple(one.shape)}", accepted)) from None
    return mask, bias


def _tiles_of(mask: Any, query: Tensor, key: Tensor) -> Tiles:
    """What a `BlockMask` of `flex_attention` shows of the keys to some rows."""
    (tall, wide), key_len = mask.BLOCK_SIZE, key.shape[-2]
    shown = mask.to_dense().bool().cpu()
    heads = query.shape[-3] if query.ndim > 2 else 1
    of_maps = (query.shape[:-3].numel(), heads)
    lengths = (query.shape[-2], key_len)
    made = tuple(getattr(mask, "seq_lengths", (shown.shape[-2] * tall, shown.shape[-1] * wide)))
    fits = all(n in (1, own) for n, own in zip(shown.shape[:2], of_maps, strict=True))
    if not fits or any(n < own for n, own in zip(made, lengths, strict=True)):
        accepted = f"one of {(*of_maps, *lengths)}, or of one batch entry or head, or longer"
        raise ValueError(misuse("mask", f"a BlockMask of {(*shown.shape[:2], *made)}", accepted))

    def tiles(some: slice, span: slice) -> Tensor:
        rows = slice(span.start // tall, (span.stop - 1) // tall + 1)
        cells = torch.zeros(shown.shape[-1], dtype=torch.bool, device="cpu")
        for number in range(some.start, some.stop):
            batch, head = divmod(number, heads)
            own = shown[batch % shown.shape[0], head % shown.shape[1], rows]
            cells |= own.any(0)
        return cells.repeat_interleave(wide)[:key_len]

    return tiles
