"""`Watcher`: sees the functions of torch that a model calls, and hands attention to recorders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from pytest_attnheat.capture.record import AttentionRecord
from pytest_attnheat.capture.tags import Tags

# Makes a record, and the weights that were multiplied, if they are known.
Read = Callable[[], tuple[AttentionRecord, torch.Tensor | None]]
# (watcher, function, arguments, keywords) -> what the function returns.
Source = Callable[["Watcher", Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class Recorder(Protocol):
    """Who wants to know of attention."""

    def take(self, record: AttentionRecord, used: torch.Tensor | None) -> None:
        """An attention happened; `used` are the weights that were multiplied, if known."""

    def miss(self, what: str, why: str) -> None:
        """Something that looks like attention happened, and cannot be read."""

    def expect(self, number: int) -> None:
        """Queries times keys went through a softmax: it should become attention."""

    def found(self, numbers: tuple[int, ...]) -> None:
        """These did."""


class Watcher(TorchFunctionMode):
    """Sees each function of torch that is called in its thread; nested captures share one.

    Args:
        source_of: Returns the source that knows a function; None for one that tells nothing.

    Attributes:
        recorders: Who is told.
        tags: What is known of tensors.
        heads: How many heads the batch axis of 3-D tensors holds, within multi-head attention.
    """

    def __init__(self, source_of: Callable[[Callable[..., Any]], Source | None]) -> None:
        super().__init__()
        self.recorders: list[Recorder] = []
        self.tags = Tags()
        self.heads: int | None = None
        self._source_of = source_of
        self._sources: dict[Any, Source | None] = {}
        self._softmaxes = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call the function; what might be attention through the source that knows it."""
        try:
            source = self._sources[func]
        except KeyError:
            source = self._sources[func] = self._source_of(func)
        if source is None:
            return func(*args, **(kwargs or {}))
        return source(self, func, args, dict(kwargs or {}))

    @property
    def idle(self) -> bool:
        """Whether nothing is to be told: a backward pass calls the model's code again."""
        return in_backward()

    def expect(self) -> tuple[int, ...]:
        """Tell all recorders of a softmax that should become attention; return its number."""
        if self.idle:
            return ()
        self._softmaxes += 1
        for recorder in self.recorders:
            recorder.expect(self._softmaxes)
        return (self._softmaxes,)

    def found(self, numbers: tuple[int, ...]) -> None:
        """Tell all recorders that softmaxes became attention, or were seen not to."""
        for recorder in self.recorders:
            recorder.found(numbers)

    def tell(self, what: str, read: Read) -> None:
        """Hand an attention to all recorders; what fails to be read is missed, and the model runs.

        Args:
            what: What happened, should it not be readable.
            read: Makes the record.
        """
        if self.idle:
            return
        try:
            record, used = read()
        except Exception as error:
            self.miss(what, f"its layout is not understood ({error})")
            return
        if any(is_functorch_wrapped_tensor(t) for t in vars(record).values() if _is_tensor(t)):
            self.miss(what, "it ran inside of torch.func (vmap, grad ...)")
            return
        for recorder in self.recorders:
            recorder.take(record, used)

    def miss(self, what: str, why: str) -> None:
        """Tell all recorders of what cannot be read."""
        if not self.idle:
            for recorder in self.recorders:
                recorder.miss(what, why)


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


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)
