"""How the leading axes of an attention are batch entries and heads."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shaping:
    """How the leading axes of an attention are batch entries and heads."""

    lead: tuple[int, ...]  # The leading axes of the queries
    batch: int  # Number of batch entries
    heads: int  # Number of heads
    packed: int = 1  # How many heads that share keys were written as queries of one; 1 for none

    @classmethod
    def of(cls, rows: Tensor, before: tuple[int, ...] | None, heads: int | None) -> Shaping:
        """Read the axes of queries or weights (..., query_len, width)."""
        # A third axis from the right is one of heads in 4-D. In 3-D it is one of batch entries,
        # unless it was made by joining (batch, heads), see `tags.Tag`, or `heads` says how many it
        # holds. With more, heads are taken to be in groups.
        lead = tuple(rows.shape[:-2])
        group = rows.shape[-2]
        if before and len(lead) == 2 and before[:3] == (lead[0], lead[1] * group, 1):
            return cls(lead, lead[0], before[1], packed=group)
        if len(lead) != 1:
            return cls(lead, lead[0] if lead else 1, math.prod(lead[1:]))
        if before is not None and before[0] * before[1] == lead[0]:
            return cls(lead, before[0], before[1])
        heads = heads if heads is not None and lead[0] % heads == 0 else 1
        return cls(lead, lead[0] // heads, heads)

    @property
    def doubt(self) -> str:
        """What about this is a guess."""
        many = len(self.lead) > 2 and sum(size > 1 for size in self.lead) > 1
        return f"which of its leading axes {self.lead} are heads is not known" if many else ""

    def weights_shape(self, query_len: int, key_len: int) -> tuple[int, int, int, int]:
        """(batch, heads, query_len, key_len)."""
        return self.batch, self.heads, 1 if self.packed > 1 else query_len, key_len

    def queries(self, tensor: Tensor) -> Tensor:
        """A tensor with a row per query, (..., query_len, width), as 4-D."""
        length = 1 if self.packed > 1 else tensor.shape[-2]
        return tensor.reshape(self.batch, self.heads, length, tensor.shape[-1])

    def keys(self, tensor: Tensor) -> Tensor:
        """A tensor with a row per key, (..., key_len, width), as 4-D; it may have fewer heads."""
        lead = tuple(tensor.shape[:-2])
        length, width = tensor.shape[-2:]
        if len(lead) < 2 or len(self.lead) > 2:
            tensor = tensor.expand(*self.lead, length, width) if lead != self.lead else tensor
            return tensor.reshape(self.batch, self.heads, length, width)
        tensor = tensor.expand(*self.lead[:-1], lead[-1], length, width)
        return tensor.reshape(self.batch, lead[-1], length, width)

    def mask(self, tensor: Tensor) -> Tensor:
        """Something that broadcasts to the weights, as 4-D that does."""
        missing = len(self.lead) + 2 - tensor.ndim
        if missing > 0:
            tensor = tensor[(None,) * missing]
        lead = tuple(tensor.shape[:-2])
        rows, keys = tensor.shape[-2:]
        if all(size == 1 for size in lead):
            tensor = tensor.reshape(1, 1, rows, keys)
            if self.packed == 1 or rows == 1:
                return tensor
            lead = (1, 1)
        if self.packed > 1:
            tensor = tensor.expand(lead[0], self.heads // self.packed, self.packed, keys)
            return tensor.reshape(lead[0], self.heads, 1, keys)
        if len(lead) == 2:
            return tensor
        tensor = tensor.expand(*self.lead, rows, keys)
        return tensor.reshape(self.batch, self.heads, rows, keys)


def joined(shape: torch.Size, output: Tensor) -> tuple[int, ...] | None:
    """The shape (batch, heads, ...) of a tensor of which these, or heads, queries, were joined."""
    # Before batch and heads there may be an axis of queries, keys and values.
    old, new = tuple(shape), tuple(output.shape)
    if 0 in old or len(new) < 3 or new == old:
        return None
    if len(old) == 5 and new == (old[0], old[1] * old[2], *old[3:]):
        return old
    if len(new) == 3 and len(old) >= 4 and old[-1] == new[-1] and new[0] == old[0] * old[1]:
        return (*old[:2], *new[1:])
    if len(new) == len(old) == 3 and new[0] == old[0] and new[1] * new[2] == old[1] * old[2]:
        # (length, batch, heads * width): a head's width is split off, and the rest joins the batch.
        return (old[1], new[1] // old[1], new[0], new[2]) if new[1] % old[1] == 0 else None
    if len(old) >= 4 and old[0] < new[0] and new[0] * new[1] == old[0] * old[1]:
        # The same of pictures, (batch, heads * width, rows, columns).
        return (old[0], new[0] // old[0], new[2], new[1]) if new[0] % old[0] == 0 else None
    packs = len(new) == len(old) == 4 and old[2] == 1 and new[0] == old[0] and new[3] == old[3]
    return old if packs and new[1] * new[2] == old[1] else None


def still_joined(
    before: tuple[int, ...] | None, shape: torch.Size, made: Tensor
) -> tuple[int, ...] | None:
    """What that shape is now: that of one of queries, keys and values, or no other."""
    if before is None or made.shape == shape:
        return before
    before = before[1:] if len(before) == 5 else before
    return before if made.ndim >= 3 and len(made) == before[0] * before[1] else None


def in_windows(shape: torch.Size, made: Tensor) -> bool:
    """Whether rows were split into windows, (..., windows, rows, width)."""
    *lead, rows, width = shape
    return made.ndim > 3 and made.shape[-1] == width and tuple(made.shape[:-3]) == tuple(lead) and (
        1 < made.shape[-3] < rows == made.shape[-3] * made.shape[-2]
    )  # fmt: skip
