"""Which outputs depend on what they must not see, and which do not on what they must see."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TypeAlias

import torch
from torch import Tensor

from pytest_attnheat.assertions.behaviour.difference import relative_change
from pytest_attnheat.assertions.behaviour.models import Subject
from pytest_attnheat.assertions.behaviour.subject import for_each_query_head, of_any, of_the_first
from pytest_attnheat.assertions.behaviour.visibility import Claim, Replacement, touched
from pytest_attnheat.attention.chunks import index_of

# How many sets of elements are tried before an output is believed to depend on all of them.
_TRIALS = 12
# How many outputs that no pass moved are looked at.
_MOST_BLIND = 8
# The sizes of the blocks that kernels work in: there masks break.
_BLOCKS = (128, 64, 32, 16)
# A function is cheap: every observer is judged, in no more passes than this.
_MOST_PASSES = 32


@dataclass(frozen=True)
class Fault:
    """Outputs that break the claim.

    Attributes:
        blind: Whether they do not depend on what they must see; else they depend on what they
            must not see.
        method: How it was found: "perturbation", "gradient" or "nan".
        broken: How many outputs.
        judged: Of how many.
        entries: In how many batch entries and heads.
        worst: The index of the worst output (*leading, query).
        first: That of the first.
        replacements: What was replaced when the worst and the first were found.
    """

    blind: bool
    method: str
    broken: int
    judged: int
    entries: int
    worst: tuple[int, ...]
    first: tuple[int, ...]
    replacements: tuple[Replacement, Replacement]


# An observer and what it depends on, or does not.
_Pair: TypeAlias = tuple[tuple[int, ...], Replacement]


class Search:
    """Runs a subject a few times, each time with something else replaced."""

    def __init__(
        self,
        subject: Subject,
        claim: Claim,
        base: Tensor,
        *,
        allowed: float,
        passes: int,
        seed: int,
    ) -> None:
        """Prepare the search; the subject is not called.

        Args:
            subject: The subject.
            claim: What it may depend on.
            base: Its output with nothing replaced.
            allowed: By what part of its size an output may change.
            passes: How many observers are judged for each batch entry and head.
            seed: What replacements are drawn from.

        Raises:
            ValueError: Nothing is forbidden: any dependence would be right.
        """
        self.subject, self.base, self.allowed, self.seed = subject, base, allowed, seed
        self.may_see, self.claim = claim.may_see, claim
        self._passes = passes
        # What a query gives that may see nothing is a matter of declaration, not of leaks.
        self._judged = claim.judged & base.isfinite().all(-1) & claim.may_see.any(-1)
        self._watched = self._judged & ~claim.may_see.all(-1)
        if not bool(self._watched.any()) and next(self._others(), None) is None:
            raise ValueError(
                "assert_no_leakage: every output may see every input, so there is nothing to "
                "check; say causal=, lengths=, documents= or may_see=, or pass a larger batch"
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
        """Return what is broken, leaks before blindness, or None.

        Args:
            methods: "perturbation", "gradient", "nan".
            optional: Whether a subject that is not differentiable may go without "gradient".
            must_see: Whether blindness counts.

        Raises:
            ValueError: It is not differentiable, and that is not optional.
        """
        blind: Fault | None = None
        if "perturbation" in methods:
            replacements = [*self._others(), *self._hidden()]
            leak, blind = self._perturb(replacements, "perturbation")
            if leak is not None:
                return leak
        if "nan" in methods:
            replacements = [Replacement(r.elements, None, "nan") for r in self._hidden()]
            leak, _ = self._perturb(replacements, "nan")
            if leak is not None:
                return leak
        if "gradient" in methods:
            leak, unseen = self._follow_gradients(optional=optional)
            if leak is not None:
                return leak
            blind = unseen or blind  # which names the elements
        return blind if must_see else None

    def _perturb(
        self, replacements: Sequence[Replacement], method: str
    ) -> tuple[Fault | None, Fault | None]:
        """Replace, and find outputs that change but must not, or that never change but must."""
        zeros = torch.zeros(self.claim.judged.shape, dtype=torch.float64, device=self.base.device)
        leak, found_by = zeros.clone(), zeros.long()
        judged, reached, felt = zeros.bool(), zeros.bool(), zeros.bool()
        for number, replaced in enumerate(replacements):
            change = self.change(replaced)
            may_change = self._reached(replaced)
            reached |= self._judged & may_change
            if replaced.queries is not None:
                may_change = may_change | replaced.queries
            mine = self._judged & ~may_change
            felt |= change > 0
            judged |= mine
            worse = mine & (change > leak)
            leak = torch.where(worse, change, leak)
            found_by = torch.where(worse, torch.full_like(found_by, number), found_by)

        broken = leak > self.allowed
        blind = self._never_moved(reached & ~felt, int(reached.sum()))
        if not bool(broken.any()):
            return None, blind
        at = (
            index_of(leak.argmax(), leak.shape),
            index_of(broken.flatten().int().argmax(), broken.shape),
        )
        by = [replacements[int(found_by[one])] for one in at]
        counts = int(broken.sum()), int(judged.sum()), int(broken.any(-1).sum())
        return Fault(False, method, *counts, *at, (by[0], by[1])), blind

    def _never_moved(self, unfelt: Tensor, of: int) -> Fault | None:
        """Outputs that stay the same even if all that they may see is replaced at once.

        That none of the passes moved one proves little: all its attention may be on a key that
        no pass replaced.
        """
        pairs: list[_Pair] = []
        for at in unfelt.nonzero().tolist()[:_MOST_BLIND]:
            observer = tuple(at)
            elements = torch.zeros_like(self.may_see[..., 0, :])
            elements[observer[:-1]] = self.may_see[observer]
            shared = of_any(elements, self.subject.group)
            towards = torch.full_like(unfelt[..., 0], observer[-1], dtype=torch.long)
            if self._stays(observer, shared, towards):
                pairs.append((observer, Replacement(shared)))
        return _of_pairs(pairs, of, blind=True)

    def _stays(self, observer: tuple[int, ...], elements: Tensor, towards: Tensor | None) -> bool:
        contents = (
            Replacement(elements, content="same"),
            Replacement(elements, content="larger"),
            Replacement(elements, content="larger", towards=towards),
        )
        return all(self.change_at(content, observer) == 0 for content in contents)

    def _reached(self, replaced: Replacement) -> Tensor:
        """Which outputs may see what is replaced."""
        if replaced.elements is None:
            return torch.zeros_like(self.claim.judged)
        return touched(self.may_see, for_each_query_head(replaced.elements, self.subject.group))

    def _hidden(self) -> Iterator[Replacement]:
        """In each pass, for each batch entry and head, all that one observer must not see."""
        if not bool(self._watched.any()):
            return
        entries = self._watched[..., 0].numel()
        passes = self._passes
        if self.subject.has_queries:
            rows = self._watched.shape[-1]
            wanted = rows if rows <= _MOST_PASSES else -(-rows // entries)
            passes = min(max(passes, wanted), _MOST_PASSES)
        for number in range(passes):
            observers = self._observers(self._watched, number, passes)
            forbidden = ~self._seen_by(observers)
            forbidden &= self._watched.any(-1, keepdim=True)
            content = "larger" if number % 2 else "same"
            towards = observers if number % 2 else None
            elements = of_the_first(forbidden, self.subject.group)
            yield Replacement(elements, content=content, towards=towards)

    def _seen_by(self, observers: Tensor) -> Tensor:
        """What one observer (*leading) per batch entry and head may see, (*leading, key_len)."""
        key_len = self.may_see.shape[-1]
        index = observers[..., None, None].expand(*observers.shape, 1, key_len)
        return self.may_see.gather(-2, index).squeeze(-2)

    def _observers(self, candidates: Tensor, number: int, of: int) -> Tensor:
        """Choose an observer per batch entry and head, so that all passes spread over the rows."""
        none = ~candidates.any(-1, keepdim=True)
        candidates = candidates | (none & self._judged)
        length, entries = candidates.shape[-1], candidates[..., 0].numel()
        targets = _targets(length, entries, number, of)
        own = torch.tensor(targets, device=candidates.device).reshape(*candidates.shape[:-1], 1)
        rows = torch.arange(length, device=candidates.device)
        # The nearest row that can be one; argmin takes the first of two.
        away = (rows - own).abs().masked_fill(~candidates, 2 * length)
        return away.argmin(-1)

    def _others(self) -> Iterator[Replacement]:
        """Every second batch entry, head and query, and then the rest."""
        shape = self.claim.judged.shape
        takes_queries = self.subject.has_queries
        for dim in range(len(shape) - (0 if takes_queries else 1)):
            is_query, is_head = dim == len(shape) - 1, dim == len(shape) - 2
            groups = self.subject.group if is_head else 1
            # Any two numbers differ in some bit; for a whole model one must do.
            bits = (max(1, shape[dim] // groups) - 1).bit_length()
            bits = bits if takes_queries else min(bits, 1)
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

    def _follow_gradients(self, *, optional: bool) -> tuple[Fault | None, Fault | None]:
        """Where the gradient of a few observers is 0, and where not."""
        # A whole model is dear: one backward pass, if its batch makes that several observers.
        count = 2 if self.subject.has_queries or len(self.claim.judged) == 1 else 1
        chosen = [self._observers(self._judged, number, count) for number in range(count)]
        rows = [self._as_rows(observers, number) for number, observers in enumerate(chosen)]
        try:
            gradients = self.subject.gradient(rows)
        except (RuntimeError, NotImplementedError) as error:
            if optional:
                return None, None
            raise ValueError(
                f'by="gradient": the subject is not differentiable: {error}'
            ) from error
        leaks: list[_Pair] = []
        unseen: list[_Pair] = []
        judged = 0
        for row, gradient in zip(rows, gradients, strict=True):
            felt = for_each_query_head(gradient, self.subject.group)
            seen = self._seen_by(row.int().argmax(-1))
            active = row.any(-1, keepdim=True)
            judged += int(active.sum())
            scale = felt.amax(-1, keepdim=True) * torch.finfo(self.base.dtype).eps
            leaks += [
                pair
                for pair in self._pairs(row, ~(felt <= scale) & ~seen & active)
                if self._is_real(*pair)
            ]
            strongest = felt.masked_fill(~seen, 0).argmax(-1)
            for observer, elements in self._pairs(row, (felt == 0) & seen & active):
                blind = self._blind(observer, elements, int(strongest[observer[:-1]]))
                unseen += [] if blind is None else [(observer, blind)]
        return _of_pairs(leaks, judged, blind=False), _of_pairs(unseen, judged, blind=True)

    def _as_rows(self, observers: Tensor, number: int) -> Tensor:
        """Mark the observers, of the heads that share their keys only one."""
        rows = torch.zeros_like(self.claim.judged)
        rows.scatter_(-1, observers.unsqueeze(-1), True)
        rows &= self._judged
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

    def _is_real(self, observer: tuple[int, ...], replaced: Replacement) -> bool:
        """Whether a gradient is that of the input.

        The embedding of equal token ids may also be looked up for something else, such as the
        source of an encoder.
        """
        if not self.subject.is_tokens:
            return True
        return self.change_at(replaced, observer) > 0

    def _blind(
        self, observer: tuple[int, ...], replaced: Replacement, strongest: int
    ) -> Replacement | None:
        """Some of the elements that make no difference, whatever is there; None if all do.

        A weight or a gradient may be rounded to 0 where the output does depend on one; the
        key that gets most attention brings some to any of them.
        """
        assert replaced.elements is not None
        suspects = [replaced.elements.nonzero()]
        for _ in range(_TRIALS):
            if not suspects:
                break
            some = suspects.pop(0)
            elements = torch.zeros_like(replaced.elements)
            elements[tuple(some.T)] = True
            towards = torch.full_like(self._judged[..., 0], observer[-1], dtype=torch.long)
            like = Replacement(elements, content="larger", like=strongest)
            if self.change_at(like, observer) == 0 and self._stays(observer, elements, towards):
                return Replacement(elements)
            if len(some) > 1:
                suspects += [some[: len(some) // 2], some[len(some) // 2 :]]
        return None


def _targets(length: int, entries: int, number: int, of: int) -> list[int]:
    """Choose a row for each batch entry and head, for one pass of several.

    All rows, where all passes have room for them; else the ends of blocks and an even spread.
    """
    if of * entries >= length:
        slots = range(number * entries, (number + 1) * entries)
        return [(slot + slot // length) % length for slot in slots]  # another one each time round
    ends = dict.fromkeys(end - 1 for block in _BLOCKS for end in range(block, length, block))
    chosen = list(ends)[: of * entries // 2]
    rest = of * entries - len(chosen)
    chosen += [round(i * (length - 1) / max(1, rest - 1)) for i in range(rest)]
    return sorted(chosen)[number::of]


def _of_pairs(pairs: Sequence[_Pair], judged: int, *, blind: bool) -> Fault | None:
    if not pairs:
        return None
    observer, replaced = pairs[0]
    entries = len({observer[:-1] for observer, _ in pairs})
    return Fault(
        blind, "gradient", len(pairs), judged, entries, observer, observer, (replaced, replaced)
    )
