"""Options, marker, hook and cost of the plugin, as a user meets them."""

import importlib
import logging
import os
import pkgutil
import re
from types import SimpleNamespace

import pytest

from pytest_attnheat import plugin
from pytest_attnheat.attention import cases, devices, scoring
from pytest_attnheat.inputs import DTYPE_NAMES
from pytest_attnheat.plugin import settings

NAMES = scoring.scoring_names()


@pytest.fixture
def registry(monkeypatch):
    """A registry whose changes last for one test."""
    monkeypatch.setattr(scoring, "_factories", dict(scoring._factories))


# --- options


DEVICES = f"accepted is auto, all, or a comma-separated list of {devices.ACCEPTED}"
DTYPES = "accepted is a comma-separated list of float16, bfloat16, float32, float64"
SEEDS = "accepted is a whole number from 0"


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("device", "gpu", f"got 'gpu'; {DEVICES}; a GPU is called cuda"),
        ("device", "cpu,gpu:1", f"got 'gpu:1'; {DEVICES}; a GPU is called cuda"),
        ("device", "cpu,auto", f"got 'cpu,auto'; {DEVICES}; auto and all stand alone"),
        ("device", "cuda:x", f"got 'cuda:x'; {DEVICES}"),
        ("device", "cuda:-1", f"got 'cuda:-1'; {DEVICES}"),
        ("device", "cpu:0", f"got 'cpu:0'; {DEVICES}"),
        ("device", "meta", f"got 'meta'; {DEVICES}"),
        ("device", "CPU", f"got 'CPU'; {DEVICES}"),
        ("device", "", f"got ''; {DEVICES}"),
        ("device", "cpu,", f"got ''; {DEVICES}"),
        ("dtype", "float8", f"got 'float8'; {DTYPES}"),
        ("dtype", "float32;float64", f"got 'float32;float64'; {DTYPES}"),
        ("dtype", "", f"got ''; {DTYPES}"),
        ("seed", "-1", f"got '-1'; {SEEDS}"),
        ("seed", "1.5", f"got '1.5'; {SEEDS}"),
        ("seed", "", f"got ''; {SEEDS}"),
        ("seed", "²", f"got '²'; {SEEDS}"),
    ],
)
@pytest.mark.parametrize("ini", [False, True])
def test_a_bad_value_is_a_usage_error_that_lists_the_good_ones(pytester, name, value, said, ini):
    pytester.makepyfile("def test_a(): pass")
    if ini:
        pytester.makeini(f"[pytest]\nattn_{name} = {value}")
        result = pytester.runpytest()
    else:
        result = pytester.runpytest(f"--attn-{name}={value}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    source = f"ini setting attn_{name}" if ini else f"--attn-{name}"
    assert f"ERROR: {source}: {said}" in result.stderr.str()


def test_help_markers_and_fixtures_read_like_documentation(pytester):
    text = " ".join(pytester.runpytest("--help").stdout.str().split())
    assert "attention (pytest-attnheat): --attn-" in text
    assert "--attn-device=DEVICES devices to run attention" in text
    assert "--attn-update=missing|changed|all write baselines" in text
    assert "--attn-unused list baselines that no collected test uses" in text
    assert "--attn-artifacts=FOLDER where failed comparisons leave" in text
    for name in ("device", "require-device", "dtype", "seed"):
        assert f"--attn-{name}" in text
        assert f"Default: the ini setting attn_{name.replace('-', '_')}, or " in text
        assert re.search(rf" attn_{name.replace('-', '_')} \((string|bool)\): ", text)
    text = pytester.runpytest("--markers").stdout.str()
    (line,) = re.findall(r"@pytest\.mark\.attention\((.*?)\): (.*)", text)
    assert line[0] == ", ".join(f"{option}=" for option in (*cases.OPTIONS, "devices"))
    assert "also take lists" in line[1]
    text = pytester.runpytest("--fixtures").stdout.str()
    ours = text.partition("fixtures defined from pytest_attnheat")[2].partition("\n----")[0]
    for name in ("attention", "attention_weights", "make_attention", "scoring_function"):
        assert re.search(rf"^{name} -- .*\n    [A-Z].*\.?$", ours, re.MULTILINE)
    assert re.search(r"^attn_device \[module scope\] -- .*\n    The torch\.device", ours, re.M)
    assert "no docstring" not in ours


def test_names_listed_without_torch_are_those_that_torch_is_asked_for():
    assert cases.DTYPES == DTYPE_NAMES


# --- marker


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            "dtyp='float32'",
            "keyword of the attention marker: got 'dtyp'; *'devices'; *did you mean 'dtype'?",
        ),
        ("deveices='cpu'", "keyword of *: got 'deveices'; *; did you mean 'devices'?"),
        ("'additive'", "the attention marker: got ('additive',); accepted is keywords only: sc*"),
        ("scoring='cosine'", "scoring: got 'cosine'; accepted is one of 'additive', *'bilinear'*"),
        (
            "scoring=['additive', 'x']",
            "scoring: got 'x'; accepted is one of 'additive', *'bilinear'*",
        ),
        ("scoring=[]", "*scoring: got []; accepted is one or more*"),
        ("dtype=()", "*dtype: got (); accepted is one or more*"),
        ("dtype='float8'", "dtype: got 'float8'; accepted is one of 'float16', *"),
        ("mask='causal'", "mask: got 'causal'; accepted is one of 'causal_top_left', *"),
        ("mask=('padding', 3)", "mask: got 3; accepted is one of 'causal_top_left', *"),
        ("batch=0", "batch: got 0; accepted is a whole number from 1"),
        ("key_len='8'", "key_len: got '8'; accepted is a whole number from 1"),
        ("kind='max'", "kind: got 'max'; accepted is one of 'soft', *"),
        ("fully_masked='mean'", "fully_masked: got 'mean'; accepted is one of 'zero', *"),
        ("seed=-1", "seed: got -1; accepted is a whole number from 0"),
    ],
)
@pytest.mark.parametrize("argument", ["", "attention", "make_attention"])
def test_a_wrong_marker_is_an_error_at_collection(pytester, arguments, said, argument):
    pytester.makepyfile(f"""
        import pytest

        @pytest.mark.attention({arguments})
        def test_a({argument}): pass
    """)
    result = pytester.runpytest("--collect-only", "-W", "error")
    if not argument and arguments == "'additive'":  # a marker of somebody else
        assert result.ret == pytest.ExitCode.OK
        return
    assert result.ret == pytest.ExitCode.INTERRUPTED
    pattern = said.replace("[", "[[]")
    result.stdout.fnmatch_lines(f"*.py::test_a: {pattern}")


@pytest.mark.parametrize("where", ["module", "class", "outer"])
def test_a_wrong_marker_is_found_wherever_it_stands(pytester, where):
    pytester.makepyfile(f"""
        import pytest

        pytestmark = [pytest.mark.attention(batch={0 if where == "module" else 1})]

        @pytest.mark.attention(heads={0 if where == "class" else 1})
        class TestA:
            @pytest.mark.attention(*{"[1]" if where == "outer" else "[]"})
            @pytest.mark.attention(query_len=3)
            def test_a(self, attention): pass
    """)
    result = pytester.runpytest()
    said = {"module": "batch: got", "class": "heads: got", "outer": "the attention marker: got"}
    result.stdout.fnmatch_lines(f"*::TestA::test_a: {said[where]}*")
    result.assert_outcomes(errors=1)


def test_the_marker_is_registered(pytester):
    pytester.makepyfile("""
        import pytest

        @pytest.mark.attention(batch=1)
        def test_a(attention): pass
    """)
    result = pytester.runpytest("--strict-markers", "-W", "error")
    result.assert_outcomes(passed=len(NAMES))


# --- hook and registry


COSINE = """
    def pytest_attnheat_scoring_functions(config):
        from torch.nn.functional import normalize

        def cosine(query, key):
            return normalize(query, dim=-1) @ normalize(key, dim=-1).mT

        print("COLLECTED ONCE")
        return {"cosine": lambda query_dim, key_dim, seed: cosine}
"""


def test_a_name_from_the_hook_is_known_to_every_fixture_and_marker(pytester):
    pytester.makeconftest(COSINE)
    pytester.makepyfile("""
        import pytest

        def test_all(attention):
            pass

        @pytest.mark.attention(scoring=["cosine"])
        def test_one(attention, make_attention):
            assert attention.scores.abs().max() <= 1
            assert attention.scoring == make_attention().scoring == "cosine"

        def test_make(make_attention):
            case = make_attention(scoring="cosine", query_len=2)
            assert case.scoring == "cosine"
            assert case.scores.abs().max() <= 1
            with pytest.raises(ValueError, match="got 'sine'; .*'bilinear',.* 'cosine'"):
                make_attention(scoring="sine")

        @pytest.mark.parametrize("scoring_function", ["cosine"])
        def test_parametrised(attention):
            assert attention.scoring == "cosine"
    """)
    result = pytester.runpytest("-v", "-s")
    result.assert_outcomes(passed=len(NAMES) + 4)
    result.stdout.fnmatch_lines("*test_all[[]cosine-cpu]*")
    assert result.stdout.str().count("COLLECTED ONCE") == 1


def test_hooks_of_one_session_are_not_known_in_the_next(pytester):
    pytester.makeconftest(COSINE)
    test_file = pytester.makepyfile("def test_a(scoring_function): pass")
    pytester.runpytest(test_file).assert_outcomes(passed=len(NAMES) + 1)
    pytester.makeconftest("")
    again = pytester.runpytest(test_file, "-p", "no:cacheprovider")
    again.assert_outcomes(passed=len(NAMES))


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (
            '{"additive": lambda a, b, c: None}',
            "*: got 'additive'; accepted is a name that is not taken, as additive, *",
        ),
        (
            '{"a-b": lambda a, b, c: None}',
            "*'a-b'; accepted is a str of letters, digits and underscores*",
        ),
        ('{"cosine": lambda q, k: q}', "*'cosine': got *factory(query_dim, key_dim, seed)*"),
        ('{"cosine": "cosine"}', "*'cosine': got *factory(query_dim, key_dim, seed)*"),
    ],
)
def test_a_wrong_hook_is_an_error_at_collection(pytester, returned, said):
    pytester.makeconftest(f"""
        def pytest_attnheat_scoring_functions(config):
            return {returned}
    """)
    pytester.makepyfile("def test_a(attention): pass")
    result = pytester.runpytest()
    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.fnmatch_lines(f"*.py::test_a: {said}")


def test_two_hooks_with_one_name_clash(pytester):
    pytester.makeconftest(COSINE)
    pytester.makepyfile(other=COSINE, test_a="def test_a(attention): pass")
    pytester.syspathinsert()
    result = pytester.runpytest("-p", "other")
    result.stdout.fnmatch_lines(
        "*got 'cosine'; accepted is a name that is not taken, as additive, *bilinear, cosine are*"
    )
    assert result.ret == pytest.ExitCode.INTERRUPTED


@pytest.mark.usefixtures("registry")
def test_a_registered_name_is_known_to_every_fixture_and_marker(pytester):
    pytester.makeconftest("""
        from pytest_attnheat import BilinearScore, register_scoring_function

        @register_scoring_function("doubled")
        def doubled(query_dim, key_dim, seed):
            return BilinearScore(query_dim, key_dim, seed=seed)
    """)
    pytester.makepyfile("""
        import pytest

        def test_all(attention): pass

        @pytest.mark.attention(scoring="doubled", dtype="float64", head_dim=5, seed=3)
        def test_one(attention, scoring_function):
            assert scoring_function.weight.shape == (5, 5)
            assert attention.scores.dtype == scoring_function.weight.dtype
    """)
    result = pytester.runpytest("-v")
    result.assert_outcomes(passed=len(NAMES) + 2)
    result.stdout.fnmatch_lines("*test_all[[]doubled-cpu]*")


def test_all_hooks_stand_in_one_file():
    elsewhere = [
        f"{room.name}.{name}"
        for room in pkgutil.iter_modules(plugin.__path__)
        for name in vars(importlib.import_module(f"{plugin.__name__}.{room.name}"))
        if name.startswith("pytest_")
    ]
    specified = ["settings.pytest_attnheat_scoring_functions",
                 "settings.pytest_attnheat_conventions"]  # fmt: skip
    assert elsewhere == specified


# --- cost


HEAVY = """
    import sys
    import pytest

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(config):
        heavy = {"torch", "numpy", "matplotlib"} & set(sys.modules)
        print("HEAVY", sorted(heavy), "pytest_attnheat.plugin.fixtures" in sys.modules)
"""


@pytest.mark.parametrize("more", [["--collect-only"], []], ids=["nothing", "no fixture"])
def test_a_run_without_attention_loads_nothing_heavy(pytester, monkeypatch, more):
    pytester.makepyfile(watch=HEAVY)
    if not more:
        file = "import pytest_attnheat\n\ndef test_a(tmp_path): assert pytest_attnheat.__version__"
        pytester.makepyfile(test_file=file)
    monkeypatch.setenv("PYTHONPATH", str(pytester.path), prepend=os.pathsep)
    options = ("-p", "watch", "-p", "no:pytest_mpl", "-p", "no:hypothesispytest")
    result = pytester.runpytest_subprocess(*options, "--attn-device=cpu,cuda", *more)
    result.stdout.fnmatch_lines("HEAVY [[][]] True")


def test_the_plugin_can_be_switched_off(pytester, monkeypatch):
    pytester.makepyfile(watch=HEAVY, test_file="def test_a(attention): pass")
    monkeypatch.setenv("PYTHONPATH", str(pytester.path), prepend=os.pathsep)
    result = pytester.runpytest_subprocess(
        "-p", "watch", "-p", "no:attnheat", "-p", "no:pytest_mpl", "-p", "no:hypothesispytest"
    )
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*fixture 'attention' not found*", "HEAVY [[][]] False"])


def test_it_loads_by_name_where_plugins_are_not_loaded_by_themselves(pytester, monkeypatch):
    pytester.makepyfile("def test_a(attention): pass")
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    result = pytester.runpytest_subprocess("-p", "pytest_attnheat.plugin")
    result.assert_outcomes(passed=len(NAMES))


@pytest.mark.parametrize(
    "options",
    [
        ["-n", "1", "-p", "no:hypothesispytest"],
        ["--import-mode=importlib", "-W", "error", "--strict-markers", "--strict-config"],
        ["-p", "no:xdist", "-p", "no:cacheprovider"],
    ],
    ids=" ".join,
)
def test_it_works_under_the_options_that_people_use(pytester, options):
    pytester.makepyfile("""
        import pytest

        @pytest.mark.attention(mask="padding", dtype=["float32", "bfloat16"])
        def test_a(attention, attention_weights, make_attention, attn_device):
            assert make_attention(seed=3).weights.shape == attention_weights.shape
    """)
    result = pytester.runpytest("--attn-device=cpu", *options)
    result.assert_outcomes(passed=2 * len(NAMES))
    assert "warning" not in result.stdout.str().lower()


def test_a_list_in_a_file_of_toml_is_what_commas_separate():
    config = SimpleNamespace(getoption=lambda name: None, getini=lambda name: ["cpu", "mps"])
    assert settings._setting(config, "attn_device", settings._read_devices) == ("cpu", "mps")


# --- how far long work is

LONG_WORK = """
import time
import pytest
import torch
from pytest_attnheat import LazyWeights, assert_row_stochastic
from pytest_attnheat.attention import chunks

@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(chunks, "_SECONDS", -1.0)

def test_lazily():
    query, key = torch.randn(2, 1, 1, 40, 4).unbind(0)
    assert_row_stochastic(LazyWeights(query, key))

def test_on_ranks(ranks):
    ranks(2, time.sleep, 0.1)
"""
IN_FULL = "attention: *float32 (1, 1, 40, 40)>: 0 % are read"


def test_how_far_long_work_is_stands_between_what_pytest_says(pytester):
    pytester.makepyfile(LONG_WORK)
    logger = logging.getLogger("pytest_attnheat")
    before = logger.level, [*logger.handlers]
    result = pytester.runpytest("-v")
    result.assert_outcomes(passed=2)
    answered = "attention: sleep on 2 ranks: 0 of 2 have answered, after 0 s"
    result.stdout.fnmatch_lines(["*::test_lazily*", IN_FULL, "*::test_on_ranks*", answered])
    assert (logger.level, logger.handlers) == before


@pytest.mark.parametrize("options", [["-q"], ["--log-cli-level=INFO"], ["-p", "no:terminal"]])
def test_it_is_said_once_and_not_where_little_is_wanted(pytester, options):
    pytester.makepyfile(LONG_WORK)
    result = pytester.runpytest(*options)
    assert result.ret == 0
    result.stdout.no_fnmatch_line("attention: *")
    assert ("are read" in result.stdout.str()) == ("--log-cli-level=INFO" in options)


def test_workers_say_nothing_of_how_far_they_are(pytester):
    pytester.makepyfile(LONG_WORK)
    result = pytester.runpytest("-n1")
    result.assert_outcomes(passed=2)
    result.stdout.no_fnmatch_line("attention: *")


REDIRECTED = """
import contextlib
import io
import logging
import sys

def told():
    print("one")
    sys.stderr.write("one\\n")
    logging.getLogger("pytest_attnheat").info("half of it")
    print("two")
    sys.stderr.write("two\\n")

def test_redirected():
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        told()
    assert out.getvalue() == errors.getvalue() == "one\\ntwo\\n"

def test_captured(capsys):
    told()
    assert capsys.readouterr() == ("one\\ntwo\\n", "one\\ntwo\\n")
"""


@pytest.mark.parametrize("capture", ["fd", "sys", "no"])
def test_what_a_test_redirects_stays_redirected(pytester, capture):
    pytester.makepyfile(REDIRECTED)
    result = pytester.runpytest(f"--capture={capture}")
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["attention: half of it"])


def test_the_log_of_a_failed_test_is_without_how_far_long_work_was(pytester):
    pytester.makepyfile(
        """
        import logging
        from pytest_attnheat.attention.chunks import Progress

        def test_it(caplog):
            progress = Progress("work", 2, "are read")
            progress._told -= 9
            progress.step()
            logging.getLogger("mine").warning("own words")
            assert "work: " in caplog.text
            assert not caplog.text
        """
    )
    result = pytester.runpytest("--show-capture=log", "--tb=short")
    result.stdout.fnmatch_lines(["attention: work: 0 % are read"])
    logged = result.stdout.str().partition("Captured log call")[2].partition("\n===")[0]
    assert "own words" in logged  # the summary of failures after it shows what `caplog` had
    assert "are read" not in logged


def test_a_file_that_cannot_be_written_is_refused_before_any_test_runs(pytester):
    (pytester.path / "folder").mkdir()
    (pytester.path / "file").write_text("")
    pytester.makepyfile("def test_it(): raise RuntimeError('it ran')")
    for name, said in (
        ("folder", "a folder"),
        ("file/out.json", "in *file, which is not a folder"),
    ):
        result = pytester.runpytest(f"--attn-json={name}")
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        result.stderr.fnmatch_lines(
            [f"ERROR: --attn-json: got '{name}', {said}; accepted is the *"]
        )
