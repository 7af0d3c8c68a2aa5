"""`--attn-grade`: which defects of an implementation do the tests of a project let through?

After the tests of a run, those that call the implementation run again: with the right one, and
with each wrong version in its place. Each worker of pytest-xdist knows all tests, and judges its
share of the versions; whoever started the workers gathers what they found.
"""

from __future__ import annotations

import html
import json
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import pytest

from ..inputs import misuse
from .grades import Found, Graded, notes_of
from .replacing import Target, find_target, outcomes, quiet, tear_down
from .settings import CHECKS_MARKER, GRADE_MARKER, MARKED, SETTINGS, Settings

if TYPE_CHECKING:
    from ..contract.effects import Effect
    from ..contract.grading import AnyPlanted, Study

NAME = "attnheat_grading"
_HANDED_ON, _SHARE = "attnheat_grading", "attnheat_share"
_TIMES = 20.0
# So many lines of progress are shown.
_PROGRESS = 8


class Grading:
    """The plugin of a run with `--attn-grade`."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.settings: Settings = config.stash[SETTINGS]
        self.graded: list[Graded] = []
        self._is_worker = hasattr(config, "workerinput")
        self._handed: list[list[Found]] = []
        self._error = ""
        self._in_use: dict[Any, int] = {}
        # The fixtures that call the target, and which of their calls are not understood.
        self._watched: Effect | None = None
        self._calling: dict[str, list[str]] = {}
        given = {"attn_update": self.settings.update or None}
        for option in ("attn_update", "mpl_generate_path", "mpl_generate_hash_library"):
            if given.get(option, getattr(config.option, option, None)) is not None:
                other = "--" + option.replace("_", "-")
                raise pytest.UsageError(f"{other}: wrong versions would be written; accepted is "
                                        "a run of its own, without --attn-grade")  # fmt: skip

    def pytest_report_header(self) -> str:
        """Say what comes after the tests."""
        return (
            f"attention grade: {', '.join(self.settings.grade)}; in the end, tests that call it "
            "run again, with each wrong version"
        )

    # -- what is graded by which tests

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Refuse what cannot be graded before any test runs."""
        try:
            for text in self._targets(items):
                target = find_target(self.config, text)
                study = self._study(target)
                if study.unfit:
                    raise pytest.UsageError(f"--attn-grade {text}: {study.unfit[0]}")
        except pytest.UsageError as error:
            if not self._is_worker:
                raise
            self._error = str(error)  # xdist would tell of a crash

    def _targets(self, items: Sequence[pytest.Item]) -> list[str]:
        if self.settings.grade != (MARKED,):
            return list(self.settings.grade)
        named = {_marked(item) for item in items} - {None}
        if not named - {""}:
            raise pytest.UsageError(
                f"--attn-grade={MARKED}: no test has a marker {GRADE_MARKER} that names a target"
            )
        return sorted(name for name in named if name)

    def _study(self, target: Target) -> Study:
        from ..contract.grading import Study

        try:
            return Study(
                target.right,
                defects=self.settings.grade_defects,
                seed=self.settings.seed,
                inside=target.inside,
            )
        except (TypeError, ValueError) as error:
            of_defects = str(error).startswith("defects")
            option = "--attn-grade-defects" if of_defects else f"--attn-grade {target.text}"
            raise pytest.UsageError(f"{option}: {error}") from error

    # -- running

    # Outside of the terminal's, which ends its line of dots first.
    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Generator[None, Any, Any]:
        """Grade when the tests of the run are done."""
        result = yield
        if session.shouldfail or session.shouldstop or self.config.option.collectonly:
            return result
        if self.config.pluginmanager.hasplugin("dsession"):
            handed = self._handed
        else:
            handed = [self._judge_all(session)]
        if self._is_worker:
            output = self.config.workeroutput  # type: ignore[attr-defined]
            output[_HANDED_ON] = json.dumps([handed[0], sys.path])
        else:
            targets = dict.fromkeys(found["target"] for share in handed for found in share)
            for target in targets:
                every = [one for share in handed for one in share if one["target"] == target]
                self.graded.append(self._gather(target, every))
        return result

    def _judge_all(self, session: pytest.Session) -> list[Found]:
        if self._error:
            return [{"target": ", ".join(self.settings.grade), "error": self._error}]
        from ..contract.probing import one_thread

        found = []
        for text in self._targets(session.items):
            target = find_target(self.config, text)
            # However the tests are ordered, they run as they are written here.
            items = sorted(_chosen(session.items, text), key=_place)
            # Workers would take one another's cores.
            with quiet(session), one_thread() if self._is_worker else nullcontext():
                own = self._judge(session, target, items)
                if own["is_empty"] and _is_a_function(target):
                    own = self._judge(session, replace(target, inside=False), items)
                found.append({"target": text, **own})
        return found

    def _judge(self, session: pytest.Session, target: Target, items: list[pytest.Item]) -> Found:
        """Run tests with the right one, and with a share of the wrong versions."""
        from ..contract.planting_inside import NOTHING_INSIDE

        index, count = getattr(self.config, "workerinput", {}).get(_SHARE, (0, 1))
        first, study = self._study(target), self._study(target)
        # Before anything is replaced: they look for what they call.
        planted = [study.plant(version) for version in study.versions[index::count]]
        found: Found = {"versions": len(study.versions), "verdicts": [], "unjudged": []}
        found["kept"] = target.kept_elsewhere(session.items)
        with target.replaced(session.items) as where:
            found["where"] = where
            items = self._callers(session, target, first.watched, items, found)
            found |= {"inside": first.inside, "is_empty": NOTHING_INSIDE in found["refused"]}
            if not items:
                return found
            limit = self._control(session, target, study.watched, items, found)
            if not items:
                return found
            effect = study.watched.effect
            found |= {"calls": effect.calls, "set_aside": effect.set_aside,
                      "seen": sorted(effect.seen), "called": getattr(study.watched, "called", ""),
                      "tests": [item.nodeid for item in items]}  # fmt: skip
            for number, one in enumerate(planted):
                if number % max(1, -(-len(planted) // _PROGRESS)) == 0:
                    self._write(f"{target.text}, version {number + 1} of {len(planted)}")
                rejected = self._rejected(session, target, one, items, limit)
                self._note(study, one, rejected, found)
        return found

    def _callers(
        self, session: pytest.Session, target: Target, watched: AnyPlanted,
        items: list[pytest.Item], found: Found,
    ) -> list[pytest.Item]:  # fmt: skip
        """Return the tests that pass with the right one and call it; say of others why not."""
        self._watched, self._calling = watched.effect, {}
        found |= {"refused": [], "left_out": [], "others": 0}
        target.stand_in.version = watched
        callers = []
        try:
            watched.effect.calls = 0
            for item, outcome in outcomes(session, items, self.settings.seed):
                own = getattr(item, "fixturenames", ())
                fixtures = [name for name in own if name in self._calling]
                refused = [*watched.effect.unfit]
                refused += [reason for name in fixtures for reason in self._calling[name]]
                called = watched.effect.calls > 0 or bool(fixtures)
                watched.effect.calls = 0
                watched.effect.set_aside.clear()
                watched.effect.refused.clear()
                if outcome.status != "passed" and called:
                    why = f"{outcome.status} with the right one: {outcome.said}"
                    found["left_out"].append([item.nodeid, why])
                elif not called:
                    found["others"] += 1
                elif refused:
                    found["refused"].append(refused[0])
                    why = f"a call is not understood: {refused[0]}"
                    found["left_out"].append([item.nodeid, why])
                else:
                    callers.append(item)
        finally:
            target.stand_in.version = self._watched = None
        return callers

    def _control(
        self, session: pytest.Session, target: Target, watched: AnyPlanted,
        items: list[pytest.Item], found: Found,
    ) -> float:  # fmt: skip
        """Run the right one as wrong versions will be run; return their time limit in seconds."""
        target.stand_in.version = watched
        start = time.monotonic()
        try:
            for item, outcome in list(outcomes(session, items, self.settings.seed)):
                if outcome.status != "passed":
                    items.remove(item)
                    why = f"{outcome.status} when it ran again: {outcome.said}"
                    found["left_out"].append([item.nodeid, why])
        finally:
            target.stand_in.version = None
        return self.settings.time_limit + _TIMES * (time.monotonic() - start)

    def _rejected(
        self, session: pytest.Session, target: Target, planted: AnyPlanted,
        items: Sequence[pytest.Item], limit: float,
    ) -> str | None:  # fmt: skip
        """Return which test fails with a version, and how; None if none does."""
        from ..contract.grading import _within

        target.stand_in.version = planted
        item = items[0]
        try:
            with _within(limit):
                for item, outcome in outcomes(session, items, self.settings.seed):
                    if outcome.status == "failed":
                        return f"{item.nodeid}: {outcome.said}"
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # also that time is up, and what ends a run
            tear_down(item)
            return f"{item.nodeid}: {type(error).__name__}: {error}"
        finally:
            target.stand_in.version = None
        return None

    def _note(self, study: Study, planted: AnyPlanted, rejected: str | None, found: Found) -> None:
        verdict = study.verdict(planted, rejected)
        if planted.effect.refused and verdict.status != "killed":
            found["unjudged"].append([verdict.name, next(iter(planted.effect.refused))])
        else:
            found["verdicts"].append(asdict(verdict))

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> Generator[None, Any, Any]:
        """Note which fixtures call the target: for the tests that share them."""
        effect = self._watched
        if effect is None:
            return (yield)
        calls, known = effect.calls, set(effect.refused)
        try:
            return (yield)
        finally:
            if effect.calls > calls:
                refused = [reason for reason in effect.refused if reason not in known]
                self._calling.setdefault(fixturedef.argname, []).extend(refused)

    def _write(self, text: str) -> None:
        reporter: Any = self.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None and self.config.option.verbose >= 0:
            reporter.ensure_newline()
            if self.config.pluginmanager.hasplugin("dsession"):  # which leaves its dots open
                reporter.line("")
            reporter.write_line(f"attention grade: {text}")

    # -- workers

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Tell a worker which versions are its own; one in place of another has that one's."""
        taken = set(self._in_use.values())
        share = next(number for number in range(len(taken) + 1) if number not in taken)
        self._in_use[node.gateway.id] = share
        node.workerinput[_SHARE] = (share, node.workerinput["workercount"])

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        """Take what a worker found."""
        text = getattr(node, "workeroutput", {}).get(_HANDED_ON)
        if text is None:
            self._in_use.pop(node.gateway.id, None)
            return
        found, path = json.loads(text)
        sys.path += [folder for folder in path if folder not in sys.path]
        self._handed.append(found)

    def _gather(self, text: str, every: Sequence[Found]) -> Graded:
        """Make a grade of what all workers found."""
        from ..contract.grading import Grade, Verdict

        if sum(len(share.get("verdicts", ())) for share in every):
            workers = f", judged by {len(every)} workers" if len(every) > 1 else ""
            self._write(f"{text}{workers}; what would tell more apart is looked for")
        errors = [found["error"] for found in every if "error" in found]
        if errors:
            return Graded(text, error=errors[0])
        found = every[0]
        notes = list(notes_of(every))
        unjudged = [one for share in every for one in share["unjudged"]]
        verdicts = [Verdict(**one) for share in every for one in share["verdicts"]]
        found = found | {"unjudged": unjudged}
        target = replace(find_target(self.config, text), inside=found["inside"])
        study = self._study(target)
        if not found.get("tests"):
            if found["refused"]:
                refused = tuple(dict.fromkeys(found["refused"]))
                return Graded(text, Grade(study.spec.name, refused=refused), "", notes, found)
            why = "no test that calls it passes" if found["left_out"] else "no test calls it"
            return Graded(text, None, why, notes, found)
        lost = len(study.versions) - len(verdicts) - len(unjudged)
        if lost:
            why = f"{lost} of {len(study.versions)} versions were not judged: a worker was lost"
            return Graded(text, None, why, notes, found)
        study.watched.effect.calls = found["calls"]
        study.watched.effect.set_aside.update(found["set_aside"])
        study.watched.effect.seen = set(found["seen"])
        vars(study.watched)["called"] = found["called"]
        return Graded(text, study.grade(verdicts), "", notes, found)

    # -- what is said

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Fail a run whose tests let too much through, or that has no grade."""
        if self._is_worker or self.config.option.collectonly:
            return
        if not self.graded:
            self.graded = [Graded(text, error="the run ended before its tests were graded")
                           for text in self.settings.grade]  # fmt: skip
        least = self.settings.grade_min
        failed = any(one.fails(least) for one in self.graded)
        if failed and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print the grades."""
        if self.graded:
            terminalreporter.section("attention grade")
        for one in self.graded:
            for line in one.lines(self.settings.grade_min, whole=self.config.option.verbose > 0):
                terminalreporter.line(line)

    @pytest.hookimpl(optionalhook=True)
    def pytest_html_results_summary(self, postfix: list[str]) -> None:
        """Put the grades into the report of pytest-html."""
        for one in self.graded:
            text = "\n".join(one.lines(self.settings.grade_min, whole=True))
            postfix.append(f"<h2>Attention grade</h2><pre>{html.escape(text)}</pre>")


def _is_a_function(target: Target) -> bool:
    """Whether calls of a target may be read as those of a function of query, key and value."""
    from ..contract.grading import may_be_a_function

    return target.inside is not False and may_be_a_function(target.right)


def _marked(item: pytest.Item) -> str | None:
    """The target that the marker of a test names, "" if it names none; None without a marker."""
    marker = item.get_closest_marker(GRADE_MARKER)
    if marker is None:
        return None
    target = marker.kwargs.get("target", "")
    if marker.args or set(marker.kwargs) - {"target"} or not isinstance(target, str):
        given = ", ".join(
            [*map(repr, marker.args), *(f"{k}={v!r}" for k, v in marker.kwargs.items())]
        )
        accepted = "target=, as package.module:object, or nothing"
        raise pytest.UsageError(f"{item.nodeid}: {misuse(GRADE_MARKER, given, accepted)}")
    return target


def _chosen(items: Sequence[pytest.Item], text: str) -> list[pytest.Item]:
    """The tests that grade a target: marked ones if there are any, else all that have no marker."""
    # The examination has the target in its specifications, where nothing is replaced.
    own = [item for item in items if item.get_closest_marker(CHECKS_MARKER) is None]
    marked = [item for item in own if _marked(item) in ("", text)]
    return marked or [item for item in own if _marked(item) is None]


def _place(item: pytest.Item) -> tuple[str, int, str]:
    file, line, _ = item.location
    return file, line or 0, item.nodeid
