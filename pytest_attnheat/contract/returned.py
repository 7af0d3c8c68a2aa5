"""What a subject returns beside an output that is right: its weights, its log-sum-exp."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from operator import attrgetter
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..attention.call import Call
from ..attention.computation import reference
from ..attention.defects import DEFECTS
from ..attention.drawing import RAGGED
from ..attention.levels import OPTIONS
from ..attention.misreadings import without
from ..attention.outcomes import as_case
from ..attention.plan import NotApplicable, Outcome, Plan, carry_out
from ..attention.vocabulary import HIDDEN_FROM
from ..failure import Checked, Failure
from ..inputs import multiple
from .diagnosis import Diagnosis, residual_text
from .examination import Examination, Skipped
from .probing import Probe, answer_to
from .spec import AttentionSpec

# Not compared: cases whose weights are 0 and 1, or many.
_LEFT_OUT = ("large scores", "long")
# The share that is dropped when it is asked what is returned then.
_SHARE = 0.5
_CORRECT = Plan()
_BASES = {"e": 1.0, "2": math.log(2.0), "10": math.log(10.0)}
# The dimensions of what is returned.
_SHAPES = ("bhl", "blh", "hbl", "lbh")
# Below all that scores are.
_LOWEST = -1e30
# As what rounding is allowed of an output.
_FACTOR = 2.0


@dataclass(frozen=True)
class _Kind:
    """What might be returned: a name, what it is, and how it is made of a plan that is made."""

    name: str
    sentence: str
    make: Callable[[Outcome], Tensor] = attrgetter("weights")
    plan: Plan = _CORRECT
    averaged: bool | None = None  # None: as declared


def _masked_scores(result: Outcome) -> Tensor:
    return result.scores.masked_fill(~result.permitted, -math.inf)


_KINDS = (
    _Kind("returned_averaged", "averaged over the heads", averaged=True),
    _Kind("returned_per_head", "those of each head", averaged=False),
    _Kind("returned_transposed", "transposed: a row for each key", lambda r: r.weights.mT),
    _Kind("returned_before_mask", "from before the mask",
          plan=Plan(misread=frozenset({without("mask", "causal", "window")}))),
    _Kind("returned_scores", "the scores, from before the softmax", _masked_scores),
    _Kind("returned_scores", "the scores, from before the mask", lambda r: r.scores),
    _Kind("returned_unnormalised", "not divided by their sum",
          lambda r: (scores := _masked_scores(r)).sub(scores.amax(-1, keepdim=True)).exp()),
    _Kind("returned_unnormalised", "not divided by their sum", lambda r: _masked_scores(r).exp()),
    *(_Kind("returned_of_other_heads", f"those of other heads ({order})", make)
      for order, make in {
          "of the one before": lambda r: r.weights.roll(1, 1),
          "of the next": lambda r: r.weights.roll(-1, 1),
          "in reversed order": lambda r: r.weights.flip(1),
          "of the first": lambda r: r.weights[:, :1].expand_as(r.weights),
      }.items()),
    *(_Kind("returned_of_another_sample", "those of another sample", make)
      for make in (lambda r: r.weights.roll(1, 0), lambda r: r.weights.roll(-1, 0),
                   lambda r: r.weights[:1].expand_as(r.weights))),
    *(_Kind(f"returned_{one.name}", f"those of attention {one.sentence}", plan=change(_CORRECT))
      for one in DEFECTS if one.seen == "exactly" for change in one.changes),
)  # fmt: skip


def with_returned(diagnosis: Diagnosis, spec: AttentionSpec, probes: Sequence[Probe]) -> Diagnosis:
    """Return the diagnosis of a subject whose output is right, and say what weights it returns."""
    if spec.returns in ("output", "lse"):  # of which there is a check of its own
        return diagnosis
    compared = [one for one in probes if _is_compared(one)]
    given = [(one, _returned(spec, one)) for one in compared]
    right = _Kind("", "")
    off = [_off(spec, right, one, weights) for one, weights in given]
    wrong = [one.case.name for (one, _), far in zip(given, off, strict=True) if far > 1.0]
    if not wrong:
        return _while_dropping(diagnosis, spec, compared)
    said = replace(diagnosis, healthy=False, where={"wrong": f"weights in {', '.join(wrong)}"})
    beginning = f"{spec.name} gives the output of attention as declared, but returns weights that"
    for kind in _KINDS:
        if all(_off(spec, kind, one, weights) <= 1.0 for one, weights in given):
            return replace(said, defects=(kind.name,), sentence=f"{beginning} are {kind.sentence}")
    first = next(weights for (_, weights), far in zip(given, off, strict=True) if far > 1.0)
    return replace(said, sentence=f"{beginning} did not make it ({_described(first)})")


def _is_compared(one: Probe) -> bool:
    """Whether a case is asked; the weights of a query that may see nothing are not declared."""
    if not one.judged or one.case.name.startswith(_LEFT_OUT):
        return False
    return bool(carry_out(_CORRECT, one.case).permitted.any(-1).all())


def _returned(spec: AttentionSpec, one: Probe) -> object:
    weights = answer_to(spec, one.case, one.dtype).besides
    return weights.detach().double().cpu() if isinstance(weights, Tensor) else weights


def _described(weights: object) -> str:
    if not isinstance(weights, Tensor):
        return f"they are a {type(weights).__name__}"
    sums = torch.nan_to_num(weights.sum(-1), nan=math.inf)
    least, most = residual_text(float(sums.min())), residual_text(float(sums.max()))
    return f"their shape is {tuple(weights.shape)}, their rows sum to {least} to {most}"


def _off(spec: AttentionSpec, kind: _Kind, one: Probe, weights: object) -> float:
    """How far weights are from those of a kind, as a multiple of what rounding may do."""
    try:
        result = carry_out(kind.plan, one.case)
    except NotApplicable:
        return math.inf
    wanted = kind.make(result)
    averaged = spec.returns == "averaged" if kind.averaged is None else kind.averaged
    if averaged:
        wanted = wanted.mean(1)
    if not isinstance(weights, Tensor):
        return math.inf
    if weights.ndim == 3 and not spec.has_heads and not averaged:
        wanted = wanted.squeeze(1)
    if weights.ndim == 4 and kind.averaged:
        wanted = wanted.unsqueeze(1).expand(-1, weights.shape[1], -1, -1)
    if weights.shape != wanted.shape:
        return math.inf
    largest_score = float(carry_out(_CORRECT, one.case).scores.abs().max())
    difference = weights.clamp(min=HIDDEN_FROM) - wanted.clamp(min=HIDDEN_FROM)
    size = max(1.0, float(wanted.clamp(min=HIDDEN_FROM).abs().max()))
    allowed = max(one.tolerance, 8 * torch.finfo(one.dtype).eps * (2.0 + largest_score))
    far = float(difference.abs().max()) / (size * allowed)
    return math.inf if math.isnan(far) else far


def _while_dropping(
    diagnosis: Diagnosis, spec: AttentionSpec, probes: Sequence[Probe]
) -> Diagnosis:
    """Say whether weights that are declared to be from before dropout are from after it."""
    if spec.returns != "weights" or not spec.dropout:
        return diagnosis
    first = probes[0]
    weights = answer_to(spec, first.case, first.dtype, dropout=_SHARE).besides
    expected = carry_out(_CORRECT, first.case).weights
    dropped = (weights.cpu() == 0) & (expected.reshape(weights.shape) > first.tolerance)
    if not bool(dropped.any()):
        return diagnosis
    return replace(
        diagnosis,
        healthy=False,
        defects=("returned_after_dropout",),
        where={"wrong": f"weights in {first.case.name}, with dropout_p={_SHARE}"},
        sentence=f"{spec.name} gives the output of attention as declared, but returns weights "
        'from after dropout (returns="dropped_weights" declares that)',
    )


# --- the log-sum-exp: in which shape and base, with its sink


@dataclass(frozen=True)
class _Reading:
    """How a log-sum-exp may be meant."""

    shape: str
    base: str
    with_sink: bool

    def __str__(self) -> str:
        letters = {"b": "batch", "h": "heads", "l": "query_len"}
        names = ", ".join(letters[letter] for letter in self.shape)
        return f"({names}), base {self.base}" + ("" if self.with_sink else ", without the sink")

    def excess(
        self, given: Tensor, call: Call, empty: str | None = None, instead: _Instead | None = None
    ) -> float:
        """How far it is off, as a multiple of what is allowed; inf where it cannot be this."""
        # `empty`: what a row has that sees nothing, as of `Lse`; by default any infinity.
        # `instead`: what is made of a call in place of its log-sum-exp.
        squeezed = given.squeeze(-1) if given.ndim == 4 and given.shape[-1] == 1 else given
        order = ["bhl".index(letter) for letter in self.shape]
        back = [self.shape.index(letter) for letter in "bhl"]
        wanted = call.query.shape[:-1]
        if squeezed.ndim != 3 or tuple(squeezed.shape) != tuple(wanted[d] for d in order):
            return math.inf
        own = call if self.with_sink else replace(call, sinks=None)
        expected = reference(own, wanted=("lse",))
        exact, scale = (of["lse"].squeeze(-1) for of in (expected.exact, expected.scale))
        found = squeezed.permute(back).double() * _BASES[self.base]
        real = torch.ones_like(exact, dtype=torch.bool)
        if call.query_lengths is not None:
            real &= torch.arange(call.query_len) < call.query_lengths[:, None, None]
        nothing = exact.isinf() & real
        unlike = {None: found.isfinite(), "-inf": found != -math.inf, "+inf": found != math.inf,
                  "lowest": ~(found < _LOWEST)}  # fmt: skip
        if bool((unlike[empty] | found.isnan())[nothing].any()):
            return math.inf
        allowed = _FACTOR * torch.maximum(scale, expected.least["lse"].squeeze(-1))
        if instead is not None:
            exact = instead(own).to(exact.device)
        off = ((found - exact).abs() / allowed)[real & ~nothing]
        return float(off.nan_to_num(nan=math.inf).max()) if off.numel() else 0.0


def judge_lse(examination: Examination) -> str:
    """Judge the log-sum-exp of a few calls; return how it is meant."""
    # That of a convention is known; else it is found out.
    known = examination.spec.convention.lse if examination.spec.convention else None
    with_sinks = (True,) if examination.spec.sinks is None else (True, False)
    readings = [_Reading(*one) for one in product(_SHAPES, _BASES, with_sinks)]
    answers: list[tuple[Call, Tensor]] = []
    for call in _calls(examination):
        given = examination.spec.ask(call, besides=True).besides
        if not isinstance(given, Tensor):
            raise Failure("", f"the log-sum-exp is a {type(given).__name__}, no tensor")
        answers.append((call, given.detach()))
    if not answers:
        raise Skipped("no call can be asked")
    empty = known.empty if known else None

    def worst(reading: _Reading, empty: str | None = empty) -> float:
        return max(reading.excess(given, call, empty) for call, given in answers)

    declared = _Reading(known.shape, known.base, known.sink is not False) if known else None
    if declared is not None and worst(declared) <= 1.0:
        return f"lse {declared}"
    fitting = [one for one in readings if worst(one, None) <= 1.0]
    if fitting and declared is None:
        return f"lse {fitting[0]}"
    claim = "the log-sum-exp is not that of the scores, however it is read"
    if declared is not None:
        claim = f"the log-sum-exp is not that of the scores, {declared}"
    cause = None
    nearest = min(readings, key=worst)
    without_sinks = [(call, given) for call, given in answers if call.sinks is None]
    if fitting:
        same = fitting[0] == declared
        cause = f"it is {fitting[0]}" + f", but a query that sees nothing has not {empty}" * same
    elif beside := next((one for one in readings if _fits(one, without_sinks)), None):
        cause = f"it is {beside}, but not beside a sink"
    elif said := _said_of(readings, without_sinks):
        cause = said
    elif math.isfinite(worst(nearest)):
        cause = (
            f"nearest to one of {nearest}, off by {multiple(worst(nearest))} times what is allowed"
        )
    raise Failure("", claim, tensor=Checked.of(answers[0][1]), cause=cause)


# What is made of a call where it is not the log-sum-exp of its scores, (batch, heads, query_len).
_Instead: TypeAlias = Callable[[Call], Tensor]


def _scores_of(call: Call) -> Tensor:
    """The scores (batch, heads, query_len, key_len), -inf where a query may not attend."""
    return _masked_scores(carry_out(_CORRECT, as_case(call)))


_INSTEAD: dict[str, _Instead] = {
    "the largest score of each row, not the logarithm of its sum":
        lambda call: _scores_of(call).amax(-1),
    "the logarithm of the sum after the largest score was taken off, which is not added again":
        lambda call: (s := _scores_of(call)).logsumexp(-1) - s.amax(-1),
    "0 in every row": lambda call: torch.zeros(call.query.shape[:-1], dtype=torch.float64),
    "the log-sum-exp times ln(2), as if it had been in base 2":
        lambda call: _scores_of(call).logsumexp(-1) * math.log(2.0),
    "the sum itself, not its logarithm": lambda call: _scores_of(call).logsumexp(-1).exp(),
    "the log-sum-exp with the sign turned": lambda call: -_scores_of(call).logsumexp(-1),
    "the log-sum-exp of scores that are not scaled":
        lambda call: _scores_of(replace(call, scale=1.0)).logsumexp(-1),
    "the log-sum-exp of scores from before the mask":
        lambda call: carry_out(_CORRECT, as_case(call)).scores.logsumexp(-1),
}  # fmt: skip


def _said_of(readings: Sequence[_Reading], answers: Sequence[tuple[Call, Tensor]]) -> str:
    """Say what else was returned for calls without a sink, if it is that on all of them."""
    # What overflows, as the sum of large scores does, tells nothing.
    answers = [(call, given) for call, given in answers if not given.isposinf().any()]
    for words, instead in _INSTEAD.items():
        for one in readings:
            if _fits(one, answers, instead):
                return f"it is {words} ({one})"
    return ""


def _fits(
    one: _Reading, answers: Sequence[tuple[Call, Tensor]], instead: _Instead | None = None
) -> bool:
    """Whether something is what was returned for some calls, of which there are some."""
    off = [one.excess(given, call, None, instead) for call, given in answers]
    return bool(off) and max(off) <= 1.0


def _calls(examination: Examination) -> Iterator[Call]:
    options = {name: True for name in OPTIONS if name in ("softcap", "sinks", "alibi")}
    asked: list[dict[str, Any]] = [{}, {"mask": "boolean"}, {"causal": True}, {"group": 2}]
    asked += [{name: level} for name, level in options.items()]
    # Beside scores of some hundred a sink that is left as it is overflows, and so does their sum.
    asked += [{"numbers": "large"}, {"numbers": "large", "sinks": True, "sizes": (5, 2)}]
    asked += [{"mask": "boolean", "empty": True}, {"batch": 1, "key_heads": 3}]
    asked += [{"ragged": kind} for kind in RAGGED] + [{"causal": True, "sizes": (9, 5)}]
    for levels in asked:
        try:
            yield examination.case(**levels)
        except Skipped:
            continue
