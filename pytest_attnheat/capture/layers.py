"""Which layer of a model is running: a stack of module names."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from pytest_attnheat.capture import watching

# (module, its name, positional arguments, keywords)
Entered = Callable[[nn.Module, str, tuple[Any, ...], dict[str, Any]], None]


class Layers:
    """The modules of one model that are running, innermost last.

    It listens with hooks on each module. Scripted modules take none: they are taken to have run
    where the module around them ran.

    Attributes:
        ran: The modules that ran in the thread of the capture, by name, in order.
        elsewhere: Those that ran in other threads, in which nobody watched.
        hooked: Those that had hooks before.
    """

    def __init__(self, model: nn.Module | None, entered: Entered) -> None:
        self.ran: dict[str, nn.Module] = {}
        self.elsewhere: dict[str, nn.Module] = {}
        self.hooked: set[nn.Module] = set()
        self._modules: dict[str, nn.Module] = {}
        self._top: nn.Module | None = None
        if model is not None:
            self._top = top = original(model)
            named = top.named_modules()
            self._modules = {name or type(top).__name__: module for name, module in named}
        self._entered = entered
        self._thread = threading.get_ident()
        self._running: list[str] = []
        self._handles: list[RemovableHandle] = []

    def start(self) -> None:
        """Begin to listen."""
        for name, module in self._modules.items():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            if module._forward_hooks or module._forward_pre_hooks:
                self.hooked.add(module)
            enter, leave = self._hooks(name)
            self._handles += [
                module.register_forward_pre_hook(enter, with_kwargs=True),
                module.register_forward_hook(leave, always_call=True),
            ]

    def stop(self) -> None:
        """Stop listening."""
        while self._handles:
            self._handles.pop().remove()

    @property
    def current(self) -> str | None:
        """The innermost module that is running; None outside of the model."""
        if not self._modules:
            return ""
        return self._running[-1] if self._running else None

    @property
    def training(self) -> bool:
        """Whether that module is in training mode."""
        return bool(self._running) and self.ran[self._running[-1]].training

    @property
    def running(self) -> tuple[str, ...]:
        """All that are running, outermost first."""
        return tuple(self._running)

    @property
    def scripted(self) -> dict[str, torch.jit.ScriptModule]:
        """The scripted modules that lie in a module that ran, or are the model itself."""
        found = {}
        for name, module in self._modules.items():
            outer = self._modules.get(name.rpartition(".")[0], self._top)
            if not isinstance(module, torch.jit.ScriptModule):
                continue
            inside_another = isinstance(outer, torch.jit.ScriptModule) and outer is not module
            if not inside_another and (module is self._top or outer in self.ran.values()):
                found[name] = module
        return found

    def _hooks(self, name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if threading.get_ident() != self._thread:
                # Else a capture of that thread sees it, or a backward pass runs it again.
                if watching.current() is None and not watching.in_backward():
                    self.elsewhere.setdefault(name, module)
                return
            self._running.append(name)
            self.ran.setdefault(name, module)
            self._entered(module, name, args, kwargs)

        def leave(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
            if threading.get_ident() != self._thread or name not in self._running:
                return
            # An exception in another pre-hook leaves modules on the stack that are never left.
            while self._running.pop() != name:
                pass

        return enter, leave


def original(model: nn.Module) -> nn.Module:
    """Return the module that `torch.compile` wrapped, or the module itself."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model
