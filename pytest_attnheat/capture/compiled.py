"""Code that `torch.compile` made is set aside while a capture runs: nothing is seen inside it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from pytest_attnheat.capture import CaptureError
from pytest_attnheat.capture.layers import original
from pytest_attnheat.capture.trace import Trace


@contextmanager
def compiled_code_set_aside(model: nn.Module | None, trace: Trace) -> Iterator[None]:
    """Run what was compiled as it was written, and note in the trace what that is.

    flex_attention compiles a part of itself at each call, even where nobody asked for it.

    Raises:
        CaptureError: A module is compiled, and this PyTorch cannot set that aside.
    """
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
