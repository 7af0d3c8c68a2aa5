"""The failure about an output that sees what it must not: where, how far, and why perhaps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...attention.chunks import index_of
from ...failure import Checked, Failure, Place
from ...heatmaps.terminal import format_heatmap, map_name
from .functions import AttentionFunction
from .inside import Inside
from .leak_search import Fault, Search
from .models import ModelSubject, Subject
from .subject import as_of_keys, differ, holds, listed, output_place
from .visibility import Replacement

_NAME = "assert_no_leakage"
# A leak so much smaller than what may be seen comes from a mask that is not quite closed.
_FAINT = 0.02
_NO_MASK = "all that is forbidden here is seen: no mask is applied, or only after the softmax?"
_ONE_TOO_MANY = "each sees one place too many: a causal mask that is off by one?"
# A picture takes one call of the subject for each of its columns.
_ROWS, _COLUMNS = 6, 16
# How many elements with the largest gradients are tried, to find the one that counts most.
_TRIED = 8


def describe(fault: Fault, search: Search) -> Failure:
    """Return the failure. The subject is called some more times, to find the very elements."""
    if fault.blind:
        return _blindness(fault, search)
    worst = _Mover(search, fault.worst, fault.replacements[0])
    same = fault.first == fault.worst
    first = worst if same else _Mover(search, fault.first, fault.replacements[1])
    crop = None
    if worst.element is not None:
        content = fault.replacements[0].content
        crop = _Crop(search, worst.observer, worst.element, content)
        while worst.take([crop.strongest]):
            crop = _Crop(search, worst.observer, worst.element, content)
    felt = worst.change != 0
    does = "outputs depend on" if felt else "outputs do not change, but have gradients from"
    return _failure(
        search, f"{does} what they must not see{_only_in(fault, search)}", worst.place(),
        broken=fault.broken, of=fault.judged, first=None if first is worst else first.place(),
        cause=_cause(fault, worst, crop), assumed=search.claim.assumed, tolerance=search.allowed,
        picture="" if crop is None else crop.draw(),
    )  # fmt: skip


def _failure(search: Search, claim: str, worst: Place, **more: Any) -> Failure:
    tensor, repeat, again = Checked.of(search.base), f"seed={search.seed}", search.subject.run
    return Failure(_NAME, claim, worst=worst, tensor=tensor, repeat=repeat, again=again, **more)


def _only_in(fault: Fault, search: Search) -> str:
    """Say whether that is all, and where it is, if that is one of several entries or heads."""
    if fault.blind and not fault.counted:
        return ", at least: not each output was judged"
    if not fault.counted:
        return ", at least: not each was judged by all that it must not see"
    if fault.entries != 1 or search.claim.judged[..., 0].numel() == 1:
        return ""
    return f", all in {_entry_name(fault.worst[:-1])}"


def _cause(fault: Fault, worst: _Mover, crop: _Crop | None) -> str | None:
    if fault.method == "nan":
        return "a weight of 0 times a value of nan is nan; PyTorch's own kernels do this too"
    if crop is not None:
        return _cause_inside(worst, _cause_in(crop))
    subject = worst.search.subject
    known = subject.mistake(worst.search.base)
    if known or worst.query is not None or worst.is_another_head:
        return known
    if isinstance(subject, ModelSubject) and (said := Inside(subject).why_entries_mix()):
        return said
    return "softmax or a normalisation over the batch, or another entry's keys?"


def _cause_inside(worst: _Mover, seen: str | None) -> str | None:
    """Say what the attention inside a model does, where that says more than what is seen."""
    search, subject, element = worst.search, worst.search.subject, worst.element
    assert element is not None
    if isinstance(subject, AttentionFunction) or subject.model.memory_argument is not None:
        return seen
    real, name, inside = subject.real, subject.mask_argument, Inside(subject)
    is_padding = real is not None and not bool(real[worst.observer[0], element])
    if real is not None and not is_padding:
        untold = replace(subject, real=None, positions=None)
        if holds(lambda: not worst.moves_too(untold)):
            return (
                f"without {name} it does not: the causal mask is lost where {name} is given: "
                "joined by | in place of &?"
            )
    if is_padding and holds(lambda: subject.ignores_mask(search.base, search.allowed)):
        return f"{name} changes nothing: it is ignored"
    if said := inside.why_seen(search.may_see, search.claim.judged):
        fact = "" if seen is None else seen.partition(": ")[0]
        return f"{fact}; {said}" if fact else said
    if real is not None and is_padding:
        if seen == _ONE_TOO_MANY:
            seen = "each sees one place too many: a mask off by one, or that of another sample?"
        said = inside.why_mask_fails(real)
        if said is None and seen in (None, _NO_MASK):
            said = inside.why_padding_is_seen(real)
        seen = said or seen
    return None if seen == _NO_MASK and inside.has_mask else seen


def describe_not_finite(search: Search, broken: Tensor) -> Failure:
    """Return the failure about outputs that are NaN or inf with nothing replaced."""
    place = index_of(broken.flatten().int().argmax(), broken.shape)
    held = search.base[place].sum().item()
    worst = Place(f"{output_place(place)} holds {held}", place, held)
    claim, of = "outputs are not finite with nothing replaced", broken.numel()
    return _failure(search, claim, worst, broken=int(broken.sum()), of=of)


def _blindness(fault: Fault, search: Search) -> Failure:
    observer, replaced, subject = fault.worst, fault.replacements[0], search.subject
    missed = search.may_see[observer]
    if replaced.elements is not None:
        missed = missed & replaced.elements[_key_entry(search, observer)]
    numbers = missed.nonzero().flatten().tolist()
    crop = _Crop(search, observer, numbers[-1], "larger")
    unseen = (
        f"{subject.observer} {observer[-1]} does not see {listed(subject.element, numbers)}: "
        f"whatever is there, {output_place(observer)} stays the same"
    )
    return _failure(
        search, f"outputs do not depend on what they must see{_only_in(fault, search)}",
        Place(unseen, observer), broken=fault.broken, of=fault.judged,
        cause=_cause_of_blindness(search, observer, numbers, crop), assumed=search.claim.assumed,
        picture=crop.draw(),
    )  # fmt: skip


def _cause_of_blindness(
    search: Search, observer: tuple[int, ...], missed: Sequence[int], crop: _Crop
) -> str | None:
    if not bool((crop.changes != 0).any()) and len(crop.changes) > 1:
        around = search.base[observer[:-1]][crop.rows]
        if bool((around == around[:1]).all()):
            return "no output around it changes, and all are the same: is everything masked?"
        if search.subject.has_queries:
            return "no output around it changes either: is an earlier answer given again?"
    numbers = search.may_see[observer].nonzero().flatten().tolist()
    square = search.may_see.shape[-2] == search.may_see.shape[-1]  # else, from which corner?
    future = [number for number in numbers if number > observer[-1] and square]
    if future and set(missed) == set(future) and search.claim.may_be_causal:
        return f"all of them lie in its future: {search.claim.may_be_causal}"
    if len(missed) == len(numbers) > 1 and search.subject.element != "token":
        return "it sees nothing of it at all: is that of an earlier call kept, or all of it masked?"
    if len(missed) == len(numbers) > 1:
        return "it sees nothing at all: is the whole row masked?"
    if list(missed) == numbers[-1:]:
        own = ", its own place" if numbers[-1] == observer[-1] else ""
        return f"the last that it may see{own}: a mask that closes one place too early?"
    if list(missed) == numbers[: len(missed)]:
        return (
            "those farthest back: a sliding window, chunks or packed documents? Say so with "
            "may_see= or documents=, or must_see=False (with window=, chunk= or documents= of an "
            "AttentionSpec)"
        )
    return None


class _Mover:
    """The single element, query or batch entry that moves an output."""

    def __init__(self, search: Search, observer: tuple[int, ...], replaced: Replacement) -> None:
        self.observer, self.search = observer, search
        self.element: int | None = None
        self.query: int | None = None
        self.entry: tuple[int, ...] | None = None
        self.change = search.change_at(replaced, observer)
        self._replaced = replaced
        self._find()

    def _find(self) -> None:
        elements, queries = self._replaced.elements, self._replaced.queries
        if elements is None:
            assert queries is not None
            own = queries[self.observer[:-1]].nonzero().flatten().tolist()
            self.query = _narrow(own, lambda some: self._moves(self._queries(some)))[0]
            return
        forbidden = elements[_key_entry(self.search, self.observer)]
        forbidden = forbidden & ~self.search.may_see[self.observer]
        if bool(forbidden.any()) and self._moves(self._elements(forbidden)):
            given = self._replaced
            self._replaced = replace(given, content=_drawn_content(given.content))
            if self._change(self._elements(forbidden)) > self.search.allowed:
                self.change = self.search.change_at(self._elements(forbidden), self.observer)
            else:
                self._replaced = given
            numbers = forbidden.nonzero().flatten().tolist()
            numbers = _narrow(numbers, lambda some: self._moves(self._numbered(some)))
            self.element = numbers[0]
            self.change = self.search.change_at(self._numbered(numbers), self.observer)
            self.take(self._likely(forbidden))
        else:
            entries = [tuple(at) for at in elements.any(-1).nonzero().tolist()]
            self.entry = _narrow(entries, lambda some: self._moves(self._of_entries(some)))[0]

    def take(self, numbers: Sequence[int]) -> bool:
        """Take the one that moves the output most when it is replaced alone, if it is another."""
        assert self.element is not None
        before = self.element
        self.element = max([before, *numbers], key=lambda n: self._change(self._numbered([n])))
        if self.element != before:
            self.change = self.search.change_at(self._numbered([self.element]), self.observer)
        return self.element != before

    def _change(self, replaced: Replacement) -> float:
        return float(self.search.change(replaced)[self.observer])

    def _likely(self, forbidden: Tensor) -> list[int]:
        row = torch.zeros_like(self.search.claim.judged)
        row[self.observer] = True
        try:
            (gradient,) = self.search.subject.gradient([row])
        except Exception:  # it is not differentiable
            return []
        own = gradient[_key_entry(self.search, self.observer)].masked_fill(~forbidden, -1.0)
        return own.topk(min(_TRIED, int(forbidden.sum()))).indices.tolist()

    def moves_too(self, subject: Subject) -> bool:
        """Whether the same elements move the same output of another subject."""
        assert self.element is not None
        replaced, seed = self._numbered([self.element]), self.search.seed
        got = subject.run_replaced(replaced, seed=seed)[self.observer]
        return differ(got[None], subject.run()[self.observer][None], self.search.allowed)

    def _moves(self, replaced: Replacement) -> bool:
        return self.search.change_at(replaced, self.observer) >= self.change * 1e-3

    def _numbered(self, numbers: Sequence[int]) -> Replacement:
        chosen = torch.zeros_like(self.search.may_see[self.observer])
        chosen[list(numbers)] = True
        return self._elements(chosen)

    def _elements(self, own: Tensor) -> Replacement:
        elements = _spread(self.search, own, self.observer)
        return replace(self._replaced, elements=elements, queries=None)

    def _queries(self, numbers: Sequence[int]) -> Replacement:
        queries = torch.zeros_like(self.search.claim.judged)
        queries[self.observer[:-1]][list(numbers)] = True
        return Replacement(None, queries)

    def _of_entries(self, entries: Sequence[tuple[int, ...]]) -> Replacement:
        elements = _no_elements(self.search)
        for entry in entries:
            elements[entry] = True
        return replace(self._replaced, elements=elements, queries=None)

    def place(self) -> Place:
        """The output, with what moves it, why that is wrong, and by how much it changes."""
        moved = f"{output_place(self.observer)} {self._moved()}"
        return Place(f"{self._says()}; {moved}", self.observer, self.change)

    def _says(self) -> str:
        search, number = self.search, self.observer[-1]
        observer, element = search.subject.observer, search.subject.element
        felt = self.change != 0
        depends, sees = ("depends on", "sees") if felt else ("has a gradient from",) * 2
        if self.query is not None:
            return f"query {number} {depends} query {self.query}"
        if self.element is None:
            return f"{observer} {number} {depends} {self._other()}"
        reasons = (
            rule.because(self.observer, self.element)
            for rule in search.claim.rules
            if not bool(rule.allowed.expand(search.may_see.shape)[self.observer][self.element])
        )
        because = next(reasons, "which it must not see")
        return f"{observer} {number} {sees} {element} {self.element}, {because}"

    def _moved(self) -> str:
        if self.change == 0:
            return "does not change"
        if not math.isfinite(self.change):
            return "is no longer finite"
        size = float(self.search.base[self.observer].double().square().mean().sqrt())
        part = f"{self.change / size:.2g} of its size; " if size > 0 else ""
        return f"changes by {self.change:.2g} ({part}allowed {self.search.allowed:.1e})"

    @property
    def is_another_head(self) -> bool:
        own, entry = _key_entry(self.search, self.observer), self.entry or ()
        return len(entry) == 2 and entry[0] == own[0]

    def _other(self) -> str:
        own, entry = _key_entry(self.search, self.observer), self.entry or ()
        if self.is_another_head:
            kind = "key head" if self.search.subject.group > 1 else "head"
            return f"{kind} {entry[1]}, its own is {own[1]}"
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


def _cause_in(crop: _Crop) -> str | None:
    """Read a likely cause from what the observers around the worst one see."""
    sees, forbidden, rightly = crop.sees, crop.forbidden, crop.seen_rightly
    if not bool((wrongly := sees & forbidden).any()):
        return None
    rows, columns = (torch.arange(one.start, one.stop) for one in (crop.rows, crop.columns))
    others = rightly & crop.judged.unsqueeze(-1) & (columns != rows.unsqueeze(-1))
    if bool(others.any()) and not bool(sees[others].any()):
        return "what may be seen is not, and the forbidden is: a mask of the opposite meaning?"
    if (extra := _elements_too_many(crop, wrongly)) == 1:
        return _ONE_TOO_MANY
    if bool((sees | ~forbidden).all()) and int(forbidden.sum()) > 1:
        allowed = crop.changes[rightly & crop.judged.unsqueeze(-1)].tolist()
        strongest = max(allowed or [crop.change_by_all_seen_rightly()])
        if float(crop.changes[wrongly].max()) < _FAINT * strongest:
            return (
                "far fainter than what may be seen: a fill of the mask that is too small, a mask "
                "that is applied after the softmax, or a mean or a norm over the whole length?"
            )
        return _NO_MASK
    if extra is None:
        return None
    return (
        f"each sees {extra} places too many: off by one in each of {extra} layers, or a causal "
        "mask aligned to the bottom right, not the top left?"
    )


def _elements_too_many(crop: _Crop, wrongly: Tensor) -> int | None:
    """How many elements each sees beyond the last that it may see; None if not all see as many."""
    numbers = torch.arange(crop.columns.start, crop.columns.stop)
    whole = crop.search.may_see[crop.observer[:-1]][crop.rows].cpu()
    last = torch.where(whole, torch.arange(whole.shape[-1]), -1).amax(-1, keepdim=True)
    ahead = numbers - last
    extra = int(ahead[wrongly].max())
    if extra < 1 or not bool((wrongly == (crop.forbidden & (ahead >= 1) & (ahead <= extra))).all()):
        return None
    return extra


def _entry_name(lead: tuple[int, ...]) -> str:
    return f"batch entry {lead[0]}" if len(lead) == 1 else map_name(lead)


def _key_entry(search: Search, observer: tuple[int, ...]) -> tuple[int, ...]:
    """Return the batch entry and the head of the keys that an observer sees."""
    return as_of_keys(observer[:-1], search.subject.group)


def _no_elements(search: Search) -> Tensor:
    """What a replacement takes as its elements, none of them chosen."""
    *leading, _, key_len = search.may_see.shape
    return search.may_see.new_zeros((*as_of_keys(leading, search.subject.group), key_len))


def _spread(search: Search, own: Tensor, observer: tuple[int, ...]) -> Tensor:
    elements = _no_elements(search)
    elements[_key_entry(search, observer)] = own
    return elements


def _drawn_content(content: str) -> str:
    """What the elements of a picture are replaced by: what is larger is felt."""
    return "nan" if content == "nan" else "larger"


class _Crop:
    """How strongly a few observers depend on a few elements, each replaced alone."""

    def __init__(
        self, search: Search, observer: tuple[int, ...], element: int, content: str
    ) -> None:
        self.search, self.observer = search, observer
        content = _drawn_content(content)
        query_len, key_len = search.may_see.shape[-2:]
        self.rows = _window(observer[-1], query_len, _ROWS)
        self.columns = _window(element, key_len, _COLUMNS)
        lead = observer[:-1]
        self.seen_rightly = search.may_see[lead][self.rows, self.columns].cpu()
        self.judged = search.claim.judged[lead][self.rows].cpu()
        changes = []
        for column in range(self.columns.start, self.columns.stop):
            own = torch.arange(key_len, device=search.may_see.device) == column
            replaced = Replacement(_spread(search, own, observer), None, content)
            changes.append(search.change(replaced)[lead][self.rows].cpu())
        self.changes = torch.stack(changes, -1)
        self.changes[~self.judged] = 0

    def change_by_all_seen_rightly(self) -> float:
        """By how much its observer changes with all that it may see, of which none is near."""
        own = _spread(self.search, self.search.may_see[self.observer], self.observer)
        return float(self.search.change(Replacement(own, None, "larger"))[self.observer])

    @property
    def sees(self) -> Tensor:
        return self.changes > self.search.allowed

    @property
    def strongest(self) -> int:
        """The element that its observer must not see and depends on most."""
        row = self.observer[-1] - self.rows.start
        wrong = self.changes[row].masked_fill(~self.forbidden[row], -1.0)
        return int(self.columns.start) + int(wrong.argmax())

    @property
    def forbidden(self) -> Tensor:
        return ~self.seen_rightly & self.judged.unsqueeze(-1)

    def draw(self) -> str:
        """The dependence as a map: full where it is largest, a dot where nothing changes."""
        subject = self.search.subject
        largest = max(self.changes[self.changes.isfinite()].tolist(), default=0.0) or 1.0
        drawn = self.changes.clamp(max=largest) / largest
        wrong = (self.forbidden & self.sees) | (self.seen_rightly & (self.changes == 0))
        wrong = wrong.any(-1) & self.judged
        lead = self.observer[:-1]
        return format_heatmap(
            drawn, mask=self.changes != 0, first_row=self.rows.start,
            first_column=self.columns.start,
            marked=[self.rows.start + i for i in wrong.nonzero().flatten().tolist()],
            notes=[""] * len(drawn), row_name=subject.observer[0],
            column_name=f"{subject.element}s",
            title=", ".join(filter(None, [_entry_name(lead), "change when each is replaced"])),
        )  # fmt: skip


def _window(center: int, size: int, most: int) -> slice:
    first = max(0, min(center - most // 2, size - most))
    return slice(first, min(first + most, size))
