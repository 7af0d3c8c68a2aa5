"""`capture_attention`: records every attention that happens inside a model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..callables import accelerators, borrowed, random_states, set_random_states
from ..inputs import misuse, one_of
from . import CaptureError, CaptureWarning, watching
from .changes import compiled_code_set_aside, find_unseen, may_take_fast_path
from .record import name_of
from .recording import KEPT, Keep, Recording, Wanted
from .selection import Selection, checked_patterns, float_dtype, selection
from .sources import source_of
from .trace import Trace
from .watching import Layers

_FAST_PATH = "{}: PyTorch's fast path, if it takes it, was off while it was watched"


class Around(Protocol):
    """What says how a module is called, as `SequenceModel` does."""

    @property
    def module(self) -> Callable[..., Any]:
        """The module."""


@contextmanager
def capture_attention(
    model: nn.Module | Around | None = None,
    *,
    keep: Keep = "inputs",
    layers: str | Sequence[str] | None = None,
    heads: Selection | None = None,
    queries: Selection | None = None,
    dtype: torch.dtype = torch.float32,
    max_bytes: float = 2**30,
    verify: bool = False,
    allow_empty: bool = False,
    allow_unseen: bool = False,
) -> Iterator[Trace]:
    """Record every attention that happens inside a model, with no change to it.

    Seen are `scaled_dot_product_attention`, `nn.MultiheadAttention`, `flex_attention`, and
    attention written out as a softmax whose result multiplies a value, in this thread. PyTorch's
    fast path and `torch.compile` are set aside meanwhile; `trace.changes` says where. Captures
    may be nested: each has all that happens within it. A backward pass is not recorded.

    Args:
        model: A module, or a `SequenceModel` around it; None to record what happens in the block,
            whoever does it.
        keep: "inputs" keeps query, key, value and mask, and computes weights when they are asked
            for; "weights" keeps weights alone; "statistics" their sums, entropies and maxima.
        layers: Names of layers, or patterns such as "*.self_attn"; all by default. The name of a
            module means all layers within it.
        heads: Numbers of heads to keep, or a slice; all by default.
        queries: Numbers of queries to keep, or a slice; all by default.
        dtype: The dtype of weights.
        max_bytes: What all records together, and the weights computed of one, may take.
        verify: Whether to run the model once more without the capture, on copies of what it was
            called with, and to compare: `trace.difference`.
        allow_empty: Whether to accept that no attention happens.
        allow_unseen: Whether to be silent about attention that happens and cannot be read.

    Yields:
        The trace, which fills while the model runs.

    Raises:
        CaptureError: Nothing was captured and that is not allowed, or code that was compiled
            cannot be set aside.
        CaptureMemoryError: The next record would take more than `max_bytes`.
        TypeError: The model is not a module, or an argument is of another type than above.
        ValueError: `keep` is another word, or a selection is of nothing, or of heads or queries
            that are absent: that shows when the layer runs.

    Warns:
        CaptureWarning: Weights times value do not reproduce the output of a record, or something
            looks like attention and could not be read.
    """
    module: Any = model if isinstance(model, nn.Module) else getattr(model, "module", model)
    wanted = _checked(module, keep, layers, heads, queries, dtype, max_bytes)
    trace = Trace()
    running = Layers(module, lambda module: _note_fast_path(running, trace, module))
    recording = Recording(wanted, running, trace)
    repetition = _Repetition(module) if verify else None
    with ExitStack() as stack:
        stack.enter_context(compiled_code_set_aside(module, trace))
        stack.callback(running.stop)
        running.start()
        if repetition is not None:
            stack.enter_context(repetition.remembering())
        stack.enter_context(_watched(recording))
        yield trace
    if repetition is not None:
        with watching.paused():
            trace.difference = repetition.difference()
    for unseen in (*recording.unread(), *find_unseen(running, trace)):
        trace._miss(unseen)
    if not len(trace) and not allow_empty:
        raise CaptureError(_nothing(module, wanted, trace))
    _warn(trace, allow_unseen=allow_unseen)


def _checked(
    model: object, keep: Keep, layers: str | Sequence[str] | None, heads: Selection | None,
    queries: Selection | None, dtype: object, max_bytes: object,
) -> Wanted:  # fmt: skip
    if model is not None and not isinstance(model, nn.Module):
        accepted = "a torch.nn.Module, or None for whatever happens in the block"
        raise TypeError(misuse("model", type(model).__name__, accepted))
    one_of("keep", keep, KEPT)
    refusal = misuse("max_bytes", repr(max_bytes), "a number of bytes from 0")
    if not isinstance(max_bytes, int | float) or isinstance(max_bytes, bool):
        raise TypeError(refusal)
    if not 0 <= max_bytes < float("inf"):
        raise ValueError(refusal)
    return Wanted(
        keep, checked_patterns(layers), None if heads is None else selection("heads", heads),
        None if queries is None else selection("queries", queries), int(max_bytes),
        float_dtype(dtype),
    )  # fmt: skip


@contextmanager
def _watched(recording: Recording) -> Iterator[None]:
    """Let the watcher of this thread tell a recording too; begin to watch if nobody does."""
    outer = watching.current()
    if outer is None:
        watcher = watching.Watcher(source_of)
        watcher.recorders.append(recording)
        with watcher:
            yield
        return
    outer.recorders.append(recording)
    try:
        yield
    finally:
        outer.recorders.remove(recording)


def _note_fast_path(running: Layers, trace: Trace, module: nn.Module) -> None:
    if not may_take_fast_path(module):
        return
    *outer, name = running.running
    # A layer's fast path does not call its attention: only the layer ran differently.
    if not any(_FAST_PATH.format(one) in trace.changes for one in outer):
        trace._change(_FAST_PATH.format(name))


def _nothing(model: nn.Module | None, wanted: Wanted, trace: Trace) -> str:
    name = "the block" if model is None else type(model).__name__
    if wanted.layers is not None and trace._within:
        return (
            f"capture_attention: attention happened in {name}, in no layer that "
            f"layers={list(wanted.layers)} names; modules with attention: "
            f"{', '.join(sorted(trace._within))}"
        )
    lines = [f"capture_attention: no attention was seen in {name}."]
    lines += [f"  unseen  {unseen}" for unseen in trace.unseen]
    if not trace.unseen:
        lines.append("  Was the model called inside the `with` block, as model(...)?")
    lines.append("  If there is none, allow_empty=True accepts that.")
    return "\n".join(lines)


def _warn(trace: Trace, *, allow_unseen: bool) -> None:
    # The `with` statement of the user: this function, the generator, contextlib.
    if trace.untrusted:
        record, *others = trace.untrusted
        more = f" (so are those of {len(others)} more: trace.untrusted)" if others else ""
        warnings.warn(
            f"capture_attention: {name_of(record)}: weights times value are not the "
            f"output (residual {record.residual:.1e}, allowed {record.tolerance:.1e}): the "
            f"weights are not to be trusted{more}",
            CaptureWarning,
            stacklevel=4,
        )
    if trace.unseen and not allow_unseen:
        listed = "\n".join(f"  {unseen}" for unseen in trace.unseen)
        warnings.warn(
            f"capture_attention: something looks like attention and was not read:\n{listed}\n"
            "  allow_unseen=True accepts that.",
            CaptureWarning,
            stacklevel=4,
        )


@dataclass
class _Call:
    """One call of the model: copies of what it was given and had, and its output."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    buffers: dict[str, Tensor]
    versions: dict[str, int]  # how often each parameter had been changed
    training: list[bool]  # of each of its modules
    around: _Around
    random: dict[str, list[Tensor]]
    output: list[Tensor] | None = None  # None while it runs, or if it raised


class _Around:
    """The modes of PyTorch that a call runs under."""

    def __init__(self) -> None:
        self._grad = torch.is_grad_enabled()
        self._inference = torch.is_inference_mode_enabled()
        self._casts = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            for kind in ("cpu", *accelerators())
        ]

    @contextmanager
    def again(self) -> Iterator[None]:
        """Run under the same modes."""
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self._inference))
            stack.enter_context(torch.set_grad_enabled(self._grad))
            for kind, dtype, enabled in self._casts:
                if enabled or torch.is_autocast_enabled(kind):  # not every device can cast
                    stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
            yield


class _Repetition:
    """Remembers the calls of a model, and repeats them.

    Each is repeated with the arguments, the buffers, the modes and the state of PyTorch's random
    numbers that it had. Calls of the model within a call of it are not remembered, nor are those
    that raise.
    """

    def __init__(self, model: nn.Module | None) -> None:
        if model is None:
            accepted = "True with a model, which runs once more"
            raise ValueError(misuse("verify", "True without a model", accepted))
        self._model = model
        self._calls: list[_Call] = []
        self._depth = 0

    @contextmanager
    def remembering(self) -> Iterator[None]:
        handles = [
            self._model.register_forward_pre_hook(self._before, with_kwargs=True),
            self._model.register_forward_hook(self._returned),
            self._model.register_forward_hook(self._left, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def difference(self) -> float:
        """Repeat all calls; return the largest difference as a part of the largest number."""
        calls = [call for call in self._calls if call.output is not None]
        if not calls:
            raise CaptureError("capture_attention: verify=True, and the model was not called")
        if not any(call.output for call in calls):
            raise CaptureError(
                "capture_attention: verify=True, and no tensor is found in what the model returns"
            )
        return max(self._repeated(call) for call in calls)

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._depth += 1
        if self._depth > 1:
            return
        try:
            with torch._C.DisableTorchFunction():
                args, kwargs = copy.deepcopy((_detached(args), _detached(kwargs)))
        except Exception as error:
            self._depth -= 1
            raise CaptureError(
                "capture_attention: verify=True cannot copy what the model is called with "
                f"({error})"
            ) from error
        buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
        training = [module.training for module in model.modules()]
        versions, states = _versions(model), random_states()
        self._calls.append(_Call(args, kwargs, buffers, versions, training, _Around(), states))

    def _returned(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._depth == 1:
            self._calls[-1].output = [tensor.detach().clone() for tensor in _tensors(output)]

    def _left(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._depth -= 1

    def _repeated(self, call: _Call) -> float:
        if _versions(self._model) != call.versions:
            raise CaptureError(
                "capture_attention: verify=True runs the model once more after the block, and its "
                "parameters were changed since it was called (a step of an optimizer?)"
            )
        tensors = list(_tensors((call.args, call.kwargs)))
        with borrowed(self._model, *tensors), call.around.again():
            self._prepare(call)
            again = [tensor.detach() for tensor in _tensors(self._model(*call.args, **call.kwargs))]
        assert call.output is not None
        shapes = [tuple(tensor.shape) for tensor in again]
        before = [tuple(tensor.shape) for tensor in call.output]
        if shapes != before:
            raise CaptureError(
                f"capture_attention: without the capture the model returns {shapes}, "
                f"with it {before}"
            )
        return max((_apart(a, b) for a, b in zip(again, call.output, strict=True)), default=0.0)

    def _prepare(self, call: _Call) -> None:
        with torch.no_grad():
            for name, buffer in self._model.named_buffers():
                if name in call.buffers:
                    buffer.copy_(call.buffers[name])
        for module, training in zip(self._model.modules(), call.training, strict=True):
            module.training = training
        set_random_states(call.random)


def _versions(model: nn.Module) -> dict[str, int]:
    named = model.named_parameters()
    return {name: 0 if p.is_inference() else p._version for name, p in named}


def _apart(a: Tensor, b: Tensor) -> float:
    if a.numel() == 0 or torch.equal(a, b):
        return 0.0
    a, b = a.double(), b.double()
    largest = torch.where(a.isfinite(), a.abs(), 0.0).max()
    same = (a == b) | (a.isnan() & b.isnan())
    off = torch.where(same, 0.0, (a - b).abs())
    relative = off / largest.clamp_min(torch.finfo(torch.float64).tiny)
    return float(relative.nan_to_num(nan=torch.inf).max())


def _detached(given: Any) -> Any:
    """Tensors within tuples, lists and dictionaries, cut off from the graph that made them."""
    if isinstance(given, Tensor):
        return given.detach()
    if type(given) in (tuple, list):
        return type(given)(_detached(one) for one in given)
    if type(given) is dict:
        return {name: _detached(one) for name, one in given.items()}
    return given


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors in what a model returns, in order."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for name in output:
            yield from _tensors(output[name])
    elif is_dataclass(output):
        for part in fields(output):
            yield from _tensors(getattr(output, part.name))
    elif isinstance(output, Sequence) and not isinstance(output, str | bytes):
        for one in output:
            yield from _tensors(one)
