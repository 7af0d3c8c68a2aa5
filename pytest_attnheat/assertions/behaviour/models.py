"""Sequence models as subjects: what is called with one sequence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ...attention.reference import causal_mask, read_lengths
from ...attention.tolerance import output_tolerance
from ...attention.vocabulary import Side
from ...callables import copied, modules_in
from ...inputs import misuse
from .functions import AttentionFunction, permitted
from .sequences import SequenceModel, check_takes_mask
from .subject import begin, differ, holds, output_place
from .visibility import (
    Claim,
    Embedded,
    Padding,
    Replacement,
    Rule,
    Stated,
    Told,
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

# A call of so many multiplications is cheap; attention takes so many for each pair of tokens.
_CHEAP, _PER_TOKEN = 2**27, 64


@dataclass(frozen=True)
class ModelSubject:
    """A sequence model, its inputs and how it is called: a `Subject`."""

    model: SequenceModel  # How the module is called
    inputs: Tensor  # (batch, length, width) floats or (batch, length) token ids
    arguments: Mapping[str, Any] = field(default_factory=dict)  # Further keyword arguments
    # Boolean (batch, length), True where a token is no padding; None for no mask
    real: Tensor | None = None
    positions: Tensor | None = None  # (batch, length); None where the model finds them itself
    seed: int | None = None  # Where each call starts its random numbers; None: from where they are

    group = 1
    scale = None
    ordered = "the sequence is"
    observer = element = "token"
    has_queries = False
    pads_rows = True  # padding adds rows to its output

    @property
    def is_tokens(self) -> bool:
        """Whether the inputs are token ids."""
        return not self.inputs.is_floating_point()

    @property
    def mask_argument(self) -> str | None:
        """That of the model."""
        return self.model.mask_argument

    @property
    def batch(self) -> int:
        """How many samples there are."""
        return self.inputs.shape[0]

    @property
    def length(self) -> int:
        """How many tokens there are."""
        return self.inputs.shape[1]

    @property
    def observers(self) -> int:
        """How many rows its output has for each sample."""
        return self.length

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The inputs."""
        return {"inputs": self.inputs}

    @property
    def is_cheap(self) -> bool:
        """Whether a call takes no more than so many multiplications, a matter of milliseconds."""
        modules = modules_in(self.model.module)
        parameters = sum(p.numel() for module in modules for p in module.parameters())
        tokens = self.batch * self.length
        return (parameters + _PER_TOKEN * self.length) * tokens <= _CHEAP

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
        begin(self.seed)
        return self._call(
            replace(self.model, arguments=arguments),
            given,
            real=self.real if real is None else real,
            positions=self.positions if positions is None else positions,
        )

    def _call(self, model: SequenceModel, given: Tensor, **told: Any) -> Tensor:
        return model(given, **told)

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

    def reorder(self, order: Tensor, *, square: bool = False) -> ModelSubject:
        """The tokens, and the rows and columns of masks, in another order; see `along`."""
        arguments = {
            name: _reordered(value, self.along(name, square=square), order)
            if isinstance(value, Tensor)
            else value
            for name, value in self.arguments.items()
        }
        real = None if self.real is None else self.real[:, order]
        return replace(self, inputs=self.inputs[:, order], arguments=arguments, real=real)

    def cut(self, tokens: Sequence[int]) -> ModelSubject:
        """Some of the tokens alone, with their positions."""
        chosen = torch.tensor([*tokens], device=self.inputs.device)
        positions = None if self.positions is None else self.positions[:, chosen]
        return replace(self.reorder(chosen, square=True), positions=positions)

    def restore(self, output: Tensor, order: Tensor) -> Tensor:
        """The output in the order that the tokens had."""
        return output[:, order.argsort()]

    def mistake(self, output: Tensor) -> None:
        """None: what its attention was given is not known."""

    def cause_of_order(self, base: Tensor, allowed: float) -> str:
        """Tell a causal mask from anything else that knows the order."""
        # Others that are copies of the first leave it as it was.
        copies = self.inputs[:, :1].expand(self.inputs.shape).clone()
        if holds(lambda: not differ(self.run(copies)[:, :1], base[:, :1], allowed)):
            return "the first token does not feel the others: a causal mask?"
        return "the order of tokens is felt: position embeddings, or rotary or relative positions?"

    def along(self, name: str, *, square: bool = False) -> tuple[int, ...]:
        """Which dimensions of a tensor argument are those of the sequence."""
        # The second of (batch, length, ...), the last two of (..., length, length), the last of a
        # mask (length,), (batch, 1, length) or (batch, 1, 1, length); (length, length) is `square`
        # where (batch, length) is as large. A width that happens to be as large as the sequence is
        # long, as that of a memory (batch, other length, width), is none.
        argument: Tensor = (self.arguments if square else self._arguments())[name]
        if name in self._of_memory:
            return ()
        shape, ndim, length = tuple(argument.shape), argument.ndim, self.length
        if ndim == 0 or length not in shape:
            return ()
        second = ndim > 1 and shape[0] in (1, self.batch) and shape[1] == length
        rows = ndim > 1 and shape[-2:] == (length, length) and name not in self._by_token
        keys = shape[-1] == length and (ndim == 1 or (ndim > 2 and set(shape[1:-1]) == {1}))
        width = self.inputs.shape[2] if self.inputs.ndim == 3 else length
        may_be_width = argument.is_floating_point() and width == length  # features as wide as that
        if ndim == 3 and ((rows and second) or keys) and may_be_width:
            got = f"{shape}, whose last dimension may be the length of the sequence or a width"
            accepted = f"a boolean mask, or inputs whose length is not {length}"
            raise ValueError(misuse(name, got, accepted))
        if rows:
            return (ndim - 2, ndim - 1)
        if second:
            return (1,)
        return (ndim - 1,) if keys else ()

    @property
    def _of_memory(self) -> tuple[str | None, ...]:
        """The arguments that are about a memory, and not about the sequence."""
        name = self.model.memory_argument
        return () if name is None else (name, self.model.mask_argument)

    @property
    def _by_token(self) -> tuple[str | None, ...]:
        """The arguments that are (batch, length), of as many samples as tokens too."""
        return (self.model.mask_argument, self.model.positions_argument)

    def _arguments(self) -> Mapping[str, Any]:
        """The arguments, none of which can be read in two ways."""
        for name, value in self.arguments.items():
            if name in (*self._of_memory, *self._by_token):
                continue
            twice = isinstance(value, Tensor) and tuple(value.shape) == (self.batch, self.length)
            if twice and self.batch == self.length:
                got = f"shape {tuple(value.shape)}, (batch, length) or (length, length)"
                raise ValueError(misuse(name, got, "inputs whose batch and length differ"))
        return self.arguments

    def claim(self, stated: Stated) -> tuple[ModelSubject, Claim]:
        """What its tokens may see, and the same model with its mask, if there is padding."""
        shape, device = (self.batch, self.observers, self.length), self.inputs.device
        rules: list[Rule] = []
        subject = self
        if stated.lengths is not None:
            subject = self.padded_as(stated.lengths, stated.side, bool(stated.causal))
            real = subject.real
            assert real is not None
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
            seen = permitted(stated.may_see, shape).to(device)
            rules.append(Rule(seen, since("which may_see, or what is declared, forbids")))
        claimed = (
            "no token may see a later one: assumed, since nothing was said. For an encoder pass "
            "causal=False, or lengths="
        )
        return subject, Claim.of(
            rules,
            shape,
            self.inputs,
            may_be_causal="if the model is causal, say so with causal=True",
            judged=subject.judged(),
            assumed=claimed if assumed else None,
        )

    def padded_as(self, lengths: object, side: Side, causal: bool = False) -> ModelSubject:
        """The same with so many real tokens, of which it is told."""
        given = self.as_lengths(lengths)
        if min(given) == self.length:
            accepted = f"at least one of them less than {self.length}, or there is no padding"
            raise ValueError(misuse("lengths", given, accepted))
        if not (causal and side == "right"):
            check_takes_mask(self.model)
        real = Padding(side, self.length, given, None, 0).real(self.inputs.device)
        return replace(self, real=real, positions=_rank(real) if side == "left" else None)

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

    def as_lengths(self, lengths: object) -> list[int]:
        """Return how many tokens of each sample are real, 1 to the length; all for None."""
        if lengths is None:
            return [self.length] * self.batch
        given = read_lengths(lengths, self.length, batch=self.batch)
        if min(given) < 1:
            accepted = f"{self.batch} numbers from 1 to {self.length}, one for each sample"
            raise ValueError(misuse("lengths", given, accepted))
        return given

    def paddings(self, lengths: object, amount: int) -> list[tuple[Sequence[int], int]]:
        """All samples with padding; and as many batches are, the longest without."""
        given = self.as_lengths(lengths)
        longest = max(given)
        found: list[tuple[Sequence[int], int]] = [(given, longest + amount)]
        if len(given) > 1 and longest > 1:
            ragged = [max(1, n - i % longest) for i, n in enumerate(given)]
            found.append((ragged if min(given) == self.length else given, longest))
        return found

    def check_padding(self, *, needs_mask: bool) -> None:
        """Refuse a model without a mask, or with arguments as long as the sequence."""
        if needs_mask:
            check_takes_mask(self.model)
        for name, argument in self.arguments.items():
            if isinstance(argument, Tensor) and self.along(name):
                got = f"shape {tuple(argument.shape)}, made for sequences of {self.length}"
                accepted = (
                    "what the module makes itself from inputs of any length, as padding changes "
                    f"it; for padding give lengths ({self.batch},)"
                )
                raise ValueError(misuse(name, got, accepted))

    def pad(self, padding: Padding, told: Told = "truth") -> ModelSubject:
        """The samples as one padded batch."""
        real = padding.real(self.inputs.device)
        masks = {"truth": real, "all real": torch.ones_like(real), "opposite": ~real}
        own = _at(self.inputs, _rank(real))
        filled = padding.like(self.inputs, own.shape)
        chosen = real if self.is_tokens else real.unsqueeze(-1)
        positions = _rank(real) if self.takes_positions(padding.side) else None
        return replace(
            self, inputs=torch.where(chosen, own, filled), real=masks.get(told), positions=positions
        )

    def takes_positions(self, side: Side) -> bool:
        """On the right the positions follow from the inputs, and are those by default."""
        return self.pads_rows and side == "left" and self.model.positions_argument is not None

    def alone(self, lengths: Sequence[int], *, positions: bool) -> Tensor:
        """The outputs of samples alone, (batch, most tokens, width), NaN beyond their tokens."""
        outputs = []
        for sample, length in enumerate(lengths):
            one = self.samples(torch.tensor([sample]))
            inputs = one.inputs[:, :length]
            numbers = torch.arange(length, device=inputs.device)[None] if positions else None
            outputs.append(one.run(inputs, positions=numbers)[0])
        return nn.utils.rnn.pad_sequence(outputs, batch_first=True, padding_value=math.nan)

    def beside(self, alone: Tensor, padding: Padding) -> Tensor:
        """The outputs of samples alone where their tokens are in the padded batch."""
        real = padding.real(alone.device)
        return _at(alone, _rank(real)).masked_fill(~real.unsqueeze(-1), math.nan)

    def name_padding(self, padding: Padding) -> str:
        """Say on which side the padding is."""
        return f"rows of real tokens change with padding on the {padding.side}"

    def name_row(self, index: tuple[int, ...], padding: Padding) -> str:
        """Name a token of the output, counted without the padding."""
        sample, number = index
        count = padding.lengths[sample]
        token = number if padding.side == "right" else number - (padding.total - count)
        return f"{output_place(index)} (token {token} of the {count} of sample {sample})"

    def ignores_mask(self, base: Tensor, allowed: float) -> bool:
        """Whether no output, not of padding either, changes with what it is told is padding."""
        if self.real is None or self.mask_argument is None:
            return False
        told = (torch.ones_like(self.real), ~self.real)
        return not any(differ(self.run(real=real), base, allowed) for real in told)

    def cause_of_mask(self) -> str | None:
        """Say whether a mask that hides nothing changes the output."""
        plain = replace(self, real=None, positions=None)
        everything = replace(
            plain, real=self.inputs.new_ones(self.inputs.shape[:2], dtype=torch.bool)
        )
        base = plain.run()
        allowed = output_tolerance(base.dtype)
        if not holds(lambda: differ(everything.run(), base, allowed)):
            return None
        said = "a mask that hides nothing "
        if bool(everything.run().isnan().any()) and not bool(base.isnan().any()):
            said += "makes the output nan: is it multiplied by -inf, or by a number that its dtype "
            return said + "cannot hold?"
        if holds(lambda: not differ(plain.cut([0]).run(), base[:, :1], allowed)):
            said += "changes the output: is the causal mask lost where another is given, as by | "
            return said + "in place of &?"
        return said + "changes the output: what else is it used for?"

    def cause_of_padding(self, side: Side, *, felt: bool | None) -> str | None:
        """Tell a mask that does not hide from positions."""
        if felt:
            return "real tokens feel what the padding holds: is it masked, and before the softmax?"
        if side == "right" and felt is None:
            return None
        if side == "right":
            return (
                "real tokens do not feel what the padding holds, only that it is there: are "
                "positions, or a scale, taken from the length of the batch?"
            )
        argument = self.model.positions_argument
        if argument is None:
            return (
                "the module is not told the positions: if it has absolute positions, let it take "
                "them, with SequenceModel(..., positions_argument=...), or say side='right' there "
                "if it is never padded on the left"
            )
        return f"are the positions in {argument} used?"


Subject: TypeAlias = AttentionFunction | ModelSubject


def _rank(real: Tensor) -> Tensor:
    """How many real tokens of its sample are before each, (batch, length)."""
    return (real.cumsum(-1) - 1).clamp(min=0)


def _at(rows: Tensor, index: Tensor) -> Tensor:
    """Rows (batch, length, ...) at an index (batch, other length)."""
    wide = index.reshape(*index.shape, *[1] * (rows.ndim - 2))
    return rows.gather(1, wide.expand(*index.shape, *rows.shape[2:]))


def _reordered(argument: Tensor, dims: Sequence[int], order: Tensor) -> Tensor:
    for dim in dims:
        argument = argument.index_select(dim, order.to(argument.device))
    return argument
