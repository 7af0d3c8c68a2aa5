"""Devices are whatever torch knows, under the names that torch has for them."""

from types import SimpleNamespace

import pytest
import torch

from pytest_attnheat.attention.devices import check_device, names_of, resolve, visible_devices
from pytest_attnheat.callables import borrowed


@pytest.mark.parametrize("name", ["cpu", "cuda", "cuda:1", "mps", "mps:0", "xpu:3", "hpu", "mtia"])
def test_every_device_that_torch_has_a_name_for_is_accepted(name):
    assert check_device(name) == name
    assert torch.device(name)


@pytest.mark.parametrize(
    "name", ["gpu", "gpu:0", "quantum", "meta", "cpu:0", "cuda:-1", "auto", ""]
)
def test_another_name_is_refused_with_what_is_accepted(name):
    with pytest.raises(ValueError, match=rf"^devices: got {name!r}; accepted is cpu, cuda, "):
        names_of(["cpu", name])
    with pytest.raises(ValueError, match=rf"^mine: got {name!r}; accepted is cpu, cuda, "):
        resolve(name, argument="mine")


def test_the_cpu_is_there_and_comes_first():
    assert next(iter(visible_devices().items())) == ("cpu", 1)
    assert names_of(("auto",))[0] == names_of(("all",))[0] == "cpu"
    assert resolve("cpu", worker=3) == torch.device("cpu")


def test_an_absent_device_is_told_from_a_wrong_name():
    with pytest.raises(LookupError, match=r"device 'cuda:99' is absent \(present: cpu"):
        resolve("cuda:99")


def test_random_numbers_of_any_device_are_as_they_were(monkeypatch):
    states = {0: "zero", 1: "one"}

    def set_state(state, device):
        states[device] = state

    monkeypatch.setattr(torch.xpu, "get_rng_state", lambda device: states[device])
    monkeypatch.setattr(torch.xpu, "set_rng_state", set_state)
    with borrowed(None, SimpleNamespace(device=torch.device("xpu", 1))):
        states.update({0: "moved", 1: "moved"})
    assert states == {0: "moved", 1: "one"}
