"""One call of a subject, and the same call with its samples or its keys in another order."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pytest_attnheat.assertions.behaviour.difference import relative_change
from pytest_attnheat.assertions.behaviour.sequences import SequenceModel, Subject, as_sequence
from pytest_attnheat.assertions.behaviour.subjects import AttentionFunction, as_function
from pytest_attnheat.attention.reference import padding_mask


@dataclass(frozen=True)
class FunctionCall:
    """A call of an attention function."""

    called: AttentionFunction

    @property
    def batch(self) -> int:
        """How many samples there are: the size of the first leading dimension, 0 without one."""
        return self.called.leading[0] if self.called.leading else 0

    @property
    def length(self) -> int:
        """How many keys there are."""
        return self.called.key.shape[-2]

    def run(self) -> Tensor:
        """Call the function."""
        return self.called.run()

    def judged(self) -> Tensor | None:
        """Which rows mean something, (..., query_len): those that may see a key; None for all."""
        arguments = self.called.arguments
        if arguments.get("attn_mask") is None and not arguments.get("is_causal"):
            return None
        return self.called.may_see().any(-1)

    def samples(self, which: Tensor) -> FunctionCall:
        """The same for some samples: their inputs, and their part of the mask if it has one."""
        called, mask = self.called, self.called.arguments.get("attn_mask")
        arguments = dict(called.arguments)
        if isinstance(mask, Tensor) and mask.ndim == called.query.ndim:
            arguments["attn_mask"] = mask[which] if mask.shape[0] == self.batch else mask
        query, key, value = (t[which] for t in (called.query, called.key, called.value))
        return FunctionCall(AttentionFunction(called.function, query, key, value, arguments))

    def reordered(self, order: Tensor) -> FunctionCall:
        """The same with its keys and values, and the columns of its mask, in another order."""
        called, mask = self.called, self.called.arguments.get("attn_mask")
        arguments = dict(called.arguments)
        if isinstance(mask, Tensor) and mask.ndim and mask.shape[-1] == self.length:
            arguments["attn_mask"] = mask[..., order]
        key, value = called.key[..., order, :], called.value[..., order, :]
        return FunctionCall(AttentionFunction(called.function, called.query, key, value, arguments))

    def restored(self, output: Tensor, order: Tensor) -> Tensor:
        """The output of a reordered call as it should be: the order of keys leaves no trace."""
        return output


@dataclass(frozen=True)
class SequenceCall:
    """A call of a sequence model, the padding on the right.

    Attributes:
        called: The model and its inputs.
        real: Boolean (batch, length), True where a token is no padding; None for no mask.
    """

    called: Subject
    real: Tensor | None = None

    @property
    def batch(self) -> int:
        """How many samples there are."""
        return self.called.inputs.shape[0]

    @property
    def length(self) -> int:
        """How many tokens there are."""
        return self.called.inputs.shape[1]

    def run(self) -> Tensor:
        """Call the model."""
        return self.called.run(real=self.real)

    def judged(self) -> Tensor | None:
        """Which tokens mean something, (batch, length): the real ones; None for all."""
        return self.real

    def samples(self, which: Tensor) -> SequenceCall:
        """The same for some samples: their inputs, and their part of every tensor argument."""
        arguments = {
            name: value[which]
            if isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == self.batch
            else value
            for name, value in self._arguments().items()
        }
        real = None if self.real is None else self.real[which]
        inputs = self.called.inputs[which]
        return SequenceCall(replace(self.called, inputs=inputs, arguments=arguments), real)

    def reordered(self, order: Tensor) -> SequenceCall:
        """The same with its tokens, and the rows and columns of its masks, in another order."""
        arguments = {
            name: _reordered(value, self.along(name), order) if isinstance(value, Tensor) else value
            for name, value in self._arguments().items()
        }
        real = None if self.real is None else self.real[:, order]
        inputs = self.called.inputs[:, order]
        return SequenceCall(replace(self.called, inputs=inputs, arguments=arguments), real)

    def restored(self, output: Tensor, order: Tensor) -> Tensor:
        """The output of a reordered call in the order that the tokens had."""
        return output[:, order.argsort()]

    def along(self, name: str) -> tuple[int, ...]:
        """Which dimensions of a tensor argument are those of the sequence.

        The second of (batch, length, ...), the last two of (..., length, length), the last of a
        mask (length,), (batch, 1, length) or (batch, 1, 1, length). A width that happens to be as
        large as the sequence is long, as that of a memory (batch, other length, width), is none.

        Raises:
            ValueError: The last dimension may be the length as well as a width.
        """
        argument: Tensor = self._arguments()[name]
        shape, ndim, length = tuple(argument.shape), argument.ndim, self.length
        if ndim == 0 or length not in shape:
            return ()
        second = ndim > 1 and shape[0] in (1, self.batch) and shape[1] == length
        square = ndim > 1 and shape[-2:] == (length, length)
        keys = shape[-1] == length and (ndim == 1 or (ndim > 2 and set(shape[1:-1]) == {1}))
        if ndim == 3 and ((square and second) or keys) and self._may_be_width(argument):
            raise ValueError(
                f"{name}: the last dimension of {shape} may be the length of the sequence or a "
                f"width of {length}; give inputs whose length differs from it, or a boolean mask"
            )
        if square:
            return (ndim - 2, ndim - 1)
        if second:
            return (1,)
        return (ndim - 1,) if keys else ()

    def _may_be_width(self, argument: Tensor) -> bool:
        """Whether floats may be features as wide as the sequence is long."""
        inputs = self.called.inputs
        width = inputs.shape[2] if inputs.ndim == 3 else self.length
        return argument.is_floating_point() and width == self.length

    def _arguments(self) -> Mapping[str, Any]:
        """The arguments, none of which can be read in two ways."""
        for name, value in self.called.arguments.items():
            twice = isinstance(value, Tensor) and tuple(value.shape) == (self.batch, self.length)
            if twice and self.batch == self.length:
                raise ValueError(
                    f"{name}: shape {(self.batch, self.length)} may be (batch, length) or "
                    "(length, length); give inputs whose batch and length differ"
                )
        return self.called.arguments


def _reordered(argument: Tensor, dims: Sequence[int], order: Tensor) -> Tensor:
    for dim in dims:
        argument = argument.index_select(dim, order.to(argument.device))
    return argument


Call: TypeAlias = FunctionCall | SequenceCall


def as_call(
    subject: object,
    inputs: Sequence[object],
    arguments: Mapping[str, Any],
    lengths: object = None,
) -> Call:
    """Return the call of a subject: three inputs are query, key and value, one is a sequence.

    Args:
        subject: An attention function or a sequence model.
        inputs: Its positional inputs.
        arguments: Its keyword arguments.
        lengths: How many tokens of each sample are real, (batch,); the rest is padding on the
            right. None for no mask. For sequence models only.

    Raises:
        TypeError: There are neither one nor three inputs, or what they are given to or they
            themselves are of the wrong type.
        ValueError: Shapes do not fit, or lengths are given to a subject that takes no mask.
    """
    if len(inputs) == 3 and not isinstance(subject, SequenceModel):
        if lengths is not None:
            raise ValueError(
                "lengths: they are for a sequence model, which is given one input; an attention "
                "function is told of padding by attn_mask"
            )
        return FunctionCall(as_function(subject, inputs, arguments))
    if len(inputs) != 1:
        raise TypeError(
            f"got {len(inputs)} inputs for {type(subject).__name__}; accepted are three (query, "
            "key, value) for an attention function, or one for a sequence model: floats (batch, "
            "length, width) or token ids (batch, length)"
        )
    sequence = as_sequence(subject, inputs[0], arguments)
    if lengths is None:
        return SequenceCall(sequence)
    check_takes_mask(sequence.model)
    return SequenceCall(sequence, _real_tokens(as_lengths(lengths, sequence), sequence))


def as_lengths(lengths: object, sequence: Subject) -> list[int]:
    """Return how many tokens of each sample are real; all for None.

    Raises:
        TypeError: The lengths are no whole numbers.
        ValueError: There is not one for each sample, or one is not in 1 to the length.
    """
    batch, length = sequence.inputs.shape[:2]
    given = [length] * batch if lengths is None else _as_list(lengths)
    if not isinstance(given, list) or any(type(n) is not int for n in given):
        raise TypeError(f"lengths: got {given!r}; accepted are whole numbers, one for each sample")
    if len(given) != batch or min(given) < 1 or max(given) > length:
        raise ValueError(
            f"lengths: got {given}; accepted are {batch} numbers from 1 to {length}, one for each "
            "sample"
        )
    return given


def _as_list(lengths: object) -> object:
    """The numbers of a list or a tensor, or what is neither as it is."""
    try:
        return torch.as_tensor(lengths).tolist()
    except (TypeError, ValueError, RuntimeError):
        return lengths


def check_takes_mask(model: SequenceModel) -> None:
    """Raise a ValueError about a sequence model that is not said to take a mask."""
    if model.mask is None:
        raise ValueError(
            f"{model.name} is not told which tokens are padding; say how it takes its mask: "
            "SequenceModel(module, mask='keep' or 'drop' or 'additive', mask_argument=...), where "
            f"mask_argument is one of its parameters: {_parameters(model)}"
        )


def _parameters(model: SequenceModel) -> str:
    try:
        taken = inspect.signature(getattr(model.module, "forward", model.module)).parameters
    except (TypeError, ValueError):  # a callable made in C
        return "unknown"
    return ", ".join(taken)


def _real_tokens(lengths: list[int], sequence: Subject) -> Tensor:
    mask = padding_mask(lengths, sequence.inputs.shape[1], device=sequence.inputs.device)
    return mask[:, 0, 0]


def coarsest(*tensors: Tensor) -> torch.dtype:
    """The coarsest dtype that an output may have been computed in: its own, or that of autocast.

    Args:
        *tensors: The output, and the inputs of floats.
    """
    dtypes = [tensor.dtype for tensor in tensors]
    device = tensors[0].device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtypes.append(torch.get_autocast_dtype(device))
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def differ(got: Tensor, expected: Tensor, allowed: float, judged: Tensor | None = None) -> bool:
    """Whether some judged row of two outputs differs by more than is allowed."""
    change = relative_change(got, expected)
    if judged is not None:
        change = change[judged.to(change.device).expand(change.shape)]
    return bool((change > allowed).any())


def answers(question: Callable[[], bool]) -> bool:
    """Answer a question about a likely cause; no if the subject refuses the unusual inputs."""
    try:
        return question()
    except Exception:  # whatever code under test raises: the failure itself is to be reported
        return False
