"""What is watched while a capture runs: the functions of torch, and the modules of a model."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.hooks import RemovableHandle

from ..callables import apart
from .record import AttentionRecord, Part
from .tags import Tags

_TRANSFORMED = "it ran inside of torch.func (vmap, grad ...)"
Function = Callable[..., Any]
Args = tuple[Any, ...]
Keywords = dict[str, Any]


@dataclass(frozen=True)
class Call:
    """A function of torch that is about to be called."""

    watcher: Watcher  # Who sees it
    func: Function  # The function
    args: Args  # Its arguments
    kwargs: Keywords  # Its keywords

    def given(self, place: int, name: str, default: Any = None) -> Any:
        """Return an argument by its place or by its name."""
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)


# Called with what the function returned.
After = Callable[[Any], None]


@dataclass(frozen=True)
class Instead:
    """What is run in place of a function, as code that does the same can be watched."""

    run: Callable[[], Any]


# Told before the function is called.
Source = Callable[[Call], "After | Instead | None"]


class Refused(Exception):  # noqa: N818
    """What the user asked for cannot be: the error within is meant to end the model."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class Taken(Protocol):
    """A record of which more is heard."""

    def undo(self) -> None:
        """It was but a part of another, which takes its place."""

    def mark(self, part: Part) -> None:
        """It is a part of an attention."""


class Recorder(Protocol):
    """Who wants to know of attention."""

    def take(self, record: AttentionRecord, used: Tensor | None, tags: Tags) -> Taken | None:
        """An attention happened; `used` are the weights that were multiplied, if known."""

    def miss(self, what: str, why: str) -> None:
        """Something that looks like attention happened, and cannot be read."""

    def expect(self, number: int) -> None:
        """Queries times keys went through a softmax: it should become attention."""

    def found(self, numbers: tuple[int, ...]) -> None:
        """These did."""

    def note(self, kind: str) -> None:
        """A convolution happened, or a product of activations."""


class Watcher(TorchFunctionMode):
    """Sees each function of torch that is called in its thread; nested captures share one.

    `source_of` returns the source that knows a function; None for one that tells nothing. `heads`
    is how many the batch axis of 3-D tensors holds, within multi-head attention.
    """

    def __init__(self, source_of: Callable[[Function], Source | None]) -> None:
        super().__init__()
        self.recorders: list[Recorder] = []
        self.tags = Tags()
        self.heads: int | None = None
        self._source_of = source_of
        self._sources: dict[Any, Source | None] = {}
        self._softmaxes = 0

    def __torch_function__(
        self,
        func: Function,
        types: object,
        args: Args = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call the function; before and after it, let the source that knows it look on."""
        kwargs = dict(kwargs or {})
        try:
            source = self._sources[func]
        except KeyError:
            source = self._sources[func] = self._source_of(func)
        if source is None or in_backward():
            return func(*args, **kwargs)
        if (tracer := _tracer()) is not None:  # What we computed would become its code.
            if "softmax" in (name := getattr(func, "__name__", "")) or "attention" in name:
                self.miss(name, f"it was traced by {tracer}, and is not recorded")
            return func(*args, **kwargs)
        after = self._guarded(func, source, Call(self, func, args, kwargs))
        if isinstance(after, Instead):
            return after.run()
        output = func(*args, **kwargs)
        if after is not None:
            self._guarded(func, after, output)
        return output

    def _guarded(self, func: Function, step: Callable[..., Any], *given: Any) -> Any:
        """Compute something of our own: it cannot end or change the model, and counts nowhere."""
        try:
            with apart():
                return step(*given)
        except Refused as refused:
            raise refused.error from None
        except Exception as error:
            why = f"the capture could not follow it ({type(error).__name__}: {error})"
            if torch._C._functorch.maybe_current_level() is not None:
                why = _TRANSFORMED
            self.miss(getattr(func, "__name__", str(func)), why.splitlines()[0])
            return None

    def expect(self) -> tuple[int, ...]:
        """Tell all recorders of a softmax that should become attention; return its number."""
        self._softmaxes += 1
        for recorder in self.recorders:
            recorder.expect(self._softmaxes)
        return (self._softmaxes,)

    def note(self, kind: str) -> None:
        """Tell all recorders of a convolution, or of a product of activations."""
        for recorder in self.recorders:
            recorder.note(kind)

    def found(self, numbers: tuple[int, ...]) -> None:
        """Tell all recorders that softmaxes became attention, or were seen not to."""
        for recorder in self.recorders:
            recorder.found(numbers)

    def tell(self, record: AttentionRecord, used: Tensor | None = None) -> list[Taken]:
        """Hand an attention to all recorders; return what they took."""
        tensors = [value for value in vars(record).values() if isinstance(value, Tensor)]
        if any(map(is_functorch_wrapped_tensor, tensors)):
            self.miss(record.source, _TRANSFORMED)
            return []
        taken = (recorder.take(record, used, self.tags) for recorder in self.recorders)
        return [one for one in taken if one is not None]

    def miss(self, what: str, why: str) -> None:
        """Tell all recorders of what cannot be read."""
        for recorder in self.recorders:
            recorder.miss(what, why)


def _tracer() -> str | None:
    """What makes code of the operations that run, or runs them without numbers; None if nothing."""
    if torch._C._get_tracing_state() is not None:
        return "torch.jit"
    fake = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    return None if fake is None else "torch.export or another mode of fake tensors"


def in_backward() -> bool:
    """Whether a backward pass runs in this thread."""
    return torch._C._current_graph_task_id() != -1


def current() -> Watcher | None:
    """Return the watcher of this thread, if there is one."""
    for mode in reversed(_get_current_function_mode_stack()):  # type: ignore[no-untyped-call]
        if isinstance(mode, Watcher):
            return mode
    return None


@contextmanager
def paused() -> Iterator[None]:
    """Let the captures around this one not hear of what happens within."""
    watcher = current()
    recorders = [] if watcher is None else watcher.recorders[:]
    if watcher is not None:
        watcher.recorders.clear()
    try:
        yield
    finally:
        if watcher is not None:
            watcher.recorders[:] = recorders


class Layers:
    """The modules of one model that are running, innermost last.

    It listens with hooks on each module; one for all would make compiled modules warn. Scripted
    modules take none: they are taken to have run where the module around them ran.
    `ran` are those that ran in the thread of the capture, in order, `elsewhere` those that ran in
    other threads, in which nobody watched; in those `noted` something ran that is told by its kind.
    """

    def __init__(self, model: nn.Module | None, entered: Callable[[nn.Module], None]) -> None:
        self.ran: dict[str, nn.Module] = {}
        self.elsewhere: dict[str, nn.Module] = {}
        self.noted: dict[str, set[str]] = defaultdict(set)
        self.step = -1
        self._modules: dict[str, nn.Module] = {}
        self._top: nn.Module | None = None
        if model is not None:
            self._top = top = original(model)
            named = top.named_modules()
            self._modules = {plain_name(name) or type(top).__name__: one for name, one in named}
        self._entered = entered
        self._thread = threading.get_ident()
        self._running: list[str] = []
        self._handles: list[RemovableHandle] = []

    def start(self) -> None:
        """Begin to listen."""
        for name, module in self._modules.items():
            if not isinstance(module, torch.jit.ScriptModule):
                enter, leave = partial(self._enter, name), partial(self._leave, name)
                self._handles += [
                    module.register_forward_pre_hook(enter),
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

    def _enter(self, name: str, module: nn.Module, args: object) -> None:
        if threading.get_ident() != self._thread:
            # Else a capture of that thread sees it, or a backward pass runs it again.
            if current() is None and not in_backward():
                self.elsewhere.setdefault(name, module)
            return
        self.step += not self._running
        self._running.append(name)
        self.ran.setdefault(name, module)
        self._entered(module)

    def _leave(self, name: str, module: nn.Module, args: object, output: object) -> None:
        if threading.get_ident() != self._thread or name not in self._running:
            return
        # An exception in a pre-hook leaves modules on the stack that are never left.
        while self._running.pop() != name:
            pass


# What wrappers add to the names of the modules within.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def plain_name(name: str) -> str:
    """The name of a module without what parallel, sharded and compiled wrappers add to it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def original(model: nn.Module) -> nn.Module:
    """Return the module that `torch.compile` wrapped, or the module itself."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model
