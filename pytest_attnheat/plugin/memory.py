"""Tests that run out of memory: what they needed, and how the run goes on."""

from __future__ import annotations

import gc
import re
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import pytest

from ..attention.devices import visible_devices
from ..inputs import readable

_ASKED = re.compile(r"[Tt]ried to allocate ([\d.]+) ?(bytes|[KMG]iB)")
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
# How the allocator of the CPU says it, in an error of no kind of its own.
_OF_CPU = "DefaultCPUAllocator"


def start(item: pytest.Item) -> None:
    """Count from here what a test holds at most."""
    for _, module in _devices():
        module.reset_peak_memory_stats()


def explain(item: pytest.Item, call: pytest.CallInfo[None], report: pytest.TestReport) -> None:
    """Say in a report what a test needed that ran out of memory, and let go of what it held."""
    if call.excinfo is None or not is_out_of_memory(call.excinfo.value):
        return
    report.sections.append(("attention: out of memory", needed(call.excinfo.value)))
    if item.config.getoption("usepdb"):  # who looks into its frames wants to find them
        return
    # The last traceback is kept by the interpreter, and with it all that the test held.
    traceback.clear_frames(call.excinfo.tb)
    gc.collect()
    for _, module in _devices():
        module.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is not enough memory on some device."""
    torch = sys.modules.get("torch")
    if torch is None:
        return False
    of_cpu = isinstance(error, RuntimeError) and _OF_CPU in str(error)
    return of_cpu or isinstance(error, torch.OutOfMemoryError)


def needed(error: BaseException) -> str:
    """Return what a test held on each accelerator at most, and what it asked for besides."""
    found = _ASKED.search(str(error))
    asked = 0 if found is None else int(float(found[1]) * _UNITS[found[2]])
    besides = f"it asked for {readable(asked)} more" if asked else "it does not say for how much"
    held = [
        f"{kind}: the test held {readable(most)} at most, of {readable(whole)}; {besides}"
        for kind, module in _devices()
        if (most := module.max_memory_allocated())
        for whole in [module.mem_get_info()[1]]
    ]
    return "\n".join(held) or f"{'' if _OF_CPU not in str(error) else 'cpu: '}{besides}"


def _devices() -> Iterator[tuple[str, Any]]:
    """The accelerators that this process uses and that count what is held."""
    if "torch" not in sys.modules:
        return
    import torch

    for kind, count in visible_devices().items():
        module = torch.get_device_module(kind) if count and kind != "cpu" else None
        counts = all(
            hasattr(module, name)
            for name in ("max_memory_allocated", "reset_peak_memory_stats", "mem_get_info")
        )
        if counts and getattr(module, "is_initialized", lambda: True)():
            yield kind, module
