"""One implementation, in one dtype, on one device, and the checks that it is examined by."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from ..assertions.behaviour.sequences import SequenceModel
from ..assertions.precision_calls import Criteria, Run
from ..assertions.precision_judging import judge_call
from ..attention.call import Call
from ..attention.computation import plain, reference
from ..attention.levels import NONE, NUMBERS, OPTIONS, Choice, Declared, Space, said_of, text_of
from ..attention.shards import Shards
from ..callables import borrowed, exits_as_errors, is_past_compiling, modules_in
from ..failure import Failure
from ..inputs import dtype_name
from .asking import UndeclaredError, keyword_of, model_of
from .needs import Need, takes_causal, takes_mask
from .spec import AttentionSpec

# What a check examines: a function, a block with projections of its own, or what was captured.
Kind: TypeAlias = Literal["function", "block", "captured"]


class Skipped(Exception):  # noqa: N818 (no error: a check that does not apply)
    """A check does not apply, as the specification says or as it turns out; with the reason."""


# With a scale below, float16 holds the scores of products that it does not hold.
_SMALL = 0.4
# What is asked of code that computes in float16 all the way, whose smallest numbers are coarse.
_IN_FLOAT16 = tuple(name for name in NUMBERS if name not in ("tiny", "overflowing"))
# The share of numbers that may be rounded the other way by what rounds once.
_ROUNDED_AGAIN = 0.05
# Of what rounds at each step, so many times more are.
_TOLD = 2.0
# What a kernel speaks of that is called with a dtype or on a device that it is not made for.
_OF_KERNELS = ("fp16", "bf16", "float16", "dtype", "data type", "datatype", "scalar type", "cuda",
               "device", "gpu", "cpu")  # fmt: skip
# How a kernel says that it does not do what it is asked, in an error of no kind of its own.
_REFUSALS = ("No available kernel", "No viable backend", "not implemented for", "not supported")


def is_refusal(error: BaseException) -> bool:
    """Whether a subject says that it does not do what it is asked, as fused kernels say it."""
    # Or its specification does: of a mask that its one shape cannot say.
    if isinstance(error, AssertionError | ValueError) and error.__cause__ is not None:
        return is_refusal(error.__cause__)
    if isinstance(error, UndeclaredError):
        return True
    said = isinstance(error, RuntimeError) and any(words in str(error) for words in _REFUSALS)
    said |= isinstance(error, ValueError) and "cannot be run on" in str(error)
    return isinstance(error, NotImplementedError) or said or is_past_compiling(error)


def is_about_dtypes(error: BaseException) -> bool:
    """Whether PyTorch refused to mix dtypes, or a number that a dtype cannot hold: a defect."""
    words = ("expected scalar type", "same dtype", "without overflow", "dtypes")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


@dataclass(frozen=True)
class Examination:
    """What a check is given."""

    spec: AttentionSpec  # What the implementation claims
    dtype: torch.dtype  # The dtype of all inputs
    device: torch.device  # Where they are
    seed: int = 0  # Where they are drawn from
    quick: bool = False  # Whether to examine little
    tell: Callable[[Examination, str], None] | None = None  # Called with each call that is drawn

    @cached_property
    def space(self) -> Space:
        """The calls that can be made of what is declared and of what the subject takes."""
        declared = declared_of(self.spec, *self._widths)
        if declared.causal and not declared.square and self.spec.square is None:
            declared = replace(declared, square_if_causal=self._is_square_if_causal(declared))
        if self.dtype == torch.float16 and not self._is_wide(declared):
            declared = replace(declared, numbers=_IN_FLOAT16)
        return self._space_of(declared)

    def _space_of(self, declared: Declared) -> Space:
        """The calls of what is declared; slopes depend on the number of heads of each call."""
        always = self.spec.always(1)
        return Space(declared, {n: one for n, one in always.items() if n != "alibi"}, self.seed)

    def _is_square_if_causal(self, declared: Declared) -> bool:
        """Whether it refuses causality but where there are as many keys as queries."""
        space = self._space_of(declared)
        for sizes in ((5, 7), (7, 7)):
            try:
                self.spec.ask(self._drawn(space, space.choice(sizes=sizes, causal=True)))
            except Exception:  # a check tells why it refuses all
                continue
            return sizes == (7, 7)
        return False

    def _is_wide(self, declared: Declared) -> bool:
        """Whether it rounds to float16 at the end alone, so that its products may not overflow."""
        # What computes in float16 all the way is judged by what float16 can do. Where the scores
        # are exact in it, the output of the other is the exact one, rounded once. So may be that of
        # a query with one key, whatever computes it: where a plain computation in float16 gives
        # nearly the same, it is not told.
        space = self._space_of(declared)
        try:
            call = self._drawn(space, space.choice(numbers="structured", sizes=(31, 31)))
            # The same weights in all rows, and the mean of a few values in even steps, may be
            # exact in float16 as well.
            steps = 1 - torch.arange(call.query_len, device=self.device).to(call.query) / 32
            call = replace(call, query=call.query * steps[:, None], value=call.value.sin())
            output = self.spec.ask(call).output
        except Exception:  # the checks tell why
            return False
        exact = reference(call).exact["output"]

        def changed(found: Tensor) -> float:
            return float((found.to(output) != exact.to(output)).double().mean())

        told = changed(plain(call)["output"]) > _TOLD * _ROUNDED_AGAIN
        return told and changed(output) < _ROUNDED_AGAIN

    @cached_property
    def unserved(self) -> str:
        """Why a public callable is not asked in this dtype on this device; empty if it is."""
        # Kernels are made for some of them, and say so when they are called with another.
        if self.spec.convention is None:
            return ""
        try:
            self.spec.ask(self.case())
        except Exception as error:
            said = str(error)
            about = any(word in said.lower() for word in _OF_KERNELS)
            return f"it is not for {dtype_name(self.dtype)} on {self.device}: {said}" * about
        return ""

    @cached_property
    def _widths(self) -> tuple[bool, bool]:
        """Whether it takes as many keys as queries alone, and values as wide as keys alone."""
        known = self.spec.square
        ways = [(square, equal) for square in (False, True) for equal in (False, True)]
        for square, equal in ways:
            if known is not None and square != known:
                continue
            space = Space(declared_of(self.spec, square, equal), {}, self.seed)
            try:
                self.spec.ask(self._drawn(space, space.choice()))
            except Exception:  # if it refuses all, a check tells why
                continue
            return square, equal
        return bool(known), False

    def _drawn(self, space: Space, chosen: Choice) -> Call:
        if self.tell is not None:
            self.tell(self, self._text(space, chosen))
        return self.spec.described(space.call(chosen, self.dtype, self.device))

    def drawn(self, chosen: Choice) -> Call:
        """Draw the call of a choice, the same for every device and dtype but for rounding."""
        return self._drawn(self.space, chosen)

    def case(self, **levels: Any) -> Call:
        """Draw a call with some levels, ordinary for the rest."""
        # Skipped: the specification does not claim to take such a call.
        return self.drawn(self.choice(**levels))

    def choice(self, **levels: Any) -> Choice:
        """Return the choice of some levels; raises as `case` does."""
        asked = ((takes_causal, levels.get("causal")), (takes_mask, levels.get("mask")))
        for need, is_asked in asked:
            if is_asked and (reason := need(self.spec)):
                raise Skipped(reason)
        known, longest = self.space.declared.levels(), self.space.declared.longest
        if "sizes" in levels:
            levels["sizes"] = self.space.declared.whole(levels["sizes"])
        sizes = levels.get("sizes", (1, 1))
        if longest is not None and max(sizes) > longest:
            if sizes[0] != sizes[1]:
                raise Skipped(f"it is declared for at most {longest} queries and keys")
            levels["sizes"] = (longest, longest)
        narrow = {"ragged", *(name for name, _ in self.space.declared.only if name != "sizes")}
        for name, level in levels.items():
            of_few = name in known and (len(known[name]) == 1 or name in narrow)
            if name not in known or (of_few and level not in known[name]):
                raise Skipped(f"what is declared leaves out {said_of({name: level})}")
        try:
            return self.space.choice(**levels)
        except ValueError:
            raise Skipped(self._left_out(levels)) from None

    def _left_out(self, levels: Choice) -> str:
        """Say of some levels that no call of what is declared has them."""
        declared, sizes = self.space.declared, levels.get("sizes", (1, 1))
        square = declared.square or (declared.square_if_causal and levels.get("causal"))
        if square and sizes[0] != sizes[1]:
            whose = "it is declared to take" if self.spec.square else "it takes"
            causal = "" if declared.square else ", where it is causal"
            return f"{whose} as many keys as queries alone{causal}: not {said_of({'sizes': sizes})}"
        return f"what is declared leaves out calls with {said_of(levels)}"

    def judge(self, chosen: Choice, *, explain: bool = True) -> None:
        """Judge the output and the gradients of a choice."""
        # To look for what was computed instead (`explain`) takes time.
        try:
            self._judge(chosen, explain)
        except Exception as error:
            if hasattr(error, "isolated"):  # of a process of its own: it says how to repeat it
                raise
            vars(error)["replay"] = self.text(chosen)
            if isinstance(error, Failure):
                error.repeat = self.repeat(chosen)
                if self.spec.convention:
                    self.spec.convention.tell(error, self.drawn(chosen))
            else:
                said = getattr(error, "__notes__", ())
                vars(error)["__notes__"] = [*said, self.repeat(chosen)]  # `add_note`: from 3.11
            raise

    def _judge(self, chosen: Choice, explain: bool) -> None:
        blind = self.spec.fully_masked if self.space.declared.empty else "undefined"
        call, wanted = replace(self.drawn(chosen), fully_masked=blind), chosen["gradients"]
        names = ["query", "key", "value"] if wanted == "all" else [] if wanted == NONE else [wanted]
        if wanted == "all":
            names += ["attn_mask"] if call.bias is not None else []
            names += ["sinks"] if chosen.get("sinks") else []
        run, allowed = self._run(self.spec, wanted == NONE), self.spec.tolerance_in(self.dtype)
        criteria = Criteria(reference=self._reference(), seed=self.seed, tolerance=allowed)
        judge_call("", run, call, criteria, names=names, code=self.spec.subject, explain=explain)

    def text(self, chosen: Choice) -> str:
        """Return a choice as a text that `Replay` takes, whatever else is examined."""
        return self._text(self.space, chosen)

    def _text(self, space: Space, chosen: Choice) -> str:
        named = {**space.named(chosen), "dtype": dtype_name(self.dtype), "seed": self.seed}
        return text_of(named)

    def repeat(self, chosen: Choice) -> str:
        """Return what asks a choice again, under pytest and in plain Python."""
        text, shards = self.text(chosen), self.spec.sharding
        if isinstance(shards, Shards):
            return f'check_attention(..., ranks={shards.ranks}, replay="{text}")'
        return f'--attn-replay="{text}"\ncheck_attention(..., replay="{text}")'

    def _run(self, spec: AttentionSpec, without_gradients: bool = False) -> Run:
        def run(call: Call) -> Tensor:
            with torch.no_grad() if without_gradients else nullcontext():
                return spec.ask(call).output

        return run

    def _reference(self) -> Run | None:
        expected = self.spec.expected()
        return None if expected is None else self._run(expected)

    def block(self) -> tuple[SequenceModel, Tensor]:
        """Return the block and its input on the device of this examination."""
        if self.spec.inputs is None:
            raise Skipped("it is not a block")
        if self.refusal:
            raise Skipped("it cannot be called as it is declared")
        return self._as_declared

    @property
    def _as_declared(self) -> tuple[SequenceModel, Tensor]:
        assert self.spec.inputs is not None
        model = model_of(self.spec)
        arguments = {
            name: value.to(self.device) if isinstance(value, Tensor) else value
            for name, value in model.arguments.items()
        }
        return replace(model, arguments=arguments), self.spec.inputs.to(self.device)

    @cached_property
    def refusal(self) -> Exception | None:
        """What a block raises when it is called as it is declared; None if it answers."""
        model, inputs = self._as_declared
        try:
            with exits_as_errors(), borrowed(model.module, inputs, seed=self.seed), torch.no_grad():
                model(inputs)
        except Exception as error:  # whatever code under test raises
            return error
        return None

    @property
    def binds(self) -> bool:
        """Whether a block takes the arguments that are declared, as far as its signature tells."""
        model, inputs = self._as_declared
        try:
            called = getattr(model.module, "forward", model.module)
            inspect.signature(called).bind(inputs, **model.arguments)
        except (TypeError, ValueError) as error:
            return isinstance(error, ValueError)  # a callable made in C
        return True

    def answer(self) -> Tensor:
        """Ask the subject once, as plainly as it can be asked."""
        if self.spec.is_block:
            model, inputs = self.block()
            return model(inputs)
        return self.spec.ask(self.case()).output

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

    def function(self, call: Call) -> Callable[..., Tensor]:
        """Return the subject as `function(query, key, value)` that is asked all else of a call."""
        # Further keywords are accepted and left aside: they tell an assertion what may be seen.

        def subject(query: Tensor, key: Tensor, value: Tensor, **aside: Any) -> Tensor:
            return self.spec.ask(replace(call, query=query, key=key, value=value)).output

        subject.__name__ = self.spec.name
        return subject


def _numbers(spec: AttentionSpec) -> tuple[str, ...]:
    if spec.rounded is not None:  # narrow dtypes hold neither large nor tiny numbers
        return ("ordinary", "structured")
    return NUMBERS if spec.scale is None or abs(spec.scale) < _SMALL else NUMBERS[:-1]


def declared_of(spec: AttentionSpec, square: bool, equal_widths: bool) -> Declared:
    """Return what of a specification decides which calls can be made."""
    masks = {None: (), "additive": ("additive", "boolean"), "any": ("additive", "boolean")}
    far = [rule for rule in (spec.window, spec.chunk, spec.may_see) if not isinstance(rule, str)]
    options = {name for name in OPTIONS if keyword_of(spec, name) is not None}
    seen, own, shards = spec.may_see, spec.convention, spec.sharding
    limited = {} if own is None else own.limited(spec.parameters or {})
    if isinstance(shards, Shards):
        limited |= shards.limits(limited.get("only", ()), uneven=spec.uneven)
    return Declared(
        masks=frozenset(masks.get(spec.mask, ("boolean",))),
        mask_shape=spec.mask_shape,
        causal=spec.takes_causal,
        options=frozenset(options),
        grouped=bool(spec.grouped) and spec.has_heads,
        heads=spec.heads if spec.has_heads else 1,
        square=square,
        equal_widths=equal_widths,
        from_the_end=spec.alignment == "bottom_right",
        near=any(rule is not None for rule in far),
        numbers=_numbers(spec),
        before_all=spec.says("fully_masked") and spec.fully_masked != "undefined",
        # Who takes no mask may not know of such queries: then it has to be typed.
        empty=spec.fully_masked != "undefined"
        and (spec.mask is not None or spec.says("fully_masked")),
        # Of a step that is rounded on purpose, everybody has a gradient of his own.
        gradients=spec.gradients and spec.rounded is None,
        longest=min(seen.shape) if isinstance(seen, Tensor) else None,
        few_shapes=spec.few_shapes,
        **limited,
    )


# --- the registry


@dataclass(frozen=True)
class Check:
    """One check of the examination.

    Attributes:
        name: What it is called in reports and test ids.
        sentence: What is true of an implementation that passes.
        run: Makes it; raises AssertionError where the sentence is not true, `Skipped` where it
            turns out not to apply.
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
        """Run it where what it needs is declared; return what is worth a word, if it passes.

        Raises:
            Skipped: It is not, or the check turns out not to apply.
            Exception: Whatever the check, or the code under test, raises.
        """
        if self.needs is not None and (reason := self.needs(examination.spec)):
            raise Skipped(reason)
        with exits_as_errors():  # of a backward pass, say
            return self.run(examination)


_REGISTERED: dict[Kind, list[Check]] = {kind: [] for kind in get_args(Kind)}
Ask: TypeAlias = Callable[[Examination], str | None]


def check(
    name: str,
    sentence: str,
    *kinds: Kind,
    needs: Need | None = None,
    quick: bool = False,
    issue: str | None = None,
) -> Callable[[Ask], Ask]:
    """Register a function as a check, of functions if no kinds of subjects are given."""

    def register(run: Ask) -> Ask:
        for kind in kinds or ("function",):
            _REGISTERED[kind].append(Check(name, sentence, run, quick, issue, needs))
        return run

    return register


def registered(kind: Kind) -> tuple[Check, ...]:
    """Return the checks of one kind of subject that are known by now, in order."""
    return tuple(_REGISTERED[kind])
