"""What padding is made of, and what a subject with padding on one side answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from pytest_attnheat.attention.vocabulary import Side

# What the subject is told of the padding: the truth, that all is real, or the opposite.
Told: TypeAlias = Literal["truth", "all real", "opposite"]

# Padding is drawn at these multiples of the scale of the inputs: what is large is felt.
_SCALES = (3.0, 10.0)


@dataclass(frozen=True)
class Filling:
    """What padding is made of.

    Attributes:
        amount: How many places are added.
        value: What they hold; None for numbers drawn from the seed.
        seed: That seed.
        scale: How much larger than the inputs they are.
    """

    amount: int
    value: float | None
    seed: int
    scale: float = 1.0

    @property
    def aims(self) -> bool:
        """Whether a padding key of a function points where a query looks: at the last scale."""
        return self.scale == _SCALES[-1]

    def other(self) -> Filling | None:
        """The same with other numbers; None for one value, which may be how padding is known."""
        return None if self.value is not None else replace(self, seed=self.seed + 1)

    def like(self, inputs: Tensor, shape: Sequence[int]) -> Tensor:
        """Fill a shape with padding for these inputs."""
        if self.value is not None:
            return torch.full(shape, self.value, dtype=inputs.dtype, device=inputs.device)
        generator = torch.Generator().manual_seed(self.seed + int(self.scale))
        if not inputs.is_floating_point():
            ids = torch.randint(0, int(inputs.max()) + 1, tuple(shape), generator=generator)
            return ids.to(inputs)
        numbers = torch.randn(*shape, generator=generator)
        size = float(inputs.double().square().mean().sqrt()) or 1.0
        return (numbers * (self.scale * size)).to(inputs)

    def each(self) -> Iterator[Filling]:
        """The same at every scale, or once if it holds one value."""
        for scale in _SCALES if self.value is None else _SCALES[:1]:
            yield replace(self, scale=scale)


class Padded(Protocol):
    """A subject with padding on one side."""

    @property
    def side(self) -> Side:
        """That side."""

    @property
    def claim(self) -> str:
        """What broken rows do."""

    @property
    def expected(self) -> Tensor:
        """The output without the padding, in the shape of that with it."""

    @property
    def judged(self) -> Tensor | None:
        """Which rows are judged."""

    def run(self, told: Told = "truth") -> Tensor:
        """Call the subject."""

    def place(self, index: tuple[int, ...]) -> str:
        """Name a row of the output."""

    def spreads_nan(self, got: Tensor) -> bool:
        """Whether NaN in the padding is likely to be why an output is wrong."""

    @property
    def ignored(self) -> str:
        """Say that the output is the same without the mask."""

    def advice(self, felt: bool | None) -> str:
        """What to look at where only this side is wrong.

        Args:
            felt: Whether the output changes with what the padding holds; None for unknown.
        """

    def other(self) -> Padded | None:
        """The same with padding that holds something else, if that is allowed."""

    def sees_only_padding(self, got: Tensor, allowed: float) -> bool:
        """Whether real tokens do not feel one another."""
