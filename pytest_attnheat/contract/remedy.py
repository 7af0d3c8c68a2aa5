"""The smallest set of calls that tells wrong versions of attention from the right one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType

import torch

from ..assertions.precision_calls import Criteria, asking, described_call
from ..assertions.precision_judging import judge_call
from ..attention.call import Call
from ..attention.cases import as_dtype
from ..attention.hard_cases import FEATURE_CASES, HARD_CASES, hard_case
from ..attention.levels import Choice
from ..attention.outcomes import as_case
from .effects import Known, Slopes
from .examination import Examination
from .planting import Planted, shows_in_gradients, slopes_of
from .probing import one_thread
from .spec import AttentionSpec
from .versions import Version

# Samples must differ for defects that mix them up to show.
_BATCH = 2
# Longer cases are asked where shorter ones do not tell all apart.
_SMALL = 40
_FINEST = ("float64", "float32", "float16", "bfloat16")
_BY_NAME = """\
@pytest.mark.parametrize("name", {names})
def test_what_survived(name):
    case = hard_case(name, dtype="{dtype}", batch={batch})
    {call}
"""
_BY_CALL = """\
@pytest.mark.parametrize(
    "call",
    [
{calls}
    ],
)
def test_what_hard_cases_do_not_tell(call):
    report = check_attention({subject}, replay=call)
    assert report.passed, str(report)
"""


@dataclass(frozen=True)
class Remedy:
    """Calls that tell what survived from the right one."""

    cases: tuple[str, ...] = ()  # Names of hard cases, the one that tells most apart first
    # Calls of the examination, as `check_attention(replay=)` takes them, for what hard cases do not
    # tell apart
    calls: tuple[str, ...] = ()
    dtype: str = ""  # The dtype in which they are asked
    killed: tuple[str, ...] = ()  # The names of what they tell apart
    left: tuple[str, ...] = ()  # The names of what they do not
    # By hard case, which inactive defects would be active on it
    exercised: tuple[tuple[str, tuple[str, ...]], ...] = ()
    tolerance: tuple[tuple[str, float], ...] = ()  # By dtype, what rounding may do to a head
    code: str = ""  # Tests ready to paste; empty where nothing survived
    inside: bool = False  # Whether the cases are of the attention inside of a block

    def __str__(self) -> str:
        """What to add, and which tolerance follows from the dtype."""
        lines = []
        if self.exercised:
            cases = ", ".join(f"{name} ({len(some)})" for name, some in self.exercised)
            count = sum(len(some) for _, some in self.exercised)
            lines += [f"hard cases on which {count} of the inactive would show: {cases}"]
        if self.tolerance:
            parts = ", ".join(f"{part:.1e} in {dtype}" for dtype, part in self.tolerance)
            lines += [
                "what survived changed answers that the judge was given: it compares too little "
                "of them, or too coarsely. Rounding alone moves no number of these answers by more "
                f"than this part of the largest of its head: {parts}"
            ]
        told = f"{len(self.killed)} of {len(self.killed) + len(self.left)} apart"
        count = len(self.cases) + len(self.calls)
        if self.inside and self.code:
            calls = ", ".join((*self.cases, *self.calls)) or "no call that is known"
            lines += [
                f"the attention inside, given {calls}, would have told {told}. Which calls of the "
                f"block lead to these is not known. This examines what is inside:\n\n{self.code}"
            ]
        elif count:
            lines += [f"{count} call{'s' * (count > 1)} would have told {told}:\n\n{self.code}"]
        if self.left:
            lines += [f"check_attention examines what is left: {', '.join(self.left)}"]
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class _Asked:
    """A call that may tell versions apart."""

    name: str  # That of a hard case, or the levels of a call of the examination
    call: Call  # The call
    spec: AttentionSpec  # The target
    examined: tuple[Examination, Choice] | None = None  # It, and what is chosen; None: hard case

    @cached_property
    def known(self) -> Known:
        return Known(as_case(self.spec.described(self.call)), self.spec.tolerance or 0.0)

    @cached_property
    def slopes(self) -> Slopes:
        return slopes_of(self.spec.described(self.call))

    @cached_property
    def is_taken(self) -> bool:
        """Whether the right one takes it, and passes."""
        try:
            return self.accepts(None)
        except Exception:  # whatever the target raises, it does not take this call
            return False

    def may_tell(self, version: Version) -> bool:
        """Whether a version may be another than the right one here."""
        return version.kind == "backward" or version.remembers or bool(self.known.chosen(version))

    def shows(self, version: Version) -> bool:
        """Whether a version is another than the right one here."""
        if version.kind == "backward":
            return shows_in_gradients(version, self.slopes)
        return bool(self.known.chosen(version))

    def accepts(self, planted: Planted | None) -> bool:
        """Whether a version passes for right: as `assert_matches_reference` judges, or a replay."""
        own = self.spec if planted is None else self.spec.of_another(planted)
        try:
            with torch.enable_grad():
                self._judge(own, planted)
        except AssertionError:
            return False
        except Exception:
            if planted is None:
                raise
            return False
        return True

    def _judge(self, own: AttentionSpec, planted: Planted | None) -> None:
        if self.examined is not None:
            examination, chosen = self.examined
            again = Examination(own, examination.dtype, examination.device, examination.seed)
            vars(again)["space"] = examination.space  # the right one says what can be asked
            again.judge(chosen, explain=False)
            return
        described, asked, names = described_call(own, (self.call, None, None), {})
        criteria = Criteria(tolerance=self.spec.tolerance or 0.0)
        judge_call("assert_matches_reference", asking(described), asked, criteria, names=names,
                   code=planted, explain=False)  # fmt: skip


def remedy_for(
    spec: AttentionSpec,  # The target
    survived: Sequence[Version],  # The versions that a judge accepted
    inactive: Sequence[Version],  # Those that were the right one on all its calls
    plant: Callable[[Version], Planted],  # Plants a version
    rounding: Mapping[str, float],  # By each dtype in which they were off, what rounding may do
    *,
    seed: int = 0,  # Where calls of the examination are drawn from
) -> Remedy:
    """Return the fewest calls, chosen greedily, on which our assertions kill what survived."""
    dtype = next((name for name in _FINEST if name in rounding), spec.dtypes[0])
    device = spec.devices[0] if spec.devices else "cpu"
    every = [_Asked(n, hard_case(n, dtype=dtype, device=device, batch=_BATCH), spec)
             for n in (*HARD_CASES, *FEATURE_CASES)]  # fmt: skip
    small = [one for one in every if one.call.key_len <= _SMALL]
    large = [one for one in every if one not in small]
    chosen, left = list[_Asked](), list(survived)
    with one_thread():
        for some in (small, large):
            left = _greedy(left, plant, some, chosen) if left else left
        if left:
            left = _greedy(left, plant, [*_examined(spec, dtype, device, seed)], chosen)
        exercised = _exercised(inactive, small)
    cases = tuple(one.name for one in chosen if one.examined is None)
    calls = tuple(one.name for one in chosen if one.examined is not None)
    return Remedy(
        cases, calls, dtype if survived else "",
        tuple(one.name for one in survived if one not in left), tuple(one.name for one in left),
        exercised, tuple(sorted(rounding.items())),
        _code(spec, cases, calls, dtype) if chosen else "",
    )  # fmt: skip


def _examined(spec: AttentionSpec, dtype: str, device: str, seed: int) -> Iterator[_Asked]:
    """The calls of the examination in which every pair of levels occurs."""
    examination = Examination(spec, as_dtype(dtype), torch.device(device), seed)
    for chosen in examination.space.covering().cases:
        try:
            call = examination.drawn(chosen)
        except Exception:  # it cannot be said to this target
            continue
        yield _Asked(examination.text(chosen), call, spec, (examination, chosen))


def _greedy(
    survived: Sequence[Version],
    plant: Callable[[Version], Planted],
    asked: Sequence[_Asked],
    chosen: list[_Asked],
) -> list[Version]:
    """Choose calls, that which tells most apart first; return what none tells apart."""
    taken = [one for one in asked if one.is_taken]
    hopes = {one: [v for v in survived if one.may_tell(v)] for one in taken}
    left = list(survived)
    while hopes:
        best = max(hopes, key=lambda one: sum(v in left for v in hopes[one]))
        hoped = [v for v in hopes.pop(best) if v in left]
        if not hoped:
            break
        told = [v for v in hoped if _told(plant(v), [*chosen, best] if v.remembers else [best])]
        if told:
            chosen.append(best)
            left = [v for v in left if v not in told]
    for version in [v for v in left if v.remembers]:  # it takes two calls of the same shapes
        pair = _telling_pair(plant(version), taken)
        if pair:
            chosen += [one for one in pair if one not in chosen]
            left.remove(version)
    return left


def _told(planted: Planted, asked: Sequence[_Asked]) -> bool:
    """Whether a version is rejected on one of some calls, asked one after another."""
    return any(not one.accepts(planted) for one in asked)


def _telling_pair(planted: Planted, asked: Sequence[_Asked]) -> list[_Asked]:
    """The first two calls of the same shapes on which a version is told apart; or none."""
    first: dict[object, _Asked] = {}
    for one in asked:
        before = first.setdefault(tuple(tensor.shape for tensor in one.call.tensors), one)
        if not one.accepts(planted):
            return [before, one]
    return []


def _exercised(
    inactive: Sequence[Version], asked: Sequence[_Asked]
) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """The calls that the target takes on which inactive versions show, each but once."""
    left, found = list(inactive), list[tuple[str, tuple[str, ...]]]()
    for one in asked:
        if not left:
            break
        some = [v for v in left if one.shows(v)] if one.is_taken else []
        if some:
            found.append((one.name, tuple(v.name for v in some)))
            left = [v for v in left if v not in some]
    return tuple(sorted(found, key=lambda pair: -len(pair[1])))


def _imported(spec: AttentionSpec) -> tuple[str, str]:
    """How a target, or its specification, is called that a module has at its top, and its import.

    Both are empty where there is none: it was made in a test, say.
    """
    target = spec.implementation
    module = str(getattr(target, "__module__", ""))
    module = {"torch._C._nn": "torch.nn.functional"}.get(module, module)
    held = [
        (own.__name__.rpartition(".")[2].startswith(("test", "conftest")), own.__name__, name)
        for own in list(sys.modules.values())
        if isinstance(own, ModuleType) and own.__name__ != "__main__"
        for name, value in list(vars(own).items())
        if value is spec
    ]
    if held:  # rather where it is made than where tests have it
        _, own, name = min(held)
        return name, f"from {own} import {name}"
    found = getattr(sys.modules.get(module), spec.name, None)
    if module == "__main__" or found is not target:
        return "", ""
    return "", f"from {module} import {spec.name}"


def _code(spec: AttentionSpec, cases: Sequence[str], calls: Sequence[str], dtype: str) -> str:
    """Tests of these calls alone."""
    name = spec.name if spec.name.isidentifier() else "my_attention"
    plain = spec.convention is None and spec.typed <= {"subject", "name", "few_shapes"}
    declared = "" if plain or spec.convention is not None else ", ..."
    held, line = _imported(spec)
    subject = held or (name if plain else f"AttentionSpec({name}{declared})")
    names = ["AttentionSpec"] * (not plain and not held)
    names += ["assert_matches_reference"] * bool(cases)
    names += ["check_attention"] * bool(calls) + ["hard_case"] * bool(cases)
    head = ["import pytest", "", f"from pytest_attnheat import {', '.join(names)}"]
    tests = []
    if cases:
        bare = plain and not held
        given = "case.query, case.key, case.value, **case.arguments" if bare else "case"
        listed = "[" + ", ".join(f'"{one}"' for one in cases) + "]"
        call = f"assert_matches_reference({subject}, {given})"
        tests += [_BY_NAME.format(names=listed, dtype=dtype, batch=_BATCH, call=call)]
    if calls:
        listed = "\n".join(f'        "{one}",' for one in calls)
        tests += [_BY_CALL.format(calls=listed, subject=subject)]
    return "\n".join([*head, *(["", line] if line else []), "", "", "\n\n".join(tests)])
