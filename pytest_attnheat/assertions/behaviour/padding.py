"""The assertion that padding, on the right or on the left, is not felt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ...attention.vocabulary import SIDES, Side
from ...callables import borrowed
from ...inputs import check_number, misuse, positive
from .inside import Inside
from .invariance import RANDOM_CAUSE
from .memory import memory_of
from .models import ModelSubject, Subject
from .reading import as_subject
from .subject import check_relative, check_rows, coarsest, differ, holds, output_place, settled
from .visibility import Padding, Told

_NAME = "assert_padding_invariant"


def assert_padding_invariant(
    subject: Callable[..., Any],
    *inputs: Tensor,
    lengths: Sequence[int] | Tensor | None = None,
    sides: Side | Sequence[Side] | None = None,
    amount: int = 3,
    padding_value: float | None = None,
    tolerance: float | None = None,
    seed: int = 0,
    training: bool = False,
    **arguments: Any,
) -> None:
    """Assert that padding, told to the subject by its mask, does not change the output.

    A sequence model runs every sample alone, without padding and without a mask, then all of them
    as one padded batch with it. The outputs of real tokens must agree. An attention function is
    given further keys and values that its `attn_mask` forbids; its output must not change. Of a
    model with a memory (`SequenceModel(memory_argument=)`) the memory is padded. Unless a value is
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
        sides: On which sides, `"right"`, `"left"` or both; by default both, or that of
            `SequenceModel(side=)`, and the right alone of a module that is told lengths. A causal
            module needs no mask for padding on the right: with `sides="right"` it may take none.
        amount: How many tokens, or keys, of padding are added to the longest sample.
        padding_value: What the padding holds, for a model that finds its padding by a token id.
            Such a model needs no mask.
        tolerance: By what part of its size a row of the output may change. By default it follows
            the dtype: 1e-11, 2e-5, 7.8e-3, 6.2e-2 in float64, float32, float16, bfloat16.
        seed: What the padding is drawn from.
        training: Accept a subject that answers at random, and start every call from the seed. It
            must draw the same numbers for every length: dropout does not.
        **arguments: Passed to the subject at every call. A function's mask is spelled out as an
            `attn_mask` with the padding. A model takes no argument that is as long as the sequence.

    Raises:
        Failure: Padding changes the output. The message says on which
            side, and whether the mask is ignored or means the opposite.
        TypeError: There are neither one nor three inputs, or one has the wrong type.
        ValueError: Shapes do not fit, the model is not known to take a mask, an argument is out
            of range, or the subject answers at random.

    Examples:
        >>> model = SequenceModel(my_encoder, mask="keep", mask_argument="mask")
        >>> assert_padding_invariant(model, torch.randn(2, 6, 16))
    """
    __tracebackhide__ = True
    given = _sides(SIDES if sides is None else sides)
    amount = positive("amount", amount)
    value = None if padding_value is None else check_number(padding_value, "padding_value")
    called = as_subject(
        subject, inputs, arguments, lengths if len(inputs) == 3 else None,
        seed=seed if training else None,
    )  # fmt: skip
    called = memory_of(called) or called
    if isinstance(called, ModelSubject):
        given = called.model.sides if sides is None else given
        called.check_padding(needs_mask=value is None and list(given) != ["right"])
    paddings = called.paddings(lengths, amount)
    with borrowed(subject, *inputs, seed=seed), torch.no_grad():
        base = settled(subject, called.run, training=training, seed=seed)
        allowed = check_relative(tolerance, coarsest(base))
        for real, total in paddings:
            alone: dict[bool, Tensor] = {}
            for content in Padding("right", total, real, value, seed).each():
                sided = [replace(content, side=side) for side in given]
                both = [_Trial(called, padding, allowed, alone) for padding in sided]
                for one in both:
                    one.check(both, training=training)


def _sides(sides: object) -> tuple[Side, ...]:
    given = (sides,) if isinstance(sides, str) else sides
    if not isinstance(given, (tuple, list)) or not given or set(given) - set(SIDES):
        raise ValueError(misuse("sides", repr(sides), "'right', 'left' or both"))
    return tuple(given)


@dataclass(frozen=True)
class _Trial:
    """A subject with padding on one side."""

    subject: Subject  # The subject without it
    padding: Padding  # The padding
    allowed: float  # By what part of its size a row may change
    alone: dict[bool, Tensor]  # Outputs without padding, by whether positions are told

    @property
    def expected(self) -> Tensor:
        """The output without the padding, in the shape of that with it."""
        model = self._model
        positions = model is not None and model.takes_positions(self.padding.side)
        if positions not in self.alone:
            lengths = self.padding.lengths
            self.alone[positions] = self.subject.alone(lengths, positions=positions)
        alone = self.alone[positions]
        return alone if model is None else model.beside(alone, self.padding)

    @property
    def _model(self) -> ModelSubject | None:
        """The subject, if padding adds rows to its output."""
        subject = self.subject
        return subject if isinstance(subject, ModelSubject) and subject.pads_rows else None

    @cached_property
    def padded(self) -> Subject:
        """The subject with it, told the truth."""
        return self.subject.pad(self.padding)

    def run(self, told: Told = "truth") -> Tensor:
        """Call the subject with the padding, and tell it of it."""
        padded = self.padded if told == "truth" else self.subject.pad(self.padding, told)
        try:
            return padded.run()
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            given, total = self.subject.length, self.padding.total
            if self.subject.has_queries or total <= given or holds(lambda: self._runs("nothing")):
                raise
            told_of = (str(error).splitlines() or [""])[0]
            raise ValueError(
                f"the subject refuses {total} tokens ({given} were given, "
                f"amount={total - given} of padding were added): {type(error).__name__}: "
                f"{told_of}; pass a shorter sequence or a smaller amount="
            ) from error

    def _runs(self, told: Told) -> bool:
        """Whether the subject runs at all if it is told this of its padding."""
        self.subject.pad(self.padding, told).run()
        return True

    def check(self, sides: Sequence[_Trial], *, training: bool) -> None:
        """Raise a Failure if padding changes the output."""
        __tracebackhide__ = True
        got = self.run()
        check_rows(
            _NAME, got, self.expected, claim=self.subject.name_padding(self.padding),
            allowed=self.allowed, judged=self.padded.judged(), place=self._place,
            cause=lambda _: RANDOM_CAUSE if training else self._cause(got, sides),
            repeat=f"seed={self.padding.seed}", again=self.run,
        )  # fmt: skip

    def _place(self, index: tuple[int, ...]) -> str:
        model = self._model
        return output_place(index) if model is None else model.name_row(index, self.padding)

    def _cause(self, got: Tensor, sides: Sequence[_Trial]) -> str | None:
        """Say what the attention inside does, or what else the output is like."""
        subject, side, felt = self.subject, self.padding.side, self._felt(got)
        inside, real = None, self.padded.judged()
        if isinstance(self.padded, ModelSubject) and real is not None:
            inside = Inside(self.padded)
            if said := inside.why_mask_fails(real):
                return said
        if holds(lambda: self._alike(self.run("opposite"), self.expected)):
            return (
                "the mask is read as its opposite: the output is right where True and False change"
            )
        has_nan = bool(got.isnan().any())
        if not subject.has_queries and side == "left" and has_nan:
            return (
                "nan spreads from the padding: under a causal mask padding on the left may see "
                "nothing, and 0 * nan is nan"
            )
        if inside is not None and real is not None and isinstance(self.padded, ModelSubject):
            said = self.padded.cause_of_mask()
            if felt and not has_nan:
                said = said or inside.why_seen(real.unsqueeze(-2), real)
            if said:
                return said
        # Of a causal model the mask rightly changes something on the left alone.
        left = replace(self, padding=replace(self.padding, side="left"))
        # Where the padding is not felt, as after the tokens of a causal module, no mask is needed.
        if (
            felt is not False
            and holds(lambda: self._alike(got, self.run("all real")))
            and not (
                side == "right" and holds(lambda: not left._alike(left.run(), left.run("all real")))
            )
        ):
            return self._ignored(got)
        only = any(holds(other.passes) for other in sides)
        cause = None
        if inside is not None and real is not None:
            cause = inside.why_padding_is_seen(real)
            if cause is None and side == "left" and not felt:
                cause = inside.why_places_are_felt(self._alone_inside())
        if cause is None and (only or felt is False or (felt and inside is not None)):
            cause = subject.cause_of_padding(side, felt=felt)
        return f"only on the {side}: {cause}" if only and cause else cause

    def _alone_inside(self) -> Inside:
        """What the first sample does without padding."""
        first = self.subject.samples(torch.tensor([0]))
        assert isinstance(first, ModelSubject)
        return Inside(first.cut(range(self.padding.lengths[0])))

    def _alike(self, one: Tensor, other: Tensor) -> bool:
        return not differ(one, other, self.allowed, self.padded.judged())

    def _felt(self, got: Tensor) -> bool | None:
        """Whether the output changes with what the padding holds; None if it may hold no other."""
        other = self.padding.other()
        if other is None:
            return None
        changed = replace(self, padding=other)
        return holds(lambda: not self._alike(changed.run(), got))

    def passes(self) -> bool:
        """Whether padding on this side changes nothing."""
        return self._alike(self.run(), self.expected)

    def _ignored(self, got: Tensor) -> str:
        argument = self.subject.mask_argument
        if argument is not None:
            if not holds(lambda: not differ(self.run("opposite"), got, self.allowed)):
                return (
                    f"{argument} changes no output of a real token here, but is not ignored: is it "
                    "applied to queries in place of keys, or that of another sample?"
                )
            return f"{argument} changes nothing: it is ignored"
        where = "after them" if self.padding.side == "right" else "before them"
        return (
            f"real tokens feel the padding {where}: a causal mask that lets the future "
            "through, or a module that needs a mask: SequenceModel(module, mask=..., "
            "mask_argument=...)"
        )
