"""Tests that run again, in this process, and tell nobody but who asked."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import pytest

from pytest_attnheat.callables import borrowed, seed_everything
from pytest_attnheat.plugin.settings import GRADING


class Outcome(NamedTuple):
    """What became of a test."""

    status: str  # "passed", "failed", or "skipped": also what was expected to fail
    said: str = ""  # Why, in one line


class _Quiet:
    """Hooks of pytest: those that tell of tests reach a list alone, all others what they did."""

    def __init__(self, hooks: Any, reports: list[Any]) -> None:
        self._hooks, self._reports = hooks, reports
        self.pytest_warning_recorded = self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._hooks, name)

    def call_historic(self, **given: Any) -> None:
        """Tell nobody of a warning."""

    def pytest_runtest_logstart(self, **given: Any) -> None:
        """Tell nobody that a test begins."""

    def pytest_runtest_logfinish(self, **given: Any) -> None:
        """Tell nobody that it ended."""

    def pytest_exception_interact(self, **given: Any) -> None:
        """Let no debugger open."""

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Keep a report."""
        self._reports.append(report)

    def pytest_runtest_teardown(self, item: pytest.Item, nextitem: pytest.Item | None) -> Any:
        """After a failure, undo the fixtures that other tests share as well."""
        failed = any(report.failed for report in self._reports)
        return self._hooks.pytest_runtest_teardown(item=item, nextitem=None if failed else nextitem)


@contextmanager
def quiet(session: pytest.Session) -> Iterator[None]:
    """Let the files of this run be as they are, whatever tests do that run again."""
    # Pictures of what fails go to a folder that is deleted.
    config = session.config
    config.stash[GRADING] = True
    kept = config.option.attn_artifacts
    # With a seed of its own Hypothesis keeps no examples, and draws the same ones again.
    hypothesis: Any = sys.modules.get("hypothesis.core")
    seed = getattr(hypothesis, "global_force_seed", None)
    with tempfile.TemporaryDirectory() as folder:
        config.option.attn_artifacts = folder
        try:
            if hypothesis is not None and seed is None:
                hypothesis.global_force_seed = 0
            yield
        finally:
            if hypothesis is not None:
                hypothesis.global_force_seed = seed
            config.option.attn_artifacts = kept
            config.stash[GRADING] = False


def outcomes(
    session: pytest.Session, items: Sequence[pytest.Item], seed: int
) -> Iterator[tuple[pytest.Item, Outcome]]:
    """Run tests again, up to where the caller stops, and yield what becomes of each."""
    # Fixtures are set up anew; tests share those of a wider scope until one fails.
    done = False
    last: pytest.Item | None = None
    try:
        for item, following in zip(items, [*items[1:], None], strict=True):
            last = item
            outcome = _outcome(_reports(session, item, following, seed))
            done = following is None or outcome.status == "failed"
            yield item, outcome
    finally:
        if not done and last is not None:  # an exception, or a caller that stopped
            tear_down(last)


def _reports(
    session: pytest.Session, item: pytest.Item, following: pytest.Item | None, seed: int
) -> list[Any]:
    found: list[Any] = []
    hooks = session.gethookproxy
    session.gethookproxy = lambda fspath: _Quiet(hooks(fspath), found)  # type: ignore[method-assign, assignment, return-value]
    _forget_object(item)
    try:
        with borrowed(None, seed=seed):
            seed_everything(seed)
            item.ihook.pytest_runtest_protocol(item=item, nextitem=following)
    finally:
        del session.gethookproxy
    if any(report.failed and report.when == "teardown" for report in found):
        tear_down(item)
    return found


def _forget_object(item: pytest.Item) -> None:
    """Let a method have an object of its class of its own, as each test has."""
    if getattr(item, "cls", None) is not None and vars(item).get("_instance") is not None:
        for name in ("_instance", "_obj"):
            vars(item).pop(name, None)


def tear_down(item: pytest.Item) -> None:
    """Undo all fixtures, where a test was left in the midst of them."""
    runner: Any = item.config.pluginmanager.get_plugin("runner")
    with suppress(Exception, pytest.exit.Exception):
        runner.pytest_runtest_teardown(item=item, nextitem=None)


def _outcome(reports: Sequence[Any]) -> Outcome:
    failed = next((report for report in reports if report.failed), None)
    if failed is not None:
        return Outcome("failed", _said(failed))
    skipped = next((report for report in reports if report.skipped), None)
    if skipped is not None:
        expected = hasattr(skipped, "wasxfail")
        return Outcome("skipped", "it is expected to fail" if expected else _said(skipped))
    return Outcome("passed")


def _said(report: Any) -> str:
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    crash = getattr(report.longrepr, "reprcrash", None)
    text = str(report.longrepr if crash is None else crash.message).strip()
    return text.split("\n")[0] if crash is not None else text.split("\n")[-1]
