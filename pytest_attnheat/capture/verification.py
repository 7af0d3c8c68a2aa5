"""`Repetition`: the model once more without the capture, and how far its output is."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pytest_attnheat.assertions.behaviour.subjects import borrowed
from pytest_attnheat.capture.errors import CaptureError


@dataclass
class _Call:
    """One call of the model: copies of what it was given and had, and its output."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    buffers: dict[str, Tensor]
    random: Tensor
    random_of_devices: list[Tensor]
    output: Any = None
    finished: bool = False


class Repetition:
    """Remembers the calls of a model, and repeats them.

    Each is repeated with the arguments, the buffers and the state of PyTorch's random numbers
    that it had. Calls of the model within a call of it are not remembered.
    """

    def __init__(self, model: nn.Module | None) -> None:
        if model is None:
            raise ValueError("capture_attention: verify=True needs a model to run once more")
        self._model = model
        self._calls: list[_Call] = []
        self._depth = 0

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """Remember the calls within."""
        handles = [
            self._model.register_forward_pre_hook(self._before, with_kwargs=True),
            self._model.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def difference(self) -> float:
        """Repeat all calls; return the largest difference as a part of the largest number."""
        if not self._calls:
            raise CaptureError("capture_attention: verify=True, and the model was not called")
        return max(self._repeated(call) for call in self._calls)

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._depth += 1
        if self._depth > 1:
            return
        try:
            with torch._C.DisableTorchFunction():
                args, kwargs = copy.deepcopy((_detached(args), _detached(kwargs)))
        except Exception as error:
            raise CaptureError(
                "capture_attention: verify=True cannot copy what the model is called with "
                f"({error})"
            ) from error
        buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
        devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        self._calls.append(_Call(args, kwargs, buffers, torch.get_rng_state(), devices))

    def _after(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._calls[-1].output = [tensor.detach().clone() for tensor in _tensors(output)]

    def _repeated(self, call: _Call) -> float:
        tensors = list(_tensors((call.args, call.kwargs)))
        with borrowed(self._model, *tensors), torch.no_grad():
            for name, buffer in self._model.named_buffers():
                if name in call.buffers:
                    buffer.copy_(call.buffers[name])
            torch.set_rng_state(call.random)
            if call.random_of_devices:
                torch.cuda.set_rng_state_all(call.random_of_devices)
            again = list(_tensors(self._model(*call.args, **call.kwargs)))
        shapes = [tuple(tensor.shape) for tensor in again]
        before = [tuple(tensor.shape) for tensor in call.output]
        if shapes != before:
            raise CaptureError(
                f"capture_attention: without the capture the model returns {shapes}, "
                f"with it {before}"
            )
        return max((_apart(a, b) for a, b in zip(again, call.output, strict=True)), default=0.0)


def _apart(a: Tensor, b: Tensor) -> float:
    if a.numel() == 0 or torch.equal(a, b):
        return 0.0
    a, b = a.double(), b.double()
    largest = a.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    both = a.isnan() & b.isnan()
    off = torch.where(both, 0.0, (a - b).abs()) / largest
    return float(off.nan_to_num(nan=torch.inf).max())


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
    elif isinstance(output, Sequence) and not isinstance(output, str | bytes):
        for one in output:
            yield from _tensors(one)
