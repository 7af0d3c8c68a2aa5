"""The message about an output that sees what it must not: which place, how far, and why perhaps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pytest_attnheat.assertions.behaviour.difference import output_place
from pytest_attnheat.assertions.behaviour.leak_picture import (
    Crop,
    entry_name,
    key_entry,
    own_places,
    places_shape,
    spread,
)
from pytest_attnheat.assertions.behaviour.leak_search import Finding, Search
from pytest_attnheat.assertions.behaviour.scenes import Replacement
from pytest_attnheat.attention.chunks import index_of
from pytest_attnheat.failure import Checked, Failure, Place

_NAME = "assert_no_leakage"
# A leak so much smaller than what may be seen comes from a mask that is not quite closed.
_FAINT = 0.02


def describe(finding: Finding, search: Search, *, repeat: str) -> Failure:
    """Return the failure. The subject is called some more times, to find the very places."""
    if finding.blind:
        return _blindness(finding, search, repeat)
    worst = _Culprit(search, finding.worst, finding.replacements[0])
    first = worst
    if finding.first != finding.worst:
        first = _Culprit(search, finding.first, finding.replacements[1])
    crop = None
    if worst.place is not None:
        crop = Crop(search, worst.observer, worst.place, finding.replacements[0].content)
    return Failure(
        _NAME,
        f"outputs depend on what they must not see{_only_in(finding, search)}",
        broken=finding.broken,
        of=finding.judged,
        worst=worst.told(),
        first=None if first is worst else first.told(),
        cause=_cause(finding, worst, crop),
        assumed=search.scene.advice.claimed,
        tensor=Checked.of(search.base),
        tolerance=search.allowed,
        repeat=repeat,
        picture="" if crop is None else crop.draw(),
    )


def _only_in(finding: Finding, search: Search) -> str:
    """Say where all of it is, if that is one of several batch entries or heads."""
    if finding.entries != 1 or search.scene.judged[..., 0].numel() == 1:
        return ""
    return f", all in {entry_name(finding.worst[:-1])}"


def _cause(finding: Finding, worst: _Culprit, crop: Crop | None) -> str | None:
    if finding.way == "nan":
        return "a weight of 0 times a value of nan is nan; PyTorch's own kernels do this too"
    return _cause_of_entries(worst) if crop is None else _cause_in(crop)


def describe_not_finite(search: Search, broken: Tensor, *, repeat: str) -> Failure:
    """Return the failure about outputs that are NaN or inf with nothing replaced."""
    place = index_of(broken.flatten().int().argmax(), broken.shape)
    held = search.base[place].sum().item()
    return Failure(
        _NAME,
        "outputs are not finite with nothing replaced",
        broken=int(broken.sum()),
        of=broken.numel(),
        worst=Place(f"{output_place(place)} holds {held}", place, held),
        tensor=Checked.of(search.base),
        repeat=repeat,
    )


def _blindness(finding: Finding, search: Search, repeat: str) -> Failure:
    observer, replaced = finding.worst, finding.replacements[0]
    scene = search.scene
    seen = scene.may_see[observer]
    missed = (
        seen & own_places(search, replaced.places, observer)
        if replaced.places is not None
        else seen
    )
    numbers = missed.nonzero().flatten().tolist()
    crop = Crop(search, observer, numbers[-1], "larger")
    unseen = (
        f"{scene.observer} {observer[-1]} does not see {_listed(scene.place, numbers)}: "
        f"whatever is there, {output_place(observer)} stays the same"
    )
    return Failure(
        _NAME,
        f"outputs do not depend on what they must see{_only_in(finding, search)}",
        broken=finding.broken,
        of=finding.judged,
        worst=Place(unseen, observer),
        cause=_cause_of_blindness(search, observer, numbers),
        assumed=search.scene.advice.claimed,
        tensor=Checked.of(search.base),
        repeat=repeat,
        picture=crop.draw(),
    )


def _cause_of_blindness(
    search: Search, observer: tuple[int, ...], missed: Sequence[int]
) -> str | None:
    numbers = search.scene.may_see[observer].nonzero().flatten().tolist()
    future = [number for number in numbers if number > observer[-1]]
    if future and set(missed) <= set(future):
        return f"all of them lie in its future: {search.scene.advice.may_be_causal}"
    if len(missed) == len(numbers) > 1:
        return "it sees nothing at all: is the whole row masked?"
    if list(missed) == numbers[-1:]:
        own = ", its own place" if numbers[-1] == observer[-1] else ""
        return f"the last that it may see{own}: a mask that closes one place too early?"
    if list(missed) == numbers[: len(missed)]:
        return "those farthest back: a sliding window? Say so with may_see=, or must_see=False"
    return None


def _listed(name: str, numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return f"{name} {numbers[0]}"
    shown = ", ".join(map(str, numbers[:4]))
    return f"{name}s {shown}{', ...' * (len(numbers) > 4)}"


class _Culprit:
    """The single place, query or batch entry that moves an output."""

    def __init__(self, search: Search, observer: tuple[int, ...], replaced: Replacement) -> None:
        self.observer, self.search = observer, search
        self.place: int | None = None
        self.query: int | None = None
        self.entry: tuple[int, ...] | None = None
        self.change = search.change_at(replaced, observer)
        self._replaced = replaced
        self._find()

    def _find(self) -> None:
        own = None
        if self._replaced.places is not None:
            own = own_places(self.search, self._replaced.places, self.observer)
            own = own & ~self.search.scene.may_see[self.observer]
        if own is not None and bool(own.any()) and self._moves(self._places(own)):
            numbers = _narrow(own.nonzero().flatten().tolist(), self._move_together)
            self.place = numbers[0]
            self.change = self.search.change_at(self._places(self._only(numbers)), self.observer)
        elif self._replaced.places is None and self._replaced.queries is not None:
            queries = self._replaced.queries[self.observer[:-1]].nonzero().flatten().tolist()
            queries = _narrow(queries, lambda some: self._moves(self._queries(some)))
            self.query = queries[0]
        elif self._replaced.places is not None:
            entries = [tuple(at) for at in self._replaced.places.any(-1).nonzero().tolist()]
            entries = _narrow(entries, lambda some: self._moves(self._of_entries(some)))
            self.entry = entries[0]

    def _moves(self, replaced: Replacement) -> bool:
        return self.search.change_at(replaced, self.observer) >= self.change * 1e-3

    def _move_together(self, numbers: Sequence[int]) -> bool:
        return self._moves(self._places(self._only(numbers)))

    def _only(self, numbers: Sequence[int]) -> Tensor:
        places = torch.zeros_like(self.search.scene.may_see[self.observer])
        places[list(numbers)] = True
        return places

    def _places(self, own: Tensor) -> Replacement:
        places = spread(self.search, own, self.observer)
        return replace(self._replaced, places=places, queries=None)

    def _queries(self, numbers: Sequence[int]) -> Replacement:
        queries = torch.zeros_like(self.search.scene.judged)
        queries[self.observer[:-1]][list(numbers)] = True
        return Replacement(None, queries)

    def _of_entries(self, entries: Sequence[tuple[int, ...]]) -> Replacement:
        places = torch.zeros(
            places_shape(self.search), dtype=torch.bool, device=self.search.base.device
        )
        for entry in entries:
            places[entry] = True
        return replace(self._replaced, places=places, queries=None)

    def told(self) -> Place:
        """The output, with what moves it."""
        return Place(self._sentence(), self.observer, self.change)

    def _sentence(self) -> str:
        """Say what sees what, why that is wrong, and by how much the output changes."""
        scene = self.search.scene
        number = self.observer[-1]
        moved = f"{output_place(self.observer)} {self._moved()}"
        if self.place is not None:
            reasons = (
                rule.because(self.observer, self.place)
                for rule in scene.rules
                if not bool(rule.allowed.expand(scene.may_see.shape)[self.observer][self.place])
            )
            because = next(reasons, "which it must not see")
            return f"{scene.observer} {number} sees {scene.place} {self.place}, {because}; {moved}"
        if self.query is not None:
            return f"query {number} depends on query {self.query}; {moved}"
        return f"{scene.observer} {number} depends on {self._other()}; {moved}"

    def _moved(self) -> str:
        if self.change == 0:
            return "has a gradient there, but does not change"
        if not math.isfinite(self.change):
            return "is no longer finite"
        size = float(self.search.base[self.observer].double().square().mean().sqrt())
        part = f"{self.change / size:.2g} of its size; " if size > 0 else ""
        return f"changes by {self.change:.2g} ({part}allowed {self.search.allowed:.1e})"

    @property
    def is_grouped(self) -> bool:
        """Whether several heads share the keys of one."""
        return self.search.scene.groups > 1

    @property
    def is_another_head(self) -> bool:
        """Whether what moves the output is a head, of the output's own batch entry."""
        own, entry = key_entry(self.search, self.observer), self.entry or ()
        return len(entry) == 2 and entry[0] == own[0]

    def _other(self) -> str:
        own, entry = key_entry(self.search, self.observer), self.entry or ()
        if self.is_another_head:
            return f"{'key head' if self.is_grouped else 'head'} {entry[1]}, its own is {own[1]}"
        return f"batch entry {entry[0] if entry else '?'}, its own is {own[0]}"


def _narrow(items: list[Any], move: Callable[[list[Any]], bool]) -> list[Any]:
    """Halve until one is left, or until neither half is enough by itself."""
    while len(items) > 1:
        half = len(items) // 2
        parts = [part for part in (items[:half], items[half:]) if move(part)]
        if not parts:
            return items
        items = parts[0]
    return items


def _cause_in(crop: Crop) -> str | None:
    """Read a likely cause from what the observers around the worst one see."""
    sees, forbidden, rightly = crop.sees, crop.forbidden, crop.seen_rightly
    wrongly = sees & forbidden
    if not bool(wrongly.any()):
        return None
    others = rightly & crop.judged.unsqueeze(-1) & (crop.steps != 0)
    if bool(others.any()) and not bool(sees[others].any()):
        return "what may be seen is not, and the forbidden is: a mask of the opposite meaning?"
    extra = _places_too_many(crop, wrongly)
    if extra == 1:
        return "each sees one place too many: a causal mask that is off by one?"
    strongest = crop.changes[rightly & crop.judged.unsqueeze(-1)]
    if strongest.numel() and float(crop.changes[wrongly].max()) < _FAINT * float(strongest.max()):
        return (
            "far fainter than what may be seen: a fill of the mask that is too small, or a mean or "
            "a norm over the whole length?"
        )
    if bool((sees | ~forbidden).all()) and int(forbidden.sum()) > 1:
        return "all that is forbidden here is seen: no mask is applied, or only after the softmax?"
    return None if extra is None else _cause_of_several_too_many(crop, extra)


def _places_too_many(crop: Crop, wrongly: Tensor) -> int | None:
    """How many places each sees beyond the last that it may see; None if not all see as many."""
    ahead = _steps_ahead(crop)
    extra = int(ahead[wrongly].max())
    if extra < 1 or not bool((wrongly == (crop.forbidden & (ahead >= 1) & (ahead <= extra))).all()):
        return None
    return extra


def _cause_of_several_too_many(crop: Crop, extra: int) -> str:
    if crop.search.scene.place == "token":
        return (
            f"each sees {extra} places too many: a causal mask that is off by one in each of "
            f"{extra} layers, or by {extra}?"
        )
    query_len, key_len = crop.search.scene.may_see.shape[-2:]
    if extra == key_len - query_len:
        return (
            f"each sees {extra} places too many, key_len - query_len: a causal mask aligned to "
            "the bottom right, not the top left?"
        )
    return f"each sees {extra} places too many"


def _steps_ahead(crop: Crop) -> Tensor:
    """How many places beyond the last that an observer may see each place is."""
    numbers = torch.arange(crop.columns.start, crop.columns.stop)
    whole = crop.search.scene.may_see[crop.observer[:-1]][crop.rows].cpu()
    last = torch.where(whole, torch.arange(whole.shape[-1]), -1).amax(-1, keepdim=True)
    return numbers - last


def _cause_of_entries(culprit: _Culprit) -> str | None:
    if culprit.query is not None:
        return "softmax over the query axis (dim=-2)?"
    if culprit.is_another_head and culprit.is_grouped:
        return "grouped heads in another order (repeat in place of repeat_interleave)?"
    if culprit.is_another_head:
        return "heads split or merged without a transpose, or softmax over the heads?"
    return "softmax or a normalisation over the batch, or another entry's keys?"
