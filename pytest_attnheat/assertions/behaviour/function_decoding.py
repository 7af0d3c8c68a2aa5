"""An attention function, called in chunks, and why that may differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pytest_attnheat.assertions.behaviour.decoders import (
    MOST_SINGLE_TOKENS,
    Evidence,
    name_tokens,
    tokens_off,
)
from pytest_attnheat.assertions.behaviour.functions import AttentionFunction, permitted
from pytest_attnheat.attention.reference import causal_mask
from pytest_attnheat.attention.vocabulary import ALIGNMENTS, Alignment
from pytest_attnheat.inputs import one_of


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
    given = subject.arguments.get("attn_mask")
    is_causal = bool(subject.arguments.get("is_causal", given is None))
    lengths = subject.query.shape[-2], subject.key.shape[-2]
    if given is None and not is_causal:
        raise ValueError(
            "is_causal: got False, and no attn_mask; a query that may see later keys cannot be "
            "decoded without them"
        )
    if lengths[0] > lengths[1] or (is_causal and lengths[0] != lengths[1]):
        raise ValueError(
            "decoding needs as many queries as keys (or, with attn_mask= alone, fewer: the last "
            f"ones); got {lengths[0]} queries and {lengths[1]} keys"
        )
    if alignment == "bottom_right" and not is_causal:
        raise ValueError("alignment says what is_causal=True means, which is not passed here")
    causal = causal_mask(*lengths, alignment="bottom_right", device=subject.query.device)
    mask, seen = causal, None
    if given is not None:
        seen = permitted(given, (*subject.leading, *lengths))
        if is_causal:
            seen = seen & causal
        _refuse_later_keys(seen & ~causal)
        mask = given.expand(torch.broadcast_shapes(given.shape, lengths))  # type: ignore[no-untyped-call]
        if is_causal:
            mask = mask.masked_fill(~causal, False if mask.dtype == torch.bool else -math.inf)
    if given is None:
        subject = replace(subject, arguments={**subject.arguments, "is_causal": True})
    return _FunctionDecoder(subject, mask, seen, own_causal=alignment == "bottom_right")


def _refuse_later_keys(later: Tensor) -> None:
    if bool(later.any()):
        query, key = later.nonzero()[0, -2:].tolist()
        raise ValueError(
            f"attn_mask: query {query} may see key {key}, which comes after it, so it cannot be "
            "decoded without later keys; accepted is a mask that is causal, aligned to the bottom "
            "right"
        )


@dataclass(frozen=True)
class _FunctionDecoder:
    """An attention function that is given some queries, and the keys up to the last of them.

    Attributes:
        subject: The function, all inputs, and the arguments for all of them.
        mask: Who may see what, spelled out, (..., query_len, key_len).
        seen: The same as a boolean (..., query_len, key_len); None where it is causal alone.
        own_causal: Whether chunks are called with `is_causal=True`.
        start: What to do before each call.
    """

    subject: AttentionFunction
    mask: Tensor
    seen: Tensor | None
    own_causal: bool
    start: Callable[[], None] = lambda: None

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

    def starting_with(self, start: Callable[[], None]) -> _FunctionDecoder:
        return replace(self, start=start)

    def whole(self) -> Tensor:
        given = self.subject.arguments.get("attn_mask")
        own = {"attn_mask": given.clone()} if isinstance(given, Tensor) else {}
        return self.subject.run(**own)

    def decode(self, steps: Sequence[range]) -> Tensor:
        return torch.cat([self._chunk(step) for step in steps], -2)

    def precision(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def judged(self) -> Tensor | None:
        return None if self.seen is None else self.seen.any(-1)

    def _chunk(self, step: range) -> Tensor:
        last = self._key_of(step.stop)
        mask: Tensor | None = self.mask[..., step.start : step.stop, :last]
        if self.own_causal:
            given = self.subject.arguments.get("attn_mask")
            cut = {} if given is None else {"attn_mask": mask}
            return self._run(step, range(last), **cut, is_causal=True)
        if mask is not None and len(step) == 1 and bool(_hides_nothing(mask).all()):
            mask = None
        return self._run(step, range(last), **({} if mask is None else {"attn_mask": mask}))

    def _key_of(self, query: int) -> int:
        return query + self.subject.key.shape[-2] - self.length

    def _run(self, queries: range, keys: range, **masks: Any) -> Tensor:
        """Call the function with some queries and keys, and with these masks alone.

        All are copies: it may write to them.
        """
        self.start()
        rows, columns = slice(queries.start, queries.stop), slice(keys.start, keys.stop)
        others = {
            name: value
            for name, value in self.subject.arguments.items()
            if name not in ("attn_mask", "is_causal")
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
            masks = {"attn_mask": causal_mask(size, alignment="top_left", device=device)}
        return self._run(range(stop - size, stop), keys, **masks)


def _hides_nothing(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask == 0
