"""Modules that map a sequence to a sequence, and how they take their mask."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from ...attention.reference import causal_mask
from ...attention.vocabulary import MASK_MEANINGS, SIDES, MaskMeaning, Side
from ...callables import parameters_of
from ...inputs import misuse, one_of

Decode: TypeAlias = Callable[..., tuple[Any, Any]]

_NAMES = ("logits", "last_hidden_state")
_DECODES = "a function that returns (output, cache)"
_MEANINGS = (*MASK_MEANINGS, "lengths")


@dataclass(frozen=True)
class SequenceModel:
    """A module that maps a sequence to a sequence, and how it takes its padding mask.

    `nn.TransformerEncoderLayer`, `nn.TransformerEncoder`, `nn.MultiheadAttention` (as
    self-attention) and the models of transformers need none of this: the assertions know them.
    Any other module is called as `module(inputs)`, and takes no mask unless this says so.

    Attributes:
        module: Called as `module(inputs, **arguments)`. The inputs are (batch, length, width)
            floats or (batch, length) token ids.
        mask: What its padding mask (batch, length) means: `"keep"` (True where a token is
            real), `"drop"` (True where it is padding), `"additive"` (0 where real, -inf where
            padding, in the default dtype or that of float inputs), or a function from the
            first of these to whatever the module takes. `"lengths"`: it takes no mask, but how
            many first tokens are real, (batch,). None: it is told nothing of padding.
        mask_argument: The keyword under which it takes the mask.
        positions_argument: The keyword under which it takes the position of each token
            (batch, length), where the positions do not follow from the inputs alone. Needed for
            padding on the left of a module with absolute positions.
        decode: For a module with a cache of keys and values: `decode(inputs, cache)` returns
            the output for a further chunk of the sequence and the new cache; the cache of the
            first chunk is None. Further arguments of the module are passed on to it by keyword.
        reorder: With `decode`: `reorder(cache, order)` returns a cache whose entry i of the batch
            is entry `order[i]` of the given one, (batch,), as beam search needs it. Asked of two
            or more sequences of full length.
        arguments: Further keyword arguments of every call. Where samples are chosen, a tensor
            whose first dimension is the batch is cut along with them.
        memory_argument: The keyword of a memory (batch, other length, width) in which the module
            looks things up, as in cross-attention. Its mask is then about the memory.
        has_positions: Whether the order of tokens matters to a module that is not causal.
        side: On which side alone its sequences are padded; None for either. The right for a module
            that counts positions from its first slot, and is only ever padded behind.
        batch_first: Whether the batch is the first dimension of inputs and output, the
            length the second; if not, the other way round. Masks are (batch, length) always.
        output: Picks the output (batch, length, ...) from what the module returns. By default
            the tensor itself, `logits` or `last_hidden_state`, or the first of a tuple.
    """

    module: Callable[..., Any]
    mask: MaskMeaning | Literal["lengths"] | Callable[[Tensor], Any] | None = None
    mask_argument: str | None = None
    positions_argument: str | None = None
    decode: Decode | None = None
    reorder: Callable[[Any, Tensor], Any] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict, hash=False)
    memory_argument: str | None = None
    has_positions: bool | None = None
    side: Side | None = None
    batch_first: bool = True
    output: Callable[[Any], Tensor] | None = None

    def __post_init__(self) -> None:
        if not callable(self.module):
            raise TypeError(misuse("module", type(self.module).__name__, "a callable"))
        if not callable(self.mask) and self.mask not in (None, *_MEANINGS):
            accepted = f"{', '.join(map(repr, _MEANINGS))}, a function, or None"
            raise ValueError(misuse("mask", repr(self.mask), accepted))
        if self.side is not None:
            one_of("side", self.side, SIDES)
        if (self.mask is None) != (self.mask_argument is None):
            got = f"mask={self.mask!r}, mask_argument={self.mask_argument!r}"
            accepted = (
                "both or neither: what the mask means and the keyword under which it is taken"
            )
            raise ValueError(misuse("mask and mask_argument", got, accepted))
        for name in ("mask_argument", "positions_argument", "memory_argument"):
            keyword, module = getattr(self, name), getattr(self.module, "_orig_mod", self.module)
            if keyword is not None and not _may_take(module, keyword):
                inner = SequenceModel(module)
                accepted = f"a parameter of {inner.name}: {_parameters(inner)}"
                raise ValueError(misuse(name, repr(keyword), accepted))
        if self.reorder is not None and self.decode is None:
            accepted = f"decode=, {_DECODES}, beside it: without one there is no cache to reorder"
            raise ValueError(misuse("reorder", "a function without decode=", accepted))

    def __call__(
        self,
        inputs: Tensor,
        *,
        real: Tensor | None = None,
        positions: Tensor | None = None,
        **arguments: Any,
    ) -> Tensor:
        """Run the module.

        Args:
            inputs: (batch, length, width) floats or (batch, length) token ids.
            real: Boolean (batch, length), True where a token is no padding; None for no mask.
            positions: (batch, length), given on only if the module takes them.
            **arguments: Further keyword arguments of the module, in place of its own.

        Returns:
            The output (batch, length, width).
        """
        arguments = self.keywords(inputs, {**self.arguments, **arguments}, real, positions)
        given = inputs if self.batch_first else inputs.transpose(0, 1)
        return self.read(self.module(given, **arguments), inputs)

    def keywords(
        self,
        inputs: Tensor,
        arguments: Mapping[str, Any],
        real: Tensor | None,
        positions: Tensor | None,
    ) -> dict[str, Any]:
        """Return the keyword arguments of a call, with its mask and its positions if there are."""
        found, memory = dict(arguments), arguments.get(self.memory_argument or "")
        if real is not None and self.mask_argument is not None:
            found[self.mask_argument] = self._told(real, inputs)
        if positions is not None and self.positions_argument is not None:
            found[self.positions_argument] = positions
        if memory is not None and not self.batch_first:
            found[self.memory_argument or ""] = memory.transpose(0, 1)
        return found

    def read(self, result: Any, inputs: Tensor) -> Tensor:
        """Pick the output from what the module returned, and return it as (batch, length, width).

        Raises:
            TypeError: There is no tensor of floats in it.
            ValueError: Its output is not (batch, length, ...).
        """
        wanted = tuple(inputs.shape[:2])
        found = [self.output(result)] if self.output is not None else _tensors(result)
        for output in found:
            if not isinstance(output, Tensor) or output.ndim < 2:
                continue
            turned = output if self.batch_first else output.transpose(0, 1)
            if tuple(turned.shape[:2]) == wanted and turned.is_floating_point():
                return turned.reshape(*wanted, -1)
        if not found:
            accepted = (
                "a tensor, or a tuple or mapping with one in it; SequenceModel(..., output=) can "
                "pick it"
            )
            raise TypeError(misuse(f"what {self.name} returns", type(result).__name__, accepted))
        accepted = (
            f"floats of shape (batch, length, ...), here ({wanted[0]}, {wanted[1]}, ...); "
            "SequenceModel(..., output=) can pick the output, batch_first=False turn it"
        )
        shapes = [tuple(tensor.shape) for tensor in found]
        raise ValueError(misuse(f"what {self.name} returns", shapes, accepted))

    @property
    def sides(self) -> tuple[Side, ...]:
        """On which sides it may be padded. What is told lengths counts them from the first."""
        if self.side is not None or self.mask == "lengths":
            return (self.side or "right",)
        return ("right", "left")

    @property
    def name(self) -> str:
        """What the module is called in errors."""
        return getattr(self.module, "__name__", type(self.module).__name__)

    def _told(self, real: Tensor, inputs: Tensor) -> Any:
        if self.mask == "lengths":
            return real.sum(-1)
        if callable(self.mask):
            return self.mask(real)
        dtype = inputs.dtype if inputs.is_floating_point() else torch.get_default_dtype()
        return as_meant(real, self.mask, dtype)


def check_takes_mask(model: SequenceModel) -> None:
    """Raise a ValueError about a sequence model that is not said to take a mask."""
    if model.mask is None:
        raise ValueError(
            f"{model.name} is not told which tokens are padding; say how it takes its mask: "
            "SequenceModel(module, mask='keep' or 'drop' or 'additive', mask_argument=...), where "
            f"mask_argument is one of its parameters: {_parameters(model)}"
        )


def _may_take(module: Callable[..., Any], keyword: str) -> bool:
    """Whether a module may take a keyword; not only if its signature is known and lacks it."""
    called: Any = module
    if isinstance(module, nn.Module):
        called = module.forward
        # What stands between the caller and `forward` may take more.
        if type(module).__call__ is not nn.Module.__call__ or module._forward_pre_hooks:
            return True
    taken = parameters_of(module)
    if taken is None:
        return True
    both = list(taken.values())
    with suppress(TypeError, ValueError):  # what decorates it may take more as well
        both += inspect.signature(called, follow_wrapped=False).parameters.values()
    return any(one.name == keyword or one.kind is one.VAR_KEYWORD for one in both)


def _parameters(model: SequenceModel) -> str:
    taken = parameters_of(model.module)
    return "unknown" if taken is None else ", ".join(taken)


def as_meant(mask: Tensor, meaning: MaskMeaning | None, dtype: torch.dtype) -> Tensor:
    """Return a boolean mask, True where a query may attend, as a subject reads it."""
    if meaning == "drop":
        return ~mask
    if meaning == "additive":
        zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
        return zeros.masked_fill(~mask, -math.inf)
    return mask


def with_causal(mask: Tensor, causal: Tensor) -> Tensor:
    """Return a mask, of booleans or floats, that hides what a causal one hides as well."""
    return mask & causal if mask.dtype == torch.bool else mask.masked_fill(~causal, -math.inf)


def recognise(module: Callable[..., Any]) -> SequenceModel:
    """Return how a module is called: known modules of PyTorch and transformers, or plainly."""
    inner = _wrapped(module)
    if inner is not None:
        model = recognise(inner)
        return replace(model, module=module) if model.module is inner else SequenceModel(module)
    if isinstance(module, nn.MultiheadAttention):
        model = SequenceModel(_SelfAttention(module), "drop", "key_padding_mask")
        return replace(model, batch_first=module.batch_first)
    if isinstance(module, nn.TransformerEncoderLayer):
        model = SequenceModel(module, "drop", "src_key_padding_mask")
        return replace(model, batch_first=bool(module.self_attn.batch_first))
    if isinstance(module, nn.TransformerEncoder):
        first = recognise(module.layers[0])
        model = SequenceModel(module, "drop", "src_key_padding_mask")
        return replace(model, batch_first=first.batch_first)
    if _is_of_transformers(module):
        return _of_transformers(module)
    return SequenceModel(module)


def _wrapped(module: Callable[..., Any]) -> Callable[..., Any] | None:
    """The module that torch.compile or a parallel wrapper was given."""
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        inner: Callable[..., Any] = module.module
        return inner
    return getattr(module, "_orig_mod", None)


class _SelfAttention:
    """`nn.MultiheadAttention` of a sequence with itself, without the weights."""

    def __init__(self, module: nn.MultiheadAttention) -> None:
        self.module = module
        self.__name__ = type(module).__name__

    def __call__(self, inputs: Tensor, **arguments: Any) -> Tensor:
        arguments = {"need_weights": False, **arguments}
        output: Tensor = self.module(inputs, inputs, inputs, **arguments)[0]
        return output


class Multihead:
    """`nn.MultiheadAttention` with the arguments of an attention function.

    Query, key and value are (batch, length, width), whatever `batch_first` says.
    """

    def __init__(self, module: nn.MultiheadAttention) -> None:
        self.module = module

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Attend, without the weights."""
        if is_causal:
            causal = causal_mask(
                query.shape[-2], key.shape[-2], alignment="top_left", device=query.device
            )
            attn_mask = causal if attn_mask is None else with_causal(attn_mask, causal)
        if attn_mask is not None:
            attn_mask = self._mask(attn_mask, batch=query.shape[0])
        turned = query.ndim == 3 and not self.module.batch_first
        inputs = [t.transpose(0, 1) if turned else t for t in (query, key, value)]
        output: Tensor = self.module(*inputs, attn_mask=attn_mask, need_weights=False)[0]
        return output.transpose(0, 1) if turned else output

    def _mask(self, mask: Tensor, batch: int) -> Tensor:
        # There True means masked, and a mask per batch entry is one per head as well.
        drops = ~mask if mask.dtype == torch.bool else mask
        if drops.ndim == 3:
            drops = drops.expand(batch, -1, -1).repeat_interleave(self.module.num_heads, 0)
        return drops


def _is_of_transformers(module: object) -> bool:
    # By name: importing transformers to ask would take seconds.
    return any(
        parent.__module__ == "transformers.modeling_utils" and parent.__name__ == "PreTrainedModel"
        for parent in type(module).__mro__
    )


def _of_transformers(module: Callable[..., Any]) -> SequenceModel:
    taken = inspect.signature(module.forward).parameters  # type: ignore[attr-defined]
    mask = "attention_mask" if "attention_mask" in taken else None
    has_cache = any(name in taken for name in _CACHES)
    return SequenceModel(
        module,
        mask=None if mask is None else Tensor.long,
        mask_argument=mask,
        positions_argument="position_ids" if "position_ids" in taken else None,
        decode=CachedDecoding(module) if has_cache else None,
        reorder=_reordered if has_cache else None,
    )


def _reordered(cache: Any, order: Tensor) -> Any:
    """Put a cache of transformers in another order, as its beam search does."""
    if not hasattr(cache, "reorder_cache"):
        raise NotImplementedError
    cache.reorder_cache(order)
    return cache


# What models of transformers call their cache: `cache` from version 5.24 on.
_CACHES = ("cache", "past_key_values")


class CachedDecoding:
    """One step of a transformers model with its cache of keys and values.

    The cache that comes back is None where the model has none after all, as BERT.
    """

    def __init__(self, module: Callable[..., Any]) -> None:
        self.module = module
        taken = inspect.signature(getattr(module, "forward", module)).parameters
        self._name = next((name for name in _CACHES if name in taken), _CACHES[-1])

    def __call__(self, inputs: Tensor, cache: Any, **arguments: Any) -> tuple[Any, Any]:
        """Run the model on a chunk and return what it returned, with its cache."""
        # A caller's `use_cache` and `return_dict` are overridden: the cache is needed here.
        arguments = {**arguments, self._name: cache, "use_cache": True}
        if "return_dict" in arguments:  # Not passed unasked: not every model takes it.
            arguments["return_dict"] = True
        result = self.module(inputs, **arguments)
        return result, _cache_in(result)


def _cache_in(result: Any) -> Any:
    """The cache in what a transformers model returned; None where there is none."""
    if isinstance(result, tuple):  # As with `return_dict=False` in its configuration.
        return next((part for part in result if hasattr(part, "get_seq_length")), None)
    found = (getattr(result, name, None) for name in _CACHES)
    return next((cache for cache in found if cache is not None), None)


def _tensors(result: Any) -> list[Tensor]:
    """List the tensors in what a module returned, the likely output first."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, Mapping):
        named = [result[name] for name in _NAMES if name in result]
        return [t for t in (*named, *result.values()) if isinstance(t, Tensor)]
    if isinstance(result, (tuple, list)):
        return [t for t in result if isinstance(t, Tensor)]
    attributes = [getattr(result, name, None) for name in _NAMES]
    return [t for t in attributes if isinstance(t, Tensor)]


def refuse_unused_cache(module: Callable[..., Any]) -> None:
    """Refuse a module that takes a cache: prefixes alone would pass whatever its cache does."""
    cache = name_of_cache(module)
    if cache is not None:
        module = getattr(module, "_orig_mod", module)
        name = getattr(module, "__name__", f"{type(module).__name__}.forward")
        raise ValueError(
            f"{name} takes {cache!r}, but nothing says how to decode with it: "
            "SequenceModel(model, decode=...), where decode(chunk, cache) returns (output, cache); "
            "or wrap the model in a lambda to compare prefixes alone"
        )


def name_of_cache(module: Callable[..., Any]) -> str | None:
    """Return the parameter under which a module takes a cache, told by its name, or None."""
    module = getattr(module, "_orig_mod", module)  # What torch.compile wraps.
    taken = parameters_of(module) or ()
    return next((n for n in taken if re.search("cache|^past|_past$", n.lower())), None)


def decode_takes(model: SequenceModel) -> bool:
    """Whether `decode` can be told of padding on the left."""
    if model.decode is None or model.mask is None or model.memory_argument:
        return False
    try:
        inspect.signature(model.decode).bind(None, None, **{str(model.mask_argument): None})
    except (TypeError, ValueError):
        return False
    return True


def decoded(decode: Callable[..., Any], chunk: Tensor, cache: Any, **arguments: Any) -> Any:
    """Call `decode` and return its output and cache."""
    try:
        inspect.signature(decode).bind(chunk, cache, **arguments)
    except TypeError as error:
        called = f"decode(chunk, cache{''.join(f', {name}=' for name in arguments)})"
        got = f"one that cannot be called as {called}: {error}"
        raise TypeError(misuse("decode", got, _DECODES)) from None
    except ValueError:  # A builtin, which does not say what it takes.
        pass
    result = decode(chunk, cache, **arguments)
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        got = type(result).__name__
        if isinstance(result, (tuple, list)):
            got = f"a {got} of {len(result)}"
        elif isinstance(result, Tensor):
            got = f"a tensor {tuple(result.shape)}"
        raise TypeError(misuse("decode", f"{got} back", _DECODES))
    return result
