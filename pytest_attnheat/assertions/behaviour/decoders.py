"""A subject that is called at once and in chunks, and why the two may differ: of functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from pytest_attnheat.assertions.behaviour.difference import output_place, relative_change
from pytest_attnheat.assertions.behaviour.functions import MASK, AttentionFunction, permitted
from pytest_attnheat.assertions.behaviour.subject import Subject
from pytest_attnheat.attention.reference import causal_mask
from pytest_attnheat.attention.vocabulary import ALIGNMENTS, Alignment
from pytest_attnheat.inputs import misuse, one_of

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
    def subject(self) -> Subject:
        """The subject, which is called at once."""

    @property
    def length(self) -> int:
        """How many tokens there are."""

    @property
    def most_single(self) -> int:
        """How many of them are decoded one by one."""

    @property
    def how(self) -> str:
        """What decoding is done with, as part of a sentence."""

    def decode(self, steps: Sequence[range]) -> Tensor:
        """The output (..., length, width) in chunks."""

    def precision(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype whose rounding is to be expected in outputs of a dtype."""

    def cause(self, evidence: Evidence, broken: Tensor) -> str | None:
        """A likely cause, from which outputs (..., length) are off."""


def tokens_off(broken: Tensor) -> list[int]:
    """The tokens with an output that is off."""
    tokens: list[int] = broken.reshape(-1, broken.shape[-1]).any(0).nonzero().flatten().tolist()
    return tokens


def function_decoder(subject: AttentionFunction, alignment: Alignment | None) -> _FunctionDecoder:
    """Return how an attention function is called in chunks.

    Args:
        subject: The function and its inputs; causal by `is_causal`, the default, or its mask.
        alignment: `"bottom_right"` where chunks may be called with `is_causal=True`.

    Raises:
        ValueError: It is not causal, or the lengths do not fit.
    """
    if alignment is not None:
        one_of("alignment", alignment, ALIGNMENTS)
    given = subject.mask
    is_causal = bool(subject.arguments.get("is_causal", given is None))
    lengths = subject.query.shape[-2], subject.key.shape[-2]
    if given is None and not is_causal:
        accepted = "True, or a mask: a query that may see later keys cannot be decoded without them"
        raise ValueError(misuse("is_causal", "False, and no attn_mask", accepted))
    if lengths[0] > lengths[1] or (is_causal and lengths[0] != lengths[1]):
        accepted = "as many queries as keys, or with attn_mask= alone fewer: the last ones"
        got = f"{lengths[0]} queries and {lengths[1]} keys"
        raise ValueError(misuse("query and key", got, accepted))
    if alignment == "bottom_right" and not is_causal:
        accepted = "None without is_causal=True, whose meaning it says"
        raise ValueError(misuse("alignment", repr(alignment), accepted))
    causal = causal_mask(*lengths, alignment="bottom_right", device=subject.query.device)
    mask = causal
    if given is None:
        subject = replace(subject, arguments={**subject.arguments, "is_causal": True})
    else:
        mask = given.expand(torch.broadcast_shapes(given.shape, lengths))  # type: ignore[no-untyped-call]
        if is_causal:
            mask = mask.masked_fill(~causal, False if mask.dtype == torch.bool else -math.inf)
        else:
            _refuse_later_keys(permitted(given, (*subject.leading, *lengths)) & ~causal)
    return _FunctionDecoder(subject, mask, alignment == "bottom_right")


def _refuse_later_keys(later: Tensor) -> None:
    if bool(later.any()):
        query, key = later.nonzero()[0, -2:].tolist()
        raise ValueError(
            misuse(
                MASK,
                f"one in which query {query} may see key {key}, which comes after it",
                "a mask that is causal, aligned to the bottom right",
            )
        )


@dataclass(frozen=True)
class _FunctionDecoder:
    """An attention function that is given some queries, and the keys up to the last of them.

    Attributes:
        subject: The function, all inputs, and the arguments for all of them.
        mask: Who may see what, spelled out, (..., query_len, key_len).
        own_causal: Whether chunks are called with `is_causal=True`.
    """

    subject: AttentionFunction
    mask: Tensor
    own_causal: bool

    @property
    def length(self) -> int:
        return self.subject.query.shape[-2]

    @property
    def most_single(self) -> int:
        return MOST_SINGLE_TOKENS

    @property
    def how(self) -> str:
        if self.own_causal:
            return "with is_causal=True, aligned to the bottom right"
        return "with its rows of the mask"

    def decode(self, steps: Sequence[range]) -> Tensor:
        return torch.cat([self._chunk(step) for step in steps], -2)

    def precision(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def _chunk(self, step: range) -> Tensor:
        last = self._key_of(step.stop)
        own = {MASK: self.mask[..., step.start : step.stop, :last]}
        if self.own_causal:
            own = {} if self.subject.mask is None else own
            return self._run(step, range(last), **own, is_causal=True)
        needless = len(step) == 1 and self._sees_all_before[step.start]
        return self._run(step, range(last), **({} if needless else own))

    @cached_property
    def _sees_all_before(self) -> list[bool]:
        """For each query, whether it may see all keys up to its own, and none is biased."""
        lengths = self.length, self.subject.length
        later = ~causal_mask(*lengths, alignment="bottom_right", device=self.mask.device)
        nothing_hidden = self.mask if self.mask.dtype == torch.bool else self.mask == 0
        seen: list[bool] = (nothing_hidden | later).reshape(-1, *lengths).all(-1).all(0).tolist()
        return seen

    def _key_of(self, query: int) -> int:
        return query + self.subject.key.shape[-2] - self.length

    def _run(self, queries: range, keys: range, **masks: Any) -> Tensor:
        """Call the function with some queries and keys, and with these masks alone.

        All are copies: it may write to them.
        """
        rows, columns = slice(queries.start, queries.stop), slice(keys.start, keys.stop)
        others = {
            name: value
            for name, value in self.subject.arguments.items()
            if name not in (MASK, "is_causal")
        }
        own = {name: m.clone() if isinstance(m, Tensor) else m for name, m in masks.items()}
        return replace(self.subject, arguments={**others, **own}).run(
            self.subject.query[..., rows, :].clone(),
            self.subject.key[..., columns, :].clone(),
            self.subject.value[..., columns, :].clone(),
        )

    def cause(self, evidence: Evidence, broken: Tensor) -> str | None:
        """Compare the last chunk that is off with what likely mistakes would give."""
        step = evidence.plan.step_of(tokens_off(broken)[-1])
        for words, candidate in self._mistakes(step):
            if evidence.is_explained_by(candidate, step):
                return f"{name_tokens(step)}: the output is that of attention {words}"
        return None

    def _mistakes(self, step: range) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        """Yield likely mistakes in a chunk, in words and as what they give.

        A square call, as the prefill is one, is trusted: it is aligned in one way only.
        """
        size, last = len(step), self._key_of(step.stop)
        if last > size:
            yield (
                "to the keys of this chunk alone: earlier keys are not seen",
                lambda: self._square(step.stop, range(last - size, last)),
            )
            yield (
                "with a causal mask aligned to the top left: decoding needs the bottom right",
                lambda: self._square(step.stop, range(size)),
            )
        if size > 1:
            yield (
                "without a causal mask: later keys of the same chunk are seen",
                lambda: self._run(step, range(last)),
            )
        elif last - 1 <= step.stop:
            for words, keys in (("first", range(1, last)), ("last", range(last - 1))):
                yield (
                    f"without the {words} key",
                    lambda keys=keys: self._square(step.stop, keys)[..., -1:, :],  # type: ignore[misc]
                )

    def _square(self, stop: int, keys: range) -> Tensor:
        """Call the function with some keys and as many queries, causally."""
        size = len(keys)
        masks: dict[str, Any] = {"is_causal": True}
        if not self.subject.arguments.get("is_causal"):
            device = self.mask.device
            masks = {MASK: causal_mask(size, alignment="top_left", device=device)}
        return self._run(range(stop - size, stop), keys, **masks)
