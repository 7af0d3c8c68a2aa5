"""What a check needs to be declared: the reason why it is skipped, or None."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any, TypeAlias

from ..assertions.behaviour.sequences import SequenceModel, name_of_cache, recognise
from .asking import KEYWORDS, keyword_of, model_of
from .spec import AttentionSpec

Need: TypeAlias = Callable[[AttentionSpec], "str | None"]
# A cache, or the flag that asks for one.
_CACHE = re.compile("cache|past")
_FIELDS = {option: field for field, option in KEYWORDS.items()}


def all_of(*needs: Need) -> Need:
    """Return the need for all of some: the reason is the first."""
    return lambda spec: next((reason for need in needs if (reason := need(spec))), None)


def _need(holds: Callable[[AttentionSpec], Any], reason: str, field: str | None = None) -> Need:
    """Return the need for what holds; the reason names a parameter that sounds like the field."""

    def need(spec: AttentionSpec) -> str | None:
        if holds(spec):
            return None
        return (undeclared(spec, field) if field else "") or reason

    return need


takes_mask = _need(lambda spec: spec.mask is not None, "it does not take a mask", "mask")
takes_causal = _need(lambda spec: spec.takes_causal, "it does not take is_causal", "causal")
takes_groups = _need(lambda spec: spec.grouped and spec.has_heads,
                     "it is not declared to take grouped heads")  # fmt: skip
takes_dropout = _need(lambda spec: spec.dropout, "it is not declared to take dropout_p")
declares_fully_masked = _need(lambda spec: spec.fully_masked != "undefined",
                              'fully_masked="undefined" declares nothing')  # fmt: skip
returns_weights = _need(lambda spec: spec.returns not in ("output", "lse"),
                        "it is declared to return no weights")  # fmt: skip
returns_lse = _need(lambda spec: spec.returns == "lse", "it is declared to return no log-sum-exp")
has_gradients = _need(lambda spec: spec.gradients and spec.rounded is None,
                      "it is declared to have no gradients")  # fmt: skip


def _always(spec: AttentionSpec, *names: str) -> bool:
    """Whether a subject always does any of these; not where it takes a keyword of it."""
    given = [getattr(spec, name) for name in names]
    return any(not (one is None or isinstance(one, str) or (type(one) is int and not one))
               for one in given)  # fmt: skip


has_no_positions = _need(
    lambda spec: (
        not _always(spec, "window", "chunk", "may_see", "score_mod", "prefix", "sink_keys", "alibi")
    ),
    "padding on the left would move its positions",
)


def takes_option(name: str) -> Need:
    """Return the need for a keyword of a feature, one of `OPTIONS`."""

    def need(spec: AttentionSpec) -> str | None:
        if keyword_of(spec, name) is not None:
            return None
        if getattr(spec, name, None) is not None:
            return f"its own {name} are part of every call"
        return undeclared(spec, _FIELDS[name]) or f"it takes no {name}"

    return need


keeps_strides = _need(lambda spec: spec.sharding is None,
                      "each rank gets shards that are laid out anew")  # fmt: skip
takes_several_lengths = _need(lambda spec: spec.convention and spec.convention.ragged,
                              "its sequences are all as long")  # fmt: skip
reads_a_cache = _need(lambda spec: spec.convention and spec.convention.stored,
                      "it reads no cache")  # fmt: skip
takes_float_mask = _need(
    lambda spec: spec.mask in ("additive", "any"), "its mask is not declared to be of floats"
)
# By an argument, or always.
may_be_causal = _need(
    lambda spec: (
        spec.takes_causal
        or (spec.causal == "bottom_right" and isinstance(spec.window, tuple) and not spec.window[1])
    ),
    "it does not take is_causal",
    "causal",
)
# By its alignment, or by a mask.
decodes_in_chunks = _need(
    lambda spec: (
        not _always(spec, "may_see", "score_mod", "prefix")
        and (
            spec.causal == "bottom_right"
            or (spec.mask is not None and not _always(spec, "window", "chunk", "alibi"))
        )
    ),
    "a chunk cannot be told where it stands, or what it may see",
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
    return _undeclared_mask(spec) or (
        "nothing says that it takes a mask: SequenceModel(module, mask=, mask_argument=)"
    )


def _undeclared_mask(spec: AttentionSpec) -> str:
    """Say which parameter of a block looks like a mask, where nothing is declared of any."""
    model = model_of(spec)
    given = {*model.arguments, next(iter(spec.parameters or {}), "")}  # the first is the input
    names = [name for name in spec.sounding_like("mask") if name not in given]
    if model.mask is not None or not names:
        return ""
    names.sort(key=lambda name: "padding" not in name)
    return (
        f"it takes {names[0]}=, and nothing says what that means: SequenceModel(module, mask=..., "
        f"mask_argument={names[0]!r})"
    )


def undeclared_tensors(spec: AttentionSpec) -> str:
    """Say which optional tensors an unknown block takes that no check gives it."""
    # What sounds like a mask, causality or a cache is told of elsewhere. Nothing says what the
    # others are for.
    model = model_of(spec) if spec.is_block else None
    if model is None or (spec.mask is None and "mask" in spec.typed):
        return ""
    if not isinstance(spec.implementation, SequenceModel) and recognise(model.module).mask:
        return ""
    told = (model.mask_argument, model.positions_argument, model.memory_argument)
    given = {*model.arguments, *told, *spec.sounding_like("mask"), *spec.sounding_like("causal")}
    if model.mask is not None:  # padding is declared already
        given |= {*spec.sounding_like("lengths")}
    names = [
        name
        for name, one in [*(spec.parameters or {}).items()][1:]  # the first is the input
        if name not in given and not _CACHE.search(name.lower()) and _may_be_tensor(one)
    ]
    if not names:
        return ""
    padding = f"if it marks padding, SequenceModel(module, mask=..., mask_argument={names[0]!r}); "
    return (
        f"it takes {', '.join(f'{name}=' for name in names)}, of which nothing is declared, and no "
        f"check passes it: {padding * (model.mask is None)}if every call has it, "
        f"arguments={{{names[0]!r}: ...}}"
    )


def _may_be_tensor(parameter: inspect.Parameter) -> bool:
    """Whether a parameter may be left out, and may be a tensor as far as its signature tells."""
    said = parameter.annotation
    untold = said is parameter.empty or said is Any
    return parameter.default is None and (untold or "Tensor" in str(said))


order_may_matter = _need(
    lambda spec: spec.causal is None, "to a causal block the order of tokens matters in any case"
)


# What is typed first, and what may be typed in its place.
_MEANINGS = {
    "mask": ("'keep'", "or 'drop', 'additive'"), "causal": ("'top_left'", "or 'bottom_right'"),
}  # fmt: skip


def undeclared(spec: AttentionSpec, field: str) -> str:
    """Say what a specification leaves unsaid: a parameter that sounds like one of its fields."""
    if spec.is_block:
        is_none = spec.mask is None and "mask" in spec.typed
        return _undeclared_mask(spec) if field == "mask" and not is_none else ""
    if spec.is_captured or spec.convention or spec.call:
        return ""
    names = spec.sounding_like(field)
    if field in KEYWORDS:
        known = {spec.mask_argument, *spec.keywords.values(), *(spec.arguments or ())}
        names = [name for name in names if name not in known]
        said, meaning = f"{field}={names[0]!r}" if names else "", ""
        is_declared = getattr(spec, field) is not None or field in spec.typed
    else:
        is_declared = spec.takes_causal if field == "causal" else spec.mask is not None
        is_declared |= names == [getattr(spec, f"{field}_argument")]  # or it is None on purpose
        usual, others = _MEANINGS[field]
        said = f"{field}_argument={names[0]!r}, {field}={usual}" if names else ""
        meaning = f" ({others})"
    if is_declared or not names:
        return ""
    return (
        f"it takes {names[0]}=, and the specification does not say what that means: "
        f"AttentionSpec(..., {said}){meaning}"
    )


def all_undeclared(spec: AttentionSpec) -> list[str]:
    """Say all that a specification leaves unsaid."""
    said = (undeclared(spec, field) for field in ("mask", "causal", *KEYWORDS))
    return list(dict.fromkeys(text for text in said if text))
