"""How a call of attention becomes a call of the subject, and its answer one in our own shapes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..assertions.behaviour.sequences import SequenceModel, as_meant, recognise
from ..attention.call import Call, MaySee
from ..attention.levels import OPTIONS
from ..attention.storage import Fault
from ..callables import exits_as_errors

if TYPE_CHECKING:
    from .spec import AttentionSpec

_NAMES = {"b": "batch", "h": "heads", "l": "length", "d": "width"}
# Fields of `Call` that a subject may take under a keyword, by the field of the specification that
# names it.
KEYWORDS = {"scale_argument" if name == "scale" else name: name for name in OPTIONS}


class UndeclaredError(TypeError):
    """A call has what the subject is not declared to take."""


@dataclass(frozen=True)
class Answer:
    """What a subject returned."""

    output: Tensor  # (batch, heads, query_len, value_dim)
    besides: Any  # What it returned beside the output; None if nothing is declared
    fault: Fault | None = None  # What it did to a cache that it was not to do; None if nothing


@dataclass(frozen=True)
class Beside:
    """What a convention found beside a result: what became of a cache."""

    result: Any  # What the subject returned, or wrote into a buffer
    fault: Fault | None  # What is wrong with the cache; None if nothing is


def ask(spec: AttentionSpec, call: Call, *, dropout: float = 0.0, besides: bool = False) -> Answer:
    """Call the subject of a specification, see `AttentionSpec.ask`."""
    convention = spec.convention
    arguments = dict(spec.arguments or {}) | dict(_arguments(spec, call))
    if dropout:
        arguments["dropout_p" if spec.dropout is True else str(spec.dropout)] = dropout
    if besides and convention is not None:
        arguments |= convention.besides
    with exits_as_errors():
        if spec.call is not None:
            result = spec.call(spec.subject, call)
        else:
            result = (dense if convention is None else convention.arrange)(spec, call, arguments)
    fault = None
    if isinstance(result, Beside):
        result, fault = result.result, result.fault
    return replace(_answer(spec, result, call, paired=besides or convention is None), fault=fault)


def dense(spec: AttentionSpec, call: Call, arguments: Mapping[str, Any]) -> Any:
    """Call a subject with query, key and value in its layout; return what it returns."""
    return spec.implementation(*(to_layout(spec, t) for t in call.tensors), **arguments)


def _answer(spec: AttentionSpec, result: Any, call: Call, *, paired: bool) -> Answer:
    output, more = result, None
    if isinstance(result, tuple | list) and result:
        output, more = result[0], result[1] if len(result) > 1 else None
    if spec.returns == "output":
        more = None
    elif paired and (not isinstance(result, tuple | list) or len(result) < 2):
        what = "lse" if spec.returns == "lse" else "weights"
        raise TypeError(
            f"{spec.name}: returns={spec.returns!r} declares a pair (output, {what}); got "
            f"{type(result).__name__}"
        )
    return Answer(_from_layout(spec, output, call.shapes["output"]), more)


def keyword_of(spec: AttentionSpec, name: str) -> str | None:
    """Return the keyword under which the subject takes a field of `Call`, None without one."""
    (field,) = (field for field, called in KEYWORDS.items() if called == name)
    given = getattr(spec, field)
    return given if isinstance(given, str) else None


def _arguments(spec: AttentionSpec, call: Call) -> Iterator[tuple[str, Any]]:
    mask, ragged = _mask(spec, call), bool(spec.convention and spec.convention.ragged)
    if call.query_lengths is not None and not ragged:
        raise UndeclaredError(f"{spec.name} is not declared to take query_lengths")
    if mask is not None or spec.needs(spec.mask_argument):
        yield spec.mask_argument, mask
    if call.causal and not spec.takes_causal:
        raise UndeclaredError(f"{spec.name} is not declared to take is_causal")
    if call.causal or spec.is_causal_by_default():
        yield spec.causal_argument, call.causal
    takes = spec.takes if spec.convention is None else spec.names  # it has keywords of its own
    if call.query.shape[1] != call.key.shape[1] and takes("enable_gqa"):
        yield "enable_gqa", True
    always = {*spec.always(call.heads), *(("lengths",) if ragged else ())}
    for name in KEYWORDS.values():
        keyword, given = keyword_of(spec, name), getattr(call, name)
        if keyword is None:
            # A bias is part of the mask.
            if given is not None and name not in always and name != "bias":
                raise UndeclaredError(f"{spec.name} is not declared to take {name}")
        elif given is not None and not (name == "scale" and given == spec.scale):
            yield keyword, _value(spec, name, given)
        elif spec.needs(keyword):
            yield keyword, None


def _value(spec: AttentionSpec, name: str, given: Any) -> Any:
    """What is passed under a keyword: as its convention has it, or as most have it."""
    convert = (spec.convention.values if spec.convention else {}).get(name)
    if convert is not None:
        return convert(given)
    if name == "window":
        return tuple(-1 if side is None else side for side in given)
    return given[0] if name == "documents" else given


def _mask(spec: AttentionSpec, call: Call) -> Tensor | None:
    """The mask as the subject takes it: with the bias in it, if that has no keyword of its own."""
    mask = call.mask
    bias = None if keyword_of(spec, "bias") else call.bias
    if mask is None and bias is None:
        return None
    if spec.mask is None:
        raise UndeclaredError(f"{spec.name} is not declared to take a mask")
    if bias is not None:
        if spec.mask not in ("additive", "any"):
            raise UndeclaredError(f"{spec.name} is not declared to take a mask of floats")
        bias = bias if mask is None else bias.masked_fill(~mask, -math.inf)
        return _in_shape(spec, bias, call)
    assert mask is not None
    mask = _in_shape(spec, mask, call)
    return as_meant(mask, spec.mask, call.query.dtype)


def _in_shape(spec: AttentionSpec, mask: Tensor, call: Call) -> Tensor:
    """A mask in the one shape that is declared, or of as many dimensions as the scores."""
    whole = mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))
    wanted = spec.mask_shape
    if wanted is None:
        return whole if spec.has_heads else whole[:, 0]
    letters = wanted.strip("()").split(", ")
    sizes = dict(zip("BHLS", (*call.query.shape[:-1], call.key_len), strict=True))
    for dim, letter in enumerate("BHLS"):
        if letter in letters:
            whole = whole.expand([sizes[letter] if at == dim else -1 for at in range(4)])
            continue
        first = whole.narrow(dim, 0, 1)
        if not torch.equal(first.expand_as(whole), whole):
            raise UndeclaredError(
                f"{spec.name} is declared to take a mask {wanted} alone; got {tuple(mask.shape)}"
            )
        whole = first
    if len(letters) == 2:
        return whole.squeeze({"(L, S)": (0, 1), "(B, S)": (1, 2)}[wanted])
    return whole if spec.has_heads else whole[:, 0]


def to_layout(spec: AttentionSpec, tensor: Tensor) -> Tensor:
    """Return a tensor (batch, heads, length, width) in the layout of a subject."""
    if not spec.has_heads:
        tensor = tensor[:, 0]
    ours = "bhld" if spec.has_heads else "bld"
    return tensor.permute([ours.index(letter) for letter in spec.layout])


def _from_layout(spec: AttentionSpec, output: object, wanted: tuple[int, ...]) -> Tensor:
    who = spec.name if spec.call is None else "the function of call="
    if not isinstance(output, Tensor):
        raise TypeError(f"{who} must return a tensor; got {type(output).__name__}")
    sizes = dict(zip("bhld", wanted, strict=True))
    expected = tuple(sizes[letter] for letter in spec.layout)
    if tuple(output.shape) != expected:
        names = ", ".join(_NAMES[letter] for letter in spec.layout)
        raise ValueError(f"{who} must return ({names}), here {expected}; got {tuple(output.shape)}")
    ours = "bhld" if spec.has_heads else "bld"
    turned = output.permute([spec.layout.index(letter) for letter in ours])
    return turned if spec.has_heads else turned.unsqueeze(1)


def model_of(spec: AttentionSpec) -> SequenceModel:
    """Return the block of a specification, and how it is called."""
    subject = spec.implementation
    model = subject if isinstance(subject, SequenceModel) else recognise(subject)
    told: dict[str, Any] = {}
    if spec.lengths is not None:
        told = {"mask": "lengths", "mask_argument": spec.lengths}
    elif spec.mask is not None and spec.mask_argument != "attn_mask":
        told = {"mask": spec.mask, "mask_argument": spec.mask_argument}
    elif spec.memory is not None and model is not subject:
        told = {"mask": None, "mask_argument": None}  # what is known is about its own sequence
    if spec.memory is not None:
        told["memory_argument"] = spec.memory
    return replace(model, arguments={**model.arguments, **(spec.arguments or {})}, **told)


def by_position(seen: Tensor) -> MaySee:
    """Return the function of positions that booleans (query_len, key_len) stand for."""

    def may_see(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return seen.to(key.device)[query, key]

    return may_see
