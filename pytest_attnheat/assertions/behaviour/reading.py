"""Reading the code under test and its inputs, as users pass them to the assertions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...attention.reference import padding_mask
from ...attention.scoring import leading_shape
from ...callables import copied
from ...inputs import misuse
from .functions import MASK, AttentionFunction
from .models import ModelSubject, Subject
from .sequences import Multihead, SequenceModel, check_takes_mask, recognise
from .subject import Described, as_input

# Of a function with too many weights, heads and keys are cut to so many.
_MOST_HEADS, _MOST_KEYS = 8, 256
_SUBJECT = "the subject"
_TOGETHER = "query, key and value"


def as_subject(
    subject: object,  # An attention function or a sequence model
    inputs: Sequence[object],  # Its positional inputs
    arguments: Mapping[str, Any],  # Its keyword arguments
    # How many tokens of each sample are real, (batch,); the rest is padding on the right. None for
    # no mask. For sequence models only.
    lengths: object = None,
    *,
    seed: int | None = None,  # Where each call starts its random numbers; None: from where they are
) -> Subject:
    """Return a subject with its inputs: three are query, key and value, one is a sequence."""
    if len(inputs) == 3 and not isinstance(subject, SequenceModel):
        if lengths is not None:
            accepted = "None for an attention function, which is told of padding by attn_mask"
            raise ValueError(misuse("lengths", repr(lengths), accepted))
        return as_function(subject, inputs, arguments, seed=seed)
    if len(inputs) != 1:
        accepted = (
            "three (query, key, value) for an attention function, or one for a sequence model: "
            "floats (batch, length, width) or token ids (batch, length)"
        )
        raise TypeError(misuse("inputs", f"{len(inputs)} for {type(subject).__name__}", accepted))
    model = as_sequence(subject, inputs[0], arguments, seed=seed)
    if lengths is None:
        return model
    check_takes_mask(model.model)
    refuse_memory(model, lengths)
    given = model.as_lengths(lengths)
    mask = padding_mask(given, model.length, device=model.inputs.device)
    return replace(model, real=mask[:, 0, 0])


def refuse_memory(model: ModelSubject, lengths: object) -> None:
    """Refuse lengths of the sequence for a module whose mask is about a memory."""
    if model.model.memory_argument is not None:
        accepted = (
            "None for a module with a memory, whose padding assert_padding_invariant is about"
        )
        raise ValueError(misuse("lengths", repr(lengths), accepted))


def as_function(
    function: object,
    inputs: Sequence[object],
    arguments: Mapping[str, Any],
    *,
    seed: int | None = None,
) -> AttentionFunction:
    """Return an attention function with its inputs, after checking them."""
    if not callable(function):
        accepted = "a callable, called as function(query, key, value)"
        raise TypeError(misuse(_SUBJECT, type(function).__name__, accepted))
    query, key, value = (
        as_input(tensor, name)
        for tensor, name in zip(inputs, ("query", "key", "value"), strict=True)
    )
    if not query.dtype == key.dtype == value.dtype:
        given = f"{query.dtype}, {key.dtype} and {value.dtype}"
        raise TypeError(misuse(_TOGETHER, given, "one dtype"))
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.ndim < 2 or not tensor.is_floating_point():
            given = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(misuse(name, given, "floats of shape (..., length, width)"))
    if key.shape[-2] != value.shape[-2]:
        given = f"key {tuple(key.shape)} and value {tuple(value.shape)}"
        raise ValueError(misuse("key and value", given, "the same length"))
    _check_leading(
        query,
        key,
        value,
        grouped=bool(arguments.get("enable_gqa")) or isinstance(function, Described),
    )
    for name, argument in arguments.items():
        if name != MASK and isinstance(argument, Tensor) and argument.dtype == torch.bool:
            accepted = (
                "attn_mask, True where a query may attend; what another mask means says "
                f"AttentionSpec(function, mask=..., mask_argument={name!r})"
            )
            raise ValueError(misuse(name, "a boolean mask under this name", accepted))
    if isinstance(function, nn.MultiheadAttention):
        function = Multihead(function)
    own = {name: copied(argument) for name, argument in arguments.items()}
    return AttentionFunction(function, query, key, value, own, seed)


def _check_leading(query: Tensor, key: Tensor, value: Tensor, *, grouped: bool) -> None:
    if not grouped:
        leading_shape(query=query, key=key, value=value)
    shapes = [tensor.shape[:-2] for tensor in (query, key, value)]
    same = shapes[0] == shapes[1] == shapes[2]
    if grouped and query.ndim >= 3 and query.ndim == key.ndim == value.ndim:
        heads, key_heads = query.shape[-3], key.shape[-3]
        same = shapes[1] == shapes[2] and shapes[0][:-1] == shapes[1][:-1]
        same = same and heads % key_heads == 0
    if not same:
        given = ", ".join(str(tuple(tensor.shape)) for tensor in (query, key, value))
        accepted = (
            "the same leading dimensions, or with enable_gqa=True a number of query heads that is "
            "a multiple of the key and value heads"
        )
        raise ValueError(misuse(_TOGETHER, given, accepted))


def as_sequence(
    subject: object, inputs: object, arguments: Mapping[str, Any], *, seed: int | None = None
) -> ModelSubject:
    """Return a sequence model with its inputs, after checking them."""
    if not callable(subject):
        accepted = "a callable, called as module(inputs)"
        raise TypeError(misuse(_SUBJECT, type(subject).__name__, accepted))
    model = subject if isinstance(subject, SequenceModel) else recognise(subject)
    sequence = as_input(inputs, "inputs")
    is_tokens = sequence.dtype in (torch.int64, torch.int32) and sequence.ndim == 2
    if not is_tokens and not (sequence.is_floating_point() and sequence.ndim == 3):
        accepted = "floats (batch, length, width) or token ids (batch, length) in int64 or int32"
        given = f"{sequence.dtype} {tuple(sequence.shape)}"
        raise ValueError(misuse("inputs", given, accepted))
    named = {**model.arguments, **arguments}
    if (name := model.memory_argument) is not None:
        memory = named[name] = as_input(named.get(name), name)
        if memory.ndim != 3 or len(memory) != len(sequence):
            accepted = f"({len(sequence)}, length, width), as many samples as the inputs have"
            raise ValueError(misuse(name, f"shape {tuple(memory.shape)}", accepted))
    return ModelSubject(model, sequence, named, seed=seed)


def part_of(function: AttentionFunction, most: int) -> AttentionFunction:
    """Return a function with a part of its inputs, about so many weights, if all have more."""
    # All inputs are kept where it is not known how to cut them, or the function refuses a part.
    query, key = function.query, function.key
    others = [v for name, v in function.arguments.items() if name != MASK]
    if query[..., 0].numel() * key.shape[-2] <= most:
        return function
    if any(isinstance(value, Tensor) for value in others):
        return function
    try:
        part = _cut(function, most)
        part.run()
    except Exception:  # Its length may be fixed, by a mask of its own or a compiled kernel.
        return function
    return part


def _cut(function: AttentionFunction, most: int) -> AttentionFunction:
    """Keep some batch entries, heads, queries and keys."""
    # Keys are kept together if a mask is given: a query might be left without any.
    query, key, arguments = function.query, function.key, dict(function.arguments)
    mask, is_causal = function.mask, bool(arguments.get("is_causal"))
    keys = key.shape[-2] if mask is not None else min(key.shape[-2], _MOST_KEYS)
    kept = [min(size, 2) for size in query.shape[:-2]]
    own = list(kept)
    if kept:
        most_heads = _MOST_HEADS if keys <= _MOST_KEYS else 2
        own[-1] = min(key.shape[-3], max(2, most_heads // function.group))
        kept[-1] = own[-1] * function.group
    leading = math.prod(kept)
    queries = min(query.shape[-2], max(4, most // (leading * keys)))
    if mask is None and is_causal:
        # As many queries as keys: then causal is the same, whichever corner it is aligned to.
        square = max(4, math.isqrt(most // leading))
        queries, keys = min(query.shape[-2], square), min(key.shape[-2], square)
    rows = torch.arange(queries, device=query.device)
    if mask is not None and not is_causal:
        rows = torch.linspace(0, query.shape[-2] - 1, queries, device=query.device).long()
    if mask is not None:
        some = mask[..., rows.to(mask.device), :] if mask.ndim > 1 and mask.shape[-2] > 1 else mask
        arguments[MASK] = _corner(some, kept)
    return replace(
        function, query=_corner(query[..., rows, :], kept), key=_corner(key[..., :keys, :], own),
        value=_corner(function.value[..., :keys, :], own), arguments=arguments,
    )  # fmt: skip


def _corner(tensor: Tensor, leading: list[int]) -> Tensor:
    """Keep the first entries along each leading dimension that it is not broadcast along."""
    for dim, size in zip(range(-3, -tensor.ndim - 1, -1), reversed(leading), strict=False):
        if tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, size)
    return tensor.clone()
