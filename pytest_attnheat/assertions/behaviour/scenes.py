"""A subject whose inputs can be replaced place by place, to see which outputs change.

A place is one position of the keys: of a sequence model, one token. An
observer is one row of the output. `may_see` tells which places each observer
may depend on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pytest_attnheat.assertions.behaviour.functions import AttentionFunction
from pytest_attnheat.assertions.behaviour.models import ModelSubject
from pytest_attnheat.assertions.behaviour.subject import of_the_first
from pytest_attnheat.attention.scoring import draw

# What is looked at together of `may_see`, in bytes.
_BYTES = 2**26
# Replaced inputs are as large as the given ones, or larger by this factor.
_LARGER = 8.0


@dataclass(frozen=True)
class Rule:
    """One reason why an observer may not see a place.

    Attributes:
        allowed: Boolean, broadcastable to `may_see`.
        because: Says why not, from the index of the observer and the place.
    """

    allowed: Tensor
    because: Callable[[tuple[int, ...], int], str]


@dataclass(frozen=True)
class Replacement:
    """What a scene replaces.

    Attributes:
        places: Boolean (*leading of the keys, key_len), or None.
        queries: Boolean (*leading, query_len), or None; a sequence model has none.
        content: By what: `"same"` or `"larger"` size, or `"nan"`.
        like: A place that gets the attention. The keys are replaced by its key, so that they get as
            much; what a sequence model gets is only drawn anew.
        aim: An observer per batch entry and head, (*leading): the keys are made such that its
            query gives them all attention. For a sequence model as without.
    """

    places: Tensor | None
    queries: Tensor | None = None
    content: str = "same"
    like: int | None = None
    aim: Tensor | None = None


@dataclass(frozen=True)
class Advice:
    """What a message says about the claim itself.

    Attributes:
        claimed: What is claimed where the caller said nothing; None where something was said.
        may_be_causal: What to say where outputs see nothing of their future, but may.
    """

    claimed: str | None
    may_be_causal: str


class Scene(Protocol):
    """What the search for leaks needs to know of a subject.

    Attributes:
        may_see: (*leading, query_len, key_len), boolean
        judged: (*leading, query_len): the observers whose output means something.
        groups: How many of the last leading dimension share the places of one.
        observer: What an observer is called, place: what a place is called.
        rules: Why an observer may not see a place, in the order in which they are asked.
        advice: What to say where a claim was made for the caller, or may be missing.
        through_embeddings: Whether gradients are those of the embeddings of token ids.
    """

    may_see: Tensor
    judged: Tensor
    groups: int
    observer: str
    place: str
    rules: Sequence[Rule]
    advice: Advice
    through_embeddings: bool

    def output(self, replaced: Replacement | None = None) -> Tensor:
        """The output (*leading, query_len, width), with something replaced."""

    def gradient(self, observers: Sequence[Tensor]) -> list[Tensor]:
        """How strongly the chosen observers depend on each place, (*leading of the keys, key_len).

        Args:
            observers: For each result, boolean (*leading, query_len).

        Raises:
            RuntimeError: The output is not differentiable.
        """


class FunctionScene:
    """An attention function."""

    observer, place = "query", "key"
    through_embeddings = False
    advice = Advice(None, "if the function is always causal, say so with may_see=")

    def __init__(
        self, subject: AttentionFunction, may_see: Tensor, rules: Sequence[Rule], seed: int
    ) -> None:
        self._subject = subject
        self.may_see = may_see
        self.judged = torch.ones(may_see.shape[:-1], dtype=torch.bool, device=may_see.device)
        self.groups = subject.group
        self.rules = rules
        self._draw = partial(_noise, seed=seed)

    def output(self, replaced: Replacement | None = None) -> Tensor:
        """The output, with some keys (and their values) and queries replaced."""
        if replaced is None:
            return self._subject.run()
        inputs = {}
        places, content = replaced.places, replaced.content
        for name, where in (("query", replaced.queries), ("key", places), ("value", places)):
            given = getattr(self._subject, name)
            if where is None:
                continue
            noise = self._draw(given, name, content)
            if name == "key" and replaced.like is not None:
                noise = given[..., replaced.like : replaced.like + 1, :]
            elif name == "key" and replaced.aim is not None:
                noise = self._aimed(replaced.aim)
            inputs[name] = torch.where(where.unsqueeze(-1), noise, given)
        return self._subject.run(**inputs)

    def _aimed(self, observers: Tensor) -> Tensor:
        """Keys that point the way of the observers' queries, and are larger than the others."""
        query, key = self._subject.query, self._subject.key
        if query.shape[-1] != key.shape[-1]:
            return self._draw(key, "key", "larger")
        index = observers[..., None, None].expand(*observers.shape, 1, query.shape[-1])
        chosen = query.gather(-2, index)
        wide = of_the_first(chosen, self.groups, dim=-3).double()
        direction = wide / wide.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-30)
        return (direction * key.double().square().mean().sqrt() * _LARGER).to(key)

    def gradient(self, observers: Sequence[Tensor]) -> list[Tensor]:
        """The largest gradient of each key and its value."""
        sources = [t.clone().requires_grad_() for t in (self._subject.key, self._subject.value)]
        with torch.enable_grad():
            key, value = (source.clone() for source in sources)  # which it may write to
            output = self._subject.run(key=key, value=value)
            found = _gradients(output, sources, observers)
        return [_size(key).maximum(_size(value)) for key, value in found]


class SequenceScene:
    """A sequence model."""

    groups = 1
    observer = place = "token"

    def __init__(
        self,
        subject: ModelSubject,
        may_see: Tensor,
        judged: Tensor,
        rules: Sequence[Rule],
        *,
        real: Tensor | None,
        assumed: bool,
        seed: int,
    ) -> None:
        self._subject = subject
        claimed = (
            "no token may see a later one: assumed, since nothing was said. For an encoder pass "
            "causal=False, or lengths="
        )
        self.advice = Advice(
            claimed if assumed else None, "if the model is causal, say so with causal=True"
        )
        self.may_see, self.judged, self.rules = may_see, judged, rules
        self.through_embeddings = subject.is_tokens
        self._run = partial(subject.run, real=real)
        self._seed = seed

    def output(self, replaced: Replacement | None = None) -> Tensor:
        """The output, with some tokens replaced."""
        if replaced is None or replaced.places is None:
            return self._run()
        given, places, content = self._subject.inputs, replaced.places, replaced.content
        seed = self._seed + (0 if replaced.like is None else 1 + replaced.like)
        if not self._subject.is_tokens:
            noise = _noise(given, "inputs", content, seed=seed)
            return self._run(torch.where(places.unsqueeze(-1), noise, given))
        if content == "nan":
            with _Embedded(given, lambda rows: rows.masked_fill(places.unsqueeze(-1), math.nan)):
                return self._run()
        return self._run(torch.where(places, _other_tokens(given, content, seed), given))

    def gradient(self, observers: Sequence[Tensor]) -> list[Tensor]:
        """The gradient of each token's input, or of its embedding."""
        given = self._subject.inputs
        with torch.enable_grad():
            if self._subject.is_tokens:
                with _Embedded(given, lambda rows: rows.detach().requires_grad_()) as embedded:
                    output = self._run(given)
                sources = embedded.changed
                if not sources:
                    raise RuntimeError("the token ids are not looked up by an embedding")
            else:
                sources = [given.clone().requires_grad_()]
                output = self._run(sources[0].clone())  # which it may write to
            found = _gradients(output, sources, observers)
        return [_size(torch.stack(gradients).sum(0)) for gradients in found]


class _Embedded(TorchFunctionMode):
    """Changes the embeddings of some token ids wherever they are looked up."""

    def __init__(self, ids: Tensor, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._ids, self._change = ids, change
        self.changed: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is not torch.nn.functional.embedding:
            return result
        ids = args[0] if args else kwargs["input"]
        turned = _same(ids, self._ids.transpose(0, 1))  # the batch comes second
        if not turned and not _same(ids, self._ids):
            return result
        changed = self._change(result.transpose(0, 1) if turned else result)
        self.changed.append(changed)
        return changed.transpose(0, 1) if turned else changed


def _same(ids: Tensor, given: Tensor) -> bool:
    return ids.shape == given.shape and torch.equal(ids, given)


def _gradients(
    output: Tensor, sources: Sequence[Tensor], observers: Sequence[Tensor]
) -> list[tuple[Tensor, ...]]:
    """The gradients of the chosen rows of the output, channels added up with random signs.

    Equal signs would not do: a layer norm at the end adds up to a constant.
    """
    if not output.requires_grad:
        raise RuntimeError("the output has no gradient")
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (output.shape[-1],), generator=generator) * 2 - 1
    # Small gradients of float16 would be rounded to zero.
    signs = signs.to(output) * (64.0 if output.dtype == torch.float16 else 1.0)
    return [
        torch.autograd.grad(
            output,
            list(sources),
            chosen.unsqueeze(-1).to(output.dtype) * signs,
            retain_graph=True,
            materialize_grads=True,
        )
        for chosen in observers
    ]


def _size(gradient: Tensor) -> Tensor:
    return gradient.detach().abs().amax(-1)


def _noise(given: Tensor, name: str, content: str, *, seed: int) -> Tensor:
    """Other content for an input: as large as the given one, or larger, or NaN."""
    if content == "nan":
        return torch.full_like(given, math.nan)
    wide = given.double()
    size = float(wide.square().mean().sqrt())
    size = size if math.isfinite(size) and size > 0 else 1.0
    factor = _LARGER if content == "larger" else 1.0
    return (draw(f"{content} {name}", seed, *given.shape) * size * factor).to(given)


def _other_tokens(given: Tensor, content: str, seed: int) -> Tensor:
    """For each token id another one that the inputs hold too, so that the module knows it."""
    known, which = torch.unique(given, return_inverse=True)
    if len(known) == 1:
        raise ValueError(
            f"inputs: every token is {int(known)}, so that no other is known to put in its place; "
            "pass inputs with several token ids"
        )
    steps = draw(f"{content} tokens", seed, *given.shape).abs().mul(1e6).long().to(given.device)
    others: Tensor = known[(which + 1 + steps % (len(known) - 1)) % len(known)]
    return others


def touched(may_see: Tensor, places: Tensor) -> Tensor:
    """Tell which observers may see any of the places.

    Args:
        may_see: (*leading, query_len, key_len)
        places: (*leading, key_len)

    Returns:
        (*leading, query_len)
    """
    query_len, key_len = may_see.shape[-2:]
    step = max(1, _BYTES // key_len)
    result = torch.empty(may_see.shape[:-1], dtype=torch.bool, device=may_see.device)
    for at in product(*map(range, may_see.shape[:-2])):
        seen, chosen = may_see[at], places[at]
        for first in range(0, query_len, step):
            rows = slice(first, first + step)
            result[at][rows] = (seen[rows] & chosen).any(-1)
    return result
