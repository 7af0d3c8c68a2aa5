"""How strongly a few outputs depend on a few places, each of which is replaced alone."""

from __future__ import annotations

import torch
from torch import Tensor

from pytest_attnheat.assertions.behaviour.leak_search import Search
from pytest_attnheat.assertions.behaviour.scenes import Replacement
from pytest_attnheat.assertions.behaviour.subject import as_of_keys
from pytest_attnheat.heatmaps.terminal import format_heatmap, map_name

# A picture takes one call of the subject for each of its columns.
_ROWS, _COLUMNS = 6, 16


def entry_name(lead: tuple[int, ...]) -> str:
    """Name a batch entry, or a head where there are both."""
    return f"batch entry {lead[0]}" if len(lead) == 1 else map_name(lead)


def own_places(search: Search, places: Tensor, observer: tuple[int, ...]) -> Tensor:
    """The places in the keys that an observer shares, (key_len,)."""
    return places[key_entry(search, observer)]


def key_entry(search: Search, observer: tuple[int, ...]) -> tuple[int, ...]:
    """Return the batch entry and the head of the keys that an observer sees."""
    return as_of_keys(observer[:-1], search.scene.groups)


def spread(search: Search, own: Tensor, observer: tuple[int, ...]) -> Tensor:
    """Places of one batch entry and head among those of all."""
    places = torch.zeros(places_shape(search), dtype=torch.bool, device=own.device)
    places[key_entry(search, observer)] = own
    return places


def places_shape(search: Search) -> tuple[int, ...]:
    """Return the shape of what a replacement takes as its places."""
    *leading, _, key_len = search.scene.may_see.shape
    return (*as_of_keys(leading, search.scene.groups), key_len)


class Crop:
    """How strongly a few observers depend on a few places, each replaced alone."""

    def __init__(self, search: Search, observer: tuple[int, ...], place: int, content: str) -> None:
        self.search, self.observer = search, observer
        content = "nan" if content == "nan" else "larger"
        scene = search.scene
        query_len, key_len = scene.may_see.shape[-2:]
        self.rows = _window(observer[-1], query_len, _ROWS)
        self.columns = _window(place, key_len, _COLUMNS)
        lead = observer[:-1]
        self.seen_rightly = scene.may_see[lead][self.rows, self.columns].cpu()
        self.judged = scene.judged[lead][self.rows].cpu()
        changes = []
        for column in range(self.columns.start, self.columns.stop):
            own = torch.zeros(key_len, dtype=torch.bool, device=scene.may_see.device)
            own[column] = True
            replaced = Replacement(spread(search, own, observer), None, content)
            changes.append(search.change(replaced)[lead][self.rows].cpu())
        self.changes = torch.stack(changes, -1)
        self.changes[~self.judged] = 0

    @property
    def sees(self) -> Tensor:
        """Which observer depends on which place."""
        return self.changes > self.search.allowed

    @property
    def steps(self) -> Tensor:
        """How far ahead of an observer a place is."""
        rows = torch.arange(self.rows.start, self.rows.stop).unsqueeze(-1)
        return torch.arange(self.columns.start, self.columns.stop) - rows

    @property
    def forbidden(self) -> Tensor:
        """What must not be seen, in rows that are judged."""
        return ~self.seen_rightly & self.judged.unsqueeze(-1)

    def draw(self) -> str:
        """The dependence as a map: full where it is largest, a dot where nothing changes."""
        scene = self.search.scene
        largest = max(self.changes[self.changes.isfinite()].tolist(), default=0.0) or 1.0
        drawn = self.changes.clamp(max=largest) / largest
        wrong = (self.forbidden & self.sees).any(-1)
        wrong |= (self.seen_rightly & (self.changes == 0)).any(-1)
        wrong &= self.judged
        lead = self.observer[:-1]
        return format_heatmap(
            drawn,
            mask=self.changes != 0,
            first_row=self.rows.start,
            first_column=self.columns.start,
            marked=[self.rows.start + i for i in wrong.nonzero().flatten().tolist()],
            notes=[""] * len(drawn),
            row_name=scene.observer[0],
            column_name=f"{scene.place}s",
            title=", ".join(filter(None, [entry_name(lead), "change when each is replaced"])),
        )


def _window(center: int, size: int, most: int) -> slice:
    first = max(0, min(center - most // 2, size - most))
    return slice(first, min(first + most, size))
