"""Code under test: how it is called, and how it is left as it was found.

A subject is one of two things. An *attention function* has the signature of
`torch.nn.functional.scaled_dot_product_attention` and is given query, key and
value. A *sequence model* is given one sequence and returns one, see
`pytest_attnheat.assertions.behaviour.sequences`.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pytest_attnheat.assertions.behaviour.difference import relative_change
from pytest_attnheat.attention.reference import causal_mask
from pytest_attnheat.attention.scoring import leading_shape
from pytest_attnheat.attention.tolerance import output_tolerance
from pytest_attnheat.attention.vocabulary import Alignment, permits
from pytest_attnheat.callables import copied, identical, modules_in


def settled(
    subject: object, call: Callable[[], Tensor], *, training: bool, seed: int
) -> tuple[Tensor, Callable[[], None]]:
    """Call a subject twice and refuse one that answers at random.

    Args:
        subject: What is called, for the names in the error.
        call: Calls it.
        training: Whether the caller allows randomness: then every call starts from `seed`.
        seed: That seed.

    Returns:
        The first output, and what to call before each later call.

    Raises:
        ValueError: The two outputs differ by more than rounding, and `training` is False.
    """

    def start() -> None:
        if training:
            torch.manual_seed(seed)

    start()
    first = call()
    start()
    second = call()
    if not identical(first, second):
        change = relative_change(second, first)
        if bool((change > output_tolerance(first.dtype, strict=True)).any()):
            raise ValueError(_random_subject(subject))
    return first, start


def _random_subject(subject: object) -> str:
    repeat = "pass training=True, which repeats every call from the same seed"
    advice = f"call .eval() on it, or {repeat}"
    training = [m for m in modules_in(subject) if any(part.training for part in m.modules())]
    if not training:
        return (
            "the subject is random: two calls with the same input give different outputs, so no "
            "comparison would mean anything: dropout in evaluation mode? assert_deterministic "
            f"looks for it. Or {repeat}"
        )
    dropouts = [
        f"{name or type(part).__name__} (p={part.p})"
        for module in training
        for name, part in module.named_modules()
        if isinstance(part, nn.modules.dropout._DropoutNd) and part.training and part.p > 0
    ]
    because = f" ({', '.join(dropouts[:3])}{', ...' * (len(dropouts) > 3)})" if dropouts else ""
    return (
        f"{type(training[0]).__name__} is in training mode{because}: two calls with the same input "
        f"give different outputs, so no comparison would mean anything; {advice}"
    )


@dataclass(frozen=True)
class AttentionFunction:
    """An attention function, its inputs and how it is called.

    Attributes:
        function: Called as `function(query, key, value, **arguments)`.
        query: (..., query_len, head_dim)
        key: (..., key_len, head_dim)
        value: (..., key_len, value_dim)
        arguments: attn_mask, is_causal, scale, enable_gqa, whatever the caller gave.
    """

    function: Callable[..., Any]
    query: Tensor
    key: Tensor
    value: Tensor
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def leading(self) -> tuple[int, ...]:
        """The leading dimensions of the query: (batch, heads) for four dimensions."""
        return tuple(self.query.shape[:-2])

    @property
    def group(self) -> int:
        """How many query heads share one head of keys and values."""
        if self.query.ndim < 3:
            return 1
        return self.query.shape[-3] // self.key.shape[-3]

    def run(
        self,
        query: Tensor | None = None,
        key: Tensor | None = None,
        value: Tensor | None = None,
        **changed: Any,
    ) -> Tensor:
        """Call the function, with other inputs or arguments where they are given.

        It is given copies of its own inputs and arguments, since it may write to them.

        Raises:
            TypeError: It returns no tensor (nor a tuple that begins with one).
            ValueError: Its output is not (..., query_len, value_dim).
        """
        query = self.query.clone() if query is None else query
        key = self.key.clone() if key is None else key
        value = self.value.clone() if value is None else value
        given = {name: copied(argument) for name, argument in self.arguments.items()}
        result = _called(self.function, (query, key, value), {**given, **changed})
        output = result[0] if isinstance(result, (tuple, list)) and result else result
        if not isinstance(output, Tensor):
            raise TypeError(
                f"the attention function must return its output, or a tuple that begins with it; "
                f"got {type(output).__name__}"
            )
        if output.ndim < 2 or output.shape[:-1] != query.shape[:-1]:
            raise ValueError(
                f"the attention function must return (..., query_len, value_dim), here "
                f"{(*query.shape[:-1], value.shape[-1])}; got {tuple(output.shape)}"
            )
        return output

    def may_see(self, alignment: Alignment = "top_left") -> Tensor:
        """Which key each query may see, by its arguments.

        Args:
            alignment: What `is_causal=True` means to the function.

        Returns:
            Boolean (..., query_len, key_len), a view that is not expanded in memory where the
            mask has no leading dimensions.
        """
        shape = (*self.leading, self.query.shape[-2], self.key.shape[-2])
        seen = torch.ones((), dtype=torch.bool, device=self.query.device)
        mask = self.arguments.get("attn_mask")
        if mask is not None:
            seen = permitted(mask, shape)
        if self.arguments.get("is_causal"):
            causal = causal_mask(*shape[-2:], alignment=alignment, device=seen.device)
            seen = causal if mask is None else permits(mask) & causal
        return seen.expand(shape)

    def explicit(self) -> AttentionFunction:
        """The same with its mask spelled out: attn_mask alone, for all leading dimensions."""
        mask = self.arguments.get("attn_mask")
        spelled = self.may_see()
        if isinstance(mask, Tensor) and mask.dtype != torch.bool:
            spelled = mask.expand(spelled.shape).masked_fill(~spelled, -math.inf)
        others = {k: v for k, v in self.arguments.items() if k not in ("attn_mask", "is_causal")}
        return AttentionFunction(
            self.function, self.query, self.key, self.value, {**others, "attn_mask": spelled}
        )


def _called(
    function: Callable[..., Any], inputs: Sequence[Tensor], arguments: Mapping[str, Any]
) -> Any:
    try:
        return function(*inputs, **arguments)
    except TypeError as error:
        inside = error.__traceback__ is not None and error.__traceback__.tb_next is not None
        if inside and not isinstance(function, types.BuiltinFunctionType):
            raise  # by the code of the function, not by the call
        raise TypeError(
            f"the attention function cannot be called as function(query, key, value, "
            f"{', '.join(f'{name}=...' for name in arguments)}): {error}. An AttentionSpec says "
            "how a function takes its mask, and what layout it has"
        ) from error


def permitted(mask: object, shape: tuple[int, ...]) -> Tensor:
    """Where an attn_mask permits, expanded to `shape`.

    Args:
        mask: Boolean, True where a query may attend, or floats that are added
            to the scores, see `permits`.
        shape: (..., query_len, key_len)

    Raises:
        TypeError: No tensor of booleans or floats.
        ValueError: Does not broadcast to the shape.
    """
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        given = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(
            f"attn_mask: got {given}; accepted is a boolean torch.Tensor, True where a query may "
            "attend, or a tensor of floats that is added to the scores"
        )
    try:
        return permits(mask).expand(shape)
    except RuntimeError:
        raise ValueError(
            f"attn_mask: shape {tuple(mask.shape)} does not broadcast to the scores {shape}"
        ) from None


def as_function(
    function: object, inputs: Sequence[object], arguments: Mapping[str, Any]
) -> AttentionFunction:
    """Return an attention function with its inputs, after checking them.

    Raises:
        TypeError: Not callable, or query, key and value are no float tensors of one dtype.
        ValueError: Their shapes do not fit together, or one has no elements.
    """
    if not callable(function):
        raise TypeError(
            f"the subject must be callable as function(query, key, value); got "
            f"{type(function).__name__}"
        )
    query, key, value = (
        as_input(tensor, name)
        for tensor, name in zip(inputs, ("query", "key", "value"), strict=True)
    )
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(
            f"query, key and value must have one dtype; got {query.dtype}, {key.dtype} and "
            f"{value.dtype}"
        )
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.ndim < 2 or not tensor.is_floating_point():
            raise ValueError(
                f"{name}: got {tensor.dtype} {tuple(tensor.shape)}; accepted are floats of shape "
                "(..., length, width)"
            )
    if key.shape[-2] != value.shape[-2]:
        raise ValueError(
            f"key and value must have the same length; got key {tuple(key.shape)} and value "
            f"{tuple(value.shape)}"
        )
    _check_leading(query, key, value, grouped=bool(arguments.get("enable_gqa")))
    for name, argument in arguments.items():
        if name != "attn_mask" and isinstance(argument, Tensor) and argument.dtype == torch.bool:
            raise ValueError(
                f"{name}: a mask under this name is passed on, but nobody knows what it means; "
                "pass attn_mask, True where a query may attend, and say with "
                f"AttentionSpec(function, mask=..., mask_argument={name!r}) how it is taken"
            )
    if isinstance(function, nn.MultiheadAttention):
        function = _Multihead(function)
    own = {name: copied(argument) for name, argument in arguments.items()}
    return AttentionFunction(function, query, key, value, own)


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
        raise ValueError(
            "query, key and value must have the same leading dimensions, or with enable_gqa=True "
            "a number of query heads that is a multiple of the key and value heads; got query "
            f"{tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)}"
        )


def check_count(inputs: Sequence[object], assertion: str) -> None:
    """Refuse what are inputs neither of an attention function nor of a sequence model.

    Raises:
        TypeError: There are neither three of them nor one.
    """
    if len(inputs) not in (1, 3):
        raise TypeError(
            f"{assertion}: got {len(inputs)} inputs; accepted are query, key and value of an "
            "attention function, or the one input of a sequence model"
        )


def as_input(tensor: object, name: str) -> Tensor:
    """Return an input of a subject, detached.

    Raises:
        TypeError: Not a dense tensor that holds numbers.
        ValueError: No elements.
    """
    accepted = "a dense torch.Tensor with numbers in it"
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}; accepted is {accepted}")
    if tensor.is_nested or tensor.layout != torch.strided or tensor.device.type == "meta":
        kind = "nested" if tensor.is_nested else f"{tensor.layout} {tensor.device.type}"
        raise TypeError(f"{name}: got a {kind} tensor; accepted is {accepted}")
    if tensor.numel() == 0:
        raise ValueError(
            f"{name}: shape {tuple(tensor.shape)} has no elements, so there is nothing to check"
        )
    # Of a tensor made in inference mode autograd can save nothing.
    return tensor.detach().clone() if tensor.is_inference() else tensor.detach()


class _Multihead:
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
        """Attend; the weights are not asked for."""
        if is_causal:
            causal = causal_mask(
                query.shape[-2], key.shape[-2], alignment="top_left", device=query.device
            )
            if attn_mask is None:
                attn_mask = causal
            elif attn_mask.dtype == torch.bool:
                attn_mask = attn_mask & causal
            else:
                attn_mask = attn_mask.masked_fill(~causal, -math.inf)
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
