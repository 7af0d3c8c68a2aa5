"""That decoding, token by token and in chunks, gives what the whole sequence gives at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pytest_attnheat.assertions.behaviour.decoders import Decoder, Evidence, Plan, function_decoder
from pytest_attnheat.assertions.behaviour.difference import check_relative, check_rows
from pytest_attnheat.assertions.behaviour.model_decoding import model_decoder
from pytest_attnheat.assertions.behaviour.reading import as_function, as_sequence
from pytest_attnheat.assertions.behaviour.subject import check_count, settled
from pytest_attnheat.attention.vocabulary import Alignment
from pytest_attnheat.callables import borrowed
from pytest_attnheat.inputs import misuse, positive

_NAME = "assert_decode_matches_prefill"
# More sizes of chunks than this say nothing to a reader.
MOST_SIZES_TOLD = 16


def assert_decode_matches_prefill(
    subject: Callable[..., Any],
    *inputs: Tensor,
    chunks: Sequence[int] | None = None,
    alignment: Alignment | None = None,
    tolerance: float | None = None,
    seed: int = 0,
    training: bool = False,
    **arguments: Any,
) -> None:
    """Assert that a sequence decoded bit by bit gives what it gives at once.

    By default it is decoded twice: token by token, and as a prompt of half the sequence that
    is followed by chunks of 1, 2, 3, 5, 8, ... tokens. Of a long sequence only the last 128
    tokens (64 for a model without a cache) are decoded one by one, after a prompt of all others.

    A model with a cache of keys and values (the models of transformers, or a `SequenceModel`
    with `decode`) decodes with it. Any other model, also BERT, is given longer and longer
    prefixes, and its last outputs are compared; but one whose `forward` takes a cache is refused
    without `decode`, as its cache would not be tested. All sequences are taken to be of full
    length.

    An attention function is called once with all queries, and then with some queries and all
    keys up to the last of them: with the rows of the mask that belong to them, or without any
    mask for a single query that may see all of these keys.

    Args:
        subject: An attention function, called as `subject(query, key, value, **arguments)`, or a
            causal model that maps a sequence to a sequence.
        *inputs: Query, key and value of an attention function, (..., length, width); or the one
            input of a model: floats (batch, length, width) or token ids (batch, length).
        chunks: The size of each chunk, in place of the default; they add up to the length.
        alignment: For an attention function only. `"bottom_right"`: its own `is_causal=True`
            is aligned so, as FlashAttention's is, and chunks are called with it. Else, as
            PyTorch's is aligned to the top left, the mask of a chunk is spelled out.
        tolerance: By what part of its size an output may differ. By default 1e-11, 2e-5,
            7.8e-3, 6.2e-2 in float64, float32, float16, bfloat16; in a model 2e-5 in float64,
            too, as models of any dtype have parts in float32.
        seed: Where the random numbers start, if the subject draws any.
        training: Accept a subject in training mode: every call starts from `seed`.
        **arguments: Further arguments of every call. An attention function is causal by
            `is_causal=True`, which is the default, or by its `attn_mask`. Of a model, tensors
            (batch, length) and (..., length, length) are cut to the part that is there.

    Raises:
        Failure: Some output differs. The message names the worst and the first, and
            says why if the numbers show it.
        TypeError: Not one or three inputs, no tensors of numbers, or `decode` does not return an
            output and a cache.
        ValueError: There are fewer than two tokens, the chunks do not add up to the length, a
            mask shows a query later keys, the subject answers at random, or it takes a cache
            and nothing says how to decode with it.

    Example:
        >>> assert_decode_matches_prefill(F.scaled_dot_product_attention, query, key, value)
        >>> assert_decode_matches_prefill(language_model, token_ids, chunks=[5, 1, 1, 3])
    """
    __tracebackhide__ = True
    check_count(inputs, _NAME)
    with borrowed(subject, *(t for t in inputs if isinstance(t, Tensor)), seed=seed):
        own = seed if training else None
        decoder: Decoder
        if len(inputs) == 3:
            decoder = function_decoder(as_function(subject, inputs, arguments, seed=own), alignment)
        else:
            model = as_sequence(subject, inputs[0], arguments, seed=own)
            decoder = model_decoder(model, alignment)
        plans = list(_plans(decoder.length, decoder.most_single, chunks))
        with torch.no_grad():
            _check(subject, decoder, plans, tolerance=tolerance, seed=seed, training=training)


def _check(
    subject: object,
    decoder: Decoder,
    plans: Sequence[Plan],
    *,
    tolerance: float | None,
    seed: int,
    training: bool,
) -> None:
    __tracebackhide__ = True
    whole = settled(subject, decoder.subject.run, training=training, seed=seed)
    allowed = check_relative(tolerance, decoder.precision(whole.dtype))
    for number, plan in enumerate(plans):
        decoded = decoder.decode(plan.steps)
        if decoded.shape != whole.shape:
            accepted = f"that of the outputs of the whole sequence, {tuple(whole.shape)}"
            got = f"outputs of shape {tuple(decoded.shape)}"
            raise ValueError(misuse("what is decoded", got, accepted))
        evidence = Evidence(plan, decoded, whole, allowed, singles_are_right=number > 0)
        told = f"chunks={plan.sizes}, seed={seed}"
        check_rows(
            _NAME,
            decoded,
            whole,
            claim=f"outputs decoded {plan.words}, {decoder.how}, differ from the prefill",
            allowed=allowed,
            judged=decoder.subject.judged(),
            place=plan.place,
            cause=lambda change, of=evidence: decoder.cause(of, change > allowed),  # type: ignore[misc]
            repeat=told if len(plan.sizes) <= MOST_SIZES_TOLD else f"seed={seed}",
        )


def _plans(length: int, most_single: int, chunks: Sequence[int] | None) -> Iterator[Plan]:
    """Yield how a sequence is cut.

    Raises:
        TypeError: A size is not a whole number.
        ValueError: There is nothing to decode, or the sizes do not add up.
    """
    if length < 2:
        raise ValueError(misuse(_NAME, f"a sequence of {length} token", "two or more"))
    if chunks is not None:
        sizes = [positive("chunks", size) for size in chunks]
        if sum(sizes) != length or len(sizes) < 2:
            accepted = f"two or more sizes that add up to the length, {length}"
            raise ValueError(misuse("chunks", list(chunks), accepted))
        yield Plan(sizes, _in_chunks(sizes))
        return
    single = min(length, most_single)
    prompt = [length - single] if length > single else []
    words = f"token by token after a prompt of {length - single}" if prompt else "token by token"
    yield Plan(prompt + [1] * single, words)
    uneven, size, following = [length // 2], 1, 2  # Fibonacci's numbers: odd and even sizes.
    while sum(uneven) < length:
        uneven.append(min(size, length - sum(uneven)))
        size, following = following, size + following
    if max(uneven) > 1:
        yield Plan(uneven, _in_chunks(uneven))


def _in_chunks(sizes: Sequence[int]) -> str:
    told = ", ".join(map(str, sizes[:MOST_SIZES_TOLD]))
    return f"in chunks of {told}{', ...' * (len(sizes) > MOST_SIZES_TOLD)}"
