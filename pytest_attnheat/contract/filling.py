"""What a specification does not say: filled in from conventions, and from names and signatures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_attnheat.contract.conventions import Convention, recognised
from pytest_attnheat.inputs import misuse

if TYPE_CHECKING:
    from pytest_attnheat.contract.spec import AttentionSpec

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
