"""What a trace tells besides its records: what was not seen, and what ran differently."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from . import CaptureError
from .trace import Trace, Unseen
from .watching import Layers, original

_NAMED = re.compile(r"attention|attn|mha(?![a-z])", re.IGNORECASE)
_OPERATORS = re.compile(
    r"aten::(scaled_dot_product_attention|softmax|_native_multi_head_attention)"
)


def find_unseen(layers: Layers, trace: Trace) -> Iterator[Unseen]:
    """Name modules that ran in another thread, scripted code, and attention without a record."""
    # A module whose class is called attention is taken to do attention, unless some is seen in a
    # module around it or within it.
    for name, module in layers.elsewhere.items():
        if _is_attention(module) and not _lies_in_one(name, layers.elsewhere):
            yield Unseen(name, type(module).__name__, "it ran in another thread")
    for name, scripted in layers.scripted.items():
        found = _OPERATORS.search(_graph(scripted))
        if found is not None:
            yield Unseen(name, "a scripted module", f"{found[1]} happens in compiled code")
    # What convolves may be called attention, and is none.
    convolves = layers.noted["convolution"] - layers.noted["product"]
    ran = {name: module for name, module in layers.ran.items() if name not in convolves}
    for name, module in ran.items():
        if _is_attention(module) and not _accounted_for(name, ran, trace):
            yield Unseen(name, type(module).__name__, "it ran, and no attention was seen in it")


def _is_attention(module: nn.Module) -> bool:
    return _NAMED.search(type(module).__name__) is not None


def _accounted_for(name: str, ran: dict[str, nn.Module], trace: Trace) -> bool:
    if name in trace._within or any(unseen.layer == name for unseen in trace.unseen):
        return True
    # What an attention is made of may be called so too: a projection, an output with dropout.
    if _lies_in_one(name, {n: module for n, module in ran.items() if n in trace._within}):
        return True
    inside = [module for inner, module in ran.items() if inner.startswith(f"{name}.")]
    return any(map(_is_attention, inside))


def _lies_in_one(name: str, others: dict[str, nn.Module]) -> bool:
    around = [module for outer, module in others.items() if name.startswith(f"{outer}.")]
    return any(map(_is_attention, around))


def _graph(module: torch.jit.ScriptModule) -> str:
    try:
        return str(module.inlined_graph)
    except (AttributeError, RuntimeError):  # A module without a forward of its own.
        return ""


@contextmanager
def compiled_code_set_aside(model: nn.Module | None, trace: Trace) -> Iterator[None]:
    """Run what was compiled as it was written, and note in the trace what that is."""
    # flex_attention compiles a part of itself at each call, even where nobody asked for it.
    compiled = "torch._dynamo" in sys.modules
    if not compiled and "torch.nn.attention.flex_attention" not in sys.modules:
        yield
        return
    names = _compiled_modules(model)
    if not hasattr(torch.compiler, "set_stance"):
        if names:
            raise CaptureError(
                f"capture_attention: {', '.join(names)} is compiled, and torch {torch.__version__} "
                "cannot set that aside (2.6 can); capture the module that was compiled"
            )
        yield
        return
    for name in names:
        trace._change(f"{name}: compiled code was set aside, its Python code ran")
    _ASIDE.enter()
    try:
        yield
    finally:
        _ASIDE.leave()


class _Aside:
    """What is set aside for all threads: by the first capture, until the last one ends."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._captures = 0
        self._stack = ExitStack()

    def enter(self) -> None:
        with self._lock:
            if self._captures == 0:
                self._stack.enter_context(torch.compiler.set_stance("force_eager"))
                self._stack.enter_context(_no_advice_to_compile())
            self._captures += 1

    def leave(self) -> None:
        with self._lock:
            self._captures -= 1
            if self._captures == 0:
                self._stack.close()


_ASIDE = _Aside()


def _compiled_modules(model: nn.Module | None) -> list[str]:
    if model is None:
        return []
    return [
        name or type(original(module)).__name__
        for name, module in model.named_modules()
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
    ]


@contextmanager
def _no_advice_to_compile() -> Iterator[None]:
    """Keep flex_attention from advising to compile what was compiled until we set it aside."""
    flex: Any = sys.modules.get("torch.nn.attention.flex_attention")
    given: set[str] | None = getattr(flex, "_WARNINGS_SHOWN", None)
    advice = "flex_attention_performance"
    if given is None or advice in given:
        yield
        return
    given.add(advice)
    try:
        yield
    finally:
        given.discard(advice)


def may_take_fast_path(module: nn.Module) -> bool:
    """Whether a module may run fused code if nobody watches: PyTorch decides it by the call."""
    if not isinstance(module, nn.TransformerEncoderLayer | nn.MultiheadAttention):
        return False
    wanted = torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters())
    return not module.training and torch.backends.mha.get_fastpath_enabled() and not wanted
