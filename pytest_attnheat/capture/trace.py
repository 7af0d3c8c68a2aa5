"""`Trace`: the attention that happened within a capture, in order."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from ..failure import html_table
from ..inputs import misuse, whole_number
from .record import AttentionRecord
from .selection import COLUMNS, Selection, batch_entry, checked_patterns, listed, matches

if TYPE_CHECKING:
    from ..heatmaps.figure import HeatmapFigure


@dataclass(frozen=True)
class Unseen:
    """Something that looks like attention and could not be read."""

    layer: str  # The module in which it happened; empty outside of the model
    what: str  # What it was
    why: str  # Why it could not be read

    def __str__(self) -> str:
        """Where, what and why."""
        return f"{self.layer or '(no layer)'}: {self.what}: {self.why}"


class Trace(Sequence[AttentionRecord]):
    """The records of a capture, in the order in which attention happened.

    `trace[0]` and `trace[-1]` are records, `trace["encoder.layer.0.attention.self"]` is the only
    record of that layer, a slice is a trace.

    Attributes:
        unseen: What looked like attention and could not be read, and why.
        changes: What ran differently because of the capture; empty if nothing did.
        difference: With `verify=True`, how far the model's output is from its output without
            the capture: the largest difference, as a part of the largest number; else None.
    """

    def __init__(
        self,
        records: Iterable[AttentionRecord] = (),
        unseen: Iterable[Unseen] = (),
        changes: Iterable[str] = (),
        difference: float | None = None,
    ) -> None:
        self._records = list(records)
        self._unseen = dict.fromkeys(unseen)
        self._changes = dict.fromkeys(changes)
        self._within: set[str] = set()
        self.difference = difference

    @property
    def unseen(self) -> tuple[Unseen, ...]:
        """What looked like attention and could not be read."""
        return tuple(self._unseen)

    @property
    def changes(self) -> tuple[str, ...]:
        """What ran differently because of the capture."""
        return tuple(self._changes)

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the layers, in the order of their first attention."""
        return tuple(dict.fromkeys(record.layer for record in self._records))

    @property
    def steps(self) -> tuple[int, ...]:
        """The calls of the model, from 0, in which attention happened: steps of `generate()`."""
        return tuple(dict.fromkeys(record.step for record in self._records))

    def at(self, *, step: int) -> Trace:
        """Return a trace of one step, or ValueError if there is none; -1 is the last."""
        steps = self.steps
        wanted = steps[step] if -len(steps) <= step < 0 else step
        if wanted not in steps:
            raise ValueError(misuse("step", repr(step), f"one of {list(steps)}"))
        return self._with(record for record in self._records if record.step == wanted)

    @property
    def untrusted(self) -> tuple[AttentionRecord, ...]:
        """The records that their own output does not confirm."""
        return tuple(record for record in self._records if not record.trusted)

    def __len__(self) -> int:
        """How many records there are."""
        return len(self._records)

    def __iter__(self) -> Iterator[AttentionRecord]:
        """All records in order."""
        return iter(tuple(self._records))

    @overload
    def __getitem__(self, wanted: int | str) -> AttentionRecord: ...
    @overload
    def __getitem__(self, wanted: slice) -> Trace: ...
    def __getitem__(self, wanted: int | str | slice) -> AttentionRecord | Trace:
        """A record by number, or by the name of a layer that has one record; a slice of them."""
        if isinstance(wanted, slice):
            return self._with(self._records[wanted])
        if isinstance(wanted, int):
            return self._records[wanted]
        found = [record for record in self._records if record.layer == wanted]
        found = found or self._labelled(wanted)
        if len(found) == 1:
            return found[0]
        if found:
            several = f"{wanted!r}, which has {len(found)} records"
            accepted = f"a layer with one record; trace.select(layers={wanted!r}) takes all"
            raise KeyError(misuse("layer", several, accepted))
        raise KeyError(misuse("layer", repr(wanted), f"one of {_listed(self.layers)}"))

    def select(
        self,
        *,
        layers: str | Sequence[str] | None = None,
        heads: Selection | None = None,
        queries: Selection | None = None,
        call: int | None = None,
    ) -> Trace:
        """Return a trace of some layers, heads, queries or calls; nothing is copied.

        Args:
            layers: Names or patterns such as "*.self_attn"; that of a module means all within. What
                `show` labels a row with is a name, too.
            heads: Numbers of heads in each layer, or a slice.
            queries: Numbers of queries, or a slice; negative ones count from the end.
            call: Which attention of each layer, from 0: the decoding step, for instance.

        Raises:
            ValueError: Nothing is selected.
            TypeError: Layers are no names, or heads or queries no numbers.
        """
        patterns = checked_patterns(layers)
        labelled = [
            record
            for pattern in patterns or ()
            if not any(matches(record.layer, [pattern]) for record in self._records)
            for record in self._labelled(pattern)
        ]
        records = [
            record.select(heads=heads, queries=queries)
            for record in self._records
            if matches(record.layer, patterns) or any(record is other for other in labelled)
            if call in (None, record.call)
        ]
        if not records:
            asked = f"{layers!r} and {call!r}, of which there is no record"
            accepted = f"one or more of {_listed(self.layers)}, and a call of them"
            raise ValueError(misuse("layers and call", asked, accepted))
        return self._with(records)

    def show(
        self,
        *,
        tokens: Sequence[str] | None = None,
        batch: int = 0,
        query: int | None = None,
        **options: Any,
    ) -> HeatmapFigure:
        """Draw a row of heatmaps per record and a column per head, with `show_heatmaps`.

        What a query may not attend to is striped.

        Args:
            tokens: A label for each token; with fewer tokens than positions, as without
                padding, only these are drawn.
            batch: Which batch entry.
            query: Draw this query alone: a heatmap per record, in which each head is a column that
                runs down the tokens. A negative one counts from the end.
            **options: Those of `show_heatmaps`; `figsize="small"` shows a whole model at a glance.

        Raises:
            ValueError: There is nothing, or maps differ in shape: select layers or a call.
            TypeError: A query that is no number.
        """
        if not self._records:
            raise ValueError("trace.show: there is no record")
        if query is not None:
            most = max(record.shape[2] for record in self._records)
            chosen = self.select(queries=whole_number("query", query, least=-most))
            return chosen._show_query(tokens=tokens, batch=batch, options=options)
        maps, given = self._drawn(tokens, batch, options)
        from ..heatmaps.showing import show_heatmaps

        return show_heatmaps(maps, **given)

    def _show_query(
        self, *, tokens: Sequence[str] | None, batch: int, options: dict[str, Any]
    ) -> HeatmapFigure:
        """Draw the only query of the records: tokens down, heads across, a panel per record."""
        from ..heatmaps.showing import show_heatmaps

        maps, given = self._drawn(tokens, batch, {})
        mask, heads = given["mask"], self._records[0].heads
        numbers = {int(r.queries[0]) for r in self._records if r.queries is not None}
        (own,) = given.get("query_labels", [""])
        defaults = {
            "xlabel": "Heads", "ylabel": "Keys", "titles": given["row_titles"],
            "key_labels": None if heads is None else heads.tolist(),
            "query_labels": given.get("key_labels"),
            "title": f"Query {', '.join(map(str, sorted(numbers)))} {own}".rstrip(),
            "mask": None if mask is None else mask[:, :, 0].mT, "figsize": None,
        }  # fmt: skip
        return show_heatmaps(maps[:, :, 0].mT, **{**defaults, **options})

    def _drawn(
        self, tokens: Sequence[str] | None, batch: int, options: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return maps (records, heads, query_len, key_len), and what `show_heatmaps` is given."""
        shapes = {record.shape_here[1:] for record in self._records}
        if len(shapes) != 1:
            several = f"maps (heads, query_len, key_len) of shapes {sorted(shapes)}"
            accepted = "one shape: trace.select(layers=..., call=...)"
            raise ValueError(misuse("trace.show", several, accepted))
        (heads, _query_len, _key_len) = shapes.pop()
        entries = min(record.shape[0] for record in self._records)
        batch = batch_entry(batch, entries)
        maps = torch.cat([r.compute_weights(batch=batch).cpu() for r in self._records])
        if "mask" not in options:
            options = {**options, "mask": _masks(self._records, batch)}
        if tokens is not None:
            options, maps = _labelled(list(tokens), options, maps, self._records[0])
        numbers = self._records[0].heads
        columns = range(heads) if numbers is None else numbers.tolist()
        titles = _titles(self._records)
        defaults = {
            "xlabel": "Keys",
            "ylabel": "Queries",
            "titles": [f"Head {head}" for head in columns],
            "row_titles": _numbered(titles) if options.get("figsize") == "small" else titles,
            "figsize": None,
        }
        return maps, {**defaults, **options}

    def __str__(self) -> str:
        """A table: layer, source, shape, residual; and what was not seen or ran differently."""
        rows = [COLUMNS, *map(listed, self._records)]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            "  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        return "\n".join([*lines, *self._notes()])

    def _notes(self) -> list[str]:
        lines = [f"unseen   {unseen}" for unseen in self._unseen]
        lines += [f"changed  {change}" for change in self._changes]
        if self.difference is not None:
            lines.append(f"output   differs by {self.difference:.1e} from that without capture")
        return lines

    def _repr_html_(self) -> str:
        return html_table([COLUMNS, *map(listed, self._records)], below="\n".join(self._notes()))

    def __repr__(self) -> str:
        """How many records of how many layers."""
        return f"<Trace: {len(self)} records of {len(self.layers)} layers>"

    def _labelled(self, label: str) -> list[AttentionRecord]:
        """Return the records that pictures label so: all of a layer, or one call of it."""
        records, titles = self._records, _titles(self._records)
        shown = zip(records, _titles_of_layers(records), titles, _numbered(titles), strict=True)
        return [record for record, *texts in shown if label in texts]

    def _with(self, records: Iterable[AttentionRecord]) -> Trace:
        return Trace(records, self._unseen, self._changes, self.difference)

    def _append(self, record: AttentionRecord) -> None:
        self._records.append(record)

    def _replace(self, record: AttentionRecord, *others: AttentionRecord) -> None:
        place = self._records.index(record)
        self._records[place : place + 1] = others

    def _saw(self, running: Iterable[str]) -> None:
        self._within.update(running)

    def _miss(self, unseen: Unseen) -> None:
        self._unseen[unseen] = None

    def _change(self, change: str) -> None:
        self._changes[change] = None


def _listed(layers: Sequence[str]) -> str:
    shown = ", ".join(layers[:8])
    return f"{shown} and {len(layers) - 8} more" if len(layers) > 8 else shown or "none"


def _titles(records: Sequence[AttentionRecord]) -> list[str]:
    """The layer of each record, as short as tells it, and the call where there are several."""
    names = _titles_of_layers(records)
    several = len(set(names)) < len(names)
    return [
        f"{name}, call {record.call}".lstrip(", ") if several else name
        for name, record in zip(names, records, strict=True)
    ]


def _titles_of_layers(records: Sequence[AttentionRecord]) -> list[str]:
    layers = [record.layer for record in records]
    return _short(layers) if len(set(layers)) > 1 else layers


def _numbered(titles: list[str]) -> list[str]:
    """Name layers by their numbers, where each title has one of its own; small panels need it."""
    numbers = [re.findall(r"\d+", title) for title in titles]
    alone = all(len(found) == 1 for found in numbers) and len(set(map(tuple, numbers))) > 1
    return [f"Layer {found[0]}" for found in numbers] if alone else titles


def _masks(records: Sequence[AttentionRecord], batch: int) -> Tensor | None:
    """What each query may attend to, (records, heads, query_len, key_len); None for everything."""
    masks = [None if record.mask_lost else record.mask for record in records]
    if all(mask is None for mask in masks):
        return None
    whole = []
    for record, mask in zip(records, masks, strict=True):
        seen = torch.ones(1, 1, 1, 1, dtype=torch.bool) if mask is None else mask.cpu()
        seen = seen[(None,) * (4 - seen.ndim)]
        seen = seen[batch : batch + 1] if seen.shape[0] > 1 else seen
        whole.append(seen.expand(1, *record.shape_here[1:]))
    return torch.cat(whole)


def _short(names: Sequence[str]) -> list[str]:
    """Names without the parts that all of them share at either end."""
    parts = [name.split(".") for name in names]
    while min(map(len, parts)) > 1 and len({tuple(p[-1:]) for p in parts}) == 1:
        parts = [p[:-1] for p in parts]
    while min(map(len, parts)) > 2 and len({tuple(p[:1]) for p in parts}) == 1:
        parts = [p[1:] for p in parts]
    return [".".join(p) for p in parts]


def _labelled(
    tokens: list[str], options: dict[str, Any], maps: Tensor, record: AttentionRecord
) -> tuple[dict[str, Any], Tensor]:
    query_len, key_len = record.shape[2:]
    if not tokens or len(tokens) > key_len:
        raise ValueError(misuse("tokens", f"{len(tokens)} tokens", f"1 to {key_len} of them"))
    # The queries of a decoding step are the last of the tokens.
    first = len(tokens) - query_len if query_len < key_len else 0
    numbers = range(query_len) if record.queries is None else record.queries.tolist()
    kept = [place for place, number in enumerate(numbers) if 0 <= number + first < len(tokens)]
    if not kept:
        none = f"{len(tokens)} tokens, which end before the queries {list(numbers)}"
        raise ValueError(misuse("tokens", none, "tokens up to one of the queries"))
    labels = [tokens[numbers[place] + first] for place in kept]
    maps = maps[:, :, kept, : len(tokens)]
    mask = options.get("mask")
    if mask is not None and mask.shape[-2:] == (query_len, key_len):
        options = {**options, "mask": mask[..., kept, : len(tokens)]}
    return {"key_labels": tokens, "query_labels": labels, **options}, maps
