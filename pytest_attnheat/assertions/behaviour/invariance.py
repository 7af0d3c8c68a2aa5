"""Assertions that neither the company of a sample nor the order of keys matters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pytest_attnheat.assertions.behaviour.calls import (
    Call,
    FunctionCall,
    SequenceCall,
    answers,
    as_call,
    coarsest,
    differ,
)
from pytest_attnheat.assertions.behaviour.difference import (
    check_relative,
    check_rows,
    output_place,
    relative_change,
)
from pytest_attnheat.assertions.behaviour.subjects import settled
from pytest_attnheat.callables import borrowed, modules_in

# Samples that are run alone, and others that are asked which of them has an influence.
_ALONE = 4
_COMPANY = 8
_BATCH = "assert_batch_independent"
_KEYS = "assert_key_permutation_invariant"

RANDOM_CAUSE = (
    "training=True: dropout draws other numbers where the shape or the order is another; "
    "call .eval()?"
)


def assert_batch_independent(
    subject: Callable[..., Any],
    *inputs: Tensor,
    lengths: Sequence[int] | Tensor | None = None,
    tolerance: float | None = None,
    seed: int = 0,
    training: bool = False,
    **arguments: Any,
) -> None:
    """Assert that a sample gives the same output alone, in the batch, and elsewhere in the batch.

    Up to four samples are run alone (of a larger batch, four drawn from the
    seed), and the whole batch once in another order.

    Args:
        subject: An attention function with the signature of
            `torch.nn.functional.scaled_dot_product_attention`, or a sequence model.
        *inputs: Query, key and value (batch, ..., length, width) for a
            function; one sequence for a model: floats (batch, length, width)
            or token ids (batch, length). Two samples or more.
        lengths: For a model: how many tokens of each sample are real, (batch,).
            The rest is padding, which the model is told of by its mask and
            whose output is not judged. None for no mask.
        tolerance: By what part of its size a row of the output may change. By
            default it follows the dtype: 1e-11, 2e-5, 7.8e-3, 6.2e-2 in
            float64, float32, float16, bfloat16.
        seed: What the choice of samples and their other order are drawn from.
        training: Accept a subject that answers at random, and start every call
            from the seed. It must draw the same numbers for every batch size:
            dropout does not.
        **arguments: Passed to the subject at every call. The `attn_mask` of a
            function is cut into samples if it has as many dimensions as the
            query; of a model every tensor whose first dimension is the batch.

    Raises:
        Failure: Some sample gives another output. The message names the
            sample and on which others it depends.
        TypeError: There are neither one nor three inputs, or one has the wrong type.
        ValueError: Shapes do not fit, there is only one sample, or the subject
            answers at random.

    Example:
        >>> assert_batch_independent(my_attention, query, key, value)
    """
    __tracebackhide__ = True
    call = as_call(subject, inputs, arguments, lengths)
    if isinstance(call, FunctionCall) and call.called.query.ndim < 3:
        raise ValueError(
            f"query: got shape {tuple(call.called.query.shape)}; accepted is "
            "(batch, ..., length, width)"
        )
    if call.batch < 2:
        raise ValueError(
            "the inputs hold one sample; a batch of two or more is needed to see whether samples "
            "depend on one another"
        )
    with borrowed(subject, *inputs, seed=seed), torch.no_grad():
        base, start = settled(subject, call.run, training=training, seed=seed)
        allowed = check_relative(tolerance, coarsest(base))
        batch = _Batch(subject, call, base, start, allowed, training)
        generator = torch.Generator().manual_seed(seed)
        _check_alone(batch, _chosen(call.batch, generator), repeat=f"seed={seed}")
        _check_elsewhere(batch, _shuffle(call.batch, generator), repeat=f"seed={seed}")


@dataclass(frozen=True)
class _Batch:
    """A batch, its output, and what it takes to call parts of it."""

    subject: object
    call: Call
    output: Tensor
    start: Callable[[], None]
    allowed: float
    training: bool

    def run(self, samples: Tensor) -> Tensor:
        """Run some samples as a batch."""
        self.start()
        return self.call.samples(samples.to(self.output.device)).run()

    def judged(self, samples: Tensor) -> Tensor | None:
        """Which rows of the output of some samples are judged."""
        judged = self.call.judged()
        return None if judged is None else judged[samples.to(judged.device)]


def _chosen(batch: int, generator: torch.Generator) -> Tensor:
    if batch <= _ALONE:
        return torch.arange(batch)
    return torch.randperm(batch, generator=generator)[:_ALONE].sort().values


def _shuffle(size: int, generator: torch.Generator) -> Tensor:
    """Draw an order in which not everything stays where it was."""
    order = torch.randperm(size, generator=generator)
    stays = bool((order == torch.arange(size)).all())
    return order.roll(1) if stays else order


def _check_alone(batch: _Batch, samples: Tensor, repeat: str) -> None:
    __tracebackhide__ = True
    chosen = samples.tolist()
    alone = torch.cat([batch.run(samples[i : i + 1]) for i in range(len(chosen))])
    together = batch.output[samples]
    judged = batch.judged(samples)
    change = relative_change(together, alone)
    if judged is not None:
        change = change.masked_fill(~judged, 0.0)
    off = [sample for sample, its in zip(chosen, change, strict=True) if _any_above(its, batch)]
    check_rows(
        _BATCH,
        together,
        alone,
        claim=f"rows are not the same in the batch as alone, in {_samples(off)}",
        allowed=batch.allowed,
        judged=judged,
        place=lambda index: output_place((chosen[index[0]], *index[1:])),
        cause=lambda _: _batch_cause(batch, off[0]),
        repeat=repeat,
    )


def _any_above(change: Tensor, batch: _Batch) -> bool:
    return bool((change > batch.allowed).any())


def _samples(which: list[int]) -> str:
    shown = ", ".join(map(str, which[:_ALONE]))
    return f"sample{'s' * (len(which) > 1)} {shown}{', ...' * (len(which) > _ALONE)}"


def _check_elsewhere(batch: _Batch, order: Tensor, repeat: str) -> None:
    __tracebackhide__ = True
    back = order.argsort()
    check_rows(
        _BATCH,
        batch.run(order)[back],
        batch.output,
        claim="rows change when the samples of the batch change places",
        allowed=batch.allowed,
        judged=batch.judged(torch.arange(len(order))),
        cause=lambda change: _batch_cause(batch, int(change.flatten(1).amax(1).argmax())),
        repeat=repeat,
    )


def _batch_cause(batch: _Batch, sample: int) -> str | None:
    norm = _batch_norm(batch.subject)
    if norm is not None:
        return f"{norm} takes its mean and variance from the batch: call .eval()"
    if batch.training:
        return RANDOM_CAUSE
    if answers(lambda: _is_softmax_over_batch(batch, sample)):
        return (
            "softmax over the batch (dim=0): in a batch of copies of one sample every key gets "
            "the weight 1 / batch"
        )
    return _company(batch, sample)


def _batch_norm(subject: object) -> str | None:
    """Name a batch norm that does not use what it has learned."""
    for module in modules_in(subject):
        for name, part in module.named_modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                where = f" {name!r}" * bool(name)
                if part.training:
                    return f"{type(part).__name__}{where} in training mode"
                if part.running_mean is None:
                    return f"{type(part).__name__}{where} without running statistics"
    return None


def _is_softmax_over_batch(batch: _Batch, sample: int) -> bool:
    """Whether copies of one sample share the weight of each key among them."""
    call = batch.call
    if isinstance(call, SequenceCall) or call.judged() is not None:
        return False
    output = batch.run(torch.full((call.batch,), sample))[sample]
    value = call.called.value[sample].double()
    shared = (value.sum(-2, keepdim=True) / call.batch).to(output.dtype)
    heads = output.shape[0] if output.ndim > 2 else 1
    if output.ndim > 2 and shared.shape[0] != heads:
        shared = shared.repeat_interleave(heads // shared.shape[0], 0)
    if shared.shape[-1] != output.shape[-1]:
        return False
    return not differ(output, shared.expand(output.shape), batch.allowed)


def _company(batch: _Batch, sample: int) -> str:
    """Say which other samples a sample depends on, as replacing them by a copy of it tells."""
    others = [other for other in range(batch.call.batch) if other != sample][:_COMPANY]
    felt = []
    for other in others:
        which = torch.arange(batch.call.batch)
        which[other] = sample
        if answers(partial(_changes, batch, sample, which)):
            felt.append(other)
    if not felt:
        return (
            f"sample {sample} changes with no other sample, but with its place in the batch or "
            "the size of the batch"
        )
    if felt == [0]:
        return (
            f"sample {sample} changes with sample 0: is the mask, or are the keys, of sample 0 "
            "taken for all?"
        )
    if len(felt) == 1 and answers(lambda: _has_output_of(batch, sample, felt[0])):
        return f"sample {sample} changes with sample {felt[0]} alone: are they exchanged?"
    return (
        f"sample {sample} changes with {_samples(felt)}: a mean, a norm or a softmax over the "
        "batch (dim=0), or a reshape that mixes it with another dimension?"
    )


def _has_output_of(batch: _Batch, sample: int, other: int) -> bool:
    """Whether a sample gives in the batch what another gives alone."""
    judged = batch.judged(torch.tensor([other]))
    alone = batch.run(torch.tensor([other]))
    return not differ(batch.output[sample : sample + 1], alone, batch.allowed, judged)


def _changes(batch: _Batch, sample: int, which: Tensor) -> bool:
    """Whether the output of a sample changes where the batch holds other samples."""
    one = slice(sample, sample + 1)
    judged = batch.judged(torch.tensor([sample]))
    return differ(batch.run(which)[one], batch.output[one], batch.allowed, judged)


def assert_key_permutation_invariant(
    subject: Callable[..., Any],
    *inputs: Tensor,
    lengths: Sequence[int] | Tensor | None = None,
    tolerance: float | None = None,
    seed: int = 0,
    training: bool = False,
    **arguments: Any,
) -> None:
    """Assert that attention does not depend on the order of its keys.

    Attention is an operation on a set of keys: if keys, values and the columns
    of the mask are put in another order together, the output of a function
    stays as it is. The output of a sequence model without positions follows
    its tokens to their new places. Tried are the reverse order, a rotation by
    one and an order drawn from the seed.

    Args:
        subject: An attention function with the signature of
            `torch.nn.functional.scaled_dot_product_attention`, or a sequence
            model without positions and without a causal mask.
        *inputs: Query, key and value for a function; one sequence for a model.
            Two keys or more.
        lengths: For a model: how many tokens of each sample are real, (batch,).
            The rest is padding, which the model is told of by its mask, which
            is put in another order too. None for no mask.
        tolerance: By what part of its size a row of the output may change. By
            default it follows the dtype: 1e-11, 2e-5, 7.8e-3, 6.2e-2 in
            float64, float32, float16, bfloat16.
        seed: What the third order is drawn from.
        training: Accept a subject that answers at random, and start every call
            from the seed. It must draw the same numbers for every order of the
            keys: dropout of weights does not.
        **arguments: Passed to the subject at every call. The `attn_mask` of a
            function is put in the order of the keys; of a model the length in
            every tensor (batch, length, ...) or (..., length, length), and in a mask
            (batch, 1, 1, length).
            `is_causal=True` is refused: under it the order of keys matters.
            Pass the same as an `attn_mask`.

    Raises:
        Failure: The order of keys changes the output.
        TypeError: There are neither one nor three inputs, or one has the wrong type.
        ValueError: Shapes do not fit, there is only one key, `is_causal` is
            given, or the subject answers at random.

    Example:
        >>> assert_key_permutation_invariant(my_attention, query, key, value)
    """
    __tracebackhide__ = True
    call = as_call(subject, inputs, arguments, lengths)
    if arguments.get("is_causal"):
        raise ValueError(
            "is_causal=True: under a causal mask the order of keys matters; pass the mask as "
            "attn_mask=causal_mask(...), and it is put in the order of the keys"
        )
    if call.length < 2:
        raise ValueError("there is one key, which has no other order; two or more are needed")
    with borrowed(subject, *inputs, seed=seed), torch.no_grad():
        base, start = settled(subject, call.run, training=training, seed=seed)
        allowed = check_relative(tolerance, coarsest(base))
        what = "keys and values are" if isinstance(call, FunctionCall) else "the sequence is"
        for name, order in _orders(call.length, seed):
            start()
            turned = order.to(base.device)
            check_rows(
                _KEYS,
                call.restored(call.reordered(turned).run(), turned),
                base,
                claim=f"rows change when {what} {name}",
                allowed=allowed,
                judged=call.judged(),
                cause=lambda _: (
                    RANDOM_CAUSE if training else _order_cause(call, base, allowed, start)
                ),
                repeat=f"seed={seed}",
            )


def _orders(length: int, seed: int) -> list[tuple[str, Tensor]]:
    places = torch.arange(length)
    return [
        ("reversed", places.flip(0)),
        ("rotated by one", places.roll(1)),
        ("shuffled", _shuffle(length, torch.Generator().manual_seed(seed))),
    ]


def _order_cause(call: Call, base: Tensor, allowed: float, start: Callable[[], None]) -> str:
    """Tell a causal mask, and a key that is left out, from anything else that knows the order."""
    start()
    if isinstance(call, SequenceCall):
        if answers(lambda: _first_is_alone(call, base, allowed)):
            return "the first token does not feel the others: a causal mask?"
        return "the order of tokens is felt: position embeddings, or rotary or relative positions?"

    def unfelt(keys: slice, query: int | None = None) -> bool:
        return answers(lambda: not _feels(call, keys, base, allowed, query))

    if unfelt(slice(1, None), query=0):
        return "query 0 feels no key but the first: a causal mask inside?"
    for number in (call.length - 1, 0):
        if unfelt(slice(number, number + 1)):
            return f"key {number} is felt by no query, whatever its value: is it left out?"
    return (
        "the places of keys are felt: positions (rotary, ALiBi) or a window inside, or a mask "
        "that does not follow its keys?"
    )


def _first_is_alone(call: SequenceCall, base: Tensor, allowed: float) -> bool:
    """Whether the first token's output stays where all others become copies of it."""
    inputs = call.called.inputs
    copies = inputs[:, :1].expand(inputs.shape).clone()
    output = SequenceCall(replace(call.called, inputs=copies), call.real).run()
    return not differ(output[:, :1], base[:, :1], allowed)


def _feels(
    call: FunctionCall, keys: slice, base: Tensor, allowed: float, query: int | None = None
) -> bool:
    """Whether another value of some keys changes the output, for one query or for any.

    Said of keys too that the mask hides from all these queries: there is nothing to be told.
    """
    rows = slice(None) if query is None else slice(query, query + 1)
    seen = call.called.may_see()[..., rows, keys].any(-1)
    if not bool(seen.any()):
        return True
    value = call.called.value.clone()
    value[..., keys, :] += 10 * value.abs().amax().clamp(min=1)
    got = call.called.run(value=value)[..., rows, :]
    return differ(got, base[..., rows, :], allowed, seen)
