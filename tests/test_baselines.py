"""A marked picture is compared with its baseline, and never passes without."""

import json
import os

import matplotlib
import numpy as np
import pytest
from PIL import Image

from pytest_attnheat.attention.scoring import scoring_names

PICTURE = """
import numpy as np, pytest
from pytest_attnheat import show_heatmaps

@pytest.mark.heatmap_compare
def test_picture():
    return show_heatmaps(np.eye(6), "Keys", "Queries")
"""
# Another process need not import Hypothesis, a second long.
LIGHT = ("-p", "no:hypothesispytest")
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


def test_workers_compare_as_one_process_does(pytester, generate):
    pytester.makepyfile(test_a=PICTURE, test_b=PICTURE.replace("np.eye(6)", "np.eye(6)[::-1]"))
    generate()
    pytester.makepyfile(test_b=PICTURE)
    # Without --mpl, test_updates.py has workers compare, two of them; one is as far away as two.
    result = pytester.runpytest("-n", "1", "--mpl", *LIGHT)
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["FAILED test_b.py::test_picture *"])


def test_what_a_failure_left_is_removed_when_its_test_passes_again(pytester, generate):
    one = PICTURE[PICTURE.index("@pytest") :]
    both = PICTURE + one.replace("test_picture", "test_other")
    path = pytester.makepyfile(test_a=both)
    generate()
    path.write_text(both.replace("np.eye(6)", "np.eye(6) * 0.5"))
    pytester.runpytest().assert_outcomes(failed=2)
    left = pytester.path / "attn-artifacts"
    assert (left / ".gitignore").read_text() == "*\n"
    (left / "test_a.test_other" / "notes.txt").write_text("mine")
    assert len(list(left.rglob("*.png"))) == 6
    path.write_text(both)
    pytester.runpytest("-k", "picture").assert_outcomes(passed=1, deselected=1)
    assert {file.parent.name for file in left.rglob("*.png")} == {"test_a.test_other"}
    pytester.runpytest().assert_outcomes(passed=2)
    files = {file.name for file in left.rglob("*.*") if file.is_file()}
    assert files == {".gitignore", "notes.txt"}


def test_a_folder_that_a_user_made_gets_no_gitignore(pytester, generate):
    path = pytester.makepyfile(test_a=PICTURE)
    generate()
    path.write_text(PICTURE.replace("np.eye(6)", "np.eye(6) * 0.5"))
    own = pytester.mkdir("own")
    pytester.runpytest("--attn-artifacts=own").assert_outcomes(failed=1)
    assert [file.name for file in own.iterdir()] == ["test_a.test_picture"]


def test_the_failure_says_what_differs_where_the_pictures_are_and_how_to_accept(pytester, generate):
    path = pytester.makepyfile(test_a=PICTURE)
    generate()
    path.write_text(PICTURE.replace("np.eye(6)", "np.eye(6) * 0.5"))
    output = pytester.runpytest().stdout
    kept = pytester.path / "attn-artifacts" / "test_a.test_picture"
    output.fnmatch_lines(
        [
            "heatmap_compare: the data differ from the baseline "
            "baseline_images/test_a.test_picture.png: 6 of 36 cells differ",
            "  worst           panel [[]0, 0], query 0, key 0: expected 1, got 0.5 (allowed *e-05)",
            "  panels          [[]0, 0] of 1 x 1",
            "  relation        every value is multiplied by 0.5",
            "  expected    keys 0..5",
            "    q0  █▁▁▁▁▁  1.000  <-",
            "  actual    keys 0..5",
            "    q0  ▅▁▁▁▁▁  0.500  <-",
            f"  expected        {kept}/expected.png",
            f"  actual          {kept}/actual.png",
            f"  difference      {kept}/difference.png",
            "  to accept it    pytest --attn-update=changed 'test_a.py::test_picture'",
        ]
    )
    assert sorted(file.name for file in kept.iterdir()) == [
        "actual.png",
        "difference.png",
        "expected.png",
    ]


@pytest.mark.parametrize("factor", [0.5, 0.999])
def test_pytest_mpl_says_nothing_before_the_failure_and_its_report_follows(
    pytester, generate, factor
):
    path = pytester.makepyfile(test_a=PICTURE)
    generate()
    path.write_text(PICTURE.replace("np.eye(6)", f"np.eye(6) * {factor}"))
    options = ["--mpl", "--mpl-generate-summary=json", "--mpl-results-path=results"]
    result = pytester.runpytest(*options)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "*___ test_picture ___*",
            "heatmap_compare: the data differ from the baseline *: 6 of 36 cells differ",
        ],
        consecutive=True,
    )
    result.stdout.no_fnmatch_line("*RMS*")
    found = json.loads((pytester.path / "results/results.json").read_text())
    assert found["test_a.test_picture"]["status"] == "failed"


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
            "  actual *",
            "  to keep it      pytest --attn-update=missing 'test_a.py::test_picture'",
        ]
    )


def test_a_picture_of_another_size_fails(pytester, generate):
    path = pytester.makepyfile(PICTURE)
    generate()
    path.write_text(PICTURE.replace('"Queries")', '"Queries", figsize=(3, 2))'))
    pytester.runpytest().stdout.fnmatch_lines(["*the data agree, but the picture has another size"])


def test_no_picture_no_baseline_and_an_error_fail_in_every_mode(pytester, mode):
    pytester.makepyfile(
        """
        import numpy as np, pytest
        from pytest_attnheat import show_heatmaps

        pytestmark = pytest.mark.heatmap_compare

        def test_none():
            show_heatmaps(np.eye(3), "k", "q")

        def test_array():
            return np.eye(3)

        def test_missing():
            return show_heatmaps(np.eye(3), "k", "q")

        def test_mine():
            raise KeyError("mine")

        def test_skipped():
            pytest.skip("no")

        async def test_async():
            return show_heatmaps(np.eye(3), "k", "q")
        """
    )
    result = pytester.runpytest(*mode)
    result.assert_outcomes(failed=5, skipped=1)
    for returned in ("None", "ndarray"):
        result.stdout.fnmatch_lines([f"*the test returned {returned}*return show_heatmaps(...)*"])
    result.stdout.fnmatch_lines(["E * KeyError: 'mine'"])
    result.stdout.fnmatch_lines(["*there is no baseline *test_missing.png yet"])
    result.stdout.fnmatch_lines(["*an async test returns its figure to the event loop*"])


def test_the_users_style_does_not_show(pytester, mode, generate):
    pytester.makepyfile(PICTURE)
    generate()
    pytester.makefile("", matplotlibrc="figure.facecolor: red\nfont.size: 20\nfigure.dpi: 50\n")
    pytester.runpytest_subprocess(*mode, *LIGHT).assert_outcomes(passed=1)


DEVICES = """
    import pytest
    from pytest_attnheat import show_heatmaps

    @pytest.mark.parametrize("size", ["a/b", "B[1]", "b[1]"])
    @pytest.mark.heatmap_compare
    def test_picture(attention, size):
        return show_heatmaps(attention.weights, "Keys", "Queries", figsize=(6, 4))
"""
PICTURES = 3 * len(scoring_names())


def test_file_names_are_safe_and_unique_and_the_same_for_all_devices(pytester, generate):
    pytester.makepyfile(test_a=DEVICES)
    generate("--attn-device=cpu").assert_outcomes(skipped=PICTURES)
    names = sorted(path.name for path in (pytester.path / "baseline_images").iterdir())
    assert len({name.casefold() for name in names}) == PICTURES
    assert not any("cpu" in name for name in names)
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyzB0123456789._-") for name in names)
    pytester.runpytest("--attn-device=cpu").assert_outcomes(passed=PICTURES)
    pytester.runpytest("--attn-device=cpu", "--mpl").assert_outcomes(passed=PICTURES)


def test_two_tests_of_one_name_in_two_folders_have_two_baselines(pytester, generate):
    for folder in ("one", "two"):
        (pytester.path / folder).mkdir()
        (pytester.path / folder / "__init__.py").touch()
        (pytester.path / folder / "test_a.py").write_text(PICTURE)
    generate()
    names = sorted(path.name for path in (pytester.path / "baseline_images").iterdir())
    assert names == ["one.test_a.test_picture.png", "two.test_a.test_picture.png"]


def test_two_tests_that_share_a_file_fail_both(pytester, mode):
    pytester.makepyfile(
        test_a="""
        import pytest

        @pytest.mark.heatmap_compare(filename="same.png")
        def test_one(): ...

        @pytest.mark.heatmap_compare(filename="Same.png")
        def test_two(): ...
        """
    )
    result = pytester.runpytest(*mode)
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(
        ["*test_a.py::test_one: test_a.py::test_one and test_a.py::test_two share the *"]
    )


SHARED = """
import numpy as np, pytest
from pytest_attnheat import show_heatmaps

@pytest.mark.parametrize("factor", [1, 1 + 1e-7, 0.5])
@pytest.mark.heatmap_compare(share=True)
def test_kernels(factor):
    return show_heatmaps(np.eye(4) * factor, "Keys", "Queries")
"""


def test_implementations_that_say_so_share_one_baseline(pytester):
    pytester.makepyfile(test_a=SHARED.replace(", 0.5", ""))
    pytester.runpytest("--attn-update=missing").assert_outcomes(passed=2)
    files = [path.name for path in (pytester.path / "baseline_images").iterdir()]
    assert files == ["test_a.test_kernels.png"]
    pytester.makepyfile(test_a=SHARED)
    result = pytester.runpytest("--attn-update=missing")
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(["FAILED test_a.py::test_kernels[[]0.5] *"])


def test_what_a_test_of_this_run_wrote_is_not_written_anew_by_one_that_differs(pytester):
    pytester.makepyfile(test_a=SHARED)
    pytester.runpytest("--attn-update=all").assert_outcomes(passed=2, failed=1)


@pytest.mark.parametrize("how", ["a file is in the way", "a pipe is the baseline"])
def test_what_cannot_be_written_or_read_does_not_hide_the_message(pytester, generate, how):
    pytester.makepyfile(test_a=PICTURE.replace("np.eye(6)", "np.eye(6) / 2"))
    generate()
    pytester.makepyfile(test_a=PICTURE)
    if how.startswith("a file"):
        (pytester.path / "attn-artifacts").write_text(how)
        lines = [
            "*the data differ from the baseline *: 6 of 36 cells differ",
            "*pictures * not writ*",
        ]
    else:
        baseline = pytester.path / "baseline_images" / "test_a.test_picture.png"
        baseline.unlink()
        os.mkfifo(baseline)
        lines = ["*cannot be read: it is not a file, but a folder, a pipe or a device"]
    result = pytester.runpytest()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(lines)


def test_two_files_of_one_name_do_not_share_a_baseline_unseen(pytester, mode):
    for folder in ("tests/a", "a"):
        path = pytester.mkdir(folder) if "/" not in folder else pytester.path / folder
        path.mkdir(parents=True, exist_ok=True)
        (path / "test_m.py").write_text(PICTURE)
    result = pytester.runpytest(*mode, "--import-mode=importlib")
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(["*share the baseline a.test_m.test_picture.png*"])


MARKED_WRONGLY = {
    "tolerence=3": "*got tolerence; accepted is * filename, baseline_dir, *",
    "'a.png'": "*got 'a.png'; accepted is the keyword arguments*",
    "filename='a.jpg'": "*filename: got 'a.jpg'; accepted is a name of letters*",
    "filename='a/b.png'": "*filename: got 'a/b.png'*for folders see baseline_dir=*",
    "filename='a_.png'": "*not ending in '_'*",
    "filename='a.png.png'": "*with one ending: .png or .svg*",
    "filename=3": "*filename: got 3*",
    "baseline_dir=3": "*baseline_dir: got 3; accepted is a folder",
    "precision='int8'": "*precision: got 'int8'; accepted is one or a list of float16, *",
    "share=1": "*share: got 1; accepted is True or False",
    "tolerance='x'": "*tolerance: got 'x'; accepted is a number from 0",
    "tolerance=-1": "*tolerance: got -1*",
    "tolerance=float('nan')": "*tolerance: got nan*",
}


@pytest.mark.parametrize("workers", [[], ["-n", "1", *LIGHT]], ids=["one process", "a worker"])
def test_marker_arguments_that_are_not_known_fail_the_test(pytester, workers):
    tests = [
        f"@pytest.mark.heatmap_compare({arguments})\ndef test_{number}(): ...\n"
        for number, arguments in enumerate(MARKED_WRONGLY)
    ]
    pytester.makepyfile("import pytest\n" + "".join(tests))
    result = pytester.runpytest(*workers)
    result.assert_outcomes(failed=len(tests))
    for message in MARKED_WRONGLY.values():
        result.stdout.fnmatch_lines([message])


def test_the_marker_of_pytest_mpl_beside_ours_is_refused(pytester, mode):
    both = "@pytest.mark.heatmap_compare\n@pytest.mark.mpl_image_compare(tolerance=200)"
    pytester.makepyfile(PICTURE.replace("@pytest.mark.heatmap_compare", both))
    if "no:pytest_mpl" not in mode:
        result = pytester.runpytest(*mode)
        result.assert_outcomes(failed=1)
        result.stdout.fnmatch_lines(["*marked mpl_image_compare as well; one of them is enough*"])


LATE = {"by a conftest": "items[0].add_marker('heatmap_compare')", "by the test": ""}


@pytest.mark.parametrize("when", LATE)
def test_a_marker_that_comes_late_still_compares_or_fails(pytester, mode, when):
    pytester.makeconftest(f"def pytest_collection_modifyitems(items): {LATE[when] or '...'}")
    apply = "" if LATE[when] else "request.applymarker('heatmap_compare')"
    pytester.makepyfile(
        f"""
        import numpy as np
        from pytest_attnheat import show_heatmaps

        def test_picture(request):
            {apply}
            figure = show_heatmaps(np.eye(3), "k", "q")
            {"return figure" if LATE[when] else ""}
        """
    )
    pytester.runpytest(*mode).assert_outcomes(failed=1)


def test_an_item_that_is_no_function_fails(pytester, mode):
    pytester.makeconftest(
        """
        import pytest

        class Item(pytest.Item):
            def runtest(self): ...

        class File(pytest.File):
            def collect(self):
                item = Item.from_parent(self, name="spec")
                item.add_marker("heatmap_compare")
                yield item

        def pytest_collect_file(file_path, parent):
            if file_path.suffix == ".yaml":
                return File.from_parent(parent, path=file_path)
        """
    )
    pytester.makefile(".yaml", a="")
    result = pytester.runpytest(*mode)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*a test of type Item returns no figure*"])


def test_parameters_that_look_like_files_have_baselines_of_their_own(pytester, generate, mode):
    pytester.makepyfile(
        """
        import numpy as np, pytest
        from pytest_attnheat import show_heatmaps

        @pytest.mark.parametrize("name", ["cat.png", "cat.png-left", "cat.png-right", "q_", "q"])
        @pytest.mark.heatmap_compare
        def test_picture(name):
            return show_heatmaps(np.eye(len(name)), "Keys", "Queries")
        """
    )
    generate()
    assert len(list((pytester.path / "baseline_images").iterdir())) == 5
    pytester.runpytest(*mode).assert_outcomes(passed=5)


def test_pytest_mpls_full_names_do_not_change_ours(pytester, mode):
    pytester.makepyfile(DEVICES)
    pytester.makeini("[pytest]\nmpl-use-full-test-name = true")
    update = ["--attn-update=missing", "--attn-device=cpu"]
    pytester.runpytest(*update).assert_outcomes(passed=PICTURES)
    if "no:pytest_mpl" not in mode:
        pytester.runpytest(*mode, "--attn-device=cpu").assert_outcomes(passed=PICTURES)


def test_every_figure_of_a_test_that_runs_twice_is_compared(pytester, generate):
    path = pytester.makepyfile(PICTURE.replace("np.eye(6)", "np.eye(6) * next(NUMBERS)"))
    pytester.makeconftest(
        """
        def pytest_pyfunc_call(pyfuncitem):
            pyfuncitem.obj()
        """
    )
    path.write_text(path.read_text() + "\nNUMBERS = iter([1, 1])\n")
    generate()
    path.write_text(path.read_text().replace("[1, 1]", "[1, 0.5]"))
    pytester.runpytest().assert_outcomes(failed=1)


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
