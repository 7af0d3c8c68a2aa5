"""Which layer of a model is running: a stack of module names per thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)


class Layers:
    """The modules of one model that are running, innermost last.

    It listens with hooks that PyTorch calls for every module: none is put on the model, since a
    hook on a module switches fused code off.

    Attributes:
        ran: The modules that ran in the thread of the capture, by name, in order.
        elsewhere: The names of those that ran in other threads.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self.names: dict[int, str] = {}
        self.ran: dict[str, nn.Module] = {}
        self.elsewhere: dict[str, nn.Module] = {}
        self._model = model
        if model is not None:
            inner = original(model)
            for name, module in inner.named_modules():
                self.names.setdefault(id(module), name or type(inner).__name__)
        self._thread = threading.get_ident()
        self._running: list[str] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self.entered: Callable[[nn.Module, str, tuple[Any, ...]], None] | None = None

    def start(self) -> None:
        """Begin to listen."""
        if self._model is None:
            return
        self._handles = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]

    def stop(self) -> None:
        """Stop listening."""
        while self._handles:
            self._handles.pop().remove()

    @property
    def current(self) -> str | None:
        """The innermost module that is running; None outside of the model."""
        if self._model is None:
            return ""
        return self._running[-1] if self._running else None

    @property
    def running(self) -> tuple[str, ...]:
        """All that are running, outermost first."""
        return tuple(self._running)

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        name = self.names.get(id(module))
        if name is None:
            return
        if threading.get_ident() != self._thread:
            self.elsewhere.setdefault(name, module)
            return
        self._running.append(name)
        self.ran.setdefault(name, module)
        if self.entered is not None:
            self.entered(module, name, args)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        name = self.names.get(id(module))
        if name is None or threading.get_ident() != self._thread or name not in self._running:
            return
        # An exception in a pre-hook leaves modules on the stack that are never left.
        while self._running.pop() != name:
            pass


def original(model: nn.Module) -> nn.Module:
    """Return the module that `torch.compile` wrapped, or the module itself."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model
