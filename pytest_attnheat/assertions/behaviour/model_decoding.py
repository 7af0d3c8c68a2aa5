"""What is called at once and in chunks, and why the two may differ: a model with its cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...attention.vocabulary import Alignment
from ...inputs import misuse
from .inside import Inside
from .models import ModelSubject, Subject
from .sequences import CachedDecoding, SequenceModel, decoded, refuse_unused_cache
from .subject import begin, differ, holds, output_place

# How many steps are a single token: with a cache a step is cheap, without one it is a prefix.
MOST_SINGLE_TOKENS = 128
MOST_PREFIXES = 64


@dataclass(frozen=True)
class Plan:
    """How a sequence is cut into chunks."""

    sizes: list[int]  # The size of each chunk
    words: str  # The same as part of a sentence

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

    def cause_of_bits(self, rows: Tensor) -> str | None:
        """Say which sizes of chunks have other bits than the prefill, if others have not."""
        off = set(tokens_off(rows))
        sizes = {len(step) for step in self.steps if not off.isdisjoint(step)}
        same = {len(step) for step in self.steps if off.isdisjoint(step)} - sizes
        if not same or len(self.sizes) < 2:
            return None
        named = [", ".join(map(str, sorted(some))) for some in (sizes, same)]
        return (
            f"chunks of {named[0]} differ in their bits, chunks of {named[1]} do not: another "
            "kernel, or another split of the keys, for so many queries?"
        )


def name_tokens(step: range, token: int | None = None) -> str:
    """Name a chunk, or one token in it."""
    if len(step) == 1:
        return f"token {step[0]} decoded alone"
    chunk = f"tokens {step[0]} to {step[-1]} decoded together"
    return chunk if token is None else f"token {token} of {chunk}"


@dataclass(frozen=True)
class Evidence:
    """What is known when an output differs."""

    plan: Plan  # How the sequence was cut
    decoded: Tensor  # (..., length, width), in chunks
    whole: Tensor  # The same at once
    allowed: float  # By what part of its size a row may differ
    singles_are_right: bool  # Whether decoding token by token gave the right outputs before
    judged: Tensor | None = None  # (..., length): the rows that mean something; None for all

    def is_explained_by(self, candidate: Callable[[], Tensor], step: range) -> bool:
        """Whether the outputs of a chunk are those of a candidate (..., chunk, width)."""
        return holds(lambda: self.alike(self.decoded, candidate(), step))

    def alike(self, whole: Tensor, chunk: Tensor, step: range) -> bool:
        """Whether outputs of the whole sequence are those of a chunk there."""
        rows = slice(step.start, step.stop)
        judged = None if self.judged is None else self.judged[..., rows]
        return not differ(whole[..., rows, :], chunk, self.allowed, judged)


def tokens_off(broken: Tensor) -> list[int]:
    """The tokens with an output that is off."""
    tokens: list[int] = broken.reshape(-1, broken.shape[-1]).any(0).nonzero().flatten().tolist()
    return tokens


@dataclass(frozen=True)
class Decoder:
    """Code under test that is given chunk after chunk."""

    subject: Subject  # The code, all inputs, and further arguments
    how: str  # What decoding is done with, as part of a sentence
    most_single: int  # How many tokens are decoded one by one

    def decode(self, steps: Sequence[range]) -> Tensor:
        """Return the outputs (..., length, width), each chunk with all that comes before it."""
        return torch.cat([self.part(step).run()[..., -len(step) :, :] for step in steps], -2)

    def part(self, step: range) -> Subject:
        """The code with all up to the end of a chunk; the last rows of its output are those."""
        raise NotImplementedError

    def cause(self, evidence: Evidence, broken: Tensor) -> str | None:
        """Say why they differ, where the numbers show it."""
        raise NotImplementedError


def model_decoder(subject: ModelSubject, alignment: Alignment | None) -> ModelDecoder:
    """Return how a model is called in chunks; ValueError if it is given an alignment."""
    if alignment is not None:
        accepted = "None for a sequence model, which is not told that it is causal"
        raise ValueError(misuse("alignment", repr(alignment), accepted))
    after = "" if subject.real is None else ", after padding on the left"
    cached = ModelDecoder(subject, f"with the cache{after}", MOST_SINGLE_TOKENS, has_cache=True)
    decode = subject.model.decode
    if decode is None:
        refuse_unused_cache(subject.model.module)
    elif not isinstance(decode, CachedDecoding):
        return cached
    else:
        # Only the model itself knows: BERT takes a cache, and returns none.
        with torch.no_grad():
            _, cache = cached.step(range(1), None)
        if cache is not None:
            return cached
    return ModelDecoder(subject, f"without a cache{after}", MOST_PREFIXES, has_cache=False)


def declares_order(model: SequenceModel) -> bool:
    """Whether its user said how its cache is put in another order; for transformers it is known."""
    return model.reorder is not None and not isinstance(model.decode, CachedDecoding)


def _reordered(reorder: Callable[[Any, Tensor], Any], cache: Any, order: Tensor) -> Any:
    """Call `reorder` and return its cache; NotImplementedError if it knows no way."""
    result = reorder(cache, order)
    if result is None and cache is not None:
        accepted = "a function of (cache, order) that returns the cache in that order"
        raise TypeError(misuse("reorder", "None back", accepted))
    return result


@dataclass(frozen=True)
class ModelDecoder(Decoder):
    """A sequence model that is given chunk after chunk with its cache, or longer prefixes."""

    subject: ModelSubject
    has_cache: bool  # Whether it decodes with a cache

    def decode(self, steps: Sequence[range]) -> Tensor:
        """Return the output (batch, length, width) in chunks."""
        if not self.has_cache:
            return super().decode(steps)
        outputs: list[Tensor] = []
        cache: Any = None
        for step in steps:
            output, cache = self.step(step, cache)
            outputs.append(output)
        return torch.cat(outputs, 1)

    def part(self, step: range) -> ModelSubject:
        """The model with the prefix up to the end of a chunk."""
        return self.subject.cut(range(step.stop))

    def step(self, step: range, cache: Any) -> tuple[Tensor, Any]:
        """Decode one chunk with a cache; the output (batch, chunk, width) and the new cache."""
        model, here = self.subject.model, self.part(step)
        assert model.decode is not None
        chunk, own = here.inputs[:, step.start :], here.positions
        positions = None if own is None else own[:, step.start :]
        arguments = model.keywords(chunk, here.arguments, here.real, positions)
        if positions is None and (name := model.positions_argument) in arguments:
            arguments[name] = arguments[name][..., step.start :]
        begin(self.subject.seed)
        given = chunk if model.batch_first else chunk.transpose(0, 1)
        result, cache = decoded(model.decode, given.clone(), cache, **arguments)
        return model.read(result, chunk), cache

    def in_another_order(self, order: Tensor, first: int) -> Tensor | None:
        """Decode a chunk, put the batch in another order, and decode the rest token by token.

        Args:
            order: The entry of the batch that is to be at each place, (batch,).
            first: The size of the first chunk.

        Returns:
            The outputs of the rest, (batch, length - first, width); None where the cache cannot be
            reordered.
        """
        reorder, moved = (
            self.subject.model.reorder,
            replace(self, subject=self.subject.samples(order)),
        )
        assert reorder is not None
        _, cache = self.step(range(first), None)
        try:
            cache = _reordered(reorder, cache, order)
        except NotImplementedError:
            return None
        outputs: list[Tensor] = []
        for token in range(first, self.subject.length):
            output, cache = moved.step(range(token, token + 1), cache)
            outputs.append(output)
        return torch.cat(outputs, 1)

    def why_order_fails(self, broken: Tensor, order: Tensor) -> str:
        """Say which entries of a batch in another order are off, (batch, rest)."""
        off, stays = broken.any(-1), order == torch.arange(len(order), device=order.device)
        if torch.equal(off.to(order.device), ~stays):
            fact = "entries that keep their place alone are right" if stays.any() else "all are off"
            return f"{fact}: is the whole cache reordered, keys and values of every layer?"
        return "is the cache put in the order that it is given: its entry i is entry order[i]?"

    def _run(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Run the model on some tokens at once, at some positions, without a cache."""
        here = self.subject.cut(tokens)
        at = torch.tensor(positions, device=here.inputs.device).repeat(here.batch, 1)
        return here.run(positions=at)

    def cause(self, evidence: Evidence, broken: Tensor) -> str | None:
        """Compare the first chunk that is off with its prefix, the last with likely mistakes."""
        tokens = tokens_off(broken)
        first, step = (evidence.plan.step_of(token) for token in (tokens[0], tokens[-1]))
        if holds(lambda: not evidence.alike(evidence.whole, Decoder.decode(self, [first]), first)):
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
        if bool(broken[:, : evidence.plan.sizes[0]].any()):
            return None
        steps = evidence.plan.steps
        found = Inside(self.subject, lambda: self.decode(steps)).why_chunk_differs(
            steps.index(first), first, Inside(self.subject)
        )
        where, guess = self._where(broken, evidence.plan)
        return ": ".join(part for part in (where, found or guess) if part)

    def _where(self, broken: Tensor, plan: Plan) -> tuple[str, str]:
        """Say which entries or tokens are off, where others are right, and a guess at why."""
        off = broken.any(-1).flatten()
        if not bool(off.all()):
            some = off.nonzero().flatten().tolist()
            named = f"batch {'entries' if len(some) > 1 else 'entry'} {', '.join(map(str, some))}"
            are, real = "are" if len(some) > 1 else "is", self.subject.real
            if real is not None and torch.equal(off, ~real.all(-1).to(off.device)):
                return (
                    f"{named} alone, which {are} padded, {are} off",
                    "do the positions and the mask of a later chunk count its padding?",
                )
            if len(off) > 2 and not off[0] and bool(off[1:].all()):
                return "batch entry 0 is right, all others are not", "is its cache used for all?"
            return f"{named} alone {are} off", "look at how the cache is indexed by the batch"
        tokens = tokens_off(broken)
        first = tokens[0]
        if first > plan.sizes[0] and len(tokens) > 1 and tokens[-1] - first < len(tokens):
            return (
                f"right up to token {first - 1}, wrong from token {first} on",
                "is the cache full then, cut or overwritten, or do the positions wrap around?",
            )
        return "", (
            "the first chunk is right, what comes with a cache is not: the cached keys, the "
            "positions, or the mask of a later chunk"
        )

    def _mistakes(self, plan: Plan, step: range) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        """Yield what may be wrong, in words, and the output of the chunk that it gives."""
        if step.start == 0:
            return
        yield "of this chunk alone: the cache is not used", lambda: self.step(step, None)[0]
        own, all_before = [*step], [*range(step.stop)]
        tried: list[tuple[str, list[int], list[int]]] = []  # tokens and their positions
        if self.subject.model.positions_argument is not None:
            chunks = [chunk for chunk in plan.steps if chunk.start <= step.start]
            again = [at for chunk in chunks for at in range(len(chunk))]
            tried = [("with positions that start again at 0 in each chunk", all_before, again)]
            for word, off in (("small", -1), ("large", 1)):
                words = f"with positions that are one too {word} after the first chunk"
                shifted = [at + off * (at >= plan.sizes[0]) for at in all_before]
                tried.append((words, all_before, shifted))
        histories: dict[str, list[int]] = {
            "of this chunk alone at its positions: the cache is not used": [],
            "without the first token of the cache": all_before[1 : step.start],
            "without the token just before, the last of the cache": all_before[: step.start - 1],
        }
        tried += [(words, before + own, before + own) for words, before in histories.items()]
        for words, tokens, at in tried:
            yield words, lambda tokens=tokens, at=at: self._run(tokens, at)[:, -len(own) :]  # type: ignore[misc]
