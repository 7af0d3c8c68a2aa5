"""`Repetition`: the model once more without the capture, and how far its output is."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pytest_attnheat.callables import accelerators, borrowed, random_states, set_random_states
from pytest_attnheat.capture import CaptureError
from pytest_attnheat.inputs import misuse


@dataclass
class _Call:
    """One call of the model: copies of what it was given and had, and its output.

    Attributes:
        args: Positional arguments.
        kwargs: Keywords.
        buffers: Buffers of the model, by name.
        versions: How often each parameter had been changed.
        training: Which of its modules were training.
        around: How it was called: gradients, autocast.
        random: The states of random numbers of the CPU and the devices.
        output: The tensors it returned; None while it runs, or if it raised.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    buffers: dict[str, Tensor]
    versions: dict[str, int]
    training: list[bool]
    around: _Around
    random: dict[str, list[Tensor]]
    output: list[Tensor] | None = None


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


class Repetition:
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
        """Remember the calls within."""
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
