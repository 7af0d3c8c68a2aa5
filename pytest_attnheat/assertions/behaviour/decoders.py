"""What can be called at once and in chunks, and what shows why the two differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pytest_attnheat.assertions.behaviour.difference import output_place, relative_change

# How many steps are a single token: with a cache a step is cheap, without one it is a prefix.
MOST_SINGLE_TOKENS = 128
MOST_PREFIXES = 64


@dataclass(frozen=True)
class Plan:
    """How a sequence is cut into chunks.

    Attributes:
        sizes: The size of each chunk.
        words: The same as part of a sentence.
    """

    sizes: list[int]
    words: str

    @property
    def steps(self) -> list[range]:
        """The tokens of each chunk."""
        ends = [sum(self.sizes[: i + 1]) for i in range(len(self.sizes))]
        return [range(end - size, end) for end, size in zip(ends, self.sizes, strict=True)]

    def step_of(self, token: int) -> range:
        """The tokens of the chunk that a token is in."""
        return next(step for step in self.steps if token in step)

    def place(self, index: tuple[int, ...]) -> str:
        """Name a row of the output by its token and chunk."""
        return f"{output_place(index)}, {name_tokens(self.step_of(index[-1]), index[-1])},"


def name_tokens(step: range, token: int | None = None) -> str:
    """Name a chunk, or one token in it."""
    if len(step) == 1:
        return f"token {step[0]} decoded alone"
    chunk = f"tokens {step[0]} to {step[-1]} decoded together"
    return chunk if token is None else f"token {token} of {chunk}"


@dataclass(frozen=True)
class Evidence:
    """What is known when an output differs.

    Attributes:
        plan: How the sequence was cut.
        decoded: (..., length, width), in chunks.
        whole: The same at once.
        allowed: By what part of its size a row may differ.
        singles_are_right: Whether decoding token by token gave the right outputs before.
    """

    plan: Plan
    decoded: Tensor
    whole: Tensor
    allowed: float
    singles_are_right: bool

    def is_explained_by(self, candidate: Callable[[], Tensor], step: range) -> bool:
        """Whether the outputs of a chunk are those of a candidate (..., chunk, width)."""
        got = self.decoded[..., step.start : step.stop, :]
        try:
            expected = candidate()
        except Exception:  # A subject that cannot be called so is no reason to hide the failure.
            return False
        return expected.shape == got.shape and self.alike(got, expected)

    def alike(self, got: Tensor, expected: Tensor) -> bool:
        """Whether two outputs of some rows are the same."""
        return bool((relative_change(got, expected) <= self.allowed).all())


class Decoder(Protocol):
    """A subject that can be called at once and in chunks."""

    @property
    def length(self) -> int:
        """How many tokens there are."""

    @property
    def most_single(self) -> int:
        """How many of them are decoded one by one."""

    @property
    def how(self) -> str:
        """What decoding is done with, as part of a sentence."""

    def starting_with(self, start: Callable[[], None]) -> Decoder:
        """The same, with something to do before each call."""

    def whole(self) -> Tensor:
        """The output (..., length, width) at once."""

    def decode(self, steps: Sequence[range]) -> Tensor:
        """The same in chunks."""

    def precision(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype whose rounding is to be expected in outputs of a dtype."""

    def judged(self) -> Tensor | None:
        """Which outputs mean something, boolean (..., length); None for all."""

    def cause(self, evidence: Evidence, broken: Tensor) -> str | None:
        """A likely cause, from which outputs (..., length) are off."""


def tokens_off(broken: Tensor) -> list[int]:
    """The tokens with an output that is off."""
    tokens: list[int] = broken.reshape(-1, broken.shape[-1]).any(0).nonzero().flatten().tolist()
    return tokens
