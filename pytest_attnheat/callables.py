"""Code under test: which modules it holds, and how it is left as it was found."""

from __future__ import annotations

import ast
import functools
import inspect
import random
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._C import _len_torch_dispatch_stack
from torch.utils._python_dispatch import _disable_current_modes

from .attention.devices import visible_devices

# How far modules are looked for in what a callable refers to.
_DEPTH = 3
# So often some code may be compiled anew while it is examined.
_COMPILATIONS = 64


def modules_in(subject: object) -> list[nn.Module]:
    """Return the modules that a callable is or holds, as far as they can be found."""
    # Looked into are partials, bound methods, the variables that a function refers to, and the
    # attributes of an object.
    return [part for part in _collected(subject) if isinstance(part, nn.Module)]


def is_compiled(subject: object) -> bool:
    """Whether a callable is, or refers to, what `torch.compile` made, as far as can be found."""
    found = _collected(subject)
    inner = [part for one in found if isinstance(one, nn.Module) for part in one.modules()]
    return any(_is_marked(part) for part in (*found, *inner))


@contextmanager
def always_compiled(subject: object) -> Iterator[None]:
    """Let what is compiled run compiled or not at all, however many shapes it is asked."""
    # After its eighth compilation of some code, `torch.compile` runs the code as it was written,
    # and says so in a log alone: what passes then says nothing of what was compiled.
    if not is_compiled(subject):
        yield
        return
    from torch._dynamo import config

    of = "recompile" if hasattr(config, "recompile_limit") else "cache_size"  # torch 2.6
    hit = "recompile" if of == "recompile" else "cache"
    wanted = {
        f"{of}_limit": _COMPILATIONS,
        f"accumulated_{of}_limit": 16 * _COMPILATIONS,
        f"fail_on_{hit}_limit_hit": True,
    }
    with config.patch({name: max(getattr(config, name), it) for name, it in wanted.items()}):
        yield


def is_past_compiling(error: BaseException) -> bool:
    """Whether it says that code would run uncompiled from here on: see `always_compiled`."""
    return type(error).__name__ == "FailOnRecompileLimitHit"


def _is_marked(part: object) -> bool:
    own = dict(getattr(part, "__dict__", {})) | getattr(part, "_modules", {})
    marks = ("_torchdynamo_orig_callable", "_orig_mod", "_compiled_call_impl")
    return not own.get("_torchdynamo_disable") and any(own.get(mark) is not None for mark in marks)


def parameters_of(subject: Any) -> Mapping[str, inspect.Parameter] | None:
    """Return the parameters of a callable, None where they are not known, as of a builtin."""
    # Those of an object with `plan` and `run` are the ones of both; of an operator of torch, the
    # names of its results are among them.
    if plans_and_runs(subject):
        both = [inspect.signature(method).parameters for method in (subject.plan, subject.run)]
        return {**both[0], **both[1]}
    if isinstance(subject, torch._ops.OpOverloadPacket):
        subject = getattr(subject, next(iter(subject)))
    if isinstance(subject, torch._ops.OpOverload):
        schema = subject._schema
        missing = inspect.Parameter.empty
        named = [(one.name, one.default_value if one.has_default_value() else missing)
                 for one in schema.arguments]  # fmt: skip
        return _parameters([*named, *((one.name, None) for one in schema.returns if one.name)])
    told = getattr(subject, "__nb_signature__", None)
    if isinstance(told, tuple) and told:  # of nanobind, which MLX is made with
        return _parameters_in(told[0][0])
    # Of a module, that of __call__ names none.
    called = subject.forward if isinstance(subject, nn.Module) else subject
    if "__signature__" in vars(type(subject)):  # of the class, not of what it makes
        called = subject.__call__
    try:
        return inspect.signature(called).parameters
    except (TypeError, ValueError):
        return None


def plans_and_runs(subject: object) -> bool:
    """Whether an object is told first of what is to come, and then asked."""
    return all(inspect.ismethod(getattr(subject, name, None)) for name in ("plan", "run"))


def _parameters_in(text: str) -> Mapping[str, inspect.Parameter] | None:
    """The parameters of a signature as text, "def name(...) -> ..."."""
    try:
        parsed = ast.parse(f"{text}: ...").body[0]
    except SyntaxError:
        return None
    assert isinstance(parsed, ast.FunctionDef)
    given = parsed.args
    optional = [one.arg for one in given.args[len(given.args) - len(given.defaults) :]]
    named = zip(given.kwonlyargs, given.kw_defaults, strict=True)
    optional += [one.arg for one, default in named if default is not None]
    every = [one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return _parameters([(n, None if n in optional else inspect.Parameter.empty) for n in every])


def _parameters(named: Iterable[tuple[str, Any]]) -> Mapping[str, inspect.Parameter]:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return {name: inspect.Parameter(name, kind, default=default) for name, default in named}


def _collected(subject: object) -> list[object]:
    """What a callable is, and what it refers to, each once."""
    found: dict[int, tuple[int, object]] = {}

    def collect(one: object, depth: int) -> None:
        seen = found.get(id(one), (-1, None))[0] >= depth
        if seen or isinstance(one, (type, types.ModuleType, Tensor)):
            return
        found[id(one)] = depth, one
        for part in _parts(one) if depth > 0 and not isinstance(one, nn.Module) else ():
            collect(part, depth - 1)

    collect(subject, _DEPTH)
    return [one for _, one in found.values()]


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
    """Use a subject and leave it as it was found."""
    # Restored afterwards, also after an exception: training or evaluation mode and the buffers of
    # its modules, and the random state of Python, NumPy, the CPU and the devices of `tensors`.
    # Random numbers within are drawn from `seed`.
    modules = [part for module in modules_in(subject) for part in module.modules()]
    modes = [(module, module.training) for module in modules]
    buffers = [
        (module, name, buffer, None if buffer is None else buffer.detach().clone())
        for module in modules
        for name, buffer in module._buffers.items()
    ]
    python, numpy = random.getstate(), np.random.get_state()
    with random_kept(t.device for t in tensors):
        seed_all(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            for module, mode in modes:
                module.training = mode
            _restore(buffers)


class ExitError(Exception):
    """A subject raised SystemExit: an error like any other, where it would end the run."""


ExitError.__name__ = "SystemExit"  # what it is called where it is told of


@contextmanager
def exits_as_errors() -> Iterator[None]:
    """Let SystemExit be an error of the code under test, raised in the same place."""
    try:
        yield
    except SystemExit as error:
        raise ExitError(str(error)).with_traceback(error.__traceback__) from None


@contextmanager
def random_kept(devices: Iterable[torch.device]) -> Iterator[None]:
    """Leave the random state of the CPU and of some devices as it was found."""
    with ExitStack() as kept:
        kept.enter_context(torch.random.fork_rng(devices=[]))  # that of the CPU
        for device in set(devices):
            if device.type != "cpu" and hasattr(_module(device.type), "get_rng_state"):
                index = [device.index or 0]
                kept.enter_context(torch.random.fork_rng(index, device_type=device.type))
        yield


def seed_all(seed: int) -> None:
    """Start the random numbers of torch from a seed, on all devices that are here."""
    # For each kind of device that is not here, `torch.manual_seed` takes down where it was called
    # from: that takes a millisecond, and a check starts them dozens of times.
    alone = sum(visible_devices().values()) == 1
    (torch.default_generator if alone else torch).manual_seed(seed)


def seed_everything(seed: int) -> None:
    """Start the random numbers of torch, Python and NumPy from a seed."""
    seed_all(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def random_states() -> dict[str, list[Tensor]]:
    """Return the random state of the CPU and of every accelerator that is here, by kind."""
    states = {"cpu": [torch.get_rng_state()]}
    for kind in accelerators():
        module = _module(kind)
        if hasattr(module, "get_rng_state"):
            states[kind] = [module.get_rng_state(i) for i in range(module.device_count())]
    return states


def set_random_states(states: Mapping[str, Sequence[Tensor]]) -> None:
    """Set what `random_states` returned."""
    torch.set_rng_state(states["cpu"][0])
    for kind, of_devices in states.items():
        if kind != "cpu":
            for index, state in enumerate(of_devices):
                _module(kind).set_rng_state(state, index)


def accelerators() -> list[str]:
    """Return the kinds of numbered accelerators that are here."""
    present = visible_devices().items()
    return [kind for kind, count in present if count and kind not in ("cpu", "mps")]


def _module(kind: str) -> Any:
    """What torch has for a kind of device, or None."""
    return getattr(torch, kind, None)


@torch.no_grad()
def _restore(buffers: Sequence[tuple[nn.Module, str, Tensor | None, Tensor | None]]) -> None:
    """Put buffers back, such as the running mean of a batch norm, with what they held."""
    # Those that did not change are not written to: autograd would see it.
    pairs: list[tuple[Tensor, Tensor]] = []
    for module, name, buffer, before in buffers:
        module._buffers[name] = buffer
        pairs += [] if buffer is None or before is None else [(buffer, before)]
    for device in {now.device for now, _ in pairs}:
        own = [pair for pair in pairs if pair[0].device == device]
        flags: list[bool] = torch.stack([changed(*pair).any() for pair in own]).tolist()
        for (now, before), is_changed in zip(own, flags, strict=True):
            if is_changed:
                now.copy_(before)


def changed(a: Tensor, b: Tensor) -> Tensor:
    """Where two tensors differ, NaN being equal to NaN."""
    return ~((a == b) | ((a != a) & (b != b)))


def identical(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal, NaN being equal to NaN."""
    return not bool(changed(a, b).any())


def copied(argument: Any) -> Any:
    """Return a copy of a tensor, numbers that stand for several once; anything else itself."""
    if not isinstance(argument, Tensor):
        return argument
    if 0 not in argument.stride():
        return argument.detach().clone()
    once = tuple(slice(0, 1) if step == 0 else slice(None) for step in argument.stride())
    return argument.detach()[once].clone().expand(argument.shape)


class apart:  # noqa: N801
    """Compute without gradients, autocast and modes: it is not the model's, and counts nowhere."""

    def __enter__(self) -> None:
        self._grad, self._others = torch.is_grad_enabled(), None
        torch._C._set_grad_enabled(False)
        self._functions = torch._C.DisableTorchFunction()
        self._functions.__enter__()
        casts, modes = torch._C._is_any_autocast_enabled(), _len_torch_dispatch_stack()
        if not casts and not modes:  # This runs twice for each function of torch.
            return
        self._others = ExitStack()
        for kind in ("cpu", *accelerators()) if casts else ():
            self._others.enter_context(torch.autocast(kind, enabled=False))
        if modes:
            self._others.enter_context(_disable_current_modes())

    def __exit__(self, *error: object) -> None:
        if self._others is not None:
            self._others.close()
        self._functions.__exit__(None, None, None)
        torch._C._set_grad_enabled(self._grad)
