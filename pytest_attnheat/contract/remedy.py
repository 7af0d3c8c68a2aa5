"""The smallest set of cases that tells wrong versions of attention from the right one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from pytest_attnheat.assertions.precision_calls import Criteria, asking, described_call
from pytest_attnheat.assertions.precision_judging import judge_call
from pytest_attnheat.attention.call import Call
from pytest_attnheat.attention.hard_cases import FEATURE_CASES, HARD_CASES, hard_case
from pytest_attnheat.attention.mistakes import as_case
from pytest_attnheat.contract.effects import Known
from pytest_attnheat.contract.planting import Planted
from pytest_attnheat.contract.probing import one_thread
from pytest_attnheat.contract.spec import AttentionSpec
from pytest_attnheat.contract.versions import Version

# Samples must differ for defects that mix them up to show.
_BATCH = 2
# Longer cases are asked where shorter ones do not tell all apart.
_SMALL = 40
_FINEST = ("float64", "float32", "float16", "bfloat16")
_TEST = """\
@pytest.mark.parametrize("name", {names})
def test_what_survived(name):
    case = hard_case(name, dtype="{dtype}", batch={batch})
    {call}
"""


@dataclass(frozen=True)
class Remedy:
    """Cases that tell what survived from the right one.

    Attributes:
        cases: Names of hard cases, the one that tells most apart first.
        dtype: The dtype in which they are asked.
        killed: The names of what they tell apart.
        left: The names of what they do not.
        tolerance: By dtype, by which part of the largest number of a head rounding may move one.
        code: A test ready to paste; empty without cases.
    """

    cases: tuple[str, ...] = ()
    dtype: str = ""
    killed: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    tolerance: tuple[tuple[str, float], ...] = ()
    code: str = ""

    def __str__(self) -> str:
        """What to add, and which tolerance follows from the dtype."""
        lines = []
        if self.tolerance:
            parts = ", ".join(f"{part:.1e} in {dtype}" for dtype, part in self.tolerance)
            lines += [
                "what survived changed answers that the judge was given: it compares too little "
                "of them, or too coarsely. Rounding alone moves no number of these answers by more "
                f"than this part of the largest of its head: {parts}"
            ]
        if self.cases:
            count = len(self.cases)
            lines += [
                f"{count} case{'s' * (count > 1)} would have told {len(self.killed)} of "
                f"{len(self.killed) + len(self.left)} apart:\n\n{self.code}"
            ]
        if self.left:
            lines += [f"check_attention examines what is left: {', '.join(self.left)}"]
        return "\n".join(lines)


def remedy_for(
    spec: AttentionSpec,
    survived: Sequence[Version],
    plant: Callable[[Version], Planted],
    rounding: Mapping[str, float],
) -> Remedy:
    """Return the fewest hard cases, chosen greedily, on which our assertion kills what survived.

    Args:
        spec: The target.
        survived: The versions that a judge accepted.
        plant: Plants a version.
        rounding: By each dtype in which they were off, what rounding may do.
    """
    if not survived:
        return Remedy()
    dtype = next((name for name in _FINEST if name in rounding), "float32")
    cases, left = list[str](), list(survived)
    every = {n: hard_case(n, dtype=dtype, device=_device(spec), batch=_BATCH)
             for n in (*HARD_CASES, *FEATURE_CASES)}  # fmt: skip
    for large in (False, True):
        some = {n: call for n, call in every.items() if (call.key_len > _SMALL) is large}
        with one_thread():
            more, left = _greedy(spec, left, plant, some) if left else ([], left)
        cases += more
    told = [one for one in survived if one not in left]
    return Remedy(
        tuple(cases),
        dtype,
        tuple(one.name for one in told),
        tuple(one.name for one in left),
        tuple(sorted(rounding.items())),
        _code(spec, cases, dtype) if cases else "",
    )


def _device(spec: AttentionSpec) -> str:
    return spec.devices[0] if spec.devices else "cpu"


def _greedy(
    spec: AttentionSpec,
    survived: Sequence[Version],
    plant: Callable[[Version], Planted],
    calls: Mapping[str, Call],
) -> tuple[list[str], list[Version]]:
    """Choose cases, that which tells most apart first; return them and what none tells apart."""
    hopes = {}
    for name, call in calls.items():
        if _taken(spec, call):
            known = Known(as_case(spec.described(call)), spec.tolerance or 0.0)
            hopes[name] = [v for v in survived if v.kind == "backward" or known.chosen(v)]
    cases, left = list[str](), list(survived)
    while hopes:
        name = max(hopes, key=lambda name: sum(one in left for one in hopes[name]))
        hoped = [one for one in hopes.pop(name) if one in left]
        if not hoped:
            break
        told = [one for one in hoped if not _accepted(spec, plant(one), calls[name])]
        if told:
            cases.append(name)
            left = [one for one in left if one not in told]
    return cases, left


def _taken(spec: AttentionSpec, call: Call) -> bool:
    """Whether the right one takes a call, and passes."""
    try:
        return _accepted(spec, None, call)
    except Exception:  # whatever the target raises, it does not take this case
        return False


def _accepted(spec: AttentionSpec, planted: Planted | None, call: Call) -> bool:
    """Whether `assert_matches_reference` accepts an implementation on a call."""
    own = spec if planted is None else _with_subject(spec, planted)
    described, asked, names = described_call(own, (call, None, None), {})
    criteria = Criteria(tolerance=spec.tolerance or 0.0)
    try:
        with torch.enable_grad():
            judge_call("assert_matches_reference", asking(described), asked, criteria,
                       names=names, code=planted, explain=False)  # fmt: skip
    except AssertionError:
        return False
    except Exception:
        if planted is None:
            raise
        return False
    return True


def _with_subject(spec: AttentionSpec, planted: Planted) -> AttentionSpec:
    """The very same specification of another subject, which has the same signature."""
    own = object.__new__(AttentionSpec)
    known = {"parameters": spec.parameters, "convention": spec.convention, "subject": planted}
    vars(own).update(vars(spec), **known)
    return own


def _imported(spec: AttentionSpec) -> list[str]:
    """The line that imports a target which stands at the top of a module under its own name."""
    target = spec.implementation
    module = str(getattr(target, "__module__", ""))
    found = getattr(sys.modules.get(module), spec.name, None)
    if module == "__main__" or found is not target:
        return []
    return ["", f"from {module} import {spec.name}"]


def _code(spec: AttentionSpec, cases: Sequence[str], dtype: str) -> str:
    """A test of these cases alone."""
    name = spec.name if spec.name.isidentifier() else "my_attention"
    plain = spec.convention is None and spec.typed <= {"subject", "name", "few_shapes"}
    head = ["import pytest", ""]
    if plain:
        head += ["from pytest_attnheat import assert_matches_reference, hard_case"]
        call = (f"assert_matches_reference({name}, case.query, case.key, case.value, "
                "**case.arguments)")  # fmt: skip
    else:
        head += ["from pytest_attnheat import AttentionSpec, assert_matches_reference, hard_case"]
        declared = "" if spec.convention is not None else ", ..."
        call = f"assert_matches_reference(AttentionSpec({name}{declared}), case)"
    head += _imported(spec)
    names = "[" + ", ".join(f'"{one}"' for one in cases) + "]"
    test = _TEST.format(names=names, dtype=dtype, batch=_BATCH, call=call)
    return "\n".join([*head, "", "", test])
