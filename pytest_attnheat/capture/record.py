"""`AttentionRecord`: one attention that happened inside a model, and its weights in parts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..attention.blocks import weights as weights_of
from ..attention.call import Call, ScoreMod
from ..attention.chunks import pieces
from ..attention.lazy import LazyWeights
from ..attention.reference import causal_mask
from ..attention.vocabulary import Alignment, both, permits
from ..callables import apart
from ..inputs import dtype_name, misuse, readable, wide_dtype
from . import CaptureMemoryError
from .carried import Carried
from .selection import Selection, batch_entry, chosen, float_dtype, listed, taken, within

# Weights that were kept are looked at so many bytes at a time.
_PART_BYTES = 16 * 2**20
# Weights that are smaller may be 0 by rounding.
_SEEN = 1e-6

# Of what a record that is a part of an attention holds but some.
Part = Literal["", "keys", "queries"]


@dataclass(frozen=True)
class Statistics:
    """What a distribution over keys is like, without the keys: float32, on the CPU."""

    row_sum: Tensor = field(repr=False)  # (batch, heads, query_len)
    entropy: Tensor = field(repr=False)  # (batch, heads, query_len), in nats
    maximum: Tensor = field(repr=False)  # (batch, heads, query_len): the largest weight
    most_attended: Tensor = field(repr=False)  # Of (b, heads, queries): that key; -1 without keys


@dataclass(frozen=True, eq=False, repr=False)
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
        soft_mask: Whether scores were replaced by a finite number to hide their keys.
        bias: Added to the scores, broadcastable to the weights; None for none.
        causal: The alignment, if the attention was told to be causal.
        scale: What scores were multiplied by; None if it is not known. A number that query or
            key were multiplied by themselves is counted in, and taken out of them.
        scale_steps: The numbers that scores were multiplied by, as they came.
        scaled_before: What queries and keys had been multiplied by; NaN where that cannot be
            known, as they went through what is not understood since.
        softcap: Before a bias, scores were softcap * tanh(score / softcap); None for no softcap.
        sinks: (heads,), a score of each head that joined the sum of its rows; None for none.
            Rows of weights then sum to 1 minus `sink_weights`.
        sink_weights: (batch, heads, query_len); None where there are no sinks.
        score_mod: What else was done to the scores; None for nothing.
        strange: What was done to the scores that is not understood, if anything: scale, softcap
            and sinks are not known then.
        mask_lost: Whether that may have hidden keys, and no mask was seen.
        doubt: What about its shape is a guess; empty if the call says all.
        kind: "linear" if the weights are those that linear attention implies and never holds,
            "pooling" if they are a softmax of what was not seen to be queries times keys, "mixed"
            if heads or softmaxes were put together after it: rows need not sum to 1.
        part: "keys" if other keys of its rows went where they are not recorded: no row is whole.
            "queries" if its module put other queries beside them: all are numbered from 0.
        carried: What its module carries, which says what its attention should be.
        dropout: The probability with which weights were dropped after the softmax.
        heads: Which heads of the layer these are; None for all.
        queries: Which queries these are; None for all.
        training: Whether that module was in training mode.
        call: How many attentions this layer had performed before, in this capture.
        step: How often the model itself had been called before: the step of `generate()`.
        residual: How far weights times value are from the output, in rows that were compared
            when it was captured: the worst row, relative to what its weights and the sizes of
            the values make. NaN where that cannot be asked; `unverified` says why.
        tolerance: The residual up to which it is trusted.
        unverified: Why there is no residual.
        statistics: With `keep="statistics"`.
    """

    layer: str
    source: str
    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    output: Tensor | None = None
    given_mask: Tensor | None = None
    soft_mask: bool = False
    bias: Tensor | None = None
    causal: Alignment | None = None
    scale: float | None = None
    dropout: float = 0.0
    heads: Tensor | None = None
    queries: Tensor | None = None
    call: int = 0
    step: int = 0
    training: bool = False
    residual: float = float("nan")
    tolerance: float = 0.0
    unverified: str = ""
    statistics: Statistics | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    sink_weights: Tensor | None = None
    score_mod: ScoreMod | None = None
    strange: str = ""
    mask_lost: bool = False
    doubt: str = ""
    kind: Literal["attention", "linear", "pooling", "mixed"] = "attention"
    part: Part = ""
    scale_steps: tuple[float, ...] = ()
    scaled_before: tuple[float, ...] = ()
    carried: tuple[Carried, ...] = ()
    kept_weights: Tensor | None = None
    weights_dtype: torch.dtype = torch.float32
    most_bytes: int = 2**30

    def __repr__(self) -> str:
        return f"<AttentionRecord {'  '.join(listed(self))}>"

    @property
    def weights(self) -> Tensor:
        """(batch, heads, query_len, key_len): per head, before dropout; computed at each access.

        Raises:
            ValueError: Only statistics were kept.
            CaptureMemoryError: They would take more than the capture's `max_bytes`.
        """
        return self.compute_weights(self.weights_dtype)

    @property
    def lazy_weights(self) -> LazyWeights:
        """The same, read a block of rows at a time and never held; see `LazyWeights`.

        Raises:
            ValueError: It is not known well enough as a call.
        """
        return LazyWeights.of_call(self.as_call(), self.weights_dtype)

    @property
    def mask(self) -> Tensor | None:
        """Boolean, True where a query may attend, broadcastable to the weights; None for all.

        The mask that was given, causality and biases that hide a key (-inf, -1e9 ...) together.

        Raises:
            ValueError: Only statistics were kept, or a mask may have been lost.
        """
        if self.statistics is not None:
            raise ValueError(
                f'{name_of(self)}: the mask is not known any more: keep="statistics" keeps none'
            )
        if self.mask_lost:
            raise ValueError(f"{name_of(self)}: the mask is not known: its scores {self.strange}")
        return both(self.mask_besides_causality, _causal(self))

    @property
    def hides_softly(self) -> bool:
        """Whether finite numbers hide keys: rows of nothing else hold what rounding makes."""
        soft = self.bias is not None and bool((~permits(self.bias) & self.bias.isfinite()).any())
        return self.soft_mask or soft

    @property
    def judged_mask(self) -> Tensor | None:
        """The mask, True in rows that hold what rounding makes; raises as `mask` does."""
        mask = self.mask
        return mask if mask is None or not self.hides_softly else mask | ~mask.any(-1, keepdim=True)

    @property
    def mask_besides_causality(self) -> Tensor | None:
        """The mask that was given, and biases that hide a key, together; None for everything."""
        if self.bias is None:
            return self.given_mask
        seen = permits(self.bias)
        return self.given_mask if bool(seen.all()) else both(self.given_mask, seen)

    @property
    def masked_late(self) -> Tensor | None:
        """Where weights are not set to 0 after the softmax, as by a mask that was applied there.

        Boolean, broadcastable to the weights; None where none are. What is 0 must be alike in all
        heads, or of one head only grow fewer from row to row: dropout is neither.
        """
        known = (self.kept_weights, self.query, self.key, self.scale)
        if any(part is None for part in known) or self.strange or self.mask_lost:
            return None
        kept = self.compute_weights(torch.float64)
        whole = replace(self, kept_weights=None).compute_weights(torch.float64)
        cut, used = (kept == 0) & (whole > _SEEN), kept != 0
        hidden = cut.any(1, keepdim=True)
        alike = kept.shape[1] > 1 or not bool((hidden[:, :, 1:] & ~hidden[:, :, :-1]).any())
        if not alike or not bool(hidden.any()) or bool((used & hidden).any()):
            return None
        return ~hidden

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

    def as_call(self, *, batch: int | None = None) -> Call:
        """Return the call of attention that this was, of what was selected.

        Args:
            batch: The only batch entry of it; None for all.

        Raises:
            ValueError: It is not known well enough.
        """
        known = self.query, self.key, self.value, self.scale
        if any(part is None for part in known):
            why = f"its scores {self.strange}" if self.strange else "they were not kept"
            raise ValueError(f"{name_of(self)}: queries, keys or scale are not known: {why}")
        some = slice(None) if batch is None else slice(batch, batch + 1)
        query, key, value = (t[some] for t in (self.query, self.key, self.value) if t is not None)
        if key.shape[1] != value.shape[1]:  # more query heads share the one than the other
            heads = max(key.shape[1], value.shape[1])
            key, value = (t.repeat_interleave(heads // t.shape[1], 1) for t in (key, value))
        mask, causal = self.given_mask, self.causal
        if self.queries is not None:
            mask, causal = both(mask, _causal(self)), None
        return Call(
            query, key, value, mask=_entries(mask, some), bias=_entries(self.bias, some),
            causal=causal is not None, alignment=causal or "top_left", scale=self.scale,
            softcap=self.softcap, sinks=self.sinks, score_mod=self._renumbered(batch or 0),
        )  # fmt: skip

    def _renumbered(self, first: int) -> ScoreMod | None:
        """The function of scores, called with numbers of what was selected."""
        function, heads, queries = self.score_mod, self.heads, self.queries
        if function is None or (first == 0 and heads is None and queries is None):
            return function

        def change(
            score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor
        ) -> Tensor:
            head = head if heads is None else heads.to(head.device)[head]
            query = query if queries is None else queries.to(query.device)[query]
            return function(score, batch + first, head, query, key)

        return change

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
        if self.query is None:
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
        with apart():
            weights = torch.empty(shape, dtype=dtype, device=self.query.device)
            for maps, rows, part in parts_of(self, entry, weights.flatten(0, 1)):
                own, hidden = weights.flatten(0, 1)[maps, rows].tensor_split([part.shape[-1]], -1)
                if not own.is_set_to(part):
                    own.copy_(part)
                hidden.zero_()  # What causality hides.
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
            numbers, here = self._found("queries", queries, self.shape[2], self.queries)
            record = replace(record.of_rows(2, here), queries=numbers)
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
            self.of_rows(1, here),
            heads=numbers,
            key=taken(self.key, 1, here // self.group),
            value=taken(self.value, 1, here // sharing(self, self.value)),
        )

    def of_rows(self, dim: int, here: Tensor) -> AttentionRecord:
        """Take some of what there is per query head (`dim` 1) or per query (2)."""
        statistics = None
        if self.statistics is not None:
            parts = vars(self.statistics).values()
            statistics = Statistics(*(part.index_select(dim, here) for part in parts))
        names = ("query", "output", "given_mask", "bias", "sink_weights", "kept_weights")
        kept: dict[str, Any] = {
            name: taken(getattr(self, name), dim, here, broadcast=name in ("given_mask", "bias"))
            for name in names
        }
        sinks = self.sinks if dim == 2 else taken(self.sinks, 0, here)
        return replace(self, **kept, sinks=sinks, statistics=statistics)


def parts_of(
    record: AttentionRecord, entry: int | None = None, into: Tensor | None = None
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Go through the weights of a record in parts of bounded size; see `apart`."""
    # A record without weights is known as a call; then they are computed in float32 or, where the
    # model was in it, float64. Yields some maps, counted through batch entries and heads (of one
    # entry, if one is wanted), some of their queries, and the weights; those of the last keys may
    # be left out where they are zero. `into`: memory to make them in, where that spares a copy.
    kept = record.kept_weights
    if 0 in record.shape_here:
        return
    if kept is None:
        call = record.as_call(batch=entry)
        yield from weights_of(call, wide_dtype(call.query.dtype), into=into)
        return
    kept = (kept if entry is None else kept[entry : entry + 1]).flatten(0, 1)
    for maps, rows, _ in pieces(kept.shape, max(_PART_BYTES // kept.itemsize, 1)):
        yield maps, rows, kept[maps, rows]


def statistics_of(record: AttentionRecord) -> Statistics:
    """Return what the rows of a record are like; its weights are never held at once."""
    shape = record.shape_here[:3]
    sums, entropy, maximum = (torch.zeros(shape, device="cpu").float() for _ in range(3))
    found = Statistics(sums, entropy, maximum, torch.full(shape, -1, device="cpu"))
    if record.shape_here[3] == 0:
        return found
    with apart():
        totals = [total.flatten(0, 1) for total in (sums, entropy, maximum, found.most_attended)]
        for *where, part in parts_of(record):
            wide = part.to(wide_dtype(part.dtype))
            largest, key = wide.max(-1)
            # Faster than `xlogy`; of weights without a logarithm nothing is left either way.
            entropies = -wide.clamp_min(torch.finfo(wide.dtype).tiny).log_().mul_(wide).sum(-1)
            for total, of_part in zip(totals, (wide.sum(-1), entropies, largest, key), strict=True):
                total[tuple(where)] = of_part.to(total)
    return found


def _causal(record: AttentionRecord) -> Tensor | None:
    """What causality permits the queries of a record, (query_len, key_len); None for all."""
    if record.causal is None:
        return None
    tensors = (record.query, record.kept_weights, record.output)
    device = next((tensor.device for tensor in tensors if tensor is not None), None)
    mask = causal_mask(*record.shape[2:], alignment=record.causal, device=device)
    return mask if record.queries is None else mask[record.queries.to(mask.device)]


def _entries(tensor: Tensor | None, some: slice) -> Tensor | None:
    return tensor if tensor is None or tensor.shape[0] == 1 else tensor[some]


def name_of(record: AttentionRecord) -> str:
    """Return what a record is called in messages: its layer, if it has one."""
    return record.layer or "the block"


def sharing(record: AttentionRecord, keys: Tensor | None) -> int:
    """Return how many query heads share one head of keys, or of values; 1 where there are none."""
    return 1 if keys is None else record.shape_here[1] // max(keys.shape[1], 1) or 1
