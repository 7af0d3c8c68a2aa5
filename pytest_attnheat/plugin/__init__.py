"""All that pytest calls, hook by hook: what this plugin does.

Every run of every project that has the package installed imports this module. It loads the
standard library and pytest, and nothing else.
"""

from __future__ import annotations

import sys
from collections.abc import Generator
from typing import Any

import pytest

from . import fixtures, pictures, progress, settings, summary


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the `--attn-` options and `attn_` settings."""
    settings.add_options(parser)


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    """Add the hook that a project can implement, and the fixtures."""
    pluginmanager.add_hookspecs(settings)
    # Not by `pytest_plugins`: for each name there, pytest reads the metadata of all installed
    # distributions once more.
    pluginmanager.register(fixtures, fixtures.__name__)


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers, check the options, and prepare what the hooks below write into."""
    for marker in settings.MARKERS:
        config.addinivalue_line("markers", marker)
    config.stash[settings.SETTINGS] = settings.read_settings(config)
    config.stash[summary.USED] = set()
    progress.show_progress(config)
    config.stash[settings.ISOLATED] = []
    config.add_cleanup(lambda: settings.end_processes(config))
    if config.getoption("attn_replay") is not None:
        from . import checking

        checking.replayed(config)  # what is mistyped is an error at once
    if config.stash[settings.SETTINGS].grade:
        from . import grading

        config.pluginmanager.register(grading.Grading(config), grading.NAME)
    file = config.stash[settings.SETTINGS].json
    if file and not hasattr(config, "workerinput"):
        from .summary import JsonFile

        path = settings.path_of(config, "attn_json", file)
        config.pluginmanager.register(JsonFile(path), "attnheat_json")
    if config.getoption("attn_check") and config.args_source is not config.ArgsSource.ARGS:
        config.args = []  # nothing but the examination was asked for


def pytest_sessionstart(session: pytest.Session) -> None:
    """Say what is wrong with `--attn-check` where workers collect, which cannot say it.

    By now pytest has the handlers of its logs.
    """
    config = session.config
    progress.keep_progress_live(config)
    shared_out = getattr(config.option, "dist", "no") != "no" and not hasattr(config, "workerinput")
    for target in settings.targets_of(config) if shared_out else ():
        from . import examination

        examination.load(config, target)


def pytest_collection(session: pytest.Session) -> None:
    """Learn how a project's own attention functions are called, if it says so."""
    hook = session.config.hook.pytest_attnheat_conventions
    if hook.get_hookimpls():
        from . import examination

        examination.learn_conventions(session.config)


@pytest.hookimpl(wrapper=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> Generator[None, None, None]:
    """Make a test of each check, and one for each scoring function, device and dtype."""
    marker = metafunc.definition.get_closest_marker(settings.CHECKS_MARKER)
    if marker is not None and "check" in metafunc.fixturenames:
        from . import examination

        examination.parametrize(metafunc, marker)
    yield
    # Last, so that what the user parametrised is known by now.
    fixtures.parametrize(metafunc)


# First, so that tests that -k or --lf deselect count as users of their baselines.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(
    session: pytest.Session, config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Give each marked test its baseline, and add the checks of `--attn-check`."""
    pictures.find_baselines(config, items)
    for target in settings.targets_of(config):
        from . import examination

        items.extend(examination.examine(session, target))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, None, None]:
    """Make fixtures in the style of a compared test: they may make its figure."""
    if "torch" in sys.modules:
        from . import memory

        memory.start(item)
    with pictures.style_of(item):
        return (yield)


# Outside of pytest-mpl's wrapper, which swallows what the test returns.
@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Compare the figure that a marked test returns with its baseline."""
    return (yield from pictures.compare_returned(item))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Give a report what is known of its test; it takes it along where a worker sends it."""
    report = yield
    if item.config.stash.get(settings.GRADING, False):
        return report
    if call.excinfo is not None and "torch" in sys.modules:
        from . import memory

        memory.explain(item, call, report)
    pictures.leave_heatmap(item, call, report)
    summary.attach_outcomes(item, call, report)
    if item.get_closest_marker(settings.CHECKS_MARKER) is not None:
        from . import examination

        examination.attach_verdict(item, call, report)
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand on, from a worker, which baselines are used; fail a run that asked nothing."""
    summary.fail_if_unasked(session)
    used = session.config.stash[summary.USED]
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput[summary.HANDED_ON] = sorted(used)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Take what a worker hands on."""
    handed_on = getattr(node, "workeroutput", {}).get(summary.HANDED_ON, ())
    node.config.stash[summary.USED].update(handed_on)


# Outside of all others: a CI log is read from its end.
@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> Generator[None, None, None]:
    """Shorten what failed alike; say what was compared, and what the examination found."""
    reports = summary.reports_of(terminalreporter)
    summary.shorten(reports)
    yield
    summary.write(terminalreporter, config, reports)
