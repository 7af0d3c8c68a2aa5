"""Devices are whatever torch knows, under the names that torch has for them."""

from types import SimpleNamespace

import pytest
import torch

from pytest_attnheat.attention.devices import check_device, names_of, resolve, visible_devices
from pytest_attnheat.callables import borrowed
from pytest_attnheat.plugin.settings import _number_of

# What a process of pytest need not load: it takes as long as the rest.
LIGHT = ("-p", "no:hypothesispytest", "-p", "no:pytest_mpl")


@pytest.mark.parametrize("name", ["cpu", "cuda", "cuda:1", "mps", "mps:0", "xpu:3", "hpu", "mtia"])
def test_every_device_that_torch_has_a_name_for_is_accepted(name):
    assert check_device(name) == name
    assert torch.device(name)


@pytest.mark.parametrize("name", ["gpu", "gpu:0", "meta", "cpu:0", "cuda:-1", "auto", ""])
def test_another_name_is_refused_with_what_is_accepted(name):
    with pytest.raises(ValueError, match=rf"^devices: got {name!r}; accepted is cpu, cuda, "):
        names_of(["cpu", name])
    with pytest.raises(ValueError, match=rf"^mine: got {name!r}; accepted is cpu, cuda, "):
        resolve(name, argument="mine")


def test_a_device_type_that_torch_lacks_is_told_from_a_wrong_name():
    got = "'quantum:1', which the torch that is installed does not know; accepted is a device type"
    with pytest.raises(ValueError, match=f"^devices: got {got} that it has, or "):
        names_of(["cpu", "quantum:1"])


def test_the_cpu_is_there_and_comes_first():
    assert next(iter(visible_devices().items())) == ("cpu", 1)
    assert names_of(("auto",))[0] == names_of(("all",))[0] == "cpu"
    assert resolve("cpu", worker=3) == torch.device("cpu")


def test_an_absent_device_is_told_from_a_wrong_name():
    with pytest.raises(LookupError, match=r"device 'cuda:99' is absent \(present: cpu"):
        resolve("cuda:99")


def test_a_kind_of_which_torch_counts_minus_one_is_absent(monkeypatch):
    module = SimpleNamespace(device_count=lambda: -1)
    monkeypatch.setattr("torch.get_device_module", lambda kind: module)
    assert names_of(("auto",)) == names_of(("all",)) == ["cpu"]


REGISTERED = """
    import torch

    class Module:
        @staticmethod
        def device_count():
            return 2

    torch.utils.rename_privateuse1_backend("pretend")
    torch._register_device_module("pretend", Module)
"""


def test_a_registered_device_type_is_one_like_the_others(pytester):
    pytester.makeconftest(REGISTERED)
    pytester.makepyfile(
        """
        from pytest_attnheat.attention.devices import names_of

        def test_a(attn_device, request):
            name = request.node.callspec.params["attn_device"]
            expected = {"cpu": "cpu", "pretend": "pretend:0", "pretend:1": "pretend:1"}
            assert str(attn_device) == expected[name]

        def test_auto():
            assert names_of(("auto",)) == ["cpu", "pretend"]
        """
    )
    options = ("--attn-device=cpu,pretend,pretend:1,pretend:7", "-v", "-rs", *LIGHT)
    result = pytester.runpytest_subprocess(*options)
    result.assert_outcomes(passed=4, skipped=1)
    result.stdout.fnmatch_lines(["*::test_a?pretend? PASSED*"])
    result.stdout.fnmatch_lines(["*'pretend:7' is absent (present: cpu, pretend:0, pretend:1)*"])


def test_a_type_that_torch_turns_out_not_to_know_is_an_error_at_collection(pytester):
    pytester.makepyfile(
        test_fixture="def test_a(attn_device): pass",
        test_checks="""
        from torch.nn.functional import scaled_dot_product_attention
        from pytest_attnheat import parametrize_with_checks

        @parametrize_with_checks([scaled_dot_product_attention])
        def test_a(check): check()
        """,
    )
    result = pytester.runpytest_subprocess("--attn-device=quantum", *LIGHT)
    result.assert_outcomes(errors=2)
    said = "got 'quantum', which the torch that is installed does not know; accepted is *"
    result.stdout.fnmatch_lines([f"test_checks.py::test_a: attn_device: {said}"])
    result.stdout.fnmatch_lines([f"test_fixture.py::test_a: attn_device: {said}"])


def test_random_numbers_of_any_device_are_as_they_were(monkeypatch):
    states = {0: "zero", 1: "one"}

    def set_state(state, device):
        states[device] = state

    monkeypatch.setattr(torch.xpu, "get_rng_state", lambda device: states[device])
    monkeypatch.setattr(torch.xpu, "set_rng_state", set_state)
    with borrowed(None, SimpleNamespace(device=torch.device("xpu", 1))):
        states.update({0: "moved", 1: "moved"})
    assert states == {0: "moved", 1: "one"}


@pytest.mark.parametrize(("worker", "number"), [("gw0", 0), ("gw12", 12), ("abc", 0), ("gw-1", 0)])
def test_a_worker_that_a_user_named_is_a_worker_as_well(worker, number):
    assert _number_of(worker) == number
