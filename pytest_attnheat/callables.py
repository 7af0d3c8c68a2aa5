"""Code under test: which modules it holds, and how it is left as it was found."""

from __future__ import annotations

import functools
import inspect
import random
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# How far modules are looked for in what a callable refers to.
_DEPTH = 3


def modules_in(subject: object) -> list[nn.Module]:
    """Return the modules that a callable is or holds, as far as they can be found.

    Looked into are partials, bound methods, the variables that a function
    refers to, and the attributes of an object.
    """
    found: dict[int, nn.Module] = {}
    _collect(subject, found, _DEPTH)
    return list(found.values())


def _collect(subject: object, found: dict[int, nn.Module], depth: int) -> None:
    if isinstance(subject, nn.Module):
        found[id(subject)] = subject
    elif depth > 0 and not isinstance(subject, (type, types.ModuleType, Tensor)):
        for part in _parts(subject):
            _collect(part, found, depth - 1)


def _parts(subject: object) -> Sequence[object]:
    if isinstance(subject, functools.partial):
        return [subject.func, *subject.args, *subject.keywords.values()]
    if isinstance(subject, types.MethodType):
        return [subject.__self__]
    if isinstance(subject, types.FunctionType):
        variables = inspect.getclosurevars(subject)
        return [*variables.nonlocals.values(), *variables.globals.values()]
    if isinstance(subject, Mapping):
        return list(subject.values())
    if isinstance(subject, (list, tuple)):
        return subject
    return (
        list(vars(subject).values()) if callable(subject) and hasattr(subject, "__dict__") else []
    )


@contextmanager
def borrowed(subject: object, *tensors: Tensor, seed: int = 0) -> Iterator[None]:
    """Use a subject and leave it as it was found.

    Restored afterwards, also after an exception: training or evaluation mode
    and the buffers of its modules, and the random state of Python, NumPy, the
    CPU and the devices of `tensors`. Random numbers within are drawn from `seed`.
    """
    modules = [part for module in modules_in(subject) for part in module.modules()]
    modes = [(module, module.training) for module in modules]
    buffers = [_Buffer(module, name) for module in modules for name in module._buffers]
    python, numpy = random.getstate(), np.random.get_state()
    with ExitStack() as forked:
        forked.enter_context(torch.random.fork_rng(devices=[]))  # that of the CPU
        for device in {t.device for t in tensors}:
            if hasattr(getattr(torch, device.type, None), "get_rng_state"):
                index = [device.index or 0]
                forked.enter_context(torch.random.fork_rng(index, device_type=device.type))
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            for module, mode in modes:
                module.training = mode
            for buffer in buffers:
                buffer.restore()


class _Buffer:
    """A buffer of a module, for instance the running mean of a batch norm."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self._module, self._name = module, name
        self._tensor = module._buffers[name]
        self._copy = None if self._tensor is None else self._tensor.detach().clone()

    def restore(self) -> None:
        self._module._buffers[self._name] = self._tensor
        if self._tensor is not None and self._copy is not None:
            with torch.no_grad():
                if not identical(self._tensor, self._copy):
                    self._tensor.copy_(self._copy)


def identical(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal, NaN being equal to NaN."""
    same = a == b
    if a.is_floating_point():
        same = same | (a.isnan() & b.isnan())
    return bool(same.all())


def copied(argument: Any) -> Any:
    """Return a copy of a tensor, numbers that stand for several once; anything else itself."""
    if not isinstance(argument, Tensor):
        return argument
    once = tuple(slice(0, 1) if step == 0 else slice(None) for step in argument.stride())
    return argument.detach()[once].clone().expand(argument.shape)
