"""A test that runs out of memory says what it needed, lets go of it, and the run goes on."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

from pytest_attnheat.plugin import memory

LIGHT = ("-p", "no:hypothesispytest", "-p", "no:pytest_mpl")
SAID = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 8.00 GiB"


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of 8 GB that counts what is held, and how often it was told to let go."""
    told = []
    module = SimpleNamespace(
        reset_peak_memory_stats=lambda: told.append("reset"),
        max_memory_allocated=lambda: 6 * 10**9,
        mem_get_info=lambda: (10**9, 8 * 10**9),
        empty_cache=lambda: told.append("empty"),
    )
    monkeypatch.setattr(memory, "visible_devices", lambda: {"cpu": 1, "cuda": 1, "mps": 0})
    monkeypatch.setattr(torch, "get_device_module", {"cuda": module}.__getitem__)
    return told


def test_it_is_said_what_was_held_and_what_was_asked_for(gpu):
    text = memory.needed(torch.OutOfMemoryError(SAID))
    assert text == "cuda: the test held 6 GB at most, of 8 GB; it asked for 2.68 GB more"


def test_a_cpu_that_runs_out_of_memory_is_told_as_well():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    assert memory.is_out_of_memory(caught.value)
    assert memory.needed(caught.value) == "cpu: it asked for 4e+06 GB more"
    assert not memory.is_out_of_memory(RuntimeError("no"))


def test_what_the_test_held_is_let_go(gpu):
    class Held:
        pass

    alive = []

    def body():
        held = Held()
        alive.append(weakref.ref(held))
        raise torch.OutOfMemoryError(SAID)

    call = pytest.CallInfo.from_call(body, "call")
    item = SimpleNamespace(config=SimpleNamespace(getoption=lambda name: False))
    report = SimpleNamespace(sections=[])
    assert alive[0]() is not None
    memory.explain(item, call, report)
    gc.collect()
    assert alive[0]() is None
    assert report.sections[0][0] == "attention: out of memory"
    assert gpu == ["empty"]


def test_the_run_goes_on(pytester):
    pytester.makepyfile(
        f"""
        import torch

        def test_a():
            raise torch.OutOfMemoryError({SAID!r})

        def test_b(): pass
        """
    )
    result = pytester.runpytest_inprocess(*LIGHT)
    result.assert_outcomes(failed=1, passed=1)
    result.stdout.fnmatch_lines(["*attention: out of memory*", "it asked for 2.68 GB more"])


def test_a_marker_chooses_devices(pytester):
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.attention(devices="all")
        def test_a(attn_device): pass

        @pytest.mark.attention(devices=["cpu", "cuda:7"])
        def test_b(attention): pass
        """
    )
    result = pytester.runpytest_inprocess("-v", "-k", "not bilinear and not additive", *LIGHT)
    result.stdout.fnmatch_lines(["*::test_a?cpu? PASSED*", "*::test_b?*cuda:7* SKIPPED*"])


@pytest.mark.parametrize("devices", ["gpu", 3, ["all", "cpu"]])
def test_another_device_of_a_marker_is_an_error_at_collection(pytester, devices):
    pytester.makepyfile(
        f"""
        import pytest

        @pytest.mark.attention(devices={devices!r})
        def test_a(attn_device): pass
        """
    )
    result = pytester.runpytest_inprocess(*LIGHT)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*test_a: the attention marker's devices: got *; accepted is *"])
