"""What an examination found, subject by subject, at the end of a run.

A verdict travels with the report of its test, so that workers need nothing else to hand it on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

import pytest

# What a report carries its verdict as.
VERDICT = "attnheat_verdict"
_MOST_KINDS = 6

Verdict = Mapping[str, Any]


class Verdicts:
    """Gives the report of each check its verdict; registered where something is examined."""

    # Outside of what leaves the picture of a failure, to know where that lies.
    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Attach the verdict, and say in one line what a test claims that failed."""
        report = yield
        question = question_of(item)
        if question is None or call.when != "call":
            return report
        verdict = question.verdict
        error = None if call.excinfo is None else call.excinfo.value
        title = getattr(error, "heatmap_title", None)
        pictures = [text for name, text in report.sections if name == title]
        outcome = "xfailed" if hasattr(report, "wasxfail") else report.outcome
        verdict |= {"outcome": outcome, "where": item.nodeid.partition("[")[0].rpartition("::")[0]}
        verdict |= {"picture": pictures[0]} if pictures else {}
        setattr(report, VERDICT, verdict)
        crash = getattr(report.longrepr, "reprcrash", None)
        if crash is not None and (claim := getattr(error, "claim", None)):
            crash.message = claim  # the rest is shown above; CI shows every line of this
        place = getattr(item, "place", None)  # of a check that no test asks
        if place is not None and crash is not None:
            crash.path, crash.lineno = place
        if place is not None and isinstance(report.longrepr, tuple):  # skipped
            report.longrepr = (*place, report.longrepr[2])
        return report


def question_of(item: pytest.Item) -> Any:
    """Return the check that a test asks, None where it is no test of an examination."""
    from pytest_attnheat.plugin.examination import CheckItem, Question

    if isinstance(item, CheckItem):
        return item.question
    callspec = getattr(item, "callspec", None)
    given = None if callspec is None else callspec.params.get("check")
    return given if isinstance(given, Question) else None


def shorten(reports: Sequence[pytest.TestReport]) -> None:
    """Of a check that failed alike in several dtypes, print the first failure in full alone.

    What JUnit writes was taken from each report before, as it was.
    """
    places: dict[tuple[str, ...], str] = {}
    for report in reports:
        verdict = getattr(report, VERDICT, None)
        if verdict is None or verdict["outcome"] != "failed":
            continue
        alike = tuple(verdict[key] for key in ("subject", "where", "check", "reason"))
        place = places.setdefault(alike, verdict["place"])
        if place != verdict["place"]:
            _say_alone(report.longrepr, f"as in {place}: {verdict['reason']}")


def _say_alone(longrepr: Any, text: str) -> None:
    """Let a failure print one line; pytest's own summary still has its claim."""
    traceback = getattr(longrepr, "reprtraceback", None)
    if traceback is None:  # as with --tb=line
        return
    *_, last = traceback.reprentries
    last.lines = [f"{text}\n"] if last.style == "native" else [f"E   {text}"]
    traceback.reprentries = [last]
    if hasattr(longrepr, "chain"):
        longrepr.chain = longrepr.chain[-1:]


def summarise(verdicts: Sequence[Verdict]) -> Iterator[str]:
    """Yield what to print of the verdicts of a run: each subject that failed, or has a hint.

    What failed comes last, where a log is read from; else in an order that workers do not change.
    """
    subjects: dict[tuple[str, str], list[Verdict]] = {}
    for verdict in verdicts:
        subjects.setdefault((verdict["subject"], verdict["where"]), []).append(verdict)

    def place(subject: tuple[str, str]) -> tuple[bool, str, str]:
        failed = any(verdict["outcome"] == "failed" for verdict in subjects[subject])
        return failed, subject[1], subject[0]

    for name, where in sorted(subjects, key=place):
        found = subjects[name, where]
        entries = list(_entries(found))
        if entries:
            yield f"{name} ({where}): {_counts(found)}"
            yield from (f"  {title:<10} {text}" for title, text in entries)


def _counts(found: Sequence[Verdict]) -> str:
    outcomes = Counter(verdict["outcome"] for verdict in found)
    asked = len(found) - outcomes["skipped"]
    text = f"{outcomes['failed']} of {asked} checks failed"
    if outcomes["xfailed"]:
        text += f", {outcomes['xfailed']} as expected"
    return text + (f", {outcomes['skipped']} skipped" if outcomes["skipped"] else "")


def _entries(found: Sequence[Verdict]) -> Iterator[tuple[str, str]]:
    failed = [verdict for verdict in found if verdict["outcome"] == "failed"]
    if all(verdict["outcome"] == "skipped" for verdict in found):
        reasons = Counter(verdict["reason"] for verdict in found)
        yield "nothing", f"was examined; most often, {reasons.most_common(1)[0][0]}"
    if failed and len(_unique(found, "place")) > 1:
        places = Counter(verdict["place"] for verdict in failed)
        yield "failed", ", ".join(f"{count} in {place}" for place, count in places.items())
    declarations = _unique(failed, "declaration")
    for declaration in declarations:
        yield "declared", declaration
    diagnoses = _unique(failed, "diagnosis")
    # Under a wrong declaration no defect may fit. Each worker made its own, of the same cases.
    if diagnoses and (not declarations or any(verdict["named"] for verdict in failed)):
        yield "diagnosis", diagnoses[0]
    if failed and not diagnoses:
        for outside in _unique(failed, "outside") if not declarations else ():
            yield "diagnosis", outside
        yield from _by_reason(failed)
    for picture in _unique(failed, "picture")[:1]:
        yield "picture", picture
    for hint in dict.fromkeys(hint for verdict in found for hint in verdict["hints"]):
        yield "hint", hint


def _unique(found: Sequence[Verdict], key: str) -> list[str]:
    return list(dict.fromkeys(verdict[key] for verdict in found if verdict.get(key)))


def _by_reason(failed: Sequence[Verdict]) -> Iterator[tuple[str, str]]:
    """Which checks failed for which reason, where no diagnosis says it for all."""
    checks: dict[str, list[str]] = {}
    for verdict in failed:
        names = checks.setdefault(verdict["reason"], [])
        if verdict["check"] not in names:
            names.append(verdict["check"])
    for reason, names in list(checks.items())[:_MOST_KINDS]:
        others = f" and {len(names) - 3} more" if len(names) > 3 else ""
        yield "because", f"{', '.join(names[:3])}{others}: {reason}"
    if len(checks) > _MOST_KINDS:
        yield "because", f"... and {len(checks) - _MOST_KINDS} more reasons"
