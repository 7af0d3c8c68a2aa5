"""The examination under pytest: `parametrize_with_checks`, and `--attn-check`."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from pytest_attnheat.inputs import dtype_name
from pytest_attnheat.plugin import CHECKS_MARKER
from pytest_attnheat.plugin.verdicts import Verdicts

if TYPE_CHECKING:
    from pytest_attnheat.contract.checks import Check
    from pytest_attnheat.contract.examination import Examination as Examined
    from pytest_attnheat.contract.report import Result
    from pytest_attnheat.contract.spec import AttentionSpec
    from pytest_attnheat.heatmaps.figure import HeatmapFigure


def parametrize_with_checks(
    specs: Sequence[AttentionSpec | Callable[..., Any]],
    *,
    expected_failures: Mapping[str, str] | None = None,
    checks: Sequence[Check] | None = None,
    quick: bool = False,
) -> pytest.MarkDecorator:
    """Make a test of each check of each implementation, on each selected device and dtype.

    The test takes the argument `check` and calls it:

        @parametrize_with_checks([AttentionSpec(my_attention)])
        def test_contract(check):
            check()

    `--attn-device` and `--attn-dtype` select among the devices and dtypes of a specification.

    Args:
        specs: Specifications, or callables that need nothing declared.
        expected_failures: Names of checks (`"dropout"`), or of an implementation and a check
            (`"my_attention-dropout"`), that are known to fail, with the reason.
        checks: The checks, by default all that are known.
        quick: Ask fewer questions, in the first dtype alone.

    Returns:
        A decorator for the test.

    Raises:
        ValueError: There are no specifications, or the name of an expected failure is not that
            of a check.
    """
    from pytest_attnheat.contract.ready import as_spec
    from pytest_attnheat.contract.report import checks_of

    if not specs:
        raise ValueError("parametrize_with_checks: got no specifications")
    claimed = _told_apart([as_spec(spec) for spec in specs])
    names = {
        name
        for spec in claimed
        for check in (checks_of(spec) if checks is None else checks)
        for name in (check.name, f"{spec.name}-{check.name}")
    }
    unknown = sorted(set(expected_failures or {}) - names)
    if unknown:
        raise ValueError(
            f"expected_failures: there is no check {unknown}; accepted are {sorted(names)}"
        )
    mark: pytest.MarkDecorator = getattr(pytest.mark, CHECKS_MARKER)
    return mark(claimed, dict(expected_failures or {}), checks, quick)


def _told_apart(specs: Sequence[AttentionSpec]) -> list[AttentionSpec]:
    """Number the specifications that share a name, as two modules of one class do."""
    seen: Counter[str] = Counter()
    apart = []
    for spec in specs:
        seen[spec.name] += 1
        number = seen[spec.name]
        apart.append(spec if number == 1 else replace(spec, name=f"{spec.name}-{number}"))
    return apart


def parametrize(metafunc: pytest.Metafunc, marker: pytest.Mark) -> None:
    """Parametrise a test that `parametrize_with_checks` marked."""
    specs, expected, checks, quick = marker.args
    _tell_verdicts(metafunc.config)
    questions = [
        question
        for spec in specs
        for question in _questions(metafunc.config, spec, expected, checks, quick=quick)
    ]
    metafunc.parametrize("check", questions, ids=[question.name for question in questions])


def examine(session: pytest.Session, target: str, *, quick: bool) -> list[pytest.Item]:
    """Make the checks of what `--attn-check` names."""
    config = session.config
    _tell_verdicts(config)
    examined = Examination.from_parent(session, name=target, nodeid=target)
    return [
        CheckItem.from_parent(
            examined, name=question.name, question=question, place=_place(target, spec)
        )
        for spec in _told_apart(_load(config, target))
        for question in _questions(config, spec, {}, None, quick=quick)
    ]


def _tell_verdicts(config: pytest.Config) -> None:
    """See that the reports of checks carry their verdicts, which a run without checks spares."""
    if not config.pluginmanager.has_plugin("attnheat-verdicts"):
        config.pluginmanager.register(Verdicts(), "attnheat-verdicts")


def _place(target: str, spec: AttentionSpec) -> tuple[str, int]:
    """The file and line of what `--attn-check` names, as well as they are known."""
    file = getattr(sys.modules[target.partition(":")[0]], "__file__", None) or target
    code = getattr(spec.subject, "__code__", None)
    return file, code.co_firstlineno if code is not None and code.co_filename == file else 1


class Question:
    """One check of one implementation, in one dtype and on one device, to be called.

    Attributes:
        name: What it is called in test ids.
        verdict: What it found, as far as it was called, in words and numbers alone.
    """

    def __init__(
        self,
        check: Check,
        exam: Examined,
        expected: str | None,
        diagnosed: _Diagnosed,
        hints: list[str],
    ) -> None:
        device = "" if exam.device.type == "cpu" else f"-{exam.device}"
        self.name = f"{exam.spec.name}-{check.name}-{dtype_name(exam.dtype)}{device}"
        self.verdict: dict[str, Any] = {
            "subject": exam.spec.name,
            "check": check.name,
            "place": f"{dtype_name(exam.dtype)}{device}",
            "hints": hints,
        }
        self._check, self._exam, self._expected = check, exam, expected
        self._diagnosed = diagnosed

    def __call__(self) -> None:
        """Ask; fails, skips or xfails the test."""
        __tracebackhide__ = True
        from pytest_attnheat.contract.report import run_check

        result = run_check(self._check, self._exam, self._expected)
        self.verdict["reason"] = result.reason
        if result.status == "skipped":
            pytest.skip(result.message)
        if result.status == "xfailed":
            pytest.xfail(result.message)
        if result.status == "failed":
            raise self._failure(result)

    def _failure(self, result: Result) -> FailedCheckError:
        """The error: what does not hold, the diagnosis, and the check's own message."""
        told = self._diagnosed.told()
        self.verdict |= {
            "declaration": result.declaration,
            "diagnosis": told.sentence,
            "named": told.named,
            "outside": told.outside,
        }
        claim = result.declaration or f"not so: {self._check.sentence}"
        # A wrong declaration says where to look itself.
        outside = "" if result.declaration else told.outside
        text = "\n\n".join(part for part in (told.text, outside, result.message) if part)
        return FailedCheckError(claim, text, told.draw)

    def __repr__(self) -> str:
        """Name the question, as a test id does."""
        return f"<check {self.name}>"


class FailedCheckError(AssertionError):
    """A check that failed; the first of an implementation has the diagnosis, and draws it.

    Attributes:
        claim: What does not hold, in one line.
    """

    # Tests show it by its name alone, as they do pytest's own.
    __module__ = "builtins"
    heatmap_title = "weights: expected, inferred from the output, difference"

    def __init__(self, claim: str, message: str, draw: Callable[[], HeatmapFigure] | None) -> None:
        super().__init__(f"{claim}\n\n{message}")
        self.claim = claim
        if draw is not None:
            self.draw_heatmap = draw


class _Told(NamedTuple):
    """What is said of an implementation beside a check that failed."""

    sentence: str = ""
    text: str = ""
    named: bool = False
    outside: str = ""
    draw: Callable[[], HeatmapFigure] | None = None


class _Diagnosed:
    """The diagnosis of one implementation, made when first asked for and then told in full."""

    def __init__(self, spec: AttentionSpec) -> None:
        self._spec = spec
        self._before: _Told | None = None

    def told(self) -> _Told:
        """The diagnosis and what draws it, the first time; then its sentence alone."""
        if self._before is not None:
            return self._before
        from pytest_attnheat.contract.report import diagnosis_of, outside_of

        diagnosis = diagnosis_of(self._spec)
        if diagnosis is None or diagnosis.healthy:
            self._before = _Told(outside=outside_of(diagnosis, self._spec))
            return self._before
        named = bool(diagnosis.defects)
        self._before = _Told(diagnosis.sentence, f"diagnose: {diagnosis.sentence}", named)
        draw = None if diagnosis.expected_weights is None else diagnosis.draw
        return self._before._replace(text=str(diagnosis), draw=draw)


class Examination(pytest.Collector):
    """What `--attn-check` names: the parent of its checks."""

    def collect(self) -> list[pytest.Item]:
        """Collect nothing: the checks are made where pytest gathers all items."""
        return []


class CheckItem(pytest.Item):
    """A check of `--attn-check`.

    Attributes:
        question: What is asked.
        place: The file and line of what it is asked of.
    """

    def __init__(self, *, question: Question, place: tuple[str, int], **given: Any) -> None:
        super().__init__(**given)
        self.question = question
        self.place = place

    def runtest(self) -> None:
        """Ask the question."""
        self.question()

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """Show the message alone: the traceback is that of the examination."""
        if not isinstance(excinfo.value, FailedCheckError):
            return super().repr_failure(excinfo, style)
        shown: Any = excinfo.getrepr(style="native")
        shown.reprtraceback.reprentries[0].lines = [f"{excinfo.value}\n"]
        return shown

    def reportinfo(self) -> tuple[Any, int | None, str]:
        """Name the check in the report."""
        return self.path, None, self.name


def _questions(
    config: pytest.Config,
    spec: AttentionSpec,
    expected: Mapping[str, str],
    checks: Sequence[Check] | None,
    *,
    quick: bool,
) -> Iterator[Question]:
    from pytest_attnheat.contract.report import checks_of, examinations_of, hints_of

    hints = list(hints_of(spec))
    diagnosed = _Diagnosed(spec)
    for exam in examinations_of(spec, quick=quick):
        if not _selected(config, exam):
            continue
        for check in checks_of(spec, quick=quick) if checks is None else checks:
            reason = expected.get(check.name, expected.get(f"{spec.name}-{check.name}"))
            yield Question(check, exam, reason, diagnosed, hints)


def _selected(config: pytest.Config, exam: Examined) -> bool:
    """Whether `--attn-device` and `--attn-dtype`, if they are given, choose an exam."""
    from pytest_attnheat.plugin import SETTINGS

    settings = config.stash[SETTINGS]
    kinds = {name.partition(":")[0] for name in settings.devices}
    device = kinds & {"auto", "all"} or exam.device.type in kinds
    given = config.getoption("attn_dtype") is not None and not exam.spec.is_block
    return bool(device) and (not given or dtype_name(exam.dtype) in settings.dtypes)


def _load(config: pytest.Config, target: str) -> list[AttentionSpec]:
    """Import what `--attn-check` names."""
    from pytest_attnheat.contract.ready import as_spec

    module, separator, name = target.partition(":")
    if not (module and separator and name):
        raise pytest.UsageError(f"--attn-check: got {target!r}; accepted is package.module:object")
    here = str(config.invocation_params.dir)
    if here not in sys.path:  # as `python -m` does
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise pytest.UsageError(f"--attn-check {target}: {error}") from error
    specs = list(found) if isinstance(found, (list, tuple)) else [found]
    try:
        return [as_spec(spec) for spec in specs]
    except (TypeError, ValueError) as error:
        raise pytest.UsageError(f"--attn-check {target}: {error}") from error
