"""Assertions that neither the company of a sample nor the order of keys matters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ...callables import borrowed, modules_in
from ...inputs import misuse
from .bitwise import differing_bits
from .inside import Inside
from .models import ModelSubject, Subject
from .reading import as_subject
from .subject import (
    Compared,
    check_each,
    check_relative,
    check_rows,
    coarsest,
    differ,
    holds,
    output_place,
    settled,
)
from .visibility import as_documents

# Samples that are run alone, and others of which each is tried for its influence.
_ALONE = 4
_COMPANY = 8
# To how many samples a small batch is padded where every bit counts.
_PADDED = 16
# How often the same call is made once more, to see whether it repeats itself.
_AGAIN = 3
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
    documents: Tensor | None = None,
    tolerance: float | None = None,
    exact: bool = False,
    seed: int = 0,
    training: bool = False,
    **arguments: Any,
) -> None:
    """Assert that a sample gives the same output alone, in the batch, and elsewhere in the batch.

    Up to four samples are run alone (of a larger batch, four drawn from the
    seed), and the whole batch once in another order. With `exact` every bit counts: the batch is
    run a second time as well, in two halves, and padded to other sizes with copies of its samples,
    before it and behind.

    Args:
        subject: An attention function with the signature of
            `torch.nn.functional.scaled_dot_product_attention`, or a sequence model.
        *inputs: Query, key and value (batch, ..., length, width) for a function; one sequence for a
            model: floats (batch, length, width) or token ids (batch, length). Two samples or more.
        lengths: For a model: how many tokens of each sample are real, (batch,).
            The rest is padding, which the model is told of by its mask and
            whose output is not judged. None for no mask.
        documents: For a model: the document of each token, (batch, length) or (length,), of several
            that are packed into one sequence. Each has to give the same alone, with its part of
            every argument (batch, length); so positions have to begin anew in it.
        tolerance: By what part of its size a row of the output may change. By default it follows
            the dtype: 1e-11, 2e-5, 7.8e-3, 6.2e-2 in float64, float32, float16, bfloat16.
        exact: Whether the output must be the same bit by bit, as a batch-invariant engine
            promises. A failure counts the elements that differ, says how many units in the last
            place, and whether it is rounding alone: that of `tolerance`.
        seed: What the choice of samples and their other order are drawn from.
        training: Accept a subject that answers at random, and start every call from the seed. It
            must draw the same numbers for every batch size: dropout does not.
        **arguments: Passed to the subject at every call. The `attn_mask` of a
            function is cut into samples if it has as many dimensions as the
            query; of a model every tensor whose first dimension is the batch.

    Raises:
        Failure: Some sample gives another output. The message names the
            sample and on which others it depends.
        TypeError: There are neither one nor three inputs, or one has the wrong type.
        ValueError: Shapes do not fit, there is only one sample, or the subject answers at random.

    Examples:
        >>> assert_batch_independent(my_attention, query, key, value)
    """
    __tracebackhide__ = True
    called = as_subject(subject, inputs, arguments, lengths, seed=seed if training else None)
    if called.batch < 2 and documents is None:
        name, first = next(iter(called.tensors.items()))
        accepted = "(batch, ...), two samples or more, to see whether they depend on one another"
        raise ValueError(misuse(name, f"shape {tuple(first.shape)}", accepted))
    with borrowed(subject, *inputs, seed=seed), torch.no_grad():
        base = settled(subject, called.run, training=training, seed=seed, exact=exact)
        allowed = check_relative(tolerance, coarsest(base))
        batch = _Batch(subject, called, base, allowed, training, exact)
        repeat, packed = f"seed={seed}", [] if documents is None else [_packed(batch, documents)]
        samples = _pairs(batch, torch.Generator().manual_seed(seed), repeat=repeat)
        compared = chain(packed, samples if called.batch > 1 else ())
        check_each(_BATCH, compared, allowed=allowed, exact=exact)


@dataclass(frozen=True)
class _Batch:
    """A batch, its output, and what it takes to call parts of it."""

    subject: object
    called: Subject
    output: Tensor
    allowed: float
    training: bool
    exact: bool

    def run(self, samples: Tensor) -> Tensor:
        """Run some samples as a batch."""
        return self.called.samples(samples.to(self.output.device)).run()

    def judged(self, samples: Tensor) -> Tensor | None:
        """Which rows of the output of some samples are judged."""
        judged = self.called.judged()
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


def _pairs(batch: _Batch, generator: torch.Generator, repeat: str) -> Iterator[Compared]:
    """Yield what samples give alone, elsewhere and, if bits count, in batches of other sizes."""
    yield _alone(batch, _chosen(batch.called.batch, generator), repeat)
    size = batch.called.batch
    order = _shuffle(size, generator)
    claim = "rows change when the samples of the batch change places"
    yield _elsewhere(batch, [order], order.argsort(), claim, repeat)
    if not batch.exact:
        return
    own = torch.arange(size)
    claim = "rows change from one call to the next, with the same input"
    yield _elsewhere(batch, [own], own, claim, repeat)
    halves = [own[: size // 2], own[size // 2 :]]
    yield _elsewhere(batch, halves, own, "rows change when the batch is run in two halves", repeat)
    for more in dict.fromkeys((1, size, max(1, _PADDED - size))):
        others = torch.arange(more) % size
        claim = f"rows change when the batch is padded to {size + more} samples"
        yield _elsewhere(batch, [torch.cat([others, own])], own + more, claim, repeat)
        yield _elsewhere(batch, [torch.cat([own, others])], own, claim, repeat)


def _alone(batch: _Batch, samples: Tensor, repeat: str) -> Compared:
    chosen = samples.tolist()
    alone = torch.cat([batch.run(samples[i : i + 1]) for i in range(len(chosen))])

    def off(change: Tensor, limit: float) -> list[int]:
        flags = (change > limit).flatten(1).any(-1).tolist()
        return [sample for sample, is_off in zip(chosen, flags, strict=True) if is_off]

    def claim(change: Tensor) -> str:
        which = off(change, 0.0 if batch.exact else batch.allowed)
        named = f", in {_samples(which)}" * bool(which)  # the sign of a zero is no change
        return f"rows are not the same in the batch as alone{named}"

    return Compared(
        _picked(batch.output, samples), alone, claim=claim, judged=batch.judged(samples),
        place=lambda index: output_place((chosen[index[0]], *index[1:])),
        cause=lambda change: _batch_cause(batch, off(change, batch.allowed)[0]),
        cause_of_bits=lambda rows: _cause_of_bits(batch, chosen[_most(rows)]), repeat=repeat,
        again=batch.called.run,
    )  # fmt: skip


def _packed(batch: _Batch, documents: Tensor) -> Compared:
    """What documents give in the sequence that they are packed into, and alone."""
    called = batch.called
    if not isinstance(called, ModelSubject):
        raise ValueError(misuse("documents", "some, with an attention function", "a model"))
    for name, value in called.arguments.items():
        counts = isinstance(value, Tensor) and value.ndim and not value.is_floating_point()
        if counts and not called.along(name, square=True):
            accepted = "a tensor (batch, length), which can be cut to one document"
            raise ValueError(misuse(name, f"shape {tuple(value.shape)}", accepted))
    owners = as_documents(documents, (called.batch, called.length))
    alone = batch.output.clone()
    for sample, owner in enumerate(owners):
        one = called.samples(torch.tensor([sample], device=batch.output.device))
        for document in owner.unique():
            tokens = (owner == document).nonzero().flatten()
            alone[sample, tokens] = one.cut(tokens.tolist()).run()[0]

    def cause(change: Tensor) -> str | None:
        first = (owners == owners[:, :1]).to(change.device)
        if bool((change > batch.allowed)[first].any()):
            return None
        return (
            "the first document of a sequence is right: are the others shown to it by the mask, or "
            "do their positions count on from it?"
        )

    claim = "rows of documents are not the same packed into one sequence as alone"
    return Compared(batch.output, alone, claim=claim, cause=cause, again=called.run)


def _picked(output: Tensor, samples: Tensor) -> Tensor:
    """The rows of some samples, of any dtype: torch 2.6 cannot index float8 by a tensor."""
    if output.itemsize > 1:
        return output[samples]
    return output.view(torch.uint8)[samples].view(output.dtype)


def _most(rows: Tensor) -> int:
    """The first sample of which most counts."""
    return int(rows.double().flatten(1).amax(1).argmax())


def _samples(which: list[int]) -> str:
    shown = ", ".join(map(str, which[:_ALONE]))
    return f"sample{'s' * (len(which) > 1)} {shown}{', ...' * (len(which) > _ALONE)}"


def _elsewhere(
    batch: _Batch, parts: Sequence[Tensor], back: Tensor, claim: str, repeat: str
) -> Compared:
    """Run samples in some batches, of which `back` says where each sample is."""

    def run() -> Tensor:
        return torch.cat([batch.run(part) for part in parts])

    return Compared(
        _picked(run(), back), batch.output, claim=claim,
        judged=batch.judged(torch.arange(batch.called.batch)),
        cause=lambda change: _batch_cause(batch, _most(change)),
        cause_of_bits=lambda rows: _cause_of_bits(batch, _most(rows)), repeat=repeat, again=run,
    )  # fmt: skip


def _batch_cause(batch: _Batch, sample: int) -> str:
    norm = _batch_norm(batch.subject)
    if norm is not None:
        return f"{norm} takes its mean and variance from the batch: call .eval()"
    if batch.training:
        return RANDOM_CAUSE
    known = batch.called.mistake(batch.output) or ""
    # Any other known defect a sample has alone as well.
    if "batch" in known or "samples" in known:
        return known
    if isinstance(batch.called, ModelSubject) and (said := Inside(batch.called).why_entries_mix()):
        return said
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


def _cause_of_bits(batch: _Batch, sample: int) -> str:
    """Say what the bits of a sample depend on, which is right to rounding."""
    if batch.training:
        return RANDOM_CAUSE
    own = torch.arange(batch.called.batch)
    if any(holds(partial(_changes, batch, sample, own, exact=True)) for _ in range(_AGAIN)):
        return "two calls with the same input differ as well: atomic adds, or a race?"
    return _company(batch, sample, exact=True)


# By whether it is right to rounding: what takes it from the numbers of other samples, from where it
# is, and from how many there are.
_FROM_OTHERS = (
    "a mean, a norm or a softmax over the batch (dim=0), a scale from its largest number, or a "
    "reshape that mixes it with another dimension?",
    "a scale, a norm or a choice of kernel from the numbers of the whole batch?",
)
_FROM_FIRST = (
    "is its mask, or are its keys, taken for all?",
    "a scale or a choice of kernel from its numbers?",
)
_FROM_PLACE = "an index of the batch that is wrong?", "tiles or splits that begin elsewhere?"
_FROM_SIZE = (
    "a number of samples where a length is meant?",
    "another kernel, another tile, or another split of the keys for another size?",
)


def _company(batch: _Batch, sample: int, *, exact: bool = False) -> str:
    """Say what a sample, or its bits, depends on, as batches of the same size tell."""
    said = f"the bits of sample {sample} change" if exact else f"sample {sample} changes"
    size = batch.called.batch

    def changes(which: Tensor, at: int = sample, expected: Tensor | None = None) -> bool:
        return holds(partial(_changes, batch, sample, which, at=at, exact=exact, expected=expected))

    own, felt = torch.arange(size), []
    for other in [other for other in range(size) if other != sample][:_COMPANY]:
        which = own.clone()
        which[other] = sample
        felt += [other] if changes(which) else []
    if felt == [0] and _feels_the_first(batch, sample, changes):
        return f"{said} with the first sample, whichever that is: {_FROM_FIRST[exact]}"
    if felt:
        return f"{said} with {_samples(felt)}: {_FROM_OTHERS[exact]}"
    if changes(torch.full((size,), sample)):
        return (
            f"{said} with the other samples together, and with none of them alone: "
            f"{_FROM_OTHERS[exact]}"
        )
    if any(changes(own.roll(by), (sample + by) % size) for by in range(1, min(size, 1 + _COMPANY))):
        return f"{said} with its place in a batch of the same size: {_FROM_PLACE[exact]}"
    return f"{said} with the size of the batch alone: {_FROM_SIZE[exact]}"


def _feels_the_first(batch: _Batch, sample: int, changes: Callable[..., bool]) -> bool:
    """Whether a sample depends on the first of a batch, also where that is another one."""
    own = torch.arange(batch.called.batch)
    for by in range(1, len(own)):
        order, at = own.roll(by), (sample + by) % len(own)
        if at == 0:
            continue
        other, expected = order.clone(), batch.run(order)[at : at + 1]
        other[0] = sample
        return changes(other, at, expected)
    return True  # of two samples, nothing tells


def _changes(
    batch: _Batch,  # The batch
    sample: int,  # The sample
    which: Tensor,  # The samples of the other batch
    at: int | None = None,  # Where it is among them; where it was, by default
    *,
    exact: bool,  # Whether every bit counts
    expected: Tensor | None = None,  # By default, what it gives in the batch
) -> bool:
    """Whether a sample gives something else in a batch of others."""
    place = sample if at is None else at
    got = batch.run(which)[place : place + 1]
    expected = batch.output[sample : sample + 1] if expected is None else expected
    judged = batch.judged(torch.tensor([sample]))
    if not exact:
        return differ(got, expected, batch.allowed, judged)
    rows = differing_bits(got, expected).any(-1)
    return bool((rows if judged is None else rows & judged.to(rows.device)).any())


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

    Attention is an operation on a set of keys: if keys, values and the columns of the mask are put
    in another order together, the output of a function stays as it is. The output of a sequence
    model without positions follows its tokens to where they go. It tries the reverse order, a
    rotation by one and an order drawn from the seed.

    Args:
        subject: An attention function with the signature of
            `torch.nn.functional.scaled_dot_product_attention`, or a sequence
            model without positions and without a causal mask.
        *inputs: Query, key and value for a function; one sequence for a model. Two keys or more.
        lengths: For a model: how many tokens of each sample are real, (batch,).
            The rest is padding, which the model is told of by its mask, which
            is put in another order too. None for no mask.
        tolerance: By what part of its size a row of the output may change. By default it follows
            the dtype: 1e-11, 2e-5, 7.8e-3, 6.2e-2 in float64, float32, float16, bfloat16.
        seed: What the third order is drawn from.
        training: Accept a subject that answers at random, and start every call from the seed. It
            must draw the same numbers for every order of the keys: dropout of weights does not.
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

    Examples:
        >>> assert_key_permutation_invariant(my_attention, query, key, value)
    """
    __tracebackhide__ = True
    called = as_subject(subject, inputs, arguments, lengths, seed=seed if training else None)
    if arguments.get("is_causal"):
        accepted = "attn_mask=causal_mask(...), which is put in the order of the keys"
        raise ValueError(misuse("is_causal", "True, under which their order matters", accepted))
    if called.length < 2:
        name = "inputs" if len(inputs) == 1 else "key"
        raise ValueError(misuse(name, "one element, which has no other order", "two or more"))
    with borrowed(subject, *inputs, seed=seed), torch.no_grad():
        base = settled(subject, called.run, training=training, seed=seed)
        allowed = check_relative(tolerance, coarsest(base))
        for name, order in _orders(called.length, seed):
            turned = order.to(base.device)
            check_rows(
                _KEYS, called.restore(called.reorder(turned).run(), turned), base,
                claim=f"rows change when {called.ordered} {name}", allowed=allowed,
                judged=called.judged(),
                cause=lambda _: RANDOM_CAUSE if training else called.cause_of_order(base, allowed),
                repeat=f"seed={seed}",
            )  # fmt: skip


def _orders(length: int, seed: int) -> list[tuple[str, Tensor]]:
    numbers = torch.arange(length)
    return [
        ("reversed", numbers.flip(0)),
        ("rotated by one", numbers.roll(1)),
        ("shuffled", _shuffle(length, torch.Generator().manual_seed(seed))),
    ]
