"""The fixtures as a user's test suite sees them."""

import subprocess
import sys
import textwrap

import pytest

from pytest_attnheat.attention import devices as known_devices
from pytest_attnheat.attention.scoring import scoring_names

NAMES = scoring_names()


@pytest.fixture
def devices(monkeypatch):
    """Pretend that other devices are present."""

    def pretend(**present):
        monkeypatch.setattr(known_devices, "visible_devices", lambda: {"cpu": 1, **present})

    return pretend


def ids(pytester, *args):
    result = pytester.runpytest("--collect-only", "-q", *args)
    assert result.ret == 0
    return [line.partition("::")[2] for line in result.outlines if "::" in line]


ATTENTION = """
    def test_a(attention):
        assert attention.weights.shape == (2, 4, 6, 8)
"""


def test_attention_runs_over_every_scoring_function_and_device(pytester, devices):
    pytester.makepyfile(ATTENTION)
    devices(cuda=2, mps=0, xpu=0)
    assert ids(pytester) == [
        f"test_a[{scoring}-{device}]" for device in ("cpu", "cuda") for scoring in NAMES
    ]


def test_attention_holds_what_it_says(pytester):
    pytester.makepyfile("""
        import torch
        from pytest_attnheat import make_attention as make

        def test_a(attention, attention_weights, scoring_function, request):
            assert attention.scoring == request.node.callspec.params["scoring_function"]
            assert attention.scoring_function is scoring_function
            assert attention.weights is attention_weights

        def test_b(attention, attn_device, attn_dtype):
            a = attention
            assert a.query.device == a.device == attn_device == torch.device("cpu")
            assert a.query.dtype == a.dtype == attn_dtype == torch.float32
            same = make(scoring=a.scoring)
            for name in ("query", "key", "value", "scores", "weights", "output"):
                assert torch.equal(getattr(a, name), getattr(same, name))
                assert not getattr(a, name).requires_grad
    """)
    pytester.runpytest().assert_outcomes(passed=2 * len(NAMES))


def test_all_stands_for_the_cpu_and_every_gpu(pytester, devices):
    pytester.makepyfile("def test_a(attn_device): pass")
    devices(cuda=3, mps=1, xpu=0)
    expected = ["test_a[cpu]", "test_a[cuda:0]", "test_a[cuda:1]", "test_a[cuda:2]", "test_a[mps]"]
    assert ids(pytester, "--attn-device=all") == expected


def test_a_device_list_is_taken_in_order_and_once(pytester):
    pytester.makepyfile("def test_a(attn_device): pass")
    expected = ["test_a[cuda:1]", "test_a[cpu]", "test_a[xpu]"]
    assert ids(pytester, "--attn-device", "cuda:1, cpu,xpu,cpu") == expected


def test_the_option_wins_over_the_ini_setting(pytester):
    pytester.makepyfile("def test_a(attn_device): pass")
    pytester.makeini("[pytest]\nattn_device = cpu,mps")
    assert ids(pytester) == ["test_a[cpu]", "test_a[mps]"]
    assert ids(pytester, "--attn-device=xpu") == ["test_a[xpu]"]


@pytest.mark.parametrize("name", ["cuda", "cuda:2", "mps", "xpu:0"])
def test_a_named_device_that_is_absent_skips_with_a_reason(pytester, devices, name):
    pytester.makepyfile("def test_a(attn_device): pass")
    devices(cuda=2 if name == "cuda:2" else 0, mps=0, xpu=0)
    result = pytester.runpytest("-rs", f"--attn-device=cpu,{name}")
    result.assert_outcomes(passed=1, skipped=1)
    present = "cpu, cuda:0, cuda:1" if name == "cuda:2" else "cpu"
    result.stdout.fnmatch_lines(f"*attention device '{name}' is absent (present: {present})*")


@pytest.mark.parametrize("ini", [False, True])
def test_a_required_device_that_is_absent_fails(pytester, devices, ini):
    pytester.makepyfile("def test_a(attention): pass")
    devices(cuda=0)
    if ini:
        pytester.makeini("[pytest]\nattn_require_device = true\nattn_device = cuda")
        result = pytester.runpytest()
    else:
        result = pytester.runpytest("--attn-require-device", "--attn-device=cuda")
    result.assert_outcomes(errors=len(NAMES))
    result.stdout.fnmatch_lines("*'cuda' is absent (present: cpu), and --attn-require-device*")


def test_requiring_devices_asks_for_nothing_that_was_not_named(pytester, devices):
    pytester.makepyfile("def test_a(attn_device): pass")
    devices(cuda=0)
    pytester.runpytest("--attn-require-device").assert_outcomes(passed=1)


def test_a_device_fixture_equals_the_device_of_a_tensor_on_it(pytester, devices):
    pytester.makepyfile("""
        import torch

        def test_a(attn_device, request):
            kind = request.node.callspec.params["attn_device"]
            expected = {"cuda": ("cuda", 0), "cuda:1": ("cuda", 1), "cpu": ("cpu", None)}[kind]
            assert (attn_device.type, attn_device.index) == expected
    """)
    devices(cuda=2)
    pytester.runpytest("--attn-device=cpu,cuda,cuda:1").assert_outcomes(passed=3)


SHARED_GPUS = """
    from pytest_attnheat.attention import devices

    devices.visible_devices = lambda: {"cpu": 1, "cuda": 2}
"""


ON_WORKERS = {
    "conftest.py": SHARED_GPUS,
    "test_gpus.py": """
        import os
        import pytest

        @pytest.mark.parametrize("n", range(6))
        def test_a(attn_device, n):
            worker = int(os.environ["PYTEST_XDIST_WORKER"][2:])
            expected = worker % 2 if attn_device.type == "cuda" else None
            assert attn_device.index == expected

        @pytest.mark.attention(dtype=["float32", "bfloat16"])
        def test_b(attn_device, attn_dtype):
            pass
    """,
    "test_numbers.py": """
        import os
        import pytest

        @pytest.mark.parametrize("n", range(6))
        @pytest.mark.parametrize("attn_device", ["cpu"], indirect=True)
        @pytest.mark.attention(scoring="additive")
        def test_c(attention, n):
            print("ON", os.environ["PYTEST_XDIST_WORKER"])
            print("SUM", attention.output.sum().item(), attention.scores.sum().item())
    """,
}


@pytest.fixture(scope="module")
def on_workers(tmp_path_factory):
    """The lines of one run on two workers."""
    folder = tmp_path_factory.mktemp("on_workers")
    for name, text in ON_WORKERS.items():
        (folder / name).write_text(textwrap.dedent(text), encoding="utf-8")
    light = ["-p", "no:hypothesispytest", "-p", "no:pytest_mpl"]  # each worker loads all plugins
    command = [sys.executable, "-m", "pytest", "-n", "2", "-v", "-rA", *light]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    return run.stdout.splitlines()


def test_xdist_workers_share_the_gpus_and_agree_on_the_ids(on_workers):
    passed = {line.split()[1] for line in on_workers if line.startswith("PASSED ")}
    assert len({name for name in passed if name.startswith("test_gpus.py")}) == 12 + 4
    assert "test_gpus.py::test_b[cuda-bfloat16]" in passed
    assert not any(line.startswith(("FAILED ", "ERROR ")) for line in on_workers)


def test_numbers_are_equal_on_every_worker(on_workers):
    assert len([line for line in on_workers if line.startswith("PASSED test_numbers.py")]) == 6
    assert len({line for line in on_workers if line.startswith("ON ")}) > 1
    assert len({line for line in on_workers if line.startswith("SUM ")}) == 1


def test_one_dtype_is_no_part_of_the_id_and_several_are(pytester):
    pytester.makepyfile("""
        import pytest
        import torch

        pytestmark = pytest.mark.attention(scoring="additive")

        def test_a(attention, attn_dtype):
            assert attention.dtype == attn_dtype == attention.scores.dtype

        @pytest.mark.attention(dtype=torch.float64)
        def test_b(attention):
            assert attention.dtype == torch.float64

        @pytest.mark.attention(dtype=["float16"])
        def test_c(attn_dtype):
            assert attn_dtype == torch.float16

        @pytest.mark.attention(dtype=[torch.bfloat16, "float32", "bfloat16"])
        def test_d(attention):
            assert attention.weights.dtype in (torch.bfloat16, torch.float32)
    """)
    alone = ["test_b[additive-cpu]", "test_c"]
    several = ["test_d[additive-cpu-bfloat16]", "test_d[additive-cpu-float32]"]
    assert sorted(ids(pytester, "--attn-device=cpu")) == ["test_a[additive-cpu]", *alone, *several]
    options = ("--attn-device=cpu", "--attn-dtype=float16, float64")
    both = ["test_a[additive-cpu-float16]", "test_a[additive-cpu-float64]"]
    assert sorted(ids(pytester, *options)) == [*both, *alone, *several]
    pytester.runpytest(*options).assert_outcomes(passed=6)


def test_the_nearest_marker_wins_keyword_by_keyword(pytester):
    pytester.makepyfile("""
        import pytest

        pytestmark = pytest.mark.attention(scoring="additive", batch=1, heads=1)

        @pytest.mark.attention(heads=2, query_len=3)
        class TestA:
            @pytest.mark.attention(query_len=5, key_len=7, value_dim=2, mask="padding", seed=9)
            def test_a(self, attention):
                assert attention.scoring == "additive"
                assert attention.weights.shape == (1, 2, 5, 7)
                assert attention.output.shape == (1, 2, 5, 2)
                assert attention.mask.shape == (1, 1, 1, 7)
                assert attention.seed == 9

            @pytest.mark.attention(scoring=["bilinear", "dot_product", "bilinear"])
            @pytest.mark.attention(kind="hard", head_dim=3)
            def test_b(self, attention, make_attention):
                assert attention.query.shape == (1, 2, 3, 3)
                assert attention.weights.unique().tolist() == [0, 1]
                assert make_attention(scoring="additive", heads=5).query.shape == (1, 5, 3, 3)
    """)
    assert ids(pytester) == [
        "TestA::test_a[additive-cpu]",
        "TestA::test_b[bilinear-cpu]",
        "TestA::test_b[dot_product-cpu]",
    ]
    pytester.runpytest().assert_outcomes(passed=3)


def test_make_attention_follows_marker_device_dtype_and_seed(pytester):
    pytester.makepyfile("""
        import pytest
        import torch
        from pytest_attnheat import make_attention as make

        @pytest.mark.attention(scoring="bilinear", dtype="float64", key_len=5)
        def test_a(make_attention):
            case = make_attention(query_len=3, mask="padding")
            same = make(
                scoring="bilinear", dtype="float64", key_len=5, query_len=3, mask="padding", seed=4
            )
            assert torch.equal(case.output, same.output)
            assert make_attention(seed=1, dtype="float32", scoring="additive").seed == 1

        def test_b(make_attention, scoring_function, request):
            case = make_attention(scoring=scoring_function)
            assert case.scoring == request.node.callspec.params["scoring_function"]
            assert make_attention().scoring == "scaled_dot_product"
    """)
    pytester.runpytest("--attn-seed=4", "--attn-device=cpu").assert_outcomes(passed=1 + len(NAMES))


def test_the_marker_declares_features_of_attention_for_all_scoring_functions(pytester):
    pytester.makepyfile("""
        import pytest
        import torch
        from pytest_attnheat import assert_row_stochastic, make_attention as make

        pytestmark = pytest.mark.attention(causal=True, alignment="bottom_right", sinks=True)

        @pytest.mark.attention(softcap=2.0, alibi=True, documents=2, window=(3, None))
        def test_a(attention, make_attention):
            declared = dict(causal=True, alignment="bottom_right", sinks=True, softcap=2.0)
            declared |= dict(alibi=True, documents=2, window=(3, None))
            same = make(scoring=attention.scoring, **declared)
            assert torch.equal(attention.weights, same.weights)
            assert_row_stochastic(torch.cat([attention.weights, attention.sink_weights], -1))
            assert make_attention(softcap=None).softcap is None

        @pytest.mark.attention(sinks=False)
        def test_b(attention):
            assert attention.sinks is None
            assert_row_stochastic(attention.weights)
    """)
    pytester.runpytest("--attn-device=cpu").assert_outcomes(passed=2 * len(NAMES))


@pytest.mark.parametrize(
    ("marked", "said"),
    [
        ("softcap=-1", "softcap: got -1; accepted is a number above 0, or None"),
        ("window=(1,)", "window: got (1,); accepted is a pair (left, right)"),
        ("sinks='yes'", "sinks: got 'yes'; accepted is a tensor or list of numbers"),
        (
            "soft_cap=2",
            "keyword of the attention marker: got 'soft_cap'; accepted is one of 'scoring', ",
        ),
    ],
)
def test_a_wrong_feature_is_an_error_at_collection(pytester, marked, said):
    pytester.makepyfile(f"""
        import pytest

        @pytest.mark.attention({marked})
        def test_a(attention): pass
    """)
    result = pytester.runpytest("--collect-only")
    result.assert_outcomes(errors=1)
    assert said in result.stdout.str()


def test_the_seed_comes_from_marker_then_option_then_ini(pytester, monkeypatch):
    pytester.makepyfile("""
        import os
        import pytest
        import torch
        from pytest_attnheat import make_attention as make

        def check(attention, seed):
            assert attention.seed == seed
            expected = make(scoring=attention.scoring, seed=seed)
            assert torch.equal(attention.scores, expected.scores)

        def test_a(attention):
            check(attention, int(os.environ["EXPECTED"]))

        @pytest.mark.attention(seed=7)
        def test_b(attention):
            check(attention, 7)
    """)
    pytester.makeini("[pytest]\nattn_seed = 5")
    monkeypatch.setenv("EXPECTED", "5")
    pytester.runpytest().assert_outcomes(passed=2 * len(NAMES))
    monkeypatch.setenv("EXPECTED", "6")
    pytester.runpytest("--attn-seed=6").assert_outcomes(passed=2 * len(NAMES))


def test_several_scoring_functions_are_not_silently_cut_to_one(pytester):
    pytester.makepyfile("""
        import pytest

        pytestmark = pytest.mark.attention(scoring=["additive", "bilinear"])

        def test_a(make_attention):
            with pytest.raises(ValueError, match="lists several for scoring.*scoring_function"):
                make_attention()
            assert make_attention(scoring="additive").scoring == "additive"

        def test_b(request):
            with pytest.raises(ValueError, match="lists several for scoring"):
                request.getfixturevalue("attention")
    """)
    pytester.runpytest().assert_outcomes(passed=2)


def test_fixtures_asked_for_by_name_at_run_time_have_defaults(pytester):
    pytester.makepyfile("""
        import pytest
        import torch

        def test_a(request):
            case = request.getfixturevalue("attention")
            assert case.scoring == "scaled_dot_product"
            assert (case.device, case.dtype) == (torch.device("cpu"), torch.float16)

        @pytest.mark.attention(scoring=["additive"], dtype="float64")
        def test_b(request):
            case = request.getfixturevalue("attention")
            assert (case.scoring, case.dtype) == ("additive", torch.float64)
    """)
    result = pytester.runpytest("--attn-dtype=float16,float32")
    result.assert_outcomes(passed=2)


def test_usefixtures_and_fixtures_of_ones_own_parametrise_too(pytester):
    pytester.makepyfile("""
        import pytest

        @pytest.fixture
        def doubled(attention):
            return attention.weights * 2

        def test_a(doubled): pass

        @pytest.mark.usefixtures("attention")
        def test_b(): pass
    """)
    pytester.runpytest("--attn-device=cpu").assert_outcomes(passed=2 * len(NAMES))


def test_a_fixture_of_module_scope_can_use_the_device(pytester):
    pytester.makepyfile("""
        import pytest

        made = []

        @pytest.fixture(scope="module")
        def model(attn_device):
            made.append(attn_device.type)
            return attn_device

        def test_a(model, attention): pass
        def test_b(model, attn_device): assert model == attn_device
        def test_c(): assert made == ["cpu"]
    """)
    count = len(NAMES)
    result = pytester.runpytest("--attn-device=cpu,cuda:9")
    result.assert_outcomes(passed=count + 2, skipped=count + 1)


@pytest.mark.parametrize("indirect", [False, True])
def test_what_the_user_parametrises_is_left_to_the_user(pytester, indirect):
    pytester.makepyfile(f"""
        import pytest
        import torch

        @pytest.mark.parametrize("scoring_function", ["additive"], indirect={indirect})
        @pytest.mark.parametrize("attn_device", ["cpu"], indirect={indirect})
        @pytest.mark.parametrize("attn_dtype", ["float16", "float64"], indirect={indirect})
        def test_a(attention, scoring_function):
            assert attention.scoring == "additive"
            assert attention.device == torch.device("cpu")
            assert attention.dtype in (torch.float16, torch.float64)
    """)
    assert ids(pytester) == ["test_a[float16-cpu-additive]", "test_a[float64-cpu-additive]"]
    pytester.runpytest().assert_outcomes(passed=2)


def test_parametrising_by_hook_is_left_to_the_user_too(pytester):
    pytester.makepyfile("""
        def pytest_generate_tests(metafunc):
            metafunc.parametrize("scoring_function", ["bilinear"], indirect=True)

        def test_a(attention):
            assert attention.scoring == "bilinear"
    """)
    assert ids(pytester) == ["test_a[bilinear-cpu]"]


def test_a_wrong_device_parameter_lists_the_devices(pytester):
    pytester.makepyfile("""
        import pytest

        @pytest.mark.parametrize("attn_device", ["auto", "gpu", "cpu,cuda"], indirect=True)
        def test_a(attn_device): pass
    """)
    result = pytester.runpytest()
    result.assert_outcomes(errors=3)
    result.stdout.fnmatch_lines("*ValueError: attn_device: got 'gpu'; accepted is cpu, cuda*")


def test_a_users_own_fixture_replaces_ours_and_may_give_a_name(pytester):
    pytester.makepyfile(
        test_name="""
        import pytest

        @pytest.fixture
        def scoring_function():
            return "additive"

        def test_a(attention):
            assert attention.scoring == "additive"
        """,
        test_callable="""
        import pytest

        @pytest.fixture(params=[1.0, 2.0])
        def scoring_function(request):
            def scaled(query, key):
                return request.param * query @ key.mT
            return scaled

        def test_a(attention, scoring_function):
            assert attention.scoring == "scaled"
            assert attention.scoring_function is scoring_function
        """,
        test_wrapped="""
        import pytest

        @pytest.fixture
        def scoring_function(scoring_function):
            def doubled(query, key):
                return 2 * scoring_function(query, key)
            return doubled

        def test_a(attention):
            assert attention.scoring == "doubled"
        """,
    )
    expected = ["test_a[1.0-cpu]", "test_a[2.0-cpu]", "test_a[cpu]"]
    wrapped = [f"test_a[{name}-cpu]" for name in NAMES]
    assert sorted(ids(pytester, "--attn-device=cpu")) == sorted([*expected, *wrapped])
    pytester.runpytest("--attn-device=cpu").assert_outcomes(passed=3 + len(NAMES))


def test_a_test_that_asks_for_nothing_is_left_alone(pytester):
    pytester.makepyfile("def test_a(tmp_path): pass")
    assert ids(pytester, "--attn-device=cpu,cuda", "--attn-dtype=float16,float32") == ["test_a"]


def test_unittest_and_doctest_items_are_left_alone(pytester):
    pytester.makepyfile("""
        import unittest

        def doubled(x):
            '''
            >>> doubled(2)
            4
            '''
            return 2 * x

        class TestA(unittest.TestCase):
            def test_a(self):
                pass
    """)
    pytester.runpytest("--doctest-modules").assert_outcomes(passed=2)


def test_attention_reaches_an_accelerator_with_the_numbers_of_the_cpu(pytester, accelerator):
    pytester.makepyfile("""
        import torch
        from pytest_attnheat import make_attention as make

        def test_a(attention, scoring_function, attn_device):
            assert attention.weights.device == attention.device == attn_device
            assert torch.equal(attention.key.cpu(), make().key)
            assert torch.equal(scoring_function(attention.query, attention.key), attention.scores)
    """)
    options = (f"--attn-device={accelerator}", "--attn-require-device")
    pytester.runpytest(*options).assert_outcomes(passed=len(NAMES))
