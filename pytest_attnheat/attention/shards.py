"""How a sequence lies on several ranks: which positions each of them holds, and in which order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

# ring and ulysses: rank r holds the r-th chunk. zigzag: of twice as many chunks, the r-th from the
# front and the r-th from the end. striped: position p lies on rank p % ranks.
Scheme: TypeAlias = Literal["ring", "zigzag", "striped", "ulysses"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)


@dataclass(frozen=True)
class Shards:
    """A scheme over some ranks."""

    scheme: Scheme  # Its name, of `SCHEMES`
    ranks: int  # How many ranks there are

    @property
    def parts(self) -> int:
        """How many parts a length is cut into, of which only the last may be shorter."""
        return self.ranks * (2 if self.scheme == "zigzag" else 1)

    def limits(self, only: tuple[Any, ...], *, uneven: bool) -> dict[str, Any]:
        """Return which calls can be asked, as fields of `levels.Declared`."""
        if self.scheme == "ulysses":  # each rank takes some of the heads
            only = (*only, ("key_heads", (self.ranks, 2 * self.ranks)))
        return {"parts": self.parts, "uneven": uneven, "only": only}

    def of(self, length: int) -> list[Tensor]:
        """Return the positions that each rank holds, in the order in which it holds them."""
        every = torch.arange(length)
        if self.scheme == "striped":
            return [every[rank :: self.ranks] for rank in range(self.ranks)]
        size = -(-length // self.parts)
        chunks = [every[start * size : (start + 1) * size] for start in range(self.parts)]
        if self.scheme == "zigzag":
            return [torch.cat([chunks[r], chunks[-1 - r]]) for r in range(self.ranks)]
        return chunks

    def owner(self, length: int) -> Tensor:
        """Return the rank that holds each position, (length,)."""
        found = torch.empty(length, dtype=torch.long)
        for rank, positions in enumerate(self.of(length)):
            found[positions] = rank
        return found

    def local(self, length: int) -> Tensor:
        """Return the index of each position within its shard, (length,)."""
        found = torch.empty(length, dtype=torch.long)
        for positions in self.of(length):
            found[positions] = torch.arange(len(positions))
        return found

    def scatter(self, tensor: Tensor, dim: int) -> list[Tensor]:
        """Return what each rank holds of a tensor, along the dimension of its positions."""
        shards = self.of(tensor.shape[dim])
        return [tensor.index_select(dim, one.to(tensor.device)) for one in shards]

    def gather(self, shards: Sequence[Tensor], dim: int) -> Tensor:
        """Return the tensor that was scattered."""
        order = torch.cat(self.of(sum(shard.shape[dim] for shard in shards))).argsort()
        whole = torch.cat(list(shards), dim)
        return whole.index_select(dim, order.to(whole.device))
