"""What each field of a specification accepts, and what is filled in where it does not say."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from ..assertions.behaviour.sequences import SequenceModel
from ..assertions.behaviour.visibility import as_documents
from ..attention.call import FUNCTIONS, check_function, slopes_of
from ..attention.cases import DTYPES
from ..attention.devices import check_device
from ..attention.levels import MASK_SHAPES
from ..attention.shards import SCHEMES, Shards
from ..attention.vocabulary import ALIGNMENTS, DECLARED_FULLY_MASKED, MASK_MEANINGS
from ..callables import plans_and_runs
from ..capture.record import AttentionRecord
from ..capture.trace import Trace
from ..inputs import check_number, check_tolerance, dtype_name, misuse
from .conventions import Convention, recognised

if TYPE_CHECKING:
    from .spec import AttentionSpec

Returns: TypeAlias = Literal["output", "weights", "averaged", "dropped_weights", "lse"]
# The steps that may be rounded on purpose, in their order.
STEPS = ("query", "key", "value", "scores", "weights")


def check_fields(spec: AttentionSpec) -> None:
    """Refuse a specification that has a field of a wrong type or out of range."""
    for name, (types, is_accepted, accepted) in _ACCEPTED.items():
        given = getattr(spec, name)
        if not isinstance(given, types):
            raise TypeError(misuse(name, _shown(given), accepted))
        if given is not None and not is_accepted(given):
            raise ValueError(misuse(name, _shown(given), accepted))
    for device in spec.devices or ():
        check_device(device)
    if spec.scale is not None:
        check_number(spec.scale, "scale")
    if spec.tolerance is not None:
        check_tolerance(spec.tolerance)


def check_subject(spec: AttentionSpec) -> None:
    """Refuse what can neither be called nor was captured, and a block without its inputs."""
    subject: Any = spec.subject
    called = callable(subject) or plans_and_runs(subject) or spec.call is not None
    if not called and not isinstance(subject, Trace | AttentionRecord):
        accepted = "a callable, as subject(query, key, value), or what capture_attention recorded"
        raise TypeError(misuse("subject", type(subject).__name__, accepted))
    if isinstance(subject, type):
        own = convention_of(spec)
        if spec.call is None and not (own and own.makes):
            raise TypeError(misuse("subject", f"the class {subject.__name__}", "an instance"))
    if spec.inputs is None and _is_block(subject):
        named = subject.name if isinstance(subject, SequenceModel) else type(subject).__name__
        got = f"{named}, which is not called with query, key and value"
        accepted = "a block with its inputs: AttentionSpec(module, inputs=...) examines it as one"
        raise ValueError(misuse("subject", got, accepted))


def _is_block(subject: object) -> bool:
    """Whether a subject is a module whose forward takes fewer than three tensors, or says so."""
    if isinstance(subject, SequenceModel):
        return True
    if not isinstance(subject, nn.Module) or isinstance(subject, nn.MultiheadAttention):
        return False
    taken = inspect.signature(subject.forward).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in taken):
        return False
    needed = [p for p in taken if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    named = {"query", "key", "value", "q", "k", "v"} & {p.name for p in taken}
    return len(needed) < 3 and len(named) < 3


def check_rules(spec: AttentionSpec) -> None:
    """Refuse what does not fit the inputs of a block, or the heads, and functions that fail."""
    # Else what they do wrong would be charged to the subject.
    if spec.inputs is not None:
        _check_block(spec, spec.inputs)
    elif isinstance(spec.documents, Tensor) and not spec.is_captured:
        accepted = "of a function, the keyword of them; numbers are those of a block with inputs="
        raise ValueError(misuse("documents", _shown(spec.documents), accepted))
    elif spec.memory is not None:
        raise ValueError(misuse("memory", repr(spec.memory), "None, but of a block with inputs="))
    elif not spec.has_heads and spec.heads not in (None, 1):
        got = f"{spec.heads} numbers per head for the layout {spec.layout!r}, which has no heads"
        raise ValueError(misuse("sinks or alibi", got, "one number, or a layout with h"))
    if spec.devices is None or "cpu" in spec.devices:
        for name in FUNCTIONS:
            if not isinstance(getattr(spec, name), Tensor):
                check_function(name, getattr(spec, name))
    if callable(spec.alibi):
        slopes_of(spec.alibi, 4 if spec.has_heads else 1)


def _check_block(spec: AttentionSpec, inputs: Tensor) -> None:
    batch, length = inputs.shape[:2]
    own = getattr(spec.subject, "arguments", None) or {}
    if spec.memory is not None and spec.memory not in {**own, **(spec.arguments or {})}:
        raise ValueError(misuse("memory", repr(spec.memory), "the name of one of arguments"))
    if isinstance(spec.documents, str):
        accepted = f"of a block, numbers of shape {(batch, length)} or {(length,)}"
        raise ValueError(misuse("documents", repr(spec.documents), accepted))
    if spec.documents is not None:
        as_documents(spec.documents, (batch, length))
    if isinstance(spec.may_see, Tensor) and spec.may_see.shape != (length, length):
        accepted = f"a function, or booleans of shape {(length, length)}"
        raise ValueError(misuse("may_see", f"shape {tuple(spec.may_see.shape)}", accepted))


def _is_text(given: object) -> bool:
    return isinstance(given, str)


def _are_sides(window: tuple[Any, ...]) -> bool:
    return len(window) == 2 and all(
        side is None or (type(side) is int and side >= 0) for side in window
    )


def _is_input(inputs: Tensor) -> bool:
    floats = inputs.is_floating_point() and inputs.ndim == 3
    tokens = inputs.dtype in (torch.int64, torch.int32) and inputs.ndim == 2
    if not (floats or tokens) or min(inputs.shape[:2]) < 2 or inputs.numel() == 0:
        return False
    # No other token is known to replace the only one by.
    return floats or bool((inputs != inputs[0, 0]).any())


def _shown(given: object) -> str:
    if isinstance(given, Tensor):
        return f"{dtype_name(given)} {tuple(given.shape)}"
    return repr(given)


def _one_of(known: Sequence[str], *, or_none: bool = False) -> tuple[Any, Any, str]:
    names = ", ".join(map(repr, known))
    types, ending = (str | None, ", or None") if or_none else (str, "")
    return types, known.__contains__, f"one of {names}{ending}"


_TEXT = (str, lambda _: True, "a text")
_FLAG = (bool | None, lambda _: True, "True, False, or None")
_KEYWORD = (str | None, str.isidentifier, "the name of a parameter, or None")
_FUNCTION = (Callable | None, lambda _: True, "a function, or None")
_COUNT = (int, lambda count: count >= 0, "a whole number from 0")
_PER_HEAD = (
    Tensor | str | None,
    lambda given: not isinstance(given, Tensor) or given.ndim == 1,
    "a tensor of one number per head, the keyword of one, or None",
)
# What each field accepts: its types, what else is true of it, and both in words.
_ACCEPTED: dict[str, tuple[Any, Callable[[Any], bool], str]] = {
    "name": _TEXT,
    "inputs": (Tensor | None, _is_input,
               "floats (batch, length, width) or token ids (batch, length) in int64 or int32, of "
               "two or more sequences of two or more tokens, which are not all of one id, or None"),
    "layout": (str, lambda letters: sorted(letters) in (sorted("bhld"), sorted("bld")),
               "the letters b (batch), h (heads), l (length) and d (width) in any order, h or "
               "not: 'bhld', 'blhd', 'bld'"),
    "mask": _one_of(MASK_MEANINGS, or_none=True),
    "mask_argument": _TEXT,
    "causal": _one_of(ALIGNMENTS, or_none=True),
    "causal_argument": _TEXT,
    "window": (tuple | str | None, lambda given: isinstance(given, str) or _are_sides(given),
               "a pair of whole numbers from 0, with None for a side that ends nowhere, the "
               "keyword of one, or None"),
    "grouped": _FLAG,
    "dropout": (bool | str | None, lambda _: True, "True, False, its keyword, or None"),
    "returns": _one_of(get_args(Returns)),
    "fully_masked": _one_of(DECLARED_FULLY_MASKED),
    "dtypes": (tuple | list, lambda names: names and all(name in DTYPES for name in names),
               f"a tuple or list of one or more of {', '.join(map(repr, DTYPES))}"),
    "devices": (tuple | list | None, lambda names: names and all(map(_is_text, names)),
                "a tuple or list of one or more names of devices, or None for all that are there"),
    "softcap": (Real | str | None, lambda cap: isinstance(cap, str) or 0 < cap < math.inf,
                "a finite number above 0, the keyword of one, or None"),
    "sinks": _PER_HEAD,
    "alibi": (Callable | Tensor | str | None, _PER_HEAD[1],
              f"a function of the number of heads, or {_PER_HEAD[2]}"),
    "bias": _KEYWORD,
    "score_mod": _FUNCTION,
    "may_see": (Callable | Tensor | None, lambda seen: not isinstance(seen, Tensor)
                or (seen.dtype == torch.bool and seen.ndim == 2),
                "a function of positions, booleans (query_len, key_len), or None"),
    "chunk": (int | str | None, lambda size: isinstance(size, str) or size > 0,
              "a whole number above 0, the keyword of one, or None"),
    "prefix": _COUNT,
    "sink_keys": _COUNT,
    "documents": (Tensor | str | None, lambda given: isinstance(given, str) or given.ndim in (1, 2),
                  "numbers (batch, length) or (length,), the keyword of them, or None"),
    "lengths": _KEYWORD,
    "scale_argument": _KEYWORD,
    "mask_shape": _one_of((*MASK_SHAPES, "(L, S)", "(B, S)"), or_none=True),
    "rounded": (Mapping | None, lambda steps: set(steps) <= set(STEPS)
                and all(isinstance(to, torch.dtype) for to in steps.values()),
                f"a dtype of torch for some of {', '.join(map(repr, STEPS))}, or None"),
    "gradients": (bool, lambda _: True, "True or False"),
    "few_shapes": (bool, lambda _: True, "True or False"),
    "square": _FLAG,
    "reference": _FUNCTION,
    "arguments": (Mapping | None, lambda given: all(map(_is_text, given)),
                  "values by name, or None"),
    "memory": _KEYWORD,
    "like": (Convention | str | None, lambda _: True, "the name of a convention, one, or None"),
    "call": _FUNCTION,
    "sharding": (str | Shards | None, lambda given: isinstance(given, Shards) or given in SCHEMES,
                 f"one of {', '.join(map(repr, SCHEMES))}, or None"),
    "uneven": (bool, lambda _: True, "True or False"),
}  # fmt: skip


# What a keyword is usually called; looked for where none is declared.
_USUAL = {
    "scale_argument": ("scale", "softmax_scale", "sm_scale", "scaling"),
    "softcap": ("softcap", "logits_soft_cap", "attn_logit_softcapping"),
    "sinks": ("sinks", "s_aux", "learnable_sink"),
    "alibi": ("alibi_slopes",),
}
# Who says one of these says how it is called, so that no convention is looked for.
_CALLED = {"layout", "mask_argument", "causal_argument", "scale_argument"}


def convention_of(spec: AttentionSpec) -> Convention | None:
    """Return the convention that is named, or, where nothing says otherwise, that fits."""
    if spec.convention is not None or spec.call is not None or spec.typed & _CALLED:
        return spec.convention
    return recognised(spec.parameters or {})


def by_convention(spec: AttentionSpec) -> dict[str, Any]:
    """Return what the convention says by which a subject is called, if it is one of the table."""
    if spec.call is not None and spec.like is not None:
        raise ValueError(misuse("call", "a function beside like", "one of the two"))
    for name in ("dropout", "arguments") if spec.call is not None else ():
        if getattr(spec, name):
            accepted = "None: the function of call= says it"
            raise ValueError(misuse(name, f"{getattr(spec, name)!r} beside call", accepted))
    if spec.call is not None:
        return {name: None for name in ("mask", "causal") if name not in spec.typed}
    if spec.inputs is not None or spec.is_captured:
        if spec.convention is not None:
            got = repr(spec.convention.name)
            raise ValueError(misuse("like", got, "None, of a block or a trace"))
        return {}
    own = convention_of(spec)
    if own is None:
        return {}
    vars(spec)["convention"] = own
    declared = own.declared(spec.parameters or {})
    found = {n: v for n, v in declared.items() if n not in spec.typed}
    return found | ({"like": own.name} if spec.like is None else {})


def by_signature(spec: AttentionSpec) -> dict[str, Any]:
    """Return what the subject's own name and signature say."""
    found: dict[str, Any] = {}
    if not spec.name:
        whole = getattr(spec.subject, "module", spec.subject)
        found["name"] = getattr(whole, "__name__", type(whole).__name__)
    if spec.is_captured and not spec.name:
        found["name"] = getattr(spec.subject, "layer", "") or "the trace"
    if spec.is_captured and spec.causal == "bottom_right" and spec.window is None:
        accepted = "'bottom_right' with window= what is counted from it, or None"
        raise ValueError(misuse("causal", "'bottom_right' without a window", accepted))
    if spec.inputs is None and not spec.is_captured:
        found |= _keywords(spec) | _without_keywords(spec)
    return found | (_of_shards(spec) if spec.sharding is not None else {})


# What is not scattered to ranks, and is not gathered.
_WHOLE = ("mask", "bias", "documents", "lengths", "inputs", "call", "reference", "memory")


def _of_shards(spec: AttentionSpec) -> dict[str, Any]:
    """What is true of a subject on several ranks."""
    found = {**dict.fromkeys(_WHOLE), "returns": "output", "square": True}
    for name, only in found.items():
        if name in spec.typed and getattr(spec, name) not in (only, None):
            got = f"{getattr(spec, name)!r} beside sharding"
            raise ValueError(misuse(name, got, f"{only!r}: nothing else is scattered to ranks"))
    if spec.is_captured:
        raise ValueError(misuse("sharding", repr(spec.sharding), "None, of what was captured"))
    return found


def _keywords(spec: AttentionSpec) -> dict[str, Any]:
    found: dict[str, Any] = {
        "grouped": spec.names("enable_gqa") if spec.grouped is None else spec.grouped,
        "dropout": spec.names("dropout_p") if spec.dropout is None else spec.dropout,
    }
    usual = {"mask_argument": "attn_mask", "causal_argument": "is_causal"}
    for name in ("mask_argument", "causal_argument", *spec.keywords):
        _check_named(spec, name, usual.get(name, ""))
    if spec.convention is None:
        found |= {field: name for field, names in _USUAL.items() for name in names
                  if getattr(spec, field) is None and spec.names(name)
                  and (spec.parameters is not None or name == "scale")}  # fmt: skip
    if spec.mask == "keep" and spec.parameters is None:  # PyTorch's own
        found["mask"] = "any"
    return found


def _without_keywords(spec: AttentionSpec) -> dict[str, Any]:
    """What is left of the mask and of causality if the subject has no keyword for them."""
    # Only a default is dropped. What was declared is kept if it has an effect, else refused.
    left: dict[str, Any] = {}
    accepted = "None, or with {}_argument= the name of its parameter"
    if spec.lacks(spec.mask_argument, "mask"):
        if spec.mask not in ("keep", None):
            got = f"{spec.mask!r} for a subject that has no parameter {spec.mask_argument}"
            raise ValueError(misuse("mask", got, accepted.format("mask")))
        left["mask"] = None
    if spec.lacks(spec.causal_argument, "causal"):
        if spec.causal == "bottom_right" and spec.window is None:
            got = (
                "'bottom_right' for a subject that has neither a parameter "
                f"{spec.causal_argument} nor a window"
            )
            accepted = f"{accepted.format('causal')}, or with window= what is counted from it"
            raise ValueError(misuse("causal", got, accepted))
        left["causal"] = None if spec.causal == "top_left" else spec.causal
    return left


def _check_named(spec: AttentionSpec, name: str, default: str) -> None:
    """Refuse a keyword that was given and that the subject has no parameter for."""
    keyword = getattr(spec, name)
    if keyword != default and not spec.takes(keyword):
        accepted = f"a parameter of the subject: {', '.join(spec.parameters or {})}"
        raise ValueError(misuse(name, repr(keyword), accepted))
