"""The wrong versions of a target: each defect of the catalogue, and trivial answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..attention.backward import BACKWARD
from ..attention.decisions import Change, Defect
from ..attention.defects import DEFECTS
from ..attention.misreadings import HISTORY
from ..attention.outcomes import Decisions, decisions_of
from ..attention.plan import Case, NotApplicable, Outcome, Plan, carry_out
from .spec import AttentionSpec

Kind = Literal["forward", "backward", "trivial"]
# The constants of defects that have one, and the share of weights that is dropped unasked.
_TEMPERATURE, _FACTOR, _SHARE = 1.25, 0.8, 0.1
# Of so many keys a version that reads the first alone reads them.
_FIRST = 512
# What a target takes or has, by the field of its specification.
_FEATURES = ("window", "chunk", "documents", "may_see", "softcap", "alibi", "sinks")


@dataclass(frozen=True, eq=False)
class Form:
    """One way in which a defect computes."""

    make: Callable[[Case], Outcome]  # Carries it out; raises `NotApplicable` where that cannot be
    decided: Decisions | None = None  # What it decides, where that is all there is to it


@dataclass(frozen=True, eq=False)
class Version:
    """A wrong version of a target."""

    name: str  # The name of the defect
    sentence: str  # What it does; it follows the word "attention"
    kind: Kind = "forward"  # Of the forward or the backward pass, or a trivial answer
    forms: tuple[Form, ...] = ()  # Its forms in a forward pass, the most usual first
    changes: tuple[Change, ...] = ()  # Those in a backward pass
    remembers: bool = False  # Whether it knows the first call of the same shapes


def versions(spec: AttentionSpec, *, seed: int = 0) -> Iterator[Version]:
    """Yield all versions: of each defect, with its forms, and the trivial answers."""
    # Without gradients, no backward pass is wrong.
    everything: tuple[Defect, ...] = (*DEFECTS, *BACKWARD)
    forward = {one.name for one in DEFECTS}
    forms = [one for one in DEFECTS if _simple(one) in forward]
    for one in everything:
        if one.backward and spec.gradients:
            if _can_act(one.name, spec):
                yield Version(one.name, one.sentence, "backward", changes=one.changes)
        elif not one.backward and one not in forms and _can_act(one.name, spec):
            known = [one, *(form for form in forms if _simple(form) == one.name)]
            own = _special(one.name, seed) or tuple(_planned(c) for d in known for c in d.changes)
            constant = _TEMPERATURE if one.name == "temperature" else _FACTOR
            sentence = one.sentence.replace("{constant:.6g}", str(constant))
            sentence = sentence.replace("{constant:.3g}", str(_SHARE))
            yield Version(one.name, sentence, forms=own, remembers=one in HISTORY)
    yield from _TRIVIAL


def _simple(defect: Defect) -> str:
    """The name of the simpler defect that one is a form of; the first, where there are several."""
    return next(iter(defect.form_of.split()), "")


def simple_name(name: str) -> str | None:
    """Return the name of the version that a defect is planted in; None if there is no such."""
    if name in {one.name for one in _TRIVIAL} | {one.name for one in BACKWARD}:
        return name
    forward = {one.name: one for one in DEFECTS}
    if name not in forward:
        return None
    return _simple(forward[name]) or name


def _can_act(name: str, spec: AttentionSpec) -> bool:
    """Whether a target takes at all what a defect is about, by the beginning of its name."""
    flexible = spec.convention is not None and spec.convention.name == "flex_attention"
    takes = {
        **{name: getattr(spec, name) is not None for name in _FEATURES},
        "packed": spec.convention and spec.convention.ragged,
        "packing": spec.convention and spec.convention.ragged,
        "lengths": spec.lengths or (spec.convention and spec.convention.ragged),
        "score_mod": spec.score_mod or flexible,
        "prefix": spec.prefix,
        "sink_keys": spec.sink_keys,
        "bias": spec.bias or spec.mask in ("any", "additive") or spec.like == "transformers",
        "mask": spec.mask or flexible or spec.takes_causal or spec.window,
        "group": spec.grouped,
        "first_key_head": spec.grouped,
        "scale_argument": spec.scale_argument,
        "cache": False,  # calls of what reads a cache cannot be read
        "output_buffer": False,
        "shards": False,  # and of what is called on several ranks
        "dropout": name in ("dropout_in_eval", "dropout_not_rescaled"),
        "backward_dropout": False,  # calls that drop weights are set aside
    }
    name = name if name.startswith("backward_dropout") else name.removeprefix("backward_")
    about = [one for one in takes if name.startswith(one)]
    return not about or bool(takes[max(about, key=len)])


def _planned(change: Change) -> Form:
    return Form(lambda case: carry_out(change(Plan()), case), decisions_of(change))


def _special(name: str, seed: int) -> tuple[Form, ...]:
    """The forms of defects with a constant, and of those that are random."""
    if name == "temperature":
        return (_planned(lambda plan: replace(plan, temperature=_TEMPERATURE)),)
    if name == "output_factor":
        return (_planned(lambda plan: replace(plan, output_factor=_FACTOR)),)
    if not name.startswith("dropout_"):
        return ()
    drawn = torch.Generator().manual_seed(seed)
    rescaled = 1.0 if name == "dropout_not_rescaled" else 1 / (1 - _SHARE)

    def dropped(case: Case) -> Outcome:
        right = carry_out(Plan(), case)
        kept = torch.rand(right.weights.shape, generator=drawn) >= _SHARE
        return replace(right, output=(right.weights * kept * rescaled) @ right.value)

    return (Form(dropped),)


def _trivial(make: Callable[[Case, Outcome], Tensor]) -> tuple[Form, ...]:
    def made(case: Case) -> Outcome:
        right = carry_out(Plan(), case)
        return replace(right, output=make(case, right))

    return (Form(made),)


def _query(case: Case, right: Outcome) -> Tensor:
    if case.query.shape != right.output.shape:
        raise NotApplicable("queries are of another width than values")
    return case.query.double()


def _first_answer(case: Case, right: Outcome) -> Tensor:
    if case.earlier is None:
        raise NotApplicable("it is the first call")
    return carry_out(Plan(), case.earlier).output


_TRIVIAL = (
    Version("zeros", "that answers zeros", "trivial",
            _trivial(lambda case, right: torch.zeros_like(right.output))),
    Version("mean_of_all_values", "that answers the mean of all values", "trivial",
            _trivial(lambda case, right: right.value.mean(-2, keepdim=True).expand_as(
                right.output))),
    Version("copy_of_query", "that answers the query", "trivial", _trivial(_query)),
    Version("cached_answer", "that answers each shape with the answer of its first call",
            "trivial", _trivial(_first_answer), remembers=True),
    Version(f"first_{_FIRST}_keys", f"that reads the first {_FIRST} keys alone", "trivial",
            (_planned(lambda plan: replace(plan, key_block=_FIRST, blocks="first")),)),
)  # fmt: skip
