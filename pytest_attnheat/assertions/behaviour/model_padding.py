"""Padding of a sequence model: each sample alone, and all of them as one padded batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pytest_attnheat.assertions.behaviour.difference import output_place
from pytest_attnheat.assertions.behaviour.models import ModelSubject
from pytest_attnheat.assertions.behaviour.padded import Filling, Told
from pytest_attnheat.assertions.behaviour.subject import answers, differ
from pytest_attnheat.attention.reference import padding_mask
from pytest_attnheat.attention.vocabulary import Side


class Alone:
    """Every sample of a sequence model alone, without padding and without a mask."""

    def __init__(
        self, subject: ModelSubject, lengths: list[int], start: Callable[[], None]
    ) -> None:
        self.subject, self.lengths, self.start = subject, lengths, start
        self.real = self.mask(subject.inputs.shape[1], "right")
        self._outputs: dict[bool, Tensor] = {}

    def mask(self, total: int, side: Side) -> Tensor:
        """Which tokens are real, (batch, total), with the padding on one side."""
        device = self.subject.inputs.device
        return padding_mask(self.lengths, total, side=side, device=device)[:, 0, 0]

    def output(self, *, positions: bool) -> Tensor:
        """The outputs of all real tokens, one sample after the other: (tokens, width).

        Args:
            positions: Whether the model is given the positions, or finds them itself.
        """
        if positions not in self._outputs:
            rows = [self._run(i, n, positions) for i, n in enumerate(self.lengths)]
            self._outputs[positions] = torch.cat(rows)
        return self._outputs[positions]

    def _run(self, sample: int, length: int, positions: bool) -> Tensor:
        one = self.subject.samples(torch.tensor([sample]))
        inputs = one.inputs[:, :length]
        places = torch.arange(length, device=inputs.device)[None] if positions else None
        self.start()
        return one.run(inputs, positions=places)[0]


@dataclass(frozen=True)
class PaddedSequence:
    """A sequence model whose samples are one padded batch."""

    alone: Alone
    side: Side
    total: int
    filling: Filling

    @property
    def claim(self) -> str:
        """What broken rows do."""
        return f"rows of real tokens change with padding on the {self.side}"

    @property
    def judged(self) -> Tensor:
        """Which tokens are real, (batch, total)."""
        return self.alone.mask(self.total, self.side)

    @property
    def expected(self) -> Tensor:
        """The outputs of the samples alone at the places of their tokens, NaN elsewhere."""
        alone = self.alone.output(positions=self._takes_positions)
        output = alone.new_full((*self.judged.shape, alone.shape[-1]), math.nan)
        output[self.judged] = alone
        return output

    def run(self, told: Told = "truth") -> Tensor:
        """Run the padded batch with a mask."""
        real = self.judged
        mask = {"truth": real, "all real": torch.ones_like(real), "opposite": ~real}[told]
        try:
            return self._run(self._inputs(), mask)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            length = self.alone.subject.inputs.shape[1]
            if self.total <= length or answers(self._takes_as_many):
                raise
            told_of = (str(error).splitlines() or [""])[0]
            raise ValueError(
                f"the subject refuses {self.total} tokens ({length} were given, "
                f"amount={self.filling.amount} of padding were added): {type(error).__name__}: "
                f"{told_of}; pass a shorter sequence or a smaller amount="
            ) from error

    def _run(self, inputs: Tensor, mask: Tensor | None) -> Tensor:
        positions = (self.judged.cumsum(-1) - 1).clamp(min=0) if self._takes_positions else None
        self.alone.start()
        return self.alone.subject.run(inputs, real=mask, positions=positions)

    def _takes_as_many(self) -> bool:
        """Whether the module runs on as many tokens if it is told of no padding."""
        self._run(self._inputs(), None)
        return True

    def _inputs(self) -> Tensor:
        real, subject = self.judged, self.alone.subject
        *_, width = subject.inputs.shape
        shape = (*real.shape, width) if subject.inputs.ndim == 3 else real.shape
        inputs = self.filling.like(subject.inputs, shape)
        inputs[real] = subject.inputs[self.alone.real]
        return inputs

    def other(self) -> PaddedSequence | None:
        """The same with padding that holds something else, if that is allowed."""
        content = self.filling.other()
        return None if content is None else replace(self, filling=content)

    def sees_only_padding(self, got: Tensor, allowed: float) -> bool:
        """Whether real tokens do not feel the first of them.

        A module that makes its positions from the mask is not right under the opposite mask
        either; but under a mask that it reads as its opposite real tokens are masked.
        """
        real = self.judged
        first = real & (real.cumsum(-1) == 1)
        if not bool((real & ~first).any()):
            return False
        inputs = self._inputs()
        inputs[first] = replace(self.filling, seed=self.filling.seed + 2).like(
            inputs, inputs.shape
        )[first]
        return not differ(self._run(inputs, real), got, allowed, real & ~first)

    @property
    def _takes_positions(self) -> bool:
        # On the right the positions follow from the inputs, and are those by default.
        return self.side == "left" and self.alone.subject.model.positions_argument is not None

    def place(self, index: tuple[int, ...]) -> str:
        """Name a token of the output."""
        sample, place = index
        count = self.alone.lengths[sample]
        token = place if self.side == "right" else place - (self.total - count)
        return f"{output_place(index)} (token {token} of the {count} of sample {sample})"

    def spreads_nan(self, got: Tensor) -> bool:
        """Whether there is NaN, and only where padding comes first."""
        return self.side == "left" and bool(got.isnan().any())

    @property
    def ignored(self) -> str:
        """Say that the output is the same without the mask."""
        argument = self.alone.subject.model.mask_argument
        if argument is None:
            return (
                f"real tokens feel the padding {self._where}: a causal mask that lets the future "
                "through, or a module that needs a mask: SequenceModel(module, mask=..., "
                "mask_argument=...)"
            )
        return f"{argument} changes nothing: it is ignored"

    @property
    def _where(self) -> str:
        return "after them" if self.side == "right" else "before them"

    def advice(self, felt: bool | None) -> str:
        """What to look at where only this side is wrong."""
        if felt:
            return "real tokens feel what the padding holds: it is not masked there"
        if self.side == "right":
            return (
                "real tokens do not feel what the padding holds, only that it is there: are "
                "positions, or a scale, taken from the length of the batch?"
            )
        argument = self.alone.subject.model.positions_argument
        if argument is None:
            return (
                "the module is not told the positions: if it has absolute positions, let it take "
                "them, with SequenceModel(..., positions_argument=...)"
            )
        return f"are the positions in {argument} used?"
