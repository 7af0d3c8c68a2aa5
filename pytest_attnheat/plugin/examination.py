"""The examination under pytest: `parametrize_with_checks`, and `--attn-check`."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from pytest_attnheat.failure import Failure
from pytest_attnheat.inputs import dtype_name, misuse
from pytest_attnheat.plugin.settings import CHECKS_MARKER, SETTINGS, chosen_devices, device_of_test
from pytest_attnheat.plugin.summary import DIAGNOSIS_DRAWN, VERDICT

if TYPE_CHECKING:
    from pytest_attnheat.contract.checks import Check
    from pytest_attnheat.contract.combinations import Replay
    from pytest_attnheat.contract.examination import Examination
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
        quick: Make fewer checks, in the first of the selected dtypes alone.

    Returns:
        A decorator for the test.

    Raises:
        ValueError: There are no specifications, or the name of an expected failure is not that
            of a check.
    """
    from pytest_attnheat.contract.ready import as_spec
    from pytest_attnheat.contract.report import checks_of

    accepted = "a list of one or more specifications or callables"
    given: Any = (specs, expected_failures)
    if not isinstance(given[0], Iterable):
        raise TypeError(misuse("specs", type(specs).__name__, accepted))
    if not specs:
        raise ValueError(misuse("specs", repr(specs), accepted))
    if not isinstance(given[1], Mapping | None):
        got = type(expected_failures).__name__
        raise TypeError(misuse("expected_failures", got, "reasons by the names of checks, or None"))
    claimed = _told_apart([as_spec(spec) for spec in specs])
    names = {
        name
        for spec in claimed
        for check in (checks_of(spec) if checks is None else checks)
        for name in (check.name, f"{spec.name}-{check.name}")
    }
    unknown = sorted(set(expected_failures or {}) - names)
    if unknown:
        accepted = f"names of checks, of {sorted(names)}"
        raise ValueError(misuse("expected_failures", unknown, accepted))
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
    try:
        calls = [
            call
            for spec in specs
            for call in _calls(metafunc.config, spec, expected, checks, quick=quick)
        ]
    except pytest.UsageError as error:
        message = f"{metafunc.definition.nodeid}: {error}"
        raise pytest.Collector.CollectError(message) from None
    metafunc.parametrize("check", calls, ids=[call.name for call in calls])


def examine(session: pytest.Session, target: str) -> list[pytest.Item]:
    """Make the checks of what `--attn-check` names."""
    config = session.config
    quick = config.getoption("attn_check_quick")
    target_node = CheckTarget.from_parent(session, name=target, nodeid=target)
    return [
        CheckItem.from_parent(target_node, name=call.name, check=call, place=_place(target, spec))
        for spec in _told_apart(_load(config, target))
        for call in _calls(config, spec, {}, None, quick=quick)
    ]


def _place(target: str, spec: AttentionSpec) -> tuple[str, int]:
    """The file and line of what `--attn-check` names, as well as they are known."""
    file = getattr(sys.modules[target.partition(":")[0]], "__file__", None) or target
    code = getattr(spec.subject, "__code__", None)
    return file, code.co_firstlineno if code is not None and code.co_filename == file else 1


class CheckCall:
    """One check of one implementation, in one dtype and on one device, to be called.

    Attributes:
        name: What it is called in test ids.
        verdict: What it found, as far as it was called, in words and numbers alone.
    """

    def __init__(
        self,
        examined: _Examined,
        check: Check,
        examination: Examination,
        expected: str | None,
        unselected: str,
    ) -> None:
        device = "" if examination.device.type == "cpu" else f"-{examination.device}"
        self.name = f"{examination.spec.name}-{check.name}-{dtype_name(examination.dtype)}{device}"
        self.verdict: dict[str, Any] = {
            "subject": examination.spec.name,
            "check": check.name,
            "place": f"{dtype_name(examination.dtype)}{device}",
            "hints": examined.hints,
            "reason": unselected,
            "note": "",
        }
        self._examined, self._check, self._examination = examined, check, examination
        self._expected, self._unselected = expected, unselected

    def __call__(self) -> None:
        """Check it; fails, skips or xfails the test."""
        __tracebackhide__ = True
        from pytest_attnheat.contract.report import run_check

        if self._unselected:
            pytest.skip(self._unselected)
        name = str(self._examination.device)
        self.verdict["reason"] = f"the device {name} is absent"
        device = device_of_test(self._examined.config, name)
        result = run_check(self._check, replace(self._examination, device=device), self._expected)
        self.verdict["reason"] = result.reason
        self.verdict["note"] = result.message if result.status == "passed" else ""
        if result.status == "skipped":
            pytest.skip(result.message)
        if result.status == "xfailed":
            pytest.xfail(result.message)
        if result.status == "failed":
            raise self._failure(result)

    def _failure(self, result: Result) -> FailedCheckError:
        """The error: what does not hold, the diagnosis, and the check's own message."""
        diagnosis, draw, inside = self._examined.diagnosed(result)
        self.verdict |= {**self._examined.found, "declaration": result.declaration}
        self.verdict["outside"] = inside
        claim = result.declaration or f"not so: {self._check.sentence}"
        # A wrong declaration says where to look itself.
        outside = "" if result.declaration else inside
        text = "\n\n".join(part for part in (diagnosis, outside, result.message) if part)
        return FailedCheckError(self._check.name, claim, text, draw)

    def __repr__(self) -> str:
        """Name the check, as a test id does."""
        return f"<check {self.name}>"


class FailedCheckError(Failure):
    """A check that failed; the first of an implementation has the diagnosis, and draws it."""

    # Tests show it by its name alone, as they do pytest's own.
    __module__ = "builtins"

    def __init__(
        self, check: str, claim: str, text: str, draw: Callable[[], HeatmapFigure] | None
    ) -> None:
        super().__init__(check, claim, draw=draw, drawn=DIAGNOSIS_DRAWN)
        self._text = text

    def __reduce__(self) -> tuple[Any, ...]:
        """Be found again by a function: there is no such class in builtins."""
        return _failed_check, self.args, super().__reduce__()[2]

    @property
    def headline(self) -> str:
        """What does not hold."""
        return self.claim

    def __str__(self) -> str:
        """Say all of it: the headline, the diagnosis, and the check's own message."""
        return f"{self.headline}\n\n{self._text}"


def _failed_check(*args: Any) -> FailedCheckError:
    """Make the error anew, without its fields."""
    return FailedCheckError.__new__(FailedCheckError, *args)


class _Examined:
    """What all checks of one implementation share.

    Attributes:
        config: The configuration of the run.
        spec: What is claimed.
        hints: What a specification leaves unsaid.
        found: What the diagnosis found, once it was made.
    """

    def __init__(self, config: pytest.Config, spec: AttentionSpec) -> None:
        from pytest_attnheat.contract.report import hints_of

        self.config, self.spec = config, spec
        self.hints = list(hints_of(spec))
        self.found: dict[str, Any] = {}

    def diagnosed(self, result: Result) -> tuple[str, Callable[[], HeatmapFigure] | None, str]:
        """The diagnosis and what draws it, the first time, then its sentence alone.

        And what is known of attention in the call of a block that failed.
        """
        sentence = self.found.get("diagnosis", "")
        shown = sentence and f"diagnose: {sentence}"
        if self.found and not self.spec.is_block:
            return shown, None, ""
        from pytest_attnheat.contract.report import diagnosis_of

        diagnosis, inside = diagnosis_of(self.spec, result, search=not sentence)
        self.found = self.found or {"diagnosis": "", "named": False}
        if sentence or diagnosis is None or diagnosis.healthy:
            return shown, None, inside
        self.found = {"diagnosis": diagnosis.sentence, "named": bool(diagnosis.defects)}
        draw = None if diagnosis.expected_weights is None else diagnosis.draw
        return str(diagnosis), draw, inside

    def examinations(self, *, quick: bool) -> tuple[list[Examination], str]:
        """Its examinations on the selected devices and in the selected dtypes.

        If nothing that is declared is selected, one of the others, and why it is skipped: a test
        without any checks would vanish.
        """
        from pytest_attnheat.contract.report import examinations_of

        settings = self.config.stash[SETTINGS]
        given = self.config.getoption("attn_dtype") is not None
        devices = names = chosen_devices(self.config)
        declared = ("cpu",) if self.spec.is_captured else self.spec.devices
        if declared is not None:
            by_name = settings.devices not in (("auto",), ("all",))
            devices = _in_both(declared, names) if by_name else list(declared)
        dtypes = settings.dtypes if given else None
        examinations = examinations_of(self.spec, quick=quick, devices=devices, dtypes=dtypes)
        if examinations:
            return examinations, ""
        return examinations_of(self.spec, quick=True, devices=["cpu"]), (
            f"selected are {', '.join(names)} and {', '.join(settings.dtypes)}, but it is declared "
            f"for {', '.join(declared or names)} and {', '.join(self.spec.dtypes)}"
        )


def _in_both(declared: Sequence[str], chosen: Sequence[str]) -> list[str]:
    """The devices that two lists name; of "cuda" and "cuda:1", the one with a number."""
    pairs = [sorted((one, other), key=len) for one in declared for other in chosen]
    found = [exact for kind, exact in pairs if kind in (exact, exact.partition(":")[0])]
    return list(dict.fromkeys(found))


class CheckTarget(pytest.Collector):
    """What `--attn-check` names: the parent of its checks."""

    def collect(self) -> list[pytest.Item]:
        """Collect nothing: the checks are made where pytest gathers all items."""
        return []


class CheckItem(pytest.Item):
    """A check of `--attn-check`.

    Attributes:
        check: What is called.
        place: The file and line of what is examined.
    """

    def __init__(self, *, check: CheckCall, place: tuple[str, int], **given: Any) -> None:
        super().__init__(**given)
        self.add_marker(CHECKS_MARKER)
        self.check = check
        self.place = place

    def runtest(self) -> None:
        """Make the check."""
        self.check()

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


def attach_verdict(
    item: pytest.Item, call: pytest.CallInfo[None], report: pytest.TestReport
) -> None:
    """Give the report of a check its verdict, and say in one line what does not hold."""
    check = _check_of(item)
    if check is None or call.when != "call":
        return
    setattr(report, VERDICT, dict(check.verdict))
    error = None if call.excinfo is None else call.excinfo.value
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is not None and isinstance(error, FailedCheckError):
        crash.message = error.headline  # the rest is shown above; CI shows every line of this
    if isinstance(item, CheckItem):  # no test calls it
        if crash is not None:
            crash.path, crash.lineno = item.place
        if isinstance(report.longrepr, tuple):  # skipped
            report.longrepr = (*item.place, report.longrepr[2])


def _check_of(item: pytest.Item) -> CheckCall | None:
    if isinstance(item, CheckItem):
        return item.check
    given = item.callspec.params.get("check") if hasattr(item, "callspec") else None
    return given if isinstance(given, CheckCall) else None


def _calls(
    config: pytest.Config,
    spec: AttentionSpec,
    expected: Mapping[str, str],
    checks: Sequence[Check] | None,
    *,
    quick: bool,
) -> Iterator[CheckCall]:
    from pytest_attnheat.contract.report import checks_of

    examined = _Examined(config, spec)
    call = _replayed(config)
    examinations, unselected = examined.examinations(quick=quick and not (call and call.dtype))
    if call is not None:
        examinations, checks = call.among(examinations), [call.check]
    for examination in examinations:
        for check in checks_of(spec, quick=quick) if checks is None else checks:
            reason = expected.get(check.name, expected.get(f"{spec.name}-{check.name}"))
            yield CheckCall(examined, check, examination, reason, unselected)


def _replayed(config: pytest.Config) -> Replay | None:
    """The call that `--attn-replay` names."""
    from pytest_attnheat.contract.combinations import Replay

    try:
        text = config.getoption("attn_replay")
        return None if text is None else Replay.of(text)
    except ValueError as error:
        raise pytest.UsageError(f"--attn-replay: {error}") from None


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
    except Exception as error:  # the module is the user's, and may raise anything
        known = isinstance(error, ImportError | AttributeError)
        said = str(error) if known else f"importing {module} raised {type(error).__name__}: {error}"
        raise pytest.UsageError(f"--attn-check {target}: {said}") from error
    specs = list(found) if isinstance(found, (list, tuple)) else [found]
    try:
        return [as_spec(spec) for spec in specs]
    except (TypeError, ValueError) as error:
        raise pytest.UsageError(f"--attn-check {target}: {error}") from error
