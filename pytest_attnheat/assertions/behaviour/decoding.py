"""That decoding, token by token and in chunks, gives what the whole sequence gives at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ...attention.reference import causal_mask
from ...attention.scoring import broadcast
from ...attention.vocabulary import ALIGNMENTS, Alignment
from ...callables import borrowed
from ...inputs import misuse, one_of, positive
from .functions import MASK, AttentionFunction, permitted
from .model_decoding import (
    MOST_SINGLE_TOKENS,
    Decoder,
    Evidence,
    ModelDecoder,
    Plan,
    declares_order,
    model_decoder,
    name_tokens,
    tokens_off,
)
from .reading import as_function, as_sequence, refuse_memory
from .sequences import with_causal
from .subject import Compared, as_described, check_count, check_each, check_relative, settled

_NAME = "assert_decode_matches_prefill"
# More sizes of chunks, or lengths, than this say nothing to a reader.
_MOST_SIZES_TOLD = 16


def assert_decode_matches_prefill(
    subject: Callable[..., Any],
    *inputs: Tensor,
    chunks: Sequence[int] | None = None,
    lengths: Sequence[int] | Tensor | None = None,
    alignment: Alignment | None = None,
    tolerance: float | None = None,
    exact: bool = False,
    seed: int = 0,
    training: bool = False,
    **arguments: Any,
) -> None:
    """Assert that a sequence decoded bit by bit gives what it gives at once.

    By default it is decoded twice: token by token, and as a prompt of half the sequence that
    is followed by chunks of 1, 2, 3, 5, 8, ... tokens. Of a long sequence only the last 128
    tokens (64 for a model without a cache) are decoded one by one, after a prompt of all others.

    A model with a cache of keys and values (the models of transformers, or a `SequenceModel` with
    `decode`) decodes with it; where that can be put in another order (`reorder`, as the caches of
    transformers), so is the batch half-way, as in beam search, unless `chunks`, `lengths` or
    `exact` is given. Any other model, also BERT, is given longer and longer prefixes, and its last
    outputs are compared; but one whose `forward` takes a cache is refused without `decode`, as its
    cache would not be tested. All sequences are taken to be of full length, but for a model that is
    given `lengths`.

    An attention function is called once with all queries, and then with some queries and all
    keys up to the last of them: with the rows of the mask that belong to them, or without any
    mask for a single query that may see all of these keys.

    Args:
        subject: An attention function, called as `subject(query, key, value, **arguments)`, or a
            causal model that maps a sequence to a sequence.
        *inputs: Query, key and value of an attention function, (..., length, width); or the one
            input of a model: floats (batch, length, width) or token ids (batch, length).
        chunks: The size of each chunk, in place of the default; they add up to the length.
        lengths: For a model that takes a mask: how many last tokens of each sample are real; those
            before are padding, all of which is in the first chunk. `decode` is told of it by the
            mask of all tokens up to the last of the chunk.
        alignment: For an attention function only. `"bottom_right"`: its own `is_causal=True`
            is aligned so, as FlashAttention's is, and chunks are called with it. Else, as
            PyTorch's is aligned to the top left, the mask of a chunk is spelled out. An
            `AttentionSpec` says it itself.
        tolerance: By what part of its size an output may differ. By default 1e-11, 2e-5,
            7.8e-3, 6.2e-2 in float64, float32, float16, bfloat16; in a model 2e-5 in float64,
            too, as models of any dtype have parts in float32.
        exact: Whether each output must be the same bit by bit, however its queries are cut into
            chunks, as a batch-invariant engine promises. A failure counts the elements that
            differ, says how many units in the last place, and whether it is rounding alone: that
            of `tolerance`.
        seed: Where the random numbers start, if the subject draws any.
        training: Accept a subject in training mode: every call starts from `seed`.
        **arguments: Further arguments of every call. An attention function is causal by
            `is_causal=True`, which is the default, or by its `attn_mask`. Of a model, tensors
            (batch, length) and (..., length, length) are cut to the part that is there.

    Raises:
        Failure: Some output differs. The message names the worst and the first, and
            says why if the numbers show it.
        TypeError: Not one or three inputs, no tensors of numbers, `decode` does not return an
            output and a cache, or `reorder` returns None.
        ValueError: There are fewer than two tokens, the chunks do not add up to the length, a
            mask shows a query later keys, one sequence comes with `reorder`, the subject answers
            at random, or it takes a cache and nothing says how to decode with it.

    Examples:
        >>> assert_decode_matches_prefill(F.scaled_dot_product_attention, query, key, value)
        >>> assert_decode_matches_prefill(language_model, token_ids, chunks=[5, 1, 1, 3])
    """
    __tracebackhide__ = True
    check_count(inputs, _NAME)
    with borrowed(subject, *(t for t in inputs if isinstance(t, Tensor)), seed=seed):
        own = seed if training else None
        decoder: Decoder
        if len(inputs) == 3:
            function = as_function(subject, inputs, arguments, seed=own)
            if as_described(subject) is not None and alignment is None:
                alignment = function.call.alignment  # it says so itself
            decoder = _function_decoder(function, alignment)
        else:
            model = as_sequence(subject, inputs[0], arguments, seed=own)
            if lengths is not None:
                refuse_memory(model, lengths)
                model = model.padded_as(lengths, "left")
            decoder = model_decoder(model, alignment)
            asks_order = chunks is None and not exact and lengths is None
            if asks_order and model.batch < 2 and declares_order(model.model):
                accepted = "two or more, whose order can change, or a model without reorder="
                raise ValueError(misuse("inputs", "one sequence with reorder=", accepted))
        plans = list(_plans(decoder, chunks))
        with torch.no_grad():
            run = decoder.subject.run
            whole = settled(subject, run, training=training, seed=seed, exact=exact)
            # Models of transformers do softmax, norms and rotations in float32 in any case.
            is_model = isinstance(decoder, ModelDecoder) and whole.dtype == torch.float64
            allowed = check_relative(tolerance, torch.float32 if is_model else whole.dtype)
            compared = [_compared(decoder, plans, whole, allowed, seed)]
            if isinstance(decoder, ModelDecoder) and asks_order:
                compared.append(_in_another_order(decoder, whole, allowed, seed))
            check_each(_NAME, chain(*compared), allowed=allowed, exact=exact)


def _compared(
    decoder: Decoder, plans: Sequence[Plan], whole: Tensor, allowed: float, seed: int
) -> Iterator[Compared]:
    """Yield what is decoded by each plan, beside the outputs of the whole sequence."""
    judged = decoder.subject.judged()
    padded = isinstance(decoder, ModelDecoder) and decoder.subject.real is not None
    for number, plan in enumerate(plans):
        decoded = decoder.decode(plan.steps)
        if decoded.shape != whole.shape:
            accepted = f"that of the outputs of the whole sequence, {tuple(whole.shape)}"
            got = f"outputs of shape {tuple(decoded.shape)}"
            raise ValueError(misuse("what is decoded", got, accepted))
        evidence = Evidence(plan, decoded, whole, allowed, number > 0, judged)
        told = f"seed={seed}"
        if padded and judged is not None and len(judged) <= _MOST_SIZES_TOLD:
            told = f"lengths={judged.sum(-1).tolist()}, {told}"
        if len(plan.sizes) <= _MOST_SIZES_TOLD:
            told = f"chunks={plan.sizes}, {told}"
        yield Compared(
            decoded,
            whole,
            claim=f"outputs decoded {plan.words}, {decoder.how}, differ from the prefill",
            judged=judged,
            place=plan.place,
            cause=lambda change, of=evidence: decoder.cause(of, change > allowed),  # type: ignore[misc]
            cause_of_bits=plan.cause_of_bits,
            repeat=told,
            again=lambda plan=plan: decoder.decode(plan.steps),  # type: ignore[misc]
        )


def _in_another_order(
    decoder: ModelDecoder, whole: Tensor, allowed: float, seed: int
) -> Iterator[Compared]:
    """Yield what is decoded after the batch was reordered, where that is said to be possible."""
    subject, first = decoder.subject, decoder.subject.length // 2
    if subject.model.reorder is None or not decoder.has_cache or subject.batch < 2:
        return
    # One entry keeps its place, one comes twice, one goes. Of two entries both change places, and
    # then one takes both: which order a cache is put in shows where it is not its own inverse.
    order = torch.arange(subject.batch, device=whole.device)
    order[:2], order[2:3] = order[:2].flip(0), 0
    for one in (order, torch.zeros_like(order))[: 2 if subject.batch == 2 else 1]:
        decoded = decoder.in_another_order(one, first)
        if decoded is not None:
            yield _reordered(decoder, decoded, whole[one, first:], one, allowed, seed)


def _reordered(
    decoder: ModelDecoder, decoded: Tensor, whole: Tensor, order: Tensor, allowed: float, seed: int
) -> Compared:
    first = decoder.subject.length // 2
    return Compared(
        decoded, whole,
        claim="outputs decoded with the cache after the batch was put in another order, as beam "
        "search does, differ from the prefill",
        place=lambda index: (
            f"output[{index[0]}, {first + index[1]}], of entry {int(order[index[0]])} before,"
        ),
        cause=lambda change: decoder.why_order_fails(change > allowed, order),
        repeat=f"order={order.tolist()} after {first} tokens, seed={seed}",
    )  # fmt: skip


def _plans(decoder: Decoder, chunks: Sequence[int] | None) -> Iterator[Plan]:
    """Yield how a sequence is cut; the first chunk has a token after all padding."""
    length = decoder.subject.observers
    if length < 2:
        raise ValueError(misuse(_NAME, f"a sequence of {length} token", "two or more"))
    if chunks is not None:
        sizes = [positive("chunks", size) for size in chunks]
        if sum(sizes) != length or len(sizes) < 2:
            accepted = f"two or more sizes that add up to the length, {length}"
            raise ValueError(misuse("chunks", list(chunks), accepted))
        yield Plan(sizes, _in_chunks(sizes))
        return
    # Tokens that are padding in some sample come first: they are no step of their own.
    judged = decoder.subject.judged() if isinstance(decoder, ModelDecoder) else None
    padding = 0 if judged is None else int((~judged).sum(-1).max())
    prompt = padding + 1 if padding else 0
    single = min(length - prompt, decoder.most_single)
    first = [length - single] if length > single else []
    words = f"token by token after a prompt of {length - single}" if first else "token by token"
    yield Plan(first + [1] * single, words)
    uneven = [max(length // 2, prompt)]
    size, following = 1, 2  # Fibonacci's numbers: odd and even sizes.
    while sum(uneven) < length:
        uneven.append(min(size, length - sum(uneven)))
        size, following = following, size + following
    if max(uneven) > 1:
        yield Plan(uneven, _in_chunks(uneven))


def _in_chunks(sizes: Sequence[int]) -> str:
    told = ", ".join(map(str, sizes[:_MOST_SIZES_TOLD]))
    return f"in chunks of {told}{', ...' * (len(sizes) > _MOST_SIZES_TOLD)}"


def _function_decoder(subject: AttentionFunction, alignment: Alignment | None) -> _FunctionDecoder:
    """Return how a function is called in chunks; `"bottom_right"`: maybe by `is_causal=True`."""
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
    # What says of itself that it sees no later key needs no argument for that.
    is_told = "is_causal" in subject.arguments or alignment != "bottom_right"
    if given is None and not is_told and not bool((subject.may_see() & ~causal).any()):
        mask = subject.may_see()
    elif given is None:
        subject = replace(subject, arguments={**subject.arguments, "is_causal": True})
    else:
        mask = given.expand(broadcast(given.shape, lengths))
        if is_causal:
            mask = with_causal(mask, causal)
        else:
            later = permitted(given, (*subject.leading, *lengths)) & ~causal
            if bool(later.any()):
                query, key = later.nonzero()[0, -2:].tolist()
                got = f"one in which query {query} may see key {key}, which comes after it"
                accepted = "a mask that is causal, aligned to the bottom right"
                raise ValueError(misuse(MASK, got, accepted))
    own_causal = alignment == "bottom_right"
    how = "with its rows of the mask"
    if own_causal:
        by = "is_causal=True" if subject.arguments.get("is_causal") else "what it always hides"
        how = f"with {by}, aligned to the bottom right"
    return _FunctionDecoder(subject, how, MOST_SINGLE_TOKENS, mask, own_causal)


@dataclass(frozen=True)
class _FunctionDecoder(Decoder):
    """An attention function that is given some queries, and the keys up to the last of them."""

    subject: AttentionFunction
    mask: Tensor  # Who may see what, spelled out, (..., query_len, key_len)
    own_causal: bool  # Whether chunks are called with `is_causal=True`

    def part(self, step: range) -> AttentionFunction:
        """The function with the queries of a chunk, all keys up to it, and its masks."""
        function, rows = self.subject, slice(step.start, step.stop)
        last = step.stop + function.length - function.observers
        masks: dict[str, Any] = {MASK: self.mask[..., rows, :last]}
        if self.own_causal:
            masks = {} if function.mask is None else masks
            masks |= {name: True for name in ("is_causal",) if function.arguments.get(name)}
        elif len(step) == 1 and self._sees_all_before[step.start]:
            masks = {}
        kept = {k: v for k, v in function.arguments.items() if k not in (MASK, "is_causal")}
        return replace(
            function, query=function.query[..., rows, :], key=function.key[..., :last, :],
            value=function.value[..., :last, :], arguments={**kept, **masks},
        )  # fmt: skip

    @cached_property
    def _sees_all_before(self) -> list[bool]:
        """For each query, whether it may see all keys up to its own, and none is biased."""
        lengths = self.subject.observers, self.subject.length
        later = ~causal_mask(*lengths, alignment="bottom_right", device=self.mask.device)
        nothing_hidden = self.mask if self.mask.dtype == torch.bool else self.mask == 0
        seen: list[bool] = (nothing_hidden | later).reshape(-1, *lengths).all(-1).all(0).tolist()
        return seen

    def cause(self, evidence: Evidence, broken: Tensor) -> str | None:
        """Name the known defect that gives the last chunk that is off, and not the prefill."""
        step = evidence.plan.step_of(tokens_off(broken)[-1])
        rows, part = slice(step.start, step.stop), self.part(step)
        alignment: Alignment | None = "bottom_right" if self.own_causal else None
        known = part.mistake(evidence.decoded[..., rows, :], alignment)
        if known is None or known == part.mistake(evidence.whole[..., rows, :], alignment):
            return None
        return f"{name_tokens(step)}: {known}"
