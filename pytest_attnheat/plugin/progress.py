"""How far long work is: shown live, and left out of what a failed test has logged."""

from __future__ import annotations

import logging
import sys
from contextlib import nullcontext
from typing import Any

import pytest

# What long work tells how far it is.
_LOGGER = "pytest_attnheat"


class LiveProgress(logging.Handler):
    """Shows how far long work is, as it tells the log: a line at a time, between pytest's own."""

    def __init__(self, config: pytest.Config) -> None:
        super().__init__(logging.INFO)
        self._config = config

    def emit(self, record: logging.LogRecord) -> None:
        """Show a record; that of a run within a run is shown there."""
        manager: Any = self._config.pluginmanager
        reporter, capture = map(manager.get_plugin, ("terminalreporter", "capturemanager"))
        if reporter is None or logging.getLogger(_LOGGER).handlers[-1] is not self:
            return
        streams = sys.stdout, sys.stderr
        try:
            with nullcontext() if capture is None else capture.global_and_fixture_disabled():
                reporter.ensure_newline()
                reporter.write_line(f"attention: {record.getMessage()}")
        finally:  # pytest puts its own in place of those that a test has redirected
            sys.stdout, sys.stderr = streams


def show_progress(config: pytest.Config) -> None:
    """Show how far long work is, until the end of the session."""
    # Not where pytest shows its log itself; nor in a worker of pytest-xdist, which has no terminal.
    shows_log = config.pluginmanager.hasplugin("logging") and (
        config.getoption("log_cli_level", None) is not None or config.getini("log_cli")
    )
    if shows_log or config.getoption("verbose", -1) < 0:
        return
    logger, handler = logging.getLogger(_LOGGER), LiveProgress(config)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(min(level, logging.INFO) or logging.INFO)

    def stop() -> None:
        logger.removeHandler(handler)
        logger.setLevel(level)

    config.add_cleanup(stop)


def keep_progress_live(config: pytest.Config) -> None:
    """Keep out of the log of a failed test how far long work was; pytest's other logs have it."""
    plugin: Any = config.pluginmanager.get_plugin("logging-plugin")
    if plugin is not None:
        plugin.report_handler.addFilter(lambda record: record.name != _LOGGER)
