"""What to say of numbers that are not as near to their reference as their dtype allows."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..attention import computation
from ..attention.backward import likely_backward_mistake, names_of
from ..attention.call import Call
from ..attention.chunks import index_of
from ..attention.outcomes import likely_mistake
from ..failure import Failure, Place, number_text
from ..heatmaps.terminal import map_name
from ..inputs import dtype_name
from .precision_elements import Judgement

# What the claim about a gradient ends with, or its cause begins with.
RIGHT = "the output is right"
# Where scores that are rounded to the dtype may be off by half of this, weights that are wrong may
# be those of many mistakes.
_BLIND = 8.0
# A constant factor needs some elements that bear witness to it.
_WITNESSES = 8


@dataclass(frozen=True)
class Context:
    """What a cause may look at besides the tensor."""

    call: Call  # What was asked, with the gradient of the output if gradients are judged
    found: Mapping[str, Tensor | None]  # What the subject gave, by name; None for no gradient
    unit: float  # The unit roundoff that the scale was computed with
    fully_masked: Tensor  # (..., query_len), True where a query may attend to no key
    top_score: float | None  # The largest permitted score; None if unknown
    factor: float  # As given by the caller
    tolerance: float  # What is allowed anyway, as a part of the largest number of a map
    repeat: str  # What it takes to see the same again
    broken: Collection[str]  # The names of those that are off, the output's in any case
    explain: bool  # Whether to look for what was computed instead, which takes time

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the inputs."""
        return self.call.query.dtype

    @property
    def right(self) -> bool:
        """Whether the output is right."""
        return "output" not in self.broken


def check(assertion: str, judgements: Sequence[Judgement], context: Context) -> None:
    """Raise a failure about the first tensor that breaks the rule."""
    __tracebackhide__ = True
    if broken := [judgement for judgement in judgements if judgement.name in context.broken]:
        raise _failure(assertion, broken, context)


def _failure(assertion: str, broken: list[Judgement], context: Context) -> Failure:
    one = broken[0]
    cause = _cause(one, context)
    worst, first = _worst(one), index_of(one.broken.flatten().int().argmax(), one.broken.shape)
    alone = one.missing or first == worst
    return Failure(
        assertion, _claim(one, broken, context.right and not str(cause).startswith(RIGHT)),
        broken=None if one.missing else int(one.broken.sum()),
        of=None if one.missing else int(one.judged.sum()),
        worst=_place(one, worst, _compared(one, worst, context)),
        first=None if alone else _place(one, first, _value_at(one, first, context)), cause=cause,
        tensor=one.checked, tolerance=float(one.allowed[worst]), repeat=context.repeat,
    )  # fmt: skip


def _place(one: Judgement, at: tuple[int, ...], text: str) -> Place:
    tensor = one.name if one.name == "output" else f"{one.name}.grad"
    return Place(text, _own_index(one, at), float(one.found[at]), tensor)


def _claim(one: Judgement, broken: list[Judgement], right: bool) -> str:
    """What is broken, and what else is and is not."""
    if one.missing:
        missing = names_of([other.name for other in broken if other.missing])
        claim = f"no gradient reaches {missing}, where attention in float64 has one"
        rest = [other for other in broken if not other.missing]
    else:
        claim = f"elements of {_titles([one])} are not those of attention in float64"
        rest = broken[1:]
    if rest:
        claim += f", nor {'is' if len(rest) == 1 else 'are'} {_titles(rest)}"
    return claim + f"; {RIGHT}" * right


def _titles(several: list[Judgement]) -> str:
    if several[0].name == "output":
        return "the output"
    return f"the gradient{'s' * (len(several) > 1)} of {names_of([one.name for one in several])}"


def _worst(one: Judgement) -> tuple[int, ...]:
    """The place that is off most, as a multiple of what is allowed; NaN before anything."""
    excess = (one.error / one.allowed).nan_to_num(nan=0.0, posinf=math.inf)
    return index_of(excess.argmax(), excess.shape)


def _value_at(one: Judgement, place: tuple[int, ...], context: Context) -> str:
    """The value of the subject at a place, and what it should be."""
    masked = one.name == "output" and bool(context.fully_masked[place[:-1]])
    wanted = "declared is" if masked and context.call.fully_masked != "uniform" else "the reference"
    found, exact, error = (float(of[place]) for of in (one.found, one.exact, one.error))
    found_text, exact_text = number_text(found, beside=error), number_text(exact, beside=error)
    return f"{_index(one, place)} is {found_text}, {wanted} {exact_text}"


def _compared(one: Judgement, place: tuple[int, ...], context: Context) -> str:
    """The same with both errors: that of the subject and that of a plain computation."""
    error, allowed = float(one.error[place]), float(one.allowed[place])
    limit = f"allowed {allowed:.1e}" if allowed else "allowed 0"
    off = f"off by {error:.1e}; {limit}" if math.isfinite(error) else limit
    line = f"{_value_at(one, place, context)} ({off})"
    if not bool(one.exact[place].isfinite()) or not allowed:
        return line
    plain = float((one.plain[place] - one.exact[place]).abs())
    text = f"a plain {dtype_name(context.dtype)} computation is"
    if not math.isfinite(plain):
        text += " NaN or infinite there too, which excuses nothing"
    elif plain == 0:
        text += " exact there"
    else:
        text += f" off by {plain:.1e} there"
        if math.isfinite(error):
            text += f", the subject {error / plain:.2g} times as much"
    rule = f"factor={context.factor:g} on what rounding may come to"
    if context.tolerance:
        rule += f", or tolerance={context.tolerance:g} of the largest number of a head"
    return f"{line}\n{text} ({rule})"


def _own_index(one: Judgement, place: tuple[int, ...]) -> tuple[int, ...]:
    """A place in the tensor as the subject has it, which may have fewer than two dimensions."""
    return one.given(place)[len(place) - len(one.shape) :]


def _index(one: Judgement, place: tuple[int, ...]) -> str:
    name = one.name if one.name == "output" else f"{one.name}.grad"
    own = _own_index(one, place)
    return f"{name}[{', '.join(map(str, own))}]" if own else name


# --- likely causes: each returns a sentence, or None where the numbers do not show it


def _cause(one: Judgement, context: Context) -> str | None:
    found = (cause(one, context) for cause in _CAUSES)
    return next((sentence for sentence in found if sentence is not None), None)


def _no_gradient(one: Judgement, context: Context) -> str | None:
    """Autograd gave None."""
    if not one.missing:
        return None
    return "detached on the way, computed under no_grad, or a backward that leaves it out?"


def _fully_masked_rows(one: Judgement, context: Context) -> str | None:
    """Only rows without any permitted key are broken, or only the maps that hold such rows."""
    if one.name not in ("output", "query"):
        return None
    where = one.broken.any(-1)
    if bool((where & ~context.fully_masked).any()):
        return None
    here = one.found[where]
    text = "only rows without any permitted key are broken: each "
    if one.name == "query":
        nan = bool(here.isnan().all())
        return text + ("is NaN, through the softmax of -inf?" if nan else "has a gradient")
    if (stored := context.call.stored) is not None:
        before = stored.filled("output", one.found, *one.shape, dtype=one.dtype)[where]
        if torch.equal(here.nan_to_num(), before.nan_to_num()):
            return text + "is what the buffer of the output held before: nothing is written there"
    if bool(here.isnan().all()):
        return text + 'is NaN, the softmax of -inf. If that is meant, fully_masked="nan"'
    if bool((here == 0).all()):
        return text + 'is zero. If that is meant, fully_masked="zero"'
    return text + (
        "holds numbers: masked with a finite number, or not at all? If the mean of all values is "
        'meant, fully_masked="uniform"'
    )


def _unused_slots(one: Judgement, context: Context) -> str | None:
    """NaN that comes from a cache, where slots that nobody uses hold it."""
    stored = context.call.stored
    if stored is None or stored.unused != "nan" or not bool(one.found[one.broken].isnan().any()):
        return None
    return (
        "a slot of the cache that no sequence uses is read, or its NaN is multiplied by 0; with "
        "unused=ordinary, what is read is looked for"
    )


def _overflow(one: Judgement, context: Context) -> str | None:
    """NaN or inf: whether scores are beyond the range of exp, and where it begins."""
    bad = one.broken & ~one.found.isfinite()
    if not bool(bad.any()):
        return None
    limit = math.log(torch.finfo(context.dtype).max)
    rows = bad.any(-1)
    first = index_of(rows.flatten().int().argmax(), rows.shape)
    text = (
        f"{int(bad.sum())} elements are NaN or infinite, in {int(rows.sum())} of "
        f"{rows.numel()} rows, from {one.name}{'.grad' * (one.name != 'output')}"
        f"[{', '.join(map(str, one.given(first)))}, :] on"
    )
    maps = context.fully_masked.any(-1)
    if one.name != "output" and bool(maps.any()):
        return f"{text}: the gradient of a softmax of -inf, from rows without any permitted key?"
    if context.top_score is not None and context.top_score > limit:
        name, product = dtype_name(context.dtype), abs(context.top_score / context.call.factor)
        text = f"{text}; scores reach {context.top_score:.3g}"
        # Then it is not known which of the two it was.
        if product > torch.finfo(context.dtype).max:
            return (
                f"{text}, products before the scale {product:.3g}, beyond what {name} holds: "
                "multiplied in it and scaled after, or the row maximum was not subtracted?"
            )
        return (
            f"{text} and exp of {name} overflows from {limit:.3g} on: the row maximum was not "
            "subtracted?"
        )
    return text


def _constant_factor(one: Judgement, context: Context) -> str | None:
    """All of it is the reference times one number."""
    clear = one.judged & (one.exact.abs() > 20 * one.allowed) & one.found.isfinite()
    # Any factor would fit references that are all alike.
    if int(clear.sum()) < _WITNESSES or bool(
        one.exact[clear].std() < 20 * one.allowed[clear].median()
    ):
        return None
    constant = float((one.found[clear] / one.exact[clear]).median())
    off = (one.found - constant * one.exact).abs()
    if not bool((off <= one.allowed * max(1.0, abs(constant)))[one.judged].all()):
        return None
    if constant == 0:
        return f"{_titles([one])} is zero everywhere: detached, or never written?"
    if one.name == "output":
        return f"the output is {constant:.6g} times the reference: a scale after the softmax?"
    return f"{_titles([one])} is {constant:.6g} times the reference"


def _some_maps(one: Judgement, context: Context) -> str | None:
    """Only some heads, or batch entries, are broken."""
    maps = one.broken.any(-1).any(-1)
    if maps.ndim == 0 or not bool((~maps).any()):
        return None
    if maps.ndim == 2:
        for dim, (noun, nouns) in enumerate((("batch entry", "batch entries"), ("head", "heads"))):
            wrong = maps.any(1 - dim)
            if torch.equal(wrong, maps.all(1 - dim)):
                numbers = wrong.nonzero().flatten().tolist()
                listed = ", ".join(map(str, numbers[:4])) + ", ..." * (len(numbers) > 4)
                return f"only in {noun if len(numbers) == 1 else nouns} {listed} of {len(wrong)}"
    places = [tuple(place) for place in maps.nonzero().tolist()]
    names = ", ".join(map_name(place) for place in places[:4]) + ", ..." * (len(places) > 4)
    return f"only in {len(places)} of {maps.numel()} maps: {names}"


def _narrower(one: Judgement, context: Context) -> str | None:
    """The errors are everywhere, and of the size that a plain computation in bfloat16 makes."""
    coarse = torch.bfloat16
    share = float(one.broken.sum()) / max(1, int(one.judged.sum()))
    if share < 0.5 or torch.finfo(context.dtype).eps >= torch.finfo(coarse).eps:
        return None
    if not context.explain or bool(one.error.isinf().any()):
        return None
    narrow: dict[str, Any] = {
        name: given.to(coarse)
        for name, given in vars(context.call).items()
        if isinstance(given, Tensor) and given.is_floating_point()
    }
    plain = computation.plain(replace(context.call, **narrow))[one.name].reshape(one.exact.shape)
    usual = (plain - one.exact).masked_fill(~one.judged, 0.0).nan_to_num(nan=0.0).abs()
    if _rms(one.error) > 2 * _rms(usual) or float(one.error.max()) > 4 * float(usual.max()):
        return None
    return (
        "every error is within the rounding of a narrower dtype, although the inputs are "
        f"{dtype_name(context.dtype)}: a step in lower precision?"
    )


def _rms(errors: Tensor) -> float:
    return float(errors.square().mean().sqrt())


def _known_mistake(one: Judgement, context: Context) -> str | None:
    """A known mistake that gives this very output, or these very gradients."""
    output = context.found["output"]
    if not context.explain or output is None or _step(context) >= _BLIND:
        return None
    if one.name == "output":
        return likely_mistake(context.call, output)
    slopes = {n: slope for n, slope in context.found.items() if slope is not None and n != "output"}
    if not context.right:
        mistake = likely_backward_mistake(context.call, slopes, output)
        return mistake or "the output is wrong as well: assert_matches_reference tells how"
    mistake = likely_backward_mistake(context.call, slopes, wrong=context.broken)
    return mistake and f"{RIGHT}; {mistake}"


def _step(context: Context) -> float:
    """How far two numbers of the dtype are apart that are as large as the largest score."""
    if not context.top_score or not math.isfinite(context.top_score):
        return 0.0
    power = math.frexp(context.top_score)[1] - 1
    return float(torch.finfo(context.dtype).eps * 2.0**power)


def _coarse_scores(one: Judgement, context: Context) -> str | None:
    """Scores are so large that a step in the dtype of the inputs decides what weights are."""
    if (step := _step(context)) < _BLIND:
        return None
    name = dtype_name(context.dtype)
    return (
        f"scores reach {context.top_score:.3g}, where numbers of {name} are {step:g} apart: "
        "scores, or a log-sum-exp, kept in it?"
    )


_CAUSES: tuple[Callable[[Judgement, Context], str | None], ...] = (
    _no_gradient,
    _fully_masked_rows,
    _unused_slots,
    _overflow,
    _known_mistake,
    # A mask that is ignored may leave many rows right, and a wrong scale errors that look like
    # those of rounding: what follows is asked last.
    _constant_factor,
    _some_maps,
    _narrower,
    _coarse_scores,
)
