"""The examination under pytest, as a user sees it."""

import json
import multiprocessing
import re
import textwrap
from fnmatch import fnmatch
from pathlib import Path

import pytest

from pytest_attnheat import AttentionSpec, check_attention, parametrize_with_checks
from pytest_attnheat.contract import long_calls
from pytest_attnheat.contract.checks import CHECKS
from pytest_attnheat.inputs import DTYPE_NAMES
from pytest_attnheat.plugin.checking import _in_both

# The number of checks in the quick form.
QUICK = sum(check.quick for check in CHECKS)

WRONG = """
import torch


def attention(query, key, value, attn_mask=None, is_causal=False):
    scores = query @ key.transpose(-2, -1)
    mask = torch.ones(scores.shape[-2:], dtype=torch.bool)
    if is_causal:
        mask = mask.tril()
    if attn_mask is not None:
        mask = mask & attn_mask
    return scores.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num() @ value
"""

# What the end of a log has to say of it.
DIAGNOSIS = "  diagnosis  attention equals attention whose scores are not scaled; *"

RIGHT = "from torch.nn.functional import scaled_dot_product_attention as attention"


@pytest.fixture
def contract(pytester):
    pytester.makepyfile(right=RIGHT, wrong=WRONG)
    return pytester


def test_each_check_is_a_test_with_a_readable_id(contract):
    contract.makepyfile(
        """
        from pytest_attnheat import AttentionSpec, parametrize_with_checks
        from pytest_attnheat.contract.checks import CHECKS
        from right import attention

        some = [check for check in CHECKS if check.name in ("plain", "returned_weights")]

        @parametrize_with_checks(
            [AttentionSpec(attention, dtypes=("float32", "bfloat16"))], checks=some)
        def test_contract(check):
            check()
        """
    )
    result = contract.runpytest("-v", "-W", "error", "--strict-markers")
    result.stdout.fnmatch_lines(
        [
            "*::test_contract?scaled_dot_product_attention-plain-float32? PASSED*",
            "*::test_contract?scaled_dot_product_attention-returned_weights-float32? SKIPPED*",
            "*::test_contract?scaled_dot_product_attention-plain-bfloat16? PASSED*",
        ]
    )
    outcomes = result.parseoutcomes()
    assert set(outcomes) == {"passed", "skipped"}


def test_the_checks_of_a_scheme_are_asked_on_ranks_and_end_with_them(contract):
    contract.makepyfile(
        sharded="""
        import torch
        import torch.distributed as dist
        from torch.nn.functional import scaled_dot_product_attention as sdpa

        def gathering(query, key, value, is_causal=False):
            ranks, length = dist.get_world_size(), query.shape[2]
            whole = []
            for shard in (key, value):
                every = [torch.empty_like(shard) for _ in range(ranks)]
                dist.all_gather(every, shard.contiguous())
                whole.append(torch.cat(every, 2))
            mask = torch.ones(length, ranks * length).tril(dist.get_rank() * length).bool()
            return sdpa(query, *whole, mask if is_causal else None)

        def alone(query, key, value, is_causal=False):
            return sdpa(query, key, value, is_causal=is_causal)
        """
    )
    contract.makepyfile(
        """
        from pytest_attnheat import AttentionSpec, parametrize_with_checks
        from pytest_attnheat.contract.checks import CHECKS
        from sharded import alone, gathering

        some = [check for check in CHECKS if check.name in ("plain", "causal")]
        specs = [AttentionSpec(one, sharding="ring", gradients=False, dtypes=("float32",))
                 for one in (gathering, alone)]

        @parametrize_with_checks(specs, checks=some, ranks=2)
        def test_contract(check):
            check()
        """
    )
    result = contract.runpytest("-v", "-W", "error")
    result.assert_outcomes(passed=2, failed=2)
    result.stdout.fnmatch_lines(
        [
            "*::test_contract?gathering-causal-float32? PASSED*",
            "*::test_contract?alone-plain-float32? FAILED*",
            "*that sees the keys of its own shard alone*",
            '*repeat   check_attention(..., ranks=2, replay="*")',
        ]
    )
    assert not multiprocessing.active_children()


def test_a_call_as_long_as_memory_allows_is_a_test_where_it_is_asked_for(contract, monkeypatch):
    memory = long_calls._SPARE + 2**28
    monkeypatch.setattr(long_calls, "free_bytes", lambda device: memory)
    contract.makepyfile(
        """
        from pytest_attnheat import AttentionSpec, parametrize_with_checks
        from pytest_attnheat.contract.checks import CHECKS
        from right import attention

        spec = AttentionSpec(attention, dtypes=("float32",))

        @parametrize_with_checks([spec], checks=CHECKS[:1], long=True)
        def test_contract(check):
            check()
        """
    )
    result = contract.runpytest("-v", "-W", "error")
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["*::test_contract?scaled_dot_product_attention-long-float32? P*"])


@pytest.mark.parametrize(
    ("declared", "options", "said"),
    [
        ({}, {"ranks": 2}, r"^ranks: got 2 for what is not sharded; accepted is "),
        ({"sharding": "ring"}, {"ranks": 1}, r"^ranks: got 1; accepted is a whole number from 2"),
        ({"sharding": "ring"}, {"ranks": 2, "long": True}, r"^long: got True; accepted is False "),
    ],
)
def test_what_cannot_be_asked_on_ranks_is_refused_where_it_is_declared(declared, options, said):
    spec = AttentionSpec(lambda query, key, value: query, **declared)
    with pytest.raises(ValueError, match=said):
        parametrize_with_checks([spec], **options)
    with pytest.raises(ValueError, match=said):
        check_attention(spec, **options)


def test_a_failure_leads_with_the_diagnosis(contract):
    contract.makepyfile(
        """
        from pytest_attnheat import AttentionSpec, parametrize_with_checks
        from wrong import attention

        @parametrize_with_checks([AttentionSpec(attention, dtypes=("float32",))], quick=True)
        def test_contract(check):
            check()
        """
    )
    result = contract.runpytest("-rs")
    result.stdout.fnmatch_lines(
        [
            "*FailedCheckError: not so: without a mask it is attention*",
            "*240 of 240 elements of the output are not those of attention in float64*",
            "SKIPPED* test_a_failure_leads_with_the_diagnosis.py:6: it is not declared to take *",
            "*= attention examination =*",
            "attention (test_a_failure_leads_with_the_diagnosis.py): 7 of 9 checks failed, *",
            DIAGNOSIS,
        ]
    )
    text = result.stdout.str()
    assert "equals attention whose scores are not scaled" in text.split("elements of the output")[0]
    assert text.count("FailedCheckError: not so: ") == 7


def test_expected_failures_are_xfailed(contract):
    contract.makepyfile(
        """
        from pytest_attnheat import AttentionSpec, parametrize_with_checks
        from wrong import attention

        known = dict.fromkeys(
            ["plain", "masked", "masked_and_causal", "causal", "causal_rectangular", "large_scores",
             "attention-fully_masked"], "issue 7")

        @parametrize_with_checks(
            [AttentionSpec(attention, dtypes=("float32",))], expected_failures=known, quick=True)
        def test_contract(check):
            check()
        """
    )
    result = contract.runpytest("-rx")
    assert "failed" not in result.parseoutcomes()
    result.stdout.fnmatch_lines(["XFAIL*attention-plain-float32*issue 7*"])


def test_an_unknown_expected_failure_is_an_error(contract):
    contract.makepyfile(
        """
        from pytest_attnheat import parametrize_with_checks
        from right import attention

        @parametrize_with_checks([attention], expected_failures={"plane": "typo"})
        def test_contract(check):
            check()
        """
    )
    result = contract.runpytest()
    result.stdout.fnmatch_lines(
        ["*expected_failures: got ?'plane'?; accepted is names of checks, of *"]
    )


def test_an_implementation_is_examined_with_no_test_file(contract, monkeypatch):
    monkeypatch.setenv("CI", "true")  # where pytest prints every line of a message again
    contract.makepyfile(test_other="def test_other(): raise RuntimeError('not asked for')")
    result = contract.runpytest(
        "--attn-check=right:attention", "--attn-check=wrong:attention", "--attn-check-quick",
        "-rsf", "--tb=no", "--junitxml=junit.xml", "--attn-json=out/found.json",
    )  # fmt: skip
    result.stdout.fnmatch_lines(
        ["FAILED wrong:attention::attention-causal-float32 - not so: with is_causal it is causal *"]
    )
    result.stdout.fnmatch_lines(["SKIPPED * wrong.py:4: it is not declared to take grouped heads"])
    result.stdout.fnmatch_lines([f"collected {2 * QUICK} items"])
    *_, failed, title, name, diagnosis, picture, left_out, skipped, _ = result.stdout.lines
    assert failed.startswith("FAILED wrong:attention::")
    assert title.strip("= ") == "attention examination"
    assert name == "attention (wrong:attention): 7 of 9 checks failed, " + f"{QUICK - 9} skipped"
    assert fnmatch(diagnosis, DIAGNOSIS)
    assert Path(picture.removeprefix("  picture ").strip()).name == "rows.png"
    assert left_out.startswith("not asked in the quick form: scale_argument, block_lengths, ")
    assert re.fullmatch(rf"\d+ of {2 * QUICK} checks were skipped: -rs says why", skipped)
    text = result.stdout.str()
    assert "FAILED right" not in text
    assert "not asked for" not in text
    assert text.count(diagnosis) == 1
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    junit = (contract.path / "junit.xml").read_text(encoding="utf-8")
    assert 'message="not so: without a mask it is attention, as exactly as its dtype' in junit
    assert "  wrong      " in junit
    assert "<propert" not in junit
    assert "attention examination" not in junit
    right, wrong = subjects_of(contract.path / "out" / "found.json")
    assert (right["passed"], right["where"]) == (True, "right:attention")
    assert right["counts"]["skipped"] + right["counts"]["passed"] == QUICK
    assert (wrong["passed"], wrong["counts"]["failed"]) == (False, 7)
    assert wrong["diagnosis"]["defects"] == ["scale_missing"]
    (plain,) = (result for result in wrong["results"] if result["check"] == "plain")
    assert (plain["status"], plain["dtype"], plain["device"]) == ("failed", "float32", "cpu")
    assert plain["replay"] == "gradients=none dtype=float32 seed=0"
    assert plain["worst"]["tensor"] == "output"
    asked = [result["check"] for result in wrong["results"]]
    assert asked == [check.name for check in CHECKS if check.quick]
    assert list((contract.path / "out").iterdir()) == [contract.path / "out" / "found.json"]


def subjects_of(file):
    """What a file of `--attn-json` says of each subject."""
    data = json.loads(file.read_text(encoding="utf-8"))
    assert data["version"] == 1
    return data["subjects"]


def test_a_crash_is_a_failed_test_and_the_run_goes_on(contract):
    contract.makepyfile(
        crashing="""
        import os
        from torch.nn.functional import scaled_dot_product_attention as sdpa

        def attention(query, key, value, is_causal=False):
            if is_causal:
                os.abort()
            return sdpa(query, key, value)
        """
    )
    result = contract.runpytest(
        "--attn-check=crashing:attention", "--attn-check-quick", "--attn-isolate", "-v"
    )
    result.stdout.fnmatch_lines(["*-plain-float32 PASSED*", "*-causal-float32 FAILED*"])
    result.stdout.fnmatch_lines(["the subject ended its process: SIGABRT (Aborted)"])
    result.stdout.fnmatch_lines(["  because    causal, *: the subject ended its process: *"])
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("options", [(), ("--attn-isolate",)])
def test_what_exits_fails_the_checks_in_which_it_does(contract, options):
    contract.makepyfile(
        exiting="""
        from torch.nn.functional import scaled_dot_product_attention as sdpa

        def attention(query, key, value, is_causal=False):
            if is_causal:
                raise SystemExit(3)
            return sdpa(query, key, value)
        """
    )
    result = contract.runpytest(
        "--attn-check=exiting:attention", "--attn-check-quick", "-v", *options
    )
    result.stdout.fnmatch_lines(["*-plain-float32 PASSED*", "*-causal-float32 FAILED*"])
    result.stdout.fnmatch_lines(["it raised SystemExit: 3 (exiting.py:5)"])
    result.stdout.fnmatch_lines(["  because    causal: it raised SystemExit: 3 (exiting.py:5)"])
    result.stdout.no_fnmatch_line("*Traceback*")
    result.stdout.no_fnmatch_line("*is absent*")


def test_a_check_that_is_broken_off_is_not_said_to_lack_its_device(contract):
    contract.makepyfile(
        breaking="""
        class Stop(BaseException):
            pass

        def attention(query, key, value):
            raise Stop("here")
        """
    )
    result = contract.runpytest("--attn-check=breaking:attention", "--attn-check-quick", "--tb=no")
    result.stdout.fnmatch_lines(["  because    *: the test itself failed"])
    result.stdout.no_fnmatch_line("*is absent*")


def test_files_that_are_named_are_run_as_well(contract):
    contract.makepyfile(test_other="def test_other(): pass")
    result = contract.runpytest(
        "--attn-check=right:attention", "--attn-check-quick", "-v", "test_other.py"
    )
    result.stdout.fnmatch_lines(["test_other.py::test_other PASSED*"])
    result.stdout.fnmatch_lines(["right:attention::*-plain-float32 PASSED*"])


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("right", "--attn-check: got 'right'; accepted is package.module:object"),
        ("nowhere:attention", "--attn-check nowhere:attention: No module named 'nowhere'"),
        ("right:nothing", "*--attn-check right:nothing: module 'right' has no attribute*"),
        ("broken:f", "--attn-check broken:f: importing broken raised ZeroDivisionError: division*"),
        ("declared:f", "*: importing declared raised TypeError: window: got 3; accepted is *"),
    ],
)
def test_what_cannot_be_examined_is_a_usage_error(contract, target, message):
    declared = "import pytest_attnheat as a, torch\nf = a.AttentionSpec(torch.softmax, window=3)"
    contract.makepyfile(broken="1 / 0", declared=declared)
    result = contract.runpytest(f"--attn-check={target}")
    result.stderr.fnmatch_lines([f"*{message}*"])
    assert result.ret == pytest.ExitCode.USAGE_ERROR


@pytest.mark.parametrize("option", ["--attn-check", "--attn-grade"])
def test_a_package_that_cannot_be_imported_is_told_how(pytester, option):
    package = pytester.mkdir("src").joinpath("mine")
    package.mkdir()
    package.joinpath("kernels.py").write_text(RIGHT, encoding="utf-8")
    pytester.makepyfile("def test_it(): pass")
    said = f"ERROR: {option} mine.kernels:attention: No module named 'mine'; it lies in 'src': set "
    result = pytester.runpytest(f"{option}=mine.kernels:attention")
    result.stderr.fnmatch_lines([f"{said}pytest's ini setting pythonpath = src, or install it"])
    result = pytester.runpytest(f"{option}=absent.kernels:attention")
    result.stderr.fnmatch_lines(["*No module named 'absent'; install it, or name the folder *"])
    pytester.makeini("[pytest]\npythonpath = src")
    result = pytester.runpytest(f"{option}=mine.kernels:attention", "--collect-only")
    assert result.ret == pytest.ExitCode.OK


def test_what_is_undeclared_is_looked_for_once_for_each_subject(pytester, monkeypatch):
    from pytest_attnheat.contract import declarations, needs

    asked, look = [], needs.all_undeclared

    def counted(spec):
        asked.append(spec)
        return look(spec)

    for module in (declarations, needs):
        monkeypatch.setattr(module, "all_undeclared", counted)
    pytester.makepyfile(right=RIGHT)
    pytester.inline_run("--attn-check=right:attention", "--attn-check-quick", "--collect-only")
    assert len(asked) == 1


def test_a_usage_error_is_said_where_workers_collect(contract):
    result = contract.runpytest("--attn-check=nowhere:attention", "-n", "1")
    result.stderr.fnmatch_lines(["*--attn-check nowhere:attention: No module named 'nowhere'*"])
    assert result.ret == pytest.ExitCode.USAGE_ERROR


def test_the_options_choose_dtypes_and_devices(contract):
    options = ("--attn-check=right:attention", "--collect-only", "-q")
    some = contract.runpytest(*options, "--attn-dtype=float16", "--attn-device=cpu")
    assert "plain-float16" in some.stdout.str()
    assert "plain-float32" not in some.stdout.str()
    assert "plain-float32" in contract.runpytest(*options).stdout.str()


BOTH_MANNERS = """
    from pytest_attnheat import AttentionSpec, parametrize_with_checks
    from right import attention

    spec = AttentionSpec(attention, name="mine", {declared})

    @parametrize_with_checks([spec], quick=True)
    def test_contract(check):
        check()
"""


@pytest.fixture
def in_both_manners(contract):
    """Run the examination of one specification as a test, and by `--attn-check`."""

    def run(*options, declared=""):
        contract.makepyfile(test_both=BOTH_MANNERS.format(declared=declared))
        return contract.runpytest(
            "test_both.py", "--attn-check=test_both:spec", "--attn-check-quick", "-v", *options
        )

    return run


def test_an_absent_device_skips_the_examination_with_a_reason(in_both_manners):
    result = in_both_manners("--attn-device=cuda:99", "-rs")
    result.assert_outcomes(skipped=2 * QUICK)
    result.stdout.fnmatch_lines(["*::test_contract?mine-plain-float32-cuda:99? SKIPPED*"])
    result.stdout.fnmatch_lines(["*test_both:spec::mine-plain-float32-cuda:99 SKIPPED*"])
    result.stdout.fnmatch_lines(["SKIPPED*attention device 'cuda:99' is absent (present: cpu*)"])
    result.stdout.fnmatch_lines([f"mine (test_both:spec): 0 of 0 checks failed, {QUICK} skipped"])
    result.stdout.fnmatch_lines(["  nothing    was examined; *, the device cuda:99 is absent"])
    assert result.ret == pytest.ExitCode.OK


def test_a_required_device_that_is_absent_fails_the_examination(in_both_manners):
    result = in_both_manners("--attn-device=cuda:99", "--attn-require-device")
    result.assert_outcomes(failed=2 * QUICK)
    said = "attention device 'cuda:99' is absent (present: *), and --attn-require-device is set"
    result.stdout.fnmatch_lines([said])
    result.stdout.fnmatch_lines([f"mine (test_both:spec): {QUICK} of {QUICK} checks failed"])


def test_a_quick_examination_takes_the_first_of_the_selected_dtypes(in_both_manners):
    result = in_both_manners("--attn-dtype=float64,float16", "--attn-device=cpu")
    assert set(result.parseoutcomes()) == {"passed", "skipped"}
    result.stdout.fnmatch_lines(["*::test_contract?mine-plain-float16? PASSED*"])
    result.stdout.fnmatch_lines(["*test_both:spec::mine-plain-float16 PASSED*"])
    assert "float64" not in result.stdout.str()


@pytest.mark.parametrize(
    ("declared", "chosen", "examined"),
    [
        (["cuda"], ["cuda:1"], ["cuda:1"]),
        (["cpu", "cuda:0", "cuda:1"], ["cuda:1", "cuda:2"], ["cuda:1"]),
        (["cuda:0", "cuda:1", "mps"], ["cuda", "cpu"], ["cuda:0", "cuda:1"]),
        (["cuda:10"], ["cuda:1"], []),
        (["cpu", "cuda"], ["cpu", "cuda"], ["cpu", "cuda"]),
    ],
)
def test_a_number_of_a_device_is_kept_whoever_gives_it(declared, chosen, examined):
    assert _in_both(declared, chosen) == examined


@pytest.mark.parametrize(
    ("declared", "option"),
    [
        ("dtypes=('float32',)", "dtype=float16"),
        ("devices=('cpu',)", "device=cuda:99"),
        ("devices=('mps',), dtypes=('float64',)", "device=all"),
    ],
)
def test_what_is_declared_for_nothing_that_is_selected_is_skipped(
    in_both_manners, declared, option
):
    result = in_both_manners(f"--attn-{option}", "-rs", declared=declared)
    result.assert_outcomes(skipped=2 * QUICK)
    result.stdout.fnmatch_lines(["SKIPPED*: selected are *, but it is declared for * and fl*"])


def test_workers_share_the_devices_of_an_examination_and_agree_on_the_ids(contract):
    contract.makeconftest(
        """
        from pytest_attnheat.attention import devices

        devices.visible_devices = lambda: {"cpu": 1, "cuda": 2}
        """
    )
    contract.makepyfile(
        """
        import os
        from pytest_attnheat import AttentionSpec, parametrize_with_checks
        from pytest_attnheat.contract.checks import Check
        from right import attention

        def claims(exam):
            worker = int(os.environ["PYTEST_XDIST_WORKER"][2:])
            assert str(exam.device) == f"cuda:{worker % 2}"

        def never(exam):
            raise AssertionError("never so\\n  detail")

        checks = [Check(f"own_{number}", "it is on its device", claims) for number in range(6)]

        @parametrize_with_checks([AttentionSpec(attention, dtypes=("float32",))], checks=checks)
        def test_contract(check):
            check()

        @parametrize_with_checks([attention], checks=[Check("own", "it is so", never)])
        def test_dtypes(check):
            check()
        """
    )
    options = ("-n", "2", "-p", "no:hypothesispytest", "-p", "no:pytest_mpl")
    result = contract.runpytest_subprocess(
        *options, "--attn-device=cuda", "-v", "--attn-json=found.json"
    )
    result.assert_outcomes(passed=6, failed=4)
    result.stdout.fnmatch_lines(["*-own_0-float32-cuda?*"])
    assert_said_once(result.stdout.str())
    assert result.stdout.str().count("4 of 10 checks failed") == 1
    (told,) = subjects_of(contract.path / "found.json")
    own = [result["dtype"] for result in told["results"] if result["check"] == "own"]
    assert sorted(own) == sorted(DTYPE_NAMES)
    assert told["counts"] == {"passed": 6, "failed": 4, "skipped": 0, "xfailed": 0}


def test_a_test_that_fails_before_its_check_does_not_hide_what_the_others_found(contract):
    contract.makepyfile(
        """
        from pytest_attnheat import parametrize_with_checks
        from right import attention

        @parametrize_with_checks([attention], quick=True)
        def test_contract(check):
            raise RuntimeError("mine")
        """
    )
    result = contract.runpytest()
    result.assert_outcomes(failed=QUICK)
    result.stdout.fnmatch_lines(["  because    *: the test itself failed"])


def test_a_check_that_is_called_again_is_asked_again(contract):
    contract.makepyfile(
        """
        import pytest
        from pytest_attnheat import parametrize_with_checks
        from wrong import attention

        @parametrize_with_checks([attention], quick=True)
        def test_contract(check):
            if "plain" not in check.name:
                return
            for _ in range(2):
                with pytest.raises(AssertionError, match="without a mask it is attention"):
                    check()
        """
    )
    contract.runpytest().assert_outcomes(passed=QUICK)


def test_a_run_without_an_examination_loads_nothing_of_it(pytester):
    pytester.makepyfile(
        """
        import sys

        def test_loaded():
            loaded = {name for name in sys.modules if name.startswith("pytest_attnheat")}
            assert "pytest_attnheat.plugin.fixtures" in loaded
            assert "pytest_attnheat.plugin.examination" not in loaded
            assert not any(name.startswith("pytest_attnheat.contract") for name in loaded)
        """
    )
    result = pytester.runpytest_subprocess("-p", "no:mpl", "-p", "no:hypothesispytest")
    assert result.parseoutcomes() == {"passed": 1}
    assert "attention examination" not in result.stdout.str()


UNASKED = """
from pytest_attnheat import parametrize_with_checks

def refusing(query, key, value):
    raise NotImplementedError("not here")
"""
SAID = "ERROR: nothing was asked of refusing, and what compares nothing fails"


def test_a_run_that_asked_nothing_of_a_subject_fails(pytester):
    marked = """
        @parametrize_with_checks([refusing], quick=True)
        def test_contract(check):
            check()
        """
    pytester.makepyfile(subjects=UNASKED, test_it=UNASKED + textwrap.dedent(marked))
    for run in (["test_it.py"], ["--attn-check=subjects:refusing", "--attn-check-quick"]):
        result = pytester.runpytest(*run)
        assert result.ret == pytest.ExitCode.TESTS_FAILED
        result.assert_outcomes(skipped=QUICK)
        result.stdout.fnmatch_lines([SAID])
    result = pytester.runpytest("test_it.py", "-k", "plain")
    assert result.ret == pytest.ExitCode.OK
    result.stdout.no_fnmatch_line("ERROR:*")


def test_a_block_a_hint_and_what_refuses_are_summarised_without_a_diagnosis(pytester):
    pytester.makepyfile(
        subjects="""
        import torch
        from torch import nn
        from torch.nn.functional import scaled_dot_product_attention as sdpa
        from pytest_attnheat import AttentionSpec

        def hinting(query, key, value, causal=False):
            return sdpa(query, key, value, is_causal=causal)

        def refusing(query, key, value):
            raise NotImplementedError("not here")

        def raising(query, key, value, mask):
            return sdpa(query, key, value, mask)

        def turned(query, key, value):
            return sdpa(*(t.transpose(1, 2) for t in (query, key, value))).transpose(1, 2)

        class Mixing(nn.Module):
            def forward(self, hidden):
                return hidden + hidden.mean(1, keepdim=True)

        torch.manual_seed(0)
        block = AttentionSpec(Mixing().eval(), inputs=torch.randn(2, 9, 16), name="block")
        every = [hinting, refusing, raising, block, turned, sdpa]
        """
    )
    result = pytester.runpytest("--attn-check=subjects:every", "--attn-check-quick", "--tb=no")
    lines = result.stdout.lines
    told = lines[next(i for i, line in enumerate(lines) if "attention examination" in line) + 1 :]
    expected = [
        f"hinting (subjects:every): 0 of 4 checks failed, {QUICK - 4} skipped",
        "  hint       it takes causal=, and the specification does not say what that means: *",
        f"raising (subjects:every): 0 of 0 checks failed, {QUICK} skipped",
        "  nothing    was examined; most often, it needs mask besides query, key and value: *",
        "  hint       it takes mask=, *",
        f"refusing (subjects:every): 0 of 0 checks failed, {QUICK} skipped",
        "  nothing    was examined; most often, the subject refuses: not here",
        "block (subjects:every): 2 of 5 checks failed, 2 skipped",
        "  assumed    not declared: causal='top_left' is assumed, but the code means None: *",
        "  because    no_leakage: assert_no_leakage: 16 of 18 outputs depend on what they must *",
        "  because    decoding: assert_decode_matches_prefill: 16 of 18 *; token 0 decoded *",
        f"turned (subjects:every): 2 of 4 checks failed, {QUICK - 4} skipped",
        "  assumed    not declared: layout='bhld' is assumed, but the code means 'blhd'; *",
    ]
    for line, pattern in zip(told, expected, strict=False):
        assert fnmatch(line, pattern), line
    assert len(told) == len(expected) + 5  # two kinds have quick forms of their own
    assert told[-2].startswith("ERROR: nothing was asked of raising, refusing, and ")
    assert told[-3].endswith("; 2 because a parameter is not declared: --attn-check-strict makes "
                             "that fail")  # fmt: skip


STRICT = """
    from torch.nn.functional import scaled_dot_product_attention as sdpa
    from pytest_attnheat import AttentionSpec

    def windowed(query, key, value, attn_mask=None, is_causal=False, window_size=None):
        return sdpa(query, key, value, attn_mask, is_causal=is_causal)

    undeclared = [sdpa, windowed]
    declared = AttentionSpec(windowed, window=None)
    """


@pytest.mark.parametrize("ini", [False, True])
def test_strict_fails_what_is_skipped_for_want_of_a_declaration(pytester, monkeypatch, ini):
    pytester.makepyfile(strict=STRICT)
    monkeypatch.setenv("CI", "true")  # where pytest prints whole lines
    options = ["-rf", "-k", "window", "--attn-dtype=float32", "--tb=no"]
    if ini:
        pytester.makeini("[pytest]\nattn_check_strict = true\nattn_check =\n    strict:undeclared")
    else:
        options += ["--attn-check=strict:undeclared", "--attn-check-strict"]
    result = pytester.runpytest(*options)
    told = (
        "it takes window_size=, and the specification does not say what that means: AttentionSpec"
    )
    result.stdout.fnmatch_lines(
        [f"FAILED strict:undeclared::windowed-window-float32 - Failed: {told}*"]
    )
    assert result.parseoutcomes()["failed"] == 1
    assert result.stdout.str().count(told) == 2  # of the test, and of what was examined
    if not ini:
        options[-2] = "--attn-check=strict:declared"
        result = pytester.runpytest(*options)
        assert "failed" not in result.parseoutcomes()


def test_strict_fails_where_nothing_can_be_called(pytester):
    pytester.makepyfile(more="def attention(query, key, value, table): raise RuntimeError")
    arguments = ("--attn-check=more:attention", "--attn-dtype=float32", "--attn-check-quick")
    assert "failed" not in pytester.runpytest(*arguments).parseoutcomes()
    assert "passed" not in pytester.runpytest(*arguments, "--attn-check-strict").parseoutcomes()


def test_a_block_that_is_right_inside_is_said_to_be_wrong_outside_at_the_end(pytester):
    pytester.makepyfile(
        subjects="""
        import torch
        from torch import nn
        from torch.nn.functional import scaled_dot_product_attention
        from pytest_attnheat import AttentionSpec

        class Merging(nn.Module):
            def forward(self, hidden):
                heads = hidden.unflatten(-1, (4, 4)).transpose(1, 2)
                return scaled_dot_product_attention(heads, heads, heads, is_causal=True).reshape(
                    hidden.shape
                )

        torch.manual_seed(0)
        block = AttentionSpec(Merging().eval(), inputs=torch.randn(2, 9, 16), name="block")
        """
    )
    result = pytester.runpytest("--attn-check=subjects:block", "--attn-check-quick")
    result.stdout.fnmatch_lines(
        [
            "not so: each output depends on all that it may see, and on that alone*",
            "*what is wrong happens outside of it: in the mask it was given,*",
            "assert_no_leakage: *",
            "block (subjects:block): 2 of 6 checks failed, 1 skipped",
            "  diagnosis  in the call that failed, attention in block, as it was captured, is *"
            "what is wrong happens outside of it: *",
            "  because    no_leakage: assert_no_leakage: *",
        ]
    )


def test_subjects_of_one_name_are_numbered(pytester):
    pytester.makepyfile(
        subjects="""
        from torch.nn.functional import scaled_dot_product_attention as sdpa
        from pytest_attnheat import AttentionSpec

        def sound(query, key, value):
            return sdpa(query, key, value)

        def wrong(query, key, value):
            return sdpa(query, key, value, scale=1.0)

        both = [AttentionSpec(one, name="mine") for one in (sound, wrong)]
        """
    )
    result = pytester.runpytest("--attn-check=subjects:both", "--attn-check-quick", "-v")
    result.stdout.fnmatch_lines(
        ["*::mine-plain-float32 PASSED*", "*::mine-2-plain-float32 FAILED*"]
    )
    result.stdout.fnmatch_lines(["mine-2 (subjects:both): * checks failed, *"])
    assert "mine (subjects:both)" not in result.stdout.str()


def assert_said_once(text):
    """Of four dtypes that fail alike, one has the details, and the others name it."""
    assert [text.count("  detail"), len(re.findall(r"as in [\w-]+: never so", text))] == [1, 3]


@pytest.mark.parametrize("options", [(), ("--tb=short",)])
def test_a_further_dtype_that_fails_alike_takes_one_line_but_in_junit(contract, options):
    contract.makepyfile(
        """
        from pytest_attnheat import parametrize_with_checks
        from pytest_attnheat.contract.checks import Check
        from right import attention

        def claims(examination):
            raise AssertionError("never so\\n  detail")

        check = Check("own", "it is so", claims)

        @parametrize_with_checks([attention], checks=[check])
        def test_contract(check):
            check()
        """
    )
    result = contract.runpytest("--junitxml=junit.xml", *options)
    result.assert_outcomes(failed=4)
    assert_said_once(result.stdout.str())
    junit = (contract.path / "junit.xml").read_text(encoding="utf-8")
    assert [junit.count("  detail"), junit.count("as in ")] == [4, 0]
