"""`check_attention`: run the examination in plain Python, and its report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch

from pytest_attnheat.contract.checks import BLOCK_CHECKS, CHECKS, Check
from pytest_attnheat.contract.exam import Exam, NotAskedError
from pytest_attnheat.contract.spec import AttentionSpec, as_spec

if TYPE_CHECKING:
    from pytest_attnheat.contract.diagnosis import Diagnosis

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
        message: Why it failed, or the reason why it was skipped or expected to fail.
        declaration: What is wrongly declared, where that is why it failed.
    """

    name: str
    dtype: str
    device: str
    status: Status
    message: str = ""
    declaration: str = ""


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
        """Whether no check failed."""
        return not self.failed

    @property
    def failed(self) -> tuple[Result, ...]:
        """The results that failed."""
        return tuple(result for result in self.results if result.status == "failed")

    @cached_property
    def diagnosis(self) -> Diagnosis | None:
        """What the implementation computes instead; None if it passed, or is a block."""
        return None if self.passed else diagnosis_of(self.spec, self.seed)

    def __str__(self) -> str:
        """The diagnosis first, then a line for each check, then what failed in full."""
        failed = len(self.failed)
        head = f"{self.spec.name}: {failed} of {len(self.results)} checks failed"
        lines = [head if failed else f"{self.spec.name}: all checks passed"]
        if self.diagnosis is not None:
            lines += ["", str(self.diagnosis)]
        lines += ["", *self._table()]
        for name in dict.fromkeys(result.name for result in self.failed):
            first = next(result for result in self.failed if result.name == name)
            lines += ["", f"{name} ({first.dtype}, {first.device})", first.message]
        return "\n".join(lines)

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
    subject: AttentionSpec | Callable[..., Any],
    *,
    quick: bool = False,
    checks: Sequence[Check] | None = None,
    expected_failures: ExpectedFailures | None = None,
    seed: int = 0,
) -> Report:
    """Examine an implementation of attention.

    Args:
        subject: What is claimed of it; or a callable with the signature of
            `torch.nn.functional.scaled_dot_product_attention`.
        quick: Ask fewer questions, in the first of the dtypes alone.
        checks: The checks; by default all that are known, `CHECKS` or `BLOCK_CHECKS`.
        expected_failures: Names of checks that are known to fail, with the reason.
        seed: Where the inputs are drawn from.

    Returns:
        The report. It raises nothing about the implementation.

    Raises:
        TypeError: The subject is not callable.
        ValueError: The name of an expected failure is not that of a check.
    """
    spec = as_spec(subject)
    expected = dict(expected_failures or {})
    asked = list(checks_of(spec, quick=quick) if checks is None else checks)
    unknown = set(expected) - {check.name for check in (*CHECKS, *BLOCK_CHECKS, *asked)}
    if unknown:
        raise ValueError(
            f"expected_failures: there is no check {sorted(unknown)}; accepted are "
            f"{[check.name for check in asked]}"
        )
    results = [
        run_check(check, exam, expected.get(check.name))
        for exam in exams_of(spec, quick=quick, seed=seed)
        for check in asked
    ]
    return Report(spec, tuple(results), seed)


def diagnosis_of(spec: AttentionSpec, seed: int = 0) -> Diagnosis | None:
    """Diagnose what failed; None of a block, and of what answers no question at all."""
    if spec.is_block:
        return None
    from pytest_attnheat.contract.diagnosis import diagnose

    try:
        return diagnose(spec, seed=seed)
    except ValueError:  # the checks tell why
        return None


def checks_of(spec: AttentionSpec, *, quick: bool = False) -> tuple[Check, ...]:
    """Return the checks that a specification is asked."""
    known = BLOCK_CHECKS if spec.is_block else CHECKS
    return tuple(check for check in known if check.quick or not quick)


def exams_of(spec: AttentionSpec, *, quick: bool = False, seed: int = 0) -> list[Exam]:
    """Return an exam for each dtype and device of a specification."""
    devices = [torch.device(name) for name in spec.devices or _present()]
    if spec.inputs is not None:
        dtype = spec.inputs.dtype if spec.inputs.is_floating_point() else torch.float32
        return [Exam(spec, dtype, device, seed, quick) for device in devices]
    dtypes = [getattr(torch, name) for name in spec.dtypes][: 1 if quick else None]
    return [Exam(spec, dtype, device, seed, quick) for device in devices for dtype in dtypes]


def _present() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def run_check(check: Check, exam: Exam, expected: str | None = None) -> Result:
    """Ask one question; whatever the subject raises is an answer."""
    place = {"name": check.name, "dtype": exam.dtype_name, "device": str(exam.device)}
    try:
        check.run(exam)
    except NotAskedError as reason:
        return Result(**place, status="skipped", message=str(reason))
    except NotImplementedError as reason:
        return Result(**place, status="skipped", message=f"the subject refuses: {reason}")
    except Exception as error:  # the code under test may raise anything
        if expected is not None:
            return Result(**place, status="xfailed", message=expected)
        message = str(error)
        if not isinstance(error, AssertionError):
            message = f"it raised {type(error).__name__}: {message}"
        declaration = _wrong_declaration(check, exam)
        if declaration:
            message = f"{declaration}\n{message}"
        return Result(**place, status="failed", message=message, declaration=declaration)
    return Result(**place, status="passed")


# What a check asks of a declaration, and what else may have been meant.
_DECLARED: dict[str, tuple[tuple[str, tuple[Any, ...]], ...]] = {
    "shape_and_dtype": (("layout", ("bhld", "blhd")),),
    "plain": (("layout", ("bhld", "blhd")),),
    "masked": (("mask", ("keep", "drop")),),
    "no_leakage_through_mask": (("mask", ("keep", "drop")),),
    "padding": (("mask", ("keep", "drop")),),
    "causal_rectangular": (("causal", ("top_left", "bottom_right")),),
    "fully_masked": (
        ("fully_masked", ("zero", "uniform", "nan")),
        ("mask", ("keep", "drop")),
    ),
}


def _wrong_declaration(check: Check, exam: Exam) -> str:
    """Say which other declaration would be right, if there is one."""
    if exam.spec.is_block:
        return ""
    for field, choices in _DECLARED.get(check.name, ()):
        declared = getattr(exam.spec, field)
        for other in choices:
            if other == declared:
                continue
            try:
                check.run(replace(exam, spec=replace(exam.spec, **{field: other})))
            except Exception:  # neither is right
                continue
            return (
                f"wrong declaration: {field}={declared!r} is declared, but the code means {other!r}"
            )
    return ""
