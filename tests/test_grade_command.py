"""The tests of a project are graded by the defects that they let through: `--attn-grade`."""

import json

import pytest
import torch

from pytest_attnheat.plugin import grading

# `torch.testing.assert_close` loads more of torch when it first compares. An in-process pytester
# run would unload that, and a second import of it crashes.
torch.testing.assert_close(torch.ones(1), torch.ones(1))

ATTENTION = """
import math
import torch
from torch import nn


def attention(query, key, value, attn_mask=None, is_causal=False, more=0.0):
    scores = query @ key.mT / math.sqrt(query.shape[-1]) + more
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        scores = scores.masked_fill(~mask, -math.inf)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    return scores.softmax(-1) @ value


class Attend(nn.Module):
    def forward(self, query, key, value, attn_mask=None):
        return attention(query, key, value, attn_mask)


class Tools:
    def attend(self, query, key, value):
        return attention(query, key, value)

    @staticmethod
    def static(query, key, value):
        return attention(query, key, value)

    @classmethod
    def of_class(cls, query, key, value):
        return attention(query, key, value)


attend, tools = Attend(), Tools()
registry = {"ours": attention}
"""

HEAD = """
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa
import my_package.attention as ours
from my_package.attention import attention


@pytest.fixture
def tensors():
    return torch.randn(3, 2, 2, 5, 8).unbind()
"""

TESTS = """
def test_shape(tensors):
    assert attention(*tensors).shape == tensors[0].shape


def test_first_row(tensors):
    torch.testing.assert_close(attention(*tensors)[:, :, 0], sdpa(*tensors)[:, :, 0])


def test_causal_shape(tensors):
    assert attention(*tensors, is_causal=True).shape == tensors[0].shape


def test_something_else():
    assert 1 + 1 == 2
"""

TARGET = "my_package.attention:attention"
KILLED = ["last_key_ignored", "scale_missing", "softmax_over_queries"]
WANTED = {"killed": KILLED, "survived": ["causal_sees_next"], "inactive": ["mask_ignored"]}
SOME = ",".join([*KILLED, "causal_sees_next", "mask_ignored"])


@pytest.fixture
def project(pytester):
    pytester.makeini("[pytest]\npythonpath = .\nfilterwarnings = error")
    pytester.mkpydir("my_package").joinpath("attention.py").write_text(ATTENTION)
    return pytester


def graded(project, *options, tests=None, target=TARGET, defects=SOME):
    """Grade the tests of a project; return what pytest said, and the grades as data."""
    if tests is not None:
        project.makepyfile(test_it=HEAD + tests)
    result = project.runpytest(
        "-p", "no:cacheprovider", f"--attn-grade={target}", f"--attn-grade-defects={defects}",
        "--attn-json=grade.json", *options,
    )  # fmt: skip
    path = project.path / "grade.json"
    data = json.loads(path.read_text()) if path.exists() else {"grades": []}
    path.unlink(missing_ok=True)
    return result, data["grades"]


def counts(grade):
    return {status: sorted(one["name"] for one in grade[status]) for status in WANTED}


def files(project):
    """What each file of a project holds, but for what Python compiles."""
    every = (path for path in project.path.rglob("*") if path.is_file())
    return {str(path): path.read_bytes() for path in every if "__pycache__" not in str(path)}


# --- what it says


def test_it_says_which_defects_the_tests_let_through(project):
    result, (grade,) = graded(project, tests=TESTS)
    assert counts(grade) == WANTED
    result.stdout.fnmatch_lines([
        "my_package.attention:attention: 3 of 4 active defects killed, 1 survived, *",
        "  causal_sees_next *attention whose queries see one key too many*",
        "  replaced   in my_package.attention.attention, my_package.attention.registry.ours, "
        "test_it.attention",
        "  tests      3 call it and pass; 1 do not call it",
    ])  # fmt: skip


def test_the_run_itself_is_as_without_it(project):
    result, _ = graded(project, tests=TESTS)
    result.assert_outcomes(passed=4)
    assert result.ret == 0
    result.stdout.fnmatch_lines(["*test_it.py ....*100%*", "attention grade: *version 1 of 5"])


def test_it_says_which_test_killed_a_version(project):
    _, (grade,) = graded(project, tests=TESTS, defects="scale_missing")
    assert grade["killed"][0]["said"].startswith("test_it.py::test_first_row: AssertionError")


@pytest.mark.matrix
def test_counts_are_equal_under_workers_and_in_another_order(project):
    project.makeconftest("def pytest_collection_modifyitems(items): items.reverse()")
    _, (alone,) = graded(project, tests=TESTS)
    result, (shared,) = graded(project, "-n", "2")
    assert counts(alone) == counts(shared) == WANTED
    written = [f"test_it.py::test_{name}" for name in ("shape", "first_row", "causal_shape")]
    assert alone["tests"] == shared["tests"] == written
    result.assert_outcomes(passed=4)
    result.stdout.fnmatch_lines(["attention grade: *, judged by 2 workers; what would tell *"])


def test_versions_that_a_lost_worker_took_along_are_not_counted(project, monkeypatch):
    monkeypatch.setattr(grading.Grading, "_note", lambda *given: None)
    result, _ = graded(project, tests=TESTS)
    assert result.ret == 1
    result.stdout.fnmatch_lines(["*no grade, 5 of 5 versions were not judged: a worker was lost"])


# --- what is replaced


PLACES = {
    "my_package.attention:attend": "attend",
    "my_package.attention:Attend": "Attend()",
    "my_package.attention:Tools.attend": "Tools().attend",
    "my_package.attention:Tools.static": "Tools.static",
    "my_package.attention:Tools.of_class": "Tools.of_class",
    "my_package.attention:tools.attend": "tools.attend",
    "my_package.attention:spec": "attention",
    "my_package.attention:spec_alone": "spec_alone",
}


def test_methods_modules_and_specifications_are_replaced(project):
    calls = "\n".join(
        f"""
def test_{number}(tensors):
    torch.testing.assert_close(ours.{call}(*tensors), sdpa(*tensors))
"""
        for number, call in enumerate(PLACES.values())
    )
    with (project.path / "my_package" / "attention.py").open("a") as file:
        file.write("from pytest_attnheat import AttentionSpec\nspec = AttentionSpec(attention)\n")
        file.write("def alone(query, key, value): return attention(query, key, value)\n")
        file.write("spec_alone = AttentionSpec(alone)\n")
    _, grades = graded(project, tests=calls, target=",".join(PLACES), defects="scale_missing")
    assert [one["target"] for one in grades] == list(PLACES)
    for grade in grades:
        assert [one["name"] for one in grade["killed"]] == ["scale_missing"], grade["target"]


def test_a_specification_is_put_back_and_imported_by_the_tests_that_are_proposed(project):
    with (project.path / "my_package" / "attention.py").open("a") as file:
        file.write("from pytest_attnheat import AttentionSpec\nspec = AttentionSpec(attention)\n")
    tests = """
from my_package.attention import spec
kept = [spec]

def test_shape(tensors):
    assert spec(*tensors).shape == tensors[0].shape

@pytest.fixture(scope="session", autouse=True)
def put_back(request):
    request.config.add_cleanup(lambda: print("put back:", ours.spec is spec is kept[0]))
    yield
"""
    result, (grade,) = graded(project, "-s", tests=tests, target="my_package.attention:spec")
    assert not grade["killed"]
    assert grade["survived"]
    result.stdout.fnmatch_lines(["*from my_package.attention import spec"])
    result.stdout.fnmatch_lines(["*assert_matches_reference(spec, case)"])
    result.stdout.fnmatch_lines(["put back: True"])


def test_what_a_library_calls_is_replaced_there(project):
    _, (grade,) = graded(
        project,
        tests="""
def test_multi_head():
    block = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    given = torch.randn(2, 5, 8)
    other = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    other.load_state_dict(block.state_dict())
    plain = other(given, given, given, need_weights=True)[0]
    torch.testing.assert_close(block(given, given, given, need_weights=False)[0], plain)
""",
        target="torch.nn.functional:scaled_dot_product_attention",
        defects="scale_missing",
    )
    assert [one["name"] for one in grade["killed"]] == ["scale_missing"]


def test_blocks_and_their_classes_are_graded_by_the_attention_inside(project):
    with (project.path / "my_package" / "attention.py").open("a") as file:
        file.write("""
block = nn.MultiheadAttention(8, 2, batch_first=True)

class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(8, 24)

    def forward(self, inputs):
        heads = [one.unflatten(-1, (2, 4)).transpose(1, 2)
                 for one in self.project(inputs).chunk(3, -1)]
        return attention(*heads, is_causal=True).transpose(1, 2).flatten(-2)

class Core(nn.Module):
    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.ones(1))

    def forward(self, query, key, value):
        return (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1) @ value
""")
    tests = """
def test_block():
    inputs = torch.randn(2, 5, 8)
    other = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    other.load_state_dict(ours.block.state_dict())
    found, expected = (one(inputs, inputs, inputs) for one in (ours.block, other))
    torch.testing.assert_close(found, expected)

def test_class():
    heads = ours.Heads()
    inputs = torch.randn(2, 5, 8)
    torch.testing.assert_close(heads(inputs)[:, :3], heads(inputs[:, :3]))

def test_core(tensors):
    torch.testing.assert_close(ours.Core()(*tensors), sdpa(*tensors))
"""
    names = ("block", "Heads", "Core")
    target = ",".join(f"my_package.attention:{name}" for name in names)
    result, grades = graded(project, tests=tests, target=target,
                            defects="scale_missing,causal_ignored,mask_ignored")  # fmt: skip
    found = [[one["name"] for one in grade["killed"]] for grade in grades]
    assert found == [["scale_missing"], ["causal_ignored"], ["scale_missing"]]
    assert [one["name"] for one in grades[1]["survived"]] == ["scale_missing"]
    result.stdout.fnmatch_lines(["*block, inputs=torch.randn(2, 5, 8)))"])  # causal, as it is


def test_parameters_of_tests_are_replaced_and_what_is_not_is_said(project):
    tests = """
class Kept:
    function = staticmethod(attention)

def default(function=attention):
    return function

@pytest.mark.parametrize("function", [attention])
def test_parameter(function, tensors):
    torch.testing.assert_close(function(*tensors), sdpa(*tensors))
"""
    result, (grade,) = graded(project, tests=tests, defects="scale_missing")
    assert len(grade["killed"]) == 1
    result.stdout.fnmatch_lines([
        "  WARNING    not replaced in test_it.Kept (its attribute function): *",
        "  WARNING    not replaced in test_it.default (a default argument): *",
    ])  # fmt: skip


def test_what_it_calls_under_its_own_name_is_a_part_of_it(project):
    with (project.path / "my_package" / "attention.py").open("a") as file:
        file.write("""
def by_sample(query, key, value):
    if len(query) == 1:
        return attention(query, key, value)
    return torch.cat([by_sample(q[None], k[None], v[None]) for q, k, v in zip(query, key, value)])
""")
    tests = """
def test_it(tensors):
    torch.testing.assert_close(ours.by_sample(*tensors), sdpa(*tensors))
"""
    _, (grade,) = graded(project, tests=tests, target="my_package.attention:by_sample",
                         defects="scale_missing")  # fmt: skip
    assert (grade["calls"], len(grade["killed"])) == (1, 1)


def test_all_is_put_back_and_no_file_is_written(project):
    tests = """
from hypothesis import given, settings, strategies
from hypothesis.database import DirectoryBasedExampleDatabase
from pytest_attnheat import assert_row_stochastic, show_heatmaps

@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return torch.randn(3, 2, 2, 5, 8).unbind()

def test_rows(tensors):
    query, key, _ = tensors
    assert_row_stochastic(attention(query, key, torch.eye(5).expand(2, 2, 5, 5)))

@pytest.mark.heatmap_compare
def test_picture(tensors):
    query, key, _ = tensors
    eye = torch.eye(5).expand(2, 2, 5, 5)
    return show_heatmaps(attention(query, key, eye, is_causal=True), "key", "query")

@settings(database=DirectoryBasedExampleDatabase("examples"))
@given(strategies.integers(2, 3))
def test_drawn(length):
    tensors = torch.randn(3, 1, 1, length, 4).unbind()
    mask = torch.arange(length) > 0
    torch.testing.assert_close(attention(*tensors, mask), sdpa(*tensors, mask.expand(length, -1)))
"""
    project.makeconftest("""
        def pytest_unconfigure():
            import my_package.attention as ours
            assert ours.attention.__closure__ is None
            assert ours.registry["ours"] is ours.attention
            assert "forward" not in vars(ours.attend)
    """)
    project.makepyfile(test_it=HEAD + tests)
    project.runpytest("-p", "no:cacheprovider", "--attn-update=missing")
    before = files(project)
    target = f"{TARGET},my_package.attention:attend"
    result, (grade, _) = graded(project, target=target,
                             defects="output_factor,causal_ignored,mask_ignored")  # fmt: skip
    killers = sorted(one["said"].split(":")[2] for one in grade["killed"])
    assert killers == ["test_drawn", "test_picture", "test_rows"]
    assert files(project) == before
    assert "AssertionError" not in result.stderr.str()


# --- what is a kill


def test_a_skip_is_no_kill_and_an_exit_and_an_endless_loop_are(project):
    tests = """
def near(function, tensors):
    return torch.allclose(function(*tensors), sdpa(*tensors), atol=1e-4)

def test_skips(tensors):
    if not near(attention, tensors):
        pytest.skip("not today")
"""
    _, (skipped,) = graded(project, tests=tests, defects="scale_missing")
    assert len(skipped["survived"]) == 1
    leaves = """
def test_leaves(tensors):
    if not near(attention, tensors):
        raise SystemExit(3)
"""
    _, (left,) = graded(project, tests=tests + leaves, defects="scale_missing")
    assert left["killed"][0]["said"] == "test_it.py::test_leaves: SystemExit: 3"
    loops = """
def test_loops(tensors):
    while not near(attention, tensors):
        pass
"""
    _, (looped,) = graded(project, "--attn-time-limit=0.2", tests=tests + loops,
                          defects="scale_missing")  # fmt: skip
    assert "test_loops: TimeoutError: it took more than" in looped["killed"][0]["said"]


def test_fixtures_are_made_anew_and_what_they_call_counts_for_all_who_use_them(project):
    tests = """
@pytest.fixture(scope="module")
def answered():
    tensors = torch.randn(3, 2, 2, 5, 8).unbind()
    return attention(*tensors), sdpa(*tensors)

def test_shape(answered):
    assert answered[0].shape == answered[1].shape

def test_numbers(answered):
    torch.testing.assert_close(*answered)

def test_numbers_again(answered):
    torch.testing.assert_close(*answered)
"""
    _, (grade,) = graded(project, tests=tests, defects="scale_missing,last_key_ignored")
    assert len(grade["tests"]) == 3
    assert [one["said"].split(":")[2] for one in grade["killed"]] == ["test_numbers"] * 2


def test_what_fails_with_the_right_one_or_is_not_understood_is_left_out(project):
    tests = (
        TESTS
        + """
def test_fails(tensors):
    assert attention(*tensors) is None

def test_more(tensors):
    attention(*tensors, more=1.0)
"""
    )
    result, (grade,) = graded(project, tests=tests)
    assert counts(grade) == WANTED
    result.stdout.fnmatch_lines([
        "  left out   test_it.py::test_fails: failed with the right one: assert *",
        "  left out   test_it.py::test_more: a call is not understood: more=1.0 is not *",
    ])  # fmt: skip


# --- which tests


def test_markers_choose_tests_and_name_targets(project):
    tests = """
@pytest.mark.attention_grade
def test_any(tensors):
    assert attention(*tensors).isfinite().all()

@pytest.mark.attention_grade(target="my_package.attention:attend")
def test_module(tensors):
    torch.testing.assert_close(ours.attend(*tensors), sdpa(*tensors))

def test_unmarked(tensors):
    torch.testing.assert_close(attention(*tensors), sdpa(*tensors))
"""
    _, (one,) = graded(project, tests=tests, defects="scale_missing")
    assert one["tests"] == ["test_it.py::test_any"]
    _, (marked,) = graded(project, target="marked", defects="scale_missing")
    assert marked["target"] == "my_package.attention:attend"
    assert marked["tests"] == ["test_it.py::test_module"]


# --- how a run ends


def test_a_run_fails_below_the_threshold(project):
    result, _ = graded(project, "--attn-grade-min=0.75", tests=TESTS)
    assert result.ret == 0
    result, _ = graded(project, "--attn-grade-min=0.76")
    assert result.ret == 1
    result.stdout.fnmatch_lines(["  FAILED     0.750; --attn-grade-min is 0.76"])


def test_html_shows_the_grade(project):
    pytest.importorskip("pytest_html")
    graded(project, "--html=report.html", tests=TESTS)
    assert "3 of 4 active defects killed" in (project.path / "report.html").read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--attn-grade=nowhere:f"], "--attn-grade nowhere:f: No module named 'nowhere'; *"),
        (["--attn-grade=my_package.attention:f"], "*has no attribute 'f'"),
        (["--attn-grade=f"], "--attn-grade: got 'f'; accepted is package.module:object, *"),
        (["--attn-grade=my_package.attention:Tools"], "*Tools, which is a class; accepted is *"),
        (["--attn-grade=my_package.attention:registry"], "*registry, which is dict; accepted is *"),
        (["--attn-grade=marked"], "*no test has a marker attention_grade that names a target"),
        (["--attn-grade-min=0.9"], "--attn-grade-min: it goes with --attn-grade, *"),
        ([f"--attn-grade={TARGET}", "--attn-grade-min=90"], "*got '90'; accepted is a number *"),
        ([f"--attn-grade={TARGET}", "--attn-grade-defects=f"], "--attn-grade-defects: *'f'*"),
        ([f"--attn-grade={TARGET}", "--attn-update=all"], "--attn-update: wrong versions would *"),
    ],
)  # fmt: skip
def test_what_cannot_be_graded_is_refused_at_once(project, options, said):
    project.makepyfile("def test_a(): pass")
    result = project.runpytest("-p", "no:cacheprovider", *options)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: {said}"])


@pytest.mark.parametrize(
    ("tests", "options", "said"),
    [
        ("def test_a(): pass", [], "no grade, no test calls it"),
        ("def test_a(): pass", ["-k", "nothing"], "no grade, no test calls it"),
        ("def test_a(tensors):\n    attention(*tensors)\n    assert 0", [],
         "no grade, no test that calls it passes"),
        ("def test_a(): assert 0\ndef test_b(): pass", ["-x"],
         "no grade, the run ended before its tests were graded"),
    ],
)  # fmt: skip
def test_a_run_without_a_grade_fails_and_says_why(project, tests, options, said):
    result, (grade,) = graded(project, *options, tests=tests)
    assert result.ret != 0
    assert "killed" not in grade
    result.stdout.fnmatch_lines([f"{TARGET}: {said}", "  FAILED     there is no grade"])


def test_a_run_without_the_option_loads_nothing_of_it(project):
    project.makepyfile("""
        import sys

        def test_a():
            assert not [name for name in sys.modules if "grad" in name or name == "torch"]
    """)
    result = project.runpytest_subprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=1)
