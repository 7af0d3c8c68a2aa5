"""`capture_attention`: records every attention that happens inside a model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from pytest_attnheat.capture import CaptureError, CaptureWarning, watching
from pytest_attnheat.capture.changes import (
    compiled_code_set_aside,
    find_unseen,
    would_take_fast_path,
)
from pytest_attnheat.capture.record import name_of
from pytest_attnheat.capture.recording import KEPT, Keep, Recording, Wanted
from pytest_attnheat.capture.selection import Selection, checked_patterns, float_dtype, selection
from pytest_attnheat.capture.sources import source_of
from pytest_attnheat.capture.trace import Trace
from pytest_attnheat.capture.verification import Repetition
from pytest_attnheat.capture.watching import Layers
from pytest_attnheat.inputs import misuse, one_of

_FAST_PATH = "{}: PyTorch's fast path was off while it was watched"


@contextmanager
def capture_attention(
    model: nn.Module | None = None,
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
        model: A module; None to record what happens in the block, whoever does it.
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
        TypeError: The model is no module, or an argument is of another type than above.
        ValueError: `keep` is another word, or a selection is of nothing, or of heads or queries
            that are absent: that shows when the layer runs.

    Warns:
        CaptureWarning: Weights times value do not reproduce the output of a record, or something
            looks like attention and could not be read.
    """
    wanted = _checked(model, keep, layers, heads, queries, dtype, max_bytes)
    trace = Trace()
    running = Layers(model, lambda module, *given: _note_fast_path(running, trace, module, *given))
    recording = Recording(wanted, running, trace)
    repetition = Repetition(model) if verify else None
    with ExitStack() as stack:
        stack.enter_context(compiled_code_set_aside(model, trace))
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
        raise CaptureError(_nothing(model, wanted, trace))
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
        keep,
        checked_patterns(layers),
        None if heads is None else selection("heads", heads),
        None if queries is None else selection("queries", queries),
        int(max_bytes),
        float_dtype(dtype),
    )


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


def _note_fast_path(
    running: Layers, trace: Trace, module: nn.Module, name: str, args: Any, kwargs: Any
) -> None:
    if not would_take_fast_path(module, args, kwargs, running.hooked):
        return
    # A layer's fast path does not call its attention: only the layer ran differently.
    if not any(_FAST_PATH.format(outer) in trace.changes for outer in running.running[:-1]):
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
