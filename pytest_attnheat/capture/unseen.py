"""What looked like attention and was not read: by the modules that ran."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import nn

from pytest_attnheat.capture.layers import Layers
from pytest_attnheat.capture.trace import Trace, Unseen

_NAMED = re.compile(r"attention|attn|mha(?![a-z])", re.IGNORECASE)
_OPERATORS = re.compile(
    r"aten::(scaled_dot_product_attention|softmax|_native_multi_head_attention)"
)


def find_unseen(layers: Layers, trace: Trace) -> Iterator[Unseen]:
    """Name modules that ran in another thread, scripted code, and attention without a record.

    A module whose class is called attention is taken to do attention, unless some is seen in a
    module around it or within it.
    """
    for name, module in layers.elsewhere.items():
        if _is_attention(module) and not _lies_in_one(name, layers.elsewhere):
            yield Unseen(name, _kind(module), "it ran in another thread")
    for name, scripted in layers.scripted.items():
        found = _OPERATORS.search(_graph(scripted))
        if found is not None:
            yield Unseen(name, "a scripted module", f"{found[1]} happens in compiled code")
    for name, module in layers.ran.items():
        if _is_attention(module) and not _accounted_for(name, layers, trace):
            yield Unseen(name, _kind(module), "it ran, and no attention was seen in it")


def _is_attention(module: nn.Module) -> bool:
    return _NAMED.search(type(module).__name__) is not None


def _accounted_for(name: str, layers: Layers, trace: Trace) -> bool:
    if name in trace._within or any(unseen.layer == name for unseen in trace.unseen):
        return True
    # What an attention is made of may be called so too: a projection, an output with dropout.
    around = [outer for outer in trace._within if name.startswith(f"{outer}.")]
    inside = [inner for inner in layers.ran if inner.startswith(f"{name}.")]
    if any(_is_attention(layers.ran[outer]) for outer in around if outer in layers.ran):
        return True
    return any(_is_attention(layers.ran[inner]) for inner in inside)


def _lies_in_one(name: str, others: dict[str, nn.Module]) -> bool:
    around = [module for outer, module in others.items() if name.startswith(f"{outer}.")]
    return any(_is_attention(module) for module in around)


def _graph(module: torch.jit.ScriptModule) -> str:
    try:
        return str(module.inlined_graph)
    except (AttributeError, RuntimeError):  # A module without a forward of its own.
        return ""


def _kind(module: nn.Module) -> str:
    return type(module).__name__
