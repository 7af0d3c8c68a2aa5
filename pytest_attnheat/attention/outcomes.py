"""What plans give on one case, and which known defect gives an output that is wrong.

It is computed once for all plans that decide alike what matters on it. Most decisions of a plan are
never looked at on a case: those about masks where there is no mask. And most that are looked at
change nothing: blocks that are longer than the keys. So it is watched which decisions each step of
a plan reads, and what it comes to. What two plans give is the same from the first step on at which
all before came to the same.

The catalogue (`pytest_attnheat.attention.defects`) is tried on the very call that went wrong,
where that is small. The examination (`pytest_attnheat.contract`) asks more calls, and is surer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .call import Call
from .decisions import Change, Defect, Misreading
from .defects import DEFECTS, in_order
from .plan import Case, NotApplicable, Outcome, Plan, Step, carry_out, directly, misread
from .tolerance import answer_tolerance, answer_units

# The decisions of a plan that differ from those of the correct one, by name.
Decisions: TypeAlias = Mapping[str, Any]
# Cases with more weights are large.
_LARGE = 2000
_USUAL: dict[str, Any] = {one.name: getattr(Plan(), one.name) for one in fields(Plan)}


@dataclass(frozen=True, eq=False)
class Expected:
    """What a plan gives on a case, and what judging it takes."""

    output: Tensor  # (batch, heads, query_len, value_dim)
    largest_score: Tensor  # The largest score of each row, (batch, heads, query_len)
    ordinary: float | Tensor  # The rms of the values that were used; of several, a tensor
    unjudged: Tensor | None  # Rows that are not judged, (batch, heads, query_len); None if all are

    def errors(
        self, found: Tensor, dtype: torch.dtype, *, least: float, most: float
    ) -> tuple[Tensor, Tensor]:
        """Compare it with an answer in float64, (batch, heads, query_len, value_dim)."""
        # Returns the error of each row as a part of its size, from `least` to `most` of it, and
        # what rounding may do (see **Answers** in `attention.tolerance`), both (batch, heads,
        # query_len). A row of which only one is finite has the largest error that there is, 2;
        # unjudged rows have 0.
        differs = found.isfinite() != self.output.isfinite()
        off, sizes = rms(finite(found - self.output)), map(rms, map(finite, (found, self.output)))
        least_size = torch.as_tensor(self.ordinary, dtype=torch.float64).clamp(min=1e-30)
        error = off / torch.maximum(*sizes).clamp_(min=least_size)
        error.masked_fill_(differs.any(-1), 2.0)
        if self.unjudged is not None:
            error.masked_fill_(self.unjudged, 0.0)
        allowed = answer_units(dtype) * torch.finfo(dtype).eps * (2.0 + self.largest_score)
        return error, allowed.clamp_(min=least, max=max(most, least))


def expected(plan: Plan, case: Case, step: Step = directly) -> Expected | None:
    """Carry out a plan, each step by `step`; None where it cannot be carried out."""
    try:
        result = carry_out(plan, case, step)
    except NotApplicable:
        return None
    outcome: Expected = step(_judgeable, plan, case, result)
    return outcome


def _judgeable(plan: Plan, case: Case, result: Outcome) -> Expected:
    largest_score = finite(result.scores).abs().masked_fill_(~result.permitted, 0.0).amax(-1)
    if plan.dim != "keys" or plan.merge != "transpose":
        # A row of the output is not made by its own scores alone.
        largest_score = torch.full_like(largest_score, float(largest_score.max()))
    unjudged = None
    if case.fully_masked == "undefined":
        unjudged = ~case.seen.any(-1)
    ordinary = float(finite(result.value).square().mean().sqrt())
    return Expected(result.output, largest_score, ordinary, unjudged)


def finite(tensor: Tensor) -> Tensor:
    """Return a tensor with 0 in place of NaN and inf."""
    return torch.nan_to_num(tensor, nan=0.0, posinf=0.0, neginf=0.0)


def rms(rows: Tensor) -> Tensor:
    """Return the root of the mean square of each row."""
    return rows.square().mean(-1).sqrt()


def decisions_of(change: Change) -> Decisions:
    """Return what a defect decides."""
    plan = change(Plan())
    return {name: getattr(plan, name) for name in _USUAL if getattr(plan, name) != _USUAL[name]}


def together(first: Decisions, second: Decisions) -> dict[str, Any]:
    """Return what is decided where the second comes on top of the first."""
    both = {**first, **second}
    for name in first.keys() & second.keys():
        if isinstance(first[name], frozenset):
            both[name] = first[name] | second[name]
    return both


def is_large(case: Case) -> bool:
    """Return whether a case has so many weights that few plans are tried on it."""
    return math.prod(case.shape) > _LARGE


class _Node:
    """A point in carrying out plans: which decision is read next, or that a step ends here."""

    __slots__ = ("by_value", "ends", "name", "outcome", "reached", "then")

    def __init__(self) -> None:
        self.name: str | None = None
        self.by_value: dict[Any, _Node] = {}
        self.then: _Node | None = None  # where a step ends: the point of all that came to the same
        self.reached: Any = None  # what that step came to, if it is kept
        self.ends = False
        self.outcome: Expected | None = None


def _end(node: _Node | None, decided: Decisions, *, of_step: bool = False) -> _Node | None:
    """Where a plan, or the step that it is at, ends up from a node; None if that is not known."""
    # Most of the time of a diagnosis is spent here.
    while node is not None and not node.ends and not (of_step and node.name is None):
        name = node.name
        if name is None:
            node = node.then
        else:
            node = node.by_value.get(decided[name] if name in decided else _USUAL[name])
    return node


class _KnownError(Exception):
    """What comes of a plan is known from here on."""


class _Watched(Plan):
    """A plan that tells which of its decisions are read."""

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        # A copy of it tells nothing: all was read to make it.
        if name in _USUAL and (told := super().__getattribute__("__dict__").get("told")):
            told(name, value)
        return value


class Outcomes:
    """What plans give on a case. What hardly differs from what is `healthy` is the same object."""

    def __init__(self, case: Case) -> None:
        self.case = case
        # What steps came to on long inputs takes too much room, but for those of correct attention.
        self._keeps = not is_large(case)
        self._root = _Node()
        # By the step before and what it came to.
        self._states: dict[tuple[int, int], _Node] = {}
        self._known: dict[int, Expected] = {}
        self._given: dict[Any, Expected | None] = {}
        self._readings: dict[tuple[Case, Misreading], Case] = {}
        self.healthy: Expected | None = None
        self.healthy = self.of({})

    def of(self, decided: Decisions) -> Expected | None:
        """Return what a plan gives, None if it cannot be carried out; the same is one object."""
        asked = tuple(decided.items())
        if asked not in self._given:
            end = _end(self._root, decided)
            self._given[asked] = self._computed(decided) if end is None else end.outcome
        return self._given[asked]

    def _computed(self, decided: Decisions) -> Expected | None:
        """Carry out a plan, but for the steps that are known."""
        node = last = self._root
        seen = set[str]()

        def told(name: str, value: Any) -> None:
            nonlocal node
            if name not in seen:
                seen.add(name)
                node.name = name
                node = node.by_value.setdefault(value, _Node())

        def step(function: Callable[..., Any], *arguments: Any) -> Any:
            nonlocal node, last
            known = _end(node, decided, of_step=True)
            if known is not None and known.then is not None and known.then.reached is not None:
                node = last = known.then
                return node.reached
            seen.clear()
            reached = self._read_as(plan) if function is misread else function(*arguments)
            same = id(last), digest(reached)
            node.then = self._states.setdefault(same, _Node())
            node = last = node.then
            if _end(node, decided) is not None:
                raise _KnownError
            if node.reached is not None:
                return node.reached
            if self._keeps or isinstance(reached, Case) or self.healthy is None:
                node.reached = reached
            return reached

        plan = object.__new__(_Watched)
        vars(plan).update(_USUAL, **decided, told=told)
        try:
            outcome = expected(plan, self.case, step)
        except _KnownError:
            return self.of(decided)
        node.outcome, node.ends = self._one(outcome), True
        return node.outcome

    def _read_as(self, plan: Plan) -> Case:
        """The case as a plan reads it, each misreading done once."""
        case = self.case
        for reading in in_order(plan.misread):
            if (case, reading) not in self._readings:
                self._readings[case, reading] = reading(case)
            case = self._readings[case, reading]
        return case

    def forget(self) -> None:
        """Forget all but correct attention and its steps: outcomes of long inputs take room."""
        node, kept = self._root, {self._root}
        while not node.ends:
            if node.name is not None:
                usual = _USUAL[node.name]
                node.by_value = {usual: node.by_value[usual]}
                node = node.by_value[usual]
            else:
                assert node.then is not None
                node = node.then
            kept.add(node)
        self._states = {at: node for at, node in self._states.items() if node in kept}
        self._known = {at: one for at, one in self._known.items() if one is self.healthy}
        self._given = {(): self.healthy}
        self._readings.clear()

    def _one(self, outcome: Expected | None) -> Expected | None:
        if outcome is None:
            return None
        if self.healthy is not None and _equal(outcome, self.healthy):
            return self.healthy
        return self._known.setdefault(digest(outcome), outcome)


kept_outcomes = lru_cache(maxsize=64)(Outcomes)


def digest(reached: object) -> int:
    """A number that tells what was reached from all else, as long as that is kept."""
    if isinstance(reached, Expected):
        reached = reached.output, reached.largest_score
    if isinstance(reached, Case):
        reached = tuple(getattr(reached, one.name) for one in fields(Case) if one.name != "earlier")
    if isinstance(reached, tuple):
        return hash(tuple(map(digest, reached)))
    if isinstance(reached, Tensor):
        return hash((reached.shape, reached.contiguous().numpy().tobytes()))
    return hash(repr(reached))


def _equal(one: Expected, other: Expected) -> bool:
    if torch.equal(one.output, other.output):
        return True
    return torch.allclose(one.output, other.output, rtol=1e-9, atol=1e-12, equal_nan=True)


def stacked(outcomes: Iterable[Expected]) -> Expected:
    """Return several outcomes of a case as one, with a dimension before all others."""
    some = list(outcomes)
    return Expected(
        torch.stack([one.output for one in some]),
        torch.stack([one.largest_score for one in some]),
        torch.tensor([one.ordinary for one in some], dtype=torch.float64)[:, None, None, None],
        some[0].unjudged,
    )


# Above so many scores some hundred attempts would take longer than a few seconds.
_MOST_SCORES = 2**18
# Up to which part of how far the output is off it may differ from an attempt; and up to how many
# times the difference of the nearest attempt another one fits as well.
PART, AS_WELL = 0.25, 2.0
# Rounding never excuses more than this part of a row.
MOST_ALLOWED = 0.125
MOST_NAMED = 3


def likely_mistake(call: Call, output: Tensor) -> str | None:
    """Return the mistake that gives this output, or those that all give it; None if none does."""
    named = fitting(call, output)
    if named and not bool(output.any()):  # whatever drops all there is fits, and says less
        return "every number of the output is 0"
    return f"the output is that of attention {listed(list(named))}" if named else None


def listed(named: Sequence[str]) -> str:
    """Return what may all be the mistake, in words."""
    more = len(named) - MOST_NAMED
    rest = [f"{more} more that give the same"] if more > 0 else []
    return ", or ".join([*named[:MOST_NAMED], *rest])


def too_large(call: Call) -> bool:
    """Return whether no mistake is looked for: it would take too long, or is elsewhere."""
    if call.maps * call.query_len * call.key_len > _MOST_SCORES:
        return True
    # Functions may hold tensors of that device.
    return call.query.device.type != "cpu" and bool(call.may_see or call.score_mod)


def fitting(call: Call, output: Tensor) -> dict[str, Plan]:
    """Return the mistakes that give an output, by their sentences, with what each computes."""
    # None are returned where the output is right.
    if too_large(call):
        return {}
    case = as_case(call)
    found = output.detach().cpu().double().reshape(*case.shape[:3], -1)
    with torch.no_grad():
        outcomes = Outcomes(case)
        right = outcomes.healthy
        assert right is not None
        judged = slice(None) if right.unjudged is None else ~right.unjudged
        if not bool(found[judged].isfinite().all(-1).any()):
            return {}  # whatever gives nothing but NaN would fit
        wrong_by = _off(right, found, case)[0]
        if wrong_by <= answer_tolerance(torch.float64):  # the attempts are off by as much
            return {}
        tried: dict[Expected | None, float] = {None: math.inf, right: math.inf}

        def off(decided: Decisions) -> float:
            outcome = outcomes.of(decided)
            if outcome not in tried:
                assert outcome is not None
                size, fits = _off(outcome, found, case)
                tried[outcome] = size if fits and size < PART * wrong_by else math.inf
            return tried[outcome]

        # If only rows without keys are wrong, nothing else is to blame for them.
        rows = case.has_empty_rows and any(
            off({"fully_masked": row}) < math.inf for row in ("zero", "uniform", "nan", "natural")
        )
        fits: dict[str, tuple[float, Plan]] = {}
        for defect, change in changes():
            decided = decisions_of(change)
            to_blame = len(decided) == 1 or not (rows and "fully_masked" in decided)
            if to_blame and (size := off(decided)) < fits.get(defect.sentence, (math.inf,))[0]:
                fits[defect.sentence] = size, change(Plan())
    least = min((size for size, _ in fits.values()), default=0.0)
    most = AS_WELL * max(least, answer_tolerance(torch.float64))
    near = {sentence: plan for sentence, (size, plan) in fits.items() if size <= most}
    return {sentence: near[sentence] for sentence in simplest(near)}


def simplest(named: Collection[str], catalogue: Sequence[Defect] = DEFECTS) -> list[str]:
    """Leave out of some sentences those of mistakes that are a form of another one of them."""
    of_name = {one.name: one.sentence for one in catalogue}
    forms = {one.sentence for one in catalogue
             if any(of_name.get(simple) in named for simple in one.form_of.split())}  # fmt: skip
    return [sentence for sentence in named if sentence not in forms]


def changes(catalogue: Sequence[Defect] = DEFECTS) -> Iterator[tuple[Defect, Change]]:
    """Yield each mistake that is seen exactly, in each of its forms."""
    for defect in catalogue:
        if defect.seen == "exactly":
            yield from ((defect, change) for change in defect.changes)


def _off(attempt: Expected, found: Tensor, case: Case) -> tuple[float, bool]:
    """How far an output is off, the rms of its rows, and whether each is off by rounding alone."""
    least = answer_tolerance(case.dtype)
    error, allowed = attempt.errors(found, case.dtype, least=least, most=MOST_ALLOWED)
    return float(error.square().mean().sqrt()), bool((error <= allowed).all())


def as_case(call: Call) -> Case:
    """Return the call on the CPU, (batch, heads, length, width), as a plan is carried out on it."""
    lead = call.query.shape[:-2][:-1]

    def here(name: str) -> Tensor | None:
        given: Tensor | None = getattr(call, name)
        if given is None:
            return None
        given = given.detach().cpu()
        return given.double() if given.is_floating_point() else given

    def batched(name: str) -> Tensor | None:
        if (given := here(name)) is None:
            return None
        given = given[(None,) * max(0, 3 - given.ndim)]
        last = given.shape[-3:]
        return given.expand(*lead, *last).reshape(lead.numel(), *last)

    own: dict[str, Any] = {f.name: getattr(call, f.name) for f in fields(Call)}
    own |= {n: batched(n) for n in ("query", "key", "value", "mask", "bias", "upstream")}
    own |= {n: here(n) for n in ("alibi", "sinks")}
    own |= {"scale_given": call.scale is not None, "dtype": call.query.dtype}
    return Case(**own)
