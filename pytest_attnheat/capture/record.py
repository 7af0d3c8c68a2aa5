"""`AttentionRecord`: one attention that happened inside a model."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pytest_attnheat.attention.reference import causal_mask
from pytest_attnheat.attention.vocabulary import Alignment, permits
from pytest_attnheat.capture.errors import CaptureMemoryError

# (scores, batch, heads, queries) -> scores: scores (batch, heads, query_len, key_len) of the
# batch entries, heads and queries whose numbers in the whole attention the others are.
ScoreChange = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
# What may be selected: a number, several, or a slice.
Selection = int | slice | Sequence[int]


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
                f'{self.layer}: the mask is not known any more: keep="statistics" keeps none'
            )
        causal = None if self.causal is None else self._causal(self.causal)
        return _both(self.mask_besides_causality, causal)

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
        return 1 if self.key is None else _group(self.shape_here[1], self.key)

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
        from pytest_attnheat.capture.computing import weights_of

        if not dtype.is_floating_point:
            raise TypeError(f"got dtype={dtype}; accepted are torch.float32, torch.float64 ...")
        entry = None if batch is None else int(chosen("batch", [batch], self.shape[0], self.layer))
        if self.kept_weights is not None:
            kept = self.kept_weights
            return (kept if entry is None else kept[entry : entry + 1]).to(dtype, copy=True)
        if self.query is None or self.key is None:
            raise ValueError(
                f"{self.layer}: weights cannot be computed any more: keep="
                '"statistics" keeps neither them nor query and key'
            )
        shape = self.shape_here if entry is None else (1, *self.shape_here[1:])
        needed = math.prod(shape) * dtype.itemsize
        if needed > self.most_bytes:
            raise CaptureMemoryError(
                f"{self.layer or 'the block'}: weights {shape} in {dtype} take "
                f"{readable(needed)}; allowed are {readable(self.most_bytes)}. Accepted: "
                "record.select(heads=[0], queries=range(64)).weights, or a larger max_bytes"
            )
        return weights_of(self, dtype, entry)

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
            record = record._with_heads(self._positions("heads", heads, self.shape[1], self.heads))
        if queries is not None:
            rows = self._positions("queries", queries, self.shape[2], self.queries)
            record = record._with_queries(rows)
        return record

    def _positions(
        self, what: str, wanted: Selection, count: int, kept: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Numbers in the whole attention, and where they are in what is kept."""
        numbers = chosen(what, wanted, count, self.layer)
        if kept is None:
            return numbers, numbers
        places = {int(number): place for place, number in enumerate(kept)}
        absent = [int(number) for number in numbers if int(number) not in places]
        if absent:
            raise ValueError(
                f"{self.layer}: {what} {absent} were not kept; kept are {kept.tolist()}"
            )
        here = [places[int(number)] for number in numbers]
        return numbers, torch.tensor(here, device="cpu")

    def _with_heads(self, positions: tuple[Tensor, Tensor]) -> AttentionRecord:
        numbers, places = positions
        keys = places // self.group
        group = None if self.value is None else _group(self.shape_here[1], self.value)
        values = None if group is None else places // group
        return replace(
            self,
            heads=numbers,
            query=_taken(self.query, 1, places),
            key=_taken(self.key, 1, keys),
            value=_taken(self.value, 1, values),
            output=_taken(self.output, 1, places),
            given_mask=_taken(self.given_mask, 1, places, broadcast=True),
            bias=_taken(self.bias, 1, places, broadcast=True),
            kept_weights=_taken(self.kept_weights, 1, places),
            statistics=self._statistics(1, places),
        )

    def _with_queries(self, positions: tuple[Tensor, Tensor]) -> AttentionRecord:
        numbers, places = positions
        return replace(
            self,
            queries=numbers,
            query=_taken(self.query, 2, places),
            output=_taken(self.output, 2, places),
            given_mask=_taken(self.given_mask, 2, places, broadcast=True),
            bias=_taken(self.bias, 2, places, broadcast=True),
            kept_weights=_taken(self.kept_weights, 2, places),
            statistics=self._statistics(2, places),
        )

    def _statistics(self, dim: int, places: Tensor) -> Statistics | None:
        if self.statistics is None:
            return None
        return Statistics(
            *(part.index_select(dim, places) for part in vars(self.statistics).values())
        )

    def _causal(self, alignment: Alignment) -> Tensor:
        device = next(
            (t.device for t in (self.query, self.kept_weights, self.output) if t is not None), None
        )
        mask = causal_mask(self.shape[2], self.shape[3], alignment=alignment, device=device)
        return mask if self.queries is None else mask[self.queries.to(mask.device)]


def selection(what: str, wanted: Any, where: str = "capture_attention") -> slice | list[int]:
    """Return a selection as a slice or whole numbers.

    Raises:
        TypeError: It is neither a number, nor several, nor a slice.
    """
    if isinstance(wanted, slice):
        return wanted
    several = isinstance(wanted, Iterable) and not isinstance(wanted, str | bytes | Mapping)
    if isinstance(wanted, Tensor):
        wanted = wanted.tolist()
        several = isinstance(wanted, list)
    numbers = list(wanted) if several else [wanted]
    if any(isinstance(number, bool) or not hasattr(number, "__index__") for number in numbers):
        raise TypeError(
            f"{where}: got {what}={wanted!r}; accepted are a number, several, or a slice"
        )
    return [operator.index(number) for number in numbers]


def chosen(what: str, wanted: Selection, count: int, where: str) -> Tensor:
    """Return the numbers that a selection means, of `count`."""
    where = where or "capture_attention"
    asked = selection(what, wanted, where)
    numbers = list(range(count))[asked] if isinstance(asked, slice) else asked
    if not numbers or not all(-count <= number < count for number in numbers):
        raise ValueError(
            f"{where}: got {what}={wanted!r}; "
            f"accepted are numbers from 0 to {count - 1}, or a slice of them"
        )
    return torch.tensor([number % count for number in numbers], device="cpu")


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


def _group(heads: int, keys: Tensor) -> int:
    return heads // max(keys.shape[1], 1) or 1


def _taken(
    tensor: Tensor | None, dim: int, places: Tensor | None, *, broadcast: bool = False
) -> Tensor | None:
    if tensor is None or places is None or (broadcast and tensor.shape[dim] == 1):
        return tensor
    return tensor.index_select(dim, places.to(tensor.device))
