"""Sequence models as subjects: what is called with one sequence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pytest_attnheat.assertions.behaviour.functions import permitted
from pytest_attnheat.assertions.behaviour.sequences import SequenceModel, check_takes_mask
from pytest_attnheat.assertions.behaviour.subject import answers, differ
from pytest_attnheat.assertions.behaviour.visibility import (
    Claim,
    Embedded,
    Replacement,
    Rule,
    Stated,
    as_documents,
    gradients,
    in_the_future,
    is_padding,
    noise,
    of_document,
    other_tokens,
    since,
    size_of,
)
from pytest_attnheat.attention.reference import causal_mask, padding_mask
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
    observer = element = "token"
    has_queries = False

    @property
    def is_tokens(self) -> bool:
        """Whether the inputs are token ids."""
        return not self.inputs.is_floating_point()

    @property
    def through_embeddings(self) -> bool:
        """Whether gradients are those of the embeddings of token ids."""
        return self.is_tokens

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

    def claim(self, stated: Stated) -> tuple[ModelSubject, Claim]:
        """What its tokens may see, and the same model with its mask, if there is padding."""
        shape, device = (self.batch, self.length, self.length), self.inputs.device
        rules: list[Rule] = []
        subject = self
        if stated.lengths is not None:
            real = self._padded_as(stated)
            subject = replace(self, real=real)
            rules.append(Rule(real.unsqueeze(-2), is_padding(real.sum(-1).tolist())))
        if stated.documents is not None:
            documents = as_documents(stated.documents, shape[:2]).to(device)
            same = documents.unsqueeze(-1) == documents.unsqueeze(-2)
            rules.append(Rule(same, of_document(documents)))
        others = (stated.lengths, stated.documents, stated.may_see)
        assumed = stated.causal is None and all(other is None for other in others)
        if stated.causal or assumed:
            mask = causal_mask(self.length, alignment="top_left", device=device)
            rules.append(Rule(mask, in_the_future(0)))
        if stated.may_see is not None:
            rules.append(Rule(permitted(stated.may_see, shape), since("which may_see forbids")))
        claimed = (
            "no token may see a later one: assumed, since nothing was said. For an encoder pass "
            "causal=False, or lengths="
        )
        return subject, Claim.of(
            rules,
            shape,
            self.inputs,
            may_be_causal="if the model is causal, say so with causal=True",
            judged=subject.real,
            assumed=claimed if assumed else None,
        )

    def _padded_as(self, stated: Stated) -> Tensor:
        """Which tokens are real, where the caller gave lengths."""
        assert stated.lengths is not None
        real = padding_mask(
            stated.lengths, self.length, side=stated.side, device=self.inputs.device
        )[:, 0, 0]
        lengths = real.sum(-1).tolist()
        if len(lengths) != self.batch or min(lengths) == self.length:
            accepted = (
                f"one for each of {self.batch} samples, at least one of them less than "
                f"{self.length}, or there is no padding"
            )
            raise ValueError(misuse("lengths", lengths, accepted))
        if not (stated.causal and stated.side == "right"):
            check_takes_mask(self.model)
        return real

    def run_replaced(self, replaced: Replacement, *, seed: int) -> Tensor:
        """The output with some tokens replaced."""
        given, chosen, content = self.inputs, replaced.elements, replaced.content
        if chosen is None:
            return self.run()
        seed += 0 if replaced.like is None else 1 + replaced.like
        if not self.is_tokens:
            other = noise(given, "inputs", content, seed=seed)
            return self.run(torch.where(chosen.unsqueeze(-1), other, given))
        if content == "nan":
            with Embedded(given, lambda rows: rows.masked_fill(chosen.unsqueeze(-1), math.nan)):
                return self.run()
        return self.run(torch.where(chosen, other_tokens(given, content, seed), given))

    def gradient(self, observers: Sequence[Tensor]) -> list[Tensor]:
        """The gradient of each token's input, or of its embedding."""
        with torch.enable_grad():
            if self.is_tokens:
                with Embedded(self.inputs, lambda rows: rows.detach().requires_grad_()) as embedded:
                    output = self.run(self.inputs)
                sources = embedded.changed
                if not sources:
                    raise RuntimeError("the token ids are not looked up by an embedding")
            else:
                sources = [self.inputs.clone().requires_grad_()]
                output = self.run(sources[0].clone())  # which it may write to
            found = gradients(output, sources, observers)
        return [size_of(torch.stack(parts).sum(0)) for parts in found]


def _reordered(argument: Tensor, dims: Sequence[int], order: Tensor) -> Tensor:
    for dim in dims:
        argument = argument.index_select(dim, order.to(argument.device))
    return argument
