"""One implementation, in one dtype, on one device, and the checks that it is examined by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from pytest_attnheat.assertions.behaviour.sequences import SequenceModel, name_of_cache, recognise
from pytest_attnheat.attention.reference import causal_mask, sliding_window_mask
from pytest_attnheat.attention.scoring import draw
from pytest_attnheat.callables import modules_in
from pytest_attnheat.contract.spec import AttentionSpec, Sound
from pytest_attnheat.failure import Failure

BATCH, HEADS, LENGTH, HEAD_DIM = 2, 4, 7, 8
VALUE_DIM = 6

# What a check examines: a function, a block with projections of its own, or what was captured.
Kind: TypeAlias = Literal["function", "block", "captured"]


class Skipped(Exception):  # noqa: N818 (no error: a check that does not apply)
    """A check does not apply, as the specification says or as it turns out; with the reason."""


def is_refusal(error: BaseException) -> bool:
    """Whether a subject says that it does not do what it is asked, as fused kernels say it."""
    if isinstance(error, AssertionError) and error.__cause__ is not None:
        return is_refusal(error.__cause__)
    no_kernel = isinstance(error, RuntimeError) and "No available kernel" in str(error)
    return isinstance(error, NotImplementedError) or no_kernel


def is_about_dtypes(error: BaseException) -> bool:
    """Whether PyTorch refused to mix dtypes, or a number that a dtype cannot hold: a defect."""
    words = ("expected scalar type", "same dtype", "without overflow", "dtypes")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


@dataclass(frozen=True)
class Inputs:
    """Query, key and value, and what each query may see.

    Attributes:
        query: (batch, heads, query_len, head_dim)
        key: (batch, key_heads, key_len, head_dim)
        value: (batch, key_heads, key_len, value_dim)
        mask: Boolean, True where a query may attend: what the subject is given; None for none.
        causal: Whether the subject is asked to be causal.
        may_see: Boolean (batch, heads, query_len, key_len): mask, causality and window together.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    causal: bool
    may_see: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value."""
        return self.query, self.key, self.value

    @property
    def grouped(self) -> bool:
        """Whether there are fewer heads of keys than of queries."""
        return self.query.shape[1] != self.key.shape[1]


@dataclass(frozen=True)
class Examination:
    """What a check is given.

    Attributes:
        spec: What the implementation claims.
        dtype: The dtype of all inputs.
        device: Where they are.
        seed: Where they are drawn from.
        quick: Whether to examine little.
    """

    spec: AttentionSpec
    dtype: torch.dtype
    device: torch.device
    seed: int = 0
    quick: bool = False

    def inputs(
        self,
        *,
        query_len: int = LENGTH,
        key_len: int | None = None,
        key_heads: int | None = None,
        mask: Callable[[int, int], Tensor] | None = None,
        causal: bool = False,
        size: float = 1.0,
        value_dim: int | None = None,
    ) -> Inputs:
        """Draw inputs, the same for every device and dtype.

        Args:
            query_len: Number of queries.
            key_len: Number of keys; `query_len` by default.
            key_heads: Number of key and value heads; as many as query heads by default.
            mask: Makes a mask (batch or 1, 1, query_len, key_len) of the lengths.
            causal: Ask the subject to be causal.
            size: What queries are multiplied by.
            value_dim: Width of the values; by default another than that of the keys, if the
                subject takes that.

        Raises:
            Skipped: The specification does not claim to take these inputs.
        """
        masked, grouped = mask is not None, key_heads is not None
        asked = ((takes_causal, causal), (takes_mask, masked), (takes_groups, grouped))
        for need, is_asked in asked:
            if is_asked and (reason := need(self.spec)):
                raise Skipped(reason)
        heads = HEADS if self.spec.has_heads else 1
        key_len = query_len if key_len is None else key_len
        key_heads = heads if key_heads is None else key_heads
        query = self._draw("query", heads, query_len, HEAD_DIM) * size
        key = self._draw("key", key_heads, key_len, HEAD_DIM)
        width = self.value_dim if value_dim is None else value_dim
        value = self._draw("value", key_heads, key_len, width)
        given = None if mask is None else mask(query_len, key_len).to(self.device)
        seen = torch.ones(query_len, key_len, dtype=torch.bool, device=self.device)
        alignment = self.spec.alignment
        if causal:
            seen = seen & causal_mask(query_len, key_len, alignment=alignment, device=self.device)
        if self.spec.sides is not None:
            seen = seen & sliding_window_mask(
                query_len, key_len, window=self.spec.sides, alignment=alignment,
                device=self.device,
            )  # fmt: skip
        may_see = seen if given is None else given & seen
        shape = (BATCH, heads, query_len, key_len)
        return Inputs(query, key, value, given, causal, may_see.expand(shape))

    @cached_property
    def value_dim(self) -> int:
        """The width of values: that of keys for a subject, as a fused kernel, that asks for it."""
        for width in (VALUE_DIM, HEAD_DIM):
            try:
                self.spec.call(*self.inputs(value_dim=width).tensors)
            except Exception:  # if it refuses both, a check tells why
                continue
            return width
        return VALUE_DIM

    def block(self) -> tuple[SequenceModel, Tensor]:
        """Return the block and its input on the device of this examination."""
        if self.spec.inputs is None:
            raise Skipped("it is not a block")
        return model_of(self.spec), self.spec.inputs.to(self.device)

    def _draw(self, name: str, heads: int, length: int, width: int) -> Tensor:
        drawn = draw(name, self.seed, BATCH, heads, length, width)
        return drawn.to(self.device, self.dtype)

    def answer(self) -> Tensor:
        """Ask the subject once, as plainly as it can be asked."""
        if self.spec.is_block:
            model, inputs = self.block()
            return model(inputs)
        return self.spec.call(*self.inputs().tensors).output

    def in_training(self) -> str | None:
        """Advise on a subject in training mode; None where it is, or holds, no such module."""
        training = [module for module in modules_in(self.spec.subject) if module.training]
        if not training:
            return None
        return (
            f"{type(training[0]).__name__} is in training mode, in which no output is promised to "
            "repeat itself: call .eval() on it before it is examined"
        )

    def refuse_training(self) -> None:
        """Advise as an examination can: the assertions speak of their own arguments."""
        if advice := self.in_training():
            raise Failure("", advice)

    def function(self, inputs: Inputs, scale: float | None = None) -> Callable[..., Tensor]:
        """Return the subject as `function(query, key, value)` that is told what it may see.

        Further keywords are accepted and left aside: they tell an assertion what may be seen.
        """

        def subject(query: Tensor, key: Tensor, value: Tensor, **aside: Any) -> Tensor:
            mask, causal = inputs.mask, inputs.causal
            return self.spec.call(query, key, value, mask=mask, causal=causal, scale=scale).output

        subject.__name__ = self.spec.name
        return subject

    def seen(self, inputs: Inputs) -> dict[str, Any]:
        """The arguments that tell an assertion what may be seen; none where it is all."""
        arguments: dict[str, Any] = {}
        if not bool(inputs.may_see.all()):
            arguments["attn_mask"] = inputs.may_see
        if inputs.grouped:
            arguments["enable_gqa"] = True
        return arguments


def scattered(query_len: int, key_len: int) -> Tensor:
    """A mask per batch entry, in which each query may attend to some key."""
    mask = draw("mask", 0, BATCH, 1, query_len, key_len) > 0
    mask[..., 0] = True
    return mask


def with_a_fully_masked_row(query_len: int, key_len: int) -> Tensor:
    """A mask under which the third query may attend to nothing."""
    mask = scattered(query_len, key_len)
    mask[:, :, 2] = False
    return mask


# --- what a check needs to be declared: the reason why it is skipped, or None

Need: TypeAlias = Callable[[AttentionSpec], "str | None"]


def all_of(*needs: Need) -> Need:
    """Return the need for all of some: the reason is the first."""
    return lambda spec: next((reason for need in needs if (reason := need(spec))), None)


def _need(holds: Callable[[AttentionSpec], Any], reason: str, field: Sound | None = None) -> Need:
    """Return the need for what holds; the reason names a parameter that sounds like the field."""

    def need(spec: AttentionSpec) -> str | None:
        if holds(spec):
            return None
        return (undeclared(spec, field) if field else "") or reason

    return need


takes_mask = _need(lambda spec: spec.mask is not None, "it does not take a mask", "mask")
takes_causal = _need(lambda spec: spec.takes_causal, "it does not take is_causal", "causal")
takes_groups = _need(
    lambda spec: spec.grouped and spec.has_heads, "it is not declared to take grouped heads"
)
takes_scale = _need(lambda spec: spec.names("scale"), "its signature has no scale")
takes_dropout = _need(lambda spec: spec.dropout, "it is not declared to take dropout_p")
declares_fully_masked = _need(
    lambda spec: spec.fully_masked != "undefined", 'fully_masked="undefined" declares nothing'
)
returns_weights = _need(
    lambda spec: spec.returns != "output", "it is declared to return no weights"
)
has_no_window = _need(lambda spec: spec.window is None, "padding on the left would move the window")
# By its alignment, or by a mask.
decodes_in_chunks = _need(
    lambda spec: spec.causal == "bottom_right" or (spec.mask is not None and spec.window is None),
    "a chunk cannot be told what it may see",
)


def is_causal_block(spec: AttentionSpec) -> str | None:
    """Need a block that is causal, and whose cache can be used if it has one."""
    if spec.causal is None:
        return "it is not declared to be causal"
    model = model_of(spec)
    if model.decode is None and name_of_cache(model.module) is not None:
        return "it has a cache, but SequenceModel(..., decode=) does not say how"
    return None


def takes_padding_mask(spec: AttentionSpec) -> str | None:
    """Need a block that takes a mask."""
    if model_of(spec).mask is not None:
        return None
    names = spec.sounding_like("mask")
    if not names:
        return "nothing says that it takes a mask: SequenceModel(module, mask=, mask_argument=)"
    return (
        f"it takes {names[0]}=, and nothing says what that means: SequenceModel(module, mask=..., "
        f"mask_argument={names[0]!r})"
    )


def model_of(spec: AttentionSpec) -> SequenceModel:
    """Return the block of a specification, and how it is called."""
    subject = spec.implementation
    return subject if isinstance(subject, SequenceModel) else recognise(subject)


_MEANINGS = {"mask": "'keep', 'drop' or 'additive'", "causal": "'top_left' or 'bottom_right'"}


def undeclared(spec: AttentionSpec, field: Sound) -> str:
    """Say what a specification leaves unsaid: a parameter that looks like a mask or causality."""
    is_declared = spec.takes_causal if field == "causal" else spec.mask is not None
    if is_declared or spec.is_block or spec.is_captured:
        return ""
    names = spec.sounding_like(field)
    if not names or names == [getattr(spec, f"{field}_argument")]:
        return ""  # or it is declared to be None
    return (
        f"it takes {names[0]}=, and the specification does not say what that means: "
        f"AttentionSpec(..., {field}_argument={names[0]!r}, {field}=...), {_MEANINGS[field]}"
    )


# --- the registry


@dataclass(frozen=True)
class Check:
    """One check of the examination.

    Attributes:
        name: What it is called in reports and test ids.
        sentence: What is true of an implementation that passes.
        run: Makes it; raises AssertionError where the sentence is not true, `Skipped` where it
            turns out not to apply. It may return a hint.
        quick: Whether the quick form of the examination has it.
        issue: A public issue about a defect that it would have caught.
        needs: What it needs to be declared: returns the reason why it is skipped, or None.
    """

    name: str
    sentence: str
    run: Callable[[Examination], str | None]
    quick: bool = False
    issue: str | None = None
    needs: Need | None = None

    def examine(self, examination: Examination) -> str | None:
        """Run it where what it needs is declared; return a hint, if there is one.

        Raises:
            Skipped: It is not, or the check turns out not to apply.
            Exception: Whatever the check, or the code under test, raises.
        """
        if self.needs is not None and (reason := self.needs(examination.spec)):
            raise Skipped(reason)
        return self.run(examination)


_REGISTERED: dict[Kind, list[Check]] = {kind: [] for kind in get_args(Kind)}
Run: TypeAlias = Callable[[Examination], str | None]


def check(
    name: str,
    sentence: str,
    *kinds: Kind,
    needs: Need | None = None,
    quick: bool = False,
    issue: str | None = None,
) -> Callable[[Run], Run]:
    """Register a function as a check, of functions if no kinds of subjects are given."""

    def register(run: Run) -> Run:
        for kind in kinds or ("function",):
            _REGISTERED[kind].append(Check(name, sentence, run, quick, issue, needs))
        return run

    return register


def registered(kind: Kind) -> tuple[Check, ...]:
    """Return the checks of one kind of subject that are known by now, in order."""
    return tuple(_REGISTERED[kind])
