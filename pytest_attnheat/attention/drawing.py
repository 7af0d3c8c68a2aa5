"""The tensors of one choice of levels, see `levels`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .call import Call
from .scoring import draw
from .storage import OWN, Storage

Choice: TypeAlias = Mapping[str, Any]
# The level of each feature that stands for its absence, the ordinary one.
NONE = "none"
# What a mask of floats hides a key with; None is the lowest number of the dtype.
FILLS = {"-inf": -math.inf, "finite": 0.0, "min": None, "-1e9": -1e9, "-1e4": -1e4}
# The sides of a window that are given.
WINDOWS = ("left", "both")
# How the lengths of the batch entries differ. The queries and the keys of each have their own,
# and other ones besides: no two entries have as many keys more than queries.
RAGGED = ("equal", "unequal", "one token", "without queries", "without keys", "empty")
# Of those that have as many keys as queries.
SAME = ("equal", "same")
# The products of queries and keys beyond float16, which holds 65504.
_OVERFLOWING = 1.2e5


@dataclass(frozen=True, eq=False)
class Drawing:
    """Draws the call of a choice."""

    chosen: Choice  # A level for each feature
    heads: int  # How many query heads there are
    seed: int  # Where tensors are drawn from
    dtype: torch.dtype  # The dtype of all tensors of floats
    device: torch.device  # Where they are

    def call(self, always: Mapping[str, Any]) -> Call:
        """Draw all that is chosen, besides the fields that every call has."""
        call = Call(*self._tensors(), **always)
        drawn: dict[str, Callable[[], Any]] = {
            "causal": lambda: True, "scale": lambda: self.chosen["scale"], "softcap": lambda: 2.0,
            "sinks": lambda: self._drawn("sinks", self.heads),
            "alibi": lambda: self._given(2.0 ** -torch.arange(1, self.heads + 1).clamp(max=8)),
            "documents": self._documents, "lengths": self._real, "window": self._window,
            "chunk": lambda: max(3, self.chosen["sizes"][1] // 3),
            "bias": lambda: self._drawn("bias", *self._whole),
        }  # fmt: skip
        own = {name: make() for name, make in drawn.items()
               if self.chosen.get(name, False) not in (False, NONE)}  # fmt: skip
        return self._stored(self._masked(replace(call, **own, **self._ragged())))

    @property
    def _whole(self) -> tuple[int, int, int, int]:
        """The shape of the scores."""
        return (self.chosen["batch"], self.heads, *self.chosen["sizes"])

    def _given(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype)

    def _drawn(self, name: str, *shape: int) -> Tensor:
        return self._given(draw(name, self.seed, *shape))

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        batch, heads, query_len, key_len = self._whole
        width, key_heads = self.chosen["head_dim"], heads // self.chosen["group"]
        latent = self.chosen["value_dim"] == "latent"
        value_dim = width if self.chosen["value_dim"] == "equal" else max(1, width - 4)
        value_dim = width - width // 9 if latent else value_dim
        query, key, value = HOLDING[self.chosen["numbers"]](
            draw("query", self.seed, batch, heads, query_len, width),
            draw("key", self.seed, batch, key_heads, key_len, width),
            draw("value", self.seed, batch, key_heads, key_len, value_dim),
        )
        value = key[..., :value_dim] if latent else value  # a part of the keys themselves
        return self._given(query), self._given(key), self._given(value)

    def _documents(self) -> tuple[Tensor, Tensor]:
        length = self.chosen["sizes"][1]
        ends = torch.tensor([length // 3 + n % 2 for n in range(self.chosen["batch"])])
        each = (torch.arange(length) >= ends[:, None]).long().to(self.device)
        return each, each

    def _real(self) -> Tensor:
        """How many keys are real: all, and fewer of further entries; none of the last, if empty."""
        query_len, key_len = self.chosen["sizes"]
        least = min(query_len, key_len)
        real = [max(least, key_len - 2 * sample) for sample in range(self.chosen["batch"])]
        if self.chosen["lengths"] == "empty":
            real[-1] = 0
        return torch.tensor(real, device=self.device)

    def _window(self) -> tuple[int, int | None]:
        left = max(2, self.chosen["sizes"][1] // 3)
        return left, left - 1 if self.chosen["window"] == "both" else None

    def _ragged(self) -> dict[str, Any]:
        """The lengths of queries and keys of each batch entry, of what takes several of them."""
        kind = self.chosen.get("ragged")
        if kind is None:
            return {}
        batch, (query_len, key_len) = self.chosen["batch"], self.chosen["sizes"]
        queries = [max(1, query_len * (n + 1) // batch) for n in range(batch)]
        keys = [max(1, key_len - n * key_len // (batch + 1)) for n in range(batch)]
        if kind == "equal":
            queries, keys = [query_len] * batch, [key_len] * batch
        elif kind == "same":
            queries = keys
        elif kind != "unequal" and (batch > 1 or kind == "one token"):
            # Not the last alone: what follows it must not move.
            which = range(0, batch, 2) if kind == "one token" else [(batch - 1) // 2]
            wanted = {"without queries": (0, None), "without keys": (None, 0), "empty": (0, 0)}
            for n in which:
                of_queries, of_keys = wanted.get(kind, (1, 1))
                queries[n] = queries[n] if of_queries is None else of_queries
                keys[n] = keys[n] if of_keys is None else of_keys
        if self.chosen.get("append") == OWN:  # its own keys are among those of a query
            keys = [max(pair) for pair in zip(queries, keys, strict=True)]
        lengths = {"query_lengths": queries, "lengths": keys}
        return {name: torch.tensor(some, device=self.device) for name, some in lengths.items()}

    def _stored(self, call: Call) -> Call:
        """The same with how it is stored, if that is chosen."""
        # Of sequences that share pages, the first halves are alike.
        if "pages" not in self.chosen:
            return call
        of = self.chosen
        shared, left = (of.get(name, False) for name in ("shared", "left"))
        stored = Storage(of["pages"], of["append"], shared, left, of["unused"], self.seed)
        key, value, alike = call.key, call.value, call.key_len // 2 * shared
        if alike:
            first = (t[:1, :, :alike].expand(len(t), -1, -1, -1) for t in (key, value))
            rest = key[:, :, alike:], value[:, :, alike:]
            key, value = (torch.cat(parts, 2) for parts in zip(first, rest, strict=True))
        return replace(call, key=key, value=value, stored=stored)

    def _masked(self, call: Call) -> Call:
        """The same with the mask that is chosen, which leaves each query a key unless declared."""
        kind = self.chosen.get("mask", NONE)
        if kind == NONE:
            return call
        mask = self._mask(call)
        if kind == "boolean":
            return replace(call, mask=mask)
        fill, lowest = FILLS[self.chosen["fill"]], torch.finfo(self.dtype).min
        number = lowest if fill is None else max(fill, lowest) if math.isfinite(fill) else fill
        bias = self._drawn("bias of the mask", *mask.shape)
        bias = bias.masked_fill(~mask & (fill != 0.0), number)
        return replace(call, bias=bias if call.bias is None else bias + call.bias)

    def _mask(self, call: Call) -> Tensor:
        sizes = {**dict(zip("BHLS", self._whole, strict=True)), "1": 1}
        shape = [sizes[letter] for letter in self.chosen["shape"].strip("()").split(", ")]
        mask = (draw("mask", self.seed, *shape) > 0).to(self.device)
        seen = torch.ones(self._whole, dtype=torch.bool, device=self.device) & call.visible()
        # A query that the mask left nothing gets the first key that all else lets it see.
        left = seen.any(-1, keepdim=True) & ~(seen & mask).any(-1, keepdim=True)
        wanted = left & torch.zeros_like(seen).scatter(-1, seen.int().argmax(-1, keepdim=True), 1)
        for dim in (dim for dim, size in enumerate(shape) if size == 1):
            wanted = wanted.any(dim, keepdim=True)
        mask = mask | wanted
        if self.chosen.get("empty") and mask.shape[-2] == 1:  # before all real keys
            first = seen[0, 0, 0].sum()
            mask[..., :first] = False
        elif self.chosen.get("empty"):
            mask[..., mask.shape[-2] // 2, :] = False
        return mask


_Tensors: TypeAlias = tuple[Tensor, Tensor, Tensor]


def _structured(query: Tensor, key: Tensor, value: Tensor) -> _Tensors:
    """Each query looks for one channel, which some keys have; values tell their key."""
    width = query.shape[-1]
    eye = torch.eye(width, dtype=query.dtype)
    at_query, at_key = (torch.arange(t.shape[-2]) % width for t in (query, key))
    numbers = torch.arange(value.shape[-2], dtype=value.dtype).unsqueeze(-1) / 8
    # Laid out as drawn numbers are: a kernel may take no others.
    query, key = (6 * eye[at_query]).expand_as(query), eye[at_key].expand_as(key)
    return query.contiguous(), key.contiguous(), numbers + value / 64


def _overflowing(query: Tensor, key: Tensor, value: Tensor) -> _Tensors:
    """Products beyond float16 that are the same for all keys, so that only their rest matters."""
    query, key = query.clone(), key.clone()
    query[..., 0] = key[..., 0] = math.sqrt(_OVERFLOWING)
    return query, key, value


# What queries, keys and values may hold: what is made of the ordinary ones.
HOLDING: dict[str, Callable[[Tensor, Tensor, Tensor], _Tensors]] = {
    "ordinary": lambda query, key, value: (query, key, value),
    # Scores of a few hundred: exp of them overflows in every dtype but float64.
    "large": lambda query, key, value: (query * 40, key, value),
    "tiny": lambda query, key, value: (query * 1e-2, key * 0.1, value * 0.1),
    "structured": _structured,
    "overflowing": _overflowing,
}
