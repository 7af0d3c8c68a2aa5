"""`check_attention`: run the examination in plain Python, and its report."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from pytest_attnheat.assertions.behaviour import sequences
from pytest_attnheat.assertions.behaviour.models import ModelSubject
from pytest_attnheat.attention.devices import names_of, resolve
from pytest_attnheat.callables import modules_in
from pytest_attnheat.capture.record import AttentionRecord
from pytest_attnheat.capture.trace import Trace
from pytest_attnheat.contract import asking
from pytest_attnheat.contract.captured import diagnose_records, records_of
from pytest_attnheat.contract.checks import BLOCK_CHECKS, CAPTURED_CHECKS, CHECKS, Check
from pytest_attnheat.contract.combinations import REPLAY, Replay
from pytest_attnheat.contract.diagnosing import diagnose
from pytest_attnheat.contract.diagnosis import Diagnosis
from pytest_attnheat.contract.examination import Examination, Skipped, is_refusal, undeclared
from pytest_attnheat.contract.ready import as_spec
from pytest_attnheat.contract.spec import AttentionSpec
from pytest_attnheat.failure import Failure
from pytest_attnheat.inputs import dtype_name, misuse

Status: TypeAlias = Literal["passed", "failed", "skipped", "xfailed"]
ExpectedFailures: TypeAlias = Mapping[str, str]


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
        failure: What the check raised, where that is a failure with fields.
    """

    name: str
    dtype: str
    device: str
    status: Status
    message: str = ""
    declaration: str = ""
    reason: str = ""
    failure: Failure | None = None


@dataclass(frozen=True)
class Report:
    """The results of an examination; printed, it is a table.

    Attributes:
        spec: What was examined.
        results: One for each check, dtype and device.
    """

    spec: AttentionSpec
    results: tuple[Result, ...]
    seed: int = 0

    @property
    def passed(self) -> bool:
        """Whether no check failed, and some were asked."""
        return not self.failed and self.asked

    @property
    def asked(self) -> bool:
        """Whether any check was asked, and not refused."""
        return any(result.status != "skipped" for result in self.results)

    @property
    def failed(self) -> tuple[Result, ...]:
        """The results that failed."""
        return tuple(result for result in self.results if result.status == "failed")

    @cached_property
    def diagnosis(self) -> Diagnosis | None:
        """What the implementation computes instead; None if it passed, or cannot be asked."""
        return self._inside[0]

    @cached_property
    def _inside(self) -> tuple[Diagnosis | None, dict[str, str]]:
        """The diagnosis, and what is said of attention in the call that failed, by check."""
        first, said = None, dict[str, str]()
        for result in self.failed:
            if result.name in said:
                continue
            search = first is None or first.healthy
            found, said[result.name] = diagnosis_of(self.spec, result, self.seed, search=search)
            first = found if search and found is not None else first
            if not self.spec.is_block:
                break
        return first, said

    def __str__(self) -> str:
        """The diagnosis first, then a line for each check, then what failed in full."""
        lines = [f"{self.spec.name}: {self._head()}"]
        lines += dict.fromkeys(result.declaration for result in self.failed if result.declaration)
        inside = [r for r in self.results if r.name == "attention_inside" and r.status == "passed"]
        said = [r.message for r in inside if r.message]
        lines += [f"hint: {hint}" for hint in (*hints_of(self.spec), *said)]
        # Where the small cases of the diagnosis come out right, the checks tell what is wrong.
        if self.diagnosis is not None and not self.diagnosis.healthy:
            lines += ["", str(self.diagnosis)]
        lines += ["", *self._table()]
        if self.passed:
            notes = dict.fromkeys((r.name, r.message) for r in self.results if r.status == "passed")
            lines += [f"{name}: {note}" for name, note in notes if note]
        for name in dict.fromkeys(result.name for result in self.failed):
            first = next(result for result in self.failed if result.name == name)
            said = [first.declaration] if first.declaration else []
            found = self._inside[1].get(name, "") if not said else ""
            said += [first.message, *([f"  inside   {found}"] if found else [])]
            lines += ["", f"{name} ({first.dtype}, {first.device})", *said]
        return "\n".join(lines)

    def _head(self) -> str:
        skipped = sum(result.status == "skipped" for result in self.results)
        if not self.asked and self.spec.unmet:
            return f"nothing was examined: {self.spec.unmet}"
        if not self.asked:
            calls = [r.message for r in self.results if r.name == "call" and r.message]
            why = "each check was refused, or left out by what is declared"
            return f"nothing was examined; {calls[0] if calls else why}"
        head = f"{len(self.failed)} of {len(self.results) - skipped} checks failed"
        if not self.failed:
            head = "all checks passed"
        head += f", {skipped} skipped" if skipped else ""
        if self.failed or not self.spec.is_block:
            return head
        inside = [r for r in self.results if r.name == "attention_inside"]
        left_out = next((r.message for r in inside if r.status == "skipped"), "")
        if left_out or not inside:
            return f"{head}; attention inside was not judged: {left_out or 'it was not asked'}"
        return head + (f"; {_TWO_CODES}" if _is_compiled(self.spec) else "")

    def _table(self) -> Iterator[str]:
        columns = list(dict.fromkeys((r.dtype, r.device) for r in self.results))
        names = list(dict.fromkeys(r.name for r in self.results))
        by_place = {(r.name, r.dtype, r.device): r for r in self.results}
        heads = [dtype if device == "cpu" else f"{dtype} {device}" for dtype, device in columns]
        width = max(len(name) for name in names)
        yield "  ".join([" " * width, *heads]).rstrip()
        for name in names:
            cells = [by_place.get((name, *column)) for column in columns]
            shown = [
                ("" if cell is None else cell.status).ljust(len(head))
                for cell, head in zip(cells, heads, strict=True)
            ]
            yield "  ".join([name.ljust(width), *shown]).rstrip()


def check_attention(
    subject: AttentionSpec | Callable[..., Any] | Trace | AttentionRecord,
    *,
    quick: bool = False,
    checks: Sequence[Check] | None = None,
    expected_failures: ExpectedFailures | None = None,
    seed: int = 0,
    replay: str | None = None,
) -> Report:
    """Examine an implementation of attention.

    Args:
        subject: What is claimed of it; or a callable with the signature of
            `torch.nn.functional.scaled_dot_product_attention`; or what `capture_attention`
            recorded.
        quick: Run fewer checks, in the first of the dtypes alone.
        checks: The checks; by default all that are known: `CHECKS`, `BLOCK_CHECKS` or
            `CAPTURED_CHECKS`.
        expected_failures: Names of checks that are known to fail, with the reason.
        seed: Where the inputs are drawn from.
        replay: A call as a failure printed it, "sizes=1x2 causal=True": nothing else is judged.

    Returns:
        The report. It raises nothing about the implementation.

    Raises:
        TypeError: The subject is not callable.
        ValueError: The name of an expected failure is not that of a check, or `replay` is no call.
    """
    spec = as_spec(subject)
    if replay is not None:
        call = Replay.of(replay)
        examinations = call.among(examinations_of(spec, quick=quick and not call.dtype, seed=seed))
        return Report(spec, tuple(run_check(call.check, one) for one in examinations), seed)
    expected = dict(expected_failures or {})
    asked = list(checks_of(spec, quick=quick) if checks is None else checks)
    if not asked:
        raise ValueError(misuse("checks", repr(checks), "one or more checks, or None for all"))
    known = (*CHECKS, *BLOCK_CHECKS, *CAPTURED_CHECKS, *asked)
    unknown = set(expected) - {check.name for check in known}
    if unknown:
        names = ", ".join(repr(check.name) for check in asked)
        raise ValueError(misuse("expected_failures", sorted(unknown), f"names among {names}"))
    results = [
        run_check(check, examination, expected.get(check.name))
        for examination in examinations_of(spec, quick=quick, seed=seed)
        for check in asked
    ]
    return Report(spec, tuple(results), seed)


def diagnosis_of(
    spec: AttentionSpec, result: Result, seed: int = 0, *, search: bool = True
) -> tuple[Diagnosis | None, str]:
    """Diagnose what failed, and say what is known of attention in the call of a block that failed.

    Args:
        spec: What is claimed.
        result: What failed.
        seed: Where inputs are drawn from.
        search: Whether to look for what attention in a block is instead, if it is wrong.

    Returns:
        The diagnosis, None of what answers nothing at all; and the sentence.
    """
    failure = result.failure
    again = None if failure is None else failure.again
    if result.name == REPLAY:  # nothing but that call is made
        return None, ""
    try:
        if not spec.is_block:
            return diagnose(spec, seed=seed), ""
        if result.name == "attention_inside":
            return diagnose_records(spec, search=search), ""
        if again is None:
            said = result.name == "call" or (failure is not None and failure.broken is None)
            return None, "" if said else "not captured: it is not one call that failed"
        called = getattr(again, "__self__", None)
        if not isinstance(called, ModelSubject) or called.real is not None:
            spec = _anywhere(spec)  # else it was called on its inputs
        # What a query gives that sees nothing means nothing here: it is padding itself.
        for declared in dict.fromkeys((spec.fully_masked, "zero", "uniform", "nan")):
            found = diagnose_records(replace(spec, fully_masked=declared), again, search=False)
            if found.healthy:
                return found, _inside(found, spec)
        found = diagnose_records(spec, again, search=search)
    except Exception as error:  # a subject may raise anything; the checks tell what
        return None, f"nothing was judged in the call that failed: {error}" * spec.is_block
    return found, _inside(found, spec)


def _anywhere(spec: AttentionSpec) -> AttentionSpec:
    """What is declared that holds wherever positions begin, and however long a call is."""
    causal = None if spec.prefix else spec.causal
    window = None if spec.sink_keys else spec.window
    return replace(
        spec, causal=causal, window=window, chunk=None, prefix=0, sink_keys=0, may_see=None,
        documents=None,
    )  # fmt: skip


# Of a compiled block; capturing sets compiled code aside.
_TWO_CODES = "attention inside was captured in the eager code, which is not the compiled code"


def _inside(found: Diagnosis, spec: AttentionSpec) -> str:
    """Say of the call that failed whether attention in it is right, and where to look if it is."""
    words = found.sentence if found.healthy else f"in the call that failed: {found.sentence}"
    if found.healthy and not found.refused:
        words = (
            f"in the call that failed, {words}: what is wrong happens outside of it: in the mask "
            "it was given, where heads are split or merged, or before or after attention"
        )
    elif found.healthy:
        words = f"in the call that failed, {words}; not judged: {', '.join(found.refused)}"
    return words + (f" ({_TWO_CODES})" if _is_compiled(spec) else "")


def _is_compiled(spec: AttentionSpec) -> bool:
    parts = (part for module in modules_in(spec.subject) for part in module.modules())
    names = ("_orig_mod", "_compiled_call_impl")
    return any(getattr(part, name, None) is not None for part in parts for name in names)


def checks_of(spec: AttentionSpec, *, quick: bool = False) -> tuple[Check, ...]:
    """Return the checks that a specification is asked."""
    known = CAPTURED_CHECKS if spec.is_captured else BLOCK_CHECKS if spec.is_block else CHECKS
    return tuple(check for check in known if check.quick or not quick)


def examinations_of(
    spec: AttentionSpec,
    *,
    quick: bool = False,
    seed: int = 0,
    devices: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
) -> list[Examination]:
    """Return an examination for each dtype and device of a specification.

    Args:
        spec: What is claimed.
        quick: Take the first of the dtypes alone.
        seed: Where the inputs are drawn from.
        devices: The names of devices, in place of those that are declared or else present.
        dtypes: Which of the declared dtypes to take; all by default. What is examined as it was
            captured, or with inputs of its own, has one dtype.
    """
    if devices is None:
        devices = ["cpu"] if spec.is_captured else spec.devices or names_of(("auto",))
    if spec.inputs is not None:
        own = [spec.inputs.dtype if spec.inputs.is_floating_point() else torch.float32]
    elif spec.is_captured:
        own = [next((record.dtype for record in records_of(spec)), torch.float32)]
    else:
        taken = [name for name in spec.dtypes if dtypes is None or name in dtypes]
        own = [getattr(torch, name) for name in taken[: 1 if quick else None]]
    return [
        Examination(spec, dtype, torch.device(name), seed, quick)
        for name in devices
        for dtype in own
        if not (name.startswith("mps") and dtype == torch.float64)  # there is none of it there
    ]


def run_check(check: Check, examination: Examination, expected: str | None = None) -> Result:
    """Run one check; whatever the subject raises is an answer."""
    dtype, device = dtype_name(examination.dtype), str(examination.device)
    result = Result(check.name, dtype, device, "passed")
    try:
        resolve(device)
    except LookupError as absent:
        return _with_message(result, "skipped", str(absent))
    try:
        if unmet := examination.spec.unmet:
            raise Skipped(unmet)
        note = check.examine(examination)
    except Skipped as reason:
        return _with_message(result, "skipped", str(reason))
    except Exception as error:  # the code under test may raise anything
        if is_refusal(error):
            return _with_message(result, "skipped", f"the subject refuses: {error}")
        if expected is not None:
            return _with_message(result, "xfailed", expected)
        declaration = _wrong_declaration(check, examination)
        return replace(_failed(result, error, examination), declaration=declaration)
    return replace(result, message=note or "")


def _with_message(result: Result, status: Status, message: str) -> Result:
    return replace(result, status=status, message=message, reason=message.partition("\n")[0])


def _failed(result: Result, error: Exception, examination: Examination) -> Result:
    if isinstance(error, Failure):
        reason = "; ".join(part for part in (error.headline, error.cause) if part)
        # Its traceback would keep every tensor of the call.
        kept = error.with_traceback(None)
        return replace(result, status="failed", message=str(error), reason=reason, failure=kept)
    if isinstance(error, AssertionError) and not _is_of_subject(error):
        return _with_message(result, "failed", "\n".join([str(error), *_notes(error)]))
    raised = _with_message(result, "failed", _raised(error, examination))
    # What a specification leaves unsaid may be why a call went wrong.
    hints = hints_of(examination.spec) if isinstance(error, TypeError) else ()
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
    subject = spec.subject if spec.is_captured else getattr(spec.subject, "module", spec.subject)
    try:
        file = inspect.getfile(subject if inspect.isfunction(subject) else type(subject))
    except TypeError:  # it was written in another language
        return ""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
    return f" ({Path(file).name}:{frames[-1].lineno})" if frames else ""


def _is_random(examination: Examination) -> bool:
    try:
        first, second = examination.answer(), examination.answer()
    except Exception:  # then that is what is wrong
        return False
    return not torch.equal(first.nan_to_num(), second.nan_to_num())


def hints_of(spec: AttentionSpec) -> tuple[str, ...]:
    """What a specification leaves unsaid of parameters that look like a mask or causality."""
    found = (undeclared(spec, "mask"), undeclared(spec, "causal"))
    return tuple(text for text in found if text)


# What else may have been meant, by the check that fails where the declaration is wrong.
_OTHERWISE: dict[str, tuple[dict[str, Any], ...]] = {
    "shape_and_dtype": ({"layout": "bhld"}, {"layout": "blhd"}),
    "plain": ({"layout": "bhld"}, {"layout": "blhd"}, {"window": (None, 0)}),
    "masked": ({"mask": "keep"}, {"mask": "drop"}),
    "no_leakage_through_mask": ({"mask": "keep"}, {"mask": "drop"}),
    "padding": ({"mask": "keep"}, {"mask": "drop"}),
    "causal_rectangular": ({"causal": "top_left"}, {"causal": "bottom_right"}),
    "fully_masked": (
        {"fully_masked": "zero"}, {"fully_masked": "uniform"}, {"fully_masked": "nan"},
        {"mask": "keep"}, {"mask": "drop"},
    ),
}  # fmt: skip
_OF_BLOCKS: dict[str, tuple[dict[str, Any], ...]] = {
    "no_leakage": ({"causal": None}, {"causal": "top_left"}),
    "decoding": ({"causal": None},),
    "attention_inside": ({"causal": None},),
}
# What the other declaration says, in words; of causality only where a block is judged.
_WORDS = {
    ("mask", "keep"): "True where a query may attend",
    ("mask", "drop"): "True where a query must not attend",
    ("window", (None, 0)): "it is always causal",
    ("causal", None): "each output depends on the whole sequence, as in an encoder; if it is to "
    "be causal, its mask is missing",
}
_DECODER = (
    "no output depends on a later token, as in a decoder; if it is to be an encoder, some mask "
    "hides too much"
)


def _wrong_declaration(check: Check, examination: Examination) -> str:
    """Say which other declaration would be right, if there is one."""
    if _leaves_causal_aside(check, examination):
        argument = examination.spec.causal_argument
        return (
            f"wrong declaration: causal={examination.spec.causal!r} is declared, but "
            f"{argument}=True changes nothing, and no parameter is called {argument}: declare "
            "causal=None, or its causal_argument"
        )
    for changes in (_OF_BLOCKS if examination.spec.is_block else _OTHERWISE).get(check.name, ()):
        ((field, other),) = changes.items()
        declared = getattr(examination.spec, field)
        if declared == other or not _passes(check, examination, changes):
            continue
        source = "the default" if declared == _default(field) else "declared"
        words = _DECODER if field == "causal" and declared is None else _WORDS.get((field, other))
        return (
            f"wrong declaration: {field}={declared!r} is {source}, but the code means {other!r}"
            + (f": {words}" if words else "")
        )
    return ""


def _default(field: str) -> Any:
    (default,) = (one.default for one in fields(AttentionSpec) if one.name == field)
    return default


def _passes(check: Check, examination: Examination, changes: dict[str, Any]) -> bool:
    """Whether a check passes with another declaration."""
    spec = replace(examination.spec, **changes)
    # A block that is not a decoder does not decode: whether it is one, leaks tell, and whether its
    # attention is right for that, what is captured inside.
    telling = [one for one in BLOCK_CHECKS if one.name in ("no_leakage", "attention_inside")]
    for one in telling if spec.is_block else [check]:
        try:
            one.examine(replace(examination, spec=spec))
        except Skipped:
            if not spec.is_block:
                return False
        except Exception:  # neither is right
            return False
    return True


def _leaves_causal_aside(check: Check, examination: Examination) -> bool:
    """Whether the subject takes any keyword, and is_causal is one of those it does not know."""
    spec = examination.spec
    if check.name != "causal" or spec.is_block or spec.names(spec.causal_argument):
        return False
    try:
        call = examination.case(sizes=(7, 7))
        outputs = [spec.ask(replace(call, causal=causal)).output for causal in (False, True)]
    except Exception:  # then that is what is wrong
        return False
    return torch.equal(*outputs)
