"""What a specification says wrongly, or leaves unsaid: which other one would be right."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from .block_checks import BLOCK_CHECKS
from .captured import causal_inside
from .conventions import fitting
from .examination import Check, Examination, Skipped
from .needs import all_undeclared, undeclared_tensors
from .spec import AttentionSpec

_MASKS = ({"mask": "keep"}, {"mask": "drop"})
_LAYOUTS = ({"layout": "bhld"}, {"layout": "blhd"})
_EMPTY_ROWS = ({"fully_masked": "zero"}, {"fully_masked": "uniform"}, {"fully_masked": "nan"})
_CAUSAL = ({"causal": "top_left"}, {"causal": "bottom_right"})
# What else may have been meant, by the check that fails where the declaration is wrong.
_OTHERWISE: dict[str, tuple[dict[str, Any], ...]] = {
    "shape_and_dtype": _LAYOUTS,
    "plain": (*_LAYOUTS, {"window": (None, 0)}),
    "masked": _MASKS,
    "no_leakage_through_mask": _MASKS,
    "padding": _MASKS,
    # Of a causal mask at the other corner, other rows see nothing.
    "causal_rectangular": (
        *_CAUSAL,
        *_EMPTY_ROWS,
        *(one | empty for one in _CAUSAL for empty in _EMPTY_ROWS),
    ),
    "fully_masked": (*_EMPTY_ROWS, *_MASKS),
}
_OF_BLOCKS: dict[str, tuple[dict[str, Any], ...]] = {
    "no_leakage": ({"causal": None}, {"causal": "top_left"}),
    "decoding": ({"causal": None},),
    "attention_inside": ({"causal": None},),
}
# What the other declaration says, in words; of causality only where a block is judged.
_WORDS = {
    ("mask", "keep"): "True where a query may attend",
    ("mask", "drop"): "True where a query must not attend",
    ("window", (None, 0)): "it is always causal",
    ("causal", None): "each output depends on the whole sequence, as in an encoder; if it is to "
    "be causal, its mask is missing",
}
_DECODER = (
    "no output depends on a later token, as in a decoder; if it is to be an encoder, some mask "
    "hides too much"
)


def hints_of(spec: AttentionSpec, unsaid: Sequence[str] | None = None) -> tuple[str, ...]:
    """What a specification leaves unsaid of parameters that sound like one of its fields."""
    # Or of a module of PyTorch, which is no function of queries, keys and values.
    found = [*(all_undeclared(spec) if unsaid is None else unsaid)]
    if tensors := undeclared_tensors(spec):
        found.append(tensors)
    said = spec.convention or spec.is_block or spec.call
    likes = [] if said else fitting(spec.parameters or {})
    if likes:
        found = [f"its parameters are those of {like.name}, {like.about}: like={like.name!r} says "
                 "how it is called" for like in likes]  # fmt: skip
    subject: Any = spec.subject
    if spec.inputs is None and type(subject).__module__.startswith("torch.nn.modules"):
        kind = type(subject).__name__
        found = [f"{kind} is a block: hand it to check_attention itself, or give inputs= as well"]
    return tuple(found)


def wrong_declaration(check: Check, examination: Examination) -> str:
    """Say which other declaration would be right, if there is one, of a check that failed."""
    spec = examination.spec
    if _leaves_causal_aside(check, examination):
        text, argument = _given(spec, ["causal"]), spec.causal_argument
        if spec.call is not None:
            return (
                f"{text}, but case.causal changes nothing: the function of call= does not hand it "
                "on"
            )
        return (
            f"{text}, but {argument}=True changes nothing, and no parameter is called {argument}: "
            "declare causal=None, or its causal_argument"
        )
    for changes in _others(check, spec):
        if _passes(check, examination, changes):
            return meant_instead(spec, changes)
    return ""


def _given(spec: AttentionSpec, names: Collection[str]) -> str:
    """Say what is declared, or is assumed where nobody declares it."""
    given = " and ".join(f"{name}={getattr(spec, name)!r}" for name in names)
    given += " is" if len(names) == 1 else " are"
    if not any(map(spec.says, names)):
        return f"not declared: {given} assumed"
    if spec.convention and spec.typed.isdisjoint(names):
        return f"wrong declaration: {given} what {spec.convention.name} means"
    return f"wrong declaration: {given} declared"


def meant_instead(spec: AttentionSpec, changes: Mapping[str, Any]) -> str:
    """Say what the code means in place of what is declared, and how to declare that."""
    text = _given(spec, changes)
    text += f", but the code means {' and '.join(map(repr, changes.values()))}"
    is_decoder = spec.causal is None and "causal" in changes
    said = [_DECODER if is_decoder else _WORDS.get(one, "") for one in changes.items()]
    words, _, otherwise = "; ".join(filter(None, said)).partition("; if ")
    text += f": {words}" * bool(words)
    if text.startswith("not declared"):
        fields = ", ".join(f"{name}={other!r}" for name, other in changes.items())
        text += f"; if it is to mean that, declare it: AttentionSpec(..., {fields})"
    text += f"; if {otherwise}" * bool(otherwise)
    reads_floats = "mask" in changes and spec.mask == "additive"
    return text + "; or it reads floats as booleans" * reads_floats


def _others(check: Check, spec: AttentionSpec) -> Iterator[dict[str, Any]]:
    """What else may be declared; of a block that is causal inside, nothing about causality."""
    if spec.is_block and spec.causal is not None and causal_inside(spec):
        return
    for changes in (_OF_BLOCKS if spec.is_block else _OTHERWISE).get(check.name, ()):
        is_other = all(getattr(spec, name) != other for name, other in changes.items())
        # What call= returns has one layout.
        if is_other and not (spec.call is not None and "layout" in changes):
            yield changes


def _passes(check: Check, examination: Examination, changes: dict[str, Any]) -> bool:
    """Whether a check passes with another declaration."""
    spec = replace(examination.spec, **changes)
    # A block that is not a decoder does not decode: whether it is one, leaks tell, and whether its
    # attention is right for that, what is captured inside.
    telling = [one for one in BLOCK_CHECKS if one.name in ("no_leakage", "attention_inside")]
    for one in telling if spec.is_block else [check]:
        try:
            one.examine(replace(examination, spec=spec))
        except Skipped:
            if not spec.is_block:
                return False
        except Exception:  # neither is right
            return False
    return True


def _leaves_causal_aside(check: Check, examination: Examination) -> bool:
    """Whether the subject takes any keyword, and is_causal is one of those it does not know."""
    spec = examination.spec
    if check.name != "causal" or spec.is_block or spec.names(spec.causal_argument):
        return False
    try:
        call = examination.case(sizes=(7, 7))
        outputs = [spec.ask(replace(call, causal=causal)).output for causal in (False, True)]
    except Exception:  # then that is what is wrong
        return False
    return torch.equal(*outputs)
