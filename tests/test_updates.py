"""The life of a baseline: missing, added, equal, changed, updated, unused."""

import base64
import shlex
import subprocess
import textwrap

import numpy as np
import pytest
from PIL import Image

from pytest_attnheat import read_heatmaps
from pytest_attnheat.plugin import summary

PICTURES = """
    import numpy as np, pytest
    from pytest_attnheat import show_heatmaps

    @pytest.mark.parametrize("size", [3, 4])
    @pytest.mark.heatmap_compare
    def test_many(size):
        return show_heatmaps(np.eye(size), "Keys", "Queries")

    @pytest.mark.heatmap_compare(filename="one.svg")
    def test_one():
        return show_heatmaps(np.eye(5), "Keys", "Queries")
"""
SEVERAL = """
    import numpy as np, torch
    from pytest_attnheat import show_heatmaps

    def test_layers(heatmap_regression):
        for layer in range(2):
            heatmap_regression.check(torch.eye(4 + layer), f"layer {layer}")
        heatmap_regression.check(show_heatmaps(np.eye(3), "k", "q"), "figure")
"""
NAMES = ["one.svg", "test_a.test_many-3.png", "test_a.test_many-4.png"]


@pytest.fixture
def project(pytester):
    """A project of three pictures with their baselines."""
    pytester.makepyfile(test_a=PICTURES)
    pytester.runpytest("--attn-update=missing").assert_outcomes(passed=3)
    return pytester.path / "baseline_images"


def change(pytester, old="np.eye(5)", new="np.eye(5) / 2"):
    path = pytester.path / "test_a.py"
    path.write_text(path.read_text().replace(old, new))


def states(folder):
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


def test_missing_baselines_are_written_and_listed(pytester):
    pytester.makepyfile(test_a=PICTURES)
    result = pytester.runpytest("--attn-update=missing")
    result.assert_outcomes(passed=3)
    result.stdout.fnmatch_lines_random([f"wrote baseline_images/{name} (new)" for name in NAMES])
    assert sorted(path.name for path in (pytester.path / "baseline_images").iterdir()) == NAMES
    assert read_heatmaps(pytester.path / "baseline_images/one.svg").shape == (1, 1, 5, 5)


def test_equal_pictures_pass_and_are_counted(project, pytester):
    result = pytester.runpytest()
    result.assert_outcomes(passed=3)
    result.stdout.fnmatch_lines(["3 compared as data, 3 as pixels"])


@pytest.mark.parametrize("update", ["missing", "changed", "all"])
def test_baselines_that_agree_are_not_touched(project, pytester, update):
    before = states(project)
    result = pytester.runpytest(f"--attn-update={update}")
    result.assert_outcomes(passed=3)
    result.stdout.no_fnmatch_line("wrote *")
    assert states(project) == before


def test_a_changed_picture_fails_and_touches_nothing(project, pytester):
    before = states(project)
    change(pytester)
    pytester.runpytest().assert_outcomes(passed=2, failed=1)
    pytester.runpytest("--attn-update=missing").assert_outcomes(passed=2, failed=1)
    assert states(project) == before


def test_only_changed_baselines_are_updated(project, pytester):
    before = states(project)
    change(pytester)
    result = pytester.runpytest("--attn-update=changed")
    result.assert_outcomes(passed=3)
    result.stdout.fnmatch_lines(["wrote baseline_images/one.svg (5 of 25 cells differ)"])
    after = states(project)
    assert {name for name in after if after[name] != before[name]} == {"one.svg"}
    pytester.runpytest().assert_outcomes(passed=3)


def test_a_changed_drawing_of_the_same_data_is_updated(project, pytester):
    change(pytester, '"Queries")', '"Queries", cmap="Blues")')
    pytester.runpytest().assert_outcomes(failed=3)
    pytester.runpytest("--attn-update=changed").assert_outcomes(passed=3)
    pytester.runpytest().assert_outcomes(passed=3)


def test_text_of_another_matplotlib_passes_is_counted_and_refreshed_on_request(project, pytester):
    pytester.makeconftest(
        """
        import matplotlib, pytest

        @pytest.fixture(autouse=True)
        def other_text(monkeypatch):
            from pytest_attnheat.heatmaps import record, writing
            Text = writing.Text
            monkeypatch.setattr(record.matplotlib, "__version__", "3.99.0")
            monkeypatch.setattr(
                writing, "Text", lambda *a, **k: Text(*a, **{**k, "fontstyle": "italic"})
            )
        """
    )
    before = states(project)
    result = pytester.runpytest()
    result.assert_outcomes(passed=3)
    result.stdout.fnmatch_lines(
        ["3 passed with other text, drawn by matplotlib 3.*; to refresh them: pytest --attn-upd*"]
    )
    pytester.runpytest("--attn-update=changed").assert_outcomes(passed=3)
    assert states(project) == before
    pytester.runpytest("--attn-update=all").stdout.fnmatch_lines(["wrote *one.svg (text)"])
    assert states(project) != before


def test_unused_baselines_are_listed_and_kept(project, pytester):
    (project / "old.png").write_bytes(b"")
    result = pytester.runpytest("--attn-unused", "-k", "many")
    result.stdout.fnmatch_lines(["unused baseline_images/old.png"])
    result.stdout.no_fnmatch_line("unused *one.svg")
    assert (project / "old.png").exists()


def test_two_workers_do_all_this_as_one_process_does(pytester):
    """The life of baselines in as few runs as can be: workers are slow to start."""
    # Two share the work; one alone is enough to see that what it finds reaches the summary.
    light = ("-p", "no:hypothesispytest")
    two, workers = ("-n", "2", *light), ("-n", "1", *light)
    several = SEVERAL.replace(", torch", "").replace("torch", "np")
    pytester.makepyfile(test_a=PICTURES + several)
    result = pytester.runpytest("--attn-update=missing", *two)
    result.assert_outcomes(passed=4)
    result.stdout.fnmatch_lines_random([f"wrote baseline_images/{name} (new)" for name in NAMES])
    folder = pytester.path / "baseline_images"
    assert len(list(folder.iterdir())) == 6
    (folder / "old.png").write_bytes(b"")
    before = states(folder)

    result = pytester.runpytest("--attn-update=all", "--attn-unused", *workers)
    result.assert_outcomes(passed=4)
    result.stdout.fnmatch_lines(["6 compared as data, 6 as pixels"])
    result.stdout.fnmatch_lines(["unused baseline_images/old.png"])
    assert result.stdout.str().count("unused ") == 1
    result.stdout.no_fnmatch_line("wrote *")
    assert states(folder) == before

    change(pytester)
    change(pytester, "np.eye(4 + layer)", "np.eye(4 + layer) / (1 + layer)")
    change(pytester, "return show_heatmaps(np.eye(size)", "return undefined(np.eye(size)")
    result = pytester.runpytest("--attn-update=missing", "--attn-artifacts=elsewhere", *workers)
    result.assert_outcomes(failed=4)
    result.stdout.fnmatch_lines(["heatmap_regression: the data differ *layer_1*: 5 of 25 cells *"])
    result.stdout.fnmatch_lines(["WARNING: 2 heatmap_compare tests compared nothing"])
    assert (pytester.path / "elsewhere/test_a.test_one.one/difference.png").exists()
    assert not (pytester.path / "attn-artifacts").exists()
    assert states(folder) == before

    result = pytester.runpytest("--attn-update=changed", *workers)
    result.assert_outcomes(passed=2, failed=2)
    result.stdout.fnmatch_lines(["wrote baseline_images/one.svg (5 of 25 cells differ)"])
    after = states(folder)
    first, second = sorted(name for name in after if after[name] != before[name])
    assert first == "one.svg"
    assert second.startswith("test_a.test_layers.layer_1-")


def test_last_failed_and_selected_runs_compare_what_they_run(project, pytester):
    change(pytester)
    pytester.runpytest().assert_outcomes(passed=2, failed=1)
    pytester.runpytest("--lf").assert_outcomes(failed=1)
    pytester.runpytest("-k", "many").assert_outcomes(passed=2, deselected=1)


def test_a_folder_that_cannot_be_written_fails_with_the_reason(pytester):
    pytester.makepyfile(test_a=PICTURES)
    (pytester.path / "baseline_images").write_text("a file is in the way")
    result = pytester.runpytest("--attn-update=missing")
    result.assert_outcomes(failed=3)
    result.stdout.fnmatch_lines(["heatmap_compare: *baseline_images/one.svg cannot be written: *"])


def test_a_damaged_baseline_fails_with_the_command_that_mends_it(project, pytester):
    (project / "one.svg").write_bytes(b"<?xml damaged")
    (project / "test_a.test_many-3.png").write_bytes(b"")
    result = pytester.runpytest()
    result.assert_outcomes(passed=1, failed=2)
    result.stdout.fnmatch_lines(
        [
            "heatmap_compare: the baseline baseline_images/test_a.test_many-3.png cannot be read*",
            "  to accept it    pytest --attn-update=all 'test_a.py::test_many[[]3]'",
        ]
    )
    pytester.runpytest("--attn-update=all").assert_outcomes(passed=3)
    pytester.runpytest().assert_outcomes(passed=3)


def test_a_test_that_fails_by_itself_is_said_to_have_compared_nothing(project, pytester):
    change(pytester, "return show_heatmaps(np.eye(5)", "return undefined(np.eye(5)")
    result = pytester.runpytest()
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(["WARNING: 1 heatmap_compare tests compared nothing"])


@pytest.mark.parametrize("how", ["option", "ini"])
def test_failures_leave_their_pictures_where_they_were_asked_to(project, pytester, how):
    change(pytester)
    if how == "ini":
        pytester.makeini("[pytest]\nattn_artifacts = elsewhere")
    pytester.runpytest(*(["--attn-artifacts=elsewhere"] if how == "option" else []))
    left = sorted(path.name for path in (pytester.path / "elsewhere/test_a.test_one.one").iterdir())
    assert left == ["actual.svg", "difference.png", "expected.svg"]
    assert not (pytester.path / "attn-artifacts").exists()


def test_passing_tests_leave_nothing(project, pytester):
    pytester.runpytest().assert_outcomes(passed=3)
    assert not (pytester.path / "attn-artifacts").exists()


def test_commands_fit_the_folder_that_pytest_was_started_in(pytester, monkeypatch):
    pytester.makeini("[pytest]")
    inner = pytester.mkdir("inner")
    pytester.makepyfile(**{"inner/test_a": PICTURES})
    monkeypatch.chdir(inner)
    result = pytester.runpytest()
    result.stdout.fnmatch_lines(
        [
            "heatmap_compare: there is no baseline ../baseline_images/one.svg yet",
            "  to keep it      pytest --attn-update=missing 'test_a.py::test_one'",
        ]
    )
    pytester.runpytest("--attn-update=missing", "test_a.py::test_one").assert_outcomes(passed=1)
    pytester.runpytest("test_a.py::test_one").assert_outcomes(passed=1)


def test_pytest_html_shows_the_pictures_of_a_failure(project, pytester):
    pytest.importorskip("pytest_html")
    change(pytester, "np.eye(size)", "np.eye(size) / 2")
    pytester.runpytest("--html=report.html", "--self-contained-html").assert_outcomes(
        passed=1, failed=2
    )
    left = pytester.path / "attn-artifacts/test_a.test_many-3/difference.png"
    shown = base64.b64encode(left.read_bytes()).decode()
    assert shown in (pytester.path / "report.html").read_text()


def test_several_pictures_of_one_test_are_compared_by_name(pytester):
    pytester.makepyfile(test_a=SEVERAL)
    result = pytester.runpytest()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["heatmap_regression: there is no baseline *"])
    pytester.runpytest("--attn-update=missing").assert_outcomes(passed=1)
    assert len(list((pytester.path / "baseline_images").iterdir())) == 3
    result = pytester.runpytest("--attn-unused")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["3 compared as data, 3 as pixels"])
    result.stdout.no_fnmatch_line("unused *")
    change(pytester, "torch.eye(4 + layer)", "torch.eye(4 + layer) / (1 + layer)")
    result = pytester.runpytest()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["heatmap_regression: the data differ *layer_1*: 5 of 25 cells *"])


def test_a_used_baseline_is_not_listed_as_unused_where_a_folder_has_brackets(pytester, monkeypatch):
    root = pytester.mkdir("a[b]c")
    (root / "pytest.ini").write_text("[pytest]", encoding="utf-8")
    (root / "test_a.py").write_text(textwrap.dedent(SEVERAL), encoding="utf-8")
    monkeypatch.chdir(root)
    pytester.runpytest("test_a.py", "--attn-update=missing").assert_outcomes(passed=1)
    result = pytester.runpytest("test_a.py", "--attn-unused")
    result.assert_outcomes(passed=1)
    result.stdout.no_fnmatch_line("unused *")
    (root / "baseline_images/test_b.old.png").write_bytes(b"")
    result = pytester.runpytest("test_a.py", "--attn-unused")
    result.stdout.fnmatch_lines("unused *test_b.old.png")


def test_a_path_that_no_relative_one_leads_to_is_shown_whole(pytester, monkeypatch):
    def elsewhere(path, start):
        raise ValueError("path is on mount 'C:', start on mount 'D:'")

    config = pytester.parseconfig()
    monkeypatch.setattr("os.path.relpath", elsewhere)
    path = config.rootpath / "baseline_images/test_a.png"
    assert summary.shown(config, path) == str(path)


@pytest.mark.parametrize(
    ("system", "expected"),
    [
        ("posix", "'test_a.py::test[it'\\''s \"$x\" & y]'"),
        ("nt", '"test_a.py::test[it\'s \\"$x\\" & y]"'),
    ],
)
def test_a_command_is_quoted_as_the_shell_of_the_system_does(monkeypatch, system, expected):
    argument = 'test_a.py::test[it\'s "$x" & y]'
    with monkeypatch.context() as patched:
        patched.setattr("os.name", system)
        quoted = summary.quoted(argument)
    assert quoted == expected
    if system == "posix":
        assert shlex.split(quoted) == [argument]
    else:
        assert subprocess.list2cmdline([argument]) == quoted  # as programs of Windows read it


def test_weights_are_drawn_with_the_arguments_of_show_heatmaps_and_one_needs_no_name(pytester):
    pytester.makepyfile(
        test_a="""
        import torch
        from pytest_attnheat import show_heatmaps

        def test_it(heatmap_regression):
            mask, titles = torch.ones(3, 3).tril().bool(), ["a head"]
            options = dict(mask=mask, titles=titles, cmap="Blues", xlabel=None, figsize=(3, 2))
            heatmap_regression.check([[1, 0, 0], [0.5, 0.5, 0], [0, 0, 1]], **options)
            figure = show_heatmaps(torch.eye(3), None, "Queries")
            for given, options in ((figure, {"mask": mask}), (torch.eye(3), {"masks": mask})):
                try:
                    heatmap_regression.check(given, "refused", **options)
                except TypeError as error:
                    print(error)
        """
    )
    result = pytester.runpytest("--attn-update=missing", "-s")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["*options: got mask beside a figure; accepted is none*"])
    result.stdout.fnmatch_lines(["*show_heatmaps() got an unexpected keyword argument 'masks'*"])
    (baseline,) = (pytester.path / "baseline_images").iterdir()
    assert baseline.name == "test_a.test_it.png"
    data = read_heatmaps(baseline)
    assert data.labels["titles"] == ["a head"]
    assert data.labels["xlabel"] is None
    assert data.masked[0, 0].tolist() == np.triu(np.ones((3, 3), bool), 1).tolist()
    with Image.open(baseline) as image:
        assert image.size == (300, 200)


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (["'figure'", "'figure'"], "(taken: 'figure')"),
        (["'figure'", "'Figure'"], "(taken: 'figure')"),
        (["''", "''"], "(taken: '')"),
        (["3"], "(taken: none)"),
    ],
)
def test_a_name_that_is_taken_is_refused(pytester, names, taken):
    checks = "; ".join(f"heatmap_regression.check(torch.eye(3), {name})" for name in names)
    pytester.makepyfile(f"import torch\n\ndef test_it(heatmap_regression): {checks}")
    result = pytester.runpytest("--attn-update=missing")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [f"E *ValueError: name: got *; accepted is a name of its own for each *{taken}"]
    )


def test_the_baseline_of_the_marker_is_not_that_of_the_fixture(pytester):
    pytester.makepyfile(
        """
        import pytest, torch
        from pytest_attnheat import show_heatmaps

        @pytest.mark.heatmap_compare
        def test_it(heatmap_regression):
            heatmap_regression.check(torch.eye(3))
            return show_heatmaps(torch.ones(2, 2), "Keys", "Queries")
        """
    )
    result = pytester.runpytest("--attn-update=all")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["E *ValueError: name: got '', the baseline of the marker; *"])


@pytest.mark.parametrize("tolerance", ["float('inf')", "float('nan')", "-1", "'x'"])
def test_a_tolerance_that_is_none_is_refused(pytester, tolerance):
    pytester.makepyfile(
        f"""
        import torch

        def test_it(heatmap_regression):
            heatmap_regression.check(torch.eye(3), "a", tolerance={tolerance})
        """
    )
    result = pytester.runpytest("--attn-update=missing")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["E *ValueError: tolerance: got *; accepted is a number from 0"])


def test_two_tests_whose_several_pictures_would_share_names_fail_both(pytester):
    for folder in ("tests", "test"):
        path = pytester.mkdir(folder) / "test_same.py"
        path.write_text(
            "import torch\ndef test_x(heatmap_regression):\n"
            "    heatmap_regression.check(torch.eye(4), 'n')\n"
        )
    result = pytester.runpytest("--import-mode=importlib", "--attn-update=missing")
    result.assert_outcomes(errors=2)
    result.stdout.fnmatch_lines(["heatmap_regression: test/* and tests/* share baselines"])


def test_a_figure_made_in_a_fixture_has_the_same_style(pytester):
    pytester.makepyfile(
        test_a="""
        import numpy as np, pytest
        from pytest_attnheat import show_heatmaps

        @pytest.fixture
        def figure():
            return show_heatmaps(np.eye(4), "Keys", "Queries")

        @pytest.mark.heatmap_compare
        def test_it(figure):
            return figure
        """
    )
    pytester.runpytest("--attn-update=missing").assert_outcomes(passed=1)
    pytester.makefile("", matplotlibrc="figure.dpi: 160\nfont.size: 20\nsavefig.bbox: tight\n")
    for options in ([], ["--mpl"]):
        light = ("-p", "no:hypothesispytest")
        pytester.runpytest_subprocess(*options, *light).assert_outcomes(passed=1)


def test_svg_pictures_are_compared_under_mpl_too(project, pytester):
    pytester.runpytest("--mpl").assert_outcomes(passed=3)
    change(pytester)
    pytester.runpytest("--mpl").assert_outcomes(passed=2, failed=1)
