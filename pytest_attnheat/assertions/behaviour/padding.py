"""The assertion that padding, on the right or on the left, is not felt."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Protocol, TypeAlias, get_args

import torch
from torch import Tensor

from pytest_attnheat.assertions.behaviour.calls import (
    Call,
    FunctionCall,
    SequenceCall,
    answers,
    as_call,
    as_lengths,
    check_takes_mask,
    coarsest,
    differ,
)
from pytest_attnheat.assertions.behaviour.difference import check_relative, check_rows, output_place
from pytest_attnheat.assertions.behaviour.heads import of_the_first
from pytest_attnheat.assertions.behaviour.invariance import RANDOM_CAUSE
from pytest_attnheat.assertions.behaviour.sequences import Subject
from pytest_attnheat.assertions.behaviour.subjects import borrowed, settled
from pytest_attnheat.inputs import check_number
from pytest_attnheat.reference import padding_mask

Side: TypeAlias = Literal["right", "left"]
# What the subject is told of the padding: the truth, that all is real, or the opposite.
Told: TypeAlias = Literal["truth", "all real", "opposite"]

_NAME = "assert_padding_invariant"
# Padding is drawn at these multiples of the scale of the inputs: what is large is felt.
_SCALES = (3.0, 10.0)
# By how much the score of a padding key that is aimed at a query is above that of any real key,
# and the length that such a key has at most.
_AHEAD, _LONGEST = 100.0, 3e3


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
        AssertionError: Padding changes the output. The message says on which
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
    call = as_call(subject, inputs, arguments, lengths if len(inputs) == 3 else None)
    if isinstance(call, SequenceCall):
        _check_model(call, asked, filling)
    real = None if isinstance(call, FunctionCall) else as_lengths(lengths, call.called)
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


@dataclass(frozen=True)
class _Filling:
    """What padding is made of.

    Attributes:
        amount: How many places are added.
        value: What they hold; None for numbers drawn from the seed.
        seed: That seed.
        scale: How much larger than the inputs they are.
    """

    amount: int
    value: float | None
    seed: int
    scale: float = 1.0

    @property
    def aims(self) -> bool:
        """Whether a padding key of a function points where a query looks: at the last scale."""
        return self.scale == _SCALES[-1]

    def other(self) -> _Filling | None:
        """The same with other numbers; None for one value, which may be how padding is known."""
        return None if self.value is not None else replace(self, seed=self.seed + 1)

    def like(self, inputs: Tensor, shape: Sequence[int]) -> Tensor:
        """Fill a shape with padding for these inputs."""
        if self.value is not None:
            return torch.full(shape, self.value, dtype=inputs.dtype, device=inputs.device)
        generator = torch.Generator().manual_seed(self.seed + int(self.scale))
        if not inputs.is_floating_point():
            ids = torch.randint(0, int(inputs.max()) + 1, tuple(shape), generator=generator)
            return ids.to(inputs)
        numbers = torch.randn(*shape, generator=generator)
        size = float(inputs.double().square().mean().sqrt()) or 1.0
        return (numbers * (self.scale * size)).to(inputs)

    def each(self) -> Iterator[_Filling]:
        """The same at every scale, or once if it holds one value."""
        for scale in _SCALES if self.value is None else _SCALES[:1]:
            yield replace(self, scale=scale)


def _filling(amount: object, value: object, seed: int) -> _Filling:
    if type(amount) is not int or amount < 1:
        raise ValueError(f"amount: got {amount!r}; accepted is a whole number from 1")
    held = None if value is None else check_number(value, "padding_value")
    return _Filling(amount, held, seed)


def _check_model(call: SequenceCall, sides: Sequence[Side], filling: _Filling) -> None:
    """Refuse a model that cannot be told of its padding."""
    batch, length = call.called.inputs.shape[:2]
    if filling.value is None and list(sides) != ["right"]:
        check_takes_mask(call.called.model)
    for name, argument in call.called.arguments.items():
        if isinstance(argument, Tensor) and call.along(name):
            raise ValueError(
                f"{name}: shape {tuple(argument.shape)} is made for sequences of {length}, and "
                "padding changes their length; let the module make it from its inputs, and give "
                f"lengths ({batch},) for padding"
            )


class _Padded(Protocol):
    """A subject with padding on one side."""

    @property
    def side(self) -> Side:
        """That side."""

    @property
    def claim(self) -> str:
        """What broken rows do."""

    @property
    def expected(self) -> Tensor:
        """The output without the padding, in the shape of that with it."""

    @property
    def judged(self) -> Tensor | None:
        """Which rows are judged."""

    def run(self, told: Told = "truth") -> Tensor:
        """Call the subject."""

    def place(self, index: tuple[int, ...]) -> str:
        """Name a row of the output."""

    def spreads_nan(self, got: Tensor) -> bool:
        """Whether NaN in the padding is likely to be why an output is wrong."""

    @property
    def ignored(self) -> str:
        """Say that the output is the same without the mask."""

    def advice(self, felt: bool | None) -> str:
        """What to look at where only this side is wrong.

        Args:
            felt: Whether the output changes with what the padding holds; None for unknown.
        """

    def other(self) -> _Padded | None:
        """The same with padding that holds something else, if that is allowed."""

    def sees_only_padding(self, got: Tensor, allowed: float) -> bool:
        """Whether real tokens do not feel one another."""


def _padded(
    call: Call,
    lengths: list[int] | None,
    sides: Sequence[Side],
    filling: _Filling,
    start: Callable[[], None],
) -> Iterator[list[_Padded]]:
    """List the subject padded in every way that is tried, the sides of one way together."""
    if isinstance(call, FunctionCall):
        expected = _PaddedFunction.without(call, start)
        for content in filling.each():
            yield [_PaddedFunction(call, side, content, start, expected) for side in sides]
        return
    assert lengths is not None
    length = max(lengths)
    ways = [(lengths, length + filling.amount)]
    if len(lengths) > 1 and length > 1:
        # As many batches are: the longest sample has no padding at all.
        ragged = [max(1, n - i % length) for i, n in enumerate(lengths)]
        ways.append((ragged if min(lengths) == length else lengths, length))
    for real, total in ways:
        alone = _Alone(call.called, real, start)
        for content in filling.each():
            yield [_PaddedSequence(alone, side, total, content) for side in sides]


@dataclass(frozen=True)
class _PaddedFunction:
    """An attention function with keys and values that its mask forbids."""

    call: FunctionCall
    side: Side
    filling: _Filling
    start: Callable[[], None]
    expected: Tensor

    @staticmethod
    def without(call: FunctionCall, start: Callable[[], None]) -> Tensor:
        """The output without padding, with the mask as it is given if it is no flag."""
        called = call.called
        start()
        return (called.explicit() if called.arguments.get("is_causal") else called).run()

    @property
    def claim(self) -> str:
        """What broken rows do."""
        return f"rows change with {self.filling.amount} masked keys on the {self.side}"

    @property
    def judged(self) -> Tensor | None:
        """Which rows may see a key."""
        return self.call.judged()

    def run(self, told: Told = "truth") -> Tensor:
        """Call the function with the padding and a mask."""
        spelled = self.call.called.explicit()
        mask = spelled.arguments["attn_mask"]
        padding = self._padding(spelled.key)
        if self.filling.aims:
            padding = _aimed(padding, self.call, self.judged)
        key = self._beside(spelled.key, padding)
        value = self._beside(spelled.value, self._padding(spelled.value))
        shown = told == "all real"
        hidden = mask.new_full((*mask.shape[:-1], self.filling.amount), shown)
        if mask.dtype != torch.bool:
            hidden = torch.zeros_like(hidden) if shown else torch.full_like(hidden, -math.inf)
        mask = self._beside(mask, hidden, dim=-1)
        if told == "opposite" and mask.dtype == torch.bool:  # a float mask has no opposite
            mask = ~mask
        self.start()
        return spelled.run(key=key, value=value, attn_mask=mask)

    def _padding(self, tensor: Tensor) -> Tensor:
        *leading, _, width = tensor.shape
        return self.filling.like(tensor, (*leading, self.filling.amount, width))

    def _beside(self, tensor: Tensor, padding: Tensor, dim: int = -2) -> Tensor:
        parts = [padding, tensor] if self.side == "left" else [tensor, padding]
        return torch.cat(parts, dim)

    def place(self, index: tuple[int, ...]) -> str:
        """Name a row of the output."""
        return output_place(index)

    def spreads_nan(self, got: Tensor) -> bool:
        """No: the padding of a function is finite, and has no output."""
        return False

    @property
    def ignored(self) -> str:
        """Say that the output is the same without the mask."""
        return "attn_mask changes nothing: it is ignored"

    def advice(self, felt: bool | None) -> str:
        """What to look at where only this side is wrong."""
        return "does the mask follow its keys, or are keys found by their place?"

    def other(self) -> _PaddedFunction | None:
        """The same with padding that holds something else, if that is allowed."""
        content = self.filling.other()
        return None if content is None else replace(self, filling=content)

    def sees_only_padding(self, got: Tensor, allowed: float) -> bool:
        """No: of a function the opposite of a mask is tried."""
        return False


def _aimed(padding: Tensor, call: FunctionCall, judged: Tensor | None) -> Tensor:
    """Turn the last padding key towards a query, so that it wins the softmax if it is not masked.

    Random keys get small scores from most queries, so that a fill of -10 in place of -inf would
    look right. The score of this one is above every real score by `_AHEAD`.
    """
    called = call.called
    query, key = called.query, called.key
    if query.shape[-1] != key.shape[-1]:  # the function projects them first
        return padding
    row = 0 if judged is None else int(judged.reshape(-1, query.shape[-2]).sum(0).argmax())
    target = of_the_first(query[..., row, :].double(), called.group)
    given = called.arguments.get("scale")
    scale = query.shape[-1] ** -0.5 if given is None else float(given)
    size = target.norm(dim=-1, keepdim=True)
    longest = key.double().norm(dim=-1).nan_to_num(posinf=0.0).amax(-1, keepdim=True)
    steepness = size * scale
    wanted = (_AHEAD + steepness.abs() * longest) / steepness
    # No longer than a half can hold, also where a query is nearly nothing.
    direction = target / size * wanted.clamp(-_LONGEST, _LONGEST)
    aimed = padding.clone()
    aimed[..., -1, :] = direction.nan_to_num(posinf=0.0, neginf=0.0).to(padding)
    return aimed


class _Alone:
    """Every sample of a sequence model alone, without padding and without a mask."""

    def __init__(self, subject: Subject, lengths: list[int], start: Callable[[], None]) -> None:
        self.subject, self.lengths, self.start = subject, lengths, start
        self.real = self.mask(subject.inputs.shape[1], "right")
        self._outputs: dict[bool, Tensor] = {}

    def mask(self, total: int, side: Side) -> Tensor:
        """Which tokens are real, (batch, total), with the padding on one side."""
        device = self.subject.inputs.device
        return padding_mask(self.lengths, total, side=side, device=device)[:, 0, 0]

    def output(self, *, positions: bool) -> Tensor:
        """The outputs of all real tokens, one sample after the other: (tokens, width).

        Args:
            positions: Whether the model is given the positions, or finds them itself.
        """
        if positions not in self._outputs:
            rows = [self._run(i, n, positions) for i, n in enumerate(self.lengths)]
            self._outputs[positions] = torch.cat(rows)
        return self._outputs[positions]

    def _run(self, sample: int, length: int, positions: bool) -> Tensor:
        one = SequenceCall(self.subject).samples(torch.tensor([sample])).called
        inputs = one.inputs[:, :length]
        places = torch.arange(length, device=inputs.device)[None] if positions else None
        self.start()
        return one.run(inputs, positions=places)[0]


@dataclass(frozen=True)
class _PaddedSequence:
    """A sequence model whose samples are one padded batch."""

    alone: _Alone
    side: Side
    total: int
    filling: _Filling

    @property
    def claim(self) -> str:
        """What broken rows do."""
        return f"rows of real tokens change with padding on the {self.side}"

    @property
    def judged(self) -> Tensor:
        """Which tokens are real, (batch, total)."""
        return self.alone.mask(self.total, self.side)

    @property
    def expected(self) -> Tensor:
        """The outputs of the samples alone at the places of their tokens, NaN elsewhere."""
        alone = self.alone.output(positions=self._takes_positions)
        output = alone.new_full((*self.judged.shape, alone.shape[-1]), math.nan)
        output[self.judged] = alone
        return output

    def run(self, told: Told = "truth") -> Tensor:
        """Run the padded batch with a mask."""
        real = self.judged
        mask = {"truth": real, "all real": torch.ones_like(real), "opposite": ~real}[told]
        try:
            return self._run(self._inputs(), mask)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            length = self.alone.subject.inputs.shape[1]
            if self.total <= length or answers(self._takes_as_many):
                raise
            told_of = (str(error).splitlines() or [""])[0]
            raise ValueError(
                f"the subject refuses {self.total} tokens ({length} were given, "
                f"amount={self.filling.amount} of padding were added): {type(error).__name__}: "
                f"{told_of}; pass a shorter sequence or a smaller amount="
            ) from error

    def _run(self, inputs: Tensor, mask: Tensor | None) -> Tensor:
        positions = (self.judged.cumsum(-1) - 1).clamp(min=0) if self._takes_positions else None
        self.alone.start()
        return self.alone.subject.run(inputs, real=mask, positions=positions)

    def _takes_as_many(self) -> bool:
        """Whether the module runs on as many tokens if it is told of no padding."""
        self._run(self._inputs(), None)
        return True

    def _inputs(self) -> Tensor:
        real, subject = self.judged, self.alone.subject
        *_, width = subject.inputs.shape
        shape = (*real.shape, width) if subject.inputs.ndim == 3 else real.shape
        inputs = self.filling.like(subject.inputs, shape)
        inputs[real] = subject.inputs[self.alone.real]
        return inputs

    def other(self) -> _PaddedSequence | None:
        """The same with padding that holds something else, if that is allowed."""
        content = self.filling.other()
        return None if content is None else replace(self, filling=content)

    def sees_only_padding(self, got: Tensor, allowed: float) -> bool:
        """Whether real tokens do not feel the first of them.

        A module that makes its positions from the mask is not right under the opposite mask
        either; but under a mask that it reads as its opposite real tokens are masked.
        """
        real = self.judged
        first = real & (real.cumsum(-1) == 1)
        if not bool((real & ~first).any()):
            return False
        inputs = self._inputs()
        inputs[first] = replace(self.filling, seed=self.filling.seed + 2).like(
            inputs, inputs.shape
        )[first]
        return not differ(self._run(inputs, real), got, allowed, real & ~first)

    @property
    def _takes_positions(self) -> bool:
        # On the right the positions follow from the inputs, and are those by default.
        return self.side == "left" and self.alone.subject.model.positions_argument is not None

    def place(self, index: tuple[int, ...]) -> str:
        """Name a token of the output."""
        sample, place = index
        count = self.alone.lengths[sample]
        token = place if self.side == "right" else place - (self.total - count)
        return f"{output_place(index)} (token {token} of the {count} of sample {sample})"

    def spreads_nan(self, got: Tensor) -> bool:
        """Whether there is NaN, and only where padding comes first."""
        return self.side == "left" and bool(got.isnan().any())

    @property
    def ignored(self) -> str:
        """Say that the output is the same without the mask."""
        argument = self.alone.subject.model.mask_argument
        if argument is None:
            return (
                f"real tokens feel the padding {self._where}: a causal mask that lets the future "
                "through, or a module that needs a mask: SequenceModel(module, mask=..., "
                "mask_argument=...)"
            )
        return f"{argument} changes nothing: it is ignored"

    @property
    def _where(self) -> str:
        return "after them" if self.side == "right" else "before them"

    def advice(self, felt: bool | None) -> str:
        """What to look at where only this side is wrong."""
        if felt:
            return "real tokens feel what the padding holds: it is not masked there"
        if self.side == "right":
            return (
                "real tokens do not feel what the padding holds, only that it is there: are "
                "positions, or a scale, taken from the length of the batch?"
            )
        argument = self.alone.subject.model.positions_argument
        if argument is None:
            return (
                "the module is not told the positions: if it has absolute positions, let it take "
                "them, with SequenceModel(..., positions_argument=...)"
            )
        return f"are the positions in {argument} used?"


def _check(
    padded: _Padded, sides: Sequence[_Padded], allowed: float, *, training: bool, repeat: str
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


def _cause(padded: _Padded, got: Tensor, sides: Sequence[_Padded], allowed: float) -> str | None:
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


def _felt(padded: _Padded, got: Tensor, allowed: float) -> bool | None:
    """Whether the output changes with what the padding holds; None where nothing else may be."""
    other = padded.other()
    if other is None:
        return None
    return answers(lambda: differ(other.run(), got, allowed, padded.judged))


def _holds(padded: _Padded, allowed: float) -> bool:
    return not differ(padded.run(), padded.expected, allowed, padded.judged)
