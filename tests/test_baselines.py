"""A marked picture is compared with its baseline, and never passes without."""

import matplotlib
import numpy as np
import pytest
from PIL import Image

PICTURE = """
import numpy as np, pytest
from pytest_attnheat import show_heatmaps

@pytest.mark.heatmap_compare
def test_picture():
    return show_heatmaps(np.eye(6), "Keys", "Queries")
"""
MODES = {
    "without --mpl": [],
    "with --mpl": ["--mpl"],
    "without pytest-mpl": ["-p", "no:pytest_mpl"],
}


@pytest.fixture(params=MODES)
def mode(request):
    return ["-W", "error", *MODES[request.param]]


@pytest.fixture
def generate(pytester):
    """Write baselines for the test files made so far."""
    return lambda *args: pytester.runpytest("--mpl-generate-path=baseline_images", *args)


def test_a_picture_like_its_baseline_passes_and_another_fails(pytester, mode, generate):
    path = pytester.makepyfile(PICTURE)
    generate().assert_outcomes(skipped=1)
    pytester.runpytest(*mode).assert_outcomes(passed=1)
    path.write_text(PICTURE.replace("np.eye(6)", "np.eye(6)[::-1]"))
    pytester.runpytest(*mode).assert_outcomes(failed=1)


@pytest.mark.parametrize("options", [[], ["--mpl"]])
def test_workers_compare_as_one_process_does(pytester, generate, options):
    pytester.makepyfile(test_a=PICTURE, test_b=PICTURE.replace("np.eye(6)", "np.eye(6)[::-1]"))
    generate()
    result = pytester.runpytest("-n", "2", *options)
    result.assert_outcomes(passed=2)
    pytester.makepyfile(test_b=PICTURE)
    result = pytester.runpytest("-n", "2", *options)
    result.assert_outcomes(passed=1, failed=1)


def test_the_failure_says_how_much_where_the_images_are_and_how_to_accept(pytester, generate):
    path = pytester.makepyfile(PICTURE)
    generate()
    path.write_text(PICTURE.replace("np.eye(6)", "np.eye(6)[::-1]"))
    output = pytester.runpytest().stdout
    name = "test_the_failure_says_how_much_where_the_images_are_and_how_to_accept"
    output.fnmatch_lines(
        [
            f"heatmap_compare: the picture differs from its baseline baseline_images/{name}"
            ".test_picture.png: root mean square * of 255, allowed 0.1",
            "  expected *",
            "  actual *",
            "  difference *-failed-diff.png",
            f"  to accept it    pytest --mpl-generate-path=baseline_images '{name}.py::test_pict*",
        ]
    )


def test_a_transposed_head_among_many_fails(pytester, mode, generate):
    source = """
        import numpy as np, pytest
        from pytest_attnheat import show_heatmaps

        @pytest.mark.heatmap_compare
        def test_picture():
            weights = np.random.default_rng(0).dirichlet(np.ones(64), (12, 12, 64))
            BREAK
            return show_heatmaps(weights, "Keys", "Queries", figsize=(11, 11))
    """
    path = pytester.makepyfile(source.replace("BREAK", "pass"))
    generate()
    pytester.runpytest(*mode).assert_outcomes(passed=1)
    broken = "weights[3, 4] = weights[3, 4].T.copy()"
    path.write_text(path.read_text().replace("pass", broken))
    pytester.runpytest(*mode).assert_outcomes(failed=1)


def test_a_missing_baseline_fails_with_the_command_that_makes_it(pytester):
    pytester.makepyfile(test_a=PICTURE)
    result = pytester.runpytest()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "heatmap_compare: there is no baseline baseline_images/test_a.test_picture.png yet",
            "  to keep it      pytest --mpl-generate-path=baseline_images 'test_a.py::test_pic*",
        ]
    )


def test_a_missing_baseline_fails_in_every_mode(pytester, mode):
    pytester.makepyfile(PICTURE)
    pytester.runpytest(*mode).assert_outcomes(failed=1)


def test_a_picture_of_another_size_fails_with_both_sizes(pytester, generate):
    path = pytester.makepyfile(PICTURE)
    generate()
    path.write_text(PICTURE.replace('"Queries")', '"Queries", figsize=(3, 2))'))
    pytester.runpytest().stdout.fnmatch_lines(
        ["heatmap_compare: the picture has 300 x 200 pixels, its baseline 250 x 250"]
    )


@pytest.mark.parametrize(
    ("body", "returned"),
    [("show_heatmaps(np.eye(3), 'k', 'q')", "NoneType"), ("return np.eye(3)", "ndarray")],
)
def test_a_test_that_returns_no_figure_fails_in_every_mode(pytester, mode, body, returned):
    pytester.makepyfile(
        f"""
        import numpy as np, pytest
        from pytest_attnheat import show_heatmaps

        @pytest.mark.heatmap_compare
        def test_picture():
            {body}
        """
    )
    result = pytester.runpytest(*mode)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines([f"*the test returned {returned}*return show_heatmaps(...)*"])


def test_a_failing_test_reports_its_own_error(pytester, mode):
    pytester.makepyfile(PICTURE.replace("return", "raise KeyError('mine')\n    return"))
    result = pytester.runpytest(*mode)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["E * KeyError: 'mine'"])
    result.stdout.no_fnmatch_line("*heatmap_compare:*")


def test_a_skipped_test_is_skipped(pytester, mode):
    pytester.makepyfile(PICTURE.replace("return", "pytest.skip('no')\n    return"))
    pytester.runpytest(*mode).assert_outcomes(skipped=1)


def test_the_users_style_does_not_show(pytester, mode, generate):
    pytester.makepyfile(PICTURE)
    generate()
    pytester.makefile("", matplotlibrc="figure.facecolor: red\nfont.size: 20\nfigure.dpi: 50\n")
    pytester.runpytest_subprocess(*mode).assert_outcomes(passed=1)


DEVICES = """
    import pytest
    from pytest_attnheat import show_heatmaps

    @pytest.mark.parametrize("size", ["a/b", "B[1]", "b[1]"])
    @pytest.mark.heatmap_compare
    def test_picture(attention, size):
        return show_heatmaps(attention.weights, "Keys", "Queries", figsize=(6, 4))
"""


def test_file_names_are_safe_and_unique_and_the_same_for_all_devices(pytester, generate):
    pytester.makepyfile(test_a=DEVICES)
    generate("--attn-device=cpu").assert_outcomes(skipped=12)
    names = sorted(path.name for path in (pytester.path / "baseline_images").iterdir())
    assert len({name.casefold() for name in names}) == 12
    assert not any("cpu" in name for name in names)
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyzB0123456789._-") for name in names)
    pytester.runpytest("--attn-device=cpu").assert_outcomes(passed=12)
    pytester.runpytest("--attn-device=cpu", "--mpl").assert_outcomes(passed=12)


def test_two_tests_of_one_name_in_two_folders_have_two_baselines(pytester, generate):
    for folder in ("one", "two"):
        (pytester.path / folder).mkdir()
        (pytester.path / folder / "__init__.py").touch()
        (pytester.path / folder / "test_a.py").write_text(PICTURE)
    generate()
    names = sorted(path.name for path in (pytester.path / "baseline_images").iterdir())
    assert names == ["one.test_a.test_picture.png", "two.test_a.test_picture.png"]


def test_two_tests_that_share_a_file_are_refused(pytester):
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.heatmap_compare(filename="same.png")
        def test_one(): ...

        @pytest.mark.heatmap_compare(filename="Same.png")
        def test_two(): ...
        """
    )
    result = pytester.runpytest()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*test_two and *test_one share the baseline *ame.png*"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("tolerence=3", "*got tolerence; it accepts * filename, baseline_dir, tolerance"),
        ("'a.png'", "*got 'a.png'; it accepts the keyword arguments*"),
        ("filename='a.jpg'", "*got filename='a.jpg'; a file name ending in .png*"),
        ("filename='a/b.png'", "*without folders*"),
    ],
)
def test_marker_arguments_that_are_not_known_are_refused(pytester, arguments, message):
    pytester.makepyfile(
        PICTURE.replace(
            "@pytest.mark.heatmap_compare", f"@pytest.mark.heatmap_compare({arguments})"
        )
    )
    result = pytester.runpytest()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([message])


def test_the_marker_says_where_the_baseline_lies_and_how_close_it_must_be(pytester, generate):
    marked = '@pytest.mark.heatmap_compare(filename="a.png", baseline_dir="pics", tolerance=200)'
    path = pytester.makepyfile(PICTURE.replace("@pytest.mark.heatmap_compare", marked))
    pytester.runpytest("--mpl-generate-path=pics")
    assert [file.name for file in (pytester.path / "pics").iterdir()] == ["a.png"]
    path.write_text(path.read_text().replace("np.eye(6)", "np.eye(6)[::-1]"))
    pytester.runpytest().assert_outcomes(passed=1)
    pytester.runpytest("--mpl").assert_outcomes(passed=1)


@pytest.mark.parametrize("where", ["option", "ini"])
def test_pytest_mpls_baseline_folder_is_used(pytester, where):
    pytester.makepyfile(PICTURE)
    pytester.runpytest("--mpl-generate-path=elsewhere")
    if where == "ini":
        pytester.makeini("[pytest]\nmpl-baseline-path = elsewhere")
        pytester.runpytest().assert_outcomes(passed=1)
    else:
        pytester.runpytest("--mpl-baseline-path=elsewhere").assert_outcomes(passed=1)


def test_figures_of_matplotlib_itself_are_compared_and_closed(pytester, mode, generate):
    path = pytester.makepyfile(
        """
        import pytest
        from matplotlib import pyplot

        @pytest.mark.heatmap_compare
        def test_plot():
            figure, axes = pyplot.subplots()
            axes.plot([1, 2])
            return figure

        def test_closed():
            assert pyplot.get_fignums() == []
        """
    )
    generate("-k", "plot")
    pytester.runpytest(*mode).assert_outcomes(passed=2)
    path.write_text(path.read_text().replace("[1, 2]", "[2, 1]"))
    pytester.runpytest(*mode).assert_outcomes(passed=1, failed=1)


def test_methods_and_reruns_in_one_session_are_compared(pytester, generate):
    pytester.makepyfile(
        """
        import numpy as np, pytest
        from pytest_attnheat import show_heatmaps

        class TestPictures:
            @pytest.mark.heatmap_compare
            def test_one(self):
                return show_heatmaps(np.eye(4), "Keys", "Queries")
        """
    )
    pytester.makeconftest(
        """
        from _pytest.runner import runtestprotocol

        def pytest_runtest_protocol(item, nextitem):
            runtestprotocol(item, nextitem=nextitem, log=False)  # as rerun plugins do
        """
    )
    generate()
    for options in ([], ["--mpl"]):
        pytester.runpytest(*options).assert_outcomes(passed=1)


def test_plain_mpl_image_compare_sees_our_figures(pytester):
    path = pytester.makepyfile(
        PICTURE.replace("heatmap_compare", "mpl_image_compare(style='default', tolerance=0.1)")
    )
    pytester.runpytest("--mpl-generate-path=baseline_images")
    options = ["--mpl", "--mpl-baseline-path=baseline_images"]
    pytester.runpytest(*options).assert_outcomes(passed=1)
    path.write_text(path.read_text().replace("np.eye(6)", "np.eye(6)[::-1]"))
    pytester.runpytest(*options).assert_outcomes(failed=1)


def test_the_baseline_shows_what_the_test_draws(pytester, generate):
    pytester.makepyfile(test_a=PICTURE)
    generate()
    with Image.open(pytester.path / "baseline_images/test_a.test_picture.png") as image:
        assert image.size == (250, 250)
        assert "Software" not in image.info
        darkest = matplotlib.colormaps["Reds"](1.0, bytes=True)[:3]
        assert (np.asarray(image.convert("RGB")) == darkest).all(-1).sum() > 6 * 100


def test_markers_are_documented(pytester):
    pytester.runpytest("--markers").stdout.fnmatch_lines(
        ["@pytest.mark.heatmap_compare(filename=*"]
    )
