"""Devices are whatever torch knows: how they are named, how many are here, which a test gets.

Importing this module does not load torch: the options of a run are read before anybody knows
whether a test needs it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..inputs import misuse

if TYPE_CHECKING:
    import torch

ACCEPTED = (
    "cpu, cuda, cuda:N, mps, xpu, npu, hpu, or another device type of torch, with or without :N"
)
# The processor is one; "meta" holds no numbers; "auto" and "all" stand for several devices.
_NAME = r"cpu|(?!(?:cpu|gpu|meta|auto|all)\b)[a-z][a-z0-9_]*(:(0|[1-9][0-9]*))?"
# The accelerators that torch has a name for; one that is registered brings its own.
_KINDS = ("cuda", "mps", "xpu", "hpu", "mtia", "xla")


def check_device(name: str, argument: str = "devices", accepted: str = ACCEPTED) -> str:
    """Return the name of a device, which need not be here: a type, with or without a number."""
    # Whether torch knows the type can only be told once torch is loaded.
    if not re.fullmatch(_NAME, name, re.ASCII):
        hint = "; a GPU is called cuda" if name.startswith("gpu") else ""
        raise ValueError(misuse(argument, repr(name), accepted + hint))
    if "torch" in sys.modules and not _is_known(name):
        got = f"{name!r}, which the torch that is installed does not know"
        known = "a device type that it has, or that an imported package registers with it"
        raise ValueError(misuse(argument, got, known))
    return name


def _is_known(name: str) -> bool:
    import torch

    try:
        torch.device(name)
    except RuntimeError:
        return False
    return True


def visible_devices() -> dict[str, int]:
    """Count the devices that torch can use here, by kind."""
    import torch

    kinds = (*_KINDS, torch._C._get_privateuse1_backend_name())
    return {"cpu": 1, **{kind: _count(kind) for kind in kinds}}


def _count(kind: str) -> int:
    import torch

    try:
        module = torch.get_device_module(kind)
        count = int(getattr(module, "device_count", int)())
    except RuntimeError:  # what would bring it, or count it, is not installed
        return 0
    return max(0, count)  # of mtia, torch 2.6 counts -1


def names_of(devices: Sequence[str], argument: str = "devices") -> list[str]:
    """Return the devices that a choice stands for: names, `("auto",)` or `("all",)`."""
    import torch  # noqa: F401 (for check_device)

    if tuple(devices) == ("auto",):
        return [kind for kind, count in visible_devices().items() if count]
    if tuple(devices) == ("all",):
        return _every_device(visible_devices())
    return [check_device(name, argument) for name in devices]


def _every_device(present: Mapping[str, int]) -> list[str]:
    """Name every device that is present; kinds of which there is only ever one have no number."""
    return [
        kind if kind in ("cpu", "mps") else f"{kind}:{number}"
        for kind, count in present.items()
        for number in range(count)
    ]


def resolve(name: str, *, worker: int = 0, argument: str = "devices") -> torch.device:
    """Return the device that a name stands for; a LookupError if it is absent."""
    # Several workers share out the devices of a kind that is named without a number.
    import torch

    kind, _, index = check_device(name, argument).partition(":")
    present = visible_devices()
    count = present.get(kind, 0)
    number = int(index) if index else worker % max(count, 1)
    if number >= count:
        listed = ", ".join(_every_device(present))
        raise LookupError(f"attention device {name!r} is absent (present: {listed})")
    return torch.device(kind) if kind == "cpu" else torch.device(kind, number)


def fault_of(device: torch.device) -> str:
    """Return in what words a device fails, if it does; "" if it answers."""
    # After a fault of a kernel, a GPU answers its process nothing any more but that.
    import torch

    if device.type == "cpu":
        return ""
    module = torch.get_device_module(device)
    if not hasattr(module, "synchronize") or not module.is_available():
        return ""
    try:
        module.synchronize(device)
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return ""
