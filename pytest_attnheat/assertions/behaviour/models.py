"""Sequence models as subjects: what is called with one sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from pytest_attnheat.assertions.behaviour.sequences import SequenceModel
from pytest_attnheat.assertions.behaviour.subject import answers, differ
from pytest_attnheat.callables import copied
from pytest_attnheat.inputs import misuse


@dataclass(frozen=True)
class ModelSubject:
    """A sequence model, its inputs and how it is called: a `Subject`.

    Attributes:
        model: How the module is called.
        inputs: (batch, length, width) floats or (batch, length) token ids.
        arguments: Further keyword arguments of every call.
        real: Boolean (batch, length), True where a token is no padding; None for no mask.
    """

    model: SequenceModel
    inputs: Tensor
    arguments: Mapping[str, Any] = field(default_factory=dict)
    real: Tensor | None = None

    group = 1
    scale = None
    ordered = "the sequence is"

    @property
    def is_tokens(self) -> bool:
        """Whether the inputs are token ids."""
        return not self.inputs.is_floating_point()

    @property
    def batch(self) -> int:
        """How many samples there are."""
        return self.inputs.shape[0]

    @property
    def length(self) -> int:
        """How many tokens there are."""
        return self.inputs.shape[1]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The inputs."""
        return {"inputs": self.inputs}

    def run(
        self,
        inputs: Tensor | None = None,
        *,
        real: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Call the model with other inputs, or with a copy of its own: it may write to them."""
        given = self.inputs.clone() if inputs is None else inputs
        arguments = {name: copied(argument) for name, argument in self.arguments.items()}
        real = self.real if real is None else real
        return self.model(given, real=real, positions=positions, **arguments)

    def given(self, **tensors: Tensor) -> ModelSubject:
        """The same with other inputs."""
        return replace(self, **tensors)  # type: ignore[arg-type]

    def judged(self) -> Tensor | None:
        """The real tokens, (batch, length)."""
        return self.real

    def samples(self, which: Tensor) -> ModelSubject:
        """The inputs of some samples, and their part of every tensor argument."""
        arguments = {
            name: value[which]
            if isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == self.batch
            else value
            for name, value in self._arguments().items()
        }
        real = None if self.real is None else self.real[which]
        return replace(self, inputs=self.inputs[which], arguments=arguments, real=real)

    def reorder(self, order: Tensor) -> ModelSubject:
        """The tokens, and the rows and columns of masks, in another order."""
        arguments = {
            name: _reordered(value, self.along(name), order) if isinstance(value, Tensor) else value
            for name, value in self._arguments().items()
        }
        real = None if self.real is None else self.real[:, order]
        return replace(self, inputs=self.inputs[:, order], arguments=arguments, real=real)

    def restore(self, output: Tensor, order: Tensor) -> Tensor:
        """The output in the order that the tokens had."""
        return output[:, order.argsort()]

    def cause_of_order(self, base: Tensor, allowed: float) -> str:
        """Tell a causal mask from anything else that knows the order."""
        if answers(lambda: self._first_is_alone(base, allowed)):
            return "the first token does not feel the others: a causal mask?"
        return "the order of tokens is felt: position embeddings, or rotary or relative positions?"

    def _first_is_alone(self, base: Tensor, allowed: float) -> bool:
        """Whether the first token's output stays where all others become copies of it."""
        copies = self.inputs[:, :1].expand(self.inputs.shape).clone()
        return not differ(self.run(copies)[:, :1], base[:, :1], allowed)

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
            got = f"{shape}, whose last dimension may be the length of the sequence or a width"
            accepted = f"a boolean mask, or inputs whose length is not {length}"
            raise ValueError(misuse(name, got, accepted))
        if square:
            return (ndim - 2, ndim - 1)
        if second:
            return (1,)
        return (ndim - 1,) if keys else ()

    def _may_be_width(self, argument: Tensor) -> bool:
        """Whether floats may be features as wide as the sequence is long."""
        width = self.inputs.shape[2] if self.inputs.ndim == 3 else self.length
        return argument.is_floating_point() and width == self.length

    def _arguments(self) -> Mapping[str, Any]:
        """The arguments, none of which can be read in two ways."""
        for name, value in self.arguments.items():
            twice = isinstance(value, Tensor) and tuple(value.shape) == (self.batch, self.length)
            if twice and self.batch == self.length:
                got = f"shape {tuple(value.shape)}, (batch, length) or (length, length)"
                raise ValueError(misuse(name, got, "inputs whose batch and length differ"))
        return self.arguments


def _reordered(argument: Tensor, dims: Sequence[int], order: Tensor) -> Tensor:
    for dim in dims:
        argument = argument.index_select(dim, order.to(argument.device))
    return argument
