"""What reports carry beside pytest's own, and what is said of it at the end of a run.

Comparisons of pictures and verdicts of the examination travel with the reports of their tests, so
that workers need nothing else to hand them on.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from .naming import SUFFIXES, TRACE_SUFFIX
from .settings import switched

# What a report carries its comparisons and its verdict as, and a worker the baselines it uses.
COMPARED = "attnheat_compared"
VERDICT = "attnheat_verdict"
HANDED_ON = "attnheat_used"
# The picture of a check that failed.
DIAGNOSIS_DRAWN = "weights: expected, inferred from the output, difference"
_MOST_KINDS = 6

Found = Mapping[str, Any]


class Outcome(NamedTuple):
    """One comparison, in plain words that a worker can send."""

    baseline: str  # its path, as shown
    status: str  # that of the verdict, or "written"
    compared: tuple[str, ...]  # "data", "sketch", "pixels"
    drawn_by: str = ""  # the matplotlib of the baseline
    reason: str = ""  # one line
    pictures: tuple[tuple[str, str], ...] = ()  # files left behind, by name


# The comparisons of a test, and the baselines that collected tests use: paths, or how they begin
# and a star.
OUTCOMES = pytest.StashKey[list[Outcome]]()
USED = pytest.StashKey[set[str]]()


def shown(config: pytest.Config, path: Path) -> str:
    """Return a path as one would type it where pytest was started."""
    here = config.invocation_params.dir
    if not path.is_relative_to(config.rootpath):
        return str(path)
    try:
        return os.path.relpath(path, here)
    except ValueError:  # on Windows, from another drive
        return str(path)


def quoted(argument: str) -> str:
    """Return an argument in the quotes of the shell of this system: to cmd a ' is a letter."""
    mark, escaped = ('"', '\\"') if os.name == "nt" else ("'", "'\\''")
    return mark + argument.replace(mark, escaped) + mark


def attach_outcomes(
    item: pytest.Item, call: pytest.CallInfo[None], report: pytest.TestReport
) -> None:
    """Send the comparisons of a test along with its report."""
    if call.when == "call" and (outcomes := item.stash.get(OUTCOMES, [])):
        setattr(report, COMPARED, [outcome._asdict() for outcome in outcomes])
        item.stash[OUTCOMES] = []
        for outcome in outcomes:
            add_to_html(item.config, report, outcome.pictures)


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


def reports_of(terminalreporter: pytest.TerminalReporter) -> list[pytest.TestReport]:
    """Return the reports of all tests of a run."""
    return [
        report
        for reports in terminalreporter.stats.values()
        for report in reports
        if isinstance(report, pytest.TestReport)
    ]


def write(
    terminalreporter: pytest.TerminalReporter,
    config: pytest.Config,
    reports: Sequence[pytest.TestReport],
) -> None:
    """Say what was compared and what was examined, each in a section if there is anything."""
    sections = {
        "heatmaps": _of_pictures(config, reports),
        "attention examination": _of_examination(reports),
    }
    for title, lines in sections.items():
        for number, line in enumerate(lines):
            if number == 0:
                terminalreporter.section(title)
            terminalreporter.line(line)


# -- pictures ----------------------------------------------------------------------------------


def _of_pictures(config: pytest.Config, reports: Sequence[pytest.TestReport]) -> Iterator[str]:
    """Yield what was compared, what was written, and what was not compared."""
    outcomes = [Outcome(**one) for report in reports for one in getattr(report, COMPARED, ())]
    compared = [outcome for outcome in outcomes if outcome.status != "written"]
    if compared:
        kinds = ("data", "pixels", "sketch")
        data, pixels, sketches = (sum(kind in o.compared for o in compared) for kind in kinds)
        pooled = f", {sketches} with a sketch of pooled weights" if sketches else ""
        yield f"{data} compared as data, {pixels} as pixels{pooled}"
    without_data = [o.baseline for o in compared if o.compared == ("pixels",)]
    if without_data:
        yield f"compared by pixels alone, as they carry no data: {', '.join(without_data)}"
    unsketched = [o.baseline for o in compared if o.status == "pooled"]
    if unsketched:
        yield (
            f"compared by pooled weights alone, as they carry no sketch: {', '.join(unsketched)}; "
            "to refresh them: pytest --attn-update=all"
        )
    other_text = [outcome for outcome in compared if outcome.status == "text"]
    if other_text:
        versions = ", ".join(sorted({outcome.drawn_by for outcome in other_text}))
        yield (
            f"{len(other_text)} passed with other text, drawn by matplotlib {versions}; "
            "to refresh them: pytest --attn-update=all"
        )
    for outcome in outcomes:
        if outcome.status == "written":
            yield f"wrote {outcome.baseline} ({outcome.reason})"
    without = sum(
        "heatmap_compare" in report.keywords and not hasattr(report, COMPARED)
        for report in reports
        if report.when == "call" and not report.skipped
    )
    if without:
        yield f"WARNING: {without} heatmap_compare tests compared nothing"
    if switched(config, "attn_unused"):
        yield from _unused(config)


def _unused(config: pytest.Config) -> Iterator[str]:
    used = config.stash[USED]
    folders = {Path(path).parent for path in used} | {config.rootpath / "baseline_images"}
    for folder in sorted(folders):
        for path in sorted(folder.glob("*")):
            is_used = str(path) in used or any(
                one.endswith("*") and str(path).startswith(one[:-1]) for one in used
            )
            if (
                path.suffix in (*SUFFIXES, TRACE_SUFFIX)
                and not is_used
                and not path.name.startswith(".")
            ):
                yield f"unused {shown(config, path)}"


# -- examination -------------------------------------------------------------------------------


def shorten(reports: Sequence[pytest.TestReport]) -> None:
    """Of a check that failed alike in several dtypes, print the first failure in full alone."""
    # What JUnit writes was taken from each report before, as it was.
    places: dict[tuple[str, ...], str] = {}
    for report in reports:
        verdict = verdict_of(report)
        if verdict is None or verdict["outcome"] != "failed" or not verdict["reason"]:
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


def verdict_of(report: pytest.TestReport) -> Found | None:
    """What a check found, with what became of it, and where its picture lies."""
    found = getattr(report, VERDICT, None)
    if found is None:
        return None
    return {
        **found["result"],
        **found,
        "outcome": "xfailed" if hasattr(report, "wasxfail") else report.outcome,
        "where": report.nodeid.partition("[")[0].rpartition("::")[0],
        "picture": dict(report.sections).get(DIAGNOSIS_DRAWN),
    }


def _of_examination(reports: Sequence[pytest.TestReport]) -> Iterator[str]:
    """Yield what the examination found, once for each subject that failed or has a note or hint."""
    # What failed comes last, where a log is read from; else in an order that workers do not change.
    subjects = _subjects(reports)

    def place(subject: tuple[str, str]) -> tuple[bool, str, str]:
        failed = any(verdict["outcome"] == "failed" for verdict in subjects[subject])
        return failed, subject[1], subject[0]

    for name, where in sorted(subjects, key=place):
        found = subjects[name, where]
        entries = list(_entries(found))
        if entries:
            yield f"{name} ({where}): {_counts(found)}"
            yield from (f"  {title:<10} {text}" for title, text in entries)
    yield from _skipped([verdict for found in subjects.values() for verdict in found])
    if unasked := _unasked(subjects):
        yield f"ERROR: nothing was asked of {', '.join(unasked)}, and what compares nothing fails"


def _subjects(reports: Sequence[pytest.TestReport]) -> dict[tuple[str, str], list[Found]]:
    """The verdicts on each subject, by its name and where it is examined."""
    subjects: dict[tuple[str, str], list[Found]] = {}
    for verdict in map(verdict_of, reports):
        if verdict is not None:
            subjects.setdefault((verdict["subject"], verdict["where"]), []).append(verdict)
    return subjects


def _unasked(subjects: Mapping[tuple[str, str], Sequence[Found]]) -> list[str]:
    """The subjects of which nothing was asked, though the run was to ask all."""
    # Not where a check was deselected or not reached, nor where all of them were left out unasked:
    # their device is absent, or not selected.
    return [
        name
        for (name, _), found in sorted(subjects.items(), key=lambda one: one[0])
        if len(found) >= found[0]["calls"]
        and all(one["outcome"] == "skipped" for one in found)
        and any(one["message"] for one in found)
    ]


def fail_if_unasked(session: pytest.Session) -> None:
    """Let no run pass that asked nothing of a subject."""
    reporter: Any = session.config.pluginmanager.get_plugin("terminalreporter")
    passed = reporter is not None and session.exitstatus == pytest.ExitCode.OK
    if passed and _unasked(_subjects(reports_of(reporter))):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _skipped(found: Sequence[Found]) -> Iterator[str]:
    """Yield what was not asked, and how many checks were skipped, for want of a declaration too."""
    for left_out in dict.fromkeys(", ".join(one["left_out"]) for one in found if one["left_out"]):
        yield f"not asked in the quick form: {left_out}"
    reasons = [one for one in found if one["outcome"] == "skipped"]
    if not reasons:
        return
    unsaid = sum(one["message"] in one["undeclared"] for one in reasons)
    text = f"{len(reasons)} of {len(found)} checks were skipped: -rs says why"
    if unsaid:
        text += (
            f"; {unsaid} because a parameter is not declared: --attn-check-strict makes that fail"
        )
    yield text


def _counts(found: Sequence[Found]) -> str:
    outcomes = Counter(verdict["outcome"] for verdict in found)
    made = len(found) - outcomes["skipped"]
    text = f"{outcomes['failed']} of {made} checks failed"
    if outcomes["xfailed"]:
        text += f", {outcomes['xfailed']} as expected"
    return text + (f", {outcomes['skipped']} skipped" if outcomes["skipped"] else "")


def _entries(found: Sequence[Found]) -> Iterator[tuple[str, str]]:
    failed = [verdict for verdict in found if verdict["outcome"] == "failed"]
    if all(verdict["outcome"] == "skipped" for verdict in found):
        reasons = Counter(verdict["reason"] for verdict in found)
        yield "nothing", f"was examined; most often, {reasons.most_common(1)[0][0]}"
    if failed and len(_unique(found, "place")) > 1:
        places = Counter(verdict["place"] for verdict in failed)
        yield "failed", ", ".join(f"{count} in {place}" for place, count in places.items())
    declarations = _unique(failed, "declaration")
    for declaration in declarations:
        yield "assumed" if declaration.startswith("not declared") else "declared", declaration
    diagnoses = _unique(failed, "diagnosis")
    # Under a wrong declaration no defect may fit. Each worker made its own, of the same cases.
    if diagnoses and (not declarations or any(verdict["named"] for verdict in failed)):
        yield "diagnosis", diagnoses[0]
    if failed and not diagnoses:
        for outside in _unique(failed, "inside") if not declarations else ():
            yield "diagnosis", outside
        yield from _by_reason(failed)
    for picture in _unique(failed, "picture")[:1]:
        yield "picture", picture
    if not failed:
        passed = (one for one in found if one["outcome"] == "passed")
        for check, note in dict.fromkeys((one["check"], one["message"]) for one in passed):
            yield from ((check, line) for line in note.splitlines())
    said = {verdict["reason"] for verdict in failed}  # with `--attn-check-strict`, and above
    for hint in dict.fromkeys(hint for verdict in found for hint in verdict["hints"]):
        if hint not in said or diagnoses:
            yield "hint", hint


def _unique(found: Sequence[Found], key: str) -> list[str]:
    return list(dict.fromkeys(verdict[key] for verdict in found if verdict.get(key)))


def _by_reason(failed: Sequence[Found]) -> Iterator[tuple[str, str]]:
    """Which checks failed for which reason, where no diagnosis says it for all."""
    checks: dict[str, list[str]] = {}
    for verdict in failed:
        names = checks.setdefault(verdict["reason"], [])
        if verdict["check"] not in names:
            names.append(verdict["check"])
    for reason, names in list(checks.items())[:_MOST_KINDS]:
        others = f" and {len(names) - 3} more" if len(names) > 3 else ""
        yield "because", f"{', '.join(names[:3])}{others}: {reason or 'the test itself failed'}"
    if len(checks) > _MOST_KINDS:
        yield "because", f"... and {len(checks) - _MOST_KINDS} more reasons"


# -- as data: `--attn-json`: what the examination found, in one file ------------------------------


class JsonFile:
    """Gathers the verdicts of a run, those of workers too, and writes them when it ends."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._subjects: dict[tuple[str, str], list[dict[str, Any]]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the verdict of a check."""
        verdict = verdict_of(report)
        if verdict is not None:
            subject = verdict["where"], verdict["subject"]
            self._subjects.setdefault(subject, []).append(dict(verdict))

    # After all others: some may still fail.
    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Write the file, whole or not at all."""
        from ..contract.running import VERSION

        subjects = [_subject(where, found) for (where, _), found in sorted(self._subjects.items())]
        data = {"version": VERSION, "subjects": subjects}
        if grading := session.config.pluginmanager.get_plugin("attnheat_grading"):
            data["grades"] = [one.as_data() for one in grading.graded]
        text = json.dumps(data, indent=1, allow_nan=False)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        part = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        part.write_text(f"{text}\n", encoding="utf-8")
        part.replace(self._path)


def _subject(where: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    """What `Report.as_dict` says of one subject, and where it was examined."""
    from ..contract.running import report_data

    diagnosed = [verdict["diagnosed"] for verdict in found if "diagnosed" in verdict]
    hints = list(dict.fromkeys(hint for verdict in found for hint in verdict["hints"]))
    found = sorted(found, key=lambda verdict: verdict["number"])  # workers end in any order
    results = [verdict["result"] | {"status": verdict["outcome"]} for verdict in found]
    diagnosis = next(iter(diagnosed), None)
    data = report_data(found[0]["spec"], results, diagnosis, hints, 0, found[0]["left_out"])
    return {"where": where, **data}
