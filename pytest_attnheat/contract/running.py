"""Running checks: what one found, and what is said of it."""

from __future__ import annotations

import inspect
import math
import traceback
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from ..assertions.behaviour import sequences
from ..assertions.behaviour.inside import OUTSIDE
from ..assertions.behaviour.models import ModelSubject
from ..attention.devices import fault_of, names_of, resolve
from ..callables import always_compiled, borrowed, is_compiled, is_past_compiling
from ..failure import Failure
from ..inputs import dtype_name, misuse
from . import asking
from .captured import diagnose_records, records_of
from .checks import BLOCK_CHECKS, CAPTURED_CHECKS, CHECKS, Check
from .combinations import REPLAY
from .declarations import hints_of, wrong_declaration
from .diagnosing import diagnose
from .diagnosis import Diagnosis
from .examination import Examination, Skipped, is_refusal
from .long_calls import LONG
from .spec import AttentionSpec

Status: TypeAlias = Literal["passed", "failed", "skipped", "xfailed"]


@dataclass(frozen=True)
class Result:
    """What one check found.

    Attributes:
        name: The name of the check.
        dtype: The dtype, as a name.
        device: The device, as a name.
        status: `"passed"`, `"failed"`, `"skipped"` or `"xfailed"`.
        message: Why it failed, the reason why it was skipped or expected to fail, or what is worth
            a word where it passed.
        declaration: What is wrongly declared, where that is why it failed.
        reason: The message in one line: what does not hold, and the likely cause.
        replay: The smallest call that still goes wrong, as `check_attention(replay=...)` takes it;
            empty where that is no call of its own.
        isolated: Whether it ended its process, or never answered: a replay needs `isolate=True`.
        failure: What the check raised, where that is a failure with fields.
    """

    name: str
    dtype: str
    device: str
    status: Status
    message: str = ""
    declaration: str = ""
    reason: str = ""
    replay: str = ""
    isolated: bool = False
    failure: Failure | None = None

    def saying(self, status: Status, message: str) -> Result:
        """Return it with another status, and a message whose first line is the reason."""
        reason = message.partition("\n")[0]
        return replace(self, status=status, message=message, reason=reason)

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data; of a failure, its numbers as well."""
        names = [one.name for one in fields(self) if one.name != "failure"]
        numbers = ("claim", "cause", "broken", "of", "worst", "first", "tolerance", "cases")
        told = {name: getattr(self.failure, name, None) for name in numbers}
        said = as_data({name: getattr(self, name) for name in names} | told)
        counts = getattr(self.message, "counts", None)  # of pairs, say
        return {"check": said.pop("name"), **said, "counts": counts}


def diagnosis_of(
    spec: AttentionSpec, result: Result, seed: int = 0, *, search: bool = True
) -> tuple[Diagnosis | None, str]:
    """Diagnose what failed, and say what is known of attention in the failed call of a block."""
    # There is no diagnosis of what answers nothing at all, or has a reference of its own.
    failure = result.failure
    again = None if failure is None else failure.again
    # Nothing but that call is made; or known defects are those of other attention.
    if result.name == REPLAY or (spec.reference is not None and not spec.is_block):
        return None, ""
    # Under a layout that is known to be wrong every number is another one, and none means anything.
    if "layout=" in result.declaration.partition(", but ")[0]:
        said = result.declaration
        return Diagnosis(spec.name, result.dtype, False, residual=math.nan, sentence=said), ""
    try:
        if not spec.is_block:
            return diagnose(replace(spec, devices=[result.device]), seed=seed), ""
        if result.name == "attention_inside":
            return diagnose_records(spec, search=search), ""
        if again is None:  # it is not one call that failed, which could be captured
            return None, ""
        called = getattr(again, "__self__", None)
        if not isinstance(called, ModelSubject) or called.real is not None:
            spec = _anywhere(spec)  # else it was called on its inputs
        # What a query gives that sees nothing means nothing here: it is padding itself.
        for declared in dict.fromkeys((spec.fully_masked, "zero", "uniform", "nan")):
            found = diagnose_records(replace(spec, fully_masked=declared), again, search=False)
            if found.healthy:
                return found, _inside(found, spec, result)
        found = diagnose_records(spec, again, search=search)
    except Exception as error:  # a subject may raise anything; the checks tell what
        return None, f"nothing was judged in the call that failed: {error}" * spec.is_block
    return found, _inside(found, spec, result)


def _anywhere(spec: AttentionSpec) -> AttentionSpec:
    """What is declared that holds wherever positions begin, and however long a call is."""
    causal = None if spec.prefix else spec.causal
    window = None if spec.sink_keys else spec.window
    return replace(
        spec, causal=causal, window=window, chunk=None, prefix=0, sink_keys=0, may_see=None,
        documents=None,
    )  # fmt: skip


# Of a compiled block; capturing sets compiled code aside.
TWO_CODES = "attention inside was captured in the eager code, which is not the compiled code"


def _inside(found: Diagnosis, spec: AttentionSpec, result: Result) -> str:
    """Say of the call that failed whether attention in it is right, and where to look if it is."""
    words = found.sentence if found.healthy else f"in the call that failed: {found.sentence}"
    if found.healthy and not found.refused:
        where = "in the mask it was given, where heads are split or merged, or before or after it"
        cause = (result.failure and result.failure.cause) or OUTSIDE
        if not cause.endswith(OUTSIDE):
            where = "see the cause"  # it knows more
        words = f"in the call that failed, {words}: what is wrong happens outside of it: {where}"
    elif found.healthy:
        words = f"in the call that failed, {words}; not judged: {', '.join(found.refused)}"
    return words + (f" ({TWO_CODES})" if is_compiled(spec.subject) else "")


# All checks of the package.
KNOWN = (*CHECKS, *BLOCK_CHECKS, *CAPTURED_CHECKS)


def checks_of(
    spec: AttentionSpec,
    given: Sequence[Check] | None = None,
    *,
    quick: bool = False,
    long: bool = False,
) -> tuple[Check, ...]:
    """Return the checks that a specification is asked: those that are given, or all of its kind."""
    # With `long`, that of one call as long as memory allows as well.
    if long:
        if spec.is_block or spec.is_captured or spec.sharding is not None:
            accepted = "False for a block, on ranks, and for what was captured"
            raise ValueError(misuse("long", True, f"{accepted}: it is a call of one function"))
        return (*checks_of(spec, given, quick=quick), LONG)
    if given is None:
        return tuple(check for check in _all_of(spec) if check.quick or not quick)
    accepted = "one or more checks, as Check(name, sentence, function), or None for all"
    if not all(isinstance(one, Check) for one in given):
        raise TypeError(misuse("checks", repr(given), accepted))
    if not given:
        raise ValueError(misuse("checks", repr(given), accepted))
    return tuple(given)


def _all_of(spec: AttentionSpec) -> tuple[Check, ...]:
    return CAPTURED_CHECKS if spec.is_captured else BLOCK_CHECKS if spec.is_block else CHECKS


def expected_of(given: object, names: Iterable[str]) -> dict[str, str]:
    """Return which checks are known to fail, with the reasons.

    Args:
        given: `expected_failures` as a user gave it.
        names: Those that it may name.

    Raises:
        TypeError: It is not a mapping.
        ValueError: It names something else.
    """
    if not isinstance(given, Mapping | None):
        accepted = "reasons by the names of checks, or None"
        raise TypeError(misuse("expected_failures", type(given).__name__, accepted))
    expected, known = dict(given or {}), set(names)
    if unknown := sorted(set(expected) - known):
        accepted = f"names of checks, of {sorted(known)}"
        raise ValueError(misuse("expected_failures", unknown, accepted))
    return expected


def left_out_of(spec: AttentionSpec, asked: Sequence[Check]) -> tuple[str, ...]:
    """Return the names of the checks that the quick form of the examination leaves out."""
    return tuple(check.name for check in _all_of(spec) if check not in asked)


def examinations_of(
    spec: AttentionSpec,  # What is claimed
    *,
    quick: bool = False,  # Take the first of the dtypes alone
    seed: int = 0,  # Where the inputs are drawn from
    devices: Sequence[str] | None = None,  # In place of those that are declared or else present
    # Which of the declared dtypes to take; all by default. What is examined as it was captured, or
    # with inputs of its own, has one dtype.
    dtypes: Sequence[str] | None = None,
) -> list[Examination]:
    """Return an examination for each dtype and device of a specification."""
    if devices is None:
        devices = ["cpu"] if spec.is_captured else spec.devices or names_of(("auto",))
    if spec.inputs is not None:
        own = [spec.inputs.dtype if spec.inputs.is_floating_point() else torch.float32]
    elif spec.is_captured:
        own = [next((record.dtype for record in records_of(spec)), torch.float32)]
    else:
        taken = [name for name in spec.dtypes if dtypes is None or name in dtypes]
        own = [getattr(torch, name) for name in taken]
    found = [
        [Examination(spec, dtype, torch.device(name), seed, quick) for dtype in own
         if not (name.startswith("mps") and dtype == torch.float64)]  # there is none of it there
        for name in devices
    ]  # fmt: skip
    if quick:
        found = [[one] for some in found for one in _first_served(some)]
    return [one for some in found for one in some]


def _first_served(some: Sequence[Examination]) -> Sequence[Examination]:
    """The first that the subject serves, as far as a convention knows; else the first."""
    return [one for one in some if not one.unserved][:1] or some[:1]


def run_check(check: Check, examination: Examination, expected: str | None = None) -> Result:
    """Run one check; whatever the subject raises is an answer."""
    # So is a fault of its device, whatever was answered; nothing is asked of a device after one.
    dtype, device = dtype_name(examination.dtype), str(examination.device)
    result = Result(check.name, dtype, device, "passed")
    try:
        resolve(device)
    except LookupError as absent:
        return result.saying("skipped", str(absent))
    if fault := fault_of(examination.device):
        return result.saying("skipped", f"this process has lost its GPU: {fault}")
    result = _asked(result, check, examination, expected)
    if fault := fault_of(examination.device):
        lost = (
            f"the subject left its GPU unusable: {fault}",
            "  hint     isolate=True, or --attn-isolate, asks it in a process of its own, with the "
            "call that does it",
        )
        return result.saying("failed", "\n".join(lost))
    return result


def _asked(result: Result, check: Check, examination: Examination, expected: str | None) -> Result:
    try:
        if unmet := examination.spec.unmet or examination.unserved:
            raise Skipped(unmet)
        with always_compiled(examination.spec.subject):
            note = check.examine(examination)
    except Skipped as reason:
        return result.saying("skipped", str(reason))
    except Exception as error:  # the code under test may raise anything
        if is_past_compiling(error):
            said = "not asked: it was compiled so often that torch.compile would run it uncompiled"
            return result.saying("skipped", said)
        if is_refusal(error):
            return result.saying("skipped", f"the subject refuses: {error}")
        if expected is not None:
            return result.saying("xfailed", expected)
        declaration = wrong_declaration(check, examination)
        result = replace(result, declaration=declaration, replay=getattr(error, "replay", ""))
        result = replace(result, isolated=getattr(error, "isolated", False))
        return _failed(result, error, examination)
    return replace(result, message=note or "")


def _failed(result: Result, error: Exception, examination: Examination) -> Result:
    if isinstance(error, Failure):
        reason = "; ".join(part for part in (error.headline, error.cause) if part)
        # Its traceback would keep every tensor of the call.
        kept = error.with_traceback(None)
        return replace(result, status="failed", message=str(error), reason=reason, failure=kept)
    if isinstance(error, AssertionError) and not _is_of_subject(error):
        return result.saying("failed", "\n".join([str(error), *_notes(error)]))
    raised = result.saying("failed", _raised(error, examination))
    # What a specification leaves unsaid may be why a call went wrong.
    spec, hints = examination.spec, list[str]()
    if isinstance(error, TypeError):
        hints += hints_of(spec)
        if isinstance(spec.window, str) and not spec.convention and "window=" in result.replay:
            hints.append(
                f"{spec.window} was given a pair: how many keys before and after its position a "
                "query attends to, -1 for no limit. Of code that takes one number, fix that: "
                "AttentionSpec(functools.partial(fn, ...), window=(left, right))"
            )
    said = "; ".join([raised.message, *hints])
    return replace(raised, message="\n".join([said, *_notes(error)]))


def _notes(error: Exception) -> list[str]:
    """What was noted of an error on its way up: which call raised it, and how to repeat it."""
    return [f"  {line}" for note in getattr(error, "__notes__", ()) for line in note.splitlines()]


def _raised(error: Exception, examination: Examination) -> str:
    """Say what was raised in the place of an answer, in words of a specification."""
    if isinstance(error, ValueError) and _is_random(examination):
        return examination.in_training() or (
            "it gives another output at each call, so that no comparison means anything: dropout "
            "that is always on?"
        )
    said = str(error)
    if not said and isinstance(error, AssertionError):  # a bare assert: its line says what it wants
        said = traceback.extract_tb(error.__traceback__)[-1].line or ""
    return f"it raised {type(error).__name__}: {said}{_place(error, examination.spec)}"


def _is_of_subject(error: AssertionError) -> bool:
    """Whether the subject raised it, and not a check."""
    callers = (asking.__file__, sequences.__file__)
    return any(frame.filename in callers for frame in traceback.extract_tb(error.__traceback__))


def _place(error: Exception, spec: AttentionSpec) -> str:
    """The innermost line of the subject's own file that the error came from."""
    if spec.sharding is not None:  # of another process, which noted it
        return ""
    subject = spec.subject if spec.is_captured else getattr(spec.subject, "module", spec.subject)
    try:
        file = inspect.getfile(subject if inspect.isfunction(subject) else type(subject))
    except TypeError:  # it was written in another language
        return ""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
    return f" ({Path(file).name}:{frames[-1].lineno})" if frames else ""


def _is_random(examination: Examination) -> bool:
    try:
        with borrowed(examination.spec.subject, seed=examination.seed):
            first, second = examination.answer(), examination.answer()
    except Exception:  # then that is what is wrong
        return False
    return not torch.equal(first.nan_to_num(), second.nan_to_num())


# --- a report as plain data: what `json.dumps` writes, for people and programs that mend code

# Raised when a key changes its meaning or goes; a new key does not raise it.
VERSION = 1


def as_data(value: Any) -> Any:
    """Return a value as texts, numbers, lists and dictionaries."""
    # A number that is not finite is "nan", "inf" or "-inf", a tensor "float32 (2, 3)", a dtype its
    # name; a function or a module goes by its name. Of a dataclass, tensors are left out.
    if isinstance(value, str):
        return str(value)  # of a subclass as well, which workers cannot send
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(name): as_data(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [as_data(one) for one in value]
    if isinstance(value, Tensor):
        return f"{dtype_name(value)} {tuple(value.shape)}"
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    if is_dataclass(value) and not isinstance(value, type):
        given = {one.name: getattr(value, one.name) for one in fields(value)}
        return {name: as_data(one) for name, one in given.items() if not isinstance(one, Tensor)}
    return str(getattr(value, "__qualname__", type(value).__qualname__))


def report_data(
    spec: Any,
    results: Sequence[Mapping[str, Any]],
    diagnosis: Any,
    hints: Sequence[str],
    seed: int,
    left_out: Sequence[str] = (),
) -> dict[str, Any]:
    """Return a report as plain data, of a specification and a diagnosis or their data."""
    counts = Counter(result["status"] for result in results)
    return {
        "version": VERSION, "subject": spec["name"] if isinstance(spec, Mapping) else spec.name,
        "passed": not counts["failed"] and counts["skipped"] < len(results),
        "counts": {status: counts[status] for status in ("passed", "failed", "skipped", "xfailed")},
        "spec": spec if isinstance(spec, Mapping) else spec_data(spec), "seed": seed,
        "hints": list(hints), "left_out": list(left_out),
        "diagnosis": diagnosis_data(diagnosis), "results": list(results),
    }  # fmt: skip


def spec_data(spec: Any) -> dict[str, Any]:
    """Return what a specification declares, and which of it was typed."""
    names = [one.name for one in fields(spec) if not one.name.startswith("_")]
    said = {name: as_data(getattr(spec, name)) for name in names}
    return said | {"typed": sorted(spec.typed)}


def diagnosis_data(diagnosis: Any) -> Any:
    """Return a diagnosis as data."""
    return diagnosis.as_dict() if hasattr(diagnosis, "as_dict") else as_data(diagnosis)
