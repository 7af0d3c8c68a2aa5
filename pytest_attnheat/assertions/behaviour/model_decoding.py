"""What is called at once and in chunks, and why the two may differ: a model with its cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pytest_attnheat.assertions.behaviour.difference import output_place
from pytest_attnheat.assertions.behaviour.models import ModelSubject
from pytest_attnheat.assertions.behaviour.sequences import (
    CachedDecoding,
    decoded,
    refuse_unused_cache,
)
from pytest_attnheat.assertions.behaviour.subject import begin, differ
from pytest_attnheat.attention.vocabulary import Alignment
from pytest_attnheat.inputs import misuse

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
        judged: (..., length): the rows that mean something; None for all.
    """

    plan: Plan
    decoded: Tensor
    whole: Tensor
    allowed: float
    singles_are_right: bool
    judged: Tensor | None = None

    def is_explained_by(self, candidate: Callable[[], Tensor], step: range) -> bool:
        """Whether the outputs of a chunk are those of a candidate (..., chunk, width)."""
        got = self.decoded[..., step.start : step.stop, :]
        try:
            expected = candidate()
        except Exception:  # A subject that cannot be called so is no reason to hide the failure.
            return False
        return expected.shape == got.shape and self.alike(got, expected, step)

    def alike(self, got: Tensor, expected: Tensor, step: range) -> bool:
        """Whether two outputs of a chunk are the same."""
        judged = None if self.judged is None else self.judged[..., step.start : step.stop]
        return not differ(got, expected, self.allowed, judged)


def tokens_off(broken: Tensor) -> list[int]:
    """The tokens with an output that is off."""
    tokens: list[int] = broken.reshape(-1, broken.shape[-1]).any(0).nonzero().flatten().tolist()
    return tokens


def model_decoder(subject: ModelSubject, alignment: Alignment | None) -> ModelDecoder:
    """Return how a model is called in chunks; ValueError if it is given an alignment."""
    if alignment is not None:
        accepted = "None for a sequence model, which is not told that it is causal"
        raise ValueError(misuse("alignment", repr(alignment), accepted))
    return ModelDecoder(subject, _has_cache(subject))


def _has_cache(subject: ModelSubject) -> bool:
    decode = subject.model.decode
    if isinstance(decode, CachedDecoding):
        # Only the model itself knows: BERT takes a cache, and returns none.
        with torch.no_grad():
            _, cache = ModelDecoder(subject, has_cache=True).step(range(1), None)
        return cache is not None
    if decode is None:
        refuse_unused_cache(subject.model.module)
    return decode is not None


@dataclass(frozen=True)
class ModelDecoder:
    """A sequence model that is given chunk after chunk with its cache, or longer prefixes.

    Attributes:
        subject: The model, its inputs and further arguments.
        has_cache: Whether it decodes with a cache.
    """

    subject: ModelSubject
    has_cache: bool

    @property
    def length(self) -> int:
        """How many tokens there are."""
        return self.subject.inputs.shape[1]

    @property
    def most_single(self) -> int:
        """How many of them are decoded one by one."""
        return MOST_SINGLE_TOKENS if self.has_cache else MOST_PREFIXES

    @property
    def how(self) -> str:
        """What decoding is done with, as part of a sentence."""
        words = "with the cache" if self.has_cache else "without a cache"
        return words if self.subject.real is None else f"{words}, after padding on the left"

    def decode(self, steps: Sequence[range]) -> Tensor:
        """Return the output (batch, length, width) in chunks."""
        outputs: list[Tensor] = []
        cache: Any = None
        for step in steps:
            if self.has_cache:
                output, cache = self.step(step, cache)
            else:
                output = self._run([*range(step.stop)])[:, step.start :]
            outputs.append(output)
        return torch.cat(outputs, 1)

    def precision(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype whose rounding is to be expected in outputs of a dtype."""
        # Models of transformers do softmax, norms and rotations in float32 in any case.
        return torch.float32 if dtype == torch.float64 else dtype

    def step(self, step: range, cache: Any) -> tuple[Tensor, Any]:
        """Decode one chunk with a cache; the output (batch, chunk, width) and the new cache."""
        model = self.subject.model
        if model.decode is None:
            raise ValueError(f"{model.name} decodes without a cache")
        chunk = self.subject.inputs[:, step.start : step.stop]
        here = self.subject.cut(range(step.stop))
        arguments = model.keywords(
            chunk,
            here.arguments,
            here.real,
            None if here.positions is None else here.positions[:, step.start :],
        )
        if here.positions is None and model.positions_argument in arguments:
            arguments[model.positions_argument] = arguments[model.positions_argument][
                ..., step.start :
            ]
        begin(self.subject.seed)
        given = chunk if model.batch_first else chunk.transpose(0, 1)
        result, cache = decoded(model.decode, given.clone(), cache, **arguments)
        return model.read(result, chunk), cache

    def _run(self, tokens: Sequence[int], positions: Sequence[int] | None = None) -> Tensor:
        """Run the model on some tokens at once, without a cache."""
        here = self.subject.cut(tokens)
        at = None
        if positions is not None:
            at = torch.tensor(positions, device=here.inputs.device).repeat(here.batch, 1)
        return here.run(positions=at)

    def cause(self, evidence: Evidence, broken: Tensor) -> str | None:
        """Compare the first chunk that is off with its prefix, the last with likely mistakes."""
        tokens = tokens_off(broken)
        first, step = (evidence.plan.step_of(token) for token in (tokens[0], tokens[-1]))
        if self._looks_ahead(evidence, first):
            also = " without a cache, too," if self.has_cache else ""
            return (
                f"{name_tokens(first)}:{also} the output changes when later tokens are cut off: "
                "the model looks ahead, or depends on the length"
            )
        if not self.has_cache:
            return None
        for words, candidate in self._mistakes(evidence.plan, step):
            if evidence.is_explained_by(candidate, step):
                return f"{name_tokens(step)}: the output is that {words}"
        if evidence.singles_are_right:
            return (
                "single tokens are right, longer chunks are not: within a chunk the causal mask "
                "must be aligned to the bottom right, and the positions must count on"
            )
        if not bool(broken[:, : evidence.plan.sizes[0]].any()):
            return (
                _why_some_entries(broken)
                or _why_from_some_token(broken, evidence.plan)
                or "the first chunk is right: look at what is cached, and at the positions after it"
            )
        return None

    def _looks_ahead(self, evidence: Evidence, step: range) -> bool:
        """Whether a chunk without a cache differs, too, once later tokens are cut off."""
        try:
            prefix = self._run([*range(step.stop)])[:, step.start :]
        except Exception:  # No reason to hide the failure.
            return False
        return not evidence.alike(prefix, evidence.whole[:, step.start : step.stop], step)

    def _mistakes(self, plan: Plan, step: range) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        if step.start == 0:
            return
        yield "of this chunk alone: the cache is not used", lambda: self.step(step, None)[0]
        if self.subject.model.positions_argument is not None:
            restarted = [
                at for chunk in plan.steps if chunk.start <= step.start for at in range(len(chunk))
            ]
            yield (
                "with positions that start again at 0 in each chunk",
                lambda: self._run([*range(step.stop)], restarted)[:, step.start :],
            )
            for words, off in (("small", -1), ("large", 1)):
                shifted = [at + off * (at >= plan.sizes[0]) for at in range(step.stop)]
                yield (
                    f"with positions that are one too {words} after the first chunk",
                    lambda at=shifted: self._run([*range(step.stop)], at)[:, step.start :],  # type: ignore[misc]
                )
        own = [*step]
        histories: dict[str, list[int]] = {
            "of this chunk alone at its positions: the cache is not used": [],
            "without the first token of the cache": [*range(1, step.start)],
            "without the token just before, the last of the cache": [*range(step.start - 1)],
        }
        for words, history in histories.items():
            tokens = history + own
            yield words, lambda tokens=tokens: self._run(tokens, tokens)[:, -len(own) :]  # type: ignore[misc]


def _why_some_entries(broken: Tensor) -> str | None:
    """Name the entries of the batch that are off, where others are right."""
    off = broken.any(-1).flatten().tolist()
    if all(off):
        return None
    if len(off) > 2 and not off[0] and all(off[1:]):
        return "batch entry 0 is right, all others are not: is its cache used for all?"
    named = ", ".join(str(entry) for entry, is_off in enumerate(off) if is_off)
    return f"batch entry {named} alone is off: look at how the cache is indexed by the batch"


def _why_from_some_token(broken: Tensor, plan: Plan) -> str | None:
    """Name the token from which on all are off, where some decoded ones before it are right."""
    off = tokens_off(broken)
    first = off[0]
    if first <= plan.sizes[0] or len(off) < 2 or off[-1] - first + 1 > len(off):
        return None
    return (
        f"right up to token {first - 1}, wrong from token {first} on: is the cache full then, cut "
        "or overwritten, or do the positions wrap around?"
    )
