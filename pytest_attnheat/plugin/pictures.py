"""Pictures held against baselines in pytest: `heatmap_compare`, and what compares for fixtures.

A marked test never passes without a comparison, with or without `--mpl`. The comparison is that of
`baselines.judging`; under `--mpl` pytest-mpl repeats it for its own reports.
"""

from __future__ import annotations

import functools
import inspect
import sys
import tempfile
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from .naming import Expected, default_folder, expected_of, parts_for_all_devices, safe_name, stem_of
from .settings import SETTINGS, path_of
from .summary import OUTCOMES, USED, Outcome, add_to_html, quoted, shown

if TYPE_CHECKING:
    from ..baselines.judging import Verdict

# What makes pytest-mpl's own comparison, made for its reports, agree with the verdict.
_MPL_PASSES, _MPL_FAILS = 256.0, -1.0

# The picture of an assertion.
_ROWS = "rows.png"
# A string says why the test cannot be compared.
EXPECTED = pytest.StashKey["Expected | str"]()
# Baselines that tests of this run wrote.
_WRITTEN = pytest.StashKey[set[Path]]()
# Which tests use a fixture, by the beginning of their baselines' names.
STEMS = pytest.StashKey[dict[str, set[str]]]()


def find_baselines(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give every marked test its baseline, and hand it to pytest-mpl."""
    # A test with a wrong marker fails when it runs: an error here would end a run on workers
    # without saying why.
    tests_of: dict[str, list[tuple[pytest.Item, Expected]]] = {}
    stems: dict[str, set[str]] = {}
    config.stash[STEMS] = stems
    config.stash[_WRITTEN] = set()
    for item in items:
        if {"heatmap_regression", "attention_regression"} & set(getattr(item, "fixturenames", ())):
            # Which names it will check is not known before it runs.
            stem = str(config.rootpath / default_folder(item) / stem_of(item))
            config.stash[USED].add(f"{stem}.*")
            stems.setdefault(stem.casefold(), set()).add("::".join(parts_for_all_devices(item)))
        marker = item.get_closest_marker("heatmap_compare")
        if marker is not None:
            expected = item.stash[EXPECTED] = _read(item, marker)
            if isinstance(expected, Expected):
                # Some file systems tell upper from lower case and some do not.
                same = tests_of.setdefault(str(expected.path).casefold(), [])
                same.append((item, expected))
    for sharers in tests_of.values():
        _settle(sharers)


def _read(item: pytest.Item, marker: pytest.Mark) -> Expected | str:
    if not isinstance(item, pytest.Function):
        return f"a test of type {type(item).__name__} returns no figure"
    if inspect.iscoroutinefunction(item.obj):
        return "an async test returns its figure to the event loop; compare in one that is not"
    try:
        return expected_of(item, marker)
    except ValueError as error:
        return str(error)


def _settle(sharers: list[tuple[pytest.Item, Expected]]) -> None:
    """Let tests share a baseline that differ by their device alone, or that all say so."""
    names = sorted({"::".join(parts_for_all_devices(item)) for item, _ in sharers})
    for item, expected in sharers:
        item.config.stash[USED].add(str(expected.path))
        if len(names) > 1 and not all(other.share for _, other in sharers):
            item.stash[EXPECTED] = (
                f"{' and '.join(names)} share the baseline {expected.path.name}; give one of them "
                "another filename=, or share=True to all of them"
            )
        else:
            _hand_to_mpl(item, expected)


def _hand_to_mpl(item: pytest.Item, expected: Expected) -> None:
    """Mark a test for pytest-mpl, unless that would look for the baseline under another name."""
    config = item.config
    # It skips what matplotlib cannot convert.
    if not config.pluginmanager.hasplugin("pytest_mpl") or expected.path.suffix != ".png":
        return
    if config.getoption("--mpl-use-full-test-name") or config.getini("mpl-use-full-test-name"):
        return
    item.add_marker(pytest.mark.mpl_image_compare(
        style="default", backend="agg", deterministic=True, filename=expected.path.name,
        baseline_dir=str(expected.path.parent), savefig_kwargs={"format": "png"},
    ))  # fmt: skip


def _mpl_option(item: pytest.Item, *names: str) -> bool:
    """Tell whether pytest-mpl takes part in a test, by one of its options."""
    if item.get_closest_marker("mpl_image_compare") is None:
        return False
    return any(item.config.getoption(name) for name in names)


def baseline_style() -> AbstractContextManager[None]:
    """The style of all baselines, as with pytest-mpl: the user's own must not show in them."""
    from matplotlib import style

    return style.context("default", after_reset=True)


def style_of(item: pytest.Item) -> AbstractContextManager[None]:
    """The style in which a test and its fixtures run."""
    return nullcontext() if item.stash.get(EXPECTED, None) is None else baseline_style()


def compare_returned(item: pytest.Item) -> Generator[None, Any, Any]:
    """Run a test, and compare the figure that it returns with its baseline."""
    marker = item.get_closest_marker("heatmap_compare")
    if marker is None:
        result = yield
        if item.get_closest_marker("heatmap_compare") is not None:
            _fail("the marker came while the test ran, so nothing was compared")
        return result
    expected = item.stash.get(EXPECTED, None) or _read(item, marker)
    if isinstance(expected, str):
        _fail(f"{item.nodeid}: {expected}")
    return (yield from _run(cast("pytest.Function", item), cast("Expected", expected)))


def leave_heatmap(
    item: pytest.Item, call: pytest.CallInfo[None], report: pytest.TestReport
) -> None:
    """Leave the picture of a failure that can draw one, and say where."""
    if call.when == "call" and report.passed and _artifacts(item.config).is_dir():
        _clear(_left_in(item), _ROWS)
    if not report.failed or call.excinfo is None:
        return
    from ..failure import Failure

    error = call.excinfo.value
    if not isinstance(error, Failure) or error.draw is None:
        return
    from ..baselines import judging

    path = _left_in(item) / _ROWS
    try:
        drawn = error.draw()
        _make_artifacts(item.config)
        judging.save(drawn, path)
    except Exception as reason:  # the message must not be lost with its picture
        said = str(reason) or type(reason).__name__
        report.sections.append((error.drawn, f"not drawn: {said}"))
        return
    report.sections.append((error.drawn, str(path)))
    add_to_html(item.config, report, [("rows", str(path))])


def _run(item: pytest.Function, expected: Expected) -> Generator[None, Any, Any]:
    if _mpl_option(item, "--mpl-generate-path", "--mpl-generate-hash-library"):
        return (yield from _caught(item, lambda figure: figure))
    failures: list[str] = []
    by_mpl = _mpl_option(item, "--mpl")

    def judge(figure: Any) -> Any:
        message = compare_figure(item, figure, expected, "heatmap_compare")
        failures.extend([message] if message else [])
        if by_mpl:
            marker = item.get_closest_marker("mpl_image_compare")
            arguments = cast("dict[str, Any]", marker.kwargs if marker else {})
            arguments["tolerance"] = _MPL_FAILS if failures else _MPL_PASSES
            if failures and _hides_its_change(item, figure, expected):
                pytest.fail(failures[0], pytrace=False)
        # pytest warns of a value that nobody takes.
        return figure if by_mpl else None

    try:
        if by_mpl:
            return (yield from _caught(item, judge))
        with baseline_style():
            return (yield from _caught(item, judge))
    except pytest.fail.Exception:  # pytest-mpl's, which knows the pixels alone: the report has it
        if not failures:
            raise
    finally:
        if failures:
            pytest.fail(failures[0], pytrace=False)


def _hides_its_change(item: pytest.Item, figure: Any, expected: Expected) -> bool:
    """Tell whether pytest-mpl would call a changed picture equal, as no pixel shows the change."""
    from ..baselines.judging import looks_alike

    return item.stash[OUTCOMES][-1].status == "data" and looks_alike(figure, expected.path)


def _caught(item: pytest.Function, take: Callable[[Any], Any]) -> Generator[None, Any, Any]:
    """Run a test whose figure is given to `take`, and that returns what `take` returns."""
    function, name = item.obj, item.name
    figures: list[Any] = []

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        figures.append(_figure(function(*args, **kwargs)))
        return take(figures[-1])

    item.obj = wrapper
    if "/" in name:
        # pytest-mpl makes a folder of the name, and fails on slashes in parameters.
        item.name = safe_name(name)
    try:
        result = yield
    finally:
        item.obj, item.name = function, name
        if pyplot := sys.modules.get("matplotlib.pyplot"):
            for figure in figures:
                pyplot.close(figure)
    if not figures:
        _fail("the test did not run, so nothing was compared")
    return result


def _figure(returned: Any) -> Any:
    from matplotlib.figure import Figure

    if not isinstance(returned, Figure):
        what = "None" if returned is None else type(returned).__name__
        _fail(
            f"the test returned {what}, so there is nothing to compare; "
            "accepted is the figure: return show_heatmaps(...)"
        )
    return returned


def _fail(reason: str) -> None:
    pytest.fail(f"heatmap_compare: {reason}", pytrace=False)


def compare_figure(item: pytest.Item, figure: Any, expected: Expected, caller: str) -> str | None:
    """Compare a figure with its baseline, or write it; return a message if the test fails."""
    from ..baselines import judging

    return compare(item, functools.partial(judging.check, figure), expected, caller)


def compare(
    item: pytest.Item, check: Callable[..., Verdict], expected: Expected, caller: str
) -> str | None:
    """Compare what `check` leaves as `actual` in a folder, or write it as the baseline."""
    from ..baselines import judging

    with tempfile.TemporaryDirectory(prefix="attnheat-") as work:
        allowed = expected.tolerance, expected.precision
        verdict, unkept = check(expected.path, Path(work), *allowed), ""
        if _is_to_write(item, expected, verdict):
            actual = Path(work) / f"actual{expected.path.suffix}"
            try:
                judging.write(actual.read_bytes(), expected.path)
            except OSError as error:
                return f"{caller}: {expected.path} cannot be written: {error}"
            item.config.stash[_WRITTEN].add(expected.path)
            _note(item, expected, verdict, "written")
            return None
        kept: dict[str, Path] = {}
        folder = _left_in(item, expected)
        if verdict.passed:
            _clear(folder, "expected.*", "actual.*", "difference.*")
        else:
            try:
                _make_artifacts(item.config)
                kept = judging.keep(verdict, folder)
            except OSError as error:
                unkept = f"pictures        not written: {error}"
    _note(item, expected, verdict, verdict.status, kept)
    if verdict.passed:
        return None
    return f"{caller}: {_message(item, expected, verdict, kept, unkept)}"


def _is_to_write(item: pytest.Item, expected: Expected, verdict: Verdict) -> bool:
    update = item.config.stash[SETTINGS].update
    # What another test wrote in this run is shared, and must be what this one draws.
    if not update or verdict.status == "equal" or expected.path in item.config.stash[_WRITTEN]:
        return False
    statuses = {"missing": ("missing",), "changed": ("missing", "data", "panels", "pixels")}
    return update == "all" or verdict.status in statuses[update]


def _left_in(item: pytest.Item, expected: Expected | None = None) -> Path:
    """The folder of what a test leaves when it fails, or one of its comparisons."""
    name = stem_of(item, device=True)
    if expected is not None:  # what is named after the test is not named twice
        usual, stem = stem_of(item), expected.path.stem
        name += stem.removeprefix(usual) if stem.startswith(usual) else f".{stem}"
    return _artifacts(item.config) / name


def _make_artifacts(config: pytest.Config) -> None:
    """Make the folder of all that is left, which no version control shall see."""
    root = _artifacts(config)
    if not root.exists():
        root.mkdir(parents=True)
        (root / ".gitignore").write_text("*\n", "ascii")


def _clear(folder: Path, *patterns: str) -> None:
    """Remove what a test that passes now left when it failed."""
    for path in [path for pattern in patterns for path in folder.glob(pattern)]:
        path.unlink(missing_ok=True)
    with suppress(OSError):  # it may be absent, or have files of others
        folder.rmdir()


def _artifacts(config: pytest.Config) -> Path:
    name = "attn_artifacts"
    return path_of(config, name, config.getoption(name) or config.getini(name))


def _message(
    item: pytest.Item, expected: Expected, verdict: Verdict, kept: dict[str, Path], unkept: str
) -> str:
    baseline = shown(item.config, expected.path)
    what = {
        "missing": f"there is no baseline {baseline} yet",
        "unreadable": f"the baseline {baseline} cannot be read: {verdict.reason}",
        "data": f"the data differ from the baseline {baseline}: {verdict.reason}",
    }.get(verdict.status, f"the picture differs from its baseline {baseline}: {verdict.reason}")
    update = {"missing": "missing", "unreadable": "all"}.get(verdict.status, "changed")
    verb = "to keep it" if verdict.status == "missing" else "to accept it"
    lines = [what, *verdict.details]
    lines += [unkept] if unkept else [f"{name:<15} {path}" for name, path in kept.items()]
    lines.append(f"{verb:<15} pytest --attn-update={update} {quoted(_argument(item))}")
    return "\n  ".join(lines)


def _argument(item: pytest.Item) -> str:
    """Return what one would type there to run a test; node ids begin at the root folder."""
    file, _, rest = item.nodeid.partition("::")
    return f"{shown(item.config, item.config.rootpath / file)}::{rest}"


def _note(
    item: pytest.Item,
    expected: Expected,
    verdict: Verdict,
    status: str,
    kept: dict[str, Path] | None = None,
) -> None:
    item.stash.setdefault(OUTCOMES, []).append(Outcome(
        baseline=shown(item.config, expected.path), status=status, compared=verdict.compared,
        drawn_by=verdict.drawn_by,
        reason=verdict.reason or ("new" if verdict.status == "missing" else verdict.status),
        pictures=tuple((name, str(path)) for name, path in (kept or {}).items()),
    ))  # fmt: skip
