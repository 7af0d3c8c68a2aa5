"""The examination under pytest: `parametrize_with_checks`, and `--attn-check`."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from ..inputs import misuse
from .checking import CheckCall, FailedCheckError, calls_of
from .settings import CHECKS_MARKER, switched
from .summary import VERDICT

if TYPE_CHECKING:
    from ..contract.examination import Check
    from ..contract.spec import AttentionSpec


def learn_conventions(config: pytest.Config) -> None:
    """Add the conventions of the project's hooks to the table, until the end of the session."""
    from ..contract import conventions

    for given in config.hook.pytest_attnheat_conventions(config=config):
        for one in given:
            try:
                conventions.register_convention(one)
            except (TypeError, ValueError) as error:
                raise pytest.UsageError(f"pytest_attnheat_conventions: {error}") from None
            config.add_cleanup(partial(conventions.forget, one.name))


def parametrize_with_checks(
    specs: Sequence[AttentionSpec | Callable[..., Any]],
    *,
    expected_failures: Mapping[str, str] | None = None,
    checks: Sequence[Check] | None = None,
    quick: bool = False,
    long: bool = False,
    ranks: int | None = None,
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
        long: Make one call more, as long as memory allows, as `check_attention` does.
        ranks: On how many ranks each is called, of specifications that say `sharding`. A call may
            take as long as `--attn-time-limit` says.

    Returns:
        A decorator for the test.

    Raises:
        TypeError: A check is not one.
        ValueError: There are no specifications, or the name of an expected failure is not that
            of a check. One of them cannot be called on ranks, or as long.
    """
    from ..contract.ranks import TIME_LIMIT
    from ..contract.ready import as_spec
    from ..contract.running import checks_of, expected_of
    from ..contract.sharded import on_ranks

    accepted = "a list of one or more specifications or callables"
    given: Any = specs
    if not isinstance(given, Iterable):
        raise TypeError(misuse("specs", type(specs).__name__, accepted))
    if not specs:
        raise ValueError(misuse("specs", repr(specs), accepted))
    claimed = _told_apart([as_spec(spec) for spec in specs])
    if ranks is not None:
        for spec in claimed:
            on_ranks(spec, ranks, TIME_LIMIT)  # which starts nothing, and refuses what is not one
    names = {
        name
        for spec in claimed
        for check in checks_of(spec, checks, long=long)
        for name in (check.name, f"{spec.name}-{check.name}")
    }
    expected = expected_of(expected_failures, names)
    mark: pytest.MarkDecorator = getattr(pytest.mark, CHECKS_MARKER)
    return mark(claimed, expected, checks, quick, long, ranks)


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
    specs, expected, checks, quick, long, ranks = marker.args
    try:
        calls = [
            call
            for spec in specs
            for call in calls_of(
                metafunc.config, spec, expected, checks, quick=quick, long=long, ranks=ranks
            )
        ]
    except pytest.UsageError as error:
        message = f"{metafunc.definition.nodeid}: {error}"
        raise pytest.Collector.CollectError(message) from None
    metafunc.parametrize("check", calls, ids=[call.name for call in calls])


def examine(session: pytest.Session, target: str) -> list[pytest.Item]:
    """Make the checks of what `--attn-check` names."""
    config = session.config
    quick = switched(config, "attn_check_quick")
    parent = CheckTarget.from_parent(session, name=target, nodeid=target)
    parent.items = [
        CheckItem.from_parent(parent, name=call.name, check=call, place=_place(target, spec))
        for spec in _told_apart(load(config, target))
        for call in calls_of(config, spec, {}, None, quick=quick)
    ]
    # So pytest counts them among what it collected.
    hook = parent.ihook
    hook.pytest_collectreport(report=hook.pytest_make_collect_report(collector=parent))
    return [*parent.items]


def _place(target: str, spec: AttentionSpec) -> tuple[str, int]:
    """The file and line of what `--attn-check` names, as well as they are known."""
    file = getattr(sys.modules[target.partition(":")[0]], "__file__", None) or target
    code = getattr(spec.subject, "__code__", None)
    return file, code.co_firstlineno if code is not None and code.co_filename == file else 1


class CheckTarget(pytest.Collector):
    """What `--attn-check` names: the parent of its checks."""

    items: list[pytest.Item]

    def collect(self) -> list[pytest.Item]:
        """Return its checks, which are made where pytest gathers all items."""
        return self.items


class CheckItem(pytest.Item):
    """A check of `--attn-check`."""

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
    setattr(report, VERDICT, check.verdict)
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


def imported(config: pytest.Config, option: str, target: str) -> list[Any]:
    """Import what an option names, as package.module:object: that, and all on the way."""
    module, separator, name = target.partition(":")
    if not (module and separator and name):
        raise pytest.UsageError(f"{option}: got {target!r}; accepted is package.module:object")
    here = str(config.invocation_params.dir)
    if here not in sys.path:  # as `python -m` does
        sys.path.insert(0, here)
    try:
        found: list[Any] = [importlib.import_module(module)]
        for part in name.split("."):
            found.append(getattr(found[-1], part))
    except Exception as error:  # the module is the user's, and may raise anything
        known = isinstance(error, ImportError | AttributeError)
        said = str(error) if known else f"importing {module} raised {type(error).__name__}: {error}"
        if isinstance(error, ModuleNotFoundError):
            said += _how_to_find(config, str(error.name).partition(".")[0])
        raise pytest.UsageError(f"{option} {target}: {said}") from error
    return found


def _how_to_find(config: pytest.Config, package: str) -> str:
    """Say what makes a package importable that is not; empty of a part of one that is."""
    if package in sys.modules:
        return ""
    root = config.rootpath
    folders = [root, *sorted(one for one in root.iterdir() if one.is_dir())]
    inside = [one for one in folders
              if (one / package).is_dir() or (one / f"{package}.py").is_file()]  # fmt: skip
    if not inside:
        return "; install it, or name the folder that holds it in pytest's ini setting pythonpath"
    folder = inside[0].relative_to(root).as_posix()
    return f"; it lies in {folder!r}: set pytest's ini setting pythonpath = {folder}, or install it"


def load(config: pytest.Config, target: str) -> list[AttentionSpec]:
    """Import what `--attn-check` names."""
    from ..contract.ready import as_spec

    found = imported(config, "--attn-check", target)[-1]
    specs = list(found) if isinstance(found, (list, tuple)) else [found]
    try:
        return [as_spec(spec) for spec in specs]
    except (TypeError, ValueError) as error:
        raise pytest.UsageError(f"--attn-check {target}: {error}") from error
