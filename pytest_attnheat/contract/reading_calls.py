"""What a call of a target asks: its arguments, read as a described call, the inverse of asking."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..attention.call import Call
from .asking import KEYWORDS, dense, keyword_of
from .conventions.dense import with_itself
from .conventions.reading import Arguments, Given, SetAsideError, UnreadError, as_mask, four, three
from .spec import AttentionSpec

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Arguments that change nothing of what is computed.
_INERT = {"enable_gqa", "deterministic", "num_splits", "pack_gqa", "sm_margin", "backend",
          "tensor_layout", "kv_layout", "return_lse", "return_attn_probs", "return_softmax_lse",
          "is_eval", "need_weights", "kernel_options"}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Reading:
    """A call of a target as it is understood."""

    call: Call  # What it asks. Its tensors are the arguments, turned: gradients reach them
    given: Given  # Its tensors, and how answers are turned
    scale_given: bool  # Whether the scale is an argument of the call


def _of_torch(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None,  # type: ignore[no-untyped-def]
              enable_gqa=False):  # fmt: skip
    """Only its signature counts: PyTorch's own function tells none."""


def signature_of(spec: AttentionSpec) -> inspect.Signature:
    """Return the signature of a target; that of a builtin is PyTorch's own."""
    if spec.parameters is None:
        return inspect.signature(_of_torch)
    return inspect.Signature(list(spec.parameters.values()))


def read(spec: AttentionSpec, given: Sequence[Any], named: Mapping[str, Any]) -> Reading:
    """Read a call of a target as its specification says that it is called."""
    if why := unreadable(spec):
        raise UnreadError(why)
    bound = signature_of(spec).bind(*given, **named)
    bound.apply_defaults()
    arguments = dict(bound.arguments)
    for parameter in bound.signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments |= arguments.pop(parameter.name)
        elif parameter.kind is parameter.VAR_POSITIONAL and arguments.pop(parameter.name):
            raise UnreadError(f"more is given by position than is described (*{parameter.name})")
    told = spec.convention.read if spec.convention else None
    tensors = (told or three)(spec, arguments)
    for tensor in (tensors.query, tensors.key, tensors.value):
        if tensor.dtype not in _DTYPES or tensor.dtype != tensors.query.dtype:
            raise UnreadError(f"query, key and value are of {tensor.dtype}, or of several dtypes")
    features = {**tensors.features, **_features(spec, arguments)}
    _refuse_others(spec, bound.signature, arguments)
    call = Call(tensors.query, tensors.key, tensors.value, **features)
    return Reading(spec.described(call), tensors, call.scale is not None)


def unreadable(spec: AttentionSpec) -> str:
    """Say why no call of a target can be read; empty if calls can be."""
    if spec.is_captured:
        return "it was captured, and cannot be called"
    if spec.is_block:
        return "a block has projections of its own: what its attention is given is not known"
    if spec.sharding is not None:
        return "it is called on several ranks, on each with a part of the call"
    if spec.call is not None:
        return "call= says how a call is made, not how one is read"
    if spec.reference is not None:
        return "reference= computes something else than attention as it is described"
    if spec.rounded:
        return "steps are rounded on purpose, which planted versions do not do"
    known = spec.convention
    if known is not None and known.arrange is not dense and known.read is None:
        return f"the convention {known.name} says how a call is made, not how one is read"
    return ""


# --- what a call has besides


def _features(spec: AttentionSpec, arguments: Arguments) -> dict[str, Any]:
    """Take out what is given under the keywords that are declared, as fields of `Call`."""
    found: dict[str, Any] = {}
    dropout = spec.dropout if isinstance(spec.dropout, str) else "dropout_p"
    if arguments.pop(dropout, 0.0):
        raise SetAsideError("it drops weights at random")
    if spec.takes_causal and arguments.pop(spec.causal_argument, False):
        found["causal"] = True
    if spec.mask is not None and (mask := arguments.pop(spec.mask_argument, None)) is not None:
        found |= _mask(spec, mask)
    for name in KEYWORDS.values():
        keyword = keyword_of(spec, name)
        given = None if keyword is None else arguments.pop(keyword, None)
        if given is None:
            continue
        value = _value(spec, name, given)
        if value is not None:
            found[name] = value
    return found


def _mask(spec: AttentionSpec, mask: object) -> dict[str, Any]:
    """A mask as booleans, True where a query may attend; or floats, as a bias."""
    if not isinstance(mask, Tensor):
        raise UnreadError(f"its mask is no tensor, but {type(mask).__name__}")
    if spec.mask_shape == "(B, S)" or (not spec.has_heads and mask.ndim == 3):
        whole = mask[:, None, None] if mask.ndim == 2 else mask[:, None]
    else:
        whole = four(mask)
    if mask.dtype == torch.bool:
        if spec.mask == "additive":
            raise UnreadError("its mask is boolean, where floats are declared")
        return {"mask": ~whole if spec.mask == "drop" else whole}
    if not mask.is_floating_point():
        raise UnreadError(f"its mask is of {mask.dtype}")
    if spec.mask not in ("additive", "any"):
        raise UnreadError("its mask holds floats, where booleans are declared")
    return as_mask(whole)


def _value(spec: AttentionSpec, name: str, given: Any) -> Any:
    """A value as `Call` has it; None where it says that there is none."""
    if name == "window":
        return _window(spec, given)
    if name in ("softcap", "chunk"):
        return given if given > 0 else None  # 0 is none, and so is -1
    if name == "scale":
        return float(given)
    if not isinstance(given, Tensor):
        raise UnreadError(f"{keyword_of(spec, name)} is no tensor, but {type(given).__name__}")
    if name in ("alibi", "sinks") and given.ndim != 1:
        raise UnreadError(f"{keyword_of(spec, name)} has {given.ndim} dimensions, not one per head")
    if name == "bias":
        return four(given)
    return (given, given) if name == "documents" else given


def _window(spec: AttentionSpec, given: Any) -> tuple[int | None, int | None] | None:
    if isinstance(given, int):  # the left side alone
        convert = (spec.convention.values if spec.convention else {}).get("window")
        given = (given - (convert is with_itself), None)
    left, right = (None if side is None or side < 0 else int(side) for side in given)
    return None if left is right is None else (left, right)


def _refuse_others(spec: AttentionSpec, of: inspect.Signature, arguments: Arguments) -> None:
    """Refuse an argument that is not described, unless it has its default."""
    usual = {name: one.default for name, one in of.parameters.items()}
    said = dict(spec.arguments or {})
    for name, given in arguments.items():
        if name in _INERT or given is None or given is usual.get(name):
            continue
        if name in said and (given is said[name] or given == said[name]):
            continue
        if not isinstance(given, Tensor) and given == usual.get(name):
            continue
        raise UnreadError(
            f"{name}={_shown(given)} is not described: say what it means in an AttentionSpec, and "
            "grade that"
        )


def _shown(given: object) -> str:
    return f"<{tuple(given.shape)}>" if isinstance(given, Tensor) else repr(given)[:60]
