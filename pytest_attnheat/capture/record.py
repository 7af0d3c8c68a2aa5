"""`AttentionRecord`: one attention that happened inside a model, and its weights in parts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pytest_attnheat.attention.chunks import pieces
from pytest_attnheat.attention.reference import causal_mask
from pytest_attnheat.attention.vocabulary import Alignment, permits
from pytest_attnheat.capture import CaptureMemoryError
from pytest_attnheat.capture.selection import Selection, batch_entry, chosen, float_dtype, within
from pytest_attnheat.inputs import dtype_name, misuse, wide_dtype

# (scores, batch, heads, queries) -> scores: scores (batch, heads, query_len, key_len) of the
# batch entries, heads and queries whose numbers in the whole attention the others are.
ScoreChange = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
# Scores are computed for so many bytes at a time: a few batch entries, or heads of one.
_PART_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Statistics:
    """What a distribution over keys is like, without the keys: float32, on the CPU.

    Attributes:
        row_sum: (batch, heads, query_len)
        entropy: (batch, heads, query_len), in nats.
        maximum: (batch, heads, query_len): the largest weight.
        most_attended: (batch, heads, query_len): the key that has it, int64; -1 without keys.
    """

    row_sum: Tensor = field(repr=False)
    entropy: Tensor = field(repr=False)
    maximum: Tensor = field(repr=False)
    most_attended: Tensor = field(repr=False)


@dataclass(frozen=True, eq=False)
class AttentionRecord:
    """One attention that happened inside a model; all tensors are detached copies.

    Attributes:
        layer: The name of the innermost module in which it happened.
        source: How it was seen: "scaled_dot_product_attention", "softmax", "flex_attention" ...
        shape: (batch, heads, query_len, key_len) of the whole attention, before any selection.
        dtype: The dtype in which the model computed it.
        query: (batch, heads, query_len, head_dim); None if it is not kept or not known.
        key: (batch, key_heads, key_len, head_dim); None if it is not kept or not known.
        value: (batch, key_heads, key_len, value_dim); None if it is not kept.
        output: (batch, heads, query_len, value_dim), what the model got; None if not kept.
        given_mask: Boolean, True where a query may attend, broadcastable to the weights: what
            the attention was given besides `causal`; None for none.
        bias: Added to the scores, broadcastable to the weights; None for none.
        causal: The alignment, if the attention was told to be causal.
        scale: What scores were multiplied by; None if it is not known. A number that query or
            key were multiplied by themselves is counted in, and taken out of them.
        dropout: The probability with which weights were dropped after the softmax.
        heads: Which heads of the layer these are; None for all.
        queries: Which queries these are; None for all.
        training: Whether that module was in training mode.
        call: How many attentions this layer had performed before, in this capture.
        residual: How far weights times value are from the output, in rows that were compared
            when it was captured: the worst row, relative to what its weights and the sizes of
            the values make. NaN where that cannot be asked; `unverified` says why.
        tolerance: The residual up to which it is trusted.
        unverified: Why there is no residual.
        statistics: With `keep="statistics"`.
        score_change: What else was done to the scores (a `score_mod`); None for nothing.
    """

    layer: str
    source: str
    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    query: Tensor | None = field(default=None, repr=False)
    key: Tensor | None = field(default=None, repr=False)
    value: Tensor | None = field(default=None, repr=False)
    output: Tensor | None = field(default=None, repr=False)
    given_mask: Tensor | None = field(default=None, repr=False)
    bias: Tensor | None = field(default=None, repr=False)
    causal: Alignment | None = None
    scale: float | None = None
    dropout: float = 0.0
    heads: Tensor | None = None
    queries: Tensor | None = None
    call: int = 0
    training: bool = False
    residual: float = float("nan")
    tolerance: float = 0.0
    unverified: str = ""
    statistics: Statistics | None = field(default=None, repr=False)
    score_change: ScoreChange | None = field(default=None, repr=False)
    kept_weights: Tensor | None = field(default=None, repr=False)
    weights_dtype: torch.dtype = torch.float32
    most_bytes: int = 2**30

    @property
    def weights(self) -> Tensor:
        """(batch, heads, query_len, key_len): per head, before dropout; computed at each access.

        Raises:
            ValueError: Only statistics were kept.
            CaptureMemoryError: They would take more than the capture's `max_bytes`.
        """
        return self.compute_weights(self.weights_dtype)

    @property
    def mask(self) -> Tensor | None:
        """Boolean, True where a query may attend, broadcastable to the weights; None for all.

        The mask that was given, causality and biases that hide a key (-inf, -1e9 ...) together.

        Raises:
            ValueError: Only statistics were kept.
        """
        if self.statistics is not None:
            raise ValueError(
                f'{name_of(self)}: the mask is not known any more: keep="statistics" keeps none'
            )
        return _both(self.mask_besides_causality, _causal(self))

    @property
    def mask_besides_causality(self) -> Tensor | None:
        """The mask that was given, and biases that hide a key, together; None for everything."""
        if self.bias is None:
            return self.given_mask
        seen = permits(self.bias)
        return self.given_mask if bool(seen.all()) else _both(self.given_mask, seen)

    @property
    def trusted(self) -> bool:
        """Whether weights times value reproduce the output, as far as that can be asked."""
        return not self.residual > self.tolerance

    @property
    def group(self) -> int:
        """How many query heads share one key head."""
        return sharing(self, self.key)

    @property
    def shape_here(self) -> tuple[int, int, int, int]:
        """(batch, heads, query_len, key_len) of what was selected."""
        batch, heads, query_len, key_len = self.shape
        heads = heads if self.heads is None else len(self.heads)
        query_len = query_len if self.queries is None else len(self.queries)
        return batch, heads, query_len, key_len

    def compute_weights(
        self, dtype: torch.dtype = torch.float32, *, batch: int | None = None
    ) -> Tensor:
        """Return the weights in a dtype of your choice; see `weights`.

        Args:
            dtype: Any of floating point.
            batch: The only batch entry that is computed, (1, heads, query_len, key_len); None
                for all.
        """
        dtype = float_dtype(dtype)
        entry = None if batch is None else batch_entry(batch, self.shape[0])
        if self.kept_weights is not None:
            kept = self.kept_weights
            return (kept if entry is None else kept[entry : entry + 1]).to(dtype, copy=True)
        if self.query is None or self.key is None:
            raise ValueError(
                f"{name_of(self)}: weights cannot be computed any more: keep="
                '"statistics" keeps neither them nor query and key'
            )
        shape = self.shape_here if entry is None else (1, *self.shape_here[1:])
        needed = math.prod(shape) * dtype.itemsize
        if needed > self.most_bytes:
            raise CaptureMemoryError(
                f"{name_of(self)}: weights {shape} in {dtype_name(dtype)} take {readable(needed)}; "
                f"accepted is {readable(self.most_bytes)}. "
                "Take record.select(heads=[0], queries=range(64)).weights, or a larger max_bytes"
            )
        first = entry or 0
        with apart(self.query.device):
            weights = torch.empty(shape, dtype=dtype, device=self.query.device)
            for entries, heads, part in parts_of(self, entry):
                weights[entries.start - first : entries.stop - first, heads] = part
            return weights

    def select(
        self, *, heads: Selection | None = None, queries: Selection | None = None
    ) -> AttentionRecord:
        """Return the record of some heads and queries; nothing is copied.

        Args:
            heads: Their numbers in the layer, a slice, or one number.
            queries: Their numbers, a slice, or one number; negative ones count from the end.

        Raises:
            ValueError: There is none of that number, or it was not kept.
        """
        record = self
        if heads is not None:
            record = record._with_heads(*self._found("heads", heads, self.shape[1], self.heads))
        if queries is not None:
            found = self._found("queries", queries, self.shape[2], self.queries)
            record = record._with_queries(*found)
        return record

    def _found(
        self, name: str, wanted: Selection, count: int, kept: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Numbers in the whole attention, and where they are in what is kept."""
        numbers = chosen(name, wanted, count, self.layer)
        here = numbers
        if kept is not None:
            known = {number: place for place, number in enumerate(kept.tolist())}
            if not known.keys() >= set(numbers):
                accepted = f"numbers that were kept: {list(known)}{within(self.layer)}"
                raise ValueError(misuse(name, repr(wanted), accepted))
            here = [known[number] for number in numbers]
        return torch.tensor(numbers, device="cpu"), torch.tensor(here, device="cpu")

    def _with_heads(self, numbers: Tensor, here: Tensor) -> AttentionRecord:
        return replace(
            self._with_rows(1, here),
            heads=numbers,
            key=_taken(self.key, 1, here // self.group),
            value=_taken(self.value, 1, here // sharing(self, self.value)),
        )

    def _with_queries(self, numbers: Tensor, here: Tensor) -> AttentionRecord:
        return replace(self._with_rows(2, here), queries=numbers)

    def _with_rows(self, dim: int, here: Tensor) -> AttentionRecord:
        """Take some of what there is per query head (`dim` 1) or per query (2)."""
        statistics = None
        if self.statistics is not None:
            parts = vars(self.statistics).values()
            statistics = Statistics(*(part.index_select(dim, here) for part in parts))
        return replace(
            self,
            query=_taken(self.query, dim, here),
            output=_taken(self.output, dim, here),
            given_mask=_taken(self.given_mask, dim, here, broadcast=True),
            bias=_taken(self.bias, dim, here, broadcast=True),
            kept_weights=_taken(self.kept_weights, dim, here),
            statistics=statistics,
        )


@contextmanager
def apart(device: torch.device) -> Iterator[None]:
    """Compute without gradients, autocast, and the functions of modes: it is not the model's."""
    with (
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        torch._C.DisableTorchFunction(),
    ):
        yield


def parts_of(
    record: AttentionRecord, entry: int | None = None
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Go through the weights of a record in parts that fit a cache; see `apart`.

    A part is whole batch entries as long as they are small, else groups of heads that share keys.

    Args:
        record: Has weights, or query and key; then they are computed in float32 or, where the
            model was in it, float64.
        entry: The only batch entry that is wanted; None for all.

    Yields:
        Batch entries, heads, and their weights.
    """
    batch, heads, query_len, key_len = record.shape_here
    first, entries = (0, batch) if entry is None else (entry, 1)
    group, kept = record.group, record.kept_weights
    causal = _causal(record) if kept is None else None
    most = max(_PART_BYTES // max(query_len * key_len * 4 * group, 1), 1)
    for some, groups in pieces((entries, heads // group), most):
        batch_slice = slice(first + some.start, first + some.stop)
        head_slice = slice(groups.start * group, groups.stop * group)
        if kept is None:
            part = _computed(record, batch_slice, head_slice, causal)
        else:
            part = kept[batch_slice, head_slice]
        yield batch_slice, head_slice, part


def statistics_of(record: AttentionRecord) -> Statistics:
    """Return what the rows of a record are like; its weights are never held at once."""
    source = record.kept_weights if record.query is None else record.query
    assert source is not None
    shape = record.shape_here[:3]
    sums, entropy, maximum = (torch.zeros(shape, device="cpu").float() for _ in range(3))
    found = Statistics(sums, entropy, maximum, torch.full(shape, -1, device="cpu"))
    if record.shape_here[3] == 0:
        return found
    with apart(source.device):
        for batch, heads, part in parts_of(record):
            weights = part.to(wide_dtype(part.dtype))
            largest, key = weights.max(-1)
            sums[batch, heads] = weights.sum(-1).float().cpu()
            entropy[batch, heads] = -torch.special.xlogy(weights, weights).sum(-1).float().cpu()
            maximum[batch, heads] = largest.float().cpu()
            found.most_attended[batch, heads] = key.cpu()
    return found


def _computed(record: AttentionRecord, batch: slice, heads: slice, causal: Tensor | None) -> Tensor:
    query, key, group = record.query, record.key, record.group
    assert query is not None
    assert key is not None
    assert record.scale is not None
    wide = wide_dtype(query.dtype)
    part = query[batch, heads].to(wide)
    keys = key[batch, heads.start // group : -(-heads.stop // group)].to(wide)
    entries, count, query_len, head_dim = part.shape
    # Heads that share keys are one taller matrix: no key is repeated.
    rows = (part * record.scale).reshape(entries, count // group, group * query_len, head_dim)
    scores = (rows @ keys.mT).reshape(entries, count, query_len, keys.shape[2])
    if record.score_change is not None:
        scores = record.score_change(scores, *_numbers(record, batch, heads))
    if record.bias is not None:
        scores += _share(record.bias, batch, heads).to(wide)
    given = None if record.given_mask is None else _share(record.given_mask, batch, heads)
    seen = _both(given, causal)
    if seen is not None:
        scores.masked_fill_(~seen, -torch.inf)
    weights = scores.softmax(-1)
    # A row without keys is NaN after the softmax; fused attention makes it zero.
    if record.bias is not None or record.score_change is not None:
        return weights.masked_fill_(scores.isneginf().all(-1, keepdim=True), 0.0)
    return weights if seen is None else weights.masked_fill_(~seen.any(-1, keepdim=True), 0.0)


def _causal(record: AttentionRecord) -> Tensor | None:
    """What causality permits the queries of a record, (query_len, key_len); None for all."""
    if record.causal is None:
        return None
    tensors = (record.query, record.kept_weights, record.output)
    device = next((tensor.device for tensor in tensors if tensor is not None), None)
    mask = causal_mask(*record.shape[2:], alignment=record.causal, device=device)
    return mask if record.queries is None else mask[record.queries.to(mask.device)]


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


def name_of(record: AttentionRecord) -> str:
    """Return what a record is called in messages: its layer, if it has one."""
    return record.layer or "the block"


def sharing(record: AttentionRecord, keys: Tensor | None) -> int:
    """Return how many query heads share one head of keys, or of values; 1 where there are none."""
    return 1 if keys is None else record.shape_here[1] // max(keys.shape[1], 1) or 1


def readable(count: int) -> str:
    """Bytes in words."""
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


def _both(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """What two masks permit; None is one that permits everything."""
    if one is None or other is None:
        return one if other is None else other
    return one & other


def _taken(
    tensor: Tensor | None, dim: int, numbers: Tensor, *, broadcast: bool = False
) -> Tensor | None:
    if tensor is None or (broadcast and tensor.shape[dim] == 1):
        return tensor
    return tensor.index_select(dim, numbers.to(tensor.device))
