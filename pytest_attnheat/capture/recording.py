"""`Recording`: takes the attention that a watcher saw, as far as it is wanted, into a trace."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..attention.tolerance import residual_tolerance
from ..callables import copied
from ..inputs import readable, wide_dtype
from . import CaptureMemoryError
from .carried import Carried, carried_by
from .record import AttentionRecord, Part, name_of, parts_of, sharing, statistics_of
from .selection import Selection, matches
from .tags import Tags
from .trace import Trace, Unseen
from .watching import Layers, Refused

Keep = Literal["inputs", "weights", "statistics"]
KEPT: tuple[Keep, ...] = get_args(Keep)
# So many queries of each head are compared while the model runs.
_SAMPLED = 8
_TENSORS = (
    "query", "key", "value", "output", "given_mask", "bias", "sinks", "sink_weights", "kept_weights"
)  # fmt: skip
# What is kept beside weights.
_WITH_WEIGHTS = ("given_mask", "bias", "sinks", "sink_weights")


@dataclass(frozen=True)
class Wanted:
    """What a capture keeps."""

    keep: Keep  # Inputs, from which weights are computed when asked for; weights; or statistics
    layers: Sequence[str] | None  # Patterns of layer names; None for all
    heads: Selection | None  # Which heads; None for all
    queries: Selection | None  # Which queries; None for all
    max_bytes: int  # What all records, and the weights of one, may take
    dtype: torch.dtype  # That of the weights

    def wants(self, layer: str) -> bool:
        """Whether a layer is wanted: its name, or that of a module around it, is matched."""
        return matches(layer, self.layers)


class Recording:
    """What one capture is told, and the trace that comes of it."""

    def __init__(self, wanted: Wanted, layers: Layers, trace: Trace) -> None:
        self._wanted, self._layers, self._trace = wanted, layers, trace
        self._calls: Counter[str] = Counter()
        self._bytes = 0
        self._expected: dict[int, str] = {}

    def take(self, record: AttentionRecord, used: Tensor | None, tags: Tags) -> _Taken | None:
        """Keep what is wanted of an attention that happened."""
        layer = self._layers.current
        if layer is None:
            self.miss(record.source, "it happened outside of the model that is captured")
            return None
        self._trace._saw(self._layers.running)
        if not self._wanted.wants(layer):
            return None
        record = replace(
            record, layer=layer, call=self._calls[layer], step=max(self._layers.step, 0),
            training=self._layers.training, tolerance=residual_tolerance(record.dtype),
            weights_dtype=self._wanted.dtype, most_bytes=self._wanted.max_bytes,
            carried=tuple(self._carried(layer, record, tags)),
        )  # fmt: skip
        self._calls[layer] += 1
        try:
            selected = self._selected(record)
            asked = self._make_room(record)
        except (CaptureMemoryError, ValueError) as error:
            raise Refused(error) from error
        kept = self._kept(selected, used)
        self._trace._append(kept)
        return _Taken(self, kept, asked)

    def _carried(self, layer: str, record: AttentionRecord, tags: Tags) -> Iterator[Carried]:
        """What the module carries. Sinks that were used, and did not join, are used otherwise."""
        for one in carried_by(self._layers.ran.get(layer)):
            if one.feature != "sinks":
                yield one
            elif record.sinks is not None or not tags.was_used(one.value):
                yield replace(one, value=copied(one.value))

    def miss(self, what: str, why: str) -> None:
        """Note what cannot be read."""
        self._trace._miss(Unseen(self._layers.current or "", what, why))

    def expect(self, number: int) -> None:
        """Remember where a softmax happened that should become attention."""
        layer = self._layers.current
        if layer is not None:
            self._expected[number] = layer

    def found(self, numbers: tuple[int, ...]) -> None:
        """Forget those that did."""
        for number in numbers:
            self._expected.pop(number, None)

    def note(self, kind: str) -> None:
        """Note in which modules something ran."""
        self._layers.noted[kind].update(self._layers.running)

    def unread(self) -> list[Unseen]:
        """The softmaxes of which no attention was seen to come."""
        why = "its result went into something that is not understood"
        return [Unseen(layer, "softmax of queries times keys", why)
                for layer in dict.fromkeys(self._expected.values())]  # fmt: skip

    def _selected(self, record: AttentionRecord) -> AttentionRecord:
        if self._wanted.heads is None and self._wanted.queries is None:
            return record
        return record.select(heads=self._wanted.heads, queries=self._wanted.queries)

    def _make_room(self, record: AttentionRecord) -> int:
        """Raise before memory is spent; return how much will be."""
        asked = self._needed(record, self._wanted.keep)
        if self._bytes + asked > self._wanted.max_bytes:
            raise CaptureMemoryError(self._too_much(record, asked))
        self._bytes += asked
        return asked

    def _needed(self, record: AttentionRecord, keep: Keep) -> int:
        """How many bytes a record takes; worked out on shapes alone."""
        light = record
        if self._wanted.heads is not None or self._wanted.queries is not None:
            light = self._selected(_mapped(record, _TENSORS, lambda tensor: tensor.to("meta")))
        rows = light.shape_here[0] * light.shape_here[1] * light.shape_here[2]
        sizes = {n: _bytes(getattr(light, n)) for n in _TENSORS}
        if keep == "statistics":
            return rows * (3 * 4 + 8) + sizes["sink_weights"]
        if keep == "inputs":
            return sum(sizes.values())
        weights = rows * light.shape_here[3] * self._wanted.dtype.itemsize
        return weights + sum(sizes[name] for name in _WITH_WEIGHTS)

    def _too_much(self, record: AttentionRecord, asked: int) -> str:
        keep = self._wanted.keep
        lines = [
            f"capture_attention: attention {record.shape} in {name_of(record)} "
            f"takes {readable(asked)} with keep={keep!r}; {len(self._trace)} records hold "
            f"{readable(self._bytes)} of the {readable(self._wanted.max_bytes)} allowed.",
            "  accepted: layers=['...'], heads=[0], queries=slice(0, 64), max_bytes=...",
        ]
        less = {k: self._needed(record, k) for k in KEPT if k != keep}
        lines += [
            f"  or keep={k!r}, which takes {readable(size)} of it"
            for k, size in less.items()
            if size < asked
        ]
        return "\n".join(lines)

    def _kept(self, record: AttentionRecord, used: Tensor | None) -> AttentionRecord:
        used = None if used is None else _selected_weights(used, record)
        record = _verified(record, used)
        if self._wanted.keep == "inputs":
            return _mapped(record, _TENSORS, copied)
        if self._wanted.keep == "statistics":
            kept = replace(record, statistics=statistics_of(record), score_mod=None)
            kept = _mapped(kept, ("sink_weights",), copied)
            others = [name for name in _TENSORS if name != "sink_weights"]
            return _mapped(kept, others, lambda tensor: None)
        kept = replace(record, kept_weights=record.weights.detach(), score_mod=None)
        kept = _mapped(kept, _WITH_WEIGHTS, copied)
        return _mapped(kept, ("query", "key", "value", "output"), lambda tensor: None)


@dataclass
class _Taken:
    """A record in the trace; None once another takes its place."""

    recording: Recording
    record: AttentionRecord | None
    size: int

    def undo(self) -> None:
        if self.record is not None:
            self.recording._trace._replace(self.record)
            self.recording._calls[self.record.layer] -= 1
            self.recording._bytes -= self.size
            self.record = None

    def mark(self, part: Part) -> None:
        """Say of what it is a part."""
        if self.record is not None:
            marked = replace(self.record, part=part)
            self.recording._trace._replace(self.record, marked)
            self.record = marked


def _verified(record: AttentionRecord, used: Tensor | None) -> AttentionRecord:
    """The record with its residual, in a few queries of every head."""
    if record.dropout > 0 and used is None:
        return replace(record, unverified=f"dropout of {record.dropout:g} was applied within")
    output, query = record.output, record.query
    assert output is not None
    if output.shape[-1] == 0 or (query is not None and query.shape[-1] == 0):
        return replace(record, unverified="its queries or values have no channels")
    worst = _worst_row(_sampled(record if used is None else replace(record, kept_weights=used)))
    # NaN, perhaps in a row that was not compared. The sum tells with one read, if it is finite.
    residual = float(torch.where(output.sum().isfinite(), worst, torch.inf))
    if residual == torch.inf:
        residual = float(torch.where(output.isfinite().all(), worst, torch.inf))
    return replace(record, residual=residual)


def _sampled(record: AttentionRecord) -> AttentionRecord:
    """The record of a few queries: the first, the last, and some between."""
    query_len = record.shape_here[2]
    if query_len <= _SAMPLED:
        return record
    here = torch.linspace(0, query_len - 1, _SAMPLED, device="cpu").round().long()
    numbers = here if record.queries is None else record.queries[here]
    return replace(record.of_rows(2, here), queries=numbers)


def _worst_row(record: AttentionRecord) -> Tensor:
    """How far weights times value are from the output, in the worst row: a number on the device."""
    # Each row of the difference (its rms over the channels) is divided by that of the weights times
    # the sizes of the values: values that cancel do not make a rounding error large.
    value, output = record.value, record.output
    assert value is not None
    assert output is not None
    wide = wide_dtype(output.dtype)
    worst = torch.zeros((), dtype=wide, device=output.device)
    outputs, values_of = output.flatten(0, 1), value.flatten(0, 1)
    # Which value each query head uses: groups share one, and none is shared by batch entries.
    own = torch.arange(len(outputs), device=value.device) // sharing(record, value)
    for maps, rows, part in parts_of(record):
        weights, values = part.to(wide), values_of[own[maps], : part.shape[-1]].to(wide)
        # Norms over as many channels: their ratio is that of the rms.
        made = weights @ values - outputs[maps, rows].to(wide)
        off = torch.linalg.vector_norm(made, dim=-1)
        size = torch.linalg.vector_norm(weights.abs() @ values.abs(), dim=-1)
        # Zero by zero, a row without keys, is no error. NaN is one.
        relative = torch.where(off == 0, 0.0, off / size).nan_to_num(nan=torch.inf)
        if relative.numel():
            worst = worst.maximum(relative.max())
    return worst


def _selected_weights(used: Tensor, record: AttentionRecord) -> Tensor:
    for dim, numbers in ((1, record.heads), (2, record.queries)):
        if numbers is not None:
            used = used.index_select(dim, numbers.to(used.device))
    return used


def _mapped(
    record: AttentionRecord, names: Sequence[str], change: Callable[[Tensor], Tensor | None]
) -> AttentionRecord:
    """The record with some of its tensors replaced by what a function makes of them."""
    tensors = {name: getattr(record, name) for name in names}
    changed: dict[str, Any] = {n: None if t is None else change(t) for n, t in tensors.items()}
    return replace(record, **changed)


def _bytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.itemsize
