"""Which outputs depend on what they must not see, and which do not on what they must see."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TypeAlias

import torch
from torch import Tensor

from ...attention.chunks import index_of
from .models import Subject
from .subject import for_each_query_head, of_any, of_the_first, relative_change
from .visibility import Claim, Replacement, spread_rows, touched

# How many sets of elements are tried before an output is believed to depend on all of them.
_TRIALS = 12
# How many outputs that no pass moved are looked at.
_MOST_BLIND = 8
# What is cheap has every observer judged, in no more passes, and backward passes, than this.
_MOST_PASSES, _MOST_BACKWARD = 32, 64
# Of what is cheap, whether it sees what it must is asked of observers in so many backward passes.
_MOST_SEEING = 16
# Once something is found, so many more passes count it, and fewer where they are not cheap.
_MOST_COUNTING, _MOST_DEAR = 128, 16


@dataclass(frozen=True)
class Fault:
    """Outputs that break the claim."""

    blind: bool  # Whether they do not depend on what they must see; else on what they must not see
    method: str  # How it was found: "perturbation", "gradient" or "nan"
    broken: int  # How many outputs
    judged: int  # Of how many
    entries: int  # In how many batch entries and heads
    worst: tuple[int, ...]  # The index of the worst output (*leading, query)
    first: tuple[int, ...]  # That of the first
    replacements: tuple[Replacement, Replacement]  # For the worst and the first
    counted: bool = True  # Whether all that is broken was looked for; else that is the least


# An observer and what it depends on, or does not.
_Pair: TypeAlias = tuple[tuple[int, ...], Replacement]


class Search:
    """Runs a subject a few times, each time with something else replaced."""

    def __init__(
        self,
        subject: Subject,  # The subject
        claim: Claim,  # What it may depend on
        base: Tensor,  # Its output with nothing replaced
        *,
        allowed: float,  # By what part of its size an output may change
        passes: int,  # How many observers are judged for each batch entry and head, at least
        seed: int,  # What observers and replacements are drawn from
    ) -> None:
        """Prepare the search; the subject is not called."""
        self.subject, self.base, self.allowed, self.seed = subject, base, allowed, seed
        self.may_see, self.claim = claim.may_see, claim
        # What a query gives that may see nothing is a matter of declaration, not of leaks.
        self.judged = claim.judged & base.isfinite().all(-1) & claim.may_see.any(-1)
        self._watched = self.judged & ~claim.may_see.all(-1)
        if not bool(self._watched.any()) and next(self._others(), None) is None:
            raise ValueError(
                "assert_no_leakage: every output may see every input, so there is nothing to "
                "check; say causal=, lengths=, documents= or may_see=, or pass a larger batch"
            )
        rows, entries = self._watched.shape[-1], self._watched[..., 0].numel()
        # All together is to cost no more than some twelve forward passes of a large model: one pass
        # in four of it is a backward pass.
        self._backward = 0 if subject.has_queries else passes // 4
        self._passes = passes - self._backward
        if subject.is_cheap:
            each = subject.has_queries and rows <= _MOST_PASSES
            wanted = rows if each else -(-rows // entries)
            self._passes = min(max(passes, wanted), max(passes, _MOST_PASSES))
            left = 0 if subject.has_queries else wanted - self._passes
            self._backward = min(max(left, 0), _MOST_BACKWARD)
        ends = 2 if subject.has_queries else 4
        self._targets = spread_rows(rows, entries * (self._passes + self._backward), ends, seed)
        # Which observers had all that they must not see replaced, and which were followed back.
        self.hidden = torch.zeros_like(self._watched)
        self.followed = torch.zeros_like(self._watched)

    def says_what_it_judged(self) -> str:
        """Say of how many outputs the search is sure, once it found nothing."""
        hidden, followed = (
            int((of & self._watched).sum()) for of in (self.hidden, self.followed & ~self.hidden)
        )
        of = int(self._watched.sum())
        observers = f"outputs that must not see some {self.subject.element}"
        if not of:  # batch entries, heads and queries
            return "every output may see its whole sequence; of others, nothing was seen"
        if hidden == of:
            return f"all {of} {observers} were judged, each with all of that replaced"
        more = f", {followed} more by their gradients" * bool(followed)
        return (
            f"{hidden} of {of} {observers} were judged, each with all of that replaced{more}; "
            f"passes={self._watched.shape[-1]} judges each"
        )

    def not_finite(self) -> Tensor:
        """Which judged outputs are NaN or inf with nothing replaced; those that see nothing may."""
        sees = self.may_see.any(-1)
        return ~self.base.isfinite().all(-1) & self.claim.judged & sees

    def change(self, replaced: Replacement) -> Tensor:
        """By what part of its size each output changes, (*leading, query_len)."""
        return relative_change(self._output(replaced), self.base)

    def change_at(self, replaced: Replacement, observer: tuple[int, ...]) -> float:
        """By how much the output of one observer changes, the largest of its channels."""
        off = self._output(replaced)[observer].double() - self.base[observer].double()
        return float(off.abs().nan_to_num(nan=torch.inf).max())

    def _output(self, replaced: Replacement) -> Tensor:
        return self.subject.run_replaced(replaced, seed=self.seed)

    def first_fault(
        self, methods: Sequence[str], *, optional: bool, must_see: bool
    ) -> Fault | None:
        """Return what is broken by some methods, leaks before blindness, or None."""
        # Methods are "perturbation", "gradient" and "nan"; where that is `optional`, a subject that
        # is not differentiable may go without "gradient".
        blind: Fault | None = None
        if "gradient" not in methods:
            self._passes, self._backward = self._passes + self._backward, 0
        hidden = [] if set(methods) == {"gradient"} else self._hidden()
        tally = _Tally(self, [*self._others(), *hidden] if "perturbation" in methods else [])
        if "perturbation" in methods:
            if tally.found:
                return self._counted(tally, "perturbation")
            blind = self._never_moved(tally.reached & ~tally.felt, int(tally.reached.sum()))
        if "nan" in methods:
            by_nan = _Tally(self, [Replacement(r.elements, None, "nan") for r in hidden])
            if by_nan.found:
                return self._counted(by_nan, "nan")
        if "gradient" in methods:
            leak, unseen = self._follow_gradients(tally, optional=optional)
            if leak is not None:
                return leak
            blind = unseen or blind  # which names the elements
        return blind if must_see else None

    def _counted(self, tally: _Tally, method: str) -> Fault:
        """Count what is broken: of each observer, with all that it must not see replaced."""
        rows = self._watched.shape[-1]
        more = [] if self.subject.has_queries else [*self._others(of_model=False)][2:]
        most = _MOST_COUNTING if self.subject.is_cheap else _MOST_DEAR
        left = [row for row in range(rows) if bool((self._watched & ~self.hidden)[..., row].any())]
        for row in left if len(left) <= most else []:
            more.append(self._hide(torch.full_like(self._watched[..., 0], row, dtype=torch.long)))
        for replaced in more:
            content = "nan" if method == "nan" else replaced.content
            tally.add(replace(replaced, content=content))
        return tally.fault(method, counted=bool((self.hidden | ~self._watched).all()))

    def _never_moved(self, unfelt: Tensor, of: int) -> Fault | None:
        """Outputs that stay the same even if all that they may see is replaced at once."""
        # That none of the passes moved one proves little: all its attention may be on a key that no
        # pass replaced.
        pairs: list[_Pair] = []
        for at in unfelt.nonzero().tolist()[:_MOST_BLIND]:
            observer = tuple(at)
            elements = torch.zeros_like(self.may_see[..., 0, :])
            elements[observer[:-1]] = self.may_see[observer]
            shared = of_any(elements, self.subject.group)
            towards = torch.full_like(unfelt[..., 0], observer[-1], dtype=torch.long)
            if self._stays(observer, shared, towards):
                pairs.append((observer, Replacement(shared)))
        counted = int(unfelt.sum()) <= _MOST_BLIND and of == int(self.judged.sum())
        return _of_pairs(pairs, of, blind=True, counted=counted)

    def _stays(self, observer: tuple[int, ...], elements: Tensor, towards: Tensor | None) -> bool:
        contents = (
            Replacement(elements, content="same"),
            Replacement(elements, content="larger"),
            Replacement(elements, content="larger", towards=towards),
        )
        return all(self.change_at(content, observer) == 0 for content in contents)

    def reached(self, replaced: Replacement) -> Tensor:
        """Which outputs may see what is replaced."""
        if replaced.elements is None:
            return torch.zeros_like(self.claim.judged)
        return touched(self.may_see, for_each_query_head(replaced.elements, self.subject.group))

    def _hidden(self) -> list[Replacement]:
        """In each pass, for each batch entry and head, all that one observer must not see."""
        if not bool(self._watched.any()):
            return []
        some = [self._observers(self._watched, number) for number in range(self._passes)]
        return [self._hide(observers, larger=n % 2 == 1) for n, observers in enumerate(some)]

    def _hide(self, observers: Tensor, *, larger: bool = False) -> Replacement:
        """Replace all that one observer (*leading) per batch entry and head must not see."""
        self.hidden.scatter_(-1, observers.unsqueeze(-1), True)
        elements = of_the_first(self._forbidden(observers), self.subject.group)
        if larger:
            return Replacement(elements, content="larger", towards=observers)
        return Replacement(elements)

    def _forbidden(self, observers: Tensor) -> Tensor:
        """What they must not see, (*leading, key_len); nothing where all may see everything."""
        return ~self._seen_by(observers) & self._watched.any(-1, keepdim=True)

    def _seen_by(self, observers: Tensor) -> Tensor:
        """What one observer (*leading) per batch entry and head may see, (*leading, key_len)."""
        key_len = self.may_see.shape[-1]
        index = observers[..., None, None].expand(*observers.shape, 1, key_len)
        return self.may_see.gather(-2, index).squeeze(-2)

    def _observers(self, candidates: Tensor, number: int) -> Tensor:
        """The observer of each batch entry and head in a pass, so that all spread over the rows."""
        none = ~candidates.any(-1, keepdim=True)
        candidates = candidates | (none & self.judged)
        length, entries = candidates.shape[-1], candidates[..., 0].numel()
        chosen = self._targets[number * entries : (number + 1) * entries]
        own = torch.tensor(chosen, device=candidates.device).reshape(*candidates.shape[:-1], 1)
        rows = torch.arange(length, device=candidates.device)
        # The nearest row that can be one; argmin takes the first of two.
        away = (rows - own).abs().masked_fill(~candidates, 2 * length)
        return away.argmin(-1)

    def _others(self, *, of_model: bool = True) -> Iterator[Replacement]:
        """Every second batch entry, head and query, then the rest; of a model there are but two."""
        shape = self.claim.judged.shape
        takes_queries = self.subject.has_queries
        for dim in range(len(shape) - (0 if takes_queries else 1)):
            is_query, is_head = dim == len(shape) - 1, dim == len(shape) - 2
            groups = self.subject.group if is_head else 1
            # Any two numbers differ in some bit; for a whole model one must do.
            bits = (max(1, shape[dim] // groups) - 1).bit_length()
            bits = bits if takes_queries or not of_model else min(bits, 1)
            for bit, odd in product(range(bits), (0, 1)):
                number = torch.arange(shape[dim], device=self.base.device) // groups
                chosen = (number >> bit) % 2 == odd
                size = [1] * len(shape)
                size[dim] = shape[dim]
                queries = chosen.reshape(size).expand(shape)
                elements = None
                if not is_query:
                    key_len = self.may_see.shape[-1]
                    whole = queries[..., :1].expand(*shape[:-1], key_len)
                    elements = of_the_first(whole, self.subject.group)
                yield Replacement(elements, queries if takes_queries else None)

    def _follow_gradients(
        self, tally: _Tally, *, optional: bool
    ) -> tuple[Fault | None, Fault | None]:
        """Where the gradient of a few observers is 0, and where not."""
        # A whole model is dear: one backward pass, if its batch makes that several observers.
        count = 2 if self.subject.has_queries or len(self.claim.judged) == 1 else 1
        if self.subject.is_cheap:  # each query, in some batch entry or head
            length, entries = self.judged.shape[-1], self.judged[..., 0].numel()
            count = max(count, min(-(-length // entries), _MOST_SEEING))
        chosen = [self._observers(self.judged, number) for number in range(count)]
        # One that must see the most: what is blind to something far away shows there or nowhere.
        most = self.may_see.sum(-1).mul(self.judged).reshape(-1, self.judged.shape[-1])[-1].argmax()
        chosen[-1].view(-1)[-1] = most
        rows = [self._as_rows(observers, number) for number, observers in enumerate(chosen)]
        last = range(self._passes, self._passes + self._backward)
        groups = [self._observers(self._watched, number) for number in last]
        forbidden = [self._forbidden(observers) for observers in groups]
        in_groups = [self.judged & ~touched(self.may_see, elements) for elements in forbidden]
        try:
            gradients = self.subject.gradient([*rows, *in_groups])
        except Exception as error:  # what has no backward says so in any way
            if optional:
                return None, None
            raise ValueError(
                f'by="gradient": the subject is not differentiable: {error}'
            ) from error
        for replaced in self._suspects(groups, forbidden, gradients[count:]):
            tally.add(replaced)
        if tally.found:
            return self._counted(tally, "perturbation"), None
        leaks: list[_Pair] = []
        unseen: list[_Pair] = []
        judged = 0
        for row, gradient in zip(rows, gradients, strict=False):
            felt = for_each_query_head(gradient, self.subject.group)
            seen = self._seen_by(row.int().argmax(-1))
            active = row.any(-1, keepdim=True)
            judged += int(active.sum())
            scale = felt.amax(-1, keepdim=True) * torch.finfo(self.base.dtype).eps
            # The embedding of equal token ids may also be looked up for something else, such as
            # the source of an encoder: then the gradient is not that of the input.
            leaks += [
                (observer, elements)
                for observer, elements in self._pairs(row, ~(felt <= scale) & ~seen & active)
                if not self.subject.is_tokens or self.change_at(elements, observer) > 0
            ]
            strongest = felt.masked_fill(~seen, 0).argmax(-1)
            for observer, elements in self._pairs(row, (felt == 0) & seen & active):
                blind = self._blind(observer, elements, int(strongest[observer[:-1]]))
                unseen += [] if blind is None else [(observer, blind)]
        # What leaks is known of a few observers; of all others nothing.
        counted = judged == int(self.judged.sum())
        return (
            _of_pairs(leaks, judged, blind=False),
            _of_pairs(unseen, judged, blind=True, counted=counted),
        )

    def _suspects(
        self, groups: Sequence[Tensor], forbidden: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> Iterator[Replacement]:
        """Yield elements that a group of observers must not see, and that have a gradient."""
        # The gradient of all of them together finds a single pair; other inputs there prove it. Of
        # each group one observer (batch,) stands for all: the others may see no more than it does.
        for observers, elements, felt in zip(groups, forbidden, gradients, strict=True):
            self.followed.scatter_(-1, observers.unsqueeze(-1), True)
            rounded = felt.amax(-1, keepdim=True) * torch.finfo(self.base.dtype).eps
            found = elements & ~(felt <= rounded)
            if bool(found.any()):
                yield Replacement(found, content="larger")

    def _as_rows(self, observers: Tensor, number: int) -> Tensor:
        """Mark the observers, of the heads that share their keys only one."""
        rows = torch.zeros_like(self.claim.judged)
        rows.scatter_(-1, observers.unsqueeze(-1), True)
        rows &= self.judged
        if self.subject.group > 1:
            head = torch.arange(rows.shape[-2], device=rows.device)
            mine = head % self.subject.group == number % self.subject.group
            rows &= mine.unsqueeze(-1)
        return rows

    def _pairs(self, row: Tensor, elements: Tensor) -> list[_Pair]:
        """Pair each observer with those elements of its own."""
        pairs = []
        for at in elements.any(-1).nonzero().tolist():
            observer = (*at, int(row[tuple(at)].int().argmax()))
            alone = torch.zeros_like(elements)
            alone[tuple(at)] = elements[tuple(at)]
            pairs.append((observer, Replacement(of_any(alone, self.subject.group))))
        return pairs

    def _blind(
        self, observer: tuple[int, ...], replaced: Replacement, strongest: int
    ) -> Replacement | None:
        """Some of the elements that make no difference, whatever is there; None if all do."""
        # A weight or a gradient may be rounded to 0 where the output does depend on one; the key
        # that gets most attention brings some to any of them.
        assert replaced.elements is not None
        suspects = [replaced.elements.nonzero()]
        for _ in range(_TRIALS):
            if not suspects:
                break
            some = suspects.pop(0)
            elements = torch.zeros_like(replaced.elements)
            elements[tuple(some.T)] = True
            towards = torch.full_like(self.judged[..., 0], observer[-1], dtype=torch.long)
            like = Replacement(elements, content="larger", like=strongest)
            if self.change_at(like, observer) == 0 and self._stays(observer, elements, towards):
                return Replacement(elements)
            if len(some) > 1:
                suspects += [some[: len(some) // 2], some[len(some) // 2 :]]
        return None


class _Tally:
    """Which outputs change (`felt`) with what they must not see, and which were `reached`."""

    def __init__(self, search: Search, replacements: Sequence[Replacement]) -> None:
        """Make the replacements, one after the other."""
        self._search = search
        judged = search.claim.judged
        self._leak = torch.zeros(judged.shape, dtype=torch.float64, device=search.base.device)
        self._found_by = torch.zeros_like(self._leak, dtype=torch.long)
        self._judged, self.reached, self.felt = (torch.zeros_like(judged) for _ in range(3))
        self._replacements: list[Replacement] = []
        for replaced in replacements:
            self.add(replaced)

    def add(self, replaced: Replacement) -> None:
        change, may_change = self._search.change(replaced), self._search.reached(replaced)
        judged = self._search.judged
        self.reached |= judged & may_change
        if replaced.queries is not None:
            may_change = may_change | replaced.queries
        mine = judged & ~may_change
        self.felt |= change > 0
        self._judged |= mine
        worse = mine & (change > self._leak)
        self._leak = torch.where(worse, change, self._leak)
        self._found_by = self._found_by.masked_fill(worse, len(self._replacements))
        self._replacements.append(replaced)

    @property
    def _broken(self) -> Tensor:
        return self._leak > self._search.allowed

    @property
    def found(self) -> bool:
        """Whether any changed by more than is allowed."""
        return bool(self._broken.any())

    def fault(self, method: str, *, counted: bool) -> Fault:
        """Say what was found, and how much of it."""
        broken = self._broken
        at = (
            index_of(self._leak.argmax(), self._leak.shape),
            index_of(broken.flatten().int().argmax(), broken.shape),
        )
        by = [self._replacements[int(self._found_by[one])] for one in at]
        counts = int(broken.sum()), int(self._judged.sum()), int(broken.any(-1).sum())
        return Fault(False, method, *counts, *at, (by[0], by[1]), counted)


def _of_pairs(
    pairs: Sequence[_Pair], judged: int, *, blind: bool, counted: bool = False
) -> Fault | None:
    if not pairs:
        return None
    observer, replaced = pairs[0]
    entries = len({observer[:-1] for observer, _ in pairs})
    both = replaced, replaced
    return Fault(blind, "gradient", len(pairs), judged, entries, observer, observer, both, counted)
