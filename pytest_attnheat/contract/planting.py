"""A target with a defect: each call is answered by the target, unless the defect shows in it.

A planted version asks the target itself, and answers as it does where the defect changes nothing
beyond rounding. So a version whose defect cannot act is the target. Where it acts, the call is
carried out in float64 with the defect, and answered in the target's own layout, dtype and device;
gradients are those of autograd through that computation, or of a wrong backward pass.
"""

from __future__ import annotations

import copy
import functools
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from ..attention.backward import carried_back
from ..attention.call import Call
from ..attention.decisions import BackwardPlan
from ..attention.outcomes import as_case, digest
from ..attention.plan import Case, NotApplicable, Outcome, Plan, misread
from ..attention.scoring import draw
from .conventions.reading import SetAsideError, UnreadError
from .declarations import meant_instead
from .effects import Change, Effect, Known, Slopes
from .probing import one_thread
from .reading_calls import Reading, read, signature_of
from .spec import AttentionSpec
from .versions import Form, Version

# Above so many scores a call takes too much memory in float64.
_MOST_SCORES = 2**25
# What is known of calls is kept up to so many numbers, of 8 bytes each.
_KEPT_NUMBERS = 2**25
_BASES = (1.0, math.log(2.0), math.log(10.0))


class _OtherError(UnreadError):
    """The answer is not that of what is described."""


class Planted:
    """A target with a defect, called as the target is; without a version, it is only watched.

    `weights` are those of the last answer that was changed, (batch, heads, query_len, key_len),
    since `keep_weights` was called.
    """

    def __init__(
        self, spec: AttentionSpec, version: Version | None, known: OrderedDict[Any, Any]
    ) -> None:
        """Plant a version, or None; what is `known` of calls is shared by versions of a target."""
        self.spec, self.version, self.effect = spec, version, Effect()
        target = spec.implementation
        # That of a module may be replaced by this while it is graded.
        self.module = target if isinstance(target, nn.Module) else None
        self._target = target.forward if isinstance(target, nn.Module) else target
        self._keeps_weights = False
        self.weights: Tensor | None = None
        self._known, self._first = known, dict[Any, Case]()
        functools.update_wrapper(self, self._target, updated=())
        self.__signature__ = signature_of(spec)

    def __call__(self, *given: Any, **named: Any) -> Any:
        """Answer a call: as the target does, or with the defect where it shows."""
        before = _written(given, named)
        answer = self._target(*given, **named)
        self.effect.calls += 1
        try:
            if _written(given, named) != before:
                raise UnreadError("it writes into what it is given")
            if any(is_functorch_wrapped_tensor(t) for t in given if isinstance(t, Tensor)):
                raise UnreadError("it ran inside of torch.func (vmap, grad ...)")
            mode = torch.inference_mode(False) if _plain(given, named) else torch.no_grad()
            with mode, one_thread():
                return self._answer(answer, read(self.spec, given, named))
        except SetAsideError as error:
            self.effect.set_aside[str(error)] += 1
        except _OtherError as error:
            why = self._other_layout(answer, given, named)
            self.effect.refused[f"{error}; {why}" if why else str(error)] = None
        except UnreadError as error:
            self.effect.refused[str(error)] = None
        except Exception as error:  # whatever is not understood is refused, never charged
            self.effect.refused[f"{type(error).__name__}: {str(error).splitlines()[:1]}"] = None
        return answer

    def __deepcopy__(self, memo: dict[int, Any]) -> Planted:
        """A part of a copy of its module; what is asked of either is noted once."""
        own = object.__new__(type(self))
        vars(own).update(vars(self), _target=copy.deepcopy(self._target, memo))
        return own

    def keep_weights(self) -> None:
        """Keep the weights of which answers are made, for a target that returns none."""
        self._keeps_weights, self.weights = True, None

    def _other_layout(self, answer: Any, given: Sequence[Any], named: Mapping[str, Any]) -> str:
        """Say that the target has another layout than is described, if that gives its answer."""
        for layout in ("bhld", "blhd") if self.spec.convention is None else ():
            try:
                spec = replace(self.spec, layout=layout)
                Planted(spec, None, OrderedDict())._answer(answer, read(spec, given, named))
            except Exception:  # that is not described rightly either
                continue
            return meant_instead(self.spec, {"layout": layout})
        return ""

    def _answer(self, answer: Any, reading: Reading) -> Any:
        output = answer[0] if isinstance(answer, tuple | list) and answer else answer
        if not isinstance(output, Tensor):
            raise UnreadError(f"it returns no tensor, but {type(output).__name__}")
        if reading.call.maps * reading.call.query_len * reading.call.key_len > _MOST_SCORES:
            raise UnreadError(f"a call has more than {_MOST_SCORES} scores")
        if torch.is_autocast_enabled(output.device.type):  # it casts within the function
            cast = [tensor.to(output.dtype) for tensor in reading.call.tensors]
            call = replace(reading.call, query=cast[0], key=cast[1], value=cast[2])
            reading = replace(reading, call=call)
        found = reading.given.here(output.detach()).cpu().double()
        if found.shape != reading.call.shapes["output"]:
            raise UnreadError(f"its output has the shape {tuple(output.shape)}")
        known = self._recall(reading, found)
        if not known.is_reproduced:
            error = (found - known.healthy.output).abs().nan_to_num(nan=math.inf).max()
            query, key = reading.call.query, reading.call.key
            raise _OtherError(
                "what is described does not give its own answer to within rounding: it is off by "
                f"{float(error):.2g}, in {query.dtype} query {tuple(query.shape)}, key "
                f"{tuple(key.shape)}"
            )
        back = _beside(self.spec, reading, known, answer)
        self._note(reading, output)
        version = self.version
        if version is None:
            return answer
        if version.kind == "backward":
            return self._with_wrong_gradients(answer, output, reading, known)
        chosen = known.chosen(version)
        if chosen is None:
            return answer
        beside, wrong = None, chosen.output
        if wrong is None or back is not None or output.requires_grad or self._keeps_weights:
            attached = _attached(known.case, reading)
            outcome = chosen.form.make(attached)
            self.weights = outcome.weights if self._keeps_weights else None
            wrong, beside = outcome.output, back and back(chosen.form, attached, outcome)
        own = reading.given.back(wrong).to(output)
        self.effect.changed(chosen.change, output.dtype)
        if own.stride() != output.stride():
            own = torch.empty_like(output.detach()).copy_(own)
        if output.requires_grad:
            tensors = [t for t in reading.call.tensors if t.requires_grad]
            own = _Reached.apply(own, *tensors)  # type: ignore[no-untyped-call]
        else:
            own = own.detach()
        return _structured(answer, own, beside)

    def _recall(self, reading: Reading, found: Tensor) -> Known:
        """What is known of a call, by its numbers, and those of the answer of the target."""
        case = replace(as_case(reading.call), scale_given=reading.scale_given)
        case = replace(case, upstream=None)
        earlier = None
        if self.version is not None and self.version.remembers:
            shapes = tuple(tensor.shape for tensor in case.tensors)
            earlier = self._first.setdefault(shapes, case)
            case = case if earlier is case else replace(case, earlier=earlier)
        earlier_key = None if case.earlier is None else digest(case.earlier)
        key = digest(case), digest(found), earlier_key
        if key not in self._known:
            self._known[key] = Known(case, self.spec.tolerance or 0.0, found)
            kept = sum(known.numbers for known in self._known.values())
            while len(self._known) > 1 and kept > _KEPT_NUMBERS:
                kept -= self._known.popitem(last=False)[1].numbers
        self._known.move_to_end(key)
        known: Known = self._known[key]
        return known

    def _note(self, reading: Reading, output: Tensor) -> None:
        call, seen = reading.call, self.effect.seen
        # A mask that hides nothing, and causality that does, exercise nothing.
        is_masked = call.mask is not None and not bool(call.mask.all())
        is_masked |= call.bias is not None and bool((call.bias != 0).any())
        first = call.key_len - call.query_len if call.alignment == "bottom_right" else 0
        is_causal = call.causal and call.key_len - 1 > first
        has = {
            "a mask": is_masked,
            "causality": is_causal,
            "a mask together with causality": is_masked and is_causal,
            "other numbers of keys than of queries": call.query_len != call.key_len,
            "grouped heads": call.group > 1,
            "several heads": call.heads > 1,
            "several samples": call.query.shape[0] > 1,
            "values of another width": call.value.shape[-1] != call.query.shape[-1],
            "more than 64 keys": call.key_len > 64,
            "a number of keys that 16 does not divide": call.key_len % 16 != 0,
            "a scale": reading.scale_given,
            "negative numbers in query and key": bool((call.query < 0).any())
            and bool((call.key < 0).any()),
        }
        names = ("window", "chunk", "documents", "lengths", "softcap", "alibi", "sinks")
        has |= {name: getattr(call, name) is not None for name in names}
        seen.update(name for name, given in has.items() if given)
        seen.add(str(call.query.dtype))
        if output.requires_grad and self.version is None:
            output.register_hook(lambda upstream: seen.add("gradients"))  # type: ignore[no-untyped-call]

    def _with_wrong_gradients(
        self, answer: Any, output: Tensor, reading: Reading, known: Known
    ) -> Any:
        version, call = self.version, reading.call
        if not output.requires_grad or version is None:
            return answer
        wanted = {name: t for name, t in _differentiable(call).items() if t.requires_grad}

        def wrong(upstream: Tensor) -> list[Tensor | None]:
            try:
                slopes = known.slopes(call, upstream.detach())
                found = _wrong_gradients(version, slopes, wanted)
            except Exception as error:  # never charged to the version
                self.effect.refused[f"{type(error).__name__}: {str(error).splitlines()[:1]}"] = None
                found = None
            if found is None:
                return [None] * len(wanted)
            self.effect.changed(found[1], call.query.dtype)
            return [found[0][n].reshape(t.shape).to(t) for n, t in wanted.items()]

        shape = call.shapes["output"]
        nothing: Tensor = _Besides.apply(wrong, shape, *wanted.values())  # type: ignore[no-untyped-call]
        return _structured(answer, output + reading.given.back(nothing).to(output), None)


def slopes_of(call: Call) -> Slopes:
    """The gradients of a call, with that of its output drawn at random."""
    drawn = draw("upstream", 0, *call.shapes["output"]).to(call.query)
    return Slopes.of(call, drawn)


def shows_in_gradients(version: Version, slopes: Slopes) -> bool:
    """Whether a wrong backward pass gives other gradients."""
    return _wrong_gradients(version, slopes, _differentiable(slopes.saved.call)) is not None


def _differentiable(call: Call) -> dict[str, Tensor]:
    named = {"query": call.query, "key": call.key, "value": call.value}
    named |= {} if call.bias is None else {"attn_mask": call.bias}
    return named | ({} if call.sinks is None else {"sinks": call.sinks})


def _wrong_gradients(
    version: Version, slopes: Slopes, wanted: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], Change] | None:
    """By how much the first form that shows changes each gradient; and the worst of them."""
    right = {name: one for name, one in slopes.right.items() if name in wanted}
    for change in version.changes:
        try:
            with torch.no_grad():
                own = dict(carried_back(change(BackwardPlan()), slopes.saved))  # type: ignore[arg-type]
        except NotApplicable:
            continue
        found = [slopes.change(name, own[name]) for name in right]
        changes = [one for one in found if one is not None]
        if changes:
            more = {name: own[name].reshape(one.shape) - one for name, one in right.items()}
            return more, max(changes, key=lambda one: one.off)
    return None


class _Besides(torch.autograd.Function):
    """Zeros, whose gradient is what is added to that of the target."""

    @staticmethod
    def forward(ctx: Any, wrong: Any, shape: Any, *tensors: Tensor) -> Tensor:
        ctx.wrong = wrong
        return tensors[0].new_zeros(shape)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return None, None, *ctx.wrong(upstream)


class _Reached(torch.autograd.Function):
    """An answer whose gradient reaches all inputs, if only as zeros."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return upstream, *(torch.zeros_like(tensor) for tensor in ctx.saved_tensors)


def _plain(given: Sequence[Any], named: dict[str, Any]) -> bool:
    """Whether no tensor is of inference mode, out of which autograd cannot lead."""
    return not any(isinstance(t, Tensor) and t.is_inference() for t in (*given, *named.values()))


def _written(given: Sequence[Any], named: Mapping[str, Any]) -> list[int]:
    """How often each tensor that is given was written into."""
    tensors = [one for one in (*given, *named.values()) if isinstance(one, Tensor)]
    return [one._version for one in tensors if not one.is_inference()]


def _attached(case: Case, reading: Reading) -> Case:
    """The case with the tensors of the call itself, so that gradients reach them."""
    call = reading.call
    new = {n: getattr(call, n).to("cpu", torch.float64) for n in ("query", "key", "value")}
    for name in ("bias", "sinks"):
        if (tensor := getattr(call, name)) is not None:
            new[name] = tensor.to("cpu", torch.float64)
    lead = call.query.shape[0]
    new = {n: t.expand(lead, *t.shape[1:]) if n in ("key", "value") else t for n, t in new.items()}
    return replace(case, **new)


def _structured(answer: Any, output: Tensor, beside: Tensor | None) -> Any:
    """An answer in place of the output, and of what is returned beside it."""
    if not isinstance(answer, tuple | list):
        return output
    parts = [output, *answer[1:]]
    if beside is not None:
        parts[1] = beside
    if hasattr(answer, "_fields"):  # a named tuple
        return type(answer)(*parts)
    return type(answer)(parts)


Beside: TypeAlias = Callable[[Form, Case, Outcome], Tensor]


def _beside(spec: AttentionSpec, reading: Reading, known: Known, answer: Any) -> Beside | None:
    """How what is returned beside the output is made of what was carried out; None if not."""
    more = answer[1] if isinstance(answer, tuple | list) and len(answer) > 1 else None
    if not isinstance(more, Tensor) or spec.returns == "output":
        return None
    right = known.right
    turns: list[Callable[[Form, Case, Outcome], Tensor]]
    if spec.returns == "lse":
        number = len(reading.given.sums(right.scores[..., 0]))
        turns = [functools.partial(_turned, reading, i, base)
                 for i, base in product(range(number), _BASES)]  # fmt: skip
    elif spec.returns == "averaged":
        turns = [lambda form, case, outcome: outcome.weights.mean(1)]
    else:
        turns = [lambda form, case, outcome: outcome.weights]
    plain = Form(lambda case: right, {})
    for turn in turns:
        made = turn(plain, known.case, right)
        if made.numel() == more.numel() and _alike(made, more):
            return functools.partial(_like, turn, more)
    what = "log-sum-exp" if spec.returns == "lse" else "weights"
    raise UnreadError(f"what it returns beside its output is not the {what} of what is described")


def _like(turn: Beside, more: Tensor, form: Form, case: Case, outcome: Outcome) -> Tensor:
    made = turn(form, case, outcome)
    return made.reshape(more.shape).to(more) if more.requires_grad else made.detach().reshape(
        more.shape).to(more)  # fmt: skip


def _turned(reading: Reading, number: int, base: float, form: Form, case: Case, outcome: Outcome
            ) -> Tensor:  # fmt: skip
    """The logarithm of the sum of each row, in one of the orders of dimensions."""
    lse = outcome.scores.masked_fill(~outcome.permitted, -math.inf).logsumexp(-1)
    plan = replace(Plan(), **(form.decided or {}))
    sinks = misread(plan, case).sinks
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.double()[:, None].expand_as(lse))
    return reading.given.sums(lse)[number] / base


def _alike(made: Tensor, more: Tensor) -> bool:
    if made.squeeze(-1).shape != more.squeeze(-1).shape:
        return False
    made, more = made.reshape(more.shape).detach(), more.detach().cpu().double()
    sums = made.isfinite() & more.isfinite()
    near = 4 * torch.finfo(torch.float32).eps ** 0.5
    return bool(sums.any()) and torch.allclose(made[sums], more[sums], rtol=0.02, atol=10 * near)
