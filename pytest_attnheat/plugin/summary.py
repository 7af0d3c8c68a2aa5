"""What became of the pictures of a run: in the summary, in reports, and across workers."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

SUFFIXES = (".png", ".svg")


@dataclass(frozen=True)
class Outcome:
    """One comparison, in plain words that a worker can send.

    Attributes:
        test: node id.
        baseline: its path, as shown.
        status: that of the verdict, or "written".
        compared: "data", "pixels".
        drawn_by: the matplotlib of the baseline.
        reason: one line.
        pictures: files left behind, by name.
    """

    test: str
    baseline: str
    status: str
    compared: tuple[str, ...]
    drawn_by: str = ""
    reason: str = ""
    pictures: tuple[tuple[str, str], ...] = ()


# The comparisons of a test, and the baselines (as patterns) that collected tests use.
OUTCOMES = pytest.StashKey[list[Outcome]]()
USED = pytest.StashKey[set[str]]()


def shown(config: pytest.Config, path: Path) -> str:
    """Return a path as one would type it where pytest was started."""
    here = config.invocation_params.dir
    return os.path.relpath(path, here) if path.is_relative_to(config.rootpath) else str(path)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Send the comparisons of a test along with its report, which crosses from a worker."""
    report = yield
    if call.when == "call" and (outcomes := item.stash.get(OUTCOMES, [])):
        report.attnheat = [vars(outcome) for outcome in outcomes]  # type: ignore[attr-defined]
        item.stash[OUTCOMES] = []
        for outcome in outcomes:
            add_to_html(item.config, report, outcome.pictures)
    return report


def add_to_html(
    config: pytest.Config, report: pytest.TestReport, pictures: Iterable[tuple[str, str]]
) -> None:
    """Put pictures, given by name and path, into the report of pytest-html."""
    if not config.pluginmanager.hasplugin("html"):
        return
    import base64

    from pytest_html import extras

    shown = [
        extras.png(base64.b64encode(Path(path).read_bytes()).decode("ascii"), name=name)
        # The first is what the report shows before anybody clicks: all three side by side.
        for name, path in sorted(pictures, key=lambda picture: picture[0] != "difference")
        if path.endswith(".png")
    ]
    report.extras = [*getattr(report, "extras", []), *shown]  # type: ignore[attr-defined]


class Summary:
    """Gathers the comparisons of all tests in the process that prints the summary."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._outcomes: list[Outcome] = []
        self._marked_without = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take the comparisons that a report brings along."""
        found = getattr(report, "attnheat", [])
        self._outcomes += [Outcome(**outcome) for outcome in found]
        marked = "heatmap_compare" in report.keywords
        ran = report.when == "call" and not report.skipped
        self._marked_without += marked and ran and not found

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Hand on, from a worker, which baselines are used."""
        if hasattr(self._config, "workeroutput"):
            used = self._config.stash[USED]
            self._config.workeroutput["attnheat_used"] = sorted(used)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        """Take what a worker hands on."""
        self._config.stash[USED].update(_used_by(node))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say what was compared, what was written, and what was not compared."""
        lines = list(self._lines())
        if lines:
            terminalreporter.section("heatmaps")
            for line in lines:
                terminalreporter.line(line)

    def _lines(self) -> Generator[str, None, None]:
        compared = [outcome for outcome in self._outcomes if outcome.status != "written"]
        if compared:
            counts = (
                sum(kind in outcome.compared for outcome in compared) for kind in ("data", "pixels")
            )
            yield "{} compared as data, {} as pixels".format(*counts)
        without_data = [o.baseline for o in compared if o.compared == ("pixels",)]
        if without_data:
            yield f"compared by pixels alone, as they carry no data: {', '.join(without_data)}"
        other_text = [outcome for outcome in compared if outcome.status == "text"]
        if other_text:
            versions = ", ".join(sorted({outcome.drawn_by for outcome in other_text}))
            yield (
                f"{len(other_text)} passed with other text, drawn by matplotlib {versions}; "
                "to refresh them: pytest --attn-update=all"
            )
        for outcome in self._outcomes:
            if outcome.status == "written":
                yield f"wrote {outcome.baseline} ({outcome.reason})"
        if self._marked_without:
            yield f"WARNING: {self._marked_without} heatmap_compare tests compared nothing"
        if self._config.getoption("--attn-unused"):
            yield from self._unused()

    def _unused(self) -> Generator[str, None, None]:
        used = self._config.stash[USED]
        folders = {Path(path).parent for path in used} | {self._config.rootpath / "baseline_images"}
        for folder in sorted(folders):
            for path in sorted(folder.glob("*")):
                is_used = any(path.match(pattern) for pattern in used)
                if path.suffix in SUFFIXES and not is_used and not path.name.startswith("."):
                    yield f"unused {shown(self._config, path)}"


def _used_by(node: Any) -> list[str]:
    return list(getattr(node, "workeroutput", {}).get("attnheat_used", []))
