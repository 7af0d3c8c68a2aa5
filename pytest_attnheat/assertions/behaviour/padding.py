"""The assertion that padding, on the right or on the left, is not felt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

from pytest_attnheat.assertions.behaviour.difference import check_relative, check_rows
from pytest_attnheat.assertions.behaviour.function_padding import PaddedFunction
from pytest_attnheat.assertions.behaviour.functions import AttentionFunction
from pytest_attnheat.assertions.behaviour.invariance import RANDOM_CAUSE
from pytest_attnheat.assertions.behaviour.model_padding import Alone, PaddedSequence
from pytest_attnheat.assertions.behaviour.models import ModelSubject
from pytest_attnheat.assertions.behaviour.padded import Filling, Padded
from pytest_attnheat.assertions.behaviour.reading import as_lengths, as_subject
from pytest_attnheat.assertions.behaviour.sequences import check_takes_mask
from pytest_attnheat.assertions.behaviour.subject import Subject, answers, coarsest, differ, settled
from pytest_attnheat.attention.vocabulary import Side
from pytest_attnheat.callables import borrowed
from pytest_attnheat.inputs import check_number

_NAME = "assert_padding_invariant"


def assert_padding_invariant(
    subject: Callable[..., Any],
    *inputs: Tensor,
    lengths: Sequence[int] | Tensor | None = None,
    sides: Side | Sequence[Side] = ("right", "left"),
    amount: int = 3,
    padding_value: float | None = None,
    tolerance: float | None = None,
    seed: int = 0,
    training: bool = False,
    **arguments: Any,
) -> None:
    """Assert that padding, told to the subject by its mask, does not change the output.

    A sequence model runs every sample alone, without padding and without a
    mask, then all of them as one padded batch with it. The outputs of real
    tokens must agree. An attention function is given further keys and values
    that its `attn_mask` forbids; its output must not change. Unless a value is
    given, the padding is drawn from the seed, twice, several times as large as the inputs:
    padding of zeros would hide that it is felt.

    Args:
        subject: An attention function with the signature of
            `torch.nn.functional.scaled_dot_product_attention`, or a sequence
            model. Modules of PyTorch and models of transformers are known to
            take their masks; of another module say how with `SequenceModel`.
        *inputs: Query, key and value for a function; one sequence for a model:
            floats (batch, length, width) or token ids (batch, length).
        lengths: For a model: how many tokens of each sample are real, counted from the
            first, (batch,). By default all, and padding is added to all samples; of two
            or more samples it then also makes a batch in which only some are padded.
        sides: On which sides, `"right"`, `"left"` or both. A causal module needs no mask for
            padding on the right: with `sides="right"` a module may take no mask.
        amount: How many tokens, or keys, of padding are added to the longest sample.
        padding_value: What the padding holds, for a model that finds its padding by a token id.
            Such a model needs no mask.
        tolerance: By what part of its size a row of the output may change. By
            default it follows the dtype: 1e-11, 2e-5, 7.8e-3, 6.2e-2 in
            float64, float32, float16, bfloat16.
        seed: What the padding is drawn from.
        training: Accept a subject that answers at random, and start every call
            from the seed. It must draw the same numbers for every length:
            dropout does not.
        **arguments: Passed to the subject at every call. A function's mask is
            spelled out as an `attn_mask` with the padding. A model takes no
            argument that is as long as the sequence.

    Raises:
        Failure: Padding changes the output. The message says on which
            side, and whether the mask is ignored or means the opposite.
        TypeError: There are neither one nor three inputs, or one has the wrong type.
        ValueError: Shapes do not fit, the model is not known to take a mask, an argument is out
            of range, or the subject answers at random.

    Example:
        >>> model = SequenceModel(my_encoder, mask="keep", mask_argument="mask")
        >>> assert_padding_invariant(model, torch.randn(2, 6, 16))
    """
    __tracebackhide__ = True
    asked, filling = _sides(sides), _filling(amount, padding_value, seed)
    call = as_subject(subject, inputs, arguments, lengths if len(inputs) == 3 else None)
    if isinstance(call, ModelSubject):
        _check_model(call, asked, filling)
    real = as_lengths(lengths, call.batch, call.length) if len(inputs) == 1 else None
    with borrowed(subject, *inputs, seed=seed), torch.no_grad():
        base, start = settled(subject, call.run, training=training, seed=seed)
        allowed = check_relative(tolerance, coarsest(base))
        for both in _padded(call, real, asked, filling, start):
            for one in both:
                _check(one, both, allowed, training=training, repeat=f"seed={seed}")


def _sides(sides: object) -> tuple[Side, ...]:
    given = (sides,) if isinstance(sides, str) else sides
    if not isinstance(given, (tuple, list)) or not given or set(given) - set(get_args(Side)):
        raise ValueError(f"sides: got {sides!r}; accepted are 'right', 'left' or both")
    return tuple(given)


def _filling(amount: object, value: object, seed: int) -> Filling:
    if type(amount) is not int or amount < 1:
        raise ValueError(f"amount: got {amount!r}; accepted is a whole number from 1")
    held = None if value is None else check_number(value, "padding_value")
    return Filling(amount, held, seed)


def _check_model(call: ModelSubject, sides: Sequence[Side], filling: Filling) -> None:
    """Refuse a model that cannot be told of its padding."""
    batch, length = call.inputs.shape[:2]
    if filling.value is None and list(sides) != ["right"]:
        check_takes_mask(call.model)
    for name, argument in call.arguments.items():
        if isinstance(argument, Tensor) and call.along(name):
            raise ValueError(
                f"{name}: shape {tuple(argument.shape)} is made for sequences of {length}, and "
                "padding changes their length; let the module make it from its inputs, and give "
                f"lengths ({batch},) for padding"
            )


def _padded(
    call: Subject,
    lengths: list[int] | None,
    sides: Sequence[Side],
    filling: Filling,
    start: Callable[[], None],
) -> Iterator[list[Padded]]:
    """List the subject padded in every way that is tried, the sides of one way together."""
    if isinstance(call, AttentionFunction):
        expected = PaddedFunction.without(call, start)
        for content in filling.each():
            yield [PaddedFunction(call, side, content, start, expected) for side in sides]
        return
    assert lengths is not None
    assert isinstance(call, ModelSubject)
    length = max(lengths)
    ways = [(lengths, length + filling.amount)]
    if len(lengths) > 1 and length > 1:
        # As many batches are: the longest sample has no padding at all.
        ragged = [max(1, n - i % length) for i, n in enumerate(lengths)]
        ways.append((ragged if min(lengths) == length else lengths, length))
    for real, total in ways:
        alone = Alone(call, real, start)
        for content in filling.each():
            yield [PaddedSequence(alone, side, total, content) for side in sides]


def _check(
    padded: Padded, sides: Sequence[Padded], allowed: float, *, training: bool, repeat: str
) -> None:
    __tracebackhide__ = True
    got = padded.run()
    check_rows(
        _NAME,
        got,
        padded.expected,
        claim=padded.claim,
        allowed=allowed,
        judged=padded.judged,
        place=padded.place,
        cause=lambda _: RANDOM_CAUSE if training else _cause(padded, got, sides, allowed),
        repeat=repeat,
    )


def _cause(padded: Padded, got: Tensor, sides: Sequence[Padded], allowed: float) -> str | None:
    """Try what else the output could be: that without a mask, or that with the opposite mask."""

    def agree(one: Tensor, other: Tensor) -> bool:
        return not differ(one, other, allowed, padded.judged)

    felt = _felt(padded, got, allowed)
    # Where the padding is not felt, as after the tokens of a causal module, no mask is needed.
    if felt is not False and answers(lambda: agree(got, padded.run("all real"))):
        return padded.ignored
    if answers(lambda: agree(padded.run("opposite"), padded.expected)):
        return "the mask is read as its opposite: the output is right where True and False change"
    if padded.spreads_nan(got):
        return (
            "nan spreads from the padding: under a causal mask padding on the left may see "
            "nothing, and 0 * nan is nan"
        )
    if felt and answers(lambda: padded.sees_only_padding(got, allowed)):
        return "the mask is read as its opposite: real tokens feel the padding and not one another"
    if any(answers(partial(_holds, side, allowed)) for side in sides):
        return f"only on the {padded.side}: {padded.advice(felt)}"
    return padded.advice(felt) if felt is False else None


def _felt(padded: Padded, got: Tensor, allowed: float) -> bool | None:
    """Whether the output changes with what the padding holds; None where nothing else may be."""
    other = padded.other()
    if other is None:
        return None
    return answers(lambda: differ(other.run(), got, allowed, padded.judged))


def _holds(padded: Padded, allowed: float) -> bool:
    return not differ(padded.run(), padded.expected, allowed, padded.judged)
