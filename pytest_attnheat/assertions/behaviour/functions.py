"""Attention functions as subjects: what is called with query, key and value."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...attention.call import FEATURES, Call
from ...attention.outcomes import likely_mistake
from ...attention.reference import causal_mask
from ...attention.vocabulary import HIDDEN_FROM, Alignment, Side, permits
from ...callables import copied
from ...inputs import dtype_name, misuse
from .subject import as_described, begin, of_the_first
from .visibility import (
    LARGER,
    Claim,
    Padding,
    Replacement,
    Rule,
    Stated,
    Told,
    gradients,
    in_the_future,
    noise,
    since,
    size_of,
)

MASK = "attn_mask"
# By how much the score of a padding key that attracts a query is above that of any real key,
# and the length that such a key has at most.
_AHEAD, _LONGEST = 100.0, 3e3


@dataclass(frozen=True)
class AttentionFunction:
    """An attention function, its inputs and how it is called: a `Subject`."""

    function: Callable[..., Any]  # Called as `function(query, key, value, **arguments)`
    query: Tensor  # (..., query_len, head_dim)
    key: Tensor  # (..., key_len, head_dim)
    value: Tensor  # (..., key_len, value_dim)
    arguments: Mapping[str, Any] = field(default_factory=dict)  # attn_mask, is_causal, scale ...
    seed: int | None = None  # Where each call starts its random numbers; None: from where they are

    ordered = "keys and values are"
    observer, element = "query", "key"
    has_queries = True
    is_tokens = False
    mask_argument = MASK

    @property
    def leading(self) -> tuple[int, ...]:
        """The leading dimensions of the query: (batch, heads) for four dimensions."""
        return tuple(self.query.shape[:-2])

    @property
    def batch(self) -> int:
        """The size of the first leading dimension, 0 without one."""
        return self.leading[0] if self.leading else 0

    @property
    def length(self) -> int:
        """How many keys there are."""
        return self.key.shape[-2]

    @property
    def observers(self) -> int:
        """How many rows its output has, for each head."""
        return self.query.shape[-2]

    @property
    def group(self) -> int:
        """How many query heads share one head of keys and values."""
        if self.query.ndim < 3:
            return 1
        return self.query.shape[-3] // self.key.shape[-3]

    @property
    def scale(self) -> float:
        """What scores are multiplied by."""
        given = self.arguments.get("scale")
        return float(self.query.shape[-1] ** -0.5) if given is None else float(given)

    @property
    def mask(self) -> Tensor | None:
        """Its attn_mask; TypeError for one that says nothing of what may be seen."""
        given = self.arguments.get(MASK)
        return None if given is None else _checked(given)

    @property
    def call(self) -> Call:
        """What it is asked by its inputs and arguments, and by what it says of itself."""
        mask = self.mask
        if mask is not None:
            mask = mask.detach().reshape((1,) * max(0, 2 - mask.ndim) + tuple(mask.shape))
        is_bias = mask is not None and mask.dtype != torch.bool
        features = {n: self.arguments[n] for n in FEATURES if self.arguments.get(n) is not None}
        call = Call(
            query=self.query, key=self.key, value=self.value, mask=None if is_bias else mask,
            causal=bool(self.arguments.get("is_causal")),
            **{**features, **({"bias": mask} if is_bias else {})},
        )  # fmt: skip
        described = as_described(self.function)
        return call if described is None else described.described(call)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Query, key and value, and a mask that has rows."""
        tensors = {"query": self.query, "key": self.key, "value": self.value}
        if self.mask is not None and self.mask.ndim > 1:
            tensors[MASK] = self.mask.detach()
        return tensors

    @property
    def is_cheap(self) -> bool:
        """Yes: one call is nothing beside that of a model."""
        return True

    def run(
        self,
        query: Tensor | None = None,
        key: Tensor | None = None,
        value: Tensor | None = None,
        **changed: Any,
    ) -> Tensor:
        """Call the function, with other inputs or arguments where they are given."""
        query = self.query.clone() if query is None else query
        key = self.key.clone() if key is None else key
        value = self.value.clone() if value is None else value
        given = {name: copied(argument) for name, argument in self.arguments.items()}
        begin(self.seed)
        result = _called(self.function, (query, key, value), {**given, **changed})
        output = result[0] if isinstance(result, (tuple, list)) and result else result
        if not isinstance(output, Tensor):
            accepted = "its output, or a tuple that begins with it"
            raise TypeError(
                misuse("what the attention function returns", type(output).__name__, accepted)
            )
        if output.ndim < 2 or output.shape[:-1] != query.shape[:-1]:
            raise ValueError(wrong_shape(output, (*query.shape[:-1], value.shape[-1])))
        return output.clone()  # the next call may write into the same memory

    def given(self, **tensors: Tensor) -> AttentionFunction:
        """The same with other inputs, or another mask."""
        arguments = dict(self.arguments)
        if MASK in tensors:
            arguments[MASK] = tensors.pop(MASK)
        return replace(self, arguments=arguments, **tensors)  # type: ignore[arg-type]

    def may_see(self) -> Tensor:
        """Which key each query may see, by its arguments and by what it says of itself."""
        # A view (..., query_len, key_len), not expanded where the mask has no leading dimensions.
        shape = (*self.leading, self.query.shape[-2], self.key.shape[-2])
        return self.call.visible(HIDDEN_FROM).expand(shape)

    def explicit(self) -> AttentionFunction:
        """The same with its mask spelled out: attn_mask alone, for all leading dimensions."""
        spelled = self.may_see()
        if self.mask is not None and self.mask.dtype != torch.bool:
            spelled = self.mask.expand(spelled.shape).masked_fill(~spelled, -math.inf)
        others = {k: v for k, v in self.arguments.items() if k not in (MASK, "is_causal")}
        return replace(self, arguments={**others, MASK: spelled})

    def judged(self) -> Tensor | None:
        """The rows that may see a key, (..., query_len)."""
        if self.mask is None and not self.arguments.get("is_causal"):
            return None
        return self.may_see().any(-1)

    def samples(self, which: Tensor) -> AttentionFunction:
        """The inputs of some samples, and their part of the mask if it has one."""
        tensors = {"query": self.query, "key": self.key, "value": self.value}
        mask = self.mask
        if mask is not None and mask.ndim == self.query.ndim and mask.shape[0] == self.batch:
            tensors[MASK] = mask
        return self.given(**{name: tensor[which] for name, tensor in tensors.items()})

    def reorder(self, order: Tensor) -> AttentionFunction:
        """Keys and values, and the columns of the mask, in another order."""
        tensors = {name: getattr(self, name)[..., order, :] for name in ("key", "value")}
        mask = self.mask
        if mask is not None and mask.ndim and mask.shape[-1] == self.length:
            tensors[MASK] = mask[..., order]
        return self.given(**tensors)

    def restore(self, output: Tensor, order: Tensor) -> Tensor:
        """The output as it is: the order of keys leaves no trace."""
        return output

    def mistake(self, output: Tensor, alignment: Alignment | None = None) -> str | None:
        """Name the known defect that gives this output, with another alignment than its own."""
        # A cause that cannot be looked for never hides the failure.
        try:
            call = self.call
            call = call if alignment is None else replace(call, alignment=alignment)
            if not bool(call.visible().any(-1).all()):  # nobody says what those rows should hold
                call = replace(call, fully_masked="undefined")
            return likely_mistake(call, output)
        except Exception:  # what it computes may be no product of query and key at all
            return None

    def cause_of_order(self, base: Tensor, allowed: float) -> str:
        """Name a known defect, as a causal mask inside, or say what else knows the order."""
        return self.mistake(base) or (
            "the places of keys are felt: positions (rotary, ALiBi) or a window inside, or a mask "
            "that does not follow its keys?"
        )

    def claim(self, stated: Stated) -> tuple[AttentionFunction, Claim]:
        """What its queries may see: as its arguments say, or as `may_see` does."""
        for name in ("causal", "lengths", "documents"):
            given = getattr(stated, name)
            if given is not None:
                accepted = (
                    "None for an attention function, which is told what may be seen by attn_mask= "
                    "and is_causal=; or say may_see="
                )
                raise ValueError(misuse(name, repr(given), accepted))
        shape = (*self.leading, self.query.shape[-2], self.length)
        rules = []
        described = as_described(self.function) is not None
        if stated.may_see is not None:
            seen = permitted(stated.may_see, shape).to(self.query.device)
            rules = [Rule(seen, since("which may_see, or what is declared, forbids"))]
        elif self.arguments.get("is_causal") or described:
            call = replace(self.call, mask=None, bias=None)
            call = call if described else replace(call, alignment=stated.alignment)
            seen = call.visible().expand(shape)
            rules = [Rule(seen, since("which its specification forbids"))]
            if call.causal:
                first = shape[-1] - shape[-2] if call.alignment == "bottom_right" else 0
                before = causal_mask(*shape[-2:], alignment=call.alignment, device=seen.device)
                rules.insert(0, Rule(seen | before, in_the_future(first)))
        if stated.may_see is None and self.mask is not None:
            rules.append(Rule(permitted(self.mask, shape), since("which attn_mask forbids")))
        may_be_causal = "if the function is always causal, say so with may_see="
        return self, Claim.of(rules, shape, self.query, may_be_causal=may_be_causal)

    def run_replaced(self, replaced: Replacement, *, seed: int) -> Tensor:
        """The output with some keys (and their values) and queries replaced."""
        inputs = {}
        where = {"query": replaced.queries, "key": replaced.elements, "value": replaced.elements}
        for name, chosen in where.items():
            if chosen is None:
                continue
            given = getattr(self, name)
            other = noise(given, name, replaced.content, seed=seed)
            if name == "key" and replaced.like is not None:
                other = given[..., replaced.like : replaced.like + 1, :]
            elif name == "key" and replaced.towards is not None:
                other = self._keys_towards(replaced.towards, seed)
            inputs[name] = torch.where(chosen.unsqueeze(-1), other, given)
        return self.run(**inputs)

    def _keys_towards(self, observers: Tensor, seed: int) -> Tensor:
        """Keys that point the way of the observers' queries, and are larger than the others."""
        query, key = self.query, self.key
        if query.shape[-1] != key.shape[-1]:
            return noise(key, "key", "larger", seed=seed)
        index = observers[..., None, None].expand(*observers.shape, 1, query.shape[-1])
        wide = of_the_first(query.gather(-2, index), self.group, dim=-3).double()
        direction = wide / wide.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-30)
        return (direction * key.double().square().mean().sqrt() * LARGER).to(key)

    def gradient(self, observers: Sequence[Tensor]) -> list[Tensor]:
        """The largest gradient of each key and its value."""
        sources = [tensor.clone().requires_grad_() for tensor in (self.key, self.value)]
        with torch.enable_grad():
            key, value = (source.clone() for source in sources)  # which it may write to
            found = gradients(self.run(key=key, value=value), sources, observers)
        return [size_of(key).maximum(size_of(value)) for key, value in found]

    def paddings(self, lengths: object, amount: int) -> list[tuple[Sequence[int], int]]:
        """Once, with further keys."""
        return [((), self.length + amount)]

    def pad(self, padding: Padding, told: Told = "truth") -> AttentionFunction:
        """Further keys and values, and a mask that forbids them."""
        spelled, amount = self.explicit(), padding.total - self.length
        mask = spelled.arguments[MASK]

        def with_padding(tensor: Tensor, more: Tensor, dim: int = -2) -> Tensor:
            parts = [more, tensor] if padding.side == "left" else [tensor, more]
            return torch.cat(parts, dim)

        more = {
            name: padding.like(tensor, (*tensor.shape[:-2], amount, tensor.shape[-1]))
            for name, tensor in (("key", self.key), ("value", self.value))
        }
        if padding.is_largest:
            more["key"] = self._attracting(more["key"])
        shown = told == "all real"
        hidden = mask.new_full((*mask.shape[:-1], amount), shown)
        if mask.dtype != torch.bool:
            hidden = torch.zeros_like(hidden) if shown else torch.full_like(hidden, -math.inf)
        mask = with_padding(mask, hidden, dim=-1)
        if told == "opposite" and mask.dtype == torch.bool:  # a float mask has no opposite
            mask = ~mask
        tensors = {name: with_padding(getattr(self, name), more[name]) for name in more}
        return spelled.given(**tensors, **{MASK: mask})

    def _attracting(self, padding: Tensor) -> Tensor:
        """Turn the last padding key towards a query, so that it wins the softmax if not masked."""
        # Random keys get small scores from most queries, so that a fill of -10 in place of -inf
        # would look right. The score of this one is above every real score by `_AHEAD`.
        query, key, judged = self.query, self.key, self.judged()
        if query.shape[-1] != key.shape[-1]:  # the function projects them first
            return padding
        row = 0 if judged is None else int(judged.reshape(-1, query.shape[-2]).sum(0).argmax())
        target = of_the_first(query[..., row, :].double(), self.group)
        size = target.norm(dim=-1, keepdim=True)
        longest = key.double().norm(dim=-1).nan_to_num(posinf=0.0).amax(-1, keepdim=True)
        steepness = size * self.scale
        wanted = (_AHEAD + steepness.abs() * longest) / steepness
        # No longer than a half can hold, also where a query is nearly nothing.
        direction = target / size * wanted.clamp(-_LONGEST, _LONGEST)
        turned = padding.clone()
        turned[..., -1, :] = direction.nan_to_num(posinf=0.0, neginf=0.0).to(padding)
        return turned

    def alone(self, lengths: Sequence[int], *, positions: bool) -> Tensor:
        """The output without padding, with the mask as it is given if it is not a flag."""
        return (self.explicit() if self.arguments.get("is_causal") else self).run()

    def name_padding(self, padding: Padding) -> str:
        """Say how many keys were added."""
        return f"rows change with {padding.total - self.length} masked keys on the {padding.side}"

    def cause_of_padding(self, side: Side, *, felt: bool | None) -> str:
        """Suggest that keys and mask part."""
        return "does the mask follow its keys, or are keys found by their place?"


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


def wrong_shape(output: Tensor, wanted: tuple[int, ...]) -> str:
    """Return the text of an error about an output of the wrong shape."""
    accepted = f"(..., query_len, value_dim), here {wanted}"
    return misuse("what the attention function returns", tuple(output.shape), accepted)


def permitted(mask: object, shape: tuple[int, ...]) -> Tensor:
    """Where an attn_mask permits, see `permits`, expanded to `shape` (..., query_len, key_len)."""
    try:
        return permits(_checked(mask)).expand(shape)
    except RuntimeError:
        got = f"shape {tuple(mask.shape)}"  # type: ignore[attr-defined]
        accepted = f"a shape that broadcasts to that of the scores, here {shape}"
        raise ValueError(misuse(MASK, got, accepted)) from None


def _checked(mask: object) -> Tensor:
    if isinstance(mask, Tensor) and (mask.dtype == torch.bool or mask.is_floating_point()):
        return mask
    given = dtype_name(mask) if isinstance(mask, Tensor) else type(mask).__name__
    accepted = (
        "a boolean torch.Tensor, True where a query may attend, or a tensor of floats that is "
        "added to the scores"
    )
    raise TypeError(misuse(MASK, given, accepted))
